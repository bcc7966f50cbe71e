//! A model spread over several backends answers as on one: by layers, by single weights, and with prompts' products on a
//! GPU that brings the host's weights.

mod common;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use engine::backend::{Backend, BackendInfo, PlanId, Step};
use engine::backends::cpu::{Cpu, Isa};
use engine::backends::cuda::{Cuda, Device, Streaming, emulator};
use engine::backends::split::{Offload, Placement, Split};
use engine::executor::Serial;
use engine::graph::{Graph, Node};
use engine::kv_cache::KvLayout;
use engine::models::StepShape;
use engine::plan::Plan;
use engine::tensor::TensorId;
use engine::{Batch, Context, ContextParams, EngineError, Model};
use gpu_kernels::driver::{DriverError, MemKind, StreamId};

fn cpu(model: &Model) -> Box<dyn Backend> {
    Box::new(Cpu::new(model.weights().clone(), Arc::new(Serial), Isa::detect()))
}

/// The CPU, and a GPU that brings weights for what the placement takes from the CPU.
fn cpu_and_gpu(model: &Model, device: &Device, placement: &Placement) -> Box<dyn Backend> {
    let gpu = Cuda::new(device.clone(), Arc::new(Serial), model.weights().clone());
    let shape = StepShape { prompt: true, ..ContextParams::default().step(1, 1) };
    let brought = placement.brought(&model.graph(256, shape), model.weights());
    assert_eq!(brought.is_empty(), placement.offload.is_none());
    let gpu = Streaming::new(gpu, &brought, u64::MAX).unwrap();
    assert_eq!(gpu.pinned_bytes() > 0, !brought.is_empty());
    Box::new(Split::new(vec![cpu(model), Box::new(gpu)], placement.clone(), model.weights().clone()))
}

/// Weights by name on a device.
fn on(model: &Model, device: usize, matches: impl Fn(&str) -> bool) -> BTreeMap<u32, usize> {
    let named = (0..).zip(model.weights().iter()).filter(|(_, w)| matches(&w.name));
    named.map(|(id, _)| (id, device)).collect()
}

/// Outputs of a prompt with two positions wanted, then of one token more.
fn outputs(model: &Arc<Model>, backend: Box<dyn Backend>, embeddings: bool) -> Vec<f32> {
    let params = ContextParams { n_ctx: 256, embeddings, ..ContextParams::default() };
    let mut context = Context::new(model.clone(), backend, params).unwrap();
    if embeddings {
        return context.embed(&[1, 7, 5, 9, 3], engine::hparams::Pooling::None).unwrap();
    }
    let mut batch = Batch::prompt(0, &[1, 7, 5, 9, 3]);
    batch.tokens[2].output = true;
    let mut all = Vec::new();
    for batch in [batch, Batch::prompt(0, &[4])] {
        let n = context.decode(&batch).unwrap();
        (0..n).for_each(|i| all.extend_from_slice(context.output(i)));
    }
    all
}

#[test]
fn every_cut_gives_the_same_bits() {
    let Some(dir) = common::goldens() else { return };
    for name in ["llama-b", "gemma3-b", "qwen2moe-a", "gpt-oss-b", "phi3-a", "quantmix-a", "bert-cls-b"] {
        let model = common::model(&dir.join(format!("tiny/{name}.gguf")));
        let bert = name.starts_with("bert");
        let n_layer = model.hparams().n_layer();
        let want = outputs(&model, cpu(&model), bert);
        let mut placements: Vec<Placement> =
            (0..n_layer + 2).map(|n| Placement::last_layers(n_layer, n)).collect();
        placements.push(Placement {
            input: 1,
            layers: (0..n_layer).map(|il| il % 2).collect(),
            ..Placement::default()
        });
        // Single weights elsewhere: of each kind some, parts of fused matrices among them.
        for (layers, other) in [(0, 1), (1, 1), (n_layer + 1, 0)] {
            let of = |name: &str| {
                let sum: usize = name.bytes().map(usize::from).sum();
                sum.is_multiple_of(3) || name.contains("_exps") || name.contains("attn_k.")
            };
            let tensors = on(&model, other, of);
            let offload = Some(Offload { from: 0, to: 1 });
            let placement = Placement { tensors, ..Placement::last_layers(n_layer, layers) };
            placements.extend([placement.clone(), Placement { offload, ..placement }]);
        }
        for placement in placements {
            let backends = vec![cpu(&model), cpu(&model)];
            let split = Split::new(backends, placement.clone(), model.weights().clone());
            let got = outputs(&model, Box::new(split), bert);
            assert!(got == want, "{name}: {placement:?} gives other bits");
        }
    }
}

/// Layers on the CPU and the others on the emulated GPU: what either gives, up to rounding.
#[test]
fn cpu_and_gpu_share_a_model() {
    let Some(dir) = common::goldens() else { return };
    for name in ["llama-b", "gpt-oss-b"] {
        let model = common::model(&dir.join(format!("tiny/{name}.gguf")));
        let want = outputs(&model, cpu(&model), false);
        for n in 1..=model.hparams().n_layer() + 1 {
            let gpu = Cuda::new(common::gpu_or_emulator(), Arc::new(Serial), model.weights().clone());
            let placement = Placement::last_layers(model.hparams().n_layer(), n);
            let split = Split::new(vec![cpu(&model), Box::new(gpu)], placement, model.weights().clone());
            let err = common::nmse(&outputs(&model, Box::new(split), false), &want);
            assert!(err <= 1e-5, "{name}: {n} layers on the GPU: nmse {err:.1e}");
        }
    }
}

/// Layers on two GPUs give what one gives, bit for bit, and with some on the CPU too what the CPU gives.
#[test]
fn two_gpus_and_the_cpu_share_a_model() {
    let Some(dir) = common::goldens() else { return };
    let model = common::model(&dir.join("tiny/llama-b.gguf"));
    let n_layer = model.hparams().n_layer();
    let devices = common::two_gpus().unwrap_or_else(|| [emulator(), emulator()]);
    let gpu = |i: usize| -> Box<dyn Backend> {
        Box::new(Cuda::new(devices[i].clone(), Arc::new(Serial), model.weights().clone()))
    };
    let one = outputs(&model, gpu(0), false);
    let ranges = [0..1, 1..n_layer];
    let placement = Placement::ranges(n_layer, &ranges, false, true);
    let split = Split::new(vec![gpu(0), gpu(1)], placement, model.weights().clone());
    assert!(outputs(&model, Box::new(split), false) == one, "two GPUs give other bits");
    let want = outputs(&model, cpu(&model), false);
    let placement = Placement::ranges(n_layer, &[0..0, 1..n_layer], true, false);
    let split = Split::new(vec![cpu(&model), gpu(0), gpu(1)], placement, model.weights().clone());
    let err = common::nmse(&outputs(&model, Box::new(split), false), &want);
    assert!(err <= 1e-5, "nmse {err:.1e}");
}

/// A copy between the memory of two driver values has happened on return, whoever queued it, so the memory may go; a
/// captured stream refuses it.
#[test]
fn copies_between_driver_values_are_done_on_return() {
    const BYTES: usize = 64 << 20;
    let Some([one, two]) = common::two_gpus() else {
        println!("skipped: no GPU (set RUNIK_TEST_GPU)");
        return;
    };
    let device = one.alloc(MemKind::Device, BYTES as u64).unwrap();
    for kind in [MemKind::Host, MemKind::Device] {
        for round in 1..5u8 {
            let from = two.alloc(kind, BYTES as u64).unwrap();
            two.fill(from, round, BYTES as u64, StreamId::DEFAULT).unwrap();
            two.synchronise(StreamId::DEFAULT).unwrap();
            one.copy(device, from, BYTES as u64, StreamId::DEFAULT).unwrap();
            two.fill(from, 0, BYTES as u64, StreamId::DEFAULT).unwrap();
            two.free(from).unwrap();
            let mut got = vec![0; BYTES];
            one.read(&mut got, device, StreamId::DEFAULT).unwrap();
            assert!(got.iter().all(|byte| *byte == round), "{kind:?}, round {round}");
        }
    }
    let other = two.alloc(MemKind::Host, 16).unwrap();
    one.begin_capture(StreamId::DEFAULT).unwrap();
    let refused = one.copy(device, other, 16, StreamId::DEFAULT);
    assert!(matches!(refused, Err(DriverError::Capture { .. })), "{refused:?}");
    let graph = one.end_capture(StreamId::DEFAULT).unwrap();
    one.release_graph(graph).unwrap();
    two.free(other).unwrap();
    one.free(device).unwrap();
}

/// Experts on the CPU and the rest on the GPU, as `--cpu-moe` has it, give what the CPU gives, whoever multiplies the
/// prompt with them.
#[test]
fn experts_stay_on_the_cpu() {
    let Some(dir) = common::goldens() else { return };
    for name in ["qwen3moe-b", "gpt-oss-b"] {
        let model = common::model(&dir.join(format!("tiny/{name}.gguf")));
        let n_layer = model.hparams().n_layer();
        let want = outputs(&model, cpu(&model), false);
        for offload in [None, Some(Offload { from: 0, to: 1 })] {
            let tensors = on(&model, 0, |name| name.contains("_exps"));
            let placement = Placement { tensors, offload, ..Placement::last_layers(n_layer, n_layer + 1) };
            for device in common::gpus_or_emulators() {
                let got = outputs(&model, cpu_and_gpu(&model, &device, &placement), false);
                let err = common::nmse(&got, &want);
                assert!(err <= 1e-5, "{name}, {offload:?}, sm {}: nmse {err:.1e}", device.info().sm);
            }
        }
    }
}

/// Where the GPU multiplies prompts with weights of the host, a sequence still has the same bits however its prompt is cut
/// and whatever else is in the batch: an answer's tokens stay on the CPU, a prompt's last token goes to the GPU.
#[test]
fn products_on_the_gpu_depend_on_no_cut() {
    let Some(dir) = common::goldens() else { return };
    let model = common::model(&dir.join("tiny/quantmix-a.gguf"));
    let n_layer = model.hparams().n_layer();
    let offload = Some(Offload { from: 0, to: 1 });
    // A layer of the GPU has a matrix on the CPU too.
    let tensors = on(&model, 0, |name| name.contains("ffn_up") || name.contains("attn_q."));
    let placement = Placement { tensors, offload, ..Placement::last_layers(n_layer, 1) };
    let prompt: Vec<u32> = (0..19).map(|i| 3 + 11 * i % 250).collect();
    let answer: Vec<u32> = (0..3).map(|i| 7 + 31 * i % 250).collect();
    let context = |backend, n_seq| {
        let params = ContextParams { n_ctx: 256, n_seq, n_ubatch: 64, ..ContextParams::default() };
        Context::new(model.clone(), backend, params).unwrap()
    };
    // Sequence 0's logits, its prompt cut; others say something else meanwhile.
    let talk = |context: &mut Context, cut: usize, others: usize| {
        let mut all = Vec::new();
        let mut step = |batch: &mut Batch, context: &mut Context, wanted: usize| {
            for seq in 1..=others {
                let generated = batch.tokens[0].generated ^ (seq % 2 == 1);
                batch.push_generated(seq, 5 + seq as u32);
                batch.tokens.last_mut().unwrap().generated = generated;
            }
            context.decode(batch).unwrap();
            (0..wanted).for_each(|i| all.extend_from_slice(context.output(i)));
        };
        for piece in prompt.chunks(cut) {
            let mut batch = Batch::default();
            batch.extend(0, piece, true);
            step(&mut batch, context, piece.len());
        }
        for &token in &answer {
            let mut batch = Batch::default();
            batch.push_generated(0, token);
            step(&mut batch, context, 1);
        }
        all
    };
    for device in common::gpus_or_emulators() {
        let backend = |placement: &Placement| cpu_and_gpu(&model, &device, placement);
        let want = talk(&mut context(backend(&placement), 1), 19, 0);
        for (cut, others) in [(1, 0), (7, 2)] {
            let got = talk(&mut context(backend(&placement), 1 + others), cut, others);
            assert!(got == want, "sm {}: cut by {cut} with {others} others: other bits", device.info().sm);
        }
        let stays = Placement { offload: None, ..placement.clone() };
        let without = talk(&mut context(backend(&stays), 1), 19, 0);
        assert!(without != want, "no product has moved");
        assert!(common::nmse(&without, &want) <= 1e-2, "{:.1e}", common::nmse(&without, &want));
    }
}

/// What a backend is asked for, with the plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Prefetch(usize),
    Run(usize),
    Read(usize),
}

/// A backend that writes down its calls.
struct Recording {
    inner: Box<dyn Backend>,
    calls: Arc<Mutex<Vec<Call>>>,
}

impl Backend for Recording {
    fn info(&self) -> BackendInfo {
        self.inner.info()
    }
    fn supports(&self, graph: &Graph, node: &Node) -> Result<(), String> {
        self.inner.supports(graph, node)
    }
    fn create_kv(&mut self, layout: &KvLayout) -> Result<(), EngineError> {
        self.inner.create_kv(layout)
    }
    fn prepare(&mut self, plan: Arc<Plan>) -> Result<PlanId, EngineError> {
        self.inner.prepare(plan)
    }
    fn release(&mut self, plan: PlanId) {
        self.inner.release(plan);
    }
    fn prefetch(&mut self, plan: PlanId) -> Result<(), EngineError> {
        self.calls.lock().unwrap().push(Call::Prefetch(plan.0));
        self.inner.prefetch(plan)
    }
    fn run(&mut self, plan: PlanId, step: &Step<'_>) -> Result<(), EngineError> {
        self.calls.lock().unwrap().push(Call::Run(plan.0));
        self.inner.run(plan, step)
    }
    fn read(&mut self, plan: PlanId, tensor: TensorId, out: &mut [f32]) -> Result<(), EngineError> {
        self.calls.lock().unwrap().push(Call::Read(plan.0));
        self.inner.read(plan, tensor, out)
    }
}

/// The weights of the next part that brings some are asked for while a part's products run: before its results are waited
/// for. Answers bring none.
#[test]
fn what_is_brought_next_is_asked_for_early() {
    let Some(dir) = common::goldens() else { return };
    let model = common::model(&dir.join("tiny/llama-b.gguf"));
    let n_layer = model.hparams().n_layer();
    let placement =
        Placement { offload: Some(Offload { from: 0, to: 1 }), ..Placement::last_layers(n_layer, 0) };
    let calls = Arc::new(Mutex::new(Vec::new()));
    let recording = Recording { inner: cpu(&model), calls: calls.clone() };
    let split = Split::new(vec![cpu(&model), Box::new(recording)], placement, model.weights().clone());
    let params = ContextParams { n_ctx: 64, ..ContextParams::default() };
    let mut context = Context::new(model.clone(), Box::new(split), params).unwrap();
    context.decode(&Batch::prompt(0, &[1, 7, 5])).unwrap();
    let calls_of_prompt = std::mem::take(&mut *calls.lock().unwrap());
    // Queries, keys and values; the output of attention; the gated part.
    let n = 3 * n_layer;
    let runs = calls_of_prompt.iter().filter(|call| matches!(call, Call::Run(_)));
    assert_eq!(runs.count(), n, "{calls_of_prompt:?}");
    for part in 0..n {
        let at = calls_of_prompt.iter().position(|call| *call == Call::Run(part)).unwrap();
        let next = calls_of_prompt[at + 1];
        let wanted = if part + 1 < n { Call::Prefetch(part + 1) } else { Call::Read(part) };
        assert_eq!(next, wanted, "{calls_of_prompt:?}");
    }
    let mut batch = Batch::default();
    batch.push_generated(0, 4);
    context.decode(&batch).unwrap();
    assert_eq!(*calls.lock().unwrap(), [], "an answer's token");
}
