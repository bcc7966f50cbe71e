//! Matrix × vector with quantised weights: `y[c][r] = Σ w[r][i] · x[c][i]` for up to 8 columns c.
//!
//! * Shapes: `w` [n_rows, k] in any block format, 16-byte aligned rows from the start of the matrix (k a multiple of the
//!   format's block); activations [n_cols, k] as `quantise_act` writes them (`q`, `scales`) in the format's kind (`BlockFormat::ACT`); `y` [n_cols, n_rows] f32.
//!   n_cols 1 to 8. Nothing overlaps.
//! * Geometry: 128 threads per CTA, a warp per row; lane l takes the groups l, l + 32, … of 32 weights.
//! * Bytes: the weights once, plus n_cols · (k · 1.25 + 4 · n_rows). FLOPs: 2 · n_rows · n_cols · k.
//! * Entries: n_cols rounded up to 1, 2, 4 or 8; the columns beyond are computed as the last one and not stored. Weights
//!   are unpacked once for all columns, so the cost per column falls.
//! * Result: the integer part of each group is exact; its float part is `BlockFormat::dot_group`'s, in that order; lanes
//!   are summed as a butterfly. So it depends on k alone, not on the grid or on n_cols.
//! * Tolerance: NMSE 1e-11 against `dot_group` summed in f64, group by group.
//!
//! Done for speed: (1) dp4a on unsigned codes, the bias taken out once per group through the activations' sums,
//! (2) 16-byte loads of activations, which stay in L1/L2, (3) the block's index within a super-block is the same in
//! every round (32 is a multiple of it).

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

const THREADS: u32 = 128;

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod gpu {
    use quant::act::ActKind;
    use quant::{BlockFormat, Group};

    use super::THREADS;
    use crate::device::math::{dp4a_us, fma};
    use crate::device::{Glb, U32x2, U32x4, math, thread, warp};
    use crate::kernels::quantise_act::ActScale;

    /// `acc` plus the dot product of a weight group and an activation group; the order is `BlockFormat::dot_group`'s.
    #[inline(always)]
    fn dot<F: BlockFormat>(group: &Group, q: [[u32; 4]; 2], act: ActScale, mut acc: f32) -> f32 {
        let mut halves = [0i32; 2];
        unroll!(H in 0..2 {
            unroll!(I in 0..4 {
                halves[H] = dp4a_us(group.codes[4 * H + I], q[H][I], halves[H]);
            });
        });
        // Q8_1 keeps the offset's value where the others keep the sums.
        let offset_value = matches!(F::ACT, ActKind::Q8_1);
        const { assert!(!matches!(F::ACT, ActKind::Q8_1) || (F::BIAS == 0 && F::SCALE_ELEMS != 16)) };
        let sums = if offset_value { [0; 2] } else { act.sums() };
        unroll!(H in 0..2 {
            halves[H] -= F::BIAS * sums[H];
        });
        if F::SCALE_ELEMS == 16 {
            acc = fma(group.scale[0] * act.d, halves[0] as f32, acc);
            acc = fma(group.scale[1] * act.d, halves[1] as f32, acc);
        } else {
            acc = fma(group.scale[0] * act.d, (halves[0] + halves[1]) as f32, acc);
        }
        if F::HAS_OFFSET {
            if offset_value {
                acc = fma(group.offset[0], f32::from_bits(act.extra), acc);
            } else if F::SCALE_ELEMS == 16 {
                acc = fma(group.offset[0], math::mul(act.d, sums[0] as f32), acc);
                acc = fma(group.offset[1], math::mul(act.d, sums[1] as f32), acc);
            } else {
                acc = fma(group.offset[0], math::mul(act.d, (sums[0] + sums[1]) as f32), acc);
            }
        }
        acc
    }

    #[inline(always)]
    pub(super) fn mmvq<F: BlockFormat, const COLS: usize>(
        w: Glb<u8>,
        q: Glb<U32x4>,
        scales: Glb<U32x2>,
        y: Glb<f32>,
        n_rows: u32,
        n_groups: u32,
        n_cols: u32,
    ) {
        let row = thread::block_idx_x() * (THREADS / thread::WARP) + thread::warp_id();
        // A whole warp leaves: no collective below misses a lane.
        if row >= n_rows {
            return;
        }
        let w = w.cast::<F>().offset(row as usize * (n_groups as usize / F::GROUPS));
        let column = |c: usize| if (c as u32) < n_cols { c } else { n_cols as usize - 1 } * n_groups as usize;

        let mut acc = [0.0f32; COLS];
        let in_block = thread::lane_id() as usize % F::GROUPS;
        let mut g = thread::lane_id();
        while g < n_groups {
            let block = w.view(g / F::GROUPS as u32);
            let group = block.unpack_group(in_block);
            let mut c = 0;
            while c < COLS {
                let (q, scales) = (q.offset(2 * column(c)), scales.offset(column(c)));
                let U32x2([d, extra]) = scales.ld_nc(g);
                let codes = [q.ld_nc(2 * g).0, q.ld_nc(2 * g + 1).0];
                acc[c] = dot::<F>(&group, codes, ActScale { d: f32::from_bits(d), extra }, acc[c]);
                c += 1;
            }
            g += thread::WARP;
        }

        let mut c = 0;
        while c < COLS {
            let sum = warp::sum_f32(acc[c]);
            if thread::lane_id() == 0 && (c as u32) < n_cols {
                y.offset(c * n_rows as usize).st(row, sum);
            }
            c += 1;
        }
    }
}

/// Entries of every format, by number of columns, and the function that names them.
macro_rules! entries {
    ([] $($id:ident => $module:ident :: Block,)*) => {
        #[cfg(any(target_arch = "nvptx64", feature = "emu"))]
        kernels! {
            in "mmvq";
            ENTRIES: threads(128, 3);
            fn (w: Glb<u8>, q: Glb<U32x4>, scales: Glb<U32x2>, y: Glb<f32>, n_rows: u32, n_groups: u32, n_cols: u32);
            $(
                concat!("mmvq_", stringify!($id), "_n1") => gpu::mmvq::<formats::$module::Block, 1>;
                concat!("mmvq_", stringify!($id), "_n2") => gpu::mmvq::<formats::$module::Block, 2>;
                concat!("mmvq_", stringify!($id), "_n4") => gpu::mmvq::<formats::$module::Block, 4>;
                concat!("mmvq_", stringify!($id), "_n8") => gpu::mmvq::<formats::$module::Block, 8>;
            )*
        }

        /// Entry of a format for up to `n_cols` columns, and the number it computes.
        #[cfg(not(target_arch = "nvptx64"))]
        fn entry(format: quant::FormatId, n_cols: usize) -> Option<&'static str> {
            match (format, n_cols) {
                $(
                    (quant::FormatId::$id, 1) => Some(concat!("mmvq_", stringify!($id), "_n1")),
                    (quant::FormatId::$id, 2) => Some(concat!("mmvq_", stringify!($id), "_n2")),
                    (quant::FormatId::$id, 3..=4) => Some(concat!("mmvq_", stringify!($id), "_n4")),
                    (quant::FormatId::$id, 5..=8) => Some(concat!("mmvq_", stringify!($id), "_n8")),
                )*
                _ => None,
            }
        }

        /// Every format at one column, and for a few the edges of the column counts.
        #[cfg(not(target_arch = "nvptx64"))]
        const CASES: &[host::Case] = &[
            $(host::Case { format: quant::FormatId::$id, n_rows: 5, k: 512, n_cols: 1 },)*
            host::Case { format: quant::FormatId::Q4_0, n_rows: 4, k: 32, n_cols: 2 },
            host::Case { format: quant::FormatId::Q8_0, n_rows: 3, k: 1056, n_cols: 3 },
            host::Case { format: quant::FormatId::Q4_K, n_rows: 9, k: 1280, n_cols: 4 },
            host::Case { format: quant::FormatId::Q6_K, n_rows: 1, k: 768, n_cols: 5 },
            host::Case { format: quant::FormatId::IQ3_XXS, n_rows: 2, k: 2304, n_cols: 7 },
            host::Case { format: quant::FormatId::Q5_1, n_rows: 7, k: 1024, n_cols: 8 },
        ];
    };
}

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
use {
    crate::device::{Glb, U32x2, U32x4},
    quant::formats,
};
quant::for_each_block_format!(entries![]);

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use alloc::{boxed::Box, vec, vec::Vec};

    use quant::act::ActKind;
    use quant::{ActGroup, BlockFormat, FloatFormat, FormatId, Visitor, info, with_format};

    use super::THREADS;
    use crate::case::{Buffer, Expected, Kernel, Problem, Random, bytes_of};
    use crate::kernels::quantise_act;
    use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};

    /// Most columns of one launch.
    pub const MAX_COLS: usize = 8;

    /// The definition: one row and one column; each group's own sum as `quant` defines it, their sum in f64.
    pub fn reference<F: BlockFormat>(row: &[F], column: &[ActGroup]) -> f64 {
        let groups = row.iter().flat_map(|block| (0..F::GROUPS).map(move |g| (block, g)));
        groups.zip(column).map(|((block, g), act)| f64::from(block.dot_group(g, act, 0.0))).sum()
    }

    /// All rows and columns, of weights given as bytes.
    struct Product<'a> {
        blocks: &'a [u8],
        x: &'a [f32],
        k: usize,
    }

    impl Visitor for Product<'_> {
        type Output = (ActKind, Vec<f64>);

        fn block<F: BlockFormat>(self) -> Self::Output {
            let blocks: &[F] = bytemuck::cast_slice(self.blocks);
            let mut groups = vec![ActGroup::ZERO; self.x.len() / 32];
            ActGroup::quantise(F::ACT, self.x, &mut groups);
            let columns = groups.chunks(self.k / 32);
            let rows = || blocks.chunks(self.k / F::ELEMS);
            (F::ACT, columns.flat_map(|column| rows().map(|row| reference(row, column))).collect())
        }

        fn float<F: FloatFormat>(self) -> Self::Output {
            unreachable!("{:?} has no blocks", F::ID)
        }
    }

    /// Arguments; see the contract.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Args {
        pub format: FormatId,
        pub w: DevicePtr,
        pub q: DevicePtr,
        pub scales: DevicePtr,
        pub y: DevicePtr,
        pub n_rows: usize,
        pub k: usize,
        pub n_cols: usize,
    }

    /// One launch for all rows.
    pub fn launch(args: &Args) -> Result<Launch, LaunchError> {
        let kernel = Mmvq::NAME;
        let check = Check(kernel);
        if !(1..=MAX_COLS).contains(&args.n_cols) {
            let got = args.n_cols as u64;
            return Err(LaunchError::Shape { kernel, what: "n_cols", expected: "1 to 8", got });
        }
        let entry = super::entry(args.format, args.n_cols);
        let entry = entry.ok_or(LaunchError::Format { kernel, format: args.format })?;
        check.multiple("k", args.k, info(args.format).elems, "a multiple of the format's block")?;
        let n_groups = check.size("k", args.k)? / 32;
        let n_rows = check.size("n_rows", args.n_rows)?;
        for (what, at, align) in
            [("w", args.w, 16), ("q", args.q, 16), ("scales", args.scales, 8), ("y", args.y, 4)]
        {
            check.aligned(what, at, align)?;
        }
        let params = Params::new().with(args.w).with(args.q).with(args.scales).with(args.y);
        Ok(Launch {
            entry,
            grid: [n_rows.div_ceil(THREADS / 32), 1, 1],
            cta: THREADS,
            cluster: 1,
            smem_bytes: 0,
            params: params.with(n_rows).with(n_groups).with(args.n_cols as u32),
        })
    }

    /// The row in the registry.
    #[derive(Debug)]
    pub struct Mmvq;

    /// One case.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Case {
        pub format: FormatId,
        pub n_rows: usize,
        pub k: usize,
        pub n_cols: usize,
    }

    /// Random weights of a format, as bytes and decoded.
    pub(crate) struct Weights<'a>(pub &'a mut Random, pub usize);

    impl Visitor for Weights<'_> {
        type Output = (Vec<u8>, Vec<f32>);

        /// Formats with an encoder get encoded values. The others get random bytes, and of those only blocks that
        /// decode to numbers of ordinary size: a random scale may be infinite.
        fn block<F: BlockFormat>(self) -> Self::Output {
            let Weights(random, n) = self;
            let mut blocks = vec![F::zeroed(); n / F::ELEMS];
            match F::ENCODE {
                quant::format::Encode::Yes => F::encode_row(&random.values(n), None, &mut blocks),
                quant::format::Encode::WithImportance => {
                    let values = random.values(n);
                    F::encode_row(&values, Some(&vec![1.0; n]), &mut blocks);
                }
                quant::format::Encode::No => {
                    let mut decoded = vec![0.0; F::ELEMS];
                    for block in &mut blocks {
                        loop {
                            bytemuck::bytes_of_mut(block).fill_with(|| random.bits() as u8);
                            block.decode(&mut decoded);
                            if decoded.iter().all(|v| v.abs() < 1e3) && decoded.iter().any(|v| v.abs() > 1e-3)
                            {
                                break;
                            }
                        }
                    }
                }
            }
            let mut decoded = vec![0.0; n];
            for (block, out) in blocks.iter().zip(decoded.chunks_mut(F::ELEMS)) {
                block.decode(out);
            }
            (bytemuck::cast_slice(&blocks).to_vec(), decoded)
        }

        fn float<F: FloatFormat>(self) -> Self::Output {
            let values: Vec<F> = self.0.values(self.1).into_iter().map(F::from_f32).collect();
            (bytemuck::cast_slice(&values).to_vec(), values.iter().map(|v| v.to_f32()).collect())
        }
    }

    impl Kernel for Mmvq {
        const NAME: &'static str = "mmvq";
        type Case = Case;
        const CASES: &'static [Case] = super::CASES;
        const NMSE_MAX: f64 = 1e-11;
        #[cfg(feature = "emu")]
        const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::ENTRIES];

        fn problem(case: &Case, random: &mut Random) -> Problem {
            let Case { format, n_rows, k, n_cols } = *case;
            let weights = with_format(format, Weights(random, n_rows * k));
            let (blocks, _) = weights.expect("cases name formats of weights");
            let x = random.values(n_cols * k);
            let product = with_format(format, Product { blocks: &blocks, x: &x, k });
            let (kind, expected) = product.expect("cases name formats of weights");
            let (q, scales) = quantise_act::reference(kind, &x);
            Problem {
                buffers: vec![
                    Buffer::Input(blocks),
                    Buffer::Input(bytes_of(&q)),
                    Buffer::Input(bytes_of(&scales)),
                    Buffer::Output(Expected::F32(expected)),
                ],
                launches: Box::new(move |at| {
                    let args =
                        Args { format, w: at[0], q: at[1], scales: at[2], y: at[3], n_rows, k, n_cols };
                    Ok(vec![launch(&args)?])
                }),
            }
        }

        fn bytes(case: &Case) -> u64 {
            let row = info(case.format);
            let weights = case.n_rows * case.k / row.elems * row.bytes;
            (weights + case.n_cols * (case.k * 5 / 4 + 4 * case.n_rows)) as u64
        }

        fn flops(case: &Case) -> u64 {
            2 * (case.n_rows * case.n_cols * case.k) as u64
        }
    }
}
