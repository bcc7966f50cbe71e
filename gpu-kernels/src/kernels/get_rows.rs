//! Rows of a matrix by their numbers, decoded: `y[i][c] = w[ids[i]][c]`.
//!
//! * Shapes: `ids` i32 `[n_ids]`, each below the matrix's rows; `y` f32 [n_ids, k], 16-byte aligned, k a multiple of 4.
//!   `w` [n_rows, k] tiled (`tile.rs`) in any format of weights, or plain f32 rows. Nothing overlaps.
//! * Geometry, block formats: 128 threads per CTA; a lane takes a group of 32 weights of one row: the eight lanes of a span
//!   of 256 all load the span, at once and from the same places, and each unpacks its group; the warp writes the 32 groups,
//!   each 128 bytes in one piece. So one row, the embedding of a decoded token, is a few warps with one round of loads.
//!   Floats: a thread per four columns.
//! * Bytes: n_ids · k · (bits per weight / 8 + 4). FLOPs: 2 per element of a block format.
//! * Tolerance: exact, `BlockFormat::decode`.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod gpu {
    use quant::{BlockFormat, Group};

    use crate::device::{F32x4, Float, Glb, thread};
    use crate::kernels::dequantise::gpu::store_groups;
    use crate::kernels::lookup::InMemory;
    use crate::tile::{
        FRAGMENT, ROWS, SPAN, SPAN_GROUPS, TileLayout, Tiled, block, fragment_offset, load_span_of,
    };

    #[inline(always)]
    pub(super) fn blocks<F: BlockFormat + Tiled>(w: Glb<u8>, ids: Glb<u32>, y: Glb<f32>, n_ids: u32, k: u32) {
        let (lane, warp_start) = (thread::lane_id(), thread::index_1d() - thread::lane_id());
        const GROUPS: u32 = SPAN_GROUPS as u32;
        // A short last span has all its groups' lanes too.
        let per_row = k.div_ceil(SPAN as u32) * GROUPS;
        let n = n_ids * per_row;
        // Lanes past the end work on the last group, for the shuffles.
        let mine = if warp_start + lane < n { warp_start + lane } else { n - 1 };
        let (row, span) = (ids.ld_nc(mine / per_row), mine % per_row / GROUPS);
        let tile = (row / ROWS as u32) as usize * F::LAYOUT.tile_bytes(k as usize);
        let at = w.offset(tile + F::LAYOUT.span_offset(span as usize));
        let whole = F::ELEMS == SPAN || (span + 1) * SPAN as u32 <= k;
        let units = if whole { F::LAYOUT.span_units() } else { F::LAYOUT.tail_units(k as usize) };
        let words = load_span_of::<F>(at, row % ROWS as u32, units as u32);
        let mut group = Group::default();
        const { assert!(SPAN_GROUPS == 8) };
        unroll!(G in 0..8 {
            if mine % GROUPS == G as u32 {
                group = block::<F>(&words, G / F::GROUPS).unpack_group_by(G % F::GROUPS, InMemory);
            }
        });
        store_groups::<F, f32>(&group, y, |from| {
            let item = warp_start + from;
            let column = item % per_row * quant::format::GROUP as u32;
            let there = item < n && column < k;
            there.then_some(((item / per_row) as usize * k as usize + column as usize) / 4)
        });
    }

    /// Four columns per thread, from wherever `load` finds one.
    #[inline(always)]
    #[track_caller]
    fn columns(ids: Glb<u32>, y: Glb<f32>, n_ids: u32, k: u32, load: impl Fn(u32, u32) -> f32) {
        let (i, per_row) = (thread::index_1d(), k / 4);
        if i < n_ids * per_row {
            let (row, c) = (ids.ld_nc(i / per_row), 4 * (i % per_row));
            let values = [load(row, c), load(row, c + 1), load(row, c + 2), load(row, c + 3)];
            y.cast::<F32x4>().st(i, F32x4(values));
        }
    }

    #[inline(always)]
    pub(super) fn fragments<T: Float>(w: Glb<u8>, ids: Glb<u32>, y: Glb<f32>, n_ids: u32, k: u32) {
        let fragment = FRAGMENT as u32;
        columns(ids, y, n_ids, k, |row, c| {
            let tile = fragment_offset((row / fragment) as usize, (c / fragment) as usize, k as usize);
            // The inverse of `tile::fragment_element`.
            let (r, c) = (row % fragment, c % fragment);
            let lane = r % 8 * 4 + c % 8 / 2;
            w.offset(tile).cast::<T>().ld_nc(8 * lane + 4 * (c / 8) + 2 * (r / 8) + c % 2).to_f32()
        });
    }

    #[inline(always)]
    pub(super) fn f32_spans(w: Glb<u8>, ids: Glb<u32>, y: Glb<f32>, n_ids: u32, k: u32) {
        const LAYOUT: TileLayout = <f32 as Tiled>::LAYOUT;
        columns(ids, y, n_ids, k, |row, c| {
            let tile = (row / ROWS as u32) as usize * LAYOUT.tile_bytes(k as usize);
            let span = w.offset(tile + LAYOUT.span_offset((c / SPAN as u32) as usize));
            let (unit, row) = (c % SPAN as u32 / 4, row % ROWS as u32);
            span.cast::<f32>().ld_nc((LAYOUT.unit_offset(unit as usize, row as usize) / 4) as u32 + c % 4)
        });
    }

    #[inline(always)]
    pub(super) fn plain(w: Glb<u8>, ids: Glb<u32>, y: Glb<f32>, n_ids: u32, k: u32) {
        columns(ids, y, n_ids, k, |row, c| w.cast::<f32>().offset(row as usize * k as usize).ld_nc(c));
    }
}

macro_rules! entries {
    ([] $($id:ident => $module:ident :: Block,)*) => {
        #[cfg(any(target_arch = "nvptx64", feature = "emu"))]
        kernels! {
            in "get_rows";
            ENTRIES: threads(128, 4);
            fn (w: Glb<u8>, ids: Glb<u32>, y: Glb<f32>, n_ids: u32, k: u32);
            $(concat!("get_rows_", stringify!($id)) => gpu::blocks::<formats::$module::Block>;)*
            "get_rows_F32" => gpu::f32_spans;
            "get_rows_F16" => gpu::fragments::<f16>;
            "get_rows_BF16" => gpu::fragments::<bf16>;
            "get_rows_plain" => gpu::plain;
        }

        /// Entry for tiles of a format.
        #[cfg(not(target_arch = "nvptx64"))]
        fn entry(format: quant::FormatId) -> Option<&'static str> {
            match format {
                $(quant::FormatId::$id => Some(concat!("get_rows_", stringify!($id))),)*
                quant::FormatId::F32 => Some("get_rows_F32"),
                quant::FormatId::F16 => Some("get_rows_F16"),
                quant::FormatId::BF16 => Some("get_rows_BF16"),
                _ => None,
            }
        }

        /// Every format, and the edges of a warp's share.
        #[cfg(not(target_arch = "nvptx64"))]
        const CASES: &[host::Case] = &[
            $(host::Case { format: quant::FormatId::$id, tiled: true, n_rows: 40, k: 512, n_ids: 5 },)*
            host::Case { format: quant::FormatId::Q4_0, tiled: true, n_rows: 3, k: 32, n_ids: 1 },
            host::Case { format: quant::FormatId::Q8_0, tiled: true, n_rows: 70, k: 576, n_ids: 45 },
            host::Case { format: quant::FormatId::Q4_K, tiled: true, n_rows: 33, k: 2304, n_ids: 15 },
            host::Case { format: quant::FormatId::F32, tiled: true, n_rows: 35, k: 516, n_ids: 7 },
            host::Case { format: quant::FormatId::F16, tiled: true, n_rows: 50, k: 100, n_ids: 9 },
            host::Case { format: quant::FormatId::BF16, tiled: true, n_rows: 20, k: 32, n_ids: 3 },
            host::Case { format: quant::FormatId::F32, tiled: false, n_rows: 9, k: 36, n_ids: 33 },
        ];
    };
}

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
use {
    crate::device::Glb,
    half::{bf16, f16},
    quant::formats,
};
quant::for_each_block_format!(entries![]);

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use alloc::{boxed::Box, vec, vec::Vec};

    use quant::{FormatId, info, with_format};

    use crate::case::{Buffer, Expected, Kernel, Problem, Random, bytes_of};
    use crate::kernels::dequantise::{Shared, THREADS};
    use crate::kernels::mmvq::Weights;
    use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};
    use crate::tile::{self, SPAN, SPAN_GROUPS};

    /// Where rows come from.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Source {
        /// Tiled weights.
        Tiled(FormatId),
        /// f32 rows one after the other, as activations lie.
        Plain,
    }

    /// Arguments; see the contract.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Args {
        pub source: Source,
        pub w: DevicePtr,
        pub ids: DevicePtr,
        pub y: DevicePtr,
        pub n_ids: usize,
        pub k: usize,
    }

    /// One launch for all rows.
    pub fn launch(args: &Args) -> Result<Launch, LaunchError> {
        let kernel = GetRows::NAME;
        let check = Check(kernel);
        let (entry, block) = match args.source {
            Source::Plain => ("get_rows_plain", 1),
            Source::Tiled(format) => {
                let entry = super::entry(format).ok_or(LaunchError::Format { kernel, format })?;
                (entry, info(format).elems)
            }
        };
        check.multiple("k", args.k, block.max(4), "a multiple of the format's block and of 4")?;
        let k = check.size("k", args.k)?;
        let n_ids = check.size("n_ids", args.n_ids)?;
        for (what, at, align) in [("w", args.w, 16), ("ids", args.ids, 4), ("y", args.y, 16)] {
            check.aligned(what, at, align)?;
        }
        let per_row = if block == 1 { args.k / 4 } else { args.k.div_ceil(SPAN) * SPAN_GROUPS };
        let threads = check.size("n_ids * k", args.n_ids.saturating_mul(per_row))?;
        Ok(Launch {
            entry,
            grid: [threads.div_ceil(THREADS), 1, 1],
            cta: THREADS,
            cluster: 1,
            smem_bytes: if block == 1 { 0 } else { Shared::BYTES },
            params: Params::new().with(args.w).with(args.ids).with(args.y).with(n_ids).with(k),
        })
    }

    /// The definition: the rows of a decoded matrix.
    pub fn reference(decoded: &[f32], ids: &[u32], k: usize) -> Vec<f32> {
        ids.iter().flat_map(|&id| &decoded[id as usize * k..][..k]).copied().collect()
    }

    /// The row in the registry.
    #[derive(Debug)]
    pub struct GetRows;

    /// One case.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Case {
        pub format: FormatId,
        pub tiled: bool,
        pub n_rows: usize,
        pub k: usize,
        pub n_ids: usize,
    }

    impl Kernel for GetRows {
        const NAME: &'static str = "get_rows";
        type Case = Case;
        const CASES: &'static [Case] = super::CASES;
        /// The embedding of one token, of a model of 8b, and of a prompt.
        const BENCH: &'static [Case] = &[
            Case { format: FormatId::Q4_0, tiled: true, n_rows: 4096, k: 4096, n_ids: 1 },
            Case { format: FormatId::Q6_K, tiled: true, n_rows: 4096, k: 4096, n_ids: 1 },
            Case { format: FormatId::Q4_0, tiled: true, n_rows: 4096, k: 4096, n_ids: 512 },
            Case { format: FormatId::Q6_K, tiled: true, n_rows: 4096, k: 4096, n_ids: 512 },
        ];
        const NMSE_MAX: f64 = 0.0;
        #[cfg(feature = "emu")]
        const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::ENTRIES];

        fn problem(case: &Case, random: &mut Random) -> Problem {
            let Case { format, tiled, n_rows, k, n_ids } = *case;
            let weights = with_format(format, Weights(random, n_rows * k));
            let (raw, decoded) = weights.expect("cases name formats of weights");
            // The first and the last row, then any.
            let mut ids = vec![n_rows as u32 - 1, 0];
            ids.resize_with(n_ids, || random.below(n_rows as u64) as u32);
            let expected = reference(&decoded, &ids, k);
            let (w, source) = if tiled {
                (tile::pack(format, &raw, n_rows, k), Source::Tiled(format))
            } else {
                (raw, Source::Plain)
            };
            Problem {
                buffers: vec![
                    Buffer::Input(w),
                    Buffer::Input(bytes_of(&ids)),
                    Buffer::Output(Expected::Exact(bytes_of(&expected))),
                ],
                launches: Box::new(move |at| {
                    Ok(vec![launch(&Args { source, w: at[0], ids: at[1], y: at[2], n_ids, k })?])
                }),
            }
        }

        fn bytes(case: &Case) -> u64 {
            let format = info(case.format);
            (case.n_ids * (case.k / format.elems * format.bytes + 4 * case.k)) as u64
        }

        fn flops(case: &Case) -> u64 {
            if info(case.format).elems == 1 { 0 } else { 2 * (case.n_ids * case.k) as u64 }
        }
    }
}
