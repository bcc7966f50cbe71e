//! How kernels read the tables of formats ([`quant::Lookup`]): nibbles by byte permutes, codebooks from memory
//! ([`InMemory`]) or, where every weight of a product needs them, from shared memory ([`SharedBook`]).

use quant::lookup::Book;

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
pub(crate) use device::{InMemory, SharedBook};

/// Bytes that a book and its copies take; the largest book lies there once.
const BOOK_BYTES: u32 = 8 * 1024;

/// Bytes that a format's book takes in shared memory.
pub(crate) const fn book_bytes(book: Book) -> u32 {
    if book.n_words() == 0 { 0 } else { BOOK_BYTES }
}

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod device {
    use quant::lookup::{Book, Lookup, Portable};

    use super::{BOOK_BYTES, book_bytes};

    use crate::device::{Smem, U32x2, math::prmt, thread};

    /// Sixteen bytes, two nibbles of `bytes` to each: eight permutes. A permute chooses among eight bytes by three bits of each
    /// nibble of its selector; the fourth bit chooses between two of those.
    #[inline(always)]
    fn nibbles(table: &[u8; 16], bytes: u32) -> [u32; 2] {
        let word = |i: usize| quant::bits::word(table, i);
        let low_bits = bytes & 0x7777_7777;
        // Nibble i: byte i of the first permute, or i + 4, that of the second.
        let fourth = 0x3210_3210 | (bytes >> 1) & 0x4444_4444;
        let four = |low_bits: u32, fourth: u32| {
            prmt(prmt(word(0), word(1), low_bits), prmt(word(2), word(3), low_bits), fourth)
        };
        let (a, b) = (four(low_bits, fourth), four(low_bits >> 16, fourth >> 16));
        // Each has a byte's low nibble, then its high one.
        [prmt(a, b, 0x6420), prmt(a, b, 0x7531)]
    }

    /// A permute each, where a shift and a mask would take two places in the pipe that unpacking fills first.
    #[inline(always)]
    fn bytes(word: u32) -> [u32; 4] {
        [0x4440, 0x4441, 0x4442, 0x4443].map(|selector| prmt(word, 0, selector))
    }

    /// Codebooks where the compiler put them: global memory.
    #[derive(Clone, Copy)]
    pub(crate) struct InMemory;

    impl Lookup for InMemory {
        #[inline(always)]
        fn nibbles(self, table: &[u8; 16], bytes: u32) -> [u32; 2] {
            nibbles(table, bytes)
        }
        #[inline(always)]
        fn octet(self, book: &'static [u64], i: usize) -> [u32; 2] {
            Portable.octet(book, i)
        }
        #[inline(always)]
        fn word(self, book: &'static [u32], i: usize) -> u32 {
            Portable.word(book, i)
        }
        #[inline(always)]
        fn bytes(self, word: u32) -> [u32; 4] {
            bytes(word)
        }
    }

    /// A format's codebook in shared memory: lanes read different entries, which costs global loads a tag look-up per line,
    /// shared memory only the conflicts of its banks. Small books lie there several times over, neighbouring lanes reading
    /// different copies, so that fewer lanes compete for a bank (two to a bank instead of three and a half, for 256 entries).
    #[derive(Clone, Copy)]
    pub(crate) struct SharedBook {
        words: Smem<u32>,
        copies: u32,
        copy: u32,
    }

    impl SharedBook {
        /// Copies the book to this offset of the CTA's shared memory. All threads call; entries can be read after the CTA's next
        /// barrier.
        #[inline(always)]
        #[track_caller]
        pub(crate) fn fill(book: Book, offset: u32) -> SharedBook {
            let words: Smem<u32> = Smem::dynamic(offset, book_bytes(book) / 4);
            let copies = if book.n_words() == 0 { 1 } else { BOOK_BYTES / 4 / book.n_words() as u32 };
            // Copies of an entry lie side by side.
            let mut i = thread::thread_idx_x();
            match book {
                Book::None => {}
                Book::Octets(book) => {
                    while i < book.len() as u32 * copies {
                        let octet = book[(i / copies) as usize];
                        words.cast::<U32x2>().st(i, U32x2([octet as u32, (octet >> 32) as u32]));
                        i += thread::block_dim_x();
                    }
                }
                Book::Words(book) => {
                    while i < book.len() as u32 * copies {
                        words.st(i, book[(i / copies) as usize]);
                        i += thread::block_dim_x();
                    }
                }
            }
            SharedBook { words, copies, copy: thread::lane_id() % copies }
        }
    }

    impl Lookup for SharedBook {
        #[inline(always)]
        fn nibbles(self, table: &[u8; 16], bytes: u32) -> [u32; 2] {
            nibbles(table, bytes)
        }
        #[inline(always)]
        #[track_caller]
        fn octet(self, _: &'static [u64], i: usize) -> [u32; 2] {
            self.words.cast::<U32x2>().ld(i as u32 * self.copies + self.copy).0
        }
        #[inline(always)]
        #[track_caller]
        fn word(self, _: &'static [u32], i: usize) -> u32 {
            self.words.ld(i as u32 * self.copies + self.copy)
        }
        #[inline(always)]
        fn bytes(self, word: u32) -> [u32; 4] {
            bytes(word)
        }
    }
}
