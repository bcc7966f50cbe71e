//! What a kernel refuses.

use quant::{FormatId, QuantError};

/// Arguments that do not fit together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KernelError {
    /// A buffer is not as long as the shapes say.
    Length {
        /// Function.
        op: &'static str,
        /// Argument.
        what: &'static str,
        /// Elements (bytes for raw bytes) needed.
        expected: usize,
        /// Elements given.
        got: usize,
    },
    /// An index is out of range.
    Index {
        /// Function.
        op: &'static str,
        /// Argument.
        what: &'static str,
        /// Index given.
        got: i64,
        /// Number of things there are.
        bound: usize,
    },
    /// The function cannot work on this format.
    Format {
        /// Function.
        op: &'static str,
        /// Format given.
        format: FormatId,
    },
    /// A row is not whole blocks, or its bytes cannot be read.
    Quant(QuantError),
}

impl core::fmt::Display for KernelError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            KernelError::Length { op, what, expected, got } => {
                write!(f, "{op}: {what} has length {got}, expected {expected}")
            }
            KernelError::Index { op, what, got, bound } => {
                write!(f, "{op}: {what} is {got}, expected 0..{bound}")
            }
            KernelError::Format { op, format } => write!(f, "{op}: format {format} is not supported"),
            KernelError::Quant(e) => e.fmt(f),
        }
    }
}

impl core::error::Error for KernelError {}

impl From<QuantError> for KernelError {
    fn from(e: QuantError) -> Self {
        KernelError::Quant(e)
    }
}

/// `Ok` if a buffer is as long as the shapes say.
pub(super) fn check_len(
    op: &'static str,
    what: &'static str,
    got: usize,
    expected: usize,
) -> Result<(), KernelError> {
    if got == expected { Ok(()) } else { Err(KernelError::Length { op, what, expected, got }) }
}
