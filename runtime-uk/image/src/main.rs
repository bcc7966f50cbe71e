//! The bootable image: boots the machine, loads a model, answers the command line's prompt, serves.
//!
//! What can go wrong is said in one line on the serial log, and then the machine ends: there is nobody to ask.
#![no_std]
#![no_main]

extern crate alloc;

mod answer;
mod entry;
mod gpu;
mod memory;
mod model;
mod selftest;
mod serve;

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use core::error::Error;
use core::panic::PanicInfo;

use engine::backend::Backend;
use engine::backends::cpu::{Cpu, Isa};
use engine::backends::cuda::Cuda;
use engine::{Context, ContextParams, Executor, Model};
use gpu_kernels::driver::Driver;
use server::Server;
use server::scheduler::Scheduler;
use uk_kernel::devices::Devices;
use uk_kernel::exit::{Exit, begin_report, exit};
use uk_kernel::heap::Heap;
use uk_kernel::machine::Machine;
use uk_kernel::options::{Device, Options};
use uk_kernel::{say, serial};

#[global_allocator]
static HEAP: Heap = Heap::new();

/// Called by the entry code with what the boot loader left in `eax` and `ebx`.
extern "C" fn main(eax: u32, ebx: u32) -> ! {
    // SAFETY: the entry code calls this once, in the state that `boot` asks for.
    let booted = unsafe { Machine::boot(eax, ebx, &entry::image(), &HEAP) };
    let mut machine = booted.unwrap_or_else(|error| fail(&error));
    say!("runik {}: {}", env!("CARGO_PKG_VERSION"), machine.options);
    for word in &machine.options.unknown {
        say!("command line: {word:?} is no option of runik");
    }
    let mut devices = Devices::find(&mut machine);
    match machine.options.selftest.as_deref() {
        None => {}
        Some("gpu") => match selftest::gpu(&machine, &mut devices) {
            Ok(()) => exit(Exit::Done),
            Err(error) => fail(&error),
        },
        Some(name) => {
            selftest::run(name, &machine);
            exit(Exit::Failed);
        }
    }
    run(&machine, devices).unwrap_or_else(|error| fail(&*error));
    exit(Exit::Done)
}

fn run(machine: &Machine, mut devices: Devices) -> Result<(), Box<dyn Error>> {
    let options = &machine.options;
    let model = Arc::new(model::load(options.model, &machine.modules, &mut devices)?);
    let causal = model.hparams().causal;
    let (backend, name) = backend(machine, &mut devices, &model)?;
    let params = params(options, &model);
    let (n_seq, n_batch) = (params.n_seq, params.n_ubatch);
    let mut context = Context::new(model.clone(), backend, params.clone())?;
    say!("{} on {name}", model.arch_name());
    match &options.prompt {
        Some(prompt) if causal => answer::answer(&mut context, prompt.as_bytes(), options.n_predict)?,
        Some(_) => say!("prompt: {} is a model for embeddings, it generates no text", model.arch_name()),
        None => {}
    }
    if options.exit {
        return Ok(());
    }
    let (scheduler, embedder) = if causal {
        // On the cores, whatever the device: a second context there would hold the weights twice.
        let embedder = options.embeddings.then(|| {
            let backend = Cpu::new(model.weights().clone(), machine.cores.clone(), Isa::detect());
            let params = ContextParams { n_seq: 1, embeddings: true, ..params };
            Context::new(model.clone(), Box::new(backend), params)
        });
        (Some(Scheduler::new(&model, context, n_seq, n_batch)), embedder.transpose()?)
    } else {
        (None, Some(context))
    };
    let templates = serve::templates(options, &model)?;
    let server = Server::new(&model, scheduler, embedder, templates, serve::config(options, &model));
    serve::serve(machine, &mut devices, server)
}

fn params(options: &Options, model: &Model) -> ContextParams {
    let (n_ctx, causal) = (options.n_ctx.min(model.hparams().n_ctx_train), model.hparams().causal);
    let n_batch = options.n_batch.unwrap_or(match options.device {
        // The network waits for a batch to end.
        Device::Cpu => 64,
        Device::Gpu => 512,
    });
    ContextParams {
        n_ctx,
        n_seq: if causal { options.n_seq } else { 1 },
        // Without a causal mask a text must fit one step.
        n_ubatch: if causal { n_batch } else { n_ctx },
        embeddings: !causal,
        ..ContextParams::default()
    }
}

/// What computes, and its name for the log.
fn backend(
    machine: &Machine,
    devices: &mut Devices,
    model: &Model,
) -> Result<(Box<dyn Backend>, String), Box<dyn Error>> {
    let (cores, weights) = (machine.cores.clone(), model.weights().clone());
    let n = cores.n_threads();
    Ok(match machine.options.device {
        Device::Cpu => {
            let isa = Isa::detect();
            (Box::new(Cpu::new(weights, cores, isa)), format!("{} with {n} core(s)", isa.name()))
        }
        Device::Gpu => {
            let driver = Arc::new(gpu::open(machine, devices)?);
            let name = format!("{} behind a broker", driver.info().name);
            (Box::new(Cuda::new(driver, cores, weights)), name)
        }
    })
}

fn fail(error: &dyn Error) -> ! {
    say!("error: {error}");
    exit(Exit::Failed)
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    begin_report(Exit::Panic);
    serial::last_words(format_args!("\n{info}\n"));
    exit(Exit::Panic)
}
