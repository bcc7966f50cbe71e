//! What the kernels' callers ask of a GPU driver, whoever implements it: libcuda, the emulator, a remote broker.
//!
//! Handles are plain numbers that belong to one driver, so the trait is object-safe and a remote driver can send them.
//! Every call may come from any thread. Work on one stream runs in order; copies that take a slice return when the
//! slice may be used again, device-to-device copies (pinned host memory has device addresses too) just queue up.

use alloc::string::String;
use core::fmt;

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

/// A device as its driver describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// The maker's name for it.
    pub name: String,
    /// Compute capability times ten.
    pub sm: u32,
    /// Streaming multiprocessors.
    pub n_sm: u32,
    /// Device memory.
    pub memory_bytes: u64,
    /// Most shared memory that one CTA can have.
    pub smem_per_cta_bytes: u32,
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
            DriverError::Driver { op, code, what } => write!(f, "{op}: error {code}, {what}"),
        }
    }
}

impl core::error::Error for DriverError {}

/// A driver with one device.
pub trait Driver {
    /// The device.
    fn info(&self) -> DeviceInfo;

    /// Memory, aligned to 256 bytes, contents undefined.
    fn alloc(&self, kind: MemKind, bytes: u64) -> Result<DevicePtr, DriverError>;
    /// Gives memory back once all work queued so far is done.
    fn free(&self, at: DevicePtr) -> Result<(), DriverError>;

    /// Copies to the device.
    fn write(&self, to: DevicePtr, from: &[u8], stream: StreamId) -> Result<(), DriverError>;
    /// Copies from the device, after the stream's work so far.
    fn read(&self, to: &mut [u8], from: DevicePtr, stream: StreamId) -> Result<(), DriverError>;
    /// Queues a copy between addresses; the ranges do not overlap.
    fn copy(&self, to: DevicePtr, from: DevicePtr, bytes: u64, stream: StreamId) -> Result<(), DriverError>;
    /// Queues the setting of every byte.
    fn fill(&self, at: DevicePtr, byte: u8, bytes: u64, stream: StreamId) -> Result<(), DriverError>;

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

    /// A new stream.
    fn create_stream(&self) -> Result<StreamId, DriverError>;
    /// Waits for all work of a stream, and reports what went wrong in it.
    fn synchronise(&self, stream: StreamId) -> Result<(), DriverError>;
    /// Marks this point of the stream.
    fn record(&self, stream: StreamId) -> Result<EventId, DriverError>;
    /// Lets a stream wait for an event of another.
    fn wait(&self, stream: StreamId, event: EventId) -> Result<(), DriverError>;
    /// Time between two events of streams that were synchronised.
    fn elapsed_ns(&self, from: EventId, to: EventId) -> Result<u64, DriverError>;
    /// Releases an event.
    fn release(&self, event: EventId) -> Result<(), DriverError>;
}
