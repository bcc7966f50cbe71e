//! SIMD kernels of the CPU backend. Of the engine's `unsafe` code most is here; ARCHITECTURE.md lists the rest.
//!
//! **Bits.** A result depends on the inputs of its own row alone: not on the CPU's instructions, the number of threads,
//! or what else is in the batch. Every kernel is written once, against [`vector::Simd`], whose methods are exact or
//! correctly rounded, and every sum has an order fixed by its shape:
//!
//! * block formats: activations quantised per 32; for each group in order of k the exact integer dot, then the fma
//!   sequence of [`quant::BlockFormat::dot_group`];
//! * float formats: 16 partial sums by k mod 16, each an fma chain in order of k, then a fixed tree (so are norms);
//! * attention: scores are fma chains over the head, values fma chains over positions, page by page of 64 positions.
//!
//! **Memory.** Weights are borrowed, of any alignment, never copied whole. Working memory is a [`Scratch`], which grows
//! to the largest shape seen and then stays. Functions take slices and check every length against the shapes;
//! past these checks kernels run on pointers.
//!
//! **Inlining.** Whatever touches a vector is `#[inline(always)]` down from a [`vector::SimdOp`], and closures with vectors in
//! them are avoided: compiled on its own, such a function lacks the features, and every instruction becomes a call.
//!
//! **In place.** Elementwise functions take `out` holding their first input; see each.

// Tiles index several arrays by one row, token or lane; iterators over one of them hide that.
#![allow(clippy::needless_range_loop)]

mod act;
mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod codebook;
mod elementwise;
mod error;
mod float_gemm;
mod hadamard;
mod isa;
mod math;
mod matmul;
mod norm;
mod operands;
mod panel;
mod quant_gemm;
mod rope;
mod row_dot;
mod rows;
mod scalar;
mod scratch;
mod shared;
mod unpack;
mod unpack_blocks;
mod unpack_codebook;
mod vector;

pub use attention::{KvView, QueryRow, attention};
pub use elementwise::{add, glu, mul, scale, softcap, unary};
pub use error::KernelError;
pub use hadamard::hadamard;
pub use isa::Isa;
pub use matmul::{ExpertView, Residual, WeightView, matmul, matmul_id};
pub use norm::{layer_norm, rms_norm};
pub use rope::{rope, rope_table};
pub use rows::{KvViewMut, get_rows, kv_store};
pub use scratch::Scratch;
