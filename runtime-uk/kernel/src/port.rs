//! x86 I/O ports. Ports belong to devices; who owns which is said at each use.

use core::arch::asm;

/// Writes a byte.
///
/// # Safety
/// * The device at the port must not be made to touch memory that Rust owns.
pub unsafe fn write_u8(port: u16, value: u8) {
    // SAFETY: `out` itself touches no memory; the effect on the device is the caller's promise.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) }
}

/// Reads a byte.
///
/// # Safety
/// * As for [`write_u8`]: reading may have effects on the device.
pub unsafe fn read_u8(port: u16) -> u8 {
    let value;
    // SAFETY: as above.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) }
    value
}

/// Writes a 32-bit word.
///
/// # Safety
/// * As for [`write_u8`].
pub unsafe fn write_u32(port: u16, value: u32) {
    // SAFETY: as above.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack, preserves_flags)) }
}

/// Reads a 32-bit word.
///
/// # Safety
/// * As for [`write_u8`].
pub unsafe fn read_u32(port: u16) -> u32 {
    let value;
    // SAFETY: as above.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack, preserves_flags)) }
    value
}
