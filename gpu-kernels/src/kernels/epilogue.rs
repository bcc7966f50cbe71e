//! What follows a product in the same launch, alike in every product kernel: [`Part`], [`Glu`].
//!
//! In this order, each a plain f32 operation: `+ bias[r]`; of a gated pair `act(gate) · up`; `+ residual[c][r]`.

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

/// One matrix as kernels take it. `Glb` and `DevicePtr` are one address each.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Part<Address: Copy> {
    /// Tiled weights.
    pub w: Address,
    /// Per row; may be zero.
    pub bias: Address,
    /// As `y`; may be zero.
    pub residual: Address,
    /// Output.
    pub y: Address,
    /// Rows.
    pub n_rows: u32,
    /// The first CTA that works on it.
    pub first_cta: u32,
}

// SAFETY: four addresses of eight bytes and two words: no padding; any bits are valid.
unsafe impl<Address: bytemuck::Pod> bytemuck::Pod for Part<Address> {}
// SAFETY: as above; zero addresses mean "not given".
unsafe impl<Address: bytemuck::Zeroable + Copy> bytemuck::Zeroable for Part<Address> {}

/// [`Glu`] as kernels take it.
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct GluArgs {
    /// 0 none, then in [`Glu`]'s order.
    pub kind: u32,
    /// Of [`Glu::SwigluOai`].
    pub alpha: f32,
    /// Of [`Glu::SwigluOai`].
    pub limit: f32,
}

#[cfg(not(target_arch = "nvptx64"))]
impl From<Option<Glu>> for GluArgs {
    fn from(glu: Option<Glu>) -> GluArgs {
        let (kind, alpha, limit) = match glu {
            None => (0, 0.0, 0.0),
            Some(Glu::Silu) => (1, 0.0, 0.0),
            Some(Glu::Gelu) => (2, 0.0, 0.0),
            Some(Glu::SwigluOai { alpha, limit }) => (3, alpha, limit),
        };
        GluArgs { kind, alpha, limit }
    }
}

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
impl GluArgs {
    /// `act(gate) · up`.
    #[inline(always)]
    pub fn gated(&self, gate: f32, up: f32) -> f32 {
        use crate::device::math::{LOG2_E, ex2, fma, fmax, fmin, mul, rcp};

        let sigmoid = |x: f32| rcp(1.0 + ex2(-x * LOG2_E));
        match self.kind {
            1 => gate * sigmoid(gate) * up,
            2 => {
                let cubic = fma(mul(gate, gate), 0.044_715, 1.0);
                gate * sigmoid(mul(mul(gate, 1.595_769), cubic)) * up
            }
            _ => {
                let gate = fmin(gate, self.limit);
                let up = fmax(fmin(up, self.limit), -self.limit);
                gate * sigmoid(mul(self.alpha, gate)) * (up + 1.0)
            }
        }
    }
}
