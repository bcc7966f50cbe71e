//! The tokens: their bytes in one arena, a hash index from bytes to id, attributes and scores.
//!
//! Invariants: ids are `0..len()`; no token is empty; where two tokens have the same bytes the index gives the later.

use alloc::format;
use alloc::vec::Vec;
use core::hash::BuildHasher;

use foldhash::fast::FixedState;
use hashbrown::HashTable;

use super::TokenizerError;

/// Index of a token.
pub type TokenId = u32;

/// Longest token: far longer than vocabularies have them (the longest are runs of spaces). What is done for each byte
/// of a text, or printed for one token, takes time and memory by this.
const MAX_TOKEN_BYTES: usize = 16 << 10;

/// No token; also an id that no vocabulary reaches.
pub(super) const NO_TOKEN: TokenId = TokenId::MAX;

/// What a token is, as a set of bits (the kinds of GGUF's `tokenizer.ggml.token_type` and what its name implies).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenAttr(u8);

impl TokenAttr {
    /// Stands for what the vocabulary cannot express.
    pub const UNKNOWN: TokenAttr = TokenAttr(1);
    /// Reserved, never produced.
    pub const UNUSED: TokenAttr = TokenAttr(1 << 1);
    /// Text.
    pub const NORMAL: TokenAttr = TokenAttr(1 << 2);
    /// Steers the model and is no text.
    pub const CONTROL: TokenAttr = TokenAttr(1 << 3);
    /// Text that is found before anything else is looked at.
    pub const USER_DEFINED: TokenAttr = TokenAttr(1 << 4);
    /// One byte, written `<0xXX>`.
    pub const BYTE: TokenAttr = TokenAttr(1 << 5);
    /// Takes white space to its left with it when found in text.
    pub const LSTRIP: TokenAttr = TokenAttr(1 << 6);
    /// Takes white space to its right with it when found in text.
    pub const RSTRIP: TokenAttr = TokenAttr(1 << 7);

    /// The attribute of a GGUF token type.
    pub(super) fn from_gguf_type(token_type: i32) -> TokenAttr {
        match token_type {
            1 => TokenAttr::NORMAL,
            2 => TokenAttr::UNKNOWN,
            3 => TokenAttr::CONTROL,
            4 => TokenAttr::USER_DEFINED,
            5 => TokenAttr::UNUSED,
            6 => TokenAttr::BYTE,
            _ => TokenAttr(0),
        }
    }

    /// Do the two share a bit?
    pub fn is_any(self, other: TokenAttr) -> bool {
        self.0 & other.0 != 0
    }

    /// The bits of both.
    pub const fn with(self, other: TokenAttr) -> TokenAttr {
        TokenAttr(self.0 | other.0)
    }

    /// The bits that `other` lacks.
    pub const fn without(self, other: TokenAttr) -> TokenAttr {
        TokenAttr(self.0 & !other.0)
    }
}

/// Hash of a token's bytes or of a key made of ids. Fixed, so that loading a file takes the same time every time.
pub(super) fn hash(key: impl core::hash::Hash) -> u64 {
    FixedState::default().hash_one(key)
}

/// The tokens of a vocabulary.
#[derive(Default)]
pub(super) struct Vocab {
    arena: Vec<u8>,
    /// End of each token in the arena.
    ends: Vec<u32>,
    index: HashTable<TokenId>,
    attrs: Vec<TokenAttr>,
    /// Empty if the file has none.
    scores: Vec<f32>,
    max_token_bytes: usize,
}

impl Vocab {
    pub(super) fn new<'a>(
        tokens: impl ExactSizeIterator<Item = &'a [u8]>,
        attrs: impl Fn(usize) -> TokenAttr,
        scores: Vec<f32>,
    ) -> Result<Vocab, TokenizerError> {
        let n_vocab = tokens.len();
        let limit = (TokenId::MAX / 4) as usize;
        if n_vocab > limit {
            return Err(TokenizerError::TooLarge { what: "number of tokens", limit, got: n_vocab });
        }
        let mut vocab = Vocab {
            ends: Vec::with_capacity(n_vocab),
            index: HashTable::with_capacity(n_vocab),
            attrs: Vec::with_capacity(n_vocab),
            scores,
            ..Vocab::default()
        };
        for (i, token) in tokens.enumerate() {
            if token.len() > MAX_TOKEN_BYTES {
                return Err(TokenizerError::TooLarge {
                    what: "bytes of a token",
                    limit: MAX_TOKEN_BYTES,
                    got: token.len(),
                });
            }
            let start = vocab.arena.len();
            match token {
                // llama.cpp's name for it; what matters is that every token has bytes to be found by.
                [] => vocab.arena.extend_from_slice(format!("[EMPTY_{i}]").as_bytes()),
                token => vocab.arena.extend_from_slice(token),
            }
            let end = vocab.arena.len();
            vocab.ends.push(u32::try_from(end).map_err(|_| TokenizerError::TooLarge {
                what: "bytes of all tokens",
                limit: u32::MAX as usize,
                got: end,
            })?);
            vocab.max_token_bytes = vocab.max_token_bytes.max(end - start);
            vocab.attrs.push(attrs(i));
            let (ends, arena) = (&vocab.ends, &vocab.arena);
            let bytes_of = |id: TokenId| token_bytes(arena, ends, id);
            let entry = vocab.index.entry(
                hash(&arena[start..end]),
                |&id| bytes_of(id) == &arena[start..end],
                |&id| hash(bytes_of(id)),
            );
            *entry.or_insert(0).get_mut() = i as TokenId;
        }
        vocab.arena.shrink_to_fit();
        Ok(vocab)
    }

    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    pub(super) fn ids(&self) -> core::ops::Range<TokenId> {
        0..self.len() as TokenId
    }

    /// Bytes of a token; empty for an id outside the vocabulary.
    pub(super) fn bytes(&self, id: TokenId) -> &[u8] {
        if (id as usize) < self.len() { token_bytes(&self.arena, &self.ends, id) } else { &[] }
    }

    pub(super) fn id(&self, bytes: &[u8]) -> Option<TokenId> {
        if bytes.len() > self.max_token_bytes {
            return None;
        }
        self.index.find(hash(bytes), |&id| token_bytes(&self.arena, &self.ends, id) == bytes).copied()
    }

    pub(super) fn attr(&self, id: TokenId) -> TokenAttr {
        self.attrs.get(id as usize).copied().unwrap_or(TokenAttr(0))
    }

    pub(super) fn set_attr(&mut self, id: TokenId, attr: TokenAttr) {
        if let Some(known) = self.attrs.get_mut(id as usize) {
            *known = attr;
        }
    }

    pub(super) fn score(&self, id: TokenId) -> f32 {
        self.scores.get(id as usize).copied().unwrap_or(0.0)
    }

    /// The token `<0xXX>` of a byte.
    pub(super) fn byte_token(&self, byte: u8) -> Option<TokenId> {
        self.id(format!("<0x{byte:02X}>").as_bytes())
    }
}

fn token_bytes<'a>(arena: &'a [u8], ends: &[u32], id: TokenId) -> &'a [u8] {
    let i = id as usize;
    let start = if i == 0 { 0 } else { ends[i - 1] as usize };
    &arena[start..ends[i] as usize]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_tokens_are_refused() {
        let of =
            |n: usize| Vocab::new([&alloc::vec![b'a'; n][..]].into_iter(), |_| TokenAttr::NORMAL, Vec::new());
        assert!(of(MAX_TOKEN_BYTES).is_ok());
        let what = "bytes of a token";
        let (limit, got) = (MAX_TOKEN_BYTES, MAX_TOKEN_BYTES + 1);
        assert_eq!(of(got).err(), Some(TokenizerError::TooLarge { what, limit, got }));
    }

    #[test]
    fn index_gives_the_later_of_equal_tokens() {
        let tokens: [&[u8]; 4] = [b"a", b"", b"bc", b"a"];
        let vocab = Vocab::new(tokens.into_iter(), |_| TokenAttr::NORMAL, Vec::new()).unwrap();
        assert_eq!(vocab.id(b"a"), Some(3));
        assert_eq!(vocab.id(b"bc"), Some(2));
        assert_eq!(vocab.id(b"[EMPTY_1]"), Some(1));
        assert_eq!(vocab.id(b"nope"), None);
        assert_eq!((vocab.bytes(2), vocab.bytes(4), vocab.len()), (&b"bc"[..], &b""[..], 4));
    }
}
