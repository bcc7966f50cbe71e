//! The rows: every architecture the engine knows.

use alloc::string::String;

use super::{Arch, bert, gemma, gpt_oss, llama, phi3, qwen};
use crate::error::EngineError;

/// All architectures.
pub const ARCHS: &[&Arch] = &[
    &llama::LLAMA,
    &qwen::QWEN2,
    &qwen::QWEN2MOE,
    &qwen::QWEN3,
    &qwen::QWEN3MOE,
    &gemma::GEMMA,
    &gemma::GEMMA2,
    &gemma::GEMMA3,
    &phi3::PHI3,
    &gpt_oss::GPT_OSS,
    &bert::BERT,
];

/// The architecture with this name.
pub fn find(name: &str) -> Result<&'static Arch, EngineError> {
    ARCHS.iter().copied().find(|a| a.name == name).ok_or_else(|| EngineError::UnknownArchitecture {
        name: String::from(name),
        known: ARCHS.iter().map(|a| a.name).collect(),
    })
}
