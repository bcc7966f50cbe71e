//! Vector exp and the functions built on it: the same bits on every machine, because only fma and other correctly
//! rounded steps are used.

use super::vector::Simd;

/// e^x within 2 ulp, also where the result is subnormal; NaN stays NaN.
///
/// x = n·ln2 + r with |r| ≤ ln2/2; e^r by the degree-7 polynomial of Cephes' `expf`; then 2ⁿ in two steps, because
/// neither end of the range fits one.
#[inline(always)]
pub(super) fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    // Beyond these the result is 0 or infinite anyway. The bound comes first, so that NaN gets through.
    let x = s.min(s.splat(89.0), s.max(s.splat(-105.0), x));
    let n = s.round(s.mul(x, s.splat(core::f32::consts::LOG2_E)));
    // ln2 in two parts; n times the first is exact.
    let r = s.fma(n, s.splat(-0.693_359_4), x);
    let r = s.fma(n, s.splat(2.121_944_4e-4), r);
    let mut p = s.splat(1.987_569_1e-4);
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1] {
        p = s.fma(p, r, s.splat(c));
    }
    let p = s.add(s.fma(s.mul(r, r), p, r), s.splat(1.0));
    let half = s.trunc(s.mul(n, s.splat(0.5)));
    s.mul(s.mul(p, s.pow2(half)), s.pow2(s.sub(n, half)))
}

/// 1 / (1 + e⁻ˣ)
#[inline(always)]
pub(super) fn sigmoid<S: Simd>(s: S, x: S::F) -> S::F {
    let one = s.splat(1.0);
    s.div(one, s.add(one, exp(s, s.sub(s.splat(0.0), x))))
}

/// x / (1 + e⁻ʸ): silu for y = x, the tanh form of gelu for y = 2√(2/π)·(x + 0.044715·x³).
#[inline(always)]
pub(super) fn gate<S: Simd>(s: S, x: S::F, y: S::F) -> S::F {
    s.div(x, s.add(s.splat(1.0), exp(s, s.sub(s.splat(0.0), y))))
}

/// tanh(x): Cephes' odd polynomial below 0.625, else 1 − 2 / (e^2|x| + 1).
#[inline(always)]
pub(super) fn tanh<S: Simd>(s: S, x: S::F) -> S::F {
    let a = s.abs(x);
    let z = s.mul(x, x);
    let mut p = s.splat(-5.704_988_7e-3);
    for c in [2.063_909e-2, -5.373_971_6e-2, 1.333_144_2e-1, -3.333_328e-1] {
        p = s.fma(p, z, s.splat(c));
    }
    let small = s.fma(s.mul(z, p), x, x);
    let one = s.splat(1.0);
    let e = exp(s, s.add(a, a));
    let large = s.sub(one, s.div(s.splat(2.0), s.add(e, one)));
    s.select_lt(a, s.splat(0.625), small, s.copysign(large, x))
}

/// The tanh form of gelu: 0.5·x·(1 + tanh(y)) = x / (1 + e⁻²ʸ), y = √(2/π)·(x + 0.044715·x³).
#[inline(always)]
pub(super) fn gelu<S: Simd>(s: S, x: S::F) -> S::F {
    let cubic = s.fma(s.mul(x, x), s.splat(0.044_715), s.splat(1.0));
    gate(s, x, s.mul(s.mul(x, s.splat(1.595_769)), cubic))
}

/// The exact form of gelu, 0.5·x·(1 + erf(z)) with z = x/√2.
///
/// erfc(|z|) = e^(−z²)·t·Q(t), t = 1/(1 + 0.3·|z|); Q is our own least-maximum fit of relative error 2e-8 on 0..10.
/// Written with erfc, so that nothing cancels for negative x.
#[inline(always)]
pub(super) fn gelu_erf<S: Simd>(s: S, x: S::F) -> S::F {
    let one = s.splat(1.0);
    let z = s.mul(s.abs(x), s.splat(core::f32::consts::FRAC_1_SQRT_2));
    let t = s.div(one, s.fma(z, s.splat(0.3), one));
    let mut q = s.splat(-0.129_522_77);
    for c in [
        0.485_562_57,
        -0.512_276_8,
        0.547_717_87,
        -0.094_649_74,
        0.214_925_65,
        0.148_339_27,
        0.170_715_21,
        0.169_188_01,
    ] {
        q = s.fma(q, t, s.splat(c));
    }
    let square = s.mul(z, z);
    let half_erfc = s.mul(s.splat(0.5), s.mul(s.mul(exp(s, s.sub(s.splat(0.0), square)), t), q));
    let lower = s.mul(x, half_erfc);
    s.select_lt(x, s.splat(0.0), lower, s.sub(x, lower))
}

#[cfg(test)]
mod tests {
    use super::super::scalar::Scalar;
    use super::*;

    /// Distance in representable values.
    fn ulps(a: f32, b: f32) -> u32 {
        a.to_bits().abs_diff(b.to_bits())
    }

    #[test]
    fn exp_is_within_two_ulps() {
        // 16 values at once; steps that hit no grid of the reduction. The other machines give the same bits, which the
        // integration tests show.
        let mut x = -104.0f32;
        while x < 88.7 {
            let lanes: [f32; 16] = core::array::from_fn(|i| x + i as f32 * 0.000_713);
            for (x, got) in lanes.into_iter().zip(exp(Scalar, lanes)) {
                let expected = libm::exp(x as f64) as f32;
                assert!(ulps(got, expected) <= 2, "exp({x:e}) is {got:e}, expected {expected:e}");
            }
            x += 16.0 * 0.000_713;
        }
    }

    #[test]
    fn exp_at_the_ends() {
        let mut x = [0.0; 16];
        x[1] = f32::NEG_INFINITY;
        x[2] = f32::INFINITY;
        x[3] = f32::NAN;
        x[4] = -1e30;
        let e = exp(Scalar, x);
        assert_eq!((e[0], e[1], e[2], e[4]), (1.0, 0.0, f32::INFINITY, 0.0));
        assert!(e[3].is_nan());
    }
}
