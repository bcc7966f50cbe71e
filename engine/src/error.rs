//! The engine's error type. Messages say what, on what, expected what.

use alloc::string::String;
use alloc::vec::Vec;

use quant::FormatId;

use crate::tokenizer::TokenizerError;

/// A tensor of the file that is not what the model needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TensorProblem {
    /// Not in the file.
    Missing {
        /// Name.
        name: String,
        /// Shape wanted, outermost first.
        expected: Vec<usize>,
    },
    /// Another shape.
    Shape {
        /// Name.
        name: String,
        /// Shape wanted, outermost first.
        expected: Vec<usize>,
        /// Shape in the file.
        got: Vec<usize>,
    },
    /// In the file, but not of this architecture.
    Unknown {
        /// Name.
        name: String,
    },
    /// A format that the engine cannot use in that place.
    Format {
        /// Name.
        name: String,
        /// Format in the file.
        got: FormatId,
        /// What the place needs.
        expected: &'static str,
    },
}

impl core::fmt::Display for TensorProblem {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            TensorProblem::Missing { name, expected } => {
                write!(f, "{name}: missing, expected shape {expected:?}")
            }
            TensorProblem::Shape { name, expected, got } => {
                write!(f, "{name}: expected shape {expected:?}, got {got:?}")
            }
            TensorProblem::Unknown { name } => write!(f, "{name}: no tensor of this architecture"),
            TensorProblem::Format { name, got, expected } => {
                write!(f, "{name}: format {got}, expected {expected}")
            }
        }
    }
}

/// What can go wrong with models, contexts and steps.
#[derive(Clone, Debug, PartialEq)]
pub enum EngineError {
    /// The file is not a usable GGUF.
    Gguf(gguf::GgufError),
    /// The vocabulary is not usable.
    Tokenizer(TokenizerError),
    /// `general.architecture` names a model the engine does not have.
    UnknownArchitecture {
        /// Name in the file.
        name: String,
        /// Names it could be.
        known: Vec<&'static str>,
    },
    /// A hyperparameter is out of range or contradicts another.
    BadHparam {
        /// Key or quantity.
        key: String,
        /// Value found.
        got: String,
        /// What is allowed.
        expected: String,
    },
    /// Tensors missing, unknown, or of the wrong shape, all of them.
    Tensors(Vec<TensorProblem>),
    /// A feature of the file that is not supported.
    Unsupported {
        /// What.
        what: String,
    },
    /// A context parameter is out of range.
    BadParam {
        /// Which.
        name: &'static str,
        /// Value given.
        got: String,
        /// What is allowed.
        expected: String,
    },
    /// A batch does not fit the context.
    ContextFull {
        /// Positions needed.
        needed: usize,
        /// Positions there are.
        n_ctx: usize,
    },
    /// A batch is malformed.
    BadBatch {
        /// Why.
        what: String,
    },
    /// Memory could not be had.
    OutOfMemory {
        /// For what.
        what: &'static str,
        /// How much.
        bytes: usize,
    },
    /// A backend cannot run a node of the graph.
    UnsupportedOp {
        /// Backend.
        backend: &'static str,
        /// Operation.
        op: &'static str,
        /// Why.
        why: String,
    },
    /// A GPU's driver did not do what it was asked.
    #[cfg(feature = "gpu")]
    Device(gpu_kernels::driver::DriverError),
    /// Reading or mapping a file failed.
    #[cfg(feature = "std")]
    Io {
        /// File.
        path: String,
        /// The system's words.
        what: String,
    },
}

impl core::fmt::Display for EngineError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            EngineError::Gguf(e) => e.fmt(f),
            EngineError::Tokenizer(e) => e.fmt(f),
            EngineError::UnknownArchitecture { name, known } => {
                write!(f, "unknown model architecture '{name}'; known: {}", known.join(", "))
            }
            EngineError::BadHparam { key, got, expected } => write!(f, "{key} is {got}, expected {expected}"),
            EngineError::Tensors(problems) => {
                write!(f, "{} tensor(s) of the file do not fit the model:", problems.len())?;
                for p in problems.iter().take(8) {
                    write!(f, " {p};")?;
                }
                if problems.len() > 8 { write!(f, " and {} more", problems.len() - 8) } else { Ok(()) }
            }
            EngineError::Unsupported { what } => write!(f, "not supported: {what}"),
            EngineError::BadParam { name, got, expected } => {
                write!(f, "{name} is {got}, expected {expected}")
            }
            EngineError::ContextFull { needed, n_ctx } => {
                write!(f, "the context holds {n_ctx} tokens, {needed} are needed; raise it with -c {needed}")
            }
            EngineError::BadBatch { what } => write!(f, "bad batch: {what}"),
            EngineError::OutOfMemory { what, bytes } => write!(f, "cannot allocate {bytes} bytes for {what}"),
            EngineError::UnsupportedOp { backend, op, why } => {
                write!(f, "backend {backend} cannot run {op}: {why}")
            }
            #[cfg(feature = "gpu")]
            EngineError::Device(e) => e.fmt(f),
            #[cfg(feature = "std")]
            EngineError::Io { path, what } => write!(f, "{path}: {what}"),
        }
    }
}

impl core::error::Error for EngineError {}

impl From<gguf::GgufError> for EngineError {
    fn from(e: gguf::GgufError) -> Self {
        EngineError::Gguf(e)
    }
}

impl From<TokenizerError> for EngineError {
    fn from(e: TokenizerError) -> Self {
        EngineError::Tokenizer(e)
    }
}
