//! Copies between tensors of up to four dimensions with any strides, converting between f32, f16, bf16 and i32.
//!
//! * `dst[c] = src[c]` for every coordinate c of `shape`, each tensor with its own strides (in elements; 0 repeats). With
//!   [`Edge::Repeat`] the source is smaller and starts again where it ends; with [`Edge::Pad`] it lies inside and all around
//!   is zero. A concatenation is a copy per part, into the part's place.
//! * Conversions: floats to nearest even; f32 to i32 towards zero, saturating, NaN to 0; a tensor's own type bit for bit.
//!   i32 converts to and from f32 only.
//! * Shapes: any; elements aligned to their size. Nothing overlaps.
//! * Geometry: 256 threads per CTA. Without an edge, dimensions that follow each other on both sides count as one. Both
//!   dense and aligned: four neighbours per thread, what is left by one. Rows contiguous on both sides: four neighbours at a time, four times per thread, a CTA's width
//!   apart. Contiguous in different dimensions: through shared memory, so that both sides coalesce, in tiles of 64 · 64 of
//!   which a thread moves squares of 2 · 2. Neighbours move by one access where all starts and extents are multiples of
//!   what it moves; else rows go element by element, four times per thread, and tiles are 32 · 32, by elements.
//! * Bytes: one element read and one written per coordinate. FLOPs: none.
//! * Tolerance: exact.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

const THREADS: u32 = 256;
/// Units of a thread, a CTA's width apart.
const PER_THREAD: u32 = 4;
/// Edge of a tile, in elements or in pairs.
const TILE: u32 = 32;
/// Units of a tile's row in shared memory: one more, so that a column meets no bank twice.
const STRIDE: u32 = TILE + 1;

/// A number per dimension: a parameter of 16 bytes.
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(16))]
pub struct Extents(pub [u32; 4]);

/// A divisor per dimension, with what turns the division of a number below 2^31 into a product and a shift: an address
/// takes several, and GPUs have no instruction for one.
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(16))]
pub struct Divisors {
    by: [u32; 4],
    /// 2^32 · (2^shift / by − 1), rounded up, or 1 more.
    factors: [u32; 4],
    /// The least with 2^shift ≥ by.
    shifts: [u32; 4],
}

impl Divisors {
    /// Division by these; none is 0, none above 2^31.
    #[cfg(not(target_arch = "nvptx64"))]
    fn new(by: [u32; 4]) -> Divisors {
        let shifts = by.map(|by| by.next_power_of_two().trailing_zeros());
        let factor =
            |d: usize| ((((1u64 << shifts[d]) - u64::from(by[d])) << 32) / u64::from(by[d])) as u32 + 1;
        Divisors { by, factors: core::array::from_fn(factor), shifts }
    }

    /// Quotient and remainder of `n`, below 2^31, by dimension `d`'s. (Granlund and Montgomery, "Division by invariant
    /// integers using multiplication": 32 bits hold the sum because `n` leaves one free.)
    #[cfg(any(target_arch = "nvptx64", feature = "emu"))]
    #[inline(always)]
    fn divide(&self, d: usize, n: u32) -> (u32, u32) {
        let high = ((u64::from(n) * u64::from(self.factors[d])) >> 32) as u32;
        let quotient = (high + n) >> self.shifts[d];
        (quotient, n - quotient * self.by[d])
    }
}

/// Edges, as the kernel knows them.
const REPEAT: u32 = 1;
const PAD: u32 = 2;

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod gpu {
    use half::{bf16, f16};

    use super::{Divisors, Extents, PAD, PER_THREAD, REPEAT, STRIDE, THREADS, TILE};
    use crate::device::sync::sync_threads;
    use crate::device::{Float, Glb, Smem, U32x2, U32x4, Word, thread};

    /// An element, alone, by twos and by fours.
    pub(super) trait Element: Word {
        type Two: Word;
        type Four: Word;
        fn split_two(two: Self::Two) -> [Self; 2];
        fn join_two(elements: [Self; 2]) -> Self::Two;
        fn split(four: Self::Four) -> [Self; 4];
        fn join(elements: [Self; 4]) -> Self::Four;
    }

    macro_rules! words {
        ($($ty:ty),*) => {$(
            impl Element for $ty {
                type Two = U32x2;
                type Four = U32x4;
                #[inline(always)]
                fn split_two(two: U32x2) -> [$ty; 2] {
                    two.0.map(|bits| bytemuck::cast(bits))
                }
                #[inline(always)]
                fn join_two(elements: [$ty; 2]) -> U32x2 {
                    U32x2(elements.map(|element| bytemuck::cast(element)))
                }
                #[inline(always)]
                fn split(four: U32x4) -> [$ty; 4] {
                    four.0.map(|bits| bytemuck::cast(bits))
                }
                #[inline(always)]
                fn join(elements: [$ty; 4]) -> U32x4 {
                    U32x4(elements.map(|element| bytemuck::cast(element)))
                }
            }
        )*};
    }
    words!(u32, f32, i32);

    macro_rules! halves {
        ($($ty:ty),*) => {$(
            impl Element for $ty {
                type Two = u32;
                type Four = U32x2;
                #[inline(always)]
                fn split_two(two: u32) -> [$ty; 2] {
                    [two as u16, (two >> 16) as u16].map(|bits| bytemuck::cast(bits))
                }
                #[inline(always)]
                fn join_two(elements: [$ty; 2]) -> u32 {
                    let [a, b] = elements.map(|element| u32::from(bytemuck::cast::<$ty, u16>(element)));
                    a | b << 16
                }
                #[inline(always)]
                fn split(U32x2([ab, cd]): U32x2) -> [$ty; 4] {
                    let ([a, b], [c, d]) = (Self::split_two(ab), Self::split_two(cd));
                    [a, b, c, d]
                }
                #[inline(always)]
                fn join([a, b, c, d]: [$ty; 4]) -> U32x2 {
                    U32x2([Self::join_two([a, b]), Self::join_two([c, d])])
                }
            }
        )*};
    }
    halves!(u16, f16, bf16);

    /// One conversion.
    pub(super) trait Convert {
        type From: Element;
        type To: Element;
        fn convert(from: Self::From) -> Self::To;
    }

    macro_rules! conversions {
        ($($name:ident: $from:ty => $to:ty, |$x:ident| $convert:expr;)*) => {$(
            pub(super) struct $name;
            impl Convert for $name {
                type From = $from;
                type To = $to;
                #[inline(always)]
                fn convert($x: $from) -> $to {
                    $convert
                }
            }
        )*};
    }
    conversions! {
        Bits32: u32 => u32, |x| x;
        Bits16: u16 => u16, |x| x;
        F32ToF16: f32 => f16, |x| Float::from_f32(x);
        F32ToBf16: f32 => bf16, |x| Float::from_f32(x);
        F16ToF32: f16 => f32, |x| Float::to_f32(x);
        Bf16ToF32: bf16 => f32, |x| Float::to_f32(x);
        F16ToBf16: f16 => bf16, |x| Float::from_f32(Float::to_f32(x));
        Bf16ToF16: bf16 => f16, |x| Float::from_f32(Float::to_f32(x));
        F32ToI32: f32 => i32, |x| x as i32;
        I32ToF32: i32 => f32, |x| x as f32;
    }

    /// What a thread moves at a time.
    pub(super) trait Unit<C: Convert> {
        type From: Word;
        type To: Word;
        fn convert(from: Self::From) -> Self::To;
    }

    /// An element.
    pub(super) struct One;
    /// Four neighbours.
    pub(super) struct Four;

    impl<C: Convert> Unit<C> for One {
        type From = C::From;
        type To = C::To;
        #[inline(always)]
        fn convert(from: C::From) -> C::To {
            C::convert(from)
        }
    }

    impl<C: Convert> Unit<C> for Four {
        type From = <C::From as Element>::Four;
        type To = <C::To as Element>::Four;
        #[inline(always)]
        fn convert(from: Self::From) -> Self::To {
            C::To::join(C::From::split(from).map(C::convert))
        }
    }

    #[inline(always)]
    pub(super) fn flat<C: Convert>(src: Glb<C::From>, dst: Glb<C::To>, n: u32) {
        let i = thread::index_1d();
        if i < n / 4 {
            let from = src.cast::<<C::From as Element>::Four>().ld_nc(i);
            dst.cast::<<C::To as Element>::Four>().st(i, <Four as Unit<C>>::convert(from));
        } else if i == n / 4 {
            // What is left of n: one thread's work.
            let mut j = 4 * i;
            while j < n {
                dst.st(j, C::convert(src.ld_nc(j)));
                j += 1;
            }
        }
    }

    /// The coordinates of the i-th unit, the last running fastest.
    #[inline(always)]
    fn coordinates(i: u32, shape: &Divisors) -> [u32; 4] {
        let (i, c3) = shape.divide(3, i);
        let (i, c2) = shape.divide(2, i);
        let (c0, c1) = shape.divide(1, i);
        [c0, c1, c2, c3]
    }

    #[inline(always)]
    fn place([c0, c1, c2, c3]: [u32; 4], Extents([s0, s1, s2, s3]): Extents) -> usize {
        let term = |c: u32, s: u32| c as usize * s as usize;
        (term(c0, s0) + term(c1, s1)) + (term(c2, s2) + term(c3, s3))
    }

    /// Extents and strides are in units.
    #[inline(always)]
    pub(super) fn strided<C: Convert, U: Unit<C>>(
        src: Glb<C::From>,
        dst: Glb<C::To>,
        shape: Divisors,
        src_strides: Extents,
        dst_strides: Extents,
        src_shape: Divisors,
        before: Extents,
        n: u32,
        edge: u32,
    ) {
        let (src, dst) = (src.cast::<U::From>(), dst.cast::<U::To>());
        let first = thread::block_idx_x() * THREADS * PER_THREAD + thread::thread_idx_x();
        let mut values = [<U::From as bytemuck::Zeroable>::zeroed(); PER_THREAD as usize];
        unroll!(J in 0..4 {
            let i = first + THREADS * J as u32;
            if i < n {
                let mut c = coordinates(i, &shape);
                let mut inside = true;
                unroll!(D in 0..4 {
                    if edge == REPEAT {
                        c[D] = src_shape.divide(D, c[D]).1;
                    } else if edge == PAD {
                        // Before the source, the difference wraps to something large.
                        c[D] = c[D].wrapping_sub(before.0[D]);
                        inside &= c[D] < src_shape.by[D];
                    }
                });
                if inside {
                    values[J] = src.offset(place(c, src_strides)).ld_nc(0);
                }
            }
        });
        unroll!(J in 0..4 {
            let i = first + THREADS * J as u32;
            if i < n {
                dst.offset(place(coordinates(i, &shape), dst_strides)).st(0, U::convert(values[J]));
            }
        });
    }

    /// `src` is contiguous in dimension 2, `dst` in dimension 3.
    #[inline(always)]
    pub(super) fn transpose<C: Convert>(
        src: Glb<C::From>,
        dst: Glb<C::To>,
        shape: Extents,
        src_strides: Extents,
        dst_strides: Extents,
    ) {
        let tile = Smem::<C::To>::dynamic(0, TILE * STRIDE);
        let [_, s1, s2, s3] = shape.0;
        let (row_tile, column_tile, outer) =
            (thread::block_idx_x(), thread::block_idx_y(), thread::block_idx_z());
        let outer = [outer / s1, outer % s1, 0, 0];
        let (src, dst) = (src.offset(place(outer, src_strides)), dst.offset(place(outer, dst_strides)));
        let (fast, slow) = (thread::lane_id(), thread::warp_id());

        unroll!(J in 0..4 {
            let (row, column) = (row_tile * TILE + fast, column_tile * TILE + slow + 8 * J as u32);
            if row < s2 && column < s3 {
                let value = src.offset(place([0, 0, row, column], src_strides)).ld_nc(0);
                tile.st(fast * STRIDE + slow + 8 * J as u32, C::convert(value));
            }
        });
        sync_threads();
        unroll!(J in 0..4 {
            let (row, column) = (row_tile * TILE + slow + 8 * J as u32, column_tile * TILE + fast);
            if row < s2 && column < s3 {
                let value = tile.ld((slow + 8 * J as u32) * STRIDE + fast);
                dst.offset(place([0, 0, row, column], dst_strides)).st(0, value);
            }
        });
    }

    /// [`transpose`] by pairs: tiles have twice the edge, extents in dimensions 2 and 3 are even.
    #[inline(always)]
    pub(super) fn transpose_pairs<C: Convert>(
        src: Glb<C::From>,
        dst: Glb<C::To>,
        shape: Extents,
        src_strides: Extents,
        dst_strides: Extents,
    ) {
        // The first rows of all pairs, then the second ones: so two lanes never meet a bank here either.
        let tile = Smem::<<C::To as Element>::Two>::dynamic(0, 2 * TILE * STRIDE);
        let [_, s1, s2, s3] = shape.0;
        let (row_tile, column_tile, outer) =
            (thread::block_idx_x(), thread::block_idx_y(), thread::block_idx_z());
        let outer = [outer / s1, outer % s1, 0, 0];
        let (src, dst) = (src.offset(place(outer, src_strides)), dst.offset(place(outer, dst_strides)));
        let (fast, slow) = (thread::lane_id(), thread::warp_id());

        // Two rows of two columns at a time, all of them under way before the first is used.
        let mut squares = [[<<C::From as Element>::Two as bytemuck::Zeroable>::zeroed(); 2]; 4];
        unroll!(J in 0..4 {
            let (row, column) = (2 * (row_tile * TILE + fast), 2 * (column_tile * TILE + slow + 8 * J as u32));
            if row < s2 && column < s3 {
                unroll!(K in 0..2 {
                    let at = place([0, 0, row, column + K as u32], src_strides);
                    squares[J][K] = src.offset(at).cast::<<C::From as Element>::Two>().ld_nc(0);
                });
            }
        });
        unroll!(J in 0..4 {
            let [a, b] = squares[J].map(|two| C::From::split_two(two).map(C::convert));
            unroll!(K in 0..2 {
                let at = (K as u32 * TILE + fast) * STRIDE + slow + 8 * J as u32;
                tile.st(at, C::To::join_two([a[K], b[K]]));
            });
        });
        sync_threads();
        let mut pairs = [<<C::To as Element>::Two as bytemuck::Zeroable>::zeroed(); 8];
        unroll!(J in 0..8 {
            pairs[J] = tile.ld((slow + 8 * J as u32) * STRIDE + fast);
        });
        unroll!(J in 0..8 {
            let of_tile = 2 * (slow + 8 * (J as u32 % 4)) + J as u32 / 4;
            let (row, column) = (2 * row_tile * TILE + of_tile, 2 * (column_tile * TILE + fast));
            if row < s2 && column < s3 {
                let at = place([0, 0, row, column], dst_strides);
                dst.offset(at).cast::<<C::To as Element>::Two>().st(0, pairs[J]);
            }
        });
    }
}

/// The conversions: types, and their name.
macro_rules! for_each_conversion {
    ($($name:ident, $module:ident, $tag:literal, [$($from:ident => $to:ident),+];)*) => {
        #[cfg(any(target_arch = "nvptx64", feature = "emu"))]
        mod entries {
            use super::gpu::{self, *};
            use crate::device::Glb;
            use super::{Divisors, Extents};

            $(
                pub(super) mod $module {
                    use super::*;

                    type From = <$name as Convert>::From;
                    type To = <$name as Convert>::To;

                    kernels! {
                        in "copy";
                        pub(in super::super) FLAT: threads(256);
                        fn (src: Glb<From>, dst: Glb<To>, n: u32);
                        concat!("copy_flat_", $tag) => gpu::flat::<$name>;
                    }
                    kernels! {
                        in "copy";
                        pub(in super::super) STRIDED: threads(256);
                        fn (src: Glb<From>, dst: Glb<To>, shape: Divisors, src_strides: Extents, dst_strides: Extents,
                            src_shape: Divisors, before: Extents, n: u32, edge: u32);
                        concat!("copy_strided_", $tag) => gpu::strided::<$name, gpu::One>;
                        concat!("copy_fours_", $tag) => gpu::strided::<$name, gpu::Four>;
                    }
                    kernels! {
                        in "copy";
                        pub(in super::super) TRANSPOSE: threads(256);
                        fn (src: Glb<From>, dst: Glb<To>, shape: Extents, src_strides: Extents, dst_strides: Extents);
                        concat!("copy_transpose_", $tag) => gpu::transpose::<$name>;
                        concat!("copy_transpose_pairs_", $tag) => gpu::transpose_pairs::<$name>;
                    }
                }
            )*
        }

        #[cfg(feature = "emu")]
        const ENTRIES: &[&[crate::emu::Entry]] =
            &[$(entries::$module::FLAT, entries::$module::STRIDED, entries::$module::TRANSPOSE),*];

        /// Entries of a conversion.
        #[cfg(not(target_arch = "nvptx64"))]
        fn entries_of(from: quant::FormatId, to: quant::FormatId) -> Option<host::Entries> {
            match (from, to) {
                $($((quant::FormatId::$from, quant::FormatId::$to))|+ => Some(host::Entries {
                    flat: concat!("copy_flat_", $tag),
                    strided: concat!("copy_strided_", $tag),
                    fours: concat!("copy_fours_", $tag),
                    transpose: concat!("copy_transpose_", $tag),
                    transpose_pairs: concat!("copy_transpose_pairs_", $tag),
                }),)*
                _ => None,
            }
        }
    };
}

for_each_conversion! {
    Bits32, bits_32, "32", [F32 => F32, I32 => I32];
    Bits16, bits_16, "16", [F16 => F16, BF16 => BF16];
    F32ToF16, f32_to_f16, "f32_f16", [F32 => F16];
    F32ToBf16, f32_to_bf16, "f32_bf16", [F32 => BF16];
    F16ToF32, f16_to_f32, "f16_f32", [F16 => F32];
    Bf16ToF32, bf16_to_f32, "bf16_f32", [BF16 => F32];
    F16ToBf16, f16_to_bf16, "f16_bf16", [F16 => BF16];
    Bf16ToF16, bf16_to_f16, "bf16_f16", [BF16 => F16];
    F32ToI32, f32_to_i32, "f32_i32", [F32 => I32];
    I32ToF32, i32_to_f32, "i32_f32", [I32 => F32];
}

#[cfg(not(target_arch = "nvptx64"))]
mod host;
