//! Bytes of the host's, a mapped file for one, where the device fetches them by itself.

use std::ptr::NonNull;
use std::sync::Arc;

use gpu_kernels::driver::{Driver, DriverError, HostAccess, StreamId};
use gpu_kernels::launch::DevicePtr;

use super::Hosted;
use crate::weights::ByteSource;

/// A source's bytes, pinned in place as long as this lives.
pub struct Registered {
    driver: Arc<Hosted>,
    source: Arc<dyn ByteSource>,
    at: DevicePtr,
}

impl Registered {
    /// Pins all of a source, for the device to read. Devices and systems may refuse pages that cannot be written.
    pub fn new(driver: Arc<Hosted>, source: Arc<dyn ByteSource>) -> Result<Registered, DriverError> {
        let bytes = source.bytes();
        // SAFETY: a source's slice is the same at every call and we keep the source, so it is mapped until it is
        // unregistered. We only have it read, as everybody else does: it is a shared slice.
        let at = unsafe { driver.register_host(NonNull::from(bytes).cast(), bytes.len(), HostAccess::Read)? };
        Ok(Registered { driver, source, at })
    }

    /// Queues the copy of some of the bytes to the device.
    pub fn copy(
        &self,
        to: DevicePtr,
        offset: usize,
        bytes: usize,
        stream: StreamId,
    ) -> Result<(), DriverError> {
        self.driver.copy(to, self.at.offset(offset as u64), bytes as u64, stream)
    }

    /// How many there are.
    pub fn bytes(&self) -> usize {
        self.source.bytes().len()
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        // A device that is lost has lost its registrations; there is nobody to tell. Queued copies are waited for.
        let _ = self.driver.unregister_host(self.at);
    }
}
