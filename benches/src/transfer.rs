//! What a model's weights go through on their way to the GPU, each leg alone and then all of it: page cache to memory,
//! pinned memory to the device, a pipeline of both, and what the engine makes of them at load and with op offload.
//!
//! Rows are GB/s and per cent of what one large copy from pinned memory reaches, the bus's speed. The variants that the
//! engine did not take stay here, so that the choice can be made anew on another machine.

use std::cell::RefCell;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use engine::backend::Backend;
use engine::backends::cuda::hosted::{Hosted, Registered};
use engine::backends::cuda::{Cuda, Device, Streaming};
use engine::backends::split::{Offload, Placement};
use engine::io::Mapped;
use engine::models::StepShape;
use engine::plan::Plan;
use engine::pool::Pool;
use engine::weights::ByteSource;
use engine::{ContextParams, EngineError, Executor, Model, Tokenizer};
use gpu_kernels::driver::{Driver, DriverError, MemKind, StreamId};
use gpu_kernels::launch::DevicePtr;
use memmap2::MmapMut;

use crate::BenchError;

/// What one thread reads at a time where several fill one piece.
const PART: usize = 256 << 10;
/// Bytes of the file that a measurement reads at most.
const MAX_BYTES: usize = 4 << 30;
/// Runs of a short measurement; the best counts.
const RUNS: usize = 3;
const MIB: usize = 1 << 20;

/// How the host gets at the file's bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// By the mapping, page faults and all the first time.
    Mapping,
    /// By read calls, straight to where the bytes belong.
    Read,
    /// By read calls to a buffer in the thread's cache, from there by the processor: where the system cannot write to the
    /// driver's memory (gVisor).
    Bounce,
}

thread_local! {
    static BOUNCE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl Way {
    fn read(self, file: &Mapped, offset: usize, to: &mut [u8]) -> Result<(), BenchError> {
        match self {
            Way::Mapping => to.copy_from_slice(&file.bytes()[offset..][..to.len()]),
            Way::Read => file.read(offset, to)?,
            Way::Bounce => BOUNCE.with_borrow_mut(|bounce| {
                bounce.resize(PART, 0);
                for (i, to) in to.chunks_mut(PART).enumerate() {
                    let bounce = &mut bounce[..to.len()];
                    file.read(offset + i * PART, bounce)?;
                    to.copy_from_slice(bounce);
                }
                Ok::<_, EngineError>(())
            })?,
        }
        Ok(())
    }
}

/// Prints rows.
struct Rows {
    /// The bus, once measured.
    bus: f64,
}

impl Rows {
    fn row(&self, what: &str, bytes: usize, seconds: f64) {
        let rate = bytes as f64 / seconds / 1e9;
        let share = if self.bus > 0.0 { format!("{:5.1} %", 100.0 * rate / self.bus) } else { String::new() };
        println!("{what:<58} {rate:8.2} GB/s {share:>8} {:10.2} ms", seconds * 1e3);
    }

    fn time(&self, what: &str, seconds: f64) {
        println!("{what:<58} {:>33.2} ms", seconds * 1e3);
    }

    fn refused(&self, what: &str, error: &BenchError) {
        println!("{what:<58} refused: {error}");
    }
}

/// Everything, for a GGUF file of one part.
pub fn run(path: &Path, device: u32) -> Result<(), BenchError> {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let mut rows = Rows { bus: 0.0 };
    let file = Arc::new(Mapped::open(path)?);
    let bytes = file.bytes().len().min(MAX_BYTES);
    println!(
        "{}: {bytes} bytes of {} are read, {cores} hardware threads",
        path.display(),
        file.bytes().len()
    );
    let pool = pool(cores)?;
    rows.row("file, first time (maybe from disk), read", bytes, from_file(&file, bytes, Way::Read, &pool)?);
    drop(pool);
    host(path, bytes, cores, &rows)?;

    let start = Instant::now();
    let driver = Arc::new(Hosted::open(device)?);
    rows.time("open the device", start.elapsed().as_secs_f64());
    println!("{}", driver.info().name);
    rows.bus = bus(&driver, &rows)?;
    pinned(&driver, &rows)?;
    pipelines(&driver, path, bytes, cores, &rows)?;
    registered(&driver, &file, cores, &rows)?;
    engine(&driver, path, &rows)
}

fn pool(threads: usize) -> Result<Pool, BenchError> {
    Pool::new(threads).map_err(BenchError::io("start threads"))
}

/// Cuts `bytes` bytes into parts and has all threads of a pool work on them; a thread takes the next part when it is free.
/// `work` gets the thread's number and the part.
fn parts(
    pool: &Pool,
    bytes: usize,
    part: usize,
    work: impl Fn(usize, Range<usize>) -> Result<(), BenchError> + Sync,
) -> Result<(), BenchError> {
    let failure = Mutex::new(None);
    let next = AtomicUsize::new(0);
    pool.run(pool.n_threads(), &|thread| {
        loop {
            let from = next.fetch_add(part, Ordering::Relaxed);
            if from >= bytes {
                break;
            }
            if let Err(error) = work(thread, from..(from + part).min(bytes)) {
                failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                break;
            }
        }
    });
    failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

/// Seconds in which the threads copy the file's start to memory of their own, 2 MiB each, over and over.
fn from_file(file: &Mapped, bytes: usize, way: Way, pool: &Pool) -> Result<f64, BenchError> {
    let own: Vec<Mutex<Vec<u8>>> = (0..pool.n_threads()).map(|_| Mutex::new(vec![1; 8 * PART])).collect();
    let start = Instant::now();
    parts(pool, bytes, PART, |thread, range| {
        let mut own = own[thread].lock().unwrap_or_else(PoisonError::into_inner);
        let at = range.start / PART % 8 * PART;
        way.read(file, range.start, &mut own[at..at + range.len()])
    })?;
    Ok(start.elapsed().as_secs_f64())
}

/// Page cache to memory.
fn host(path: &Path, bytes: usize, cores: usize, rows: &Rows) -> Result<(), BenchError> {
    for threads in [1, 4, 8, 16] {
        if threads > cores {
            continue;
        }
        let pool = pool(threads)?;
        // Faults are a matter of the mapping, so each gets its own.
        let file = Mapped::open(path)?;
        let fresh = from_file(&file, bytes, Way::Mapping, &pool)?;
        rows.row(&format!("page cache -> memory, mapping fresh, {threads} threads"), bytes, fresh);
        let touched = from_file(&file, bytes, Way::Mapping, &pool)?;
        rows.row(&format!("page cache -> memory, mapping touched, {threads} threads"), bytes, touched);
        let read = from_file(&Mapped::open(path)?, bytes, Way::Read, &pool)?;
        rows.row(&format!("page cache -> memory, read, {threads} threads"), bytes, read);
    }
    Ok(())
}

/// Memory that goes with its owner.
struct Memory<'a> {
    driver: &'a Hosted,
    at: DevicePtr,
}

impl<'a> Memory<'a> {
    fn new(driver: &'a Hosted, kind: MemKind, bytes: usize) -> Result<Memory<'a>, DriverError> {
        Ok(Memory { driver, at: driver.alloc(kind, bytes as u64)? })
    }
}

impl Drop for Memory<'_> {
    fn drop(&mut self) {
        // What used it has reported what is wrong.
        let _ = self.driver.free(self.at);
    }
}

/// The best of some runs, each timed until the stream is done.
fn best(driver: &Hosted, mut queue: impl FnMut() -> Result<(), DriverError>) -> Result<f64, DriverError> {
    let mut best = f64::INFINITY;
    for _ in 0..RUNS {
        let start = Instant::now();
        queue()?;
        driver.synchronise(StreamId::DEFAULT)?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(best)
}

/// Bytes a second of one large copy from pinned memory, and other copies.
fn bus(driver: &Hosted, rows: &Rows) -> Result<f64, BenchError> {
    const BYTES: usize = 256 * MIB;
    const REPEATS: usize = 8;
    let stream = StreamId::DEFAULT;
    let host = Memory::new(driver, MemKind::Host, BYTES)?;
    let device = Memory::new(driver, MemKind::Device, BYTES)?;
    driver.write_host(host.at, &vec![1; BYTES])?;
    let total = (BYTES * REPEATS) as u64;
    let repeat = |to: DevicePtr, from: DevicePtr, piece: usize| {
        best(driver, || {
            (0..REPEATS).try_for_each(|_| {
                (0..BYTES as u64)
                    .step_by(piece)
                    .try_for_each(|at| driver.copy(to.offset(at), from.offset(at), piece as u64, stream))
            })
        })
    };
    let seconds = repeat(device.at, host.at, BYTES)?;
    let bus = total as f64 / seconds / 1e9;
    let rows = Rows { bus: if rows.bus > 0.0 { rows.bus } else { bus } };
    rows.row("pinned -> device, 256 MiB at a time: the bus", total as usize, seconds);
    for piece in [16 * MIB, 8 * MIB, 2 * MIB, PART] {
        let what = format!("pinned -> device, {} KiB at a time", piece / 1024);
        rows.row(&what, total as usize, repeat(device.at, host.at, piece)?);
    }
    rows.row("device -> pinned", total as usize, repeat(host.at, device.at, BYTES)?);
    let pageable = vec![1; BYTES];
    let seconds = best(driver, || driver.write(device.at, &pageable, stream))?;
    rows.row("memory that is not pinned -> device", BYTES, seconds);
    Ok(bus)
}

/// What allocations cost.
fn pinned(driver: &Hosted, rows: &Rows) -> Result<(), BenchError> {
    for (kind, mib) in
        [(MemKind::Host, 32), (MemKind::Host, 64), (MemKind::Host, 1024), (MemKind::Device, 4096)]
    {
        let start = Instant::now();
        let memory = Memory::new(driver, kind, mib * MIB)?;
        let seconds = start.elapsed().as_secs_f64();
        rows.row(&format!("allocate {mib} MiB, {kind:?}"), mib * MIB, seconds);
        let start = Instant::now();
        drop(memory);
        rows.time("  and free them", start.elapsed().as_secs_f64());
    }
    Ok(())
}

/// A pinned buffer and its counterpart, with a stream that frees it for the next piece.
struct Slot<'a> {
    host: Memory<'a>,
    device: Memory<'a>,
    stream: StreamId,
}

fn slots(driver: &Hosted, n: usize, bytes: usize) -> Result<Vec<Slot<'_>>, DriverError> {
    let slot = || {
        let (host, device) =
            (Memory::new(driver, MemKind::Host, bytes)?, Memory::new(driver, MemKind::Device, bytes)?);
        Ok(Slot { host, device, stream: driver.create_stream()? })
    };
    (0..n).map(|_| slot()).collect()
}

fn release(driver: &Hosted, slots: &[Slot<'_>]) -> Result<(), DriverError> {
    slots.iter().try_for_each(|slot| {
        driver.synchronise(slot.stream)?;
        driver.release_stream(slot.stream)
    })
}

/// Reads a piece of the file into pinned memory.
fn fill(
    driver: &Hosted,
    file: &Mapped,
    way: Way,
    offset: usize,
    host: DevicePtr,
    bytes: usize,
) -> Result<(), BenchError> {
    let mut result = Ok(());
    driver.fill_host(host, bytes, &mut |to| result = way.read(file, offset, to))?;
    result
}

/// File to device, filling and copying at the same time.
fn pipelines(
    driver: &Hosted,
    path: &Path,
    bytes: usize,
    cores: usize,
    rows: &Rows,
) -> Result<(), BenchError> {
    for (way, name) in [(Way::Mapping, "mapping"), (Way::Read, "read"), (Way::Bounce, "read twice")] {
        for threads in [1, 8, 16] {
            if threads > cores {
                continue;
            }
            let pool = pool(threads)?;
            for (n, piece) in [(2, 16 * MIB), (4, 8 * MIB), (4, 16 * MIB), (4, 32 * MIB), (8, 4 * MIB)] {
                let seconds = by_turns(driver, path, way, bytes, &pool, n, piece)?;
                let what =
                    format!("file -> device, {name}, {threads} threads, {n} x {} MiB in turns", piece / MIB);
                rows.row(&what, bytes, seconds);
            }
            for piece in [MIB, 2 * MIB, 4 * MIB] {
                for ready in [true, false] {
                    let seconds = by_threads(driver, path, way, bytes, &pool, piece, ready)?;
                    let made = if ready { "" } else { ", made on the way" };
                    let mib = piece / MIB;
                    let what = format!("file -> device, {name}, {threads} threads, 2 x {mib} MiB each{made}");
                    rows.row(&what, bytes, seconds);
                }
            }
        }
    }
    Ok(())
}

/// All threads fill one slot, then the next.
fn by_turns(
    driver: &Hosted,
    path: &Path,
    way: Way,
    bytes: usize,
    pool: &Pool,
    n: usize,
    piece: usize,
) -> Result<f64, BenchError> {
    let slots = slots(driver, n, piece)?;
    // A mapping of its own, with its own page faults.
    let file = &Mapped::open(path)?;
    let start = Instant::now();
    for (i, from) in (0..bytes).step_by(piece).enumerate() {
        let (slot, len) = (&slots[i % n], piece.min(bytes - from));
        driver.synchronise(slot.stream)?;
        parts(pool, len, PART, |_, part| {
            let host = slot.host.at.offset(part.start as u64);
            fill(driver, file, way, from + part.start, host, part.len())
        })?;
        driver.copy(slot.device.at, slot.host.at, len as u64, slot.stream)?;
    }
    release(driver, &slots)?;
    Ok(start.elapsed().as_secs_f64())
}

/// Every thread has two slots of its own, and queues their copies. They are `ready` before the clock starts, or made when a
/// thread first needs them. (The engine makes all of them before the first copy, with the clock running.)
fn by_threads(
    driver: &Hosted,
    path: &Path,
    way: Way,
    bytes: usize,
    pool: &Pool,
    piece: usize,
    ready: bool,
) -> Result<f64, BenchError> {
    let n = if ready { 2 } else { 0 };
    let own = (0..pool.n_threads()).map(|_| Ok::<_, DriverError>(Mutex::new((slots(driver, n, piece)?, 0))));
    let own = own.collect::<Result<Vec<_>, _>>()?;
    // A mapping of its own, with its own page faults.
    let file = &Mapped::open(path)?;
    let start = Instant::now();
    parts(pool, bytes, piece, |thread, range| {
        let mut own = own[thread].lock().unwrap_or_else(PoisonError::into_inner);
        let (slots_of, next) = &mut *own;
        if *next == slots_of.len() {
            slots_of.extend(slots(driver, 1, piece)?);
        }
        let slot = &slots_of[*next];
        *next = (*next + 1) % 2;
        driver.synchronise(slot.stream)?;
        fill(driver, file, way, range.start, slot.host.at, range.len())?;
        Ok(driver.copy(slot.device.at, slot.host.at, range.len() as u64, slot.stream)?)
    })?;
    let own = own.into_iter().flat_map(|own| own.into_inner().unwrap_or_else(PoisonError::into_inner).0);
    let own: Vec<Slot<'_>> = own.collect();
    release(driver, &own)?;
    let copied = start.elapsed();
    drop(own);
    Ok(if ready { copied } else { start.elapsed() }.as_secs_f64())
}

/// Memory of no file.
struct Anonymous(MmapMut);

impl ByteSource for Anonymous {
    fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// Memory that the driver did not allocate: the mapping itself, and anonymous huge pages filled by all threads.
fn registered(driver: &Arc<Hosted>, file: &Arc<Mapped>, cores: usize, rows: &Rows) -> Result<(), BenchError> {
    from_registered(driver, file.clone(), "the file's mapping", rows)?;
    let bytes = file.bytes().len().min(1 << 30);
    let mut map = MmapMut::map_anon(bytes).map_err(BenchError::io("map memory"))?;
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    let pool = pool(cores)?;
    let start = Instant::now();
    {
        let own: Vec<Mutex<&mut [u8]>> = map.chunks_mut(PART).map(Mutex::new).collect();
        parts(&pool, bytes, PART, |_, range| {
            let mut to = own[range.start / PART].lock().unwrap_or_else(PoisonError::into_inner);
            Way::Read.read(file, range.start, &mut to)
        })?;
    }
    rows.row("file -> fresh huge pages, all threads", bytes, start.elapsed().as_secs_f64());
    from_registered(driver, Arc::new(Anonymous(map)), "huge pages", rows)
}

fn from_registered(
    driver: &Arc<Hosted>,
    source: Arc<dyn ByteSource>,
    name: &str,
    rows: &Rows,
) -> Result<(), BenchError> {
    let start = Instant::now();
    let registered = match Registered::new(driver.clone(), source) {
        Ok(registered) => registered,
        Err(error) => {
            rows.refused(&format!("register {name}"), &error.into());
            return Ok(());
        }
    };
    rows.row(&format!("register {name}"), registered.bytes(), start.elapsed().as_secs_f64());
    const PIECE: usize = 256 * MIB;
    let device = Memory::new(driver, MemKind::Device, PIECE)?;
    let seconds = best(driver, || {
        (0..registered.bytes()).step_by(PIECE).try_for_each(|at| {
            registered.copy(device.at, at, PIECE.min(registered.bytes() - at), StreamId::DEFAULT)
        })
    })?;
    rows.row(&format!("{name}, registered -> device"), registered.bytes(), seconds);
    let start = Instant::now();
    let bytes = registered.bytes();
    drop(registered);
    rows.row(&format!("unregister {name}"), bytes, start.elapsed().as_secs_f64());
    Ok(())
}

/// The engine's own load and bring.
fn engine(driver: &Arc<Hosted>, path: &Path, rows: &Rows) -> Result<(), BenchError> {
    let start = Instant::now();
    let file = Arc::new(Mapped::open(path)?);
    let parsed = gguf::Gguf::parse(file.bytes()).map_err(|e| BenchError::Peer(e.to_string()))?;
    rows.time("engine: open the file, read its header", start.elapsed().as_secs_f64());
    let start = Instant::now();
    drop(Tokenizer::from_gguf(&parsed).map_err(|e| BenchError::Peer(e.to_string()))?);
    rows.time("engine: tokenizer", start.elapsed().as_secs_f64());
    let start = Instant::now();
    let model = Model::load(vec![file.clone()])?;
    rows.time("engine: model (header and tokenizer again)", start.elapsed().as_secs_f64());
    let shape = StepShape { prompt: true, ..ContextParams::default().step(1, 1) };
    let graph = model.graph(512, shape);
    let device: Device = driver.clone();
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    for (threads, which) in [(cores, "first time"), (cores, "again"), (cores / 2, "again"), (1, "again")] {
        let executor: Arc<dyn Executor> = Arc::new(pool(threads.max(1))?);
        let mut cuda = Cuda::new(device.clone(), executor, model.weights().clone());
        let (start, mut total) = (Instant::now(), 0);
        cuda.load(&graph, &mut |progress| total = progress.total_bytes)?;
        let what = format!("engine: weights to the device, {threads} threads, {which}");
        rows.row(&what, total, start.elapsed().as_secs_f64());
    }
    let n_layer = model.hparams().n_layer();
    let placement =
        Placement { offload: Some(Offload { from: 0, to: 1 }), ..Placement::last_layers(n_layer, 0) };
    let brought = placement.brought(&graph, model.weights());
    for (pinned_bytes, name) in [(0, "from the file"), (u64::MAX, "from pinned copies")] {
        let executor: Arc<dyn Executor> = Arc::new(pool(cores)?);
        let cuda = Cuda::new(device.clone(), executor, model.weights().clone());
        let start = Instant::now();
        let mut streaming = Streaming::new(cuda, &brought, pinned_bytes)?;
        let seconds = start.elapsed().as_secs_f64();
        if streaming.pinned_bytes() > 0 {
            rows.row("engine: make the pinned copies of all layers", streaming.pinned_bytes(), seconds);
        }
        let plans = brought.iter().map(|graph| streaming.prepare(Arc::new(Plan::new(graph.clone()))));
        let plans = plans.collect::<Result<Vec<_>, _>>()?;
        let bytes: usize = brought.iter().map(|graph| streaming.brought_bytes(graph)).sum();
        for round in ["first time", "again"] {
            let start = Instant::now();
            for plan in &plans {
                streaming.prefetch(*plan)?;
            }
            let queued = start.elapsed().as_secs_f64();
            // Freeing pinned memory waits for all work.
            driver.free(driver.alloc(MemKind::Host, 1)?)?;
            let seconds = start.elapsed().as_secs_f64();
            rows.row(&format!("engine: bring all layers {name}, {round}"), bytes, seconds);
            rows.time("  of that the host was busy", queued);
            rows.time("  a layer", seconds / plans.len().max(1) as f64);
        }
    }
    Ok(())
}
