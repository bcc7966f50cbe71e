//! Few tokens: a CTA's rows are of one token and KV head, so all see the same, and what they see stands in registers.
//!
//! A CTA walks its share of the token's spans. Blocks are copied `STAGES - 1` ahead and the copies go on where a span
//! ends: its state is stored, or merged, while the next span's first blocks are under way.

use super::append::PAIRS;
use super::block::{Attention, Inputs, Part};
use super::store::Class;
use super::{CAUSAL, NO_SEQUENCE, PAGE, SPAN, state};
use crate::device::mma::FragmentA;
use crate::device::{F32x2, Smem, U32x2, async_copy, grid, math, sync, thread, warp};
use crate::kernels::kv_store::NO_CELL;

/// Pages that a CTA asks for while it waits for earlier launches: as many as it will copy first. With a long cache more
/// would only stand in the way of those.
const PREFETCH_PAGES: u32 = 2;

/// The rows of a CTA.
#[derive(Clone, Copy)]
struct Tile {
    token: u32,
    kv_head: u32,
    /// First head, and how many there are.
    head: u32,
    n: u32,
}

impl Tile {
    #[inline(always)]
    fn new(x: &Inputs, rows: u32) -> Tile {
        let group = x.n_head / x.n_head_kv;
        let tiles = group.div_ceil(rows);
        let (kv_head, nth) = (thread::block_idx_y() / tiles, thread::block_idx_y() % tiles);
        let left = group - nth * rows;
        Tile {
            token: thread::block_idx_x(),
            kv_head,
            head: kv_head * group + nth * rows,
            n: if left < rows { left } else { rows },
        }
    }

    /// A row as (token, head) in one number: its row of `q` and of `out`.
    #[inline(always)]
    fn head_row(&self, x: &Inputs, row: u32) -> usize {
        self.token as usize * x.n_head as usize + (self.head + row) as usize
    }
}

/// Numbers of a sequence's pages, 32 at a time: a lane holds one.
#[derive(Clone, Copy)]
struct Pages {
    /// Where the sequence's stand in the step's, and how many it has.
    first: u32,
    n: u32,
    held: u32,
}

impl Pages {
    /// The sequence's pages from `page` on up to the next multiple of 32.
    #[inline(always)]
    #[track_caller]
    fn hold(&mut self, x: &Inputs, page: u32) {
        let mine = page - page % 32 + thread::lane_id();
        if mine < self.n {
            self.held = x.pages.ld_early(self.first + mine);
        }
    }

    /// The number of page `page` of the sequence, which is among those held.
    #[inline(always)]
    #[track_caller]
    fn get(&self, page: u32) -> u32 {
        warp::shfl(self.held, page)
    }
}

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
    /// Starts the copy of block `next`, if it comes before `end`, and goes on to the one after.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    fn copy_next(x: &Inputs, tile: Tile, pages: &mut Pages, next: &mut u32, end: u32, len: u32, stage: u32) {
        if *next < end {
            let page = |block: u32| block * Self::BLOCK / PAGE as u32;
            Self::load(x, tile.kv_head, pages.get(page(*next)), *next, len, stage);
            *next += 1;
            // Needed a block later.
            if (*next * Self::BLOCK).is_multiple_of(32 * PAGE as u32) && *next < end {
                pages.hold(x, page(*next));
            }
        }
        if Self::ASYNC {
            async_copy::commit();
        }
    }

    /// Loads the lane's part of the queries: of row `lane / 4` and of the eighth after it, per step two pairs. Every
    /// warp needs them all, so they come from where they are straight into registers. Rows that are not there take the
    /// last one's, and are stored nowhere.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    fn load_queries(x: &Inputs, tile: Tile, lane: u32) -> [[[[f32; 2]; 2]; KS]; 2] {
        let pairs = x.head_dim[0] / 2;
        let mut loaded = [[[[0.0; 2]; 2]; KS]; 2];
        unroll!(R in 0..2 {
            if R == 0 || tile.n > 8 {
                let row = 8 * R as u32 + lane / 4;
                let row = if row < tile.n { row } else { tile.n - 1 };
                let query = x.q.offset(tile.head_row(x, row) * pairs as usize + (lane % 4) as usize);
                // Apart, so that the usual head, which fills the tile, is loaded without a test.
                if pairs == 8 * KS as u32 {
                    let mut step = 0;
                    while step < KS {
                        unroll!(HALF in 0..2 {
                            loaded[R][step][HALF] = query.ld_nc(8 * step as u32 + 4 * HALF as u32).0;
                        });
                        step += 1;
                    }
                } else {
                    let mut step = 0;
                    while step < KS {
                        unroll!(HALF in 0..2 {
                            let first = 8 * step as u32 + 4 * HALF as u32;
                            // A head is whole groups of four pairs.
                            if first < pairs {
                                loaded[R][step][HALF] = query.ld_nc(math::opaque(first)).0;
                            }
                        });
                        step += 1;
                    }
                }
            }
        });
        loaded
    }

    /// What [`Self::load_queries`] loaded, as A.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn as_fragments(loaded: &[[[[f32; 2]; 2]; KS]; 2]) -> [FragmentA; KS] {
        let mut q = [FragmentA::default(); KS];
        let mut step = 0;
        while step < KS {
            unroll!(I in 0..4 {
                let [low, high] = loaded[I % 2][step][I / 2];
                q[step].0[I] = C::pack(low, high)[0];
            });
            step += 1;
        }
        q
    }

    /// The queries in shared memory, where they stay.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    fn fill_queries(x: &Inputs, tile: Tile) {
        let queries = Self::queries();
        let words = Smem::<u32>::dynamic(0, 4 * Self::LAYOUT.end as u32);
        let pairs = 8 * KS as u32;
        let mut i = thread::thread_idx_x();
        while i < Self::TILE_ROWS * pairs {
            let (row, pair) = (i / pairs, i % pairs);
            let mut planes = [0; 2];
            if row < tile.n && pair < x.head_dim[0] / 2 {
                let query = x.q.offset(tile.head_row(x, row) * (x.head_dim[0] / 2) as usize);
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
    }

    /// Stores rows: a span's state if `span` is given, else the outputs.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    fn store_rows(x: &Inputs, tile: Tile, part: &Part<NO>, span: Option<u32>) {
        // Nothing of it stays in registers between spans.
        let thread = math::fresh(thread::thread_idx_x());
        let (lane, sharer) = (thread % 32, thread / 32);
        let dim = x.head_dim[1];
        unroll!(R in 0..2 {
            let row = 8 * R as u32 + lane / 4;
            if row < tile.n {
                let mut at = tile.head_row(x, row);
                let mut factor = 1.0;
                let mut to = x.out;
                if let Some(span) = span {
                    at = at * x.n_spans as usize + span as usize;
                    to = x.scratch;
                    if sharer == 0 && lane.is_multiple_of(4) {
                        let n_rows = x.n_tokens as usize * x.n_head as usize;
                        let states = x.scratch.offset(n_rows * x.n_spans as usize * (dim / 2) as usize);
                        states.offset(at).st(0, F32x2([part.max[R], part.sum[R]]));
                    }
                } else {
                    let sink = super::sink(x.sinks, tile.head + row);
                    factor = state::normaliser(part.max[R], part.sum[R], sink);
                }
                let to = to.offset(at * (dim / 2) as usize);
                let mut n = 0;
                while n < NO {
                    let column = 8 * (sharer * NO as u32 + n as u32) + 2 * (lane % 4);
                    if column < dim {
                        let pair = [part.out[n].0[2 * R] * factor, part.out[n].0[2 * R + 1] * factor];
                        to.st(column / 2, F32x2(pair));
                    }
                    n += 1;
                }
            }
        });
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    pub(super) fn decode(x: Inputs) {
        // What the token sees, and the CTA's share of its spans.
        let token = thread::block_idx_x();
        let (sequence, pos) = (x.token_sequences.ld_early(token), x.positions.ld_early(token));
        let tile = Tile::new(&x, Self::TILE_ROWS);
        let (mut low, mut high, mut len) = (0, 0, 0);
        // The position that is appended, which the cache does not have, and its cell.
        let appends = !x.appended.angles.is_null();
        let (mut newest, mut cell) = (u32::MAX, NO_CELL);
        if Self::APPENDS && appends {
            cell = x.appended.cells.ld_early(token);
        }
        let mut pages = Pages { first: 0, n: 0, held: 0 };
        if sequence != NO_SEQUENCE {
            let U32x2([first_page, positions]) = x.sequences.ld_early(sequence);
            (low, high) = super::visible(pos, positions, x.flags & CAUSAL != 0, x.window);
            len = positions;
            if appends {
                len = pos;
                newest = pos;
            }
            pages = Pages { first: first_page, n: positions.div_ceil(PAGE as u32), held: 0 };
        }
        let (mut block, mut end) = (low / Self::BLOCK, high.div_ceil(Self::BLOCK));
        let shares = thread::grid_dim_z();
        if shares > 1 {
            let (first, last) = (low / SPAN as u32, high.div_ceil(SPAN as u32));
            let share = |i| (first + i * (last - first) / shares) * Self::N_BLOCKS;
            let (from, to) = (share(thread::block_idx_z()), share(thread::block_idx_z() + 1));
            block = if block < from { from } else { block };
            end = if end > to { to } else { end };
        }
        // All but the newest row lie in the cache long before an earlier launch of the step ends: a thread asks L2 for the K
        // or the V of a page, in the order in which they are needed.
        if block < end {
            let page = block * Self::BLOCK / PAGE as u32;
            pages.hold(&x, page);
            let (nth, of_v) = (page + thread::thread_idx_x() / 2, thread::thread_idx_x() % 2 == 1);
            let number = pages.get(nth);
            if nth < page + PREFETCH_PAGES && nth / 32 == page / 32 && nth * (PAGE as u32) < high {
                let head = number as usize * x.n_head_kv as usize + tile.kv_head as usize;
                let (part, row_bytes) = if of_v { (x.v, x.row_bytes[1]) } else { (x.k, x.row_bytes[0]) };
                let bytes = PAGE as u32 * row_bytes;
                part.offset(head * bytes as usize).prefetch(bytes);
            }
        }
        unroll!(PART in 0..2 {
            let mut stage = 0;
            while x.head_dim[PART] != Self::TILE.dims[PART] as u32 && stage < math::opaque(STAGES as u32) {
                Self::pad(Self::store(PART, stage), Self::BLOCK, x.head_dim[PART]);
                stage += 1;
            }
        });
        grid::wait_for_earlier();
        if x.n_spans > 0 && block >= end {
            return;
        }

        // Queries and the first blocks are all under way before the first of them is used.
        let mut loaded = [[[[0.0; 2]; 2]; KS]; 2];
        if Self::TILE.q_in_registers() {
            loaded = Self::load_queries(&x, tile, thread::lane_id());
        }
        let mut angles = [[[0.0; 4]; 2]; KS];
        let (mut appended, mut words) = ([[0.0; 2]; PAIRS], [0; PAIRS]);
        if Self::APPENDS && appends {
            angles = Self::load_angles(&x, thread::lane_id());
            appended = Self::load_appended(&x, tile.kv_head);
        }
        let mut next = block;
        let mut stage = 0;
        // Blocks that there is room for copies of; with those that are unpacked all of it is used, since the next copy
        // starts as soon as that is done.
        let copies = if Self::UNPACKS { Self::TILE.raw_blocks(x.row_bytes) } else { STAGES as u32 };
        let ahead = if Self::UNPACKS { copies } else { copies - 1 };
        while stage < ahead {
            Self::copy_next(&x, tile, &mut pages, &mut next, end, len, stage);
            stage += 1;
        }
        let mut q = [FragmentA::default(); KS];
        if Self::TILE.q_in_registers() {
            if Self::APPENDS && appends {
                Self::rotate(&x, &mut loaded, &angles);
                words = Self::as_words(&appended);
            }
            q = Self::as_fragments(&loaded);
        } else {
            Self::fill_queries(&x, tile);
        }

        let (mut total, mut part) = (Part::<NO>::EMPTY, Part::<NO>::EMPTY);
        let mut stage = 0;
        while block < end {
            // The block is there, and everyone is done with the one before.
            if Self::UNPACKS {
                match copies {
                    2 => async_copy::wait::<1>(),
                    3 => async_copy::wait::<2>(),
                    _ => async_copy::wait::<3>(),
                }
            } else if STAGES > 2 {
                async_copy::wait::<1>();
            } else if Self::ASYNC {
                async_copy::wait::<0>();
            }
            sync::sync_threads();
            if Self::UNPACKS {
                Self::unpack(&x, stage, 0);
                sync::sync_threads();
                Self::copy_next(&x, tile, &mut pages, &mut next, end, len, stage);
            } else {
                let ahead = if stage == 0 { STAGES as u32 - 1 } else { stage - 1 };
                Self::copy_next(&x, tile, &mut pages, &mut next, end, len, ahead);
            }
            if !Self::ASYNC {
                sync::sync_threads();
            }
            if Self::APPENDS && block == newest / Self::BLOCK {
                Self::append(&x, tile.kv_head, tile.head, [newest, cell], &words, stage);
                sync::sync_threads();
            }
            let first = block * Self::BLOCK;
            let masked = first < low || first + Self::BLOCK > high;
            let place = |row| [tile.token, tile.head + if row < tile.n { row } else { 0 }];
            let filled = if Self::UNPACKS { 0 } else { stage };
            Self::block(&x, &q, masked, |_| [low, high], place, &mut part, first, filled);
            block += 1;
            stage = if stage + 1 < copies { stage + 1 } else { 0 };
            if block == end || block.is_multiple_of(Self::N_BLOCKS) {
                if x.n_spans > 0 {
                    Self::store_rows(&x, tile, &part, Some((block - 1) / Self::N_BLOCKS));
                } else {
                    total.merge(&part);
                }
                part = Part::EMPTY;
            }
        }
        if x.n_spans == 0 && x.results().are_plain() {
            Self::store_rows(&x, tile, &total, None);
        } else if x.n_spans == 0 {
            Self::store_results(&x, &total, tile.n, |row| [tile.token, tile.head + row]);
        }
    }
}
