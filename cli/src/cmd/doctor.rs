//! `doctor`: what the machine offers, and one line for each thing that is amiss.

use anyhow::Result;
use serde_json::json;

use crate::args::DoctorArgs;
use crate::device::backends;
use crate::hub::Cache;
use crate::{gpu, machine, ui};

/// `doctor`.
pub fn run(args: &DoctorArgs) -> Result<()> {
    let (physical, logical) = (machine::physical_cores(), machine::logical_cores());
    let features = machine::cpu_features();
    let memory = machine::memory();
    let bandwidth = machine::read_bandwidth(physical);
    let cache = Cache::from_env();
    let has = |name: &str| features.iter().any(|&(n, there)| n == name && there);

    let mut problems = Vec::new();
    if cfg!(target_arch = "x86_64") && !(has("avx2") && has("fma")) {
        problems.push(
            "the processor has no AVX2 with FMA: kernels fall back to plain code, which is many times slower",
        );
    }
    if memory.is_some_and(|(_, available)| available < 1 << 30) {
        problems.push("less than 1 GiB of memory is available: close other programs or use smaller models");
    }
    let there: Vec<&str> = features.iter().filter(|f| f.1).map(|f| f.0).collect();
    let gpus = gpu::devices();
    if args.json {
        return ui::json(&json!({
            "version": env!("CARGO_PKG_VERSION"),
            "cpu": { "name": machine::cpu_name(), "physical_cores": physical, "logical_cores": logical, "features": there },
            "memory": memory.map(|(total, available)| json!({ "total_bytes": total, "available_bytes": available })),
            "read_bandwidth_gbps": (bandwidth / 1e7).round() / 100.0,
            "gpu": gpus.as_ref().ok().map(|gpus| gpus.iter().map(|(_, json)| json).collect::<Vec<_>>()),
            "gpu_note": gpus.as_ref().err(),
            "backends": backends(),
            "cache": cache.root().map(|p| p.display().to_string()),
            "problems": problems,
        }));
    }
    let mut text = format!("runik      {}\n", env!("CARGO_PKG_VERSION"));
    text += &format!("processor  {}, {physical} cores, {logical} threads\n", machine::cpu_name());
    text += &format!("features   {}\n", if there.is_empty() { "none known".into() } else { there.join(" ") });
    text += &match memory {
        Some((total, available)) => {
            format!("memory     {}, {} available\n", ui::bytes(total), ui::bytes(available))
        }
        None => "memory     unknown on this system\n".to_owned(),
    };
    text += &format!("bandwidth  {:.1} GB/s read with {physical} threads (measured)\n", bandwidth / 1e9);
    text += &match gpus {
        Ok(gpus) => gpus.iter().map(|(text, _)| format!("gpu        {text}\n")).collect(),
        Err(reason) => format!("gpu        {reason}\n"),
    };
    text += &match cache.root() {
        Some(root) => format!("cache      {}\n", root.display()),
        None => "cache      none: neither HF_HOME nor HOME is set\n".to_owned(),
    };
    for problem in &problems {
        text += &format!("problem    {problem}\n");
    }
    if problems.is_empty() {
        text += "no problems found\n";
    }
    ui::out(text)
}
