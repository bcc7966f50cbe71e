//! What a kernel of rows writes: f32, f16, bf16, or quantised activations (the layout of
//! [`quantise_act`](super::quantise_act)), so that the product that follows needs no pass of its own to convert them.
//!
//! A warp writes 256 neighbouring values at a time, a **span**: lane l holds the float4s l and l + 32 of it. A row is
//! spans in order, the last may be short. What is stored is a value times a factor of its row (mostly 1). With 1 the
//! quantised values are bit-equal to those of `quantise_act` on the f32 output; else codes are chosen before the factor
//! is known, and it goes to the scales, before they are rounded.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

/// float4s of a span.
pub(crate) const SPAN4: u32 = 64;

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
pub(crate) mod gpu {
    use super::SPAN4;
    use crate::device::{F32x4, Float, Glb, U32x2, thread};
    use crate::kernels::quantise_act::Kind;
    use crate::kernels::quantise_act::gpu::span;
    use half::{bf16, f16};

    /// What this lane holds of span `span` of a row of `n4` float4s; `otherwise` past the end or if the array is absent.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn read(row: Glb<F32x4>, span: u32, n4: u32, otherwise: f32) -> [[f32; 4]; 2] {
        let mut v = [[otherwise; 4]; 2];
        if !row.is_null() {
            each(span * SPAN4, n4, |h, i| v[h] = row.ld(i).0);
        }
        v
    }

    /// [`read`] of a weight or an input of the step: may come before the kernel waits for earlier launches.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn read_early(row: Glb<F32x4>, span: u32, n4: u32, otherwise: f32) -> [[f32; 4]; 2] {
        let mut v = [[otherwise; 4]; 2];
        if !row.is_null() {
            each(span * SPAN4, n4, |h, i| v[h] = row.ld_early(i).0);
        }
        v
    }

    /// An output type.
    pub(crate) trait Output {
        /// Bytes of a value, without its share of scales.
        const BYTES: usize;
        /// Stores a span of `v · factor`, from float4 `first` of the array on and up to float4 `end`. The warp calls
        /// together.
        fn store(v: [[f32; 4]; 2], factor: f32, out: Glb<u32>, scales: Glb<U32x2>, first: u32, end: u32);
    }

    /// Calls `f` with half and index of each float4 of this lane that lies before `end`.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn each(first: u32, end: u32, mut f: impl FnMut(usize, u32)) {
        unroll!(H in 0..2 {
            let i = first + SPAN4 / 2 * H as u32 + thread::lane_id();
            if i < end {
                f(H, i);
            }
        });
    }

    impl Output for f32 {
        const BYTES: usize = 4;
        #[inline(always)]
        #[track_caller]
        fn store(v: [[f32; 4]; 2], factor: f32, out: Glb<u32>, _: Glb<U32x2>, first: u32, end: u32) {
            each(first, end, |h, i| out.cast().st(i, F32x4(v[h].map(|v| v * factor))));
        }
    }

    macro_rules! half_output {
        ($($ty:ty),*) => {$(
            impl Output for $ty {
                const BYTES: usize = 2;
                #[inline(always)]
                #[track_caller]
                fn store(v: [[f32; 4]; 2], factor: f32, out: Glb<u32>, _: Glb<U32x2>, first: u32, end: u32) {
                    each(first, end, |h, i| {
                        let bits = v[h].map(|v| u32::from(<$ty as Float>::from_f32(v * factor).to_bits()));
                        out.cast().st(i, U32x2([bits[0] | bits[1] << 16, bits[2] | bits[3] << 16]));
                    });
                }
            }
        )*};
    }
    half_output!(f16, bf16);

    macro_rules! act_output {
        ($($name:ident),*) => {$(
            /// Activations of this kind.
            pub(crate) struct $name;

            impl Output for $name {
                const BYTES: usize = 1;
                #[inline(always)]
                #[track_caller]
                fn store(
                    v: [[f32; 4]; 2],
                    factor: f32,
                    out: Glb<u32>,
                    scales: Glb<U32x2>,
                    first: u32,
                    end: u32,
                ) {
                    span(Kind::$name, v, factor, out, scales, first, end);
                }
            }
        )*};
    }
    act_output!(Q8_0, Q8_1);
}

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use alloc::{boxed::Box, vec, vec::Vec};

    use quant::FormatId;

    use super::super::dequantise;
    use super::super::quantise_act::{self, ActScale, Kind};
    use crate::case::{Buffer, Expected, Problem};
    use crate::launch::{Check, DevicePtr, Launch, LaunchError};

    /// An output type.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Output {
        /// f32.
        F32,
        /// Rounded to f16.
        F16,
        /// Rounded to bf16.
        Bf16,
        /// Quantised.
        Act(Kind),
    }

    impl Output {
        /// One of five, by type: `names[self.index()]` is an entry.
        pub(crate) fn index(self) -> usize {
            match self {
                Output::F32 => 0,
                Output::F16 => 1,
                Output::Bf16 => 2,
                Output::Act(Kind::Q8_0) => 3,
                Output::Act(Kind::Q8_1) => 4,
            }
        }

        /// Bytes of `n` values, without and with scales.
        pub fn bytes(self, n: usize) -> (usize, usize) {
            match self {
                Output::F32 => (4 * n, 0),
                Output::F16 | Output::Bf16 => (2 * n, 0),
                Output::Act(_) => (n, n / 32 * size_of::<ActScale>()),
            }
        }

        /// The launcher's checks of a row of `n` values and the places it goes to.
        pub(crate) fn check(
            self,
            check: Check,
            n: usize,
            y: DevicePtr,
            scales: DevicePtr,
        ) -> Result<(), LaunchError> {
            match self {
                Output::Act(_) => check.multiple("n", n, 32, "a multiple of 32")?,
                _ => check.multiple("n", n, 4, "a multiple of 4")?,
            }
            check.aligned("y", y, 16)?;
            check.aligned("scales", scales, 16)
        }
    }

    /// A problem of a kernel with this output: launched with f32 output, which must be `expected`, and with the output
    /// asked for, which must be the first one as the separate kernel converts it. `launch` takes the addresses of
    /// `buffers`, an output type and where it goes.
    pub(crate) fn problem(
        output: Output,
        [n_rows, n]: [usize; 2],
        mut buffers: Vec<Buffer>,
        expected: Vec<f64>,
        launch: impl Fn(&[DevicePtr], Output, [DevicePtr; 2]) -> Result<Launch, LaunchError> + 'static,
    ) -> Problem {
        let plain = buffers.len();
        buffers.push(Buffer::Output(Expected::F32(expected)));
        if output == Output::F32 {
            return Problem {
                buffers,
                launches: Box::new(move |at| {
                    Ok(vec![launch(at, Output::F32, [at[plain], DevicePtr::NULL])?])
                }),
            };
        }
        let (bytes, scale_bytes) = output.bytes(n_rows * n);
        for bytes in [bytes, scale_bytes] {
            buffers.push(Buffer::Input(vec![0; bytes]));
            buffers.push(Buffer::Output(Expected::Same { buffer: buffers.len() - 1, bytes }));
        }
        Problem {
            buffers,
            launches: Box::new(move |at| {
                let [x, y, fused_y, scales, fused_scales] = at[plain..] else { unreachable!("five outputs") };
                let convert = match output {
                    Output::Act(kind) => quantise_act::launch(&quantise_act::Args {
                        kind,
                        x,
                        q: y,
                        scales,
                        n_cols: n_rows,
                        k: n,
                    }),
                    float => {
                        let to = if float == Output::F16 { FormatId::F16 } else { FormatId::BF16 };
                        let (from, n) = (FormatId::F32, n_rows * n);
                        dequantise::launch(&dequantise::Args { from, to, src: x, dst: y, n })
                    }
                };
                let plain = launch(at, Output::F32, [x, DevicePtr::NULL])?;
                Ok(vec![plain, convert?, launch(at, output, [fused_y, fused_scales])?])
            }),
        }
    }

    /// A problem's last launch alone, for timing; its outputs are not checked, since what they compare with is not made.
    pub(crate) fn last_launch(problem: Problem) -> Problem {
        let unchecked = |buffer| match buffer {
            Buffer::Output(expected) => Buffer::Output(Expected::Unchecked(expected.bytes())),
            other => other,
        };
        Problem {
            buffers: problem.buffers.into_iter().map(unchecked).collect(),
            launches: Box::new(move |at| Ok((problem.launches)(at)?.pop().into_iter().collect())),
        }
    }
}
