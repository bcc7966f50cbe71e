//! The launches of a stream beside each other (sm_90: programmatic dependent launch): a kernel may start while the one
//! before it still runs, and waits here before it touches what that one may touch.
//!
//! * Every entry lets later launches start as its first act, and waits before it reads what a launch of the step may
//!   write, and before it writes anything: what it writes, an earlier launch may still read. `kernels!` does both at the
//!   start, unless the table says `early`; then the kernel itself calls [`wait_for_earlier`], every thread of it.
//! * Before that it may load by [`Glb::ld_early`](super::Glb::ld_early) and
//!   [`ld_stream`](super::Glb::ld_stream) only, and prefetch: weights, and a step's inputs, which no launch writes.
//! * A launch ends after the one before it, because all its threads have waited. So whoever waits has all earlier
//!   launches behind it, not only the last. A kernel that does not wait would break that chain: the PTX build refuses it
//!   (`ptx-build/src/module.rs`), and the emulator reports a thread that ends without, or touches memory too early.
//!
//! A launch that was not asked to start early (see `Driver::launch_early`) finds the wait already over.

#[cfg(all(target_arch = "nvptx64", sm_ge_90))]
use core::arch::asm;

#[cfg(not(target_arch = "nvptx64"))]
use crate::emu::lane;

twin! {
    /// Waits until all earlier launches have ended and what they wrote is visible (`griddepcontrol.wait`).
    pub fn wait_for_earlier() {
        ptx {
            #[cfg(sm_ge_90)]
            // SAFETY: no condition. Memory is clobbered, so no access moves up across it.
            unsafe {
                asm!("griddepcontrol.wait;", options(nostack, preserves_flags))
            }
        }
        host { lane::wait_for_earlier() }
    }
}

twin! {
    /// Lets the next launch start once all CTAs of this one have said so or ended
    /// (`griddepcontrol.launch_dependents`).
    pub fn let_later_start() {
        ptx {
            #[cfg(sm_ge_90)]
            // SAFETY: no condition.
            unsafe {
                asm!("griddepcontrol.launch_dependents;", options(nostack, preserves_flags))
            }
        }
        host {}
    }
}
