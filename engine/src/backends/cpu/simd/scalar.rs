//! The vector machine in plain Rust: the definition of every method, and what runs on CPUs without AVX2 and FMA.

use super::vector::{PairOp, Simd, SimdOp};

/// No capability needed.
#[derive(Clone, Copy)]
pub(super) struct Scalar;

#[inline(always)]
fn zip(a: [f32; 16], b: [f32; 16], f: impl Fn(f32, f32) -> f32) -> [f32; 16] {
    core::array::from_fn(|i| f(a[i], b[i]))
}

impl Simd for Scalar {
    type F = [f32; 16];
    type I = [u32; 16];
    const WIDE: bool = false;
    // The plain loop is exact for any class.
    const VNNI: bool = true;

    #[inline(never)]
    fn call<O: SimdOp>(self, op: O) -> O::Output {
        op.run(self)
    }
    /// Plain Rust takes the panel's way.
    fn call_pairs<O: PairOp>(self, _op: O) -> bool {
        false
    }
    fn splat(self, x: f32) -> [f32; 16] {
        [x; 16]
    }
    fn load(self, x: &[f32; 16]) -> [f32; 16] {
        *x
    }
    fn store(self, v: [f32; 16], out: &mut [f32; 16]) {
        *out = v;
    }
    fn add(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        zip(a, b, |a, b| a + b)
    }
    fn sub(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        zip(a, b, |a, b| a - b)
    }
    fn mul(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        zip(a, b, |a, b| a * b)
    }
    fn div(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        zip(a, b, |a, b| a / b)
    }
    fn fma(self, a: [f32; 16], b: [f32; 16], c: [f32; 16]) -> [f32; 16] {
        core::array::from_fn(|i| libm::fmaf(a[i], b[i], c[i]))
    }
    fn max(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    fn min(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    fn abs(self, a: [f32; 16]) -> [f32; 16] {
        a.map(f32::abs)
    }
    fn copysign(self, a: [f32; 16], sign: [f32; 16]) -> [f32; 16] {
        zip(a, sign, f32::copysign)
    }
    fn round(self, a: [f32; 16]) -> [f32; 16] {
        a.map(libm::rintf)
    }
    fn trunc(self, a: [f32; 16]) -> [f32; 16] {
        a.map(libm::truncf)
    }
    fn select_lt(self, a: [f32; 16], b: [f32; 16], x: [f32; 16], y: [f32; 16]) -> [f32; 16] {
        core::array::from_fn(|i| if a[i] < b[i] { x[i] } else { y[i] })
    }
    fn pow2(self, n: [f32; 16]) -> [f32; 16] {
        n.map(|n| f32::from_bits(((n as i32).wrapping_add(127) as u32) << 23))
    }
    fn reduce_add4(self, a: [[f32; 16]; 4]) -> [f32; 4] {
        a.map(|mut v| {
            for half in [8, 4, 2, 1] {
                for i in 0..half {
                    v[i] += v[i + half];
                }
            }
            v[0]
        })
    }
    fn reduce_max(self, a: [f32; 16]) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, |m, v| if v > m { v } else { m })
    }
    fn to_i8(self, a: [f32; 16], out: &mut [i8; 16]) {
        *out = a.map(|v| v as i8);
    }
    fn i32_to_f32(self, a: [u32; 16]) -> [f32; 16] {
        a.map(|v| v as i32 as f32)
    }
    fn low_f16(self, a: [u32; 16]) -> [f32; 16] {
        a.map(|a| quant::bits::f16_to_f32(a as u16))
    }
    fn mul_i32(self, a: [u32; 16], b: u32) -> [u32; 16] {
        a.map(|a| a.wrapping_mul(b))
    }
    fn and(self, a: [u32; 16], b: u32) -> [u32; 16] {
        a.map(|a| a & b)
    }
    fn xor(self, a: [u32; 16], b: u32) -> [u32; 16] {
        a.map(|a| a ^ b)
    }
    fn all_i32(self, x: u32) -> [u32; 16] {
        [x; 16]
    }
    fn add_i32(self, a: [u32; 16], b: [u32; 16]) -> [u32; 16] {
        core::array::from_fn(|i| a[i].wrapping_add(b[i]))
    }
    fn sub_i32(self, a: [u32; 16], b: [u32; 16]) -> [u32; 16] {
        core::array::from_fn(|i| a[i].wrapping_sub(b[i]))
    }
    fn xor_i32(self, a: [u32; 16], b: [u32; 16]) -> [u32; 16] {
        core::array::from_fn(|i| a[i] ^ b[i])
    }
    fn or(self, a: [u32; 16], b: [u32; 16]) -> [u32; 16] {
        core::array::from_fn(|i| a[i] | b[i])
    }
    fn shr<const N: i32>(self, a: [u32; 16]) -> [u32; 16] {
        a.map(|a| a >> N)
    }
    fn shr_by(self, a: [u32; 16], n: u32) -> [u32; 16] {
        a.map(|a| a >> n)
    }
    fn shl<const N: i32>(self, a: [u32; 16]) -> [u32; 16] {
        a.map(|a| a << N)
    }
    fn lookup(self, a: [u32; 16], table: &[u8; 16]) -> [u32; 16] {
        a.map(|a| u32::from_le_bytes(a.to_le_bytes().map(|i| table[i as usize & 15])))
    }
    unsafe fn load_f32(self, p: *const u8) -> [f32; 16] {
        // SAFETY: readable by this function's contract; the read is unaligned.
        unsafe { p.cast::<[f32; 16]>().read_unaligned() }
    }
    unsafe fn load_f16(self, p: *const u8) -> [f32; 16] {
        // SAFETY: readable by this function's contract; the read is unaligned.
        unsafe { p.cast::<[u16; 16]>().read_unaligned() }.map(quant::bits::f16_to_f32)
    }
    unsafe fn load_bf16(self, p: *const u8) -> [f32; 16] {
        // SAFETY: readable by this function's contract; the read is unaligned.
        unsafe { p.cast::<[u16; 16]>().read_unaligned() }.map(quant::bits::bf16_to_f32)
    }
    unsafe fn store_f16(self, v: [f32; 16], p: *mut u8) {
        // SAFETY: writable by this function's contract; the write is unaligned.
        unsafe { p.cast::<[u16; 16]>().write_unaligned(v.map(quant::bits::f32_to_f16)) }
    }
    unsafe fn load_i32(self, p: *const u8) -> [u32; 16] {
        // SAFETY: readable by this function's contract; the read is unaligned.
        unsafe { p.cast::<[u32; 16]>().read_unaligned() }
    }
    unsafe fn store_i32(self, v: [u32; 16], p: *mut u8) {
        // SAFETY: writable by this function's contract; the write is unaligned.
        unsafe { p.cast::<[u32; 16]>().write_unaligned(v) }
    }
    unsafe fn gather_f16(self, p: *const u8, stride: usize) -> [f32; 16] {
        core::array::from_fn(|i| {
            // SAFETY: readable by this function's contract; the read is unaligned.
            quant::bits::f16_to_f32(unsafe { p.add(i * stride).cast::<u16>().read_unaligned() })
        })
    }
    unsafe fn transpose4(self, p: *const u8, stride: usize) -> [[u32; 16]; 4] {
        core::array::from_fn(|c| {
            core::array::from_fn(|i| {
                // SAFETY: readable by this function's contract; the read is unaligned.
                unsafe { p.add(i * stride + 4 * c).cast::<u32>().read_unaligned() }
            })
        })
    }
    fn prefetch(self, _p: *const u8) {}
    fn prefetch_far(self, _p: *const u8) {}
    unsafe fn idot<const T: usize, const STEPS: usize, const CLASS: usize>(
        self,
        codes: *const u8,
        q: [*const i8; T],
        _sums: [*const i32; T],
        bias: i32,
    ) -> [[u32; 16]; T] {
        core::array::from_fn(|t| {
            core::array::from_fn(|row| {
                let mut sum = 0i32;
                for i in 0..4 * STEPS {
                    // SAFETY: `64·STEPS` codes and `4·STEPS` activations are readable by contract.
                    let (code, q) = unsafe { (*codes.add(i / 4 * 64 + 4 * row + i % 4), *q[t].add(i)) };
                    sum += (code as i32 - bias) * q as i32;
                }
                sum as u32
            })
        })
    }
}
