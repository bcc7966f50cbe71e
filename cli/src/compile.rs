//! Kernels that the driver has not compiled yet: it compiles one at a time in a process, some 20 for a prompt and a token,
//! in 4 seconds. Several processes compile as many at a time, and the driver's cache on disk has them for all.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Result, bail};
use engine::backends::cuda::{PtxModule, load_kernels};

use crate::args::{CompileKernelsArgs, Device};
use crate::device;

/// Most processes at a time.
const MAX_PROCESSES: usize = 8;
/// What a process takes of the GPU's memory, with room to spare.
const BYTES_OF_PROCESS: u64 = 1 << 30;
/// A kernel that took longer to load was compiled: on an H100's host the shortest takes 12 ms, and from the cache none
/// takes 2.
const FROM_CACHE: Duration = Duration::from_millis(8);

/// Whether a kernel that took so long to load was compiled.
pub fn was_compiled(elapsed: Duration) -> bool {
    elapsed > FROM_CACHE
}

/// Processes that load kernels. What fails there is left to this process, which then says why.
pub struct Elsewhere(Vec<Child>);

impl Elsewhere {
    /// Lets other processes load kernels for a GPU that has so much free memory.
    pub fn start(gpu: &str, free_bytes: u64, kernels: impl Iterator<Item = &'static PtxModule>) -> Elsewhere {
        let mut children = Elsewhere(Vec::new());
        // Without a cache it would be in vain.
        let no_cache = std::env::var_os("CUDA_CACHE_DISABLE").is_some_and(|value| value != "0");
        let Ok(program) = std::env::current_exe() else { return children };
        if no_cache {
            return children;
        }
        let n_cores = std::thread::available_parallelism().map_or(1, usize::from);
        let fit = usize::try_from(free_bytes / BYTES_OF_PROCESS).unwrap_or(usize::MAX);
        let kernels = kernels.map(|kernel| (kernel.entry, kernel.packed_text_bytes())).collect();
        for entries in shares(kernels, MAX_PROCESSES.min(n_cores).min(fit)) {
            let mut child = Command::new(&program);
            child.args(["compile-kernels", "--device", gpu]).args(entries);
            child.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            children.0.extend(child.spawn());
        }
        children
    }

    /// Waits for them.
    pub fn wait(self) {
        for mut child in self.0 {
            let _ = child.wait();
        }
    }
}

/// Deals kernels of these sizes out to at most `n` processes: the largest first, each to whoever has least.
fn shares(mut kernels: Vec<(&'static str, usize)>, n: usize) -> Vec<Vec<&'static str>> {
    kernels.sort_by_key(|&(_, bytes)| std::cmp::Reverse(bytes));
    let mut shares = vec![(0, Vec::new()); n.min(kernels.len())];
    for (entry, bytes) in kernels {
        if let Some((sum, entries)) = shares.iter_mut().min_by_key(|(sum, _)| *sum) {
            *sum += bytes;
            entries.push(entry);
        }
    }
    shares.into_iter().map(|(_, entries)| entries).collect()
}

/// What such a process does.
pub fn run(args: &CompileKernelsArgs) -> Result<()> {
    let Device::Cuda(index) = args.device else { bail!("--device: expected cuda:I, got {}", args.device) };
    match device::open(index) {
        Ok(gpu) => load_kernels(&gpu, args.entries.iter().map(String::as_str)),
        Err(why) => bail!("{}: {why}", args.device),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_dealt_out_by_size() {
        let kernels = vec![("a", 1), ("b", 5), ("c", 3), ("d", 2), ("e", 4)];
        assert_eq!(shares(kernels, 2), [vec!["b", "d", "a"], vec!["e", "c"]]);
        assert_eq!(shares(vec![("a", 1)], 8), [["a"]]);
        assert!(shares(Vec::new(), 8).is_empty());
        assert!(shares(vec![("a", 1)], 0).is_empty());
    }
}
