//! A stream, and how a thread waits for one.
//!
//! A decode step ends in a wait that is about as long as the one before. The driver can spin, which takes a whole core, or
//! sleep until an interrupt, which wakes the thread tens of microseconds late, step by step. So a thread sleeps by the clock
//! for nearly as long as it waited last time, and spins for the rest ([`Pace`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use cust::stream::{Stream, StreamFlags};
use gpu_kernels::driver::DriverError;

use super::cust_error;
use super::error::check;
use super::ffi::{self, Handle};

/// A stream that any thread may use; `cust` does not say so.
pub(super) struct Queue {
    stream: Stream,
    pace: Pace,
}

// SAFETY: an object of the driver's belongs to a context, not to a thread, and the driver's functions may be called from
// any thread.
unsafe impl Send for Queue {}
// SAFETY: as above.
unsafe impl Sync for Queue {}

impl Queue {
    /// A new one, of the context that is current.
    pub(super) fn new() -> Result<Arc<Queue>, DriverError> {
        // Not ordered with CUDA's own default stream, which cannot be captured.
        let stream = Stream::new(StreamFlags::NON_BLOCKING, None).map_err(cust_error("create a stream"))?;
        Ok(Arc::new(Queue { stream, pace: Pace::new() }))
    }

    /// For the driver.
    pub(super) fn raw(&self) -> Handle {
        self.stream.as_inner().cast()
    }

    /// An error if it is being captured.
    pub(super) fn refuse_captured(&self, op: &'static str) -> Result<(), DriverError> {
        let mut status = ffi::CAPTURE_STATUS_NONE;
        // SAFETY: a stream of ours and a valid place.
        check(op, unsafe { ffi::cuStreamIsCapturing(self.raw(), &mut status) })?;
        if status == ffi::CAPTURE_STATUS_NONE { Ok(()) } else { Err(DriverError::Capture { op }) }
    }

    /// Waits for its work.
    pub(super) fn finish(&self, op: &'static str) -> Result<(), DriverError> {
        // SAFETY: a stream of ours.
        let is_done = || match unsafe { ffi::cuStreamQuery(self.raw()) } {
            ffi::ERROR_NOT_READY => Ok(false),
            code => check(op, code).map(|()| true),
        };
        // SAFETY: a stream of ours.
        let spin = || check(op, unsafe { ffi::cuStreamSynchronize(self.raw()) });
        let started = Instant::now();
        self.pace.wait(|| started.elapsed(), sleep, is_done, spin)
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // What it was given to do may use memory that goes next. After a fault nothing is left to wait for.
        let _ = self.finish("release_stream");
    }
}

/// Sleeps to the microsecond: the kernel adds 50 of them to a thread's sleeps unless it is told not to.
fn sleep(time: Duration) {
    // SAFETY: no condition; it concerns how late this thread's timers may be.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
    thread::sleep(time);
}

/// What is known of the waits before. Threads that wait for the same stream share it; a guess that is off costs time, no more.
struct Pace {
    /// How long the next wait takes, ns.
    expected: AtomicU64,
    /// How long before that the last sleep ends, ns: the longer, the oftener sleeps were too long.
    margin: AtomicU64,
}

impl Pace {
    /// Bounds of the margin, ns: a timer is some microseconds late on a quiet machine, a tenth of a millisecond on a busy one.
    const MARGINS: (u64, u64) = (20_000, 400_000);
    /// The longest sleep, ns: work that ends sooner than expected is noticed after as much.
    const LONGEST: u64 = 200_000;
    /// Shorter sleeps cost as much as they save.
    const SHORTEST: u64 = 10_000;

    fn new() -> Pace {
        Pace { expected: AtomicU64::new(0), margin: AtomicU64::new(100_000) }
    }

    /// Waits until it `is_done`; `spin` returns then at once. `elapsed` is the time since the wait began.
    fn wait<E>(
        &self,
        elapsed: impl Fn() -> Duration,
        mut sleep: impl FnMut(Duration),
        mut is_done: impl FnMut() -> Result<bool, E>,
        spin: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        let now = || elapsed().as_nanos() as u64;
        let (expected, margin) = (self.expected.load(Ordering::Relaxed), self.margin.load(Ordering::Relaxed));
        let until = expected.saturating_sub(margin);
        // When it was last seen at work.
        let mut seen = None;
        loop {
            let at = now();
            let left = until.saturating_sub(at);
            if left < Pace::SHORTEST && seen.is_none() {
                break;
            }
            if is_done()? {
                if let Some(seen) = seen {
                    self.expected.store(seen, Ordering::Relaxed);
                    self.margin.store((2 * margin).min(Pace::MARGINS.1), Ordering::Relaxed);
                }
                return Ok(());
            }
            if left < Pace::SHORTEST {
                break;
            }
            seen = Some(at);
            sleep(Duration::from_nanos(left.min(Pace::LONGEST)));
        }
        spin()?;
        self.expected.store(now(), Ordering::Relaxed);
        if seen.is_some() {
            self.margin.store((margin - margin / 64).max(Pace::MARGINS.0), Ordering::Relaxed);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::convert::Infallible;
    use std::vec::Vec;

    use super::*;

    /// A wait for work of so many µs whose sleeps end so many µs late: µs from the start to the return, and µs spun.
    fn wait(pace: &Pace, work: u64, late: u64) -> (u64, u64) {
        let (now, spun) = (Cell::new(0u64), Cell::new(0u64));
        let is_done = || Ok::<_, Infallible>(now.get() >= work * 1000);
        let sleep = |time: Duration| now.set(now.get() + time.as_nanos() as u64 + late * 1000);
        let spin = || {
            let end = now.get().max(work * 1000);
            spun.set(end - now.get());
            now.set(end);
            Ok(())
        };
        pace.wait(|| Duration::from_nanos(now.get()), sleep, is_done, spin).unwrap();
        (now.get() / 1000, spun.get() / 1000)
    }

    #[test]
    fn waits_alike_are_slept_through_and_end_on_time() {
        for (work, late) in [(2000, 5), (2000, 60), (400, 10)] {
            let pace = Pace::new();
            let waits: Vec<_> = (0..400).map(|_| wait(&pace, work, late)).collect();
            assert_eq!(waits[0], (work, work), "the first is not foreseen");
            let known = &waits[100..];
            let over: u64 = known.iter().map(|w| w.0 - work).sum();
            assert!(over <= known.len() as u64 * work / 100, "{work} {late}: {over} µs late in all");
            let spun: u64 = known.iter().map(|w| w.1).sum();
            assert!(spun <= known.len() as u64 * (2 * late + 40), "{work} {late}: {spun} µs spun in all");
        }
    }

    #[test]
    fn shorter_work_than_expected_is_noticed_and_what_was_done_says_nothing() {
        let pace = Pace::new();
        wait(&pace, 20_000, 0);
        let (took, _) = wait(&pace, 1_900, 0);
        assert!((1_900..=2_100).contains(&took), "{took}");
        let expected = pace.expected.load(Ordering::Relaxed);
        assert!((1_700_000..=1_900_000).contains(&expected), "{expected}");
        assert_eq!(wait(&pace, 0, 0), (0, 0));
        assert_eq!(pace.expected.load(Ordering::Relaxed), expected);
    }

    #[test]
    fn an_error_ends_the_wait() {
        let pace = Pace::new();
        let none = || Duration::ZERO;
        assert_eq!(pace.wait(none, |_| (), || Ok(false), || Err("spin")), Err("spin"));
        wait(&pace, 1000, 0);
        assert_eq!(pace.wait(none, |_| (), || Err("query"), || Ok(())), Err("query"));
    }
}
