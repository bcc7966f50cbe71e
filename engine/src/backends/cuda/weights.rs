//! The model's weights on the device: read once from the file, tiled for the kernels, at fixed addresses.
//!
//! A weight is placed in the form in which graphs use it ([`WeightKey`]): matrices tiled, vectors as they are. Tied
//! embeddings are one matrix, because rows can be taken from tiles too. Weights are placed graph by graph; those that are
//! on the device already stay where they are.
//!
//! All weights are cut into pieces, in the order of the file; each is tiled by itself ([`Piece`]). A thread takes the next
//! piece, reads it into pinned memory of its own, and queues its copy and its tiling ([`Staging`]). No thread waits for
//! another one, nor for a weight to be complete.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;
use core::sync::atomic::{AtomicUsize, Ordering};

use gpu_kernels::driver::{DriverError, MemKind, ModuleId};
use gpu_kernels::kernels::repack;
use gpu_kernels::launch::{DevicePtr, Launch};
use gpu_kernels::modules::{FindModule, Modules};
use gpu_kernels::tile;
use spinning_top::Spinlock;

use super::memory::{Device, Mark, Memory, Queue};
use super::translate::{WeightForm, WeightKey};
use crate::error::EngineError;
use crate::executor::Executor;
use crate::weights::Weights;

/// Alignment of a weight: what the widest bulk copies of tiles ask for, with room to spare.
const ALIGN: usize = 256;

/// Least bytes of a piece: long enough that the time of the driver's calls does not matter.
const MIN_PIECE_BYTES: usize = 2 << 20;
/// Most bytes of a piece, used with few threads: they read more slowly than the bus copies, so nothing is gained by
/// shorter pieces.
const MAX_PIECE_BYTES: usize = 16 << 20;

/// Pieces that one thread has under way: one is copied while the thread reads the other.
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

    /// The model's weights in host memory.
    pub fn source(&self) -> &Weights {
        &self.source
    }

    /// The threads that read the file.
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
        progress: &mut (dyn FnMut(Progress) + Send),
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
        let staging = self.staging(&missing)?;
        let mut pieces = Vec::new();
        let mut at = memory.at();
        let mut placed = Vec::with_capacity(missing.len());
        for key in missing {
            self.cut(key, at, &staging, modules, &mut pieces)?;
            placed.push((key, at));
            at = at.offset(Self::device_bytes(&self.source, key) as u64);
        }
        self.send(&pieces, &staging, progress)?;
        staging.finish()?;
        self.placed.extend(placed);
        self.memory.push(memory);
        Ok(())
    }

    /// Sets a weight's address to memory that the caller owns and fills; the weight counts as placed from now on.
    pub fn lend(&mut self, key: WeightKey, at: DevicePtr) {
        self.placed.insert(key, at);
    }

    /// Buffers that these weights go through on their way to the device.
    pub fn staging(&self, keys: &[WeightKey]) -> Result<Staging, DriverError> {
        let sizes =
            keys.iter().map(|key| (self.file_bytes(*key).len(), self.source.get(key.weight).row_bytes()));
        Staging::new(&self.device, Room::new(self.executor.n_threads(), sizes))
    }

    /// Queues copies of weights that have a place already, without waiting for them. [`Staging::marks`] gives the events of
    /// their arrival; after a failure, [`Staging::finish`] waits for what is still under way.
    pub fn bring(
        &self,
        keys: &[WeightKey],
        staging: &Staging,
        modules: &mut Modules,
    ) -> Result<(), EngineError> {
        let mut pieces = Vec::new();
        for &key in keys {
            self.cut(key, self.at(key), staging, modules, &mut pieces)?;
        }
        self.send(&pieces, staging, &mut |_| {})
    }

    /// A weight's bytes in the file, counted from the start of its tensor, of which it may be a part.
    fn file_bytes(&self, key: WeightKey) -> Range<usize> {
        let row_bytes = self.source.get(key.weight).row_bytes();
        key.first_row * row_bytes..(key.first_row + key.rows) * row_bytes
    }

    /// Cuts a weight whose place is `at` into pieces of equal size: a short last piece would cost as many calls as a long one.
    fn cut(
        &self,
        key: WeightKey,
        at: DevicePtr,
        staging: &Staging,
        modules: &mut Modules,
        pieces: &mut Vec<Piece>,
    ) -> Result<(), EngineError> {
        let w = self.source.get(key.weight);
        let WeightForm::Tiled { n_expert } = key.form else {
            let all = self.file_bytes(key);
            for start in all.clone().step_by(staging.piece_bytes) {
                let bytes = start..(start + staging.piece_bytes).min(all.end);
                let to = at.offset((start - all.start) as u64);
                pieces.push(Piece { weight: key.weight, bytes, to: Target::Plain(to) });
            }
            return Ok(());
        };
        // Experts whose rows fill whole tiles lie like one matrix; cutting them as one gives fewer pieces.
        let one = (key.rows / n_expert).is_multiple_of(tile::ROWS);
        let n_matrices = if one { 1 } else { n_expert };
        let (n_rows, k, row_bytes) = (key.rows / n_matrices, w.cols(), w.row_bytes());
        let matrix_bytes = tile::matrix_bytes(w.format, n_rows, k);
        let most_rows = (staging.piece_bytes / (tile::ROWS * row_bytes)).max(1) * tile::ROWS;
        let rows_per_piece = n_rows.div_ceil(n_rows.div_ceil(most_rows)).next_multiple_of(tile::ROWS);
        let mut module = None;
        for e in 0..n_matrices {
            let tiles = at.offset((e * matrix_bytes) as u64);
            for start in (0..n_rows).step_by(rows_per_piece) {
                let rows = start..(start + rows_per_piece).min(n_rows);
                let first = key.first_row + e * n_rows;
                let bytes = (first + rows.start) * row_bytes..(first + rows.end) * row_bytes;
                let args = repack::Args { format: w.format, raw: DevicePtr::NULL, tiles, n_rows, k, rows };
                let module = match module {
                    Some(module) => module,
                    None => {
                        let entry = self.repack(key.weight, &args)?.entry;
                        *module.insert(modules.find_module(&*self.device, entry)?)
                    }
                };
                pieces.push(Piece { weight: key.weight, bytes, to: Target::Tiles(module, args) });
            }
        }
        Ok(())
    }

    /// The launch that tiles a piece.
    fn repack(&self, weight: u32, args: &repack::Args) -> Result<Launch, EngineError> {
        let name = || &self.source.get(weight).name;
        repack::launch(args).map_err(|e| EngineError::Unsupported { what: format!("weight {}: {e}", name()) })
    }

    /// Sends all pieces; each thread takes the next one whenever it is free. Returns when all bytes have been read. After a
    /// failure no thread begins another piece.
    fn send(
        &self,
        pieces: &[Piece],
        staging: &Staging,
        progress: &mut (dyn FnMut(Progress) + Send),
    ) -> Result<(), EngineError> {
        let total_bytes = pieces.iter().map(|piece| piece.bytes.len()).sum();
        let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let failure = Spinlock::new(None);
        let progress = Spinlock::new(progress);
        self.executor.run(staging.lanes.len().min(pieces.len()), &|lane| {
            let mut lane = staging.lanes[lane].lock();
            while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                let sent = lane.next(staging).map_err(EngineError::from);
                if let Err(error) = sent.and_then(|slot| self.send_piece(piece, slot)) {
                    next.store(pieces.len(), Ordering::Relaxed);
                    failure.lock().get_or_insert(error);
                    break;
                }
                done.fetch_add(piece.bytes.len(), Ordering::Relaxed);
                // If another thread is reporting, the next report will include this piece.
                if let Some(mut progress) = progress.try_lock() {
                    progress(Progress { done_bytes: done.load(Ordering::Relaxed), total_bytes });
                }
            }
        });
        match failure.into_inner() {
            Some(error) => Err(error),
            None => {
                (progress.into_inner())(Progress { done_bytes: total_bytes, total_bytes });
                Ok(())
            }
        }
    }

    /// Reads a piece and queues its copy and its tiling.
    fn send_piece(&self, piece: &Piece, slot: &Slot) -> Result<(), EngineError> {
        let (device, n) = (&self.device, piece.bytes.len() as u64);
        let &Slot { host, raw, ref queue, .. } = slot;
        self.read(piece, host)?;
        match &piece.to {
            Target::Plain(to) => device.copy(*to, host, n, queue.id)?,
            Target::Tiles(module, args) => {
                device.copy(raw, host, n, queue.id)?;
                let launch = self.repack(piece.weight, &repack::Args { raw, ..args.clone() })?;
                device.launch(*module, &launch, queue.id)?;
            }
        }
        Ok(())
    }

    /// Reads a piece straight into pinned memory.
    fn read(&self, piece: &Piece, host: DevicePtr) -> Result<(), EngineError> {
        let Piece { weight, bytes, .. } = piece;
        let mut result = Ok(());
        match self.device.fill_host(host, bytes.len(), &mut |to| {
            result = self.source.read(*weight, bytes.start, to);
        }) {
            // A driver that lends no memory, such as a remote one, takes the bytes from where they are.
            Err(DriverError::Unsupported { .. }) => {
                self.device.write_host(host, self.source.bytes(*weight, bytes.clone()))?;
            }
            filled => filled?,
        }
        result
    }
}

/// A part of a weight that goes to the device by itself, in any order with the others.
struct Piece {
    weight: u32,
    /// Bytes of the weight.
    bytes: Range<usize>,
    to: Target,
}

/// What becomes of a piece on the device.
enum Target {
    /// It is stored as it is in the file.
    Plain(DevicePtr),
    /// This module's kernel makes whole row tiles of it. The arguments lack the address of the piece before it is tiled, which
    /// is known once a thread sends it.
    Tiles(ModuleId, repack::Args),
}

/// Buffers and streams for pieces on their way to the device: each thread has a lane of its own.
///
/// All slots are made before the first is used: while copies are under way, the driver makes calls wait that pin memory or
/// create streams.
pub struct Staging {
    device: Device,
    // The first field, so that it is dropped first: dropping a stream waits for the work that uses the memory below.
    lanes: Vec<Spinlock<Lane>>,
    _host: Memory,
    _raw: Memory,
    piece_bytes: usize,
    /// Pieces are copied after this event.
    start: Option<Mark>,
    /// How often `start` was set.
    turn: u64,
}

/// What a thread has under way.
struct Lane {
    slots: [Slot; SLOTS],
    next: usize,
}

struct Slot {
    queue: Queue,
    /// Pinned room for a piece, and the device's.
    host: DevicePtr,
    raw: DevicePtr,
    /// The [`Staging::turn`] whose start this slot's stream has waited for.
    turn: u64,
    /// Whether it was used since [`Staging::marks`] was called last.
    used: bool,
}

/// Sizes of a [`Staging`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Room {
    n_lanes: usize,
    /// Bytes of a piece, unless one row tile is longer.
    piece_bytes: usize,
    /// Bytes of a slot.
    slot_bytes: usize,
}

impl Room {
    /// For weights of these sizes, (bytes, bytes of a row) each, read by `n_threads` threads.
    fn new(n_threads: usize, sizes: impl Iterator<Item = (usize, usize)>) -> Room {
        let (mut total, mut longest, mut row_tile) = (0, 1, 0);
        sizes.for_each(|(bytes, row_bytes)| {
            (total, longest) = (total + bytes, longest.max(bytes));
            row_tile = row_tile.max(bytes.min(tile::ROWS * row_bytes));
        });
        let piece_bytes =
            (2 * MAX_PIECE_BYTES / n_threads).clamp(MIN_PIECE_BYTES, MAX_PIECE_BYTES).min(longest);
        // Each of n threads reads its share at some 5 GB/s, and before that all their slots must be pinned, at some 6 GB/s.
        // That takes total / (5 n) + 2 n piece / 6; it is least for about this n.
        let n_lanes = (total / (2 * piece_bytes)).isqrt().clamp(1, n_threads);
        Room { n_lanes, piece_bytes, slot_bytes: piece_bytes.max(row_tile).next_multiple_of(ALIGN) }
    }
}

impl Staging {
    /// Makes all slots.
    fn new(device: &Device, room: Room) -> Result<Staging, DriverError> {
        let Room { n_lanes, piece_bytes, slot_bytes } = room;
        let bytes = n_lanes * SLOTS * slot_bytes;
        let host = Memory::new(device, MemKind::Host, bytes)?;
        let raw = Memory::new(device, MemKind::Device, bytes)?;
        let slot = |nth: usize| {
            let [host, raw] = [&host, &raw].map(|memory| memory.at().offset((nth * slot_bytes) as u64));
            Ok(Slot { queue: Queue::new(device)?, host, raw, turn: 0, used: false })
        };
        let lane = |lane| {
            let slots = [slot(SLOTS * lane)?, slot(SLOTS * lane + 1)?];
            Ok(Spinlock::new(Lane { slots, next: 0 }))
        };
        let lanes = (0..n_lanes).map(lane).collect::<Result<_, DriverError>>()?;
        let device = device.clone();
        Ok(Staging { device, lanes, _host: host, _raw: raw, piece_bytes, start: None, turn: 0 })
    }

    /// From now on pieces are copied after this event.
    pub fn after(&mut self, start: Mark) {
        self.start = Some(start);
        self.turn += 1;
    }

    /// Events that mark the end of all that was staged since this was called last.
    pub fn marks(&mut self) -> Result<Vec<Mark>, DriverError> {
        let slots = self.lanes.iter_mut().flat_map(|lane| &mut lane.get_mut().slots);
        let used = slots.filter_map(|slot| core::mem::take(&mut slot.used).then_some(&slot.queue));
        used.map(|queue| Mark::on(&self.device, queue.id)).collect()
    }

    /// Waits for everything under way; an error if something of it failed.
    pub fn finish(&self) -> Result<(), DriverError> {
        self.lanes.iter().try_for_each(|lane| {
            lane.lock().slots.iter().try_for_each(|slot| self.device.synchronise(slot.queue.id))
        })
    }
}

impl Lane {
    /// The slot whose turn it is, after waiting for the piece that used it before.
    fn next(&mut self, staging: &Staging) -> Result<&Slot, DriverError> {
        let device = &staging.device;
        let slot = &mut self.slots[self.next];
        self.next = (self.next + 1) % SLOTS;
        device.synchronise(slot.queue.id)?;
        if let Some(start) = staging.start.as_ref().filter(|_| slot.turn != staging.turn) {
            device.wait(slot.queue.id, start.id)?;
            slot.turn = staging.turn;
        }
        slot.used = true;
        Ok(slot)
    }
}

#[cfg(all(test, feature = "emu"))]
mod tests {
    use alloc::string::String;
    use alloc::vec;

    use gpu_kernels::driver::StreamId;
    use gpu_kernels::emu::{Emulator, Options};
    use quant::FormatId;

    use super::*;
    use crate::pool::Pool;
    use crate::weights::ByteSource;

    /// Bytes of which some cannot be read.
    struct Source {
        bytes: Vec<u8>,
        bad: Range<usize>,
        reads: AtomicUsize,
    }

    impl ByteSource for Source {
        fn bytes(&self) -> &[u8] {
            &self.bytes
        }

        fn read(&self, offset: usize, to: &mut [u8]) -> Result<(), EngineError> {
            self.reads.fetch_add(1, Ordering::Relaxed);
            if offset < self.bad.end && self.bad.start < offset + to.len() {
                return Err(EngineError::Io { path: String::from("here"), what: format!("bad at {offset}") });
            }
            to.copy_from_slice(&self.bytes[offset..][..to.len()]);
            Ok(())
        }
    }

    /// A weight's format, rows, columns, and how it is used.
    type Row = (FormatId, usize, usize, WeightForm);

    const ONE: WeightForm = WeightForm::Tiled { n_expert: 1 };

    /// Whole row tiles and not, rows longer than a piece, experts with padding and without, vectors.
    const ROWS: &[Row] = &[
        (FormatId::Q4_0, 200, 256, ONE),
        (FormatId::F32, 70, 40, ONE),
        (FormatId::F32, 33, 900, ONE),
        (FormatId::F16, 130, 34, ONE),
        (FormatId::Q6_K, 3 * 33, 256, WeightForm::Tiled { n_expert: 3 }),
        (FormatId::Q8_0, 4 * 64, 64, WeightForm::Tiled { n_expert: 4 }),
        (FormatId::F32, 1, 5000, WeightForm::Plain),
        (FormatId::F16, 3, 7, WeightForm::Plain),
    ];

    const PIECE_BYTES: usize = 10_000;

    struct Bench {
        device: Device,
        source: Arc<Source>,
        weights: DeviceWeights,
        keys: Vec<WeightKey>,
        memory: Memory,
    }

    impl Bench {
        /// Weights that have their places, but nothing in them; of the file these bytes cannot be read.
        fn new(bad: Range<usize>, threads: usize) -> Bench {
            let row_bytes =
                |&(format, _, k, _): &Row| k / quant::info(format).elems * quant::info(format).bytes;
            let bytes: usize = ROWS.iter().map(|row| row.1 * row_bytes(row)).sum();
            let bytes = (0..bytes).map(|i| (i * i / 7 + i / 250) as u8).collect();
            let source = Arc::new(Source { bytes, bad, reads: AtomicUsize::new(0) });
            let mut weights = Weights::new(vec![source.clone() as Arc<dyn ByteSource>]);
            let mut offset = 0;
            for (i, row) in ROWS.iter().enumerate() {
                let n = row.1 * row_bytes(row);
                weights.insert(&format!("{i}"), row.0, vec![row.1, row.2], 0, offset, n);
                offset += n;
            }
            let mut keys: Vec<WeightKey> = (0..)
                .zip(ROWS)
                .map(|(weight, &(_, rows, _, form))| WeightKey { weight, first_row: 0, rows, form })
                .collect();
            // A part of a fused matrix.
            keys.push(WeightKey { weight: 0, first_row: 40, rows: 90, form: ONE });
            let device: Device = Arc::new(Emulator::new(Options::default()));
            let bytes = keys.iter().map(|key| DeviceWeights::device_bytes(&weights, *key)).sum();
            let memory = Memory::new(&device, MemKind::Device, bytes).unwrap();
            let executor = Arc::new(Pool::new(threads).unwrap());
            let mut weights = DeviceWeights::new(device.clone(), executor, Arc::new(weights));
            let mut at = memory.at();
            for key in &keys {
                weights.lend(*key, at);
                at = at.offset(DeviceWeights::device_bytes(weights.source(), *key) as u64);
            }
            Bench { device, source, weights, keys, memory }
        }

        fn staging(&self, n_lanes: usize) -> Staging {
            let row_bytes = |key: &WeightKey| self.weights.source().get(key.weight).row_bytes();
            let row_tile = self.keys.iter().map(row_bytes).max().unwrap() * tile::ROWS;
            let slot_bytes = PIECE_BYTES.max(row_tile).next_multiple_of(ALIGN);
            Staging::new(&self.device, Room { n_lanes, piece_bytes: PIECE_BYTES, slot_bytes }).unwrap()
        }

        /// Whether every weight is where and as it should be.
        fn check(&self) {
            for key in &self.keys {
                let w = self.weights.source().get(key.weight);
                let raw = self.weights.source().row_range(key.weight, key.first_row, key.rows);
                let want: Vec<u8> = match key.form {
                    WeightForm::Plain => raw.to_vec(),
                    WeightForm::Tiled { n_expert } => raw
                        .chunks(raw.len() / n_expert)
                        .flat_map(|raw| tile::pack(w.format, raw, key.rows / n_expert, w.cols()))
                        .collect(),
                };
                let mut got = vec![0; want.len()];
                self.device.read(&mut got, self.weights.at(*key), StreamId::DEFAULT).unwrap();
                assert!(got == want, "{key:?}");
            }
        }

        fn clear(&self) {
            let (at, bytes) = (self.memory.at(), self.memory.bytes() as u64);
            self.device.fill(at, 0xff, bytes, StreamId::DEFAULT).unwrap();
        }
    }

    #[test]
    fn threads_bring_pieces_of_all_weights_to_their_places() {
        for threads in [1, 4] {
            let bench = Bench::new(0..0, threads);
            let mut staging = bench.staging(threads);
            let mut modules = Modules::new();
            for _ in 0..2 {
                bench.clear();
                staging.after(Mark::new(&bench.device).unwrap());
                bench.weights.bring(&bench.keys, &staging, &mut modules).unwrap();
                let n_marks = staging.marks().unwrap().len();
                assert!((SLOTS..=SLOTS * threads).contains(&n_marks), "{n_marks} streams used");
                assert!(staging.marks().unwrap().is_empty());
                staging.finish().unwrap();
                bench.check();
            }
        }
    }

    #[test]
    fn progress_goes_up_to_all_there_is() {
        let mut bench = Bench::new(0..0, 3);
        let keys: Vec<WeightKey> = core::mem::take(&mut bench.weights.placed).into_keys().collect();
        let mut seen = Vec::new();
        bench.weights.place(&keys, &mut Modules::new(), &mut |progress| seen.push(progress)).unwrap();
        bench.check();
        let total_bytes = keys.iter().map(|key| bench.weights.file_bytes(*key).len()).sum();
        assert_eq!(seen.last(), Some(&Progress { done_bytes: total_bytes, total_bytes }));
        assert!(seen.windows(2).all(|two| two[0].done_bytes <= two[1].done_bytes));
    }

    /// The first failure is the answer, nobody begins another piece, and the buffers serve again.
    #[test]
    fn a_failure_in_the_middle_stops_all_threads() {
        for threads in [1, 4] {
            // In the first weight: of some forty pieces few were begun.
            let bench = Bench::new(20_000..20_001, threads);
            let staging = bench.staging(threads);
            let mut modules = Modules::new();
            let failed = bench.weights.bring(&bench.keys, &staging, &mut modules);
            assert!(matches!(&failed, Err(EngineError::Io { what, .. }) if what.starts_with("bad at")));
            let n_reads = bench.source.reads.load(Ordering::Relaxed);
            assert!(n_reads <= 8 + threads, "{n_reads} pieces were begun");
            staging.finish().unwrap();
            // What the device refuses, likewise: a place that is none.
            let mut bench = Bench::new(0..0, threads);
            let (key, good) = (bench.keys[1], bench.weights.at(bench.keys[1]));
            let staging = bench.staging(threads);
            bench.weights.lend(key, DevicePtr(1 << 60));
            let failed = bench.weights.bring(&bench.keys, &staging, &mut modules);
            assert!(matches!(failed, Err(EngineError::Device(DriverError::Kernel { .. }))), "{failed:?}");
            staging.finish().unwrap();
            bench.weights.lend(key, good);
            bench.clear();
            bench.weights.bring(&bench.keys, &staging, &mut modules).unwrap();
            staging.finish().unwrap();
            bench.check();
        }
    }

    /// So many (lanes, bytes of a piece) for so many threads and weights.
    #[test]
    fn short_loads_pin_little_memory() {
        let sizes = |threads: usize, n: usize, bytes: usize| {
            let room = Room::new(threads, core::iter::repeat_n((bytes, 1), n));
            (room.n_lanes, room.piece_bytes)
        };
        const MIB: usize = 1 << 20;
        assert_eq!(sizes(16, 200, 23 * MIB), (16, 2 * MIB));
        assert_eq!(sizes(64, 200, 23 * MIB), (33, 2 * MIB));
        assert_eq!(sizes(16, 30, 3 * MIB), (4, 2 * MIB));
        assert_eq!(sizes(1, 200, 23 * MIB), (1, 16 * MIB));
        assert_eq!(sizes(4, 200, 23 * MIB), (4, 8 * MIB));
        assert_eq!(sizes(16, 3, 1000), (1, 1000));
        assert_eq!(sizes(16, 0, 0), (1, 1));
    }
}
