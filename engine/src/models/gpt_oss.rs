//! gpt-oss: a mixture with biases everywhere, attention sinks, alternating sliding windows, YaRN, and its own gate.

use super::{Arch, Build, TensorList};
use crate::error::EngineError;
use crate::hparams::{Hparams, Keys};
use crate::layers::{Decoder, Gating, decoder, decoder_tensors};
use crate::op::{Glu, RopeMode};

/// `general.architecture = gpt-oss`
pub const GPT_OSS: Arch = Arch { name: "gpt-oss", hparams, tensors, build };

const DECODER: Decoder<'static> = Decoder {
    act: Glu::SwigluOai { alpha: 1.702, limit: 7.0 },
    gating: Gating { softmax_after: true, normalise: false },
    ffn_norm: "post_attention_norm.weight",
    fused_up: false,
    // They would come before the biases; no file has both.
    scaled_experts: false,
};

fn hparams(keys: &Keys<'_>) -> Result<Hparams, EngineError> {
    let mut hp = Hparams::read(keys, "attention.layer_norm_rms_epsilon")?;
    hp.rope_mode = RopeMode::Neox;
    hp.require_moe(keys)?;
    if let Some(window) = keys.opt_u32("attention.sliding_window")? {
        hp.set_window(keys, window, 2)?;
        hp.read_freq_base_swa(keys, hp.rope.freq_base)?;
    }
    Ok(hp)
}

fn tensors(hp: &Hparams) -> TensorList {
    let mut list = TensorList::default();
    decoder_tensors(hp, &mut list, &DECODER);
    let moe = hp.moe.expect("checked in hparams");
    for (il, layer) in hp.layers.iter().enumerate() {
        list.layer(il, "attn_sinks.weight", &[layer.n_head]);
        list.layer(il, "ffn_gate_inp.bias", &[moe.n_expert]);
        list.layer(il, "ffn_gate_exps.bias", &[moe.n_expert, moe.n_ff_exp]);
        list.layer(il, "ffn_up_exps.bias", &[moe.n_expert, moe.n_ff_exp]);
        list.layer(il, "ffn_down_exps.bias", &[moe.n_expert, hp.n_embd]);
    }
    list
}

fn build(b: &mut Build<'_>) {
    decoder(b, &DECODER);
}
