//! LLVM's NVVM intrinsics, and the anchor for convergent assembly.

/// Four results of an intrinsic.
#[repr(C)]
pub(crate) struct Quad<T>(pub T, pub T, pub T, pub T);

/// Two results of an intrinsic.
#[cfg(all(sm_ge_75, not(sm_ge_80)))]
#[repr(C)]
pub(crate) struct Pair<T>(pub T, pub T);

#[allow(improper_ctypes)] // "unadjusted" is LLVM's own ABI: the structs are its multiple results
unsafe extern "unadjusted" {
    #[link_name = "llvm.nvvm.barrier.cta.sync.aligned.all"]
    pub(crate) fn barrier_all(id: u32);
    #[link_name = "llvm.nvvm.barrier.cta.sync.aligned.count"]
    pub(crate) fn barrier_count(id: u32, threads: u32);
    #[link_name = "llvm.nvvm.barrier.cta.arrive.aligned.count"]
    pub(crate) fn barrier_arrive(id: u32, threads: u32);
    #[link_name = "llvm.nvvm.barrier.cluster.arrive"]
    #[cfg(sm_90a)]
    pub(crate) fn cluster_arrive();
    #[link_name = "llvm.nvvm.barrier.cluster.wait"]
    #[cfg(sm_90a)]
    pub(crate) fn cluster_wait();
    #[link_name = "llvm.nvvm.bar.warp.sync"]
    pub(crate) fn warp_sync(mask: u32);
    #[link_name = "llvm.nvvm.shfl.sync.bfly.i32"]
    pub(crate) fn shfl_bfly(mask: u32, value: u32, lanes: u32, clamp: u32) -> u32;
    #[link_name = "llvm.nvvm.shfl.sync.idx.i32"]
    pub(crate) fn shfl_idx(mask: u32, value: u32, lane: u32, clamp: u32) -> u32;
    #[link_name = "llvm.nvvm.shfl.sync.up.i32"]
    pub(crate) fn shfl_up(mask: u32, value: u32, delta: u32, clamp: u32) -> u32;
    #[link_name = "llvm.nvvm.shfl.sync.down.i32"]
    pub(crate) fn shfl_down(mask: u32, value: u32, delta: u32, clamp: u32) -> u32;
    #[link_name = "llvm.nvvm.vote.ballot.sync"]
    pub(crate) fn ballot(mask: u32, predicate: bool) -> u32;
    #[cfg(sm_ge_75)]
    #[link_name = "llvm.nvvm.match.any.sync.i32"]
    pub(crate) fn match_any(mask: u32, value: u32) -> u32;
    #[cfg(sm_ge_80)]
    #[link_name = "llvm.nvvm.redux.sync.add"]
    pub(crate) fn redux_add(value: u32, mask: u32) -> u32;
    #[cfg(sm_ge_80)]
    #[link_name = "llvm.nvvm.redux.sync.umax"]
    pub(crate) fn redux_max(value: u32, mask: u32) -> u32;
    #[cfg(sm_90a)]
    #[link_name = "llvm.nvvm.wgmma.fence.sync.aligned"]
    pub(crate) fn wgmma_fence();
    #[cfg(sm_90a)]
    #[link_name = "llvm.nvvm.wgmma.commit_group.sync.aligned"]
    pub(crate) fn wgmma_commit();
    #[cfg(sm_90a)]
    #[link_name = "llvm.nvvm.setmaxnreg.inc.sync.aligned.u32"]
    pub(crate) fn set_max_registers_up(n: u32);
    #[cfg(sm_90a)]
    #[link_name = "llvm.nvvm.setmaxnreg.dec.sync.aligned.u32"]
    pub(crate) fn set_max_registers_down(n: u32);
    #[link_name = "llvm.nvvm.activemask"]
    fn active_mask() -> u32;
    #[cfg(sm_ge_61)]
    #[link_name = "llvm.nvvm.idp4a.s.s"]
    pub(crate) fn dp4a_ss(a: u32, b: u32, c: i32) -> i32;
    #[cfg(sm_ge_61)]
    #[link_name = "llvm.nvvm.idp4a.u.s"]
    pub(crate) fn dp4a_us(a: u32, b: u32, c: i32) -> i32;
    #[link_name = "llvm.nvvm.ex2.approx.ftz.f"]
    pub(crate) fn ex2(x: f32) -> f32;
    #[link_name = "llvm.nvvm.rcp.approx.ftz.f"]
    pub(crate) fn rcp(x: f32) -> f32;
    #[link_name = "llvm.nvvm.rsqrt.approx.ftz.f"]
    pub(crate) fn rsqrt(x: f32) -> f32;
    #[link_name = "llvm.nvvm.mul.rn.f"]
    pub(crate) fn mul(a: f32, b: f32) -> f32;
    #[link_name = "llvm.nvvm.fmax.f"]
    pub(crate) fn fmax(a: f32, b: f32) -> f32;
    #[link_name = "llvm.nvvm.fmin.f"]
    pub(crate) fn fmin(a: f32, b: f32) -> f32;
    #[link_name = "llvm.nvvm.prmt"]
    pub(crate) fn prmt(a: u32, b: u32, selector: u32) -> u32;
    #[cfg(sm_ge_80)]
    #[link_name = "llvm.nvvm.mma.m16n8k32.row.col.s8"]
    pub(crate) fn mma_m16n8k32_s8(
        a0: u32,
        a1: u32,
        a2: u32,
        a3: u32,
        b0: u32,
        b1: u32,
        c0: i32,
        c1: i32,
        c2: i32,
        c3: i32,
    ) -> Quad<i32>;
    #[cfg(sm_ge_80)]
    #[link_name = "llvm.nvvm.mma.m16n8k16.row.col.s8"]
    pub(crate) fn mma_m16n8k16_s8(a0: u32, a1: u32, b0: u32, c0: i32, c1: i32, c2: i32, c3: i32)
    -> Quad<i32>;
    #[cfg(all(sm_ge_75, not(sm_ge_80)))]
    #[link_name = "llvm.nvvm.mma.m8n8k16.row.col.s8"]
    pub(crate) fn mma_m8n8k16_s8(a0: u32, b0: u32, c0: i32, c1: i32) -> Pair<i32>;
    #[cfg(sm_ge_80)]
    #[link_name = "llvm.nvvm.mma.m16n8k16.row.col.bf16"]
    pub(crate) fn mma_m16n8k16_bf16(
        a0: u32,
        a1: u32,
        a2: u32,
        a3: u32,
        b0: u32,
        b1: u32,
        c0: f32,
        c1: f32,
        c2: f32,
        c3: f32,
    ) -> Quad<f32>;
}

/// Makes the block of the convergent `asm!` that follows convergent for LLVM. ptxas deletes the unused vote.
#[inline(always)]
pub(crate) fn anchor() {
    // SAFETY: reads the set of active lanes, no memory.
    let _ = unsafe { active_mask() };
}
