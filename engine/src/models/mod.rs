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
    /// Whether the model can do without it.
    pub presence: Presence,
}

/// Whether a model can do without a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Presence {
    /// It cannot.
    Required,
    /// It can.
    Optional,
    /// It can if the file has the tensor of this name, which serves instead.
    Unless(String),
}

/// The tensors of a model.
#[derive(Default)]
pub struct TensorList {
    /// All specs.
    pub specs: Vec<TensorSpec>,
    /// Names of tensors that a file may have and the engine makes nothing of.
    pub unused: Vec<&'static str>,
}

impl TensorList {
    fn push(&mut self, name: String, shape: &[usize], presence: Presence) {
        self.specs.push(TensorSpec { name, shape: shape.to_vec(), presence });
    }

    /// A tensor outside the layers.
    pub fn global(&mut self, name: &str, shape: &[usize]) {
        self.push(String::from(name), shape, Presence::Required);
    }

    /// One that may be missing.
    pub fn global_opt(&mut self, name: &str, shape: &[usize]) {
        self.push(String::from(name), shape, Presence::Optional);
    }

    /// A tensor of layer `il`.
    pub fn layer(&mut self, il: usize, name: &str, shape: &[usize]) {
        self.push(format!("blk.{il}.{name}"), shape, Presence::Required);
    }

    /// One that may be missing.
    pub fn layer_opt(&mut self, il: usize, name: &str, shape: &[usize]) {
        self.push(format!("blk.{il}.{name}"), shape, Presence::Optional);
    }

    /// A matrix of layer `il`, its bias and the factor on its products (NVFP4 files scale a whole matrix once more); the
    /// latter two may be missing.
    pub fn layer_matrix(&mut self, il: usize, name: &str, rows: usize, cols: usize) {
        self.layer(il, &format!("{name}.weight"), &[rows, cols]);
        self.layer_matrix_extras(il, name, rows);
    }

    /// Bias and factor of a matrix.
    pub fn layer_matrix_extras(&mut self, il: usize, name: &str, rows: usize) {
        self.layer_opt(il, &format!("{name}.bias"), &[rows]);
        self.layer_opt(il, &format!("{name}.scale"), &[1]);
    }

    /// One that may be missing where the layer has `instead`.
    pub fn layer_unless(&mut self, il: usize, name: &str, shape: &[usize], instead: &str) {
        self.push(format!("blk.{il}.{name}"), shape, Presence::Unless(format!("blk.{il}.{instead}")));
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
    /// Whether keys are rotated before they are cached ([`crate::layers::rotation`]).
    pub rotates_k: bool,
    /// Whether values are.
    pub rotates_v: bool,
}

/// A matrix with what is done to its products.
#[derive(Clone, Copy, Debug)]
pub struct Matrix {
    /// [rows, cols]
    pub weight: TensorId,
    /// One element a row.
    pub bias: Option<TensorId>,
    /// Factor on the products.
    pub scale: f32,
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

    /// A matrix of layer `il` with its bias and its factor.
    pub fn layer_matrix(&mut self, il: usize, name: &str) -> Matrix {
        Matrix {
            weight: self.layer(il, &format!("{name}.weight")),
            bias: self.layer_opt(il, &format!("{name}.bias")),
            scale: self.layer_scale(il, name),
        }
    }

    /// The factor on the products of a matrix of layer `il`; 1 if the file has none.
    pub fn layer_scale(&self, il: usize, name: &str) -> f32 {
        self.scale_of(&format!("blk.{il}.{name}"))
    }

    /// The factor on the products of a matrix; 1 if the file has none.
    pub fn scale_of(&self, name: &str) -> f32 {
        self.weights.id(&format!("{name}.scale")).map_or(1.0, |id| {
            let bytes = self.weights.row_range(id, 0, 1);
            f32::from_le_bytes(bytes.try_into().expect("one f32: checked with the tensor list"))
        })
    }

    /// Products of `x` with matrices: `scale · (x · weight) + bias` each.
    pub fn products(&mut self, x: TensorId, matrices: &[Matrix]) -> Vec<TensorId> {
        if matrices.iter().all(|m| m.scale == 1.0) {
            let parts: Vec<_> = matrices.iter().map(|m| (m.weight, m.bias)).collect();
            return self.g.matmul_many(x, &parts);
        }
        let parts: Vec<_> = matrices.iter().map(|m| (m.weight, None)).collect();
        let products = self.g.matmul_many(x, &parts);
        products
            .into_iter()
            .zip(matrices)
            .map(|(y, m)| {
                let y = self.g.scale(y, m.scale);
                m.bias.map_or(y, |bias| self.g.add(y, bias))
            })
            .collect()
    }

    /// Rows `first..first + rows` of a weight of layer `il`: parts of a fused matrix.
    pub fn layer_rows(&mut self, il: usize, name: &str, first: usize, rows: usize) -> TensorId {
        self.layer_rows_opt(il, name, first, rows)
            .unwrap_or_else(|| panic!("blk.{il}.{name} is not in the model's tensor list"))
    }

    /// The same, if the file has it.
    pub fn layer_rows_opt(&mut self, il: usize, name: &str, first: usize, rows: usize) -> Option<TensorId> {
        let id = self.weights.id(&format!("blk.{il}.{name}"))?;
        let w = self.weights.get(id);
        Some(self.g.weight(id, w.format, &[rows, w.cols()], first))
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
/// `find` looks a tensor up by name; `names` are those of all the file's tensors. One that the list does not know is a
/// problem as well: left out, what the model says would be wrong without a word.
pub fn resolve<'a>(
    list: &TensorList,
    weights: &mut Weights,
    names: impl Iterator<Item = &'a str>,
    find: impl Fn(&str) -> Option<Found>,
) -> Result<(), EngineError> {
    let mut problems = Vec::new();
    let mut known: Vec<&str> = list.specs.iter().map(|spec| spec.name.as_str()).collect();
    known.extend(&list.unused);
    known.sort_unstable();
    for name in names {
        // Scales of activations, for engines that compute in 4 bits.
        if known.binary_search(&name).is_err() && !name.ends_with(".input_scale") {
            problems.push(TensorProblem::Unknown { name: String::from(name) });
        }
    }
    for spec in &list.specs {
        let Some(Found { format, shape, source, offset, len_bytes }) = find(&spec.name) else {
            let missing = match &spec.presence {
                Presence::Required => true,
                Presence::Optional => false,
                Presence::Unless(instead) => find(instead).is_none(),
            };
            if missing {
                problems
                    .push(TensorProblem::Missing { name: spec.name.clone(), expected: spec.shape.clone() });
            }
            continue;
        };
        if !significant(&shape).eq(significant(&spec.shape)) {
            problems.push(TensorProblem::Shape {
                name: spec.name.clone(),
                expected: spec.shape.clone(),
                got: shape,
            });
        } else if (spec.shape.len() == 1 || spec.shape.ends_with(&[1])) && format != quant::FormatId::F32 {
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

/// A shape without its ones: files may write `[1, n]` for `[n]`, and a vector of which parts are wanted has rows of one.
fn significant(shape: &[usize]) -> impl Iterator<Item = &usize> {
    shape.iter().filter(|d| **d != 1)
}

/// Whether a format holds weights that the kernels can use.
fn usable(format: quant::FormatId) -> bool {
    use quant::FormatId::*;
    !matches!(format, I8 | I16 | I32 | I64 | F64 | Q8_1 | Q8_K)
}
