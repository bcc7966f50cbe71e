//! Where the golden data lies, and small readers for it.
#![allow(dead_code)] // each test binary uses its part

use std::path::{Path, PathBuf};
use std::sync::Arc;

use engine::Model;
use engine::backends::cuda::{Device, emulator};
use engine::weights::ByteSource;
use gpu_kernels::emu::{Emulator, Options};

/// Folder of the goldens: `RUNIK_GOLDENS`, else `../shared/goldens` beside the workspace. `None` (said aloud) if absent; a
/// folder that the environment names must be one.
pub fn goldens() -> Option<PathBuf> {
    let named = std::env::var_os("RUNIK_GOLDENS").map(PathBuf::from);
    let is_named = named.is_some();
    let path = named.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/goldens"));
    if path.join("README.md").is_file() {
        return Some(path);
    }
    assert!(!is_named, "RUNIK_GOLDENS={}: no README.md there", path.display());
    println!("skipped: no golden data at {} (set RUNIK_GOLDENS)", path.display());
    None
}

pub fn f32s(path: &Path) -> Vec<f32> {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

pub fn json(path: &Path) -> serde_json::Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap()
}

pub fn ids(value: &serde_json::Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

pub fn model(path: &Path) -> Arc<Model> {
    let bytes: Arc<dyn ByteSource> = Arc::new(std::fs::read(path).unwrap());
    Arc::new(Model::load(vec![bytes]).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
}

/// The NVIDIA GPUs to test, if the environment names some: `RUNIK_TEST_GPU=0` or `0,1`.
fn gpus() -> Vec<u32> {
    let named = std::env::var("RUNIK_TEST_GPU").unwrap_or_default();
    let index = |i: &str| i.parse().unwrap_or_else(|e| panic!("RUNIK_TEST_GPU={named}: {e}"));
    named.split(',').filter(|i| !i.is_empty()).map(index).collect()
}

/// The NVIDIA GPU to test, if the environment names one.
pub fn gpu() -> Option<Device> {
    gpus().first().map(|&index| open_gpu(index))
}

/// Two NVIDIA GPUs to test, if the environment names some; the same one twice if it names one.
pub fn two_gpus() -> Option<[Device; 2]> {
    let all = gpus();
    Some([open_gpu(*all.first()?), open_gpu(*all.last()?)])
}

#[cfg(all(feature = "cuda", feature = "ptx"))]
fn open_gpu(index: u32) -> Device {
    Arc::new(
        engine::backends::cuda::hosted::Hosted::open(index).unwrap_or_else(|e| panic!("GPU {index}: {e}")),
    )
}

#[cfg(not(all(feature = "cuda", feature = "ptx")))]
fn open_gpu(index: u32) -> Device {
    panic!("RUNIK_TEST_GPU={index}: these tests were built without the features cuda and ptx")
}

/// The NVIDIA GPU to test, else the emulator.
pub fn gpu_or_emulator() -> Device {
    gpu().unwrap_or_else(emulator)
}

/// The GPU to test, else the emulator as an older GPU and as a Hopper, whose kernels differ.
pub fn gpus_or_emulators() -> Vec<Device> {
    let emulated = |sm| -> Device { Arc::new(Emulator::new(Options { sm, ..Options::default() })) };
    gpu().map_or_else(|| vec![emulated(80), emulated(90)], |gpu| vec![gpu])
}

/// Normalised mean squared error: Σ(a−b)² / Σb².
pub fn nmse(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let err: f64 = got.iter().zip(want).map(|(a, b)| (*a as f64 - *b as f64).powi(2)).sum();
    err / want.iter().map(|b| (*b as f64).powi(2)).sum::<f64>()
}

/// SmolLM2-135M-Instruct.Q4_1.gguf: `RUNIK_TEST_MODEL`, else the user's cache (where `cargo xtask demo` puts it).
pub fn smollm2() -> Option<PathBuf> {
    let cache = || {
        let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let base = base.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))?;
        Some(base.join("runik/SmolLM2-135M-Instruct.Q4_1.gguf"))
    };
    let path = std::env::var_os("RUNIK_TEST_MODEL").map(PathBuf::from).or_else(cache).filter(|p| p.is_file());
    if path.is_none() {
        println!("skipped: no SmolLM2 model (set RUNIK_TEST_MODEL or run `cargo xtask demo`)");
    }
    path
}

/// The same model with every tensor decoded to F32.
pub fn dequantise(bytes: &[u8]) -> Vec<u8> {
    let gguf = gguf::Gguf::parse(bytes).unwrap();
    let mut writer = gguf::Writer::like(&gguf).unwrap();
    for t in gguf.tensors() {
        writer.tensor(t.name, quant::FormatId::F32, &t.ne()).unwrap();
    }
    let mut out = writer.header_bytes();
    for t in gguf.tensors() {
        out.resize(out.len().next_multiple_of(32), 0);
        let mut values = vec![0.0f32; t.n_elems() as usize];
        quant::row::decode(t.format, gguf.data(t), &mut values).unwrap();
        out.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    }
    out
}
