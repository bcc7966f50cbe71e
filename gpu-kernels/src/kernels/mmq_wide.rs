//! The wide cut of `mmq`: a CTA multiplies 128 rows by 128 columns, span by span, through a pipeline in shared memory.
//!
//! * Stages, two of each: raw row tiles, arriving by asynchronous copies two spans ahead of their product; activations'
//!   codes, arriving one span ahead; unpacked codes of the weights and the floats of rows and columns.
//! * In a round all warps unpack one span and multiply the one before. Warps 0 to 3 unpack first, the others last: each
//!   scheduler has one of both kinds, so it finds arithmetic while the other waits for shared memory. A round has one
//!   barrier.
//! * A warp's tile is 64 × 32: the span's sums and the totals, 64 registers each; 16 `mma` per group and six `ldmatrix`.
//! * Row tile slots 0 to 3; of a gated pair 0 and 1 are the gate's, 2 and 3 the same rows of up.

use quant::BlockFormat;

use super::int8_tile::{column_planes, row_planes};
use crate::tile::{ROWS, SPAN_GROUPS, Tiled};

/// Rows and columns of a CTA's tile.
pub const WIDE: usize = 128;
/// Row tiles of it.
pub const WIDE_TILES: u32 = (WIDE / ROWS) as u32;
/// Bytes of one stage's codes.
const CODES_BYTES: u32 = (WIDE * SPAN_GROUPS * 32) as u32;
/// Floats of one plane.
const PLANE: u32 = (WIDE * SPAN_GROUPS) as u32;

/// Shared memory, two stages of each array: where codes of the weights and of the activations, floats of rows and of
/// columns, raw row tiles and the list of columns start, and where it ends.
const fn layout<F: BlockFormat + Tiled>() -> [u32; 7] {
    let b = 2 * CODES_BYTES;
    let row_floats = b + 2 * CODES_BYTES;
    let column_floats = row_floats + 2 * 4 * PLANE * row_planes::<F>() as u32;
    let raw = column_floats + 2 * 4 * PLANE * column_planes::<F>() as u32;
    let columns = raw + 2 * WIDE_TILES * (ROWS * F::LAYOUT.span_bytes) as u32;
    [0, b, row_floats, column_floats, raw, columns, columns + 8 * WIDE as u32]
}

/// Shared memory of a CTA.
pub const fn wide_bytes<F: BlockFormat + Tiled>() -> u32 {
    layout::<F>()[6]
}

#[cfg(any(not(target_arch = "nvptx64"), sm_ge_75))]
#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
pub use device::{load_row, wide};

#[cfg(any(not(target_arch = "nvptx64"), sm_ge_75))]
#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod device {
    use core::marker::PhantomData;

    use bytemuck::Zeroable;

    use super::*;
    use crate::device::math::opaque;
    use crate::device::{Glb, Smem, U32x2, U32x4, Word, async_copy, sync, thread};
    use crate::kernels::int8_tile::{self, Accumulators, Codes, Tile};
    use crate::kernels::mmq::{NONE, THREADS, WARPS, Work, group, groups_of, units_of};
    use crate::kernels::quantise_act::ActScale;

    /// Chunks of 16 bytes in a column's span.
    const SPAN_CHUNKS: u32 = 2 * SPAN_GROUPS as u32;
    /// Elements between the columns of the finished tile in shared memory: four column pairs in different banks.
    const FINISHED_STRIDE: u32 = WIDE as u32 + 4;

    /// The calling lane's row of a raw row tile in shared memory; what no group needs is not loaded.
    #[inline(always)]
    #[track_caller]
    pub fn load_row<F: Tiled, U: Word>(raw: Smem<U>, first_byte: u32, n_units: u32) -> F::Words {
        let (units, words) = (F::LAYOUT.span_units(), size_of::<U>() / 4);
        let mut row = F::Words::zeroed();
        let first = first_byte / size_of::<U>() as u32 + thread::lane_id();
        let mut load = |u: usize| {
            let unit = raw.ld_still(first + (u * ROWS) as u32);
            let mut i = 0;
            while i < words {
                row.as_mut()[u * words + i] = bytemuck::cast_slice::<u8, u32>(bytemuck::bytes_of(&unit))[i];
                i += 1;
            }
        };
        let mut u = 0;
        if F::LAYOUT.block_elems == crate::tile::SPAN || n_units == units as u32 {
            while u < units {
                load(u);
                u += 1;
            }
        } else {
            while u < units {
                if (u as u32) < n_units {
                    load(u);
                }
                u += 1;
            }
        }
        row
    }

    /// A CTA's shared memory and what its threads copy.
    struct Pipeline<F> {
        scales: Glb<U32x2>,
        /// Where this warp's row tile starts; the warp four on has the same.
        w: Glb<u8>,
        n_groups: u32,
        a: Codes<SPAN_GROUPS>,
        b: Codes<SPAN_GROUPS>,
        row_floats: Smem<f32>,
        column_floats: Smem<f32>,
        raw: Smem<u32>,
        /// Rows of the activations of the columns, then rows of the output.
        columns: Smem<u32>,
        format: PhantomData<F>,
    }

    /// Starts the copies of a span's activations: 16 threads a column.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    fn copy_activations(q: Glb<U32x4>, b: Codes<SPAN_GROUPS>, columns: Smem<u32>, span: u32, n_groups: u32) {
        let chunk = thread::thread_idx_x() % SPAN_CHUNKS;
        let stage = span % 2 * (CODES_BYTES / 16);
        if chunk < 2 * groups_of(span, n_groups) {
            let at = span * SPAN_CHUNKS + chunk;
            unroll!(I in 0..8 {
                let column = thread::thread_idx_x() / SPAN_CHUNKS + I as u32 * (THREADS / SPAN_CHUNKS);
                let source = columns.ld(column) * (2 * n_groups) + at;
                let target = stage + Codes::<SPAN_GROUPS>::index(column, chunk);
                async_copy::copy16(b.0, target, q, source);
            });
        }
    }

    impl<F: BlockFormat + Tiled> Pipeline<F> {
        const ROW_FLOATS: u32 = PLANE * row_planes::<F>() as u32;
        const COLUMN_FLOATS: u32 = PLANE * column_planes::<F>() as u32;
        const RAW_BYTES: u32 = (ROWS * F::LAYOUT.span_bytes) as u32;

        /// Starts the copies of a span's raw row tiles: each warp half of one.
        #[inline(always)]
        #[track_caller]
        fn copy_raw(&self, span: u32) {
            let piece = (span % 2 * WIDE_TILES + thread::warp_id() % WIDE_TILES) * (Self::RAW_BYTES / 16);
            let source = self.w.offset(F::LAYOUT.span_offset(span as usize)).cast::<U32x4>();
            let vectors = units_of::<F>(span, self.n_groups) * (ROWS * F::LAYOUT.unit_bytes / 16) as u32;
            let target = self.raw.cast::<U32x4>();
            let mut i = thread::warp_id() / WIDE_TILES * 32 + thread::lane_id();
            while i < vectors {
                async_copy::copy16(target, piece + i, source, i);
                i += 64;
            }
        }

        /// Unpacks half `HALF` of a span: each lane four groups of a row of the warp's row tile, and the floats of as many
        /// groups of a column.
        #[inline(always)]
        #[track_caller]
        fn unpack<const HALF: usize>(&self, span: u32) {
            const { assert!(WIDE == 4 * 32 && SPAN_GROUPS == 8) };
            let stage = span % 2;
            let slot = thread::warp_id() % WIDE_TILES;
            let row = slot * ROWS as u32 + thread::lane_id();
            let there = groups_of(span, self.n_groups);

            // A column's scales come from global memory; they are under way while the weights are unpacked.
            let scales = self.scales.offset(self.columns.ld(row) as usize * self.n_groups as usize);
            let mut acts = [U32x2([0; 2]); 4];
            unroll!(J in 0..4 {
                let j = (4 * HALF + J) as u32;
                if j < there {
                    acts[J] = scales.ld_nc(span * SPAN_GROUPS as u32 + j);
                }
            });

            let first_byte = (stage * WIDE_TILES + slot) * Self::RAW_BYTES;
            let units = units_of::<F>(span, self.n_groups);
            let words = match F::LAYOUT.unit_bytes {
                16 => load_row::<F, U32x4>(self.raw.cast(), first_byte, units),
                8 => load_row::<F, U32x2>(self.raw.cast(), first_byte, units),
                _ => load_row::<F, u32>(self.raw, first_byte, units),
            };
            let (a, row_floats) = self.weights(stage);
            unroll!(J in 0..4 {
                let j = 4 * HALF + J;
                let group = group::<F>(&words, j);
                int8_tile::put_group::<F, SPAN_GROUPS, WIDE>(a, row_floats, row, j as u32, &group);
            });
            let column_floats = self.column_floats(stage);
            unroll!(J in 0..4 {
                let U32x2([d, extra]) = acts[J];
                let act = ActScale { d: f32::from_bits(d), extra };
                let j = (4 * HALF + J) as u32;
                int8_tile::put_column::<F, SPAN_GROUPS, WIDE>(column_floats, row, j, act);
            });
        }

        #[inline(always)]
        fn weights(&self, stage: u32) -> (Codes<SPAN_GROUPS>, Smem<f32>) {
            (Codes(self.a.0.skip(stage * (CODES_BYTES / 16))), self.row_floats.skip(stage * Self::ROW_FLOATS))
        }

        #[inline(always)]
        fn column_floats(&self, stage: u32) -> Smem<f32> {
            self.column_floats.skip(stage * Self::COLUMN_FLOATS)
        }

        /// Adds a span to the totals of the warp's tile.
        #[inline(always)]
        #[track_caller]
        fn multiply(&self, totals: &mut Accumulators<4, 4>, span: u32, row: u32, column: u32) {
            let stage = span % 2;
            let (a, row_floats) = self.weights(stage);
            let b = Codes(self.b.0.skip(stage * (CODES_BYTES / 16)));
            let column_floats = self.column_floats(stage);
            let tile = Tile::<SPAN_GROUPS, WIDE, WIDE> { a, b, row_floats, column_floats, row, column };
            let mut acc = [[[0.0f32; 4]; 4]; 4];
            // Unknown to the compiler, so that the loop stays rolled: its body is some 250 instructions.
            let there = opaque(groups_of(span, self.n_groups));
            let mut j = 0;
            while j < there {
                tile.add_group::<F, int8_tile::TensorCores, 4, 4>(&mut acc, j);
                j += 1;
            }
            add(totals, &acc);
        }
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn add(totals: &mut Accumulators<4, 4>, acc: &Accumulators<4, 4>) {
        unroll!(M in 0..4 { unroll!(N in 0..4 { unroll!(E in 0..4 {
            totals[M][N][E] += acc[M][N][E];
        }); }); });
    }

    /// Ends the CTA's outputs: through shared memory, so that a warp stores whole columns, and that of a gated pair what
    /// belongs together meets.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    fn finish(work: &Work, columns: Smem<u32>, totals: &Accumulators<4, 4>, row: u32, column: u32) {
        let (lane, warp_id) = (thread::lane_id(), thread::warp_id());
        let (g, t) = (lane / 4, lane % 4);
        // Where the codes were.
        let finished = Smem::<f32>::dynamic(0, WIDE as u32 * FINISHED_STRIDE);
        sync::sync_threads();
        unroll!(M in 0..4 { unroll!(N in 0..4 { unroll!(E in 0..4 {
            let column = column + (8 * N + E % 2) as u32 + 2 * t;
            let row = row + (16 * M + E / 2 * 8) as u32 + g;
            finished.st(column * FINISHED_STRIDE + row, totals[M][N][E]);
        }); }); });
        sync::sync_threads();

        store_columns(work, columns, finished, FINISHED_STRIDE, warp_id, WARPS);
    }

    /// Ends the outputs of a finished tile, whose columns start `stride` elements apart: each of `n_warps` warps takes whole
    /// columns.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    pub fn store_columns(
        work: &Work,
        columns: Smem<u32>,
        finished: Smem<f32>,
        stride: u32,
        warp: u32,
        n_warps: u32,
    ) {
        let lane = thread::lane_id();
        let gated = work.gate.is_some();
        let slots = if gated { WIDE_TILES / 2 } else { WIDE_TILES };
        let first_row = work.cta * slots * ROWS as u32;
        let mut c = warp;
        while c < work.columns.n {
            let output = columns.ld(WIDE as u32 + c);
            let mut slot = 0;
            while slot < slots {
                let in_tile = slot * ROWS as u32 + lane;
                let row = first_row + in_tile;
                if row < work.part.n_rows {
                    let at = c * stride + in_tile;
                    let up = if gated { finished.ld(at + WIDE as u32 / 2) } else { 0.0 };
                    work.finish(output, row, [finished.ld(at), up]);
                }
                slot += 1;
            }
            c += n_warps;
        }
    }

    /// The CTA's work.
    #[inline(always)]
    #[track_caller]
    pub fn wide<F: BlockFormat + Tiled>(work: &Work) {
        let (warp_id, thread) = (thread::warp_id(), thread::thread_idx_x());
        let slot = warp_id % WIDE_TILES;
        let (w, tile) = if work.gate.is_some() {
            (if slot < 2 { work.part.w } else { work.up.w }, 2 * work.cta + slot % 2)
        } else {
            (work.part.w, WIDE_TILES * work.cta + slot)
        };
        // Beyond the last row the last tile again; its outputs are not stored.
        let n_tiles = work.part.n_rows.div_ceil(ROWS as u32);
        let tile = if tile < n_tiles { tile } else { n_tiles - 1 };

        let [a, b, row_floats, column_floats, raw, columns, _] = const { layout::<F>() };
        let codes = |at: u32| Codes(Smem::dynamic(at, 2 * CODES_BYTES / 16));
        let pipeline = Pipeline::<F> {
            scales: work.scales,
            w: w.offset(work.tile_at::<F>(tile)),
            n_groups: work.n_groups,
            a: codes(a),
            b: codes(b),
            row_floats: Smem::dynamic(row_floats, 2 * Pipeline::<F>::ROW_FLOATS),
            column_floats: Smem::dynamic(column_floats, 2 * Pipeline::<F>::COLUMN_FLOATS),
            raw: Smem::dynamic(raw, 2 * WIDE_TILES * Pipeline::<F>::RAW_BYTES / 4),
            columns: Smem::dynamic(columns, 2 * WIDE as u32),
            format: PhantomData,
        };
        if thread < WIDE as u32 {
            pipeline.columns.st(thread, work.columns.input(thread));
            let output = if thread < work.columns.n { work.columns.output(thread) } else { NONE };
            pipeline.columns.st(WIDE as u32 + thread, output);
        }

        let n_spans = work.n_groups.div_ceil(SPAN_GROUPS as u32);
        let (row, column) = (warp_id / 4 * 64, warp_id % 4 * 32);
        // -0 + x is x, whatever x.
        let mut totals = [[[-0.0f32; 4]; 4]; 4];
        pipeline.copy_raw(0);
        async_copy::commit();
        // In round i span i is unpacked and span i - 1 multiplied.
        let mut round = 0;
        while round <= n_spans {
            // What was copied in the last round is there, what was read in it may be overwritten.
            async_copy::wait::<0>();
            sync::sync_threads();
            if round < n_spans {
                copy_activations(work.q, pipeline.b, pipeline.columns, round, work.n_groups);
            }
            if round + 1 < n_spans {
                pipeline.copy_raw(round + 1);
            }
            async_copy::commit();
            if round < n_spans && warp_id < WIDE_TILES {
                pipeline.unpack::<0>(round);
            }
            if round > 0 {
                pipeline.multiply(&mut totals, round - 1, row, column);
            }
            if round < n_spans && warp_id >= WIDE_TILES {
                pipeline.unpack::<1>(round);
            }
            round += 1;
        }
        finish(work, pipeline.columns, &totals, row, column);
    }
}
