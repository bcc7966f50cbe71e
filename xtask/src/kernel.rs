//! `cargo xtask kernel NAME`: one kernel's cases on the emulator, then what its entries became as PTX.

use std::time::Instant;

use ptx_build::{PtxError, Tier, ptxas};

use crate::error::TaskError;
use crate::process;
use crate::ptx_check;
use crate::workspace::Workspace;

/// Arguments.
pub const ARGS: &str = "NAME [TIER]";
/// One line of help.
pub const HELP: &str = "run a GPU kernel's cases on the emulator, report its PTX (sm_80)";
const DEFAULT_TIER: &str = "sm_80";

/// Runs the task.
pub fn run(workspace: &Workspace, args: &[String]) -> Result<(), TaskError> {
    let (name, tier) = match args {
        [name] => (name, DEFAULT_TIER),
        [name, tier] => (name, tier.as_str()),
        _ => return Err(TaskError::Usage { what: format!("usage: cargo xtask kernel {ARGS}") }),
    };
    let tier =
        Tier::named(tier).ok_or_else(|| TaskError::Usage { what: format!("no tier is called {tier:?}") })?;

    let mut emulate = workspace.cargo();
    emulate.args([
        "run",
        "--quiet",
        "-p",
        "gpu-kernels",
        "--features",
        "emu",
        "--example",
        "emulate",
        "--",
        name,
    ]);
    process::run(&mut emulate)?;

    let start = Instant::now();
    let built = ptx_check::modules(workspace, Some(std::slice::from_ref(name)), std::slice::from_ref(tier));
    let (compiler, modules) = match built {
        Err(TaskError::Ptx(error @ PtxError::NoCompiler { .. })) => {
            eprintln!("no PTX report: {error}");
            return Ok(());
        }
        built => built?,
    };
    println!("\n{name} for {} in {:.1} s ({compiler})", tier.name, start.elapsed().as_secs_f64());
    let ptxas = ptx_check::assembler(workspace)?;
    print!("{}", ptxas::table(&ptx_check::assemble(workspace, &ptxas, &modules)?));
    Ok(())
}
