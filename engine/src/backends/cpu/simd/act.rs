//! Activations as products take them: quantised for the integer kernels, rounded to halves for weights of halves.
//!
//! Tokens are cut into tiles of up to [`tile_max`] tokens; within a tile, cells lie `[group][token]`, so a kernel walks
//! one stream. A cell is one cache line: what [`quant::ActGroup`] holds, plus the products that kernels would repeat.

use bytemuck::{Pod, Zeroable};
use quant::act::SUPER_BLOCK;
use quant::format::GROUP;
use quant::{ActKind, BlockFormat, FloatFormat, FormatId, Visitor, bits, with_format};

use super::operands::Rows;
use super::vector::{Simd, SimdOp};

/// 32 activations of one token.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub(super) struct Cell {
    pub q: [i8; GROUP],
    /// Scale.
    pub d: f32,
    /// Sum of all `q`.
    pub sum: i32,
    /// What a group's offset multiplies: `d · sum`, rounded by [`ActKind::Q8_1`].
    pub d_sum: f32,
    /// Sums of `q[0..16]` and `q[16..32]`.
    pub half_sums: [i32; 2],
    /// `d · half_sums`.
    pub half_d_sums: [f32; 2],
    pad: u32,
}

const _: () = assert!(size_of::<Cell>() == 64);

/// Tokens of the largest tile: as many as there are registers for.
pub(super) const fn tile_max<S: Simd>() -> usize {
    if S::WIDE { 8 } else { 2 }
}

/// Cuts `n` tokens into tiles of 8, 4, 2 or 1, at most `max`: yields (first, tokens).
///
/// An iterator and not a function that takes a closure: a closure may be compiled on its own, without the features.
pub(super) struct Tiles {
    first: usize,
    n: usize,
    max: usize,
}

impl Tiles {
    #[inline(always)]
    pub fn new(n: usize, max: usize) -> Tiles {
        Tiles { first: 0, n, max }
    }
}

impl Iterator for Tiles {
    type Item = (usize, usize);
    #[inline(always)]
    fn next(&mut self) -> Option<(usize, usize)> {
        let (first, left) = (self.first, self.n - self.first);
        if left == 0 {
            return None;
        }
        let tokens = if left >= self.max { self.max } else { 1 << left.ilog2() };
        self.first += tokens;
        Some((first, tokens))
    }
}

/// The form in which a product with weights of some format takes activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// As they are.
    F32,
    /// Rounded to f16.
    F16,
    /// Rounded to bf16.
    Bf16,
    /// Quantised.
    Block(ActKind),
}

impl Form {
    /// All forms.
    pub const ALL: [Form; 6] = [
        Form::F32,
        Form::F16,
        Form::Bf16,
        Form::Block(ActKind::Q8_0),
        Form::Block(ActKind::Q8_1),
        Form::Block(ActKind::Q8K),
    ];

    /// The form for a format; `None` if it holds no weights.
    pub fn of(format: FormatId) -> Option<Form> {
        struct Of;
        impl Visitor for Of {
            type Output = Form;
            fn block<F: BlockFormat>(self) -> Form {
                Form::Block(F::ACT)
            }
            fn float<F: FloatFormat>(self) -> Form {
                match F::ID {
                    FormatId::F16 => Form::F16,
                    FormatId::BF16 => Form::Bf16,
                    _ => Form::F32,
                }
            }
        }
        with_format(format, Of)
    }

    /// Whether the integer kernels take it.
    pub fn is_block(self) -> bool {
        matches!(self, Form::Block(_))
    }
}

/// Rounds `x` to halves: `out` holds the rounded values as f32.
pub(super) struct Round<'a> {
    pub form: Form,
    pub x: &'a [f32],
    pub out: &'a mut [f32],
}

impl SimdOp for Round<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if self.form == Form::Bf16 {
            for (x, out) in self.x.iter().zip(self.out) {
                *out = bits::bf16_to_f32(bits::f32_to_bf16(*x));
            }
            return;
        }
        let (x, x_rest) = self.x.as_chunks::<16>();
        let (out, out_rest) = self.out.as_chunks_mut::<16>();
        for (x, out) in x.iter().zip(out) {
            s.store(round_f16(s, s.load(x)), out);
        }
        for (x, out) in x_rest.iter().zip(out_rest) {
            *out = bits::f16_to_f32(bits::f32_to_f16(*x));
        }
    }
}

/// Each lane rounded to f16.
#[inline(always)]
fn round_f16<S: Simd>(s: S, x: S::F) -> S::F {
    let mut halves = [0u8; 32];
    // SAFETY: `halves` is 32 writable, then readable bytes.
    unsafe {
        s.store_f16(x, halves.as_mut_ptr());
        s.load_f16(halves.as_ptr())
    }
}

/// Quantises tokens `first..first + tokens` of `rows`, tile by tile, into their cells.
pub(super) struct Quantise<'a> {
    pub kind: ActKind,
    pub rows: Rows<'a>,
    pub first: usize,
    pub tokens: usize,
    /// The cells of exactly these tokens.
    pub cells: &'a mut [Cell],
}

impl SimdOp for Quantise<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let groups = self.rows.k / GROUP;
        for (first, n) in Tiles::new(self.tokens, tile_max::<S>()) {
            let cells = &mut self.cells[first * groups..][..n * groups];
            for t in 0..n {
                let x = self.rows.x(self.first + first + t);
                match self.kind {
                    ActKind::Q8_0 | ActKind::Q8_1 => {
                        let (x, _) = x.as_chunks::<GROUP>();
                        for (x, cells) in x.iter().zip(cells.chunks_exact_mut(n)) {
                            quantise_group(s, x, self.kind == ActKind::Q8_1, &mut cells[t]);
                        }
                    }
                    ActKind::Q8K => {
                        let (x, _) = x.as_chunks::<SUPER_BLOCK>();
                        for (x, cells) in x.iter().zip(cells.chunks_exact_mut(n * SUPER_BLOCK / GROUP)) {
                            quantise_super_block(s, x, n, t, cells);
                        }
                    }
                }
            }
        }
    }
}

/// As [`quant::ActGroup::quantise`] with [`ActKind::Q8_0`] or, with `round_sum`, [`ActKind::Q8_1`].
#[inline(always)]
fn quantise_group<S: Simd>(s: S, x: &[f32; GROUP], round_sum: bool, cell: &mut Cell) {
    let (halves, _) = x.as_chunks::<16>();
    let zero = s.splat(0.0);
    let x = [s.load(&halves[0]), s.load(&halves[1])];
    // NaN compares false, so it loses against zero.
    let amax = s.max(s.max(s.abs(x[0]), zero), s.max(s.abs(x[1]), zero));
    let d = s.reduce_max(amax) / 127.0;
    let id = s.splat(if d != 0.0 { 1.0 / d } else { 0.0 });
    fill(s, [code(s, x[0], id), code(s, x[1], id)], cell);
    // Both numbers that ggml keeps as halves, rounded at once.
    let mut pair = [0.0; 16];
    (pair[0], pair[1]) = (d, d * cell.sum as f32);
    let rounded = round_f16(s, s.load(&pair));
    s.store(rounded, &mut pair);
    scale(pair[0], cell);
    if round_sum {
        cell.d_sum = pair[1];
    }
}

/// As [`quant::ActGroup::quantise`] with [`ActKind::Q8K`], into cells `t`, `t + n`, …
#[inline(always)]
fn quantise_super_block<S: Simd>(s: S, x: &[f32; SUPER_BLOCK], n: usize, t: usize, cells: &mut [Cell]) {
    let (lanes, _) = x.as_chunks::<16>();
    let zero = s.splat(0.0);
    let mut amax = zero;
    for x in lanes {
        amax = s.max(s.abs(s.load(x)), amax);
    }
    let amax = s.reduce_max(amax);
    // The first value of that magnitude gives the sign.
    let max = x.iter().copied().find(|x| x.abs() == amax).unwrap_or(0.0);
    let inverse = if max != 0.0 { -127.0 / max } else { 0.0 };
    let d = if max != 0.0 { 1.0 / inverse } else { 0.0 };
    let factor = s.splat(inverse);
    for (x, cells) in lanes.chunks_exact(2).zip(cells.chunks_exact_mut(n)) {
        fill(s, [code_even(s, s.load(&x[0]), factor), code_even(s, s.load(&x[1]), factor)], &mut cells[t]);
        scale(d, &mut cells[t]);
    }
}

/// Codes and their sums.
#[inline(always)]
fn fill<S: Simd>(s: S, codes: [S::F; 2], cell: &mut Cell) {
    let (q, _) = cell.q.as_chunks_mut::<16>();
    s.to_i8(codes[0], &mut q[0]);
    s.to_i8(codes[1], &mut q[1]);
    let sums = s.reduce_add4([codes[0], codes[1], codes[0], codes[1]]);
    cell.half_sums = [sums[0] as i32, sums[1] as i32];
    cell.sum = cell.half_sums[0] + cell.half_sums[1];
}

/// The scale and its products with the sums.
#[inline(always)]
fn scale(d: f32, cell: &mut Cell) {
    cell.d = d;
    cell.half_d_sums = [d * cell.half_sums[0] as f32, d * cell.half_sums[1] as f32];
    cell.d_sum = d * cell.sum as f32;
}

/// Nearest integer of `x · factor`, ties to even; infinity to ±127 and NaN to 0.
#[inline(always)]
fn code_even<S: Simd>(s: S, x: S::F, factor: S::F) -> S::F {
    let rounded = s.round(s.mul(x, factor));
    let bounded = s.max(s.min(rounded, s.splat(127.0)), s.splat(-127.0));
    s.select_lt(s.splat(-1.0), s.abs(rounded), bounded, s.splat(0.0))
}

/// Nearest integer of `x · id`, half away from zero; infinity to ±127 and NaN to 0.
#[inline(always)]
fn code<S: Simd>(s: S, x: S::F, id: S::F) -> S::F {
    let scaled = s.mul(x, id);
    let magnitude = s.abs(scaled);
    let whole = s.trunc(magnitude);
    let up = s.add(whole, s.splat(1.0));
    let rounded = s.select_lt(s.sub(magnitude, whole), s.splat(0.5), whole, up);
    s.copysign(s.max(s.min(s.splat(127.0), rounded), s.splat(0.0)), scaled)
}
