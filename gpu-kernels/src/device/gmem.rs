//! Global memory: [`Glb`], a typed global address.
//!
//! On the device it is a 64-bit address and every access is `ld.global`/`st.global`, wherever the address came from.
//! The emulator checks each access: bounds, alignment, initialisation, races.

use core::marker::PhantomData;

use super::word::Word;
#[cfg(not(target_arch = "nvptx64"))]
use crate::emu::lane;

/// An array of `T` in global memory, by its address. A kernel argument; its length is the launcher's affair.
#[repr(transparent)]
pub struct Glb<T> {
    address: u64,
    element: PhantomData<*mut T>,
}

impl<T> Clone for Glb<T> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Glb<T> {}

// SAFETY: an integer, whatever `T` is: any bits are valid.
unsafe impl<T: 'static> bytemuck::Pod for Glb<T> {}
// SAFETY: as above; address 0 is never accessed.
unsafe impl<T> bytemuck::Zeroable for Glb<T> {}

impl<T> Glb<T> {
    /// The argument that was not given.
    pub const NULL: Glb<T> = Glb { address: 0, element: PhantomData };

    /// The array that starts `elems` further on.
    #[inline(always)]
    pub fn offset(self, elems: usize) -> Glb<T> {
        Glb { address: self.address + (elems * size_of::<T>()) as u64, element: PhantomData }
    }

    /// The same address, elements of another type.
    #[inline(always)]
    pub fn cast<U>(self) -> Glb<U> {
        Glb { address: self.address, element: PhantomData }
    }

    /// Address of element `i`.
    #[inline(always)]
    pub fn address(self, i: u32) -> u64 {
        self.address + u64::from(i) * size_of::<T>() as u64
    }

    /// Whether the argument was given: optional arrays are passed as address 0.
    #[inline(always)]
    pub fn is_null(self) -> bool {
        self.address == 0
    }
}

impl<T: Word> Glb<T> {
    /// Element `i`, of an array that others may write.
    #[inline(always)]
    #[track_caller]
    pub fn ld(self, i: u32) -> T {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: the launch gave an array that holds element `i`.
        unsafe {
            T::load_global(self.address(i))
        }
        #[cfg(not(target_arch = "nvptx64"))]
        lane::load_global(self.address(i))
    }

    /// Element `i`, of an array that nobody writes while the kernel works: the read-only path (`.nc`) before sm_90. From
    /// there on a kernel may have started beside the one that writes the array (see [`super::grid`]), and loads that
    /// the hardware takes for constant might move up across the wait; both ways go through L1.
    #[inline(always)]
    #[track_caller]
    pub fn ld_nc(self, i: u32) -> T {
        #[cfg(all(target_arch = "nvptx64", not(sm_ge_90)))]
        // SAFETY: the launch gave an array that holds element `i`.
        unsafe {
            T::load_global_nc(self.address(i))
        }
        #[cfg(all(target_arch = "nvptx64", sm_ge_90))]
        // SAFETY: the launch gave an array that holds element `i`.
        unsafe {
            T::load_global(self.address(i))
        }
        #[cfg(not(target_arch = "nvptx64"))]
        lane::load_global(self.address(i))
    }

    /// Element `i`, of an array that no launch of the step writes: weights and the step's inputs. May come before
    /// [`super::grid::wait_for_earlier`].
    #[inline(always)]
    #[track_caller]
    pub fn ld_early(self, i: u32) -> T {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: the launch gave an array that holds element `i`.
        unsafe {
            T::load_global_nc(self.address(i))
        }
        #[cfg(not(target_arch = "nvptx64"))]
        lane::load_global_early(self.address(i))
    }

    /// [`Glb::ld_early`] of what the kernel reads once: passes by L1.
    #[inline(always)]
    #[track_caller]
    pub fn ld_stream(self, i: u32) -> T {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: the launch gave an array that holds element `i`.
        unsafe {
            T::load_global_stream(self.address(i))
        }
        #[cfg(not(target_arch = "nvptx64"))]
        lane::load_global_early(self.address(i))
    }

    /// Sets element `i`.
    #[inline(always)]
    #[track_caller]
    pub fn st(self, i: u32, value: T) {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: the launch gave an array that holds element `i`.
        unsafe {
            T::store_global(self.address(i), value)
        }
        #[cfg(not(target_arch = "nvptx64"))]
        lane::store_global(self.address(i), value)
    }
}

impl Glb<u8> {
    /// Asks L2 for `bytes` bytes from here on, weights that are read soon: start and length are multiples of 16, and
    /// both exist (sm_90, `cp.async.bulk.prefetch`; nothing before). One lane of a warp is enough. May come before
    /// [`super::grid::wait_for_earlier`].
    #[inline(always)]
    #[track_caller]
    pub fn prefetch(self, bytes: u32) {
        #[cfg(all(target_arch = "nvptx64", sm_ge_90))]
        // SAFETY: the launch gave an array that holds the range; a prefetch reads and writes nothing.
        unsafe {
            core::arch::asm!("cp.async.bulk.prefetch.L2.global [{}],{};", in(reg64) self.address, in(reg32) bytes, options(nostack, preserves_flags))
        }
        #[cfg(all(target_arch = "nvptx64", not(sm_ge_90)))]
        let _ = bytes;
        #[cfg(not(target_arch = "nvptx64"))]
        lane::prefetch_global(self.address, bytes.into());
    }
}

impl<T: bytemuck::Pod> Glb<T> {
    /// A look at element `i` of an array of blocks that nobody writes while the kernel runs. Only the bytes that are
    /// used are loaded, as wide as the block's size allows: blocks have alignment 1, but an array of them starts at a
    /// multiple of 16, so each lies at a multiple of the largest power of two that divides its size.
    #[inline(always)]
    #[track_caller]
    pub fn view<'a>(self, i: u32) -> &'a T {
        #[cfg(target_arch = "nvptx64")]
        {
            let align = 1u64 << (size_of::<T>() as u64 | 16).trailing_zeros();
            let address = self.address(i);
            // SAFETY: the launch gave an aligned array that holds element `i` and that nobody writes; address spaces
            // coincide: a global address is a generic one.
            unsafe {
                core::hint::assert_unchecked(address % align == 0);
                &*core::ptr::with_exposed_provenance(address as usize)
            }
        }
        #[cfg(not(target_arch = "nvptx64"))]
        lane::view_global(self.address(i))
    }
}
