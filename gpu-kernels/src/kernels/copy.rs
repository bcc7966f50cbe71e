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
mod host {
    use alloc::{boxed::Box, vec, vec::Vec};

    use half::{bf16, f16};
    use quant::FormatId;

    use super::{Divisors, Extents, PAD, PER_THREAD, REPEAT, STRIDE, THREADS, TILE};
    use crate::case::{Buffer, Expected, Kernel, Problem, Random, bytes_of};
    use crate::kernels::peer;
    use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};

    /// What lies beyond the source.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Edge {
        /// Nothing: it has the destination's shape.
        None,
        /// The source again.
        Repeat {
            /// Shape of the source.
            src_shape: [usize; 4],
        },
        /// Zeros.
        Pad {
            /// Shape of the source.
            src_shape: [usize; 4],
            /// Zeros before it.
            before: [usize; 4],
        },
    }

    /// Arguments; see the contract. Types are F32, F16, BF16 or I32.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Args {
        pub from: FormatId,
        pub to: FormatId,
        pub src: DevicePtr,
        pub dst: DevicePtr,
        pub shape: [usize; 4],
        pub src_strides: [usize; 4],
        pub dst_strides: [usize; 4],
        pub edge: Edge,
    }

    /// Strides of a dense tensor.
    pub fn dense([_, b, c, d]: [usize; 4]) -> [usize; 4] {
        [b * c * d, c * d, d, 1]
    }

    /// The entries of a conversion.
    pub(super) struct Entries {
        pub(super) flat: &'static str,
        pub(super) strided: &'static str,
        pub(super) fours: &'static str,
        pub(super) transpose: &'static str,
        pub(super) transpose_pairs: &'static str,
    }

    /// How a region lies in memory.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Region {
        shape: [u32; 4],
        src_strides: [u32; 4],
        dst_strides: [u32; 4],
    }

    impl Region {
        /// The same elements in the fewest dimensions, the last ones: those of one element go, and those that follow each
        /// other on both sides become one. Strides of a dimension of one element are 0.
        fn folded(self) -> Region {
            let mut folded = Region { shape: [1; 4], src_strides: [0; 4], dst_strides: [0; 4] };
            let mut at = 4;
            for d in (0..4).rev().filter(|&d| self.shape[d] > 1) {
                let follows = |of_folded: [u32; 4], strides: [u32; 4]| {
                    u64::from(of_folded[at]) * u64::from(folded.shape[at]) == u64::from(strides[d])
                };
                if at < 4
                    && follows(folded.src_strides, self.src_strides)
                    && follows(folded.dst_strides, self.dst_strides)
                {
                    folded.shape[at] *= self.shape[d];
                } else {
                    at -= 1;
                    folded.shape[at] = self.shape[d];
                    folded.src_strides[at] = self.src_strides[d];
                    folded.dst_strides[at] = self.dst_strides[d];
                }
            }
            folded
        }

        /// Whether all that starts somewhere, in the dimensions but `along_src` of the source and `along_dst` of the
        /// destination, starts at a multiple of `units` elements.
        fn starts_at_multiples(&self, units: u32, along_src: usize, along_dst: usize) -> bool {
            let starts = |strides: [u32; 4], along| {
                (0..4).all(|d| d == along || self.shape[d] == 1 || strides[d].is_multiple_of(units))
            };
            starts(self.src_strides, along_src) && starts(self.dst_strides, along_dst)
        }
    }

    /// One launch for the whole region.
    pub fn launch(args: &Args) -> Result<Launch, LaunchError> {
        let check = Check(StridedCopy::NAME);
        let format = if matches!(args.from, FormatId::I32) { args.from } else { args.to };
        let entries = super::entries_of(args.from, args.to)
            .ok_or(LaunchError::Format { kernel: StridedCopy::NAME, format })?;
        let n =
            check.size("elements", args.shape.iter().fold(1usize, |n, &extent| n.saturating_mul(extent)))?;
        let [from_bytes, to_bytes] = [args.from, args.to].map(|format| quant::info(format).bytes as u64);
        check.aligned("src", args.src, from_bytes)?;
        check.aligned("dst", args.dst, to_bytes)?;
        let stride = |what: &'static str, strides: [usize; 4]| -> Result<[u32; 4], LaunchError> {
            let mut out = [0; 4];
            for (out, stride) in out.iter_mut().zip(strides) {
                *out = u32::try_from(stride).map_err(|_| check.shape(what, "below 2^32", stride))?;
            }
            Ok(out)
        };
        let (src_shape, before) = match args.edge {
            Edge::None => (args.shape, [0; 4]),
            Edge::Repeat { src_shape } => (src_shape, [0; 4]),
            Edge::Pad { src_shape, before } => (src_shape, before),
        };
        for ((extent, before), space) in src_shape.into_iter().zip(before).zip(args.shape) {
            if extent == 0 || extent > space {
                return Err(check.shape("src_shape", "1 to the extent of shape", extent));
            }
            if before > space - extent {
                return Err(check.shape("before", "so much that the source lies inside", before));
            }
        }
        let region = Region {
            shape: args.shape.map(|extent| extent as u32),
            src_strides: stride("src_strides", args.src_strides)?,
            dst_strides: stride("dst_strides", args.dst_strides)?,
        };
        let base = Launch {
            entry: entries.flat,
            grid: [1; 3],
            cta: THREADS,
            cluster: 1,
            smem_bytes: 0,
            params: Params::new(),
        };
        let params = Params::new().with(args.src).with(args.dst);
        let wide = |units: u64| {
            args.src.0.is_multiple_of(units * from_bytes) && args.dst.0.is_multiple_of(units * to_bytes)
        };

        if args.edge != Edge::None {
            let [src_shape, before] = [src_shape, before].map(|extents| extents.map(|e| e as u32));
            return Ok(rows(&entries, base, params, region, args.edge, src_shape, before, wide(4)));
        }
        let region = region.folded();
        let Region { shape, src_strides, dst_strides } = region;
        if shape[3] == n && src_strides[3] == 1 && dst_strides[3] == 1 && wide(4) {
            return Ok(Launch {
                grid: [(n / 4 + 1).div_ceil(THREADS), 1, 1],
                params: params.with(n),
                ..base
            });
        }

        // The source is contiguous in another dimension than the destination: let that one be the second to last.
        let along = (0..3).find(|&d| src_strides[d] == 1);
        if let (true, 1, Some(d)) = (src_strides[3] != 1, dst_strides[3], along) {
            let swap = |mut v: [u32; 4]| {
                v.swap(d, 2);
                v
            };
            let region =
                Region { shape: swap(shape), src_strides: swap(src_strides), dst_strides: swap(dst_strides) };
            let shape = region.shape;
            let even = shape[2].is_multiple_of(2) && shape[3].is_multiple_of(2);
            let (entry, units) = if even && wide(2) && region.starts_at_multiples(2, 2, 3) {
                (entries.transpose_pairs, 2)
            } else {
                (entries.transpose, 1)
            };
            let [rows, columns] = [shape[2], shape[3]].map(|extent| extent.div_ceil(units * TILE));
            let outer = shape[0] as usize * shape[1] as usize;
            if columns <= 0xffff && outer <= 0xffff {
                let params = params.with(Extents(shape)).with(Extents(region.src_strides));
                return Ok(Launch {
                    entry,
                    grid: [rows, columns, outer as u32],
                    smem_bytes: units * TILE * STRIDE * units * to_bytes as u32,
                    params: params.with(Extents(region.dst_strides)),
                    ..base
                });
            }
        }
        Ok(rows(&entries, base, params, region, Edge::None, shape, [0; 4], wide(4)))
    }

    /// The launch by rows: by fours if addresses are `wide` enough and everything else is, too.
    fn rows(
        entries: &Entries,
        base: Launch,
        params: Params,
        mut region: Region,
        edge: Edge,
        mut src_shape: [u32; 4],
        mut before: [u32; 4],
        wide: bool,
    ) -> Launch {
        let fours = wide
            && region.src_strides[3] == 1
            && region.dst_strides[3] == 1
            && [region.shape[3], src_shape[3], before[3]].iter().all(|extent| extent.is_multiple_of(4))
            && region.starts_at_multiples(4, 3, 3);
        if fours {
            for extents in [&mut region.shape, &mut src_shape, &mut before] {
                extents[3] /= 4;
            }
            for strides in [&mut region.src_strides, &mut region.dst_strides] {
                strides[..3].iter_mut().for_each(|stride| *stride /= 4);
            }
        }
        let n: u32 = region.shape.iter().product();
        let edge = match edge {
            Edge::None => 0,
            Edge::Repeat { .. } => REPEAT,
            Edge::Pad { .. } => PAD,
        };
        let params = params.with(Divisors::new(region.shape));
        let params = params.with(Extents(region.src_strides)).with(Extents(region.dst_strides));
        let params = params.with(Divisors::new(src_shape)).with(Extents(before));
        Launch {
            entry: if fours { entries.fours } else { entries.strided },
            grid: [n.div_ceil(THREADS * PER_THREAD), 1, 1],
            params: params.with(n).with(edge),
            ..base
        }
    }

    /// Elements as bytes of a type, from f32 values that it holds or rounds.
    fn encode(format: FormatId, values: &[f32]) -> Vec<u8> {
        match format {
            FormatId::F16 => bytes_of(&values.iter().map(|&v| f16::from_f32(v)).collect::<Vec<_>>()),
            FormatId::BF16 => bytes_of(&values.iter().map(|&v| bf16::from_f32(v)).collect::<Vec<_>>()),
            FormatId::I32 => bytes_of(&values.iter().map(|&v| v as i32).collect::<Vec<_>>()),
            _ => bytes_of(values),
        }
    }

    /// The values that the bytes hold.
    fn rounded(format: FormatId, values: &[f32]) -> Vec<f32> {
        let round = |v: f32| match format {
            FormatId::F16 => f16::from_f32(v).to_f32(),
            FormatId::BF16 => bf16::from_f32(v).to_f32(),
            FormatId::I32 => v as i32 as f32,
            _ => v,
        };
        values.iter().map(|&v| round(v)).collect()
    }

    /// Every coordinate of a shape, in order.
    fn coordinates([a, b, c, d]: [usize; 4]) -> impl Iterator<Item = [usize; 4]> {
        (0..a * b * c * d).map(move |i| [i / (b * c * d), i / (c * d) % b, i / d % c, i % d])
    }

    fn place(c: [usize; 4], strides: [usize; 4]) -> usize {
        c.iter().zip(strides).map(|(c, s)| c * s).sum()
    }

    /// The definition: the destination, dense.
    pub fn reference(src: &[f32], shape: [usize; 4], src_strides: [usize; 4], edge: Edge) -> Vec<f32> {
        let element = |c: [usize; 4]| match edge {
            Edge::None => src[place(c, src_strides)],
            Edge::Repeat { src_shape } => {
                src[place(core::array::from_fn(|d| c[d] % src_shape[d]), src_strides)]
            }
            Edge::Pad { src_shape, before } => {
                let inside = (0..4).all(|d| c[d] >= before[d] && c[d] - before[d] < src_shape[d]);
                if inside { src[place(core::array::from_fn(|d| c[d] - before[d]), src_strides)] } else { 0.0 }
            }
        };
        coordinates(shape).map(element).collect()
    }

    /// The row in the registry.
    #[derive(Debug)]
    pub struct StridedCopy;

    /// One case: a source whose dimensions lie in memory in the order `order`, outermost first, after `skip` other
    /// elements; `parts` sources are concatenated along dimension 1.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Case {
        pub from: FormatId,
        pub to: FormatId,
        pub shape: [usize; 4],
        pub order: [usize; 4],
        pub edge: Edge,
        pub parts: usize,
        pub skip: usize,
    }

    const fn case(from: FormatId, to: FormatId, shape: [usize; 4], order: [usize; 4]) -> Case {
        Case { from, to, shape, order, edge: Edge::None, parts: 1, skip: 0 }
    }
    const DENSE: [usize; 4] = [0, 1, 2, 3];

    impl Kernel for StridedCopy {
        const NAME: &'static str = "copy";
        type Case = Case;
        const CASES: &'static [Case] = &[
            case(FormatId::F32, FormatId::F32, [1, 1, 1, 1], DENSE),
            case(FormatId::F32, FormatId::F16, [1, 2, 3, 171], DENSE),
            case(FormatId::F32, FormatId::BF16, [1, 1, 1, 1023], DENSE),
            case(FormatId::F16, FormatId::F32, [1, 1, 5, 206], DENSE),
            case(FormatId::BF16, FormatId::F32, [1, 1, 1, 4], DENSE),
            case(FormatId::F16, FormatId::BF16, [1, 1, 1, 7], DENSE),
            case(FormatId::BF16, FormatId::F16, [1, 1, 2, 512], DENSE),
            case(FormatId::F16, FormatId::F16, [1, 1, 1, 1030], DENSE),
            case(FormatId::F32, FormatId::I32, [1, 1, 1, 130], DENSE),
            case(FormatId::I32, FormatId::F32, [1, 1, 1, 130], DENSE),
            case(FormatId::I32, FormatId::I32, [1, 1, 1, 9], DENSE),
            // Source contiguous in another dimension: each of three.
            case(FormatId::F32, FormatId::F32, [1, 2, 33, 65], [0, 1, 3, 2]),
            case(FormatId::F32, FormatId::F16, [2, 31, 3, 32], [0, 2, 3, 1]),
            case(FormatId::BF16, FormatId::F32, [40, 2, 3, 34], [1, 2, 3, 0]),
            case(FormatId::I32, FormatId::F32, [1, 1, 64, 32], [0, 1, 3, 2]),
            // Contiguous in the same one, or in none.
            case(FormatId::F32, FormatId::BF16, [3, 5, 7, 11], [1, 0, 2, 3]),
            case(FormatId::F16, FormatId::F16, [3, 5, 7, 12], [2, 1, 0, 3]),
            Case {
                edge: Edge::Repeat { src_shape: [1, 2, 3, 20] },
                ..case(FormatId::F32, FormatId::F32, [2, 4, 3, 60], DENSE)
            },
            Case {
                edge: Edge::Repeat { src_shape: [1, 1, 7, 1] },
                ..case(FormatId::BF16, FormatId::F32, [1, 1, 7, 150], DENSE)
            },
            Case {
                edge: Edge::Pad { src_shape: [1, 2, 3, 20], before: [0, 0, 1, 5] },
                ..case(FormatId::F32, FormatId::F16, [1, 3, 4, 33], DENSE)
            },
            // Rows by fours: every conversion, rows of one and of two dimensions, several CTAs.
            case(FormatId::F32, FormatId::F32, [3, 2, 5, 12], [1, 0, 2, 3]),
            case(FormatId::I32, FormatId::I32, [2, 3, 3, 4], [1, 0, 2, 3]),
            case(FormatId::F16, FormatId::F16, [3, 2, 2, 20], [2, 1, 0, 3]),
            case(FormatId::F32, FormatId::F16, [5, 9, 2, 60], [1, 0, 2, 3]),
            case(FormatId::F32, FormatId::BF16, [1, 3, 4, 8], [0, 2, 1, 3]),
            case(FormatId::F16, FormatId::F32, [7, 3, 5, 44], [2, 0, 1, 3]),
            case(FormatId::BF16, FormatId::F32, [2, 3, 4, 4], [0, 2, 1, 3]),
            case(FormatId::F16, FormatId::BF16, [1, 2, 3, 36], [0, 2, 1, 3]),
            case(FormatId::BF16, FormatId::F16, [4, 1, 3, 28], [2, 1, 0, 3]),
            case(FormatId::F32, FormatId::I32, [2, 1, 3, 16], [2, 1, 0, 3]),
            case(FormatId::I32, FormatId::F32, [2, 2, 1, 24], [1, 0, 2, 3]),
            // One of them by elements, because addresses are odd; and the same for the dense.
            Case { skip: 2, ..case(FormatId::F32, FormatId::F16, [3, 2, 5, 12], [1, 0, 2, 3]) },
            Case { skip: 1, ..case(FormatId::BF16, FormatId::BF16, [1, 1, 9, 128], DENSE) },
            Case {
                edge: Edge::Repeat { src_shape: [1, 2, 3, 15] },
                ..case(FormatId::F32, FormatId::F32, [2, 4, 3, 45], DENSE)
            },
            Case {
                edge: Edge::Pad { src_shape: [1, 2, 3, 20], before: [0, 0, 1, 8] },
                ..case(FormatId::F32, FormatId::F16, [2, 3, 4, 32], DENSE)
            },
            Case {
                edge: Edge::Pad { src_shape: [1, 2, 3, 20], before: [0, 0, 1, 6] },
                ..case(FormatId::F16, FormatId::F16, [1, 3, 4, 32], DENSE)
            },
            // Transposed by pairs: every conversion, one tile and its edges.
            case(FormatId::F32, FormatId::F32, [1, 1, 66, 62], [0, 1, 3, 2]),
            case(FormatId::I32, FormatId::I32, [1, 1, 2, 64], [0, 1, 3, 2]),
            case(FormatId::F16, FormatId::F16, [2, 1, 64, 130], [0, 1, 3, 2]),
            case(FormatId::F32, FormatId::F16, [2, 68, 3, 34], [0, 2, 3, 1]),
            case(FormatId::F32, FormatId::BF16, [1, 1, 6, 2], [0, 1, 3, 2]),
            case(FormatId::F16, FormatId::F32, [34, 2, 3, 6], [1, 2, 3, 0]),
            case(FormatId::BF16, FormatId::F32, [1, 3, 10, 66], [0, 1, 3, 2]),
            case(FormatId::F16, FormatId::BF16, [1, 1, 64, 64], [0, 1, 3, 2]),
            case(FormatId::BF16, FormatId::F16, [1, 1, 4, 8], [0, 1, 3, 2]),
            case(FormatId::F32, FormatId::I32, [1, 1, 8, 4], [0, 1, 3, 2]),
            case(FormatId::I32, FormatId::F32, [1, 1, 12, 70], [0, 1, 3, 2]),
            // And by elements, because an extent or the address is odd.
            case(FormatId::F16, FormatId::F16, [1, 1, 33, 66], [0, 1, 3, 2]),
            Case { skip: 1, ..case(FormatId::F16, FormatId::F16, [1, 1, 6, 34], [0, 1, 3, 2]) },
            Case { parts: 3, ..case(FormatId::F32, FormatId::F32, [2, 4, 1, 50], DENSE) },
            Case { parts: 2, ..case(FormatId::F32, FormatId::F32, [3, 1, 2, 6], DENSE) },
            Case { parts: 2, ..case(FormatId::F16, FormatId::F32, [1, 3, 40, 36], [0, 1, 3, 2]) },
        ];
        const NMSE_MAX: f64 = 0.0;
        const BENCH: &'static [Case] = &[
            case(FormatId::F32, FormatId::F16, [1, 1, 2048, 4096], DENSE),
            case(FormatId::F16, FormatId::F16, [1, 1, 4096, 4096], [0, 1, 3, 2]),
            case(FormatId::F32, FormatId::F32, [1, 1, 2048, 4096], [0, 1, 3, 2]),
            case(FormatId::F32, FormatId::F16, [32, 512, 8, 128], [1, 0, 2, 3]),
            case(FormatId::F32, FormatId::F16, [1, 1, 3072, 512], DENSE),
            case(FormatId::F32, FormatId::F32, [1, 512, 2, 8192], [0, 2, 1, 3]),
        ];
        #[cfg(feature = "emu")]
        const ENTRIES: &'static [&'static [crate::emu::Entry]] = super::ENTRIES;

        fn problem(case: &Case, random: &mut Random) -> Problem {
            let Case { from, to, shape, order, edge, parts, skip } = *case;
            let src_shape = match edge {
                Edge::None => shape,
                Edge::Repeat { src_shape } | Edge::Pad { src_shape, .. } => src_shape,
            };
            let mut src_strides = [0; 4];
            let mut stride = 1;
            for &d in order.iter().rev() {
                src_strides[d] = stride;
                stride *= src_shape[d];
            }
            let scale = if from == FormatId::I32 || to == FormatId::I32 { 1000.0 } else { 1.0 };
            let sources: Vec<Vec<f32>> = (0..parts)
                .map(|_| random.values(skip + stride).iter().map(|v| v * scale).collect())
                .collect();

            let mut dst_shape = shape;
            dst_shape[1] *= parts;
            let dst_strides = dense(dst_shape);
            let mut expected = vec![0.0; dst_shape.iter().product()];
            for (part, source) in sources.iter().enumerate() {
                let copied = reference(&rounded(from, &source[skip..]), shape, src_strides, edge);
                for (c, value) in coordinates(shape).zip(copied) {
                    expected[place([c[0], c[1] + part * shape[1], c[2], c[3]], dst_strides)] = value;
                }
            }
            let mut buffers = vec![Buffer::Output(Expected::Exact(encode(to, &expected)))];
            buffers.extend(sources.iter().map(|source| Buffer::Input(encode(from, source))));
            Problem {
                buffers,
                launches: Box::new(move |at| {
                    let part_bytes = (shape[1] * dst_strides[1] * quant::info(to).bytes) as u64;
                    let part = |(part, &src): (usize, &DevicePtr)| {
                        let dst = at[0].offset(part as u64 * part_bytes);
                        let src = src.offset((skip * quant::info(from).bytes) as u64);
                        launch(&Args { from, to, src, dst, shape, src_strides, dst_strides, edge })
                    };
                    at[1..].iter().enumerate().map(part).collect()
                }),
            }
        }

        fn peer(case: &Case) -> Option<alloc::string::String> {
            let Case { from, to, shape, order, edge: Edge::None, parts: 1, .. } = *case else {
                return None;
            };
            // ggml counts from the innermost, as the source lies in memory; no order is zeros there.
            let shape = [3, 2, 1, 0].map(|d: usize| shape[order[d]]);
            let order = if order == DENSE { [0; 4] } else { [3, 2, 1, 0].map(|d: usize| 3 - order[d]) };
            Some(peer::copy(from, to, shape, order))
        }

        fn bytes(case: &Case) -> u64 {
            let n = case.shape.iter().product::<usize>() * case.parts;
            let src = match case.edge {
                Edge::None => n,
                Edge::Repeat { src_shape } | Edge::Pad { src_shape, .. } => src_shape.iter().product(),
            };
            (src * quant::info(case.from).bytes + n * quant::info(case.to).bytes) as u64
        }

        fn flops(_: &Case) -> u64 {
            0
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        /// f16 to f16, the source at `src`.
        fn entry(
            src: u64,
            shape: [usize; 4],
            src_strides: [usize; 4],
            dst_strides: [usize; 4],
        ) -> &'static str {
            let (from, edge) = (FormatId::F16, Edge::None);
            let (src, dst) = (DevicePtr(src), DevicePtr(1 << 20));
            launch(&Args { from, to: from, src, dst, shape, src_strides, dst_strides, edge }).unwrap().entry
        }

        #[test]
        fn a_source_outside_its_padding_is_refused() {
            let (shape, src_shape) = ([1, 1, 1, 8], [1, 1, 1, 4]);
            let pad = |before: usize| {
                let edge = Edge::Pad { src_shape, before: [0, 0, 0, before] };
                let (src, dst) = (DevicePtr(1 << 20), DevicePtr(2 << 20));
                let (src_strides, dst_strides) = (dense(src_shape), dense(shape));
                launch(&Args {
                    from: FormatId::F32,
                    to: FormatId::F32,
                    src,
                    dst,
                    shape,
                    src_strides,
                    dst_strides,
                    edge,
                })
            };
            assert!(pad(4).is_ok());
            for before in [5, (1 << 32) - 1, 1 << 32, usize::MAX] {
                assert!(pad(before).is_err(), "{before}");
            }
        }

        #[test]
        fn the_widest_entry_that_alignment_allows() {
            let shape = [2, 3, 4, 8];
            let permuted = [32, 64, 8, 1];
            assert_eq!(entry(0, shape, dense(shape), dense(shape)), "copy_flat_16");
            // Rows of 32 that begin every 40, every 34.
            assert_eq!(entry(0, shape, dense(shape), [120, 40, 8, 1]), "copy_fours_16");
            assert_eq!(entry(0, shape, dense(shape), [102, 34, 8, 1]), "copy_strided_16");
            assert_eq!(entry(8, shape, permuted, dense(shape)), "copy_fours_16");
            assert_eq!(entry(4, shape, permuted, dense(shape)), "copy_strided_16");
            // Columns that begin every 4, every 5.
            assert_eq!(entry(0, shape, [96, 32, 1, 4], dense(shape)), "copy_transpose_pairs_16");
            assert_eq!(entry(2, shape, [96, 32, 1, 4], dense(shape)), "copy_transpose_16");
            assert_eq!(entry(0, shape, [120, 40, 1, 5], dense(shape)), "copy_transpose_16");
            // Three of either, beginning at even places.
            assert_eq!(entry(0, [1, 1, 3, 8], [0, 0, 1, 4], [0, 0, 8, 1]), "copy_transpose_16");
            assert_eq!(entry(0, [1, 1, 8, 3], [0, 0, 1, 8], [0, 0, 4, 1]), "copy_transpose_16");
        }

        #[test]
        fn dimensions_that_follow_each_other_are_one() {
            let shape = [32, 512, 8, 128];
            let region = Region {
                shape,
                src_strides: [1024, 32 * 1024, 128, 1],
                dst_strides: [512 * 1024, 1024, 128, 1],
            };
            let folded = Region {
                shape: [1, 32, 512, 1024],
                src_strides: [0, 1024, 32 * 1024, 1],
                dst_strides: [0, 512 * 1024, 1024, 1],
            };
            assert_eq!(region.folded(), folded);
            // A source that repeats one element, rows that repeat one.
            let region = Region { shape: [1, 2, 3, 4], src_strides: [0; 4], dst_strides: [24, 12, 4, 1] };
            let folded = Region { shape: [1, 1, 1, 24], src_strides: [0; 4], dst_strides: [0, 0, 0, 1] };
            assert_eq!(region.folded(), folded);
        }

        #[cfg(feature = "emu")]
        #[test]
        fn divisors_divide() {
            let values = [1, 2, 3, 5, 7, 641, 1000, 4096, 6_700_417, 0x3fff_ffff, 0x4000_0001, 0x7fff_ffff];
            for by in values {
                let divisors = Divisors::new([by; 4]);
                for n in values.into_iter().flat_map(|v| [v - 1, v, 3 * (v / 3), 0x7fff_ffff - v]) {
                    assert_eq!(divisors.divide(3, n), (n / by, n % by), "{n} / {by}");
                }
            }
        }
    }
}
