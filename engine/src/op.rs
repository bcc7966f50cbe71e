//! The operations of a graph, with typed fields.
//!
//! `n` is the number of tokens in the step throughout. The `reference` backend defines each op's meaning.

use crate::tensor::TensorId;

/// One-argument functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Unary {
    /// x · sigmoid(x)
    Silu,
    /// The tanh form: 0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))
    Gelu,
    /// The exact form: 0.5·x·(1 + erf(x/√2))
    GeluErf,
    /// max(x, 0)
    Relu,
    /// max(x, 0)²
    ReluSqr,
    /// tanh(x)
    Tanh,
    /// 1 / (1 + e⁻ˣ)
    Sigmoid,
}

/// Gated activations: `f(gate) · up`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Glu {
    /// `unary(gate) · up`
    Plain(Unary),
    /// gpt-oss: gate clamped to ≤ limit, up to ±limit; `gate · sigmoid(alpha·gate) · (up + 1)`
    SwigluOai {
        /// Slope inside the sigmoid.
        alpha: f32,
        /// Clamp.
        limit: f32,
    },
}

/// Two-argument elementwise functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Binary {
    /// a + b
    Add,
    /// a · b
    Mul,
}

/// How [`Op::Rope`] pairs elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RopeMode {
    /// (x₂ᵢ, x₂ᵢ₊₁)
    Norm,
    /// (xᵢ, xᵢ₊ₙ⸝₂)
    Neox,
}

/// Rotary embedding's angles; YaRN as in its paper and llama.cpp's `rope_yarn`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeParams {
    /// Rotated elements per head; even.
    pub n_dims: usize,
    /// Base of the geometric frequencies.
    pub freq_base: f32,
    /// Position interpolation factor (1 / linear scaling).
    pub freq_scale: f32,
    /// YaRN's mix of extrapolation; 0 turns YaRN off.
    pub ext_factor: f32,
    /// Factor on cos and sin: YaRN's magnitude is already in it, the op applies no other.
    pub attn_factor: f32,
    /// YaRN's ramp.
    pub beta_fast: f32,
    /// YaRN's ramp.
    pub beta_slow: f32,
    /// Context length the model was trained with.
    pub n_ctx_orig: u32,
}

impl RopeParams {
    /// YaRN's factor on cos and sin where frequencies are scaled by `freq_scale`.
    pub fn yarn_magnitude(freq_scale: f32) -> f32 {
        1.0 - 0.1 * libm::logf(freq_scale)
    }

    /// The same with other interpolation, YaRN's magnitude following it.
    pub fn with_freq_scale(self, freq_scale: f32) -> RopeParams {
        let attn_factor = if self.ext_factor == 0.0 {
            self.attn_factor
        } else {
            self.attn_factor * Self::yarn_magnitude(freq_scale) / Self::yarn_magnitude(self.freq_scale)
        };
        RopeParams { freq_scale, attn_factor, ..self }
    }
}

/// Which of a layer's two caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvPart {
    /// Keys.
    K,
    /// Values.
    V,
}

/// Attention over the KV cache.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionParams {
    /// Layer whose cache is read.
    pub il: usize,
    /// Query heads.
    pub n_head: usize,
    /// Key/value heads; divides `n_head`.
    pub n_head_kv: usize,
    /// Elements per query/key head.
    pub head_dim_k: usize,
    /// Elements per value head.
    pub head_dim_v: usize,
    /// Factor on q·k.
    pub scale: f32,
    /// `cap · tanh(x / cap)` on the scores if not 0.
    pub softcap: f32,
    /// A query sees only the last `window` positions, itself included; 0 = all.
    pub window: u32,
    /// Whether a query sees only positions up to its own.
    pub causal: bool,
}

/// How a router's logits become expert weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MoeRouteParams {
    /// Experts per token.
    pub n_used: usize,
    /// Softmax over the chosen logits instead of over all before choosing.
    pub softmax_after: bool,
    /// Divide the chosen weights by their sum.
    pub normalise: bool,
    /// Factor on the weights.
    pub scale: f32,
}

/// An operation. Inputs are fields; outputs are the node's.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// Rows of `table` [rows, cols] by `ids` `[m]` → f32 [m, cols].
    GetRows {
        /// Any format.
        table: TensorId,
        /// i32.
        ids: TensorId,
    },
    /// `x / sqrt(mean(x²) + eps) · weight` over the innermost extent.
    RmsNorm {
        /// f32 [.., cols]
        x: TensorId,
        /// f32 `[cols]`
        weight: Option<TensorId>,
        /// Added to the mean square.
        eps: f32,
    },
    /// `(x − mean) / sqrt(var + eps) · weight + bias` over the innermost extent.
    LayerNorm {
        /// f32 [.., cols]
        x: TensorId,
        /// f32 `[cols]`
        weight: Option<TensorId>,
        /// f32 `[cols]`
        bias: Option<TensorId>,
        /// Added to the variance.
        eps: f32,
    },
    /// `x · wᵀ (+ bias)` for one or more weights that share `x`: one output [n, rows of w] each.
    ///
    /// With F16 (BF16) weights, `x` is rounded to f16 (bf16) first, as in ggml: it is what tensor cores multiply. With
    /// quantised weights a backend may quantise `x` in groups of 32 ([`quant::ActGroup`]).
    MatMul {
        /// f32 [n, k]
        x: TensorId,
        /// Any float or block format, each [rows, k].
        weights: alloc::vec::Vec<TensorId>,
        /// f32 `[rows]`, one entry per weight.
        biases: alloc::vec::Vec<Option<TensorId>>,
    },
    /// Per-token expert matrices: `out[t, j] = w[ids[t, j]] · x[t, j or 0] (+ bias[ids[t, j]])`.
    MatMulId {
        /// f32 [n, n_used or 1, k]
        x: TensorId,
        /// [n_expert, rows, k]
        weight: TensorId,
        /// f32 [n_expert, rows]
        bias: Option<TensorId>,
        /// i32 [n, n_used]
        ids: TensorId,
    },
    /// cos and sin of every rotated pair: f32 [n, n_dims] as (cos, sin) pairs, computed once a step.
    RopeTable {
        /// i32 `[n]`
        positions: TensorId,
        /// Divisors of the frequencies, f32 [n_dims / 2].
        freq_factors: Option<TensorId>,
        /// Angles.
        params: RopeParams,
    },
    /// Rotate the first `n_dims` elements of every head.
    Rope {
        /// f32 [n, heads, head_dim]
        x: TensorId,
        /// From [`Op::RopeTable`].
        table: TensorId,
        /// Pairing.
        mode: RopeMode,
    },
    /// Walsh's and Hadamard's orthonormal matrix times every `width` neighbours; it is its own inverse.
    Hadamard {
        /// f32 [.., cols]
        x: TensorId,
        /// A power of two that divides the innermost extent.
        width: usize,
    },
    /// Write the step's keys and values of layer `il` into the cache; no output.
    KvStore {
        /// f32 [n, n_head_kv · head_dim_k]
        k: TensorId,
        /// f32 [n, n_head_kv · head_dim_v]
        v: TensorId,
        /// Layer.
        il: usize,
    },
    /// Softmax attention of the step's queries over the cache → f32 [n, n_head · head_dim_v].
    Attention {
        /// f32 [n, n_head · head_dim_k]
        q: TensorId,
        /// Attention sinks: one extra logit per head without a value, f32 `[n_head]`.
        sinks: Option<TensorId>,
        /// The rest.
        params: AttentionParams,
    },
    /// Elementwise; `b` has `a`'s shape or is one row repeated.
    Binary {
        /// Function.
        kind: Binary,
        /// f32
        a: TensorId,
        /// f32
        b: TensorId,
    },
    /// Elementwise.
    Unary {
        /// Function.
        kind: Unary,
        /// f32
        x: TensorId,
    },
    /// `scale · x`
    Scale {
        /// f32
        x: TensorId,
        /// Factor.
        scale: f32,
    },
    /// `cap · tanh(x / cap)`
    Softcap {
        /// f32
        x: TensorId,
        /// Cap.
        cap: f32,
    },
    /// `f(gate) · up`
    Glu {
        /// Function.
        kind: Glu,
        /// f32
        gate: TensorId,
        /// f32, same shape
        up: TensorId,
    },
    /// Router: logits [n, n_expert] → (ids i32 [n, n_used], weights f32 [n, n_used]), best first, ties to the lower id.
    MoeRoute {
        /// f32 [n, n_expert]
        logits: TensorId,
        /// The rest.
        params: MoeRouteParams,
    },
    /// `Σⱼ weights[t, j] · x[t, j]` in order of j → f32 [n, cols].
    MoeCombine {
        /// f32 [n, n_used, cols]
        x: TensorId,
        /// f32 [n, n_used]
        weights: TensorId,
    },
    /// `factors[ids[t, j]] · x[t, j]`: what a file multiplies the products of each expert by.
    ScaleExperts {
        /// f32 [n, n_used, cols]
        x: TensorId,
        /// f32 `[n_expert]`
        factors: TensorId,
        /// i32 [n, n_used]
        ids: TensorId,
    },
    /// Index of each row's largest element, the first of equal ones → i32 `[rows]`. NaN is below all.
    Argmax {
        /// f32 [.., cols]
        x: TensorId,
    },
    /// `sigmoid(gate[t]) · x[t]`: the shared expert's gate.
    RowGate {
        /// f32 [n, cols]
        x: TensorId,
        /// f32 [n, 1]
        gate: TensorId,
    },
}

impl Op {
    /// Calls `f` for every tensor read.
    pub fn for_each_input(&self, mut f: impl FnMut(TensorId)) {
        let opt = |t: &Option<TensorId>, f: &mut dyn FnMut(TensorId)| {
            if let Some(t) = t {
                f(*t);
            }
        };
        match self {
            Op::GetRows { table, ids } => [*table, *ids].into_iter().for_each(f),
            Op::RmsNorm { x, weight, .. } => {
                f(*x);
                opt(weight, &mut f);
            }
            Op::LayerNorm { x, weight, bias, .. } => {
                f(*x);
                opt(weight, &mut f);
                opt(bias, &mut f);
            }
            Op::MatMul { x, weights, biases } => {
                f(*x);
                weights.iter().for_each(|w| f(*w));
                biases.iter().for_each(|b| opt(b, &mut f));
            }
            Op::MatMulId { x, weight, bias, ids } => {
                [*x, *weight, *ids].into_iter().for_each(&mut f);
                opt(bias, &mut f);
            }
            Op::RopeTable { positions, freq_factors, .. } => {
                f(*positions);
                opt(freq_factors, &mut f);
            }
            Op::Rope { x, table, .. } => [*x, *table].into_iter().for_each(f),
            Op::KvStore { k, v, .. } => [*k, *v].into_iter().for_each(f),
            Op::Attention { q, sinks, .. } => {
                f(*q);
                opt(sinks, &mut f);
            }
            Op::Binary { a, b, .. } => [*a, *b].into_iter().for_each(f),
            Op::Hadamard { x, .. }
            | Op::Unary { x, .. }
            | Op::Scale { x, .. }
            | Op::Softcap { x, .. }
            | Op::Argmax { x } => f(*x),
            Op::Glu { gate, up, .. } => [*gate, *up].into_iter().for_each(f),
            Op::MoeRoute { logits, .. } => f(*logits),
            Op::MoeCombine { x, weights } => [*x, *weights].into_iter().for_each(f),
            Op::ScaleExperts { x, factors, ids } => [*x, *factors, *ids].into_iter().for_each(f),
            Op::RowGate { x, gate } => [*x, *gate].into_iter().for_each(f),
        }
    }

    /// The same for every tensor read, to put another in its place.
    pub fn for_each_input_mut(&mut self, mut f: impl FnMut(&mut TensorId)) {
        match self {
            Op::GetRows { table: a, ids: b }
            | Op::Rope { x: a, table: b, .. }
            | Op::KvStore { k: a, v: b, .. }
            | Op::Binary { a, b, .. }
            | Op::Glu { gate: a, up: b, .. }
            | Op::MoeCombine { x: a, weights: b }
            | Op::RowGate { x: a, gate: b } => [a, b].into_iter().for_each(f),
            Op::ScaleExperts { x, factors, ids } => [x, factors, ids].into_iter().for_each(f),
            Op::RmsNorm { x, weight, .. } => [x].into_iter().chain(weight).for_each(f),
            Op::LayerNorm { x, weight, bias, .. } => [x].into_iter().chain(weight).chain(bias).for_each(f),
            Op::MatMul { x, weights, biases } => {
                [x].into_iter().chain(weights).chain(biases.iter_mut().flatten()).for_each(f);
            }
            Op::MatMulId { x, weight, bias, ids } => {
                [x, weight, ids].into_iter().chain(bias).for_each(f);
            }
            Op::RopeTable { positions, freq_factors, .. } => {
                [positions].into_iter().chain(freq_factors).for_each(f);
            }
            Op::Attention { q, sinks, .. } => [q].into_iter().chain(sinks).for_each(f),
            Op::Hadamard { x, .. }
            | Op::Unary { x, .. }
            | Op::Scale { x, .. }
            | Op::Softcap { x, .. }
            | Op::Argmax { x } => f(x),
            Op::MoeRoute { logits, .. } => f(logits),
        }
    }

    /// Name of the kind, for messages and traces.
    pub fn name(&self) -> &'static str {
        match self {
            Op::GetRows { .. } => "get_rows",
            Op::RmsNorm { .. } => "rms_norm",
            Op::LayerNorm { .. } => "layer_norm",
            Op::MatMul { .. } => "matmul",
            Op::MatMulId { .. } => "matmul_id",
            Op::RopeTable { .. } => "rope_table",
            Op::Rope { .. } => "rope",
            Op::Hadamard { .. } => "hadamard",
            Op::KvStore { .. } => "kv_store",
            Op::Attention { .. } => "attention",
            Op::Binary { .. } => "binary",
            Op::Unary { .. } => "unary",
            Op::Scale { .. } => "scale",
            Op::Softcap { .. } => "softcap",
            Op::Glu { .. } => "glu",
            Op::MoeRoute { .. } => "moe_route",
            Op::MoeCombine { .. } => "moe_combine",
            Op::ScaleExperts { .. } => "scale_experts",
            Op::Argmax { .. } => "argmax",
            Op::RowGate { .. } => "row_gate",
        }
    }

    /// The input whose memory the (only) output may take over if nobody else needs it: ops that read element `i`
    /// only to write element `i` (or a row only to write the same row).
    pub fn in_place_input(&self) -> Option<TensorId> {
        match self {
            Op::RmsNorm { x, .. }
            | Op::LayerNorm { x, .. }
            | Op::Rope { x, .. }
            | Op::Hadamard { x, .. }
            | Op::Unary { x, .. }
            | Op::Scale { x, .. }
            | Op::Softcap { x, .. }
            | Op::ScaleExperts { x, .. }
            | Op::RowGate { x, .. } => Some(*x),
            Op::Binary { a, .. } => Some(*a),
            Op::Glu { gate, .. } => Some(*gate),
            _ => None,
        }
    }
}
