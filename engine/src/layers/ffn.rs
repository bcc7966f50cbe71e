//! Feed-forward parts: gated, and mixtures of gated experts.

use alloc::format;

use crate::models::{Build, Matrix};
use crate::op::{Glu, MoeRouteParams};
use crate::tensor::TensorId;

/// Where the matrices of a gated feed-forward part lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FfnWeights {
    /// `ffn_gate`, `ffn_up`, `ffn_down`.
    Separate,
    /// `ffn_up` holds gate and up, one after the other; `ffn_down`.
    FusedUp,
}

/// How a router's logits become weights; see [`MoeRouteParams`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gating {
    /// Softmax over the chosen logits only.
    pub softmax_after: bool,
    /// Divide by the sum.
    pub normalise: bool,
}

/// `down(f(gate(x)) · up(x))`; `suffix` tells a variant of the names (`_shexp`).
pub fn gated_ffn(
    b: &mut Build<'_>,
    il: usize,
    x: TensorId,
    act: Glu,
    weights: FfnWeights,
    suffix: &str,
) -> TensorId {
    let up_name = format!("ffn_up{suffix}");
    let (gate, up) = match weights {
        FfnWeights::Separate => {
            (b.layer_matrix(il, &format!("ffn_gate{suffix}")), b.layer_matrix(il, &up_name))
        }
        FfnWeights::FusedUp => {
            let n_ff = b.hp.layers[il].n_ff;
            let scale = b.layer_scale(il, &up_name);
            let mut half =
                |first| Matrix { weight: b.layer_rows(il, "ffn_up.weight", first, n_ff), bias: None, scale };
            (half(0), half(n_ff))
        }
    };
    let parts = b.products(x, &[gate, up]);
    let h = b.g.glu(act, parts[0], parts[1]);
    let down = b.layer_matrix(il, &format!("ffn_down{suffix}"));
    b.products(h, &[down])[0]
}

/// Products of `x` [n, n_used or 1, k] with the matrices `name` of the experts `ids` [n, n_used]: with biases, or with the
/// factors that NVFP4 files have of each expert.
fn expert_products(b: &mut Build<'_>, il: usize, name: &str, x: TensorId, ids: TensorId) -> TensorId {
    let weight = b.layer(il, &format!("ffn_{name}_exps.weight"));
    let bias = b.layer_opt(il, &format!("ffn_{name}_exps.bias"));
    let y = b.g.matmul_id(x, weight, bias, ids);
    match b.layer_opt(il, &format!("ffn_{name}_exps.scale")) {
        Some(factors) => b.g.scale_experts(y, factors, ids),
        None => y,
    }
}

/// Mixture of gated experts, plus the shared expert where the model has one.
pub fn moe_ffn(b: &mut Build<'_>, il: usize, x: TensorId, act: Glu, gating: Gating) -> TensorId {
    let moe = b.hp.moe.expect("a mixture has expert hyperparameters");
    let (n, n_embd) = (b.g.shape(x).rows(), b.hp.n_embd);
    let router = b.layer(il, "ffn_gate_inp.weight");
    let router_bias = b.layer_opt(il, "ffn_gate_inp.bias");
    let logits = b.g.matmul(x, router, router_bias);
    let params = MoeRouteParams {
        n_used: moe.n_used,
        softmax_after: gating.softmax_after,
        normalise: gating.normalise,
        scale: 1.0,
    };
    let (ids, weights) = b.g.moe_route(logits, params);
    let x3 = b.g.reshape(x, &[n, 1, n_embd]);
    let gate = expert_products(b, il, "gate", x3, ids);
    let up = expert_products(b, il, "up", x3, ids);
    let h = b.g.glu(act, gate, up);
    let down = expert_products(b, il, "down", h, ids);
    let out = b.g.moe_combine(down, weights);
    if moe.n_ff_shexp == 0 {
        return out;
    }
    let shared = gated_ffn(b, il, x, act, FfnWeights::Separate, "_shexp");
    let shared = match b.layer_opt(il, "ffn_gate_inp_shexp.weight") {
        Some(w) => {
            let gate = b.g.matmul(x, w, None);
            b.g.row_gate(shared, gate)
        }
        None => shared,
    };
    b.g.add(out, shared)
}
