//! Walks byte by byte through the tokens that share a prefix: a sorted list of ids, narrowed at each step.

use alloc::vec::Vec;
use core::ops::Range;

use super::vocab::{TokenId, Vocab};

/// Some tokens of a vocabulary, sorted by their bytes.
pub(super) struct Trie(Vec<TokenId>);

/// The tokens that begin with the bytes walked so far.
#[derive(Clone)]
pub(super) struct Node {
    tokens: Range<usize>,
    depth: usize,
}

impl Trie {
    pub(super) fn new(vocab: &Vocab, tokens: impl Iterator<Item = TokenId>) -> Trie {
        let mut sorted: Vec<TokenId> = tokens.collect();
        sorted.sort_by_key(|&id| (vocab.bytes(id), core::cmp::Reverse(id)));
        Trie(sorted)
    }

    pub(super) fn root(&self) -> Node {
        Node { tokens: 0..self.0.len(), depth: 0 }
    }

    /// One byte further, if any token goes on with it.
    pub(super) fn step(&self, vocab: &Vocab, node: Node, byte: u8) -> Option<Node> {
        let (Node { tokens, depth }, at) = (node.clone(), node.tokens.start);
        let narrowed = &self.0[tokens];
        let next = |id: &TokenId| vocab.bytes(*id).get(depth).map(|&next| u16::from(next));
        let start = narrowed.partition_point(|id| next(id) < Some(byte.into()));
        let end = narrowed.partition_point(|id| next(id) < Some(u16::from(byte) + 1));
        (start < end).then_some(Node { tokens: at + start..at + end, depth: depth + 1 })
    }

    /// The longest token that a text begins with, and its length. Time by the length of what is common to both.
    pub(super) fn longest(&self, vocab: &Vocab, text: &[u8]) -> Option<(TokenId, usize)> {
        let (mut node, mut longest) = (self.root(), None);
        for (i, &byte) in text.iter().enumerate() {
            let Some(next) = self.step(vocab, node, byte) else { break };
            node = next;
            longest = self.token(vocab, &node).map(|id| (id, i + 1)).or(longest);
        }
        longest
    }

    /// The token that ends here; of equal ones the last.
    pub(super) fn token(&self, vocab: &Vocab, node: &Node) -> Option<TokenId> {
        self.0.get(node.tokens.start).copied().filter(|&id| vocab.bytes(id).len() == node.depth)
    }
}
