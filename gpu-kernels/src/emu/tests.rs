//! Every kind of bug planted once; each must be found, and the right form of the same kernel must pass.

use std::format;
use std::string::{String, ToString};

use super::{Emulator, Entry, Options};
use crate::device::sync::{self, Mbarrier};
use crate::device::thread::{self, thread_idx_x};
use crate::device::{Glb, Smem, U32x4, async_copy, atomic, grid, mma, warp};
use crate::driver::{Driver, DriverError, MemKind, StreamId};
use crate::launch::{DevicePtr, Launch, Params};

smem! {
    struct Shared {
        words: [u32; 128],
        vectors: [U32x4; 32],
        barrier: [u64; 1],
    }
}

const BYTES: u64 = 4096;

/// Runs a kernel of two arguments, memory and whether to misbehave, on two CTAs of 64 threads.
fn run(entry: &Entry, bug: u32) -> Result<(), String> {
    run_on(entry, bug, 2, 1)
}

fn run_on(entry: &Entry, bug: u32, ctas: u32, seed: u64) -> Result<(), String> {
    let emulator = Emulator::new(Options { seed, ..Options::default() });
    let memory = emulator.alloc(MemKind::Device, BYTES).unwrap();
    // The first half is written, the second is not.
    emulator.fill(memory, 1, BYTES / 2, StreamId::DEFAULT).unwrap();
    let launch = Launch {
        entry: entry.name,
        grid: [ctas, 1, 1],
        cta: 64,
        cluster: 1,
        smem_bytes: Shared::BYTES,
        params: Params::new().with(memory).with(bug),
    };
    emulator.run(entry, &launch).map_err(|error| error.to_string())
}

/// The bug is found, described so, with this file's name; without it the kernel passes, in any order of threads.
fn planted(entry: &Entry, what: &str) {
    for seed in 0..4 {
        run_on(entry, 0, 2, seed).unwrap_or_else(|error| panic!("{} without its bug: {error}", entry.name));
    }
    let error = run(entry, 1).expect_err(entry.name);
    assert!(error.contains(what), "{}: {error}", entry.name);
    assert!(error.contains("emu/tests.rs:"), "{}: no place: {error}", entry.name);
}

/// Shared words that may be read, so that only the order of accesses can be wrong.
fn initialised() -> Smem<u32> {
    Shared::words().st(thread_idx_x(), 0);
    sync::sync_threads();
    Shared::words()
}

/// A test for one kernel: `bug` is 1 to misbehave. An `early` one waits for earlier launches itself.
macro_rules! plant {
    ($name:ident, $what:literal, $($early:ident,)? |$memory:ident, $bug:ident| $body:block) => {
        #[test]
        fn $name() {
            fn kernel($memory: Glb<u32>, $bug: u32) $body
            kernels! {
                in "emulator_tests";
                TABLE: threads(64) $(, $early)?;
                fn (memory: Glb<u32>, bug: u32);
                stringify!($name) => kernel;
            }
            planted(&TABLE[0], $what);
        }
    };
}

plant!(load_before_earlier_launches_have_ended, "Read at", early, |memory, bug| {
    let weight = memory.ld_early(0);
    if bug == 1 {
        memory.st(200 + thread::index_1d(), memory.ld(1) + weight);
    }
    grid::wait_for_earlier();
    memory.st(200 + thread::index_1d(), memory.ld(1) + weight);
});

plant!(store_before_earlier_launches_have_ended, "Write at", early, |memory, bug| {
    if bug == 1 {
        memory.st(thread::index_1d(), 1);
    }
    grid::wait_for_earlier();
    memory.st(thread::index_1d(), 1);
});

plant!(prefetch_out_of_bounds, "a prefetch of 16 bytes", |memory, bug| {
    memory.cast::<u8>().offset(if bug == 1 { BYTES as usize } else { 0 }).prefetch(16);
});

/// Later launches would not know when earlier ones have ended.
#[test]
fn thread_that_does_not_wait_for_earlier_launches() {
    fn kernel(_memory: Glb<u32>, bug: u32) {
        if bug == 0 || thread_idx_x() != 5 {
            grid::wait_for_earlier();
        }
    }
    kernels! {
        in "emulator_tests";
        TABLE: threads(64), early;
        fn (memory: Glb<u32>, bug: u32);
        "thread_that_does_not_wait" => kernel;
    }
    run(&TABLE[0], 0).unwrap();
    let error = run(&TABLE[0], 1).unwrap_err();
    assert!(error.contains("ended without waiting") && error.contains("thread 5"), "{error}");
}

plant!(shared_race_after_a_write, "race: shared memory", |_memory, bug| {
    let (words, t) = (initialised(), thread_idx_x());
    words.st(t, t);
    if bug == 0 {
        sync::sync_threads();
    }
    words.ld(t ^ 1);
});

plant!(shared_race_after_a_read, "after the read of thread", |_memory, bug| {
    let (words, t) = (Shared::words(), thread_idx_x());
    words.st(t, t);
    sync::sync_threads();
    let value = words.ld((t + 1) % 64);
    if bug == 0 {
        sync::sync_threads();
    }
    words.st(t, value);
});

plant!(a_shuffle_orders_no_memory, "race: shared memory", |_memory, bug| {
    let (words, t) = (Shared::words(), thread_idx_x());
    words.st(t, t);
    if bug == 0 {
        warp::sync_warp();
    } else {
        warp::shfl_xor(t, 1);
    }
    words.ld(t ^ 1);
});

plant!(global_race_within_a_cta, "race: global memory", |memory, bug| {
    let (memory, t) = (memory.offset(64 * thread::block_idx_x() as usize), thread_idx_x());
    memory.st(t, t);
    if bug == 0 {
        sync::sync_threads();
    }
    memory.ld(t ^ 1);
});

plant!(global_race_between_ctas, "of CTA", |memory, bug| {
    let element = if bug == 0 { thread::block_idx_x() } else { 0 };
    if thread_idx_x() == 0 {
        memory.st(element, 7);
    }
});

plant!(plain_write_beside_an_atomic, "race: global memory", |memory, bug| {
    if bug == 1 && thread_idx_x() == 5 {
        memory.st(0, 1);
    } else {
        atomic::add_global(memory, 0, 1);
    }
});

/// The CTA that arrives last may read what the others wrote before they arrived, and finds the counter ready for the next
/// launch. Nothing orders them if only the arriving thread's own writes come before, or if the atomic is a relaxed one.
#[test]
fn the_last_cta_to_arrive_sees_what_all_wrote() {
    fn kernel(memory: Glb<u32>, bug: u32) {
        // Element 0 counts; each of four CTAs writes 64 words, the last one reads all.
        let (n, t) = (thread::grid_dim_x(), thread_idx_x());
        let (verdict, data) = (Shared::words(), memory.offset(1));
        data.st(64 * thread::block_idx_x() + t, t);
        if bug != 1 {
            sync::sync_threads();
        }
        if t == 0 {
            let last = match bug {
                2 => atomic::add_global(memory, 0, 1) == n - 1,
                _ => atomic::arrive_global(memory, 0, n),
            };
            verdict.st(0, last.into());
        }
        sync::sync_threads();
        if verdict.ld(0) == 1 {
            let mut cta = 0;
            while cta < n {
                let word = data.ld(64 * cta + (t ^ 1));
                assert!(bug != 0 || word == t ^ 1);
                cta += 1;
            }
        }
    }
    kernels! {
        in "emulator_tests";
        TABLE: threads(64);
        fn (memory: Glb<u32>, bug: u32);
        "arrives" => kernel;
    }
    let run = |bug: u32, seed: u64| {
        let emulator = Emulator::new(Options { seed, ..Options::default() });
        let memory = emulator.alloc(MemKind::Device, BYTES).unwrap();
        emulator.fill(memory, 0, BYTES, StreamId::DEFAULT).unwrap();
        let launch = Launch {
            entry: "arrives",
            grid: [4, 1, 1],
            cta: 64,
            cluster: 1,
            smem_bytes: Shared::BYTES,
            params: Params::new().with(memory).with(bug),
        };
        emulator.run(&TABLE[0], &launch).map_err(|error| error.to_string())?;
        let mut count = [1; 4];
        emulator.read(&mut count, memory, StreamId::DEFAULT).unwrap();
        assert_eq!(count, [0; 4]);
        Ok::<(), String>(())
    };
    (0..4).for_each(|seed| run(0, seed).unwrap());
    for bug in [1, 2] {
        let error = run(bug, 1).unwrap_err();
        assert!(error.contains("race: global memory") && error.contains("of CTA"), "{bug}: {error}");
    }
}

plant!(uninitialised_shared_memory, "uninitialised", |_memory, bug| {
    let t = thread_idx_x();
    if bug == 0 {
        Shared::words().st(t, 1);
    }
    Shared::words().ld(t);
});

plant!(uninitialised_global_memory, "never written", |memory, bug| {
    memory.ld(if bug == 0 { 511 } else { 512 });
});

plant!(global_out_of_bounds, "not within an allocation", |memory, bug| {
    if bug == 0 {
        memory.ld(0);
    } else {
        memory.st(1024, 1);
    }
});

plant!(global_misaligned, "misaligned", |memory, bug| {
    memory.cast::<u8>().offset(bug as usize).cast::<u32>().ld(0);
});

plant!(shared_array_out_of_bounds, "element 128 of an array of 128", |_memory, bug| {
    // Within the CTA's memory, but in the neighbouring array.
    let t = thread_idx_x();
    if t == 0 {
        Shared::words().st(127 + bug, 1);
    }
});

plant!(shared_memory_too_small, "out of the CTA's", |_memory, bug| {
    if thread_idx_x() == 0 {
        Smem::<u32>::dynamic(if bug == 0 { 0 } else { Shared::BYTES }, 1).st(0, 1);
    }
});

plant!(barrier_in_one_branch, "divergent warp", |_memory, bug| {
    let t = thread_idx_x();
    if bug == 0 || t < 40 {
        sync::sync_threads();
    }
    warp::shfl(t, 0);
});

plant!(barrier_that_some_never_reach, "deadlock", |_memory, bug| {
    if bug == 0 || thread_idx_x() < 32 {
        sync::sync_threads();
    }
});

plant!(barrier_at_two_places, "reached at two places", |memory, bug| {
    if bug == 1 && thread_idx_x() % 2 == 1 {
        memory.ld(0);
        sync::sync_threads();
    } else {
        sync::sync_threads();
    }
});

plant!(collective_at_two_places, "divergent warp", |_memory, bug| {
    let t = thread_idx_x();
    if bug == 1 && t % 2 == 1 {
        warp::shfl_xor(t, 2);
    } else {
        warp::shfl_xor(t, 4);
    }
});

plant!(collective_that_a_lane_left, "has left the kernel", |_memory, bug| {
    let t = thread_idx_x();
    if bug == 1 && t == 33 {
        return;
    }
    warp::ballot(true);
});

plant!(async_copy_read_early, "asynchronous copy", |memory, bug| {
    let (vectors, t) = (Shared::vectors(), thread_idx_x());
    if t < 32 {
        async_copy::copy16(vectors, t, memory.cast(), t);
        async_copy::commit();
        if bug == 0 {
            async_copy::wait::<0>();
        } else {
            async_copy::wait::<1>();
        }
        assert_eq!(vectors.ld(t).0, [0x0101_0101; 4]);
    }
});

plant!(async_copy_of_another_thread, "race: shared memory", |memory, bug| {
    let (vectors, t) = (Shared::vectors(), thread_idx_x());
    if t < 32 {
        vectors.st(t, U32x4([0; 4]));
        warp::sync_warp();
        async_copy::copy16(vectors, t, memory.cast(), t);
        async_copy::commit();
        async_copy::wait::<0>();
        if bug == 0 {
            warp::sync_warp();
        }
        vectors.ld(t ^ 1);
    }
});

plant!(mbarrier_not_waited_for, "race: shared memory", |_memory, bug| {
    let (words, t) = (initialised(), thread_idx_x());
    let full = Mbarrier::at(Shared::barrier(), 0);
    if t == 0 {
        full.init(32);
    }
    sync::sync_threads();
    if t < 32 {
        words.st(t, 3 * t);
        full.arrive();
    } else {
        if bug == 0 {
            full.wait(0);
        }
        words.ld(t - 32);
    }
});

plant!(mbarrier_with_too_few_arrivals, "deadlock", |_memory, bug| {
    let t = thread_idx_x();
    let full = Mbarrier::at(Shared::barrier(), 0);
    if t == 0 {
        full.init(32 + bug);
    }
    sync::sync_threads();
    if t < 32 {
        full.arrive();
    } else {
        full.wait(0);
    }
});

plant!(named_barrier_not_waited_for, "race: shared memory", |_memory, bug| {
    let (words, t) = (initialised(), thread_idx_x());
    if t < 32 {
        words.st(t, t);
        sync::barrier_arrive::<3>(64);
    } else {
        if bug == 0 {
            sync::barrier::<3>(64);
        }
        words.ld(t - 32);
    }
    sync::sync_threads();
    if bug == 1 && t >= 32 {
        sync::barrier::<3>(64);
    }
});

#[test]
fn a_panic_in_a_kernel_is_a_finding() {
    fn kernel(_memory: Glb<u32>, bug: u32) {
        assert!(bug == 0 || thread_idx_x() != 7, "seven");
    }
    kernels! {
        in "emulator_tests";
        TABLE: threads(64);
        fn (memory: Glb<u32>, bug: u32);
        "panics" => kernel;
    }
    run(&TABLE[0], 0).unwrap();
    let error = run(&TABLE[0], 1).unwrap_err();
    assert!(error.contains("seven") && error.contains("thread 7"), "{error}");
}

#[test]
fn bytes_of_a_word_are_apart() {
    fn kernel(memory: Glb<u32>, _bug: u32) {
        let bytes = memory.cast::<u8>().offset(64 * thread::block_idx_x() as usize);
        bytes.st(thread_idx_x(), thread_idx_x() as u8);
    }
    kernels! {
        in "emulator_tests";
        TABLE: threads(64);
        fn (memory: Glb<u32>, bug: u32);
        "bytes" => kernel;
    }
    run_on(&TABLE[0], 0, 4, 3).unwrap();
}

#[test]
fn atomics_lose_no_count() {
    fn kernel(memory: Glb<u32>, _bug: u32) {
        let words = Shared::words();
        if thread_idx_x() == 0 {
            words.st(0, 0);
        }
        sync::sync_threads();
        atomic::add_shared(words, 0, 1);
        sync::sync_threads();
        if thread_idx_x() == 0 {
            atomic::add_global(memory, 0, words.ld(0));
        }
    }
    kernels! {
        in "emulator_tests";
        TABLE: threads(64);
        fn (memory: Glb<u32>, bug: u32);
        "counts" => kernel;
    }
    let emulator = Emulator::new(Options::default());
    let memory = emulator.alloc(MemKind::Device, 4).unwrap();
    emulator.fill(memory, 0, 4, StreamId::DEFAULT).unwrap();
    let params = Params::new().with(memory).with(0u32);
    let launch =
        Launch { entry: "counts", grid: [10, 5, 2], cta: 64, cluster: 1, smem_bytes: Shared::BYTES, params };
    emulator.run(&TABLE[0], &launch).unwrap();
    let mut count = [0; 4];
    emulator.read(&mut count, memory, StreamId::DEFAULT).unwrap();
    assert_eq!(u32::from_le_bytes(count), 6400);
}

/// A[16×32] · B[32×8] on bytes: fragments loaded as the layout says, B through `ldmatrix`.
#[test]
fn a_matrix_product_has_ptxs_layout() {
    let a = |row: u32, k: u32| ((row * 7 + k * 3) % 13) as i8 - 6;
    let b = |k: u32, col: u32| ((k * 5 + col * 11) % 17) as i8 - 8;
    fn word(f: impl Fn(u32) -> i8) -> u32 {
        u32::from_le_bytes([f(0), f(1), f(2), f(3)].map(|byte| byte as u8))
    }
    let kernel = move || {
        let (lane, vectors) = (thread_idx_x() % 32, Shared::vectors());
        if thread::warp_id() != 0 {
            return;
        }
        // Tile 0 and 1 hold B's columns as rows: 16 bytes of k each; 2 and 3 repeat them.
        let (col, half) = (lane % 8, lane / 8 % 2);
        vectors.st(lane, U32x4(core::array::from_fn(|w| word(|j| b(16 * half + 4 * w as u32 + j, col)))));
        warp::sync_warp();
        let [b0, b1, ..] = mma::load_x4(vectors, lane);
        let (g, t) = (lane / 4, lane % 4);
        let part = |row: u32, k: u32| word(|j| a(row, k + j));
        let fragment = [part(g, 4 * t), part(g + 8, 4 * t), part(g, 4 * t + 16), part(g + 8, 4 * t + 16)];
        let mut c = mma::FragmentI32([1; 4]);
        mma::mma_s8(&mut c, mma::FragmentA(fragment), mma::FragmentB([b0, b1]));
        for (r, got) in c.0.into_iter().enumerate() {
            let (row, col) = (g + 8 * (r as u32 / 2), 2 * t + r as u32 % 2);
            let expected: i32 = (0..32).map(|k| i32::from(a(row, k)) * i32::from(b(k, col))).sum();
            assert_eq!(got, expected + 1, "row {row}, column {col}");
        }
    };
    fn entry(_memory: Glb<u32>, _bug: u32) {
        PRODUCT.with(|kernel| kernel.borrow().as_ref().expect("set by the test")());
    }
    std::thread_local! {
        static PRODUCT: core::cell::RefCell<Option<std::boxed::Box<dyn Fn()>>> = const { core::cell::RefCell::new(None) };
    }
    PRODUCT.set(Some(std::boxed::Box::new(kernel)));
    kernels! {
        in "emulator_tests";
        TABLE: threads(64);
        fn (memory: Glb<u32>, bug: u32);
        "product" => entry;
    }
    // One CTA, so on this thread, which holds the closure.
    run_on(&TABLE[0], 0, 1, 1).unwrap_or_else(|error| panic!("{error}"));
}

/// The product that old GPUs compute by fma against the tensor cores': equal, since small integers leave nothing to round.
#[test]
fn a_float_product_by_fma_is_the_tensor_cores() {
    fn kernel(_memory: Glb<u32>, _bug: u32) {
        let mut random = crate::case::Random::new(u64::from(thread_idx_x()));
        let mut pair = |bits: fn(f32) -> u16| {
            let mut element = || u32::from(bits(random.below(17) as f32 - 8.0));
            element() | element() << 16
        };
        for (bits, product, value) in [
            (
                quant::bits::f32_to_f16 as fn(f32) -> u16,
                mma::mma_f16 as MmaFn,
                quant::bits::f16_to_f32 as fn(u16) -> f32,
            ),
            (quant::bits::f32_to_bf16, mma::mma_bf16, quant::bits::bf16_to_f32),
        ] {
            let (a, b) =
                (mma::FragmentA([(); 4].map(|()| pair(bits))), mma::FragmentB([(); 2].map(|()| pair(bits))));
            let (mut expected, mut got) =
                (mma::FragmentF32([0.5, -1.0, 2.0, 3.0]), mma::FragmentF32([0.5, -1.0, 2.0, 3.0]));
            product(&mut expected, a, b);
            mma::mma_fma(&mut got, a, b, value);
            assert_eq!(got.0, expected.0);
        }
    }
    type MmaFn = fn(&mut mma::FragmentF32, mma::FragmentA, mma::FragmentB);
    kernels! {
        in "emulator_tests";
        TABLE: threads(64);
        fn (memory: Glb<u32>, bug: u32);
        "product_by_fma" => kernel;
    }
    run(&TABLE[0], 0).unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn launches_that_no_gpu_takes_are_refused() {
    fn kernel(_memory: Glb<u32>, _bug: u32) {}
    kernels! {
        in "emulator_tests";
        TABLE: threads(64);
        fn (memory: Glb<u32>, bug: u32);
        "nothing" => kernel;
    }
    let good = Launch {
        entry: "nothing",
        grid: [1; 3],
        cta: 64,
        cluster: 1,
        smem_bytes: 0,
        params: Params::new().with(DevicePtr::NULL).with(0u32),
    };
    let emulator = Emulator::new(Options::default());
    emulator.run(&TABLE[0], &good).unwrap();
    let bad = [
        Launch { cta: 65, ..good },
        Launch { cta: 128, ..good },
        Launch { smem_bytes: 1 << 20, ..good },
        Launch { grid: [1, 0, 1], ..good },
        Launch { params: Params::new(), ..good },
    ];
    for launch in bad {
        let error = emulator.run(&TABLE[0], &launch);
        assert!(matches!(error, Err(DriverError::Launch { .. })), "{}", format!("{launch:?}"));
    }
}

mod driver {
    //! The emulator as a driver: capture and replay, host memory, handles.

    use core::ptr::NonNull;
    use std::vec;
    use std::vec::Vec;

    use super::super::{Emulator, Options};
    use crate::device::{Glb, thread};
    use crate::driver::{Driver, DriverError, EventId, GraphId, HostAccess, MemKind, StreamId};
    use crate::launch::{DevicePtr, Launch, Params};

    const N: usize = 64;
    const MAIN: StreamId = StreamId::DEFAULT;

    fn floats(device: &Emulator, at: DevicePtr) -> Result<Vec<f32>, DriverError> {
        let mut bytes = vec![0; 4 * N];
        device.read(&mut bytes, at, MAIN)?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect())
    }

    kernels! {
        in "emulator_tests";
        ADD: threads(64);
        fn (a: Glb<f32>, b: Glb<f32>);
        "test_add" => add_kernel;
    }

    fn add_kernel(a: Glb<f32>, b: Glb<f32>) {
        let i = thread::thread_idx_x();
        b.st(i, a.ld(i) + b.ld(i));
    }

    fn device() -> (Emulator, DevicePtr, DevicePtr) {
        let device = Emulator::with_kernels(Options::default(), ADD);
        let memory = || device.alloc(MemKind::Device, 4 * N as u64).unwrap();
        let (a, b) = (memory(), memory());
        device.write(a, bytemuck::cast_slice(&[1.5f32; N]), MAIN).unwrap();
        device.fill(b, 0, 4 * N as u64, MAIN).unwrap();
        (device, a, b)
    }

    /// `b += a`, on a stream.
    fn add(device: &Emulator, a: DevicePtr, b: DevicePtr, stream: StreamId) -> Result<(), DriverError> {
        let params = Params::new().with(a).with(b);
        let launch =
            Launch { entry: "test_add", grid: [1; 3], cta: N as u32, cluster: 1, smem_bytes: 0, params };
        device.launch(Emulator::MODULE, &launch, stream)
    }

    #[test]
    fn a_graph_does_at_each_launch_what_was_captured() {
        let (device, a, b) = device();
        device.begin_capture(MAIN).unwrap();
        add(&device, a, b, MAIN).unwrap();
        device.copy(a, b, 4 * N as u64, MAIN).unwrap();
        for refused in [
            device.synchronise(MAIN),
            device.write(a, &[0; 4], MAIN),
            device.read(&mut [0; 4], a, MAIN),
            device.begin_capture(MAIN),
        ] {
            assert!(matches!(refused, Err(DriverError::Capture { .. })), "{refused:?}");
        }
        let graph = device.end_capture(MAIN).unwrap();
        assert_eq!(floats(&device, b).unwrap(), [0.0; N], "capturing does nothing");
        for sum in [1.5f32, 3.0, 6.0] {
            device.launch_graph(graph, MAIN).unwrap();
            assert_eq!(floats(&device, b).unwrap(), [sum; N]);
        }
        device.release_graph(graph).unwrap();
        assert_eq!(device.launch_graph(graph, MAIN), Err(DriverError::Handle { what: "graph", id: graph.0 }));
    }

    #[test]
    fn streams_join_a_capture_by_events_and_must_be_waited_for() {
        let (device, a, b) = device();
        let side = device.create_stream().unwrap();
        let fork = |join: bool| -> Result<GraphId, DriverError> {
            device.begin_capture(MAIN)?;
            let begun = device.record(MAIN)?;
            device.wait(side, begun)?;
            add(&device, a, b, side)?;
            if join {
                let done = device.record(side)?;
                device.wait(MAIN, done)?;
                assert!(matches!(device.is_done(done), Err(DriverError::Capture { .. })));
            }
            device.end_capture(MAIN)
        };
        assert_eq!(fork(false), Err(DriverError::Capture { op: "end_capture" }));
        let graph = fork(true).unwrap();
        assert_eq!(floats(&device, b).unwrap(), [0.0; N]);
        device.launch_graph(graph, side).unwrap();
        assert_eq!(floats(&device, b).unwrap(), [1.5; N]);
        // Neither stream is captured any more.
        add(&device, a, b, side).unwrap();
        assert_eq!(floats(&device, b).unwrap(), [3.0; N]);
        device.release_stream(side).unwrap();
        assert_eq!(add(&device, a, b, side), Err(DriverError::Handle { what: "stream", id: side.0 }));
    }

    #[test]
    fn pinned_memory_is_the_hosts_too_and_device_memory_is_not() {
        let (device, a, _) = device();
        let pinned = device.alloc(MemKind::Host, 16).unwrap();
        device.write_host(pinned, &[7; 16]).unwrap();
        device.copy(a, pinned, 16, MAIN).unwrap();
        let mut back = [0; 16];
        device.read(&mut back, a, MAIN).unwrap();
        assert_eq!(back, [7; 16]);
        assert!(matches!(device.write_host(a, &[0; 4]), Err(DriverError::Address { .. })));
        assert!(matches!(device.read_host(&mut back, pinned.offset(1)), Err(DriverError::Address { .. })));
    }

    #[test]
    fn registered_memory_is_read_and_written_in_place() {
        let (device, a, b) = device();
        let mut host = vec![0.25f32; N];
        let at = NonNull::new(host.as_mut_ptr().cast()).unwrap();
        // SAFETY: `host` outlives the registration and is not touched in between.
        let mapped = unsafe { device.register_host(at, 4 * N, HostAccess::ReadWrite) }.unwrap();
        add(&device, mapped, b, MAIN).unwrap();
        add(&device, a, mapped, MAIN).unwrap();
        assert!(matches!(device.free(mapped), Err(DriverError::Address { .. })));
        device.unregister_host(mapped).unwrap();
        assert_eq!(floats(&device, b).unwrap(), [0.25; N]);
        assert_eq!(host, [1.75; N]);
        assert!(matches!(add(&device, mapped, b, MAIN), Err(DriverError::Kernel { .. })));
        assert!(device.unregister_host(mapped).is_err());
    }

    #[test]
    fn events_are_used_again_until_they_are_released() {
        let (device, ..) = device();
        let (start, end) = (device.record(MAIN).unwrap(), device.record(MAIN).unwrap());
        std::thread::sleep(std::time::Duration::from_millis(2));
        device.record_again(end, MAIN).unwrap();
        assert!(device.elapsed_ns(start, end).unwrap() >= 2_000_000);
        assert_eq!(device.is_done(end), Ok(true));
        device.release(end).unwrap();
        assert_eq!(device.record_again(end, MAIN), Err(DriverError::Handle { what: "event", id: end.0 }));
        assert_eq!(device.wait(MAIN, EventId(99)), Err(DriverError::Handle { what: "event", id: 99 }));
    }
}
