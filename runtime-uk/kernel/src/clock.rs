//! Time since boot, from the time stamp counter.
//!
//! The counter's rate comes from the first source that knows it: CPUID leaf 15h, the hypervisor's leaf 40000010h, a
//! measurement against the PIT, which every PC has had, or one against the APIC's timer, which QEMU and KVM run at 1 GHz
//! and microVMs without a PIT have. All cores share the counter: it is invariant on every CPU of the
//! last fifteen years, and hypervisors keep it in step.

use core::arch::x86_64::{__cpuid, _rdtsc};
use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;

use crate::apic::Apic;
use crate::port;

/// The PIT counts at this rate.
const PIT_HZ: u64 = 1_193_182;
/// How long one measurement takes, in ticks of the PIT: 2 ms.
const PIT_TICKS: u16 = 2_386;
/// Measurements. Whoever takes the core away meanwhile makes the counter seem faster: the lowest rate is the truth.
const MEASUREMENTS: usize = 5;
/// What QEMU and KVM drive the APIC's timer with.
const VIRTUAL_BUS_HZ: u64 = 1_000_000_000;
/// Rate assumed where nothing knows it. Time is then wrong by a factor, which only timeouts notice.
const ASSUMED_HZ: u64 = 1_000_000_000;
/// Reads of the PIT's gate before it is taken for absent.
const PIT_PATIENCE: u32 = 2_000_000;

/// Counter at boot.
static START: AtomicU64 = AtomicU64::new(0);
/// Nanoseconds per tick, in 1/2^32.
static SCALE: AtomicU64 = AtomicU64::new(0);

/// How the rate was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// CPUID leaf 15h.
    Cpuid,
    /// CPUID leaf 40000010h.
    Hypervisor,
    /// Measured against the PIT.
    Pit,
    /// Measured against the APIC's timer.
    Apic,
    /// Not found: assumed.
    Assumed,
}

/// The counter.
pub fn ticks() -> u64 {
    // SAFETY: every x86-64 has RDTSC, and ring 0 may always use it.
    unsafe { _rdtsc() }
}

/// Marks the time of boot.
pub fn start() {
    START.store(ticks(), Ordering::Relaxed);
    set_rate(ASSUMED_HZ);
}

/// Finds the counter's rate in Hz.
pub fn calibrate() -> (u64, Source) {
    let found = cpuid_hz()
        .map(|hz| (hz, Source::Cpuid))
        .or_else(|| hypervisor_hz().map(|hz| (hz, Source::Hypervisor)))
        .or_else(|| lowest(pit_hz).map(|hz| (hz, Source::Pit)))
        .or_else(|| lowest(apic_hz).map(|hz| (hz, Source::Apic)))
        .unwrap_or((ASSUMED_HZ, Source::Assumed));
    set_rate(found.0);
    found
}

fn lowest(measure: impl Fn() -> Option<u64>) -> Option<u64> {
    (0..MEASUREMENTS).map(|_| measure()).min().flatten()
}

fn under_hypervisor() -> bool {
    __cpuid(1).ecx & 1 << 31 != 0
}

fn set_rate(hz: u64) {
    SCALE.store(((1_000_000_000u128 << 32) / hz as u128) as u64, Ordering::Relaxed);
}

/// Time since boot.
pub fn now() -> Duration {
    let ticks = ticks().wrapping_sub(START.load(Ordering::Relaxed));
    Duration::from_nanos(nanos(ticks, SCALE.load(Ordering::Relaxed)))
}

fn nanos(ticks: u64, scale: u64) -> u64 {
    ((ticks as u128 * scale as u128) >> 32) as u64
}

/// Waits without giving the core away: for delays of devices.
pub fn spin(time: Duration) {
    let until = now() + time;
    while now() < until {
        core::hint::spin_loop();
    }
}

/// Intel SDM volume 2, CPUID leaf 15h: EBX/EAX is the ratio to the crystal, ECX its rate.
fn cpuid_hz() -> Option<u64> {
    if __cpuid(0).eax < 0x15 {
        return None;
    }
    let leaf = __cpuid(0x15);
    let ratio = |crystal: u64| crystal * u64::from(leaf.ebx) / u64::from(leaf.eax);
    (leaf.eax != 0 && leaf.ebx != 0 && leaf.ecx != 0).then(|| ratio(leaf.ecx.into())).filter(|&hz| hz > 0)
}

/// VMware's timing leaf, which KVM and others offer too: EAX is the rate in kHz.
fn hypervisor_hz() -> Option<u64> {
    if !under_hypervisor() || !(0x4000_0010..0x4000_ffff).contains(&__cpuid(0x4000_0000).eax) {
        return None;
    }
    Some(u64::from(__cpuid(0x4000_0010).eax) * 1000).filter(|&hz| hz > 0)
}

/// Counts while channel 2 of the PIT runs down.
fn pit_hz() -> Option<u64> {
    const GATE: u16 = 0x61;
    const DONE: u8 = 0x20;
    // SAFETY: the PIT and its gate have no access to memory.
    unsafe {
        // Gate on, speaker off; mode 0, both bytes.
        port::write_u8(GATE, (port::read_u8(GATE) & !2) | 1);
        port::write_u8(0x43, 0xb0);
        port::write_u8(0x42, PIT_TICKS as u8);
        port::write_u8(0x42, (PIT_TICKS >> 8) as u8);
        let from = ticks();
        let mut reads = 0;
        while port::read_u8(GATE) & DONE == 0 {
            reads += 1;
            if reads == PIT_PATIENCE {
                return None;
            }
        }
        let counted = ticks() - from;
        // An absent PIT reads as all ones: done at once.
        (reads > 0 && counted > 0).then_some(counted * PIT_HZ / u64::from(PIT_TICKS))
    }
}

/// Counts while the APIC's timer runs down, where its rate is known.
fn apic_hz() -> Option<u64> {
    let count = (VIRTUAL_BUS_HZ / 500) as u32;
    let from = ticks();
    (under_hypervisor() && Apic::this().run_timer_down(count))
        .then(|| (ticks() - from) * 500)
        .filter(|&hz| hz > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nanoseconds_do_not_overflow_in_a_year() {
        let hz = 3_000_000_000u64;
        let scale = ((1_000_000_000u128 << 32) / hz as u128) as u64;
        let year = 365 * 86_400;
        let got = nanos(hz * year, scale);
        let error = (year * 1_000_000_000).abs_diff(got);
        assert!(error < 1_000_000_000, "{error} ns in a year");
    }
}
