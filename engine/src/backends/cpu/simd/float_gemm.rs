//! Float formats times f32 activations: k in lanes, a tile of rows by tokens in registers.
//!
//! Every (row, token) pair has 16 partial sums by k mod 16 and the tree of [`Simd::reduce_add4`]; the last k is padded
//! with zeros. The order is the same in every tile shape.

use quant::FormatId;

use super::operands::{Rows, Store};
use super::panel::FAR_BYTES;
use super::vector::{Simd, SimdOp};

/// How far a single token's stream of rows is fetched ahead (measured: half of it is slower, twice is no faster).
const STREAM_AHEAD_BYTES: usize = 8192;

/// Rows `first_row..first_row + n_rows` of a weight by tokens `first_token..first_token + tokens`.
///
/// *Maker must*: give these rows, `stride` bytes apart, of the activations' `k` elements; a store for these rows and
/// tokens.
pub(super) struct FloatJob<'a> {
    pub format: FormatId,
    pub weight: *const u8,
    pub stride: usize,
    pub first_row: usize,
    pub n_rows: usize,
    pub first_token: usize,
    pub tokens: usize,
    pub x: Rows<'a>,
    pub store: Store<'a>,
}

impl SimdOp for FloatJob<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.format {
            FormatId::F32 => self.rows::<S, 0>(s),
            FormatId::F16 => self.rows::<S, 1>(s),
            _ => self.rows::<S, 2>(s),
        }
    }
}

impl FloatJob<'_> {
    /// Tokens outermost, so that a tile's activations stay in the first-level cache while the job's rows go by.
    #[inline(always)]
    fn rows<S: Simd, const KIND: usize>(&self, s: S) {
        let mut t = 0;
        while t < self.tokens {
            t += match self.tokens - t {
                4.. if S::WIDE => self.row_tiles::<S, KIND, 4>(s, t),
                3.. if !S::WIDE => self.row_tiles::<S, KIND, 3>(s, t),
                2.. => self.row_tiles::<S, KIND, 2>(s, t),
                _ => self.row_tiles::<S, KIND, 1>(s, t),
            };
        }
    }

    #[inline(always)]
    fn row_tiles<S: Simd, const KIND: usize, const T: usize>(&self, s: S, token: usize) -> usize {
        let x: [*const f32; T] = core::array::from_fn(|t| self.x.x(self.first_token + token + t).as_ptr());
        // The first tile of tokens reads the weights from memory, the others from the cache.
        let ahead = if token == 0 { self.stride } else { 0 };
        let mut row = 0;
        while row < self.n_rows {
            let w = |r: usize| self.weight.wrapping_add((self.first_row + row + r) * self.stride);
            // Wide machines have registers for four rows; two registers a vector leave room for two.
            let rows = match self.n_rows - row {
                4.. if S::WIDE || T == 1 => {
                    let sums =
                        s.call(FloatTile::<KIND, 4, T> { w: core::array::from_fn(w), x, k: self.x.k, ahead });
                    self.finish(row, token, &sums);
                    4
                }
                2.. => {
                    let sums =
                        s.call(FloatTile::<KIND, 2, T> { w: core::array::from_fn(w), x, k: self.x.k, ahead });
                    self.finish(row, token, &sums);
                    2
                }
                _ => {
                    let sums = s.call(FloatTile::<KIND, 1, T> { w: [w(0)], x, k: self.x.k, ahead });
                    self.finish(row, token, &sums);
                    1
                }
            };
            row += rows;
        }
        T
    }

    #[inline(always)]
    fn finish<const R: usize, const T: usize>(&self, row: usize, token: usize, sums: &[[f32; R]; T]) {
        for (t, sums) in sums.iter().enumerate() {
            // SAFETY: the maker's store takes every row and token of this job.
            unsafe { self.store.put(self.first_row + row, self.first_token + token + t, sums) };
        }
    }
}

/// `R` rows by `T` tokens.
struct FloatTile<const KIND: usize, const R: usize, const T: usize> {
    w: [*const u8; R],
    x: [*const f32; T],
    k: usize,
    /// Bytes from row to row if the rows come from memory and are to be prefetched; else 0.
    ahead: usize,
}

/// 16 weights of a kind: f32, f16, bf16.
///
/// # Safety
/// * 16 elements at `p` are readable.
#[inline(always)]
unsafe fn widen<S: Simd, const KIND: usize>(s: S, p: *const u8) -> S::F {
    // SAFETY: by this function's contract.
    unsafe {
        match KIND {
            0 => s.load_f32(p),
            1 => s.load_f16(p),
            _ => s.load_bf16(p),
        }
    }
}

impl<const KIND: usize, const R: usize, const T: usize> SimdOp for FloatTile<KIND, R, T> {
    type Output = [[f32; R]; T];
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> [[f32; R]; T] {
        let elem = if KIND == 0 { 4 } else { 2 };
        let mut acc = [[s.splat(0.0); R]; T];
        let whole = self.k / 16 * 16;
        // A single token reads its rows one after the other: one stream, which the machine's prefetchers follow best
        // (the sums of a row are a chain, but the next row's starts before it ends). More tokens share each load.
        let (turns, at_once) = if T == 1 { (R, 1) } else { (1, R) };
        for turn in 0..turns {
            for k in (0..whole).step_by(16) {
                // SAFETY: the maker gave `k` elements behind every pointer.
                unsafe {
                    if T == 1 && self.ahead > 0 && k * elem % 64 == 0 {
                        let line = self.w[turn].wrapping_add(k * elem);
                        s.prefetch(line.wrapping_add(STREAM_AHEAD_BYTES));
                        s.prefetch_far(line.wrapping_add(FAR_BYTES));
                    }
                    if T == 2 && self.ahead > 0 && k * elem % 64 == 0 {
                        // The rows of the next tile: rows are too short for prefetchers to catch on. With more tokens
                        // the test alone slows the loop by a sixth.
                        for w in self.w {
                            s.prefetch(w.wrapping_add(R * self.ahead + k * elem));
                        }
                    }
                    for i in 0..at_once {
                        let r = turn + i;
                        let w = widen::<S, KIND>(s, self.w[r].add(k * elem));
                        for t in 0..T {
                            acc[t][r] = s.fma(w, s.load_f32(self.x[t].add(k).cast()), acc[t][r]);
                        }
                    }
                }
            }
        }
        let rest = self.k - whole;
        if rest > 0 {
            // SAFETY: `rest` elements follow `whole` behind every pointer; the buffers hold 16.
            unsafe {
                let w: [S::F; R] = core::array::from_fn(|r| {
                    let mut padded = [0u8; 64];
                    let source = self.w[r].add(whole * elem);
                    core::ptr::copy_nonoverlapping(source, padded.as_mut_ptr(), rest * elem);
                    widen::<S, KIND>(s, padded.as_ptr())
                });
                for t in 0..T {
                    let mut padded = [0f32; 16];
                    core::ptr::copy_nonoverlapping(self.x[t].add(whole), padded.as_mut_ptr(), rest);
                    let x = s.load(&padded);
                    for r in 0..R {
                        acc[t][r] = s.fma(w[r], x, acc[t][r]);
                    }
                }
            }
        }
        let zero = s.splat(0.0);
        let mut sums = [[0.0; R]; T];
        for first in (0..R * T).step_by(4) {
            let at = |i: usize| if i < R * T { acc[i / R][i % R] } else { zero };
            let four = s.reduce_add4([at(first), at(first + 1), at(first + 2), at(first + 3)]);
            for i in first..(first + 4).min(R * T) {
                sums[i / R][i % R] = four[i - first];
            }
        }
        sums
    }
}
