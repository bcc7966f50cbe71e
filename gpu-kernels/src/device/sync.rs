//! Barriers of a CTA: the plain one, named ones, and mbarriers in shared memory.

#[cfg(target_arch = "nvptx64")]
use super::intrinsics;
#[cfg(any(not(target_arch = "nvptx64"), sm_ge_80))]
use crate::device::smem::Smem;
#[cfg(not(target_arch = "nvptx64"))]
use crate::emu::lane;
#[cfg(all(target_arch = "nvptx64", sm_ge_80))]
use core::arch::asm;

twin! {
    /// Waits for every thread of the CTA; what they wrote before is visible after (`barrier.sync 0`).
    pub fn sync_threads() {
        ptx {
            // SAFETY: convergence is the kernel's contract; the emulator checks it.
            unsafe { intrinsics::barrier_all(0) }
        }
        host { lane::barrier(0, None) }
    }
}

twin! {
    /// Named barrier `ID` (1..16) of `threads` threads, a multiple of 32 (`barrier.sync ID, threads`).
    pub fn barrier<const ID: u32>(threads: u32) {
        ptx {
            // SAFETY: as for `sync_threads`.
            unsafe { intrinsics::barrier_count(ID, threads) }
        }
        host { lane::barrier(ID, Some(threads)) }
    }
}

twin! {
    /// Named barrier `id` (1..16) of `threads` threads, where the id is known at run time only.
    pub fn barrier_of(id: u32, threads: u32) {
        ptx {
            // SAFETY: as for `sync_threads`.
            unsafe { intrinsics::barrier_count(id, threads) }
        }
        host { lane::barrier(id, Some(threads)) }
    }
}

twin! {
    /// Arrives at named barrier `ID` and goes on (`barrier.arrive ID, threads`): the producer's half.
    pub fn barrier_arrive<const ID: u32>(threads: u32) {
        ptx {
            // SAFETY: as for `sync_threads`.
            unsafe { intrinsics::barrier_arrive(ID, threads) }
        }
        host { lane::barrier_arrive(ID, threads) }
    }
}

twin! {
    /// [`barrier_arrive`] where the id is known at run time only.
    pub fn barrier_arrive_of(id: u32, threads: u32) {
        ptx {
            // SAFETY: as for `sync_threads`.
            unsafe { intrinsics::barrier_arrive(id, threads) }
        }
        host { lane::barrier_arrive(id, threads) }
    }
}

/// Waits for every thread of the cluster, which may be in different branches; what they wrote before is visible after
/// (`barrier.cluster`, sm_90a).
#[cfg(any(not(target_arch = "nvptx64"), sm_90a))]
#[inline(always)]
#[track_caller]
pub fn sync_cluster() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: convergence is not needed.
    unsafe {
        intrinsics::cluster_arrive();
        intrinsics::cluster_wait();
    }
    #[cfg(not(target_arch = "nvptx64"))]
    lane::cluster_barrier();
}

/// What this thread wrote to shared memory is seen by the tensor cores (`wgmma`) and the copy engine: called by each
/// writer, before the barrier that tells of it (`fence.proxy.async`, sm_90a).
#[cfg(any(not(target_arch = "nvptx64"), sm_90a))]
#[inline(always)]
pub fn fence_async_proxy() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: orders this thread's accesses.
    unsafe {
        asm!("fence.proxy.async.shared::cta;", options(nostack, preserves_flags))
    }
    #[cfg(not(target_arch = "nvptx64"))]
    lane::fence_async_proxy();
}

/// Waits until the kernels before this one in the stream have ended or let it start and what they wrote is visible; in a
/// launch that does not overlap them nothing is left to wait for (`griddepcontrol.wait`, sm_90a).
#[cfg(any(not(target_arch = "nvptx64"), sm_90a))]
#[inline(always)]
pub fn wait_for_previous_kernel() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: waits.
    unsafe {
        asm!("griddepcontrol.wait;", options(nostack, preserves_flags))
    }
}

/// Lets a launch that may overlap this one start, once every CTA has called this or ended
/// (`griddepcontrol.launch_dependents`, sm_90a). The emulator runs launches one after the other.
#[cfg(any(not(target_arch = "nvptx64"), sm_90a))]
#[inline(always)]
pub fn launch_next_kernel() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: a hint to the scheduler.
    unsafe {
        asm!("griddepcontrol.launch_dependents;", options(nostack, preserves_flags))
    }
}

/// A barrier object in shared memory (sm_80): phases alternate in parity, a phase ends when `count` threads arrived.
#[cfg(any(not(target_arch = "nvptx64"), sm_ge_80))]
#[derive(Clone, Copy)]
pub struct Mbarrier {
    address: u32,
}

#[cfg(any(not(target_arch = "nvptx64"), sm_ge_80))]
impl Mbarrier {
    /// The barrier in element `i`. One thread must [`Mbarrier::init`] it, followed by a CTA barrier.
    #[inline(always)]
    #[track_caller]
    pub fn at(words: Smem<u64>, i: u32) -> Mbarrier {
        Mbarrier { address: words.address(i) }
    }

    /// Shared address of the object.
    #[inline(always)]
    pub fn address(self) -> u32 {
        self.address
    }

    /// Starts phase 0, which `count` arrivals end.
    #[inline(always)]
    #[track_caller]
    pub fn init(self, count: u32) {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: the object lies in the CTA's layout.
        unsafe {
            asm!("mbarrier.init.shared.b64 [{}],{};", in(reg32) self.address, in(reg32) count, options(nostack, preserves_flags));
            // The copy engine must see it too.
            #[cfg(sm_90a)]
            asm!("fence.mbarrier_init.release.cluster;", options(nostack, preserves_flags));
        }
        #[cfg(not(target_arch = "nvptx64"))]
        lane::mbarrier_init(self.address, count)
    }

    /// Counts one arrival of the current phase; what the thread wrote before is visible to those who wait for it.
    #[inline(always)]
    #[track_caller]
    pub fn arrive(self) {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: the object lies in the CTA's layout.
        unsafe {
            asm!("{{ .reg .b64 s; mbarrier.arrive.shared.b64 s,[{}]; }}", in(reg32) self.address, options(nostack, preserves_flags))
        }
        #[cfg(not(target_arch = "nvptx64"))]
        lane::mbarrier_arrive(self.address)
    }

    /// An arrival at the barrier that is in this one's place in CTA `rank` of the cluster. It tells that this thread has read
    /// what it wanted, not what it wrote: for another CTA that would take a fence of the whole GPU.
    #[cfg(any(not(target_arch = "nvptx64"), sm_90a))]
    #[inline(always)]
    #[track_caller]
    pub fn arrive_at(self, rank: u32) {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: the object lies in the CTA's layout, and so in that of every CTA of the cluster.
        unsafe {
            asm!("{{ .reg .b32 a; mapa.shared::cluster.u32 a,{},{}; mbarrier.arrive.shared::cluster.b64 _,[a]; }}",
                in(reg32) self.address, in(reg32) rank, options(nostack, preserves_flags))
        }
        #[cfg(not(target_arch = "nvptx64"))]
        lane::mbarrier_arrive(lane::smem_address_at(self.address, rank))
    }

    /// [`Mbarrier::arrive`], and the phase does not end before bulk copies have brought `bytes` more.
    #[cfg(any(not(target_arch = "nvptx64"), sm_90a))]
    #[inline(always)]
    #[track_caller]
    pub fn arrive_expect(self, bytes: u32) {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: the object lies in the CTA's layout.
        unsafe {
            asm!("{{ .reg .b64 s; mbarrier.arrive.expect_tx.shared.b64 s,[{}],{}; }}", in(reg32) self.address, in(reg32) bytes, options(nostack, preserves_flags))
        }
        #[cfg(not(target_arch = "nvptx64"))]
        lane::mbarrier_arrive_expect(self.address, bytes)
    }

    /// Waits until the phase of this parity (0 for the first) has ended. The thread sleeps where it can (sm_90a).
    #[inline(always)]
    #[track_caller]
    pub fn wait(self, parity: u32) {
        #[cfg(target_arch = "nvptx64")]
        loop {
            let done: u32;
            // SAFETY: the object lies in the CTA's layout.
            #[cfg(sm_90a)]
            unsafe {
                asm!("{{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p,[{}],{}; selp.u32 {},1,0,p; }}",
                    in(reg32) self.address, in(reg32) parity, out(reg32) done, options(nostack, preserves_flags))
            }
            // SAFETY: as above.
            #[cfg(not(sm_90a))]
            unsafe {
                asm!("{{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p,[{}],{}; selp.u32 {},1,0,p; }}",
                    in(reg32) self.address, in(reg32) parity, out(reg32) done, options(nostack, preserves_flags))
            }
            if done != 0 {
                break;
            }
        }
        #[cfg(not(target_arch = "nvptx64"))]
        lane::mbarrier_wait(self.address, parity)
    }
}
