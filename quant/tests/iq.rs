//! The IQ formats: codebooks against gguf's, and what must hold for any input. (`golden.rs` compares the bytes with
//! llama.cpp's.)

use std::fmt::Write as _;

use proptest::prelude::*;
use quant::format::{Encode, GROUP};
use quant::{BlockFormat, FloatFormat, FormatId, QuantError, Visitor, codebook, row, with_format};
use sha2::{Digest, Sha256};

/// Row length.
const COLS: usize = 512;

/// Each format, whether it can be encoded without importance, and its relative RMS error on normally distributed
/// weights.
const FORMATS: [(FormatId, bool, f64); 9] = [
    (FormatId::IQ4_NL, true, 0.077),
    (FormatId::IQ4_XS, true, 0.077),
    (FormatId::IQ3_XXS, true, 0.216),
    (FormatId::IQ3_S, true, 0.166),
    (FormatId::IQ2_XXS, false, 0.372),
    (FormatId::IQ2_XS, false, 0.327),
    (FormatId::IQ2_S, true, 0.267),
    (FormatId::IQ1_S, false, 0.523),
    (FormatId::IQ1_M, true, 0.575),
];

/// [`FORMATS`]; under Miri without those that have a codebook, whose neighbours it takes minutes to hours to list.
fn formats() -> impl Iterator<Item = (FormatId, bool, f64)> {
    let slow =
        |format: FormatId| ["IQ1", "IQ2", "IQ3"].iter().any(|family| format.name().starts_with(family));
    FORMATS.into_iter().filter(move |(format, ..)| !cfg!(miri) || !slow(*format))
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold(String::new(), |mut hex, byte| {
        write!(hex, "{byte:02x}").unwrap();
        hex
    })
}

fn encode(format: FormatId, weights: &[f32], cols: usize, importance: Option<&[f32]>) -> Vec<u8> {
    let row_bytes = row::row_bytes(format, cols).unwrap();
    let mut out = vec![0xaa; weights.len() / cols * row_bytes];
    for (x, out) in weights.chunks_exact(cols).zip(out.chunks_exact_mut(row_bytes)) {
        row::encode(format, x, importance, out).unwrap();
    }
    out
}

fn decode(format: FormatId, bytes: &[u8], cols: usize) -> Vec<f32> {
    let row_bytes = row::row_bytes(format, cols).unwrap();
    let mut out = vec![f32::NAN; bytes.len() / row_bytes * cols];
    for (bytes, out) in bytes.chunks_exact(row_bytes).zip(out.chunks_exact_mut(cols)) {
        row::decode(format, bytes, out).unwrap();
    }
    out
}

fn rms(x: impl Iterator<Item = f64>) -> f64 {
    x.map(|v| v * v).sum::<f64>().sqrt()
}

/// The tables as gguf's quants.py expands its `grid_hex`, one signed byte per coordinate, entry after entry.
#[test]
fn codebooks_are_those_of_gguf() {
    let octets = |table: &[u64]| table.iter().flat_map(|e| e.to_le_bytes()).collect::<Vec<u8>>();
    let quads = |table: &[u32]| table.iter().flat_map(|e| e.to_le_bytes()).collect::<Vec<u8>>();
    let ternary: Vec<u8> = codebook::IQ1
        .iter()
        .flat_map(|e| {
            let bytes = e.to_le_bytes();
            let (low, high) =
                (bytes.map(|b| (b & 0xf).wrapping_sub(1)), bytes.map(|b| (b >> 4).wrapping_sub(1)));
            low.into_iter().chain(high)
        })
        .collect();
    let tables = [
        (
            "IQ2_XXS",
            octets(codebook::IQ2_XXS),
            "05826b5d3e472a3a78f196be62ac78acf81df0f909626e12ab9fa2a5d490dd54",
        ),
        (
            "IQ2_XS",
            octets(codebook::IQ2_XS),
            "06e47aaca60b4dc1d9b5a3f34540437058a6b142b4d7a59d5ded769b4d1bf1de",
        ),
        (
            "IQ2_S",
            octets(codebook::IQ2_S),
            "e1aa1473412b0552c2174c30ef22ab4073f6a181b85a17056e8249bd2932fd88",
        ),
        (
            "IQ3_XXS",
            quads(codebook::IQ3_XXS),
            "46e35f5a997efdee6c99ce57854c8a0d4f0ff8ca57e5e8a60c0793ea580acf5d",
        ),
        ("IQ3_S", quads(codebook::IQ3_S), "bd1af4945a1717c65610b0284e4628b9a1ba3b306fae3a06f6e5f597356e349f"),
        ("IQ1", ternary, "07540ffc1aeaf6ad4d97e96b0fcc765aae39671d4ae4a27bbd0e796fde167c6a"),
    ];
    for (name, bytes, expected) in tables {
        assert_eq!(digest(&bytes), expected, "{name}");
    }
}

/// Threads that encode first at the same time compute the candidate lists side by side; all must see whole ones.
#[test]
fn first_use_from_many_threads() {
    let (x, importance) = rows(1);
    let encode_all =
        || -> Vec<_> { formats().map(|(format, ..)| encode(format, &x, COLS, Some(&importance))).collect() };
    const THREADS: usize = if cfg!(miri) { 2 } else { 8 };
    let start = std::sync::Barrier::new(THREADS);
    let results: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|_| {
                scope.spawn(|| {
                    start.wait();
                    encode_all()
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let alone = encode_all();
    for result in results {
        assert_eq!(result, alone);
    }
}

#[test]
fn formats_that_need_importance_say_so() {
    for (format, plain, _) in formats() {
        let mut out = vec![0; row::row_bytes(format, COLS).unwrap()];
        let result = row::encode(format, &[0.5; COLS], None, &mut out);
        assert_eq!(result, if plain { Ok(()) } else { Err(QuantError::NeedsImportance { format }) });
    }
}

/// Values at the edges of f32, each throughout a row and among ordinary ones: no panic, and rows of zeros come back as
/// zeros.
#[test]
fn extreme_rows_encode_without_panic() {
    let extremes =
        [0.0, -0.0, f32::MIN_POSITIVE, 1e-45, 1e-20, 1e-9, 1e20, f32::MAX, f32::MIN, f32::INFINITY, f32::NAN];
    // Miri takes some ten seconds a row.
    let step = if cfg!(miri) { 5 } else { 1 };
    for (format, ..) in formats() {
        for extreme in extremes.into_iter().step_by(step) {
            for column_weight in [f32::NAN, 0.0, 1.0, f32::MAX].into_iter().step_by(step) {
                let importance = [column_weight; 256];
                let mut mixed = [0.0f32; 256];
                for (i, x) in mixed.iter_mut().enumerate() {
                    *x = if i % 7 == 3 { extreme } else { (i as f32 * 0.7).sin() };
                }
                for x in [[extreme; 256], mixed] {
                    let bytes = encode(format, &x, 256, Some(&importance));
                    let decoded = decode(format, &bytes, 256);
                    if x.iter().all(|v| *v == 0.0) {
                        assert!(decoded.iter().all(|v| *v == 0.0), "{}: zeros", format);
                    }
                }
            }
        }
    }
}

/// Checks the promises of [`BlockFormat`] on blocks of arbitrary bytes.
struct Promises<'a>(&'a [u8]);

impl Visitor for Promises<'_> {
    type Output = ();

    fn block<F: BlockFormat>(self) {
        assert_ne!(F::ENCODE, Encode::No);
        for bytes in self.0.chunks_exact(size_of::<F>()) {
            let block: F = bytemuck::pod_read_unaligned(bytes);
            let mut decoded = vec![f32::NAN; F::ELEMS];
            block.decode(&mut decoded);
            for g in 0..F::GROUPS {
                let group = block.unpack_group(g);
                assert!((0..GROUP).all(|i| group.code(i) <= F::CODE_MAX), "{:?} code", F::ID);
                assert_eq!(group.offset, [0.0; 2], "{:?} offset", F::ID);
                if F::SCALE_ELEMS == GROUP {
                    assert_eq!(group.scale[0].to_bits(), group.scale[1].to_bits(), "{:?} scale", F::ID);
                }
            }
        }
    }

    fn float<F: FloatFormat>(self) {
        panic!("{:?} is a float format", F::ID);
    }
}

/// Roughly normal weights, a few of them outliers, and column importances of 0.1 to 4. From a seed, so that a failure
/// is reported as one number.
fn rows(seed: u64) -> (Vec<f32>, Vec<f32>) {
    let mut state = seed;
    let mut uniform = move || {
        // splitmix64
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 24) as f32
    };
    let weights = (0..COLS).map(|_| {
        let outlier = if uniform() < 0.01 { 8.0 } else { 1.0 };
        (uniform() + uniform() + uniform() - 1.5) * outlier
    });
    let weights = weights.collect();
    (weights, (0..COLS).map(|_| 0.1 + 3.9 * uniform()).collect())
}

/// Over many rows the error is near that of normal weights; outliers, which these rows have, cost a third.
#[test]
fn round_trip_error_is_usual() {
    const SEEDS: u64 = if cfg!(miri) { 1 } else { 32 };
    for (format, plain, rel_rmse) in formats() {
        for weighted in [false, true] {
            if !plain && !weighted {
                continue;
            }
            let mean =
                (0..SEEDS).map(|seed| relative_error(format, seed, weighted)).sum::<f64>() / SEEDS as f64;
            println!("{format} weighted {weighted}: {:.2} of the usual error", mean / rel_rmse);
            assert!(mean < 1.4 * rel_rmse, "{format}, weighted {weighted}: {mean}");
        }
    }
}

fn relative_error(format: FormatId, seed: u64, weighted: bool) -> f64 {
    let (x, importance) = rows(seed);
    let decoded = decode(format, &encode(format, &x, COLS, weighted.then_some(&importance[..])), COLS);
    let error = rms(x.iter().zip(&decoded).map(|(x, y)| *x as f64 - *y as f64));
    error / rms(x.iter().map(|v| *v as f64))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 1 } else { 64 }))]

    #[test]
    fn any_bytes_decode(bytes in prop::collection::vec(any::<u8>(), 4 * 136)) {
        for (format, ..) in FORMATS {
            with_format(format, Promises(&bytes)).expect("a block format");
        }
    }

    /// Three times the usual error: an outlier in a small row costs others precision, and of 20,000 seeds the worst
    /// passed twice it.
    #[test]
    fn round_trip_error_is_bounded(seed in any::<u64>()) {
        for (format, plain, rel_rmse) in formats() {
            for weighted in [false, true] {
                if !plain && !weighted {
                    continue;
                }
                let relative = relative_error(format, seed, weighted);
                prop_assert!(relative < 3.0 * rel_rmse && relative < 1.0, "{}: {relative}", format);
            }
        }
    }

    /// Four times the weights are four times the decoded weights, exactly: scaling by a power of two (a square, for
    /// the root in the importance) rounds nowhere.
    #[test]
    fn powers_of_four_scale_exactly(seed in any::<u64>()) {
        let (x, importance) = rows(seed);
        let scaled: Vec<f32> = x.iter().map(|v| v * 4.0).collect();
        for (format, ..) in formats() {
            let expected: Vec<f32> = decode(format, &encode(format, &x, COLS, Some(&importance)), COLS)
                .iter().map(|v| v * 4.0).collect();
            let got = decode(format, &encode(format, &scaled, COLS, Some(&importance)), COLS);
            prop_assert_eq!(got, expected, "{}", format);
        }
    }
}
