//! Which vector machine to run on: own detection by cpuid and XCR0, so that it also works without std.

use super::scalar::Scalar;
use super::vector::SimdOp;
#[cfg(target_arch = "x86_64")]
use super::{avx2::Avx2, avx512::Avx512, vector::Simd};

/// A vector machine that this CPU has. Only detection makes one, so holding it is proof.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    AvxVnni,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx512Vbmi,
}

#[cfg(target_arch = "x86_64")]
const ALL: &[Kind] = &[Kind::Avx512Vbmi, Kind::Avx512, Kind::AvxVnni, Kind::Avx2, Kind::Scalar];
#[cfg(not(target_arch = "x86_64"))]
const ALL: &[Kind] = &[Kind::Scalar];

impl Isa {
    /// The best machine of this CPU.
    pub fn detect() -> Isa {
        Isa::available().next().unwrap_or(Isa(Kind::Scalar))
    }

    /// All machines of this CPU, best first; plain Rust last.
    pub fn available() -> impl Iterator<Item = Isa> {
        ALL.iter().copied().filter(|kind| supported(*kind)).map(Isa)
    }

    /// The machine with this name, if this CPU has it.
    pub fn from_name(name: &str) -> Option<Isa> {
        Isa::available().find(|isa| isa.name().eq_ignore_ascii_case(name))
    }

    /// `avx512-vbmi`, `avx512-vnni`, `avx-vnni`, `avx2` or `scalar`.
    pub fn name(self) -> &'static str {
        match self.0 {
            Kind::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Kind::AvxVnni => "avx-vnni",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => "avx512-vnni",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512Vbmi => "avx512-vbmi",
        }
    }

    /// Runs a kernel on this machine.
    pub(super) fn run<O: SimdOp>(self, op: O) -> O::Output {
        match self.0 {
            Kind::Scalar => op.run(Scalar),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => {
                // SAFETY: an `Isa` of this kind exists only if `supported` said so.
                let token = unsafe { Avx2::<false>::new_unchecked() };
                token.call(op)
            }
            #[cfg(target_arch = "x86_64")]
            Kind::AvxVnni => {
                // SAFETY: an `Isa` of this kind exists only if `supported` said so.
                let token = unsafe { Avx2::<true>::new_unchecked() };
                token.call(op)
            }
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 | Kind::Avx512Vbmi => {
                // SAFETY: an `Isa` of this kind exists only if `supported` said so.
                let token = unsafe { Avx512::new_unchecked(self.0 == Kind::Avx512Vbmi) };
                token.call(op)
            }
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn supported(_kind: Kind) -> bool {
    true
}

/// Bits by Intel's SDM, volume 2, CPUID; XCR0 by volume 1, chapter 13.
#[cfg(target_arch = "x86_64")]
fn supported(kind: Kind) -> bool {
    use core::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};

    #[target_feature(enable = "xsave")]
    fn xcr0() -> u64 {
        // SAFETY: `xsave` is enabled by this function's contract; register 0 always exists.
        unsafe { _xgetbv(0) }
    }
    if kind == Kind::Scalar {
        return true;
    }
    let max_leaf = __cpuid(0).eax;
    if max_leaf < 7 {
        return false;
    }
    let one = __cpuid(1).ecx;
    let has = |word: u32, bits: &[u32]| bits.iter().all(|b| word & (1 << b) != 0);
    // FMA, OSXSAVE, AVX, F16C; AVX2.
    let seven = __cpuid_count(7, 0);
    if !has(one, &[12, 27, 28, 29]) || !has(seven.ebx, &[5]) {
        return false;
    }
    // SAFETY: OSXSAVE is set, so XGETBV is enabled.
    let saved = unsafe { xcr0() };
    let ymm = saved & 0b110 == 0b110;
    let zmm = saved & 0b1110_0110 == 0b1110_0110;
    match kind {
        Kind::Scalar => true,
        Kind::Avx2 => ymm,
        // Leaf 7.1 exists only if leaf 7.0 says so.
        Kind::AvxVnni => ymm && seven.eax >= 1 && has(__cpuid_count(7, 1).eax, &[4]),
        // F, DQ, BW, VL; VNNI and, if named, VBMI.
        Kind::Avx512 | Kind::Avx512Vbmi => {
            let named: &[u32] = if kind == Kind::Avx512Vbmi { &[1, 11] } else { &[11] };
            zmm && has(seven.ebx, &[16, 17, 30, 31]) && has(seven.ecx, named)
        }
    }
}
