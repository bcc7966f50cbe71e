//! The decoder that most language models share: pre-norm attention and feed-forward parts on a residual stream.
//!
//! What differs between relatives is read off the hyperparameters and off which optional tensors the file has (biases,
//! per-head norms of q and k, norms after the parts).

use alloc::vec::Vec;

use super::ffn::{FfnWeights, Gating, gated_ffn, moe_ffn};
use crate::graph::Output;
use crate::hparams::Hparams;
use crate::models::{Build, TensorList};
use crate::op::{AttentionParams, Glu};
use crate::tensor::{Input, TensorId};

/// Adds the tensors of the decoder: embeddings, norms, attention, and the feed-forward part or the experts.
///
/// `ffn_norm` is the file's name for the norm before the feed-forward part.
pub fn decoder_tensors(hp: &Hparams, list: &mut TensorList, ffn_norm: &str) {
    let n_embd = hp.n_embd;
    list.global("token_embd.weight", &[hp.n_vocab, n_embd]);
    list.global("output_norm.weight", &[n_embd]);
    list.global_opt("output.weight", &[hp.n_vocab, n_embd]);
    for (il, layer) in hp.layers.iter().enumerate() {
        let (q, k, v) =
            (layer.n_head * hp.head_dim_k, layer.n_head_kv * hp.head_dim_k, layer.n_head_kv * hp.head_dim_v);
        list.layer(il, "attn_norm.weight", &[n_embd]);
        for (name, rows) in [("attn_q", q), ("attn_k", k), ("attn_v", v)] {
            list.layer(il, &alloc::format!("{name}.weight"), &[rows, n_embd]);
            list.layer_opt(il, &alloc::format!("{name}.bias"), &[rows]);
        }
        list.layer(il, "attn_output.weight", &[n_embd, layer.n_head * hp.head_dim_v]);
        list.layer_opt(il, "attn_output.bias", &[n_embd]);
        list.layer(il, ffn_norm, &[n_embd]);
        match hp.moe {
            Some(moe) => {
                list.layer(il, "ffn_gate_inp.weight", &[moe.n_expert, n_embd]);
                for (name, rows, cols) in [
                    ("gate", moe.n_ff_exp, n_embd),
                    ("up", moe.n_ff_exp, n_embd),
                    ("down", n_embd, moe.n_ff_exp),
                ] {
                    list.layer(il, &alloc::format!("ffn_{name}_exps.weight"), &[moe.n_expert, rows, cols]);
                }
                // Whoever gives the shared expert a width must bring it, whatever the architecture.
                if moe.n_ff_shexp > 0 {
                    list.layer(il, "ffn_gate_inp_shexp.weight", &[1, n_embd]);
                    list.layer(il, "ffn_gate_shexp.weight", &[moe.n_ff_shexp, n_embd]);
                    list.layer(il, "ffn_up_shexp.weight", &[moe.n_ff_shexp, n_embd]);
                    list.layer(il, "ffn_down_shexp.weight", &[n_embd, moe.n_ff_shexp]);
                }
            }
            None => {
                for (name, rows, cols) in
                    [("gate", layer.n_ff, n_embd), ("up", layer.n_ff, n_embd), ("down", n_embd, layer.n_ff)]
                {
                    list.layer(il, &alloc::format!("ffn_{name}.weight"), &[rows, cols]);
                    list.layer_opt(il, &alloc::format!("ffn_{name}.bias"), &[rows]);
                }
            }
        }
    }
}

/// What an architecture chooses about its decoder.
pub struct Decoder<'a> {
    /// The gate's activation.
    pub act: Glu,
    /// How experts are weighted, for mixtures.
    pub gating: Gating,
    /// The file's name for the norm before the feed-forward part.
    pub ffn_norm: &'a str,
    /// Whether q, k and v are one matrix, and gate and up are.
    pub fused: bool,
}

impl Decoder<'_> {
    /// The most common choices: SiLU gates, separate matrices, expert weights normalised.
    pub const COMMON: Decoder<'static> = Decoder {
        act: Glu::Plain(crate::op::Unary::Silu),
        gating: Gating { softmax_after: false, normalise: true },
        ffn_norm: "ffn_norm.weight",
        fused: false,
    };
}

/// Projections of the normed stream: (q, k, v) as [n, heads · head_dim].
fn qkv(b: &mut Build<'_>, il: usize, x: TensorId, fused: bool) -> (TensorId, TensorId, TensorId) {
    let layer = &b.hp.layers[il];
    let rows = [
        layer.n_head * b.hp.head_dim_k,
        layer.n_head_kv * b.hp.head_dim_k,
        layer.n_head_kv * b.hp.head_dim_v,
    ];
    let parts: Vec<_> = if fused {
        let first = [0, rows[0], rows[0] + rows[1]];
        (0..3).map(|i| (b.layer_rows(il, "attn_qkv.weight", first[i], rows[i]), None)).collect()
    } else {
        ["attn_q", "attn_k", "attn_v"]
            .iter()
            .map(|name| {
                let w = b.layer(il, &alloc::format!("{name}.weight"));
                (w, b.layer_opt(il, &alloc::format!("{name}.bias")))
            })
            .collect()
    };
    let out = b.g.matmul_many(x, &parts);
    (out[0], out[1], out[2])
}

/// Frequency factors of the rotary embedding, if the file has any: `rope_freqs`, or long/short by context size.
fn rope_factors(b: &mut Build<'_>) -> Option<TensorId> {
    if let Some(freqs) = b.weight_opt("rope_freqs.weight") {
        return Some(freqs);
    }
    let long = b.n_ctx > b.hp.rope.n_ctx_orig as usize;
    b.weight_opt(if long { "rope_factors_long.weight" } else { "rope_factors_short.weight" })
}

/// Builds the graph of one step of a decoder.
pub fn decoder(b: &mut Build<'_>, d: &Decoder<'_>) {
    let hp = b.hp;
    let (n, n_outputs) = (b.shape.n_tokens, b.shape.n_outputs);
    let tokens = b.g.input(Input::Tokens, n);
    let positions = b.g.input(Input::Positions, n);
    let table = b.weight("token_embd.weight");
    let mut x = b.g.get_rows(table, tokens);
    if hp.embd_scale != 1.0 {
        x = b.g.scale(x, hp.embd_scale);
        b.g.tap("inp_scaled", None, x);
    }
    let factors = rope_factors(b);
    let rope_full = b.g.rope_table(positions, factors, hp.rope);
    let rope_swa = match hp.rope_swa {
        Some(params) => b.g.rope_table(positions, factors, params),
        None => rope_full,
    };
    for (il, layer) in hp.layers.iter().enumerate() {
        let norm = b.layer(il, "attn_norm.weight");
        let h = b.g.rms_norm(x, Some(norm), hp.norm_eps);
        let (q, k, v) = qkv(b, il, h, d.fused);
        let rope = if layer.window > 0 { rope_swa } else { rope_full };
        let rotated = |b: &mut Build<'_>, x: TensorId, heads: usize, norm: &str| {
            let mut x = b.g.reshape(x, &[n, heads, hp.head_dim_k]);
            if let Some(w) = b.layer_opt(il, norm) {
                x = b.g.rms_norm(x, Some(w), hp.norm_eps);
            }
            let x = b.g.rope(x, rope, hp.rope_mode);
            b.g.reshape(x, &[n, heads * hp.head_dim_k])
        };
        let q = rotated(b, q, layer.n_head, "attn_q_norm.weight");
        let k = rotated(b, k, layer.n_head_kv, "attn_k_norm.weight");
        b.g.kv_store(k, v, il);
        let sinks = b.layer_opt(il, "attn_sinks.weight");
        let params = AttentionParams {
            il,
            n_head: layer.n_head,
            n_head_kv: layer.n_head_kv,
            head_dim_k: hp.head_dim_k,
            head_dim_v: hp.head_dim_v,
            scale: hp.attn_scale,
            softcap: hp.attn_softcap,
            window: layer.window,
            causal: hp.causal,
        };
        let last = il + 1 == hp.n_layer();
        if last && n_outputs == 0 {
            return; // only the cache is wanted
        }
        let mut h = b.g.attention(q, sinks, params);
        if last && n_outputs < n {
            // Everything after the last attention is row by row: only the wanted rows go on.
            let rows = b.g.input(Input::OutputRows, n_outputs);
            h = b.g.get_rows(h, rows);
            x = b.g.get_rows(x, rows);
        }
        let wo = b.layer(il, "attn_output.weight");
        let wo_bias = b.layer_opt(il, "attn_output.bias");
        let mut h = b.g.matmul(h, wo, wo_bias);
        // Where the norm before the feed-forward part goes by this name, there is none after the attention.
        if d.ffn_norm != "post_attention_norm.weight"
            && let Some(w) = b.layer_opt(il, "post_attention_norm.weight")
        {
            h = b.g.rms_norm(h, Some(w), hp.norm_eps);
        }
        x = b.g.add(h, x);
        let norm = b.layer(il, d.ffn_norm);
        let h = b.g.rms_norm(x, Some(norm), hp.norm_eps);
        let mut h = if hp.moe.is_some() {
            moe_ffn(b, il, h, d.act, d.gating)
        } else {
            let weights = if d.fused { FfnWeights::FusedUp } else { FfnWeights::Separate };
            gated_ffn(b, il, h, d.act, weights, "")
        };
        if let Some(w) = b.layer_opt(il, "post_ffw_norm.weight") {
            h = b.g.rms_norm(h, Some(w), hp.norm_eps);
        }
        x = b.g.add(h, x);
        b.g.tap("l_out", Some(il), x);
    }
    let norm = b.weight("output_norm.weight");
    let x = b.g.rms_norm(x, Some(norm), hp.norm_eps);
    b.g.tap("result_norm", None, x);
    if b.shape.embeddings {
        b.g.output(Output::Embeddings, x);
        return;
    }
    // A file without an output matrix ties it to the embeddings.
    let head = match b.weight_opt("output.weight") {
        Some(w) => w,
        None => table,
    };
    let mut logits = b.g.matmul(x, head, None);
    if hp.final_softcap != 0.0 {
        logits = b.g.softcap(logits, hp.final_softcap);
    }
    if b.shape.greedy {
        let tokens = b.g.argmax(logits);
        b.g.output(Output::Tokens, tokens);
        return;
    }
    b.g.output(Output::Logits, logits);
}
