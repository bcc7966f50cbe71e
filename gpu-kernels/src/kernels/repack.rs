//! Rows of a GGUF matrix to tiles (`tile.rs`), on the device, once at load.
//!
//! * Shapes: `raw` rows `first_row`… of a matrix [n_rows, k], as in the file, any alignment that the format's blocks have
//!   (floats: their size); `tiles` the whole tiled matrix, 16-byte aligned. `first_row` is a multiple of 32, and so is
//!   the number of rows except at the matrix's end: row tiles are written whole, with their padding. Nothing overlaps.
//!   So a matrix can be loaded in pieces, in any order.
//! * Geometry: a thread per word of a row tile, 256 per CTA; row tiles in the grid's second dimension. Stores coalesce; loads
//!   are bytes (halves for F16 and BF16), of which a warp's hit few lines: the copy to the device is what bounds loading.
//! * Bytes: the matrix in both orders. No arithmetic.
//! * Tolerance: exact, `tile::pack` is the reference.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

#[cfg(not(target_arch = "nvptx64"))]
const THREADS: u32 = 256;

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod gpu {
    use crate::device::{Glb, thread};
    use crate::tile::{FRAGMENT, FRAGMENT_BYTES, ROWS, fragment_element};

    /// The layout's sizes; `span_raw_bytes` without the padding of a span.
    #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
    #[repr(C)]
    pub(super) struct Sizes {
        n_rows: u32,
        row_raw_bytes: u32,
        span_raw_bytes: u32,
        span_bytes: u32,
        unit_bytes: u32,
        /// Words of a row tile.
        tile_words: u32,
    }

    #[inline(always)]
    fn spans(raw: Glb<u8>, tiles: Glb<u32>, sizes: Sizes) {
        let (word, tile) = (thread::index_1d(), thread::block_idx_y());
        if word >= sizes.tile_words {
            return;
        }
        let span_words = ROWS as u32 * sizes.span_bytes / 4;
        let unit_words = sizes.unit_bytes / 4;
        let (span, in_span) = (word / span_words, word % span_words);
        let (unit, in_unit) = (in_span / (ROWS as u32 * unit_words), in_span % unit_words);
        let row = tile * ROWS as u32 + in_span / unit_words % ROWS as u32;

        // Where the word's bytes lie in the raw row, and where its span ends there.
        let from = unit * sizes.unit_bytes + 4 * in_unit;
        let start = span * sizes.span_raw_bytes;
        let left = sizes.row_raw_bytes - start;
        let end = if left < sizes.span_raw_bytes { left } else { sizes.span_raw_bytes };
        let line = raw.offset(row as usize * sizes.row_raw_bytes as usize + start as usize);
        let byte = |i: u32| {
            let there = row < sizes.n_rows && from + i < end;
            if there { u32::from(line.ld_nc(from + i)) << (8 * i) } else { 0 }
        };
        let packed = byte(0) | byte(1) | byte(2) | byte(3);
        tiles.offset(tile as usize * sizes.tile_words as usize).st(word, packed);
    }

    #[inline(always)]
    fn fragments(raw: Glb<u16>, tiles: Glb<u32>, n_rows: u32, k: u32, tile_words: u32) {
        let (word, tile) = (thread::index_1d(), thread::block_idx_y());
        if word >= tile_words {
            return;
        }
        let words = FRAGMENT_BYTES as u32 / 4;
        let tiles_of_k = k.div_ceil(FRAGMENT as u32);
        // A row tile of 32 is two rows of fragment tiles.
        let (fragment, in_fragment) = (word / words, word % words);
        let (row16, k16) = (2 * tile + fragment / tiles_of_k, fragment % tiles_of_k);
        let (r, c) = fragment_element((in_fragment / 4) as usize, 2 * (in_fragment % 4) as usize);
        let row = row16 * FRAGMENT as u32 + r as u32;
        let column = k16 * FRAGMENT as u32 + c as u32;
        let line = raw.offset(row as usize * k as usize);
        let element = |column: u32| {
            if row < n_rows && column < k { u32::from(line.ld_nc(column)) } else { 0 }
        };
        let packed = element(column) | element(column + 1) << 16;
        tiles.offset(tile as usize * tile_words as usize).st(word, packed);
    }

    kernels! {
        in "repack";
        pub(super) SPANS: threads(256);
        fn (raw: Glb<u8>, tiles: Glb<u32>, sizes: Sizes);
        "repack_spans" => spans;
    }

    kernels! {
        in "repack";
        pub(super) FRAGMENTS: threads(256);
        fn (raw: Glb<u16>, tiles: Glb<u32>, n_rows: u32, k: u32, tile_words: u32);
        "repack_fragments" => fragments;
    }
}

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use alloc::{boxed::Box, vec, vec::Vec};
    use core::ops::Range;

    use quant::{FormatId, info};

    use super::THREADS;
    use crate::case::{Buffer, Expected, Kernel, Problem, Random};
    use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};
    use crate::tile::{self, ROWS};

    /// Arguments; see the contract.
    #[derive(Clone, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Args {
        pub format: FormatId,
        pub raw: DevicePtr,
        pub tiles: DevicePtr,
        pub n_rows: usize,
        pub k: usize,
        /// The rows that `raw` holds.
        pub rows: Range<usize>,
    }

    /// One launch for these rows.
    pub fn launch(args: &Args) -> Result<Launch, LaunchError> {
        let kernel = Repack::NAME;
        let check = Check(kernel);
        let format = info(args.format);
        if !tile::is_tiled(args.format) {
            return Err(LaunchError::Format { kernel, format: args.format });
        }
        check.multiple("k", args.k, format.elems, "a multiple of the format's block")?;
        let k = check.size("k", args.k)?;
        let Range { start, end } = args.rows;
        check.multiple("first_row", start, ROWS, "a multiple of 32")?;
        if start >= end || end > args.n_rows || (end != args.n_rows && !end.is_multiple_of(ROWS)) {
            let expected = "a range of whole row tiles, or to the matrix's end";
            return Err(LaunchError::Shape { kernel, what: "rows", expected, got: end as u64 });
        }
        check.aligned("tiles", args.tiles, 16)?;
        let n_rows = check.size("rows", end - start)?;
        let tile_bytes = tile::matrix_bytes(args.format, ROWS, args.k);
        let tile_words = check.size("bytes of a row tile", tile_bytes)? / 4;
        let tiles = args.tiles.offset((start / ROWS * tile_bytes) as u64);
        let params = Params::new().with(args.raw).with(tiles).with(n_rows);
        let (entry, params) = match tile::spans(args.format) {
            None => {
                check.aligned("raw", args.raw, 2)?;
                ("repack_fragments", params.with(k).with(tile_words))
            }
            Some(layout) => {
                let row_raw_bytes = check.size("bytes of a row", args.k / format.elems * format.bytes)?;
                let span_raw_bytes = (layout.span_blocks() * layout.block_bytes) as u32;
                let sizes = [layout.span_bytes as u32, layout.unit_bytes as u32, tile_words];
                ("repack_spans", params.with([row_raw_bytes, span_raw_bytes]).with(sizes))
            }
        };
        Ok(Launch {
            entry,
            grid: [tile_words.div_ceil(THREADS), check.grid("row tiles", (end - start).div_ceil(ROWS))?, 1],
            cta: THREADS,
            cluster: 1,
            smem_bytes: 0,
            params,
        })
    }

    /// The row in the registry.
    #[derive(Debug)]
    pub struct Repack;

    /// One case.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Case {
        pub format: FormatId,
        pub n_rows: usize,
        pub k: usize,
        /// Rows of the first of two launches; 0 for one launch.
        pub split: usize,
    }

    impl Kernel for Repack {
        const NAME: &'static str = "repack";
        type Case = Case;
        const CASES: &'static [Case] = super::CASES;
        /// A large model's matrix.
        const BENCH: &'static [Case] = &[
            Case { format: FormatId::Q4_0, n_rows: 4096, k: 14_336, split: 0 },
            Case { format: FormatId::Q4_K, n_rows: 4096, k: 14_336, split: 0 },
            Case { format: FormatId::Q6_K, n_rows: 4096, k: 14_336, split: 0 },
            Case { format: FormatId::IQ3_XXS, n_rows: 4096, k: 14_336, split: 0 },
            Case { format: FormatId::F16, n_rows: 4096, k: 14_336, split: 0 },
        ];
        const NMSE_MAX: f64 = 0.0;
        #[cfg(feature = "emu")]
        const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::gpu::SPANS, super::gpu::FRAGMENTS];

        fn problem(case: &Case, random: &mut Random) -> Problem {
            let Case { format, n_rows, k, split } = *case;
            let row_bytes = k / info(format).elems * info(format).bytes;
            let raw: Vec<u8> = (0..n_rows * row_bytes).map(|_| random.bits() as u8).collect();
            let tiles = tile::pack(format, &raw, n_rows, k);
            Problem {
                buffers: vec![Buffer::Input(raw), Buffer::Output(Expected::Exact(tiles))],
                launches: Box::new(move |at| {
                    let pieces = [0..split, split..n_rows];
                    let pieces = pieces.into_iter().filter(|rows| !rows.is_empty());
                    let piece = |rows: Range<usize>| {
                        let raw = at[0].offset((rows.start * row_bytes) as u64);
                        launch(&Args { format, raw, tiles: at[1], n_rows, k, rows })
                    };
                    pieces.map(piece).collect()
                }),
            }
        }

        fn bytes(case: &Case) -> u64 {
            let raw = case.n_rows * case.k / info(case.format).elems * info(case.format).bytes;
            (raw + tile::matrix_bytes(case.format, case.n_rows, case.k)) as u64
        }

        fn flops(_: &Case) -> u64 {
            0
        }
    }
}

/// Every format, and the edges of row tiles and spans.
macro_rules! cases {
    ([] $($id:ident => $module:ident :: Block,)*) => {
        #[cfg(not(target_arch = "nvptx64"))]
        const CASES: &[host::Case] = &[
            $(host::Case { format: quant::FormatId::$id, n_rows: 33, k: 512, split: 0 },)*
            host::Case { format: quant::FormatId::Q4_0, n_rows: 1, k: 32, split: 0 },
            host::Case { format: quant::FormatId::Q4_0, n_rows: 70, k: 576, split: 64 },
            host::Case { format: quant::FormatId::MXFP4, n_rows: 31, k: 288, split: 0 },
            host::Case { format: quant::FormatId::Q8_0, n_rows: 64, k: 1056, split: 32 },
            host::Case { format: quant::FormatId::F32, n_rows: 35, k: 259, split: 32 },
            host::Case { format: quant::FormatId::F16, n_rows: 33, k: 16, split: 32 },
            host::Case { format: quant::FormatId::BF16, n_rows: 70, k: 130, split: 64 },
            host::Case { format: quant::FormatId::F16, n_rows: 17, k: 15, split: 0 },
        ];
    };
}
quant::for_each_block_format!(cases![]);
