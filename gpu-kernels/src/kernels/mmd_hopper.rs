//! Quantised weights × many columns on Hopper (sm_90a) by the tensor cores' f16 products, weights dequantised on the way to
//! them: `y[c][r] = scales[c] · Σ w[r][i] · h[c][i]`, with what follows a product in the same launch.
//!
//! * Shapes: `w` [n_rows, k] in any block format that models use for weights, tiled (`tile.rs`), 16-byte aligned: the very
//!   memory that `mmvq` reads. `x` and `scales`: what `round_act::launch_scaled` makes of the activations [n_cols, k]. `y` f32
//!   [n_cols, n_rows]. Parts and epilogue: `product.rs`.
//! * Mixture: columns are pairs of token and slot sorted by expert (`moe_sort`) in tiles of 128, activations rounded so;
//!   weights are [n_expert, n_rows, k], biases [n_expert, n_rows]; `y` has a row per pair, unsorted.
//! * Result: `w` in f16 is [`UP`] times the block's weight: `(code - m) · s + o`, rounded once, s the group's scale times
//!   [`UP`] and o its value at code m, both rounded to f16; m is BIAS, or where there is an offset and no bias the middle
//!   of the codes. Sums: one chain of f32 over k in steps of 16 of the tensor cores. Both
//!   depend on format and k alone, so a column's bits depend neither on other columns nor on the cut or the grid. They
//!   are not those of `mmvq` and `mmq`.
//! * Range: weights below 1000 in size; scales of 2^-20 and more keep all bits of f16.
//! * Tolerance: NMSE 1e-6 against exact weights and activations: f16 rounds weights, scales and activations, 2^-12 each at
//!   most. Measured on the emulator 5e-8 to 1.4e-7, with offsets up to 5e-7.
//! * Bytes: the weights, 2 · n_cols · k and 4 · n_cols · n_rows once. FLOPs: 2 · n_rows · n_cols · k.
//!
//! How it works:
//!
//! * Producers, eight warps: a warp unpacks row tiles of 32 rows, lane = row, 64 weights of a row a stage, into the swizzled
//!   layout from which `wgmma` reads A: 16 bytes at a time, without bank conflicts. Teams of as many warps as the tile has
//!   row tiles take stages in turn, so a warp has the time of two stages (of four) for one. Codes become f16 by a
//!   byte permute, a subtraction and a product (an fma for an offset) for two weights.
//! * Raw spans come by bulk copies, two a row tile, each a whole span ahead; codebooks lie in shared memory. A team's lanes
//!   copy the stage's activations, which are core matrices in memory as in the stage.
//! * Consumers, two warpgroups: A and B by descriptor, sums in registers over all of k. At the end of a span a warpgroup has
//!   no products under way, since ptxas follows them through straight code only; the two take turns to begin one, so
//!   that the other's fill that time.
//! * Persistent, tiles of a launch column tiles first (`warpgroups.rs`).
//! * Cuts: 128 × 128; 64 × 128, where those are too few for the GPU, a warpgroup for every 64 columns; 128 × 256, which
//!   unpacks half as often and asks less of shared memory, for many columns.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;
use quant::{BlockFormat, formats};

use crate::kernels::lookup::book_bytes;
use crate::kernels::warpgroups::{BLOCK, PIECE_ELEMS};
use crate::tile::{ROWS, Tiled};
#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
use {
    crate::device::{Glb, U32x4},
    crate::kernels::product::{Gate, Part},
};

/// What f16 holds is so many times the weight: room below for the small scales of large codes, which real weights need
/// more than room above.
pub const UP: f32 = 64.0;
/// Columns of a mixture's tiles.
pub const MIXTURE_COLS: usize = 128;
/// Threads of a CTA: two warpgroups of producers, two of consumers.
pub const THREADS: u32 = 512;
/// Raw spans of a row tile that lie in shared memory or are on their way.
const RAW_STAGES: u32 = 2;
/// Most shared memory of a CTA on Hopper.
const MOST_BYTES: u32 = 227 << 10;
/// Barriers: of up to 8 stages, and of raw spans.
const RING_BARRIERS: u32 = 16;
const BARRIERS_BYTES: u32 = 8 * 32;

/// How large a CTA's tile is.
pub trait Form: 'static {
    /// Row tiles of 32.
    const SLOTS: u32;
    /// Columns.
    const COLS: u32;
    /// Warpgroups side by side: the others are below each other.
    const ACROSS: u32 = 1;
}

/// 128 rows, 128 columns.
#[derive(Debug)]
pub struct Square;
/// 64 rows, 128 columns.
#[derive(Debug)]
pub struct Flat;
/// 128 rows, 256 columns.
#[derive(Debug)]
pub struct Wide;

impl Form for Square {
    const SLOTS: u32 = 4;
    const COLS: u32 = 128;
}
impl Form for Flat {
    const SLOTS: u32 = 2;
    const COLS: u32 = 128;
    const ACROSS: u32 = 2;
}
impl Form for Wide {
    const SLOTS: u32 = 4;
    const COLS: u32 = 256;
}

/// Rows of a tile.
const fn rows<C: Form>() -> u32 {
    C::SLOTS * ROWS as u32
}

/// 16-byte vectors of a stage's weights: 64 of each row; and with its activations.
const fn weight_vectors<C: Form>() -> u32 {
    rows::<C>() * 8
}
const fn stage_vectors<C: Form>() -> u32 {
    weight_vectors::<C>() + C::COLS / 8 * BLOCK
}

/// Bytes of a span of one raw row tile.
const fn raw_bytes<F: Tiled>() -> u32 {
    (ROWS * F::LAYOUT.span_bytes) as u32
}

/// Shared memory: stages at 0, where raw row tiles, finished sums, the codebook and barriers start.
#[cfg_attr(
    not(any(target_arch = "nvptx64", feature = "emu")),
    expect(dead_code, reason = "a host that only launches needs the whole alone")
)]
struct Layout {
    stages: u32,
    raw: u32,
    finished: u32,
    book: u32,
    barriers: u32,
    bytes: u32,
}

const fn layout<F: BlockFormat + Tiled, C: Form>() -> Layout {
    let raw = RAW_STAGES * C::SLOTS * raw_bytes::<F>();
    let (finished, book) = (2 * 4 * PIECE_ELEMS, book_bytes(F::BOOK));
    let rest = raw + finished + book + BARRIERS_BYTES;
    // As many stages as fit.
    let stage = 16 * stage_vectors::<C>();
    let stages = (MOST_BYTES - rest) / stage;
    let stages = if stages < RING_BARRIERS / 2 { stages } else { RING_BARRIERS / 2 };
    let at = stages * stage;
    Layout {
        stages,
        raw: at,
        finished: at + raw,
        book: at + raw + finished,
        barriers: at + raw + finished + book,
        bytes: at + rest,
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

    use quant::Group;
    use quant::format::GROUP;

    use super::*;
    use crate::device::sync::{self, Mbarrier};
    use crate::device::wgmma::{self, F16N64, F16N128, Operand, Registers, Sums};
    use crate::device::{Smem, U32x2, bulk_copy, math, thread, warp};
    use crate::kernels::group_f16;
    use crate::kernels::lookup::SharedBook;
    use crate::kernels::mmq::units_of;
    use crate::kernels::mmq_wide::load_row;
    use crate::kernels::warpgroups::{Place, Ring, STEPS, Tile};
    use crate::tile::{SPAN_GROUPS, block};

    type Work = crate::kernels::warpgroups::Work<1>;

    /// Stages of a span of 256, its steps, and groups of a stage.
    const SPAN_STAGES: u32 = 4;
    const SPAN_STEPS: u32 = SPAN_STAGES * STEPS;
    const STAGE_GROUPS: usize = 2;
    /// Warps of each kind.
    const PRODUCERS: u32 = 8;
    const CONSUMERS: u32 = 8;
    /// Registers of a producer and of a consumer thread: of the 128 that each of four warpgroups starts with.
    const PRODUCER_REGISTERS: u32 = 136;
    const CONSUMER_REGISTERS: u32 = 120;
    const _: () = assert!(PRODUCER_REGISTERS + CONSUMER_REGISTERS <= 2 * 128);
    /// The same where a consumer has 128 sums.
    const WIDE_PRODUCER_REGISTERS: u32 = 80;
    const WIDE_CONSUMER_REGISTERS: u32 = 176;
    const _: () = assert!(WIDE_PRODUCER_REGISTERS + WIDE_CONSUMER_REGISTERS <= 2 * 128);

    /// A warpgroup's sums of 64 rows.
    pub(super) trait Products: Copy {
        /// Columns.
        const COLUMNS: u32;
        fn zero() -> Self;
        /// Starts adding products of 16 of k.
        fn add(&mut self, a: Operand, b: Operand);
        /// Waits until none is under way.
        fn wait_all(&mut self);
        fn sum(&self, i: usize) -> f32;
    }

    macro_rules! products {
        ($r:literal, $shape:ident) => {
            impl Products for Sums<$r> {
                const COLUMNS: u32 = 2 * $r;

                #[inline(always)]
                fn zero() -> Self {
                    Sums::zero()
                }

                #[inline(always)]
                #[track_caller]
                fn add(&mut self, a: Operand, b: Operand) {
                    $shape::shared::<true>(self, a, b);
                }

                #[inline(always)]
                #[track_caller]
                fn wait_all(&mut self) {
                    self.wait::<0>();
                }

                #[inline(always)]
                #[track_caller]
                fn sum(&self, i: usize) -> f32 {
                    f32::from_bits(self.get(i))
                }
            }
        };
    }
    products!(32, F16N64);
    products!(64, F16N128);

    /// Twice 128 columns, one after the other.
    impl Products for [Sums<64>; 2] {
        const COLUMNS: u32 = 256;

        #[inline(always)]
        fn zero() -> Self {
            [Sums::zero(); 2]
        }

        #[inline(always)]
        #[track_caller]
        fn add(&mut self, a: Operand, b: Operand) {
            self[0].add(a, b);
            self[1].add(a, b.skip(128 / 8 * BLOCK));
        }

        #[inline(always)]
        #[track_caller]
        fn wait_all(&mut self) {
            self[0].wait_all();
            self[1].wait_all();
        }

        #[inline(always)]
        #[track_caller]
        fn sum(&self, i: usize) -> f32 {
            self[i / 64].sum(i % 64)
        }
    }

    /// [`Form`] with the sums of a warpgroup.
    pub(super) trait Consumed: Form {
        type Sums: Products;
    }
    impl Consumed for Square {
        type Sums = Sums<64>;
    }
    impl Consumed for Flat {
        type Sums = Sums<32>;
    }
    impl Consumed for Wide {
        type Sums = [Sums<64>; 2];
    }

    /// A CTA's shared memory.
    struct Shared<F, C>(PhantomData<(F, C)>);

    impl<F: BlockFormat + Tiled, C: Form> Ring for Shared<F, C> {
        const STAGES: u32 = layout::<F, C>().stages;

        #[inline(always)]
        fn barriers() -> Smem<u64> {
            Smem::dynamic(const { layout::<F, C>().barriers }, BARRIERS_BYTES / 8)
        }
    }

    impl<F: BlockFormat + Tiled, C: Form> Shared<F, C> {
        #[inline(always)]
        fn stages() -> Smem<U32x4> {
            Smem::dynamic(0, Self::STAGES * stage_vectors::<C>())
        }

        #[inline(always)]
        fn raw() -> Smem<u32> {
            let at = const { layout::<F, C>().raw };
            Smem::dynamic(at, RAW_STAGES * C::SLOTS * raw_bytes::<F>() / 4)
        }

        #[inline(always)]
        fn finished() -> Smem<f32> {
            Smem::dynamic(const { layout::<F, C>().finished }, 2 * PIECE_ELEMS)
        }

        /// Ends its phase when a span of a row tile is there.
        #[inline(always)]
        #[track_caller]
        fn raw_full(slot: u32, stage: u32) -> Mbarrier {
            Mbarrier::at(Self::barriers(), RING_BARRIERS + RAW_STAGES * slot + stage)
        }

        /// Ends its phase when all teams but the last have read it.
        #[inline(always)]
        #[track_caller]
        fn raw_read(slot: u32, stage: u32) -> Mbarrier {
            Mbarrier::at(Self::barriers(), RING_BARRIERS + RAW_STAGES * (C::SLOTS + slot) + stage)
        }
    }

    /// Teams of producers: each has a warp for each row tile.
    const fn teams<C: Form>() -> u32 {
        PRODUCERS / C::SLOTS
    }

    /// The middle of the codes, where an offset makes up for it: around it both products and offsets are small.
    const fn middle<F: BlockFormat>() -> i32 {
        if F::HAS_OFFSET && F::BIAS == 0 { (F::CODE_MAX as i32 + 1) / 2 } else { 0 }
    }

    /// The group's weights as f16.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[cfg_attr(not(target_arch = "nvptx64"), inline(never))]
    fn weights<F: BlockFormat>(group: &Group) -> [U32x4; 4] {
        const { assert!(F::BIAS >= 0 && F::BIAS + middle::<F>() <= 1023) };
        let scales = group.scale.map(|s| math::pack_f16(UP * s, UP * s));
        let offsets: [u32; 2] = core::array::from_fn(|h| {
            let offset = UP * math::fma(middle::<F>() as f32, group.scale[h], group.offset[h]);
            math::pack_f16(offset, offset)
        });
        let bias = (F::BIAS + middle::<F>()) as u32;
        group_f16::of_codes(&group.codes, bias, scales, F::HAS_OFFSET.then_some(offsets))
    }

    /// Group `g` of a span in registers; a constant.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[cfg_attr(not(target_arch = "nvptx64"), inline(never))]
    #[track_caller]
    fn group<F: BlockFormat + Tiled>(words: &F::Words, g: usize, book: SharedBook) -> Group {
        block::<F>(words, g / F::GROUPS).unpack_group_by(g % F::GROUPS, book)
    }

    /// A producer warp.
    struct Producer<'a, F, C> {
        work: &'a Work,
        scales: PhantomData<(F, C)>,
        book: SharedBook,
        slot: u32,
        n_groups: u32,
        n_spans: u32,
    }

    /// The span of the warp's row tile that is asked for next.
    struct Ahead {
        item: u32,
        span: u32,
        /// The row tile.
        w: Glb<u8>,
        /// Spans asked for so far.
        asked: u32,
    }

    impl<F: BlockFormat + Tiled, C: Form> Producer<'_, F, C> {
        /// Where the warp's row tile of a tile starts. Of a gated pair even slots are gate's, odd ones up's. Beyond the last
        /// row the last row tile again; its outputs are not stored.
        #[inline(always)]
        #[track_caller]
        fn row_tile(&self, tile: &Tile) -> Glb<u8> {
            let (w, slot) = if !self.work.gate.is_some() {
                (tile.part.w, self.slot)
            } else if self.slot.is_multiple_of(2) {
                (tile.part.w, self.slot / 2)
            } else {
                (self.work.parts[1].w, self.slot / 2)
            };
            let n_tiles = tile.part.n_rows.div_ceil(ROWS as u32);
            let row_tile = tile.first_row / ROWS as u32 + slot;
            let row_tile = if row_tile < n_tiles { row_tile } else { n_tiles - 1 };
            let at = tile.expert as usize * n_tiles as usize + row_tile as usize;
            w.offset(at * F::LAYOUT.tile_bytes(self.n_groups as usize * GROUP))
        }

        /// Asks for the next span, if there is one.
        #[inline(always)]
        #[track_caller]
        fn ask(&self, ahead: &mut Ahead) {
            let (_, step) = Work::walk();
            while ahead.span == 0 && ahead.item < self.work.n_items {
                let tile = self.work.tile(ahead.item, rows::<C>(), C::COLS);
                if !tile.is_empty() {
                    ahead.w = self.row_tile(&tile);
                    break;
                }
                ahead.item += step;
            }
            if ahead.item >= self.work.n_items {
                return;
            }
            if thread::lane_id() == 0 {
                let stage = ahead.asked % RAW_STAGES;
                let source = ahead.w.offset(F::LAYOUT.span_offset(ahead.span as usize)).cast::<U32x4>();
                let units = units_of::<F>(ahead.span, self.n_groups);
                let vectors = units * (ROWS * F::LAYOUT.unit_bytes / 16) as u32;
                let barrier = Shared::<F, C>::raw_full(self.slot, stage);
                barrier.arrive_expect(16 * vectors);
                let target = (stage * C::SLOTS + self.slot) * (raw_bytes::<F>() / 16);
                bulk_copy::copy(Shared::<F, C>::raw().cast(), target, source, 0, vectors, barrier);
            }
            ahead.asked += 1;
            ahead.span += 1;
            if ahead.span == self.n_spans {
                ahead.span = 0;
                ahead.item += step;
            }
        }

        /// Unpacks stage `S` of a span, `read` spans after the first, into a stage of the ring: each lane two groups of a
        /// row. Groups beyond the last are zeros that nobody multiplies.
        #[inline(always)]
        #[track_caller]
        fn unpack<const S: usize>(&self, read: u32, span: u32, slot: u32) {
            let raw = (read % RAW_STAGES * C::SLOTS + self.slot) * raw_bytes::<F>();
            let units = units_of::<F>(span, self.n_groups);
            let words = match F::LAYOUT.unit_bytes {
                16 => load_row::<F, U32x4>(Shared::<F, C>::raw().cast(), raw, units),
                8 => load_row::<F, U32x2>(Shared::<F, C>::raw().cast(), raw, units),
                _ => load_row::<F, u32>(Shared::<F, C>::raw(), raw, units),
            };
            // A stage starts at a multiple of 8 chunks, so chunks differ from the first by an exclusive or, and no register has
            // to hold where each lies.
            let row = self.slot * ROWS as u32 + thread::lane_id();
            let first = slot * stage_vectors::<C>() + Operand::place(row, 0);
            unroll!(J in 0..2 {
                if J == 1 && C::COLS > 128 {
                    // Both groups at once would be too much for the registers.
                    warp::sync_warp();
                }
                let group = group::<F>(&words, STAGE_GROUPS * S + J, self.book);
                let weights = weights::<F>(&group);
                unroll!(Q in 0..4 { Shared::<F, C>::stages().st(first ^ (4 * J + Q) as u32, weights[Q]); });
            });
        }

        /// Fills a stage with stage `S` of a span of a tile. The lane's block of columns starts at `columns`, if it is one of
        /// the first `there` lanes; where no columns are, the stage holds what it held.
        #[inline(always)]
        #[track_caller]
        fn fill<const S: usize>(&self, columns: Glb<U32x4>, there: u32, read: u32, span: u32, place: Place) {
            let own = C::COLS / 8 / C::SLOTS;
            let k16 = span * SPAN_STEPS + S as u32 * STEPS;
            let rest = self.work.n_k16 - k16;
            let steps = if rest < STEPS { rest } else { STEPS };
            let lane = thread::lane_id();
            place.empty::<Shared<F, C>>().wait(place.parity ^ 1);
            let full = place.full::<Shared<F, C>>();
            if lane == 0 {
                full.arrive_expect(there * steps * 256);
            }
            warp::sync_warp();
            if lane < there {
                let stage = Shared::<F, C>::stages().skip(place.slot * stage_vectors::<C>());
                let to = weight_vectors::<C>() + (own * self.slot + lane) * BLOCK;
                bulk_copy::copy(stage, to, columns, k16 * 16, steps * 16, full);
            }
            self.unpack::<S>(read, span, place.slot);
            sync::fence_async_proxy();
            warp::sync_warp();
            if lane == 0 {
                full.arrive();
            }
        }

        /// What the warp does, as one of team `team`.
        #[inline(always)]
        #[track_caller]
        fn produce(&self, team: u32) {
            let is_last = team == teams::<C>() - 1;
            let (mut i, step) = Work::walk();
            let mut ahead = Ahead { item: i, span: 0, w: self.work.parts[0].w, asked: 0 };
            while is_last && ahead.asked < RAW_STAGES && ahead.item < self.work.n_items {
                self.ask(&mut ahead);
            }
            let n_stages = self.n_groups.div_ceil(STAGE_GROUPS as u32);
            let own = C::COLS / 8 / C::SLOTS;
            let mut place = Place::FIRST;
            let mut read = 0;
            while i < self.work.n_items {
                let tile = self.work.tile(i, rows::<C>(), C::COLS);
                i += step;
                if tile.is_empty() {
                    continue;
                }
                // The warp's blocks of columns, a lane each.
                let (first, n_blocks) = (own * self.slot, tile.n_cols.div_ceil(8) - tile.first_block);
                let there = n_blocks.saturating_sub(first);
                let there = if there < own { there } else { own };
                let block = first + thread::lane_id() % own;
                let columns = tile.columns(self.work.x, block, self.work.n_k16);
                let mut span = 0;
                while span < self.n_spans {
                    let (raw_stage, parity) = (read % RAW_STAGES, read / RAW_STAGES % 2);
                    Shared::<F, C>::raw_full(self.slot, raw_stage).wait(parity);
                    unroll!(S in 0..4 {
                        if span * SPAN_STAGES + (S as u32) < n_stages {
                            if S as u32 % teams::<C>() == team {
                                match S {
                                    0 => self.fill::<0>(columns, there, read, span, place),
                                    1 => self.fill::<1>(columns, there, read, span, place),
                                    2 => self.fill::<2>(columns, there, read, span, place),
                                    _ => self.fill::<3>(columns, there, read, span, place),
                                }
                            }
                            place = place.next::<Shared<F, C>>();
                        }
                    });
                    // The last team asks for another span in this one's place, once nobody reads it.
                    warp::sync_warp();
                    if is_last {
                        Shared::<F, C>::raw_read(self.slot, raw_stage).wait(parity);
                        self.ask(&mut ahead);
                    } else if thread::lane_id() == 0 {
                        Shared::<F, C>::raw_read(self.slot, raw_stage).arrive();
                    }
                    read += 1;
                    span += 1;
                }
            }
        }
    }

    /// A consumer warpgroup's operands in stage 0.
    #[derive(Clone, Copy)]
    struct Operands {
        a: Operand,
        b: Operand,
    }

    impl Operands {
        /// Starts the products of a step of a stage.
        #[inline(always)]
        #[track_caller]
        fn add<C: Consumed>(self, sums: &mut C::Sums, slot: u32, step: u32) {
            let stage = slot * stage_vectors::<C>();
            sums.add(self.a.skip(stage + 2 * step), self.b.skip(stage + 16 * step));
        }
    }

    /// Adds a whole span, whose stages begin at `place`; returns the place behind. Once the first products are under way, the
    /// other warpgroup may begin its span. In straight code: so far ptxas follows products under way.
    #[inline(always)]
    #[track_caller]
    fn add_span<R: Ring, C: Consumed>(
        sums: &mut C::Sums,
        operands: Operands,
        place: Place,
        others: u32,
    ) -> Place {
        let (mut place, mut before) = (place, place);
        place.full::<R>().wait(place.parity);
        unroll!(S in 0..4 {
            wgmma::fence();
            unroll!(STEP in 0..4 { operands.add::<C>(sums, place.slot, STEP as u32); });
            wgmma::commit();
            if S == 0 {
                sync::barrier_arrive_of(others, 256);
            }
            let next = place.next::<R>();
            if S < 3 {
                next.full::<R>().wait(next.parity);
            }
            if S > 0 {
                wgmma::wait_for_operands::<1>();
                before.release::<R, 1>();
            }
            before = place;
            place = next;
        });
        sums.wait_all();
        before.release::<R, 1>();
        place
    }

    /// The same of a short last span of `n` steps, a step at a time.
    #[inline(always)]
    #[track_caller]
    fn add_short_span<R: Ring, C: Consumed>(
        sums: &mut C::Sums,
        operands: Operands,
        place: Place,
        n: u32,
        others: u32,
    ) -> Place {
        sync::barrier_arrive_of(others, 256);
        let (mut place, mut done) = (place, 0);
        while done < n {
            place.full::<R>().wait(place.parity);
            let end = if done + STEPS < n { STEPS } else { n - done };
            let mut step = 0;
            while step < end {
                wgmma::fence();
                operands.add::<C>(sums, place.slot, step);
                wgmma::commit();
                sums.wait_all();
                step += 1;
            }
            place.release::<R, 1>();
            place = place.next::<R>();
            done += STEPS;
        }
        place
    }

    /// What thread `thread` of the consumers does.
    #[inline(always)]
    #[track_caller]
    fn consume<F: BlockFormat + Tiled, C: Consumed>(work: &Work, scales: Glb<f32>, thread: u32) {
        let group = thread / 128;
        // Rows and columns of the tile before the warpgroup's.
        let (first_row, first_column) =
            if C::ACROSS == 1 { (64 * group, 0) } else { (0, C::COLS / 2 * group) };
        let stages = Shared::<F, C>::stages();
        let operands = Operands {
            a: Operand::at(stages, first_row * 8),
            b: Operand::cores(stages, weight_vectors::<C>() + first_column / 8 * BLOCK, BLOCK),
        };
        // The named barriers of the two turns; the second group says at once that the first may begin.
        let (mine, others) = (2 - group, 1 + group);
        if group == 1 {
            sync::barrier_arrive_of(others, 256);
        }
        let mut place = Place::FIRST;
        let (mut i, step) = Work::walk();
        while i < work.n_items {
            if !work.tile(i, rows::<C>(), C::COLS).is_empty() {
                let mut sums = C::Sums::zero();
                let mut k16 = 0;
                while k16 < work.n_k16 {
                    sync::barrier_of(mine, 256);
                    place = if k16 + SPAN_STEPS <= work.n_k16 {
                        add_span::<Shared<F, C>, C>(&mut sums, operands, place, others)
                    } else {
                        add_short_span::<Shared<F, C>, C>(
                            &mut sums,
                            operands,
                            place,
                            work.n_k16 - k16,
                            others,
                        )
                    };
                    k16 += SPAN_STEPS;
                }
                // The tile anew: its fields need no registers up to here.
                let tile = work.tile(math::fresh(i), rows::<C>(), C::COLS);
                let finished = Shared::<F, C>::finished().skip(group * PIECE_ELEMS);
                let part = [first_row, first_column, C::Sums::COLUMNS];
                let scaled = |place: u32, sum: f32| sum * (scales.ld_nc(place) * (1.0 / UP));
                work.store(&tile, part, [thread % 128, 3 + group], finished, |i| sums.sum(i), scaled);
            }
            i += step;
        }
        if group == 0 {
            sync::barrier_of(mine, 256);
        }
    }

    /// The kernel.
    #[inline(always)]
    pub(super) fn mmd<F: BlockFormat + Tiled, C: Consumed>(
        p0: Part,
        p1: Part,
        p2: Part,
        x: Glb<U32x4>,
        scales: Glb<f32>,
        order: Glb<u32>,
        of_expert: Glb<U32x4>,
        gate: Gate,
        k: u32,
        n_cols: u32,
        n_across: u32,
        n_items: u32,
    ) {
        const { assert!(layout::<F, C>().stages >= 2 && 2 * RAW_STAGES * C::SLOTS <= 16) };
        let thread = thread::thread_idx_x();
        if thread == 0 {
            Shared::<F, C>::init(2 * C::SLOTS, CONSUMERS);
            let mut slot = 0;
            while slot < C::SLOTS {
                let mut stage = 0;
                while stage < RAW_STAGES {
                    Shared::<F, C>::raw_full(slot, stage).init(1);
                    Shared::<F, C>::raw_read(slot, stage).init(teams::<C>() - 1);
                    stage += 1;
                }
                slot += 1;
            }
        }
        let book = SharedBook::fill(F::BOOK, const { layout::<F, C>().book });
        // Where columns are missing, stages have zeros until others leave something there.
        if !order.is_null() || !n_cols.is_multiple_of(C::COLS) {
            let mut i = thread;
            while i < layout::<F, C>().stages * stage_vectors::<C>() {
                Shared::<F, C>::stages().st(i, U32x4([0; 4]));
                i += THREADS;
            }
            sync::fence_async_proxy();
        }
        sync::sync_threads();
        let (parts, n_k16, n_groups) = ([p0, p1, p2], k / 16, k / GROUP as u32);
        let work = Work { parts, x, order, of_expert, gate, n_k16, n_cols, n_across, n_items };
        if thread < 32 * PRODUCERS {
            if C::COLS > 128 {
                warp::give_registers::<WIDE_PRODUCER_REGISTERS>();
            } else {
                warp::take_registers::<PRODUCER_REGISTERS>();
            }
            let warp = thread::warp_id();
            let n_spans = n_groups.div_ceil(SPAN_GROUPS as u32);
            let slot = warp % C::SLOTS;
            let producer =
                Producer::<F, C> { work: &work, scales: PhantomData, book, slot, n_groups, n_spans };
            producer.produce(warp / C::SLOTS);
        } else {
            if C::COLS > 128 {
                warp::take_registers::<WIDE_CONSUMER_REGISTERS>();
            } else {
                warp::give_registers::<CONSUMER_REGISTERS>();
            }
            consume::<F, C>(&work, scales, thread - 32 * PRODUCERS);
        }
    }
}

/// Entries of every format that models use for weights, and the function that finds them.
macro_rules! entries {
    ($($id:ident => $module:ident,)*) => {
        #[cfg(any(not(target_arch = "nvptx64"), sm_90a))]
        #[cfg(any(target_arch = "nvptx64", feature = "emu"))]
        kernels! {
            in "mmd_hopper";
            pub(super) ENTRIES: threads(512, 1);
            fn (
                p0: Part, p1: Part, p2: Part, x: Glb<U32x4>, scales: Glb<f32>, order: Glb<u32>, of_expert: Glb<U32x4>,
                gate: Gate, k: u32, n_cols: u32, n_across: u32, n_items: u32,
            );
            $(
                concat!("mmd_hopper_", stringify!($id)) => gpu::mmd::<formats::$module::Block, Square>;
                concat!("mmd_hopper_", stringify!($id), "_flat") => gpu::mmd::<formats::$module::Block, Flat>;
                concat!("mmd_hopper_", stringify!($id), "_wide") => gpu::mmd::<formats::$module::Block, Wide>;
            )*
        }

        /// Entry of a format and its shared memory.
        #[cfg(not(target_arch = "nvptx64"))]
        fn entry(format: quant::FormatId, cut: Cut) -> Option<(&'static str, u32)> {
            match format {
                $(quant::FormatId::$id => Some(match cut {
                    Cut::Square => {
                        (concat!("mmd_hopper_", stringify!($id)), bytes::<formats::$module::Block, Square>())
                    }
                    Cut::Flat => {
                        (concat!("mmd_hopper_", stringify!($id), "_flat"), bytes::<formats::$module::Block, Flat>())
                    }
                    Cut::Wide => {
                        (concat!("mmd_hopper_", stringify!($id), "_wide"), bytes::<formats::$module::Block, Wide>())
                    }
                }),)*
                _ => None,
            }
        }

        /// Formats with entries.
        #[cfg(not(target_arch = "nvptx64"))]
        const FORMATS: &[quant::FormatId] = &[$(quant::FormatId::$id,)*];
    };
}
for_each_weight_format!(entries);

#[cfg(not(target_arch = "nvptx64"))]
mod host;
