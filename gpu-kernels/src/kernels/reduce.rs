//! Reductions over a CTA of up to 32 warps, in an order fixed by the thread count alone.

use crate::device::sync::sync_threads;
use crate::device::thread::{WARP, block_dim_x, lane_id, warp_id};
use crate::device::{Smem, warp};

/// Shared words that a reduction needs: one per warp.
pub(crate) const SCRATCH: usize = 32;

/// Sum over all threads, in every thread. `scratch` may be used again after the next barrier.
#[inline(always)]
#[track_caller]
pub(crate) fn cta_sum(value: f32, scratch: Smem<f32>) -> f32 {
    cta(value, 0.0, scratch, warp::sum_f32)
}

/// Largest of all threads, in every thread.
#[inline(always)]
#[track_caller]
pub(crate) fn cta_max(value: f32, scratch: Smem<f32>) -> f32 {
    cta(value, f32::NEG_INFINITY, scratch, warp::max_f32)
}

#[inline(always)]
#[track_caller]
fn cta(value: f32, neutral: f32, scratch: Smem<f32>, reduce: impl Fn(f32) -> f32) -> f32 {
    let of_warp = reduce(value);
    if lane_id() == 0 {
        scratch.st(warp_id(), of_warp);
    }
    sync_threads();
    // Every warp reduces the warps' results alike: cheaper than a second barrier to spread them.
    let of_lane = if lane_id() < block_dim_x() / WARP { scratch.ld(lane_id()) } else { neutral };
    reduce(of_lane)
}
