//! The narrow cut of `mmq`: a CTA multiplies one or two row tiles by 16, 32 or 64 columns, each warp a span of its own.
//!
//! * A warp holds a span of its 32 rows in registers, lane = row, and takes it two groups (a *chunk*) at a time through
//!   shared memory of its own: unpack, multiply. The next span's words are under way while the last chunk is multiplied,
//!   and L2 has been asked for them a span earlier.
//! * A *slot* is a span's activations: a ring of chunks that asynchronous copies fill two chunks ahead. It is one warp's,
//!   or that of the *pair* of warps which multiply the same span of two row tiles: gate and up, or neighbours where there
//!   are row tiles enough. A pair meets once per chunk, at a barrier of its own.
//! * As many spans as slots make a round. Then all warps leave their sums in shared memory and the CTA's threads add them to
//!   the totals in order: the only barriers of the CTA.
//! * Weights are loaded before the launch waits for earlier ones.

use quant::BlockFormat;

use super::int8_tile::{column_planes, row_planes};
use crate::tile::ROWS;

/// Groups that a warp unpacks at a time.
const CHUNK: usize = 2;
/// Chunks of activations that a slot holds: the present one and two under way.
const STAGES: u32 = 3;

/// Bytes of a CTA's parts of shared memory. First come the warps' own: unpacked codes and, from `row_floats` on, floats of
/// rows; over both the sums are written. Then the slots: stages of codes and, from `column_floats` on, floats of columns, two
/// chunks. Then the totals of a row tile, and where each column's activations start.
struct Layout {
    row_floats: u32,
    warp: u32,
    column_floats: u32,
    slot: u32,
    totals: u32,
}

const fn layout<F: BlockFormat>(cols: usize) -> Layout {
    let row_floats = (ROWS * CHUNK * 32) as u32;
    let unpacked = row_floats + (row_planes::<F>() * CHUNK * ROWS * 4) as u32;
    let totals = (ROWS * cols * 4) as u32;
    let column_floats = STAGES * (cols * CHUNK * 32) as u32;
    Layout {
        row_floats,
        warp: if unpacked < totals { totals } else { unpacked },
        column_floats,
        slot: column_floats + (2 * column_planes::<F>() * CHUNK * cols * 4) as u32,
        totals,
    }
}

/// Shared memory of a CTA of `warps` warps.
pub const fn narrow_bytes<F: BlockFormat>(cols: usize, warps: u32, paired: bool) -> u32 {
    let Layout { warp, slot, totals, .. } = layout::<F>(cols);
    let per_slot = 1 + paired as u32;
    warps * warp + warps / per_slot * slot + per_slot * totals + 4 * cols as u32
}

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
pub use device::narrow;

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod device {
    use bytemuck::Zeroable;

    use super::*;
    use crate::device::math::{fresh, opaque};
    use crate::device::{Glb, Smem, U32x2, U32x4, async_copy, grid, sync, thread, warp};
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

    /// Whether a chunk's words are loaded when they are needed, since registers are short: without tensor cores, and where
    /// a span's words do not fit beside the sums of 64 columns, or (Q6_K) a chunk's into the 128 registers that a thread
    /// has with 16 columns.
    const fn late<F: Tiled, P: Product>(cols: usize) -> bool {
        let long = F::LAYOUT.span_bytes > 4 * 48;
        P::ONE_AT_A_TIME || (cols == 64 && long) || (cols == 16 && long && F::LAYOUT.unit_bytes == 4)
    }

    /// Whether a warp holds what a chunk needs, loaded a chunk ahead, instead of a span's words: with 16 columns. It takes
    /// code for every chunk, of which there is little then.
    const fn by_chunk<F: Tiled, P: Product>(cols: usize) -> bool {
        cols == 16 && !late::<F, P>(cols)
    }

    /// Whether tensor cores multiply the scales.
    const fn exact<F: BlockFormat, P: Product>() -> bool {
        int8_tile::has_exact_scales::<F>() && !P::ONE_AT_A_TIME
    }

    /// What a warp copies of its slot's activations: all columns, or half of them if it has a partner.
    struct Columns<const NT: usize> {
        q: Glb<U32x4>,
        scales: Glb<U32x2>,
        n_groups: u32,
        /// The warp's first column, and how many it has.
        first: u32,
        n: u32,
        /// First groups of all columns.
        starts: Smem<u32>,
        stages: Codes<CHUNK>,
        floats: Smem<f32>,
    }

    impl<const NT: usize> Columns<NT> {
        const COLS: u32 = 8 * NT as u32;

        /// Column, from the warp's first on, and group of a chunk whose scale this lane prepares in step `i`: neighbours take
        /// the two groups of one column.
        #[inline(always)]
        fn scale_place(i: usize) -> (u32, u32) {
            let at = thread::lane_id() + 32 * i as u32;
            (at / CHUNK as u32, at % CHUNK as u32)
        }

        /// Starts the copies of the chunk of codes at group `first`.
        #[cfg_attr(target_arch = "nvptx64", inline(always))]
        #[track_caller]
        fn copy(&self, first: u32, stage: u32) {
            let chunk = thread::lane_id() % (2 * CHUNK) as u32;
            if first + chunk / 2 < self.n_groups {
                let column = self.first + thread::lane_id() / 4;
                let mut starts = [0; NT];
                let mut i = 0;
                while i < NT {
                    if 8 * (i as u32) < self.n {
                        starts[i] = self.starts.ld(column + 8 * i as u32);
                    }
                    i += 1;
                }
                let mut i = 0;
                while i < NT {
                    if 8 * (i as u32) < self.n {
                        let target = Codes::<CHUNK>::index(column + 8 * i as u32, chunk);
                        let target = stage * (4 * Self::COLS) + target;
                        async_copy::copy16(self.stages.0, target, self.q, 2 * (starts[i] + first) + chunk);
                    }
                    i += 1;
                }
            }
            async_copy::commit();
        }

        /// The scales of the chunk at group `first`.
        #[cfg_attr(target_arch = "nvptx64", inline(always))]
        #[track_caller]
        fn load_scales(&self, first: u32) -> [U32x2; NT] {
            let (mut starts, mut acts) = ([0; NT], [U32x2([0; 2]); NT]);
            let mut i = 0;
            while 2 * i < NT {
                let (column, _) = Self::scale_place(i);
                if column < self.n {
                    starts[i] = self.starts.ld(self.first + column);
                }
                i += 1;
            }
            let mut i = 0;
            while 2 * i < NT {
                let (column, j) = Self::scale_place(i);
                if column < self.n && first + j < self.n_groups {
                    acts[i] = self.scales.ld_nc(starts[i] + first + j);
                }
                i += 1;
            }
            acts
        }

        /// Floats of the columns in an even or odd chunk.
        #[inline(always)]
        #[track_caller]
        fn floats<F: BlockFormat>(&self, chunk: u32) -> Smem<f32> {
            self.floats.skip(chunk % 2 * (column_planes::<F>() * CHUNK) as u32 * Self::COLS)
        }

        /// Prepares a chunk's scales.
        #[cfg_attr(target_arch = "nvptx64", inline(always))]
        #[track_caller]
        fn put_scales<F: BlockFormat, P: Product, const COLS: usize>(&self, chunk: u32, acts: [U32x2; NT]) {
            let floats = self.floats::<F>(chunk);
            let mut i = 0;
            while 2 * i < NT {
                let (column, j) = Self::scale_place(i);
                if column < self.n {
                    let U32x2([d, extra]) = acts[i];
                    let act = ActScale { d: f32::from_bits(d), extra };
                    let column = self.first + column;
                    if const { exact::<F, P>() } {
                        int8_tile::put_column_scale(floats, column, j, act.d);
                    } else {
                        int8_tile::put_column::<F, CHUNK, COLS>(floats, column, j, act);
                    }
                }
                i += 1;
            }
        }
    }

    /// Leaves a warp's sums.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    fn put_sums<const NT: usize>(sums: Smem<f32>, acc: &Accumulators<2, NT>) {
        // Addresses are computed here, not kept in registers from round to round.
        let lane = fresh(thread::lane_id());
        let (g, t) = (lane / 4, lane % 4);
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

    /// Adds the sums of slots 0 to `n` in order to the totals of two neighbouring columns from `column` on.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    fn add_sums(totals: &mut [f32; 2], of_slot: impl Fn(u32) -> Smem<f32>, lane: u32, column: u32, n: u32) {
        let place = |c: usize| sum_index(lane, column + c as u32);
        let mut slot = 0;
        // Four loads of each column under way at a time.
        while slot + 4 <= n {
            let mut sums = [[0.0; 2]; 4];
            unroll!(I in 0..4 {
                let from = of_slot(slot + I as u32);
                unroll!(C in 0..2 { sums[I][C] = from.ld(place(C)); });
            });
            unroll!(I in 0..4 {
                unroll!(C in 0..2 { totals[C] += sums[I][C]; });
            });
            slot += 4;
        }
        while slot < n {
            unroll!(C in 0..2 { totals[C] += of_slot(slot).ld(place(C)); });
            slot += 1;
        }
    }

    /// At most `COLS` (8 · `NT`) columns of the row tile `first_tile`, of a gated pair of both matrices; `two` if the
    /// tile after it is the CTA's, too. Ends with all threads past the last use of shared memory.
    #[inline(always)]
    #[track_caller]
    pub fn narrow<F: BlockFormat + Tiled, P: Product, const COLS: usize, const NT: usize>(
        work: &Work,
        first_tile: u32,
        two: bool,
    ) {
        const { assert!(COLS == 8 * NT && NT.is_multiple_of(2)) };
        let (lane, warp_id) = (thread::lane_id(), thread::warp_id());
        let n_warps = thread::block_dim_x() / thread::WARP;
        let gated = work.gate.is_some();
        let paired = gated || two;
        let per_slot = if paired { 2 } else { 1 };
        // Slot, and which of the pair this warp is.
        let (slot, second) = if paired { (warp_id / 2, warp_id % 2) } else { (warp_id, 0) };
        let per_round = n_warps / per_slot;

        let w = if gated && second == 1 { work.up.w } else { work.part.w };
        let n_tiles = work.part.n_rows.div_ceil(ROWS as u32);
        let tile = if gated { first_tile } else { first_tile + second };
        // Beyond the last row the last tile again; its outputs are not stored.
        let w = w.offset(work.tile_at::<F>(if tile < n_tiles { tile } else { n_tiles - 1 }));
        let n_groups = work.n_groups;
        let n_spans = n_groups.div_ceil(SPAN_GROUPS as u32);
        let of_span = |span: u32| w.offset(F::LAYOUT.span_offset(span as usize));
        let load = |span: u32| load_span::<F>(of_span(span), units_of::<F>(span, n_groups));
        let prefetch = |span: u32| {
            if span < n_spans && lane == 0 {
                let bytes = units_of::<F>(span, n_groups) * (ROWS * F::LAYOUT.unit_bytes) as u32;
                of_span(span).prefetch(bytes);
            }
        };

        let at = const { layout::<F>(COLS) };
        let base = warp_id * at.warp;
        let slot_base = n_warps * at.warp + slot * at.slot;
        let n = COLS as u32 / per_slot;
        let totals_at = n_warps * at.warp + per_round * at.slot;
        let starts_at = totals_at + per_slot * at.totals;
        let columns = Columns::<NT> {
            q: work.q,
            scales: work.scales,
            n_groups,
            first: second * n,
            n,
            starts: Smem::dynamic(starts_at, COLS as u32),
            stages: Codes(Smem::dynamic(slot_base, STAGES * (4 * COLS) as u32)),
            floats: Smem::dynamic(
                slot_base + at.column_floats,
                (2 * column_planes::<F>() * CHUNK * COLS) as u32,
            ),
        };
        let a = Codes::<CHUNK>(Smem::dynamic(base, (ROWS * 2 * CHUNK) as u32));
        let row_floats: Smem<f32> =
            Smem::dynamic(base + at.row_floats, (row_planes::<F>() * CHUNK * ROWS) as u32);
        let outputs = (ROWS * COLS) as u32;
        let sums_of = |warp_id: u32| Smem::<f32>::dynamic(warp_id * at.warp, outputs);
        let totals: Smem<f32> = Smem::dynamic(totals_at, per_slot * outputs);

        // Unpacks chunk `C`, a constant, of a span's words.
        macro_rules! unpack {
            ($C:ident, $words:expr) => {
                let words = whole_words::<F>(&$words);
                let mut scales = [0.0; CHUNK];
                unroll!(J in 0..2 {
                    let group = group::<F>(&words, CHUNK * $C + J);
                    if const { exact::<F, P>() } {
                        int8_tile::put_codes(a, lane, J as u32, int8_tile::signed_codes::<F>(&group));
                        scales[J] = group.scale[0];
                    } else {
                        int8_tile::put_group::<F, CHUNK, ROWS>(a, row_floats, lane, J as u32, &group);
                    }
                });
                if const { exact::<F, P>() } {
                    int8_tile::put_row_scales(row_floats, lane, scales);
                }
            };
        }

        let mut span = slot;
        if const { by_chunk::<F, P>(COLS) || late::<F, P>(COLS) } {
            // The rest of what the loads below take a part of.
            prefetch(span);
        }
        // A warp without a span loads one all the same: nothing of it is used.
        let mut words = load(if span < n_spans { span } else { 0 });
        prefetch(span + per_round);
        grid::wait_for_earlier();
        let thread = thread::thread_idx_x();
        if thread < COLS as u32 {
            columns.starts.st(thread, work.columns.input(thread) * n_groups);
        }
        sync::sync_threads();
        let mut acts = [U32x2([0; 2]); NT];
        let mut stage = 0;
        if span < n_spans {
            let first = span * SPAN_GROUPS as u32;
            columns.copy(first, 0);
            columns.copy(first + CHUNK as u32, 1);
            acts = columns.load_scales(first);
        }

        let mut done = 0;
        while done < n_spans {
            if span < n_spans {
                let first = span * SPAN_GROUPS as u32;
                let there = groups_of(span, n_groups);
                let mut acc = [[[0.0f32; 4]; NT]; 2];
                // Where the chunk `chunk` of this span is; after the span's end chunks of the next one. If there is none, past
                // the end, where nothing is copied.
                let group_of = |chunk: u32| {
                    if chunk * (CHUNK as u32) < there {
                        first + chunk * CHUNK as u32
                    } else {
                        (span + per_round) * SPAN_GROUPS as u32 + chunk % SPAN_CHUNKS * CHUNK as u32
                    }
                };
                let mut multiply = |chunk: u32| {
                    // This chunk's activations are there, the next one's may be under way.
                    async_copy::wait::<1>();
                    if paired {
                        sync::barrier_of(1 + slot, 2 * thread::WARP);
                    } else {
                        warp::sync_warp();
                    }
                    // Nobody reads the last chunk's stage any more.
                    let free = if stage == 0 { STAGES - 1 } else { stage - 1 };
                    columns.copy(group_of(chunk + 2), free);
                    let next_acts = columns.load_scales(group_of(chunk + 1));

                    let b = Codes(columns.stages.0.skip(stage * (4 * COLS as u32)));
                    let column_floats = columns.floats::<F>(chunk);
                    let tile =
                        Tile::<CHUNK, ROWS, COLS> { a, b, row_floats, column_floats, row: 0, column: 0 };
                    if P::ONE_AT_A_TIME {
                        let here = opaque(there - chunk * CHUNK as u32);
                        let mut j = 0;
                        while j < CHUNK as u32 && j < here {
                            tile.add_group::<F, P, 2, NT>(&mut acc, j);
                            j += 1;
                        }
                    } else if const { exact::<F, P>() } {
                        tile.add_pair::<P, 2, NT>(&mut acc, chunk * (CHUNK as u32) + 1 < there);
                    } else {
                        tile.add_group::<F, P, 2, NT>(&mut acc, 0);
                        if chunk * (CHUNK as u32) + 1 < there {
                            tile.add_group::<F, P, 2, NT>(&mut acc, 1);
                        }
                    }
                    warp::sync_warp();
                    stage = if stage + 1 == STAGES { 0 } else { stage + 1 };
                    next_acts
                };
                // Unknown to the compiler.
                let n_chunks = opaque(SPAN_CHUNKS);
                if const { by_chunk::<F, P>(COLS) } {
                    'span: {
                        unroll!(C in 0..4 {
                            if (CHUNK * C) as u32 >= there {
                                // There is no other span.
                                words = F::Words::zeroed();
                                break 'span;
                            }
                            // All lanes are done with the last chunk.
                            columns.put_scales::<F, P, COLS>(C as u32, acts);
                            unpack!(C, words);
                            // What the next chunk needs is under way during this one's product; other loads vanish.
                            if C + 1 < SPAN_CHUNKS as usize {
                                // Behind a branch: ptxas would move the loads up and keep two chunks' words.
                                words = if (C as u32) < n_chunks { load(span) } else { F::Words::zeroed() };
                            } else if span + per_round < n_spans {
                                words = load(span + per_round);
                                prefetch(span + 2 * per_round);
                            } else {
                                words = F::Words::zeroed();
                            }
                            acts = multiply(C as u32);
                        });
                    }
                } else {
                    let mut chunk = 0;
                    while chunk < n_chunks && chunk * (CHUNK as u32) < there {
                        // All lanes are done with the last chunk.
                        columns.put_scales::<F, P, COLS>(chunk, acts);
                        unroll!(C in 0..4 {
                            if chunk == C as u32 {
                                // Where registers are short, what the chunk needs is loaded here, and the loads of whole
                                // spans vanish.
                                if const { late::<F, P>(COLS) } {
                                    unpack!(C, load(span));
                                } else {
                                    unpack!(C, words);
                                }
                            }
                        });
                        // The registers are free: the next span's words are under way during this chunk's product.
                        if chunk == SPAN_CHUNKS - 1 && span + per_round < n_spans {
                            words = load(span + per_round);
                            prefetch(span + 2 * per_round);
                        }
                        acts = multiply(chunk);
                        chunk += 1;
                    }
                }
                put_sums(sums_of(warp_id), &acc);
            }
            sync::sync_threads();
            let here = if n_spans - done < per_round { n_spans - done } else { per_round };
            let lane = fresh(lane);
            let last = done + per_round >= n_spans;
            let mut column = 2 * warp_id;
            while column < work.columns.n {
                let mut sums = [[0.0f32; 2]; 2];
                unroll!(M in 0..2 {
                    if (M as u32) < per_slot {
                        let place = |c: usize| (M * COLS + c) as u32 * ROWS as u32 + column * ROWS as u32 + lane;
                        // -0 + x is x, whatever x.
                        sums[M] = [-0.0; 2];
                        if done != 0 {
                            unroll!(C in 0..2 { sums[M][C] = totals.ld(place(C)); });
                        }
                        add_sums(&mut sums[M], |slot| sums_of(slot * per_slot + M as u32), lane, column, here);
                        if !last {
                            unroll!(C in 0..2 { totals.st(place(C), sums[M][C]); });
                        }
                    }
                });
                if last {
                    let row = first_tile * ROWS as u32 + lane;
                    unroll!(C in 0..2 {
                        if column + (C as u32) < work.columns.n {
                            let output = work.columns.output(column + C as u32);
                            if row < work.part.n_rows {
                                work.finish(output, row, [sums[0][C], sums[1][C]]);
                            }
                            if two && row + (ROWS as u32) < work.part.n_rows {
                                work.finish(output, row + ROWS as u32, [sums[1][C], 0.0]);
                            }
                        }
                    });
                }
                column += 2 * n_warps;
            }
            sync::sync_threads();
            done += per_round;
            span += per_round;
        }
    }
}
