//! From the entry code's state to a machine with memory, cores and a clock.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};
use core::time::Duration;

use crate::acpi;
use crate::apic::{self, Apic};
use crate::boot::{BootError, BootInfo};
use crate::clock;
use crate::cores::{Cores, Halt};
use crate::fault::{self, InterruptTable};
use crate::heap::Heap;
use crate::memory::{Identity, PAGE, Range};
use crate::options::{OptionError, Options};
use crate::paging::{Access, PageTables};
use crate::say;
use crate::serial;

/// Bytes of each worker's stack, of which the lowest page is its guard. The engine's kernels keep their scratch memory on
/// the heap.
const STACK_BYTES: usize = 256 << 10;
/// Where the cores' start code goes: below 1 MiB, page-aligned, in RAM that firmware does not use after boot.
const TRAMPOLINE: u64 = 0x8000;
/// How long cores may take to come up, all together.
const START_TIME: Duration = Duration::from_secs(2);
/// A longest sleep: devices raise no interrupts here, they are asked.
const TICK: Duration = Duration::from_millis(1);

/// Workers that came up; the entry code counts here and takes its stack by the number before.
pub static WORKERS: AtomicU32 = AtomicU32::new(0);
/// The workers' stacks, one after the other.
pub static STACKS: AtomicU64 = AtomicU64::new(0);
/// Bytes of one of them, for the entry code.
pub const STACK_STRIDE: usize = STACK_BYTES;

/// What a worker needs, set before any is started.
static SHARED: AtomicPtr<Shared> = AtomicPtr::new(core::ptr::null_mut());
/// Workers that are ready.
static READY: AtomicU32 = AtomicU32::new(0);

struct Shared {
    root: u64,
    interrupts: InterruptTable,
    cores: Arc<Cores>,
}

/// Where the linker put the image.
#[derive(Clone, Copy, Debug)]
pub struct Image {
    /// Code.
    pub text: Range,
    /// Constants.
    pub rodata: Range,
    /// Variables, and the first stack.
    pub data: Range,
    /// The page below the first stack.
    pub stack_guard: u64,
    /// Start code of the other cores.
    pub trampoline: &'static [u8],
}

/// Why the machine cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MachineError {
    /// The boot information.
    Boot(BootError),
    /// The command line.
    Options(OptionError),
    /// There is no RAM to use.
    NoMemory,
}

impl fmt::Display for MachineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MachineError::Boot(error) => error.fmt(f),
            MachineError::Options(error) => error.fmt(f),
            MachineError::NoMemory => f.write_str("the memory map has no free RAM below 4 GiB"),
        }
    }
}

impl core::error::Error for MachineError {}

/// The machine, once it runs.
pub struct Machine {
    /// The command line.
    pub options: Options,
    /// Files that the boot loader put into memory.
    pub modules: Vec<&'static [u8]>,
    /// RAM in use as the heap.
    pub heap_bytes: u64,
    /// All RAM.
    pub ram: Vec<Range>,
    /// The cores to compute on.
    pub cores: Arc<Cores>,
    tables: PageTables,
}

impl Machine {
    /// Sets the machine up.
    ///
    /// # Safety
    /// * Called once, first, by the entry code: long mode, the first 4 GiB mapped at their addresses, interrupts off,
    ///   `eax` and `ebx` as the boot loader left them.
    /// * `image` tells the truth, and `heap` is the global allocator.
    pub unsafe fn boot(eax: u32, ebx: u32, image: &Image, heap: &Heap) -> Result<Machine, MachineError> {
        clock::start();
        serial::init();
        // SAFETY: the entry code mapped the first 4 GiB; until the heap gets its memory, nobody writes.
        let memory = unsafe { Identity::new() };
        let info = BootInfo::read(eax, ebx, &memory).map_err(MachineError::Boot)?;
        let apic_ids = info.acpi.map(|root| acpi::processors(root, &memory)).unwrap_or_default();
        let all = Range { start: image.text.start, len: image.data.end() - image.text.start };
        let free = info.free(all);
        let below = |range: &Range| range.end() <= 1 << 32;
        if !free.iter().any(below) {
            return Err(MachineError::NoMemory);
        }
        for range in free.iter().copied().filter(below) {
            // SAFETY: free RAM by the memory map, mapped by the entry code; nothing of the boot information is read
            // from memory any more.
            unsafe { heap.add(range) };
        }
        let interrupts = InterruptTable::new();
        interrupts.load();
        apic::mask_pic();
        let mut tables = tables(&info, image);
        // SAFETY: they map the image, all RAM and the devices below 4 GiB at their addresses, and live as long as the
        // machine.
        unsafe { tables.activate() };
        for range in free.iter().copied().filter(|range| !below(range)) {
            // SAFETY: free RAM by the memory map, mapped now.
            unsafe { heap.add(range) };
        }
        let options = Options::parse(&info.command_line).map_err(MachineError::Options)?;
        if options.debug {
            serial::show_debug();
        }
        let apic = Apic::this();
        apic.enable();
        let (hz, source) = clock::calibrate();
        apic.calibrate_timer();
        say!("clock {} MHz ({source:?})", hz / 1_000_000);
        let modules = info.modules.iter().map(|range| {
            // SAFETY: the loader's module lies below 4 GiB, was kept out of the heap, and nobody writes to it.
            unsafe {
                core::slice::from_raw_parts(
                    core::ptr::with_exposed_provenance(range.start as usize),
                    range.len as usize,
                )
            }
        });
        let modules = modules.collect();
        let cores = start_workers(&mut tables, &options, &apic_ids, interrupts, image.trampoline);
        let heap_bytes = free.iter().map(|range| range.len).sum();
        let ram = info.ram.iter().copied().collect();
        Ok(Machine { options, modules, heap_bytes, ram, cores, tables })
    }

    /// Makes a device's registers or memory accessible.
    pub fn map(&mut self, range: Range, access: Access) {
        self.tables.map(range, access);
        // SAFETY: the range is no RAM that Rust uses: the caller has it from a device.
        unsafe { self.tables.activate() };
    }

    /// Sleeps until `deadline`, at most a tick, unless `go_on` holds.
    pub fn sleep(&self, deadline: Option<Duration>, go_on: impl FnOnce() -> bool) {
        let tick = deadline.map_or(TICK, |at| at.saturating_sub(clock::now()).min(TICK));
        if !tick.is_zero() {
            Apic::this().set_timer(tick);
            fault::wait(go_on);
        }
    }
}

/// Starts as many cores as the options ask for, and returns all that are to compute.
fn start_workers(
    tables: &mut PageTables,
    options: &Options,
    apic_ids: &[u32],
    interrupts: InterruptTable,
    trampoline: &[u8],
) -> Arc<Cores> {
    let apic = Apic::this();
    let me = apic.id();
    let wanted = options.threads.unwrap_or(apic_ids.len()).saturating_sub(1);
    let others: Vec<u32> = apic_ids.iter().copied().filter(|&id| id != me).take(wanted).collect();
    let n = others.len();
    if wanted > n {
        say!("threads={}: the machine has {} cores", wanted + 1, n + 1);
    }
    let stacks = Box::leak(stack_pages(n)).as_mut_ptr().expose_provenance() as u64;
    for worker in 0..n as u64 {
        tables.map(Range { start: stacks + worker * STACK_BYTES as u64, len: PAGE }, Access::None);
    }
    // SAFETY: only guard pages, of stacks that are not yet in use, became less than they were.
    unsafe { tables.activate() };
    STACKS.store(stacks, Ordering::Release);
    let cores = Arc::new(Cores::new(n, Halt { apic_ids: others.clone().into_boxed_slice() }));
    let shared = Box::leak(Box::new(Shared { root: tables.root(), interrupts, cores: cores.clone() }));
    SHARED.store(core::ptr::from_ref(shared).cast_mut(), Ordering::Release);
    if n > 0 {
        // SAFETY: the page is RAM below 1 MiB, which is kept out of the heap.
        unsafe {
            let page = core::ptr::with_exposed_provenance_mut::<u8>(TRAMPOLINE as usize);
            core::ptr::copy_nonoverlapping(trampoline.as_ptr(), page, trampoline.len());
        }
        others.iter().for_each(|&id| apic.init(id));
        // Intel SDM volume 3, 9.4.4: 10 ms after INIT, then the start message, and 200 µs later once more.
        clock::spin(Duration::from_millis(10));
        let missing = || READY.load(Ordering::Acquire) < n as u32;
        for _ in 0..2 {
            if missing() {
                others.iter().for_each(|&id| apic.start(id, (TRAMPOLINE / PAGE) as u8));
                clock::spin(Duration::from_micros(200));
            }
        }
        let until = clock::now() + START_TIME;
        while missing() && clock::now() < until {
            core::hint::spin_loop();
        }
    }
    // Cores that did not come up leave their share of the tasks to the others.
    say!("{} of {} cores", READY.load(Ordering::Acquire) + 1, n + 1);
    cores
}

#[repr(C, align(4096))]
struct Page([u8; PAGE as usize]);

fn stack_pages(n: usize) -> Box<[Page]> {
    let pages = n * STACK_BYTES / PAGE as usize;
    (0..pages).map(|_| Page([0; PAGE as usize])).collect::<Vec<_>>().into_boxed_slice()
}

/// RAM is for writing, the rest of the first 4 GiB for devices; the image is cut into what may be done with its parts.
fn tables(info: &BootInfo, image: &Image) -> PageTables {
    let mut tables = PageTables::new();
    tables.map(Range { start: 0, len: 1 << 32 }, Access::Device);
    // ACPI's tables and the firmware's areas are not RAM in the map, but lie beside it: not cached, they still read.
    info.ram.iter().for_each(|range| tables.map(*range, Access::Write));
    info.modules.iter().for_each(|range| tables.map(*range, Access::Read));
    tables.map(image.text, Access::Execute);
    tables.map(image.rodata, Access::Read);
    tables.map(image.data, Access::Write);
    // Null, and the end of the first stack.
    for guard in [0, image.stack_guard] {
        tables.map(Range { start: guard, len: PAGE }, Access::None);
    }
    tables
}

/// What a worker does, called by the entry code with its number on its own stack.
///
/// # Safety
/// * Called by the entry code only: long mode, on the entry code's page tables, interrupts off.
pub unsafe extern "C" fn worker(number: u32) -> ! {
    // SAFETY: the first core set it before it started any other, and it lives for ever.
    let shared = unsafe { &*SHARED.load(Ordering::Acquire) };
    // SAFETY: the tables that the first core uses.
    unsafe {
        core::arch::asm!("mov cr3, {}", in(reg) shared.root, options(nostack, preserves_flags));
    }
    shared.interrupts.load();
    Apic::this().enable();
    READY.fetch_add(1, Ordering::AcqRel);
    shared.cores.work(number as usize);
    loop {
        fault::wait(|| false);
    }
}
