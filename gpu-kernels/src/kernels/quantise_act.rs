//! Activations for the integer kernels: f32 to signed bytes, 32 to a group, bit-equal to `quant::ActGroup`.
//!
//! Which rounding is the weights' affair ([`kind_of`]). It is per group for all of them, as in ggml's CUDA kernels: formats
//! of super-blocks, for which ggml's and our CPU kernels round 256 activations to one scale, lose nothing by it, and a
//! kernel that ends 32 rows can quantise them.
//!
//! * Shapes: `x` [n_cols, k] f32, 16-byte aligned, k a multiple of 32. Output in two arrays, so that both are
//!   read with full-width coalesced loads: `q` [n_cols, k] bytes, 16-byte aligned; `scales` [n_cols, k / 32] of
//!   [`ActScale`]. Nothing overlaps.
//! * Geometry: 256 threads per CTA, a warp per 256 values, lane l takes the float4s l and l + 32 of them. Other kernels
//!   that end in quantised activations call `gpu::span`, `gpu::warp_group` or `gpu::float4`, by how lanes hold a group.
//! * Bytes: 5.25 per element. FLOPs: 4 per element.
//! * Tolerance: exact.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

use quant::{ActKind, BlockFormat};

const THREADS: u32 = 256;

/// How activations are rounded on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// [`ActKind::Q8_0`]: an f16 scale per group.
    Q8_0,
    /// [`ActKind::Q8_1`]: and what an offset multiplies, scale · sum, in f16.
    Q8_1,
}

impl From<Kind> for ActKind {
    fn from(kind: Kind) -> ActKind {
        match kind {
            Kind::Q8_0 => ActKind::Q8_0,
            Kind::Q8_1 => ActKind::Q8_1,
        }
    }
}

/// The rounding for weights of a format.
pub const fn kind_of<F: BlockFormat>() -> Kind {
    match F::ACT {
        ActKind::Q8_0 | ActKind::Q8K => Kind::Q8_0,
        ActKind::Q8_1 => Kind::Q8_1,
    }
}

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
    use super::{ActScale, Kind};
    use crate::device::{F32x4, Glb, U32x2, math, thread, warp};
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
        group(v, 1.0, Arrays { q, scales, end: if there { u32::MAX } else { 0 } }, i, offset_value);
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
    fn group(v: [f32; 4], factor: f32, to: impl Target + Copy, i: u32, offset_value: bool) {
        let abs = v.map(math::fabs);
        let mut amax = math::fmax(math::fmax(abs[0], abs[1]), math::fmax(abs[2], abs[3]));
        unroll!(S in 0..4 {
            if S < 3 {
                amax = math::fmax(amax, f32::from_bits(warp::shfl_xor(amax.to_bits(), 4 >> S)));
            }
        });
        let (d, inverse) = scales_of(amax);
        let d = d * factor;
        store(to, i, v.map(|v| code_of(v, inverse)), |sums| scale_of_group(d, sums, offset_value));
    }

    /// Scale of a group, before it is rounded, and what values are multiplied by.
    #[inline(always)]
    fn scales_of(amax: f32) -> (f32, f32) {
        // A group of NaN alone is zeros, as on the CPU.
        let d = math::fmax(amax, 0.0) / 127.0;
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

    /// Quantises a group of which each lane of the warp has a value, as group `group` of the arrays.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn warp_group(v: f32, q: Glb<u8>, scales: Glb<U32x2>, group: u32, kind: GroupKind) {
        let lane = thread::lane_id();
        let (d, inverse) = scales_of(warp::max_abs_f32(v));
        let code = code_of(v, inverse);
        let first_half = warp::sum_i32(if lane < 16 { code } else { 0 });
        let sum = warp::sum_i32(code);
        q.st(32 * group + lane, code as u8);
        if lane == 0 {
            let sums = [first_half, sum - first_half];
            let ActScale { d, extra } = match kind {
                GroupKind::Q8_0 => scale_of_group(d, sums, false),
                GroupKind::Q8_1 => scale_of_group(d, sums, true),
                GroupKind::Unscaled => ActScale::with_sums(d, sums),
            };
            scales.st(group, U32x2([d.to_bits(), extra]));
        }
    }

    /// What [`warp_group`] writes.
    #[derive(Clone, Copy, PartialEq, Eq)]
    pub(crate) enum GroupKind {
        /// As [`Kind::Q8_0`].
        Q8_0,
        /// As [`Kind::Q8_1`].
        Q8_1,
        /// Either's codes; scale and sums as they are before rounding, for [`scaled`].
        Unscaled,
    }

    /// A group's scale as `kind` has it, from an unscaled one and what its values are multiplied by: the bits of
    /// [`span`] with that factor.
    #[inline(always)]
    pub(crate) fn scaled(kind: Kind, unscaled: ActScale, factor: f32) -> ActScale {
        scale_of_group(unscaled.d * factor, unscaled.sums(), matches!(kind, Kind::Q8_1))
    }

    /// Quantises 256 neighbouring values of a warp, lane l holding the float4s l and l + 32 of them, as words `first` and
    /// on of `q`; words from `end` on are not written. What is quantised is `v · factor`: codes are chosen by `v`, scales
    /// multiplied before they are rounded. The warp calls together; `kind` is a constant.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn span(
        kind: Kind,
        v: [[f32; 4]; 2],
        factor: f32,
        q: Glb<u32>,
        scales: Glb<U32x2>,
        first: u32,
        end: u32,
    ) {
        span_to(kind, v, factor, Arrays { q, scales, end }, first);
    }

    /// [`span`] to anywhere.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn span_to(kind: Kind, v: [[f32; 4]; 2], factor: f32, to: impl Target + Copy, first: u32) {
        unroll!(H in 0..2 {
            let i = first + 32 * H as u32 + thread::lane_id();
            group(v[H], factor, to, i, matches!(kind, Kind::Q8_1));
        });
    }

    #[inline(always)]
    fn quantise(kind: Kind, x: Glb<F32x4>, q: Glb<u32>, scales: Glb<U32x2>, n4: u32) {
        let lane = thread::lane_id();
        let first = (thread::index_1d() - lane) * 2;
        if first >= n4 {
            return;
        }
        // Lanes past the end work on the last vector, for the shuffles, and store nothing.
        let load = |i: u32| x.ld_nc(if i < n4 { i } else { n4 - 1 }).0;
        span(kind, [load(first + lane), load(first + 32 + lane)], 1.0, q, scales, first, n4);
    }

    #[inline(always)]
    fn q8_0(x: Glb<F32x4>, q: Glb<u32>, scales: Glb<U32x2>, n4: u32) {
        quantise(Kind::Q8_0, x, q, scales, n4);
    }

    #[inline(always)]
    fn q8_1(x: Glb<F32x4>, q: Glb<u32>, scales: Glb<U32x2>, n4: u32) {
        quantise(Kind::Q8_1, x, q, scales, n4);
    }

    kernels! {
        in "quantise_act";
        pub(super) ENTRIES: threads(256);
        fn (x: Glb<F32x4>, q: Glb<u32>, scales: Glb<U32x2>, n4: u32);
        "quantise_act_Q8_0" => q8_0;
        "quantise_act_Q8_1" => q8_1;
    }
}

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use alloc::{boxed::Box, vec, vec::Vec};

    use quant::{ActGroup, FloatFormat, FormatId, Visitor, with_format};

    use super::{ActScale, BlockFormat, Kind, THREADS, kind_of};
    use crate::case::{Buffer, Expected, Kernel, Problem, Random, bytes_of};
    use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};

    /// [`kind_of`] a format by its id; `None` for floats.
    pub fn kind(format: FormatId) -> Option<Kind> {
        struct KindOf;
        impl Visitor for KindOf {
            type Output = Option<Kind>;
            fn block<F: BlockFormat>(self) -> Option<Kind> {
                Some(kind_of::<F>())
            }
            fn float<F: FloatFormat>(self) -> Option<Kind> {
                None
            }
        }
        with_format(format, KindOf).flatten()
    }

    /// The definition: codes and scales of a row.
    pub fn reference(kind: Kind, x: &[f32]) -> (Vec<i8>, Vec<ActScale>) {
        let mut groups = vec![ActGroup::ZERO; x.len() / 32];
        ActGroup::quantise(kind.into(), x, &mut groups);
        let scale = |g: &ActGroup| match kind {
            Kind::Q8_1 => ActScale { d: g.d, extra: g.values[2].to_bits() },
            Kind::Q8_0 => ActScale::with_sums(g.d, g.sums),
        };
        (groups.iter().flat_map(|g| g.q).collect(), groups.iter().map(scale).collect())
    }

    /// Arguments; see the contract.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Args {
        pub kind: Kind,
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
            Kind::Q8_0 => "quantise_act_Q8_0",
            Kind::Q8_1 => "quantise_act_Q8_1",
        };
        check.multiple("k", args.k, 32, "a multiple of 32")?;
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
        pub kind: Kind,
        pub n_cols: usize,
        pub k: usize,
    }

    impl Kernel for QuantiseAct {
        const NAME: &'static str = "quantise_act";
        type Case = Case;
        const CASES: &'static [Case] = &[
            Case { kind: Kind::Q8_0, n_cols: 1, k: 32 },
            Case { kind: Kind::Q8_1, n_cols: 3, k: 576 },
            Case { kind: Kind::Q8_0, n_cols: 1, k: 1024 },
            Case { kind: Kind::Q8_1, n_cols: 1, k: 1056 },
            Case { kind: Kind::Q8_0, n_cols: 8, k: 256 },
        ];
        const NMSE_MAX: f64 = 0.0;
        const BENCH: &'static [Case] = &[
            Case { kind: Kind::Q8_0, n_cols: 1024, k: 4096 },
            Case { kind: Kind::Q8_1, n_cols: 1024, k: 4096 },
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
