//! The end of the machine.

use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::{cpu, port};

/// QEMU's `isa-debug-exit`; other machines have nothing at this port.
const DEBUG_EXIT: u16 = 0xf4;
/// The keyboard controller's command port: its reset line ends QEMU with `-no-reboot` and Firecracker alike.
const KEYBOARD: u16 = 0x64;
const RESET: u8 = 0xfe;

/// How the machine ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// What was asked for was done.
    Done = 0,
    /// What was asked for cannot be done; the log says why.
    Failed = 1,
    /// A bug: a panic.
    Panic = 2,
    /// A bug: a processor exception.
    Fault = 3,
}

/// Called before a core reports why the machine ends: the first that comes goes on and must end in [`exit`]. Another core
/// stops here, or its end would cut off the first one's report. The first one again means that its report failed, and
/// ends the machine.
pub fn begin_report(how: Exit) {
    const NOBODY: u64 = u64::MAX;
    static REPORTER: AtomicU64 = AtomicU64::new(NOBODY);
    let me = u64::from(cpu::id());
    match REPORTER.compare_exchange(NOBODY, me, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => {}
        Err(reporter) if reporter == me => exit(how),
        Err(_) => loop {
            // SAFETY: a core without interrupts sleeps until the machine's end.
            unsafe { asm!("cli", "hlt", options(nomem, nostack)) }
        },
    }
}

/// Ends the machine. QEMU's exit status with `isa-debug-exit` is twice the number plus one.
pub fn exit(how: Exit) -> ! {
    // SAFETY: each of these ends the machine or does nothing.
    unsafe {
        port::write_u8(DEBUG_EXIT, how as u8);
        port::write_u8(KEYBOARD, RESET);
        // A triple fault: no interrupt table, then an exception. Hypervisors take it for a reset.
        asm!("lidt [{}]", "ud2", in(reg) &[0u8; 10], options(noreturn))
    }
}
