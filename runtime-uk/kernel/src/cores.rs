//! The booted cores as an [`Executor`](engine::Executor): the engine's [`Workers`], which park by `hlt`.

use alloc::boxed::Box;

use engine::workers::{Parking, Workers};

/// Looks at the state before a worker parks: some tens of microseconds, the gap between two regions of a step.
const SPINS: u32 = 2_000;

/// The core that runs the program, and the others as its workers.
pub type Cores = Workers<Halt>;

/// Parks with the interrupt controller's help: `hlt`, ended by another core's wake-up.
pub struct Halt {
    /// The workers' APIC numbers.
    pub apic_ids: Box<[u32]>,
}

impl Parking for Halt {
    fn spin(&self, go_on: &dyn Fn() -> bool) {
        for _ in 0..SPINS {
            if go_on() {
                return;
            }
            core::hint::spin_loop();
        }
    }
    fn park(&self, _worker: usize, go_on: &dyn Fn() -> bool) {
        crate::fault::wait(go_on);
    }
    fn unpark(&self, worker: usize) {
        crate::apic::Apic::this().wake(self.apic_ids[worker]);
    }
}
