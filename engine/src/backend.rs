//! What runs plans: one backend per kind of device, a whole plan at a time.

use alloc::string::String;
use alloc::sync::Arc;

use crate::error::EngineError;
use crate::graph::{Graph, Node};
use crate::kv_cache::KvLayout;
use crate::plan::Plan;
use crate::sampler::Sampler;
use crate::tensor::TensorId;

/// A plan that a backend has taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanId(pub usize);

/// A backend's description.
#[derive(Clone, Debug)]
pub struct BackendInfo {
    /// Kind: "cpu", "reference".
    pub name: &'static str,
    /// What it runs on, for people.
    pub description: String,
}

/// Everything that changes from step to step. Slices are as long as the plan's inputs say.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// Token ids.
    pub tokens: &'a [i32],
    /// Position of each token in its sequence.
    pub positions: &'a [i32],
    /// Rows whose output is wanted.
    pub output_rows: &'a [i32],
    /// Index into `sequences` of each token.
    pub token_sequences: &'a [u32],
    /// Cache cell of each token: `page · PAGE + offset`.
    pub cells: &'a [u32],
    /// Sequences of the step.
    pub sequences: &'a [StepSequence],
    /// Pages of all sequences, one after the other; [`StepSequence`] says which are whose.
    pub pages: &'a [u32],
    /// Values of tensors that the plan reads and no node of it writes: what another backend made.
    pub given: &'a [(TensorId, &'a [f32])],
}

/// One sequence of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepSequence {
    /// First of its pages in [`Step::pages`].
    pub first_page: u32,
    /// Positions it has, this step's included.
    pub len: u32,
}

/// Runs plans on a device. Owns the cache's bytes and the activations' arena; the weights were given when it was made.
pub trait Backend: Send {
    /// What it is.
    fn info(&self) -> BackendInfo;

    /// Whether it can run a node; the reason if not.
    fn supports(&self, graph: &Graph, node: &Node) -> Result<(), String>;

    /// Whether prompt tokens have kernels, or a device, of their own here, whose sums are rounded otherwise than those for
    /// generated tokens. A step then has tokens of one kind only, so that what a token gives depends neither on its
    /// batch mates nor on how a prompt is cut.
    fn runs_prompts_apart(&self) -> bool {
        false
    }

    /// Allocates the cache; replaces an earlier one.
    fn create_kv(&mut self, layout: &KvLayout) -> Result<(), EngineError>;

    /// Takes a plan in: checks support, makes room for its arena.
    fn prepare(&mut self, plan: Arc<Plan>) -> Result<PlanId, EngineError>;

    /// Forgets a plan; its id is not used again.
    fn release(&mut self, plan: PlanId);

    /// Says that a plan will run soon: what it needs and is not there may be brought meanwhile.
    fn prefetch(&mut self, plan: PlanId) -> Result<(), EngineError> {
        let _ = plan;
        Ok(())
    }

    /// Runs a plan to its end.
    fn run(&mut self, plan: PlanId, step: &Step<'_>) -> Result<(), EngineError>;

    /// Copies an output of the last run of a plan, f32; `out` is as long as the tensor.
    fn read(&mut self, plan: PlanId, tensor: TensorId, out: &mut [f32]) -> Result<(), EngineError>;

    /// Draws a token from each row of an output of the last run of a plan, logits, where they are: what
    /// [`Sampler::sample`] would draw, whose generators move on alike. `false` if the backend cannot; then nothing has
    /// happened.
    fn sample(
        &mut self,
        plan: PlanId,
        logits: TensorId,
        samplers: &mut [&mut Sampler],
        tokens: &mut [u32],
    ) -> Result<bool, EngineError> {
        let _ = (plan, logits, samplers, tokens);
        Ok(false)
    }
}
