//! The booted cores as an [`Executor`]: the caller and the workers share the tasks of one region at a time.
//!
//! One atomic word holds the region's number, whether it takes workers, and how many have joined. A worker joins an open
//! region by counting itself in, takes task numbers until none is left, and counts itself out; the caller closes the
//! region when it finds no more tasks, and returns when nobody is inside. A worker that comes late finds it closed and
//! delays no one. Between regions a worker spins for a moment and then parks.
//!
//! How a core parks is [`Parking`]'s matter, so that this file is tested with threads.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};

use engine::executor::Executor;

/// Looks at the state before a worker parks: some tens of microseconds, the gap between two regions of a step.
const SPINS: u32 = 2_000;

const JOINED: u64 = (1 << 16) - 1;
const OPEN: u64 = 1 << 16;
const EPOCH: u64 = 1 << 17;

/// How cores sleep and wake each other.
///
/// *Implementor must*: return from `park` soon after an `unpark` of that core that follows a change which makes `go_on`
/// true; returning for no reason is allowed. *Caller must*: change what `go_on` reads before it calls `unpark`.
pub trait Parking: Send + Sync {
    /// Sleeps until woken, unless `go_on` holds.
    fn park(&self, worker: usize, go_on: &dyn Fn() -> bool);
    /// Wakes a worker.
    fn unpark(&self, worker: usize);
}

#[derive(Clone, Copy)]
struct Region {
    task: *const (dyn Fn(usize) + Sync),
    n_tasks: usize,
}

/// The calling core and `n` workers.
pub struct Cores<P> {
    parking: P,
    state: AtomicU64,
    region: UnsafeCell<Option<Region>>,
    next: AtomicUsize,
    /// Held by the caller whose region runs.
    running: AtomicBool,
    /// Per worker: parked, or about to.
    parked: Vec<AtomicBool>,
    stopped: AtomicBool,
}

// SAFETY: `region` is written only by the holder of `running`, while no worker has joined and the region is closed; it is
// read only by workers that joined. The task it points to is `Sync`.
unsafe impl<P: Sync> Sync for Cores<P> {}
// SAFETY: as above; the pointer is used only while its region runs.
unsafe impl<P: Send> Send for Cores<P> {}

impl<P: Parking> Cores<P> {
    /// `n_workers` cores will call [`Cores::work`].
    pub fn new(n_workers: usize, parking: P) -> Cores<P> {
        assert!(n_workers < JOINED as usize, "{n_workers} workers");
        Cores {
            parking,
            state: AtomicU64::new(0),
            region: UnsafeCell::new(None),
            next: AtomicUsize::new(0),
            running: AtomicBool::new(false),
            parked: (0..n_workers).map(|_| AtomicBool::new(false)).collect(),
            stopped: AtomicBool::new(false),
        }
    }

    /// What worker `me` does until [`Cores::stop`].
    pub fn work(&self, me: usize) {
        let mut seen = 0;
        while !self.stopped.load(Ordering::Acquire) {
            let state = self.state.load(Ordering::Acquire);
            if state / EPOCH == seen || state & OPEN == 0 {
                self.idle(me, state);
                continue;
            }
            if self.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                continue;
            }
            seen = state / EPOCH;
            // SAFETY: joined while open, so the region is set and its caller waits for us.
            if let Some(region) = unsafe { *self.region.get() } {
                self.take_tasks(region);
            }
            self.state.fetch_sub(1, Ordering::Release);
        }
    }

    /// Sends the workers home.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        self.wake();
    }

    fn idle(&self, me: usize, state: u64) {
        let go_on = || self.state.load(Ordering::Acquire) != state || self.stopped.load(Ordering::Acquire);
        for _ in 0..SPINS {
            if go_on() {
                return;
            }
            core::hint::spin_loop();
        }
        self.parked[me].store(true, Ordering::SeqCst);
        // With the fence in `wake`: either we see the new state, or the caller sees us parked.
        fence(Ordering::SeqCst);
        while !go_on() {
            self.parking.park(me, &go_on);
        }
        self.parked[me].store(false, Ordering::SeqCst);
    }

    fn wake(&self) {
        fence(Ordering::SeqCst);
        for (worker, parked) in self.parked.iter().enumerate() {
            if parked.swap(false, Ordering::SeqCst) {
                self.parking.unpark(worker);
            }
        }
    }

    fn take_tasks(&self, region: Region) {
        // SAFETY: the region's caller is in `run`, which returns only when all who joined have left.
        let task = unsafe { &*region.task };
        loop {
            let i = self.next.fetch_add(1, Ordering::Relaxed);
            if i >= region.n_tasks {
                return;
            }
            task(i);
        }
    }
}

impl<P: Parking> Executor for Cores<P> {
    fn n_threads(&self) -> usize {
        self.parked.len() + 1
    }

    /// A region inside a region, or beside one, runs on its caller alone.
    fn run(&self, n_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        if n_tasks < 2 || self.parked.is_empty() || self.running.swap(true, Ordering::Acquire) {
            return (0..n_tasks).for_each(task);
        }
        // SAFETY: only the lifetime changes; the pointer is used only until all workers have left, below.
        let task = unsafe {
            core::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const (dyn Fn(usize) + Sync + 'static)>(
                task,
            )
        };
        let region = Region { task, n_tasks };
        // SAFETY: we hold `running`, and the last region was closed and left by all.
        unsafe { *self.region.get() = Some(region) };
        self.next.store(0, Ordering::Relaxed);
        self.state.fetch_add(EPOCH + OPEN, Ordering::AcqRel);
        self.wake();
        self.take_tasks(region);
        self.state.fetch_sub(OPEN, Ordering::AcqRel);
        while self.state.load(Ordering::Acquire) & JOINED != 0 {
            core::hint::spin_loop();
        }
        self.running.store(false, Ordering::Release);
    }
}

/// Parks with the interrupt controller's help: `hlt`, ended by another core's wake-up.
pub struct Halt {
    /// The workers' APIC numbers.
    pub apic_ids: Box<[u32]>,
}

impl Parking for Halt {
    fn park(&self, _worker: usize, go_on: &dyn Fn() -> bool) {
        crate::fault::wait(go_on);
    }
    fn unpark(&self, worker: usize) {
        crate::apic::Apic::this().wake(self.apic_ids[worker]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use std::thread::{self, Thread};

    struct Threads(Vec<Mutex<Option<Thread>>>);

    impl Parking for Threads {
        fn park(&self, worker: usize, go_on: &dyn Fn() -> bool) {
            *self.0[worker].lock().unwrap() = Some(thread::current());
            if !go_on() {
                thread::park();
            }
        }
        fn unpark(&self, worker: usize) {
            if let Some(thread) = &*self.0[worker].lock().unwrap() {
                thread.unpark();
            }
        }
    }

    /// Every task once, in many regions, with pauses in which workers park, and regions within regions.
    #[test]
    fn every_task_runs_once() {
        let cores = Cores::new(3, Threads((0..3).map(|_| Mutex::default()).collect()));
        assert_eq!(cores.n_threads(), 4);
        thread::scope(|scope| {
            for me in 0..3 {
                let cores = &cores;
                scope.spawn(move || cores.work(me));
            }
            for round in 0..400usize {
                let counts: Vec<AtomicUsize> = (0..round % 9).map(|_| AtomicUsize::new(0)).collect();
                cores.run(counts.len(), &|i| {
                    cores.run(2, &|_| {
                        counts[i].fetch_add(1, Ordering::Relaxed);
                    });
                });
                assert!(counts.iter().all(|n| n.load(Ordering::Relaxed) == 2), "round {round}");
                if round % 100 == 99 {
                    thread::sleep(std::time::Duration::from_millis(5));
                }
            }
            cores.stop();
        });
    }
}
