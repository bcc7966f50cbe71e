//! `kernels`: times the shapes that GPU kernels declare.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use benches::args::Args;
use benches::options::Options;
use benches::{BenchError, bench};
use engine::backends::cuda::hosted::Hosted;

const USAGE: &str = "usage: kernels [FILTER] [--only KERNEL] [--tier T] [--device I] [--warm] \
    [--peer TEST_BACKEND_OPS] [--json FILE] [--record DIR]";

fn run() -> Result<(), BenchError> {
    let mut args = Args::from_env();
    let device = args.number("--device")?.unwrap_or(0);
    let mut options = Options::take(&mut args)?;
    options.filter = args.word();
    args.finish(USAGE)?;
    bench::run(&Hosted::open(device)?, &options)
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kernels: {error}");
            ExitCode::from(if matches!(error, BenchError::Usage(_)) { 2 } else { 1 })
        }
    }
}
