//! Tiled quantised weights × many columns on int8 tensor cores: `y[c][r] = Σ w[r][i] · x[c][i]`, with what follows a
//! product in the same launch.
//!
//! * Shapes: `w` [n_rows, k] in any block format that models use for weights (not Q8_1, Q8_K), tiled (`tile.rs`), 16-byte
//!   aligned; activations [n_cols, k] as `quantise_act` writes them (`q`, `scales`) in the format's kind
//!   (`quantise_act::kind_of`); `y` [n_cols, n_rows] f32. Nothing overlaps, except that `residual` may be `y`.
//! * Parts: up to 3 matrices of one format that share the activations, each with its own rows and output.
//! * Epilogue: `product.rs`, as every product's.
//! * Mixture: columns are (token, slot) pairs, sorted by expert (`moe_sort`); the weights are [n_expert, n_rows, k], the
//!   bias [n_expert, n_rows]; activations have a row per token or one per pair; `y` one per pair, in the unsorted order.
//! * Result: as `mmvq`'s, bit for bit: per span of 256 weights `BlockFormat::dot_group`'s chain from 0 over its groups in
//!   order of k; spans added in order. So it depends on k alone, not on the entry, the grid or n_cols.
//! * Tolerance: NMSE 1e-11 against `dot_group` summed in f64, group by group.
//! * Bytes: the weights once, plus n_cols · (k · 1.25 + 4 · n_rows). FLOPs: 2 · n_rows · n_cols · k.
//!
//! Three ways to cut the work, chosen by shape, by the device's shared memory and by what each costs (`costs.rs`) ([`Cut`]):
//!
//! * *Wide*, 128 rows × 128 columns a CTA, for full machines. Spans pass through a pipeline in shared memory: raw tiles and
//!   activations arrive by asynchronous copies one span ahead; half of the warps unpack the next span before they multiply
//!   the present one, the other half after, so that a scheduler has both kinds of work at any time; one barrier per span.
//!   A warp's tile is 64 × 32: two sets of 64 accumulators, the span's and the total, stay in registers.
//! * *Narrow*, 32 or 64 rows × 16, 32 or 64 columns a CTA, where that would leave SMs idle, as for 9 to 64 columns:
//!   teams of one to four of up to sixteen warps multiply a span of their own, with no barrier of the CTA but one pair for
//!   every round of spans, when their partial sums are added in order (`mmq_narrow.rs`). Where there are CTAs enough, two
//!   of half the warps share an SM.
//! * *Hopper*, 64 rows × 32 or 64 columns a CTA, on sm_90a from 17 columns on where there are tiles enough: warpgroups
//!   multiply a span of their own with `wgmma` (`mmq_hopper.rs`).
//!
//! Prompts on Hopper have a kernel of their own, with bits of its own: `mmd_hopper.rs`.

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
pub(crate) use gpu::{Columns, NONE, Work, group, groups_of, units_of};
#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

pub(crate) const THREADS: u32 = 256;
#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
pub(crate) const WARPS: u32 = THREADS / 32;

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod gpu {
    use quant::BlockFormat;

    use crate::device::{Glb, U32x2, U32x4, grid, thread};
    use crate::kernels::int8_tile::Native;
    use crate::kernels::lookup::InMemory;
    use crate::kernels::mmq_narrow::narrow;
    #[cfg(any(not(target_arch = "nvptx64"), sm_ge_75))]
    use crate::kernels::mmq_wide::wide;
    use crate::kernels::product::{Gate, Part, choose_at};
    use crate::tile::{ROWS, SPAN_GROUPS, Tiled, block};

    /// What the parts have in common.
    #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
    #[repr(C)]
    pub(crate) struct Shape {
        n_groups: u32,
        n_cols: u32,
        /// In a mixture: pairs that share a row of activations.
        pairs_per_x: u32,
        /// Row tiles of a narrow CTA.
        row_tiles: u32,
    }

    /// Where no column is.
    pub(crate) const NONE: u32 = u32::MAX;

    /// The columns of a CTA.
    #[derive(Clone, Copy)]
    pub(crate) struct Columns {
        order: Glb<u32>,
        pub(crate) expert: u32,
        first: u32,
        /// How many; 0 in entries of a mixture's list that no columns fill.
        pub(crate) n: u32,
        pairs_per_x: u32,
    }

    impl Columns {
        /// The CTA's tile of `cols` columns; with a list, its entry.
        #[cfg_attr(target_arch = "nvptx64", inline(always))]
        #[track_caller]
        fn tile(shape: &Shape, order: Glb<u32>, tiles: Glb<U32x4>, cols: u32) -> Columns {
            if !tiles.is_null() {
                // An earlier launch wrote the list.
                grid::wait_for_earlier();
            }
            Columns::at(order, tiles, shape.n_cols, shape.pairs_per_x, cols, thread::block_idx_x())
        }

        /// Tile `x` of `cols` columns, after earlier launches if there is a list.
        #[cfg_attr(target_arch = "nvptx64", inline(always))]
        #[track_caller]
        pub(crate) fn at(
            order: Glb<u32>,
            tiles: Glb<U32x4>,
            n_cols: u32,
            pairs_per_x: u32,
            cols: u32,
            x: u32,
        ) -> Columns {
            let [expert, first, n, _] = if tiles.is_null() {
                let first = x * cols;
                let rest = n_cols - first;
                [0, first, if rest < cols { rest } else { cols }, 0]
            } else {
                tiles.ld_nc(x).0
            };
            Columns { order, expert, first, n, pairs_per_x }
        }

        /// Row of `y` of column `c`, which exists.
        #[inline(always)]
        #[track_caller]
        pub(crate) fn output(&self, c: u32) -> u32 {
            if self.order.is_null() { self.first + c } else { self.order.ld_nc(self.first + c) }
        }

        /// Row of the activations of column `c`; beyond the last column the last.
        #[inline(always)]
        #[track_caller]
        pub(crate) fn input(&self, c: u32) -> u32 {
            let output = self.output(if c < self.n { c } else { self.n - 1 });
            if self.order.is_null() { output } else { output / self.pairs_per_x }
        }
    }

    /// What a CTA does.
    #[derive(Clone, Copy)]
    pub(crate) struct Work {
        pub(crate) part: Part,
        /// Of a gated pair.
        pub(crate) up: Part,
        pub(crate) gate: Gate,
        /// The CTA's number among its part's.
        pub(crate) cta: u32,
        /// Of a narrow cut: row tiles of the CTA.
        pub(crate) row_tiles: u32,
        pub(crate) q: Glb<U32x4>,
        pub(crate) scales: Glb<U32x2>,
        pub(crate) n_groups: u32,
        pub(crate) columns: Columns,
    }

    impl Work {
        /// Where a row tile starts, in bytes.
        #[inline(always)]
        pub(crate) fn tile_at<F: Tiled>(&self, row_tile: u32) -> usize {
            let n_tiles = self.part.n_rows.div_ceil(ROWS as u32) as usize;
            let tile = self.columns.expert as usize * n_tiles + row_tile as usize;
            tile * F::LAYOUT.tile_bytes(self.n_groups as usize * quant::format::GROUP)
        }

        /// Ends an output.
        #[inline(always)]
        #[track_caller]
        pub(crate) fn finish(&self, output: u32, row: u32, sums: [f32; 2]) {
            self.part.finish(self.gate, self.up, self.columns.expert, output, row, sums);
        }

        /// An output's value, but for what is added last.
        #[inline(always)]
        #[track_caller]
        pub(crate) fn ended(&self, row: u32, sums: [f32; 2]) -> f32 {
            self.part.ended(self.gate, self.up, self.columns.expert, row, sums)
        }

        /// Quantises the warp's values, those of a row tile of an output's column.
        #[inline(always)]
        #[track_caller]
        pub(crate) fn put_group(&self, output: u32, row_tile: u32, v: f32) {
            self.part.put_group(self.gate, self.up, output * (self.part.n_rows / ROWS as u32) + row_tile, v);
        }
    }

    /// Groups of a span.
    #[inline(always)]
    pub(crate) fn groups_of(span: u32, n_groups: u32) -> u32 {
        let rest = n_groups - span * SPAN_GROUPS as u32;
        if rest < SPAN_GROUPS as u32 { rest } else { SPAN_GROUPS as u32 }
    }

    /// Units of a span of one row.
    #[inline(always)]
    pub(crate) fn units_of<F: BlockFormat + Tiled>(span: u32, n_groups: u32) -> u32 {
        let blocks = groups_of(span, n_groups) as usize / F::GROUPS;
        (blocks * F::LAYOUT.block_bytes).div_ceil(F::LAYOUT.unit_bytes) as u32
    }

    /// Group `g` of a span in registers; a constant. The host compiles it once per format, not once per call.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[cfg_attr(not(target_arch = "nvptx64"), inline(never))]
    pub(crate) fn group<F: BlockFormat + Tiled>(words: &F::Words, g: usize) -> quant::Group {
        block::<F>(words, g / F::GROUPS).unpack_group_by(g % F::GROUPS, InMemory)
    }

    /// Wider tiles, for GPUs without int8 tensor cores: the narrow cut on each piece of the tile, one after the other.
    #[cfg(any(test, all(target_arch = "nvptx64", not(sm_ge_75))))]
    #[inline(always)]
    #[track_caller]
    fn in_pieces<F: BlockFormat + Tiled>(work: &Work, row_tiles: u32) {
        use crate::device::math::opaque;
        use crate::kernels::int8_tile::Dp4a;

        let row_tiles = opaque(row_tiles);
        let n_tiles = work.part.n_rows.div_ceil(ROWS as u32);
        let mut row_tile = work.cta * row_tiles;
        while row_tile < (work.cta + 1) * row_tiles && row_tile < n_tiles {
            let mut piece = *work;
            while piece.columns.n != 0 {
                let left = piece.columns.n;
                piece.columns.n = if left < 16 { left } else { 16 };
                narrow::<F, Dp4a, 16, 2, 1>(&piece, row_tile, false);
                piece.columns.first += piece.columns.n;
                piece.columns.n = left - piece.columns.n;
            }
            row_tile += 1;
        }
    }

    /// Entries: the arguments become [`Work`]; CTAs whose entry of the list is empty leave.
    macro_rules! cut {
        ($(#[$meta:meta])* $name:ident, $cols:literal, |$work:ident| $body:expr) => {
            $(#[$meta])*
            #[inline(always)]
            pub(crate) fn $name<F: BlockFormat + Tiled>(
                p0: Part,
                p1: Part,
                p2: Part,
                q: Glb<U32x4>,
                scales: Glb<U32x2>,
                order: Glb<u32>,
                tiles: Glb<U32x4>,
                gate: Gate,
                shape: Shape,
            ) {
                let columns = Columns::tile(&shape, order, tiles, $cols);
                if columns.n == 0 {
                    return;
                }
                let part = choose_at(p0, p1, p2, thread::block_idx_y());
                let cta = thread::block_idx_y() - part.first_cta;
                let Shape { n_groups, row_tiles, .. } = shape;
                let $work = &Work { part, up: p1, gate, cta, row_tiles, q, scales, n_groups, columns };
                $body
            }
        };
    }

    /// The narrow cut of `COLS` (8 · `NT` · `HALVES`) columns.
    #[inline(always)]
    #[track_caller]
    fn rows<F: BlockFormat + Tiled, const COLS: usize, const NT: usize, const HALVES: usize>(work: &Work) {
        narrow::<F, Native, COLS, NT, HALVES>(work, work.cta * work.row_tiles, work.row_tiles == 2);
    }

    cut!(n16, 16, |work| rows::<F, 16, 2, 1>(work));
    #[cfg(any(not(target_arch = "nvptx64"), sm_ge_75))]
    cut!(n32, 32, |work| rows::<F, 32, 2, 2>(work));
    #[cfg(any(not(target_arch = "nvptx64"), sm_ge_75))]
    cut!(n64, 64, |work| rows::<F, 64, 4, 2>(work));
    #[cfg(any(not(target_arch = "nvptx64"), sm_ge_75))]
    cut!(n128, 128, |work| wide::<F>(work));

    #[cfg(all(target_arch = "nvptx64", not(sm_ge_75)))]
    pub(super) use {n32_in_pieces as n32, n64_in_pieces as n64, n128_in_pieces as n128};
    #[cfg(any(test, all(target_arch = "nvptx64", not(sm_ge_75))))]
    cut!(n32_in_pieces, 32, |work| in_pieces::<F>(work, work.row_tiles));
    #[cfg(all(target_arch = "nvptx64", not(sm_ge_75)))]
    cut!(n64_in_pieces, 64, |work| in_pieces::<F>(work, work.row_tiles));
    #[cfg(any(test, all(target_arch = "nvptx64", not(sm_ge_75))))]
    cut!(n128_in_pieces, 128, |work| in_pieces::<F>(work, if work.gate.is_some() { 2 } else { 4 }));
}

/// Entries of every format that models use for weights, and the functions that find them.
macro_rules! entries {
    ($($id:ident => $module:ident,)*) => {
        #[cfg(any(target_arch = "nvptx64", feature = "emu"))]
        kernels! {
            in "mmq";
            NARROW: threads(512, 1), early;
            fn (
                p0: Part, p1: Part, p2: Part, q: Glb<U32x4>, scales: Glb<U32x2>, order: Glb<u32>, tiles: Glb<U32x4>,
                gate: Gate, shape: gpu::Shape,
            );
            $(
                concat!("mmq_", stringify!($id), "_n16") => gpu::n16::<formats::$module::Block>;
                concat!("mmq_", stringify!($id), "_n32") => gpu::n32::<formats::$module::Block>;
                concat!("mmq_", stringify!($id), "_n64") => gpu::n64::<formats::$module::Block>;
            )*
        }

        #[cfg(any(target_arch = "nvptx64", feature = "emu"))]
        kernels! {
            in "mmq";
            WIDE: threads(256, 1);
            fn (
                p0: Part, p1: Part, p2: Part, q: Glb<U32x4>, scales: Glb<U32x2>, order: Glb<u32>, tiles: Glb<U32x4>,
                gate: Gate, shape: gpu::Shape,
            );
            $(concat!("mmq_", stringify!($id), "_n128") => gpu::n128::<formats::$module::Block>;)*
        }

        /// Entry of a format and its shared memory; `gated` for a gated pair.
        #[cfg(not(target_arch = "nvptx64"))]
        fn entry(format: quant::FormatId, cut: Cut, gated: bool) -> Option<(&'static str, u32)> {
            match format {
                $(quant::FormatId::$id => Some(match cut {
                    Cut::Narrow(narrow) => (
                        match narrow.cols {
                            16 => concat!("mmq_", stringify!($id), "_n16"),
                            32 => concat!("mmq_", stringify!($id), "_n32"),
                            _ => concat!("mmq_", stringify!($id), "_n64"),
                        },
                        narrow.bytes::<formats::$module::Block>(gated),
                    ),
                    Cut::Wide => (concat!("mmq_", stringify!($id), "_n128"), wide_bytes::<formats::$module::Block>()),
                    Cut::Hopper(Hopper { cols: 32, .. }) => (
                        concat!("mmq_hopper_", stringify!($id), "_n32"),
                        mmq_hopper::bytes::<formats::$module::Block, mmq_hopper::Few>(),
                    ),
                    Cut::Hopper(_) => (
                        concat!("mmq_hopper_", stringify!($id), "_n64"),
                        mmq_hopper::bytes::<formats::$module::Block, mmq_hopper::Many>(),
                    ),
                }),)*
                _ => None,
            }
        }

        /// Formats with entries.
        #[cfg(not(target_arch = "nvptx64"))]
        const FORMATS: &[quant::FormatId] = &[$(quant::FormatId::$id,)*];
    };
}

#[cfg(not(target_arch = "nvptx64"))]
use crate::kernels::{mmq_hopper, mmq_wide::wide_bytes};
use quant::formats;
#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
use {
    crate::device::{Glb, U32x2, U32x4},
    crate::kernels::product::{Gate, Part},
};
for_each_weight_format!(entries);

#[cfg(not(target_arch = "nvptx64"))]
pub mod costs;
#[cfg(not(target_arch = "nvptx64"))]
mod host;
#[cfg(not(target_arch = "nvptx64"))]
pub mod tuning;

#[cfg(all(test, feature = "emu"))]
mod tests {
    use alloc::{vec, vec::Vec};

    use quant::FormatId;

    use super::host::{Case, Cut, plain};
    use super::{gpu, *};
    use crate::case::{Buffer, Random};
    use crate::driver::{DeviceInfo, Driver, MemKind, StreamId};
    use crate::emu::{Emulator, Entry, Options};
    use crate::launch::DevicePtr;

    // What GPUs without int8 tensor cores run under these names.
    kernels! {
        in "mmq";
        BY_DP4A: threads(512);
        fn (
            p0: Part, p1: Part, p2: Part, q: Glb<U32x4>, scales: Glb<U32x2>, order: Glb<u32>, tiles: Glb<U32x4>,
            gate: Gate, shape: gpu::Shape,
        );
        "mmq_Q4_K_n32" => gpu::n32_in_pieces::<formats::q4_k::Block>;
        "mmq_Q6_K_n32" => gpu::n32_in_pieces::<formats::q6_k::Block>;
        "mmq_Q2_K_n32" => gpu::n32_in_pieces::<formats::q2_k::Block>;
        "mmq_Q8_0_n128" => gpu::n128_in_pieces::<formats::q8_0::Block>;
    }

    /// The bits of a case's first output as the contract orders the sums, and as an entry computes them.
    fn bits(case: &Case, seed: u64, tables: &[&[Entry]]) -> (Vec<u32>, Vec<u32>) {
        let (expected, buffers) = case.chained(&mut Random::new(seed));
        let emulator = Emulator::new(Options::default());
        let write = |bytes: &[u8]| {
            let at = emulator.alloc(MemKind::Device, bytes.len().max(1) as u64).unwrap();
            emulator.write(at, bytes, StreamId::DEFAULT).unwrap();
            at
        };
        let mut at: Vec<DevicePtr> = vec![];
        for buffer in &buffers {
            at.push(match buffer {
                Buffer::Input(bytes) | Buffer::Changed(bytes, _) => write(bytes),
                Buffer::Output(_) => emulator.alloc(MemKind::Device, 4 * expected.len() as u64).unwrap(),
            });
        }
        let launch = case.launch(&at).unwrap();
        let entry =
            tables.iter().flat_map(|table| table.iter()).find(|entry| entry.name == launch.entry).unwrap();
        emulator.run(entry, &launch).unwrap();
        let mut got = vec![0u8; 4 * expected.len()];
        emulator.read(&mut got, *at.last().unwrap(), StreamId::DEFAULT).unwrap();
        let got = got.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes));
        (expected.iter().map(|v| v.to_bits()).collect(), got.collect())
    }

    #[test]
    fn bits_are_those_of_the_contract_in_every_cut() {
        for format in FORMATS {
            // More spans than a narrow round has for one, a short span for the other.
            let ks = [2368, 320].map(|k: usize| k.next_multiple_of(quant::info(*format).elems));
            let of_cuts = [
                (Cut::NARROW_16.of_warps(8), ks[0]),
                (Cut::NARROW_16.of_warps(4).paired(), ks[1]),
                (Cut::NARROW_32, ks[1]),
                (Cut::NARROW_64.of_warps(12), ks[1]),
                (Cut::NARROW_64.of_warps(8).paired(), ks[0]),
                (Cut::Wide, ks[1]),
                (Cut::HOPPER_32, ks[1]),
                (Cut::HOPPER_64.of_ctas(1), ks[0]),
            ];
            for (cut, k) in of_cuts {
                let tables = [NARROW, WIDE, mmq_hopper::ENTRIES];
                let (expected, got) = bits(&plain(*format, cut, &[34], k, 11), 7, &tables);
                assert_eq!(expected, got, "{format} {cut:?}");
            }
        }
    }

    #[test]
    fn dp4a_gives_the_same_bits() {
        for (format, cut, k) in [
            (FormatId::Q4_K, Cut::NARROW_32, 256),
            (FormatId::Q6_K, Cut::NARROW_32, 512),
            (FormatId::Q2_K, Cut::NARROW_32, 256),
            (FormatId::Q8_0, Cut::Wide, 288),
        ] {
            let (expected, got) = bits(&plain(format, cut, &[40], k, 19), 3, &[BY_DP4A]);
            assert_eq!(expected, got, "{format} {cut:?}");
        }
    }

    #[test]
    fn cuts_fit_the_work_and_the_device() {
        let device =
            |sm: u32, smem_per_cta_bytes: u32| DeviceInfo { sm, smem_per_cta_bytes, ..DeviceInfo::default() };
        let (h100, turing) = (device(90, 227 << 10), device(75, 64 << 10));
        let choose = |rows, cols, device: &DeviceInfo| Cut::choose(FormatId::Q8_0, rows, cols, false, device);
        assert_eq!(choose(4096, 512, &h100), Cut::Wide);
        assert_eq!(choose(4096, 64, &h100), Cut::NARROW_64);
        assert_eq!(choose(128_256, 64, &h100), Cut::NARROW_64.paired());
        assert_eq!(choose(2 * 14336, 64, &h100).cols(), 64);
        // Two CTAs an SM, where one knows how much an SM has.
        let whole = DeviceInfo { smem_per_sm_bytes: 228 << 10, ..h100.clone() };
        assert_eq!(Cut::choose(FormatId::Q8_0, 2 * 14336, 64, true, &whole), Cut::NARROW_64.of_warps(8));
        assert_eq!(choose(4096, 64, &whole), Cut::NARROW_64);
        assert_eq!(choose(2 * 14336, 512, &h100), Cut::Wide);
        assert_eq!(choose(4096, 9, &h100), Cut::NARROW_16);
        // Warpgroups where the driver takes their PTX.
        let hopper = DeviceInfo { driver_version: 12_040, ..whole };
        assert_eq!(choose(4096, 64, &hopper), Cut::HOPPER_32);
        assert_eq!(choose(2 * 14336, 64, &hopper), Cut::HOPPER_64);
        assert_eq!(choose(4096, 32, &hopper), Cut::NARROW_32);
        // Neither would fit with all its warps.
        assert_eq!(choose(4096, 512, &turing), Cut::NARROW_16.of_warps(14).paired());
        assert_eq!(choose(4096, 512, &device(61, 48 << 10)), Cut::NARROW_16.of_warps(10).paired());
        for format in FORMATS {
            let most = [
                (Cut::NARROW_16.of_warps(4), 48 << 10),
                (Cut::NARROW_16.paired(), 227 << 10),
                (Cut::NARROW_32, 227 << 10),
                (Cut::NARROW_64.of_warps(12), 227 << 10),
                (Cut::NARROW_64.paired(), 227 << 10),
                (Cut::Wide, 227 << 10),
                (Cut::HOPPER_32, 227 << 10),
                (Cut::HOPPER_64, 227 << 10),
            ];
            for (cut, most) in most {
                assert!(entry(*format, cut, false).unwrap().1 <= most, "{format} {cut:?}");
            }
        }
    }
}
