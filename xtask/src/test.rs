//! `cargo xtask test`: every check that needs no GPU, on a fresh machine, with honest counts.
//!
//! Every step runs whatever the others did; a step that cannot run is counted as skipped with its reason, and a set-up
//! that should have worked and did not (the model's fetch, a compiler's download) is a failure. The last line of
//! stdout is `N passed, N failed, N skipped`.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use ptx_build::PtxError;

use crate::args;
use crate::deny;
use crate::error::TaskError;
use crate::fetch;
use crate::image;
use crate::libtest::{SuiteEnd, Tally};
use crate::no_std;
use crate::process;
use crate::ptx_check;
use crate::qemu;
use crate::step::{Counts, Outcome, Steps};
use crate::workspace::Workspace;

/// Where tests find the model, if they want a real one.
const MODEL_VARIABLE: &str = "RUNIK_TEST_MODEL";
/// Where tests find the bootable image.
const IMAGE_VARIABLE: &str = "RUNIK_IMAGE";
/// Where tests find the golden data.
const GOLDENS_VARIABLE: &str = "RUNIK_GOLDENS";
/// What property tests draw their cases from.
const RNG_SEED_VARIABLE: &str = "PROPTEST_RNG_SEED";

/// Runs all steps.
pub fn run(workspace: &Workspace, args: &[String]) -> Result<(), TaskError> {
    args::none("test", args)?;
    let mut steps = Steps::default();
    let mut model = None;
    let goldens = workspace.goldens();
    steps.step("compiler", || device_compiler(workspace));
    steps.step("format", || format(workspace));
    steps.step("clippy", || clippy(workspace));
    steps.step("model", || {
        let path = fetch::smollm2()?;
        let note = path.display().to_string();
        model = Some(path);
        Ok(Outcome::passed(note))
    });
    steps.step("goldens", || Ok(note_goldens(goldens.as_deref())));
    let mut image = None;
    steps.step("image", || image::check(workspace, &mut image));
    // Without QEMU or GRUB the guests' tests skip, and say so.
    for (program, packages) in [(qemu::PROGRAM, qemu::PACKAGES), (qemu::GRUB, qemu::GRUB_PACKAGES)] {
        if let Err(error) = qemu::need(program, packages) {
            eprintln!("{error}");
        }
    }
    steps.step("tests", || {
        tests(workspace, [(MODEL_VARIABLE, model), (GOLDENS_VARIABLE, goldens), (IMAGE_VARIABLE, image)])
    });
    steps.step("no-std", || no_std::check(workspace));
    steps.step("ptx", || ptx_check::check(workspace));
    steps.step("deny", || deny::check(workspace));
    steps.step("doc", || doc(workspace));
    steps.finish()
}

/// Installs a rustup component if the program it brings does not run.
fn need_component(workspace: &Workspace, subcommand: &str, component: &str) -> Result<(), TaskError> {
    if process::works(workspace.cargo().args([subcommand, "--version"])) {
        return Ok(());
    }
    process::run(Command::new("rustup").args(["component", "add", component]).current_dir(workspace.root()))
}

/// The compiler of the GPU kernels, before anything embeds them; that it works is the step `ptx`'s to say.
fn device_compiler(workspace: &Workspace) -> Result<Outcome, TaskError> {
    match ptx_check::compiler(workspace) {
        Ok(compiler) => Ok(Outcome { counts: Counts::default(), note: compiler.description }),
        Err(TaskError::Ptx(error @ PtxError::NoCompiler { .. })) => Ok(Outcome::skipped(error.to_string())),
        Err(error) => Err(error),
    }
}

fn format(workspace: &Workspace) -> Result<Outcome, TaskError> {
    need_component(workspace, "fmt", "rustfmt")?;
    process::run(workspace.cargo().args(["fmt", "--all", "--check"]))?;
    Ok(Outcome::passed("cargo fmt --all --check"))
}

fn clippy(workspace: &Workspace) -> Result<Outcome, TaskError> {
    need_component(workspace, "clippy", "clippy")?;
    let mut command = workspace.cargo();
    process::run(command.args([
        "clippy",
        "--workspace",
        "--all-targets",
        "--quiet",
        "--",
        "-D",
        "warnings",
    ]))?;
    Ok(Outcome::passed("all targets, no warnings"))
}

fn doc(workspace: &Workspace) -> Result<Outcome, TaskError> {
    let mut command = workspace.cargo();
    command.args(["doc", "--workspace", "--no-deps", "--quiet"]).env("RUSTDOCFLAGS", "-D warnings");
    process::run(&mut command)?;
    Ok(Outcome::passed("cargo doc, no warnings"))
}

/// Golden data is no check of its own; its absence is one, so that it shows in the sums.
fn note_goldens(goldens: Option<&Path>) -> Outcome {
    match goldens {
        Some(path) => Outcome { counts: Counts::default(), note: path.display().to_string() },
        None => Outcome::skipped(format!(
            "no golden data; set {GOLDENS_VARIABLE} or put it at ../shared/goldens (the tests that need it skip too)"
        )),
    }
}

/// All tests of the workspace, in one cargo run.
fn tests(workspace: &Workspace, variables: [(&str, Option<PathBuf>); 3]) -> Result<Outcome, TaskError> {
    let mut command = workspace.cargo();
    command.args(["test", "--workspace", "--no-fail-fast", "--", "--show-output"]);
    command.envs(variables.into_iter().filter_map(|(name, path)| Some((name, path?))));
    // One verdict per state of the tree; `cargo test` alone draws new cases each time.
    if std::env::var_os(RNG_SEED_VARIABLE).is_none() {
        command.env(RNG_SEED_VARIABLE, "20261126");
    }
    let line = process::line(&command);
    let mut child =
        command.stdout(Stdio::piped()).spawn().map_err(TaskError::io(format!("start `{line}`")))?;

    let mut tally = Tally::default();
    if let Some(stdout) = child.stdout.take() {
        for text in BufReader::new(stdout).split(b'\n') {
            let text = text.map_err(TaskError::io(format!("read from `{line}`")))?;
            show(tally.line(&String::from_utf8_lossy(&text)));
        }
    }
    show(tally.died());
    let status = child.wait().map_err(TaskError::io(format!("wait for `{line}`")))?;

    let mut counts = tally.counts();
    let mut notes: Vec<String> = tally.skip_reasons().collect();
    if !status.success() && counts.failed == 0 {
        counts.failed = 1;
        notes.push(format!("cargo failed without a failing test ({status}): see its messages above"));
    }
    Ok(Outcome { counts, note: notes.join("; ") })
}

fn show(end: Option<SuiteEnd>) {
    match end {
        None => {}
        Some(SuiteEnd::Passed(line)) => println!("{line}"),
        Some(SuiteEnd::Failed(lines)) => println!("{}", lines.join("\n")),
    }
}
