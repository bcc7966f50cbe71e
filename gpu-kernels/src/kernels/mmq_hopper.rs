//! The cut of `mmq` for Hopper (sm_90a) with up to 64 columns: a CTA multiplies 64 rows by 32 or 64 columns with `wgmma`, each
//! warpgroup a span of its own. Contract and result are `mmq`'s, bit for bit; launch and cases too (`Cut::Hopper`).
//!
//! * A CTA is persistent: it walks over the launch's tiles, column tiles first; its spans, those of one tile after those of
//!   the other, are dealt to its warpgroups in turn. A gated pair's tile has a row tile of each matrix.
//! * A warpgroup unpacks its span, lane = row, a thread four groups of a row, into core matrices in shared memory, and starts
//!   the copies of its next span: raw row tiles by bulk copies of one piece, activations by asynchronous copies into the
//!   swizzled layout, their scales beside, if there is room. No warp only copies or only unpacks: the other warpgroups'
//!   products fill the time.
//! * `wgmma` sums a group of 32 exactly for all columns while the sums of the group before are scaled and added: a conversion,
//!   a product of scales, an fma for each output and group, as `BlockFormat::dot_group` has them (one fma more for an
//!   offset). A group whose halves have scales of their own takes two products, A's other half being zeros that lie
//!   elsewhere.
//! * Where both scales are values of f16 their product, exact in f32, is one on tensor cores, too: k is the span's groups, and
//!   of A, from registers, all but one group's scales are zeros. A conversion and an fma are left for an output and group. (An
//!   activation's scale that overflows f16 gives NaN where other kernels may give an infinity.)
//! * Sums of spans are added to the tile's totals in shared memory in order: warpgroups hand the turn to each other, by a
//!   named barrier. Who adds the last span ends the tile, while the others have begun the next one.

#[cfg(any(not(target_arch = "nvptx64"), sm_90a))]
#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod gpu;
#[cfg(not(target_arch = "nvptx64"))]
mod host;
#[cfg(any(not(target_arch = "nvptx64"), sm_90a))]
#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod product;
#[cfg(any(not(target_arch = "nvptx64"), sm_90a))]
#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod stage;

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;
use quant::BlockFormat;

use super::int8_tile::{column_planes, halved, has_exact_scales, row_planes};
use crate::tile::{ROWS, SPAN_GROUPS, Tiled};
#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
use {
    crate::device::{Glb, U32x2, U32x4},
    crate::kernels::product::{Gate, Part},
    quant::formats,
};

/// Row tiles of a CTA's tile.
const ROW_TILES: usize = 2;
/// Its rows.
pub const TILE_ROWS: usize = ROW_TILES * ROWS;
/// Bytes of a span's unpacked codes.
const CODES_BYTES: u32 = (TILE_ROWS * SPAN_GROUPS * 32) as u32;
/// Bytes of zeros that stand for a half of a group.
const ZERO_BYTES: u32 = (TILE_ROWS * 16) as u32;
/// Shared memory that a CTA may have.
const MOST_BYTES: u32 = 227 << 10;
/// Warpgroups of a CTA. With four, registers would not do for products under way.
const WARPGROUPS: u32 = 3;
/// Threads of a CTA.
pub const THREADS: u32 = 128 * WARPGROUPS;
/// Spans of activations of a warpgroup.
const STAGES: u32 = 2;

/// How many columns a tile has.
pub trait Form: 'static {
    /// Columns: 32 or 64.
    const COLS: u32;
}

/// 32 columns.
#[derive(Debug)]
pub struct Few;
/// 64 columns.
#[derive(Debug)]
pub struct Many;

impl Form for Few {
    const COLS: u32 = 32;
}
impl Form for Many {
    const COLS: u32 = 64;
}

/// Bytes of a span of one raw row tile.
const fn raw_bytes<F: Tiled>() -> u32 {
    (ROWS * F::LAYOUT.span_bytes) as u32
}

/// Elements from one group of a plane of columns' floats to the next: neighbouring groups lie in other banks.
const fn column_stride<C: Form>() -> usize {
    C::COLS as usize + 4
}

/// Bytes of a span's floats of rows, and of columns. For tensor cores the f16 scales of a row's or column's groups follow
/// each other.
const fn float_bytes<F: BlockFormat, C: Form>() -> [u32; 2] {
    if has_exact_scales::<F>() {
        return [2 * (SPAN_GROUPS * TILE_ROWS) as u32, 2 * SPAN_GROUPS as u32 * C::COLS];
    }
    let (rows, columns) = (row_planes::<F>() * TILE_ROWS, column_planes::<F>() * column_stride::<C>());
    [4 * (SPAN_GROUPS * rows) as u32, 4 * (SPAN_GROUPS * columns) as u32]
}

/// Bytes of a span's activations' scales as they come, where the shared memory that a CTA may have ([`MOST_BYTES`]) has room
/// for them. Elsewhere they pass through registers.
const fn scale_bytes<F: BlockFormat + Tiled, C: Form>() -> u32 {
    let bytes = (SPAN_GROUPS as u32) * C::COLS * if F::HAS_OFFSET { 8 } else { 4 };
    if layout_with::<F, C>(bytes).bytes <= MOST_BYTES { bytes } else { 0 }
}

/// Shared memory: all warpgroups' activations at 0; where zeros lie, before and after what they are zeros for: unpacked codes
/// and floats of columns; floats of rows; totals; where columns start; scales; barriers; raw row tiles.
#[cfg_attr(
    not(any(target_arch = "nvptx64", feature = "emu")),
    expect(dead_code, reason = "a host that only launches needs the whole alone")
)]
struct Layout {
    zeros_before: u32,
    a: u32,
    column_floats: u32,
    zeros_after: u32,
    row_floats: u32,
    totals: u32,
    starts: u32,
    scales: u32,
    barriers: u32,
    raw: u32,
    bytes: u32,
}

const fn layout<F: BlockFormat + Tiled, C: Form>() -> Layout {
    layout_with::<F, C>(scale_bytes::<F, C>())
}

const fn layout_with<F: BlockFormat + Tiled, C: Form>(scale_bytes: u32) -> Layout {
    let n = WARPGROUPS;
    let [rows, columns] = float_bytes::<F, C>();
    let zeros_before = n * STAGES * C::COLS * 256;
    // Only halves of groups have zeros before them.
    let a = zeros_before + if halved::<F>() { ZERO_BYTES } else { 0 };
    let column_floats = a + n * CODES_BYTES;
    let zeros_after = column_floats + n * columns;
    let row_floats = zeros_after + ZERO_BYTES;
    let totals = row_floats + n * rows;
    let starts = totals + 4 * TILE_ROWS as u32 * C::COLS;
    let scales = starts + 4 * n * C::COLS;
    let barriers = scales + n * scale_bytes;
    let raw = barriers + 64;
    let bytes = raw + n * ROW_TILES as u32 * raw_bytes::<F>();
    Layout {
        zeros_before,
        a,
        column_floats,
        zeros_after,
        row_floats,
        totals,
        starts,
        scales,
        barriers,
        raw,
        bytes,
    }
}

/// Shared memory of a CTA.
pub const fn bytes<F: BlockFormat + Tiled, C: Form>() -> u32 {
    layout::<F, C>().bytes
}

/// Entries of every format that models use for weights.
macro_rules! entries {
    ($($id:ident => $module:ident,)*) => {
        #[cfg(any(not(target_arch = "nvptx64"), sm_90a))]
        #[cfg(any(target_arch = "nvptx64", feature = "emu"))]
        kernels! {
            in "mmq_hopper";
            pub(super) ENTRIES: threads(384, 1), early;
            fn (
                p0: Part, p1: Part, p2: Part, q: Glb<U32x4>, scales: Glb<U32x2>, order: Glb<u32>, tiles: Glb<U32x4>,
                gate: Gate, shape: gpu::Shape,
            );
            $(
                concat!("mmq_hopper_", stringify!($id), "_n32") => gpu::mmq::<formats::$module::Block, Few>;
                concat!("mmq_hopper_", stringify!($id), "_n64") => gpu::mmq::<formats::$module::Block, Many>;
            )*
        }
    };
}
for_each_weight_format!(entries);
