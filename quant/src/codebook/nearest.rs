//! Nearest entries of a codebook to any lattice point: what the encoders ask many times per weight.
//!
//! For a point that is no entry the candidates are all entries at the smallest few distinct distances
//! ([`Codebook::SHELLS`]; ggml's choice, which byte equality needs), ordered by distance, then by number: on equal
//! error the first one wins, so the order is part of the result.
//!
//! The lists of a codebook take up to 650 KiB and some 40 ms to compute, so they are computed at first use
//! and kept in statics. Without `std` or `unsafe` there is no lock to take: the lists are atomics, threads that come
//! first at the same time all write the same values to the same places, and `ready` is only set after a complete pass.

use core::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, Ordering};

use super::{IQ1, IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS};

/// Marks a list of one that is the point itself.
const ON_GRID: u16 = 0x8000;
/// Largest codebook.
const MAX_ENTRIES: usize = 2048;

/// Lists of candidates: those of point `p` are `lists[starts[p]..starts[p + 1]]`.
pub(crate) struct Lists {
    ready: AtomicBool,
    starts: &'static [AtomicU32],
    lists: &'static [AtomicU16],
}

/// A codebook as the encoders see it: coordinates are level numbers, not values.
pub(crate) trait Codebook {
    /// Coordinates per entry: 4 or 8.
    const DIM: usize;
    /// Levels per coordinate.
    const LEVELS: usize;
    /// Number of entries.
    const ENTRIES: usize;
    /// How many distinct distances from a point its candidates may have.
    const SHELLS: usize;
    /// Levels of an entry, a byte per coordinate.
    fn levels(entry: usize) -> u64;
    /// The lists' storage.
    fn storage() -> &'static Lists;
}

/// Where a point lies.
pub(crate) enum Place {
    /// It is this entry.
    Entry(usize),
    /// It is none; these are the candidates, never empty.
    Between(&'static [AtomicU16]),
}

/// Number of the point with these levels.
#[inline(always)]
fn point<B: Codebook>(levels: &[u8]) -> usize {
    levels.iter().rev().fold(0, |p, &l| p * B::LEVELS + l as usize)
}

/// Looks a point up, given by `DIM` levels, each below `LEVELS`.
#[inline(always)]
pub(crate) fn place<B: Codebook>(levels: &[u8]) -> Place {
    let book = B::storage();
    if !book.ready.load(Ordering::Acquire) {
        compute::<B>(book);
    }
    let p = point::<B>(levels);
    let start = book.starts[p].load(Ordering::Relaxed) as usize;
    let first = book.lists[start].load(Ordering::Relaxed);
    if first & ON_GRID != 0 {
        return Place::Entry((first & !ON_GRID) as usize);
    }
    let end = book.starts[p + 1].load(Ordering::Relaxed) as usize;
    Place::Between(&book.lists[start..end])
}

/// Entry number of a point that is an entry; the nearest one otherwise.
#[inline]
pub(crate) fn entry<B: Codebook>(levels: &[u8]) -> usize {
    match place::<B>(levels) {
        Place::Entry(entry) => entry,
        Place::Between(list) => list[0].load(Ordering::Relaxed) as usize,
    }
}

/// Fills the lists. Same values whoever runs it, so it may run on several threads at once.
#[cold]
fn compute<B: Codebook>(book: &Lists) {
    let points = B::LEVELS.pow(B::DIM as u32);
    let mut coordinates = [[0i8; MAX_ENTRIES]; 8];
    for entry in 0..B::ENTRIES {
        let levels = B::levels(entry).to_le_bytes();
        for (axis, level) in coordinates.iter_mut().zip(levels) {
            axis[entry] = level as i8;
        }
    }
    let mut at = 0;
    let mut push = |candidate: u16| {
        book.lists[at].store(candidate, Ordering::Relaxed);
        at += 1;
        at as u32
    };
    book.starts[0].store(0, Ordering::Relaxed);
    for p in 0..points {
        let mut distance = [0u8; MAX_ENTRIES];
        let mut rest = p;
        for axis in &coordinates[..B::DIM] {
            let level = (rest % B::LEVELS) as i8;
            rest /= B::LEVELS;
            for (distance, coordinate) in distance[..B::ENTRIES].iter_mut().zip(axis) {
                // At most 7² on each of four axes, or 2² on each of eight.
                *distance += ((coordinate - level) * (coordinate - level)) as u8;
            }
        }
        let distance = &distance[..B::ENTRIES];
        let mut end = 0;
        let mut beyond = 0u8;
        for _ in 0..B::SHELLS {
            // Distances are below 255, which stands for "no entry left".
            let shell =
                distance.iter().map(|&d| if d >= beyond { d } else { u8::MAX }).fold(u8::MAX, u8::min);
            if shell == u8::MAX {
                break;
            }
            let mark = if shell == 0 { ON_GRID } else { 0 };
            for (entry, &d) in distance.iter().enumerate() {
                if d == shell {
                    end = push(entry as u16 | mark);
                }
            }
            if shell == 0 {
                break;
            }
            beyond = shell + 1;
        }
        book.starts[p + 1].store(end, Ordering::Relaxed);
    }
    book.ready.store(true, Ordering::Release);
}

macro_rules! codebook {
    (
        $name:ident: $doc:literal, $table:ident, $dim:literal axes of $levels:literal levels,
        $shells:literal shells, $candidates:literal candidates, $to_levels:expr
    ) => {
        #[doc = $doc]
        pub(crate) struct $name;
        impl Codebook for $name {
            const DIM: usize = $dim;
            const LEVELS: usize = $levels;
            const ENTRIES: usize = $table.len();
            const SHELLS: usize = $shells;
            #[inline(always)]
            fn levels(entry: usize) -> u64 {
                $to_levels($table[entry])
            }
            #[inline(always)]
            fn storage() -> &'static Lists {
                static STARTS: [AtomicU32; usize::pow($levels, $dim) + 1] =
                    [const { AtomicU32::new(0) }; usize::pow($levels, $dim) + 1];
                static LISTS: [AtomicU16; $candidates] = [const { AtomicU16::new(0) }; $candidates];
                static STORAGE: Lists =
                    Lists { ready: AtomicBool::new(false), starts: &STARTS, lists: &LISTS };
                &STORAGE
            }
        }
    };
}

// The values of these codebooks are such that a shift gives the level back: IQ2 8, 25, 43; IQ3_XXS 4, 12, .. 52, 62;
// IQ3_S 1, 3, .. 15. The number of candidates is what `compute` writes (it would panic on more; a test checks there
// are no fewer).
codebook!(Iq2Xxs: "IQ2_XXS", IQ2_XXS, 8 axes of 3 levels, 2 shells, 113413 candidates, iq2_levels);
codebook!(Iq2Xs: "IQ2_XS", IQ2_XS, 8 axes of 3 levels, 2 shells, 182233 candidates, iq2_levels);
codebook!(Iq2S: "IQ2_S", IQ2_S, 8 axes of 3 levels, 1 shells, 45740 candidates, iq2_levels);
codebook!(Iq1: "IQ1_S and IQ1_M", IQ1, 8 axes of 3 levels, 3 shells, 329769 candidates, |e: u32| {
    (e & 0x0303_0303) as u64 | (((e >> 4) & 0x0303_0303) as u64) << 32
});
codebook!(Iq3Xxs: "IQ3_XXS", IQ3_XXS, 4 axes of 8 levels, 2 shells, 19241 candidates, |e: u32| {
    ((e >> 3) & 0x0707_0707) as u64
});
codebook!(Iq3S: "IQ3_S", IQ3_S, 4 axes of 8 levels, 3 shells, 25245 candidates, |e: u32| {
    ((e >> 1) & 0x0707_0707) as u64
});

#[inline(always)]
fn iq2_levels(entry: u64) -> u64 {
    (entry >> 4) & 0x0303_0303_0303_0303
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<B: Codebook>() {
        let book = B::storage();
        compute::<B>(book);
        assert_eq!(book.starts.last().unwrap().load(Ordering::Relaxed) as usize, book.lists.len());
        for e in 0..B::ENTRIES {
            let levels = B::levels(e).to_le_bytes();
            assert!(matches!(place::<B>(&levels[..B::DIM]), Place::Entry(found) if found == e));
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "a million distances and more a codebook: hours")]
    fn lists_fill_their_storage_and_entries_find_themselves() {
        check::<Iq2Xxs>();
        check::<Iq2Xs>();
        check::<Iq2S>();
        check::<Iq1>();
        check::<Iq3Xxs>();
        check::<Iq3S>();
    }
}
