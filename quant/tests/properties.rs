//! What every block format promises, over random and hostile input.
//!
//! * any bytes decode without a panic, and the group form keeps its contract (codes, scales, offsets, values);
//! * any floats encode without a panic, NaN and infinities included, with and without importance;
//! * values come back within the format's bound; zeros come back as zeros.

use proptest::prelude::*;
use quant::format::{Encode, GROUP};
use quant::table::FORMATS;
use quant::{ActGroup, BlockFormat, FloatFormat, FormatId, QuantError, Visitor, row, with_format};

/// A row that every format's block length divides.
const COLS: usize = 512;

/// Formats the crate can encode, with whether they need importance; under Miri without those whose codebook's points have
/// eight dimensions, which it takes hours to encode.
fn encodable() -> Vec<(FormatId, bool)> {
    struct Encodes;
    impl Visitor for Encodes {
        type Output = Encode;
        fn block<F: BlockFormat>(self) -> Encode {
            F::ENCODE
        }
        fn float<F: FloatFormat>(self) -> Encode {
            Encode::No
        }
    }
    let formats = FORMATS.iter().filter_map(|info| match with_format(info.id, Encodes)? {
        Encode::Yes => Some((info.id, false)),
        Encode::WithImportance => Some((info.id, true)),
        Encode::No => None,
    });
    let slow =
        |format: FormatId| ["IQ1", "IQ2", "IQ3"].iter().any(|family| format.name().starts_with(family));
    formats.filter(|(format, _)| !cfg!(miri) || !slow(*format)).collect()
}

fn round_trip(format: FormatId, x: &[f32], importance: Option<&[f32]>) -> Vec<f32> {
    let mut bytes = vec![0xaa; row::row_bytes(format, x.len()).unwrap()];
    row::encode(format, x, importance, &mut bytes).unwrap();
    let mut out = vec![f32::NAN; x.len()];
    row::decode(format, &bytes, &mut out).unwrap();
    out
}

/// Decodes blocks out of `bytes` and checks the contract of [`BlockFormat`].
struct Contract<'a> {
    bytes: &'a [u8],
}

impl Visitor for Contract<'_> {
    type Output = ();

    fn block<F: BlockFormat>(self) {
        let name = F::ID;
        let mut acts = [ActGroup::ZERO; 8];
        let x: [f32; 256] = core::array::from_fn(|i| (i % 32) as f32 - 11.5);
        ActGroup::quantise(F::ACT, &x, &mut acts);
        let act = acts[0];
        for bytes in self.bytes.chunks_exact(size_of::<F>()).take(8) {
            let block: F = bytemuck::pod_read_unaligned(bytes);
            let mut out = vec![f32::NAN; F::ELEMS];
            block.decode(&mut out);
            for (g, out) in out.chunks_exact(GROUP).enumerate() {
                let group = block.unpack_group(g);
                if F::SCALE_ELEMS != 16 {
                    assert_eq!(group.scale[0].to_bits(), group.scale[1].to_bits(), "{name}: scales differ");
                    assert_eq!(
                        group.offset[0].to_bits(),
                        group.offset[1].to_bits(),
                        "{name}: offsets differ"
                    );
                }
                if !F::HAS_OFFSET {
                    assert_eq!(group.offset, [0.0; 2], "{name}: offset");
                }
                for (i, &out) in out.iter().enumerate() {
                    assert!(group.code(i) <= F::CODE_MAX, "{name}: code {}", group.code(i));
                    let mut value = group.scale[i / 16] * (group.code(i) as i32 - F::BIAS) as f32;
                    if F::HAS_OFFSET {
                        value += group.offset[i / 16];
                    }
                    assert!(value == out || (value.is_nan() && out.is_nan()), "{name}: {value} is not {out}");
                }
                let finite = group.scale.iter().chain(&group.offset).all(|v| v.abs() < 1e30);
                assert!(!finite || block.dot_group(g, &act, 0.5).is_finite(), "{name}: dot");
            }
        }
    }

    fn float<F: FloatFormat>(self) {
        for bytes in self.bytes.chunks_exact(size_of::<F>()) {
            let value = bytemuck::pod_read_unaligned::<F>(bytes).to_f32();
            let again = F::from_f32(value).to_f32();
            assert!(
                value == again || (value.is_nan() && again.is_nan()),
                "{}: {value} is not {again}",
                F::ID
            );
        }
    }
}

/// Floats of every kind, the awkward ones often.
fn any_float() -> impl Strategy<Value = f32> {
    prop_oneof![
        4 => any::<u32>().prop_map(f32::from_bits),
        4 => -1.0f32..1.0,
        1 => prop::sample::select(vec![
            0.0,
            -0.0,
            f32::MAX,
            f32::MIN,
            f32::MIN_POSITIVE,
            1e-45,
            -1e-45,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::NAN,
            65504.0,
            65520.0,
        ]),
    ]
}

/// Rows like weights: noise at some magnitude, with zeros and outliers. The magnitudes are those that NVFP4's 8-bit
/// scales reach (the narrowest range of all formats).
fn weights() -> impl Strategy<Value = Vec<f32>> {
    let weight = prop_oneof![20 => -1.0f32..1.0, 1 => Just(0.0), 1 => -8.0f32..8.0];
    (prop::collection::vec(weight, COLS), -2i32..8)
        .prop_map(|(row, exponent)| row.iter().map(|v| v * 2f32.powi(exponent)).collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 1 } else { 48 }))]

    #[test]
    fn any_bytes_decode(bytes in prop::collection::vec(any::<u8>(), 2400)) {
        for info in FORMATS {
            with_format(info.id, Contract { bytes: &bytes });
        }
    }

    #[test]
    fn any_floats_encode(
        x in prop::collection::vec(any_float(), COLS),
        importance in prop::collection::vec(any_float(), COLS),
    ) {
        for (format, needs_importance) in encodable() {
            if !needs_importance {
                round_trip(format, &x, None);
            }
            round_trip(format, &x, Some(&importance));
        }
    }

    #[test]
    fn one_group_encodes_the_same(x in prop::collection::vec(any_float(), COLS)) {
        for (format, _) in encodable() {
            let bytes = || vec![0u8; quant::row::row_bytes(format, COLS).unwrap()];
            let (mut all, mut one) = (bytes(), bytes());
            match quant::row::encode_one_group(format, &x, &mut one) {
                Ok(()) => {
                    prop_assert!(quant::info(format).elems <= 32);
                    quant::row::encode(format, &x, None, &mut all).unwrap();
                    // IQ4_NL's is ggml's without a search; `golden.rs` has its bytes. Rust promises no bits of a NaN,
                    // and Miri draws them anew each time.
                    let is_nan = cfg!(miri) && round_trip(format, &x, None).iter().any(|x| x.is_nan());
                    prop_assert!(all == one || format == FormatId::IQ4_NL || is_nan, "{}", format);
                }
                Err(error) => {
                    prop_assert!(quant::info(format).elems > 32);
                    prop_assert!(matches!(error, QuantError::Unsupported { .. }), "{}", error);
                }
            }
        }
    }

    #[test]
    fn weights_come_back_within_bound(
        x in weights(),
        importance in prop::collection::vec(0.01f32..4.0, COLS),
    ) {
        for (format, needs_importance) in encodable() {
            let plain = (!needs_importance).then_some(None);
            for importance in plain.into_iter().chain([Some(importance.as_slice())]) {
                let out = round_trip(format, &x, importance);
                let error: f64 = x.iter().zip(&out).map(|(x, y)| (*x as f64 - *y as f64).powi(2)).sum();
                let largest = x.iter().fold(0.0f64, |max, x| max.max(x.abs() as f64));
                let rms = (error / COLS as f64).sqrt();
                prop_assert!(rms <= bound(format) * largest, "{format}: RMS error {rms}, largest {largest}");
            }
        }
    }
}

/// RMS error that no row of [`weights`] may exceed, as a part of the row's largest magnitude: half a step of a format's
/// codes has that size or more, whatever the rest of the row. Of 172,000 random rows the worst of a class had 0.6 to 0.7
/// of its bound.
fn bound(format: FormatId) -> f64 {
    match format.name() {
        "Q8_0" | "Q8_1" | "Q8_K" => 0.004,
        "Q6_K" => 0.012,
        "Q5_0" | "Q5_1" | "Q5_K" => 0.024,
        "Q4_0" | "Q4_1" | "Q4_K" | "MXFP4" | "NVFP4" | "IQ4_NL" | "IQ4_XS" => 0.06,
        "Q3_K" | "IQ3_S" | "IQ3_XXS" => 0.11,
        "Q2_K" | "IQ2_S" | "IQ2_XS" | "IQ2_XXS" => 0.18,
        _ => 0.3,
    }
}

#[test]
fn zeros_come_back_as_zeros() {
    for (format, needs_importance) in encodable() {
        let importance = needs_importance.then_some([1.0f32; COLS].as_slice());
        assert_eq!(round_trip(format, &[0.0; COLS], importance), vec![0.0; COLS], "{format}");
        let tiny = round_trip(format, &[1e-42; COLS], importance);
        assert!(tiny.iter().all(|v| v.abs() <= 1e-6), "{format}: {:?}", &tiny[..4]);
    }
}

#[test]
fn lengths_are_checked() {
    let mut bytes = [0u8; 144];
    assert_eq!(
        row::encode(FormatId::Q4_K, &[0.0; 255], None, &mut bytes),
        Err(QuantError::RowLength { format: FormatId::Q4_K, elems: 255, block: 256 })
    );
    assert_eq!(
        row::encode(FormatId::Q4_K, &[0.0; 256], None, &mut bytes[1..]),
        Err(QuantError::ByteLength { format: FormatId::Q4_K, expected: 144, got: 143 })
    );
    assert_eq!(
        row::encode(FormatId::Q4_K, &[0.0; 256], Some(&[1.0; 255]), &mut bytes),
        Err(QuantError::ImportanceLength { expected: 256, got: 255 })
    );
    assert_eq!(
        row::decode(FormatId::I32, &[0; 4], &mut [0.0]),
        Err(QuantError::Unsupported { format: FormatId::I32, what: "decode" })
    );
}
