//! What the machine offers: cores, memory, processor features, memory bandwidth.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::exit::usage;

/// More threads than this are a mistake.
const MAX_THREADS: usize = 1024;

/// Threads to use: what the user says, else one for each physical core that this process may use.
pub fn threads(asked: Option<usize>) -> Result<usize> {
    match asked {
        Some(n) if (1..=MAX_THREADS).contains(&n) => Ok(n),
        Some(n) => Err(usage(format!("--threads {n}: expected 1 to {MAX_THREADS}"))),
        None => Ok(physical_cores()),
    }
}

/// Hardware threads that this process may use.
pub fn logical_cores() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

/// Physical cores among them: two hardware threads of a core share its arithmetic units.
pub fn physical_cores() -> usize {
    let siblings = |cpu: usize| {
        let topology = format!("/sys/devices/system/cpu/cpu{cpu}/topology");
        let read = |file: &str| std::fs::read_to_string(format!("{topology}/{file}")).ok();
        Some((read("physical_package_id")?, read("core_id")?))
    };
    let cores: BTreeSet<_> = allowed_cpus().into_iter().filter_map(siblings).collect();
    if cores.is_empty() { logical_cores() } else { cores.len().min(logical_cores()) }
}

/// Processors that this process may run on, as Linux lists them: `0-3,8`.
fn allowed_cpus() -> Vec<usize> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let list = status.lines().find_map(|l| l.strip_prefix("Cpus_allowed_list:")).unwrap_or_default();
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.trim().parse::<usize>().ok()?..=last.trim().parse::<usize>().ok()?)
    };
    list.split(',').filter_map(range).flatten().take(1 << 14).collect()
}

/// Processor time that this process took so far, over all its threads; `None` where the system does not say.
pub fn processor_time() -> Option<Duration> {
    #[cfg(unix)]
    {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        Some(Duration::new(time.tv_sec.try_into().ok()?, time.tv_nsec.try_into().ok()?))
    }
    #[cfg(not(unix))]
    None
}

/// The processor's name.
pub fn cpu_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info
        .lines()
        .find_map(|l| l.strip_prefix("model name")?.split_once(':').map(|p| p.1.trim().to_owned()));
    name.unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

/// Processor features that kernels could use, and whether each is there.
pub fn cpu_features() -> Vec<(&'static str, bool)> {
    #[cfg(target_arch = "x86_64")]
    {
        macro_rules! features {
            ($($name:tt),*) => { vec![$(($name, std::arch::is_x86_feature_detected!($name))),*] };
        }
        features!(
            "avx",
            "avx2",
            "fma",
            "f16c",
            "bmi2",
            "avxvnni",
            "avx512f",
            "avx512bw",
            "avx512vnni",
            "avx512bf16"
        )
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        Vec::new()
    }
}

/// Memory of the machine and what is free for use, in bytes.
pub fn memory() -> Option<(u64, u64)> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let field = |name: &str| {
        let line = info.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?;
        line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
    };
    Some((field("MemTotal")?, field("MemAvailable")?))
}

/// Bytes of pinned memory that a model of so many bytes may take beside itself: pinned pages cannot be given to anybody
/// else, so a quarter of what is free is left, and the pages of the model's file are not counted as free.
pub fn pinnable(model_bytes: u64) -> u64 {
    let Some((_, available)) = memory() else { return 0 };
    let available = available.min(left_to_us().unwrap_or(u64::MAX));
    available.saturating_sub(model_bytes) / 4 * 3
}

/// Bytes that this process's control group may still take (version 2), files' pages counted as free.
fn left_to_us() -> Option<u64> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let root = Path::new("/sys/fs/cgroup");
    let left = |group: &Path| {
        let number = |file: &str| std::fs::read_to_string(group.join(file)).ok()?.trim().parse::<u64>().ok();
        let stat = std::fs::read_to_string(group.join("memory.stat")).ok()?;
        let of_files = stat.lines().find_map(|line| line.strip_prefix("file ")?.parse::<u64>().ok());
        // Without a limit the file says "max", and the root has none.
        let used = number("memory.current")?.saturating_sub(of_files.unwrap_or(0));
        Some(number("memory.max")?.saturating_sub(used))
    };
    root.join(own).ancestors().take_while(|group| group.starts_with(root)).filter_map(left).min()
}

/// Measured read bandwidth of memory in bytes per second: the best of a few passes of `threads` threads over a buffer
/// far larger than any cache.
pub fn read_bandwidth(threads: usize) -> f64 {
    const BYTES: usize = 512 << 20;
    const PASSES: usize = 4;
    let buffer = vec![1u64; BYTES / size_of::<u64>()];
    let chunk = buffer.len().div_ceil(threads.max(1));
    let pass = || {
        let started = Instant::now();
        std::thread::scope(|scope| {
            for part in buffer.chunks(chunk) {
                scope.spawn(move || {
                    // Eight sums, so that loads and not additions are what takes time.
                    let mut sums = [0u64; 8];
                    for eight in part.chunks_exact(8) {
                        sums.iter_mut().zip(eight).for_each(|(s, v)| *s = s.wrapping_add(*v));
                    }
                    std::hint::black_box(sums);
                });
            }
        });
        BYTES as f64 / started.elapsed().as_secs_f64()
    };
    (0..PASSES).map(|_| pass()).fold(0.0, f64::max)
}
