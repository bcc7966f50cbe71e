//! RWKV's world tokenizer (`rwkv`): the longest token at each place. Tokens are stored with C-like escapes.

use alloc::vec::Vec;

use super::TokenizerError;
use super::trie::Trie;
use super::vocab::{TokenAttr, TokenId, Vocab};

pub(super) struct Rwkv {
    /// The tokens without escapes, same ids.
    plain: Vocab,
    trie: Trie,
}

impl Rwkv {
    pub(super) fn new(vocab: &Vocab) -> Result<Rwkv, TokenizerError> {
        let tokens: Vec<Vec<u8>> = vocab.ids().map(|id| unescape(vocab.bytes(id))).collect();
        let plain = Vocab::new(tokens.iter().map(Vec::as_slice), |_| TokenAttr::NORMAL, Vec::new())?;
        let trie = Trie::new(&plain, plain.ids());
        Ok(Rwkv { plain, trie })
    }

    /// Bytes of a token without escapes.
    pub(super) fn bytes(&self, id: TokenId) -> &[u8] {
        self.plain.bytes(id)
    }

    /// Appends the tokens of a fragment without special tokens.
    pub(super) fn encode(
        &self,
        fragment: &[u8],
        unknown: Option<TokenId>,
        out: &mut Vec<TokenId>,
    ) -> Result<(), TokenizerError> {
        let mut pos = 0;
        while pos < fragment.len() {
            let longest = self.trie.longest(&self.plain, &fragment[pos..]);
            let unknown = unknown.map(|id| (id, 1));
            let (id, len) = longest.or(unknown).ok_or(TokenizerError::NoByteToken { byte: fragment[pos] })?;
            out.push(id);
            pos += len;
        }
        Ok(())
    }
}

fn unescape(token: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(token.len());
    let mut bytes = token.iter();
    while let Some(&byte) = bytes.next() {
        if byte != b'\\' {
            plain.push(byte);
            continue;
        }
        match bytes.next() {
            Some(b't') => plain.push(b'\t'),
            Some(b'n') => plain.push(b'\n'),
            Some(b'r') => plain.push(b'\r'),
            Some(b'x') => {
                let digit = |byte: Option<&u8>| byte.and_then(|&byte| char::from(byte).to_digit(16));
                if let (Some(high), Some(low)) = (digit(bytes.next()), digit(bytes.next())) {
                    plain.push((high << 4 | low) as u8);
                }
            }
            Some(&other) => plain.push(other),
            None => {}
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn longest_token_wins_and_escapes_are_read() {
        let tokens: [&[u8]; 5] = [b"a", b"ab", b"abcd", br"\n", br"\xe4\xbd"];
        let vocab = Vocab::new(tokens.into_iter(), |_| TokenAttr::NORMAL, Vec::new()).unwrap();
        let rwkv = Rwkv::new(&vocab).unwrap();
        let mut out = Vec::new();
        rwkv.encode(b"abca\n\xe4\xbdabcd", Some(9), &mut out).unwrap();
        assert_eq!(out, [1, 9, 0, 3, 4, 2]);
        assert_eq!(rwkv.encode(b"z", None, &mut out), Err(TokenizerError::NoByteToken { byte: b'z' }));
    }
}
