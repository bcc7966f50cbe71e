//! One CTA, or a cluster of several: its threads as coroutines, and the scheduler that runs them in turns.
//!
//! A thread runs until it waits. When all wait, the scheduler completes what is complete: collectives of whole warps,
//! barriers, phases of mbarriers. What cannot complete any more is a finding.
//!
//! A cluster runs as one CTA with the threads of all. Its CTAs' shared memories lie [`WINDOW_BYTES`] apart, the first 16 barriers
//! are the first one's, and so on; one more is the cluster's. So all checks hold across CTAs too.

use std::boxed::Box;
use std::cell::{Cell, Ref, RefCell};
use std::collections::{HashMap, VecDeque};
use std::format;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::string::{String, ToString};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::vec;
use std::vec::Vec;

use bytemuck::Pod;
use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult, Yielder};

use super::clock::Clock;
use super::collective::{self, Input, Output};
use super::lane::{self, Collective, Source};
use super::memory::{Allocation, Kind, LaunchMarks, Memory, Place};
use super::smem::{AsyncCopy, SharedMemory};
use super::wgmma::{self, Products};
use super::{Entry, Options};
use crate::launch::{Launch, ParamReader};

/// Stack of a CUDA thread: kernels keep arrays of a few hundred bytes; debug builds of generic code need the rest.
const STACK_BYTES: usize = 128 * 1024;
/// Barriers of a CTA.
pub(super) const BARRIERS: u32 = 16;
/// From the shared memory of a CTA to that of the next one of a cluster: more than any has, and what the addresses in
/// descriptors of `wgmma` are taken modulo.
pub(super) const WINDOW_BYTES: u32 = 256 << 10;

/// What a thread waits for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Wait {
    Barrier { id: u32, count: Option<u32>, at: Source },
    Collective { op: Collective, at: Source },
    Mbarrier { address: u32, parity: u32, at: Source },
    Failed,
}

impl Wait {
    fn describe(&self) -> String {
        let (what, at) = match self {
            Wait::Barrier { id, at, .. } => (format!("barrier {id}"), at),
            Wait::Collective { op, at } => (format!("{op:?}"), at),
            Wait::Mbarrier { address, parity, at } => (format!("mbarrier {address}, parity {parity}"), at),
            Wait::Failed => return "failed".into(),
        };
        format!("{what} at {}:{}", at.file(), at.line())
    }
}

/// A thread's own state.
#[derive(Default)]
pub(super) struct Thread {
    input: Input,
    output: Output,
    /// Copies since the last commit.
    pub(super) open: Vec<AsyncCopy>,
    /// Groups of copies under way, oldest first.
    pub(super) groups: VecDeque<Vec<AsyncCopy>>,
    /// Whether it has waited for earlier launches.
    pub(super) waited: bool,
    /// Products of the warpgroup.
    pub(super) products: Products,
}

/// A barrier object in shared memory.
struct Mbarrier {
    count: u32,
    pending: u32,
    /// Bytes that this phase still expects of copies.
    bytes: u32,
    /// Parity of the phase that is under way.
    parity: u32,
    /// What the arrivals of this phase know.
    arrived: Vec<u32>,
    /// What those of the last phase of each parity knew.
    done: [Vec<u32>; 2],
}

impl Mbarrier {
    /// Ends the phase if it is complete.
    fn turn(&mut self) {
        if self.pending == 0 && self.bytes == 0 {
            self.done[self.parity as usize] = std::mem::take(&mut self.arrived);
            self.parity ^= 1;
            self.pending = self.count;
        }
    }
}

/// A copy by the copy engine.
pub(super) struct BulkCopy {
    pub(super) to: u32,
    pub(super) bytes: Vec<u8>,
    pub(super) mbarrier: u32,
}

/// The copy engine: one more thread, whose writes others learn of from the copies' mbarriers alone. A copy arrives as late
/// as it can: when a thread waits for its mbarrier.
#[derive(Default)]
struct Engine {
    time: u32,
    copies: Vec<BulkCopy>,
}

/// An allocation and its addresses. Counted apart from the other CTAs' uses: threads of the host would fight for one
/// counter.
#[allow(clippy::redundant_allocation)] // the second count is the point
struct Recent {
    start: u64,
    end: u64,
    allocation: Rc<Arc<Allocation>>,
}

/// A place in global memory, for a thread of this CTA.
#[allow(clippy::redundant_allocation)] // as above
pub(super) struct CtaPlace {
    pub(super) allocation: Rc<Arc<Allocation>>,
    pub(super) offset: usize,
}

/// A running CTA.
pub(super) struct Cta {
    pub(super) idx: [u32; 3],
    pub(super) grid: [u32; 3],
    /// The CTA in the grid, as one number.
    pub(super) number: u32,
    /// Of all CTAs of the cluster, and of one.
    pub(super) threads: usize,
    pub(super) cta_threads: usize,
    pub(super) marks: Option<Arc<LaunchMarks>>,
    memory: Arc<Memory>,
    /// The allocation used last: most accesses go where the one before went.
    recent: RefCell<Option<Recent>>,
    /// Blocks lent to kernels as references.
    lent: RefCell<Vec<Box<dyn std::any::Any>>>,
    smem: RefCell<SharedMemory>,
    clocks: RefCell<Vec<Clock>>,
    states: RefCell<Vec<Thread>>,
    yielders: Vec<Cell<*const Yielder<(), Wait>>>,
    /// Arrivals at named barriers by threads that went on: count and what they know.
    arrivals: RefCell<HashMap<u32, (u32, Vec<u32>)>>,
    mbarriers: RefCell<HashMap<u32, Mbarrier>>,
    engine: RefCell<Engine>,
    findings: RefCell<Vec<String>>,
}

impl Cta {
    /// The place of a thread's CTA in the cluster.
    pub(super) fn rank(&self, me: usize) -> u32 {
        (me / self.cta_threads) as u32
    }

    /// Where the shared memory of a thread's CTA starts.
    pub(super) fn window(&self, me: usize) -> u32 {
        self.rank(me) * WINDOW_BYTES
    }

    pub(super) fn find(&self, what: String) {
        self.findings.borrow_mut().push(what);
    }

    /// Gives the turn back until the scheduler resumes the thread.
    pub(super) fn suspend(&self, me: usize, wait: Wait) {
        let yielder = self.yielders[me].get();
        // SAFETY: set by the thread's coroutine when it started, to its own yielder, which lives as long as the
        // coroutine's body; only code inside that body gets here.
        unsafe { (*yielder).suspend(wait) }
    }

    pub(super) fn smem<R>(&self, f: impl FnOnce(&mut SharedMemory) -> R) -> R {
        f(&mut self.smem.borrow_mut())
    }

    pub(super) fn clock(&self, me: usize) -> Ref<'_, Clock> {
        Ref::map(self.clocks.borrow(), |clocks| &clocks[me])
    }

    /// An arrival of thread `me` at a counter in global memory, which `count` makes.
    pub(super) fn arrive_global<R>(&self, me: usize, address: u64, count: impl FnOnce() -> R) -> R {
        match &self.marks {
            Some(marks) => marks.arrive(address, self.number, me, &mut self.clocks.borrow_mut()[me], count),
            None => count(),
        }
    }

    pub(super) fn thread<R>(&self, me: usize, f: impl FnOnce(&mut Thread) -> R) -> R {
        f(&mut self.states.borrow_mut()[me])
    }

    pub(super) fn set_inputs(&self, me: usize, inputs: &[u32]) {
        self.thread(me, |thread| thread.input[..inputs.len()].copy_from_slice(inputs));
    }

    pub(super) fn outputs(&self, me: usize) -> Output {
        self.thread(me, |thread| thread.output)
    }

    /// Where a range of global memory lies.
    pub(super) fn place(&self, address: u64, size: u64) -> Option<CtaPlace> {
        if let Some(Recent { start, end, allocation }) = &*self.recent.borrow()
            && *start <= address
            && address.checked_add(size)? <= *end
        {
            return Some(CtaPlace { allocation: allocation.clone(), offset: (address - start) as usize });
        }
        let Place { allocation, offset } = self.memory.find(address, size)?;
        let start = address - offset as u64;
        let end = start + allocation.len() as u64;
        let allocation = Rc::new(allocation);
        *self.recent.borrow_mut() = Some(Recent { start, end, allocation: allocation.clone() });
        Some(CtaPlace { allocation, offset })
    }

    /// A reference to a value for as long as the CTA runs.
    pub(super) fn lend<'a, T: Pod>(&self, value: T) -> &'a T {
        let value = Box::new(value);
        let at: *const T = &*value;
        self.lent.borrow_mut().push(value);
        // SAFETY: the box is kept, and so not moved or written, until the CTA is dropped, which outlives its threads:
        // kernels have no place to keep the reference longer.
        unsafe { &*at }
    }

    /// An arrival at a named barrier by a thread that goes on.
    pub(super) fn arrive(&self, me: usize, id: u32, count: u32) {
        let mut clocks = self.clocks.borrow_mut();
        let mut arrivals = self.arrivals.borrow_mut();
        let (arrived, known) = arrivals.entry(id).or_default();
        *arrived += 1;
        clocks[me].publish(me, known);
        clocks[me].own += 1;
        assert!(count >= *arrived, "more arrivals at a barrier than it counts");
    }

    pub(super) fn mbarrier_init(&self, address: u32, count: u32) {
        let fresh = Mbarrier {
            count,
            pending: count,
            bytes: 0,
            parity: 0,
            arrived: Vec::new(),
            done: [Vec::new(), Vec::new()],
        };
        self.mbarriers.borrow_mut().insert(address, fresh);
    }

    pub(super) fn mbarrier_arrive(&self, me: usize, address: u32) -> Result<(), String> {
        let mut mbarriers = self.mbarriers.borrow_mut();
        let barrier = mbarriers.get_mut(&address).ok_or_else(|| no_mbarrier(address))?;
        let clock = &mut self.clocks.borrow_mut()[me];
        clock.publish(me, &mut barrier.arrived);
        clock.own += 1;
        let left = barrier.pending.checked_sub(1);
        barrier.pending =
            left.ok_or_else(|| format!("more arrivals at mbarrier {address} than it counts"))?;
        barrier.turn();
        Ok(())
    }

    /// The phase under way ends no earlier than copies have brought these bytes.
    pub(super) fn mbarrier_expect(&self, address: u32, bytes: u32) -> Result<(), String> {
        let mut mbarriers = self.mbarriers.borrow_mut();
        mbarriers.get_mut(&address).ok_or_else(|| no_mbarrier(address))?.bytes += bytes;
        Ok(())
    }

    pub(super) fn start_copy(&self, copy: BulkCopy) {
        self.engine.borrow_mut().copies.push(copy);
    }

    pub(super) fn fence_async_proxy(&self, me: usize) {
        self.smem.borrow_mut().fence(me, &mut self.clocks.borrow_mut()[me]);
    }

    /// Brings the copies that report to an mbarrier, as far as its phase expects them.
    fn finish_copies(&self, address: u32) {
        let mut engine = self.engine.borrow_mut();
        let Engine { time, copies } = &mut *engine;
        let mut mbarriers = self.mbarriers.borrow_mut();
        let Some(barrier) = mbarriers.get_mut(&address) else { return };
        let mut i = 0;
        while i < copies.len() {
            if copies[i].mbarrier != address || copies[i].bytes.len() > barrier.bytes as usize {
                i += 1;
                continue;
            }
            let copy = copies.remove(i);
            *time += 1;
            self.smem.borrow_mut().end_copy(copy.to, &copy.bytes, self.threads, *time);
            barrier.bytes -= copy.bytes.len() as u32;
            if barrier.arrived.is_empty() {
                barrier.arrived = vec![0; self.threads + 1];
            }
            barrier.arrived[self.threads] = *time;
        }
        barrier.turn();
    }

    /// Whether the phase of this parity has ended; if so, the thread learns what its arrivals knew.
    pub(super) fn mbarrier_done(&self, me: usize, address: u32, parity: u32) -> Result<bool, String> {
        let mbarriers = self.mbarriers.borrow();
        let barrier = mbarriers.get(&address).ok_or_else(|| no_mbarrier(address))?;
        let done = barrier.parity != parity;
        if done {
            self.clocks.borrow_mut()[me].merge(&barrier.done[parity as usize]);
        }
        Ok(done)
    }

    /// Runs what whole warps wait for; whether any did.
    fn run_collectives(&self, waits: &mut [Option<Wait>], alive: &[bool]) -> bool {
        let mut progress = false;
        for warp in 0..self.threads / 32 {
            let mut lanes = 32 * warp..32 * warp + 32;
            let waiting = |&t: &usize| matches!(waits[t], Some(Wait::Collective { .. }));
            let Some(first) = lanes.clone().find(waiting) else { continue };
            let Some(Wait::Collective { op, at }) = waits[first] else { continue };
            if op.warps() > 1 {
                let group = warp / op.warps() * op.warps();
                lanes = 32 * group..(32 * (group + op.warps())).min(self.threads);
                // Warps of a group come one by one.
                let others = |t: usize| t / 32 != first / 32 && alive[t];
                let under_way = |&t: &usize| others(t) && !matches!(waits[t], Some(Wait::Collective { .. }));
                if lanes.clone().any(|t| under_way(&t)) {
                    continue;
                }
            }
            let same =
                |t: usize| matches!(waits[t], Some(Wait::Collective { op: o, at: a }) if o == op && a == at);
            if let Some(other) = lanes.clone().find(|&t| !same(t)) {
                // A lane behind an mbarrier may still come.
                if alive[other] && matches!(waits[other], None | Some(Wait::Mbarrier { .. })) {
                    continue;
                }
                let elsewhere =
                    waits[other].map_or("has left the kernel".to_string(), |wait| wait.describe());
                self.find(format!(
                    "divergent warp {warp}: lane {} in {op:?} at {}:{}, lane {}: {elsewhere}",
                    first % 32,
                    at.file(),
                    at.line(),
                    other % 32
                ));
                return false;
            }
            let mut states = self.states.borrow_mut();
            if let Collective::Wgmma(kind) = op {
                let group = &mut states[lanes.clone()];
                let mut read = |lane: usize, address: u32, to: &mut [u8]| {
                    let me = lanes.start + lane;
                    let address = address + self.window(me);
                    let (mut smem, clock) = (self.smem.borrow_mut(), self.clock(me));
                    let size = to.len() as u32;
                    smem.bounds_aligned(address, size, 16)?;
                    smem.is_fenced(address, size)?;
                    smem.access(address, size, Kind::Read, me, &clock)?;
                    smem.load(address, to);
                    Ok(())
                };
                let mut products: Vec<&mut Products> =
                    group.iter_mut().map(|thread| &mut thread.products).collect();
                if let Err(what) = wgmma::execute(kind, &mut products, &mut read) {
                    let [x, y, z] = self.idx;
                    let place = format!("at {}:{} (CTA {x},{y},{z})", at.file(), at.line());
                    self.find(format!("{what}, {place}"));
                    return false;
                }
                waits[lanes].fill(None);
                progress = true;
                continue;
            }
            let inputs = core::array::from_fn(|lane| states[32 * warp + lane].input);
            let outputs = collective::execute(op, &inputs);
            for (lane, output) in outputs.into_iter().enumerate() {
                states[32 * warp + lane].output = output;
            }
            // Only this one orders memory.
            if op == Collective::SyncWarp {
                Clock::join(&mut self.clocks.borrow_mut(), lanes.clone());
            }
            waits[lanes].fill(None);
            progress = true;
        }
        progress
    }

    /// Opens barriers that are complete; whether any was.
    fn open_barriers(&self, waits: &mut [Option<Wait>]) -> bool {
        let mut progress = false;
        let n_barriers = BARRIERS * (self.threads / self.cta_threads) as u32 + 1;
        for barrier in 0..n_barriers {
            let at_barrier = |t: &usize| matches!(waits[*t], Some(Wait::Barrier { id, .. }) if id == barrier);
            let threads: Vec<usize> = (0..self.threads).filter(at_barrier).collect();
            let Some(Some(Wait::Barrier { count, .. })) = threads.first().map(|&t| waits[t]) else {
                continue;
            };
            let mut arrivals = self.arrivals.borrow_mut();
            let arrived = arrivals.get(&barrier).map_or(0, |(n, _)| *n);
            if (threads.len() as u32 + arrived) < count.unwrap_or(self.threads as u32) {
                continue;
            }
            for lanes in threads.chunk_by(|a, b| a / 32 == b / 32) {
                let place = |t: usize| waits[t].map_or(String::new(), |wait| wait.describe());
                if let Some(&other) = lanes.iter().find(|&&t| place(t) != place(lanes[0])) {
                    let (warp, a, b) = (lanes[0] / 32, place(lanes[0]), place(other));
                    self.find(format!(
                        "divergent warp {warp}: {a} and {b} are one barrier reached at two places"
                    ));
                    return false;
                }
            }
            let mut clocks = self.clocks.borrow_mut();
            Clock::join(&mut clocks, threads.iter().copied());
            if let Some((_, known)) = arrivals.remove(&barrier) {
                threads.iter().for_each(|&t| clocks[t].merge(&known));
            }
            threads.iter().for_each(|&t| waits[t] = None);
            progress = true;
        }
        progress
    }

    /// Lets threads behind mbarriers look again; whether one will find its phase ended.
    fn wake_mbarriers(&self, waits: &mut [Option<Wait>]) -> bool {
        for wait in waits.iter() {
            if let Some(Wait::Mbarrier { address, .. }) = wait {
                self.finish_copies(*address);
            }
        }
        let mbarriers = self.mbarriers.borrow();
        let mut progress = false;
        for wait in waits {
            if let Some(Wait::Mbarrier { address, parity, .. }) = wait
                && mbarriers.get(address).is_some_and(|barrier| barrier.parity != *parity)
            {
                *wait = None;
                progress = true;
            }
        }
        progress
    }
}

fn no_mbarrier(address: u32) -> String {
    format!("shared memory at {address} is no initialised mbarrier")
}

/// Stacks of threads that have ended: mapping one costs more than most kernels.
static STACKS: Mutex<Vec<DefaultStack>> = Mutex::new(Vec::new());

fn stacks() -> MutexGuard<'static, Vec<DefaultStack>> {
    STACKS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs one CTA; returns what it did wrong.
pub(super) fn run(
    entry: &Entry,
    launch: &Launch,
    idx: [u32; 3],
    number: u32,
    memory: &Arc<Memory>,
    marks: Option<&Arc<LaunchMarks>>,
    options: Options,
) -> Vec<String> {
    let cta_threads = launch.cta as usize;
    let threads = cta_threads * launch.cluster as usize;
    let smem_bytes = (launch.cluster - 1) * WINDOW_BYTES + launch.smem_bytes;
    let cta = Rc::new(Cta {
        idx,
        grid: launch.grid,
        number,
        threads,
        cta_threads,
        marks: marks.cloned(),
        memory: memory.clone(),
        recent: RefCell::default(),
        lent: RefCell::default(),
        smem: RefCell::new(SharedMemory::new(smem_bytes, launch.smem_bytes, threads)),
        clocks: RefCell::new(vec![Clock::start(threads); threads]),
        states: RefCell::new((0..threads).map(|_| Thread::default()).collect()),
        yielders: (0..threads).map(|_| Cell::new(std::ptr::null())).collect(),
        arrivals: RefCell::default(),
        mbarriers: RefCell::default(),
        engine: RefCell::default(),
        findings: RefCell::default(),
    });
    lane::enter(&cta);
    schedule(&cta, entry, launch, options.seed ^ u64::from(number));
    lane::leave();
    let left = cta.engine.borrow().copies.len();
    if left != 0 && cta.findings.borrow().is_empty() {
        let [x, y, z] = idx;
        cta.find(format!("{left} bulk copies under way when the CTA ended (CTA {x},{y},{z})"));
    }
    cta.findings.take()
}

fn schedule(cta: &Rc<Cta>, entry: &Entry, launch: &Launch, seed: u64) {
    let (run, params) = (entry.run, launch.params);
    let start = |t: usize| -> std::io::Result<_> {
        let stack = match stacks().pop() {
            Some(stack) => stack,
            None => DefaultStack::new(STACK_BYTES)?,
        };
        let cta = cta.clone();
        Ok(Some(Coroutine::with_stack(stack, move |yielder: &Yielder<(), Wait>, ()| {
            cta.yielders[t].set(yielder);
            run(&mut ParamReader::new(&params));
        })))
    };
    let mut coroutines: Vec<Option<Coroutine<(), Wait, (), DefaultStack>>> =
        match (0..cta.threads).map(start).collect() {
            Ok(coroutines) => coroutines,
            Err(error) => return cta.find(format!("no stack for a thread: {error}")),
        };
    let mut waits: Vec<Option<Wait>> = vec![None; cta.threads];
    let mut alive = vec![true; cta.threads];
    let mut random = crate::case::Random::new(seed);
    while alive.contains(&true) {
        let mut progress = false;
        let first = random.below(cta.threads as u64) as usize;
        for t in (first..cta.threads).chain(0..first) {
            if waits[t].is_some() {
                continue;
            }
            let Some(coroutine) = &mut coroutines[t] else { continue };
            progress = true;
            lane::turn(t);
            match catch_unwind(AssertUnwindSafe(|| coroutine.resume(()))) {
                Ok(CoroutineResult::Yield(Wait::Failed)) => return,
                Ok(CoroutineResult::Yield(wait)) => waits[t] = Some(wait),
                Ok(CoroutineResult::Return(())) => {
                    if !cta.thread(t, |thread| thread.waited) {
                        let [x, y, z] = cta.idx;
                        let who = format!("(CTA {x},{y},{z}, thread {t})");
                        return cta.find(format!("ended without waiting for earlier launches {who}"));
                    }
                    alive[t] = false;
                    if let Some(done) = coroutines[t].take() {
                        stacks().push(done.into_stack());
                    }
                }
                Err(panic) => {
                    let text = panic.downcast_ref::<String>().cloned();
                    let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| text.to_string()));
                    let [x, y, z] = cta.idx;
                    let text = text.unwrap_or_default();
                    return cta.find(format!("the kernel panicked: {text} (CTA {x},{y},{z}, thread {t})"));
                }
            }
        }
        progress |= cta.run_collectives(&mut waits, &alive);
        progress |= cta.open_barriers(&mut waits);
        progress |= cta.wake_mbarriers(&mut waits);
        if !cta.findings.borrow().is_empty() {
            return;
        }
        if !progress {
            let waiting: Vec<usize> = (0..cta.threads).filter(|&t| waits[t].is_some()).collect();
            let ended = alive.iter().filter(|alive| !**alive).count();
            let who =
                waiting.iter().take(3).filter_map(|&t| Some(format!("thread {t}: {}", waits[t]?.describe())));
            let who = who.collect::<Vec<_>>().join(", ");
            let (n, [x, y, z]) = (cta.threads, cta.idx);
            let len = waiting.len();
            return cta.find(format!(
                "deadlock: {len} of {n} threads wait, {ended} have ended; {who} (CTA {x},{y},{z})"
            ));
        }
    }
}
