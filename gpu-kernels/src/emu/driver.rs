//! The emulator as a driver: work happens at once, on the caller's thread and as many more as there are CTAs and cores.

use std::format;
use std::string::ToString;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;
use std::vec::Vec;

use super::memory::Memory;
use super::{Entry, MAX_SMEM_BYTES, Options};
use crate::driver::{DeviceInfo, Driver, DriverError, EventId, MemKind, ModuleId, StreamId};
use crate::launch::{DevicePtr, Launch};
use crate::ptx::PtxModule;
use crate::registry;

/// The emulated device.
#[derive(Debug)]
pub struct Emulator {
    memory: Arc<Memory>,
    options: Options,
    streams: AtomicU32,
    /// Times of recorded events; `None` once released.
    events: Mutex<Vec<Option<Instant>>>,
}

impl Emulator {
    /// A device with no memory in use.
    pub fn new(options: Options) -> Emulator {
        Emulator { memory: Arc::default(), options, streams: AtomicU32::new(1), events: Mutex::default() }
    }

    /// The one module: every kernel of the crate, from its Rust source. No PTX is involved.
    pub const MODULE: ModuleId = ModuleId(0);

    /// Runs a kernel that need not be in the registry.
    pub fn run(&self, entry: &Entry, launch: &Launch) -> Result<(), DriverError> {
        super::run(entry, launch, &self.memory, self.options)
    }

    fn place(
        &self,
        op: &'static str,
        at: DevicePtr,
        bytes: u64,
    ) -> Result<super::memory::Place, DriverError> {
        self.memory.find(at.0, bytes).ok_or(DriverError::Address { op, at, bytes })
    }

    fn stream(&self, stream: StreamId) -> Result<(), DriverError> {
        let known = stream.0 < self.streams.load(Ordering::Relaxed);
        if known { Ok(()) } else { Err(DriverError::Handle { what: "stream", id: stream.0 }) }
    }

    fn module(&self, module: ModuleId) -> Result<(), DriverError> {
        let known = module == Emulator::MODULE;
        if known { Ok(()) } else { Err(DriverError::Handle { what: "module", id: module.0 }) }
    }

    fn event(&self, event: EventId) -> Result<Instant, DriverError> {
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        let time = events.get(event.0 as usize).copied().flatten();
        time.ok_or(DriverError::Handle { what: "event", id: event.0 })
    }
}

impl Driver for Emulator {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            name: "emulator".to_string(),
            sm: 80,
            n_sm: std::thread::available_parallelism().map_or(1, |n| n.get() as u32),
            memory_bytes: u64::MAX,
            smem_per_cta_bytes: MAX_SMEM_BYTES,
        }
    }

    fn alloc(&self, kind: MemKind, bytes: u64) -> Result<DevicePtr, DriverError> {
        self.memory.alloc(bytes).ok_or(DriverError::OutOfMemory { kind, bytes })
    }

    fn free(&self, at: DevicePtr) -> Result<(), DriverError> {
        if self.memory.free(at) { Ok(()) } else { Err(DriverError::Address { op: "free", at, bytes: 0 }) }
    }

    fn write(&self, to: DevicePtr, from: &[u8], stream: StreamId) -> Result<(), DriverError> {
        self.stream(stream)?;
        let place = self.place("write", to, from.len() as u64)?;
        place.allocation.store(place.offset, from);
        Ok(())
    }

    fn read(&self, to: &mut [u8], from: DevicePtr, stream: StreamId) -> Result<(), DriverError> {
        self.stream(stream)?;
        let place = self.place("read", from, to.len() as u64)?;
        place.allocation.load(place.offset, to);
        Ok(())
    }

    fn copy(&self, to: DevicePtr, from: DevicePtr, bytes: u64, stream: StreamId) -> Result<(), DriverError> {
        self.stream(stream)?;
        let (from, to) = (self.place("copy", from, bytes)?, self.place("copy", to, bytes)?);
        let mut data = std::vec![0; bytes as usize];
        from.allocation.load(from.offset, &mut data);
        to.allocation.store(to.offset, &data);
        Ok(())
    }

    fn fill(&self, at: DevicePtr, byte: u8, bytes: u64, stream: StreamId) -> Result<(), DriverError> {
        self.stream(stream)?;
        let place = self.place("fill", at, bytes)?;
        place.allocation.store(place.offset, &std::vec![byte; bytes as usize]);
        Ok(())
    }

    fn builtin(&self) -> Option<ModuleId> {
        Some(Emulator::MODULE)
    }

    fn load(&self, _module: &PtxModule) -> Result<ModuleId, DriverError> {
        Ok(Emulator::MODULE)
    }

    fn unload(&self, module: ModuleId) -> Result<(), DriverError> {
        self.module(module)
    }

    fn launch(&self, module: ModuleId, launch: &Launch, stream: StreamId) -> Result<(), DriverError> {
        self.stream(stream)?;
        self.module(module)?;
        let entries =
            registry::KERNELS.iter().flat_map(|kernel| kernel.entries()).flat_map(|table| table.iter());
        match entries.into_iter().find(|entry| entry.name == launch.entry) {
            Some(entry) => self.run(entry, launch),
            None => Err(DriverError::NoKernel { entry: format!("{} (registry.rs has none)", launch.entry) }),
        }
    }

    fn create_stream(&self) -> Result<StreamId, DriverError> {
        Ok(StreamId(self.streams.fetch_add(1, Ordering::Relaxed)))
    }

    fn synchronise(&self, stream: StreamId) -> Result<(), DriverError> {
        self.stream(stream)
    }

    fn record(&self, stream: StreamId) -> Result<EventId, DriverError> {
        self.stream(stream)?;
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        events.push(Some(Instant::now()));
        Ok(EventId(events.len() as u32 - 1))
    }

    fn wait(&self, stream: StreamId, event: EventId) -> Result<(), DriverError> {
        self.stream(stream)?;
        self.event(event).map(drop)
    }

    fn elapsed_ns(&self, from: EventId, to: EventId) -> Result<u64, DriverError> {
        let elapsed = self.event(to)?.saturating_duration_since(self.event(from)?);
        Ok(elapsed.as_nanos() as u64)
    }

    fn release(&self, event: EventId) -> Result<(), DriverError> {
        self.event(event)?;
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = events.get_mut(event.0 as usize) {
            *slot = None;
        }
        Ok(())
    }
}
