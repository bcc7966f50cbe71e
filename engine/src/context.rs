//! A context: a model on a backend, with a KV cache and its sequences. Batches go in, logits come out.
//!
//! A batch may mix tokens of several sequences; results of a sequence do not depend on what else is in the batch, nor on
//! how its tokens are cut into batches. (They may depend on which tokens were given and which generated: see
//! [`Backend::runs_prompts_apart`].)

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
use crate::kv_cache::{KvCache, KvLayout, PAGE};
use crate::layers::rotation;
use crate::model::Model;
use crate::models::StepShape;
use crate::plan::Plan;
use crate::sampler::Sampler;
use crate::tensor::TensorId;

/// Plans kept ready; the one unused for longest goes first.
const MAX_PLANS: usize = 16;

/// Rows of logits in one step: bounds the output buffers (a vocabulary of 256k makes a row of 1 MiB).
const MAX_OUTPUTS: usize = 64;

/// Sizes and formats of a context.
#[derive(Clone, Debug)]
pub struct ContextParams {
    /// Positions a sequence may have. A model that learned its positions has no more than that many, whatever is asked for.
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
    /// A step of so many tokens, with the logits of so many of them, none of them of a prompt.
    pub fn step(&self, n_tokens: usize, n_outputs: usize) -> StepShape {
        StepShape {
            n_tokens,
            n_outputs,
            embeddings: self.embeddings,
            greedy: false,
            taps: self.taps,
            prompt: false,
            rotates_k: rotation::pays(self.type_k),
            rotates_v: rotation::pays(self.type_v),
        }
    }

    /// The step that takes the most memory.
    pub fn largest_step(&self) -> StepShape {
        self.step(self.n_ubatch, MAX_OUTPUTS.min(self.n_ubatch))
    }

    /// The cache for all sequences.
    pub fn kv_layout(&self, model: &Model) -> Result<KvLayout, EngineError> {
        let pages_per_seq = self.n_ctx.div_ceil(PAGE);
        KvLayout::new(model.hparams(), pages_per_seq * PAGE * self.n_seq, self.type_k, self.type_v)
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
    /// Whether the model generated it in an answer that is being continued; otherwise it is part of a prompt.
    pub generated: bool,
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

    /// Adds tokens of a sequence's prompt.
    pub fn extend(&mut self, seq: usize, tokens: &[u32], output: bool) {
        let of_prompt = |&token: &u32| BatchToken { token, seq, output, generated: false };
        self.tokens.extend(tokens.iter().map(of_prompt));
    }

    /// Adds the token that a sequence's answer has just got; its output is wanted.
    pub fn push_generated(&mut self, seq: usize, token: u32) {
        self.tokens.push(BatchToken { token, seq, output: true, generated: true });
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
    /// Outputs of the last batch: rows of floats, or one token each, as the bits of a float.
    outputs: Vec<f32>,
    /// Logits to draw from, where the backend does not draw.
    rows: Vec<f32>,
    n_outputs: usize,
    /// Whether the outputs are tokens.
    picked: bool,
}

/// What is made of a batch's outputs.
enum Pick<'a, 'b> {
    /// They are read back.
    Rows,
    /// The likeliest token of each.
    Likeliest,
    /// The token that a sampler draws, one sampler per output.
    Drawn(&'a mut [&'b mut Sampler]),
}

impl Pick<'_, '_> {
    /// Whether only the likeliest tokens of the outputs `from..to` are wanted, which the graph itself can pick.
    fn is_likeliest(&self, from: usize, to: usize) -> bool {
        match self {
            Pick::Rows => false,
            Pick::Likeliest => true,
            Pick::Drawn(samplers) => samplers[from..to].iter().all(|sampler| sampler.params().is_argmax()),
        }
    }
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

impl StepBuffers {
    /// Takes a step's tokens: each goes to the end of its sequence in the cache.
    fn fill(&mut self, tokens: &[BatchToken], kv: &mut KvCache) -> Result<(), EngineError> {
        for ids in [&mut self.tokens, &mut self.positions, &mut self.output_rows] {
            ids.clear();
        }
        for ids in [&mut self.token_sequences, &mut self.cells, &mut self.pages] {
            ids.clear();
        }
        self.sequences.clear();
        self.index_of.fill(u32::MAX);
        for (i, t) in tokens.iter().enumerate() {
            let pos = kv.len(t.seq);
            kv.extend(t.seq, 1)?;
            if self.index_of[t.seq] == u32::MAX {
                self.index_of[t.seq] = self.sequences.len() as u32;
                // Pages and length are known once all tokens are in the cache.
                self.sequences.push(StepSequence { first_page: 0, len: 0 });
            }
            self.tokens.push(t.token as i32);
            self.positions.push(pos as i32);
            self.token_sequences.push(self.index_of[t.seq]);
            self.cells.push(kv.cell(t.seq, pos));
            if t.output {
                self.output_rows.push(i as i32);
            }
        }
        for seq in 0..kv.n_seq() {
            if let Some(entry) = self.sequences.get_mut(self.index_of[seq] as usize) {
                *entry = StepSequence { first_page: self.pages.len() as u32, len: kv.len(seq) as u32 };
                self.pages.extend_from_slice(kv.pages(seq));
            }
        }
        Ok(())
    }

    /// The step as a backend takes it.
    fn step(&self) -> Step<'_> {
        Step {
            tokens: &self.tokens,
            positions: &self.positions,
            output_rows: &self.output_rows,
            token_sequences: &self.token_sequences,
            cells: &self.cells,
            sequences: &self.sequences,
            pages: &self.pages,
            given: &[],
        }
    }
}

/// Makes a buffer at least `len` elements long.
fn grow(buffer: &mut Vec<f32>, len: usize) -> Result<(), EngineError> {
    if let Some(more) = len.checked_sub(buffer.len()) {
        let bytes = more * size_of::<f32>();
        let what = "outputs";
        buffer.try_reserve_exact(more).map_err(|_| EngineError::OutOfMemory { what, bytes })?;
        buffer.resize(len, 0.0);
    }
    Ok(())
}

impl Context {
    /// A context on a backend that was made for the model's weights.
    pub fn new(
        model: Arc<Model>,
        mut backend: Box<dyn Backend>,
        mut params: ContextParams,
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
        if let Some(n_pos) = model.hparams().n_pos {
            params.n_ctx = params.n_ctx.min(n_pos);
        }
        let layout = params.kv_layout(&model)?;
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
            rows: Vec::new(),
            n_outputs: 0,
            picked: false,
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
        self.decode_batch(batch, Pick::Rows)
    }

    /// As [`Context::decode`], but the backend picks the likeliest token of each output ([`Context::token`]), and no logits
    /// leave the device.
    pub fn decode_greedy(&mut self, batch: &Batch) -> Result<usize, EngineError> {
        assert!(!self.params.embeddings, "a context for logits");
        self.decode_batch(batch, Pick::Likeliest)
    }

    /// As [`Context::decode`], but a sampler per output draws its token ([`Context::token`]): on the device, which then
    /// keeps the logits, if the backend can draw. On an error some samplers may have drawn already.
    pub fn decode_sampled(
        &mut self,
        batch: &Batch,
        samplers: &mut [&mut Sampler],
    ) -> Result<usize, EngineError> {
        assert!(!self.params.embeddings, "a context for logits");
        let n_outputs = batch.tokens.iter().filter(|t| t.output).count();
        assert_eq!(samplers.len(), n_outputs, "a sampler for each output");
        self.decode_batch(batch, Pick::Drawn(samplers))
    }

    fn decode_batch(&mut self, batch: &Batch, mut pick: Pick<'_, '_>) -> Result<usize, EngineError> {
        self.check(batch)?;
        self.picked = !matches!(pick, Pick::Rows);
        self.n_outputs = 0;
        for seq in 0..self.kv.n_seq() {
            self.step.len_before[seq] = self.kv.len(seq);
        }
        let result = self.decode_all(&batch.tokens, &mut pick);
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
        assert!(i < self.n_outputs && !self.picked, "output {i} of {}", self.n_outputs);
        let cols = self.output_cols();
        &self.outputs[i * cols..][..cols]
    }

    /// The token of output `i` of the last [`Context::decode_greedy`] (the lowest of equally likely ones) or
    /// [`Context::decode_sampled`].
    pub fn token(&self, i: usize) -> u32 {
        assert!(i < self.n_outputs && self.picked, "token {i} of {}", self.n_outputs);
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
        let mut batch = Batch::prompt(0, tokens);
        if pooling != Pooling::Last {
            batch.tokens.iter_mut().for_each(|token| token.output = true);
        }
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

    /// Runs a checked batch in steps of at most `n_ubatch` tokens and `MAX_OUTPUTS` outputs.
    fn decode_all(&mut self, tokens: &[BatchToken], pick: &mut Pick<'_, '_>) -> Result<(), EngineError> {
        // The whole batch must fit before any of it runs.
        for t in tokens {
            self.kv.extend(t.seq, 1)?;
        }
        for seq in 0..self.kv.n_seq() {
            self.kv.truncate(seq, self.step.len_before[seq]);
        }
        // Without a causal mask a sequence must be whole in one step, however much memory its outputs take.
        let max_outputs = if self.model.hparams().causal { MAX_OUTPUTS } else { usize::MAX };
        let apart = self.backend.runs_prompts_apart();
        let mut rest = tokens;
        while let Some(first) = rest.first() {
            let mut outputs = 0;
            let n = rest
                .iter()
                .take(self.params.n_ubatch)
                .take_while(|t| {
                    outputs += usize::from(t.output);
                    outputs <= max_outputs && !(apart && t.generated != first.generated)
                })
                .count();
            let (now, later) = rest.split_at(n);
            let prompt = apart && !first.generated;
            self.run_step(now, prompt, pick)?;
            rest = later;
        }
        Ok(())
    }

    fn run_step(
        &mut self,
        tokens: &[BatchToken],
        prompt: bool,
        pick: &mut Pick<'_, '_>,
    ) -> Result<(), EngineError> {
        self.step.fill(tokens, &mut self.kv)?;
        let n_outputs = self.step.output_rows.len();
        let (first, end) = (self.n_outputs, self.n_outputs + n_outputs);
        let greedy = pick.is_likeliest(first, end);
        let shape = StepShape { greedy, prompt, ..self.params.step(tokens.len(), n_outputs) };
        let (id, output) = self.prepared(shape)?;
        self.backend.run(id, &self.step.step())?;
        self.last_step = Some(shape);
        let Some(output) = output else { return Ok(()) };
        match pick {
            Pick::Drawn(samplers) if !shape.greedy => self.draw(id, output, &mut samplers[first..end])?,
            _ => {
                let cols = if self.picked { 1 } else { self.output_cols() };
                grow(&mut self.outputs, end * cols)?;
                self.backend.read(id, output, &mut self.outputs[first * cols..end * cols])?;
            }
        }
        self.n_outputs = end;
        Ok(())
    }

    /// Adds the tokens that samplers draw from rows of logits: on the device, or here.
    fn draw(
        &mut self,
        plan: PlanId,
        logits: TensorId,
        samplers: &mut [&mut Sampler],
    ) -> Result<(), EngineError> {
        let (first, end) = (self.n_outputs, self.n_outputs + samplers.len());
        grow(&mut self.outputs, end)?;
        let tokens = bytemuck::cast_slice_mut(&mut self.outputs[first..end]);
        if self.backend.sample(plan, logits, samplers, tokens)? {
            return Ok(());
        }
        let cols = self.output_cols();
        grow(&mut self.rows, samplers.len() * cols)?;
        let rows = &mut self.rows[..samplers.len() * cols];
        self.backend.read(plan, logits, rows)?;
        for ((sampler, row), token) in
            samplers.iter_mut().zip(rows.chunks(cols)).zip(&mut self.outputs[first..])
        {
            *token = f32::from_bits(sampler.sample(row));
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
