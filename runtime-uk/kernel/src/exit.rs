//! The end of the machine.

use core::arch::asm;

use crate::port;

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
