//! The header in the repository is the one that the source describes.

use std::path::Path;

#[test]
fn header_is_current() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).unwrap();
    let mut text = Vec::new();
    cbindgen::Builder::new().with_crate(root).with_config(config).generate().unwrap().write(&mut text);
    let path = root.join("include/adalora.h");
    if std::env::var_os("WRITE_HEADER").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    assert!(std::fs::read(&path).unwrap() == text, "include/adalora.h differs from the source: run `make header`");
}
