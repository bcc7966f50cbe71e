//! What the kernels' callers ask of a GPU driver, whoever implements it: libcuda, the emulator, a remote broker.
//!
//! Handles are plain numbers that belong to one driver, so the trait is object-safe and a remote driver can send them.
//! Every call may come from any thread. Work on one stream runs in order; copies that take a slice return when the
//! slice may be used again, copies between addresses (pinned and registered host memory has device addresses too) just
//! queue up. What a driver need not have has a default that says [`DriverError::Unsupported`].
//!
//! Capture: between [`Driver::begin_capture`] and [`Driver::end_capture`] launches, fills and copies between addresses
//! are recorded instead of done, on the stream and on those that wait for its events; what returns data to the caller is
//! refused with [`DriverError::Capture`].

use alloc::string::String;
use core::fmt;
use core::ptr::NonNull;

use crate::launch::{DevicePtr, Launch};
use crate::ptx::PtxModule;

/// Where memory lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemKind {
    /// Page-locked host memory that the device reads and writes in place.
    Host,
    /// The device's own memory.
    Device,
    /// Pages that move to whoever touches them.
    Managed,
}

/// A loaded module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ModuleId(pub u32);

/// A queue of work that runs in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StreamId(pub u32);

impl StreamId {
    /// The stream every driver has.
    pub const DEFAULT: StreamId = StreamId(0);
}

/// A point in a stream's work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EventId(pub u32);

/// Captured work that can be launched as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GraphId(pub u32);

/// What the device may do with registered host memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostAccess {
    /// Read it; required for pages that the process itself may only read.
    Read,
    /// Read and write it.
    ReadWrite,
}

/// A device as its driver describes it. Numbers that a driver does not know are 0.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceInfo {
    /// The maker's name for it.
    pub name: String,
    /// Where it sits: `0000:19:00.0`.
    pub pci: String,
    /// Compute capability times ten.
    pub sm: u32,
    /// Streaming multiprocessors.
    pub n_sm: u32,
    /// Device memory.
    pub memory_bytes: u64,
    /// Second-level cache.
    pub l2_bytes: u32,
    /// Most shared memory that one CTA can have.
    pub smem_per_cta_bytes: u32,
    /// Shared memory of a multiprocessor.
    pub smem_per_sm_bytes: u32,
    /// Registers of a multiprocessor.
    pub registers_per_sm: u32,
    /// Threads that a multiprocessor holds.
    pub threads_per_sm: u32,
    /// Highest clock of the multiprocessors.
    pub clock_khz: u32,
    /// Highest clock of the memory.
    pub memory_clock_khz: u32,
    /// Width of the memory bus.
    pub memory_bus_bits: u32,
    /// Highest CUDA version of the driver, times a thousand, as CUDA counts: 12080 is 12.8.
    pub driver_version: u32,
}

impl DeviceInfo {
    /// What memory could move at most, bytes a second: two transfers a clock.
    pub fn peak_bytes_per_s(&self) -> u64 {
        2 * 1000 * u64::from(self.memory_clock_khz) * u64::from(self.memory_bus_bits / 8)
    }
}

/// Why a driver did not do what it was asked.
#[derive(Clone, Debug, PartialEq)]
pub enum DriverError {
    /// There is no driver or no device.
    NoDriver {
        /// What was looked for and not found.
        what: String,
    },
    /// Not enough memory.
    OutOfMemory {
        /// What kind.
        kind: MemKind,
        /// Bytes asked for.
        bytes: u64,
    },
    /// The address range is not within one allocation.
    Address {
        /// The operation.
        op: &'static str,
        /// Start of the range.
        at: DevicePtr,
        /// Its length.
        bytes: u64,
    },
    /// A handle of another driver, or one already released.
    Handle {
        /// What kind of handle.
        what: &'static str,
        /// Its number.
        id: u32,
    },
    /// No loaded module has the kernel.
    NoKernel {
        /// The entry's name.
        entry: String,
    },
    /// The driver did not accept a module.
    Module {
        /// Its name.
        name: &'static str,
        /// Its tier.
        tier: &'static str,
        /// The driver is too old for the module's PTX, or has no compiler for the device: another tier may do.
        too_new: bool,
        /// The driver's name and text for it, and its compiler's messages.
        what: String,
    },
    /// The device cannot launch it: too many threads, too much shared memory.
    Launch {
        /// The entry's name.
        entry: &'static str,
        /// What is wrong.
        what: String,
    },
    /// The kernel ran and did something wrong; in the emulator, with places in the source.
    Kernel {
        /// The entry's name.
        entry: String,
        /// What it did.
        what: String,
    },
    /// The driver or the device does not have it.
    Unsupported {
        /// The operation.
        op: &'static str,
    },
    /// The operation cannot be part of a graph, or the captured streams were not joined.
    Capture {
        /// The operation.
        op: &'static str,
    },
    /// A fault that the driver cannot go on after: a kernel's bad access, a device that is gone. Nothing of this
    /// driver works any more.
    Lost {
        /// The operation that reported it; the fault is an earlier one.
        op: &'static str,
        /// The driver's number for it.
        code: u32,
        /// The driver's name and text for it.
        what: String,
    },
    /// Any other failure, in the driver's words.
    Driver {
        /// The operation.
        op: &'static str,
        /// The driver's number for it.
        code: u32,
        /// The driver's name and text for it.
        what: String,
    },
}

impl fmt::Display for DriverError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DriverError::NoDriver { what } => write!(f, "no GPU driver: {what}"),
            DriverError::OutOfMemory { kind, bytes } => write!(f, "no {bytes} bytes of {kind:?} memory left"),
            DriverError::Address { op, at, bytes } => {
                write!(f, "{op}: {bytes} bytes at {:#x} are not within one allocation", at.0)
            }
            DriverError::Handle { what, id } => write!(f, "no {what} has the number {id}"),
            DriverError::NoKernel { entry } => write!(f, "no loaded module has a kernel {entry}"),
            DriverError::Module { name, tier, what, .. } => {
                write!(f, "cannot load {name} for {tier}: {what}")
            }
            DriverError::Launch { entry, what } => write!(f, "cannot launch {entry}: {what}"),
            DriverError::Kernel { entry, what } => write!(f, "{entry}: {what}"),
            DriverError::Unsupported { op } => write!(f, "{op}: this driver or device cannot do it"),
            DriverError::Capture { op } => write!(f, "{op}: not possible while a graph is captured"),
            DriverError::Lost { op, code, what } => {
                write!(f, "the device is lost: {op} reported error {code}, {what}")
            }
            DriverError::Driver { op, code, what } => write!(f, "{op}: error {code}, {what}"),
        }
    }
}

impl core::error::Error for DriverError {}

/// A driver with one device.
pub trait Driver {
    /// The device.
    fn info(&self) -> DeviceInfo;
    /// Bytes of device memory that nobody uses now.
    fn free_bytes(&self) -> Result<u64, DriverError> {
        Err(DriverError::Unsupported { op: "free_bytes" })
    }

    /// Memory, aligned to 256 bytes, contents undefined.
    fn alloc(&self, kind: MemKind, bytes: u64) -> Result<DevicePtr, DriverError>;
    /// Gives memory back once all work queued so far is done.
    fn free(&self, at: DevicePtr) -> Result<(), DriverError>;
    /// Device memory for work queued after this on the stream.
    fn alloc_async(&self, bytes: u64, stream: StreamId) -> Result<DevicePtr, DriverError> {
        let _ = stream;
        self.alloc(MemKind::Device, bytes)
    }
    /// Gives back memory of [`Driver::alloc_async`] once the work queued so far on the stream is done.
    fn free_async(&self, at: DevicePtr, stream: StreamId) -> Result<(), DriverError> {
        self.synchronise(stream)?;
        self.free(at)
    }
    /// Pins memory of the caller's, so that copies run beside the caller, and returns its device address.
    ///
    /// # Safety
    ///
    /// * `bytes` bytes from `at` are mapped, and stay so until [`Driver::unregister_host`].
    /// * Nobody accesses them while work that names their device address is under way, unless both only read.
    unsafe fn register_host(
        &self,
        at: NonNull<u8>,
        bytes: usize,
        access: HostAccess,
    ) -> Result<DevicePtr, DriverError> {
        let _ = (at, bytes, access);
        Err(DriverError::Unsupported { op: "register_host" })
    }
    /// Ends the registration that returned this address; the work that used it is done.
    fn unregister_host(&self, at: DevicePtr) -> Result<(), DriverError> {
        let _ = at;
        Err(DriverError::Unsupported { op: "unregister_host" })
    }

    /// Writes pinned or managed memory at once, whatever streams do: the caller knows that no queued work uses it.
    fn write_host(&self, to: DevicePtr, from: &[u8]) -> Result<(), DriverError> {
        let _ = (to, from);
        Err(DriverError::Unsupported { op: "write_host" })
    }
    /// Lends pinned or managed memory to be filled in place, at once, as [`Driver::write_host`] does. Several threads may
    /// fill parts of one allocation side by side. What `fill` finds there is anything; it asks nothing of the driver that
    /// concerns the range.
    fn fill_host(
        &self,
        to: DevicePtr,
        bytes: usize,
        fill: &mut dyn FnMut(&mut [u8]),
    ) -> Result<(), DriverError> {
        let _ = (to, bytes, fill);
        Err(DriverError::Unsupported { op: "fill_host" })
    }
    /// Reads pinned or managed memory at once, whatever streams do.
    fn read_host(&self, to: &mut [u8], from: DevicePtr) -> Result<(), DriverError> {
        let _ = (to, from);
        Err(DriverError::Unsupported { op: "read_host" })
    }
    /// Copies to the device.
    fn write(&self, to: DevicePtr, from: &[u8], stream: StreamId) -> Result<(), DriverError>;
    /// Copies from the device, after the stream's work so far.
    fn read(&self, to: &mut [u8], from: DevicePtr, stream: StreamId) -> Result<(), DriverError>;
    /// Queues a copy between addresses; the ranges do not overlap. With memory of another driver value it has happened on
    /// return, and a stream that is captured refuses it.
    fn copy(&self, to: DevicePtr, from: DevicePtr, bytes: u64, stream: StreamId) -> Result<(), DriverError>;
    /// Queues the setting of every byte.
    fn fill(&self, at: DevicePtr, byte: u8, bytes: u64, stream: StreamId) -> Result<(), DriverError>;
    /// Lets this device reach the memory of another of the same driver, by its number.
    fn enable_peer(&self, device: u32) -> Result<(), DriverError> {
        let _ = device;
        Err(DriverError::Unsupported { op: "enable_peer" })
    }

    /// A module that has every kernel and needs no loading; only drivers that run the Rust source have one.
    fn builtin(&self) -> Option<ModuleId> {
        None
    }
    /// Compiles a module, or takes it from a cache.
    fn load(&self, module: &PtxModule) -> Result<ModuleId, DriverError>;
    /// Unloads a module whose launches are done.
    fn unload(&self, module: ModuleId) -> Result<(), DriverError>;
    /// Queues a launch of a kernel of the module.
    fn launch(&self, module: ModuleId, launch: &Launch, stream: StreamId) -> Result<(), DriverError>;

    /// Queues a launch that may start while the launch before it on the stream still runs. Its kernel waits itself, as
    /// all of this crate do on devices where it matters (`device/grid.rs`); its results are those of [`Driver::launch`].
    fn launch_early(&self, module: ModuleId, launch: &Launch, stream: StreamId) -> Result<(), DriverError> {
        self.launch(module, launch, stream)
    }

    /// Queues a launch whose CTAs all run at once and so may wait for each other.
    fn launch_cooperative(
        &self,
        module: ModuleId,
        launch: &Launch,
        stream: StreamId,
    ) -> Result<(), DriverError> {
        let _ = (module, launch, stream);
        Err(DriverError::Unsupported { op: "launch_cooperative" })
    }
    /// How many CTAs of such a launch the device holds at once.
    fn resident_ctas(&self, module: ModuleId, launch: &Launch) -> Result<u32, DriverError> {
        let _ = (module, launch);
        Err(DriverError::Unsupported { op: "resident_ctas" })
    }

    /// A new stream.
    fn create_stream(&self) -> Result<StreamId, DriverError>;
    /// Releases a stream once its work is done.
    fn release_stream(&self, stream: StreamId) -> Result<(), DriverError> {
        let _ = stream;
        Err(DriverError::Unsupported { op: "release_stream" })
    }
    /// Waits for all work of a stream, and reports what went wrong in it.
    fn synchronise(&self, stream: StreamId) -> Result<(), DriverError>;

    /// Marks this point of the stream, with a new event.
    fn record(&self, stream: StreamId) -> Result<EventId, DriverError>;
    /// Marks this point of the stream, with an event that marked another before.
    fn record_again(&self, event: EventId, stream: StreamId) -> Result<(), DriverError> {
        let _ = (event, stream);
        Err(DriverError::Unsupported { op: "record_again" })
    }
    /// Lets a stream wait for an event of another.
    fn wait(&self, stream: StreamId, event: EventId) -> Result<(), DriverError>;
    /// Waits until an event's point is reached.
    fn synchronise_event(&self, event: EventId) -> Result<(), DriverError> {
        let _ = event;
        Err(DriverError::Unsupported { op: "synchronise_event" })
    }
    /// Whether an event's point is reached.
    fn is_done(&self, event: EventId) -> Result<bool, DriverError> {
        let _ = event;
        Err(DriverError::Unsupported { op: "is_done" })
    }
    /// Time between two events of streams that were synchronised.
    fn elapsed_ns(&self, from: EventId, to: EventId) -> Result<u64, DriverError>;
    /// Releases an event.
    fn release(&self, event: EventId) -> Result<(), DriverError>;

    /// Records the stream's work from now on instead of doing it.
    fn begin_capture(&self, stream: StreamId) -> Result<(), DriverError> {
        let _ = stream;
        Err(DriverError::Unsupported { op: "begin_capture" })
    }
    /// Ends the recording. Streams that joined it must have been waited for. After an error nothing is captured.
    fn end_capture(&self, stream: StreamId) -> Result<GraphId, DriverError> {
        let _ = stream;
        Err(DriverError::Unsupported { op: "end_capture" })
    }
    /// Queues the recorded work, with the arguments it was recorded with.
    fn launch_graph(&self, graph: GraphId, stream: StreamId) -> Result<(), DriverError> {
        let _ = (graph, stream);
        Err(DriverError::Unsupported { op: "launch_graph" })
    }
    /// Releases a graph whose launches are done.
    fn release_graph(&self, graph: GraphId) -> Result<(), DriverError> {
        let _ = graph;
        Err(DriverError::Unsupported { op: "release_graph" })
    }
}
