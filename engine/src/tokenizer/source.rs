//! What a tokenizer is made of: a plain value, filled from a GGUF file or by hand.

use alloc::borrow::Cow;
use alloc::format;
use alloc::vec::Vec;

use gguf::{Gguf, GgufError, ValueType};

use super::special::SpecialTokens;

/// A vocabulary as a file has it. `None` means that the file does not say.
#[derive(Clone, Debug, Default)]
pub struct VocabSource<'a> {
    /// Kind of tokenizer (`tokenizer.ggml.model`): `gpt2`, `gemma4`, `llama`, `bert`, `t5`, `rwkv`, `no_vocab`, …
    pub model: &'a str,
    /// Name of the pre-tokenizer (`tokenizer.ggml.pre`).
    pub pre: Option<&'a str>,
    /// Bytes of each token.
    pub tokens: Option<Vec<&'a [u8]>>,
    /// Score of each token.
    pub scores: Option<Vec<f32>>,
    /// Kind of each token, as GGUF numbers it.
    pub types: Option<Vec<i32>>,
    /// Merges in the order in which they apply: two texts with a space between.
    pub merges: Option<Vec<&'a [u8]>>,
    /// Ids that the file gives a role; those outside the vocabulary are ignored.
    pub special: SpecialTokens,
    /// Does encoding add the beginning-of-sequence token?
    pub add_bos: Option<bool>,
    /// Does encoding add the end-of-sequence token?
    pub add_eos: Option<bool>,
    /// Is a space put before text?
    pub add_space_prefix: Option<bool>,
    /// Are runs of spaces made one (unigram)?
    pub remove_extra_whitespaces: Option<bool>,
    /// Is text made lower case (WordPiece)?
    pub lowercase: Option<bool>,
    /// Are accents taken away (WordPiece)?
    pub strip_accents: Option<bool>,
    /// SentencePiece's normalisation table (unigram).
    pub charsmap: Vec<u8>,
    /// `general.name`: some habits of a model are known by it only.
    pub general_name: Cow<'a, str>,
    /// `general.architecture`.
    pub architecture: &'a str,
    /// `<architecture>.vocab_size`: the number of tokens of a file without vocabulary.
    pub vocab_size: Option<u32>,
}

impl<'a> VocabSource<'a> {
    /// Reads the keys of a file.
    pub fn from_gguf(gguf: &Gguf<'a>) -> Result<VocabSource<'a>, GgufError> {
        let strings = |key| gguf.opt_array(key)?.map(|array| Ok(array.strs()?.collect())).transpose();
        let architecture = gguf.opt_str("general.architecture")?.unwrap_or_default();
        let id = |key| gguf.opt_u32(key);
        Ok(VocabSource {
            model: gguf.str("tokenizer.ggml.model")?,
            pre: gguf.opt_str("tokenizer.ggml.pre")?,
            tokens: strings("tokenizer.ggml.tokens")?,
            scores: scores(gguf)?,
            types: gguf
                .opt_array("tokenizer.ggml.token_type")?
                .map(|array| Ok(array.i32s()?.collect()))
                .transpose()?,
            merges: strings("tokenizer.ggml.merges")?,
            special: SpecialTokens {
                bos: id("tokenizer.ggml.bos_token_id")?,
                eos: id("tokenizer.ggml.eos_token_id")?,
                eot: id("tokenizer.ggml.eot_token_id")?,
                eom: id("tokenizer.ggml.eom_token_id")?,
                unk: id("tokenizer.ggml.unknown_token_id")?,
                // The misspelling is the format's.
                sep: id("tokenizer.ggml.seperator_token_id")?,
                pad: id("tokenizer.ggml.padding_token_id")?,
                mask: id("tokenizer.ggml.mask_token_id")?,
                // The older names of these keys count where both are there.
                fim_pre: id("tokenizer.ggml.prefix_token_id")?.or(id("tokenizer.ggml.fim_pre_token_id")?),
                fim_suf: id("tokenizer.ggml.suffix_token_id")?.or(id("tokenizer.ggml.fim_suf_token_id")?),
                fim_mid: id("tokenizer.ggml.middle_token_id")?.or(id("tokenizer.ggml.fim_mid_token_id")?),
                fim_pad: id("tokenizer.ggml.fim_pad_token_id")?,
                fim_rep: id("tokenizer.ggml.fim_rep_token_id")?,
                fim_sep: id("tokenizer.ggml.fim_sep_token_id")?,
            },
            add_bos: gguf.opt_bool("tokenizer.ggml.add_bos_token")?,
            add_eos: gguf.opt_bool("tokenizer.ggml.add_eos_token")?,
            add_space_prefix: gguf.opt_bool("tokenizer.ggml.add_space_prefix")?,
            remove_extra_whitespaces: gguf.opt_bool("tokenizer.ggml.remove_extra_whitespaces")?,
            lowercase: gguf.opt_bool("tokenizer.ggml.normalizer.lowercase")?,
            strip_accents: gguf.opt_bool("tokenizer.ggml.normalizer.strip_accents")?,
            charsmap: charsmap(gguf)?,
            general_name: gguf.opt_text("general.name")?.unwrap_or_default(),
            architecture,
            vocab_size: gguf.opt_u32(&format!("{architecture}.vocab_size"))?,
        })
    }
}

/// Scores may be stored as integers.
fn scores(gguf: &Gguf<'_>) -> Result<Option<Vec<f32>>, GgufError> {
    let Some(array) = gguf.opt_array("tokenizer.ggml.scores")? else { return Ok(None) };
    Ok(Some(match array.elem_type() {
        ValueType::I32 => array.i32s()?.map(|score| score as f32).collect(),
        _ => array.f32s()?.collect(),
    }))
}

/// Bytes may be stored as signed.
fn charsmap(gguf: &Gguf<'_>) -> Result<Vec<u8>, GgufError> {
    let Some(array) = gguf.opt_array("tokenizer.ggml.precompiled_charsmap")? else { return Ok(Vec::new()) };
    Ok(match array.elem_type() {
        ValueType::I8 => array.numbers::<i8>()?.map(|byte| byte as u8).collect(),
        _ => array.numbers::<u8>()?.collect(),
    })
}
