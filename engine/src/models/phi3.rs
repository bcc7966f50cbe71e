//! phi3: q, k, v in one matrix, gate and up in one matrix, rotary factors for long or short contexts.

use super::{Arch, Build, TensorList};
use crate::error::EngineError;
use crate::hparams::{Hparams, Keys};
use crate::layers::{Decoder, decoder};
use crate::op::RopeMode;

/// `general.architecture = phi3`
pub const PHI3: Arch = Arch { name: "phi3", hparams, tensors, build };

fn hparams(keys: &Keys<'_>) -> Result<Hparams, EngineError> {
    let mut hp = Hparams::read(keys, "attention.layer_norm_rms_epsilon")?;
    hp.rope_mode = RopeMode::Neox;
    // The file's sliding window is left unused, as in llama.cpp: converters wrote it wrongly.
    Ok(hp)
}

fn tensors(hp: &Hparams) -> TensorList {
    let n_embd = hp.n_embd;
    let mut list = TensorList::default();
    list.global("token_embd.weight", &[hp.n_vocab, n_embd]);
    list.global("output_norm.weight", &[n_embd]);
    list.global_opt("output.weight", &[hp.n_vocab, n_embd]);
    list.global_opt("rope_factors_long.weight", &[hp.rope.n_dims / 2]);
    list.global_opt("rope_factors_short.weight", &[hp.rope.n_dims / 2]);
    for (il, layer) in hp.layers.iter().enumerate() {
        let qkv = (layer.n_head + layer.n_head_kv) * hp.head_dim_k + layer.n_head_kv * hp.head_dim_v;
        list.layer(il, "attn_norm.weight", &[n_embd]);
        list.layer(il, "attn_qkv.weight", &[qkv, n_embd]);
        list.layer(il, "attn_output.weight", &[n_embd, layer.n_head * hp.head_dim_v]);
        list.layer(il, "ffn_norm.weight", &[n_embd]);
        list.layer(il, "ffn_up.weight", &[2 * layer.n_ff, n_embd]);
        list.layer(il, "ffn_down.weight", &[n_embd, layer.n_ff]);
    }
    list
}

fn build(b: &mut Build<'_>) {
    decoder(b, &Decoder { fused: true, ..Decoder::COMMON });
}
