//! The narrow cut of `mmq`: a CTA multiplies one or two row tiles by 16, 32 or 64 columns, each *team* of warps a span of
//! its own.
//!
//! * A team shares a *slot*, a span's activations: a ring of steps that asynchronous copies fill ahead. It has two row
//!   tiles where those share activations, gate and up, or neighbours where there are row tiles enough.
//! * A row tile is one warp's, or with more than 16 columns that of two *halves*, which multiply half of the columns each
//!   and so have registers for sixteen warps an SM. A *step* is a chunk of two groups for each half: the half unpacks its
//!   chunk, lane = row, through shared memory; then both multiply all of the step's chunks. L2 has been asked for a span's
//!   words a span or two earlier; with 16 columns a chunk's are under way while the one before it is multiplied.
//! * A team meets once per step, at a barrier of its own.
//! * As many spans as slots make a round. Then all warps leave their sums in shared memory, as their registers lie, and the
//!   CTA's threads add them to the totals in order: the only barriers of the CTA.
//! * Results that are written quantised pass through shared memory: a row tile is a group of each column.
//! * Weights are loaded before the launch waits for earlier ones.

use quant::BlockFormat;

use super::int8_tile::{column_planes, row_planes};
use crate::tile::ROWS;

/// Groups that a warp unpacks at a time.
const CHUNK: usize = 2;

/// Warps that share what is unpacked of a row tile, and chunks of a step.
pub const fn halves(cols: usize) -> usize {
    if cols > 16 { 2 } else { 1 }
}

/// Steps of activations that a slot holds: the present one, and two chunks under way.
const fn stages(halves: usize) -> usize {
    if halves == 1 { 3 } else { 2 }
}

/// Bytes of a CTA's parts of shared memory. First come the row tiles of all teams: unpacked codes and, from `row_floats` on,
/// floats of rows; over both the sums are written. Then the slots: stages of codes and, from `column_floats` on, floats of
/// columns, two steps. Then the totals of a row tile, and where each column's activations start.
#[cfg_attr(
    not(any(target_arch = "nvptx64", feature = "emu")),
    expect(dead_code, reason = "a host that only launches needs the sizes alone")
)]
struct Layout {
    row_floats: u32,
    tile: u32,
    column_floats: u32,
    slot: u32,
    totals: u32,
}

/// Chunks of a row tile that are there at a time: one, or two steps, so that a half may unpack while the other multiplies.
const fn chunks_there(halves: usize) -> usize {
    if halves == 1 { 1 } else { 2 * halves }
}

const fn layout<F: BlockFormat>(cols: usize) -> Layout {
    let halves = halves(cols);
    let chunks = chunks_there(halves);
    let row_floats = (chunks * ROWS * CHUNK * 32) as u32;
    let unpacked = row_floats + (chunks * row_planes::<F>() * CHUNK * ROWS * 4) as u32;
    let totals = (ROWS * cols * 4) as u32;
    let column_floats = (stages(halves) * halves * cols * CHUNK * 32) as u32;
    Layout {
        row_floats,
        tile: if unpacked < totals { totals } else { unpacked },
        column_floats,
        slot: column_floats + (2 * halves * column_planes::<F>() * CHUNK * cols * 4) as u32,
        totals,
    }
}

/// Shared memory of a CTA of `warps` warps.
pub const fn narrow_bytes<F: BlockFormat>(cols: usize, warps: u32, paired: bool) -> u32 {
    let Layout { tile, slot, totals, .. } = layout::<F>(cols);
    let (tiles, per_slot) = (warps / halves(cols) as u32, 1 + paired as u32);
    tiles * tile + tiles / per_slot * slot + per_slot * totals + 4 * cols as u32
}

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
pub use device::narrow;

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod device {
    use bytemuck::Zeroable;

    use super::*;
    use crate::device::math::{fresh, opaque};
    use crate::device::{F32x4, Glb, Smem, U32x2, U32x4, async_copy, grid, sync, thread, warp};
    use crate::kernels::int8_tile::{self, Accumulators, Codes, Product, Tile};
    use crate::kernels::mmq::{Work, group, groups_of, units_of};
    use crate::kernels::quantise_act::ActScale;
    use crate::tile::{SPAN_GROUPS, Tiled, load_span};

    /// Floats from one column's ended results to the next one's: the lanes that end four columns of eight rows find them in
    /// banks of their own.
    const ENDED_PITCH: usize = ROWS + 4;

    /// Chunks of a span.
    const SPAN_CHUNKS: usize = SPAN_GROUPS / CHUNK;

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

    /// Whether a chunk's words are loaded when they are needed, since registers are short: without tensor cores, with two
    /// halves, and where (Q6_K) a chunk's words do not fit into the 128 registers of a thread. Else a chunk ahead, which takes
    /// code for every chunk.
    const fn late<F: Tiled, P: Product>(cols: usize) -> bool {
        P::ONE_AT_A_TIME || halves(cols) != 1 || (F::LAYOUT.span_bytes > 4 * 48 && F::LAYOUT.unit_bytes == 4)
    }

    /// Whether tensor cores multiply the scales.
    const fn exact<F: BlockFormat, P: Product>() -> bool {
        int8_tile::has_exact_scales::<F>() && !P::ONE_AT_A_TIME
    }

    /// What a warp copies of its slot's activations: its share of the columns. `COLS` of the slot, at most 8 · `NT` of the
    /// warp, in steps of `HALVES` chunks.
    struct Columns<const COLS: usize, const NT: usize, const HALVES: usize> {
        q: Glb<U32x4>,
        scales: Glb<U32x2>,
        n_groups: u32,
        /// The warp's first column, and how many it has.
        first: u32,
        n: u32,
        /// First groups of all columns.
        starts: Smem<u32>,
        stages: Smem<U32x4>,
        floats: Smem<f32>,
    }

    impl<const COLS: usize, const NT: usize, const HALVES: usize> Columns<COLS, NT, HALVES> {
        /// Codes of a step's chunk.
        #[inline(always)]
        #[track_caller]
        fn codes(&self, stage: u32, chunk: u32) -> Codes<CHUNK> {
            Codes(self.stages.skip((stage * HALVES as u32 + chunk) * (2 * CHUNK * COLS) as u32))
        }

        /// Floats of a chunk of an even or odd step.
        #[inline(always)]
        #[track_caller]
        fn floats<F: BlockFormat>(&self, step: u32, chunk: u32) -> Smem<f32> {
            let at = step % 2 * HALVES as u32 + chunk;
            self.floats.skip(at * (column_planes::<F>() * CHUNK * COLS) as u32)
        }

        /// Column, from the warp's first on, and group of a chunk whose scale this lane prepares in step `i`: neighbours take
        /// the two groups of one column.
        #[inline(always)]
        fn scale_place(i: usize) -> (u32, u32) {
            let at = thread::lane_id() + 32 * i as u32;
            (at / CHUNK as u32, at % CHUNK as u32)
        }

        /// Starts the copies of the step of codes at group `first`.
        #[cfg_attr(target_arch = "nvptx64", inline(always))]
        #[track_caller]
        fn copy(&self, first: u32, stage: u32) {
            let piece = thread::lane_id() % (2 * CHUNK) as u32;
            let column = self.first + thread::lane_id() / 4;
            let mut starts = [0; NT];
            let mut i = 0;
            while i < NT {
                if 8 * (i as u32) < self.n {
                    starts[i] = self.starts.ld(column + 8 * i as u32);
                }
                i += 1;
            }
            unroll!(C in 0..2 {
                let first = first + (C * CHUNK) as u32;
                if C < HALVES && first + piece / 2 < self.n_groups {
                    let codes = self.codes(stage, C as u32);
                    let mut i = 0;
                    while i < NT {
                        if 8 * (i as u32) < self.n {
                            let target = Codes::<CHUNK>::index(column + 8 * i as u32, piece);
                            async_copy::copy16(codes.0, target, self.q, 2 * (starts[i] + first) + piece);
                        }
                        i += 1;
                    }
                }
            });
            async_copy::commit();
        }

        /// The scales of the step at group `first`.
        #[cfg_attr(target_arch = "nvptx64", inline(always))]
        #[track_caller]
        fn load_scales(&self, first: u32) -> [[U32x2; NT]; HALVES] {
            let (mut starts, mut acts) = ([0; NT], [[U32x2([0; 2]); NT]; HALVES]);
            let mut i = 0;
            while 2 * i < NT {
                let (column, _) = Self::scale_place(i);
                if column < self.n {
                    starts[i] = self.starts.ld(self.first + column);
                }
                i += 1;
            }
            let mut c = 0;
            while c < HALVES {
                let first = first + (c * CHUNK) as u32;
                let mut i = 0;
                while 2 * i < NT {
                    let (column, j) = Self::scale_place(i);
                    if column < self.n && first + j < self.n_groups {
                        acts[c][i] = self.scales.ld_nc(starts[i] + first + j);
                    }
                    i += 1;
                }
                c += 1;
            }
            acts
        }

        /// Prepares a step's scales.
        #[cfg_attr(target_arch = "nvptx64", inline(always))]
        #[track_caller]
        fn put_scales<F: BlockFormat, P: Product>(&self, step: u32, acts: [[U32x2; NT]; HALVES]) {
            let mut c = 0;
            while c < HALVES {
                let floats = self.floats::<F>(step, c as u32);
                let mut i = 0;
                while 2 * i < NT {
                    let (column, j) = Self::scale_place(i);
                    if column < self.n {
                        let U32x2([d, extra]) = acts[c][i];
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
                c += 1;
            }
        }
    }

    /// Fours of sums that a warp leaves, one after the other: lane by lane what accumulators (m, n) have.
    #[inline(always)]
    fn fours(nt: usize) -> u32 {
        (2 * nt) as u32 * thread::WARP
    }

    /// Leaves a warp's sums.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    fn put_sums<const NT: usize>(sums: Smem<F32x4>, half: u32, acc: &Accumulators<2, NT>) {
        // Addresses are computed here, not kept in registers from round to round.
        let at = half * fours(NT) + fresh(thread::lane_id());
        unroll!(M in 0..2 {
            let mut n = 0;
            while n < NT {
                sums.st(at + (M * NT + n) as u32 * thread::WARP, F32x4(acc[M][n]));
                n += 1;
            }
        });
    }

    /// Adds four sums of slots 0 to `n` in order to a total.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    fn add_sums(total: &mut [f32; 4], of_slot: impl Fn(u32) -> Smem<F32x4>, at: u32, n: u32) {
        let mut slot = 0;
        // Four loads under way at a time.
        while slot + 4 <= n {
            let mut sums = [F32x4([0.0; 4]); 4];
            unroll!(I in 0..4 { sums[I] = of_slot(slot + I as u32).ld(at); });
            unroll!(I in 0..4 {
                unroll!(E in 0..4 { total[E] += sums[I].0[E]; });
            });
            slot += 4;
        }
        while slot < n {
            let F32x4(sums) = of_slot(slot).ld(at);
            unroll!(E in 0..4 { total[E] += sums[E]; });
            slot += 1;
        }
    }

    /// At most `COLS` (8 · `NT` · `HALVES`) columns of the row tile `first_tile`, of a gated pair of both matrices; `two` if
    /// the tile after it is the CTA's, too. Ends with all threads past the last use of shared memory.
    #[inline(always)]
    #[track_caller]
    pub fn narrow<
        F: BlockFormat + Tiled,
        P: Product,
        const COLS: usize,
        const NT: usize,
        const HALVES: usize,
    >(
        work: &Work,
        first_tile: u32,
        two: bool,
    ) {
        const { assert!(COLS == 8 * NT * HALVES && NT.is_multiple_of(2) && HALVES == halves(COLS)) };
        /// Of a span.
        const fn steps(halves: usize) -> u32 {
            (SPAN_CHUNKS / halves) as u32
        }
        let step_groups = (HALVES * CHUNK) as u32;
        let n_stages = const { stages(HALVES) } as u32;
        let (lane, warp_id) = (thread::lane_id(), thread::warp_id());
        let n_warps = thread::block_dim_x() / thread::WARP;
        let gated = work.gate.is_some();
        let paired = gated || two;
        let per_slot = if paired { 2 } else { 1 };
        let team = per_slot * HALVES as u32;
        // Slot, and in its team the half and which of the row tiles.
        let (slot, mate) = if paired {
            (warp_id / (2 * HALVES as u32), warp_id % (2 * HALVES as u32))
        } else {
            (warp_id / HALVES as u32, warp_id % HALVES as u32)
        };
        let (half, second) = (mate % HALVES as u32, mate / HALVES as u32);
        let n_tiles_there = n_warps / HALVES as u32;
        let per_round = n_tiles_there / per_slot;

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
            if span < n_spans && lane == 0 && half == 0 {
                let bytes = units_of::<F>(span, n_groups) * (ROWS * F::LAYOUT.unit_bytes) as u32;
                of_span(span).prefetch(bytes);
            }
        };

        let at = const { layout::<F>(COLS) };
        let base = warp_id / HALVES as u32 * at.tile;
        let slot_base = n_tiles_there * at.tile + slot * at.slot;
        let n = COLS as u32 / team;
        let totals_at = n_tiles_there * at.tile + per_round * at.slot;
        let starts_at = totals_at + per_slot * at.totals;
        let columns = Columns::<COLS, NT, HALVES> {
            q: work.q,
            scales: work.scales,
            n_groups,
            first: mate * n,
            n,
            starts: Smem::dynamic(starts_at, COLS as u32),
            stages: Smem::dynamic(slot_base, n_stages * (HALVES * 2 * CHUNK * COLS) as u32),
            floats: Smem::dynamic(
                slot_base + at.column_floats,
                (2 * HALVES * column_planes::<F>() * CHUNK * COLS) as u32,
            ),
        };
        let chunks_there = const { chunks_there(HALVES) } as u32;
        let all_codes = Smem::<U32x4>::dynamic(base, chunks_there * (ROWS * 2 * CHUNK) as u32);
        let row_planes = (row_planes::<F>() * CHUNK * ROWS) as u32;
        let all_floats = Smem::<f32>::dynamic(base + at.row_floats, chunks_there * row_planes);
        // A row tile's chunk, and its floats.
        let unpacked = |chunk: u32| {
            let there = chunk % chunks_there;
            (
                Codes::<CHUNK>(all_codes.skip(there * (ROWS * 2 * CHUNK) as u32)),
                all_floats.skip(there * row_planes),
            )
        };
        // Of a row tile, in the order in which warps leave them.
        let outputs = (ROWS * COLS / 4) as u32;
        let sums_of = |tile: u32| Smem::<F32x4>::dynamic(tile * at.tile, outputs);
        let totals: Smem<F32x4> = Smem::dynamic(totals_at, per_slot * outputs);
        // Results to quantise, column by column, where the first slot's activations were.
        const { assert!((4 * COLS * ENDED_PITCH) as u32 <= layout::<F>(COLS).slot) };
        let ended: Smem<f32> = Smem::dynamic(n_tiles_there * at.tile, (COLS * ENDED_PITCH) as u32);

        // Unpacks chunk `C`, a constant, of a span's words.
        macro_rules! unpack {
            ($C:ident, $words:expr) => {
                let words = whole_words::<F>(&$words);
                let (codes, floats) = unpacked($C as u32);
                let mut scales = [0.0; CHUNK];
                unroll!(J in 0..2 {
                    let group = group::<F>(&words, CHUNK * $C + J);
                    if const { exact::<F, P>() } {
                        int8_tile::put_codes(codes, lane, J as u32, int8_tile::signed_codes::<F>(&group));
                        scales[J] = group.scale[0];
                    } else {
                        int8_tile::put_group::<F, CHUNK, ROWS>(codes, floats, lane, J as u32, &group);
                    }
                });
                if const { exact::<F, P>() } {
                    int8_tile::put_row_scales(floats, lane, scales);
                }
            };
        }

        let mut span = slot;
        // Loads take what a chunk needs: this is the rest.
        prefetch(span);
        // A warp without a span loads one all the same: nothing of it is used.
        let mut words = load(if span < n_spans { span } else { 0 });
        prefetch(span + per_round);
        grid::wait_for_earlier();
        let thread = thread::thread_idx_x();
        if thread < COLS as u32 {
            columns.starts.st(thread, work.columns.input(thread) * n_groups);
        }
        sync::sync_threads();
        let mut acts = [[U32x2([0; 2]); NT]; HALVES];
        let mut stage = 0;
        if span < n_spans {
            let first = span * SPAN_GROUPS as u32;
            let mut ahead = 0;
            while ahead + 1 < n_stages {
                columns.copy(first + ahead * step_groups, ahead);
                ahead += 1;
            }
            acts = columns.load_scales(first);
        }

        let mut done = 0;
        while done < n_spans {
            if span < n_spans {
                let first = span * SPAN_GROUPS as u32;
                let there = groups_of(span, n_groups);
                let mut acc = [[[0.0f32; 4]; NT]; 2];
                // Where the step `step` of this span is; after the span's end steps of the next one. If there is none, past
                // the end, where nothing is copied.
                let group_of = |step: u32| {
                    if step * step_groups < there {
                        first + step * step_groups
                    } else {
                        (span + per_round) * SPAN_GROUPS as u32 + step % steps(HALVES) * step_groups
                    }
                };
                let meet = || {
                    if paired || HALVES != 1 {
                        sync::barrier_of(1 + slot, team * thread::WARP);
                    } else {
                        warp::sync_warp();
                    }
                };
                let mut multiply = |step: u32| {
                    // This step's activations are there, the next one's may be under way.
                    if HALVES == 1 {
                        async_copy::wait::<1>();
                    } else {
                        async_copy::wait::<0>();
                    }
                    meet();
                    // Nobody reads the last step's stage any more.
                    let free = if stage == 0 { n_stages - 1 } else { stage - 1 };
                    columns.copy(group_of(step + n_stages - 1), free);
                    let next_acts = columns.load_scales(group_of(step + 1));

                    // One after the other: side by side they take registers.
                    let n_chunks = if HALVES == 1 { 1 } else { opaque(HALVES as u32) };
                    let mut c = 0;
                    while c < n_chunks && step * step_groups + c * (CHUNK as u32) < there {
                        let (a, row_floats) = unpacked(step * HALVES as u32 + c);
                        let tile = Tile::<CHUNK, ROWS, COLS> {
                            a,
                            b: columns.codes(stage, c),
                            row_floats,
                            column_floats: columns.floats::<F>(step, c),
                            row: 0,
                            column: half * (8 * NT) as u32,
                        };
                        let left = there - step * step_groups - c * CHUNK as u32;
                        if P::ONE_AT_A_TIME {
                            let here = opaque(left);
                            let mut j = 0;
                            while j < CHUNK as u32 && j < here {
                                tile.add_group::<F, P, 2, NT>(&mut acc, j);
                                j += 1;
                            }
                        } else if const { exact::<F, P>() } {
                            tile.add_pair::<P, 2, NT>(&mut acc, left > 1);
                        } else {
                            tile.add_group::<F, P, 2, NT>(&mut acc, 0);
                            if left > 1 {
                                tile.add_group::<F, P, 2, NT>(&mut acc, 1);
                            }
                        }
                        c += 1;
                    }
                    if HALVES == 1 {
                        warp::sync_warp();
                    }
                    stage = if stage + 1 == n_stages { 0 } else { stage + 1 };
                    next_acts
                };
                // Unknown to the compiler.
                let n_steps = opaque(steps(HALVES));
                if const { !late::<F, P>(COLS) } {
                    'span: {
                        unroll!(C in 0..4 {
                            if (CHUNK * C) as u32 >= there {
                                // There is no other span.
                                words = F::Words::zeroed();
                                break 'span;
                            }
                            // All lanes are done with the last chunk.
                            columns.put_scales::<F, P>(C as u32, acts);
                            unpack!(C, words);
                            // What the next chunk needs is under way during this one's product; other loads vanish.
                            if C + 1 < SPAN_CHUNKS {
                                // Behind a branch: ptxas would move the loads up and keep two chunks' words.
                                words = if (C as u32) < n_steps { load(span) } else { F::Words::zeroed() };
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
                    let mut step = 0;
                    while step < n_steps && step * step_groups < there {
                        // The step before the last one is done: with one half by all lanes, with two by both.
                        columns.put_scales::<F, P>(step, acts);
                        let chunk = step * HALVES as u32 + half;
                        unroll!(C in 0..4 {
                            if chunk == C as u32 && there > (CHUNK * C) as u32 {
                                // Of a span's loads those that the chunk does not need vanish.
                                unpack!(C, load(span));
                            }
                        });
                        if step == steps(HALVES) - 1 {
                            prefetch(span + 2 * per_round);
                        }
                        acts = multiply(step);
                        step += 1;
                    }
                }
                if HALVES != 1 {
                    // Nobody reads codes any more.
                    meet();
                }
                put_sums::<NT>(sums_of(warp_id / HALVES as u32), half, &acc);
            }
            sync::sync_threads();
            let here = if n_spans - done < per_round { n_spans - done } else { per_round };
            let last = done + per_round >= n_spans;
            let mut four = fresh(thread);
            while four < outputs {
                let mut sums = [[-0.0f32; 4]; 2];
                unroll!(M in 0..2 {
                    if (M as u32) < per_slot {
                        let total = M as u32 * outputs + four;
                        // -0 + x is x, whatever x.
                        if done != 0 {
                            sums[M] = totals.ld(total).0;
                        }
                        add_sums(&mut sums[M], |slot| sums_of(slot * per_slot + M as u32), four, here);
                        if !last {
                            totals.st(total, F32x4(sums[M]));
                        }
                    }
                });
                if last {
                    // Whose four it is: lane, columns, rows, half.
                    let (lane, at) = (four % thread::WARP, four / thread::WARP);
                    let n = at / (2 * NT) as u32 * NT as u32 + at % NT as u32;
                    let m = at / NT as u32 % 2;
                    unroll!(E in 0..4 {
                        let column = 8 * n + 2 * (lane % 4) + (E % 2) as u32;
                        let of_tile = 16 * m + lane / 4 + (E / 2 * 8) as u32;
                        let row = first_tile * ROWS as u32 + of_tile;
                        if column < work.columns.n {
                            let output = work.columns.output(column);
                            if row < work.part.n_rows {
                                let residual = work.part.residual(output, row);
                                let v = work.ended(row, [sums[0][E], sums[1][E]]);
                                if work.gate.quantises() {
                                    ended.st(column * ENDED_PITCH as u32 + of_tile, v);
                                } else {
                                    work.part.put(output, row, v, residual);
                                }
                            }
                            if two && row + (ROWS as u32) < work.part.n_rows {
                                work.finish(output, row + ROWS as u32, [sums[1][E], 0.0]);
                            }
                        }
                    });
                }
                four += n_warps * thread::WARP;
            }
            if last && work.gate.quantises() {
                sync::sync_threads();
                let mut column = warp_id;
                while column < work.columns.n {
                    let v = ended.ld(column * ENDED_PITCH as u32 + lane);
                    work.put_group(work.columns.output(column), first_tile, v);
                    column += n_warps;
                }
            }
            sync::sync_threads();
            done += per_round;
            span += per_round;
        }
    }
}
