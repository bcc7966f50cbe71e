//! The activations' memory: one aligned block that the plan cuts into slots.
//!
//! `unsafe` is for one thing: views of several slots at once, exclusive for outputs. Every call checks that no output
//! overlaps another view, so a wrong plan is a panic, never undefined behaviour.
#![allow(unsafe_code)]

use alloc::vec::Vec;

use crate::error::EngineError;
use crate::plan::{ALIGN_BYTES, Slot};

/// Zeroed bytes that start on a cache line.
///
/// The allocator is asked for plain bytes, not for aligned lines: only then does it hand out pages that are zero and
/// untouched, so that a large cache costs nothing until it is used.
#[derive(Default)]
pub struct Bytes {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Bytes {
    /// `len` zeroed bytes.
    pub fn zeroed(len: usize, what: &'static str) -> Result<Bytes, EngineError> {
        let memory = bytemuck::allocation::try_zeroed_vec::<u8>(len + ALIGN_BYTES)
            .map_err(|()| EngineError::OutOfMemory { what, bytes: len })?;
        let start = memory.as_ptr().align_offset(ALIGN_BYTES);
        Ok(Bytes { memory, start, len })
    }

    /// All of them.
    pub fn as_slice(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }

    /// All of them.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

/// The activations' memory.
#[derive(Default)]
pub struct Arena {
    bytes: Bytes,
}

impl Arena {
    /// Makes room for a plan; what was in the arena is lost if it grows.
    pub fn reserve(&mut self, bytes: usize) -> Result<(), EngineError> {
        if bytes > self.bytes.len {
            self.bytes = Bytes::default();
            self.bytes = Bytes::zeroed(bytes, "activations")?;
        }
        Ok(())
    }

    /// One slot to read.
    pub fn view(&self, slot: Slot) -> &[f32] {
        bytemuck::cast_slice(&self.bytes.as_slice()[slot.offset..slot.offset + slot.len])
    }

    /// Slots to read and slots to write at once. An empty slot gives an empty view.
    ///
    /// # Panics
    /// If a slot ends outside the arena, or an output overlaps another slot.
    pub fn views<const I: usize, const O: usize>(
        &mut self,
        inputs: [Slot; I],
        outputs: [Slot; O],
    ) -> ([&[f32]; I], [&mut [f32]; O]) {
        let overlap = |a: Slot, b: Slot| a.offset < b.offset + b.len && b.offset < a.offset + a.len;
        for (i, out) in outputs.iter().enumerate() {
            let clash = inputs.iter().chain(&outputs[..i]).find(|other| overlap(*out, **other));
            assert!(clash.is_none(), "output {out:?} overlaps {clash:?}");
        }
        let bytes = self.bytes.as_mut_slice();
        for slot in inputs.iter().chain(&outputs) {
            let fits = slot.offset.is_multiple_of(ALIGN_BYTES) && slot.offset + slot.len <= bytes.len();
            assert!(fits, "{slot:?} of {}", bytes.len());
        }
        let base = bytes.as_mut_ptr();
        // SAFETY:
        // - every slot lies inside the allocation and starts on a cache line (asserted above), so the pointers are
        //   valid and aligned for f32; any bytes are a valid f32;
        // - no output overlaps another slot (asserted above), so exclusive views alias nothing;
        // - the views borrow `self` exclusively for their whole life.
        unsafe {
            (
                inputs.map(|s| core::slice::from_raw_parts(base.add(s.offset).cast::<f32>(), s.len / 4)),
                outputs.map(|s| core::slice::from_raw_parts_mut(base.add(s.offset).cast::<f32>(), s.len / 4)),
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_are_disjoint_and_hold_values() {
        let mut arena = Arena::default();
        arena.reserve(256).unwrap();
        let (a, b) = (Slot { offset: 0, len: 64 }, Slot { offset: 128, len: 60 });
        let ([], [x, y]) = arena.views([], [a, b]);
        x.fill(1.0);
        y.fill(2.0);
        assert_eq!((x.len(), y.len()), (16, 15));
        let ([x], [y]) = arena.views([a], [b]);
        y.copy_from_slice(&x[..15]);
        assert!(arena.view(b).iter().all(|v| *v == 1.0));
    }

    #[test]
    #[should_panic(expected = "overlaps")]
    fn overlapping_output_is_refused() {
        let mut arena = Arena::default();
        arena.reserve(256).unwrap();
        arena.views([Slot { offset: 0, len: 128 }], [Slot { offset: 64, len: 64 }]);
    }
}
