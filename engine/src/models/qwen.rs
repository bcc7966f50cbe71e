//! qwen2 and qwen3, dense and mixtures. qwen2 has biases on q, k, v; qwen3 norms q and k per head; qwen2moe adds a gated
//! shared expert and leaves the expert weights unnormalised.

use super::{Arch, Build, TensorList};
use crate::error::EngineError;
use crate::hparams::{Hparams, Keys};
use crate::layers::{Decoder, Gating, decoder, decoder_tensors};
use crate::op::RopeMode;

/// `general.architecture = qwen2`
pub const QWEN2: Arch = Arch { name: "qwen2", hparams, tensors, build };
/// `general.architecture = qwen2moe`
pub const QWEN2MOE: Arch =
    Arch { name: "qwen2moe", hparams: hparams_qwen2moe, tensors, build: build_qwen2moe };
/// `general.architecture = qwen3`
pub const QWEN3: Arch = Arch { name: "qwen3", hparams, tensors: tensors_qwen3, build };
/// `general.architecture = qwen3moe`
pub const QWEN3MOE: Arch =
    Arch { name: "qwen3moe", hparams: hparams_qwen3moe, tensors: tensors_qwen3, build };

fn hparams(keys: &Keys<'_>) -> Result<Hparams, EngineError> {
    let mut hp = Hparams::read(keys, "attention.layer_norm_rms_epsilon")?;
    hp.rope_mode = RopeMode::Neox;
    Ok(hp)
}

fn hparams_qwen3moe(keys: &Keys<'_>) -> Result<Hparams, EngineError> {
    let mut hp = hparams(keys)?;
    hp.require_moe(keys)?;
    Ok(hp)
}

fn hparams_qwen2moe(keys: &Keys<'_>) -> Result<Hparams, EngineError> {
    let mut hp = hparams(keys)?;
    let mut moe = hp.require_moe(keys)?;
    // Old files carry only the dense width: it is the shared expert's.
    moe.n_ff_shexp = match keys.opt_u32("expert_shared_feed_forward_length")? {
        Some(n) if n > 0 => n as usize,
        _ => hp.layers[0].n_ff,
    };
    hp.moe = Some(moe);
    Ok(hp)
}

fn tensors(hp: &Hparams) -> TensorList {
    let mut list = TensorList::default();
    decoder_tensors(hp, &mut list, &Decoder::COMMON);
    list.global_opt("output.bias", &[hp.n_vocab]);
    list
}

fn tensors_qwen3(hp: &Hparams) -> TensorList {
    let mut list = tensors(hp);
    for il in 0..hp.n_layer() {
        list.layer(il, "attn_q_norm.weight", &[hp.head_dim_k]);
        list.layer(il, "attn_k_norm.weight", &[hp.head_dim_k]);
    }
    // Rerankers' head.
    list.unused.push("cls.output.weight");
    list
}

fn build(b: &mut Build<'_>) {
    decoder(b, &Decoder::COMMON);
}

fn build_qwen2moe(b: &mut Build<'_>) {
    decoder(b, &Decoder { gating: Gating { softmax_after: false, normalise: false }, ..Decoder::COMMON });
}
