//! How the engine runs work on several cores: it never spawns a thread itself.

/// Runs tasks of one parallel region.
///
/// *Implementor must*: call `task(i)` exactly once for each `i < n_tasks`, possibly concurrently, and return only when
/// all calls have returned. *Caller must*: not depend on which thread runs which task, nor on their order.
pub trait Executor: Send + Sync {
    /// How many tasks can run at once; a hint for cutting work.
    fn n_threads(&self) -> usize;
    /// Run all tasks.
    fn run(&self, n_tasks: usize, task: &(dyn Fn(usize) + Sync));
}

/// Runs everything on the calling thread.
#[derive(Clone, Copy, Debug, Default)]
pub struct Serial;

impl Executor for Serial {
    fn n_threads(&self) -> usize {
        1
    }
    fn run(&self, n_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..n_tasks).for_each(task);
    }
}
