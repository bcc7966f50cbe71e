//! How long the kernels take to load that a model needs: unpacked, by one thread, by several.
//!
//! The driver keeps what it compiled: the first time means `CUDA_CACHE_DISABLE=1`, or an empty folder as
//! `CUDA_CACHE_PATH`.

use std::collections::BTreeSet;
use std::time::Instant;

use engine::backends::cuda::hosted::Hosted;
use gpu_kernels::driver::Driver;
use gpu_kernels::ptx::{self, PtxModule};

use crate::BenchError;
use crate::conform::load_all;

/// What 8B launches, whatever its weights, with its cache in F16: a prompt of 512 tokens, then one at a time, drawn on
/// the GPU. So the engine's own plans of a model of that shape say.
const ANY: [&str; 10] = [
    "flash_decode_128_f16",
    "flash_merge",
    "get_rows_plain",
    "kv_store",
    "repack_spans",
    "rms_norm_Q8_0",
    "rope_table_f32",
    "sample_draw",
    "top_k_f32",
    "top_k_packed",
];
/// Beside these, for prompts.
const PROMPTS: [&str; 1] = ["flash_prefill_128_f16"];
const HOPPER_PROMPTS: [&str; 3] = ["flash_hopper_128_f16", "rms_norm_f32", "round_act_scaled"];
/// For the layers' weights, `{}` for the format. The embeddings have it too.
const LAYERS: [&str; 5] = ["get_rows_{}", "mmvq_{}_n1", "mmvq_{}_n1_glu", "mmvq_{}_n1_f32", "mmq_{}_n128"];
const HOPPER_LAYERS: [&str; 7] = [
    "get_rows_{}",
    "mmvq_{}_n1",
    "mmvq_{}_n1_glu",
    "mmvq_{}_n1_f32",
    "mmd_hopper_{}",
    "mmd_hopper_{}_flat",
    "mmd_hopper_{}_wide",
];
/// For the output's: of a prompt too it takes one row.
const OUTPUT: [&str; 1] = ["mmvq_{}_n1"];
const HOPPER_OUTPUT: [&str; 2] = ["mmvq_{}_n1", "mmd_hopper_{}"];

/// Loads the kernels that such a model launches, at the best tier or at one: by one thread, which tells of each, then by
/// `n_threads`. The formats are those of the layers' weights, then the output's: `Q4_0,Q6_K`.
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
    let entries = entries(formats, tier == "sm_90a" && ptx::runs_hopper(&info));
    let wanted = |module: &&PtxModule| module.tier == tier && entries.contains(module.entry);
    let modules: Vec<&PtxModule> = ptx::MODULES.iter().filter(wanted).collect();
    let there = |entry: &&String| modules.iter().any(|module| module.entry == *entry);
    if let Some(missing) = entries.iter().find(|entry| !there(entry)) {
        return Err(BenchError::Usage(format!("there is no kernel {missing}; are {formats} block formats?")));
    }
    let start = Instant::now();
    let bytes: usize = modules.iter().map(|module| module.text().len()).sum();
    let unpacked_ms = start.elapsed().as_secs_f64() * 1e3;
    println!(
        "{}, {tier}, {formats}: {} kernels, {bytes} bytes of text, unpacked in {unpacked_ms:.1} ms; embedded for all tiers {} bytes",
        info.name,
        modules.len(),
        ptx::embedded_bytes()
    );
    // By one thread here, since here an error can be told.
    let mut each = Vec::with_capacity(modules.len());
    for module in &modules {
        let start = Instant::now();
        let id = driver.load(module)?;
        each.push((start.elapsed().as_secs_f64() * 1e3, module.entry));
        driver.unload(id)?;
    }
    each.sort_by(|a, b| b.0.total_cmp(&a.0));
    for (ms, entry) in &each {
        println!("{ms:>9.1} ms {entry}");
    }
    println!("1 thread: {:.1} ms", each.iter().map(|(ms, _)| ms).sum::<f64>());
    let (ms, slowest_ms) = load_all(driver, &modules, n_threads);
    println!("{n_threads} threads: {ms:.1} ms, the slowest kernel {slowest_ms:.1} ms");
    Ok(())
}

/// The names of all that a model with weights of these formats launches.
fn entries(formats: &str, hopper: bool) -> BTreeSet<String> {
    let formats: Vec<&str> = formats.split(',').collect();
    let (prompts, of_layers, of_output): (&[&str], &[&str], &[&str]) = match hopper {
        true => (&HOPPER_PROMPTS, &HOPPER_LAYERS, &HOPPER_OUTPUT),
        false => (&PROMPTS, &LAYERS, &OUTPUT),
    };
    let (layers, output) = formats.split_at(formats.len() - 1);
    let layers = if layers.is_empty() { output } else { layers };
    let of = |names: &[&str], formats: &[&str]| -> Vec<String> {
        formats.iter().flat_map(|format| names.iter().map(|name| name.replace("{}", format))).collect()
    };
    let any = ANY.iter().chain(prompts).map(|name| (*name).to_owned());
    any.chain(of(of_layers, layers)).chain(of(of_output, output)).collect()
}

#[cfg(test)]
mod tests {
    use gpu_kernels::registry::KERNELS;

    use super::*;

    #[test]
    fn all_that_is_loaded_exists() {
        let tables = || KERNELS.iter().flat_map(|kernel| kernel.entries()).flat_map(|table| table.iter());
        let exists = |name: &String| tables().any(|entry| entry.name == name);
        for (formats, hopper, n) in [("Q4_0,Q6_K", true, 22), ("Q4_0,Q6_K", false, 17), ("Q8_0", false, 16)] {
            let entries = entries(formats, hopper);
            assert_eq!(entries.iter().find(|name| !exists(name)), None);
            assert_eq!(entries.len(), n, "{entries:?}");
        }
    }
}
