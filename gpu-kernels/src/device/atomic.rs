//! Atomics on global and shared memory, by scope. All but [`arrive_global`] are relaxed: they order nothing but
//! themselves; use them for sums and counters whose result is read after the kernel or behind a barrier.
//!
//! Sums of floats by atomics depend on the order of arrival; kernels use them only where a result may.

#[cfg(target_arch = "nvptx64")]
use core::arch::asm;

use super::{Glb, Smem};
#[cfg(not(target_arch = "nvptx64"))]
use crate::emu::lane;

twin! {
    /// Adds to a counter of the device and returns the value before (`atom.global.add.u32`).
    pub fn add_global(array: Glb<u32>, i: u32, value: u32) -> u32 {
        ptx {
            let before: u32;
            // SAFETY: the launch gave an array that holds element `i`.
            unsafe { asm!("atom.global.add.u32 {},[{}],{};", out(reg32) before, in(reg64) array.address(i), in(reg32) value, options(nostack, preserves_flags)) }
            before
        }
        host { lane::atomic_global(array.address(i), |before| before.wrapping_add(value)) }
    }
}

twin! {
    /// The larger of a counter of the device and `value` (`atom.global.max.u32`); returns the value before.
    pub fn max_global(array: Glb<u32>, i: u32, value: u32) -> u32 {
        ptx {
            let before: u32;
            // SAFETY: the launch gave an array that holds element `i`.
            unsafe { asm!("atom.global.max.u32 {},[{}],{};", out(reg32) before, in(reg64) array.address(i), in(reg32) value, options(nostack, preserves_flags)) }
            before
        }
        host { lane::atomic_global(array.address(i), |before| before.max(value)) }
    }
}

twin! {
    /// Stores `value` where the counter equals `expected` and returns the value before (`atom.global.cas.b32`).
    pub fn compare_swap_global(array: Glb<u32>, i: u32, expected: u32, value: u32) -> u32 {
        ptx {
            let before: u32;
            // SAFETY: the launch gave an array that holds element `i`.
            unsafe { asm!("atom.global.cas.b32 {},[{}],{},{};", out(reg32) before, in(reg64) array.address(i), in(reg32) expected, in(reg32) value, options(nostack, preserves_flags)) }
            before
        }
        host { lane::atomic_global(array.address(i), |before| if before == expected { value } else { before }) }
    }
}

twin! {
    /// Arrives at a counter of the device that starts at 0; whether this was the last of `n` arrivals, which leaves the
    /// counter at 0 again. What a thread wrote before it arrived, or saw by a barrier, threads that arrive later see
    /// (`atom.acq_rel.gpu.global.inc.u32`; fences beside a plain one before sm_70).
    pub fn arrive_global(counter: Glb<u32>, i: u32, n: u32) -> bool {
        ptx {
            let before: u32;
            #[cfg(sm_ge_70)]
            // SAFETY: the launch gave an array that holds element `i`. Memory is clobbered, so no access moves across.
            unsafe { asm!("atom.acq_rel.gpu.global.inc.u32 {},[{}],{};", out(reg32) before, in(reg64) counter.address(i), in(reg32) n - 1, options(nostack, preserves_flags)) }
            #[cfg(not(sm_ge_70))]
            // SAFETY: as above.
            unsafe { asm!("membar.gl; atom.global.inc.u32 {},[{}],{}; membar.gl;", out(reg32) before, in(reg64) counter.address(i), in(reg32) n - 1, options(nostack, preserves_flags)) }
            before == n - 1
        }
        host { lane::arrive_global(counter.address(i), |before| if before >= n - 1 { 0 } else { before + 1 }) == n - 1 }
    }
}

twin! {
    /// Adds to a float of the device (`red.global.add.f32`).
    pub fn add_global_f32(array: Glb<f32>, i: u32, value: f32) {
        ptx {
            // SAFETY: the launch gave an array that holds element `i`.
            unsafe { asm!("red.global.add.f32 [{}],{};", in(reg64) array.address(i), in(reg32) value, options(nostack, preserves_flags)) }
        }
        host { lane::atomic_global(array.address(i), |before| (f32::from_bits(before) + value).to_bits()); }
    }
}

twin! {
    /// Adds to a counter of the CTA and returns the value before (`atom.shared.add.u32`).
    pub fn add_shared(array: Smem<u32>, i: u32, value: u32) -> u32 {
        ptx {
            let before: u32;
            // SAFETY: the layout that the launch was sized by holds element `i`.
            unsafe { asm!("atom.shared.add.u32 {},[{}],{};", out(reg32) before, in(reg32) array.address(i), in(reg32) value, options(nostack, preserves_flags)) }
            before
        }
        host { lane::atomic_shared(array.address(i), |before| before.wrapping_add(value)) }
    }
}
