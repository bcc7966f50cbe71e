//! The validated view of a file: [`Gguf::parse`] and everything one can ask after it.
//!
//! After `parse`, every metadata value decodes, every tensor's data lies inside the file, aligned and apart from all
//! others, and keys and tensor names are unique. Lookups are binary searches in indices sorted once.

use alloc::borrow::Cow;
use alloc::string::String;
use alloc::vec::Vec;

use crate::error::{GgufError, TensorProblem};
use crate::kv::{ArrayView, Number, Value, convert};
use crate::limits::{self, ALIGNMENT_KEY, DEFAULT_ALIGNMENT, KV_MIN_BYTES, TENSOR_MIN_BYTES};
use crate::raw::{Endian, Reader};
use crate::tensor_info::TensorInfo;

/// A parsed file, borrowing its bytes.
#[derive(Clone)]
pub struct Gguf<'a> {
    bytes: &'a [u8],
    endian: Endian,
    version: u32,
    alignment: u32,
    data_offset: u64,
    /// Where each key-value pair starts, in file order. 4 bytes each for the allocation bound (`limits.rs`).
    kvs: Vec<u32>,
    /// The same, sorted by key.
    kvs_by_key: Vec<u32>,
    tensors: Vec<TensorInfo<'a>>,
    /// Places in `tensors`, sorted by name.
    tensors_by_name: Vec<u32>,
}

impl<'a> Gguf<'a> {
    /// Checks the whole structure of `bytes`: everything but the weights themselves.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, GgufError> {
        let (version, endian) = read_version(bytes)?;
        let mut reader = Reader::at(bytes, 8, endian);
        let n_tensors = reader.count(TENSOR_MIN_BYTES, "number of tensors")?;
        let n_kvs = reader.count(KV_MIN_BYTES, "number of key-value pairs")?;

        let kvs = read_kvs(&mut reader, n_kvs)?;
        let mut gguf = Gguf {
            bytes,
            endian,
            version,
            alignment: DEFAULT_ALIGNMENT,
            data_offset: 0,
            kvs_by_key: kvs.clone(),
            kvs,
            tensors: Vec::new(),
            tensors_by_name: Vec::new(),
        };
        gguf.index_kvs()?;
        gguf.alignment = gguf.read_alignment()?;
        gguf.read_tensors(reader, n_tensors)?;
        Ok(gguf)
    }

    /// 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Byte order of the metadata and of the tensors' data; see [`crate::swap_plain`].
    pub fn endian(&self) -> Endian {
        self.endian
    }

    /// Alignment of tensor data: a power of two.
    pub fn alignment(&self) -> u32 {
        self.alignment
    }

    /// Where the data section starts: the end of the metadata, aligned if there are tensors.
    pub fn data_offset(&self) -> u64 {
        self.data_offset
    }

    /// All metadata, in file order.
    pub fn kvs(&self) -> impl Iterator<Item = (&'a str, Value<'a>)> + '_ {
        // Drops none: `parse` read each without error.
        self.kvs.iter().filter_map(|&at| self.read_kv(at).ok())
    }

    /// Number of key-value pairs.
    pub fn n_kvs(&self) -> usize {
        self.kvs.len()
    }

    /// The value with this key.
    pub fn get(&self, key: &str) -> Option<Value<'a>> {
        Some(self.read_kv(self.find_kv(key)?).ok()?.1)
    }

    /// The tensors, in file order.
    pub fn tensors(&self) -> &[TensorInfo<'a>] {
        &self.tensors
    }

    /// The tensor with this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo<'a>> {
        self.tensor_index(name).map(|i| &self.tensors[i])
    }

    /// The place in [`Self::tensors`] of the tensor with this name.
    pub fn tensor_index(&self, name: &str) -> Option<usize> {
        let by_name = &self.tensors_by_name;
        let place = by_name.binary_search_by(|&i| self.tensors[i as usize].name.cmp(name)).ok()?;
        Some(by_name[place] as usize)
    }

    /// The data of a tensor of this file, in the file's byte order.
    ///
    /// # Panics
    /// If `tensor` is of another, longer file.
    pub fn data(&self, tensor: &TensorInfo<'_>) -> &'a [u8] {
        &self.bytes[tensor.offset as usize..tensor.end() as usize]
    }

    fn find_kv(&self, key: &str) -> Option<u32> {
        let by_key = &self.kvs_by_key;
        let place = by_key.binary_search_by(|&at| self.key_bytes(at).cmp(key.as_bytes())).ok()?;
        Some(by_key[place])
    }

    fn read_kv(&self, at: u32) -> Result<(&'a str, Value<'a>), GgufError> {
        let mut reader = Reader::at(self.bytes, at as usize, self.endian);
        let key = reader.name(limits::MAX_KEY_BYTES, "a key")?;
        Ok((key, Value::read(&mut reader, key)?))
    }

    fn key_bytes(&self, at: u32) -> &'a [u8] {
        Reader::at(self.bytes, at as usize, self.endian).string("a key").unwrap_or(&[])
    }

    fn index_kvs(&mut self) -> Result<(), GgufError> {
        let mut by_key = core::mem::take(&mut self.kvs_by_key);
        by_key.sort_unstable_by(|&a, &b| (self.key_bytes(a), a).cmp(&(self.key_bytes(b), b)));
        if let Some(pair) = by_key.windows(2).find(|p| self.key_bytes(p[0]) == self.key_bytes(p[1])) {
            let (key, _) = self.read_kv(pair[1])?;
            return Err(GgufError::DuplicateKey { key: key.into(), offset: pair[1].into() });
        }
        self.kvs_by_key = by_key;
        Ok(())
    }

    fn read_alignment(&self) -> Result<u32, GgufError> {
        match self.get(ALIGNMENT_KEY) {
            None => Ok(DEFAULT_ALIGNMENT),
            Some(Value::U32(alignment)) => check_alignment(alignment),
            Some(other) => Err(GgufError::WrongType {
                key: ALIGNMENT_KEY.into(),
                expected: "u32",
                found: other.type_name(),
            }),
        }
    }

    /// Two passes: the first checks each entry and that the file has room for all of them, the second stores them in
    /// vectors of the final size. So nothing is allocated for tensors that cannot be there.
    fn read_tensors(&mut self, start: Reader<'a>, n_tensors: u64) -> Result<(), GgufError> {
        let mut reader = start;
        let file_bytes = self.bytes.len() as u64;
        let mut total_bytes = 0u64;
        for _ in 0..n_tensors {
            let entry = reader.pos();
            let tensor = TensorInfo::read(&mut reader)?;
            let n_bytes = tensor.n_bytes();
            if n_bytes > file_bytes {
                let problem =
                    TensorProblem::OutOfFile { begin: tensor.offset, n_bytes, available: file_bytes };
                return Err(tensor.error(entry, problem));
            }
            total_bytes = total_bytes.saturating_add(n_bytes);
        }
        metadata_offset(reader.pos())?;
        self.data_offset = reader.pos();
        if n_tensors == 0 {
            return Ok(());
        }

        // Both terms are below 2^32.
        self.data_offset = reader.pos().next_multiple_of(self.alignment.into());
        let available = file_bytes.saturating_sub(self.data_offset);
        if total_bytes > available {
            return Err(GgufError::DataTruncated {
                offset: self.data_offset,
                expected: total_bytes,
                got: available,
            });
        }

        // `n_tensors` fits: each took bytes of a slice below 2^32.
        self.tensors.reserve_exact(n_tensors as usize);
        reader = start;
        for _ in 0..n_tensors {
            let entry = reader.pos();
            let mut tensor = TensorInfo::read(&mut reader)?;
            let (begin, n_bytes, alignment) = (tensor.offset, tensor.n_bytes(), u64::from(self.alignment));
            if begin % alignment != 0 {
                return Err(tensor.error(entry, TensorProblem::Misaligned { alignment, got: begin }));
            }
            if begin.checked_add(n_bytes).is_none_or(|end| end > available) {
                return Err(tensor.error(entry, TensorProblem::OutOfFile { begin, n_bytes, available }));
            }
            tensor.offset = self.data_offset + begin;
            self.tensors.push(tensor);
        }
        self.index_tensors(start)
    }

    /// One index, sorted first by offset to find overlaps, then by name to find duplicates and to stay.
    fn index_tensors(&mut self, start: Reader<'a>) -> Result<(), GgufError> {
        let tensors = &self.tensors;
        let at = |i: u32| &tensors[i as usize];
        let error = |i: u32, problem| {
            let mut reader = start;
            for _ in 0..i {
                TensorInfo::read(&mut reader)?;
            }
            Err(at(i).error(reader.pos(), problem))
        };
        let mut index = Vec::with_capacity(tensors.len());
        index.extend(0..tensors.len() as u32);

        index.sort_unstable_by_key(|&i| (at(i).offset, i));
        if let Some(pair) = index.windows(2).find(|p| at(p[0]).end() > at(p[1]).offset) {
            let (first, second) = (at(pair[0]), at(pair[1]));
            return error(pair[1], TensorProblem::Overlap { begin: second.offset, other_end: first.end() });
        }
        index.sort_unstable_by_key(|&i| (at(i).name, i));
        if let Some(pair) = index.windows(2).find(|p| at(p[0]).name == at(p[1]).name) {
            return error(pair[1], TensorProblem::Duplicate);
        }
        self.tensors_by_name = index;
        Ok(())
    }
}

/// Typed questions. Without `opt_`, a missing key is an error that names it; integers of any width convert if they fit.
impl<'a> Gguf<'a> {
    /// A number or boolean.
    pub fn number<T: Number>(&self, key: &str) -> Result<T, GgufError> {
        required(key, self.opt_number(key)?)
    }

    /// A number or boolean, if the key is there.
    pub fn opt_number<T: Number>(&self, key: &str) -> Result<Option<T>, GgufError> {
        self.get(key).map(|value| convert(key, &value)).transpose()
    }

    /// A string that must be UTF-8. For bytes, ask [`Self::get`].
    pub fn str(&self, key: &str) -> Result<&'a str, GgufError> {
        required(key, self.opt_str(key)?)
    }

    /// A string, if the key is there.
    pub fn opt_str(&self, key: &str) -> Result<Option<&'a str>, GgufError> {
        let Some(at) = self.find_kv(key) else { return Ok(None) };
        match self.read_kv(at)?.1 {
            Value::Str(bytes) => core::str::from_utf8(bytes).map(Some).map_err(|e| {
                // Before the bytes: the key and its length, the type, the string's length.
                let start = at as usize + 8 + key.len() + 4 + 8;
                GgufError::NotUtf8 { what: key.into(), offset: (start + e.valid_up_to()) as u64 }
            }),
            other => Err(wrong_type(key, "str", &other)),
        }
    }

    /// A string for people, if the key is there: what is no UTF-8 in it is U+FFFD, and no error.
    pub fn opt_text(&self, key: &str) -> Result<Option<Cow<'a, str>>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Str(bytes)) => Ok(Some(String::from_utf8_lossy(bytes))),
            Some(other) => Err(wrong_type(key, "str", &other)),
        }
    }

    /// An array; its own methods give the elements.
    pub fn array(&self, key: &str) -> Result<ArrayView<'a>, GgufError> {
        required(key, self.opt_array(key)?)
    }

    /// An array, if the key is there.
    pub fn opt_array(&self, key: &str) -> Result<Option<ArrayView<'a>>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(view)) => Ok(Some(view)),
            Some(other) => Err(wrong_type(key, "array", &other)),
        }
    }

    /// [`Self::number`] as u32.
    pub fn u32(&self, key: &str) -> Result<u32, GgufError> {
        self.number(key)
    }

    /// [`Self::opt_number`] as u32.
    pub fn opt_u32(&self, key: &str) -> Result<Option<u32>, GgufError> {
        self.opt_number(key)
    }

    /// [`Self::number`] as u64.
    pub fn u64(&self, key: &str) -> Result<u64, GgufError> {
        self.number(key)
    }

    /// [`Self::opt_number`] as u64.
    pub fn opt_u64(&self, key: &str) -> Result<Option<u64>, GgufError> {
        self.opt_number(key)
    }

    /// [`Self::number`] as f32.
    pub fn f32(&self, key: &str) -> Result<f32, GgufError> {
        self.number(key)
    }

    /// [`Self::opt_number`] as f32.
    pub fn opt_f32(&self, key: &str) -> Result<Option<f32>, GgufError> {
        self.opt_number(key)
    }

    /// A boolean.
    pub fn bool(&self, key: &str) -> Result<bool, GgufError> {
        self.number(key)
    }

    /// A boolean, if the key is there.
    pub fn opt_bool(&self, key: &str) -> Result<Option<bool>, GgufError> {
        self.opt_number(key)
    }
}

impl core::fmt::Debug for Gguf<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Gguf")
            .field("version", &self.version)
            .field("endian", &self.endian)
            .field("n_kvs", &self.kvs.len())
            .field("n_tensors", &self.tensors.len())
            .finish()
    }
}

fn required<T>(key: &str, value: Option<T>) -> Result<T, GgufError> {
    value.ok_or_else(|| GgufError::MissingKey { key: key.into() })
}

fn wrong_type(key: &str, expected: &'static str, value: &Value<'_>) -> GgufError {
    GgufError::WrongType { key: key.into(), expected, found: value.type_name() }
}

pub(crate) fn check_alignment(alignment: u32) -> Result<u32, GgufError> {
    if alignment.is_power_of_two() && alignment <= limits::MAX_ALIGNMENT {
        Ok(alignment)
    } else {
        Err(GgufError::Alignment { got: alignment })
    }
}

/// The version says the byte order: 2 or 3, read in the file's own.
fn read_version(bytes: &[u8]) -> Result<(u32, Endian), GgufError> {
    let mut reader = Reader::at(bytes, 0, Endian::Little);
    let magic = reader.take(4, "the header")?;
    if magic != b"GGUF" {
        let mut got = [0; 4];
        got.copy_from_slice(magic);
        return Err(GgufError::BadMagic { got });
    }
    match reader.number::<u32>("the header")? {
        version @ (2 | 3) => Ok((version, Endian::Little)),
        got if matches!(got.swap_bytes(), 2 | 3) => Ok((got.swap_bytes(), Endian::Big)),
        got => Err(GgufError::UnsupportedVersion { got }),
    }
}

/// Reads and checks every pair; their offsets.
fn read_kvs(reader: &mut Reader<'_>, n_kvs: u64) -> Result<Vec<u32>, GgufError> {
    // Fits: the count was compared with the bytes left.
    let mut kvs = Vec::with_capacity(n_kvs as usize);
    for _ in 0..n_kvs {
        kvs.push(metadata_offset(reader.pos())?);
        let key = reader.name(limits::MAX_KEY_BYTES, "a key")?;
        if let Value::Array(view) = Value::read(reader, key)? {
            reader.take(view.n_bytes()?, "array elements")?;
        }
    }
    Ok(kvs)
}

fn metadata_offset(offset: u64) -> Result<u32, GgufError> {
    u32::try_from(offset).map_err(|_| GgufError::TooLarge {
        what: "size of the metadata",
        offset,
        max: limits::MAX_METADATA_BYTES,
        got: offset,
    })
}
