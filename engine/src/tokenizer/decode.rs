//! From token ids back to bytes: pieces, whole texts, and a stream that never splits a character.

use alloc::borrow::Cow;
use alloc::string::String;
use alloc::vec::Vec;

use super::special::{is_not_text, is_special};
use super::unicode::{META_SPACE, char_to_byte, code_points, push_code_point};
use super::vocab::{TokenAttr, TokenId};
use super::{Model, Tokenizer};

/// How a whole text is decoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DecodeOptions {
    /// Leave out the beginning- and end-of-sequence tokens that encoding adds.
    pub remove_special: bool,
    /// Write control and unknown tokens as their names; otherwise they are left out.
    pub unparse_special: bool,
}

impl Tokenizer {
    /// The bytes that a token stands for; with `special` also those of control and unknown tokens. Empty for an id
    /// outside the vocabulary.
    pub fn piece(&self, id: TokenId, special: bool) -> Cow<'_, [u8]> {
        let (bytes, attr) = (self.vocab.bytes(id), self.vocab.attr(id));
        if !special && is_not_text(attr) {
            return Cow::Borrowed(&[]);
        }
        match &self.model {
            Model::Rwkv(rwkv) => Cow::Borrowed(rwkv.bytes(id)),
            _ if is_special(attr) => Cow::Borrowed(bytes),
            Model::Bpe(bpe) if attr.is_any(TokenAttr::NORMAL) && !bpe.escapes_spaces() => {
                Cow::Owned(bytes_of_characters(bytes))
            }
            _ if attr.is_any(TokenAttr::NORMAL) => unescape_spaces(bytes),
            _ if attr.is_any(TokenAttr::BYTE) => Cow::Owned(byte_of_name(bytes).into_iter().collect()),
            _ => Cow::Borrowed(&[]),
        }
    }

    /// The text of a sequence of tokens.
    pub fn decode(&self, mut ids: &[TokenId], options: DecodeOptions) -> Vec<u8> {
        let mut remove_space = self.add_space_prefix;
        if options.remove_special
            && self.add_bos
            && !ids.is_empty()
            && ids.first().copied() == self.special.bos
        {
            ids = &ids[1..];
            remove_space = false;
        }
        if options.remove_special
            && self.add_eos
            && !ids.is_empty()
            && ids.last().copied() == self.special.eos
        {
            ids = &ids[..ids.len() - 1];
        }
        let mut text = Vec::new();
        for &id in ids {
            let piece = self.piece(id, options.unparse_special);
            let skipped = usize::from(core::mem::take(&mut remove_space) && piece.first() == Some(&b' '));
            text.extend_from_slice(&piece[skipped..]);
        }
        if self.clean_spaces { clean_up_spaces(text) } else { text }
    }

    /// A decoder for tokens that arrive one by one; `special` as in [`Tokenizer::piece`].
    pub fn stream(&self, special: bool) -> StreamDecoder<'_> {
        StreamDecoder { tokenizer: self, special, pending: Vec::new(), text: String::new() }
    }
}

/// Turns tokens into text as they come. Bytes of a character not yet complete wait for the next token; bytes that can
/// become no character turn into U+FFFD.
pub struct StreamDecoder<'t> {
    tokenizer: &'t Tokenizer,
    special: bool,
    pending: Vec<u8>,
    text: String,
}

impl StreamDecoder<'_> {
    /// Adds a token and gives the characters that are complete now.
    pub fn push(&mut self, id: TokenId) -> &str {
        self.pending.extend_from_slice(&self.tokenizer.piece(id, self.special));
        self.take(false)
    }

    /// Gives what is left, an incomplete character as U+FFFD, and is ready for another text.
    pub fn finish(&mut self) -> &str {
        self.take(true)
    }

    fn take(&mut self, all: bool) -> &str {
        self.text.clear();
        let mut kept = 0;
        for chunk in self.pending.utf8_chunks() {
            self.text.push_str(chunk.valid());
            let invalid = chunk.invalid();
            if !all && ends_with(&self.pending, invalid) && is_incomplete(invalid) {
                kept = invalid.len();
            } else if !invalid.is_empty() {
                self.text.push(char::REPLACEMENT_CHARACTER);
            }
        }
        self.pending.drain(..self.pending.len() - kept);
        &self.text
    }
}

/// Is `tail` the very end of `bytes` (not merely equal to it)?
fn ends_with(bytes: &[u8], tail: &[u8]) -> bool {
    !tail.is_empty() && core::ptr::eq(bytes.as_ptr_range().end, tail.as_ptr_range().end)
}

/// Could more bytes make this a character?
fn is_incomplete(bytes: &[u8]) -> bool {
    core::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}

fn unescape_spaces(bytes: &[u8]) -> Cow<'_, [u8]> {
    if !bytes.windows(META_SPACE.len()).any(|part| part == META_SPACE) {
        return Cow::Borrowed(bytes);
    }
    let (mut text, mut rest) = (Vec::with_capacity(bytes.len()), bytes);
    while let [first, tail @ ..] = rest {
        match rest.strip_prefix(META_SPACE) {
            Some(tail) => {
                text.push(b' ');
                rest = tail;
            }
            None => {
                text.push(*first);
                rest = tail;
            }
        }
    }
    Cow::Owned(text)
}

/// Longest token that is repeated for each of its characters: else what a token prints grows with its square.
const MAX_SHOWN_BYTES: usize = 256;

/// The bytes that a token of byte characters stands for. A character that stands for no byte is spelt out as
/// llama.cpp spells it.
fn bytes_of_characters(token: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(token.len());
    for c in code_points(token) {
        if let Some(byte) = char_to_byte(c) {
            bytes.push(byte);
            continue;
        }
        let mut character = Vec::new();
        push_code_point(&mut character, c);
        bytes.extend_from_slice(b"[UNK_BYTE_0x");
        for byte in character {
            bytes.extend([byte >> 4, byte & 15].map(|digit| b"0123456789abcdef"[usize::from(digit)]));
        }
        // llama.cpp writes the whole token at each of its characters that stand for no byte.
        if token.len() <= MAX_SHOWN_BYTES {
            bytes.extend_from_slice(token);
        }
        bytes.push(b']');
    }
    bytes
}

/// The byte of a token `<0xXX>`.
fn byte_of_name(name: &[u8]) -> Option<u8> {
    let digits = core::str::from_utf8(name.get(3..5)?).ok()?;
    u8::from_str_radix(digits, 16).ok()
}

/// Hugging Face's clean-up as llama.cpp does it: no space before `?!.,`, none around a lone apostrophe, none before
/// `'s 'm 're 've`. A space that a pass has removed no longer counts as one, one that it will remove still does.
fn clean_up_spaces(text: Vec<u8>) -> Vec<u8> {
    let mut cleaned = Vec::with_capacity(text.len());
    for (i, &byte) in text.iter().enumerate() {
        if i > 0 && text[i - 1] == b' ' && matches!(byte, b'?' | b'!' | b'.' | b',') {
            cleaned.pop();
        }
        cleaned.push(byte);
    }
    let text = core::mem::replace(&mut cleaned, Vec::with_capacity(text.len()));
    let (mut i, mut before) = (0, 0);
    while i < text.len() {
        let is_lone = before == b' ' && text[i] == b'\'' && text.get(i + 1) == Some(&b' ');
        if is_lone {
            cleaned.pop();
        }
        cleaned.push(text[i]);
        // A removed space behind the apostrophe is skipped and is no space to what follows.
        before = if is_lone { 0 } else { text[i] };
        i += 1 + usize::from(is_lone);
    }
    let text = core::mem::replace(&mut cleaned, Vec::with_capacity(text.len()));
    for (i, &byte) in text.iter().enumerate() {
        let joins = matches!(text.get(i + 1..), Some([b's' | b'm', ..] | [b'r' | b'v', b'e', ..]));
        if i > 0 && text[i - 1] == b' ' && byte == b'\'' && joins {
            cleaned.pop();
        }
        cleaned.push(byte);
    }
    cleaned
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spaces_are_cleaned_up() {
        let clean = |text: &str| String::from_utf8(clean_up_spaces(text.into())).unwrap();
        assert_eq!(clean("a , b . c !"), "a, b. c!");
        assert_eq!(clean("it 's we 're I 'm he 'll do n't"), "it's we're I'm he 'll do n't");
        assert_eq!(clean("a ' b ' ' c"), "a'b'' c");
        assert_eq!(clean(" ."), ".");
        assert_eq!(clean(" '"), " '");
        assert_eq!(clean(""), "");
    }

    #[test]
    fn long_tokens_of_no_bytes_stay_in_proportion() {
        let token = "中".repeat(5000);
        assert!(bytes_of_characters(token.as_bytes()).len() <= 8 * token.len());
    }

    #[test]
    fn byte_characters_are_read() {
        assert_eq!(bytes_of_characters("Ġhi".as_bytes()), b" hi");
        assert_eq!(bytes_of_characters("a中".as_bytes()), "a[UNK_BYTE_0xe4b8ada中]".as_bytes());
        assert_eq!(byte_of_name(b"<0x0A>"), Some(10));
        assert_eq!(byte_of_name(b"<x>"), None);
        assert_eq!(&*unescape_spaces("▁a▁▁b".as_bytes()), b" a  b");
    }
}
