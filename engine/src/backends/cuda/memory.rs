//! Device memory, streams and events as values that give themselves back to the driver when they are dropped.

use alloc::sync::Arc;

use gpu_kernels::driver::{Driver, DriverError, EventId, MemKind, StreamId};
use gpu_kernels::launch::DevicePtr;

/// A driver that several owners of memory share.
pub type Device = Arc<dyn Driver + Send + Sync>;

/// One allocation.
pub struct Memory {
    device: Device,
    at: DevicePtr,
    bytes: usize,
}

impl Memory {
    /// Memory of at least one byte, contents undefined.
    pub fn new(device: &Device, kind: MemKind, bytes: usize) -> Result<Memory, DriverError> {
        let at = device.alloc(kind, bytes.max(1) as u64)?;
        Ok(Memory { device: device.clone(), at, bytes })
    }

    /// Where it starts.
    pub fn at(&self) -> DevicePtr {
        self.at
    }

    /// How long it is.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // A device that is lost has lost its memory too; there is nobody to tell.
        let _ = self.device.free(self.at);
    }
}

/// Memory that grows to the largest size asked for; its address changes when it does.
pub struct Growing {
    kind: MemKind,
    memory: Option<Memory>,
    /// Counts the moves.
    pub generation: u64,
}

impl Growing {
    /// Nothing yet.
    pub fn new(kind: MemKind) -> Growing {
        Growing { kind, memory: None, generation: 0 }
    }

    /// Makes room; what was in it is lost if it grows.
    pub fn reserve(&mut self, device: &Device, bytes: usize) -> Result<(), DriverError> {
        if self.memory.as_ref().is_some_and(|m| m.bytes >= bytes) {
            return Ok(());
        }
        // The old memory goes first: both need not fit at once.
        self.memory = None;
        self.generation += 1;
        self.memory = Some(Memory::new(device, self.kind, bytes)?);
        Ok(())
    }

    /// Where it starts; null before the first [`Growing::reserve`].
    pub fn at(&self) -> DevicePtr {
        self.memory.as_ref().map_or(DevicePtr::NULL, Memory::at)
    }
}

/// A stream that gives itself back.
pub struct Queue {
    device: Device,
    /// Its handle.
    pub id: StreamId,
}

impl Queue {
    /// A new one.
    pub fn new(device: &Device) -> Result<Queue, DriverError> {
        Ok(Queue { id: device.create_stream()?, device: device.clone() })
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // As with memory: a lost device has lost its streams. Work under way is waited for, since it uses memory that
        // goes next.
        let _ = self.device.synchronise(self.id);
        let _ = self.device.release_stream(self.id);
    }
}

/// A point of a stream's work that gives itself back.
pub struct Mark {
    device: Device,
    /// Its event.
    pub id: EventId,
}

impl Mark {
    /// This point of the default stream's.
    pub fn new(device: &Device) -> Result<Mark, DriverError> {
        Mark::on(device, StreamId::DEFAULT)
    }

    /// This point of a stream's.
    pub fn on(device: &Device, stream: StreamId) -> Result<Mark, DriverError> {
        Ok(Mark { id: device.record(stream)?, device: device.clone() })
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        // As with memory.
        let _ = self.device.release(self.id);
    }
}
