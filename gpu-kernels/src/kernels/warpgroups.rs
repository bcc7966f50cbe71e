//! Products by warpgroups on Hopper (sm_90a): what `mmf_hopper` and `mmd_hopper` have in common.
//!
//! * A CTA's shared memory holds a ring of stages ([`Ring`]); a stage has an mbarrier that says when it is full and one that
//!   says when it is empty. Producers and consumers each walk over it by a [`Place`] of their own.
//! * A CTA is persistent: it walks over the launch's tiles, column tiles first ([`Work::tile`]). CTAs of a cluster take tiles
//!   below each other.
//! * Activations are core matrices as `round_act` writes them; a stage takes [`STEPS`] steps of 16 of k.
//! * Of a gated pair a tile has half of its rows from each matrix, every 64 rows 32 of gate's and the same of up's; so a
//!   warpgroup has both sums of an output, and stores it by itself ([`Work::store`]).

#[cfg(any(not(target_arch = "nvptx64"), sm_90a))]
#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
pub(crate) use device::*;

/// Steps of 16 of k in a stage.
pub(crate) const STEPS: u32 = 4;
/// 16-byte vectors of 8 columns of a stage.
pub(crate) const BLOCK: u32 = STEPS * 16;
/// Columns that a warpgroup stores at a time, and elements between two of them: a fragment's lanes hit 32 banks.
pub(crate) const PIECE: u32 = 16;
const STRIDE: u32 = 64 + 4;
/// Floats that a warpgroup needs for it.
pub(crate) const PIECE_ELEMS: u32 = PIECE * STRIDE;

#[cfg(any(not(target_arch = "nvptx64"), sm_90a))]
#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod device {
    use super::{PIECE, STRIDE};
    use crate::device::sync::{self, Mbarrier};
    use crate::device::{Glb, Smem, U32x4, math, thread, warp};
    use crate::kernels::product::{Gate, Part, choose_at};

    /// A ring of stages.
    pub(crate) trait Ring {
        /// How many.
        const STAGES: u32;
        /// Two for each stage.
        fn barriers() -> Smem<u64>;

        /// Called by one thread, before a barrier of the CTA (or of the cluster): so many arrivals fill a stage and empty one.
        #[inline(always)]
        #[track_caller]
        fn init(producers: u32, consumers: u32) {
            let mut slot = 0;
            while slot < Self::STAGES {
                let place = Place { slot, parity: 0 };
                place.full::<Self>().init(producers);
                place.empty::<Self>().init(consumers);
                slot += 1;
            }
        }
    }

    /// A place in a ring.
    #[derive(Clone, Copy)]
    pub(crate) struct Place {
        /// Which stage.
        pub(crate) slot: u32,
        /// That of the phase in which it is filled.
        pub(crate) parity: u32,
    }

    impl Place {
        pub(crate) const FIRST: Place = Place { slot: 0, parity: 0 };

        #[inline(always)]
        pub(crate) fn next<R: Ring + ?Sized>(self) -> Place {
            if self.slot + 1 == R::STAGES {
                Place { slot: 0, parity: self.parity ^ 1 }
            } else {
                Place { slot: self.slot + 1, parity: self.parity }
            }
        }

        /// Ends its phase when the producers have filled the stage.
        #[inline(always)]
        #[track_caller]
        pub(crate) fn full<R: Ring + ?Sized>(self) -> Mbarrier {
            Mbarrier::at(R::barriers(), self.slot)
        }

        /// Ends its phase when the consumers have read the stage.
        #[inline(always)]
        #[track_caller]
        pub(crate) fn empty<R: Ring + ?Sized>(self) -> Mbarrier {
            Mbarrier::at(R::barriers(), R::STAGES + self.slot)
        }

        /// Called by a consumer warp that has read the stage.
        #[inline(always)]
        #[track_caller]
        pub(crate) fn release<R: Ring + ?Sized, const CTAS: u32>(self) {
            warp::sync_warp();
            let lane = thread::lane_id();
            if CTAS == 1 && lane == 0 {
                self.empty::<R>().arrive();
            }
            // The other CTA's producers write here too.
            if CTAS > 1 && lane < CTAS {
                self.empty::<R>().arrive_at(lane);
            }
        }
    }

    /// What a launch does, by clusters of so many CTAs.
    #[derive(Clone, Copy)]
    pub(crate) struct Work<const CTAS: u32> {
        pub(crate) parts: [Part; 3],
        pub(crate) x: Glb<U32x4>,
        pub(crate) order: Glb<u32>,
        pub(crate) of_expert: Glb<U32x4>,
        pub(crate) gate: Gate,
        pub(crate) n_k16: u32,
        pub(crate) n_cols: u32,
        /// Tiles of columns, and all items: a tile, or one for each CTA of a cluster, below each other.
        pub(crate) n_across: u32,
        pub(crate) n_items: u32,
    }

    /// A tile of it.
    #[derive(Clone, Copy)]
    pub(crate) struct Tile {
        pub(crate) part: Part,
        pub(crate) first_row: u32,
        pub(crate) first_block: u32,
        /// Where its columns end; at its first column if there is none.
        pub(crate) n_cols: u32,
        /// Of a mixture.
        pub(crate) expert: u32,
        pub(crate) first_pair: u32,
    }

    impl Tile {
        #[inline(always)]
        pub(crate) fn is_empty(&self) -> bool {
            self.n_cols == self.first_block * 8
        }

        /// Where the activations of block `block` of the tile start; blocks beyond the columns repeat the last.
        #[inline(always)]
        pub(crate) fn columns(&self, x: Glb<U32x4>, block: u32, n_k16: u32) -> Glb<U32x4> {
            let (block, last) = (self.first_block + block, (self.n_cols - 1) / 8);
            let block = if block < last { block } else { last };
            x.offset(block as usize * n_k16 as usize * 16)
        }
    }

    impl<const CTAS: u32> Work<CTAS> {
        /// This CTA's first item, and how many items lie between it and the next.
        #[inline(always)]
        pub(crate) fn walk() -> (u32, u32) {
            (thread::block_idx_x() / CTAS, thread::grid_dim_x() / CTAS)
        }

        /// This CTA's tile, of `rows` rows and `cols` columns, of item `i`.
        #[inline(always)]
        #[track_caller]
        pub(crate) fn tile(&self, i: u32, rows: u32, cols: u32) -> Tile {
            let (down, across) = (i / self.n_across, i % self.n_across);
            let part = choose_at(self.parts[0], self.parts[1], self.parts[2], down);
            let rows = if self.gate.is_some() { rows / 2 } else { rows };
            let rank = thread::block_idx_x() % CTAS;
            let first_row = ((down - part.first_cta) * CTAS + rank) * rows;
            let first_block = across * (cols / 8);
            let (expert, first_pair, n_cols) = if self.order.is_null() {
                (0, 0, self.n_cols)
            } else {
                let U32x4([expert, first, number, _]) = self.of_expert.ld_nc(across);
                (expert, first, first_block * 8 + number)
            };
            Tile { part, first_row, first_block, n_cols, expert, first_pair }
        }

        /// Stores a warpgroup's part of a tile, [`PIECE`] columns at a time: thread `thread` (0..128) has `sum(i)`, in the order
        /// of `wgmma`, of the 64 rows from `first_row` of the tile on (of a gated pair 32 of each) and of `columns` columns from
        /// `first_column` of the tile on. `finished` is the warpgroup's, [`PIECE_ELEMS`], and so is the named barrier.
        /// `scaled(c, sum)` is the sum of the column that is number `c` of all.
        #[inline(always)]
        #[track_caller]
        pub(crate) fn store(
            &self,
            tile: &Tile,
            [first_row, first_column, columns]: [u32; 3],
            [thread, barrier]: [u32; 2],
            finished: Smem<f32>,
            sum: impl Fn(usize) -> f32,
            scaled: impl Fn(u32, f32) -> f32,
        ) {
            let lane = thread::lane_id();
            let gated = self.gate.is_some();
            // Rows of the output. Of a gated pair those of up follow those of gate.
            let (rows, first_row) = if gated { (32, first_row / 2) } else { (64, first_row) };
            let (row, columns_at_once) = (thread % rows, 128 / rows);
            let output_row = tile.first_row + first_row + row;
            let mut piece = 0;
            while piece < math::opaque(columns / PIECE) {
                // Everyone has read what lay here.
                sync::barrier_of(barrier, 128);
                let to = 2 * (lane % 4) * STRIDE + thread / 32 * 16 + lane / 4;
                unroll!(P in 0..16 {
                    if (P as u32) < columns / PIECE && piece == P as u32 {
                        unroll!(Q in 0..2 { unroll!(E in 0..4 {
                            let at = to + (8 * Q + E % 2) as u32 * STRIDE + E as u32 / 2 * 8;
                            finished.st(at, sum(8 * P + 4 * Q + E));
                        }); });
                    }
                });
                sync::barrier_of(barrier, 128);
                let first = first_column + piece * PIECE;
                let mut column = thread / rows;
                while column < PIECE && output_row < tile.part.n_rows {
                    unroll!(J in 0..4 {
                        let column = column + J as u32 * columns_at_once;
                        let place = tile.first_block * 8 + first + column;
                        if place < tile.n_cols {
                            let sum = scaled(place, finished.ld(column * STRIDE + row));
                            let up = if gated { scaled(place, finished.ld(column * STRIDE + row + 32)) } else { 0.0 };
                            let line = if self.order.is_null() {
                                place
                            } else {
                                self.order.ld_nc(tile.first_pair + first + column)
                            };
                            tile.part.finish(self.gate, self.parts[1], tile.expert, line, output_row, [sum, up]);
                        }
                    });
                    column += 4 * columns_at_once;
                }
                piece += 1;
            }
        }
    }
}
