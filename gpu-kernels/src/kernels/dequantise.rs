//! Weights of any format to f32, f16 or bf16.
//!
//! * Shapes: `src` n weights in a block format (n a multiple of its block) or floats (any n), `dst` n elements; both dense,
//!   16-byte aligned. Nothing overlaps.
//! * Geometry: 128 threads per CTA, a group of 32 weights per lane. A lane unpacks its group's codes into shared memory;
//!   then the warp writes its 1024 elements, each lane four neighbours, so that stores coalesce. Floats are copied (`copy`).
//! * Bytes: n · (bits per weight / 8 + bytes of the output type). FLOPs: 2 per element.
//! * Tolerance: f32 is bit-equal to `BlockFormat::decode`; f16 and bf16 are that, rounded to nearest even.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

pub(crate) const THREADS: u32 = 128;
/// Words of a group's codes, and one more, so that a column of them meets no bank twice.
const STRIDE: usize = 9;

smem! {
    /// What [`gpu::store_groups`] needs, for up to [`THREADS`] threads.
    pub(crate) struct Shared {
        /// Codes: per warp 32 groups, [`STRIDE`] words apart.
        codes: [u32; 4 * 32 * STRIDE],
    }
}

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
pub(crate) mod gpu {
    use quant::{BlockFormat, Group};

    use super::Shared;
    use crate::device::{F32x4, Float, Glb, U32x2, math, thread, warp};
    use crate::kernels::lookup::InMemory;

    const STRIDE: u32 = super::STRIDE as u32;

    /// An output type: stores four neighbours at once.
    pub(crate) trait Output: Float {
        fn store4(to: Glb<Self>, i4: u32, values: [f32; 4]);
    }

    impl Output for f32 {
        #[inline(always)]
        #[track_caller]
        fn store4(to: Glb<f32>, i4: u32, values: [f32; 4]) {
            to.cast::<F32x4>().st(i4, F32x4(values));
        }
    }

    macro_rules! half_output {
        ($($ty:ty),*) => {$(
            impl Output for $ty {
                #[inline(always)]
                #[track_caller]
                fn store4(to: Glb<$ty>, i4: u32, values: [f32; 4]) {
                    let bits = values.map(|v| u32::from(<$ty as Float>::from_f32(v).to_bits()));
                    to.cast::<U32x2>().st(i4, U32x2([bits[0] | bits[1] << 16, bits[2] | bits[3] << 16]));
                }
            }
        )*};
    }
    use half::{bf16, f16};
    half_output!(f16, bf16);

    /// Writes a group of every lane of the warp, which calls together: 1024 elements, each lane four neighbours at a time.
    /// `place(from)` is where lane `from`'s group goes, in units of four elements, if anywhere.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn store_groups<F: BlockFormat, T: Output>(
        group: &Group,
        dst: Glb<T>,
        place: impl Fn(u32) -> Option<usize>,
    ) {
        let lane = thread::lane_id();
        let codes = Shared::codes();
        let base = thread::warp_id() * 32 * STRIDE;
        unroll!(I in 0..8 {
            codes.st(base + lane * STRIDE + I as u32, group.codes[I]);
        });
        warp::sync_warp();

        // In round r lane l writes part of the group of lane 4r + l / 8: four groups, eight lanes each.
        let (word, in_round) = (lane % 8, lane / 8);
        // Rolled: unrolled, the many entries would be most of the PTX and no faster.
        let rounds = math::opaque(8);
        let mut round = 0;
        while round < rounds {
            let from = 4 * round + in_round;
            let half = (word / 4) as usize;
            let of = |pair: [f32; 2]| {
                let [a, b] = pair.map(|v| f32::from_bits(warp::shfl(v.to_bits(), from)));
                if F::SCALE_ELEMS == 16 && half == 1 { b } else { a }
            };
            let scale = of(group.scale);
            let offset = if F::HAS_OFFSET { of(group.offset) } else { 0.0 };
            let packed = codes.ld(base + from * STRIDE + word);
            let value = |i: u32| {
                let code = (packed >> (8 * i) & 0xff) as i32 - F::BIAS;
                // Two roundings: the format's exact decoded value.
                let scaled = math::mul(scale, code as f32);
                if F::HAS_OFFSET { scaled + offset } else { scaled }
            };
            if let Some(at) = place(from) {
                T::store4(dst.offset(4 * at), word, [value(0), value(1), value(2), value(3)]);
            }
            round += 1;
        }
    }

    #[inline(always)]
    pub(super) fn blocks<F: BlockFormat, T: Output>(src: Glb<u8>, dst: Glb<T>, n_groups: u32) {
        let (lane, warp_start) = (thread::lane_id(), thread::index_1d() - thread::lane_id());
        // Lanes past the end unpack the last group, for the shuffles.
        let mine = if warp_start + lane < n_groups { warp_start + lane } else { n_groups - 1 };
        let groups = F::GROUPS as u32;
        let group = src.cast::<F>().view(mine / groups).unpack_group_by((mine % groups) as usize, InMemory);
        store_groups::<F, T>(&group, dst, |from| {
            let group = warp_start + from;
            (group < n_groups).then_some(8 * group as usize)
        });
    }
}

macro_rules! entries {
    ([] $($id:ident => $module:ident :: Block,)*) => {
        entries! { @type f32, "f32", TO_F32, [$($id => $module,)*] }
        entries! { @type f16, "f16", TO_F16, [$($id => $module,)*] }
        entries! { @type bf16, "bf16", TO_BF16, [$($id => $module,)*] }

        /// Entry for a source and an output type.
        #[cfg(not(target_arch = "nvptx64"))]
        fn entry(from: quant::FormatId, to: quant::FormatId) -> Option<&'static str> {
            macro_rules! to {
                ($name:expr) => {
                    match to {
                        quant::FormatId::F32 => Some(concat!("dequantise_", $name, "_f32")),
                        quant::FormatId::F16 => Some(concat!("dequantise_", $name, "_f16")),
                        quant::FormatId::BF16 => Some(concat!("dequantise_", $name, "_bf16")),
                        _ => None,
                    }
                };
            }
            match from {
                $(quant::FormatId::$id => to!(stringify!($id)),)*
                _ => None,
            }
        }

        /// Every format to every type, and the edges of a warp's and of a CTA's share.
        #[cfg(not(target_arch = "nvptx64"))]
        const CASES: &[host::Case] = &[
            $(
                host::Case { from: quant::FormatId::$id, to: quant::FormatId::F32, n: 1280 },
                host::Case { from: quant::FormatId::$id, to: quant::FormatId::F16, n: 256 },
                host::Case { from: quant::FormatId::$id, to: quant::FormatId::BF16, n: 256 },
            )*
            host::Case { from: quant::FormatId::Q4_0, to: quant::FormatId::F32, n: 32 },
            host::Case { from: quant::FormatId::Q5_1, to: quant::FormatId::F32, n: 1024 - 32 },
            host::Case { from: quant::FormatId::Q8_0, to: quant::FormatId::F16, n: 4096 },
            host::Case { from: quant::FormatId::Q4_1, to: quant::FormatId::F32, n: 4096 + 32 },
            host::Case { from: quant::FormatId::F32, to: quant::FormatId::F16, n: 508 },
            host::Case { from: quant::FormatId::F32, to: quant::FormatId::BF16, n: 516 },
            host::Case { from: quant::FormatId::F16, to: quant::FormatId::F32, n: 512 },
            host::Case { from: quant::FormatId::BF16, to: quant::FormatId::F16, n: 4 },
        ];

        /// Every format, as far as it matters from memory; one of them to f32 too.
        #[cfg(not(target_arch = "nvptx64"))]
        const BENCH: &[host::Case] = &[
            $(host::Case { from: quant::FormatId::$id, to: quant::FormatId::F16, n: 1 << 24 },)*
            host::Case { from: quant::FormatId::F16, to: quant::FormatId::F32, n: 1 << 24 },
            host::Case { from: quant::FormatId::Q4_0, to: quant::FormatId::F32, n: 8192 * 1024 },
        ];
    };
    (@type $ty:ident, $to:literal, $table:ident, [$($id:ident => $module:ident,)*]) => {
        #[cfg(any(target_arch = "nvptx64", feature = "emu"))]
        kernels! {
            in "dequantise";
            $table: threads(128);
            fn (src: Glb<u8>, dst: Glb<$ty>, n_groups: u32);
            $(concat!("dequantise_", stringify!($id), "_", $to) => gpu::blocks::<formats::$module::Block, $ty>;)*
        }
    };
}

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
use {
    crate::device::Glb,
    half::{bf16, f16},
    quant::formats,
};
quant::for_each_block_format!(entries![]);

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use alloc::{boxed::Box, vec, vec::Vec};

    use half::{bf16, f16};
    use quant::format::GROUP;
    use quant::{FormatId, info, with_format};

    use super::{Shared, THREADS};
    use crate::case::{Buffer, Expected, Kernel, Problem, Random, bytes_of};
    use crate::kernels::mmvq::Weights;
    use crate::kernels::{copy, peer};
    use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};

    /// Arguments; see the contract. `to` is F32, F16 or BF16.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Args {
        pub from: FormatId,
        pub to: FormatId,
        pub src: DevicePtr,
        pub dst: DevicePtr,
        pub n: usize,
    }

    /// One launch for all weights.
    pub fn launch(args: &Args) -> Result<Launch, LaunchError> {
        let kernel = Dequantise::NAME;
        let check = Check(kernel);
        let is_float = |format| matches!(format, FormatId::F32 | FormatId::F16 | FormatId::BF16);
        if is_float(args.from) && is_float(args.to) {
            for (what, at) in [("src", args.src), ("dst", args.dst)] {
                check.aligned(what, at, 16)?;
            }
            let shape = [1, 1, 1, args.n];
            return copy::launch(&copy::Args {
                from: args.from,
                to: args.to,
                src: args.src,
                dst: args.dst,
                shape,
                src_strides: copy::dense(shape),
                dst_strides: copy::dense(shape),
                edge: copy::Edge::None,
            });
        }
        let entry =
            super::entry(args.from, args.to).ok_or(LaunchError::Format { kernel, format: args.from })?;
        let n = check.size("n", args.n)?;
        for (what, at) in [("src", args.src), ("dst", args.dst)] {
            check.aligned(what, at, 16)?;
        }
        let format = info(args.from);
        check.multiple("n", args.n, format.elems, "a multiple of the format's block")?;
        let n_groups = n / GROUP as u32;
        Ok(Launch {
            entry,
            grid: [n_groups.div_ceil(THREADS), 1, 1],
            cta: THREADS,
            cluster: 1,
            smem_bytes: Shared::BYTES,
            params: Params::new().with(args.src).with(args.dst).with(n_groups),
        })
    }

    /// The row in the registry.
    #[derive(Debug)]
    pub struct Dequantise;

    /// One case.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Case {
        pub from: FormatId,
        pub to: FormatId,
        pub n: usize,
    }

    /// The definition: `quant`'s own decoder, rounded to the output type.
    pub fn reference(decoded: &[f32], to: FormatId) -> Vec<u8> {
        match to {
            FormatId::F16 => bytes_of(&decoded.iter().map(|&v| f16::from_f32(v)).collect::<Vec<_>>()),
            FormatId::BF16 => bytes_of(&decoded.iter().map(|&v| bf16::from_f32(v)).collect::<Vec<_>>()),
            _ => bytes_of(decoded),
        }
    }

    impl Kernel for Dequantise {
        const NAME: &'static str = "dequantise";
        type Case = Case;
        const CASES: &'static [Case] = super::CASES;
        const BENCH: &'static [Case] = super::BENCH;
        const NMSE_MAX: f64 = 0.0;
        #[cfg(feature = "emu")]
        const ENTRIES: &'static [&'static [crate::emu::Entry]] =
            &[super::TO_F32, super::TO_F16, super::TO_BF16];

        fn problem(case: &Case, random: &mut Random) -> Problem {
            let Case { from, to, n } = *case;
            let n = n.next_multiple_of(info(from).elems);
            let (blocks, decoded) =
                with_format(from, Weights(random, n)).expect("cases name formats of weights");
            Problem {
                buffers: vec![
                    Buffer::Input(blocks),
                    Buffer::Output(Expected::Exact(reference(&decoded, to))),
                ],
                launches: Box::new(move |at| {
                    Ok(vec![launch(&Args { from, to, src: at[0], dst: at[1], n })?])
                }),
            }
        }

        fn peer(case: &Case) -> Option<alloc::string::String> {
            (case.n == 8192 * 1024).then(|| peer::copy(case.from, case.to, [8192, 512, 2, 1], [0; 4]))
        }

        fn bytes(case: &Case) -> u64 {
            let from = info(case.from);
            (case.n / from.elems * from.bytes + case.n * info(case.to).bytes) as u64
        }

        fn flops(case: &Case) -> u64 {
            2 * case.n as u64
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn only_weights_become_only_floats() {
            let of = |from, to| {
                launch(&Args { from, to, src: DevicePtr(1 << 20), dst: DevicePtr(2 << 20), n: 256 })
            };
            assert!(of(FormatId::F32, FormatId::F16).is_ok() && of(FormatId::Q4_K, FormatId::F16).is_ok());
            for (from, to) in [
                (FormatId::I32, FormatId::F32),
                (FormatId::F32, FormatId::I32),
                (FormatId::F64, FormatId::F32),
                (FormatId::Q4_K, FormatId::Q8_0),
            ] {
                let refused = of(from, to);
                assert!(
                    matches!(refused, Err(LaunchError::Format { kernel: "dequantise", format }) if format == from),
                    "{from:?} to {to:?}: {refused:?}"
                );
            }
        }
    }
}
