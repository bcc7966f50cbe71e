//! Weights of a panel (16 rows) from blocks to the kernel's order: codes `[k/4][16 rows][4]`, scales and offsets
//! `[group][halves][16 rows]`.
//!
//! Any format goes through [`BlockFormat::unpack_group`]; those that files carry have vector unpackers, which must give
//! the same bytes.

use quant::format::GROUP;
use quant::{BlockFormat, Group};

use super::panel::{Ahead, CODE_BYTES, Panel, ROWS};
use super::vector::{Simd, SimdOp};
use super::{unpack_blocks, unpack_codebook};

/// Unpacks `groups` groups starting at `first_group` of 16 rows.
///
/// Both are multiples of the format's groups per block. *Maker must*: give 16 rows of whole blocks at `rows + i·stride`,
/// and a panel with room for all groups.
pub(super) struct Unpack<F> {
    pub rows: *const u8,
    pub stride: usize,
    pub first_group: usize,
    pub groups: usize,
    pub panel: Panel,
    pub format: core::marker::PhantomData<F>,
}

impl<F: BlockFormat> SimdOp for Unpack<F> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let halves = GROUP / F::SCALE_ELEMS;
        let first_block = self.first_group / F::GROUPS;
        let blocks = self.groups / F::GROUPS;
        // 16 rows lie together, so the next panel follows; reading 16 streams at once is more than prefetchers follow.
        let next = self.rows.wrapping_add(ROWS * self.stride + first_block * ROWS * size_of::<F>());
        for i in 0..blocks {
            let from = next.wrapping_add(i * ROWS * size_of::<F>());
            let mut ahead = Ahead::new::<S, F>(s, from);
            // SAFETY: the maker gave 16 rows of whole blocks, and `panel` has room for all groups.
            unsafe {
                let at = self.rows.add((first_block + i) * size_of::<F>());
                let panel = Panel {
                    codes: self.panel.codes.add(i * F::GROUPS * CODE_BYTES),
                    scale: self.panel.scale.add(i * F::GROUPS * halves),
                    offset: self.panel.offset.add(i * F::GROUPS * halves),
                };
                if unpack_blocks::knows(F::ID) {
                    unpack_blocks::scales(s, F::ID, at, self.stride, panel, &mut ahead);
                    unpack_blocks::codes(s, F::ID, at, self.stride, panel, &mut ahead);
                } else if unpack_codebook::knows(F::ID) {
                    unpack_codebook::block(s, F::ID, at, self.stride, panel, &mut ahead);
                } else {
                    for g in 0..F::GROUPS {
                        let codes = panel.codes.add(g * CODE_BYTES);
                        let (scale, offset) = (panel.scale.add(g * halves), panel.offset.add(g * halves));
                        any::<S, F>(s, at, self.stride, g, codes, scale, offset);
                    }
                }
            }
            ahead.rest(s);
        }
    }
}

/// Group `g` of 16 blocks by the format's own definition, then transposed.
///
/// # Safety
/// * A block of `F` is readable at each `blocks + i·stride`.
/// * A group's codes, scales and (if the format has them) offsets are writable.
#[inline(always)]
unsafe fn any<S: Simd, F: BlockFormat>(
    s: S,
    blocks: *const u8,
    stride: usize,
    g: usize,
    codes: *mut u8,
    scale: *mut [f32; ROWS],
    offset: *mut [f32; ROWS],
) {
    let mut groups = [Group::default(); ROWS];
    for (row, group) in groups.iter_mut().enumerate() {
        // SAFETY: readable by contract; block types are plain bytes of alignment 1 (checked in quant's table).
        *group = unsafe { &*blocks.add(row * stride).cast::<F>() }.unpack_group(g);
    }
    let halves = GROUP / F::SCALE_ELEMS;
    // SAFETY: `groups` holds 16 rows of eight code words, `size_of::<Group>()` apart; outputs by contract.
    unsafe {
        for part in 0..2 {
            let words = groups[0].codes.as_ptr().add(4 * part).cast();
            for (c, column) in s.transpose4(words, size_of::<Group>()).into_iter().enumerate() {
                s.store_i32(column, codes.add((4 * part + c) * 64));
            }
        }
        for half in 0..halves {
            *scale.add(half) = core::array::from_fn(|row| groups[row].scale[half]);
            if F::HAS_OFFSET {
                *offset.add(half) = core::array::from_fn(|row| groups[row].offset[half]);
            }
        }
    }
}
