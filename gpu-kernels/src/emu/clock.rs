//! Order between the threads of a CTA: vector clocks that barriers join.
//!
//! Thread `t` stamps its accesses with its own time, which each barrier advances. Another thread is ordered after such an
//! access when a barrier has told it of a time at least as late.

use std::rc::Rc;
use std::vec;
use std::vec::Vec;

/// What one thread knows of all threads' times, and its own time. The copy engine counts as one more thread: see
/// `cta::Engine`.
#[derive(Clone, Debug)]
pub(super) struct Clock {
    known: Rc<Vec<u32>>,
    pub(super) own: u32,
}

impl Clock {
    /// Clocks of the threads of a CTA that has just started.
    pub(super) fn start(threads: usize) -> Clock {
        Clock { known: Rc::new(vec![0; threads + 1]), own: 1 }
    }

    /// Whether what `thread` did at `time` comes before what this thread does now.
    pub(super) fn after(&self, me: usize, thread: usize, time: u32) -> bool {
        thread == me || self.known[thread] >= time
    }

    /// Everything this thread has done and knows, as one table.
    pub(super) fn publish(&self, me: usize, into: &mut Vec<u32>) {
        if into.is_empty() {
            into.clone_from(&self.known);
        } else {
            into.iter_mut().zip(self.known.iter()).for_each(|(a, b)| *a = (*a).max(*b));
        }
        into[me] = into[me].max(self.own);
    }

    /// Learns a table, and begins a new time.
    pub(super) fn learn(&mut self, table: &Rc<Vec<u32>>) {
        self.known = table.clone();
        self.own += 1;
    }

    /// Learns a table without losing what it knew.
    pub(super) fn merge(&mut self, table: &[u32]) {
        let mut known = (*self.known).clone();
        known.iter_mut().zip(table).for_each(|(a, b)| *a = (*a).max(*b));
        self.known = Rc::new(known);
        self.own += 1;
    }

    /// A barrier of these threads: each learns what all know.
    pub(super) fn join(clocks: &mut [Clock], threads: impl Iterator<Item = usize> + Clone) {
        let mut table = Vec::new();
        let mut last: Option<Rc<Vec<u32>>> = None;
        for t in threads.clone() {
            // Threads that left the same barrier share a table: no need to merge it again.
            if last.as_ref().is_some_and(|last| Rc::ptr_eq(last, &clocks[t].known)) {
                table[t] = clocks[t].own;
            } else {
                clocks[t].publish(t, &mut table);
                last = Some(clocks[t].known.clone());
            }
        }
        let table = Rc::new(table);
        for t in threads {
            clocks[t].learn(&table);
        }
    }
}
