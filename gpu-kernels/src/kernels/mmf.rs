//! F16 or BF16 weights × many columns on tensor cores: `y[c][r] = Σ w[r][i] · x[c][i]`, with what follows a product in
//! the same launch.
//!
//! * Shapes: `w` [n_rows, k] in fragments (`tile.rs`), 16-byte aligned, k a multiple of 4; activations as `round_act`
//!   writes them; `y` f32 [n_cols, n_rows]. Any number of columns; `mmvf` is for up to 32. Parts and epilogue:
//!   `product.rs`.
//! * Mixture: columns are pairs of token and slot sorted by expert (`moe_sort`), in tiles of 64 or 128, activations rounded so
//!   (`round_act`); weights are [n_expert, n_rows, k], biases [n_expert, n_rows]; `y` has a row per pair, unsorted.
//! * Result and tolerance: `mmvf`'s, bit for bit.
//! * Hopper has a kernel of its own for the large tiles: `mmf_hopper.rs`.
//! * Geometry: a CTA computes 128 rows × 128 columns with 8 warps (64 × 32 each), or 64 × 64 with 4 warps (32 × 32 each)
//!   where the large tiles would be too few for the GPU or their two stages too large for its shared memory. Of a gated pair
//!   it takes half the rows of each matrix. Column tiles are neighbours in the grid, so that they read the same weights
//!   at the same time.
//! * Bytes: the weights, 2 · n_cols · k and 4 · n_cols · n_rows once. FLOPs: 2 · n_rows · n_cols · k.
//!
//! Done for speed: (1) both operands come by `cp.async` in stages of 64 of k, contiguous in memory as in shared memory; 5, 3
//! or 2 stages, by the room that the GPU has; (2) A is read by 128-bit loads and B by `ldmatrix`, both without bank conflicts or
//! address arithmetic, because the tiles lie in the order of their registers; (3) the registers of the next 16 of k are
//! loaded before the products of these, also across stages, whose one barrier lies before the last products of a stage;
//! (4) sums of a span and totals both stay in registers; results leave through shared memory in whole lines.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

/// Steps of 16 of k in a stage.
const STEPS: u32 = 4;

/// Rows and columns of a CTA's tile, for W warps of M × N tiles of 16 rows and 8 columns each, `ACROSS` warps side by side.
struct Tile<const ACROSS: u32, const DOWN: u32, const M: usize, const N: usize>;

impl<const ACROSS: u32, const DOWN: u32, const M: usize, const N: usize> Tile<ACROSS, DOWN, M, N> {
    const THREADS: u32 = 32 * ACROSS * DOWN;
    /// Row tiles of 16.
    const ROW_TILES: u32 = DOWN * M as u32;
    /// Blocks of 8 columns.
    const BLOCKS: u32 = ACROSS * N as u32;
    /// 16-byte vectors of weights in a stage, and of weights and activations.
    const A: u32 = Self::ROW_TILES * STEPS * 32;
    const STAGE: u32 = Self::A + Self::BLOCKS * STEPS * 16;
}

type Large = Tile<4, 2, 4, 4>;
type Small = Tile<2, 2, 2, 4>;

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod gpu {
    use half::{bf16, f16};

    use super::{STEPS, Tile};
    use crate::device::mma::{FragmentA, FragmentB, FragmentF32, load_x4};
    use crate::device::{Glb, Smem, U32x4, async_copy, math, sync, thread};
    use crate::kernels::mmvf::Half;
    use crate::kernels::product::{Gate, Part, choose_at};

    /// Stages between two folds of the sums: a span of 256.
    const SPAN_STAGES: u32 = 256 / 16 / STEPS;
    /// Copies of weights, and of activations, per thread and stage: both tiles come out the same.
    const COPIES: usize = 4;

    /// Waits until at most this many of the latest stages are under way: the ring's size less `done`, 1 or 2.
    #[inline(always)]
    fn wait_for_all_but(stages: u32, done: u32) {
        match (stages, done) {
            (5, 1) => async_copy::wait::<4>(),
            (5, _) => async_copy::wait::<3>(),
            (3, 1) => async_copy::wait::<2>(),
            (3, _) | (_, 1) => async_copy::wait::<1>(),
            _ => async_copy::wait::<0>(),
        }
    }

    /// What the products of one step of 16 of k read.
    #[derive(Clone, Copy)]
    struct Step<const M: usize, const N: usize> {
        a: [FragmentA; M],
        b: [FragmentB; N],
    }

    impl<const M: usize, const N: usize> Step<M, N> {
        const ZERO: Self = Step { a: [FragmentA([0; 4]); M], b: [FragmentB([0; 2]); N] };

        /// Step `step` of a stage; `a` and `b` are this lane's first vectors of the warp's part in it.
        #[inline(always)]
        #[track_caller]
        fn load(vectors: Smem<U32x4>, a: u32, b: u32, step: u32) -> Self {
            let mut this = Self::ZERO;
            let mut m = 0;
            while m < M {
                this.a[m] = FragmentA(vectors.ld(a + (m as u32 * STEPS + step) * 32).0);
                m += 1;
            }
            let mut n = 0;
            while n < N {
                let words = load_x4(vectors, b + n as u32 * STEPS * 16 + step * 16);
                this.b[n] = FragmentB([words[0], words[1]]);
                this.b[n + 1] = FragmentB([words[2], words[3]]);
                n += 2;
            }
            this
        }
    }

    /// Totals after one more span.
    #[inline(always)]
    fn add<const M: usize, const N: usize>(totals: &mut [[FragmentF32; N]; M], sums: &[[FragmentF32; N]; M]) {
        let mut m = 0;
        while m < M {
            let mut n = 0;
            while n < N {
                unroll!(R in 0..4 {
                    totals[m][n].0[R] += sums[m][n].0[R];
                });
                n += 1;
            }
            m += 1;
        }
    }

    /// Where in a stage this lane's rows and columns start, in words: the outputs are those that tensor cores would give it.
    #[derive(Clone, Copy)]
    struct Place {
        rows: u32,
        columns: u32,
    }

    impl Place {
        /// The products of pair `pair` of the stage's k, by fma.
        #[inline(always)]
        #[track_caller]
        fn multiply<H: Half, const M: usize, const N: usize>(
            self,
            stage: Smem<u32>,
            pair: u32,
            sums: &mut [[FragmentF32; N]; M],
        ) {
            let value = |word: u32, i: usize| bytemuck::cast::<u16, H>((word >> (16 * i)) as u16).to_f32();
            // A fragment holds the pairs of a row's lower 8 of k in the registers 0 of four lanes, the upper in 2, and those of
            // the row 8 below in 1 and 3.
            let (step, upper, quad) = (pair / 8, pair / 4 % 2, pair % 4);
            let row = self.rows + step * 128 + quad * 4 + 2 * upper;
            let column = self.columns + (2 * step + upper) * 32 + quad;
            let mut columns = [[0; 2]; N];
            let mut n = 0;
            while n < N {
                let column = column + n as u32 * STEPS * 64;
                columns[n] = [stage.ld(column), stage.ld(column + 4)];
                n += 1;
            }
            let mut m = 0;
            while m < M {
                let row = row + m as u32 * STEPS * 128;
                let rows = [stage.ld(row), stage.ld(row + 1)];
                let mut n = 0;
                while n < N {
                    unroll!(R in 0..4 {
                        let mut sum = sums[m][n].0[R];
                        unroll!(I in 0..2 {
                            sum = math::fma(value(rows[R / 2], I), value(columns[n][R % 2], I), sum);
                        });
                        sums[m][n].0[R] = sum;
                    });
                    n += 1;
                }
                m += 1;
            }
        }
    }

    /// The kernel, with tensor cores, or without by chains of fma on the same tiles.
    #[inline(always)]
    pub(super) fn mmf<
        H: Half,
        const TENSOR: bool,
        const ACROSS: u32,
        const DOWN: u32,
        const M: usize,
        const N: usize,
    >(
        p0: Part,
        p1: Part,
        p2: Part,
        x: Glb<U32x4>,
        order: Glb<u32>,
        of_expert: Glb<U32x4>,
        gate: Gate,
        k: u32,
        n_cols: u32,
        stages: u32,
    ) {
        let (threads, row_tiles) =
            (Tile::<ACROSS, DOWN, M, N>::THREADS, Tile::<ACROSS, DOWN, M, N>::ROW_TILES);
        let (blocks, size_a, size) = (
            Tile::<ACROSS, DOWN, M, N>::BLOCKS,
            Tile::<ACROSS, DOWN, M, N>::A,
            Tile::<ACROSS, DOWN, M, N>::STAGE,
        );
        const { assert!(Tile::<ACROSS, DOWN, M, N>::A == COPIES as u32 * Tile::<ACROSS, DOWN, M, N>::THREADS) };
        const {
            assert!(
                Tile::<ACROSS, DOWN, M, N>::STAGE == 2 * COPIES as u32 * Tile::<ACROSS, DOWN, M, N>::THREADS
            )
        };
        let (i, lane, warp) = (thread::thread_idx_x(), thread::lane_id(), thread::warp_id());
        let part = choose_at(p0, p1, p2, thread::block_idx_y());
        let gated = gate.is_some();
        let cta_rows = if gated { row_tiles * 8 } else { row_tiles * 16 };
        let first_row = (thread::block_idx_y() - part.first_cta) * cta_rows;
        let first_block = thread::block_idx_x() * blocks;
        // Of a mixture, the columns of the tile and their place among the sorted pairs; the grid is one tile each.
        let mixture = !order.is_null();
        let (expert, first_pair, n_cols) = if mixture {
            let U32x4([expert, first, number, _]) = of_expert.ld_nc(thread::block_idx_x());
            (expert, first, first_block * 8 + number)
        } else {
            (0, 0, n_cols)
        };
        if n_cols == first_block * 8 {
            return;
        }
        let n_k16 = k.div_ceil(16);
        let n_stages = n_k16.div_ceil(STEPS);
        let vectors: Smem<U32x4> = Smem::dynamic(0, stages * size);
        let words: Smem<u32> = Smem::dynamic(0, 4 * stages * size);

        // The row tile of slot `slot` of the CTA, and its matrix: the upper half of a warp's slots are up's rows. Tiles
        // beyond the matrix repeat its last; they are not stored.
        let last_tile = part.n_rows.div_ceil(16) - 1;
        // Matrices are padded to 32 rows: two row tiles.
        let matrix = expert as usize * 2 * part.n_rows.div_ceil(32) as usize;
        let from_a: [Glb<U32x4>; COPIES] = core::array::from_fn(|j| {
            let at = i + j as u32 * threads;
            let slot = at / (STEPS * 32);
            let (of_warp, slot_of_warp) = (slot / M as u32, slot % M as u32);
            let half = M as u32 / 2;
            let (w, tile) = if !gated {
                (part.w, slot)
            } else {
                let w = if slot_of_warp < half { part.w } else { p1.w };
                (w, of_warp * half + slot_of_warp % half)
            };
            let tile = first_row / 16 + tile;
            let tile = if tile < last_tile { tile } else { last_tile };
            let tile = matrix + tile as usize;
            w.cast::<U32x4>().offset(tile * n_k16 as usize * 32 + (at % (STEPS * 32)) as usize)
        });
        // Blocks beyond the columns repeat the last.
        let last_block = (n_cols - 1) / 8;
        let from_b: [u32; COPIES] = core::array::from_fn(|j| {
            let at = i + j as u32 * threads;
            let block = first_block + at / (STEPS * 16);
            let block = if block < last_block { block } else { last_block };
            block * n_k16 * 16 + at % (STEPS * 16)
        });
        // The steps of k that this thread copies: zeros beyond k, and nothing but zeros beyond the last stage.
        let (step_a, step_b) = (i % (STEPS * 32) / 32, i % (STEPS * 16) / 16);
        let copy_a = |stage: u32, slot: u32| {
            let there = stage * STEPS + step_a < n_k16;
            let mut j = 0;
            while j < COPIES {
                let to = slot * size + i + j as u32 * threads;
                async_copy::copy16_or_zero(vectors, to, from_a[j], stage * STEPS * 32, there);
                j += 1;
            }
        };
        let copy_b = |stage: u32, slot: u32| {
            let there = stage * STEPS + step_b < n_k16;
            let mut j = 0;
            while j < COPIES {
                let to = slot * size + size_a + i + j as u32 * threads;
                async_copy::copy16_or_zero(vectors, to, x, from_b[j] + stage * STEPS * 16, there);
                j += 1;
            }
        };

        // This lane's first vectors of its warp's part of a stage. `ldmatrix` takes two blocks: lanes 0 to 7 name the rows of
        // the first block's lower tile, then its upper tile, then the second block's.
        let (across, down) = (warp % ACROSS, warp / ACROSS);
        let a = down * M as u32 * STEPS * 32 + lane;
        let b = size_a + (across * N as u32 + lane / 16) * STEPS * 16 + lane % 16;

        let mut slot = 0;
        while slot < stages {
            copy_a(slot, slot);
            copy_b(slot, slot);
            async_copy::commit();
            slot += 1;
        }
        wait_for_all_but(stages, 1);
        sync::sync_threads();

        let mut totals = [[FragmentF32::default(); N]; M];
        if TENSOR {
            let mut steps = [Step::<M, N>::load(vectors, a, b, 0), Step::ZERO];
            // The stage in registers, its slot, and the slot of the stage before, which is free.
            let (mut stage, mut slot, mut free) = (0, 0, stages - 1);
            while stage < n_stages {
                let end = if stage + SPAN_STAGES < n_stages { stage + SPAN_STAGES } else { n_stages };
                let mut sums = [[FragmentF32::default(); N]; M];
                while stage < end {
                    unroll!(STEP in 0..4 {
                        const { assert!(STEPS == 4) };
                        if STEP < 3 {
                            let (a, b) = (slot * size + a, slot * size + b);
                            steps[(STEP + 1) % 2] = Step::load(vectors, a, b, STEP as u32 + 1);
                        } else {
                            // Every warp has this stage in registers once all are here. Beyond the last stage lie zeros.
                            wait_for_all_but(stages, 2);
                            sync::sync_threads();
                            free = slot;
                            slot = if slot + 1 < stages { slot + 1 } else { 0 };
                            steps[0] = Step::load(vectors, slot * size + a, slot * size + b, 0);
                        }
                        // The first stage finds every slot filled.
                        if STEP == 0 && stage > 0 {
                            copy_a(stage - 1 + stages, free);
                        }
                        if STEP == 1 && stage > 0 {
                            copy_b(stage - 1 + stages, free);
                            async_copy::commit();
                        }
                        let mut m = 0;
                        while m < M {
                            let mut n = 0;
                            while n < N {
                                H::mma(&mut sums[m][n], steps[STEP % 2].a[m], steps[STEP % 2].b[n]);
                                n += 1;
                            }
                            m += 1;
                        }
                    });
                    stage += 1;
                }
                add(&mut totals, &sums);
            }
        } else {
            let mut stage = 0;
            let mut slot = 0;
            while stage < n_stages {
                let end = if stage + SPAN_STAGES < n_stages { stage + SPAN_STAGES } else { n_stages };
                let mut sums = [[FragmentF32::default(); N]; M];
                while stage < end {
                    let (of_warp_a, of_warp_b) = (slot * size + a - lane, slot * size + size_a);
                    let first = Place {
                        rows: 4 * (of_warp_a + 4 * (lane / 4)),
                        columns: 4 * (of_warp_b + across * N as u32 * STEPS * 16 + 2 * (lane % 4)),
                    };
                    // Pairs in k: rolled, so that registers hold no more than one.
                    let (mut pair, n_pairs) = (0, math::opaque(8 * STEPS));
                    while pair < n_pairs {
                        first.multiply::<H, M, N>(words, pair, &mut sums);
                        pair += 1;
                    }
                    // Every warp is through with this stage: its slot is free.
                    wait_for_all_but(stages, 2);
                    sync::sync_threads();
                    copy_a(stage + stages, slot);
                    copy_b(stage + stages, slot);
                    async_copy::commit();
                    slot = if slot + 1 < stages { slot + 1 } else { 0 };
                    stage += 1;
                }
                add(&mut totals, &sums);
            }
        }
        async_copy::wait::<0>();

        // Through shared memory, a column after the other; rows are swapped in eights, so that the lanes of a fragment hit
        // 32 banks.
        let (n_rows, n_columns) = (row_tiles * 16, blocks * 8);
        let results: Smem<f32> = Smem::dynamic(0, n_rows * n_columns);
        let place = |row: u32, column: u32| column * n_rows + (row ^ (column / 2 % 4 * 8));
        sync::sync_threads();
        let mut m = 0;
        while m < M {
            let mut n = 0;
            while n < N {
                unroll!(R in 0..4 {
                    let row = (down * M as u32 + m as u32) * 16 + lane / 4 + 8 * (R as u32 / 2);
                    let column = (across * N as u32 + n as u32) * 8 + 2 * (lane % 4) + R as u32 % 2;
                    results.st(place(row, column), totals[m][n].0[R]);
                });
                n += 1;
            }
            m += 1;
        }
        sync::sync_threads();
        let row = i % cta_rows;
        // Of a gated pair, the row of the gate in the tile; that of up follows half a warp's rows later.
        let half = M as u32 * 8;
        let gate_row = if gated { row / half * (2 * half) + row % half } else { row };
        let output_row = first_row + row;
        if output_row < part.n_rows {
            let columns_at_once = threads / cta_rows;
            let mut column = i / cta_rows;
            while column < n_columns {
                unroll!(J in 0..4 {
                    let column = column + J as u32 * columns_at_once;
                    if column < n_columns && first_block * 8 + column < n_cols {
                        let sum = results.ld(place(gate_row, column));
                        let up = if gated { results.ld(place(gate_row + half, column)) } else { 0.0 };
                        let line =
                            if mixture { order.ld_nc(first_pair + column) } else { first_block * 8 + column };
                        part.finish(gate, p1, expert, line, output_row, [sum, up]);
                    }
                });
                column += 4 * columns_at_once;
            }
        }
    }

    kernels! {
        in "mmf";
        pub(super) LARGE: threads(256, 1);
        fn (
            p0: Part, p1: Part, p2: Part, x: Glb<U32x4>, order: Glb<u32>, of_expert: Glb<U32x4>, gate: Gate,
            k: u32, n_cols: u32, stages: u32,
        );
        "mmf_F16_128" => mmf::<f16, { f16::TENSOR }, 4, 2, 4, 4>;
        "mmf_BF16_128" => mmf::<bf16, { bf16::TENSOR }, 4, 2, 4, 4>;
    }

    kernels! {
        in "mmf";
        pub(super) SMALL: threads(128, 3);
        fn (
            p0: Part, p1: Part, p2: Part, x: Glb<U32x4>, order: Glb<u32>, of_expert: Glb<U32x4>, gate: Gate,
            k: u32, n_cols: u32, stages: u32,
        );
        "mmf_F16_64" => mmf::<f16, { f16::TENSOR }, 2, 2, 2, 4>;
        "mmf_BF16_64" => mmf::<bf16, { bf16::TENSOR }, 2, 2, 2, 4>;
    }
}

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use alloc::vec;

    use quant::FormatId;

    use super::{Large, Small};
    use crate::case::{Kernel, Problem, Random};
    use crate::driver::DeviceInfo;
    use crate::kernels::float_case::{self, Case};
    use crate::kernels::mmf_hopper;
    use crate::kernels::product::{Glu, Matrix, with_gate, with_parts};
    use crate::kernels::round_act::{self, SortedPairs};
    use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};
    use crate::ptx;

    /// Whether the sums of `wgmma` count as those of `mma`, bit for bit: without, no device gets `Cut::Warpgroups`.
    pub const TRUSTED: bool = true;

    /// What Hopper takes for large tiles: the form that whole models have been run with. Pairs were 4 % faster in the one
    /// shape that was timed (`benches/NOTES.md`).
    const HOPPER_CUT: Cut = Cut::Warpgroups;

    /// How the work is cut into CTAs. Every cut gives the same bits.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Cut {
        /// 64 rows, 64 columns.
        Small,
        /// 128 rows, 128 columns. Takes 64 KiB of shared memory at least.
        Large,
        /// The same for Hopper, a CTA per multiprocessor: only there is its kernel.
        Warpgroups,
        /// The same with two CTAs in a cluster, for 256 rows and 128 columns.
        Pairs,
    }

    impl Cut {
        /// Rows and columns of a tile.
        pub fn tile(self) -> usize {
            if self == Cut::Small { 64 } else { mmf_hopper::TILE }
        }

        /// The faster cut. A mixture's tiles have been chosen.
        fn choose(args: &Args<'_>) -> Result<Cut, LaunchError> {
            let device = args.device;
            let large = match args.mixture {
                None => {
                    let rows: usize = args.parts.iter().map(|part| part.n_rows.div_ceil(128)).sum();
                    // Large tiles for three quarters of the multiprocessors do more than small ones for all.
                    let busy = 4 * rows * args.n_cols.div_ceil(128) >= 3 * device.n_sm as usize;
                    busy && device.smem_per_cta_bytes >= 2 * 16 * Large::STAGE
                }
                Some(SortedPairs { tile_cols, .. }) if matches!(tile_cols, 64 | 128) => tile_cols == 128,
                Some(SortedPairs { tile_cols, .. }) => {
                    return Err(Check(Mmf::NAME).shape("tile_cols", "64 or 128", tile_cols));
                }
            };
            let is_hopper = ptx::runs_hopper(device) && device.smem_per_cta_bytes >= mmf_hopper::BYTES;
            Ok(match large {
                true if TRUSTED && is_hopper => HOPPER_CUT,
                true => Cut::Large,
                false => Cut::Small,
            })
        }
    }

    /// Arguments; see the contract. `format` is F16 or BF16, `x` as `round_act` writes it.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Args<'a> {
        pub format: FormatId,
        pub parts: &'a [Matrix],
        pub glu: Option<Glu>,
        pub x: DevicePtr,
        pub k: usize,
        /// Of a mixture not used.
        pub n_cols: usize,
        /// Its tiles have 64 or 128 columns, which decides on the kernel's.
        pub mixture: Option<SortedPairs>,
        /// It decides on speed alone. 32 KiB of shared memory at least.
        pub device: &'a DeviceInfo,
    }

    /// One launch for all rows of all matrices.
    pub fn launch(args: &Args<'_>) -> Result<Launch, LaunchError> {
        launch_as(args, Cut::choose(args)?)
    }

    /// [`launch`] with a cut of the caller's choice; a mixture's tiles are the cut's.
    pub(crate) fn launch_as(args: &Args<'_>, cut: Cut) -> Result<Launch, LaunchError> {
        let kernel = Mmf::NAME;
        let check = Check(kernel);
        let bf16 = match args.format {
            FormatId::F16 => false,
            FormatId::BF16 => true,
            format => return Err(LaunchError::Format { kernel, format }),
        };
        check.multiple("k", args.k, 4, "a multiple of 4")?;
        let k = check.size("k", args.k)?;
        check.aligned("x", args.x, 16)?;
        let (entry, cta, stage) = match cut {
            Cut::Small => (["mmf_F16_64", "mmf_BF16_64"], Small::THREADS, Small::STAGE),
            Cut::Large => (["mmf_F16_128", "mmf_BF16_128"], Large::THREADS, Large::STAGE),
            Cut::Warpgroups => (["mmf_hopper_F16", "mmf_hopper_BF16"], mmf_hopper::THREADS, 0),
            Cut::Pairs => (["mmf_hopper_F16_pair", "mmf_hopper_BF16_pair"], mmf_hopper::THREADS, 0),
        };
        let tile = cut.tile() as u32;
        let cluster = if cut == Cut::Pairs { 2 } else { 1 };
        let rows_at_once = cluster * if args.glu.is_some() { tile / 2 } else { tile };
        let (params, n_ctas) =
            with_parts(kernel, Params::new(), args.parts, args.glu, |rows| rows.div_ceil(rows_at_once))?;
        let grid_y = check.grid("row tiles", n_ctas as usize)?;
        let (grid_x, n_cols, [order, tiles]) = round_act::columns_of(check, args.n_cols, args.mixture, tile)?;
        let params = with_gate(params.with(args.x).with(order).with(tiles), args.glu);
        let params = params.with(k).with(n_cols);
        let entry = entry[usize::from(bf16)];
        let &DeviceInfo { n_sm, smem_per_cta_bytes, .. } = args.device;
        if matches!(cut, Cut::Warpgroups | Cut::Pairs) {
            let n_items = check.size("tiles", grid_x as usize * grid_y as usize)?;
            let at_once = (n_sm / cluster).max(1);
            return Ok(Launch {
                entry,
                grid: [cluster * n_items.min(at_once), 1, 1],
                cta,
                cluster,
                smem_bytes: mmf_hopper::BYTES,
                params: params.with(grid_x).with(n_items),
            });
        }
        let shared = cut == Cut::Small && grid_x as usize * grid_y as usize >= 2 * n_sm as usize;
        let stages = match smem_per_cta_bytes / (16 * stage) {
            0..=1 => {
                let got = smem_per_cta_bytes.into();
                let expected = "two stages: 32 KiB, or 64 KiB for tiles of 128 columns";
                return Err(LaunchError::Shape { kernel, what: "smem_per_cta_bytes", expected, got });
            }
            2 => 2,
            5.. if !shared => 5,
            _ => 3,
        };
        Ok(Launch {
            entry,
            grid: [grid_x, grid_y, 1],
            cta,
            cluster: 1,
            smem_bytes: stages * 16 * stage,
            params: params.with(stages),
        })
    }

    /// The row in the registry.
    #[derive(Debug)]
    pub struct Mmf;

    const F16: FormatId = FormatId::F16;
    const BF16: FormatId = FormatId::BF16;

    impl Kernel for Mmf {
        const NAME: &'static str = "mmf";
        type Case = Case;
        const CASES: &'static [Case] = &[
            Case::plain(F16, &[64], 256, 64),
            Case::plain(BF16, &[65], 4 * 64 + 20, 33),
            Case::plain(F16, &[3], 4, 1),
            Case::plain(BF16, &[100], 64 * 9 + 16, 70),
            Case { addends: true, ..Case::plain(F16, &[70, 20, 64], 128, 40) },
            Case { addends: true, glu: Some(Glu::Silu), ..Case::plain(F16, &[50, 50], 320, 48) },
            // From 100 columns on a small device: large tiles, whole ones and cut ones.
            Case::plain(F16, &[128], 64 * 9, 128),
            Case { addends: true, experts: Some((5, 3)), ..Case::plain(F16, &[40, 16], 144, 90) },
            Case { experts: Some((2, 1)), glu: Some(Glu::Silu), ..Case::plain(BF16, &[70, 70], 64, 140) },
            Case { addends: true, ..Case::plain(BF16, &[129, 16], 36, 133) },
            Case { glu: Some(Glu::Gelu), ..Case::plain(F16, &[72, 72], 272, 129) },
        ];
        const BENCH: &'static [Case] = &[
            Case::plain(F16, &[4096], 14336, 64),
            Case::plain(F16, &[4096], 14336, 512),
            Case::plain(BF16, &[4096], 14336, 512),
        ];
        const NMSE_MAX: f64 = 1e-10;
        #[cfg(feature = "emu")]
        const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::gpu::LARGE, super::gpu::SMALL];

        fn problem(case: &Case, random: &mut Random) -> Problem {
            let Case { format, k, n_cols, glu, .. } = *case;
            let n_sm = if n_cols < 100 { 64 } else { 1 };
            // Room for 2, 3 and 5 stages of the large tile, for 3 and 5 of the small one.
            let smem_per_cta_bytes = [65_536, 98_304, 166_912][n_cols % 3];
            let device = DeviceInfo { n_sm, smem_per_cta_bytes, ..DeviceInfo::default() };
            let columns = case.experts.map_or(n_cols, |_| case.max_tiles() * case.tile_cols());
            let scratch = round_act::tiles_bytes(columns, k);
            float_case::problem(case, random, scratch, move |operands| {
                let (x, tiles, parts) = (operands.x, operands.scratch, &operands.matrices);
                let mixture = operands.sorted;
                let round = round_act::launch(&round_act::Args { format, x, tiles, n_cols, k, mixture })?;
                let args = Args { format, parts, glu, x: tiles, k, n_cols, mixture, device: &device };
                Ok(vec![round, launch(&args)?])
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
    use quant::FormatId;

    use super::gpu::mmf;
    use super::{Args, TRUSTED, launch};
    use crate::case::{self, Kernel, Random};
    use crate::device::{Glb, U32x4};
    use crate::driver::DeviceInfo;
    use crate::emu::{Emulator, Options};
    use crate::kernels::product::{Gate, Matrix, Part};
    use crate::launch::DevicePtr;

    kernels! {
        in "mmf";
        BY_FMA: threads(256);
        fn (
            p0: Part, p1: Part, p2: Part, x: Glb<U32x4>, order: Glb<u32>, of_expert: Glb<U32x4>, gate: Gate,
            k: u32, n_cols: u32, stages: u32,
        );
        "mmf_F16_128" => mmf::<f16, false, 4, 2, 4, 4>;
        "mmf_BF16_128" => mmf::<bf16, false, 4, 2, 4, 4>;
        "mmf_F16_64" => mmf::<f16, false, 2, 2, 2, 4>;
        "mmf_BF16_64" => mmf::<bf16, false, 2, 2, 2, 4>;
    }

    #[test]
    fn hopper_takes_warpgroups_where_its_driver_takes_their_ptx() {
        let at = DevicePtr(256);
        let part = Matrix { w: at, bias: DevicePtr::NULL, residual: DevicePtr::NULL, y: at, n_rows: 4096 };
        let entry = |sm: u32, driver_version: u32, n_cols: usize| {
            let device = DeviceInfo {
                sm,
                driver_version,
                n_sm: 132,
                smem_per_cta_bytes: 232_448,
                ..DeviceInfo::default()
            };
            let (format, parts, device) = (FormatId::F16, &[part][..], &device);
            let args = Args { format, parts, glu: None, x: at, k: 4096, n_cols, mixture: None, device };
            launch(&args).unwrap().entry
        };
        assert_eq!(entry(90, 12_040, 512).starts_with("mmf_hopper_F16"), TRUSTED);
        assert_eq!(entry(90, 12_030, 512), "mmf_F16_128");
        assert_eq!(entry(89, 12_040, 512), "mmf_F16_128");
        assert_eq!(entry(90, 12_040, 128), "mmf_F16_64");
    }

    /// What tiers without tensor cores for the type run.
    #[test]
    fn chains_of_fma_are_right_too() {
        let emulator = Emulator::with_kernels(Options::default(), BY_FMA);
        for (i, case) in super::Mmf::CASES.iter().enumerate() {
            let problem = super::Mmf::problem(case, &mut Random::new(i as u64));
            let result = case::run(&emulator, Emulator::MODULE, &problem, super::Mmf::NMSE_MAX);
            result.unwrap_or_else(|error| panic!("{case:?}: {error}"));
        }
    }
}
