//! Looking things up while unpacking: the one part of it in which processors differ so much that it is worth a choice.
//!
//! A format with a table reads it through a [`Lookup`]. [`Portable`] reads memory; the GPU kernels have one that uses byte
//! permutes and a copy of the codebook in shared memory. All give the same values.

use crate::codebook::halves;

/// Reads tables.
pub trait Lookup: Copy {
    /// For each byte of `bytes`, the entry of its low nibble; then the same for the high nibbles. Entries are bytes.
    fn nibbles(self, table: &[u8; 16], bytes: u32) -> [u32; 2];
    /// Entry `i` of the format's codebook of octets ([`Book::Octets`]).
    fn octet(self, book: &'static [u64], i: usize) -> [u32; 2];
    /// Entry `i` of the format's codebook of words ([`Book::Words`]).
    fn word(self, book: &'static [u32], i: usize) -> u32;
    /// The four bytes of a word, as numbers.
    fn bytes(self, word: u32) -> [u32; 4];
}

/// Reads tables where they are.
#[derive(Clone, Copy, Debug)]
pub struct Portable;

impl Lookup for Portable {
    #[inline(always)]
    fn nibbles(self, table: &[u8; 16], bytes: u32) -> [u32; 2] {
        let entries = |shift: u32| {
            u32::from_le_bytes(bytes.to_le_bytes().map(|byte| table[(byte >> shift) as usize & 0xf]))
        };
        [entries(0), entries(4)]
    }

    #[inline(always)]
    fn octet(self, book: &'static [u64], i: usize) -> [u32; 2] {
        halves(book[i])
    }

    #[inline(always)]
    fn word(self, book: &'static [u32], i: usize) -> u32 {
        book[i]
    }

    #[inline(always)]
    fn bytes(self, word: u32) -> [u32; 4] {
        word.to_le_bytes().map(u32::from)
    }
}

/// The codebook that a format reads by [`Lookup::octet`] or [`Lookup::word`]: one format, one codebook.
#[derive(Clone, Copy, Debug)]
pub enum Book {
    /// None.
    None,
    /// Entries of eight bytes.
    Octets(&'static [u64]),
    /// Entries of four bytes.
    Words(&'static [u32]),
}

impl Book {
    /// Words of the whole book.
    pub const fn n_words(self) -> usize {
        match self {
            Book::None => 0,
            Book::Octets(book) => 2 * book.len(),
            Book::Words(book) => book.len(),
        }
    }
}
