//! What travels on the link: frames of one slot, and after some of them the bytes they announce.

use crate::fields::{Put, Take};
use crate::ring::RingPlace;
use crate::{SLOT_BYTES, Slot, VERSION, WireError};

/// How a hello begins.
const MAGIC: [u8; 8] = *b"runik-uk";

/// Bytes of data with one submission without a window: bounds what the broker buffers for a guest.
pub const MAX_INLINE_BYTES: u32 = 1 << 20;
/// Slots of one submission.
pub const MAX_BATCH_SLOTS: u32 = 4096;
/// Bytes of a device's name that are sent.
pub const NAME_BYTES: usize = 64;

/// The guest's first words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Where the ring lies in the window; `None`: there is no window, everything goes over the link.
    pub ring: Option<RingPlace>,
}

/// The broker's answer: the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Welcome {
    /// Compute capability times ten.
    pub sm: u32,
    /// Streaming multiprocessors.
    pub n_sm: u32,
    /// Device memory.
    pub memory_bytes: u64,
    /// Second-level cache.
    pub l2_bytes: u32,
    /// Most shared memory of a CTA.
    pub smem_per_cta_bytes: u32,
    /// Shared memory of a multiprocessor.
    pub smem_per_sm_bytes: u32,
    /// Registers of a multiprocessor.
    pub registers_per_sm: u32,
    /// Threads of a multiprocessor.
    pub threads_per_sm: u32,
    /// Highest CUDA version of the driver, as CUDA counts it: which kernels it compiles.
    pub driver_version: u32,
    /// Which build the broker's kernels are of.
    pub kernels: u64,
    /// Device address of the window's first byte; 0 if the device cannot reach it.
    pub window_address: u64,
    /// Bytes of the window.
    pub window_bytes: u64,
    /// The device's name, zero-padded UTF-8.
    pub name: NameBytes,
}

/// A name in a fixed place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NameBytes(pub [u8; NAME_BYTES]);

impl Default for NameBytes {
    fn default() -> NameBytes {
        NameBytes([0; NAME_BYTES])
    }
}

impl NameBytes {
    /// As much of a name as fits, whole characters only.
    pub fn new(name: &str) -> NameBytes {
        let mut bytes = [0; NAME_BYTES];
        let len = (0..=name.len().min(NAME_BYTES)).rev().find(|&len| name.is_char_boundary(len)).unwrap_or(0);
        bytes[..len].copy_from_slice(&name.as_bytes()[..len]);
        NameBytes(bytes)
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        let len = self.0.iter().position(|byte| *byte == 0).unwrap_or(NAME_BYTES);
        core::str::from_utf8(&self.0[..len]).unwrap_or("?")
    }
}

/// Bytes of a welcome on the link.
pub const WELCOME_BYTES: usize = 3 * SLOT_BYTES;

impl Hello {
    /// As bytes.
    pub fn encode(&self) -> Slot {
        let mut slot = [0; SLOT_BYTES];
        let put = Put::new(&mut slot).bytes(&MAGIC).u32(VERSION);
        if let Some(ring) = self.ring {
            put.u32(ring.slots).u64(ring.at);
        }
        slot
    }

    /// From bytes.
    pub fn parse(slot: &Slot) -> Result<Hello, WireError> {
        let mut take = Take::new(slot);
        if take.bytes(8) != MAGIC {
            return Err(WireError::Magic);
        }
        let got = take.u32();
        if got != VERSION {
            return Err(WireError::Version { got });
        }
        let (slots, at) = (take.u32(), take.u64());
        take.end()?;
        Ok(Hello { ring: if slots == 0 && at == 0 { None } else { Some(RingPlace::new(at, slots)?) } })
    }
}

impl Welcome {
    /// As bytes.
    pub fn encode(&self) -> [u8; WELCOME_BYTES] {
        let mut bytes = [0; WELCOME_BYTES];
        Put::new(&mut bytes)
            .bytes(&MAGIC)
            .u32(VERSION)
            .u32(self.sm)
            .u32(self.n_sm)
            .u32(self.l2_bytes)
            .u64(self.memory_bytes)
            .u32(self.smem_per_cta_bytes)
            .u32(self.smem_per_sm_bytes)
            .u32(self.registers_per_sm)
            .u32(self.threads_per_sm)
            .u32(self.driver_version)
            .u64(self.kernels)
            .u64(self.window_address)
            .u64(self.window_bytes)
            .bytes(&self.name.0);
        bytes
    }

    /// From bytes.
    pub fn parse(bytes: &[u8; WELCOME_BYTES]) -> Result<Welcome, WireError> {
        let mut take = Take::new(bytes);
        if take.bytes(8) != MAGIC {
            return Err(WireError::Magic);
        }
        let got = take.u32();
        if got != VERSION {
            return Err(WireError::Version { got });
        }
        let mut welcome = Welcome {
            sm: take.u32(),
            n_sm: take.u32(),
            l2_bytes: take.u32(),
            memory_bytes: take.u64(),
            smem_per_cta_bytes: take.u32(),
            smem_per_sm_bytes: take.u32(),
            registers_per_sm: take.u32(),
            threads_per_sm: take.u32(),
            driver_version: take.u32(),
            kernels: take.u64(),
            window_address: take.u64(),
            window_bytes: take.u64(),
            name: NameBytes::default(),
        };
        welcome.name.0.copy_from_slice(take.bytes(NAME_BYTES));
        take.end()?;
        Ok(welcome)
    }
}

/// A frame after the greeting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Guest: do the commands up to this number of slots since the beginning.
    Submit {
        /// Slots in all submissions so far, this one included.
        to: u64,
        /// Slots of this submission that follow on the link; 0 with a window.
        slots: u32,
        /// Bytes of data that follow them.
        data_bytes: u32,
        /// Bytes of data that the replies may bring.
        reply_bytes: u32,
    },
    /// Broker, without a window: done. Replies follow, one slot for each slot of the submission, and then data.
    Complete {
        /// As in the submission.
        to: u64,
        /// Slots that follow.
        slots: u32,
        /// Bytes of data that follow them.
        data_bytes: u32,
    },
    /// Broker: still at it.
    Alive,
    /// Broker: the guest broke the protocol, or the device is gone; nothing more will come.
    End,
}

const SUBMIT: u32 = 1;
const COMPLETE: u32 = 2;
const ALIVE: u32 = 3;
const END: u32 = 4;

impl Frame {
    /// As bytes.
    pub fn encode(&self) -> Slot {
        let mut slot = [0; SLOT_BYTES];
        let put = Put::new(&mut slot);
        match *self {
            Frame::Submit { to, slots, data_bytes, reply_bytes } => {
                put.u32(SUBMIT).u32(slots).u64(to).u32(data_bytes).u32(reply_bytes);
            }
            Frame::Complete { to, slots, data_bytes } => {
                put.u32(COMPLETE).u32(slots).u64(to).u32(data_bytes);
            }
            Frame::Alive => drop(put.u32(ALIVE)),
            Frame::End => drop(put.u32(END)),
        }
        slot
    }

    /// From bytes. Announced lengths are within [`MAX_BATCH_SLOTS`] and [`MAX_INLINE_BYTES`].
    pub fn parse(slot: &Slot) -> Result<Frame, WireError> {
        let mut take = Take::new(slot);
        let kind = take.u32();
        let frame = match kind {
            SUBMIT => {
                let slots = slots_of(take.u32())?;
                let to = take.u64();
                Frame::Submit {
                    to,
                    slots,
                    data_bytes: inline("data of a submission", take.u32())?,
                    reply_bytes: inline("data of replies", take.u32())?,
                }
            }
            COMPLETE => {
                let slots = slots_of(take.u32())?;
                Frame::Complete { to: take.u64(), slots, data_bytes: inline("data of replies", take.u32())? }
            }
            ALIVE => Frame::Alive,
            END => Frame::End,
            number => return Err(WireError::Unknown { what: "frame", number }),
        };
        take.end()?;
        Ok(frame)
    }
}

fn slots_of(slots: u32) -> Result<u32, WireError> {
    if slots <= MAX_BATCH_SLOTS {
        Ok(slots)
    } else {
        Err(WireError::Field { what: "slots of a batch", got: slots.into() })
    }
}

fn inline(what: &'static str, bytes: u32) -> Result<u32, WireError> {
    if bytes <= MAX_INLINE_BYTES { Ok(bytes) } else { Err(WireError::Field { what, got: bytes.into() }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn greetings_keep_their_meaning() {
        for ring in [None, Some(RingPlace::new(4096, 1024).unwrap())] {
            assert_eq!(Hello::parse(&Hello { ring }.encode()), Ok(Hello { ring }));
        }
        let welcome = Welcome {
            sm: 90,
            n_sm: 132,
            memory_bytes: 80 << 30,
            l2_bytes: 50 << 20,
            smem_per_cta_bytes: 227 << 10,
            smem_per_sm_bytes: 228 << 10,
            registers_per_sm: 65_536,
            threads_per_sm: 2048,
            driver_version: 13_000,
            kernels: 0x0123_4567_89ab_cdef,
            window_address: 0x7f00_0000_0000,
            window_bytes: 1 << 30,
            name: NameBytes::new("NVIDIA H100 80GB HBM3"),
        };
        assert_eq!(Welcome::parse(&welcome.encode()), Ok(welcome));
    }

    #[test]
    fn other_versions_and_strangers_are_told_apart() {
        let mut slot = Hello { ring: None }.encode();
        slot[8] = 9;
        assert_eq!(Hello::parse(&slot), Err(WireError::Version { got: 9 }));
        slot[0] = 0;
        assert_eq!(Hello::parse(&slot), Err(WireError::Magic));
    }

    #[test]
    fn names_are_cut_between_characters() {
        let long = "ü".repeat(40);
        assert_eq!(NameBytes::new(&long).as_str(), "ü".repeat(32));
        assert_eq!(NameBytes::new(&std::format!("x{long}")).as_str(), std::format!("x{}", "ü".repeat(31)));
    }

    proptest! {
        #[test]
        fn any_frame_is_refused_or_says_the_same_again(mut slot in prop::array::uniform32(any::<u8>()), kind in 0u8..6) {
            slot[0] = kind;
            slot[1..4].fill(0);
            let mut whole = [0; SLOT_BYTES];
            whole[..32].copy_from_slice(&slot);
            if let Ok(frame) = Frame::parse(&whole) {
                prop_assert_eq!(frame.encode(), whole);
            }
        }
    }
}
