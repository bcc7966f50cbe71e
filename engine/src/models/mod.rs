//! Model architectures: one file each, one row in [`table`].
//!
//! A file says three things: how GGUF keys become [`Hparams`], which tensors the model has (checked before any byte is
//! used), and how its graph is built from [`crate::layers`].

mod bert;
mod gemma;
mod gpt_oss;
mod llama;
mod phi3;
mod qwen;
pub mod table;

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use crate::error::{EngineError, TensorProblem};
use crate::graph::{Graph, GraphBuilder};
use crate::hparams::{Hparams, Keys};
use crate::tensor::TensorId;
use crate::weights::Weights;

/// An architecture.
pub struct Arch {
    /// `general.architecture` in the file.
    pub name: &'static str,
    /// Reads the metadata.
    pub hparams: fn(&Keys<'_>) -> Result<Hparams, EngineError>,
    /// Lists the tensors.
    pub tensors: fn(&Hparams) -> TensorList,
    /// Builds the graph of one step.
    pub build: fn(&mut Build<'_>),
}

/// What a tensor must be.
pub struct TensorSpec {
    /// Name in the file.
    pub name: String,
    /// Shape, outermost first.
    pub shape: Vec<usize>,
    /// Whether the model cannot do without it.
    pub required: bool,
}

/// The tensors of a model.
#[derive(Default)]
pub struct TensorList {
    /// All specs.
    pub specs: Vec<TensorSpec>,
}

impl TensorList {
    fn push(&mut self, name: String, shape: &[usize], required: bool) {
        self.specs.push(TensorSpec { name, shape: shape.to_vec(), required });
    }

    /// A tensor outside the layers.
    pub fn global(&mut self, name: &str, shape: &[usize]) {
        self.push(String::from(name), shape, true);
    }

    /// One that may be missing.
    pub fn global_opt(&mut self, name: &str, shape: &[usize]) {
        self.push(String::from(name), shape, false);
    }

    /// A tensor of layer `il`.
    pub fn layer(&mut self, il: usize, name: &str, shape: &[usize]) {
        self.push(format!("blk.{il}.{name}"), shape, true);
    }

    /// One that may be missing.
    pub fn layer_opt(&mut self, il: usize, name: &str, shape: &[usize]) {
        self.push(format!("blk.{il}.{name}"), shape, false);
    }
}

/// What a graph is built for. Two steps of equal shape use the same plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StepShape {
    /// Tokens in the step.
    pub n_tokens: usize,
    /// Tokens whose output is wanted; 0 builds no output head.
    pub n_outputs: usize,
    /// Whether hidden states are the output instead of logits.
    pub embeddings: bool,
    /// Whether the likeliest tokens are the output instead of logits.
    pub greedy: bool,
    /// Keep named intermediate tensors.
    pub taps: bool,
    /// Whether the tokens are a prompt's, where the back end runs those apart
    /// ([`crate::backend::Backend::runs_prompts_apart`]).
    pub prompt: bool,
}

/// A graph under construction, with the model at hand.
pub struct Build<'a> {
    /// The graph.
    pub g: GraphBuilder,
    /// The model's shape.
    pub hp: &'a Hparams,
    /// What the step looks like.
    pub shape: StepShape,
    /// Context length of a sequence.
    pub n_ctx: usize,
    weights: &'a Weights,
}

impl Build<'_> {
    /// A weight outside the layers; it is in the tensor list as required.
    pub fn weight(&mut self, name: &str) -> TensorId {
        self.weight_opt(name).unwrap_or_else(|| panic!("{name} is not in the model's tensor list"))
    }

    /// A weight outside the layers, if the file has it.
    pub fn weight_opt(&mut self, name: &str) -> Option<TensorId> {
        let id = self.weights.id(name)?;
        let w = self.weights.get(id);
        Some(self.g.weight(id, w.format, &w.shape, 0))
    }

    /// A weight of layer `il`.
    pub fn layer(&mut self, il: usize, name: &str) -> TensorId {
        self.weight(&format!("blk.{il}.{name}"))
    }

    /// A weight of layer `il`, if the file has it.
    pub fn layer_opt(&mut self, il: usize, name: &str) -> Option<TensorId> {
        self.weight_opt(&format!("blk.{il}.{name}"))
    }

    /// Rows `first..first + rows` of a weight of layer `il`: parts of a fused matrix.
    pub fn layer_rows(&mut self, il: usize, name: &str, first: usize, rows: usize) -> TensorId {
        let name = format!("blk.{il}.{name}");
        let id = self.weights.id(&name).unwrap_or_else(|| panic!("{name} is not in the model's tensor list"));
        let w = self.weights.get(id);
        self.g.weight(id, w.format, &[rows, w.cols()], first)
    }
}

/// Builds the graph of one step.
pub fn build(arch: &Arch, hp: &Hparams, weights: &Weights, n_ctx: usize, shape: StepShape) -> Graph {
    let mut build = Build { g: GraphBuilder::new(shape.taps), hp, shape, n_ctx, weights };
    (arch.build)(&mut build);
    Graph { prompt: shape.prompt, ..build.g.finish() }
}

/// A tensor as the files have it.
pub struct Found {
    /// Element format.
    pub format: quant::FormatId,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// Which file.
    pub source: usize,
    /// First byte in that file.
    pub offset: usize,
    /// Bytes.
    pub len_bytes: usize,
}

/// Checks the file's tensors against the model's list and collects the weights; all problems are reported at once.
///
/// `find` looks a tensor up by name.
pub fn resolve(
    list: &TensorList,
    weights: &mut Weights,
    find: impl Fn(&str) -> Option<Found>,
) -> Result<(), EngineError> {
    let mut problems = Vec::new();
    for spec in &list.specs {
        let Some(Found { format, shape, source, offset, len_bytes }) = find(&spec.name) else {
            if spec.required {
                problems
                    .push(TensorProblem::Missing { name: spec.name.clone(), expected: spec.shape.clone() });
            }
            continue;
        };
        if significant(&shape) != significant(&spec.shape) {
            problems.push(TensorProblem::Shape {
                name: spec.name.clone(),
                expected: spec.shape.clone(),
                got: shape,
            });
        } else if spec.shape.len() == 1 && format != quant::FormatId::F32 {
            problems.push(TensorProblem::Format { name: spec.name.clone(), got: format, expected: "F32" });
        } else if !usable(format) {
            problems.push(TensorProblem::Format {
                name: spec.name.clone(),
                got: format,
                expected: "a weight format",
            });
        } else {
            weights.insert(&spec.name, format, spec.shape.clone(), source, offset, len_bytes);
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(EngineError::Tensors(problems)) }
}

/// A shape without its outer ones: files may write `[1, n]` for `[n]`.
fn significant(shape: &[usize]) -> &[usize] {
    let skip = shape.iter().take_while(|d| **d == 1).count().min(shape.len().saturating_sub(1));
    &shape[skip..]
}

/// Whether a format holds weights that the kernels can use.
fn usable(format: quant::FormatId) -> bool {
    use quant::FormatId::*;
    !matches!(format, I8 | I16 | I32 | I64 | F64 | Q8_1 | Q8_K)
}
