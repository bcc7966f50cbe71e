//! The numeric contract of products with float weights: every output has the bits of a sum per span of 256 weights, spans
//! added in order, whatever the number of columns, the kernel, its tiles or the grid.

use gpu_kernels::case::{Random, bytes_of};
use gpu_kernels::driver::{DeviceInfo, Driver, MemKind, StreamId};
use gpu_kernels::emu::{Emulator, Options};
use gpu_kernels::kernels::mmvf::Activations;
use gpu_kernels::kernels::product::Matrix;
use gpu_kernels::kernels::{mmf, mmf32, mmvf, round_act};
use gpu_kernels::launch::{DevicePtr, Launch};
use gpu_kernels::tile::{self, SPAN};
use half::{bf16, f16};
use quant::FormatId;

const N_ROWS: usize = 40;
/// More spans than a CTA has warps, and a short one that ends within 16.
const K: usize = 9 * SPAN + 84;
const N_COLS: usize = 70;

fn upload(emulator: &Emulator, bytes: &[u8]) -> DevicePtr {
    let at = emulator.alloc(MemKind::Device, bytes.len() as u64).unwrap();
    emulator.write(at, bytes, StreamId::DEFAULT).unwrap();
    at
}

/// Weights as a file holds them, and the exact values of weights and activations that a product sees.
fn operands(format: FormatId, random: &mut Random) -> (Vec<u8>, Vec<f32>, Vec<f32>, Vec<f32>) {
    let round = |v: f32| match format {
        FormatId::F16 => f16::from_f32(v).to_f32(),
        FormatId::BF16 => bf16::from_f32(v).to_f32(),
        _ => v,
    };
    let w: Vec<f32> = random.values(N_ROWS * K).into_iter().map(round).collect();
    let raw = match format {
        FormatId::F16 => bytes_of(&w.iter().map(|&v| f16::from_f32(v)).collect::<Vec<_>>()),
        FormatId::BF16 => bytes_of(&w.iter().map(|&v| bf16::from_f32(v)).collect::<Vec<_>>()),
        _ => bytes_of(&w),
    };
    let x = random.values(N_COLS * K);
    let rounded = x.iter().copied().map(round).collect();
    (raw, w, x, rounded)
}

/// Bits [column][row]: of a span `chain` gives the sum.
fn expected(w: &[f32], x: &[f32], chain: impl Fn(&[f32], &[f32]) -> f32) -> Vec<u32> {
    let product = |w: &[f32], x: &[f32]| {
        let spans = w.chunks(SPAN).zip(x.chunks(SPAN)).map(|(w, x)| chain(w, x));
        spans.fold(0.0f32, |total, span| total + span).to_bits()
    };
    x.chunks(K).flat_map(|x| w.chunks(K).map(move |w| (w, x))).map(|(w, x)| product(w, x)).collect()
}

/// Runs launches and compares the columns from `first` on.
fn check(
    emulator: &Emulator,
    what: &str,
    launches: &[Launch],
    y: DevicePtr,
    expected: &[u32],
    columns: std::ops::Range<usize>,
) {
    let n = columns.len() * N_ROWS;
    emulator.fill(y, 0xff, 4 * n as u64, StreamId::DEFAULT).unwrap();
    for launch in launches {
        emulator.launch(Emulator::MODULE, launch, StreamId::DEFAULT).unwrap();
    }
    let mut bytes = vec![0; 4 * n];
    emulator.read(&mut bytes, y, StreamId::DEFAULT).unwrap();
    let got: Vec<u32> = bytes.as_chunks::<4>().0.iter().map(|&b| u32::from_le_bytes(b)).collect();
    let expected = &expected[columns.start * N_ROWS..columns.end * N_ROWS];
    if let Some(i) = (0..n).find(|&i| got[i] != expected[i]) {
        let (got, expected) = (f32::from_bits(got[i]), f32::from_bits(expected[i]));
        panic!("{what}: column {}, row {}: {got}, expected {expected}", i / N_ROWS, i % N_ROWS);
    }
}

/// As the emulator's tensor cores do: 16 products and the sum so far, rounded once.
fn tensor_core_chain(w: &[f32], x: &[f32]) -> f32 {
    let step = |sum: f32, (w, x): (&[f32], &[f32])| {
        let products = w.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x));
        (f64::from(sum) + products.sum::<f64>()) as f32
    };
    w.chunks(16).zip(x.chunks(16)).fold(0.0, step)
}

#[test]
fn few_columns_and_many_give_equal_bits() {
    for format in [FormatId::F16, FormatId::BF16] {
        let mut random = Random::new(3);
        let (raw, w, x, rounded) = operands(format, &mut random);
        let expected = expected(&w, &rounded, tensor_core_chain);
        let emulator = Emulator::new(Options::default());
        let w = upload(&emulator, &tile::pack(format, &raw, N_ROWS, K));
        let x = upload(&emulator, &bytes_of(&x));
        let tiles = upload(&emulator, &vec![0xff; round_act::tiles_bytes(N_COLS, K)]);
        let y = upload(&emulator, &vec![0xff; 4 * N_COLS * N_ROWS]);
        let parts = [Matrix { w, bias: DevicePtr::NULL, residual: DevicePtr::NULL, y, n_rows: N_ROWS }];
        let column = |first: usize| x.offset(4 * (first * K) as u64);
        let round = |first: usize, n_cols: usize| {
            let args = round_act::Args { format, x: column(first), tiles, n_cols, k: K, mixture: None };
            round_act::launch(&args).unwrap()
        };
        let few = |x: Activations, n_cols: usize| {
            let args = mmvf::Args { format, parts: &parts, glu: None, x, k: K, n_cols, mixture: None };
            mmvf::launch(&args).unwrap()
        };
        for (first, n_cols) in [(0, 1), (3, 3), (61, 8)] {
            let launches = [few(Activations::Plain(column(first)), n_cols)];
            let what = format!("{format}, {n_cols} plain columns");
            check(&emulator, &what, &launches, y, &expected, first..first + n_cols);
        }
        for (first, n_cols) in [(69, 1), (2, 8), (5, 9), (20, 32)] {
            let launches = [round(first, n_cols), few(Activations::Tiles(tiles), n_cols)];
            let what = format!("{format}, {n_cols} columns of tiles");
            check(&emulator, &what, &launches, y, &expected, first..first + n_cols);
        }
        // Small tiles and large ones, with every number of stages; Hopper's.
        let devices =
            [(80, 1000, 32_768), (80, 1000, 49_152), (80, 1000, 232_448), (80, 1, 232_448), (90, 1, 232_448)];
        for (sm, n_sm, smem_per_cta_bytes) in devices {
            let device =
                DeviceInfo { sm, n_sm, smem_per_cta_bytes, driver_version: 12_080, ..DeviceInfo::default() };
            let args = mmf::Args {
                format,
                parts: &parts,
                glu: None,
                x: tiles,
                k: K,
                n_cols: N_COLS,
                mixture: None,
                device: &device,
            };
            let launches = [round(0, N_COLS), mmf::launch(&args).unwrap()];
            let what = format!("{format}, tiles for {n_sm} SMs (sm_{sm}) of {smem_per_cta_bytes} bytes");
            check(&emulator, &what, &launches, y, &expected, 0..N_COLS);
        }
    }
}

#[test]
fn f32_products_are_chains_of_fma() {
    let mut random = Random::new(4);
    let (raw, w, x, _) = operands(FormatId::F32, &mut random);
    let chain = |w: &[f32], x: &[f32]| w.iter().zip(x).fold(0.0f32, |sum, (&w, &x)| w.mul_add(x, sum));
    let expected = expected(&w, &x, chain);
    let emulator = Emulator::new(Options::default());
    let w = upload(&emulator, &tile::pack(FormatId::F32, &raw, N_ROWS, K));
    let x = upload(&emulator, &bytes_of(&x));
    let y = upload(&emulator, &vec![0xff; 4 * N_COLS * N_ROWS]);
    let parts = [Matrix { w, bias: DevicePtr::NULL, residual: DevicePtr::NULL, y, n_rows: N_ROWS }];
    for (first, n_cols) in [(1, 1), (60, 8), (9, 9), (0, N_COLS)] {
        let x = x.offset(4 * (first * K) as u64);
        let args = mmf32::Args { parts: &parts, glu: None, x, k: K, n_cols, mixture: None };
        let launches = [mmf32::launch(&args).unwrap()];
        check(&emulator, &format!("{n_cols} columns"), &launches, y, &expected, first..first + n_cols);
    }
}
