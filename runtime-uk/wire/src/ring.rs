//! Where things lie in the window.
//!
//! ```text
//! at                64 bytes   counter of slots done (u64), written by the broker
//! at + 64           64 n       descriptors, written by the guest
//! at + 64 + 64 n    64 n       replies, written by the broker
//! ```
//!
//! Slot number `i` since the beginning lies in place `i % n`. A descriptor of several slots may wrap around. The guest
//! writes no slot that is not done; the broker reads none that was not submitted.

use crate::frame::MAX_BATCH_SLOTS;
use crate::{SLOT_BYTES, WireError};

/// A ring's place in the window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingPlace {
    /// Offset of its first byte; a multiple of the slot's size.
    pub at: u64,
    /// Slots; a power of two.
    pub slots: u32,
}

impl RingPlace {
    /// Bytes of a ring of so many slots.
    pub const fn bytes(slots: u32) -> usize {
        SLOT_BYTES * (1 + 2 * slots as usize)
    }

    /// A place whose numbers fit each other; whether it lies in the window is the broker's to check.
    pub fn new(at: u64, slots: u32) -> Result<RingPlace, WireError> {
        if !slots.is_power_of_two() || !(16..=MAX_BATCH_SLOTS).contains(&slots) {
            return Err(WireError::Field { what: "slots of a ring", got: slots.into() });
        }
        if !at.is_multiple_of(SLOT_BYTES as u64) || at.checked_add(RingPlace::bytes(slots) as u64).is_none() {
            return Err(WireError::Field { what: "place of a ring", got: at });
        }
        Ok(RingPlace { at, slots })
    }

    /// Offset of the counter.
    pub fn done(self) -> u64 {
        self.at
    }

    /// Offset of descriptor slot `number`.
    pub fn command(self, number: u64) -> u64 {
        self.at + SLOT_BYTES as u64 * (1 + number % u64::from(self.slots))
    }

    /// Offset of the reply to it.
    pub fn reply(self, number: u64) -> u64 {
        self.command(number) + SLOT_BYTES as u64 * u64::from(self.slots)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_do_not_overlap_and_end_where_they_say() {
        let ring = RingPlace::new(128, 16).unwrap();
        let mut places: std::vec::Vec<u64> = (0..16).flat_map(|i| [ring.command(i), ring.reply(i)]).collect();
        places.push(ring.done());
        places.sort_unstable();
        let expected: std::vec::Vec<u64> = (0..33).map(|i| 128 + 64 * i).collect();
        assert_eq!(places, expected);
        assert_eq!(places.last().unwrap() + 64, 128 + RingPlace::bytes(16) as u64);
        assert_eq!(ring.command(21), ring.command(5));
    }

    #[test]
    fn impossible_rings_are_refused() {
        for (at, slots) in [(0, 0), (0, 24), (0, 8192), (32, 16), (u64::MAX - 63, 16)] {
            assert!(RingPlace::new(at, slots).is_err(), "{at} {slots}");
        }
    }
}
