//! llama: Llama 2 and 3 (rope scaling, frequency factors), Mistral, SmolLM2, and the mixtures of that family (Mixtral).

use super::{Arch, Build, TensorList};
use crate::error::EngineError;
use crate::hparams::{Hparams, Keys};
use crate::layers::{Decoder, decoder, decoder_tensors};

/// `general.architecture = llama`
pub const LLAMA: Arch = Arch { name: "llama", hparams, tensors, build };

fn hparams(keys: &Keys<'_>) -> Result<Hparams, EngineError> {
    let mut hp = Hparams::read(keys, "attention.layer_norm_rms_epsilon")?;
    hp.read_moe(keys)?;
    let n_ff = hp.layers[0].n_ff;
    if let Some(moe) = &mut hp.moe {
        // An expert of this family has the dense width, whatever else the file says.
        moe.n_ff_exp = n_ff;
    }
    Ok(hp)
}

fn tensors(hp: &Hparams) -> TensorList {
    let mut list = TensorList::default();
    decoder_tensors(hp, &mut list, &Decoder::COMMON);
    let half = [hp.rope.n_dims / 2];
    if hp.longrope {
        list.global_opt("rope_factors_long.weight", &half);
        list.global_opt("rope_factors_short.weight", &half);
    } else {
        list.global_opt("rope_freqs.weight", &half);
    }
    list
}

fn build(b: &mut Build<'_>) {
    decoder(b, &Decoder::COMMON);
}
