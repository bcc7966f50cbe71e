//! WordPiece (`bert`): BERT's basic tokenizer, then the longest token at each place of a word.
//!
//! Tokens that begin a word start with U+2581. A word with a place where no token fits is unknown as a whole.

use alloc::vec::Vec;

use super::TokenizerError;
use super::trie::Trie;
use super::unicode::{
    self, CONTROL, MARK, META_SPACE, PUNCTUATION, REPLACEMENT, SYMBOL, WHITESPACE, push_code_point,
};
use super::vocab::{TokenId, Vocab};

pub(super) struct Wpm {
    pub tokens: Trie,
    pub lowercase: bool,
    pub strip_accents: bool,
}

/// Ideographs that are words by themselves. The sixth block begins where the Hugging Face tokenizer has it.
const CJK: [(u32, u32); 8] = [
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B920, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
];

impl Wpm {
    /// Appends the tokens of a fragment without special tokens.
    pub(super) fn encode(
        &self,
        vocab: &Vocab,
        fragment: &[u8],
        unknown: Option<TokenId>,
        out: &mut Vec<TokenId>,
    ) -> Result<(), TokenizerError> {
        let mut word = Vec::from(META_SPACE);
        let mut finish = |word: &mut Vec<u8>| {
            let known = word.len() == META_SPACE.len() || encode_word(vocab, &self.tokens, word, out);
            if !known {
                out.push(unknown.ok_or(TokenizerError::NoSpecialToken { which: "unk" })?);
            }
            word.truncate(META_SPACE.len());
            Ok(())
        };
        for c in unicode::code_points(fragment) {
            let c = if self.strip_accents { unicode::nfd_base(c) } else { c };
            let flags = unicode::flags(c);
            if flags & WHITESPACE != 0 {
                finish(&mut word)?;
                continue;
            }
            let is_dropped = c == 0 || c == REPLACEMENT || flags & CONTROL != 0;
            if is_dropped || self.strip_accents && flags & MARK != 0 {
                continue;
            }
            let is_word = flags & PUNCTUATION != 0
                || c < 0x7F && flags & SYMBOL != 0
                || CJK.iter().any(|&(first, last)| (first..=last).contains(&c));
            if is_word {
                finish(&mut word)?;
            }
            push_code_point(&mut word, if self.lowercase { unicode::lowercase(c) } else { c });
            if is_word {
                finish(&mut word)?;
            }
        }
        finish(&mut word)
    }
}

/// Appends the tokens of a word; none, and `false`, if somewhere no token fits.
fn encode_word(vocab: &Vocab, tokens: &Trie, word: &[u8], out: &mut Vec<TokenId>) -> bool {
    let (first, mut pos) = (out.len(), 0);
    while pos < word.len() {
        let Some((id, len)) = tokens.longest(vocab, &word[pos..]) else {
            out.truncate(first);
            return false;
        };
        out.push(id);
        pos += len;
    }
    true
}
