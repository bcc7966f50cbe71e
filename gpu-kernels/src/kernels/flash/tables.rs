//! The family's kernels: the cases that hold each to its contract, and shapes to time.

use quant::FormatId;

use super::cases::{BASE, Case, bytes, flops, peer, problem};
use super::{Flash, FlashHopper, FlashPlain, FlashSplit, Geometry, SPAN};
use crate::case::{Kernel, Problem, Random, Tiers};
use crate::kernels::quantise_act::Kind;
use crate::kernels::rope::Mode;

const PLAIN: Case = Case { geometry: Geometry::Plain, ..BASE };

const PROMPT: Case = Case { geometry: Geometry::Prompt, ..BASE };

/// A large model's heads.
const BENCH_BASE: Case = Case { dims: [128, 128], n_head: 32, n_head_kv: 8, ..BASE };
const BENCH_PROMPT: Case = Case { geometry: Geometry::Prompt, ..BENCH_BASE };
/// Wide heads: 256 elements, 4 key/value heads with 6 query heads each.
const BENCH_256: Case = Case { dims: [256, 256], n_head: 24, n_head_kv: 4, ..BASE };

const Q8_0: Option<Kind> = Some(Kind::Q8_0);
const Q8_1: Option<Kind> = Some(Kind::Q8_1);

const fn split(len: usize) -> Geometry {
    Geometry::Split { n_spans: len.div_ceil(SPAN), n_sm: 132 }
}

/// Shapes to time: one query over a long cache, then many.
const BENCH: &[Case] = &[
    Case { sequences: &[(1, 1)], ..BENCH_BASE },
    Case { sequences: &[(128, 1)], ..BENCH_BASE },
    Case { acts: Q8_0, sequences: &[(128, 1)], ..BENCH_BASE },
    // Both forms where `DECODE_SPANS` parts them.
    Case { sequences: &[(512, 1)], ..BENCH_BASE },
    Case { sequences: &[(512, 1)], geometry: split(512), ..BENCH_BASE },
    Case { sequences: &[(1024, 1)], ..BENCH_BASE },
    Case { sequences: &[(1024, 1)], geometry: split(1024), ..BENCH_BASE },
    Case { acts: Q8_0, sequences: &[(1024, 1)], geometry: split(1024), ..BENCH_BASE },
    Case { sequences: &[(4096, 1)], geometry: split(4096), ..BENCH_BASE },
    Case { sequences: &[(16_384, 1)], geometry: split(16_384), ..BENCH_BASE },
    Case { sequences: &[(32_768, 1)], geometry: split(32_768), ..BENCH_BASE },
    // Room for twice the spans, as the engine has it one position further on.
    Case { sequences: &[(32_768, 1)], geometry: split(65_536), ..BENCH_BASE },
    Case { sequences: &[(131_072, 1)], geometry: split(131_072), ..BENCH_BASE },
    Case { types: [FormatId::Q8_0; 2], sequences: &[(32_768, 1)], geometry: split(32_768), ..BENCH_BASE },
    Case { types: [FormatId::Q4_0; 2], sequences: &[(32_768, 1)], geometry: split(32_768), ..BENCH_BASE },
    Case { sequences: &[(4096, 512)], geometry: Geometry::Prefill, ..BENCH_BASE },
    Case { types: [FormatId::Q8_0; 2], sequences: &[(4096, 512)], geometry: Geometry::Prefill, ..BENCH_BASE },
    Case { sequences: &[(16_384, 512)], geometry: Geometry::Prefill, ..BENCH_BASE },
    Case { sequences: &[(8192, 2048)], geometry: Geometry::Prefill, ..BENCH_BASE },
    Case { sequences: &[(16_384, 1)], geometry: split(16_384), ..BENCH_256 },
    Case { sequences: &[(4096, 512)], geometry: Geometry::Prefill, ..BENCH_256 },
    Case { sequences: &[(16_384, 512)], geometry: Geometry::Prefill, ..BENCH_256 },
    Case { causal: false, sequences: &[(4096, 512)], geometry: Geometry::Prefill, ..BENCH_256 },
    Case { causal: false, sequences: &[(16_384, 512)], geometry: Geometry::Prefill, ..BENCH_256 },
    // Few query heads to a key, and narrow ones.
    Case { n_head: 8, sequences: &[(16_384, 1)], geometry: split(16_384), ..BENCH_BASE },
    Case { dims: [64, 64], sequences: &[(16_384, 1)], geometry: split(16_384), ..BENCH_BASE },
    Case {
        types: [FormatId::Q8_0; 2],
        dims: [64, 64],
        n_head: 64,
        sequences: &[(7680, 1)],
        geometry: split(7680),
        ..BENCH_BASE
    },
    Case {
        types: [FormatId::Q4_0; 2],
        dims: [64, 64],
        n_head: 64,
        sequences: &[(7680, 1)],
        geometry: split(7680),
        ..BENCH_BASE
    },
    Case { dims: [576, 512], sequences: &[(4096, 1)], geometry: split(4096), ..BENCH_BASE },
];

impl Kernel for Flash {
    const NAME: &'static str = "flash";
    type Case = Case;
    const CASES: &'static [Case] = &[
        BASE,
        // A span's, a block's and a page's edges, and several spans.
        Case { sequences: &[(1, 1), (63, 1), (64, 1), (65, 1)], ..BASE },
        Case { sequences: &[(255, 1), (256, 1), (257, 1), (600, 1)], n_head_kv: 4, ..BASE },
        Case {
            sequences: &[(600, 1), (257, 2), (0, 0), (3, 1)],
            geometry: Geometry::Split { n_spans: 4, n_sm: 132 },
            ..BASE
        },
        // Spans that three CTAs share, where the grid has room for more.
        Case {
            sequences: &[(1100, 1)],
            n_head_kv: 1,
            geometry: Geometry::Split { n_spans: 8, n_sm: 1 },
            ..BASE
        },
        Case { sequences: &[(70, 70)], geometry: Geometry::Prefill, ..BASE },
        // Sequences that share a tile, in groups that do not divide it, and padding among them.
        Case {
            sequences: &[(300, 20), (0, 0), (40, 3), (1, 1), (130, 60)],
            n_head: 6,
            geometry: Geometry::Prefill,
            ..BASE
        },
        // Each head dimension, whole and padded.
        Case { dims: [128, 128], sequences: &[(300, 2)], n_head: 2, n_head_kv: 1, ..BASE },
        Case { dims: [128, 128], sequences: &[(300, 40)], geometry: Geometry::Prefill, ..BASE },
        Case { dims: [80, 80], sequences: &[(90, 1)], ..BASE },
        Case { dims: [72, 72], sequences: &[(90, 20)], geometry: Geometry::Prefill, ..BASE },
        Case { dims: [256, 256], sequences: &[(300, 1)], n_head: 2, n_head_kv: 1, ..BASE },
        Case {
            dims: [256, 256],
            sequences: &[(70, 30)],
            n_head: 3,
            n_head_kv: 1,
            geometry: Geometry::Prefill,
            ..BASE
        },
        Case {
            dims: [192, 128],
            sequences: &[(70, 3)],
            n_head: 1,
            n_head_kv: 1,
            geometry: Geometry::Prefill,
            ..BASE
        },
        Case { dims: [192, 128], sequences: &[(70, 1)], n_head: 1, n_head_kv: 1, ..BASE },
        Case { dims: [576, 512], sequences: &[(70, 2)], n_head: 20, n_head_kv: 1, ..BASE },
        Case {
            dims: [576, 512],
            sequences: &[(40, 3)],
            n_head: 8,
            n_head_kv: 1,
            geometry: Geometry::Prefill,
            ..BASE
        },
        // What models ask for beside causality.
        Case { causal: false, sequences: &[(90, 30)], geometry: Geometry::Prefill, ..BASE },
        Case { window: 70, sequences: &[(400, 1)], ..BASE },
        Case {
            window: 20,
            sequences: &[(400, 1), (10, 1)],
            geometry: Geometry::Split { n_spans: 2, n_sm: 132 },
            ..BASE
        },
        Case { window: 70, sequences: &[(330, 150)], geometry: Geometry::Prefill, ..BASE },
        Case { softcap: 5.0, sequences: &[(90, 20)], geometry: Geometry::Prefill, ..BASE },
        Case {
            softcap: 5.0,
            sinks: true,
            sequences: &[(300, 1)],
            geometry: Geometry::Split { n_spans: 2, n_sm: 132 },
            ..BASE
        },
        Case { sinks: true, sequences: &[(90, 20)], geometry: Geometry::Prefill, ..BASE },
        Case { slopes: true, sequences: &[(90, 20)], geometry: Geometry::Prefill, ..BASE },
        Case { slopes: true, causal: false, sequences: &[(300, 1)], ..BASE },
        // The token's own key and value on the way: at the edges of blocks and pages, in one of several shares, with
        // several tiles to a KV head, alone.
        Case { append: Some(Mode::Norm), ..BASE },
        Case { append: Some(Mode::Neox), sequences: &[(1, 1)], ..BASE },
        Case { append: Some(Mode::Norm), sequences: &[(65, 1)], dims: [128, 128], n_head: 8, ..BASE },
        Case {
            append: Some(Mode::Neox),
            sequences: &[(900, 1)],
            dims: [128, 128],
            geometry: Geometry::Split { n_spans: 32, n_sm: 132 },
            ..BASE
        },
        Case {
            append: Some(Mode::Norm),
            sequences: &[(257, 1)],
            n_head: 20,
            n_head_kv: 1,
            geometry: split(512),
            ..BASE
        },
        Case { append: Some(Mode::Norm), sequences: &[(64, 1), (0, 0), (600, 1), (2, 1)], ..BASE },
        Case { append: Some(Mode::Neox), sequences: &[(160, 1)], dims: [256, 256], window: 70, ..BASE },
        Case { append: Some(Mode::Norm), sequences: &[(64, 1)], dims: [128, 96], sinks: true, ..BASE },
        // Quantised results: groups over two warps, in one, in a tile that they do not fill; rows that do not fill a tile, more
        // than one to a KV head; padding; both ways of appending.
        Case { acts: Q8_0, sequences: &[(65, 1), (0, 0), (300, 1)], n_head: 6, ..BASE },
        Case { acts: Q8_1, sequences: &[(70, 1)], n_head: 22, n_head_kv: 1, ..BASE },
        Case { acts: Q8_1, dims: [128, 128], sequences: &[(300, 1)], n_head: 8, ..BASE },
        Case { acts: Q8_0, dims: [128, 96], sequences: &[(70, 1)], n_head: 10, n_head_kv: 1, ..BASE },
        Case { acts: Q8_0, dims: [256, 256], sequences: &[(70, 1)], sinks: true, ..BASE },
        Case { acts: Q8_1, dims: [576, 512], sequences: &[(70, 1)], n_head: 20, n_head_kv: 1, ..BASE },
        Case { acts: Q8_0, sequences: &[(600, 1), (0, 0)], geometry: split(768), ..BASE },
        Case {
            acts: Q8_1,
            dims: [128, 96],
            sequences: &[(600, 2)],
            sinks: true,
            geometry: split(768),
            ..BASE
        },
        Case {
            acts: Q8_0,
            sequences: &[(300, 20), (0, 0), (40, 3), (130, 18)],
            n_head: 6,
            geometry: Geometry::Prefill,
            ..BASE
        },
        Case {
            acts: Q8_1,
            dims: [128, 128],
            sequences: &[(70, 33)],
            sinks: true,
            geometry: Geometry::Prefill,
            ..BASE
        },
        Case { acts: Q8_0, dims: [96, 32], sequences: &[(70, 20)], geometry: Geometry::Prefill, ..BASE },
        Case {
            acts: Q8_0,
            dims: [256, 256],
            sequences: &[(70, 25)],
            n_head: 3,
            n_head_kv: 1,
            geometry: Geometry::Prefill,
            ..BASE
        },
        Case {
            acts: Q8_1,
            types: [FormatId::Q8_0; 2],
            dims: [128, 128],
            sequences: &[(70, 20)],
            geometry: Geometry::Prefill,
            ..BASE
        },
        // Rotated results, as floats and quantised: over four warps, over two, within one; merged; in tiles.
        Case { rotated: true, sequences: &[(65, 1), (0, 0), (300, 1)], n_head: 6, ..BASE },
        Case {
            rotated: true,
            acts: Q8_0,
            types: [FormatId::Q4_0; 2],
            dims: [128, 128],
            sequences: &[(300, 1)],
            n_head: 8,
            ..BASE
        },
        Case { rotated: true, acts: Q8_1, dims: [192, 192], sequences: &[(70, 1)], n_head_kv: 4, ..BASE },
        Case {
            rotated: true,
            types: [FormatId::Q4_0; 2],
            dims: [128, 128],
            sequences: &[(600, 1), (0, 0)],
            geometry: split(768),
            ..BASE
        },
        Case { rotated: true, acts: Q8_1, sequences: &[(600, 2)], geometry: split(768), ..BASE },
        Case {
            rotated: true,
            acts: Q8_0,
            dims: [128, 128],
            sequences: &[(300, 20), (0, 0), (40, 3)],
            geometry: Geometry::Prefill,
            ..BASE
        },
        Case {
            rotated: true,
            types: [FormatId::Q4_0; 2],
            dims: [256, 256],
            sequences: &[(70, 25)],
            geometry: Geometry::Prefill,
            ..BASE
        },
        Case { acts: Q8_0, append: Some(Mode::Norm), ..BASE },
        Case { acts: Q8_1, append: Some(Mode::Neox), sequences: &[(257, 1)], geometry: split(512), ..BASE },
        // Formats that are widened.
        Case { types: [FormatId::Q8_0; 2], sequences: &[(300, 1)], ..BASE },
        Case { types: [FormatId::Q4_0; 2], sequences: &[(90, 20)], geometry: Geometry::Prefill, ..BASE },
        Case { types: [FormatId::Q4_1, FormatId::Q5_0], dims: [128, 96], sequences: &[(90, 1)], ..BASE },
        Case {
            types: [FormatId::F16, FormatId::Q5_1],
            dims: [256, 256],
            sequences: &[(90, 1)],
            n_head: 2,
            ..BASE
        },
        Case {
            types: [FormatId::Q8_0; 2],
            dims: [128, 128],
            sequences: &[(70, 20)],
            geometry: Geometry::Prefill,
            ..BASE
        },
        Case {
            types: [FormatId::Q8_0, FormatId::F16],
            dims: [576, 512],
            sequences: &[(40, 1)],
            n_head_kv: 1,
            ..BASE
        },
        // Unpacked: a block's and a page's edges, tokens of padding, several shares, few positions to see.
        Case {
            types: [FormatId::Q8_0, FormatId::Q4_0],
            dims: [128, 128],
            sequences: &[(1, 1), (63, 1), (64, 1), (0, 0), (65, 1), (129, 1)],
            ..BASE
        },
        Case {
            types: [FormatId::Q4_0, FormatId::Q8_0],
            dims: [128, 128],
            sequences: &[(700, 1), (0, 0), (256, 1)],
            n_head: 8,
            geometry: split(768),
            ..BASE
        },
        Case { types: [FormatId::Q5_0; 2], dims: [128, 128], window: 70, sequences: &[(400, 1)], ..BASE },
        Case { types: [FormatId::Q5_1; 2], dims: [128, 128], sequences: &[(193, 1)], ..BASE },
        Case { types: [FormatId::Q4_1; 2], sequences: &[(130, 1)], n_head: 6, ..BASE },
        Case { types: [FormatId::Q5_0, FormatId::Q4_1], dims: [256, 256], sequences: &[(97, 1)], ..BASE },
        Case { types: [FormatId::F16, FormatId::Q8_0], sequences: &[(200, 1)], softcap: 5.0, ..BASE },
        // Heads that do not fill a tile, with rows whose blocks begin between words.
        Case { types: [FormatId::Q8_0, FormatId::Q5_0], dims: [96, 32], sequences: &[(140, 1)], ..BASE },
        Case { types: [FormatId::Q5_0, FormatId::Q8_0], dims: [160, 192], sequences: &[(70, 1)], ..BASE },
        Case { types: [FormatId::Q4_0, FormatId::F16], dims: [96, 72], sequences: &[(70, 1)], ..BASE },
        // In tiles of many tokens.
        Case {
            types: [FormatId::Q4_0, FormatId::Q5_1],
            dims: [128, 128],
            sequences: &[(300, 20), (0, 0), (40, 3), (1, 1), (130, 60)],
            n_head: 6,
            geometry: Geometry::Prefill,
            ..BASE
        },
        Case {
            types: [FormatId::Q5_0, FormatId::Q4_1],
            dims: [96, 64],
            sequences: &[(300, 70)],
            window: 100,
            geometry: Geometry::Prefill,
            ..BASE
        },
        Case {
            types: [FormatId::Q8_0, FormatId::F16],
            sequences: &[(64, 17), (129, 20)],
            geometry: Geometry::Prefill,
            ..BASE
        },
        Case {
            types: [FormatId::Q8_0; 2],
            dims: [256, 256],
            sequences: &[(70, 10)],
            n_head_kv: 1,
            geometry: Geometry::Prefill,
            ..BASE
        },
    ];
    const BENCH: &'static [Case] = BENCH;
    const NMSE_MAX: f64 = 2e-6;
    const TIERS: Tiers = Tiers::From(80);
    #[cfg(feature = "emu")]
    const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[
        super::entries::DECODE,
        super::entries::LARGE_DECODE,
        super::entries::PREFILL,
        super::entries::NARROW_PREFILL,
        super::merge::ENTRIES,
    ];

    fn problem(case: &Case, random: &mut Random) -> Problem {
        problem(case, random)
    }
    fn peer(case: &Case) -> Option<alloc::string::String> {
        peer(case)
    }
    fn bytes(case: &Case) -> u64 {
        bytes(case)
    }
    fn flops(case: &Case) -> u64 {
        flops(case)
    }
}

impl Kernel for FlashSplit {
    const NAME: &'static str = "flash_split";
    type Case = Case;
    const CASES: &'static [Case] = &[
        Case { types: [FormatId::F32; 2], sequences: &[(300, 1), (20, 1)], ..BASE },
        Case { types: [FormatId::F32; 2], sequences: &[(90, 30)], geometry: Geometry::Prefill, ..BASE },
        Case {
            types: [FormatId::F32; 2],
            dims: [128, 128],
            sequences: &[(300, 1)],
            geometry: Geometry::Split { n_spans: 2, n_sm: 132 },
            ..BASE
        },
        Case {
            types: [FormatId::BF16; 2],
            dims: [128, 128],
            sequences: &[(70, 20)],
            geometry: Geometry::Prefill,
            ..BASE
        },
        Case {
            types: [FormatId::BF16, FormatId::F16],
            dims: [256, 256],
            sequences: &[(40, 1)],
            n_head: 2,
            ..BASE
        },
        Case {
            types: [FormatId::F32; 2],
            dims: [256, 256],
            sequences: &[(40, 9)],
            geometry: Geometry::Prefill,
            ..BASE
        },
        Case {
            types: [FormatId::F32, FormatId::Q8_0],
            dims: [576, 512],
            sequences: &[(40, 1)],
            n_head_kv: 1,
            ..BASE
        },
        Case { acts: Q8_0, types: [FormatId::F32; 2], dims: [256, 256], sequences: &[(40, 1)], ..BASE },
        Case {
            acts: Q8_1,
            types: [FormatId::BF16; 2],
            dims: [128, 128],
            sequences: &[(40, 20)],
            geometry: Geometry::Prefill,
            ..BASE
        },
    ];
    const BENCH: &'static [Case] = &[
        Case { types: [FormatId::BF16; 2], sequences: &[(16_384, 1)], geometry: split(16_384), ..BENCH_BASE },
        Case { types: [FormatId::F32; 2], sequences: &[(16_384, 1)], geometry: split(16_384), ..BENCH_BASE },
        Case {
            types: [FormatId::BF16; 2],
            sequences: &[(4096, 512)],
            geometry: Geometry::Prefill,
            ..BENCH_BASE
        },
    ];
    const NMSE_MAX: f64 = 1e-9;
    const TIERS: Tiers = Tiers::From(80);
    #[cfg(feature = "emu")]
    const ENTRIES: &'static [&'static [crate::emu::Entry]] =
        &[super::entries::SPLIT_DECODE, super::entries::SPLIT_PREFILL, super::entries::SPLIT_NARROW_PREFILL];

    fn problem(case: &Case, random: &mut Random) -> Problem {
        problem(case, random)
    }
    fn peer(case: &Case) -> Option<alloc::string::String> {
        peer(case)
    }
    fn bytes(case: &Case) -> u64 {
        bytes(case)
    }
    fn flops(case: &Case) -> u64 {
        flops(case)
    }
}

impl Kernel for FlashHopper {
    const NAME: &'static str = "flash_hopper";
    type Case = Case;
    const CASES: &'static [Case] = &[
        Case { sequences: &[(1, 1)], ..PROMPT },
        // A block's, a ring's and a tile's edges; rows that begin and end in the middle of each.
        Case { sequences: &[(127, 5)], ..PROMPT },
        Case { sequences: &[(128, 128)], ..PROMPT },
        Case { sequences: &[(129, 65)], n_head: 2, ..PROMPT },
        Case { sequences: &[(520, 70)], dims: [128, 128], ..PROMPT },
        Case { sequences: &[(700, 33)], dims: [128, 128], n_head: 4, n_head_kv: 1, ..PROMPT },
        // Several sequences in a tile, tokens of padding.
        Case { sequences: &[(40, 3), (0, 0), (300, 20), (1, 1), (0, 0)], ..PROMPT },
        Case { sequences: &[(600, 4), (140, 40)], dims: [128, 128], n_head: 3, n_head_kv: 1, ..PROMPT },
        // Heads that do not fill a tile.
        Case { dims: [80, 80], sequences: &[(150, 30)], ..PROMPT },
        Case { dims: [72, 112], sequences: &[(450, 12)], n_head: 2, ..PROMPT },
        Case { dims: [40, 128], sequences: &[(70, 20)], n_head: 1, n_head_kv: 1, ..PROMPT },
        Case { dims: [256, 256], sequences: &[(230, 40)], n_head: 2, n_head_kv: 1, ..PROMPT },
        Case { dims: [192, 128], sequences: &[(70, 30)], n_head: 1, n_head_kv: 1, ..PROMPT },
        // What models ask for beside causality.
        Case { causal: false, sequences: &[(190, 30)], ..PROMPT },
        Case { window: 70, sequences: &[(430, 150)], ..PROMPT },
        Case { window: 300, sequences: &[(700, 3), (50, 2)], dims: [128, 128], ..PROMPT },
        Case { softcap: 5.0, sequences: &[(190, 20)], ..PROMPT },
        Case { sinks: true, sequences: &[(190, 20)], dims: [128, 128], ..PROMPT },
        Case { softcap: 5.0, causal: false, sequences: &[(150, 20)], dims: [128, 128], ..PROMPT },
        // Unpacked: each format, mixed; edges of pieces, blocks and rings; heads that do not fill a tile; several sequences.
        Case { types: [FormatId::Q8_0; 2], sequences: &[(1, 1)], ..PROMPT },
        Case { types: [FormatId::Q8_0; 2], sequences: &[(700, 70)], dims: [128, 128], ..PROMPT },
        Case { types: [FormatId::Q4_0, FormatId::Q5_1], sequences: &[(129, 65)], ..PROMPT },
        Case {
            types: [FormatId::Q5_0, FormatId::Q4_1],
            sequences: &[(600, 4), (0, 0), (140, 40), (64, 2)],
            dims: [128, 128],
            n_head: 3,
            n_head_kv: 1,
            ..PROMPT
        },
        Case {
            types: [FormatId::Q8_0, FormatId::F16],
            sequences: &[(300, 20), (40, 3)],
            dims: [96, 72],
            ..PROMPT
        },
        Case {
            types: [FormatId::Q8_0, FormatId::Q4_0],
            sequences: &[(230, 40), (33, 1)],
            dims: [256, 256],
            n_head: 2,
            n_head_kv: 1,
            window: 100,
            ..PROMPT
        },
    ];
    /// Prompts of an 8B model and of one with heads of 256, by this kernel and by the one for every GPU.
    const BENCH: &'static [Case] = &[
        Case { sequences: &[(512, 512)], ..BENCH_PROMPT },
        Case { sequences: &[(512, 512)], geometry: Geometry::Prefill, ..BENCH_PROMPT },
        Case { sequences: &[(4096, 512)], ..BENCH_PROMPT },
        Case { types: [FormatId::Q8_0; 2], sequences: &[(4096, 512)], ..BENCH_PROMPT },
        Case { sequences: &[(2048, 2048)], ..BENCH_PROMPT },
        Case { sequences: &[(2048, 2048)], geometry: Geometry::Prefill, ..BENCH_PROMPT },
        Case { sequences: &[(8192, 512)], ..BENCH_PROMPT },
        Case { sequences: &[(8192, 2048)], ..BENCH_PROMPT },
        Case { sequences: &[(8192, 2048)], geometry: Geometry::Prefill, ..BENCH_PROMPT },
        Case { types: [FormatId::Q8_0; 2], sequences: &[(8192, 2048)], ..BENCH_PROMPT },
        Case { types: [FormatId::Q4_0; 2], sequences: &[(8192, 2048)], ..BENCH_PROMPT },
        Case { sequences: &[(8192, 8192)], ..BENCH_PROMPT },
        Case { sequences: &[(32_768, 2048)], ..BENCH_PROMPT },
        Case { sequences: &[(32_768, 2048)], geometry: Geometry::Prefill, ..BENCH_PROMPT },
        Case { sequences: &[(8192, 2048)], dims: [64, 64], ..BENCH_PROMPT },
        Case { sequences: &[(8192, 2048)], dims: [64, 64], geometry: Geometry::Prefill, ..BENCH_PROMPT },
        Case { sequences: &[(8192, 2048)], geometry: Geometry::Prompt, ..BENCH_256 },
        Case {
            types: [FormatId::Q8_0; 2],
            sequences: &[(8192, 2048)],
            geometry: Geometry::Prompt,
            ..BENCH_256
        },
        Case { sequences: &[(8192, 2048)], geometry: Geometry::Prefill, ..BENCH_256 },
        Case { causal: false, sequences: &[(8192, 4096)], ..BENCH_PROMPT },
        Case { causal: false, sequences: &[(8192, 4096)], dims: [64, 64], ..BENCH_PROMPT },
        Case { causal: false, sequences: &[(16_384, 4096)], ..BENCH_PROMPT },
    ];
    const NMSE_MAX: f64 = Flash::NMSE_MAX;
    const TIERS: Tiers = Tiers::Only("sm_90a");
    #[cfg(feature = "emu")]
    const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::hopper::ENTRIES];

    fn problem(case: &Case, random: &mut Random) -> Problem {
        problem(case, random)
    }
    fn peer(case: &Case) -> Option<alloc::string::String> {
        peer(case)
    }
    fn bytes(case: &Case) -> u64 {
        bytes(case)
    }
    fn flops(case: &Case) -> u64 {
        flops(case)
    }
}

impl Kernel for FlashPlain {
    const NAME: &'static str = "flash_plain";
    type Case = Case;
    const CASES: &'static [Case] = &[
        Case { sequences: &[(300, 2), (0, 0), (1, 1)], ..PLAIN },
        Case {
            types: [FormatId::F32; 2],
            dims: [72, 80],
            sequences: &[(33, 33)],
            n_head: 3,
            n_head_kv: 1,
            ..PLAIN
        },
        Case { types: [FormatId::BF16, FormatId::Q8_0], sequences: &[(70, 3)], causal: false, ..PLAIN },
        Case { types: [FormatId::Q4_0, FormatId::Q4_1], window: 40, sinks: true, ..PLAIN },
        Case { types: [FormatId::Q5_0, FormatId::Q5_1], softcap: 5.0, slopes: true, ..PLAIN },
        Case { acts: Q8_1, dims: [64, 96], sequences: &[(70, 2), (0, 0)], sinks: true, ..PLAIN },
        Case { rotated: true, types: [FormatId::Q4_0; 2], dims: [64, 192], ..PLAIN },
        Case { types: [FormatId::Q8_0, FormatId::BF16], dims: [576, 512], n_head: 1, n_head_kv: 1, ..PLAIN },
    ];
    const BENCH: &'static [Case] = &[
        Case { sequences: &[(4096, 1)], geometry: Geometry::Plain, ..BENCH_BASE },
        Case { sequences: &[(512, 512)], geometry: Geometry::Plain, ..BENCH_BASE },
    ];
    /// All in f32.
    const NMSE_MAX: f64 = 1e-10;
    #[cfg(feature = "emu")]
    const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::plain::ENTRIES];

    fn problem(case: &Case, random: &mut Random) -> Problem {
        problem(case, random)
    }
    fn peer(case: &Case) -> Option<alloc::string::String> {
        peer(case)
    }
    fn bytes(case: &Case) -> u64 {
        bytes(case)
    }
    fn flops(case: &Case) -> u64 {
        flops(case)
    }
}
