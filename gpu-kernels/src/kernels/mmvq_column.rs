//! `mmvq` of one column, what decoding one sequence consists of: contract, launcher and cases are `mmvq`'s.
//!
//! * Activations of the CTA's spans are staged in shared memory once, by all its warps: as `quantise_act` wrote them;
//!   as the product before wrote them, scales multiplied by the factor of a norm, which each warp has from the groups'
//!   sums of squares; or from f32, normed by `rms_norm`'s operations if there is a norm's weight, and quantised. All to
//!   the same bits. Each CTA does that anew: it costs a read of the row from L2, a launch of its own costs more.
//! * Lane = row, a warp works on one span at a time; gate and up alternate. Partial sums lie in shared memory; the first
//!   warp adds them in order and ends the rows.
//! * Spans that do not fit shared memory at once are worked on in windows; f32 must fit.
//!
//! Done for speed: (1) before the kernel waits for earlier launches, each warp's first span is on its way to registers
//! (to L2 where those are too few), its second and the norm's weights to L2; (2) between two spans a warp waits for
//! nothing but its weights; (3) the residual is on its way while the partial sums are added.

use bytemuck::Zeroable;
use quant::BlockFormat;

use super::lookup::{SharedBook, book_bytes};
use super::mmvq::gpu::{Stage, span_sums};
use super::mmvq::{AHEAD_BYTES, COLUMN_FIXED_BYTES, Shape, stage_bytes};
use super::output::gpu::{read, read_early};
use super::product::{Gate, NormAfter, Part, choose, choose_at};
use super::rms_norm::gpu::{factor_of_groups, put_squares, weighted};
use crate::device::{F32x4, Glb, Smem, U32x2, U32x4, grid, math, sync, thread};
use crate::tile::{ROWS, SPAN_GROUPS, Tiled, load_span};

/// Whether a span's words and the activations on their way to shared memory fit the registers of 16 warps: else the first
/// span waits in L2.
const fn starts_in_registers<F: Tiled>(short: bool) -> bool {
    short || size_of::<F::Words>() <= 4 * 36
}

/// The kernel, in forms: little time passes in it, and a good part of that goes into fetching instructions. `SHORT`: of
/// few warps, for which groups overlap in up to 255 registers. `FLOATS`: activations are f32. `GATED`: of gate and up;
/// from f32 the arguments say.
#[inline(always)]
pub(super) fn mmvq_column<
    F: BlockFormat + Tiled,
    const SHORT: bool,
    const FLOATS: bool,
    const GATED: bool,
>(
    p0: Part,
    p1: Part,
    p2: Part,
    q: Glb<U32x4>,
    scales: Glb<U32x2>,
    ids: Glb<u32>,
    gate: Gate,
    shape: Shape,
    norm: Glb<F32x4>,
    eps: f32,
) {
    let (lane, warp_id) = (thread::lane_id(), thread::warp_id());
    let n_warps = thread::block_dim_x() / thread::WARP;
    let part = choose(p0, p1, p2);
    let gate = if FLOATS || GATED { gate } else { Gate::NONE };
    let gated_pair = if FLOATS { gate.is_some() } else { GATED };

    // In a mixture the column is a (token, slot) pair.
    let pair = thread::block_idx_y();
    let mixture = !ids.is_null();
    if mixture {
        // Which weights these are an earlier launch says.
        grid::wait_for_earlier();
    }
    // Looked up anew where it is needed, as what follows from it: in between others need the registers.
    let expert = || if ids.is_null() { 0 } else { ids.ld_nc(thread::block_idx_y()) };
    let first_x = if mixture { pair / shape.pairs_per_x } else { 0 };

    let groups = SPAN_GROUPS as u32;
    let n_spans = shape.n_groups.div_ceil(groups);
    let k = shape.n_groups as usize * quant::format::GROUP;
    let tile_bytes = F::LAYOUT.tile_bytes(k);
    let n_tiles = part.n_rows.div_ceil(ROWS as u32);
    let tile = thread::block_idx_x() - part.first_cta;
    let at = (expert() as usize * n_tiles as usize + tile as usize) * tile_bytes;

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
    // The CTA's part, likewise.
    let own = || choose_at(p0, p1, p2, math::fresh(thread::block_idx_x()));
    let weights_of = |item: u32| {
        let (span, second) = item_of(item);
        (if second { p1.w } else { own().w }).offset(at + F::LAYOUT.span_offset(span as usize))
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
            weights_of(item).prefetch(units_of(item) * (ROWS * F::LAYOUT.unit_bytes) as u32);
        }
    };
    let load = |item: u32| {
        let words = load_span::<F>(weights_of(item), units_of(item));
        // The warp's next item comes to L2 meanwhile.
        prefetch(item + n_warps);
        words
    };

    // Shared memory: the format's codebook, squares, a stage per span of a window, partial sums.
    let book = SharedBook::fill(F::BOOK, 0);
    let fixed = book_bytes(F::BOOK);
    let own_squares: Smem<f32> = Smem::dynamic(fixed, COLUMN_FIXED_BYTES / 4);
    let stages = fixed + COLUMN_FIXED_BYTES;
    let stage_bytes = stage_bytes(F::SCALE_ELEMS, 1);
    let window_spans = if gated_pair { shape.window / 2 } else { shape.window };
    let stage = |nth: u32| Stage::at::<F, 1>(stages + nth * stage_bytes);
    let partials: Smem<f32> = Smem::dynamic(stages + window_spans * stage_bytes, shape.window * ROWS as u32);

    let mut item = warp_id;
    let mut words = F::Words::zeroed();
    if !starts_in_registers::<F>(SHORT) {
        prefetch(item);
    } else if item < n_items {
        words = load(item);
    }
    // For quantised activations, the groups' sums of squares.
    let squares: Glb<f32> = if FLOATS { Glb::NULL } else { norm.cast() };
    let norm = if FLOATS { norm } else { Glb::NULL };
    let after = || NormAfter::of(p1);
    let mut weight = read_early(norm, warp_id, 8 * shape.n_groups, 1.0);
    if thread::thread_idx_x() == 0 {
        if !norm.is_null() {
            norm.cast::<u8>().prefetch(4 * k as u32);
        }
        if !gated_pair && after().is_some() {
            after().weight.offset(tile as usize * ROWS).cast::<u8>().prefetch(4 * ROWS as u32);
        }
    }
    if !mixture {
        grid::wait_for_earlier();
    }

    if FLOATS {
        // One window holds the row: the launcher sees to that.
        let x: Glb<F32x4> = q.cast::<F32x4>().offset((first_x * shape.n_groups) as usize * 8);
        let n4 = 8 * shape.n_groups;
        let mut v = read(x, warp_id, n4, 0.0);
        let mut factor = 1.0;
        if !norm.is_null() {
            let first = v;
            let mut span = warp_id;
            while span < n_spans {
                let next = read(x, span + n_warps, n4, 0.0);
                put_squares(own_squares, span, shape.n_groups, v);
                (v, span) = (next, span + n_warps);
            }
            v = first;
            sync::sync_threads();
            factor = factor_of_groups(|group| own_squares.ld(group), n4, eps);
        }
        let mut span = warp_id;
        while span < n_spans {
            // The next span's loads beside this one's arithmetic.
            let next = span + n_warps;
            let next_v = read(x, next, n4, 0.0);
            let next_weight = read_early(norm, next, n4, 1.0);
            if !norm.is_null() {
                v = weighted(v, weight);
            }
            stage(span).quantise::<F>(v, factor);
            (v, weight, span) = (next_v, next_weight, next);
        }
    }
    let factor = || {
        if FLOATS || squares.is_null() {
            return None;
        }
        Some(factor_of_groups(|group| squares.ld_nc(group), 8 * shape.n_groups, eps))
    };
    // Where words fill the registers, before they are loaded; else beside the activations.
    let factor_first = if starts_in_registers::<F>(SHORT) { None } else { factor() };
    let factor = || if starts_in_registers::<F>(SHORT) { factor() } else { factor_first };
    if !starts_in_registers::<F>(SHORT) && item < n_items {
        words = load(item);
    }

    let mut start = 0;
    let ending = || {
        let part = own();
        (part, (thread::block_idx_x() - part.first_cta) * ROWS as u32 + thread::lane_id())
    };
    let (mut total, mut residual, mut weight_after) = ([0.0f32; 2], 0.0, 0.0);
    loop {
        let end = if start + shape.window < n_items { start + shape.window } else { n_items };
        let (first_span, _) = item_of(start);
        let (end_span, _) = item_of(end);
        if !FLOATS {
            let column = first_x * shape.n_groups;
            let n = shape.n_groups;
            Stage::fill_all::<F>(stages, q, scales, column, n, first_span, end_span, factor);
        }
        sync::sync_threads();

        while item < end {
            let (span, _) = item_of(item);
            let [sum] = span_sums::<F, 1, SHORT>(&words, stage(span - first_span), 0, groups_of(span), book);
            partials.st((item - start) * ROWS as u32 + lane, sum);
            item += n_warps;
            if item < end {
                words = load(item);
            }
        }
        if end == n_items && lane == 0 && p2.is_spare() {
            // This warp has nothing left to ask for: memory need not wait for the next launch.
            let start = (math::fresh(thread::block_idx_x()) * n_warps + warp_id) * AHEAD_BYTES;
            if start < p2.n_rows {
                p2.w.offset(start as usize).prefetch((p2.n_rows - start).min(AHEAD_BYTES));
            }
        }
        if warp_id == 0 && end == n_items {
            let (part, row) = ending();
            if row < part.n_rows {
                residual = part.residual(thread::block_idx_y(), row);
                if !gated_pair && after().is_some() {
                    weight_after = after().weight.ld_early(row);
                }
            }
        }
        sync::sync_threads();

        if warp_id == 0 {
            let step = if gated_pair { 2 } else { 1 };
            let sum_of = |second: u32, total: f32| {
                let mut item = second;
                let mut sum = total;
                if start == 0 {
                    sum = partials.ld(item * ROWS as u32 + lane);
                    item += step;
                }
                while item < end - start {
                    sum += partials.ld(item * ROWS as u32 + lane);
                    item += step;
                }
                sum
            };
            total[0] = sum_of(0, total[0]);
            if gated_pair {
                total[1] = sum_of(1, total[1]);
            }
        }
        if end == n_items {
            break;
        }
        // The stages and partial sums are free again.
        sync::sync_threads();
        start = end;
        item = start + warp_id;
        if item < n_items {
            words = load(item);
        }
    }
    let (part, row) = ending();
    if gate.quantises() {
        if warp_id == 0 {
            part.finish_quantised(gate, p1, thread::block_idx_x(), total);
        }
    } else if warp_id == 0 && row < part.n_rows {
        let v = part.finish_with(gate, p1, expert(), thread::block_idx_y(), row, total, residual);
        if !gated_pair && after().is_some() {
            // All rows of the tile are there.
            after().put(thread::block_idx_x(), v, weight_after);
        }
    }
}
