//! Two kernels that exist to be looked at: each holds one barrier between divergent code, and the PTX build requires
//! that one is what comes out. rustc's jump threading and LLVM's branch simplification would both copy a barrier that
//! they do not know to be convergent.

use super::Glb;
use super::sync::sync_threads;
use super::thread::thread_idx_x;

kernels! {
    in "device_checks";
    CANARIES: threads(1024);
    fn (out: Glb<u32>, x: u32);
    "canary_branch" => branch;
    "canary_loop" => in_loop;
}

#[inline(always)]
fn branch(out: Glb<u32>, x: u32) {
    let divergent = thread_idx_x() < x;
    if divergent {
        out.st(0, x);
    }
    sync_threads();
    if divergent {
        out.st(1, x + 1);
    }
}

#[inline(always)]
fn in_loop(out: Glb<u32>, x: u32) {
    let divergent = thread_idx_x() < x;
    let mut i = 0;
    while i < x {
        if divergent {
            out.st(i, x);
        }
        sync_threads();
        if divergent {
            out.st(i + 1, out.ld(i));
        }
        i += 1;
    }
}
