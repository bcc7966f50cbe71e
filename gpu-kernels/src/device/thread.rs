//! Where a thread stands: CTA, grid, warp, lane. One special register each.

#[cfg(target_arch = "nvptx64")]
use core::arch::nvptx;

#[cfg(not(target_arch = "nvptx64"))]
use crate::emu::lane;

/// Lanes of a warp.
pub const WARP: u32 = 32;

macro_rules! index {
    ($(#[$meta:meta])* $name:ident, $nvptx:ident, $host:expr) => {
        twin! {
            $(#[$meta])*
            pub fn $name() -> u32 {
                ptx {
                    // SAFETY: reads a special register.
                    unsafe { nvptx::$nvptx() as u32 }
                }
                host { $host }
            }
        }
    };
}

index!(/// Thread in its CTA.
    thread_idx_x, _thread_idx_x, lane::thread_idx());
index!(/// Threads of a CTA.
    block_dim_x, _block_dim_x, lane::cta_threads());
index!(/// CTA in the grid, first dimension.
    block_idx_x, _block_idx_x, lane::cta_idx()[0]);
index!(/// CTA in the grid, second dimension.
    block_idx_y, _block_idx_y, lane::cta_idx()[1]);
index!(/// CTA in the grid, third dimension.
    block_idx_z, _block_idx_z, lane::cta_idx()[2]);
index!(/// CTAs of the grid, first dimension.
    grid_dim_x, _grid_dim_x, lane::grid()[0]);
index!(/// CTAs of the grid, second dimension.
    grid_dim_y, _grid_dim_y, lane::grid()[1]);
index!(/// CTAs of the grid, third dimension.
    grid_dim_z, _grid_dim_z, lane::grid()[2]);

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
