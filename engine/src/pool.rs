//! Thread pools as [`Executor`]s: our own, made for regions of a few microseconds, and rayon's for bulk work.
//!
//! A region is opened by publishing its tasks and an epoch in one atomic word; workers that are awake join, take task
//! numbers from a counter and leave; a worker that wakes up too late finds the region closed and never delays it.
//! Nothing is allocated and no thread is spawned after construction.
//!
//! `unsafe` is for one thing: workers hold a pointer to the region's closure, whose lifetime the type system cannot
//! see. It is alive while anyone has joined, because [`Executor::run`] returns only when all have left.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use crate::executor::Executor;

/// How long an idle worker spins before it sleeps: longer than the gap between two regions of a step, shorter than
/// anybody notices.
const SPIN: Duration = Duration::from_micros(100);

/// Workers that joined: the low bits of the state word.
const JOINED: u64 = (1 << 16) - 1;
/// Whether the region takes workers.
const OPEN: u64 = 1 << 16;
/// One epoch: the high bits.
const EPOCH: u64 = 1 << 17;

/// What a region runs.
#[derive(Clone, Copy)]
struct Region {
    task: *const (dyn Fn(usize) + Sync),
    n_tasks: usize,
}

struct Inner {
    /// Epoch, [`OPEN`] and the number of joined workers.
    state: AtomicU64,
    region: UnsafeCell<Option<Region>>,
    next: AtomicUsize,
    stop: AtomicBool,
    /// One per worker: whether it sleeps or is about to.
    asleep: Vec<AtomicBool>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `region` is written only by the holder of `Pool::running`, while no worker has joined and `OPEN` is unset; it
// is read only by joined workers. The task it points to is `Sync`.
unsafe impl Sync for Inner {}
// SAFETY: as above.
unsafe impl Send for Inner {}

impl Inner {
    /// Takes tasks until none is left; a panic ends the region early and is kept for the caller.
    fn work(&self, region: Region) {
        // SAFETY: the region is open or has this worker joined, so `run` has not returned and the closure lives.
        let task = unsafe { &*region.task };
        let result = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let i = self.next.fetch_add(1, Ordering::Relaxed);
                if i >= region.n_tasks {
                    break;
                }
                task(i);
            }
        }));
        if let Err(payload) = result {
            self.next.store(region.n_tasks, Ordering::Relaxed);
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(payload);
        }
    }

    fn worker(&self, me: usize) {
        let mut seen = 0;
        while !self.stop.load(Ordering::Acquire) {
            let state = self.state.load(Ordering::Acquire);
            if state / EPOCH == seen || state & OPEN == 0 {
                self.wait(me, state);
                continue;
            }
            if self.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                continue;
            }
            seen = state / EPOCH;
            // SAFETY: joined, so the region is set and nobody writes it.
            if let Some(region) = unsafe { *self.region.get() } {
                self.work(region);
            }
            self.state.fetch_sub(1, Ordering::Release);
        }
    }

    /// Until the state changes: spins, then sleeps.
    fn wait(&self, me: usize, state: u64) {
        let idle = || self.state.load(Ordering::Acquire) == state && !self.stop.load(Ordering::Acquire);
        let start = Instant::now();
        loop {
            for _ in 0..64 {
                if !idle() {
                    return;
                }
                std::hint::spin_loop();
            }
            if start.elapsed() > SPIN {
                break;
            }
        }
        self.asleep[me].store(true, Ordering::SeqCst);
        // Pairs with the fence in `wake`: either we see the new state, or the caller sees us asleep.
        fence(Ordering::SeqCst);
        while idle() && self.asleep[me].load(Ordering::SeqCst) {
            std::thread::park();
        }
        self.asleep[me].store(false, Ordering::SeqCst);
    }
}

/// `n` threads: the caller and `n − 1` workers, which spin briefly between regions and then sleep.
///
/// A region that is started while another runs (from a task, or by another thread) runs on its caller alone.
pub struct Pool {
    inner: Arc<Inner>,
    workers: Vec<(Thread, Option<JoinHandle<()>>)>,
    running: Mutex<()>,
}

impl Pool {
    /// A pool of `n_threads` (at least one, the caller).
    pub fn new(n_threads: usize) -> std::io::Result<Pool> {
        let n_workers = n_threads.clamp(1, JOINED as usize) - 1;
        let inner = Arc::new(Inner {
            state: AtomicU64::new(0),
            region: UnsafeCell::new(None),
            next: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            asleep: (0..n_workers).map(|_| AtomicBool::new(false)).collect(),
            panic: Mutex::new(None),
        });
        let mut pool = Pool { inner, workers: Vec::with_capacity(n_workers), running: Mutex::new(()) };
        for me in 0..n_workers {
            let inner = Arc::clone(&pool.inner);
            let name = format!("runik-{}", me + 1);
            // On failure `pool` is dropped, which stops the workers that did start.
            let handle = std::thread::Builder::new().name(name).spawn(move || inner.worker(me))?;
            pool.workers.push((handle.thread().clone(), Some(handle)));
        }
        Ok(pool)
    }

    fn wake(&self) {
        fence(Ordering::SeqCst);
        for (asleep, (thread, _)) in self.inner.asleep.iter().zip(&self.workers) {
            if asleep.swap(false, Ordering::SeqCst) {
                thread.unpark();
            }
        }
    }
}

impl Executor for Pool {
    fn n_threads(&self) -> usize {
        self.workers.len() + 1
    }

    fn run(&self, n_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let guard = match self.running.try_lock() {
            Ok(guard) if n_tasks > 1 && !self.workers.is_empty() => guard,
            _ => return (0..n_tasks).for_each(task),
        };
        let inner = &*self.inner;
        // SAFETY: only the lifetime changes; the pointer is used only until all workers have left, below.
        let task = unsafe {
            std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const (dyn Fn(usize) + Sync + 'static)>(
                task,
            )
        };
        let region = Region { task, n_tasks };
        // SAFETY: we hold `running`, and the previous region was closed and left by all.
        unsafe { *inner.region.get() = Some(region) };
        inner.next.store(0, Ordering::Relaxed);
        inner.state.fetch_add(EPOCH + OPEN, Ordering::AcqRel);
        self.wake();
        inner.work(region);
        inner.state.fetch_sub(OPEN, Ordering::AcqRel);
        let mut spins = 0u32;
        while inner.state.load(Ordering::Acquire) & JOINED != 0 {
            spins += 1;
            // A worker without a processor cannot finish its task: give it ours.
            if spins.is_multiple_of(4096) { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
        let panic = inner.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(guard);
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.inner.stop.store(true, Ordering::Release);
        self.wake();
        for (thread, handle) in &mut self.workers {
            thread.unpark();
            if let Some(handle) = handle.take() {
                // A worker's panics were caught and handed on; there is nothing left to report.
                let _ = handle.join();
            }
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
