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

mod consume;
mod produce;

use consume::{Outputs, Scores};

use super::{CAUSAL, HOPPER_ROWS, HOPPER_THREADS, HopperTile, NO_SEQUENCE, PAGE};
use crate::device::sync::{self, Mbarrier};
use crate::device::wgmma::{Operand, Sums};
use crate::device::{F32x2, F32x4, Glb, Smem, U32x2, U32x4, grid, math, thread, warp};

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

    /// Entry of a tile.
    #[inline(always)]
    #[track_caller]
    fn prompt(
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
    ) {
        let x = Inputs {
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
        };
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
                Hopper::<$kc, $s, $o, $steps, $stages, $piece, $pieces>::prompt;)*
        }
    };
}
for_each_hopper!(entries);
