//! A model spread over several backends answers as on one.

mod common;

use std::sync::Arc;

use engine::backend::Backend;
use engine::backends::cpu::{Cpu, Isa};
use engine::backends::cuda::Cuda;
use engine::backends::split::{Placement, Split};
use engine::executor::Serial;
use engine::{Batch, Context, ContextParams, Model};

fn cpu(model: &Model) -> Box<dyn Backend> {
    Box::new(Cpu::new(model.weights().clone(), Arc::new(Serial), Isa::detect()))
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
        placements.push(Placement { input: 1, layers: (0..n_layer).map(|il| il % 2).collect(), output: 0 });
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
    let gpu = || -> Box<dyn Backend> {
        Box::new(Cuda::new(common::gpu_or_emulator(), Arc::new(Serial), model.weights().clone()))
    };
    let one = outputs(&model, gpu(), false);
    let ranges = [0..1, 1..n_layer];
    let placement = Placement::ranges(n_layer, &ranges, false);
    let split = Split::new(vec![gpu(), gpu()], placement, model.weights().clone());
    assert!(outputs(&model, Box::new(split), false) == one, "two GPUs give other bits");
    let want = outputs(&model, cpu(&model), false);
    let placement = Placement::ranges(n_layer, &[0..0, 1..n_layer], true);
    let split = Split::new(vec![cpu(&model), gpu(), gpu()], placement, model.weights().clone());
    let err = common::nmse(&outputs(&model, Box::new(split), false), &want);
    assert!(err <= 1e-5, "nmse {err:.1e}");
}
