//! Kernels on the CPU: every CUDA thread of a CTA is a coroutine, a scheduler runs barriers and warp collectives, and
//! every access is checked.
//!
//! Found, with file and line: races in shared and global memory, barriers that not all threads reach or that a warp
//! reaches at two places, collectives that lanes do not call together, reads of memory that was never written, accesses
//! out of bounds or misaligned, reads of an asynchronous copy or product before it was waited for, missing fences between
//! threads and the tensor cores or the copy engine, memory touched before earlier launches were waited for, deadlocks.
//!
//! Not found: faults of the compiler (the PTX rules and ptxas are for those), weak-memory reorderings, timing.
//!
//! * [`lane`]: what the device layer's host twins call; the running thread.
//! * `cta`: one CTA's threads and their scheduler. `clock`: who is ordered after whom. `smem`, [`memory`]: shared and
//!   global memory with shadows. `collective`: the arithmetic of warp-wide operations.
//! * [`driver`]: the emulator as a [`Driver`](crate::driver::Driver).
//!
//! CTAs run on all cores. A race between CTAs is found however they are scheduled: every access leaves a mark that lasts
//! as long as the launch.

mod clock;
mod collective;
mod cta;
pub mod driver;
#[cfg(test)]
mod hopper_tests;
pub mod lane;
pub mod memory;
mod smem;
#[cfg(test)]
mod tests;
pub mod wgmma;

use std::format;
use std::string::String;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::vec::Vec;

use crate::driver::DriverError;
use crate::launch::{Launch, ParamReader};
pub use driver::Emulator;
use memory::{LaunchMarks, Memory};

/// A kernel that the emulator can run; the `kernels!` macro makes these.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Name in the PTX.
    pub name: &'static str,
    /// Launch bound: threads per CTA.
    pub max_threads: u32,
    /// Runs one thread: reads the arguments and calls the kernel.
    pub run: fn(&mut ParamReader<'_>),
    /// Bytes of its parameters.
    pub params_bytes: fn() -> usize,
}

/// How to run.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Look for races. Off for whole models: bounds and initialisation are still checked.
    pub races: bool,
    /// Rotates the order in which threads run; results must not depend on it.
    pub seed: u64,
    /// CTAs at a time; 0 for the number of cores.
    pub workers: usize,
    /// Compute capability, times ten, that the driver reports: callers choose kernels by it.
    pub sm: u32,
}

impl Default for Options {
    fn default() -> Options {
        Options { races: true, seed: 1, workers: 0, sm: 80 }
    }
}

/// Most findings that a launch reports.
const MAX_FINDINGS: usize = 8;
/// Largest cluster that every GPU of sm_90 runs.
const MAX_CLUSTER: u32 = 8;
/// Largest shared memory of a CTA (sm_90).
pub(crate) const MAX_SMEM_BYTES: u32 = 227 * 1024;

/// Runs a launch to the end, or to the first CTA with findings.
pub fn run(
    entry: &Entry,
    launch: &Launch,
    memory: &Arc<Memory>,
    options: Options,
) -> Result<(), DriverError> {
    let refuse = |what: String| Err(DriverError::Launch { entry: launch.entry, what });
    if launch.cta == 0 || launch.cta > entry.max_threads || !launch.cta.is_multiple_of(32) {
        let max = entry.max_threads;
        return refuse(format!("{} threads per CTA, expected a multiple of 32 up to {max}", launch.cta));
    }
    if launch.smem_bytes > MAX_SMEM_BYTES {
        return refuse(format!("{} bytes of shared memory, at most {MAX_SMEM_BYTES}", launch.smem_bytes));
    }
    if !(1..=MAX_CLUSTER).contains(&launch.cluster) || !launch.grid[0].is_multiple_of(launch.cluster) {
        return refuse(format!("clusters of {} CTAs in a grid of {:?}", launch.cluster, launch.grid));
    }
    let (expected, got) = ((entry.params_bytes)(), launch.params.bytes().len());
    if expected != got {
        return refuse(format!("{got} bytes of arguments, expected {expected}"));
    }
    let n_ctas = launch.grid.iter().map(|&n| u64::from(n)).product::<u64>();
    if n_ctas == 0 || n_ctas > u64::from(u32::MAX) {
        return refuse(format!("a grid of {:?}", launch.grid));
    }

    let marks = options.races.then(|| Arc::new(LaunchMarks::new()));
    let next = AtomicU64::new(0);
    let findings: Mutex<Vec<String>> = Mutex::new(Vec::new());
    let work = || {
        loop {
            let i = next.fetch_add(u64::from(launch.cluster), Ordering::Relaxed);
            if i >= n_ctas {
                break;
            }
            let [x, y, _] = launch.grid.map(u64::from);
            let idx = [i % x, i / x % y, i / (x * y)].map(|i| i as u32);
            let found = cta::run(entry, launch, idx, i as u32, memory, marks.as_ref(), options);
            if !found.is_empty() {
                // No CTA after this one starts.
                next.store(n_ctas, Ordering::Relaxed);
                findings.lock().unwrap_or_else(|poison| poison.into_inner()).extend(found);
            }
        }
    };
    let cores = || std::thread::available_parallelism().map_or(1, |n| n.get());
    let workers = if options.workers == 0 { cores() } else { options.workers };
    if workers == 1 || n_ctas == 1 {
        work();
    } else {
        std::thread::scope(|scope| {
            for _ in 0..workers.min(n_ctas as usize) {
                scope.spawn(work);
            }
        });
    }
    let mut findings = findings.into_inner().unwrap_or_else(|poison| poison.into_inner());
    if findings.is_empty() {
        return Ok(());
    }
    findings.truncate(MAX_FINDINGS);
    Err(DriverError::Kernel { entry: entry.name.into(), what: findings.join("; ") })
}
