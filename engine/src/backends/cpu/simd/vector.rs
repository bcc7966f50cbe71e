//! The vector machine every kernel is written for: 16 lanes, whatever the registers.
//!
//! [`Simd`] is a capability token: a value of an implementing type proves that the CPU has the instructions, so the
//! register-only methods are safe. Kernels are [`SimdOp`]s; [`Simd::call`] compiles one with the machine's features.
//! Every method gives the same bits on every machine; that, and nothing else, makes results independent of the CPU.

use super::codebook::{Codebook, load_entries};

/// A kernel body, generic over the machine. `run` must be `#[inline(always)]`, or it is compiled without the features.
pub(super) trait SimdOp {
    /// What it returns.
    type Output;
    /// The body.
    fn run<S: Simd>(self, s: S) -> Self::Output;
}

/// How many sums of two `u8 × i8` products may be added in 16 bits before widening; 0 if not even one fits.
///
/// Only machines without a byte dot product care.
pub(super) const fn pair_sums(code_max: u8) -> usize {
    match code_max {
        0..=15 => 8,
        16..=31 => 4,
        32..=63 => 2,
        64..=127 => 1,
        _ => 0,
    }
}

/// 16 lanes of f32 or i32.
pub(super) trait Simd: Copy + Send + Sync + 'static {
    /// 16 f32.
    type F: Copy;
    /// 16 i32, also seen as 64 bytes.
    type I: Copy;
    /// Whether a lane vector is one register and there are 32 of them (else: two registers, 16 of them).
    const WIDE: bool;
    /// Whether there is a byte dot product; then the class of [`Simd::idot`] has no meaning.
    const VNNI: bool;

    /// Runs a kernel compiled for this machine; never inlined, so that callers share one copy.
    fn call<O: SimdOp>(self, op: O) -> O::Output;

    /// The same for a kernel that needs [`Pairs`]; `false` if this machine, or one with fewer instructions of its kind, has
    /// none.
    fn call_pairs<O: PairOp>(self, op: O) -> bool;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::F;
    /// Lanes from memory.
    fn load(self, x: &[f32; 16]) -> Self::F;
    /// Lanes to memory.
    fn store(self, v: Self::F, out: &mut [f32; 16]);
    /// `a + b`
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a - b`
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b`
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a / b`
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, one rounding.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `a > b ? a : b`: the second operand if either is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a < b ? a : b`: the second operand if either is NaN.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// `|a|`
    fn abs(self, a: Self::F) -> Self::F;
    /// Magnitude of `a`, sign of `sign`.
    fn copysign(self, a: Self::F, sign: Self::F) -> Self::F;
    /// Nearest integer, ties to even.
    fn round(self, a: Self::F) -> Self::F;
    /// Towards zero.
    fn trunc(self, a: Self::F) -> Self::F;
    /// `a < b ? x : y`; `y` if either is NaN.
    fn select_lt(self, a: Self::F, b: Self::F, x: Self::F, y: Self::F) -> Self::F;
    /// `2ⁿ` of integral `n` in -126..=127.
    fn pow2(self, n: Self::F) -> Self::F;
    /// Sum by the fixed tree: lanes i += i+8, i += i+4, i += i+2, i += i+1.
    #[inline(always)]
    fn reduce_add(self, a: Self::F) -> f32 {
        self.reduce_add4([a, a, a, a])[0]
    }
    /// Four sums by the same tree.
    fn reduce_add4(self, a: [Self::F; 4]) -> [f32; 4];
    /// Largest lane (no NaN expected).
    fn reduce_max(self, a: Self::F) -> f32;
    /// Integral values of -127..=127 to bytes.
    fn to_i8(self, a: Self::F, out: &mut [i8; 16]);
    /// Exact up to 2²⁴.
    fn i32_to_f32(self, a: Self::I) -> Self::F;
    /// The low half of each lane as a half, widened.
    fn low_f16(self, a: Self::I) -> Self::F;
    /// Low 32 bits of each lane's product with a constant.
    fn mul_i32(self, a: Self::I, b: u32) -> Self::I;
    /// `a & b` of each lane's bits with a constant.
    fn and(self, a: Self::I, b: u32) -> Self::I;
    /// `a ^ b` with a constant.
    fn xor(self, a: Self::I, b: u32) -> Self::I;
    /// All lanes `x`.
    fn all_i32(self, x: u32) -> Self::I;
    /// Wrapping sum of lanes.
    fn add_i32(self, a: Self::I, b: Self::I) -> Self::I;
    /// Wrapping difference of lanes.
    fn sub_i32(self, a: Self::I, b: Self::I) -> Self::I;
    /// `a ^ b`
    fn xor_i32(self, a: Self::I, b: Self::I) -> Self::I;
    /// `a | b`
    fn or(self, a: Self::I, b: Self::I) -> Self::I;
    /// Logical shift right of each lane.
    fn shr<const N: i32>(self, a: Self::I) -> Self::I;
    /// Logical shift right of each lane by fewer than 32.
    fn shr_by(self, a: Self::I, n: u32) -> Self::I;
    /// Shift left of each lane.
    fn shl<const N: i32>(self, a: Self::I) -> Self::I;
    /// Each byte (0..16) replaced by its entry.
    fn lookup(self, a: Self::I, table: &[u8; 16]) -> Self::I;

    /// 16 f32 from any address.
    ///
    /// # Safety
    /// * 64 bytes at `p` are readable.
    unsafe fn load_f32(self, p: *const u8) -> Self::F;
    /// 16 halves, widened.
    ///
    /// # Safety
    /// * 32 bytes at `p` are readable.
    unsafe fn load_f16(self, p: *const u8) -> Self::F;
    /// 16 bfloats, widened.
    ///
    /// # Safety
    /// * 32 bytes at `p` are readable.
    unsafe fn load_bf16(self, p: *const u8) -> Self::F;
    /// 16 halves, rounded to nearest even.
    ///
    /// # Safety
    /// * 32 bytes at `p` are writable.
    unsafe fn store_f16(self, v: Self::F, p: *mut u8);
    /// 64 bytes.
    ///
    /// # Safety
    /// * 64 bytes at `p` are readable.
    unsafe fn load_i32(self, p: *const u8) -> Self::I;
    /// 64 bytes.
    ///
    /// # Safety
    /// * 64 bytes at `p` are writable.
    unsafe fn store_i32(self, v: Self::I, p: *mut u8);
    /// Halves at `p + i·stride`, widened.
    ///
    /// # Safety
    /// * 2 bytes at each of the 16 addresses are readable.
    unsafe fn gather_f16(self, p: *const u8, stride: usize) -> Self::F;
    /// 16 rows of four dwords at `p + i·stride`, as four columns: lane `i` of column `c` is dword `c` of row `i`.
    ///
    /// # Safety
    /// * 16 bytes at each of the 16 addresses are readable.
    unsafe fn transpose4(self, p: *const u8, stride: usize) -> [Self::I; 4];
    /// Entries of a codebook: index `i` of row `r` has its low byte at `low[i/4][r][i%4]` and what is above at the same
    /// place of `high`; word `w` of its entry goes to `out[i·WORDS + w][r]`.
    ///
    /// # Safety
    /// * `64·n` bytes are readable at `low` and `high`, `4·64·n·WORDS` writable at `out`, which overlaps neither.
    /// * Every high byte is below `PAGES`.
    #[inline(always)]
    unsafe fn codewords<const PAGES: usize, const WORDS: usize>(
        self,
        book: &'static Codebook<PAGES, WORDS>,
        low: *const u8,
        high: *const u8,
        n: usize,
        out: *mut u8,
    ) {
        // SAFETY: by this function's contract.
        unsafe { load_entries(book, low, high, n, out) }
    }
    /// Bring a line into the first-level cache; any address is allowed.
    fn prefetch(self, p: *const u8);
    /// Bring a line into the second-level cache, which can wait for more of them at a time.
    fn prefetch_far(self, p: *const u8);

    /// Integer dot products of 16 rows with `T` tokens over `4·STEPS` codes:
    /// `Σ (code - bias) · q`, given `*sums[t] = Σ q` and codes as `[STEPS][16 rows][4]`.
    ///
    /// `CLASS` is [`pair_sums`] of the format's largest code.
    ///
    /// # Safety
    /// * `64·STEPS` bytes at `codes` and `4·STEPS` at each `q` are readable; so is each sum.
    /// * No code exceeds what `CLASS` allows; `code - bias` fits an i8 if `CLASS` is 0; no `q` is -128.
    unsafe fn idot<const T: usize, const STEPS: usize, const CLASS: usize>(
        self,
        codes: *const u8,
        q: [*const i8; T],
        sums: [*const i32; T],
        bias: i32,
    ) -> [Self::I; T];
}

/// A kernel body for a machine with [`Pairs`], as [`SimdOp`].
pub(super) trait PairOp {
    /// The body.
    fn run<S: Pairs>(self, s: S);
}

/// What products of a single token need besides: two rows at a time, as they lie.
pub(super) trait Pairs: Simd {
    /// 16 bytes at `a` twice, then 16 at `b` twice: two rows' packed halves of a group.
    ///
    /// # Safety
    /// * 16 bytes at each are readable.
    unsafe fn pair16(self, a: *const u8, b: *const u8) -> Self::I;
    /// 32 bytes at `a`, then 32 at `b`: two rows' groups.
    ///
    /// # Safety
    /// * 32 bytes at each are readable.
    unsafe fn pair32(self, a: *const u8, b: *const u8) -> Self::I;
    /// From the result of [`Pairs::pair16`]: the low nibbles of each first copy and the high nibbles of each second one.
    fn pair_nibbles(self, v: Self::I) -> Self::I;
    /// `value` in byte `i` of each row where bit `i` of its word is set.
    fn pair_bits(self, a: u32, b: u32, value: u8) -> Self::I;
    /// Products of two rows' groups with 32 activations, summed by fours: lanes 0..4 first half of the first row, 4..8 its
    /// second half, then the second row. They are of `code - rest`, where `rest` is [`Pairs::pair_rest`]'s.
    ///
    /// # Safety
    /// * 32 bytes at `q` are readable.
    /// * As for [`Simd::idot`] with this `CLASS`.
    unsafe fn pair_dot<const CLASS: usize>(self, codes: Self::I, q: *const i8) -> Self::I;
    /// What [`Pairs::pair_dot`] has subtracted from codes.
    fn pair_rest<const CLASS: usize>(self) -> i32;
    /// The sums over the halves of groups with lanes as rows; `pairs[i]` are rows `i` and `i + 8`.
    fn pair_sums(self, pairs: [Self::I; 8]) -> [Self::I; 2];
}
