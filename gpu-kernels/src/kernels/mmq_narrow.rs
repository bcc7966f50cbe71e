//! The narrow cut of `mmq`: a CTA multiplies a row tile by 16 or 32 columns, each warp a span of its own.
//!
//! * A warp holds a span of its 32 rows in registers, lane = row, and takes it two groups (a *chunk*) at a time through
//!   shared memory of its own: unpack, multiply. The chunk's activations arrive by asynchronous copies a chunk ahead; the
//!   next span's words are under way while the last chunk is multiplied.
//! * Eight spans make a round, of a gated pair four of each matrix. Then all warps leave their sums in shared memory and
//!   the CTA's threads add them to the totals in order: the only barriers.

use quant::BlockFormat;

use super::int8_tile::{column_planes, row_planes};
use super::mmq::WARPS;
use crate::tile::ROWS;

/// Groups that a warp unpacks at a time.
const CHUNK: usize = 2;
/// A warp's shared memory: unpacked codes, over which its sums are written, then where floats of rows and of columns and
/// two stages of activations start, and where it ends.
const fn layout<F: BlockFormat>(cols: usize) -> [u32; 4] {
    let row_floats = (ROWS * CHUNK * 32) as u32;
    let column_floats = row_floats + (row_planes::<F>() * CHUNK * ROWS * 4) as u32;
    let unpacked = column_floats + (column_planes::<F>() * CHUNK * cols * 4) as u32;
    let sums = (ROWS * cols * 4) as u32;
    let b = if unpacked < sums { sums } else { unpacked };
    [row_floats, column_floats, b, b + 2 * (cols * CHUNK * 32) as u32]
}

/// Shared memory of a CTA.
pub const fn narrow_bytes<F: BlockFormat>(cols: usize) -> u32 {
    WARPS * layout::<F>(cols)[3]
}

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
pub use device::narrow;

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod device {
    use bytemuck::Zeroable;

    use super::*;
    use crate::device::math::opaque;
    use crate::device::{Glb, Smem, U32x2, U32x4, async_copy, sync, thread, warp};
    use crate::kernels::int8_tile::{self, Accumulators, Codes, Product, Tile};
    use crate::kernels::mmq::{Work, group, groups_of, units_of};
    use crate::kernels::quantise_act::ActScale;
    use crate::tile::{SPAN_GROUPS, Tiled, load_span};

    /// Chunks of a span.
    const SPAN_CHUNKS: u32 = (SPAN_GROUPS / CHUNK) as u32;

    /// Where a warp's sum of an output lies: column pairs of a lane quad in different banks.
    #[inline(always)]
    fn sum_index(row: u32, column: u32) -> u32 {
        column * ROWS as u32 + (row ^ (column / 2 % 4 * 8))
    }

    /// The same words, as values of their own: else LLVM cuts those that live across a loop into the bytes that some group
    /// needs, a register each.
    #[inline(always)]
    fn whole_words<F: Tiled>(words: &F::Words) -> F::Words {
        let mut words = *words;
        let mut i = 0;
        while i < F::LAYOUT.span_bytes / 4 {
            words.as_mut()[i] = opaque(words.as_ref()[i]);
            i += 1;
        }
        words
    }

    /// What a warp copies.
    struct Columns {
        q: Glb<U32x4>,
        scales: Glb<U32x2>,
        n_groups: u32,
        /// Rows of the activations that this lane copies, and whose scales it prepares.
        copied: [u32; 4],
        scaled: u32,
        b: Codes<CHUNK>,
    }

    impl Columns {
        /// Column and group, within a chunk, whose floats this lane prepares in step `i`.
        #[inline(always)]
        fn scale_place<const COLS: usize>(i: usize) -> (u32, u32) {
            let at = thread::lane_id() + 32 * i as u32;
            (at % COLS as u32, at / COLS as u32)
        }

        /// Starts the copies of the chunk of activations at group `first`, and returns their scales.
        #[cfg_attr(target_arch = "nvptx64", inline(always))]
        #[track_caller]
        fn fetch<const COLS: usize>(&self, first: u32, stage: u32) -> [U32x2; 2] {
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
                let (_, j) = Self::scale_place::<COLS>(i);
                if first + j < self.n_groups {
                    let row = self.scales.offset(self.scaled as usize * self.n_groups as usize);
                    acts[i] = row.ld_nc(first + j);
                }
                i += 1;
            }
            acts
        }
    }

    /// Leaves a warp's sums.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    fn put_sums<const NT: usize>(sums: Smem<f32>, acc: &Accumulators<2, NT>) {
        let (g, t) = (thread::lane_id() / 4, thread::lane_id() % 4);
        unroll!(M in 0..2 {
            let mut n = 0;
            while n < NT {
                unroll!(E in 0..4 {
                    let column = (8 * n + E % 2) as u32 + 2 * t;
                    let row = (16 * M + E / 2 * 8) as u32 + g;
                    sums.st(sum_index(row, column), acc[M][n][E]);
                });
                n += 1;
            }
        });
    }

    /// Totals of the outputs t, t + 256, … of the CTA in thread t: of both matrices of a gated pair.
    type Totals = [[f32; 4]; 2];

    /// Adds a round's spans in order, `n` of each matrix.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    fn add_sums<const COLS: usize>(
        totals: &mut Totals,
        of_warp: impl Fn(u32) -> Smem<f32>,
        n: u32,
        gated: bool,
    ) {
        let mut i = 0;
        while 8 * i < COLS {
            let at = sum_index(thread::lane_id(), thread::warp_id() + 8 * i as u32);
            unroll!(W in 0..8 {
                let second = gated && W >= 4;
                let span = if second { W as u32 % 4 } else { W as u32 };
                if span < n {
                    let sum = of_warp(W as u32).ld(at);
                    if second {
                        totals[1][i] += sum;
                    } else {
                        totals[0][i] += sum;
                    }
                }
            });
            i += 1;
        }
    }

    /// Ends the CTA's outputs.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    fn finish<const COLS: usize>(work: &Work, row_tile: u32, totals: &Totals) {
        let row = row_tile * ROWS as u32 + thread::lane_id();
        let mut i = 0;
        while 8 * i < COLS {
            let c = thread::warp_id() + 8 * i as u32;
            if c < work.columns.n && row < work.part.n_rows {
                work.finish(work.columns.output(c), row, [totals[0][i], totals[1][i]]);
            }
            i += 1;
        }
    }

    /// One row tile and at most `COLS` (8 · `NT`) columns. Ends with all threads past the last use of shared memory.
    #[inline(always)]
    #[track_caller]
    pub fn narrow<F: BlockFormat + Tiled, P: Product, const COLS: usize, const NT: usize>(
        work: &Work,
        row_tile: u32,
    ) {
        const { assert!(COLS == 8 * NT && COLS <= 32) };
        let (lane, warp_id) = (thread::lane_id(), thread::warp_id());
        let gated = work.gate.is_some();
        let per_round = if gated { WARPS / 2 } else { WARPS };
        let w = if warp_id < per_round { work.part.w } else { work.up.w };
        let w = w.offset(work.tile_at::<F>(row_tile));
        let n_spans = work.n_groups.div_ceil(SPAN_GROUPS as u32);
        let load = |span: u32| {
            load_span::<F>(w.offset(F::LAYOUT.span_offset(span as usize)), units_of::<F>(span, work.n_groups))
        };

        let [row_floats_at, column_floats_at, b_at, bytes] = const { layout::<F>(COLS) };
        let base = warp_id * bytes;
        let column_of = |i: usize| if 8 * i < COLS { work.columns.input(lane / 4 + 8 * i as u32) } else { 0 };
        let columns = Columns {
            q: work.q,
            scales: work.scales,
            n_groups: work.n_groups,
            copied: [column_of(0), column_of(1), column_of(2), column_of(3)],
            scaled: work.columns.input(lane % COLS as u32),
            b: Codes(Smem::dynamic(base + b_at, (2 * COLS * 2 * CHUNK) as u32)),
        };
        let a = Codes::<CHUNK>(Smem::dynamic(base, (ROWS * 2 * CHUNK) as u32));
        let row_floats: Smem<f32> =
            Smem::dynamic(base + row_floats_at, (row_planes::<F>() * CHUNK * ROWS) as u32);
        let column_floats: Smem<f32> =
            Smem::dynamic(base + column_floats_at, (column_planes::<F>() * CHUNK * COLS) as u32);
        let sums_of = |warp_id: u32| Smem::<f32>::dynamic(warp_id * bytes, (ROWS * COLS) as u32);

        let mut words = F::Words::zeroed();
        let mut acts = [U32x2([0; 2]); 2];
        let mut stage = 0;
        let mut span = warp_id % per_round;
        if span < n_spans {
            words = load(span);
            acts = columns.fetch::<COLS>(span * SPAN_GROUPS as u32, 0);
        }

        // -0 + x is x, whatever x.
        let mut totals = [[-0.0f32; 4]; 2];
        let mut done = 0;
        while done < n_spans {
            if span < n_spans {
                let first = span * SPAN_GROUPS as u32;
                let there = groups_of(span, work.n_groups);
                let mut acc = [[[0.0f32; 4]; NT]; 2];
                // Unknown to the compiler, so that the loop stays rolled.
                let n_chunks = opaque(SPAN_CHUNKS);
                let mut chunk = 0;
                while chunk < n_chunks && chunk * (CHUNK as u32) < there {
                    // Unpack: all lanes are done with the last chunk.
                    let mut i = 0;
                    while i * 32 < COLS * CHUNK {
                        let (column, j) = Columns::scale_place::<COLS>(i);
                        let U32x2([d, extra]) = acts[i];
                        let act = ActScale { d: f32::from_bits(d), extra };
                        int8_tile::put_column::<F, CHUNK, COLS>(column_floats, column, j, act);
                        i += 1;
                    }
                    unroll!(C in 0..4 {
                        if chunk == C as u32 {
                            // Without tensor cores registers are short: what the chunk needs is loaded here, and the
                            // loads of whole spans vanish.
                            let words =
                                if P::ONE_AT_A_TIME { load(span) } else { whole_words::<F>(&words) };
                            unroll!(J in 0..2 {
                                let group = group::<F>(&words, CHUNK * C + J);
                                int8_tile::put_group::<F, CHUNK, ROWS>(a, row_floats, lane, J as u32, &group);
                            });
                        }
                    });
                    // The registers are free: the next span's words are under way during this chunk's product.
                    if chunk == SPAN_CHUNKS - 1 && span + per_round < n_spans {
                        words = load(span + per_round);
                    }
                    let next = (chunk + 1) * CHUNK as u32;
                    // After the span the next one; if there is none, this is past the end, where nothing is copied.
                    let next =
                        if next < there { first + next } else { first + per_round * SPAN_GROUPS as u32 };
                    acts = columns.fetch::<COLS>(next, stage ^ 1);
                    async_copy::wait::<1>();
                    warp::sync_warp();

                    let b = Codes(columns.b.0.skip(stage * (4 * COLS as u32)));
                    let tile =
                        Tile::<CHUNK, ROWS, COLS> { a, b, row_floats, column_floats, row: 0, column: 0 };
                    if P::ONE_AT_A_TIME {
                        let here = opaque(there - chunk * CHUNK as u32);
                        let mut j = 0;
                        while j < CHUNK as u32 && j < here {
                            tile.add_group::<F, P, 2, NT>(&mut acc, j);
                            j += 1;
                        }
                    } else {
                        tile.add_group::<F, P, 2, NT>(&mut acc, 0);
                        if chunk * (CHUNK as u32) + 1 < there {
                            tile.add_group::<F, P, 2, NT>(&mut acc, 1);
                        }
                    }
                    warp::sync_warp();
                    stage ^= 1;
                    chunk += 1;
                }
                put_sums(sums_of(warp_id), &acc);
            }
            sync::sync_threads();
            add_sums::<COLS>(&mut totals, sums_of, n_spans - done, gated);
            sync::sync_threads();
            done += per_round;
            span += per_round;
        }
        finish::<COLS>(work, row_tile, &totals);
    }
}
