//! What the device reaches at best, measured: the ceilings that rows are compared with.

use gpu_kernels::driver::{Driver, MemKind, StreamId};
use gpu_kernels::modules::Modules;
use gpu_kernels::registry;

use crate::BenchError;
use crate::timing;

/// Large beside every cache.
const COPY_BYTES: u64 = 1 << 30;
const COPIES: u32 = 10;

/// The peaks of one device.
#[derive(Clone, Copy, Debug)]
pub struct Peaks {
    /// Bytes a second of a copy within the device, read and written.
    pub copy_bytes_per_s: f64,
    /// Operations a second of `mma.sync` on bytes.
    pub s8_per_s: f64,
    /// Operations a second of `mma.sync` on f16.
    pub f16_per_s: f64,
}

/// Measures them.
pub fn measure(driver: &dyn Driver, modules: &mut Modules) -> Result<Peaks, BenchError> {
    let kernel = registry::find("peak").ok_or_else(|| BenchError::Usage("no kernel peak".into()))?;
    let mut per_s = |i: usize| -> Result<f64, BenchError> {
        let i = kernel.n_cases() + i;
        let timing = timing::time(driver, modules, &kernel.bench(i, 0), true)?;
        Ok(kernel.flops(i) as f64 / timing.min_ns * 1e9)
    };
    // In the order of the kernel's BENCH.
    let (s8_per_s, f16_per_s) = (per_s(0)?, per_s(1)?);
    Ok(Peaks { copy_bytes_per_s: copy(driver)?, s8_per_s, f16_per_s })
}

fn copy(driver: &dyn Driver) -> Result<f64, BenchError> {
    let (from, stream) = (driver.alloc(MemKind::Device, COPY_BYTES)?, StreamId::DEFAULT);
    let measured = driver.alloc(MemKind::Device, COPY_BYTES).and_then(|to| {
        let measured = (|| {
            driver.fill(from, 1, COPY_BYTES, stream)?;
            driver.copy(to, from, COPY_BYTES, stream)?;
            let start = driver.record(stream)?;
            for _ in 0..COPIES {
                driver.copy(to, from, COPY_BYTES, stream)?;
            }
            let end = driver.record(stream)?;
            driver.synchronise(stream)?;
            let ns = driver.elapsed_ns(start, end)?;
            driver.release(start)?;
            driver.release(end)?;
            Ok(2.0 * (COPY_BYTES * u64::from(COPIES)) as f64 / ns as f64 * 1e9)
        })();
        driver.free(to)?;
        measured
    });
    driver.free(from)?;
    Ok(measured?)
}
