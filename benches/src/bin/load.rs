//! `load`: how fast a model file's weights come to the GPU, leg by leg.
#![forbid(unsafe_code)]

use std::path::Path;
use std::process::ExitCode;

use benches::args::Args;
use benches::{BenchError, transfer};

const USAGE: &str = "usage: load FILE.gguf [--device I]";

fn run() -> Result<(), BenchError> {
    let mut args = Args::from_env();
    let device = args.number("--device")?.unwrap_or(0);
    let file = args.word().ok_or_else(|| BenchError::Usage(USAGE.into()))?;
    args.finish(USAGE)?;
    transfer::run(Path::new(&file), device)
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("load: {error}");
            ExitCode::from(if matches!(error, BenchError::Usage(_)) { 2 } else { 1 })
        }
    }
}
