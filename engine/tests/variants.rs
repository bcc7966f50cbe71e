//! Files that say the same model differently, and keys that other files of an architecture do not have: tiny models made
//! here, against themselves in their common form, and against llama.cpp's logits.
//!
//! `golden/variants/NAME.f32` holds llama.cpp's logits of the last of [`IDS`] (f32, little-endian): KV cache f32, flash
//! attention off, one thread, no repacking. `VARIANTS_OUT=FOLDER` writes the files that they were made from.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use engine::backend::Backend;
use engine::backends::cpu::{Cpu, Isa};
use engine::backends::cuda::{Cuda, emulator};
use engine::backends::reference::Reference;
use engine::executor::Serial;
use engine::hparams::Pooling;
use engine::kv_cache::KV_FORMATS;
use engine::weights::ByteSource;
use engine::{Batch, Context, ContextParams, EngineError, Model};
use quant::FormatId;

const E: usize = 64;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = E / HEADS;
const FF: usize = 64;
const VOCAB: usize = 40;
const N_LAYER: usize = 3;
const N_EXPERT: usize = 4;
const IDS: [u32; 24] =
    [7, 3, 31, 12, 25, 0, 39, 18, 18, 5, 22, 9, 33, 1, 14, 27, 36, 8, 2, 19, 30, 11, 4, 23];

/// A metadata value.
#[derive(Clone)]
enum Kv {
    U32(u32),
    F32(f32),
    Str(&'static str),
    Ints(Vec<u32>),
}

/// A model to be written: metadata, and f32 tensors by name with their shapes, outermost first.
#[derive(Clone)]
struct Tiny {
    arch: &'static str,
    kvs: BTreeMap<String, Kv>,
    tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

/// Uneven values that depend on a tensor's name alone.
fn values(name: &str, n: usize, scale: f32) -> Vec<f32> {
    let mut state =
        name.bytes().fold(0xcbf29ce484222325u64, |h, b| (h ^ b as u64).wrapping_mul(0x100000001b3));
    let mut next = || {
        state = state.wrapping_add(0x9E3779B97F4A7C15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xBF58476D1CE4E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D049BB133111EB);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u32 << 24) as f32
    };
    (0..n).map(|_| (next() + next() + next() - 1.5) * 2.0 * scale).collect()
}

impl Tiny {
    /// A dense decoder, or for `bert` an encoder, with the tensors that its architecture needs.
    fn new(arch: &'static str) -> Tiny {
        let mut t = Tiny { arch, kvs: BTreeMap::new(), tensors: BTreeMap::new() };
        for (key, value) in [
            ("block_count", N_LAYER),
            ("context_length", 256),
            ("embedding_length", E),
            ("feed_forward_length", FF),
            ("attention.head_count", HEADS),
            ("attention.head_count_kv", KV_HEADS),
            ("vocab_size", VOCAB),
        ] {
            t.key(key, Kv::U32(value as u32));
        }
        t.kvs.insert("general.architecture".into(), Kv::Str(arch));
        t.kvs.insert("tokenizer.ggml.model".into(), Kv::Str("no_vocab"));
        t.key("attention.layer_norm_rms_epsilon", Kv::F32(1e-5));
        t.matrix("token_embd.weight", VOCAB, E);
        let bert = arch == "bert";
        if bert {
            t.key("attention.layer_norm_epsilon", Kv::F32(1e-5));
            t.kvs.insert("tokenizer.ggml.token_type_count".into(), Kv::U32(1));
            t.matrix("position_embd.weight", 256, E);
            t.norm("token_embd_norm");
        } else {
            t.norm("output_norm");
        }
        for il in 0..N_LAYER {
            let name = |part: &str| format!("blk.{il}.{part}");
            for (part, rows) in [("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)] {
                t.matrix(&name(&format!("attn_{part}.weight")), rows * HEAD_DIM, E);
            }
            t.matrix(&name("attn_output.weight"), E, E);
            t.matrix(&name("ffn_up.weight"), if arch == "phi3" { 2 * FF } else { FF }, E);
            t.matrix(&name("ffn_down.weight"), E, FF);
            if bert {
                t.norm(&name("attn_output_norm"));
                t.norm(&name("layer_output_norm"));
                continue;
            }
            if arch != "phi3" {
                t.matrix(&name("ffn_gate.weight"), FF, E);
            }
            t.norm(&name("attn_norm"));
            t.norm(&name("ffn_norm"));
            if arch == "gemma3" || arch == "gemma2" {
                t.norm(&name("post_attention_norm"));
                t.norm(&name("post_ffw_norm"));
            }
            if arch == "gemma3" {
                t.vector(&name("attn_q_norm.weight"), HEAD_DIM, 1.0);
                t.vector(&name("attn_k_norm.weight"), HEAD_DIM, 1.0);
            }
        }
        t
    }

    /// The feed-forward parts made mixtures of [`N_EXPERT`] experts.
    fn mixture(mut self) -> Tiny {
        self.key("expert_count", Kv::U32(N_EXPERT as u32));
        self.key("expert_used_count", Kv::U32(2));
        for il in 0..N_LAYER {
            for (part, rows, cols) in [("gate", FF, E), ("up", FF, E), ("down", E, FF)] {
                self.tensors.remove(&format!("blk.{il}.ffn_{part}.weight"));
                let name = format!("blk.{il}.ffn_{part}_exps.weight");
                let data = values(&name, N_EXPERT * rows * cols, 1.0 / (cols as f32).sqrt());
                self.tensors.insert(name, (vec![N_EXPERT, rows, cols], data));
            }
            self.matrix(&format!("blk.{il}.ffn_gate_inp.weight"), N_EXPERT, E);
        }
        self
    }

    /// A shared expert beside those of a mixture, as qwen2moe has it.
    fn shared_expert(mut self) -> Tiny {
        self.key("expert_feed_forward_length", Kv::U32(FF as u32));
        self.key("expert_shared_feed_forward_length", Kv::U32(FF as u32));
        for il in 0..N_LAYER {
            self.vector(&format!("blk.{il}.ffn_gate_inp_shexp.weight"), E, 0.0);
            for (part, rows, cols) in [("gate", FF, E), ("up", FF, E), ("down", E, FF)] {
                self.matrix(&format!("blk.{il}.ffn_{part}_shexp.weight"), rows, cols);
            }
        }
        self
    }

    fn key(&mut self, key: &str, value: Kv) {
        self.kvs.insert(format!("{}.{key}", self.arch), value);
    }

    fn with(mut self, key: &str, value: Kv) -> Tiny {
        self.key(key, value);
        self
    }

    fn matrix(&mut self, name: &str, rows: usize, cols: usize) {
        let data = values(name, rows * cols, 1.5 / (cols as f32).sqrt());
        self.tensors.insert(name.into(), (vec![rows, cols], data));
    }

    fn vector(&mut self, name: &str, n: usize, base: f32) {
        let data = values(name, n, 0.2).into_iter().map(|v| base + v).collect();
        self.tensors.insert(name.into(), (vec![n], data));
    }

    fn norm(&mut self, name: &str) {
        self.vector(&format!("{name}.weight"), E, 1.0);
        if self.arch == "bert" {
            self.vector(&format!("{name}.bias"), E, 0.0);
        }
    }

    fn biases(mut self) -> Tiny {
        for il in 0..N_LAYER {
            for (part, heads) in [("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)] {
                self.vector(&format!("blk.{il}.attn_{part}.bias"), heads * HEAD_DIM, 0.0);
            }
        }
        self
    }

    /// q, k and v of every layer as one tensor: the weights, and if `biases` those too.
    fn fused(mut self, biases: bool) -> Tiny {
        for il in 0..N_LAYER {
            for kind in ["weight", "bias"].into_iter().take(1 + biases as usize) {
                let parts: Vec<_> = ["q", "k", "v"]
                    .iter()
                    .map(|part| self.tensors.remove(&format!("blk.{il}.attn_{part}.{kind}")).unwrap())
                    .collect();
                let mut shape = parts[0].0.clone();
                shape[0] = parts.iter().map(|(shape, _)| shape[0]).sum();
                let data = parts.into_iter().flat_map(|(_, data)| data).collect();
                self.tensors.insert(format!("blk.{il}.attn_qkv.{kind}"), (shape, data));
            }
        }
        self
    }

    /// Every matrix of the layers halved, and a factor of two put beside it; each expert's, and a router's never, divided
    /// by another power of two.
    fn scaled(mut self) -> Tiny {
        let is_matrix = |name: &&String| {
            name.starts_with("blk.") && name.ends_with(".weight") && !name.contains("gate_inp")
        };
        let names: Vec<_> = self.tensors.keys().filter(is_matrix).cloned().collect();
        for name in names {
            let (shape, data) = self.tensors.get_mut(&name).unwrap();
            let factors: Vec<f32> = match shape.len() {
                1 => continue,
                2 => vec![2.0],
                _ => (0..shape[0]).map(|expert| (1 << expert) as f32).collect(),
            };
            let n = data.len() / factors.len();
            for (part, factor) in data.chunks_mut(n).zip(&factors) {
                part.iter_mut().for_each(|v| *v /= factor);
            }
            let scale = name.replace(".weight", ".scale");
            self.tensors.insert(scale, (vec![factors.len()], factors));
        }
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let mut writer = gguf::Writer::default();
        for (key, value) in &self.kvs {
            match value {
                Kv::U32(v) => writer.kv(key, *v),
                Kv::F32(v) => writer.kv(key, *v),
                Kv::Str(v) => writer.kv(key, *v),
                Kv::Ints(v) => writer.kv(key, &gguf::Array::numbers(v.as_slice())),
            }
            .unwrap();
        }
        for (name, (shape, _)) in &self.tensors {
            let ne: Vec<u64> = shape.iter().rev().map(|n| *n as u64).collect();
            writer.tensor(name, FormatId::F32, &ne).unwrap();
        }
        let mut bytes = writer.header_bytes();
        for (_, data) in self.tensors.values() {
            bytes.extend(data.iter().flat_map(|v| v.to_le_bytes()));
            bytes.resize(bytes.len() + writer.padding(4 * data.len() as u64) as usize, 0);
        }
        bytes
    }

    fn load(&self) -> Result<Arc<Model>, EngineError> {
        let bytes: Arc<dyn ByteSource> = Arc::new(self.bytes());
        Ok(Arc::new(Model::load(vec![bytes])?))
    }

    /// Logits of every position, or hidden states of an encoder, on a backend.
    fn outputs(&self, backend: &str) -> Vec<f32> {
        self.run(backend, FormatId::F32).unwrap_or_else(|e| panic!("{} on {backend}: {e}", self.arch))
    }

    /// The same, with keys and values cached in a format.
    fn run(&self, backend: &str, cache: FormatId) -> Result<Vec<f32>, EngineError> {
        self.run_cut(backend, cache, IDS.len())
    }

    /// The same, so many tokens at a time.
    fn run_cut(&self, backend: &str, cache: FormatId, cut: usize) -> Result<Vec<f32>, EngineError> {
        let model = self.load().unwrap_or_else(|e| panic!("{}: {e}", self.arch));
        let weights = model.weights().clone();
        let backend: Box<dyn Backend> = match backend {
            "reference" => Box::new(Reference::new(weights)),
            "cpu" => Box::new(Cpu::new(weights, Arc::new(Serial), Isa::detect())),
            _ => Box::new(Cuda::new(emulator(), Arc::new(Serial), weights)),
        };
        let embeddings = self.arch == "bert";
        let params = ContextParams {
            n_ctx: 256,
            type_k: cache,
            type_v: cache,
            embeddings,
            ..ContextParams::default()
        };
        let mut context = Context::new(model, backend, params)?;
        if embeddings {
            return context.embed(&IDS, Pooling::None);
        }
        let mut all = Vec::new();
        for ids in IDS.chunks(cut) {
            let mut batch = Batch::default();
            batch.extend(0, ids, true);
            let n = context.decode(&batch)?;
            all.extend((0..n).flat_map(|i| context.output(i).to_vec()));
        }
        Ok(all)
    }
}

const BACKENDS: [&str; 3] = ["reference", "cpu", "cuda"];

#[test]
fn fused_matrices_are_their_parts() {
    for arch in ["llama", "qwen2", "gemma", "phi3", "bert"] {
        let plain = Tiny::new(arch);
        let biased = plain.clone().biases();
        for backend in BACKENDS {
            let (without, with) = (plain.outputs(backend), biased.outputs(backend));
            assert_ne!(without, with, "{arch} on {backend}: biases without effect");
            let fused = plain.clone().fused(false).outputs(backend);
            assert!(fused == without, "{arch} on {backend}: fused");
            let both = biased.clone().fused(true).outputs(backend);
            assert!(both == with, "{arch} on {backend}: fused, with fused biases");
            let weights = biased.clone().fused(false).outputs(backend);
            assert!(weights == with, "{arch} on {backend}: fused, with biases apart");
        }
    }
}

/// Halving and doubling are exact, so the bits are those of the matrices without factors; but a bias is added apart there.
#[test]
fn factors_of_matrices_count() {
    let dense = ["llama", "phi3", "bert"].map(Tiny::new);
    let biased = dense.clone().map(Tiny::biases);
    let mixtures = [Tiny::new("llama").mixture(), Tiny::new("qwen2moe").mixture().shared_expert()];
    let exact = dense.into_iter().chain(mixtures).map(|model| (model, 0.0));
    let rounded = biased.into_iter().map(|model| (model, 1e-12));
    for (model, bound) in exact.chain(rounded) {
        let scaled = model.clone().scaled();
        for backend in BACKENDS {
            let (want, got) = (model.outputs(backend), scaled.outputs(backend));
            let err = nmse(&got, &want);
            assert!(err <= bound, "{} on {backend}: nmse {err:.1e}", model.arch);
        }
    }
}

/// One head of 64, which fills a tile of attention.
fn one_head(arch: &'static str) -> Tiny {
    let mut model = Tiny::new(arch).with("attention.head_count", Kv::U32(1));
    model.key("attention.head_count_kv", Kv::U32(1));
    for il in 0..N_LAYER {
        for part in ["k", "v"] {
            model.matrix(&format!("blk.{il}.attn_{part}.weight"), E, E);
            model.vector(&format!("blk.{il}.attn_{part}.bias"), E, 0.0);
        }
    }
    model
}

/// Attention of a token by itself rotates and stores it on the way, in either pairing, to the bits of the steps that store first.
#[test]
fn a_token_is_appended_to_the_same_bits() {
    for arch in ["llama", "qwen2"] {
        let run = |cut| one_head(arch).run_cut("cuda", FormatId::F16, cut).unwrap();
        assert!(run(1) == run(IDS.len()), "{arch}");
    }
}

/// Channels that are always large take no precision from the others: keys and values are rotated before they are cached
/// in blocks of few bits.
#[test]
fn large_channels_survive_a_cache_in_blocks() {
    let mut model = one_head("llama");
    for il in 0..N_LAYER {
        for (part, channel) in [("k", 3), ("v", 10)] {
            model.tensors.get_mut(&format!("blk.{il}.attn_{part}.bias")).unwrap().1[channel] = 15.0;
        }
    }
    for backend in BACKENDS {
        let run = |cache| model.run(backend, cache).unwrap();
        let want = run(FormatId::F32);
        let err = nmse(&run(FormatId::Q4_0), &want);
        assert!(err <= LARGE_Q4_0, "{backend}: nmse {err:.1e}");
    }
}

/// Every format of the cache, on every backend that has it; the others say which they have.
#[test]
fn caches_of_every_format() {
    let model = one_head("llama");
    let exact = model.outputs("reference");
    for cache in KV_FORMATS {
        let want = model.run("reference", *cache).unwrap();
        let err = nmse(&want, &exact);
        let info = quant::info(*cache);
        let bound = if info.bytes < info.elems { 0.1 } else { 3e-4 };
        assert!(err <= bound, "{cache}: nmse {err:.1e}");
        for backend in ["cpu", "cuda"] {
            match model.run(backend, *cache) {
                Ok(got) => {
                    let err = nmse(&got, &want);
                    // A value that rounds to another code.
                    assert!(err <= 1e-3, "{cache} on {backend}: nmse {err:.1e}");
                    assert!(backend == "cpu" || *cache != FormatId::IQ4_NL);
                }
                Err(error) => {
                    let message = error.to_string();
                    assert!(backend == "cuda" && *cache == FormatId::IQ4_NL, "{backend}: {message}");
                    let says =
                        ["keys is IQ4_NL, expected one of F32, ", "Q5_1 on a GPU; --device cpu has more"];
                    assert!(says.iter().all(|text| message.contains(text)), "{message}");
                }
            }
        }
    }
}

/// Half of what the cache gives without rotation.
const LARGE_Q4_0: f64 = 3.3e-2;

fn nmse(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let err: f64 = got.iter().zip(want).map(|(a, b)| (*a as f64 - *b as f64).powi(2)).sum();
    err / want.iter().map(|b| (*b as f64).powi(2)).sum::<f64>()
}

/// Files whose keys say something that most files do not.
fn unusual() -> Vec<(&'static str, Tiny)> {
    let yarn = |arch| {
        Tiny::new(arch)
            .with("rope.scaling.type", Kv::Str("yarn"))
            .with("rope.scaling.factor", Kv::F32(8.0))
            .with("rope.scaling.original_context_length", Kv::U32(16))
    };
    let windows = |t: Tiny| {
        t.with("attention.sliding_window", Kv::U32(6))
            .with("attention.sliding_window_pattern", Kv::Ints(vec![1, 0]))
    };
    let mut bias = Tiny::new("qwen2").biases();
    bias.vector("output.bias", VOCAB, 0.0);
    let mut factors = Tiny::new("llama").mixture();
    for il in 0..N_LAYER {
        for part in ["gate", "up", "down"] {
            factors.vector(&format!("blk.{il}.ffn_{part}_exps.scale"), N_EXPERT, 1.0);
        }
    }
    vec![
        (
            "yarn-keys",
            yarn("llama")
                .with("rope.scaling.yarn_beta_fast", Kv::F32(4.0))
                .with("rope.scaling.yarn_ext_factor", Kv::F32(0.5))
                .with("rope.scaling.yarn_log_multiplier", Kv::F32(0.7)),
        ),
        ("yarn-no-length", yarn("llama").with("rope.scaling.original_context_length", Kv::U32(0))),
        // Layers with a window are neither interpolated nor magnified.
        ("yarn-windows", windows(yarn("gemma3"))),
        // `none` turns interpolation off in layers of full attention only; a window's frequencies have their base.
        (
            "none-windows",
            windows(Tiny::new("gemma2"))
                .with("rope.scaling.type", Kv::Str("none"))
                .with("rope.scaling.factor", Kv::F32(3.0))
                .with("rope.freq_base_swa", Kv::F32(500.0)),
        ),
        ("output-bias", bias),
        // An expert of this family has the dense width, and there is no shared one.
        (
            "expert-widths",
            Tiny::new("llama")
                .mixture()
                .with("expert_feed_forward_length", Kv::U32(32))
                .with("expert_shared_feed_forward_length", Kv::U32(32)),
        ),
        ("expert-factors", factors),
    ]
}

#[test]
fn unusual_keys_match_llama_cpp() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/variants");
    for (name, model) in unusual() {
        if let Some(folder) = std::env::var_os("VARIANTS_OUT") {
            std::fs::write(Path::new(&folder).join(format!("{name}.gguf")), model.bytes()).unwrap();
            continue;
        }
        let want: Vec<f32> = std::fs::read(golden.join(format!("{name}.f32")))
            .unwrap()
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect();
        // llama.cpp's GELU is a table of f16.
        let bound = if model.arch.starts_with("gemma") { 1e-5 } else { 1e-8 };
        for backend in BACKENDS {
            let got = model.outputs(backend);
            let err = nmse(&got[got.len() - VOCAB..], &want);
            assert!(err <= bound, "{name} on {backend}: nmse {err:.1e}, allowed {bound:.0e}");
        }
    }
}

#[test]
fn what_would_be_left_out_is_refused() {
    let refused = |model: Tiny| match model.load() {
        Ok(_) => panic!("it loads"),
        Err(e) => e.to_string(),
    };
    let mut sinks = Tiny::new("llama");
    sinks.vector("blk.1.attn_sinks.weight", HEADS, 0.0);
    let message = refused(sinks);
    assert!(message.contains("blk.1.attn_sinks.weight: no tensor of this architecture"), "{message}");

    let message = refused(Tiny::new("llama").mixture().with("expert_group_count", Kv::U32(2)));
    assert!(message.contains("llama.expert_group_count is 2, expected one group"), "{message}");
    let one_group = Tiny::new("llama").mixture().with("expert_group_count", Kv::U32(1));
    assert!(one_group.with("expert_used_count", Kv::Ints(vec![2; N_LAYER])).load().is_ok());

    let message = refused(Tiny::new("llama").mixture().with("expert_used_count", Kv::Ints(vec![1, 2, 1])));
    assert!(message.contains("llama.expert_used_count is 1 and 2"), "{message}");

    let windows = || Tiny::new("gemma3").with("attention.sliding_window", Kv::U32(6));
    for key in ["rope.dimension_count_swa", "attention.key_length_swa", "attention.value_length_swa"] {
        let message = refused(windows().with(key, Kv::U32(8)));
        assert!(message.contains(&format!("gemma3.{key} is 8, expected 16")), "{message}");
        assert!(windows().with(key, Kv::U32(16)).load().is_ok(), "{key}");
    }

    let mut factors = Tiny::new("llama").mixture();
    factors.vector("blk.1.ffn_up_exps.scale", N_EXPERT + 1, 1.0);
    let message = refused(factors);
    assert!(message.contains("blk.1.ffn_up_exps.scale: expected shape [4, 1], got [5]"), "{message}");

    let mut types = Tiny::new("bert");
    types.kvs.remove("tokenizer.ggml.token_type_count");
    let message = refused(types);
    assert!(message.contains("tokenizer.ggml.token_type_count"), "{message}");
}
