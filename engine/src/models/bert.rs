//! bert: an encoder for embeddings. Learned positions, norms after each part, no causal mask.

use super::{Arch, Build, TensorList};
use crate::error::EngineError;
use crate::graph::Output;
use crate::hparams::{Hparams, Keys};
use crate::layers::{attention_tensors, qkv};
use crate::op::Unary;
use crate::tensor::{Input, TensorId};

/// `general.architecture = bert`
pub const BERT: Arch = Arch { name: "bert", hparams, tensors, build };

fn hparams(keys: &Keys<'_>) -> Result<Hparams, EngineError> {
    let mut hp = Hparams::read(keys, "attention.layer_norm_epsilon")?;
    hp.causal = false;
    hp.n_token_types = keys.token_types()?;
    hp.n_pos = Some(hp.n_ctx_train);
    Ok(hp)
}

fn tensors(hp: &Hparams) -> TensorList {
    let n_embd = hp.n_embd;
    let mut list = TensorList::default();
    list.global("token_embd.weight", &[hp.n_vocab, n_embd]);
    list.global("position_embd.weight", &[hp.n_ctx_train, n_embd]);
    list.global_opt("token_types.weight", &[hp.n_token_types, n_embd]);
    list.global("token_embd_norm.weight", &[n_embd]);
    list.global("token_embd_norm.bias", &[n_embd]);
    for (il, layer) in hp.layers.iter().enumerate() {
        attention_tensors(hp, &mut list, il);
        for (name, rows, cols) in [("ffn_up", layer.n_ff, n_embd), ("ffn_down", n_embd, layer.n_ff)] {
            list.layer_matrix(il, name, rows, cols);
        }
        for name in ["attn_output_norm", "layer_output_norm"] {
            list.layer(il, &alloc::format!("{name}.weight"), &[n_embd]);
            list.layer(il, &alloc::format!("{name}.bias"), &[n_embd]);
        }
    }
    // Classifiers' heads.
    list.unused.extend(["cls.weight", "cls.bias", "cls.output.weight", "cls.output.bias"]);
    list
}

fn norm(b: &mut Build<'_>, il: usize, name: &str, x: TensorId) -> TensorId {
    let (w, bias) =
        (b.layer(il, &alloc::format!("{name}.weight")), b.layer(il, &alloc::format!("{name}.bias")));
    b.g.layer_norm(x, Some(w), Some(bias), b.hp.norm_eps)
}

fn build(b: &mut Build<'_>) {
    let hp = b.hp;
    let (n, n_outputs) = (b.shape.n_tokens, b.shape.n_outputs);
    let tokens = b.g.input(Input::Tokens, n);
    let positions = b.g.input(Input::Positions, n);
    let token_table = b.weight("token_embd.weight");
    let position_table = b.weight("position_embd.weight");
    let mut x = b.g.get_rows(token_table, tokens);
    if let Some(types) = b.weight_opt("token_types.weight") {
        let types_in = b.g.input(Input::TokenTypes, n);
        let t = b.g.get_rows(types, types_in);
        x = b.g.add(x, t);
    }
    let p = b.g.get_rows(position_table, positions);
    x = b.g.add(p, x);
    let (w, bias) = (b.weight("token_embd_norm.weight"), b.weight("token_embd_norm.bias"));
    x = b.g.layer_norm(x, Some(w), Some(bias), hp.norm_eps);
    for il in 0..hp.n_layer() {
        let (q, k, v) = qkv(b, il, x);
        b.g.kv_store(k, v, il);
        let mut h = b.g.attention(q, None, hp.attention(il));
        if il + 1 == hp.n_layer() && n_outputs < n {
            let rows = b.g.input(Input::OutputRows, n_outputs);
            h = b.g.get_rows(h, rows);
            x = b.g.get_rows(x, rows);
        }
        let wo = b.layer_matrix(il, "attn_output");
        let h = b.products(h, &[wo])[0];
        let h = b.g.add(h, x);
        x = norm(b, il, "attn_output_norm", h);
        let (up, down) = (b.layer_matrix(il, "ffn_up"), b.layer_matrix(il, "ffn_down"));
        let h = b.products(x, &[up])[0];
        let h = b.g.unary(Unary::Gelu, h);
        let h = b.products(h, &[down])[0];
        let h = b.g.add(h, x);
        x = norm(b, il, "layer_output_norm", h);
        b.g.tap("l_out", Some(il), x);
    }
    b.g.output(Output::Embeddings, x);
}
