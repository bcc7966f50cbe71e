//! A model on a virtio disk, read into memory: the file's bytes from the disk's first block on.

use alloc::vec::Vec;
use core::fmt;

use virtio_drivers::device::blk::{SECTOR_SIZE, VirtIOBlk};
use virtio_drivers::transport::SomeTransport;

use crate::devices::Dma;

/// One read: long enough that the round trip does not count.
const PIECE_BYTES: usize = 1 << 20;

/// Why a disk cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskError {
    /// The device failed.
    Device {
        /// Where on the disk.
        at_bytes: usize,
        /// virtio-drivers' word for it.
        error: virtio_drivers::Error,
    },
    /// It does not fit.
    OutOfMemory {
        /// Its size.
        bytes: u64,
    },
}

impl fmt::Display for DiskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DiskError::Device { at_bytes, error } => write!(f, "disk: reading at byte {at_bytes}: {error}"),
            DiskError::OutOfMemory { bytes } => {
                write!(
                    f,
                    "disk: its {bytes} bytes do not fit into memory; use pmem, or give the machine more"
                )
            }
        }
    }
}

impl core::error::Error for DiskError {}

/// All bytes of a disk.
pub fn read(transport: SomeTransport<'static>) -> Result<Vec<u8>, DiskError> {
    let mut disk =
        VirtIOBlk::<Dma, _>::new(transport).map_err(|error| DiskError::Device { at_bytes: 0, error })?;
    let bytes = disk.capacity().saturating_mul(SECTOR_SIZE as u64);
    let mut buffer = Vec::new();
    let len = usize::try_from(bytes).map_err(|_| DiskError::OutOfMemory { bytes })?;
    buffer.try_reserve_exact(len).map_err(|_| DiskError::OutOfMemory { bytes })?;
    buffer.resize(len, 0);
    for (i, piece) in buffer.chunks_mut(PIECE_BYTES).enumerate() {
        let at_bytes = i * PIECE_BYTES;
        disk.read_blocks(at_bytes / SECTOR_SIZE, piece)
            .map_err(|error| DiskError::Device { at_bytes, error })?;
    }
    Ok(buffer)
}
