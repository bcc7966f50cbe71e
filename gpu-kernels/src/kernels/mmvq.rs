//! Tiled quantised weights × few columns: `y[c][r] = Σ w[r][i] · x[c][i]` for up to 8 columns c, with what follows a
//! product in the same launch.
//!
//! * Shapes: `w` [n_rows, k] in any block format, tiled (`tile.rs`), 16-byte aligned; activations [n_cols, k] as
//!   `quantise_act` writes them (`q`, `scales`) in the format's kind (`quantise_act::kind_of`); `y` [n_cols, n_rows] f32.
//!   Nothing overlaps, except that `residual` may be `y`. One column (in a mixture any) may also come as f32 in `q`,
//!   without `scales`: the kernel quantises it on its way to shared memory, after an RMS norm of the row if there is one
//!   ([`Before::Norm`], k at most [`MAX_NORM_K`]); to the same bits as `quantise_act` and `rms_norm`.
//! * An RMS norm between two products of one column may be divided among them, to the bits of `rms_norm`: the first ends
//!   32 rows, a group, and writes result · weight quantised but for the row's factor, and the sum of the results' squares
//!   ([`After::Norm`]); the second adds the sums up and multiplies the scales ([`Before::Factor`]).
//! * Several matrices, bias, gate and up, residual, mixtures of experts: `product.rs`. In a mixture every pair is a column
//!   of its own.
//! * Result: for every output the sum over a span of 256 weights is `BlockFormat::dot_group`'s chain from 0 over its groups in
//!   order of k, and the spans are added in order. So bits depend on k alone: not on the grid, on n_cols, on the entry.
//! * Tolerance: NMSE 1e-11 against `dot_group` summed in f64, group by group.
//! * Geometry: lane = row, a warp works on one span of a row tile at a time, a CTA on one row tile: its warps stride over the
//!   spans, leave partial sums in shared memory, and add them in order. Warps per CTA by shape (`warps`). One column has a
//!   kernel of its own, `mmvq_column`, and forms of it for few warps, whose registers are free: groups overlap.
//! * Bytes: the weights once, plus n_cols · (k · 1.25 + 4 · n_rows). FLOPs: 2 · n_rows · n_cols · k.
//!
//! Done for speed: (1) a span's weights come by 128-bit coalesced loads, all issued before the first is used, past L1;
//! the span after that comes to L2 meanwhile, as the first does while the kernel waits for earlier launches;
//! (2) a warp stages its span's activations in shared memory, whose loads are broadcasts; with (1) in flight together,
//! so that a span costs one latency; (3) the integer sum starts at the bits of 1.5·2^23 less the bias's part, so that it
//! is a float after one subtraction, without a conversion or a correction per row.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

use quant::BlockFormat;
#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
use quant::FormatId;

use crate::tile::SPAN_GROUPS;

/// Columns that there are entries for.
#[cfg(not(target_arch = "nvptx64"))]
const COLS: [usize; 5] = [1, 2, 4, 6, 8];
/// Most warps of a CTA.
#[cfg(not(target_arch = "nvptx64"))]
const MAX_WARPS: u32 = 16;
/// Shared memory that a CTA may take, if not told of more: what every GPU gives without being asked.
#[cfg(not(target_arch = "nvptx64"))]
const SMEM_BYTES: u32 = 48 * 1024;
/// Most bytes of a row's span with which several columns want 16 warps.
#[cfg(not(target_arch = "nvptx64"))]
const SMALL_SPAN: usize = 4 * 48;

/// Columns for which a group is unpacked once: all that fit the registers. Without dp4a six and eight do not, with it
/// eight of spans longer than Q8_0's (Q8_1, Q8_K), six and eight of NVFP4, and six of IQ4_NL before Hopper.
#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
const fn columns_at_once<F: BlockFormat + Tiled>(n_cols: usize) -> usize {
    let no_dp4a = cfg!(all(target_arch = "nvptx64", not(sm_ge_61)));
    let hopper = cfg!(any(not(target_arch = "nvptx64"), sm_ge_90));
    let long = F::LAYOUT.span_bytes > crate::tile::SPAN / 32 * 34;
    match n_cols {
        6 if no_dp4a => 3,
        8 if no_dp4a => 2,
        8 if long || matches!(F::ID, FormatId::NVFP4) => 4,
        6 if matches!(F::ID, FormatId::NVFP4) || (!hopper && matches!(F::ID, FormatId::IQ4_NL)) => 3,
        _ => n_cols,
    }
}

/// Words of a group's scale and its companions in shared memory: what the halves do not share comes twice.
const fn scale_words(scale_elems: usize) -> u32 {
    if scale_elems == 16 { 4 } else { 2 }
}

/// Bytes of a span's activations in shared memory, of all columns.
pub(super) const fn stage_bytes(scale_elems: usize, n_cols: usize) -> u32 {
    (n_cols * SPAN_GROUPS) as u32 * (32 + 4 * scale_words(scale_elems))
}

/// Shared memory of the kernel of one column beside book, stages and partial sums: for a norm, sums of squares per group.
pub(super) const COLUMN_FIXED_BYTES: u32 = (4 * MAX_NORM_K / quant::format::GROUP) as u32;

/// Bytes of a later product's weights that each warp without a span left asks L2 for.
#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
pub(super) const AHEAD_BYTES: u32 = 2048;

/// Longest row that is normed on the way.
pub const MAX_NORM_K: usize = 32 * crate::tile::SPAN;

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
    use quant::{BlockFormat, Group};

    use super::{Shape, scale_words, stage_bytes};
    use crate::device::math::{self, dp4a_us, fma};
    use crate::device::{Glb, Smem, U32x2, U32x4, grid, sync, thread, warp};
    use crate::kernels::lookup::{SharedBook, book_bytes};
    use crate::kernels::product::{Gate, Part, choose};
    use crate::kernels::quantise_act::gpu::{Target, scaled, span_to};
    use crate::kernels::quantise_act::{ActScale, Kind, kind_of};
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
            const { assert!(!matches!(kind_of::<F>(), Kind::Q8_1) || (F::HAS_OFFSET && F::SCALE_ELEMS != 16)) };
            let d = act.d.to_bits();
            if matches!(kind_of::<F>(), Kind::Q8_1) {
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
        pub(crate) fn quantise<F: BlockFormat>(self, v: [[f32; 4]; 2], factor: f32) {
            span_to(
                kind_of::<F>(),
                v,
                factor,
                Staging::<F> { stage: self, format: core::marker::PhantomData },
                0,
            );
        }

        /// Fills the stages, `stages` and on, of spans `first_span` to `end_span` of one column, whose `n` groups start at
        /// group `column` of the arrays. Groups beyond a short span become zeros. `factor` gives what unscaled scales are
        /// multiplied by, and is asked when the loads are under way. The CTA calls together.
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
            factor: impl Fn() -> Option<f32>,
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
            let mut start = 0;
            while start < 2 * end {
                let at = start + tid;
                let (mut codes, mut acts) = ([U32x4([0; 4]); 4], [U32x2([0; 2]); 2]);
                unroll!(I in 0..4 {
                    let i = at + I as u32 * threads;
                    if i < 2 * end && first + i / 2 < n {
                        codes[I] = q.ld_nc(2 * (column + first) + i);
                    }
                });
                // Half as many groups as vectors: those of the first half of the same stretch.
                let group = start / 2 + tid;
                unroll!(I in 0..2 {
                    let i = group + I as u32 * threads;
                    if i < end && first + i < n {
                        acts[I] = scales.ld_nc(column + first + i);
                    }
                });
                let factor = factor();
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
                        let act = ActScale { d: f32::from_bits(d), extra };
                        let act = factor.map_or(act, |factor| scaled(kind_of::<F>(), act, factor));
                        stage(i).set_scale::<F>(i % groups, act);
                    }
                });
                start += 4 * threads;
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

    /// The sums over a span, of which `n` groups are there: of the lane's row, and of `AT_ONCE` columns from column `first`
    /// of the stage on. `SIDE_BY_SIDE`: four groups may overlap, in more registers.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn span_sums<F: BlockFormat + Tiled, const AT_ONCE: usize, const SIDE_BY_SIDE: bool>(
        words: &F::Words,
        stage: Stage,
        first: u32,
        n: u32,
        book: SharedBook,
    ) -> [f32; AT_ONCE] {
        const { assert!(SPAN_GROUPS == 8) };
        let groups = SPAN_GROUPS as u32;
        // ptxas would schedule all groups at once, take the registers of two, and spill. A branch that always goes one
        // way keeps it to one, or to four; other warps hide the latency.
        let groups_left = math::opaque(groups);
        let more_left = math::opaque(groups);
        let mut acc = [0.0f32; AT_ONCE];
        unroll!(G in 0..8 {
            let first_of_lot = if SIDE_BY_SIDE { G as u32 / 4 * 4 } else { G as u32 };
            if (SIDE_BY_SIDE && first_of_lot == 0) || first_of_lot < groups_left {
                let weights = block::<F>(words, G / F::GROUPS).unpack_group_by(G % F::GROUPS, book);
                let mut c = 0;
                while c < AT_ONCE {
                    // As above: not the activations of all columns at once.
                    if c == 4 && more_left == 0 {
                        break;
                    }
                    let at = (first + c as u32) * groups + G as u32;
                    let codes = stage.codes.cast::<U32x4>();
                    let [U32x4(low), U32x4(high)] = [codes.ld(2 * at), codes.ld(2 * at + 1)];
                    let act = Staged::load::<F>(stage.scales, at);
                    let codes = [low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]];
                    let sum = dot::<F>(&weights, codes, act, acc[c]);
                    // Groups beyond a short span hold nothing; without a branch.
                    let there = F::ELEMS == crate::tile::SPAN || (G as u32) < n;
                    acc[c] = if there { sum } else { acc[c] };
                    c += 1;
                }
            }
        });
        acc
    }

    /// The kernel; `AT_ONCE` of the `COLS` columns for each unpacking.
    #[inline(always)]
    pub(super) fn mmvq<F: BlockFormat + Tiled, const COLS: usize, const AT_ONCE: usize>(
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
        let tile = thread::block_idx_x() - part.first_cta;
        let tile_at = (expert as usize * n_tiles as usize + tile as usize) * tile_bytes;

        // Shared memory: the format's codebook, a stage per warp, totals, partial sums.
        let book = SharedBook::fill(F::BOOK, 0);
        if F::BOOK.n_words() != 0 {
            sync::sync_threads();
        }
        let (stages, stage_bytes) = (book_bytes(F::BOOK), stage_bytes(F::SCALE_ELEMS, COLS));
        let stage = Stage::at::<F, COLS>(stages + warp_id * stage_bytes);
        let outputs = (COLS * ROWS) as u32;
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
        // Where the tile's part of an item lies.
        let span_of = |item: u32| {
            let (span, second) = item_of(item);
            (if second { p1.w } else { part.w }).offset(tile_at + F::LAYOUT.span_offset(span as usize))
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
                span_of(item).prefetch(units_of(item) * (ROWS * F::LAYOUT.unit_bytes) as u32);
            }
        };
        let load = |item: u32| {
            let words = load_span::<F>(span_of(item), units_of(item));
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
                        words.as_mut().iter_mut().for_each(|word| *word ^= zero);
                    }
                    let acc = span_sums::<F, AT_ONCE, false>(&words, stage, first, n, book);
                    let mut c = 0;
                    while c < AT_ONCE {
                        let output = (c as u32 + first) * ROWS as u32 + lane;
                        partials.st((item - start) * outputs + output, acc[c]);
                        c += 1;
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
                    let column = output / ROWS as u32;
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
                concat!("mmvq_", stringify!($id), "_n1") => entries!(@column $module, false, false, false);
                concat!("mmvq_", stringify!($id), "_n1_glu") => entries!(@column $module, false, false, true);
                concat!("mmvq_", stringify!($id), "_n1_f32") => entries!(@column $module, false, true, false);
            )*
        }

        #[cfg(any(target_arch = "nvptx64", feature = "emu"))]
        kernels! {
            in "mmvq";
            FEW: threads(512), early;
            fn (p0: Part, p1: Part, p2: Part, q: Glb<U32x4>, scales: Glb<U32x2>, ids: Glb<u32>, gate: Gate, shape: Shape);
            $(
                concat!("mmvq_", stringify!($id), "_n2") => entries!(@entry $module, 2);
                concat!("mmvq_", stringify!($id), "_n4") => entries!(@entry $module, 4);
                concat!("mmvq_", stringify!($id), "_n6") => entries!(@entry $module, 6);
                concat!("mmvq_", stringify!($id), "_n8") => entries!(@entry $module, 8);
            )*
        }

        /// Entries of a format for up to `n_cols` columns; those of one column by form: plain, gated, from f32.
        #[cfg(not(target_arch = "nvptx64"))]
        fn entry(format: quant::FormatId, n_cols: usize) -> Option<EntryShape> {
            let (names, of_column, scale_elems, book) = match format {
                $(
                    quant::FormatId::$id => (
                        [
                            concat!("mmvq_", stringify!($id), "_n1"),
                            concat!("mmvq_", stringify!($id), "_n2"),
                            concat!("mmvq_", stringify!($id), "_n4"),
                            concat!("mmvq_", stringify!($id), "_n6"),
                            concat!("mmvq_", stringify!($id), "_n8"),
                        ],
                        [
                            concat!("mmvq_", stringify!($id), "_n1"),
                            concat!("mmvq_", stringify!($id), "_n1_glu"),
                            concat!("mmvq_", stringify!($id), "_n1_f32"),
                        ],
                        <quant::formats::$module::Block as BlockFormat>::SCALE_ELEMS,
                        <quant::formats::$module::Block as BlockFormat>::BOOK,
                    ),
                )*
                _ => return None,
            };
            let (name, n_cols) = names.into_iter().zip(COLS).find(|&(_, cols)| cols >= n_cols)?;
            Some(EntryShape {
                name,
                of_column,
                n_cols,
                stage_bytes: stage_bytes(scale_elems, n_cols),
                book_bytes: lookup::book_bytes(book),
            })
        }

        /// Every format at one column, at six and at eight; the edges of rows, of k and of the column counts; every epilogue.
        #[cfg(not(target_arch = "nvptx64"))]
        const CASES: &[host::Case] = &[
            $(
                host::Case { rows: &[37], k: 512, ..host::Case::of(quant::FormatId::$id) },
                host::Case { rows: &[6], k: 512, x: host::X::Floats, ..host::Case::of(quant::FormatId::$id) },
                host::Case { rows: &[5], k: 256, n_cols: 6, ..host::Case::of(quant::FormatId::$id) },
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
            host::Case { rows: &[64], k: 96, x: host::X::NormBetween, ..host::Case::of(quant::FormatId::Q4_0) },
            host::Case { rows: &[33, 33], k: 576, glu: Some(Glu::Silu), x: host::X::NormBetween, ..host::Case::of(quant::FormatId::Q4_1) },
            host::Case { rows: &[40, 8, 33], k: 4096, x: host::X::NormBetween, ..host::Case::of(quant::FormatId::Q8_0) },
            host::Case { rows: &[64, 64], k: 8192, glu: Some(Glu::Gelu), x: host::X::NormBetween, acts: true, ..host::Case::of(quant::FormatId::IQ4_NL) },
            host::Case { rows: &[2, 2], k: 256 * 60, glu: Some(Glu::Silu), x: host::X::Floats, ..host::Case::of(quant::FormatId::IQ2_S) },
            // More spans than fit shared memory at a time.
            host::Case { rows: &[3], k: 256 * 130 + 64, extras: true, ..host::Case::of(quant::FormatId::Q4_0) },
            host::Case { rows: &[2, 2], k: 256 * 90, glu: Some(Glu::Silu), ..host::Case::of(quant::FormatId::IQ2_XXS) },
            // More spans than fit the partial sums at a time.
            host::Case { rows: &[3], k: 256 * 40 + 32, n_cols: 8, ..host::Case::of(quant::FormatId::Q4_1) },
            // The same with room for them.
            host::Case { rows: &[3], k: 256 * 40 + 32, n_cols: 8, smem_bytes: 96 << 10, ..host::Case::of(quant::FormatId::Q4_1) },
            // A codebook leaves room for the sums of fewer warps than there is work for.
            host::Case { rows: &[40], k: 256 * 20, n_cols: 8, ..host::Case::of(quant::FormatId::IQ2_XS) },
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
    (@column $module:ident, $short:literal, $floats:literal, $gated:literal) => {
        mmvq_column::<formats::$module::Block, $short, $floats, $gated>
    };
    (@entry $module:ident, $n:literal) => {
        gpu::mmvq::<formats::$module::Block, $n, { columns_at_once::<formats::$module::Block>($n) }>
    };
}

#[cfg(not(target_arch = "nvptx64"))]
use crate::kernels::{lookup, product::Glu};
#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
use {
    crate::device::{F32x4, Glb, U32x2, U32x4},
    crate::kernels::mmvq_column::mmvq_column,
    crate::kernels::product::{Gate, Part},
    crate::tile::Tiled,
    quant::formats,
};
quant::for_each_block_format!(entries![]);

/// Entries of one column for few warps, in the formats that small models come in.
macro_rules! short_entries {
    ($($id:ident $module:ident)*) => {
        #[cfg(any(target_arch = "nvptx64", feature = "emu"))]
        kernels! {
            in "mmvq";
            SHORT: threads(256, 1), early;
            fn (
                p0: Part, p1: Part, p2: Part, q: Glb<U32x4>, scales: Glb<U32x2>, ids: Glb<u32>, gate: Gate, shape: Shape,
                norm: Glb<F32x4>, eps: f32,
            );
            $(
                concat!("mmvq_", stringify!($id), "_n1_short") => entries!(@column $module, true, false, false);
                concat!("mmvq_", stringify!($id), "_n1_glu_short") => entries!(@column $module, true, false, true);
                concat!("mmvq_", stringify!($id), "_n1_f32_short") => entries!(@column $module, true, true, false);
            )*
        }

        /// Those of a format, by form.
        #[cfg(not(target_arch = "nvptx64"))]
        fn short_entries(format: quant::FormatId) -> Option<[&'static str; 3]> {
            match format {
                $(
                    quant::FormatId::$id => Some([
                        concat!("mmvq_", stringify!($id), "_n1_short"),
                        concat!("mmvq_", stringify!($id), "_n1_glu_short"),
                        concat!("mmvq_", stringify!($id), "_n1_f32_short"),
                    ]),
                )*
                _ => None,
            }
        }
    };
}
short_entries!(Q4_0 q4_0 Q4_1 q4_1 Q8_0 q8_0 Q4_K q4_k Q5_K q5_k Q6_K q6_k);

/// What the launcher must know of an entry.
#[cfg(not(target_arch = "nvptx64"))]
struct EntryShape {
    name: &'static str,
    of_column: [&'static str; 3],
    n_cols: usize,
    stage_bytes: u32,
    book_bytes: u32,
}

#[cfg(not(target_arch = "nvptx64"))]
mod host;
