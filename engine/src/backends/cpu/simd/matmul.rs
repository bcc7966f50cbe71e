//! Matrix products: `out = x · wᵀ (+ bias) (+ residual)` for one or more weights of any format, and the same per expert.
//!
//! One parallel region per call, cut over rows and tokens of all weights; for large batches one more before it to
//! quantise the activations.

use alloc::vec::Vec;
use core::marker::PhantomData;

use quant::format::GROUP;
use quant::{BlockFormat, FloatFormat, FormatId, Visitor, with_format};

use super::act::{Cell, Form, Quantise, Round};
use super::error::{KernelError, check_len};
use super::float_gemm::FloatJob;
use super::isa::Isa;
use super::operands::{Rows, Store};
use super::panel::ROWS;
use super::quant_gemm::{JOB_PANELS, JOB_TOKENS, Job, WORKER_BYTES};
use super::scratch::{Line, Scratch, cut, region, reserve};
use super::shared::Shared;
use crate::executor::Executor;

/// Activations below this are quantised by the caller's thread: a region costs more.
const QUANTISE_ALONE_ELEMS: usize = 16 * 1024;
/// Bytes of weights of a float job: what stays in a second-level cache besides the activations.
const FLOAT_JOB_BYTES: usize = 192 * 1024;

/// A weight: `rows` rows of `cols` elements, contiguous, of any alignment.
#[derive(Clone, Copy, Debug)]
pub struct WeightView<'a> {
    /// Format of the bytes.
    pub format: FormatId,
    /// Exactly the rows.
    pub bytes: &'a [u8],
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
}

/// Weights of all experts: `[n_expert][rows][cols]`.
#[derive(Clone, Copy, Debug)]
pub struct ExpertView<'a> {
    /// Format of the bytes.
    pub format: FormatId,
    /// Exactly the rows of all experts.
    pub bytes: &'a [u8],
    /// Experts.
    pub n_expert: usize,
    /// Output features of one expert.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
}

/// What is added to a product.
#[derive(Clone, Copy, Debug)]
pub enum Residual<'a> {
    /// Nothing.
    None,
    /// What the (only) output holds.
    InPlace,
    /// A tensor of the (only) output's shape.
    Other(&'a [f32]),
}

/// A run of rows by a run of tokens, of a format known by id.
struct RunJob<'a> {
    isa: Isa,
    weight: &'a [u8],
    stride: usize,
    first_row: usize,
    n_rows: usize,
    first_token: usize,
    tokens: usize,
    ready: Ready<'a>,
    store: Store<'a>,
    memory: &'a mut [Line],
}

impl Visitor for RunJob<'_> {
    type Output = ();
    fn block<F: BlockFormat>(self) {
        let groups = self.ready.rows.k / GROUP;
        self.isa.run(Job::<F> {
            weight: self.weight.as_ptr(),
            stride: self.stride,
            groups,
            first_row: self.first_row,
            n_rows: self.n_rows,
            // SAFETY: the cells of all tokens were reserved and written before any job ran.
            cells: unsafe { self.ready.cells.at(self.first_token * groups) },
            tokens: self.tokens,
            memory: self.memory,
            store: self.store,
            first_token: self.first_token,
            format: PhantomData,
        });
    }
    fn float<F: FloatFormat>(self) {
        self.isa.run(FloatJob {
            format: F::ID,
            weight: self.weight.as_ptr(),
            stride: self.stride,
            first_row: self.first_row,
            n_rows: self.n_rows,
            first_token: self.first_token,
            tokens: self.tokens,
            x: self.ready.rows,
            store: self.store,
        });
    }
}

/// Activations in the form a weight takes.
#[derive(Clone, Copy)]
struct Ready<'a> {
    /// For float weights.
    rows: Rows<'a>,
    /// For block weights: of all tokens.
    cells: Shared<Cell>,
}

/// Brings `m` tokens into a form, alone or on all threads.
fn prepare<'a>(
    isa: Isa,
    exec: &dyn Executor,
    form: Form,
    rows: Rows<'a>,
    m: usize,
    memory: &'a mut Vec<Line>,
    workers: &mut Vec<Vec<Line>>,
) -> Ready<'a> {
    let no_cells = Shared(core::ptr::null_mut());
    match form {
        Form::F32 => Ready { rows, cells: no_cells },
        Form::F16 | Form::Bf16 => {
            let n = rows.x.len();
            reserve(memory, size_of_val(rows.x));
            let out: &mut [f32] = &mut bytemuck::cast_slice_mut(memory)[..n];
            if n <= QUANTISE_ALONE_ELEMS {
                isa.run(Round { form, x: rows.x, out });
            } else {
                let (elems, jobs) = cut(n, exec.n_threads(), 8, 16);
                let at = Shared(out.as_mut_ptr());
                region(exec, workers, 0, jobs, |_, i| {
                    let x = &rows.x[i * elems..n.min((i + 1) * elems)];
                    // SAFETY: jobs take disjoint runs of `out`, which is as long as `x`.
                    let out = unsafe { core::slice::from_raw_parts_mut(at.at(i * elems), x.len()) };
                    isa.run(Round { form, x, out });
                });
            }
            Ready { rows: Rows { x: out, ..rows }, cells: no_cells }
        }
        Form::Block(kind) => {
            let groups = rows.k / GROUP;
            reserve(memory, m * groups * size_of::<Cell>());
            let cells: &mut [Cell] = bytemuck::cast_slice_mut(memory);
            let cells = &mut cells[..m * groups];
            if m * rows.k <= QUANTISE_ALONE_ELEMS {
                isa.run(Quantise { kind, rows, first: 0, tokens: m, cells });
            } else {
                let (tokens, jobs) = cut(m, exec.n_threads(), 8, 8);
                let at = Shared(cells.as_mut_ptr());
                region(exec, workers, 0, jobs, |_, i| {
                    let first = i * tokens;
                    let n = tokens.min(m - first);
                    // SAFETY: jobs take disjoint runs of tokens, and a token's cells lie within its run's.
                    let cells = unsafe { core::slice::from_raw_parts_mut(at.at(first * groups), n * groups) };
                    isa.run(Quantise { kind, rows, first, tokens: n, cells });
                });
            }
            Ready { rows, cells: Shared(cells.as_mut_ptr()) }
        }
    }
}

/// How a product is cut into jobs.
struct Cut {
    rows_per_job: usize,
    row_jobs: usize,
    tokens_per_job: usize,
    token_jobs: usize,
}

impl Cut {
    /// `all_rows` is the rows of everything in the region: what the threads share.
    fn new(block: bool, rows: usize, all_rows: usize, tokens: usize, stride: usize, n_threads: usize) -> Cut {
        let most = if block {
            JOB_PANELS * ROWS
        } else {
            (FLOAT_JOB_BYTES / stride.max(1) / ROWS * ROWS).clamp(ROWS, JOB_PANELS * ROWS)
        };
        let (share, _) = cut(all_rows.max(1), n_threads, ROWS, ROWS);
        let rows_per_job = share.min(most);
        let token_jobs = tokens.div_ceil(JOB_TOKENS).max(1);
        // Whole tiles, so that a job's tiles are the tiles the activations were cut into.
        let tokens_per_job = tokens.div_ceil(token_jobs).next_multiple_of(8);
        Cut {
            rows_per_job,
            row_jobs: rows.div_ceil(rows_per_job),
            tokens_per_job,
            token_jobs: tokens.div_ceil(tokens_per_job.max(1)),
        }
    }
}

/// Checks every length that [`matmul`] relies on; `k` is the columns of the first weight.
fn check_matmul(
    weights: &[WeightView],
    biases: &[Option<&[f32]>],
    x: &[f32],
    m: usize,
    k: usize,
    residual: Residual,
    out: &[&mut [f32]],
) -> Result<(), KernelError> {
    const OP: &str = "matmul";
    check_len(OP, "biases", biases.len(), weights.len())?;
    check_len(OP, "out", out.len(), weights.len())?;
    check_len(OP, "x", x.len(), m * k)?;
    for ((w, bias), out) in weights.iter().zip(biases).zip(out) {
        check_len(OP, "weight columns", w.cols, k)?;
        check_len(OP, "weight bytes", w.bytes.len(), w.rows * quant::row::row_bytes(w.format, k)?)?;
        check_len(OP, "out[i]", out.len(), m * w.rows)?;
        if let Some(bias) = bias {
            check_len(OP, "bias", bias.len(), w.rows)?;
        }
        Form::of(w.format).ok_or(KernelError::Format { op: OP, format: w.format })?;
    }
    if let Residual::InPlace | Residual::Other(_) = residual {
        check_len(OP, "weights with a residual", weights.len(), 1)?;
    }
    if let Residual::Other(r) = residual {
        check_len(OP, "residual", r.len(), out[0].len())?;
    }
    Ok(())
}

/// Products of `x` [m, cols] with each weight: `out[i]` is [m, rows of weight i], `biases[i]` has one entry per row.
///
/// `residual` is allowed with a single weight.
pub fn matmul(
    isa: Isa,
    exec: &dyn Executor,
    weights: &[WeightView],
    biases: &[Option<&[f32]>],
    x: &[f32],
    m: usize,
    residual: Residual,
    out: &mut [&mut [f32]],
    scratch: &mut Scratch,
) -> Result<(), KernelError> {
    let Some(k) = weights.first().map(|w| w.cols) else { return Ok(()) };
    check_matmul(weights, biases, x, m, k, residual, out)?;
    let Scratch { workers, forms, .. } = scratch;
    let rows = Rows { x, k, slots: None, x_div: 1 };
    let mut ready = [Ready { rows, cells: Shared(core::ptr::null_mut()) }; Form::ALL.len()];
    for ((form, memory), ready) in Form::ALL.into_iter().zip(forms).zip(&mut ready) {
        if weights.iter().any(|w| Form::of(w.format) == Some(form)) {
            *ready = prepare(isa, exec, form, rows, m, memory, workers);
        }
    }
    let ready = |format| ready[Form::ALL.iter().position(|f| Form::of(format) == Some(*f)).unwrap_or(0)];

    let all_rows = weights.iter().map(|w| w.rows).sum::<usize>() * m.div_ceil(JOB_TOKENS);
    let cut_of = |w: &WeightView| {
        let stride = w.bytes.len() / w.rows.max(1);
        Cut::new(
            Form::of(w.format).is_some_and(Form::is_block),
            w.rows,
            all_rows,
            m,
            stride,
            exec.n_threads(),
        )
    };
    let n_jobs = weights.iter().map(cut_of).map(|c| c.row_jobs * c.token_jobs).sum();
    // Outputs as raw slices, so that no job holds a reference to what another writes.
    let targets = Shared(out.as_mut_ptr().cast::<*mut [f32]>());
    region(exec, workers, WORKER_BYTES, n_jobs, |memory, mut i| {
        for (w, weight) in weights.iter().enumerate() {
            let cut = cut_of(weight);
            let jobs = cut.row_jobs * cut.token_jobs;
            if i >= jobs {
                i -= jobs;
                continue;
            }
            let (token_job, row_job) = (i / cut.row_jobs, i % cut.row_jobs);
            let (first_row, first_token) = (row_job * cut.rows_per_job, token_job * cut.tokens_per_job);
            // SAFETY: `w` is in bounds, and a reference to a slice is read as the raw slice that it is.
            let target = Shared(unsafe { targets.at(w).read() }.cast::<f32>());
            let store = Store {
                out: target,
                rows: weight.rows,
                slots: None,
                bias: biases[w],
                residual: match residual {
                    Residual::None => None,
                    Residual::InPlace => Some(target),
                    Residual::Other(r) => Some(Shared(r.as_ptr().cast_mut())),
                },
            };
            let job = RunJob {
                isa,
                weight: weight.bytes,
                stride: weight.bytes.len() / weight.rows,
                first_row,
                n_rows: cut.rows_per_job.min(weight.rows - first_row),
                first_token,
                tokens: cut.tokens_per_job.min(m - first_token),
                ready: ready(weight.format),
                store,
                memory,
            };
            with_format(weight.format, job);
            return;
        }
    });
    Ok(())
}

/// The (token, slot) pairs of a mixture, sorted by expert: each expert's are a run.
#[derive(Clone, Copy)]
struct PairsByExpert<'a> {
    /// End of each expert's run.
    ends: &'a [u32],
    /// The pairs, by index into the ids.
    slots: &'a [u32],
}

impl<'a> PairsByExpert<'a> {
    /// Counting sort of `ids`, all below `n_expert`, in the memory of `lists`.
    fn sort(ids: &[i32], n_expert: usize, lists: &'a mut Vec<u32>) -> PairsByExpert<'a> {
        lists.clear();
        lists.resize(n_expert + ids.len(), 0);
        let (ends, slots) = lists.split_at_mut(n_expert);
        for &id in ids {
            ends[id as usize] += 1;
        }
        // Counts become starts, and these move to the ends as the runs fill.
        let mut start = 0;
        for end in ends.iter_mut() {
            start += core::mem::replace(end, start);
        }
        for (pair, &id) in ids.iter().enumerate() {
            let at = &mut ends[id as usize];
            slots[*at as usize] = pair as u32;
            *at += 1;
        }
        PairsByExpert { ends, slots }
    }

    /// Start and length of an expert's run.
    fn of(self, expert: usize) -> (usize, usize) {
        let start = if expert == 0 { 0 } else { self.ends[expert - 1] as usize };
        (start, self.ends[expert] as usize - start)
    }
}

/// Products with the experts that `ids` [n, n_used] name: `out[t, j] = w[ids[t, j]] · x[t, j or 0] (+ bias of the
/// expert)`, with `x` [n, n_used or 1, cols] by `x_per_used`, `bias` [n_expert, rows], `out` [n, n_used, rows].
///
/// Pairs are grouped by expert, so that each expert's weights are read once.
pub fn matmul_id(
    isa: Isa,
    exec: &dyn Executor,
    weight: ExpertView,
    bias: Option<&[f32]>,
    x: &[f32],
    x_per_used: bool,
    ids: &[i32],
    n: usize,
    n_used: usize,
    out: &mut [f32],
    scratch: &mut Scratch,
) -> Result<(), KernelError> {
    const OP: &str = "matmul_id";
    let ExpertView { format, bytes, n_expert, rows: n_rows, cols: k } = weight;
    let stride = quant::row::row_bytes(format, k)?;
    check_len(OP, "weight bytes", bytes.len(), n_expert * n_rows * stride)?;
    check_len(OP, "ids", ids.len(), n * n_used)?;
    check_len(OP, "x", x.len(), if x_per_used { n * n_used * k } else { n * k })?;
    check_len(OP, "out", out.len(), n * n_used * n_rows)?;
    if let Some(bias) = bias {
        check_len(OP, "bias", bias.len(), n_expert * n_rows)?;
    }
    let form = Form::of(format).ok_or(KernelError::Format { op: OP, format })?;
    for &id in ids {
        if id < 0 || id as usize >= n_expert {
            return Err(KernelError::Index { op: OP, what: "expert id", got: id.into(), bound: n_expert });
        }
    }

    let n_pairs = ids.len();
    let Scratch { forms, workers, rows: lists } = scratch;
    let memory = &mut forms[0];
    let pairs = PairsByExpert::sort(ids, n_expert, lists);
    let slots = Some(pairs.slots);
    let rows = Rows { x, k, slots, x_div: if x_per_used { 1 } else { n_used } };
    let groups = k / GROUP;
    let ready = if let Form::Block(kind) = form {
        reserve(memory, n_pairs * groups * size_of::<Cell>());
        let at = Shared(bytemuck::cast_slice_mut::<Line, Cell>(memory).as_mut_ptr());
        let quantise = |expert: usize| {
            let (first, tokens) = pairs.of(expert);
            // SAFETY: experts have disjoint runs of cells, all reserved above.
            let cells = unsafe { core::slice::from_raw_parts_mut(at.at(first * groups), tokens * groups) };
            isa.run(Quantise { kind, rows, first, tokens, cells });
        };
        if n_pairs * k <= QUANTISE_ALONE_ELEMS {
            (0..n_expert).for_each(quantise);
        } else {
            region(exec, workers, 0, n_expert, |_, expert| quantise(expert));
        }
        Ready { rows, cells: at }
    } else {
        prepare(isa, exec, form, rows, n_pairs, memory, workers)
    };

    let used = (0..n_expert).filter(|&e| pairs.of(e).1 > 0).count();
    let shares = Cut::new(form.is_block(), n_rows, n_rows * used, n_pairs, stride, exec.n_threads());
    let target = Shared(out.as_mut_ptr());
    region(exec, workers, WORKER_BYTES, n_expert * shares.row_jobs, |memory, i| {
        let (expert, row_job) = (i / shares.row_jobs, i % shares.row_jobs);
        let (start, tokens) = pairs.of(expert);
        let first_row = row_job * shares.rows_per_job;
        for first in (0..tokens).step_by(JOB_TOKENS) {
            let store = Store {
                out: target,
                rows: n_rows,
                slots,
                bias: bias.map(|b| &b[expert * n_rows..][..n_rows]),
                residual: None,
            };
            let job = RunJob {
                isa,
                weight: &bytes[expert * n_rows * stride..][..n_rows * stride],
                stride,
                first_row,
                n_rows: shares.rows_per_job.min(n_rows - first_row),
                first_token: start + first,
                tokens: JOB_TOKENS.min(tokens - first),
                ready,
                store,
                memory: &mut *memory,
            };
            with_format(format, job);
        }
    });
    Ok(())
}
