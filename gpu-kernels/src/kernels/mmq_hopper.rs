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

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;
use quant::BlockFormat;

use super::int8_tile::{column_planes, has_exact_scales, row_planes};
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
/// Spans of activations of a warpgroup.
const STAGES: u32 = 2;

/// How many columns a tile has.
pub trait Form: 'static {
    /// Columns: 32 or 64.
    const COLS: u32;
    /// Warpgroups of a CTA. With four, registers would not do for products under way.
    const WARPGROUPS: u32;
}

/// 32 columns.
#[derive(Debug)]
pub struct Few;
/// 64 columns.
#[derive(Debug)]
pub struct Many;

impl Form for Few {
    const COLS: u32 = 32;
    const WARPGROUPS: u32 = 3;
}
impl Form for Many {
    const COLS: u32 = 64;
    const WARPGROUPS: u32 = 3;
}

/// Threads of a CTA.
pub const fn threads<C: Form>() -> u32 {
    128 * C::WARPGROUPS
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
    let n = C::WARPGROUPS;
    let [rows, columns] = float_bytes::<F, C>();
    let zeros_before = n * STAGES * C::COLS * 256;
    // Only halves of groups have zeros before them.
    let a = zeros_before + if F::SCALE_ELEMS == 16 { ZERO_BYTES } else { 0 };
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

#[cfg(any(not(target_arch = "nvptx64"), sm_90a))]
#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod gpu {
    use core::marker::PhantomData;

    use super::*;
    use crate::device::mma::FragmentA;
    use crate::device::sync::{self, Mbarrier};
    use crate::device::wgmma::{self, F16N32, Operand, Registers, S8N32, S8N64, Sums};
    use crate::device::{F32x2, F32x4, Smem, async_copy, bulk_copy, grid, math, thread, warp};
    use crate::kernels::int8_tile;
    use crate::kernels::mmq::{Columns, Work, group, groups_of, units_of};
    use crate::kernels::mmq_wide::load_row;
    use crate::kernels::product::choose_at;
    use crate::kernels::quantise_act::ActScale;

    /// 16-byte chunks of a chunk of k of all rows: core matrices below each other.
    const PLANE: u32 = TILE_ROWS as u32;
    /// Columns whose sums are scaled at a time.
    const HALF: u32 = 32;

    /// Whether the halves of a group have scales of their own.
    const fn halved<F: BlockFormat>() -> bool {
        F::SCALE_ELEMS == 16
    }

    /// Products per group: one, or one for each half.
    const fn steps<F: BlockFormat>() -> u32 {
        1 + halved::<F>() as u32
    }

    /// What the parts have in common.
    #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
    #[repr(C)]
    pub(super) struct Shape {
        n_groups: u32,
        n_cols: u32,
        /// In a mixture: pairs that share a row of activations.
        pairs_per_x: u32,
        /// Tiles of columns, and all tiles.
        n_across: u32,
        n_items: u32,
    }

    /// A warpgroup's sums of a group of 64 rows, of all columns.
    pub(super) trait Products: Registers + Copy {
        fn zero() -> Self;
        fn start(&mut self, a: Operand, b: Operand);
        fn sum(&self, i: usize) -> f32;
    }

    macro_rules! products {
        ($r:literal, $shape:ident) => {
            impl Products for Sums<$r> {
                #[inline(always)]
                fn zero() -> Self {
                    Sums::zero()
                }

                #[inline(always)]
                #[track_caller]
                fn start(&mut self, a: Operand, b: Operand) {
                    $shape::shared::<false>(self, a, b);
                }

                #[inline(always)]
                #[track_caller]
                fn sum(&self, i: usize) -> f32 {
                    self.get(i) as i32 as f32
                }
            }
        };
    }
    products!(16, S8N32);
    products!(32, S8N64);

    /// [`Form`] with the sums of a warpgroup.
    pub(super) trait Summed: Form {
        type Sums: Products;
    }
    impl Summed for Few {
        type Sums = Sums<16>;
    }
    impl Summed for Many {
        type Sums = Sums<32>;
    }

    /// A span of a tile.
    #[derive(Clone, Copy)]
    struct Item {
        tile: u32,
        span: u32,
    }

    /// What a launch does.
    struct Launch {
        parts: [Part; 3],
        q: Glb<U32x4>,
        scales: Glb<U32x2>,
        order: Glb<u32>,
        tiles: Glb<U32x4>,
        gate: Gate,
        shape: Shape,
        n_spans: u32,
    }

    impl Launch {
        #[inline(always)]
        #[track_caller]
        fn columns(&self, tile: u32, cols: u32) -> Columns {
            let Shape { n_cols, pairs_per_x, n_across, .. } = self.shape;
            Columns::at(self.order, self.tiles, n_cols, pairs_per_x, cols, tile % n_across)
        }

        /// A tile's work.
        #[inline(always)]
        #[track_caller]
        fn work(&self, tile: u32, cols: u32) -> Work {
            let down = tile / self.shape.n_across;
            let [p0, p1, p2] = self.parts;
            let part = choose_at(p0, p1, p2, down);
            let row_tiles = if self.gate.is_some() { 1 } else { ROW_TILES as u32 };
            Work {
                part,
                up: p1,
                gate: self.gate,
                cta: down - part.first_cta,
                row_tiles,
                q: self.q,
                scales: self.scales,
                n_groups: self.shape.n_groups,
                columns: self.columns(tile, cols),
            }
        }

        #[inline(always)]
        fn is_there(&self, item: Item) -> bool {
            item.tile < self.shape.n_items
        }

        /// The tile from `tile` on, of this CTA's, that has columns.
        #[inline(always)]
        #[track_caller]
        fn not_empty(&self, mut tile: u32, cols: u32) -> u32 {
            while !self.tiles.is_null() && tile < self.shape.n_items && self.columns(tile, cols).n == 0 {
                tile += thread::grid_dim_x();
            }
            tile
        }

        /// The item that is `n` further on.
        #[inline(always)]
        #[track_caller]
        fn skip(&self, mut item: Item, n: u32, cols: u32) -> Item {
            item.span += n;
            while item.span >= self.n_spans && self.is_there(item) {
                item.span -= self.n_spans;
                item.tile = self.not_empty(item.tile + thread::grid_dim_x(), cols);
            }
            item
        }
    }

    /// A warpgroup of the CTA.
    struct Warpgroup<'a, F, C> {
        launch: &'a Launch,
        /// Number in the CTA.
        thread: u32,
        form: PhantomData<(F, C)>,
    }

    /// Where a span's operands are.
    #[derive(Clone, Copy)]
    struct At {
        /// The first group's codes.
        a: Operand,
        b: Operand,
        /// For tensor cores: scales of the columns, and of the thread's two rows those of the groups that are its.
        column_scales: Operand,
        row_scales: [u32; 2],
        /// Else floats of the thread's rows, and of its first columns.
        rows: Smem<F32x2>,
        columns: Smem<F32x4>,
        /// First group.
        j: u32,
    }

    /// Floats of the thread's rows and, of 32 columns, of its own.
    struct Floats {
        rows: [[f32; 2]; 4],
        columns: [[[f32; 4]; 2]; 3],
    }

    impl<F: BlockFormat + Tiled, C: Summed> Warpgroup<'_, F, C> {
        const CODES: u32 = CODES_BYTES / 16;
        /// Chunks of 128 of k of all columns, and of a span of a warpgroup.
        const PANEL: u32 = C::COLS * 8;
        const STAGE: u32 = 2 * Self::PANEL;

        /// Number of the thread in the warpgroup. Registers are short: what follows from it is computed in each phase anew.
        #[inline(always)]
        fn thread(&self) -> u32 {
            math::fresh(self.thread) % 128
        }

        /// Number of the warpgroup.
        #[inline(always)]
        fn id(&self) -> u32 {
            math::fresh(self.thread) / 128
        }

        /// All that tensor cores read, in chunks.
        #[inline(always)]
        fn operands() -> Smem<U32x4> {
            Smem::dynamic(0, const { layout::<F, C>().zeros_after + ZERO_BYTES } / 16)
        }

        /// Chunk of the first of the codes.
        #[inline(always)]
        fn a(&self) -> u32 {
            self.id() * Self::CODES + const { layout::<F, C>().a / 16 }
        }

        #[inline(always)]
        fn stage(&self, stage: u32) -> u32 {
            (self.id() * STAGES + stage) * Self::STAGE
        }

        #[inline(always)]
        fn row_floats(&self) -> Smem<f32> {
            let n = const { float_bytes::<F, C>()[0] };
            Smem::dynamic(const { layout::<F, C>().row_floats } + self.id() * n, n / 4)
        }

        #[inline(always)]
        fn column_floats(&self) -> Smem<f32> {
            let n = const { float_bytes::<F, C>()[1] };
            Smem::dynamic(const { layout::<F, C>().column_floats } + self.id() * n, n / 4)
        }

        /// The tile's totals, as the threads' registers lie.
        #[inline(always)]
        fn totals() -> Smem<F32x4> {
            Smem::dynamic(const { layout::<F, C>().totals }, TILE_ROWS as u32 * C::COLS / 4)
        }

        /// First chunks of the columns; those eight apart are neighbours.
        #[inline(always)]
        fn starts(&self) -> Smem<u32> {
            Smem::dynamic(const { layout::<F, C>().starts } + 4 * C::COLS * self.id(), C::COLS)
        }

        /// Scales of a span as they come, in the order of the threads that copy them.
        #[inline(always)]
        fn scales(&self) -> Smem<u32> {
            let n = const { scale_bytes::<F, C>() };
            Smem::dynamic(const { layout::<F, C>().scales } + self.id() * n, n / 4)
        }

        /// Which scales the thread copies: a group, and of every eighth column from the first on `C::COLS / 16`.
        #[inline(always)]
        fn of_scales(&self) -> (u32, u32) {
            let thread = self.thread();
            (thread % 8, thread / 8 % 8 + thread / 64 * (C::COLS / 2))
        }

        #[inline(always)]
        fn raw(&self) -> Smem<u32> {
            let n = ROW_TILES as u32 * raw_bytes::<F>();
            Smem::dynamic(const { layout::<F, C>().raw } + self.id() * n, n / 4)
        }

        /// Ends its phase when a span of the raw row tiles is there.
        #[inline(always)]
        #[track_caller]
        fn raw_full(&self) -> Mbarrier {
            Mbarrier::at(Smem::dynamic(const { layout::<F, C>().barriers }, 8), self.id())
        }

        /// Waits for the warpgroup.
        #[inline(always)]
        #[track_caller]
        fn meet(&self) {
            sync::barrier_of(1 + self.id(), 128);
        }

        /// The named barrier at which a warpgroup waits for its turn.
        #[inline(always)]
        fn turn(id: u32) -> u32 {
            1 + C::WARPGROUPS + id
        }

        /// Whether the thread asks for a row tile.
        #[inline(always)]
        fn asks(&self) -> bool {
            let thread = self.thread();
            thread < 32 * ROW_TILES as u32 && thread.is_multiple_of(32)
        }

        /// Where the row tile of a tile starts that the thread's warp asks for. Beyond the last row the last row tile again; its
        /// outputs are not stored.
        #[inline(always)]
        #[track_caller]
        fn row_tile(&self, work: &Work) -> Glb<u8> {
            let slot = self.thread() / 32 % ROW_TILES as u32;
            let gated = work.gate.is_some();
            let w = if gated && slot == 1 { work.up.w } else { work.part.w };
            let tile = if gated { work.cta } else { work.row_tiles * work.cta + slot };
            let n_tiles = work.part.n_rows.div_ceil(ROWS as u32);
            w.offset(work.tile_at::<F>(if tile < n_tiles { tile } else { n_tiles - 1 }))
        }

        /// Bytes of a span of a row tile.
        #[inline(always)]
        fn span_bytes(&self, span: u32) -> u32 {
            units_of::<F>(span, self.launch.shape.n_groups) * (ROWS * F::LAYOUT.unit_bytes) as u32
        }

        /// Asks L2 for a span of the warp's row tile `w`.
        #[inline(always)]
        #[track_caller]
        fn prefetch(&self, w: Glb<u8>, span: u32) {
            if self.asks() {
                w.offset(F::LAYOUT.span_offset(span as usize)).prefetch(self.span_bytes(span));
            }
        }

        /// Begins a tile: where its columns' activations start; returns the warp's row tile.
        #[inline(always)]
        #[track_caller]
        fn begin(&self, tile: u32) -> Glb<u8> {
            let work = self.launch.work(tile, C::COLS);
            let thread = self.thread();
            if thread < C::COLS {
                let place = thread % 8 * (C::COLS / 8) + thread / 8;
                self.starts().st(place, 2 * work.columns.input(thread) * work.n_groups);
            }
            self.meet();
            self.row_tile(&work)
        }

        /// Starts the copies of a span of the tile that was begun last, whose row tile is `w`; returns the thread's scales of
        /// activations if they are not copied.
        #[inline(always)]
        #[track_caller]
        fn start(&self, w: Glb<u8>, span: u32, stage: u32) -> [U32x2; 4] {
            let n_groups = self.launch.shape.n_groups;
            if self.asks() {
                let bytes = self.span_bytes(span);
                let source = w.offset(F::LAYOUT.span_offset(span as usize)).cast::<U32x4>();
                self.raw_full().arrive_expect(bytes);
                let target = self.thread() / 32 * (raw_bytes::<F>() / 16);
                bulk_copy::copy(self.raw().cast(), target, source, 0, bytes / 16, self.raw_full());
                if span + C::WARPGROUPS < self.launch.n_spans {
                    self.prefetch(w, span + C::WARPGROUPS);
                }
            }

            // Scales: eight threads a column.
            let first = span * SPAN_GROUPS as u32;
            let mut acts = [U32x2([0; 2]); 4];
            let (j, column) = self.of_scales();
            let there = first + j < n_groups;
            let source = self.launch.scales.offset((first + j) as usize);
            let place = column % 8 * (C::COLS / 8) + column / 8;
            let [mut starts, mut more] = [[0; 4]; 2];
            if C::COLS == 32 {
                [starts[0], starts[1]] = self.starts().cast::<U32x2>().ld(place / 2).0;
            } else {
                starts = self.starts().cast::<U32x4>().ld(place / 4).0;
            }
            unroll!(I in 0..4 {
                if 16 * (I as u32) < C::COLS {
                    let source = source.cast::<u32>().offset(starts[I] as usize);
                    let target = self.thread() + 128 * I as u32;
                    match const { (scale_bytes::<F, C>() != 0, F::HAS_OFFSET) } {
                        (true, false) => async_copy::copy_or_zero(self.scales(), target, source, 0, there),
                        (true, true) => {
                            async_copy::copy_or_zero(self.scales().cast::<U32x2>(), target, source.cast(), 0, there);
                        }
                        (false, false) if there => acts[I].0[0] = source.ld_nc(0),
                        (false, true) if there => acts[I] = source.cast().ld_nc(0),
                        _ => {}
                    }
                }
            });

            // Codes: sixteen threads a column.
            let thread = self.thread();
            let (chunk, column) = (thread % 16, thread / 16);
            let target = self.stage(stage) + chunk / 8 * Self::PANEL + Operand::place(column, chunk % 8);
            if chunk < 2 * groups_of(span, n_groups) {
                let source = self.launch.q.offset((2 * first + chunk) as usize);
                let places = self.starts().cast::<U32x4>().skip(column * (C::COLS / 32));
                starts = places.ld(0).0;
                if C::COLS == 64 {
                    more = places.ld(1).0;
                }
                unroll!(I in 0..8 {
                    if 8 * (I as u32) < C::COLS {
                        let start = [starts, more][I / 4][I % 4];
                        async_copy::copy16(Self::operands(), target + 64 * I as u32, source, start);
                    }
                });
            }
            async_copy::commit();
            acts
        }

        /// Unpacks half `H` of the span's groups of the thread's row.
        #[inline(always)]
        #[track_caller]
        fn unpack<const H: usize>(&self, span: u32) {
            let row = self.thread() % TILE_ROWS as u32;
            let raw = row / ROWS as u32 * raw_bytes::<F>();
            let units = units_of::<F>(span, self.launch.shape.n_groups);
            let words = match F::LAYOUT.unit_bytes {
                16 => load_row::<F, U32x4>(self.raw().cast(), raw, units),
                8 => load_row::<F, U32x2>(self.raw().cast(), raw, units),
                _ => load_row::<F, u32>(self.raw(), raw, units),
            };
            let a = self.a() + row;
            let floats = self.row_floats();
            let mut scales = [0.0; 4];
            unroll!(J in 0..4 {
                let j = 4 * H + J;
                let group = group::<F>(&words, j);
                let codes = int8_tile::signed_codes::<F>(&group);
                let [low, high] = [0, 4].map(|i: usize| U32x4([codes[i], codes[i + 1], codes[i + 2], codes[i + 3]]));
                Self::operands().st(a + 2 * j as u32 * PLANE, low);
                Self::operands().st(a + (2 * j + 1) as u32 * PLANE, high);
                if const { has_exact_scales::<F>() } {
                    scales[J] = group.scale[0];
                } else {
                    int8_tile::put_floats::<F, SPAN_GROUPS, TILE_ROWS>(floats, row, j as u32, &group);
                }
            });
            if const { has_exact_scales::<F>() } {
                let pair = |i: usize| math::pack_f16(scales[i], scales[i + 1]);
                floats.cast::<U32x2>().st(2 * row + H as u32, U32x2([pair(0), pair(2)]));
            }
        }

        /// Stores the scales that [`Self::start`] loaded or that its copies, which have ended, have brought.
        #[inline(always)]
        #[track_caller]
        fn put_columns(&self, acts: [U32x2; 4]) {
            let (thread, lane) = (self.thread(), thread::lane_id());
            let is_copied = const { scale_bytes::<F, C>() != 0 };
            let (j, column) = self.of_scales();
            let floats = self.column_floats();
            if is_copied && const { has_exact_scales::<F>() } {
                // Four neighbouring groups of a column that the warp's other lanes have copied.
                warp::sync_warp();
                if lane < C::COLS / 2 {
                    let at = (thread / 32 * 32 + lane / 8 * 128 + lane % 8 * 4) / 4;
                    let F32x4(d) = self.scales().cast::<F32x4>().ld(at);
                    let column =
                        thread / 32 % 2 * 4 + lane % 8 / 2 + 8 * (thread / 64 * (C::COLS / 16) + lane / 8);
                    let pair = |i: usize| math::pack_f16(d[i], d[i + 1]);
                    floats.cast::<U32x2>().st(2 * column + lane % 2, U32x2([pair(0), pair(2)]));
                }
                return;
            }
            unroll!(I in 0..4 {
                if 16 * (I as u32) < C::COLS {
                    let place = thread + 128 * I as u32;
                    let U32x2([d, extra]) = match const { (scale_bytes::<F, C>() != 0, F::HAS_OFFSET) } {
                        (true, false) => U32x2([self.scales().ld(place), 0]),
                        (true, true) => self.scales().cast::<U32x2>().ld(place),
                        _ => acts[I],
                    };
                    let act = ActScale { d: f32::from_bits(d), extra };
                    let column = column + 8 * I as u32;
                    if const { has_exact_scales::<F>() } {
                        floats.cast::<u16>().st(SPAN_GROUPS as u32 * column + j, math::pack_f16(act.d, 0.0) as u16);
                    } else if C::COLS == 32 {
                        int8_tile::put_column::<F, SPAN_GROUPS, 36>(floats, column_place(column), j, act);
                    } else {
                        int8_tile::put_column::<F, SPAN_GROUPS, 68>(floats, column_place(column), j, act);
                    }
                }
            });
        }

        /// Starts the sums of step `step` from the place on: a group, or one half of it.
        #[inline(always)]
        #[track_caller]
        fn start_sums(&self, sums: &mut C::Sums, at: &At, step: u32) {
            let (j, half) = (at.j + step / steps::<F>(), step % steps::<F>());
            let a = if halved::<F>() {
                let codes = self.a() + 2 * j * PLANE;
                let zeros = const { [layout::<F, C>().zeros_before / 16, layout::<F, C>().zeros_after / 16] };
                let (first, second) = if half == 0 { (codes, zeros[1]) } else { (zeros[0], codes + PLANE) };
                Operand::planes(Self::operands(), first, second - first)
            } else {
                at.a.step(2 * j * PLANE)
            };
            sums.start(a, at.b.step(j / 4 * Self::PANEL + j % 4 * 2));
            wgmma::commit();
        }

        /// What of the rows' scales products of group `step` from the place on take. Made before the fence: registers that are
        /// written behind it ptxas would have to fence again.
        #[inline(always)]
        fn row_scales(at: &At, step: u32) -> FragmentA {
            let j = at.j + step;
            let mask = if thread::lane_id() % 4 == j / 2 { 0xffff << (16 * (j % 2)) } else { 0 };
            let [first, second] = at.row_scales;
            FragmentA([first & mask, second & mask, 0, 0].map(math::fresh))
        }

        /// Starts the products of the scales of a group with half of the columns.
        #[inline(always)]
        #[track_caller]
        fn start_scales(scales: &mut Sums<16>, at: &At, rows: FragmentA, half: u32) {
            F16N32::registers::<false>(scales, rows, at.column_scales.step(HALF * half));
            wgmma::commit();
        }

        /// The floats of a step for half of the columns.
        #[inline(always)]
        #[track_caller]
        fn floats(&self, at: &At, step: u32, half: u32) -> Floats {
            let (j, step) = (at.j + step / steps::<F>(), step % steps::<F>());
            let mut floats = Floats { rows: [[0.0; 2]; 4], columns: [[[0.0; 4]; 2]; 3] };
            let row = |plane: u32| at.rows.ld((plane * SPAN_GROUPS as u32 + j) * (TILE_ROWS as u32 / 2)).0;
            let stride = const { column_stride::<C>() as u32 / 4 };
            let column = |plane: u32| {
                let first = (plane * SPAN_GROUPS as u32 + j) * stride + half * (HALF / 4);
                [at.columns.ld(first).0, at.columns.ld(first + 4).0]
            };
            floats.rows[0] = row(step);
            floats.columns[0] = column(0);
            if F::HAS_OFFSET && step + 1 == steps::<F>() {
                floats.rows[2] = row(steps::<F>());
                floats.columns[1] = column(1);
                if halved::<F>() {
                    floats.rows[3] = row(steps::<F>() + 1);
                    floats.columns[2] = column(2);
                }
            }
            floats
        }

        /// Scales the sums of a step with half of the columns and adds them.
        #[inline(always)]
        #[track_caller]
        fn fold(
            acc: &mut [f32; 16],
            sums: &C::Sums,
            scales: &Sums<16>,
            floats: &Floats,
            step: u32,
            half: usize,
        ) {
            let with_offset = F::HAS_OFFSET && step % steps::<F>() + 1 == steps::<F>();
            let Floats { rows, columns } = floats;
            unroll!(Q in 0..2 { unroll!(E in 0..8 {
                let (r, c) = (E / 2 % 2, E / 4 * 2 + E % 2);
                let scale = if const { has_exact_scales::<F>() } {
                    f32::from_bits(scales.get(8 * Q + E))
                } else {
                    math::mul(rows[0][r], columns[0][Q][c])
                };
                let out = &mut acc[8 * Q + E];
                *out = math::fma(scale, sums.sum(16 * half + 8 * Q + E), *out);
                if with_offset {
                    *out = math::fma(rows[2][r], columns[1][Q][c], *out);
                    if halved::<F>() {
                        *out = math::fma(rows[3][r], columns[2][Q][c], *out);
                    }
                }
            }); });
        }

        /// Adds the products of `STEPS` steps. While those of one step are scaled and added, the tensor cores sum the next
        /// one's; no product is under way at the end, since ptxas follows them through straight code only.
        #[inline(always)]
        #[track_caller]
        fn add_products<const STEPS: usize>(&self, acc: &mut [[f32; 16]; 2], at: &At) {
            let exact = const { has_exact_scales::<F>() };
            let halves = const { (C::COLS / HALF) as usize };
            let mut sums = [C::Sums::zero(); 2];
            let mut scales = [Sums::<16>::zero(); 2];
            let rows = if exact { Self::row_scales(at, 0) } else { FragmentA([0; 4]) };
            wgmma::fence();
            self.start_sums(&mut sums[0], at, 0);
            if exact {
                Self::start_scales(&mut scales[0], at, rows, 0);
            }
            unroll!(S in 0..8 {
                if S < STEPS {
                    unroll!(H in 0..2 {
                        if H < halves {
                            let unit = S * halves + H;
                            let (mut under_way, next) = (0, unit + 1);
                            let (step, half) = ((next / halves) as u32, (next % halves) as u32);
                            let more = next < STEPS * halves;
                            let rows = if exact && more { Self::row_scales(at, step) } else { FragmentA([0; 4]) };
                            if exact && more || S + 1 < STEPS && H == 0 {
                                wgmma::fence();
                            }
                            if exact && more {
                                Self::start_scales(&mut scales[next % 2], at, rows, half);
                                under_way += 1;
                            }
                            if S + 1 < STEPS {
                                if H == 0 {
                                    self.start_sums(&mut sums[(S + 1) % 2], at, S as u32 + 1);
                                }
                                under_way += 1;
                            }
                            let floats = if exact {
                                Floats { rows: [[0.0; 2]; 4], columns: [[[0.0; 4]; 2]; 3] }
                            } else {
                                self.floats(at, S as u32, H as u32)
                            };
                            // What has been started last is under way still.
                            if H == 0 {
                                wait(&mut sums[S % 2], under_way);
                            }
                            if exact {
                                wait(&mut scales[unit % 2], under_way);
                            }
                            Self::fold(&mut acc[H], &sums[S % 2], &scales[unit % 2], &floats, S as u32, H);
                        }
                    });
                }
            });
        }

        /// The sums of a span.
        #[inline(always)]
        #[track_caller]
        fn multiply(&self, span: u32, stage: u32) -> [[f32; 16]; 2] {
            let (lane, warp) = (thread::lane_id(), self.thread() / 32);
            // Of 32 rows, those eight apart are neighbours.
            let row = (warp / 2 * 32 + lane / 4 * 4 + warp % 2 * 2) / 2;
            let mut at = At {
                a: Operand::planes(Self::operands(), self.a(), PLANE),
                b: Operand::at(Self::operands(), self.stage(stage)),
                column_scales: Operand::NONE,
                row_scales: [0; 2],
                rows: self.row_floats().cast::<F32x2>().skip(row),
                columns: self.column_floats().cast::<F32x4>().skip(lane % 4),
                j: 0,
            };
            if const { has_exact_scales::<F>() } {
                let columns = const { float_bytes::<F, C>()[1] };
                let scales = const { layout::<F, C>().column_floats / 16 } + self.id() * (columns / 16);
                let zeros = const { layout::<F, C>().zeros_after / 16 };
                at.column_scales = Operand::planes(Self::operands(), scales, zeros - scales);
                let of_rows = self.row_floats().cast::<u32>().skip(lane % 4);
                let row = 16 * warp + lane / 4;
                at.row_scales = [of_rows.ld(4 * row), of_rows.ld(4 * (row + 8))];
            }
            let mut acc = [[0.0f32; 16]; 2];
            let there = groups_of(span, self.launch.shape.n_groups);
            if there == SPAN_GROUPS as u32 {
                while at.j < SPAN_GROUPS as u32 {
                    self.add_products::<8>(&mut acc, &at);
                    at.j += 8 / steps::<F>();
                }
            } else {
                while at.j < there {
                    if halved::<F>() {
                        self.add_products::<2>(&mut acc, &at);
                    } else {
                        self.add_products::<1>(&mut acc, &at);
                    }
                    at.j += 1;
                }
            }
            acc
        }

        /// Adds a span's sums to the totals, unless it is the first; leaves them there, unless it is the last.
        #[inline(always)]
        #[track_caller]
        fn add_span(&self, acc: &mut [[f32; 16]; 2], span: u32) {
            let totals = Self::totals().skip(self.thread());
            let is_last = span + 1 == self.launch.n_spans;
            if span != 0 {
                let mut before = [F32x4([0.0; 4]); 8];
                unroll!(Q in 0..8 {
                    if 8 * (Q as u32) < C::COLS {
                        before[Q] = totals.ld(128 * Q as u32);
                    }
                });
                unroll!(Q in 0..8 {
                    if 8 * (Q as u32) < C::COLS {
                        unroll!(E in 0..4 {
                            let sum = &mut acc[Q / 4][Q % 4 * 4 + E];
                            *sum += before[Q].0[E];
                        });
                    }
                });
            }
            if !is_last {
                unroll!(Q in 0..8 {
                    if 8 * (Q as u32) < C::COLS {
                        let mut sums = [0.0; 4];
                        unroll!(E in 0..4 { sums[E] = acc[Q / 4][Q % 4 * 4 + E]; });
                        totals.st(128 * Q as u32, F32x4(sums));
                    }
                });
            }
        }

        /// Ends a tile, whose totals are `acc`.
        #[inline(always)]
        #[track_caller]
        fn finish(&self, tile: u32, acc: &[[f32; 16]; 2]) {
            // Where the codes were: by now nobody reads them. Rows of a column, in pieces of eight that are permuted by the
            // column.
            let finished = Smem::<f32>::dynamic(16 * self.a(), CODES_BYTES / 4);
            let place = |column: u32, row: u32| column * TILE_ROWS as u32 + (row ^ (column / 2 % 4 * 8));
            let (lane, thread) = (thread::lane_id(), self.thread());
            let warp = thread / 32;
            unroll!(Q in 0..8 {
                if 8 * (Q as u32) < C::COLS {
                    unroll!(E in 0..4 {
                        let column = 8 * Q as u32 + 2 * (lane % 4) + (E % 2) as u32;
                        let row = 16 * warp + lane / 4 + (E / 2 * 8) as u32;
                        finished.st(place(column, row), acc[Q / 4][Q % 4 * 4 + E]);
                    });
                }
            });
            self.meet();
            let work = self.launch.work(tile, C::COLS);
            let gated = work.gate.is_some();
            let rows = if gated { ROWS } else { TILE_ROWS } as u32;
            let (row, step) = (thread % rows, 128 / rows);
            let output_row = work.cta * rows + row;
            if output_row < work.part.n_rows {
                let mut column = thread / rows;
                while column < work.columns.n {
                    // Four loads under way at a time.
                    let (mut lines, mut residuals) = ([0; 4], [0.0; 4]);
                    unroll!(I in 0..4 {
                        let column = column + I as u32 * step;
                        if column < work.columns.n {
                            lines[I] = work.columns.output(column);
                            residuals[I] = work.part.residual(lines[I], output_row);
                        }
                    });
                    unroll!(I in 0..4 {
                        let column = column + I as u32 * step;
                        if column < work.columns.n {
                            let sum = finished.ld(place(column, row));
                            let up = if gated { finished.ld(place(column, row + ROWS as u32)) } else { 0.0 };
                            let (expert, line) = (work.columns.expert, lines[I]);
                            let sums = [sum, up];
                            work.part.finish_with(work.gate, work.up, expert, line, output_row, sums, residuals[I]);
                        }
                    });
                    column += 4 * step;
                }
            }
            self.meet();
        }

        /// What the warpgroup does.
        #[inline(always)]
        #[track_caller]
        fn run(&self) {
            let launch = self.launch;
            let first = Item { tile: launch.not_empty(thread::block_idx_x(), C::COLS), span: 0 };
            let mut item = launch.skip(first, self.id(), C::COLS);
            let (mut acts, mut w) = ([U32x2([0; 2]); 4], launch.parts[0].w);
            if launch.is_there(item) {
                w = self.begin(item.tile);
                acts = self.start(w, item.span, 0);
            }
            // Of all the CTA's items the first has nobody to wait for.
            let mut is_first = self.id() == 0;
            let mut round = 0;
            while launch.is_there(item) {
                self.raw_full().wait(round % 2);
                if self.thread() < TILE_ROWS as u32 {
                    self.unpack::<0>(item.span);
                } else {
                    self.unpack::<1>(item.span);
                }
                async_copy::wait::<0>();
                self.put_columns(acts);
                sync::fence_async_proxy();
                self.meet();
                let ahead = launch.skip(item, C::WARPGROUPS, C::COLS);
                if launch.is_there(ahead) {
                    if ahead.tile != item.tile {
                        w = self.begin(ahead.tile);
                    }
                    acts = self.start(w, ahead.span, (round + 1) % 2);
                }
                let mut acc = self.multiply(item.span, round % 2);
                // Behind either nobody of the warpgroup multiplies any more.
                if is_first {
                    self.meet();
                } else {
                    sync::barrier_of(Self::turn(self.id()), 256);
                }
                is_first = false;
                self.add_span(&mut acc, item.span);
                if launch.is_there(launch.skip(item, 1, C::COLS)) {
                    let next = if self.id() + 1 == C::WARPGROUPS { 0 } else { self.id() + 1 };
                    sync::barrier_arrive_of(Self::turn(next), 256);
                }
                if item.span + 1 == launch.n_spans {
                    self.finish(item.tile, &acc);
                }
                item = ahead;
                round += 1;
            }
        }
    }

    /// Waits for products while `under_way` groups that were started later are under way.
    #[inline(always)]
    #[track_caller]
    fn wait<S: Registers>(sums: &mut S, under_way: u32) {
        match under_way {
            0 => sums.wait::<0>(),
            1 => sums.wait::<1>(),
            _ => sums.wait::<2>(),
        }
    }

    /// Where a column's floats lie among 16: a thread's four columns of two neighbouring products are neighbours.
    #[inline(always)]
    fn column_place(column: u32) -> u32 {
        column / 16 * 16 + column % 8 / 2 * 4 + column % 16 / 8 * 2 + column % 2
    }

    /// The kernel.
    #[inline(always)]
    pub(super) fn mmq<F: BlockFormat + Tiled, C: Summed>(
        p0: Part,
        p1: Part,
        p2: Part,
        q: Glb<U32x4>,
        scales: Glb<U32x2>,
        order: Glb<u32>,
        tiles: Glb<U32x4>,
        gate: Gate,
        shape: Shape,
    ) {
        const { assert!(2 * C::WARPGROUPS < 16 && C::WARPGROUPS <= 8) };
        let n_spans = shape.n_groups.div_ceil(SPAN_GROUPS as u32);
        let launch = &Launch { parts: [p0, p1, p2], q, scales, order, tiles, gate, shape, n_spans };
        let thread = thread::thread_idx_x();
        let warpgroup = Warpgroup::<F, C> { launch, thread, form: PhantomData };
        if thread.is_multiple_of(128) {
            warpgroup.raw_full().init(ROW_TILES as u32);
        }
        if thread < ZERO_BYTES / 16 {
            let zeros = const { [layout::<F, C>().zeros_before / 16, layout::<F, C>().zeros_after / 16] };
            unroll!(I in 0..2 {
                if I == 1 || halved::<F>() {
                    Warpgroup::<F, C>::operands().st(zeros[I] + thread, U32x4([0; 4]));
                }
            });
            sync::fence_async_proxy();
        }
        // Without a list the first weights are known before earlier launches have ended.
        if tiles.is_null() && warpgroup.id() < n_spans {
            let w = warpgroup.row_tile(&launch.work(thread::block_idx_x(), C::COLS));
            warpgroup.prefetch(w, warpgroup.id());
        }
        grid::wait_for_earlier();
        sync::sync_threads();
        warpgroup.run();
    }
}

/// Entries of every format that models use for weights, and the function that finds them.
macro_rules! entries {
    ($($id:ident => $module:ident,)*) => {
        #[cfg(any(not(target_arch = "nvptx64"), sm_90a))]
        #[cfg(any(target_arch = "nvptx64", feature = "emu"))]
        kernels! {
            in "mmq_hopper";
            pub(super) FEW: threads(384, 1), early;
            fn (
                p0: Part, p1: Part, p2: Part, q: Glb<U32x4>, scales: Glb<U32x2>, order: Glb<u32>, tiles: Glb<U32x4>,
                gate: Gate, shape: gpu::Shape,
            );
            $(concat!("mmq_hopper_", stringify!($id), "_n32") => gpu::mmq::<formats::$module::Block, Few>;)*
        }

        #[cfg(any(not(target_arch = "nvptx64"), sm_90a))]
        #[cfg(any(target_arch = "nvptx64", feature = "emu"))]
        kernels! {
            in "mmq_hopper";
            pub(super) MANY: threads(384, 1), early;
            fn (
                p0: Part, p1: Part, p2: Part, q: Glb<U32x4>, scales: Glb<U32x2>, order: Glb<u32>, tiles: Glb<U32x4>,
                gate: Gate, shape: gpu::Shape,
            );
            $(concat!("mmq_hopper_", stringify!($id), "_n64") => gpu::mmq::<formats::$module::Block, Many>;)*
        }
    };
}
for_each_weight_format!(entries);

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use quant::FormatId;

    use crate::case::{Kernel, Problem, Random, Tiers};
    use crate::kernels::mmq::{Case, Cut, Mmq, plain};
    use crate::kernels::product::Glu;

    /// The row in the registry.
    #[derive(Debug)]
    pub struct MmqHopper;

    /// Few CTAs, so that one has several tiles.
    const FEW: Cut = Cut::HOPPER_32.of_ctas(2);
    const MANY: Cut = Cut::HOPPER_64.of_ctas(2);

    /// Every kind of format (with halves, with an offset, with both), the edges of tiles, spans and rounds, and each extra.
    const CASES: &[Case] = &[
        plain(FormatId::Q4_0, MANY, &[63], 32, 1),
        plain(FormatId::Q4_0, FEW, &[300], 1184, 33),
        plain(FormatId::Q4_0, MANY, &[200], 4640, 65),
        plain(FormatId::Q8_0, FEW, &[65], 288, 31),
        plain(FormatId::Q8_0, MANY, &[129], 2336, 64),
        plain(FormatId::Q4_1, MANY, &[64], 800, 50),
        plain(FormatId::Q5_1, FEW, &[65], 416, 32),
        plain(FormatId::Q4_K, MANY, &[1], 1280, 70),
        plain(FormatId::Q4_K, FEW, &[70], 768, 20),
        plain(FormatId::Q2_K, MANY, &[70], 768, 40),
        plain(FormatId::Q6_K, MANY, &[20, 140, 1], 768, 20),
        plain(FormatId::Q6_K, FEW, &[70], 1024, 9),
        plain(FormatId::NVFP4, MANY, &[33], 320, 17),
        plain(FormatId::IQ3_XXS, MANY, &[97], 512, 66),
        Case { added: true, ..plain(FormatId::Q4_0, MANY, &[37, 130], 288, 12) },
        Case { added: true, ..plain(FormatId::Q4_K, FEW, &[40, 3, 64], 256, 40) },
        Case { added: true, glu: Some(Glu::Silu), ..plain(FormatId::Q4_0, MANY, &[70; 2], 1312, 50) },
        Case { added: true, glu: Some(Glu::Gelu), ..plain(FormatId::Q8_0, FEW, &[70; 2], 544, 20) },
        Case { added: true, mixture: Some((3, 2, true)), ..plain(FormatId::Q5_0, MANY, &[50], 64, 90) },
        Case {
            added: true,
            glu: Some(Glu::Silu),
            mixture: Some((5, 2, false)),
            ..plain(FormatId::Q4_0, FEW, &[33; 2], 512, 25)
        },
    ];

    /// The shapes of batches of an 8B model.
    const BENCH: &[Case] = &[
        plain(FormatId::Q4_0, Cut::HOPPER_32, &[4096], 14336, 64),
        plain(FormatId::Q4_0, Cut::HOPPER_64, &[4096], 14336, 64),
        plain(FormatId::Q4_0, Cut::HOPPER_32, &[4096], 4096, 64),
        plain(FormatId::Q4_0, Cut::HOPPER_32, &[4096], 14336, 32),
        plain(FormatId::Q4_0, Cut::HOPPER_32, &[4096], 14336, 16),
        plain(FormatId::Q4_0, Cut::HOPPER_64, &[4096], 14336, 128),
        plain(FormatId::Q4_0, Cut::HOPPER_64, &[4096, 1024, 1024], 4096, 64),
        plain(FormatId::Q4_0, Cut::HOPPER_32, &[4096, 1024, 1024], 4096, 64),
        Case { glu: Some(Glu::Silu), ..plain(FormatId::Q4_0, Cut::HOPPER_64, &[14336; 2], 4096, 64) },
        Case { glu: Some(Glu::Silu), ..plain(FormatId::Q4_0, Cut::HOPPER_32, &[14336; 2], 4096, 64) },
        Case { glu: Some(Glu::Silu), ..plain(FormatId::Q4_0, Cut::HOPPER_32, &[14336; 2], 4096, 32) },
        Case { glu: Some(Glu::Silu), ..plain(FormatId::Q4_0, Cut::HOPPER_32, &[14336; 2], 4096, 16) },
        plain(FormatId::Q8_0, Cut::HOPPER_32, &[4096], 14336, 64),
        plain(FormatId::Q8_0, Cut::HOPPER_32, &[4096], 14336, 32),
        Case { glu: Some(Glu::Silu), ..plain(FormatId::Q8_0, Cut::HOPPER_64, &[14336; 2], 4096, 64) },
        plain(FormatId::Q4_K, Cut::HOPPER_32, &[4096], 14336, 64),
        plain(FormatId::Q4_K, Cut::HOPPER_32, &[4096], 14336, 32),
        Case { glu: Some(Glu::Silu), ..plain(FormatId::Q4_K, Cut::HOPPER_64, &[14336; 2], 4096, 64) },
        plain(FormatId::Q6_K, Cut::HOPPER_32, &[4096], 14336, 64),
        plain(FormatId::Q6_K, Cut::HOPPER_32, &[4096], 14336, 32),
        plain(FormatId::Q6_K, Cut::HOPPER_64, &[128_256], 4096, 64),
        plain(FormatId::IQ3_XXS, Cut::HOPPER_64, &[4096], 14336, 64),
    ];

    impl Kernel for MmqHopper {
        const NAME: &'static str = "mmq_hopper";
        type Case = Case;
        const CASES: &'static [Case] = CASES;
        const BENCH: &'static [Case] = BENCH;
        const NMSE_MAX: f64 = Mmq::NMSE_MAX;
        const TIERS: Tiers = Tiers::Only("sm_90a");
        #[cfg(feature = "emu")]
        const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::FEW, super::MANY];

        fn problem(case: &Case, random: &mut Random) -> Problem {
            Mmq::problem(case, random)
        }

        fn peer(case: &Case) -> Option<alloc::string::String> {
            Mmq::peer(case)
        }

        fn bytes(case: &Case) -> u64 {
            Mmq::bytes(case)
        }

        fn flops(case: &Case) -> u64 {
            Mmq::flops(case)
        }
    }
}
