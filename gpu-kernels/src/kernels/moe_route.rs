//! Router of a mixture of experts: logits to the best experts of each token and their weights.
//!
//! * Order: best first, ties to the lower expert (floats in their total order). Weights: softmax over all experts, or over
//!   the chosen ones (`softmax_after`); `normalise` divides by their sum (at least 2^-14, ggml's guard); times `scale`.
//! * Shapes: `logits` [n, n_expert] f32; `ids` [n, n_used] i32; `weights` [n, n_used] f32, dense. n_expert at most 512,
//!   n_used at most 32 and n_expert. Nothing overlaps.
//! * Geometry: a warp per token, 4 to a CTA; lane l holds the experts l, l + 32, ….
//! * Bytes: 4 per logit, 8 per choice. FLOPs: n_used comparisons and one exponential per logit.
//! * Tolerance: ids exact; weights NMSE 1e-12, from `ex2.approx`.
//!
//! Done for speed: one launch instead of softmax, sort, gather, sum and division; the logits are read once.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

const THREADS: u32 = 128;

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod gpu {
    use crate::device::{Glb, math, thread, warp};
    use crate::kernels::order::{self, Element};

    /// Bits of `flags`.
    const SOFTMAX_AFTER: u32 = 1;
    const NORMALISE: u32 = 2;
    /// The smallest normal half.
    const LEAST_SUM: f32 = 6.103_515_6e-5;

    /// The float's place in the total order, NaN included.
    #[inline(always)]
    fn total_key(x: f32) -> u32 {
        let bits = x.to_bits();
        if bits >> 31 == 0 { bits | 0x8000_0000 } else { !bits }
    }

    #[inline(always)]
    fn route<const PER_LANE: usize>(
        logits: Glb<f32>,
        ids: Glb<i32>,
        weights: Glb<f32>,
        n: u32,
        n_expert: u32,
        n_used: u32,
        flags: u32,
        scale: f32,
    ) {
        let (lane, token) = (thread::lane_id(), thread::index_1d() / 32);
        // A whole warp leaves.
        if token >= n {
            return;
        }
        let logits = logits.offset(token as usize * n_expert as usize);
        let mut values = [f32::NEG_INFINITY; PER_LANE];
        // A bit per expert of this lane that may still be chosen.
        let mut left = 0u32;
        unroll!(J in 0..16 {
            if J < PER_LANE && lane + 32 * (J as u32) < n_expert {
                values[J] = logits.ld_nc(lane + 32 * J as u32);
                left |= 1 << J;
            }
        });

        // The best that is left, n_used times; lane s keeps the s-th.
        let mut chosen: Element = order::NOTHING;
        let mut logit = 0.0;
        let mut slot = 0;
        while slot < n_used {
            let mut best = order::NOTHING;
            unroll!(J in 0..16 {
                if J < PER_LANE && left >> J & 1 == 1 {
                    best = order::best(best, (total_key(values[J]), lane + 32 * J as u32));
                }
            });
            best = order::warp_best(best);
            let mut owned = 0.0;
            unroll!(J in 0..16 {
                if J < PER_LANE && best.1 == lane + 32 * J as u32 {
                    left &= !(1 << J);
                    owned = values[J];
                }
            });
            let of_best = f32::from_bits(warp::shfl(owned.to_bits(), best.1 % 32));
            if lane == slot {
                (chosen, logit) = (best, of_best);
            }
            slot += 1;
        }

        let max = f32::from_bits(warp::shfl(logit.to_bits(), 0));
        let exp = |logit: f32| math::ex2((logit - max) * math::LOG2_E);
        let mine = lane < n_used;
        let weight = if mine { exp(logit) } else { 0.0 };
        let total = if flags & SOFTMAX_AFTER != 0 {
            warp::sum_f32(weight)
        } else {
            let mut sum = 0.0;
            unroll!(J in 0..16 {
                if J < PER_LANE && lane + 32 * (J as u32) < n_expert {
                    sum += exp(values[J]);
                }
            });
            warp::sum_f32(sum)
        };
        let mut weight = weight / total;
        if flags & NORMALISE != 0 {
            weight /= math::fmax(warp::sum_f32(weight), LEAST_SUM);
        }
        if mine {
            ids.st(token * n_used + lane, chosen.1 as i32);
            weights.st(token * n_used + lane, weight * scale);
        }
    }

    kernels! {
        in "moe_route";
        pub(super) ENTRIES: threads(128);
        fn (logits: Glb<f32>, ids: Glb<i32>, weights: Glb<f32>, n: u32, n_expert: u32, n_used: u32, flags: u32,
            factor: f32);
        "moe_route_32" => route::<1>;
        "moe_route_64" => route::<2>;
        "moe_route_128" => route::<4>;
        "moe_route_256" => route::<8>;
        "moe_route_512" => route::<16>;
    }
}

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use alloc::{boxed::Box, vec, vec::Vec};

    use super::THREADS;
    use crate::case::{Buffer, Expected, Kernel, Problem, Random, bytes_of};
    use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};

    /// How logits become weights.
    #[derive(Clone, Copy, Debug, PartialEq)]
    #[allow(missing_docs)] // the contract's names
    pub struct Weighting {
        pub softmax_after: bool,
        pub normalise: bool,
        pub scale: f32,
    }

    /// The definition: one token's experts and weights.
    pub fn reference(logits: &[f32], n_used: usize, weighting: Weighting) -> (Vec<i32>, Vec<f64>) {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        order.truncate(n_used);
        let max = f64::from(logits[order[0]]);
        let exp = |i: usize| libm::exp(f64::from(logits[i]) - max);
        let total: f64 = if weighting.softmax_after {
            order.iter().map(|&i| exp(i)).sum()
        } else {
            (0..logits.len()).map(exp).sum()
        };
        let mut weights: Vec<f64> = order.iter().map(|&i| exp(i) / total).collect();
        if weighting.normalise {
            let sum = weights.iter().sum::<f64>().max(6.103_515_625e-5);
            weights.iter_mut().for_each(|w| *w /= sum);
        }
        weights.iter_mut().for_each(|w| *w *= f64::from(weighting.scale));
        (order.iter().map(|&i| i as i32).collect(), weights)
    }

    /// Arguments; see the contract.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Args {
        pub logits: DevicePtr,
        pub ids: DevicePtr,
        pub weights: DevicePtr,
        pub n: usize,
        pub n_expert: usize,
        pub n_used: usize,
        pub weighting: Weighting,
    }

    /// One launch for all tokens.
    pub fn launch(args: &Args) -> Result<Launch, LaunchError> {
        let check = Check(MoeRoute::NAME);
        let n = check.size("n", args.n)?;
        let entry = match args.n_expert {
            1..=32 => "moe_route_32",
            33..=64 => "moe_route_64",
            65..=128 => "moe_route_128",
            129..=256 => "moe_route_256",
            257..=512 => "moe_route_512",
            got => return Err(check.shape("n_expert", "1 to 512", got)),
        };
        if args.n_used == 0 || args.n_used > args.n_expert.min(32) {
            return Err(check.shape("n_used", "1 to 32, at most n_expert", args.n_used));
        }
        for (what, at) in [("logits", args.logits), ("ids", args.ids), ("weights", args.weights)] {
            check.aligned(what, at, 4)?;
        }
        let Weighting { softmax_after, normalise, scale } = args.weighting;
        let flags = u32::from(softmax_after) | u32::from(normalise) << 1;
        let params = Params::new().with(args.logits).with(args.ids).with(args.weights);
        Ok(Launch {
            entry,
            grid: [n.div_ceil(THREADS / 32), 1, 1],
            cta: THREADS,
            cluster: 1,
            smem_bytes: 0,
            params: params
                .with(n)
                .with(args.n_expert as u32)
                .with(args.n_used as u32)
                .with(flags)
                .with(scale),
        })
    }

    /// The row in the registry.
    #[derive(Debug)]
    pub struct MoeRoute;

    /// One case.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Case {
        pub n: usize,
        pub n_expert: usize,
        pub n_used: usize,
        pub weighting: Weighting,
    }

    const fn case(
        n: usize,
        n_expert: usize,
        n_used: usize,
        [softmax_after, normalise]: [bool; 2],
        scale: f32,
    ) -> Case {
        Case { n, n_expert, n_used, weighting: Weighting { softmax_after, normalise, scale } }
    }

    impl Kernel for MoeRoute {
        const NAME: &'static str = "moe_route";
        type Case = Case;
        const CASES: &'static [Case] = &[
            case(1, 8, 2, [false, true], 1.0),
            case(5, 32, 4, [true, false], 1.0),
            case(3, 33, 6, [false, false], 2.5),
            case(3, 64, 8, [false, true], 1.0),
            case(9, 128, 8, [false, true], 1.0),
            case(2, 160, 6, [false, false], 16.0),
            case(2, 384, 8, [true, true], 2.0),
            case(1, 512, 32, [false, true], 1.0),
            case(2, 3, 3, [true, false], 1.0),
        ];
        const NMSE_MAX: f64 = 1e-12;
        const BENCH: &'static [Case] =
            &[case(1, 128, 8, [false, true], 1.0), case(4096, 128, 8, [false, true], 1.0)];
        #[cfg(feature = "emu")]
        const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::gpu::ENTRIES];

        fn problem(case: &Case, random: &mut Random) -> Problem {
            let Case { n, n_expert, n_used, weighting } = *case;
            let mut logits = random.values(n * n_expert);
            // Ties, of the largest among them.
            for row in logits.chunks_mut(n_expert) {
                (row[0], row[n_expert - 1]) = (5.0, 5.0);
                row[n_expert / 2] = row[n_expert / 3];
            }
            let routed: Vec<_> =
                logits.chunks(n_expert).map(|row| reference(row, n_used, weighting)).collect();
            let ids: Vec<i32> = routed.iter().flat_map(|(ids, _)| ids.clone()).collect();
            let weights = routed.iter().flat_map(|(_, weights)| weights.clone()).collect();
            Problem {
                buffers: vec![
                    Buffer::Input(bytes_of(&logits)),
                    Buffer::Output(Expected::Exact(bytes_of(&ids))),
                    Buffer::Output(Expected::F32(weights)),
                ],
                launches: Box::new(move |at| {
                    let (logits, ids, weights) = (at[0], at[1], at[2]);
                    Ok(vec![launch(&Args { logits, ids, weights, n, n_expert, n_used, weighting })?])
                }),
            }
        }

        fn bytes(case: &Case) -> u64 {
            (case.n * (4 * case.n_expert + 8 * case.n_used)) as u64
        }

        fn flops(case: &Case) -> u64 {
            (case.n * case.n_expert * (case.n_used + 1)) as u64
        }
    }
}
