//! Bulk copies, products of warpgroups and their fences on the emulator: each bug planted once, the right form passes, and
//! products are what the definition says, from every layout of operands.

use std::format;
use std::string::{String, ToString};
use std::vec;
use std::vec::Vec;

use half::{bf16, f16};

use super::{Emulator, Entry, Options};
use crate::case::Random;
use crate::device::mma::FragmentA;
use crate::device::sync::{self, Mbarrier};
use crate::device::thread::{block_idx_x, grid_dim_x, lane_id, thread_idx_x, warp_id};
use crate::device::wgmma::{
    self, Bf16N128, F16N64, F16N128, F16N128T, Operand, Registers, S8N64, S8N128, Sums,
};
use crate::device::{Glb, Smem, U32x4, bulk_copy, warp};
use crate::driver::{Driver, MemKind, StreamId};
use crate::launch::{Launch, Params};

smem! {
    struct Shared {
        a: [U32x4; 512],
        b: [U32x4; 1024],
        barriers: [u64; 2],
        words: [u32; 128],
    }
}

/// Bytes of A (64 rows of 128) and of B (128 rows).
const A_BYTES: usize = 64 * 128;
const B_BYTES: usize = 128 * 128;

/// Runs an entry of two arguments, memory and a number, on a CTA of 128 threads; returns the memory.
fn run(entry: &Entry, number: u32, memory: &[u8], seed: u64) -> Result<Vec<u8>, String> {
    run_cluster(entry, 1, number, memory, seed)
}

/// The same on a cluster of so many CTAs.
fn run_cluster(entry: &Entry, ctas: u32, number: u32, memory: &[u8], seed: u64) -> Result<Vec<u8>, String> {
    let emulator = Emulator::new(Options { seed, ..Options::default() });
    let at = emulator.alloc(MemKind::Device, memory.len() as u64).unwrap();
    emulator.write(at, memory, StreamId::DEFAULT).unwrap();
    let launch = Launch {
        entry: entry.name,
        grid: [ctas, 1, 1],
        cta: 128,
        cluster: ctas,
        smem_bytes: Shared::BYTES,
        params: Params::new().with(at).with(number),
    };
    emulator.run(entry, &launch).map_err(|error| error.to_string())?;
    let mut memory = vec![0; memory.len()];
    emulator.read(&mut memory, at, StreamId::DEFAULT).unwrap();
    Ok(memory)
}

/// The bug is found, described so, with this file's name; without it the kernel passes, in any order of threads.
fn planted(entry: &Entry, what: &str) {
    let memory = vec![1; A_BYTES + B_BYTES];
    for seed in 0..3 {
        let passed = run(entry, 0, &memory, seed);
        passed.unwrap_or_else(|error| panic!("{} without its bug: {error}", entry.name));
    }
    let error = run(entry, 1, &memory, 1).expect_err(entry.name);
    assert!(error.contains(what), "{}: {error}", entry.name);
}

/// A test for one kernel: `bug` is 1 to misbehave.
macro_rules! plant {
    ($name:ident, $what:literal, |$memory:ident, $bug:ident| $body:block) => {
        #[test]
        fn $name() {
            fn kernel($memory: Glb<U32x4>, $bug: u32) $body
            kernels! {
                in "emulator_tests";
                TABLE: threads(128);
                fn (memory: Glb<U32x4>, bug: u32);
                stringify!($name) => kernel;
            }
            planted(&TABLE[0], $what);
        }
    };
}

/// An mbarrier of one arrival, ready for all.
fn barrier() -> Mbarrier {
    let barrier = Mbarrier::at(Shared::barriers(), 0);
    if thread_idx_x() == 0 {
        barrier.init(1);
    }
    sync::sync_threads();
    barrier
}

/// Each thread writes its part of both operands.
fn fill() {
    for i in 0..4 {
        Shared::a().st(4 * thread_idx_x() + i, U32x4([1; 4]));
    }
    for i in 0..8 {
        Shared::b().st(8 * thread_idx_x() + i, U32x4([1; 4]));
    }
}

/// Operands that the tensor cores may read.
fn filled() {
    fill();
    sync::fence_async_proxy();
    sync::sync_threads();
}

fn product(sums: &mut Sums<32>) {
    wgmma::fence();
    S8N64::shared::<false>(sums, Operand::at(Shared::a(), 0), Operand::at(Shared::b(), 0));
    wgmma::commit();
}

plant!(bulk_copy_read_before_its_phase, "before the asynchronous copy", |memory, bug| {
    let barrier = barrier();
    if thread_idx_x() == 0 {
        barrier.arrive_expect(2048);
        bulk_copy::copy(Shared::a(), 0, memory, 0, 128, barrier);
    }
    sync::sync_threads();
    if bug == 0 {
        barrier.wait(0);
    }
    Shared::a().ld(thread_idx_x());
    barrier.wait(0);
});

plant!(bulk_copy_that_only_some_waited_for, "after the write of a bulk copy", |memory, bug| {
    let barrier = barrier();
    if thread_idx_x() == 0 {
        barrier.arrive_expect(2048);
        bulk_copy::copy(Shared::a(), 0, memory, 0, 128, barrier);
    }
    // With the bug the copy has arrived when the second warp reads, but nobody has told it.
    if bug == 0 || warp_id() != 1 {
        barrier.wait(0);
    } else {
        for _ in 0..1000 {
            warp::sync_warp();
        }
    }
    if warp_id() == 1 {
        Shared::a().ld(thread_idx_x());
    }
});

plant!(bulk_copy_over_what_is_read, "after the read of thread", |memory, bug| {
    fill();
    sync::fence_async_proxy();
    let barrier = barrier();
    Shared::a().ld(thread_idx_x());
    if bug == 0 {
        sync::sync_threads();
    }
    if thread_idx_x() == 0 {
        barrier.arrive_expect(2048);
        bulk_copy::copy(Shared::a(), 0, memory, 0, 128, barrier);
    }
    barrier.wait(0);
});

plant!(bulk_copy_over_what_was_not_fenced, "without a fence after the write", |memory, bug| {
    fill();
    if bug == 0 {
        sync::fence_async_proxy();
    }
    let barrier = barrier();
    if thread_idx_x() == 0 {
        barrier.arrive_expect(2048);
        bulk_copy::copy(Shared::a(), 0, memory, 0, 128, barrier);
    }
    barrier.wait(0);
});

plant!(bulk_copy_beyond_what_was_expected, "deadlock", |memory, bug| {
    let barrier = barrier();
    if thread_idx_x() == 0 {
        barrier.arrive_expect(2048 + 16 * bug);
        bulk_copy::copy(Shared::a(), 0, memory, 0, 128, barrier);
    }
    barrier.wait(0);
});

plant!(bulk_copy_left_under_way, "under way when the CTA ended", |memory, bug| {
    let barrier = barrier();
    if thread_idx_x() == 0 {
        barrier.arrive_expect(2048);
        bulk_copy::copy(Shared::a(), 0, memory, 0, 128, barrier);
    }
    if bug == 0 {
        barrier.wait(0);
    }
});

plant!(mbarrier_with_too_many_arrivals, "race: shared memory", |_memory, bug| {
    // A phase that ends early lets its waiter through.
    let barrier = barrier();
    let words = Shared::words();
    if thread_idx_x() == 32 && bug == 1 {
        barrier.arrive();
    }
    if thread_idx_x() == 64 {
        words.st(0, 1);
        if bug == 0 {
            barrier.arrive();
        }
    }
    if warp_id() == 3 {
        barrier.wait(0);
        words.ld(0);
    }
});

plant!(product_of_what_was_not_fenced, "without a fence after the write", |_memory, bug| {
    fill();
    if bug == 0 {
        sync::fence_async_proxy();
    }
    sync::sync_threads();
    let mut sums = Sums::zero();
    product(&mut sums);
    sums.wait::<0>();
});

plant!(product_of_what_no_barrier_told_of, "race: shared memory", |_memory, bug| {
    filled();
    if thread_idx_x() == 40 {
        Shared::b().st(0, U32x4([2; 4]));
        sync::fence_async_proxy();
    }
    if bug == 0 {
        sync::sync_threads();
    }
    let mut sums = Sums::zero();
    product(&mut sums);
    sums.wait::<0>();
});

plant!(product_of_uninitialised_memory, "uninitialised", |_memory, bug| {
    if bug == 0 {
        fill();
    }
    sync::fence_async_proxy();
    sync::sync_threads();
    let mut sums = Sums::zero();
    product(&mut sums);
    sums.wait::<0>();
});

plant!(operand_overwritten_before_the_wait, "race: shared memory", |_memory, bug| {
    filled();
    let mut sums = Sums::zero();
    product(&mut sums);
    if bug == 0 {
        sums.wait::<0>();
    }
    sync::sync_threads();
    if thread_idx_x() == 5 {
        Shared::b().st(9, U32x4([2; 4]));
    }
    sums.wait::<0>();
});

plant!(result_used_before_the_wait, "before its group was waited for", |_memory, bug| {
    filled();
    let (mut first, mut second) = (Sums::zero(), Sums::zero());
    product(&mut first);
    product(&mut second);
    first.wait::<1>();
    if bug == 0 {
        second.wait::<0>();
    }
    first.get(0);
    second.get(0);
});

plant!(sums_of_a_group_that_may_be_under_way, "before its group was waited for", |_memory, bug| {
    filled();
    let (mut first, mut second) = (Sums::zero(), Sums::zero());
    product(&mut first);
    product(&mut second);
    if bug == 0 {
        second.wait::<0>();
    } else {
        second.wait::<1>();
    }
    first.wait::<0>();
});

plant!(product_without_a_register_fence, "without a wgmma.fence", |_memory, bug| {
    filled();
    let mut sums = Sums::zero();
    product(&mut sums);
    sums.wait::<0>();
    if bug == 0 {
        wgmma::fence();
    }
    S8N64::shared::<false>(&mut sums, Operand::at(Shared::a(), 0), Operand::at(Shared::b(), 0));
    wgmma::commit();
    sums.wait::<0>();
});

plant!(product_by_three_warps, "divergent warp", |_memory, bug| {
    filled();
    let mut sums = Sums::zero();
    if bug == 0 || warp_id() < 3 {
        product(&mut sums);
        sums.wait::<0>();
    }
});

plant!(registers_given_by_some_lanes, "divergent warp", |_memory, bug| {
    if bug == 0 || lane_id() < 7 {
        warp::give_registers::<64>();
    }
    sync::sync_threads();
});

/// What [`multiply`] multiplies.
const SHARED_S8: u32 = 0;
const REGISTERS_S8: u32 = 1;
const SHARED_F16: u32 = 2;
const SHARED_BF16: u32 = 3;
/// A in registers, B in core matrices.
const CORES_F16: u32 = 4;
/// A in registers, B in rows of 64 columns: of one half of the columns the rows of all k, then those of the other half.
const TRANSPOSED_F16: u32 = 5;

/// Brings both operands by bulk copies of rows, permutes them, multiplies all 128 bytes of k in four products of which the
/// first sets the sums, and stores the sums where B was: a thread's registers one after the other.
fn multiply(memory: Glb<U32x4>, kind: u32) {
    let (t, barrier) = (thread_idx_x(), barrier());
    if t == 0 {
        barrier.arrive_expect((A_BYTES + B_BYTES) as u32);
        bulk_copy::copy(Shared::a(), 0, memory, 0, 512, barrier);
        bulk_copy::copy(Shared::b(), 0, memory.offset(512), 0, 1024, barrier);
    }
    barrier.wait(0);
    let permute = |rows: Smem<U32x4>, row: u32| {
        let line: [U32x4; 8] = core::array::from_fn(|chunk| rows.ld(8 * row + chunk as u32));
        for (chunk, value) in line.into_iter().enumerate() {
            rows.st(Operand::place(row, chunk as u32), value);
        }
    };
    // A row belongs to a thread.
    if t < 64 {
        permute(Shared::a(), t);
    }
    if kind == CORES_F16 {
        let line: [U32x4; 8] = core::array::from_fn(|chunk| Shared::b().ld(8 * t + chunk as u32));
        sync::sync_threads();
        for (chunk, value) in line.into_iter().enumerate() {
            Shared::b().st(64 * (t / 8) + 8 * chunk as u32 + t % 8, value);
        }
    } else {
        permute(Shared::b(), t);
    }
    sync::fence_async_proxy();
    sync::sync_threads();
    let (a, b) = (Operand::at(Shared::a(), 0), Operand::at(Shared::b(), 0));
    let out = memory.cast::<u32>();
    // Two chunks of the warp's sixteen rows: the fragment that `mma` has.
    let fragment = |k: u32| {
        let (g, q) = (lane_id() / 4, lane_id() % 4);
        let word = |r: u32| {
            let row = 16 * warp_id() + g + 8 * (r % 2);
            Shared::a().ld(Operand::place(row, 2 * k + r / 2)).0[q as usize]
        };
        FragmentA([word(0), word(1), word(2), word(3)])
    };
    match kind {
        SHARED_S8 => {
            let mut sums = Sums::<64>::zero();
            wgmma::fence();
            S8N128::shared::<false>(&mut sums, a, b);
            S8N128::shared::<true>(&mut sums, a.skip(2), b.skip(2));
            wgmma::commit();
            S8N128::shared::<true>(&mut sums, a.skip(4), b.skip(4));
            S8N128::shared::<true>(&mut sums, a.skip(6), b.skip(6));
            wgmma::commit();
            sums.wait::<0>();
            sync::sync_threads();
            (0..64).for_each(|i| out.st(64 * t + i, sums.get(i as usize)));
        }
        REGISTERS_S8 => {
            let mut sums = Sums::<64>::zero();
            for k in 0..4 {
                let fragment = fragment(k);
                wgmma::fence();
                S8N128::registers::<true>(&mut sums, fragment, b.skip(2 * k));
                wgmma::commit();
                sums.wait::<0>();
            }
            sync::sync_threads();
            (0..64).for_each(|i| out.st(64 * t + i, sums.get(i as usize)));
        }
        SHARED_F16 => {
            let mut sums = Sums::<32>::zero();
            wgmma::fence();
            for k in 0..4 {
                F16N64::shared::<true>(&mut sums, a.skip(2 * k), b.skip(2 * k));
            }
            wgmma::commit();
            sums.wait::<0>();
            sync::sync_threads();
            (0..32).for_each(|i| out.st(32 * t + i, sums.get(i as usize)));
        }
        CORES_F16 => {
            let mut sums = Sums::<64>::zero();
            let fragments = [0, 1, 2, 3].map(fragment);
            let b = Operand::cores(Shared::b(), 0, 64);
            wgmma::fence();
            F16N128::registers::<false>(&mut sums, fragments[0], b);
            for k in 1..4 {
                F16N128::registers::<true>(&mut sums, fragments[k as usize], b.skip(16 * k));
            }
            wgmma::commit();
            wgmma::wait_for_operands::<0>();
            sync::sync_threads();
            sums.wait::<0>();
            (0..64).for_each(|i| out.st(64 * t + i, sums.get(i as usize)));
        }
        TRANSPOSED_F16 => {
            // Four steps of 16 k, of 128 columns each in two pieces.
            let mut sums = Sums::<64>::zero();
            let b = Operand::transposed(Shared::b(), 0, 64 * 8);
            wgmma::fence();
            for k in 0..4 {
                F16N128T::registers::<true>(&mut sums, fragment(k), b.skip(16 * 8 * k));
            }
            wgmma::commit();
            sums.wait::<0>();
            sync::sync_threads();
            (0..64).for_each(|i| out.st(64 * t + i, sums.get(i as usize)));
        }
        _ => {
            let mut sums = Sums::<64>::zero();
            wgmma::fence();
            for k in 0..4 {
                Bf16N128::shared::<true>(&mut sums, a.skip(2 * k), b.skip(2 * k));
            }
            wgmma::commit();
            sums.wait::<0>();
            sync::sync_threads();
            (0..64).for_each(|i| out.st(64 * t + i, sums.get(i as usize)));
        }
    }
}

kernels! {
    in "emulator_tests";
    MULTIPLY: threads(128);
    fn (memory: Glb<U32x4>, kind: u32);
    "multiply" => multiply;
}

#[test]
fn products_are_those_of_the_definition() {
    let mut random = Random::new(5);
    let cases = [
        (SHARED_S8, 128),
        (REGISTERS_S8, 128),
        (SHARED_F16, 64),
        (SHARED_BF16, 128),
        (CORES_F16, 128),
        (TRANSPOSED_F16, 128),
    ];
    for (kind, n) in cases {
        let pair = |value: f32| match kind {
            SHARED_F16 | CORES_F16 | TRANSPOSED_F16 => f16::from_f32(value).to_bits().to_le_bytes(),
            _ => bf16::from_f32(value).to_bits().to_le_bytes(),
        };
        let is_s8 = kind == SHARED_S8 || kind == REGISTERS_S8;
        let bytes: Vec<u8> = if is_s8 {
            (0..A_BYTES + B_BYTES).map(|_| random.bits() as u8).collect()
        } else {
            random.values((A_BYTES + B_BYTES) / 2).into_iter().flat_map(pair).collect()
        };
        // Room for 128 sums of 64 registers.
        let mut memory = bytes.clone();
        memory.resize(128 * 64 * 4, 0);
        let got = run(&MULTIPLY[0], kind, &memory, u64::from(kind)).unwrap();
        let value = |row: &[u8], i: usize| match kind {
            SHARED_S8 | REGISTERS_S8 => f64::from(row[i] as i8),
            SHARED_F16 | CORES_F16 | TRANSPOSED_F16 => {
                f16::from_le_bytes([row[2 * i], row[2 * i + 1]]).to_f64()
            }
            _ => bf16::from_le_bytes([row[2 * i], row[2 * i + 1]]).to_f64(),
        };
        let elems = if is_s8 { 128 } else { 64 };
        for (i, word) in got.as_chunks::<4>().0.iter().take(128 * n / 2).enumerate() {
            // PTX, "Register fragments for wgmma.mma_async.m64nNk32".
            let (thread, register) = (i / (n / 2), i % (n / 2));
            let row = thread / 32 * 16 + thread % 32 / 4 + 8 * (register / 2 % 2);
            let column = register / 4 * 8 + 2 * (thread % 4) + register % 2;
            let a = &bytes[128 * row..][..128];
            let b = &bytes[A_BYTES..];
            let b = if kind == TRANSPOSED_F16 {
                let at = |k: usize| 128 * (column / 64 * 64 + k) + 2 * (column % 64);
                (0..64).flat_map(|k| [b[at(k)], b[at(k) + 1]]).collect()
            } else {
                b[128 * column..][..128].to_vec()
            };
            let expected: f64 = (0..elems).map(|k| value(a, k) * value(&b, k)).sum();
            let size: f64 = (0..elems).map(|k| (value(a, k) * value(&b, k)).abs()).sum();
            let got = if is_s8 {
                f64::from(i32::from_le_bytes(*word))
            } else {
                f64::from(f32::from_le_bytes(*word))
            };
            let allowed = if is_s8 { 0.0 } else { 4.0 * f64::from(f32::EPSILON) * size };
            let place = format!("kind {kind} row {row} column {column}");
            assert!((got - expected).abs() <= allowed, "{place}: {got}, expected {expected}");
        }
    }
}

/// Two CTAs bring two lots of 128 vectors to both, each one half; each stores what it got. With the bug they do not wait for
/// each other's reads of the first lot.
fn share(memory: Glb<U32x4>, bug: u32) {
    let (t, rank) = (thread_idx_x(), block_idx_x());
    assert_eq!((grid_dim_x(), rank), (2, rank % 2));
    let (full, empty) = (Mbarrier::at(Shared::barriers(), 0), Mbarrier::at(Shared::barriers(), 1));
    if t == 0 {
        full.init(1);
        empty.init(2 * 4);
    }
    sync::sync_cluster();
    for lot in 0..2 {
        if t == 0 {
            if lot == 1 && bug == 0 {
                empty.wait(0);
            }
            full.arrive_expect(128 * 16);
            bulk_copy::copy_to_all::<2>(Shared::a(), 64 * rank, memory, 128 * lot + 64 * rank, 64, full);
        }
        full.wait(lot);
        memory.st(256 + 256 * lot + 128 * rank + t, Shared::a().ld(t));
        // The CTA's own barriers and memory.
        Shared::words().st(t, rank);
        sync::barrier::<1>(128);
        assert_eq!(Shared::words().ld(127 - t), rank);
        sync::sync_threads();
        if lot == 0 && lane_id() < 2 {
            empty.arrive_at(lane_id());
        }
    }
    sync::sync_cluster();
}

kernels! {
    in "emulator_tests";
    SHARE: threads(128);
    fn (memory: Glb<U32x4>, bug: u32);
    "share" => share;
}

#[test]
fn ctas_of_a_cluster_share_copies() {
    let mut random = Random::new(6);
    let memory: Vec<u8> = (0..768 * 16).map(|_| random.bits() as u8).collect();
    for seed in 0..3 {
        let got = run_cluster(&SHARE[0], 2, 0, &memory, seed).unwrap();
        for (i, lot) in got[256 * 16..].chunks(128 * 16).enumerate() {
            assert_eq!(lot, &memory[i / 2 * 128 * 16..][..128 * 16], "lot {}, CTA {}", i / 2, i % 2);
        }
    }
    let error = run_cluster(&SHARE[0], 2, 1, &memory, 1).unwrap_err();
    assert!(error.contains("shared memory at"), "{error}");
}
