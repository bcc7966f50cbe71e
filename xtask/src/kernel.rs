//! `cargo xtask kernel NAME`: one kernel's cases on the emulator, then what its entries became as PTX.

use std::time::Instant;

use gpu_kernels::case;
use gpu_kernels::emu::{Emulator, Options};
use gpu_kernels::registry::{self, KERNELS};
use ptx_build::{PtxError, Tier, ptxas};

use crate::error::TaskError;
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
    let kernel = registry::find(name).ok_or_else(|| {
        let known: Vec<&str> = KERNELS.iter().map(|kernel| kernel.name()).collect();
        TaskError::Usage { what: format!("no kernel is called {name:?}; there are {}", known.join(", ")) }
    })?;
    let tier =
        Tier::named(tier).ok_or_else(|| TaskError::Usage { what: format!("no tier is called {tier:?}") })?;

    println!("{:<60} {:>8} {:>10} {:>10}", "case", "ms", "nmse", "bytes");
    let mut failed = 0;
    for i in 0..kernel.n_cases() {
        let problem = kernel.problem(i, i as u64);
        let start = Instant::now();
        let emulator = Emulator::new(Options::default());
        let result = case::run(&emulator, Emulator::MODULE, &problem, kernel.nmse_max());
        let ms = start.elapsed().as_secs_f64() * 1e3;
        let (label, bytes) = (kernel.label(i), kernel.bytes(i));
        match result {
            Ok(nmse) => println!("{label:<60} {ms:>8.1} {nmse:>10.1e} {bytes:>10}"),
            Err(error) => {
                failed += 1;
                println!("{label:<60} {ms:>8.1} FAILED: {error}");
            }
        }
    }
    if failed != 0 {
        return Err(TaskError::Checks { failed });
    }

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
