//! Licences, bans and sources of every dependency, by cargo-deny; `deny.toml` is the one place of policy.

use std::process::Command;

use crate::args;
use crate::error::TaskError;
use crate::process;
use crate::step::Outcome;
use crate::workspace::Workspace;

/// The version installed where there is none; pinned so that a new release cannot change a verdict.
const VERSION: &str = "0.20.2";

/// `cargo xtask deny`.
pub fn run(workspace: &Workspace, args: &[String]) -> Result<(), TaskError> {
    args::none("deny", args)?;
    println!("{}", check(workspace)?.note);
    Ok(())
}

/// Runs cargo-deny, which it installs below the target folder if the machine has none.
pub fn check(workspace: &Workspace) -> Result<Outcome, TaskError> {
    let mut command = deny_command(workspace)?;
    command.args(["--log-level", "warn", "check", "--hide-inclusion-graph", "licenses", "bans", "sources"]);
    process::run(&mut command)?;
    Ok(Outcome::passed("licences, bans, sources (deny.toml)"))
}

fn deny_command(workspace: &Workspace) -> Result<Command, TaskError> {
    let mut installed = workspace.cargo();
    installed.arg("deny");
    if process::works(workspace.cargo().args(["deny", "--version"])) {
        return Ok(installed);
    }
    let root = workspace.target().join("tools");
    let binary = root.join("bin").join("cargo-deny");
    if !process::works(Command::new(&binary).arg("--version")) {
        eprintln!("installing cargo-deny {VERSION} below {} (one to two minutes, once)", root.display());
        let mut install = workspace.cargo();
        // Unoptimised: it compiles three times faster and the check takes a second either way.
        install.args(["install", "--quiet", "--locked", "--debug", "--version", VERSION, "--root"]);
        process::run(install.arg(&root).arg("cargo-deny"))?;
    }
    let mut command = Command::new(binary);
    command.current_dir(workspace.root());
    Ok(command)
}
