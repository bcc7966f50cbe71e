//! What fails on the device reaches the caller as a typed error; the session goes on or ends, and nothing leaks.

mod common;
#[path = "common/faulty.rs"]
mod faulty;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use engine::backend::Backend;
use engine::backends::cpu::{Cpu, Isa};
use engine::backends::cuda::{Cuda, Streaming};
use engine::backends::split::{Offload, Placement, Split};
use engine::executor::Serial;
use engine::io::Mapped;
use engine::models::StepShape;
use engine::pool::Pool;
use engine::weights::ByteSource;
use engine::{Batch, Context, ContextParams, EngineError, Model};
use faulty::{Fault, Faulty};
use gpu_kernels::driver::{DriverError, MemKind};

const MODEL: &str = "tiny/quantmix-a.gguf";

fn context(model: &Arc<Model>, device: &Arc<Faulty>, kind: Kind) -> Result<Context, EngineError> {
    let cuda = Cuda::new(device.clone(), Arc::new(Serial), model.weights().clone());
    let params = ContextParams { n_ctx: 64, n_ubatch: 8, ..ContextParams::default() };
    let backend: Box<dyn Backend> = match kind {
        Kind::Alone => Box::new(cuda),
        Kind::Brings { pinned_bytes } => {
            let offload = Some(Offload { from: 0, to: 1 });
            let n_layer = model.hparams().n_layer();
            let placement = Placement { offload, ..Placement::last_layers(n_layer, 0) };
            let shape = StepShape { prompt: true, n_outputs: 1, ..params.largest_step() };
            let brought = placement.brought(&model.graph(params.n_ctx, shape), model.weights());
            let cpu = Cpu::new(model.weights().clone(), Arc::new(Serial), Isa::detect());
            let gpu = Streaming::new(cuda, &brought, pinned_bytes)?;
            let backends: Vec<Box<dyn Backend>> = vec![Box::new(cpu), Box::new(gpu)];
            Box::new(Split::new(backends, placement, model.weights().clone()))
        }
    };
    Context::new(model.clone(), backend, params)
}

/// How the device takes part.
#[derive(Clone, Copy)]
enum Kind {
    /// It has all of the model.
    Alone,
    /// It has nothing, and brings the host's weights for products, from pinned copies as far as these go.
    Brings { pinned_bytes: u64 },
}

/// A prompt and three tokens more: the last steps are captured and replayed.
fn talk(context: &mut Context) -> Result<Vec<f32>, EngineError> {
    let mut all = Vec::new();
    for tokens in [&[1, 7, 5][..], &[4], &[9], &[2]] {
        context.decode(&Batch::prompt(0, tokens))?;
        all.extend_from_slice(context.output(0));
    }
    Ok(all)
}

/// Runs with a fault, then mended on the same context; returns the error, if there was one.
fn with_fault(model: &Arc<Model>, kind: Kind, fault: Fault, want: &[f32]) -> Option<DriverError> {
    let device = Arc::new(Faulty::new(Some(fault)));
    let error = match context(model, &device, kind) {
        Err(error) => Some(error),
        Ok(mut context) => {
            let first = talk(&mut context);
            if !matches!(fault, Fault::Lost(_)) {
                device.mend();
                context.truncate(0, 0);
                let again = talk(&mut context).unwrap_or_else(|e| panic!("{fault:?}: mended, but {e}"));
                assert!(again == want, "{fault:?}: mended, but other bits");
            }
            first.err()
        }
    };
    let alive = device.alive.load(Ordering::Relaxed);
    assert_eq!(alive, 0, "{fault:?}: {alive} things were not given back");
    if error.is_none() && matches!(fault, Fault::Allocation(_)) {
        let refused = *device.refused.lock().unwrap();
        assert_eq!(refused, Some(MemKind::Host), "{fault:?}: an error that nobody heard of");
    }
    error.map(|error| match error {
        EngineError::Device(error) => error,
        other => panic!("{fault:?}: {other}"),
    })
}

#[test]
fn faults_are_errors_and_leak_nothing() {
    let Some(dir) = common::goldens() else { return };
    let model = common::model(&dir.join(MODEL));
    let device = Arc::new(Faulty::new(None));
    let kind = Kind::Alone;
    let want = talk(&mut context(&model, &device, kind).unwrap()).unwrap();
    let [allocations, launches, calls] = device.counts();
    assert!(allocations > 4 && launches > 20 && calls > 100, "{allocations} {launches} {calls}");
    for n in 0..allocations {
        let error = with_fault(&model, kind, Fault::Allocation(n), &want);
        assert!(matches!(error, Some(DriverError::OutOfMemory { .. })), "allocation {n}: {error:?}");
    }
    // Weights take another way then.
    assert_eq!(with_fault(&model, kind, Fault::Lending, &want), None);
    // The first and last few, and some between: loading, a first run, a capture.
    for n in (0..launches).step_by(launches as usize / 12).chain(launches - 3..launches) {
        let error = with_fault(&model, kind, Fault::Launch(n), &want);
        assert!(matches!(error, Some(DriverError::Launch { .. })), "launch {n}: {error:?}");
    }
    for n in (0..calls - 20).step_by(calls as usize / 25) {
        let error = with_fault(&model, kind, Fault::Lost(n), &want);
        assert!(matches!(error, Some(DriverError::Lost { .. })), "lost at call {n}: {error:?}");
    }
}

/// The same where weights come and go: what was under way when something failed is not taken for what should be there.
fn faults_while_weights_are_brought(pinned_bytes: u64) {
    let Some(dir) = common::goldens() else { return };
    let model = common::model(&dir.join(MODEL));
    let device = Arc::new(Faulty::new(None));
    let kind = Kind::Brings { pinned_bytes };
    let want = talk(&mut context(&model, &device, kind).unwrap()).unwrap();
    let [allocations, launches, calls] = device.counts();
    assert!(allocations > 4 && launches > 20 && calls > 100, "{allocations} {launches} {calls}");
    let mut without = 0;
    for n in (0..allocations).step_by(2) {
        match with_fault(&model, kind, Fault::Allocation(n), &want) {
            Some(DriverError::OutOfMemory { .. }) => {}
            // Weights that cannot have a pinned copy are brought without.
            None => without += 1,
            Some(error) => panic!("allocation {n}: {error}"),
        }
    }
    assert_eq!(without > 0, pinned_bytes > 0, "{without} of {allocations} refused without an error");
    for n in (0..launches).step_by(launches as usize / 8) {
        let error = with_fault(&model, kind, Fault::Launch(n), &want);
        assert!(matches!(error, Some(DriverError::Launch { .. })), "launch {n}: {error:?}");
    }
    // The last calls give things back, and have nobody to tell.
    for n in (0..calls / 8 * 7).step_by(calls as usize / 12) {
        let error = with_fault(&model, kind, Fault::Lost(n), &want);
        assert!(matches!(error, Some(DriverError::Lost { .. })), "lost at call {n}: {error:?}");
    }
}

#[test]
fn faults_while_weights_are_brought_from_the_file() {
    faults_while_weights_are_brought(0);
}

#[test]
fn faults_while_weights_are_brought_from_pinned_copies() {
    faults_while_weights_are_brought(u64::MAX);
}

/// A file that somebody cuts short while its weights are on their way.
#[cfg(unix)]
#[test]
fn a_file_cut_short_is_an_error_and_leaks_nothing() {
    let Some(dir) = common::goldens() else { return };
    let path = std::env::temp_dir().join(format!("runik-cut-{}.gguf", std::process::id()));
    std::fs::copy(dir.join(MODEL), &path).unwrap();
    let file = Arc::new(Mapped::open(&path).unwrap());
    let n_bytes = file.bytes().len() as u64;
    let model = Model::load(vec![file]).unwrap();
    let params = ContextParams { n_ctx: 64, ..ContextParams::default() };
    let graph = model.graph(params.n_ctx, params.largest_step());
    for threads in [1, 3] {
        let device = Arc::new(Faulty::new(None));
        let executor = Arc::new(Pool::new(threads).unwrap());
        let mut cuda = Cuda::new(device.clone(), executor, model.weights().clone());
        std::fs::File::options().write(true).open(&path).unwrap().set_len(n_bytes / 4 * 3).unwrap();
        let mut done = 0;
        let error = cuda.load(&graph, &mut |progress| done = progress.done_bytes).unwrap_err();
        assert!(matches!(&error, EngineError::Io { what, .. } if what.starts_with("reading")), "{error}");
        assert!(done > 0 && cuda.weight_bytes() == 0, "{done} bytes before it");
        assert_eq!(device.alive.load(Ordering::Relaxed), 0, "with {threads} threads");
        // Once the file is whole again its weights can be loaded.
        std::fs::copy(dir.join(MODEL), &path).unwrap();
        cuda.load(&graph, &mut |_| {}).unwrap();
        assert!(cuda.weight_bytes() > 0);
    }
    std::fs::remove_file(&path).unwrap();
}
