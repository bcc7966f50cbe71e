//! The order of logits: floats as integers, so that comparisons are total and ties fall to the lower index.

use crate::device::sync::sync_threads;
use crate::device::thread::{WARP, block_dim_x, lane_id, warp_id};
use crate::device::{Smem, U32x2, warp};

/// A number whose order is that of the float: NaN is 0, below all; both zeros are equal.
#[inline(always)]
pub(crate) fn key(x: f32) -> u32 {
    // Adding zero turns −0 into +0.
    let bits = (x + 0.0).to_bits();
    let ordered = if bits >> 31 == 0 { bits | 0x8000_0000 } else { !bits };
    if x.is_nan() { 0 } else { ordered }
}

/// The float of a key; NaN for 0.
#[inline(always)]
pub(crate) fn value_of_key(key: u32) -> f32 {
    let bits = if key >> 31 == 1 { key & 0x7fff_ffff } else { !key };
    f32::from_bits(if key == 0 { f32::NAN.to_bits() } else { bits })
}

/// An element: its key, and its index.
pub(crate) type Element = (u32, u32);

/// Below every element of a row.
pub(crate) const NOTHING: Element = (0, u32::MAX);

/// The larger key; of equal ones the lower index.
#[inline(always)]
pub(crate) fn best(a: Element, b: Element) -> Element {
    if b.0 > a.0 || (b.0 == a.0 && b.1 < a.1) { b } else { a }
}

/// The best of the warp's elements, in every lane.
#[inline(always)]
#[track_caller]
pub(crate) fn warp_best(mut element: Element) -> Element {
    let mut step = WARP / 2;
    while step > 0 {
        element = best(element, (warp::shfl_xor(element.0, step), warp::shfl_xor(element.1, step)));
        step /= 2;
    }
    element
}

/// The best of the CTA's elements, in every thread; `scratch` has one word pair per warp.
#[inline(always)]
#[track_caller]
pub(crate) fn cta_best(element: Element, scratch: Smem<U32x2>) -> Element {
    let of_warp = warp_best(element);
    if lane_id() == 0 {
        scratch.st(warp_id(), U32x2([of_warp.0, of_warp.1]));
    }
    sync_threads();
    let of_lane = if lane_id() < block_dim_x() / WARP {
        let U32x2([key, index]) = scratch.ld(lane_id());
        (key, index)
    } else {
        NOTHING
    };
    warp_best(of_lane)
}
