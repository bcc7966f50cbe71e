//! Merging of neighbouring symbols by priority: the common part of byte-pair encoding and SentencePiece.
//!
//! A word starts as one symbol per character. As long as a neighbouring pair can be merged, the pair of the lowest
//! priority value is, the leftmost of equals first. Short words scan for it; long ones keep a heap, so the time is
//! O(n log n) for any text.

use alloc::collections::BinaryHeap;
use alloc::vec::Vec;
use core::cmp::Reverse;
use core::ops::Range;

use hashbrown::HashTable;

use super::unicode::{META_SPACE, announced_len};
use super::vocab::{TokenId, hash};

/// A piece of the word: `len` bytes from `start`, and what the tokenizer knows it by.
#[derive(Clone, Copy, Debug)]
pub(super) struct Symbol {
    pub start: u32,
    pub len: u32,
    pub id: TokenId,
}

impl Symbol {
    pub(super) fn range(&self) -> Range<usize> {
        self.start as usize..(self.start + self.len) as usize
    }
}

/// A possible merge: the lower the priority value the sooner; `id` is what results.
#[derive(Clone, Copy)]
pub(super) struct Merge {
    pub priority: u32,
    pub id: TokenId,
}

const NONE: u32 = u32::MAX;
/// Longest word (in symbols) that is merged by scanning, which is quadratic but keeps no heap: covers nearly all words.
const SCAN_MAX: usize = 24;

#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Queued {
    priority: u32,
    left: u32,
    right: u32,
    /// Length of both; differs from their present length once either has changed.
    len: u32,
    id: TokenId,
}

/// Scratch memory for merging, reused between words.
#[derive(Default)]
pub(super) struct Merger {
    pub symbols: Vec<Symbol>,
    merges: Vec<Option<Merge>>,
    links: Vec<(u32, u32)>,
    queue: BinaryHeap<Reverse<Queued>>,
}

impl Merger {
    /// Merges `symbols` until no pair has a merge.
    pub(super) fn run(&mut self, find: impl Fn(&Symbol, &Symbol) -> Option<Merge>) {
        match self.symbols.len() {
            0 | 1 => {}
            2..=SCAN_MAX => self.scan(find),
            _ => self.run_queue(find),
        }
    }

    fn scan(&mut self, find: impl Fn(&Symbol, &Symbol) -> Option<Merge>) {
        let Merger { symbols, merges, .. } = self;
        merges.clear();
        merges.extend(symbols.windows(2).map(|pair| find(&pair[0], &pair[1])));
        while let Some((i, merge)) = merges
            .iter()
            .enumerate()
            .filter_map(|(i, merge)| merge.map(|merge| (i, merge)))
            .min_by_key(|&(i, merge)| (merge.priority, i))
        {
            symbols[i].len += symbols[i + 1].len;
            symbols[i].id = merge.id;
            symbols.remove(i + 1);
            merges.remove(i);
            if i > 0 {
                merges[i - 1] = find(&symbols[i - 1], &symbols[i]);
            }
            if i < merges.len() {
                merges[i] = find(&symbols[i], &symbols[i + 1]);
            }
        }
    }

    fn run_queue(&mut self, find: impl Fn(&Symbol, &Symbol) -> Option<Merge>) {
        let Merger { symbols, links, queue, .. } = self;
        let n = symbols.len() as u32;
        links.clear();
        links.extend((0..n).map(|i| (i.wrapping_sub(1), if i + 1 < n { i + 1 } else { NONE })));
        let queued = |symbols: &[Symbol], left: u32, right: u32| {
            let (l, r) = (&symbols[left as usize], &symbols[right as usize]);
            find(l, r).map(|Merge { priority, id }| {
                Reverse(Queued { priority, left, right, len: l.len + r.len, id })
            })
        };
        queue.clear();
        queue.extend((1..n).filter_map(|i| queued(symbols, i - 1, i)));
        while let Some(Reverse(Queued { left, right, len, id, .. })) = queue.pop() {
            let (l, r) = (symbols[left as usize], symbols[right as usize]);
            // A symbol that was merged away has no length. One that grew has another length than it was queued with,
            // and one that grew to the right has swallowed its right neighbour.
            if l.len == 0 || r.len == 0 || l.len + r.len != len {
                continue;
            }
            symbols[left as usize] = Symbol { len, id, ..l };
            symbols[right as usize].len = 0;
            let (before, after) = (links[left as usize].0, links[right as usize].1);
            links[left as usize].1 = after;
            if before != NONE {
                queue.extend(queued(symbols, before, left));
            }
            if after != NONE {
                links[after as usize].0 = left;
                queue.extend(queued(symbols, left, after));
            }
        }
        symbols.retain(|symbol| symbol.len > 0);
    }
}

/// Tokens of words already seen in a text: prose repeats itself.
pub(super) struct WordCache<'t> {
    text: &'t [u8],
    seen: HashTable<Seen>,
}

struct Seen {
    word: Range<u32>,
    tokens: Range<u32>,
}

impl<'t> WordCache<'t> {
    /// Longer words are rarely seen twice.
    const MAX_WORD_BYTES: usize = 48;
    /// Bounds the memory.
    const MAX_WORDS: usize = 1 << 15;

    pub(super) fn new(text: &'t [u8]) -> WordCache<'t> {
        WordCache { text, seen: HashTable::new() }
    }

    /// Appends the tokens of `text[word]`, those of an equal earlier word if there was one.
    pub(super) fn encode<E>(
        &mut self,
        word: Range<usize>,
        out: &mut Vec<TokenId>,
        encode: impl FnOnce(&'t [u8], &mut Vec<TokenId>) -> Result<(), E>,
    ) -> Result<(), E> {
        let bytes = &self.text[word.clone()];
        if !(2..=Self::MAX_WORD_BYTES).contains(&bytes.len()) {
            return encode(bytes, out);
        }
        let hashed = hash(bytes);
        let of = |seen: &Seen| &self.text[seen.word.start as usize..seen.word.end as usize];
        if let Some(seen) = self.seen.find(hashed, |seen| of(seen) == bytes) {
            out.extend_from_within(seen.tokens.start as usize..seen.tokens.end as usize);
            return Ok(());
        }
        let start = out.len();
        encode(bytes, out)?;
        if self.seen.len() < Self::MAX_WORDS {
            let seen =
                Seen { word: word.start as u32..word.end as u32, tokens: start as u32..out.len() as u32 };
            self.seen.insert_unique(hashed, seen, |seen| hash(of(seen)));
        }
        Ok(())
    }
}

/// Lengths of the characters of any bytes: what the first byte announces, cut at the end.
pub(super) fn char_lens(text: &[u8]) -> impl Iterator<Item = usize> {
    let mut pos = 0;
    core::iter::from_fn(move || {
        let len = announced_len(*text.get(pos)?).min(text.len() - pos);
        pos += len;
        Some(len)
    })
}

/// Appends the ends of the pieces of `text[start..end]`, cut before each U+2581 that follows another character.
pub(super) fn cut_before_spaces(text: &[u8], start: usize, end: usize, ends: &mut Vec<usize>) {
    let (mut pos, mut after_other) = (start, false);
    for len in char_lens(&text[start..end]) {
        let is_space = &text[pos..pos + len] == META_SPACE;
        if is_space && after_other {
            ends.push(pos);
        }
        after_other = !is_space;
        pos += len;
    }
    ends.extend((end > start).then_some(end));
}

/// Does a U+2581 follow another character? If no token has one inside, no merge crosses the cuts of
/// [`cut_before_spaces`] and the pieces can be merged each by itself.
pub(super) fn has_inner_space(token: &[u8]) -> bool {
    let mut ends = Vec::new();
    cut_before_spaces(token, 0, token.len(), &mut ends);
    ends.len() > 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::String;
    use proptest::prelude::*;

    /// All symbols are characters a..=d; a pair merges if its text is short, by a priority made of it.
    fn merge(text: &str, queue: bool) -> Vec<String> {
        let symbol = |(start, &byte): (usize, &u8)| Symbol { start: start as u32, len: 1, id: byte.into() };
        let symbols = text.as_bytes().iter().enumerate().map(symbol).collect();
        let mut merger = Merger { symbols, ..Merger::default() };
        let find = |l: &Symbol, r: &Symbol| {
            let id = l.id.wrapping_mul(31) ^ r.id.wrapping_mul(17);
            (l.len + r.len <= 5 && id % 7 > 1).then_some(Merge { priority: id % 5, id })
        };
        if queue {
            merger.run_queue(find)
        } else {
            merger.scan(find)
        }
        merger.symbols.iter().map(|symbol| text[symbol.range()].into()).collect()
    }

    proptest! {
        #[test]
        fn scan_and_queue_agree(text in "[a-d]{2,60}") {
            let scanned = merge(&text, false);
            prop_assert_eq!(scanned.concat(), text.clone());
            prop_assert_eq!(scanned, merge(&text, true));
        }
    }

    #[test]
    fn cuts_before_spaces() {
        let mut ends = Vec::new();
        let text = "▁a▁▁b▁".as_bytes();
        cut_before_spaces(text, 0, text.len(), &mut ends);
        assert_eq!(ends, [4, 11, 14]);
        assert!(has_inner_space("a▁".as_bytes()) && !has_inner_space("▁▁a".as_bytes()));
    }
}
