//! Control and model-specific registers.

use core::arch::asm;
use core::arch::x86_64::{__cpuid, __cpuid_count};

/// Reads a model-specific register.
///
/// # Safety
/// * The register exists; otherwise the processor faults.
pub unsafe fn read_msr(register: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the caller's promise.
    unsafe {
        asm!("rdmsr", in("ecx") register, out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Writes a model-specific register.
///
/// # Safety
/// * The register exists and its new value does not break what Rust relies on.
pub unsafe fn write_msr(register: u32, value: u64) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("wrmsr", in("ecx") register, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack, preserves_flags));
    }
}

/// Whether pages of 1 GiB exist.
pub fn has_huge_pages() -> bool {
    __cpuid(0x8000_0000).eax >= 0x8000_0001 && __cpuid(0x8000_0001).edx & 1 << 26 != 0
}

/// This core's number, as its interrupt controller has it; of eight bits on processors without leaf 0xb.
pub fn id() -> u32 {
    const TOPOLOGY: u32 = 0xb;
    if __cpuid(0).eax >= TOPOLOGY && __cpuid_count(TOPOLOGY, 0).ebx != 0 {
        return __cpuid_count(TOPOLOGY, 0).edx;
    }
    __cpuid(1).ebx >> 24
}
