//! SmolLM2-135M as llama-quantize makes it: the same files, the same tensors, the same perplexity.
//!
//! The model is what `RUNIK_TEST_MODEL` names, the truth is in the golden data; without either this says so and passes.
//! `RUNIK_TEST_VARIANTS=all` goes through all 32 variants (some minutes) instead of the few below.

mod common;

use common::{Folder, json, ok};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// One variant for each kind of format and mix.
const FEW: &[&str] = &["original-Q4_1", "F16", "Q8_0", "Q4_K_M", "Q4_K_M-imatrix", "IQ3_XXS", "MXFP4"];

/// As much of the text as four chunks of 512 tokens need.
const TEXT_BYTES: usize = 10_000;

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// Arguments of `runik quantize` for a variant of the golden data, without the files.
fn options(variant: &str, imatrix: &str) -> Vec<String> {
    let strings = |s: &[&str]| s.iter().map(|s| s.to_string()).collect::<Vec<_>>();
    match variant {
        "MXFP4" => strings(&["Q8_0", "--tensor-type", "blk.*weight=mxfp4"]),
        "NVFP4" => strings(&["Q8_0", "--tensor-type", "blk.*weight=nvfp4"]),
        "IQ4_NL" | "IQ4_XS" => strings(&[variant]),
        _ if variant.starts_with("IQ") => strings(&[variant, "--imatrix", imatrix]),
        _ => match variant.strip_suffix("-imatrix") {
            Some(base) => strings(&[base, "--imatrix", imatrix]),
            None => strings(&[variant]),
        },
    }
}

/// How many tensors of a file were compared with the golden hashes; a difference panics.
fn compare_tensors(bytes: &[u8], variant: &str, hashes: &Value) -> usize {
    let gguf = gguf::Gguf::parse(bytes).unwrap();
    for (name, formats) in hashes["tensors"].as_object().unwrap() {
        let tensor = gguf.tensor(name).unwrap();
        let digest = &hex(gguf.data(tensor))[..16];
        let variants = formats[tensor.format.name()][digest].as_array();
        let found = variants.is_some_and(|v| v.iter().any(|v| v == variant));
        assert!(found, "{variant}: {name} as {} is not llama-quantize's", tensor.format);
    }
    hashes["tensors"].as_object().unwrap().len()
}

/// Perplexity over four chunks relative to llama.cpp's, as a fraction.
fn perplexity(path: &str, text: &str, golden: &Value) -> f64 {
    let own = json(&["perplexity", path, "-f", text, "-c", "512", "--json"]);
    let mean = |v: &Value| {
        let nll: Vec<f64> =
            v["chunk_mean_nll"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
        nll[..4].iter().sum::<f64>() / 4.0
    };
    (mean(&own) - mean(golden)).exp() - 1.0
}

#[test]
fn variants_are_llama_quantizes_and_read_the_same() {
    let default = concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/goldens");
    let root = std::env::var("RUNIK_GOLDENS").unwrap_or_else(|_| default.into()) + "/smollm2-135m";
    let (Ok(model), Ok(golden)) =
        (std::env::var("RUNIK_TEST_MODEL"), std::fs::read_to_string(format!("{root}/variants.json")))
    else {
        println!("skipped: RUNIK_TEST_MODEL is not set or there is no golden data");
        return;
    };
    let golden: Value = serde_json::from_str(&golden).unwrap();
    let hashes = std::fs::read_to_string(format!("{root}/tensor_hashes.json")).unwrap();
    let hashes: Value = serde_json::from_str(&hashes).unwrap();
    let folder = Folder::new("real");
    let imatrix = format!("{root}/imatrix-gpl3.gguf");
    let text = folder.path("text.txt");
    let whole = std::fs::read(format!("{root}/ppl-a.txt")).unwrap();
    std::fs::write(&text, &whole[..TEXT_BYTES]).unwrap();
    let all = std::env::var("RUNIK_TEST_VARIANTS").is_ok_and(|v| v == "all");
    let f32 = folder.path("F32.gguf");
    ok(&["quantize", "--allow-requantize", &model, &f32, "F32"]);

    let (mut tensors, mut deviations) = (0, Vec::new());
    for (variant, golden) in golden["variants"].as_object().unwrap() {
        if !all && !FEW.contains(&variant.as_str()) {
            continue;
        }
        let out = folder.path("out.gguf");
        let path = match variant.as_str() {
            "original-Q4_1" => &model,
            "F32" => &f32,
            _ => {
                let options = options(variant, &imatrix);
                let mut args = vec!["quantize", &f32, &out];
                args.extend(options.iter().map(String::as_str));
                ok(&args);
                &out
            }
        };
        let bytes = std::fs::read(path).unwrap();
        // With an importance matrix the file also holds that file's name, so only the tensors can be equal.
        if !options(variant, &imatrix).contains(&imatrix) {
            assert_eq!(hex(&bytes), golden["sha256"].as_str().unwrap(), "{variant}");
        }
        tensors += compare_tensors(&bytes, variant, &hashes);
        // At a perplexity of 10⁵ and more the model is gone and the figure is noise.
        if golden["perplexity"]["ppl"].as_f64().is_some_and(|ppl| ppl < 1000.0) {
            let deviation = perplexity(path, &text, &golden["perplexity"]);
            println!("{variant:16} perplexity {:+.3} % of llama.cpp's", 100.0 * deviation);
            // Rounding activations is chaotic: over four chunks llama.cpp's own figure moves by 0.6 % with its batch
            // size (IQ2_S), and ours with the cache's format. The mean over variants shows whether anything is off.
            assert!(deviation.abs() <= 0.01, "{variant}: {deviation:+.4}");
            deviations.push(deviation);
        }
    }
    let rms = (deviations.iter().map(|d| d * d).sum::<f64>() / deviations.len() as f64).sqrt();
    println!(
        "{tensors} tensors equal; perplexity of {} variants: rms {:.3} %",
        deviations.len(),
        100.0 * rms
    );
    assert!(rms <= 0.006, "rms {rms}");
}
