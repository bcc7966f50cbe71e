//! Unigram (`t5`): SentencePiece's normalisation, then the segmentation of the highest total score (Viterbi).

use alloc::vec::Vec;

use super::TokenizerError;
use super::merge::char_lens;
use super::trie::Trie;
use super::unicode::{META_SPACE, decode_any};
use super::vocab::{TokenAttr, TokenId, Vocab};

/// Bytes that a byte of text may become by the file's table, on average over a text. Compatibility decomposition makes at
/// most 13 of one, spaces written as three (U+FDFA).
const MAX_GROWTH: usize = 32;

/// How far below the worst token an unknown character scores.
const UNKNOWN_PENALTY: f32 = 10.0;

pub(super) struct Ugm {
    tokens: Trie,
    user_defined: Trie,
    unknown_score: f32,
    charsmap: Charsmap,
    pub add_space_prefix: bool,
    pub remove_extra_whitespaces: bool,
}

impl Ugm {
    pub(super) fn new(
        vocab: &Vocab,
        charsmap: &[u8],
        add_space_prefix: bool,
        remove_extra_whitespaces: bool,
    ) -> Result<Ugm, TokenizerError> {
        let are = |attr: TokenAttr| vocab.ids().filter(move |&id| vocab.attr(id).is_any(attr));
        let lowest = are(TokenAttr::NORMAL).map(|id| vocab.score(id)).fold(f32::MAX, f32::min);
        let matched = TokenAttr::NORMAL.with(TokenAttr::USER_DEFINED).with(TokenAttr::UNUSED);
        Ok(Ugm {
            tokens: Trie::new(vocab, are(matched)),
            user_defined: Trie::new(vocab, are(TokenAttr::USER_DEFINED)),
            unknown_score: lowest - UNKNOWN_PENALTY,
            charsmap: Charsmap::new(charsmap)?,
            add_space_prefix,
            remove_extra_whitespaces,
        })
    }

    /// Appends the tokens of a fragment without special tokens.
    pub(super) fn encode(
        &self,
        vocab: &Vocab,
        fragment: &[u8],
        unknown: Option<TokenId>,
        out: &mut Vec<TokenId>,
    ) -> Result<(), TokenizerError> {
        let text = self.normalize(vocab, fragment)?;
        let unknown = unknown.ok_or(TokenizerError::NoSpecialToken { which: "unk" })?;
        /// The best way to the byte offset that it is stored at.
        #[derive(Clone, Copy)]
        struct Best {
            token: TokenId,
            from: usize,
            score: f64,
        }
        let mut best = Vec::new();
        best.resize(text.len() + 1, Best { token: unknown, from: 0, score: f64::MIN });
        best[0].score = 0.0;
        let mut from = 0;
        for char_len in char_lens(&text) {
            let score = best[from].score;
            let mut offer = |to: usize, token: TokenId, token_score: f64| {
                if score + token_score > best[to].score {
                    best[to] = Best { token, from, score: score + token_score };
                }
            };
            let (mut node, mut char_is_token) = (self.tokens.root(), false);
            for (i, &byte) in text[from..].iter().enumerate() {
                let Some(next) = self.tokens.step(vocab, node, byte) else { break };
                node = next;
                if let Some(token) = self.tokens.token(vocab, &node) {
                    char_is_token |= i + 1 == char_len;
                    let is_user_defined = vocab.attr(token).is_any(TokenAttr::USER_DEFINED);
                    offer(from + i + 1, token, if is_user_defined { 0.0 } else { vocab.score(token).into() });
                }
            }
            if !char_is_token {
                offer(from + char_len, unknown, self.unknown_score.into());
            }
            from += char_len;
        }
        // Back from the end; neighbouring unknowns are one.
        let (first, mut at) = (out.len(), text.len());
        while at > 0 {
            let Best { token, from, .. } = best[at];
            if token != unknown || out.len() == first || out.last() != Some(&unknown) {
                out.push(token);
            }
            at = from;
        }
        out[first..].reverse();
        Ok(())
    }

    fn normalize(&self, vocab: &Vocab, text: &[u8]) -> Result<Vec<u8>, TokenizerError> {
        let mut out = Vec::with_capacity(2 * text.len());
        let (mut pos, mut in_word, mut prefixed) = (0, false, false);
        while pos < text.len() {
            let (normal, consumed) = self.normal_prefix(vocab, &text[pos..])?;
            for &byte in normal {
                if byte == b' ' {
                    in_word = false;
                    if !self.remove_extra_whitespaces {
                        out.extend_from_slice(META_SPACE);
                    }
                    continue;
                }
                if !in_word {
                    in_word = true;
                    if self.remove_extra_whitespaces || self.add_space_prefix && !prefixed {
                        out.extend_from_slice(META_SPACE);
                        prefixed = true;
                    }
                }
                out.push(byte);
            }
            let limit = MAX_GROWTH * text.len();
            if out.len() > limit {
                let what = "bytes that tokenizer.ggml.precompiled_charsmap makes of a text";
                return Err(TokenizerError::TooLarge { what, limit, got: out.len() });
            }
            pos += consumed;
        }
        Ok(out)
    }

    /// The normal form of the beginning of a text, and how much of the text that was.
    fn normal_prefix<'a>(
        &'a self,
        vocab: &Vocab,
        text: &'a [u8],
    ) -> Result<(&'a [u8], usize), TokenizerError> {
        // As llama.cpp has it, the beginning of a user-defined token is enough to be left alone.
        let (mut node, mut kept) = (self.user_defined.root(), 0);
        while let Some(next) =
            text.get(kept).and_then(|&byte| self.user_defined.step(vocab, node.clone(), byte))
        {
            node = next;
            kept += 1;
        }
        if kept > 0 {
            return Ok((&text[..kept], kept));
        }
        if let Some(found) = self.charsmap.longest_prefix(text)? {
            return Ok(found);
        }
        Ok(match decode_any(text, 0) {
            Some((_, len)) => (&text[..len], len),
            None => ("\u{FFFD}".as_bytes(), 1),
        })
    }
}

/// Most bytes that are replaced at a time: a file's table may have a loop, and every place of a text is looked at. The longest
/// of SentencePiece's own tables (NFKC) are some thirty bytes.
const MAX_KEY_BYTES: usize = 256;

/// SentencePiece's table of replacements: a double array over the bytes of what is replaced, then the replacements,
/// each ending in a zero. Cells hold: bits 0–7 and 31 the byte that leads here (LCHECK), bit 8 whether a replacement
/// ends here, bits 10–30 the offset to the children (BASE; bit 9 multiplies it by 256), or the replacement's offset.
#[derive(Default)]
struct Charsmap {
    cells: Vec<u32>,
    replacements: Vec<u8>,
}

impl Charsmap {
    fn new(bytes: &[u8]) -> Result<Charsmap, TokenizerError> {
        if bytes.is_empty() {
            return Ok(Charsmap::default());
        }
        let header = bytes.first_chunk::<4>().ok_or(TokenizerError::BadCharsmap { offset: 0 })?;
        let cells_bytes = u32::from_le_bytes(*header) as usize;
        let (cells, replacements) = bytes[4..]
            .split_at_checked(cells_bytes)
            .ok_or(TokenizerError::BadCharsmap { offset: cells_bytes })?;
        let cells =
            cells.chunks_exact(4).map(|cell| u32::from_le_bytes([cell[0], cell[1], cell[2], cell[3]]));
        Ok(Charsmap { cells: cells.collect(), replacements: replacements.into() })
    }

    fn cell(&self, index: u32) -> Result<u32, TokenizerError> {
        self.cells.get(index as usize).copied().ok_or(TokenizerError::BadCharsmap { offset: index as usize })
    }

    /// Replacement of the longest replaceable beginning of a text, and that beginning's length.
    fn longest_prefix(&self, text: &[u8]) -> Result<Option<(&[u8], usize)>, TokenizerError> {
        if self.cells.is_empty() {
            return Ok(None);
        }
        let base = |cell: u32| (cell >> 10) << ((cell & 1 << 9) >> 6);
        let (mut index, mut found) = (base(self.cell(0)?), None);
        let key = text.iter().take(MAX_KEY_BYTES).enumerate().take_while(|&(_, &byte)| byte != 0);
        for (i, &byte) in key {
            index ^= u32::from(byte);
            let cell = self.cell(index)?;
            if cell & (1 << 31 | 0xFF) != u32::from(byte) {
                break;
            }
            index ^= base(cell);
            if cell >> 8 & 1 != 0 {
                found = Some(((self.cell(index)? & !(1 << 31)) as usize, i + 1));
            }
        }
        let Some((offset, len)) = found else { return Ok(None) };
        let tail = self.replacements.get(offset..).ok_or(TokenizerError::BadCharsmap { offset })?;
        let end = tail.iter().position(|&byte| byte == 0).ok_or(TokenizerError::BadCharsmap { offset })?;
        Ok(Some((&tail[..end], len)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file's table may lead from a byte back to itself: what one place of a text costs has a bound all the same.
    #[test]
    fn a_loop_in_the_table_is_left() {
        const A: u32 = b'a' as u32;
        // The root's children begin at 0x100; the one of `a` has its children there, too, and ends a key.
        let mut cells = [0u32; 0x200];
        (cells[0], cells[0x100 + A as usize]) = (0x100 << 10, A << 10 | 1 << 8 | A);
        let mut bytes = (4 * cells.len() as u32).to_le_bytes().to_vec();
        cells.iter().for_each(|cell| bytes.extend(cell.to_le_bytes()));
        // One replacement, by nothing.
        bytes.push(0);
        let table = Charsmap::new(&bytes).unwrap();
        assert_eq!(table.longest_prefix(&[b'a'; 10_000]), Ok(Some((&[][..], MAX_KEY_BYTES))));
    }
}
