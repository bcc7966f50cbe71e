//! The second launch of a split decode: a row's spans out of `scratch`, merged in order as one CTA would have.
//!
//! A CTA has one token and head and 32 dimensions, or 64 where they are rotated: a chain of two operations per span
//! cannot be cut, so there are many CTAs with a short one each. Values of up to 128 spans at a time are copied to
//! shared memory, all at once, while the weights are computed: maxima only grow, so they are a scan, and a scan of
//! maxima is exact. Then the first warps walk the chain, a column per lane.

use super::results::Results;
use super::{CAUSAL, NO_SEQUENCE, SPAN, state};
use crate::device::{F32x2, F32x4, Glb, Smem, U32x2, U32x4, async_copy, grid, math, sync, thread, warp};

/// Threads of a CTA, and spans that it merges at a time.
const THREADS: u32 = super::MERGE_THREADS;
/// Spans whose values and weights are on their way to registers together.
const BATCH: u32 = 8;

#[inline(always)]
fn merge<const COLUMNS: u32>(
    scratch: Glb<F32x2>,
    out: Glb<f32>,
    scales: Glb<U32x2>,
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
    // 16-byte units of the CTA's dimensions.
    let units = const { COLUMNS / 4 };
    let (tid, lane) = (thread::thread_idx_x(), thread::lane_id());
    let (row, head) = (thread::block_idx_x() as usize, thread::block_idx_x() % n_head);
    let token = thread::block_idx_x() / n_head;
    let first_column = thread::block_idx_y() * COLUMNS;

    // The spans that hold what the token sees.
    let (mut first, mut end) = (0, 0);
    let sequence = token_sequences.ld_early(token);
    if sequence != NO_SEQUENCE {
        let U32x2([_, len]) = sequences.ld_early(sequence);
        let (low, high) = super::visible(positions.ld_early(token), len, flags & CAUSAL != 0, window);
        (first, end) = (low / SPAN as u32, high.div_ceil(SPAN as u32));
    }
    grid::wait_for_earlier();

    let n_rows = thread::grid_dim_x() as usize;
    let states = scratch.offset(n_rows * n_spans as usize * (head_dim / 2) as usize + row * n_spans as usize);
    let values = scratch.offset((row * n_spans as usize) * (head_dim / 2) as usize).cast::<U32x4>();
    let weights = Smem::<F32x4>::dynamic(0, THREADS);
    let parts = Smem::<U32x4>::dynamic(16 * THREADS, THREADS * units);
    let maxima = Smem::<f32>::dynamic(16 * THREADS * (1 + units), THREADS / 32);
    let (mut max, mut sum, mut value) = (f32::NEG_INFINITY, 0.0, 0.0);
    while first < end {
        let n = if end - first < THREADS { end - first } else { THREADS };
        // Neighbouring threads have a span: what they read lies in one piece.
        let unit = first_column / 4 + tid % units;
        let mut span = tid / units;
        while span < n && unit < head_dim / 4 {
            async_copy::copy16(
                parts,
                units * span + tid % units,
                values,
                (first + span) * (head_dim / 4) + unit,
            );
            span += THREADS / units;
        }
        async_copy::commit();
        let mut part = [f32::NEG_INFINITY, 0.0];
        if tid < n {
            part = states.ld_nc(first + tid).0;
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
        async_copy::wait::<0>();
        sync::sync_threads();

        let column = parts.cast::<f32>();
        let mut i = 0;
        while tid < COLUMNS && first_column + tid < head_dim && i < n {
            // All loads first: the chain waits for one round of them.
            let mut batch = [([0.0; 4], 0.0); BATCH as usize];
            let mut j = 0;
            while j < BATCH {
                if i + j < n {
                    batch[j as usize] = (weights.ld(i + j).0, column.ld(COLUMNS * (i + j) + tid));
                }
                j += 1;
            }
            let mut j = 0;
            while j < BATCH {
                if i + j < n {
                    let ([own, other, part, _], v) = batch[j as usize];
                    sum = state::merge(sum, part, [own, other]);
                    value = state::merge(value, v, [own, other]);
                }
                j += 1;
            }
            i += BATCH;
        }
        // The tables may be written again.
        sync::sync_threads();
        first += n;
    }
    let column = first_column + tid;
    let result = value * state::normaliser(max, sum, super::sink(sinks, head));
    let results = Results { out: out.cast(), scales, head_dim, flags };
    if !results.are_plain() {
        if tid < COLUMNS {
            parts.cast::<f32>().st(tid, result);
        }
        sync::sync_threads();
        if tid < 32 {
            let F32x4(v) = parts.cast::<F32x4>().ld(tid % units);
            results.store(row, first_column / 4 + tid % units, v, tid < units);
        }
    } else if tid < COLUMNS && column < head_dim {
        out.offset(row * head_dim as usize).st(column, result);
    }
}

kernels! {
    in "flash";
    pub(super) ENTRIES: threads(128), early;
    fn (
        scratch: Glb<F32x2>, out: Glb<f32>, scales: Glb<U32x2>, positions: Glb<u32>, token_sequences: Glb<u32>,
        sequences: Glb<U32x2>, sinks: Glb<f32>, n_head: u32, head_dim: u32, flags: u32, window: u32, n_spans: u32,
    );
    "flash_merge" => merge::<{ super::MERGE_COLUMNS }>;
    "flash_merge_rotated" => merge::<{ super::ROTATED_COLUMNS }>;
}
