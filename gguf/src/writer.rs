//! Writes what [`crate::Gguf`] reads. The header is made in memory; the data is the caller's to stream:
//! [`Writer::header_bytes`], then for each tensor in order its data and [`Writer::padding`] zeros.
//!
//! Tensors follow one another in the order added, each aligned, and the last is padded too: what llama.cpp and its
//! Python package write, byte for byte.

use alloc::collections::BTreeSet;
use alloc::string::String;
use alloc::vec::Vec;

use quant::FormatId;

use crate::error::{GgufError, TensorProblem};
use crate::file::{Gguf, check_alignment};
use crate::kv::Value;
use crate::limits::{self, ALIGNMENT_KEY, DEFAULT_ALIGNMENT};
use crate::raw::{Encode, Endian};
use crate::tensor_info::TensorInfo;

/// A file to be.
#[derive(Clone, Debug)]
pub struct Writer {
    version: u32,
    endian: Endian,
    alignment: u32,
    /// Key, and type and value as bytes.
    kvs: Vec<(String, Vec<u8>)>,
    /// The keys of `kvs`: a file may have a million.
    keys: BTreeSet<String>,
    /// Entries of the tensor list, as bytes.
    tensors: Vec<Vec<u8>>,
    names: BTreeSet<String>,
    data_bytes: u64,
}

impl Default for Writer {
    /// Version 3, little endian: what everybody reads.
    fn default() -> Self {
        Self::empty(3, Endian::Little)
    }
}

impl Writer {
    /// A file of this version (2 or 3) and byte order. The alignment is 32, or what `general.alignment` is set to.
    pub fn new(version: u32, endian: Endian) -> Result<Self, GgufError> {
        match version {
            2 | 3 => Ok(Self::empty(version, endian)),
            got => Err(GgufError::UnsupportedVersion { got }),
        }
    }

    fn empty(version: u32, endian: Endian) -> Self {
        Writer {
            version,
            endian,
            alignment: DEFAULT_ALIGNMENT,
            kvs: Vec::new(),
            keys: BTreeSet::new(),
            tensors: Vec::new(),
            names: BTreeSet::new(),
            data_bytes: 0,
        }
    }

    /// A file like `gguf`, with its metadata and no tensors yet.
    pub fn like(gguf: &Gguf<'_>) -> Result<Self, GgufError> {
        let mut writer = Self::empty(gguf.version(), gguf.endian());
        for (key, value) in gguf.kvs() {
            writer.kv(key, value)?;
        }
        Ok(writer)
    }

    /// Appends a value. A key that is there already is an error; see [`Self::set`].
    pub fn kv<'v>(&mut self, key: &str, value: impl Into<Value<'v>>) -> Result<(), GgufError> {
        if self.keys.contains(key) {
            return Err(GgufError::DuplicateKey { key: key.into(), offset: 0 });
        }
        self.set(key, value)
    }

    /// Appends a value and drops an earlier one of the same key: an overwritten key moves to the end, as in ggml, so
    /// that a file made here can equal one made there.
    ///
    /// `general.alignment` has to come before the first tensor.
    pub fn set<'v>(&mut self, key: &str, value: impl Into<Value<'v>>) -> Result<(), GgufError> {
        let value = value.into();
        check_name(key, limits::MAX_KEY_BYTES, "a key")?;
        if key == ALIGNMENT_KEY {
            self.alignment = match value {
                Value::U32(got) if !self.tensors.is_empty() => return Err(GgufError::Alignment { got }),
                Value::U32(alignment) => check_alignment(alignment)?,
                other => {
                    return Err(GgufError::WrongType {
                        key: key.into(),
                        expected: "u32",
                        found: other.type_name(),
                    });
                }
            };
        }
        let mut bytes = Vec::new();
        (value.value_type() as u32).encode(self.endian, &mut bytes);
        value.encode(self.endian, &mut bytes)?;
        if !self.keys.insert(key.into()) {
            self.kvs.retain(|(have, _)| have != key);
        }
        self.kvs.push((key.into(), bytes));
        Ok(())
    }

    /// Drops a value; whether it was there. The alignment stays what it is once there are tensors.
    pub fn remove(&mut self, key: &str) -> bool {
        if key == ALIGNMENT_KEY {
            if !self.tensors.is_empty() {
                return false;
            }
            self.alignment = DEFAULT_ALIGNMENT;
        }
        let was_there = self.keys.remove(key);
        if was_there {
            self.kvs.retain(|(have, _)| have != key);
        }
        was_there
    }

    /// Appends a tensor: `ne` is innermost first, as in [`TensorInfo::ne`]. Returns the bytes its data will have.
    pub fn tensor(&mut self, name: &str, format: FormatId, ne: &[u64]) -> Result<u64, GgufError> {
        check_name(name, limits::MAX_TENSOR_NAME_BYTES, "a tensor name")?;
        let error = |problem| GgufError::Tensor { tensor: name.into(), offset: 0, problem };
        let tensor = TensorInfo::checked(name, format, ne, 0).map_err(error)?;
        let n_bytes = tensor.n_bytes();
        let data_bytes = n_bytes
            .checked_next_multiple_of(self.alignment.into())
            .and_then(|padded| self.data_bytes.checked_add(padded))
            .ok_or_else(|| {
                let available = u64::MAX - self.data_bytes;
                error(TensorProblem::OutOfFile { begin: self.data_bytes, n_bytes, available })
            })?;
        if !self.names.insert(name.into()) {
            return Err(error(TensorProblem::Duplicate));
        }
        let mut entry = Vec::new();
        tensor.encode(self.data_bytes, self.endian, &mut entry);
        self.tensors.push(entry);
        self.data_bytes = data_bytes;
        Ok(n_bytes)
    }

    /// The alignment of tensor data.
    pub fn alignment(&self) -> u32 {
        self.alignment
    }

    /// Zeros to write after `n_bytes` bytes of a tensor's data: fewer than the alignment.
    pub fn padding(&self, n_bytes: u64) -> u64 {
        n_bytes.wrapping_neg() % u64::from(self.alignment)
    }

    /// Bytes that follow the header: all data and its padding.
    pub fn data_bytes(&self) -> u64 {
        self.data_bytes
    }

    /// Everything before the data, padded to the alignment.
    pub fn header_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(b"GGUF");
        self.version.encode(self.endian, &mut out);
        (self.tensors.len() as u64).encode(self.endian, &mut out);
        (self.kvs.len() as u64).encode(self.endian, &mut out);
        for (key, value) in &self.kvs {
            key.as_bytes().encode(self.endian, &mut out);
            out.extend_from_slice(value);
        }
        self.tensors.iter().for_each(|entry| out.extend_from_slice(entry));
        out.resize(out.len() + self.padding(out.len() as u64) as usize, 0);
        out
    }
}

fn check_name(name: &str, max: u64, what: &'static str) -> Result<(), GgufError> {
    let got = name.len() as u64;
    if name.is_empty() {
        return Err(GgufError::Empty { what, offset: 0 });
    }
    if got > max {
        return Err(GgufError::TooLarge { what, offset: 0, max, got });
    }
    Ok(())
}
