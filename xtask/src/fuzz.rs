//! `cargo xtask fuzz [SECONDS]`: each fuzz target for a while, by cargo-fuzz.

use std::process::Command;

use crate::error::TaskError;
use crate::process;
use crate::workspace::Workspace;

const DEFAULT_SECONDS: u32 = 60;

/// Folders that have fuzz targets.
const FOLDERS: &[&str] = &["gguf", "engine/server", "runtime-uk"];

/// Runs every target found in them.
pub fn run(workspace: &Workspace, args: &[String]) -> Result<(), TaskError> {
    let seconds = match args {
        [] => DEFAULT_SECONDS,
        [seconds] => seconds.parse().map_err(|_| TaskError::Usage {
            what: format!("fuzz takes a number of seconds, got {seconds:?}"),
        })?,
        _ => return Err(TaskError::Usage { what: "fuzz takes at most one argument: seconds".into() }),
    };
    if !process::works(Command::new("rustup").args(["run", "nightly", "cargo", "fuzz", "--version"])) {
        return Err(TaskError::Missing {
            what: "no nightly toolchain with cargo-fuzz".into(),
            fix: "rustup toolchain install nightly && cargo install cargo-fuzz --locked".into(),
        });
    }
    let built = workspace.target().join("fuzz");
    for folder in FOLDERS {
        let fuzz = || {
            let mut command = Command::new("rustup");
            command.args(["run", "nightly", "cargo", "fuzz"]).current_dir(workspace.root().join(folder));
            command
        };
        for target in process::capture(fuzz().arg("list"))?.lines() {
            eprintln!("== {folder}: {target}, {seconds} s");
            // What it finds goes to the first folder; the second has the seeds, if there are any, and stays as it is.
            let found = built.join("corpus").join(target);
            std::fs::create_dir_all(&found).map_err(TaskError::path("create", &found))?;
            let mut command = fuzz();
            command.args(["run", "--target-dir"]).arg(&built).arg(target).arg(found);
            let seeds = workspace.root().join(folder).join("fuzz/corpus").join(target);
            command.args(Some(seeds).filter(|seeds| seeds.is_dir()));
            process::run(command.args(["--", &format!("-max_total_time={seconds}")]))?;
        }
    }
    Ok(())
}
