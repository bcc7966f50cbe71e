//! Launchers: which entry, how the work is cut, and the arguments.

use crate::kernels::quantise_act::Kind;
use quant::FormatId;

use super::{
    Append, CAUSAL, HOPPER_ROWS, HOPPER_THREADS, HopperTile, Kept, MAX_DIM_V, MERGE_COLUMNS, MERGE_THREADS,
    NEOX, OFFSET_VALUES, PLAIN_WARPS, ROTATED, ROTATED_COLUMNS, ROTATED_WIDTH, ROWS, SPAN, TRANSFORM, Tile,
};
use crate::case::Kernel;
use crate::driver::DeviceInfo;
use crate::kernels::rope::Mode;
use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};
use crate::ptx;

/// The row in the registry of the classes `f16` and `wide`.
#[derive(Debug)]
pub struct Flash;

/// The row of the class `split`.
#[derive(Debug)]
pub struct FlashSplit;

/// The row of what prompts get on Hopper.
#[derive(Debug)]
pub struct FlashHopper;

/// The row of what GPUs before sm_80 get.
#[derive(Debug)]
pub struct FlashPlain;

/// Formats that the cache may have.
pub const KV_FORMATS: [FormatId; 8] = [
    FormatId::F32,
    FormatId::F16,
    FormatId::BF16,
    FormatId::Q8_0,
    FormatId::Q4_0,
    FormatId::Q4_1,
    FormatId::Q5_0,
    FormatId::Q5_1,
];

/// How operands are kept in shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    /// f16 as the cache has it.
    F16,
    /// f16, widened.
    Wide,
    /// Two bf16.
    Split,
}

impl Class {
    /// Of a pair of cache formats.
    fn of(formats: [FormatId; 2]) -> Class {
        let split = |format: &FormatId| matches!(format, FormatId::F32 | FormatId::BF16);
        if formats.iter().any(split) {
            Class::Split
        } else if formats == [FormatId::F16; 2] {
            Class::F16
        } else {
            Class::Wide
        }
    }
}

/// An entry and what it takes.
#[derive(Clone, Copy, Debug)]
struct Variant {
    class: Class,
    entry: &'static str,
    tile: Tile,
    /// CTAs that a multiprocessor has registers for.
    ctas_per_sm: u32,
}

impl Variant {
    /// CTAs of so much memory that a multiprocessor runs at a time; a little of its own goes to each beside.
    fn ctas_per_sm(&self, smem_bytes: u32, smem_per_cta_bytes: u32) -> u32 {
        const RESERVED_BYTES: u32 = 1024;
        let room = (smem_per_cta_bytes + RESERVED_BYTES) / (smem_bytes + RESERVED_BYTES);
        room.clamp(1, self.ctas_per_sm)
    }
}

macro_rules! variants {
    ($file:literal $table:ident $prefix:literal ($threads:literal, $ctas_per_sm:literal)
        $($dim:literal $suffix:literal $class:ident $kind:ident $stages:literal
            [$ks:literal $ns:literal $no:literal] [$sharers:literal $groups:literal];)*) => {
        const $table: &[Variant] = &[$(Variant {
            class: Class::$class,
            entry: concat!($prefix, $dim, "_", $suffix),
            tile: Tile::new(Kept::$kind, $stages, [$ks, $ns, $no], [$sharers, $groups]),
            ctas_per_sm: $ctas_per_sm,
        }),*];
    };
}
for_each_table!(variants);

macro_rules! hopper_tiles {
    ($($dim:literal $suffix:literal $class:ident
        [$kc:literal $s:literal $o:literal $steps:literal] $stages:literal [$piece:literal $pieces:literal];)*) => {
        /// Classes for prompts on Hopper, entries and their tiles, smallest first.
        const HOPPER: &[(Class, &str, HopperTile)] = &[$((
            Class::$class,
            concat!("flash_hopper_", $dim, "_", $suffix),
            HopperTile::new([$kc, $s, $o, $steps], $stages, [$piece, $pieces]),
        )),*];
    };
}
for_each_hopper!(hopper_tiles);

/// The entry for prompts on Hopper, its tile and its shared memory; `None` if none holds the head, a CTA has too little
/// memory, the cache has F32 or BF16 or heads have slopes.
fn hopper(cache: &Cache, has_slopes: bool, smem_per_cta_bytes: u32) -> Option<(&'static str, u32)> {
    let (class, row_bytes) = (Class::of([cache.type_k, cache.type_v]), row_bytes(cache).ok()?);
    let mut found = HOPPER.iter().filter(|(of, _, tile)| {
        let holds = cache.head_dim_k <= tile.dims[0] && cache.head_dim_v <= tile.dims[1];
        *of == class && holds && !has_slopes && tile.smem_bytes(row_bytes) <= smem_per_cta_bytes
    });
    found.next().map(|(_, entry, tile)| (*entry, tile.smem_bytes(row_bytes)))
}

/// How the work is cut; the result does not depend on it, but for [`Geometry::Plain`] and [`Geometry::Prompt`], each of
/// which has bits of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Geometry {
    /// No tensor cores: one warp per row.
    Plain,
    /// Tokens of prompts on Hopper, however many: see [`Geometry::of_prompt`].
    Prompt,
    /// Tiles of rows of many tokens.
    Prefill,
    /// A CTA per token and KV head.
    Decode,
    /// A token and KV head's spans shared by as many CTAs as run at a time, and a second launch that merges.
    Split {
        /// Spans that `scratch` has room for: no sequence is longer.
        n_spans: usize,
        /// Multiprocessors of the device.
        n_sm: u32,
    },
}

/// Most spans that a CTA walks alone where others have nothing to do: the second launch would take as long.
const DECODE_SPANS: usize = 2;

impl Geometry {
    /// What all tokens of prompts get on a device with a cache like this, whatever else a step holds. If there is nothing,
    /// they are like any others.
    pub fn of_prompt(device: &DeviceInfo, cache: &Cache, has_slopes: bool) -> Option<Geometry> {
        let found = hopper(cache, has_slopes, device.smem_per_cta_bytes);
        (ptx::runs_hopper(device) && found.is_some()).then_some(Geometry::Prompt)
    }

    /// The best for `n_tokens` tokens, of which `tokens_per_sequence` belong to the sequence that has most, over at most
    /// `max_len` positions, on a device of compute capability `sm` (times ten) with `n_sm` multiprocessors.
    pub fn choose(
        sm: u32,
        n_sm: u32,
        n_tokens: usize,
        tokens_per_sequence: usize,
        n_head_kv: usize,
        max_len: usize,
    ) -> Geometry {
        let n_spans = max_len.div_ceil(SPAN).max(1);
        if sm < 80 {
            Geometry::Plain
        } else if tokens_per_sequence >= ROWS {
            Geometry::Prefill
        } else if n_spans <= DECODE_SPANS || n_tokens * n_head_kv > n_sm as usize {
            Geometry::Decode
        } else {
            Geometry::Split { n_spans, n_sm }
        }
    }
}

/// Bytes of `scratch` for [`Geometry::Split`].
pub fn scratch_bytes(n_tokens: usize, n_head: usize, head_dim_v: usize, n_spans: usize) -> usize {
    n_tokens * n_head * n_spans * (head_dim_v + 2) * 4
}

/// A layer's part of the cache.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)] // the contract's names
pub struct Cache {
    pub k: DevicePtr,
    pub v: DevicePtr,
    pub type_k: FormatId,
    pub type_v: FormatId,
    pub n_head_kv: usize,
    pub head_dim_k: usize,
    pub head_dim_v: usize,
}

/// What changes from step to step, in device memory.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)] // the contract's names
pub struct Step {
    pub positions: DevicePtr,
    pub token_sequences: DevicePtr,
    pub sequences: DevicePtr,
    pub pages: DevicePtr,
    pub n_tokens: usize,
}

/// Arguments; see the contract. `scratch` may be NULL unless the geometry is [`Geometry::Split`].
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)] // the contract's names
pub struct Args {
    pub cache: Cache,
    pub step: Step,
    pub q: DevicePtr,
    pub out: DevicePtr,
    pub scratch: DevicePtr,
    pub sinks: DevicePtr,
    pub slopes: DevicePtr,
    pub n_head: usize,
    pub causal: bool,
    pub window: usize,
    pub scale: f32,
    pub softcap: f32,
    pub geometry: Geometry,
    /// Results are quantised: their kind, and where scales go.
    pub acts: Option<(Kind, DevicePtr)>,
    /// Results are rotated, before they are quantised.
    pub rotated: bool,
    /// The tokens' own keys and values, if the cache does not have them yet: a decode that [`appends`] stores them.
    pub append: Option<Append>,
    /// Shared memory that the device gives to a CTA: a tile too large for it makes way for the next smaller one.
    pub smem_per_cta_bytes: u32,
}

/// What to launch, in this order.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Launches {
    /// The attention.
    pub attention: Launch,
    /// The merge of what was split.
    pub merge: Option<Launch>,
}

impl Launches {
    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Launch> {
        core::iter::once(&self.attention).chain(&self.merge)
    }
}

/// The tile for these arguments on tensor cores: in the order of the tables, so that prefill finds its own tile of a head
/// before that of decode.
fn variant(args: &Args) -> Option<Variant> {
    let Cache { type_k, type_v, head_dim_k, head_dim_v, .. } = args.cache;
    let class = Class::of([type_k, type_v]);
    let row_bytes = row_bytes(&args.cache).ok()?;
    let decodes = [DECODE, LARGE_DECODE, SPLIT_DECODE];
    let prefills = match args.geometry {
        Geometry::Prefill => [PREFILL, NARROW_PREFILL, SPLIT_PREFILL, SPLIT_NARROW_PREFILL].as_slice(),
        _ => &[],
    };
    let mut variants = prefills.iter().chain(&decodes).copied().flatten().copied();
    variants.find(|v| {
        let holds = head_dim_k <= v.tile.dims[0] && head_dim_v <= v.tile.dims[1];
        v.class == class && holds && v.tile.smem_bytes(row_bytes) <= args.smem_per_cta_bytes
    })
}

/// Spans from which on a split decode of heads wider than 64 gains by appending. With fewer its CTAs wait for queries and
/// angles when they would otherwise ask for the cache: an 8B model at 300 to 2,048 positions on an H100 is 1 to 2 % slower.
const APPEND_SPANS: usize = 32;

/// Whether the launch of these arguments can append its tokens' keys and values, of whose elements `n_rot` are rotated, if
/// each token is of another sequence, and gains by it.
pub fn appends(args: &Args, n_rot: usize) -> bool {
    let decodes = matches!(args.geometry, Geometry::Decode | Geometry::Split { .. });
    let gains = |v: &Variant| match args.geometry {
        Geometry::Split { n_spans, .. } => v.tile.dims[0] <= 64 || n_spans >= APPEND_SPANS,
        _ => true,
    };
    let whole = |v: &Variant| {
        let fills = args.cache.head_dim_k == v.tile.dims[0] && n_rot == args.cache.head_dim_k;
        v.class == Class::F16 && v.tile.q_in_registers() && fills
    };
    args.causal && decodes && variant(args).is_some_and(|v| whole(&v) && gains(&v))
}

/// Attention of a step's tokens over a layer's cache.
pub fn launch(args: &Args) -> Result<Launches, LaunchError> {
    let checked = Checked::new(args)?;
    match args.geometry {
        Geometry::Plain => Ok(Launches { attention: checked.plain(), merge: None }),
        Geometry::Prompt => Ok(Launches { attention: checked.prompt()?, merge: None }),
        Geometry::Decode | Geometry::Prefill | Geometry::Split { .. } => checked.tiled(),
    }
}

/// Arguments that some geometry takes, and what every launch of them is given.
struct Checked<'a> {
    args: &'a Args,
    n_tokens: u32,
    n_head: u32,
    n_head_kv: u32,
    /// Query heads of a key's head.
    group: usize,
    /// Scales of quantised results.
    scales: DevicePtr,
    /// Positions, the tokens' sequences, sequences, pages, sinks, slopes.
    addresses: [DevicePtr; 6],
    /// Tokens, heads, those of keys, dimensions, bytes of a row of the cache and formats, of keys and of values.
    sizes: [u32; 9],
    flags: u32,
    window: u32,
    /// What scores are multiplied by.
    scale: f32,
}

impl<'a> Checked<'a> {
    fn new(args: &'a Args) -> Result<Checked<'a>, LaunchError> {
        let check = Check(Flash::NAME);
        let Args { cache, step, .. } = *args;
        let n_tokens = check.size("n_tokens", step.n_tokens)?;
        let n_head = check.size("n_head", args.n_head)?;
        let n_head_kv = check.size("n_head_kv", cache.n_head_kv)?;
        check.multiple("n_head", args.n_head, cache.n_head_kv, "a multiple of n_head_kv")?;
        check.grid("n_head_kv", cache.n_head_kv)?;
        check.size("n_tokens * n_head", step.n_tokens.saturating_mul(args.n_head))?;
        let window = if args.window == 0 { 0 } else { check.size("window", args.window)? };
        // Scores are compared before they are scaled.
        if args.scale.is_nan() || args.scale <= 0.0 {
            return Err(check.shape("scale", "above 0", args.scale.to_bits() as usize));
        }
        let [bytes_k, bytes_v] = row_bytes(&cache)?;
        check_results(args)?;
        let scales = args.acts.map_or(DevicePtr::NULL, |(_, scales)| scales);
        for (what, at, align) in [
            ("k", cache.k, 16),
            ("v", cache.v, 16),
            ("q", args.q, 16),
            ("out", args.out, 16),
            ("scales", scales, 16),
            ("scratch", args.scratch, 16),
            ("sequences", step.sequences, 8),
            ("positions", step.positions, 4),
            ("token_sequences", step.token_sequences, 4),
            ("pages", step.pages, 4),
            ("sinks", args.sinks, 4),
            ("slopes", args.slopes, 4),
        ] {
            check.aligned(what, at, align)?;
        }
        if matches!(args.geometry, Geometry::Split { .. }) && args.scratch == DevicePtr::NULL {
            return Err(check.shape("scratch of Geometry::Split", "an address", 0));
        }
        if args.append.is_some() && !appends(args, cache.head_dim_k) {
            let expected = "one that decodes: see `appends`";
            return Err(check.shape("tokens of a launch that appends", expected, step.n_tokens));
        }

        let transform = args.softcap != 0.0 || args.slopes != DevicePtr::NULL;
        let scale = match (transform, args.softcap != 0.0) {
            (false, _) => args.scale * core::f32::consts::LOG2_E,
            (true, false) => args.scale,
            (true, true) => args.scale / args.softcap,
        };
        let flag = |on: bool, bit: u32| if on { bit } else { 0 };
        let neox = args.append.is_some_and(|append| append.mode == Mode::Neox);
        let offset_values = args.acts.is_some_and(|(kind, _)| kind == Kind::Q8_1);
        let flags = flag(args.causal, CAUSAL)
            | flag(transform, TRANSFORM)
            | flag(neox, NEOX)
            | flag(offset_values, OFFSET_VALUES)
            | flag(args.rotated, ROTATED);
        let [dim_k, dim_v] = [cache.head_dim_k as u32, cache.head_dim_v as u32];
        let [type_k, type_v] = [cache.type_k as u32, cache.type_v as u32];
        Ok(Checked {
            args,
            n_tokens,
            n_head,
            n_head_kv,
            group: args.n_head / cache.n_head_kv,
            scales,
            addresses: [
                step.positions,
                step.token_sequences,
                step.sequences,
                step.pages,
                args.sinks,
                args.slopes,
            ],
            sizes: [n_tokens, n_head, n_head_kv, dim_k, dim_v, bytes_k, bytes_v, type_k, type_v],
            flags,
            window,
            scale,
        })
    }

    /// One warp a row.
    fn plain(&self) -> Launch {
        let Checked { args, scales, .. } = *self;
        // Its scores are natural logarithms throughout.
        let scale = if args.softcap != 0.0 { args.scale / args.softcap } else { args.scale };
        let (k, v) = (args.cache.k, args.cache.v);
        let params = Params::new().with(args.q).with(k).with(v).with(args.out).with(scales);
        let params = self.addresses.iter().fold(params, |params, &at| params.with(at));
        let params = self.sizes.iter().fold(params, |params, &size| params.with(size));
        Launch {
            entry: "flash_plain",
            grid: [(self.n_tokens * self.n_head).div_ceil(PLAIN_WARPS), 1, 1],
            cta: 32 * PLAIN_WARPS,
            cluster: 1,
            smem_bytes: 4 * PLAIN_WARPS * MAX_DIM_V,
            params: params.with(self.flags).with(self.window).with(scale).with(args.softcap),
        }
    }

    /// Prompts on Hopper.
    fn prompt(&self) -> Result<Launch, LaunchError> {
        let (check, args) = (Check(Flash::NAME), self.args);
        let has_slopes = args.slopes != DevicePtr::NULL;
        let (entry, smem_bytes) =
            hopper(&args.cache, has_slopes, args.smem_per_cta_bytes).ok_or_else(|| {
                let got = args.cache.head_dim_k.max(args.cache.head_dim_v);
                check.shape("head_dim of Geometry::Prompt", "what Geometry::of_prompt knows", got)
            })?;
        let params = Params::new().with(args.q).with(args.cache.k).with(args.cache.v).with(args.out);
        let params = self.addresses[..5].iter().fold(params, |params, &at| params.with(at));
        let params = self.sizes.iter().fold(params, |params, &size| params.with(size));
        let tiles = (args.step.n_tokens * self.group).div_ceil(HOPPER_ROWS as usize);
        Ok(Launch {
            entry,
            grid: [check.size("tiles", tiles)?, self.n_head_kv, 1],
            cta: HOPPER_THREADS,
            cluster: 1,
            smem_bytes,
            params: params.with(self.flags).with(self.window).with(self.scale).with(args.softcap),
        })
    }

    /// Tiles of rows on tensor cores, and the merge of what is split.
    fn tiled(&self) -> Result<Launches, LaunchError> {
        let (check, args, cache) = (Check(Flash::NAME), self.args, &self.args.cache);
        let n_tokens = args.step.n_tokens;
        let variant = variant(args).ok_or_else(|| {
            let got = args.smem_per_cta_bytes as usize;
            check.shape("shared memory per CTA", "enough for the head's smallest tile", got)
        })?;
        let tile = variant.tile;
        let smem_bytes = tile.smem_bytes([self.sizes[5], self.sizes[6]]);
        let tiles = self.group.div_ceil(tile.rows());
        let (mut n_spans, mut shares) = (0, 1);
        if let Geometry::Split { n_spans: room, n_sm } = args.geometry {
            n_spans = check.size("n_spans", room)?;
            // As many CTAs as the device runs at a time, if there are spans for them: all start together and end together.
            let at_a_time =
                n_sm.saturating_mul(variant.ctas_per_sm(smem_bytes, args.smem_per_cta_bytes)) as usize;
            shares = (at_a_time / (n_tokens * cache.n_head_kv * tiles)).clamp(1, room);
        }
        let grid = if tile.per_token() {
            let tiles = check.grid("n_head_kv * tiles", cache.n_head_kv * tiles)?;
            [self.n_tokens, tiles, check.grid("shares", shares)?]
        } else {
            [check.size("tiles", (n_tokens * self.group).div_ceil(tile.rows()))?, self.n_head_kv, 1]
        };
        let appended = args
            .append
            .map_or([DevicePtr::NULL; 4], |append| [append.k, append.v, append.cells, append.angles]);
        let aligned = [("append.k", 8), ("append.v", 8), ("cells", 4), ("angles", 16)];
        for ((what, align), at) in aligned.into_iter().zip(appended) {
            check.aligned(what, at, align)?;
        }
        let params = Params::new().with(args.q).with(cache.k).with(cache.v).with(args.out).with(self.scales);
        let params = params.with(args.scratch);
        let params = self.addresses.iter().fold(params, |params, &at| params.with(at));
        let params = self.sizes.iter().fold(params, |params, &size| params.with(size));
        let params = params.with(self.flags).with(self.window).with(self.scale).with(args.softcap);
        let attention = Launch {
            entry: variant.entry,
            grid,
            cta: 32 * (tile.sharers * tile.row_groups) as u32,
            cluster: 1,
            smem_bytes,
            params: appended.iter().fold(params.with(n_spans), |params, &at| params.with(at)),
        };
        Ok(Launches { attention, merge: (n_spans > 0).then(|| self.merge(n_spans)) })
    }

    /// What makes one result of those of `n_spans` spans.
    fn merge(&self, n_spans: u32) -> Launch {
        let (args, step, dim_v) = (self.args, &self.args.step, self.args.cache.head_dim_v as u32);
        let (entry, columns) = if args.rotated {
            ("flash_merge_rotated", ROTATED_COLUMNS)
        } else {
            ("flash_merge", MERGE_COLUMNS)
        };
        let params = Params::new().with(args.scratch).with(args.out).with(self.scales);
        let params = params.with(step.positions).with(step.token_sequences).with(step.sequences);
        let params = params.with(args.sinks).with(self.n_head).with(dim_v);
        Launch {
            entry,
            grid: [self.n_tokens * self.n_head, dim_v.div_ceil(columns), 1],
            cta: MERGE_THREADS,
            cluster: 1,
            // Per span weights and values; per warp a maximum.
            smem_bytes: MERGE_THREADS * (16 + 4 * columns) + MERGE_THREADS / 8,
            params: params.with(self.flags).with(self.window).with(n_spans),
        }
    }
}

/// Most dimensions of a key.
const MAX_DIM_K: usize = 576;

/// Bytes of a row of the cache, of keys and of values; an error if no kernel has those.
fn row_bytes(cache: &Cache) -> Result<[u32; 2], LaunchError> {
    let check = Check(Flash::NAME);
    let of = |what, format, head_dim, most| {
        if !KV_FORMATS.contains(&format) {
            return Err(LaunchError::Format { kernel: Flash::NAME, format });
        }
        check.multiple(what, head_dim, 8, "a multiple of 8")?;
        if head_dim > most {
            return Err(check.shape(what, "at most 576 for keys and 512 for values", head_dim));
        }
        let row = quant::row::row_bytes(format, head_dim);
        check.size(what, row.map_err(|_| check.shape(what, "a multiple of the format's block", head_dim))?)
    };
    Ok([
        of("head_dim_k", cache.type_k, cache.head_dim_k, MAX_DIM_K)?,
        of("head_dim_v", cache.type_v, cache.head_dim_v, MAX_DIM_V as usize)?,
    ])
}

/// Whether the kernels end results in this form.
fn check_results(args: &Args) -> Result<(), LaunchError> {
    let (check, dim_v) = (Check(Flash::NAME), args.cache.head_dim_v);
    if args.acts.is_some() {
        check.multiple("head_dim_v", dim_v, 32, "a multiple of 32 where results are quantised")?;
    }
    if args.rotated {
        let width = ROTATED_WIDTH as usize;
        check.multiple("head_dim_v", dim_v, width, "a multiple of 64 where results are rotated")?;
    }
    if args.geometry == Geometry::Prompt && (args.rotated || args.acts.is_some()) {
        return Err(check.shape("results of Geometry::Prompt", "floats as they are", 1));
    }
    Ok(())
}
