//! Activations for the integer kernels: f32 to signed bytes, 32 to a group, bit-equal to `quant::ActGroup`, so that GPU
//! and CPU round alike.
//!
//! Which rounding is the weights' affair (`BlockFormat::ACT`): per group with an f16 scale ([`quant::ActKind::Q8_0`], and
//! [`quant::ActKind::Q8_1`] with an f16 product of scale and sum), or per super-block of 256 with an f32 scale
//! ([`quant::ActKind::Q8K`]).
//!
//! * Shapes: `x` [n_cols, k] f32, 16-byte aligned, k a multiple of 32 (Q8K: 256). Output in two arrays, so that both are
//!   read with full-width coalesced loads: `q` [n_cols, k] bytes, 16-byte aligned; `scales` [n_cols, k / 32] of
//!   [`ActScale`]. Nothing overlaps.
//! * Geometry: 256 threads per CTA, a warp per 256 values, lane l takes the float4s l and l + 32 of them. Other kernels
//!   that end in quantised activations hold their values the same way and call `gpu::span`.
//! * Bytes: 5.25 per element. FLOPs: 4 per element.
//! * Tolerance: exact.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

const THREADS: u32 = 256;

/// Scale of one group and what goes with it: 8 bytes, one load.
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(8))]
pub struct ActScale {
    /// Scale.
    pub d: f32,
    /// For Q8_1, whose formats have no bias: what the offset multiplies, as f32 bits. Else the sums of q[0..16] (low
    /// half, signed) and of q[16..32] (high half): at most 2032 in size each.
    pub extra: u32,
}

impl ActScale {
    /// Packs the two sums.
    #[inline(always)]
    pub fn with_sums(d: f32, sums: [i32; 2]) -> ActScale {
        ActScale { d, extra: sums[0] as u32 & 0xffff | (sums[1] as u32) << 16 }
    }

    /// The two sums, unless the kind is Q8_1.
    #[inline(always)]
    pub fn sums(self) -> [i32; 2] {
        [(self.extra << 16) as i32 >> 16, self.extra as i32 >> 16]
    }
}

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
pub(crate) mod gpu {
    use super::ActScale;
    use crate::device::{F32x4, Glb, U32x2, math, thread, warp};
    use quant::act::ActKind;
    use quant::bits::{f16_to_f32, f32_to_f16, round_half_away};

    /// Sum over the `lanes` neighbours (a power of two) that share a result.
    #[inline(always)]
    #[track_caller]
    fn sum_of(mut v: i32, lanes: u32) -> i32 {
        let mut step = lanes / 2;
        while step > 0 {
            v += warp::shfl_xor(v as u32, step) as i32;
            step /= 2;
        }
        v
    }

    /// Where quantised values go.
    pub(crate) trait Target {
        /// Four codes as word `i`.
        fn codes(self, i: u32, word: u32);
        /// Scale of group `group`.
        fn scale(self, group: u32, scale: ActScale);
    }

    /// The arrays of the contract; words from `end` on are not written.
    #[derive(Clone, Copy)]
    struct Arrays {
        q: Glb<u32>,
        scales: Glb<U32x2>,
        end: u32,
    }

    impl Target for Arrays {
        #[inline(always)]
        #[track_caller]
        fn codes(self, i: u32, word: u32) {
            if i < self.end {
                self.q.st(i, word);
            }
        }
        #[inline(always)]
        #[track_caller]
        fn scale(self, group: u32, ActScale { d, extra }: ActScale) {
            if 8 * group < self.end {
                self.scales.st(group, U32x2([d.to_bits(), extra]));
            }
        }
    }

    /// Quantises a group of which eight neighbouring lanes have a float4 each, this one number `i` of the arrays; nothing is
    /// written where `there` is false. With `offset_value` as Q8_1, else as Q8_0. The warp calls together.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn float4(
        v: [f32; 4],
        q: Glb<u32>,
        scales: Glb<U32x2>,
        i: u32,
        there: bool,
        offset_value: bool,
    ) {
        group(v, Arrays { q, scales, end: if there { u32::MAX } else { 0 } }, i, offset_value);
    }

    /// Stores four codes, and once per group its scale; eight neighbouring lanes have a group.
    #[inline(always)]
    #[track_caller]
    fn store(to: impl Target + Copy, i: u32, codes: [i32; 4], scale: impl Fn([i32; 2]) -> ActScale) {
        // Each half of the group is four lanes.
        let sum = sum_of(codes[0] + codes[1] + codes[2] + codes[3], 4);
        let other_half = warp::shfl_xor(sum as u32, 4) as i32;
        let byte = |j: usize| (codes[j] as u32 & 0xff) << (8 * j);
        to.codes(i, byte(0) | byte(1) | byte(2) | byte(3));
        if i.is_multiple_of(8) {
            to.scale(i / 8, scale([sum, other_half]));
        }
    }

    #[inline(always)]
    #[track_caller]
    fn group(v: [f32; 4], to: impl Target + Copy, i: u32, offset_value: bool) {
        let abs = v.map(math::fabs);
        let mut amax = math::fmax(math::fmax(abs[0], abs[1]), math::fmax(abs[2], abs[3]));
        unroll!(S in 0..4 {
            if S < 3 {
                amax = math::fmax(amax, f32::from_bits(warp::shfl_xor(amax.to_bits(), 4 >> S)));
            }
        });
        let (d, inverse) = scales_of(amax);
        store(to, i, v.map(|v| code_of(v, inverse)), |sums| scale_of_group(d, sums, offset_value));
    }

    /// Scale of a group, before it is rounded, and what values are multiplied by.
    #[inline(always)]
    fn scales_of(amax: f32) -> (f32, f32) {
        let d = amax / 127.0;
        (d, if d != 0.0 { 1.0 / d } else { 0.0 })
    }

    #[inline(always)]
    fn code_of(v: f32, inverse: f32) -> i32 {
        // Rounded apart from the sum in `round_half_away`: the CPU does not fuse them.
        round_half_away(math::mul(v, inverse)).clamp(-127, 127)
    }

    #[inline(always)]
    fn scale_of_group(d: f32, sums: [i32; 2], offset_value: bool) -> ActScale {
        let stored = f16_to_f32(f32_to_f16(d));
        if offset_value {
            let value = f16_to_f32(f32_to_f16(d * (sums[0] + sums[1]) as f32));
            ActScale { d: stored, extra: value.to_bits() }
        } else {
            ActScale::with_sums(stored, sums)
        }
    }

    /// Quantises a group of which each lane of the warp has a value, as group `group` of the arrays. With `offset_value`
    /// as Q8_1, else as Q8_0.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn warp_group(v: f32, q: Glb<u8>, scales: Glb<U32x2>, group: u32, offset_value: bool) {
        let lane = thread::lane_id();
        let (d, inverse) = scales_of(warp::max_f32(math::fabs(v)));
        let code = code_of(v, inverse);
        let sum = sum_of(code, 16);
        let other_half = warp::shfl_xor(sum as u32, 16) as i32;
        q.st(32 * group + lane, code as u8);
        if lane == 0 {
            let ActScale { d, extra } = scale_of_group(d, [sum, other_half], offset_value);
            scales.st(group, U32x2([d.to_bits(), extra]));
        }
    }

    /// The value of larger magnitude; of equal ones the one that comes first in the super-block.
    #[inline(always)]
    fn larger(a: (f32, u32), b: (f32, u32)) -> (f32, u32) {
        let (x, y) = (math::fabs(a.0), math::fabs(b.0));
        if y > x || (y == x && b.1 < a.1) { b } else { a }
    }

    #[inline(always)]
    #[track_caller]
    fn super_block(v: [[f32; 4]; 2], to: impl Target + Copy, first: u32) {
        let lane = thread::lane_id();
        // NaN counts as nothing, as on the CPU.
        let mut max = (0.0f32, u32::MAX);
        unroll!(H in 0..2 {
            unroll!(J in 0..4 {
                let value = v[H][J];
                let here = (if value.is_nan() { 0.0 } else { value }, 128 * H as u32 + 4 * lane + J as u32);
                max = larger(max, here);
            });
        });
        let mut step = 16;
        while step > 0 {
            let other = f32::from_bits(warp::shfl_xor(max.0.to_bits(), step));
            max = larger(max, (other, warp::shfl_xor(max.1, step)));
            step /= 2;
        }
        let inverse = if max.0 != 0.0 { -127.0 / max.0 } else { 0.0 };
        let d = if max.0 != 0.0 { 1.0 / inverse } else { 0.0 };
        unroll!(H in 0..2 {
            let codes = v[H].map(|v| math::round_even(math::mul(inverse, v)).clamp(-127.0, 127.0) as i32);
            store(to, first + 32 * H as u32 + lane, codes, |sums| ActScale::with_sums(d, sums));
        });
    }

    /// Quantises 256 neighbouring values of a warp, lane l holding the float4s l and l + 32 of them, as words `first` and
    /// on of `q`; words from `end` on are not written. The warp calls together; `kind` is a constant.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn span(
        kind: ActKind,
        v: [[f32; 4]; 2],
        q: Glb<u32>,
        scales: Glb<U32x2>,
        first: u32,
        end: u32,
    ) {
        span_to(kind, v, Arrays { q, scales, end }, first);
    }

    /// [`span`] to anywhere.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn span_to(kind: ActKind, v: [[f32; 4]; 2], to: impl Target + Copy, first: u32) {
        match kind {
            ActKind::Q8_0 | ActKind::Q8_1 => {
                unroll!(H in 0..2 {
                    let i = first + 32 * H as u32 + thread::lane_id();
                    group(v[H], to, i, matches!(kind, ActKind::Q8_1));
                });
            }
            ActKind::Q8K => super_block(v, to, first),
        }
    }

    #[inline(always)]
    fn quantise(kind: ActKind, x: Glb<F32x4>, q: Glb<u32>, scales: Glb<U32x2>, n4: u32) {
        let lane = thread::lane_id();
        let first = (thread::index_1d() - lane) * 2;
        if first >= n4 {
            return;
        }
        // Lanes past the end work on the last vector, for the shuffles, and store nothing.
        let load = |i: u32| x.ld_nc(if i < n4 { i } else { n4 - 1 }).0;
        span(kind, [load(first + lane), load(first + 32 + lane)], q, scales, first, n4);
    }

    #[inline(always)]
    fn q8_0(x: Glb<F32x4>, q: Glb<u32>, scales: Glb<U32x2>, n4: u32) {
        quantise(ActKind::Q8_0, x, q, scales, n4);
    }

    #[inline(always)]
    fn q8_1(x: Glb<F32x4>, q: Glb<u32>, scales: Glb<U32x2>, n4: u32) {
        quantise(ActKind::Q8_1, x, q, scales, n4);
    }

    #[inline(always)]
    fn q8k(x: Glb<F32x4>, q: Glb<u32>, scales: Glb<U32x2>, n4: u32) {
        quantise(ActKind::Q8K, x, q, scales, n4);
    }

    kernels! {
        in "quantise_act";
        pub(super) ENTRIES: threads(256);
        fn (x: Glb<F32x4>, q: Glb<u32>, scales: Glb<U32x2>, n4: u32);
        "quantise_act_Q8_0" => q8_0;
        "quantise_act_Q8_1" => q8_1;
        "quantise_act_Q8K" => q8k;
    }
}

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use alloc::{boxed::Box, vec, vec::Vec};

    use quant::ActGroup;
    use quant::act::{ActKind, SUPER_BLOCK};

    use super::{ActScale, THREADS};
    use crate::case::{Buffer, Expected, Kernel, Problem, Random, bytes_of};
    use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};

    /// The definition: codes and scales of a row.
    pub fn reference(kind: ActKind, x: &[f32]) -> (Vec<i8>, Vec<ActScale>) {
        let mut groups = vec![ActGroup::ZERO; x.len() / 32];
        ActGroup::quantise(kind, x, &mut groups);
        let scale = |g: &ActGroup| match kind {
            ActKind::Q8_1 => ActScale { d: g.d, extra: g.values[2].to_bits() },
            ActKind::Q8_0 | ActKind::Q8K => ActScale::with_sums(g.d, g.sums),
        };
        (groups.iter().flat_map(|g| g.q).collect(), groups.iter().map(scale).collect())
    }

    /// Arguments; see the contract.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Args {
        pub kind: ActKind,
        pub x: DevicePtr,
        pub q: DevicePtr,
        pub scales: DevicePtr,
        pub n_cols: usize,
        pub k: usize,
    }

    /// One launch for all columns.
    pub fn launch(args: &Args) -> Result<Launch, LaunchError> {
        let check = Check(QuantiseAct::NAME);
        let entry = match args.kind {
            ActKind::Q8_0 => "quantise_act_Q8_0",
            ActKind::Q8_1 => "quantise_act_Q8_1",
            ActKind::Q8K => "quantise_act_Q8K",
        };
        match args.kind {
            ActKind::Q8K => check.multiple("k", args.k, SUPER_BLOCK, "a multiple of 256")?,
            _ => check.multiple("k", args.k, 32, "a multiple of 32")?,
        }
        check.size("k", args.k)?;
        let n4 = check.size("n_cols * k", args.n_cols.saturating_mul(args.k))? / 4;
        for (what, at, align) in [("x", args.x, 16), ("q", args.q, 16), ("scales", args.scales, 16)] {
            check.aligned(what, at, align)?;
        }
        Ok(Launch {
            entry,
            grid: [n4.div_ceil(2 * THREADS), 1, 1],
            cta: THREADS,
            cluster: 1,
            smem_bytes: 0,
            params: Params::new().with(args.x).with(args.q).with(args.scales).with(n4),
        })
    }

    /// The row in the registry.
    #[derive(Debug)]
    pub struct QuantiseAct;

    /// One case.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Case {
        pub kind: ActKind,
        pub n_cols: usize,
        pub k: usize,
    }

    impl Kernel for QuantiseAct {
        const NAME: &'static str = "quantise_act";
        type Case = Case;
        const CASES: &'static [Case] = &[
            Case { kind: ActKind::Q8_0, n_cols: 1, k: 32 },
            Case { kind: ActKind::Q8_1, n_cols: 3, k: 576 },
            Case { kind: ActKind::Q8_0, n_cols: 1, k: 1024 },
            Case { kind: ActKind::Q8_1, n_cols: 1, k: 1056 },
            Case { kind: ActKind::Q8_0, n_cols: 8, k: 256 },
            Case { kind: ActKind::Q8K, n_cols: 1, k: 256 },
            Case { kind: ActKind::Q8K, n_cols: 3, k: 768 },
            Case { kind: ActKind::Q8K, n_cols: 1, k: 2304 },
        ];
        const NMSE_MAX: f64 = 0.0;
        const BENCH: &'static [Case] = &[
            Case { kind: ActKind::Q8_0, n_cols: 1024, k: 4096 },
            Case { kind: ActKind::Q8K, n_cols: 1024, k: 4096 },
        ];
        #[cfg(feature = "emu")]
        const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::gpu::ENTRIES];

        fn problem(case: &Case, random: &mut Random) -> Problem {
            let Case { kind, n_cols, k } = *case;
            let mut x = random.values(n_cols * k);
            // A group of zeros, and one so small that its scale's inverse overflows.
            x[..32].fill(0.0);
            if let Some(group) = x.get_mut(64..96) {
                group.iter_mut().for_each(|v| *v *= 1e-38);
            }
            // Two of equal magnitude, the largest: the first decides the sign.
            if kind == ActKind::Q8K {
                (x[40], x[200]) = (-99.0, 99.0);
            }
            let (q, scales) = reference(kind, &x);
            Problem {
                buffers: vec![
                    Buffer::Input(bytes_of(&x)),
                    Buffer::Output(Expected::Exact(bytes_of(&q))),
                    Buffer::Output(Expected::Exact(bytes_of(&scales))),
                ],
                launches: Box::new(move |at| {
                    Ok(vec![launch(&Args { kind, x: at[0], q: at[1], scales: at[2], n_cols, k })?])
                }),
            }
        }

        fn bytes(case: &Case) -> u64 {
            (case.n_cols * case.k) as u64 * 21 / 4
        }

        fn flops(case: &Case) -> u64 {
            4 * (case.n_cols * case.k) as u64
        }
    }
}
