//! What a file may claim, and why parsing it allocates at most twice its length.
//!
//! Everything [`crate::Gguf`] keeps on the heap is three index vectors and the tensor list, each allocated once, in
//! full, and only after the file is known to be long enough for that many entries:
//!
//! | per | bytes in the file, at least | bytes on the heap |
//! |---|---|---|
//! | key-value pair | [`KV_MIN_BYTES`] | 4 (file order) + 4 (by key) |
//! | tensor | [`TENSOR_MIN_BYTES`] + 1 of data | `size_of::<TensorInfo>()` = 48, + 4 (by name) |
//!
//! 8 < 2·14 and 52 = 2·26, and the 24 bytes of the header are not counted. Values and names are borrowed. An error
//! copies at most one name, which is in the file too.

/// Alignment of tensor data when `general.alignment` is absent.
pub const DEFAULT_ALIGNMENT: u32 = 32;
/// The metadata key that sets the alignment: u32, a power of two.
pub const ALIGNMENT_KEY: &str = "general.alignment";
/// Largest alignment: more than any file system or device asks for, and little enough to pad a file in memory.
pub const MAX_ALIGNMENT: u32 = 1 << 24;
/// Longest key, after the GGUF specification.
pub const MAX_KEY_BYTES: u64 = 65_535;
/// Longest tensor name, after the GGUF specification. (ggml itself stops at 63.)
pub const MAX_TENSOR_NAME_BYTES: u64 = 64;
/// Most dimensions of a tensor; ggml's own limit.
pub const MAX_DIMS: u32 = 4;
/// Largest single dimension. Keeps [`TensorInfo`](crate::TensorInfo) small enough for the allocation bound; no row or row count of a
/// model comes within a thousandth of it.
pub const MAX_DIM_ELEMS: u64 = u32::MAX as u64;
/// Deepest array in an array. The specification allows nesting and names no limit, llama.cpp refuses it altogether.
pub const MAX_NESTING: u32 = 4;
/// Header, metadata and tensor list must end below this offset, so that the indices hold 4-byte offsets.
pub const MAX_METADATA_BYTES: u64 = u32::MAX as u64;

/// Shortest pair: length of the key, a key of one byte, type, a value of one byte.
pub const KV_MIN_BYTES: u64 = 8 + 1 + 4 + 1;
/// Shortest tensor entry: length of the name, a name of one byte, number of dimensions (0), type, offset.
pub const TENSOR_MIN_BYTES: u64 = 8 + 1 + 4 + 4 + 8;

/// An entry of an index. A tensor's cost is asserted where `TensorInfo` is.
pub const INDEX_BYTES: usize = size_of::<u32>();
const _: () = assert!(2 * INDEX_BYTES <= 2 * KV_MIN_BYTES as usize);
