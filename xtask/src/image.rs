//! `cargo xtask image`: the bootable image, with the ordinary stable toolchain.

use std::path::{Path, PathBuf};

use crate::args;
use crate::error::TaskError;
use crate::process;
use crate::step::Outcome;
use crate::workspace::Workspace;

/// Bytes that the image may have without a model.
const MAX_BYTES: u64 = 2_000_000;

/// Builds it and prints where it is.
pub fn run(workspace: &Workspace, args: &[String]) -> Result<(), TaskError> {
    args::none("image", args)?;
    println!("{}", build(workspace)?.display());
    Ok(())
}

/// Builds it.
pub fn build(workspace: &Workspace) -> Result<PathBuf, TaskError> {
    let mut command = workspace.cargo();
    command.args(["build", "--quiet", "-p", "uk-image", "--features", "image", "--profile", "image"]);
    process::run(&mut command)?;
    Ok(workspace.target().join("image").join("runik-uk"))
}

/// Builds it, and checks what can be without booting: lints, and its size.
pub fn check(workspace: &Workspace, image: &mut Option<PathBuf>) -> Result<Outcome, TaskError> {
    let mut command = workspace.cargo();
    command.args(["clippy", "--quiet", "-p", "uk-image", "--features", "image", "--bin", "runik-uk"]);
    process::run(command.args(["--profile", "image", "--", "-D", "warnings"]))?;
    let path = build(workspace)?;
    let bytes = size(&path)?;
    if bytes > MAX_BYTES {
        let what = format!("{bytes} bytes, more than {MAX_BYTES}");
        return Err(TaskError::Output { line: path.display().to_string(), what });
    }
    let note = format!("{} bytes of at most {MAX_BYTES}: {}", bytes, path.display());
    *image = Some(path);
    Ok(Outcome::passed(note))
}

fn size(path: &Path) -> Result<u64, TaskError> {
    Ok(std::fs::metadata(path).map_err(TaskError::path("look at", path))?.len())
}
