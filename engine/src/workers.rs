//! A caller and its workers, which share the tasks of one parallel region at a time: what thread pools
//! (`pool.rs`) and the image's cores have in common. How a worker waits and sleeps is [`Parking`]'s matter.
//!
//! One atomic word holds the region's epoch, whether the region takes workers, and how many have joined. The caller
//! publishes the tasks and opens the region; workers that are awake join by counting themselves in, take task numbers
//! from a counter until none is left, and count themselves out. The caller closes the region when it finds no more
//! tasks, and returns when nobody is inside. A worker that wakes up too late finds the region closed and delays no one.
//! Nothing is allocated after construction.
//!
//! `unsafe` is for one thing: workers hold a pointer to the region's closure, whose lifetime the type system cannot
//! see. It is alive while anyone has joined, because [`Executor::run`] returns, or unwinds, only when all have left.
#![allow(unsafe_code)]

use alloc::boxed::Box;
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};

use crate::executor::Executor;

/// Workers that joined: the low bits of the state word.
const JOINED: u64 = (1 << 16) - 1;
/// Whether the region takes workers.
const OPEN: u64 = 1 << 16;
/// One epoch: the high bits.
const EPOCH: u64 = 1 << 17;

/// Workers that there may be at most.
pub const MAX_WORKERS: usize = JOINED as usize - 1;

/// Looks at the state after which a waiting caller lets others have its processor.
const SPINS_PER_YIELD: u32 = 4096;

/// How workers wait, sleep and wake each other.
///
/// *Implementor must*: return from `park` soon after an `unpark` of that worker that follows a change which makes `go_on`
/// true; returning for no reason is allowed. *Caller must*: change what `go_on` reads before it calls `unpark`.
pub trait Parking: Send + Sync {
    /// Waits awake, until `go_on` holds or it is time to sleep: longer than the gap between two regions of a step.
    fn spin(&self, go_on: &dyn Fn() -> bool);
    /// Sleeps until woken, unless `go_on` holds.
    fn park(&self, worker: usize, go_on: &dyn Fn() -> bool);
    /// Wakes a worker that is in `park`, or about to be.
    fn unpark(&self, worker: usize);
    /// Lets others have the caller's processor: a worker that has none cannot finish its task.
    fn yield_now(&self) {}
}

/// What a region runs.
#[derive(Clone, Copy)]
struct Region {
    task: *const (dyn Fn(usize) + Sync),
    n_tasks: usize,
}

/// The caller of [`Executor::run`] and `n` workers.
///
/// A region that is started while another runs (from a task, or by another thread) runs on its caller alone.
pub struct Workers<P> {
    parking: P,
    /// Epoch, [`OPEN`] and the number of joined workers.
    state: AtomicU64,
    region: UnsafeCell<Option<Region>>,
    /// The next task's number.
    next: AtomicUsize,
    /// Held by the caller whose region runs.
    running: AtomicBool,
    /// Per worker: whether it sleeps or is about to.
    parked: Box<[AtomicBool]>,
    stopped: AtomicBool,
}

// SAFETY: `region` is written only by the holder of `running`, while no worker has joined and the region is closed; it is
// read only by workers that joined. The task it points to is `Sync`.
unsafe impl<P: Sync> Sync for Workers<P> {}
// SAFETY: as above; the pointer is used only while its region runs.
unsafe impl<P: Send> Send for Workers<P> {}

impl<P: Parking> Workers<P> {
    /// `n_workers` threads or cores will call [`Workers::work`].
    ///
    /// # Panics
    /// If they are more than [`MAX_WORKERS`].
    pub fn new(n_workers: usize, parking: P) -> Workers<P> {
        assert!(n_workers <= MAX_WORKERS, "{n_workers} workers, at most {MAX_WORKERS}");
        Workers {
            parking,
            state: AtomicU64::new(0),
            region: UnsafeCell::new(None),
            next: AtomicUsize::new(0),
            running: AtomicBool::new(false),
            parked: (0..n_workers).map(|_| AtomicBool::new(false)).collect(),
            stopped: AtomicBool::new(false),
        }
    }

    /// How its workers sleep.
    pub fn parking(&self) -> &P {
        &self.parking
    }

    /// What worker `me` does until [`Workers::stop`].
    pub fn work(&self, me: usize) {
        let mut seen = 0;
        while !self.stopped.load(Ordering::Acquire) {
            let state = self.state.load(Ordering::Acquire);
            if state / EPOCH == seen || state & OPEN == 0 {
                self.wait(me, state);
                continue;
            }
            if self.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                continue;
            }
            seen = state / EPOCH;
            let _joined = Joined(&self.state);
            // SAFETY: joined while open, so the region is set and its caller waits for us.
            if let Some(region) = unsafe { *self.region.get() } {
                self.take_tasks(region);
            }
        }
    }

    /// Sends the workers home.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        self.wake();
    }

    /// Until the state changes: spins, then sleeps.
    fn wait(&self, me: usize, state: u64) {
        let go_on = || self.state.load(Ordering::Acquire) != state || self.stopped.load(Ordering::Acquire);
        self.parking.spin(&go_on);
        if go_on() {
            return;
        }
        let parked = &self.parked[me];
        parked.store(true, Ordering::SeqCst);
        // Pairs with the fence in `wake`: either we see the new state, or the caller sees us parked.
        fence(Ordering::SeqCst);
        // Whoever wakes us clears `parked`. That may be the caller of a region that we have done and left already, so that
        // the state did not change: to sleep on would be for ever, since only those who are parked are woken.
        let woken = || go_on() || !parked.load(Ordering::SeqCst);
        while !woken() {
            self.parking.park(me, &woken);
        }
        parked.store(false, Ordering::SeqCst);
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
        // SAFETY: the region's caller is in `run`, which ends only when all who joined have left.
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

/// A worker inside a region; leaves it when dropped, whatever its task did.
struct Joined<'a>(&'a AtomicU64);

impl Drop for Joined<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

/// An open region; dropping it closes it and waits for all who joined, also when the caller's task panics.
struct Opened<'a, P: Parking>(&'a Workers<P>);

impl<P: Parking> Drop for Opened<'_, P> {
    fn drop(&mut self) {
        let Workers { parking, state, running, .. } = self.0;
        state.fetch_sub(OPEN, Ordering::AcqRel);
        let mut spins = 0u32;
        while state.load(Ordering::Acquire) & JOINED != 0 {
            spins += 1;
            if spins.is_multiple_of(SPINS_PER_YIELD) { parking.yield_now() } else { core::hint::spin_loop() }
        }
        running.store(false, Ordering::Release);
    }
}

impl<P: Parking> Executor for Workers<P> {
    fn n_threads(&self) -> usize {
        self.parked.len() + 1
    }

    fn run(&self, n_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        if n_tasks < 2 || self.parked.is_empty() || self.running.swap(true, Ordering::Acquire) {
            return (0..n_tasks).for_each(task);
        }
        // SAFETY: only the lifetime changes; the pointer is used only until all workers have left, when `opened` drops.
        let task = unsafe {
            core::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const (dyn Fn(usize) + Sync + 'static)>(
                task,
            )
        };
        let region = Region { task, n_tasks };
        // SAFETY: we hold `running`, and the previous region was closed and left by all.
        unsafe { *self.region.get() = Some(region) };
        self.next.store(0, Ordering::Relaxed);
        self.state.fetch_add(EPOCH + OPEN, Ordering::AcqRel);
        let _opened = Opened(self);
        self.wake();
        self.take_tasks(region);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;
    use std::sync::Mutex;
    use std::thread::{self, Thread};

    struct Threads(Vec<Mutex<Option<Thread>>>);

    impl Parking for Threads {
        /// Not at all, so that workers park often.
        fn spin(&self, _go_on: &dyn Fn() -> bool) {}
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
        let workers = Workers::new(3, Threads((0..3).map(|_| Mutex::default()).collect()));
        assert_eq!(workers.n_threads(), 4);
        thread::scope(|scope| {
            for me in 0..3 {
                let workers = &workers;
                scope.spawn(move || workers.work(me));
            }
            for round in 0..400usize {
                let counts: Vec<AtomicUsize> = (0..round % 9).map(|_| AtomicUsize::new(0)).collect();
                workers.run(counts.len(), &|i| {
                    workers.run(2, &|_| {
                        counts[i].fetch_add(1, Ordering::Relaxed);
                    });
                });
                assert!(counts.iter().all(|n| n.load(Ordering::Relaxed) == 2), "round {round}");
                if round % 100 == 99 {
                    thread::sleep(std::time::Duration::from_millis(5));
                }
            }
            workers.stop();
        });
    }
}
