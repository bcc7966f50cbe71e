//! Working memory of the kernels, and the parallel regions that use it.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicUsize, Ordering};

use bytemuck::{Pod, Zeroable};

use super::act::Form;
use super::shared::Shared;
use crate::executor::Executor;

/// A cache line: the unit and alignment of working memory.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub(super) struct Line([u8; 64]);

/// Working memory, reused by every call. It grows to the largest shape seen and then stays, so a step that was run
/// once allocates nothing.
#[derive(Default)]
pub struct Scratch {
    /// Activations in each [`Form`] that products take.
    pub(super) forms: [Vec<Line>; Form::ALL.len()],
    /// Private memory of each worker of a region.
    pub(super) workers: Vec<Vec<Line>>,
    /// Row lists of expert products.
    pub(super) rows: Vec<u32>,
}

impl Scratch {
    /// Empty.
    pub fn new() -> Scratch {
        Scratch::default()
    }
}

/// At least `bytes` of lines.
pub(super) fn reserve(lines: &mut Vec<Line>, bytes: usize) {
    let n = bytes.div_ceil(64);
    if lines.len() < n {
        lines.resize(n, Line::zeroed());
    }
}

/// Splits `n` elements off the front of a worker's memory, starting at a line.
pub(super) fn take<'a, T: Pod>(lines: &mut &'a mut [Line], n: usize) -> &'a mut [T] {
    let used = (n * size_of::<T>()).div_ceil(64);
    let (head, tail) = core::mem::take(lines).split_at_mut(used);
    *lines = tail;
    &mut bytemuck::cast_slice_mut(head)[..n]
}

/// Runs `job(memory, i)` for `i < n_jobs`, in any order, on as many workers as the executor has threads, each with
/// `bytes` of private memory.
pub(super) fn region(
    exec: &dyn Executor,
    workers: &mut Vec<Vec<Line>>,
    bytes: usize,
    n_jobs: usize,
    job: impl Fn(&mut [Line], usize) + Sync,
) {
    let n_workers = exec.n_threads().min(n_jobs).max(1);
    if workers.len() < n_workers {
        workers.resize_with(n_workers, Vec::new);
    }
    for memory in &mut workers[..n_workers] {
        reserve(memory, bytes);
    }
    if n_workers == 1 {
        return (0..n_jobs).for_each(|i| job(&mut workers[0], i));
    }
    let next = AtomicUsize::new(0);
    let memory = Shared(workers.as_mut_ptr());
    exec.run(n_workers, &|w| {
        assert!(w < n_workers, "executor ran task {w} of {n_workers}");
        // SAFETY: `w` is in bounds, and an executor runs each index once, so nobody else holds this worker's memory.
        let memory = unsafe { &mut *memory.at(w) };
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= n_jobs {
                break;
            }
            job(memory, i);
        }
    });
}

/// Cuts `n` items into about four chunks a thread, each a multiple of `unit`; returns (items a chunk, chunks).
pub(super) fn cut(n: usize, n_threads: usize, unit: usize, least: usize) -> (usize, usize) {
    let parts = if n_threads == 1 { 1 } else { 4 * n_threads };
    let chunk = n.div_ceil(parts).max(least).next_multiple_of(unit);
    (chunk, n.div_ceil(chunk))
}
