//! `cargo xtask gpu-test`: a folder that tests and measures every kernel on a machine that has only NVIDIA's driver.
//!
//! The folder holds one program with the kernels of all tiers in it; `target/gpu-test-folder`, or where `--out` says. On a
//! machine with a GPU the task also runs it, with the options that follow. `--engine` adds the engine's test programs: with
//! `RUNIK_TEST_GPU=0` they hold models on that GPU to the golden data (`RUNIK_GOLDENS`, `RUNIK_TEST_MODEL`).

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::error::TaskError;
use crate::process;
use crate::ptx_check;
use crate::workspace::Workspace;

/// Arguments.
pub const ARGS: &str = "[--out DIR] [--engine] [--only KERNEL] [--tier T] [--jobs N] [--bench [FILTER]] \
    [--tune [FORMATS]] [--json FILE]";
/// One line of help.
pub const HELP: &str = "make a folder that tests every kernel on a GPU; run it if there is one";
const PROGRAM: &str = "gpu-test";
/// The engine's tests that run on a GPU.
const ENGINE_TESTS: [&str; 5] = ["conformance", "cuda", "smollm2", "split", "tiny_models"];
/// The folder is carried to other machines.
const MAX_BYTES: u64 = 40 << 20;

/// Runs the task.
pub fn run(workspace: &Workspace, args: &[String]) -> Result<(), TaskError> {
    let (out, rest) = match args {
        [flag, dir, rest @ ..] if flag == "--out" => (PathBuf::from(dir), rest),
        [flag] if flag == "--out" => {
            return Err(TaskError::Usage { what: "gpu-test: --out needs a value".into() });
        }
        _ => (workspace.target().join("gpu-test-folder"), args),
    };
    let (engine, rest) = match rest {
        [flag, rest @ ..] if flag == "--engine" => (true, rest),
        rest => (false, rest),
    };
    // Without kernels the program could test nothing; the build script alone would only warn.
    ptx_check::compiler(workspace)?;
    let commit = process::capture(
        Command::new("git").args(["rev-parse", "--short", "HEAD"]).current_dir(workspace.root()),
    );
    let mut build = workspace.cargo();
    build.args(["build", "--profile", "gpu-test", "-p", "benches", "--bin", PROGRAM]);
    if let Ok(commit) = commit {
        build.env("RUNIK_COMMIT", commit.trim());
    }
    process::run(&mut build)?;
    std::fs::create_dir_all(&out).map_err(TaskError::path("create", &out))?;
    let program = out.join(PROGRAM);
    let built = workspace.target().join("gpu-test").join(PROGRAM);
    let bytes = std::fs::copy(&built, &program).map_err(TaskError::path("copy to", &program))?;
    println!("{} ({:.1} MiB)", program.display(), bytes as f64 / f64::from(1 << 20));
    if bytes > MAX_BYTES {
        return Err(TaskError::Output {
            line: "cargo build -p benches".into(),
            what: format!("{bytes} bytes, more than the {MAX_BYTES} that can be carried"),
        });
    }
    if engine {
        engine_tests(workspace, &out)?;
    }
    // The driver is what makes the difference; the program says so itself if asked to run without.
    if rest.is_empty() && !process::works(Command::new("nvidia-smi").arg("-L")) {
        println!("no GPU here: run it on a machine that has one");
        return Ok(());
    }
    process::run(Command::new(&program).args(rest))
}

/// Builds the engine's tests with the kernels in them and copies them to the folder.
fn engine_tests(workspace: &Workspace, out: &Path) -> Result<(), TaskError> {
    let mut build = workspace.cargo();
    build.args(["test", "--no-run", "--profile", "gpu-test", "-p", "engine", "--features", "cuda,ptx"]);
    build.args(ENGINE_TESTS.iter().flat_map(|test| ["--test", test]));
    let messages = process::capture(build.args(["--quiet", "--message-format", "json"]))?;
    let built = |test: &str| {
        let values = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let of_test = values.filter(|value| value["target"]["name"] == test);
        of_test.filter_map(|value| Some(PathBuf::from(value["executable"].as_str()?))).next_back()
    };
    for test in ENGINE_TESTS {
        let from = built(test).ok_or_else(|| TaskError::Output {
            line: process::line(&build),
            what: format!("no program for the test {test}"),
        })?;
        std::fs::copy(&from, out.join(test)).map_err(TaskError::path("copy", &from))?;
    }
    println!("{}: {}", out.display(), ENGINE_TESTS.join(" "));
    Ok(())
}
