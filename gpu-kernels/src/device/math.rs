//! Arithmetic that PTX has instructions for and core does not, or not under our control.

#[cfg(target_arch = "nvptx64")]
use super::intrinsics;

/// log2(e).
pub const LOG2_E: f32 = core::f32::consts::LOG2_E;
/// log2(e) less what f32 holds of it.
const LOG2_E_REST: f32 = (core::f64::consts::LOG2_E - LOG2_E as f64) as f32;

twin! {
    /// `n`, unknown to the compiler: a loop up to it stays rolled.
    pub fn opaque(n: u32) -> u32 {
        ptx {
            let mut n = n;
            // SAFETY: a comment, no instruction.
            unsafe { core::arch::asm!("// {}", inout(reg32) n, options(pure, nomem, nostack, preserves_flags)) }
            n
        }
        host { n }
    }
}

twin! {
    /// `n`, unknown to the compiler and new at each call: what follows from it is computed there, not kept in registers.
    pub fn fresh(n: u32) -> u32 {
        ptx {
            let mut n = n;
            // SAFETY: a comment, no instruction.
            unsafe { core::arch::asm!("// {}", inout(reg32) n, options(nomem, nostack, preserves_flags)) }
            n
        }
        host { n }
    }
}

twin! {
    /// `a * b`, never fused with an addition that follows (`mul.rn`).
    pub fn mul(a: f32, b: f32) -> f32 {
        ptx {
            // SAFETY: arithmetic.
            unsafe { intrinsics::mul(a, b) }
        }
        host { a * b }
    }
}

twin! {
    /// `a * b + c`, rounded once (`fma.rn`).
    pub fn fma(a: f32, b: f32, c: f32) -> f32 {
        ptx { core::intrinsics::fmaf32(a, b, c) }
        host { libm::fmaf(a, b, c) }
    }
}

twin! {
    /// 2 to the `x`, relative error 2^-22; denormals flushed (`ex2.approx.ftz`).
    pub fn ex2(x: f32) -> f32 {
        ptx {
            // SAFETY: arithmetic.
            unsafe { intrinsics::ex2(x) }
        }
        host { libm::exp2f(x) }
    }
}

twin! {
    /// `1 / x`, within 1 ulp; denormals flushed (`rcp.approx.ftz`).
    pub fn rcp(x: f32) -> f32 {
        ptx {
            // SAFETY: arithmetic.
            unsafe { intrinsics::rcp(x) }
        }
        host { 1.0 / x }
    }
}

twin! {
    /// `1 / sqrt(x)`, relative error 2^-22.4; denormals flushed (`rsqrt.approx.ftz`).
    pub fn rsqrt(x: f32) -> f32 {
        ptx {
            // SAFETY: arithmetic.
            unsafe { intrinsics::rsqrt(x) }
        }
        host { 1.0 / libm::sqrtf(x) }
    }
}

twin! {
    /// Square root, correctly rounded (`sqrt.rn`).
    pub fn sqrt(x: f32) -> f32 {
        ptx { core::intrinsics::sqrtf32(x) }
        host { libm::sqrtf(x) }
    }
}

twin! {
    /// The larger; a NaN loses against a number (`max.f32`).
    pub fn fmax(a: f32, b: f32) -> f32 {
        ptx {
            // SAFETY: arithmetic.
            unsafe { intrinsics::fmax(a, b) }
        }
        host { a.max(b) }
    }
}

twin! {
    /// The smaller; a NaN loses against a number (`min.f32`).
    pub fn fmin(a: f32, b: f32) -> f32 {
        ptx {
            // SAFETY: arithmetic.
            unsafe { intrinsics::fmin(a, b) }
        }
        host { a.min(b) }
    }
}

twin! {
    /// `|x|` (`abs.f32`).
    pub fn fabs(x: f32) -> f32 {
        ptx { f32::from_bits(x.to_bits() & 0x7fff_ffff) }
        host { x.abs() }
    }
}

twin! {
    /// Nearest integer, ties to even (`cvt.rni.f32.f32`).
    pub fn round_even(x: f32) -> f32 {
        ptx { core::intrinsics::round_ties_even_f32(x) }
        host { libm::rintf(x) }
    }
}

twin! {
    /// Four bytes out of the eight of `a` (0..4) and `b` (4..8): nibble `i` of `selector` names byte `i` (`prmt`).
    pub fn prmt(a: u32, b: u32, selector: u32) -> u32 {
        ptx {
            // SAFETY: arithmetic.
            unsafe { intrinsics::prmt(a, b, selector) }
        }
        host {
            let bytes = (u64::from(b) << 32 | u64::from(a)).to_le_bytes();
            u32::from_le_bytes(core::array::from_fn(|i| {
                let nibble = (selector >> (4 * i)) as usize & 15;
                let byte = bytes[nibble & 7];
                // The nibble's top bit asks for the byte's sign, eight times.
                if nibble & 8 != 0 { (byte as i8 >> 7) as u8 } else { byte }
            }))
        }
    }
}

/// `low` and `high` as two f16, nearest even, the first in the low half (`cvt.rn.f16x2.f32`, one instruction from sm_80 on).
#[inline(always)]
pub fn pack_f16(low: f32, high: f32) -> u32 {
    #[cfg(all(target_arch = "nvptx64", sm_ge_80))]
    {
        let packed: u32;
        // SAFETY: arithmetic.
        unsafe {
            core::arch::asm!("cvt.rn.f16x2.f32 {},{},{};", out(reg32) packed, in(reg32) high, in(reg32) low, options(pure, nomem, nostack, preserves_flags))
        }
        packed
    }
    #[cfg(not(all(target_arch = "nvptx64", sm_ge_80)))]
    {
        u32::from(quant::bits::f32_to_f16(low)) | u32::from(quant::bits::f32_to_f16(high)) << 16
    }
}

/// `x` in f32; the last bit is set where that is not exact, so that rounding on to f16 is as if from `x`.
#[cfg(not(target_arch = "nvptx64"))]
fn round_to_odd(x: f64) -> f32 {
    let nearest = x as f32;
    let beyond = f64::from(nearest).abs() > x.abs();
    let towards_zero = nearest.to_bits() - u32::from(beyond);
    f32::from_bits(if f64::from(nearest) == x || x.is_nan() { nearest.to_bits() } else { towards_zero | 1 })
}

/// Arithmetic on two f16 in a word, each result rounded to nearest even.
#[cfg(any(not(target_arch = "nvptx64"), sm_ge_80))]
macro_rules! two_f16 {
    ($($(#[$meta:meta])* $name:ident($($arg:ident),*): $instruction:literal, |$($x:ident),*| $value:expr;)*) => {$(
        $(#[$meta])*
        #[inline(always)]
        pub fn $name($($arg: u32),*) -> u32 {
            #[cfg(target_arch = "nvptx64")]
            {
                let result: u32;
                // SAFETY: arithmetic.
                unsafe {
                    core::arch::asm!($instruction, out(reg32) result, $(in(reg32) $arg,)* options(pure, nomem, nostack, preserves_flags))
                }
                result
            }
            #[cfg(not(target_arch = "nvptx64"))]
            {
                let half = |shift: u32| {
                    // Products are exact in f64, and sums nearly.
                    $(let $x = half::f16::from_bits(($arg >> shift) as u16).to_f64();)*
                    u32::from(half::f16::from_f32(round_to_odd($value)).to_bits()) << shift
                };
                half(0) | half(16)
            }
        }
    )*};
}

#[cfg(any(not(target_arch = "nvptx64"), sm_ge_80))]
two_f16! {
    /// `a - b`.
    sub_f16(a, b): "sub.rn.f16x2 {},{},{};", |x, y| x - y;
    /// `a * b`.
    mul_f16(a, b): "mul.rn.f16x2 {},{},{};", |x, y| x * y;
    /// `a * b + c`, rounded once.
    fma_f16(a, b, c): "fma.rn.f16x2 {},{},{},{};", |x, y, z| x * y + z;
}

/// `low` and `high` as two bf16, nearest even, the first in the low half (`cvt.rn.bf16x2.f32`, one instruction from sm_80
/// on).
#[inline(always)]
pub fn pack_bf16(low: f32, high: f32) -> u32 {
    #[cfg(all(target_arch = "nvptx64", sm_ge_80))]
    {
        let packed: u32;
        // SAFETY: arithmetic.
        unsafe {
            core::arch::asm!("cvt.rn.bf16x2.f32 {},{},{};", out(reg32) packed, in(reg32) high, in(reg32) low, options(pure, nomem, nostack, preserves_flags))
        }
        packed
    }
    #[cfg(not(all(target_arch = "nvptx64", sm_ge_80)))]
    {
        u32::from(quant::bits::f32_to_bf16(low)) | u32::from(quant::bits::f32_to_bf16(high)) << 16
    }
}

/// Four of `vmad`, which multiply a byte each: what `dp4a` replaced. Without byte extraction, which takes instructions and
/// keeps registers busy.
#[cfg(all(target_arch = "nvptx64", not(sm_ge_61)))]
macro_rules! four_vmad {
    ($of_a:literal, $a:expr, $b:expr, $c:expr) => {{
        let mut sum = $c;
        // SAFETY: arithmetic.
        unsafe {
            core::arch::asm!(
                concat!("vmad.s32.", $of_a, ".s32 {0},{1}.b0,{2}.b0,{0};"),
                concat!("vmad.s32.", $of_a, ".s32 {0},{1}.b1,{2}.b1,{0};"),
                concat!("vmad.s32.", $of_a, ".s32 {0},{1}.b2,{2}.b2,{0};"),
                concat!("vmad.s32.", $of_a, ".s32 {0},{1}.b3,{2}.b3,{0};"),
                inout(reg32) sum, in(reg32) $a, in(reg32) $b,
                options(pure, nomem, nostack, preserves_flags)
            )
        }
        sum
    }};
}

twin! {
    /// Sum of `c` and the four products of unsigned bytes of `a` with signed bytes of `b`: `dp4a.u32.s32`, from sm_61 on;
    /// before, `vmad` a byte at a time.
    pub fn dp4a_us(a: u32, b: u32, c: i32) -> i32 {
        ptx {
            #[cfg(sm_ge_61)]
            // SAFETY: arithmetic.
            return unsafe { intrinsics::dp4a_us(a, b, c) };
            #[cfg(not(sm_ge_61))]
            four_vmad!("u32", a, b, c)
        }
        host {
            let product = |i: u32| (a >> (8 * i) & 0xff) as i32 * ((b << (24 - 8 * i)) as i32 >> 24);
            (0..4).fold(c, |sum, i| sum.wrapping_add(product(i)))
        }
    }
}

twin! {
    /// Sum of `c` and the four products of signed bytes: `dp4a.s32.s32`, from sm_61 on; before, `vmad` a byte at a time.
    pub fn dp4a(a: u32, b: u32, c: i32) -> i32 {
        ptx {
            #[cfg(sm_ge_61)]
            // SAFETY: arithmetic.
            return unsafe { intrinsics::dp4a_ss(a, b, c) };
            #[cfg(not(sm_ge_61))]
            four_vmad!("s32", a, b, c)
        }
        host {
            let byte = |v: u32, i: u32| (v << (24 - 8 * i)) as i32 >> 24;
            (0..4).fold(c, |sum, i| sum.wrapping_add(byte(a, i) * byte(b, i)))
        }
    }
}

/// `e^x`, relative error 2^-21.5; infinite above 88.8, zero below -87.4. NaN stays.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // The bounds keep the correction finite; both lie beyond what `ex2` can represent.
    let x = if x < -104.0 { -104.0 } else { x };
    let x = if x > 89.0 { 89.0 } else { x };
    let power = mul(x, LOG2_E);
    // What rounding took from the product, and what f32 took from log2(e): up to 2^-17 for large x.
    let rest = fma(x, LOG2_E, -power) + x * LOG2_E_REST;
    ex2(power) * fma(rest, core::f32::consts::LN_2, 1.0)
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    rcp(1.0 + ex2(-x * LOG2_E))
}

/// Hyperbolic tangent, relative error 2^-21.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    // Near zero the fraction below would cancel: Lambert's continued fraction to the fifth term, good to 5e-10 there.
    if fabs(x) < 0.6 {
        let square = x * x;
        let above = fma(square, square + 105.0, 945.0);
        let below = fma(square, fma(square, 15.0, 420.0), 945.0);
        return x * above * rcp(below);
    }
    let magnitude = fma(-2.0, rcp(1.0 + ex2(2.0 * LOG2_E * fabs(x))), 1.0);
    f32::copysign(magnitude, x)
}

/// `1 - erf(x)` for x >= 0, absolute error 1.5e-7: Abramowitz and Stegun 7.1.26.
#[inline(always)]
pub fn erfc(x: f32) -> f32 {
    let t = rcp(fma(0.327_591_1, x, 1.0));
    let terms = [0.254_829_6, -0.284_496_74, 1.421_413_7, -1.453_152_1, 1.061_405_4];
    let series = terms.iter().rev().fold(0.0, |sum, &term| fma(sum, t, term));
    series * t * ex2(-x * x * LOG2_E)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic_in_f16_rounds_once() {
        // 2^-5 (1 + 2^-10) · 2^-6 (1 - 2^-10) is just below 2^-11, half of the last place of 1 + 2^-10. In f32 the sum would
        // be the middle, and from there go up.
        assert_eq!(fma_f16(0x2801, 0x23fe, 0x3c01), 0x3c01);
        // Above the middle it goes up, though the middle itself would go down.
        assert_eq!(fma_f16(0x2801 << 16, 0x2401 << 16, 0x3c02 << 16), 0x3c03 << 16);
        // A subtraction of the middle itself: to even.
        assert_eq!(sub_f16(0x3c01, 0x9000), 0x3c02);
    }
}
