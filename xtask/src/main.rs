//! Project tasks: `cargo xtask help` lists them.
//!
//! Each task is one file with one `run(&Workspace, &[String])` and one row in [`TASKS`]. Tasks bring their own set-up:
//! what they need and can install, they install; what they cannot, they name with the command that does. Data goes to
//! stdout, progress to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage.
#![forbid(unsafe_code)]

mod apt;
mod args;
mod bench_peer;
mod demo;
mod deny;
mod error;
mod fetch;
mod fuzz;
mod gpu_test;
mod image;
mod kernel;
mod libtest;
mod miri;
mod no_std;
mod peer;
mod process;
mod ptx_check;
mod qemu;
mod step;
mod test;
mod wheel;
mod workspace;

use std::process::ExitCode;

use error::TaskError;
use workspace::Workspace;

/// One row of `cargo xtask help`.
struct Task {
    name: &'static str,
    args: &'static str,
    help: &'static str,
    run: fn(&Workspace, &[String]) -> Result<(), TaskError>,
}

const TASKS: &[Task] = &[
    Task {
        name: "demo",
        args: "[PROMPT]",
        help: "fetch SmolLM2-135M-Instruct and answer a prompt with it",
        run: demo::run,
    },
    Task { name: "test", args: "", help: "every test that needs no GPU, set-up included", run: test::run },
    Task { name: "fetch", args: "", help: "fetch and check the test model, print its path", run: fetch::run },
    Task {
        name: "no-std",
        args: "",
        help: "compile quant, gguf, gpu-kernels and the engine core without std",
        run: no_std::run,
    },
    Task {
        name: "ptx-check",
        args: "",
        help: "compile the GPU kernels for every tier, assemble them with ptxas",
        run: ptx_check::run,
    },
    Task { name: "gpu-test", args: gpu_test::ARGS, help: gpu_test::HELP, run: gpu_test::run },
    Task { name: "image", args: "", help: "the bootable image; prints its path", run: image::run },
    Task { name: "qemu", args: qemu::ARGS, help: qemu::HELP, run: qemu::run },
    Task { name: "kernel", args: kernel::ARGS, help: kernel::HELP, run: kernel::run },
    Task {
        name: "deny",
        args: "",
        help: "licences, bans and sources of all dependencies (deny.toml)",
        run: deny::run,
    },
    Task {
        name: "miri",
        args: "[NAME]",
        help: "tests of gguf and quant, or those named NAME, under miri (nightly)",
        run: miri::run,
    },
    Task { name: "fuzz", args: "[SECONDS]", help: "each fuzz target for SECONDS (60)", run: fuzz::run },
    Task { name: "bench-peer", args: bench_peer::ARGS, help: bench_peer::HELP, run: bench_peer::run },
];

fn help() -> String {
    let mut text = String::from("usage: cargo xtask TASK\n\n");
    for task in TASKS {
        text.push_str(&format!("  {:<12} {}\n", task.name, task.help));
        if !task.args.is_empty() {
            text.push_str(&format!("  {:<12} {}\n", "", task.args));
        }
    }
    text
}

fn dispatch(args: &[String]) -> Result<(), TaskError> {
    let (name, rest) = match args.split_first() {
        None => ("help", args),
        Some((name, rest)) => (name.as_str(), rest),
    };
    if matches!(name, "help" | "-h" | "--help") {
        print!("{}", help());
        return Ok(());
    }
    let task = TASKS.iter().find(|task| task.name == name).ok_or_else(|| TaskError::Usage {
        what: format!("no task is called {name:?}; `cargo xtask help` lists them"),
    })?;
    (task.run)(&Workspace::locate()?, rest)
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match dispatch(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::from(if matches!(error, TaskError::Usage { .. }) { 2 } else { 1 })
        }
    }
}
