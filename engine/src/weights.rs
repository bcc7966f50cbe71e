//! The model's weights: names, formats and shapes, and the bytes they lie in. Nothing is copied.

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;

use quant::FormatId;

use crate::error::EngineError;

/// Bytes of a model file: a mapping, a boot module, a vector.
pub trait ByteSource: Send + Sync {
    /// All bytes; the same slice at every call.
    fn bytes(&self) -> &[u8];

    /// Copies bytes from `offset` on, all of them there: by a shorter way than through the slice, if there is one.
    fn read(&self, offset: usize, to: &mut [u8]) -> Result<(), EngineError> {
        to.copy_from_slice(&self.bytes()[offset..][..to.len()]);
        Ok(())
    }
}

impl ByteSource for Vec<u8> {
    fn bytes(&self) -> &[u8] {
        self
    }
}

impl ByteSource for &'static [u8] {
    fn bytes(&self) -> &[u8] {
        self
    }
}

/// One weight.
#[derive(Clone, Debug)]
pub struct Weight {
    /// Name in the file.
    pub name: String,
    /// Element format.
    pub format: FormatId,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    source: usize,
    offset: usize,
    len_bytes: usize,
}

impl Weight {
    /// Rows: the product of all extents but the innermost.
    pub fn rows(&self) -> usize {
        self.shape[..self.shape.len() - 1].iter().product()
    }

    /// Elements of a row.
    pub fn cols(&self) -> usize {
        *self.shape.last().expect("a weight has a shape")
    }

    /// Bytes of a row.
    pub fn row_bytes(&self) -> usize {
        self.len_bytes / self.rows()
    }

    /// Bytes in the file.
    pub fn len_bytes(&self) -> usize {
        self.len_bytes
    }
}

/// All weights that a model uses.
#[derive(Default)]
pub struct Weights {
    sources: Vec<Arc<dyn ByteSource>>,
    list: Vec<Weight>,
    by_name: BTreeMap<String, u32>,
}

impl Weights {
    /// No weights yet, over these files.
    pub fn new(sources: Vec<Arc<dyn ByteSource>>) -> Weights {
        Weights { sources, ..Weights::default() }
    }

    /// Adds a weight that lies in `sources[source]` at `offset`; the range was checked by the GGUF reader.
    pub fn insert(
        &mut self,
        name: &str,
        format: FormatId,
        shape: Vec<usize>,
        source: usize,
        offset: usize,
        len_bytes: usize,
    ) {
        assert!(offset + len_bytes <= self.sources[source].bytes().len(), "{name}: outside its file");
        let id = self.list.len() as u32;
        self.list.push(Weight { name: String::from(name), format, shape, source, offset, len_bytes });
        self.by_name.insert(String::from(name), id);
    }

    /// Index of a weight.
    pub fn id(&self, name: &str) -> Option<u32> {
        self.by_name.get(name).copied()
    }

    /// A weight by index.
    pub fn get(&self, id: u32) -> &Weight {
        &self.list[id as usize]
    }

    /// All weights in the order they were added.
    pub fn iter(&self) -> impl Iterator<Item = &Weight> {
        self.list.iter()
    }

    /// The bytes of `rows` rows from `first_row`.
    pub fn row_range(&self, id: u32, first_row: usize, rows: usize) -> &[u8] {
        let w = self.get(id);
        let row = w.row_bytes();
        &self.sources[w.source].bytes()[w.offset + first_row * row..][..rows * row]
    }

    /// Bytes of a weight, counted from its start.
    pub fn bytes(&self, id: u32, bytes: Range<usize>) -> &[u8] {
        let w = self.get(id);
        assert!(bytes.end <= w.len_bytes, "{}: outside the weight", w.name);
        &self.sources[w.source].bytes()[w.offset..][bytes]
    }

    /// Copies bytes of a weight from `offset` on, counted from the weight's start.
    pub fn read(&self, id: u32, offset: usize, to: &mut [u8]) -> Result<(), EngineError> {
        let w = self.get(id);
        assert!(offset + to.len() <= w.len_bytes, "{}: outside the weight", w.name);
        self.sources[w.source].read(w.offset + offset, to)
    }

    /// Where a weight starts: file and offset, for reading them in order.
    pub fn position(&self, id: u32) -> (usize, usize) {
        let w = self.get(id);
        (w.source, w.offset)
    }

    /// Sum of all weights' bytes.
    pub fn total_bytes(&self) -> usize {
        self.list.iter().map(|w| w.len_bytes).sum()
    }

    /// Sum of all weights' elements.
    pub fn total_elems(&self) -> usize {
        self.list.iter().map(|w| w.shape.iter().product::<usize>()).sum()
    }
}
