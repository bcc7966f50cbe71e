//! What both programs are asked for: which kernels, which tiers, and where results go.

use std::path::{Path, PathBuf};

use gpu_kernels::ptx;
use serde_json::Value;

use crate::BenchError;
use crate::args::Args;

/// What to measure and where it goes.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Part of the kernel's name or of the case's label.
    pub filter: Option<String>,
    /// Only this kernel.
    pub only: Option<String>,
    /// Only modules of this tier.
    pub tier: Option<&'static str>,
    /// Kernels to test at a time; 0 is 1.
    pub jobs: usize,
    /// Repeat on one set of buffers.
    pub warm: bool,
    /// ggml's `test-backend-ops`.
    pub peer: Option<PathBuf>,
    /// Where all goes as JSON.
    pub json: Option<PathBuf>,
    /// Folder that gets `DEVICE/kernels.json`.
    pub record: Option<PathBuf>,
}

impl Options {
    /// The options that both programs have.
    pub fn take(args: &mut Args) -> Result<Options, BenchError> {
        Ok(Options {
            filter: None,
            only: args.value("--only")?,
            tier: args.value("--tier")?.map(|name| tier(&name)).transpose()?,
            jobs: args.number("--jobs")?.unwrap_or(1) as usize,
            warm: args.flag("--warm"),
            peer: args.value("--peer")?.map(PathBuf::from),
            json: args.value("--json")?.map(PathBuf::from),
            record: args.value("--record")?.map(PathBuf::from),
        })
    }
}

/// The embedded tier of this name.
fn tier(name: &str) -> Result<&'static str, BenchError> {
    let tiers = tiers();
    let found = tiers.iter().copied().find(|tier| *tier == name);
    found.ok_or_else(|| BenchError::Usage(format!("--tier {name}: there are {}", tiers.join(", "))))
}

/// Names of the embedded tiers, oldest first.
pub fn tiers() -> Vec<&'static str> {
    let mut tiers = Vec::new();
    for module in ptx::MODULES {
        if !tiers.contains(&module.tier) {
            tiers.push(module.tier);
        }
    }
    tiers
}

/// Writes a value as a file, with its folder.
pub(crate) fn write(path: &Path, value: &Value) -> Result<(), BenchError> {
    let what = format!("write {}", path.display());
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(BenchError::io(what.clone()))?;
    }
    std::fs::write(path, format!("{value:#}\n")).map_err(BenchError::io(what))
}
