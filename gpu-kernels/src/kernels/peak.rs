//! Nothing but tensor-core products: what a device's `mma.sync` reaches, the ceiling that other kernels are compared with.
//!
//! * `out[i]` of thread i, u32: the sum over its accumulators after `rounds` times eight products of matrices of ones, so
//!   8 · 4 · 32 · rounds on bytes and 8 · 4 · 16 · rounds on f16. Every count stays below 2^24, so f32 holds it exactly.
//! * Geometry: 256 threads per CTA, any number of CTAs. A warp has eight products in flight, which hides their latency.
//! * Bytes: 4 per thread. FLOPs per warp and round: 8 · 16 · 8 · 2 times 32 (bytes) or 16 (f16).
//! * Tiers without byte products do the same sums by dp4a.
//! * Tolerance: none.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

#[cfg(not(target_arch = "nvptx64"))]
const THREADS: u32 = 256;
/// Most rounds: 8 products of 32 ones, 2^24 counts.
#[cfg(not(target_arch = "nvptx64"))]
const MAX_ROUNDS: usize = 1 << 16;

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod gpu {
    use crate::device::mma::{self, FragmentA, FragmentB, FragmentF32};
    use crate::device::{Glb, math, thread};

    kernels! {
        in "peak";
        pub(super) ENTRIES: threads(256);
        fn (out: Glb<u32>, rounds: u32);
        "peak_s8" => bytes;
        "peak_f16" => halves;
    }

    #[inline(always)]
    fn bytes(out: Glb<u32>, rounds: u32) {
        // Known only at run time, so that nothing is computed by the compiler.
        let ones = math::opaque(0x0101_0101);
        #[cfg(any(not(target_arch = "nvptx64"), sm_ge_80))]
        let sum = {
            let (a, b) = (FragmentA([ones; 4]), FragmentB([ones; 2]));
            let mut c = [mma::FragmentI32::default(); 8];
            let mut round = 0;
            while round < rounds {
                unroll!(I in 0..8 {
                    mma::mma_s8(&mut c[I], a, b);
                });
                round += 1;
            }
            let mut sum = 0;
            unroll!(I in 0..8 {
                unroll!(J in 0..4 {
                    sum += c[I].0[J] as u32;
                });
            });
            sum
        };
        #[cfg(not(any(not(target_arch = "nvptx64"), sm_ge_80)))]
        let sum = {
            let mut c = [0i32; 4];
            let mut round = 0;
            // 256 dp4a a round: as many products as the tensor cores' form.
            while round < 16 * rounds {
                unroll!(I in 0..4 {
                    unroll!(J in 0..4 {
                        c[J] = math::dp4a(ones, ones, c[J]);
                    });
                });
                round += 1;
            }
            (c[0] + c[1] + c[2] + c[3]) as u32
        };
        out.st(thread::index_1d(), sum);
    }

    #[inline(always)]
    fn halves(out: Glb<u32>, rounds: u32) {
        let ones = math::opaque(0x3c00_3c00);
        let (a, b) = (FragmentA([ones; 4]), FragmentB([ones; 2]));
        let mut c = [FragmentF32::default(); 8];
        let mut round = 0;
        while round < rounds {
            unroll!(I in 0..8 {
                mma::mma_f16(&mut c[I], a, b);
            });
            round += 1;
        }
        let mut sum = 0.0;
        unroll!(I in 0..8 {
            unroll!(J in 0..4 {
                sum += c[I].0[J];
            });
        });
        // Exact: an integer below 2^32.
        out.st(thread::index_1d(), sum as u32);
    }
}

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use alloc::{boxed::Box, vec};

    use super::{MAX_ROUNDS, THREADS};
    use crate::case::{Buffer, Expected, Kernel, Problem, Random, bytes_of};
    use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};

    /// What is multiplied.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Type {
        /// Signed bytes.
        S8,
        /// Halves.
        F16,
    }

    impl Type {
        /// Depth of one product.
        fn k(self) -> u64 {
            match self {
                Type::S8 => 32,
                Type::F16 => 16,
            }
        }
    }

    /// Arguments; see the contract.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Args {
        pub ty: Type,
        pub out: DevicePtr,
        pub n_ctas: usize,
        pub rounds: usize,
    }

    /// One launch.
    pub fn launch(args: &Args) -> Result<Launch, LaunchError> {
        let check = Check(Peak::NAME);
        let (n_ctas, rounds) = (check.size("n_ctas", args.n_ctas)?, check.size("rounds", args.rounds)?);
        if args.rounds > MAX_ROUNDS {
            let (kernel, got) = (Peak::NAME, args.rounds as u64);
            return Err(LaunchError::Shape { kernel, what: "rounds", expected: "at most 65536", got });
        }
        Ok(Launch {
            entry: if args.ty == Type::S8 { "peak_s8" } else { "peak_f16" },
            grid: [n_ctas, 1, 1],
            cta: THREADS,
            cluster: 1,
            smem_bytes: 0,
            params: Params::new().with(args.out).with(rounds),
        })
    }

    /// The row in the registry.
    #[derive(Debug)]
    pub struct Peak;

    /// One case.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Case {
        pub ty: Type,
        pub n_ctas: usize,
        pub rounds: usize,
    }

    impl Kernel for Peak {
        const NAME: &'static str = "peak";
        type Case = Case;
        const CASES: &'static [Case] = &[
            Case { ty: Type::S8, n_ctas: 1, rounds: 1 },
            Case { ty: Type::S8, n_ctas: 2, rounds: 3 },
            Case { ty: Type::F16, n_ctas: 1, rounds: 1 },
            Case { ty: Type::F16, n_ctas: 2, rounds: 3 },
        ];
        // 16 CTAs for each multiprocessor of the largest device here: full waves.
        const BENCH: &'static [Case] = &[
            Case { ty: Type::S8, n_ctas: 2112, rounds: 512 },
            Case { ty: Type::F16, n_ctas: 2112, rounds: 512 },
        ];
        const NMSE_MAX: f64 = 0.0;
        #[cfg(feature = "emu")]
        const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::gpu::ENTRIES];

        fn problem(case: &Case, _random: &mut Random) -> Problem {
            let Case { ty, n_ctas, rounds } = *case;
            let sum = 8 * 4 * ty.k() as u32 * rounds as u32;
            let expected = bytes_of(&vec![sum; n_ctas * THREADS as usize]);
            Problem {
                buffers: vec![Buffer::Output(Expected::Exact(expected))],
                launches: Box::new(move |at| Ok(vec![launch(&Args { ty, out: at[0], n_ctas, rounds })?])),
            }
        }

        fn bytes(case: &Case) -> u64 {
            (4 * case.n_ctas * THREADS as usize) as u64
        }

        fn flops(case: &Case) -> u64 {
            let warps = case.n_ctas as u64 * u64::from(THREADS / 32);
            warps * case.rounds as u64 * 8 * 16 * 8 * 2 * case.ty.k()
        }
    }
}
