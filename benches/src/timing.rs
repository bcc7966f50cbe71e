//! How long a problem takes on the device.
//!
//! The launches are captured many times over into one graph, so that the host's part is not measured; each copy works on
//! a set of buffers of its own, and there are as many sets as it takes to fill the second-level cache three times. So a
//! launch finds its data in memory, as it does in a model. The time is the median over launches of the graph, by events.
//!
//! Several launches may be timed on the same sets of buffers, one after the other ([`Sets`]).

use gpu_kernels::case::{Buffer, Launches, Problem};
use gpu_kernels::driver::{Driver, DriverError, MemKind, StreamId};
use gpu_kernels::launch::{DevicePtr, Launch};
use gpu_kernels::modules::{FindModule, Modules};

use crate::BenchError;

const STREAM: StreamId = StreamId::DEFAULT;
/// How much larger than the cache all sets together are.
const CACHE_FILLS: u64 = 3;
/// Most sets: problems of a few kilobytes fit the cache however many there are.
const MAX_SETS: u64 = 128;
const MAX_REPEATS: usize = 512;

/// How much is done for one measurement.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// About what one graph should take: long beside the events' resolution of half a microsecond.
    graph_ns: f64,
    /// Graph launches that are timed.
    samples: usize,
    /// Repeats and samples of the graph by which a launch's time is estimated.
    first: (usize, usize),
}

impl Effort {
    /// For records.
    pub const FULL: Effort = Effort { graph_ns: 3e6, samples: 15, first: (8, 3) };
    /// For comparisons of many: to about a hundredth, in some 10 ms.
    pub const QUICK: Effort = Effort { graph_ns: 1e6, samples: 5, first: (2, 1) };
}

/// One measurement.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Median time of the problem's launches.
    pub ns: f64,
    /// Shortest.
    pub min_ns: f64,
    /// Whether the data came from memory, not from the cache.
    pub cold: bool,
}

/// Memory that goes with its owner.
struct Buffers<'a> {
    driver: &'a dyn Driver,
    at: Vec<DevicePtr>,
}

impl Buffers<'_> {
    fn alloc(&mut self, bytes: u64) -> Result<DevicePtr, DriverError> {
        let at = self.driver.alloc(MemKind::Device, bytes)?;
        self.at.push(at);
        Ok(at)
    }
}

impl Drop for Buffers<'_> {
    fn drop(&mut self) {
        for &at in &self.at {
            // The error that matters was already reported by what used the memory.
            let _ = self.driver.free(at);
        }
    }
}

/// Sets of a problem's buffers.
pub struct Sets<'a> {
    buffers: Buffers<'a>,
    /// Addresses of each.
    sets: Vec<Vec<DevicePtr>>,
    cold: bool,
}

impl Sets<'_> {
    /// As many sets as fill the cache, or if `warm` one.
    pub fn new<'a>(driver: &'a dyn Driver, contents: &[Buffer], warm: bool) -> Result<Sets<'a>, BenchError> {
        let sizes: Vec<u64> = contents.iter().map(bytes).collect();
        let set_bytes = sizes.iter().sum::<u64>().max(1);
        let cache = u64::from(driver.info().l2_bytes) * CACHE_FILLS;
        let n_sets = if warm { 1 } else { cache.div_ceil(set_bytes).clamp(1, MAX_SETS) };
        let mut buffers = Buffers { driver, at: Vec::new() };
        let mut sets: Vec<Vec<DevicePtr>> = Vec::new();
        for _ in 0..n_sets {
            let mut set = Vec::new();
            for (i, (buffer, &bytes)) in contents.iter().zip(&sizes).enumerate() {
                let at = buffers.alloc(bytes)?;
                match (buffer, sets.first()) {
                    (_, Some(first)) => driver.copy(at, first[i], bytes, STREAM)?,
                    (Buffer::Input(data) | Buffer::Changed(data, _), None) => {
                        driver.write(at, data, STREAM)?
                    }
                    (Buffer::Output(_), None) => driver.fill(at, 0, bytes, STREAM)?,
                }
                set.push(at);
            }
            sets.push(set);
        }
        Ok(Sets { buffers, sets, cold: n_sets * set_bytes >= cache })
    }

    /// Times launches on them.
    pub fn time(
        &self,
        modules: &mut Modules,
        launches: &Launches,
        effort: Effort,
    ) -> Result<Timing, BenchError> {
        let driver = self.buffers.driver;
        // Load what is needed, and see that it runs.
        let mut with_modules = Vec::new();
        for set in &self.sets {
            let find = |launch: Launch| Ok((modules.find_module(driver, launch.entry)?, launch));
            let launches = launches(set)?.into_iter();
            with_modules.push(launches.map(find).collect::<Result<Vec<_>, DriverError>>()?);
        }
        let run = |repeats: usize| -> Result<(), DriverError> {
            let rounds = with_modules.iter().cycle().take(repeats);
            rounds.flatten().try_for_each(|(module, launch)| driver.launch(*module, launch, STREAM))
        };
        let n_sets = with_modules.len();
        run(n_sets)?;
        driver.synchronise(STREAM)?;
        // Twice, since the first graph's launch also uploads it.
        let Effort { graph_ns, samples, first: (first_repeats, first_samples) } = effort;
        let (one_ns, _) = timed_graph(driver, &run, n_sets.max(first_repeats), first_samples)?;
        let repeats = ((graph_ns / one_ns) as usize).clamp(n_sets.max(2), MAX_REPEATS);
        let (ns, min_ns) = timed_graph(driver, &run, repeats, samples)?;
        Ok(Timing { ns, min_ns, cold: self.cold })
    }
}

/// Times a problem; `warm` repeats it on one set of buffers.
pub fn time(
    driver: &dyn Driver,
    modules: &mut Modules,
    problem: &Problem,
    warm: bool,
) -> Result<Timing, BenchError> {
    Sets::new(driver, &problem.buffers, warm)?.time(modules, &problem.launches, Effort::FULL)
}

fn bytes(buffer: &Buffer) -> u64 {
    match buffer {
        Buffer::Input(data) | Buffer::Changed(data, _) => data.len() as u64,
        Buffer::Output(expected) => expected.bytes() as u64,
    }
}

/// Median and minimum of the time per repeat.
fn timed_graph(
    driver: &dyn Driver,
    run: &dyn Fn(usize) -> Result<(), DriverError>,
    repeats: usize,
    samples: usize,
) -> Result<(f64, f64), DriverError> {
    driver.begin_capture(STREAM)?;
    let captured = run(repeats);
    let graph = driver.end_capture(STREAM)?;
    let timed = captured.and_then(|()| {
        driver.launch_graph(graph, STREAM)?;
        let mut times = Vec::with_capacity(samples);
        for _ in 0..samples {
            let start = driver.record(STREAM)?;
            driver.launch_graph(graph, STREAM)?;
            let end = driver.record(STREAM)?;
            driver.synchronise(STREAM)?;
            times.push(driver.elapsed_ns(start, end)? as f64 / repeats as f64);
            driver.release(start)?;
            driver.release(end)?;
        }
        Ok(median_and_min(times))
    });
    driver.release_graph(graph)?;
    timed
}

fn median_and_min(mut times: Vec<f64>) -> (f64, f64) {
    times.sort_by(f64::total_cmp);
    (times[times.len() / 2], times[0])
}

#[cfg(test)]
mod tests {
    use gpu_kernels::emu::{Emulator, Options};
    use gpu_kernels::registry;

    use super::*;

    #[test]
    fn a_problem_is_timed_and_nothing_is_left_behind() {
        let emulator = Emulator::new(Options::default());
        let kernel = registry::find("softmax").unwrap();
        let timing = time(&emulator, &mut Modules::new(), &kernel.bench(0, 1), false).unwrap();
        assert!(timing.ns >= timing.min_ns && timing.min_ns > 0.0);
        assert_eq!(median_and_min(vec![3.0, 1.0, 2.0]), (2.0, 1.0));
    }
}
