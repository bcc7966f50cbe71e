//! A driver that fails on purpose, and counts what it gave out and got back.

use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use gpu_kernels::driver::{
    DeviceInfo, Driver, DriverError, EventId, GraphId, HostAccess, MemKind, ModuleId, StreamId,
};
use gpu_kernels::emu::{Emulator, Options};
use gpu_kernels::launch::{DevicePtr, Launch};
use gpu_kernels::ptx::PtxModule;

/// What fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// This allocation, counted from 0.
    Allocation(u64),
    /// This launch.
    Launch(u64),
    /// Everything from this call on.
    Lost(u64),
    /// Lending of pinned memory, which not every driver has.
    Lending,
}

/// The emulator with a fault.
pub struct Faulty {
    inner: Emulator,
    fault: Mutex<Option<Fault>>,
    allocations: AtomicU64,
    launches: AtomicU64,
    calls: AtomicU64,
    /// Where the allocation that failed would have been.
    pub refused: Mutex<Option<MemKind>>,
    /// Memory, streams, graphs and events given out and not returned.
    pub alive: AtomicI64,
}

impl Faulty {
    pub fn new(fault: Option<Fault>) -> Faulty {
        Faulty {
            inner: Emulator::new(Options::default()),
            fault: Mutex::new(fault),
            allocations: AtomicU64::new(0),
            launches: AtomicU64::new(0),
            calls: AtomicU64::new(0),
            refused: Mutex::new(None),
            alive: AtomicI64::new(0),
        }
    }

    /// Nothing fails any more.
    pub fn mend(&self) {
        *self.fault.lock().unwrap() = None;
    }

    /// How many (allocations, launches, calls) there were.
    pub fn counts(&self) -> [u64; 3] {
        [&self.allocations, &self.launches, &self.calls].map(|n| n.load(Ordering::Relaxed))
    }

    fn call(&self, op: &'static str) -> Result<(), DriverError> {
        let n = self.calls.fetch_add(1, Ordering::Relaxed);
        match *self.fault.lock().unwrap() {
            Some(Fault::Lost(from)) if n >= from => {
                Err(DriverError::Lost { op, code: 719, what: "on purpose".into() })
            }
            _ => Ok(()),
        }
    }

    fn given<T>(&self, result: Result<T, DriverError>) -> Result<T, DriverError> {
        self.alive.fetch_add(i64::from(result.is_ok()), Ordering::Relaxed);
        result
    }

    /// What a caller returns is returned, even to a lost device.
    fn returned(&self, op: &'static str, result: Result<(), DriverError>) -> Result<(), DriverError> {
        self.alive.fetch_sub(1, Ordering::Relaxed);
        self.call(op)?;
        result
    }
}

impl Driver for Faulty {
    fn info(&self) -> DeviceInfo {
        self.inner.info()
    }
    fn free_bytes(&self) -> Result<u64, DriverError> {
        self.inner.free_bytes()
    }
    fn alloc(&self, kind: MemKind, bytes: u64) -> Result<DevicePtr, DriverError> {
        self.call("alloc")?;
        let n = self.allocations.fetch_add(1, Ordering::Relaxed);
        if *self.fault.lock().unwrap() == Some(Fault::Allocation(n)) {
            *self.refused.lock().unwrap() = Some(kind);
            return Err(DriverError::OutOfMemory { kind, bytes });
        }
        self.given(self.inner.alloc(kind, bytes))
    }
    fn free(&self, at: DevicePtr) -> Result<(), DriverError> {
        self.returned("free", self.inner.free(at))
    }
    unsafe fn register_host(
        &self,
        at: NonNull<u8>,
        bytes: usize,
        access: HostAccess,
    ) -> Result<DevicePtr, DriverError> {
        // SAFETY: the caller's contract is the inner driver's.
        unsafe { self.inner.register_host(at, bytes, access) }
    }
    fn write_host(&self, to: DevicePtr, from: &[u8]) -> Result<(), DriverError> {
        self.call("write_host")?;
        self.inner.write_host(to, from)
    }
    fn fill_host(
        &self,
        to: DevicePtr,
        bytes: usize,
        fill: &mut dyn FnMut(&mut [u8]),
    ) -> Result<(), DriverError> {
        self.call("fill_host")?;
        if *self.fault.lock().unwrap() == Some(Fault::Lending) {
            return Err(DriverError::Unsupported { op: "fill_host" });
        }
        self.inner.fill_host(to, bytes, fill)
    }
    fn read_host(&self, to: &mut [u8], from: DevicePtr) -> Result<(), DriverError> {
        self.call("read_host")?;
        self.inner.read_host(to, from)
    }
    fn write(&self, to: DevicePtr, from: &[u8], stream: StreamId) -> Result<(), DriverError> {
        self.call("write")?;
        self.inner.write(to, from, stream)
    }
    fn read(&self, to: &mut [u8], from: DevicePtr, stream: StreamId) -> Result<(), DriverError> {
        self.call("read")?;
        self.inner.read(to, from, stream)
    }
    fn copy(&self, to: DevicePtr, from: DevicePtr, bytes: u64, stream: StreamId) -> Result<(), DriverError> {
        self.call("copy")?;
        self.inner.copy(to, from, bytes, stream)
    }
    fn fill(&self, at: DevicePtr, byte: u8, bytes: u64, stream: StreamId) -> Result<(), DriverError> {
        self.call("fill")?;
        self.inner.fill(at, byte, bytes, stream)
    }
    fn builtin(&self) -> Option<ModuleId> {
        self.inner.builtin()
    }
    fn load(&self, module: &PtxModule) -> Result<ModuleId, DriverError> {
        self.inner.load(module)
    }
    fn unload(&self, module: ModuleId) -> Result<(), DriverError> {
        self.inner.unload(module)
    }
    fn launch(&self, module: ModuleId, launch: &Launch, stream: StreamId) -> Result<(), DriverError> {
        self.call("launch")?;
        let n = self.launches.fetch_add(1, Ordering::Relaxed);
        if *self.fault.lock().unwrap() == Some(Fault::Launch(n)) {
            return Err(DriverError::Launch { entry: launch.entry, what: "on purpose".into() });
        }
        self.inner.launch(module, launch, stream)
    }
    fn create_stream(&self) -> Result<StreamId, DriverError> {
        self.call("create_stream")?;
        self.given(self.inner.create_stream())
    }
    fn release_stream(&self, stream: StreamId) -> Result<(), DriverError> {
        self.returned("release_stream", self.inner.release_stream(stream))
    }
    fn synchronise(&self, stream: StreamId) -> Result<(), DriverError> {
        self.call("synchronise")?;
        self.inner.synchronise(stream)
    }
    fn record(&self, stream: StreamId) -> Result<EventId, DriverError> {
        self.call("record")?;
        self.given(self.inner.record(stream))
    }
    fn wait(&self, stream: StreamId, event: EventId) -> Result<(), DriverError> {
        self.call("wait")?;
        self.inner.wait(stream, event)
    }
    fn synchronise_event(&self, event: EventId) -> Result<(), DriverError> {
        self.call("synchronise_event")?;
        self.inner.synchronise_event(event)
    }
    fn elapsed_ns(&self, from: EventId, to: EventId) -> Result<u64, DriverError> {
        self.inner.elapsed_ns(from, to)
    }
    fn release(&self, event: EventId) -> Result<(), DriverError> {
        self.returned("release", self.inner.release(event))
    }
    fn begin_capture(&self, stream: StreamId) -> Result<(), DriverError> {
        self.call("begin_capture")?;
        self.inner.begin_capture(stream)
    }
    fn end_capture(&self, stream: StreamId) -> Result<GraphId, DriverError> {
        self.call("end_capture")?;
        self.given(self.inner.end_capture(stream))
    }
    fn launch_graph(&self, graph: GraphId, stream: StreamId) -> Result<(), DriverError> {
        self.call("launch_graph")?;
        self.inner.launch_graph(graph, stream)
    }
    fn release_graph(&self, graph: GraphId) -> Result<(), DriverError> {
        self.returned("release_graph", self.inner.release_graph(graph))
    }
}
