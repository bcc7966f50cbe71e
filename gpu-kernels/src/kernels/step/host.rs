//! Host side of `step`: which launches a module plays, the list, the launch, cases.

use alloc::{boxed::Box, vec, vec::Vec};

use quant::{FormatId, info};

use super::{HEAD_WORDS, PARAM_WORDS, RANGES, RESERVED_BYTES, THREADS, WORDS};
use crate::case::{Buffer, Expected, Kernel, Problem, Random, Tiers, bytes_of};
use crate::kernels::mmvq::{self, Besides, Norm, Weights};
use crate::kernels::output::Output;
use crate::kernels::product::{Args as ProductArgs, Glu, Matrix};
use crate::kernels::rms_norm;
use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};
use crate::tile::{self, ROWS, TileLayout};

/// Bytes of weights that are asked of L2 ahead of the launch that reads them: what memory delivers in the 5 µs that
/// attention and what surrounds it take, and little enough to stay in an L2 of 50 MB until it is read.
pub const AHEAD_BYTES: u64 = 16 << 20;

/// Bytes of `counters`.
pub const COUNTERS_BYTES: usize = 8;

/// Bytes of an instruction of the list.
pub const INSTRUCTION_BYTES: usize = 4 * WORDS as usize;

/// A module: its entry and the products it has.
struct Module {
    entry: &'static str,
    formats: [FormatId; 2],
    products: [&'static str; 2],
}

macro_rules! modules {
    ($($entry:literal $a:ident $a_module:ident $b:ident $b_module:ident;)*) => {
        const MODULES: &[Module] = &[$(Module {
            entry: $entry,
            formats: [FormatId::$a, FormatId::$b],
            products: [
                concat!("mmvq_", stringify!($a), "_n1"),
                concat!("mmvq_", stringify!($b), "_n1"),
            ],
        }),*];
    };
}
for_each_module!(modules);

macro_rules! bodies {
    ($($entry:literal $number:literal $body:ident $args:tt;)*) => {
        const BODIES: &[(&str, u32)] = &[$(($entry, $number)),*];
    };
}
for_each_body!(bodies);

impl Module {
    /// The number of the body that is a launch's kernel.
    fn body(&self, launch: &Launch) -> Option<u32> {
        if let Some(product) = self.products.iter().position(|name| *name == launch.entry) {
            return Some(product as u32);
        }
        let &(name, number) = BODIES.iter().find(|(name, _)| *name == launch.entry)?;
        // These work with any number of warps.
        (name.starts_with("rms_norm") || launch.cta <= THREADS).then_some(number)
    }
}

/// A list of launches that one module plays.
#[derive(Clone, Debug, PartialEq)]
pub struct List {
    /// The module's entry.
    pub entry: &'static str,
    /// The instructions, for device memory.
    pub bytes: Vec<u8>,
    /// Shared memory per CTA.
    pub smem_bytes: u32,
    n_ctas: u32,
}

/// The module that plays most of these launches' products; `None` if none plays any.
pub fn entry(launches: &[Launch]) -> Option<&'static str> {
    let count = |module: &&Module| launches.iter().filter(|l| module.products.contains(&l.entry)).count();
    // Of equals the first.
    let best = MODULES.iter().rev().max_by_key(count)?;
    (count(&best) > 0).then_some(best.entry)
}

/// Whether a module plays a launch.
pub fn covers(entry: &'static str, launch: &Launch) -> bool {
    module(entry).is_some_and(|module| module.body(launch).is_some())
}

fn module(entry: &str) -> Option<&'static Module> {
    MODULES.iter().find(|module| module.entry == entry)
}

/// A word of a launch's arguments.
fn word(params: &Params, byte: usize) -> u32 {
    let at = &params.bytes()[byte..];
    u32::from_le_bytes([at[0], at[1], at[2], at[3]])
}

fn address(params: &Params, byte: usize) -> u64 {
    u64::from(word(params, byte)) | u64::from(word(params, byte + 4)) << 32
}

/// The weights that a product reads, matrix by matrix: `mmvq`'s arguments begin with its three parts of 40 bytes, the
/// experts' numbers are at 136, the groups of a row at 156.
fn weights(format: FormatId, params: &Params) -> Vec<(u64, u64)> {
    if address(params, 136) != 0 {
        // Which experts are read nobody knows yet.
        return Vec::new();
    }
    let format = info(format);
    let tile_bytes = TileLayout::new(format.elems, format.bytes).tile_bytes(32 * word(params, 156) as usize);
    let part = |p: usize| {
        let (at, n_rows) = (address(params, 40 * p), word(params, 40 * p + 32));
        (at, u64::from(n_rows).div_ceil(ROWS as u64) * tile_bytes as u64)
    };
    (0..3).map(part).filter(|&(at, _)| at != 0).collect()
}

/// The instructions that play these launches, all of which the module [`covers`], with `n_ctas` CTAs, asking L2 for
/// `ahead_bytes` of weights in advance.
pub fn list(entry: &'static str, launches: &[Launch], n_ctas: u32, ahead_bytes: u64) -> Option<List> {
    let module = module(entry)?;
    let bodies: Vec<u32> = launches.iter().map(|launch| module.body(launch)).collect::<Option<_>>()?;
    // All weights in the order in which they are read, each with the end of its place in that stream.
    let mut stream: Vec<(u64, u64, u64)> = Vec::new();
    let mut ends = Vec::new();
    let mut end = 0;
    for (launch, &body) in launches.iter().zip(&bodies) {
        if let Some(&format) = module.formats.get(body as usize) {
            for (at, bytes) in weights(format, &launch.params) {
                end += bytes;
                stream.push((at, bytes, end));
            }
        }
        ends.push(end);
    }

    let mut list = List {
        entry,
        bytes: Vec::with_capacity(launches.len() * INSTRUCTION_BYTES),
        smem_bytes: RESERVED_BYTES,
        n_ctas,
    };
    let (mut arrivals, mut asked) = (0u32, 0);
    for ((launch, &body), &read) in launches.iter().zip(&bodies).zip(&ends) {
        let n: u32 = launch.grid.iter().product();
        let mut words = [0u32; WORDS as usize];
        words[super::KIND as usize] = body;
        words[super::CTA_THREADS as usize] = launch.cta.min(THREADS);
        words[super::ARRIVALS as usize] = arrivals;
        words[super::N_CTAS as usize] = n;
        words[super::GRID as usize..][..3].copy_from_slice(&launch.grid);
        arrivals += n.min(n_ctas);
        list.smem_bytes = list.smem_bytes.max(RESERVED_BYTES + launch.smem_bytes);

        // The weights from where this launch's end up to `ahead_bytes` beyond, less what was asked for before.
        let (mut from, to) = (read.max(asked), read + ahead_bytes);
        let mut ranges = 0;
        for &(at, bytes, end) in &stream {
            if ranges == RANGES as usize || from >= to {
                break;
            }
            if end <= from {
                continue;
            }
            let skipped = from - (end - bytes);
            // Whole units of 16 bytes, as matrices are.
            let wanted = (end.min(to) - from).next_multiple_of(16).min(bytes - skipped);
            let range = &mut words[HEAD_WORDS as usize + 4 * ranges..][..3];
            (range[0], range[1]) = ((at + skipped) as u32, ((at + skipped) >> 32) as u32);
            range[2] = u32::try_from(wanted).ok()?;
            from += wanted;
            ranges += 1;
        }
        asked = asked.max(from);

        let params = launch.params.bytes();
        let place = bytemuck::cast_slice_mut::<u32, u8>(&mut words[(HEAD_WORDS + 4 * RANGES) as usize..]);
        place.get_mut(..params.len())?.copy_from_slice(params);
        list.bytes.extend_from_slice(bytemuck::cast_slice(&words));
    }
    const { assert!(4 * PARAM_WORDS as usize == crate::launch::MAX_PARAM_BYTES) };
    Some(list)
}

/// The launch that plays a list, whose bytes are at `at`.
pub fn launch(list: &List, at: DevicePtr, counters: DevicePtr) -> Result<Launch, LaunchError> {
    let check = Check(Step::NAME);
    check.aligned("list", at, 16)?;
    check.aligned("counters", counters, 4)?;
    let n = check.size("instructions", list.bytes.len() / INSTRUCTION_BYTES)?;
    Ok(Launch {
        entry: list.entry,
        grid: [check.size("CTAs", list.n_ctas as usize)?, 1, 1],
        cta: THREADS,
        cluster: 1,
        smem_bytes: list.smem_bytes,
        params: Params::new().with(at).with(counters).with(n),
    })
}

/// The row in the registry.
#[derive(Debug)]
pub struct Step;

/// One case: the feed-forward part of a layer, and a norm of a longer row with a product of its own.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Format of the weights, but for the last product's of the layer.
    pub format: FormatId,
    /// That one's.
    pub down: FormatId,
    /// Elements of a row, of a layer's hidden row, and of the row that is normed by a launch of its own.
    pub sizes: [usize; 3],
    /// CTAs.
    pub n_ctas: u32,
    /// Bytes of weights asked for in advance.
    pub ahead_bytes: u64,
}

/// Added to the mean square.
const EPS: f32 = 1e-5;

impl Kernel for Step {
    const NAME: &'static str = "step";
    type Case = Case;
    const CASES: &'static [Case] = &[
        Case {
            format: FormatId::Q4_0,
            down: FormatId::Q6_K,
            sizes: [256, 512, 2304],
            n_ctas: 3,
            ahead_bytes: 1 << 16,
        },
        Case {
            format: FormatId::Q4_1,
            down: FormatId::Q8_0,
            sizes: [288, 96, 544],
            n_ctas: 1,
            ahead_bytes: 4096,
        },
        Case {
            format: FormatId::Q8_0,
            down: FormatId::Q6_K,
            sizes: [320, 256, 512],
            n_ctas: 8,
            ahead_bytes: 0,
        },
        Case {
            format: FormatId::Q4_K,
            down: FormatId::Q6_K,
            sizes: [256, 256, 768],
            n_ctas: 2,
            ahead_bytes: 1 << 20,
        },
    ];
    const NMSE_MAX: f64 = 0.0;
    const TIERS: Tiers = Tiers::From(80);
    #[cfg(feature = "emu")]
    const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::gpu::ENTRIES];

    fn problem(case: &Case, random: &mut Random) -> Problem {
        let Case { format, down, sizes: [n_embd, n_ff, n_long], n_ctas, ahead_bytes } = *case;
        let matrix = |random: &mut Random, format, n_rows: usize, k: usize| {
            let weights = quant::with_format(format, Weights(random, n_rows * k));
            let (blocks, _) = weights.expect("cases name formats of weights");
            Buffer::Input(tile::pack(format, &blocks, n_rows, k))
        };
        let mut buffers = vec![
            Buffer::Input(bytes_of(&random.values(n_embd))),
            Buffer::Input(bytes_of(&random.values(n_embd))),
            matrix(random, format, n_ff, n_embd),
            matrix(random, format, n_ff, n_embd),
            matrix(random, down, n_embd, n_ff),
            Buffer::Input(bytes_of(&random.values(n_long))),
            Buffer::Input(bytes_of(&random.values(n_long))),
            matrix(random, format, 70, n_long),
        ];
        let inputs = buffers.len();
        let kind = |format: FormatId| format.act_kind().expect("block formats have one");
        // Twice: what launches write, and what the step does.
        let written = [
            4 * n_ff,
            4 * n_embd,
            n_long,
            n_long / 32 * size_of::<crate::kernels::quantise_act::ActScale>(),
            4 * 70,
        ];
        buffers.extend(written.iter().map(|&bytes| Buffer::Output(Expected::Unchecked(bytes))));
        let same =
            |(i, &bytes): (usize, &usize)| Buffer::Output(Expected::Same { buffer: inputs + i, bytes });
        buffers.extend(written.iter().enumerate().map(same));
        buffers.push(Buffer::Changed(vec![0; COUNTERS_BYTES], Expected::Exact(vec![0; COUNTERS_BYTES])));
        let counters = buffers.len() - 1;

        let launches = move |at: &[DevicePtr], to: usize| -> Result<Vec<Launch>, LaunchError> {
            let none = DevicePtr::NULL;
            let part = |w, residual, y, n_rows| Matrix { w, bias: none, residual, y, n_rows };
            let product = |format, parts: &[Matrix], glu, q, scales, k, norm| {
                let args = ProductArgs { format, parts, glu, q, scales, k, n_cols: 1, mixture: None };
                mmvq::launch_with(&args, Besides { norm, acts: None })
            };
            let (hidden, out, codes, scales, last) = (at[to], at[to + 1], at[to + 2], at[to + 3], at[to + 4]);
            let gated = [part(at[2], none, hidden, n_ff), part(at[3], none, none, n_ff)];
            let norm = Some(Norm { weight: at[1], eps: EPS });
            Ok(vec![
                product(format, &gated, Some(Glu::Silu), at[0], none, n_embd, norm)?,
                product(down, &[part(at[4], at[0], out, n_embd)], None, hidden, none, n_ff, None)?,
                rms_norm::launch(&rms_norm::Args {
                    x: at[5],
                    residual: none,
                    h: none,
                    weight: at[6],
                    add: none,
                    output: Output::Act(kind(format)),
                    y: codes,
                    scales,
                    n_rows: 1,
                    n: n_long,
                    eps: EPS,
                })?,
                product(format, &[part(at[7], none, last, 70)], None, codes, scales, n_long, None)?,
            ])
        };
        let outputs = inputs + written.len();
        let made = move |at: &[DevicePtr]| {
            let played = launches(at, outputs).ok()?;
            list(entry(&played)?, &played, n_ctas, ahead_bytes)
        };
        buffers.push(Buffer::Made {
            bytes: 4 * INSTRUCTION_BYTES,
            make: Box::new(move |at| made(at).map(|list| list.bytes).unwrap_or_default()),
        });
        let launches = move |at: &[DevicePtr]| {
            let mut all = launches(at, inputs)?;
            let list = made(at).ok_or(LaunchError::Format { kernel: Step::NAME, format })?;
            all.push(launch(&list, at[counters + 1], at[counters])?);
            Ok(all)
        };
        Problem { buffers, launches: Box::new(launches) }
    }

    fn bytes(case: &Case) -> u64 {
        let [n_embd, n_ff, n_long] = case.sizes;
        let bytes = |format: FormatId, n: usize| n / info(format).elems * info(format).bytes;
        let layer = bytes(case.format, 2 * n_ff * n_embd) + bytes(case.down, n_ff * n_embd);
        (layer + bytes(case.format, 70 * n_long)) as u64
    }

    fn flops(case: &Case) -> u64 {
        let [n_embd, n_ff, n_long] = case.sizes;
        2 * (3 * n_ff * n_embd + 70 * n_long) as u64
    }
}
