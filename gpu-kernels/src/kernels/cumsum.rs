//! Running sums of each row: `y[i] = x[0] + … + x[i]`.
//!
//! * Shapes: `x`, `y` [n_rows, n] f32, dense. `y` may be `x`.
//! * Geometry: a CTA of 1024 threads per row, 1024 elements at a time.
//! * Bytes: 8 per element. FLOPs: 1 per element.
//! * Tolerance: NMSE 1e-11: f32 sums of 1024 neighbours, added up in order.
//! * The order of the sums depends on n alone.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

const THREADS: u32 = 1024;

smem! {
    struct Shared {
        /// A sum per warp, for this round and the next in turn.
        sums: [f32; 2 * 32],
    }
}

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod gpu {
    use super::{Shared, THREADS};
    use crate::device::sync::sync_threads;
    use crate::device::{Glb, thread, warp};

    /// The sum of this lane and those below.
    #[inline(always)]
    #[track_caller]
    fn running(mut sum: f32) -> f32 {
        unroll!(S in 0..8 {
            if S < 5 {
                let below = f32::from_bits(warp::shfl_up(sum.to_bits(), 1 << S));
                sum += if thread::lane_id() >= 1 << S { below } else { 0.0 };
            }
        });
        sum
    }

    #[inline(always)]
    fn cumsum(x: Glb<f32>, y: Glb<f32>, n: u32) {
        let start = thread::block_idx_x() as usize * n as usize;
        let (x, y) = (x.offset(start), y.offset(start));
        let (lane, warp_id, sums) = (thread::lane_id(), thread::warp_id(), Shared::sums());
        let (mut carried, mut first, mut half) = (0.0f32, 0, 0);
        while first < n {
            let i = first + thread::thread_idx_x();
            let of_warp = running(if i < n { x.ld(i) } else { 0.0 });
            if lane == 31 {
                sums.st(half * 32 + warp_id, of_warp);
            }
            sync_threads();
            // Every warp adds up all warps alike; lane w then has what warp w ends with.
            let of_warps = running(sums.ld(half * 32 + lane));
            let before = f32::from_bits(warp::shfl(of_warps.to_bits(), (warp_id + 31) % 32));
            let before = if warp_id == 0 { 0.0 } else { before };
            if i < n {
                y.st(i, carried + (before + of_warp));
            }
            carried += f32::from_bits(warp::shfl(of_warps.to_bits(), 31));
            first += THREADS;
            half ^= 1;
        }
    }

    kernels! {
        in "cumsum";
        pub(super) ENTRIES: threads(1024);
        fn (x: Glb<f32>, y: Glb<f32>, n: u32);
        "cumsum_f32" => cumsum;
    }
}

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use alloc::{boxed::Box, vec, vec::Vec};

    use super::{Shared, THREADS};
    use crate::case::{Buffer, Expected, Kernel, Problem, Random, bytes_of};
    use crate::kernels::peer;
    use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};

    /// The definition: one row.
    pub fn reference(x: &[f32]) -> Vec<f64> {
        let mut sum = 0.0;
        x.iter()
            .map(|&x| {
                sum += f64::from(x);
                sum
            })
            .collect()
    }

    /// Arguments; see the contract.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Args {
        pub x: DevicePtr,
        pub y: DevicePtr,
        pub n_rows: usize,
        pub n: usize,
    }

    /// One launch for all rows.
    pub fn launch(args: &Args) -> Result<Launch, LaunchError> {
        let check = Check(Cumsum::NAME);
        let (n_rows, n) = (check.size("n_rows", args.n_rows)?, check.size("n", args.n)?);
        for (what, at) in [("x", args.x), ("y", args.y)] {
            check.aligned(what, at, 4)?;
        }
        Ok(Launch {
            entry: "cumsum_f32",
            grid: [n_rows, 1, 1],
            cta: THREADS,
            cluster: 1,
            smem_bytes: Shared::BYTES,
            params: Params::new().with(args.x).with(args.y).with(n),
        })
    }

    /// The row in the registry.
    #[derive(Debug)]
    pub struct Cumsum;

    /// One case.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Case {
        pub n_rows: usize,
        pub n: usize,
    }

    impl Kernel for Cumsum {
        const NAME: &'static str = "cumsum";
        type Case = Case;
        const CASES: &'static [Case] = &[
            Case { n_rows: 1, n: 1 },
            Case { n_rows: 3, n: 1023 },
            Case { n_rows: 2, n: 1024 },
            Case { n_rows: 1, n: 5001 },
        ];
        const NMSE_MAX: f64 = 1e-11;
        const BENCH: &'static [Case] = &[
            Case { n_rows: 256, n: 16_384 },
            Case { n_rows: 16, n: 131_072 },
            Case { n_rows: 1, n: 131_072 },
        ];
        #[cfg(feature = "emu")]
        const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::gpu::ENTRIES];

        fn problem(case: &Case, random: &mut Random) -> Problem {
            let Case { n_rows, n } = *case;
            let x = random.values(n_rows * n);
            let expected = x.chunks(n).flat_map(reference).collect();
            Problem {
                buffers: vec![Buffer::Input(bytes_of(&x)), Buffer::Output(Expected::F32(expected))],
                launches: Box::new(move |at| Ok(vec![launch(&Args { x: at[0], y: at[1], n_rows, n })?])),
            }
        }

        fn peer(case: &Case) -> Option<alloc::string::String> {
            Some(peer::rows("CUMSUM", case.n, case.n_rows))
        }

        fn bytes(case: &Case) -> u64 {
            8 * (case.n_rows * case.n) as u64
        }

        fn flops(case: &Case) -> u64 {
            (case.n_rows * case.n) as u64
        }
    }
}
