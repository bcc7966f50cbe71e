//! Codebooks in the two forms that machines look them up in: entries for loads, byte planes for permutations.
//!
//! A machine that permutes bytes across registers ([`super::vector::Simd::codewords`] on AVX-512 VBMI) looks 64 indices
//! up at once, a plane of entry bytes at a time; any other loads entry by entry.

use quant::codebook;

/// A codebook: `256·PAGES` entries of `WORDS` code words of four bytes.
pub(super) struct Codebook<const PAGES: usize, const WORDS: usize> {
    /// `[entry][WORDS]`
    pub entries: &'static [[[u8; 4]; WORDS]],
    /// `[WORDS][4]`: byte `b` of word `w` of all entries, `[PAGES][256]`.
    pub planes: &'static [[[[u8; 256]; PAGES]; 4]; WORDS],
}

/// Entries as bytes, from words of any width.
macro_rules! book {
    ($name:ident, $source:ident, $pages:literal, $words:literal) => {
        #[doc = concat!("[`codebook::", stringify!($source), "`]")]
        pub(super) static $name: Codebook<$pages, $words> = {
            static ENTRIES: [[[u8; 4]; $words]; 256 * $pages] = {
                let mut entries = [[[0; 4]; $words]; 256 * $pages];
                let mut e = 0;
                while e < entries.len() {
                    let bytes = codebook::$source[e].to_le_bytes();
                    let mut i = 0;
                    while i < bytes.len() {
                        entries[e][i / 4][i % 4] = bytes[i];
                        i += 1;
                    }
                    e += 1;
                }
                entries
            };
            static PLANES: [[[[u8; 256]; $pages]; 4]; $words] = {
                let mut planes = [[[[0; 256]; $pages]; 4]; $words];
                let mut e = 0;
                while e < ENTRIES.len() {
                    let mut i = 0;
                    while i < 4 * $words {
                        planes[i / 4][i % 4][e / 256][e % 256] = ENTRIES[e][i / 4][i % 4];
                        i += 1;
                    }
                    e += 1;
                }
                planes
            };
            Codebook { entries: &ENTRIES, planes: &PLANES }
        };
    };
}

book!(IQ2_XXS, IQ2_XXS, 1, 2);
book!(IQ2_XS, IQ2_XS, 2, 2);
book!(IQ2_S, IQ2_S, 4, 2);
book!(IQ3_XXS, IQ3_XXS, 1, 1);
book!(IQ3_S, IQ3_S, 2, 1);
book!(IQ1, IQ1, 8, 1);

/// The entries of `64·n` indices, one load each: the definition of [`super::vector::Simd::codewords`].
///
/// Compiled on its own on purpose: with the features of AVX-512 it becomes gathers, which are slower.
///
/// # Safety
/// * As [`super::vector::Simd::codewords`].
#[inline(never)]
pub(super) unsafe fn load_entries<const PAGES: usize, const WORDS: usize>(
    book: &Codebook<PAGES, WORDS>,
    low: *const u8,
    high: *const u8,
    n: usize,
    out: *mut u8,
) {
    assert!(book.entries.len() == 256 * PAGES);
    for column in 0..4 * n {
        for row in 0..16 {
            // SAFETY: indices are readable and below `256·PAGES`, code words writable, by this function's contract.
            unsafe {
                let at = column / 4 * 64 + 4 * row + column % 4;
                let page = if PAGES == 1 { 0 } else { *high.add(at) as usize };
                let entry = book.entries.get_unchecked(256 * page + *low.add(at) as usize);
                for (w, word) in entry.iter().enumerate() {
                    out.add((column * WORDS + w) * 64 + 4 * row).cast::<[u8; 4]>().write(*word);
                }
            }
        }
    }
}
