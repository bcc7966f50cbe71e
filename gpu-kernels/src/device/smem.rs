//! Shared memory: [`Smem`], a typed array at a 32-bit shared address, and `smem!`, which lays out a
//! CTA's dynamic shared memory.
//!
//! Generic pointers into shared memory would stay generic (slow) in PTX, so there are none.

use core::marker::PhantomData;

use super::word::Word;
#[cfg(not(target_arch = "nvptx64"))]
use crate::emu::lane;

// The dynamic shared memory of a launch. Declared here because assembly at file level reaches only the PTX of its own
// crate, which is this one.
#[cfg(target_arch = "nvptx64")]
core::arch::global_asm!(".extern .shared .align 1024 .b8 dyn_smem[];");

/// An array of `T` in shared memory.
pub struct Smem<T> {
    address: u32,
    #[cfg(not(target_arch = "nvptx64"))]
    elems: u32,
    element: PhantomData<*mut T>,
}

impl<T> Clone for Smem<T> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Smem<T> {}

impl<T> Smem<T> {
    /// The array of `elems` elements that starts at this byte of the CTA's dynamic shared memory.
    #[inline(always)]
    pub fn dynamic(offset_bytes: u32, elems: u32) -> Smem<T> {
        #[cfg(target_arch = "nvptx64")]
        {
            let _ = elems;
            let base: u32;
            // SAFETY: takes an address, touches no memory.
            unsafe {
                core::arch::asm!("mov.u32 {}, dyn_smem;", out(reg32) base, options(pure, nomem, nostack, preserves_flags))
            }
            Smem { address: base + offset_bytes, element: PhantomData }
        }
        #[cfg(not(target_arch = "nvptx64"))]
        Smem { address: lane::smem_base() + offset_bytes, elems, element: PhantomData }
    }

    /// The array without its first `elems` elements.
    #[inline(always)]
    #[track_caller]
    pub fn skip(self, elems: u32) -> Smem<T> {
        Smem {
            address: self.address + elems * size_of::<T>() as u32,
            #[cfg(not(target_arch = "nvptx64"))]
            elems: lane::remaining(self.elems, elems),
            element: PhantomData,
        }
    }

    /// The same bytes as elements of another type; the size of one is a multiple of the other's.
    #[inline(always)]
    pub fn cast<U>(self) -> Smem<U> {
        const {
            assert!(
                size_of::<U>().is_multiple_of(size_of::<T>())
                    || size_of::<T>().is_multiple_of(size_of::<U>())
            )
        };
        Smem {
            address: self.address,
            #[cfg(not(target_arch = "nvptx64"))]
            elems: self.elems * size_of::<T>() as u32 / size_of::<U>() as u32,
            element: PhantomData,
        }
    }

    /// Address of element `i` in the shared window.
    #[inline(always)]
    #[track_caller]
    pub fn address(self, i: u32) -> u32 {
        #[cfg(not(target_arch = "nvptx64"))]
        lane::check_index(i, self.elems);
        self.address + i * size_of::<T>() as u32
    }
}

impl<T: Word> Smem<T> {
    /// Element `i`.
    #[inline(always)]
    #[track_caller]
    pub fn ld(self, i: u32) -> T {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: the layout that the launch was sized by holds element `i`.
        unsafe {
            T::load_shared(self.address(i))
        }
        #[cfg(not(target_arch = "nvptx64"))]
        lane::load_shared(self.address(i))
    }

    /// [`Smem::ld`] of what nobody writes between the barriers around it: a load whose result is not needed vanishes.
    #[inline(always)]
    #[track_caller]
    pub fn ld_still(self, i: u32) -> T {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: the layout that the launch was sized by holds element `i`.
        unsafe {
            T::load_shared_still(self.address(i))
        }
        #[cfg(not(target_arch = "nvptx64"))]
        lane::load_shared(self.address(i))
    }

    /// Sets element `i`.
    #[inline(always)]
    #[track_caller]
    pub fn st(self, i: u32, value: T) {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: the layout that the launch was sized by holds element `i`.
        unsafe {
            T::store_shared(self.address(i), value)
        }
        #[cfg(not(target_arch = "nvptx64"))]
        lane::store_shared(self.address(i), value)
    }
}
