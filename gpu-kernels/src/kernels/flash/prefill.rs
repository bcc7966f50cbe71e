//! Many tokens: a CTA's rows are of any tokens and sequences, and what they see stands in a table in shared memory.

use super::block::{Attention, Inputs, Part};
use super::store::Class;
use super::{CAUSAL, NO_SEQUENCE, PAGE, state};
use crate::device::mma::FragmentA;
use crate::device::{F32x2, Smem, U32x2, U32x4, async_copy, grid, math, sync, thread, warp};

/// Tokens and heads of a CTA's tile.
#[derive(Clone, Copy)]
struct Span {
    /// First row of the tile, as token · group + head in group.
    first: u32,
    /// Rows of the tile that exist.
    n: u32,
}

/// Columns of a table of the tile's rows in shared memory: sequence; first visible position and the one after the last;
/// the same for rows of the sequence that is being walked, zero for others.
const SEQUENCE: u32 = 0;
const ROW_LOW: u32 = 1;
const ROW_HIGH: u32 = 2;
const LOW: u32 = 3;
const HIGH: u32 = 4;
/// Sequence of a row that does not exist.
const ABSENT: u32 = NO_SEQUENCE - 1;

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
    #[inline(always)]
    fn table(column: u32) -> Smem<u32> {
        Smem::dynamic(16 * Self::LAYOUT.rows as u32 + 4 * column * Self::TILE_ROWS, Self::TILE_ROWS)
    }

    /// Per warp: what its rows see (some of them from and up to, all of them from and up to); then of the sequence that
    /// it walks the first page, the positions and the last block + 1.
    #[inline(always)]
    fn views() -> Smem<U32x4> {
        Smem::dynamic(16 * Self::LAYOUT.views as u32, 2 * (SHARERS * GROUPS) as u32)
    }

    /// A row of the tile as (token, head) in one number: its row of `q` and of `out`.
    #[inline(always)]
    fn head_row(x: &Inputs, span: Span, row: u32) -> usize {
        let group = x.n_head / x.n_head_kv;
        let (token, head) = ((span.first + row) / group, (span.first + row) % group);
        token as usize * x.n_head as usize + (thread::block_idx_y() * group + head) as usize
    }

    /// Rows of one sequence; what the others see is zero in the table.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    fn sequence(x: &Inputs, q: &[FragmentA; KS], sequence: u32, total: &mut Part<NO>) {
        // Computed anew for each sequence: see `block`.
        let thread = math::fresh(thread::thread_idx_x());
        let (lane, warp) = (thread % 32, thread / 32);
        let U32x2([first_page, len]) = x.sequences.ld_early(sequence);

        // What the rows of the CTA see, together.
        let (mut cta_low, mut cta_high) = (u32::MAX, 0);
        let mut i = 0;
        while i < Self::TILE_ROWS.div_ceil(32) {
            let r = if 32 * i + lane < Self::TILE_ROWS { 32 * i + lane } else { 0 };
            let (low, high) = (Self::table(LOW).ld(r), Self::table(HIGH).ld(r));
            cta_low = if high > 0 && low < cta_low { low } else { cta_low };
            cta_high = if high > cta_high { high } else { cta_high };
            i += 1;
        }
        let (cta_low, cta_high) = (warp::min_u32(cta_low), !warp::min_u32(!cta_high));
        // What some row of the warp sees, and what all do; rows that are not there may see what they like.
        let r = 16 * (warp / SHARERS as u32) + lane % 16;
        let (low, high) = (Self::table(LOW).ld(r), Self::table(HIGH).ld(r));
        let absent = Self::table(SEQUENCE).ld(r) == ABSENT;
        let some = [warp::min_u32(if high > 0 { low } else { u32::MAX }), !warp::min_u32(!high)];
        let all = [!warp::min_u32(!low), warp::min_u32(if absent { u32::MAX } else { high })];
        let (mut block, end) = (cta_low / Self::BLOCK, cta_high.div_ceil(Self::BLOCK));
        // Looked up in shared memory once per block: the outputs need the registers.
        let walk = 2 * warp;
        if lane == 0 {
            Self::views().st(walk, U32x4([some[0], some[1], all[0], all[1]]));
            Self::views().st(walk + 1, U32x4([first_page, len, end, 0]));
        }
        warp::sync_warp();
        let page =
            |first_page: u32, block: u32| x.pages.ld_early(first_page + block * Self::BLOCK / PAGE as u32);
        let mut stage = 0;
        let mut next_page = 0;
        if block < end {
            next_page = page(first_page, block);
            if Self::ASYNC {
                let stage = if Self::UNPACKS { block % 2 } else { 0 };
                Self::load(x, thread::block_idx_y(), next_page, block, len, stage);
                async_copy::commit();
                if block + 1 < end {
                    next_page = page(first_page, block + 1);
                }
            }
            // Two of those that are unpacked are under way, in places by their numbers.
            if Self::UNPACKS {
                if block + 1 < end {
                    Self::load(x, thread::block_idx_y(), next_page, block + 1, len, (block + 1) % 2);
                }
                async_copy::commit();
                if block + 2 < end {
                    next_page = page(first_page, block + 2);
                }
            }
        }
        while block < end {
            let mut part = Part::<NO>::EMPTY;
            let next = (block / Self::N_BLOCKS + 1) * Self::N_BLOCKS;
            let span_end = if next < end { next } else { end };
            while block < span_end {
                if Self::UNPACKS {
                    async_copy::wait::<1>();
                } else if Self::ASYNC {
                    async_copy::wait::<0>();
                }
                sync::sync_threads();
                let walk = 2 * math::fresh(thread::warp_id());
                let U32x4([first_page, len, end, _]) = Self::views().ld(walk + 1);
                if Self::UNPACKS {
                    Self::unpack(x, block % 2, 0);
                    sync::sync_threads();
                    if block + 2 < end {
                        Self::load(x, thread::block_idx_y(), next_page, block + 2, len, block % 2);
                        if block + 3 < end {
                            next_page = page(first_page, block + 3);
                        }
                    }
                    async_copy::commit();
                } else if Self::ASYNC {
                    if block + 1 < end {
                        Self::load(x, thread::block_idx_y(), next_page, block + 1, len, stage ^ 1);
                        async_copy::commit();
                        if block + 2 < end {
                            next_page = page(first_page, block + 2);
                        }
                    }
                } else {
                    Self::load(x, thread::block_idx_y(), next_page, block, len, 0);
                    if block + 1 < end {
                        next_page = page(first_page, block + 1);
                    }
                    sync::sync_threads();
                }
                let first = block * Self::BLOCK;
                let U32x4([some_low, some_high, all_low, all_high]) = Self::views().ld(walk);
                if first < some_high && first + Self::BLOCK > some_low {
                    let masked = first < all_low || first + Self::BLOCK > all_high;
                    let limits = |row| [LOW, HIGH].map(|column| Self::table(column).ld(row));
                    let place = |row| {
                        let (group, tile) = (x.n_head / x.n_head_kv, Self::tile(x));
                        let flat = tile.first + if row < tile.n { row } else { 0 };
                        [flat / group, thread::block_idx_y() * group + flat % group]
                    };
                    Self::block(x, q, masked, limits, place, &mut part, first, stage);
                }
                block += 1;
                if STAGES > 1 {
                    stage ^= 1;
                }
            }
            total.merge(&part);
        }
    }

    /// This CTA's rows.
    #[inline(always)]
    fn tile(x: &Inputs) -> Span {
        // Computed anew where it is needed: see `block`.
        let (group, cta) = (x.n_head / x.n_head_kv, math::fresh(thread::block_idx_x()));
        // The last tokens see most: they start first.
        let first = (thread::grid_dim_x() - 1 - cta) * Self::TILE_ROWS;
        let left = x.n_tokens * group - first;
        Span { first, n: if left < Self::TILE_ROWS { left } else { Self::TILE_ROWS } }
    }

    /// The first row after `first` that is of another sequence; the tile's end if there is none.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    fn next_run(x: &Inputs, first: u32) -> u32 {
        let lane = math::fresh(thread::lane_id());
        let sequence = Self::table(SEQUENCE).ld(first);
        let mut end = Self::tile(x).n;
        let mut i = 0;
        while i < Self::TILE_ROWS.div_ceil(32) {
            let r = if 32 * i + lane < Self::TILE_ROWS { 32 * i + lane } else { 0 };
            let other = warp::ballot(r > first && Self::table(SEQUENCE).ld(r) != sequence);
            let at = 32 * i + other.trailing_zeros();
            end = if other != 0 && at < end { at } else { end };
            i += 1;
        }
        end
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    pub(super) fn prefill(x: Inputs) {
        let (tid, lane) = (thread::thread_idx_x(), thread::lane_id());
        let row_group = thread::warp_id() / SHARERS as u32;
        let group = x.n_head / x.n_head_kv;
        let span = Self::tile(&x);

        // What each row sees.
        if tid < Self::TILE_ROWS {
            let mut row = [ABSENT, 0, 0];
            if tid < span.n {
                let token = (span.first + tid) / group;
                let sequence = x.token_sequences.ld_early(token);
                row[0] = sequence;
                if sequence != NO_SEQUENCE {
                    let pos = x.positions.ld_early(token);
                    let U32x2([_, len]) = x.sequences.ld_early(sequence);
                    let (low, high) = super::visible(pos, len, x.flags & CAUSAL != 0, x.window);
                    row = [sequence, low, high];
                }
            }
            Self::table(SEQUENCE).st(tid, row[0]);
            Self::table(ROW_LOW).st(tid, row[1]);
            Self::table(ROW_HIGH).st(tid, row[2]);
        }
        grid::wait_for_earlier();

        // Queries come through shared memory, where they stay if there are no registers for them.
        let queries = Self::queries();
        let words = Smem::<u32>::dynamic(0, 4 * Self::LAYOUT.end as u32);
        let pairs = 8 * KS as u32;
        let mut i = tid;
        while i < Self::TILE_ROWS * pairs {
            let (row, pair) = (i / pairs, i % pairs);
            let mut planes = [0; 2];
            if row < span.n && pair < x.head_dim[0] / 2 {
                let query = x.q.offset(Self::head_row(&x, span, row) * (x.head_dim[0] / 2) as usize);
                let F32x2([low, high]) = query.ld_nc(pair);
                planes = C::pack(low, high);
            }
            let at = 4 * queries.at(row, pair / 4) + pair % 4;
            words.st(at, planes[0]);
            if C::PLANES == 2 {
                words.st(4 * queries.plane + at, planes[1]);
            }
            i += Self::THREADS;
        }
        let mut q = [FragmentA::default(); KS];
        if Self::TILE.q_in_registers() {
            sync::sync_threads();
            let mut step = 0;
            while step < KS {
                q[step] = Self::query(0, step, lane, row_group);
                step += 1;
            }
            // Where they were, keys will be.
            sync::sync_threads();
        }
        unroll!(PART in 0..2 {
            unroll!(STAGE in 0..2 {
                if STAGE < STAGES {
                    let to = Self::store(PART, STAGE as u32);
                    Self::pad(to, Self::BLOCK, x.head_dim[PART]);
                }
            });
        });

        let mut total = Part::<NO>::EMPTY;
        let mut first = 0;
        while first < Self::tile(&x).n {
            // Everyone is done with the tiles of the sequence before.
            sync::sync_threads();
            let sequence = Self::table(SEQUENCE).ld(first);
            if sequence != NO_SEQUENCE {
                // What rows of other sequences see is not of this one.
                let (end, tid) = (Self::next_run(&x, first), math::fresh(thread::thread_idx_x()));
                if tid < Self::TILE_ROWS {
                    let inside = tid >= first && tid < end;
                    let see = |column| if inside { Self::table(column).ld(tid) } else { 0 };
                    Self::table(LOW).st(tid, see(ROW_LOW));
                    Self::table(HIGH).st(tid, see(ROW_HIGH));
                }
                sync::sync_threads();
                Self::sequence(&x, &q, sequence, &mut total);
            }
            first = Self::next_run(&x, first);
        }

        if !x.results().are_plain() {
            let place = |row: u32| {
                let (group, tile) = (x.n_head / x.n_head_kv, Self::tile(&x));
                [(tile.first + row) / group, thread::block_idx_y() * group + (tile.first + row) % group]
            };
            return Self::store_results(&x, &total, Self::tile(&x).n, place);
        }
        // Out they go. Nothing of before is needed for it, so nothing stays in registers.
        let (thread, span) = (math::fresh(thread::thread_idx_x()), Self::tile(&x));
        let (lane, row_group, sharer) =
            (thread % 32, thread / 32 / SHARERS as u32, thread / 32 % SHARERS as u32);
        unroll!(R in 0..2 {
            let row = 16 * row_group + 8 * R as u32 + lane / 4;
            if row < span.n {
                let at = Self::head_row(&x, span, row);
                let sink = super::sink(x.sinks, (at % x.n_head as usize) as u32);
                let factor = state::normaliser(total.max[R], total.sum[R], sink);
                let to = x.out.offset(at * (x.head_dim[1] / 2) as usize);
                let mut n = 0;
                while n < NO {
                    let column = 8 * (sharer * NO as u32 + n as u32) + 2 * (lane % 4);
                    if column < x.head_dim[1] {
                        let [low, high] = [total.out[n].0[2 * R], total.out[n].0[2 * R + 1]];
                        to.st(column / 2, F32x2([low * factor, high * factor]));
                    }
                    n += 1;
                }
            }
        });
    }
}
