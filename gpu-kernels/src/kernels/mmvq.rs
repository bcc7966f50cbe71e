//! Tiled quantised weights × few columns: `y[c][r] = Σ w[r][i] · x[c][i]` for up to 8 columns c, with what follows a
//! product in the same launch.
//!
//! * Shapes: `w` [n_rows, k] in any block format, tiled (`tile.rs`), 16-byte aligned; activations [n_cols, k] as
//!   `quantise_act` writes them (`q`, `scales`) in the format's kind (`BlockFormat::ACT`); `y` [n_cols, n_rows] f32.
//!   Nothing overlaps, except that `residual` may be `y`. One column (in a mixture any) may also come as f32 in `q`,
//!   without `scales`: the kernel quantises it on its way to shared memory, after an RMS norm of the row if there is a
//!   [`Norm`] (k at most [`MAX_NORM_K`]); to the same bits as `quantise_act` and `rms_norm`.
//! * Several matrices, bias, gate and up, residual, mixtures of experts: `product.rs`. In a mixture every pair is a column
//!   of its own.
//! * Result: for every output the sum over a span of 256 weights is `BlockFormat::dot_group`'s chain from 0 over its groups in
//!   order of k, and the spans are added in order. So bits depend on k alone: not on the grid, on n_cols, on the entry.
//! * Tolerance: NMSE 1e-11 against `dot_group` summed in f64, group by group.
//! * Geometry: lane = row, a warp works on one span of a row tile at a time (of two row tiles where several columns make
//!   activations dear), a CTA on one row tile: its warps stride over the spans, leave partial sums in shared memory, and
//!   add them in order. Warps per CTA by shape (`warps`). One column has a kernel of its own, `mmvq_column`.
//! * Bytes: the weights once, plus n_cols · (k · 1.25 + 4 · n_rows). FLOPs: 2 · n_rows · n_cols · k.
//!
//! Done for speed: (1) a span's weights come by 128-bit coalesced loads, all issued before the first is used, past L1;
//! the span after that comes to L2 meanwhile, as the first does while the kernel waits for earlier launches;
//! (2) a warp stages its span's activations in shared memory, whose loads are broadcasts; with (1) in flight together,
//! so that a span costs one latency; (3) the integer sum starts at the bits of 1.5·2^23 less the bias's part, so that it
//! is a float after one subtraction, without a conversion or a correction per row.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

use crate::tile::SPAN_GROUPS;

/// Most warps of a CTA.
#[cfg(not(target_arch = "nvptx64"))]
const MAX_WARPS: u32 = 16;
/// Shared memory that a CTA may take: what every GPU gives without being asked.
#[cfg(not(target_arch = "nvptx64"))]
const SMEM_BYTES: u32 = 48 * 1024;
/// Row tiles that a warp holds at a time. Shared memory delivers 128 bytes a cycle, broadcasts included: 8 columns of a
/// group take 80 cycles, a 4-bit group of 32 rows only 40 of HBM's time. So activations serve two tiles where registers
/// (48 words per tile at most) allow.
const fn tiles_per_warp(span_bytes: usize, n_cols: usize) -> usize {
    if n_cols >= 4 && span_bytes <= 4 * 48 { 2 } else { 1 }
}

/// Columns for which a group is unpacked once. Without dp4a eight of them do not fit the registers.
#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
const fn columns_at_once(n_cols: usize) -> usize {
    if cfg!(all(target_arch = "nvptx64", not(sm_ge_61))) && n_cols > 4 { 4 } else { n_cols }
}

/// Words of a group's scale and its companions in shared memory: what the halves do not share comes twice.
const fn scale_words(scale_elems: usize) -> u32 {
    if scale_elems == 16 { 4 } else { 2 }
}

/// Bytes of a span's activations in shared memory, of all columns.
pub(super) const fn stage_bytes(scale_elems: usize, n_cols: usize) -> u32 {
    (n_cols * SPAN_GROUPS) as u32 * (32 + 4 * scale_words(scale_elems))
}

/// Shared memory of the kernel of one column beside book, stages and partial sums: squares per span.
pub(super) const COLUMN_FIXED_BYTES: u32 = 4 * 32;

/// What the parts have in common.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct Shape {
    pub(super) n_groups: u32,
    n_cols: u32,
    /// Items of work between two folds of the partial sums.
    pub(super) window: u32,
    /// In a mixture: pairs that share a row of activations.
    pub(super) pairs_per_x: u32,
}

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
pub(super) mod gpu {
    use quant::act::ActKind;
    use quant::{BlockFormat, Group};

    use super::{Shape, scale_words, stage_bytes};
    use crate::device::math::{self, dp4a_us, fma};
    use crate::device::{Glb, Smem, U32x2, U32x4, grid, sync, thread, warp};
    use crate::kernels::lookup::{SharedBook, book_bytes};
    use crate::kernels::product::{Gate, Part, choose};
    use crate::kernels::quantise_act::ActScale;
    use crate::kernels::quantise_act::gpu::{Target, span_to};
    use crate::tile::{ROWS, SPAN_GROUPS, Tiled, block, load_span};

    /// The f32 1.5·2^23: its bits plus an integer below 2^22 in size are the bits of the sum.
    const MAGIC: f32 = 12_582_912.0;

    /// What a group's activations bring beside their codes, prepared once for all rows.
    #[derive(Clone, Copy)]
    struct Staged {
        d: f32,
        /// Where the integer sums of the two halves start (of both, if they share a scale).
        start: [i32; 2],
        /// What the offsets multiply.
        value: [f32; 2],
    }

    impl Staged {
        #[inline(always)]
        fn prepare<F: BlockFormat>(act: ActScale) -> [u32; 4] {
            const { assert!(F::BIAS == 0 || !F::HAS_OFFSET) };
            // Q8_1 keeps the offset's value where the others keep the sums.
            const { assert!(!matches!(F::ACT, ActKind::Q8_1) || (F::HAS_OFFSET && F::SCALE_ELEMS != 16)) };
            let d = act.d.to_bits();
            if matches!(F::ACT, ActKind::Q8_1) {
                return [d, act.extra, 0, 0];
            }
            let [first, second] = act.sums();
            let start = |sum: i32| (MAGIC.to_bits() as i32 - F::BIAS * sum) as u32;
            let value = |sum: i32| math::mul(act.d, sum as f32).to_bits();
            match (F::HAS_OFFSET, F::SCALE_ELEMS == 16) {
                (false, false) => [d, start(first + second), 0, 0],
                (false, true) => [d, start(first), start(second), 0],
                (true, false) => [d, value(first + second), 0, 0],
                (true, true) => [d, value(first), value(second), 0],
            }
        }

        #[inline(always)]
        #[track_caller]
        fn load<F: BlockFormat>(from: Smem<u32>, i: u32) -> Staged {
            let [d, a, b] = if F::SCALE_ELEMS == 16 {
                let U32x4([d, a, b, _]) = from.cast::<U32x4>().ld(i);
                [d, a, b]
            } else {
                let U32x2([d, a]) = from.cast::<U32x2>().ld(i);
                [d, a, 0]
            };
            let start = if F::HAS_OFFSET { [MAGIC.to_bits() as i32; 2] } else { [a as i32, b as i32] };
            let value = if F::HAS_OFFSET { [a, b].map(f32::from_bits) } else { [0.0; 2] };
            Staged { d: f32::from_bits(d), start, value }
        }
    }

    /// `acc` plus the dot product of a weight group and an activation group; the order is `BlockFormat::dot_group`'s.
    #[inline(always)]
    fn dot<F: BlockFormat>(group: &Group, q: [u32; 8], act: Staged, mut acc: f32) -> f32 {
        let sum = |start: i32, from: usize, to: usize| {
            let mut sum = start;
            let mut i = from;
            while i < to {
                sum = dp4a_us(group.codes[i], q[i], sum);
                i += 1;
            }
            // Exact: both are integers below 2^24.
            f32::from_bits(sum as u32) - MAGIC
        };
        if F::SCALE_ELEMS == 16 {
            acc = fma(group.scale[0] * act.d, sum(act.start[0], 0, 4), acc);
            acc = fma(group.scale[1] * act.d, sum(act.start[1], 4, 8), acc);
        } else {
            acc = fma(group.scale[0] * act.d, sum(act.start[0], 0, 8), acc);
        }
        if F::HAS_OFFSET {
            acc = fma(group.offset[0], act.value[0], acc);
            if F::SCALE_ELEMS == 16 {
                acc = fma(group.offset[1], act.value[1], acc);
            }
        }
        acc
    }

    /// A span's activations in shared memory.
    #[derive(Clone, Copy)]
    pub(crate) struct Stage {
        codes: Smem<u32>,
        scales: Smem<u32>,
    }

    impl Stage {
        #[inline(always)]
        pub(crate) fn at<F: BlockFormat, const COLS: usize>(offset: u32) -> Stage {
            let groups = (COLS * SPAN_GROUPS) as u32;
            Stage {
                codes: Smem::dynamic(offset, 8 * groups),
                scales: Smem::dynamic(offset + 32 * groups, scale_words(F::SCALE_ELEMS) * groups),
            }
        }

        /// Sets the scale of group `group` of the stage.
        #[inline(always)]
        #[track_caller]
        fn set_scale<F: BlockFormat>(self, group: u32, act: ActScale) {
            let staged = Staged::prepare::<F>(act);
            if F::SCALE_ELEMS == 16 {
                self.scales.cast::<U32x4>().st(group, U32x4(staged));
            } else {
                self.scales.cast::<U32x2>().st(group, U32x2([staged[0], staged[1]]));
            }
        }

        /// Fills it with one column's values as [`span_to`] takes them, quantised; zeros beyond a short span. The warp calls
        /// together.
        #[inline(always)]
        #[track_caller]
        pub(crate) fn quantise<F: BlockFormat>(self, v: [[f32; 4]; 2]) {
            span_to(F::ACT, v, Staging::<F> { stage: self, format: core::marker::PhantomData }, 0);
        }

        /// Fills the stages, `stages` and on, of spans `first_span` to `end_span` of one column, whose `n` groups start at
        /// group `column` of the arrays. Groups beyond a short span become zeros. The CTA calls together.
        #[inline(always)]
        #[track_caller]
        pub(crate) fn fill_all<F: BlockFormat>(
            stages: u32,
            q: Glb<U32x4>,
            scales: Glb<U32x2>,
            column: u32,
            n: u32,
            first_span: u32,
            end_span: u32,
        ) {
            let (tid, threads) = (thread::thread_idx_x(), thread::block_dim_x());
            let groups = SPAN_GROUPS as u32;
            let first = first_span * groups;
            let end = end_span * groups - first;
            let stage = |group: u32| {
                Stage::at::<F, 1>(stages + group / groups * super::stage_bytes(F::SCALE_ELEMS, 1))
            };
            // A group is two vectors of codes and a pair of words; the loads of four groups per thread are under way, more
            // than 448 threads have of 14,336 values.
            let mut at = tid;
            while at < 2 * end {
                let (mut codes, mut acts) = ([U32x4([0; 4]); 4], [U32x2([0; 2]); 2]);
                unroll!(I in 0..4 {
                    let i = at + I as u32 * threads;
                    if i < 2 * end && first + i / 2 < n {
                        codes[I] = q.ld_nc(2 * (column + first) + i);
                    }
                });
                // Half as many groups as vectors: those of the first half of the same stretch.
                let group = (at - tid) / 2 + tid;
                unroll!(I in 0..2 {
                    let i = group + I as u32 * threads;
                    if i < end && first + i < n {
                        acts[I] = scales.ld_nc(column + first + i);
                    }
                });
                unroll!(I in 0..4 {
                    let i = at + I as u32 * threads;
                    if i < 2 * end {
                        stage(i / 2).codes.cast::<U32x4>().st(i % (2 * groups), codes[I]);
                    }
                });
                unroll!(I in 0..2 {
                    let i = group + I as u32 * threads;
                    if i < end {
                        let U32x2([d, extra]) = acts[I];
                        stage(i).set_scale::<F>(i % groups, ActScale { d: f32::from_bits(d), extra });
                    }
                });
                at += 4 * threads;
            }
        }

        /// Fills it with `n` groups from group `column(c)` of each column c; the span's other groups become zeros. The
        /// warp calls together.
        #[inline(always)]
        #[track_caller]
        pub(crate) fn fill<F: BlockFormat, const COLS: usize>(
            self,
            q: Glb<U32x4>,
            scales: Glb<U32x2>,
            n: u32,
            column: impl Fn(u32) -> u32,
        ) {
            let lane = thread::lane_id();
            let groups = SPAN_GROUPS as u32;
            let (n_vectors, n_scales) = (COLS as u32 * 2 * groups, COLS as u32 * groups);
            // At most 8 columns of 16 vectors: 4 per lane; 8 scales: 2 per lane.
            let (mut codes, mut acts) = ([U32x4([0; 4]); 4], [U32x2([0; 2]); 2]);
            let mut i = 0;
            while 32 * i < n_vectors as usize {
                let at = lane + 32 * i as u32;
                let (c, v) = (at / (2 * groups), at % (2 * groups));
                if at < n_vectors && v < 2 * n {
                    codes[i] = q.ld_nc(2 * column(c) + v);
                }
                i += 1;
            }
            let mut i = 0;
            while 32 * i < n_scales as usize {
                let at = lane + 32 * i as u32;
                let (c, g) = (at / groups, at % groups);
                if at < n_scales && g < n {
                    acts[i] = scales.ld_nc(column(c) + g);
                }
                i += 1;
            }
            // All lanes have read what was here before.
            warp::sync_warp();
            let mut i = 0;
            while 32 * i < n_vectors as usize {
                let at = lane + 32 * i as u32;
                if at < n_vectors {
                    self.codes.cast::<U32x4>().st(at, codes[i]);
                }
                i += 1;
            }
            let mut i = 0;
            while 32 * i < n_scales as usize {
                let at = lane + 32 * i as u32;
                if at < n_scales {
                    let U32x2([d, extra]) = acts[i];
                    self.set_scale::<F>(at, ActScale { d: f32::from_bits(d), extra });
                }
                i += 1;
            }
            warp::sync_warp();
        }
    }

    /// A stage as what quantised values are written to.
    struct Staging<F> {
        stage: Stage,
        format: core::marker::PhantomData<F>,
    }
    impl<F> Clone for Staging<F> {
        #[inline(always)]
        fn clone(&self) -> Self {
            *self
        }
    }
    impl<F> Copy for Staging<F> {}

    impl<F: BlockFormat> Target for Staging<F> {
        #[inline(always)]
        #[track_caller]
        fn codes(self, i: u32, word: u32) {
            self.stage.codes.st(i, word);
        }
        #[inline(always)]
        #[track_caller]
        fn scale(self, group: u32, scale: ActScale) {
            self.stage.set_scale::<F>(group, scale);
        }
    }

    /// The sums over a span, of which `n` groups are there: of the lane's row of each of `TILES` row tiles, and of
    /// `AT_ONCE` columns from column `first` of the stage on.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn span_sums<F: BlockFormat + Tiled, const AT_ONCE: usize, const TILES: usize>(
        words: &[F::Words; TILES],
        stage: Stage,
        first: u32,
        n: u32,
        book: SharedBook,
    ) -> [[f32; AT_ONCE]; TILES] {
        const { assert!(SPAN_GROUPS == 8) };
        let groups = SPAN_GROUPS as u32;
        // ptxas would schedule all groups at once, take the registers of two, and spill. A branch that always goes one
        // way keeps it to one; other warps hide the latency.
        let groups_left = math::opaque(groups);
        let mut acc = [[0.0f32; AT_ONCE]; TILES];
        unroll!(G in 0..8 {
            if (G as u32) < groups_left {
                let weights: [Group; TILES] = core::array::from_fn(|t| {
                    block::<F>(&words[t], G / F::GROUPS).unpack_group_by(G % F::GROUPS, book)
                });
                let mut c = 0;
                while c < AT_ONCE {
                    let at = (first + c as u32) * groups + G as u32;
                    let codes = stage.codes.cast::<U32x4>();
                    let [U32x4(low), U32x4(high)] = [codes.ld(2 * at), codes.ld(2 * at + 1)];
                    let act = Staged::load::<F>(stage.scales, at);
                    let codes = [low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]];
                    let mut t = 0;
                    while t < TILES {
                        let sum = dot::<F>(&weights[t], codes, act, acc[t][c]);
                        // Groups beyond a short span hold nothing; without a branch.
                        let there = F::ELEMS == crate::tile::SPAN || (G as u32) < n;
                        acc[t][c] = if there { sum } else { acc[t][c] };
                        t += 1;
                    }
                    c += 1;
                }
            }
        });
        acc
    }

    /// The kernel; `TILES` row tiles per warp, `AT_ONCE` of the `COLS` columns for each unpacking.
    #[inline(always)]
    pub(super) fn mmvq<
        F: BlockFormat + Tiled,
        const COLS: usize,
        const AT_ONCE: usize,
        const TILES: usize,
    >(
        p0: Part,
        p1: Part,
        p2: Part,
        q: Glb<U32x4>,
        scales: Glb<U32x2>,
        ids: Glb<u32>,
        gate: Gate,
        shape: Shape,
    ) {
        let (lane, warp_id) = (thread::lane_id(), thread::warp_id());
        let n_warps = thread::block_dim_x() / thread::WARP;
        let part = choose(p0, p1, p2);
        let gated_pair = gate.is_some();

        // In a mixture a column is a (token, slot) pair.
        let pair = thread::block_idx_y();
        let mixture = !ids.is_null();
        if mixture {
            // Which weights these are an earlier launch says.
            grid::wait_for_earlier();
        }
        let expert = if mixture { ids.ld_nc(pair) } else { 0 };
        let first_x = if mixture { pair / shape.pairs_per_x } else { 0 };
        let last_column = shape.n_cols - 1;

        let groups = SPAN_GROUPS as u32;
        let n_spans = shape.n_groups.div_ceil(groups);
        let k = shape.n_groups as usize * quant::format::GROUP;
        let tile_bytes = F::LAYOUT.tile_bytes(k);
        let n_tiles = part.n_rows.div_ceil(ROWS as u32);
        let first_tile = (thread::block_idx_x() - part.first_cta) * TILES as u32;
        let matrix = (expert as usize * n_tiles as usize) * tile_bytes;

        // Shared memory: the format's codebook, a stage per warp, totals, partial sums.
        let book = SharedBook::fill(F::BOOK, 0);
        if F::BOOK.n_words() != 0 {
            sync::sync_threads();
        }
        let (stages, stage_bytes) = (book_bytes(F::BOOK), stage_bytes(F::SCALE_ELEMS, COLS));
        let stage = Stage::at::<F, COLS>(stages + warp_id * stage_bytes);
        let outputs = (TILES * COLS * ROWS) as u32;
        let sums = stages + n_warps * stage_bytes;
        let totals: Smem<f32> = Smem::dynamic(sums, 2 * outputs);
        let partials: Smem<f32> = Smem::dynamic(sums + 8 * outputs, shape.window * outputs);

        // An item is a span of one matrix; gate and up alternate.
        let n_items = if gated_pair { 2 * n_spans } else { n_spans };
        let item_of = |item: u32| if gated_pair { (item / 2, item % 2 == 1) } else { (item, false) };
        let groups_of = |span: u32| {
            if F::ELEMS == crate::tile::SPAN || span + 1 < n_spans {
                groups
            } else {
                shape.n_groups - span * groups
            }
        };
        // Where a tile's part of an item lies; tiles beyond the last do the last one's work again.
        let span_of = |item: u32, t: usize| {
            let (span, second) = item_of(item);
            let tile = first_tile + t as u32;
            let tile = if tile < n_tiles { tile } else { n_tiles - 1 };
            let at = matrix + tile as usize * tile_bytes + F::LAYOUT.span_offset(span as usize);
            (if second { p1.w } else { part.w }).offset(at)
        };
        let units_of = |item: u32| {
            if F::ELEMS == crate::tile::SPAN || groups_of(item_of(item).0) == groups {
                F::LAYOUT.span_units() as u32
            } else {
                F::LAYOUT.tail_units(k) as u32
            }
        };
        let prefetch = |item: u32| {
            if item < n_items && lane == 0 {
                let bytes = units_of(item) * (ROWS * F::LAYOUT.unit_bytes) as u32;
                let mut t = 0;
                while t < TILES {
                    span_of(item, t).prefetch(bytes);
                    t += 1;
                }
            }
        };
        let load = |item: u32| {
            let words = core::array::from_fn::<F::Words, TILES, _>(|t| {
                load_span::<F>(span_of(item, t), units_of(item))
            });
            // The warp's next item comes to L2 meanwhile.
            prefetch(item + n_warps);
            words
        };

        let mut start = 0;
        let mut item = warp_id;
        prefetch(item);
        if !mixture {
            grid::wait_for_earlier();
        }
        loop {
            let end = if start + shape.window < n_items { start + shape.window } else { n_items };
            while item < end {
                let (span, _) = item_of(item);
                let n = groups_of(span);
                let column = |c: u32| {
                    let c = first_x + if c < last_column { c } else { last_column };
                    c * shape.n_groups + span * groups
                };
                let mut words = load(item);
                stage.fill::<F, COLS>(q, scales, n, column);

                let columns_left = if AT_ONCE == COLS { COLS as u32 } else { math::opaque(COLS as u32) };
                let mut first = 0;
                while first < columns_left {
                    if AT_ONCE != COLS {
                        // Nothing the compiler knows to be zero: else it would unpack before the loop, and spill.
                        let zero = math::opaque(first) >> 31;
                        words.iter_mut().for_each(|w| w.as_mut().iter_mut().for_each(|word| *word ^= zero));
                    }
                    let acc = span_sums::<F, AT_ONCE, TILES>(&words, stage, first, n, book);
                    let mut t = 0;
                    while t < TILES {
                        let mut c = 0;
                        while c < AT_ONCE {
                            let line = (t * COLS + c) as u32 + first;
                            let output = line * ROWS as u32 + lane;
                            partials.st((item - start) * outputs + output, acc[t][c]);
                            c += 1;
                        }
                        t += 1;
                    }
                    first += AT_ONCE as u32;
                }
                item += n_warps;
            }
            sync::sync_threads();

            let last = end == n_items;
            let mut output = thread::thread_idx_x();
            while output < outputs {
                // The sum so far, then the window's spans in order.
                let sum_of = |second: u32| {
                    let step = if gated_pair { 2 } else { 1 };
                    let mut item = second;
                    let mut sum = if start == 0 {
                        item += step;
                        partials.ld(second * outputs + output)
                    } else {
                        totals.ld(second * outputs + output)
                    };
                    while item < end - start {
                        sum += partials.ld(item * outputs + output);
                        item += step;
                    }
                    sum
                };
                let sum = sum_of(0);
                let up = if gated_pair { sum_of(1) } else { 0.0 };
                if last {
                    let column = output / ROWS as u32 % COLS as u32;
                    let tile = first_tile + output / (COLS * ROWS) as u32;
                    let row = tile * ROWS as u32 + output % ROWS as u32;
                    if row < part.n_rows && column <= last_column {
                        part.finish(gate, p1, expert, pair + column, row, [sum, up]);
                    }
                } else {
                    totals.st(output, sum);
                    if gated_pair {
                        totals.st(outputs + output, up);
                    }
                }
                output += thread::block_dim_x();
            }
            if last {
                break;
            }
            // The partial sums are free again.
            sync::sync_threads();
            start = end;
            item = start + warp_id;
        }
    }
}

/// Entries of every format, by number of columns, and the function that names them.
macro_rules! entries {
    ([] $($id:ident => $module:ident :: Block,)*) => {
        #[cfg(any(target_arch = "nvptx64", feature = "emu"))]
        kernels! {
            in "mmvq";
            ONE: threads(512), early;
            fn (
                p0: Part, p1: Part, p2: Part, q: Glb<U32x4>, scales: Glb<U32x2>, ids: Glb<u32>, gate: Gate, shape: Shape,
                norm: Glb<F32x4>, eps: f32,
            );
            $(
                concat!("mmvq_", stringify!($id), "_n1") => mmvq_column::<formats::$module::Block>;
            )*
        }

        #[cfg(any(target_arch = "nvptx64", feature = "emu"))]
        kernels! {
            in "mmvq";
            FEW: threads(512), early;
            fn (p0: Part, p1: Part, p2: Part, q: Glb<U32x4>, scales: Glb<U32x2>, ids: Glb<u32>, gate: Gate, shape: Shape);
            $(
                concat!("mmvq_", stringify!($id), "_n2") => entries!(@entry $module, 2);
            )*
        }

        #[cfg(any(target_arch = "nvptx64", feature = "emu"))]
        kernels! {
            in "mmvq";
            MORE: threads(256), early;
            fn (p0: Part, p1: Part, p2: Part, q: Glb<U32x4>, scales: Glb<U32x2>, ids: Glb<u32>, gate: Gate, shape: Shape);
            $(
                concat!("mmvq_", stringify!($id), "_n4") => entries!(@entry $module, 4);
                concat!("mmvq_", stringify!($id), "_n8") => entries!(@entry $module, 8);
            )*
        }

        /// Entry of a format for up to `n_cols` columns.
        #[cfg(not(target_arch = "nvptx64"))]
        fn entry(format: quant::FormatId, n_cols: usize) -> Option<EntryShape> {
            let (names, scale_elems, book) = match format {
                $(
                    quant::FormatId::$id => (
                        [
                            concat!("mmvq_", stringify!($id), "_n1"),
                            concat!("mmvq_", stringify!($id), "_n2"),
                            concat!("mmvq_", stringify!($id), "_n4"),
                            concat!("mmvq_", stringify!($id), "_n8"),
                        ],
                        <quant::formats::$module::Block as BlockFormat>::SCALE_ELEMS,
                        <quant::formats::$module::Block as BlockFormat>::BOOK,
                    ),
                )*
                _ => return None,
            };
            let i = n_cols.next_power_of_two().ilog2() as usize;
            Some(EntryShape {
                name: names.get(i)?,
                n_cols: 1 << i,
                stage_bytes: stage_bytes(scale_elems, 1 << i),
                book_bytes: lookup::book_bytes(book),
            })
        }

        /// Every format at one column and at eight; the edges of rows, of k and of the column counts; every epilogue.
        #[cfg(not(target_arch = "nvptx64"))]
        const CASES: &[host::Case] = &[
            $(
                host::Case { rows: &[37], k: 512, ..host::Case::of(quant::FormatId::$id) },
                host::Case { rows: &[6], k: 512, x: host::X::Floats, ..host::Case::of(quant::FormatId::$id) },
                host::Case { rows: &[5], k: 256, n_cols: 8, ..host::Case::of(quant::FormatId::$id) },
            )*
            host::Case { rows: &[4], k: 32, n_cols: 2, ..host::Case::of(quant::FormatId::Q4_0) },
            host::Case { rows: &[33], k: 1056, n_cols: 3, ..host::Case::of(quant::FormatId::Q8_0) },
            host::Case { rows: &[65], k: 1280, n_cols: 4, ..host::Case::of(quant::FormatId::Q4_K) },
            host::Case { rows: &[1], k: 768, n_cols: 5, ..host::Case::of(quant::FormatId::Q6_K) },
            host::Case { rows: &[96], k: 2304, n_cols: 7, ..host::Case::of(quant::FormatId::IQ3_XXS) },
            host::Case { rows: &[64], k: 576, n_cols: 8, ..host::Case::of(quant::FormatId::Q5_1) },
            host::Case { rows: &[35], k: 576, x: host::X::Floats, ..host::Case::of(quant::FormatId::Q4_1) },
            host::Case { rows: &[33, 33], k: 2080, glu: Some(Glu::Silu), x: host::X::Floats, ..host::Case::of(quant::FormatId::Q8_0) },
            host::Case { rows: &[33], k: 768, n_cols: 2, mixture: Some((4, 2, true)), x: host::X::Floats, ..host::Case::of(quant::FormatId::Q4_K) },
            host::Case { rows: &[35, 5], k: 576, x: host::X::Normed, ..host::Case::of(quant::FormatId::Q4_0) },
            host::Case { rows: &[33, 33], k: 4096, glu: Some(Glu::Silu), x: host::X::Normed, ..host::Case::of(quant::FormatId::Q4_K) },
            host::Case { rows: &[64, 64], k: 288, glu: Some(Glu::Silu), acts: true, ..host::Case::of(quant::FormatId::Q4_0) },
            host::Case { rows: &[96, 96], k: 512, glu: Some(Glu::Gelu), x: host::X::Normed, acts: true, ..host::Case::of(quant::FormatId::Q4_1) },
            host::Case { rows: &[2, 2], k: 256 * 60, glu: Some(Glu::Silu), x: host::X::Floats, ..host::Case::of(quant::FormatId::IQ2_S) },
            // More spans than fit shared memory at a time.
            host::Case { rows: &[3], k: 256 * 130 + 64, extras: true, ..host::Case::of(quant::FormatId::Q4_0) },
            host::Case { rows: &[2, 2], k: 256 * 90, glu: Some(Glu::Silu), ..host::Case::of(quant::FormatId::IQ2_XXS) },
            // More spans than fit the partial sums at a time.
            host::Case { rows: &[3], k: 256 * 40 + 32, n_cols: 8, ..host::Case::of(quant::FormatId::Q4_1) },
            host::Case { rows: &[40, 8, 33], k: 288, extras: true, ..host::Case::of(quant::FormatId::Q5_0) },
            host::Case { rows: &[70, 10], k: 512, n_cols: 4, extras: true, ..host::Case::of(quant::FormatId::Q4_0) },
            host::Case { rows: &[45, 45], k: 1024, glu: Some(Glu::Silu), ..host::Case::of(quant::FormatId::Q4_K) },
            host::Case { rows: &[70, 70], k: 320, n_cols: 8, glu: Some(Glu::Gelu), extras: true, ..host::Case::of(quant::FormatId::Q8_0) },
            host::Case { rows: &[9, 9], k: 256 * 12, n_cols: 8, glu: Some(Glu::Silu), ..host::Case::of(quant::FormatId::Q4_0) },
            host::Case { rows: &[40], k: 256, n_cols: 3, mixture: Some((5, 2, false)), ..host::Case::of(quant::FormatId::Q4_0) },
            host::Case { rows: &[33], k: 512, n_cols: 2, mixture: Some((4, 3, true)), extras: true, ..host::Case::of(quant::FormatId::Q6_K) },
            host::Case {
                rows: &[34, 34], k: 96, n_cols: 2, mixture: Some((4, 2, false)), extras: true,
                glu: Some(Glu::SwigluOai { alpha: 1.702, limit: 1.0 }), ..host::Case::of(quant::FormatId::MXFP4)
            },
        ];
    };
    (@entry $module:ident, $n:literal) => {
        gpu::mmvq::<
            formats::$module::Block,
            $n,
            { columns_at_once($n) },
            { tiles_per_warp(<formats::$module::Block as Tiled>::LAYOUT.span_bytes, $n) },
        >
    };
}

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
use {
    crate::device::{F32x4, Glb, U32x2, U32x4},
    crate::kernels::mmvq_column::mmvq_column,
    crate::kernels::product::{Gate, Part},
    crate::tile::Tiled,
    quant::formats,
};
#[cfg(not(target_arch = "nvptx64"))]
use {
    crate::kernels::{lookup, product::Glu},
    quant::BlockFormat,
};
quant::for_each_block_format!(entries![]);

/// What the launcher must know of an entry.
#[cfg(not(target_arch = "nvptx64"))]
struct EntryShape {
    name: &'static str,
    n_cols: usize,
    stage_bytes: u32,
    book_bytes: u32,
}

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use alloc::{boxed::Box, vec, vec::Vec};

    use quant::act::ActKind;
    use quant::{ActGroup, BlockFormat, FloatFormat, FormatId, Visitor, info, with_format};

    use super::{COLUMN_FIXED_BYTES, MAX_WARPS, SMEM_BYTES, tiles_per_warp};
    use crate::case::{Buffer, Expected, Kernel, Problem, Random, bytes_of};
    use crate::kernels::output::{self, Output};
    use crate::kernels::product::{
        AS_Q8_0, AS_Q8_1, Args, Glu, Matrix, Mixture, epilogue_reference, with_parts, with_quantising_gate,
    };
    use crate::kernels::quantise_act::ActScale;
    use crate::kernels::{quantise_act, rms_norm};
    use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};
    use crate::tile::{self, ROWS, SPAN, SPAN_GROUPS, TileLayout};

    /// Most columns of one launch.
    pub const MAX_COLS: usize = 8;

    /// The definition: one row and one column; each group's own sum as `quant` defines it, their sum in f64.
    pub fn reference<F: BlockFormat>(row: &[F], column: &[ActGroup]) -> f64 {
        let groups = row.iter().flat_map(|block| (0..F::GROUPS).map(move |g| (block, g)));
        groups.zip(column).map(|((block, g), act)| f64::from(block.dot_group(g, act, 0.0))).sum()
    }

    /// The same as kernels must compute it, bit for bit: a chain per span, spans in order.
    pub fn reference_bits<F: BlockFormat>(row: &[F], column: &[ActGroup]) -> f32 {
        let span = |(blocks, groups): (&[F], &[ActGroup])| {
            let at = (0..groups.len()).map(|g| (&blocks[g / F::GROUPS], g % F::GROUPS));
            at.zip(groups).fold(0.0, |sum, ((block, g), act)| block.dot_group(g, act, sum))
        };
        let spans = row.chunks(SPAN / F::ELEMS).zip(column.chunks(SPAN_GROUPS)).map(span);
        spans.reduce(|total, span| total + span).unwrap_or(0.0)
    }

    /// Warps of a CTA, by shape alone: enough that all CTAs together fill the machine, no more than there is work for, and
    /// such that all have about equally much.
    ///
    /// An SM has registers for 16 warps. With as many row tiles as SMs (an H100 has 132) it holds one CTA of all of them:
    /// 16 spans (73 KB of a 4-bit format) are under way. With more, 8, so that an SM holds two CTAs and nobody waits for
    /// a second round. The entries for many columns need the registers of 16 warps for 8.
    fn warps(n_ctas: u32, n_items: u32, n_cols: usize) -> u32 {
        let most = if n_cols <= 2 && n_ctas <= 132 { MAX_WARPS } else { MAX_WARPS / 2 };
        n_items.div_ceil(n_items.div_ceil(most))
    }

    /// A norm of the activations before the product.
    #[derive(Clone, Copy, Debug, PartialEq)]
    pub struct Norm {
        /// f32 `[k]`
        pub weight: DevicePtr,
        /// Added to the mean square.
        pub eps: f32,
    }

    /// Longest row of f32 that a kernel quantises on the way: its activations, the partial sums of gate and up and a
    /// codebook fit shared memory together.
    pub const MAX_FLOATS_K: usize = 60 * SPAN;

    /// Longest row that is normed on the way: `rms_norm`'s sum of more than 32 spans has another order.
    pub const MAX_NORM_K: usize = 32 * SPAN;

    /// What a product of one column may do besides.
    #[derive(Clone, Copy, Debug, Default, PartialEq)]
    pub struct Besides {
        /// Norm its activations, which are f32.
        pub norm: Option<Norm>,
        /// Write what gate and up give quantised, as `quantise_act` would: codes to the first matrix's `y`, scales to the
        /// second's. Not as Q8K, whose super-blocks span CTAs.
        pub acts: Option<ActKind>,
    }

    /// One launch for all matrices.
    pub fn launch(args: &Args<'_>) -> Result<Launch, LaunchError> {
        launch_with(args, Besides::default())
    }

    /// [`launch`] of one column with more than the product.
    pub fn launch_with(args: &Args<'_>, besides: Besides) -> Result<Launch, LaunchError> {
        let Besides { norm, acts } = besides;
        let kernel = Mmvq::NAME;
        let check = Check(kernel);
        let columns = if args.mixture.is_some() { 1 } else { args.n_cols };
        if !(1..=MAX_COLS).contains(&columns) {
            let got = args.n_cols as u64;
            return Err(LaunchError::Shape { kernel, what: "n_cols", expected: "1 to 8", got });
        }
        if args.scales == DevicePtr::NULL && columns != 1 {
            return Err(check.shape("n_cols of f32", "1", columns));
        }
        if let Some(norm) = norm {
            check.aligned("norm", norm.weight, 16)?;
            if args.scales != DevicePtr::NULL || norm.weight == DevicePtr::NULL {
                return Err(check.shape("norm", "a weight, and f32 activations", columns));
            }
            if args.k > MAX_NORM_K {
                return Err(check.shape("k of normed activations", "at most 8192", args.k));
            }
        }
        let mark = match acts {
            None => 0,
            Some(ActKind::Q8_0) => AS_Q8_0,
            Some(ActKind::Q8_1) => AS_Q8_1,
            Some(ActKind::Q8K) => return Err(check.shape("kind of quantised results", "Q8_0 or Q8_1", 2)),
        };
        if acts.is_some() {
            let ([gate, up], None) = (args.parts, args.mixture) else {
                return Err(check.shape("parts of quantised results", "gate and up", args.parts.len()));
            };
            if args.glu.is_none()
                || columns != 1
                || up.y == DevicePtr::NULL
                || gate.residual != DevicePtr::NULL
            {
                return Err(check.shape(
                    "columns of quantised results",
                    "1, gated, without residual",
                    columns,
                ));
            }
            check.multiple("n_rows of quantised results", gate.n_rows, ROWS, "a multiple of 32")?;
            check.aligned("scales of the results", up.y, 8)?;
        }
        if args.scales == DevicePtr::NULL && args.k > MAX_FLOATS_K {
            return Err(check.shape("k of f32", "at most 15360", args.k));
        }
        let entry = super::entry(args.format, columns);
        let super::EntryShape { name, n_cols, stage_bytes, book_bytes } =
            entry.ok_or(LaunchError::Format { kernel, format: args.format })?;
        let format = info(args.format);
        check.multiple("k", args.k, format.elems, "a multiple of the format's block")?;
        let k = check.size("k", args.k)?;
        for (what, at, align) in [("q", args.q, 16), ("scales", args.scales, 16)] {
            check.aligned(what, at, align)?;
        }
        let (ids, n_lines, pairs_per_x) = match args.mixture {
            None => (DevicePtr::NULL, 1, 1),
            Some(Mixture { ids, n_pairs, pairs_per_x }) => {
                check.aligned("ids", ids, 4)?;
                let n_pairs = check.grid("n_pairs", n_pairs)?;
                (ids, n_pairs, check.size("pairs_per_x", pairs_per_x)?)
            }
        };

        let layout = TileLayout::new(format.elems, format.bytes);
        let tiles = tiles_per_warp(layout.span_bytes, n_cols);
        let rows_per_cta = (tiles * ROWS) as u32;
        let (params, n_ctas) =
            with_parts(kernel, Params::new(), args.parts, args.glu, |rows| rows.div_ceil(rows_per_cta))?;

        let n_spans = k.div_ceil(SPAN as u32);
        let per_span = if args.glu.is_some() { 2 } else { 1 };
        let n_items = n_spans * per_span;
        let n_warps = warps(n_ctas.saturating_mul(n_lines), n_items, n_cols);
        let outputs_bytes = 4 * rows_per_cta * n_cols as u32;
        let (window, smem_bytes) = if n_cols == 1 {
            // Activations of the window's spans, and partial sums of its items.
            let span_bytes = stage_bytes + per_span * outputs_bytes;
            let fixed = book_bytes + COLUMN_FIXED_BYTES;
            let spans = n_spans.min((SMEM_BYTES - fixed) / span_bytes);
            (spans * per_span, fixed + spans * span_bytes)
        } else {
            let fixed = book_bytes + n_warps * stage_bytes + 2 * outputs_bytes;
            // Whole rounds of the warps, and gate and up together.
            let fits = (SMEM_BYTES - fixed) / outputs_bytes;
            let step = n_warps.next_multiple_of(2);
            let window = if fits >= n_items { n_items } else { (fits / step * step).max(2) };
            (window, fixed + window * outputs_bytes)
        };
        let params = params.with(args.q).with(args.scales).with(ids);
        let params = with_quantising_gate(params, args.glu, mark).with(k / 32).with(columns as u32);
        let mut params = params.with(window).with(pairs_per_x);
        if n_cols == 1 {
            let Norm { weight, eps } = norm.unwrap_or(Norm { weight: DevicePtr::NULL, eps: 0.0 });
            params = params.with(weight).with(eps);
        }
        Ok(Launch {
            entry: name,
            grid: [n_ctas, n_lines, 1],
            cta: 32 * n_warps,
            cluster: 1,
            smem_bytes,
            params,
        })
    }

    /// The row in the registry.
    #[derive(Debug)]
    pub struct Mmvq;

    /// One case.
    #[derive(Clone, Copy, Debug)]
    pub struct Case {
        /// The weights' format.
        pub format: FormatId,
        /// Rows of each matrix.
        pub rows: &'static [usize],
        /// Weights per row.
        pub k: usize,
        /// Columns; in a mixture tokens.
        pub n_cols: usize,
        /// Whether the two matrices are gate and up.
        pub glu: Option<Glu>,
        /// Whether there are biases and residuals.
        pub extras: bool,
        /// Experts, experts used, and whether each slot has activations of its own.
        pub mixture: Option<(usize, usize, bool)>,
        /// How the activations come.
        pub x: X,
        /// Whether gate and up's results are written quantised.
        pub acts: bool,
    }

    /// Form of a case's activations.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum X {
        /// Quantised.
        Acts,
        /// f32.
        Floats,
        /// f32, normed on the way.
        Normed,
    }

    impl Case {
        /// One row of 256, one column.
        pub const fn of(format: FormatId) -> Case {
            Case {
                format,
                rows: &[1],
                k: 256,
                n_cols: 1,
                glu: None,
                extras: false,
                mixture: None,
                x: X::Acts,
                acts: false,
            }
        }
    }

    /// Weights that are drawn and encoded afresh; larger matrices repeat them, since encoding some formats is slow.
    const FRESH_WEIGHTS: usize = 1 << 18;

    /// Random weights of a format, as bytes and decoded.
    pub struct Weights<'a>(pub &'a mut Random, pub usize);

    impl Visitor for Weights<'_> {
        type Output = (Vec<u8>, Vec<f32>);

        /// Formats with an encoder get encoded values. The others get random bytes, and of those only blocks that
        /// decode to numbers of ordinary size: a random scale may be infinite.
        fn block<F: BlockFormat>(self) -> Self::Output {
            let Weights(random, n) = self;
            let total = n;
            let n = n.min(FRESH_WEIGHTS);
            let mut blocks = vec![F::zeroed(); n / F::ELEMS];
            match F::ENCODE {
                quant::format::Encode::Yes => F::encode_row(&random.values(n), None, &mut blocks),
                quant::format::Encode::WithImportance => {
                    let values = random.values(n);
                    F::encode_row(&values, Some(&vec![1.0; n]), &mut blocks);
                }
                quant::format::Encode::No => {
                    let mut decoded = vec![0.0; F::ELEMS];
                    for block in &mut blocks {
                        loop {
                            bytemuck::bytes_of_mut(block).fill_with(|| random.bits() as u8);
                            block.decode(&mut decoded);
                            if decoded.iter().all(|v| v.abs() < 1e3) && decoded.iter().any(|v| v.abs() > 1e-3)
                            {
                                break;
                            }
                        }
                    }
                }
            }
            let blocks: Vec<F> = blocks.into_iter().cycle().take(total / F::ELEMS).collect();
            let mut decoded = vec![0.0; total];
            for (block, out) in blocks.iter().zip(decoded.chunks_mut(F::ELEMS)) {
                block.decode(out);
            }
            (bytemuck::cast_slice(&blocks).to_vec(), decoded)
        }

        fn float<F: FloatFormat>(self) -> Self::Output {
            let values: Vec<F> = self.0.values(self.1).into_iter().map(F::from_f32).collect();
            (bytemuck::cast_slice(&values).to_vec(), values.iter().map(|v| v.to_f32()).collect())
        }
    }

    /// Shapes to time: a down, an up, an attention and an output projection of an 8B model, at one and at eight columns;
    /// gate and up in one launch; experts of a mixture.
    /// Added to the mean square in cases.
    const EPS: f32 = 1e-5;

    const BENCH: &[Case] = &[
        bench(FormatId::Q4_0, 4096, 14336, 1),
        bench(FormatId::Q4_0, 4096, 14336, 4),
        bench(FormatId::Q4_0, 4096, 14336, 8),
        bench(FormatId::Q4_0, 14336, 4096, 1),
        bench(FormatId::Q4_0, 4096, 4096, 1),
        bench(FormatId::Q4_0, 128_256, 4096, 1),
        bench(FormatId::Q4_1, 4096, 14336, 1),
        bench(FormatId::Q8_0, 4096, 14336, 1),
        bench(FormatId::Q8_0, 4096, 14336, 8),
        bench(FormatId::Q2_K, 4096, 14336, 1),
        bench(FormatId::Q3_K, 4096, 14336, 1),
        bench(FormatId::Q4_K, 4096, 14336, 1),
        bench(FormatId::Q4_K, 4096, 14336, 8),
        bench(FormatId::Q5_K, 4096, 14336, 1),
        bench(FormatId::Q6_K, 4096, 14336, 1),
        bench(FormatId::Q6_K, 128_256, 4096, 1),
        bench(FormatId::MXFP4, 4096, 14336, 1),
        bench(FormatId::IQ1_S, 4096, 14336, 1),
        bench(FormatId::IQ2_XXS, 4096, 14336, 1),
        bench(FormatId::IQ2_XXS, 4096, 14336, 8),
        bench(FormatId::IQ2_XS, 4096, 14336, 1),
        bench(FormatId::IQ2_S, 4096, 14336, 1),
        bench(FormatId::IQ3_XXS, 4096, 14336, 1),
        bench(FormatId::IQ3_S, 4096, 14336, 1),
        bench(FormatId::IQ4_NL, 4096, 14336, 1),
        bench(FormatId::IQ4_XS, 4096, 14336, 1),
        Case { rows: &[14336, 14336], k: 4096, glu: Some(Glu::Silu), ..Case::of(FormatId::Q4_0) },
        Case { rows: &[4096, 1024, 1024], k: 4096, ..Case::of(FormatId::Q4_0) },
        Case { x: X::Floats, ..bench(FormatId::Q4_0, 4096, 14336, 1) },
        Case { x: X::Floats, ..bench(FormatId::Q4_0, 4096, 4096, 1) },
        Case {
            rows: &[14336, 14336],
            k: 4096,
            glu: Some(Glu::Silu),
            x: X::Normed,
            ..Case::of(FormatId::Q4_0)
        },
        Case { rows: &[768], k: 2048, mixture: Some((128, 8, false)), ..Case::of(FormatId::Q4_0) },
        Case { rows: &[768], k: 2048, mixture: Some((128, 8, false)), ..Case::of(FormatId::Q4_K) },
    ];

    const fn bench(format: FormatId, n_rows: usize, k: usize, n_cols: usize) -> Case {
        let rows: &[usize] = match n_rows {
            4096 => &[4096],
            14336 => &[14336],
            128_256 => &[128_256],
            _ => panic!("no such shape"),
        };
        Case { rows, k, n_cols, ..Case::of(format) }
    }

    /// All rows of a matrix, of weights given as bytes, times the activations.
    struct Product<'a> {
        blocks: &'a [u8],
        x: &'a [f32],
        k: usize,
    }

    impl Visitor for Product<'_> {
        type Output = (ActKind, Vec<f64>);

        fn block<F: BlockFormat>(self) -> Self::Output {
            let blocks: &[F] = bytemuck::cast_slice(self.blocks);
            let mut groups = vec![ActGroup::ZERO; self.x.len() / 32];
            ActGroup::quantise(F::ACT, self.x, &mut groups);
            let columns = groups.chunks(self.k / 32);
            let rows = || blocks.chunks(self.k / F::ELEMS);
            (F::ACT, columns.flat_map(|column| rows().map(|row| reference(row, column))).collect())
        }

        fn float<F: FloatFormat>(self) -> Self::Output {
            unreachable!("{:?} has no blocks", F::ID)
        }
    }

    /// A problem of one column with a norm before it or quantised results, which must have the bits of separate launches.
    fn both_ways(case: &Case, random: &mut Random) -> Problem {
        let Case { format, rows, k, glu, x: form, acts, .. } = *case;
        let kind = ActKindOf.of(format);
        let n_parts = rows.len();
        let n_outputs = if glu.is_some() { 1 } else { n_parts };
        let mut buffers: Vec<Buffer> = rows
            .iter()
            .map(|&n_rows| {
                let weights = with_format(format, Weights(random, n_rows * k));
                let (blocks, _) = weights.expect("cases name formats of weights");
                Buffer::Input(tile::pack(format, &blocks, n_rows, k))
            })
            .collect();
        let scale_bytes = |n: usize| n / 32 * size_of::<ActScale>();
        let zeros = |bytes: usize| Buffer::Input(vec![0; bytes]);
        buffers.extend([
            Buffer::Input(bytes_of(&random.values(k))),
            Buffer::Input(bytes_of(&random.values(k))),
            zeros(k),
            zeros(scale_bytes(k)),
        ]);
        // What the separate launches write, the floats first.
        let plain = buffers.len();
        buffers.extend(rows[..n_outputs].iter().map(|n_rows| zeros(4 * n_rows)));
        let checked: Vec<(usize, usize)> = if acts {
            let codes = buffers.len();
            buffers.extend([zeros(rows[0]), zeros(scale_bytes(rows[0]))]);
            vec![(codes, rows[0]), (codes + 1, scale_bytes(rows[0]))]
        } else {
            (0..n_outputs).map(|part| (plain + part, 4 * rows[part])).collect()
        };
        let outputs = buffers.len();
        let same = |(buffer, bytes)| Buffer::Output(Expected::Same { buffer, bytes });
        buffers.extend(checked.into_iter().map(same));

        let launches = move |at: &[DevicePtr]| {
            let [x, weight, q, scales] = at[n_parts..plain] else { unreachable!("four of these") };
            let parts = |y: &[DevicePtr]| -> Vec<Matrix> {
                let none = DevicePtr::NULL;
                let y = |p: usize| y.get(p).copied().unwrap_or(none);
                let part = |(p, &n_rows): (usize, &usize)| Matrix {
                    w: at[p],
                    bias: none,
                    residual: none,
                    y: y(p),
                    n_rows,
                };
                rows.iter().enumerate().map(part).collect()
            };
            let quantise = |x, q, scales, k| {
                quantise_act::launch(&quantise_act::Args { kind, x, q, scales, n_cols: 1, k })
            };
            let normed = form == X::Normed;
            let mut launches = vec![if normed {
                rms_norm::launch(&rms_norm::Args {
                    x,
                    residual: DevicePtr::NULL,
                    h: DevicePtr::NULL,
                    weight,
                    add: DevicePtr::NULL,
                    output: Output::Act(kind),
                    y: q,
                    scales,
                    n_rows: 1,
                    n: k,
                    eps: EPS,
                })?
            } else {
                quantise(x, q, scales, k)?
            }];
            let (separate, fused) = (parts(&at[plain..plain + n_outputs]), parts(&at[outputs..]));
            let args = Args { format, parts: &separate, glu, q, scales, k, n_cols: 1, mixture: None };
            launches.push(launch(&args)?);
            if acts {
                launches.push(quantise(at[plain], at[plain + 1], at[plain + 2], rows[0])?);
            }
            let args = Args { parts: &fused, ..args };
            let args = if form == X::Acts { args } else { Args { q: x, scales: DevicePtr::NULL, ..args } };
            let norm = normed.then_some(Norm { weight, eps: EPS });
            launches.push(launch_with(&args, Besides { norm, acts: acts.then_some(kind) })?);
            Ok(launches)
        };
        let problem = Problem { buffers, launches: Box::new(launches) };
        if random.is_timing() { output::last_launch(problem) } else { problem }
    }

    /// How activations are rounded for weights of a format.
    struct ActKindOf;

    impl ActKindOf {
        fn of(self, format: FormatId) -> ActKind {
            with_format(format, self).expect("cases name formats of weights")
        }
    }

    impl Visitor for ActKindOf {
        type Output = ActKind;
        fn block<F: BlockFormat>(self) -> ActKind {
            F::ACT
        }
        fn float<F: FloatFormat>(self) -> ActKind {
            unreachable!("{:?} has no blocks", F::ID)
        }
    }

    /// ggml's name of a product: of one matrix, with nothing fused.
    pub(crate) fn peer(
        format: FormatId,
        rows: &[usize],
        k: usize,
        n_cols: usize,
        fused: bool,
        mixture: Option<(usize, usize, bool)>,
    ) -> Option<alloc::string::String> {
        let &[m] = rows else { return None };
        let ty = alloc::format!("{format:?}").to_ascii_lowercase();
        // ggml writes its super-block formats with a capital K.
        let ty = ty.strip_suffix("_k").map_or(ty.clone(), |stem| alloc::format!("{stem}_K"));
        match mixture {
            _ if fused => None,
            None => Some(alloc::format!("MUL_MAT(type_a={ty},type_b=f32,m={m},n={n_cols},k={k},")),
            Some((n_mats, n_used, false)) => Some(alloc::format!(
                "MUL_MAT_ID(type_a={ty},type_b=f32,n_mats={n_mats},n_used={n_used},b=0,m={m},n={n_cols},k={k}"
            )),
            Some((.., true)) => None,
        }
    }

    impl Kernel for Mmvq {
        const NAME: &'static str = "mmvq";
        type Case = Case;
        const CASES: &'static [Case] = super::CASES;
        const BENCH: &'static [Case] = BENCH;
        const NMSE_MAX: f64 = 1e-11;
        #[cfg(feature = "emu")]
        const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::ONE, super::FEW, super::MORE];

        fn problem(case: &Case, random: &mut Random) -> Problem {
            if case.x == X::Normed || case.acts {
                return both_ways(case, random);
            }
            let Case { format, rows, k, n_cols, glu, extras, mixture, .. } = *case;
            let (n_expert, n_used, per_slot) = mixture.unwrap_or((1, 1, false));
            let n_pairs = n_cols * n_used;
            let n_x = if per_slot { n_pairs } else { n_cols };
            let x = random.values(n_x * k);
            let ids: Vec<u32> = (0..n_pairs).map(|_| random.below(n_expert as u64) as u32).collect();

            let mut kind = ActKind::Q8_0;
            let mut buffers = vec![];
            // Per part: sums [n_pairs, n_rows], bias and residual of the same shape.
            let mut sums = vec![];
            for &n_rows in rows {
                let mut tiles = vec![];
                let mut products = vec![];
                for _ in 0..n_expert {
                    let weights = with_format(format, Weights(random, n_rows * k));
                    let (blocks, _) = weights.expect("cases name formats of weights");
                    tiles.extend(tile::pack(format, &blocks, n_rows, k));
                    // For timing, of one row.
                    let timed = if random.is_timing() { blocks.len() / n_rows } else { blocks.len() };
                    let product = with_format(format, Product { blocks: &blocks[..timed], x: &x, k });
                    let (of, mut product) = product.expect("cases name formats of weights");
                    product.resize(n_x * n_rows, 0.0);
                    kind = of;
                    products.push(product);
                }
                let bias = random.values(n_expert * n_rows);
                let residual = random.values(n_pairs * n_rows);
                let mut lines = vec![];
                let mut biases = vec![];
                for pair in 0..n_pairs {
                    let (expert, row) = (ids[pair] as usize, if per_slot { pair } else { pair / n_used });
                    lines.extend(&products[expert][row * n_rows..][..n_rows]);
                    biases.extend(bias[expert * n_rows..][..n_rows].iter().map(|&b| f64::from(b)));
                }
                buffers.extend([
                    Buffer::Input(tiles),
                    Buffer::Input(bytes_of(&bias)),
                    Buffer::Input(bytes_of(&residual)),
                ]);
                sums.push((lines, biases, residual));
            }
            let n_inputs = buffers.len();
            let outputs = if glu.is_some() { 1 } else { rows.len() };
            for part in 0..outputs {
                let (lines, biases, residual) = &sums[part];
                let up = glu.map(|glu| (glu, &sums[1].0[..]));
                let given = |v: f64| if extras { v } else { 0.0 };
                let expected = epilogue_reference(
                    lines,
                    up,
                    |i| given(biases[i]),
                    |i| given(sums[1].1[i]),
                    |i| given(residual[i].into()),
                );
                buffers.push(Buffer::Output(Expected::F32(expected)));
            }
            let (q, scales) = quantise_act::reference(kind, &x);
            buffers.extend([
                Buffer::Input(bytes_of(&q)),
                Buffer::Input(bytes_of(&scales)),
                Buffer::Input(bytes_of(&ids)),
                Buffer::Input(bytes_of(&x)),
            ]);
            let floats = case.x == X::Floats;
            Problem {
                buffers,
                launches: Box::new(move |at| {
                    let given = |at: DevicePtr| if extras { at } else { DevicePtr::NULL };
                    let part = |(p, &n_rows): (usize, &usize)| Matrix {
                        w: at[3 * p],
                        bias: given(at[3 * p + 1]),
                        residual: given(at[3 * p + 2]),
                        y: if p < outputs { at[n_inputs + p] } else { DevicePtr::NULL },
                        n_rows,
                    };
                    let parts: Vec<Matrix> = rows.iter().enumerate().map(part).collect();
                    let rest = &at[n_inputs + outputs..];
                    let pairs_per_x = if per_slot { 1 } else { n_used };
                    let mixture = mixture.map(|_| Mixture { ids: rest[2], n_pairs, pairs_per_x });
                    let (q, scales) = if floats { (rest[3], DevicePtr::NULL) } else { (rest[0], rest[1]) };
                    Ok(vec![launch(&Args { format, parts: &parts, glu, q, scales, k, n_cols, mixture })?])
                }),
            }
        }

        fn peer(case: &Case) -> Option<alloc::string::String> {
            peer(case.format, case.rows, case.k, case.n_cols, case.glu.is_some() || case.extras, case.mixture)
        }

        fn bytes(case: &Case) -> u64 {
            let row = info(case.format);
            let n_rows: usize = case.rows.iter().sum();
            let n_matrices = case.mixture.map_or(1, |(experts, used, _)| experts.min(used * case.n_cols));
            let weights = n_matrices * n_rows * case.k / row.elems * row.bytes;
            (weights + case.n_cols * (case.k * 5 / 4 + 4 * n_rows)) as u64
        }

        fn flops(case: &Case) -> u64 {
            let n_cols = case.n_cols * case.mixture.map_or(1, |(_, used, _)| used);
            2 * (case.rows.iter().sum::<usize>() * n_cols * case.k) as u64
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        /// The launch of a case, on addresses that nobody reads.
        fn launch_of(case: &Case) -> Launch {
            let at = DevicePtr(256);
            let part = |&n_rows: &usize| Matrix {
                w: at,
                bias: DevicePtr::NULL,
                residual: DevicePtr::NULL,
                y: at,
                n_rows,
            };
            let parts: Vec<Matrix> = case.rows.iter().map(part).collect();
            let mixture = case.mixture.map(|(_, n_used, _)| Mixture {
                ids: at,
                n_pairs: n_used * case.n_cols,
                pairs_per_x: n_used,
            });
            let Case { format, glu, k, n_cols, .. } = *case;
            launch(&Args { format, parts: &parts, glu, q: at, scales: at, k, n_cols, mixture }).unwrap()
        }

        #[test]
        fn launches_keep_enough_under_way_and_fit_an_sm() {
            for case in BENCH {
                let launch = launch_of(case);
                let ctas: u64 = launch.grid.iter().map(|&n| u64::from(n)).product();
                let layout = tile::spans(case.format).unwrap();
                let tiles = tiles_per_warp(layout.span_bytes, case.n_cols) as u64;
                let spans = ctas * u64::from(launch.cta / 32) * tiles;
                assert!(launch.smem_bytes <= SMEM_BYTES, "{case:?}: {} bytes", launch.smem_bytes);
                // What is under way at a time must cover HBM's latency: seven spans for each of 132 SMs, whatever the shape.
                assert!(spans >= 7 * 132, "{case:?}: {spans} spans");
            }
        }

        #[test]
        fn launcher_refuses_what_the_kernel_cannot_take() {
            let at = DevicePtr(256);
            let part = Matrix { w: at, bias: DevicePtr::NULL, residual: DevicePtr::NULL, y: at, n_rows: 4 };
            let parts = [part; 4];
            let args = Args {
                format: FormatId::Q4_0,
                parts: &parts[..1],
                glu: None,
                q: at,
                scales: at,
                k: 64,
                n_cols: 1,
                mixture: None,
            };
            assert!(launch(&args).is_ok());
            let wrong = [
                Args { n_cols: 9, ..args },
                Args { n_cols: 0, ..args },
                Args { k: 40, ..args },
                Args { format: FormatId::F16, ..args },
                Args { q: DevicePtr(8), ..args },
                Args { scales: DevicePtr::NULL, n_cols: 2, ..args },
                Args { scales: DevicePtr::NULL, k: MAX_FLOATS_K + 32, ..args },
                Args { parts: &[], ..args },
                Args { parts: &parts, ..args },
                Args { glu: Some(Glu::Silu), ..args },
                Args { parts: &[Matrix { y: DevicePtr::NULL, ..part }], ..args },
            ];
            for args in wrong {
                assert!(launch(&args).is_err(), "{args:?}");
            }
        }
    }
}
