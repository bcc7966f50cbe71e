//! SentencePiece (`llama`): neighbouring symbols are joined as long as the joint text is a token, best score first.

use alloc::boxed::Box;
use alloc::vec::Vec;

use super::TokenizerError;
use super::merge::{Merge, Merger, Symbol, WordCache, char_lens, cut_before_spaces, has_inner_space};
use super::unicode::META_SPACE;
use super::vocab::{NO_TOKEN, TokenId, Vocab};

pub(super) struct Spm {
    /// Token written for each byte that is in no other token; `NO_TOKEN` if there is none.
    byte_tokens: Box<[TokenId; 256]>,
    cut_at_spaces: bool,
}

impl Spm {
    pub(super) fn new(vocab: &Vocab) -> Spm {
        let byte_token = |byte: usize| {
            let byte = byte as u8;
            vocab.byte_token(byte).or_else(|| vocab.id(&[byte])).unwrap_or(NO_TOKEN)
        };
        Spm {
            byte_tokens: Box::new(core::array::from_fn(byte_token)),
            cut_at_spaces: !vocab.ids().any(|id| has_inner_space(vocab.bytes(id))),
        }
    }

    /// Appends the tokens of a fragment without special tokens, a space put in front if `prefix_space`.
    pub(super) fn encode(
        &self,
        vocab: &Vocab,
        fragment: &[u8],
        prefix_space: bool,
        unknown: Option<TokenId>,
        out: &mut Vec<TokenId>,
    ) -> Result<(), TokenizerError> {
        let mut text = Vec::with_capacity(fragment.len() + fragment.len() / 2);
        if prefix_space {
            text.extend_from_slice(META_SPACE);
        }
        for &byte in fragment {
            if byte == b' ' { text.extend_from_slice(META_SPACE) } else { text.push(byte) }
        }
        let mut ends = Vec::new();
        if self.cut_at_spaces {
            cut_before_spaces(&text, 0, text.len(), &mut ends);
        } else {
            ends.push(text.len());
        }
        let (mut merger, mut cache, mut start) = (Merger::default(), WordCache::new(&text), 0);
        for end in ends {
            cache.encode(start..end, out, |word, out| {
                self.encode_word(vocab, word, unknown, &mut merger, out)
            })?;
            start = end;
        }
        Ok(())
    }

    fn encode_word(
        &self,
        vocab: &Vocab,
        word: &[u8],
        unknown: Option<TokenId>,
        merger: &mut Merger,
        out: &mut Vec<TokenId>,
    ) -> Result<(), TokenizerError> {
        let mut start = 0;
        merger.symbols.clear();
        merger.symbols.extend(char_lens(word).map(|len| {
            let id = vocab.id(&word[start..start + len]).unwrap_or(NO_TOKEN);
            let symbol = Symbol { start: start as u32, len: len as u32, id };
            start += len;
            symbol
        }));
        merger.run(|left, right| {
            let id = vocab.id(&word[left.start as usize..right.range().end])?;
            Some(Merge { priority: descending(vocab.score(id)), id })
        });
        for symbol in &merger.symbols {
            if symbol.id != NO_TOKEN {
                out.push(symbol.id);
                continue;
            }
            for &byte in &word[symbol.range()] {
                // llama.cpp throws where there is no byte token; the unknown token says the same more gently.
                let token =
                    Some(self.byte_tokens[usize::from(byte)]).filter(|&id| id != NO_TOKEN).or(unknown);
                out.push(token.ok_or(TokenizerError::NoByteToken { byte })?);
            }
        }
        Ok(())
    }
}

/// A number that falls as the score rises.
fn descending(score: f32) -> u32 {
    // Adding zero makes -0 and 0 equal, as they compare.
    let bits = (score + 0.0).to_bits();
    if bits >> 31 == 1 { bits } else { !bits & (u32::MAX >> 1) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn priority_falls_with_the_score() {
        let scores = [f32::INFINITY, 3.5, 1e-9, 0.0, -1e-9, -0.5, -1e9, f32::NEG_INFINITY];
        assert!(scores.windows(2).all(|pair| descending(pair[0]) < descending(pair[1])));
        assert_eq!(descending(0.0), descending(-0.0));
    }
}
