//! Integers in a row of bytes: written and read in order, with the rest checked to be zero.

use crate::WireError;

/// Writes fields into zeroed bytes that are known to be long enough.
pub struct Put<'a> {
    bytes: &'a mut [u8],
    at: usize,
}

impl<'a> Put<'a> {
    pub fn new(bytes: &'a mut [u8]) -> Put<'a> {
        Put { bytes, at: 0 }
    }

    pub fn bytes(mut self, value: &[u8]) -> Put<'a> {
        self.bytes[self.at..self.at + value.len()].copy_from_slice(value);
        self.at += value.len();
        self
    }

    pub fn u8(self, value: u8) -> Put<'a> {
        self.bytes(&[value])
    }

    pub fn u16(self, value: u16) -> Put<'a> {
        self.bytes(&value.to_le_bytes())
    }

    pub fn u32(self, value: u32) -> Put<'a> {
        self.bytes(&value.to_le_bytes())
    }

    pub fn u64(self, value: u64) -> Put<'a> {
        self.bytes(&value.to_le_bytes())
    }
}

/// Reads fields. Past the end everything is zero: lengths are the callers' matter.
pub struct Take<'a> {
    bytes: &'a [u8],
}

impl<'a> Take<'a> {
    pub fn new(bytes: &'a [u8]) -> Take<'a> {
        Take { bytes }
    }

    pub fn bytes(&mut self, n: usize) -> &'a [u8] {
        let (taken, rest) = self.bytes.split_at(n.min(self.bytes.len()));
        self.bytes = rest;
        taken
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let taken = self.bytes(N);
        array[..taken.len()].copy_from_slice(taken);
        array
    }

    pub fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.array())
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// The rest must be zero.
    pub fn end(self) -> Result<(), WireError> {
        if self.bytes.iter().all(|byte| *byte == 0) { Ok(()) } else { Err(WireError::NotZero) }
    }
}
