//! `gpu-test`: every case of every kernel at every tier on the GPU, then, if asked, the benchmarks;
//! or the costs by which cuts of products are chosen.
#![forbid(unsafe_code)]

use std::path::Path;
use std::process::ExitCode;

use benches::args::Args;
use benches::options::Options;
use benches::{BenchError, bench, conform};
use engine::backends::cuda::hosted::Hosted;

const USAGE: &str = "usage: gpu-test [--only KERNEL] [--tier T] [--jobs N] [--device I] [--json FILE]\n\
    \x20      gpu-test --load FORMAT,FORMAT [--tier T] [--jobs N] [--device I]\n\
    \x20      gpu-test --transfer FILE.gguf [--device I]\n\
    \x20      gpu-test --tune [FORMAT,FORMAT] [--tier T] [--device I] [--json FILE]\n\
    \x20      gpu-test --bench [FILTER] [--only KERNEL] [--tier T] [--device I] [--warm] [--peer TEST_BACKEND_OPS] \
    [--json FILE] [--record DIR]";

fn run() -> Result<(), BenchError> {
    let mut args = Args::from_env();
    let device = args.number("--device")?.unwrap_or(0);
    // How the program starts itself, a kernel at a time.
    if let Some(kernel) = args.value(conform::CHILD)? {
        return conform::child(device, &kernel, &mut args);
    }
    let benches = args.flag("--bench");
    let tune = args.flag("--tune");
    let load = args.value("--load")?;
    if let Some(file) = args.value("--transfer")? {
        args.finish(USAGE)?;
        return benches::transfer::run(Path::new(&file), device);
    }
    let mut options = Options::take(&mut args)?;
    if let Some(formats) = load {
        args.finish(USAGE)?;
        return benches::load::run(&Hosted::open(device)?, &formats, options.tier, options.jobs);
    }
    if tune {
        let formats = args.word();
        args.finish(USAGE)?;
        return benches::tune::run(&Hosted::open(device)?, formats.as_deref(), &options);
    }
    if benches {
        options.filter = args.word();
        args.finish(USAGE)?;
        return bench::run(&Hosted::open(device)?, &options);
    }
    args.finish(USAGE)?;
    conform::run(device, &options)
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gpu-test: {error}");
            ExitCode::from(if matches!(error, BenchError::Usage(_)) { 2 } else { 1 })
        }
    }
}
