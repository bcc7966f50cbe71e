//! Problems of products that sum f32 activations or their rounded values, for the cases of `mmvf`, `mmf`, `mmf32`,
//! `mmd_hopper`.

use alloc::{boxed::Box, vec, vec::Vec};

use quant::{FloatFormat, FormatId, info, with_format};

use crate::case::{Buffer, Expected, Problem, Random, bytes_of};
use crate::kernels::mmvq::Weights;
use crate::kernels::peer;
use crate::kernels::product::{Glu, Matrix, Mixture, glu_reference};
use crate::kernels::round_act::SortedPairs;
use crate::launch::{DevicePtr, Launch, LaunchError};
use crate::tile;

/// A case: the shape and everything a launch may have.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// F16, BF16 or F32, or a block format.
    pub format: FormatId,
    /// Rows of each matrix.
    pub n_rows: &'static [usize],
    /// Weights of a row.
    pub k: usize,
    /// Columns; with experts pairs of token and slot.
    pub n_cols: usize,
    /// With biases and a residual.
    pub addends: bool,
    /// Two matrices are gate and up.
    pub glu: Option<Glu>,
    /// Experts, and slots per row of activations.
    pub experts: Option<(usize, usize)>,
}

impl Case {
    /// One matrix, nothing else.
    pub const fn plain(format: FormatId, n_rows: &'static [usize], k: usize, n_cols: usize) -> Case {
        Case { format, n_rows, k, n_cols, addends: false, glu: None, experts: None }
    }

    /// Bytes that must move.
    pub fn bytes(&self) -> u64 {
        let row = info(self.format);
        let rows: usize = self.n_rows.iter().sum();
        let experts = self.experts.map_or(1, |(n, _)| n.min(self.n_cols));
        let x = self.n_cols / self.experts.map_or(1, |(_, slots)| slots) * self.k * 4;
        (experts * rows * self.k / row.elems * row.bytes + x + 4 * rows * self.n_cols) as u64
    }

    /// ggml's name of it.
    pub fn peer(&self) -> Option<alloc::string::String> {
        let fused = self.addends || self.glu.is_some() || self.experts.is_some();
        peer::product(self.format, self.n_rows, self.k, self.n_cols, fused, None)
    }

    /// Whether the weights are blocks.
    fn is_quantised(&self) -> bool {
        info(self.format).elems > 1
    }

    /// Columns of a tile of sorted pairs: a large one's where there are many, or where there is no other.
    pub(crate) fn tile_cols(&self) -> usize {
        if self.n_cols < 100 && !self.is_quantised() { 64 } else { 128 }
    }

    /// Entries of the list of those tiles.
    pub(crate) fn max_tiles(&self) -> usize {
        let n_experts = self.experts.map_or(1, |(n, _)| n);
        self.n_cols.min(self.n_cols / self.tile_cols() + n_experts)
    }

    /// Operations.
    pub fn flops(&self) -> u64 {
        2 * (self.n_rows.iter().sum::<usize>() * self.k * self.n_cols) as u64
    }
}

/// `x` as a format's products see it.
pub(crate) fn rounded(format: FormatId, x: f32) -> f32 {
    match format {
        FormatId::F16 => FloatFormat::to_f32(<half::f16 as FloatFormat>::from_f32(x)),
        FormatId::BF16 => FloatFormat::to_f32(<half::bf16 as FloatFormat>::from_f32(x)),
        _ => x,
    }
}

/// What a launcher gets of a problem.
pub(crate) struct Operands {
    pub(crate) matrices: Vec<Matrix>,
    pub(crate) x: DevicePtr,
    pub(crate) mixture: Option<Mixture>,
    /// The same mixture sorted.
    pub(crate) sorted: Option<SortedPairs>,
    /// Room for `scratch` bytes.
    pub(crate) scratch: DevicePtr,
}

/// Pairs by expert, and tiles (expert, first, number, 0) of up to `tile_cols` pairs of one expert each.
fn sort(ids: &[u32], tile_cols: usize, max_tiles: usize) -> (Vec<u32>, Vec<[u32; 4]>) {
    let mut order: Vec<u32> = (0..ids.len() as u32).collect();
    order.sort_by_key(|&pair| ids[pair as usize]);
    let mut tiles = vec![];
    let mut first = 0;
    for of_expert in order.chunk_by(|&a, &b| ids[a as usize] == ids[b as usize]) {
        for tile in of_expert.chunks(tile_cols) {
            tiles.push([ids[tile[0] as usize], first, tile.len() as u32, 0]);
            first += tile.len() as u32;
        }
    }
    tiles.resize(max_tiles, [0; 4]);
    (order, tiles)
}

/// Buffers before those of the matrices: x, ids, order, tiles, scratch.
const FIRST: usize = 5;
/// Which of them is scratch.
pub(crate) const SCRATCH: usize = 4;

/// Sets scratch to what `make` makes of x: what the launch before the product would write.
pub(crate) fn fill_scratch(problem: &mut Problem, make: impl FnOnce(&[f32]) -> Vec<u8>) {
    let Buffer::Input(x) = &problem.buffers[0] else { unreachable!("x is an input") };
    let x: Vec<f32> = x.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
    problem.buffers[SCRATCH] = Buffer::Input(make(&x));
}

/// The problem of a case. After the first buffers w, bias, residual and y of each matrix.
pub(crate) fn problem(
    case: &Case,
    random: &mut Random,
    scratch: usize,
    launch: impl Fn(&Operands) -> Result<Vec<Launch>, LaunchError> + 'static,
) -> Problem {
    let Case { format, n_rows, k, n_cols, addends, glu, experts } = *case;
    let (n_experts, slots) = experts.unwrap_or((1, 1));
    // Smaller, so that an activation's argument stays where it bends; of blocks, which are encoded as they are, the
    // activations. Else those are beyond f16, which their scales must mend.
    let scale = if glu.is_some() { 2.0 / libm::sqrtf(k as f32) } else { 1.0 };
    let (scale, x_scale) = match (case.is_quantised(), glu) {
        (false, _) => (scale, 1.0),
        (true, Some(_)) => (1.0, scale),
        (true, None) => (1.0, 3e4),
    };
    let x: Vec<f32> = random.values(n_cols / slots * k).into_iter().map(|x| x * x_scale).collect();
    let ids: Vec<u32> = (0..n_cols).map(|_| random.below(n_experts as u64) as u32).collect();
    let (tile_cols, n_tiles) = (case.tile_cols(), case.max_tiles());
    let (order, tiles) = sort(&ids, tile_cols, n_tiles);
    let mut buffers = vec![
        Buffer::Input(bytes_of(&x)),
        Buffer::Input(bytes_of(&ids)),
        Buffer::Input(bytes_of(&order)),
        Buffer::Input(bytes_of(&tiles)),
        Buffer::Input(vec![0xff; scratch.max(16)]),
    ];
    let mut sums: Vec<Vec<f64>> = vec![];
    let mut residuals: Vec<Vec<f32>> = vec![];
    for &rows in n_rows {
        let n = n_experts * rows * k;
        let (raw, weights) = if case.is_quantised() {
            with_format(format, Weights(random, n)).expect("cases name formats of weights")
        } else {
            let weights: Vec<f32> = (0..n).map(|_| rounded(format, scale * random.value())).collect();
            let raw = match format {
                FormatId::F32 => bytes_of(&weights),
                FormatId::F16 => weights.iter().flat_map(|&w| half::f16::from_f32(w).to_le_bytes()).collect(),
                _ => weights.iter().flat_map(|&w| half::bf16::from_f32(w).to_le_bytes()).collect(),
            };
            (raw, weights)
        };
        let tiles =
            raw.chunks(raw.len() / n_experts).flat_map(|raw| tile::pack(format, raw, rows, k)).collect();
        let bias = random.values(if addends { n_experts * rows } else { 0 });
        let residual = random.values(if addends { n_cols * rows } else { 0 });
        let mut sum = vec![];
        // For timing it need not be right.
        let summed = if random.is_timing() { 0 } else { n_cols };
        for c in 0..summed {
            let expert = ids[c] as usize;
            let x = &x[c / slots * k..][..k];
            for r in 0..rows {
                let w = &weights[(expert * rows + r) * k..][..k];
                let dot =
                    w.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(rounded(format, x))).sum::<f64>();
                sum.push(dot + bias.get(expert * rows + r).map_or(0.0, |&b| f64::from(b)));
            }
        }
        sum.resize(n_cols * rows, 0.0);
        sums.push(sum);
        // Null where not given, but a buffer all the same.
        let or_some =
            |values: &[f32]| Buffer::Input(bytes_of(if values.is_empty() { &[0.0] } else { values }));
        buffers.extend([Buffer::Input(tiles), or_some(&bias), or_some(&residual)]);
        buffers.push(Buffer::Input(vec![]));
        residuals.push(residual);
    }
    if let Some(glu) = glu {
        let up = sums.remove(1);
        sums[0].iter_mut().zip(up).for_each(|(gate, up)| *gate = glu_reference(glu, *gate, up));
    }
    for (i, (mut sum, residual)) in sums.into_iter().zip(residuals).enumerate() {
        sum.iter_mut().zip(residual).for_each(|(v, r)| *v += f64::from(r));
        buffers[FIRST + 4 * i + 3] = Buffer::Output(Expected::F32(sum));
    }
    if glu.is_some() {
        buffers[FIRST + 4 + 3] = Buffer::Input(vec![0; 4]);
    }
    Problem {
        buffers,
        launches: Box::new(move |at| {
            let given = |at: DevicePtr| if addends { at } else { DevicePtr::NULL };
            let matrix = |(&n_rows, at): (&usize, &[DevicePtr])| Matrix {
                w: at[0],
                bias: given(at[1]),
                residual: given(at[2]),
                y: at[3],
                n_rows,
            };
            launch(&Operands {
                matrices: n_rows.iter().zip(at[FIRST..].chunks(4)).map(matrix).collect(),
                x: at[0],
                mixture: experts.map(|(_, pairs_per_x)| Mixture { ids: at[1], n_pairs: n_cols, pairs_per_x }),
                sorted: experts.map(|(_, pairs_per_x)| SortedPairs {
                    order: at[2],
                    tiles: at[3],
                    n_tiles,
                    tile_cols,
                    pairs_per_x,
                }),
                scratch: at[4],
            })
        }),
    }
}
