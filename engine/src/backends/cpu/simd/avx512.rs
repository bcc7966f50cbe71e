//! The vector machine on AVX-512 (F, BW, DQ, VL, VNNI): one register is 16 lanes.

use core::arch::x86_64::*;

use super::codebook::{Codebook, load_entries};
use super::vector::{PairOp, Pairs, Simd, SimdOp};

/// Proof that the CPU and the system have AVX-512 F, BW, DQ, VL and VNNI, besides AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(super) struct Avx512 {
    /// Whether also VBMI.
    vbmi: bool,
}

impl Avx512 {
    /// The token.
    ///
    /// # Safety
    /// * The CPU has the instructions named above, if `vbmi` also AVX-512 VBMI, and the system saves their registers.
    pub(super) unsafe fn new_unchecked(vbmi: bool) -> Avx512 {
        Avx512 { vbmi }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline(never)]
fn with_features<O: SimdOp>(s: Avx512, op: O) -> O::Output {
    op.run(s)
}

/// As [`with_features`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline(never)]
fn pairs_with_features<O: PairOp>(s: Avx512, op: O) {
    op.run(s)
}

/// [`Simd::codewords`] a byte of the entries at a time: 128 bytes of a plane are two registers to permute across.
///
/// # Safety
/// * As [`Simd::codewords`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
#[inline(never)]
unsafe fn permute_entries<const PAGES: usize, const WORDS: usize>(
    book: &Codebook<PAGES, WORDS>,
    low: *const u8,
    high: *const u8,
    n: usize,
    out: *mut u8,
) {
    // SAFETY: memory by this function's contract; a plane has `256·PAGES` bytes.
    unsafe {
        // Within 128 bits: four rows of four columns to four columns of four rows, and so back by interleaving.
        let columns =
            _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
        for v in 0..n {
            let index = _mm512_shuffle_epi8(_mm512_loadu_si512(low.add(64 * v).cast()), columns);
            let upper_half = _mm512_movepi8_mask(index);
            let mut odd_pages = [0; 3];
            if PAGES > 1 {
                let page = _mm512_shuffle_epi8(_mm512_loadu_si512(high.add(64 * v).cast()), columns);
                for (bit, mask) in odd_pages.iter_mut().enumerate() {
                    *mask = _mm512_test_epi8_mask(page, _mm512_set1_epi8(1 << bit));
                }
            }
            for (w, planes) in book.planes.iter().enumerate() {
                let mut bytes = [_mm512_setzero_si512(); 4];
                for (plane, byte) in planes.iter().zip(&mut bytes) {
                    let mut found = [_mm512_setzero_si512(); PAGES];
                    for (page, found) in plane.iter().zip(&mut found) {
                        let at = |i: usize| page.as_ptr().add(64 * i).cast();
                        let halves = [
                            _mm512_permutex2var_epi8(
                                _mm512_loadu_si512(at(0)),
                                index,
                                _mm512_loadu_si512(at(1)),
                            ),
                            _mm512_permutex2var_epi8(
                                _mm512_loadu_si512(at(2)),
                                index,
                                _mm512_loadu_si512(at(3)),
                            ),
                        ];
                        *found = _mm512_mask_blend_epi8(upper_half, halves[0], halves[1]);
                    }
                    let (mut pages, mut bit) = (PAGES, 0);
                    while pages > 1 {
                        pages /= 2;
                        for i in 0..pages {
                            found[i] = _mm512_mask_blend_epi8(odd_pages[bit], found[2 * i], found[2 * i + 1]);
                        }
                        bit += 1;
                    }
                    *byte = found[0];
                }
                let [a, b, c, d] = bytes;
                let (ab, cd) = (_mm512_unpacklo_epi8(a, b), _mm512_unpacklo_epi8(c, d));
                let (ab_high, cd_high) = (_mm512_unpackhi_epi8(a, b), _mm512_unpackhi_epi8(c, d));
                let words = [
                    _mm512_unpacklo_epi16(ab, cd),
                    _mm512_unpackhi_epi16(ab, cd),
                    _mm512_unpacklo_epi16(ab_high, cd_high),
                    _mm512_unpackhi_epi16(ab_high, cd_high),
                ];
                for (i, word) in words.into_iter().enumerate() {
                    _mm512_storeu_si512(out.add(((4 * v + i) * WORDS + w) * 64).cast(), word);
                }
            }
        }
    }
}

/// Every safety argument below but those on memory is the same: the token proves the instructions.
macro_rules! with_token {
    ($e:expr) => {{
        // SAFETY: register-only instructions, which the token `self` proves the CPU to have.
        unsafe { $e }
    }};
}

impl Simd for Avx512 {
    type F = __m512;
    type I = __m512i;
    const WIDE: bool = true;
    const VNNI: bool = true;

    #[inline(always)]
    fn call<O: SimdOp>(self, op: O) -> O::Output {
        // SAFETY: the token proves the features.
        unsafe { with_features(self, op) }
    }
    #[inline(always)]
    fn call_pairs<O: PairOp>(self, op: O) -> bool {
        // SAFETY: the token proves the features.
        unsafe { pairs_with_features(self, op) }
        true
    }
    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        with_token!(_mm512_set1_ps(x))
    }
    #[inline(always)]
    fn load(self, x: &[f32; 16]) -> __m512 {
        // SAFETY: a reference to 64 readable bytes; the token proves the instruction.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }
    #[inline(always)]
    fn store(self, v: __m512, out: &mut [f32; 16]) {
        // SAFETY: a reference to 64 writable bytes; the token proves the instruction.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), v) }
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        with_token!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        with_token!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        with_token!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        with_token!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        with_token!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        with_token!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        with_token!(_mm512_min_ps(a, b))
    }
    #[inline(always)]
    fn abs(self, a: __m512) -> __m512 {
        with_token!(_mm512_abs_ps(a))
    }
    #[inline(always)]
    fn copysign(self, a: __m512, sign: __m512) -> __m512 {
        with_token!({
            let mask = _mm512_set1_ps(-0.0);
            _mm512_or_ps(_mm512_andnot_ps(mask, a), _mm512_and_ps(mask, sign))
        })
    }
    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        with_token!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a))
    }
    #[inline(always)]
    fn trunc(self, a: __m512) -> __m512 {
        with_token!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC }>(a))
    }
    #[inline(always)]
    fn select_lt(self, a: __m512, b: __m512, x: __m512, y: __m512) -> __m512 {
        with_token!(_mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), y, x))
    }
    #[inline(always)]
    fn pow2(self, n: __m512) -> __m512 {
        with_token!({
            let biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
        })
    }
    #[inline(always)]
    fn reduce_add4(self, a: [__m512; 4]) -> [f32; 4] {
        with_token!({
            // i += i+8, two vectors a register: 128-bit lanes (a0 a1 b0 b1) + (a2 a3 b2 b3).
            let fold8 =
                |a, b| _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b));
            let (ab, cd) = (fold8(a[0], a[1]), fold8(a[2], a[3]));
            // i += i+4: lanes (a b c d).
            let v = _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(ab, cd), _mm512_shuffle_f32x4::<0xdd>(ab, cd));
            let v = _mm512_add_ps(v, _mm512_permute_ps::<0x4e>(v));
            let v = _mm512_add_ps(v, _mm512_permute_ps::<0xb1>(v));
            // Element 0 of each lane to one xmm.
            let index = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
            let mut out = [0.0; 4];
            _mm_storeu_ps(out.as_mut_ptr(), _mm512_castps512_ps128(_mm512_permutexvar_ps(index, v)));
            out
        })
    }
    #[inline(always)]
    fn reduce_max(self, a: __m512) -> f32 {
        with_token!(_mm512_reduce_max_ps(a))
    }
    #[inline(always)]
    fn to_i8(self, a: __m512, out: &mut [i8; 16]) {
        // SAFETY: 16 writable bytes; the token proves the instructions.
        unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a))) }
    }
    #[inline(always)]
    fn i32_to_f32(self, a: __m512i) -> __m512 {
        with_token!(_mm512_cvtepi32_ps(a))
    }
    #[inline(always)]
    fn low_f16(self, a: __m512i) -> __m512 {
        with_token!(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(a)))
    }
    #[inline(always)]
    fn mul_i32(self, a: __m512i, b: u32) -> __m512i {
        with_token!(_mm512_mullo_epi32(a, _mm512_set1_epi32(b as i32)))
    }
    #[inline(always)]
    fn and(self, a: __m512i, b: u32) -> __m512i {
        with_token!(_mm512_and_si512(a, _mm512_set1_epi32(b as i32)))
    }
    #[inline(always)]
    fn xor(self, a: __m512i, b: u32) -> __m512i {
        with_token!(_mm512_xor_si512(a, _mm512_set1_epi32(b as i32)))
    }
    #[inline(always)]
    fn all_i32(self, x: u32) -> __m512i {
        with_token!(_mm512_set1_epi32(x as i32))
    }
    #[inline(always)]
    fn add_i32(self, a: __m512i, b: __m512i) -> __m512i {
        with_token!(_mm512_add_epi32(a, b))
    }
    #[inline(always)]
    fn sub_i32(self, a: __m512i, b: __m512i) -> __m512i {
        with_token!(_mm512_sub_epi32(a, b))
    }
    #[inline(always)]
    fn xor_i32(self, a: __m512i, b: __m512i) -> __m512i {
        with_token!(_mm512_xor_si512(a, b))
    }
    #[inline(always)]
    fn or(self, a: __m512i, b: __m512i) -> __m512i {
        with_token!(_mm512_or_si512(a, b))
    }
    #[inline(always)]
    fn shr<const N: i32>(self, a: __m512i) -> __m512i {
        with_token!(_mm512_srl_epi32(a, _mm_cvtsi32_si128(N)))
    }
    #[inline(always)]
    fn shr_by(self, a: __m512i, n: u32) -> __m512i {
        with_token!(_mm512_srl_epi32(a, _mm_cvtsi32_si128(n as i32)))
    }
    #[inline(always)]
    fn shl<const N: i32>(self, a: __m512i) -> __m512i {
        with_token!(_mm512_sll_epi32(a, _mm_cvtsi32_si128(N)))
    }
    #[inline(always)]
    fn lookup(self, a: __m512i, table: &[u8; 16]) -> __m512i {
        // SAFETY: 16 readable bytes; the token proves the instructions.
        unsafe {
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
            _mm512_shuffle_epi8(table, a)
        }
    }
    #[inline(always)]
    unsafe fn load_f32(self, p: *const u8) -> __m512 {
        // SAFETY: 64 readable bytes by contract; the token proves the instruction.
        unsafe { _mm512_loadu_ps(p.cast()) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u8) -> __m512 {
        // SAFETY: 32 readable bytes by contract; the token proves the instructions.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u8) -> __m512 {
        // SAFETY: 32 readable bytes by contract; the token proves the instructions.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn store_f16(self, v: __m512, p: *mut u8) {
        // SAFETY: 32 writable bytes by contract; the token proves the instructions.
        unsafe { _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v)) }
    }
    #[inline(always)]
    unsafe fn load_i32(self, p: *const u8) -> __m512i {
        // SAFETY: 64 readable bytes by contract; the token proves the instruction.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn store_i32(self, v: __m512i, p: *mut u8) {
        // SAFETY: 64 writable bytes by contract; the token proves the instruction.
        unsafe { _mm512_storeu_si512(p.cast(), v) }
    }
    #[inline(always)]
    unsafe fn gather_f16(self, p: *const u8, stride: usize) -> __m512 {
        // SAFETY: each address readable by contract (unaligned reads); the token proves the instructions.
        unsafe {
            let h: [i16; 16] = core::array::from_fn(|i| p.add(i * stride).cast::<i16>().read_unaligned());
            _mm512_cvtph_ps(_mm256_setr_epi16(
                h[0], h[1], h[2], h[3], h[4], h[5], h[6], h[7], h[8], h[9], h[10], h[11], h[12], h[13],
                h[14], h[15],
            ))
        }
    }
    #[inline(always)]
    unsafe fn transpose4(self, p: *const u8, stride: usize) -> [__m512i; 4] {
        // SAFETY: 16 bytes at each of the 16 addresses are readable by contract; the token proves the instructions.
        unsafe {
            // Lane l of register i holds row 4l + i, so transposing within lanes leaves rows in lane order.
            let load = |i: usize| {
                let row = |l: usize| _mm_loadu_si128(p.add((4 * l + i) * stride).cast());
                let v = _mm512_castsi128_si512(row(0));
                let v = _mm512_inserti32x4::<1>(v, row(1));
                let v = _mm512_inserti32x4::<2>(v, row(2));
                _mm512_inserti32x4::<3>(v, row(3))
            };
            let (r0, r1, r2, r3) = (load(0), load(1), load(2), load(3));
            let (a, b) = (_mm512_unpacklo_epi32(r0, r1), _mm512_unpackhi_epi32(r0, r1));
            let (c, d) = (_mm512_unpacklo_epi32(r2, r3), _mm512_unpackhi_epi32(r2, r3));
            [
                _mm512_unpacklo_epi64(a, c),
                _mm512_unpackhi_epi64(a, c),
                _mm512_unpacklo_epi64(b, d),
                _mm512_unpackhi_epi64(b, d),
            ]
        }
    }
    #[inline(always)]
    unsafe fn codewords<const PAGES: usize, const WORDS: usize>(
        self,
        book: &'static Codebook<PAGES, WORDS>,
        low: *const u8,
        high: *const u8,
        n: usize,
        out: *mut u8,
    ) {
        // SAFETY: memory by this function's contract; the token proves the instructions.
        unsafe {
            // Four pages take longer to permute and blend than to load.
            if self.vbmi && PAGES < 4 {
                permute_entries(book, low, high, n, out);
            } else {
                load_entries(book, low, high, n, out);
            }
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
    ) -> [__m512i; T] {
        // SAFETY: `64·STEPS` codes and `4·STEPS` activations are readable by contract; the token proves the rest.
        unsafe {
            let minus_bias = _mm512_set1_epi32(-bias);
            let mut acc = [_mm512_setzero_si512(); T];
            for t in 0..T {
                // Loaded as a vector: from scalars the compiler makes a gather, which is slower.
                let sum = _mm512_broadcastd_epi32(_mm_loadu_si32(sums[t].cast()));
                acc[t] = _mm512_mullo_epi32(minus_bias, sum);
            }
            for step in 0..STEPS {
                let code = _mm512_loadu_si512(codes.add(64 * step).cast());
                for t in 0..T {
                    let q4 = _mm512_set1_epi32(q[t].add(4 * step).cast::<i32>().read_unaligned());
                    acc[t] = _mm512_dpbusd_epi32(acc[t], code, q4);
                }
            }
            acc
        }
    }
}

impl Pairs for Avx512 {
    #[inline(always)]
    unsafe fn pair16(self, a: *const u8, b: *const u8) -> __m512i {
        // SAFETY: 16 readable bytes at each by contract; the token proves the instructions.
        unsafe {
            let a = _mm512_broadcast_i32x4(_mm_loadu_si128(a.cast()));
            _mm512_mask_broadcast_i32x4(a, 0xff00, _mm_loadu_si128(b.cast()))
        }
    }
    #[inline(always)]
    unsafe fn pair32(self, a: *const u8, b: *const u8) -> __m512i {
        // SAFETY: 32 readable bytes at each by contract; the token proves the instructions.
        unsafe {
            let a = _mm512_castsi256_si512(_mm256_loadu_si256(a.cast()));
            _mm512_inserti64x4::<1>(a, _mm256_loadu_si256(b.cast()))
        }
    }
    #[inline(always)]
    fn pair_nibbles(self, v: __m512i) -> __m512i {
        with_token!({
            let shifted = _mm512_srlv_epi64(v, _mm512_setr_epi64(0, 0, 4, 4, 0, 0, 4, 4));
            _mm512_and_si512(shifted, _mm512_set1_epi32(0x0f0f_0f0f))
        })
    }
    #[inline(always)]
    fn pair_bits(self, a: u32, b: u32, value: u8) -> __m512i {
        with_token!(_mm512_maskz_set1_epi8(u64::from(a) | u64::from(b) << 32, value as i8))
    }
    #[inline(always)]
    unsafe fn pair_dot<const CLASS: usize>(self, codes: __m512i, q: *const i8) -> __m512i {
        // SAFETY: 32 readable bytes by contract; the token proves the instructions.
        unsafe {
            let q = _mm512_broadcast_i64x4(_mm256_loadu_si256(q.cast()));
            _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, q)
        }
    }
    #[inline(always)]
    fn pair_rest<const CLASS: usize>(self) -> i32 {
        0
    }
    #[inline(always)]
    fn pair_sums(self, pairs: [__m512i; 8]) -> [__m512i; 2] {
        with_token!({
            // Four rows of four lanes to one lane each: two steps of adding what is interleaved.
            let two = |a, b| _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
            let four = |i: usize| {
                let (a, b) = (two(pairs[i], pairs[i + 1]), two(pairs[i + 2], pairs[i + 3]));
                _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b))
            };
            // Each holds, in fours: rows i.., first half; second half; rows 8 + i.., first half; second half.
            let (low, high) = (four(0), four(4));
            let pick = |half: i64| {
                let index = [0, 1, 8, 9, 4, 5, 12, 13].map(|i| i + 2 * half);
                let index = _mm512_loadu_si512(index.as_ptr().cast());
                _mm512_permutex2var_epi64(low, index, high)
            };
            [pick(0), pick(1)]
        })
    }
}
