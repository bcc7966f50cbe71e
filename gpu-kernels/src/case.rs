//! A kernel's cases: a problem as data, so that one harness serves the emulator test, the GPU conformance test and the
//! benchmark.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;

use half::{bf16, f16};

use crate::driver::{Driver, DriverError, MemKind, StreamId};
use crate::launch::{DevicePtr, Launch, LaunchError};
use crate::modules::FindModule;

/// A kernel, as its file declares it.
pub trait Kernel: 'static {
    /// Name of the file and of the entries' first part.
    const NAME: &'static str;
    /// Shapes and types of one case.
    type Case: fmt::Debug + Copy + 'static;
    /// The cases: odd sizes, every tile edge, every type.
    const CASES: &'static [Self::Case];
    /// Largest mean squared error allowed, relative to the mean square of the reference. The contract says why.
    const NMSE_MAX: f64;
    /// Shapes to time: those of models.
    const BENCH: &'static [Self::Case] = &[];
    /// The tiers that have the entries.
    const TIERS: Tiers = Tiers::All;
    /// The entries, for the emulator.
    #[cfg(feature = "emu")]
    const ENTRIES: &'static [&'static [crate::emu::Entry]];

    /// Inputs, launch and expected outputs of a case. For timing ([`Random::is_timing`]) expected outputs count only by
    /// their size, so a reference that would take long may be left out.
    fn problem(case: &Self::Case, random: &mut Random) -> Problem;
    /// What ggml's `test-backend-ops perf` calls the same work: the start of its line.
    fn peer(case: &Self::Case) -> Option<String> {
        let _ = case;
        None
    }
    /// Bytes that a case must move to and from memory.
    fn bytes(case: &Self::Case) -> u64;
    /// Arithmetic operations of a case.
    fn flops(case: &Self::Case) -> u64;
}

/// Tiers of the PTX build.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tiers {
    /// Every tier.
    All,
    /// Those from this compute capability (times ten) on.
    From(u32),
    /// The one of this name.
    Only(&'static str),
}

impl Tiers {
    /// Whether the tier of this name and compute capability (times ten) is among them.
    pub fn has(self, name: &str, sm: u32) -> bool {
        match self {
            Tiers::All => true,
            Tiers::From(oldest) => sm >= oldest,
            Tiers::Only(only) => name == only,
        }
    }
}

/// [`Kernel`] without its types: what the registry holds.
pub trait AnyKernel: Sync {
    /// [`Kernel::NAME`].
    fn name(&self) -> &'static str;
    /// [`Kernel::NMSE_MAX`].
    fn nmse_max(&self) -> f64;
    /// Number of cases.
    fn n_cases(&self) -> usize;
    /// Number of shapes to time. They are the cases from [`AnyKernel::n_cases`] on.
    fn n_bench(&self) -> usize;
    /// Case `i` in words.
    fn label(&self, i: usize) -> String;
    /// The problem of case `i`, from a seed.
    fn problem(&self, i: usize, seed: u64) -> Problem;
    /// The problem of case `i` for timing.
    fn bench(&self, i: usize, seed: u64) -> Problem;
    /// [`Kernel::peer`] of case `i`.
    fn peer(&self, i: usize) -> Option<String>;
    /// [`Kernel::bytes`] of case `i`.
    fn bytes(&self, i: usize) -> u64;
    /// [`Kernel::flops`] of case `i`.
    fn flops(&self, i: usize) -> u64;
    /// [`Kernel::TIERS`].
    fn tiers(&self) -> Tiers;
    /// [`Kernel::ENTRIES`].
    #[cfg(feature = "emu")]
    fn entries(&self) -> &'static [&'static [crate::emu::Entry]];
}

fn case<K: Kernel>(i: usize) -> &'static K::Case {
    let n_cases = K::CASES.len();
    if i < n_cases { &K::CASES[i] } else { &K::BENCH[i - n_cases] }
}

impl<K: Kernel + Sync> AnyKernel for K {
    fn name(&self) -> &'static str {
        K::NAME
    }
    fn nmse_max(&self) -> f64 {
        K::NMSE_MAX
    }
    fn tiers(&self) -> Tiers {
        K::TIERS
    }
    fn n_cases(&self) -> usize {
        K::CASES.len()
    }
    fn n_bench(&self) -> usize {
        K::BENCH.len()
    }
    fn label(&self, i: usize) -> String {
        format!("{:?}", case::<K>(i))
    }
    fn problem(&self, i: usize, seed: u64) -> Problem {
        K::problem(case::<K>(i), &mut Random::new(seed))
    }
    fn bench(&self, i: usize, seed: u64) -> Problem {
        K::problem(case::<K>(i), &mut Random::for_timing(seed))
    }
    fn peer(&self, i: usize) -> Option<String> {
        K::peer(case::<K>(i))
    }
    fn bytes(&self, i: usize) -> u64 {
        K::bytes(case::<K>(i))
    }
    fn flops(&self, i: usize) -> u64 {
        K::flops(case::<K>(i))
    }
    #[cfg(feature = "emu")]
    fn entries(&self) -> &'static [&'static [crate::emu::Entry]] {
        K::ENTRIES
    }
}

/// Launches of a problem, given the addresses of its buffers.
pub type Launches = Box<dyn Fn(&[DevicePtr]) -> Result<Vec<Launch>, LaunchError>>;

/// One case made concrete.
pub struct Problem {
    /// Inputs first filled, outputs to be written.
    pub buffers: Vec<Buffer>,
    /// What to launch.
    pub launches: Launches,
}

/// One array of a problem.
pub enum Buffer {
    /// Contents before the launch.
    Input(Vec<u8>),
    /// Contents expected after it.
    Output(Expected),
    /// Contents before and after.
    Changed(Vec<u8>, Expected),
}

/// What an output must hold.
pub enum Expected {
    /// These bytes.
    Exact(Vec<u8>),
    /// What this other buffer holds after the launches, bit for bit: for a fused kernel beside the separate ones.
    Same {
        /// Which buffer.
        buffer: usize,
        /// Bytes of both.
        bytes: usize,
    },
    /// These values, within the kernel's error, as f32.
    F32(Vec<f64>),
    /// As f16.
    F16(Vec<f64>),
    /// As bf16.
    Bf16(Vec<f64>),
    /// Anything, in this many bytes: for timing, or for what only a later launch of the problem reads.
    Unchecked(usize),
}

impl Expected {
    /// Bytes of the output.
    pub fn bytes(&self) -> usize {
        match self {
            Expected::Unchecked(bytes) => *bytes,
            Expected::Exact(bytes) => bytes.len(),
            Expected::Same { bytes, .. } => *bytes,
            Expected::F32(values) => 4 * values.len(),
            Expected::F16(values) | Expected::Bf16(values) => 2 * values.len(),
        }
    }
}

/// Why a case failed.
#[derive(Debug)]
pub enum CaseError {
    /// The launcher refused.
    Launch(LaunchError),
    /// The driver, or in the emulator the kernel, failed.
    Driver(DriverError),
    /// An output is wrong.
    Mismatch {
        /// Which buffer.
        buffer: usize,
        /// Element of the largest error.
        at: usize,
        /// Expected there.
        expected: f64,
        /// Found there.
        got: f64,
        /// Error over the whole buffer.
        nmse: f64,
    },
}

impl fmt::Display for CaseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CaseError::Launch(error) => error.fmt(f),
            CaseError::Driver(error) => error.fmt(f),
            CaseError::Mismatch { buffer, at, expected, got, nmse } => {
                write!(f, "buffer {buffer}: element {at} is {got}, expected {expected} (nmse {nmse:.3e})")
            }
        }
    }
}

impl core::error::Error for CaseError {}

impl From<DriverError> for CaseError {
    fn from(error: DriverError) -> CaseError {
        CaseError::Driver(error)
    }
}

/// Runs a problem and compares; returns the largest error of its outputs. `modules` has the kernels: a [`ModuleId`]
/// (the emulator's) or [`Modules`].
///
/// [`ModuleId`]: crate::driver::ModuleId
/// [`Modules`]: crate::modules::Modules
///
/// Outputs start as NaN, so an element that no thread writes is an error.
pub fn run(
    driver: &dyn Driver,
    mut modules: impl FindModule,
    problem: &Problem,
    nmse_max: f64,
) -> Result<f64, CaseError> {
    let stream = StreamId::DEFAULT;
    let mut pointers = Vec::new();
    let result = (|| {
        for buffer in &problem.buffers {
            let bytes = match buffer {
                Buffer::Input(bytes) | Buffer::Changed(bytes, _) => bytes.len(),
                Buffer::Output(expected) => expected.bytes(),
            };
            let at = driver.alloc(MemKind::Device, bytes as u64)?;
            pointers.push(at);
            match buffer {
                Buffer::Input(bytes) | Buffer::Changed(bytes, _) => driver.write(at, bytes, stream)?,
                Buffer::Output(_) => driver.fill(at, 0xff, bytes as u64, stream)?,
            }
        }
        for launch in (problem.launches)(&pointers).map_err(CaseError::Launch)? {
            let module = modules.find_module(driver, launch.entry)?;
            driver.launch(module, &launch, stream)?;
        }
        driver.synchronise(stream)?;
        let mut worst = 0.0f64;
        for (i, (buffer, &at)) in problem.buffers.iter().zip(&pointers).enumerate() {
            let (Buffer::Output(expected) | Buffer::Changed(_, expected)) = buffer else { continue };
            let mut got = vec![0; expected.bytes()];
            driver.read(&mut got, at, stream)?;
            let same;
            let expected = match expected {
                Expected::Same { buffer, bytes } => {
                    let mut other = vec![0; *bytes];
                    driver.read(&mut other, pointers[*buffer], stream)?;
                    same = Expected::Exact(other);
                    &same
                }
                other => other,
            };
            worst = worst.max(compare(i, expected, &got, nmse_max)?);
        }
        Ok(worst)
    })();
    for at in pointers {
        driver.free(at)?;
    }
    result
}

fn compare(buffer: usize, expected: &Expected, got: &[u8], nmse_max: f64) -> Result<f64, CaseError> {
    let halves = || got.as_chunks::<2>().0.iter().map(|&bytes| u16::from_le_bytes(bytes));
    let (expected, got): (Vec<f64>, Vec<f64>) = match expected {
        Expected::Same { .. } => unreachable!("`run` reads the other buffer"),
        Expected::Exact(bytes) => {
            return match bytes.iter().zip(got).position(|(a, b)| a != b) {
                None => Ok(0.0),
                Some(at) => {
                    let (expected, got) = (bytes[at].into(), got[at].into());
                    Err(CaseError::Mismatch { buffer, at, expected, got, nmse: f64::NAN })
                }
            };
        }
        Expected::Unchecked(_) => return Ok(0.0),
        Expected::F32(values) => {
            let got = got.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes).into());
            (values.clone(), got.collect())
        }
        Expected::F16(values) => {
            (values.clone(), halves().map(|bits| f16::from_bits(bits).to_f64()).collect())
        }
        Expected::Bf16(values) => {
            (values.clone(), halves().map(|bits| bf16::from_bits(bits).to_f64()).collect())
        }
    };
    let (mut error, mut power, mut worst) = (0.0, 0.0, (0, 0.0));
    for (at, (&e, &g)) in expected.iter().zip(&got).enumerate() {
        let difference = (g - e).abs();
        error += difference * difference;
        power += e * e;
        // A NaN is worst of all.
        let difference = if difference.is_nan() { f64::INFINITY } else { difference };
        if difference > worst.1 {
            worst = (at, difference);
        }
    }
    let nmse = if error == 0.0 { 0.0 } else { error / power };
    if nmse <= nmse_max {
        return Ok(nmse);
    }
    let at = worst.0;
    Err(CaseError::Mismatch { buffer, at, expected: expected[at], got: got[at], nmse })
}

/// Numbers for inputs: SplitMix64, so that a seed means the same everywhere.
#[derive(Clone, Debug)]
pub struct Random {
    state: u64,
    timing: bool,
}

impl Random {
    /// The sequence of a seed.
    pub fn new(seed: u64) -> Random {
        Random { state: seed, timing: false }
    }

    /// The same, for a problem that is only timed.
    pub fn for_timing(seed: u64) -> Random {
        Random { state: seed, timing: true }
    }

    /// Whether the problem is only timed, so that its expected outputs need not be right.
    pub fn is_timing(&self) -> bool {
        self.timing
    }

    /// 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// An integer below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.bits() % bound
    }

    /// A value as tensors hold them: a bell around zero, and one in 64 an outlier up to 8 times as large.
    pub fn value(&mut self) -> f32 {
        let mut uniform = || (self.bits() >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
        let bell = uniform() + uniform() + uniform();
        if uniform() > 0.5 - 1.0 / 64.0 { 8.0 * bell } else { bell }
    }

    /// Many of them.
    pub fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.value()).collect()
    }
}

/// The bytes of a slice, as the device holds it.
pub fn bytes_of<T: bytemuck::NoUninit>(values: &[T]) -> Vec<u8> {
    bytemuck::cast_slice(values).to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compare_finds_wrong_values_and_missing_ones() {
        let expected = Expected::F32(vec![1.0, -2.0, 3.0]);
        let bytes = |values: [f32; 3]| bytes_of(&values);
        assert_eq!(compare(0, &expected, &bytes([1.0, -2.0, 3.0]), 0.0).unwrap(), 0.0);
        assert!(compare(0, &expected, &bytes([1.0, -2.0, 3.00001]), 1e-9).is_ok());
        for wrong in [4.0, f32::NAN] {
            let error = compare(7, &expected, &bytes([1.0, -2.0, wrong]), 1e-9).unwrap_err();
            assert!(matches!(error, CaseError::Mismatch { buffer: 7, at: 2, .. }), "{error}");
        }
        assert!(compare(0, &Expected::Exact(vec![1, 2]), &[1, 3], 1.0).is_err());
    }

    #[test]
    fn random_values_are_bell_shaped_with_outliers() {
        let values = Random::new(1).values(4096);
        assert!(values.iter().all(|v| v.is_finite()));
        assert!(
            values.iter().any(|v| v.abs() > 2.0) && values.iter().filter(|v| v.abs() < 0.5).count() > 2048
        );
    }
}
