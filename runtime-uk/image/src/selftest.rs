//! `selftest=NAME` on the command line: breaking the machine on purpose, for the tests of the fault report and of the page
//! rights; and `gpu`, the way to the device and back.

use alloc::vec;
use alloc::vec::Vec;
use core::hint::black_box;

use engine::Executor;
use gpu_kernels::driver::{Driver, DriverError, MemKind, StreamId};
use gpu_kernels::kernels::elementwise::{BinaryArgs, BinaryOp, launch_binary};
use gpu_kernels::launch::DevicePtr;
use gpu_kernels::modules::{FindModule, Modules};
use uk_kernel::clock;
use uk_kernel::devices::Devices;
use uk_kernel::machine::Machine;
use uk_kernel::say;

use crate::gpu;

/// Elements of the GPU's test: more than goes through staging memory.
const ELEMS: usize = 1 << 20;
/// Launches behind one doorbell, and elements of each: few, for the emulator's sake.
const LAUNCHES: u32 = 100;
const LAUNCH_ELEMS: usize = 4096;

/// The way to the GPU and back: copies of both kinds, launches, the numbers that come out.
pub fn gpu(machine: &Machine, devices: &mut Devices) -> Result<(), DriverError> {
    let driver = gpu::open(machine, devices)?;
    let (module, stream) = (Modules::new().find_module(&driver, "binary_f32")?, driver.create_stream()?);
    let x: Vec<f32> = (0..ELEMS).map(|i| (i % 1000) as f32).collect();
    let bytes = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    let size = 4 * ELEMS as u64;
    let (a, y) = (driver.alloc(MemKind::Device, size)?, driver.alloc(MemKind::Device, size)?);
    let x_bytes = bytes(&x);
    let started = clock::now();
    driver.write(a, &x_bytes, stream)?;
    let written = clock::now();
    driver.fill(y, 0, size, stream)?;
    let rest = 4 * LAUNCH_ELEMS as u64;
    driver.copy(y.offset(rest), a.offset(rest), size - rest, stream)?;
    let (n, ids) = (LAUNCH_ELEMS, DevicePtr::NULL);
    let args = BinaryArgs { op: BinaryOp::Add, a, b: y, ids, y, n, period: n, inner: 1 };
    let launch = launch_binary(&args).map_err(|_| DriverError::Unsupported { op: "selftest" })?;
    for _ in 0..LAUNCHES {
        driver.launch(module, &launch, stream)?;
    }
    driver.synchronise(stream)?;
    let computed = clock::now();
    let mut back = vec![0; x_bytes.len()];
    driver.read(&mut back, y, stream)?;
    let read = clock::now();
    let times = |i: usize| if i < LAUNCH_ELEMS { LAUNCHES as f32 } else { 1.0 };
    let got = back.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
    let wrong = got.enumerate().filter(|&(i, got)| got != x[i] * times(i));
    say!(
        "gpu {:?}: {} wrong of {ELEMS}; write {} us, {LAUNCHES} launches {} us, read {} us",
        driver.info().name,
        wrong.count(),
        (written - started).as_micros(),
        (computed - written).as_micros(),
        (read - computed).as_micros()
    );
    driver.free(a)?;
    driver.free(y)?;
    driver.release_stream(stream)?;
    driver.synchronise(StreamId::DEFAULT)
}

/// Does what the name says; none of them returns.
pub fn run(name: &str, machine: &Machine) {
    say!("selftest {name}");
    match name {
        "panic" => panic!("as asked for"),
        // SAFETY: it is not: each of these faults, which is what is tested.
        "null" => unsafe { black_box(core::ptr::without_provenance::<u8>(8)).read_volatile() as usize },
        "write-text" => {
            let code = run as *const () as *mut u8;
            // SAFETY: as above.
            unsafe { black_box(code).write_volatile(0) };
            0
        }
        "run-data" => {
            let code: Vec<u8> = vec![0xc3; 16];
            // SAFETY: as above.
            let code =
                unsafe { core::mem::transmute::<*const u8, extern "C" fn()>(black_box(code.as_ptr())) };
            code();
            0
        }
        "stack" => overflow(1),
        "worker-stack" => {
            machine.cores.run(64, &|i| {
                black_box(overflow(i));
            });
            0
        }
        "memory" => {
            let everything: Vec<u8> = Vec::with_capacity(black_box(1 << 46));
            everything.capacity()
        }
        _ => {
            say!("selftest: expected gpu, panic, null, write-text, run-data, stack, worker-stack or memory");
            0
        }
    };
}

#[allow(unconditional_recursion)] // until the guard page
fn overflow(n: usize) -> usize {
    let frame = black_box([n; 64]);
    overflow(frame[n % 64].wrapping_add(1)) + frame[0]
}
