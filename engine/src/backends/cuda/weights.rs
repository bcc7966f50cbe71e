//! The model's weights on the device: read once from the mapped file, tiled for the kernels, at fixed addresses.
//!
//! A weight is placed in the form in which graphs use it ([`WeightKey`]): matrices tiled, vectors as they are. Tied
//! embeddings are one matrix, since rows are taken from tiles too. Placing is asked for per graph and does nothing for
//! what is there already.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;
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

/// Bytes of the file that are copied at once: long enough that launches, waits and the start of all threads do not count.
/// Measured on an H100 host with 16 threads: pieces of 8 MiB 28 GB/s, of 16 MiB 50, of a bus of 55.
const CHUNK_BYTES: usize = 16 << 20;

/// Bytes that one thread reads at a time.
const PART_BYTES: usize = 256 << 10;

/// Pieces under way: one is copied while threads fill the other. With four of them it was not faster.
const SLOTS: usize = 2;

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
        let total_bytes = missing.iter().map(|key| self.file_bytes(*key).len()).sum();
        let mut state = Progress { done_bytes: 0, total_bytes };
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
        let bytes = self.file_bytes(key);
        let n = bytes.len();
        let (on_device, stream) = self.stage(key.weight, bytes, staging)?;
        self.device.copy(at, on_device, n as u64, stream)?;
        Ok(())
    }

    /// A weight's bytes in the file, counted from the start of the tensor that it is, or is part of.
    fn file_bytes(&self, key: WeightKey) -> Range<usize> {
        let row_bytes = self.source.get(key.weight).row_bytes();
        key.first_row * row_bytes..(key.first_row + key.rows) * row_bytes
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
        let WeightForm::Tiled { n_expert } = key.form else {
            let raw = self.source.row_range(key.weight, key.first_row, key.rows);
            self.device.write(at, raw, StreamId::DEFAULT)?;
            read(raw.len());
            return Ok(());
        };
        // Matrices without padding lie as one, which takes fewer pieces than many small experts.
        let one = (key.rows / n_expert).is_multiple_of(tile::ROWS);
        let n_matrices = if one { 1 } else { n_expert };
        let (n_rows, k, row_bytes) = (key.rows / n_matrices, w.cols(), w.row_bytes());
        let matrix_bytes = tile::matrix_bytes(w.format, n_rows, k);
        // Equal pieces: a short one at the end would take as long to start as the others.
        let n_chunks = (n_rows * row_bytes).div_ceil(CHUNK_BYTES);
        let rows_per_chunk = n_rows.div_ceil(n_chunks).next_multiple_of(tile::ROWS);
        for e in 0..n_matrices {
            let tiles = at.offset((e * matrix_bytes) as u64);
            for start in (0..n_rows).step_by(rows_per_chunk) {
                let rows = start..(start + rows_per_chunk).min(n_rows);
                let first = key.first_row + e * n_rows;
                let bytes = (first + rows.start) * row_bytes..(first + rows.end) * row_bytes;
                let n = bytes.len();
                let (on_device, stream) = self.stage(key.weight, bytes, staging)?;
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
                read(n);
            }
        }
        Ok(())
    }

    /// Queues the copy of some bytes of a weight to the device: where they will be, and the stream on which they are there.
    fn stage(
        &self,
        weight: u32,
        bytes: Range<usize>,
        staging: &mut Staging,
    ) -> Result<(DevicePtr, StreamId), EngineError> {
        let device = &self.device;
        let slot = staging.next(device, bytes.len())?;
        let (host, on_device) = (slot.host.at(), slot.device.at());
        // One core does not read memory as fast as the bus takes it. More parts than threads, since threads are late.
        let n_parts = bytes.len().div_ceil(PART_BYTES);
        let failed = AtomicBool::new(false);
        self.executor.run(n_parts, &|i| {
            let from = i * PART_BYTES;
            let part = PART_BYTES.min(bytes.len() - from);
            if self.read(weight, bytes.start + from, host.offset(from as u64), part).is_err() {
                failed.store(true, Ordering::Relaxed);
            }
        });
        if failed.into_inner() {
            // Once more by one thread: for the error, or for good.
            match self.read(weight, bytes.start, host, bytes.len()) {
                // A driver that lends no memory, such as a remote one, takes the bytes from where they are.
                Err(EngineError::Device(DriverError::Unsupported { .. })) => {
                    let w = self.source.get(weight);
                    let (first, rows) = (bytes.start / w.row_bytes(), bytes.len() / w.row_bytes());
                    device.write_host(host, self.source.row_range(weight, first, rows))?;
                }
                result => result?,
            }
        }
        device.copy(on_device, host, bytes.len() as u64, slot.queue.id)?;
        Ok((on_device, slot.queue.id))
    }

    /// Reads bytes of a weight straight into pinned memory.
    fn read(&self, weight: u32, offset: usize, host: DevicePtr, bytes: usize) -> Result<(), EngineError> {
        let mut result = Ok(());
        self.device.fill_host(host, bytes, &mut |to| result = self.source.read(weight, offset, to))?;
        result
    }
}

/// Pieces on their way to the device: while some are copied and tiled, the host fills another.
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
        for _ in 0..SLOTS {
            let (host, on_device) = (Growing::new(MemKind::Host), Growing::new(MemKind::Device));
            staging.slots.push(StagingSlot { queue: Queue::new(device)?, host, device: on_device });
        }
        Ok(staging)
    }

    /// The slot whose turn it is, with room for a piece, once what used it before is done with it.
    fn next(&mut self, device: &Device, bytes: usize) -> Result<&StagingSlot, DriverError> {
        let slot = &mut self.slots[self.next];
        self.next = (self.next + 1) % SLOTS;
        device.synchronise(slot.queue.id)?;
        // Pieces are all a little less than a chunk: none of them should make room anew, which takes milliseconds.
        let room = bytes.next_power_of_two();
        slot.host.reserve(device, room)?;
        slot.device.reserve(device, room)?;
        Ok(slot)
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
