//! What a CUDA thread can do, in two forms: one PTX instruction (or a documented few) on the GPU, a host twin with the
//! same meaning in the emulator.
//!
//! Kernels use this module and nothing below it. Every function is `#[inline(always)]`: code of the device exists only
//! inlined into entries. Names follow cuda_std where it has the thing.
//!
//! Convergence: rustc does not know that `asm!` may be convergent and would copy it into divergent branches. So what
//! must be reached by all lanes together goes through an LLVM intrinsic, or through `asm!` behind
//! `intrinsics::anchor`. Nothing convergent is ever `pure`.

pub mod async_copy;
pub mod atomic;
#[cfg(any(not(target_arch = "nvptx64"), sm_90a))]
pub mod bulk_copy;
#[cfg(target_arch = "nvptx64")]
mod canary;
pub mod gmem;
pub mod grid;
#[cfg(target_arch = "nvptx64")]
pub(crate) mod intrinsics;
pub mod math;
pub mod mma;
#[cfg(target_arch = "nvptx64")]
mod probe;
pub mod smem;
pub mod sync;
pub mod thread;
pub mod warp;
#[cfg(any(not(target_arch = "nvptx64"), sm_90a))]
pub mod wgmma;
pub mod word;

pub use gmem::Glb;
pub use smem::Smem;
pub use word::{F32x2, F32x4, Float, U32x2, U32x4, Word};
