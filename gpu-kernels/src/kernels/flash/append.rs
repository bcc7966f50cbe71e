//! A token's own key and value on their way to the cache, and its rotation: what `kv_store` does, inside the decode that
//! would otherwise wait for it.
//!
//! * `new_k` [n_tokens, n_head_kv · head_dim_k], `new_v` [n_tokens, n_head_kv · head_dim_v] f32, `cells` `[n_tokens]` and
//!   `angles` [n_tokens, head_dim_k / 2] as `kv_store` takes them; `q` is not rotated yet. A sequence has one token at
//!   most, causal, over an F16 cache whose keys fill the tile and are rotated whole: [`appends`] says whether other
//!   arguments are such.
//! * Every CTA rotates its queries in registers. The one whose share holds the token's position, the last it sees,
//!   rounds key and value, lays them into the block in shared memory once that has been copied without them, and
//!   stores them; of several tiles of a KV head the first one stores.
//! * The bits are those of `kv_store` and of the decode after it.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

#[cfg(any(all(target_arch = "nvptx64", sm_ge_80), feature = "emu"))]
mod gpu {
    use super::super::block::{Attention, Inputs};
    use super::super::store::Class;
    use super::super::{NEOX, PAGE};
    use crate::device::{F32x2, F32x4, Glb, Smem, thread};
    use crate::kernels::kv_store::NO_CELL;
    use crate::kernels::rope::gpu::turn;

    /// Most pairs of the appended key and value that a thread has.
    pub(in super::super) const PAIRS: usize = 2;

    /// Where a pair of the appended row lies: in the key (0) or the value (1), and which of its pairs.
    #[derive(Clone, Copy)]
    struct Pair {
        part: usize,
        nth: u32,
    }

    impl<
        C: Class,
        const STAGES: usize,
        const KS: usize,
        const NS: usize,
        const NO: usize,
        const SHARERS: usize,
        const GROUPS: usize,
    > Attention<C, STAGES, KS, NS, NO, SHARERS, GROUPS>
    {
        /// Whether the entry can append.
        pub(in super::super) const APPENDS: bool = STAGES > 1 && Self::TILE.q_in_registers();
        /// Pairs of the appended key and value that a thread has.
        const PAIRS_OF_THREAD: usize =
            ((Self::TILE.dims[0] + Self::TILE.dims[1]) / 2).div_ceil(Self::THREADS as usize);

        /// Angles of the lane's part of the queries: of steps half a head apart those of the pairs that turn there. They
        /// are two pairs of the table, in either mode.
        #[cfg_attr(target_arch = "nvptx64", inline(always))]
        #[track_caller]
        pub(in super::super) fn load_angles(x: &Inputs, lane: u32) -> [[[f32; 4]; 2]; KS] {
            let table = Self::angles(x);
            let neox = x.flags & NEOX != 0;
            let mut angles = [[[0.0; 4]; 2]; KS];
            let mut step = 0;
            while step < KS / 2 {
                unroll!(HALF in 0..2 {
                    let pair = 8 * step as u32 + 4 * HALF as u32 + lane % 4;
                    if neox {
                        angles[step][HALF] = table.cast::<F32x4>().ld_nc(pair).0;
                    } else {
                        let F32x2([c0, s0]) = table.ld_nc(pair);
                        let F32x2([c1, s1]) = table.ld_nc(pair + 4 * KS as u32);
                        angles[step][HALF] = [c0, s0, c1, s1];
                    }
                });
                step += 1;
            }
            angles
        }

        /// The token's angles.
        #[inline(always)]
        fn angles(x: &Inputs) -> Glb<F32x2> {
            x.appended.angles.offset((thread::block_idx_x() * (x.head_dim[0] / 2)) as usize)
        }

        /// The token's row of KV head `kv_head` in `new`, whose rows have so many pairs.
        #[inline(always)]
        fn new_row(x: &Inputs, new: Glb<F32x2>, kv_head: u32, pairs: u32) -> Glb<F32x2> {
            new.offset(((thread::block_idx_x() * x.n_head_kv + kv_head) * pairs) as usize)
        }

        /// Rotates what `load_queries` loaded. The partners of a pair are in the same lane: beside each other, or half
        /// the steps away.
        #[cfg_attr(target_arch = "nvptx64", inline(always))]
        pub(in super::super) fn rotate(
            x: &Inputs,
            loaded: &mut [[[[f32; 2]; 2]; KS]; 2],
            angles: &[[[f32; 4]; 2]; KS],
        ) {
            let neox = x.flags & NEOX != 0;
            unroll!(R in 0..2 {
                let mut step = 0;
                while step < KS / 2 {
                    unroll!(HALF in 0..2 {
                        let [c0, s0, c1, s1] = angles[step][HALF];
                        let (low, high) = (loaded[R][step][HALF], loaded[R][step + KS / 2][HALF]);
                        let (first, second) = if neox {
                            ([low[0], high[0]], [low[1], high[1]])
                        } else {
                            (low, high)
                        };
                        let first = turn(first[0], first[1], c0, s0);
                        let second = turn(second[0], second[1], c1, s1);
                        let (low, high) = if neox {
                            ([first[0], second[0]], [first[1], second[1]])
                        } else {
                            (first, second)
                        };
                        loaded[R][step][HALF] = low;
                        loaded[R][step + KS / 2][HALF] = high;
                    });
                    step += 1;
                }
            });
        }

        /// The pair `i` of a thread, if it has one.
        #[inline(always)]
        fn pair(x: &Inputs, i: usize) -> Option<Pair> {
            let nth = i as u32 * Self::THREADS + thread::thread_idx_x();
            let [keys, values] = x.head_dim.map(|dim| dim / 2);
            if nth < keys {
                Some(Pair { part: 0, nth })
            } else if nth - keys < values {
                Some(Pair { part: 1, nth: nth - keys })
            } else {
                None
            }
        }

        /// The thread's pairs of the key, rotated, and of the value.
        #[cfg_attr(target_arch = "nvptx64", inline(always))]
        #[track_caller]
        pub(in super::super) fn load_appended(x: &Inputs, kv_head: u32) -> [[f32; 2]; PAIRS] {
            const { assert!(!Self::APPENDS || Self::PAIRS_OF_THREAD <= PAIRS) }
            let mut pairs = [[0.0; 2]; PAIRS];
            unroll!(I in 0..2 {
                if I < Self::PAIRS_OF_THREAD {
                    pairs[I] = match Self::pair(x, I) {
                        Some(Pair { part: 0, nth }) => Self::rotated_key(x, kv_head, nth),
                        Some(Pair { nth, .. }) => {
                            Self::new_row(x, x.appended.v, kv_head, x.head_dim[1] / 2).ld_nc(nth).0
                        }
                        None => [0.0; 2],
                    };
                }
            });
            pairs
        }

        /// A pair of the key, rotated.
        #[cfg_attr(target_arch = "nvptx64", inline(always))]
        #[track_caller]
        fn rotated_key(x: &Inputs, kv_head: u32, nth: u32) -> [f32; 2] {
            let half = x.head_dim[0] / 4;
            let key = Self::new_row(x, x.appended.k, kv_head, 2 * half);
            let table = Self::angles(x);
            let own = key.ld_nc(nth).0;
            if x.flags & NEOX == 0 {
                let F32x2([c, s]) = table.ld_nc(nth);
                return turn(own[0], own[1], c, s);
            }
            // Of two turned pairs the thread has one side.
            let first = nth < half;
            let (low, partner) = if first { (nth, nth + half) } else { (nth - half, nth - half) };
            let other = key.ld_nc(partner).0;
            let F32x4([c0, s0, c1, s1]) = table.cast::<F32x4>().ld_nc(low);
            let (a, b) = if first { (own, other) } else { (other, own) };
            let (one, two) = (turn(a[0], b[0], c0, s0), turn(a[1], b[1], c1, s1));
            if first { [one[0], two[0]] } else { [one[1], two[1]] }
        }

        /// Pairs as the cache has them.
        #[inline(always)]
        pub(in super::super) fn as_words(pairs: &[[f32; 2]; PAIRS]) -> [u32; PAIRS] {
            pairs.map(|[low, high]| C::pack(low, high)[0])
        }

        /// Lays the row of position `pos` into its block in shared memory, which was copied without it, and stores it as cell
        /// `cell` of the cache if `head`, the tile's first, is the KV head's first.
        #[cfg_attr(target_arch = "nvptx64", inline(always))]
        #[track_caller]
        pub(in super::super) fn append(
            x: &Inputs,
            kv_head: u32,
            head: u32,
            [pos, cell]: [u32; 2],
            words: &[u32; PAIRS],
            stage: u32,
        ) {
            let stores = head == kv_head * (x.n_head / x.n_head_kv);
            let rows = Smem::<u32>::dynamic(0, 4 * Self::LAYOUT.end as u32);
            let (page, nth_of_page) = (cell as usize / PAGE, cell as usize % PAGE);
            let row_of_cache = (page * x.n_head_kv as usize + kv_head as usize) * PAGE + nth_of_page;
            unroll!(I in 0..2 {
                if I < Self::PAIRS_OF_THREAD
                    && let Some(Pair { part, nth }) = Self::pair(x, I)
                {
                    let word = words[I];
                    let (k, v) = (Self::store(0, stage), Self::store(1, stage));
                    let row = pos % Self::BLOCK;
                    let unit = if part == 0 { k.at(row, nth / 4) } else { v.at(row, nth / 4) };
                    rows.st(4 * unit + nth % 4, word);
                    if stores && cell != NO_CELL {
                        let (of, bytes) =
                            if part == 0 { (x.k, x.row_bytes[0]) } else { (x.v, x.row_bytes[1]) };
                        let row: Glb<u32> = of.offset(row_of_cache * bytes as usize).cast();
                        row.st(nth, word);
                    }
                }
            });
        }
    }
}
#[cfg(any(all(target_arch = "nvptx64", sm_ge_80), feature = "emu"))]
pub(super) use gpu::PAIRS;

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use crate::kernels::rope::Mode;
    use crate::launch::DevicePtr;

    /// What a decode appends to the cache; see the module.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the module's names
    pub struct Append {
        pub k: DevicePtr,
        pub v: DevicePtr,
        pub cells: DevicePtr,
        pub angles: DevicePtr,
        pub mode: Mode,
    }
}
