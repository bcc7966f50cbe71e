//! One block of positions against one tile of rows: what `decode` and `prefill` share, so that their bits agree.

use super::results::Results;
use super::store::{self, Class, Raw, Store};
use super::{Layout, PAGE, SPAN, TRANSFORM, Tile, state};
use crate::device::mma::{self, FragmentA, FragmentB, FragmentF32};
use crate::device::{F32x2, Glb, Smem, U32x2, U32x4, math, sync, thread, warp};

/// The launch's arguments, as the contract names them.
#[derive(Clone, Copy)]
pub(super) struct Inputs {
    pub(super) q: Glb<F32x2>,
    pub(super) k: Glb<u8>,
    pub(super) v: Glb<u8>,
    pub(super) out: Glb<F32x2>,
    /// Absent: `out` holds floats.
    pub(super) scales: Glb<U32x2>,
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
    /// Spans that `scratch` has room for per row; 0: a CTA takes all of a row's spans and needs none.
    pub(super) n_spans: u32,
    /// The token's own key and value, where they are not in the cache yet.
    pub(super) appended: Appended,
}

impl Inputs {
    /// What becomes of results.
    #[inline(always)]
    pub(super) fn results(&self) -> Results {
        Results { out: self.out.cast(), scales: self.scales, head_dim: self.head_dim[1], flags: self.flags }
    }
}

/// What a decode that appends does beside: see `append`.
#[derive(Clone, Copy)]
pub(super) struct Appended {
    pub(super) k: Glb<F32x2>,
    pub(super) v: Glb<F32x2>,
    pub(super) cells: Glb<u32>,
    /// Absent: nothing is appended.
    pub(super) angles: Glb<F32x2>,
}

/// Softmax state of the lane's two rows: maxima in units of log2, sums, weighted values.
#[derive(Clone, Copy)]
pub(super) struct Part<const NO: usize> {
    pub(super) max: [f32; 2],
    pub(super) sum: [f32; 2],
    pub(super) out: [FragmentF32; NO],
}

impl<const NO: usize> Part<NO> {
    pub(super) const EMPTY: Part<NO> =
        Part { max: [f32::NEG_INFINITY; 2], sum: [0.0; 2], out: [FragmentF32([0.0; 4]); NO] };

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    pub(super) fn merge(&mut self, part: &Part<NO>) {
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

/// The kernel: `STAGES` blocks in shared memory; `KS` steps of 16 in a key row; a warp has `NS` columns of 8 scores and
/// `NO` of outputs; `SHARERS` warps share rows, of which there are `GROUPS` times 16.
pub(super) struct Attention<
    C,
    const STAGES: usize,
    const KS: usize,
    const NS: usize,
    const NO: usize,
    const SHARERS: usize,
    const GROUPS: usize,
>(core::marker::PhantomData<C>);

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
    pub(super) const TILE: Tile = Tile::new(C::KEPT, STAGES, [KS, NS, NO], [SHARERS, GROUPS]);
    pub(super) const LAYOUT: Layout = Self::TILE.layout();
    /// Whether blocks are unpacked from shared memory.
    pub(super) const UNPACKS: bool = Self::TILE.unpacks;
    /// Whether blocks are copied ahead.
    pub(super) const ASYNC: bool = STAGES > 1 || Self::UNPACKS;
    pub(super) const BLOCK: u32 = Self::TILE.block as u32;
    pub(super) const THREADS: u32 = 32 * (SHARERS * GROUPS) as u32;
    pub(super) const TILE_ROWS: u32 = Self::TILE.rows() as u32;
    /// Whether copies go by [`store::copy_in_passes`]; a prefill has no registers for it.
    const IN_PASSES: bool = STAGES > 1
        && Self::TILE.per_token()
        && Self::THREADS.is_multiple_of(Self::TILE.dims[0] as u32)
        && Self::THREADS.is_multiple_of(Self::TILE.dims[1] as u32);
    /// Blocks of a span.
    pub(super) const N_BLOCKS: u32 = (SPAN / Self::TILE.block) as u32;

    #[inline(always)]
    fn smem() -> Smem<U32x4> {
        Smem::dynamic(0, Self::LAYOUT.end as u32)
    }

    /// The tile of K (0) or V (1) of a stage.
    #[inline(always)]
    pub(super) fn store(part: usize, stage: u32) -> Store {
        let units = (Self::TILE.dims[part] / 8) as u32;
        let plane = Self::BLOCK * units;
        let start = if part == 0 { Self::LAYOUT.k } else { Self::LAYOUT.v } as u32;
        Store { rows: Self::smem(), start: start + stage * plane * C::PLANES as u32, plane, units }
    }

    /// A block of K (0) or V (1) as the cache has it.
    #[inline(always)]
    #[track_caller]
    fn raw(x: &Inputs, part: usize, nth: u32) -> Raw {
        let [k, v] = x.row_bytes.map(|bytes| Self::BLOCK * bytes);
        let blocks =
            Smem::dynamic(16 * Self::LAYOUT.end as u32, Self::TILE.raw_blocks(x.row_bytes) * (k + v) / 4);
        let words = blocks.skip((nth * (k + v) + if part == 0 { 0 } else { k }) / 4);
        Raw { words, row_bytes: x.row_bytes[part] }
    }

    /// Unpacks a block of K and V, whose copy has arrived, into the tile of stage `stage`.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    pub(super) fn unpack(x: &Inputs, nth: u32, stage: u32) {
        const {
            let [k, v] = Self::TILE.dims;
            let [k, v] = [Raw::pass_threads(k as u32 / 8), Raw::pass_threads(v as u32 / 8)];
            assert!(!Self::UNPACKS || Self::THREADS.is_multiple_of(k) && Self::THREADS.is_multiple_of(v));
        };
        let parts = math::opaque(2);
        let mut part = 0;
        while part < parts {
            let of = |pair: [u32; 2]| if part == 0 { pair[0] } else { pair[1] };
            let [raw_k, raw_v] = [Self::raw(x, 0, nth), Self::raw(x, 1, nth)];
            let [k, v] = [Self::store(0, stage), Self::store(1, stage)];
            let (from, to) = if part == 0 { (raw_k, k) } else { (raw_v, v) };
            from.unpack(of(x.format), &to, Self::BLOCK, of(x.head_dim), Self::THREADS);
            part += 1;
        }
    }

    /// The queries in shared memory, for good or until they are in registers.
    #[inline(always)]
    pub(super) fn queries() -> Store {
        let units = 2 * KS as u32;
        Store { rows: Self::smem(), start: Self::LAYOUT.q as u32, plane: Self::TILE_ROWS * units, units }
    }

    /// Waits for the warps that share this warp's rows.
    #[inline(always)]
    #[track_caller]
    pub(super) fn sync_sharers(row_group: u32) {
        if GROUPS == 1 {
            sync::sync_threads();
        } else {
            sync::barrier_of(1 + row_group, 32 * SHARERS as u32);
        }
    }

    /// Step `step` of a plane of the queries as A, out of shared memory.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    pub(super) fn query(plane: u32, step: usize, lane: u32, row_group: u32) -> FragmentA {
        let queries = Self::queries();
        let at = queries.at(16 * row_group + lane % 16, 2 * step as u32 + lane / 16);
        FragmentA(mma::load_x4(queries.rows, plane * queries.plane + at))
    }

    /// Starts (or, if not asynchronous, does) the copy of a block of K and V to a stage, of those that are unpacked or not.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    pub(super) fn load(x: &Inputs, kv_head: u32, page: u32, block: u32, len: u32, stage: u32) {
        let first = block * Self::BLOCK;
        let n_valid = len.saturating_sub(first);
        let row =
            (page as usize * x.n_head_kv as usize + kv_head as usize) * PAGE + (first % PAGE as u32) as usize;
        let from = |part: usize| [x.k, x.v][part].offset(row * x.row_bytes[part] as usize);
        if Self::IN_PASSES {
            unroll!(PART in 0..2 {
                let to = Self::store(PART, stage);
                store::copy_in_passes(from(PART), to, Self::BLOCK, n_valid, x.head_dim[PART], Self::THREADS);
            });
            return;
        }
        if Self::UNPACKS {
            unroll!(PART in 0..2 {
                Self::raw(x, PART, stage).copy(from(PART), Self::BLOCK, n_valid, Self::THREADS);
            });
            return;
        }
        // One after the other in a loop: the code of either is long, and so is the list of its addresses.
        let parts = math::opaque(2);
        let mut part = 0;
        while part < parts {
            let of = |pair: [u32; 2]| if part == 0 { pair[0] } else { pair[1] };
            let [k, v] = [Self::store(0, stage), Self::store(1, stage)];
            let (from, to) = if part == 0 { (from(0), k) } else { (from(1), v) };
            if Self::ASYNC {
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
    pub(super) fn pad(to: Store, n_rows: u32, head_dim: u32) {
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
    /// `place` as of [`Self::block`].
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    fn transform(
        x: &Inputs,
        s: &mut [FragmentF32; NS],
        lane: u32,
        row: u32,
        first: u32,
        place: impl Fn(u32) -> [u32; 2],
    ) {
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
        unroll!(R in 0..2 {
            let [token, head] = place(row + 8 * R as u32);
            let slope = x.slopes.ld_nc(head);
            let pos = x.positions.ld_early(token) as f32;
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

    /// One block of positions from `first` on: the state of the lane's rows in the span goes on. `limits` of a row: its
    /// first visible position and the one after the last, for a block that is `masked`; `place`: its token and head, of any
    /// of the tile's where it does not exist.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    pub(super) fn block(
        x: &Inputs,
        q: &[FragmentA; KS],
        masked: bool,
        limits: impl Fn(u32) -> [u32; 2],
        place: impl Fn(u32) -> [u32; 2],
        part: &mut Part<NO>,
        first: u32,
        stage: u32,
    ) {
        // Computed anew for each block: addresses that stayed in registers would be more than there are.
        let thread = math::fresh(thread::thread_idx_x());
        let (lane, row_group, sharer) =
            (thread % 32, thread / 32 / SHARERS as u32, thread / 32 % SHARERS as u32);
        let row = |r: usize| 16 * row_group + 8 * r as u32 + lane / 4;
        let mut s = Self::scores(q, Self::store(0, stage), lane, row_group, sharer);
        let mut to_log2 = x.scale;
        if x.flags & TRANSFORM != 0 {
            to_log2 = math::LOG2_E;
            Self::transform(x, &mut s, lane, row(0), first + 8 * sharer * NS as u32, place);
        }
        if masked {
            let seen = [0, 1].map(|r| limits(row(r)));
            let mut n = 0;
            while n < NS {
                unroll!(I in 0..4 {
                    let column = first + 8 * (sharer * NS as u32 + n as u32) + 2 * (lane % 4) + I as u32 % 2;
                    if column < seen[I / 2][0] || column >= seen[I / 2][1] {
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
}
