//! Host side of `copy`: launcher, reference, cases.

use alloc::{boxed::Box, vec, vec::Vec};

use half::{bf16, f16};
use quant::FormatId;

use super::{Divisors, Extents, PAD, PER_THREAD, REPEAT, STRIDE, THREADS, TILE};
use crate::case::{Buffer, Expected, Kernel, Problem, Random, bytes_of};
use crate::kernels::peer;
use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};

/// What lies beyond the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edge {
    /// Nothing: it has the destination's shape.
    None,
    /// The source again.
    Repeat {
        /// Shape of the source.
        src_shape: [usize; 4],
    },
    /// Zeros.
    Pad {
        /// Shape of the source.
        src_shape: [usize; 4],
        /// Zeros before it.
        before: [usize; 4],
    },
}

/// Arguments; see the contract. Types are F32, F16, BF16 or I32.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)] // the contract's names
pub struct Args {
    pub from: FormatId,
    pub to: FormatId,
    pub src: DevicePtr,
    pub dst: DevicePtr,
    pub shape: [usize; 4],
    pub src_strides: [usize; 4],
    pub dst_strides: [usize; 4],
    pub edge: Edge,
}

/// Strides of a dense tensor.
pub fn dense([_, b, c, d]: [usize; 4]) -> [usize; 4] {
    [b * c * d, c * d, d, 1]
}

/// The entries of a conversion.
pub(super) struct Entries {
    pub(super) flat: &'static str,
    pub(super) strided: &'static str,
    pub(super) fours: &'static str,
    pub(super) transpose: &'static str,
    pub(super) transpose_pairs: &'static str,
}

/// How a region lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Region {
    shape: [u32; 4],
    src_strides: [u32; 4],
    dst_strides: [u32; 4],
}

impl Region {
    /// The same elements in the fewest dimensions, the last ones: those of one element go, and those that follow each
    /// other on both sides become one. Strides of a dimension of one element are 0.
    fn folded(self) -> Region {
        let mut folded = Region { shape: [1; 4], src_strides: [0; 4], dst_strides: [0; 4] };
        let mut at = 4;
        for d in (0..4).rev().filter(|&d| self.shape[d] > 1) {
            let follows = |of_folded: [u32; 4], strides: [u32; 4]| {
                u64::from(of_folded[at]) * u64::from(folded.shape[at]) == u64::from(strides[d])
            };
            if at < 4
                && follows(folded.src_strides, self.src_strides)
                && follows(folded.dst_strides, self.dst_strides)
            {
                folded.shape[at] *= self.shape[d];
            } else {
                at -= 1;
                folded.shape[at] = self.shape[d];
                folded.src_strides[at] = self.src_strides[d];
                folded.dst_strides[at] = self.dst_strides[d];
            }
        }
        folded
    }

    /// Whether all that starts somewhere, in the dimensions but `along_src` of the source and `along_dst` of the
    /// destination, starts at a multiple of `units` elements.
    fn starts_at_multiples(&self, units: u32, along_src: usize, along_dst: usize) -> bool {
        let starts = |strides: [u32; 4], along| {
            (0..4).all(|d| d == along || self.shape[d] == 1 || strides[d].is_multiple_of(units))
        };
        starts(self.src_strides, along_src) && starts(self.dst_strides, along_dst)
    }
}

/// One launch for the whole region.
pub fn launch(args: &Args) -> Result<Launch, LaunchError> {
    let check = Check(StridedCopy::NAME);
    let format = if matches!(args.from, FormatId::I32) { args.from } else { args.to };
    let entries = super::entries_of(args.from, args.to)
        .ok_or(LaunchError::Format { kernel: StridedCopy::NAME, format })?;
    let n = check.size("elements", args.shape.iter().fold(1usize, |n, &extent| n.saturating_mul(extent)))?;
    let [from_bytes, to_bytes] = [args.from, args.to].map(|format| quant::info(format).bytes as u64);
    check.aligned("src", args.src, from_bytes)?;
    check.aligned("dst", args.dst, to_bytes)?;
    let stride = |what: &'static str, strides: [usize; 4]| -> Result<[u32; 4], LaunchError> {
        let mut out = [0; 4];
        for (out, stride) in out.iter_mut().zip(strides) {
            *out = u32::try_from(stride).map_err(|_| check.shape(what, "below 2^32", stride))?;
        }
        Ok(out)
    };
    let (src_shape, before) = match args.edge {
        Edge::None => (args.shape, [0; 4]),
        Edge::Repeat { src_shape } => (src_shape, [0; 4]),
        Edge::Pad { src_shape, before } => (src_shape, before),
    };
    for ((extent, before), space) in src_shape.into_iter().zip(before).zip(args.shape) {
        if extent == 0 || extent > space {
            return Err(check.shape("src_shape", "1 to the extent of shape", extent));
        }
        if before > space - extent {
            return Err(check.shape("before", "so much that the source lies inside", before));
        }
    }
    let region = Region {
        shape: args.shape.map(|extent| extent as u32),
        src_strides: stride("src_strides", args.src_strides)?,
        dst_strides: stride("dst_strides", args.dst_strides)?,
    };
    let base = Launch {
        entry: entries.flat,
        grid: [1; 3],
        cta: THREADS,
        cluster: 1,
        smem_bytes: 0,
        params: Params::new(),
    };
    let params = Params::new().with(args.src).with(args.dst);
    let wide = |units: u64| {
        args.src.0.is_multiple_of(units * from_bytes) && args.dst.0.is_multiple_of(units * to_bytes)
    };

    if args.edge != Edge::None {
        let [src_shape, before] = [src_shape, before].map(|extents| extents.map(|e| e as u32));
        return Ok(rows(&entries, base, params, region, args.edge, src_shape, before, wide(4)));
    }
    let region = region.folded();
    if region.shape[3] == n && region.src_strides[3] == 1 && region.dst_strides[3] == 1 && wide(4) {
        return Ok(Launch { grid: [(n / 4 + 1).div_ceil(THREADS), 1, 1], params: params.with(n), ..base });
    }

    if let Some(launch) = transposed(&entries, base, params, region, wide(2), to_bytes as u32) {
        return Ok(launch);
    }
    Ok(rows(&entries, base, params, region, Edge::None, region.shape, [0; 4], wide(4)))
}

/// The launch by tiles, where the source is contiguous in another dimension than the destination: that one becomes the
/// second to last. By pairs if addresses are `wide` enough and everything else is, too.
fn transposed(
    entries: &Entries,
    base: Launch,
    params: Params,
    region: Region,
    wide: bool,
    to_bytes: u32,
) -> Option<Launch> {
    let along = (0..3).find(|&d| region.src_strides[d] == 1)?;
    if region.src_strides[3] == 1 || region.dst_strides[3] != 1 {
        return None;
    }
    let swap = |mut v: [u32; 4]| {
        v.swap(along, 2);
        v
    };
    let Region { shape, src_strides, dst_strides } = region;
    let region =
        Region { shape: swap(shape), src_strides: swap(src_strides), dst_strides: swap(dst_strides) };
    let even = region.shape[2].is_multiple_of(2) && region.shape[3].is_multiple_of(2);
    let (entry, units) = if even && wide && region.starts_at_multiples(2, 2, 3) {
        (entries.transpose_pairs, 2)
    } else {
        (entries.transpose, 1)
    };
    let [rows, columns] = [region.shape[2], region.shape[3]].map(|extent| extent.div_ceil(units * TILE));
    let outer = region.shape[0] as usize * region.shape[1] as usize;
    let params = params.with(Extents(region.shape)).with(Extents(region.src_strides));
    (columns <= 0xffff && outer <= 0xffff).then(|| Launch {
        entry,
        grid: [rows, columns, outer as u32],
        smem_bytes: units * TILE * STRIDE * units * to_bytes,
        params: params.with(Extents(region.dst_strides)),
        ..base
    })
}

/// The launch by rows: by fours if addresses are `wide` enough and everything else is, too.
fn rows(
    entries: &Entries,
    base: Launch,
    params: Params,
    mut region: Region,
    edge: Edge,
    mut src_shape: [u32; 4],
    mut before: [u32; 4],
    wide: bool,
) -> Launch {
    let fours = wide
        && region.src_strides[3] == 1
        && region.dst_strides[3] == 1
        && [region.shape[3], src_shape[3], before[3]].iter().all(|extent| extent.is_multiple_of(4))
        && region.starts_at_multiples(4, 3, 3);
    if fours {
        for extents in [&mut region.shape, &mut src_shape, &mut before] {
            extents[3] /= 4;
        }
        for strides in [&mut region.src_strides, &mut region.dst_strides] {
            strides[..3].iter_mut().for_each(|stride| *stride /= 4);
        }
    }
    let n: u32 = region.shape.iter().product();
    let edge = match edge {
        Edge::None => 0,
        Edge::Repeat { .. } => REPEAT,
        Edge::Pad { .. } => PAD,
    };
    let params = params.with(Divisors::new(region.shape));
    let params = params.with(Extents(region.src_strides)).with(Extents(region.dst_strides));
    let params = params.with(Divisors::new(src_shape)).with(Extents(before));
    Launch {
        entry: if fours { entries.fours } else { entries.strided },
        grid: [n.div_ceil(THREADS * PER_THREAD), 1, 1],
        params: params.with(n).with(edge),
        ..base
    }
}

/// Elements as bytes of a type, from f32 values that it holds or rounds.
fn encode(format: FormatId, values: &[f32]) -> Vec<u8> {
    match format {
        FormatId::F16 => bytes_of(&values.iter().map(|&v| f16::from_f32(v)).collect::<Vec<_>>()),
        FormatId::BF16 => bytes_of(&values.iter().map(|&v| bf16::from_f32(v)).collect::<Vec<_>>()),
        FormatId::I32 => bytes_of(&values.iter().map(|&v| v as i32).collect::<Vec<_>>()),
        _ => bytes_of(values),
    }
}

/// The values that the bytes hold.
fn rounded(format: FormatId, values: &[f32]) -> Vec<f32> {
    let round = |v: f32| match format {
        FormatId::F16 => f16::from_f32(v).to_f32(),
        FormatId::BF16 => bf16::from_f32(v).to_f32(),
        FormatId::I32 => v as i32 as f32,
        _ => v,
    };
    values.iter().map(|&v| round(v)).collect()
}

/// Every coordinate of a shape, in order.
fn coordinates([a, b, c, d]: [usize; 4]) -> impl Iterator<Item = [usize; 4]> {
    (0..a * b * c * d).map(move |i| [i / (b * c * d), i / (c * d) % b, i / d % c, i % d])
}

fn place(c: [usize; 4], strides: [usize; 4]) -> usize {
    c.iter().zip(strides).map(|(c, s)| c * s).sum()
}

/// The definition: the destination, dense.
pub fn reference(src: &[f32], shape: [usize; 4], src_strides: [usize; 4], edge: Edge) -> Vec<f32> {
    let element = |c: [usize; 4]| match edge {
        Edge::None => src[place(c, src_strides)],
        Edge::Repeat { src_shape } => src[place(core::array::from_fn(|d| c[d] % src_shape[d]), src_strides)],
        Edge::Pad { src_shape, before } => {
            let inside = (0..4).all(|d| c[d] >= before[d] && c[d] - before[d] < src_shape[d]);
            if inside { src[place(core::array::from_fn(|d| c[d] - before[d]), src_strides)] } else { 0.0 }
        }
    };
    coordinates(shape).map(element).collect()
}

/// The row in the registry.
#[derive(Debug)]
pub struct StridedCopy;

/// One case: a source whose dimensions lie in memory in the order `order`, outermost first, after `skip` other
/// elements; `parts` sources are concatenated along dimension 1.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)] // the contract's names
pub struct Case {
    pub from: FormatId,
    pub to: FormatId,
    pub shape: [usize; 4],
    pub order: [usize; 4],
    pub edge: Edge,
    pub parts: usize,
    pub skip: usize,
}

const fn case(from: FormatId, to: FormatId, shape: [usize; 4], order: [usize; 4]) -> Case {
    Case { from, to, shape, order, edge: Edge::None, parts: 1, skip: 0 }
}
const fn repeated(src_shape: [usize; 4], case: Case) -> Case {
    Case { edge: Edge::Repeat { src_shape }, ..case }
}
const fn padded(src_shape: [usize; 4], before: [usize; 4], case: Case) -> Case {
    Case { edge: Edge::Pad { src_shape, before }, ..case }
}
const DENSE: [usize; 4] = [0, 1, 2, 3];

impl Kernel for StridedCopy {
    const NAME: &'static str = "copy";
    type Case = Case;
    const CASES: &'static [Case] = &[
        case(FormatId::F32, FormatId::F32, [1, 1, 1, 1], DENSE),
        case(FormatId::F32, FormatId::F16, [1, 2, 3, 171], DENSE),
        case(FormatId::F32, FormatId::BF16, [1, 1, 1, 1023], DENSE),
        case(FormatId::F16, FormatId::F32, [1, 1, 5, 206], DENSE),
        case(FormatId::BF16, FormatId::F32, [1, 1, 1, 4], DENSE),
        case(FormatId::F16, FormatId::BF16, [1, 1, 1, 7], DENSE),
        case(FormatId::BF16, FormatId::F16, [1, 1, 2, 512], DENSE),
        case(FormatId::F16, FormatId::F16, [1, 1, 1, 1030], DENSE),
        case(FormatId::F32, FormatId::I32, [1, 1, 1, 130], DENSE),
        case(FormatId::I32, FormatId::F32, [1, 1, 1, 130], DENSE),
        case(FormatId::I32, FormatId::I32, [1, 1, 1, 9], DENSE),
        // Source contiguous in another dimension: each of three.
        case(FormatId::F32, FormatId::F32, [1, 2, 33, 65], [0, 1, 3, 2]),
        case(FormatId::F32, FormatId::F16, [2, 31, 3, 32], [0, 2, 3, 1]),
        case(FormatId::BF16, FormatId::F32, [40, 2, 3, 34], [1, 2, 3, 0]),
        case(FormatId::I32, FormatId::F32, [1, 1, 64, 32], [0, 1, 3, 2]),
        // Contiguous in the same one, or in none.
        case(FormatId::F32, FormatId::BF16, [3, 5, 7, 11], [1, 0, 2, 3]),
        case(FormatId::F16, FormatId::F16, [3, 5, 7, 12], [2, 1, 0, 3]),
        repeated([1, 2, 3, 20], case(FormatId::F32, FormatId::F32, [2, 4, 3, 60], DENSE)),
        repeated([1, 1, 7, 1], case(FormatId::BF16, FormatId::F32, [1, 1, 7, 150], DENSE)),
        padded([1, 2, 3, 20], [0, 0, 1, 5], case(FormatId::F32, FormatId::F16, [1, 3, 4, 33], DENSE)),
        // Rows by fours: every conversion, rows of one and of two dimensions, several CTAs.
        case(FormatId::F32, FormatId::F32, [3, 2, 5, 12], [1, 0, 2, 3]),
        case(FormatId::I32, FormatId::I32, [2, 3, 3, 4], [1, 0, 2, 3]),
        case(FormatId::F16, FormatId::F16, [3, 2, 2, 20], [2, 1, 0, 3]),
        case(FormatId::F32, FormatId::F16, [5, 9, 2, 60], [1, 0, 2, 3]),
        case(FormatId::F32, FormatId::BF16, [1, 3, 4, 8], [0, 2, 1, 3]),
        case(FormatId::F16, FormatId::F32, [7, 3, 5, 44], [2, 0, 1, 3]),
        case(FormatId::BF16, FormatId::F32, [2, 3, 4, 4], [0, 2, 1, 3]),
        case(FormatId::F16, FormatId::BF16, [1, 2, 3, 36], [0, 2, 1, 3]),
        case(FormatId::BF16, FormatId::F16, [4, 1, 3, 28], [2, 1, 0, 3]),
        case(FormatId::F32, FormatId::I32, [2, 1, 3, 16], [2, 1, 0, 3]),
        case(FormatId::I32, FormatId::F32, [2, 2, 1, 24], [1, 0, 2, 3]),
        // One of them by elements, because addresses are odd; and the same for the dense.
        Case { skip: 2, ..case(FormatId::F32, FormatId::F16, [3, 2, 5, 12], [1, 0, 2, 3]) },
        Case { skip: 1, ..case(FormatId::BF16, FormatId::BF16, [1, 1, 9, 128], DENSE) },
        repeated([1, 2, 3, 15], case(FormatId::F32, FormatId::F32, [2, 4, 3, 45], DENSE)),
        padded([1, 2, 3, 20], [0, 0, 1, 8], case(FormatId::F32, FormatId::F16, [2, 3, 4, 32], DENSE)),
        padded([1, 2, 3, 20], [0, 0, 1, 6], case(FormatId::F16, FormatId::F16, [1, 3, 4, 32], DENSE)),
        // Transposed by pairs: every conversion, one tile and its edges.
        case(FormatId::F32, FormatId::F32, [1, 1, 66, 62], [0, 1, 3, 2]),
        case(FormatId::I32, FormatId::I32, [1, 1, 2, 64], [0, 1, 3, 2]),
        case(FormatId::F16, FormatId::F16, [2, 1, 64, 130], [0, 1, 3, 2]),
        case(FormatId::F32, FormatId::F16, [2, 68, 3, 34], [0, 2, 3, 1]),
        case(FormatId::F32, FormatId::BF16, [1, 1, 6, 2], [0, 1, 3, 2]),
        case(FormatId::F16, FormatId::F32, [34, 2, 3, 6], [1, 2, 3, 0]),
        case(FormatId::BF16, FormatId::F32, [1, 3, 10, 66], [0, 1, 3, 2]),
        case(FormatId::F16, FormatId::BF16, [1, 1, 64, 64], [0, 1, 3, 2]),
        case(FormatId::BF16, FormatId::F16, [1, 1, 4, 8], [0, 1, 3, 2]),
        case(FormatId::F32, FormatId::I32, [1, 1, 8, 4], [0, 1, 3, 2]),
        case(FormatId::I32, FormatId::F32, [1, 1, 12, 70], [0, 1, 3, 2]),
        // And by elements, because an extent or the address is odd.
        case(FormatId::F16, FormatId::F16, [1, 1, 33, 66], [0, 1, 3, 2]),
        Case { skip: 1, ..case(FormatId::F16, FormatId::F16, [1, 1, 6, 34], [0, 1, 3, 2]) },
        Case { parts: 3, ..case(FormatId::F32, FormatId::F32, [2, 4, 1, 50], DENSE) },
        Case { parts: 2, ..case(FormatId::F32, FormatId::F32, [3, 1, 2, 6], DENSE) },
        Case { parts: 2, ..case(FormatId::F16, FormatId::F32, [1, 3, 40, 36], [0, 1, 3, 2]) },
    ];
    const NMSE_MAX: f64 = 0.0;
    const BENCH: &'static [Case] = &[
        case(FormatId::F32, FormatId::F16, [1, 1, 2048, 4096], DENSE),
        case(FormatId::F16, FormatId::F16, [1, 1, 4096, 4096], [0, 1, 3, 2]),
        case(FormatId::F32, FormatId::F32, [1, 1, 2048, 4096], [0, 1, 3, 2]),
        case(FormatId::F32, FormatId::F16, [32, 512, 8, 128], [1, 0, 2, 3]),
        case(FormatId::F32, FormatId::F16, [1, 1, 3072, 512], DENSE),
        case(FormatId::F32, FormatId::F32, [1, 512, 2, 8192], [0, 2, 1, 3]),
    ];
    #[cfg(feature = "emu")]
    const ENTRIES: &'static [&'static [crate::emu::Entry]] = super::ENTRIES;

    fn problem(case: &Case, random: &mut Random) -> Problem {
        let Case { from, to, shape, order, edge, parts, skip } = *case;
        let src_shape = match edge {
            Edge::None => shape,
            Edge::Repeat { src_shape } | Edge::Pad { src_shape, .. } => src_shape,
        };
        let mut src_strides = [0; 4];
        let mut stride = 1;
        for &d in order.iter().rev() {
            src_strides[d] = stride;
            stride *= src_shape[d];
        }
        let scale = if from == FormatId::I32 || to == FormatId::I32 { 1000.0 } else { 1.0 };
        let sources: Vec<Vec<f32>> =
            (0..parts).map(|_| random.values(skip + stride).iter().map(|v| v * scale).collect()).collect();

        let mut dst_shape = shape;
        dst_shape[1] *= parts;
        let dst_strides = dense(dst_shape);
        let mut expected = vec![0.0; dst_shape.iter().product()];
        for (part, source) in sources.iter().enumerate() {
            let copied = reference(&rounded(from, &source[skip..]), shape, src_strides, edge);
            for (c, value) in coordinates(shape).zip(copied) {
                expected[place([c[0], c[1] + part * shape[1], c[2], c[3]], dst_strides)] = value;
            }
        }
        let mut buffers = vec![Buffer::Output(Expected::Exact(encode(to, &expected)))];
        buffers.extend(sources.iter().map(|source| Buffer::Input(encode(from, source))));
        Problem {
            buffers,
            launches: Box::new(move |at| {
                let part_bytes = (shape[1] * dst_strides[1] * quant::info(to).bytes) as u64;
                let part = |(part, &src): (usize, &DevicePtr)| {
                    let dst = at[0].offset(part as u64 * part_bytes);
                    let src = src.offset((skip * quant::info(from).bytes) as u64);
                    launch(&Args { from, to, src, dst, shape, src_strides, dst_strides, edge })
                };
                at[1..].iter().enumerate().map(part).collect()
            }),
        }
    }

    fn peer(case: &Case) -> Option<alloc::string::String> {
        let Case { from, to, shape, order, edge: Edge::None, parts: 1, .. } = *case else {
            return None;
        };
        // ggml counts from the innermost, as the source lies in memory; no order is zeros there.
        let shape = [3, 2, 1, 0].map(|d: usize| shape[order[d]]);
        let order = if order == DENSE { [0; 4] } else { [3, 2, 1, 0].map(|d: usize| 3 - order[d]) };
        Some(peer::copy(from, to, shape, order))
    }

    fn bytes(case: &Case) -> u64 {
        let n = case.shape.iter().product::<usize>() * case.parts;
        let src = match case.edge {
            Edge::None => n,
            Edge::Repeat { src_shape } | Edge::Pad { src_shape, .. } => src_shape.iter().product(),
        };
        (src * quant::info(case.from).bytes + n * quant::info(case.to).bytes) as u64
    }

    fn flops(_: &Case) -> u64 {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// f16 to f16, the source at `src`.
    fn entry(src: u64, shape: [usize; 4], src_strides: [usize; 4], dst_strides: [usize; 4]) -> &'static str {
        let (from, edge) = (FormatId::F16, Edge::None);
        let (src, dst) = (DevicePtr(src), DevicePtr(1 << 20));
        launch(&Args { from, to: from, src, dst, shape, src_strides, dst_strides, edge }).unwrap().entry
    }

    #[test]
    fn a_source_outside_its_padding_is_refused() {
        let (shape, src_shape) = ([1, 1, 1, 8], [1, 1, 1, 4]);
        let pad = |before: usize| {
            let edge = Edge::Pad { src_shape, before: [0, 0, 0, before] };
            let (src, dst) = (DevicePtr(1 << 20), DevicePtr(2 << 20));
            let (src_strides, dst_strides) = (dense(src_shape), dense(shape));
            launch(&Args {
                from: FormatId::F32,
                to: FormatId::F32,
                src,
                dst,
                shape,
                src_strides,
                dst_strides,
                edge,
            })
        };
        assert!(pad(4).is_ok());
        for before in [5, (1 << 32) - 1, 1 << 32, usize::MAX] {
            assert!(pad(before).is_err(), "{before}");
        }
    }

    #[test]
    fn the_widest_entry_that_alignment_allows() {
        let shape = [2, 3, 4, 8];
        let permuted = [32, 64, 8, 1];
        assert_eq!(entry(0, shape, dense(shape), dense(shape)), "copy_flat_16");
        // Rows of 32 that begin every 40, every 34.
        assert_eq!(entry(0, shape, dense(shape), [120, 40, 8, 1]), "copy_fours_16");
        assert_eq!(entry(0, shape, dense(shape), [102, 34, 8, 1]), "copy_strided_16");
        assert_eq!(entry(8, shape, permuted, dense(shape)), "copy_fours_16");
        assert_eq!(entry(4, shape, permuted, dense(shape)), "copy_strided_16");
        // Columns that begin every 4, every 5.
        assert_eq!(entry(0, shape, [96, 32, 1, 4], dense(shape)), "copy_transpose_pairs_16");
        assert_eq!(entry(2, shape, [96, 32, 1, 4], dense(shape)), "copy_transpose_16");
        assert_eq!(entry(0, shape, [120, 40, 1, 5], dense(shape)), "copy_transpose_16");
        // Three of either, beginning at even places.
        assert_eq!(entry(0, [1, 1, 3, 8], [0, 0, 1, 4], [0, 0, 8, 1]), "copy_transpose_16");
        assert_eq!(entry(0, [1, 1, 8, 3], [0, 0, 1, 8], [0, 0, 4, 1]), "copy_transpose_16");
    }

    #[test]
    fn dimensions_that_follow_each_other_are_one() {
        let shape = [32, 512, 8, 128];
        let region =
            Region { shape, src_strides: [1024, 32 * 1024, 128, 1], dst_strides: [512 * 1024, 1024, 128, 1] };
        let folded = Region {
            shape: [1, 32, 512, 1024],
            src_strides: [0, 1024, 32 * 1024, 1],
            dst_strides: [0, 512 * 1024, 1024, 1],
        };
        assert_eq!(region.folded(), folded);
        // A source that repeats one element, rows that repeat one.
        let region = Region { shape: [1, 2, 3, 4], src_strides: [0; 4], dst_strides: [24, 12, 4, 1] };
        let folded = Region { shape: [1, 1, 1, 24], src_strides: [0; 4], dst_strides: [0, 0, 0, 1] };
        assert_eq!(region.folded(), folded);
    }

    #[cfg(feature = "emu")]
    #[test]
    fn divisors_divide() {
        let values = [1, 2, 3, 5, 7, 641, 1000, 4096, 6_700_417, 0x3fff_ffff, 0x4000_0001, 0x7fff_ffff];
        for by in values {
            let divisors = Divisors::new([by; 4]);
            for n in values.into_iter().flat_map(|v| [v - 1, v, 3 * (v / 3), 0x7fff_ffff - v]) {
                assert_eq!(divisors.divide(3, n), (n / by, n % by), "{n} / {by}");
            }
        }
    }
}
