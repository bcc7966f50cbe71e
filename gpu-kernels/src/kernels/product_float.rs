//! What the products with float weights share: the matrices of a launch and what follows a sum.
//!
//! * Parts: up to [`MAX_PARTS`] matrices of one format that share the activations, each with its own rows and output.
//! * Epilogue, in this order, each a plain f32 operation: `+ bias[r]`; with a [`Glu`], two matrices of one shape are gate
//!   and up, and `act(gate) · up` follows; `+ residual[c][r]`. Bias and residual may be missing; the residual may be `y`.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::{Experts, Matrix};

/// Most matrices in a launch.
pub const MAX_PARTS: usize = 3;

/// What a gated pair of matrices is combined by.
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

/// One matrix as a kernel takes it. The device's `Glb` and the host's `DevicePtr` are one address each.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Part<Address: Copy> {
    pub(crate) w: Address,
    pub(crate) bias: Address,
    pub(crate) residual: Address,
    pub(crate) y: Address,
    pub(crate) n_rows: u32,
    /// The first CTA, in x, that works on it; beyond the grid for a part that is not there.
    pub(crate) first_cta: u32,
}

// SAFETY: four addresses of eight bytes and two words: no padding; any bits are valid.
unsafe impl<Address: bytemuck::Pod> bytemuck::Pod for Part<Address> {}
// SAFETY: as above; zero addresses mean "not given".
unsafe impl<Address: bytemuck::Zeroable + Copy> bytemuck::Zeroable for Part<Address> {}

/// What the parts have in common.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(crate) struct Shape {
    pub(crate) k: u32,
    pub(crate) n_cols: u32,
    /// With expert ids: pairs of token and slot that share a row of activations.
    pub(crate) pairs_per_x: u32,
    /// 0 none, then in [`Glu`]'s order.
    pub(crate) glu: u32,
    pub(crate) alpha: f32,
    pub(crate) limit: f32,
}

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
pub(crate) use gpu::{GpuPart, finish, select};

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod gpu {
    use super::{Part, Shape};
    use crate::device::{Glb, math};

    pub(crate) type GpuPart = Part<Glb<u8>>;

    /// The part that CTA `cta` works on.
    #[inline(always)]
    pub(crate) fn select(p0: GpuPart, p1: GpuPart, p2: GpuPart, cta: u32) -> GpuPart {
        if cta < p1.first_cta {
            p0
        } else if cta < p2.first_cta {
            p1
        } else {
            p2
        }
    }

    /// `act(gate) · up`.
    #[inline(always)]
    fn gated(shape: &Shape, gate: f32, up: f32) -> f32 {
        let sigmoid = |x: f32| math::rcp(1.0 + math::ex2(math::mul(-x, math::LOG2_E)));
        match shape.glu {
            1 => math::mul(math::mul(gate, sigmoid(gate)), up),
            2 => {
                // 0.5 (1 + tanh z) is the sigmoid of 2z.
                let cubic = math::fma(math::mul(gate, gate), 0.044_715, 1.0);
                let z2 = math::mul(math::mul(gate, 1.595_769_1), cubic);
                math::mul(math::mul(gate, sigmoid(z2)), up)
            }
            _ => {
                let gate = math::fmin(gate, shape.limit);
                let up = math::fmax(math::fmin(up, shape.limit), -shape.limit);
                math::mul(math::mul(gate, sigmoid(math::mul(shape.alpha, gate))), up + 1.0)
            }
        }
    }

    /// The epilogue of one output and its store. `in_bias` is the row in the biases, `up` the sum of the second matrix of
    /// a pair and that matrix' bias.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn finish(
        part: &GpuPart,
        shape: &Shape,
        up_bias: Glb<u8>,
        (line, row, in_bias): (u32, u32, u32),
        (sum, up): (f32, f32),
    ) {
        let biased =
            |bias: Glb<u8>, v: f32| if bias.is_null() { v } else { v + bias.cast::<f32>().ld_nc(in_bias) };
        let mut v = biased(part.bias, sum);
        if shape.glu != 0 {
            v = gated(shape, v, biased(up_bias, up));
        }
        let before = line as usize * part.n_rows as usize;
        if !part.residual.is_null() {
            v += part.residual.cast::<f32>().offset(before).ld(row);
        }
        part.y.cast::<f32>().offset(before).st(row, v);
    }
}

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use super::{Glu, MAX_PARTS, Part, Shape};
    use crate::launch::{Check, DevicePtr, LaunchError};

    /// A weight matrix of a launch, tiled, and what goes with it. Every address but `w` and `y` may be null; `y` of the
    /// second matrix of a gated pair is not used.
    #[derive(Clone, Copy, Debug, PartialEq)]
    pub struct Matrix {
        /// Weights [n_rows, k] or, with expert ids, [n_expert, n_rows, k].
        pub w: DevicePtr,
        /// f32 [n_rows] or [n_expert, n_rows].
        pub bias: DevicePtr,
        /// f32, of `y`'s shape.
        pub residual: DevicePtr,
        /// f32 [n_cols, n_rows].
        pub y: DevicePtr,
        /// Rows.
        pub n_rows: usize,
    }

    /// A mixture: every pair of token and slot is a column of its own with the weights of its expert.
    #[derive(Clone, Copy, Debug, PartialEq)]
    pub struct Experts {
        /// u32 [n_pairs]: the expert of each pair.
        pub ids: DevicePtr,
        /// Pairs that share a row of activations: the slots of a token, or 1.
        pub pairs_per_x: usize,
    }

    impl Shape {
        /// The checked shape.
        pub(crate) fn new(
            check: Check,
            k: usize,
            n_cols: usize,
            pairs_per_x: usize,
            glu: Option<Glu>,
        ) -> Result<Shape, LaunchError> {
            check.multiple("k", k, 4, "a multiple of 4")?;
            let (glu, alpha, limit) = match glu {
                None => (0, 0.0, 0.0),
                Some(Glu::Silu) => (1, 0.0, 0.0),
                Some(Glu::Gelu) => (2, 0.0, 0.0),
                Some(Glu::SwigluOai { alpha, limit }) => (3, alpha, limit),
            };
            Ok(Shape {
                k: check.size("k", k)?,
                n_cols: check.size("n_cols", n_cols)?,
                pairs_per_x: check.size("pairs_per_x", pairs_per_x)?,
                glu,
                alpha,
                limit,
            })
        }
    }

    impl<A: Copy + bytemuck::Zeroable> Part<A> {
        /// A part that is not there.
        fn none(grid_x: u32) -> Part<A> {
            Part { n_rows: 0, first_cta: grid_x, ..bytemuck::Zeroable::zeroed() }
        }
    }

    /// The parts of a launch whose CTAs take `rows` rows of one matrix each, and its grid in x. A gated pair is one matrix
    /// there: its second part has no CTAs of its own.
    pub(crate) fn parts(
        check: Check,
        matrices: &[Matrix],
        gated: bool,
        rows: usize,
    ) -> Result<([Part<DevicePtr>; MAX_PARTS], u32), LaunchError> {
        let expected = if gated { 2..=2 } else { 1..=MAX_PARTS };
        if !expected.contains(&matrices.len()) {
            let (expected, got) =
                (if gated { "2 for a gated pair" } else { "1 to 3" }, matrices.len() as u64);
            return Err(LaunchError::Shape { kernel: check.0, what: "matrices", expected, got });
        }
        if gated && matrices[0].n_rows != matrices[1].n_rows {
            let got = matrices[1].n_rows as u64;
            let expected = "the rows of the gate";
            return Err(LaunchError::Shape { kernel: check.0, what: "rows of up", expected, got });
        }
        let mut grid_x = 0u32;
        let mut parts = [None; MAX_PARTS];
        for (i, matrix) in matrices.iter().enumerate() {
            let addresses = [
                ("w", matrix.w, 16),
                ("bias", matrix.bias, 4),
                ("residual", matrix.residual, 4),
                ("y", matrix.y, 4),
            ];
            for (what, at, align) in addresses {
                check.aligned(what, at, align)?;
            }
            let n_rows = check.size("n_rows", matrix.n_rows)?;
            let up = gated && i == 1;
            let n_ctas = if up { 0 } else { matrix.n_rows.div_ceil(rows) as u32 };
            // At most three times 2^31 / 16.
            let first_cta = grid_x;
            grid_x += n_ctas;
            let Matrix { w, bias, residual, y, .. } = *matrix;
            parts[i] =
                Some(Part { w, bias, residual, y, n_rows, first_cta: if up { u32::MAX } else { first_cta } });
        }
        Ok((parts.map(|part| part.unwrap_or(Part::none(u32::MAX))), grid_x))
    }
}

#[cfg(not(target_arch = "nvptx64"))]
pub(crate) use host::parts;

#[cfg(not(target_arch = "nvptx64"))]
pub(crate) mod case {
    //! Problems with float weights, for the kernels' cases.
    use alloc::{boxed::Box, vec, vec::Vec};

    use quant::{FloatFormat, FormatId};

    use super::{Experts, Glu, Matrix};
    use crate::case::{Buffer, Expected, Problem, Random, bytes_of};
    use crate::launch::{DevicePtr, Launch, LaunchError};
    use crate::tile;

    /// A case: the shape and everything a launch may have.
    #[derive(Clone, Copy, Debug)]
    pub struct Case {
        /// F16, BF16 or F32.
        pub format: FormatId,
        /// Rows of each matrix.
        pub n_rows: &'static [usize],
        /// Weights of a row.
        pub k: usize,
        /// Columns; tokens times slots with experts.
        pub n_cols: usize,
        /// With biases and a residual.
        pub addends: bool,
        /// Two matrices are gate and up.
        pub glu: Option<Glu>,
        /// Experts, and slots per row of activations.
        pub experts: Option<(usize, usize)>,
    }

    impl Case {
        /// One matrix, nothing else.
        pub const fn plain(format: FormatId, n_rows: &'static [usize], k: usize, n_cols: usize) -> Case {
            Case { format, n_rows, k, n_cols, addends: false, glu: None, experts: None }
        }

        /// Bytes that must move.
        pub fn bytes(&self) -> u64 {
            let elem = if self.format == FormatId::F32 { 4 } else { 2 };
            let rows: usize = self.n_rows.iter().sum();
            let experts = self.experts.map_or(1, |(n, _)| n.min(self.n_cols));
            let x = self.n_cols / self.experts.map_or(1, |(_, slots)| slots) * self.k * 4;
            (experts * rows * self.k * elem + x + 4 * rows * self.n_cols) as u64
        }

        /// Operations.
        pub fn flops(&self) -> u64 {
            2 * (self.n_rows.iter().sum::<usize>() * self.k * self.n_cols) as u64
        }
    }

    /// `x` as a format's products see it.
    pub(crate) fn rounded(format: FormatId, x: f32) -> f32 {
        match format {
            FormatId::F16 => FloatFormat::to_f32(<half::f16 as FloatFormat>::from_f32(x)),
            FormatId::BF16 => FloatFormat::to_f32(<half::bf16 as FloatFormat>::from_f32(x)),
            _ => x,
        }
    }

    /// `act(gate) · up` in f64.
    fn gated(glu: Glu, gate: f64, up: f64) -> f64 {
        let sigmoid = |x: f64| 1.0 / (1.0 + libm::exp(-x));
        match glu {
            Glu::Silu => gate * sigmoid(gate) * up,
            Glu::Gelu => {
                let z = 0.797_884_560_802_865_4 * gate * (1.0 + 0.044_715 * gate * gate);
                0.5 * gate * (1.0 + libm::tanh(z)) * up
            }
            Glu::SwigluOai { alpha, limit } => {
                let (gate, limit) = (gate.min(limit.into()), f64::from(limit));
                gate * sigmoid(f64::from(alpha) * gate) * (up.clamp(-limit, limit) + 1.0)
            }
        }
    }

    /// What a launcher gets of a problem.
    pub(crate) struct Operands {
        pub(crate) matrices: Vec<Matrix>,
        pub(crate) x: DevicePtr,
        pub(crate) experts: Option<Experts>,
        /// Room for `scratch` bytes.
        pub(crate) scratch: DevicePtr,
    }

    /// The problem of a case. Buffers: x, ids, scratch (`scratch` bytes), then per matrix w, bias, residual and y.
    pub(crate) fn problem(
        case: &Case,
        random: &mut Random,
        scratch: usize,
        launch: impl Fn(&Operands) -> Result<Vec<Launch>, LaunchError> + 'static,
    ) -> Problem {
        let Case { format, n_rows, k, n_cols, addends, glu, experts } = *case;
        let (n_experts, slots) = experts.unwrap_or((1, 1));
        let x = random.values(n_cols / slots * k);
        let ids: Vec<u32> = (0..n_cols).map(|_| random.below(n_experts as u64) as u32).collect();
        let mut buffers = vec![
            Buffer::Input(bytes_of(&x)),
            Buffer::Input(bytes_of(&ids)),
            Buffer::Input(vec![0xff; scratch.max(16)]),
        ];
        // Smaller weights, so that an activation's argument stays where it bends.
        let scale = if glu.is_some() { 2.0 / libm::sqrtf(k as f32) } else { 1.0 };
        let mut sums: Vec<Vec<f64>> = vec![];
        let mut residuals: Vec<Vec<f32>> = vec![];
        for &rows in n_rows {
            let weights: Vec<f32> =
                (0..n_experts * rows * k).map(|_| rounded(format, scale * random.value())).collect();
            let raw = |weights: &[f32]| -> Vec<u8> {
                match format {
                    FormatId::F32 => bytes_of(weights),
                    FormatId::F16 => {
                        weights.iter().flat_map(|&w| half::f16::from_f32(w).to_le_bytes()).collect()
                    }
                    _ => weights.iter().flat_map(|&w| half::bf16::from_f32(w).to_le_bytes()).collect(),
                }
            };
            let tiles = weights.chunks(rows * k).flat_map(|w| tile::pack(format, &raw(w), rows, k)).collect();
            let bias = random.values(if addends { n_experts * rows } else { 0 });
            let residual = random.values(if addends { n_cols * rows } else { 0 });
            let mut sum = vec![];
            for c in 0..n_cols {
                let expert = ids[c] as usize;
                let x = &x[c / slots * k..][..k];
                for r in 0..rows {
                    let w = &weights[(expert * rows + r) * k..][..k];
                    let dot = w
                        .iter()
                        .zip(x)
                        .map(|(&w, &x)| f64::from(w) * f64::from(rounded(format, x)))
                        .sum::<f64>();
                    sum.push(dot + bias.get(expert * rows + r).map_or(0.0, |&b| f64::from(b)));
                }
            }
            sums.push(sum);
            // Null where not given, but a buffer all the same.
            let or_some =
                |values: &[f32]| Buffer::Input(bytes_of(if values.is_empty() { &[0.0] } else { values }));
            buffers.extend([Buffer::Input(tiles), or_some(&bias), or_some(&residual)]);
            buffers.push(Buffer::Input(vec![]));
            residuals.push(residual);
        }
        if let Some(glu) = glu {
            let up = sums.remove(1);
            sums[0].iter_mut().zip(up).for_each(|(gate, up)| *gate = gated(glu, *gate, up));
        }
        for (i, (mut sum, residual)) in sums.into_iter().zip(residuals).enumerate() {
            sum.iter_mut().zip(residual).for_each(|(v, r)| *v += f64::from(r));
            buffers[3 + 4 * i + 3] = Buffer::Output(Expected::F32(sum));
        }
        if glu.is_some() {
            buffers[3 + 4 + 3] = Buffer::Input(vec![0; 4]);
        }
        Problem {
            buffers,
            launches: Box::new(move |at| {
                let given = |at: DevicePtr| if addends { at } else { DevicePtr::NULL };
                let matrix = |(&n_rows, at): (&usize, &[DevicePtr])| Matrix {
                    w: at[0],
                    bias: given(at[1]),
                    residual: given(at[2]),
                    y: at[3],
                    n_rows,
                };
                launch(&Operands {
                    matrices: n_rows.iter().zip(at[3..].chunks(4)).map(matrix).collect(),
                    x: at[0],
                    experts: experts.map(|(_, pairs_per_x)| Experts { ids: at[1], pairs_per_x }),
                    scratch: at[2],
                })
            }),
        }
    }
}
