//! Thread pools as [`Executor`]s: our own, made for regions of a few microseconds, and rayon's for bulk work.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use crate::executor::Executor;
use crate::workers::{MAX_WORKERS, Parking, Workers};

/// How long an idle worker spins before it sleeps: longer than the gap between two regions of a step, shorter than
/// anybody notices.
const SPIN: Duration = Duration::from_micros(100);

/// Sleeping threads, by worker; each enters itself when it starts.
struct Threads(Box<[OnceLock<Thread>]>);

impl Parking for Threads {
    fn spin(&self, go_on: &dyn Fn() -> bool) {
        let start = Instant::now();
        while start.elapsed() <= SPIN {
            // The clock costs more than a look at the state.
            for _ in 0..64 {
                if go_on() {
                    return;
                }
                std::hint::spin_loop();
            }
        }
    }

    fn park(&self, _worker: usize, go_on: &dyn Fn() -> bool) {
        if !go_on() {
            std::thread::park();
        }
    }

    fn unpark(&self, worker: usize) {
        // A worker that is not entered yet does not sleep yet.
        if let Some(thread) = self.0[worker].get() {
            thread.unpark();
        }
    }

    fn yield_now(&self) {
        std::thread::yield_now();
    }
}

/// `n` threads: the caller and `n − 1` workers, which spin briefly between regions and then sleep.
///
/// A region that is started while another runs (from a task, or by another thread) runs on its caller alone. A panic of a
/// task ends the region early and goes on in the caller.
pub struct Pool {
    workers: Arc<Workers<Threads>>,
    handles: Vec<JoinHandle<()>>,
}

impl Pool {
    /// A pool of `n_threads` (at least one, the caller).
    pub fn new(n_threads: usize) -> std::io::Result<Pool> {
        let n_workers = n_threads.clamp(1, MAX_WORKERS + 1) - 1;
        let threads = Threads((0..n_workers).map(|_| OnceLock::new()).collect());
        let workers = Arc::new(Workers::new(n_workers, threads));
        let mut pool = Pool { workers, handles: Vec::with_capacity(n_workers) };
        for me in 0..n_workers {
            let workers = Arc::clone(&pool.workers);
            let work = move || {
                workers.parking().0[me].get_or_init(std::thread::current);
                workers.work(me);
            };
            // On failure `pool` is dropped, which stops the workers that did start.
            let handle = std::thread::Builder::new().name(format!("runik-{}", me + 1)).spawn(work)?;
            pool.handles.push(handle);
        }
        Ok(pool)
    }
}

impl Executor for Pool {
    fn n_threads(&self) -> usize {
        self.workers.n_threads()
    }

    fn run(&self, n_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let panicked = AtomicBool::new(false);
        let panic: Mutex<Option<Box<dyn Any + Send>>> = Mutex::new(None);
        self.workers.run(n_tasks, &|i| {
            if panicked.load(Ordering::Relaxed) {
                return;
            }
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| task(i))) {
                panicked.store(true, Ordering::Relaxed);
                panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(payload);
            }
        });
        if let Some(payload) = panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
            resume_unwind(payload);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.workers.stop();
        for handle in self.handles.drain(..) {
            // A worker's panics were caught and handed on; there is nothing left to report.
            let _ = handle.join();
        }
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("n_threads", &self.n_threads()).finish()
    }
}

/// Rayon's global pool: for bulk work such as quantising a file, where regions are long.
#[derive(Clone, Copy, Debug, Default)]
pub struct RayonExecutor;

impl Executor for RayonExecutor {
    fn n_threads(&self) -> usize {
        rayon::current_num_threads()
    }

    fn run(&self, n_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        use rayon::prelude::*;
        (0..n_tasks).into_par_iter().for_each(task);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        for n_threads in [1, 4] {
            let pool = Pool::new(n_threads).unwrap();
            for round in 0..50 {
                let caught = catch_unwind(AssertUnwindSafe(|| {
                    pool.run(8, &|i| assert!(i != round % 8, "task {i} of round {round}"));
                }));
                let message = caught.unwrap_err().downcast::<String>().unwrap();
                assert_eq!(*message, format!("task {} of round {round}", round % 8));
                let done = AtomicUsize::new(0);
                pool.run(8, &|_| {
                    done.fetch_add(1, Ordering::Relaxed);
                });
                assert_eq!(done.into_inner(), 8);
            }
        }
    }
}
