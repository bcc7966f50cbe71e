//! Tiny models of every architecture against llama.cpp's logits, hidden states, embeddings and greedy tokens.

mod common;

use std::sync::Arc;

use engine::backend::Backend;
use engine::backends::cpu::{Cpu, Isa};
use engine::backends::cuda::Cuda;
use engine::backends::reference::Reference;
use engine::executor::Serial;
use engine::pool::Pool;
use engine::{Batch, Context, ContextParams, Model};
use quant::FormatId;

type MakeBackend = fn(&Model) -> Box<dyn Backend>;

const BACKENDS: &[(&str, MakeBackend)] = &[
    ("reference", |m| Box::new(Reference::new(m.weights().clone()))),
    ("cpu", |m| Box::new(Cpu::new(m.weights().clone(), Arc::new(Pool::new(2).unwrap()), Isa::detect()))),
    ("cuda", |m| Box::new(Cuda::new(common::gpu_or_emulator(), Arc::new(Serial), m.weights().clone()))),
];

fn params() -> ContextParams {
    // llama.cpp rounds the context up to 256: phi3 chooses its long factors by that.
    ContextParams {
        n_ctx: 256,
        type_k: FormatId::F32,
        type_v: FormatId::F32,
        taps: true,
        ..ContextParams::default()
    }
}

fn names(kind: impl Fn(&str) -> bool) -> Vec<String> {
    let Some(dir) = common::goldens() else { return Vec::new() };
    let index = common::json(&dir.join("tiny/index.json"));
    index.as_array().unwrap().iter().map(|v| v.as_str().unwrap().to_string()).filter(|n| kind(n)).collect()
}

/// Largest NMSE allowed against llama.cpp's reference flags.
///
/// F32 weights leave only f32 rounding. llama.cpp's GELU goes through an f16 table; a mixture's router may turn on the
/// last bit of an f16 product. For the mix of quantised tensors the target is the model dequantised to F32, and
/// llama.cpp's own distance from it gives the bound.
fn bound(name: &str, backend: &str, json: &serde_json::Value) -> f64 {
    if let Some(own) = json.get("ref_vs_dequant_f32") {
        let (rms, std) = (own["rms"].as_f64().unwrap(), own["logits_std"].as_f64().unwrap());
        // The CPU adds in llama.cpp's order. Which activations round up or down turns on last bits, and each turn is a
        // whole step: llama.cpp's distance is one draw of that noise, the GPU's order of sums another (8.8e-4 beside
        // 8.3e-4). A tenth more leaves no room for a wrong product.
        return if backend == "cuda" { 1.1 } else { 1.0 } * (rms / std).powi(2);
    }
    match name.rsplit_once('-').unwrap().0 {
        "gemma" | "gemma2" | "gemma3" | "mixtral" | "qwen2moe" | "qwen3moe" | "gpt-oss" => 1e-5,
        _ => 1e-8,
    }
}

fn outputs(context: &mut Context, ids: &[u32]) -> Vec<f32> {
    let mut batch = Batch::default();
    batch.extend(0, ids, true);
    let n = context.decode(&batch).unwrap();
    (0..n).flat_map(|i| context.output(i).to_vec()).collect()
}

#[test]
fn decoders_match_llama_cpp() {
    for name in names(|n| !n.starts_with("bert")) {
        let dir = common::goldens().unwrap().join("tiny");
        let json = common::json(&dir.join(format!("{name}.json")));
        let model = common::model(&dir.join(format!("{name}.gguf")));
        let ids = common::ids(&json["ids"]);
        let dequantised = json.get("dequant_f32_logits_file").or(json.get("logits_file")).unwrap();
        let want = common::f32s(&dir.join(dequantised.as_str().unwrap()));
        for (backend, make) in BACKENDS {
            let bound = bound(&name, backend, &json);
            let mut context = Context::new(model.clone(), make(&model), params()).unwrap();
            let got = outputs(&mut context, &ids);
            let err = common::nmse(&got, &want);
            println!("{name} on {backend}: nmse {err:.1e}, allowed {bound:.0e}");
            assert!(err <= bound, "{name} on {backend}: nmse {err:.1e}, allowed {bound:.0e}");

            // Token by token: the same bits.
            context.truncate(0, 0);
            let one_by_one: Vec<f32> = ids.iter().flat_map(|id| outputs(&mut context, &[*id])).collect();
            assert!(got == one_by_one, "{name} on {backend}: token by token gives other bits");
        }
    }
}

#[test]
fn hidden_states_match_llama_cpp() {
    for name in names(|n| !n.starts_with("bert") && !n.starts_with("quantmix")) {
        let dir = common::goldens().unwrap().join("tiny");
        let json = common::json(&dir.join(format!("{name}.json")));
        let model = common::model(&dir.join(format!("{name}.gguf")));
        let acts = common::f32s(&dir.join(json["acts_file"].as_str().unwrap()));
        for (backend, make) in BACKENDS {
            let bound = bound(&name, backend, &json);
            let mut context = Context::new(model.clone(), make(&model), params()).unwrap();
            outputs(&mut context, &common::ids(&json["ids"]));
            for tensor in json["acts"].as_array().unwrap() {
                let tap = tensor["name"].as_str().unwrap();
                let got = context.tap(tap).unwrap().unwrap_or_else(|| panic!("{name}: no tensor {tap}"));
                let want = &acts[tensor["offset_f32"].as_u64().unwrap() as usize..][..got.len()];
                let err = common::nmse(&got, want);
                assert!(err <= bound, "{name} on {backend}, {tap}: nmse {err:.1e}, allowed {bound:.0e}");
            }
        }
    }
}

/// 32 greedy tokens, where no two logits ever came nearer than the models differ by.
#[test]
fn greedy_tokens_match_llama_cpp() {
    for name in names(|n| !n.starts_with("bert") && !n.starts_with("quantmix")) {
        let dir = common::goldens().unwrap().join("tiny");
        let json = common::json(&dir.join(format!("{name}.json")));
        let model = common::model(&dir.join(format!("{name}.gguf")));
        let want = common::ids(&json["greedy_ids"]);
        let (_, make) = BACKENDS[1];
        let mut context = Context::new(model.clone(), make(&model), params()).unwrap();
        context.decode(&Batch::prompt(0, &common::ids(&json["greedy_prompt_ids"]))).unwrap();
        for (step, &id) in want.iter().enumerate() {
            let logits = context.output(0);
            let best = (0..logits.len()).rev().max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
            let margin = logits[best] - logits[id as usize];
            assert!(
                best as u32 == id || margin < 2e-3,
                "{name} step {step}: {best}, expected {id}, margin {margin}"
            );
            context.decode(&Batch::prompt(0, &[id])).unwrap();
        }
    }
}

#[test]
fn encoders_match_llama_cpp() {
    for name in names(|n| n.starts_with("bert")) {
        let dir = common::goldens().unwrap().join("tiny");
        let json = common::json(&dir.join(format!("{name}.json")));
        let model = common::model(&dir.join(format!("{name}.gguf")));
        let tokens = common::f32s(&dir.join(json["token_embeddings_file"].as_str().unwrap()));
        for (backend, make) in BACKENDS {
            let params = ContextParams { embeddings: true, ..params() };
            let mut context = Context::new(model.clone(), make(&model), params).unwrap();
            for item in json["items"].as_array().unwrap() {
                let ids = common::ids(&item["ids"]);
                let pooled: Vec<f32> = item["embedding"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|v| v.as_f64().unwrap() as f32)
                    .collect();
                let got = context.embed(&ids, model.hparams().pooling).unwrap();
                let err = common::nmse(&got, &pooled);
                assert!(err <= 1e-5, "{name} on {backend}: pooled nmse {err:.1e}");

                let got = context.embed(&ids, engine::hparams::Pooling::None).unwrap();
                let at = item["token_embeddings_offset_f32"].as_u64().unwrap() as usize;
                let err = common::nmse(&got, &tokens[at..][..got.len()]);
                assert!(err <= 1e-5, "{name} on {backend}: tokens nmse {err:.1e}");
            }
        }
    }
}
