//! A launch played by another: a persistent CTA takes the place of one CTA of a launch after the other, of launch after
//! launch (`kernels/step.rs`), and the kernels that it plays do not know.
//!
//! * [`enter`] says what [`thread`](super::thread) and [`sync_threads`](super::sync::sync_threads) answer from now on:
//!   which CTA of which grid this is, and how many threads it has. They are the first of the CTA's; the others do nothing
//!   until [`leave`].
//! * [`grid::wait_for_earlier`](super::grid::wait_for_earlier) waits for a counter in global memory, which CTAs raise by
//!   [`arrive`] when they have played their share of a launch.
//! * Dynamic shared memory begins after [`RESERVED_BYTES`], where the role stands and what the player itself keeps
//!   ([`reserved`]).
//!
//! On the device all this is only in the module of the step (`entries_of = "step"`): elsewhere the special registers
//! answer, and nothing is paid. The emulator keeps the role with each thread.

#[cfg(all(target_arch = "nvptx64", entries_of = "step"))]
use core::arch::asm;

use super::{Glb, Smem, atomic, sync};
#[cfg(not(target_arch = "nvptx64"))]
use crate::emu::lane;

/// Bytes of dynamic shared memory that a played launch does not see.
pub const RESERVED_BYTES: u32 = 1024;
/// Of those, what the role takes, from the start on.
pub const ROLE_BYTES: u32 = 64;

/// Barrier of a played CTA's threads.
#[cfg(target_arch = "nvptx64")]
pub(super) const BARRIER: u32 = 15;

/// What a CTA plays.
#[derive(Clone, Copy)]
pub struct Role {
    /// The CTA in the grid.
    pub idx: [u32; 3],
    /// CTAs of the grid.
    pub grid: [u32; 3],
    /// Threads of the CTA, a multiple of 32.
    pub threads: u32,
    /// Arrivals of the earlier launches to wait for; 0 where that is done.
    pub arrivals: u32,
    /// Where they are counted.
    pub counter: Glb<u32>,
}

/// Words of the role in shared memory, on the device.
#[cfg(all(target_arch = "nvptx64", entries_of = "step"))]
pub(super) mod word {
    use super::Smem;

    pub const IDX: u32 = 0;
    pub const THREADS: u32 = 3;
    pub const GRID: u32 = 4;
    pub const ARRIVALS: u32 = 7;
    /// Two words.
    pub const COUNTER: u32 = 8;

    /// A word of the role.
    #[inline(always)]
    pub fn get(i: u32) -> u32 {
        Smem::<u32>::reserved(0, 16).ld_still(i)
    }
}

/// Shared memory that played launches do not see: `elems` elements from byte `offset` on, which is at least
/// [`ROLE_BYTES`].
#[inline(always)]
pub fn reserved<T>(offset: u32, elems: u32) -> Smem<T> {
    Smem::reserved(offset, elems)
}

/// Plays a role from now on. The role's threads call together.
#[inline(always)]
#[track_caller]
pub fn enter(role: Role) {
    #[cfg(all(target_arch = "nvptx64", entries_of = "step"))]
    {
        use super::U32x4;
        // Everyone is done with the role before: `arrivals` and the place in the grid.
        if super::thread::thread_idx_x() == 0 {
            let words = Smem::<U32x4>::reserved(0, 4);
            let [x, y, z] = role.idx;
            let [gx, gy, gz] = role.grid;
            let counter = role.counter.address(0);
            words.st(0, U32x4([x, y, z, role.threads]));
            words.st(1, U32x4([gx, gy, gz, role.arrivals]));
            words.st(2, U32x4([counter as u32, (counter >> 32) as u32, 0, 0]));
        }
        // SAFETY: the role's threads come together.
        unsafe { super::intrinsics::barrier_count(BARRIER, role.threads) }
    }
    #[cfg(all(target_arch = "nvptx64", not(entries_of = "step")))]
    let _ = role;
    #[cfg(not(target_arch = "nvptx64"))]
    lane::enter_role(role.idx, role.grid, role.threads, role.arrivals, role.counter.address(0));
}

/// Ends the role of the calling thread.
#[inline(always)]
#[track_caller]
pub fn leave() {
    #[cfg(not(target_arch = "nvptx64"))]
    lane::leave_role();
}

/// Says that the CTA has played its share of a launch: what its threads wrote before is visible to those who wait for the
/// count. All threads of the CTA call, none of them in a role.
#[inline(always)]
#[track_caller]
pub fn arrive(counter: Glb<u32>) {
    sync_all();
    if super::thread::thread_idx_x() == 0 {
        atomic::add_release(counter, 0, 1);
    }
}

/// Waits for every thread of the CTA, whatever is played.
#[inline(always)]
#[track_caller]
pub fn sync_all() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: convergence is the kernel's contract; the emulator checks it.
    unsafe {
        super::intrinsics::barrier_all(0)
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sync::sync_threads();
}

/// Waits for the role's counter; the role's threads call together.
#[cfg(all(target_arch = "nvptx64", entries_of = "step"))]
#[inline(always)]
pub(super) fn wait() {
    let arrivals = word::get(word::ARRIVALS);
    if arrivals == 0 {
        return;
    }
    if super::thread::thread_idx_x() == 0 {
        let counter = u64::from(word::get(word::COUNTER)) | u64::from(word::get(word::COUNTER + 1)) << 32;
        loop {
            let now: u32;
            // SAFETY: the role's counter.
            unsafe {
                asm!("ld.acquire.gpu.global.u32 {},[{}];", out(reg32) now, in(reg64) counter, options(nostack, preserves_flags))
            }
            if now >= arrivals {
                break;
            }
        }
    }
    sync::sync_threads();
}
