//! Links the image as one static ELF by its own linker script. The flags are for this crate's program only: as
//! `RUSTFLAGS` they would hit build scripts too.

fn main() {
    println!("cargo::rerun-if-changed=link.ld");
    println!("cargo::rerun-if-changed=build.rs");
    let folder = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    let script = format!("-Wl,-T{folder}/link.ld");
    let flags = [
        "-nostartfiles",
        "-nostdlib",
        "-static",
        "-no-pie",
        "-Wl,--build-id=none",
        "-Wl,--gc-sections",
        // Kernels for several instruction sets, and for formats of one layout, come out alike.
        "-Wl,--icf=all",
        "-Wl,-z,norelro",
        "-Wl,-z,noexecstack",
        &script,
    ];
    for flag in flags {
        println!("cargo::rustc-link-arg-bins={flag}");
    }
}
