//! A span's products: groups summed by `wgmma` while the sums of the group before are scaled and added.

use quant::BlockFormat;

use super::gpu::{PLANE, Warpgroup};
use super::*;
use crate::device::mma::FragmentA;
use crate::device::wgmma::{self, F16N32, Operand, Registers, S8N32, S8N64, Sums};
use crate::device::{F32x2, F32x4, Smem, math, thread};
use crate::kernels::mmq::groups_of;

/// Columns whose sums are scaled at a time.
const HALF: u32 = 32;

/// Products per group: one, or one for each half.
const fn steps<F: BlockFormat>() -> u32 {
    1 + halved::<F>() as u32
}

/// A warpgroup's sums of a group of 64 rows, of all columns.
pub(super) trait Products: Registers + Copy {
    fn zero() -> Self;
    fn start(&mut self, a: Operand, b: Operand);
    fn sum(&self, i: usize) -> f32;
}

macro_rules! products {
    ($r:literal, $shape:ident) => {
        impl Products for Sums<$r> {
            #[inline(always)]
            fn zero() -> Self {
                Sums::zero()
            }

            #[inline(always)]
            #[track_caller]
            fn start(&mut self, a: Operand, b: Operand) {
                $shape::shared::<false>(self, a, b);
            }

            #[inline(always)]
            #[track_caller]
            fn sum(&self, i: usize) -> f32 {
                self.get(i) as i32 as f32
            }
        }
    };
}
products!(16, S8N32);
products!(32, S8N64);

/// [`Form`] with the sums of a warpgroup.
pub(super) trait Summed: Form {
    type Sums: Products;
}
impl Summed for Few {
    type Sums = Sums<16>;
}
impl Summed for Many {
    type Sums = Sums<32>;
}

/// Where a span's operands are.
#[derive(Clone, Copy)]
struct At {
    /// The first group's codes.
    a: Operand,
    b: Operand,
    /// For tensor cores: scales of the columns, and of the thread's two rows those of the groups that are its.
    column_scales: Operand,
    row_scales: [u32; 2],
    /// Else floats of the thread's rows, and of its first columns.
    rows: Smem<F32x2>,
    columns: Smem<F32x4>,
    /// First group.
    j: u32,
}

/// Floats of the thread's rows and, of 32 columns, of its own.
struct Floats {
    rows: [[f32; 2]; 4],
    columns: [[[f32; 4]; 2]; 3],
}

impl<F: BlockFormat + Tiled, C: Summed> Warpgroup<'_, F, C> {
    /// Starts the sums of step `step` from the place on: a group, or one half of it.
    #[inline(always)]
    #[track_caller]
    fn start_sums(&self, sums: &mut C::Sums, at: &At, step: u32) {
        let (j, half) = (at.j + step / steps::<F>(), step % steps::<F>());
        let a = if halved::<F>() {
            let codes = self.a() + 2 * j * PLANE;
            let zeros = const { [layout::<F, C>().zeros_before / 16, layout::<F, C>().zeros_after / 16] };
            let (first, second) = if half == 0 { (codes, zeros[1]) } else { (zeros[0], codes + PLANE) };
            Operand::planes(Self::operands(), first, second - first)
        } else {
            at.a.step(2 * j * PLANE)
        };
        sums.start(a, at.b.step(j / 4 * Self::PANEL + j % 4 * 2));
        wgmma::commit();
    }

    /// What of the rows' scales products of group `step` from the place on take. Made before the fence: registers that are
    /// written behind it ptxas would have to fence again.
    #[inline(always)]
    fn row_scales(at: &At, step: u32) -> FragmentA {
        let j = at.j + step;
        let mask = if thread::lane_id() % 4 == j / 2 { 0xffff << (16 * (j % 2)) } else { 0 };
        let [first, second] = at.row_scales;
        FragmentA([first & mask, second & mask, 0, 0].map(math::fresh))
    }

    /// Starts the products of the scales of a group with half of the columns.
    #[inline(always)]
    #[track_caller]
    fn start_scales(scales: &mut Sums<16>, at: &At, rows: FragmentA, half: u32) {
        F16N32::registers::<false>(scales, rows, at.column_scales.step(HALF * half));
        wgmma::commit();
    }

    /// The floats of a step for half of the columns.
    #[inline(always)]
    #[track_caller]
    fn floats(&self, at: &At, step: u32, half: u32) -> Floats {
        let (j, step) = (at.j + step / steps::<F>(), step % steps::<F>());
        let mut floats = Floats { rows: [[0.0; 2]; 4], columns: [[[0.0; 4]; 2]; 3] };
        let row = |plane: u32| at.rows.ld((plane * SPAN_GROUPS as u32 + j) * (TILE_ROWS as u32 / 2)).0;
        let stride = const { column_stride::<C>() as u32 / 4 };
        let column = |plane: u32| {
            let first = (plane * SPAN_GROUPS as u32 + j) * stride + half * (HALF / 4);
            [at.columns.ld(first).0, at.columns.ld(first + 4).0]
        };
        floats.rows[0] = row(step);
        floats.columns[0] = column(0);
        if F::HAS_OFFSET && step + 1 == steps::<F>() {
            floats.rows[2] = row(steps::<F>());
            floats.columns[1] = column(1);
            if halved::<F>() {
                floats.rows[3] = row(steps::<F>() + 1);
                floats.columns[2] = column(2);
            }
        }
        floats
    }

    /// Scales the sums of a step with half of the columns and adds them.
    #[inline(always)]
    #[track_caller]
    fn fold(acc: &mut [f32; 16], sums: &C::Sums, scales: &Sums<16>, floats: &Floats, step: u32, half: usize) {
        let with_offset = F::HAS_OFFSET && step % steps::<F>() + 1 == steps::<F>();
        let Floats { rows, columns } = floats;
        unroll!(Q in 0..2 { unroll!(E in 0..8 {
            let (r, c) = (E / 2 % 2, E / 4 * 2 + E % 2);
            let scale = if const { has_exact_scales::<F>() } {
                f32::from_bits(scales.get(8 * Q + E))
            } else {
                math::mul(rows[0][r], columns[0][Q][c])
            };
            let out = &mut acc[8 * Q + E];
            *out = math::fma(scale, sums.sum(16 * half + 8 * Q + E), *out);
            if with_offset {
                *out = math::fma(rows[2][r], columns[1][Q][c], *out);
                if halved::<F>() {
                    *out = math::fma(rows[3][r], columns[2][Q][c], *out);
                }
            }
        }); });
    }

    /// Adds the products of `STEPS` steps. While those of one step are scaled and added, the tensor cores sum the next
    /// one's; no product is under way at the end, since ptxas follows them through straight code only.
    #[inline(always)]
    #[track_caller]
    fn add_products<const STEPS: usize>(&self, acc: &mut [[f32; 16]; 2], at: &At) {
        let exact = const { has_exact_scales::<F>() };
        let halves = const { (C::COLS / HALF) as usize };
        let mut sums = [C::Sums::zero(); 2];
        let mut scales = [Sums::<16>::zero(); 2];
        let rows = if exact { Self::row_scales(at, 0) } else { FragmentA([0; 4]) };
        wgmma::fence();
        self.start_sums(&mut sums[0], at, 0);
        if exact {
            Self::start_scales(&mut scales[0], at, rows, 0);
        }
        unroll!(S in 0..8 {
            if S < STEPS {
                unroll!(H in 0..2 {
                    if H < halves {
                        let unit = S * halves + H;
                        let (mut under_way, next) = (0, unit + 1);
                        let (step, half) = ((next / halves) as u32, (next % halves) as u32);
                        let more = next < STEPS * halves;
                        let rows = if exact && more { Self::row_scales(at, step) } else { FragmentA([0; 4]) };
                        if exact && more || S + 1 < STEPS && H == 0 {
                            wgmma::fence();
                        }
                        if exact && more {
                            Self::start_scales(&mut scales[next % 2], at, rows, half);
                            under_way += 1;
                        }
                        if S + 1 < STEPS {
                            if H == 0 {
                                self.start_sums(&mut sums[(S + 1) % 2], at, S as u32 + 1);
                            }
                            under_way += 1;
                        }
                        let floats = if exact {
                            Floats { rows: [[0.0; 2]; 4], columns: [[[0.0; 4]; 2]; 3] }
                        } else {
                            self.floats(at, S as u32, H as u32)
                        };
                        // What has been started last is under way still.
                        if H == 0 {
                            wait(&mut sums[S % 2], under_way);
                        }
                        if exact {
                            wait(&mut scales[unit % 2], under_way);
                        }
                        Self::fold(&mut acc[H], &sums[S % 2], &scales[unit % 2], &floats, S as u32, H);
                    }
                });
            }
        });
    }

    /// The sums of a span.
    #[inline(always)]
    #[track_caller]
    pub(super) fn multiply(&self, span: u32, stage: u32) -> [[f32; 16]; 2] {
        let (lane, warp) = (thread::lane_id(), self.thread() / 32);
        // Of 32 rows, those eight apart are neighbours.
        let row = (warp / 2 * 32 + lane / 4 * 4 + warp % 2 * 2) / 2;
        let mut at = At {
            a: Operand::planes(Self::operands(), self.a(), PLANE),
            b: Operand::at(Self::operands(), self.stage(stage)),
            column_scales: Operand::NONE,
            row_scales: [0; 2],
            rows: self.row_floats().cast::<F32x2>().skip(row),
            columns: self.column_floats().cast::<F32x4>().skip(lane % 4),
            j: 0,
        };
        if const { has_exact_scales::<F>() } {
            let columns = const { float_bytes::<F, C>()[1] };
            let scales = const { layout::<F, C>().column_floats / 16 } + self.id() * (columns / 16);
            let zeros = const { layout::<F, C>().zeros_after / 16 };
            at.column_scales = Operand::planes(Self::operands(), scales, zeros - scales);
            let of_rows = self.row_floats().cast::<u32>().skip(lane % 4);
            let row = 16 * warp + lane / 4;
            at.row_scales = [of_rows.ld(4 * row), of_rows.ld(4 * (row + 8))];
        }
        let mut acc = [[0.0f32; 16]; 2];
        let there = groups_of(span, self.launch.shape.n_groups);
        if there == SPAN_GROUPS as u32 {
            while at.j < SPAN_GROUPS as u32 {
                self.add_products::<8>(&mut acc, &at);
                at.j += 8 / steps::<F>();
            }
        } else {
            while at.j < there {
                if halved::<F>() {
                    self.add_products::<2>(&mut acc, &at);
                } else {
                    self.add_products::<1>(&mut acc, &at);
                }
                at.j += 1;
            }
        }
        acc
    }
}

/// Waits for products while `under_way` groups that were started later are under way.
#[inline(always)]
#[track_caller]
fn wait<S: Registers>(sums: &mut S, under_way: u32) {
    match under_way {
        0 => sums.wait::<0>(),
        1 => sums.wait::<1>(),
        _ => sums.wait::<2>(),
    }
}
