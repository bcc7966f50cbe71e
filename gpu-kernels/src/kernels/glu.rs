//! Gated activations: `y = f(gate) · up`, row by row.
//!
//! * f is a `Function`, or gpt-oss's form ([`Kind::SwigluOai`]): gate clamped to at most `limit`, up to ±limit,
//!   `gate · sigmoid(alpha · gate) · (up + 1)`.
//! * Shapes: `gate`, `up` [n_rows, n] f32 with strides between rows (so that both may be halves of one matrix), `y`
//!   [n_rows, n] dense, in any `Output` type; 16-byte aligned, n and strides multiples of 4. `y` (f32, equal strides) may
//!   be `gate` or `up`; nothing else overlaps.
//! * Geometry: 128 threads per CTA, a warp per span of 256 of a row; lane l takes the float4s l and l + 32 of it.
//! * Bytes: 8 per element, and `y`'s own. FLOPs: 4 per element.
//! * Tolerance: NMSE 1e-12, from `ex2.approx` and `rcp.approx`. Every output type is bit-equal to the f32 output converted
//!   by its own kernel.
//!
//! Done for speed: (1) four 16-byte loads in flight per thread, (2) the product that follows finds its activations
//! quantised.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

const THREADS: u32 = 128;
/// The number of gpt-oss's form, beside those of functions.
const OAI: u32 = u32::MAX;

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod gpu {
    use half::{bf16, f16};

    use super::OAI;
    use crate::device::{F32x4, Glb, U32x2, math, thread};
    use crate::kernels::activation::apply;
    use crate::kernels::output::SPAN4;
    use crate::kernels::output::gpu::{Output, Q8_0, Q8_1, read};

    #[inline(always)]
    fn gated(kind: u32, gate: [[f32; 4]; 2], up: [[f32; 4]; 2], alpha: f32, limit: f32) -> [[f32; 4]; 2] {
        let mut y = gate;
        if kind == OAI {
            unroll!(H in 0..2 {
                unroll!(J in 0..4 {
                    let gate = math::fmin(gate[H][J], limit);
                    let up = math::fmin(math::fmax(up[H][J], -limit), limit);
                    y[H][J] = math::mul(gate * math::sigmoid(alpha * gate), up + 1.0);
                });
            });
        } else {
            y = apply(kind, gate, 0.0, 0.0);
            unroll!(H in 0..2 {
                unroll!(J in 0..4 {
                    y[H][J] = math::mul(y[H][J], up[H][J]);
                });
            });
        }
        y
    }

    #[inline(always)]
    fn glu<T: Output>(
        gate: Glb<F32x4>,
        up: Glb<F32x4>,
        y: Glb<u32>,
        scales: Glb<U32x2>,
        n_rows: u32,
        n4: u32,
        gate_stride4: u32,
        up_stride4: u32,
        kind: u32,
        alpha: f32,
        limit: f32,
    ) {
        let spans = n4.div_ceil(SPAN4);
        let index = thread::index_1d() / 32;
        let (row, span) = (index / spans, index % spans);
        // A whole warp leaves.
        if row >= n_rows {
            return;
        }
        let gate = read(gate.offset(row as usize * gate_stride4 as usize), span, n4, 0.0);
        let up = read(up.offset(row as usize * up_stride4 as usize), span, n4, 0.0);
        let (first, end) = (row * n4 + span * SPAN4, row * n4 + n4);
        T::store(gated(kind, gate, up, alpha, limit), 1.0, y, scales, first, end);
    }

    kernels! {
        in "glu";
        pub(super) ENTRIES: threads(128);
        fn (gate: Glb<F32x4>, up: Glb<F32x4>, y: Glb<u32>, scales: Glb<U32x2>, n_rows: u32, n4: u32,
            gate_stride4: u32, up_stride4: u32, kind: u32, alpha: f32, limit: f32);
        "glu_f32" => glu::<f32>;
        "glu_f16" => glu::<f16>;
        "glu_bf16" => glu::<bf16>;
        "glu_Q8_0" => glu::<Q8_0>;
        "glu_Q8_1" => glu::<Q8_1>;
    }
}

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use alloc::{vec, vec::Vec};

    use super::{OAI, THREADS};
    use crate::case::{Buffer, Kernel, Problem, Random, bytes_of};
    use crate::kernels::activation::Function;
    use crate::kernels::output::{self, Output, SPAN4};
    use crate::kernels::quantise_act;
    use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};

    /// How gate and up combine.
    #[derive(Clone, Copy, Debug, PartialEq)]
    pub enum Kind {
        /// `f(gate) · up`, for a function without parameters.
        Plain(Function),
        /// gpt-oss's form.
        SwigluOai {
            /// Slope inside the sigmoid.
            alpha: f32,
            /// Clamp.
            limit: f32,
        },
    }

    /// The definition of one element.
    pub fn reference(kind: Kind, gate: f32, up: f32) -> f64 {
        let (gate, up) = (f64::from(gate), f64::from(up));
        match kind {
            Kind::Plain(function) => function.reference(gate, 0.0, 0.0) * up,
            Kind::SwigluOai { alpha, limit } => {
                let (alpha, limit) = (f64::from(alpha), f64::from(limit));
                let (gate, up) = (gate.min(limit), up.clamp(-limit, limit));
                gate / (1.0 + libm::exp(-alpha * gate)) * (up + 1.0)
            }
        }
    }

    /// Arguments; see the contract. Strides are in elements; `scales` of a float output is [`DevicePtr::NULL`].
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Args {
        pub kind: Kind,
        pub gate: DevicePtr,
        pub gate_stride: usize,
        pub up: DevicePtr,
        pub up_stride: usize,
        pub output: Output,
        pub y: DevicePtr,
        pub scales: DevicePtr,
        pub n_rows: usize,
        pub n: usize,
    }

    /// One launch for all rows.
    pub fn launch(args: &Args) -> Result<Launch, LaunchError> {
        let check = Check(Glu::NAME);
        let n4 = check.size("n", args.n)? / 4;
        let n_rows = check.size("n_rows", args.n_rows)?;
        args.output.check(check, args.n, args.y, args.scales)?;
        let stride4 = |what: &'static str, stride: usize| {
            check.multiple(what, stride, 4, "a multiple of 4")?;
            Ok(check.size(what, stride)? / 4)
        };
        let strides = [stride4("gate_stride", args.gate_stride)?, stride4("up_stride", args.up_stride)?];
        check.size("n_rows * n", args.n_rows.saturating_mul(args.n))?;
        for (what, at) in [("gate", args.gate), ("up", args.up)] {
            check.aligned(what, at, 16)?;
        }
        let (kind, alpha, limit) = match args.kind {
            Kind::Plain(function) => (function as u32, 0.0, 0.0),
            Kind::SwigluOai { alpha, limit } => (OAI, alpha, limit),
        };
        let names = ["glu_f32", "glu_f16", "glu_bf16", "glu_Q8_0", "glu_Q8_1"];
        let warps = check.size("spans", args.n_rows * n4.div_ceil(SPAN4) as usize)?;
        let params = Params::new().with(args.gate).with(args.up).with(args.y).with(args.scales);
        let params = params.with(n_rows).with(n4).with(strides[0]).with(strides[1]);
        Ok(Launch {
            entry: names[args.output.index()],
            grid: [warps.div_ceil(THREADS / 32), 1, 1],
            cta: THREADS,
            cluster: 1,
            smem_bytes: 0,
            params: params.with(kind).with(alpha).with(limit),
        })
    }

    /// The row in the registry.
    #[derive(Debug)]
    pub struct Glu;

    /// One case.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Case {
        pub kind: Kind,
        pub n_rows: usize,
        pub n: usize,
        pub halves: bool,
        pub output: Output,
    }

    const fn case(kind: Kind, n_rows: usize, n: usize, halves: bool, output: Output) -> Case {
        Case { kind, n_rows, n, halves, output }
    }
    const SILU: Kind = Kind::Plain(Function::Silu);
    const SWIGLU_OAI: Kind = Kind::SwigluOai { alpha: 1.702, limit: 0.75 };

    impl Kernel for Glu {
        const NAME: &'static str = "glu";
        type Case = Case;
        const CASES: &'static [Case] = &[
            case(SILU, 1, 4, false, Output::F32),
            case(SILU, 3, 252, true, Output::F32),
            case(SILU, 2, 1536, false, Output::Act(quantise_act::Kind::Q8_0)),
            case(SILU, 5, 288, true, Output::Act(quantise_act::Kind::Q8_1)),
            case(SILU, 2, 2304, true, Output::Act(quantise_act::Kind::Q8_0)),
            case(Kind::Plain(Function::Gelu), 1, 1028, false, Output::F32),
            case(Kind::Plain(Function::Gelu), 3, 512, false, Output::F16),
            case(Kind::Plain(Function::GeluErf), 2, 260, true, Output::Bf16),
            case(Kind::Plain(Function::GeluQuick), 2, 256, false, Output::F32),
            case(Kind::Plain(Function::Relu), 1, 224, false, Output::Act(quantise_act::Kind::Q8_0)),
            case(SWIGLU_OAI, 4, 320, true, Output::F32),
            case(SWIGLU_OAI, 4, 512, false, Output::Act(quantise_act::Kind::Q8_0)),
        ];
        const NMSE_MAX: f64 = 1e-12;
        const BENCH: &'static [Case] = &[
            case(SILU, 1, 14_336, false, Output::Act(quantise_act::Kind::Q8_0)),
            case(SILU, 512, 14_336, false, Output::F32),
            case(SILU, 512, 14_336, false, Output::Act(quantise_act::Kind::Q8_0)),
            case(Kind::Plain(Function::GeluErf), 512, 14_336, false, Output::F32),
            case(SILU, 2048, 17_408, false, Output::F32),
        ];
        #[cfg(feature = "emu")]
        const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::gpu::ENTRIES];

        fn problem(case: &Case, random: &mut Random) -> Problem {
            let Case { kind, n_rows, n, halves, output } = *case;
            // Gate and up of a row follow each other, or lie in two arrays; either way half of the values each.
            let values = random.values(2 * n_rows * n);
            let (stride, up_start) = if halves { (2 * n, n) } else { (n, n_rows * n) };
            let at = |r: usize, i: usize| r * stride + i;
            let expected: Vec<f64> = (0..n_rows)
                .flat_map(|r| (0..n).map(move |i| at(r, i)))
                .map(|i| reference(kind, values[i], values[up_start + i]))
                .collect();
            let buffers = vec![Buffer::Input(bytes_of(&values))];
            let problem =
                output::problem(output, [n_rows, n], buffers, expected, move |at, output, [y, scales]| {
                    launch(&Args {
                        kind,
                        gate: at[0],
                        gate_stride: stride,
                        up: at[0].offset(4 * up_start as u64),
                        up_stride: stride,
                        output,
                        y,
                        scales,
                        n_rows,
                        n,
                    })
                });
            if random.is_timing() { output::last_launch(problem) } else { problem }
        }

        fn peer(case: &Case) -> Option<alloc::string::String> {
            let same = matches!(case.kind, SILU) && !case.halves && matches!(case.output, Output::F32);
            same.then(|| alloc::format!("SWIGLU(type=f32,ne_a=[{},{},1,1],v=0,split", case.n, case.n_rows))
        }

        fn bytes(case: &Case) -> u64 {
            let (y, scales) = case.output.bytes(case.n_rows * case.n);
            (8 * case.n_rows * case.n + y + scales) as u64
        }

        fn flops(case: &Case) -> u64 {
            4 * (case.n_rows * case.n) as u64
        }
    }
}
