//! `cargo run -p gpu-kernels --example emulate -- KERNEL`: a kernel's cases on the emulator, each with its time and error.

use std::process::ExitCode;
use std::time::Instant;

use gpu_kernels::case;
use gpu_kernels::emu::{Emulator, Options};
use gpu_kernels::registry::{self, KERNELS};

fn main() -> ExitCode {
    let name = std::env::args().nth(1).unwrap_or_default();
    let Some(kernel) = registry::find(&name) else {
        let known: Vec<&str> = KERNELS.iter().map(|kernel| kernel.name()).collect();
        eprintln!("no kernel is called {name:?}; there are {}", known.join(", "));
        return ExitCode::from(2);
    };
    println!("{:<60} {:>8} {:>10} {:>10}", "case", "ms", "nmse", "bytes");
    let mut failed = 0;
    for i in 0..kernel.n_cases() {
        let problem = kernel.problem(i, i as u64);
        let start = Instant::now();
        let emulator = Emulator::new(Options::default());
        let result = case::run(&emulator, Emulator::MODULE, &problem, kernel.nmse_max());
        let ms = start.elapsed().as_secs_f64() * 1e3;
        let (label, bytes) = (kernel.label(i), kernel.bytes(i));
        match result {
            Ok(nmse) => println!("{label:<60} {ms:>8.1} {nmse:>10.1e} {bytes:>10}"),
            Err(error) => {
                failed += 1;
                println!("{label:<60} {ms:>8.1} FAILED: {error}");
            }
        }
    }
    if failed > 0 {
        eprintln!("{failed} of {} cases failed", kernel.n_cases());
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
