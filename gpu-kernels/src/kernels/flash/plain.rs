//! Attention without tensor cores, for GPUs before sm_80: right on any, fast on none.
//!
//! A warp has one token and head; 4 warps to a CTA. Positions go by blocks of 32, one to a lane for the scores; then lane
//! l sums the dimensions l, l + 32, … in shared memory, which arrays of registers, indexed at run time, could not be.
//! Everything is f32; sums are taken in order of dimension and of position, whatever the launch.

use half::{bf16, f16};
use quant::{BlockFormat, FormatId, formats};

use super::results::Results;
use super::{CAUSAL, MAX_DIM_V, NO_SEQUENCE, PAGE, PLAIN_WARPS, state};
use crate::device::{F32x4, Float, Glb, Smem, U32x2, math, thread, warp};

/// A row of the cache, by format.
trait Row {
    /// `q · row`.
    fn dot(self, q: Glb<f32>, n: u32) -> f32;
    /// Element `i`.
    fn element(self, i: u32) -> f32;
}

#[derive(Clone, Copy)]
struct Floats<T>(Glb<T>);

impl<T: Float> Row for Floats<T> {
    #[inline(always)]
    #[track_caller]
    fn dot(self, q: Glb<f32>, n: u32) -> f32 {
        let (mut sum, mut i) = (0.0, 0);
        while i < n {
            sum = math::fma(q.ld_nc(i), self.0.ld_nc(i).to_f32(), sum);
            i += 1;
        }
        sum
    }
    #[inline(always)]
    #[track_caller]
    fn element(self, i: u32) -> f32 {
        self.0.ld_nc(i).to_f32()
    }
}

#[derive(Clone, Copy)]
struct Blocks<F>(Glb<F>);

/// The decoded value of a code: two roundings, as in `quant`.
#[inline(always)]
fn value<F: BlockFormat>(group: &quant::Group, code: u32) -> f32 {
    let scaled = math::mul(group.scale[0], (code as i32 - F::BIAS) as f32);
    if F::HAS_OFFSET { scaled + group.offset[0] } else { scaled }
}

impl<F: BlockFormat> Row for Blocks<F> {
    #[inline(always)]
    #[track_caller]
    fn dot(self, q: Glb<f32>, n: u32) -> f32 {
        let (mut sum, mut block) = (0.0, 0);
        while block < n / 32 {
            let group = self.0.view(block).unpack_group(0);
            unroll!(W in 0..8 {
                unroll!(B in 0..4 {
                    let code = group.codes[W] >> (8 * B) & 0xff;
                    sum = math::fma(q.ld_nc(32 * block + (4 * W + B) as u32), value::<F>(&group, code), sum);
                });
            });
            block += 1;
        }
        sum
    }
    #[inline(always)]
    #[track_caller]
    fn element(self, i: u32) -> f32 {
        const { assert!(F::GROUPS == 1 && F::SCALE_ELEMS == 32) };
        let group = self.0.view(i / 32).unpack_group(0);
        let mut word = 0;
        unroll!(W in 0..8 {
            word = if i / 4 % 8 == W as u32 { group.codes[W] } else { word };
        });
        value::<F>(&group, word >> (8 * (i % 4)) & 0xff)
    }
}

/// Calls `f` with the row at an address as the format has it.
macro_rules! with_row {
    ($format:expr, $bytes:expr, |$row:ident| $body:expr) => {{
        const F32: u32 = FormatId::F32 as u32;
        const BF16: u32 = FormatId::BF16 as u32;
        const Q8_0: u32 = FormatId::Q8_0 as u32;
        const Q4_0: u32 = FormatId::Q4_0 as u32;
        const Q4_1: u32 = FormatId::Q4_1 as u32;
        const Q5_0: u32 = FormatId::Q5_0 as u32;
        const Q5_1: u32 = FormatId::Q5_1 as u32;
        let bytes: Glb<u8> = $bytes;
        macro_rules! arm {
            ($kind:ident, $ty:ty) => {{
                let $row = $kind(bytes.cast::<$ty>());
                $body
            }};
        }
        match $format {
            F32 => arm!(Floats, f32),
            BF16 => arm!(Floats, bf16),
            Q8_0 => arm!(Blocks, formats::q8_0::Block),
            Q4_0 => arm!(Blocks, formats::q4_0::Block),
            Q4_1 => arm!(Blocks, formats::q4_1::Block),
            Q5_0 => arm!(Blocks, formats::q5_0::Block),
            Q5_1 => arm!(Blocks, formats::q5_1::Block),
            _ => arm!(Floats, f16),
        }
    }};
}

#[inline(always)]
fn plain(
    q: Glb<f32>,
    k: Glb<u8>,
    v: Glb<u8>,
    out: Glb<f32>,
    scales: Glb<U32x2>,
    positions: Glb<u32>,
    token_sequences: Glb<u32>,
    sequences: Glb<U32x2>,
    pages: Glb<u32>,
    sinks: Glb<f32>,
    slopes: Glb<f32>,
    n_tokens: u32,
    n_head: u32,
    n_head_kv: u32,
    head_dim_k: u32,
    head_dim_v: u32,
    row_bytes_k: u32,
    row_bytes_v: u32,
    format_k: u32,
    format_v: u32,
    flags: u32,
    window: u32,
    scale: f32,
    softcap: f32,
) {
    let lane = thread::lane_id();
    let row = thread::block_idx_x() * PLAIN_WARPS + thread::warp_id();
    // Whole warps leave, and no barrier follows.
    if row >= n_tokens * n_head {
        return;
    }
    let (token, head) = (row / n_head, row % n_head);
    let kv_head = head / (n_head / n_head_kv);
    let pos = positions.ld_nc(token);
    let sequence = token_sequences.ld_nc(token);
    let (mut first_page, mut low, mut high) = (0, 0, 0);
    if sequence != NO_SEQUENCE {
        let U32x2([first, len]) = sequences.ld_nc(sequence);
        first_page = first;
        (low, high) = super::visible(pos, len, flags & CAUSAL != 0, window);
    }
    let cache_row = |position: u32| {
        let page = pages.ld_nc(first_page + position / PAGE as u32) as usize;
        (page * n_head_kv as usize + kv_head as usize) * PAGE + position as usize % PAGE
    };
    let slope = if slopes.is_null() { 0.0 } else { slopes.ld_nc(head) };
    let q = q.offset(row as usize * head_dim_k as usize);

    let sums = Smem::<f32>::dynamic(4 * thread::warp_id() * MAX_DIM_V, MAX_DIM_V);
    let mut d = lane;
    while d < head_dim_v {
        sums.st(d, 0.0);
        d += 32;
    }
    warp::sync_warp();
    let (mut max, mut sum) = (f32::NEG_INFINITY, 0.0);
    let mut block = low / 32;
    while block < high.div_ceil(32) {
        let position = 32 * block + lane;
        let visible = position >= low && position < high;
        // Lanes without a position work on one that is there: fewer branches than lanes that wait.
        let bytes = k.offset(cache_row(if visible { position } else { low }) * row_bytes_k as usize);
        let mut score = with_row!(format_k, bytes, |row| row.dot(q, head_dim_k)) * scale;
        if softcap != 0.0 {
            score = softcap * math::tanh(score);
        }
        score = math::fma(-slope, math::fabs(pos as f32 - position as f32), score) * math::LOG2_E;
        score = if visible { score } else { f32::NEG_INFINITY };
        // A block has a visible position, so the maximum is a number.
        let new = math::fmax(max, warp::max_f32(score));
        let rescale = math::ex2(max - new);
        let p = math::ex2(score - new);
        sum = math::fma(sum, rescale, warp::sum_f32(p));
        max = new;
        let mut first = 0;
        while first < head_dim_v {
            let there = first + lane < head_dim_v;
            let d = if there { first + lane } else { first };
            let mut acc = sums.ld(d) * rescale;
            let from = low.saturating_sub(32 * block);
            let to = if high < 32 * block + 32 { high - 32 * block } else { 32 };
            let mut i = from;
            while i < to {
                let weight = f32::from_bits(warp::shfl(p.to_bits(), i));
                let bytes = v.offset(cache_row(32 * block + i) * row_bytes_v as usize);
                acc = math::fma(weight, with_row!(format_v, bytes, |row| row.element(d)), acc);
                i += 1;
            }
            // The neighbour that lane 0 has may be read by lanes without one of their own.
            warp::sync_warp();
            if there {
                sums.st(d, acc);
            }
            first += 32;
        }
        warp::sync_warp();
        block += 1;
    }
    let factor = state::normaliser(max, sum, super::sink(sinks, head));
    let results = Results { out: out.cast(), scales, head_dim: head_dim_v, flags };
    if !results.are_plain() {
        let mut first = 0;
        while first < head_dim_v / 4 {
            let there = first + lane < head_dim_v / 4;
            let c = if there { first + lane } else { first + lane % 8 };
            let F32x4(v) = sums.cast::<F32x4>().ld(c);
            results.store(row as usize, c, v.map(|v| math::mul(v, factor)), there);
            first += 32;
        }
        return;
    }
    let out = out.offset(row as usize * head_dim_v as usize);
    let mut d = lane;
    while d < head_dim_v {
        out.st(d, sums.ld(d) * factor);
        d += 32;
    }
}

kernels! {
    in "flash_plain";
    pub(super) ENTRIES: threads(128, 4);
    fn (
        q: Glb<f32>, k: Glb<u8>, v: Glb<u8>, out: Glb<f32>, scales: Glb<U32x2>,
        positions: Glb<u32>, token_sequences: Glb<u32>, sequences: Glb<U32x2>, pages: Glb<u32>,
        sinks: Glb<f32>, slopes: Glb<f32>,
        n_tokens: u32, n_head: u32, n_head_kv: u32, head_dim_k: u32, head_dim_v: u32,
        row_bytes_k: u32, row_bytes_v: u32, format_k: u32, format_v: u32,
        flags: u32, window: u32, scale: f32, softcap: f32,
    );
    "flash_plain" => plain;
}
