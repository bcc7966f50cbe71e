//! Every case of every kernel at every tier against its reference.
//!
//! A bad access of a kernel ends its process's use of the device, so each kernel runs in a child process, which tells of
//! each case in a line; if it dies or hangs, the case counts as failed and a new child goes on after it. Children start
//! with an empty compute cache, so that the time to compile a module is measured as a user sees it first (with `--jobs`
//! several kernels are under way, and that time is longer).

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use engine::backends::cuda::hosted::{self, Hosted};
use gpu_kernels::case::{self, AnyKernel};
use gpu_kernels::driver::Driver;
use gpu_kernels::modules::Modules;
use gpu_kernels::ptx::{self, PtxModule};
use gpu_kernels::registry::{self, KERNELS};
use serde_json::{Value, json};

use crate::BenchError;
use crate::args::Args;
use crate::error::is_lost;
use crate::options::{Options, tiers, write};

/// The option that makes the program a child.
pub const CHILD: &str = "--child";
/// A child that says nothing for so long hangs: a case takes milliseconds, a module seconds to compile.
const SILENCE: Duration = Duration::from_secs(120);
/// Modules compiled at a time.
const COMPILERS: usize = 8;
/// Failures shown per kernel and tier; the count tells of the others.
const SHOWN: usize = 4;

/// What is known of one kernel at one tier.
#[derive(Debug, Default)]
struct TierResult {
    passed: usize,
    worst: f64,
    failures: Vec<String>,
    modules: usize,
    first_ms: f64,
    cached_ms: f64,
    slowest_ms: f64,
}

/// Runs all kernels, prints a table, fails if a case failed.
pub fn run(device: u32, options: &Options) -> Result<(), BenchError> {
    let info = hosted::devices()?.get(device as usize).cloned();
    let info = info.ok_or_else(|| BenchError::Usage(format!("there is no device {device}")))?;
    let runs = |tier: &&str| ptx::runs(tier, info.sm);
    let wanted = |tier: &&str| options.tier.is_none_or(|only| only == *tier);
    let tiers: Vec<&str> = tiers().into_iter().filter(runs).filter(wanted).collect();
    if tiers.is_empty() {
        return Err(BenchError::Usage(format!("no embedded tier runs on sm_{}", info.sm)));
    }
    println!("{}, sm_{}, driver {}, tiers {}", info.name, info.sm, info.driver_version, tiers.join(" "));
    println!(
        "{:<16} {:<8} {:>7} {:>7} {:>10} {:>8} {:>9} {:>10} {:>10}",
        "kernel", "tier", "passed", "failed", "worst nmse", "modules", "jit ms", "slowest ms", "cached ms"
    );
    let cache = std::env::temp_dir().join(format!("gpu-test-cache-{}", std::process::id()));
    let mut kernels: Vec<&dyn AnyKernel> = KERNELS
        .iter()
        .copied()
        .filter(|kernel| options.only.as_deref().is_none_or(|only| only == kernel.name()))
        .collect();
    // What takes longest, to compile and to run, comes first.
    let n_modules = |kernel: &&dyn AnyKernel| ptx::MODULES.iter().filter(|m| m.file == kernel.name()).count();
    kernels.sort_by_key(|kernel| Reverse(n_modules(kernel)));
    let (next, done) = (AtomicUsize::new(0), Mutex::new((0, Vec::new())));
    let one = |kernel: &dyn AnyKernel| -> Result<(), BenchError> {
        let has = |tier: &&&str| {
            ptx::MODULES
                .iter()
                .any(|module| module.tier == **tier && kernel.tiers().has(module.tier, module.sm))
        };
        let tiers: Vec<&str> = tiers.iter().filter(has).copied().collect();
        if tiers.is_empty() {
            println!("{:<16} skipped: none of these tiers has it", kernel.name());
            return Ok(());
        }
        // A cache each: children that share one wait for each other.
        let results = kernel_in_children(device, kernel, &tiers, &cache.join(kernel.name()))?;
        let mut done = done.lock().unwrap_or_else(|poison| poison.into_inner());
        for tier in &tiers {
            let Some(result) = results.get(tier) else { continue };
            println!("{}", line(kernel.name(), tier, result));
            for failure in result.failures.iter().take(SHOWN) {
                println!("    {failure}");
            }
            done.0 += result.failures.len();
            done.1.push(json(kernel.name(), tier, result));
        }
        Ok(())
    };
    let worker = || {
        while let Some(kernel) = kernels.get(next.fetch_add(1, Ordering::Relaxed)) {
            one(*kernel)?;
        }
        Ok(())
    };
    let ended: Vec<Result<(), BenchError>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..options.jobs.max(1)).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().map(|worker| worker.join().expect("a worker does not panic")).collect()
    });
    ended.into_iter().collect::<Result<(), _>>()?;
    let (failed, all) = done.into_inner().unwrap_or_else(|poison| poison.into_inner());
    // Only our own files; a leftover is a nuisance, not an error.
    let _ = std::fs::remove_dir_all(&cache);
    if options.only.as_deref().is_some_and(|only| registry::find(only).is_none()) {
        return Err(BenchError::Usage(format!("no kernel is called {:?}", options.only)));
    }
    println!("{failed} failed");
    if let Some(path) = &options.json {
        write(path, &json!({ "device": info.name, "driver_version": info.driver_version, "results": all }))?;
    }
    if failed == 0 { Ok(()) } else { Err(BenchError::Failed { failed }) }
}

fn line(kernel: &str, tier: &str, result: &TierResult) -> String {
    let TierResult { passed, worst, failures, modules, first_ms, cached_ms, slowest_ms } = result;
    format!(
        "{kernel:<16} {tier:<8} {passed:>7} {:>7} {worst:>10.1e} {modules:>8} {first_ms:>9.0} {slowest_ms:>10.0} {cached_ms:>10.1}",
        failures.len()
    )
}

fn json(kernel: &str, tier: &str, result: &TierResult) -> Value {
    json!({
        "kernel": kernel,
        "tier": tier,
        "passed": result.passed,
        "failed": result.failures,
        "worst_nmse": result.worst,
        "modules": result.modules,
        "jit_ms": result.first_ms,
        "jit_slowest_ms": result.slowest_ms,
        "jit_cached_ms": result.cached_ms,
    })
}

/// Runs one kernel in as many children as it takes.
fn kernel_in_children(
    device: u32,
    kernel: &dyn AnyKernel,
    tiers: &[&'static str],
    cache: &Path,
) -> Result<BTreeMap<&'static str, TierResult>, BenchError> {
    let program = std::env::current_exe().map_err(BenchError::io("find this program"))?;
    let mut results: BTreeMap<&str, TierResult> =
        tiers.iter().map(|tier| (*tier, TierResult::default())).collect();
    // The next check, counted over cases and, within a case, tiers. Without tiers there is none.
    let (mut next, n_checks) = (0, kernel.n_cases() * tiers.len());
    while next < n_checks {
        let mut command = Command::new(&program);
        command.args([CHILD, kernel.name(), "--device", &device.to_string(), "--from", &next.to_string()]);
        command.args(["--tiers", &tiers.join(",")]);
        command.env("CUDA_CACHE_PATH", cache).env("CUDA_CACHE_MAXSIZE", (4u64 << 30).to_string());
        let mut child = command.stdout(Stdio::piped()).spawn().map_err(BenchError::io("start a child"))?;
        let (send, receive) = mpsc::channel();
        let stdout = child.stdout.take();
        let reader = std::thread::spawn(move || {
            for line in
                stdout.into_iter().flat_map(|stdout| BufReader::new(stdout).lines()).map_while(Result::ok)
            {
                if send.send(line).is_err() {
                    break;
                }
            }
        });
        let mut hangs = false;
        loop {
            match receive.recv_timeout(SILENCE) {
                Ok(line) => next = enter(&mut results, &line, next, tiers),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    hangs = true;
                    child.kill().map_err(BenchError::io("stop a child"))?;
                    break;
                }
            }
        }
        let status = child.wait().map_err(BenchError::io("wait for a child"))?;
        // A reader that panicked would only have read less.
        let _ = reader.join();
        if next < n_checks && !status.success() {
            let (case, tier) = (next / tiers.len(), tiers[next % tiers.len()]);
            // A fault that the child still told of has been entered and `next` is beyond it.
            if status.code() != Some(LOST_CODE) {
                let how = if hangs { "hangs".into() } else { format!("died ({status})") };
                if let Some(result) = results.get_mut(tier) {
                    result.failures.push(format!("case {case} {}: {how}", kernel.label(case)));
                }
                next += 1;
            }
        } else if next < n_checks {
            return Err(BenchError::Peer(format!("{}: a child ended early at check {next}", kernel.name())));
        }
    }
    Ok(results)
}

/// How a child ends whose device is lost.
const LOST_CODE: i32 = 3;

/// Enters one line of a child; returns the next check.
fn enter(results: &mut BTreeMap<&str, TierResult>, line: &str, next: usize, tiers: &[&str]) -> usize {
    let fields: Vec<&str> = line.split('\t').collect();
    let number = |text: &str| text.parse::<f64>().unwrap_or(f64::NAN);
    match fields[..] {
        ["load", tier, modules, first, cached, slowest] => {
            if let Some(result) = results.get_mut(tier) {
                // A second child finds the cache filled.
                if result.modules == 0 {
                    result.modules = number(modules) as usize;
                    result.first_ms = number(first);
                    result.cached_ms = number(cached);
                    result.slowest_ms = number(slowest);
                }
            }
            next
        }
        ["pass", check, nmse] => {
            let check: usize = check.parse().unwrap_or(next);
            if let Some(result) = results.get_mut(tiers[check % tiers.len()]) {
                result.passed += 1;
                result.worst = result.worst.max(number(nmse));
            }
            check + 1
        }
        ["fail", check, what] => {
            let check: usize = check.parse().unwrap_or(next);
            if let Some(result) = results.get_mut(tiers[check % tiers.len()]) {
                result.failures.push(what.to_string());
            }
            check + 1
        }
        _ => next,
    }
}

/// The child: loads the kernel's modules of all tiers, then runs the checks from one on.
pub fn child(device: u32, kernel: &str, args: &mut Args) -> Result<(), BenchError> {
    let unknown = || BenchError::Usage(format!("no kernel is called {kernel}"));
    let kernel = registry::find(kernel).ok_or_else(unknown)?;
    let from = args.number("--from")?.unwrap_or(0) as usize;
    let names = args.value("--tiers")?.unwrap_or_default();
    let tiers: Vec<&str> =
        tiers().into_iter().filter(|tier| names.split(',').any(|name| name == *tier)).collect();
    let driver = Hosted::open(device)?;
    for tier in &tiers {
        load(&driver, kernel, tier);
    }
    let mut modules: Vec<Modules> = tiers.iter().map(|tier| Modules::of_tier(tier)).collect();
    for case in from / tiers.len()..kernel.n_cases() {
        let problem = kernel.problem(case, case as u64);
        for (i, modules) in modules.iter_mut().enumerate() {
            let check = case * tiers.len() + i;
            if check < from {
                continue;
            }
            match case::run(&driver, &mut *modules, &problem, kernel.nmse_max()) {
                Ok(nmse) => println!("pass\t{check}\t{nmse:e}"),
                Err(error) => {
                    let text =
                        format!("case {case} {}: {error}", kernel.label(case)).replace(['\t', '\n'], " ");
                    println!("fail\t{check}\t{text}");
                    if is_lost(&error) {
                        std::process::exit(LOST_CODE);
                    }
                }
            }
        }
    }
    Ok(())
}

/// Loads the modules of the kernel's file for a tier twice and tells how long it took. One that does not load fails its cases later.
fn load(driver: &Hosted, kernel: &dyn AnyKernel, tier: &str) {
    let is_used = |module: &&PtxModule| module.tier == tier && module.file == kernel.name();
    let modules: Vec<&PtxModule> = ptx::MODULES.iter().filter(is_used).collect();
    let (first, slowest) = load_all(driver, &modules, COMPILERS);
    let (cached, _) = load_all(driver, &modules, COMPILERS);
    println!("load\t{tier}\t{}\t{first}\t{cached}\t{slowest}", modules.len());
}

/// Milliseconds for all modules by so many threads, and for the slowest of them.
pub(crate) fn load_all(driver: &Hosted, modules: &[&PtxModule], n_threads: usize) -> (f64, f64) {
    let (next, slowest) = (AtomicUsize::new(0), Mutex::new(0.0f64));
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..n_threads.min(modules.len()) {
            scope.spawn(|| {
                while let Some(module) = modules.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let start = Instant::now();
                    if let Ok(id) = driver.load(module) {
                        let ms = start.elapsed().as_secs_f64() * 1e3;
                        // The module is ours alone.
                        let _ = driver.unload(id);
                        let mut slowest = slowest.lock().unwrap_or_else(|poison| poison.into_inner());
                        *slowest = slowest.max(ms);
                    }
                }
            });
        }
    });
    let slowest = *slowest.lock().unwrap_or_else(|poison| poison.into_inner());
    (start.elapsed().as_secs_f64() * 1e3, slowest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_a_child_are_entered_where_they_belong() {
        let tiers = ["sm_80", "sm_90a"];
        let mut results: BTreeMap<&str, TierResult> =
            tiers.iter().map(|tier| (*tier, TierResult::default())).collect();
        let mut next = 0;
        for line in [
            "load\tsm_90a\t3\t70.5\t1.5\t40",
            "load\tsm_90a\t3\t2\t2\t2",
            "pass\t0\t1e-9",
            "fail\t1\tcase 0 x: wrong",
            "a word of the driver's",
            "pass\t2\t2e-9",
        ] {
            next = enter(&mut results, line, next, &tiers);
        }
        assert_eq!(next, 3);
        let (old, new) = (&results["sm_80"], &results["sm_90a"]);
        assert_eq!((old.passed, old.worst, old.failures.len(), old.modules), (2, 2e-9, 0, 0));
        assert_eq!((new.passed, new.failures.as_slice()), (0, &["case 0 x: wrong".to_string()][..]));
        assert_eq!((new.modules, new.first_ms), (3, 70.5));
    }
}
