//! gemma, gemma2, gemma3: embeddings scaled by √n_embd, GELU gates, output tied to the embeddings. gemma2 and gemma3
//! norm again after each part and alternate sliding-window layers; gemma2 caps scores and logits; gemma3 norms q and k
//! per head and rotates its window layers with a base of their own.

use super::{Arch, Build, TensorList};
use crate::error::EngineError;
use crate::hparams::{Hparams, Keys};
use crate::layers::{Decoder, decoder, decoder_tensors};
use crate::op::{Glu, RopeMode, Unary};

/// `general.architecture = gemma`
pub const GEMMA: Arch = Arch { name: "gemma", hparams: hparams_gemma, tensors: tensors_gemma, build };
/// `general.architecture = gemma2`
pub const GEMMA2: Arch = Arch { name: "gemma2", hparams: hparams_gemma2, tensors: tensors_gemma2, build };
/// `general.architecture = gemma3`
pub const GEMMA3: Arch = Arch { name: "gemma3", hparams: hparams_gemma3, tensors: tensors_gemma3, build };

fn hparams_gemma(keys: &Keys<'_>) -> Result<Hparams, EngineError> {
    let mut hp = Hparams::read(keys, "attention.layer_norm_rms_epsilon")?;
    hp.rope_mode = RopeMode::Neox;
    hp.embd_scale = libm::sqrtf(hp.n_embd as f32);
    Ok(hp)
}

/// The 27B models scale queries by the mean head width instead of the head dimension.
fn scale_of_27b(hp: &mut Hparams) {
    hp.attn_scale = 1.0 / libm::sqrtf((hp.n_embd / hp.layers[0].n_head) as f32);
}

fn hparams_gemma2(keys: &Keys<'_>) -> Result<Hparams, EngineError> {
    let mut hp = hparams_gemma(keys)?;
    hp.set_window(keys, keys.opt_u32("attention.sliding_window")?.unwrap_or(4096), 2)?;
    hp.attn_softcap = keys.opt_f32("attn_logit_softcapping")?.unwrap_or(50.0);
    hp.final_softcap = keys.opt_f32("final_logit_softcapping")?.unwrap_or(30.0);
    hp.read_freq_base_swa(keys, hp.rope.freq_base)?;
    if hp.n_layer() == 46 {
        scale_of_27b(&mut hp);
    }
    Ok(hp)
}

fn hparams_gemma3(keys: &Keys<'_>) -> Result<Hparams, EngineError> {
    let mut hp = hparams_gemma(keys)?;
    if let Some(window) = keys.opt_u32("attention.sliding_window")?.filter(|w| *w > 0) {
        hp.set_window(keys, window, 6)?;
        hp.rope_swa = hp.rope.with_freq_scale(1.0);
        hp.read_freq_base_swa(keys, 10000.0)?;
    }
    hp.final_softcap = keys.opt_f32("final_logit_softcapping")?.unwrap_or(0.0);
    if hp.n_layer() == 62 {
        scale_of_27b(&mut hp);
    }
    Ok(hp)
}

fn tensors_gemma(hp: &Hparams) -> TensorList {
    let mut list = TensorList::default();
    decoder_tensors(hp, &mut list, &Decoder::COMMON);
    list
}

fn tensors_gemma2(hp: &Hparams) -> TensorList {
    let mut list = tensors_gemma(hp);
    for il in 0..hp.n_layer() {
        list.layer(il, "post_attention_norm.weight", &[hp.n_embd]);
        list.layer(il, "post_ffw_norm.weight", &[hp.n_embd]);
    }
    list
}

fn tensors_gemma3(hp: &Hparams) -> TensorList {
    let mut list = tensors_gemma2(hp);
    for il in 0..hp.n_layer() {
        list.layer(il, "attn_q_norm.weight", &[hp.head_dim_k]);
        list.layer(il, "attn_k_norm.weight", &[hp.head_dim_k]);
    }
    // Projections that embedding models have behind the pooling.
    list.unused.extend(["dense_2.weight", "dense_3.weight"]);
    list
}

fn build(b: &mut Build<'_>) {
    decoder(b, &Decoder { act: Glu::Plain(Unary::Gelu), ..Decoder::COMMON });
}
