//! What is computed, in f64, and the cases and shapes that hold the launches to it.

use alloc::{boxed::Box, vec, vec::Vec};

use crate::kernels::quantise_act::Kind;
use quant::FormatId;

use super::{
    Append, Args, Cache, Flash, FlashHopper, FlashPlain, FlashSplit, Geometry, NO_SEQUENCE, PAGE,
    ROTATED_WIDTH, SPAN, Step, launch, scratch_bytes,
};
use crate::case::{Buffer, Expected, Kernel, Problem, Random, Tiers, bytes_of};
use crate::kernels::output::Output;
use crate::kernels::rope::Mode;
use crate::kernels::{hadamard, kv_store, quantise_act};
use crate::launch::{DevicePtr, Launch, LaunchError};

/// What the cases' launches may take: as much as an H100 has.
const SMEM_BYTES: u32 = 227 * 1024;

/// What of a launch is in numbers: for the definition.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)] // the contract's names
pub struct Scores {
    pub causal: bool,
    pub window: usize,
    pub scale: f32,
    pub softcap: f32,
    pub sink: Option<f32>,
    pub slope: f32,
}

/// The definition: one token and head. `k`, `v` are the rows of its sequence's positions, in order.
pub fn reference(q: &[f32], k: &[Vec<f32>], v: &[Vec<f32>], pos: usize, x: &Scores) -> Vec<f64> {
    let end = if x.causal { k.len().min(pos + 1) } else { k.len() };
    let start = if x.window > 0 { (pos + 1).saturating_sub(x.window) } else { 0 };
    let mut out = vec![0.0; v.first().map_or(0, Vec::len)];
    let score = |i: usize| {
        let dot: f64 = q.iter().zip(&k[i]).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum();
        let (s, cap) = (dot * f64::from(x.scale), f64::from(x.softcap));
        let s = if cap != 0.0 { cap * libm::tanh(s / cap) } else { s };
        s - f64::from(x.slope) * (pos as f64 - i as f64).abs()
    };
    let scores: Vec<f64> = (start..end).map(score).collect();
    let sink = x.sink.map(f64::from);
    let max = scores.iter().copied().chain(sink).fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = scores.iter().copied().chain(sink).map(|s| libm::exp(s - max)).sum();
    for (s, v) in scores.iter().zip(&v[start.min(end)..end]) {
        let weight = libm::exp(s - max) / total;
        out.iter_mut().zip(v).for_each(|(out, &v)| *out += weight * f64::from(v));
    }
    out
}

/// One case. The tokens of a step are the last ones of each sequence, in order.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)] // the contract's names
pub struct Case {
    pub types: [FormatId; 2],
    pub dims: [usize; 2],
    pub n_head: usize,
    pub n_head_kv: usize,
    /// Positions, and how many of them are this step's; none: a token of padding.
    pub sequences: &'static [(usize, usize)],
    pub causal: bool,
    pub window: usize,
    pub softcap: f32,
    pub sinks: bool,
    pub slopes: bool,
    pub geometry: Geometry,
    /// Results are also computed rotated.
    pub rotated: bool,
    /// Results are also computed quantised, rotated before if they are.
    pub acts: Option<Kind>,
    /// Each token is of another sequence; their keys and values are appended by the launch, rotated in these pairs.
    pub append: Option<Mode>,
}

/// What the cases have in common.
pub const BASE: Case = Case {
    types: [FormatId::F16; 2],
    dims: [64, 64],
    n_head: 4,
    n_head_kv: 2,
    sequences: &[(70, 1)],
    causal: true,
    window: 0,
    softcap: 0.0,
    sinks: false,
    slopes: false,
    geometry: Geometry::Decode,
    rotated: false,
    acts: None,
    append: None,
};

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
    Case { sequences: &[(4096, 512)], geometry: Geometry::Prefill, ..BENCH_BASE },
    Case { sequences: &[(16_384, 512)], geometry: Geometry::Prefill, ..BENCH_BASE },
    Case { sequences: &[(8192, 2048)], geometry: Geometry::Prefill, ..BENCH_BASE },
    Case { sequences: &[(16_384, 1)], geometry: split(16_384), ..BENCH_256 },
    Case { sequences: &[(4096, 512)], geometry: Geometry::Prefill, ..BENCH_256 },
    Case { sequences: &[(16_384, 512)], geometry: Geometry::Prefill, ..BENCH_256 },
];

/// Inputs of a case on the host.
pub struct Data {
    /// Bytes of the layer's K and V.
    pub cache: [Vec<u8>; 2],
    /// Their rows, decoded: sequence, KV head, position. Not for timing.
    pub rows: [Vec<Vec<Vec<Vec<f32>>>>; 2],
    /// The step's arrays.
    pub positions: Vec<u32>,
    /// Sequence of each token.
    pub token_sequences: Vec<u32>,
    /// First page and positions of each sequence.
    pub sequences: Vec<[u32; 2]>,
    /// Pages of all sequences.
    pub pages: Vec<u32>,
    /// [n_tokens, n_head, head_dim_k]
    pub q: Vec<f32>,
    /// `[n_head]`
    pub sinks: Vec<f32>,
    /// `[n_head]`
    pub slopes: Vec<f32>,
}

impl Data {
    /// Random inputs. Cells that no position has keep whatever bytes: here all ones, which are no numbers.
    pub fn new(case: &Case, random: &mut Random) -> Data {
        let n_pages: usize = case.sequences.iter().map(|(len, _)| len.div_ceil(PAGE)).sum();
        // Pages lie in the cache in no order.
        let mut free: Vec<u32> = (0..n_pages as u32).collect();
        for i in (1..n_pages).rev() {
            free.swap(i, random.below(i as u64 + 1) as usize);
        }
        let row_bytes = [0, 1]
            .map(|p| quant::row::row_bytes(case.types[p], case.dims[p]).expect("cases fit their formats"));
        let mut data = Data {
            cache: row_bytes.map(|bytes| vec![0xff; n_pages * case.n_head_kv * PAGE * bytes]),
            rows: [vec![], vec![]],
            positions: vec![],
            token_sequences: vec![],
            sequences: vec![],
            pages: vec![],
            q: vec![],
            sinks: random.values(case.n_head),
            slopes: (0..case.n_head).map(|h| 1.0 / (2 << h) as f32).collect(),
        };
        for (s, &(len, n_new)) in case.sequences.iter().enumerate() {
            let pages: Vec<u32> = free.split_off(free.len() - len.div_ceil(PAGE));
            let empty = len == 0;
            data.positions.extend(if empty { 0..1 } else { (len - n_new) as u32..len as u32 });
            data.token_sequences.resize(data.positions.len(), if empty { NO_SEQUENCE } else { s as u32 });
            data.sequences.push([data.pages.len() as u32, len as u32]);
            for p in 0..2 {
                let heads = (0..case.n_head_kv).map(|head| {
                    let row = |pos: usize| {
                        let x = random.values(case.dims[p]);
                        let page = pages[pos / PAGE] as usize * case.n_head_kv + head;
                        let at = (page * PAGE + pos % PAGE) * row_bytes[p];
                        let bytes = &mut data.cache[p][at..at + row_bytes[p]];
                        quant::row::encode(case.types[p], &x, None, bytes)
                            .expect("cache formats can be encoded");
                        if random.is_timing() {
                            return vec![];
                        }
                        let mut decoded = vec![0.0; case.dims[p]];
                        quant::row::decode(case.types[p], bytes, &mut decoded).expect("as encoded");
                        decoded
                    };
                    (0..len).map(row).collect()
                });
                let heads = heads.collect();
                data.rows[p].push(heads);
            }
            data.pages.extend(pages);
        }
        // Scores of a few units, so that the softmax is neither flat nor a single position.
        let q = random.values(data.positions.len() * case.n_head * case.dims[0]);
        data.q = q.into_iter().map(|q| 4.0 * q).collect();
        data
    }

    /// What the launch must give.
    pub fn expected(&self, case: &Case) -> Vec<f64> {
        let group = case.n_head / case.n_head_kv;
        let head = |(i, q): (usize, &[f32])| {
            let (token, head) = (i / case.n_head, i % case.n_head);
            let scores = Scores {
                causal: case.causal,
                window: case.window,
                scale: case.scale(),
                softcap: case.softcap,
                sink: case.sinks.then(|| self.sinks[head]),
                slope: if case.slopes { self.slopes[head] } else { 0.0 },
            };
            match self.token_sequences[token] {
                NO_SEQUENCE => vec![0.0; case.dims[1]],
                s => {
                    let [k, v] = [0, 1].map(|p| &self.rows[p][s as usize][head / group]);
                    reference(q, k, v, self.positions[token] as usize, &scores)
                }
            }
        };
        self.q.chunks(case.dims[0]).enumerate().flat_map(head).collect()
    }

    /// Arrays in the order that [`Case::args`] takes their addresses in, before output and scratch.
    pub fn buffers(&self) -> Vec<Vec<u8>> {
        // An array may be empty, an allocation may not.
        let words = |x: &[u32]| bytes_of(if x.is_empty() { &[0] } else { x });
        vec![
            self.cache[0].clone(),
            self.cache[1].clone(),
            words(&self.positions),
            words(&self.token_sequences),
            bytes_of(&self.sequences),
            words(&self.pages),
            bytes_of(&self.q),
            bytes_of(&self.sinks),
            bytes_of(&self.slopes),
        ]
    }
}

impl Case {
    fn scale(&self) -> f32 {
        1.0 / libm::sqrtf(self.dims[0] as f32)
    }

    /// Tokens of the step.
    pub fn n_tokens(&self) -> usize {
        self.sequences.iter().map(|&(len, n_new)| if len == 0 { 1 } else { n_new }).sum()
    }

    /// Bytes of `scratch`, at least one.
    pub fn scratch_bytes(&self) -> usize {
        match self.geometry {
            Geometry::Split { n_spans, .. } => {
                scratch_bytes(self.n_tokens(), self.n_head, self.dims[1], n_spans)
            }
            _ => 1,
        }
    }

    /// Arguments, given the addresses of [`Data::buffers`], of the output and of scratch.
    pub fn args(&self, at: &[DevicePtr]) -> Args {
        Args {
            cache: Cache {
                k: at[0],
                v: at[1],
                type_k: self.types[0],
                type_v: self.types[1],
                n_head_kv: self.n_head_kv,
                head_dim_k: self.dims[0],
                head_dim_v: self.dims[1],
            },
            step: Step {
                positions: at[2],
                token_sequences: at[3],
                sequences: at[4],
                pages: at[5],
                n_tokens: self.n_tokens(),
            },
            q: at[6],
            out: at[9],
            scratch: at[10],
            sinks: if self.sinks { at[7] } else { DevicePtr::NULL },
            slopes: if self.slopes { at[8] } else { DevicePtr::NULL },
            n_head: self.n_head,
            causal: self.causal,
            window: self.window,
            scale: self.scale(),
            softcap: self.softcap,
            geometry: self.geometry,
            rotated: false,
            acts: None,
            append: None,
            smem_per_cta_bytes: SMEM_BYTES,
        }
    }
}

/// Results of a case that are more than floats, and the arrays that hold them to what kernels of their own make of those.
#[derive(Clone, Copy)]
struct Finished {
    case: Case,
    /// Index of the first of five arrays: rotated floats, codes and scales of kernels of their own; floats or codes, and
    /// scales, of the launch.
    first: usize,
}

impl Finished {
    /// Elements of the results.
    fn n(&self) -> usize {
        self.case.n_tokens() * self.case.n_head * self.case.dims[1]
    }

    /// Adds the arrays.
    fn new(case: &Case, buffers: &mut Vec<Buffer>, is_timing: bool) -> Option<Finished> {
        if !case.rotated && case.acts.is_none() {
            return None;
        }
        let finished = Finished { case: *case, first: buffers.len() };
        let first = finished.first;
        let floats = 4 * finished.n();
        let (out, scales) = case.acts.map_or(Output::F32, Output::Act).bytes(finished.n());
        let room = |bytes: usize| Buffer::Input(vec![0; bytes.max(1)]);
        buffers.extend([room(floats), room(out), room(scales)]);
        let same = |buffer, bytes| match bytes {
            0 => Buffer::Input(vec![0]),
            _ if is_timing => Buffer::Output(Expected::Unchecked(bytes)),
            _ => Buffer::Output(Expected::Same { buffer, bytes }),
        };
        let result = if case.acts.is_some() { first + 1 } else { first };
        buffers.extend([same(result, out), same(first + 2, scales)]);
        Some(finished)
    }

    /// The launches that make of these results what is asked for.
    fn apart(self, at: &[DevicePtr], out: DevicePtr) -> Result<Vec<Launch>, LaunchError> {
        let Finished { case, first } = self;
        let (mut launches, mut x) = (vec![], out);
        if case.rotated {
            let (y, n, width) = (at[first], self.n(), ROTATED_WIDTH as usize);
            launches.push(hadamard::launch(&hadamard::Args { x, y, n, width })?);
            x = y;
        }
        if let Some(kind) = case.acts {
            let (q, scales) = (at[first + 1], at[first + 2]);
            let (n_cols, k) = (case.n_tokens() * case.n_head, case.dims[1]);
            launches.push(quantise_act::launch(&quantise_act::Args { kind, x, q, scales, n_cols, k })?);
        }
        Ok(launches)
    }

    /// Arguments of the launch that does so itself.
    fn within(self, at: &[DevicePtr], args: Args) -> Args {
        let Finished { case, first } = self;
        let acts = case.acts.map(|kind| (kind, at[first + 4]));
        Args { out: at[first + 3], rotated: case.rotated, acts, ..args }
    }
}

/// The launch that appends beside `kv_store` and the one that does not, which is held to the definition: cache and output
/// must be the same.
fn append_problem(case: &Case, mode: Mode, random: &mut Random) -> Problem {
    let mut data = Data::new(case, random);
    let (n_rot, n_tokens) = (case.dims[0], case.n_tokens());
    let angles: Vec<f32> = (0..n_tokens * n_rot / 2)
        .map(|_| f64::from(random.value()))
        .flat_map(|angle| [libm::cos(angle) as f32, libm::sin(angle) as f32])
        .collect();
    let angles_of = |token: usize| &angles[token * n_rot..][..n_rot];
    let new = case.dims.map(|dim| random.values(n_tokens * case.n_head_kv * dim));
    let q = data.q.clone();
    for (i, head) in data.q.chunks_mut(n_rot).enumerate() {
        kv_store::reference(head, angles_of(i / case.n_head), mode);
    }
    // The cells have no numbers yet; the definition sees what they will hold.
    let mut cells = vec![kv_store::NO_CELL; n_tokens];
    for token in 0..n_tokens {
        let sequence = data.token_sequences[token];
        if sequence == NO_SEQUENCE {
            continue;
        }
        let (pos, first) = (data.positions[token] as usize, data.sequences[sequence as usize][0]);
        let page = data.pages[first as usize + pos / PAGE] as usize;
        cells[token] = (page * PAGE + pos % PAGE) as u32;
        for (p, new) in new.iter().enumerate() {
            let (dim, bytes) = (case.dims[p], 2 * case.dims[p]);
            let heads = new.chunks(dim).skip(token * case.n_head_kv).take(case.n_head_kv);
            for (h, head) in heads.enumerate() {
                let mut head = head.to_vec();
                if p == 0 {
                    kv_store::reference(&mut head, angles_of(token), mode);
                }
                let rounded = head.iter().map(|&x| half::f16::from_f32(x).to_f32()).collect();
                data.rows[p][sequence as usize][h][pos] = rounded;
                let at = ((page * case.n_head_kv + h) * PAGE + pos % PAGE) * bytes;
                data.cache[p][at..at + bytes].fill(0xff);
            }
        }
    }
    let out = 4 * n_tokens * case.n_head * case.dims[1];
    let [k, v] = &data.cache;
    let mut buffers: Vec<Buffer> = data.buffers().into_iter().map(Buffer::Input).collect();
    let unchecked = |cache: &Vec<u8>| Buffer::Changed(cache.clone(), Expected::Unchecked(cache.len()));
    (buffers[0], buffers[1]) = (unchecked(k), unchecked(v));
    // Rotated queries.
    buffers[6] = Buffer::Output(Expected::Unchecked(4 * q.len()));
    let same = |cache: &Vec<u8>, buffer| {
        Buffer::Changed(cache.clone(), Expected::Same { buffer, bytes: cache.len() })
    };
    buffers.extend([
        Buffer::Output(Expected::F32(data.expected(case))),
        Buffer::Input(vec![0xff; case.scratch_bytes()]),
        same(k, 0),
        same(v, 1),
        if case.rotated || case.acts.is_some() {
            Buffer::Input(vec![0])
        } else {
            Buffer::Output(Expected::Same { buffer: 9, bytes: out })
        },
        Buffer::Input(bytes_of(&new[0])),
        Buffer::Input(bytes_of(&new[1])),
        Buffer::Input(bytes_of(&cells)),
        Buffer::Input(bytes_of(&angles)),
        Buffer::Input(bytes_of(&q)),
    ]);
    let finished = Finished::new(case, &mut buffers, false);
    let case = *case;
    let launches = move |at: &[DevicePtr]| {
        let after_store = case.args(at);
        let rope =
            kv_store::Rope { table: at[17], q: at[18], q_out: at[6], n_head: case.n_head, n_rot, mode };
        let stores = kv_store::launch(&kv_store::Args {
            k: at[14],
            v: at[15],
            cells: at[16],
            cache: after_store.cache,
            n_tokens,
            rope: Some(rope),
            widths: [None; 2],
        })?;
        let append = Append { k: at[14], v: at[15], cells: at[16], angles: at[17], mode };
        let appends = Args {
            cache: Cache { k: at[11], v: at[12], ..after_store.cache },
            q: at[18],
            out: at[13],
            append: Some(append),
            ..after_store
        };
        let appends = launch(&finished.map_or(appends, |finished| finished.within(at, appends)))?;
        let apart = finished.map_or(Ok(vec![]), |finished| finished.apart(at, after_store.out))?;
        let attends = launch(&after_store)?;
        Ok([stores].iter().chain(attends.iter()).chain(&apart).chain(appends.iter()).copied().collect())
    };
    Problem { buffers, launches: Box::new(launches) }
}

fn problem(case: &Case, random: &mut Random) -> Problem {
    if let Some(mode) = case.append {
        return append_problem(case, mode, random);
    }
    let data = Data::new(case, random);
    let mut buffers: Vec<Buffer> = data.buffers().into_iter().map(Buffer::Input).collect();
    buffers.push(Buffer::Output(if random.is_timing() {
        Expected::Unchecked(4 * case.n_tokens() * case.n_head * case.dims[1])
    } else {
        Expected::F32(data.expected(case))
    }));
    // Scratch holds no numbers before the launch writes it.
    buffers.push(Buffer::Input(vec![0xff; case.scratch_bytes()]));
    let is_timing = random.is_timing();
    let finished = Finished::new(case, &mut buffers, is_timing);
    let case = *case;
    let launches = move |at: &[DevicePtr]| {
        let floats = case.args(at);
        let Some(finished) = finished else { return Ok(launch(&floats)?.iter().copied().collect()) };
        let within = launch(&finished.within(at, floats))?;
        if is_timing {
            return Ok(within.iter().copied().collect());
        }
        let (apart, floats) = (finished.apart(at, floats.out)?, launch(&floats)?);
        Ok(floats.iter().chain(&apart).chain(within.iter()).copied().collect())
    };
    Problem { buffers, launches: Box::new(launches) }
}

/// K and V once per KV head for each token of a decode, for each sequence of a prefill; queries and output.
fn bytes(case: &Case) -> u64 {
    let row: usize = (0..2).map(|p| quant::row::row_bytes(case.types[p], case.dims[p]).unwrap_or(0)).sum();
    let cache: usize = case.sequences.iter().map(|&(len, _)| len * case.n_head_kv * row).sum();
    let rows = case.n_tokens() * case.n_head;
    let (out, scales) = case.acts.map_or(Output::F32, Output::Act).bytes(rows * case.dims[1]);
    (cache + rows * case.dims[0] * 4 + out + scales) as u64
}

fn flops(case: &Case) -> u64 {
    let seen = |&(len, n_new): &(usize, usize)| -> usize {
        (len - n_new.min(len)..len).map(|pos| if case.causal { pos + 1 } else { len }).sum()
    };
    let positions: usize = case.sequences.iter().map(seen).sum();
    (2 * positions * case.n_head * (case.dims[0] + case.dims[1])) as u64
}

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
    const NMSE_MAX: f64 = 1e-9;
    const TIERS: Tiers = Tiers::From(80);
    #[cfg(feature = "emu")]
    const ENTRIES: &'static [&'static [crate::emu::Entry]] =
        &[super::entries::SPLIT_DECODE, super::entries::SPLIT_PREFILL, super::entries::SPLIT_NARROW_PREFILL];

    fn problem(case: &Case, random: &mut Random) -> Problem {
        problem(case, random)
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
    ];
    /// Prompts of an 8B model and of one with heads of 256, by this kernel and by the one for every GPU.
    const BENCH: &'static [Case] = &[
        Case { sequences: &[(512, 512)], ..BENCH_PROMPT },
        Case { sequences: &[(512, 512)], geometry: Geometry::Prefill, ..BENCH_PROMPT },
        Case { sequences: &[(2048, 2048)], ..BENCH_PROMPT },
        Case { sequences: &[(2048, 2048)], geometry: Geometry::Prefill, ..BENCH_PROMPT },
        Case { sequences: &[(8192, 512)], ..BENCH_PROMPT },
        Case { sequences: &[(8192, 2048)], ..BENCH_PROMPT },
        Case { sequences: &[(8192, 2048)], geometry: Geometry::Prefill, ..BENCH_PROMPT },
        Case { sequences: &[(8192, 8192)], ..BENCH_PROMPT },
        Case { sequences: &[(32_768, 2048)], ..BENCH_PROMPT },
        Case { sequences: &[(32_768, 2048)], geometry: Geometry::Prefill, ..BENCH_PROMPT },
        Case { sequences: &[(8192, 2048)], dims: [64, 64], ..BENCH_PROMPT },
        Case { sequences: &[(8192, 2048)], dims: [64, 64], geometry: Geometry::Prefill, ..BENCH_PROMPT },
        Case { sequences: &[(8192, 2048)], geometry: Geometry::Prompt, ..BENCH_256 },
        Case { sequences: &[(8192, 2048)], geometry: Geometry::Prefill, ..BENCH_256 },
    ];
    const NMSE_MAX: f64 = Flash::NMSE_MAX;
    const TIERS: Tiers = Tiers::Only("sm_90a");
    #[cfg(feature = "emu")]
    const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::hopper::ENTRIES];

    fn problem(case: &Case, random: &mut Random) -> Problem {
        problem(case, random)
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
    /// All in f32.
    const NMSE_MAX: f64 = 1e-10;
    #[cfg(feature = "emu")]
    const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::plain::ENTRIES];

    fn problem(case: &Case, random: &mut Random) -> Problem {
        problem(case, random)
    }
    fn bytes(case: &Case) -> u64 {
        bytes(case)
    }
    fn flops(case: &Case) -> u64 {
        flops(case)
    }
}
