//! Host side of `mmq`: the choice of a cut, launcher, cases.

use alloc::{boxed::Box, vec, vec::Vec};

use quant::{ActGroup, BlockFormat, FloatFormat, FormatId, Visitor, info, with_format};

use super::costs::Costs;
use super::{FORMATS, THREADS, entry};
use crate::case::{Buffer, Expected, Kernel, Problem, Random, bytes_of};
use crate::driver::DeviceInfo;
use crate::kernels::mmq_narrow::{halves, narrow_bytes};
use crate::kernels::mmq_wide::WIDE;
#[cfg(all(test, feature = "emu"))]
use crate::kernels::mmvq::reference_bits;
use crate::kernels::mmvq::{Weights, reference};
use crate::kernels::product::{
    self, Glu, Matrix, Mixture, epilogue_reference, quantising_mark, with_parts, with_quantising_gate,
};
use crate::kernels::quantise_act::{ActScale, Kind, kind_of};
use crate::kernels::{mmq_hopper, moe_sort, output, peer, quantise_act};
use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};
use crate::ptx;
use crate::tile::{self, ROWS};

/// How the work is cut into CTAs. Every cut gives the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// One or two row tiles, up to 64 columns.
    Narrow(Narrow),
    /// 128 rows (of a gated pair 64 of each), 128 columns. Takes some 200 KiB of shared memory.
    Wide,
    /// 64 rows (of a gated pair 32 of each), up to 64 columns, by warpgroups (sm_90a).
    Hopper(Hopper),
}

/// A cut by warpgroups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hopper {
    /// Columns of a tile: 32 or 64.
    pub cols: usize,
    /// CTAs at most: they walk over the tiles.
    pub ctas: u32,
}

/// A narrow cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Narrow {
    /// Columns of a CTA: 16, 32 or 64.
    pub cols: usize,
    /// Warps of a CTA: at most 16, a multiple of a team's (`mmq_narrow.rs`): 2, with more than 16 columns 4.
    pub warps: u32,
    /// Row tiles of a CTA, 1 or 2. With two, as with a gated pair of one, two warps share a span's activations.
    pub row_tiles: usize,
}

impl Narrow {
    /// Row tiles of a CTA; of a gated pair one of each matrix.
    fn row_tiles(self, gated: bool) -> usize {
        if gated { 1 } else { self.row_tiles }
    }

    /// Shared memory of a CTA.
    pub(super) fn bytes<F: BlockFormat>(self, gated: bool) -> u32 {
        narrow_bytes::<F>(self.cols, self.warps, gated || self.row_tiles == 2)
    }
}

/// SMs that the choice of a cut counts on: an H100's. With another number a choice may be slower, never different in
/// its result.
const N_SM: usize = 132;
/// Most warps of a narrow cut: registers are 128 a thread.
const MOST_WARPS: u32 = 16;
/// Shared memory that a CTA takes besides its own.
const CTA_BYTES: u32 = 1024;

/// A cut that a problem may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The cut.
    pub cut: Cut,
    /// Cycles that it is expected to take for each span of k.
    pub cycles: usize,
    /// Whether it has half of the warps that it might, so that two CTAs share an SM.
    pub halved: bool,
}

impl Cut {
    /// Narrow cuts of one row tile with as many warps as registers allow.
    pub const NARROW_16: Cut = Cut::Narrow(Narrow { cols: 16, warps: 16, row_tiles: 1 });
    /// As above.
    pub const NARROW_32: Cut = Cut::Narrow(Narrow { cols: 32, warps: 16, row_tiles: 1 });
    /// As above.
    pub const NARROW_64: Cut = Cut::Narrow(Narrow { cols: 64, warps: 16, row_tiles: 1 });

    /// Cuts by warpgroups for as many CTAs as an H100 has multiprocessors.
    pub const HOPPER_32: Cut = Cut::Hopper(Hopper { cols: 32, ctas: N_SM as u32 });
    /// As above.
    pub const HOPPER_64: Cut = Cut::Hopper(Hopper { cols: 64, ctas: N_SM as u32 });

    /// A cut by warpgroups with this many CTAs at most.
    pub const fn of_ctas(self, ctas: u32) -> Cut {
        match self {
            Cut::Hopper(hopper) => Cut::Hopper(Hopper { ctas, ..hopper }),
            _ => self,
        }
    }

    /// A narrow cut with this many warps.
    pub const fn of_warps(self, warps: u32) -> Cut {
        match self {
            Cut::Narrow(narrow) => Cut::Narrow(Narrow { warps, ..narrow }),
            _ => self,
        }
    }

    /// A narrow cut with two row tiles a CTA.
    pub const fn paired(self) -> Cut {
        match self {
            Cut::Narrow(narrow) => Cut::Narrow(Narrow { row_tiles: 2, ..narrow }),
            _ => self,
        }
    }

    /// Whether it can write what a gated pair gives quantised. (Warpgroups could, but are slower at it than a launch more.)
    pub const fn quantises(self) -> bool {
        matches!(self, Cut::Narrow(_))
    }

    /// Columns of a CTA.
    pub fn cols(self) -> usize {
        match self {
            Cut::Narrow(narrow) => narrow.cols,
            Cut::Wide => WIDE,
            Cut::Hopper(hopper) => hopper.cols,
        }
    }

    /// Threads of a CTA.
    pub fn threads(self) -> u32 {
        match self {
            Cut::Narrow(narrow) => 32 * narrow.warps,
            Cut::Wide => THREADS,
            Cut::Hopper(_) => mmq_hopper::THREADS,
        }
    }

    /// The fastest cut for `n_rows` rows, of all parts together or of a gated pair, and `n_cols` columns, on a device: the
    /// candidate of fewest cycles, of several the first.
    pub fn choose(format: FormatId, n_rows: usize, n_cols: usize, gated: bool, device: &DeviceInfo) -> Cut {
        let costs = Costs::find(format, device);
        let all = Cut::candidates(format, n_rows, n_cols, gated, device, costs);
        all.min_by_key(|one| one.cycles).map_or(Cut::NARROW_16.of_warps(2), |one| one.cut)
    }

    /// The cuts that such a problem may have, by these costs.
    pub fn candidates(
        format: FormatId,
        n_rows: usize,
        n_cols: usize,
        gated: bool,
        device: &DeviceInfo,
        costs: Costs,
    ) -> impl Iterator<Item = Candidate> {
        let bytes = move |cut| entry(format, cut, gated).map_or(u32::MAX, |(_, bytes)| bytes);
        let fits = move |cut| bytes(cut) <= device.smem_per_cta_bytes;
        let ctas = move |rows: usize, cols: usize| n_rows.div_ceil(rows) * n_cols.div_ceil(cols);
        let whole = |cut, cycles| Candidate { cut, cycles, halved: false };

        let wide = Some(Cut::Wide).filter(|&cut| n_cols > 16 && fits(cut));
        let wide = wide.map(|cut| whole(cut, ctas(WIDE, WIDE).div_ceil(N_SM) * costs.of(cut, gated)));

        let n_sm = if device.n_sm == 0 { N_SM } else { device.n_sm as usize };
        let hopper = [32, 64].map(|cols| Cut::Hopper(Hopper { cols, ctas: n_sm as u32 })).into_iter();
        let runs = n_cols >= costs.hopper_from && ptx::runs_hopper(device);
        let hopper = hopper.filter(move |&cut| runs && fits(cut)).map(move |cut| {
            let rounds = ctas(mmq_hopper::TILE_ROWS, cut.cols()).div_ceil(n_sm);
            whole(cut, rounds * costs.of(cut, gated))
        });

        // More columns at a time pay by sharing what is unpacked: on tensor cores.
        let narrow = [16, 32, 64].into_iter().filter(|&cols| cols == 16 || device.sm >= 75);
        let pairings = if gated { &[true][..] } else { &[false, true] };
        let narrow = narrow.flat_map(move |cols| pairings.iter().map(move |&paired| (cols, paired)));
        let narrow = narrow.flat_map(move |(cols, paired)| {
            let team = 2 * halves(cols) as u32;
            let row_tiles = if paired && !gated { 2 } else { 1 };
            let of_warps = move |warps| Cut::Narrow(Narrow { cols, warps, row_tiles });
            // As many as shared memory allows.
            let mut of_teams = (1..=MOST_WARPS / team).rev().map(|teams| teams * team);
            let most = of_teams.find(|&warps| fits(of_warps(warps)));
            most.into_iter().flat_map(move |warps| {
                let cut = of_warps(warps);
                let ctas = ctas(if paired { 2 * ROWS } else { ROWS }, cols);
                let of_span = costs.of(cut, gated) * MOST_WARPS as usize / warps as usize;
                let one = whole(cut, ctas.div_ceil(N_SM) * of_span);
                // Where there are CTAs for it two on an SM, so that one multiplies while the other begins or ends.
                let half = of_warps(warps / 2);
                let two = warps == MOST_WARPS
                    && ctas > N_SM
                    && 2 * (bytes(half) + CTA_BYTES) <= device.smem_per_sm_bytes;
                let halved =
                    Candidate { cut: half, cycles: one.cycles * costs.halved_percent / 100, halved: true };
                two.then_some(halved).into_iter().chain([one])
            })
        });
        wide.into_iter().chain(hopper).chain(narrow)
    }

    /// The same for a mixture of `n_pairs` (token, slot) pairs.
    pub fn choose_mixture(
        format: FormatId,
        n_rows: usize,
        n_expert: usize,
        n_pairs: usize,
        gated: bool,
        device: &DeviceInfo,
    ) -> Cut {
        // As if all experts had equally many pairs: their rows are then rows of one matrix.
        Cut::choose(format, n_rows * n_expert, n_pairs.div_ceil(n_expert), gated, device)
    }
}

/// The columns of a mixture by expert, as `moe_sort` makes them, with tiles of the cut's columns.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)] // the contract's names
pub struct Sorted {
    pub order: DevicePtr,
    pub tiles: DevicePtr,
    pub n_expert: usize,
}

/// Arguments; see the contract.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    /// As for every product; of a mixture's `ids` nothing is read here.
    pub product: product::Args<'a>,
    /// How to cut the work.
    pub cut: Cut,
    /// Of a mixture.
    pub sorted: Option<Sorted>,
    /// Write what gate and up give quantised, as `quantise_act` would: codes to the first matrix's `y`, scales to the
    /// second's. Narrow cuts alone.
    pub acts: Option<Kind>,
}

/// One launch for all parts.
pub fn launch(args: &Args<'_>) -> Result<Launch, LaunchError> {
    let kernel = Mmq::NAME;
    let check = Check(kernel);
    let &Args { ref product, cut, sorted, acts } = args;
    let (entry, smem_bytes) = entry(product.format, cut, product.glu.is_some())
        .ok_or(LaunchError::Format { kernel, format: product.format })?;
    check.multiple("k", product.k, info(product.format).elems, "a multiple of the format's block")?;
    let n_groups = check.size("k", product.k)? / 32;
    let n_cols = check.size("n_cols", product.n_cols)?;
    // The kernel counts the activations' vectors in 32 bits.
    check.size("n_cols * k / 16", product.n_cols.saturating_mul(product.k / 16))?;
    for (what, at, align) in [("q", product.q, 16), ("scales", product.scales, 8)] {
        check.aligned(what, at, align)?;
        if at == DevicePtr::NULL {
            return Err(check.shape(what, "an array", 0));
        }
    }
    let (order, tiles, n_tiles, pairs_per_x) = match (product.mixture, sorted) {
        (Some(mixture), Some(sorted)) => {
            check.aligned("order", sorted.order, 4)?;
            check.aligned("tiles", sorted.tiles, 16)?;
            let n_pairs = check.size("n_pairs", mixture.n_pairs)? as usize;
            check.size("n_expert", sorted.n_expert)?;
            let n_tiles = moe_sort::max_tiles(n_pairs, sorted.n_expert, cut.cols());
            (sorted.order, sorted.tiles, n_tiles, check.size("pairs_per_x", mixture.pairs_per_x)?)
        }
        (None, None) => (DevicePtr::NULL, DevicePtr::NULL, product.n_cols.div_ceil(cut.cols()), 1),
        (mixture, _) => {
            let (expected, got) = ("that of a mixture, if it is one", u64::from(mixture.is_some()));
            return Err(LaunchError::Shape { kernel, what: "sorted", expected, got });
        }
    };
    let row_tiles = match cut {
        Cut::Narrow(narrow) => narrow.row_tiles(product.glu.is_some()),
        Cut::Wide | Cut::Hopper(_) => 0,
    };
    let rows_per_cta = match (cut, product.glu) {
        (Cut::Narrow(_), _) => row_tiles * ROWS,
        (Cut::Wide, Some(_)) => cut.cols() / 2,
        (Cut::Wide, None) => cut.cols(),
        (Cut::Hopper(_), Some(_)) => mmq_hopper::TILE_ROWS / 2,
        (Cut::Hopper(_), None) => mmq_hopper::TILE_ROWS,
    };
    let ctas = |rows: u32| rows.div_ceil(rows_per_cta as u32);
    let (params, n_ctas) = with_parts(kernel, Params::new(), product.parts, product.glu, ctas)?;
    let params = params.with(product.q).with(product.scales).with(order).with(tiles);
    let mark = quantising_mark(check, product, acts)?;
    if acts.is_some() && !cut.quantises() {
        return Err(check.shape("columns of quantised results", "those of a narrow cut", product.n_cols));
    }
    let params =
        with_quantising_gate(params, product.glu, mark).with(n_groups).with(n_cols).with(pairs_per_x);
    if let Cut::Hopper(Hopper { ctas, .. }) = cut {
        check.size("n_cols * k / 8", product.n_cols.saturating_mul(product.k / 8))?;
        let n_items = check.size("tiles", n_tiles * n_ctas as usize)?;
        let params = params.with(check.size("tiles", n_tiles)?).with(n_items);
        let grid = [n_items.min(ctas.max(1)), 1, 1];
        return Ok(Launch { entry, grid, cta: cut.threads(), cluster: 1, smem_bytes, params });
    }
    let params = params.with(row_tiles as u32);
    // Column tiles first: CTAs that run together share the weights, which pass from memory once.
    let grid = [check.size("tiles", n_tiles)?, check.grid("row tiles", n_ctas as usize)?, 1];
    Ok(Launch { entry, grid, cta: cut.threads(), cluster: 1, smem_bytes, params })
}

/// The row in the registry.
#[derive(Debug)]
pub struct Mmq;

/// One case.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Format of the weights.
    pub format: FormatId,
    /// The cut.
    pub cut: Cut,
    /// Rows of each part.
    pub n_rows: &'static [usize],
    /// Columns of the weights.
    pub k: usize,
    /// Columns; in a mixture tokens.
    pub n_cols: usize,
    /// Whether there are a bias and a residual.
    pub added: bool,
    /// Of a gated pair.
    pub glu: Option<Glu>,
    /// Of a mixture: experts, experts per token, whether activations have a row for each.
    pub mixture: Option<(usize, usize, bool)>,
    /// How gate and up's results are written quantised.
    pub acts: Option<Kind>,
}

/// A case without extras.
pub(crate) const fn plain(
    format: FormatId,
    cut: Cut,
    n_rows: &'static [usize],
    k: usize,
    n_cols: usize,
) -> Case {
    Case { format, cut, n_rows, k, n_cols, added: false, glu: None, mixture: None, acts: None }
}

/// A case of gate and up.
pub(crate) const fn gated(
    format: FormatId,
    cut: Cut,
    n_rows: &'static [usize],
    k: usize,
    n_cols: usize,
) -> Case {
    Case { glu: Some(Glu::Silu), ..plain(format, cut, n_rows, k, n_cols) }
}

/// Every format in the narrow cuts' tail of columns and rows and of a span, a few in the wide cut; the edges of tiles;
/// each extra once in either cut.
const CASES: &[Case] = &{
    const EXTRA: &[Case] = &[
        plain(FormatId::Q4_0, Cut::NARROW_16, &[31], 32, 1),
        plain(FormatId::Q8_0, Cut::NARROW_16, &[33], 2336, 16),
        plain(FormatId::Q5_1, Cut::NARROW_32, &[32], 544, 31),
        plain(FormatId::Q4_K, Cut::NARROW_32, &[5], 2304, 33),
        plain(FormatId::IQ3_XXS, Cut::NARROW_32, &[40, 3, 64], 256, 9),
        plain(FormatId::Q4_0, Cut::Wide, &[127], 32, 1),
        plain(FormatId::Q8_0, Cut::Wide, &[129], 288, 127),
        plain(FormatId::Q4_1, Cut::Wide, &[128], 800, 128),
        plain(FormatId::Q4_K, Cut::Wide, &[1], 512, 129),
        plain(FormatId::Q2_K, Cut::Wide, &[70], 256, 40),
        plain(FormatId::Q6_K, Cut::Wide, &[20, 140, 1], 768, 20),
        plain(FormatId::NVFP4, Cut::Wide, &[33], 320, 17),
        plain(FormatId::IQ3_XXS, Cut::Wide, &[97], 512, 65),
        Case { added: true, ..plain(FormatId::Q4_0, Cut::NARROW_16, &[37, 8], 288, 12) },
        plain(FormatId::Q4_0, Cut::NARROW_64, &[33], 4640, 65),
        plain(FormatId::Q6_K, Cut::NARROW_64.of_warps(12), &[64], 512, 47),
        plain(FormatId::Q4_K, Cut::NARROW_64.paired(), &[65, 3], 2304, 34),
        plain(FormatId::Q8_0, Cut::NARROW_32.paired(), &[32, 50], 1344, 32),
        plain(FormatId::Q5_0, Cut::NARROW_16.paired(), &[97], 2336, 17),
        plain(FormatId::IQ2_XXS, Cut::NARROW_16.of_warps(2), &[20], 1280, 10),
        Case { added: true, ..plain(FormatId::Q4_0, Cut::NARROW_64.paired(), &[37, 80], 288, 12) },
        Case { added: true, ..plain(FormatId::Q4_0, Cut::Wide, &[37, 130], 288, 12) },
        Case {
            added: true,
            glu: Some(Glu::Silu),
            ..plain(FormatId::Q8_0, Cut::NARROW_32, &[40; 2], 1312, 20)
        },
        Case { added: true, glu: Some(Glu::Silu), ..plain(FormatId::Q8_0, Cut::Wide, &[70; 2], 544, 20) },
        Case { glu: Some(Glu::Gelu), ..plain(FormatId::Q4_K, Cut::NARROW_16, &[9; 2], 256, 3) },
        Case {
            added: true,
            glu: Some(Glu::SwigluOai { alpha: 1.702, limit: 7.0 }),
            ..plain(FormatId::MXFP4, Cut::NARROW_32, &[33; 2], 256, 5)
        },
        Case {
            added: true,
            glu: Some(Glu::Silu),
            ..plain(FormatId::Q4_0, Cut::NARROW_64, &[40; 2], 1312, 50)
        },
        gated(FormatId::Q4_0, Cut::NARROW_16, &[33; 2], 2368, 16),
        Case {
            mixture: Some((4, 2, false)),
            ..plain(FormatId::Q4_0, Cut::NARROW_64.paired(), &[70], 288, 70)
        },
        Case { mixture: Some((5, 2, false)), ..plain(FormatId::Q4_0, Cut::NARROW_16, &[35], 288, 30) },
        Case {
            added: true,
            glu: Some(Glu::Silu),
            mixture: Some((3, 2, false)),
            ..plain(FormatId::Q4_K, Cut::NARROW_32, &[33; 2], 512, 25)
        },
        Case { added: true, mixture: Some((3, 2, true)), ..plain(FormatId::Q5_0, Cut::Wide, &[50], 64, 90) },
        Case { acts: Some(Kind::Q8_0), ..gated(FormatId::Q4_0, Cut::NARROW_16, &[96; 2], 2368, 13) },
        Case { acts: Some(Kind::Q8_1), ..gated(FormatId::Q4_1, Cut::NARROW_32, &[64; 2], 1312, 34) },
        Case { acts: Some(Kind::Q8_0), ..gated(FormatId::Q4_K, Cut::NARROW_64, &[32; 2], 256, 50) },
    ];
    const N: usize = FORMATS.len();
    let mut cases = [EXTRA[0]; N + EXTRA.len()];
    let mut i = 0;
    while i < cases.len() {
        cases[i] = if i < N { plain(FORMATS[i], Cut::NARROW_32, &[37], 768, 18) } else { EXTRA[i - N] };
        i += 1;
    }
    cases
};

/// The shapes that prefill and batches of an 8B model have, and a mixture's.
const BENCH: &[Case] = &[
    plain(FormatId::Q4_0, Cut::Wide, &[4096], 14336, 512),
    plain(FormatId::Q4_0, Cut::Wide, &[14336], 4096, 512),
    plain(FormatId::Q4_0, Cut::Wide, &[14336], 4096, 2048),
    plain(FormatId::Q8_0, Cut::Wide, &[4096], 14336, 512),
    plain(FormatId::Q4_K, Cut::Wide, &[4096], 14336, 512),
    plain(FormatId::Q6_K, Cut::Wide, &[4096], 14336, 512),
    plain(FormatId::IQ3_XXS, Cut::Wide, &[4096], 14336, 512),
    // Where `mmvq` would do, too.
    plain(FormatId::Q4_0, Cut::NARROW_16, &[4096], 14336, 8),
    plain(FormatId::Q4_0, Cut::NARROW_16, &[4096], 4096, 8),
    plain(FormatId::Q4_0, Cut::NARROW_16, &[4096, 1024, 1024], 4096, 8),
    plain(FormatId::Q4_K, Cut::NARROW_16, &[4096], 14336, 8),
    plain(FormatId::Q8_0, Cut::NARROW_16, &[4096], 14336, 8),
    plain(FormatId::Q6_K, Cut::NARROW_16, &[4096], 14336, 8),
    gated(FormatId::Q4_0, Cut::NARROW_16.of_warps(8), &[14336; 2], 4096, 8),
    gated(FormatId::Q4_0, Cut::NARROW_16.of_warps(8), &[14336; 2], 4096, 16),
    plain(FormatId::Q4_0, Cut::NARROW_16, &[4096], 14336, 16),
    plain(FormatId::Q4_0, Cut::NARROW_16, &[4096], 4096, 16),
    plain(FormatId::Q4_0, Cut::NARROW_16.of_warps(8), &[4096], 14336, 16),
    plain(FormatId::Q4_0, Cut::NARROW_32, &[4096], 14336, 32),
    plain(FormatId::Q4_0, Cut::NARROW_64, &[4096], 14336, 64),
    plain(FormatId::Q4_0, Cut::NARROW_32, &[4096], 14336, 64),
    plain(FormatId::Q4_0, Cut::NARROW_64, &[4096], 14336, 128),
    plain(FormatId::Q4_0, Cut::NARROW_64, &[4096], 14336, 512),
    gated(FormatId::Q4_0, Cut::NARROW_16, &[14336; 2], 4096, 16),
    Case { acts: Some(Kind::Q8_0), ..gated(FormatId::Q4_0, Cut::NARROW_16, &[14336; 2], 4096, 16) },
    gated(FormatId::Q4_0, Cut::NARROW_32, &[14336; 2], 4096, 32),
    gated(FormatId::Q4_0, Cut::NARROW_64, &[14336; 2], 4096, 64),
    gated(FormatId::Q4_0, Cut::NARROW_64, &[14336; 2], 4096, 128),
    plain(FormatId::Q8_0, Cut::NARROW_16, &[4096], 14336, 16),
    plain(FormatId::Q8_0, Cut::NARROW_32, &[4096], 14336, 32),
    plain(FormatId::Q8_0, Cut::NARROW_64, &[4096], 14336, 64),
    plain(FormatId::Q8_0, Cut::NARROW_64, &[4096], 14336, 128),
    plain(FormatId::Q4_K, Cut::NARROW_16, &[4096], 14336, 16),
    plain(FormatId::Q4_K, Cut::NARROW_32, &[4096], 14336, 32),
    plain(FormatId::Q4_K, Cut::NARROW_64.of_warps(12), &[4096], 14336, 64),
    plain(FormatId::Q4_K, Cut::NARROW_64.of_warps(12), &[4096], 14336, 128),
    plain(FormatId::Q6_K, Cut::NARROW_16, &[4096], 14336, 16),
    plain(FormatId::Q6_K, Cut::NARROW_32, &[4096], 14336, 32),
    plain(FormatId::Q6_K, Cut::NARROW_64.of_warps(12), &[4096], 14336, 64),
    plain(FormatId::Q6_K, Cut::NARROW_64.of_warps(12), &[4096], 14336, 128),
    // Where a model has row tiles enough: alone and in pairs.
    plain(FormatId::Q4_0, Cut::NARROW_16, &[4096, 1024, 1024], 4096, 16),
    plain(FormatId::Q4_0, Cut::NARROW_16.paired(), &[4096, 1024, 1024], 4096, 16),
    plain(FormatId::Q4_0, Cut::NARROW_32, &[4096, 1024, 1024], 4096, 64),
    plain(FormatId::Q4_0, Cut::NARROW_64, &[4096, 1024, 1024], 4096, 64),
    plain(FormatId::Q4_0, Cut::NARROW_64.paired(), &[4096, 1024, 1024], 4096, 64),
    plain(FormatId::Q6_K, Cut::NARROW_16, &[128_256], 4096, 16),
    plain(FormatId::Q6_K, Cut::NARROW_64.of_warps(12), &[128_256], 4096, 64),
    plain(FormatId::Q6_K, Cut::NARROW_64.paired(), &[128_256], 4096, 64),
    gated(FormatId::Q4_0, Cut::Wide, &[14336; 2], 4096, 512),
    Case { mixture: Some((128, 8, false)), ..plain(FormatId::Q4_0, Cut::NARROW_32, &[768], 2048, 512) },
];

/// The rows of a matrix (or of an expert of one) times columns, each with a matrix of its own choice.
struct Product<'a, T> {
    blocks: &'a [u8],
    x: &'a [f32],
    k: usize,
    n_rows: usize,
    /// Column and expert of each row of the output.
    columns: &'a [(usize, usize)],
    dots: core::marker::PhantomData<T>,
}

/// How an element of the output is computed.
trait Sum: Sized {
    fn sum<F: BlockFormat>(row: &[F], column: &[ActGroup]) -> Self;
}
impl Sum for f64 {
    fn sum<F: BlockFormat>(row: &[F], column: &[ActGroup]) -> f64 {
        reference(row, column)
    }
}
#[cfg(all(test, feature = "emu"))]
impl Sum for f32 {
    fn sum<F: BlockFormat>(row: &[F], column: &[ActGroup]) -> f32 {
        reference_bits(row, column)
    }
}

impl<T: Sum> Visitor for Product<'_, T> {
    type Output = (Kind, Vec<T>);

    fn block<F: BlockFormat>(self) -> Self::Output {
        let blocks: &[F] = bytemuck::cast_slice(self.blocks);
        let mut groups = vec![ActGroup::ZERO; self.x.len() / 32];
        ActGroup::quantise(kind_of::<F>().into(), self.x, &mut groups);
        let columns: Vec<&[ActGroup]> = groups.chunks(self.k / 32).collect();
        let rows: Vec<&[F]> = blocks.chunks(self.k / F::ELEMS).collect();
        let output = |&(column, expert): &(usize, usize)| {
            let rows = rows[expert * self.n_rows..][..self.n_rows].iter();
            let column = columns[column];
            rows.map(|row| T::sum(row, column)).collect::<Vec<T>>()
        };
        (kind_of::<F>(), self.columns.iter().flat_map(output).collect())
    }

    fn float<F: FloatFormat>(self) -> Self::Output {
        unreachable!("{:?} has no blocks", F::ID)
    }
}

/// A case's data.
struct Data {
    ids: Vec<u32>,
    x: Vec<f32>,
    /// Blocks of each part.
    weights: Vec<Vec<u8>>,
    biases: Vec<Vec<f32>>,
    residuals: Vec<Vec<f32>>,
}

impl Case {
    fn n_expert(&self) -> usize {
        self.mixture.map_or(1, |(n_expert, ..)| n_expert)
    }

    /// Rows of the output.
    fn n_outputs(&self) -> usize {
        self.n_cols * self.mixture.map_or(1, |(_, used, _)| used)
    }

    fn pairs_per_x(&self) -> usize {
        match self.mixture {
            Some((_, used, false)) => used,
            _ => 1,
        }
    }

    /// Parts that have an output.
    fn n_written(&self) -> usize {
        if self.glu.is_some() { 1 } else { self.n_rows.len() }
    }

    fn data(&self, random: &mut Random) -> Data {
        let n_outputs = self.n_outputs();
        let weights = self.n_rows.iter().map(|n_rows| {
            let weights = with_format(self.format, Weights(random, self.n_expert() * n_rows * self.k));
            weights.expect("cases name formats of weights").0
        });
        let weights = weights.collect();
        let added = |n: usize, random: &mut Random| if self.added { random.values(n) } else { vec![] };
        Data {
            weights,
            ids: (0..n_outputs).map(|_| random.below(self.n_expert() as u64) as u32).collect(),
            x: random.values(n_outputs / self.pairs_per_x() * self.k),
            biases: self.n_rows.iter().map(|n| added(self.n_expert() * n, random)).collect(),
            residuals: self.n_rows.iter().map(|n| added(n_outputs * n, random)).collect(),
        }
    }

    /// What the activations are.
    fn act(&self) -> Kind {
        quantise_act::kind(self.format).expect("cases name formats of weights")
    }

    /// Each part's product, without what follows.
    fn products<T: Sum>(&self, data: &Data) -> (Kind, Vec<Vec<T>>) {
        let pairs = data.ids.iter().enumerate();
        let columns: Vec<_> = pairs.map(|(i, &id)| (i / self.pairs_per_x(), id as usize)).collect();
        let mut kind = Kind::Q8_0;
        let products = data.weights.iter().zip(self.n_rows).map(|(blocks, &n_rows)| {
            let product = Product::<T> {
                blocks,
                x: &data.x,
                k: self.k,
                n_rows,
                columns: &columns,
                dots: core::marker::PhantomData,
            };
            let (act, values) = with_format(self.format, product).expect("cases name formats of weights");
            kind = act;
            values
        });
        let products = products.collect();
        (kind, products)
    }

    /// Buffers of a problem with these outputs: q, scales, order, tiles; of each part w, bias, residual; the outputs.
    fn buffers(&self, data: &Data, kind: Kind, outputs: Vec<Vec<f64>>) -> Vec<Buffer> {
        let (q, scales) = quantise_act::reference(kind, &data.x);
        let (order, tiles) = crate::kernels::moe_sort::reference(&data.ids, self.n_expert(), self.cut.cols());
        let mut buffers = vec![bytes_of(&q), bytes_of(&scales), bytes_of(&order), bytes_of(&tiles)];
        for (i, &n_rows) in self.n_rows.iter().enumerate() {
            let experts = data.weights[i].chunks(data.weights[i].len() / self.n_expert());
            buffers.push(experts.flat_map(|rows| tile::pack(self.format, rows, n_rows, self.k)).collect());
            buffers.extend([bytes_of(&data.biases[i]), bytes_of(&data.residuals[i])]);
        }
        let buffers = buffers.into_iter().map(Buffer::Input);
        buffers.chain(outputs.into_iter().map(|values| Buffer::Output(Expected::F32(values)))).collect()
    }

    /// The first part's product in the contract's order, and the buffers of the problem.
    #[cfg(all(test, feature = "emu"))]
    pub(super) fn chained(&self, random: &mut Random) -> (Vec<f32>, Vec<Buffer>) {
        let data = self.data(random);
        let (kind, products) = self.products::<f32>(&data);
        let outputs = products.iter().map(|values| vec![0.0; values.len()]).collect();
        (products.into_iter().next().expect("a part"), self.buffers(&data, kind, outputs))
    }

    /// The launch on [`Case::buffers`].
    pub(super) fn launch(&self, at: &[DevicePtr]) -> Result<Launch, LaunchError> {
        self.launch_to(at, &at[self.n_inputs()..][..self.n_written()], None)
    }

    /// How many of [`Case::buffers`] are not outputs.
    fn n_inputs(&self) -> usize {
        4 + 3 * self.n_rows.len()
    }

    /// The launch on [`Case::buffers`] with these outputs.
    fn launch_to(
        &self,
        at: &[DevicePtr],
        outputs: &[DevicePtr],
        acts: Option<Kind>,
    ) -> Result<Launch, LaunchError> {
        let added = |at| if self.added { at } else { DevicePtr::NULL };
        let part = |(i, &n_rows): (usize, &usize)| {
            let y = outputs.get(i).copied().unwrap_or(DevicePtr::NULL);
            Matrix { w: at[4 + 3 * i], bias: added(at[5 + 3 * i]), residual: added(at[6 + 3 * i]), y, n_rows }
        };
        let parts: Vec<Matrix> = self.n_rows.iter().enumerate().map(part).collect();
        let (n_pairs, pairs_per_x) = (self.n_outputs(), self.pairs_per_x());
        let product = product::Args {
            format: self.format,
            parts: &parts,
            glu: self.glu,
            q: at[0],
            scales: at[1],
            k: self.k,
            n_cols: n_pairs / pairs_per_x,
            mixture: self.mixture.map(|_| Mixture { ids: DevicePtr::NULL, n_pairs, pairs_per_x }),
        };
        let sorted = Sorted { order: at[2], tiles: at[3], n_expert: self.n_expert() };
        launch(&Args { product, cut: self.cut, sorted: self.mixture.map(|_| sorted), acts })
    }
}

/// A problem whose results are quantised, which must have the bits of separate launches.
fn quantising(case: Case, acts: Kind, random: &mut Random) -> Problem {
    let data = case.data(random);
    let mut buffers = case.buffers(&data, case.act(), vec![]);
    let n = case.n_outputs() * case.n_rows[0];
    let written = [4 * n, n, n / 32 * size_of::<ActScale>()];
    // What the separate launches write: floats, codes, scales.
    let separate = buffers.len();
    buffers.extend(written.map(|bytes| Buffer::Input(vec![0; bytes])));
    for (i, &bytes) in written.iter().enumerate().skip(1) {
        buffers.push(Buffer::Output(Expected::Same { buffer: separate + i, bytes }));
    }
    let launches = move |at: &[DevicePtr]| {
        let [y, codes, scales] = at[separate..separate + 3] else { unreachable!("three of these") };
        let (n_cols, k) = (case.n_outputs(), case.n_rows[0]);
        Ok(vec![
            case.launch_to(at, &[y], None)?,
            quantise_act::launch(&quantise_act::Args { kind: acts, x: y, q: codes, scales, n_cols, k })?,
            case.launch_to(at, &at[separate + 3..], Some(acts))?,
        ])
    };
    let problem = Problem { buffers, launches: Box::new(launches) };
    if random.is_timing() { output::last_launch(problem) } else { problem }
}

impl Kernel for Mmq {
    const NAME: &'static str = "mmq";
    type Case = Case;
    const CASES: &'static [Case] = CASES;
    const BENCH: &'static [Case] = BENCH;
    const NMSE_MAX: f64 = 1e-11;
    #[cfg(feature = "emu")]
    const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::NARROW, super::WIDE];

    fn problem(case: &Case, random: &mut Random) -> Problem {
        let case = *case;
        if let Some(acts) = case.acts {
            return quantising(case, acts, random);
        }
        let data = case.data(random);
        let (kind, products) = if random.is_timing() {
            let zeros = case.n_rows.iter().map(|n_rows| vec![0.0; case.n_outputs() * n_rows]);
            (case.act(), zeros.collect())
        } else {
            case.products::<f64>(&data)
        };
        let up = case.glu.map(|glu| (glu, products[1].as_slice()));
        let outputs = products[..case.n_written()].iter().enumerate().map(|(p, sums)| {
            let n_rows = case.n_rows[p];
            let at = |values: &[f32], i: usize| values.get(i).map_or(0.0, |&v| f64::from(v));
            let in_bias = |i: usize| data.ids[i / n_rows] as usize * n_rows + i % n_rows;
            let bias = |of: usize| {
                let biases = &data.biases;
                move |i| biases.get(of).map_or(0.0, |bias| at(bias, in_bias(i)))
            };
            epilogue_reference(sums, up, bias(p), bias(1), |i| at(&data.residuals[p], i))
        });
        let outputs = outputs.collect();
        Problem {
            buffers: case.buffers(&data, kind, outputs),
            launches: Box::new(move |at| Ok(vec![case.launch(at)?])),
        }
    }

    fn peer(case: &Case) -> Option<alloc::string::String> {
        let fused = case.glu.is_some() || case.added;
        peer::product(case.format, case.n_rows, case.k, case.n_cols, fused, case.mixture)
    }

    fn bytes(case: &Case) -> u64 {
        let row = info(case.format);
        let n_rows: usize = case.n_rows.iter().sum();
        let weights = case.n_expert() * n_rows * case.k / row.elems * row.bytes;
        let columns = case.n_outputs() / case.pairs_per_x();
        let outputs = 4 * case.n_outputs() * case.n_rows[..case.n_written()].iter().sum::<usize>();
        (weights + columns * case.k * 5 / 4 + outputs) as u64
    }

    fn flops(case: &Case) -> u64 {
        2 * (case.n_rows.iter().sum::<usize>() * case.n_outputs() * case.k) as u64
    }
}
