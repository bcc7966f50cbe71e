//! A CTA's shared memory with its shadow: per word, who wrote and read last, and which bytes were ever written.

use std::format;
use std::string::String;
use std::vec;
use std::vec::Vec;

use super::clock::Clock;
use super::cta::WINDOW_BYTES;
use super::memory::Kind;

/// An access by one thread at one of its times. Time 0: none.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Access {
    pub(super) thread: u16,
    /// Bytes of the word.
    pub(super) mask: u8,
    /// By an atomic operation: no conflict with another.
    pub(super) atomic: bool,
    pub(super) time: u32,
}

/// The latest accesses to a word. Two readers are kept, so that a write is checked against a reader other than the
/// writer; a write of other bytes of the word by another thread replaces the mark of the first, which can hide a race but
/// never invent one.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Word {
    pub(super) write: Access,
    pub(super) reads: [Access; 2],
    init: u8,
    /// Bytes that an asynchronous copy has yet to bring.
    pending: u8,
}

impl Word {
    /// Marks an access; says what it conflicts with.
    pub(super) fn access(
        &mut self,
        me: usize,
        clock: &Clock,
        mask: u8,
        kind: Kind,
    ) -> Option<(&'static str, u16)> {
        let atomic = kind == Kind::Atomic;
        let conflict = |other: Access| {
            other.time != 0
                && other.mask & mask != 0
                && !(atomic && other.atomic)
                && !clock.after(me, other.thread.into(), other.time)
        };
        let found = if conflict(self.write) {
            Some(("write", self.write.thread))
        } else if kind != Kind::Read {
            self.reads.iter().find(|&&read| conflict(read)).map(|read| ("read", read.thread))
        } else {
            None
        };
        let mine = Access { thread: me as u16, mask, atomic, time: clock.own };
        if kind != Kind::Read {
            self.write = mine;
            self.reads = [Access::default(); 2];
        } else {
            if self.reads[0].thread != mine.thread {
                self.reads[1] = self.reads[0];
            }
            self.reads[0] = mine;
        }
        found
    }
}

/// A copy under way.
#[derive(Clone, Debug)]
pub(super) struct AsyncCopy {
    pub(super) to: u32,
    /// The first `size` of these.
    pub(super) bytes: [u8; 16],
    pub(super) size: u32,
}

pub(super) struct SharedMemory {
    bytes: Vec<u8>,
    words: Vec<Word>,
    /// Per thread, its time at its last fence between plain accesses and those of the tensor cores and the copy engine.
    fenced: Vec<u32>,
    /// Bytes of each CTA's part, where a cluster has several.
    of_cta: u32,
}

/// What a check found, without the place.
pub(super) type Check = Result<(), String>;

impl SharedMemory {
    /// `bytes` in all, `of_cta` of them each CTA's.
    pub(super) fn new(bytes: u32, of_cta: u32, threads: usize) -> SharedMemory {
        // Filled with a pattern: a kernel that uses what it did not write fails its comparison too.
        let len = bytes as usize;
        let words = vec![Word::default(); len.div_ceil(4)];
        SharedMemory { bytes: vec![0xcd; len], words, fenced: vec![0; threads], of_cta }
    }

    pub(super) fn bounds(&self, at: u32, size: u32) -> Check {
        self.bounds_aligned(at, size, size)
    }

    pub(super) fn bounds_aligned(&self, at: u32, size: u32, align: u32) -> Check {
        if u64::from(at % WINDOW_BYTES) + u64::from(size) > u64::from(self.of_cta) {
            let len = self.of_cta;
            return Err(format!("shared memory: {size} bytes at {at} are out of the CTA's {len}"));
        }
        if !at.is_multiple_of(align) {
            return Err(format!("shared memory: {size} bytes at {at} are misaligned"));
        }
        Ok(())
    }

    /// Checks and marks an access that is in bounds.
    pub(super) fn access(&mut self, at: u32, size: u32, kind: Kind, me: usize, clock: &Clock) -> Check {
        for word in at / 4..(at + size).div_ceil(4) {
            let from = at.max(4 * word) - 4 * word;
            let to = (at + size).min(4 * word + 4) - 4 * word;
            let mask = (0xfu32 << from) as u8 & (0xf >> (4 - to)) as u8;
            let cell = &mut self.words[word as usize];
            let what = if kind == Kind::Write { "writes" } else { "reads" };
            let place = format_args!("shared memory at {}: thread {me} {what}", 4 * word + from);
            if cell.pending & mask != 0 {
                return Err(format!("{place} before the asynchronous copy to it was waited for"));
            }
            if kind != Kind::Write && cell.init & mask != mask {
                return Err(format!("{place} uninitialised memory"));
            }
            if let Some((how, other)) = cell.access(me, clock, mask, kind) {
                let whose = if usize::from(other) == self.fenced.len() {
                    "of a bulk copy".into()
                } else {
                    format!("of thread {other}")
                };
                return Err(format!("race: {place} without a barrier after the {how} {whose}"));
            }
            if kind != Kind::Read {
                cell.init |= mask;
            }
        }
        Ok(())
    }

    pub(super) fn load(&self, at: u32, to: &mut [u8]) {
        to.copy_from_slice(&self.bytes[at as usize..][..to.len()]);
    }

    pub(super) fn store(&mut self, at: u32, from: &[u8]) {
        self.bytes[at as usize..][..from.len()].copy_from_slice(from);
    }

    /// What a thread wrote before is seen by the tensor cores and the copy engine from now on.
    pub(super) fn fence(&mut self, me: usize, clock: &mut Clock) {
        self.fenced[me] = clock.own;
        clock.own += 1;
    }

    /// Checks that the tensor cores or the copy engine may touch bytes: whoever wrote them has fenced.
    pub(super) fn is_fenced(&self, at: u32, size: u32) -> Check {
        for word in at / 4..(at + size).div_ceil(4) {
            let Access { thread, time, .. } = self.words[word as usize].write;
            if self.fenced.get(usize::from(thread)).is_some_and(|&fenced| fenced < time) {
                return Err(format!(
                    "shared memory at {}: used by the asynchronous proxy without a fence after the write of thread {thread}",
                    4 * word
                ));
            }
        }
        Ok(())
    }

    /// The target of a copy is unusable from now on.
    pub(super) fn begin_copy(&mut self, at: u32, size: u32) {
        for word in &mut self.words[at as usize / 4..][..size as usize / 4] {
            word.pending = 0xf;
        }
    }

    /// A copy has arrived, as a write of the thread that waited for it, or of the copy engine.
    pub(super) fn end_copy(&mut self, to: u32, bytes: &[u8], me: usize, time: u32) {
        self.store(to, bytes);
        for word in &mut self.words[to as usize / 4..][..bytes.len() / 4] {
            let write = Access { thread: me as u16, mask: 0xf, atomic: false, time };
            *word = Word { write, init: 0xf, ..Word::default() };
        }
    }
}
