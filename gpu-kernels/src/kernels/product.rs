//! What every matrix product takes, and what follows the sum: shared by the kernels that multiply weights.
//!
//! * Parts: up to [`MAX_PARTS`] matrices of one format and one k that share the activations, each with its own rows and
//!   output, in one launch.
//! * Epilogue, in this order, each step a plain f32 operation, so that all kernels give equal bits: `+ bias[r]`; with a
//!   [`Glu`], the two parts are gate and up of one shape, and become `act(gate) · up`; `+ residual[c][r]`.
//! * Before the first step and after the last, a kernel of one column may do parts of an RMS norm: `mmvq`'s `Besides`.
//! * Mixture: a column is a (token, slot) pair; its weights are expert `ids[pair]` of [n_expert, n_rows, k], its bias that row
//!   of [n_expert, n_rows]; tokens have one row of activations for all their slots, or one per slot.

/// Most matrices in a launch.
pub const MAX_PARTS: usize = 3;

/// A gate's function, in the low byte of its kind; 0 is no gate.
const SILU: u32 = 1;
const GELU: u32 = 2;
const SWIGLU_OAI: u32 = 3;

/// Mark in a gate's kind, above its low byte: the result is written quantised, as Q8_0 or as Q8_1.
pub(super) const AS_Q8_0: u32 = 1;
pub(super) const AS_Q8_1: u32 = 2;

/// How a gated pair of matrices is combined.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Glu {
    /// `silu(gate) · up`.
    Silu,
    /// `gelu(gate) · up`, the tanh form.
    Gelu,
    /// gpt-oss: gate at most `limit`, up within ±`limit`; `gate · sigmoid(alpha · gate) · (up + 1)`.
    SwigluOai {
        /// Slope inside the sigmoid.
        alpha: f32,
        /// Clamp.
        limit: f32,
    },
}

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
pub(crate) use device::{Gate, NormAfter, Part, choose, choose_at};
#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod device {
    use super::{GELU, SILU};
    use crate::device::math::{self, fma};
    use crate::device::{Glb, U32x2, thread};
    use crate::kernels::quantise_act::gpu::{GroupKind, warp_group};
    use crate::kernels::rms_norm::gpu::squares_of_group;

    /// One matrix as kernels take it: what [`super::host`]'s `with_parts` writes.
    #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
    #[repr(C)]
    pub(crate) struct Part {
        pub(crate) w: Glb<u8>,
        pub(crate) bias: Glb<f32>,
        residual: Glb<f32>,
        y: Glb<f32>,
        pub(crate) n_rows: u32,
        pub(crate) first_cta: u32,
    }

    /// A [`super::Glu`] as kernels take it: 0 for none, then in the enum's order.
    #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
    #[repr(C)]
    pub(crate) struct Gate {
        kind: u32,
        alpha: f32,
        limit: f32,
    }

    /// What a norm that follows the product takes from it, null if none does: the norm's weight `[n_rows]`, where codes
    /// and unscaled scales of result · weight go, and each group's sum of squares f32 [n_rows / 32].
    #[derive(Clone, Copy)]
    pub(crate) struct NormAfter {
        pub(crate) weight: Glb<f32>,
        q: Glb<u8>,
        scales: Glb<U32x2>,
        squares: Glb<f32>,
    }

    impl NormAfter {
        /// What [`super::host::Spare::norm`] put in the place of a product's second part.
        #[inline(always)]
        pub(crate) fn of(second: Part) -> NormAfter {
            let weight = if second.is_spare() { second.bias } else { Glb::NULL };
            NormAfter { weight, q: second.w, scales: second.residual.cast(), squares: second.y }
        }

        /// Whether there is one.
        #[inline(always)]
        pub(crate) fn is_some(self) -> bool {
            !self.weight.is_null()
        }

        /// Writes what the norm takes of results `32 · group` and on, of which each lane of the warp has one and its weight.
        #[inline(always)]
        #[track_caller]
        pub(crate) fn put(self, group: u32, v: f32, weight: f32) {
            warp_group(math::mul(v, weight), self.q, self.scales, group, GroupKind::Unscaled);
            let squares = squares_of_group(v);
            if thread::lane_id() == 0 {
                self.squares.st(group, squares);
            }
        }
    }

    /// The part that this CTA of the grid's first dimension works on.
    #[inline(always)]
    pub(crate) fn choose(p0: Part, p1: Part, p2: Part) -> Part {
        choose_at(p0, p1, p2, thread::block_idx_x())
    }

    /// The part that a kernel's CTA `cta` works on, however it counts them.
    #[inline(always)]
    pub(crate) fn choose_at(p0: Part, p1: Part, p2: Part, cta: u32) -> Part {
        if cta < p1.first_cta {
            p0
        } else if cta < p2.first_cta {
            p1
        } else {
            p2
        }
    }

    impl Gate {
        /// None.
        pub(crate) const NONE: Gate = Gate { kind: 0, alpha: 0.0, limit: 0.0 };

        /// Whether the first two parts are gate and up.
        #[inline(always)]
        pub(crate) fn is_some(self) -> bool {
            self.kind != 0
        }

        /// Whether the result is written quantised.
        #[inline(always)]
        pub(crate) fn quantises(self) -> bool {
            self.kind >> 8 != 0
        }

        #[inline(always)]
        fn apply(self, gate: f32, up: f32) -> f32 {
            // The very operations of the kernel `glu`, so that a fused step gives the bits of separate ones. `mul`: the
            // residual's addition does not fuse with it.
            match self.kind & 0xff {
                SILU => math::mul(gate * math::sigmoid(gate), up),
                GELU => {
                    // 0.5 · (1 + tanh u) is sigmoid(2u), u = √(2/π) · x · (1 + 0.044715 x²).
                    let twice_u = 1.595_769_2 * gate * fma(0.044_715 * gate, gate, 1.0);
                    math::mul(gate * math::sigmoid(twice_u), up)
                }
                _ => {
                    let gate = math::fmin(gate, self.limit);
                    let up = math::fmin(math::fmax(up, -self.limit), self.limit);
                    math::mul(gate * math::sigmoid(self.alpha * gate), up + 1.0)
                }
            }
        }
    }

    impl Part {
        /// Whether the product has no such part: its place may hold something else.
        #[inline(always)]
        pub(crate) fn is_spare(self) -> bool {
            self.first_cta == u32::MAX
        }

        #[inline(always)]
        #[track_caller]
        fn biased(self, expert: u32, row: u32, sum: f32) -> f32 {
            if self.bias.is_null() { sum } else { sum + self.bias.ld_nc(expert * self.n_rows + row) }
        }

        /// What is added last to output `row` of line `line` (a column or pair); 0 if nothing is.
        #[inline(always)]
        #[track_caller]
        pub(crate) fn residual(self, line: u32, row: u32) -> f32 {
            if self.residual.is_null() { 0.0 } else { self.of_line(self.residual, line).ld(row) }
        }

        #[inline(always)]
        fn of_line(self, array: Glb<f32>, line: u32) -> Glb<f32> {
            array.offset(line as usize * self.n_rows as usize)
        }

        /// Ends output `row` of line `line`: the epilogue on `sum`, and with a gate on `up`'s sum.
        #[inline(always)]
        #[track_caller]
        pub(crate) fn finish(self, gate: Gate, up: Part, expert: u32, line: u32, row: u32, sum: [f32; 2]) {
            self.finish_with(gate, up, expert, line, row, sum, self.residual(line, row));
        }

        /// [`Part::finish`] with [`Part::residual`] already at hand; gives what it stores.
        #[inline(always)]
        #[track_caller]
        pub(crate) fn finish_with(
            self,
            gate: Gate,
            up: Part,
            expert: u32,
            line: u32,
            row: u32,
            sum: [f32; 2],
            residual: f32,
        ) -> f32 {
            self.put(line, row, self.ended(gate, up, expert, row, sum), residual)
        }

        /// Stores an ended output, with [`Part::residual`] added, and gives it.
        #[inline(always)]
        #[track_caller]
        pub(crate) fn put(self, line: u32, row: u32, ended: f32, residual: f32) -> f32 {
            let v = if self.residual.is_null() { ended } else { ended + residual };
            self.of_line(self.y, line).st(row, v);
            v
        }

        /// The epilogue up to the residual.
        #[inline(always)]
        #[track_caller]
        pub(crate) fn ended(self, gate: Gate, up: Part, expert: u32, row: u32, sum: [f32; 2]) -> f32 {
            let v = self.biased(expert, row, sum[0]);
            if gate.is_some() { gate.apply(v, up.biased(expert, row, sum[1])) } else { v }
        }

        /// Ends the warp's 32 rows from `32 · group` on of line 0, a row per lane, quantised: codes go where the first
        /// part's floats would, scales to the second's place.
        #[inline(always)]
        #[track_caller]
        pub(crate) fn finish_quantised(self, gate: Gate, up: Part, group: u32, sum: [f32; 2]) {
            self.put_group(gate, up, group, self.ended(gate, up, 0, 32 * group + thread::lane_id(), sum));
        }

        /// Stores ended values, one of each lane of the warp, as group `group` of what is quantised.
        #[inline(always)]
        #[track_caller]
        pub(crate) fn put_group(self, gate: Gate, up: Part, group: u32, v: f32) {
            let kind = if gate.kind >> 8 == super::AS_Q8_1 { GroupKind::Q8_1 } else { GroupKind::Q8_0 };
            warp_group(v, self.y.cast(), up.y.cast(), group, kind);
        }
    }
}

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use alloc::vec::Vec;

    use quant::FormatId;

    use super::{AS_Q8_0, AS_Q8_1, GELU, Glu, MAX_PARTS, SILU, SWIGLU_OAI};
    use crate::kernels::quantise_act::Kind;
    use crate::launch::{Check, DevicePtr, LaunchError, Params};

    /// One matrix of a product.
    #[derive(Clone, Copy, Debug)]
    pub struct Matrix {
        /// [n_rows, k] (in a mixture [n_expert, n_rows, k]), tiled.
        pub w: DevicePtr,
        /// f32 `[n_rows]` (in a mixture [n_expert, n_rows]), or null.
        pub bias: DevicePtr,
        /// f32, of `y`'s shape, added last; may be `y`; or null.
        pub residual: DevicePtr,
        /// f32 [n_cols, n_rows]. The second of a gated pair has none: null.
        pub y: DevicePtr,
        /// Rows.
        pub n_rows: usize,
    }

    /// Columns that choose their weights.
    #[derive(Clone, Copy, Debug)]
    pub struct Mixture {
        /// i32 [n_tokens, n_used], each below the number of experts.
        pub ids: DevicePtr,
        /// n_tokens · n_used.
        pub n_pairs: usize,
        /// Pairs that share a row of activations: n_used, or 1.
        pub pairs_per_x: usize,
    }

    /// Arguments of a product with quantised activations.
    #[derive(Clone, Copy, Debug)]
    pub struct Args<'a> {
        /// The weights' format.
        pub format: FormatId,
        /// The matrices: 1 to [`MAX_PARTS`], or gate and up.
        pub parts: &'a [Matrix],
        /// What combines gate and up.
        pub glu: Option<Glu>,
        /// Codes and scales of the activations, in the format's kind. Without scales (null) `q` is f32, where the kernel
        /// takes that.
        pub q: DevicePtr,
        /// As `q`.
        pub scales: DevicePtr,
        /// Weights per row.
        pub k: usize,
        /// Columns; in a mixture rows of activations, of which nothing is asked here.
        pub n_cols: usize,
        /// Columns that choose their weights.
        pub mixture: Option<Mixture>,
    }

    /// What the place of a part that a product does not have may hold, so that arguments do not grow.
    #[derive(Clone, Copy)]
    pub(crate) struct Spare {
        arrays: [DevicePtr; 4],
        word: u32,
    }

    impl Spare {
        /// Nothing.
        pub(crate) const NONE: Spare = Spare { arrays: [DevicePtr::NULL; 4], word: 0 };

        /// In the second part's place: what a norm of the results takes.
        pub(crate) fn norm(weight: DevicePtr, q: DevicePtr, scales: DevicePtr, squares: DevicePtr) -> Spare {
            Spare { arrays: [q, weight, scales, squares], word: 0 }
        }

        /// In the third part's place: so many bytes of weights.
        pub(crate) fn weights(at: DevicePtr, n_bytes: u32) -> Spare {
            let none = DevicePtr::NULL;
            Spare { arrays: [at, none, none, none], word: n_bytes }
        }
    }

    /// The parts as checked, with `ctas(rows)` CTAs each, and the sum of those.
    pub(crate) fn with_parts(
        kernel: &'static str,
        params: Params,
        parts: &[Matrix],
        glu: Option<Glu>,
        ctas: impl Fn(u32) -> u32,
    ) -> Result<(Params, u32), LaunchError> {
        with_parts_and(kernel, params, parts, glu, [Spare::NONE; MAX_PARTS], ctas)
    }

    /// [`with_parts`], and what the places of those that are not there hold.
    pub(crate) fn with_parts_and(
        kernel: &'static str,
        params: Params,
        parts: &[Matrix],
        glu: Option<Glu>,
        spares: [Spare; MAX_PARTS],
        ctas: impl Fn(u32) -> u32,
    ) -> Result<(Params, u32), LaunchError> {
        let check = Check(kernel);
        let shape =
            |what, expected, got: usize| LaunchError::Shape { kernel, what, expected, got: got as u64 };
        if !(1..=MAX_PARTS).contains(&parts.len()) {
            return Err(shape("parts", "1 to 3", parts.len()));
        }
        if glu.is_some() && (parts.len() != 2 || parts[0].n_rows != parts[1].n_rows) {
            return Err(shape("parts", "gate and up of one shape", parts.len()));
        }
        let mut params = params;
        let mut n_ctas = 0;
        for (i, spare) in spares.into_iter().enumerate() {
            let Some(&part) = parts.get(i) else {
                // Beyond the grid's end: no CTA is this part's.
                params = spare.arrays.into_iter().fold(params, Params::with).with(spare.word).with(u32::MAX);
                continue;
            };
            let up = glu.is_some() && i == 1;
            let n_rows = check.size("n_rows", part.n_rows)?;
            check.aligned("w", part.w, 16)?;
            for (what, at) in [("bias", part.bias), ("residual", part.residual), ("y", part.y)] {
                check.aligned(what, at, 4)?;
            }
            if part.y == DevicePtr::NULL && !up {
                return Err(shape("y", "an address", 0));
            }
            let mut first_cta = u32::MAX;
            if !up {
                first_cta = n_ctas;
                n_ctas += ctas(n_rows);
            }
            params = params.with(part.w).with(part.bias).with(part.residual).with(part.y);
            params = params.with(n_rows).with(first_cta);
        }
        Ok((params, n_ctas))
    }

    /// A gate's three words.
    pub(crate) fn with_gate(params: Params, glu: Option<Glu>) -> Params {
        with_quantising_gate(params, glu, 0)
    }

    /// [`with_gate`] with a mark for how the result is written.
    pub(crate) fn with_quantising_gate(params: Params, glu: Option<Glu>, mark: u32) -> Params {
        let (kind, alpha, limit) = match glu {
            None => (0, 0.0, 0.0),
            Some(Glu::Silu) => (SILU, 0.0, 0.0),
            Some(Glu::Gelu) => (GELU, 0.0, 0.0),
            Some(Glu::SwigluOai { alpha, limit }) => (SWIGLU_OAI, alpha, limit),
        };
        params.with(kind | mark << 8).with(alpha).with(limit)
    }

    /// The mark for [`with_quantising_gate`] of a product whose results are written quantised, as `quantise_act` would:
    /// codes to the first matrix's `y`, scales to the second's.
    pub(crate) fn quantising_mark(
        check: Check,
        args: &Args<'_>,
        acts: Option<Kind>,
    ) -> Result<u32, LaunchError> {
        let mark = match acts {
            None => return Ok(0),
            Some(Kind::Q8_0) => AS_Q8_0,
            Some(Kind::Q8_1) => AS_Q8_1,
        };
        let ([gate, up], None) = (args.parts, args.mixture) else {
            return Err(check.shape("parts of quantised results", "gate and up", args.parts.len()));
        };
        if args.glu.is_none() || up.y == DevicePtr::NULL || gate.residual != DevicePtr::NULL {
            return Err(check.shape("quantised results", "gated, without residual", args.parts.len()));
        }
        check.multiple("n_rows of quantised results", gate.n_rows, 32, "a multiple of 32")?;
        check.aligned("scales of the results", up.y, 8)?;
        Ok(mark)
    }

    /// The definition of [`Glu`].
    pub fn glu_reference(glu: Glu, gate: f64, up: f64) -> f64 {
        let sigmoid = |x: f64| 1.0 / (1.0 + libm::exp(-x));
        match glu {
            Glu::Silu => gate * sigmoid(gate) * up,
            Glu::Gelu => {
                let inner = libm::sqrt(2.0 / core::f64::consts::PI) * (gate + 0.044715 * gate * gate * gate);
                0.5 * gate * (1.0 + libm::tanh(inner)) * up
            }
            Glu::SwigluOai { alpha, limit } => {
                let (alpha, limit) = (f64::from(alpha), f64::from(limit));
                let (gate, up) = (gate.min(limit), up.clamp(-limit, limit));
                gate * sigmoid(alpha * gate) * (up + 1.0)
            }
        }
    }

    /// The definition of the epilogue, over all lines of one part (or gated pair): `sums` [n_lines, n_rows] of the part and of
    /// `up`, biases as `bias(line, row)`.
    pub fn epilogue_reference(
        sums: &[f64],
        up: Option<(Glu, &[f64])>,
        bias: impl Fn(usize) -> f64,
        up_bias: impl Fn(usize) -> f64,
        residual: impl Fn(usize) -> f64,
    ) -> Vec<f64> {
        let ended = |(i, sum): (usize, &f64)| {
            let v = sum + bias(i);
            let v = up.map_or(v, |(glu, up)| glu_reference(glu, v, up[i] + up_bias(i)));
            v + residual(i)
        };
        sums.iter().enumerate().map(ended).collect()
    }
}
