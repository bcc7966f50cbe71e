//! The GPUs of this machine, for `doctor`.

#[cfg(feature = "cuda")]
use engine::backends::cuda::hosted::{self, DeviceInfo};
use serde_json::Value;
#[cfg(feature = "cuda")]
use {crate::ui, serde_json::json};

/// Each GPU as a line of text and as JSON, or why there is none.
pub fn devices() -> Result<Vec<(String, Value)>, String> {
    #[cfg(feature = "cuda")]
    {
        hosted::devices().map_err(|error| error.to_string()).map(|devices| {
            let with_number = devices.iter().enumerate();
            with_number.map(|(index, device)| (text(index, device), json(index, device))).collect()
        })
    }
    #[cfg(not(feature = "cuda"))]
    Err("built without the feature cuda".to_owned())
}

#[cfg(feature = "cuda")]
fn text(index: usize, device: &DeviceInfo) -> String {
    format!(
        "cuda:{index}, {}, sm_{}, {} SMs, {}, L2 {}, {:.0} GB/s at most, driver for CUDA {}.{}, {}",
        device.name,
        device.sm,
        device.n_sm,
        ui::bytes(device.memory_bytes),
        ui::bytes(device.l2_bytes),
        device.peak_bytes_per_s() as f64 / 1e9,
        device.driver_version / 1000,
        device.driver_version % 1000 / 10,
        device.pci,
    )
}

#[cfg(feature = "cuda")]
fn json(index: usize, device: &DeviceInfo) -> Value {
    json!({
        "device": format!("cuda:{index}"),
        "name": device.name,
        "pci": device.pci,
        "sm": device.sm,
        "n_sm": device.n_sm,
        "memory_bytes": device.memory_bytes,
        "l2_bytes": device.l2_bytes,
        "smem_per_cta_bytes": device.smem_per_cta_bytes,
        "clock_khz": device.clock_khz,
        "peak_gbps": (device.peak_bytes_per_s() as f64 / 1e9).round(),
        "driver_version": device.driver_version,
    })
}
