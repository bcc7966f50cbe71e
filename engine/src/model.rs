//! A model: hyperparameters, weights, vocabulary and architecture of a GGUF file.

use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use gguf::Gguf;

use crate::error::EngineError;
use crate::graph::Graph;
use crate::hparams::{Hparams, Keys};
use crate::models::{self, Arch, StepShape};
use crate::tokenizer::Tokenizer;
use crate::weights::{ByteSource, Weights};

/// A loaded model. The weights stay where the sources hold them.
pub struct Model {
    arch: &'static Arch,
    hparams: Hparams,
    weights: Arc<Weights>,
    tokenizer: Tokenizer,
    meta: Meta,
}

/// What people and front ends want to know of a file.
#[derive(Clone, Debug, Default)]
pub struct Meta {
    /// `general.name`
    pub name: Option<String>,
    /// `general.file_type`, llama.cpp's number of the overall quantisation.
    pub file_type: Option<u32>,
    /// `tokenizer.chat_template`
    pub chat_template: Option<String>,
    /// Bytes of all files.
    pub file_bytes: usize,
}

impl Model {
    /// Loads a model from its files: one, or all parts of a split set in order.
    pub fn load(sources: Vec<Arc<dyn ByteSource>>) -> Result<Model, EngineError> {
        let held = sources.clone();
        let parts = held.iter().map(|s| Gguf::parse(s.bytes())).collect::<Result<Vec<_>, _>>()?;
        let set = gguf::SplitSet::new(parts)?;
        let first = set.metadata();
        let arch = models::table::find(first.str("general.architecture")?)?;
        let native = if cfg!(target_endian = "little") { gguf::Endian::Little } else { gguf::Endian::Big };
        if first.endian() != native {
            return Err(EngineError::Unsupported {
                what: String::from(
                    "tensor data in the other byte order; convert the file on a machine of this order",
                ),
            });
        }
        let hparams = (arch.hparams)(&Keys::new(first, arch.name))?;
        let mut weights = Weights::new(sources);
        let list = (arch.tensors)(&hparams);
        let names = set.tensors().map(|(_, info)| info.name);
        models::resolve(&list, &mut weights, names, |name| {
            let (part, info) = set.tensor(name)?;
            let shape = info.shape().iter().map(|n| *n as usize).collect();
            Some(models::Found {
                format: info.format,
                shape,
                source: part,
                offset: info.offset as usize,
                len_bytes: info.n_bytes() as usize,
            })
        })?;
        let meta = Meta {
            name: first.opt_text("general.name")?.map(String::from),
            file_type: first.opt_u32("general.file_type")?,
            chat_template: first.opt_text("tokenizer.chat_template")?.map(String::from),
            file_bytes: held.iter().map(|s| s.bytes().len()).sum(),
        };
        let tokenizer = Tokenizer::from_gguf(first)?;
        Ok(Model { arch, hparams, weights: Arc::new(weights), tokenizer, meta })
    }

    /// Name of the architecture.
    pub fn arch_name(&self) -> &'static str {
        self.arch.name
    }

    /// The model's shape and constants.
    pub fn hparams(&self) -> &Hparams {
        &self.hparams
    }

    /// The weights, for backends.
    pub fn weights(&self) -> &Arc<Weights> {
        &self.weights
    }

    /// The vocabulary.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// What people want to know of the file.
    pub fn meta(&self) -> &Meta {
        &self.meta
    }

    /// The graph of one step in a context of `n_ctx` positions per sequence.
    pub fn graph(&self, n_ctx: usize, shape: StepShape) -> Graph {
        models::build(self.arch, &self.hparams, &self.weights, n_ctx, shape)
    }
}
