//! Hostile model files that the GGUF reader accepts: tiny models with changed metadata and tensors. Each is refused with
//! an error or runs; none panics, and none takes long. (19,200 were tried once; a few hundred are each time.)

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::backends::cpu::{Cpu, Isa};
use engine::executor::Serial;
use engine::hparams::Pooling;
use engine::sampler::{Sampler, SamplerParams};
use engine::tokenizer::{DecodeOptions, EncodeOptions};
use engine::weights::ByteSource;
use engine::{Batch, Context, ContextParams, Model};
use gguf::{Gguf, Value, ValueType};
use quant::FormatId;

/// Changed files per tiny model.
const N_MUTANTS: u64 = 60;

/// What one of them may take; an unchanged one takes some 20 ms.
const TIME_LIMIT: Duration = Duration::from_secs(5);

const INTEGERS: &[i128] = &[
    0,
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    12,
    15,
    16,
    17,
    24,
    31,
    32,
    33,
    48,
    63,
    64,
    65,
    96,
    127,
    128,
    255,
    256,
    257,
    1000,
    1024,
    4095,
    4096,
    65535,
    65536,
    1 << 20,
    1 << 24,
    1 << 28,
    i32::MAX as i128,
    u32::MAX as i128,
    -1,
    i32::MIN as i128,
    i64::MAX as i128,
    u64::MAX as i128,
    i64::MIN as i128,
];

const FLOATS: &[f32] = &[
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    2.0,
    1e-6,
    1e-30,
    1e-45,
    1e30,
    f32::MAX,
    f32::MIN,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::NAN,
    10000.0,
    32.0,
];

const STRINGS: &[&[u8]] = &[
    b"",
    b"none",
    b"linear",
    b"yarn",
    b"longrope",
    b"gpt2",
    b"llama",
    b"bert",
    b"t5",
    b"rwkv",
    b"no_vocab",
    b"gemma4",
    b"whitespace",
    b"default",
    b"llama-bpe",
    b"qwen2",
    b"kimi-k2",
    b"deepseek-llm",
    b"phi-3",
    b"\xff\xfe",
    b"a\0b",
    b"modern-bert",
    b"jina-v2-es",
    b"'x' \\\\u0041",
    b"<0x41>",
    b"'",
    b"\\",
    b"\xe2\x96\x81",
    b"<|im_end|>",
    b"llama",
    b"qwen2",
    b"qwen3",
    b"qwen2moe",
    b"qwen3moe",
    b"gemma",
    b"gemma2",
    b"gemma3",
    b"phi3",
    b"gpt-oss",
];

/// Keys, without the architecture, that some model or tokenizer reads.
const ARCH_KEYS: &[&str] = &[
    "block_count",
    "embedding_length",
    "context_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "feed_forward_length",
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "rope.scaling.factor",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.freq_base",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_log_multiplier",
    "attention.causal",
    "pooling_type",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "expert_count",
    "expert_used_count",
    "expert_feed_forward_length",
    "expert_shared_feed_forward_length",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "rope.freq_base_swa",
    "attention.layer_norm_rms_epsilon",
    "attention.layer_norm_epsilon",
];

const TOKENIZER_KEYS: &[&str] = &[
    "model",
    "pre",
    "tokens",
    "scores",
    "token_type",
    "merges",
    "bos_token_id",
    "eos_token_id",
    "eot_token_id",
    "eom_token_id",
    "unknown_token_id",
    "seperator_token_id",
    "padding_token_id",
    "mask_token_id",
    "add_bos_token",
    "add_eos_token",
    "add_space_prefix",
    "remove_extra_whitespaces",
    "precompiled_charsmap",
    "fim_pre_token_id",
    "normalizer.lowercase",
    "normalizer.strip_accents",
];

const TEXTS: &[&str] = &[
    "Hello, world! 123456 don't  \n\n\t x",
    "<|im_start|>user\nhi<|im_end|></s><s>[INST]<unk><0x41>",
    "gr\u{fc}\u{df}e \u{4f60}\u{597d} \u{1f600}\u{200d}\u{1f469} a\u{301}\u{327} \u{fdfa} \u{feff}",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "",
];

/// A file as parts that can be changed.
#[derive(Clone)]
struct Parts {
    arch: String,
    kvs: Vec<(String, Owned)>,
    tensors: Vec<Tensor>,
}

#[derive(Clone, Debug)]
enum Owned {
    Int(ValueType, i128),
    F32(f32),
    Bool(bool),
    Str(Vec<u8>),
    Ints(ValueType, Vec<i128>),
    F32s(Vec<f32>),
    Bools(Vec<bool>),
    Strs(Vec<Vec<u8>>),
}

#[derive(Clone)]
struct Tensor {
    name: String,
    format: FormatId,
    ne: Vec<u64>,
    data: Vec<u8>,
}

impl Parts {
    fn read(bytes: &[u8]) -> Parts {
        let file = Gguf::parse(bytes).unwrap();
        let kvs = file.kvs().map(|(key, value)| (key.to_string(), Owned::of(value))).collect();
        let tensors = file
            .tensors()
            .iter()
            .map(|t| Tensor {
                name: t.name.to_string(),
                format: t.format,
                ne: t.ne().iter().copied().collect(),
                data: file.data(t).to_vec(),
            })
            .collect();
        Parts { arch: file.str("general.architecture").unwrap().to_string(), kvs, tensors }
    }

    /// The file; what its head needs is right whatever the parts say, but a tensor may be one that no file can have.
    fn write(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        let string = |out: &mut Vec<u8>, text: &[u8]| {
            out.extend((text.len() as u64).to_le_bytes());
            out.extend_from_slice(text);
        };
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.kvs.len() as u64).to_le_bytes());
        for (key, value) in &self.kvs {
            string(&mut out, key.as_bytes());
            value.write(&mut out);
        }
        let mut offset = 0u64;
        for t in &self.tensors {
            string(&mut out, t.name.as_bytes());
            out.extend((t.ne.len() as u32).to_le_bytes());
            t.ne.iter().for_each(|n| out.extend(n.to_le_bytes()));
            out.extend((t.format as u32).to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset += (t.data.len() as u64).next_multiple_of(32);
        }
        out.resize(out.len().next_multiple_of(32), 0);
        for t in &self.tensors {
            out.extend_from_slice(&t.data);
            out.resize(out.len().next_multiple_of(32), 0);
        }
        out
    }
}

impl Owned {
    fn of(value: Value<'_>) -> Owned {
        match value {
            Value::F32(v) => Owned::F32(v),
            Value::F64(v) => Owned::F32(v as f32),
            Value::Bool(v) => Owned::Bool(v),
            Value::Str(v) => Owned::Str(v.to_vec()),
            Value::Array(a) => match a.elem_type() {
                ValueType::F32 => Owned::F32s(a.f32s().unwrap().collect()),
                ValueType::Bool => Owned::Bools(a.bools().unwrap().collect()),
                ValueType::Str => Owned::Strs(
                    a.iter().map(|v| if let Value::Str(s) = v { s.to_vec() } else { Vec::new() }).collect(),
                ),
                t => Owned::Ints(t, a.iter().filter_map(|v| v.as_integer()).collect()),
            },
            v => Owned::Int(v.value_type(), v.as_integer().unwrap()),
        }
    }

    fn write(&self, out: &mut Vec<u8>) {
        let int = |out: &mut Vec<u8>, t: ValueType, v: i128| {
            let width = match t {
                ValueType::U8 | ValueType::I8 => 1,
                ValueType::U16 | ValueType::I16 => 2,
                ValueType::U32 | ValueType::I32 => 4,
                _ => 8,
            };
            out.extend_from_slice(&v.to_le_bytes()[..width]);
        };
        let head = |out: &mut Vec<u8>, t: ValueType| out.extend((t as u32).to_le_bytes());
        let array = |out: &mut Vec<u8>, t: ValueType, len: usize| {
            out.extend((ValueType::Array as u32).to_le_bytes());
            out.extend((t as u32).to_le_bytes());
            out.extend((len as u64).to_le_bytes());
        };
        match self {
            Owned::Int(t, v) => {
                head(out, *t);
                int(out, *t, *v);
            }
            Owned::F32(v) => {
                head(out, ValueType::F32);
                out.extend(v.to_le_bytes());
            }
            Owned::Bool(v) => {
                head(out, ValueType::Bool);
                out.push(*v as u8);
            }
            Owned::Str(s) => {
                head(out, ValueType::Str);
                out.extend((s.len() as u64).to_le_bytes());
                out.extend_from_slice(s);
            }
            Owned::Ints(t, v) => {
                array(out, *t, v.len());
                v.iter().for_each(|v| int(out, *t, *v));
            }
            Owned::F32s(v) => {
                array(out, ValueType::F32, v.len());
                v.iter().for_each(|v| out.extend(v.to_le_bytes()));
            }
            Owned::Bools(v) => {
                array(out, ValueType::Bool, v.len());
                out.extend(v.iter().map(|v| *v as u8));
            }
            Owned::Strs(v) => {
                array(out, ValueType::Str, v.len());
                for s in v {
                    out.extend((s.len() as u64).to_le_bytes());
                    out.extend_from_slice(s);
                }
            }
        }
    }
}

/// xorshift64*: repeatable changes.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() >> 33) as usize % n
    }

    fn of<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    fn integer(&mut self, near: i128) -> i128 {
        match self.below(4) {
            0 => near + 1,
            1 => near - 1,
            _ => *self.of(INTEGERS),
        }
    }

    fn text(&mut self) -> Vec<u8> {
        match self.below(4) {
            0 => (0..self.below(40)).map(|_| self.next() as u8).collect(),
            1 => self.of(STRINGS).repeat(1 + self.below(50)),
            _ => self.of(STRINGS).to_vec(),
        }
    }
}

fn any_value(rng: &mut Rng) -> Owned {
    match rng.below(8) {
        0 | 1 => Owned::Int(ValueType::U32, rng.integer(1)),
        2 => Owned::Int(
            *rng.of(&[ValueType::I32, ValueType::U64, ValueType::I64, ValueType::U8]),
            rng.integer(1),
        ),
        3 => Owned::F32(*rng.of(FLOATS)),
        4 => Owned::Bool(rng.one_in(2)),
        5 => Owned::Str(rng.text()),
        6 => {
            let n = rng.below(300);
            Owned::Ints(
                *rng.of(&[ValueType::U32, ValueType::I32, ValueType::U8]),
                (0..n).map(|_| rng.integer(1)).collect(),
            )
        }
        _ => {
            let n = rng.below(300);
            Owned::Strs((0..n).map(|_| rng.text()).collect())
        }
    }
}

fn change_value(value: &mut Owned, rng: &mut Rng) {
    fn list<T: Clone>(v: &mut Vec<T>, rng: &mut Rng, change: impl Fn(&mut T, &mut Rng)) {
        if v.is_empty() {
            return;
        }
        match rng.below(6) {
            0 => v.truncate(rng.below(v.len() + 1)),
            1 => v.extend_from_within(..rng.below(v.len() + 1)),
            2 => v.clear(),
            3 => {
                for item in v {
                    if rng.one_in(3) {
                        change(item, rng);
                    }
                }
            }
            _ => {
                let i = rng.below(v.len());
                change(&mut v[i], rng);
            }
        }
    }
    if rng.one_in(12) {
        *value = any_value(rng);
        return;
    }
    match value {
        Owned::Int(_, v) => *v = rng.integer(*v),
        Owned::F32(v) => *v = *rng.of(FLOATS),
        Owned::Bool(v) => *v = !*v,
        Owned::Str(s) => *s = rng.text(),
        Owned::Ints(_, v) => list(v, rng, |item, rng| *item = rng.integer(*item)),
        Owned::F32s(v) => list(v, rng, |item, rng| *item = *rng.of(FLOATS)),
        Owned::Bools(v) => list(v, rng, |item, _| *item = !*item),
        Owned::Strs(v) => list(v, rng, |item, rng| match rng.below(3) {
            0 => *item = rng.text(),
            1 => item.truncate(rng.below(item.len() + 1)),
            _ => item.push(rng.next() as u8),
        }),
    }
}

/// The extent `from` becomes `to` in every tensor and every number: what stays consistent gets past the shape checks.
fn change_extent(parts: &mut Parts, rng: &mut Rng) {
    let extents: Vec<u64> = parts.tensors.iter().flat_map(|t| t.ne.clone()).collect();
    let from = *rng.of(&extents);
    let to = match rng.below(5) {
        0 => from + 1,
        1 => from.saturating_sub(1).max(1),
        2 => from.div_ceil(2),
        3 => from * 2,
        _ => *rng.of(&[1u64, 2, 3, 16, 31, 32, 33, 48, 80, 160]),
    };
    for t in &mut parts.tensors {
        for n in &mut t.ne {
            if *n == from {
                *n = to;
            }
        }
        fit(t);
    }
    for (_, value) in &mut parts.kvs {
        match value {
            Owned::Int(_, v) if *v == from as i128 => *v = to as i128,
            Owned::Strs(v) if v.len() as u64 == from => v.resize(to as usize, b"new".to_vec()),
            Owned::F32s(v) if v.len() as u64 == from => v.resize(to as usize, -1.0),
            Owned::Ints(_, v) if v.len() as u64 == from => v.resize(to as usize, 1),
            _ => {}
        }
    }
}

/// As much data as the shape needs, if that is a shape at all; F32 where no row of blocks fits.
fn fit(t: &mut Tensor) {
    let cols = t.ne.first().copied().unwrap_or(0) as usize;
    if quant::row::row_bytes(t.format, cols).is_err() {
        t.format = FormatId::F32;
    }
    let rows: u64 = t.ne.iter().skip(1).fold(1, |n, m| n.saturating_mul(*m));
    let row = quant::row::row_bytes(t.format, cols.min(1 << 22)).unwrap_or(0) as u64;
    let len = row.saturating_mul(rows).min(4 << 20) as usize;
    let pattern = if t.data.is_empty() { vec![0] } else { t.data.clone() };
    t.data = pattern.iter().copied().cycle().take(len).collect();
}

fn change_tensor(parts: &mut Parts, rng: &mut Rng) {
    let i = rng.below(parts.tensors.len());
    let other = rng.below(parts.tensors.len());
    match rng.below(8) {
        0 => {
            parts.tensors.remove(i);
        }
        1 => {
            let name = parts.tensors[other].name.clone();
            parts.tensors[other].name = std::mem::replace(&mut parts.tensors[i].name, name);
        }
        2 => {
            let t = &mut parts.tensors[i];
            let d = rng.below(t.ne.len());
            t.ne[d] = rng.integer(t.ne[d] as i128) as u64;
            fit(t);
        }
        3 => {
            let t = &mut parts.tensors[i];
            if rng.one_in(2) {
                t.ne.reverse()
            } else {
                t.ne.push(1)
            }
            fit(t);
        }
        4 | 5 => {
            let t = &mut parts.tensors[i];
            let formats: Vec<FormatId> = (0..64u32).filter_map(FormatId::from_ggml).collect();
            t.format = *rng.of(&formats);
            fit(t);
        }
        6 => {
            let bits = *rng.of(&[f32::NAN, f32::INFINITY, f32::MAX, -1e30, 1e-45]);
            parts.tensors[i].data.chunks_exact_mut(4).for_each(|b| b.copy_from_slice(&bits.to_le_bytes()));
        }
        _ => {
            let data = &mut parts.tensors[i].data;
            for _ in 0..1 + rng.below(data.len().max(1)) {
                let n = data.len();
                if n > 0 {
                    data[rng.below(n)] = rng.next() as u8;
                }
            }
        }
    }
}

fn change(parts: &mut Parts, rng: &mut Rng) {
    match rng.below(10) {
        0..=3 => {
            let i = rng.below(parts.kvs.len());
            change_value(&mut parts.kvs[i].1, rng);
        }
        4 => {
            let i = rng.below(parts.kvs.len());
            parts.kvs.remove(i);
        }
        5 | 6 => {
            let (key, value) = match rng.one_in(2) {
                true => (format!("tokenizer.ggml.{}", rng.of(TOKENIZER_KEYS)), any_value(rng)),
                false => (format!("{}.{}", parts.arch, rng.of(ARCH_KEYS)), any_value(rng)),
            };
            parts.kvs.retain(|(have, _)| *have != key);
            parts.kvs.push((key, value));
        }
        7 => change_extent(parts, rng),
        _ => change_tensor(parts, rng),
    }
}

/// Another architecture for the same tensors.
fn change_arch(parts: &mut Parts, rng: &mut Rng) {
    let to = *rng.of(&[
        "llama", "qwen2", "qwen3", "qwen2moe", "qwen3moe", "gemma", "gemma2", "gemma3", "phi3", "gpt-oss",
        "bert",
    ]);
    let from = std::mem::replace(&mut parts.arch, to.to_string());
    for (key, value) in &mut parts.kvs {
        if key == "general.architecture" {
            *value = Owned::Str(to.as_bytes().to_vec());
        } else if let Some(rest) = key.strip_prefix(&format!("{from}.")) {
            *key = format!("{to}.{rest}");
        }
    }
}

/// Loads, encodes, computes, samples, decodes. The error where one of these refuses.
fn run(bytes: Vec<u8>, rng: &mut Rng) -> Result<(), String> {
    let source: Arc<dyn ByteSource> = Arc::new(bytes);
    let model = Arc::new(Model::load(vec![source]).map_err(|e| e.to_string())?);
    let tokenizer = model.tokenizer();
    let n_vocab = model.hparams().n_vocab;
    let mut ids = Vec::new();
    for text in TEXTS {
        for (add_special, parse_special) in [(true, true), (false, false)] {
            if let Ok(found) = tokenizer.encode(text.as_bytes(), EncodeOptions { add_special, parse_special })
            {
                assert!(found.iter().all(|id| (*id as usize) < tokenizer.n_vocab()), "ids of the vocabulary");
                let mut stream = tokenizer.stream(true);
                found.iter().for_each(|id| {
                    stream.push(*id);
                });
                stream.finish();
                tokenizer.decode(&found, DecodeOptions::default());
                ids.extend(found);
            }
        }
    }
    ids.truncate(24);
    ids.extend([0, 1, n_vocab as u32 - 1]);
    let cache = *rng.of(&[FormatId::F16, FormatId::F32, FormatId::Q8_0, FormatId::Q4_0]);
    let causal = model.hparams().causal;
    let params = ContextParams {
        n_ctx: 64,
        n_ubatch: if causal { 16 } else { 64 },
        type_k: cache,
        type_v: cache,
        embeddings: !causal || rng.one_in(6),
        ..ContextParams::default()
    };
    let backend = Cpu::new(model.weights().clone(), Arc::new(Serial), Isa::detect());
    let embeddings = params.embeddings;
    let mut context = Context::new(model.clone(), Box::new(backend), params).map_err(|e| e.to_string())?;
    if embeddings {
        let pooling = if causal { Pooling::Last } else { model.hparams().pooling };
        return context.embed(&ids, pooling).map(drop).map_err(|e| e.to_string());
    }
    let mut sampler = Sampler::new(SamplerParams { repeat_penalty: 1.1, ..SamplerParams::default() });
    let mut batch = Batch::prompt(0, &ids);
    for _ in 0..3 {
        context.decode_sampled(&batch, &mut [&mut sampler]).map_err(|e| e.to_string())?;
        let token = context.token(0);
        assert!((token as usize) < n_vocab, "a token of the vocabulary");
        batch.clear();
        batch.push_generated(0, token);
    }
    context.decode_greedy(&batch).map_err(|e| e.to_string())?;
    assert!((context.token(0) as usize) < n_vocab, "a token of the vocabulary");
    Ok(())
}

#[test]
fn changed_models_are_refused_or_run() {
    let Some(goldens) = common::goldens() else { return };
    let index = common::json(&goldens.join("tiny/index.json"));
    let mut failed = Vec::new();
    for (i, name) in index.as_array().unwrap().iter().enumerate() {
        let name = name.as_str().unwrap();
        let whole = Parts::read(&std::fs::read(goldens.join(format!("tiny/{name}.gguf"))).unwrap());
        let (mut ran, mut refused) = (0, 0);
        for seed in 0..N_MUTANTS {
            let mut rng = Rng((seed + 1) << 8 | i as u64);
            let mut parts = whole.clone();
            if rng.one_in(8) {
                change_arch(&mut parts, &mut rng);
            }
            for _ in 0..1 + rng.below(3) {
                change(&mut parts, &mut rng);
            }
            let bytes = parts.write();
            let started = Instant::now();
            match catch_unwind(AssertUnwindSafe(|| run(bytes, &mut rng))) {
                Ok(Ok(())) => ran += 1,
                Ok(Err(_)) => refused += 1,
                Err(_) => failed.push(format!("{name}, seed {seed}: panicked")),
            }
            if started.elapsed() > TIME_LIMIT {
                failed.push(format!("{name}, seed {seed}: {:?}", started.elapsed()));
            }
        }
        println!("{name}: {ran} ran, {refused} refused");
        assert!(ran > 0 && refused > 0, "{name}: changes that say nothing");
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// Found by the test above: a width that only qwen2moe has made other architectures use tensors that they had not listed.
#[test]
fn a_key_of_another_architecture_changes_nothing() {
    let Some(goldens) = common::goldens() else { return };
    for name in ["mixtral-a", "gpt-oss-b", "qwen3moe-b"] {
        let mut parts = Parts::read(&std::fs::read(goldens.join(format!("tiny/{name}.gguf"))).unwrap());
        let key = format!("{}.expert_shared_feed_forward_length", parts.arch);
        parts.kvs.push((key, Owned::Int(ValueType::U32, 32)));
        if let Err(error) = run(parts.write(), &mut Rng(1)) {
            panic!("{name}: {error}");
        }
    }
}
