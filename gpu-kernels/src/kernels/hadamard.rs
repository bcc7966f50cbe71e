//! Walsh and Hadamard's rotation of every `width` neighbours: `y[i] = Σ ±x[j] / √width` over the neighbours j, minus where
//! `i & j` has an odd number of ones. It is its own inverse.
//!
//! * Shapes: `x`, `y` f32, n elements, n a multiple of `width`, a power of two from 4 to 1,024. `y` may be `x`. 16-byte
//!   aligned.
//! * Geometry: 256 threads, a float4 each. `kv_store` and `flash` rotate values that their lanes hold alike by the same
//!   functions, to the same bits.
//! * Order: sums and differences of elements 1, 2, 4, … apart, one distance after the other, then the factor, rounded by
//!   itself. So bits depend on the neighbours alone.
//! * Bytes: 8 per element. FLOPs: log2(width) + 1 per element.
//! * Tolerance: NMSE 1e-12: as many roundings as there are distances, and one.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

const THREADS: u32 = 256;
/// Widest rotation: what the lanes of a CTA hold.
#[cfg(not(target_arch = "nvptx64"))]
pub(crate) const MAX_WIDTH: usize = 4 * THREADS as usize;
/// Widest one that needs no shared memory.
pub(crate) const WARP_WIDTH: u32 = 128;

/// Shared memory of a CTA that rotates by this width (0: not at all).
#[cfg(not(target_arch = "nvptx64"))]
pub(crate) const fn smem_bytes(width: usize) -> u32 {
    if width > WARP_WIDTH as usize { 16 * THREADS } else { 0 }
}

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
pub(crate) mod gpu {
    use super::{THREADS, WARP_WIDTH};
    use crate::device::{F32x4, Glb, Smem, math, sync, thread, warp};

    /// One over the root of a power of two.
    #[inline(always)]
    fn factor(width: u32) -> f32 {
        let power = width.trailing_zeros();
        let whole = f32::from_bits((127 - power / 2) << 23);
        if power.is_multiple_of(2) { whole } else { whole * core::f32::consts::FRAC_1_SQRT_2 }
    }

    /// The sum where a lane has the lower of two elements, the difference where it has the upper.
    #[inline(always)]
    fn combine(v: [f32; 4], other: [f32; 4], upper: bool) -> [f32; 4] {
        let mut combined = [0.0; 4];
        unroll!(J in 0..4 {
            combined[J] = if upper { other[J] - v[J] } else { v[J] + other[J] };
        });
        combined
    }

    /// The distances that a warp has.
    #[inline(always)]
    #[track_caller]
    fn sums_within_warp(v: [f32; 4], width: u32) -> [f32; 4] {
        let [a, b, c, d] = v;
        let [a, b, c, d] = [a + b, a - b, c + d, c - d];
        let mut v = [a + c, b + d, a - c, b - d];
        let lane = thread::lane_id();
        let mut lanes = 1;
        while lanes < thread::WARP && 4 * lanes < width {
            let other = v.map(|v| f32::from_bits(warp::shfl_xor(v.to_bits(), lanes)));
            v = combine(v, other, lane & lanes != 0);
            lanes *= 2;
        }
        v
    }

    /// Rotates a warp's float4s, neighbours in neighbouring lanes, by a width of at most 128. The warp calls together.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn rotate_in_warp(v: [f32; 4], width: u32) -> [f32; 4] {
        sums_within_warp(v, width).map(|v| math::mul(v, factor(width)))
    }

    /// Rotates a CTA's float4s, neighbours in neighbouring threads. Each warp calls together, for widths above 128, which
    /// take shared memory from its start on, the CTA.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn rotate(v: [f32; 4], width: u32) -> [f32; 4] {
        let mut v = sums_within_warp(v, width);
        let mut distance = WARP_WIDTH;
        while distance < width {
            let (thread, threads) = (thread::thread_idx_x(), distance / 4);
            let room = Smem::<F32x4>::dynamic(0, THREADS);
            room.st(thread, F32x4(v));
            sync::sync_threads();
            v = combine(v, room.ld(thread ^ threads).0, thread & threads != 0);
            sync::sync_threads();
            distance *= 2;
        }
        v.map(|v| math::mul(v, factor(width)))
    }

    #[inline(always)]
    fn hadamard(x: Glb<F32x4>, y: Glb<F32x4>, width: u32, n4: u32) {
        let i = thread::index_1d();
        let mut v = [0.0; 4];
        if i < n4 {
            v = x.ld(i).0;
        }
        let v = rotate(v, width);
        if i < n4 {
            y.st(i, F32x4(v));
        }
    }

    kernels! {
        in "hadamard";
        pub(super) ENTRIES: threads(256);
        fn (x: Glb<F32x4>, y: Glb<F32x4>, width: u32, n4: u32);
        "hadamard_f32" => hadamard;
    }
}

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use alloc::{boxed::Box, vec, vec::Vec};

    use super::{MAX_WIDTH, THREADS, smem_bytes};
    use crate::case::{Buffer, Expected, Kernel, Problem, Random, bytes_of};
    use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};

    /// The definition: `width` neighbours.
    pub fn reference(x: &[f32]) -> Vec<f64> {
        let size = 1.0 / libm::sqrt(x.len() as f64);
        let sign = |i: usize, j: usize| if (i & j).count_ones().is_multiple_of(2) { size } else { -size };
        let element = |i| x.iter().enumerate().map(|(j, &x)| sign(i, j) * f64::from(x)).sum();
        (0..x.len()).map(element).collect()
    }

    /// `width` neighbours to the kernel's bits.
    pub(crate) fn rotated(x: &mut [f32]) {
        let mut distance = 1;
        while distance < x.len() {
            for pairs in x.chunks_exact_mut(2 * distance) {
                let (low, high) = pairs.split_at_mut(distance);
                low.iter_mut().zip(high).for_each(|(a, b)| (*a, *b) = (*a + *b, *a - *b));
            }
            distance *= 2;
        }
        let power = x.len().trailing_zeros();
        let odd = if power.is_multiple_of(2) { 1.0 } else { core::f32::consts::FRAC_1_SQRT_2 };
        let size = odd / (1 << (power / 2)) as f32;
        x.iter_mut().for_each(|x| *x *= size);
    }

    /// Arguments; see the contract.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Args {
        pub x: DevicePtr,
        pub y: DevicePtr,
        pub n: usize,
        pub width: usize,
    }

    /// Checks a width, and that it divides `n`.
    pub(crate) fn check_width(check: Check, n: usize, width: usize) -> Result<u32, LaunchError> {
        if !width.is_power_of_two() || !(4..=MAX_WIDTH).contains(&width) {
            return Err(check.shape("width", "a power of two from 4 to 1024", width));
        }
        check.multiple("n", n, width, "a multiple of the width")?;
        check.size("width", width)
    }

    /// One launch for all elements.
    pub fn launch(args: &Args) -> Result<Launch, LaunchError> {
        let check = Check(Hadamard::NAME);
        let width = check_width(check, args.n, args.width)?;
        let n4 = check.size("n", args.n)? / 4;
        check.aligned("x", args.x, 16)?;
        check.aligned("y", args.y, 16)?;
        Ok(Launch {
            entry: "hadamard_f32",
            grid: [n4.div_ceil(THREADS), 1, 1],
            cta: THREADS,
            cluster: 1,
            smem_bytes: smem_bytes(args.width),
            params: Params::new().with(args.x).with(args.y).with(width).with(n4),
        })
    }

    /// The row in the registry.
    #[derive(Debug)]
    pub struct Hadamard;

    /// One case.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Case {
        pub n: usize,
        pub width: usize,
    }

    impl Kernel for Hadamard {
        const NAME: &'static str = "hadamard";
        type Case = Case;
        const CASES: &'static [Case] = &[
            Case { n: 4, width: 4 },
            Case { n: 3 * 64, width: 64 },
            Case { n: 11 * 128, width: 128 },
            Case { n: 5 * 256, width: 256 },
            Case { n: 3 * 512, width: 512 },
            Case { n: 2 * 1024, width: 1024 },
        ];
        const NMSE_MAX: f64 = 1e-12;
        /// Queries of an 8B model: of a token, of a prompt.
        const BENCH: &'static [Case] = &[Case { n: 4096, width: 128 }, Case { n: 512 * 4096, width: 128 }];
        #[cfg(feature = "emu")]
        const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::gpu::ENTRIES];

        fn problem(case: &Case, random: &mut Random) -> Problem {
            let Case { n, width } = *case;
            let x = random.values(n);
            let mut bits = x.clone();
            bits.chunks_exact_mut(width).for_each(rotated);
            let is_timing = random.is_timing();
            let expected = if is_timing {
                Expected::Unchecked(4 * n)
            } else {
                Expected::F32(x.chunks_exact(width).flat_map(reference).collect())
            };
            let in_place = if is_timing { bytes_of(&x) } else { bytes_of(&bits) };
            Problem {
                buffers: vec![
                    Buffer::Input(bytes_of(&x)),
                    Buffer::Output(expected),
                    Buffer::Changed(bytes_of(&x), Expected::Exact(in_place)),
                ],
                launches: Box::new(move |at| {
                    let apart = launch(&Args { x: at[0], y: at[1], n, width })?;
                    let in_place = launch(&Args { x: at[2], y: at[2], n, width })?;
                    Ok(if is_timing { vec![apart] } else { vec![apart, in_place] })
                }),
            }
        }

        fn bytes(case: &Case) -> u64 {
            8 * case.n as u64
        }

        fn flops(case: &Case) -> u64 {
            case.n as u64 * u64::from(case.width.trailing_zeros() + 1)
        }
    }
}
