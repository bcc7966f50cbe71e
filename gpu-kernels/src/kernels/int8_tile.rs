//! Warp tiles of int8 products with unpacked weights: what the entries of `mmq` have in common.
//!
//! Weights and activations lie in shared memory as signed bytes ([`Codes`]), the floats that go with them in planes of
//! their own ([`put_group`], [`put_column`]). [`Tile::add_group`] multiplies one group of 32 and adds to the warp's f32
//! accumulators exactly as `BlockFormat::dot_group` does: integer sums are exact, whoever makes them ([`Product`]), and
//! the fma that follow are its, in its order.
//!
//! The integer sum starts at the bits of 1.5·2^23, so that it is a float after one subtraction: per output and group
//! there remain a subtraction, a product of scales and one fma (one more for an offset). On Hopper these, not the tensor
//! cores, bound the product. Where both scales are values of f16 tensor cores multiply them, too ([`Tile::add_pair`]).

use quant::BlockFormat;

/// Whether the halves of a group have scales of their own.
pub const fn halved<F: BlockFormat>() -> bool {
    F::SCALE_ELEMS == 16
}

/// Floats per row and group: scales, then offsets.
pub const fn row_planes<F: BlockFormat>() -> usize {
    (1 + halved::<F>() as usize) * (1 + F::HAS_OFFSET as usize)
}

/// Floats per column and group: the scale, then what offsets multiply.
pub const fn column_planes<F: BlockFormat>() -> usize {
    1 + F::HAS_OFFSET as usize * (1 + halved::<F>() as usize)
}

/// Whether both scales are values of f16, so that their product is exact in f32 and tensor cores of sm_80 can make it.
pub const fn has_exact_scales<F: BlockFormat>() -> bool {
    cfg!(any(not(target_arch = "nvptx64"), sm_ge_80)) && F::SCALE_IS_F16 && !halved::<F>() && !F::HAS_OFFSET
}

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
pub use device::*;

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod device {
    use quant::{BlockFormat, Group};

    use super::halved;
    use crate::device::mma;
    use crate::device::{F32x2, F32x4, Smem, U32x4, math, thread};
    use crate::kernels::quantise_act::{ActScale, Kind, kind_of};

    /// The f32 1.5·2^23: its bits plus an integer below 2^22 in size are the bits of the sum. A group's sum is at most
    /// 32 · 128 · 127.
    const MAGIC: f32 = 12_582_912.0;
    const MAGIC_BITS: i32 = MAGIC.to_bits() as i32;

    /// Rows of weights or columns of activations: `GROUPS` groups each, in 16-byte chunks, two per group. Chunks are permuted
    /// within a row so that the same chunk of eight neighbours lies in eight different quads of banks.
    #[derive(Clone, Copy)]
    pub struct Codes<const GROUPS: usize>(pub Smem<U32x4>);

    impl<const GROUPS: usize> Codes<GROUPS> {
        /// Where a row's chunk lies.
        #[inline(always)]
        pub fn index(row: u32, chunk: u32) -> u32 {
            const { assert!(GROUPS == 2 || GROUPS == 8) };
            let swizzle = if GROUPS == 2 { row / 2 % 4 } else { row % 8 };
            row * (2 * GROUPS as u32) + (chunk ^ swizzle)
        }
    }

    /// How a warp multiplies 16 rows by 8 columns of one group. Results are the four that PTX's accumulator fragments give
    /// a lane: rows `lane / 4` and that plus 8, columns `2 (lane % 4)` and the next, row by row.
    pub trait Product {
        /// A lane's part of 16 rows.
        type A: Copy;
        /// A lane's part of 8 columns.
        type B: Copy + Default;
        /// Whether one group at a time fills the machine: then code for several side by side only takes registers.
        const ONE_AT_A_TIME: bool;
        /// Group `j` of 16 rows from `row` on.
        fn a<const GROUPS: usize>(codes: Codes<GROUPS>, row: u32, j: u32) -> Self::A;
        /// Group `j` of 16 columns from `column` on, as two of 8.
        fn b<const GROUPS: usize>(codes: Codes<GROUPS>, column: u32, j: u32) -> [Self::B; 2];
        /// Sums over the group, plus [`MAGIC_BITS`].
        fn whole<const GROUPS: usize>(codes: Codes<GROUPS>, a: Self::A, b: Self::B) -> [i32; 4];
        /// Sums over its halves, each plus [`MAGIC_BITS`].
        fn halves<const GROUPS: usize>(codes: Codes<GROUPS>, a: Self::A, b: Self::B) -> [[i32; 4]; 2];
    }

    /// The product of this tier.
    #[cfg(any(not(target_arch = "nvptx64"), sm_ge_75))]
    pub type Native = TensorCores;
    /// The product of this tier.
    #[cfg(all(target_arch = "nvptx64", not(sm_ge_75)))]
    pub type Native = Dp4a;

    /// `mma` on fragments by `ldmatrix` (sm_75).
    #[cfg(any(not(target_arch = "nvptx64"), sm_ge_75))]
    pub struct TensorCores;

    #[cfg(any(not(target_arch = "nvptx64"), sm_ge_75))]
    impl Product for TensorCores {
        type A = [u32; 4];
        type B = [u32; 2];
        const ONE_AT_A_TIME: bool = false;

        #[inline(always)]
        #[track_caller]
        fn a<const GROUPS: usize>(codes: Codes<GROUPS>, row: u32, j: u32) -> [u32; 4] {
            let lane = thread::lane_id();
            mma::load_x4(codes.0, Codes::<GROUPS>::index(row + lane % 16, 2 * j + lane / 16))
        }

        #[inline(always)]
        #[track_caller]
        fn b<const GROUPS: usize>(codes: Codes<GROUPS>, column: u32, j: u32) -> [[u32; 2]; 2] {
            let lane = thread::lane_id();
            let column = column + lane % 8 + lane / 16 * 8;
            let [x, y, z, w] = mma::load_x4(codes.0, Codes::<GROUPS>::index(column, 2 * j + lane / 8 % 2));
            [[x, y], [z, w]]
        }

        #[inline(always)]
        #[track_caller]
        fn whole<const GROUPS: usize>(_: Codes<GROUPS>, a: [u32; 4], b: [u32; 2]) -> [i32; 4] {
            let mut c = mma::FragmentI32([MAGIC_BITS; 4]);
            mma::mma_s8(&mut c, mma::FragmentA(a), mma::FragmentB(b));
            c.0
        }

        #[inline(always)]
        #[track_caller]
        fn halves<const GROUPS: usize>(_: Codes<GROUPS>, a: [u32; 4], b: [u32; 2]) -> [[i32; 4]; 2] {
            let mut c = [mma::FragmentI32([MAGIC_BITS; 4]); 2];
            mma::mma_s8_k16(&mut c[0], [a[0], a[1]], b[0]);
            mma::mma_s8_k16(&mut c[1], [a[2], a[3]], b[1]);
            [c[0].0, c[1].0]
        }
    }

    /// `dp4a` on words from shared memory, for GPUs without int8 tensor cores; on the host, for tests.
    #[cfg(any(test, all(target_arch = "nvptx64", not(sm_ge_75))))]
    pub struct Dp4a;

    #[cfg(any(test, all(target_arch = "nvptx64", not(sm_ge_75))))]
    impl Product for Dp4a {
        /// Two rows' words.
        type A = [[u32; 8]; 2];
        /// Where the first column's group starts, by column and group: columns are read when they are needed.
        type B = [u32; 2];
        const ONE_AT_A_TIME: bool = true;

        #[inline(always)]
        #[track_caller]
        fn a<const GROUPS: usize>(codes: Codes<GROUPS>, row: u32, j: u32) -> [[u32; 8]; 2] {
            let row = row + thread::lane_id() / 4;
            [words(codes, row, j), words(codes, row + 8, j)]
        }

        #[inline(always)]
        fn b<const GROUPS: usize>(_: Codes<GROUPS>, column: u32, j: u32) -> [[u32; 2]; 2] {
            let column = column + 2 * (thread::lane_id() % 4);
            [[column, j], [column + 8, j]]
        }

        #[inline(always)]
        #[track_caller]
        fn whole<const GROUPS: usize>(codes: Codes<GROUPS>, a: [[u32; 8]; 2], b: [u32; 2]) -> [i32; 4] {
            let [first, second] = Self::halves(codes, a, b);
            core::array::from_fn(|i| first[i] + (second[i] - MAGIC_BITS))
        }

        #[inline(always)]
        #[track_caller]
        fn halves<const GROUPS: usize>(
            codes: Codes<GROUPS>,
            a: [[u32; 8]; 2],
            [column, j]: [u32; 2],
        ) -> [[i32; 4]; 2] {
            let mut sums = [[MAGIC_BITS; 4]; 2];
            unroll!(C in 0..2 {
                let b = words(codes, column + C as u32, j);
                unroll!(R in 0..2 {
                    unroll!(I in 0..8 {
                        sums[I / 4][2 * R + C] = math::dp4a(a[R][I], b[I], sums[I / 4][2 * R + C]);
                    });
                });
            });
            sums
        }
    }

    /// A row's group.
    #[cfg(any(test, all(target_arch = "nvptx64", not(sm_ge_75))))]
    #[inline(always)]
    #[track_caller]
    fn words<const GROUPS: usize>(codes: Codes<GROUPS>, row: u32, j: u32) -> [u32; 8] {
        let U32x4(low) = codes.0.ld(Codes::<GROUPS>::index(row, 2 * j));
        let U32x4(high) = codes.0.ld(Codes::<GROUPS>::index(row, 2 * j + 1));
        [low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]]
    }

    /// A group's codes without the bias, as signed bytes.
    #[inline(always)]
    pub fn signed_codes<F: BlockFormat>(group: &Group) -> [u32; 8] {
        // code - BIAS as a signed byte: no byte carries, since code + 128 - BIAS is at most 255.
        const { assert!(F::CODE_MAX as i32 - F::BIAS <= 127 && F::BIAS <= 128) };
        let signed = |word: u32| {
            if F::BIAS == 0 { word } else { (word + (128 - F::BIAS) as u32 * 0x0101_0101) ^ 0x8080_8080 }
        };
        group.codes.map(signed)
    }

    /// Stores group `j` of row `row`: its codes without the bias, and its floats.
    #[inline(always)]
    #[track_caller]
    pub fn put_group<F: BlockFormat, const GROUPS: usize, const ROWS: usize>(
        codes: Codes<GROUPS>,
        floats: Smem<f32>,
        row: u32,
        j: u32,
        group: &Group,
    ) {
        put_codes(codes, row, j, signed_codes::<F>(group));
        put_floats::<F, GROUPS, ROWS>(floats, row, j, group);
    }

    /// Where a row's floats lie in a plane.
    #[inline(always)]
    pub fn row_place(row: u32) -> u32 {
        row / 32 * 32 + row % 8 * 4 + row % 32 / 8
    }

    /// Stores the floats of group `j` of row `row` into planes `[plane][group][row]`. Of 32 rows, those eight apart are
    /// neighbours there, since a lane's accumulators need them together.
    #[inline(always)]
    #[track_caller]
    pub fn put_floats<F: BlockFormat, const GROUPS: usize, const ROWS: usize>(
        floats: Smem<f32>,
        row: u32,
        j: u32,
        group: &Group,
    ) {
        let place = row_place(row);
        let put = |plane: usize, value: f32| {
            floats.st((plane * GROUPS * ROWS) as u32 + j * ROWS as u32 + place, value);
        };
        put(0, group.scale[0]);
        let n_scales = if halved::<F>() { 2 } else { 1 };
        if halved::<F>() {
            put(1, group.scale[1]);
        }
        if F::HAS_OFFSET {
            put(n_scales, group.offset[0]);
            if halved::<F>() {
                put(n_scales + 1, group.offset[1]);
            }
        }
    }

    /// A group's codes, without the bias.
    #[cfg_attr(target_arch = "nvptx64", inline(always))]
    #[track_caller]
    pub fn put_codes<const GROUPS: usize>(codes: Codes<GROUPS>, row: u32, j: u32, group: [u32; 8]) {
        let [a, b, c, d, e, f, g, h] = group;
        codes.0.st(Codes::<GROUPS>::index(row, 2 * j), U32x4([a, b, c, d]));
        codes.0.st(Codes::<GROUPS>::index(row, 2 * j + 1), U32x4([e, f, g, h]));
    }

    /// Stores the scales of a row's two groups for [`Tile::add_pair`], as f16.
    #[inline(always)]
    #[track_caller]
    pub fn put_row_scales(scales: Smem<f32>, row: u32, of_groups: [f32; 2]) {
        scales.cast::<u32>().st(row_place(row), math::pack_f16(of_groups[0], of_groups[1]));
    }

    /// Stores the scale of a column's group `j` of two for [`Tile::add_pair`].
    #[inline(always)]
    #[track_caller]
    pub fn put_column_scale(scales: Smem<f32>, column: u32, j: u32, d: f32) {
        scales.cast::<u16>().st(2 * column + j, math::pack_f16(d, 0.0) as u16);
    }

    /// Stores the floats of group `j` of column `column` into planes `[plane][group][column]`.
    #[inline(always)]
    #[track_caller]
    pub fn put_column<F: BlockFormat, const GROUPS: usize, const COLS: usize>(
        floats: Smem<f32>,
        column: u32,
        j: u32,
        act: ActScale,
    ) {
        const { assert!(!matches!(kind_of::<F>(), Kind::Q8_1) || (F::HAS_OFFSET && F::SCALE_ELEMS != 16)) };
        let at = j * COLS as u32 + column;
        let plane = (GROUPS * COLS) as u32;
        floats.st(at, act.d);
        if F::HAS_OFFSET {
            // Q8_1 keeps the offset's value where the others keep the sums.
            if matches!(kind_of::<F>(), Kind::Q8_1) {
                floats.st(plane + at, f32::from_bits(act.extra));
            } else {
                let [first, second] = act.sums();
                let value = |sum: i32| math::mul(act.d, sum as f32);
                if halved::<F>() {
                    floats.st(plane + at, value(first));
                    floats.st(2 * plane + at, value(second));
                } else {
                    floats.st(plane + at, value(first + second));
                }
            }
        }
    }

    /// A warp's tile of 16 · `MT` rows and 8 · `NT` columns, within a CTA's tile of `ROWS` rows and `COLS` columns.
    #[derive(Clone, Copy)]
    pub struct Tile<const GROUPS: usize, const ROWS: usize, const COLS: usize> {
        /// The weights' codes.
        pub a: Codes<GROUPS>,
        /// The activations' codes.
        pub b: Codes<GROUPS>,
        /// The weights' floats, as [`put_group`] stores them.
        pub row_floats: Smem<f32>,
        /// The activations' floats, as [`put_column`] stores them.
        pub column_floats: Smem<f32>,
        /// The warp's first row, a multiple of 32.
        pub row: u32,
        /// The warp's first column, a multiple of 16.
        pub column: u32,
    }

    /// Accumulators of a warp's tile.
    pub type Accumulators<const MT: usize, const NT: usize> = [[[f32; 4]; NT]; MT];

    impl<const GROUPS: usize, const ROWS: usize, const COLS: usize> Tile<GROUPS, ROWS, COLS> {
        /// Adds group `j` to the accumulators. The whole warp calls.
        #[inline(always)]
        #[track_caller]
        pub fn add_group<F: BlockFormat, P: Product, const MT: usize, const NT: usize>(
            &self,
            acc: &mut Accumulators<MT, NT>,
            j: u32,
        ) {
            match const { (halved::<F>(), F::HAS_OFFSET) } {
                (false, false) => self.add::<P, false, false, MT, NT>(acc, j),
                (false, true) => self.add::<P, false, true, MT, NT>(acc, j),
                (true, false) => self.add::<P, true, false, MT, NT>(acc, j),
                (true, true) => self.add::<P, true, true, MT, NT>(acc, j),
            }
        }

        /// Adds the first of two groups to the accumulators, and if there is one the second, whose scales
        /// [`put_row_scales`] and [`put_column_scale`] stored: a product on tensor cores, all zeros but for a group's two
        /// scales, multiplies them, exactly. What is left for an output is a subtraction and an fma. The whole warp calls.
        #[inline(always)]
        #[track_caller]
        pub fn add_pair<P: Product, const MT: usize, const NT: usize>(
            &self,
            acc: &mut Accumulators<MT, NT>,
            both: bool,
        ) {
            const { assert!(GROUPS == 2 && MT == 2 && NT.is_multiple_of(2)) };
            let (g, t) = (thread::lane_id() / 4, thread::lane_id() % 4);
            // Group j is index j of the product's depth: the first word of the lanes t = 0 has both.
            let mut columns = [0; NT];
            let mut n = 0;
            while n < NT {
                let at = self.column + 8 * n as u32 + g;
                columns[n] = self.column_floats.cast::<u32>().ld(at);
                n += 1;
            }
            let U32x4(rows) = self.row_floats.cast::<U32x4>().ld(self.row / 4 + g);
            unroll!(J in 0..2 {
                if J == 0 || both {
                    let mut b = [P::B::default(); NT];
                    let mut n = 0;
                    while n < NT {
                        [b[n], b[n + 1]] = P::b(self.b, self.column + 8 * n as u32, J as u32);
                        n += 2;
                    }
                    let mask = if t == 0 { 0xffff << (16 * J) } else { 0 };
                    unroll!(M in 0..2 {
                        let a = P::a(self.a, self.row + 16 * M as u32, J as u32);
                        let scales = [rows[2 * M] & mask, rows[2 * M + 1] & mask];
                        let mut n = 0;
                        while n < NT {
                            let scale = mma::mma_f16_k8(scales, columns[n]);
                            let sums = P::whole(self.b, a, b[n]);
                            unroll!(E in 0..4 {
                                let sum = f32::from_bits(sums[E] as u32) - MAGIC;
                                acc[M][n][E] = math::fma(scale.0[E], sum, acc[M][n][E]);
                            });
                            n += 1;
                        }
                    });
                }
            });
        }

        /// [`Tile::add_group`], by what it needs to know of the format: for the host, which compiles it once for all.
        #[cfg_attr(target_arch = "nvptx64", inline(always))]
        #[track_caller]
        fn add<P: Product, const HALVED: bool, const OFFSET: bool, const MT: usize, const NT: usize>(
            &self,
            acc: &mut Accumulators<MT, NT>,
            j: u32,
        ) {
            const { assert!(MT.is_multiple_of(2) && NT.is_multiple_of(2) && ROWS.is_multiple_of(32)) };
            let (g, t) = (thread::lane_id() / 4, thread::lane_id() % 4);
            let n_scales = 1 + HALVED as usize;
            let row_planes = n_scales * (1 + OFFSET as usize);
            let column_planes = 1 + n_scales * OFFSET as usize;

            let mut b = [P::B::default(); NT];
            // Scale and offsets' values of each column pair.
            let mut columns = [[[0.0f32; 2]; NT]; 3];
            let mut n = 0;
            while n < NT {
                if n % 2 == 0 {
                    [b[n], b[n + 1]] = P::b(self.b, self.column + 8 * n as u32, j);
                }
                let mut plane = 0;
                while plane < column_planes {
                    let at = (plane * GROUPS * COLS) as u32 + j * COLS as u32 + self.column + 8 * n as u32;
                    columns[plane][n] = self.column_floats.cast::<F32x2>().ld(at / 2 + t).0;
                    plane += 1;
                }
                n += 1;
            }

            // Scales and offsets of four rows, for two tiles of 16.
            let mut rows = [[0.0f32; 4]; 4];
            let mut m = 0;
            while m < MT {
                if m % 2 == 0 {
                    let mut plane = 0;
                    while plane < row_planes {
                        let at = (plane * GROUPS * ROWS) as u32 + j * ROWS as u32 + self.row + 16 * m as u32;
                        rows[plane] = self.row_floats.cast::<F32x4>().ld(at / 4 + g).0;
                        plane += 1;
                    }
                }
                let a = P::a(self.a, self.row + 16 * m as u32, j);
                let mut n = 0;
                while n < NT {
                    let column = |plane: usize, c: usize| columns[plane][n][c];
                    let row = |plane: usize, r: usize| rows[plane][m % 2 * 2 + r];
                    let float = |sum: i32| f32::from_bits(sum as u32) - MAGIC;
                    let scaled = |acc: f32, plane: usize, r: usize, c: usize, sum: i32| {
                        math::fma(math::mul(row(plane, r), column(0, c)), float(sum), acc)
                    };
                    let out = &mut acc[m][n];
                    if HALVED {
                        let [first, second] = P::halves(self.b, a, b[n]);
                        unroll!(E in 0..4 {
                            out[E] = scaled(out[E], 0, E / 2, E % 2, first[E]);
                            out[E] = scaled(out[E], 1, E / 2, E % 2, second[E]);
                        });
                    } else {
                        let sums = P::whole(self.b, a, b[n]);
                        unroll!(E in 0..4 { out[E] = scaled(out[E], 0, E / 2, E % 2, sums[E]); });
                    }
                    if OFFSET {
                        unroll!(E in 0..4 {
                            out[E] = math::fma(row(n_scales, E / 2), column(1, E % 2), out[E]);
                            if HALVED {
                                out[E] = math::fma(row(n_scales + 1, E / 2), column(2, E % 2), out[E]);
                            }
                        });
                    }
                    n += 1;
                }
                m += 1;
            }
        }
    }
}
