//! Which addresses are ours: every allocation and registration of this process, of all devices.
//!
//! Addresses are unique over devices and the host (CUDA's unified addressing), so one table serves all, and a copy may go
//! from one device's memory to another's. It is what makes copies safe calls: a range outside of it is refused.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock};
use std::vec::Vec;

use gpu_kernels::driver::{DriverError, MemKind};
use gpu_kernels::launch::DevicePtr;

/// How memory came about, and so how it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    Allocated(MemKind),
    /// Device memory of a stream's pool.
    Pool,
    /// Pinned huge pages that we mapped, so many bytes.
    Pages {
        bytes: usize,
    },
    /// The host's own, registered; where the host sees it.
    Registered {
        host: usize,
    },
}

/// One piece of memory.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    pub(super) bytes: u64,
    pub(super) origin: Origin,
    /// The `Hosted` that made it.
    pub(super) owner: u64,
    pub(super) in_use: Arc<InUse>,
}

/// The ranges of a piece that threads of the host read or write at the moment. A thread waits while its range overlaps
/// another; apart from that they work side by side, because one thread copies at a tenth of the bus's rate.
#[derive(Debug, Default)]
pub(super) struct InUse {
    ranges: Mutex<Vec<Range<u64>>>,
    left: Condvar,
}

/// A range while it is in use.
pub(super) struct Use {
    of: Arc<InUse>,
    range: Range<u64>,
}

impl InUse {
    fn is_none(&self) -> bool {
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    fn enter(self: &Arc<InUse>, range: Range<u64>) -> Use {
        let overlaps = |ranges: &mut Vec<Range<u64>>| {
            ranges.iter().any(|other| other.start < range.end && range.start < other.end)
        };
        let ranges = self.ranges.lock().unwrap_or_else(PoisonError::into_inner);
        let mut ranges = self.left.wait_while(ranges, overlaps).unwrap_or_else(PoisonError::into_inner);
        ranges.push(range.clone());
        drop(ranges);
        Use { of: self.clone(), range }
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        let mut ranges = self.of.ranges.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(i) = ranges.iter().position(|range| *range == self.range) {
            ranges.swap_remove(i);
        }
        drop(ranges);
        self.of.left.notify_all();
    }
}

static PIECES: RwLock<BTreeMap<u64, Piece>> = RwLock::new(BTreeMap::new());

/// Enters new memory.
pub(super) fn insert(at: u64, bytes: u64, origin: Origin, owner: u64) {
    let piece = Piece { bytes, origin, owner, in_use: Arc::default() };
    PIECES.write().unwrap_or_else(PoisonError::into_inner).insert(at, piece);
}

/// Takes memory out that the owner made, that came about so, and that no thread of the host uses.
pub(super) fn remove(
    op: &'static str,
    at: DevicePtr,
    owner: u64,
    is_right: impl Fn(Origin) -> bool,
) -> Result<Origin, DriverError> {
    let mut pieces = PIECES.write().unwrap_or_else(PoisonError::into_inner);
    match pieces.get(&at.0) {
        Some(piece) if piece.owner == owner && is_right(piece.origin) && piece.in_use.is_none() => {
            let origin = piece.origin;
            pieces.remove(&at.0);
            Ok(origin)
        }
        _ => Err(DriverError::Address { op, at, bytes: 0 }),
    }
}

/// The addresses that an owner still has.
pub(super) fn owned(owner: u64) -> Vec<DevicePtr> {
    let pieces = PIECES.read().unwrap_or_else(PoisonError::into_inner);
    pieces.iter().filter(|(_, piece)| piece.owner == owner).map(|(&at, _)| DevicePtr(at)).collect()
}

/// The piece that a range lies in, and the range's place in it.
pub(super) fn find(op: &'static str, at: DevicePtr, bytes: u64) -> Result<(Piece, u64), DriverError> {
    let pieces = PIECES.read().unwrap_or_else(PoisonError::into_inner);
    let found = pieces.range(..=at.0).next_back().and_then(|(&start, piece)| {
        let offset = at.0 - start;
        let fits = offset.checked_add(bytes).is_some_and(|end| end <= piece.bytes);
        fits.then(|| (piece.clone(), offset))
    });
    found.ok_or(DriverError::Address { op, at, bytes })
}

/// The piece that a range lies in, for the host to use: nobody else does, and nobody takes it out, as long as the [`Use`]
/// lives.
pub(super) fn enter(op: &'static str, at: DevicePtr, bytes: u64) -> Result<(Piece, u64, Use), DriverError> {
    let (piece, offset) = find(op, at, bytes)?;
    let held = piece.in_use.enter(offset..offset + bytes);
    // The memory may have been freed while we waited.
    let (again, _) = find(op, at, bytes)?;
    if Arc::ptr_eq(&again.in_use, &piece.in_use) {
        Ok((piece, offset, held))
    } else {
        Err(DriverError::Address { op, at, bytes })
    }
}

/// Whether the host's range touches memory that the device reads at any time: pinned, managed or registered.
pub(super) fn is_pinned(host: *const u8, bytes: usize) -> bool {
    let (start, end) = (host.addr() as u64, host.addr() as u64 + bytes as u64);
    let pieces = PIECES.read().unwrap_or_else(PoisonError::into_inner);
    pieces.iter().any(|(&at, piece)| {
        let from = match piece.origin {
            Origin::Allocated(MemKind::Host | MemKind::Managed) | Origin::Pages { .. } => at,
            Origin::Registered { host } => host as u64,
            Origin::Allocated(MemKind::Device) | Origin::Pool => return false,
        };
        from < end && start < from + piece.bytes
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_uses_ranges_side_by_side_and_no_range_twice() {
        use std::sync::atomic::{AtomicBool, Ordering};
        // Addresses that no host memory has, nor another test.
        const AT: u64 = 3 << 59;
        insert(AT, 64, Origin::Allocated(MemKind::Host), 8);
        let first = enter("op", DevicePtr(AT), 32).unwrap();
        // Would wait forever if the two were kept apart.
        let second = enter("op", DevicePtr(AT + 32), 32).unwrap();
        let left = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let overlapping = scope.spawn(|| {
                let _use = enter("op", DevicePtr(AT + 16), 1).unwrap();
                assert!(left.load(Ordering::SeqCst), "in use by two");
            });
            // Gives the other thread time to enter wrongly.
            std::thread::sleep(std::time::Duration::from_millis(20));
            left.store(true, Ordering::SeqCst);
            drop(first);
            overlapping.join().unwrap();
        });
        assert!(remove("free", DevicePtr(AT), 8, |_| true).is_err(), "freed while in use");
        drop(second);
        remove("free", DevicePtr(AT), 8, |_| true).unwrap();
        assert!(enter("op", DevicePtr(AT), 1).is_err());
    }

    #[test]
    fn only_ranges_within_one_piece_are_found_and_only_owners_take_them_out() {
        // Addresses that no host memory has.
        const AT: u64 = 1 << 60;
        insert(AT, 64, Origin::Allocated(MemKind::Device), 7);
        insert(AT + 64, 64, Origin::Registered { host: 4096 }, 7);
        assert_eq!(find("op", DevicePtr(AT + 60), 4).map(|(_, offset)| offset), Ok(60));
        let refused = |at, bytes| find("op", DevicePtr(at), bytes).is_err();
        assert!(refused(AT + 60, 5) && refused(AT - 1, 2) && refused(AT + 128, 1) && refused(AT, u64::MAX));
        assert!(is_pinned(std::ptr::without_provenance(4096 + 63), 1));
        assert!(!is_pinned(std::ptr::without_provenance(4096 + 64), 1));
        assert!(!is_pinned(std::ptr::without_provenance(AT as usize), 1));
        let is_registered = |origin| matches!(origin, Origin::Registered { .. });
        assert!(remove("free", DevicePtr(AT), 8, |_| true).is_err());
        assert!(remove("free", DevicePtr(AT), 7, is_registered).is_err());
        assert_eq!(owned(7).len(), 2);
        remove("free", DevicePtr(AT), 7, |_| true).unwrap();
        remove("free", DevicePtr(AT + 64), 7, is_registered).unwrap();
        assert!(owned(7).is_empty() && refused(AT, 1));
    }
}
