//! Order between the threads of a CTA: vector clocks that barriers join.
//!
//! Thread `t` stamps its accesses with its own time, which each barrier advances. Another thread is ordered after such an
//! access when a barrier has told it of a time at least as late.
//!
//! Of other CTAs' threads a thread learns where it arrives at a counter that they have arrived at, and spreads it by
//! barriers that wait (not by arrivals without waiting).

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::vec;
use std::vec::Vec;

/// What one thread knows of all threads' times, and its own time. The copy engine counts as one more thread: see
/// `cta::Engine`.
#[derive(Clone, Debug)]
pub(super) struct Clock {
    known: Rc<Vec<u32>>,
    others: Option<Arc<Others>>,
    pub(super) own: u32,
}

/// What is known of the threads of whole CTAs, by their number.
#[derive(Clone, Debug, Default)]
pub(super) struct Others(BTreeMap<u32, Vec<u32>>);

impl Others {
    fn add(&mut self, cta: u32, table: &[u32]) {
        let known = self.0.entry(cta).or_default();
        known.resize(table.len(), 0);
        known.iter_mut().zip(table).for_each(|(a, b)| *a = (*a).max(*b));
    }

    fn add_all(&mut self, others: &Others) {
        others.0.iter().for_each(|(&cta, table)| self.add(cta, table));
    }
}

impl Clock {
    /// Clocks of the threads of a CTA that has just started.
    pub(super) fn start(threads: usize) -> Clock {
        Clock { known: Rc::new(vec![0; threads + 1]), others: None, own: 1 }
    }

    /// Whether what `thread` did at `time` comes before what this thread does now.
    pub(super) fn after(&self, me: usize, thread: usize, time: u32) -> bool {
        thread == me || self.known[thread] >= time
    }

    /// The same of a thread of another CTA.
    pub(super) fn after_other(&self, cta: u32, thread: usize, time: u32) -> bool {
        let known = self.others.as_ref().and_then(|others| others.0.get(&cta));
        known.is_some_and(|known| known[thread] >= time)
    }

    /// Arrives at a counter, as thread `me` of CTA `cta`: what earlier arrivals knew it learns, what it knows is there
    /// for later ones.
    pub(super) fn arrive(&mut self, cta: u32, me: usize, counter: &mut Others) {
        let mut table = Vec::new();
        self.publish(me, &mut table);
        if let Some(others) = &self.others {
            counter.add_all(others);
        }
        counter.add(cta, &table);
        self.others = Some(Arc::new(counter.clone()));
        self.own += 1;
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
        let others = Clock::joined_others(clocks, threads.clone());
        for t in threads {
            clocks[t].learn(&table);
            clocks[t].others.clone_from(&others);
        }
    }

    /// What these threads know together of other CTAs.
    fn joined_others(clocks: &[Clock], threads: impl Iterator<Item = usize>) -> Option<Arc<Others>> {
        let mut joined: Option<Arc<Others>> = None;
        for others in threads.filter_map(|t| clocks[t].others.as_ref()) {
            match &mut joined {
                None => joined = Some(others.clone()),
                // Threads that left the same barrier share it.
                Some(joined) if Arc::ptr_eq(joined, others) => {}
                Some(joined) => Arc::make_mut(joined).add_all(others),
            }
        }
        joined
    }
}
