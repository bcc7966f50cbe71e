//! Softmax attention over the paged KV cache, with the softmax built up page by page.
//!
//! A job is one key/value head by a run of tokens of one sequence; all query heads of the group share the page, which
//! is widened to f32 once a job: keys transposed `[head_dim][64]`, values `[64][head_dim]`. Scores are fma chains over the
//! head with positions in lanes; outputs are fma chains over positions with the head in lanes, over exactly the
//! positions a query sees. So the bits of a query's output depend on its own cache alone, and whatever lies beyond it
//! (also NaN) has no effect.

use core::ops::Range;

use quant::FormatId;

use super::error::{KernelError, check_len};
use super::isa::Isa;
use super::math;
use super::scratch::{Line, Scratch, region, take};
use super::shared::Shared;
use super::vector::{Simd, SimdOp};
use crate::backend::StepSequence;
use crate::executor::Executor;
use crate::kv_cache::PAGE;
use crate::op::AttentionParams;

/// Query vectors of a job: enough to pay for widening a page.
const JOB_QUERIES: usize = 96;

/// One layer's keys or values: `[page][head_kv][`[`PAGE`]` positions][head_dim]`, rows in `format`.
#[derive(Clone, Copy, Debug)]
pub struct KvView<'a> {
    /// Format of a row of `head_dim` elements.
    pub format: FormatId,
    /// Whole pages.
    pub bytes: &'a [u8],
    /// Key/value heads.
    pub n_head_kv: usize,
    /// Elements per head.
    pub head_dim: usize,
}

/// Whose query a row of `q` is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueryRow {
    /// Position in its sequence.
    pub pos: u32,
    /// Index into the step's sequences.
    pub seq: u32,
}

/// A sequence's part of the cache.
#[derive(Clone, Copy, Debug)]
struct SeqPages<'a> {
    /// Pages in order of position.
    pages: &'a [u32],
    /// Positions stored, those of this step included.
    len: u32,
}

/// A job's view of everything; `first_row..first_row + n_rows` are rows of one sequence.
struct Job<'a> {
    params: &'a AttentionParams,
    q: &'a [f32],
    k: KvView<'a>,
    v: KvView<'a>,
    rows: &'a [QueryRow],
    seq: SeqPages<'a>,
    sinks: Option<&'a [f32]>,
    /// [all rows, n_head · head_dim_v]; this job writes its rows' elements of its heads.
    out: Shared<f32>,
    first_row: usize,
    n_rows: usize,
    head_kv: usize,
    memory: &'a mut [Line],
}

/// State of one query vector.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct State {
    /// Largest score so far.
    max: f32,
    /// Sum of the exponentials.
    sum: f32,
    /// Positions seen: `lo..hi`.
    lo: u32,
    hi: u32,
}

fn round_up(n: usize) -> usize {
    n.next_multiple_of(16)
}

/// Memory of a job with `queries` query vectors.
fn job_bytes(queries: usize, params: &AttentionParams) -> usize {
    let (dk, dv) = (round_up(params.head_dim_k), round_up(params.head_dim_v));
    let floats = PAGE * (dk + dv + dk.max(dv)) + queries * (PAGE + dk + dv);
    4 * floats + queries * size_of::<State>() + 16 * 64
}

/// Working memory of a job, cut from its lines.
struct Work<'a> {
    /// The page's keys, transposed: `[head_dim_k][PAGE]`.
    keys: &'a mut [[f32; PAGE]],
    /// The page's values, rows `stride` apart.
    values: &'a mut [f32],
    /// A page as f32 before it is transposed.
    wide: &'a mut [f32],
    /// Per query vector.
    scores: &'a mut [[f32; PAGE]],
    /// Query vectors of `head_dim_k`, one after the other.
    q: &'a mut [f32],
    /// Sums of weighted values per query vector, `stride` apart.
    acc: &'a mut [f32],
    /// Per query vector.
    states: &'a mut [State],
    /// `head_dim_v`, rounded up to whole vectors.
    stride: usize,
}

impl<'a> Work<'a> {
    /// Cuts [`job_bytes`] of lines for so many query vectors.
    #[inline(always)]
    fn new(mut lines: &'a mut [Line], queries: usize, params: &AttentionParams) -> Work<'a> {
        let (dk, dv) = (params.head_dim_k, params.head_dim_v);
        let stride = round_up(dv);
        let memory = &mut lines;
        Work {
            keys: take(memory, round_up(dk)),
            values: take(memory, PAGE * stride),
            wide: take(memory, PAGE * round_up(dk.max(dv))),
            scores: take(memory, queries),
            q: take(memory, queries * dk),
            acc: take(memory, queries * stride),
            states: take(memory, queries),
            stride,
        }
    }

    /// Adds a page to the query vectors `first..first + R`: scores, softmax, weighted values. `base` is the position of
    /// the page's first row, of which `used` rows are filled. Returns `R`.
    #[inline(always)]
    fn add_page<S: Simd, const R: usize>(
        &mut self,
        s: S,
        params: &AttentionParams,
        first: usize,
        base: u32,
        used: usize,
    ) -> usize {
        let (dk, stride) = (params.head_dim_k, self.stride);
        let range = |state: &State| {
            let hi = state.hi.saturating_sub(base).min(PAGE as u32);
            (state.lo.saturating_sub(base).min(hi) as usize, hi as usize)
        };
        let tile = first..first + R;
        s.call(Score::<R> {
            q: &self.q[first * dk..],
            keys: &self.keys[..dk],
            blocks: used.div_ceil(16),
            scores: &mut self.scores[tile.clone()],
        });
        for i in tile.clone() {
            let (lo, hi) = range(&self.states[i]);
            if lo < hi {
                let (scores, state) = (&mut self.scores[i], &mut self.states[i]);
                let acc = &mut self.acc[i * stride..][..stride];
                s.call(Soften { params, scores, lo, hi, state, acc });
            }
        }
        // Positions that all see go together; the ragged ends one query at a time, in order.
        let lo = tile.clone().map(|i| range(&self.states[i]).0).max().unwrap_or(0);
        let hi = tile.clone().map(|i| range(&self.states[i]).1).min().unwrap_or(0).max(lo);
        let values = &*self.values;
        for i in tile.clone() {
            let (from, to) = range(&self.states[i]);
            let (scores, acc) = (&self.scores[i..], &mut self.acc[i * stride..]);
            if from < to.min(lo) {
                s.call(Weigh::<1> { scores, values, stride, from, to: to.min(lo), acc });
            }
        }
        let (scores, acc) = (&self.scores[first..], &mut self.acc[first * stride..]);
        s.call(Weigh::<R> { scores, values, stride, from: lo, to: hi, acc });
        for i in tile {
            let (from, to) = range(&self.states[i]);
            let (scores, acc) = (&self.scores[i..], &mut self.acc[i * stride..]);
            if from.max(hi) < to {
                s.call(Weigh::<1> { scores, values, stride, from: from.max(hi), to, acc });
            }
        }
        R
    }
}

impl Job<'_> {
    /// Query heads that share the job's key/value head.
    fn group(&self) -> usize {
        self.params.n_head / self.params.n_head_kv
    }

    /// Row and head of query vector `i`.
    fn query(&self, i: usize) -> (usize, usize) {
        let group = self.group();
        (self.first_row + i / group, self.head_kv * group + i % group)
    }

    /// Sets the query vectors and their states up; returns the positions that any of them sees.
    #[inline(always)]
    fn begin(&self, work: &mut Work<'_>) -> Range<u32> {
        let (p, dk) = (self.params, self.params.head_dim_k);
        work.acc.fill(0.0);
        let (mut lowest, mut highest) = (u32::MAX, 0);
        for i in 0..work.states.len() {
            let (row, head) = self.query(i);
            let pos = self.rows[row].pos;
            let hi = if p.causal { self.seq.len.min(pos.saturating_add(1)) } else { self.seq.len };
            let lo = if p.window > 0 { pos.saturating_add(1).saturating_sub(p.window).min(hi) } else { 0 };
            (lowest, highest) = (lowest.min(lo), highest.max(hi));
            work.q[i * dk..][..dk].copy_from_slice(&self.q[(row * p.n_head + head) * dk..][..dk]);
            // A sink is a score without a value.
            let (max, sum) = self.sinks.map_or((f32::NEG_INFINITY, 0.0), |sinks| (sinks[head], 1.0));
            work.states[i] = State { max, sum, lo, hi };
        }
        lowest..highest
    }

    /// Divides by the sums and writes the outputs.
    #[inline(always)]
    fn finish(&self, work: &Work<'_>) {
        let (n_head, dv) = (self.params.n_head, self.params.head_dim_v);
        for (i, state) in work.states.iter().enumerate() {
            let (row, head) = self.query(i);
            // A query that sees nothing gives zeros.
            let inverse = if state.sum > 0.0 || state.sum.is_nan() { 1.0 / state.sum } else { 0.0 };
            for (d, value) in work.acc[i * work.stride..][..dv].iter().enumerate() {
                // SAFETY: within `out` (checked by the caller); no other job has this row and head.
                unsafe { *self.out.at((row * n_head + head) * dv + d) = value * inverse };
            }
        }
    }
}

impl SimdOp for Job<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let (p, head) = (self.params, self.head_kv);
        let queries = self.n_rows * self.group();
        let mut work = Work::new(core::mem::take(&mut self.memory), queries, p);
        let seen = self.begin(&mut work);
        for page in seen.start as usize / PAGE..(seen.end as usize).div_ceil(PAGE) {
            let base = (page * PAGE) as u32;
            let used = (seen.end - base).min(PAGE as u32) as usize;
            let page = self.seq.pages[page] as usize;
            let (view, stride, columns) = (&self.k, round_up(p.head_dim_k), Some(&mut *work.keys));
            s.call(Load { view, page, head, used, stride, out: &mut *work.wide, columns });
            let (view, stride) = (&self.v, work.stride);
            s.call(Load { view, page, head, used, stride, out: &mut *work.values, columns: None });
            let mut first = 0;
            while first < queries {
                first += match queries - first {
                    6.. if S::WIDE => work.add_page::<S, 6>(s, p, first, base, used),
                    3.. => work.add_page::<S, 3>(s, p, first, base, used),
                    _ => work.add_page::<S, 1>(s, p, first, base, used),
                };
            }
        }
        self.finish(&work);
    }
}

// The parts of a job are functions of their own: in one piece there are too few registers for all of them.

/// [`score`] as a function of its own.
struct Score<'a, const R: usize> {
    q: &'a [f32],
    keys: &'a [[f32; PAGE]],
    blocks: usize,
    scores: &'a mut [[f32; PAGE]],
}

impl<const R: usize> SimdOp for Score<'_, R> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        score::<S, R>(s, self.q, self.keys, self.blocks, self.scores);
    }
}

/// [`soften`] as a function of its own.
struct Soften<'a> {
    params: &'a AttentionParams,
    scores: &'a mut [f32; PAGE],
    lo: usize,
    hi: usize,
    state: &'a mut State,
    acc: &'a mut [f32],
}

impl SimdOp for Soften<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        soften(s, self.params, self.scores, self.lo, self.hi, self.state, self.acc);
    }
}

/// [`weigh`] as a function of its own.
struct Weigh<'a, const R: usize> {
    scores: &'a [[f32; PAGE]],
    values: &'a [f32],
    stride: usize,
    from: usize,
    to: usize,
    acc: &'a mut [f32],
}

impl<const R: usize> SimdOp for Weigh<'_, R> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        weigh::<S, R>(s, self.scores, self.values, self.stride, self.from, self.to, self.acc);
    }
}

/// [`widen`], and [`transpose`] if asked for, as a function of its own.
struct Load<'a> {
    view: &'a KvView<'a>,
    page: usize,
    head: usize,
    used: usize,
    stride: usize,
    out: &'a mut [f32],
    /// Where the transposed page goes.
    columns: Option<&'a mut [[f32; PAGE]]>,
}

impl SimdOp for Load<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        widen(s, self.view, self.page, self.head, self.used, self.stride, self.out);
        if let Some(columns) = self.columns {
            transpose(s, self.out, self.stride, columns);
        }
    }
}

/// The first `used` positions of a page as f32, `stride` apart; columns past the head and the rest of the page are 0.
#[inline(always)]
fn widen<S: Simd>(
    s: S,
    view: &KvView,
    page: usize,
    head: usize,
    used: usize,
    stride: usize,
    out: &mut [f32],
) {
    let dim = view.head_dim;
    let page_bytes = page_size(view);
    let row_bytes = page_bytes / view.n_head_kv / PAGE;
    let rows = &view.bytes[page * page_bytes + head * PAGE * row_bytes..][..used * row_bytes];
    for (row, out) in rows.chunks_exact(row_bytes).zip(out.chunks_exact_mut(stride)) {
        match view.format {
            FormatId::F32 | FormatId::F16 | FormatId::BF16 if dim.is_multiple_of(16) => {
                let (out, _) = out.as_chunks_mut::<16>();
                for (part, out) in row.chunks_exact(row_bytes / (dim / 16)).zip(out) {
                    // SAFETY: `part` is 16 elements of the format.
                    let v = unsafe {
                        match view.format {
                            FormatId::F32 => s.load_f32(part.as_ptr()),
                            FormatId::F16 => s.load_f16(part.as_ptr()),
                            _ => s.load_bf16(part.as_ptr()),
                        }
                    };
                    s.store(v, out);
                }
            }
            format => {
                quant::row::decode(format, row, &mut out[..dim])
                    .expect("format and length checked by attention()");
                out[dim..].fill(0.0);
            }
        }
    }
    out[used * stride..PAGE * stride].fill(0.0);
}

/// Bytes of a page; at least 1.
fn page_size(view: &KvView) -> usize {
    let row = quant::row::row_bytes(view.format, view.head_dim).unwrap_or(0);
    (view.n_head_kv * PAGE * row).max(1)
}

/// `[64][stride]` to `[stride][64]`.
#[inline(always)]
fn transpose<S: Simd>(s: S, rows: &[f32], stride: usize, columns: &mut [[f32; PAGE]]) {
    assert!(rows.len() >= PAGE * stride && columns.len() >= stride);
    for position in (0..PAGE).step_by(16) {
        for d in (0..stride).step_by(4) {
            // SAFETY: 16 rows of `stride` elements from `position` are in bounds, and so are four columns.
            unsafe {
                let four = s.transpose4(rows.as_ptr().add(position * stride + d).cast(), 4 * stride);
                for (i, column) in four.into_iter().enumerate() {
                    s.store_i32(column, columns[d + i].as_mut_ptr().add(position).cast());
                }
            }
        }
    }
}

/// `scores[r][p] = q[r] · keys[p]` for the first `blocks` blocks of 16 positions: one fma chain over the head each.
#[inline(always)]
fn score<S: Simd, const R: usize>(
    s: S,
    q: &[f32],
    keys: &[[f32; PAGE]],
    blocks: usize,
    scores: &mut [[f32; PAGE]],
) {
    if blocks == PAGE / 16 && S::WIDE {
        score_blocks::<S, R, 4>(s, q, keys, 0, scores);
    } else if blocks == PAGE / 16 {
        score_blocks::<S, R, 2>(s, q, keys, 0, scores);
        score_blocks::<S, R, 2>(s, q, keys, 2, scores);
    } else {
        for block in 0..blocks {
            score_blocks::<S, R, 1>(s, q, keys, block, scores);
        }
    }
}

#[inline(always)]
fn score_blocks<S: Simd, const R: usize, const N: usize>(
    s: S,
    q: &[f32],
    keys: &[[f32; PAGE]],
    block: usize,
    scores: &mut [[f32; PAGE]],
) {
    let dk = keys.len();
    assert!(q.len() >= R * dk && scores.len() >= R && (block + N) * 16 <= PAGE);
    let mut acc = [[s.splat(0.0); N]; R];
    for (d, key) in keys.iter().enumerate() {
        let (key, _) = key.as_chunks::<16>();
        for r in 0..R {
            // SAFETY: `d < dk` and `r < R`: within the length asserted above.
            let q = s.splat(unsafe { *q.get_unchecked(r * dk + d) });
            for n in 0..N {
                acc[r][n] = s.fma(q, s.load(&key[block + n]), acc[r][n]);
            }
        }
    }
    for r in 0..R {
        let (out, _) = scores[r].as_chunks_mut::<16>();
        for n in 0..N {
            s.store(acc[r][n], &mut out[block + n]);
        }
    }
}

/// Scores to exponentials relative to the new maximum, 0 outside `lo..hi`; sum and accumulator follow the maximum.
#[inline(always)]
fn soften<S: Simd>(
    s: S,
    params: &AttentionParams,
    scores: &mut [f32; PAGE],
    lo: usize,
    hi: usize,
    state: &mut State,
    acc: &mut [f32],
) {
    let (blocks, _) = scores.as_chunks_mut::<16>();
    let mut max = s.splat(f32::NEG_INFINITY);
    for (i, block) in blocks.iter_mut().enumerate() {
        let mut v = s.mul(s.load(block), s.splat(params.scale));
        if params.softcap != 0.0 {
            let cap = s.splat(params.softcap);
            v = s.mul(cap, math::tanh(s, s.div(v, cap)));
        }
        s.store(v, block);
        let (from, to) = (lo.saturating_sub(16 * i).min(16), hi.saturating_sub(16 * i).min(16));
        if from > 0 || to < 16 {
            block[..from].fill(f32::NEG_INFINITY);
            block[to..].fill(f32::NEG_INFINITY);
        }
        max = s.max(max, s.load(block));
    }
    let max = s.reduce_max(max);
    let max = if state.max > max { state.max } else { max };
    // All scores minus infinity: nothing to add, and no infinity to subtract from itself.
    if max == f32::NEG_INFINITY {
        scores.fill(0.0);
        return;
    }
    let mut sum = s.splat(0.0);
    for block in blocks {
        let v = s.load(block);
        let e = math::exp(s, s.sub(v, s.splat(max)));
        let e = s.select_lt(s.splat(f32::NEG_INFINITY), v, e, s.splat(0.0));
        sum = s.add(sum, e);
        s.store(e, block);
    }
    if state.max == max {
        // e⁰ = 1 exactly: nothing to scale.
        state.sum += s.reduce_add(sum);
        return;
    }
    let mut keep = [0.0; 16];
    s.store(math::exp(s, s.splat(state.max - max)), &mut keep);
    state.sum = state.sum * keep[0] + s.reduce_add(sum);
    state.max = max;
    let (parts, _) = acc.as_chunks_mut::<16>();
    for part in parts {
        s.store(s.mul(s.load(part), s.splat(keep[0])), part);
    }
}

/// `acc[r] += Σ scores[r][p] · values[p]` for `p` in `from..to`, in order.
#[inline(always)]
fn weigh<S: Simd, const R: usize>(
    s: S,
    scores: &[[f32; PAGE]],
    values: &[f32],
    stride: usize,
    from: usize,
    to: usize,
    acc: &mut [f32],
) {
    if from >= to {
        return;
    }
    let mut column = 0;
    while column < stride {
        if S::WIDE && stride - column >= 64 {
            weigh_columns::<S, R, 4>(s, scores, values, stride, from, to, column, acc);
            column += 64;
        } else if stride - column >= 32 {
            weigh_columns::<S, R, 2>(s, scores, values, stride, from, to, column, acc);
            column += 32;
        } else {
            weigh_columns::<S, R, 1>(s, scores, values, stride, from, to, column, acc);
            column += 16;
        }
    }
}

#[inline(always)]
fn weigh_columns<S: Simd, const R: usize, const N: usize>(
    s: S,
    scores: &[[f32; PAGE]],
    values: &[f32],
    stride: usize,
    from: usize,
    to: usize,
    column: usize,
    acc: &mut [f32],
) {
    assert!(to <= PAGE && scores.len() >= R && column + 16 * N <= stride);
    assert!(values.len() >= PAGE * stride && acc.len() >= R * stride);
    // SAFETY: rows below `R`, positions below `to` and columns below `stride`: within the lengths asserted above.
    unsafe {
        let at = acc.as_mut_ptr().add(column);
        let mut sums: [[S::F; N]; R] = core::array::from_fn(|r| {
            core::array::from_fn(|n| s.load_f32(at.add(r * stride + 16 * n).cast()))
        });
        for position in from..to {
            let v = values.as_ptr().add(position * stride + column);
            for r in 0..R {
                let p = s.splat(*scores.get_unchecked(r).get_unchecked(position));
                for n in 0..N {
                    sums[r][n] = s.fma(p, s.load_f32(v.add(16 * n).cast()), sums[r][n]);
                }
            }
        }
        for r in 0..R {
            for n in 0..N {
                s.store(sums[r][n], &mut *at.add(r * stride + 16 * n).cast());
            }
        }
    }
}

fn check_view(
    what: &'static str,
    view: &KvView,
    n_head_kv: usize,
    head_dim: usize,
) -> Result<usize, KernelError> {
    const OP: &str = "attention";
    check_len(OP, what, view.head_dim, head_dim)?;
    check_len(OP, what, view.n_head_kv, n_head_kv)?;
    let row = quant::row::row_bytes(view.format, head_dim)?;
    // Decoding one empty row says whether the format holds numbers at all.
    quant::row::decode(view.format, &[], &mut [])?;
    let page = n_head_kv * PAGE * row;
    check_len(OP, what, view.bytes.len() % page.max(1), 0)?;
    Ok(view.bytes.len() / page.max(1))
}

/// Attention of `q` [rows, n_head · head_dim_k] over the cache → `out` [rows, n_head · head_dim_v].
///
/// `rows` say whose query each row is; consecutive rows of one sequence are worked on together. `seqs` say where in
/// `pages` each sequence's pages begin, in order of position. The step's own keys and
/// values must already be in the cache. `sinks` `[n_head]` are extra scores without a value.
pub fn attention(
    isa: Isa,
    exec: &dyn Executor,
    params: &AttentionParams,
    q: &[f32],
    k: KvView,
    v: KvView,
    rows: &[QueryRow],
    seqs: &[StepSequence],
    pages: &[u32],
    sinks: Option<&[f32]>,
    out: &mut [f32],
    scratch: &mut Scratch,
) -> Result<(), KernelError> {
    const OP: &str = "attention";
    let AttentionParams { n_head, n_head_kv, head_dim_k, head_dim_v, .. } = *params;
    if n_head_kv == 0 || n_head % n_head_kv != 0 {
        return Err(KernelError::Length { op: OP, what: "n_head", expected: n_head_kv, got: n_head });
    }
    check_len(OP, "q", q.len(), rows.len() * n_head * head_dim_k)?;
    check_len(OP, "out", out.len(), rows.len() * n_head * head_dim_v)?;
    if let Some(sinks) = sinks {
        check_len(OP, "sinks", sinks.len(), n_head)?;
    }
    let n_pages =
        check_view("k", &k, n_head_kv, head_dim_k)?.min(check_view("v", &v, n_head_kv, head_dim_v)?);
    for seq in seqs {
        let bound = pages.len().saturating_sub(seq.first_page as usize) * PAGE + 1;
        if seq.len as usize >= bound {
            return Err(KernelError::Index { op: OP, what: "sequence length", got: seq.len.into(), bound });
        }
    }
    if let Some(&page) = pages.iter().find(|&&page| page as usize >= n_pages) {
        return Err(KernelError::Index { op: OP, what: "page", got: page.into(), bound: n_pages });
    }
    if let Some(row) = rows.iter().find(|row| row.seq as usize >= seqs.len()) {
        return Err(KernelError::Index { op: OP, what: "sequence", got: row.seq.into(), bound: seqs.len() });
    }

    // Runs of rows of one sequence, cut into jobs of at most `most` rows: (first row, rows) pairs.
    let most = (JOB_QUERIES / (n_head / n_head_kv)).max(1);
    let Scratch { workers, rows: runs, .. } = scratch;
    runs.clear();
    let mut first = 0;
    while first < rows.len() {
        let same = rows[first..].iter().take(most).take_while(|row| row.seq == rows[first].seq).count();
        runs.extend([first as u32, same as u32]);
        first += same;
    }
    let runs = &*runs;
    let target = Shared(out.as_mut_ptr());
    let bytes = job_bytes(most * (n_head / n_head_kv), params);
    region(exec, workers, bytes, runs.len() / 2 * n_head_kv, |memory, i| {
        // The last rows see the most positions: they go first, so that no long job is left at the end.
        let run = runs.len() / 2 - 1 - i / n_head_kv;
        let (first_row, n_rows) = (runs[2 * run] as usize, runs[2 * run + 1] as usize);
        isa.run(Job {
            params,
            q,
            k,
            v,
            rows,
            seq: {
                let seq = seqs[rows[first_row].seq as usize];
                SeqPages { pages: &pages[seq.first_page as usize..], len: seq.len }
            },
            sinks,
            out: target,
            first_row,
            n_rows,
            head_kv: i % n_head_kv,
            memory,
        });
    });
    Ok(())
}
