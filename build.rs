//! Names the shared library for the loader, and makes the linker refuse what it cannot resolve.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-link-arg=-Wl,-soname,libadalora.so.0");
    // Sanitizers leave symbols to the program's own runtime.
    if std::env::var_os("CARGO_CFG_SANITIZE").is_none() {
        println!("cargo::rustc-link-arg=-Wl,-z,defs");
    }
}
