//! Proof that quant, gguf, the engine core and the server's protocol need no std: they compile for a target that has none.
//!
//! `x86_64-unknown-none` ships `core` and `alloc` only, so one use of std anywhere below these crates is a compile
//! error. rustup brings the target in seconds.

use std::process::Command;

use crate::args;
use crate::error::TaskError;
use crate::process;
use crate::step::Outcome;
use crate::workspace::Workspace;

/// Crates that must build without std, with their default features off.
const CRATES: &[&str] = &["quant", "gguf", "gpu-kernels", "engine", "server"];
const TARGET: &str = "x86_64-unknown-none";

/// `cargo xtask no-std`.
pub fn run(workspace: &Workspace, args: &[String]) -> Result<(), TaskError> {
    args::none("no-std", args)?;
    println!("{}", check(workspace)?.note);
    Ok(())
}

/// Compiles each crate for [`TARGET`]; without code generation, which would prove no more.
pub fn check(workspace: &Workspace) -> Result<Outcome, TaskError> {
    add_target(workspace, TARGET)?;
    let mut command = workspace.cargo();
    command.args(["check", "--quiet", "--no-default-features", "--target", TARGET]);
    for name in CRATES {
        command.args(["-p", name]);
    }
    process::run(&mut command)?;
    Ok(Outcome::passed(format!("{} compile for {TARGET}", CRATES.join(", "))))
}

/// Makes sure that the toolchain in use has `target`.
pub fn add_target(workspace: &Workspace, target: &str) -> Result<(), TaskError> {
    let mut list = Command::new("rustup");
    list.args(["target", "list", "--installed"]).current_dir(workspace.root());
    if process::capture(&mut list)?.lines().any(|line| line == target) {
        return Ok(());
    }
    process::run(Command::new("rustup").args(["target", "add", target]).current_dir(workspace.root()))
}
