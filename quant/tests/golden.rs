//! Every tensor type against llama.cpp: encode and decode byte for byte, dot products against f64.
//!
//! `tests/golden/` holds the inputs (38 rows of 512 weights with outliers, zeros and small rows; column importances;
//! activations) and, in `blocks.json`, the SHA-256 of what llama.cpp made of them per type. Where the full golden folder
//! is at hand (`RUNIK_GOLDENS`, else `../shared/goldens` beside the workspace), mismatches are shown by row and byte, and
//! dot products are also compared with llama.cpp's own f64 reference; otherwise that part prints why it is skipped.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use quant::format::GROUP;
use quant::table::FORMATS;
use quant::{ActGroup, BlockFormat, FloatFormat, FormatId, Visitor, row, with_format};
use serde_json::Value;
use sha2::{Digest, Sha256};

const COLS: usize = 512;

fn own(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// A file of the full golden folder, if that is there.
fn full(name: &str) -> Option<Vec<u8>> {
    let root = match std::env::var_os("RUNIK_GOLDENS") {
        Some(root) => PathBuf::from(root),
        None => PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/goldens"),
    };
    fs::read(root.join("blocks").join(name)).ok()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

fn own_floats(name: &str) -> Vec<f32> {
    floats(&fs::read(own(name)).unwrap())
}

/// Rows of each input; Miri takes hours for all.
const ROWS: usize = if cfg!(miri) { 1 } else { 38 };

fn types() -> Vec<Value> {
    let manifest: Value = serde_json::from_slice(&fs::read(own("blocks.json")).unwrap()).unwrap();
    manifest["types"].as_array().unwrap().clone()
}

fn format_of(entry: &Value) -> FormatId {
    let name = entry["type"].as_str().unwrap();
    let id = entry["ggml_type_id"].as_u64().unwrap() as u32;
    let format = FormatId::from_name(name).unwrap_or_else(|| panic!("{name}: no such row in the table"));
    assert_eq!(FormatId::from_ggml(id), Some(format), "{name}: ggml number {id}");
    format
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold(String::new(), |mut hex, byte| {
        write!(hex, "{byte:02x}").unwrap();
        hex
    })
}

fn encode_rows(format: FormatId, weights: &[f32], importance: Option<&[f32]>) -> Vec<u8> {
    let row_bytes = row::row_bytes(format, COLS).unwrap();
    let mut out = vec![0xaa; weights.len() / COLS * row_bytes];
    for (x, out) in weights.chunks_exact(COLS).zip(out.chunks_exact_mut(row_bytes)) {
        row::encode(format, x, importance, out).unwrap();
    }
    out
}

fn decode_rows(format: FormatId, bytes: &[u8]) -> Vec<f32> {
    let row_bytes = row::row_bytes(format, COLS).unwrap();
    let mut out = vec![f32::NAN; bytes.len() / row_bytes * COLS];
    for (bytes, out) in bytes.chunks_exact(row_bytes).zip(out.chunks_exact_mut(COLS)) {
        row::decode(format, bytes, out).unwrap();
    }
    out
}

/// `None` if the hash is right; otherwise where the first difference lies, if `file` can be had.
fn mismatch(what: &str, got: &[u8], sha: &Value, file: &str, row_bytes: usize) -> Option<String> {
    if Some(sha256(got).as_str()) == sha.as_str() {
        return None;
    }
    let Some(expected) = full(file) else {
        return Some(format!("{what}: wrong hash (skipped: where, the golden folder is not here)"));
    };
    match got.iter().zip(&expected).position(|(a, b)| a != b) {
        Some(at) => Some(format!(
            "{what}: first difference in row {} byte {}: expected {:#04x}, got {:#04x}; {} of {} bytes differ",
            at / row_bytes,
            at % row_bytes,
            expected[at],
            got[at],
            got.iter().zip(&expected).filter(|(a, b)| a != b).count(),
            got.len()
        )),
        None => Some(format!("{what}: expected {} bytes, got {}", expected.len(), got.len())),
    }
}

#[cfg_attr(miri, ignore = "hours; `dot_products_match_f64` encodes and decodes a few rows")]
#[test]
fn encodes_and_decodes_like_llama_cpp() {
    let weights = own_floats("weights.f32");
    let importance = own_floats("imatrix.f32");
    let mut wrong = Vec::new();
    let mut matched = 0;
    for entry in types() {
        let format = format_of(&entry);
        let name = entry["type"].as_str().unwrap();
        let info = quant::info(format);
        assert_eq!(info.elems as u64, entry["block_elems"], "{name}: block length");
        assert_eq!(info.bytes as u64, entry["block_bytes"], "{name}: block size");
        let row_bytes = row::row_bytes(format, COLS).unwrap();

        let needs = entry["requires_imatrix"].as_bool().unwrap();
        let encoded = encode_rows(format, &weights, needs.then_some(importance.as_slice()));
        let mut check = |what: &str, got: &[u8], sha: &Value, file: String, row_bytes: usize| match mismatch(
            &format!("{name} {what}"),
            got,
            sha,
            &file,
            row_bytes,
        ) {
            None => matched += 1,
            Some(text) => wrong.push(text),
        };
        check("encoded", &encoded, &entry["encoded_sha256"], format!("w.{name}.bin"), row_bytes);
        if !needs && entry["with_imatrix_sha256"].is_string() {
            let encoded = encode_rows(format, &weights, Some(&importance));
            let file = format!("w.{name}.imx.bin");
            check("encoded with importance", &encoded, &entry["with_imatrix_sha256"], file, row_bytes);
        }
        let decoded = decode_rows(format, &encoded);
        let bytes: Vec<u8> = decoded.iter().flat_map(|v| v.to_le_bytes()).collect();
        check("decoded", &bytes, &entry["decoded_sha256"], format!("w.{name}.deq.f32"), COLS * 4);

        // The error that each format's file states, which was measured over more rows than these.
        let (mut error, mut energy) = (0.0f64, 0.0f64);
        for (x, y) in weights.iter().zip(&decoded) {
            error += (*x as f64 - *y as f64).powi(2);
            energy += (*x as f64).powi(2);
        }
        let expected = entry["rel_rmse"].as_f64().unwrap();
        let rel_rmse = (error / energy).sqrt();
        assert!(rel_rmse <= expected * 1.1, "{name}: relative RMS error {rel_rmse}, expected {expected}");
    }
    assert!(wrong.is_empty(), "{} wrong, {matched} right:\n{}", wrong.len(), wrong.join("\n"));
    println!("{matched} of {matched} golden files equal");
}

/// What ggml's `quantize_row_iq4_nl_ref` makes of the weights: with it llama.cpp fills a cache.
#[cfg_attr(miri, ignore = "a hash of all rows")]
#[test]
fn iq4_nl_of_a_cache_is_ggml_s() {
    let weights = own_floats("weights.f32");
    let mut bytes = vec![0xaa; row::row_bytes(FormatId::IQ4_NL, weights.len()).unwrap()];
    row::encode_one_group(FormatId::IQ4_NL, &weights, &mut bytes).unwrap();
    // Where the scale is 0, ggml leaves the block before's codes.
    for block in bytes.chunks_exact_mut(18).filter(|block| block[..2] == [0, 0]) {
        block.fill(0);
    }
    assert_eq!(sha256(&bytes), "d754ba7f763841153e686b3bd56929e783b0e3c4a23feb3d51c4a0d53ee51bd9");
}

#[test]
fn every_format_has_a_golden() {
    let types: Vec<FormatId> = types().iter().map(format_of).collect();
    for info in FORMATS {
        let holds_weights =
            !matches!(info.id, FormatId::I8 | FormatId::I16 | FormatId::I32 | FormatId::I64 | FormatId::F64);
        assert_eq!(holds_weights, types.contains(&info.id), "{}", info.name);
    }
}

/// Dot products of all rows with all activation rows, `[row][activation]`, and the same in f64 from the decoded weights
/// and the same quantised activations.
struct Dots<'a> {
    bytes: &'a [u8],
    decoded: &'a [f32],
    acts: &'a [f32],
}

impl Visitor for Dots<'_> {
    type Output = Option<Vec<(f32, f64)>>;

    fn block<F: BlockFormat>(self) -> Self::Output {
        let row_bytes = COLS / F::ELEMS * size_of::<F>();
        let mut dots = Vec::new();
        for (bytes, weights) in self.bytes.chunks_exact(row_bytes).zip(self.decoded.chunks_exact(COLS)) {
            let blocks: &[F] = bytemuck::cast_slice(bytes);
            for act in self.acts.chunks_exact(COLS) {
                let (mut dot, mut exact) = (0.0f32, 0.0f64);
                let mut groups = [ActGroup::ZERO; COLS / GROUP];
                ActGroup::quantise(F::ACT, act, &mut groups);
                for (i, act) in groups.iter().enumerate() {
                    dot = blocks[i / F::GROUPS].dot_group(i % F::GROUPS, act, dot);
                    for (w, q) in weights[GROUP * i..].iter().zip(act.q) {
                        exact += *w as f64 * act.d as f64 * q as f64;
                    }
                }
                dots.push((dot, exact));
            }
        }
        Some(dots)
    }

    fn float<F: FloatFormat>(self) -> Self::Output {
        None
    }
}

fn norm(x: &[f32]) -> f64 {
    x.iter().map(|v| (*v as f64).powi(2)).sum::<f64>().sqrt()
}

#[test]
fn dot_products_match_f64() {
    let weights = &own_floats("weights.f32")[..ROWS * COLS];
    let importance = own_floats("imatrix.f32");
    let acts = own_floats("acts.f32");
    let mut compared = 0;
    let mut skipped = 0;
    for entry in types() {
        let format = format_of(&entry);
        let name = entry["type"].as_str().unwrap();
        // With multiplications that are added in one step by software, a format takes Miri minutes.
        if cfg!(miri) && !["q4_0", "q4_k", "iq4_nl"].contains(&name) {
            continue;
        }
        let needs = entry["requires_imatrix"].as_bool().unwrap();
        let bytes = encode_rows(format, weights, needs.then_some(importance.as_slice()));
        let decoded = decode_rows(format, &bytes);
        let dots = with_format(format, Dots { bytes: &bytes, decoded: &decoded, acts: &acts });
        let Some(Some(dots)) = dots else { continue };
        let reference = full(&format!("w.{name}.vecdot_f64ref.f32")).map(|b| floats(&b));
        // The golden's sums are exact over the same quantised activations; Q8_1 keeps a block's sum as f16.
        let tolerance = if entry["activation_type"] == "q8_1" { 1.5e-4 } else { 2e-7 };
        for (i, &(dot, exact)) in dots.iter().enumerate() {
            let (r, a) = (i / 8, i % 8);
            let norms = norm(&decoded[COLS * r..][..COLS]) * norm(&acts[COLS * a..][..COLS]);
            let error = (dot as f64 - exact).abs();
            assert!(error <= tolerance * norms, "{name} row {r} activation {a}: got {dot}, expected {exact}");
            if let Some(reference) = &reference {
                let error = (dot - reference[i]).abs() as f64;
                let expected = reference[i];
                assert!(
                    error <= tolerance * norms,
                    "{name} row {r} activation {a}: got {dot}, golden {expected}"
                );
            }
        }
        compared += 1;
        // Q8_1 and Q8_K are activations: llama.cpp has no product with them to compare.
        skipped += (reference.is_none() && !entry["activation_type"].is_null()) as usize;
    }
    println!("{compared} formats compared with f64");
    if skipped > 0 {
        println!("skipped: {skipped} formats against llama.cpp's f64 reference, which is not here");
    }
}
