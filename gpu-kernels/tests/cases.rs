//! Every case of every kernel on the emulator, against its reference, twice: results depend neither on the order in which
//! threads run nor on how many CTAs run at a time.

use gpu_kernels::case::{self, AnyKernel};
use gpu_kernels::emu::{Emulator, Options};
use gpu_kernels::registry::{self, KERNELS};

/// Runs one kernel's cases; panics with all failures.
fn run(kernel: &dyn AnyKernel) {
    let mut failures = Vec::new();
    for i in 0..kernel.n_cases() {
        // The seed is the case's number, so a case is the same wherever it runs.
        let problem = kernel.problem(i, i as u64);
        for options in
            [Options { seed: 1, ..Options::default() }, Options { seed: 2, workers: 1, ..Options::default() }]
        {
            let emulator = Emulator::new(options);
            if let Err(error) = case::run(&emulator, Emulator::MODULE, &problem, kernel.nmse_max()) {
                failures.push(format!("{} case {i} {}: {error}", kernel.name(), kernel.label(i)));
            }
        }
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

/// One test per kernel, so that they run side by side and a failure names its kernel.
macro_rules! kernels {
    ($($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                run(registry::find(stringify!($name)).expect("registered"));
            }
        )*

        #[test]
        fn every_kernel_has_a_test() {
            let tested = [$(stringify!($name)),*];
            for kernel in KERNELS {
                assert!(tested.contains(&kernel.name()), "{} is not tested here", kernel.name());
            }
        }
    };
}

kernels! {
    dequantise
    peak
    repack
    get_rows
    quantise_act
    mmvq
    rms_norm
    softmax
    rope
    elementwise
    round_act
    mmvf
    mmf
    mmf_hopper
    mmf32
    mmd_hopper
    glu
    layer_norm
    moe_route
    moe_combine
    argmax
    top_k
    argsort
    cumsum
    sample
    copy
    set_rows
    mmq
    mmq_hopper
    moe_sort
    flash
    flash_split
    flash_hopper
    flash_plain
    kv_store
    hadamard
}

#[test]
fn entry_names_are_unique() {
    let entries = KERNELS.iter().flat_map(|kernel| kernel.entries()).flat_map(|table| table.iter());
    let mut names: Vec<&str> = entries.map(|entry| entry.name).collect();
    let all = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), all);
}
