//! The checked reader: the only code that turns a position into bytes. Every step is bounds-checked, so a position
//! never passes the end and a length from the file is compared with what is left before it is used.

use alloc::vec::Vec;

use crate::error::GgufError;

/// Byte order of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Endian {
    /// Least significant byte first: what nearly every file is.
    Little,
    /// Most significant byte first.
    Big,
}

/// Plain numbers of either byte order.
pub(crate) trait Raw: Encode + Sized + Copy {
    const BYTES: usize;
    /// From exactly `BYTES` bytes; `None` for any other length.
    fn decode(bytes: &[u8], endian: Endian) -> Option<Self>;
}

/// What can be appended to the bytes of a file.
pub(crate) trait Encode {
    fn encode(self, endian: Endian, out: &mut Vec<u8>);
}

impl Encode for bool {
    fn encode(self, _: Endian, out: &mut Vec<u8>) {
        out.push(self.into());
    }
}

/// A string: its length in 64 bits, then its bytes.
impl Encode for &[u8] {
    fn encode(self, endian: Endian, out: &mut Vec<u8>) {
        (self.len() as u64).encode(endian, out);
        out.extend_from_slice(self);
    }
}

macro_rules! raw {
    ($($ty:ty)*) => {$(
        impl Raw for $ty {
            const BYTES: usize = size_of::<$ty>();
            #[inline]
            fn decode(bytes: &[u8], endian: Endian) -> Option<Self> {
                let bytes = bytes.try_into().ok()?;
                Some(match endian {
                    Endian::Little => <$ty>::from_le_bytes(bytes),
                    Endian::Big => <$ty>::from_be_bytes(bytes),
                })
            }
        }
        impl Encode for $ty {
            #[inline]
            fn encode(self, endian: Endian, out: &mut Vec<u8>) {
                match endian {
                    Endian::Little => out.extend_from_slice(&self.to_le_bytes()),
                    Endian::Big => out.extend_from_slice(&self.to_be_bytes()),
                }
            }
        }
    )*};
}
raw!(u8 i8 u16 i16 u32 i32 u64 i64 f32 f64);

/// A position in the bytes of a file. `pos <= bytes.len()` always.
#[derive(Clone, Copy)]
pub(crate) struct Reader<'a> {
    bytes: &'a [u8],
    pos: usize,
    endian: Endian,
}

impl<'a> Reader<'a> {
    /// At `pos`; past the end counts as the end.
    pub fn at(bytes: &'a [u8], pos: usize, endian: Endian) -> Self {
        Reader { bytes, pos: pos.min(bytes.len()), endian }
    }

    pub fn pos(&self) -> u64 {
        self.pos as u64
    }

    pub fn endian(&self) -> Endian {
        self.endian
    }

    /// Everything not yet read.
    pub fn rest(&self) -> &'a [u8] {
        &self.bytes[self.pos..]
    }

    pub fn remaining(&self) -> u64 {
        self.rest().len() as u64
    }

    /// The next `n` bytes.
    #[inline]
    pub fn take(&mut self, n: u64, what: &'static str) -> Result<&'a [u8], GgufError> {
        let taken = usize::try_from(n).ok().and_then(|n| self.rest().get(..n));
        let Some(taken) = taken else {
            return Err(GgufError::Truncated {
                what,
                offset: self.pos(),
                expected: n,
                got: self.remaining(),
            });
        };
        self.pos += taken.len();
        Ok(taken)
    }

    #[inline]
    pub fn number<T: Raw>(&mut self, what: &'static str) -> Result<T, GgufError> {
        let endian = self.endian;
        let truncated = GgufError::Truncated {
            what,
            offset: self.pos(),
            expected: T::BYTES as u64,
            got: self.remaining(),
        };
        let bytes = self.take(T::BYTES as u64, what)?;
        T::decode(bytes, endian).ok_or(truncated)
    }

    /// A count of things that take at least `min_bytes` each, so that a count above what is left is refused before
    /// anybody allocates for it.
    pub fn count(&mut self, min_bytes: u64, what: &'static str) -> Result<u64, GgufError> {
        let offset = self.pos();
        let got = self.number::<u64>(what)?;
        let max = self.remaining() / min_bytes;
        if got > max {
            return Err(GgufError::TooLarge { what, offset, max, got });
        }
        Ok(got)
    }

    /// A string: its length in 64 bits, then its bytes.
    #[inline]
    pub fn string(&mut self, what: &'static str) -> Result<&'a [u8], GgufError> {
        let n = self.number::<u64>(what)?;
        self.take(n, what)
    }

    /// A name: not empty, at most `max` bytes, UTF-8.
    pub fn name(&mut self, max: u64, what: &'static str) -> Result<&'a str, GgufError> {
        let offset = self.pos();
        let n = self.number::<u64>(what)?;
        if n == 0 {
            return Err(GgufError::Empty { what, offset });
        }
        if n > max {
            return Err(GgufError::TooLarge { what, offset, max, got: n });
        }
        let start = self.pos();
        let bytes = self.take(n, what)?;
        core::str::from_utf8(bytes)
            .map_err(|e| GgufError::NotUtf8 { what: what.into(), offset: start + e.valid_up_to() as u64 })
    }
}
