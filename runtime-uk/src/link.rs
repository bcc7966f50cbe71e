//! What a guest must bring: a byte stream to its broker, a clock, and, if it has one, memory that the broker maps.

use core::fmt;
use core::time::Duration;

/// Why a link no longer works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkError {
    /// The other side is gone.
    Closed,
    /// The device under it failed.
    Device,
}

impl fmt::Display for LinkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            LinkError::Closed => "the broker closed the link",
            LinkError::Device => "the link's device failed",
        })
    }
}

impl core::error::Error for LinkError {}

/// A byte stream, in order and without loss.
pub trait Link: Send {
    /// Sends all bytes.
    fn send(&mut self, bytes: &[u8]) -> Result<(), LinkError>;
    /// Takes bytes that have come, at most `into.len()`; 0 if there are none yet.
    fn receive(&mut self, into: &mut [u8]) -> Result<usize, LinkError>;
    /// Gives time to others until something may have come. May return at once.
    fn pause(&mut self);
    /// Time since some fixed moment.
    fn now(&self) -> Duration;
}

/// Memory that the broker maps: the guest's RAM.
pub trait Window: Send + Sync {
    /// The window's offset of a piece of memory; `None` if it is not all in the window.
    fn offset(&self, at: *const u8, bytes: usize) -> Option<u64>;
}
