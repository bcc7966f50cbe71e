//! Hyperparameters of a model, read from the file's metadata.
//!
//! [`Keys`] reads keys under the architecture's prefix with llama.cpp's names; [`Hparams::read`] reads what most
//! architectures share. A missing key is an error that names it; a value out of range says what is allowed.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use gguf::Gguf;

use crate::error::EngineError;
use crate::op::{RopeMode, RopeParams};

/// Bounds that no real model comes near; they keep a hostile file from asking for absurd graphs.
const MAX_LAYERS: u32 = 1024;
const MAX_HEADS: u32 = 4096;
const MAX_DIM: u32 = 1 << 20;

/// Typed access to `<arch>.<key>`.
pub struct Keys<'a> {
    gguf: &'a Gguf<'a>,
    arch: &'static str,
}

impl<'a> Keys<'a> {
    /// Keys of `arch`.
    pub fn new(gguf: &'a Gguf<'a>, arch: &'static str) -> Keys<'a> {
        Keys { gguf, arch }
    }

    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.arch)
    }

    /// Required integer in `1..=max`.
    fn dim(&self, key: &str, max: u32) -> Result<usize, EngineError> {
        in_range(&self.key(key), self.gguf.u32(&self.key(key))?, max)
    }

    /// Optional integer in `1..=max`.
    fn opt_dim(&self, key: &str, max: u32) -> Result<Option<usize>, EngineError> {
        self.gguf.opt_u32(&self.key(key))?.map(|v| in_range(&self.key(key), v, max)).transpose()
    }

    /// Optional integer.
    pub fn opt_u32(&self, key: &str) -> Result<Option<u32>, EngineError> {
        Ok(self.gguf.opt_u32(&self.key(key))?)
    }

    /// Required float, finite.
    pub fn f32(&self, key: &str) -> Result<f32, EngineError> {
        finite(&self.key(key), self.gguf.f32(&self.key(key))?)
    }

    /// Optional float, finite.
    pub fn opt_f32(&self, key: &str) -> Result<Option<f32>, EngineError> {
        self.gguf.opt_f32(&self.key(key))?.map(|v| finite(&self.key(key), v)).transpose()
    }

    /// Optional boolean.
    pub fn opt_bool(&self, key: &str) -> Result<Option<bool>, EngineError> {
        Ok(self.gguf.opt_bool(&self.key(key))?)
    }

    /// Optional string.
    pub fn opt_str(&self, key: &str) -> Result<Option<&'a str>, EngineError> {
        Ok(self.gguf.opt_str(&self.key(key))?)
    }

    /// One integer for all layers or an array with one each.
    fn per_layer(&self, key: &str, n_layer: usize, max: u32) -> Result<Option<Vec<usize>>, EngineError> {
        let key = self.key(key);
        let Some(value) = self.gguf.get(&key) else { return Ok(None) };
        let values = match value {
            gguf::Value::Array(array) => {
                let all = array.u32s()?.collect::<Vec<_>>();
                if all.len() < n_layer {
                    return Err(bad(
                        &key,
                        format!("an array of {}", all.len()),
                        format!("one value per layer ({n_layer})"),
                    ));
                }
                all
            }
            _ => alloc::vec![self.gguf.u32(&key)?; n_layer],
        };
        values
            .into_iter()
            .take(n_layer)
            .map(|v| in_range(&key, v, max))
            .collect::<Result<Vec<_>, _>>()
            .map(Some)
    }
}

fn bad(key: &str, got: impl ToString, expected: impl ToString) -> EngineError {
    EngineError::BadHparam { key: key.to_string(), got: got.to_string(), expected: expected.to_string() }
}

fn in_range(key: &str, v: u32, max: u32) -> Result<usize, EngineError> {
    if (1..=max).contains(&v) { Ok(v as usize) } else { Err(bad(key, v, format!("1..={max}"))) }
}

fn finite(key: &str, v: f32) -> Result<f32, EngineError> {
    if v.is_finite() { Ok(v) } else { Err(bad(key, v, "a finite number")) }
}

/// How token outputs become one embedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// One vector per token.
    None,
    /// Mean of all tokens.
    Mean,
    /// The first token's.
    Cls,
    /// The last token's.
    Last,
}

/// What may differ from layer to layer.
#[derive(Clone, Debug)]
pub struct LayerHparams {
    /// Query heads.
    pub n_head: usize,
    /// Key/value heads.
    pub n_head_kv: usize,
    /// Width of the feed-forward part.
    pub n_ff: usize,
    /// Sliding window; 0 = full attention.
    pub window: u32,
}

/// A mixture of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MoeHparams {
    /// Experts.
    pub n_expert: usize,
    /// Experts per token.
    pub n_used: usize,
    /// Width of one expert.
    pub n_ff_exp: usize,
    /// Width of the shared expert; 0 = none.
    pub n_ff_shexp: usize,
}

/// Everything about a model's shape and constants that graphs and caches need.
#[derive(Clone, Debug)]
pub struct Hparams {
    /// Tokens in the vocabulary.
    pub n_vocab: usize,
    /// Context length it was trained with.
    pub n_ctx_train: usize,
    /// Positions that it has a learned embedding of; `None`: it computes them, as many as there may be.
    pub n_pos: Option<usize>,
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Layer by layer.
    pub layers: Vec<LayerHparams>,
    /// Elements per query/key head.
    pub head_dim_k: usize,
    /// Elements per value head.
    pub head_dim_v: usize,
    /// Epsilon of the norms.
    pub norm_eps: f32,
    /// Rotary embedding of full-attention layers.
    pub rope: RopeParams,
    /// Rotary embedding of sliding-window layers, where it differs.
    pub rope_swa: Option<RopeParams>,
    /// Pairing of the rotary embedding.
    pub rope_mode: RopeMode,
    /// Whether the file says `longrope`: long or short factors by context size.
    pub longrope: bool,
    /// Factor on q·k.
    pub attn_scale: f32,
    /// Soft cap on attention scores; 0 = none.
    pub attn_softcap: f32,
    /// Soft cap on the logits; 0 = none.
    pub final_softcap: f32,
    /// Factor on token embeddings.
    pub embd_scale: f32,
    /// Experts, if any.
    pub moe: Option<MoeHparams>,
    /// Whether a token sees only what came before it.
    pub causal: bool,
    /// How token outputs become one embedding.
    pub pooling: Pooling,
}

impl Hparams {
    /// Number of layers.
    pub fn n_layer(&self) -> usize {
        self.layers.len()
    }

    /// Reads what most architectures share; each architecture then sets its own fields. `eps_key` names the norm's
    /// epsilon under the prefix.
    pub fn read(keys: &Keys<'_>, eps_key: &str) -> Result<Hparams, EngineError> {
        let n_layer = keys.dim("block_count", MAX_LAYERS)?;
        let n_embd = keys.dim("embedding_length", MAX_DIM)?;
        let n_ctx_train = keys.dim("context_length", u32::MAX >> 1)?;
        let n_head_key = "attention.head_count";
        let n_head = keys
            .per_layer(n_head_key, n_layer, MAX_HEADS)?
            .ok_or_else(|| bad(&keys.key(n_head_key), "missing", "a number of heads"))?;
        let n_head_kv =
            keys.per_layer("attention.head_count_kv", n_layer, MAX_HEADS)?.unwrap_or_else(|| n_head.clone());
        let n_ff = keys
            .per_layer("feed_forward_length", n_layer, MAX_DIM)?
            .unwrap_or_else(|| alloc::vec![0; n_layer]);
        let layers = (0..n_layer)
            .map(|il| {
                if n_head[il] % n_head_kv[il] != 0 {
                    return Err(bad(
                        &keys.key("attention.head_count_kv"),
                        n_head_kv[il],
                        format!("a divisor of the {} heads of layer {il}", n_head[il]),
                    ));
                }
                Ok(LayerHparams { n_head: n_head[il], n_head_kv: n_head_kv[il], n_ff: n_ff[il], window: 0 })
            })
            .collect::<Result<Vec<_>, _>>()?;
        let head_dim = n_embd / n_head[0];
        let head_dim_k = keys.opt_dim("attention.key_length", 1 << 16)?.unwrap_or(head_dim);
        let head_dim_v = keys.opt_dim("attention.value_length", 1 << 16)?.unwrap_or(head_dim);
        if head_dim_k == 0 || head_dim_v == 0 {
            return Err(bad(
                &keys.key(n_head_key),
                n_head[0],
                format!("at most the embedding length {n_embd}"),
            ));
        }
        let n_vocab = match keys.gguf.get("tokenizer.ggml.tokens") {
            Some(gguf::Value::Array(tokens)) => tokens.len(),
            _ => keys.dim("vocab_size", 1 << 28)?,
        };
        let (rope, longrope) = read_rope(keys, head_dim_k, n_ctx_train)?;
        Ok(Hparams {
            n_vocab,
            n_ctx_train,
            n_pos: None,
            n_embd,
            layers,
            head_dim_k,
            head_dim_v,
            norm_eps: keys.f32(eps_key)?,
            rope,
            rope_swa: None,
            rope_mode: RopeMode::Norm,
            longrope,
            attn_scale: 1.0 / libm::sqrtf(head_dim_k as f32),
            attn_softcap: 0.0,
            final_softcap: 0.0,
            embd_scale: 1.0,
            moe: None,
            causal: keys.opt_bool("attention.causal")?.unwrap_or(true),
            pooling: match keys.opt_u32("pooling_type")? {
                Some(1) => Pooling::Mean,
                Some(2) => Pooling::Cls,
                Some(3) => Pooling::Last,
                None | Some(0) => Pooling::None,
                Some(other) => {
                    return Err(bad(
                        &keys.key("pooling_type"),
                        other,
                        "0 (none), 1 (mean), 2 (cls) or 3 (last)",
                    ));
                }
            },
        })
    }

    /// Sets the sliding window on all but every `pattern`-th layer (llama.cpp's default), or as the file's
    /// `sliding_window_pattern` says.
    pub fn set_window(&mut self, keys: &Keys<'_>, window: u32, pattern: u32) -> Result<(), EngineError> {
        let key = keys.key("attention.sliding_window_pattern");
        let n_layer = self.n_layer();
        let swa: Vec<bool> = match keys.gguf.get(&key) {
            Some(gguf::Value::Array(array)) => array.bools()?.collect(),
            _ => {
                let pattern = keys.opt_u32("attention.sliding_window_pattern")?.unwrap_or(pattern) as usize;
                (0..n_layer).map(|il| pattern == 0 || il % pattern < pattern - 1).collect()
            }
        };
        if swa.len() < n_layer {
            return Err(bad(
                &key,
                format!("an array of {}", swa.len()),
                format!("one value per layer ({n_layer})"),
            ));
        }
        for (layer, swa) in self.layers.iter_mut().zip(swa) {
            layer.window = if swa { window } else { 0 };
        }
        Ok(())
    }

    /// Reads the mixture's keys; `None` if the file has no experts.
    pub fn read_moe(&mut self, keys: &Keys<'_>) -> Result<(), EngineError> {
        let n_expert = keys.opt_u32("expert_count")?.unwrap_or(0);
        if n_expert == 0 {
            return Ok(());
        }
        let n_expert = in_range(&keys.key("expert_count"), n_expert, 4096)?;
        let n_used = keys.dim("expert_used_count", n_expert as u32)?;
        let n_ff = self.layers[0].n_ff;
        self.moe = Some(MoeHparams {
            n_expert,
            n_used,
            n_ff_exp: keys.opt_dim("expert_feed_forward_length", MAX_DIM)?.unwrap_or(n_ff),
            n_ff_shexp: keys.opt_dim("expert_shared_feed_forward_length", MAX_DIM)?.unwrap_or(0),
        });
        Ok(())
    }
}

/// Rotary parameters from `rope.*`, and whether the scaling type is longrope.
fn read_rope(
    keys: &Keys<'_>,
    head_dim: usize,
    n_ctx_train: usize,
) -> Result<(RopeParams, bool), EngineError> {
    let n_dims = keys.opt_dim("rope.dimension_count", MAX_DIM)?.unwrap_or(head_dim);
    if n_dims > head_dim || n_dims % 2 != 0 {
        return Err(bad(
            &keys.key("rope.dimension_count"),
            n_dims,
            format!("an even number up to {head_dim}"),
        ));
    }
    let factor = match keys.opt_f32("rope.scaling.factor")? {
        Some(f) => f,
        None => keys.opt_f32("rope.scale_linear")?.unwrap_or(0.0),
    };
    if factor < 0.0 {
        return Err(bad(&keys.key("rope.scaling.factor"), factor, "0 or more"));
    }
    let scale = if factor == 0.0 { 1.0 } else { 1.0 / factor };
    let kind = keys.opt_str("rope.scaling.type")?.unwrap_or("linear");
    let mut rope = RopeParams {
        n_dims,
        freq_base: keys.opt_f32("rope.freq_base")?.unwrap_or(10000.0),
        freq_scale: scale,
        ext_factor: 0.0,
        attn_factor: keys.opt_f32("rope.scaling.attn_factor")?.unwrap_or(1.0),
        beta_fast: keys.opt_f32("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
        beta_slow: keys.opt_f32("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
        n_ctx_orig: keys.opt_u32("rope.scaling.original_context_length")?.unwrap_or(n_ctx_train as u32),
    };
    match kind {
        "none" => rope.freq_scale = 1.0,
        "linear" | "longrope" => {}
        "yarn" => {
            rope.ext_factor = keys.opt_f32("rope.scaling.yarn_ext_factor")?.unwrap_or(1.0);
            if rope.ext_factor != 0.0 {
                // YaRN's magnitude; DeepSeek's `mscale_all_dim` (yarn_log_multiplier) divides it out again.
                let mscale = |m: f32| if factor <= 1.0 { 1.0 } else { 0.1 * m * libm::logf(factor) + 1.0 };
                let log_mul = keys.opt_f32("rope.scaling.yarn_log_multiplier")?.unwrap_or(0.0);
                rope.attn_factor *= mscale(1.0) / if log_mul == 0.0 { 1.0 } else { mscale(log_mul) };
            }
        }
        other => {
            return Err(bad(&keys.key("rope.scaling.type"), other, "none, linear, yarn or longrope"));
        }
    }
    if rope.freq_base <= 0.0 {
        return Err(bad(&keys.key("rope.freq_base"), rope.freq_base, "a positive number"));
    }
    Ok((rope, kind == "longrope"))
}
