//! Where a thread stands: CTA, grid, warp, lane. One special register each.

#[cfg(target_arch = "nvptx64")]
use core::arch::nvptx;

#[cfg(not(target_arch = "nvptx64"))]
use crate::emu::lane;

/// Lanes of a warp.
pub const WARP: u32 = 32;

macro_rules! index {
    ($(#[$meta:meta])* $name:ident, $nvptx:ident, $host:expr $(, played $word:expr)?) => {
        twin! {
            $(#[$meta])*
            pub fn $name() -> u32 {
                ptx {
                    // What is played answers in the place of the launch.
                    $(
                        #[cfg(entries_of = "step")]
                        return {
                            use super::play::word::*;
                            get($word)
                        };
                    )?
                    // SAFETY: reads a special register.
                    #[allow(unreachable_code)] // in the module of the step
                    unsafe { nvptx::$nvptx() as u32 }
                }
                host { $host }
            }
        }
    };
}

twin! {
    /// Thread in its CTA.
    pub fn thread_idx_x() -> u32 {
        ptx {
            // SAFETY: reads a special register.
            #[cfg(not(entries_of = "step"))]
            unsafe {
                nvptx::_thread_idx_x() as u32
            }
            // Where many kernels are one, LLVM would compute all that follows from it at the start, for all of them, and
            // keep it; what it does not know to be the same every time stays where it is.
            #[cfg(entries_of = "step")]
            {
                let thread: u32;
                // SAFETY: reads a special register.
                unsafe {
                    core::arch::asm!("mov.u32 {},%tid.x;", out(reg32) thread, options(nomem, nostack, preserves_flags))
                }
                thread
            }
        }
        host { lane::thread_idx() }
    }
}

index!(/// Threads of a CTA.
    block_dim_x, _block_dim_x, lane::cta_threads(), played THREADS);
index!(/// CTA in the grid, first dimension.
    block_idx_x, _block_idx_x, lane::cta_idx()[0], played IDX);
index!(/// CTA in the grid, second dimension.
    block_idx_y, _block_idx_y, lane::cta_idx()[1], played IDX + 1);
index!(/// CTA in the grid, third dimension.
    block_idx_z, _block_idx_z, lane::cta_idx()[2], played IDX + 2);
index!(/// CTAs of the grid, first dimension.
    grid_dim_x, _grid_dim_x, lane::grid()[0], played GRID);
index!(/// CTAs of the grid, second dimension.
    grid_dim_y, _grid_dim_y, lane::grid()[1], played GRID + 1);
index!(/// CTAs of the grid, third dimension.
    grid_dim_z, _grid_dim_z, lane::grid()[2], played GRID + 2);

index!(/// CTA in the launch itself, whatever it plays.
    launch_idx, _block_idx_x, lane::launch_idx());
index!(/// CTAs of the launch itself, which has one dimension if it plays.
    launch_dim, _grid_dim_x, lane::launch_dim());

/// Lane in its warp. CTAs are one-dimensional, so it follows from the thread.
#[inline(always)]
#[track_caller]
pub fn lane_id() -> u32 {
    thread_idx_x() % WARP
}

/// Warp in its CTA.
#[inline(always)]
#[track_caller]
pub fn warp_id() -> u32 {
    thread_idx_x() / WARP
}

/// Thread in the grid's first dimension.
#[inline(always)]
#[track_caller]
pub fn index_1d() -> u32 {
    block_idx_x() * block_dim_x() + thread_idx_x()
}
