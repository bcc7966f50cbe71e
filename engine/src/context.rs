//! A context: a model on a backend, with a KV cache and its sequences. Batches go in, logits come out.
//!
//! A batch may mix tokens of several sequences; results of a sequence do not depend on what else is in the batch, nor on
//! how its tokens are cut into batches.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use quant::FormatId;

use crate::backend::{Backend, PlanId, Step, StepSequence};
use crate::error::EngineError;
use crate::graph::Output;
use crate::hparams::Pooling;
use crate::kv_cache::{KvCache, KvLayout};
use crate::model::Model;
use crate::models::StepShape;
use crate::plan::Plan;
use crate::tensor::TensorId;

/// Plans kept ready; the one unused for longest goes first.
const MAX_PLANS: usize = 16;

/// Rows of logits in one step: bounds the output buffers (a vocabulary of 256k makes a row of 1 MiB).
const MAX_OUTPUTS: usize = 64;

/// Sizes and formats of a context.
#[derive(Clone, Debug)]
pub struct ContextParams {
    /// Positions a sequence may have.
    pub n_ctx: usize,
    /// Sequences.
    pub n_seq: usize,
    /// Tokens in one step at most.
    pub n_ubatch: usize,
    /// Format of cached keys.
    pub type_k: FormatId,
    /// Format of cached values.
    pub type_v: FormatId,
    /// Hidden states instead of logits.
    pub embeddings: bool,
    /// Keep the graph's named tensors of the last step, for layer diffs.
    pub taps: bool,
}

impl Default for ContextParams {
    fn default() -> Self {
        ContextParams {
            n_ctx: 4096,
            n_seq: 1,
            n_ubatch: 512,
            type_k: FormatId::F16,
            type_v: FormatId::F16,
            embeddings: false,
            taps: false,
        }
    }
}

impl ContextParams {
    /// The step that takes the most memory.
    pub fn largest_step(&self) -> StepShape {
        StepShape {
            n_tokens: self.n_ubatch,
            n_outputs: MAX_OUTPUTS.min(self.n_ubatch),
            embeddings: self.embeddings,
            greedy: false,
            taps: self.taps,
        }
    }
}

/// One token of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchToken {
    /// Token id.
    pub token: u32,
    /// Sequence that it extends.
    pub seq: usize,
    /// Whether its output is wanted.
    pub output: bool,
}

/// Tokens to run, in order; each goes to the end of its sequence.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// The tokens.
    pub tokens: Vec<BatchToken>,
}

impl Batch {
    /// Tokens of one sequence; outputs for the last only.
    pub fn prompt(seq: usize, tokens: &[u32]) -> Batch {
        let mut batch = Batch::default();
        batch.extend(seq, tokens, false);
        if let Some(last) = batch.tokens.last_mut() {
            last.output = true;
        }
        batch
    }

    /// Adds tokens of a sequence.
    pub fn extend(&mut self, seq: usize, tokens: &[u32], output: bool) {
        self.tokens.extend(tokens.iter().map(|&token| BatchToken { token, seq, output }));
    }

    /// Forgets the tokens, keeps the memory.
    pub fn clear(&mut self) {
        self.tokens.clear();
    }
}

/// Where memory goes, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Weights, in the mapped file.
    pub weights: usize,
    /// KV cache.
    pub kv_cache: usize,
    /// Activations of the largest step.
    pub activations: usize,
    /// Output rows of the largest step.
    pub outputs: usize,
}

struct Prepared {
    plan: Arc<Plan>,
    id: PlanId,
    last_used: u64,
}

/// A model ready to run.
pub struct Context {
    model: Arc<Model>,
    backend: Box<dyn Backend>,
    params: ContextParams,
    layout: KvLayout,
    kv: KvCache,
    plans: BTreeMap<StepShape, Prepared>,
    clock: u64,
    last_step: Option<StepShape>,
    step: StepBuffers,
    outputs: Vec<f32>,
    n_outputs: usize,
    /// Whether the outputs are tokens, as bits, instead of rows of floats.
    greedy: bool,
}

/// The step's inputs, kept between steps so that a step allocates nothing.
#[derive(Default)]
struct StepBuffers {
    tokens: Vec<i32>,
    positions: Vec<i32>,
    output_rows: Vec<i32>,
    token_sequences: Vec<u32>,
    cells: Vec<u32>,
    sequences: Vec<StepSequence>,
    pages: Vec<u32>,
    /// Index in `sequences` of each sequence of the cache, `u32::MAX` if it is not in the step.
    index_of: Vec<u32>,
    /// Length of each sequence of the cache before the batch.
    len_before: Vec<usize>,
}

impl Context {
    /// A context on a backend that was made for the model's weights.
    pub fn new(
        model: Arc<Model>,
        mut backend: Box<dyn Backend>,
        params: ContextParams,
    ) -> Result<Context, EngineError> {
        let bad = |name, got: usize, expected: &str| {
            Err(EngineError::BadParam { name, got: format!("{got}"), expected: String::from(expected) })
        };
        if params.n_ctx == 0 || params.n_ctx > 1 << 24 {
            return bad("context size", params.n_ctx, "1..=16777216");
        }
        if params.n_seq == 0 || params.n_seq > 1 << 12 {
            return bad("number of sequences", params.n_seq, "1..=4096");
        }
        if params.n_ubatch == 0 || params.n_ubatch > 1 << 16 {
            return bad("batch size", params.n_ubatch, "1..=65536");
        }
        let pages_per_seq = params.n_ctx.div_ceil(crate::kv_cache::PAGE);
        let n_cells = pages_per_seq * crate::kv_cache::PAGE * params.n_seq;
        let layout = KvLayout::new(model.hparams(), n_cells, params.type_k, params.type_v)?;
        backend.create_kv(&layout)?;
        let kv = KvCache::new(layout.n_pages, params.n_seq, params.n_ctx);
        let n = params.n_ubatch;
        let step = StepBuffers {
            tokens: Vec::with_capacity(n),
            positions: Vec::with_capacity(n),
            output_rows: Vec::with_capacity(n),
            token_sequences: Vec::with_capacity(n),
            cells: Vec::with_capacity(n),
            sequences: Vec::with_capacity(params.n_seq),
            pages: Vec::with_capacity(layout.n_pages),
            index_of: alloc::vec![u32::MAX; params.n_seq],
            len_before: alloc::vec![0; params.n_seq],
        };
        Ok(Context {
            model,
            backend,
            params,
            layout,
            kv,
            plans: BTreeMap::new(),
            clock: 0,
            last_step: None,
            step,
            outputs: Vec::new(),
            n_outputs: 0,
            greedy: false,
        })
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Positions a sequence may have.
    pub fn n_ctx(&self) -> usize {
        self.params.n_ctx
    }

    /// Positions a sequence has.
    pub fn seq_len(&self, seq: usize) -> usize {
        self.kv.len(seq)
    }

    /// Forgets a sequence's positions from `len` on.
    pub fn truncate(&mut self, seq: usize, len: usize) {
        self.kv.truncate(seq, len);
    }

    /// Where memory goes, from the plan of the largest step.
    pub fn memory_plan(&self) -> MemoryPlan {
        let shape = self.params.largest_step();
        let plan = Plan::new(self.model.graph(self.params.n_ctx, shape));
        MemoryPlan {
            weights: self.model.weights().total_bytes(),
            kv_cache: self.layout.total_bytes(),
            activations: plan.arena_bytes,
            outputs: shape.n_outputs * self.output_cols() * size_of::<f32>(),
        }
    }

    /// Elements of one output row.
    pub fn output_cols(&self) -> usize {
        let hp = self.model.hparams();
        if self.params.embeddings { hp.n_embd } else { hp.n_vocab }
    }

    /// Runs a batch and returns how many outputs there are. On an error the sequences are as before.
    pub fn decode(&mut self, batch: &Batch) -> Result<usize, EngineError> {
        self.greedy = false;
        self.decode_batch(batch)
    }

    /// The same, but the backend picks the likeliest token of each output, and no logits leave the device:
    /// [`Context::token`].
    pub fn decode_greedy(&mut self, batch: &Batch) -> Result<usize, EngineError> {
        assert!(!self.params.embeddings, "a context for logits");
        self.greedy = true;
        self.decode_batch(batch)
    }

    fn decode_batch(&mut self, batch: &Batch) -> Result<usize, EngineError> {
        self.check(batch)?;
        self.n_outputs = 0;
        for seq in 0..self.kv.n_seq() {
            self.step.len_before[seq] = self.kv.len(seq);
        }
        let result = self.decode_all(&batch.tokens);
        if result.is_err() {
            for seq in 0..self.kv.n_seq() {
                self.kv.truncate(seq, self.step.len_before[seq]);
            }
            self.n_outputs = 0;
        }
        result.map(|()| self.n_outputs)
    }

    /// Output row `i` of the last batch: logits, or hidden states.
    pub fn output(&self, i: usize) -> &[f32] {
        assert!(i < self.n_outputs && !self.greedy, "output {i} of {}", self.n_outputs);
        let cols = self.output_cols();
        &self.outputs[i * cols..][..cols]
    }

    /// The likeliest token of output `i` of the last [`Context::decode_greedy`]; of equal ones the lowest.
    pub fn token(&self, i: usize) -> u32 {
        assert!(i < self.n_outputs && self.greedy, "token {i} of {}", self.n_outputs);
        self.outputs[i].to_bits()
    }

    /// A named tensor of the last step; only with `taps`. `None` if the graph has no such name.
    pub fn tap(&mut self, name: &str) -> Result<Option<Vec<f32>>, EngineError> {
        let Some(prepared) = self.last_step.and_then(|shape| self.plans.get(&shape)) else { return Ok(None) };
        let graph = &prepared.plan.graph;
        let found =
            graph.outputs.iter().find(|(kind, t)| *kind == Output::Tap && graph.tensor(*t).name == name);
        let Some(&(_, id)) = found else { return Ok(None) };
        let mut out = alloc::vec![0.0; graph.tensor(id).shape.elems()];
        self.backend.read(prepared.id, id, &mut out)?;
        Ok(Some(out))
    }

    /// Embedding of a text: all its tokens as one sequence, pooled. The context must be made with `embeddings`.
    pub fn embed(&mut self, tokens: &[u32], pooling: Pooling) -> Result<Vec<f32>, EngineError> {
        assert!(self.params.embeddings, "a context for embeddings");
        self.truncate(0, 0);
        let mut batch = Batch::default();
        batch.extend(0, tokens, true);
        let n = self.decode(&batch)?;
        self.truncate(0, 0);
        let cols = self.output_cols();
        Ok(match pooling {
            Pooling::None => self.outputs[..n * cols].to_vec(),
            Pooling::Cls => self.output(0).to_vec(),
            Pooling::Last => self.output(n - 1).to_vec(),
            Pooling::Mean => (0..cols)
                .map(|c| ((0..n).map(|i| self.outputs[i * cols + c] as f64).sum::<f64>() / n as f64) as f32)
                .collect(),
        })
    }

    fn check(&self, batch: &Batch) -> Result<(), EngineError> {
        let bad = |what: String| Err(EngineError::BadBatch { what });
        let n_vocab = self.model.hparams().n_vocab;
        if batch.tokens.is_empty() {
            return bad(String::from("it has no tokens"));
        }
        for (i, t) in batch.tokens.iter().enumerate() {
            if t.token as usize >= n_vocab {
                return bad(format!("token {i} is {}, the vocabulary has {n_vocab}", t.token));
            }
            if t.seq >= self.kv.n_seq() {
                return bad(format!(
                    "token {i} is of sequence {}, the context has {}",
                    t.seq,
                    self.kv.n_seq()
                ));
            }
        }
        if !self.model.hparams().causal && batch.tokens.len() > self.params.n_ubatch {
            return bad(format!(
                "{} tokens; a model without a causal mask takes at most {} at once",
                batch.tokens.len(),
                self.params.n_ubatch
            ));
        }
        Ok(())
    }

    fn decode_all(&mut self, tokens: &[BatchToken]) -> Result<(), EngineError> {
        // The whole batch must fit before any of it runs.
        for t in tokens {
            self.kv.extend(t.seq, 1)?;
        }
        for seq in 0..self.kv.n_seq() {
            self.kv.truncate(seq, self.step.len_before[seq]);
        }
        // Without a causal mask a sequence must be whole in one step, whatever the outputs take.
        let max_outputs = if self.model.hparams().causal { MAX_OUTPUTS } else { usize::MAX };
        let mut rest = tokens;
        while !rest.is_empty() {
            let mut outputs = 0;
            let n = rest
                .iter()
                .take(self.params.n_ubatch)
                .take_while(|t| {
                    outputs += usize::from(t.output);
                    outputs <= max_outputs
                })
                .count();
            let (now, later) = rest.split_at(n);
            self.run_step(now)?;
            rest = later;
        }
        Ok(())
    }

    fn run_step(&mut self, tokens: &[BatchToken]) -> Result<(), EngineError> {
        let s = &mut self.step;
        for v in [&mut s.tokens, &mut s.positions, &mut s.output_rows] {
            v.clear();
        }
        for v in [&mut s.token_sequences, &mut s.cells, &mut s.pages] {
            v.clear();
        }
        s.sequences.clear();
        s.index_of.fill(u32::MAX);
        for (i, t) in tokens.iter().enumerate() {
            let pos = self.kv.len(t.seq);
            self.kv.extend(t.seq, 1)?;
            if s.index_of[t.seq] == u32::MAX {
                s.index_of[t.seq] = s.sequences.len() as u32;
                s.sequences.push(StepSequence { first_page: 0, len: 0 });
            }
            s.tokens.push(t.token as i32);
            s.positions.push(pos as i32);
            s.token_sequences.push(s.index_of[t.seq]);
            s.cells.push(self.kv.cell(t.seq, pos));
            if t.output {
                s.output_rows.push(i as i32);
            }
        }
        for seq in 0..self.kv.n_seq() {
            if let Some(entry) = s.sequences.get_mut(s.index_of[seq] as usize) {
                *entry = StepSequence { first_page: s.pages.len() as u32, len: self.kv.len(seq) as u32 };
                s.pages.extend_from_slice(self.kv.pages(seq));
            }
        }
        let shape = StepShape {
            n_tokens: tokens.len(),
            n_outputs: s.output_rows.len(),
            embeddings: self.params.embeddings,
            greedy: self.greedy,
            taps: self.params.taps,
        };
        let (id, output) = self.prepared(shape)?;
        let s = &self.step;
        let step = Step {
            tokens: &s.tokens,
            positions: &s.positions,
            output_rows: &s.output_rows,
            token_sequences: &s.token_sequences,
            cells: &s.cells,
            sequences: &s.sequences,
            pages: &s.pages,
            given: &[],
        };
        self.backend.run(id, &step)?;
        self.last_step = Some(shape);
        if let Some(output) = output {
            let cols = if self.greedy { 1 } else { self.output_cols() };
            let (from, to) = (self.n_outputs * cols, (self.n_outputs + shape.n_outputs) * cols);
            if self.outputs.len() < to {
                let more = to - self.outputs.len();
                self.outputs.try_reserve_exact(more).map_err(|_| EngineError::OutOfMemory {
                    what: "outputs",
                    bytes: more * size_of::<f32>(),
                })?;
                self.outputs.resize(to, 0.0);
            }
            self.backend.read(id, output, &mut self.outputs[from..to])?;
            self.n_outputs += shape.n_outputs;
        }
        Ok(())
    }

    /// The plan for a shape, made now if there is none, and its output.
    fn prepared(&mut self, shape: StepShape) -> Result<(PlanId, Option<TensorId>), EngineError> {
        self.clock += 1;
        if !self.plans.contains_key(&shape) {
            if self.plans.len() >= MAX_PLANS {
                let oldest = self.plans.iter().min_by_key(|(_, p)| p.last_used).map(|(s, _)| *s);
                if let Some(p) = oldest.and_then(|s| self.plans.remove(&s)) {
                    self.backend.release(p.id);
                }
            }
            let plan = Arc::new(Plan::new(self.model.graph(self.params.n_ctx, shape)));
            for node in &plan.graph.nodes {
                self.backend.supports(&plan.graph, node).map_err(|why| EngineError::UnsupportedOp {
                    backend: self.backend.info().name,
                    op: node.op.name(),
                    why,
                })?;
            }
            let id = self.backend.prepare(plan.clone())?;
            self.plans.insert(shape, Prepared { plan, id, last_used: 0 });
        }
        let clock = self.clock;
        let prepared = self.plans.get_mut(&shape).expect("just inserted");
        prepared.last_used = clock;
        let kind = match shape {
            StepShape { embeddings: true, .. } => Output::Embeddings,
            StepShape { greedy: true, .. } => Output::Tokens,
            _ => Output::Logits,
        };
        Ok((prepared.id, prepared.plan.output(kind)))
    }
}
