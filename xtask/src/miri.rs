//! `cargo xtask miri [NAME]`: the tests of the crates that read bytes from outside, under miri. Slow, so not part of `test`.

use std::process::Command;

use crate::error::TaskError;
use crate::process;
use crate::workspace::Workspace;

/// Runs the tests of gguf and quant; an argument selects those with that text in their name.
pub fn run(workspace: &Workspace, args: &[String]) -> Result<(), TaskError> {
    if !process::works(Command::new("rustup").args(["run", "nightly", "cargo", "miri", "--version"])) {
        return Err(TaskError::Missing {
            what: "no nightly toolchain with miri".into(),
            fix: "rustup toolchain install nightly --component miri,rust-src".into(),
        });
    }
    let mut command = Command::new("rustup");
    command.args(["run", "nightly", "cargo", "miri", "test", "-p", "gguf", "-p", "quant"]);
    // Otherwise libm asks the processor what it has, in assembly.
    command.args(["--features", "libm/force-soft-floats"]).args(args);
    // Tests read golden files.
    command.env("MIRIFLAGS", "-Zmiri-disable-isolation");
    process::run(command.current_dir(workspace.root()))
}
