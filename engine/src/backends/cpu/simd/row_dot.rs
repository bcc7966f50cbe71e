//! Block formats times one token: rows are read as they lie, 32 codes in a register half, and only sums change places.
//!
//! A single token uses each unpacked code once, so moving codes into a panel first costs more than the products. The
//! float operations are those of the tile kernel in its order ([`add_scaled`], [`add_offset`]), on the same integers.

use core::marker::PhantomData;

use quant::format::GROUP;
use quant::{BlockFormat, FormatId};

use super::act::Cell;
use super::panel::{Ahead, Panel, ROWS};
use super::quant_gemm::{add_offset, add_scaled};
use super::unpack_blocks::{E2M1_CODES, IQ4_CODES, NIBBLES, scales};
use super::vector::{PairOp, Pairs, Simd, pair_sums};

/// Whether [`RowDots`] knows the format.
pub(super) const fn knows(id: FormatId) -> bool {
    use FormatId::*;
    matches!(id, Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 | MXFP4 | IQ4_NL | IQ4_XS)
        || matches!(id, Q2_K | Q3_K | Q4_K | Q5_K | Q6_K)
}

/// 16 rows by one token over a chunk of k.
///
/// *Maker must*: give a format that this module [`knows`]; 16 rows of whole blocks at `rows + i·stride`, of which
/// `first_group` and `groups` are multiples; a panel with room for a block's scales and offsets; `groups` cells; 16 sums,
/// read unless `first`.
pub(super) struct RowDots<F> {
    pub rows: *const u8,
    pub stride: usize,
    pub first_group: usize,
    pub groups: usize,
    pub panel: Panel,
    pub cells: *const Cell,
    pub acc: *mut [f32; ROWS],
    pub first: bool,
    pub format: PhantomData<F>,
}

impl<F: BlockFormat> PairOp for RowDots<F> {
    #[inline(always)]
    fn run<S: Pairs>(self, s: S) {
        match const { pair_sums(F::CODE_MAX) } {
            0 => self.blocks::<S, 0>(s),
            _ => self.blocks::<S, 1>(s),
        }
    }
}

impl<F: BlockFormat> RowDots<F> {
    #[inline(always)]
    fn blocks<S: Pairs, const CLASS: usize>(&self, s: S) {
        let first_block = self.first_group / F::GROUPS;
        // SAFETY: the maker gave sums, blocks, cells and room.
        unsafe {
            let mut acc = if self.first { s.splat(0.0) } else { s.load(&*self.acc) };
            let next = self.rows.wrapping_add(ROWS * self.stride + first_block * ROWS * size_of::<F>());
            for i in 0..self.groups / F::GROUPS {
                let mut ahead = Ahead::new::<S, F>(s, next.wrapping_add(i * ROWS * size_of::<F>()));
                // Opaque, so that addresses come from one pointer: else sixteen walk along, more than there are registers.
                let at = core::hint::black_box(self.rows.add((first_block + i) * size_of::<F>()));
                scales(s, F::ID, at, self.stride, self.panel, &mut ahead);
                for g in 0..F::GROUPS {
                    self.group::<S, CLASS>(s, at, g, self.cells.add(i * F::GROUPS + g), &mut ahead, &mut acc);
                }
                ahead.rest(s);
            }
            s.store(acc, &mut *self.acc);
        }
    }

    /// Group `g` of the blocks at `at`.
    ///
    /// # Safety
    /// * As the maker's word, for this group and its cell.
    #[inline(always)]
    unsafe fn group<S: Pairs, const CLASS: usize>(
        &self,
        s: S,
        at: *const u8,
        g: usize,
        cell: *const Cell,
        ahead: &mut Ahead,
        acc: &mut S::F,
    ) {
        // SAFETY: by this function's contract.
        unsafe {
            let q = (&raw const (*cell).q).cast();
            // A loop: a closure may be compiled on its own, without the machine's features.
            let mut pairs = [s.all_i32(0); 8];
            for (i, pair) in pairs.iter_mut().enumerate() {
                let (a, b) = (at.add(i * self.stride), at.add((i + 8) * self.stride));
                *pair = s.pair_dot::<CLASS>(codes::<S, F>(s, a, b, g), q);
                ahead.line(s);
            }
            let [first, second] = s.pair_sums(pairs);
            let bias = F::BIAS - s.pair_rest::<CLASS>();
            let mut sums = [*acc];
            let d = [(*cell).d];
            if F::SCALE_ELEMS == GROUP {
                let dots = unbiased(s, s.add_i32(first, second), bias * (*cell).sum);
                add_scaled(s, &mut sums, [dots], s.load(&*self.panel.scale.add(g)), d);
                if F::HAS_OFFSET {
                    add_offset(s, &mut sums, s.load(&*self.panel.offset.add(g)), [(*cell).d_sum]);
                }
            } else {
                for (half, dots) in [first, second].into_iter().enumerate() {
                    let dots = unbiased(s, dots, bias * (*cell).half_sums[half]);
                    add_scaled(s, &mut sums, [dots], s.load(&*self.panel.scale.add(2 * g + half)), d);
                }
                if F::HAS_OFFSET {
                    for half in 0..2 {
                        let offset = s.load(&*self.panel.offset.add(2 * g + half));
                        add_offset(s, &mut sums, offset, [(*cell).half_d_sums[half]]);
                    }
                }
            }
            *acc = sums[0];
        }
    }
}

/// Sums of codes as sums of what they stand for.
#[inline(always)]
fn unbiased<S: Simd>(s: S, dots: S::I, too_much: i32) -> S::I {
    s.sub_i32(dots, s.all_i32(too_much as u32))
}

/// Group `g` of two blocks: the layouts are in quant's files.
///
/// # Safety
/// * Both are blocks of a format that this module [`knows`], and have this group.
#[inline(always)]
unsafe fn codes<S: Pairs, F: BlockFormat>(s: S, a: *const u8, b: *const u8, g: usize) -> S::I {
    // SAFETY: every offset lies in the format's block.
    unsafe {
        let nibbles = |at: usize| s.pair_nibbles(s.pair16(a.add(at), b.add(at)));
        let bytes = |at: usize| s.pair32(a.add(at), b.add(at));
        let word = |p: *const u8, at: usize| p.add(at).cast::<u32>().read_unaligned();
        let fifth = |at: usize| s.pair_bits(word(a, at), word(b, at), 16);
        // Two groups in 32 bytes: low nibbles, then high ones.
        let half = |v, upper: bool| s.and(if upper { s.shr::<4>(v) } else { v }, NIBBLES);
        let two_bits = |at: usize| s.and(s.shr_by(bytes(at + g / 4 * 32), 2 * (g as u32 % 4)), 0x0303_0303);
        match F::ID {
            FormatId::Q4_0 => nibbles(2),
            FormatId::Q4_1 => nibbles(4),
            FormatId::Q5_0 => s.or(nibbles(6), fifth(2)),
            FormatId::Q5_1 => s.or(nibbles(8), fifth(4)),
            FormatId::Q8_0 => s.xor(bytes(2), 0x8080_8080),
            FormatId::IQ4_NL => s.lookup(nibbles(2), &IQ4_CODES),
            FormatId::IQ4_XS => s.lookup(nibbles(8 + 16 * g), &IQ4_CODES),
            FormatId::MXFP4 => s.lookup(nibbles(1), &E2M1_CODES),
            FormatId::Q4_K => half(bytes(16 + g / 2 * 32), g % 2 == 1),
            FormatId::Q5_K => {
                let fifth = s.and(s.shr_by(bytes(16), g as u32), 0x0101_0101);
                s.or(half(bytes(48 + g / 2 * 32), g % 2 == 1), s.shl::<4>(fifth))
            }
            FormatId::Q6_K => {
                let (plane, upper, odd) = (g / 4, g % 4 / 2, g % 2);
                let high = s.shr_by(bytes(128 + 32 * plane), 2 * (g as u32 % 4));
                let low = half(bytes(64 * plane + 32 * odd), upper == 1);
                s.or(low, s.shl::<4>(s.and(high, 0x0303_0303)))
            }
            FormatId::Q2_K => two_bits(16),
            FormatId::Q3_K => {
                let third = s.and(s.shr_by(bytes(0), g as u32), 0x0101_0101);
                s.or(two_bits(32), s.shl::<2>(third))
            }
            _ => unreachable!("no row products for {}", F::ID),
        }
    }
}
