//! The cut of `mmq` for Hopper (sm_90a): a CTA multiplies 128 rows by 128 columns with `wgmma`, in three warpgroups of
//! their own kinds. Contract, arguments and result are `mmq`'s, bit for bit; cut and launch too (`Cut::Warpgroups`).
//!
//! * Producers, 128 threads: warp w unpacks row tile w of the CTA's four, lane = row, into the layout that `wgmma` reads,
//!   and copies the activations there. Raw row tiles come a span at a time by bulk copies of one piece, ahead of it all.
//! * Consumers, two warpgroups of 64 rows each: `wgmma` sums a group of 32 exactly for 64 columns into 32 registers,
//!   while the sums of the other 64 columns are scaled and added: a conversion, a product of scales, an fma for each
//!   output and group, as `BlockFormat::dot_group` has them (one fma more for an offset). Both halves take turns, so the
//!   tensor cores' time is hidden; the float operations, 80 % of all instructions, are what bounds the kernel.
//! * A stage is half a span, 128 weights of each row and column: a row of 128 bytes in the swizzled layout. Stages form a
//!   ring; mbarriers say when one is full and when it is empty. A group whose halves have scales of their own lies there
//!   twice, with either half zero, since `wgmma` has no product of 16 bytes of k.
//! * Where both scales are values of f16, their product is exact in f32: then a product of 16 bytes of k on tensor cores,
//!   all zeros but for a group's two scales, makes it, and what is left to do for an output and group is a conversion
//!   and an fma. (An activation's scale that overflows f16 gives NaN where other kernels may give an infinity.)
//! * A consumer thread keeps the span's 64 sums in registers, the totals in shared memory, where it meets them once per
//!   span.
//! * Row tile slots 0 to 3 as in the wide cut; of a gated pair 0 and 1 are the gate's, 2 and 3 the same rows of up.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::MmqHopper;
use quant::BlockFormat;
use quant::act::ActKind;

use super::int8_tile::{column_planes, row_planes};
use crate::tile::{ROWS, Tiled};
#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
use {
    crate::device::{Glb, U32x2, U32x4},
    crate::kernels::mmq::Shape,
    crate::kernels::product::{Gate, Part},
    quant::formats,
};

/// Rows and columns of a CTA's tile.
pub const TILE: usize = 128;
/// Threads of a CTA: a warpgroup of producers, two of consumers.
pub const THREADS: u32 = 384;
/// Row tiles of a CTA.
const ROW_TILES: usize = TILE / ROWS;
/// Groups of a stage.
const STAGE_GROUPS: usize = 4;
/// Bytes of one stage's codes of 128 rows or columns.
const CODES_BYTES: u32 = (TILE * STAGE_GROUPS * 32) as u32;
/// Floats of one plane of a stage.
const PLANE: u32 = (TILE * STAGE_GROUPS) as u32;
/// Most shared memory of a CTA on Hopper.
const MOST_BYTES: u32 = 227 << 10;

/// Whether the halves of a group have scales of their own.
const fn halved<F: BlockFormat>() -> bool {
    F::SCALE_ELEMS == 16
}

/// Products per group: one, or one for each half.
const fn steps<F: BlockFormat>() -> u32 {
    1 + halved::<F>() as u32
}

/// Whether tensor cores multiply the scales. With an offset a consumer's registers would not suffice.
const fn exact<F: BlockFormat>() -> bool {
    F::SCALE_IS_F16 && !halved::<F>() && !F::HAS_OFFSET && !matches!(F::ACT, ActKind::Q8K)
}

/// Stages of the ring: as many as fit beside two spans of raw weights.
const fn stages<F: BlockFormat>() -> u32 {
    if halved::<F>() || exact::<F>() { 2 } else { 3 }
}

/// Floats per row and group that consumers read, and per column and group.
const fn planes<F: BlockFormat>() -> [u32; 2] {
    if exact::<F>() { [0; 2] } else { [row_planes::<F>() as u32, column_planes::<F>() as u32] }
}

/// Bytes of a span of one raw row tile.
const fn raw_bytes<F: Tiled>() -> u32 {
    (ROWS * F::LAYOUT.span_bytes) as u32
}

/// Shared memory: where codes of the weights (at 0) and of the activations, their scales for the tensor cores, floats of
/// rows and of columns, totals, barriers, the list of columns and raw row tiles start.
#[cfg_attr(
    not(any(target_arch = "nvptx64", feature = "emu")),
    expect(dead_code, reason = "a host that only launches needs the whole alone")
)]
struct Layout {
    b: u32,
    a_scales: u32,
    b_scales: u32,
    row_floats: u32,
    column_floats: u32,
    totals: u32,
    barriers: u32,
    columns: u32,
    raw: u32,
    /// Spans of raw row tiles.
    raw_stages: u32,
    bytes: u32,
}

const fn layout<F: BlockFormat + Tiled>() -> Layout {
    let n = stages::<F>();
    let b = n * steps::<F>() * CODES_BYTES;
    let a_scales = b + n * CODES_BYTES;
    let b_scales = a_scales + exact::<F>() as u32 * n * CODES_BYTES;
    let row_floats = b_scales + exact::<F>() as u32 * CODES_BYTES;
    let column_floats = row_floats + n * 4 * PLANE * planes::<F>()[0];
    let totals = column_floats + n * 4 * PLANE * planes::<F>()[1];
    let barriers = totals + (4 * TILE * TILE) as u32;
    let columns = barriers + 256;
    let raw = columns + 8 * TILE as u32;
    let of_span = ROW_TILES as u32 * raw_bytes::<F>();
    let raw_stages = if raw + 2 * of_span <= MOST_BYTES { 2 } else { 1 };
    let bytes = raw + raw_stages * of_span;
    Layout {
        b,
        a_scales,
        b_scales,
        row_floats,
        column_floats,
        totals,
        barriers,
        columns,
        raw,
        raw_stages,
        bytes,
    }
}

/// Shared memory of a CTA.
pub const fn bytes<F: BlockFormat + Tiled>() -> u32 {
    layout::<F>().bytes
}

#[cfg(any(not(target_arch = "nvptx64"), sm_90a))]
#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
pub(crate) use device::multiply;

#[cfg(any(not(target_arch = "nvptx64"), sm_90a))]
#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod device {
    use core::marker::PhantomData;

    use quant::bits::f32_to_f16;

    use super::*;
    use crate::device::sync::{self, Mbarrier};
    use crate::device::wgmma::{self, F16N64, Operand, Registers, S8N64, Sums};
    use crate::device::{F32x2, F32x4, Smem, async_copy, bulk_copy, math, thread, warp};
    use crate::kernels::int8_tile;
    use crate::kernels::mmq::{NONE, Work, group, units_of};
    use crate::kernels::mmq_wide::{load_row, store_columns};
    use crate::kernels::quantise_act::ActScale;
    use crate::tile::SPAN_GROUPS;

    /// Threads and warps of the consumers.
    const CONSUMERS: u32 = THREADS - 128;
    const CONSUMER_WARPS: u32 = CONSUMERS / 32;
    /// Registers of a producer and of a consumer thread: of the 168 that each of three warpgroups starts with.
    const PRODUCER_REGISTERS: u32 = 104;
    const CONSUMER_REGISTERS: u32 = 200;
    const _: () = assert!(PRODUCER_REGISTERS + 2 * CONSUMER_REGISTERS <= 3 * 168);
    /// The same where tensor cores multiply scales.
    const EXACT_PRODUCER_REGISTERS: u32 = 72;
    const EXACT_CONSUMER_REGISTERS: u32 = 216;
    const _: () = assert!(EXACT_PRODUCER_REGISTERS + 2 * EXACT_CONSUMER_REGISTERS <= 3 * 168);
    /// Columns whose products a warpgroup starts at a time.
    const HALF: u32 = TILE as u32 / 2;
    /// 16-byte chunks of a stage of codes, and of a row in it.
    const STAGE_CHUNKS: u32 = CODES_BYTES / 16;
    const ROW_CHUNKS: u32 = 2 * STAGE_GROUPS as u32;

    /// Groups of stage `h` of the whole product.
    #[inline(always)]
    fn groups_of_stage(h: u32, n_groups: u32) -> u32 {
        let rest = n_groups - h * STAGE_GROUPS as u32;
        if rest < STAGE_GROUPS as u32 { rest } else { STAGE_GROUPS as u32 }
    }

    /// Scales of a column's groups of stage `h`, zeros beyond the last group.
    #[inline(always)]
    #[track_caller]
    fn load_acts(scales: Glb<U32x2>, h: u32, n_groups: u32) -> [ActScale; STAGE_GROUPS] {
        let mut acts = [ActScale { d: 0.0, extra: 0 }; STAGE_GROUPS];
        unroll!(J in 0..4 {
            let group = h * STAGE_GROUPS as u32 + J as u32;
            if group < n_groups {
                let U32x2([d, extra]) = scales.ld_nc(group);
                acts[J] = ActScale { d: f32::from_bits(d), extra };
            }
        });
        acts
    }

    /// Where a column's floats lie among 16: a thread's four columns of two neighbouring products are neighbours.
    #[inline(always)]
    fn column_place(column: u32) -> u32 {
        column / 16 * 16 + column % 8 / 2 * 4 + column % 16 / 8 * 2 + column % 2
    }

    /// A place in the ring.
    #[derive(Clone, Copy)]
    struct Place {
        slot: u32,
        parity: u32,
    }

    impl Place {
        const FIRST: Place = Place { slot: 0, parity: 0 };

        #[inline(always)]
        fn next<F: BlockFormat>(self) -> Place {
            if self.slot + 1 == stages::<F>() {
                Place { slot: 0, parity: self.parity ^ 1 }
            } else {
                Place { slot: self.slot + 1, parity: self.parity }
            }
        }
    }

    /// A CTA's shared memory.
    struct Shared<F> {
        a: Smem<U32x4>,
        b: Smem<U32x4>,
        /// As codes lie there: of each group a row's 32 bytes with the scale, an f16, in the group's place, else zeros.
        a_scales: Smem<U32x4>,
        /// All stages' columns: of each stage a column's 32 bytes with the scales of the groups.
        b_scales: Smem<U32x4>,
        row_floats: Smem<f32>,
        column_floats: Smem<f32>,
        totals: Smem<F32x4>,
        barriers: Smem<u64>,
        columns: Smem<u32>,
        raw: Smem<u32>,
        format: PhantomData<F>,
    }

    impl<F: BlockFormat + Tiled> Shared<F> {
        const ROW_FLOATS: u32 = PLANE * planes::<F>()[0];
        const COLUMN_FLOATS: u32 = PLANE * planes::<F>()[1];
        const RAW_STAGES: u32 = layout::<F>().raw_stages;

        #[inline(always)]
        fn new() -> Shared<F> {
            let layout = const { &layout::<F>() };
            let n = stages::<F>();
            Shared {
                a: Smem::dynamic(0, n * steps::<F>() * STAGE_CHUNKS),
                b: Smem::dynamic(layout.b, n * STAGE_CHUNKS),
                a_scales: Smem::dynamic(layout.a_scales, exact::<F>() as u32 * n * STAGE_CHUNKS),
                b_scales: Smem::dynamic(layout.b_scales, exact::<F>() as u32 * STAGE_CHUNKS),
                row_floats: Smem::dynamic(layout.row_floats, n * Self::ROW_FLOATS),
                column_floats: Smem::dynamic(layout.column_floats, n * Self::COLUMN_FLOATS),
                totals: Smem::dynamic(layout.totals, (TILE * TILE / 4) as u32),
                barriers: Smem::dynamic(layout.barriers, 32),
                columns: Smem::dynamic(layout.columns, 2 * TILE as u32),
                raw: Smem::dynamic(layout.raw, layout.raw_stages * ROW_TILES as u32 * raw_bytes::<F>() / 4),
                format: PhantomData,
            }
        }

        /// Ends its phase when the producers have filled a stage.
        #[inline(always)]
        #[track_caller]
        fn full(&self, slot: u32) -> Mbarrier {
            Mbarrier::at(self.barriers, slot)
        }

        /// Ends its phase when the consumers have read a stage.
        #[inline(always)]
        #[track_caller]
        fn empty(&self, slot: u32) -> Mbarrier {
            Mbarrier::at(self.barriers, 4 + slot)
        }

        /// Ends its phase when a span of a warp's raw row tile is there.
        #[inline(always)]
        #[track_caller]
        fn raw_full(&self, slot: u32, stage: u32) -> Mbarrier {
            Mbarrier::at(self.barriers, 8 + 2 * slot + stage)
        }

        #[inline(always)]
        #[track_caller]
        fn init(&self) {
            unroll!(I in 0..4 {
                if (I as u32) < stages::<F>() {
                    self.full(I as u32).init(ROW_TILES as u32);
                    self.empty(I as u32).init(CONSUMER_WARPS);
                }
                unroll!(S in 0..2 { self.raw_full(I as u32, S as u32).init(1); });
            });
        }

        /// Zeros around the scales.
        #[inline(always)]
        #[track_caller]
        fn clear_scales(&self) {
            let clear = |chunks: Smem<U32x4>, n: u32| {
                let mut i = thread::thread_idx_x();
                while i < n {
                    chunks.st(i, U32x4([0; 4]));
                    i += THREADS;
                }
            };
            clear(self.a_scales, stages::<F>() * STAGE_CHUNKS);
            clear(self.b_scales, STAGE_CHUNKS);
            sync::fence_async_proxy();
        }

        /// Starts the copy of a span of the warp's raw row tile.
        #[inline(always)]
        #[track_caller]
        fn copy_raw(&self, w: Glb<u8>, slot: u32, span: u32, n_groups: u32) {
            let stage = span % Self::RAW_STAGES;
            let source = w.offset(F::LAYOUT.span_offset(span as usize)).cast::<U32x4>();
            let vectors = units_of::<F>(span, n_groups) * (ROWS * F::LAYOUT.unit_bytes / 16) as u32;
            let barrier = self.raw_full(slot, stage);
            barrier.arrive_expect(16 * vectors);
            let target = (stage * ROW_TILES as u32 + slot) * (raw_bytes::<F>() / 16);
            bulk_copy::copy(self.raw.cast(), target, source, 0, vectors, barrier);
        }

        /// Unpacks half `H` of a span into a stage: each lane four groups of a row of the warp's row tile.
        #[inline(always)]
        #[track_caller]
        fn unpack<const H: usize>(&self, slot: u32, span: u32, n_groups: u32, stage: u32) {
            let raw = (span % Self::RAW_STAGES * ROW_TILES as u32 + slot) * raw_bytes::<F>();
            let units = units_of::<F>(span, n_groups);
            let words = match F::LAYOUT.unit_bytes {
                16 => load_row::<F, U32x4>(self.raw.cast(), raw, units),
                8 => load_row::<F, U32x2>(self.raw.cast(), raw, units),
                _ => load_row::<F, u32>(self.raw, raw, units),
            };
            let row = slot * ROWS as u32 + thread::lane_id();
            let a = self.a.skip(stage * steps::<F>() * STAGE_CHUNKS);
            let floats = self.row_floats.skip(stage * Self::ROW_FLOATS);
            unroll!(J in 0..4 {
                let group = group::<F>(&words, STAGE_GROUPS * H + J);
                let codes = int8_tile::signed_codes::<F>(&group);
                let [low, high] = [0, 4].map(|i: usize| U32x4([codes[i], codes[i + 1], codes[i + 2], codes[i + 3]]));
                let [first, second] = [0, 1].map(|chunk| Operand::place(row, 2 * J as u32 + chunk));
                if halved::<F>() {
                    let zero = U32x4([0; 4]);
                    a.st(first, low);
                    a.st(second, zero);
                    a.st(STAGE_CHUNKS + first, zero);
                    a.st(STAGE_CHUNKS + second, high);
                } else {
                    a.st(first, low);
                    a.st(second, high);
                }
                if exact::<F>() {
                    let scales = self.a_scales.skip(stage * STAGE_CHUNKS).cast::<u16>();
                    scales.st(8 * first + J as u32, f32_to_f16(group.scale[0]));
                } else {
                    int8_tile::put_floats::<F, STAGE_GROUPS, TILE>(floats, row, J as u32, &group);
                }
            });
        }

        /// Stores the floats of a column's groups of a stage.
        #[inline(always)]
        #[track_caller]
        fn put_column(&self, stage: u32, column: u32, acts: [ActScale; STAGE_GROUPS]) {
            if exact::<F>() {
                let half = |j: usize| u32::from(f32_to_f16(acts[j].d));
                let scales = U32x2([half(0) | half(1) << 16, half(2) | half(3) << 16]);
                self.b_scales.cast::<U32x2>().st(2 * Operand::place(column, 2 * stage), scales);
            } else {
                let (floats, place) =
                    (self.column_floats.skip(stage * Self::COLUMN_FLOATS), column_place(column));
                unroll!(J in 0..4 {
                    int8_tile::put_column::<F, STAGE_GROUPS, TILE>(floats, place, J as u32, acts[J]);
                });
            }
        }

        /// What the producers do, for warp `slot`.
        #[inline(always)]
        #[track_caller]
        fn produce(&self, work: &Work, slot: u32) {
            let (w, tile) = if work.gate.is_some() {
                (if slot < 2 { work.part.w } else { work.up.w }, 2 * work.cta + slot % 2)
            } else {
                (work.part.w, ROW_TILES as u32 * work.cta + slot)
            };
            // Beyond the last row the last tile again; its outputs are not stored.
            let n_tiles = work.part.n_rows.div_ceil(ROWS as u32);
            let tile = if tile < n_tiles { tile } else { n_tiles - 1 };
            let w = w.offset(work.tile_at::<F>(tile));

            let n_groups = work.n_groups;
            let (n_stages, n_spans) =
                (n_groups.div_ceil(STAGE_GROUPS as u32), n_groups.div_ceil(SPAN_GROUPS as u32));
            let (thread, lane) = (thread::thread_idx_x(), thread::lane_id());
            if lane == 0 {
                self.copy_raw(w, slot, 0, n_groups);
                if Self::RAW_STAGES == 2 && n_spans > 1 {
                    self.copy_raw(w, slot, 1, n_groups);
                }
            }
            // Activations: eight threads a column, each a chunk of eight columns that are 16 apart.
            let chunk = thread % ROW_CHUNKS;
            let first_column = thread / ROW_CHUNKS;
            let target = Operand::place(first_column, chunk);
            // Floats of a column.
            let scales = work.scales.offset(self.columns.ld(thread) as usize * n_groups as usize);

            let mut acts = load_acts(scales, 0, n_groups);
            let mut place = Place::FIRST;
            let mut h = 0;
            while h < n_stages {
                let (span, there) = (h / 2, groups_of_stage(h, n_groups));
                self.empty(place.slot).wait(place.parity ^ 1);
                if chunk < 2 * there {
                    let stage = self.b.skip(place.slot * STAGE_CHUNKS);
                    let at = h * ROW_CHUNKS + chunk;
                    let mut rows = [0; 8];
                    unroll!(I in 0..8 { rows[I] = self.columns.ld(first_column + 16 * I as u32); });
                    unroll!(I in 0..8 {
                        let source = rows[I] * (2 * n_groups) + at;
                        async_copy::copy16(stage, target + I as u32 * (16 * ROW_CHUNKS), work.q, source);
                    });
                }
                async_copy::commit();
                if h.is_multiple_of(2) {
                    let stage = span % Self::RAW_STAGES;
                    self.raw_full(slot, stage).wait(span / Self::RAW_STAGES % 2);
                    self.unpack::<0>(slot, span, n_groups, place.slot);
                } else {
                    self.unpack::<1>(slot, span, n_groups, place.slot);
                }
                self.put_column(place.slot, thread, acts);
                // Those of the next stage are under way while this one is ended.
                acts = load_acts(scales, h + 1, n_groups);
                async_copy::wait::<0>();
                sync::fence_async_proxy();
                warp::sync_warp();
                if lane == 0 {
                    self.full(place.slot).arrive();
                    if !h.is_multiple_of(2) && span + Self::RAW_STAGES < n_spans {
                        self.copy_raw(w, slot, span + Self::RAW_STAGES, n_groups);
                    }
                }
                place = place.next::<F>();
                h += 1;
            }
        }

        /// Starts the products of step `step` from the place on (a group, or one half of it) with 64 columns.
        #[inline(always)]
        #[track_caller]
        fn start(&self, products: &mut Products, at: &At, half: u32, step: u32) {
            let (j, step) = (at.j + step / steps::<F>(), step % steps::<F>());
            let (slot, columns) = (at.place.slot, half * HALF * ROW_CHUNKS);
            wgmma::fence();
            let a = at.a.skip((slot * steps::<F>() + step) * STAGE_CHUNKS + 2 * j);
            S8N64::shared::<false>(&mut products.sums, a, at.b.skip(slot * STAGE_CHUNKS + columns + 2 * j));
            if exact::<F>() {
                let a = at.a_scales.skip(slot * STAGE_CHUNKS + 2 * j);
                F16N64::shared::<false>(&mut products.scales, a, at.b_scales.skip(columns + 2 * slot));
            }
            wgmma::commit();
        }

        /// Waits until at most `PENDING` of the products started last are under way.
        #[inline(always)]
        #[track_caller]
        fn wait<const PENDING: u32>(products: &mut Products) {
            products.sums.wait::<PENDING>();
            if exact::<F>() {
                products.scales.wait::<PENDING>();
            }
        }

        /// Adds the products of `STEPS` steps. While those with 64 columns are added, the tensor cores make those with the
        /// others, and the scales of the others are on their way; no product is under way at the end, since ptxas follows
        /// them through straight code only.
        #[inline(always)]
        #[track_caller]
        fn add_products<const STEPS: usize>(&self, acc: &mut [[f32; 32]; 2], at: &At) {
            let mut products = [Products { sums: Sums::zero(), scales: Sums::zero() }; 2];
            self.start(&mut products[0], at, 0, 0);
            self.start(&mut products[1], at, 1, 0);
            let mut scales = [self.scales_ahead(at, 0, 0); 2];
            unroll!(S in 0..4 {
                if S < STEPS {
                    let step = S as u32;
                    scales[1] = self.scales_ahead(at, 1, step);
                    Self::wait::<1>(&mut products[0]);
                    self.fold(&mut acc[0], &products[0], &scales[0], at, 0, step);
                    if S + 1 < STEPS {
                        self.start(&mut products[0], at, 0, step + 1);
                        scales[0] = self.scales_ahead(at, 0, step + 1);
                        Self::wait::<1>(&mut products[1]);
                    } else {
                        Self::wait::<0>(&mut products[1]);
                    }
                    self.fold(&mut acc[1], &products[1], &scales[1], at, 1, step);
                    if S + 1 < STEPS {
                        self.start(&mut products[1], at, 1, step + 1);
                    }
                }
            });
        }

        /// A plane's two floats of the thread's rows, for group `j` of the stage.
        #[inline(always)]
        #[track_caller]
        fn of_rows(&self, at: &At, plane: u32, j: u32) -> [f32; 2] {
            let rows = self.row_floats.skip(at.place.slot * Self::ROW_FLOATS).cast::<F32x2>();
            rows.ld(plane * (PLANE / 2) + j * (TILE as u32 / 2) + at.row).0
        }

        /// A plane's floats of the thread's columns among 64, for group `j` of the stage.
        #[inline(always)]
        #[track_caller]
        fn of_columns(&self, at: &At, plane: u32, j: u32, half: u32) -> [[f32; 4]; 4] {
            let columns = self.column_floats.skip(at.place.slot * Self::COLUMN_FLOATS).cast::<F32x4>();
            let first = plane * (PLANE / 4) + (j * TILE as u32 + half * HALF) / 4 + thread::lane_id() % 4;
            core::array::from_fn(|q| columns.ld(first + 4 * q as u32).0)
        }

        /// [`Shared::scales`] ahead of the products, unless tensor cores multiply them. With an offset registers do not
        /// suffice for it.
        #[inline(always)]
        #[track_caller]
        fn scales_ahead(&self, at: &At, half: u32, step: u32) -> Scales {
            if exact::<F>() || F::HAS_OFFSET {
                Scales { rows: [0.0; 2], columns: [[0.0; 4]; 4] }
            } else {
                self.scales(at, half, step)
            }
        }

        /// The scales of a step.
        #[inline(always)]
        #[track_caller]
        fn scales(&self, at: &At, half: u32, step: u32) -> Scales {
            let (j, step) = (at.j + step / steps::<F>(), step % steps::<F>());
            Scales { rows: self.of_rows(at, step, j), columns: self.of_columns(at, 0, j, half) }
        }

        /// Scales the sums of a step and adds them.
        #[inline(always)]
        #[track_caller]
        fn fold(
            &self,
            acc: &mut [f32; 32],
            products: &Products,
            scales: &Scales,
            at: &At,
            half: u32,
            step: u32,
        ) {
            let scales = if F::HAS_OFFSET { &self.scales(at, half, step) } else { scales };
            let (j, step) = (at.j + step / steps::<F>(), step % steps::<F>());
            let with_offset = F::HAS_OFFSET && step + 1 == steps::<F>();
            let (mut offsets, mut values) = ([[0.0; 2]; 2], [[[0.0; 4]; 4]; 2]);
            if with_offset {
                offsets[0] = self.of_rows(at, steps::<F>(), j);
                values[0] = self.of_columns(at, 1, j, half);
                if halved::<F>() {
                    offsets[1] = self.of_rows(at, steps::<F>() + 1, j);
                    values[1] = self.of_columns(at, 2, j, half);
                }
            }
            unroll!(Q in 0..4 { unroll!(E in 0..8 {
                let (r, c) = (E / 2 % 2, E / 4 * 2 + E % 2);
                let scale = if exact::<F>() {
                    f32::from_bits(products.scales.get(8 * Q + E))
                } else {
                    math::mul(scales.rows[r], scales.columns[Q][c])
                };
                let out = &mut acc[8 * Q + E];
                *out = math::fma(scale, products.sums.get(8 * Q + E) as i32 as f32, *out);
                if with_offset {
                    *out = math::fma(offsets[0][r], values[0][Q][c], *out);
                    if halved::<F>() {
                        *out = math::fma(offsets[1][r], values[1][Q][c], *out);
                    }
                }
            }); });
        }

        /// Adds a span's sums to the thread's totals and clears them.
        #[inline(always)]
        #[track_caller]
        fn add_span(&self, acc: &mut [[f32; 32]; 2]) {
            let totals = self.totals.skip(thread::thread_idx_x() - 128);
            unroll!(H in 0..2 { unroll!(Q in 0..8 {
                let at = (8 * H + Q) as u32 * CONSUMERS;
                let F32x4(mut total) = totals.ld(at);
                unroll!(E in 0..4 {
                    total[E] += acc[H][4 * Q + E];
                    acc[H][4 * Q + E] = 0.0;
                });
                totals.st(at, F32x4(total));
            }); });
        }

        /// What the consumers do.
        #[inline(always)]
        #[track_caller]
        fn consume(&self, work: &Work) {
            let warp = thread::warp_id() - 4;
            let lane = thread::lane_id();
            let totals = self.totals.skip(thread::thread_idx_x() - 128);
            unroll!(Q in 0..16 {
                // -0 + x is x, whatever x.
                totals.st(Q as u32 * CONSUMERS, F32x4([-0.0; 4]));
            });

            let mut at = At {
                a: Operand::at(self.a, warp / 4 * (64 * ROW_CHUNKS)),
                b: Operand::at(self.b, 0),
                a_scales: if exact::<F>() {
                    Operand::at(self.a_scales, warp / 4 * (64 * ROW_CHUNKS))
                } else {
                    Operand::NONE
                },
                b_scales: if exact::<F>() { Operand::at(self.b_scales, 0) } else { Operand::NONE },
                // Of 32 rows, those eight apart are neighbours.
                row: (warp / 2 * 32 + lane / 4 * 4 + warp % 2 * 2) / 2,
                place: Place::FIRST,
                j: 0,
            };
            let mut acc = [[0.0f32; 32]; 2];
            let n_stages = work.n_groups.div_ceil(STAGE_GROUPS as u32);
            let mut h = 0;
            while h < n_stages {
                self.full(at.place.slot).wait(at.place.parity);
                let there = groups_of_stage(h, work.n_groups);
                at.j = 0;
                if there == STAGE_GROUPS as u32 {
                    while at.j < STAGE_GROUPS as u32 {
                        self.add_products::<4>(&mut acc, &at);
                        at.j += 4 / steps::<F>();
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
                warp::sync_warp();
                if lane == 0 {
                    self.empty(at.place.slot).arrive();
                }
                h += 1;
                if h.is_multiple_of(2) || h == n_stages {
                    self.add_span(&mut acc);
                }
                at.place = at.place.next::<F>();
            }

            // Where the codes were: by now nobody reads them.
            let finished = Smem::<f32>::dynamic(0, TILE as u32 * FINISHED_STRIDE);
            sync::barrier::<1>(CONSUMERS);
            let (row, column) = (16 * warp + lane / 4, 2 * (lane % 4));
            unroll!(Q in 0..16 {
                let F32x4(total) = totals.ld(Q as u32 * CONSUMERS);
                unroll!(E in 0..4 {
                    let column = column + (8 * Q + E % 2) as u32;
                    finished.st(column * FINISHED_STRIDE + row + (E / 2 * 8) as u32, total[E]);
                });
            });
            sync::barrier::<1>(CONSUMERS);
            store_columns(work, self.columns, finished, FINISHED_STRIDE, warp, CONSUMER_WARPS);
        }
    }

    /// Elements between the columns of the finished tile in shared memory: four column pairs in different banks.
    const FINISHED_STRIDE: u32 = TILE as u32 + 4;

    /// A step's products with 64 columns: sums over codes, and of the scales where tensor cores multiply them.
    #[derive(Clone, Copy)]
    struct Products {
        sums: Sums<32>,
        scales: Sums<32>,
    }

    /// Scales of the thread's rows and, of 64 columns, of its own.
    #[derive(Clone, Copy)]
    struct Scales {
        rows: [f32; 2],
        columns: [[f32; 4]; 4],
    }

    /// Where a consumer is.
    #[derive(Clone, Copy)]
    struct At {
        /// The warpgroup's rows and all columns, in stage 0.
        a: Operand,
        b: Operand,
        a_scales: Operand,
        b_scales: Operand,
        /// The thread's two rows among a group's floats.
        row: u32,
        place: Place,
        /// Group of the stage.
        j: u32,
    }

    /// The CTA's work.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn multiply<F: BlockFormat + Tiled>(work: &Work) {
        let thread = thread::thread_idx_x();
        let shared = Shared::<F>::new();
        if thread < TILE as u32 {
            shared.columns.st(thread, work.columns.input(thread));
            let output = if thread < work.columns.n { work.columns.output(thread) } else { NONE };
            shared.columns.st(TILE as u32 + thread, output);
        }
        if thread == 0 {
            shared.init();
        }
        if exact::<F>() {
            shared.clear_scales();
        }
        sync::sync_threads();
        if thread < 128 {
            if exact::<F>() {
                warp::give_registers::<EXACT_PRODUCER_REGISTERS>();
            } else {
                warp::give_registers::<PRODUCER_REGISTERS>();
            }
            shared.produce(work, thread::warp_id());
        } else {
            if exact::<F>() {
                warp::take_registers::<EXACT_CONSUMER_REGISTERS>();
            } else {
                warp::take_registers::<CONSUMER_REGISTERS>();
            }
            shared.consume(work);
        }
    }
}

/// Entries of every format that models use for weights.
macro_rules! entries {
    ($($id:ident => $module:ident,)*) => {
        #[cfg(any(not(target_arch = "nvptx64"), sm_90a))]
        #[cfg(any(target_arch = "nvptx64", feature = "emu"))]
        kernels! {
            in "mmq_hopper";
            pub(super) ENTRIES: threads(384, 1);
            fn (
                p0: Part, p1: Part, p2: Part, q: Glb<U32x4>, scales: Glb<U32x2>, order: Glb<u32>, tiles: Glb<U32x4>,
                gate: Gate, shape: Shape,
            );
            $(concat!("mmq_hopper_", stringify!($id)) => crate::kernels::mmq::warpgroups::<formats::$module::Block>;)*
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

    const fn case(format: FormatId, n_rows: &'static [usize], k: usize, n_cols: usize) -> Case {
        plain(format, Cut::Warpgroups, n_rows, k, n_cols)
    }

    /// Every kind of format (with halves, with an offset, with both), the edges of tiles, stages, spans and the ring, and
    /// each extra.
    const CASES: &[Case] = &[
        case(FormatId::Q4_0, &[127], 32, 1),
        case(FormatId::Q4_0, &[40], 128, 9),
        case(FormatId::Q4_0, &[130], 1184, 129),
        case(FormatId::Q8_0, &[129], 288, 127),
        case(FormatId::Q4_1, &[128], 800, 128),
        case(FormatId::Q5_1, &[65], 416, 65),
        case(FormatId::Q4_K, &[1], 1280, 140),
        case(FormatId::Q2_K, &[70], 768, 40),
        case(FormatId::Q6_K, &[20, 140, 1], 768, 20),
        case(FormatId::NVFP4, &[33], 320, 17),
        case(FormatId::IQ3_XXS, &[97], 512, 66),
        Case { added: true, ..case(FormatId::Q4_0, &[37, 130], 288, 12) },
        Case { added: true, glu: Some(Glu::Silu), ..case(FormatId::Q8_0, &[70; 2], 544, 20) },
        Case { added: true, mixture: Some((3, 2, true)), ..case(FormatId::Q5_0, &[50], 64, 90) },
    ];

    /// The shapes of `mmq`'s wide cut.
    const BENCH: &[Case] = &[
        case(FormatId::Q4_0, &[4096], 14336, 512),
        case(FormatId::Q4_0, &[14336], 4096, 512),
        case(FormatId::Q4_0, &[14336], 4096, 2048),
        case(FormatId::Q8_0, &[4096], 14336, 512),
        case(FormatId::MXFP4, &[4096], 14336, 512),
        case(FormatId::Q4_K, &[4096], 14336, 512),
        case(FormatId::Q6_K, &[4096], 14336, 512),
        case(FormatId::IQ3_XXS, &[4096], 14336, 512),
        case(FormatId::IQ2_XXS, &[4096], 14336, 512),
        Case { glu: Some(Glu::Silu), ..case(FormatId::Q4_0, &[14336; 2], 4096, 512) },
    ];

    impl Kernel for MmqHopper {
        const NAME: &'static str = "mmq_hopper";
        type Case = Case;
        const CASES: &'static [Case] = CASES;
        const BENCH: &'static [Case] = BENCH;
        const NMSE_MAX: f64 = Mmq::NMSE_MAX;
        const TIERS: Tiers = Tiers::Only("sm_90a");
        #[cfg(feature = "emu")]
        const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::ENTRIES];

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
