//! Host side of `mmvq`: references, launcher, cases.

use alloc::{boxed::Box, vec, vec::Vec};

use quant::{ActGroup, BlockFormat, FloatFormat, FormatId, Visitor, info, with_format};

pub use super::MAX_NORM_K;
use super::{COLUMN_FIXED_BYTES, MAX_WARPS, SMALL_SPAN, SMEM_BYTES};
use crate::case::{Buffer, Expected, Kernel, Problem, Random, bytes_of};
use crate::driver::DeviceInfo;
use crate::kernels::output::{self, Output};
use crate::kernels::product::{
    Args, Glu, Matrix, Mixture, Spare, epilogue_reference, quantising_mark, with_parts_and,
    with_quantising_gate,
};
use crate::kernels::quantise_act::{ActScale, Kind, kind_of};
use crate::kernels::{peer, quantise_act, rms_norm};
use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};
use crate::tile::{self, ROWS, SPAN, SPAN_GROUPS, TileLayout};

/// Most columns of one launch.
pub const MAX_COLS: usize = 8;

/// The definition: one row and one column; each group's own sum as `quant` defines it, their sum in f64.
pub fn reference<F: BlockFormat>(row: &[F], column: &[ActGroup]) -> f64 {
    let groups = row.iter().flat_map(|block| (0..F::GROUPS).map(move |g| (block, g)));
    groups.zip(column).map(|((block, g), act)| f64::from(block.dot_group(g, act, 0.0))).sum()
}

/// The same as kernels must compute it, bit for bit: a chain per span, spans in order.
pub fn reference_bits<F: BlockFormat>(row: &[F], column: &[ActGroup]) -> f32 {
    let span = |(blocks, groups): (&[F], &[ActGroup])| {
        let at = (0..groups.len()).map(|g| (&blocks[g / F::GROUPS], g % F::GROUPS));
        at.zip(groups).fold(0.0, |sum, ((block, g), act)| block.dot_group(g, act, sum))
    };
    let spans = row.chunks(SPAN / F::ELEMS).zip(column.chunks(SPAN_GROUPS)).map(span);
    spans.reduce(|total, span| total + span).unwrap_or(0.0)
}

/// Most warps of the form in which groups overlap: of its 255 registers a thread they leave a quarter for the next launch.
const SHORT_WARPS: u32 = 6;

/// What a CTA takes of shared memory besides its own.
const RESERVED_BYTES: u32 = 1024;

/// Most CTAs of which each has a multiprocessor for itself: an H100 has so many.
const ONE_EACH: u32 = 132;

/// Warps of a CTA, by shape alone: enough that all CTAs together fill the machine, no more than there is work for, and
/// such that all have about equally much.
///
/// An SM has registers for 16 warps. With as many row tiles as SMs (an H100 has 132) it holds one CTA of all of them:
/// 16 spans (73 KB of a 4-bit format) are under way. With more, 8, so that an SM holds two CTAs and nobody waits for
/// a second round. So, too, where several columns meet spans of many words: 8 warps were as fast as 16 there (Q8_0), or
/// faster (Q6_K, 21.7 µs and 23.9 with four columns of 14,336 and 4,096 rows on an H100).
fn warps(n_ctas: u32, n_items: u32, n_cols: usize, span_bytes: usize) -> u32 {
    let all = n_cols <= 2 || span_bytes <= SMALL_SPAN;
    let most = if all && n_ctas <= ONE_EACH { MAX_WARPS } else { MAX_WARPS / 2 };
    n_items.div_ceil(n_items.div_ceil(most))
}

/// Longest row of f32 that a kernel quantises on the way: its activations, the partial sums of gate and up and a
/// codebook fit shared memory together.
pub const MAX_FLOATS_K: usize = 60 * SPAN;

/// What a product of one column may do with its activations.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Before {
    /// Take them as they are.
    #[default]
    Nothing,
    /// Norm them: they are f32.
    Norm {
        /// f32 `[k]`
        weight: DevicePtr,
        /// Added to the mean square.
        eps: f32,
    },
    /// Multiply their scales, which are not rounded yet, by a norm's factor: what [`After::Norm`] wrote.
    Factor {
        /// f32 [k / 32]
        squares: DevicePtr,
        /// Added to the mean square.
        eps: f32,
    },
}

/// What a product of one column may do with its results.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum After {
    /// Write them.
    #[default]
    Nothing,
    /// Write what gate and up give quantised instead, as `quantise_act` would: codes to the first matrix's `y`, scales to
    /// the second's.
    Quantise(Kind),
    /// Write those of a single matrix, and what a norm of them needs but for the row's factor.
    Norm {
        /// f32 `[n_rows]`
        weight: DevicePtr,
        /// Codes of results · weight `[n_rows]`.
        q: DevicePtr,
        /// Their scales [n_rows / 32], not rounded yet.
        scales: DevicePtr,
        /// The groups' sums of squares of results, f32 [n_rows / 32].
        squares: DevicePtr,
    },
}

/// Shared memory that a CTA for several columns may take on a device: so much that a multiprocessor holds two.
pub fn room(device: &DeviceInfo) -> u32 {
    device.smem_per_cta_bytes.min((device.smem_per_sm_bytes / 2).saturating_sub(RESERVED_BYTES))
}

/// What a product may do besides: of one column all, of several `smem_bytes`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Besides {
    /// Take more shared memory for partial sums than the 48 KB that every GPU gives: a [`room`].
    pub smem_bytes: u32,
    /// With its activations.
    pub before: Before,
    /// With its results.
    pub after: After,
    /// With L2, while it has nothing else to ask for.
    pub ahead: Ahead,
}

/// Weights that a later launch reads: from a multiple of 16 on, a multiple of 16 bytes. Some of them are asked for, unless
/// the product has three parts.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Ahead {
    /// Where they start.
    pub at: DevicePtr,
    /// How many there are.
    pub n_bytes: usize,
}

impl Ahead {
    fn spare(self, check: Check) -> Result<Spare, LaunchError> {
        check.aligned("weights ahead", self.at, 16)?;
        check.multiple("bytes ahead", self.n_bytes, 16, "a multiple of 16")?;
        // No launch asks for so many.
        Ok(Spare::weights(self.at, u32::try_from(self.n_bytes).unwrap_or(!15)))
    }
}

impl Before {
    fn check(self, check: Check, args: &Args<'_>) -> Result<(), LaunchError> {
        let floats = args.scales == DevicePtr::NULL;
        let (at, align) = match self {
            Before::Nothing => return Ok(()),
            Before::Norm { weight, .. } if floats => (weight, 16),
            Before::Factor { squares, .. } if !floats && args.mixture.is_none() => (squares, 4),
            Before::Norm { .. } => return Err(check.shape("norm", "f32 activations", args.n_cols)),
            Before::Factor { .. } => return Err(check.shape("factor", "codes of no mixture", args.n_cols)),
        };
        if at == DevicePtr::NULL || args.n_cols != 1 {
            return Err(check.shape("norm before a product", "arrays, of one column", args.n_cols));
        }
        if args.k > MAX_NORM_K {
            return Err(check.shape("k of normed activations", "at most 8192", args.k));
        }
        check.aligned("norm before a product", at, align)
    }

    fn with(self, params: Params) -> Params {
        let (array, eps) = match self {
            Before::Nothing => (DevicePtr::NULL, 0.0),
            Before::Norm { weight, eps } => (weight, eps),
            Before::Factor { squares, eps } => (squares, eps),
        };
        params.with(array).with(eps)
    }
}

impl After {
    /// Checks what [`quantising_mark`] does not.
    fn check(self, check: Check, args: &Args<'_>) -> Result<(), LaunchError> {
        let After::Norm { weight, q, scales, squares } = self else { return Ok(()) };
        let ([part], None, None, 1) = (args.parts, args.glu, args.mixture, args.n_cols) else {
            return Err(check.shape("parts before a norm", "one, of one column", args.parts.len()));
        };
        check.multiple("n_rows before a norm", part.n_rows, ROWS, "a multiple of 32")?;
        for (what, at, align) in [
            ("norm's weight", weight, 16),
            ("codes for a norm", q, 16),
            ("scales for a norm", scales, 16),
            ("squares for a norm", squares, 4),
        ] {
            check.aligned(what, at, align)?;
            if at == DevicePtr::NULL {
                return Err(check.shape(what, "an address", 0));
            }
        }
        Ok(())
    }

    fn spare(self) -> Spare {
        match self {
            After::Nothing | After::Quantise(_) => Spare::NONE,
            After::Norm { weight, q, scales, squares } => Spare::norm(weight, q, scales, squares),
        }
    }
}

/// One launch for all matrices.
pub fn launch(args: &Args<'_>) -> Result<Launch, LaunchError> {
    launch_with(args, Besides::default())
}

/// [`launch`] with more than the product.
pub fn launch_with(args: &Args<'_>, besides: Besides) -> Result<Launch, LaunchError> {
    let Besides { smem_bytes, before, after, ahead } = besides;
    let kernel = Mmvq::NAME;
    let check = Check(kernel);
    let columns = if args.mixture.is_some() { 1 } else { args.n_cols };
    if !(1..=MAX_COLS).contains(&columns) {
        let got = args.n_cols as u64;
        return Err(LaunchError::Shape { kernel, what: "n_cols", expected: "1 to 8", got });
    }
    if args.scales == DevicePtr::NULL && columns != 1 {
        return Err(check.shape("n_cols of f32", "1", columns));
    }
    before.check(check, args)?;
    after.check(check, args)?;
    let acts = if let After::Quantise(kind) = after { Some(kind) } else { None };
    let mark = quantising_mark(check, args, acts)?;
    if acts.is_some() && columns != 1 {
        return Err(check.shape("columns of quantised results", "1", columns));
    }
    if args.scales == DevicePtr::NULL && args.k > MAX_FLOATS_K {
        return Err(check.shape("k of f32", "at most 15360", args.k));
    }
    let entry = super::entry(args.format, columns);
    let super::EntryShape { mut name, of_column, n_cols, stage_bytes, book_bytes } =
        entry.ok_or(LaunchError::Format { kernel, format: args.format })?;
    let format = info(args.format);
    check.multiple("k", args.k, format.elems, "a multiple of the format's block")?;
    let k = check.size("k", args.k)?;
    for (what, at, align) in [("q", args.q, 16), ("scales", args.scales, 16)] {
        check.aligned(what, at, align)?;
    }
    let (ids, n_lines, pairs_per_x) = match args.mixture {
        None => (DevicePtr::NULL, 1, 1),
        Some(Mixture { ids, n_pairs, pairs_per_x }) => {
            check.aligned("ids", ids, 4)?;
            let n_pairs = check.grid("n_pairs", n_pairs)?;
            (ids, n_pairs, check.size("pairs_per_x", pairs_per_x)?)
        }
    };

    let layout = TileLayout::new(format.elems, format.bytes);
    let spares = [Spare::NONE, after.spare(), ahead.spare(check)?];
    let (params, n_ctas) = with_parts_and(kernel, Params::new(), args.parts, args.glu, spares, |rows| {
        rows.div_ceil(ROWS as u32)
    })?;

    let n_spans = k.div_ceil(SPAN as u32);
    let per_span = if args.glu.is_some() { 2 } else { 1 };
    let n_items = n_spans * per_span;
    let n_warps = warps(n_ctas.saturating_mul(n_lines), n_items, n_cols, layout.span_bytes);
    if n_cols == 1 {
        let short = n_warps <= SHORT_WARPS && n_ctas.saturating_mul(n_lines) <= ONE_EACH;
        let names = super::short_entries(args.format).filter(|_| short).unwrap_or(of_column);
        name = match (args.scales == DevicePtr::NULL, args.glu.is_some()) {
            (false, false) => names[0],
            (false, true) => names[1],
            (true, _) => names[2],
        };
    }
    let outputs_bytes = (4 * ROWS * n_cols) as u32;
    let (n_warps, window, smem_bytes) = if n_cols == 1 {
        // Activations of the window's spans, and partial sums of its items.
        let span_bytes = stage_bytes + per_span * outputs_bytes;
        let fixed = book_bytes + COLUMN_FIXED_BYTES;
        let spans = n_spans.min((SMEM_BYTES - fixed) / span_bytes);
        if args.scales == DevicePtr::NULL && spans < n_spans {
            return Err(check.shape("k", "short enough for one window where q is f32", args.k));
        }
        (n_warps, spans * per_span, fixed + spans * span_bytes)
    } else {
        // Whole rounds of the warps, and gate and up together; no more warps than have room for a round.
        let fixed = |n_warps: u32| book_bytes + n_warps * stage_bytes + 2 * outputs_bytes;
        let room = SMEM_BYTES.max(smem_bytes);
        let fits = |n_warps: u32| room.saturating_sub(fixed(n_warps)) / outputs_bytes;
        let round = |n_warps: u32| n_warps.next_multiple_of(2);
        let n_warps = (1..=n_warps).rev().find(|&n| fits(n) >= round(n).min(n_items));
        let n_warps =
            n_warps.ok_or_else(|| check.shape("n_cols", "few enough for shared memory", args.n_cols))?;
        let fits = fits(n_warps);
        let window = if fits >= n_items { n_items } else { fits / round(n_warps) * round(n_warps) };
        (n_warps, window, fixed(n_warps) + window * outputs_bytes)
    };
    let params = params.with(args.q).with(args.scales).with(ids);
    let params = with_quantising_gate(params, args.glu, mark).with(k / 32).with(columns as u32);
    let mut params = params.with(window).with(pairs_per_x);
    if n_cols == 1 {
        params = before.with(params);
    }
    Ok(Launch { entry: name, grid: [n_ctas, n_lines, 1], cta: 32 * n_warps, cluster: 1, smem_bytes, params })
}

/// The row in the registry.
#[derive(Debug)]
pub struct Mmvq;

/// One case.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// The weights' format.
    pub format: FormatId,
    /// Rows of each matrix.
    pub rows: &'static [usize],
    /// Weights per row.
    pub k: usize,
    /// Columns; in a mixture tokens.
    pub n_cols: usize,
    /// Whether the two matrices are gate and up.
    pub glu: Option<Glu>,
    /// Whether there are biases and residuals.
    pub extras: bool,
    /// Experts, experts used, and whether each slot has activations of its own.
    pub mixture: Option<(usize, usize, bool)>,
    /// How the activations come.
    pub x: X,
    /// Whether gate and up's results are written quantised.
    pub acts: bool,
    /// [`Besides::smem_bytes`].
    pub smem_bytes: u32,
}

/// Form of a case's activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum X {
    /// Quantised.
    Acts,
    /// f32.
    Floats,
    /// f32, normed on the way.
    Normed,
    /// Quantised by the product before, but for a norm's factor.
    NormBetween,
}

impl Case {
    /// One row of 256, one column.
    pub const fn of(format: FormatId) -> Case {
        Case {
            format,
            rows: &[1],
            k: 256,
            n_cols: 1,
            glu: None,
            extras: false,
            mixture: None,
            x: X::Acts,
            acts: false,
            smem_bytes: 0,
        }
    }
}

/// Weights that are drawn and encoded afresh; larger matrices repeat them, since encoding some formats is slow.
const FRESH_WEIGHTS: usize = 1 << 18;

/// Random weights of a format, as bytes and decoded.
pub struct Weights<'a>(pub &'a mut Random, pub usize);

impl Visitor for Weights<'_> {
    type Output = (Vec<u8>, Vec<f32>);

    /// Formats with an encoder get encoded values. The others get random bytes, and of those only blocks that
    /// decode to numbers of ordinary size: a random scale may be infinite.
    fn block<F: BlockFormat>(self) -> Self::Output {
        let Weights(random, n) = self;
        let total = n;
        let n = n.min(FRESH_WEIGHTS);
        let mut blocks = vec![F::zeroed(); n / F::ELEMS];
        match F::ENCODE {
            quant::format::Encode::Yes => F::encode_row(&random.values(n), None, &mut blocks),
            quant::format::Encode::WithImportance => {
                let values = random.values(n);
                F::encode_row(&values, Some(&vec![1.0; n]), &mut blocks);
            }
            quant::format::Encode::No => {
                let mut decoded = vec![0.0; F::ELEMS];
                for block in &mut blocks {
                    loop {
                        bytemuck::bytes_of_mut(block).fill_with(|| random.bits() as u8);
                        block.decode(&mut decoded);
                        if decoded.iter().all(|v| v.abs() < 1e3) && decoded.iter().any(|v| v.abs() > 1e-3) {
                            break;
                        }
                    }
                }
            }
        }
        let blocks: Vec<F> = blocks.into_iter().cycle().take(total / F::ELEMS).collect();
        let mut decoded = vec![0.0; total];
        for (block, out) in blocks.iter().zip(decoded.chunks_mut(F::ELEMS)) {
            block.decode(out);
        }
        (bytemuck::cast_slice(&blocks).to_vec(), decoded)
    }

    fn float<F: FloatFormat>(self) -> Self::Output {
        let values: Vec<F> = self.0.values(self.1).into_iter().map(F::from_f32).collect();
        (bytemuck::cast_slice(&values).to_vec(), values.iter().map(|v| v.to_f32()).collect())
    }
}

/// Added to the mean square in cases.
const EPS: f32 = 1e-5;

/// What [`room`] gives on an H100.
const ROOM: u32 = 233_472 / 2 - RESERVED_BYTES;

/// Gate and up of an 8B model.
const fn gated(n_cols: usize) -> Case {
    let case =
        Case { rows: &[14336, 14336], k: 4096, n_cols, glu: Some(Glu::Silu), ..Case::of(FormatId::Q4_0) };
    Case { smem_bytes: ROOM, ..case }
}

/// Shapes to time: a down, an up, an attention and an output projection of an 8B model, at one and at eight columns;
/// gate and up in one launch; experts of a mixture.
const BENCH: &[Case] = &[
    bench(FormatId::Q4_0, 4096, 14336, 1),
    bench(FormatId::Q4_0, 4096, 14336, 2),
    bench(FormatId::Q4_0, 4096, 14336, 4),
    bench(FormatId::Q4_0, 4096, 14336, 5),
    bench(FormatId::Q4_0, 4096, 14336, 8),
    bench(FormatId::Q4_0, 14336, 4096, 1),
    bench(FormatId::Q4_0, 4096, 4096, 1),
    bench(FormatId::Q4_0, 4096, 4096, 4),
    bench(FormatId::Q4_0, 4096, 4096, 5),
    bench(FormatId::Q4_0, 4096, 4096, 8),
    Case { rows: &[4096, 1024, 1024], k: 4096, n_cols: 4, ..Case::of(FormatId::Q4_0) },
    Case { rows: &[4096, 1024, 1024], k: 4096, n_cols: 8, smem_bytes: ROOM, ..Case::of(FormatId::Q4_0) },
    bench(FormatId::Q4_0, 128_256, 4096, 1),
    bench(FormatId::Q4_1, 4096, 14336, 1),
    bench(FormatId::Q8_0, 4096, 14336, 1),
    bench(FormatId::Q8_0, 4096, 14336, 2),
    bench(FormatId::Q8_0, 4096, 14336, 4),
    bench(FormatId::Q8_0, 4096, 14336, 5),
    bench(FormatId::Q8_0, 4096, 14336, 8),
    bench(FormatId::Q2_K, 4096, 14336, 1),
    bench(FormatId::Q3_K, 4096, 14336, 1),
    bench(FormatId::Q4_K, 4096, 14336, 1),
    bench(FormatId::Q4_K, 4096, 14336, 2),
    bench(FormatId::Q4_K, 4096, 14336, 4),
    bench(FormatId::Q4_K, 4096, 14336, 8),
    bench(FormatId::Q5_0, 4096, 14336, 1),
    bench(FormatId::Q5_1, 4096, 14336, 1),
    bench(FormatId::Q5_K, 4096, 14336, 1),
    bench(FormatId::Q6_K, 4096, 14336, 1),
    bench(FormatId::Q6_K, 4096, 14336, 2),
    bench(FormatId::Q6_K, 4096, 14336, 4),
    bench(FormatId::Q6_K, 4096, 14336, 5),
    bench(FormatId::Q6_K, 4096, 14336, 8),
    bench(FormatId::Q6_K, 128_256, 4096, 1),
    bench(FormatId::Q6_K, 128_256, 4096, 8),
    bench(FormatId::MXFP4, 4096, 14336, 1),
    bench(FormatId::IQ1_S, 4096, 14336, 1),
    bench(FormatId::IQ1_M, 4096, 14336, 1),
    bench(FormatId::IQ2_XXS, 4096, 14336, 1),
    bench(FormatId::IQ2_XXS, 4096, 14336, 8),
    bench(FormatId::IQ2_XS, 4096, 14336, 1),
    bench(FormatId::IQ2_S, 4096, 14336, 1),
    bench(FormatId::IQ3_XXS, 4096, 14336, 1),
    bench(FormatId::IQ3_S, 4096, 14336, 1),
    bench(FormatId::IQ4_NL, 4096, 14336, 1),
    bench(FormatId::IQ4_XS, 4096, 14336, 1),
    gated(1),
    gated(2),
    gated(4),
    gated(5),
    gated(8),
    Case { rows: &[4096, 1024, 1024], k: 4096, ..Case::of(FormatId::Q4_0) },
    Case { x: X::Floats, ..bench(FormatId::Q4_0, 4096, 14336, 1) },
    Case { x: X::Floats, ..bench(FormatId::Q4_0, 4096, 4096, 1) },
    Case { rows: &[14336, 14336], k: 4096, glu: Some(Glu::Silu), x: X::Normed, ..Case::of(FormatId::Q4_0) },
    Case {
        rows: &[14336, 14336],
        k: 4096,
        glu: Some(Glu::Silu),
        x: X::NormBetween,
        ..Case::of(FormatId::Q4_0)
    },
    Case { rows: &[768], k: 2048, mixture: Some((128, 8, false)), ..Case::of(FormatId::Q4_0) },
    Case { rows: &[768], k: 2048, mixture: Some((128, 8, false)), ..Case::of(FormatId::Q4_K) },
];

const fn bench(format: FormatId, n_rows: usize, k: usize, n_cols: usize) -> Case {
    let rows: &[usize] = match n_rows {
        4096 => &[4096],
        14336 => &[14336],
        128_256 => &[128_256],
        _ => panic!("no such shape"),
    };
    Case { rows, k, n_cols, smem_bytes: ROOM, ..Case::of(format) }
}

/// All rows of a matrix, of weights given as bytes, times the activations.
struct Product<'a> {
    blocks: &'a [u8],
    x: &'a [f32],
    k: usize,
}

impl Visitor for Product<'_> {
    type Output = (Kind, Vec<f64>);

    fn block<F: BlockFormat>(self) -> Self::Output {
        let blocks: &[F] = bytemuck::cast_slice(self.blocks);
        let mut groups = vec![ActGroup::ZERO; self.x.len() / 32];
        ActGroup::quantise(kind_of::<F>().into(), self.x, &mut groups);
        let columns = groups.chunks(self.k / 32);
        let rows = || blocks.chunks(self.k / F::ELEMS);
        (kind_of::<F>(), columns.flat_map(|column| rows().map(|row| reference(row, column))).collect())
    }

    fn float<F: FloatFormat>(self) -> Self::Output {
        unreachable!("{:?} has no blocks", F::ID)
    }
}

/// Weights per row of the product before a norm in cases.
const K_BEFORE: usize = 512;

/// A problem of one column with a norm before it or quantised results, which must have the bits of separate launches.
fn both_ways(case: &Case, random: &mut Random) -> Problem {
    let Case { format, rows, k, glu, x: form, acts, .. } = *case;
    let kind = quantise_act::kind(format).expect("cases name formats of weights");
    let n_parts = rows.len();
    let n_outputs = if glu.is_some() { 1 } else { n_parts };
    let mut buffers: Vec<Buffer> = rows
        .iter()
        .map(|&n_rows| {
            let weights = with_format(format, Weights(random, n_rows * k));
            let (blocks, _) = weights.expect("cases name formats of weights");
            Buffer::Input(tile::pack(format, &blocks, n_rows, k))
        })
        .collect();
    let scale_bytes = |n: usize| n / 32 * size_of::<ActScale>();
    let zeros = |bytes: usize| Buffer::Input(vec![0; bytes]);
    buffers.extend([
        Buffer::Input(bytes_of(&random.values(k))),
        Buffer::Input(bytes_of(&random.values(k))),
        zeros(k),
        zeros(scale_bytes(k)),
    ]);
    // The product before: weights, activations; its results and what it leaves for the norm.
    let before = buffers.len();
    if form == X::NormBetween {
        let weights = with_format(FormatId::Q4_0, Weights(random, k * K_BEFORE));
        let (blocks, _) = weights.expect("a format of weights");
        buffers.extend([
            Buffer::Input(tile::pack(FormatId::Q4_0, &blocks, k, K_BEFORE)),
            Buffer::Input(bytes_of(&random.values(K_BEFORE))),
            zeros(4 * k),
            zeros(k),
            zeros(scale_bytes(k)),
            zeros(k / 8),
        ]);
    }
    // What the separate launches write, the floats first.
    let plain = buffers.len();
    buffers.extend(rows[..n_outputs].iter().map(|n_rows| zeros(4 * n_rows)));
    let checked: Vec<(usize, usize)> = if acts {
        let codes = buffers.len();
        buffers.extend([zeros(rows[0]), zeros(scale_bytes(rows[0]))]);
        vec![(codes, rows[0]), (codes + 1, scale_bytes(rows[0]))]
    } else {
        (0..n_outputs).map(|part| (plain + part, 4 * rows[part])).collect()
    };
    let outputs = buffers.len();
    let same = |(buffer, bytes)| Buffer::Output(Expected::Same { buffer, bytes });
    buffers.extend(checked.into_iter().map(same));

    let launches = move |at: &[DevicePtr]| {
        let [x, weight, q, scales] = at[n_parts..before] else { unreachable!("four of these") };
        let parts = |y: &[DevicePtr]| -> Vec<Matrix> {
            let none = DevicePtr::NULL;
            let y = |p: usize| y.get(p).copied().unwrap_or(none);
            let part = |(p, &n_rows): (usize, &usize)| Matrix {
                w: at[p],
                bias: none,
                residual: none,
                y: y(p),
                n_rows,
            };
            rows.iter().enumerate().map(part).collect()
        };
        let quantise =
            |x, q, scales, k| quantise_act::launch(&quantise_act::Args { kind, x, q, scales, n_cols: 1, k });
        let norm = |x| {
            rms_norm::launch(&rms_norm::Args {
                x,
                residual: DevicePtr::NULL,
                h: DevicePtr::NULL,
                weight,
                output: Output::Act(kind),
                y: q,
                scales,
                n_rows: 1,
                n: k,
                eps: EPS,
            })
        };
        // What the fused launch takes, and does with it.
        let mut taken = (x, DevicePtr::NULL, Before::Nothing);
        let mut launches = vec![];
        match form {
            X::Acts => {
                launches.push(quantise(x, q, scales, k)?);
                taken = (q, scales, Before::Nothing);
            }
            X::Floats => launches.push(quantise(x, q, scales, k)?),
            X::Normed => {
                launches.push(norm(x)?);
                taken.2 = Before::Norm { weight, eps: EPS };
            }
            X::NormBetween => {
                let [w, x_before, h, codes, unscaled, squares] = at[before..plain] else {
                    unreachable!("six of these")
                };
                let part = Matrix { w, bias: DevicePtr::NULL, residual: x, y: h, n_rows: k };
                let product = Args {
                    format: FormatId::Q4_0,
                    parts: &[part],
                    glu: None,
                    q: x_before,
                    scales: DevicePtr::NULL,
                    k: K_BEFORE,
                    n_cols: 1,
                    mixture: None,
                };
                let after = After::Norm { weight, q: codes, scales: unscaled, squares };
                let ahead = Ahead { at: at[0], n_bytes: tile::matrix_bytes(format, rows[0], k) };
                launches.push(launch_with(&product, Besides { after, ahead, ..Besides::default() })?);
                launches.push(norm(h)?);
                taken = (codes, unscaled, Before::Factor { squares, eps: EPS });
            }
        }
        let (separate, fused) = (parts(&at[plain..plain + n_outputs]), parts(&at[outputs..]));
        let args = Args { format, parts: &separate, glu, q, scales, k, n_cols: 1, mixture: None };
        launches.push(launch(&args)?);
        if acts {
            launches.push(quantise(at[plain], at[plain + 1], at[plain + 2], rows[0])?);
        }
        let (q, scales, before) = taken;
        let after = if acts { After::Quantise(kind) } else { After::Nothing };
        let args = Args { parts: &fused, q, scales, ..args };
        launches.push(launch_with(&args, Besides { before, after, ..Besides::default() })?);
        Ok(launches)
    };
    let problem = Problem { buffers, launches: Box::new(launches) };
    if random.is_timing() { output::last_launch(problem) } else { problem }
}

impl Kernel for Mmvq {
    const NAME: &'static str = "mmvq";
    type Case = Case;
    const CASES: &'static [Case] = super::CASES;
    const BENCH: &'static [Case] = BENCH;
    const NMSE_MAX: f64 = 1e-11;
    #[cfg(feature = "emu")]
    const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::ONE, super::SHORT, super::FEW];

    fn problem(case: &Case, random: &mut Random) -> Problem {
        if matches!(case.x, X::Normed | X::NormBetween) || case.acts {
            return both_ways(case, random);
        }
        let Case { format, rows, k, n_cols, glu, extras, mixture, smem_bytes, .. } = *case;
        let (n_expert, n_used, per_slot) = mixture.unwrap_or((1, 1, false));
        let n_pairs = n_cols * n_used;
        let n_x = if per_slot { n_pairs } else { n_cols };
        let x = random.values(n_x * k);
        let ids: Vec<u32> = (0..n_pairs).map(|_| random.below(n_expert as u64) as u32).collect();

        let mut kind = Kind::Q8_0;
        let mut buffers = vec![];
        // Per part: sums [n_pairs, n_rows], bias and residual of the same shape.
        let mut sums = vec![];
        for &n_rows in rows {
            let mut tiles = vec![];
            let mut products = vec![];
            for _ in 0..n_expert {
                let weights = with_format(format, Weights(random, n_rows * k));
                let (blocks, _) = weights.expect("cases name formats of weights");
                tiles.extend(tile::pack(format, &blocks, n_rows, k));
                // For timing, of one row.
                let timed = if random.is_timing() { blocks.len() / n_rows } else { blocks.len() };
                let product = with_format(format, Product { blocks: &blocks[..timed], x: &x, k });
                let (of, mut product) = product.expect("cases name formats of weights");
                product.resize(n_x * n_rows, 0.0);
                kind = of;
                products.push(product);
            }
            let bias = random.values(n_expert * n_rows);
            let residual = random.values(n_pairs * n_rows);
            let mut lines = vec![];
            let mut biases = vec![];
            for pair in 0..n_pairs {
                let (expert, row) = (ids[pair] as usize, if per_slot { pair } else { pair / n_used });
                lines.extend(&products[expert][row * n_rows..][..n_rows]);
                biases.extend(bias[expert * n_rows..][..n_rows].iter().map(|&b| f64::from(b)));
            }
            buffers.extend([
                Buffer::Input(tiles),
                Buffer::Input(bytes_of(&bias)),
                Buffer::Input(bytes_of(&residual)),
            ]);
            sums.push((lines, biases, residual));
        }
        let n_inputs = buffers.len();
        let outputs = if glu.is_some() { 1 } else { rows.len() };
        for part in 0..outputs {
            let (lines, biases, residual) = &sums[part];
            let up = glu.map(|glu| (glu, &sums[1].0[..]));
            let given = |v: f64| if extras { v } else { 0.0 };
            let expected = epilogue_reference(
                lines,
                up,
                |i| given(biases[i]),
                |i| given(sums[1].1[i]),
                |i| given(residual[i].into()),
            );
            buffers.push(Buffer::Output(Expected::F32(expected)));
        }
        let (q, scales) = quantise_act::reference(kind, &x);
        buffers.extend([
            Buffer::Input(bytes_of(&q)),
            Buffer::Input(bytes_of(&scales)),
            Buffer::Input(bytes_of(&ids)),
            Buffer::Input(bytes_of(&x)),
        ]);
        let floats = case.x == X::Floats;
        Problem {
            buffers,
            launches: Box::new(move |at| {
                let given = |at: DevicePtr| if extras { at } else { DevicePtr::NULL };
                let part = |(p, &n_rows): (usize, &usize)| Matrix {
                    w: at[3 * p],
                    bias: given(at[3 * p + 1]),
                    residual: given(at[3 * p + 2]),
                    y: if p < outputs { at[n_inputs + p] } else { DevicePtr::NULL },
                    n_rows,
                };
                let parts: Vec<Matrix> = rows.iter().enumerate().map(part).collect();
                let rest = &at[n_inputs + outputs..];
                let pairs_per_x = if per_slot { 1 } else { n_used };
                let mixture = mixture.map(|_| Mixture { ids: rest[2], n_pairs, pairs_per_x });
                let (q, scales) = if floats { (rest[3], DevicePtr::NULL) } else { (rest[0], rest[1]) };
                let args = Args { format, parts: &parts, glu, q, scales, k, n_cols, mixture };
                Ok(vec![launch_with(&args, Besides { smem_bytes, ..Besides::default() })?])
            }),
        }
    }

    fn peer(case: &Case) -> Option<alloc::string::String> {
        let fused = case.glu.is_some() || case.extras;
        peer::product(case.format, case.rows, case.k, case.n_cols, fused, case.mixture)
    }

    fn bytes(case: &Case) -> u64 {
        let row = info(case.format);
        let n_rows: usize = case.rows.iter().sum();
        let n_matrices = case.mixture.map_or(1, |(experts, used, _)| experts.min(used * case.n_cols));
        let weights = n_matrices * n_rows * case.k / row.elems * row.bytes;
        (weights + case.n_cols * (case.k * 5 / 4 + 4 * n_rows)) as u64
    }

    fn flops(case: &Case) -> u64 {
        let n_cols = case.n_cols * case.mixture.map_or(1, |(_, used, _)| used);
        2 * (case.rows.iter().sum::<usize>() * n_cols * case.k) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The launch of a case, on addresses that nobody reads.
    fn launch_of(case: &Case) -> Launch {
        let at = DevicePtr(256);
        let part = |&n_rows: &usize| Matrix {
            w: at,
            bias: DevicePtr::NULL,
            residual: DevicePtr::NULL,
            y: at,
            n_rows,
        };
        let parts: Vec<Matrix> = case.rows.iter().map(part).collect();
        let mixture = case.mixture.map(|(_, n_used, _)| Mixture {
            ids: at,
            n_pairs: n_used * case.n_cols,
            pairs_per_x: n_used,
        });
        let Case { format, glu, k, n_cols, smem_bytes, .. } = *case;
        let args = Args { format, parts: &parts, glu, q: at, scales: at, k, n_cols, mixture };
        launch_with(&args, Besides { smem_bytes, ..Besides::default() }).unwrap()
    }

    #[test]
    fn launches_keep_enough_under_way_and_fit_an_sm() {
        for case in BENCH {
            let launch = launch_of(case);
            let ctas: u64 = launch.grid.iter().map(|&n| u64::from(n)).product();
            let spans = ctas * u64::from(launch.cta / 32);
            // One column leaves room for the next launch; several have all their partial sums there at a time.
            let sums = case.n_cols * (4 * ROWS * case.k / SPAN) * if case.glu.is_some() { 2 } else { 1 };
            let allowed = if case.n_cols == 1 { 0..=SMEM_BYTES } else { sums as u32..=ROOM };
            assert!(allowed.contains(&launch.smem_bytes), "{case:?}: {} bytes", launch.smem_bytes);
            // What is under way at a time must cover HBM's latency: seven spans for each of 132 SMs, whatever the shape.
            assert!(spans >= 7 * 132, "{case:?}: {spans} spans");
        }
    }

    #[test]
    fn launcher_refuses_what_the_kernel_cannot_take() {
        let at = DevicePtr(256);
        let part = Matrix { w: at, bias: DevicePtr::NULL, residual: DevicePtr::NULL, y: at, n_rows: 4 };
        let parts = [part; 4];
        let args = Args {
            format: FormatId::Q4_0,
            parts: &parts[..1],
            glu: None,
            q: at,
            scales: at,
            k: 64,
            n_cols: 1,
            mixture: None,
        };
        assert!(launch(&args).is_ok());
        let wrong = [
            Args { n_cols: 9, ..args },
            Args { n_cols: 0, ..args },
            Args { k: 40, ..args },
            Args { format: FormatId::F16, ..args },
            Args { q: DevicePtr(8), ..args },
            Args { scales: DevicePtr::NULL, n_cols: 2, ..args },
            Args { scales: DevicePtr::NULL, k: MAX_FLOATS_K + 32, ..args },
            Args { parts: &[], ..args },
            Args { parts: &parts, ..args },
            Args { glu: Some(Glu::Silu), ..args },
            Args { parts: &[Matrix { y: DevicePtr::NULL, ..part }], ..args },
        ];
        for args in wrong {
            assert!(launch(&args).is_err(), "{args:?}");
        }
    }
}
