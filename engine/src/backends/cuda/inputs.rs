//! What changes from step to step, as one block of device memory that one copy fills. Kernels read positions, lengths
//! and pages from it, so that launches (and a captured graph of them) stay the same from step to step.
//!
//! The order within the block depends on the plan's tokens and outputs alone; the pages come last, since their number
//! changes.

use alloc::vec::Vec;

use gpu_kernels::launch::DevicePtr;

use crate::backend::Step;
use crate::tensor::Input;

/// Alignment of each array in the block.
const ALIGN: usize = 16;

/// Offsets of a plan's arrays in the block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InputLayout {
    n_tokens: usize,
    n_outputs: usize,
    positions: usize,
    output_rows: usize,
    token_types: usize,
    token_sequences: usize,
    sequences: usize,
    cells: usize,
    counter: usize,
    pages: usize,
}

impl InputLayout {
    /// For steps of so many tokens and outputs. There are at most as many sequences as tokens.
    pub fn new(n_tokens: usize, n_outputs: usize) -> InputLayout {
        let mut at = 0;
        let mut next = |bytes: usize| {
            let here = at;
            at += bytes.next_multiple_of(ALIGN);
            here
        };
        let _tokens = next(4 * n_tokens);
        let positions = next(4 * n_tokens);
        let output_rows = next(4 * n_outputs);
        let token_types = next(4 * n_tokens);
        let token_sequences = next(4 * n_tokens);
        let sequences = next(8 * n_tokens);
        let cells = next(4 * n_tokens);
        let counter = next(4);
        let pages = next(0);
        InputLayout {
            n_tokens,
            n_outputs,
            positions,
            output_rows,
            token_types,
            token_sequences,
            sequences,
            cells,
            counter,
            pages,
        }
    }

    /// Bytes of the block for so many pages.
    pub fn bytes(&self, n_pages: usize) -> usize {
        self.pages + 4 * n_pages
    }

    /// Writes a step's block.
    pub fn fill(&self, step: &Step<'_>, block: &mut Vec<u8>) {
        assert!(
            step.tokens.len() == self.n_tokens && step.output_rows.len() == self.n_outputs,
            "a step of the plan's shape"
        );
        block.clear();
        block.resize(self.bytes(step.pages.len()), 0);
        let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, bytemuck::cast_slice(step.tokens));
        put(self.positions, bytemuck::cast_slice(step.positions));
        put(self.output_rows, bytemuck::cast_slice(step.output_rows));
        put(self.token_sequences, bytemuck::cast_slice(step.token_sequences));
        for (i, s) in step.sequences.iter().enumerate() {
            put(self.sequences + 8 * i, bytemuck::cast_slice(&[s.first_page, s.len]));
        }
        put(self.pages, bytemuck::cast_slice(step.pages));
        put(self.cells, bytemuck::cast_slice(step.cells));
    }
}

/// Where a plan's inputs are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InputAddresses {
    /// Start of the block.
    pub block: DevicePtr,
    /// The plan's order.
    pub layout: InputLayout,
}

impl InputAddresses {
    fn at(&self, offset: usize) -> DevicePtr {
        self.block.offset(offset as u64)
    }

    /// An input of the graph.
    pub fn input(&self, input: Input) -> DevicePtr {
        self.at(match input {
            Input::Tokens => 0,
            Input::Positions => self.layout.positions,
            Input::OutputRows => self.layout.output_rows,
            Input::TokenTypes => self.layout.token_types,
        })
    }

    /// i32: position of each token.
    pub fn positions(&self) -> DevicePtr {
        self.input(Input::Positions)
    }

    /// u32: index into the sequences of each token.
    pub fn token_sequences(&self) -> DevicePtr {
        self.at(self.layout.token_sequences)
    }

    /// u32: cache cell of each token.
    pub fn cells(&self) -> DevicePtr {
        self.at(self.layout.cells)
    }

    /// (first page, length) of each sequence, u32 each.
    pub fn sequences(&self) -> DevicePtr {
        self.at(self.layout.sequences)
    }

    /// u32, 0: what the CTAs of a launch count themselves with, and leave at 0. The only word of the block that launches
    /// write, by atomics.
    pub fn counter(&self) -> DevicePtr {
        self.at(self.layout.counter)
    }

    /// u32: pages of all sequences.
    pub fn pages(&self) -> DevicePtr {
        self.at(self.layout.pages)
    }
}
