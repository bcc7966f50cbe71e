//! The vector machine on AVX2, FMA and F16C: two registers are 16 lanes; with or without AVX-VNNI's byte dot product.

use core::arch::x86_64::*;

use super::vector::{PairOp, Pairs, Simd, SimdOp};

/// Proof that the CPU and the system have AVX2, FMA and F16C, and AVX-VNNI if `VNNI`.
#[derive(Clone, Copy)]
pub(super) struct Avx2<const VNNI: bool>(());

impl<const VNNI: bool> Avx2<VNNI> {
    /// The token.
    ///
    /// # Safety
    /// * The CPU has the instructions named above and the system saves their registers.
    pub(super) unsafe fn new_unchecked() -> Self {
        Avx2(())
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline(never)]
fn with_avx2<O: SimdOp>(s: Avx2<false>, op: O) -> O::Output {
    op.run(s)
}

#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
#[inline(never)]
fn with_avx_vnni<O: SimdOp>(s: Avx2<true>, op: O) -> O::Output {
    op.run(s)
}

/// As [`with_avx2`].
#[target_feature(enable = "avx2,fma,f16c")]
#[inline(never)]
fn pairs_with_avx2<O: PairOp>(s: Avx2<false>, op: O) {
    op.run(s)
}

/// Lanes 0..8 and 8..16.
type F = (__m256, __m256);
/// Lanes 0..8 and 8..16.
type I = (__m256i, __m256i);

/// Every safety argument below but those on memory is the same: the token proves the instructions.
macro_rules! with_token {
    ($e:expr) => {{
        // SAFETY: register-only instructions, which the token `self` proves the CPU to have.
        unsafe { $e }
    }};
}

/// Eight rows of four dwords as four columns. Not closures: those may be compiled on their own, without the features.
///
/// # Safety
/// * 16 bytes at each `p + i·stride` are readable; the CPU has AVX2.
#[inline(always)]
unsafe fn transpose_half(p: *const u8, stride: usize) -> [__m256i; 4] {
    // SAFETY: by this function's contract.
    unsafe {
        // Lane l of register i holds row 4l + i, so transposing within lanes leaves rows in lane order.
        let mut r = [_mm256_setzero_si256(); 4];
        for (i, r) in r.iter_mut().enumerate() {
            let (low, high) = (p.add(i * stride).cast(), p.add((4 + i) * stride).cast());
            let low = _mm256_castsi128_si256(_mm_loadu_si128(low));
            *r = _mm256_inserti128_si256::<1>(low, _mm_loadu_si128(high));
        }
        let (a, b) = (_mm256_unpacklo_epi32(r[0], r[1]), _mm256_unpackhi_epi32(r[0], r[1]));
        let (c, d) = (_mm256_unpacklo_epi32(r[2], r[3]), _mm256_unpackhi_epi32(r[2], r[3]));
        [
            _mm256_unpacklo_epi64(a, c),
            _mm256_unpackhi_epi64(a, c),
            _mm256_unpacklo_epi64(b, d),
            _mm256_unpackhi_epi64(b, d),
        ]
    }
}

impl<const VNNI: bool> Simd for Avx2<VNNI> {
    type F = F;
    type I = I;
    const WIDE: bool = false;
    const VNNI: bool = VNNI;

    #[inline(always)]
    fn call<O: SimdOp>(self, op: O) -> O::Output {
        // SAFETY: the token proves the features.
        unsafe { if VNNI { with_avx_vnni(Avx2(()), op) } else { with_avx2(Avx2(()), op) } }
    }
    /// The byte dot product would save one instruction of a dozen: not worth a copy of every format's kernel.
    #[inline(always)]
    fn call_pairs<O: PairOp>(self, op: O) -> bool {
        // SAFETY: the token proves the features.
        unsafe { pairs_with_avx2(Avx2(()), op) }
        true
    }
    #[inline(always)]
    fn splat(self, x: f32) -> F {
        with_token!((_mm256_set1_ps(x), _mm256_set1_ps(x)))
    }
    #[inline(always)]
    fn load(self, x: &[f32; 16]) -> F {
        // SAFETY: a reference to 64 readable bytes; the token proves the instruction.
        unsafe { (_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))) }
    }
    #[inline(always)]
    fn store(self, v: F, out: &mut [f32; 16]) {
        // SAFETY: a reference to 64 writable bytes; the token proves the instruction.
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), v.0);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), v.1);
        }
    }
    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        with_token!((_mm256_add_ps(a.0, b.0), _mm256_add_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        with_token!((_mm256_sub_ps(a.0, b.0), _mm256_sub_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        with_token!((_mm256_mul_ps(a.0, b.0), _mm256_mul_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        with_token!((_mm256_div_ps(a.0, b.0), _mm256_div_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn fma(self, a: F, b: F, c: F) -> F {
        with_token!((_mm256_fmadd_ps(a.0, b.0, c.0), _mm256_fmadd_ps(a.1, b.1, c.1)))
    }
    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        with_token!((_mm256_max_ps(a.0, b.0), _mm256_max_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn min(self, a: F, b: F) -> F {
        with_token!((_mm256_min_ps(a.0, b.0), _mm256_min_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn abs(self, a: F) -> F {
        with_token!({
            let sign = _mm256_set1_ps(-0.0);
            (_mm256_andnot_ps(sign, a.0), _mm256_andnot_ps(sign, a.1))
        })
    }
    #[inline(always)]
    fn copysign(self, a: F, sign: F) -> F {
        with_token!({
            let mask = _mm256_set1_ps(-0.0);
            let one = |a, s| _mm256_or_ps(_mm256_andnot_ps(mask, a), _mm256_and_ps(mask, s));
            (one(a.0, sign.0), one(a.1, sign.1))
        })
    }
    #[inline(always)]
    fn round(self, a: F) -> F {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        with_token!((_mm256_round_ps::<NEAREST>(a.0), _mm256_round_ps::<NEAREST>(a.1)))
    }
    #[inline(always)]
    fn trunc(self, a: F) -> F {
        const ZERO: i32 = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;
        with_token!((_mm256_round_ps::<ZERO>(a.0), _mm256_round_ps::<ZERO>(a.1)))
    }
    #[inline(always)]
    fn select_lt(self, a: F, b: F, x: F, y: F) -> F {
        with_token!((
            _mm256_blendv_ps(y.0, x.0, _mm256_cmp_ps::<_CMP_LT_OQ>(a.0, b.0)),
            _mm256_blendv_ps(y.1, x.1, _mm256_cmp_ps::<_CMP_LT_OQ>(a.1, b.1))
        ))
    }
    #[inline(always)]
    fn pow2(self, n: F) -> F {
        with_token!({
            let one = |n| {
                let biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
            };
            (one(n.0), one(n.1))
        })
    }
    #[inline(always)]
    fn reduce_add4(self, a: [F; 4]) -> [f32; 4] {
        with_token!({
            let fold8 = |v: F| _mm256_add_ps(v.0, v.1);
            // i += i+4, two vectors a register: 128-bit lanes (a0 b0) + (a1 b1).
            let fold4 = |a, b| {
                _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b))
            };
            let ab = fold4(fold8(a[0]), fold8(a[1]));
            let cd = fold4(fold8(a[2]), fold8(a[3]));
            // i += i+2: each lane (a c) and (b d), two elements each.
            let v = _mm256_add_ps(_mm256_shuffle_ps::<0x44>(ab, cd), _mm256_shuffle_ps::<0xee>(ab, cd));
            // i += i+1: elements 0 and 2 of each lane.
            let v = _mm256_add_ps(v, _mm256_permute_ps::<0xb1>(v));
            let mut lanes = [0.0; 8];
            _mm256_storeu_ps(lanes.as_mut_ptr(), v);
            [lanes[0], lanes[4], lanes[2], lanes[6]]
        })
    }
    #[inline(always)]
    fn reduce_max(self, a: F) -> f32 {
        with_token!({
            let v = _mm256_max_ps(a.0, a.1);
            let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_max_ss(v, _mm_shuffle_ps::<1>(v, v)))
        })
    }
    #[inline(always)]
    fn to_i8(self, a: F, out: &mut [i8; 16]) {
        // SAFETY: 16 writable bytes; the token proves the instructions.
        unsafe {
            let words = _mm256_packs_epi32(_mm256_cvtps_epi32(a.0), _mm256_cvtps_epi32(a.1));
            let words = _mm256_permute4x64_epi64::<0xd8>(words);
            let bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            _mm_storeu_si128(out.as_mut_ptr().cast(), bytes);
        }
    }
    #[inline(always)]
    fn i32_to_f32(self, a: I) -> F {
        with_token!((_mm256_cvtepi32_ps(a.0), _mm256_cvtepi32_ps(a.1)))
    }
    #[inline(always)]
    fn low_f16(self, a: I) -> F {
        with_token!({
            let mask = _mm256_set1_epi32(0xffff);
            let words = _mm256_packus_epi32(_mm256_and_si256(a.0, mask), _mm256_and_si256(a.1, mask));
            let words = _mm256_permute4x64_epi64::<0xd8>(words);
            let (low, high) = (_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            (_mm256_cvtph_ps(low), _mm256_cvtph_ps(high))
        })
    }
    #[inline(always)]
    fn mul_i32(self, a: I, b: u32) -> I {
        with_token!({
            let b = _mm256_set1_epi32(b as i32);
            (_mm256_mullo_epi32(a.0, b), _mm256_mullo_epi32(a.1, b))
        })
    }
    #[inline(always)]
    fn and(self, a: I, b: u32) -> I {
        with_token!({
            let b = _mm256_set1_epi32(b as i32);
            (_mm256_and_si256(a.0, b), _mm256_and_si256(a.1, b))
        })
    }
    #[inline(always)]
    fn xor(self, a: I, b: u32) -> I {
        with_token!({
            let b = _mm256_set1_epi32(b as i32);
            (_mm256_xor_si256(a.0, b), _mm256_xor_si256(a.1, b))
        })
    }
    #[inline(always)]
    fn all_i32(self, x: u32) -> I {
        with_token!((_mm256_set1_epi32(x as i32), _mm256_set1_epi32(x as i32)))
    }
    #[inline(always)]
    fn add_i32(self, a: I, b: I) -> I {
        with_token!((_mm256_add_epi32(a.0, b.0), _mm256_add_epi32(a.1, b.1)))
    }
    #[inline(always)]
    fn sub_i32(self, a: I, b: I) -> I {
        with_token!((_mm256_sub_epi32(a.0, b.0), _mm256_sub_epi32(a.1, b.1)))
    }
    #[inline(always)]
    fn xor_i32(self, a: I, b: I) -> I {
        with_token!((_mm256_xor_si256(a.0, b.0), _mm256_xor_si256(a.1, b.1)))
    }
    #[inline(always)]
    fn or(self, a: I, b: I) -> I {
        with_token!((_mm256_or_si256(a.0, b.0), _mm256_or_si256(a.1, b.1)))
    }
    #[inline(always)]
    fn shr<const N: i32>(self, a: I) -> I {
        with_token!((_mm256_srli_epi32::<N>(a.0), _mm256_srli_epi32::<N>(a.1)))
    }
    #[inline(always)]
    fn shr_by(self, a: I, n: u32) -> I {
        with_token!({
            let n = _mm_cvtsi32_si128(n as i32);
            (_mm256_srl_epi32(a.0, n), _mm256_srl_epi32(a.1, n))
        })
    }
    #[inline(always)]
    fn shl<const N: i32>(self, a: I) -> I {
        with_token!((_mm256_slli_epi32::<N>(a.0), _mm256_slli_epi32::<N>(a.1)))
    }
    #[inline(always)]
    fn lookup(self, a: I, table: &[u8; 16]) -> I {
        // SAFETY: 16 readable bytes; the token proves the instructions.
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            (_mm256_shuffle_epi8(table, a.0), _mm256_shuffle_epi8(table, a.1))
        }
    }
    #[inline(always)]
    unsafe fn load_f32(self, p: *const u8) -> F {
        // SAFETY: 64 readable bytes by contract; the token proves the instruction.
        unsafe { (_mm256_loadu_ps(p.cast()), _mm256_loadu_ps(p.add(32).cast())) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u8) -> F {
        // SAFETY: 32 readable bytes by contract; the token proves the instructions.
        unsafe {
            let half = |p: *const u8| _mm256_cvtph_ps(_mm_loadu_si128(p.cast()));
            (half(p), half(p.add(16)))
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u8) -> F {
        // SAFETY: 32 readable bytes by contract; the token proves the instructions.
        unsafe {
            let half = |p: *const u8| {
                let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
            };
            (half(p), half(p.add(16)))
        }
    }
    #[inline(always)]
    unsafe fn store_f16(self, v: F, p: *mut u8) {
        // SAFETY: 32 writable bytes by contract; the token proves the instructions.
        unsafe {
            _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v.0));
            _mm_storeu_si128(p.add(16).cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v.1));
        }
    }
    #[inline(always)]
    unsafe fn load_i32(self, p: *const u8) -> I {
        // SAFETY: 64 readable bytes by contract; the token proves the instruction.
        unsafe { (_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast())) }
    }
    #[inline(always)]
    unsafe fn store_i32(self, v: I, p: *mut u8) {
        // SAFETY: 64 writable bytes by contract; the token proves the instruction.
        unsafe {
            _mm256_storeu_si256(p.cast(), v.0);
            _mm256_storeu_si256(p.add(32).cast(), v.1);
        }
    }
    #[inline(always)]
    unsafe fn gather_f16(self, p: *const u8, stride: usize) -> F {
        // SAFETY: each address readable by contract (unaligned reads); the token proves the instructions.
        unsafe {
            let half = |p: *const u8| {
                let h: [i16; 8] = core::array::from_fn(|i| p.add(i * stride).cast::<i16>().read_unaligned());
                _mm256_cvtph_ps(_mm_setr_epi16(h[0], h[1], h[2], h[3], h[4], h[5], h[6], h[7]))
            };
            (half(p), half(p.add(8 * stride)))
        }
    }
    #[inline(always)]
    unsafe fn transpose4(self, p: *const u8, stride: usize) -> [I; 4] {
        // SAFETY: 16 bytes at each of the 16 addresses are readable by contract; the token proves the instructions.
        unsafe {
            let (lo, hi) = (transpose_half(p, stride), transpose_half(p.add(8 * stride), stride));
            [(lo[0], hi[0]), (lo[1], hi[1]), (lo[2], hi[2]), (lo[3], hi[3])]
        }
    }
    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    #[inline(always)]
    fn prefetch_far(self, p: *const u8) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
    #[inline(always)]
    unsafe fn idot<const T: usize, const STEPS: usize, const CLASS: usize>(
        self,
        codes: *const u8,
        q: [*const i8; T],
        sums: [*const i32; T],
        bias: i32,
    ) -> [I; T] {
        // SAFETY: `64·STEPS` codes and `4·STEPS` activations are readable by contract; the token proves the rest.
        unsafe {
            let zero = _mm256_setzero_si256();
            let ones = _mm256_set1_epi16(1);
            let load = |step: usize| -> I {
                let p = codes.add(64 * step);
                (_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast()))
            };
            let q4 =
                |t: usize, step: usize| _mm256_set1_epi32(q[t].add(4 * step).cast::<i32>().read_unaligned());
            let mut acc = [(zero, zero); T];
            if VNNI || CLASS != 0 {
                for t in 0..T {
                    // Loaded as a vector: the compiler makes slow shuffles of scalars.
                    let sum = _mm256_broadcastd_epi32(_mm_loadu_si32(sums[t].cast()));
                    let start = _mm256_mullo_epi32(_mm256_set1_epi32(-bias), sum);
                    acc[t] = (start, start);
                }
            }
            if VNNI {
                for step in 0..STEPS {
                    let code = load(step);
                    for t in 0..T {
                        let q4 = q4(t, step);
                        acc[t].0 = _mm256_dpbusd_avx_epi32(acc[t].0, code.0, q4);
                        acc[t].1 = _mm256_dpbusd_avx_epi32(acc[t].1, code.1, q4);
                    }
                }
            } else if CLASS == 0 {
                // |code - bias| as unsigned times the activation with that sign: pair sums stay below 2·128·127.
                let bias = _mm256_set1_epi8(bias as i8);
                for step in 0..STEPS {
                    let code = load(step);
                    let w = (_mm256_sub_epi8(code.0, bias), _mm256_sub_epi8(code.1, bias));
                    let a = (_mm256_abs_epi8(w.0), _mm256_abs_epi8(w.1));
                    for t in 0..T {
                        let q4 = q4(t, step);
                        let dot =
                            |a, w| _mm256_madd_epi16(_mm256_maddubs_epi16(a, _mm256_sign_epi8(q4, w)), ones);
                        acc[t].0 = _mm256_add_epi32(acc[t].0, dot(a.0, w.0));
                        acc[t].1 = _mm256_add_epi32(acc[t].1, dot(a.1, w.1));
                    }
                }
            } else {
                let run = if CLASS < STEPS { CLASS } else { STEPS };
                for first in (0..STEPS).step_by(run) {
                    let mut pairs = [(zero, zero); T];
                    for step in first..first + run {
                        let code = load(step);
                        for t in 0..T {
                            let q4 = q4(t, step);
                            let product =
                                (_mm256_maddubs_epi16(code.0, q4), _mm256_maddubs_epi16(code.1, q4));
                            pairs[t].0 = _mm256_add_epi16(pairs[t].0, product.0);
                            pairs[t].1 = _mm256_add_epi16(pairs[t].1, product.1);
                        }
                    }
                    for t in 0..T {
                        acc[t].0 = _mm256_add_epi32(acc[t].0, _mm256_madd_epi16(pairs[t].0, ones));
                        acc[t].1 = _mm256_add_epi32(acc[t].1, _mm256_madd_epi16(pairs[t].1, ones));
                    }
                }
            }
            acc
        }
    }
}

impl Pairs for Avx2<false> {
    #[inline(always)]
    unsafe fn pair16(self, a: *const u8, b: *const u8) -> I {
        // SAFETY: 16 readable bytes at each by contract; the token proves the instructions.
        unsafe {
            let twice = |p: *const u8| _mm256_broadcastsi128_si256(_mm_loadu_si128(p.cast()));
            (twice(a), twice(b))
        }
    }
    #[inline(always)]
    unsafe fn pair32(self, a: *const u8, b: *const u8) -> I {
        // SAFETY: 32 readable bytes at each by contract; the token proves the instructions.
        unsafe { (_mm256_loadu_si256(a.cast()), _mm256_loadu_si256(b.cast())) }
    }
    #[inline(always)]
    fn pair_nibbles(self, v: I) -> I {
        with_token!({
            let shift = _mm256_setr_epi64x(0, 0, 4, 4);
            let nibbles = |v| _mm256_and_si256(_mm256_srlv_epi64(v, shift), _mm256_set1_epi32(0x0f0f_0f0f));
            (nibbles(v.0), nibbles(v.1))
        })
    }
    #[inline(always)]
    fn pair_bits(self, a: u32, b: u32, value: u8) -> I {
        with_token!({
            // Byte i gets byte i / 8 of the word, of which bit i % 8 is looked at.
            let spread =
                _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
            let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201u64 as i64);
            let bytes = |word: u32| {
                let word = _mm256_shuffle_epi8(_mm256_set1_epi32(word as i32), spread);
                let set = _mm256_cmpeq_epi8(_mm256_and_si256(word, bit), bit);
                _mm256_and_si256(set, _mm256_set1_epi8(value as i8))
            };
            (bytes(a), bytes(b))
        })
    }
    #[inline(always)]
    unsafe fn pair_dot<const CLASS: usize>(self, codes: I, q: *const i8) -> I {
        // SAFETY: 32 readable bytes by contract; the token proves the instructions.
        unsafe {
            let q = _mm256_loadu_si256(q.cast());
            let dot = |codes| {
                let (unsigned, q) = if CLASS == 0 {
                    // |code - 128| as unsigned times the activation with that sign, as in `idot`.
                    let signed = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
                    (_mm256_abs_epi8(signed), _mm256_sign_epi8(q, signed))
                } else {
                    (codes, q)
                };
                _mm256_madd_epi16(_mm256_maddubs_epi16(unsigned, q), _mm256_set1_epi16(1))
            };
            (dot(codes.0), dot(codes.1))
        }
    }
    #[inline(always)]
    fn pair_rest<const CLASS: usize>(self) -> i32 {
        if CLASS == 0 { 128 } else { 0 }
    }
    #[inline(always)]
    fn pair_sums(self, pairs: [I; 8]) -> [I; 2] {
        with_token!({
            let two = |a, b| _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
            let four = |a, b, c, d| {
                let (a, b) = (two(a, b), two(c, d));
                _mm256_add_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b))
            };
            // Each holds four rows' first halves, then their second.
            let [p0, p1, p2, p3, p4, p5, p6, p7] = pairs;
            let first = (four(p0.0, p1.0, p2.0, p3.0), four(p4.0, p5.0, p6.0, p7.0));
            let second = (four(p0.1, p1.1, p2.1, p3.1), four(p4.1, p5.1, p6.1, p7.1));
            [
                (
                    _mm256_permute2x128_si256::<0x20>(first.0, first.1),
                    _mm256_permute2x128_si256::<0x20>(second.0, second.1),
                ),
                (
                    _mm256_permute2x128_si256::<0x31>(first.0, first.1),
                    _mm256_permute2x128_si256::<0x31>(second.0, second.1),
                ),
            ]
        })
    }
}
