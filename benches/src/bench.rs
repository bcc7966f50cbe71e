//! Times the shapes that kernels declare.

use std::time::{SystemTime, UNIX_EPOCH};

use gpu_kernels::case::AnyKernel;
use gpu_kernels::driver::{DeviceInfo, Driver};
use gpu_kernels::modules::Modules;
use gpu_kernels::ptx::{self, PtxModule};
use gpu_kernels::registry::KERNELS;
use serde_json::{Value, json};

use crate::options::{Options, write};
use crate::peaks::{self, Peaks};
use crate::row::{self, Row};
use crate::{BenchError, peer, timing};

/// Measures and prints; a shape that fails is printed as such and counted.
pub fn run(driver: &dyn Driver, options: &Options) -> Result<(), BenchError> {
    let info = driver.info();
    let mut modules = options.tier.map_or_else(Modules::new, Modules::of_tier);
    let peaks = peaks::measure(driver, &mut modules)?;
    println!("{}", describe(&info, &peaks));
    println!("{}", row::header());
    let (mut rows, mut failed) = (Vec::new(), 0);
    for kernel in KERNELS {
        if options.only.as_deref().is_some_and(|only| only != kernel.name()) {
            continue;
        }
        let usable = |module: &&PtxModule| {
            module.runs_on(info.sm) && options.tier.is_none_or(|only| only == module.tier)
        };
        let mut usable = ptx::MODULES.iter().filter(usable);
        if !usable.any(|module| kernel.tiers().has(module.tier, module.sm)) {
            println!("{:<14} skipped: no tier that runs here has it", kernel.name());
            continue;
        }
        for i in kernel.n_cases()..kernel.n_cases() + kernel.n_bench() {
            let label = kernel.label(i);
            let named =
                |filter: &String| kernel.name().contains(filter.as_str()) || label.contains(filter.as_str());
            if !options.filter.as_ref().is_none_or(named) {
                continue;
            }
            match measure(driver, &mut modules, *kernel, i, options.warm) {
                Ok(row) => {
                    if options.peer.is_none() {
                        println!("{}", row.text(&peaks));
                    }
                    rows.push(row);
                }
                Err(error) => {
                    failed += 1;
                    println!("{:<14} {label}: FAILED: {error}", kernel.name());
                }
            }
        }
    }
    if let Some(program) = &options.peer {
        peer::compare(program, &mut rows)?;
        for row in &rows {
            println!("{}", row.text(&peaks));
        }
    }
    let record = record(&info, &peaks, &rows);
    if let Some(path) = &options.json {
        write(path, &record)?;
    }
    if let Some(folder) = &options.record {
        write(&folder.join(slug(&info.name)).join("kernels.json"), &record)?;
    }
    if failed == 0 { Ok(()) } else { Err(BenchError::Failed { failed }) }
}

fn measure(
    driver: &dyn Driver,
    modules: &mut Modules,
    kernel: &dyn AnyKernel,
    i: usize,
    warm: bool,
) -> Result<Row, BenchError> {
    let timing = timing::time(driver, modules, &kernel.bench(i, i as u64), warm)?;
    Ok(Row {
        kernel: kernel.name().into(),
        label: kernel.label(i),
        timing,
        bytes: kernel.bytes(i),
        flops: kernel.flops(i),
        peer: kernel.peer(i),
        peer_ns: None,
    })
}

fn describe(info: &DeviceInfo, peaks: &Peaks) -> String {
    format!(
        "{}, sm_{}, {} SMs, driver {}; measured: copy {:.0} GB/s ({:.0} by datasheet), mma.sync s8 {:.0} TOP/s, f16 {:.0} TFLOP/s",
        info.name,
        info.sm,
        info.n_sm,
        info.driver_version,
        peaks.copy_bytes_per_s / 1e9,
        info.peak_bytes_per_s() as f64 / 1e9,
        peaks.s8_per_s / 1e12,
        peaks.f16_per_s / 1e12
    )
}

fn record(info: &DeviceInfo, peaks: &Peaks, rows: &[Row]) -> Value {
    let mut record = head(info);
    record["peaks"] = json!({
        "copy_gbps": (peaks.copy_bytes_per_s / 1e9).round(),
        "mma_s8_tops": (peaks.s8_per_s / 1e12).round(),
        "mma_f16_tflops": (peaks.f16_per_s / 1e12).round(),
    });
    record["rows"] = rows.iter().map(Row::json).collect();
    record
}

/// What every record begins with: where and when.
pub(crate) fn head(info: &DeviceInfo) -> Value {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    json!({
        "device": info.name,
        "sm": info.sm,
        "driver_version": info.driver_version,
        // Set by xtask, which knows the checkout.
        "commit": option_env!("RUNIK_COMMIT"),
        "unix_time": seconds,
    })
}

/// A device's name as a folder's: `nvidia-h100-80gb-hbm3`.
fn slug(name: &str) -> String {
    let letters = name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' });
    letters.collect::<String>().split('-').filter(|part| !part.is_empty()).collect::<Vec<_>>().join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_names_its_folder() {
        assert_eq!(slug("NVIDIA H100 80GB HBM3"), "nvidia-h100-80gb-hbm3");
    }
}
