//! A CTA's way through the tiles: its warpgroups, what they have in shared memory, the turn at the totals, the ends of tiles.

use core::marker::PhantomData;

use quant::BlockFormat;

use super::product::Summed;
use super::*;
use crate::device::sync::{self, Mbarrier};
use crate::device::{F32x4, Smem, async_copy, grid, math, thread};
use crate::kernels::mmq::{Columns, Work};
use crate::kernels::product::choose_at;

/// 16-byte chunks of a chunk of k of all rows: core matrices below each other.
pub(super) const PLANE: u32 = TILE_ROWS as u32;

/// What the parts have in common.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct Shape {
    pub(super) n_groups: u32,
    n_cols: u32,
    /// In a mixture: pairs that share a row of activations.
    pairs_per_x: u32,
    /// Tiles of columns, and all tiles.
    n_across: u32,
    n_items: u32,
}

/// A span of a tile.
#[derive(Clone, Copy)]
struct Item {
    tile: u32,
    span: u32,
}

/// What a launch does.
pub(super) struct Launch {
    parts: [Part; 3],
    pub(super) q: Glb<U32x4>,
    pub(super) scales: Glb<U32x2>,
    order: Glb<u32>,
    tiles: Glb<U32x4>,
    gate: Gate,
    pub(super) shape: Shape,
    pub(super) n_spans: u32,
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
    pub(super) fn work(&self, tile: u32, cols: u32) -> Work {
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
pub(super) struct Warpgroup<'a, F, C> {
    pub(super) launch: &'a Launch,
    /// Number in the CTA.
    thread: u32,
    form: PhantomData<(F, C)>,
}

impl<F: BlockFormat + Tiled, C: Summed> Warpgroup<'_, F, C> {
    const CODES: u32 = CODES_BYTES / 16;
    /// Chunks of 128 of k of all columns, and of a span of a warpgroup.
    pub(super) const PANEL: u32 = C::COLS * 8;
    const STAGE: u32 = 2 * Self::PANEL;

    /// Number of the thread in the warpgroup. Registers are short: what follows from it is computed in each phase anew.
    #[inline(always)]
    pub(super) fn thread(&self) -> u32 {
        math::fresh(self.thread) % 128
    }

    /// Number of the warpgroup.
    #[inline(always)]
    pub(super) fn id(&self) -> u32 {
        math::fresh(self.thread) / 128
    }

    /// All that tensor cores read, in chunks.
    #[inline(always)]
    pub(super) fn operands() -> Smem<U32x4> {
        Smem::dynamic(0, const { layout::<F, C>().zeros_after + ZERO_BYTES } / 16)
    }

    /// Chunk of the first of the codes.
    #[inline(always)]
    pub(super) fn a(&self) -> u32 {
        self.id() * Self::CODES + const { layout::<F, C>().a / 16 }
    }

    #[inline(always)]
    pub(super) fn stage(&self, stage: u32) -> u32 {
        (self.id() * STAGES + stage) * Self::STAGE
    }

    #[inline(always)]
    pub(super) fn row_floats(&self) -> Smem<f32> {
        let n = const { float_bytes::<F, C>()[0] };
        Smem::dynamic(const { layout::<F, C>().row_floats } + self.id() * n, n / 4)
    }

    #[inline(always)]
    pub(super) fn column_floats(&self) -> Smem<f32> {
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
    pub(super) fn starts(&self) -> Smem<u32> {
        Smem::dynamic(const { layout::<F, C>().starts } + 4 * C::COLS * self.id(), C::COLS)
    }

    /// Scales of a span as they come, in the order of the threads that copy them.
    #[inline(always)]
    pub(super) fn scales(&self) -> Smem<u32> {
        let n = const { scale_bytes::<F, C>() };
        Smem::dynamic(const { layout::<F, C>().scales } + self.id() * n, n / 4)
    }

    /// Which scales the thread copies: a group, and of every eighth column from the first on `C::COLS / 16`.
    #[inline(always)]
    pub(super) fn of_scales(&self) -> (u32, u32) {
        let thread = self.thread();
        (thread % 8, thread / 8 % 8 + thread / 64 * (C::COLS / 2))
    }

    #[inline(always)]
    pub(super) fn raw(&self) -> Smem<u32> {
        let n = ROW_TILES as u32 * raw_bytes::<F>();
        Smem::dynamic(const { layout::<F, C>().raw } + self.id() * n, n / 4)
    }

    /// Ends its phase when a span of the raw row tiles is there.
    #[inline(always)]
    #[track_caller]
    pub(super) fn raw_full(&self) -> Mbarrier {
        Mbarrier::at(Smem::dynamic(const { layout::<F, C>().barriers }, 8), self.id())
    }

    /// Waits for the warpgroup.
    #[inline(always)]
    #[track_caller]
    pub(super) fn meet(&self) {
        sync::barrier_of(1 + self.id(), 128);
    }

    /// The named barrier at which a warpgroup waits for its turn.
    #[inline(always)]
    fn turn(id: u32) -> u32 {
        1 + WARPGROUPS + id
    }

    /// Whether the thread asks for a row tile.
    #[inline(always)]
    pub(super) fn asks(&self) -> bool {
        let thread = self.thread();
        thread < 32 * ROW_TILES as u32 && thread.is_multiple_of(32)
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
            let ahead = launch.skip(item, WARPGROUPS, C::COLS);
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
                let next = if self.id() + 1 == WARPGROUPS { 0 } else { self.id() + 1 };
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
    const { assert!(2 * WARPGROUPS < 16 && WARPGROUPS <= 8) };
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
