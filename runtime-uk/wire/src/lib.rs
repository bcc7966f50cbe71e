//! What a guest and its GPU broker say to each other.
//!
//! ```text
//! guest ── Hello ─────────────────────────────────> broker      once, on the link (a byte stream)
//!       <───────────────────────────────── Welcome ──
//!       command descriptors into the ring                       in memory that both map ("window")
//!       ── Submit: go up to number N ─────────────>             the doorbell, one per step
//!                       replies into the ring, then the counter of the done
//!       <────────────────────────────────── Alive ──            now and then during long work
//! ```
//!
//! Without a window the descriptors and the data follow [`Submit`](Frame::Submit) on the link, and replies and data
//! follow [`Complete`](Frame::Complete): slow, but it needs nothing but a byte stream.
//!
//! | file | what |
//! |---|---|
//! | `frame.rs` | what travels on the link |
//! | `command.rs` | descriptors: what a guest may ask |
//! | `reply.rs` | answers, one per descriptor |
//! | `ring.rs` | where descriptors, replies and the counter lie in the window |
//! | `shared.rs` | memory that somebody else writes at the same time |
//!
//! Everything received is a claim. `parse` takes bytes that were copied out of shared memory first, and returns a value
//! in which every field is in range by itself; what depends on the other side's state (handles, addresses, the window's
//! size) is checked where that state is. Integers are little endian. Unused bytes are zero, so that a later version can
//! give them a meaning; bytes that this version does not know are an error, never ignored.
#![cfg_attr(not(test), no_std)]
#![deny(unsafe_code)]

pub mod command;
mod fields;
pub mod frame;
pub mod reply;
pub mod ring;
#[allow(unsafe_code)]
pub mod shared;

use core::fmt;

pub use command::{Command, Data};
pub use frame::{Frame, Hello, Welcome};
pub use reply::{Reply, Status};

/// Changes whenever a message changes; both sides must have the same.
pub const VERSION: u32 = 3;

/// Bytes of a descriptor's slot, of a reply, and of a frame: one cache line.
pub const SLOT_BYTES: usize = 64;

/// One slot.
pub type Slot = [u8; SLOT_BYTES];

/// Why bytes are no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WireError {
    /// The first bytes are not ours.
    Magic,
    /// The other side speaks another version.
    Version {
        /// Which.
        got: u32,
    },
    /// No message has this number.
    Unknown {
        /// Kind of message.
        what: &'static str,
        /// The number.
        number: u32,
    },
    /// A field has a value that it cannot have.
    Field {
        /// Which.
        what: &'static str,
        /// Its value.
        got: u64,
    },
    /// A descriptor goes on in slots that are not there.
    CutOff {
        /// Slots it says it has.
        slots: usize,
        /// Slots there are.
        got: usize,
    },
    /// Bytes without a meaning are not zero.
    NotZero,
}

impl fmt::Display for WireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            WireError::Magic => f.write_str("the other side does not speak runik's GPU protocol"),
            WireError::Version { got } => {
                write!(
                    f,
                    "the other side speaks version {got} of the GPU protocol, this one version {VERSION}"
                )
            }
            WireError::Unknown { what, number } => write!(f, "no {what} has the number {number}"),
            WireError::Field { what, got } => write!(f, "{what} cannot be {got}"),
            WireError::CutOff { slots, got } => write!(f, "a descriptor of {slots} slots with {got} left"),
            WireError::NotZero => f.write_str("bytes without a meaning are not zero"),
        }
    }
}

impl core::error::Error for WireError {}
