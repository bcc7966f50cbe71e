//! A query's output is the same bits whichever kernel computes it and whoever else is in the step.

use gpu_kernels::case::Random;
use gpu_kernels::driver::{DeviceInfo, Driver, MemKind, StreamId};
use gpu_kernels::emu::{Emulator, Options};
use gpu_kernels::kernels::flash::{self, Case, Data, Geometry};
use gpu_kernels::launch::DevicePtr;
use quant::FormatId;

/// Output of a case, as bits, [n_tokens][n_head · head_dim_v].
fn run(case: &Case, data: &Data) -> Vec<Vec<u32>> {
    run_within(case, data, None)
}

/// [`run`] with so much shared memory for a CTA.
fn run_within(case: &Case, data: &Data, smem_per_cta_bytes: Option<u32>) -> Vec<Vec<u32>> {
    let emulator = Emulator::new(Options::default());
    let stream = StreamId::DEFAULT;
    let alloc = |bytes: usize| emulator.alloc(MemKind::Device, bytes as u64).expect("memory");
    let mut at = Vec::new();
    for buffer in data.buffers() {
        at.push(alloc(buffer.len()));
        emulator.write(at[at.len() - 1], &buffer, stream).expect("within the allocation");
    }
    let row = case.n_head * case.dims[1];
    let mut out = vec![0u8; case.n_tokens() * row * 4];
    at.push(alloc(out.len()));
    at.push(alloc(case.scratch_bytes()));
    let mut args = case.args(&at);
    args.smem_per_cta_bytes = smem_per_cta_bytes.unwrap_or(args.smem_per_cta_bytes);
    for launch in flash::launch(&args).expect("a valid launch").iter() {
        emulator.launch(Emulator::MODULE, launch, stream).expect("a kernel without mistakes");
    }
    emulator.synchronise(stream).expect("a kernel without mistakes");
    emulator.read(&mut out, at[9], stream).expect("within the allocation");
    let words: Vec<u32> = out.as_chunks::<4>().0.iter().map(|&bytes| u32::from_le_bytes(bytes)).collect();
    words.chunks(row).map(<[u32]>::to_vec).collect()
}

fn case(types: [FormatId; 2], dim: usize, sequences: &'static [(usize, usize)]) -> Case {
    Case { types, dims: [dim; 2], sequences, ..flash::BASE }
}

#[test]
fn decode_split_and_prefill_agree() {
    let f16 = [FormatId::F16; 2];
    let cases = [
        case(f16, 64, &[(530, 3), (270, 1)]),
        Case { window: 300, ..case(f16, 64, &[(700, 2)]) },
        Case { sinks: true, softcap: 4.0, ..case(f16, 128, &[(300, 2)]) },
        case(f16, 256, &[(290, 1), (5, 2)]),
        case([FormatId::Q8_0; 2], 128, &[(270, 2)]),
        case([FormatId::Q5_1, FormatId::Q4_0], 64, &[(270, 2)]),
        case([FormatId::F32; 2], 64, &[(270, 2)]),
        case([FormatId::F32; 2], 128, &[(270, 1)]),
        case([FormatId::BF16; 2], 256, &[(270, 1)]),
    ];
    for case in cases {
        let data = Data::new(&case, &mut Random::new(3));
        let decode = run(&Case { geometry: Geometry::Decode, ..case }, &data);
        assert!(decode.iter().flatten().all(|bits| f32::from_bits(*bits).is_finite()), "{case:?}");
        for geometry in [Geometry::Split { n_spans: 3, n_sm: 132 }, Geometry::Prefill] {
            assert_eq!(run(&Case { geometry, ..case }, &data), decode, "{geometry:?} of {case:?}");
        }
    }
}

/// Spans dealt out to any number of CTAs: whole ones, several to a CTA, more CTAs than spans.
#[test]
fn shares_of_spans_change_nothing() {
    let f16 = [FormatId::F16; 2];
    let cases = [
        // Five spans and a window that leaves out one; blocks of 64 and of 32 positions; copied ahead and not.
        Case { n_head: 6, n_head_kv: 3, ..case(f16, 64, &[(1090, 1)]) },
        Case { window: 700, ..case(f16, 128, &[(1100, 1)]) },
        Case { n_head: 2, n_head_kv: 2, ..case(f16, 256, &[(600, 1)]) },
        Case { n_head: 3, n_head_kv: 3, ..case([FormatId::Q8_0; 2], 64, &[(600, 1)]) },
        // More pages than a warp has lanes, and two tokens of one sequence.
        Case { n_head: 3, n_head_kv: 3, ..case(f16, 64, &[(2200, 1)]) },
        Case { n_head: 3, n_head_kv: 3, ..case(f16, 64, &[(515, 2)]) },
    ];
    for case in cases {
        let data = Data::new(&case, &mut Random::new(4));
        let decode = run(&Case { geometry: Geometry::Decode, ..case }, &data);
        let room = case.sequences[0].0.div_ceil(flash::SPAN) + 1;
        for n_sm in 1..=room as u32 {
            let split = Case { geometry: Geometry::Split { n_spans: room, n_sm }, ..case };
            // A multiprocessor has as many CTAs of these tiles as the case has KV heads.
            let shares =
                flash::launch(&split.args(&[DevicePtr(256); 11])).expect("a valid launch").attention.grid[2];
            assert_eq!(shares as usize, (n_sm as usize / case.n_tokens()).max(1), "{case:?}");
            assert_eq!(run(&split, &data), decode, "{shares} shares of {case:?}");
        }
    }
}

#[test]
fn a_narrow_tile_changes_nothing() {
    let cases = [case([FormatId::F16; 2], 256, &[(70, 30)]), case([FormatId::F32; 2], 256, &[(40, 20)])];
    for case in cases.map(|case| Case { geometry: Geometry::Prefill, ..case }) {
        let data = Data::new(&case, &mut Random::new(6));
        let entry = |smem_per_cta_bytes| {
            let args = flash::Args { smem_per_cta_bytes, ..case.args(&[DevicePtr(256); 11]) };
            flash::launch(&args).expect("a valid launch").attention.entry
        };
        let (little, much) = (99 * 1024, 227 * 1024);
        assert!(entry(little).starts_with("flash_prefill_narrow_256") && !entry(much).contains("narrow"));
        assert_eq!(run_within(&case, &data, Some(little)), run(&case, &data), "{case:?}");
    }
}

/// Tokens of a prompt on Hopper: all at once, in pieces, one by one, with strangers in their tile.
#[test]
fn cuts_of_a_prompt_change_nothing() {
    let f16 = [FormatId::F16; 2];
    let base = case(f16, 64, &[(300, 40)]);
    let cases = [
        base,
        Case { window: 150, sinks: true, ..base },
        Case { n_head: 3, n_head_kv: 1, softcap: 4.0, ..case(f16, 128, &[(300, 40)]) },
        Case { n_head: 3, n_head_kv: 3, ..case(f16, 256, &[(300, 40)]) },
        case([FormatId::Q8_0, FormatId::Q4_1], 128, &[(300, 40)]),
    ];
    for case in cases.map(|case| Case { geometry: Geometry::Prompt, ..case }) {
        let data = || Data::new(&case, &mut Random::new(7));
        let head_row = case.n_head * case.dims[0];
        let expected = run(&case, &data());
        assert!(expected.iter().flatten().all(|bits| f32::from_bits(*bits).is_finite()), "{case:?}");
        // Only the number of tokens is taken from the case's sequences.
        let pieces: [&'static [(usize, usize)]; 4] = [&[(300, 1)], &[(300, 23)], &[(300, 15)], &[(300, 1)]];
        let mut first = 0;
        for sequences in pieces {
            let n = sequences[0].1;
            let mut piece = data();
            let end = first + n;
            piece.positions = piece.positions[first..end].to_vec();
            piece.token_sequences = piece.token_sequences[first..end].to_vec();
            piece.q = piece.q[first * head_row..end * head_row].to_vec();
            // The pages say no more than that the piece's own tokens are there.
            piece.sequences[0][1] = piece.positions[n - 1] + 1;
            assert_eq!(run(&Case { sequences, ..case }, &piece), expected[first..end], "{first} of {case:?}");
            first = end;
        }
        assert_eq!(first, 40);

        // A token of a second sequence, which begins in the first one's pages, before all and in their midst.
        let mut mixed = data();
        mixed.sequences.push([1, 150]);
        for at in [0, 17] {
            mixed.positions.insert(at, 149);
            mixed.token_sequences.insert(at, 1);
            let strange = Random::new(9).values(head_row);
            mixed.q.splice(at * head_row..at * head_row, strange);
        }
        let mut got = run(&Case { sequences: &[(300, 42)], ..case }, &mixed);
        let strangers = [got.remove(17), got.remove(0)];
        assert_eq!(strangers[0], strangers[1], "{case:?}");
        assert_eq!(got, expected, "{case:?}");
    }
}

/// One rule says which prompts Hopper's kernel takes; a launch that does not keep it is refused.
#[test]
fn prompts_that_have_no_kernel_are_refused() {
    let base = Case { geometry: Geometry::Prompt, ..case([FormatId::F16; 2], 128, &[(70, 20)]) };
    let entry = |case: &Case| flash::launch(&case.args(&[DevicePtr(256); 11])).map(|all| all.attention.entry);
    assert_eq!(entry(&base).unwrap(), "flash_hopper_128_f16");
    assert_eq!(entry(&Case { dims: [40, 72], ..base }).unwrap(), "flash_hopper_128_f16");
    assert_eq!(entry(&Case { dims: [64, 64], ..base }).unwrap(), "flash_hopper_64_f16");
    let wide = [
        Case { types: [FormatId::F16, FormatId::Q8_0], ..base },
        Case { types: [FormatId::Q4_0; 2], dims: [256, 256], ..base },
    ];
    assert_eq!(wide.map(|case| entry(&case).unwrap()), ["flash_hopper_128_wide", "flash_hopper_256_wide"]);
    let refused = [
        // More than a CTA's shared memory has room for.
        Case { types: [FormatId::F16, FormatId::Q8_0], dims: [256, 256], ..base },
        Case { types: [FormatId::BF16; 2], ..base },
        Case { dims: [576, 512], ..base },
        Case { slopes: true, ..base },
    ];
    let hopper =
        DeviceInfo { sm: 90, driver_version: 12_040, smem_per_cta_bytes: 227 << 10, ..DeviceInfo::default() };
    for case in [base].iter().chain(&wide).chain(&refused) {
        let args = case.args(&[DevicePtr(256); 11]);
        let geometry = Geometry::of_prompt(&hopper, &args.cache, case.slopes);
        assert_eq!(geometry.is_some(), entry(case).is_ok(), "{case:?}");
        assert_eq!(
            Geometry::of_prompt(&DeviceInfo { sm: 80, ..hopper.clone() }, &args.cache, case.slopes),
            None
        );
    }
    assert_eq!(refused.iter().filter(|case| entry(case).is_ok()).count(), 0);
}

#[test]
fn batch_mates_and_cuts_change_nothing() {
    // The last ten tokens of one sequence: all at once, then the last alone, then among strangers.
    let all = case([FormatId::F16; 2], 64, &[(300, 10)]);
    let data = Data::new(&all, &mut Random::new(5));
    let expected = run(&Case { geometry: Geometry::Prefill, ..all }, &data);

    let mut alone = Data::new(&all, &mut Random::new(5));
    alone.positions.drain(..9);
    alone.token_sequences.drain(..9);
    alone.q.drain(..9 * all.n_head * 64);
    for geometry in [Geometry::Prefill, Geometry::Decode] {
        let last = Case { geometry, sequences: &[(300, 1)], ..all };
        assert_eq!(run(&last, &alone)[0], expected[9], "{geometry:?}");
    }

    // Two more tokens, of a second sequence that begins in the first one's pages: they only read.
    let mut mixed = Data::new(&all, &mut Random::new(5));
    mixed.sequences.push([1, 150]);
    mixed.positions.extend([148, 149]);
    mixed.token_sequences.extend([1, 1]);
    mixed.positions.rotate_right(1);
    mixed.token_sequences.rotate_right(1);
    mixed.q.extend(Random::new(9).values(2 * all.n_head * 64));
    mixed.q.rotate_right(all.n_head * 64);
    for geometry in [Geometry::Prefill, Geometry::Decode, Geometry::Split { n_spans: 2, n_sm: 132 }] {
        // Only the number of tokens is taken from the sequences here.
        let case = Case { geometry, sequences: &[(300, 12)], ..all };
        assert_eq!(run(&case, &mixed)[1..11], expected, "{geometry:?}");
    }
}
