//! What a launcher returns: one kernel launch as a value. Launchers are pure; every driver submits the same value.

use core::fmt;

use bytemuck::Pod;

/// An address in a device's memory space.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, bytemuck::Pod, bytemuck::Zeroable,
)]
#[repr(transparent)]
pub struct DevicePtr(pub u64);

impl DevicePtr {
    /// "Not given", for arrays that a kernel may go without.
    pub const NULL: DevicePtr = DevicePtr(0);

    /// The address this many bytes further on.
    #[must_use]
    pub fn offset(self, bytes: u64) -> DevicePtr {
        DevicePtr(self.0 + bytes)
    }
}

/// Most bytes of parameters that any kernel here takes.
pub const MAX_PARAM_BYTES: usize = 192;

/// One kernel launch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Launch {
    /// The kernel's name in the PTX.
    pub entry: &'static str,
    /// CTAs, per dimension.
    pub grid: [u32; 3],
    /// Threads per CTA; a multiple of 32. CTAs are one-dimensional.
    pub cta: u32,
    /// CTAs per cluster (sm_90); 1 for none.
    pub cluster: u32,
    /// Dynamic shared memory per CTA.
    pub smem_bytes: u32,
    /// Arguments.
    pub params: Params,
}

/// Arguments of a launch, laid out as C would a struct of them: what the driver takes as one buffer.
#[derive(Clone, Copy, PartialEq)]
pub struct Params {
    bytes: [u8; MAX_PARAM_BYTES],
    layout: ParamLayout,
}

/// How long a list of arguments is so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ParamLayout {
    bytes: usize,
}

impl ParamLayout {
    /// Offset of one more argument.
    pub fn add<T>(&mut self) -> usize {
        let at = self.bytes.next_multiple_of(align_of::<T>());
        self.bytes = at + size_of::<T>();
        at
    }

    /// Bytes of all arguments.
    pub fn bytes(self) -> usize {
        self.bytes
    }
}

impl Params {
    /// No arguments yet.
    pub fn new() -> Params {
        Params { bytes: [0; MAX_PARAM_BYTES], layout: ParamLayout::default() }
    }

    /// Adds the next argument: a [`DevicePtr`] for an array, else a scalar of the kernel's type.
    #[must_use]
    pub fn with<T: Pod>(mut self, value: T) -> Params {
        let at = self.layout.add::<T>();
        self.bytes[at..at + size_of::<T>()].copy_from_slice(bytemuck::bytes_of(&value));
        self
    }

    /// Arguments already laid out, as [`Params::bytes`] of another process gave them; `None` if they are too long.
    pub fn from_bytes(from: &[u8]) -> Option<Params> {
        let mut params = Params::new();
        params.bytes.get_mut(..from.len())?.copy_from_slice(from);
        params.layout.bytes = from.len();
        Some(params)
    }

    /// All arguments.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.layout.bytes()]
    }
}

impl Default for Params {
    fn default() -> Params {
        Params::new()
    }
}

impl fmt::Debug for Params {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Params({:02x?})", self.bytes())
    }
}

/// Reads arguments back, in order: the emulator's half of the ABI.
#[derive(Clone, Copy, Debug)]
pub struct ParamReader<'a> {
    bytes: &'a [u8],
    layout: ParamLayout,
}

impl<'a> ParamReader<'a> {
    /// A reader at the first argument.
    pub fn new(params: &'a Params) -> ParamReader<'a> {
        ParamReader { bytes: params.bytes(), layout: ParamLayout::default() }
    }

    /// The next argument. The caller has checked the total length against the entry's.
    pub fn take<T: Pod>(&mut self) -> T {
        let at = self.layout.add::<T>();
        bytemuck::pod_read_unaligned(&self.bytes[at..at + size_of::<T>()])
    }
}

/// Why a launcher refuses its arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LaunchError {
    /// A size is zero, too large, or no multiple of what the kernel takes.
    Shape {
        /// Kernel.
        kernel: &'static str,
        /// Which size.
        what: &'static str,
        /// What it must be.
        expected: &'static str,
        /// What it is.
        got: u64,
    },
    /// An address is not aligned.
    Alignment {
        /// Kernel.
        kernel: &'static str,
        /// Which array.
        what: &'static str,
        /// Bytes it must be a multiple of.
        expected: u64,
        /// The address.
        got: DevicePtr,
    },
    /// The kernel has no entry for these types.
    Format {
        /// Kernel.
        kernel: &'static str,
        /// The type.
        format: quant::FormatId,
    },
}

impl fmt::Display for LaunchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            LaunchError::Shape { kernel, what, expected, got } => {
                write!(f, "{kernel}: {what} is {got}, expected {expected}")
            }
            LaunchError::Alignment { kernel, what, expected, got } => {
                write!(f, "{kernel}: {what} at {:#x} is not aligned to {expected} bytes", got.0)
            }
            LaunchError::Format { kernel, format } => write!(f, "{kernel}: no entry for {format}"),
        }
    }
}

impl core::error::Error for LaunchError {}

/// The checks of one kernel's launcher.
#[derive(Clone, Copy, Debug)]
pub struct Check(pub &'static str);

impl Check {
    /// `value` as a kernel takes sizes: at least 1 and below 2^31, so that products with small constants fit u32.
    pub fn size(self, what: &'static str, value: usize) -> Result<u32, LaunchError> {
        match u32::try_from(value) {
            Ok(size @ 1..0x8000_0000) => Ok(size),
            _ => Err(self.shape(what, "1 to 2^31 - 1", value)),
        }
    }

    /// `value` is a multiple of `step`.
    pub fn multiple(
        self,
        what: &'static str,
        value: usize,
        step: usize,
        expected: &'static str,
    ) -> Result<(), LaunchError> {
        if value.is_multiple_of(step) { Ok(()) } else { Err(self.shape(what, expected, value)) }
    }

    /// A grid's second or third dimension.
    pub fn grid(self, what: &'static str, value: usize) -> Result<u32, LaunchError> {
        match u32::try_from(value) {
            Ok(ctas @ 1..0x1_0000) => Ok(ctas),
            _ => Err(self.shape(what, "1 to 65535", value)),
        }
    }

    /// `address` is a multiple of `align` bytes; [`DevicePtr::NULL`] passes, where a kernel allows it.
    pub fn aligned(self, what: &'static str, address: DevicePtr, align: u64) -> Result<(), LaunchError> {
        if address.0.is_multiple_of(align) {
            Ok(())
        } else {
            Err(LaunchError::Alignment { kernel: self.0, what, expected: align, got: address })
        }
    }

    pub(crate) fn shape(self, what: &'static str, expected: &'static str, got: usize) -> LaunchError {
        LaunchError::Shape { kernel: self.0, what, expected, got: got as u64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn params_follow_cs_layout() {
        let params = Params::new().with(1u32).with(DevicePtr(2)).with(3u16).with(1.0f32);
        assert_eq!(params.bytes().len(), 24);
        let mut reader = ParamReader::new(&params);
        assert_eq!((reader.take::<u32>(), reader.take::<DevicePtr>()), (1, DevicePtr(2)));
        assert_eq!((reader.take::<u16>(), reader.take::<f32>()), (3, 1.0));
        assert_eq!(Params::from_bytes(params.bytes()), Some(params));
        assert_eq!(Params::from_bytes(&[0; MAX_PARAM_BYTES + 1]), None);
    }

    #[test]
    fn checks_name_what_is_wrong() {
        let check = Check("k");
        assert_eq!(check.size("rows", 5), Ok(5));
        assert!(check.size("rows", 0).is_err() && check.size("rows", 1 << 31).is_err());
        assert!(check.grid("columns", 65_536).is_err());
        let error = check.aligned("x", DevicePtr(8), 16).unwrap_err();
        assert_eq!(alloc::format!("{error}"), "k: x at 0x8 is not aligned to 16 bytes");
    }
}
