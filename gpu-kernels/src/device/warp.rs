//! Warp collectives: all 32 lanes of the warp must call together.
//!
//! A shuffle orders no memory: after a store to shared memory, other lanes need [`sync_warp`] before they load.

#[cfg(target_arch = "nvptx64")]
use super::intrinsics;
use super::math::{fabs, fmax};
#[cfg(not(target_arch = "nvptx64"))]
use crate::emu::lane;
#[cfg(not(target_arch = "nvptx64"))]
use crate::emu::lane::Collective;

/// All lanes.
#[cfg(target_arch = "nvptx64")]
const ALL: u32 = !0;
/// A shuffle within the whole warp.
#[cfg(target_arch = "nvptx64")]
const WHOLE: u32 = 31;

twin! {
    /// Waits for all lanes; what they wrote before is visible after (`bar.warp.sync`).
    pub fn sync_warp() {
        ptx {
            // SAFETY: convergence is the kernel's contract; the emulator checks it.
            unsafe { intrinsics::warp_sync(ALL) }
        }
        host { lane::collective(Collective::SyncWarp, &[]); }
    }
}

twin! {
    /// `value` of lane `lane_id ^ lanes` (`shfl.sync.bfly`).
    pub fn shfl_xor(value: u32, lanes: u32) -> u32 {
        ptx {
            // SAFETY: as for `sync_warp`.
            unsafe { intrinsics::shfl_bfly(ALL, value, lanes, WHOLE) }
        }
        host { lane::collective(Collective::Shuffle, &[value, super::thread::lane_id() ^ lanes])[0] }
    }
}

twin! {
    /// `value` of lane `from % 32` (`shfl.sync.idx`).
    pub fn shfl(value: u32, from: u32) -> u32 {
        ptx {
            // SAFETY: as for `sync_warp`.
            unsafe { intrinsics::shfl_idx(ALL, value, from, WHOLE) }
        }
        host { lane::collective(Collective::Shuffle, &[value, from % 32])[0] }
    }
}

twin! {
    /// `value` of lane `lane_id - delta`; the first `delta` lanes keep their own (`shfl.sync.up`).
    pub fn shfl_up(value: u32, delta: u32) -> u32 {
        ptx {
            // SAFETY: as for `sync_warp`. The clamp of an upward shuffle is the lowest lane.
            unsafe { intrinsics::shfl_up(ALL, value, delta, 0) }
        }
        host {
            let lane = super::thread::lane_id();
            lane::collective(Collective::Shuffle, &[value, lane.checked_sub(delta).unwrap_or(lane)])[0]
        }
    }
}

twin! {
    /// `value` of lane `lane_id + delta`; the last `delta` lanes keep their own (`shfl.sync.down`).
    pub fn shfl_down(value: u32, delta: u32) -> u32 {
        ptx {
            // SAFETY: as for `sync_warp`.
            unsafe { intrinsics::shfl_down(ALL, value, delta, WHOLE) }
        }
        host {
            let lane = super::thread::lane_id();
            lane::collective(Collective::Shuffle, &[value, if lane + delta < 32 { lane + delta } else { lane }])[0]
        }
    }
}

twin! {
    /// A bit per lane: whether its `predicate` holds (`vote.sync.ballot`).
    pub fn ballot(predicate: bool) -> u32 {
        ptx {
            // SAFETY: as for `sync_warp`.
            unsafe { intrinsics::ballot(ALL, predicate) }
        }
        host { lane::collective(Collective::Ballot, &[predicate as u32])[0] }
    }
}

/// The lanes whose `value` equals this lane's (`match.any.sync`).
#[cfg(any(not(target_arch = "nvptx64"), sm_ge_75))]
#[inline(always)]
#[track_caller]
pub fn match_any(value: u32) -> u32 {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: as for `sync_warp`.
    unsafe {
        intrinsics::match_any(ALL, value)
    }
    #[cfg(not(target_arch = "nvptx64"))]
    lane::collective(Collective::MatchAny, &[value])[0]
}

/// Sum of all lanes' integers, in every lane: one instruction from sm_80 on, a butterfly of five before.
#[inline(always)]
#[track_caller]
pub fn sum_i32(value: i32) -> i32 {
    #[cfg(all(target_arch = "nvptx64", sm_ge_80))]
    // SAFETY: as for `sync_warp`.
    return unsafe { intrinsics::redux_add(value as u32, ALL) } as i32;
    #[cfg(not(all(target_arch = "nvptx64", sm_ge_80)))]
    butterfly(value, |v, lanes| v.wrapping_add(shfl_xor(v as u32, lanes) as i32))
}

/// Sum of all lanes' floats, in every lane, bit-equal in all: a butterfly, so the order is fixed.
#[inline(always)]
#[track_caller]
pub fn sum_f32(value: f32) -> f32 {
    butterfly(value, |v, lanes| v + f32::from_bits(shfl_xor(v.to_bits(), lanes)))
}

/// Largest of all lanes' floats, in every lane; NaN is ignored where another lane has a number.
#[inline(always)]
#[track_caller]
pub fn max_f32(value: f32) -> f32 {
    butterfly(value, |v, lanes| fmax(v, f32::from_bits(shfl_xor(v.to_bits(), lanes))))
}

/// Largest magnitude of all lanes' floats, in every lane; NaN counts as 0. One instruction from sm_80 on: numbers that
/// are not negative are ordered as their bits.
#[inline(always)]
#[track_caller]
pub fn max_abs_f32(value: f32) -> f32 {
    let magnitude = fmax(fabs(value), 0.0);
    #[cfg(all(target_arch = "nvptx64", sm_ge_80))]
    // SAFETY: as for `sync_warp`.
    return f32::from_bits(unsafe { intrinsics::redux_max(magnitude.to_bits(), ALL) });
    #[cfg(not(all(target_arch = "nvptx64", sm_ge_80)))]
    max_f32(magnitude)
}

/// Smallest of all lanes' values, in every lane.
#[inline(always)]
#[track_caller]
pub fn min_u32(value: u32) -> u32 {
    butterfly(value, |v, lanes| {
        let other = shfl_xor(v, lanes);
        if other < v { other } else { v }
    })
}

/// Five exchanges, from far lanes to near ones.
#[inline(always)]
#[track_caller]
fn butterfly<T: Copy>(value: T, step: impl Fn(T, u32) -> T) -> T {
    let value = step(value, 16);
    let value = step(value, 8);
    let value = step(value, 4);
    let value = step(value, 2);
    step(value, 1)
}

/// The whole warpgroup takes registers up to `N` per thread, waiting until others have given theirs back; `N` is a multiple
/// of 8 (`setmaxnreg.inc`, sm_90a). Needs launch bounds that name the CTAs per SM.
#[cfg(any(not(target_arch = "nvptx64"), sm_90a))]
#[inline(always)]
#[track_caller]
pub fn take_registers<const N: u32>() {
    const { assert!(N.is_multiple_of(8) && N >= 24 && N <= 256) };
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: a kernel's warpgroups take no more than others give.
    unsafe {
        intrinsics::set_max_registers_up(N)
    }
    #[cfg(not(target_arch = "nvptx64"))]
    lane::collective(Collective::SetMaxRegisters, &[N]);
}

/// The whole warpgroup gives registers back and keeps `N` per thread (`setmaxnreg.dec`, sm_90a).
#[cfg(any(not(target_arch = "nvptx64"), sm_90a))]
#[inline(always)]
#[track_caller]
pub fn give_registers<const N: u32>() {
    const { assert!(N.is_multiple_of(8) && N >= 24 && N <= 256) };
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: the compiler keeps the warpgroup's code below N.
    unsafe {
        intrinsics::set_max_registers_down(N)
    }
    #[cfg(not(target_arch = "nvptx64"))]
    lane::collective(Collective::SetMaxRegisters, &[N]);
}
