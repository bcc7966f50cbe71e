//! The consumers: scores, softmax, values; the results.

use super::*;
use crate::device::mma::FragmentA;
use crate::device::wgmma::{self, F16N64, F16N64T, F16N128, F16N128T, F16N256T, Registers};
use crate::kernels::flash::state;

/// Scores of a block in registers.
pub(super) trait Scores: Registers {
    fn product<const ADD: bool>(&mut self, queries: Operand, keys: Operand);
}

/// Outputs in registers.
pub(super) trait Outputs: Registers {
    fn add(&mut self, probabilities: FragmentA, values: Operand);
}

macro_rules! shapes {
    ($($trait:ident $r:literal $shape:ident;)*) => {
        $(shapes! { @ $trait $r $shape })*
    };
    (@ Scores $r:literal $shape:ident) => {
        impl Scores for Sums<$r> {
            #[inline(always)]
            #[track_caller]
            fn product<const ADD: bool>(&mut self, queries: Operand, keys: Operand) {
                $shape::shared::<ADD>(self, queries, keys);
            }
        }
    };
    (@ Outputs $r:literal $shape:ident) => {
        impl Outputs for Sums<$r> {
            #[inline(always)]
            #[track_caller]
            fn add(&mut self, probabilities: FragmentA, values: Operand) {
                $shape::registers::<true>(self, probabilities, values);
            }
        }
    };
}
shapes! {
    Scores 32 F16N64;
    Scores 64 F16N128;
    Outputs 32 F16N64T;
    Outputs 64 F16N128T;
    Outputs 128 F16N256T;
}

/// [`math::tanh`] without a branch: products are under way.
#[inline(always)]
fn tanh(x: f32) -> f32 {
    let square = x * x;
    let above = math::fma(square, square + 105.0, 945.0);
    let below = math::fma(square, math::fma(square, 15.0, 420.0), 945.0);
    let near = math::fabs(x) < 0.6;
    let power = 1.0 + math::ex2(2.0 * math::LOG2_E * math::fabs(x));
    let fraction = math::rcp(if near { below } else { power });
    let far = f32::copysign(math::fma(-2.0, fraction, 1.0), x);
    if near { x * above * fraction } else { far }
}

/// A lane's two rows: maxima in units of log2; sums of even and odd columns.
#[derive(Clone, Copy)]
struct State {
    max: [f32; 2],
    sum: [[f32; 2]; 2],
}

impl<
    const KC: usize,
    const S: usize,
    const O: usize,
    const STEPS: usize,
    const STAGES: usize,
    const PIECE: usize,
    const PIECES: usize,
> Hopper<KC, S, O, STEPS, STAGES, PIECE, PIECES>
where
    Sums<S>: Scores,
    Sums<O>: Outputs,
{
    /// Called by a consumer warp that has read K (0) or V (1) of a stage.
    #[inline(always)]
    #[track_caller]
    fn release(part: usize, place: Place) {
        warp::sync_warp();
        if thread::lane_id() == 0 {
            Self::empty(part, place).arrive();
        }
    }

    /// Queries of a warpgroup's rows into shared memory. `thread` of the group.
    #[inline(always)]
    #[track_caller]
    fn queries(x: &Inputs, group: u32, thread: u32) {
        let (tile, units) = (x.tile(), Self::UNITS[0]);
        let (pass, first, c) = (128 / units, thread / units, thread % units);
        let chunks = Self::chunks().skip(group * GROUP_ROWS * units);
        let mut r = first;
        while r < math::opaque(GROUP_ROWS) {
            // Four rows at a time, all loaded before one is stored.
            let mut values = [[F32x4([0.0; 4]); 2]; 4];
            unroll!(I in 0..4 {
                let row = GROUP_ROWS * group + r + I as u32 * pass;
                if row < tile.n && 8 * c < x.head_dim[0] {
                    let from = x.q.offset(x.head_row(tile, row) * (x.head_dim[0] / 4) as usize);
                    values[I] = [from.ld_nc(2 * c), from.ld_nc(2 * c + 1)];
                }
            });
            unroll!(I in 0..4 {
                let [F32x4(a), F32x4(b)] = values[I];
                let words = [
                    math::pack_f16(a[0], a[1]),
                    math::pack_f16(a[2], a[3]),
                    math::pack_f16(b[0], b[1]),
                    math::pack_f16(b[2], b[3]),
                ];
                chunks.st(place(GROUP_ROWS, r + I as u32 * pass, c), U32x4(words));
            });
            r += 4 * pass;
        }
    }

    /// Starts `s = q · k`.
    #[inline(always)]
    #[track_caller]
    fn scores(s: &mut Sums<S>, group: u32, place: Place) {
        let queries = Operand::at(Self::chunks(), group * GROUP_ROWS * Self::UNITS[0]);
        let keys = Operand::at(Self::chunks(), Self::stage(0, place.slot));
        let mut step = 0;
        while step < 4 * KC as u32 {
            let (piece, chunk) = (step / 4, 2 * (step % 4));
            let queries = queries.skip(piece * GROUP_ROWS * 8 + chunk);
            let keys = keys.skip(piece * Self::BLOCK * 8 + chunk);
            if step == 0 {
                s.product::<false>(queries, keys);
            } else {
                s.product::<true>(queries, keys);
            }
            step += 1;
        }
        wgmma::commit();
    }

    /// Starts `out += p · v`.
    #[inline(always)]
    #[track_caller]
    fn values(out: &mut Sums<O>, p: &[FragmentA; STEPS], place: Place) {
        let values = Operand::transposed(Self::chunks(), Self::stage(1, place.slot), Self::BLOCK * 8);
        let mut step = 0;
        while step < STEPS {
            out.add(p[step], values.skip(16 * 8 * step as u32));
            step += 1;
        }
        wgmma::commit();
    }

    /// Scores with scale and soft cap.
    #[inline(always)]
    #[track_caller]
    fn cap(x: &Inputs, s: &mut Sums<S>) {
        let mut n = 0;
        while n < S {
            let score = f32::from_bits(s.get(n)) * x.scale;
            s.set(n, (x.softcap * tanh(score)).to_bits());
            n += 1;
        }
    }

    /// Scores become probabilities, in place; the state goes on. Returns what outputs so far are to be multiplied by.
    /// `seen`: what each of the lane's rows sees, for a block that is `masked`.
    #[inline(always)]
    #[track_caller]
    fn softmax(
        x: &Inputs,
        s: &mut Sums<S>,
        state: &mut State,
        masked: bool,
        seen: [[u32; 2]; 2],
        first: u32,
    ) -> [f32; 2] {
        let mut to_log2 = x.scale;
        if x.softcap != 0.0 {
            to_log2 = math::LOG2_E;
            Self::cap(x, s);
        }
        if masked {
            // From the lane's first column on, so that the others are constants.
            let from = (first + 2 * (thread::lane_id() % 4)) as i32;
            let seen = seen.map(|[low, high]| [low as i32 - from, high as i32 - from]);
            let mut n = 0;
            while n < S / 4 {
                unroll!(I in 0..4 {
                    let column = 8 * n as i32 + I as i32 % 2;
                    let hidden = column < seen[I / 2][0] || column >= seen[I / 2][1];
                    let score = if hidden { f32::NEG_INFINITY.to_bits() } else { s.get(4 * n + I) };
                    s.set(4 * n + I, score);
                });
                n += 1;
            }
        }
        let mut max = [f32::NEG_INFINITY; 4];
        let mut n = 0;
        while n < S / 4 {
            unroll!(I in 0..4 { max[I] = math::fmax(max[I], f32::from_bits(s.get(4 * n + I))); });
            n += 1;
        }
        let (mut rescale, mut to) = ([1.0; 2], [0.0; 2]);
        unroll!(R in 0..2 {
            let mut max = math::fmax(max[2 * R], max[2 * R + 1]);
            unroll!(I in 0..2 {
                max = math::fmax(max, f32::from_bits(warp::shfl_xor(max.to_bits(), 1 << I)));
            });
            let new = math::fmax(state.max[R], max * to_log2);
            to[R] = state::finite(new);
            rescale[R] = math::ex2(state.max[R] - to[R]);
            state.max[R] = new;
            unroll!(I in 0..2 { state.sum[R][I] *= rescale[R]; });
        });
        let mut n = 0;
        while n < S / 4 {
            unroll!(I in 0..4 {
                let score = f32::from_bits(s.get(4 * n + I));
                let power = math::ex2(math::fma(score, to_log2, -to[I / 2]));
                state.sum[I / 2][I % 2] += power;
                s.set(4 * n + I, power.to_bits());
            });
            n += 1;
        }
        rescale
    }

    /// Probabilities as A; outputs so far to the new maximum.
    #[inline(always)]
    #[track_caller]
    fn carry_over(s: &Sums<S>, out: &mut Sums<O>, rescale: [f32; 2]) -> [FragmentA; STEPS] {
        let mut n = 0;
        // Past the first blocks maxima hardly move, and a factor of one changes nothing.
        let moved = warp::ballot(rescale[0] != 1.0 || rescale[1] != 1.0) != 0;
        while moved && n < O / 4 {
            unroll!(I in 0..4 {
                let value = f32::from_bits(out.get(4 * n + I)) * rescale[I / 2];
                out.set(4 * n + I, value.to_bits());
            });
            n += 1;
        }
        let pair = |i: usize| math::pack_f16(f32::from_bits(s.get(i)), f32::from_bits(s.get(i + 1)));
        let mut p = [FragmentA::default(); STEPS];
        let mut step = 0;
        while step < STEPS {
            unroll!(I in 0..4 { p[step].0[I] = pair(8 * step + 2 * I); });
            step += 1;
        }
        p
    }

    /// What the consumers do.
    #[inline(always)]
    #[track_caller]
    pub(super) fn consume(x: &Inputs) {
        // Computed anew where they are needed: outputs and scores need the registers.
        let thread = || math::fresh(thread::thread_idx_x()) - 32 * PRODUCERS;
        let group = || thread() / 128;
        // The lane's first row in the tile.
        let row = || thread() / 32 * 16 + thread() % 32 / 4;
        Self::queries(x, group(), thread() % 128);
        sync::fence_async_proxy();
        sync::barrier_of(GROUP + group(), 128);
        // The second group says at once that the first may begin.
        let (mine, others) = (|| TURN + 1 - group(), || TURN + group());
        if group() == 1 {
            sync::barrier_arrive_of(others(), 256);
        }
        let mut out = Sums::<O>::zero();
        let mut state = State { max: [f32::NEG_INFINITY; 2], sum: [[0.0; 2]; 2] };
        let mut place = Self::FIRST;
        let mut first = 0;
        while first < x.tile().n {
            let run = Self::run(x, first);
            first = run.rows[1];
            if run.block == run.end {
                continue;
            }
            // What the lane's rows see; what all of the group's rows do, those that are not there aside.
            let see = |row: u32| {
                let U32x4([sequence, low, high, _]) = Self::rows().ld(row);
                let inside = row >= run.rows[0] && row < run.rows[1];
                (sequence, if inside { [low, high] } else { [0, 0] })
            };
            let seen = [see(row()).1, see(row() + 8).1];
            let (mut all_low, mut all_high) = (0, u32::MAX);
            unroll!(I in 0..2 {
                let (sequence, [low, high]) = see(GROUP_ROWS * group() + 32 * I as u32 + thread::lane_id());
                let high = if sequence == ABSENT { u32::MAX } else { high };
                all_low = if low > all_low { low } else { all_low };
                all_high = if high < all_high { high } else { all_high };
            });
            let (all_low, all_high) = (!warp::min_u32(!all_low), warp::min_u32(all_high));
            let is_masked = |first: u32| first < all_low || first + Self::BLOCK > all_high;

            let mut s = Sums::<S>::zero();
            Self::full(0, place).wait(place.parity);
            wgmma::fence();
            Self::scores(&mut s, group(), place);
            s.wait::<0>();
            Self::release(0, place);
            let at = run.block * Self::BLOCK;
            let rescale = Self::softmax(x, &mut s, &mut state, is_masked(at), seen, at);
            let mut p = Self::carry_over(&s, &mut out, rescale);
            let mut block = run.block + 1;
            while block < run.end {
                let next = Self::next(place);
                Self::full(0, next).wait(next.parity);
                Self::full(1, place).wait(place.parity);
                sync::barrier_of(mine(), 256);
                wgmma::fence();
                Self::scores(&mut s, group(), next);
                Self::values(&mut out, &p, place);
                sync::barrier_arrive_of(others(), 256);
                s.wait::<1>();
                Self::release(0, next);
                let at = block * Self::BLOCK;
                let rescale = Self::softmax(x, &mut s, &mut state, is_masked(at), seen, at);
                out.wait::<0>();
                Self::release(1, place);
                p = Self::carry_over(&s, &mut out, rescale);
                place = next;
                block += 1;
            }
            Self::full(1, place).wait(place.parity);
            wgmma::fence();
            Self::values(&mut out, &p, place);
            out.wait::<0>();
            Self::release(1, place);
            place = Self::next(place);
        }
        if group() == 0 {
            sync::barrier_of(mine(), 256);
        }
        Self::store(x, &out, &state);
    }

    /// Out they go.
    #[inline(always)]
    #[track_caller]
    fn store(x: &Inputs, out: &Sums<O>, state: &State) {
        let (tile, thread) = (x.tile(), math::fresh(thread::thread_idx_x()) - 32 * PRODUCERS);
        let row = thread / 32 * 16 + thread % 32 / 4;
        unroll!(R in 0..2 {
            let mut sum = state.sum[R][0] + state.sum[R][1];
            unroll!(I in 0..2 { sum += f32::from_bits(warp::shfl_xor(sum.to_bits(), 1 << I)); });
            let row = row + 8 * R as u32;
            if row < tile.n {
                let [token, head] = x.place(tile, row);
                let at = token as usize * x.n_head as usize + head as usize;
                let sink = crate::kernels::flash::sink(x.sinks, head);
                let factor = state::normaliser(state.max[R], sum, sink);
                let to = x.out.offset(at * (x.head_dim[1] / 2) as usize);
                let mut n = 0;
                while n < O / 4 {
                    let column = 8 * n as u32 + 2 * (thread % 4);
                    if column < x.head_dim[1] {
                        let [low, high] = [0, 1].map(|i| f32::from_bits(out.get(4 * n + 2 * R + i)));
                        to.st(column / 2, F32x2([low * factor, high * factor]));
                    }
                    n += 1;
                }
            }
        });
    }
}
