//! Block formats times quantised activations: the tile kernel and the job around it.
//!
//! Rows lie in lanes, so scales need no broadcast and there is no horizontal sum. A job is a run of panels by a run of
//! token tiles: per chunk of k and panel, unpack once into the first-level cache, then go over all tiles, with the
//! partial sums of all (row, token) pairs of the job kept aside between chunks.

use core::marker::PhantomData;

use quant::BlockFormat;
use quant::format::GROUP;

use super::act::{Cell, Tiles, tile_max};
use super::operands::Store;
use super::panel::{CODE_BYTES, Panel, ROWS};
use super::row_dot::{self, RowDots};
use super::scratch::{Line, take};
use super::unpack::Unpack;
use super::vector::{Simd, SimdOp, pair_sums};

/// Groups of a chunk of k: codes and scales of 48 groups are 28 KB of first-level cache. A multiple of 8, so that
/// super-blocks stay whole.
pub(super) const CHUNK_GROUPS: usize = 48;
/// Panels of a job.
pub(super) const JOB_PANELS: usize = 8;
/// Tokens of a job: a chunk's activations (3 KB each) stay in the second-level cache while panels go by.
pub(super) const JOB_TOKENS: usize = 128;
/// Private memory of a worker.
pub(super) const WORKER_BYTES: usize = CHUNK_GROUPS * (CODE_BYTES + 4 * 64)
    + JOB_PANELS * JOB_TOKENS * 64
    + CHUNK_GROUPS * ROWS * MAX_GROUP_BYTES
    + 1024;
/// Bytes of 32 weights in the widest block format, rounded up (Q8_K: 292 per 256).
const MAX_GROUP_BYTES: usize = 37;

/// One tile of tokens by one panel over a chunk of k.
struct Tile<const T: usize, const CLASS: usize, const HALVES: usize, const OFFSET: bool> {
    panel: Panel,
    groups: usize,
    /// `[groups][T]`
    cells: *const Cell,
    bias: i32,
    /// `[T]`, read unless `first`.
    acc: *mut [f32; ROWS],
    first: bool,
}

impl<const T: usize, const CLASS: usize, const HALVES: usize, const OFFSET: bool> SimdOp
    for Tile<T, CLASS, HALVES, OFFSET>
{
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut acc = [s.splat(0.0); T];
        if !self.first {
            for t in 0..T {
                // SAFETY: the maker gave `T` sums.
                acc[t] = s.load(unsafe { &*self.acc.add(t) });
            }
        }
        for g in 0..self.groups {
            // SAFETY: the maker gave `groups` groups of codes, scales, offsets and cells.
            unsafe {
                let codes = self.panel.codes.add(g * CODE_BYTES).cast_const();
                let cells: [*const Cell; T] = core::array::from_fn(|t| self.cells.add(g * T + t));
                let q: [*const i8; T] = core::array::from_fn(|t| (&raw const (*cells[t]).q).cast());
                let scale = self.panel.scale.add(g * HALVES);
                let offset = self.panel.offset.add(g * HALVES);
                if HALVES == 2 {
                    for half in 0..2 {
                        let q = q.map(|q| q.add(16 * half));
                        let sums = cells.map(|c| (&raw const (*c).half_sums[half]));
                        let dots = s.idot::<T, 4, CLASS>(codes.add(half * 4 * 64), q, sums, self.bias);
                        let scale = s.load(&*scale.add(half));
                        add_scaled(s, &mut acc, dots, scale, cells.map(|c| (*c).d));
                    }
                    if OFFSET {
                        for half in 0..2 {
                            let offset = s.load(&*offset.add(half));
                            add_offset(s, &mut acc, offset, cells.map(|c| (*c).half_d_sums[half]));
                        }
                    }
                } else {
                    let dots = s.idot::<T, 8, CLASS>(codes, q, cells.map(|c| &raw const (*c).sum), self.bias);
                    add_scaled(s, &mut acc, dots, s.load(&*scale), cells.map(|c| (*c).d));
                    if OFFSET {
                        add_offset(s, &mut acc, s.load(&*offset), cells.map(|c| (*c).d_sum));
                    }
                }
            }
        }
        for t in 0..T {
            // SAFETY: the maker gave `T` sums.
            s.store(acc[t], unsafe { &mut *self.acc.add(t) });
        }
    }
}

/// Adds a group's (or a half's) integer sums times its rows' scales and the tokens'.
#[inline(always)]
pub(super) fn add_scaled<S: Simd, const T: usize>(
    s: S,
    acc: &mut [S::F; T],
    dots: [S::I; T],
    scale: S::F,
    d: [f32; T],
) {
    for t in 0..T {
        acc[t] = s.fma(s.mul(scale, s.splat(d[t])), s.i32_to_f32(dots[t]), acc[t]);
    }
}

/// Adds the rows' offsets times the tokens' sums.
#[inline(always)]
pub(super) fn add_offset<S: Simd, const T: usize>(s: S, acc: &mut [S::F; T], offset: S::F, sums: [f32; T]) {
    for t in 0..T {
        acc[t] = s.fma(offset, s.splat(sums[t]), acc[t]);
    }
}

/// Picks the tile kernel. The instances depend on the class alone, so formats share them.
///
/// # Safety
/// * As [`Tile`]'s fields say, for `tokens` tokens.
#[inline(always)]
unsafe fn tile<S: Simd, F: BlockFormat>(
    s: S,
    tokens: usize,
    panel: Panel,
    groups: usize,
    cells: *const Cell,
    acc: *mut [f32; ROWS],
    first: bool,
) {
    const {
        assert!(F::SCALE_ELEMS == 16 || F::SCALE_ELEMS == 32);
        // What the machines without a byte dot product need of wide codes.
        assert!(F::CODE_MAX <= 127 || (F::BIAS <= 128 && F::CODE_MAX as i32 - F::BIAS <= 127));
    }
    macro_rules! call {
        ($t:literal, $class:literal, $halves:literal, $offset:literal) => {
            s.call(Tile::<$t, $class, $halves, $offset> { panel, groups, cells, bias: F::BIAS, acc, first })
        };
    }
    macro_rules! by_scale {
        ($t:literal, $class:literal) => {
            match (F::SCALE_ELEMS, F::HAS_OFFSET) {
                (16, false) => call!($t, $class, 2, false),
                (16, true) => call!($t, $class, 2, true),
                (_, false) => call!($t, $class, 1, false),
                (_, true) => call!($t, $class, 1, true),
            }
        };
    }
    macro_rules! by_class {
        ($t:literal) => {
            match if S::VNNI { 8 } else { pair_sums(F::CODE_MAX) } {
                8 => by_scale!($t, 8),
                4 => by_scale!($t, 4),
                2 => by_scale!($t, 2),
                1 => by_scale!($t, 1),
                _ => by_scale!($t, 0),
            }
        };
    }
    match tokens {
        8 if S::WIDE => by_class!(8),
        4 if S::WIDE => by_class!(4),
        2 => by_class!(2),
        1 => by_class!(1),
        _ => unreachable!("tiles have 1, 2, 4 or 8 tokens"),
    }
}

/// Rows `first_row..first_row + n_rows` of a weight by `tokens` tokens.
///
/// *Maker must*: give rows of `groups` groups (whole blocks) `stride` apart at `weight`; `cells` of all the
/// tokens, cut into tiles of [`tile_max`]; `n_rows` at most [`JOB_PANELS`] panels, `tokens` at most [`JOB_TOKENS`]; a
/// store for these rows and tokens.
pub(super) struct Job<'a, F> {
    pub weight: *const u8,
    pub stride: usize,
    pub groups: usize,
    pub first_row: usize,
    pub n_rows: usize,
    pub cells: *const Cell,
    pub tokens: usize,
    pub memory: &'a mut [Line],
    pub store: Store<'a>,
    /// The store's token of the first cell.
    pub first_token: usize,
    pub format: PhantomData<F>,
}

impl<F: BlockFormat> SimdOp for Job<'_, F> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        assert!(self.tokens <= JOB_TOKENS && self.n_rows <= JOB_PANELS * ROWS);
        let n_panels = self.n_rows.div_ceil(ROWS);
        let mut memory = self.memory;
        let memory = &mut memory;
        let panel = Panel {
            codes: take::<u8>(memory, CHUNK_GROUPS * CODE_BYTES).as_mut_ptr(),
            scale: take::<[f32; ROWS]>(memory, CHUNK_GROUPS * 2).as_mut_ptr(),
            offset: take::<[f32; ROWS]>(memory, CHUNK_GROUPS * 2).as_mut_ptr(),
        };
        let acc = take::<[f32; ROWS]>(memory, n_panels * self.tokens);
        let sums = acc.as_mut_ptr();
        let tail = take::<u8>(memory, CHUNK_GROUPS * ROWS * MAX_GROUP_BYTES);
        for first_group in (0..self.groups).step_by(CHUNK_GROUPS) {
            let groups = (self.groups - first_group).min(CHUNK_GROUPS);
            for p in 0..n_panels {
                let row = self.first_row + p * ROWS;
                let rows_here = (self.n_rows - p * ROWS).min(ROWS);
                // SAFETY: the rows and blocks exist by the maker's word; a panel that runs over the last row is copied,
                // its missing rows being whatever the memory held (their sums are dropped).
                unsafe {
                    let mut at = self.weight.add(row * self.stride);
                    let mut stride = self.stride;
                    let mut unpack_first = first_group;
                    if rows_here < ROWS {
                        let from = first_group / F::GROUPS * size_of::<F>();
                        let bytes = groups / F::GROUPS * size_of::<F>();
                        assert!(bytes * ROWS <= tail.len());
                        for r in 0..rows_here {
                            let source = at.add(r * self.stride + from);
                            core::ptr::copy_nonoverlapping(source, tail[r * bytes..].as_mut_ptr(), bytes);
                        }
                        (at, stride, unpack_first) = (tail.as_ptr(), bytes, 0);
                    }
                    let row_dots = RowDots::<F> {
                        rows: at,
                        stride,
                        first_group: unpack_first,
                        groups,
                        panel,
                        cells: self.cells.add(first_group),
                        acc: sums.add(p),
                        first: first_group == 0,
                        format: PhantomData,
                    };
                    if self.tokens == 1 && row_dot::knows(F::ID) && s.call_pairs(row_dots) {
                        continue;
                    }
                    s.call(Unpack::<F> {
                        rows: at,
                        stride,
                        first_group: unpack_first,
                        groups,
                        panel,
                        format: PhantomData,
                    });
                    for (token, n) in Tiles::new(self.tokens, tile_max::<S>()) {
                        let cells = self.cells.add(token * self.groups + first_group * n);
                        let acc = sums.add(p * self.tokens + token);
                        tile::<S, F>(s, n, panel, groups, cells, acc, first_group == 0);
                    }
                }
            }
        }
        for (i, sums) in acc.iter().enumerate() {
            let (p, token) = (i / self.tokens, i % self.tokens);
            let rows_here = (self.n_rows - p * ROWS).min(ROWS);
            // SAFETY: the maker's store takes every row and token of this job.
            unsafe {
                self.store.put(self.first_row + p * ROWS, self.first_token + token, &sums[..rows_here])
            };
        }
    }
}

const _: () = assert!(CHUNK_GROUPS.is_multiple_of(256 / GROUP));
