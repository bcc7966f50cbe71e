//! How long the modules take to load that a model of some formats needs: unpacked, by one thread, by several.
//!
//! The driver keeps what it compiled: the first time means `CUDA_CACHE_DISABLE=1`, or an empty folder as
//! `CUDA_CACHE_PATH`.

use std::time::Instant;

use engine::backends::cuda::hosted::Hosted;
use gpu_kernels::driver::Driver;
use gpu_kernels::ptx::{self, PtxModule};

use crate::BenchError;
use crate::conform::load_all;

/// Loads the modules that name no format and those of these formats (`Q4_K,Q6_K`), of the best tier or of one, by one
/// thread, then by `n_threads`.
pub fn run(
    driver: &Hosted,
    formats: &str,
    tier: Option<&'static str>,
    n_threads: usize,
) -> Result<(), BenchError> {
    let info = driver.info();
    let runs = |module: &&PtxModule| module.runs_on(info.sm) && tier.is_none_or(|only| only == module.tier);
    let Some(tier) = ptx::MODULES.iter().rev().find(runs).map(|module| module.tier) else {
        return Err(BenchError::Usage(format!("no embedded tier runs on sm_{}", info.sm)));
    };
    let modules = modules(tier, formats);
    let start = Instant::now();
    let bytes: usize = modules.iter().map(|module| module.text().len()).sum();
    let unpacked_ms = start.elapsed().as_secs_f64() * 1e3;
    println!(
        "{}, {tier}, {formats}: {} modules, {bytes} bytes of text, unpacked in {unpacked_ms:.1} ms; embedded for all tiers {} bytes",
        info.name,
        modules.len(),
        ptx::embedded_bytes()
    );
    // By one thread here, since here an error can be told.
    let start = Instant::now();
    for module in &modules {
        driver.unload(driver.load(module)?)?;
    }
    println!("1 thread: {:.1} ms", start.elapsed().as_secs_f64() * 1e3);
    let (ms, slowest_ms) = load_all(driver, &modules, n_threads);
    println!("{n_threads} threads: {ms:.1} ms, the slowest module {slowest_ms:.1} ms");
    Ok(())
}

/// The modules of a tier that name none or one of these formats.
fn modules(tier: &str, formats: &str) -> Vec<&'static PtxModule> {
    let wanted = |module: &PtxModule| {
        let format = module.name.strip_prefix(module.file).and_then(|rest| rest.strip_prefix('_'));
        format.is_none_or(|format| formats.split(',').any(|name| name == format))
    };
    ptx::MODULES.iter().filter(|module| module.tier == tier && wanted(module)).collect()
}
