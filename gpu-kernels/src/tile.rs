//! Tiled weights: the order in which the device keeps a matrix, so that warps load it with full-width coalesced loads.
//!
//! A matrix [n_rows, k] of GGUF rows is repacked once at load (`kernels::repack`); every product reads tiles.
//!
//! **Block formats and F32: spans.** Rows are padded with zeros to multiples of [`ROWS`], a *row tile*; k is cut into
//! *spans* of [`SPAN`] weights, the last may be shorter. A span of one row is its blocks one after the other, padded to
//! a multiple of 4 bytes, and is cut into *units* of 16, 8 or 4 bytes, the largest that divides it. Unit u of row r lies
//! at byte `(32 u + r) * unit_bytes` of its (row tile, span); a short last span has only the units it needs. The spans
//! of a row tile follow each other in order of k, row tiles follow each other. Hence a warp with lane = row loads a span
//! into registers by one coalesced load per unit ([`load_span`]), and a (row tile, span) is one contiguous piece.
//!
//! **F16 and BF16: fragments.** Rows are padded to multiples of [`ROWS`], k to multiples of 16. Tiles of 16 × 16 of 512
//! bytes each, in order [row / 16][k / 16]; the 16 bytes of lane l are its four A registers of `mma.m16n8k16`
//! ([`fragment_element`]).
//!
//! Several matrices of one shape, as a mixture's experts, lie one after the other, each padded by itself.

use quant::BlockFormat;

/// Rows of a row tile: one per lane.
pub const ROWS: usize = 32;
/// Weights of a row that are summed before anything else is added: the unit of the numeric contract of products.
pub const SPAN: usize = 256;
/// Groups of 32 weights in a span.
pub const SPAN_GROUPS: usize = SPAN / quant::format::GROUP;
/// Rows and columns of a fragment tile.
pub const FRAGMENT: usize = 16;
/// Bytes of a fragment tile.
pub const FRAGMENT_BYTES: usize = FRAGMENT * FRAGMENT * 2;

/// The order of spans of one format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TileLayout {
    /// Weights per block.
    pub block_elems: usize,
    /// Bytes per block.
    pub block_bytes: usize,
    /// Bytes of a whole span of one row.
    pub span_bytes: usize,
    /// Bytes of a unit: 16, 8 or 4.
    pub unit_bytes: usize,
}

impl TileLayout {
    /// The layout for blocks of this size.
    pub const fn new(block_elems: usize, block_bytes: usize) -> TileLayout {
        let span_bytes = (SPAN / block_elems * block_bytes).next_multiple_of(4);
        let unit_bytes = if span_bytes.is_multiple_of(16) {
            16
        } else if span_bytes.is_multiple_of(8) {
            8
        } else {
            4
        };
        TileLayout { block_elems, block_bytes, span_bytes, unit_bytes }
    }

    /// Blocks of a whole span.
    pub const fn span_blocks(&self) -> usize {
        SPAN / self.block_elems
    }

    /// Units of a whole span of one row.
    pub const fn span_units(&self) -> usize {
        self.span_bytes / self.unit_bytes
    }

    /// Spans of a row, the short one included.
    pub const fn n_spans(&self, k: usize) -> usize {
        k.div_ceil(SPAN)
    }

    /// Units of the short last span; 0 if there is none.
    pub const fn tail_units(&self, k: usize) -> usize {
        (k % SPAN / self.block_elems * self.block_bytes).div_ceil(self.unit_bytes)
    }

    /// Bytes of a tiled row, which is its stride within a row tile's total.
    pub const fn row_bytes(&self, k: usize) -> usize {
        k / SPAN * self.span_bytes + self.tail_units(k) * self.unit_bytes
    }

    /// Bytes of a row tile.
    pub const fn tile_bytes(&self, k: usize) -> usize {
        ROWS * self.row_bytes(k)
    }

    /// Where a span of a row tile starts, in bytes within the row tile.
    pub const fn span_offset(&self, span: usize) -> usize {
        span * ROWS * self.span_bytes
    }

    /// Where unit `unit` of row `row` (0..32) starts, in bytes within its (row tile, span).
    pub const fn unit_offset(&self, unit: usize, row: usize) -> usize {
        (unit * ROWS + row) * self.unit_bytes
    }

    /// Bytes of a matrix.
    pub const fn bytes(&self, n_rows: usize, k: usize) -> usize {
        n_rows.div_ceil(ROWS) * self.tile_bytes(k)
    }
}

/// Row and column, within a fragment tile, of the 16-bit element `i` (0..8) of lane `lane`'s 16 bytes.
pub const fn fragment_element(lane: usize, i: usize) -> (usize, usize) {
    (lane / 4 + 8 * (i / 2 % 2), 2 * (lane % 4) + 8 * (i / 4) + i % 2)
}

/// Where the fragment tile of rows 16 `row16`… and columns 16 `k16`… starts in a matrix of `k` columns, in bytes.
pub const fn fragment_offset(row16: usize, k16: usize, k: usize) -> usize {
    (row16 * k.div_ceil(FRAGMENT) + k16) * FRAGMENT_BYTES
}

/// A format whose matrices lie in spans: every block format, and `f32` with a weight as its block.
pub trait Tiled: bytemuck::Pod {
    /// The order.
    const LAYOUT: TileLayout;
    /// A span of one row, as words: what a lane holds in registers.
    type Words: bytemuck::Pod + AsRef<[u32]> + AsMut<[u32]>;
}

macro_rules! tiled {
    ([] $($id:ident => $module:ident :: Block,)*) => {
        $(tiled! { @one quant::formats::$module::Block, <quant::formats::$module::Block as BlockFormat>::ELEMS })*
        tiled! { @one f32, 1 }
    };
    (@one $ty:ty, $elems:expr) => {
        impl Tiled for $ty {
            const LAYOUT: TileLayout = TileLayout::new($elems, size_of::<$ty>());
            type Words = [u32; TileLayout::new($elems, size_of::<$ty>()).span_bytes / 4];
        }
    };
}
quant::for_each_block_format!(tiled![]);

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
pub use device::{block, block_at, load_span, load_span_of};

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod device {
    use bytemuck::{Pod, Zeroable};

    use super::{ROWS, Tiled};
    use crate::device::{Glb, U32x2, U32x4, Word, thread};

    /// Words of one unit.
    trait Unit: Word {
        fn word(self, i: usize) -> u32;
    }
    impl Unit for u32 {
        #[inline(always)]
        fn word(self, _: usize) -> u32 {
            self
        }
    }
    impl Unit for U32x2 {
        #[inline(always)]
        fn word(self, i: usize) -> u32 {
            self.0[i]
        }
    }
    impl Unit for U32x4 {
        #[inline(always)]
        fn word(self, i: usize) -> u32 {
            self.0[i]
        }
    }

    /// The calling lane's row of a span: `span` is where the (row tile, span) starts, `n_units` how many units it has
    /// (all, or [`super::TileLayout::tail_units`], uniform over the warp). Words beyond are zero.
    ///
    /// All loads are issued before any result is used, and pass by L1: weights are read once.
    #[inline(always)]
    #[track_caller]
    pub fn load_span<F: Tiled>(span: Glb<u8>, n_units: u32) -> F::Words {
        load_span_of::<F>(span, thread::lane_id(), n_units)
    }

    /// [`load_span`] of any row (0..32) of any (row tile, span): nothing need be uniform.
    #[inline(always)]
    #[track_caller]
    pub fn load_span_of<F: Tiled>(span: Glb<u8>, row: u32, n_units: u32) -> F::Words {
        match F::LAYOUT.unit_bytes {
            16 => load::<F, U32x4>(span.cast(), row, n_units),
            8 => load::<F, U32x2>(span.cast(), row, n_units),
            _ => load::<F, u32>(span.cast(), row, n_units),
        }
    }

    #[inline(always)]
    #[track_caller]
    fn load<F: Tiled, U: Unit>(span: Glb<U>, row: u32, n_units: u32) -> F::Words {
        let units = F::LAYOUT.span_units();
        let mut words = F::Words::zeroed();
        let span = span.offset(row as usize);
        let mut load = |u: usize| {
            let unit = span.ld_stream((u * ROWS) as u32);
            let of_unit = size_of::<U>() / 4;
            let mut i = 0;
            while i < of_unit {
                words.as_mut()[u * of_unit + i] = unit.word(i);
                i += 1;
            }
        };
        // Whole spans are by far the most: no test per unit.
        let whole = F::LAYOUT.block_elems == super::SPAN || n_units == units as u32;
        let mut u = 0;
        while u < units {
            if whole || (u as u32) < n_units {
                load(u);
            }
            u += 1;
        }
        words
    }

    /// Block `b` of a span in registers. `b` must be a constant once loops are unrolled.
    ///
    /// Byte by byte: a copy that cuts words would go through local memory, while bytes become shifts of registers.
    #[inline(always)]
    pub fn block<F: Tiled>(words: &F::Words, b: usize) -> F {
        block_at(words.as_ref(), b * size_of::<F>())
    }

    /// The block that starts at this byte of words in registers; `first` must be a constant.
    #[inline(always)]
    pub fn block_at<F: Pod>(words: &[u32], first: usize) -> F {
        let mut block = F::zeroed();
        let bytes = bytemuck::bytes_of_mut(&mut block);
        let byte = |i: usize| (words[(first + i) / 4] >> (8 * ((first + i) % 4))) as u8;
        // Four at a time: few enough rounds for LLVM to unroll them all.
        let (fours, _) = bytes.as_chunks_mut::<4>();
        let mut i = 0;
        while i < fours.len() {
            fours[i] = [byte(4 * i), byte(4 * i + 1), byte(4 * i + 2), byte(4 * i + 3)];
            i += 1;
        }
        let mut i = size_of::<F>() / 4 * 4;
        while i < size_of::<F>() {
            bytes[i] = byte(i);
            i += 1;
        }
        block
    }
}

#[cfg(not(target_arch = "nvptx64"))]
pub use host::{is_tiled, matrix_bytes, pack, spans};

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use alloc::vec;
    use alloc::vec::Vec;

    use quant::{FormatId, info};

    use super::*;

    /// Whether matrices of this format can be tiled: whether it holds weights.
    pub fn is_tiled(format: FormatId) -> bool {
        let floats = [FormatId::F32, FormatId::F16, FormatId::BF16];
        floats.contains(&format) || info(format).elems.is_multiple_of(32)
    }

    /// The order of spans of a format; `None` for F16 and BF16, which lie in fragments.
    ///
    /// # Panics
    ///
    /// If the format does not hold weights.
    pub fn spans(format: FormatId) -> Option<TileLayout> {
        let row = info(format);
        match format {
            FormatId::F16 | FormatId::BF16 => None,
            FormatId::F32 => Some(TileLayout::new(1, 4)),
            _ => {
                assert!(is_tiled(format), "{format} holds no weights");
                Some(TileLayout::new(row.elems, row.bytes))
            }
        }
    }

    /// Bytes of a tiled matrix. `k` is a multiple of the format's block.
    pub fn matrix_bytes(format: FormatId, n_rows: usize, k: usize) -> usize {
        match spans(format) {
            Some(layout) => layout.bytes(n_rows, k),
            None => fragment_offset(n_rows.next_multiple_of(ROWS) / FRAGMENT, 0, k),
        }
    }

    /// A matrix of GGUF rows, tiled: the definition that the device's `repack` reproduces.
    ///
    /// # Panics
    ///
    /// If `rows` is not `n_rows` rows of `k` weights.
    pub fn pack(format: FormatId, rows: &[u8], n_rows: usize, k: usize) -> Vec<u8> {
        let row = info(format);
        assert!(k.is_multiple_of(row.elems) && rows.len() == n_rows * (k / row.elems) * row.bytes);
        let mut tiles = vec![0; matrix_bytes(format, n_rows, k)];
        let raw_bytes = rows.len() / n_rows;
        for (r, raw) in rows.chunks(raw_bytes).enumerate() {
            let Some(layout) = spans(format) else {
                for (c, element) in raw.chunks(2).enumerate() {
                    let tile = fragment_offset(r / FRAGMENT, c / FRAGMENT, k);
                    let places = (0..256).map(|i| (i, fragment_element(i / 8, i % 8)));
                    let at = places.into_iter().find(|(_, at)| *at == (r % FRAGMENT, c % FRAGMENT));
                    let (i, _) = at.expect("a fragment holds every element of its tile");
                    tiles[tile + 2 * i..][..2].copy_from_slice(element);
                }
                continue;
            };
            let tile = r / ROWS * layout.tile_bytes(k);
            for (s, span) in raw.chunks(layout.span_blocks() * layout.block_bytes).enumerate() {
                for (u, unit) in span.chunks(layout.unit_bytes).enumerate() {
                    let at = tile + layout.span_offset(s) + layout.unit_offset(u, r % ROWS);
                    tiles[at..at + unit.len()].copy_from_slice(unit);
                }
            }
        }
        tiles
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;
    use alloc::vec::Vec;

    use quant::table::FORMATS;
    use quant::{FormatId, info};

    use super::*;
    use crate::case::Random;

    /// Formats that hold weights.
    fn formats() -> impl Iterator<Item = FormatId> {
        FORMATS.iter().map(|row| row.id).filter(|&id| is_tiled(id))
    }

    /// The bytes of a row's span, read back unit by unit.
    fn read_span(layout: TileLayout, tiles: &[u8], k: usize, row: usize, span: usize) -> Vec<u8> {
        let blocks = (k - span * SPAN).min(SPAN) / layout.block_elems;
        let mut bytes = vec![];
        let start = row / ROWS * layout.tile_bytes(k) + layout.span_offset(span);
        for unit in 0..(blocks * layout.block_bytes).div_ceil(layout.unit_bytes) {
            bytes.extend(&tiles[start + layout.unit_offset(unit, row % ROWS)..][..layout.unit_bytes]);
        }
        assert!(bytes[blocks * layout.block_bytes..].iter().all(|&b| b == 0), "padding is zero");
        bytes.truncate(blocks * layout.block_bytes);
        bytes
    }

    #[test]
    fn every_row_comes_back() {
        let mut random = Random::new(1);
        for format in formats() {
            let row = info(format);
            for (n_rows, ks) in [(1, [256, 512]), (33, [768, 1024]), (64, [256 + 32, 576])] {
                for k in ks.map(|k: usize| k.next_multiple_of(row.elems)) {
                    let raw: Vec<u8> =
                        (0..n_rows * k / row.elems * row.bytes).map(|_| random.bits() as u8).collect();
                    let tiles = pack(format, &raw, n_rows, k);
                    assert_eq!(tiles.len(), matrix_bytes(format, n_rows, k), "{format}");
                    let Some(layout) = spans(format) else { continue };
                    for (r, raw) in raw.chunks(raw.len() / n_rows).enumerate() {
                        let spans = (0..layout.n_spans(k)).map(|s| read_span(layout, &tiles, k, r, s));
                        assert_eq!(spans.collect::<Vec<_>>().concat(), raw, "{format} {n_rows}x{k} row {r}");
                    }
                }
            }
        }
    }

    #[test]
    fn fragments_hold_each_element_once_where_mma_reads_it() {
        let (n_rows, k) = (35, 40);
        let raw: Vec<u8> = (0..n_rows * k).flat_map(|i: usize| (i as u16 + 1).to_le_bytes()).collect();
        let tiles = pack(FormatId::F16, &raw, n_rows, k);
        assert_eq!(tiles.len(), 64 * 48 * 2);
        let mut found = 0;
        for (i, bytes) in tiles.as_chunks::<2>().0.iter().enumerate() {
            let value = usize::from(u16::from_le_bytes(*bytes));
            let (tile, lane, register, half) = (i / 256, i / 8 % 32, i / 2 % 4, i % 2);
            // PTX, "Matrix Fragments for mma.m16n8k16": registers are row g, row g + 8, then both again 8 columns on.
            let row = tile / 3 * 16 + lane / 4 + 8 * (register % 2);
            let column = tile % 3 * 16 + 2 * (lane % 4) + 8 * (register / 2) + half;
            let expected = if row < n_rows && column < k { row * k + column + 1 } else { 0 };
            assert_eq!(value, expected, "row {row} column {column}");
            found += usize::from(value != 0);
        }
        assert_eq!(found, n_rows * k);
    }

    #[test]
    fn layouts_are_those_of_the_contract() {
        let layout = |format| spans(format).map(|l| (l.span_bytes, l.unit_bytes));
        assert_eq!(layout(FormatId::Q4_0), Some((144, 16)));
        assert_eq!(layout(FormatId::Q2_K), Some((84, 4)));
        assert_eq!(layout(FormatId::Q6_K), Some((212, 4)));
        assert_eq!(layout(FormatId::IQ4_XS), Some((136, 8)));
        assert_eq!(layout(FormatId::F32), Some((1024, 16)));
        // 576 = 2 spans and 2 blocks: 36 bytes, three units.
        assert_eq!(spans(FormatId::Q4_0).unwrap().row_bytes(576), 2 * 144 + 48);
        assert_eq!(matrix_bytes(FormatId::BF16, 33, 40), 64 * 48 * 2);
    }
}
