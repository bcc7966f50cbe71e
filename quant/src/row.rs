//! Whole rows by format id: the entry points for everybody who holds bytes and an id.

use bytemuck::AnyBitPattern;

use crate::format::{BlockFormat, Encode, FloatFormat, FormatId, Importance, QuantError};
use crate::table::{Visitor, info, with_format};

/// Bytes of a row of `elems` elements; an error if the row is not whole blocks or the size overflows.
pub fn row_bytes(format: FormatId, elems: usize) -> Result<usize, QuantError> {
    let info = info(format);
    if !elems.is_multiple_of(info.elems) {
        return Err(QuantError::RowLength { format, elems, block: info.elems });
    }
    (elems / info.elems).checked_mul(info.bytes).ok_or(QuantError::RowLength {
        format,
        elems,
        block: info.elems,
    })
}

fn check(format: FormatId, elems: usize, bytes: usize) -> Result<(), QuantError> {
    let expected = row_bytes(format, elems)?;
    if bytes != expected {
        return Err(QuantError::ByteLength { format, expected, got: bytes });
    }
    Ok(())
}

/// Reads `T`s out of bytes of any alignment.
fn each<T: AnyBitPattern>(bytes: &[u8]) -> impl Iterator<Item = T> + '_ {
    bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned)
}

/// Decode a row to f32: `out.len()` elements out of `bytes`.
pub fn decode(format: FormatId, bytes: &[u8], out: &mut [f32]) -> Result<(), QuantError> {
    struct Decode<'a> {
        bytes: &'a [u8],
        out: &'a mut [f32],
    }
    impl Visitor for Decode<'_> {
        type Output = ();
        fn block<F: BlockFormat>(self) {
            for (block, out) in each::<F>(self.bytes).zip(self.out.chunks_exact_mut(F::ELEMS)) {
                block.decode(out);
            }
        }
        fn float<F: FloatFormat>(self) {
            for (value, out) in each::<F>(self.bytes).zip(self.out) {
                *out = value.to_f32();
            }
        }
    }
    check(format, out.len(), bytes.len())?;
    with_format(format, Decode { bytes, out }).ok_or(QuantError::Unsupported { format, what: "decode" })
}

/// Encode a row of f32: byte-equal to ggml's `ggml_quantize_chunk` of one row.
pub fn encode(
    format: FormatId,
    src: &[f32],
    importance: Importance<'_>,
    out: &mut [u8],
) -> Result<(), QuantError> {
    encode_row::<true>(format, src, importance, out)
}

/// [`encode`] for floats and formats whose blocks are one group, such as a KV cache has, and as ggml encodes that: without a
/// search in IQ4_NL. A program that asks for no more is a hundred kilobytes shorter.
pub fn encode_one_group(format: FormatId, src: &[f32], out: &mut [u8]) -> Result<(), QuantError> {
    encode_row::<false>(format, src, None, out)
}

fn encode_row<const SUPER_BLOCKS: bool>(
    format: FormatId,
    src: &[f32],
    importance: Importance<'_>,
    out: &mut [u8],
) -> Result<(), QuantError> {
    struct EncodeRow<'a, const SUPER_BLOCKS: bool> {
        src: &'a [f32],
        importance: Importance<'a>,
        out: &'a mut [u8],
    }
    impl<const SUPER_BLOCKS: bool> Visitor for EncodeRow<'_, SUPER_BLOCKS> {
        type Output = Result<(), QuantError>;
        fn block<F: BlockFormat>(self) -> Self::Output {
            if !SUPER_BLOCKS && F::GROUPS > 1 {
                return Err(QuantError::Unsupported { format: F::ID, what: "encode, as one group," });
            }
            match F::ENCODE {
                Encode::No => return Err(QuantError::Unsupported { format: F::ID, what: "encode" }),
                Encode::WithImportance if self.importance.is_none() => {
                    return Err(QuantError::NeedsImportance { format: F::ID });
                }
                _ => {}
            }
            let out = bytemuck::cast_slice_mut(self.out);
            if SUPER_BLOCKS {
                F::encode_row(self.src, self.importance, out)
            } else {
                F::encode_row_fast(self.src, out)
            }
            Ok(())
        }
        fn float<F: FloatFormat>(self) -> Self::Output {
            for (value, out) in self.src.iter().zip(self.out.chunks_exact_mut(size_of::<F>())) {
                out.copy_from_slice(bytemuck::bytes_of(&F::from_f32(*value)));
            }
            Ok(())
        }
    }
    check(format, src.len(), out.len())?;
    if let Some(importance) = importance
        && importance.len() != src.len()
    {
        return Err(QuantError::ImportanceLength { expected: src.len(), got: importance.len() });
    }
    with_format(format, EncodeRow::<SUPER_BLOCKS> { src, importance, out })
        .unwrap_or(Err(QuantError::Unsupported { format, what: "encode" }))
}
