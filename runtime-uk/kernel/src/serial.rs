//! The serial line: the image's log and, for a prompt on the command line, its answer.
//!
//! A 16550 at the first PC port. Writers on several cores take turns line by line; a fault report writes without asking.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, Ordering};

use spinning_top::Spinlock;

use crate::{clock, port};

/// COM1, where every VMM has it.
const BASE: u16 = 0x3f8;
/// Line status: transmitter empty.
const STATUS: u16 = BASE + 5;
const TRANSMITTER_EMPTY: u8 = 0x20;
/// Reads of the status before a byte is sent anyway: a line that no one drains must not stop the machine.
const PATIENCE: u32 = 100_000;

static LINE: Spinlock<()> = Spinlock::new(());
/// Whether debug messages are shown.
static DEBUG: AtomicBool = AtomicBool::new(false);

struct Uart;

impl Write for Uart {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                put(b'\r');
            }
            put(byte);
        }
        Ok(())
    }
}

fn put(byte: u8) {
    // SAFETY: a 16550 has no access to memory.
    unsafe {
        let mut reads = 0;
        while port::read_u8(STATUS) & TRANSMITTER_EMPTY == 0 && reads < PATIENCE {
            reads += 1;
        }
        port::write_u8(BASE, byte);
    }
}

/// Sets the line up: 115200 8N1, FIFO on, no interrupts.
pub fn init() {
    for (register, value) in [(1, 0u8), (3, 0x80), (0, 1), (1, 0), (3, 3), (2, 0xc7), (4, 0x0b)] {
        // SAFETY: a 16550 has no access to memory.
        unsafe { port::write_u8(BASE + register, value) };
    }
    // A second call finds the logger set already, which is what it wants.
    let _ = log::set_logger(&Logger);
    log::set_max_level(log::LevelFilter::Info);
}

/// Shows debug messages too.
pub fn show_debug() {
    DEBUG.store(true, Ordering::Relaxed);
    log::set_max_level(log::LevelFilter::Debug);
}

/// Writes text as it is.
pub fn print(text: fmt::Arguments<'_>) {
    let _turn = LINE.lock();
    // `Uart` never fails; a `Display` that does has nothing better than what it wrote so far.
    let _ = Uart.write_fmt(text);
}

/// Writes one line with the time since boot.
pub fn line(text: fmt::Arguments<'_>) {
    let at = clock::now().as_micros();
    let _turn = LINE.lock();
    let _ = Uart.write_fmt(format_args!("[{:3}.{:06}] {text}\n", at / 1_000_000, at % 1_000_000));
}

/// Writes without taking turns: for the last words of a machine that may have stopped inside [`line()`].
pub fn last_words(text: fmt::Arguments<'_>) {
    let _ = Uart.write_fmt(text);
}

/// Messages of the device crates.
struct Logger;

impl log::Log for Logger {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::Level::Info || DEBUG.load(Ordering::Relaxed)
    }
    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            line(format_args!("{}: {}", record.target(), record.args()));
        }
    }
    fn flush(&self) {}
}

/// Writes a line to the log.
#[macro_export]
macro_rules! say {
    ($($args:tt)*) => { $crate::serial::line(format_args!($($args)*)) };
}
