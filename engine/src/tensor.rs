//! Tensors of a graph: shape, element format, and where the data lives.
//!
//! Shapes run outermost to innermost. Activations are contiguous f32 (or i32 for ids); a tensor that shares another's
//! memory is a reshape of it, never a strided view. Weights may be any GGUF format and are contiguous by row.

use alloc::string::String;
use quant::FormatId;

/// Index of a tensor in its [`crate::graph::Graph`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TensorId(pub u32);

/// Up to four extents, outermost first.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    dims: [usize; 4],
    rank: u8,
}

impl Shape {
    /// A shape of one to four extents.
    pub fn new(dims: &[usize]) -> Shape {
        assert!((1..=4).contains(&dims.len()), "rank {} is not 1..=4", dims.len());
        let mut all = [1; 4];
        all[..dims.len()].copy_from_slice(dims);
        Shape { dims: all, rank: dims.len() as u8 }
    }

    /// The extents, outermost first.
    pub fn dims(&self) -> &[usize] {
        &self.dims[..self.rank as usize]
    }

    /// Number of elements.
    pub fn elems(&self) -> usize {
        self.dims().iter().product()
    }

    /// Innermost extent: the length of a row.
    pub fn cols(&self) -> usize {
        self.dims[self.rank as usize - 1]
    }

    /// Number of rows: the product of all extents but the innermost.
    pub fn rows(&self) -> usize {
        self.dims[..self.rank as usize - 1].iter().product()
    }
}

impl core::fmt::Debug for Shape {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_list().entries(self.dims()).finish()
    }
}

/// What the caller provides at each step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Input {
    /// Token ids, i32 `[n_tokens]`.
    Tokens,
    /// Positions in their sequence, i32 `[n_tokens]`.
    Positions,
    /// Token type ids (BERT's segments), i32 `[n_tokens]`.
    TokenTypes,
    /// Rows of the batch whose output is wanted, i32 `[n_outputs]`.
    OutputRows,
}

/// Where a tensor's data lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// Rows `first_row..first_row + rows` of a weight of the model.
    Weight {
        /// Index into [`crate::weights::Weights`].
        weight: u32,
        /// First row of the weight that this tensor covers.
        first_row: usize,
    },
    /// Set before each step.
    Input(Input),
    /// Written by one node, memory assigned by the planner.
    Activation,
    /// The same memory as another tensor, with another shape of as many elements.
    Reshape(TensorId),
}

/// A tensor of a graph.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// llama.cpp's name for it where it has one (`attn_norm-0`), for layer diffs; empty otherwise.
    pub name: String,
    /// Element format.
    pub format: FormatId,
    /// Extents.
    pub shape: Shape,
    /// Where the data lives.
    pub storage: Storage,
}

impl Tensor {
    /// Bytes of an activation or input.
    pub fn len_bytes(&self) -> usize {
        quant::info(self.format).bytes * self.shape.elems() / quant::info(self.format).elems
    }
}
