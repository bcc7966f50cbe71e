//! Matrix fragments of a warp and the tensor-core products on them.
//!
//! Lane layouts are those of PTX's `mma` ("Matrix Fragments for mma.m16n8k16" and following): with `g = lane / 4` and
//! `t = lane % 4`, an accumulator holds `C[g][2t]`, `C[g][2t+1]`, `C[g+8][2t]`, `C[g+8][2t+1]`. A is row-major, B column-major.
//! [`load_x4`] brings 8×8 tiles of 16-bit elements from shared memory into that layout; for bytes, two columns count as
//! one element.
//!
//! Float products and [`load_x4`] exist on every tier, so kernels need no second form: f16 before sm_80 as two
//! instructions of m16n8k8, before sm_75, and bf16 before sm_80, by [`mma_fma`]. Each form sums in order of k; bits differ between
//! forms, not between kernels on one device.

#[cfg(all(target_arch = "nvptx64", sm_ge_75))]
use super::intrinsics;
#[cfg(all(target_arch = "nvptx64", not(sm_ge_75)))]
use super::word::Word;
use super::{Smem, U32x4, math, thread, warp};
#[cfg(not(target_arch = "nvptx64"))]
use crate::emu::lane;
#[cfg(not(target_arch = "nvptx64"))]
use crate::emu::lane::Collective;
#[cfg(all(target_arch = "nvptx64", sm_ge_75))]
use core::arch::asm;

/// A of m16n8k16 (pairs of f16 or bf16) or of m16n8k32 (four bytes a word).
#[derive(Clone, Copy, Debug, Default)]
pub struct FragmentA(pub [u32; 4]);
/// B of the same products.
#[derive(Clone, Copy, Debug, Default)]
pub struct FragmentB(pub [u32; 2]);
/// C and D in f32.
#[derive(Clone, Copy, Debug, Default)]
pub struct FragmentF32(pub [f32; 4]);
/// C and D in i32.
#[derive(Clone, Copy, Debug, Default)]
pub struct FragmentI32(pub [i32; 4]);

/// Four 8×8 tiles of 16-bit elements: lane `8k + r` gives the address of row `r` of tile `k`, 16 bytes long; every lane
/// gets of each tile the elements `2t` and `2t + 1` of row `g` (`ldmatrix.x4` from sm_75 on; before, four shuffles and
/// loads).
#[inline(always)]
#[track_caller]
pub fn load_x4(rows: Smem<U32x4>, i: u32) -> [u32; 4] {
    let address = rows.address(i);
    #[cfg(all(target_arch = "nvptx64", sm_ge_75))]
    {
        let (x, y, z, w): (u32, u32, u32, u32);
        intrinsics::anchor();
        // SAFETY: the layout that the launch was sized by holds row `i`.
        unsafe {
            asm!("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{{},{},{},{}}},[{}];",
                out(reg32) x, out(reg32) y, out(reg32) z, out(reg32) w, in(reg32) address,
                options(nostack, readonly, preserves_flags))
        }
        [x, y, z, w]
    }
    #[cfg(all(target_arch = "nvptx64", not(sm_ge_75)))]
    {
        let (g, t) = (thread::lane_id() / 4, thread::lane_id() % 4);
        let mut words = [0; 4];
        unroll!(K in 0..4 {
            let row = warp::shfl(address, 8 * K as u32 + g);
            // SAFETY: word `t` of the row that lane `8k + g` named.
            words[K] = unsafe { u32::load_shared(row + 4 * t) };
        });
        words
    }
    #[cfg(not(target_arch = "nvptx64"))]
    lane::load_matrix(address, false)
}

/// [`load_x4`] with each tile transposed: a lane gets the elements `2t` and `2t + 1` of column `g`.
#[inline(always)]
#[track_caller]
pub fn load_x4_transposed(rows: Smem<U32x4>, i: u32) -> [u32; 4] {
    let address = rows.address(i);
    #[cfg(all(target_arch = "nvptx64", sm_ge_75))]
    {
        let (x, y, z, w): (u32, u32, u32, u32);
        intrinsics::anchor();
        // SAFETY: the layout that the launch was sized by holds row `i`.
        unsafe {
            asm!("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{{},{},{},{}}},[{}];",
                out(reg32) x, out(reg32) y, out(reg32) z, out(reg32) w, in(reg32) address,
                options(nostack, readonly, preserves_flags))
        }
        [x, y, z, w]
    }
    #[cfg(all(target_arch = "nvptx64", not(sm_ge_75)))]
    {
        let (g, t) = (thread::lane_id() / 4, thread::lane_id() % 4);
        let mut words = [0; 4];
        unroll!(K in 0..4 {
            let upper = warp::shfl(address, 8 * K as u32 + 2 * t);
            let lower = warp::shfl(address, 8 * K as u32 + 2 * t + 1);
            // SAFETY: element `g` of the rows that lanes `8k + 2t` and the next named.
            let pair = unsafe { [u16::load_shared(upper + 2 * g), u16::load_shared(lower + 2 * g)] };
            words[K] = u32::from(pair[0]) | u32::from(pair[1]) << 16;
        });
        words
    }
    #[cfg(not(target_arch = "nvptx64"))]
    lane::load_matrix(address, true)
}

/// `c += a · b` on f16, accumulated in f32: `mma.m16n8k16` from sm_80 on, on sm_75 `mma.m16n8k8` for the lower half of k
/// and then for the upper, before by [`mma_fma`].
#[inline(always)]
#[track_caller]
pub fn mma_f16(c: &mut FragmentF32, a: FragmentA, b: FragmentB) {
    #[cfg(all(target_arch = "nvptx64", sm_ge_75))]
    {
        let FragmentA([a0, a1, a2, a3]) = a;
        let FragmentB([b0, b1]) = b;
        let [mut c0, mut c1, mut c2, mut c3] = c.0;
        intrinsics::anchor();
        // SAFETY: registers only.
        #[cfg(sm_ge_80)]
        unsafe {
            asm!("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{{0},{1},{2},{3}}},{{{4},{5},{6},{7}}},{{{8},{9}}},{{{0},{1},{2},{3}}};",
                inout(reg32) c0, inout(reg32) c1, inout(reg32) c2, inout(reg32) c3,
                in(reg32) a0, in(reg32) a1, in(reg32) a2, in(reg32) a3, in(reg32) b0, in(reg32) b1,
                options(nomem, nostack, preserves_flags))
        }
        // SAFETY: registers only.
        #[cfg(not(sm_ge_80))]
        unsafe {
            asm!("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {{{0},{1},{2},{3}}},{{{4},{5}}},{{{8}}},{{{0},{1},{2},{3}}};",
                "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {{{0},{1},{2},{3}}},{{{6},{7}}},{{{9}}},{{{0},{1},{2},{3}}};",
                inout(reg32) c0, inout(reg32) c1, inout(reg32) c2, inout(reg32) c3,
                in(reg32) a0, in(reg32) a1, in(reg32) a2, in(reg32) a3, in(reg32) b0, in(reg32) b1,
                options(nomem, nostack, preserves_flags))
        }
        c.0 = [c0, c1, c2, c3];
    }
    #[cfg(all(target_arch = "nvptx64", not(sm_ge_75)))]
    mma_fma(c, a, b, quant::bits::f16_to_f32);
    #[cfg(not(target_arch = "nvptx64"))]
    {
        c.0 = lane::mma(Collective::MmaF16, a.0, b.0, c.0.map(f32::to_bits)).map(f32::from_bits);
    }
}

/// `a · b` of the lower half of k alone (8 of it), on f16: [`mma_f16`] on zeros, without registers that hold them.
#[inline(always)]
#[track_caller]
pub fn mma_f16_k8(a: [u32; 2], b: u32) -> FragmentF32 {
    #[cfg(all(target_arch = "nvptx64", sm_ge_75))]
    {
        let (c0, c1, c2, c3): (f32, f32, f32, f32);
        intrinsics::anchor();
        // SAFETY: registers only.
        unsafe {
            asm!("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {{{0},{1},{2},{3}}},{{{4},{5}}},{{{6}}},{{{7},{7},{7},{7}}};",
                out(reg32) c0, out(reg32) c1, out(reg32) c2, out(reg32) c3,
                in(reg32) a[0], in(reg32) a[1], in(reg32) b, in(reg32) 0.0f32,
                options(nomem, nostack, preserves_flags))
        }
        FragmentF32([c0, c1, c2, c3])
    }
    #[cfg(not(all(target_arch = "nvptx64", sm_ge_75)))]
    {
        let mut c = FragmentF32([0.0; 4]);
        mma_f16(&mut c, FragmentA([a[0], a[1], 0, 0]), FragmentB([b, 0]));
        c
    }
}

/// `c += a · b` on bf16, accumulated in f32: `mma.m16n8k16` from sm_80 on, before by [`mma_fma`].
#[inline(always)]
#[track_caller]
pub fn mma_bf16(c: &mut FragmentF32, a: FragmentA, b: FragmentB) {
    #[cfg(all(target_arch = "nvptx64", sm_ge_80))]
    {
        let (a, b, [c0, c1, c2, c3]) = (a.0, b.0, c.0);
        // SAFETY: registers only.
        let d = unsafe { intrinsics::mma_m16n8k16_bf16(a[0], a[1], a[2], a[3], b[0], b[1], c0, c1, c2, c3) };
        c.0 = [d.0, d.1, d.2, d.3];
    }
    #[cfg(all(target_arch = "nvptx64", not(sm_ge_80)))]
    mma_fma(c, a, b, quant::bits::bf16_to_f32);
    #[cfg(not(target_arch = "nvptx64"))]
    {
        c.0 = lane::mma(Collective::MmaBf16, a.0, b.0, c.0.map(f32::to_bits)).map(f32::from_bits);
    }
}

/// The product of m16n8k16 without tensor cores: lanes exchange their pairs by shuffles and sum by fma, in order of k.
/// `value` widens an element's bits.
#[inline(always)]
#[track_caller]
pub fn mma_fma(c: &mut FragmentF32, a: FragmentA, b: FragmentB, value: impl Fn(u16) -> f32) {
    let (g, t) = (thread::lane_id() / 4, thread::lane_id() % 4);
    // Steps of two in k, the lower and then the upper half of k; each pair lies in the same lane of every quad. Rolled: a
    // kernel has dozens of products, and unrolled they would fill the instruction cache and the registers.
    let (mut step, n_steps) = (0, math::opaque(8));
    while step < n_steps {
        let lower = step < 4;
        let pick = |a: u32, b: u32| if lower { a } else { b };
        let (top, bottom, right) = (pick(a.0[0], a.0[2]), pick(a.0[1], a.0[3]), pick(b.0[0], b.0[1]));
        let quad = step % 4;
        let rows = [warp::shfl(top, 4 * g + quad), warp::shfl(bottom, 4 * g + quad)];
        let cols = [warp::shfl(right, 8 * t + quad), warp::shfl(right, 8 * t + 4 + quad)];
        let element = |word: u32, i: usize| value((word >> (16 * i)) as u16);
        unroll!(I in 0..2 {
            unroll!(R in 0..4 {
                c.0[R] = math::fma(element(rows[R / 2], I), element(cols[R % 2], I), c.0[R]);
            });
        });
        step += 1;
    }
}

/// `c += a · b` on signed bytes, m16n8k32: one instruction from sm_80 on; on sm_75 four of m8n8k16, whose fragments are
/// the quarters of these.
#[cfg(any(not(target_arch = "nvptx64"), sm_ge_75))]
#[inline(always)]
#[track_caller]
pub fn mma_s8(c: &mut FragmentI32, a: FragmentA, b: FragmentB) {
    #[cfg(all(target_arch = "nvptx64", sm_ge_80))]
    {
        let (a, b, [c0, c1, c2, c3]) = (a.0, b.0, c.0);
        // SAFETY: registers only.
        let d = unsafe { intrinsics::mma_m16n8k32_s8(a[0], a[1], a[2], a[3], b[0], b[1], c0, c1, c2, c3) };
        c.0 = [d.0, d.1, d.2, d.3];
    }
    #[cfg(all(target_arch = "nvptx64", not(sm_ge_80)))]
    {
        mma_s8_k16(c, [a.0[0], a.0[1]], b.0[0]);
        mma_s8_k16(c, [a.0[2], a.0[3]], b.0[1]);
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        c.0 = lane::mma(Collective::MmaS8, a.0, b.0, c.0.map(|c| c as u32)).map(|c| c as i32);
    }
}

/// [`mma_s8`] on half the depth, m16n8k16: the first two words of A's fragment and the first of B's, or the other ones.
#[cfg(any(not(target_arch = "nvptx64"), sm_ge_75))]
#[inline(always)]
#[track_caller]
pub fn mma_s8_k16(c: &mut FragmentI32, a: [u32; 2], b: u32) {
    #[cfg(all(target_arch = "nvptx64", sm_ge_80))]
    {
        let [c0, c1, c2, c3] = c.0;
        // SAFETY: registers only.
        let d = unsafe { intrinsics::mma_m16n8k16_s8(a[0], a[1], b, c0, c1, c2, c3) };
        c.0 = [d.0, d.1, d.2, d.3];
    }
    #[cfg(all(target_arch = "nvptx64", not(sm_ge_80)))]
    {
        let [c0, c1, c2, c3] = c.0;
        // SAFETY: registers only.
        let (top, bottom) = unsafe {
            (intrinsics::mma_m8n8k16_s8(a[0], b, c0, c1), intrinsics::mma_m8n8k16_s8(a[1], b, c2, c3))
        };
        c.0 = [top.0, top.1, bottom.0, bottom.1];
    }
    // The other half of the depth is zero.
    #[cfg(not(target_arch = "nvptx64"))]
    mma_s8(c, FragmentA([a[0], a[1], 0, 0]), FragmentB([b, 0]));
}
