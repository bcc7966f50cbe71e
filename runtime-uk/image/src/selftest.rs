//! Breaking the machine on purpose: `selftest=NAME` on the command line, for the tests of the fault report and of the
//! page rights.

use alloc::vec;
use alloc::vec::Vec;
use core::hint::black_box;

use engine::Executor;
use uk_kernel::machine::Machine;
use uk_kernel::say;

/// Does what the name says; none of them returns, but for `cores`.
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
            let code = unsafe { core::mem::transmute::<*const u8, extern "C" fn()>(black_box(code.as_ptr())) };
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
            say!("selftest: expected panic, null, write-text, run-data, stack, worker-stack or memory");
            0
        }
    };
}

#[allow(unconditional_recursion)] // until the guard page
fn overflow(n: usize) -> usize {
    let frame = black_box([n; 64]);
    overflow(frame[n % 64].wrapping_add(1)) + frame[0]
}
