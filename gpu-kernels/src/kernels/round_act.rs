//! Activations of products with F16 and BF16 weights: f32 rounded to 16 bits, in the tiles that tensor cores read as B.
//!
//! * Shapes: `x` f32 [n_cols, k], 16-byte aligned, k a multiple of 4; `tiles` 16-bit
//!   [n_cols / 8, 2 · (k / 16), 8, 8], both quotients rounded up: tile (c8, k8) holds columns 8 c8… and k 8 k8…, a column
//!   after the other, 128 bytes together. Zeros beyond n_cols and k. [`tiles_bytes`] says how many bytes.
//! * Mixture: columns are pairs of token and slot sorted by expert (`moe_sort`), each tile of `tile_cols` columns (a multiple
//!   of 8) in its place whether it is full or not; nothing is written for tiles that no columns fill.
//! * Order of tiles: what `ldmatrix` takes without bank conflicts, what a lane of `mma.m16n8k16` finds at word `lane`, and
//!   what wgmma calls core matrices.
//! * Geometry: 256 threads per CTA, a thread per column and tile, so that 8 neighbours write 128 bytes and 4 tiles read
//!   128 bytes of each column. Grid: (k / 256, n_cols / 8).
//! * Bytes: 4 · n_cols · k + 2 · n_cols · k. FLOPs: none.
//! * Tolerance: exact; nearest, ties to even; f16 overflows to infinity.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

const THREADS: u32 = 256;

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod gpu {
    use half::{bf16, f16};

    use super::THREADS;
    use crate::device::{F32x4, Float, Glb, U32x4, thread};

    /// Two values rounded, the first in the low half.
    #[inline(always)]
    pub(crate) fn pair<H: Float>(low: f32, high: f32) -> u32 {
        let bits = |v: f32| u32::from(bytemuck::cast::<H, u16>(H::from_f32(v)));
        bits(low) | bits(high) << 16
    }

    #[inline(always)]
    fn round<H: Float>(
        x: Glb<F32x4>,
        tiles: Glb<U32x4>,
        order: Glb<u32>,
        of_expert: Glb<U32x4>,
        n_cols: u32,
        k: u32,
        tile_cols: u32,
        pairs_per_x: u32,
    ) {
        let i = thread::thread_idx_x();
        let (tile8, c) = (thread::block_idx_x() * (THREADS / 8) + i / 8, i % 8);
        let place = 8 * thread::block_idx_y() + c;
        let n_tiles = 2 * k.div_ceil(16);
        if tile8 >= n_tiles {
            return;
        }
        let (column, n_cols) = if order.is_null() {
            (place, n_cols)
        } else {
            let U32x4([_, first, number, _]) = of_expert.ld_nc(place / tile_cols);
            if number == 0 {
                return;
            }
            let there = place % tile_cols < number;
            let pair = if there { order.ld_nc(first + place % tile_cols) } else { 0 };
            (pair / pairs_per_x, there as u32 * u32::MAX)
        };
        let x = x.offset(column as usize * (k / 4) as usize);
        let load = |k4: u32| if column < n_cols && k4 < k / 4 { x.ld_nc(k4).0 } else { [0.0; 4] };
        let (low, high) = (load(2 * tile8), load(2 * tile8 + 1));
        let words = [
            pair::<H>(low[0], low[1]),
            pair::<H>(low[2], low[3]),
            pair::<H>(high[0], high[1]),
            pair::<H>(high[2], high[3]),
        ];
        tiles.offset(8 * thread::block_idx_y() as usize * n_tiles as usize).st(8 * tile8 + c, U32x4(words));
    }

    kernels! {
        in "round_act";
        pub(super) ENTRIES: threads(256);
        fn (
            x: Glb<F32x4>, tiles: Glb<U32x4>, order: Glb<u32>, of_expert: Glb<U32x4>, n_cols: u32, k: u32,
            tile_cols: u32, pairs_per_x: u32,
        );
        "round_act_F16" => round::<f16>;
        "round_act_BF16" => round::<bf16>;
    }
}

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
pub(crate) use gpu::pair;

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use alloc::{boxed::Box, vec, vec::Vec};

    use half::{bf16, f16};
    use quant::FormatId;

    use super::THREADS;
    use crate::case::{Buffer, Expected, Kernel, Problem, Random, bytes_of};
    use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};

    /// Bytes of the tiles of a shape.
    pub const fn tiles_bytes(n_cols: usize, k: usize) -> usize {
        n_cols.div_ceil(8) * 2 * k.div_ceil(16) * 128
    }

    /// The definition: the tiles as 16-bit patterns.
    pub fn reference(format: FormatId, x: &[f32], k: usize) -> Vec<u16> {
        let n_cols = x.len() / k;
        let n_tiles = 2 * k.div_ceil(16);
        let mut tiles = vec![0; tiles_bytes(n_cols, k) / 2];
        for (column, values) in x.chunks(k).enumerate() {
            for (i, &v) in values.iter().enumerate() {
                let at = ((column / 8 * n_tiles + i / 8) * 8 + column % 8) * 8 + i % 8;
                tiles[at] = match format {
                    FormatId::F16 => f16::from_f32(v).to_bits(),
                    _ => bf16::from_f32(v).to_bits(),
                };
            }
        }
        tiles
    }

    /// Columns of a mixture, as `moe_sort` makes them.
    #[derive(Clone, Copy, Debug)]
    pub struct SortedPairs {
        /// Pairs by expert.
        pub order: DevicePtr,
        /// Tiles of columns: (expert, first, number, 0).
        pub tiles: DevicePtr,
        /// Entries of `tiles`; those that no columns fill have number 0.
        pub n_tiles: usize,
        /// Most columns of a tile.
        pub tile_cols: usize,
        /// Pairs that share a row of activations: the slots of a token, or 1.
        pub pairs_per_x: usize,
    }

    /// Arguments; see the contract. `format` is the weights': F16 or BF16. Of a mixture `n_cols` is not used.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Args {
        pub format: FormatId,
        pub x: DevicePtr,
        pub tiles: DevicePtr,
        pub n_cols: usize,
        pub k: usize,
        pub mixture: Option<SortedPairs>,
    }

    /// One launch for all columns.
    pub fn launch(args: &Args) -> Result<Launch, LaunchError> {
        let kernel = RoundAct::NAME;
        let check = Check(kernel);
        let entry = match args.format {
            FormatId::F16 => "round_act_F16",
            FormatId::BF16 => "round_act_BF16",
            format => return Err(LaunchError::Format { kernel, format }),
        };
        check.multiple("k", args.k, 4, "a multiple of 4")?;
        check.aligned("x", args.x, 16)?;
        check.aligned("tiles", args.tiles, 16)?;
        let k = check.size("k", args.k)?;
        let params = Params::new().with(args.x).with(args.tiles);
        let (n_cols, params) = match args.mixture {
            None => {
                let n_cols = check.size("n_cols", args.n_cols)?;
                let params = params.with(DevicePtr::NULL).with(DevicePtr::NULL).with(n_cols).with(k);
                (args.n_cols, params.with(1u32).with(1u32))
            }
            Some(SortedPairs { order, tiles, n_tiles, tile_cols, pairs_per_x }) => {
                check.aligned("order", order, 4)?;
                check.aligned("tiles", tiles, 16)?;
                check.multiple("tile_cols", tile_cols, 8, "a multiple of 8")?;
                let params = params.with(order).with(tiles).with(0u32).with(k);
                let params = params.with(check.size("tile_cols", tile_cols)?);
                (n_tiles * tile_cols, params.with(check.size("pairs_per_x", pairs_per_x)?))
            }
        };
        let blocks = check.grid("n_cols / 8", n_cols.div_ceil(8))?;
        Ok(Launch {
            entry,
            grid: [(2 * k.div_ceil(16)).div_ceil(THREADS / 8), blocks, 1],
            cta: THREADS,
            cluster: 1,
            smem_bytes: 0,
            params,
        })
    }

    /// The row in the registry.
    #[derive(Debug)]
    pub struct RoundAct;

    /// One case.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Case {
        pub format: FormatId,
        pub n_cols: usize,
        pub k: usize,
    }

    impl Kernel for RoundAct {
        const NAME: &'static str = "round_act";
        type Case = Case;
        const CASES: &'static [Case] = &[
            Case { format: FormatId::F16, n_cols: 1, k: 4 },
            Case { format: FormatId::F16, n_cols: 8, k: 256 },
            Case { format: FormatId::BF16, n_cols: 9, k: 268 },
            Case { format: FormatId::BF16, n_cols: 17, k: 576 },
        ];
        const NMSE_MAX: f64 = 0.0;
        #[cfg(feature = "emu")]
        const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::gpu::ENTRIES];

        fn problem(case: &Case, random: &mut Random) -> Problem {
            let Case { format, n_cols, k } = *case;
            let mut x = random.values(n_cols * k);
            // Beyond f16's largest number, and exactly between two.
            x[0] = 7e4;
            x[1] = 1.0 + 1.0 / 2048.0;
            let tiles = reference(format, &x, k);
            Problem {
                buffers: vec![Buffer::Input(bytes_of(&x)), Buffer::Output(Expected::Exact(bytes_of(&tiles)))],
                launches: Box::new(move |at| {
                    Ok(vec![launch(&Args { format, x: at[0], tiles: at[1], n_cols, k, mixture: None })?])
                }),
            }
        }

        fn bytes(case: &Case) -> u64 {
            (6 * case.n_cols * case.k) as u64
        }

        fn flops(_: &Case) -> u64 {
            0
        }
    }
}
