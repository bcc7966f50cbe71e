//! Functions of one element, for the kernels that apply them ([`elementwise`](super::elementwise), [`glu`](super::glu)):
//! one row each, with its f64 definition and its f32 form.
//!
//! A kernel takes the function as a number: all threads branch alike, which costs a few cycles where an entry per function
//! would cost the JIT. `a` and `b` are a function's parameters, 0 where it has none.

macro_rules! functions {
    ($($(#[$doc:meta])* $name:ident: |$x:ident, $a:ident, $b:ident| $reference:expr, $device:expr;)+) => {
        /// A function of an element `x` and parameters `a`, `b`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u32)]
        pub enum Function {
            $($(#[$doc])* $name,)+
        }

        impl Function {
            /// All of them.
            #[cfg(not(target_arch = "nvptx64"))]
            pub const ALL: &[Function] = &[$(Function::$name),+];

            /// The definition.
            #[cfg(not(target_arch = "nvptx64"))]
            pub fn reference(self, x: f64, a: f64, b: f64) -> f64 {
                match self {
                    $(Function::$name => { let ($x, $a, $b) = (x, a, b); let _ = ($a, $b); $reference })+
                }
            }
        }

        /// The function of this number, of each of up to eight elements: many at a branch, so that their latencies overlap.
        #[cfg(any(target_arch = "nvptx64", feature = "emu"))]
        #[inline(always)]
        pub(crate) fn apply<const N: usize>(function: u32, x: [[f32; 4]; N], a: f32, b: f32) -> [[f32; 4]; N] {
            $(if function == Function::$name as u32 {
                let ($a, $b) = (a, b);
                let _ = ($a, $b);
                let mut y = x;
                unroll!(H in 0..2 {
                    if H < N {
                        unroll!(J in 0..4 {
                            let $x = x[H][J];
                            y[H][J] = $device;
                        });
                    }
                });
                return y;
            })+
            x
        }
    };
}

functions! {
    /// x · sigmoid(x)
    Silu: |x, a, b| x / (1.0 + libm::exp(-x)), x * math::sigmoid(x);
    /// The tanh form: 0.5 · x · (1 + tanh(√(2/π) · (x + 0.044715 · x³)))
    Gelu: |x, a, b| 0.5 * x * (1.0 + libm::tanh(GELU * (x + 0.044715 * x * x * x))),
        // 0.5 · (1 + tanh u) is sigmoid(2u), without the cancellation.
        x * math::sigmoid(2.0 * GELU as f32 * x * math::fma(0.044715 * x, x, 1.0));
    /// The exact form: 0.5 · x · (1 + erf(x / √2))
    GeluErf: |x, a, b| 0.5 * x * (1.0 + libm::erf(x * core::f64::consts::FRAC_1_SQRT_2)), {
        let half_tail = 0.5 * math::fabs(x) * math::erfc(math::fabs(x) * core::f32::consts::FRAC_1_SQRT_2);
        math::fmax(x, 0.0) - half_tail
    };
    /// x · sigmoid(1.702 · x)
    GeluQuick: |x, a, b| x / (1.0 + libm::exp(-1.702 * x)), x * math::sigmoid(1.702 * x);
    /// max(x, 0)
    Relu: |x, a, b| x.max(0.0), math::fmax(x, 0.0);
    /// max(x, 0)²
    ReluSqr: |x, a, b| x.max(0.0) * x.max(0.0), math::fmax(x, 0.0) * math::fmax(x, 0.0);
    /// x, or a · x below 0
    LeakyRelu: |x, a, b| if x < 0.0 { a * x } else { x }, if x < 0.0 { a * x } else { x };
    /// Hyperbolic tangent.
    Tanh: |x, a, b| libm::tanh(x), math::tanh(x);
    /// 1 / (1 + e⁻ˣ)
    Sigmoid: |x, a, b| 1.0 / (1.0 + libm::exp(-x)), math::sigmoid(x);
    /// min(1, max(0, (x + 3) / 6))
    HardSigmoid: |x, a, b| ((x + 3.0) / 6.0).clamp(0.0, 1.0), clamp((x + 3.0) / 6.0, 0.0, 1.0);
    /// x · min(1, max(0, (x + 3) / 6))
    HardSwish: |x, a, b| x * ((x + 3.0) / 6.0).clamp(0.0, 1.0), x * clamp((x + 3.0) / 6.0, 0.0, 1.0);
    /// eˣ
    Exp: |x, a, b| libm::exp(x), math::exp(x);
    /// −x
    Neg: |x, a, b| -x, -x;
    /// |x|
    Abs: |x, a, b| x.abs(), math::fabs(x);
    /// x²
    Sqr: |x, a, b| x * x, x * x;
    /// √x
    Sqrt: |x, a, b| libm::sqrt(x), math::sqrt(x);
    /// −1, 0 or 1
    Sign: |x, a, b| if x == 0.0 { 0.0 } else { x.signum() },
        if x == 0.0 { 0.0 } else { f32::copysign(1.0, x) };
    /// 1 above 0, else 0
    Step: |x, a, b| if x > 0.0 { 1.0 } else { 0.0 }, if x > 0.0 { 1.0 } else { 0.0 };
    /// Nearest integer, ties to even.
    Round: |x, a, b| libm::rint(x), math::round_even(x);
    /// x · a + b
    Scale: |x, a, b| x * a + b, math::fma(x, a, b);
    /// min(max(x, a), b)
    Clamp: |x, a, b| x.clamp(a, b), clamp(x, a, b);
    /// a · tanh(x / a)
    Softcap: |x, a, b| a * libm::tanh(x / a), a * math::tanh(x / a);
}

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
use crate::device::math;

/// √(2/π)
const GELU: f64 = 0.797_884_560_802_865_4;

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
#[inline(always)]
fn clamp(x: f32, low: f32, high: f32) -> f32 {
    math::fmin(math::fmax(x, low), high)
}
