//! The producers: K and V from the cache into the rings, as f16.

use super::*;
use crate::device::async_copy;
use crate::kernels::flash::store::{Raw, Rows};

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
    pub(super) fn produce_unpacked(x: &Inputs) {
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
    pub(super) fn produce(x: &Inputs) {
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
}
