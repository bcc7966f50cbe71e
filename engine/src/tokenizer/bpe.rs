//! Byte-pair encoding (`gpt2`, `gemma4`): a named pre-tokenizer cuts words, merges are applied in the order of the file.
//!
//! Symbols are ids: a token's id, or an id behind the vocabulary for texts that only merges know. Words of byte-level
//! vocabularies are merged as raw bytes; GPT-2's byte characters appear only where tokens are looked up by text.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use hashbrown::HashTable;

use super::TokenizerError;
use super::merge::{Merge, Merger, Symbol, WordCache, char_lens, cut_before_spaces, has_inner_space};
use super::pre::{PreTokenizer, habit};
use super::unicode::{self, BYTE_TO_CHAR, META_SPACE, push_code_point};
use super::vocab::{NO_TOKEN, TokenId, Vocab, hash};

struct MergeRule {
    left: TokenId,
    right: TokenId,
    rank: u32,
    merged: TokenId,
}

pub(super) struct Bpe {
    pre: PreTokenizer,
    merges: HashTable<MergeRule>,
    /// Ids, from the vocabulary's length on, of texts that are in merges and are no tokens.
    extra: BTreeMap<Box<[u8]>, TokenId>,
    /// Symbol of each raw byte (byte-level vocabularies).
    byte_symbols: Box<[TokenId; 256]>,
    /// What is written for a byte of a symbol that is no token.
    byte_tokens: Box<[TokenId; 256]>,
    /// No merge crosses the beginning of a word marked by U+2581.
    cut_at_spaces: bool,
    /// Lower-case the text first (only vocabularies that drop white space).
    lowercase: bool,
}

impl Bpe {
    pub(super) fn new<'a>(
        vocab: &Vocab,
        pre: PreTokenizer,
        merges: impl ExactSizeIterator<Item = &'a [u8]>,
        lowercase: bool,
    ) -> Result<Bpe, TokenizerError> {
        let limit = (TokenId::MAX / 4) as usize;
        if merges.len() > limit {
            return Err(TokenizerError::TooLarge { what: "number of merges", limit, got: merges.len() });
        }
        let raw_utf8 = pre.has(habit::RAW_UTF8);
        let mut table = HashTable::with_capacity(merges.len());
        let mut extra = BTreeMap::new();
        let mut symbol = |text: &[u8]| {
            vocab.id(text).unwrap_or_else(|| match extra.get(text) {
                Some(&id) => id,
                None => {
                    let id = (vocab.len() + extra.len()) as TokenId;
                    extra.insert(Box::from(text), id);
                    id
                }
            })
        };
        let (mut both, mut cut_at_spaces) = (Vec::new(), raw_utf8);
        for (rank, merge) in merges.enumerate() {
            // The first character may itself be a space. A merge without two parts never applies.
            let Some(space) = merge.iter().skip(1).position(|&byte| byte == b' ').map(|at| at + 1) else {
                continue;
            };
            both.clear();
            both.extend_from_slice(&merge[..space]);
            both.extend_from_slice(&merge[space + 1..]);
            cut_at_spaces = cut_at_spaces && !has_inner_space(&both);
            let rule = MergeRule {
                left: symbol(&merge[..space]),
                right: symbol(&merge[space + 1..]),
                rank: rank as u32,
                merged: symbol(&both),
            };
            table
                .entry(
                    hash((rule.left, rule.right)),
                    |known: &MergeRule| (known.left, known.right) == (rule.left, rule.right),
                    |known| hash((known.left, known.right)),
                )
                .or_insert(rule);
        }
        let byte_text = |byte: usize| {
            let mut text = Vec::new();
            push_code_point(&mut text, BYTE_TO_CHAR[byte].into());
            text
        };
        let known = |text: &[u8]| vocab.id(text).or_else(|| extra.get(text).copied()).unwrap_or(NO_TOKEN);
        let fallback = |byte: usize| {
            let token = if raw_utf8 { vocab.byte_token(byte as u8) } else { vocab.id(&[byte as u8]) };
            token.unwrap_or(NO_TOKEN)
        };
        Ok(Bpe {
            byte_symbols: Box::new(core::array::from_fn(|byte| known(&byte_text(byte)))),
            byte_tokens: Box::new(core::array::from_fn(fallback)),
            pre,
            merges: table,
            extra,
            cut_at_spaces,
            lowercase,
        })
    }

    /// Are tokens raw UTF-8 in which U+2581 is a space, not byte characters?
    pub(super) fn escapes_spaces(&self) -> bool {
        self.pre.has(habit::ESCAPE_SPACES)
    }

    /// Appends the tokens of a fragment without special tokens.
    pub(super) fn encode(&self, vocab: &Vocab, fragment: &[u8], out: &mut Vec<TokenId>) {
        let normalized = unicode::normalize(fragment);
        let text = self.prepare(&normalized);
        let text = text.as_deref().unwrap_or(&normalized);
        let mut ends = self.pre.split(text);
        if self.cut_at_spaces {
            let (mut cut, mut start) = (Vec::with_capacity(ends.len()), 0);
            for end in ends {
                cut_before_spaces(text, start, end, &mut cut);
                start = end;
            }
            ends = cut;
        }
        let (mut scratch, mut cache, mut start) = (Scratch::default(), WordCache::new(text), 0);
        for end in ends {
            let is_dropped = || {
                self.pre.has(habit::DROP_SPACES)
                    && unicode::flags(unicode::decode(text, start).0) & unicode::WHITESPACE != 0
            };
            if end > start && !is_dropped() {
                let Ok(()) = cache.encode(start..end, out, |word, out| {
                    self.encode_word(vocab, word, &mut scratch, out);
                    Ok::<(), core::convert::Infallible>(())
                });
            }
            start = end;
        }
    }

    /// The text as the pre-tokenizer wants it; `None` if that is how it is.
    fn prepare(&self, text: &[u8]) -> Option<Vec<u8>> {
        if self.lowercase && self.pre.has(habit::DROP_SPACES) {
            let mut lower = Vec::with_capacity(text.len());
            unicode::code_points(text).for_each(|c| push_code_point(&mut lower, unicode::lowercase(c)));
            return Some(lower);
        }
        if !self.escapes_spaces() {
            return None;
        }
        let mut escaped = Vec::with_capacity(text.len() + text.len() / 2);
        for line in text.split_inclusive(|&byte| byte == b'\n') {
            let starts_word = line[0] == b' ' || line.starts_with(META_SPACE);
            if self.pre.has(habit::SPACE_PER_LINE) && line[0] != b'\n' && !starts_word {
                escaped.extend_from_slice(META_SPACE);
            }
            for &byte in line {
                if byte == b' ' { escaped.extend_from_slice(META_SPACE) } else { escaped.push(byte) }
            }
        }
        Some(escaped)
    }

    fn encode_word(&self, vocab: &Vocab, word: &[u8], scratch: &mut Scratch, out: &mut Vec<TokenId>) {
        let raw_utf8 = self.pre.has(habit::RAW_UTF8);
        let as_it_is = self.pre.has(habit::IGNORE_MERGES)
            || self.pre.has(habit::NEWLINE_RUNS) && word.iter().all(|&byte| byte == b'\n');
        if as_it_is {
            let whole = if raw_utf8 { word } else { byte_characters(word, &mut scratch.text) };
            if let Some(id) = vocab.id(whole) {
                out.push(id);
                return;
            }
        }
        let Scratch { merger, text } = scratch;
        merger.symbols.clear();
        if raw_utf8 {
            let mut start = 0;
            merger.symbols.extend(char_lens(word).map(|len| {
                let bytes = &word[start..start + len];
                let id = vocab.id(bytes).or_else(|| self.extra.get(bytes).copied()).unwrap_or(NO_TOKEN);
                let symbol = Symbol { start: start as u32, len: len as u32, id };
                start += len;
                symbol
            }));
        } else {
            let symbol = |(i, &byte): (usize, &u8)| Symbol {
                start: i as u32,
                len: 1,
                id: self.byte_symbols[usize::from(byte)],
            };
            merger.symbols.extend(word.iter().enumerate().map(symbol));
        }
        merger.run(|left, right| self.merge(left.id, right.id));
        for symbol in &merger.symbols {
            if (symbol.id as usize) < vocab.len() {
                out.push(symbol.id);
                continue;
            }
            // llama.cpp looks up each byte of the symbol's text and drops those that are no token.
            let bytes = &word[symbol.range()];
            let bytes = if raw_utf8 { bytes } else { byte_characters(bytes, text) };
            out.extend(
                bytes.iter().map(|&byte| self.byte_tokens[usize::from(byte)]).filter(|&id| id != NO_TOKEN),
            );
        }
    }

    fn merge(&self, left: TokenId, right: TokenId) -> Option<Merge> {
        self.merges
            .find(hash((left, right)), |rule| (rule.left, rule.right) == (left, right))
            .map(|rule| Merge { priority: rule.rank, id: rule.merged })
    }
}

#[derive(Default)]
struct Scratch {
    merger: Merger,
    text: Vec<u8>,
}

/// Writes raw bytes as GPT-2's byte characters.
fn byte_characters<'t>(bytes: &[u8], text: &'t mut Vec<u8>) -> &'t [u8] {
    text.clear();
    bytes.iter().for_each(|&byte| push_code_point(text, BYTE_TO_CHAR[usize::from(byte)].into()));
    text
}
