//! The local interrupt controller: start other cores, wake them, and a timer to wake ourselves.

use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;

use crate::{clock, cpu, port};

/// Wakes a core by its timer.
pub const TIMER_VECTOR: u8 = 0x20;
/// Wakes a core on behalf of another.
pub const WAKE_VECTOR: u8 = 0x21;
/// What the controller raises when an interrupt vanished before it was taken.
pub const SPURIOUS_VECTOR: u8 = 0xff;

const BASE_MSR: u32 = 0x1b;
const X2APIC_ENABLED: u64 = 1 << 10;
/// x2APIC registers are MSRs from here on, one per 16 bytes of the xAPIC page.
const X2APIC_MSR: u32 = 0x800;

const ID: u32 = 0x20;
const END_OF_INTERRUPT: u32 = 0xb0;
const SPURIOUS: u32 = 0xf0;
const COMMAND: u32 = 0x300;
const COMMAND_TARGET: u32 = 0x310;
const TIMER: u32 = 0x320;
const TIMER_COUNT: u32 = 0x380;
const TIMER_NOW: u32 = 0x390;
const TIMER_DIVIDE: u32 = 0x3e0;

/// Reads of a timer before it is taken for stopped.
const TIMER_PATIENCE: u32 = 10_000_000;

const BUSY: u32 = 1 << 12;
const MASKED: u32 = 1 << 16;
const INIT: u32 = 0x4500;
const START: u32 = 0x4600;
const FIXED: u32 = 0x4000;

/// Address of the end-of-interrupt register; 0 in x2APIC mode. The interrupt stubs read it.
pub(crate) static END_OF_INTERRUPT_AT: AtomicU64 = AtomicU64::new(0);
/// Timer counts per millisecond.
static TIMER_RATE: AtomicU64 = AtomicU64::new(0);

/// The controller of the core that this code runs on.
#[derive(Clone, Copy, Debug)]
pub struct Apic {
    /// `None` in x2APIC mode.
    page: Option<usize>,
}

impl Apic {
    /// The controller, as the firmware left its mode.
    pub fn this() -> Apic {
        // SAFETY: every x86-64 has the register.
        let base = unsafe { cpu::read_msr(BASE_MSR) };
        Apic { page: (base & X2APIC_ENABLED == 0).then_some((base & 0xf_ffff_f000) as usize) }
    }

    /// The page of its registers, if they are memory.
    pub fn page(self) -> Option<u64> {
        self.page.map(|page| page as u64)
    }

    fn read(self, register: u32) -> u32 {
        // SAFETY: registers of the local APIC, which every core has; the page is mapped with its own address.
        unsafe {
            match self.page {
                Some(page) => {
                    core::ptr::with_exposed_provenance::<u32>(page + register as usize).read_volatile()
                }
                None => cpu::read_msr(X2APIC_MSR + register / 16) as u32,
            }
        }
    }

    fn write(self, register: u32, value: u32) {
        // SAFETY: as in `read`; writers below only start cores at our own code and set up interrupts that have handlers.
        unsafe {
            match self.page {
                Some(page) => core::ptr::with_exposed_provenance_mut::<u32>(page + register as usize)
                    .write_volatile(value),
                None => cpu::write_msr(X2APIC_MSR + register / 16, value.into()),
            }
        }
    }

    /// This core's number.
    pub fn id(self) -> u32 {
        let id = self.read(ID);
        if self.page.is_some() { id >> 24 } else { id }
    }

    /// Turns the controller on. Interrupts stay off in the core but for moments of waiting.
    pub fn enable(self) {
        let at = self.page.map_or(0, |page| page as u64 + u64::from(END_OF_INTERRUPT));
        END_OF_INTERRUPT_AT.store(at, Ordering::Relaxed);
        self.write(SPURIOUS, 0x100 | u32::from(SPURIOUS_VECTOR));
    }

    fn command(self, target: u32, command: u32) {
        match self.page {
            Some(_) => {
                self.write(COMMAND_TARGET, target << 24);
                self.write(COMMAND, command);
                while self.read(COMMAND) & BUSY != 0 {
                    core::hint::spin_loop();
                }
            }
            // SAFETY: the command register, as in `write`.
            None => unsafe {
                cpu::write_msr(X2APIC_MSR + COMMAND / 16, u64::from(target) << 32 | u64::from(command));
            },
        }
    }

    /// Resets a core: it then waits for [`Apic::start`].
    pub fn init(self, target: u32) {
        self.command(target, INIT);
    }

    /// Starts a core in real mode at `page` * 4096.
    pub fn start(self, target: u32, page: u8) {
        self.command(target, START | u32::from(page));
    }

    /// Wakes a core.
    pub fn wake(self, target: u32) {
        self.command(target, FIXED | u32::from(WAKE_VECTOR));
    }

    /// Starts the timer without its interrupt, at the bus's rate.
    fn count_down(self, from: u32) {
        self.write(TIMER_DIVIDE, 0b1011);
        self.write(TIMER, MASKED | u32::from(TIMER_VECTOR));
        self.write(TIMER_COUNT, from);
    }

    /// Waits until the timer has counted down; whether it counts at all.
    pub fn run_timer_down(self, from: u32) -> bool {
        self.count_down(from);
        let mut reads = 0;
        while self.read(TIMER_NOW) != 0 {
            reads += 1;
            if reads == TIMER_PATIENCE {
                return false;
            }
        }
        reads > 0
    }

    /// Measures the timer against the clock.
    pub fn calibrate_timer(self) {
        const SPAN: Duration = Duration::from_millis(2);
        self.count_down(u32::MAX);
        let started = clock::now();
        clock::spin(SPAN);
        let counted = u64::from(u32::MAX - self.read(TIMER_NOW));
        let micros = (clock::now() - started).as_micros() as u64;
        self.write(TIMER_COUNT, 0);
        TIMER_RATE.store((counted * 1000 / micros.max(1)).max(1), Ordering::Relaxed);
        self.write(TIMER, TIMER_VECTOR.into());
    }

    /// One interrupt after this time.
    pub fn set_timer(self, after: Duration) {
        let count = after.as_micros() as u64 * TIMER_RATE.load(Ordering::Relaxed) / 1000;
        self.write(TIMER_COUNT, count.clamp(1, u32::MAX.into()) as u32);
    }
}

/// Masks the old interrupt controller, whose vectors are those of exceptions.
pub fn mask_pic() {
    // SAFETY: the 8259s have no access to memory.
    unsafe {
        port::write_u8(0x21, 0xff);
        port::write_u8(0xa1, 0xff);
    }
}
