//! What a format is: [`BlockFormat`] for quantised blocks, [`FloatFormat`] for plain floats, [`FormatId`] for the id
//! a file carries.

use bytemuck::{Pod, Zeroable};

pub use crate::act::GROUP;
use crate::act::{ActGroup, ActKind, SUPER_BLOCK};
use crate::lookup::{Book, Lookup, Portable};

/// Tensor types of GGUF files, with ggml's numbers.
///
/// Includes the plain integer types that files may carry as auxiliary tensors; those have no [`BlockFormat`].
#[allow(missing_docs)] // each name is the format's own name; `table.rs` says what it is
#[allow(non_camel_case_types)] // the field's spelling (Q4_K, IQ2_XXS) is the name users know
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum FormatId {
    F32 = 0,
    F16 = 1,
    Q4_0 = 2,
    Q4_1 = 3,
    Q5_0 = 6,
    Q5_1 = 7,
    Q8_0 = 8,
    Q8_1 = 9,
    Q2_K = 10,
    Q3_K = 11,
    Q4_K = 12,
    Q5_K = 13,
    Q6_K = 14,
    Q8_K = 15,
    IQ2_XXS = 16,
    IQ2_XS = 17,
    IQ3_XXS = 18,
    IQ1_S = 19,
    IQ4_NL = 20,
    IQ3_S = 21,
    IQ2_S = 22,
    IQ4_XS = 23,
    I8 = 24,
    I16 = 25,
    I32 = 26,
    I64 = 27,
    F64 = 28,
    IQ1_M = 29,
    BF16 = 30,
    TQ1_0 = 34,
    TQ2_0 = 35,
    MXFP4 = 39,
    NVFP4 = 40,
    Q1_0 = 41,
    Q2_0 = 42,
}

/// Why a row could not be encoded or decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuantError {
    /// The row length is not a multiple of the block length.
    RowLength {
        /// Format asked for.
        format: FormatId,
        /// Elements given.
        elems: usize,
        /// Elements per block.
        block: usize,
    },
    /// The byte buffer does not fit the row.
    ByteLength {
        /// Format asked for.
        format: FormatId,
        /// Bytes needed.
        expected: usize,
        /// Bytes given.
        got: usize,
    },
    /// The format cannot be encoded (or decoded) by this crate.
    Unsupported {
        /// Format asked for.
        format: FormatId,
        /// What was asked: "encode" or "decode".
        what: &'static str,
    },
    /// The format needs an importance matrix.
    NeedsImportance {
        /// Format asked for.
        format: FormatId,
    },
    /// The importance row has the wrong length.
    ImportanceLength {
        /// Elements in the row.
        expected: usize,
        /// Weights given.
        got: usize,
    },
}

impl core::fmt::Display for QuantError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match *self {
            QuantError::RowLength { format, elems, block } => {
                write!(f, "{format:?}: a row of {elems} elements is not a multiple of its block of {block}")
            }
            QuantError::ByteLength { format, expected, got } => {
                write!(f, "{format:?}: expected {expected} bytes, got {got}")
            }
            QuantError::Unsupported { format, what } => write!(f, "{format:?}: cannot {what} this format"),
            QuantError::NeedsImportance { format } => {
                write!(f, "{format:?}: encoding needs an importance matrix (--imatrix)")
            }
            QuantError::ImportanceLength { expected, got } => {
                write!(f, "importance row has {got} weights, expected {expected}")
            }
        }
    }
}

impl core::error::Error for QuantError {}

/// Per-column importance of a row: the mean squared activation of each input column, or `None` for plain weighting.
pub type Importance<'a> = Option<&'a [f32]>;

/// 32 consecutive weights in the common form `scale[i/16] * (code[i] - BIAS) + offset[i/16]`.
///
/// `codes` holds 32 unsigned bytes, little-endian in eight words: byte `i % 4` of word `i / 4` is weight `i`. Words are
/// what both dp4a on the GPU and the packed unpacking on the CPU work on.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub struct Group {
    /// 32 biased codes.
    pub codes: [u32; 8],
    /// Scale of weights 0..16 and 16..32; equal when the format's `SCALE_ELEMS` is 32 or more.
    pub scale: [f32; 2],
    /// Offset of the two halves; zero when the format's `HAS_OFFSET` is false.
    pub offset: [f32; 2],
}

impl Group {
    /// Code of weight `i` (0..32), still biased.
    #[inline(always)]
    pub fn code(&self, i: usize) -> u8 {
        (self.codes[i / 4] >> (8 * (i % 4))) as u8
    }
}

/// A quantised block format. The implementing type is the `#[repr(C)]` block itself.
///
/// *Implementor must*: keep every code within `0..=CODE_MAX`; make
/// `scale[i/16] * (code - BIAS) as f32 + offset[i/16]` (two roundings, no fma) the format's exact decoded value; set
/// `SCALE_ELEMS` to 16 only if the two halves can differ; leave `offset` at zero unless `HAS_OFFSET`.
pub trait BlockFormat: Pod + 'static {
    /// The id files carry.
    const ID: FormatId;
    /// Weights per block; a multiple of [`GROUP`].
    const ELEMS: usize;
    /// Groups per block.
    const GROUPS: usize = Self::ELEMS / GROUP;
    /// What to subtract from a code.
    const BIAS: i32;
    /// Largest code. At most 127 lets kernels pair-add products in 16 bits.
    const CODE_MAX: u8;
    /// Weights that share a scale within a group: 16 or 32.
    const SCALE_ELEMS: usize = GROUP;
    /// Whether scales are values of f16: their products with another such are exact in f32.
    const SCALE_IS_F16: bool = false;
    /// Whether `offset` can be non-zero.
    const HAS_OFFSET: bool = false;
    /// How activations are rounded before a product with this format: ggml's choice.
    const ACT: ActKind = if Self::ELEMS == SUPER_BLOCK { ActKind::Q8K } else { ActKind::Q8_0 };
    /// Whether [`BlockFormat::encode_row`] is implemented, and whether it needs an importance row.
    const ENCODE: Encode;

    /// The codebook that unpacking reads.
    const BOOK: Book = Book::None;

    /// Group `g` (`g < GROUPS`) in the common form; tables are read through `lookup`.
    fn unpack_group_by<L: Lookup>(&self, g: usize, lookup: L) -> Group;

    /// [`BlockFormat::unpack_group_by`] with tables where they are.
    #[inline(always)]
    fn unpack_group(&self, g: usize) -> Group {
        self.unpack_group_by(g, Portable)
    }

    /// Encode one row: `src.len() == out.len() * ELEMS`, importance (if any) as long as `src`.
    ///
    /// Lengths are checked by [`crate::row::encode`]; a format with `ENCODE == Encode::No` is never called.
    fn encode_row(src: &[f32], importance: Importance<'_>, out: &mut [Self]);

    /// The same for values that are made anew all the time, such as a KV cache's: without a search that takes long.
    fn encode_row_fast(src: &[f32], out: &mut [Self]) {
        Self::encode_row(src, None, out);
    }

    /// The block's weights in f32: bit-equal to ggml's `to_float`.
    ///
    /// `out.len() == ELEMS`.
    #[inline]
    fn decode(&self, out: &mut [f32]) {
        for (g, out) in out.as_chunks_mut::<GROUP>().0.iter_mut().enumerate() {
            let group = self.unpack_group(g);
            let codes = group.codes.map(u32::to_le_bytes);
            let halves = out.as_chunks_mut::<16>().0.iter_mut().zip(codes.as_flattened().as_chunks::<16>().0);
            for ((out, codes), (scale, offset)) in halves.zip(group.scale.into_iter().zip(group.offset)) {
                for (out, &code) in out.iter_mut().zip(codes) {
                    let scaled = scale * (code as i32 - Self::BIAS) as f32;
                    *out = if Self::HAS_OFFSET { scaled + offset } else { scaled };
                }
            }
        }
    }

    /// Dot product of group `g` with 32 quantised activations, accumulated on `acc`.
    ///
    /// The sums over codes are exact integers; the float part is one fma per half that has its own scale, then one for
    /// the offset. This order is the definition that every CPU kernel reproduces bit for bit.
    #[inline]
    fn dot_group(&self, g: usize, act: &ActGroup, acc: f32) -> f32 {
        let group = self.unpack_group(g);
        let mut isum = [0i32; 2];
        for i in 0..GROUP {
            isum[i / 16] += (group.code(i) as i32 - Self::BIAS) * act.q[i] as i32;
        }
        let mut acc = acc;
        if Self::SCALE_ELEMS == 16 {
            acc = libm::fmaf(group.scale[0] * act.d, isum[0] as f32, acc);
            acc = libm::fmaf(group.scale[1] * act.d, isum[1] as f32, acc);
        } else {
            acc = libm::fmaf(group.scale[0] * act.d, (isum[0] + isum[1]) as f32, acc);
        }
        if Self::HAS_OFFSET {
            if Self::SCALE_ELEMS == 16 {
                acc = libm::fmaf(group.offset[0], act.values[0], acc);
                acc = libm::fmaf(group.offset[1], act.values[1], acc);
            } else {
                acc = libm::fmaf(group.offset[0], act.values[2], acc);
            }
        }
        acc
    }
}

/// Whether a format can be encoded here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encode {
    /// Yes; an importance row is used if given.
    Yes,
    /// Only with an importance row.
    WithImportance,
    /// No: this crate only reads the format.
    No,
}

/// A plain floating-point format.
pub trait FloatFormat: Pod + Zeroable + 'static {
    /// The id files carry.
    const ID: FormatId;
    /// Exact value.
    fn to_f32(self) -> f32;
    /// Nearest value, ties to even.
    fn from_f32(value: f32) -> Self;
}
