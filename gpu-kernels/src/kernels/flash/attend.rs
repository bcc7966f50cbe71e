//! The kernel of many tiles: see the contract in `flash`.

use super::store::{self, Class, Half, Split, Store};
use super::{CAUSAL, Layout, NO_SEQUENCE, PAGE, PER_TOKEN, SPAN, TRANSFORM, Tile, state};
use crate::device::mma::{self, FragmentA, FragmentB, FragmentF32};
use crate::device::{F32x2, Glb, Smem, U32x2, U32x4, async_copy, grid, math, sync, thread, warp};

/// The launch's arguments, as the contract names them.
#[derive(Clone, Copy)]
pub(super) struct Inputs {
    pub(super) q: Glb<F32x2>,
    pub(super) k: Glb<u8>,
    pub(super) v: Glb<u8>,
    pub(super) out: Glb<F32x2>,
    pub(super) scratch: Glb<F32x2>,
    pub(super) positions: Glb<u32>,
    pub(super) token_sequences: Glb<u32>,
    pub(super) sequences: Glb<U32x2>,
    pub(super) pages: Glb<u32>,
    pub(super) sinks: Glb<f32>,
    pub(super) slopes: Glb<f32>,
    pub(super) n_tokens: u32,
    pub(super) n_head: u32,
    pub(super) n_head_kv: u32,
    /// Elements, bytes of a row, and format, of K and of V.
    pub(super) head_dim: [u32; 2],
    pub(super) row_bytes: [u32; 2],
    pub(super) format: [u32; 2],
    pub(super) flags: u32,
    pub(super) window: u32,
    /// Factor on q·k, with that from natural to binary logarithms in it where nothing comes between.
    pub(super) scale: f32,
    pub(super) softcap: f32,
    /// Spans that `scratch` has room for per row; 0: a CTA takes all of a row's spans.
    pub(super) n_spans: u32,
}

/// The smallest of all lanes' values.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
#[track_caller]
fn warp_min(mut v: u32) -> u32 {
    unroll!(I in 0..8 {
        if I < 5 {
            let other = warp::shfl_xor(v, 1 << I);
            v = if other < v { other } else { v };
        }
    });
    v
}

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
/// Pages that a CTA asks for while it waits for earlier launches: a span's.
const PREFETCH_PAGES: u32 = (SPAN / PAGE) as u32;
/// Sequence of a row that does not exist.
const ABSENT: u32 = NO_SEQUENCE - 1;

/// Softmax state of the lane's two rows: maxima in units of log2, sums, weighted values.
#[derive(Clone, Copy)]
struct Part<const NO: usize> {
    max: [f32; 2],
    sum: [f32; 2],
    out: [FragmentF32; NO],
}

impl<const NO: usize> Part<NO> {
    const EMPTY: Part<NO> =
        Part { max: [f32::NEG_INFINITY; 2], sum: [0.0; 2], out: [FragmentF32([0.0; 4]); NO] };

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    fn merge(&mut self, part: &Part<NO>) {
        let mut weights = [[0.0; 2]; 2];
        unroll!(R in 0..2 {
            (self.max[R], weights[R]) = state::weights(self.max[R], part.max[R]);
        });
        unroll!(R in 0..2 {
            self.sum[R] = state::merge(self.sum[R], part.sum[R], weights[R]);
        });
        let mut n = 0;
        while n < NO {
            unroll!(I in 0..4 {
                self.out[n].0[I] = state::merge(self.out[n].0[I], part.out[n].0[I], weights[I / 2]);
            });
            n += 1;
        }
    }
}

/// The kernel: `KS` steps of 16 in a key row; a warp has `NS` columns of 8 scores and `NO` of outputs; `SHARERS` warps
/// share rows, of which there are `GROUPS` times 16.
pub(super) struct Attention<
    C,
    const ASYNC: bool,
    const KS: usize,
    const NS: usize,
    const NO: usize,
    const SHARERS: usize,
    const GROUPS: usize,
>(core::marker::PhantomData<C>);

impl<
    C: Class,
    const ASYNC: bool,
    const KS: usize,
    const NS: usize,
    const NO: usize,
    const SHARERS: usize,
    const GROUPS: usize,
> Attention<C, ASYNC, KS, NS, NO, SHARERS, GROUPS>
{
    const TILE: Tile = Tile::new(C::PLANES, ASYNC, [KS, NS, NO], [SHARERS, GROUPS]);
    const LAYOUT: Layout = Self::TILE.layout();
    const BLOCK: u32 = Self::TILE.block as u32;
    const THREADS: u32 = 32 * (SHARERS * GROUPS) as u32;
    const TILE_ROWS: u32 = Self::TILE.rows() as u32;
    const N_BLOCKS: u32 = (SPAN / Self::TILE.block) as u32;

    #[inline(always)]
    fn smem() -> Smem<U32x4> {
        Smem::dynamic(0, Self::LAYOUT.end as u32)
    }

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

    /// The tile of K (0) or V (1) of a stage.
    #[inline(always)]
    fn store(part: usize, stage: u32) -> Store {
        let units = (Self::TILE.dims[part] / 8) as u32;
        let plane = Self::BLOCK * units;
        let start = if part == 0 { Self::LAYOUT.k } else { Self::LAYOUT.v } as u32;
        Store { rows: Self::smem(), start: start + stage * plane * C::PLANES as u32, plane, units }
    }

    /// The queries in shared memory, for good or until they are in registers.
    #[inline(always)]
    fn queries() -> Store {
        let units = 2 * KS as u32;
        Store { rows: Self::smem(), start: Self::LAYOUT.q as u32, plane: Self::TILE_ROWS * units, units }
    }

    /// Waits for the warps that share this warp's rows.
    #[inline(always)]
    #[track_caller]
    fn sync_sharers(row_group: u32) {
        if GROUPS == 1 {
            sync::sync_threads();
        } else {
            sync::barrier_of(1 + row_group, 32 * SHARERS as u32);
        }
    }

    /// A row of the tile as (token, head) in one number: its row of `q` and of `out`.
    #[inline(always)]
    fn head_row(x: &Inputs, span: Span, row: u32) -> usize {
        let group = x.n_head / x.n_head_kv;
        let (token, head) = ((span.first + row) / group, (span.first + row) % group);
        token as usize * x.n_head as usize + (thread::block_idx_y() * group + head) as usize
    }

    /// Step `step` of a plane of the queries as A, out of shared memory.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    fn query(plane: u32, step: usize, lane: u32, row_group: u32) -> FragmentA {
        let queries = Self::queries();
        let at = queries.at(16 * row_group + lane % 16, 2 * step as u32 + lane / 16);
        FragmentA(mma::load_x4(queries.rows, plane * queries.plane + at))
    }

    /// Starts (or, if not asynchronous, does) the copy of a block of K and V.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    fn load(x: &Inputs, page: u32, block: u32, len: u32, stage: u32) {
        let first = block * Self::BLOCK;
        let n_valid = len.saturating_sub(first);
        let row = (page as usize * x.n_head_kv as usize + thread::block_idx_y() as usize) * PAGE
            + (first % PAGE as u32) as usize;
        // One after the other in a loop: the code of either is long, and so is the list of its addresses.
        let parts = math::opaque(2);
        let mut part = 0;
        while part < parts {
            let of = |pair: [u32; 2]| if part == 0 { pair[0] } else { pair[1] };
            let [k, v] = [Self::store(0, stage), Self::store(1, stage)];
            let (from, to) = if part == 0 { (x.k, k) } else { (x.v, v) };
            let from = from.offset(row * of(x.row_bytes) as usize);
            if ASYNC {
                store::copy(from, to, Self::BLOCK, n_valid, of(x.head_dim), Self::THREADS);
            } else {
                store::fill::<C>(of(x.format), from, to, Self::BLOCK, n_valid, of(x.head_dim), Self::THREADS);
            }
            part += 1;
        }
    }

    /// Zeros in the columns of a tile that the head does not have; no block's copy touches them.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    fn pad(to: Store, n_rows: u32, head_dim: u32) {
        let (given, pad) = (head_dim / 8, to.units - head_dim / 8);
        let mut i = thread::thread_idx_x();
        while i < n_rows * pad {
            let at = to.at(i / pad, given + i % pad);
            to.rows.st(at, U32x4([0; 4]));
            if C::PLANES == 2 {
                to.rows.st(to.plane + at, U32x4([0; 4]));
            }
            i += Self::THREADS;
        }
    }

    /// `s = q · k` for this warp's columns of a block.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    fn scores(q: &[FragmentA; KS], keys: Store, lane: u32, row_group: u32, sharer: u32) -> [FragmentF32; NS] {
        let mut s = [FragmentF32::default(); NS];
        let mut step = 0;
        while step < KS {
            let mut a = [[FragmentA::default(); 2]; 2];
            unroll!(I in 0..2 {
                if Self::TILE.q_in_registers() {
                    a[I][0] = q[step + I];
                } else {
                    a[I][0] = Self::query(0, step + I, lane, row_group);
                    if C::PLANES == 2 {
                        a[I][1] = Self::query(1, step + I, lane, row_group);
                    }
                }
            });
            let mut n = 0;
            while n < NS {
                let at = keys.at(8 * (sharer * NS as u32 + n as u32) + lane % 8, 2 * step as u32 + lane / 8);
                let first = mma::load_x4(keys.rows, at);
                let mut second = [0; 4];
                if C::PLANES == 2 {
                    second = mma::load_x4(keys.rows, keys.plane + at);
                }
                unroll!(I in 0..2 {
                    let b = [[first[2 * I], first[2 * I + 1]], [second[2 * I], second[2 * I + 1]]];
                    C::product(&mut s[n], &a[I], b.map(FragmentB));
                });
                n += 1;
            }
            step += 2;
        }
        s
    }

    /// The largest score of each of the lane's two rows, over all warps that share them.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    fn maxima(s: &[FragmentF32; NS], lane: u32, row_group: u32, sharer: u32) -> [f32; 2] {
        let mut max = [f32::NEG_INFINITY; 2];
        let mut n = 0;
        while n < NS {
            unroll!(R in 0..2 {
                max[R] = math::fmax(max[R], math::fmax(s[n].0[2 * R], s[n].0[2 * R + 1]));
            });
            n += 1;
        }
        unroll!(R in 0..2 {
            unroll!(I in 0..2 {
                max[R] = math::fmax(max[R], f32::from_bits(warp::shfl_xor(max[R].to_bits(), 1 << I)));
            });
        });
        if SHARERS == 1 {
            return max;
        }
        let table = Smem::<f32>::dynamic(16 * Self::LAYOUT.maxima as u32, SHARERS as u32 * Self::TILE_ROWS);
        let at = |sharer: u32, r: u32| sharer * Self::TILE_ROWS + 16 * row_group + 8 * r + lane / 4;
        if lane.is_multiple_of(4) {
            unroll!(R in 0..2 {
                table.st(at(sharer, R as u32), max[R]);
            });
        }
        Self::sync_sharers(row_group);
        let mut other = 0;
        while other < SHARERS as u32 {
            unroll!(R in 0..2 {
                max[R] = math::fmax(max[R], table.ld(at(other, R as u32)));
            });
            other += 1;
        }
        max
    }

    /// Unit `c` of row `r` of the tile of probabilities, whose rows are shorter than the banks.
    #[inline(always)]
    fn probability_at(r: u32, c: u32) -> u32 {
        let units = Self::BLOCK / 8;
        let turn = if units >= 8 { r & 7 } else { (r / (8 / units)) & (units - 1) };
        Self::LAYOUT.p as u32 + r * units + (c ^ turn)
    }

    /// Shares the warp's columns of probabilities with the others.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    fn share(p: &[[[u32; 2]; 2]; NS], lane: u32, row_group: u32, sharer: u32) {
        let words = Smem::<u32>::dynamic(0, 4 * Self::LAYOUT.end as u32);
        let plane = Self::TILE_ROWS * Self::BLOCK / 8;
        let mut n = 0;
        while n < NS {
            unroll!(R in 0..2 {
                let row = 16 * row_group + 8 * R as u32 + lane / 4;
                let at = Self::probability_at(row, sharer * NS as u32 + n as u32);
                words.st(4 * at + lane % 4, p[n][R][0]);
                if C::PLANES == 2 {
                    words.st(4 * (at + plane) + lane % 4, p[n][R][1]);
                }
            });
            n += 1;
        }
        Self::sync_sharers(row_group);
    }

    /// Step `step` of the probabilities as A; `p` the warp's own, used where it has all.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    fn probabilities(p: &[[[u32; 2]; 2]; NS], step: usize, lane: u32, row_group: u32) -> [FragmentA; 2] {
        let mut a = [FragmentA::default(); 2];
        if SHARERS == 1 {
            unroll!(PLANE in 0..2 {
                let (low, high) = (&p[2 * step], &p[2 * step + 1]);
                a[PLANE] = FragmentA([low[0][PLANE], low[1][PLANE], high[0][PLANE], high[1][PLANE]]);
            });
        } else {
            let at = Self::probability_at(16 * row_group + lane % 16, 2 * step as u32 + lane / 16);
            a[0] = FragmentA(mma::load_x4(Self::smem(), at));
            if C::PLANES == 2 {
                let plane = Self::TILE_ROWS * Self::BLOCK / 8;
                a[1] = FragmentA(mma::load_x4(Self::smem(), at + plane));
            }
        }
        a
    }

    /// Scores with soft cap and slopes; `row` is the lane's first, `first` the position of the warp's first column.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    fn transform(x: &Inputs, s: &mut [FragmentF32; NS], lane: u32, row: u32, first: u32) {
        let mut n = 0;
        while n < NS {
            unroll!(I in 0..4 {
                s[n].0[I] *= x.scale;
            });
            n += 1;
        }
        if x.softcap != 0.0 {
            let mut n = 0;
            while n < NS {
                unroll!(I in 0..4 {
                    s[n].0[I] = x.softcap * math::tanh(s[n].0[I]);
                });
                n += 1;
            }
        }
        if x.slopes.is_null() {
            return;
        }
        let group = x.n_head / x.n_head_kv;
        unroll!(R in 0..2 {
            let row = row + 8 * R as u32;
            // Rows that are not there take the tile's first.
            let tile = Self::tile(x);
            let flat = tile.first + if row < tile.n { row } else { 0 };
            let slope = x.slopes.ld_nc(thread::block_idx_y() * group + flat % group);
            let pos = x.positions.ld_early(flat / group) as f32;
            let mut n = 0;
            while n < NS {
                unroll!(I in 0..2 {
                    let column = first + 8 * n as u32 + 2 * (lane % 4) + I as u32;
                    let distance = math::fabs(pos - column as f32);
                    s[n].0[2 * R + I] = math::fma(-slope, distance, s[n].0[2 * R + I]);
                });
                n += 1;
            }
        });
    }

    /// One block of positions from `first` on: the state of the lane's rows in the span goes on.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    fn block(x: &Inputs, q: &[FragmentA; KS], masked: bool, part: &mut Part<NO>, first: u32, stage: u32) {
        // Computed anew for each block: addresses that stayed in registers would be more than there are.
        let thread = math::fresh(thread::thread_idx_x());
        let (lane, row_group, sharer) =
            (thread % 32, thread / 32 / SHARERS as u32, thread / 32 % SHARERS as u32);
        let row = |r: usize| 16 * row_group + 8 * r as u32 + lane / 4;
        let mut s = Self::scores(q, Self::store(0, stage), lane, row_group, sharer);
        let mut to_log2 = x.scale;
        if x.flags & TRANSFORM != 0 {
            to_log2 = math::LOG2_E;
            Self::transform(x, &mut s, lane, row(0), first + 8 * sharer * NS as u32);
        }
        if masked {
            let [low, high] = [LOW, HIGH].map(|column| [0, 1].map(|r| Self::table(column).ld(row(r))));
            let mut n = 0;
            while n < NS {
                unroll!(I in 0..4 {
                    let column = first + 8 * (sharer * NS as u32 + n as u32) + 2 * (lane % 4) + I as u32 % 2;
                    if column < low[I / 2] || column >= high[I / 2] {
                        s[n].0[I] = f32::NEG_INFINITY;
                    }
                });
                n += 1;
            }
        }

        let max = Self::maxima(&s, lane, row_group, sharer);
        let mut rescale = [1.0; 2];
        let mut to = [0.0; 2];
        unroll!(R in 0..2 {
            let new = math::fmax(part.max[R], max[R] * to_log2);
            to[R] = state::finite(new);
            rescale[R] = math::ex2(part.max[R] - to[R]);
            part.max[R] = new;
        });
        let mut p = [[[0; 2]; 2]; NS];
        let mut n = 0;
        while n < NS {
            unroll!(R in 0..2 {
                let power = |v: f32| math::ex2(math::fma(v, to_log2, -to[R]));
                p[n][R] = C::pack(power(s[n].0[2 * R]), power(s[n].0[2 * R + 1]));
            });
            n += 1;
        }
        if SHARERS > 1 {
            Self::share(&p, lane, row_group, sharer);
        }
        if warp::ballot(rescale[0] != 1.0 || rescale[1] != 1.0) != 0 {
            unroll!(R in 0..2 {
                part.sum[R] *= rescale[R];
            });
            let mut n = 0;
            while n < NO {
                unroll!(I in 0..4 {
                    part.out[n].0[I] *= rescale[I / 2];
                });
                n += 1;
            }
        }

        let values = Self::store(1, stage);
        // A sum stands in every column of its row.
        let mut sum = FragmentF32([part.sum[0], part.sum[0], part.sum[1], part.sum[1]]);
        let mut step = 0;
        while step < NS * SHARERS / 2 {
            let a = Self::probabilities(&p, step, lane, row_group);
            C::sum(&mut sum, &a);
            let mut n = 0;
            while n < NO {
                let column = sharer * NO as u32 + n as u32 + lane / 16;
                let at = values.at(16 * step as u32 + lane % 16, column);
                let b = mma::load_x4_transposed(values.rows, at);
                let mut rest = [0; 4];
                if C::PLANES == 2 {
                    rest = mma::load_x4_transposed(values.rows, values.plane + at);
                }
                unroll!(I in 0..2 {
                    let b = [[b[2 * I], b[2 * I + 1]], [rest[2 * I], rest[2 * I + 1]]];
                    C::product(&mut part.out[n + I], &a, b.map(FragmentB));
                });
                n += 2;
            }
            step += 1;
        }
        part.sum = [sum.0[0], sum.0[2]];
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
        let (cta_low, cta_high) = (warp_min(cta_low), !warp_min(!cta_high));
        // What some row of the warp sees, and what all do; rows that are not there may see what they like.
        let r = 16 * (warp / SHARERS as u32) + lane % 16;
        let (low, high) = (Self::table(LOW).ld(r), Self::table(HIGH).ld(r));
        let absent = Self::table(SEQUENCE).ld(r) == ABSENT;
        let some = [warp_min(if high > 0 { low } else { u32::MAX }), !warp_min(!high)];
        let all = [!warp_min(!low), warp_min(if absent { u32::MAX } else { high })];
        let (mut block, mut end) = (cta_low / Self::BLOCK, cta_high.div_ceil(Self::BLOCK));
        if x.n_spans > 0 {
            let first = thread::block_idx_z() * Self::N_BLOCKS;
            block = if block < first { first } else { block };
            end = if end > first + Self::N_BLOCKS { first + Self::N_BLOCKS } else { end };
        }
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
            if ASYNC {
                Self::load(x, next_page, block, len, 0);
                async_copy::commit();
                if block + 1 < end {
                    next_page = page(first_page, block + 1);
                }
            }
        }
        while block < end {
            let mut part = Part::<NO>::EMPTY;
            let next = (block / Self::N_BLOCKS + 1) * Self::N_BLOCKS;
            let span_end = if next < end { next } else { end };
            while block < span_end {
                if ASYNC {
                    async_copy::wait::<0>();
                }
                sync::sync_threads();
                let walk = 2 * math::fresh(thread::warp_id());
                let U32x4([first_page, len, end, _]) = Self::views().ld(walk + 1);
                if ASYNC {
                    if block + 1 < end {
                        Self::load(x, next_page, block + 1, len, stage ^ 1);
                        async_copy::commit();
                        if block + 2 < end {
                            next_page = page(first_page, block + 2);
                        }
                    }
                } else {
                    Self::load(x, next_page, block, len, 0);
                    if block + 1 < end {
                        next_page = page(first_page, block + 1);
                    }
                    sync::sync_threads();
                }
                let first = block * Self::BLOCK;
                let U32x4([some_low, some_high, all_low, all_high]) = Self::views().ld(walk);
                if first < some_high && first + Self::BLOCK > some_low {
                    let masked = first < all_low || first + Self::BLOCK > all_high;
                    Self::block(x, q, masked, &mut part, first, stage);
                }
                block += 1;
                if ASYNC {
                    stage ^= 1;
                }
            }
            // A CTA of one span starts from nothing, and so ends with the span itself.
            total.merge(&part);
        }
    }

    /// This CTA's rows.
    #[inline(always)]
    fn tile(x: &Inputs) -> Span {
        // Computed anew where it is needed: see `block`.
        let (group, cta) = (x.n_head / x.n_head_kv, math::fresh(thread::block_idx_x()));
        let (first, end) = if x.flags & PER_TOKEN != 0 {
            let tiles = group.div_ceil(Self::TILE_ROWS);
            let token = cta / tiles;
            (token * group + cta % tiles * Self::TILE_ROWS, (token + 1) * group)
        } else {
            // The last tokens see most: they start first.
            ((thread::grid_dim_x() - 1 - cta) * Self::TILE_ROWS, x.n_tokens * group)
        };
        let left = end - first;
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

    /// Asks L2 for the first pages that the tile's token sees, a thread for each: all but the newest row lie there long
    /// before an earlier launch of the step ends.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    fn prefetch(x: &Inputs, span: Span) {
        let nth = thread::thread_idx_x();
        let token = span.first / (x.n_head / x.n_head_kv);
        let sequence = x.token_sequences.ld_early(token);
        if nth >= PREFETCH_PAGES || sequence == NO_SEQUENCE {
            return;
        }
        let pos = x.positions.ld_early(token);
        let U32x2([first_page, len]) = x.sequences.ld_early(sequence);
        let (low, high) = super::visible(pos, len, x.flags & CAUSAL != 0, x.window);
        let first = if x.n_spans > 0 { thread::block_idx_z() * SPAN as u32 } else { 0 };
        let first = if first < low { low } else { first };
        let page = first / PAGE as u32 + nth;
        if page * (PAGE as u32) < high {
            let page = x.pages.ld_early(first_page + page);
            let head = page as usize * x.n_head_kv as usize + thread::block_idx_y() as usize;
            unroll!(PART in 0..2 {
                let bytes = PAGE as u32 * x.row_bytes[PART];
                [x.k, x.v][PART].offset(head * bytes as usize).prefetch(bytes);
            });
        }
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    pub(super) fn run(x: Inputs) {
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
        if x.flags & PER_TOKEN != 0 {
            Self::prefetch(&x, span);
        }
        grid::wait_for_earlier();
        if x.n_spans > 0 {
            // A token's rows see the same: without a position in this span the CTA has nothing to do.
            sync::sync_threads();
            let (low, high) = (Self::table(ROW_LOW).ld(0), Self::table(ROW_HIGH).ld(0));
            let first = thread::block_idx_z() * SPAN as u32;
            if first >= high || first + SPAN as u32 <= low {
                return;
            }
        }

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
                if STAGE == 0 || ASYNC {
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

        // Out they go. Nothing of before is needed for it, so nothing stays in registers.
        let (thread, span) = (math::fresh(thread::thread_idx_x()), Self::tile(&x));
        let (lane, row_group, sharer) =
            (thread % 32, thread / 32 / SHARERS as u32, thread / 32 % SHARERS as u32);
        unroll!(R in 0..2 {
            let row = 16 * row_group + 8 * R as u32 + lane / 4;
            if row < span.n {
                let mut at = Self::head_row(&x, span, row);
                let (to, factor);
                if x.n_spans > 0 {
                    factor = 1.0;
                    at = at * x.n_spans as usize + thread::block_idx_z() as usize;
                    let stride = (x.head_dim[1] / 2 + 1) as usize;
                    to = x.scratch.offset(at * stride);
                    if sharer == 0 && lane.is_multiple_of(4) {
                        to.st(x.head_dim[1] / 2, F32x2([total.max[R], total.sum[R]]));
                    }
                } else {
                    factor = state::normaliser(total.max[R], total.sum[R], super::sink(x.sinks, (at % x.n_head as usize) as u32));
                    to = x.out.offset(at * (x.head_dim[1] / 2) as usize);
                }
                let mut n = 0;
                while n < NO {
                    let column = 8 * (sharer * NO as u32 + n as u32) + 2 * (lane % 4);
                    if column < x.head_dim[1] {
                        let [low, high] = [total.out[n].0[2 * R], total.out[n].0[2 * R + 1]];
                        let pair = if x.n_spans > 0 { [low, high] } else { [low * factor, high * factor] };
                        to.st(column / 2, F32x2(pair));
                    }
                    n += 1;
                }
            }
        });
    }
}

/// Entry of a tile.
#[inline(always)]
#[allow(clippy::too_many_arguments)] // a kernel's
pub(super) fn attend<
    C: Class,
    const ASYNC: bool,
    const KS: usize,
    const NS: usize,
    const NO: usize,
    const SHARERS: usize,
    const GROUPS: usize,
>(
    q: Glb<F32x2>,
    k: Glb<u8>,
    v: Glb<u8>,
    out: Glb<F32x2>,
    scratch: Glb<F32x2>,
    positions: Glb<u32>,
    token_sequences: Glb<u32>,
    sequences: Glb<U32x2>,
    pages: Glb<u32>,
    sinks: Glb<f32>,
    slopes: Glb<f32>,
    n_tokens: u32,
    n_head: u32,
    n_head_kv: u32,
    head_dim_k: u32,
    head_dim_v: u32,
    row_bytes_k: u32,
    row_bytes_v: u32,
    format_k: u32,
    format_v: u32,
    flags: u32,
    window: u32,
    scale: f32,
    softcap: f32,
    n_spans: u32,
) {
    Attention::<C, ASYNC, KS, NS, NO, SHARERS, GROUPS>::run(Inputs {
        q,
        k,
        v,
        out,
        scratch,
        positions,
        token_sequences,
        sequences,
        pages,
        sinks,
        slopes,
        n_tokens,
        n_head,
        n_head_kv,
        head_dim: [head_dim_k, head_dim_v],
        row_bytes: [row_bytes_k, row_bytes_v],
        format: [format_k, format_v],
        flags,
        window,
        scale,
        softcap,
        n_spans,
    });
}

/// Entries of a table, see `for_each_table`.
macro_rules! entries {
    ($file:literal $table:ident $prefix:literal $bounds:tt
        $($dim:literal $suffix:literal $class:ident $kind:ident $asynchronous:literal
            [$ks:literal $ns:literal $no:literal] [$sharers:literal $groups:literal];)*) => {
        kernels! {
            in $file;
            pub(super) $table: threads $bounds, early;
            fn (
                q: Glb<F32x2>, k: Glb<u8>, v: Glb<u8>, out: Glb<F32x2>, scratch: Glb<F32x2>,
                positions: Glb<u32>, token_sequences: Glb<u32>, sequences: Glb<U32x2>, pages: Glb<u32>,
                sinks: Glb<f32>, slopes: Glb<f32>,
                n_tokens: u32, n_head: u32, n_head_kv: u32, head_dim_k: u32, head_dim_v: u32,
                row_bytes_k: u32, row_bytes_v: u32, format_k: u32, format_v: u32,
                flags: u32, window: u32, scale: f32, softcap: f32, n_spans: u32,
            );
            $(concat!($prefix, $dim, "_", $suffix) =>
                attend::<$kind, $asynchronous, $ks, $ns, $no, $sharers, $groups>;)*
        }
    };
}
for_each_table!(entries);
