//! Prompts on Hopper (sm_90a): 128 rows at a time by `wgmma`, in three warpgroups of their own kinds. Contract and arguments
//! are `mod.rs`'s, for the classes `f16` and `wide` and without slopes; bits are this kernel's own.
//!
//! * Order of sums: one online softmax per row over blocks of [`Hopper::BLOCK`] positions, counted from position 0, in
//!   order; no spans. A block that a row does not see changes no bit of it, so a row depends on shapes and its own
//!   positions alone: neither on the tile it is in nor on how a prompt is cut.
//! * Rows of a tile are (token, head of a KV head's group), of any tokens and sequences. Grid [tiles, kv heads], long rows
//!   first. Runs of rows of one sequence are walked one after the other; to the rows of others nothing is visible.
//! * Producers, four warps: copies of 16 bytes from the pages of the cache into rings of blocks of K and of V, permuted as
//!   `wgmma` wants them, which a bulk copy would not do. A block is told of once the next is under way.
//! * Class `wide`: producers copy pieces of K and V as the cache has them into a ring of their own, and unpack each into its
//!   place while all but one of the others are under way. One barrier of theirs a piece.
//! * Consumers, two warpgroups of 64 rows: scores of block j + 1 are begun before the values of block j, so that tensor
//!   cores work on those while the softmax of j + 1 is computed. The two take turns to begin products, so that one's
//!   softmax runs beside the other's products.
//! * Probabilities never leave registers: a warp's scores are the fragments of A. V is read transposed.
//! * Sums of probabilities are of those in f32, each lane's columns apart until the end.

use super::store::{Raw, Rows};
use super::{CAUSAL, HOPPER_ROWS, HOPPER_THREADS, HopperTile, NO_SEQUENCE, PAGE, state};
use crate::device::mma::FragmentA;
use crate::device::sync::{self, Mbarrier};
use crate::device::wgmma::{self, F16N64, F16N64T, F16N128, F16N128T, F16N256T, Operand, Registers, Sums};
use crate::device::{F32x2, F32x4, Glb, Smem, U32x2, U32x4, async_copy, grid, math, thread, warp};

/// Warps of each kind.
const PRODUCERS: u32 = 4;
const CONSUMERS: u32 = 8;
/// Rows of a warpgroup.
const GROUP_ROWS: u32 = HOPPER_ROWS / 2;
/// Registers of a producer and of a consumer thread: of the 168 that each of three warpgroups starts with.
const PRODUCER_REGISTERS: u32 = 56;
const CONSUMER_REGISTERS: u32 = 224;
const _: () = assert!(PRODUCER_REGISTERS + 2 * CONSUMER_REGISTERS <= 3 * 168);
/// Sequence of a row that does not exist.
const ABSENT: u32 = NO_SEQUENCE - 1;
/// Named barriers: turns of the two consumer warpgroups, and each group by itself.
const TURN: u32 = 1;
const GROUP: u32 = 3;
/// And the producers, where they unpack.
const PIECE_ARRIVED: u32 = 5;

/// Scores of a block in registers.
trait Scores: Registers {
    fn product<const ADD: bool>(&mut self, queries: Operand, keys: Operand);
}

/// Outputs in registers.
trait Outputs: Registers {
    fn add(&mut self, probabilities: FragmentA, values: Operand);
}

macro_rules! shapes {
    ($($trait:ident $r:literal $shape:ident;)*) => {
        $(shapes! { @ $trait $r $shape })*
    };
    (@ Scores $r:literal $shape:ident) => {
        impl Scores for Sums<$r> {
            #[inline(always)]
            #[track_caller]
            fn product<const ADD: bool>(&mut self, queries: Operand, keys: Operand) {
                $shape::shared::<ADD>(self, queries, keys);
            }
        }
    };
    (@ Outputs $r:literal $shape:ident) => {
        impl Outputs for Sums<$r> {
            #[inline(always)]
            #[track_caller]
            fn add(&mut self, probabilities: FragmentA, values: Operand) {
                $shape::registers::<true>(self, probabilities, values);
            }
        }
    };
}
shapes! {
    Scores 32 F16N64;
    Scores 64 F16N128;
    Outputs 32 F16N64T;
    Outputs 64 F16N128T;
    Outputs 128 F16N256T;
}

/// [`math::tanh`] without a branch: products are under way.
#[inline(always)]
fn tanh(x: f32) -> f32 {
    let square = x * x;
    let above = math::fma(square, square + 105.0, 945.0);
    let below = math::fma(square, math::fma(square, 15.0, 420.0), 945.0);
    let near = math::fabs(x) < 0.6;
    let power = 1.0 + math::ex2(2.0 * math::LOG2_E * math::fabs(x));
    let fraction = math::rcp(if near { below } else { power });
    let far = f32::copysign(math::fma(-2.0, fraction, 1.0), x);
    if near { x * above * fraction } else { far }
}

/// The launch's arguments, as the contract names them.
#[derive(Clone, Copy)]
struct Inputs {
    q: Glb<F32x4>,
    /// K and V.
    cache: [Glb<U32x4>; 2],
    out: Glb<F32x2>,
    positions: Glb<u32>,
    token_sequences: Glb<u32>,
    sequences: Glb<U32x2>,
    pages: Glb<u32>,
    sinks: Glb<f32>,
    n_tokens: u32,
    n_head: u32,
    n_head_kv: u32,
    /// Elements of a row of K and of V.
    head_dim: [u32; 2],
    /// Bytes of one, and its format.
    row_bytes: [u32; 2],
    format: [u32; 2],
    flags: u32,
    window: u32,
    /// Factor on q·k, with that from natural to binary logarithms in it where nothing comes between.
    scale: f32,
    softcap: f32,
}

/// Rows of the tile: the first as token · group + head in group, and how many exist.
#[derive(Clone, Copy)]
struct Tile {
    first: u32,
    n: u32,
}

impl Inputs {
    /// This CTA's rows.
    #[inline(always)]
    fn tile(&self) -> Tile {
        // Computed anew where it is needed: outputs and scores need the registers. The last tokens see most: they start
        // first.
        let cta = math::fresh(thread::grid_dim_x()) - 1 - math::fresh(thread::block_idx_x());
        let first = cta * HOPPER_ROWS;
        let left = math::fresh(self.n_tokens) * (self.n_head / self.n_head_kv) - first;
        Tile { first, n: if left < HOPPER_ROWS { left } else { HOPPER_ROWS } }
    }

    /// Token and head of a row of the tile.
    #[inline(always)]
    fn place(&self, tile: Tile, row: u32) -> [u32; 2] {
        let group = math::fresh(self.n_head) / self.n_head_kv;
        let flat = tile.first + row;
        [flat / group, thread::block_idx_y() * group + flat % group]
    }

    /// A row of the tile as a row of `q` and of `out`.
    #[inline(always)]
    fn head_row(&self, tile: Tile, row: u32) -> usize {
        let [token, head] = self.place(tile, row);
        token as usize * self.n_head as usize + head as usize
    }
}

/// Rows of one sequence in the tile, and the blocks that some of them see.
#[derive(Clone, Copy)]
struct Run {
    rows: [u32; 2],
    first_page: u32,
    len: u32,
    block: u32,
    end: u32,
}

/// A lane's two rows: maxima in units of log2; sums of even and odd columns.
#[derive(Clone, Copy)]
struct State {
    max: [f32; 2],
    sum: [[f32; 2]; 2],
}

/// A place in the rings.
#[derive(Clone, Copy)]
struct Place {
    slot: u32,
    parity: u32,
}

/// Where chunk `c` of row `r` lies in a tile of `rows` rows: pieces of 64 elements follow each other.
#[inline(always)]
fn place(rows: u32, r: u32, c: u32) -> u32 {
    c / 8 * rows * 8 + Operand::place(r, c % 8)
}

/// Rows from `first` on of a tile of `rows` rows of `KC` times 64 elements.
struct Permuted<const KC: usize> {
    chunks: Smem<U32x4>,
    start: u32,
    rows: u32,
    first: u32,
}

impl<const KC: usize> Rows for Permuted<KC> {
    #[inline(always)]
    fn units(&self) -> u32 {
        8 * KC as u32
    }
    #[inline(always)]
    #[track_caller]
    fn put(&self, r: u32, c: u32, unit: U32x4) {
        self.chunks.st(self.start + place(self.rows, self.first + r, c), unit);
    }
}

/// The kernel: key rows of `KC` times 64 elements; `S` registers of scores and `O` of outputs; `STEPS` steps of 16 in a
/// block; `STAGES` blocks in either ring; `PIECES` times `PIECE` positions as the cache has them, none where it has f16.
struct Hopper<
    const KC: usize,
    const S: usize,
    const O: usize,
    const STEPS: usize,
    const STAGES: usize,
    const PIECE: usize,
    const PIECES: usize,
>;

impl<
    const KC: usize,
    const S: usize,
    const O: usize,
    const STEPS: usize,
    const STAGES: usize,
    const PIECE: usize,
    const PIECES: usize,
> Hopper<KC, S, O, STEPS, STAGES, PIECE, PIECES>
where
    Sums<S>: Scores,
    Sums<O>: Outputs,
{
    const TILE: HopperTile = HopperTile::new([KC, S, O, STEPS], STAGES, [PIECE, PIECES]);
    /// Positions of a block.
    const BLOCK: u32 = Self::TILE.block as u32;
    /// 16-byte chunks of a row of K and of V in shared memory.
    const UNITS: [u32; 2] = [8 * KC as u32, O as u32 / 4];

    const FIRST: Place = Place { slot: 0, parity: 0 };

    #[inline(always)]
    fn next(place: Place) -> Place {
        if place.slot + 1 == STAGES as u32 {
            Place { slot: 0, parity: place.parity ^ 1 }
        } else {
            Place { slot: place.slot + 1, parity: place.parity }
        }
    }

    /// All chunks of the tiles.
    #[inline(always)]
    fn chunks() -> Smem<U32x4> {
        Smem::dynamic(0, Self::TILE.rows as u32)
    }

    /// Of each row its sequence, the first position it sees and the one after the last.
    #[inline(always)]
    fn rows() -> Smem<U32x4> {
        Smem::dynamic(16 * Self::TILE.rows as u32, HOPPER_ROWS)
    }

    /// The first chunk of the tile of K (0) or V (1) of a stage.
    #[inline(always)]
    fn stage(part: usize, slot: u32) -> u32 {
        Self::TILE.parts[part] as u32 + slot * Self::BLOCK * Self::UNITS[part]
    }

    /// Ends its phase when the producers have filled K (0) or V (1) of a stage.
    #[inline(always)]
    #[track_caller]
    fn full(part: usize, place: Place) -> Mbarrier {
        let words = Smem::dynamic(16 * (Self::TILE.rows as u32 + HOPPER_ROWS), 4 * STAGES as u32);
        Mbarrier::at(words, part as u32 * STAGES as u32 + place.slot)
    }

    /// Ends its phase when the consumers have read it.
    #[inline(always)]
    #[track_caller]
    fn empty(part: usize, place: Place) -> Mbarrier {
        let words = Smem::dynamic(16 * (Self::TILE.rows as u32 + HOPPER_ROWS), 4 * STAGES as u32);
        Mbarrier::at(words, (2 + part as u32) * STAGES as u32 + place.slot)
    }

    /// Called by a consumer warp that has read K (0) or V (1) of a stage.
    #[inline(always)]
    #[track_caller]
    fn release(part: usize, place: Place) {
        warp::sync_warp();
        if thread::lane_id() == 0 {
            Self::empty(part, place).arrive();
        }
    }

    /// The rows of the same sequence from `first` on; none of a token that is not there.
    #[inline(always)]
    #[track_caller]
    fn run(x: &Inputs, first: u32) -> Run {
        let (lane, n) = (thread::lane_id(), x.tile().n);
        let U32x4([sequence, ..]) = Self::rows().ld(first);
        let mut end = n;
        let mut i = HOPPER_ROWS / 32;
        while i > 0 {
            i -= 1;
            let r = 32 * i + lane;
            let other = warp::ballot(r > first && r < n && Self::rows().ld(r).0[0] != sequence);
            end = if other != 0 { 32 * i + other.trailing_zeros() } else { end };
        }
        let (mut low, mut high) = (u32::MAX, 0);
        let mut r = first + lane;
        while r < end {
            let U32x4([_, row_low, row_high, _]) = Self::rows().ld(r);
            low = if row_high > 0 && row_low < low { row_low } else { low };
            high = if row_high > high { row_high } else { high };
            r += 32;
        }
        let (low, high) = (warp::min_u32(low), !warp::min_u32(!high));
        let mut run = Run { rows: [first, end], first_page: 0, len: 0, block: 0, end: 0 };
        if sequence != NO_SEQUENCE && high > 0 {
            let U32x2([first_page, len]) = x.sequences.ld_early(sequence);
            run = Run { first_page, len, block: low / Self::BLOCK, end: high.div_ceil(Self::BLOCK), ..run };
        }
        run
    }

    /// Starts the copies of a thread's part of a block of K (0) or V (1). `pages` of its positions, of which `n_valid` exist;
    /// the others become zero.
    #[inline(always)]
    #[track_caller]
    fn load(x: &Inputs, part: usize, slot: u32, pages: [u32; 2], n_valid: u32) {
        let (thread, units, given) = (thread::thread_idx_x(), Self::UNITS[part], x.head_dim[part] / 8);
        // In a pass the threads copy so many rows.
        let pass = 32 * PRODUCERS / units;
        let (first, c) = (thread / units, thread % units);
        let (to, from) = (Self::stage(part, slot), x.cache[part]);
        let row = |page: u32| (page as usize * x.n_head_kv as usize + thread::block_idx_y() as usize) * PAGE;
        if given == units && n_valid >= Self::BLOCK {
            let mut page = 0;
            while page < Self::BLOCK / PAGE as u32 {
                let from = from.offset(row(pages[page as usize]) * units as usize + thread as usize);
                let mut r = 0;
                while r < PAGE as u32 {
                    let at = place(Self::BLOCK, PAGE as u32 * page + r + first, c);
                    async_copy::copy16(Self::chunks(), to + at, from, r * units);
                    r += pass;
                }
                page += 1;
            }
        } else if c < given {
            let mut r = first;
            while r < math::opaque(Self::BLOCK) {
                let page = if r < PAGE as u32 { pages[0] } else { pages[1] };
                let from = from.offset((row(page) + r as usize % PAGE) * given as usize);
                let at = to + place(Self::BLOCK, r, c);
                async_copy::copy16_or_zero(Self::chunks(), at, from, c, r < n_valid);
                r += pass;
            }
        }
    }

    /// Zeros in the columns that a head does not have; no block's copy touches them.
    #[inline(always)]
    #[track_caller]
    fn pad(x: &Inputs, part: usize) {
        let (units, given) = (Self::UNITS[part], x.head_dim[part] / 8);
        let pad = units - given;
        let mut i = thread::thread_idx_x();
        while i < STAGES as u32 * Self::BLOCK * pad {
            let (r, c) = (i / pad, given + i % pad);
            let at = Self::stage(part, r / Self::BLOCK) + place(Self::BLOCK, r % Self::BLOCK, c);
            Self::chunks().st(at, U32x4([0; 4]));
            i += 32 * PRODUCERS;
        }
    }

    /// Called by a producer warp whose part of K (0) or V (1) of a stage is there.
    #[inline(always)]
    #[track_caller]
    fn tell(part: u32, place: Place) {
        sync::fence_async_proxy();
        warp::sync_warp();
        if thread::lane_id() == 0 {
            let full = if part == 0 { Self::full(0, place) } else { Self::full(1, place) };
            full.arrive();
        }
    }

    /// The nth of the pieces of a run, in the order in which they are copied and unpacked: K or V, and its first position.
    #[inline(always)]
    fn piece(run: &Run, nth: u32) -> (u32, u32) {
        let per_part = Self::BLOCK / PIECE as u32;
        let block = run.block + nth / (2 * per_part);
        (nth / per_part % 2, block * Self::BLOCK + nth % per_part * PIECE as u32)
    }

    /// The page of a piece; any if it has none.
    #[inline(always)]
    #[track_caller]
    fn page(x: &Inputs, run: &Run, n: u32, nth: u32) -> u32 {
        let (_, position) = Self::piece(run, nth);
        if nth < n && position < run.len {
            x.pages.ld_early(run.first_page + position / PAGE as u32)
        } else {
            0
        }
    }

    /// The room of a piece of K or V.
    #[inline(always)]
    #[track_caller]
    fn raw(x: &Inputs, part: u32, nth: u32) -> Raw {
        let bytes = Self::TILE.piece_bytes(x.row_bytes);
        let pieces = Smem::dynamic(Self::TILE.bytes, PIECES as u32 * bytes / 4);
        let row_bytes = if part == 0 { x.row_bytes[0] } else { x.row_bytes[1] };
        Raw { words: pieces.skip(nth % PIECES as u32 * bytes / 4), row_bytes }
    }

    /// Starts the copy of a piece, if the run has it.
    #[inline(always)]
    #[track_caller]
    fn copy_piece(x: &Inputs, run: &Run, n: u32, nth: u32, page: u32) {
        let (part, position) = Self::piece(run, nth);
        if nth < n {
            let raw = Self::raw(x, part, nth);
            let row = (page as usize * x.n_head_kv as usize + thread::block_idx_y() as usize) * PAGE;
            let row = row + position as usize % PAGE;
            let from = if part == 0 { x.cache[0] } else { x.cache[1] };
            let from = from.cast::<u8>().offset(row * raw.row_bytes as usize);
            raw.copy(from, PIECE as u32, run.len.saturating_sub(position), 32 * PRODUCERS);
        }
        async_copy::commit();
    }

    /// What the producers do where the cache has blocks: pieces are copied ahead as they are, and unpacked.
    #[inline(always)]
    #[track_caller]
    fn produce_unpacked(x: &Inputs) {
        const {
            assert!(PIECES == 0 || PIECE <= PAGE && Self::UNITS[0] == Self::UNITS[1]);
            assert!((32 * PRODUCERS).is_multiple_of(Raw::pass_threads(Self::UNITS[0])));
        }
        unroll!(PART in 0..2 { Self::pad(x, PART); });
        let mut place = Self::FIRST;
        let mut first = 0;
        while first < x.tile().n {
            let run = Self::run(x, first);
            first = run.rows[1];
            let per_part = Self::BLOCK / PIECE as u32;
            let n = (run.end - run.block) * 2 * per_part;
            // Everyone is done with the pieces of the run before.
            sync::barrier_of(PIECE_ARRIVED, 32 * PRODUCERS);
            let (mut copied, mut page) = (0, Self::page(x, &run, n, 0));
            let mut nth = 0;
            while copied < math::opaque(PIECES as u32 - 1) {
                Self::copy_piece(x, &run, n, copied, page);
                copied += 1;
                page = Self::page(x, &run, n, copied);
            }
            while nth < n {
                // The piece is there, and everyone is done with the one before.
                if PIECES == 3 {
                    async_copy::wait::<1>();
                } else {
                    async_copy::wait::<2>();
                }
                sync::barrier_of(PIECE_ARRIVED, 32 * PRODUCERS);
                Self::copy_piece(x, &run, n, copied, page);
                copied += 1;
                page = Self::page(x, &run, n, copied);
                let (part, position) = Self::piece(&run, nth);
                let of_block = position % Self::BLOCK;
                if of_block == 0 {
                    let empty = if part == 0 { Self::empty(0, place) } else { Self::empty(1, place) };
                    empty.wait(place.parity ^ 1);
                }
                let of = |pair: [u32; 2]| if part == 0 { pair[0] } else { pair[1] };
                let stage = of([Self::stage(0, place.slot), Self::stage(1, place.slot)]);
                let to = Permuted::<KC> {
                    chunks: Self::chunks(),
                    start: stage,
                    rows: Self::BLOCK,
                    first: of_block,
                };
                let raw = Self::raw(x, part, nth);
                raw.unpack(of(x.format), &to, PIECE as u32, of(x.head_dim), 32 * PRODUCERS);
                if of_block + PIECE as u32 == Self::BLOCK {
                    Self::tell(part, place);
                    if part == 1 {
                        place = Self::next(place);
                    }
                }
                nth += 1;
            }
        }
    }

    /// What the producers do.
    #[inline(always)]
    #[track_caller]
    fn produce(x: &Inputs) {
        unroll!(PART in 0..2 { Self::pad(x, PART); });
        // What was begun last, which everyone is told of when it has arrived.
        let (mut part, mut begun, mut is_begun) = (0, Self::FIRST, false);
        let mut place = Self::FIRST;
        let mut first = 0;
        while first < x.tile().n {
            let run = Self::run(x, first);
            first = run.rows[1];
            let mut block = run.block;
            while block < run.end {
                let n_valid = run.len - block * Self::BLOCK;
                // A page that the sequence does not have is not looked up.
                let page = run.first_page + block * (Self::BLOCK / PAGE as u32);
                let mut pages = [x.pages.ld_early(page); 2];
                if Self::BLOCK > PAGE as u32 && n_valid > PAGE as u32 {
                    pages[1] = x.pages.ld_early(page + 1);
                }
                unroll!(PART in 0..2 {
                    Self::empty(PART, place).wait(place.parity ^ 1);
                    Self::load(x, PART, place.slot, pages, n_valid);
                    async_copy::commit();
                    if is_begun {
                        async_copy::wait::<1>();
                        Self::tell(part, begun);
                    }
                    (part, begun, is_begun) = (PART as u32, place, true);
                });
                place = Self::next(place);
                block += 1;
            }
        }
        if is_begun {
            async_copy::wait::<0>();
            Self::tell(part, begun);
        }
    }

    /// Queries of a warpgroup's rows into shared memory. `thread` of the group.
    #[inline(always)]
    #[track_caller]
    fn queries(x: &Inputs, group: u32, thread: u32) {
        let (tile, units) = (x.tile(), Self::UNITS[0]);
        let (pass, first, c) = (128 / units, thread / units, thread % units);
        let chunks = Self::chunks().skip(group * GROUP_ROWS * units);
        let mut r = first;
        while r < math::opaque(GROUP_ROWS) {
            // Four rows at a time, all loaded before one is stored.
            let mut values = [[F32x4([0.0; 4]); 2]; 4];
            unroll!(I in 0..4 {
                let row = GROUP_ROWS * group + r + I as u32 * pass;
                if row < tile.n && 8 * c < x.head_dim[0] {
                    let from = x.q.offset(x.head_row(tile, row) * (x.head_dim[0] / 4) as usize);
                    values[I] = [from.ld_nc(2 * c), from.ld_nc(2 * c + 1)];
                }
            });
            unroll!(I in 0..4 {
                let [F32x4(a), F32x4(b)] = values[I];
                let words = [
                    math::pack_f16(a[0], a[1]),
                    math::pack_f16(a[2], a[3]),
                    math::pack_f16(b[0], b[1]),
                    math::pack_f16(b[2], b[3]),
                ];
                chunks.st(place(GROUP_ROWS, r + I as u32 * pass, c), U32x4(words));
            });
            r += 4 * pass;
        }
    }

    /// Starts `s = q · k`.
    #[inline(always)]
    #[track_caller]
    fn scores(s: &mut Sums<S>, group: u32, place: Place) {
        let queries = Operand::at(Self::chunks(), group * GROUP_ROWS * Self::UNITS[0]);
        let keys = Operand::at(Self::chunks(), Self::stage(0, place.slot));
        let mut step = 0;
        while step < 4 * KC as u32 {
            let (piece, chunk) = (step / 4, 2 * (step % 4));
            let queries = queries.skip(piece * GROUP_ROWS * 8 + chunk);
            let keys = keys.skip(piece * Self::BLOCK * 8 + chunk);
            if step == 0 {
                s.product::<false>(queries, keys);
            } else {
                s.product::<true>(queries, keys);
            }
            step += 1;
        }
        wgmma::commit();
    }

    /// Starts `out += p · v`.
    #[inline(always)]
    #[track_caller]
    fn values(out: &mut Sums<O>, p: &[FragmentA; STEPS], place: Place) {
        let values = Operand::transposed(Self::chunks(), Self::stage(1, place.slot), Self::BLOCK * 8);
        let mut step = 0;
        while step < STEPS {
            out.add(p[step], values.skip(16 * 8 * step as u32));
            step += 1;
        }
        wgmma::commit();
    }

    /// Scores with scale and soft cap.
    #[inline(always)]
    #[track_caller]
    fn cap(x: &Inputs, s: &mut Sums<S>) {
        let mut n = 0;
        while n < S {
            let score = f32::from_bits(s.get(n)) * x.scale;
            s.set(n, (x.softcap * tanh(score)).to_bits());
            n += 1;
        }
    }

    /// Scores become probabilities, in place; the state goes on. Returns what outputs so far are to be multiplied by.
    /// `seen`: what each of the lane's rows sees, for a block that is `masked`.
    #[inline(always)]
    #[track_caller]
    fn softmax(
        x: &Inputs,
        s: &mut Sums<S>,
        state: &mut State,
        masked: bool,
        seen: [[u32; 2]; 2],
        first: u32,
    ) -> [f32; 2] {
        let mut to_log2 = x.scale;
        if x.softcap != 0.0 {
            to_log2 = math::LOG2_E;
            Self::cap(x, s);
        }
        if masked {
            // From the lane's first column on, so that the others are constants.
            let from = (first + 2 * (thread::lane_id() % 4)) as i32;
            let seen = seen.map(|[low, high]| [low as i32 - from, high as i32 - from]);
            let mut n = 0;
            while n < S / 4 {
                unroll!(I in 0..4 {
                    let column = 8 * n as i32 + I as i32 % 2;
                    let hidden = column < seen[I / 2][0] || column >= seen[I / 2][1];
                    let score = if hidden { f32::NEG_INFINITY.to_bits() } else { s.get(4 * n + I) };
                    s.set(4 * n + I, score);
                });
                n += 1;
            }
        }
        let mut max = [f32::NEG_INFINITY; 4];
        let mut n = 0;
        while n < S / 4 {
            unroll!(I in 0..4 { max[I] = math::fmax(max[I], f32::from_bits(s.get(4 * n + I))); });
            n += 1;
        }
        let (mut rescale, mut to) = ([1.0; 2], [0.0; 2]);
        unroll!(R in 0..2 {
            let mut max = math::fmax(max[2 * R], max[2 * R + 1]);
            unroll!(I in 0..2 {
                max = math::fmax(max, f32::from_bits(warp::shfl_xor(max.to_bits(), 1 << I)));
            });
            let new = math::fmax(state.max[R], max * to_log2);
            to[R] = state::finite(new);
            rescale[R] = math::ex2(state.max[R] - to[R]);
            state.max[R] = new;
            unroll!(I in 0..2 { state.sum[R][I] *= rescale[R]; });
        });
        let mut n = 0;
        while n < S / 4 {
            unroll!(I in 0..4 {
                let score = f32::from_bits(s.get(4 * n + I));
                let power = math::ex2(math::fma(score, to_log2, -to[I / 2]));
                state.sum[I / 2][I % 2] += power;
                s.set(4 * n + I, power.to_bits());
            });
            n += 1;
        }
        rescale
    }

    /// Probabilities as A; outputs so far to the new maximum.
    #[inline(always)]
    #[track_caller]
    fn carry_over(s: &Sums<S>, out: &mut Sums<O>, rescale: [f32; 2]) -> [FragmentA; STEPS] {
        let mut n = 0;
        // Past the first blocks maxima hardly move, and a factor of one changes nothing.
        let moved = warp::ballot(rescale[0] != 1.0 || rescale[1] != 1.0) != 0;
        while moved && n < O / 4 {
            unroll!(I in 0..4 {
                let value = f32::from_bits(out.get(4 * n + I)) * rescale[I / 2];
                out.set(4 * n + I, value.to_bits());
            });
            n += 1;
        }
        let pair = |i: usize| math::pack_f16(f32::from_bits(s.get(i)), f32::from_bits(s.get(i + 1)));
        let mut p = [FragmentA::default(); STEPS];
        let mut step = 0;
        while step < STEPS {
            unroll!(I in 0..4 { p[step].0[I] = pair(8 * step + 2 * I); });
            step += 1;
        }
        p
    }

    /// What the consumers do.
    #[inline(always)]
    #[track_caller]
    fn consume(x: &Inputs) {
        // Computed anew where they are needed: outputs and scores need the registers.
        let thread = || math::fresh(thread::thread_idx_x()) - 32 * PRODUCERS;
        let group = || thread() / 128;
        // The lane's first row in the tile.
        let row = || thread() / 32 * 16 + thread() % 32 / 4;
        Self::queries(x, group(), thread() % 128);
        sync::fence_async_proxy();
        sync::barrier_of(GROUP + group(), 128);
        // The second group says at once that the first may begin.
        let (mine, others) = (|| TURN + 1 - group(), || TURN + group());
        if group() == 1 {
            sync::barrier_arrive_of(others(), 256);
        }
        let mut out = Sums::<O>::zero();
        let mut state = State { max: [f32::NEG_INFINITY; 2], sum: [[0.0; 2]; 2] };
        let mut place = Self::FIRST;
        let mut first = 0;
        while first < x.tile().n {
            let run = Self::run(x, first);
            first = run.rows[1];
            if run.block == run.end {
                continue;
            }
            // What the lane's rows see; what all of the group's rows do, those that are not there aside.
            let see = |row: u32| {
                let U32x4([sequence, low, high, _]) = Self::rows().ld(row);
                let inside = row >= run.rows[0] && row < run.rows[1];
                (sequence, if inside { [low, high] } else { [0, 0] })
            };
            let seen = [see(row()).1, see(row() + 8).1];
            let (mut all_low, mut all_high) = (0, u32::MAX);
            unroll!(I in 0..2 {
                let (sequence, [low, high]) = see(GROUP_ROWS * group() + 32 * I as u32 + thread::lane_id());
                let high = if sequence == ABSENT { u32::MAX } else { high };
                all_low = if low > all_low { low } else { all_low };
                all_high = if high < all_high { high } else { all_high };
            });
            let (all_low, all_high) = (!warp::min_u32(!all_low), warp::min_u32(all_high));
            let is_masked = |first: u32| first < all_low || first + Self::BLOCK > all_high;

            let mut s = Sums::<S>::zero();
            Self::full(0, place).wait(place.parity);
            wgmma::fence();
            Self::scores(&mut s, group(), place);
            s.wait::<0>();
            Self::release(0, place);
            let at = run.block * Self::BLOCK;
            let rescale = Self::softmax(x, &mut s, &mut state, is_masked(at), seen, at);
            let mut p = Self::carry_over(&s, &mut out, rescale);
            let mut block = run.block + 1;
            while block < run.end {
                let next = Self::next(place);
                Self::full(0, next).wait(next.parity);
                Self::full(1, place).wait(place.parity);
                sync::barrier_of(mine(), 256);
                wgmma::fence();
                Self::scores(&mut s, group(), next);
                Self::values(&mut out, &p, place);
                sync::barrier_arrive_of(others(), 256);
                s.wait::<1>();
                Self::release(0, next);
                let at = block * Self::BLOCK;
                let rescale = Self::softmax(x, &mut s, &mut state, is_masked(at), seen, at);
                out.wait::<0>();
                Self::release(1, place);
                p = Self::carry_over(&s, &mut out, rescale);
                place = next;
                block += 1;
            }
            Self::full(1, place).wait(place.parity);
            wgmma::fence();
            Self::values(&mut out, &p, place);
            out.wait::<0>();
            Self::release(1, place);
            place = Self::next(place);
        }
        if group() == 0 {
            sync::barrier_of(mine(), 256);
        }
        Self::store(x, &out, &state);
    }

    /// Out they go.
    #[inline(always)]
    #[track_caller]
    fn store(x: &Inputs, out: &Sums<O>, state: &State) {
        let (tile, thread) = (x.tile(), math::fresh(thread::thread_idx_x()) - 32 * PRODUCERS);
        let row = thread / 32 * 16 + thread % 32 / 4;
        unroll!(R in 0..2 {
            let mut sum = state.sum[R][0] + state.sum[R][1];
            unroll!(I in 0..2 { sum += f32::from_bits(warp::shfl_xor(sum.to_bits(), 1 << I)); });
            let row = row + 8 * R as u32;
            if row < tile.n {
                let [token, head] = x.place(tile, row);
                let at = token as usize * x.n_head as usize + head as usize;
                let sink = super::sink(x.sinks, head);
                let factor = state::normaliser(state.max[R], sum, sink);
                let to = x.out.offset(at * (x.head_dim[1] / 2) as usize);
                let mut n = 0;
                while n < O / 4 {
                    let column = 8 * n as u32 + 2 * (thread % 4);
                    if column < x.head_dim[1] {
                        let [low, high] = [0, 1].map(|i| f32::from_bits(out.get(4 * n + 2 * R + i)));
                        to.st(column / 2, F32x2([low * factor, high * factor]));
                    }
                    n += 1;
                }
            }
        });
    }

    #[inline(always)]
    #[track_caller]
    fn prompt(x: Inputs) {
        let thread = thread::thread_idx_x();
        if thread == 0 {
            let mut slot = 0;
            while slot < STAGES as u32 {
                unroll!(PART in 0..2 {
                    Self::full(PART, Place { slot, parity: 0 }).init(PRODUCERS);
                    Self::empty(PART, Place { slot, parity: 0 }).init(CONSUMERS);
                });
                slot += 1;
            }
        }
        if thread < HOPPER_ROWS {
            let tile = x.tile();
            let mut row = [ABSENT, 0, 0, 0];
            if thread < tile.n {
                let [token, _] = x.place(tile, thread);
                let sequence = x.token_sequences.ld_early(token);
                row[0] = sequence;
                if sequence != NO_SEQUENCE {
                    let pos = x.positions.ld_early(token);
                    let U32x2([_, len]) = x.sequences.ld_early(sequence);
                    let (low, high) = super::visible(pos, len, x.flags & CAUSAL != 0, x.window);
                    row = [sequence, low, high, 0];
                }
            }
            Self::rows().st(thread, U32x4(row));
        }
        grid::wait_for_earlier();
        sync::sync_threads();
        if thread < 32 * PRODUCERS {
            warp::give_registers::<PRODUCER_REGISTERS>();
            if PIECES > 0 {
                Self::produce_unpacked(&x);
            } else {
                Self::produce(&x);
            }
        } else {
            warp::take_registers::<CONSUMER_REGISTERS>();
            Self::consume(&x);
        }
    }
}

const _: () = assert!(HOPPER_THREADS == 32 * (PRODUCERS + CONSUMERS));

/// Entry of a tile.
#[inline(always)]
fn attend<
    const KC: usize,
    const S: usize,
    const O: usize,
    const STEPS: usize,
    const STAGES: usize,
    const PIECE: usize,
    const PIECES: usize,
>(
    q: Glb<F32x4>,
    k: Glb<U32x4>,
    v: Glb<U32x4>,
    out: Glb<F32x2>,
    positions: Glb<u32>,
    token_sequences: Glb<u32>,
    sequences: Glb<U32x2>,
    pages: Glb<u32>,
    sinks: Glb<f32>,
    n_tokens: u32,
    n_head: u32,
    n_head_kv: u32,
    head_dim_k: u32,
    head_dim_v: u32,
    row_bytes_k: u32,
    row_bytes_v: u32,
    format_k: u32,
    format_v: u32,
    flags: u32,
    window: u32,
    scale: f32,
    softcap: f32,
) where
    Sums<S>: Scores,
    Sums<O>: Outputs,
{
    Hopper::<KC, S, O, STEPS, STAGES, PIECE, PIECES>::prompt(Inputs {
        q,
        cache: [k, v],
        out,
        positions,
        token_sequences,
        sequences,
        pages,
        sinks,
        n_tokens,
        n_head,
        n_head_kv,
        head_dim: [head_dim_k, head_dim_v],
        row_bytes: [row_bytes_k, row_bytes_v],
        format: [format_k, format_v],
        flags,
        window,
        scale,
        softcap,
    });
}

/// Entries of the table, see `for_each_hopper`.
macro_rules! entries {
    ($($dim:literal $suffix:literal $class:ident
        [$kc:literal $s:literal $o:literal $steps:literal] $stages:literal [$piece:literal $pieces:literal];)*) => {
        kernels! {
            in "flash_hopper";
            pub(super) ENTRIES: threads(384, 1), early;
            fn (
                q: Glb<F32x4>, k: Glb<U32x4>, v: Glb<U32x4>, out: Glb<F32x2>,
                positions: Glb<u32>, token_sequences: Glb<u32>, sequences: Glb<U32x2>, pages: Glb<u32>,
                sinks: Glb<f32>,
                n_tokens: u32, n_head: u32, n_head_kv: u32, head_dim_k: u32, head_dim_v: u32,
                row_bytes_k: u32, row_bytes_v: u32, format_k: u32, format_v: u32,
                flags: u32, window: u32, scale: f32, softcap: f32,
            );
            $(concat!("flash_hopper_", $dim, "_", $suffix) =>
                attend::<$kc, $s, $o, $steps, $stages, $piece, $pieces>;)*
        }
    };
}
for_each_hopper!(entries);
