//! phi3: q, k, v in one matrix, gate and up in one matrix, rotary factors for long or short contexts.

use super::{Arch, Build, TensorList};
use crate::error::EngineError;
use crate::hparams::{Hparams, Keys};
use crate::layers::{Decoder, decoder, decoder_tensors};
use crate::op::RopeMode;

/// `general.architecture = phi3`
pub const PHI3: Arch = Arch { name: "phi3", hparams, tensors, build };

fn hparams(keys: &Keys<'_>) -> Result<Hparams, EngineError> {
    let mut hp = Hparams::read(keys, "attention.layer_norm_rms_epsilon")?;
    hp.rope_mode = RopeMode::Neox;
    // The file's sliding window is left unused, as in llama.cpp: converters wrote it wrongly.
    Ok(hp)
}

/// Gate and up are one matrix.
const DECODER: Decoder<'static> = Decoder { fused_up: true, ..Decoder::COMMON };

fn tensors(hp: &Hparams) -> TensorList {
    let mut list = TensorList::default();
    decoder_tensors(hp, &mut list, &DECODER);
    list.global_opt("rope_factors_long.weight", &[hp.rope.n_dims / 2]);
    list.global_opt("rope_factors_short.weight", &[hp.rope.n_dims / 2]);
    list
}

fn build(b: &mut Build<'_>) {
    decoder(b, &DECODER);
}
