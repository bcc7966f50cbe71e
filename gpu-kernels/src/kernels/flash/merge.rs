//! The second launch of a split decode: a row's spans out of `scratch`, merged in order as one CTA would have.
//!
//! A CTA has one token and head and 128 dimensions, one per thread. The weights of up to 128 spans at a time come first:
//! maxima only grow, so they are a scan, and a scan of maxima is exact. Then each thread walks its column, with the
//! loads of 16 spans under way at a time.

use super::{CAUSAL, NO_SEQUENCE, SPAN, state};
use crate::device::{F32x2, F32x4, Glb, Smem, U32x2, grid, math, sync, thread, warp};

/// Threads of a CTA, dimensions of one, and spans whose weights it holds.
const THREADS: u32 = super::MERGE_THREADS;
/// Loads of a thread under way.
const BATCH: u32 = 16;

#[inline(always)]
#[allow(clippy::too_many_arguments)] // a kernel's
fn merge(
    scratch: Glb<F32x2>,
    out: Glb<f32>,
    positions: Glb<u32>,
    token_sequences: Glb<u32>,
    sequences: Glb<U32x2>,
    sinks: Glb<f32>,
    n_head: u32,
    head_dim: u32,
    flags: u32,
    window: u32,
    n_spans: u32,
) {
    let (tid, lane) = (thread::thread_idx_x(), thread::lane_id());
    let (row, head) = (thread::block_idx_x() as usize, thread::block_idx_x() % n_head);
    let token = thread::block_idx_x() / n_head;
    let column = thread::block_idx_y() * THREADS + tid;

    // The spans that hold what the token sees.
    let (mut first, mut end) = (0, 0);
    let sequence = token_sequences.ld_early(token);
    if sequence != NO_SEQUENCE {
        let U32x2([_, len]) = sequences.ld_early(sequence);
        let (low, high) = super::visible(positions.ld_early(token), len, flags & CAUSAL != 0, window);
        (first, end) = (low / SPAN as u32, high.div_ceil(SPAN as u32));
    }
    grid::wait_for_earlier();

    let stride = (head_dim / 2 + 1) as usize;
    let parts = scratch.offset(row * n_spans as usize * stride);
    let weights = Smem::<F32x4>::dynamic(0, THREADS);
    let maxima = Smem::<f32>::dynamic(16 * THREADS, THREADS / 32);
    let (mut max, mut sum, mut value) = (f32::NEG_INFINITY, 0.0, 0.0);
    while first < end {
        let n = if end - first < THREADS { end - first } else { THREADS };
        let mut part = [f32::NEG_INFINITY, 0.0];
        if tid < n {
            part = parts.offset((first + tid) as usize * stride).ld_nc(head_dim / 2).0;
        }
        // The largest of this span and those before.
        let mut total = part[0];
        unroll!(I in 0..8 {
            if I < 5 {
                let other = f32::from_bits(warp::shfl_up(total.to_bits(), 1 << I));
                total = math::fmax(total, other);
            }
        });
        if lane == 31 {
            maxima.st(thread::warp_id(), total);
        }
        sync::sync_threads();
        // That of the spans before this lane's.
        let mut before = f32::from_bits(warp::shfl_up(total.to_bits(), 1));
        before = if lane == 0 { max } else { math::fmax(before, max) };
        let mut i = 0;
        while i < thread::warp_id() {
            before = math::fmax(before, maxima.ld(i));
            i += 1;
        }
        let (_, [own, other]) = state::weights(before, part[0]);
        weights.st(tid, F32x4([own, other, part[1], 0.0]));
        let mut i = 0;
        while i < THREADS / 32 {
            max = math::fmax(max, maxima.ld(i));
            i += 1;
        }
        sync::sync_threads();

        let mut i = 0;
        while i < n {
            let mut values = [0.0; BATCH as usize];
            let mut j = 0;
            while j < BATCH {
                if i + j < n && column < head_dim {
                    let part = parts.offset((first + i + j) as usize * stride);
                    values[j as usize] = part.cast::<f32>().ld_nc(column);
                }
                j += 1;
            }
            let mut j = 0;
            while j < BATCH {
                if i + j < n {
                    let F32x4([own, other, part, _]) = weights.ld(i + j);
                    sum = state::merge(sum, part, [own, other]);
                    value = state::merge(value, values[j as usize], [own, other]);
                }
                j += 1;
            }
            i += BATCH;
        }
        // The tables may be written again.
        sync::sync_threads();
        first += n;
    }
    if column < head_dim {
        let sink = super::sink(sinks, head);
        out.offset(row * head_dim as usize).st(column, value * state::normaliser(max, sum, sink));
    }
}

kernels! {
    in "flash";
    pub(super) ENTRIES: threads(128), early;
    fn (
        scratch: Glb<F32x2>, out: Glb<f32>, positions: Glb<u32>, token_sequences: Glb<u32>, sequences: Glb<U32x2>,
        sinks: Glb<f32>, n_head: u32, head_dim: u32, flags: u32, window: u32, n_spans: u32,
    );
    "flash_merge" => merge;
}
