//! The decoder that most language models share: pre-norm attention and feed-forward parts on a residual stream.
//!
//! What differs between relatives is read off the hyperparameters and off which optional tensors the file has (biases,
//! per-head norms of q and k, norms after the parts).

use alloc::vec::Vec;

use super::ffn::{FfnWeights, Gating, gated_ffn, moe_ffn};
use super::rotation;
use crate::graph::Output;
use crate::hparams::Hparams;
use crate::models::{Build, Matrix, TensorList};
use crate::op::Glu;
use crate::tensor::{Input, TensorId};

/// Adds the tensors of the decoder: embeddings, norms, attention, and the feed-forward part or the experts.
pub fn decoder_tensors(hp: &Hparams, list: &mut TensorList, d: &Decoder<'_>) {
    let n_embd = hp.n_embd;
    list.global("token_embd.weight", &[hp.n_vocab, n_embd]);
    list.global("output_norm.weight", &[n_embd]);
    list.global_opt("output.weight", &[hp.n_vocab, n_embd]);
    list.global_opt("output.scale", &[1]);
    for (il, layer) in hp.layers.iter().enumerate() {
        list.layer(il, "attn_norm.weight", &[n_embd]);
        attention_tensors(hp, list, il);
        list.layer(il, d.ffn_norm, &[n_embd]);
        match hp.moe {
            Some(moe) => {
                list.layer(il, "ffn_gate_inp.weight", &[moe.n_expert, n_embd]);
                for (name, rows, cols) in [
                    ("gate", moe.n_ff_exp, n_embd),
                    ("up", moe.n_ff_exp, n_embd),
                    ("down", n_embd, moe.n_ff_exp),
                ] {
                    list.layer(il, &alloc::format!("ffn_{name}_exps.weight"), &[moe.n_expert, rows, cols]);
                    if d.scaled_experts {
                        list.layer_opt(il, &alloc::format!("ffn_{name}_exps.scale"), &[moe.n_expert, 1]);
                    }
                }
                // Whoever gives the shared expert a width must bring it, whatever the architecture.
                if moe.n_ff_shexp > 0 {
                    list.layer(il, "ffn_gate_inp_shexp.weight", &[1, n_embd]);
                    for (name, rows, cols) in [
                        ("gate", moe.n_ff_shexp, n_embd),
                        ("up", moe.n_ff_shexp, n_embd),
                        ("down", n_embd, moe.n_ff_shexp),
                    ] {
                        list.layer(il, &alloc::format!("ffn_{name}_shexp.weight"), &[rows, cols]);
                        list.layer_opt(il, &alloc::format!("ffn_{name}_shexp.scale"), &[1]);
                    }
                }
            }
            None if d.fused_up => {
                list.layer(il, "ffn_up.weight", &[2 * layer.n_ff, n_embd]);
                list.layer_opt(il, "ffn_up.scale", &[1]);
                list.layer_matrix(il, "ffn_down", n_embd, layer.n_ff);
            }
            None => {
                list.layer_matrix(il, "ffn_gate", layer.n_ff, n_embd);
                list.layer_matrix(il, "ffn_up", layer.n_ff, n_embd);
                list.layer_matrix(il, "ffn_down", n_embd, layer.n_ff);
            }
        }
    }
}

/// Rows of q, k and v in layer `il`.
fn qkv_rows(hp: &Hparams, il: usize) -> [usize; 3] {
    let layer = &hp.layers[il];
    [layer.n_head * hp.head_dim_k, layer.n_head_kv * hp.head_dim_k, layer.n_head_kv * hp.head_dim_v]
}

/// Adds the matrices of a layer's attention: q, k and v as one or each by itself, and the output's; biases may be missing.
pub fn attention_tensors(hp: &Hparams, list: &mut TensorList, il: usize) {
    let rows = qkv_rows(hp, il);
    let all = rows.iter().sum();
    list.layer_opt(il, "attn_qkv.weight", &[all, hp.n_embd]);
    list.layer_opt(il, "attn_qkv.bias", &[all, 1]);
    list.layer_opt(il, "attn_qkv.scale", &[1]);
    for (name, rows) in ["attn_q", "attn_k", "attn_v"].iter().zip(rows) {
        list.layer_unless(il, &alloc::format!("{name}.weight"), &[rows, hp.n_embd], "attn_qkv.weight");
        list.layer_matrix_extras(il, name, rows);
    }
    list.layer_matrix(il, "attn_output", hp.n_embd, hp.layers[il].n_head * hp.head_dim_v);
}

/// What an architecture chooses about its decoder.
pub struct Decoder<'a> {
    /// The gate's activation.
    pub act: Glu,
    /// How experts are weighted, for mixtures.
    pub gating: Gating,
    /// The file's name for the norm before the feed-forward part.
    pub ffn_norm: &'a str,
    /// Whether gate and up are one matrix, `ffn_up`.
    pub fused_up: bool,
    /// Whether files may have a factor on each expert's products.
    pub scaled_experts: bool,
}

impl Decoder<'_> {
    /// The most common choices: SiLU gates, separate matrices, expert weights normalised.
    pub const COMMON: Decoder<'static> = Decoder {
        act: Glu::Plain(crate::op::Unary::Silu),
        gating: Gating { softmax_after: false, normalise: true },
        ffn_norm: "ffn_norm.weight",
        fused_up: false,
        scaled_experts: true,
    };
}

/// Projections of the normed stream: (q, k, v) as [n, heads · head_dim]. Biases of a fused matrix may be fused as well.
pub fn qkv(b: &mut Build<'_>, il: usize, x: TensorId) -> (TensorId, TensorId, TensorId) {
    let mut first = 0;
    let parts = ["attn_q", "attn_k", "attn_v"].iter().zip(qkv_rows(b.hp, il));
    let parts: Vec<_> = parts
        .map(|(name, rows)| {
            let start = first;
            first += rows;
            match b.layer_rows_opt(il, "attn_qkv.weight", start, rows) {
                Some(weight) => {
                    let fused_bias = b.layer_rows_opt(il, "attn_qkv.bias", start, rows);
                    let bias = fused_bias.or_else(|| b.layer_opt(il, &alloc::format!("{name}.bias")));
                    Matrix { weight, bias, scale: b.layer_scale(il, "attn_qkv") }
                }
                None => b.layer_matrix(il, name),
            }
        })
        .collect();
    let out = b.products(x, &parts);
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

/// Rotary tables of a step: for layers of full attention, and for those with a window.
struct RopeTables {
    full: TensorId,
    window: TensorId,
}

impl RopeTables {
    fn new(b: &mut Build<'_>) -> RopeTables {
        let positions = b.g.input(Input::Positions, b.shape.n_tokens);
        let factors = rope_factors(b);
        let full = b.g.rope_table(positions, factors, b.hp.rope);
        let windowed = b.hp.layers.iter().any(|layer| layer.window > 0);
        let window = if windowed && b.hp.rope_swa != b.hp.rope {
            b.g.rope_table(positions, factors, b.hp.rope_swa)
        } else {
            full
        };
        RopeTables { full, window }
    }
}

/// The attention of layer `il` on the normed stream `h`, before the output projection. The step's keys and values go
/// to the cache; `None` where only that is wanted: in the last layer of a step without outputs.
fn attend(b: &mut Build<'_>, il: usize, h: TensorId, tables: &RopeTables) -> Option<TensorId> {
    let (hp, layer, n) = (b.hp, &b.hp.layers[il], b.shape.n_tokens);
    let (q, k, v) = qkv(b, il, h);
    let table = if layer.window > 0 { tables.window } else { tables.full };
    let rotated = |b: &mut Build<'_>, x: TensorId, heads: usize, norm: &str| {
        let mut x = b.g.reshape(x, &[n, heads, hp.head_dim_k]);
        if let Some(w) = b.layer_opt(il, norm) {
            x = b.g.rms_norm(x, Some(w), hp.norm_eps);
        }
        let x = b.g.rope(x, table, hp.rope_mode);
        b.g.reshape(x, &[n, heads * hp.head_dim_k])
    };
    let q = rotated(b, q, layer.n_head, "attn_q_norm.weight");
    let k = rotated(b, k, layer.n_head_kv, "attn_k_norm.weight");
    let (q, k, v) = (rotation::rotated_k(b, q), rotation::rotated_k(b, k), rotation::rotated_v(b, v));
    b.g.kv_store(k, v, il);
    let sinks = b.layer_opt(il, "attn_sinks.weight");
    if il + 1 == hp.n_layer() && b.shape.n_outputs == 0 {
        return None;
    }
    let out = b.g.attention(q, sinks, hp.attention(il));
    Some(rotation::rotated_v(b, out))
}

/// The feed-forward part of layer `il`, or its experts, on the normed stream `h`.
fn feed_forward(b: &mut Build<'_>, d: &Decoder<'_>, il: usize, h: TensorId) -> TensorId {
    if b.hp.moe.is_some() {
        return moe_ffn(b, il, h, d.act, d.gating);
    }
    let weights = if d.fused_up { FfnWeights::FusedUp } else { FfnWeights::Separate };
    gated_ffn(b, il, h, d.act, weights, "")
}

/// What the step is for, of the last layer's output: hidden states, logits, or the likeliest tokens.
fn output_head(b: &mut Build<'_>, x: TensorId, token_embd: TensorId) {
    let norm = b.weight("output_norm.weight");
    let x = b.g.rms_norm(x, Some(norm), b.hp.norm_eps);
    b.g.tap("result_norm", None, x);
    if b.shape.embeddings {
        b.g.output(Output::Embeddings, x);
        return;
    }
    // A file without an output matrix ties it to the embeddings.
    let head = b.weight_opt("output.weight").unwrap_or(token_embd);
    let bias = b.weight_opt("output.bias");
    let scale = b.scale_of("output");
    let mut logits = b.products(x, &[Matrix { weight: head, bias, scale }])[0];
    if b.hp.final_softcap != 0.0 {
        logits = b.g.softcap(logits, b.hp.final_softcap);
    }
    if b.shape.greedy {
        let tokens = b.g.argmax(logits);
        b.g.output(Output::Tokens, tokens);
    } else {
        b.g.output(Output::Logits, logits);
    }
}

/// Builds the graph of one step of a decoder.
pub fn decoder(b: &mut Build<'_>, d: &Decoder<'_>) {
    let hp = b.hp;
    let (n, n_outputs) = (b.shape.n_tokens, b.shape.n_outputs);
    let tokens = b.g.input(Input::Tokens, n);
    let token_embd = b.weight("token_embd.weight");
    let mut x = b.g.get_rows(token_embd, tokens);
    if hp.embd_scale != 1.0 {
        x = b.g.scale(x, hp.embd_scale);
        b.g.tap("inp_scaled", None, x);
    }
    let tables = RopeTables::new(b);
    for il in 0..hp.n_layer() {
        let norm = b.layer(il, "attn_norm.weight");
        let h = b.g.rms_norm(x, Some(norm), hp.norm_eps);
        let Some(mut h) = attend(b, il, h, &tables) else { return };
        if il + 1 == hp.n_layer() && n_outputs < n {
            // Everything after the last attention is row by row: only the wanted rows go on.
            let rows = b.g.input(Input::OutputRows, n_outputs);
            h = b.g.get_rows(h, rows);
            x = b.g.get_rows(x, rows);
        }
        let wo = b.layer_matrix(il, "attn_output");
        h = b.products(h, &[wo])[0];
        // Where the norm before the feed-forward part goes by this name, there is none after the attention.
        if d.ffn_norm != "post_attention_norm.weight"
            && let Some(w) = b.layer_opt(il, "post_attention_norm.weight")
        {
            h = b.g.rms_norm(h, Some(w), hp.norm_eps);
        }
        x = b.g.add(h, x);
        let norm = b.layer(il, d.ffn_norm);
        let h = b.g.rms_norm(x, Some(norm), hp.norm_eps);
        let mut h = feed_forward(b, d, il, h);
        if let Some(w) = b.layer_opt(il, "post_ffw_norm.weight") {
            h = b.g.rms_norm(h, Some(w), hp.norm_eps);
        }
        x = b.g.add(h, x);
        b.g.tap("l_out", Some(il), x);
    }
    output_head(b, x, token_embd);
}
