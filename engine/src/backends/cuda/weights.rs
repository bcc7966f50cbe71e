//! The model's weights on the device: read once from the mapped file, tiled for the kernels, at fixed addresses.
//!
//! A weight is placed in the form in which graphs use it ([`WeightKey`]): matrices tiled, vectors as they are. Tied
//! embeddings are one matrix, since rows are taken from tiles too. Placing is asked for per graph and does nothing for
//! what is there already.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};

use gpu_kernels::driver::{DriverError, MemKind, StreamId};
use gpu_kernels::kernels::repack;
use gpu_kernels::launch::DevicePtr;
use gpu_kernels::modules::Modules;
use gpu_kernels::tile;

use super::memory::{Device, Growing, Memory, Queue};
use super::translate::{WeightForm, WeightKey};
use crate::error::EngineError;
use crate::executor::Executor;
use crate::weights::Weights;

/// Alignment of a weight: what the widest bulk copies of tiles ask for, with room to spare.
const ALIGN: usize = 256;

/// Bytes of the file that are copied at once: long enough that launches and waits do not count.
const CHUNK_BYTES: usize = 16 << 20;

/// Weights on a device.
pub struct DeviceWeights {
    source: Arc<Weights>,
    device: Device,
    executor: Arc<dyn Executor>,
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
    /// Nothing placed yet; `executor` reads the file.
    pub fn new(device: Device, executor: Arc<dyn Executor>, source: Arc<Weights>) -> DeviceWeights {
        DeviceWeights { source, device, executor, placed: BTreeMap::new(), memory: Vec::new() }
    }

    /// Where they come from.
    pub fn source(&self) -> &Weights {
        &self.source
    }

    /// Who helps.
    pub fn executor(&self) -> &dyn Executor {
        &*self.executor
    }

    /// The address of a weight that was placed.
    pub fn at(&self, key: WeightKey) -> DevicePtr {
        self.placed[&key]
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
        modules: &mut Modules,
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
        let mut staging = Staging::new(&self.device)?;
        let result = missing.into_iter().try_for_each(|key| {
            placed.push((key, at));
            let here = at;
            at = at.offset(Self::device_bytes(&self.source, key) as u64);
            self.upload(key, here, &mut staging, modules, &mut |bytes| {
                state.done_bytes += bytes;
                progress(state);
            })
        });
        result?;
        staging.finish(&self.device)?;
        self.device.synchronise(StreamId::DEFAULT)?;
        self.placed.extend(placed);
        self.memory.push(memory);
        Ok(())
    }

    /// Makes a place that is another's a weight's: it counts as placed, whoever fills it.
    pub fn lend(&mut self, key: WeightKey, at: DevicePtr) {
        self.placed.insert(key, at);
    }

    /// Queues the copy of a weight to a place on the staging's streams; nothing else is waited for.
    pub fn bring(
        &self,
        key: WeightKey,
        at: DevicePtr,
        staging: &mut Staging,
        modules: &mut Modules,
    ) -> Result<(), EngineError> {
        if key.form != WeightForm::Plain {
            return self.upload(key, at, staging, modules, &mut |_| {});
        }
        let raw = self.source.row_range(key.weight, key.first_row, key.rows);
        let (on_device, stream) = staging.copy(&self.device, &*self.executor, raw)?;
        self.device.copy(at, on_device, raw.len() as u64, stream)?;
        Ok(())
    }

    /// Copies a weight to where it belongs, tiled on the way. Returns when its bytes in the file are no longer needed.
    fn upload(
        &self,
        key: WeightKey,
        at: DevicePtr,
        staging: &mut Staging,
        modules: &mut Modules,
        read: &mut dyn FnMut(usize),
    ) -> Result<(), EngineError> {
        let w = self.source.get(key.weight);
        let raw = self.source.row_range(key.weight, key.first_row, key.rows);
        let WeightForm::Tiled { n_expert } = key.form else {
            self.device.write(at, raw, StreamId::DEFAULT)?;
            read(raw.len());
            return Ok(());
        };
        let (n_rows, k, row_bytes) = (key.rows / n_expert, w.cols(), w.row_bytes());
        let matrix_bytes = tile::matrix_bytes(w.format, n_rows, k);
        let rows_per_chunk = (CHUNK_BYTES / row_bytes / tile::ROWS * tile::ROWS).max(tile::ROWS);
        for (e, raw) in raw.chunks_exact(n_rows * row_bytes).enumerate() {
            let tiles = at.offset((e * matrix_bytes) as u64);
            for (i, piece) in raw.chunks(rows_per_chunk * row_bytes).enumerate() {
                let start = i * rows_per_chunk;
                let rows = start..(start + rows_per_chunk).min(n_rows);
                let (on_device, stream) = staging.copy(&self.device, &*self.executor, piece)?;
                let launch = repack::launch(&repack::Args {
                    format: w.format,
                    raw: on_device,
                    tiles,
                    n_rows,
                    k,
                    rows,
                })
                .map_err(|e| EngineError::Unsupported { what: format!("weight {}: {e}", w.name) })?;
                modules.launch(&*self.device, &launch, stream)?;
                read(piece.len());
            }
        }
        Ok(())
    }
}

/// Two pieces on their way to the device: while one is copied and tiled, the host fills the other.
pub struct Staging {
    slots: Vec<StagingSlot>,
    next: usize,
}

struct StagingSlot {
    /// First, so that it goes first: it waits for the work that uses the rest.
    queue: Queue,
    host: Growing,
    device: Growing,
}

impl Staging {
    /// Nothing under way.
    pub fn new(device: &Device) -> Result<Staging, DriverError> {
        let mut staging = Staging { slots: Vec::new(), next: 0 };
        for _ in 0..2 {
            let (host, on_device) = (Growing::new(MemKind::Host), Growing::new(MemKind::Device));
            staging.slots.push(StagingSlot { queue: Queue::new(device)?, host, device: on_device });
        }
        Ok(staging)
    }

    /// Queues a piece's copy to the device: where it will be, and the stream on which it is there.
    fn copy(
        &mut self,
        device: &Device,
        executor: &dyn Executor,
        piece: &[u8],
    ) -> Result<(DevicePtr, StreamId), DriverError> {
        let slot = &mut self.slots[self.next];
        self.next = (self.next + 1) % 2;
        // What used the slot before is done with it.
        device.synchronise(slot.queue.id)?;
        slot.host.reserve(device, piece.len())?;
        slot.device.reserve(device, piece.len())?;
        let (host, on_device) = (slot.host.at(), slot.device.at());
        // One core does not read memory as fast as the bus takes it.
        let parts = executor.n_threads().clamp(1, piece.len().div_ceil(1 << 20).max(1));
        let part = piece.len().div_ceil(parts);
        let failed = AtomicBool::new(false);
        executor.run(parts, &|i| {
            let from = &piece[(i * part).min(piece.len())..((i + 1) * part).min(piece.len())];
            if device.write_host(host.offset((i * part) as u64), from).is_err() {
                failed.store(true, Ordering::Relaxed);
            }
        });
        if failed.into_inner() {
            // Once more in one piece, for the error, or for good.
            device.write_host(host, piece)?;
        }
        device.copy(on_device, host, piece.len() as u64, slot.queue.id)?;
        Ok((on_device, slot.queue.id))
    }

    /// The streams that pieces take in turns.
    pub fn streams(&self) -> impl Iterator<Item = StreamId> + '_ {
        self.slots.iter().map(|slot| slot.queue.id)
    }

    /// Waits for everything, and says what went wrong in it.
    pub fn finish(&self, device: &Device) -> Result<(), DriverError> {
        self.slots.iter().try_for_each(|slot| device.synchronise(slot.queue.id))
    }
}
