//! A virtio console as a byte stream to a program on the host.

use virtio_drivers::device::console::VirtIOConsole;
use virtio_drivers::transport::SomeTransport;

use crate::devices::Dma;

/// The stream.
pub struct Console(VirtIOConsole<Dma, SomeTransport<'static>>);

impl Console {
    /// Sets the device up.
    pub fn new(transport: SomeTransport<'static>) -> Result<Console, virtio_drivers::Error> {
        VirtIOConsole::new(transport).map(Console)
    }

    /// Sends all bytes.
    pub fn send(&mut self, bytes: &[u8]) -> Result<(), virtio_drivers::Error> {
        // A page is what one descriptor surely holds.
        bytes.chunks(4096).try_for_each(|piece| self.0.send_bytes(piece))
    }

    /// Takes what has come.
    pub fn receive(&mut self, into: &mut [u8]) -> Result<usize, virtio_drivers::Error> {
        let mut n = 0;
        while n < into.len()
            && let Some(byte) = self.0.recv(true)?
        {
            into[n] = byte;
            n += 1;
        }
        Ok(n)
    }
}
