//! Embeds the kernels as PTX: the text of each kernel file and tier, deflated, and a row for each part of it that is
//! loaded at a time.
//!
//! With the feature `ptx` and a device compiler; else the table is empty, and with the feature one warning names the
//! command that installs a compiler. The compiler's own files live in `target/ptx`, shared with xtask.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use ptx_build::{CHECKS, Compiler, INSTALL_COMMAND, Kernels, Module, Part, PtxError, TIERS, Tier};

/// Names of tiers, separated by commas.
const TIERS_VARIABLE: &str = "RUNIK_PTX_TIERS";

fn main() {
    for cfg in Tier::all_cfgs() {
        println!("cargo::rustc-check-cfg=cfg({cfg})");
    }
    println!("cargo::rustc-check-cfg=cfg(entries_of, values(any()))");
    println!("cargo::rerun-if-changed=build.rs");
    let out_dir = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let modules =
        if std::env::var_os("CARGO_FEATURE_PTX").is_some() { modules(&out_dir) } else { Vec::new() };
    let table = table(&out_dir, &modules).unwrap_or_else(|error| panic!("embed PTX: {error}"));
    std::fs::write(out_dir.join("ptx_table.rs"), table).unwrap_or_else(|error| panic!("embed PTX: {error}"));
}

fn modules(out_dir: &Path) -> Vec<Module> {
    println!("cargo::rerun-if-changed=src");
    println!("cargo::rerun-if-changed=../quant/src");
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the workspace");
    // OUT_DIR is target/PROFILE/build/NAME/out, with the target's name before PROFILE where one is given.
    let build_dir = out_dir.ancestors().nth(4).unwrap_or(out_dir).join("ptx");
    let cargo = PathBuf::from(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    let build = || {
        std::fs::create_dir_all(&build_dir)
            .map_err(|source| PtxError::Io { what: format!("create {}", build_dir.display()), source })?;
        let compiler = Compiler::find(&build_dir)?;
        let kernels = Kernels::prepare(&compiler, &cargo, root, &build_dir)?;
        let embedded: Vec<String> = kernels.names().iter().filter(|name| *name != CHECKS).cloned().collect();
        kernels.build(&embedded, &tiers())
    };
    match build() {
        Ok(modules) => modules,
        Err(error @ PtxError::NoCompiler { .. }) => {
            println!("cargo::warning=built without GPU kernels ({error}); to have them: {INSTALL_COMMAND}");
            Vec::new()
        }
        Err(error) => panic!("{error}"),
    }
}

/// The tiers to build: all, or for a quicker build those that the developer names.
fn tiers() -> Vec<Tier> {
    println!("cargo::rerun-if-env-changed={TIERS_VARIABLE}");
    match std::env::var(TIERS_VARIABLE) {
        Err(_) => TIERS.to_vec(),
        Ok(names) => {
            let tier = |name: &str| {
                *Tier::named(name).unwrap_or_else(|| panic!("{TIERS_VARIABLE}: no tier {name:?}"))
            };
            names.split(',').map(tier).collect()
        }
    }
}

/// Source of the table, with the text of each kernel file and tier deflated beside it.
fn table(out_dir: &Path, modules: &[Module]) -> std::io::Result<String> {
    // The files' bytes as constants of their own, and all in a static: so that they are in a program once.
    let (mut files, mut rows) = (String::new(), String::new());
    for (i, module) in modules.iter().enumerate() {
        let Tier { name: tier, sm, exact, .. } = module.tier;
        let file = format!("{}.{tier}.ptx.deflate", module.name);
        std::fs::write(out_dir.join(&file), miniz_oxide::deflate::compress_to_vec(module.ptx.as_bytes(), 9))?;
        let (ptx_bytes, kernel_file) = (module.ptx.len(), &module.name);
        // Writing to a string cannot fail.
        let _ = writeln!(
            files,
            "const FILE_{i}: &[u8] = include_bytes!(concat!(env!(\"OUT_DIR\"), \"/{file}\"));"
        );
        for Part { name, ranges, kernels } in module.parts() {
            let ranges: Vec<(usize, usize)> = ranges.iter().map(|range| (range.start, range.end)).collect();
            let _ = writeln!(
                rows,
                "PtxModule {{ file: {kernel_file:?}, name: {name:?}, tier: {tier:?}, sm: {sm}, exact: {exact}, kernels: &{kernels:?}, \
                 file_bytes: {ptx_bytes}, ranges: &{ranges:?}, \
                 deflated: FILE_{i} }},",
            );
        }
    }
    Ok(format!("{{\n{files}&[\n{rows}]\n}}"))
}
