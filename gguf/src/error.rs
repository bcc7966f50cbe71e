//! Everything that can be wrong with a file, or with a question about it: what, where, expected, got.
//!
//! Offsets are bytes from the start of the file. Names come from the file and are at most as long as the limits allow.

use alloc::string::String;
use core::fmt;

use quant::FormatId;

use crate::limits;

/// The error of this crate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GgufError {
    /// The file ends inside something.
    Truncated {
        /// What was being read.
        what: &'static str,
        /// Where it starts.
        offset: u64,
        /// Bytes it needs.
        expected: u64,
        /// Bytes left in the file.
        got: u64,
    },
    /// The first four bytes are not `GGUF`.
    BadMagic {
        /// The bytes found.
        got: [u8; 4],
    },
    /// A version that is not 2 or 3.
    UnsupportedVersion {
        /// The version field, read as little endian.
        got: u32,
    },
    /// A count, or a length, above what can be.
    TooLarge {
        /// What is counted.
        what: &'static str,
        /// Where the number stands.
        offset: u64,
        /// The most it could be here.
        max: u64,
        /// The number found.
        got: u64,
    },
    /// A key or a name of no bytes.
    Empty {
        /// What is empty.
        what: &'static str,
        /// Where it starts.
        offset: u64,
    },
    /// A string that is not UTF-8 where text is needed.
    NotUtf8 {
        /// What is not text.
        what: String,
        /// Where its first bad byte is.
        offset: u64,
    },
    /// A type number that no value has.
    UnknownValueType {
        /// Key of the value.
        key: String,
        /// Where the number stands.
        offset: u64,
        /// The number found.
        got: u32,
    },
    /// A boolean that is neither 0 nor 1.
    InvalidBool {
        /// Key of the value.
        key: String,
        /// Where it stands.
        offset: u64,
        /// The byte found.
        got: u8,
    },
    /// Arrays in arrays, deeper than the limit.
    TooDeep {
        /// Key of the value.
        key: String,
        /// Where the first array too deep starts.
        offset: u64,
    },
    /// Two values with one key.
    DuplicateKey {
        /// The key.
        key: String,
        /// Where the later one starts (when writing: 0).
        offset: u64,
    },
    /// `general.alignment` is not a power of two, or above the limit, or set after the first tensor.
    Alignment {
        /// The alignment found.
        got: u32,
    },
    /// Something is wrong with one tensor.
    Tensor {
        /// Name of the tensor.
        tensor: String,
        /// Where its entry in the tensor list starts (when writing: 0).
        offset: u64,
        /// What it is.
        problem: TensorProblem,
    },
    /// The tensors together need more bytes than the file has.
    DataTruncated {
        /// Where tensor data begins.
        offset: u64,
        /// Bytes needed from there, without padding.
        expected: u64,
        /// Bytes left.
        got: u64,
    },
    /// No value has this key.
    MissingKey {
        /// The key asked for.
        key: String,
    },
    /// The value has another type.
    WrongType {
        /// The key asked for.
        key: String,
        /// What was asked for.
        expected: &'static str,
        /// The type found.
        found: &'static str,
    },
    /// The number does not fit the type asked for.
    OutOfRange {
        /// The key asked for.
        key: String,
        /// What was asked for.
        expected: &'static str,
        /// The number found.
        got: i128,
    },
    /// The parts of a split file do not belong together.
    Split {
        /// Which part, from 0 in the order given.
        part: usize,
        /// What is wrong.
        problem: SplitProblem,
    },
    /// Bytes of this format cannot be turned to the other byte order here.
    ByteOrder {
        /// The format.
        format: FormatId,
    },
}

/// What is wrong with a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorProblem {
    /// More than four dimensions.
    TooManyDims {
        /// The number found.
        got: u64,
    },
    /// A dimension of 0, or above the limit.
    Dim {
        /// Which, from 0, innermost first.
        index: u32,
        /// The dimension found.
        got: u64,
    },
    /// Elements or bytes do not fit 64 bits.
    Overflow {
        /// The dimensions, innermost first, ones past the last.
        ne: [u32; 4],
    },
    /// A type number that no format has.
    UnknownFormat {
        /// The number found.
        got: u32,
    },
    /// The row is no whole number of blocks.
    RowLength {
        /// The format.
        format: FormatId,
        /// Elements of a block.
        block_elems: u64,
        /// Elements of the row.
        got: u64,
    },
    /// The offset in the data section is not a multiple of the alignment.
    Misaligned {
        /// The alignment.
        alignment: u64,
        /// The offset found, from the start of the data section.
        got: u64,
    },
    /// The data reaches past the end of the file.
    OutOfFile {
        /// First byte, from the start of the data section.
        begin: u64,
        /// Bytes of the tensor.
        n_bytes: u64,
        /// Bytes of the data section.
        available: u64,
    },
    /// The data overlaps that of another tensor.
    Overlap {
        /// Where this tensor's data starts in the file.
        begin: u64,
        /// Where the other's ends.
        other_end: u64,
    },
    /// An earlier tensor has the same name.
    Duplicate,
}

/// What is wrong with a set of parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SplitProblem {
    /// The number of parts given is not `split.count`.
    Count {
        /// `split.count`.
        expected: u64,
        /// Parts given.
        got: u64,
    },
    /// `split.no` is not the part's place in the order.
    Number {
        /// Its place.
        expected: u64,
        /// `split.no`.
        got: u64,
    },
    /// All parts together do not hold `split.tensors.count` tensors.
    Tensors {
        /// `split.tensors.count`.
        expected: u64,
        /// Tensors in the parts given.
        got: u64,
    },
    /// Another byte order than the first part.
    Endian,
}

impl fmt::Display for GgufError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Truncated { what, offset, expected, got } => write!(
                f,
                "file ends inside {what} at offset {offset}: expected {expected} bytes, got {got}; is the download complete?"
            ),
            Self::BadMagic { got } => {
                write!(f, "not a GGUF file: expected \"GGUF\" at offset 0, got \"{}\"", got.escape_ascii())
            }
            Self::UnsupportedVersion { got } => {
                let got = if got & 0xffff == 0 { got.swap_bytes() } else { *got };
                write!(f, "GGUF version at offset 4: expected 2 or 3, got {got}")
            }
            Self::TooLarge { what, offset, max, got } => {
                write!(f, "{what} at offset {offset}: expected at most {max}, got {got}")
            }
            Self::Empty { what, offset } => write!(f, "{what} at offset {offset} is empty"),
            Self::NotUtf8 { what, offset } => write!(f, "{what} is not UTF-8 at offset {offset}"),
            Self::UnknownValueType { key, offset, got } => {
                write!(f, "key {key:?}: value type at offset {offset}: expected 0 to 12, got {got}")
            }
            Self::InvalidBool { key, offset, got } => {
                write!(f, "key {key:?}: bool at offset {offset}: expected 0 or 1, got {got}")
            }
            Self::TooDeep { key, offset } => write!(
                f,
                "key {key:?}: array at offset {offset}: expected at most {} arrays in one another",
                limits::MAX_NESTING
            ),
            Self::DuplicateKey { key, offset } => write!(f, "key {key:?} appears again at offset {offset}"),
            Self::Alignment { got } => {
                let (key, max) = (limits::ALIGNMENT_KEY, limits::MAX_ALIGNMENT);
                write!(
                    f,
                    "{key}: expected a power of two up to {max}, set before the first tensor; got {got}"
                )
            }
            Self::Tensor { tensor, offset, problem } => {
                write!(f, "tensor {tensor:?} (entry at offset {offset}): {problem}")
            }
            Self::DataTruncated { offset, expected, got } => write!(
                f,
                "tensor data at offset {offset}: expected {expected} bytes, got {got}; is the download complete?"
            ),
            Self::MissingKey { key } => write!(f, "key {key:?} is missing"),
            Self::WrongType { key, expected, found } => {
                write!(f, "key {key:?}: expected {expected}, found {found}")
            }
            Self::OutOfRange { key, expected, got } => {
                write!(f, "key {key:?}: expected a number that fits {expected}, got {got}")
            }
            Self::Split { part, problem } => write!(f, "part {part} of a split file: {problem}"),
            Self::ByteOrder { format } => {
                write!(f, "{format}: blocks cannot be turned to the other byte order; convert the file")
            }
        }
    }
}

impl fmt::Display for TensorProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooManyDims { got } => {
                write!(f, "expected at most {} dimensions, got {got}", limits::MAX_DIMS)
            }
            Self::Dim { index, got } => {
                write!(f, "dimension {index}: expected 1 to {}, got {got}", limits::MAX_DIM_ELEMS)
            }
            Self::Overflow { ne } => write!(f, "the size of shape {ne:?} does not fit 64 bits"),
            Self::UnknownFormat { got } => write!(f, "unknown tensor type {got}"),
            Self::RowLength { format, block_elems, got } => {
                write!(f, "rows of {got} elements are no multiple of {format}'s blocks of {block_elems}")
            }
            Self::Misaligned { alignment, got } => {
                write!(f, "data offset: expected a multiple of {alignment}, got {got}")
            }
            Self::OutOfFile { begin, n_bytes, available } => write!(
                f,
                "expected {n_bytes} bytes from {begin} of the data section, which has at most {available}; is the download complete?"
            ),
            Self::Overlap { begin, other_end } => {
                write!(f, "data begins at offset {begin}, inside another tensor that ends at {other_end}")
            }
            Self::Duplicate => f.write_str("an earlier tensor has the same name"),
        }
    }
}

impl fmt::Display for SplitProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count { expected, got } => write!(f, "split.count: expected {expected} parts, got {got}"),
            Self::Number { expected, got } => write!(f, "split.no: expected {expected}, got {got}"),
            Self::Tensors { expected, got } => {
                write!(f, "split.tensors.count: expected {expected} tensors in all parts, got {got}")
            }
            Self::Endian => f.write_str("byte order differs from that of the first part"),
        }
    }
}

impl core::error::Error for GgufError {}
