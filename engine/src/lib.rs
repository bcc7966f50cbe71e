//! The engine: GGUF models as graphs, planned once and run step by step on a backend.
//!
//! `no_std + alloc` without the feature `std`: the core does no I/O, reads no environment, spawns no thread and allocates
//! nothing per token. See ARCHITECTURE.md.
#![cfg_attr(not(any(feature = "std", test)), no_std)]
#![deny(unsafe_code)]

extern crate alloc;

pub mod backend;
pub mod backends;
pub mod context;
pub mod error;
pub mod executor;
pub mod graph;
pub mod hparams;
#[cfg(feature = "std")]
pub mod io;
pub mod kv_cache;
pub mod layers;
pub mod model;
pub mod models;
pub mod op;
pub mod plan;
#[cfg(feature = "std")]
pub mod pool;
pub mod sampler;
pub mod tensor;
pub mod tokenizer;
pub mod weights;
pub mod workers;

pub use context::{Batch, Context, ContextParams};
pub use error::EngineError;
pub use executor::Executor;
pub use model::Model;
pub use tokenizer::Tokenizer;
