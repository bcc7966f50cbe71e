//! Host side of `mmd_hopper`: the choice of a cut, launcher, cases.

use alloc::{boxed::Box, vec};

use quant::{FormatId, info, with_format};

use super::{Flat, Form, Square, THREADS, Wide, entry, rows};
use crate::case::{Buffer, Expected, Kernel, Problem, Random, Tiers, bytes_of};
use crate::driver::DeviceInfo;
use crate::kernels::float_case;
use crate::kernels::mmvq::Weights;
use crate::kernels::product::{Glu, Matrix, with_gate, with_parts};
use crate::kernels::round_act::{self, SortedPairs};
use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};
use crate::tile;

/// How the work is cut into tiles. Every cut gives the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// 128 rows, 128 columns.
    Square,
    /// 64 rows, 128 columns.
    Flat,
    /// 128 rows, 256 columns.
    Wide,
}

impl Cut {
    /// Rows and columns of a tile.
    pub const fn tile(self) -> [u32; 2] {
        match self {
            Cut::Square => [rows::<Square>(), Square::COLS],
            Cut::Flat => [rows::<Flat>(), Flat::COLS],
            Cut::Wide => [rows::<Wide>(), Wide::COLS],
        }
    }

    /// What a tile takes, in nanoseconds for 64 of k, measured on an H100 (`benches/NOTES.md`).
    const fn time(self) -> usize {
        match self {
            Cut::Square => 585,
            Cut::Flat => 387,
            Cut::Wide => 890,
        }
    }

    /// The fastest cut. Tiles of a mixture have 128 columns.
    fn choose(args: &Args<'_>) -> Cut {
        let n_sm = (args.device.n_sm as usize).max(1);
        let time = |cut: Cut| {
            let [rows, cols] = cut.tile().map(|n| n as usize);
            let (rows, parts) = if args.glu.is_some() { (rows / 2, 1) } else { (rows, args.parts.len()) };
            let down: usize = args.parts[..parts].iter().map(|part| part.n_rows.div_ceil(rows)).sum();
            let across = args.mixture.map_or(args.n_cols.div_ceil(cols), |sorted| sorted.n_tiles);
            (down * across).div_ceil(n_sm) * cut.time()
        };
        let cuts: &[Cut] = match args.mixture {
            None => &[Cut::Square, Cut::Flat, Cut::Wide],
            Some(_) => &[Cut::Square, Cut::Flat],
        };
        cuts.iter().copied().min_by_key(|&cut| time(cut)).unwrap_or(Cut::Square)
    }
}

/// Arguments; see the contract. `x` and `scales` as `round_act::launch_scaled` writes them.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)] // the contract's names
pub struct Args<'a> {
    pub format: FormatId,
    pub parts: &'a [Matrix],
    pub glu: Option<Glu>,
    pub x: DevicePtr,
    pub scales: DevicePtr,
    pub k: usize,
    /// Of a mixture not used.
    pub n_cols: usize,
    /// Its tiles have 128 columns.
    pub mixture: Option<SortedPairs>,
    /// It decides on speed alone.
    pub device: &'a DeviceInfo,
}

/// One launch for all rows of all matrices.
pub fn launch(args: &Args<'_>) -> Result<Launch, LaunchError> {
    launch_as(args, Cut::choose(args))
}

/// [`launch`] with a cut of the caller's choice.
pub(crate) fn launch_as(args: &Args<'_>, cut: Cut) -> Result<Launch, LaunchError> {
    let kernel = MmdHopper::NAME;
    let check = Check(kernel);
    let (entry, smem_bytes) =
        entry(args.format, cut).ok_or(LaunchError::Format { kernel, format: args.format })?;
    check.multiple("k", args.k, info(args.format).elems, "a multiple of the format's block")?;
    let k = check.size("k", args.k)?;
    for (what, at, align) in [("x", args.x, 16), ("scales", args.scales, 4)] {
        check.aligned(what, at, align)?;
        if at == DevicePtr::NULL {
            return Err(check.shape(what, "an array", 0));
        }
    }
    let [rows, cols] = cut.tile();
    let rows_at_once = if args.glu.is_some() { rows / 2 } else { rows };
    let (params, n_down) =
        with_parts(kernel, Params::new(), args.parts, args.glu, |rows| rows.div_ceil(rows_at_once))?;
    let (n_across, n_cols, [order, tiles]) = round_act::columns_of(check, args.n_cols, args.mixture, cols)?;
    let n_items = check.size("tiles", n_across as usize * n_down as usize)?;
    let params = params.with(args.x).with(args.scales).with(order).with(tiles);
    let params = with_gate(params, args.glu).with(k).with(n_cols).with(n_across).with(n_items);
    let grid = [n_items.min(args.device.n_sm.max(1)), 1, 1];
    Ok(Launch { entry, grid, cta: THREADS, cluster: 1, smem_bytes, params })
}

/// The row in the registry.
#[derive(Debug)]
pub struct MmdHopper;

/// One case.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// The shape, and everything a launch may have.
    pub product: float_case::Case,
    /// How the work is cut.
    pub cut: Cut,
    /// Multiprocessors that the launch counts on.
    pub n_sm: u32,
    /// Whether the result is compared with that of [`Cut::Square`], bit for bit.
    pub against: bool,
}

const Q4_0: FormatId = FormatId::Q4_0;
const Q8_0: FormatId = FormatId::Q8_0;
const Q4_K: FormatId = FormatId::Q4_K;

/// Without extras, on few multiprocessors, so that a CTA has several tiles.
const fn plain(format: FormatId, cut: Cut, n_rows: &'static [usize], k: usize, n_cols: usize) -> Case {
    let product = float_case::Case::plain(format, n_rows, k, n_cols);
    Case { product, cut, n_sm: 2, against: false }
}

/// [`plain`] compared with the square cut.
const fn against(format: FormatId, cut: Cut, n_rows: &'static [usize], k: usize, n_cols: usize) -> Case {
    Case { against: true, ..plain(format, cut, n_rows, k, n_cols) }
}

/// With biases and residuals, of a gated pair if there is an activation, of a mixture of experts if there are any.
const fn added(case: Case, glu: Option<Glu>, experts: Option<(usize, usize)>) -> Case {
    Case { product: float_case::Case { addends: true, glu, experts, ..case.product }, ..case }
}

/// A row of the benchmark.
const fn timed(format: FormatId, cut: Cut, n_rows: &'static [usize], k: usize, n_cols: usize) -> Case {
    Case { n_sm: 132, ..plain(format, cut, n_rows, k, n_cols) }
}

/// The same of gate and up.
const fn gated(case: Case) -> Case {
    Case { product: float_case::Case { glu: Some(Glu::Silu), ..case.product }, ..case }
}

/// Every format, then the edges of tiles, stages, spans and the ring, and each extra; last the cuts against each other.
const CASES: &[Case] = {
    const EDGES: &[Case] = &[
        plain(Q4_0, Cut::Square, &[127], 32, 1),
        plain(Q4_0, Cut::Square, &[257], 2304, 260),
        plain(Q8_0, Cut::Square, &[129], 288, 127),
        plain(Q8_0, Cut::Square, &[40, 200, 64], 352, 70),
        plain(Q4_0, Cut::Flat, &[65], 1184, 129),
        plain(Q4_K, Cut::Flat, &[1], 1280, 140),
        plain(Q4_0, Cut::Wide, &[130], 1184, 257),
        plain(Q8_0, Cut::Wide, &[20, 140], 64, 300),
        added(plain(Q4_0, Cut::Square, &[37, 130], 288, 12), None, None),
        added(plain(Q8_0, Cut::Square, &[72; 2], 544, 129), Some(Glu::Silu), None),
        Case { n_sm: 1, ..added(plain(Q4_K, Cut::Flat, &[100; 2], 512, 20), Some(Glu::Gelu), None) },
        added(plain(Q4_0, Cut::Wide, &[70; 2], 320, 280), Some(Glu::Silu), None),
        added(plain(FormatId::Q5_0, Cut::Square, &[40, 16], 160, 190), None, Some((5, 2))),
        added(plain(FormatId::MXFP4, Cut::Flat, &[70; 2], 64, 140), Some(Glu::Silu), Some((2, 1))),
        against(Q4_0, Cut::Flat, &[140], 1184, 150),
        against(Q4_0, Cut::Wide, &[140], 1184, 290),
        against(Q4_K, Cut::Flat, &[70], 768, 20),
        against(Q4_K, Cut::Wide, &[70], 768, 130),
    ];
    const N: usize = super::FORMATS.len();
    let mut cases = [EDGES[0]; N + EDGES.len()];
    let mut i = 0;
    while i < cases.len() {
        cases[i] = if i < N { plain(super::FORMATS[i], Cut::Square, &[37], 768, 18) } else { EDGES[i - N] };
        i += 1;
    }
    &{ cases }
};

/// What prefill of an 8B model multiplies.
const BENCH: &[Case] = &[
    timed(Q4_0, Cut::Square, &[4096], 14336, 512),
    timed(Q8_0, Cut::Square, &[4096], 14336, 512),
    timed(Q4_K, Cut::Square, &[4096], 14336, 512),
    timed(FormatId::Q6_K, Cut::Square, &[4096], 14336, 512),
    timed(FormatId::IQ3_XXS, Cut::Square, &[4096], 14336, 512),
    timed(FormatId::IQ2_XXS, Cut::Square, &[4096], 14336, 512),
    timed(FormatId::MXFP4, Cut::Square, &[4096], 14336, 512),
    timed(Q4_0, Cut::Wide, &[4096], 14336, 512),
    timed(Q4_0, Cut::Square, &[4096], 14336, 2048),
    timed(Q4_0, Cut::Wide, &[4096], 14336, 2048),
    timed(Q4_0, Cut::Square, &[14336], 4096, 512),
    timed(Q4_0, Cut::Wide, &[14336], 4096, 512),
    timed(Q4_0, Cut::Square, &[4096, 1024, 1024], 4096, 512),
    timed(Q4_0, Cut::Flat, &[4096, 1024, 1024], 4096, 512),
    gated(timed(Q4_0, Cut::Square, &[14336; 2], 4096, 512)),
    gated(timed(Q4_0, Cut::Wide, &[14336; 2], 4096, 512)),
    gated(timed(Q4_0, Cut::Square, &[14336; 2], 4096, 2048)),
    gated(timed(Q4_0, Cut::Wide, &[14336; 2], 4096, 2048)),
    gated(timed(Q8_0, Cut::Wide, &[14336; 2], 4096, 2048)),
    gated(timed(Q4_K, Cut::Wide, &[14336; 2], 4096, 2048)),
    timed(Q4_0, Cut::Square, &[4096], 14336, 16),
    timed(Q4_0, Cut::Flat, &[4096], 14336, 16),
    timed(Q4_0, Cut::Square, &[4096], 14336, 128),
    timed(Q4_0, Cut::Flat, &[4096], 14336, 128),
];

impl Kernel for MmdHopper {
    const NAME: &'static str = "mmd_hopper";
    type Case = Case;
    const CASES: &'static [Case] = CASES;
    const BENCH: &'static [Case] = BENCH;
    const NMSE_MAX: f64 = 1e-6;
    const TIERS: Tiers = Tiers::Only("sm_90a");
    #[cfg(feature = "emu")]
    const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::ENTRIES];

    fn problem(case: &Case, random: &mut Random) -> Problem {
        let Case { product, cut, n_sm, against } = *case;
        if against {
            return comparison(case, random);
        }
        let float_case::Case { format, k, n_cols, glu, .. } = product;
        let device = DeviceInfo { n_sm, ..DeviceInfo::default() };
        let columns = product.experts.map_or(n_cols, |_| product.max_tiles() * product.tile_cols());
        let tiles_bytes = round_act::tiles_bytes(columns, k);
        let scratch = tiles_bytes + 4 * round_act::n_scales(columns);
        let timing = random.is_timing();
        let mut problem = float_case::problem(&product, random, scratch, move |operands| {
            let (x, tiles, parts, mixture) =
                (operands.x, operands.scratch, &operands.matrices, operands.sorted);
            let scales = DevicePtr(tiles.0 + tiles_bytes as u64);
            let of_x = round_act::Args { format: FormatId::F16, x, tiles, n_cols, k, mixture };
            let round = round_act::launch_scaled(&of_x, scales)?;
            let args = Args { format, parts, glu, x: tiles, scales, k, n_cols, mixture, device: &device };
            let product = launch_as(&args, cut)?;
            Ok(if timing { vec![product] } else { vec![round, product] })
        });
        // The product alone is timed.
        if timing {
            float_case::fill_scratch(&mut problem, |x| {
                let (tiles, scales) = round_act::reference_scaled(x, k);
                [bytes_of(&tiles), bytes_of(&scales)].concat()
            });
        }
        problem
    }

    fn peer(case: &Case) -> Option<alloc::string::String> {
        case.product.peer()
    }

    fn bytes(case: &Case) -> u64 {
        case.product.bytes()
    }

    fn flops(case: &Case) -> u64 {
        case.product.flops()
    }
}

/// A product of one matrix by `Cut::Square` and by the case's, which must give equal bits.
fn comparison(case: &Case, random: &mut Random) -> Problem {
    let Case { product: float_case::Case { format, n_rows, k, n_cols, .. }, cut, n_sm, .. } = *case;
    let n_rows = n_rows[0];
    let (raw, _) = with_format(format, Weights(random, n_rows * k)).expect("cases name formats of weights");
    let x = random.values(n_cols * k);
    let (tiles_bytes, bytes) = (round_act::tiles_bytes(n_cols, k), 4 * n_rows * n_cols);
    let device = DeviceInfo { n_sm, ..DeviceInfo::default() };
    Problem {
        buffers: vec![
            Buffer::Input(bytes_of(&x)),
            Buffer::Input(tile::pack(format, &raw, n_rows, k)),
            Buffer::Output(Expected::Unchecked(tiles_bytes)),
            Buffer::Output(Expected::Unchecked(4 * round_act::n_scales(n_cols))),
            Buffer::Output(Expected::Unchecked(bytes)),
            Buffer::Output(Expected::Same { buffer: 4, bytes }),
        ],
        launches: Box::new(move |at| {
            let (w, tiles, scales, mixture) = (at[1], at[2], at[3], None);
            let of_x = round_act::Args { format: FormatId::F16, x: at[0], tiles, n_cols, k, mixture };
            let round = round_act::launch_scaled(&of_x, scales)?;
            let by = |cut: Cut, y: DevicePtr| {
                let parts = &[Matrix { w, bias: DevicePtr::NULL, residual: DevicePtr::NULL, y, n_rows }];
                let (glu, device) = (None, &device);
                launch_as(&Args { format, parts, glu, x: tiles, scales, k, n_cols, mixture, device }, cut)
            };
            Ok(vec![round, by(Cut::Square, at[4])?, by(cut, at[5])?])
        }),
    }
}
