//! A span on its way into shared memory: copies of raw row tiles and of activations, weights unpacked, scales prepared.

use quant::BlockFormat;

use super::gpu::{PLANE, Warpgroup};
use super::product::Summed;
use super::*;
use crate::device::wgmma::Operand;
use crate::device::{F32x4, async_copy, bulk_copy, math, thread, warp};
use crate::kernels::int8_tile;
use crate::kernels::mmq::{Work, group, groups_of, units_of};
use crate::kernels::mmq_wide::load_row;
use crate::kernels::quantise_act::ActScale;

impl<F: BlockFormat + Tiled, C: Summed> Warpgroup<'_, F, C> {
    /// Where the row tile of a tile starts that the thread's warp asks for. Beyond the last row the last row tile again; its
    /// outputs are not stored.
    #[inline(always)]
    #[track_caller]
    pub(super) fn row_tile(&self, work: &Work) -> Glb<u8> {
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
    pub(super) fn prefetch(&self, w: Glb<u8>, span: u32) {
        if self.asks() {
            w.offset(F::LAYOUT.span_offset(span as usize)).prefetch(self.span_bytes(span));
        }
    }

    /// Begins a tile: where its columns' activations start; returns the warp's row tile.
    #[inline(always)]
    #[track_caller]
    pub(super) fn begin(&self, tile: u32) -> Glb<u8> {
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
    pub(super) fn start(&self, w: Glb<u8>, span: u32, stage: u32) -> [U32x2; 4] {
        let n_groups = self.launch.shape.n_groups;
        if self.asks() {
            let bytes = self.span_bytes(span);
            let source = w.offset(F::LAYOUT.span_offset(span as usize)).cast::<U32x4>();
            self.raw_full().arrive_expect(bytes);
            let target = self.thread() / 32 * (raw_bytes::<F>() / 16);
            bulk_copy::copy(self.raw().cast(), target, source, 0, bytes / 16, self.raw_full());
            if span + WARPGROUPS < self.launch.n_spans {
                self.prefetch(w, span + WARPGROUPS);
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
    pub(super) fn unpack<const H: usize>(&self, span: u32) {
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
    pub(super) fn put_columns(&self, acts: [U32x2; 4]) {
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
}

/// Where a column's floats lie among 16: a thread's four columns of two neighbouring products are neighbours.
#[inline(always)]
fn column_place(column: u32) -> u32 {
    column / 16 * 16 + column % 8 / 2 * 4 + column % 16 / 8 * 2 + column % 2
}
