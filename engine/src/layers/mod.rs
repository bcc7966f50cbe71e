//! Parts that models are made of.

mod decoder;
mod ffn;
pub mod rotation;

pub use decoder::{Decoder, attention_tensors, decoder, decoder_tensors, qkv};
pub use ffn::{FfnWeights, Gating, gated_ffn, moe_ffn};
