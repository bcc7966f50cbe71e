//! The GPU: a broker on the host, reached by a virtio console; our RAM is the window that it maps.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::time::Duration;

use gpu_kernels::driver::DriverError;
use gpu_kernels::ptx::BUILD;
use runtime_uk::{Link, LinkError, RemoteDriver, Window};
use uk_kernel::clock;
use uk_kernel::console::Console;
use uk_kernel::devices::Devices;
use uk_kernel::machine::Machine;
use uk_kernel::memory::Range;

/// Where RAM goes on above the hole that devices lie in.
const HIGH: u64 = 1 << 32;
/// VMMs cut RAM at multiples of this.
const CUT: u64 = 128 << 20;

struct ConsoleLink(Console);

impl Link for ConsoleLink {
    fn send(&mut self, bytes: &[u8]) -> Result<(), LinkError> {
        self.0.send(bytes).map_err(|_| LinkError::Device)
    }
    fn receive(&mut self, into: &mut [u8]) -> Result<usize, LinkError> {
        self.0.receive(into).map_err(|_| LinkError::Device)
    }
    fn pause(&mut self) {
        // A step's result is near, and a sleep could last a tick.
        core::hint::spin_loop();
    }
    fn now(&self) -> Duration {
        clock::now()
    }
}

/// Our RAM as the file that the VMM made it of: the part below the hole, then the part above.
struct Ram {
    ranges: Vec<Range>,
    low_bytes: u64,
}

impl Ram {
    fn new(ranges: &[Range]) -> Ram {
        let low_end = ranges.iter().map(|range| range.end()).filter(|end| *end <= HIGH).max();
        Ram { ranges: ranges.to_vec(), low_bytes: low_end.unwrap_or(0).next_multiple_of(CUT) }
    }
}

impl Window for Ram {
    fn offset(&self, at: *const u8, bytes: usize) -> Option<u64> {
        let at = at.expose_provenance() as u64;
        let end = at.checked_add(bytes as u64)?;
        let own = self.ranges.iter().any(|range| range.start <= at && end <= range.end());
        let offset = if at < HIGH { at } else { at - HIGH + self.low_bytes };
        own.then_some(offset)
    }
}

/// Greets the broker.
pub fn open(machine: &Machine, devices: &mut Devices) -> Result<RemoteDriver, DriverError> {
    let no_driver = |what: &str| DriverError::NoDriver { what: what.into() };
    let transport = devices.console.pop();
    let transport = transport.ok_or_else(|| no_driver("device=gpu needs a virtio console to a broker"))?;
    let console = Console::new(transport).map_err(|_| no_driver("the virtio console cannot be set up"))?;
    RemoteDriver::open(Box::new(ConsoleLink(console)), Some(Box::new(Ram::new(&machine.ram))), BUILD)
}
