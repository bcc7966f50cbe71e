//! Rotary position embedding: a table of angles per step, then the rotation of queries and keys.
//!
//! * `table`: `out[t][j]` = (cos a, sin a) · magnitude with a = `positions[t]` · `frequencies[j]`. The frequencies come from the
//!   host in f32, with scaling, YaRN's mix and the model's factors already in them ([`frequencies`] for the plain case).
//! * `rope`: pair j < n_rot/2 of a head, elements (2j, 2j+1) in [`Mode::Norm`] or (j, j + n_rot/2) in [`Mode::Neox`],
//!   turns by its angle; the elements from n_rot on are copied.
//! * Shapes: `positions` `[n_tokens]` i32; `frequencies` [n_rot/2]; table [n_tokens, n_rot/2] pairs, 8-byte aligned; `x`, `y`
//!   [n_tokens, n_heads, head_dim] f32, dense. n_rot even, at most head_dim. `y` may be `x`.
//! * Geometry: 256 threads, one pair each; tokens along the grid's second dimension.
//! * Bytes: 8 per element, the table is read from L2. FLOPs: 6 per pair.
//! * Tolerance: NMSE 1e-13. The product of position and frequency is taken exactly (as a sum of two floats) and reduced
//!   by three parts of π/2, so large positions cost no accuracy; sine and cosine are polynomials good to 1e-8.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

const THREADS: u32 = 256;

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod gpu {
    use crate::device::math::{fma, mul};
    use crate::device::{F32x2, Glb, thread};

    /// Parts of π/2: the first two have so few bits that their products with quarter turns below 2^12 are exact.
    const HALF_PI: [f32; 3] = [1.570_312_5, 4.837_513e-4, 7.549_79e-8];

    /// Cosine and sine of `a · b`; |a · b| below 2^22.
    #[inline(always)]
    fn cos_sin_of_product(a: f32, b: f32) -> [f32; 2] {
        let product = mul(a, b);
        let rest = fma(a, b, -product);
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

    #[inline(always)]
    fn table(positions: Glb<i32>, frequencies: Glb<f32>, out: Glb<F32x2>, n_pairs: u32, magnitude: f32) {
        let (j, token) = (thread::index_1d(), thread::block_idx_y());
        if j < n_pairs {
            let [cosine, sine] = cos_sin_of_product(positions.ld_nc(token) as f32, frequencies.ld_nc(j));
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
            y.st(first, fma(a, cosine, -(b * sine)));
            y.st(second, fma(a, sine, b * cosine));
        } else {
            y.st(first, a);
            y.st(second, b);
        }
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
        fn (positions: Glb<i32>, frequencies: Glb<f32>, out: Glb<F32x2>, n_pairs: u32, magnitude: f32);
        "rope_table_f32" => table;
    }

    kernels! {
        in "rope";
        pub(super) ROPE: threads(256);
        fn (x: Glb<f32>, angles: Glb<F32x2>, y: Glb<f32>, n_heads: u32, head_dim: u32, n_rot: u32);
        "rope_norm_f32" => norm;
        "rope_neox_f32" => neox;
    }
}

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use alloc::{boxed::Box, vec, vec::Vec};

    use super::THREADS;
    use crate::case::{Buffer, Expected, Kernel, Problem, Random, bytes_of};
    use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};

    /// Which elements make a pair.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Mode {
        /// Neighbours.
        Norm,
        /// One of each half of the rotated part.
        Neox,
    }

    /// `base^(-2j / n_rot) · scale`: radians per position of the plain embedding.
    pub fn frequencies(n_rot: usize, base: f32, scale: f32) -> Vec<f32> {
        let frequency = |j: usize| libm::pow(base.into(), -2.0 * j as f64 / n_rot as f64) * f64::from(scale);
        (0..n_rot / 2).map(|j| frequency(j) as f32).collect()
    }

    /// The definition of the table: one token, cosines and sines in turn.
    pub fn reference_table(position: i32, frequencies: &[f32], magnitude: f32) -> Vec<f64> {
        let angles = frequencies.iter().map(|&f| f64::from(position) * f64::from(f));
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
        pub out: DevicePtr,
        pub n_tokens: usize,
        pub n_rot: usize,
        pub magnitude: f32,
    }

    /// The table of a step.
    pub fn launch_table(args: &TableArgs) -> Result<Launch, LaunchError> {
        let check = Check(Rope::NAME);
        check.multiple("n_rot", args.n_rot, 2, "even")?;
        let n_pairs = check.size("n_rot", args.n_rot)? / 2;
        for (what, at, align) in
            [("positions", args.positions, 4), ("frequencies", args.frequencies, 4), ("out", args.out, 8)]
        {
            check.aligned(what, at, align)?;
        }
        let params = Params::new().with(args.positions).with(args.frequencies).with(args.out);
        Ok(Launch {
            entry: "rope_table_f32",
            grid: [n_pairs.div_ceil(THREADS), check.grid("n_tokens", args.n_tokens)?, 1],
            cta: THREADS,
            cluster: 1,
            smem_bytes: 0,
            params: params.with(n_pairs).with(args.magnitude),
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
        Ok(Launch {
            entry: match args.mode {
                Mode::Norm => "rope_norm_f32",
                Mode::Neox => "rope_neox_f32",
            },
            grid: [n_pairs.div_ceil(THREADS), check.grid("n_tokens", args.n_tokens)?, 1],
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
        pub n_rot: usize,
    }

    impl Kernel for Rope {
        const NAME: &'static str = "rope";
        type Case = Case;
        const CASES: &'static [Case] = &[
            Case { mode: Mode::Norm, n_tokens: 1, first: 0, n_heads: 1, head_dim: 2, n_rot: 2 },
            Case { mode: Mode::Norm, n_tokens: 3, first: 4095, n_heads: 9, head_dim: 64, n_rot: 64 },
            Case { mode: Mode::Neox, n_tokens: 2, first: 131_000, n_heads: 5, head_dim: 128, n_rot: 128 },
            Case { mode: Mode::Neox, n_tokens: 2, first: 77, n_heads: 3, head_dim: 80, n_rot: 32 },
            Case { mode: Mode::Norm, n_tokens: 1, first: -3, n_heads: 2, head_dim: 96, n_rot: 48 },
        ];
        const NMSE_MAX: f64 = 1e-13;
        #[cfg(feature = "emu")]
        const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::gpu::TABLE, super::gpu::ROPE];

        fn problem(case: &Case, random: &mut Random) -> Problem {
            let Case { mode, n_tokens, first, n_heads, head_dim, n_rot } = *case;
            let magnitude = 1.25;
            let positions: Vec<i32> = (0..n_tokens as i32).map(|t| first + t).collect();
            let frequencies = frequencies(n_rot, 10_000.0, 1.0);
            let x = random.values(n_tokens * n_heads * head_dim);
            let tables: Vec<Vec<f64>> =
                positions.iter().map(|&p| reference_table(p, &frequencies, magnitude)).collect();
            let head = |(i, x): (usize, &[f32])| reference(x, &tables[i / n_heads], mode);
            let expected = x.chunks(head_dim).enumerate().flat_map(head).collect();
            Problem {
                buffers: vec![
                    Buffer::Input(bytes_of(&positions)),
                    Buffer::Input(bytes_of(&frequencies)),
                    Buffer::Output(Expected::F32(tables.concat())),
                    Buffer::Input(bytes_of(&x)),
                    Buffer::Output(Expected::F32(expected)),
                ],
                launches: Box::new(move |at| {
                    let (positions, frequencies, table) = (at[0], at[1], at[2]);
                    Ok(vec![
                        launch_table(&TableArgs {
                            positions,
                            frequencies,
                            out: table,
                            n_tokens,
                            n_rot,
                            magnitude,
                        })?,
                        launch(&Args {
                            x: at[3],
                            table,
                            y: at[4],
                            n_tokens,
                            n_heads,
                            head_dim,
                            n_rot,
                            mode,
                        })?,
                    ])
                }),
            }
        }

        fn bytes(case: &Case) -> u64 {
            8 * (case.n_tokens * case.n_heads * case.head_dim) as u64
        }

        fn flops(case: &Case) -> u64 {
            3 * (case.n_tokens * case.n_heads * case.n_rot) as u64
        }
    }
}
