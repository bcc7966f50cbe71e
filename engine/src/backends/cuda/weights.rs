//! The model's weights on the device: read once from the mapped file, tiled for the kernels, at fixed addresses.
//!
//! A weight is placed in the form in which graphs use it ([`WeightKey`]): matrices tiled, vectors as they are. Tied
//! embeddings are one matrix, since rows are taken from tiles too. Placing is asked for per graph and does nothing for
//! what is there already.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;

use gpu_kernels::driver::{DriverError, MemKind, StreamId};
use gpu_kernels::launch::DevicePtr;
use gpu_kernels::tile;
use quant::FormatId;

use super::memory::{Device, Memory};
use super::translate::{WeightForm, WeightKey};
use crate::error::EngineError;
use crate::weights::Weights;

/// Alignment of a weight: what the widest bulk copies of tiles ask for, with room to spare.
const ALIGN: usize = 256;

/// Weights on a device.
pub struct DeviceWeights {
    source: Arc<Weights>,
    device: Device,
    placed: BTreeMap<WeightKey, DevicePtr>,
    memory: Vec<Memory>,
}

/// How far loading has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of the file that are on the device.
    pub done_bytes: usize,
    /// Bytes of the file in all.
    pub total_bytes: usize,
}

impl DeviceWeights {
    /// Nothing placed yet.
    pub fn new(device: Device, source: Arc<Weights>) -> DeviceWeights {
        DeviceWeights { source, device, placed: BTreeMap::new(), memory: Vec::new() }
    }

    /// The address of a weight that was placed.
    pub fn at(&self, key: WeightKey) -> DevicePtr {
        self.placed[&key]
    }

    /// A vector's values.
    pub fn floats(&self, key: WeightKey) -> Vec<f32> {
        let raw = self.source.row_range(key.weight, key.first_row, key.rows);
        raw.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }

    /// Bytes of device memory in use.
    pub fn bytes(&self) -> usize {
        self.memory.iter().map(Memory::bytes).sum()
    }

    /// Bytes that a weight takes on the device.
    pub fn device_bytes(source: &Weights, key: WeightKey) -> usize {
        let w = source.get(key.weight);
        let bytes = match key.form {
            WeightForm::Plain => w.row_bytes() * key.rows,
            WeightForm::Tiled { n_expert } => {
                n_expert * tile::matrix_bytes(w.format, key.rows / n_expert, w.cols())
            }
        };
        bytes.next_multiple_of(ALIGN)
    }

    /// Places every weight that is not there yet.
    pub fn place(
        &mut self,
        keys: &[WeightKey],
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(), EngineError> {
        let mut missing: Vec<WeightKey> =
            keys.iter().copied().filter(|key| !self.placed.contains_key(key)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        // In the order of the file, so that it is read from front to back.
        missing.sort_by_key(|key| (self.source.position(key.weight), key.first_row));
        let bytes = missing.iter().map(|key| Self::device_bytes(&self.source, *key)).sum();
        let memory = Memory::new(&self.device, MemKind::Device, bytes)?;
        let mut at = memory.at();
        let mut placed = Vec::with_capacity(missing.len());
        let file_bytes = |key: &WeightKey| self.source.get(key.weight).row_bytes() * key.rows;
        let mut state = Progress { done_bytes: 0, total_bytes: missing.iter().map(file_bytes).sum() };
        for key in missing {
            self.upload(key, at)?;
            placed.push((key, at));
            at = at.offset(Self::device_bytes(&self.source, key) as u64);
            state.done_bytes += file_bytes(&key);
            progress(state);
        }
        self.device.synchronise(StreamId::DEFAULT)?;
        self.placed.extend(placed);
        self.memory.push(memory);
        Ok(())
    }

    fn upload(&self, key: WeightKey, at: DevicePtr) -> Result<(), DriverError> {
        let w = self.source.get(key.weight);
        let raw = self.source.row_range(key.weight, key.first_row, key.rows);
        let WeightForm::Tiled { n_expert } = key.form else {
            return self.device.write(at, raw, StreamId::DEFAULT);
        };
        let rows = key.rows / n_expert;
        let matrix_bytes = tile::matrix_bytes(w.format, rows, w.cols());
        for e in 0..n_expert {
            let raw = &raw[e * rows * w.row_bytes()..][..rows * w.row_bytes()];
            let tiles = tile::pack(w.format, raw, rows, w.cols());
            self.device.write(at.offset((e * matrix_bytes) as u64), &tiles, StreamId::DEFAULT)?;
        }
        Ok(())
    }
}

/// Whether a weight of this format can be tiled.
pub fn can_tile(format: FormatId) -> bool {
    quant::info(format).elems >= 32 || matches!(format, FormatId::F32 | FormatId::F16 | FormatId::BF16)
}
