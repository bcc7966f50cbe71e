//! Code points: decoding as llama.cpp decodes, general categories, case and accent folding.
//!
//! Text inside the tokenizer is *normalised*: every code point is in its shortest UTF-8 form, surrogates included (three
//! bytes), nothing is above U+10FFFF. [`normalize`] makes such bytes from any bytes; valid UTF-8 is left as it is.
//! The rules for bad input are those of llama.cpp's src/unicode.cpp: a byte that starts no sequence becomes U+FFFD,
//! overlong forms decode, and so do surrogates.

use alloc::borrow::Cow;
use alloc::vec::Vec;

use super::unicode_data::{FLAGS, LOWERCASE, NFD_BASE, Run};

/// Categories of a code point: one bit for the first letter of its general category, one for White_Space.
pub(super) type Flags = u16;
pub(super) const NUMBER: Flags = 0x02;
pub(super) const LETTER: Flags = 0x04;
pub(super) const MARK: Flags = 0x10;
pub(super) const PUNCTUATION: Flags = 0x20;
pub(super) const SYMBOL: Flags = 0x40;
pub(super) const CONTROL: Flags = 0x80;
pub(super) const WHITESPACE: Flags = 0x100;

/// What stands for bytes that are no character.
pub(super) const REPLACEMENT: u32 = 0xFFFD;
/// The visible space of SentencePiece vocabularies, U+2581.
pub(super) const META_SPACE: &[u8] = "\u{2581}".as_bytes();

const FLAG_BITS: u32 = 11;
const ASCII_FLAGS: [Flags; 128] = {
    let (mut flags, mut range, mut c) = ([0; 128], 0, 0);
    while c < 128 {
        while range + 1 < FLAGS.len() && FLAGS[range + 1] >> FLAG_BITS <= c as u32 {
            range += 1;
        }
        flags[c] = (FLAGS[range] & ((1 << FLAG_BITS) - 1)) as Flags;
        c += 1;
    }
    flags
};

/// Categories of `c`; never zero.
pub(super) fn flags(c: u32) -> Flags {
    match ASCII_FLAGS.get(c as usize) {
        Some(&flags) => flags,
        None => {
            let after = FLAGS.partition_point(|range| range >> FLAG_BITS <= c);
            (FLAGS[after - 1] & ((1 << FLAG_BITS) - 1)) as Flags
        }
    }
}

fn run_of(table: &'static [Run], c: u32) -> Option<(Run, u32)> {
    let run = table[..table.partition_point(|run| run.0 <= c)].last()?;
    let offset = c - run.0;
    (offset.is_multiple_of(run.2) && offset / run.2 < run.1).then_some((*run, offset))
}

/// Lower case of `c` where that is one code point, else its first.
pub(super) fn lowercase(c: u32) -> u32 {
    run_of(LOWERCASE, c).map_or(c, |(run, offset)| run.3 + offset)
}

/// The base character of `c`: the first code point of its canonical decomposition.
pub(super) fn nfd_base(c: u32) -> u32 {
    run_of(NFD_BASE, c).map_or(c, |(run, _)| run.3)
}

/// White space in C's "C" locale.
pub(super) fn is_c_space(byte: u8) -> bool {
    byte == b' ' || (9..=13).contains(&byte)
}

/// Length that a first byte announces; 1 for a byte that may not come first.
pub(super) fn announced_len(first: u8) -> usize {
    match first {
        0xF0.. => 4,
        0xE0.. => 3,
        0xC0.. => 2,
        _ => 1,
    }
}

/// The code point at `pos` of any bytes and the bytes it takes; `None` if there is none.
pub(super) fn decode_any(bytes: &[u8], pos: usize) -> Option<(u32, usize)> {
    let first = *bytes.get(pos)?;
    let (len, high_bits) = match first {
        0..0x80 => return Some((first.into(), 1)),
        0xC0..0xE0 => (2, first & 0x1F),
        0xE0..0xF0 => (3, first & 0x0F),
        0xF0..0xF8 => (4, first & 0x07),
        _ => return None,
    };
    let mut c = u32::from(high_bits);
    for &byte in bytes.get(pos + 1..pos + len)? {
        if byte & 0xC0 != 0x80 {
            return None;
        }
        c = c << 6 | u32::from(byte & 0x3F);
    }
    (c <= 0x10_FFFF).then_some((c, len))
}

/// The code point at `pos` of normalised text; `pos` is at a character and inside the text.
pub(super) fn decode(text: &[u8], pos: usize) -> (u32, usize) {
    let first = text[pos];
    if first < 0x80 {
        return (first.into(), 1);
    }
    decode_any(text, pos).unwrap_or((REPLACEMENT, 1))
}

/// Code points of any bytes, each bad byte being U+FFFD.
pub(super) fn code_points(bytes: &[u8]) -> impl Iterator<Item = u32> {
    let mut pos = 0;
    core::iter::from_fn(move || {
        bytes.get(pos)?;
        let (c, len) = decode_any(bytes, pos).unwrap_or((REPLACEMENT, 1));
        pos += len;
        Some(c)
    })
}

/// Appends the UTF-8 form of `c`, which may be a surrogate.
pub(super) fn push_code_point(out: &mut Vec<u8>, c: u32) {
    match char::from_u32(c) {
        Some(c) => out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        None => out.extend_from_slice(&[
            0xE0 | (c >> 12 & 0x0F) as u8,
            0x80 | (c >> 6 & 0x3F) as u8,
            0x80 | (c & 0x3F) as u8,
        ]),
    }
}

/// Any bytes as normalised text. llama.cpp throws on code points above U+10FFFF here; we treat them as bad bytes.
pub(super) fn normalize(bytes: &[u8]) -> Cow<'_, [u8]> {
    if core::str::from_utf8(bytes).is_ok() {
        return Cow::Borrowed(bytes);
    }
    let mut text = Vec::with_capacity(bytes.len() + 16);
    code_points(bytes).for_each(|c| push_code_point(&mut text, c));
    Cow::Owned(text)
}

/// The character that byte-level BPE writes for each byte (GPT-2's table): printable Latin-1 stands for itself, the
/// other 68 bytes follow from U+0100 on.
pub(super) const BYTE_TO_CHAR: [u16; 256] = {
    let (mut table, mut next, mut byte) = ([0; 256], 256, 0);
    while byte < 256 {
        table[byte] = if matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) {
            byte as u16
        } else {
            next += 1;
            next - 1
        };
        byte += 1;
    }
    table
};

/// Inverse of [`BYTE_TO_CHAR`]; -1 where a character stands for no byte.
const CHAR_TO_BYTE: [i16; 324] = {
    let (mut table, mut byte) = ([-1; 324], 0);
    while byte < 256 {
        table[BYTE_TO_CHAR[byte] as usize] = byte as i16;
        byte += 1;
    }
    table
};

/// The byte a character of a byte-level token stands for.
pub(super) fn char_to_byte(c: u32) -> Option<u8> {
    CHAR_TO_BYTE.get(c as usize).and_then(|&byte| u8::try_from(byte).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn categories() {
        for (c, want) in [
            ('a', LETTER),
            ('é', LETTER),
            ('中', LETTER),
            ('٣', NUMBER),
            ('½', NUMBER),
            ('\u{301}', MARK),
            ('!', PUNCTUATION),
            ('$', SYMBOL),
            ('😀', SYMBOL),
            ('\u{200D}', CONTROL),
        ] {
            assert_eq!(flags(c as u32), want, "{c:?}");
        }
        assert_eq!(flags(0x85), CONTROL | WHITESPACE);
        assert_ne!(flags(0x3000) & WHITESPACE, 0);
        assert_eq!(flags(0x10_FFFF), 1, "unassigned");
        assert_eq!(flags(0xD800), CONTROL);
        for c in 0..0x11_0000 {
            let std_space = char::from_u32(c).is_some_and(char::is_whitespace);
            assert_eq!(flags(c) & WHITESPACE != 0, std_space, "U+{c:04X}");
        }
    }

    #[test]
    fn folding() {
        assert_eq!(lowercase('A' as u32), 'a' as u32);
        assert_eq!(lowercase('[' as u32), '[' as u32);
        assert_eq!(lowercase('Ž' as u32), 'ž' as u32);
        assert_eq!(lowercase('ž' as u32), 'ž' as u32);
        assert_eq!(lowercase('İ' as u32), 'i' as u32);
        assert_eq!(nfd_base('é' as u32), 'e' as u32);
        assert_eq!(nfd_base('각' as u32), 'ᄀ' as u32);
        assert_eq!(nfd_base('x' as u32), 'x' as u32);
        for c in (0..0x1C80).filter_map(char::from_u32).filter(|c| c.to_lowercase().count() == 1) {
            assert_eq!(Some(lowercase(c as u32)), c.to_lowercase().next().map(u32::from), "{c:?}");
        }
    }

    #[test]
    fn bad_bytes() {
        let normalized = |bytes: &[u8]| normalize(bytes).into_owned();
        assert_eq!(normalized(b"a\xFFb"), "a\u{FFFD}b".as_bytes());
        assert_eq!(normalized(b"\xE2\x82"), "\u{FFFD}\u{FFFD}".as_bytes());
        assert_eq!(normalized(b"\xC0\x80"), b"\0");
        assert_eq!(normalized(b"\xED\xA0\x80"), b"\xED\xA0\x80");
        assert_eq!(normalized(b"\xF4\x90\x80\x80"), "\u{FFFD}".repeat(4).as_bytes());
    }

    #[test]
    fn byte_characters_are_a_bijection() {
        for byte in 0..=255u8 {
            assert_eq!(char_to_byte(BYTE_TO_CHAR[byte as usize].into()), Some(byte));
        }
        assert_eq!(BYTE_TO_CHAR[b' ' as usize], 'Ġ' as u16);
        assert_eq!(char_to_byte(0x20), None);
    }
}
