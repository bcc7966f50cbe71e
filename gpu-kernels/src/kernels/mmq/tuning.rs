//! The problems by which [`Costs`](super::costs::Costs) are measured: products of models in every cut, on one set of
//! buffers for all cuts and numbers of columns.

use alloc::{boxed::Box, vec, vec::Vec};
use core::fmt;

use quant::{FormatId, with_format};

use super::{Case, Cut, plain};
use crate::case::{Buffer, Expected, Launches, Random, bytes_of};
#[cfg(test)]
use crate::driver::DeviceInfo;
use crate::kernels::mmvq::Weights;
use crate::kernels::product::Glu;
use crate::kernels::quantise_act;
use crate::tile::{self, ROWS};

/// Numbers of columns: from the first that `mmvq` does not take.
pub const COLUMNS: &[usize] = &[9, 16, 24, 32, 48, 64, 96, 128];
const MOST_COLUMNS: usize = 128;

/// A product of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Rows of each part.
    pub n_rows: &'static [usize],
    /// Columns of the weights.
    pub k: usize,
    /// Whether the parts are gate and up.
    pub gated: bool,
}

const fn product(n_rows: &'static [usize], k: usize) -> Shape {
    Shape { n_rows, k, gated: false }
}

/// Down, output of attention, its inputs, gate and up, head of an 8B model; down, gate and up of a 1B one.
pub const SHAPES: &[Shape] = &[
    product(&[4096], 14336),
    product(&[4096], 4096),
    product(&[4096, 1024, 1024], 4096),
    Shape { gated: true, ..product(&[14336; 2], 4096) },
    product(&[128_256], 4096),
    product(&[2048], 8192),
    Shape { gated: true, ..product(&[8192; 2], 2048) },
];

/// Weights that are drawn; matrices repeat them. Their values do not change the time, but zeros would take less power.
const DRAWN_WEIGHTS: usize = 1 << 15;

impl Shape {
    /// Rows of all parts together.
    pub fn all_rows(&self) -> usize {
        self.n_rows.iter().sum()
    }

    fn case(&self, format: FormatId, cut: Cut, n_cols: usize) -> Case {
        Case { glu: self.gated.then_some(Glu::Silu), ..plain(format, cut, self.n_rows, self.k, n_cols) }
    }

    /// Buffers for every launch.
    ///
    /// # Panics
    ///
    /// If models have no weights in the format.
    pub fn buffers(&self, format: FormatId, random: &mut Random) -> Vec<Buffer> {
        let kind = quantise_act::kind(format).expect("a format of weights");
        let drawn = with_format(format, Weights(random, DRAWN_WEIGHTS)).expect("a format of weights").0;
        let row_bytes = self.k / quant::info(format).elems * quant::info(format).bytes;
        let rows: Vec<u8> = drawn.into_iter().cycle().take(ROWS * row_bytes).collect();
        let row_tile = tile::pack(format, &rows, ROWS, self.k);
        let (q, scales) = quantise_act::reference(kind, &random.values(self.k));
        // As `Case::launch` takes them. There is no mixture, and nothing is added.
        let columns = [bytes_of(&q), bytes_of(&scales)].map(|column| column.repeat(MOST_COLUMNS));
        let mut inputs = Vec::from(columns);
        inputs.extend([vec![], vec![]]);
        for n_rows in self.n_rows {
            inputs.extend([row_tile.repeat(n_rows.div_ceil(ROWS)), vec![], vec![]]);
        }
        let outputs = if self.gated { &self.n_rows[..1] } else { self.n_rows };
        let output = |n_rows: &usize| Buffer::Output(Expected::Unchecked(4 * n_rows * MOST_COLUMNS));
        inputs.into_iter().map(Buffer::Input).chain(outputs.iter().map(output)).collect()
    }

    /// The launch on [`Shape::buffers`] in a cut, of at most 128 columns.
    pub fn launches(&self, format: FormatId, cut: Cut, n_cols: usize) -> Launches {
        assert!(n_cols <= MOST_COLUMNS, "{n_cols} columns");
        let case = self.case(format, cut, n_cols);
        Box::new(move |at| Ok(vec![case.launch(at)?]))
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows = self.n_rows.iter().map(alloc::string::ToString::to_string).collect::<Vec<_>>();
        let text = alloc::format!("{}×{}", rows.join(if self.gated { "·" } else { "+" }), self.k);
        f.pad(&text)
    }
}

/// An H100, as far as choices ask.
#[cfg(test)]
pub(super) static H100: DeviceInfo = DeviceInfo {
    name: alloc::string::String::new(),
    pci: alloc::string::String::new(),
    sm: 90,
    n_sm: 132,
    memory_bytes: 0,
    l2_bytes: 50 << 20,
    smem_per_cta_bytes: 227 << 10,
    smem_per_sm_bytes: 228 << 10,
    registers_per_sm: 1 << 16,
    threads_per_sm: 2048,
    clock_khz: 1_980_000,
    memory_clock_khz: 0,
    memory_bus_bits: 0,
    driver_version: 12_040,
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::DevicePtr;

    /// Whoever adds a buffer to `Case` learns it here.
    #[test]
    fn buffers_are_those_of_a_case() {
        for shape in SHAPES.iter().filter(|shape| shape.all_rows() < 10_000) {
            let buffers = shape.buffers(FormatId::Q4_K, &mut Random::for_timing(1));
            let matrices = shape.n_rows.len();
            assert_eq!(buffers.len(), 4 + 3 * matrices + matrices);
            let at: Vec<DevicePtr> = (1..=buffers.len() as u64).map(|i| DevicePtr(i << 40)).collect();
            for cut in [Cut::NARROW_16, Cut::NARROW_64.paired(), Cut::HOPPER_32, Cut::Wide] {
                assert_eq!((shape.launches(FormatId::Q4_K, cut, 9))(&at).unwrap().len(), 1);
            }
            for (part, n_rows) in shape.n_rows.iter().enumerate() {
                let Buffer::Input(w) = &buffers[4 + 3 * part] else { panic!("weights are inputs") };
                assert_eq!(w.len(), tile::matrix_bytes(FormatId::Q4_K, *n_rows, shape.k));
            }
        }
    }
}
