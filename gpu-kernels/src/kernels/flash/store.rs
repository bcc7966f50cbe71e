//! Tiles in shared memory: what they hold ([`Class`]), where ([`Store`]), and how rows of the cache get there.

use half::{bf16, f16};
use quant::{BlockFormat, FormatId, formats};

use super::Kept;
use crate::device::mma::{self, FragmentA, FragmentB, FragmentF32};
use crate::device::{F32x4, Float, Glb, Smem, U32x4, async_copy, math, thread};
use crate::kernels::group_f16;
use crate::tile::block_at;

/// How operands are kept: one word of two elements per plane.
pub(super) trait Class {
    const KEPT: Kept;
    const PLANES: usize = Self::KEPT.planes();
    /// Two ones.
    const ONES: u32;
    /// Two elements; the second word is for the second plane.
    fn pack(low: f32, high: f32) -> [u32; 2];
    /// `c += a · b`, planes given; of one plane only the first is looked at.
    fn product(c: &mut FragmentF32, a: &[FragmentA; 2], b: [FragmentB; 2]);
    /// `c += a · 1`.
    fn sum(c: &mut FragmentF32, a: &[FragmentA; 2]);
}

/// [`Kept::Half`].
pub(super) struct Half;
/// [`Kept::Unpacked`].
pub(super) struct Unpacked;
/// [`Kept::Split`].
pub(super) struct Split;

impl Class for Half {
    const KEPT: Kept = Kept::Half;
    const ONES: u32 = 0x3c00_3c00;
    #[inline(always)]
    fn pack(low: f32, high: f32) -> [u32; 2] {
        [math::pack_f16(low, high), 0]
    }
    #[inline(always)]
    #[track_caller]
    fn product(c: &mut FragmentF32, a: &[FragmentA; 2], b: [FragmentB; 2]) {
        mma::mma_f16(c, a[0], b[0]);
    }
    #[inline(always)]
    #[track_caller]
    fn sum(c: &mut FragmentF32, a: &[FragmentA; 2]) {
        mma::mma_f16(c, a[0], FragmentB([Self::ONES; 2]));
    }
}

impl Class for Unpacked {
    const KEPT: Kept = Kept::Unpacked;
    const ONES: u32 = Half::ONES;
    #[inline(always)]
    fn pack(low: f32, high: f32) -> [u32; 2] {
        Half::pack(low, high)
    }
    #[inline(always)]
    #[track_caller]
    fn product(c: &mut FragmentF32, a: &[FragmentA; 2], b: [FragmentB; 2]) {
        Half::product(c, a, b);
    }
    #[inline(always)]
    #[track_caller]
    fn sum(c: &mut FragmentF32, a: &[FragmentA; 2]) {
        Half::sum(c, a);
    }
}

impl Class for Split {
    const KEPT: Kept = Kept::Split;
    const ONES: u32 = 0x3f80_3f80;
    #[inline(always)]
    fn pack(low: f32, high: f32) -> [u32; 2] {
        let first = math::pack_bf16(low, high);
        let rest = |v: f32, bits: u32| v - f32::from_bits(bits);
        [first, math::pack_bf16(rest(low, first << 16), rest(high, first & 0xffff_0000))]
    }
    #[inline(always)]
    #[track_caller]
    fn product(c: &mut FragmentF32, a: &[FragmentA; 2], b: [FragmentB; 2]) {
        mma::mma_bf16(c, a[0], b[0]);
        mma::mma_bf16(c, a[0], b[1]);
        mma::mma_bf16(c, a[1], b[0]);
    }
    #[inline(always)]
    #[track_caller]
    fn sum(c: &mut FragmentF32, a: &[FragmentA; 2]) {
        mma::mma_bf16(c, a[0], FragmentB([Self::ONES; 2]));
        mma::mma_bf16(c, a[1], FragmentB([Self::ONES; 2]));
    }
}

/// A tile of K or V in shared memory.
#[derive(Clone, Copy)]
pub(super) struct Store {
    pub(super) rows: Smem<U32x4>,
    /// Where the tile starts, and 16-byte units from one plane to the next.
    pub(super) start: u32,
    pub(super) plane: u32,
    /// Units of a row.
    pub(super) units: u32,
}

impl Store {
    /// The place of unit `c` of row `r`: neighbours in a column lie in different banks.
    #[inline(always)]
    pub(super) fn at(&self, r: u32, c: u32) -> u32 {
        self.start + r * self.units + (c ^ (r & 7))
    }

    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    fn put_floats<C: Class>(&self, r: u32, c: u32, values: [f32; 8]) {
        let mut words = [[0; 4]; 2];
        unroll!(I in 0..4 {
            let [first, second] = C::pack(values[2 * I], values[2 * I + 1]);
            words[0][I] = first;
            words[1][I] = second;
        });
        self.rows.st(self.at(r, c), U32x4(words[0]));
        if C::PLANES == 2 {
            self.rows.st(self.plane + self.at(r, c), U32x4(words[1]));
        }
    }
}

/// Rows of floats, widened; rows from `n_valid` on become zero.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
#[track_caller]
fn fill_floats<C: Class, T: Float>(
    from: Glb<u8>,
    to: Store,
    n_rows: u32,
    n_valid: u32,
    head_dim: u32,
    threads: u32,
) {
    let (units, per_unit) = (head_dim / 8, size_of::<T>() as u32 / 2);
    let mut i = thread::thread_idx_x();
    while i < n_rows * units {
        let (r, c) = (i / units, i % units);
        let mut values = [0.0; 8];
        if r < n_valid {
            if size_of::<T>() == 4 {
                let F32x4(a) = from.cast::<F32x4>().ld_nc(i * per_unit);
                let F32x4(b) = from.cast::<F32x4>().ld_nc(i * per_unit + 1);
                values = [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]];
            } else {
                let U32x4(words) = from.cast::<U32x4>().ld_nc(i);
                unroll!(I in 0..4 {
                    let [low, high] = T::pair(words[I]);
                    values[2 * I] = low;
                    values[2 * I + 1] = high;
                });
            }
        }
        to.put_floats::<C>(r, c, values);
        i += threads;
    }
}

/// An element type that comes two to a word.
trait Pair {
    fn pair(word: u32) -> [f32; 2];
}
impl<T: Float> Pair for T {
    #[inline(always)]
    fn pair(word: u32) -> [f32; 2] {
        // The low half first; a type of four bytes never comes here.
        let half =
            |bits: u32| bytemuck::pod_read_unaligned::<T>(&bits.to_le_bytes()[..size_of::<T>()]).to_f32();
        [half(word & 0xffff), half(word >> 16)]
    }
}

/// The block's values in f16, each the format's value rounded once.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
fn in_f16<F: BlockFormat>(block: &F) -> [U32x4; 4] {
    const { assert!(F::GROUPS == 1 && F::SCALE_ELEMS == 32 && F::SCALE_IS_F16 && F::BIAS >= 0) };
    let group = block.unpack_group(0);
    let twice = |v: [f32; 2]| [math::pack_f16(v[0], v[0]); 2];
    let offsets = F::HAS_OFFSET.then(|| twice(group.offset));
    group_f16::of_codes(&group.codes, F::BIAS as u32, twice(group.scale), offsets)
}

/// Rows of blocks, widened; rows from `n_valid` on become zero.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
#[track_caller]
fn fill_blocks<C: Class, F: BlockFormat>(
    from: Glb<u8>,
    to: Store,
    n_rows: u32,
    n_valid: u32,
    head_dim: u32,
    threads: u32,
) {
    let groups = head_dim / 32;
    let mut i = thread::thread_idx_x();
    while i < n_rows * groups {
        let (r, c) = (i / groups, i % groups * 4);
        if C::PLANES == 1 {
            let zero = [U32x4([0; 4]); 4];
            let units = if r < n_valid { in_f16(from.cast::<F>().view(i)) } else { zero };
            unroll!(U in 0..4 {
                to.rows.st(to.at(r, c + U as u32), units[U]);
            });
        } else if r < n_valid {
            let group = from.cast::<F>().view(i).unpack_group(0);
            unroll!(U in 0..4 {
                let mut values = [0.0; 8];
                unroll!(I in 0..8 {
                    let code = (group.codes[2 * U + I / 4] >> (8 * (I % 4)) & 0xff) as i32 - F::BIAS;
                    // Two roundings: the format's exact decoded value.
                    let scaled = math::mul(group.scale[0], code as f32);
                    values[I] = if F::HAS_OFFSET { scaled + group.offset[0] } else { scaled };
                });
                to.put_floats::<C>(r, c + U as u32, values);
            });
        } else {
            unroll!(U in 0..4 {
                to.put_floats::<C>(r, c + U as u32, [0.0; 8]);
            });
        }
        i += threads;
    }
}

/// Calls `$call` with the block format that is `$format`, `$other` if it is none.
macro_rules! with_blocks {
    ($format:expr, |$F:ident| $call:expr, $other:expr) => {{
        const Q4_0: u32 = FormatId::Q4_0 as u32;
        const Q4_1: u32 = FormatId::Q4_1 as u32;
        const Q5_0: u32 = FormatId::Q5_0 as u32;
        const Q5_1: u32 = FormatId::Q5_1 as u32;
        const Q8_0: u32 = FormatId::Q8_0 as u32;
        with_blocks! { @ $format, $F, $call, $other; Q4_0 q4_0, Q4_1 q4_1, Q5_0 q5_0, Q5_1 q5_1, Q8_0 q8_0 }
    }};
    (@ $format:expr, $F:ident, $call:expr, $other:expr; $($id:ident $module:ident),*) => {
        match $format {
            $($id => {
                type $F = formats::$module::Block;
                $call
            })*
            _ => $other,
        }
    };
}

/// Rows of any format.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
#[track_caller]
pub(super) fn fill<C: Class>(
    format: u32,
    from: Glb<u8>,
    to: Store,
    n_rows: u32,
    n_valid: u32,
    head_dim: u32,
    threads: u32,
) {
    const F32: u32 = FormatId::F32 as u32;
    const BF16: u32 = FormatId::BF16 as u32;
    with_blocks!(
        format,
        |F| fill_blocks::<C, F>(from, to, n_rows, n_valid, head_dim, threads),
        match format {
            // The class of one plane is launched without these two.
            F32 if C::PLANES == 2 => fill_floats::<C, f32>(from, to, n_rows, n_valid, head_dim, threads),
            BF16 if C::PLANES == 2 => fill_floats::<C, bf16>(from, to, n_rows, n_valid, head_dim, threads),
            _ => fill_floats::<C, f16>(from, to, n_rows, n_valid, head_dim, threads),
        }
    );
}

/// Rows of a tile in f16.
pub(super) trait Rows {
    /// 16-byte units of one.
    fn units(&self) -> u32;
    /// Sets unit `c` of row `r`.
    fn put(&self, r: u32, c: u32, unit: U32x4);
}

impl Rows for Store {
    #[inline(always)]
    fn units(&self) -> u32 {
        self.units
    }
    #[inline(always)]
    #[track_caller]
    fn put(&self, r: u32, c: u32, unit: U32x4) {
        self.rows.st(self.at(r, c), unit);
    }
}

/// Rows as the cache has them in shared memory: those of a block lie one after the other there, too.
#[derive(Clone, Copy)]
pub(super) struct Raw {
    pub(super) words: Smem<u32>,
    pub(super) row_bytes: u32,
}

impl Raw {
    /// Starts the copy of `n_rows` rows, whose bytes are a multiple of 16; rows from `n_valid` on become zeros, which are
    /// zeros in every format.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    pub(super) fn copy(self, from: Glb<u8>, n_rows: u32, n_valid: u32, threads: u32) {
        let (to, from) = (self.words.cast(), from.cast());
        let mut i = math::fresh(thread::thread_idx_x());
        let n = n_rows * self.row_bytes / 16;
        if n_valid >= n_rows {
            while i < n {
                async_copy::copy16(to, i, from, i);
                i += threads;
            }
        } else {
            while i < n {
                let rest = (n_valid * self.row_bytes).saturating_sub(16 * i);
                async_copy::copy16_first(to, i, from, i, if rest < 16 { rest } else { 16 });
                i += threads;
            }
        }
    }

    /// Rows that lanes take beside each other, so that those that store together store to different banks. With rows of 64
    /// elements (17 words of Q8_0) 32 rows are loaded from different banks, with rows of 128 only 16.
    const fn run(units: u32) -> u32 {
        if units <= 8 { 32 } else { 16 }
    }

    /// A number of threads that takes whole runs of all groups of a tile's row.
    pub(super) const fn pass_threads(units: u32) -> u32 {
        Self::run(units) * units / 4
    }

    /// The block of format `F` that starts in word `word`: with it, or two bytes after where `between` holds.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    fn block<F: BlockFormat>(self, word: u32, between: bool) -> F {
        const { assert!(size_of::<F>().is_multiple_of(2) && size_of::<F>() <= 34) };
        let n_words = size_of::<F>().div_ceil(4);
        let mut words = [0; 9];
        unroll!(I in 0..8 {
            if I < n_words {
                words[I] = self.words.ld(word + I as u32);
            }
        });
        if n_words > 8 {
            words[8] = self.words.ld(word + 8);
        }
        if size_of::<F>().is_multiple_of(4) {
            return block_at(&words, 0);
        }
        // Such formats have a scale of two bytes, then whole words. These shall be whole in registers, wherever the block starts:
        // after two bytes that are not the block's.
        let selector = if between { 0x7654 } else { 0x5432 };
        let mut placed = [0; 9];
        placed[0] = math::prmt(words[0], words[0], selector);
        unroll!(I in 0..8 {
            placed[I + 1] = math::prmt(words[I], words[I + 1], selector);
        });
        block_at(&placed, 2)
    }

    /// Unpacks rows of blocks.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    fn unpack_blocks<F: BlockFormat>(self, to: &impl Rows, n_rows: u32, head_dim: u32, threads: u32) {
        // Of the tile, known when this is compiled; a head may have fewer.
        let groups = to.units() / 4;
        // A thread takes the same group of every so many rows. Where lanes take 16 rows, the others take the group after the next.
        let run = Self::run(to.units());
        let thread = math::fresh(thread::thread_idx_x());
        let nth = thread / run % groups;
        let g = if groups > 2 { 2 * nth % groups + 2 * nth / groups } else { nth };
        let (mut r, pass) = (thread / (run * groups) * run + thread % run, threads / groups);
        if g < head_dim / 32 {
            let at = r * self.row_bytes + g * size_of::<F>() as u32;
            // Passes are of whole words.
            let (mut word, between) = (at / 4, !at.is_multiple_of(4));
            while r < n_rows {
                let units = in_f16(&self.block::<F>(word, between));
                unroll!(U in 0..4 {
                    to.put(r, 4 * g + U as u32, units[U]);
                });
                r += pass;
                word += pass * self.row_bytes / 4;
            }
        }
    }

    /// Unpacks rows of f16, which are what they shall be.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    fn unpack_f16(self, to: &impl Rows, n_rows: u32, head_dim: u32, threads: u32) {
        let given = head_dim / 8;
        let mut i = math::fresh(thread::thread_idx_x());
        while i < n_rows * to.units() {
            let (r, c) = (i / to.units(), i % to.units());
            if c < given {
                to.put(r, c, self.words.cast().ld(r * given + c));
            }
            i += threads;
        }
    }

    /// Unpacks rows of block formats or f16 to rows of a tile that have room for them; `threads` is a multiple of
    /// [`Raw::pass_threads`].
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    pub(super) fn unpack(self, format: u32, to: &impl Rows, n_rows: u32, head_dim: u32, threads: u32) {
        with_blocks!(
            format,
            |F| self.unpack_blocks::<F>(to, n_rows, head_dim, threads),
            self.unpack_f16(to, n_rows, head_dim, threads)
        );
    }
}

/// Rows of f16 as they are, without waiting; rows from `n_valid` on become zero.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
#[track_caller]
pub(super) fn copy(from: Glb<u8>, to: Store, n_rows: u32, n_valid: u32, head_dim: u32, threads: u32) {
    // Computed anew for each block: see `block::block`.
    let (given, thread) = (head_dim / 8, math::fresh(thread::thread_idx_x()));
    // The threads go through the tile together, and come out even. In a loop, for the addresses' sake.
    let units = n_rows * to.units;
    let units = if units > 2 * threads { math::opaque(units) } else { units };
    let mut first = 0;
    while first < units {
        let i = first + thread;
        let (r, c) = (i / to.units, i % to.units);
        if c < given {
            if r < n_valid {
                async_copy::copy16(to.rows, to.at(r, c), from.cast(), r * given + c);
            } else {
                to.rows.st(to.at(r, c), U32x4([0; 4]));
            }
        }
        first += threads;
    }
}

/// [`copy`] where a pass of the threads takes whole groups of eight rows, in which the places of units repeat: from pass to
/// pass a thread's addresses grow by the same. Most blocks are whole and fill the tile: they are copied without a test.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
#[track_caller]
pub(super) fn copy_in_passes(
    from: Glb<u8>,
    to: Store,
    n_rows: u32,
    n_valid: u32,
    head_dim: u32,
    threads: u32,
) {
    let thread = thread::thread_idx_x();
    let (r, c) = (thread / to.units, thread % to.units);
    let (at, given, pass) = (to.at(r, c), head_dim / 8, threads / to.units);
    let from = from.cast::<U32x4>().offset((r * given + c) as usize);
    let mut first = 0;
    if given == to.units && n_valid >= n_rows {
        while first < n_rows {
            async_copy::copy16(to.rows, at + first * to.units, from, first * to.units);
            first += pass;
        }
    } else if c < given {
        while first < n_rows {
            let there = first + r < n_valid;
            async_copy::copy16_or_zero(to.rows, at + first * to.units, from, first * given, there);
            first += pass;
        }
    }
}
