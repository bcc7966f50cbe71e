//! Copies from global to shared memory that run beside the thread (sm_80). Before, the same calls copy at once through
//! registers, so kernels need no second form.
//!
//! The bytes are there for the thread that copied after [`wait`], for others after a barrier behind that.

#[cfg(all(target_arch = "nvptx64", sm_ge_80))]
use core::arch::asm;

use super::{Glb, Smem, U32x4, Word};
#[cfg(not(target_arch = "nvptx64"))]
use crate::emu::lane;

/// Starts copying 16 bytes: element `j` of `source` to element `i` of `target`. Cached in L2 only
/// (`cp.async.cg.shared.global.L2::128B`).
#[inline(always)]
#[track_caller]
pub fn copy16(target: Smem<U32x4>, i: u32, source: Glb<U32x4>, j: u32) {
    #[cfg(all(target_arch = "nvptx64", sm_ge_80))]
    // SAFETY: the launch gave arrays that hold both elements; 16-byte alignment is the type's.
    unsafe {
        asm!("cp.async.cg.shared.global.L2::128B [{}],[{}],16;", in(reg32) target.address(i), in(reg64) source.address(j), options(nostack, preserves_flags))
    }
    #[cfg(all(target_arch = "nvptx64", not(sm_ge_80)))]
    target.st(i, source.ld_nc(j));
    #[cfg(not(target_arch = "nvptx64"))]
    lane::async_copy(target.address(i), source.address(j), 16, 16);
}

/// [`copy16`] where `there` holds, else zeros by the same way: nothing is read then. Without a branch, so that copies mix
/// with other work.
#[inline(always)]
#[track_caller]
pub fn copy16_or_zero(target: Smem<U32x4>, i: u32, source: Glb<U32x4>, j: u32, there: bool) {
    #[cfg(any(not(target_arch = "nvptx64"), sm_ge_80))]
    copy16_first(target, i, source, j, if there { 16 } else { 0 });
    #[cfg(all(target_arch = "nvptx64", not(sm_ge_80)))]
    target.st(i, if there { source.ld_nc(j) } else { U32x4([0; 4]) });
}

/// [`copy16`] of the first `n_bytes` bytes alone, zeros after them; nothing else is read (`cp.async` with a source size).
/// From sm_80 on.
#[cfg(any(not(target_arch = "nvptx64"), sm_ge_80))]
#[inline(always)]
#[track_caller]
pub fn copy16_first(target: Smem<U32x4>, i: u32, source: Glb<U32x4>, j: u32, n_bytes: u32) {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: the launch gave arrays that hold both elements, of the source's as many bytes as are read.
    unsafe {
        asm!("cp.async.cg.shared.global.L2::128B [{}],[{}],16,{};", in(reg32) target.address(i), in(reg64) source.address(j), in(reg32) n_bytes, options(nostack, preserves_flags))
    }
    #[cfg(not(target_arch = "nvptx64"))]
    lane::async_copy(target.address(i), source.address(j), n_bytes, 16);
}

/// [`copy16_or_zero`] of an element of 4 or 8 bytes, through L1, too (`cp.async.ca.shared.global`).
#[inline(always)]
#[track_caller]
pub fn copy_or_zero<T: Word>(target: Smem<T>, i: u32, source: Glb<T>, j: u32, there: bool) {
    const { assert!(size_of::<T>() == 4 || size_of::<T>() == 8) };
    #[cfg(all(target_arch = "nvptx64", sm_ge_80))]
    // SAFETY: the launch gave arrays that hold both elements, the source's only if it is there.
    unsafe {
        let bytes = if there { size_of::<T>() as u32 } else { 0 };
        asm!("cp.async.ca.shared.global [{}],[{}],{},{};", in(reg32) target.address(i), in(reg64) source.address(j), const size_of::<T>(), in(reg32) bytes, options(nostack, preserves_flags))
    }
    #[cfg(all(target_arch = "nvptx64", not(sm_ge_80)))]
    target.st(i, if there { source.ld_nc(j) } else { T::zeroed() });
    #[cfg(not(target_arch = "nvptx64"))]
    {
        let size = size_of::<T>() as u32;
        lane::async_copy(target.address(i), source.address(j), if there { size } else { 0 }, size);
    }
}

/// Ends a group of copies (`cp.async.commit_group`).
#[inline(always)]
pub fn commit() {
    #[cfg(all(target_arch = "nvptx64", sm_ge_80))]
    // SAFETY: bookkeeping of this thread's copies.
    unsafe {
        asm!("cp.async.commit_group;", options(nostack, preserves_flags))
    }
    #[cfg(not(target_arch = "nvptx64"))]
    lane::async_commit();
}

/// Waits until at most `PENDING` of this thread's latest groups are under way (`cp.async.wait_group`).
#[inline(always)]
pub fn wait<const PENDING: u32>() {
    #[cfg(all(target_arch = "nvptx64", sm_ge_80))]
    // SAFETY: waits for this thread's copies.
    unsafe {
        asm!("cp.async.wait_group {};", const PENDING, options(nostack, preserves_flags))
    }
    #[cfg(not(target_arch = "nvptx64"))]
    lane::async_wait(PENDING as usize);
}
