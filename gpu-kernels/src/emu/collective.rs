//! What warp-wide operations compute, given all lanes' inputs.
//!
//! Fragment layouts are PTX's (see `device/mma.rs`): with `g = lane / 4`, `t = lane % 4`, a word of A or B holds
//! neighbours in k, and word `r` of A lies in row `g + 8 (r % 2)`, at k-step `t + 4 (r / 2)`.

use half::{bf16, f16};

use super::lane::Collective;

/// Inputs of a lane: a value and what goes with it, or the ten registers of a matrix product.
pub(super) type Input = [u32; 10];
/// Results of a lane.
pub(super) type Output = [u32; 4];

pub(super) fn execute(op: Collective, inputs: &[Input; 32]) -> [Output; 32] {
    let each = |f: &dyn Fn(usize) -> u32| core::array::from_fn(|lane| [f(lane), 0, 0, 0]);
    let mask = |f: &dyn Fn(usize) -> bool| (0..32).fold(0, |mask, lane| mask | (f(lane) as u32) << lane);
    match op {
        Collective::SyncWarp | Collective::SetMaxRegisters => [[0; 4]; 32],
        Collective::Wgmma(_) => unreachable!("an operation of four warps: see wgmma.rs"),
        Collective::Shuffle => each(&|lane| inputs[inputs[lane][1] as usize % 32][0]),
        Collective::Ballot => each(&|_| mask(&|other| inputs[other][0] != 0)),
        Collective::MatchAny => each(&|lane| mask(&|other| inputs[other][0] == inputs[lane][0])),
        // Input r of lane 8k + r is two words of row r of tile k at a time: see `lane::load_matrix`.
        Collective::LoadMatrix => {
            core::array::from_fn(|lane| core::array::from_fn(|tile| inputs[8 * tile + lane / 4][lane % 4]))
        }
        Collective::LoadMatrixTransposed => core::array::from_fn(|lane| {
            core::array::from_fn(|tile| {
                let column = lane / 4;
                let element = |row: usize| inputs[8 * tile + row][column / 2] >> (16 * (column % 2)) & 0xffff;
                element(2 * (lane % 4)) | element(2 * (lane % 4) + 1) << 16
            })
        }),
        Collective::MmaF16 => float_mma(inputs, |bits| f16::from_bits(bits).to_f32()),
        Collective::MmaBf16 => float_mma(inputs, |bits| bf16::from_bits(bits).to_f32()),
        Collective::MmaS8 => {
            let bytes = |word: u32| word.to_le_bytes().map(|byte| byte as i8);
            let mut a = [[0i8; 32]; 16];
            let mut b = [[0i8; 32]; 8];
            for (lane, input) in inputs.iter().enumerate() {
                let (g, t) = (lane / 4, lane % 4);
                for r in 0..4 {
                    a[g + 8 * (r % 2)][4 * t + 16 * (r / 2)..][..4].copy_from_slice(&bytes(input[r]));
                }
                for r in 0..2 {
                    b[g][4 * t + 16 * r..][..4].copy_from_slice(&bytes(input[4 + r]));
                }
            }
            accumulators(inputs, |row, col, c| {
                let products = a[row].iter().zip(&b[col]).map(|(&a, &b)| i32::from(a) * i32::from(b));
                (c as i32).wrapping_add(products.sum()) as u32
            })
        }
    }
}

/// m16n8k16 on 16-bit floats; products and sums in f64, rounded once: at least as exact as the hardware.
fn float_mma(inputs: &[Input; 32], value: impl Fn(u16) -> f32) -> [Output; 32] {
    let mut a = [[0.0f32; 16]; 16];
    let mut b = [[0.0f32; 16]; 8];
    for (lane, input) in inputs.iter().enumerate() {
        let (g, t) = (lane / 4, lane % 4);
        let pair = |word: u32| [value(word as u16), value((word >> 16) as u16)];
        for r in 0..4 {
            a[g + 8 * (r % 2)][2 * t + 8 * (r / 2)..][..2].copy_from_slice(&pair(input[r]));
        }
        for r in 0..2 {
            b[g][2 * t + 8 * r..][..2].copy_from_slice(&pair(input[4 + r]));
        }
    }
    accumulators(inputs, |row, col, c| {
        let products = a[row].iter().zip(&b[col]).map(|(&a, &b)| f64::from(a) * f64::from(b));
        ((f64::from(f32::from_bits(c)) + products.sum::<f64>()) as f32).to_bits()
    })
}

/// Each lane's four elements of D, from its four of C.
fn accumulators(inputs: &[Input; 32], element: impl Fn(usize, usize, u32) -> u32) -> [Output; 32] {
    core::array::from_fn(|lane| {
        core::array::from_fn(|r| element(lane / 4 + 8 * (r / 2), 2 * (lane % 4) + r % 2, inputs[lane][6 + r]))
    })
}
