//! A token per row of logits: penalties, then top-k → top-p → min-p → temperature → draw, as the engine's sampler does it.
//!
//! * `penalise`: logits of recent tokens, in place: a positive one is divided by `repeat`, another multiplied; then
//!   `frequency` is subtracted for each time the token occurred and `presence` once.
//! * `draw`: takes each row's candidates sorted, likeliest first ([`launch`] sorts them with [`top_k`](super::top_k) or
//!   [`argsort`](super::argsort)), and picks one. Temperature 0 or less takes the first.
//! * Shapes: `logits` [n_rows, n_vocab] f32; `params` `[n_rows]` of [`RowParams`], 16-byte aligned; `states` [n_rows, 4] u64,
//!   8-byte aligned, random generators that each draw moves on; `tokens` `[n_rows]` i32; `scratch` of [`scratch_bytes`],
//!   8-byte aligned; `recent` [n_rows, n_recent] i32, negative where there is none. Nothing overlaps.
//! * Geometry: a CTA per row; a thread has candidates that follow each other. Penalties: a thread per recent token.
//! * Bytes: 4 per logit. FLOPs: two exponentials per candidate.
//! * Equal to the CPU's sampler: penalties, weights and the random number bit for bit. Sums of weights are f64 in another
//!   order, so a token may differ only where a limit or a draw lies within 2^-50 of a boundary.
//! * Tolerance: exact in that sense; the cases' tokens are the reference's.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

/// Most threads of a row: with 1024 the draw spills on sm_90a.
const THREADS: u32 = 512;
const PENALTY_THREADS: u32 = 128;

/// How a row is sampled: one 16-byte load.
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(16))]
pub struct RowParams {
    /// Temperature; 0 or less takes the likeliest.
    pub temp: f32,
    /// Keep this many of the likeliest; 0 = all that were sorted.
    pub top_k: u32,
    /// Keep the likeliest until their probabilities sum to this; 1 = all.
    pub top_p: f32,
    /// Logarithm of: keep what is at least this fraction as likely as the likeliest; −∞ = all.
    pub log_min_p: f32,
}

smem! {
    struct Shared {
        /// A sum of weights per warp, f64 bits.
        sums: [u64; 32],
        /// A smallest index per warp.
        firsts: [u32; 32],
    }
}

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod gpu {
    use super::Shared;
    use crate::device::sync::sync_threads;
    use crate::device::{F32x4, Glb, U32x4, math, thread, warp};

    /// `e^x` for x <= 0 by the very operations of libm's `expf` (FreeBSD's `e_expf.c`), which the CPU's sampler calls:
    /// weights must be equal bit for bit. No product fuses with a sum.
    #[inline(always)]
    pub(super) fn exp(x: f32) -> f32 {
        const LN_2: [f32; 2] = [f32::from_bits(0x3f31_7200), f32::from_bits(0x35bf_be8e)];
        const TERMS: [f32; 2] = [f32::from_bits(0x3e2a_aa8f), f32::from_bits(0xbb35_5215)];
        if x.is_nan() {
            return x;
        }
        // Below, the least positive float is nearer to 0.
        if x <= f32::from_bits(0xc2cf_f1b5) {
            return 0.0;
        }
        let size = x.to_bits() & 0x7fff_ffff;
        if size <= 0x3900_0000 {
            return 1.0 + x;
        }
        // x = -halvings · ln 2 + (high − low), small.
        let halvings = if size > 0x3f85_1592 {
            (0.5 - math::mul(core::f32::consts::LOG2_E, x)) as i32
        } else {
            i32::from(size > 0x3eb1_7218)
        };
        let count = halvings as f32;
        let (high, low) = (x + math::mul(count, LN_2[0]), math::mul(-count, LN_2[1]));
        let r = high - low;
        let square = math::mul(r, r);
        let c = r - math::mul(square, TERMS[0] + math::mul(square, TERMS[1]));
        let y = 1.0 + (math::mul(r, c) / (2.0 - c) - low + high);
        // Two factors where one would be subnormal; the first product is exact.
        let power = |n: i32| f32::from_bits(((127 - n) as u32) << 23);
        if halvings > 126 {
            math::mul(math::mul(y, power(102)), power(halvings - 102))
        } else {
            math::mul(y, power(halvings))
        }
    }

    /// The lane's `value` moved up a lane, or by more.
    #[inline(always)]
    #[track_caller]
    fn shfl_up(value: f64, delta: u32) -> f64 {
        let bits = value.to_bits();
        let (low, high) = (warp::shfl_up(bits as u32, delta), warp::shfl_up((bits >> 32) as u32, delta));
        f64::from_bits(u64::from(high) << 32 | u64::from(low))
    }

    /// Sum of all threads before this one, and of all.
    #[inline(always)]
    #[track_caller]
    fn sum_before(mine: f64) -> (f64, f64) {
        let (lane, sums) = (thread::lane_id(), Shared::sums());
        let mut running = mine;
        unroll!(S in 0..8 {
            if S < 5 {
                let below = shfl_up(running, 1 << S);
                running += if lane >= 1 << S { below } else { 0.0 };
            }
        });
        let before = shfl_up(running, 1);
        let before = if lane == 0 { 0.0 } else { before };
        // What a previous call left may still be read.
        sync_threads();
        if lane == 31 {
            sums.st(thread::warp_id(), running.to_bits());
        }
        sync_threads();
        let (mut of_warps, mut total, mut w) = (0.0, 0.0, 0);
        while w < thread::block_dim_x() / 32 {
            let sum = f64::from_bits(sums.ld(w));
            of_warps += if w < thread::warp_id() { sum } else { 0.0 };
            total += sum;
            w += 1;
        }
        (of_warps + before, total)
    }

    /// The smallest of all threads' numbers.
    #[inline(always)]
    #[track_caller]
    fn smallest(mine: u32) -> u32 {
        let firsts = Shared::firsts();
        let of_warp = |mut v: u32| {
            let mut step = 16;
            while step > 0 {
                v = v.min(warp::shfl_xor(v, step));
                step /= 2;
            }
            v
        };
        let mine = of_warp(mine);
        sync_threads();
        if thread::lane_id() == 0 {
            firsts.st(thread::warp_id(), mine);
        }
        sync_threads();
        let warps = thread::block_dim_x() / 32;
        of_warp(if thread::lane_id() < warps { firsts.ld(thread::lane_id()) } else { u32::MAX })
    }

    /// A row's sorted logits, and the part of them that is this thread's.
    #[derive(Clone, Copy)]
    struct Row {
        logits: Glb<f32>,
        first: u32,
        per_thread: u32,
    }

    impl Row {
        /// The first of this thread's candidates below `count` for which `f` holds; `count` if there is none.
        #[inline(always)]
        #[track_caller]
        fn find(self, count: u32, mut f: impl FnMut(u32) -> bool) -> u32 {
            let mut i = self.first;
            while i < count && i < self.first + self.per_thread {
                if f(i) {
                    return i;
                }
                i += 1;
            }
            count
        }

        /// Weight of a candidate at a temperature: its probability up to a factor.
        #[inline(always)]
        #[track_caller]
        fn weight(self, i: u32, temp: f32) -> f64 {
            let (logit, max) = (self.logits.ld_nc(i), self.logits.ld_nc(0));
            // Equal infinities would give NaN; they are all as likely as the first.
            f64::from(if logit == max { 1.0 } else { exp((logit - max) / temp) })
        }

        /// The first of `count` candidates at which the running sum of weights passes `limit`, a function of all's sum.
        #[inline(always)]
        #[track_caller]
        fn passes(
            self,
            count: u32,
            temp: f32,
            limit: impl Fn(f64) -> f64,
            passed: impl Fn(f64, f64) -> bool,
        ) -> u32 {
            let mut mine = 0.0;
            self.find(count, |i| {
                mine += self.weight(i, temp);
                false
            });
            let (mut running, total) = sum_before(mine);
            let limit = limit(total);
            smallest(self.find(count, |i| {
                running += self.weight(i, temp);
                passed(running, limit)
            }))
        }
    }

    /// The next number of a xoshiro256++ generator (Blackman and Vigna 2019): 53 bits in [0, 1).
    #[inline(always)]
    fn next(s: &mut [u64; 4]) -> f64 {
        let result = s[0].wrapping_add(s[3]).rotate_left(23).wrapping_add(s[0]);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        (result >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    #[inline(always)]
    fn draw(logits: Glb<f32>, ids: Glb<i32>, params: Glb<U32x4>, states: Glb<u64>, tokens: Glb<i32>, n: u32) {
        let (row, thread) = (thread::block_idx_x(), thread::thread_idx_x());
        let start = row as usize * n as usize;
        let (ids, states) = (ids.offset(start), states.offset(4 * row as usize));
        let per_thread = n.div_ceil(thread::block_dim_x());
        let candidates = Row { logits: logits.offset(start), first: thread * per_thread, per_thread };
        let U32x4([temp, top_k, top_p, log_min_p]) = params.ld_nc(row);
        let [temp, top_p, log_min_p] = [temp, top_p, log_min_p].map(f32::from_bits);
        // The whole CTA leaves.
        if temp <= 0.0 {
            if thread == 0 {
                tokens.st(row, ids.ld_nc(0));
            }
            return;
        }

        // Top-k, and NaN, which is last. At least one always stays.
        let count = if top_k == 0 { n } else { top_k.min(n) };
        let logit = |i: u32| candidates.logits.ld_nc(i);
        let mut count = smallest(candidates.find(count, |i| logit(i).is_nan())).max(1);
        // Top-p.
        if top_p < 1.0 {
            let limit = |total: f64| total * f64::from(top_p);
            let last = candidates.passes(count, 1.0, limit, |running, limit| running >= limit);
            count = count.min(last + 1);
        }
        // Min-p: what is too unlikely is a tail.
        if log_min_p > f32::NEG_INFINITY {
            let least = logit(0) + log_min_p;
            // Not `<`: a NaN limit, of an infinite logit, keeps only the first.
            count = smallest(
                candidates.find(count, |i| !matches!(logit(i).partial_cmp(&least), Some(o) if o.is_ge())),
            )
            .max(1);
        }

        // The draw.
        let mut state = [states.ld(0), states.ld(1), states.ld(2), states.ld(3)];
        let random = next(&mut state);
        let at = candidates.passes(count, temp, |total| random * total, |running, limit| running > limit);
        if thread == 0 {
            // Only rounding passes none.
            tokens.st(row, ids.ld_nc(at.min(count - 1)));
            unroll!(J in 0..4 {
                states.st(J as u32, state[J]);
            });
        }
    }

    #[inline(always)]
    fn penalise(logits: Glb<f32>, recent: Glb<i32>, params: Glb<F32x4>, n_vocab: u32, n_recent: u32) {
        let (row, i) = (thread::block_idx_y(), thread::index_1d());
        if i >= n_recent {
            return;
        }
        let recent = recent.offset(row as usize * n_recent as usize);
        let token = recent.ld_nc(i);
        // The first of a token's occurrences does the work of all.
        let (mut before, mut times, mut j) = (0, 0, 0);
        while j < n_recent {
            let same = recent.ld_nc(j) == token;
            times += u32::from(same);
            before += u32::from(same && j < i);
            j += 1;
        }
        if token < 0 || token as u32 >= n_vocab || before > 0 {
            return;
        }
        let logits = logits.offset(row as usize * n_vocab as usize);
        let F32x4([repeat, frequency, presence, _]) = params.ld_nc(row);
        let logit = logits.ld(token as u32);
        let logit = if logit <= 0.0 { math::mul(logit, repeat) } else { logit / repeat };
        logits.st(token as u32, logit - (math::mul(times as f32, frequency) + presence));
    }

    kernels! {
        in "sample";
        pub(super) DRAW: threads(512);
        fn (logits: Glb<f32>, ids: Glb<i32>, params: Glb<U32x4>, states: Glb<u64>, tokens: Glb<i32>, n: u32);
        "sample_draw" => draw;
    }

    kernels! {
        in "sample";
        pub(super) PENALISE: threads(128);
        fn (logits: Glb<f32>, recent: Glb<i32>, params: Glb<F32x4>, n_vocab: u32, n_recent: u32);
        "sample_penalise" => penalise;
    }

    #[cfg(all(test, feature = "emu"))]
    mod tests {
        /// Every bit of the CPU's weights.
        #[test]
        fn exp_is_libms() {
            let mut bits = 0x8000_0000u32;
            while f32::from_bits(bits) > -110.0 {
                let x = f32::from_bits(bits);
                assert_eq!(super::exp(x).to_bits(), libm::expf(x).to_bits(), "{x}");
                bits += 977;
            }
            for x in [0.0, -0.0, f32::NEG_INFINITY, -103.972_08, -103.972_09, -87.336_55] {
                assert_eq!(super::exp(x).to_bits(), libm::expf(x).to_bits(), "{x}");
            }
            assert!(super::exp(f32::NAN).is_nan());
        }
    }
}

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use alloc::{boxed::Box, vec, vec::Vec};

    use super::{PENALTY_THREADS, RowParams, Shared, THREADS};
    use crate::case::{Buffer, Expected, Kernel, Problem, Random, bytes_of};
    use crate::kernels::{argsort, top_k};
    use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};

    /// The state of a row's generator for a seed: splitmix64, as the engine's sampler fills it.
    pub fn seeded(seed: u64) -> [u64; 4] {
        let mut state = seed;
        core::array::from_fn(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        })
    }

    /// The definition of the draw: one row, its token for a random number in [0, 1).
    pub fn reference(logits: &[f32], params: &RowParams, random: f64) -> usize {
        let mut order = top_k::reference(logits, logits.len(), false);
        if params.temp <= 0.0 {
            return order[0];
        }
        if params.top_k > 0 {
            order.truncate(params.top_k as usize);
        }
        let numbers = order.iter().filter(|&&i| !logits[i].is_nan()).count();
        order.truncate(numbers.max(1));
        let max = logits[order[0]];
        let weights = |order: &[usize], temp: f32| -> Vec<f64> {
            let weight = |logit: f32| if logit == max { 1.0 } else { libm::expf((logit - max) / temp) };
            order.iter().map(|&i| weight(logits[i]).into()).collect()
        };
        let first = |weights: &[f64], passed: &dyn Fn(f64) -> bool| {
            let mut running = 0.0;
            weights.iter().position(|w| {
                running += w;
                passed(running)
            })
        };
        if params.top_p < 1.0 {
            let weights = weights(&order, 1.0);
            let limit = weights.iter().sum::<f64>() * f64::from(params.top_p);
            let last = first(&weights, &|running| running >= limit);
            order.truncate(last.map_or(order.len(), |i| i + 1));
        }
        if params.log_min_p > f32::NEG_INFINITY {
            let least = max + params.log_min_p;
            order.truncate(order.iter().take_while(|&&i| logits[i] >= least).count().max(1));
        }
        let weights = weights(&order, params.temp);
        let limit = random * weights.iter().sum::<f64>();
        let at = first(&weights, &|running| running > limit);
        order[at.unwrap_or(order.len() - 1)]
    }

    /// Arguments; see the contract. `top_k` is the largest of the rows', 0 if one of them keeps all.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Args {
        pub logits: DevicePtr,
        pub params: DevicePtr,
        pub states: DevicePtr,
        pub tokens: DevicePtr,
        pub scratch: DevicePtr,
        pub n_rows: usize,
        pub n_vocab: usize,
        pub top_k: usize,
    }

    /// How many of the likeliest are sorted: no less than any row keeps.
    fn n_candidates(n_vocab: usize, top_k: usize) -> usize {
        let wanted = if top_k == 0 { n_vocab } else { top_k.min(n_vocab) };
        // More than `top_k` gives of a long row: all are sorted.
        if n_vocab > top_k::MAX_WHOLE && wanted > top_k::MAX_K { n_vocab } else { wanted }
    }

    /// Bytes of `scratch`: candidates, and what sorting takes.
    pub fn scratch_bytes(n_rows: usize, n_vocab: usize, top_k: usize) -> usize {
        let n = n_candidates(n_vocab, top_k);
        let sorting = if n > top_k::MAX_WHOLE {
            argsort::scratch_bytes(n_rows, n_vocab)
        } else {
            top_k::scratch_bytes(n_rows, n_vocab, n)
        };
        8 * n_rows * n + sorting
    }

    /// The launches, in order: sorting, then the draw.
    pub fn launch(args: &Args) -> Result<Vec<Launch>, LaunchError> {
        let check = Check(Sample::NAME);
        let Args { logits, params, states, tokens, scratch, n_rows, n_vocab, .. } = *args;
        let rows = check.grid("n_rows", n_rows)?;
        check.size("n_vocab", n_vocab)?;
        for (what, at, align) in
            [("params", params, 16), ("states", states, 8), ("tokens", tokens, 4), ("scratch", scratch, 8)]
        {
            check.aligned(what, at, align)?;
        }
        let n = n_candidates(n_vocab, args.top_k);
        let array = |i: usize| scratch.offset((4 * i * n_rows * n) as u64);
        let (ids, values, rest) = (array(0), array(1), array(2));
        let mut launches = if n > top_k::MAX_WHOLE {
            let n = n_vocab;
            argsort::launch(&argsort::Args {
                x: logits,
                scratch: rest,
                ids,
                values,
                n_rows,
                n,
                smallest: false,
            })?
        } else {
            let (n, k, smallest) = (n_vocab, n, false);
            top_k::launch(&top_k::Args { x: logits, scratch: rest, ids, values, n_rows, n, k, smallest })?
        };
        let n = n as u32;
        launches.push(Launch {
            entry: "sample_draw",
            grid: [rows, 1, 1],
            cta: n.next_multiple_of(32).min(THREADS),
            cluster: 1,
            smem_bytes: Shared::BYTES,
            params: Params::new().with(values).with(ids).with(params).with(states).with(tokens).with(n),
        });
        Ok(launches)
    }

    /// Arguments of the penalties; see the contract. `params`: a row of (repeat, frequency, presence, unused) f32, 16-byte
    /// aligned, per row of logits.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct PenaltyArgs {
        pub logits: DevicePtr,
        pub recent: DevicePtr,
        pub params: DevicePtr,
        pub n_rows: usize,
        pub n_vocab: usize,
        pub n_recent: usize,
    }

    /// One launch for all rows.
    pub fn launch_penalise(args: &PenaltyArgs) -> Result<Launch, LaunchError> {
        let check = Check(Sample::NAME);
        let (n_vocab, n_recent) =
            (check.size("n_vocab", args.n_vocab)?, check.size("n_recent", args.n_recent)?);
        for (what, at, align) in
            [("logits", args.logits, 4), ("recent", args.recent, 4), ("params", args.params, 16)]
        {
            check.aligned(what, at, align)?;
        }
        let params = Params::new().with(args.logits).with(args.recent).with(args.params);
        Ok(Launch {
            entry: "sample_penalise",
            grid: [n_recent.div_ceil(PENALTY_THREADS), check.grid("n_rows", args.n_rows)?, 1],
            cta: PENALTY_THREADS,
            cluster: 1,
            smem_bytes: 0,
            params: params.with(n_vocab).with(n_recent),
        })
    }

    /// The definition of the penalties: one row, in place.
    pub fn reference_penalise(logits: &mut [f32], recent: &[i32], [repeat, frequency, presence]: [f32; 3]) {
        let mut sorted: Vec<i32> = recent.to_vec();
        sorted.sort_unstable();
        for run in sorted.chunk_by(|a, b| a == b) {
            let Some(logit) = usize::try_from(run[0]).ok().and_then(|token| logits.get_mut(token)) else {
                continue;
            };
            *logit = if *logit <= 0.0 { *logit * repeat } else { *logit / repeat };
            *logit -= run.len() as f32 * frequency + presence;
        }
    }

    /// The row in the registry.
    #[derive(Debug)]
    pub struct Sample;

    /// One case: penalties, then the draw; row r of the case has parameters of its own if `mixed`.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Case {
        pub n_rows: usize,
        pub n_vocab: usize,
        pub params: RowParams,
        pub mixed: bool,
        pub n_recent: usize,
    }

    const fn params(temp: f32, top_k: u32, top_p: f32, log_min_p: f32) -> RowParams {
        RowParams { temp, top_k, top_p, log_min_p }
    }
    const OFF: f32 = f32::NEG_INFINITY;
    /// ln 0.05.
    const MIN_P: f32 = -2.995_732_3;

    impl Kernel for Sample {
        const NAME: &'static str = "sample";
        type Case = Case;
        const CASES: &'static [Case] = &[
            Case { n_rows: 3, n_vocab: 100, params: params(0.0, 40, 0.95, MIN_P), mixed: false, n_recent: 5 },
            Case {
                n_rows: 16,
                n_vocab: 1000,
                params: params(0.8, 40, 0.95, MIN_P),
                mixed: true,
                n_recent: 64,
            },
            Case { n_rows: 3, n_vocab: 4097, params: params(1.5, 0, 0.9, OFF), mixed: false, n_recent: 1 },
            Case { n_rows: 2, n_vocab: 3000, params: params(3.0, 0, 1.0, OFF), mixed: false, n_recent: 200 },
            Case {
                n_rows: 2,
                n_vocab: 12_001,
                params: params(2.0, 1000, 1.0, MIN_P),
                mixed: true,
                n_recent: 3,
            },
        ];
        const NMSE_MAX: f64 = 0.0;
        const BENCH: &'static [Case] = &[
            Case {
                n_rows: 1,
                n_vocab: 128_256,
                params: params(0.8, 40, 0.95, MIN_P),
                mixed: false,
                n_recent: 64,
            },
            Case {
                n_rows: 1,
                n_vocab: 128_256,
                params: params(0.8, 0, 0.95, MIN_P),
                mixed: false,
                n_recent: 64,
            },
        ];
        #[cfg(feature = "emu")]
        const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::gpu::DRAW, super::gpu::PENALISE];

        fn problem(case: &Case, random: &mut Random) -> Problem {
            let Case { n_rows, n_vocab, n_recent, mixed, .. } = *case;
            let mut logits: Vec<f32> = random.values(n_rows * n_vocab).iter().map(|v| 4.0 * v).collect();
            // A row of nothing, and one with an infinity twice.
            if n_rows > 8 {
                logits[3 * n_vocab..][..n_vocab].fill(f32::NAN);
                logits[5 * n_vocab + 7] = f32::INFINITY;
                logits[5 * n_vocab + 70] = f32::INFINITY;
                logits[6 * n_vocab + 1] = f32::NAN;
            }
            let recent: Vec<i32> =
                (0..n_rows * n_recent).map(|_| random.below(n_vocab.min(90) as u64) as i32 - 2).collect();
            let penalties: Vec<[f32; 4]> =
                (0..n_rows).map(|r| [1.1, 0.01 * (r % 3) as f32, 0.2 * (r % 2) as f32, 0.0]).collect();
            let of_row = |r: usize| match r % 4 {
                1 if mixed => RowParams { temp: 0.0, ..case.params },
                2 if mixed => RowParams { top_k: 3, top_p: 1.0, ..case.params },
                3 if mixed => RowParams { log_min_p: OFF, top_p: 0.5, ..case.params },
                _ => case.params,
            };
            let params: Vec<RowParams> = (0..n_rows).map(of_row).collect();
            let states: Vec<[u64; 4]> = (0..n_rows).map(|_| seeded(random.bits())).collect();

            let mut penalised = logits.clone();
            let (mut tokens, mut states_after) = (Vec::new(), Vec::new());
            for (r, row) in penalised.chunks_mut(n_vocab).enumerate() {
                let [repeat, frequency, presence, _] = penalties[r];
                reference_penalise(row, &recent[r * n_recent..][..n_recent], [repeat, frequency, presence]);
                let (next, state) = next(states[r]);
                tokens.push(reference(row, &params[r], next) as i32);
                states_after.push(if params[r].temp <= 0.0 { states[r] } else { state });
            }
            let top_k = case.params.top_k as usize;
            Problem {
                buffers: vec![
                    Buffer::Input(bytes_of(&logits)),
                    Buffer::Input(bytes_of(&recent)),
                    Buffer::Input(bytes_of(&penalties)),
                    Buffer::Input(bytes_of(&params)),
                    Buffer::Changed(bytes_of(&states), Expected::Exact(bytes_of(&states_after))),
                    Buffer::Output(Expected::Exact(bytes_of(&tokens))),
                    Buffer::Input(vec![0; scratch_bytes(n_rows, n_vocab, top_k)]),
                ],
                launches: Box::new(move |at| {
                    let [logits, recent, penalties, params, states, tokens, scratch] = *at else {
                        unreachable!("seven buffers")
                    };
                    let penalise = launch_penalise(&PenaltyArgs {
                        logits,
                        recent,
                        params: penalties,
                        n_rows,
                        n_vocab,
                        n_recent,
                    })?;
                    let args = Args { logits, params, states, tokens, scratch, n_rows, n_vocab, top_k };
                    let mut launches = vec![penalise];
                    launches.extend(launch(&args)?);
                    Ok(launches)
                }),
            }
        }

        fn bytes(case: &Case) -> u64 {
            4 * (case.n_rows * case.n_vocab) as u64
        }

        fn flops(case: &Case) -> u64 {
            2 * (case.n_rows * n_candidates(case.n_vocab, case.params.top_k as usize)) as u64
        }
    }

    /// A generator's next number in [0, 1), and its state after it.
    fn next(mut s: [u64; 4]) -> (f64, [u64; 4]) {
        let result = s[0].wrapping_add(s[3]).rotate_left(23).wrapping_add(s[0]);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        ((result >> 11) as f64 / (1u64 << 53) as f64, s)
    }
}
