//! What is computed, in f64, and what a case of it is: its arrays, its launches, what they must give.

use alloc::{boxed::Box, format, string::String, vec, vec::Vec};

use crate::kernels::quantise_act::Kind;
use quant::FormatId;

use super::{Append, Args, Cache, Geometry, NO_SEQUENCE, PAGE, ROTATED_WIDTH, Step, launch, scratch_bytes};
use crate::case::{Buffer, Expected, Problem, Random, bytes_of};
use crate::kernels::output::Output;
use crate::kernels::rope::Mode;
use crate::kernels::{hadamard, kv_store, peer, quantise_act};
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

pub(super) fn problem(case: &Case, random: &mut Random) -> Problem {
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

/// ggml's name of a case whose work is the same: one sequence, and nothing that its benchmark has not.
pub(super) fn peer(case: &Case) -> Option<String> {
    let Case { types: [k, v], dims: [dim_k, dim_v], n_head, n_head_kv, .. } = *case;
    let &[(len, n_new)] = case.sequences else { return None };
    // Its mask hides next to nothing.
    let sees_all = !case.causal || n_new == 1;
    let changed = case.window > 0 || case.softcap > 0.0 || case.sinks || case.slopes;
    let more = case.rotated || case.acts.is_some() || case.append.is_some();
    if !sees_all || changed || more {
        return None;
    }
    let (k, v, view) = (peer::type_name(k), peer::type_name(v), u8::from(dim_k == 576));
    let group = n_head / n_head_kv;
    Some(format!(
        "FLASH_ATTN_EXT(hsk={dim_k},hsv={dim_v},nh={n_head_kv},nr23=[{group},1],kv={len},nb={n_new},mask=1,sinks=0,max_bias=0.000000,logit_softcap=0.000000,prec=f32,type_K={k},type_V={v},permute=[0,1,2,3],kv_view=1,v_is_view_of_k={view},n_kv_max=0"
    ))
}

/// K and V once per KV head for each token of a decode, for each sequence of a prefill; queries and output.
pub(super) fn bytes(case: &Case) -> u64 {
    let row: usize = (0..2).map(|p| quant::row::row_bytes(case.types[p], case.dims[p]).unwrap_or(0)).sum();
    let cache: usize = case.sequences.iter().map(|&(len, _)| len * case.n_head_kv * row).sum();
    let rows = case.n_tokens() * case.n_head;
    let (out, scales) = case.acts.map_or(Output::F32, Output::Act).bytes(rows * case.dims[1]);
    (cache + rows * case.dims[0] * 4 + out + scales) as u64
}

pub(super) fn flops(case: &Case) -> u64 {
    let seen = |&(len, n_new): &(usize, usize)| -> usize {
        (len - n_new.min(len)..len).map(|pos| if case.causal { pos + 1 } else { len }).sum()
    };
    let positions: usize = case.sequences.iter().map(seen).sum();
    (2 * positions * case.n_head * (case.dims[0] + case.dims[1])) as u64
}
