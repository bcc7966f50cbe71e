//! Parts that models are made of.

mod decoder;
mod ffn;

pub use decoder::{Decoder, decoder, decoder_tensors};
pub use ffn::{FfnWeights, Gating, gated_ffn, moe_ffn};
