//! One guest's share of a device: its memory, its handles, and the commands it may give.
//!
//! The driver would take any address of this process. So every range that a command names must lie in memory that this
//! guest allocated, or in the window; that is decided here, by this process's own records. Handles are the driver's own
//! numbers: the driver has no other guest, and refuses numbers it does not know.

use std::collections::{BTreeMap, HashSet};

use gpu_kernels::driver::{Driver, DriverError, EventId, GraphId, MemKind, ModuleId, StreamId};
use gpu_kernels::launch::{DevicePtr, Launch, Params};
use gpu_kernels::modules::{FindModule, Modules};
use gpu_kernels::{ptx, registry};
use uk_wire::command::{self, Command, Data, How, Kind};
use uk_wire::{Reply, Status};

use crate::metrics::Metrics;
use crate::window::GuestWindow;

/// What a guest may have at most.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Device and host memory together.
    pub memory_bytes: u64,
    /// Of that the host's: pinned and managed memory.
    pub host_bytes: u64,
    /// Allocations.
    pub allocations: usize,
    /// Streams, events and graphs together.
    pub handles: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        // Far above what a model needs (buffers to load by, an allocation per weight, an event per layer), far below what
        // hurts the host. Of device memory the device itself has no more than it has.
        Limits { memory_bytes: 1 << 40, host_bytes: 4 << 30, allocations: 1 << 16, handles: 1 << 14 }
    }
}

/// Where the bytes of copies are on this side.
pub enum Host<'a> {
    /// In the guest's RAM.
    Window(&'a GuestWindow),
    /// What came with the submission, and what goes with its replies.
    Inline {
        /// From the guest.
        data: &'a [u8],
        /// To the guest.
        reply: &'a mut [u8],
    },
}

/// A kernel that the guest named.
#[derive(Clone, Copy, Debug)]
struct Kernel {
    name: &'static str,
    module: ModuleId,
}

/// Memory of the guest's.
#[derive(Clone, Copy, Debug)]
struct Allocation {
    bytes: u64,
    /// Bytes of the host's memory.
    host_bytes: u64,
}

/// The share.
pub struct Device<'d> {
    driver: &'d dyn Driver,
    limits: Limits,
    metrics: &'d Metrics,
    modules: Modules,
    kernels: Vec<Kernel>,
    /// Allocations by address.
    memory: BTreeMap<u64, Allocation>,
    memory_bytes: u64,
    host_bytes: u64,
    streams: HashSet<u32>,
    events: HashSet<u32>,
    graphs: HashSet<u32>,
    /// Streams whose copies from or to the window may still run.
    copying: HashSet<u32>,
    /// The first failure's words, until they are asked for.
    text: String,
}

/// Why a command was not done.
enum Refusal {
    /// By the driver.
    Driver(DriverError),
    /// By us.
    Guest(Status, String),
}

impl From<DriverError> for Refusal {
    fn from(error: DriverError) -> Refusal {
        Refusal::Driver(error)
    }
}

fn refused<T>(what: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal::Guest(Status::Refused, what.into()))
}

/// Copies between this process's memory and the device go through a buffer of this size.
const PIECE_BYTES: usize = 1 << 20;

impl<'d> Device<'d> {
    /// Nothing allocated.
    pub fn new(driver: &'d dyn Driver, limits: Limits, metrics: &'d Metrics) -> Device<'d> {
        Device {
            driver,
            limits,
            metrics,
            modules: Modules::new(),
            kernels: Vec::new(),
            memory: BTreeMap::new(),
            memory_bytes: 0,
            host_bytes: 0,
            streams: HashSet::new(),
            events: HashSet::new(),
            graphs: HashSet::new(),
            copying: HashSet::new(),
            text: String::new(),
        }
    }

    /// Does a command.
    pub fn execute(&mut self, command: &Command, host: &mut Host<'_>) -> Reply {
        Metrics::add(&self.metrics.commands, 1);
        let error = match self.try_execute(command, host) {
            Ok(value) => return Reply::done(value),
            Err(error) => error,
        };
        Metrics::add(&self.metrics.failures, 1);
        let (reply, text) = match error {
            Refusal::Guest(status, what) => (Reply::failed(status, 0), what),
            Refusal::Driver(error) => (reply_of(&error), error.to_string()),
        };
        if self.text.is_empty() {
            self.text = text;
        }
        reply
    }

    /// Waits for copies that the guest believes done when a submission is.
    pub fn settle(&mut self) -> Result<(), DriverError> {
        let mut result = Ok(());
        for stream in std::mem::take(&mut self.copying) {
            match self.driver.synchronise(StreamId(stream)) {
                // A captured stream runs nothing yet.
                Ok(()) | Err(DriverError::Capture { .. }) => {}
                Err(error) => result = Err(error),
            }
        }
        result
    }

    /// Gives everything back.
    pub fn close(mut self) -> Result<(), DriverError> {
        let mut result = self.settle();
        let driver = self.driver;
        let mut note = |done: Result<(), DriverError>| {
            if result.is_ok() {
                result = done;
            }
        };
        self.graphs.drain().for_each(|id| note(driver.release_graph(GraphId(id))));
        self.events.drain().for_each(|id| note(driver.release(EventId(id))));
        self.streams.drain().for_each(|id| note(driver.release_stream(StreamId(id))));
        self.memory.keys().for_each(|&at| note(driver.free(DevicePtr(at))));
        note(self.modules.unload(driver));
        result
    }

    fn try_execute(&mut self, command: &Command, host: &mut Host<'_>) -> Result<u64, Refusal> {
        let driver = self.driver;
        match *command {
            Command::Alloc { kind, bytes } => {
                let kind = match kind {
                    Kind::Host => MemKind::Host,
                    Kind::Device => MemKind::Device,
                    Kind::Managed => MemKind::Managed,
                };
                let host_bytes = if kind == MemKind::Device { 0 } else { bytes };
                self.allocate(bytes, host_bytes, |driver| driver.alloc(kind, bytes))
            }
            Command::AllocAsync { bytes, stream } => {
                self.allocate(bytes, 0, |driver| driver.alloc_async(bytes, StreamId(stream)))
            }
            Command::Free { at } => {
                self.owns(at)?;
                driver.free(DevicePtr(at))?;
                self.forget(at)
            }
            Command::FreeAsync { at, stream } => {
                self.owns(at)?;
                driver.free_async(DevicePtr(at), StreamId(stream))?;
                self.forget(at)
            }
            Command::FreeBytes => {
                let left = self.limits.memory_bytes - self.memory_bytes;
                Ok(driver.free_bytes()?.min(left))
            }
            Command::Write { to, from, stream } => {
                self.range("write", to, from.bytes, None)?;
                Metrics::add(&self.metrics.written_bytes, from.bytes);
                self.write(to, from, stream, host)
            }
            Command::Read { from, to, stream } => {
                self.range("read", from, to.bytes, None)?;
                Metrics::add(&self.metrics.read_bytes, to.bytes);
                self.read(from, to, stream, host)
            }
            Command::WriteHost { to, from } => {
                self.range("write_host", to, from.bytes, None)?;
                Metrics::add(&self.metrics.written_bytes, from.bytes);
                pieces(from, host, |at, piece| Ok(driver.write_host(DevicePtr(to + at), piece)?))
            }
            Command::ReadHost { from, to } => {
                self.range("read_host", from, to.bytes, None)?;
                Metrics::add(&self.metrics.read_bytes, to.bytes);
                fill_pieces(to, host, |at, piece| Ok(driver.read_host(piece, DevicePtr(from + at))?))
            }
            Command::Copy { to, from, bytes, stream } => {
                let window = host.window();
                self.range("copy", to, bytes, window)?;
                self.range("copy", from, bytes, window)?;
                driver.copy(DevicePtr(to), DevicePtr(from), bytes, StreamId(stream))?;
                Ok(0)
            }
            Command::Fill { at, bytes, byte, stream } => {
                self.range("fill", at, bytes, None)?;
                driver.fill(DevicePtr(at), byte, bytes, StreamId(stream))?;
                Ok(0)
            }
            Command::Kernel { name } => self.kernel(name.as_slice()),
            Command::Launch(ref launch) => {
                Metrics::add(&self.metrics.launches, 1);
                let (module, value) = self.launch(launch)?;
                let stream = StreamId(launch.stream);
                match launch.how {
                    How::Alone => driver.launch(module, &value, stream)?,
                    How::Cooperative => driver.launch_cooperative(module, &value, stream)?,
                    How::Early => driver.launch_early(module, &value, stream)?,
                }
                Ok(0)
            }
            Command::ResidentCtas(ref launch) => {
                let (module, launch) = self.launch(launch)?;
                Ok(driver.resident_ctas(module, &launch)?.into())
            }
            Command::CreateStream => {
                self.room_for_handle()?;
                let StreamId(id) = driver.create_stream()?;
                self.streams.insert(id);
                Ok(id.into())
            }
            Command::ReleaseStream { stream } => {
                // Nobody could wait for its copies any more.
                if self.copying.remove(&stream) {
                    driver.synchronise(StreamId(stream))?;
                }
                driver.release_stream(StreamId(stream))?;
                self.streams.remove(&stream);
                Ok(0)
            }
            Command::Synchronise { stream } => {
                driver.synchronise(StreamId(stream))?;
                self.copying.remove(&stream);
                Ok(0)
            }
            Command::Record { stream } => {
                self.room_for_handle()?;
                let EventId(id) = driver.record(StreamId(stream))?;
                self.events.insert(id);
                Ok(id.into())
            }
            Command::RecordAgain { event, stream } => {
                driver.record_again(EventId(event), StreamId(stream))?;
                Ok(0)
            }
            Command::Wait { event, stream } => {
                driver.wait(StreamId(stream), EventId(event))?;
                Ok(0)
            }
            Command::SynchroniseEvent { event } => {
                driver.synchronise_event(EventId(event))?;
                Ok(0)
            }
            Command::IsDone { event } => Ok(driver.is_done(EventId(event))?.into()),
            Command::Elapsed { from, to } => Ok(driver.elapsed_ns(EventId(from), EventId(to))?),
            Command::ReleaseEvent { event } => {
                driver.release(EventId(event))?;
                self.events.remove(&event);
                Ok(0)
            }
            Command::BeginCapture { stream } => {
                driver.begin_capture(StreamId(stream))?;
                Ok(0)
            }
            Command::EndCapture { stream } => {
                self.room_for_handle()?;
                let GraphId(id) = driver.end_capture(StreamId(stream))?;
                self.graphs.insert(id);
                Ok(id.into())
            }
            Command::LaunchGraph { graph, stream } => {
                driver.launch_graph(GraphId(graph), StreamId(stream))?;
                Ok(0)
            }
            Command::ReleaseGraph { graph } => {
                driver.release_graph(GraphId(graph))?;
                self.graphs.remove(&graph);
                Ok(0)
            }
            Command::ErrorText { to } => {
                let text = std::mem::take(&mut self.text);
                let bytes =
                    &text.as_bytes()[..text.len().min(usize::try_from(to.bytes).unwrap_or(usize::MAX))];
                let to = Data { at: to.at, bytes: bytes.len() as u64 };
                fill_pieces(to, host, |at, piece| {
                    piece.copy_from_slice(&bytes[at as usize..][..piece.len()]);
                    Ok(())
                })?;
                Ok(bytes.len() as u64)
            }
        }
    }

    fn allocate(
        &mut self,
        bytes: u64,
        host_bytes: u64,
        allocate: impl FnOnce(&dyn Driver) -> Result<DevicePtr, DriverError>,
    ) -> Result<u64, Refusal> {
        let within = |have: u64, more: u64, most: u64| have.checked_add(more).filter(|sum| *sum <= most);
        let sum = within(self.memory_bytes, bytes, self.limits.memory_bytes);
        let host_sum = within(self.host_bytes, host_bytes, self.limits.host_bytes);
        let has_room = self.memory.len() < self.limits.allocations;
        let (Some(sum), Some(host_sum), true) = (sum, host_sum, has_room) else {
            let what = format!("{bytes} bytes more than this guest may have");
            return Err(Refusal::Guest(Status::OutOfMemory, what));
        };
        let DevicePtr(at) = allocate(self.driver)?;
        self.memory.insert(at, Allocation { bytes, host_bytes });
        (self.memory_bytes, self.host_bytes) = (sum, host_sum);
        Metrics::add(&self.metrics.allocated_bytes, bytes);
        Ok(at)
    }

    fn owns(&self, at: u64) -> Result<(), Refusal> {
        if self.memory.contains_key(&at) {
            return Ok(());
        }
        Err(Refusal::Guest(Status::Address, format!("no allocation of this guest begins at {at:#x}")))
    }

    fn forget(&mut self, at: u64) -> Result<u64, Refusal> {
        let Some(Allocation { bytes, host_bytes }) = self.memory.remove(&at) else { return Ok(0) };
        self.memory_bytes -= bytes;
        self.host_bytes -= host_bytes;
        self.metrics.allocated_bytes.fetch_sub(bytes, std::sync::atomic::Ordering::Relaxed);
        Ok(0)
    }

    /// The range lies in one allocation of the guest's, or in the window where that may be named by its device address.
    fn range(&self, op: &str, at: u64, bytes: u64, window: Option<&GuestWindow>) -> Result<(), Refusal> {
        let within = |start: u64, len: u64| {
            at.checked_sub(start).and_then(|offset| offset.checked_add(bytes)).is_some_and(|end| end <= len)
        };
        let own = self.memory.range(..=at).next_back().is_some_and(|(&start, own)| within(start, own.bytes));
        let in_window = || {
            let address = window.and_then(GuestWindow::address);
            window
                .zip(address)
                .is_some_and(|(window, DevicePtr(start))| within(start, window.shared().len() as u64))
        };
        if own || in_window() {
            return Ok(());
        }
        Err(Refusal::Guest(Status::Address, format!("{op}: {bytes} bytes at {at:#x} are not this guest's")))
    }

    fn room_for_handle(&self) -> Result<(), Refusal> {
        let n = self.streams.len() + self.events.len() + self.graphs.len();
        if n < self.limits.handles {
            Ok(())
        } else {
            refused(format!("{n} handles are as many as a guest may have"))
        }
    }

    fn kernel(&mut self, name: &[u8]) -> Result<u64, Refusal> {
        let name = String::from_utf8_lossy(name);
        let unknown = || DriverError::NoKernel { entry: name.to_string() };
        let name = own_name(&name).ok_or_else(unknown)?;
        if let Some(number) = self.kernels.iter().position(|kernel| kernel.name == name) {
            return Ok(number as u64);
        }
        let module = self.modules.find_module(self.driver, name)?;
        // Names are ours, so there are no more than we have kernels.
        self.kernels.push(Kernel { name, module });
        Ok(self.kernels.len() as u64 - 1)
    }

    fn launch(&self, launch: &command::Launch) -> Result<(ModuleId, Launch), Refusal> {
        let Some(kernel) = self.kernels.get(launch.kernel as usize) else {
            return refused(format!("kernel {} was not named", launch.kernel));
        };
        let Some(params) = Params::from_bytes(launch.params.as_slice()) else {
            return refused(format!(
                "{}: {} bytes of arguments",
                kernel.name,
                launch.params.as_slice().len()
            ));
        };
        let value = Launch {
            entry: kernel.name,
            grid: launch.grid,
            cta: launch.cta,
            cluster: launch.cluster,
            smem_bytes: launch.smem_bytes,
            params,
        };
        Ok((kernel.module, value))
    }

    fn write(&mut self, to: u64, from: Data, stream: u32, host: &Host<'_>) -> Result<u64, Refusal> {
        if let Some(address) = host.device_address(from)? {
            self.driver.copy(DevicePtr(to), address, from.bytes, StreamId(stream))?;
            self.copying.insert(stream);
            return Ok(0);
        }
        let driver = self.driver;
        pieces(from, host, |at, piece| Ok(driver.write(DevicePtr(to + at), piece, StreamId(stream))?))
    }

    fn read(&mut self, from: u64, to: Data, stream: u32, host: &mut Host<'_>) -> Result<u64, Refusal> {
        if let Some(address) = host.device_address(to)? {
            self.driver.copy(address, DevicePtr(from), to.bytes, StreamId(stream))?;
            self.driver.synchronise(StreamId(stream))?;
            self.copying.remove(&stream);
            return Ok(0);
        }
        let driver = self.driver;
        fill_pieces(to, host, |at, piece| Ok(driver.read(piece, DevicePtr(from + at), StreamId(stream))?))
    }
}

impl Host<'_> {
    fn window(&self) -> Option<&GuestWindow> {
        match self {
            Host::Window(window) => Some(window),
            Host::Inline { .. } => None,
        }
    }

    /// The device's address of data in the window, if the device reaches it; the range is checked.
    fn device_address(&self, data: Data) -> Result<Option<DevicePtr>, Refusal> {
        let Host::Window(window) = self else { return Ok(None) };
        in_window(window, data)?;
        Ok(window.address().map(|start| start.offset(data.at)))
    }
}

fn in_window(window: &GuestWindow, data: Data) -> Result<(), Refusal> {
    if window.shared().has(data.at, data.bytes) {
        return Ok(());
    }
    refused(format!(
        "{} bytes at {:#x} are not in the window of {:#x}",
        data.bytes,
        data.at,
        window.shared().len()
    ))
}

/// The place of data within an inline buffer.
fn inline(len: usize, data: Data) -> Result<std::ops::Range<usize>, Refusal> {
    match data.at.checked_add(data.bytes) {
        Some(end) if end <= len as u64 => Ok(data.at as usize..end as usize),
        _ => refused(format!("{} bytes at {:#x} are not in the {len} that came", data.bytes, data.at)),
    }
}

/// The guest's bytes, piece by piece, each with its offset.
fn pieces(
    data: Data,
    host: &Host<'_>,
    mut take: impl FnMut(u64, &[u8]) -> Result<(), Refusal>,
) -> Result<u64, Refusal> {
    match host {
        Host::Inline { data: bytes, .. } => take(0, &bytes[inline(bytes.len(), data)?])?,
        Host::Window(window) => {
            in_window(window, data)?;
            let mut buffer = vec![0; PIECE_BYTES.min(data.bytes as usize)];
            for at in (0..data.bytes).step_by(PIECE_BYTES) {
                let n = PIECE_BYTES.min((data.bytes - at) as usize);
                // Copied out first: the guest may change them meanwhile.
                window.shared().read(data.at + at, &mut buffer[..n]);
                take(at, &buffer[..n])?;
            }
        }
    }
    Ok(0)
}

/// Bytes for the guest, piece by piece.
fn fill_pieces(
    data: Data,
    host: &mut Host<'_>,
    mut fill: impl FnMut(u64, &mut [u8]) -> Result<(), Refusal>,
) -> Result<u64, Refusal> {
    match host {
        Host::Inline { reply, .. } => {
            let range = inline(reply.len(), data)?;
            fill(0, &mut reply[range])?;
        }
        Host::Window(window) => {
            in_window(window, data)?;
            let mut buffer = vec![0; PIECE_BYTES.min(data.bytes as usize)];
            for at in (0..data.bytes).step_by(PIECE_BYTES) {
                let n = PIECE_BYTES.min((data.bytes - at) as usize);
                fill(at, &mut buffer[..n])?;
                window.shared().write(data.at + at, &buffer[..n]);
            }
        }
    }
    Ok(0)
}

/// Our own spelling of a kernel's name: of an embedded module, or of the kernels' source.
fn own_name(name: &str) -> Option<&'static str> {
    let embedded = ptx::MODULES.iter().map(|module| module.entry);
    let tables = registry::KERNELS.iter().flat_map(|kernel| kernel.entries());
    let source = tables.flat_map(|table| table.iter()).map(|entry| entry.name);
    embedded.chain(source).find(|own| *own == name)
}

fn reply_of(error: &DriverError) -> Reply {
    let (status, code, value) = match error {
        DriverError::OutOfMemory { bytes, .. } => (Status::OutOfMemory, 0, *bytes),
        DriverError::Address { at, .. } => (Status::Address, 0, at.0),
        DriverError::Handle { id, .. } => (Status::Handle, 0, u64::from(*id)),
        DriverError::NoKernel { .. } => (Status::NoKernel, 0, 0),
        DriverError::Launch { .. } => (Status::Launch, 0, 0),
        DriverError::Kernel { .. } => (Status::Kernel, 0, 0),
        DriverError::Unsupported { .. } => (Status::Unsupported, 0, 0),
        DriverError::Capture { .. } => (Status::Capture, 0, 0),
        DriverError::Lost { code, .. } => (Status::Lost, *code, 0),
        DriverError::Driver { code, .. } => (Status::Driver, *code, 0),
        DriverError::NoDriver { .. } | DriverError::Module { .. } => (Status::Driver, 0, 0),
    };
    Reply { status, code, value }
}
