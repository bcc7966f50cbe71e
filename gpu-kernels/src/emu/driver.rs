//! The emulator as a driver: work happens at once, on the caller's thread and as many more as there are CTAs and cores.
//!
//! Capture records commands instead; a graph replays them in the order they were given, which is one of the orders that
//! a GPU may choose.

use core::ptr::NonNull;
use std::collections::BTreeSet;
use std::format;
use std::string::ToString;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use std::vec::Vec;

use super::memory::{Memory, Place};
use super::{Entry, MAX_SMEM_BYTES, Options};
use crate::driver::{
    DeviceInfo, Driver, DriverError, EventId, GraphId, HostAccess, MemKind, ModuleId, StreamId,
};
use crate::launch::{DevicePtr, Launch};
use crate::ptx::PtxModule;
use crate::registry;
use crate::slots::Slots;

/// The emulated device.
#[derive(Debug)]
pub struct Emulator {
    memory: Arc<Memory>,
    options: Options,
    /// Kernels beside the registry's, or in the place of those of the same name.
    extra: &'static [Entry],
    handles: Mutex<Handles>,
}

#[derive(Debug)]
struct Handles {
    /// Per stream, the capture it is part of.
    streams: Slots<Option<u32>>,
    events: Slots<Event>,
    captures: Slots<Capture>,
    graphs: Slots<Arc<[Command]>>,
}

/// A recorded event.
#[derive(Clone, Copy, Debug)]
enum Event {
    At(Instant),
    /// Recorded on a stream of a capture.
    Captured {
        capture: u32,
        stream: StreamId,
    },
}

/// A graph in the making.
#[derive(Debug)]
struct Capture {
    origin: StreamId,
    commands: Vec<Command>,
    /// Streams with work that no other stream of the capture waited for.
    unjoined: BTreeSet<u32>,
}

/// What a stream can be told to do.
#[derive(Clone, Copy, Debug)]
#[allow(clippy::large_enum_variant)] // nearly all commands are launches
enum Command {
    Launch(ModuleId, Launch),
    Copy { to: DevicePtr, from: DevicePtr, bytes: u64 },
    Fill { at: DevicePtr, byte: u8, bytes: u64 },
}

impl Emulator {
    /// A device with no memory in use.
    pub fn new(options: Options) -> Emulator {
        Emulator::with_kernels(options, &[])
    }

    /// A device that has these kernels beside the registry's, or in the place of those of the same name.
    pub fn with_kernels(options: Options, extra: &'static [Entry]) -> Emulator {
        let mut streams = Slots::default();
        let default = streams.insert(None);
        assert_eq!(StreamId(default), StreamId::DEFAULT);
        let handles = Handles {
            streams,
            events: Slots::default(),
            captures: Slots::default(),
            graphs: Slots::default(),
        };
        Emulator { memory: Arc::default(), options, extra, handles: Mutex::new(handles) }
    }

    /// The one module: every kernel of the crate, from its Rust source. No PTX is involved.
    pub const MODULE: ModuleId = ModuleId(0);

    /// Runs a kernel that need not be in the registry.
    pub fn run(&self, entry: &Entry, launch: &Launch) -> Result<(), DriverError> {
        super::run(entry, launch, &self.memory, self.options)
    }

    fn place(&self, op: &'static str, at: DevicePtr, bytes: u64) -> Result<Place, DriverError> {
        self.memory.find(at.0, bytes).ok_or(DriverError::Address { op, at, bytes })
    }

    /// A place that the host reaches too.
    fn host_place(&self, op: &'static str, at: DevicePtr, bytes: u64) -> Result<Place, DriverError> {
        let place = self.place(op, at, bytes)?;
        let reachable = place.allocation.kind() != MemKind::Device;
        if reachable { Ok(place) } else { Err(DriverError::Address { op, at, bytes }) }
    }

    /// The kernel that a launch names.
    fn entry(&self, launch: &Launch) -> Result<&'static Entry, DriverError> {
        let tables = registry::KERNELS.iter().flat_map(|kernel| kernel.entries());
        let mut entries = self.extra.iter().chain(tables.flat_map(|table| table.iter()));
        let found = entries.find(|entry| entry.name == launch.entry);
        found.ok_or_else(|| DriverError::NoKernel {
            entry: format!("{} (registry.rs has none)", launch.entry),
        })
    }

    fn module(&self, module: ModuleId) -> Result<(), DriverError> {
        let known = module == Emulator::MODULE;
        if known { Ok(()) } else { Err(DriverError::Handle { what: "module", id: module.0 }) }
    }

    fn handles(&self) -> MutexGuard<'_, Handles> {
        self.handles.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The stream exists and is not part of a capture.
    fn not_captured(&self, op: &'static str, stream: StreamId) -> Result<(), DriverError> {
        match self.handles().capture(stream)? {
            None => Ok(()),
            Some(_) => Err(DriverError::Capture { op }),
        }
    }

    /// Records or does it.
    fn submit(&self, command: Command, stream: StreamId) -> Result<(), DriverError> {
        self.check(&command)?;
        let mut handles = self.handles();
        if let Some(capture) = handles.capture(stream)? {
            if let Some(capture) = handles.captures.get_mut(capture) {
                capture.commands.push(command);
                capture.work_on(stream);
            }
            return Ok(());
        }
        drop(handles);
        self.perform(&command)
    }

    /// What a GPU's driver checks when the command is given.
    fn check(&self, command: &Command) -> Result<(), DriverError> {
        match *command {
            Command::Launch(module, launch) => {
                self.module(module)?;
                self.entry(&launch).map(drop)
            }
            Command::Copy { to, from, bytes } => {
                self.place("copy", from, bytes)?;
                self.place("copy", to, bytes).map(drop)
            }
            Command::Fill { at, bytes, .. } => self.place("fill", at, bytes).map(drop),
        }
    }

    fn perform(&self, command: &Command) -> Result<(), DriverError> {
        match *command {
            Command::Launch(_, launch) => self.run(self.entry(&launch)?, &launch)?,
            Command::Copy { to, from, bytes } => {
                let (from, to) = (self.place("copy", from, bytes)?, self.place("copy", to, bytes)?);
                let mut data = std::vec![0; bytes as usize];
                from.allocation.load(from.offset, &mut data);
                to.allocation.store(to.offset, &data);
            }
            Command::Fill { at, byte, bytes } => {
                let place = self.place("fill", at, bytes)?;
                place.allocation.store(place.offset, &std::vec![byte; bytes as usize]);
            }
        }
        Ok(())
    }
}

impl Handles {
    /// The capture that a stream is part of.
    fn capture(&self, stream: StreamId) -> Result<Option<u32>, DriverError> {
        let known = self.streams.get(stream.0).copied();
        known.ok_or(DriverError::Handle { what: "stream", id: stream.0 })
    }

    fn event(&self, event: EventId) -> Result<Event, DriverError> {
        self.events.get(event.0).copied().ok_or(DriverError::Handle { what: "event", id: event.0 })
    }

    /// The time of an event that is not part of a graph.
    fn time(&self, op: &'static str, event: EventId) -> Result<Instant, DriverError> {
        match self.event(event)? {
            Event::At(time) => Ok(time),
            Event::Captured { .. } => Err(DriverError::Capture { op }),
        }
    }

    fn mark(&self, stream: StreamId) -> Result<Event, DriverError> {
        Ok(match self.capture(stream)? {
            None => Event::At(Instant::now()),
            Some(capture) => Event::Captured { capture, stream },
        })
    }
}

impl Capture {
    fn work_on(&mut self, stream: StreamId) {
        if stream != self.origin {
            self.unjoined.insert(stream.0);
        }
    }
}

impl Driver for Emulator {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            name: "emulator".to_string(),
            sm: self.options.sm,
            driver_version: 13_000,
            n_sm: std::thread::available_parallelism().map_or(1, |n| n.get() as u32),
            memory_bytes: u64::MAX,
            smem_per_cta_bytes: MAX_SMEM_BYTES,
            smem_per_sm_bytes: MAX_SMEM_BYTES,
            ..DeviceInfo::default()
        }
    }

    fn free_bytes(&self) -> Result<u64, DriverError> {
        Ok(u64::MAX)
    }

    fn alloc(&self, kind: MemKind, bytes: u64) -> Result<DevicePtr, DriverError> {
        self.memory.alloc(kind, bytes).ok_or(DriverError::OutOfMemory { kind, bytes })
    }

    fn free(&self, at: DevicePtr) -> Result<(), DriverError> {
        if self.memory.free(at) { Ok(()) } else { Err(DriverError::Address { op: "free", at, bytes: 0 }) }
    }

    unsafe fn register_host(
        &self,
        at: NonNull<u8>,
        bytes: usize,
        _access: HostAccess,
    ) -> Result<DevicePtr, DriverError> {
        let refused = DriverError::OutOfMemory { kind: MemKind::Host, bytes: bytes as u64 };
        // SAFETY: the caller's promises are those of the function.
        unsafe { self.memory.register(at, bytes) }.ok_or(refused)
    }

    fn unregister_host(&self, at: DevicePtr) -> Result<(), DriverError> {
        let found = self.memory.unregister(at);
        if found { Ok(()) } else { Err(DriverError::Address { op: "unregister_host", at, bytes: 0 }) }
    }

    fn write_host(&self, to: DevicePtr, from: &[u8]) -> Result<(), DriverError> {
        let place = self.host_place("write_host", to, from.len() as u64)?;
        place.allocation.store(place.offset, from);
        Ok(())
    }

    fn fill_host(
        &self,
        to: DevicePtr,
        bytes: usize,
        fill: &mut dyn FnMut(&mut [u8]),
    ) -> Result<(), DriverError> {
        let place = self.host_place("fill_host", to, bytes as u64)?;
        let mut data = std::vec![0; bytes];
        fill(&mut data);
        place.allocation.store(place.offset, &data);
        Ok(())
    }

    fn read_host(&self, to: &mut [u8], from: DevicePtr) -> Result<(), DriverError> {
        let place = self.host_place("read_host", from, to.len() as u64)?;
        place.allocation.load(place.offset, to);
        Ok(())
    }

    fn write(&self, to: DevicePtr, from: &[u8], stream: StreamId) -> Result<(), DriverError> {
        self.not_captured("write", stream)?;
        let place = self.place("write", to, from.len() as u64)?;
        place.allocation.store(place.offset, from);
        Ok(())
    }

    fn read(&self, to: &mut [u8], from: DevicePtr, stream: StreamId) -> Result<(), DriverError> {
        self.not_captured("read", stream)?;
        let place = self.place("read", from, to.len() as u64)?;
        place.allocation.load(place.offset, to);
        Ok(())
    }

    fn copy(&self, to: DevicePtr, from: DevicePtr, bytes: u64, stream: StreamId) -> Result<(), DriverError> {
        self.submit(Command::Copy { to, from, bytes }, stream)
    }

    fn fill(&self, at: DevicePtr, byte: u8, bytes: u64, stream: StreamId) -> Result<(), DriverError> {
        self.submit(Command::Fill { at, byte, bytes }, stream)
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
        self.submit(Command::Launch(module, *launch), stream)
    }

    fn create_stream(&self) -> Result<StreamId, DriverError> {
        Ok(StreamId(self.handles().streams.insert(None)))
    }

    fn release_stream(&self, stream: StreamId) -> Result<(), DriverError> {
        self.not_captured("release_stream", stream)?;
        if stream == StreamId::DEFAULT {
            return Err(DriverError::Handle { what: "stream of our own", id: stream.0 });
        }
        self.handles().streams.remove(stream.0);
        Ok(())
    }

    fn synchronise(&self, stream: StreamId) -> Result<(), DriverError> {
        self.not_captured("synchronise", stream)
    }

    fn record(&self, stream: StreamId) -> Result<EventId, DriverError> {
        let mut handles = self.handles();
        let event = handles.mark(stream)?;
        Ok(EventId(handles.events.insert(event)))
    }

    fn record_again(&self, event: EventId, stream: StreamId) -> Result<(), DriverError> {
        let mut handles = self.handles();
        let mark = handles.mark(stream)?;
        let slot = handles.events.get_mut(event.0);
        *slot.ok_or(DriverError::Handle { what: "event", id: event.0 })? = mark;
        Ok(())
    }

    fn wait(&self, stream: StreamId, event: EventId) -> Result<(), DriverError> {
        let mut handles = self.handles();
        let (event, current) = (handles.event(event)?, handles.capture(stream)?);
        match (event, current) {
            // Done by the time it could be waited for.
            (Event::At(_), None) => Ok(()),
            (Event::Captured { capture, stream: other }, _) if current.is_none_or(|c| c == capture) => {
                let refused = DriverError::Capture { op: "wait" };
                let capture_of = handles.captures.get_mut(capture).ok_or(refused)?;
                if other != stream {
                    capture_of.unjoined.remove(&other.0);
                    capture_of.work_on(stream);
                }
                if let Some(slot) = handles.streams.get_mut(stream.0) {
                    *slot = Some(capture);
                }
                Ok(())
            }
            _ => Err(DriverError::Capture { op: "wait" }),
        }
    }

    fn synchronise_event(&self, event: EventId) -> Result<(), DriverError> {
        self.handles().time("synchronise_event", event).map(drop)
    }

    fn is_done(&self, event: EventId) -> Result<bool, DriverError> {
        self.handles().time("is_done", event).map(|_| true)
    }

    fn elapsed_ns(&self, from: EventId, to: EventId) -> Result<u64, DriverError> {
        let handles = self.handles();
        let (from, to) = (handles.time("elapsed_ns", from)?, handles.time("elapsed_ns", to)?);
        Ok(to.saturating_duration_since(from).as_nanos() as u64)
    }

    fn release(&self, event: EventId) -> Result<(), DriverError> {
        let removed = self.handles().events.remove(event.0);
        removed.map(drop).ok_or(DriverError::Handle { what: "event", id: event.0 })
    }

    fn begin_capture(&self, stream: StreamId) -> Result<(), DriverError> {
        self.not_captured("begin_capture", stream)?;
        let mut handles = self.handles();
        let capture = Capture { origin: stream, commands: Vec::new(), unjoined: BTreeSet::new() };
        let capture = handles.captures.insert(capture);
        if let Some(slot) = handles.streams.get_mut(stream.0) {
            *slot = Some(capture);
        }
        Ok(())
    }

    fn end_capture(&self, stream: StreamId) -> Result<GraphId, DriverError> {
        let mut handles = self.handles();
        let refused = DriverError::Capture { op: "end_capture" };
        let id = handles.capture(stream)?.ok_or(refused.clone())?;
        if handles.captures.get(id).is_none_or(|capture| capture.origin != stream) {
            return Err(refused);
        }
        let capture = handles.captures.remove(id).ok_or(refused.clone())?;
        for of in handles.streams.iter_mut().filter(|of| **of == Some(id)) {
            *of = None;
        }
        if !capture.unjoined.is_empty() {
            return Err(refused);
        }
        Ok(GraphId(handles.graphs.insert(capture.commands.into())))
    }

    fn launch_graph(&self, graph: GraphId, stream: StreamId) -> Result<(), DriverError> {
        self.not_captured("launch_graph", stream)?;
        let commands = self.handles().graphs.get(graph.0).cloned();
        let commands = commands.ok_or(DriverError::Handle { what: "graph", id: graph.0 })?;
        commands.iter().try_for_each(|command| self.perform(command))
    }

    fn release_graph(&self, graph: GraphId) -> Result<(), DriverError> {
        let removed = self.handles().graphs.remove(graph.0);
        removed.map(drop).ok_or(DriverError::Handle { what: "graph", id: graph.0 })
    }
}
