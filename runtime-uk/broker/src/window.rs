//! The guest's RAM: a file that the VMM and this process both map.
//!
//! No reference to its bytes is made: the guest writes there whenever it likes. The driver reaches it by its device
//! address, which registering gives.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;
use std::ptr::NonNull;

use gpu_kernels::driver::{Driver, DriverError, HostAccess};
use gpu_kernels::launch::DevicePtr;
use memmap2::{MmapOptions, MmapRaw};
use uk_wire::shared::Shared;

/// A mapped window.
pub struct GuestWindow {
    shared: Shared,
    /// Where the device sees it, if it does.
    address: Option<DevicePtr>,
    map: MmapRaw,
}

impl GuestWindow {
    /// Maps the file that is the guest's RAM. It should lie in memory (tmpfs, hugetlbfs): drivers do not pin pages of disk
    /// files.
    pub fn open(path: &Path) -> io::Result<GuestWindow> {
        GuestWindow::map(&OpenOptions::new().read(true).write(true).open(path)?)
    }

    /// Maps a file.
    pub fn map(file: &File) -> io::Result<GuestWindow> {
        let map = MmapOptions::new().map_raw(file)?;
        // SAFETY: mapped for reading and writing as long as `map` lives, page-aligned, and `Shared` is the only way by
        // which this program's own code gets at it; the driver's copies are the device's accesses.
        let shared = unsafe { Shared::new(map.as_mut_ptr(), map.len()) };
        Ok(GuestWindow { shared, address: None, map })
    }

    /// Pins it for the driver, so that copies run at the bus's speed and without this process's hand.
    pub fn register(&mut self, driver: &dyn Driver) -> Result<(), DriverError> {
        let at =
            NonNull::new(self.map.as_mut_ptr()).ok_or(DriverError::Unsupported { op: "register_host" })?;
        // SAFETY: mapped until `map` is dropped, which `unregister` comes before; the other accesses to it are atomic.
        self.address = Some(unsafe { driver.register_host(at, self.map.len(), HostAccess::ReadWrite)? });
        Ok(())
    }

    /// Ends the registration; all work that used it is done.
    pub fn unregister(&mut self, driver: &dyn Driver) -> Result<(), DriverError> {
        self.address.take().map_or(Ok(()), |at| driver.unregister_host(at))
    }

    /// Where the device sees it.
    pub fn address(&self) -> Option<DevicePtr> {
        self.address
    }

    /// The memory.
    pub fn shared(&self) -> &Shared {
        &self.shared
    }
}
