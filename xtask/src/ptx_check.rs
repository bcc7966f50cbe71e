//! The GPU kernels as PTX: every tier compiles, keeps the rules, and assembles with NVIDIA's ptxas with few spills.
//!
//! Installs what it needs: Debian's device compiler by apt if we are root, ptxas out of a Python wheel into
//! `target/tools`. Without a compiler the step is skipped with the reasons; without ptxas only its part is.
//! A table of registers, shared memory and instructions per kernel goes to `target/ptx/resources.txt`, for review.

use std::path::{Path, PathBuf};
use std::process::Command;

use ptx_build::ptxas::{self, Ptxas, Resources};
use ptx_build::{Compiler, DEBIAN_PACKAGES, Kernels, Module, PtxError, TIERS, Tier};

use crate::apt;
use crate::args;
use crate::error::TaskError;
use crate::process;
use crate::step::{Counts, Outcome};
use crate::wheel;
use crate::workspace::Workspace;

/// NVIDIA's assembler: this version is the last that knows every tier from sm_50 on.
const PTXAS_PACKAGE: &str = "nvidia-cuda-nvcc-cu12==12.9.86";

/// `cargo xtask ptx-check`.
pub fn run(workspace: &Workspace, args: &[String]) -> Result<(), TaskError> {
    args::none("ptx-check", args)?;
    println!("{}", check(workspace)?.note);
    Ok(())
}

/// Compiles all tiers, tests them as programs embed them, then assembles them.
pub fn check(workspace: &Workspace) -> Result<Outcome, TaskError> {
    let (compiler, modules) = match modules(workspace, None, TIERS) {
        Err(TaskError::Ptx(error @ PtxError::NoCompiler { .. })) => {
            return Ok(Outcome::skipped(error.to_string()));
        }
        built => built?,
    };
    embedded(workspace)?;
    let ptx_bytes: usize = modules.iter().map(|module| module.ptx.len()).sum();
    let n_kernels: usize = modules.iter().map(|module| module.kernels.len()).sum::<usize>() / TIERS.len();
    let tiers = TIERS.len();
    let built = format!("{n_kernels} kernels × {tiers} tiers, {} KiB of PTX ({compiler})", ptx_bytes >> 10);
    let ptxas = match assembler(workspace) {
        Ok(ptxas) => ptxas,
        Err(error) => {
            let counts = Counts { passed: 2, skipped: 1, ..Counts::default() };
            return Ok(Outcome { counts, note: format!("{built}; not assembled: {error}") });
        }
    };
    let rows = assemble(workspace, &ptxas, &modules)?;
    let table = build_dir(workspace)?.join("resources.txt");
    std::fs::write(&table, ptxas::table(&rows)).map_err(TaskError::path("write", &table))?;
    let bound = rows.iter().flat_map(|(_, rows)| rows).map(|row| row.registers).max().unwrap_or(0);
    let spilling: Vec<u32> = rows
        .iter()
        .flat_map(|(_, rows)| rows)
        .map(|row| row.spill_bytes)
        .filter(|&bytes| bytes > 0)
        .collect();
    let most = spilling.iter().copied().max().unwrap_or(0);
    let note = format!(
        "{built}; ptxas: {} entries spill, at most {most} bytes; at most {bound} registers; {}",
        spilling.len(),
        table.display()
    );
    Ok(Outcome { counts: Counts { passed: 3, ..Counts::default() }, note })
}

/// The tests of what is embedded, which exist with the feature `ptx` alone: every entry for every tier, whole, and small.
fn embedded(workspace: &Workspace) -> Result<(), TaskError> {
    let mut command = workspace.cargo();
    command.args(["test", "--quiet", "-p", "gpu-kernels", "--features", "ptx", "--lib", "modules"]);
    // All tiers, whatever a developer builds otherwise.
    process::run(command.env_remove("RUNIK_PTX_TIERS"))
}

/// The device compiler, installed if it is not there.
pub fn compiler(workspace: &Workspace) -> Result<Compiler, TaskError> {
    let build_dir = build_dir(workspace)?;
    match Compiler::find(&build_dir) {
        Err(PtxError::NoCompiler { reasons }) => {
            apt::install(&DEBIAN_PACKAGES).map_err(|reason| {
                let reasons = reasons.into_iter().chain([reason]).collect();
                TaskError::Ptx(PtxError::NoCompiler { reasons })
            })?;
            Ok(Compiler::find(&build_dir)?)
        }
        found => Ok(found?),
    }
}

/// PTX of these kernel files (of all where none are named) for the tiers, and whose compiler made it.
pub fn modules(
    workspace: &Workspace,
    names: Option<&[String]>,
    tiers: &[Tier],
) -> Result<(String, Vec<Module>), TaskError> {
    let compiler = compiler(workspace)?;
    let build_dir = build_dir(workspace)?;
    let cargo = PathBuf::from(workspace.cargo().get_program());
    let kernels = Kernels::prepare(&compiler, &cargo, workspace.root(), &build_dir)?;
    let modules = kernels.build(names.unwrap_or(kernels.names()), tiers)?;
    Ok((compiler.description, modules))
}

/// What the kernels of each module take.
pub fn assemble(
    workspace: &Workspace,
    ptxas: &Ptxas,
    modules: &[Module],
) -> Result<Vec<(Tier, Vec<Resources>)>, TaskError> {
    let build_dir = build_dir(workspace)?;
    let assemble = |module: &Module| Ok((module.tier, ptxas::assemble(ptxas, module, &build_dir)));
    let (mut rows, mut broken) = (Vec::new(), Vec::new());
    for (tier, result) in ptx_build::in_parallel(modules, assemble)? {
        match result {
            Ok(of_module) => rows.push((tier, of_module)),
            Err(error) => broken.push(error),
        }
    }
    // All are said, one is returned.
    for error in broken.iter().skip(1) {
        eprintln!("{error}");
    }
    broken.into_iter().next().map_or(Ok(rows), |error| Err(error.into()))
}

/// Where PTX and the device's `core` are kept; the same folder as the build script's.
fn build_dir(workspace: &Workspace) -> Result<PathBuf, TaskError> {
    let dir = workspace.target().join("ptx");
    std::fs::create_dir_all(&dir).map_err(TaskError::path("create", &dir))?;
    dir.canonicalize().map_err(TaskError::path("find", &dir))
}

/// ptxas, fetched if it is not there.
pub fn assembler(workspace: &Workspace) -> Result<Ptxas, TaskError> {
    let ptxas = workspace.target().join("tools").join("bin").join("ptxas");
    if !process::works(Command::new(&ptxas).arg("--version")) {
        eprintln!("fetching NVIDIA's ptxas (39 MB, package {PTXAS_PACKAGE}) …");
        wheel::fetch_file(PTXAS_PACKAGE, "ptxas", &ptxas)?;
        make_executable(&ptxas)?;
    }
    Ok(Ptxas::new(ptxas)?)
}

#[cfg(unix)]
fn make_executable(path: &Path) -> Result<(), TaskError> {
    use std::os::unix::fs::PermissionsExt;
    let mode = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(path, mode).map_err(TaskError::path("make executable", path))
}

#[cfg(not(unix))]
fn make_executable(_path: &Path) -> Result<(), TaskError> {
    Ok(())
}
