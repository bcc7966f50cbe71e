//! F16 or BF16 weights × few columns: `y[c][r] = Σ w[r][i] · x[c][i]` for up to 32 columns c, with what follows a product
//! in the same launch.
//!
//! * Shapes: `w` [n_rows, k] in fragments (`tile.rs`), 16-byte aligned, k a multiple of 4; activations either f32
//!   [n_cols, k], 8-byte aligned, up to 8 columns, rounded to the weights' format on the way, or tiles of any number as
//!   `round_act` writes them; `y` f32 [n_cols, n_rows]. Parts and epilogue: `product.rs`.
//! * Mixture: with `ids`, every pair of token and slot is a column of its own whose weights are expert `ids[pair]` of
//!   [n_expert, n_rows, k] (and bias of [n_expert, n_rows]); f32 activations have a row per token or one per pair.
//! * Result: for every output a span of 256 weights is summed by `mma.m16n8k16` in f32, from 0, 16 of k at a time in order;
//!   the spans are added in order. So bits depend on k alone, and are those of `mmf`.
//!   Tiers whose tensor cores lack the type sum by fma in order of k instead (`device/mma.rs`).
//! * Tolerance: NMSE 1e-10 against f64 on the rounded activations: an f32 sum of k terms, of which tensor cores cut low
//!   bits instead of rounding them.
//! * Geometry: 8 warps per CTA. An item is a span of one row tile of 16: 8 KiB. A CTA works on one row tile, on two where
//!   columns make activations dear (from 9 on), or on gate and up; its warps stride over the items, leave partial sums in
//!   shared memory, and add them in order of k. A mixture has a CTA row per pair.
//! * Bytes: the weights once, and 4 · n_cols · (k + n_rows). FLOPs: 2 · n_rows · n_cols · k.
//!
//! Done for speed: (1) a lane's 16 bytes of a fragment are its registers of A: weights go from memory straight into the
//! product, by coalesced 128-bit loads past L1; (2) a warp holds an item in registers and loads the next one behind the
//! products that free them, so that 8 KiB per warp are always under way, 128 KiB per SM, the first of them before earlier
//! launches have ended (`device/grid.rs`), except a mixture's; (3) tensor cores compute 8 columns
//! in the time of one, so the cost is flat in n_cols.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

/// Threads per CTA.
const THREADS: u32 = 256;
/// Words of a partial sum of 16 rows × 8 columns: a column takes 20, so that the lanes of a fragment hit 32 banks.
const PARTIAL: u32 = 8 * COLUMN;
const COLUMN: u32 = 20;
/// Words of partial sums between two folds: 40 KiB, which every GPU gives without being asked.
const WINDOW: u32 = 64 * PARTIAL;

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
pub(crate) use gpu::Half;

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod gpu {
    use half::{bf16, f16};

    use super::{COLUMN, PARTIAL, THREADS, WINDOW};
    use crate::device::mma::{self, FragmentA, FragmentB, FragmentF32};
    use crate::device::{F32x2, Float, Glb, Smem, U32x4, grid, sync, thread};
    use crate::kernels::product::{Gate, Part, choose};
    use crate::kernels::round_act::pair;
    use crate::tile::SPAN;

    const WARPS: u32 = THREADS / thread::WARP;
    /// Fragments of a span.
    const FRAGMENTS: u32 = (SPAN / 16) as u32;

    /// Whether more than 8 columns leave registers for a whole item: not where a product takes two instructions or more.
    const STREAM_MANY: bool = cfg!(any(not(target_arch = "nvptx64"), sm_ge_80));

    /// A 16-bit float that tensor cores multiply.
    pub(crate) trait Half: Float {
        /// Whether this tier's tensor cores know the type. Without, the product is a chain of fma in order of k.
        const TENSOR: bool;
        /// `c += a · b`.
        fn mma(c: &mut FragmentF32, a: FragmentA, b: FragmentB);
    }

    impl Half for f16 {
        const TENSOR: bool = cfg!(any(not(target_arch = "nvptx64"), sm_ge_75));
        #[inline(always)]
        #[track_caller]
        fn mma(c: &mut FragmentF32, a: FragmentA, b: FragmentB) {
            mma::mma_f16(c, a, b);
        }
    }

    impl Half for bf16 {
        const TENSOR: bool = cfg!(any(not(target_arch = "nvptx64"), sm_ge_80));
        #[inline(always)]
        #[track_caller]
        fn mma(c: &mut FragmentF32, a: FragmentA, b: FragmentB) {
            mma::mma_bf16(c, a, b);
        }
    }

    /// Where this lane's part of the activations comes from.
    trait Columns: Copy {
        /// B of the 8 columns from `8 * block`, for k from `16 * k16`.
        fn load(self, block: u32, k16: u32) -> FragmentB;
        /// The same where k may end within these 16.
        fn load_tail(self, block: u32, k16: u32) -> FragmentB;
    }

    /// f32 columns: this lane's column, from its first pair on. Lanes beyond the last column take it again; their sums
    /// are not stored.
    #[derive(Clone, Copy)]
    struct Plain<H> {
        pairs: Glb<F32x2>,
        /// Pairs from there to the end of k, rounded up to the lane.
        n_pairs: u32,
        format: core::marker::PhantomData<H>,
    }

    impl<H: Half> Plain<H> {
        #[inline(always)]
        #[track_caller]
        fn pair(self, i: u32) -> u32 {
            let F32x2([low, high]) = self.pairs.ld_nc(i);
            pair::<H>(low, high)
        }
    }

    impl<H: Half> Columns for Plain<H> {
        #[inline(always)]
        #[track_caller]
        fn load(self, _: u32, k16: u32) -> FragmentB {
            FragmentB([self.pair(8 * k16), self.pair(8 * k16 + 4)])
        }
        #[inline(always)]
        #[track_caller]
        fn load_tail(self, _: u32, k16: u32) -> FragmentB {
            let there = |i: u32| if i < self.n_pairs { self.pair(i) } else { 0 };
            FragmentB([there(8 * k16), there(8 * k16 + 4)])
        }
    }

    /// Tiles of `round_act`, from this lane's word on.
    #[derive(Clone, Copy)]
    struct Tiles {
        words: Glb<u32>,
        /// Tiles of a block of 8 columns.
        n_tiles: u32,
    }

    impl Columns for Tiles {
        #[inline(always)]
        #[track_caller]
        fn load(self, block: u32, k16: u32) -> FragmentB {
            let tile = block * self.n_tiles + 2 * k16;
            FragmentB([self.words.ld_nc(32 * tile), self.words.ld_nc(32 * tile + 32)])
        }
        #[inline(always)]
        #[track_caller]
        fn load_tail(self, block: u32, k16: u32) -> FragmentB {
            // Padded with zeros.
            self.load(block, k16)
        }
    }

    /// The products of one whole item whose weights are in registers. With `NEXT` each register takes the weight of the
    /// next item, from `next` on, as soon as it is free.
    #[inline(always)]
    #[track_caller]
    fn item<H: Half, C: Columns, const BLOCKS: usize, const NEXT: bool>(
        a: &mut [U32x4; FRAGMENTS as usize],
        columns: C,
        last_block: u32,
        k16: u32,
        next: Glb<U32x4>,
    ) -> [FragmentF32; BLOCKS] {
        let mut acc = [FragmentF32::default(); BLOCKS];
        // Four steps at a time: their activations, their products, then the loads into the registers that they free.
        unroll!(QUARTER in 0..4 {
            let mut b = [[FragmentB::default(); BLOCKS]; 4];
            unroll!(STEP in 0..4 {
                let mut block = 0;
                while block < BLOCKS {
                    let from = if (block as u32) < last_block { block as u32 } else { last_block };
                    b[STEP][block] = columns.load(from, k16 + (4 * QUARTER + STEP) as u32);
                    block += 1;
                }
            });
            unroll!(STEP in 0..4 {
                let mut block = 0;
                while block < BLOCKS {
                    H::mma(&mut acc[block], FragmentA(a[4 * QUARTER + STEP].0), b[STEP][block]);
                    block += 1;
                }
            });
            if NEXT {
                unroll!(STEP in 0..4 {
                    let i = 4 * QUARTER + STEP;
                    a[i] = next.ld_stream(32 * i as u32);
                });
            }
        });
        acc
    }

    /// The kernel, on `columns` of `n_cols` columns. Without `STREAM` a warp holds one fragment at a time: where the products
    /// need the registers.
    #[inline(always)]
    #[track_caller]
    fn mmvf<H: Half, C: Columns, const BLOCKS: usize, const STREAM: bool>(
        [part, up]: [Part; 2],
        gate: Gate,
        columns: C,
        k: u32,
        n_cols: u32,
        [expert, first_line]: [u32; 2],
    ) {
        let (lane, warp) = (thread::lane_id(), thread::warp_id());
        let gated = gate.is_some();
        // A gated pair is two row tiles, one of each matrix.
        let two_tiles = gated || BLOCKS > 1;
        let tiles_per_cta = if two_tiles && !gated { 2 } else { 1 };
        let first_tile = (thread::block_idx_x() - part.first_cta) * tiles_per_cta;

        let n_k16 = k.div_ceil(16);
        // Matrices are padded to 32 rows: two row tiles.
        let tiles_per_matrix = 2 * part.n_rows.div_ceil(32);
        let first = expert as usize * tiles_per_matrix as usize + first_tile as usize;
        let of_tile = |w: Glb<u8>, tile: usize| {
            w.cast::<U32x4>().offset((first + tile) * 32 * n_k16 as usize + lane as usize)
        };
        let (w0, w1) = (of_tile(part.w, 0), if gated { of_tile(up.w, 0) } else { of_tile(part.w, 1) });
        // Items alternate between the row tiles.
        let shift = two_tiles as u32;
        let weights = |item: u32| {
            let w = if two_tiles && item % 2 == 1 { w1 } else { w0 };
            w.offset((item >> shift) as usize * 32 * FRAGMENTS as usize)
        };
        let n_whole = if STREAM { (n_k16 / FRAGMENTS) << shift } else { 0 };
        let n_items = n_k16.div_ceil(FRAGMENTS) << shift;
        let last_block = (n_cols - 1) / 8;

        let partials: Smem<f32> = Smem::dynamic(0, WINDOW);
        let partial = BLOCKS as u32 * PARTIAL;
        let window = WINDOW / partial;
        // Two outputs of each row tile per thread at most: 32 columns of 16 rows.
        let mut totals = [[0.0f32; 2]; 2];

        let mut a = [U32x4::default(); FRAGMENTS as usize];
        if warp < n_whole {
            let from = weights(warp);
            unroll!(I in 0..16 {
                a[I] = from.ld_stream(32 * I as u32);
            });
        }
        grid::wait_for_earlier();
        let (mut at, mut start) = (warp, 0);
        while start < n_items {
            let end = if start + window < n_items { start + window } else { n_items };
            while at < end {
                let k16 = (at >> shift) * FRAGMENTS;
                let next = at + WARPS;
                let acc = if next < n_whole {
                    item::<H, C, BLOCKS, true>(&mut a, columns, last_block, k16, weights(next))
                } else if at < n_whole {
                    item::<H, C, BLOCKS, false>(&mut a, columns, last_block, k16, weights(at))
                } else {
                    // The short last span.
                    let mut acc = [FragmentF32::default(); BLOCKS];
                    let from = weights(at);
                    let mut i = 0;
                    while i < FRAGMENTS && k16 + i < n_k16 {
                        let weight = FragmentA(from.ld_stream(32 * i).0);
                        let mut block = 0;
                        while block < BLOCKS {
                            let b = if (block as u32) < last_block { block as u32 } else { last_block };
                            H::mma(&mut acc[block], weight, columns.load_tail(b, k16 + i));
                            block += 1;
                        }
                        i += 1;
                    }
                    acc
                };
                let to = (at - start) * partial + 2 * (lane % 4) * COLUMN + lane / 4;
                let mut block = 0;
                while block < BLOCKS {
                    let (to, FragmentF32(sums)) = (to + block as u32 * PARTIAL, acc[block]);
                    partials.st(to, sums[0]);
                    partials.st(to + COLUMN, sums[1]);
                    partials.st(to + 8, sums[2]);
                    partials.st(to + COLUMN + 8, sums[3]);
                    block += 1;
                }
                at = next;
            }
            sync::sync_threads();
            // The window's spans in order.
            unroll!(J in 0..2 {
                let output = thread::thread_idx_x() + J as u32 * THREADS;
                if output < BLOCKS as u32 * 128 {
                    let from = output / 16 * COLUMN + output % 16;
                    let mut item = 0;
                    while item < end - start {
                        totals[0][J] += partials.ld(item * partial + from);
                        if two_tiles {
                            totals[1][J] += partials.ld((item + 1) * partial + from);
                        }
                        item += 1 << shift;
                    }
                }
            });
            sync::sync_threads();
            start = end;
        }

        unroll!(J in 0..2 {
            let output = thread::thread_idx_x() + J as u32 * THREADS;
            let column = output / 16;
            if column < n_cols && output < BLOCKS as u32 * 128 {
                let line = first_line + column;
                let row = first_tile * 16 + output % 16;
                let store = |row: u32, sums: [f32; 2]| {
                    if row < part.n_rows {
                        part.finish(gate, up, expert, line, row, sums);
                    }
                };
                store(row, [totals[0][J], totals[1][J]]);
                if two_tiles && !gated {
                    store(row + 16, [totals[1][J], 0.0]);
                }
            }
        });
    }

    /// On f32 activations, up to 8 columns, or pairs of a mixture.
    #[inline(always)]
    pub(super) fn plain<H: Half, const STREAM: bool>(
        p0: Part,
        p1: Part,
        p2: Part,
        x: Glb<F32x2>,
        ids: Glb<u32>,
        gate: Gate,
        k: u32,
        n_cols: u32,
        pairs_per_x: u32,
    ) {
        let pair = thread::block_idx_y();
        let (expert, first_x) = if ids.is_null() {
            (0, 0)
        } else {
            // Which weights, an earlier launch says.
            grid::wait_for_earlier();
            (ids.ld_nc(pair), pair / pairs_per_x)
        };
        let (g, t) = (thread::lane_id() / 4, thread::lane_id() % 4);
        let column = first_x + if g < n_cols { g } else { n_cols - 1 };
        let pairs = x.offset(column as usize * (k / 2) as usize + t as usize);
        let n_pairs = k / 2 - if t < k / 2 { t } else { k / 2 };
        let columns = Plain::<H> { pairs, n_pairs, format: core::marker::PhantomData };
        mmvf::<H, _, 1, STREAM>([choose(p0, p1, p2), p1], gate, columns, k, n_cols, [expert, pair]);
    }

    /// On tiles, up to `8 * BLOCKS` columns.
    #[inline(always)]
    pub(super) fn tiles<H: Half, const BLOCKS: usize, const STREAM: bool>(
        p0: Part,
        p1: Part,
        p2: Part,
        x: Glb<u32>,
        gate: Gate,
        k: u32,
        n_cols: u32,
    ) {
        let words = x.offset(thread::lane_id() as usize);
        let columns = Tiles { words, n_tiles: 2 * k.div_ceil(16) };
        mmvf::<H, _, BLOCKS, STREAM>([choose(p0, p1, p2), p1], gate, columns, k, n_cols, [0, 0]);
    }

    kernels! {
        in "mmvf";
        pub(super) PLAIN: threads(256, 2), early;
        fn (
            p0: Part, p1: Part, p2: Part, x: Glb<F32x2>, ids: Glb<u32>, gate: Gate, k: u32, n_cols: u32,
            pairs_per_x: u32,
        );
        "mmvf_F16" => plain::<f16, { f16::TENSOR }>;
        "mmvf_BF16" => plain::<bf16, { bf16::TENSOR }>;
    }

    kernels! {
        in "mmvf";
        pub(super) TILES: threads(256, 2), early;
        fn (p0: Part, p1: Part, p2: Part, x: Glb<u32>, gate: Gate, k: u32, n_cols: u32);
        "mmvf_F16_n8" => tiles::<f16, 1, { f16::TENSOR }>;
        "mmvf_F16_n16" => tiles::<f16, 2, STREAM_MANY>;
        "mmvf_F16_n32" => tiles::<f16, 4, STREAM_MANY>;
        "mmvf_BF16_n8" => tiles::<bf16, 1, { bf16::TENSOR }>;
        "mmvf_BF16_n16" => tiles::<bf16, 2, STREAM_MANY>;
        "mmvf_BF16_n32" => tiles::<bf16, 4, STREAM_MANY>;
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
    use crate::kernels::round_act;
    use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};

    /// Most columns of one launch.
    pub const MAX_COLS: usize = 32;
    /// Most columns of f32 activations.
    pub const MAX_PLAIN_COLS: usize = 8;

    /// Activations.
    #[derive(Clone, Copy, Debug, PartialEq)]
    pub enum Activations {
        /// f32 [n_cols, k].
        Plain(DevicePtr),
        /// As `round_act` writes them.
        Tiles(DevicePtr),
    }

    /// Arguments; see the contract. `format` is F16 or BF16.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Args<'a> {
        pub format: FormatId,
        pub parts: &'a [Matrix],
        pub glu: Option<Glu>,
        /// Of a mixture plain.
        pub x: Activations,
        pub k: usize,
        /// Of a mixture rows of activations, of which nothing is asked here.
        pub n_cols: usize,
        pub mixture: Option<Mixture>,
    }

    /// One launch for all rows of all matrices.
    pub fn launch(args: &Args<'_>) -> Result<Launch, LaunchError> {
        let kernel = Mmvf::NAME;
        let check = Check(kernel);
        let bf16 = match args.format {
            FormatId::F16 => false,
            FormatId::BF16 => true,
            format => return Err(LaunchError::Format { kernel, format }),
        };
        // A pair is a column by itself.
        let n_cols = if args.mixture.is_some() { 1 } else { args.n_cols };
        let (max, expected) = match args.x {
            Activations::Plain(_) => (MAX_PLAIN_COLS, "1 to 8 with f32 activations"),
            Activations::Tiles(_) if args.mixture.is_some() => (0, "f32 activations of a mixture"),
            Activations::Tiles(_) => (MAX_COLS, "1 to 32"),
        };
        if !(1..=max).contains(&n_cols) {
            let got = args.n_cols as u64;
            return Err(LaunchError::Shape { kernel, what: "n_cols", expected, got });
        }
        check.multiple("k", args.k, 4, "a multiple of 4")?;
        let k = check.size("k", args.k)?;
        let (entry, blocks) = match (args.x, n_cols) {
            (Activations::Plain(_), _) => (["mmvf_F16", "mmvf_BF16"], 1),
            (Activations::Tiles(_), 1..=8) => (["mmvf_F16_n8", "mmvf_BF16_n8"], 1),
            (Activations::Tiles(_), 9..=16) => (["mmvf_F16_n16", "mmvf_BF16_n16"], 2),
            _ => (["mmvf_F16_n32", "mmvf_BF16_n32"], 4),
        };
        let rows = if blocks > 1 && args.glu.is_none() { 32 } else { 16 };
        let (params, n_ctas) =
            with_parts(kernel, Params::new(), args.parts, args.glu, |n_rows| n_rows.div_ceil(rows))?;
        let shape = |params: Params| with_gate(params, args.glu).with(k).with(n_cols as u32);
        let (params, n_lines) = match args.x {
            Activations::Plain(x) => {
                check.aligned("x", x, 8)?;
                let (ids, n_pairs, pairs_per_x) = match args.mixture {
                    None => (DevicePtr::NULL, 1, 1),
                    Some(mixture) => (mixture.ids, mixture.n_pairs, mixture.pairs_per_x),
                };
                check.aligned("ids", ids, 4)?;
                let pairs_per_x = check.size("pairs_per_x", pairs_per_x)?;
                (shape(params.with(x).with(ids)).with(pairs_per_x), check.grid("n_pairs", n_pairs)?)
            }
            Activations::Tiles(x) => {
                check.aligned("x", x, 16)?;
                (shape(params.with(x)), 1)
            }
        };
        Ok(Launch {
            entry: entry[usize::from(bf16)],
            grid: [n_ctas, n_lines, 1],
            cta: THREADS,
            cluster: 1,
            smem_bytes: 4 * WINDOW,
            params,
        })
    }

    /// The row in the registry.
    #[derive(Debug)]
    pub struct Mmvf;

    const F16: FormatId = FormatId::F16;
    const BF16: FormatId = FormatId::BF16;
    const SWIGLU: Glu = Glu::SwigluOai { alpha: 1.702, limit: 7.0 };

    impl Kernel for Mmvf {
        const NAME: &'static str = "mmvf";
        type Case = Case;
        const CASES: &'static [Case] = &[
            // More items than warps, so that registers are refilled; a short last span; k within a fragment.
            Case::plain(F16, &[33], 256 * 19 + 64, 1),
            Case::plain(BF16, &[16], 256 * 9, 3),
            Case::plain(F16, &[5], 20, 2),
            Case::plain(BF16, &[17], 572, 8),
            // As tiles: from 9 columns on two row tiles per CTA, several windows of partial sums.
            Case::plain(F16, &[40], 256 * 17, 9),
            Case::plain(BF16, &[31], 276, 16),
            Case::plain(F16, &[48], 256 * 18 + 16, 17),
            Case::plain(BF16, &[32], 512, 32),
            Case { addends: true, ..Case::plain(F16, &[32, 8, 17], 288, 4) },
            Case { addends: true, ..Case::plain(BF16, &[40, 16, 3], 256, 20) },
            Case { addends: true, glu: Some(Glu::Silu), ..Case::plain(F16, &[33, 33], 2600, 1) },
            Case { glu: Some(Glu::Gelu), ..Case::plain(BF16, &[16, 16], 300, 5) },
            Case { addends: true, glu: Some(SWIGLU), ..Case::plain(F16, &[20, 20], 512, 11) },
            Case { addends: true, experts: Some((4, 1)), ..Case::plain(F16, &[24], 272, 3) },
            Case { experts: Some((5, 3)), glu: Some(Glu::Silu), ..Case::plain(BF16, &[16, 16], 256, 6) },
        ];
        const BENCH: &'static [Case] = &[
            Case::plain(F16, &[4096], 14336, 1),
            Case::plain(F16, &[4096], 14336, 4),
            Case::plain(F16, &[4096], 14336, 8),
            Case::plain(F16, &[4096], 14336, 16),
            Case::plain(F16, &[4096], 14336, 32),
            Case::plain(BF16, &[4096], 14336, 1),
        ];
        const NMSE_MAX: f64 = 1e-10;
        #[cfg(feature = "emu")]
        const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::gpu::PLAIN, super::gpu::TILES];

        fn problem(case: &Case, random: &mut Random) -> Problem {
            let Case { format, k, n_cols, glu, .. } = *case;
            let scratch = round_act::tiles_bytes(n_cols, k);
            float_case::problem(case, random, scratch, move |operands| {
                let tiles = operands.mixture.is_none() && n_cols > 4;
                let mut launches = vec![];
                if tiles {
                    let (x, tiles) = (operands.x, operands.scratch);
                    launches.push(round_act::launch(&round_act::Args {
                        format,
                        x,
                        tiles,
                        n_cols,
                        k,
                        mixture: None,
                    })?);
                }
                let x =
                    if tiles { Activations::Tiles(operands.scratch) } else { Activations::Plain(operands.x) };
                let (parts, mixture) = (&operands.matrices, operands.mixture);
                launches.push(launch(&Args { format, parts, glu, x, k, n_cols, mixture })?);
                Ok(launches)
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

#[cfg(all(test, feature = "emu"))]
mod tests {
    use half::{bf16, f16};

    use super::gpu::{plain, tiles};
    use crate::case::{self, Kernel, Random};
    use crate::device::{F32x2, Glb};
    use crate::emu::{Emulator, Options};
    use crate::kernels::product::{Gate, Part};

    kernels! {
        in "mmvf";
        PLAIN: threads(256);
        fn (
            p0: Part, p1: Part, p2: Part, x: Glb<F32x2>, ids: Glb<u32>, gate: Gate, k: u32, n_cols: u32,
            pairs_per_x: u32,
        );
        "mmvf_F16" => plain::<f16, false>;
        "mmvf_BF16" => plain::<bf16, false>;
    }

    kernels! {
        in "mmvf";
        TILES: threads(256);
        fn (p0: Part, p1: Part, p2: Part, x: Glb<u32>, gate: Gate, k: u32, n_cols: u32);
        "mmvf_F16_n8" => tiles::<f16, 1, false>;
        "mmvf_F16_n16" => tiles::<f16, 2, false>;
        "mmvf_F16_n32" => tiles::<f16, 4, false>;
        "mmvf_BF16_n8" => tiles::<bf16, 1, false>;
        "mmvf_BF16_n16" => tiles::<bf16, 2, false>;
        "mmvf_BF16_n32" => tiles::<bf16, 4, false>;
    }

    /// What tiers without tensor cores for the type run.
    #[test]
    fn a_fragment_at_a_time_is_right_too() {
        for table in [PLAIN, TILES] {
            let emulator = Emulator::with_kernels(Options::default(), table);
            for (i, case) in super::Mmvf::CASES.iter().enumerate() {
                let problem = super::Mmvf::problem(case, &mut Random::new(i as u64));
                let result = case::run(&emulator, Emulator::MODULE, &problem, super::Mmvf::NMSE_MAX);
                result.unwrap_or_else(|error| panic!("{case:?}: {error}"));
            }
        }
    }
}
