//! A guest whose RAM the broker maps: this program's heap is that RAM, as it is in the image.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs::File;
use std::os::fd::FromRawFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{count, run_cases, windowed};
use gpu_kernels::driver::{Driver, MemKind, StreamId};
use memmap2::{MmapOptions, MmapRaw};
use runtime_uk::Window;
use spinning_top::RawSpinlock;
use talc::TalcLock;
use talc::source::Manual;
use uk_broker::GuestWindow;

const RAM_BYTES: usize = 64 << 20;
const STREAM: StreamId = StreamId::DEFAULT;

/// A heap in shared memory, once there is some; the system's before.
struct Heap {
    shared: TalcLock<RawSpinlock, Manual>,
    start: AtomicUsize,
}

#[global_allocator]
static HEAP: Heap = Heap { shared: TalcLock::new(Manual), start: AtomicUsize::new(0) };

// SAFETY: memory comes from one of two allocators and goes back to the one whose range it lies in.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if self.start.load(Ordering::Acquire) != 0 {
            // SAFETY: the caller's contract.
            let at = unsafe { self.shared.alloc(layout) };
            if !at.is_null() {
                return at;
            }
        }
        // SAFETY: the caller's contract.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        let start = self.start.load(Ordering::Acquire);
        if start != 0 && (start..start + RAM_BYTES).contains(&at.addr()) {
            // SAFETY: it came from there.
            unsafe { self.shared.dealloc(at, layout) }
        } else {
            // SAFETY: it came from there.
            unsafe { System.dealloc(at, layout) }
        }
    }
}

/// The shared memory, from its first use on the heap.
fn ram() -> &'static (File, MmapRaw) {
    static RAM: OnceLock<(File, MmapRaw)> = OnceLock::new();
    RAM.get_or_init(|| {
        // SAFETY: a name and flags; the descriptor is new, and ours.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"guest".as_ptr(), 0)) };
        file.set_len(RAM_BYTES as u64).unwrap();
        let map = MmapOptions::new().map_raw(&file).unwrap();
        // SAFETY: mapped for ever (the static is never dropped), and nobody else's.
        unsafe { HEAP.shared.lock().claim(map.as_mut_ptr(), RAM_BYTES) }.unwrap();
        HEAP.start.store(map.as_mut_ptr().expose_provenance(), Ordering::Release);
        (file, map)
    })
}

struct Ram;

impl Window for Ram {
    fn offset(&self, at: *const u8, bytes: usize) -> Option<u64> {
        let offset = at.addr().checked_sub(ram().1.as_ptr().addr())?;
        (offset + bytes <= RAM_BYTES).then_some(offset as u64)
    }
}

fn map() -> GuestWindow {
    GuestWindow::map(&ram().0).unwrap()
}

/// With the window known to the driver, and with copies through the broker.
#[test]
fn kernels_run() {
    for register in [true, false] {
        let (driver, broker) = windowed(Box::new(Ram), map(), register);
        run_cases(&driver, "rms_norm", 2);
        run_cases(&driver, "softmax", 2);
        assert_eq!(count(&broker.metrics.failures), 0);
        drop(driver);
        broker.end().unwrap();
    }
}

/// Long copies from and to memory within and outside the window; more small ones than staging memory holds.
#[test]
fn copies_in_place() {
    for register in [true, false] {
        let (driver, broker) = windowed(Box::new(Ram), map(), register);
        let data: Vec<u8> =
            (0..(3 << 20) + 5).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        assert!(Ram.offset(data.as_ptr(), data.len()).is_some(), "the heap is the window");
        let outside = vec![0u8; RAM_BYTES];
        assert!(Ram.offset(outside.as_ptr(), outside.len()).is_none());
        let at = driver.alloc(MemKind::Device, data.len() as u64).unwrap();
        let before = count(&broker.metrics.submissions);
        driver.write(at, &data, STREAM).unwrap();
        assert_eq!(count(&broker.metrics.submissions) - before, 1, "one copy in place");
        let mut back = vec![0; data.len()];
        driver.read(&mut back, at, STREAM).unwrap();
        assert!(back == data);
        driver.write(at, &outside[..2 << 20], STREAM).unwrap();
        for piece in 0..40u64 {
            driver.write(at.offset(piece * 60_000), &data[..60_000], STREAM).unwrap();
        }
        driver.read(&mut back[..40 * 60_000], at, STREAM).unwrap();
        assert!(back[..40 * 60_000].chunks(60_000).all(|piece| piece == &data[..60_000]));
        drop(driver);
        broker.end().unwrap();
    }
}

/// A stream that is released behind a copy of its own takes no other command's reply with it.
#[test]
fn a_stream_goes_with_copies_under_way() {
    let (driver, broker) = windowed(Box::new(Ram), map(), true);
    let at = driver.alloc(MemKind::Device, 4096).unwrap();
    for _ in 0..3 {
        let stream = driver.create_stream().unwrap();
        driver.write(at, &[5; 4096], stream).unwrap();
        driver.release_stream(stream).unwrap();
        let next = driver.alloc(MemKind::Device, 64).unwrap();
        driver.free(next).unwrap();
    }
    let mut back = [0; 4096];
    driver.read(&mut back, at, STREAM).unwrap();
    assert_eq!(back, [5; 4096]);
    drop(driver);
    broker.end().unwrap();
}

/// The ring wraps around: many more commands than it has slots.
#[test]
fn many_commands() {
    let (driver, broker) = windowed(Box::new(Ram), map(), true);
    let at = driver.alloc(MemKind::Device, 10_000).unwrap();
    for i in 0..10_000u64 {
        driver.fill(at.offset(i), i as u8, 1, STREAM).unwrap();
    }
    let mut back = vec![0; 10_000];
    driver.read(&mut back, at, STREAM).unwrap();
    assert!(back.iter().enumerate().all(|(i, byte)| *byte == i as u8));
    drop(driver);
    broker.end().unwrap();
}
