//! Answers: one slot per descriptor, in the place of its first slot.

use crate::fields::{Put, Take};
use crate::{SLOT_BYTES, Slot, WireError};

/// How a command went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Status {
    /// Done, or queued.
    Done = 0,
    /// It names what is not the guest's: data outside the window, memory of others; or asks for more than it may have.
    Refused = 1,
    /// Not enough memory, on the device or within the guest's allowance.
    OutOfMemory = 2,
    /// The address range is not within one allocation.
    Address = 3,
    /// No such handle.
    Handle = 4,
    /// No such kernel.
    NoKernel = 5,
    /// The device cannot launch it.
    Launch = 6,
    /// A kernel did something wrong.
    Kernel = 7,
    /// The driver does not have it.
    Unsupported = 8,
    /// Not possible while a graph is captured.
    Capture = 9,
    /// The device is lost.
    Lost = 10,
    /// Any other failure.
    Driver = 11,
}

impl Status {
    fn from_number(number: u32) -> Option<Status> {
        const ALL: [Status; 12] = [
            Status::Done,
            Status::Refused,
            Status::OutOfMemory,
            Status::Address,
            Status::Handle,
            Status::NoKernel,
            Status::Launch,
            Status::Kernel,
            Status::Unsupported,
            Status::Capture,
            Status::Lost,
            Status::Driver,
        ];
        ALL.get(number as usize).copied()
    }
}

/// An answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    /// How it went.
    pub status: Status,
    /// The driver's number for the failure.
    pub code: u32,
    /// The result: an address, a handle, a time.
    pub value: u64,
}

impl Reply {
    /// Done, with a result.
    pub fn done(value: u64) -> Reply {
        Reply { status: Status::Done, code: 0, value }
    }

    /// Failed.
    pub fn failed(status: Status, code: u32) -> Reply {
        Reply { status, code, value: 0 }
    }

    /// As bytes.
    pub fn encode(&self) -> Slot {
        let mut slot = [0; SLOT_BYTES];
        Put::new(&mut slot).u32(self.status as u32).u32(self.code).u64(self.value);
        slot
    }

    /// From bytes.
    pub fn parse(slot: &Slot) -> Result<Reply, WireError> {
        let mut take = Take::new(slot);
        let number = take.u32();
        let status = Status::from_number(number).ok_or(WireError::Unknown { what: "status", number })?;
        let reply = Reply { status, code: take.u32(), value: take.u64() };
        take.end()?;
        Ok(reply)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_survives() {
        for number in 0..12 {
            let status = Status::from_number(number).unwrap();
            assert_eq!(status as u32, number);
            let reply = Reply { status, code: 7, value: u64::MAX };
            assert_eq!(Reply::parse(&reply.encode()), Ok(reply));
        }
        assert_eq!(Status::from_number(12), None);
    }
}
