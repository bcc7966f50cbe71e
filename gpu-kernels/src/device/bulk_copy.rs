//! Copies of contiguous pieces from global to shared memory by the copy engine (sm_90a): one thread asks, no thread
//! computes addresses, and an mbarrier counts the bytes.
//!
//! Whoever reads the bytes waits for the phase of the mbarrier; one arrival of the phase told of them
//! ([`Mbarrier::arrive_expect`]). What threads wrote where a copy goes needs
//! [`fence_async_proxy`](super::sync::fence_async_proxy) first; what they read only a barrier.

use super::sync::Mbarrier;
use super::{Glb, Smem, U32x4};
#[cfg(not(target_arch = "nvptx64"))]
use crate::emu::lane;

/// Starts copying `n` elements: from `j` on in `source` to `i` on in `target`. `n` is not 0
/// (`cp.async.bulk.shared.global.mbarrier`).
#[inline(always)]
#[track_caller]
pub fn copy(target: Smem<U32x4>, i: u32, source: Glb<U32x4>, j: u32, n: u32, barrier: Mbarrier) {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: the launch gave arrays that hold the elements; 16-byte alignment is the type's.
    unsafe {
        core::arch::asm!(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{}], [{}], {}, [{}];",
            in(reg32) target.address(i), in(reg64) source.address(j), in(reg32) 16 * n, in(reg32) barrier.address(),
            options(nostack, preserves_flags)
        )
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        if n != 0 {
            // The last element is in the array too.
            target.address(i + n - 1);
        }
        lane::bulk_copy(target.address(i), source.address(j), 16 * n, barrier.address());
    }
}

/// [`copy`] to the same place in each of the cluster's `CTAS` CTAs, where it reports to the same mbarrier: each of them
/// expects it (`cp.async.bulk…multicast::cluster`).
#[inline(always)]
#[track_caller]
pub fn copy_to_all<const CTAS: u32>(
    target: Smem<U32x4>,
    i: u32,
    source: Glb<U32x4>,
    j: u32,
    n: u32,
    barrier: Mbarrier,
) {
    if const { CTAS == 1 } {
        return copy(target, i, source, j, n, barrier);
    }
    #[cfg(target_arch = "nvptx64")]
    let mask = const { (1u16 << CTAS) - 1 };
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: as for `copy`; all CTAs of the cluster have one layout.
    unsafe {
        core::arch::asm!(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [{}], [{}], {}, [{}], {};",
            in(reg32) target.address(i), in(reg64) source.address(j), in(reg32) 16 * n, in(reg32) barrier.address(),
            in(reg16) mask,
            options(nostack, preserves_flags)
        )
    }
    #[cfg(not(target_arch = "nvptx64"))]
    for rank in 0..CTAS {
        target.address(i + n - 1);
        let at = |address: u32| lane::smem_address_at(address, rank);
        lane::bulk_copy(at(target.address(i)), source.address(j), 16 * n, at(barrier.address()));
    }
}
