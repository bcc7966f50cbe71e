//! Tiled quantised weights × many columns on int8 tensor cores: `y[c][r] = Σ w[r][i] · x[c][i]`, with what follows a
//! product in the same launch.
//!
//! * Shapes: `w` [n_rows, k] in any block format that models use for weights (not Q8_1, Q8_K), tiled (`tile.rs`), 16-byte
//!   aligned; activations [n_cols, k] as `quantise_act` writes them (`q`, `scales`) in the format's kind
//!   (`BlockFormat::ACT`); `y` [n_cols, n_rows] f32. Nothing overlaps, except that `residual` may be `y`.
//! * Parts: up to 3 matrices of one format that share the activations, each with its own rows and output.
//! * Epilogue: `epilogue.rs`. With a [`Glu`], two parts of one shape are gate and up, and the first part's `y` is written.
//! * Mixture: columns are (token, slot) pairs, sorted by expert (`moe_sort`); the weights are [n_expert, n_rows, k], the
//!   bias [n_expert, n_rows]; activations have a row per token or one per pair; `y` one per pair, in the unsorted order.
//! * Result: as `mmvq`'s, bit for bit: per span of 256 weights `BlockFormat::dot_group`'s chain from 0 over its groups in
//!   order of k; spans added in order. So it depends on k alone, not on the entry, the grid or n_cols.
//! * Tolerance: NMSE 1e-11 against `dot_group` summed in f64, group by group.
//! * Bytes: the weights once, plus n_cols · (k · 1.25 + 4 · n_rows). FLOPs: 2 · n_rows · n_cols · k.
//!
//! Two ways to cut the work, chosen by shape and by the device's shared memory ([`Cut`]):
//!
//! * *Wide*, 128 rows × 128 columns a CTA, for full machines. Spans pass through a pipeline in shared memory: raw tiles and
//!   activations arrive by asynchronous copies one span ahead; half of the warps unpack the next span before they multiply
//!   the present one, the other half after, so that a scheduler has both kinds of work at any time; one barrier per span.
//!   A warp's tile is 64 × 32: two sets of 64 accumulators, the span's and the total, stay in registers.
//! * *Narrow*, 32 rows × 16 or 32 columns a CTA, where that would leave SMs idle, as for 9 to 64 columns, bound by
//!   memory: each of eight warps multiplies a span of its own straight from registers, with no barrier but one pair for
//!   every eight spans, when their partial sums are added in order.
//!
//! On sm_90a `wgmma` could take the place of `Product` in the wide cut, and bulk copies that of its raw tiles: each is
//! one contiguous piece. It would spare the loads of fragments, which are 5 % of the instructions; the float operations
//! per group, which are 80 %, stay (`int8_tile.rs`).

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

use quant::BlockFormat;

use crate::kernels::epilogue::{GluArgs, Part};
use crate::kernels::int8_tile::{column_planes, row_planes};
use crate::tile::{ROWS, SPAN_GROUPS, Tiled};

const THREADS: u32 = 256;
const WARPS: u32 = THREADS / 32;

/// What the parts have in common.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Shape {
    n_groups: u32,
    n_cols: u32,
    /// In a mixture: pairs that share a row of activations.
    pairs_per_x: u32,
    glu: GluArgs,
}

/// Rows and columns of a CTA's tile.
const WIDE: usize = 128;
/// Row tiles of it.
const WIDE_TILES: u32 = (WIDE / ROWS) as u32;
/// Chunks of 16 bytes in a span of codes.
const SPAN_CHUNKS: u32 = 2 * SPAN_GROUPS as u32;
/// Elements between the columns of the tile that a gated pair exchanges: four column pairs in different banks.
const EXCHANGE_STRIDE: u32 = 68;

/// The wide cut's shared memory: two stages of everything.
struct WideLayout {
    a: u32,
    b: u32,
    row_floats: u32,
    column_floats: u32,
    raw: u32,
    columns: u32,
    bytes: u32,
}

/// Bytes of one stage's codes.
const WIDE_CODES_BYTES: u32 = (WIDE * SPAN_GROUPS * 32) as u32;
/// Floats of one plane.
const WIDE_PLANE: u32 = (WIDE * SPAN_GROUPS) as u32;

const fn wide_layout<F: BlockFormat + Tiled>() -> WideLayout {
    let a = 0;
    let b = a + 2 * WIDE_CODES_BYTES;
    let row_floats = b + 2 * WIDE_CODES_BYTES;
    let column_floats = row_floats + 2 * 4 * WIDE_PLANE * row_planes::<F>() as u32;
    let raw = column_floats + 2 * 4 * WIDE_PLANE * column_planes::<F>() as u32;
    let columns = raw + 2 * WIDE_TILES * ROWS as u32 * F::LAYOUT.span_bytes as u32;
    WideLayout { a, b, row_floats, column_floats, raw, columns, bytes: columns + 8 * WIDE as u32 }
}

/// Shared memory of the wide cut.
const fn wide_bytes<F: BlockFormat + Tiled>() -> u32 {
    wide_layout::<F>().bytes
}

/// Groups that a warp of the narrow cut unpacks at a time.
const CHUNK: usize = 2;
/// Chunks of a span.
const SPAN_STEPS: u32 = (SPAN_GROUPS / CHUNK) as u32;

/// A warp's shared memory in the narrow cut: unpacked weights and floats, over which its partial sums are written,
/// then two stages of activations.
struct NarrowLayout {
    row_floats: u32,
    column_floats: u32,
    b: u32,
    bytes: u32,
}

const fn narrow_layout<F: BlockFormat>(cols: usize) -> NarrowLayout {
    let row_floats = (ROWS * CHUNK * 32) as u32;
    let column_floats = row_floats + (row_planes::<F>() * CHUNK * ROWS * 4) as u32;
    let unpacked = column_floats + (column_planes::<F>() * CHUNK * cols * 4) as u32;
    let partial = (ROWS * cols * 4) as u32;
    let b = if unpacked < partial { partial } else { unpacked };
    NarrowLayout { row_floats, column_floats, b, bytes: b + 2 * (cols * CHUNK * 32) as u32 }
}

/// Shared memory of the narrow cut.
const fn narrow_bytes<F: BlockFormat>(cols: usize) -> u32 {
    WARPS * narrow_layout::<F>(cols).bytes
}

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod gpu {
    use bytemuck::Zeroable;
    use quant::BlockFormat;

    use super::{
        CHUNK, EXCHANGE_STRIDE, Part, SPAN_CHUNKS, SPAN_STEPS, Shape, THREADS, WARPS, WIDE, WIDE_CODES_BYTES,
        WIDE_PLANE, WIDE_TILES, narrow_layout, wide_layout,
    };
    use crate::device::math::opaque;
    use crate::device::{Glb, Smem, U32x2, U32x4, Word, async_copy, sync, thread, warp};
    use crate::kernels::int8_tile::{self, Accumulators, Codes, Product, Tile, column_planes, row_planes};
    use crate::kernels::quantise_act::ActScale;
    use crate::tile::{ROWS, SPAN_GROUPS, Tiled, block, load_span};

    pub(super) type GpuPart = Part<Glb<u8>>;

    /// Where no column is.
    const NONE: u32 = u32::MAX;

    /// The columns of a CTA.
    #[derive(Clone, Copy)]
    struct Columns {
        order: Glb<u32>,
        expert: u32,
        first: u32,
        n: u32,
        pairs_per_x: u32,
    }

    impl Columns {
        /// Tile `x` of `COLS` columns; an entry of the mixture's list, if there is one.
        #[inline(always)]
        #[track_caller]
        fn tile<const COLS: usize>(shape: &Shape, order: Glb<u32>, tiles: Glb<U32x4>) -> Columns {
            let x = thread::block_idx_x();
            let [expert, first, n, _] = if tiles.is_null() {
                let (first, cols) = (x * COLS as u32, COLS as u32);
                let rest = shape.n_cols - first;
                [0, first, if rest < cols { rest } else { cols }, 0]
            } else {
                tiles.ld_nc(x).0
            };
            Columns { order, expert, first, n, pairs_per_x: shape.pairs_per_x }
        }

        /// Row of `y` of column `c`.
        #[inline(always)]
        #[track_caller]
        fn output(&self, c: u32) -> u32 {
            if c >= self.n {
                NONE
            } else if self.order.is_null() {
                self.first + c
            } else {
                self.order.ld_nc(self.first + c)
            }
        }

        /// Row of the activations of column `c`; beyond the last column the last.
        #[inline(always)]
        #[track_caller]
        fn input(&self, c: u32) -> u32 {
            let c = if c < self.n { c } else { self.n - 1 };
            let output = self.output(c);
            if self.order.is_null() { output } else { output / self.pairs_per_x }
        }
    }

    /// The part that a CTA works on.
    #[inline(always)]
    fn part_of(cta: u32, p0: GpuPart, p1: GpuPart, p2: GpuPart) -> GpuPart {
        if cta < p1.first_cta {
            p0
        } else if cta < p2.first_cta {
            p1
        } else {
            p2
        }
    }

    /// Groups of a span.
    #[inline(always)]
    fn groups_of(span: u32, n_groups: u32) -> u32 {
        let rest = n_groups - span * SPAN_GROUPS as u32;
        if rest < SPAN_GROUPS as u32 { rest } else { SPAN_GROUPS as u32 }
    }

    /// Units of a span of one row.
    #[inline(always)]
    fn units_of<F: BlockFormat + Tiled>(span: u32, n_groups: u32) -> u32 {
        let blocks = groups_of(span, n_groups) as usize / F::GROUPS;
        (blocks * F::LAYOUT.block_bytes).div_ceil(F::LAYOUT.unit_bytes) as u32
    }

    /// Group `g` of a span in registers; a constant.
    #[inline(always)]
    fn group<F: BlockFormat + Tiled>(words: &F::Words, g: usize) -> quant::Group {
        block::<F>(words, g / F::GROUPS).unpack_group(g % F::GROUPS)
    }

    /// Adds a bias, if there is one.
    #[inline(always)]
    #[track_caller]
    fn biased(bias: Glb<u8>, row: u32, value: f32) -> f32 {
        if bias.is_null() { value } else { value + bias.cast::<f32>().ld_nc(row) }
    }

    /// The last steps of the epilogue, for an output that exists.
    #[inline(always)]
    #[track_caller]
    fn finish(part: &GpuPart, column: u32, row: u32, mut value: f32) {
        let line = column as usize * part.n_rows as usize;
        if !part.residual.is_null() {
            value += part.residual.cast::<f32>().offset(line).ld(row);
        }
        part.y.cast::<f32>().offset(line).st(row, value);
    }

    /// A unit of a row of a raw tile in shared memory.
    #[inline(always)]
    #[track_caller]
    fn load_units<F: Tiled, U: Word>(raw: Smem<U>, first_byte: u32, n_units: u32) -> F::Words {
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

    /// One CTA of the wide cut, its shared memory and its threads' places.
    struct Wide<F> {
        q: Glb<U32x4>,
        scales: Glb<U32x2>,
        /// Where this warp's row tile starts; warps 4 apart have the same.
        w: Glb<u8>,
        n_groups: u32,
        a: Codes<SPAN_GROUPS>,
        b: Codes<SPAN_GROUPS>,
        row_floats: Smem<f32>,
        column_floats: Smem<f32>,
        raw: Smem<u32>,
        /// Rows of the activations of the columns, then rows of the output.
        columns: Smem<u32>,
        format: core::marker::PhantomData<F>,
    }

    impl<F: BlockFormat + Tiled> Wide<F> {
        const ROW_FLOATS: u32 = WIDE_PLANE * row_planes::<F>() as u32;
        const COLUMN_FLOATS: u32 = WIDE_PLANE * column_planes::<F>() as u32;
        const RAW_BYTES: u32 = (ROWS * F::LAYOUT.span_bytes) as u32;

        /// Starts the copies of a span's raw tiles: each warp half of its row tile's.
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

        /// Starts the copies of a span's activations: 16 threads a column.
        #[inline(always)]
        #[track_caller]
        fn copy_activations(&self, span: u32) {
            let chunk = thread::thread_idx_x() % SPAN_CHUNKS;
            let stage = span % 2 * (WIDE_CODES_BYTES / 16);
            if chunk < 2 * groups_of(span, self.n_groups) {
                let at = span * SPAN_CHUNKS + chunk;
                unroll!(I in 0..8 {
                    let column = thread::thread_idx_x() / SPAN_CHUNKS + I as u32 * (THREADS / SPAN_CHUNKS);
                    let source = self.columns.ld(column) * (2 * self.n_groups) + at;
                    let target = stage + Codes::<SPAN_GROUPS>::index(column, chunk);
                    async_copy::copy16(self.b.0, target, self.q, source);
                });
            }
        }

        /// Unpacks half `HALF` of a span: each lane a row of the warp's row tile, and the floats of a column.
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
                16 => load_units::<F, U32x4>(self.raw.cast(), first_byte, units),
                8 => load_units::<F, U32x2>(self.raw.cast(), first_byte, units),
                _ => load_units::<F, u32>(self.raw, first_byte, units),
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
            (
                Codes(self.a.0.skip(stage * (WIDE_CODES_BYTES / 16))),
                self.row_floats.skip(stage * Self::ROW_FLOATS),
            )
        }

        #[inline(always)]
        fn column_floats(&self, stage: u32) -> Smem<f32> {
            self.column_floats.skip(stage * Self::COLUMN_FLOATS)
        }

        /// Adds a span to the totals of a warp's tile of 64 × 32.
        #[inline(always)]
        #[track_caller]
        fn multiply<P: Product>(&self, totals: &mut Accumulators<4, 4>, span: u32, row: u32, column: u32) {
            let stage = span % 2;
            let (a, row_floats) = self.weights(stage);
            let b = Codes(self.b.0.skip(stage * (WIDE_CODES_BYTES / 16)));
            let column_floats = self.column_floats(stage);
            let tile = Tile::<SPAN_GROUPS, WIDE, WIDE> { a, b, row_floats, column_floats, row, column };
            let mut acc = [[[0.0f32; 4]; 4]; 4];
            // Unknown to the compiler, so that the loop stays rolled: its body is some 250 instructions.
            let there = opaque(groups_of(span, self.n_groups));
            let mut j = 0;
            while j < there {
                tile.add_group::<F, P, 4, 4>(&mut acc, j);
                j += 1;
            }
            unroll!(M in 0..4 { unroll!(N in 0..4 { unroll!(E in 0..4 {
                totals[M][N][E] += acc[M][N][E];
            }); }); });
        }
    }

    /// The wide cut.
    #[inline(always)]
    pub(super) fn wide<F: BlockFormat + Tiled, P: Product>(
        p0: GpuPart,
        p1: GpuPart,
        p2: GpuPart,
        q: Glb<U32x4>,
        scales: Glb<U32x2>,
        order: Glb<u32>,
        tiles: Glb<U32x4>,
        shape: Shape,
    ) {
        let columns = Columns::tile::<WIDE>(&shape, order, tiles);
        // The whole CTA leaves: an entry of the list that no columns fill.
        if columns.n == 0 {
            return;
        }
        let (lane, warp_id, thread) = (thread::lane_id(), thread::warp_id(), thread::thread_idx_x());
        let gated = shape.glu.kind != 0;
        let cta = thread::block_idx_y();
        let part = part_of(cta, p0, p1, p2);
        let n_tiles = part.n_rows.div_ceil(ROWS as u32);
        let tile_bytes = F::LAYOUT.tile_bytes(shape.n_groups as usize * quant::format::GROUP);

        // Row tile slots 0 to 3; of a gated pair 0 and 1 are the gate's, 2 and 3 the same rows of up.
        let slot = warp_id % WIDE_TILES;
        let (w, tile) = if gated {
            (if slot < 2 { part.w } else { p1.w }, 2 * cta + slot % 2)
        } else {
            (part.w, WIDE_TILES * (cta - part.first_cta) + slot)
        };
        // Beyond the last row the last tile again; its outputs are not stored.
        let tile = if tile < n_tiles { tile } else { n_tiles - 1 };
        let tile = columns.expert as usize * n_tiles as usize + tile as usize;

        let layout = const { wide_layout::<F>() };
        let codes = |at: u32| Codes(Smem::dynamic(at, 2 * WIDE_CODES_BYTES / 16));
        let wide = Wide::<F> {
            q,
            scales,
            w: w.offset(tile * tile_bytes),
            n_groups: shape.n_groups,
            a: codes(layout.a),
            b: codes(layout.b),
            row_floats: Smem::dynamic(layout.row_floats, 2 * Wide::<F>::ROW_FLOATS),
            column_floats: Smem::dynamic(layout.column_floats, 2 * Wide::<F>::COLUMN_FLOATS),
            raw: Smem::dynamic(layout.raw, 2 * WIDE_TILES * Wide::<F>::RAW_BYTES / 4),
            columns: Smem::dynamic(layout.columns, 2 * WIDE as u32),
            format: core::marker::PhantomData,
        };
        if thread < WIDE as u32 {
            wide.columns.st(thread, columns.input(thread));
            wide.columns.st(WIDE as u32 + thread, columns.output(thread));
        }

        let n_spans = shape.n_groups.div_ceil(SPAN_GROUPS as u32);
        let (row, column) = (warp_id / 4 * 64, warp_id % 4 * 32);
        // -0 + x is x, whatever x.
        let mut totals = [[[-0.0f32; 4]; 4]; 4];
        wide.copy_raw(0);
        async_copy::commit();
        // In round i span i is unpacked and span i - 1 multiplied.
        let mut round = 0;
        while round <= n_spans {
            // What was copied in the last round is there, what was read in it may be overwritten.
            async_copy::wait::<0>();
            sync::sync_threads();
            if round < n_spans {
                wide.copy_activations(round);
            }
            if round + 1 < n_spans {
                wide.copy_raw(round + 1);
            }
            async_copy::commit();
            if round < n_spans && warp_id < WIDE_TILES {
                wide.unpack::<0>(round);
            }
            if round > 0 {
                wide.multiply::<P>(&mut totals, round - 1, row, column);
            }
            if round < n_spans && warp_id >= WIDE_TILES {
                wide.unpack::<1>(round);
            }
            round += 1;
        }

        let (g, t) = (lane / 4, lane % 4);
        // Of a gated pair, the warps of up hand their tiles over.
        let exchange = Smem::<f32>::dynamic(0, WIDE as u32 * EXCHANGE_STRIDE);
        let first_row = if gated { 64 * cta } else { WIDE as u32 * (cta - part.first_cta) + row };
        let first_bias = columns.expert * part.n_rows;
        let bias = if gated && row != 0 { p1.bias } else { part.bias };
        unroll!(M in 0..4 { unroll!(R in 0..2 {
            let row = first_row + (16 * M + 8 * R) as u32 + g;
            if !bias.is_null() && row < part.n_rows {
                let bias = bias.cast::<f32>().ld_nc(first_bias + row);
                unroll!(N in 0..4 { unroll!(C in 0..2 {
                    totals[M][N][2 * R + C] += bias;
                }); });
            }
        }); });
        if gated {
            sync::sync_threads();
            if row != 0 {
                unroll!(M in 0..4 { unroll!(N in 0..4 { unroll!(E in 0..4 {
                    let column = column + (8 * N + E % 2) as u32 + 2 * t;
                    exchange.st(column * EXCHANGE_STRIDE + (16 * M + E / 2 * 8) as u32 + g, totals[M][N][E]);
                }); }); });
            }
            sync::sync_threads();
            if row != 0 {
                return;
            }
            unroll!(M in 0..4 { unroll!(N in 0..4 { unroll!(E in 0..4 {
                let column = column + (8 * N + E % 2) as u32 + 2 * t;
                let up = exchange.ld(column * EXCHANGE_STRIDE + (16 * M + E / 2 * 8) as u32 + g);
                totals[M][N][E] = shape.glu.gated(totals[M][N][E], up);
            }); }); });
        }
        unroll!(N in 0..4 { unroll!(C in 0..2 {
            let output = wide.columns.ld(WIDE as u32 + column + (8 * N + C) as u32 + 2 * t);
            if output != NONE {
                unroll!(M in 0..4 { unroll!(R in 0..2 {
                    let row = first_row + (16 * M + 8 * R) as u32 + g;
                    if row < part.n_rows {
                        finish(&part, output, row, totals[M][N][2 * R + C]);
                    }
                }); });
            }
        }); });
    }

    /// Where a warp's partial sum of an output lies: column pairs of a lane quad in different banks.
    #[inline(always)]
    fn partial_index(row: u32, column: u32) -> u32 {
        column * ROWS as u32 + (row ^ (column / 2 % 4 * 8))
    }

    /// One warp of the narrow cut.
    struct Narrow<F, const COLS: usize> {
        q: Glb<U32x4>,
        scales: Glb<U32x2>,
        n_groups: u32,
        /// Rows of the activations that this lane copies, and whose scales it prepares.
        copied: [u32; 4],
        scaled: u32,
        a: Codes<CHUNK>,
        b: Codes<CHUNK>,
        row_floats: Smem<f32>,
        column_floats: Smem<f32>,
        format: core::marker::PhantomData<F>,
    }

    impl<F: BlockFormat + Tiled, const COLS: usize> Narrow<F, COLS> {
        /// Column and group, within a chunk, whose floats this lane prepares in step `i`.
        #[inline(always)]
        fn scale_place(i: usize) -> (u32, u32) {
            let at = thread::lane_id() + 32 * i as u32;
            (at % COLS as u32, at / COLS as u32)
        }

        /// Starts the copies of the chunk of activations at group `first`, and returns their scales.
        #[inline(always)]
        #[track_caller]
        fn fetch(&self, first: u32, stage: u32) -> [U32x2; 2] {
            let chunk = thread::lane_id() % (2 * CHUNK) as u32;
            if first + chunk / 2 < self.n_groups {
                let mut i = 0;
                while 8 * i < COLS {
                    let source = self.copied[i] * (2 * self.n_groups) + 2 * first + chunk;
                    let target = Codes::<CHUNK>::index(thread::lane_id() / 4 + 8 * i as u32, chunk);
                    async_copy::copy16(self.b.0, stage * (4 * COLS as u32) + target, self.q, source);
                    i += 1;
                }
            }
            async_copy::commit();
            let mut acts = [U32x2([0; 2]); 2];
            let mut i = 0;
            while i * 32 < COLS * CHUNK {
                let (_, j) = Self::scale_place(i);
                if first + j < self.n_groups {
                    let row = self.scales.offset(self.scaled as usize * self.n_groups as usize);
                    acts[i] = row.ld_nc(first + j);
                }
                i += 1;
            }
            acts
        }

        /// Stores the floats of a chunk's columns.
        #[inline(always)]
        #[track_caller]
        fn put_columns(&self, acts: [U32x2; 2]) {
            let mut i = 0;
            while i * 32 < COLS * CHUNK {
                let (column, j) = Self::scale_place(i);
                let U32x2([d, extra]) = acts[i];
                let act = ActScale { d: f32::from_bits(d), extra };
                int8_tile::put_column::<F, CHUNK, COLS>(self.column_floats, column, j, act);
                i += 1;
            }
        }
    }

    /// The narrow cut: 32 rows, `COLS` columns (8 · `NT`).
    #[inline(always)]
    pub(super) fn narrow<F: BlockFormat + Tiled, P: Product, const COLS: usize, const NT: usize>(
        p0: GpuPart,
        p1: GpuPart,
        p2: GpuPart,
        q: Glb<U32x4>,
        scales: Glb<U32x2>,
        order: Glb<u32>,
        tiles: Glb<U32x4>,
        shape: Shape,
    ) {
        const { assert!(COLS == 8 * NT && COLS <= 32) };
        let columns = Columns::tile::<COLS>(&shape, order, tiles);
        // The whole CTA leaves: an entry of the list that no columns fill.
        if columns.n == 0 {
            return;
        }
        let (lane, warp_id) = (thread::lane_id(), thread::warp_id());
        let gated = shape.glu.kind != 0;
        let cta = thread::block_idx_y();
        let part = part_of(cta, p0, p1, p2);
        let row_tile = cta - part.first_cta;
        let n_tiles = part.n_rows.div_ceil(ROWS as u32);
        let tile_bytes = F::LAYOUT.tile_bytes(shape.n_groups as usize * quant::format::GROUP);
        let tile_at = (columns.expert as usize * n_tiles as usize + row_tile as usize) * tile_bytes;

        // An item is a span of one matrix; gate and up alternate.
        let n_spans = shape.n_groups.div_ceil(SPAN_GROUPS as u32);
        let n_items = if gated { 2 * n_spans } else { n_spans };
        let span_of = |item: u32| if gated { item / 2 } else { item };
        let load = |item: u32| {
            let w = if gated && item % 2 == 1 { p1.w } else { part.w };
            let span = span_of(item);
            let at = tile_at + F::LAYOUT.span_offset(span as usize);
            load_span::<F>(w.offset(at), units_of::<F>(span, shape.n_groups))
        };

        let layout = const { narrow_layout::<F>(COLS) };
        let base = warp_id * layout.bytes;
        let column_of = |i: u32| columns.input(lane / 4 + 8 * i);
        let narrow = Narrow::<F, COLS> {
            q,
            scales,
            n_groups: shape.n_groups,
            copied: core::array::from_fn(|i| if 8 * i < COLS { column_of(i as u32) } else { 0 }),
            scaled: columns.input(lane % COLS as u32),
            a: Codes(Smem::dynamic(base, (ROWS * 2 * CHUNK) as u32)),
            b: Codes(Smem::dynamic(base + layout.b, (2 * COLS * 2 * CHUNK) as u32)),
            row_floats: Smem::dynamic(base + layout.row_floats, (row_planes::<F>() * CHUNK * ROWS) as u32),
            column_floats: Smem::dynamic(
                base + layout.column_floats,
                (column_planes::<F>() * CHUNK * COLS) as u32,
            ),
            format: core::marker::PhantomData,
        };
        let partials = |of_warp: u32| Smem::<f32>::dynamic(of_warp * layout.bytes, (ROWS * COLS) as u32);

        let mut words = F::Words::zeroed();
        let mut acts = [U32x2([0; 2]); 2];
        let mut stage = 0;
        if warp_id < n_items {
            words = load(warp_id);
            acts = narrow.fetch(span_of(warp_id) * SPAN_GROUPS as u32, 0);
        }

        // Of the outputs t, t + 256, … of the CTA, thread t keeps the totals: of both matrices of a gated pair.
        let mut totals = [[-0.0f32; 4]; 2];
        let mut first_item = 0;
        while first_item < n_items {
            let item = first_item + warp_id;
            if item < n_items {
                let first = span_of(item) * SPAN_GROUPS as u32;
                let there = groups_of(span_of(item), shape.n_groups);
                let mut acc = [[[0.0f32; 4]; NT]; 2];
                // Unknown to the compiler, so that the loop stays rolled.
                let steps = opaque(SPAN_STEPS);
                let mut step = 0;
                while step < steps && step * (CHUNK as u32) < there {
                    // Unpack a chunk: all lanes are done with the last one.
                    narrow.put_columns(acts);
                    unroll!(S in 0..4 {
                        if step == S as u32 {
                            unroll!(J in 0..2 {
                                let group = group::<F>(&words, CHUNK * S + J);
                                int8_tile::put_group::<F, CHUNK, ROWS>(
                                    narrow.a, narrow.row_floats, lane, J as u32, &group,
                                );
                            });
                            // The registers are free: the next item's words are under way during this chunk's product.
                            if S == 3 && item + WARPS < n_items {
                                words = load(item + WARPS);
                            }
                        }
                    });
                    let next = (step + 1) * CHUNK as u32;
                    let next = if next < there {
                        first + next
                    } else if item + WARPS < n_items {
                        span_of(item + WARPS) * SPAN_GROUPS as u32
                    } else {
                        // Nothing follows; past the end nothing is copied.
                        shape.n_groups
                    };
                    acts = narrow.fetch(next, stage ^ 1);
                    async_copy::wait::<1>();
                    warp::sync_warp();

                    let tile = Tile::<CHUNK, ROWS, COLS> {
                        a: narrow.a,
                        b: Codes(narrow.b.0.skip(stage * (4 * COLS as u32))),
                        row_floats: narrow.row_floats,
                        column_floats: narrow.column_floats,
                        row: 0,
                        column: 0,
                    };
                    tile.add_group::<F, P, 2, NT>(&mut acc, 0);
                    if step * (CHUNK as u32) + 1 < there {
                        tile.add_group::<F, P, 2, NT>(&mut acc, 1);
                    }
                    warp::sync_warp();
                    stage ^= 1;
                    step += 1;
                }

                // The partial sums take the place of the unpacked chunk.
                let partials = partials(warp_id);
                let (g, t) = (lane / 4, lane % 4);
                unroll!(M in 0..2 {
                    let mut n = 0;
                    while n < NT {
                        unroll!(E in 0..4 {
                            let column = (8 * n + E % 2) as u32 + 2 * t;
                            let row = (16 * M + E / 2 * 8) as u32 + g;
                            partials.st(partial_index(row, column), acc[M][n][E]);
                        });
                        n += 1;
                    }
                });
            }
            sync::sync_threads();

            // Add the spans in order.
            let rest = n_items - first_item;
            let here = if rest < WARPS { rest } else { WARPS };
            let mut i = 0;
            while 8 * i < COLS {
                let column = warp_id + 8 * i as u32;
                let at = partial_index(lane, column);
                let mut item = 0;
                while item < here {
                    if gated && item % 2 == 1 {
                        totals[1][i] += partials(item).ld(at);
                    } else {
                        totals[0][i] += partials(item).ld(at);
                    }
                    item += 1;
                }
                i += 1;
            }
            sync::sync_threads();
            first_item += WARPS;
        }

        let row = row_tile * ROWS as u32 + lane;
        let mut i = 0;
        while 8 * i < COLS {
            let output = columns.output(warp_id + 8 * i as u32);
            if output != NONE && row < part.n_rows {
                let in_bias = columns.expert * part.n_rows + row;
                let mut value = biased(part.bias, in_bias, totals[0][i]);
                if gated {
                    value = shape.glu.gated(value, biased(p1.bias, in_bias, totals[1][i]));
                }
                finish(&part, output, row, value);
            }
            i += 1;
        }
    }
}

/// Entries of every format that models use for weights, and the functions that find them.
macro_rules! entries {
    ([] $($rows:tt)*) => { entries! { @used [] $($rows)* } };
    // Formats of activations only.
    (@used [$($used:tt)*] Q8_1 => $module:ident :: Block, $($rest:tt)*) => { entries! { @used [$($used)*] $($rest)* } };
    (@used [$($used:tt)*] Q8_K => $module:ident :: Block, $($rest:tt)*) => { entries! { @used [$($used)*] $($rest)* } };
    (@used [$($used:tt)*] $id:ident => $module:ident :: Block, $($rest:tt)*) => {
        entries! { @used [$($used)* $id => $module,] $($rest)* }
    };
    (@used [$($id:ident => $module:ident,)*]) => {
        #[cfg(any(target_arch = "nvptx64", feature = "emu"))]
        kernels! {
            in "mmq";
            ENTRIES: threads(256);
            fn (
                p0: gpu::GpuPart, p1: gpu::GpuPart, p2: gpu::GpuPart,
                q: Glb<U32x4>, scales: Glb<U32x2>, order: Glb<u32>, tiles: Glb<U32x4>, shape: Shape,
            );
            $(
                concat!("mmq_", stringify!($id), "_n16") => gpu::narrow::<formats::$module::Block, Native, 16, 2>;
                concat!("mmq_", stringify!($id), "_n32") => gpu::narrow::<formats::$module::Block, Native, 32, 4>;
                concat!("mmq_", stringify!($id), "_n128") => gpu::wide::<formats::$module::Block, Native>;
            )*
        }

        /// Entry of a format and its shared memory.
        #[cfg(not(target_arch = "nvptx64"))]
        fn entry(format: quant::FormatId, cut: Cut) -> Option<(&'static str, u32)> {
            match format {
                $(quant::FormatId::$id => Some(match cut {
                    Cut::Narrow16 => {
                        (concat!("mmq_", stringify!($id), "_n16"), narrow_bytes::<formats::$module::Block>(16))
                    }
                    Cut::Narrow32 => {
                        (concat!("mmq_", stringify!($id), "_n32"), narrow_bytes::<formats::$module::Block>(32))
                    }
                    Cut::Wide => (concat!("mmq_", stringify!($id), "_n128"), wide_bytes::<formats::$module::Block>()),
                }),)*
                _ => None,
            }
        }

        /// Formats with entries.
        #[cfg(not(target_arch = "nvptx64"))]
        const FORMATS: &[quant::FormatId] = &[$(quant::FormatId::$id,)*];
    };
}

use quant::formats;
#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
use {
    crate::device::{Glb, U32x2, U32x4},
    crate::kernels::int8_tile::Native,
};
quant::for_each_block_format!(entries![]);

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use alloc::{boxed::Box, vec, vec::Vec};

    use quant::act::ActKind;
    use quant::{ActGroup, BlockFormat, FloatFormat, FormatId, Visitor, info, with_format};

    use super::{FORMATS, Part, ROWS, Shape, THREADS, WIDE, entry};
    use crate::case::{Buffer, Expected, Kernel, Problem, Random, bytes_of};
    use crate::kernels::epilogue::{Glu, GluArgs, MAX_PARTS};
    use crate::kernels::mmvq::Weights;
    use crate::kernels::quantise_act;
    use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};
    use crate::tile;

    /// How the work is cut into CTAs. Every cut gives the same bits.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Cut {
        /// 32 rows, 16 columns.
        Narrow16,
        /// 32 rows, 32 columns.
        Narrow32,
        /// 128 rows (of a gated pair 64 of each), 128 columns. Takes some 200 KiB of shared memory.
        Wide,
    }

    /// SMs that the choice of a cut counts on: an H100's. With another number a choice may be slower, never different in
    /// its result.
    const N_SM: usize = 132;
    /// Cycles per span of a CTA, by instructions issued: of the wide cut, and of a narrow one of 32 columns.
    const SPAN_CYCLES: [usize; 2] = [4400, 362];

    impl Cut {
        /// Columns of a CTA.
        pub fn cols(self) -> usize {
            match self {
                Cut::Narrow16 => 16,
                Cut::Narrow32 => 32,
                Cut::Wide => WIDE,
            }
        }

        /// The faster cut for `n_rows` rows, of all parts together, and `n_cols` columns, on a device that gives a CTA so
        /// much shared memory.
        pub fn choose(format: FormatId, n_rows: usize, n_cols: usize, smem_per_cta_bytes: u32) -> Cut {
            let fits = |cut| entry(format, cut).is_some_and(|(_, bytes)| bytes <= smem_per_cta_bytes);
            let waves =
                |rows: usize, cols: usize| (n_rows.div_ceil(rows) * n_cols.div_ceil(cols)).div_ceil(N_SM);
            let [wide, narrow] = [waves(WIDE, WIDE) * SPAN_CYCLES[0], waves(ROWS, 32) * SPAN_CYCLES[1]];
            if n_cols > 16 && wide <= narrow && fits(Cut::Wide) {
                Cut::Wide
            } else if n_cols > 16 && fits(Cut::Narrow32) {
                Cut::Narrow32
            } else {
                Cut::Narrow16
            }
        }

        /// The same for a mixture of `n_pairs` (token, slot) pairs.
        pub fn choose_mixture(
            format: FormatId,
            n_rows: usize,
            n_expert: usize,
            n_pairs: usize,
            smem_per_cta_bytes: u32,
        ) -> Cut {
            // As if all experts had equally many pairs: their rows are then rows of one matrix.
            Cut::choose(format, n_rows * n_expert, n_pairs.div_ceil(n_expert), smem_per_cta_bytes)
        }
    }

    /// One matrix; see the contract.
    #[derive(Clone, Copy, Debug, Default)]
    #[allow(missing_docs)] // the contract's names
    pub struct Matrix {
        pub w: DevicePtr,
        pub bias: DevicePtr,
        pub residual: DevicePtr,
        pub y: DevicePtr,
        pub n_rows: usize,
    }

    /// Columns of a mixture, as `moe_sort` makes them.
    #[derive(Clone, Copy, Debug)]
    pub struct Mixture {
        /// Pairs by expert.
        pub order: DevicePtr,
        /// Tiles of columns (expert, first, number, 0), for the columns of the launch's cut.
        pub tiles: DevicePtr,
        /// Entries of `tiles`; those that no columns fill have number 0.
        pub n_tiles: usize,
        /// Pairs that share a row of the activations: 1, or as many as a token has.
        pub pairs_per_x: usize,
    }

    /// Arguments; see the contract.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Args<'a> {
        pub format: FormatId,
        pub cut: Cut,
        pub parts: &'a [Matrix],
        pub glu: Option<Glu>,
        pub q: DevicePtr,
        pub scales: DevicePtr,
        pub k: usize,
        /// Columns; in a mixture pairs.
        pub n_cols: usize,
        pub mixture: Option<Mixture>,
    }

    /// One launch for all parts.
    pub fn launch(args: &Args<'_>) -> Result<Launch, LaunchError> {
        let kernel = Mmq::NAME;
        let check = Check(kernel);
        let found = entry(args.format, args.cut);
        let (entry, smem_bytes) = found.ok_or(LaunchError::Format { kernel, format: args.format })?;
        let n_parts = args.parts.len();
        if !(1..=MAX_PARTS).contains(&n_parts) {
            return Err(LaunchError::Shape {
                kernel,
                what: "parts",
                expected: "1 to 3",
                got: n_parts as u64,
            });
        }
        if args.glu.is_some() && (n_parts != 2 || args.parts[0].n_rows != args.parts[1].n_rows) {
            let expected = "2 of as many rows, gate and up";
            return Err(LaunchError::Shape { kernel, what: "parts", expected, got: n_parts as u64 });
        }
        check.multiple("k", args.k, info(args.format).elems, "a multiple of the format's block")?;
        let n_groups = check.size("k", args.k)? / 32;
        let n_cols = check.size("n_cols", args.n_cols)?;
        // The kernel counts the activations' groups in 32 bits.
        check.size("n_cols * k / 16", args.n_cols.saturating_mul(args.k / 16))?;
        for (what, at, align) in [("q", args.q, 16), ("scales", args.scales, 8)] {
            check.aligned(what, at, align)?;
        }

        let rows_per_cta = match args.cut {
            Cut::Narrow16 | Cut::Narrow32 => ROWS,
            Cut::Wide if args.glu.is_some() => WIDE / 2,
            Cut::Wide => WIDE,
        };
        let nothing = DevicePtr::NULL;
        let none =
            Part { w: nothing, bias: nothing, residual: nothing, y: nothing, n_rows: 0, first_cta: u32::MAX };
        let mut parts = [none; MAX_PARTS];
        let mut n_ctas = 0;
        for (i, (part, matrix)) in parts.iter_mut().zip(args.parts).enumerate() {
            let Matrix { w, bias, residual, y, n_rows } = *matrix;
            let n_rows = check.size("n_rows", n_rows)?;
            for (what, at, align) in [("w", w, 16), ("bias", bias, 4), ("residual", residual, 4), ("y", y, 4)]
            {
                check.aligned(what, at, align)?;
            }
            // Up has no CTAs of its own: the gate's do its rows.
            let own = args.glu.is_none() || i == 0;
            let first_cta = if own { n_ctas as u32 } else { u32::MAX };
            *part = Part { w, bias, residual, y, n_rows, first_cta };
            if own {
                n_ctas += (n_rows as usize).div_ceil(rows_per_cta);
            }
        }

        let (order, tiles, n_tiles, pairs_per_x) = match args.mixture {
            None => (nothing, nothing, args.n_cols.div_ceil(args.cut.cols()), 1),
            Some(Mixture { order, tiles, n_tiles, pairs_per_x }) => {
                check.aligned("order", order, 4)?;
                check.aligned("tiles", tiles, 16)?;
                (order, tiles, n_tiles, pairs_per_x)
            }
        };
        let pairs_per_x = check.size("pairs_per_x", pairs_per_x)?;
        let shape = Shape { n_groups, n_cols, pairs_per_x, glu: GluArgs::from(args.glu) };
        let params = parts.into_iter().fold(Params::new(), Params::with);
        let params = params.with(args.q).with(args.scales).with(order).with(tiles).with(shape);
        // Column tiles first: CTAs that run together share the weights, which pass from memory once.
        let grid = [check.size("tiles", n_tiles)?, check.grid("row tiles", n_ctas)?, 1];
        Ok(Launch { entry, grid, cta: THREADS, cluster: 1, smem_bytes, params })
    }

    /// The row in the registry.
    #[derive(Debug)]
    pub struct Mmq;

    /// One case.
    #[derive(Clone, Copy, Debug)]
    pub struct Case {
        /// Format of the weights.
        pub format: FormatId,
        /// The cut.
        pub cut: Cut,
        /// Rows of each part.
        pub n_rows: &'static [usize],
        /// Columns of the weights.
        pub k: usize,
        /// Columns; in a mixture tokens.
        pub n_cols: usize,
        /// Whether there are a bias and a residual.
        pub added: bool,
        /// Of a gated pair.
        pub glu: Option<Glu>,
        /// Of a mixture: experts, experts per token, whether activations have a row for each.
        pub mixture: Option<(usize, usize, bool)>,
    }

    /// A case without extras.
    pub(super) const fn plain(
        format: FormatId,
        cut: Cut,
        n_rows: &'static [usize],
        k: usize,
        n_cols: usize,
    ) -> Case {
        Case { format, cut, n_rows, k, n_cols, added: false, glu: None, mixture: None }
    }

    /// Every format in the narrow cuts' tail of columns and rows and of a span, a few in the wide cut; the edges of tiles;
    /// each extra once in either cut.
    const CASES: &[Case] = &{
        const EXTRA: &[Case] = &[
            plain(FormatId::Q4_0, Cut::Narrow16, &[31], 32, 1),
            plain(FormatId::Q8_0, Cut::Narrow16, &[33], 2336, 16),
            plain(FormatId::Q5_1, Cut::Narrow32, &[32], 544, 31),
            plain(FormatId::Q4_K, Cut::Narrow32, &[5], 2304, 33),
            plain(FormatId::IQ3_XXS, Cut::Narrow32, &[40, 3, 64], 256, 9),
            plain(FormatId::Q4_0, Cut::Wide, &[127], 32, 1),
            plain(FormatId::Q8_0, Cut::Wide, &[129], 288, 127),
            plain(FormatId::Q4_1, Cut::Wide, &[128], 800, 128),
            plain(FormatId::Q4_K, Cut::Wide, &[1], 512, 129),
            plain(FormatId::Q2_K, Cut::Wide, &[70], 256, 40),
            plain(FormatId::Q6_K, Cut::Wide, &[20, 140, 1], 768, 20),
            plain(FormatId::NVFP4, Cut::Wide, &[33], 320, 17),
            plain(FormatId::IQ3_XXS, Cut::Wide, &[97], 512, 65),
            Case { added: true, ..plain(FormatId::Q4_0, Cut::Narrow16, &[37, 8], 288, 12) },
            Case { added: true, ..plain(FormatId::Q4_0, Cut::Wide, &[37, 130], 288, 12) },
            Case {
                added: true,
                glu: Some(Glu::Silu),
                ..plain(FormatId::Q8_0, Cut::Narrow32, &[40; 2], 1312, 20)
            },
            Case { added: true, glu: Some(Glu::Silu), ..plain(FormatId::Q8_0, Cut::Wide, &[70; 2], 544, 20) },
            Case { glu: Some(Glu::Gelu), ..plain(FormatId::Q4_K, Cut::Narrow16, &[9; 2], 256, 3) },
            Case {
                added: true,
                glu: Some(Glu::SwigluOai { alpha: 1.702, limit: 7.0 }),
                ..plain(FormatId::MXFP4, Cut::Narrow32, &[33; 2], 256, 5)
            },
            Case { mixture: Some((5, 2, false)), ..plain(FormatId::Q4_0, Cut::Narrow16, &[35], 288, 30) },
            Case {
                added: true,
                glu: Some(Glu::Silu),
                mixture: Some((3, 2, false)),
                ..plain(FormatId::Q4_K, Cut::Narrow32, &[33; 2], 512, 25)
            },
            Case {
                added: true,
                mixture: Some((3, 2, true)),
                ..plain(FormatId::Q5_0, Cut::Wide, &[50], 64, 90)
            },
        ];
        const N: usize = FORMATS.len();
        let mut cases = [EXTRA[0]; N + EXTRA.len()];
        let mut i = 0;
        while i < cases.len() {
            cases[i] = if i < N { plain(FORMATS[i], Cut::Narrow32, &[37], 768, 18) } else { EXTRA[i - N] };
            i += 1;
        }
        cases
    };

    /// The shapes that prefill and batches of an 8B model have, and a mixture's.
    const BENCH: &[Case] = &[
        plain(FormatId::Q4_0, Cut::Wide, &[4096], 14336, 512),
        plain(FormatId::Q4_0, Cut::Wide, &[14336], 4096, 512),
        plain(FormatId::Q4_0, Cut::Wide, &[14336], 4096, 2048),
        plain(FormatId::Q8_0, Cut::Wide, &[4096], 14336, 512),
        plain(FormatId::Q4_K, Cut::Wide, &[4096], 14336, 512),
        plain(FormatId::Q6_K, Cut::Wide, &[4096], 14336, 512),
        plain(FormatId::IQ3_XXS, Cut::Wide, &[4096], 14336, 512),
        plain(FormatId::Q4_0, Cut::Narrow16, &[4096], 14336, 16),
        plain(FormatId::Q4_0, Cut::Narrow32, &[4096], 14336, 32),
        plain(FormatId::Q4_0, Cut::Narrow32, &[4096], 14336, 64),
        plain(FormatId::Q4_0, Cut::Narrow32, &[4096], 14336, 512),
        plain(FormatId::Q8_0, Cut::Narrow16, &[4096], 14336, 16),
        plain(FormatId::Q4_K, Cut::Narrow16, &[4096], 14336, 16),
        Case { glu: Some(Glu::Silu), ..plain(FormatId::Q4_0, Cut::Wide, &[14336; 2], 4096, 512) },
        Case { mixture: Some((128, 8, false)), ..plain(FormatId::Q4_0, Cut::Narrow32, &[768], 2048, 512) },
    ];

    /// One row and one column; each group's own sum as `quant` defines it, their sum in f64.
    fn dot<F: BlockFormat>(row: &[F], column: &[ActGroup]) -> f64 {
        let groups = row.iter().flat_map(|block| (0..F::GROUPS).map(move |g| (block, g)));
        groups.zip(column).map(|((block, g), act)| f64::from(block.dot_group(g, act, 0.0))).sum()
    }

    /// The same in the order of the contract.
    #[cfg(test)]
    fn chain<F: BlockFormat>(row: &[F], column: &[ActGroup]) -> f32 {
        let groups: Vec<_> =
            row.iter().flat_map(|block| (0..F::GROUPS).map(move |g| (block, g))).zip(column).collect();
        let spans = groups.chunks(tile::SPAN_GROUPS);
        let spans =
            spans.map(|span| span.iter().fold(0.0, |acc, ((block, g), act)| block.dot_group(*g, act, acc)));
        spans.reduce(|total, span| total + span).expect("k is not 0")
    }

    /// The rows of a matrix (or of an expert of one) times columns, each with a matrix of its own choice.
    struct Product<'a, T> {
        blocks: &'a [u8],
        x: &'a [f32],
        k: usize,
        n_rows: usize,
        /// Column and expert of each row of the output.
        columns: &'a [(usize, usize)],
        dots: core::marker::PhantomData<T>,
    }

    /// How an element of the output is computed.
    trait Sum: Sized {
        fn sum<F: BlockFormat>(row: &[F], column: &[ActGroup]) -> Self;
    }
    impl Sum for f64 {
        fn sum<F: BlockFormat>(row: &[F], column: &[ActGroup]) -> f64 {
            dot(row, column)
        }
    }
    #[cfg(test)]
    impl Sum for f32 {
        fn sum<F: BlockFormat>(row: &[F], column: &[ActGroup]) -> f32 {
            chain(row, column)
        }
    }

    impl<T: Sum> Visitor for Product<'_, T> {
        type Output = (ActKind, Vec<T>);

        fn block<F: BlockFormat>(self) -> Self::Output {
            let blocks: &[F] = bytemuck::cast_slice(self.blocks);
            let mut groups = vec![ActGroup::ZERO; self.x.len() / 32];
            ActGroup::quantise(F::ACT, self.x, &mut groups);
            let columns: Vec<&[ActGroup]> = groups.chunks(self.k / 32).collect();
            let rows: Vec<&[F]> = blocks.chunks(self.k / F::ELEMS).collect();
            let output = |&(column, expert): &(usize, usize)| {
                let rows = rows[expert * self.n_rows..][..self.n_rows].iter();
                let column = columns[column];
                rows.map(|row| T::sum(row, column)).collect::<Vec<T>>()
            };
            (F::ACT, self.columns.iter().flat_map(output).collect())
        }

        fn float<F: FloatFormat>(self) -> Self::Output {
            unreachable!("{:?} has no blocks", F::ID)
        }
    }

    /// A case's data.
    struct Data {
        ids: Vec<u32>,
        x: Vec<f32>,
        /// Blocks of each part.
        weights: Vec<Vec<u8>>,
        biases: Vec<Vec<f32>>,
        residuals: Vec<Vec<f32>>,
    }

    impl Case {
        fn n_expert(&self) -> usize {
            self.mixture.map_or(1, |(n_expert, ..)| n_expert)
        }

        /// Rows of the output.
        fn n_outputs(&self) -> usize {
            self.n_cols * self.mixture.map_or(1, |(_, used, _)| used)
        }

        fn pairs_per_x(&self) -> usize {
            match self.mixture {
                Some((_, used, false)) => used,
                _ => 1,
            }
        }

        /// Parts that have an output.
        fn n_written(&self) -> usize {
            if self.glu.is_some() { 1 } else { self.n_rows.len() }
        }

        fn data(&self, random: &mut Random) -> Data {
            let n_outputs = self.n_outputs();
            let weights = self.n_rows.iter().map(|n_rows| {
                let weights = with_format(self.format, Weights(random, self.n_expert() * n_rows * self.k));
                weights.expect("cases name formats of weights").0
            });
            let weights = weights.collect();
            let added = |n: usize, random: &mut Random| if self.added { random.values(n) } else { vec![] };
            Data {
                weights,
                ids: (0..n_outputs).map(|_| random.below(self.n_expert() as u64) as u32).collect(),
                x: random.values(n_outputs / self.pairs_per_x() * self.k),
                biases: self.n_rows.iter().map(|n| added(self.n_expert() * n, random)).collect(),
                residuals: self.n_rows.iter().map(|n| added(n_outputs * n, random)).collect(),
            }
        }

        /// What the activations are.
        fn act(&self) -> ActKind {
            struct Act;
            impl Visitor for Act {
                type Output = ActKind;

                fn block<F: BlockFormat>(self) -> ActKind {
                    F::ACT
                }

                fn float<F: FloatFormat>(self) -> ActKind {
                    unreachable!("{:?} has no blocks", F::ID)
                }
            }
            with_format(self.format, Act).expect("cases name formats of weights")
        }

        /// Each part's product, without what follows.
        fn products<T: Sum>(&self, data: &Data) -> (ActKind, Vec<Vec<T>>) {
            let pairs = data.ids.iter().enumerate();
            let columns: Vec<_> = pairs.map(|(i, &id)| (i / self.pairs_per_x(), id as usize)).collect();
            let mut kind = ActKind::Q8_0;
            let products = data.weights.iter().zip(self.n_rows).map(|(blocks, &n_rows)| {
                let product = Product::<T> {
                    blocks,
                    x: &data.x,
                    k: self.k,
                    n_rows,
                    columns: &columns,
                    dots: core::marker::PhantomData,
                };
                let (act, values) = with_format(self.format, product).expect("cases name formats of weights");
                kind = act;
                values
            });
            let products = products.collect();
            (kind, products)
        }

        /// Buffers of a problem with these outputs: q, scales, order, tiles; of each part w, bias, residual; the outputs.
        fn buffers(&self, data: &Data, kind: ActKind, outputs: Vec<Vec<f64>>) -> Vec<Buffer> {
            let (q, scales) = quantise_act::reference(kind, &data.x);
            let (order, tiles) =
                crate::kernels::moe_sort::reference(&data.ids, self.n_expert(), self.cut.cols());
            let mut buffers = vec![bytes_of(&q), bytes_of(&scales), bytes_of(&order), bytes_of(&tiles)];
            for (i, &n_rows) in self.n_rows.iter().enumerate() {
                let experts = data.weights[i].chunks(data.weights[i].len() / self.n_expert());
                buffers
                    .push(experts.flat_map(|rows| tile::pack(self.format, rows, n_rows, self.k)).collect());
                buffers.extend([bytes_of(&data.biases[i]), bytes_of(&data.residuals[i])]);
            }
            let buffers = buffers.into_iter().map(Buffer::Input);
            buffers.chain(outputs.into_iter().map(|values| Buffer::Output(Expected::F32(values)))).collect()
        }

        /// The launch on [`Case::buffers`].
        fn launch(&self, at: &[DevicePtr]) -> Result<Launch, LaunchError> {
            let outputs = 4 + 3 * self.n_rows.len();
            let mut parts = [Matrix::default(); MAX_PARTS];
            let added = |at| if self.added { at } else { DevicePtr::NULL };
            for (i, &n_rows) in self.n_rows.iter().enumerate() {
                let [w, bias, residual] = [at[4 + 3 * i], added(at[5 + 3 * i]), added(at[6 + 3 * i])];
                let y = at[outputs + i.min(self.n_written() - 1)];
                parts[i] = Matrix { w, bias, residual, y, n_rows };
            }
            let (n_cols, n_expert) = (self.n_outputs(), self.n_expert());
            launch(&Args {
                format: self.format,
                cut: self.cut,
                parts: &parts[..self.n_rows.len()],
                glu: self.glu,
                q: at[0],
                scales: at[1],
                k: self.k,
                n_cols,
                mixture: self.mixture.map(|_| Mixture {
                    order: at[2],
                    tiles: at[3],
                    n_tiles: crate::kernels::moe_sort::max_tiles(n_cols, n_expert, self.cut.cols()),
                    pairs_per_x: self.pairs_per_x(),
                }),
            })
        }
    }

    /// `act(gate) · up` in f64.
    fn gated(glu: Glu, gate: f64, up: f64) -> f64 {
        let sigmoid = |x: f64| 1.0 / (1.0 + libm::exp(-x));
        match glu {
            Glu::Silu => gate * sigmoid(gate) * up,
            // tanh(z) = 2 sigmoid(2z) - 1, z = sqrt(2/π) (x + 0.044715 x³).
            Glu::Gelu => {
                let z = libm::sqrt(2.0 / core::f64::consts::PI) * (gate + 0.044_715 * gate * gate * gate);
                gate * sigmoid(2.0 * z) * up
            }
            Glu::SwigluOai { alpha, limit } => {
                let gate = gate.min(f64::from(limit));
                let up = up.clamp(-f64::from(limit), f64::from(limit));
                gate * sigmoid(f64::from(alpha) * gate) * (up + 1.0)
            }
        }
    }

    impl Kernel for Mmq {
        const NAME: &'static str = "mmq";
        type Case = Case;
        const CASES: &'static [Case] = CASES;
        const BENCH: &'static [Case] = BENCH;
        const NMSE_MAX: f64 = 1e-11;
        #[cfg(feature = "emu")]
        const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::ENTRIES];

        fn problem(case: &Case, random: &mut Random) -> Problem {
            let case = *case;
            let data = case.data(random);
            let (kind, mut products) = if random.is_timing() {
                let n_outputs = case.n_outputs();
                let zeros = case.n_rows.iter().map(|n_rows| vec![0.0; n_outputs * n_rows]).collect();
                (case.act(), zeros)
            } else {
                case.products::<f64>(&data)
            };
            if case.added {
                for ((values, bias), &n_rows) in products.iter_mut().zip(&data.biases).zip(case.n_rows) {
                    for (i, value) in values.iter_mut().enumerate() {
                        let expert = if case.mixture.is_some() { data.ids[i / n_rows] as usize } else { 0 };
                        *value += f64::from(bias[expert * n_rows + i % n_rows]);
                    }
                }
            }
            if let Some(glu) = case.glu {
                let up = products.pop().expect("gate and up");
                products[0].iter_mut().zip(up).for_each(|(gate, up)| *gate = gated(glu, *gate, up));
            }
            if case.added {
                for (values, residual) in products.iter_mut().zip(&data.residuals) {
                    values.iter_mut().zip(residual).for_each(|(value, &added)| *value += f64::from(added));
                }
            }
            Problem {
                buffers: case.buffers(&data, kind, products),
                launches: Box::new(move |at| Ok(vec![case.launch(at)?])),
            }
        }

        fn peer(case: &Case) -> Option<alloc::string::String> {
            let fused = case.glu.is_some() || case.added;
            crate::kernels::mmvq::peer(case.format, case.n_rows, case.k, case.n_cols, fused, case.mixture)
        }

        fn bytes(case: &Case) -> u64 {
            let row = info(case.format);
            let n_rows: usize = case.n_rows.iter().sum();
            let weights = case.n_expert() * n_rows * case.k / row.elems * row.bytes;
            let columns = case.n_outputs() / case.pairs_per_x();
            let outputs = 4 * case.n_outputs() * case.n_rows[..case.n_written()].iter().sum::<usize>();
            (weights + columns * case.k * 5 / 4 + outputs) as u64
        }

        fn flops(case: &Case) -> u64 {
            2 * (case.n_rows.iter().sum::<usize>() * case.n_outputs() * case.k) as u64
        }
    }
}
