//! What can go wrong while a tokenizer is built from a file or used.

use alloc::string::String;
use core::fmt;

use gguf::GgufError;

/// A vocabulary that cannot be used, or text that it cannot express.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TokenizerError {
    /// A key of the file holds what it should not.
    Gguf(GgufError),
    /// `tokenizer.ggml.model` names a tokenizer that this engine does not have.
    UnknownModel {
        /// The name in the file.
        name: String,
    },
    /// `tokenizer.ggml.pre` names a pre-tokenizer that this engine does not have.
    UnknownPreTokenizer {
        /// The name in the file.
        name: String,
    },
    /// The file lacks a key that its tokenizer needs.
    MissingKey {
        /// The key.
        key: &'static str,
    },
    /// An array has fewer items than there are tokens.
    ShortArray {
        /// The key.
        key: &'static str,
        /// The number of tokens.
        expected: usize,
        /// The number of items.
        got: usize,
    },
    /// More tokens or token bytes than 32-bit ids and offsets can address, or text that grows beyond reason.
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// The largest number allowed.
        limit: usize,
        /// The number found.
        got: usize,
    },
    /// The text normalisation table of a unigram vocabulary points outside itself.
    BadCharsmap {
        /// Offset in the table.
        offset: usize,
    },
    /// The file has no vocabulary; text can neither be encoded nor decoded.
    NoVocabulary,
    /// The vocabulary asks for a special token to be added and does not name it.
    NoSpecialToken {
        /// Which one: `bos`, `eos` or `sep`.
        which: &'static str,
    },
    /// The vocabulary has no token for a byte, nor one for the unknown.
    NoByteToken {
        /// The byte.
        byte: u8,
    },
    /// The text is longer than this tokenizer takes at once.
    TextTooLong {
        /// The longest allowed.
        limit_bytes: usize,
        /// Its length.
        got_bytes: usize,
    },
}

impl fmt::Display for TokenizerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use TokenizerError::*;
        match self {
            Gguf(error) => error.fmt(f),
            UnknownModel { name } => write!(f, "unknown tokenizer {name:?} (tokenizer.ggml.model)"),
            UnknownPreTokenizer { name } => write!(f, "unknown pre-tokenizer {name:?} (tokenizer.ggml.pre)"),
            MissingKey { key } => write!(f, "the file has no {key}"),
            ShortArray { key, expected, got } => {
                write!(f, "{key}: expected an item for each of {expected} tokens, got {got}")
            }
            TooLarge { what, limit, got } => write!(f, "{what}: at most {limit}, got {got}"),
            BadCharsmap { offset } => {
                write!(f, "tokenizer.ggml.precompiled_charsmap: offset {offset} lies outside")
            }
            NoVocabulary => write!(f, "the file has no vocabulary"),
            NoSpecialToken { which } => write!(f, "the vocabulary wants a {which} token added and has none"),
            NoByteToken { byte } => write!(f, "the vocabulary has no token for byte 0x{byte:02X}"),
            TextTooLong { limit_bytes, got_bytes } => {
                write!(f, "text of {got_bytes} bytes, at most {limit_bytes} are encoded at once")
            }
        }
    }
}

impl core::error::Error for TokenizerError {}

impl From<GgufError> for TokenizerError {
    fn from(error: GgufError) -> TokenizerError {
        TokenizerError::Gguf(error)
    }
}
