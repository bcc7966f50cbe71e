//! Checked reader and writer of GGUF files (versions 2 and 3, little and big endian, split files).
//!
//! Bytes go in, a validated view that borrows them comes out: [`Gguf::parse`] checks every count, length, offset and
//! size once, and nothing past it needs to. The crate does no I/O, never panics on what a file says, and
//! [`Gguf::parse`] allocates at most twice the file's length (see `limits.rs` for the arithmetic). A metadata array is
//! not copied: it stays a slice of the file and is decoded while iterating.
//!
//! ```
//! use gguf::{Gguf, Writer};
//! # fn main() -> Result<(), gguf::GgufError> {
//! let mut writer = Writer::default();
//! writer.kv("general.architecture", "llama")?;
//! writer.kv("llama.block_count", 30u32)?;
//! let bytes = writer.header_bytes();
//!
//! let gguf = Gguf::parse(&bytes)?;
//! assert_eq!(gguf.str("general.architecture")?, "llama");
//! assert_eq!(gguf.u64("llama.block_count")?, 30);
//! # Ok(()) }
//! ```
#![no_std]
#![forbid(unsafe_code)]
extern crate alloc;

pub mod error;
pub mod file;
pub mod kv;
pub mod limits;
mod raw;
pub mod split;
pub mod tensor_info;
pub mod writer;

pub use error::{GgufError, SplitProblem, TensorProblem};
pub use file::Gguf;
pub use kv::{Array, ArrayView, Number, Value, ValueType};
pub use raw::Endian;
pub use split::{SplitInfo, SplitSet};
pub use tensor_info::{Dims, TensorInfo, swap_plain};
pub use writer::Writer;
