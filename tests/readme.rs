//! The README's pages of C++ and Python are the example programs, which their own tests run.

use std::path::Path;

#[test]
fn readme_shows_the_examples() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = std::fs::read_to_string(root.join("README.md")).unwrap();
    for (language, file) in [
        ("cpp", "cpp_tests/readme_example.cpp"),
        ("python", "python_shim/examples/torch_example.py"),
        ("python", "python_shim/examples/readme_example.py"),
    ] {
        let program = std::fs::read_to_string(root.join(file)).unwrap();
        let block = format!("```{language}\n{}\n```", program.trim_end());
        assert!(readme.contains(&block), "README.md does not show {file} as it is");
    }
}
