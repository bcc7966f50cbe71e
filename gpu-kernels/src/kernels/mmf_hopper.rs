//! The cut of `mmf` for Hopper (sm_90a): 128 rows × 128 columns at a time by `wgmma`, in three warpgroups of their own kinds.
//! Contract, arguments and result are `mmf`'s; cut and launch too (`Cut::Warpgroups`).
//!
//! * Bits: `wgmma` sums 16 of k at a time as `mma` does (`device/wgmma.rs`), so they are `mmf`'s and `mmvf`'s. That rests on a
//!   model of the hardware, not on its manual: the cases marked `against` compare both kernels on the GPU, bit for bit, on
//!   numbers of many exponents. If one fails, [`TRUSTED`](super::mmf::TRUSTED) keeps the engine from this kernel.
//! * Producers, four warps of which one lane each works: bulk copies of weights and activations, 64 of k a stage, into a
//!   ring; mbarriers say when a stage is full and when it is empty. Both lie in memory as they are wanted, so a stage is 24
//!   pieces and no thread computes an address per row.
//! * Consumers, two warpgroups of 64 rows and all columns: A from shared memory into registers, one 128-bit load per lane and
//!   16 of k, since a row tile in memory is a warp's fragments; B by descriptor, since activations are core matrices. The
//!   weights of a stage are loaded while the products of the one before run.
//! * Sums of a span and totals both stay in registers. At the end of a span a warpgroup has no products under way; the two
//!   take turns to begin one, so that the other's fill that time.
//! * Persistent: a CTA per multiprocessor walks over the tiles, column tiles first, and producers fill the ring with the next
//!   tile while consumers store this one, each warpgroup by itself, through shared memory in whole lines.
//! * Pairs (`Cut::Pairs`): two CTAs of a cluster take tiles below each other, and each copies half of the activations, which
//!   are the same, to both: from L2 come 48 bytes a cycle of tensor cores at full speed instead of 64.
//! * Of a gated pair a tile is 64 rows of each matrix; a warpgroup has 32 of gate's and the same of up's.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::MmfHopper;

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
use crate::device::U32x4;
use crate::kernels::warpgroups::{self, PIECE_ELEMS};

/// Rows and columns of a tile.
pub const TILE: usize = 128;
/// Threads of a CTA: a warpgroup of producers, two of consumers.
pub const THREADS: u32 = 384;
/// Row tiles of 16, and blocks of 8 columns.
const ROW_TILES: u32 = TILE as u32 / 16;
const BLOCKS: u32 = TILE as u32 / 8;
/// Steps of 16 of k in a stage.
const STEPS: u32 = warpgroups::STEPS;
/// 16-byte vectors of weights in a stage, and of weights and activations.
const A: u32 = ROW_TILES * STEPS * 32;
const STAGE: u32 = A + BLOCKS * STEPS * 16;
/// Stages of the ring: as many as fit.
const STAGES: u32 = 6;

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
smem! {
    /// A CTA's shared memory.
    struct Shared {
        stages: [U32x4; (STAGES * STAGE) as usize],
        /// What the consumers finish, for each of the two.
        finished: [f32; (2 * PIECE_ELEMS) as usize],
        /// When a stage is full, and when it is empty.
        barriers: [u64; 2 * STAGES as usize],
    }
}

/// Shared memory of a CTA.
pub const BYTES: u32 = 16 * STAGES * STAGE + 4 * 2 * PIECE_ELEMS + 8 * 2 * STAGES;

#[cfg(any(not(target_arch = "nvptx64"), sm_90a))]
#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod gpu {
    use half::{bf16, f16};

    use super::*;
    use crate::device::mma::FragmentA;
    use crate::device::sync;
    use crate::device::wgmma::{self, Bf16N128, F16N128, Operand, Registers, Sums};
    use crate::device::{Glb, Smem, bulk_copy, math, thread, warp};
    use crate::kernels::product::{Gate, Part};
    use crate::kernels::warpgroups::{BLOCK, Place, Ring, Work};

    const _: () = assert!(Shared::BYTES == BYTES);

    /// Stages of a span of 256, and its steps.
    const SPAN_STAGES: u32 = 4;
    const SPAN_STEPS: u32 = SPAN_STAGES * STEPS;
    /// Warps of each kind.
    const PRODUCERS: u32 = 4;
    const CONSUMERS: u32 = 8;
    /// Registers of a producer and of a consumer thread: of the 168 that each of three warpgroups starts with.
    const PRODUCER_REGISTERS: u32 = 56;
    const CONSUMER_REGISTERS: u32 = 224;
    const _: () = assert!(PRODUCER_REGISTERS + 2 * CONSUMER_REGISTERS <= 3 * 168);

    /// A 16-bit float that warpgroups multiply.
    pub(super) trait Half {
        /// `sums += a · b`, or `sums = a · b`.
        fn multiply<const ADD: bool>(sums: &mut Sums<64>, a: FragmentA, b: Operand);
    }

    impl Half for f16 {
        #[inline(always)]
        #[track_caller]
        fn multiply<const ADD: bool>(sums: &mut Sums<64>, a: FragmentA, b: Operand) {
            F16N128::registers::<ADD>(sums, a, b);
        }
    }

    impl Half for bf16 {
        #[inline(always)]
        #[track_caller]
        fn multiply<const ADD: bool>(sums: &mut Sums<64>, a: FragmentA, b: Operand) {
            Bf16N128::registers::<ADD>(sums, a, b);
        }
    }

    impl Ring for Shared {
        const STAGES: u32 = STAGES;

        #[inline(always)]
        fn barriers() -> Smem<u64> {
            Shared::barriers()
        }
    }

    /// A lane's weights of the stage for step `step`; `a` is its first vector there.
    #[inline(always)]
    #[track_caller]
    fn load(place: Place, a: u32, step: u32) -> FragmentA {
        FragmentA(Shared::stages().ld(place.slot * STAGE + a + step * 32).0)
    }

    /// The activations of the stage.
    #[inline(always)]
    #[track_caller]
    fn columns(place: Place) -> Operand {
        Operand::cores(Shared::stages(), place.slot * STAGE + A, BLOCK)
    }

    /// What warp `warp` of the producers does, by one lane: two row tiles and four blocks of columns of every stage.
    #[inline(always)]
    #[track_caller]
    fn produce<const CTAS: u32>(work: &Work<CTAS>, warp: u32) {
        const SLOTS: u32 = ROW_TILES / PRODUCERS;
        const COLUMNS: u32 = BLOCKS / PRODUCERS;
        // Of its four blocks a warp copies one half if the other CTA copies the other.
        let own = COLUMNS / CTAS;
        let first_own = thread::block_idx_x() % CTAS * own;
        let mut place = Place::FIRST;
        let (mut i, step) = Work::<CTAS>::walk();
        while i < work.n_items {
            let tile = work.tile(i, TILE as u32, TILE as u32);
            i += step;
            if tile.is_empty() {
                continue;
            }
            // Of a gated pair a warp of either matrix. Tiles beyond the matrix repeat its last; they are not stored.
            let last = tile.part.n_rows.div_ceil(16) - 1;
            // Matrices are padded to 32 rows: two row tiles.
            let matrix = tile.expert as usize * 2 * tile.part.n_rows.div_ceil(32) as usize;
            let (w, first) = if !work.gate.is_some() {
                (tile.part.w, SLOTS * warp)
            } else {
                (if warp.is_multiple_of(2) { tile.part.w } else { work.parts[1].w }, SLOTS * (warp / 2))
            };
            let from_a: [Glb<U32x4>; SLOTS as usize] = core::array::from_fn(|j| {
                let row_tile = tile.first_row / 16 + first + j as u32;
                let row_tile = if row_tile < last { row_tile } else { last };
                let at = (matrix + row_tile as usize) * work.n_k16 as usize * 32;
                w.cast::<U32x4>().offset(at)
            });
            let from_b: [Glb<U32x4>; COLUMNS as usize] = core::array::from_fn(|j| {
                let block = COLUMNS * warp + (first_own + j as u32) % COLUMNS;
                tile.columns(work.x, block, work.n_k16)
            });
            let (to_a, to_b) = (SLOTS * warp * STEPS * 32, A + COLUMNS * warp * STEPS * 16);
            let mut k16 = 0;
            while k16 < work.n_k16 {
                let rest = work.n_k16 - k16;
                let steps = if rest < STEPS { rest } else { STEPS };
                place.empty::<Shared>().wait(place.parity ^ 1);
                let full = place.full::<Shared>();
                full.arrive_expect(steps * (SLOTS * 512 + COLUMNS * 256));
                let stage = Shared::stages().skip(place.slot * STAGE);
                unroll!(J in 0..2 {
                    let to = to_a + J as u32 * STEPS * 32;
                    bulk_copy::copy(stage, to, from_a[J], k16 * 32, steps * 32, full);
                });
                unroll!(J in 0..4 {
                    if (J as u32) < own {
                        let to = to_b + (first_own + J as u32) * STEPS * 16;
                        bulk_copy::copy_to_all::<CTAS>(stage, to, from_b[J], k16 * 16, steps * 16, full);
                    }
                });
                place = place.next::<Shared>();
                k16 += STEPS;
            }
        }
    }

    /// What thread `thread` of the consumers does.
    #[inline(always)]
    #[track_caller]
    fn consume<H: Half, const CTAS: u32>(work: &Work<CTAS>, thread: u32) {
        let group = thread / 128;
        // This lane's first vector of its row tile in a stage.
        let a = thread / 32 * (STEPS * 32) + thread::lane_id();
        // The named barriers of the two turns; the second group says at once that the first may begin.
        let (mine, others) = (2 - group, 1 + group);
        if group == 1 {
            sync::barrier_arrive_of(others, 256);
        }
        let mut place = Place::FIRST;
        let (mut i, step) = Work::<CTAS>::walk();
        while i < work.n_items {
            if !work.tile(i, TILE as u32, TILE as u32).is_empty() {
                let mut totals = [0.0f32; 64];
                let mut k16 = 0;
                while k16 < work.n_k16 {
                    let mut sums = Sums::<64>::zero();
                    sync::barrier_of(mine, 256);
                    place = if k16 + SPAN_STEPS <= work.n_k16 {
                        span::<H, CTAS>(&mut sums, place, a, others)
                    } else {
                        short_span::<H, CTAS>(&mut sums, place, a, work.n_k16 - k16, others)
                    };
                    unroll!(Q in 0..8 { unroll!(E in 0..8 {
                        totals[8 * Q + E] += f32::from_bits(sums.get(8 * Q + E));
                    }); });
                    k16 += SPAN_STEPS;
                }
                // The tile anew: its fields need no registers up to here.
                let tile = work.tile(math::fresh(i), TILE as u32, TILE as u32);
                let finished = Shared::finished().skip(group * PIECE_ELEMS);
                let part = [64 * group, 0, TILE as u32];
                work.store(&tile, part, [thread % 128, 3 + group], finished, |i| totals[i], |_, sum| sum);
            }
            i += step;
        }
        if group == 0 {
            sync::barrier_of(mine, 256);
        }
    }

    /// The sums of a whole span, whose stages begin at `place`; returns the place behind. Once the first products are under
    /// way, the other warpgroup may begin its span. In straight code: so far ptxas follows products under way.
    #[inline(always)]
    #[track_caller]
    fn span<H: Half, const CTAS: u32>(sums: &mut Sums<64>, place: Place, a: u32, others: u32) -> Place {
        let mut weights = [[FragmentA([0; 4]); STEPS as usize]; 2];
        let (mut place, mut before) = (place, place);
        place.full::<Shared>().wait(place.parity);
        unroll!(STEP in 0..4 { weights[0][STEP] = load(place, a, STEP as u32); });
        unroll!(S in 0..4 {
            const { assert!(SPAN_STAGES == 4 && STEPS == 4) };
            wgmma::fence();
            let columns = columns(place);
            unroll!(STEP in 0..4 {
                let columns = columns.skip(16 * STEP as u32);
                if S + STEP == 0 {
                    H::multiply::<false>(sums, weights[S % 2][STEP], columns);
                } else {
                    H::multiply::<true>(sums, weights[S % 2][STEP], columns);
                }
            });
            wgmma::commit();
            if S == 0 {
                sync::barrier_arrive_of(others, 256);
            }
            let next = place.next::<Shared>();
            if S < 3 {
                next.full::<Shared>().wait(next.parity);
            }
            if S > 0 {
                wgmma::wait_for_operands::<1>();
                before.release::<Shared, CTAS>();
            }
            if S < 3 {
                unroll!(STEP in 0..4 { weights[(S + 1) % 2][STEP] = load(next, a, STEP as u32); });
            }
            before = place;
            place = next;
        });
        sums.wait::<0>();
        before.release::<Shared, CTAS>();
        place
    }

    /// The same of a short last span of `n` steps, a step at a time.
    #[inline(always)]
    #[track_caller]
    fn short_span<H: Half, const CTAS: u32>(
        sums: &mut Sums<64>,
        place: Place,
        a: u32,
        n: u32,
        others: u32,
    ) -> Place {
        sync::barrier_arrive_of(others, 256);
        let (mut place, mut done) = (place, 0);
        while done < n {
            place.full::<Shared>().wait(place.parity);
            let end = if done + STEPS < n { STEPS } else { n - done };
            let mut step = 0;
            while step < end {
                let weights = load(place, a, step);
                wgmma::fence();
                H::multiply::<true>(sums, weights, columns(place).skip(16 * step));
                wgmma::commit();
                sums.wait::<0>();
                step += 1;
            }
            place.release::<Shared, CTAS>();
            place = place.next::<Shared>();
            done += STEPS;
        }
        place
    }

    /// The kernel, for clusters of so many CTAs.
    #[inline(always)]
    pub(super) fn mmf<H: Half, const CTAS: u32>(
        p0: Part,
        p1: Part,
        p2: Part,
        x: Glb<U32x4>,
        order: Glb<u32>,
        of_expert: Glb<U32x4>,
        gate: Gate,
        k: u32,
        n_cols: u32,
        n_across: u32,
        n_items: u32,
    ) {
        const { assert!(CTAS == 1 || CTAS == 2) };
        let thread = thread::thread_idx_x();
        if thread == 0 {
            Shared::init(PRODUCERS, CONSUMERS * CTAS);
        }
        // No CTA touches what another has not set up, or has left.
        if CTAS > 1 {
            sync::sync_cluster();
        } else {
            sync::sync_threads();
        }
        let n_k16 = k.div_ceil(16);
        let parts = [p0, p1, p2];
        let work = Work::<CTAS> { parts, x, order, of_expert, gate, n_k16, n_cols, n_across, n_items };
        if thread < 128 {
            warp::give_registers::<PRODUCER_REGISTERS>();
            if thread::lane_id() == 0 {
                produce(&work, thread::warp_id());
            }
        } else {
            warp::take_registers::<CONSUMER_REGISTERS>();
            consume::<H, CTAS>(&work, thread - 128);
        }
        if CTAS > 1 {
            sync::sync_cluster();
        }
    }

    kernels! {
        in "mmf_hopper";
        pub(super) ENTRIES: threads(384, 1);
        fn (
            p0: Part, p1: Part, p2: Part, x: Glb<U32x4>, order: Glb<u32>, of_expert: Glb<U32x4>, gate: Gate,
            k: u32, n_cols: u32, n_across: u32, n_items: u32,
        );
        "mmf_hopper_F16" => mmf::<f16, 1>;
        "mmf_hopper_BF16" => mmf::<bf16, 1>;
        "mmf_hopper_F16_pair" => mmf::<f16, 2>;
        "mmf_hopper_BF16_pair" => mmf::<bf16, 2>;
    }
}

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use alloc::{boxed::Box, vec, vec::Vec};

    use quant::FormatId;

    use super::BYTES;
    use crate::case::{Buffer, Expected, Kernel, Problem, Random, Tiers, bytes_of};
    use crate::driver::DeviceInfo;
    use crate::kernels::float_case;
    use crate::kernels::mmf::{Args, Cut, Mmf, launch_as};
    use crate::kernels::product::{Glu, Matrix};
    use crate::kernels::round_act;
    use crate::launch::DevicePtr;
    use crate::tile;

    /// The row in the registry.
    #[derive(Debug)]
    pub struct MmfHopper;

    /// One case.
    #[derive(Clone, Copy, Debug)]
    pub struct Case {
        /// The shape, and everything a launch may have.
        pub product: float_case::Case,
        /// How the work is cut.
        pub cut: Cut,
        /// Multiprocessors that the launch counts on.
        pub n_sm: u32,
        /// Whether the result is compared with that of `Cut::Large`, bit for bit, on numbers of many exponents.
        pub against: bool,
    }

    const F16: FormatId = FormatId::F16;
    const BF16: FormatId = FormatId::BF16;

    /// Without extras, on few multiprocessors, so that a CTA has several tiles.
    const fn plain(format: FormatId, n_rows: &'static [usize], k: usize, n_cols: usize) -> Case {
        let product = float_case::Case::plain(format, n_rows, k, n_cols);
        Case { product, cut: Cut::Warpgroups, n_sm: 2, against: false }
    }

    /// [`plain`] compared with the cut for every GPU.
    const fn against(format: FormatId, n_rows: &'static [usize], k: usize, n_cols: usize) -> Case {
        Case { against: true, ..plain(format, n_rows, k, n_cols) }
    }

    /// With biases and residuals, of a gated pair if there is an activation, of a mixture of experts if there are any.
    const fn added(case: Case, glu: Option<Glu>, experts: Option<(usize, usize)>) -> Case {
        Case { product: float_case::Case { addends: true, glu, experts, ..case.product }, ..case }
    }

    /// The same by pairs of CTAs, two at a time.
    const fn paired(case: Case) -> Case {
        Case { cut: Cut::Pairs, n_sm: 4, ..case }
    }

    /// A row of the benchmark.
    const fn timed(cut: Cut, n_rows: &'static [usize], k: usize, n_cols: usize) -> Case {
        Case { cut, n_sm: 132, ..plain(F16, n_rows, k, n_cols) }
    }

    /// The same of gate and up.
    const fn gated(case: Case) -> Case {
        Case { product: float_case::Case { glu: Some(Glu::Silu), ..case.product }, ..case }
    }

    impl Kernel for MmfHopper {
        const NAME: &'static str = "mmf_hopper";
        type Case = Case;
        /// The edges of tiles, steps, stages, spans and the ring, and each extra; last those against the other cut.
        const CASES: &'static [Case] = &[
            plain(F16, &[3], 4, 1),
            plain(BF16, &[128], 256, 128),
            plain(F16, &[130], 64 * 9 + 20, 129),
            plain(BF16, &[40, 200, 64], 272, 70),
            plain(F16, &[257], 2304, 260),
            added(plain(F16, &[129, 16], 36, 133), None, None),
            added(plain(F16, &[72, 72], 320, 129), Some(Glu::Silu), None),
            Case { n_sm: 1, ..added(plain(BF16, &[100, 100], 528, 20), Some(Glu::Gelu), None) },
            added(plain(F16, &[40, 16], 144, 190), None, Some((5, 2))),
            added(plain(BF16, &[70, 70], 64, 140), Some(Glu::Silu), Some((2, 1))),
            against(F16, &[300], 1300, 130),
            against(BF16, &[140], 2052, 66),
            paired(plain(F16, &[200], 64 * 9 + 20, 129)),
            paired(added(plain(BF16, &[300, 20, 64], 272, 150), None, None)),
            paired(added(plain(F16, &[150, 150], 1600, 140), Some(Glu::Silu), None)),
            paired(added(plain(F16, &[140, 16], 144, 190), None, Some((5, 2)))),
            paired(against(F16, &[300], 1300, 260)),
        ];
        /// What prefill of an 8B model multiplies, by this kernel, by its pairs, and by the one for every GPU.
        const BENCH: &'static [Case] = &[
            timed(Cut::Warpgroups, &[4096], 14336, 512),
            timed(Cut::Pairs, &[4096], 14336, 512),
            timed(Cut::Large, &[4096], 14336, 512),
            timed(Cut::Warpgroups, &[28672], 4096, 512),
            timed(Cut::Pairs, &[28672], 4096, 512),
            timed(Cut::Warpgroups, &[4096], 14336, 2048),
            timed(Cut::Pairs, &[4096], 14336, 2048),
            timed(Cut::Large, &[4096], 14336, 2048),
            timed(Cut::Warpgroups, &[4096, 1024, 1024], 4096, 2048),
            timed(Cut::Pairs, &[4096, 1024, 1024], 4096, 2048),
            gated(timed(Cut::Warpgroups, &[14336, 14336], 4096, 2048)),
            gated(timed(Cut::Pairs, &[14336, 14336], 4096, 2048)),
            gated(timed(Cut::Large, &[14336, 14336], 4096, 2048)),
        ];
        const NMSE_MAX: f64 = Mmf::NMSE_MAX;
        const TIERS: Tiers = Tiers::Only("sm_90a");
        #[cfg(feature = "emu")]
        const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::gpu::ENTRIES];

        fn problem(case: &Case, random: &mut Random) -> Problem {
            let Case { product, cut, n_sm, against } = *case;
            if against {
                return comparison(case, random);
            }
            let float_case::Case { format, k, n_cols, glu, .. } = product;
            let device = DeviceInfo { n_sm, smem_per_cta_bytes: BYTES, ..DeviceInfo::default() };
            let columns = product.experts.map_or(n_cols, |_| product.max_tiles() * product.tile_cols());
            let scratch = round_act::tiles_bytes(columns, k);
            let timing = random.is_timing();
            let mut problem = float_case::problem(&product, random, scratch, move |operands| {
                let (x, tiles, parts) = (operands.x, operands.scratch, &operands.matrices);
                let mixture = operands.sorted;
                let round = round_act::launch(&round_act::Args { format, x, tiles, n_cols, k, mixture })?;
                let args = Args { format, parts, glu, x: tiles, k, n_cols, mixture, device: &device };
                let product = launch_as(&args, cut)?;
                Ok(if timing { vec![product] } else { vec![round, product] })
            });
            // The product alone is timed.
            if timing {
                float_case::fill_scratch(&mut problem, |x| bytes_of(&round_act::reference(format, x, k)));
            }
            problem
        }

        fn peer(case: &Case) -> Option<alloc::string::String> {
            case.product.peer()
        }

        fn bytes(case: &Case) -> u64 {
            case.product.bytes()
        }

        fn flops(case: &Case) -> u64 {
            case.product.flops()
        }
    }

    /// A product of one matrix by `Cut::Large` and by the case's, which must give equal bits. Rows and columns differ
    /// in how far the exponents of their elements spread: from not at all to beyond what a sum can hold.
    fn comparison(case: &Case, random: &mut Random) -> Problem {
        let Case { product: float_case::Case { format, n_rows, k, n_cols, .. }, cut, n_sm, .. } = *case;
        let n_rows = n_rows[0];
        let mut spread = |n: usize| -> Vec<f32> {
            let value = |i: usize| {
                let exponents = [1, 4, 10, 20, if format == F16 { 24 } else { 60 }];
                let bits = random.bits();
                let size = 1.0 + (bits >> 52) as f32 / 4096.0;
                let down = (bits >> 8) % exponents[i / k % exponents.len()];
                libm::ldexpf(if bits.is_multiple_of(2) { size } else { -size }, -(down as i32))
            };
            (0..n * k).map(value).collect()
        };
        let (w, x) = (spread(n_rows), spread(n_cols));
        let raw: Vec<u8> = match format {
            F16 => w.iter().flat_map(|&w| half::f16::from_f32(w).to_le_bytes()).collect(),
            _ => w.iter().flat_map(|&w| half::bf16::from_f32(w).to_le_bytes()).collect(),
        };
        let bytes = 4 * n_rows * n_cols;
        let device = DeviceInfo { n_sm, smem_per_cta_bytes: BYTES, ..DeviceInfo::default() };
        Problem {
            buffers: vec![
                Buffer::Input(bytes_of(&x)),
                Buffer::Input(tile::pack(format, &raw, n_rows, k)),
                Buffer::Output(Expected::Unchecked(round_act::tiles_bytes(n_cols, k))),
                Buffer::Output(Expected::Unchecked(bytes)),
                Buffer::Output(Expected::Same { buffer: 3, bytes }),
            ],
            launches: Box::new(move |at| {
                let (x, w, tiles, mixture) = (at[0], at[1], at[2], None);
                let round = round_act::launch(&round_act::Args { format, x, tiles, n_cols, k, mixture })?;
                let by = |cut: Cut, y: DevicePtr| {
                    let parts = &[Matrix { w, bias: DevicePtr::NULL, residual: DevicePtr::NULL, y, n_rows }];
                    launch_as(
                        &Args { format, parts, glu: None, x: tiles, k, n_cols, mixture, device: &device },
                        cut,
                    )
                };
                Ok(vec![round, by(Cut::Large, at[3])?, by(cut, at[4])?])
            }),
        }
    }
}

#[cfg(all(test, feature = "emu"))]
mod tests {
    use alloc::vec;

    use super::MmfHopper;
    use crate::case::{Buffer, Kernel, Random};
    use crate::kernels::float_case::SCRATCH;
    use crate::launch::DevicePtr;

    #[test]
    fn the_product_alone_is_timed_on_rounded_activations() {
        let case = &MmfHopper::CASES[1];
        let [tested, timed] = [Random::new(1), Random::for_timing(1)].map(|mut random| {
            let problem = MmfHopper::problem(case, &mut random);
            let at = vec![DevicePtr(256); problem.buffers.len()];
            let launches = (problem.launches)(&at).unwrap().len();
            let Buffer::Input(scratch) = &problem.buffers[SCRATCH] else { panic!("scratch is an output") };
            (launches, scratch.clone())
        });
        assert_eq!((tested.0, timed.0), (2, 1));
        assert_eq!(tested.1.len(), timed.1.len());
        assert!(timed.1.as_chunks::<2>().0.iter().all(|&bytes| bytes != [0xff; 2]));
    }
}
