//! Names the shared library for the loader, makes the linker refuse what it cannot resolve, and links no CUDA.

use std::path::PathBuf;
use std::{env, fs};

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-link-arg=-Wl,-soname,libadalora.so.0");
    // Sanitizers leave symbols to the program's own runtime.
    if env::var_os("CARGO_CFG_SANITIZE").is_none() {
        println!("cargo::rustc-link-arg=-Wl,-z,defs");
    }
    // The -sys crates ask for these libraries, of which they give us types alone: empty archives satisfy them.
    let folder = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("nocuda");
    fs::create_dir_all(&folder).expect("OUT_DIR is writable");
    for library in ["cudart", "cublas"] {
        fs::write(folder.join(format!("lib{library}.a")), b"!<arch>\n").expect("OUT_DIR is writable");
    }
    println!("cargo::rustc-link-search=native={}", folder.display());
}
