//! Rotary position embedding: a table of angles per step, then the rotation of queries and keys.
//!
//! * `table`: `out[t][j]` = (cos a, sin a) · magnitude with a = position · `frequencies[j]` / `factors[j]`. The frequencies
//!   come from the host as sums of two floats, with scaling and YaRN's mix already in them ([`frequencies`]); the factors are
//!   the model's (`rope_freqs`), or absent. A token has one position, or four with [`Sections`], and a pair takes the one of
//!   its section.
//! * `rope`: pair j < n_rot/2 of a head, elements (2j, 2j+1) in [`Mode::Norm`] or (j, j + n_rot/2) in [`Mode::Neox`],
//!   turns by its angle; the elements from n_rot on are copied.
//! * Shapes: `positions` [1 or 4, n_tokens] i32; `frequencies` [n_rot/2] pairs, 8-byte aligned; `factors` [n_rot/2]; table [n_tokens, n_rot/2] pairs, 8-byte aligned; `x`, `y`
//!   [n_tokens, n_heads, head_dim] f32, dense. n_rot even, at most head_dim. `y` may be `x`.
//! * Geometry: 256 threads; tokens along the grid's second dimension. Four pairs per thread where head_dim and n_rot are
//!   multiples of 8 and the arrays 16-byte aligned, else one.
//! * Bytes: 8 per element, the table is read from L2. FLOPs: 6 per pair.
//! * Tolerance: NMSE 1e-13. Frequencies are good to 2^-47, their product with the position is a sum of two floats and reduced
//!   by three parts of π/2, so large positions cost no accuracy; sine and cosine are polynomials good to 1e-8.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

const THREADS: u32 = 256;

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
pub(crate) mod gpu {
    use crate::device::math::{fma, mul};
    use crate::device::{F32x2, F32x4, Glb, thread};

    /// Parts of π/2: the first two have so few bits that their products with quarter turns below 2^12 are exact.
    const HALF_PI: [f32; 3] = [1.570_312_5, 4.837_513e-4, 7.549_79e-8];

    /// Cosine and sine of `a · (b + b_rest)`; |a · b| below 2^22.
    #[inline(always)]
    fn cos_sin_of_product(a: f32, b: f32, b_rest: f32) -> [f32; 2] {
        let product = mul(a, b);
        let rest = fma(a, b_rest, fma(a, b, -product));
        // Adding and taking away 1.5 · 2^23 leaves the nearest integer, and that integer in the low bits.
        let shifted = fma(product, core::f32::consts::FRAC_2_PI, 12_582_912.0);
        let quarters = shifted - 12_582_912.0;
        let reduced = HALF_PI.iter().fold(product, |r, part| fma(-quarters, *part, r)) + rest;
        // Taylor series on ±π/4: the first term left out is below 2e-9 and 2e-10.
        let square = reduced * reduced;
        let sine_of = [-1.0 / 6.0, 1.0 / 120.0, -1.0 / 5040.0, 1.0 / 362_880.0];
        let cosine_of = [-0.5, 1.0 / 24.0, -1.0 / 720.0, 1.0 / 40_320.0, -1.0 / 3_628_800.0];
        let series = |terms: &[f32]| terms.iter().rev().fold(0.0, |sum, &term| fma(sum, square, term));
        let sine = fma(series(&sine_of) * square, reduced, reduced);
        let cosine = fma(series(&cosine_of), square, 1.0);
        let quadrant = shifted.to_bits();
        let [cosine, sine] = if quadrant & 1 == 0 { [cosine, sine] } else { [-sine, cosine] };
        if quadrant & 2 == 0 { [cosine, sine] } else { [-cosine, -sine] }
    }

    /// Which of a token's four positions pair j takes.
    #[inline(always)]
    fn section(j: u32, sections: [u32; 4], interleaved: bool) -> u32 {
        let total = sections[0] + sections[1] + sections[2] + sections[3];
        if total == 0 {
            return 0;
        }
        let place = j % total;
        if interleaved {
            // Time, height and width in turn, each as long as it has pairs left.
            let turn = place % 3;
            let length = if turn == 0 {
                sections[0]
            } else if turn == 1 {
                sections[1]
            } else {
                sections[2]
            };
            return if place < 3 * length { turn } else { 3 };
        }
        let (height, width) = (sections[0], sections[0] + sections[1]);
        u32::from(place >= height) + u32::from(place >= width) + u32::from(place >= width + sections[2])
    }

    #[inline(always)]
    fn table(
        positions: Glb<i32>,
        frequencies: Glb<F32x2>,
        factors: Glb<f32>,
        out: Glb<F32x2>,
        n_pairs: u32,
        magnitude: f32,
        s0: u32,
        s1: u32,
        s2: u32,
        s3: u32,
        interleaved: u32,
    ) {
        let (j, token, n_tokens) = (thread::index_1d(), thread::block_idx_y(), thread::grid_dim_y());
        if j < n_pairs {
            let F32x2([mut frequency, mut rest]) = frequencies.ld_nc(j);
            if !factors.is_null() {
                // Long division, one digit of 24 bits after the other.
                let factor = factors.ld_nc(j);
                let quotient = frequency / factor;
                rest = (fma(-quotient, factor, frequency) + rest) / factor;
                frequency = quotient;
            }
            let of = section(j, [s0, s1, s2, s3], interleaved != 0);
            let position = positions.ld_nc(of * n_tokens + token) as f32;
            let [cosine, sine] = cos_sin_of_product(position, frequency, rest);
            out.offset(token as usize * n_pairs as usize)
                .st(j, F32x2([cosine * magnitude, sine * magnitude]));
        }
    }

    #[inline(always)]
    #[track_caller]
    fn rope(
        x: Glb<f32>,
        table: Glb<F32x2>,
        y: Glb<f32>,
        n_heads: u32,
        head_dim: u32,
        n_rot: u32,
        neox: bool,
    ) {
        let (pairs, rotated) = (head_dim / 2, n_rot / 2);
        let (i, token) = (thread::index_1d(), thread::block_idx_y() as usize);
        let (head, j) = (i / pairs, i % pairs);
        if head >= n_heads {
            return;
        }
        let start = (token * n_heads as usize + head as usize) * head_dim as usize;
        let (x, y) = (x.offset(start), y.offset(start));
        let (first, second) = if j < rotated && neox { (j, j + rotated) } else { (2 * j, 2 * j + 1) };
        let (a, b) = (x.ld(first), x.ld(second));
        if j < rotated {
            let F32x2([cosine, sine]) = table.offset(token * rotated as usize).ld_nc(j);
            let [a, b] = turn(a, b, cosine, sine);
            y.st(first, a);
            y.st(second, b);
        } else {
            y.st(first, a);
            y.st(second, b);
        }
    }

    /// Turns one pair.
    #[inline(always)]
    pub(crate) fn turn(a: f32, b: f32, cosine: f32, sine: f32) -> [f32; 2] {
        [fma(a, cosine, -mul(b, sine)), fma(a, sine, mul(b, cosine))]
    }

    #[inline(always)]
    #[track_caller]
    pub(crate) fn rope4(
        x: Glb<f32>,
        table: Glb<F32x2>,
        y: Glb<f32>,
        n_heads: u32,
        head_dim: u32,
        n_rot: u32,
        neox: bool,
    ) {
        // Two float4s, so far apart that neighbouring lanes' are neighbours: those of four pairs each way, or two pairs each.
        let (eights, rotated) = (head_dim / 8, n_rot / 8);
        let (i, token) = (thread::index_1d(), thread::block_idx_y() as usize);
        let (head, j) = (i / eights, i % eights);
        if head >= n_heads {
            return;
        }
        let start = (token * n_heads as usize + head as usize) * head_dim as usize;
        let (x, y) = (x.offset(start).cast::<F32x4>(), y.offset(start).cast::<F32x4>());
        let (first, second) = match neox {
            true if j < rotated => (j, j + rotated),
            true => (j + rotated, j + eights),
            false => (j, j + eights),
        };
        let (F32x4(mut a), F32x4(mut b)) = (x.ld(first), x.ld(second));
        let table = table.offset(token * (n_rot / 2) as usize).cast::<F32x4>();
        if neox {
            if j < rotated {
                let (F32x4([c0, s0, c1, s1]), F32x4([c2, s2, c3, s3])) =
                    (table.ld_nc(2 * j), table.ld_nc(2 * j + 1));
                let (c, s) = ([c0, c1, c2, c3], [s0, s1, s2, s3]);
                unroll!(J in 0..4 {
                    [a[J], b[J]] = turn(a[J], b[J], c[J], s[J]);
                });
            }
        } else {
            let turn_two = |v: &mut [f32; 4], four: u32| {
                if four < 2 * rotated {
                    let F32x4([c0, s0, c1, s1]) = table.ld_nc(four);
                    [v[0], v[1]] = turn(v[0], v[1], c0, s0);
                    [v[2], v[3]] = turn(v[2], v[3], c1, s1);
                }
            };
            turn_two(&mut a, first);
            turn_two(&mut b, second);
        }
        y.st(first, F32x4(a));
        y.st(second, F32x4(b));
    }

    #[inline(always)]
    fn norm4(x: Glb<f32>, table: Glb<F32x2>, y: Glb<f32>, n_heads: u32, head_dim: u32, n_rot: u32) {
        rope4(x, table, y, n_heads, head_dim, n_rot, false);
    }

    #[inline(always)]
    fn neox4(x: Glb<f32>, table: Glb<F32x2>, y: Glb<f32>, n_heads: u32, head_dim: u32, n_rot: u32) {
        rope4(x, table, y, n_heads, head_dim, n_rot, true);
    }

    #[inline(always)]
    fn norm(x: Glb<f32>, table: Glb<F32x2>, y: Glb<f32>, n_heads: u32, head_dim: u32, n_rot: u32) {
        rope(x, table, y, n_heads, head_dim, n_rot, false);
    }

    #[inline(always)]
    fn neox(x: Glb<f32>, table: Glb<F32x2>, y: Glb<f32>, n_heads: u32, head_dim: u32, n_rot: u32) {
        rope(x, table, y, n_heads, head_dim, n_rot, true);
    }

    kernels! {
        in "rope";
        pub(super) TABLE: threads(256);
        fn (positions: Glb<i32>, frequencies: Glb<F32x2>, factors: Glb<f32>, out: Glb<F32x2>, n_pairs: u32,
            magnitude: f32, s0: u32, s1: u32, s2: u32, s3: u32, interleaved: u32);
        "rope_table_f32" => table;
    }

    kernels! {
        in "rope";
        pub(super) ROPE: threads(256);
        fn (x: Glb<f32>, angles: Glb<F32x2>, y: Glb<f32>, n_heads: u32, head_dim: u32, n_rot: u32);
        "rope_norm_f32" => norm;
        "rope_neox_f32" => neox;
        "rope_norm_4_f32" => norm4;
        "rope_neox_4_f32" => neox4;
    }
}

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use alloc::{boxed::Box, vec, vec::Vec};

    use super::THREADS;
    use crate::case::{Buffer, Expected, Kernel, Problem, Random, bytes_of};
    use crate::kernels::output;
    use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};

    /// Which elements make a pair.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Mode {
        /// Neighbours.
        Norm,
        /// One of each half of the rotated part.
        Neox,
    }

    /// How many pairs turn by which of a token's four positions (time, height, width, other), again and again: M-RoPE.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Sections {
        /// Pairs of each.
        pub pairs: [usize; 4],
        /// Time, height and width take turns, a pair each, instead of lying one after the other.
        pub interleaved: bool,
    }

    impl Sections {
        /// One position for all pairs.
        pub const NONE: Sections = Sections { pairs: [0; 4], interleaved: false };

        /// Positions per token.
        pub fn n_positions(self) -> usize {
            if self.pairs == [0; 4] { 1 } else { 4 }
        }

        /// The definition: which position pair j takes.
        pub fn of(self, j: usize) -> usize {
            let total: usize = self.pairs.iter().sum();
            if total == 0 {
                return 0;
            }
            let place = j % total;
            if self.interleaved {
                return if place < 3 * self.pairs[place % 3] { place % 3 } else { 3 };
            }
            let ends = [self.pairs[0], self.pairs[0] + self.pairs[1], total - self.pairs[3]];
            ends.iter().filter(|&&end| place >= end).count()
        }
    }

    /// The frequencies of a model: base, linear scaling, YaRN as in its paper and llama.cpp's `rope_yarn`.
    #[derive(Clone, Copy, Debug, PartialEq)]
    #[allow(missing_docs)] // the engine's RopeParams say what each means
    pub struct Scaling {
        pub n_rot: usize,
        pub freq_base: f32,
        pub freq_scale: f32,
        pub ext_factor: f32,
        pub beta_fast: f32,
        pub beta_slow: f32,
        pub n_ctx_orig: u32,
    }

    impl Scaling {
        /// The plain embedding.
        pub const fn plain(n_rot: usize, freq_base: f32) -> Scaling {
            let (freq_scale, ext_factor, beta_fast, beta_slow, n_ctx_orig) = (1.0, 0.0, 32.0, 1.0, 4096);
            Scaling { n_rot, freq_base, freq_scale, ext_factor, beta_fast, beta_slow, n_ctx_orig }
        }

        /// Radians per position of every pair. Pairs that turn more than `beta_fast` times over the original context keep
        /// their frequency, those below `beta_slow` turns have it scaled, with a ramp between.
        fn exact_frequencies(&self) -> impl Iterator<Item = f64> {
            let (n, base) = (self.n_rot as f64, f64::from(self.freq_base));
            let (scale, ext_factor) = (f64::from(self.freq_scale), f64::from(self.ext_factor));
            let context = f64::from(self.n_ctx_orig);
            let pair_that_turns = |turns: f32| {
                n * libm::log(context / (f64::from(turns) * 2.0 * core::f64::consts::PI))
                    / (2.0 * libm::log(base))
            };
            let low = libm::floor(pair_that_turns(self.beta_fast)).max(0.0);
            let high = libm::ceil(pair_that_turns(self.beta_slow)).min(n - 1.0);
            (0..self.n_rot / 2).map(move |i| {
                let ramp = 1.0 - ((i as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
                let mix = ramp * ext_factor;
                libm::pow(base, -2.0 * i as f64 / n) * (scale * (1.0 - mix) + mix)
            })
        }
    }

    /// Radians per position of every pair, each as a sum of two floats: what [`launch_table`] reads.
    pub fn frequencies(scaling: &Scaling) -> Vec<[f32; 2]> {
        let split = |f: f64| [f as f32, (f - f64::from(f as f32)) as f32];
        scaling.exact_frequencies().map(split).collect()
    }

    /// The definition of the table: one token, cosines and sines in turn.
    pub fn reference_table(
        positions: &[i32],
        scaling: &Scaling,
        factors: Option<&[f32]>,
        sections: Sections,
        magnitude: f32,
    ) -> Vec<f64> {
        let factor = |j: usize| factors.map_or(1.0, |f| f64::from(f[j]));
        let angle = |(j, f): (usize, f64)| f64::from(positions[sections.of(j)]) * (f / factor(j));
        let angles = scaling.exact_frequencies().enumerate().map(angle);
        angles.flat_map(|a| [libm::cos(a), libm::sin(a)].map(|v| v * f64::from(magnitude))).collect()
    }

    /// The definition of the rotation: one head, `table` of its token.
    pub fn reference(x: &[f32], table: &[f64], mode: Mode) -> Vec<f64> {
        let mut y: Vec<f64> = x.iter().copied().map(f64::from).collect();
        let n_pairs = table.len() / 2;
        for j in 0..n_pairs {
            let (first, second) = match mode {
                Mode::Norm => (2 * j, 2 * j + 1),
                Mode::Neox => (j, j + n_pairs),
            };
            let (a, b, cosine, sine) = (y[first], y[second], table[2 * j], table[2 * j + 1]);
            y[first] = a * cosine - b * sine;
            y[second] = a * sine + b * cosine;
        }
        y
    }

    /// Arguments of the table; see the contract.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct TableArgs {
        pub positions: DevicePtr,
        pub frequencies: DevicePtr,
        pub factors: DevicePtr,
        pub out: DevicePtr,
        pub n_tokens: usize,
        pub n_rot: usize,
        pub magnitude: f32,
        pub sections: Sections,
    }

    /// The table of a step.
    pub fn launch_table(args: &TableArgs) -> Result<Launch, LaunchError> {
        let check = Check(Rope::NAME);
        check.multiple("n_rot", args.n_rot, 2, "even")?;
        let n_pairs = check.size("n_rot", args.n_rot)? / 2;
        let arrays = [
            ("positions", args.positions, 4),
            ("frequencies", args.frequencies, 8),
            ("factors", args.factors, 4),
            ("out", args.out, 8),
        ];
        for (what, at, align) in arrays {
            check.aligned(what, at, align)?;
        }
        let params = arrays.iter().fold(Params::new(), |params, (_, at, _)| params.with(*at));
        let params = params.with(n_pairs).with(args.magnitude);
        let Sections { pairs, interleaved } = args.sections;
        if pairs.iter().any(|&pairs| pairs > args.n_rot) {
            return Err(check.shape(
                "sections",
                "at most n_rot pairs each",
                pairs[0].max(pairs[1]).max(pairs[2]),
            ));
        }
        let params = pairs.iter().fold(params, |params, &pairs| params.with(pairs as u32));
        Ok(Launch {
            entry: "rope_table_f32",
            grid: [n_pairs.div_ceil(THREADS), check.grid("n_tokens", args.n_tokens)?, 1],
            cta: THREADS,
            cluster: 1,
            smem_bytes: 0,
            params: params.with(u32::from(interleaved)),
        })
    }

    /// Arguments of the rotation; see the contract.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Args {
        pub x: DevicePtr,
        pub table: DevicePtr,
        pub y: DevicePtr,
        pub n_tokens: usize,
        pub n_heads: usize,
        pub head_dim: usize,
        pub n_rot: usize,
        pub mode: Mode,
    }

    /// The rotation of all heads of all tokens.
    pub fn launch(args: &Args) -> Result<Launch, LaunchError> {
        let check = Check(Rope::NAME);
        let (n_heads, head_dim) =
            (check.size("n_heads", args.n_heads)?, check.size("head_dim", args.head_dim)?);
        check.multiple("head_dim", args.head_dim, 2, "even")?;
        check.multiple("n_rot", args.n_rot, 2, "even")?;
        let n_rot = check.size("n_rot", args.n_rot)?;
        if n_rot > head_dim {
            let got = args.n_rot as u64;
            return Err(LaunchError::Shape {
                kernel: Rope::NAME,
                what: "n_rot",
                expected: "at most head_dim",
                got,
            });
        }
        for (what, at, align) in [("x", args.x, 4), ("table", args.table, 8), ("y", args.y, 4)] {
            check.aligned(what, at, align)?;
        }
        let n_pairs = check.size("n_heads * head_dim / 2", args.n_heads * args.head_dim / 2)?;
        let by_fours = args.head_dim.is_multiple_of(8)
            && args.n_rot.is_multiple_of(8)
            && [args.x, args.table, args.y].iter().all(|at| at.0.is_multiple_of(16));
        let threads = if by_fours { n_pairs / 4 } else { n_pairs };
        Ok(Launch {
            entry: match (args.mode, by_fours) {
                (Mode::Norm, false) => "rope_norm_f32",
                (Mode::Neox, false) => "rope_neox_f32",
                (Mode::Norm, true) => "rope_norm_4_f32",
                (Mode::Neox, true) => "rope_neox_4_f32",
            },
            grid: [threads.div_ceil(THREADS), check.grid("n_tokens", args.n_tokens)?, 1],
            cta: THREADS,
            cluster: 1,
            smem_bytes: 0,
            params: Params::new()
                .with(args.x)
                .with(args.table)
                .with(args.y)
                .with(n_heads)
                .with(head_dim)
                .with(n_rot),
        })
    }

    /// The row in the registry.
    #[derive(Debug)]
    pub struct Rope;

    /// One case: table and rotation, in that order.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Case {
        pub mode: Mode,
        pub n_tokens: usize,
        pub first: i32,
        pub n_heads: usize,
        pub head_dim: usize,
        pub scaling: Scaling,
        pub factors: bool,
        pub sections: Sections,
        pub in_place: bool,
    }

    const fn case(
        mode: Mode,
        [n_tokens, n_heads, head_dim]: [usize; 3],
        first: i32,
        scaling: Scaling,
        factors: bool,
        sections: Sections,
    ) -> Case {
        Case { mode, n_tokens, first, n_heads, head_dim, scaling, factors, sections, in_place: false }
    }
    const fn plain(n_rot: usize) -> Scaling {
        Scaling::plain(n_rot, 10_000.0)
    }
    const YARN: Scaling = Scaling {
        n_rot: 64,
        freq_base: 150_000.0,
        freq_scale: 1.0 / 32.0,
        ext_factor: 1.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        n_ctx_orig: 4096,
    };
    const LINEAR: Scaling = Scaling { freq_scale: 0.25, ..Scaling::plain(128, 500_000.0) };
    const M: Sections = Sections { pairs: [16, 24, 24, 0], interleaved: false };
    const INTERLEAVED: Sections = Sections { pairs: [24, 20, 20, 0], interleaved: true };

    impl Kernel for Rope {
        const NAME: &'static str = "rope";
        type Case = Case;
        const CASES: &'static [Case] = &[
            case(Mode::Norm, [1, 1, 2], 0, plain(2), false, Sections::NONE),
            case(Mode::Norm, [3, 9, 64], 4095, plain(64), false, Sections::NONE),
            case(Mode::Neox, [2, 5, 128], 131_000, plain(128), false, Sections::NONE),
            case(Mode::Neox, [2, 3, 80], 77, plain(32), false, Sections::NONE),
            case(Mode::Norm, [1, 2, 96], -3, plain(48), true, Sections::NONE),
            case(Mode::Norm, [3, 5, 20], 99, plain(12), false, Sections::NONE),
            case(Mode::Neox, [2, 3, 44], 500, plain(44), false, Sections::NONE),
            case(Mode::Neox, [2, 2, 64], 131_000, YARN, false, Sections::NONE),
            case(Mode::Norm, [2, 2, 128], 100_001, LINEAR, true, Sections::NONE),
            case(Mode::Neox, [3, 2, 128], 1000, plain(128), false, M),
            case(Mode::Neox, [3, 2, 128], 1000, plain(128), false, INTERLEAVED),
            // What turns ends within the first of the two float4s' halves, and within the second.
            case(Mode::Norm, [2, 3, 80], 77, plain(32), false, Sections::NONE),
            Case { in_place: true, ..case(Mode::Norm, [2, 3, 80], 77, plain(64), false, Sections::NONE) },
            Case { in_place: true, ..case(Mode::Neox, [2, 3, 80], 77, plain(32), false, Sections::NONE) },
            Case { in_place: true, ..case(Mode::Norm, [2, 2, 20], 5, plain(12), false, Sections::NONE) },
        ];
        const NMSE_MAX: f64 = 1e-13;
        const BENCH: &'static [Case] = &[
            case(Mode::Norm, [512, 32, 128], 4095, plain(128), false, Sections::NONE),
            case(Mode::Neox, [512, 32, 128], 4095, plain(128), false, Sections::NONE),
            case(Mode::Norm, [4096, 32, 128], 4095, plain(128), false, Sections::NONE),
        ];
        #[cfg(feature = "emu")]
        const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::gpu::TABLE, super::gpu::ROPE];

        fn problem(case: &Case, random: &mut Random) -> Problem {
            let Case { mode, n_tokens, first, n_heads, head_dim, scaling, sections, .. } = *case;
            let n_rot = scaling.n_rot;
            let magnitude = 1.25;
            // Of several positions the later ones run faster.
            let n_positions = sections.n_positions();
            let position = |p: usize, t: usize| first + (t * (p + 1) + 10 * p) as i32;
            let positions: Vec<i32> =
                (0..n_positions).flat_map(|p| (0..n_tokens).map(move |t| position(p, t))).collect();
            let factors: Vec<f32> = (0..n_rot / 2).map(|_| 1.0 + random.value().abs()).collect();
            let x = random.values(n_tokens * n_heads * head_dim);
            let table_of = |t: usize| {
                let positions: Vec<i32> = (0..n_positions).map(|p| position(p, t)).collect();
                reference_table(
                    &positions,
                    &scaling,
                    case.factors.then_some(&factors[..]),
                    sections,
                    magnitude,
                )
            };
            let tables: Vec<Vec<f64>> = (0..n_tokens).map(table_of).collect();
            let head = |(i, x): (usize, &[f32])| reference(x, &tables[i / n_heads], mode);
            let expected = x.chunks(head_dim).enumerate().flat_map(head).collect();
            let (has_factors, in_place) = (case.factors, case.in_place);
            let problem = Problem {
                buffers: [
                    Buffer::Input(bytes_of(&positions)),
                    Buffer::Input(bytes_of(&frequencies(&scaling))),
                    Buffer::Output(Expected::F32(tables.concat())),
                    Buffer::Input(bytes_of(&factors)),
                ]
                .into_iter()
                .chain(match in_place {
                    true => vec![Buffer::Changed(bytes_of(&x), Expected::F32(expected))],
                    false => vec![Buffer::Input(bytes_of(&x)), Buffer::Output(Expected::F32(expected))],
                })
                .collect(),
                launches: Box::new(move |at| {
                    let (positions, frequencies, out) = (at[0], at[1], at[2]);
                    let factors = if has_factors { at[3] } else { DevicePtr::NULL };
                    Ok(vec![
                        launch_table(&TableArgs {
                            positions,
                            frequencies,
                            factors,
                            out,
                            n_tokens,
                            n_rot,
                            magnitude,
                            sections,
                        })?,
                        launch(&Args {
                            x: at[4],
                            table: out,
                            y: at[if in_place { 4 } else { 5 }],
                            n_tokens,
                            n_heads,
                            head_dim,
                            n_rot,
                            mode,
                        })?,
                    ])
                }),
            };
            // The table is a step's, the rotation a layer's; the peer computes its angles anew.
            let alone = random.is_timing() && Self::peer(case).is_none();
            if alone { output::last_launch(problem) } else { problem }
        }

        fn peer(case: &Case) -> Option<alloc::string::String> {
            let Case { mode, n_tokens, n_heads, head_dim, scaling, .. } = *case;
            let rotated = scaling.n_rot;
            (mode == Mode::Norm && n_tokens == 512).then(|| {
                alloc::format!("ROPE(type=f32,ne_a=[{head_dim},{n_heads},{n_tokens},1],n_dims={rotated},mode=0,n_ctx=512,fs=1.000000,ef=0.000000,af=1.000000,ff=0,v=0,")
            })
        }

        fn bytes(case: &Case) -> u64 {
            8 * (case.n_tokens * case.n_heads * case.head_dim) as u64
        }

        fn flops(case: &Case) -> u64 {
            3 * (case.n_tokens * case.n_heads * case.scaling.n_rot) as u64
        }
    }
}
