//! Results that are more than floats when they leave: rotated back where values were rotated before they were cached,
//! quantised for the product that reads them, or both; to the bits of `hadamard` and `quantise_act` on the f32 output.
//!
//! Both work on neighbours within a head that lie in neighbouring lanes, a float4 in each. The rows of a tile come from
//! their fragments to such lanes through shared memory, eight rows of each group of rows at a time.

use super::{OFFSET_VALUES, ROTATED, ROTATED_WIDTH};
use crate::device::{F32x4, Glb, U32x2};
use crate::kernels::hadamard::gpu::rotate_in_warp;
use crate::kernels::quantise_act::gpu::float4;

/// What becomes of them.
#[derive(Clone, Copy)]
pub(super) struct Results {
    /// Floats, or codes if there are scales.
    pub(super) out: Glb<u32>,
    pub(super) scales: Glb<U32x2>,
    /// Elements of a head.
    pub(super) head_dim: u32,
    pub(super) flags: u32,
}

impl Results {
    /// Whether they are floats as they are.
    #[inline(always)]
    pub(super) fn are_plain(self) -> bool {
        self.scales.is_null() && self.flags & ROTATED == 0
    }

    /// Stores a float4 of each lane, number `c` of row `row` of [n_tokens · n_head, head_dim]; nothing where `there` is
    /// false. The warp calls together.
    #[inline(always)]
    #[track_caller]
    pub(super) fn store(self, row: usize, c: u32, mut v: [f32; 4], there: bool) {
        let units = row * (self.head_dim / 4) as usize;
        if self.flags & ROTATED != 0 {
            v = rotate_in_warp(v, ROTATED_WIDTH);
        }
        if self.scales.is_null() {
            if there {
                self.out.cast::<F32x4>().offset(units).st(c, F32x4(v));
            }
        } else {
            let (codes, scales) = (self.out.offset(units), self.scales.offset(units / 8));
            float4(v, codes, scales, c, there, self.flags & OFFSET_VALUES != 0);
        }
    }
}

/// Tiles, which need tensor cores.
#[cfg(any(all(target_arch = "nvptx64", sm_ge_80), feature = "emu"))]
mod tile {
    use super::super::block::{Attention, Inputs, Part};
    use super::super::store::Class;
    use super::super::{sink, state};
    use crate::device::{F32x2, F32x4, Smem, math, sync, thread, warp};

    impl<
        C: Class,
        const STAGES: usize,
        const KS: usize,
        const NS: usize,
        const NO: usize,
        const SHARERS: usize,
        const GROUPS: usize,
    > Attention<C, STAGES, KS, NS, NO, SHARERS, GROUPS>
    {
        /// Stores the tile's `n` rows where they are not plain floats. `place` of a row: its token and head. The CTA calls
        /// together, when all copies to shared memory have arrived.
        #[cfg_attr(target_arch = "nvptx64", inline(always))]
        #[track_caller]
        pub(in super::super) fn store_results(
            x: &Inputs,
            part: &Part<NO>,
            n: u32,
            place: impl Fn(u32) -> [u32; 2],
        ) {
            // float4s of a row in shared memory, where eight rows of each group lie over the tiles.
            const { assert!(2 * GROUPS * Self::TILE.dims[1] <= Self::LAYOUT.end) }
            let units = Self::TILE.dims[1] as u32 / 4;
            let thread = math::fresh(thread::thread_idx_x());
            let (lane, row_group, sharer) =
                (thread % 32, thread / 32 / SHARERS as u32, thread / 32 % SHARERS as u32);
            let rows = Smem::<F32x4>::dynamic(0, Self::LAYOUT.end as u32).skip(8 * row_group * units);
            // Fragments of four rows, and float4s of one, lie in different banks.
            let at = |r: u32, c: u32| r * units + (c ^ ((r & 3) << 1));
            let head_row = |row: u32| {
                let [token, head] = place(row);
                (token as usize * x.n_head as usize + head as usize, head)
            };
            let (dim, results) = (x.head_dim[1], x.results());
            // Everyone is done with the tiles.
            sync::sync_threads();
            unroll!(R in 0..2 {
                let first = 16 * row_group + 8 * R as u32;
                if first < n {
                    let left = if n - first < 8 { n - first } else { 8 };
                    let row = lane / 4;
                    // Rows that are not there go as far as shared memory.
                    let (_, head) = head_row(first + if row < left { row } else { 0 });
                    let factor = state::normaliser(part.max[R], part.sum[R], sink(x.sinks, head));
                    let mut k = 0;
                    while k < NO {
                        let column = 8 * (sharer * NO as u32 + k as u32) + 2 * (lane % 4);
                        let pair = [part.out[k].0[2 * R] * factor, part.out[k].0[2 * R + 1] * factor];
                        rows.cast::<F32x2>().st(2 * at(row, column / 4) + lane % 2, F32x2(pair));
                        k += 1;
                    }
                    Self::sync_rows(row_group);
                    let mut i = 32 * sharer + lane;
                    while i - lane < left * (dim / 4) {
                        // Lanes whose float4s belong together are there together; the others work on some float4.
                        let there = i < left * (dim / 4);
                        let (r, c) = if there { (i / (dim / 4), i % (dim / 4)) } else { (0, lane % 8) };
                        let F32x4(v) = rows.ld(at(r, c));
                        results.store(head_row(first + r).0, c, v, there);
                        i += 32 * SHARERS as u32;
                    }
                    if R == 0 {
                        Self::sync_rows(row_group);
                    }
                }
            });
        }

        /// Waits for the warps that have the same rows.
        #[inline(always)]
        #[track_caller]
        fn sync_rows(row_group: u32) {
            if SHARERS == 1 {
                warp::sync_warp();
            } else {
                Self::sync_sharers(row_group);
            }
        }
    }
}
