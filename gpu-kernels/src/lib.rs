//! CUDA kernels in Rust: the device layer they are written in, the kernels with their launchers, an emulator that runs
//! them on the CPU, and the PTX made from them.
//!
//! This source is compiled twice. For nvptx64 by the PTX build (`ptx-build/`), which takes `device` and the entries of
//! `kernels`. For the host by cargo, which takes contracts, launchers and cases; with the feature `emu` the kernels too,
//! on the device layer's host twins. The crate knows no GPU driver: [`driver::Driver`] is what it asks of one.
#![no_std]
#![cfg_attr(
    target_arch = "nvptx64",
    feature(abi_ptx, abi_unadjusted, asm_experimental_arch, core_intrinsics, f16, link_llvm_intrinsics, stdarch_nvptx),
    allow(internal_features) // NVVM's intrinsics have no other way in
)]

#[cfg(not(target_arch = "nvptx64"))]
extern crate alloc;
#[cfg(feature = "emu")]
extern crate std;

#[macro_use]
mod macros;

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
pub mod device;
pub mod kernels;
pub mod tile;

#[cfg(not(target_arch = "nvptx64"))]
pub mod case;
#[cfg(not(target_arch = "nvptx64"))]
pub mod driver;
#[cfg(feature = "emu")]
pub mod emu;
#[cfg(not(target_arch = "nvptx64"))]
pub mod launch;
#[cfg(not(target_arch = "nvptx64"))]
pub mod modules;
#[cfg(not(target_arch = "nvptx64"))]
pub mod ptx;
#[cfg(not(target_arch = "nvptx64"))]
pub mod registry;
#[cfg(not(target_arch = "nvptx64"))]
pub mod slots;
