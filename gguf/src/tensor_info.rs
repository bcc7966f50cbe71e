//! One entry of the tensor list, and its checks: name, dimensions, format, offset, size.
//!
//! In a file: name, number of dimensions (u32), dimensions (u64 each, innermost first: ggml's `ne`), type (u32), offset
//! in the data section (u64, a multiple of the alignment). Here the offset is absolute.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use core::ops::Deref;

use quant::{FormatId, info};

use crate::error::{GgufError, TensorProblem};
use crate::limits;
use crate::raw::{Encode, Endian, Reader};

/// A tensor of a file. The data it names lies inside the file and overlaps no other tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TensorInfo<'a> {
    /// Its name.
    pub name: &'a str,
    /// First byte of its data, from the start of the file.
    pub offset: u64,
    /// ggml's `ne`: innermost first, ones past the last. `u32` for the allocation bound, see [`limits::MAX_DIM_ELEMS`].
    ne: [u32; 4],
    /// The format of its data.
    pub format: FormatId,
    n_dims: u8,
}

// The bound in `limits.rs`.
const _: () =
    assert!(size_of::<TensorInfo<'_>>() + limits::INDEX_BYTES <= 2 * (limits::TENSOR_MIN_BYTES as usize + 1));

impl<'a> TensorInfo<'a> {
    /// Dimensions as the file has them, innermost first: a matrix is (columns, rows).
    pub fn ne(&self) -> Dims {
        Dims { elems: self.ne.map(u64::from), n_dims: self.n_dims }
    }

    /// Dimensions outermost first: a matrix is (rows, columns). Empty for a scalar.
    pub fn shape(&self) -> Dims {
        let mut dims = self.ne();
        dims.elems[..usize::from(self.n_dims)].reverse();
        dims
    }

    /// Elements of the tensor.
    pub fn n_elems(&self) -> u64 {
        self.ne.iter().map(|&n| u64::from(n)).product()
    }

    /// Bytes of its data, without padding.
    pub fn n_bytes(&self) -> u64 {
        let format = info(self.format);
        self.n_elems() / format.elems as u64 * format.bytes as u64
    }

    /// First byte after its data, from the start of the file.
    pub fn end(&self) -> u64 {
        self.offset + self.n_bytes()
    }

    /// The next entry, with `offset` still counted from the start of the data section. Its size is checked not to
    /// overflow; where it lies is for the caller, who knows the other tensors.
    pub(crate) fn read(reader: &mut Reader<'a>) -> Result<Self, GgufError> {
        let entry = reader.pos();
        let name = reader.name(limits::MAX_TENSOR_NAME_BYTES, "a tensor name")?;
        let error = |problem| GgufError::Tensor { tensor: name.into(), offset: entry, problem };

        let n_dims = reader.number::<u32>("the number of a tensor's dimensions")?;
        if n_dims > limits::MAX_DIMS {
            return Err(error(TensorProblem::TooManyDims { got: n_dims.into() }));
        }
        let mut ne = [1; 4];
        for n in ne.iter_mut().take(n_dims as usize) {
            *n = reader.number::<u64>("a tensor's dimensions")?;
        }
        let number = reader.number::<u32>("a tensor's type")?;
        let format =
            FormatId::from_ggml(number).ok_or_else(|| error(TensorProblem::UnknownFormat { got: number }))?;
        let offset = reader.number::<u64>("a tensor's offset")?;
        let info = Self::checked(name, format, &ne[..n_dims as usize], offset).map_err(error)?;
        Ok(info)
    }

    /// A tensor of this shape (innermost first), if there can be one.
    pub(crate) fn checked(
        name: &'a str,
        format: FormatId,
        ne: &[u64],
        offset: u64,
    ) -> Result<Self, TensorProblem> {
        if ne.len() > limits::MAX_DIMS as usize {
            return Err(TensorProblem::TooManyDims { got: ne.len() as u64 });
        }
        let mut dims = [1u32; 4];
        for (index, (dim, &got)) in dims.iter_mut().zip(ne).enumerate() {
            *dim = u32::try_from(got)
                .ok()
                .filter(|&n| n > 0)
                .ok_or(TensorProblem::Dim { index: index as u32, got })?;
        }
        let format_info = info(format);
        let block_elems = format_info.elems as u64;
        let row = u64::from(dims[0]);
        if row % block_elems != 0 {
            return Err(TensorProblem::RowLength { format, block_elems, got: row });
        }
        let overflow = TensorProblem::Overflow { ne: dims };
        let n_elems = dims.iter().try_fold(1u64, |n, &dim| n.checked_mul(dim.into())).ok_or(overflow)?;
        (n_elems / block_elems).checked_mul(format_info.bytes as u64).ok_or(overflow)?;
        Ok(TensorInfo { name, offset, ne: dims, format, n_dims: ne.len() as u8 })
    }

    /// Appends the entry with this offset in the data section.
    pub(crate) fn encode(&self, offset: u64, endian: Endian, out: &mut Vec<u8>) {
        self.name.as_bytes().encode(endian, out);
        u32::from(self.n_dims).encode(endian, out);
        self.ne().iter().for_each(|n| n.encode(endian, out));
        (self.format as u32).encode(endian, out);
        offset.encode(endian, out);
    }

    pub(crate) fn error(&self, entry: u64, problem: TensorProblem) -> GgufError {
        GgufError::Tensor { tensor: String::from(self.name), offset: entry, problem }
    }
}

/// Up to four dimensions; derefs to a slice.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Dims {
    elems: [u64; 4],
    n_dims: u8,
}

impl Deref for Dims {
    type Target = [u64];
    fn deref(&self) -> &[u64] {
        &self.elems[..usize::from(self.n_dims)]
    }
}

impl fmt::Debug for Dims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.deref().fmt(f)
    }
}

/// Turns the data of a plain format (floats, integers) from one byte order to the other, in place.
///
/// The blocks of a quantised format mix widths; a file of the other byte order that holds them is to be converted by
/// the tool that made it, so they are an error here.
pub fn swap_plain(format: FormatId, data: &mut [u8]) -> Result<(), GgufError> {
    use FormatId::*;
    let width = match format {
        I8 => 1,
        F16 | BF16 | I16 => 2,
        F32 | I32 => 4,
        F64 | I64 => 8,
        _ => return Err(GgufError::ByteOrder { format }),
    };
    data.chunks_exact_mut(width).for_each(<[u8]>::reverse);
    Ok(())
}
