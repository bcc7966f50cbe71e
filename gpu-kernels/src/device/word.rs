//! What one load or store moves: [`Word`] says how in PTX, [`Float`] how element types convert.

#[cfg(target_arch = "nvptx64")]
use core::arch::asm;

use bytemuck::Pod;
use half::{bf16, f16};

/// Two words, one 8-byte access.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(8))]
pub struct U32x2(pub [u32; 2]);

/// Four words, one 16-byte access.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(16))]
pub struct U32x4(pub [u32; 4]);

/// Two floats, one 8-byte access.
#[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(8))]
pub struct F32x2(pub [f32; 2]);

/// Four floats, one 16-byte access.
#[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(16))]
pub struct F32x4(pub [f32; 4]);

/// A type that one instruction loads or stores.
pub trait Word: Pod {
    /// `ld.global.nc`: for memory that nobody writes while the kernel runs.
    ///
    /// # Safety
    ///
    /// * `address` is a global address of a `Self`, aligned to its size.
    #[cfg(target_arch = "nvptx64")]
    unsafe fn load_global_nc(address: u64) -> Self;
    /// `ld.global.nc` of what is read once: no line in L1, and L2 fetches whole 128-byte lines (from sm_80 on).
    ///
    /// # Safety
    ///
    /// * `address` is a global address of a `Self`, aligned to its size.
    #[cfg(target_arch = "nvptx64")]
    unsafe fn load_global_stream(address: u64) -> Self;
    /// `ld.global`.
    ///
    /// # Safety
    ///
    /// * `address` is a global address of a `Self`, aligned to its size.
    #[cfg(target_arch = "nvptx64")]
    unsafe fn load_global(address: u64) -> Self;
    /// `st.global`.
    ///
    /// # Safety
    ///
    /// * `address` is a global address of a `Self`, aligned to its size.
    #[cfg(target_arch = "nvptx64")]
    unsafe fn store_global(address: u64, value: Self);
    /// `ld.shared`.
    ///
    /// # Safety
    ///
    /// * `address` is a shared address of a `Self`, aligned to its size.
    #[cfg(target_arch = "nvptx64")]
    unsafe fn load_shared(address: u32) -> Self;
    /// `ld.shared` that need not happen.
    ///
    /// # Safety
    ///
    /// * `address` is a shared address of a `Self`, aligned to its size.
    #[cfg(target_arch = "nvptx64")]
    unsafe fn load_shared_still(address: u32) -> Self;
    /// `st.shared`.
    ///
    /// # Safety
    ///
    /// * `address` is a shared address of a `Self`, aligned to its size.
    #[cfg(target_arch = "nvptx64")]
    unsafe fn store_shared(address: u32, value: Self);
}

/// The instruction of [`Word::load_global_stream`] up to its type. The prefetch size needs PTX 7.4.
#[cfg(all(target_arch = "nvptx64", sm_ge_80))]
macro_rules! stream {
    () => {
        "ld.global.nc.L1::no_allocate.L2::128B."
    };
}
#[cfg(all(target_arch = "nvptx64", not(sm_ge_80)))]
macro_rules! stream {
    () => {
        "ld.global.nc."
    };
}

/// Loads: not `pure` where others may store, so that none moves across a barrier.
macro_rules! scalar {
    ($($ty:ty: $reg:ty, $class:ident, $suffix:literal;)*) => {$(
        impl Word for $ty {
            #[cfg(target_arch = "nvptx64")]
            #[inline(always)]
            unsafe fn load_global_nc(address: u64) -> Self {
                let value: $reg;
                // SAFETY: the caller's address.
                unsafe { asm!(concat!("ld.global.nc.", $suffix, " {},[{}];"), out($class) value, in(reg64) address, options(pure, readonly, nostack, preserves_flags)) }
                bytemuck::cast(value as <$reg as Narrow<$ty>>::To)
            }
            #[cfg(target_arch = "nvptx64")]
            #[inline(always)]
            unsafe fn load_global_stream(address: u64) -> Self {
                let value: $reg;
                // SAFETY: the caller's address.
                unsafe { asm!(concat!(stream!(), $suffix, " {},[{}];"), out($class) value, in(reg64) address, options(pure, readonly, nostack, preserves_flags)) }
                bytemuck::cast(value as <$reg as Narrow<$ty>>::To)
            }
            #[cfg(target_arch = "nvptx64")]
            #[inline(always)]
            unsafe fn load_global(address: u64) -> Self {
                let value: $reg;
                // SAFETY: the caller's address.
                unsafe { asm!(concat!("ld.global.", $suffix, " {},[{}];"), out($class) value, in(reg64) address, options(readonly, nostack, preserves_flags)) }
                bytemuck::cast(value as <$reg as Narrow<$ty>>::To)
            }
            #[cfg(target_arch = "nvptx64")]
            #[inline(always)]
            unsafe fn store_global(address: u64, value: Self) {
                let value = bytemuck::cast::<$ty, <$reg as Narrow<$ty>>::To>(value) as $reg;
                // SAFETY: the caller's address.
                unsafe { asm!(concat!("st.global.", $suffix, " [{}],{};"), in(reg64) address, in($class) value, options(nostack, preserves_flags)) }
            }
            #[cfg(target_arch = "nvptx64")]
            #[inline(always)]
            unsafe fn load_shared(address: u32) -> Self {
                let value: $reg;
                // SAFETY: the caller's address.
                unsafe { asm!(concat!("ld.shared.", $suffix, " {},[{}];"), out($class) value, in(reg32) address, options(readonly, nostack, preserves_flags)) }
                bytemuck::cast(value as <$reg as Narrow<$ty>>::To)
            }
            #[cfg(target_arch = "nvptx64")]
            #[inline(always)]
            unsafe fn load_shared_still(address: u32) -> Self {
                let value: $reg;
                // SAFETY: the caller's address.
                unsafe { asm!(concat!("ld.shared.", $suffix, " {},[{}];"), out($class) value, in(reg32) address, options(pure, readonly, nostack, preserves_flags)) }
                bytemuck::cast(value as <$reg as Narrow<$ty>>::To)
            }
            #[cfg(target_arch = "nvptx64")]
            #[inline(always)]
            unsafe fn store_shared(address: u32, value: Self) {
                let value = bytemuck::cast::<$ty, <$reg as Narrow<$ty>>::To>(value) as $reg;
                // SAFETY: the caller's address.
                unsafe { asm!(concat!("st.shared.", $suffix, " [{}],{};"), in(reg32) address, in($class) value, options(nostack, preserves_flags)) }
            }
        }
    )*};
}

/// The unsigned integer as wide as `T`: bytes travel in 16-bit registers, so theirs is narrower than the register.
#[cfg(target_arch = "nvptx64")]
trait Narrow<T> {
    type To;
}

macro_rules! narrow {
    ($($reg:ty: $($ty:ty => $to:ty),*;)*) => {$($(
        #[cfg(target_arch = "nvptx64")]
        impl Narrow<$ty> for $reg { type To = $to; }
    )*)*};
}

narrow! {
    u16: u8 => u8, i8 => u8, u16 => u16, f16 => u16, bf16 => u16;
    u32: u32 => u32, i32 => u32, f32 => u32;
    u64: u64 => u64;
}

scalar! {
    u8: u16, reg16, "u8";
    i8: u16, reg16, "u8";
    u16: u16, reg16, "b16";
    f16: u16, reg16, "b16";
    bf16: u16, reg16, "b16";
    u32: u32, reg32, "b32";
    i32: u32, reg32, "b32";
    f32: u32, reg32, "b32";
    u64: u64, reg64, "b64";
}

macro_rules! vector {
    ($($ty:ty: $suffix:literal, $list:literal, ($($x:ident),*), $words:ty;)*) => {$(
        impl Word for $ty {
            #[cfg(target_arch = "nvptx64")]
            #[inline(always)]
            unsafe fn load_global_nc(address: u64) -> Self {
                $(let $x: u32;)*
                // SAFETY: the caller's address.
                unsafe { asm!(concat!("ld.global.nc.", $suffix, " ", $list, ",[{}];"), $(out(reg32) $x,)* in(reg64) address, options(pure, readonly, nostack, preserves_flags)) }
                bytemuck::cast([$($x),*])
            }
            #[cfg(target_arch = "nvptx64")]
            #[inline(always)]
            unsafe fn load_global_stream(address: u64) -> Self {
                $(let $x: u32;)*
                // SAFETY: the caller's address.
                unsafe { asm!(concat!(stream!(), $suffix, " ", $list, ",[{}];"), $(out(reg32) $x,)* in(reg64) address, options(pure, readonly, nostack, preserves_flags)) }
                bytemuck::cast([$($x),*])
            }
            #[cfg(target_arch = "nvptx64")]
            #[inline(always)]
            unsafe fn load_global(address: u64) -> Self {
                $(let $x: u32;)*
                // SAFETY: the caller's address.
                unsafe { asm!(concat!("ld.global.", $suffix, " ", $list, ",[{}];"), $(out(reg32) $x,)* in(reg64) address, options(readonly, nostack, preserves_flags)) }
                bytemuck::cast([$($x),*])
            }
            #[cfg(target_arch = "nvptx64")]
            #[inline(always)]
            unsafe fn store_global(address: u64, value: Self) {
                let [$($x),*]: $words = bytemuck::cast(value);
                // SAFETY: the caller's address.
                unsafe { asm!(concat!("st.global.", $suffix, " [{}],", $list, ";"), in(reg64) address, $(in(reg32) $x,)* options(nostack, preserves_flags)) }
            }
            #[cfg(target_arch = "nvptx64")]
            #[inline(always)]
            unsafe fn load_shared(address: u32) -> Self {
                $(let $x: u32;)*
                // SAFETY: the caller's address.
                unsafe { asm!(concat!("ld.shared.", $suffix, " ", $list, ",[{}];"), $(out(reg32) $x,)* in(reg32) address, options(readonly, nostack, preserves_flags)) }
                bytemuck::cast([$($x),*])
            }
            #[cfg(target_arch = "nvptx64")]
            #[inline(always)]
            unsafe fn load_shared_still(address: u32) -> Self {
                $(let $x: u32;)*
                // SAFETY: the caller's address.
                unsafe { asm!(concat!("ld.shared.", $suffix, " ", $list, ",[{}];"), $(out(reg32) $x,)* in(reg32) address, options(pure, readonly, nostack, preserves_flags)) }
                bytemuck::cast([$($x),*])
            }
            #[cfg(target_arch = "nvptx64")]
            #[inline(always)]
            unsafe fn store_shared(address: u32, value: Self) {
                let [$($x),*]: $words = bytemuck::cast(value);
                // SAFETY: the caller's address.
                unsafe { asm!(concat!("st.shared.", $suffix, " [{}],", $list, ";"), in(reg32) address, $(in(reg32) $x,)* options(nostack, preserves_flags)) }
            }
        }
    )*};
}

vector! {
    U32x2: "v2.b32", "{{{},{}}}", (x, y), [u32; 2];
    F32x2: "v2.b32", "{{{},{}}}", (x, y), [u32; 2];
    U32x4: "v4.b32", "{{{},{},{},{}}}", (x, y, z, w), [u32; 4];
    F32x4: "v4.b32", "{{{},{},{},{}}}", (x, y, z, w), [u32; 4];
}

/// An element type of a tensor: f32, f16 or bf16.
pub trait Float: Word {
    /// Exact value.
    fn to_f32(self) -> f32;
    /// Nearest value, ties to even.
    fn from_f32(value: f32) -> Self;
}

impl Float for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(value: f32) -> f32 {
        value
    }
}

impl Float for f16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        quant::bits::f16_to_f32(self.to_bits())
    }
    #[inline(always)]
    fn from_f32(value: f32) -> f16 {
        f16::from_bits(quant::bits::f32_to_f16(value))
    }
}

impl Float for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        quant::bits::bf16_to_f32(self.to_bits())
    }
    #[inline(always)]
    fn from_f32(value: f32) -> bf16 {
        bf16::from_bits(quant::bits::f32_to_bf16(value))
    }
}
