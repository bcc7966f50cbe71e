//! Hyperparameters of a model, read from the file's metadata.
//!
//! [`Keys`] reads keys under the architecture's prefix with llama.cpp's names; [`Hparams::read`] reads what most
//! architectures share. A missing key is an error that names it; a value out of range says what is allowed.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use gguf::Gguf;

use crate::error::EngineError;
use crate::op::{AttentionParams, RopeMode, RopeParams};

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

    /// How many token types the vocabulary tells apart.
    pub fn token_types(&self) -> Result<usize, EngineError> {
        let key = "tokenizer.ggml.token_type_count";
        in_range(key, self.gguf.u32(key)?, MAX_DIM)
    }

    /// One integer, or an array that has the same one for each layer.
    fn same_in_all_layers(&self, key: &str, n_layer: usize, max: u32) -> Result<Option<usize>, EngineError> {
        let Some(values) = self.per_layer(key, n_layer, max)? else { return Ok(None) };
        match values.iter().find(|v| **v != values[0]) {
            Some(other) => {
                Err(bad(&self.key(key), format!("{} and {other}", values[0]), "the same in all layers"))
            }
            None => Ok(Some(values[0])),
        }
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
    /// Rotary embedding of sliding-window layers.
    pub rope_swa: RopeParams,
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
    /// Token types (BERT's segments) that embeddings tell apart; 0 = none.
    pub n_token_types: usize,
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
        let (rope, rope_swa, longrope) = read_rope(keys, head_dim_k, n_ctx_train)?;
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
            rope_swa,
            rope_mode: RopeMode::Norm,
            longrope,
            attn_scale: 1.0 / libm::sqrtf(head_dim_k as f32),
            attn_softcap: 0.0,
            final_softcap: 0.0,
            embd_scale: 1.0,
            moe: None,
            n_token_types: 0,
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
    /// `sliding_window_pattern` says: a number, or flags of the layers.
    ///
    /// Sizes that differ in layers with a window (`*_swa`) are an error: of our architectures none has them. (llama.cpp
    /// reads those keys for all, but builds our architectures' layers all alike, with the sizes of the first.)
    pub fn set_window(&mut self, keys: &Keys<'_>, window: u32, pattern: u32) -> Result<(), EngineError> {
        for (swa, full) in [
            ("rope.dimension_count_swa", self.rope.n_dims),
            ("attention.key_length_swa", self.head_dim_k),
            ("attention.value_length_swa", self.head_dim_v),
        ] {
            if let Some(got) = keys.opt_u32(swa)?.filter(|n| *n as usize != full) {
                return Err(bad(&keys.key(swa), got, format!("{full} as in the layers of full attention")));
            }
        }
        let n_layer = self.n_layer();
        let swa: Vec<bool> = match keys.gguf.get(&keys.key("attention.sliding_window_pattern")) {
            Some(gguf::Value::Array(array)) if array.elem_type() == gguf::ValueType::Bool => {
                array.bools()?.collect()
            }
            Some(gguf::Value::Array(array)) => array.u32s()?.map(|swa| swa != 0).collect(),
            _ => {
                let pattern = keys.opt_u32("attention.sliding_window_pattern")?.unwrap_or(pattern) as usize;
                (0..n_layer).map(|il| pattern == 0 || il % pattern < pattern - 1).collect()
            }
        };
        // Layers that an array leaves out have full attention.
        for (layer, swa) in self.layers.iter_mut().zip(swa.into_iter().chain(core::iter::repeat(false))) {
            layer.window = if swa { window } else { 0 };
        }
        Ok(())
    }

    /// Base of the rotary frequencies in sliding-window layers: the file's `rope.freq_base_swa` or `default`.
    pub fn read_freq_base_swa(&mut self, keys: &Keys<'_>, default: f32) -> Result<(), EngineError> {
        let freq_base = keys.opt_f32("rope.freq_base_swa")?.unwrap_or(default);
        if freq_base <= 0.0 {
            return Err(bad(&keys.key("rope.freq_base_swa"), freq_base, "a positive number"));
        }
        self.rope_swa.freq_base = freq_base;
        Ok(())
    }

    /// Reads the mixture's keys; leaves it at `None` if the file has no experts. The width of an expert is the file's
    /// `expert_feed_forward_length`, else (old files) the dense width divided among the experts of a token.
    ///
    /// Experts in groups, and layers that differ in the experts of a token, are errors: other architectures have them
    /// (deepseek2's; nemotron_h_moe), and no converter writes them for ours. (llama.cpp routes by groups whatever the
    /// architecture, but builds our layers all with the first one's number of experts.)
    pub fn read_moe(&mut self, keys: &Keys<'_>) -> Result<(), EngineError> {
        let n_expert = keys.opt_u32("expert_count")?.unwrap_or(0);
        if n_expert == 0 {
            return Ok(());
        }
        let n_expert = in_range(&keys.key("expert_count"), n_expert, 4096)?;
        if let Some(groups) = keys.opt_u32("expert_group_count")?.filter(|n| *n > 1) {
            return Err(bad(
                &keys.key("expert_group_count"),
                groups,
                "one group: experts of this architecture are chosen among all",
            ));
        }
        let used_key = "expert_used_count";
        let n_used = keys
            .same_in_all_layers(used_key, self.n_layer(), n_expert as u32)?
            .ok_or_else(|| bad(&keys.key(used_key), "missing", "a number of experts"))?;
        let n_ff_exp = keys.same_in_all_layers("expert_feed_forward_length", self.n_layer(), MAX_DIM)?;
        self.moe = Some(MoeHparams {
            n_expert,
            n_used,
            n_ff_exp: n_ff_exp.unwrap_or(self.layers[0].n_ff / n_used),
            n_ff_shexp: 0,
        });
        Ok(())
    }

    /// What the attention of layer `il` is told.
    pub fn attention(&self, il: usize) -> AttentionParams {
        let layer = &self.layers[il];
        AttentionParams {
            il,
            n_head: layer.n_head,
            n_head_kv: layer.n_head_kv,
            head_dim_k: self.head_dim_k,
            head_dim_v: self.head_dim_v,
            scale: self.attn_scale,
            softcap: self.attn_softcap,
            window: layer.window,
            causal: self.causal,
        }
    }

    /// [`Hparams::read_moe`] for an architecture that is always a mixture.
    pub fn require_moe(&mut self, keys: &Keys<'_>) -> Result<MoeHparams, EngineError> {
        self.read_moe(keys)?;
        self.moe.ok_or_else(|| bad(&keys.key("expert_count"), "missing or 0", "a number of experts"))
    }
}

/// Rotary parameters from `rope.*`: of layers with full attention, of those with a window, and whether the scaling type is
/// longrope. llama.cpp's `rope.scaling.yarn_*` keys are for other architectures than ours, which it gives YaRN's defaults.
fn read_rope(
    keys: &Keys<'_>,
    head_dim: usize,
    n_ctx_train: usize,
) -> Result<(RopeParams, RopeParams, bool), EngineError> {
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
    let mut scaled = RopeParams {
        n_dims,
        freq_base: keys.opt_f32("rope.freq_base")?.unwrap_or(10000.0),
        freq_scale: scale,
        ext_factor: 0.0,
        attn_factor: keys.opt_f32("rope.scaling.attn_factor")?.unwrap_or(1.0),
        beta_fast: 32.0,
        beta_slow: 1.0,
        n_ctx_orig: keys
            .opt_u32("rope.scaling.original_context_length")?
            .filter(|n| *n > 0)
            .unwrap_or(n_ctx_train as u32),
    };
    match kind {
        "none" | "linear" | "longrope" => {}
        "yarn" => {
            scaled.ext_factor = 1.0;
            if factor > 1.0 {
                scaled.attn_factor *= RopeParams::yarn_magnitude(scale);
            }
        }
        other => {
            return Err(bad(&keys.key("rope.scaling.type"), other, "none, linear, yarn or longrope"));
        }
    }
    if scaled.freq_base <= 0.0 {
        return Err(bad(&keys.key("rope.freq_base"), scaled.freq_base, "a positive number"));
    }
    // As in llama.cpp, the type `none` turns scaling off in layers of full attention only.
    let full = if kind == "none" { RopeParams { freq_scale: 1.0, ..scaled } } else { scaled };
    Ok((full, scaled, kind == "longrope"))
}
