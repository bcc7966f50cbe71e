//! Global memory of the emulated device: allocations, which of their bytes were ever written, and the marks that a launch
//! leaves to find races.
//!
//! A device address is the host address of the bytes: as unlikely to be hit by a wrong index as the host's own, and no
//! second address space to keep. Bytes are accessed as relaxed atomics: CTAs run on several threads of the host, and a kernel that races must not make
//! the emulator's own behaviour undefined.

use core::ptr::NonNull;
use std::boxed::Box;
use std::collections::{BTreeMap, HashMap};
use std::format;
use std::string::String;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::vec::Vec;

use super::clock::{Clock, Others};
use crate::driver::MemKind;
use crate::launch::DevicePtr;

/// Alignment of allocations, as CUDA's.
const ALIGN: usize = 256;

/// One allocation.
#[derive(Debug)]
pub struct Allocation {
    bytes: Bytes,
    kind: MemKind,
    len: usize,
    /// A bit per byte: ever written.
    init: Box<[AtomicU8]>,
    /// Held while an atomic operation of a kernel is made of its load and store.
    atomics: Mutex<()>,
}

/// Where an allocation's bytes are.
#[derive(Debug)]
enum Bytes {
    /// Our own; the first one used is aligned.
    Owned { bytes: Box<[AtomicU8]>, start: usize },
    /// Registered memory of the host's.
    Registered(&'static [AtomicU8]),
}

fn atomics(n: usize, byte: u8) -> Option<Box<[AtomicU8]>> {
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(n).ok()?;
    bytes.resize_with(n, || AtomicU8::new(byte));
    Some(bytes.into_boxed_slice())
}

impl Allocation {
    fn new(kind: MemKind, len: usize) -> Option<Allocation> {
        let bytes = atomics(len.checked_add(ALIGN)?, 0)?;
        let start = bytes.as_ptr().align_offset(ALIGN);
        let init = atomics(len.div_ceil(8), 0)?;
        Some(Allocation { bytes: Bytes::Owned { bytes, start }, kind, len, init, atomics: Mutex::new(()) })
    }

    /// Memory of the host's, all of it written.
    ///
    /// # Safety
    ///
    /// * `len` bytes from `at` are mapped as long as the allocation lives.
    /// * Nobody accesses them, other than to read what we only read, while a method of the allocation runs.
    unsafe fn registered(at: NonNull<u8>, len: usize) -> Option<Allocation> {
        // SAFETY: an AtomicU8 is laid out as the byte; mapped and left alone, as the caller promises. `'static` is as
        // long as the allocation: the slice leaves it in no method.
        let bytes = unsafe { core::slice::from_raw_parts(at.cast::<AtomicU8>().as_ptr(), len) };
        let (bytes, init) = (Bytes::Registered(bytes), atomics(len.div_ceil(8), 0xff)?);
        Some(Allocation { bytes, kind: MemKind::Host, len, init, atomics: Mutex::new(()) })
    }

    fn address(&self) -> u64 {
        self.range(0, 0).as_ptr().expose_provenance() as u64
    }

    /// The bytes from `offset` on; the range is within the allocation.
    fn range(&self, offset: usize, len: usize) -> &[AtomicU8] {
        match &self.bytes {
            Bytes::Owned { bytes, start } => &bytes[start + offset..][..len],
            Bytes::Registered(bytes) => &bytes[offset..][..len],
        }
    }

    /// Where it lives.
    pub(super) fn kind(&self) -> MemKind {
        self.kind
    }

    fn is_registered(&self) -> bool {
        matches!(self.bytes, Bytes::Registered(_))
    }

    pub(super) fn load(&self, offset: usize, to: &mut [u8]) {
        let from = self.range(offset, to.len());
        for (to, from) in to.iter_mut().zip(from) {
            *to = from.load(Ordering::Relaxed);
        }
    }

    pub(super) fn store(&self, offset: usize, from: &[u8]) {
        for (to, &from) in self.range(offset, from.len()).iter().zip(from) {
            to.store(from, Ordering::Relaxed);
        }
        for byte in offset..offset + from.len() {
            let (cell, bit) = (&self.init[byte / 8], 1u8 << (byte % 8));
            if cell.load(Ordering::Relaxed) & bit == 0 {
                cell.fetch_or(bit, Ordering::Relaxed);
            }
        }
    }

    /// An atomic operation on the word at `offset`; returns the value before.
    pub(super) fn update(&self, offset: usize, f: impl Fn(u32) -> u32) -> u32 {
        let _one_at_a_time = self.atomics.lock().unwrap_or_else(PoisonError::into_inner);
        let mut before = [0; 4];
        self.load(offset, &mut before);
        let before = u32::from_le_bytes(before);
        self.store(offset, &f(before).to_le_bytes());
        before
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The first byte of a range that was never written.
    pub(super) fn uninitialised(&self, offset: usize, len: usize) -> Option<usize> {
        (offset..offset + len).find(|byte| self.init[byte / 8].load(Ordering::Relaxed) & 1 << (byte % 8) == 0)
    }
}

/// All allocations.
#[derive(Debug, Default)]
pub struct Memory {
    by_address: RwLock<BTreeMap<u64, Arc<Allocation>>>,
}

/// A place within an allocation.
#[derive(Clone, Debug)]
pub struct Place {
    pub(super) allocation: Arc<Allocation>,
    pub(super) offset: usize,
}

impl Memory {
    /// New memory; `None` if the host has no more.
    pub fn alloc(&self, kind: MemKind, bytes: u64) -> Option<DevicePtr> {
        Some(self.insert(Allocation::new(kind, usize::try_from(bytes).ok()?)?))
    }

    /// Memory of the host's under its own address; `None` if the host has no more for the marks.
    ///
    /// # Safety
    ///
    /// As for [`Driver::register_host`](crate::driver::Driver::register_host).
    pub(super) unsafe fn register(&self, at: NonNull<u8>, bytes: usize) -> Option<DevicePtr> {
        // SAFETY: mapped until `unregister` drops the allocation, and left alone while work is under way: the caller's
        // promise. Our methods run within that work.
        Some(self.insert(unsafe { Allocation::registered(at, bytes) }?))
    }

    fn insert(&self, allocation: Allocation) -> DevicePtr {
        let address = allocation.address();
        self.by_address.write().unwrap_or_else(PoisonError::into_inner).insert(address, Arc::new(allocation));
        DevicePtr(address)
    }

    /// Gives an allocation back; whether it was one.
    pub fn free(&self, at: DevicePtr) -> bool {
        self.remove(at, false)
    }

    /// Ends a registration; whether it was one.
    pub(super) fn unregister(&self, at: DevicePtr) -> bool {
        self.remove(at, true)
    }

    fn remove(&self, at: DevicePtr, registered: bool) -> bool {
        let mut by_address = self.by_address.write().unwrap_or_else(PoisonError::into_inner);
        let found = by_address.get(&at.0).is_some_and(|allocation| allocation.is_registered() == registered);
        found && by_address.remove(&at.0).is_some()
    }

    /// Where a range lies, if it lies within one allocation.
    pub fn find(&self, at: u64, bytes: u64) -> Option<Place> {
        let by_address = self.by_address.read().unwrap_or_else(PoisonError::into_inner);
        let (start, allocation) = by_address.range(..=at).next_back()?;
        let offset = at - start;
        let fits = offset.checked_add(bytes)? <= allocation.len as u64;
        fits.then(|| Place { allocation: allocation.clone(), offset: offset as usize })
    }
}

/// Who touched a word of global memory in this launch.
#[derive(Clone, Copy, Debug, Default)]
struct Mark {
    write: Touch,
    reads: [Touch; 2],
}

/// An access; `time` 0 means none.
#[derive(Clone, Copy, Debug, Default)]
struct Touch {
    cta: u32,
    thread: u16,
    mask: u8,
    atomic: bool,
    time: u32,
}

/// What kind of access is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    /// Atomics do not conflict with each other.
    Atomic,
}

/// Words per page of the table of marks, and locks that its pages share.
const PAGE_WORDS: u64 = 256;
const SHARDS: usize = 64;

/// Marks of pages of [`PAGE_WORDS`] words, by number.
type Pages = HashMap<u64, Box<[Mark]>>;

/// The marks of one launch.
pub(super) struct LaunchMarks {
    shards: Box<[Mutex<Pages>]>,
    /// Per counter that CTAs arrive at, by address: what the arrivals know.
    arrivals: Mutex<HashMap<u64, Others>>,
}

/// The thread that makes an access, and how it judges earlier ones.
pub(super) struct Toucher<'a> {
    pub(super) cta: u32,
    pub(super) thread: usize,
    pub(super) clock: &'a Clock,
}

impl LaunchMarks {
    pub(super) fn new() -> LaunchMarks {
        let shards = (0..SHARDS).map(|_| Mutex::new(HashMap::new())).collect();
        LaunchMarks { shards, arrivals: Mutex::default() }
    }

    /// An arrival at the counter at address `at` by thread `me` of CTA `cta`, which `count` makes: in the order of the
    /// counts each learns what those before it knew.
    pub(super) fn arrive<R>(
        &self,
        at: u64,
        cta: u32,
        me: usize,
        clock: &mut Clock,
        count: impl FnOnce() -> R,
    ) -> R {
        let mut arrivals = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
        clock.arrive(cta, me, arrivals.entry(at).or_default());
        count()
    }

    /// Marks an access; says what it races with.
    pub(super) fn touch(&self, who: &Toucher<'_>, at: u64, size: u64, kind: Kind) -> Result<(), String> {
        for word in at / 4..(at + size).div_ceil(4) {
            let from = at.max(4 * word) - 4 * word;
            let to = (at + size).min(4 * word + 4) - 4 * word;
            let mask = (0xfu32 << from) as u8 & (0xf >> (4 - to)) as u8;
            let page = word / PAGE_WORDS;
            let shard = &self.shards[page as usize % SHARDS];
            let mut pages = shard.lock().unwrap_or_else(PoisonError::into_inner);
            let marks = pages
                .entry(page)
                .or_insert_with(|| std::vec![Mark::default(); PAGE_WORDS as usize].into_boxed_slice());
            if let Some((how, other)) = marks[(word % PAGE_WORDS) as usize].touch(who, mask, kind) {
                let place = if other.cta == who.cta {
                    format!("without a barrier after the {how} of thread {}", other.thread)
                } else {
                    format!("beside the {how} of thread {} of CTA {}", other.thread, other.cta)
                };
                let me = who.thread;
                let what = format!("{kind:?}").to_lowercase();
                return Err(format!(
                    "race: global memory at {:#x}: {what} by thread {me} {place}",
                    4 * word + from
                ));
            }
        }
        Ok(())
    }
}

impl Mark {
    fn touch(&mut self, who: &Toucher<'_>, mask: u8, kind: Kind) -> Option<(&'static str, Touch)> {
        let atomic = kind == Kind::Atomic;
        let after = |other: &Touch| {
            let thread = other.thread.into();
            if other.cta == who.cta {
                who.clock.after(who.thread, thread, other.time)
            } else {
                who.clock.after_other(other.cta, thread, other.time)
            }
        };
        let conflict = |other: &Touch| {
            other.time != 0 && other.mask & mask != 0 && !(atomic && other.atomic) && !after(other)
        };
        let found = if conflict(&self.write) {
            Some(("write", self.write))
        } else if kind != Kind::Read {
            self.reads.iter().find(|read| conflict(read)).map(|read| ("read", *read))
        } else {
            None
        };
        let mine = Touch { cta: who.cta, thread: who.thread as u16, mask, atomic, time: who.clock.own };
        if kind != Kind::Read {
            self.write = mine;
            self.reads = [Touch::default(); 2];
        } else {
            if (self.reads[0].cta, self.reads[0].thread) != (mine.cta, mine.thread) {
                self.reads[1] = self.reads[0];
            }
            self.reads[0] = mine;
        }
        found
    }
}
