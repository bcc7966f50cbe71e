//! F32 weights × any number of columns: `y[c][r] = Σ w[r][i] · x[c][i]`, with what follows a product in the same launch.
//!
//! * Shapes: `w` [n_rows, k] in spans (`tile.rs`), 16-byte aligned, k a multiple of 4; `x` f32 [n_cols, k], 16-byte aligned;
//!   `y` f32 [n_cols, n_rows]. Parts, epilogue and mixture: `product.rs`.
//! * Result: for every output a chain of fma over a span of 256 weights, from 0, in order of k; the spans are added in
//!   order. So bits depend on k alone.
//! * Tolerance: NMSE 1e-12 against f64: an f32 sum of k terms.
//! * Geometry: lane = row. A warp works on a span of one row tile of 32 and 8 columns, or of two row tiles (of gate and up
//!   of a gated pair) and 16 columns; the 8 warps of a CTA stride over the spans, leave partial sums in shared memory, and
//!   add them in order of k. Grid: (row tiles, columns or pairs of a mixture).
//! * Bytes: the weights once per 8 or 16 columns, the first time from memory, and 4 · n_cols · (k + n_rows). FLOPs:
//!   2 · n_rows · n_cols · k.
//!
//! Done for speed: (1) weights by coalesced 128-bit loads, a register's next load right behind its use; (2) activations
//! are one address for the whole warp, so 16 bytes serve 128 products, or 256 with two row tiles.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

/// Threads per CTA.
const THREADS: u32 = 256;
/// Partial sums between two folds: 32 KiB.
const WINDOW: u32 = 8192;

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod gpu {
    use super::{THREADS, WINDOW};
    use crate::device::{F32x4, Glb, Smem, math, sync, thread};
    use crate::kernels::product::{Gate, Part, choose};
    use crate::tile::{ROWS, SPAN, Tiled};

    const WARPS: u32 = THREADS / thread::WARP;
    /// Vectors of 4 weights in a span of a row.
    const UNITS: u32 = (SPAN / 4) as u32;

    /// The kernel: `TILES` row tiles and `COLS` columns per warp, `DEPTH` vectors of each row tile under way.
    #[inline(always)]
    fn mmf32<const TILES: usize, const COLS: usize, const DEPTH: usize>(
        p0: Part,
        p1: Part,
        p2: Part,
        x: Glb<F32x4>,
        ids: Glb<u32>,
        gate: Gate,
        k: u32,
        n_cols: u32,
        pairs_per_x: u32,
    ) {
        const { assert!(TILES * COLS <= 2 * THREADS as usize / ROWS * 2) };
        let (lane, warp) = (thread::lane_id(), thread::warp_id());
        let part = choose(p0, p1, p2);
        let mixture = !ids.is_null();
        let (expert, first_line, first_x, n_cols) = if mixture {
            let pair = thread::block_idx_y();
            (ids.ld_nc(pair), pair, pair / pairs_per_x, 1)
        } else {
            let first = thread::block_idx_y() * COLS as u32;
            (0, first, first, n_cols - first)
        };

        // A gated pair is one row tile of each matrix.
        let tiles_per_cta = if gate.is_some() { 1 } else { TILES as u32 };
        let first_tile = (thread::block_idx_x() - part.first_cta) * tiles_per_cta;
        let n_tiles = part.n_rows.div_ceil(ROWS as u32);
        let tile_bytes = f32::LAYOUT.tile_bytes(k as usize);
        let weights: [Glb<F32x4>; TILES] = core::array::from_fn(|t| {
            let (w, tile) = if gate.is_some() && t == 1 {
                (p1.w, first_tile)
            } else {
                (part.w, first_tile + if gate.is_some() { 0 } else { t as u32 })
            };
            // Beyond the matrix the last tile again; it is not stored.
            let tile = if tile < n_tiles { tile } else { n_tiles - 1 };
            let at = (expert as usize * n_tiles as usize + tile as usize) * tile_bytes;
            w.offset(at).cast::<F32x4>().offset(lane as usize)
        });
        // Columns beyond the last are that one again.
        let columns: [u32; COLS] = core::array::from_fn(|c| {
            let c = if (c as u32) < n_cols { c as u32 } else { n_cols - 1 };
            (first_x + c) * (k / 4)
        });

        let outputs = (TILES * COLS * ROWS) as u32;
        let partials: Smem<f32> = Smem::dynamic(0, WINDOW);
        let window = WINDOW / outputs;
        let n_spans = k.div_ceil(SPAN as u32);
        let mut totals = [0.0f32; 4];
        let (mut span, mut start) = (warp, 0);
        while start < n_spans {
            let end = if start + window < n_spans { start + window } else { n_spans };
            while span < end {
                let first_unit = span * UNITS;
                let n_units = if first_unit + UNITS < k / 4 { UNITS } else { k / 4 - first_unit };
                let mut sums = [[0.0f32; COLS]; TILES];
                let mut w = [[F32x4::default(); TILES]; DEPTH];
                let load = |unit: u32, t: usize| weights[t].ld_stream((first_unit + unit) * ROWS as u32);
                let mut d = 0;
                while d < DEPTH {
                    let mut t = 0;
                    while t < TILES {
                        if (d as u32) < n_units {
                            w[d][t] = load(d as u32, t);
                        }
                        t += 1;
                    }
                    d += 1;
                }
                let mut first = 0;
                while first < n_units {
                    let mut d = 0;
                    while d < DEPTH {
                        let unit = first + d as u32;
                        if unit < n_units {
                            let weight = w[d];
                            if unit + (DEPTH as u32) < n_units {
                                let mut t = 0;
                                while t < TILES {
                                    w[d][t] = load(unit + DEPTH as u32, t);
                                    t += 1;
                                }
                            }
                            let mut c = 0;
                            while c < COLS {
                                let F32x4(x) = x.ld_nc(columns[c] + first_unit + unit);
                                let mut t = 0;
                                while t < TILES {
                                    unroll!(I in 0..4 {
                                        sums[t][c] = math::fma(weight[t].0[I], x[I], sums[t][c]);
                                    });
                                    t += 1;
                                }
                                c += 1;
                            }
                        }
                        d += 1;
                    }
                    first += DEPTH as u32;
                }
                let mut t = 0;
                while t < TILES {
                    let mut c = 0;
                    while c < COLS {
                        let output = ((t * COLS + c) * ROWS) as u32 + lane;
                        partials.st((span - start) * outputs + output, sums[t][c]);
                        c += 1;
                    }
                    t += 1;
                }
                span += WARPS;
            }
            sync::sync_threads();
            // The window's spans in order.
            unroll!(J in 0..4 {
                let output = thread::thread_idx_x() + J as u32 * THREADS;
                if output < outputs {
                    let mut span = 0;
                    while span < end - start {
                        totals[J] += partials.ld(span * outputs + output);
                        span += 1;
                    }
                }
            });
            sync::sync_threads();
            start = end;
        }

        // Outputs of the second row tile are a whole number of threads behind those of the first.
        let of_tile = (COLS * ROWS) as u32;
        const { assert!(TILES == 1 || (COLS * ROWS).is_multiple_of(THREADS as usize)) };
        unroll!(J in 0..4 {
            let output = thread::thread_idx_x() + J as u32 * THREADS;
            let (tile, column) = (output / of_tile, output % of_tile / ROWS as u32);
            let row = (first_tile + tile) * ROWS as u32 + output % ROWS as u32;
            let there = output < if gate.is_some() { of_tile } else { outputs };
            if there && column < n_cols && row < part.n_rows {
                let up = if TILES == 2 && J < 2 { totals[J + 2] } else { 0.0 };
                part.finish(gate, p1, expert, first_line + column, row, [totals[J], up]);
            }
        });
    }

    kernels! {
        in "mmf32";
        pub(super) NARROW: threads(256, 2);
        fn (
            p0: Part, p1: Part, p2: Part, x: Glb<F32x4>, ids: Glb<u32>, gate: Gate, k: u32, n_cols: u32,
            pairs_per_x: u32,
        );
        "mmf32_n8" => mmf32::<1, 8, 4>;
    }

    kernels! {
        in "mmf32";
        pub(super) WIDE: threads(256, 1);
        fn (
            p0: Part, p1: Part, p2: Part, x: Glb<F32x4>, ids: Glb<u32>, gate: Gate, k: u32, n_cols: u32,
            pairs_per_x: u32,
        );
        "mmf32_n16" => mmf32::<2, 16, 4>;
    }
}

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use alloc::vec;

    use quant::FormatId;

    use super::{THREADS, WINDOW};
    use crate::case::{Kernel, Problem, Random};
    use crate::kernels::float_case::{self, Case};
    use crate::kernels::product::{Glu, Matrix, Mixture, with_gate, with_parts};
    use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};

    /// Arguments; see the contract.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Args<'a> {
        pub parts: &'a [Matrix],
        pub glu: Option<Glu>,
        pub x: DevicePtr,
        pub k: usize,
        /// Of a mixture rows of activations, of which nothing is asked here.
        pub n_cols: usize,
        pub mixture: Option<Mixture>,
    }

    /// One launch for all rows of all matrices.
    pub fn launch(args: &Args<'_>) -> Result<Launch, LaunchError> {
        let kernel = Mmf32::NAME;
        let check = Check(kernel);
        check.multiple("k", args.k, 4, "a multiple of 4")?;
        let k = check.size("k", args.k)?;
        check.aligned("x", args.x, 16)?;
        let (ids, lines, pairs_per_x) = match args.mixture {
            None => (DevicePtr::NULL, args.n_cols, 1),
            Some(mixture) => (mixture.ids, mixture.n_pairs, mixture.pairs_per_x),
        };
        check.aligned("ids", ids, 4)?;
        // Gate and up are the two row tiles of the wide form.
        let wide = args.glu.is_some() || (args.mixture.is_none() && args.n_cols > 8);
        let (entry, rows, cols) = match (wide, args.glu) {
            (false, _) => ("mmf32_n8", 32, 8),
            (true, None) => ("mmf32_n16", 64, 16),
            (true, Some(_)) => ("mmf32_n16", 32, 16),
        };
        let (params, n_ctas) =
            with_parts(kernel, Params::new(), args.parts, args.glu, |n_rows| n_rows.div_ceil(rows))?;
        let grid_y = if args.mixture.is_some() { lines } else { lines.div_ceil(cols) };
        let params = with_gate(params.with(args.x).with(ids), args.glu).with(k);
        Ok(Launch {
            entry,
            grid: [n_ctas, check.grid("columns", grid_y)?, 1],
            cta: THREADS,
            cluster: 1,
            smem_bytes: 4 * WINDOW,
            params: params
                .with(check.size("n_cols", args.n_cols)?)
                .with(check.size("pairs_per_x", pairs_per_x)?),
        })
    }

    /// The row in the registry.
    #[derive(Debug)]
    pub struct Mmf32;

    const F32: FormatId = FormatId::F32;

    impl Kernel for Mmf32 {
        const NAME: &'static str = "mmf32";
        type Case = Case;
        const CASES: &'static [Case] = &[
            Case::plain(F32, &[33], 256 * 9 + 100, 1),
            Case::plain(F32, &[5], 4, 8),
            // More spans than a window of partial sums holds.
            Case::plain(F32, &[32], 256 * 33, 3),
            Case::plain(F32, &[70], 600, 9),
            Case::plain(F32, &[64], 256 * 17, 33),
            Case { addends: true, ..Case::plain(F32, &[40, 16, 3], 516, 7) },
            Case { addends: true, ..Case::plain(F32, &[40, 70], 128, 20) },
            Case { addends: true, glu: Some(Glu::Silu), ..Case::plain(F32, &[33, 33], 520, 2) },
            Case { glu: Some(Glu::Gelu), ..Case::plain(F32, &[64, 64], 256, 17) },
            Case { addends: true, experts: Some((4, 2)), ..Case::plain(F32, &[36], 272, 6) },
            Case { glu: Some(Glu::Silu), experts: Some((3, 1)), ..Case::plain(F32, &[20, 20], 300, 4) },
        ];
        const BENCH: &'static [Case] = &[
            Case::plain(F32, &[4096], 14336, 1),
            Case::plain(F32, &[4096], 14336, 8),
            Case::plain(F32, &[4096], 14336, 512),
        ];
        const NMSE_MAX: f64 = 1e-12;
        #[cfg(feature = "emu")]
        const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::gpu::NARROW, super::gpu::WIDE];

        fn problem(case: &Case, random: &mut Random) -> Problem {
            let Case { k, n_cols, glu, .. } = *case;
            float_case::problem(case, random, 0, move |operands| {
                let (parts, x, mixture) = (&operands.matrices, operands.x, operands.mixture);
                Ok(vec![launch(&Args { parts, glu, x, k, n_cols, mixture })?])
            })
        }

        fn peer(case: &Case) -> Option<alloc::string::String> {
            case.peer()
        }

        fn bytes(case: &Case) -> u64 {
            case.bytes()
        }

        fn flops(case: &Case) -> u64 {
            case.flops()
        }
    }
}
