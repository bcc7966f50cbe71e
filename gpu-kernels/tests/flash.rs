//! A query's output is the same bits whichever kernel computes it and whoever else is in the step.

use gpu_kernels::case::Random;
use gpu_kernels::driver::{Driver, MemKind, StreamId};
use gpu_kernels::emu::{Emulator, Options};
use gpu_kernels::kernels::flash::{self, Case, Data, Geometry};
use quant::FormatId;

/// Output of a case, as bits, [n_tokens][n_head · head_dim_v].
fn run(case: &Case, data: &Data) -> Vec<Vec<u32>> {
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
    for launch in flash::launch(&case.args(&at)).expect("a valid launch").iter() {
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
        case([FormatId::F32; 2], 64, &[(270, 2)]),
        case([FormatId::F32; 2], 128, &[(270, 1)]),
        case([FormatId::BF16; 2], 256, &[(270, 1)]),
    ];
    for case in cases {
        let data = Data::new(&case, &mut Random::new(3));
        let decode = run(&Case { geometry: Geometry::Decode, ..case }, &data);
        assert!(decode.iter().flatten().all(|bits| f32::from_bits(*bits).is_finite()), "{case:?}");
        for geometry in [Geometry::Split { n_spans: 3 }, Geometry::Prefill] {
            assert_eq!(run(&Case { geometry, ..case }, &data), decode, "{geometry:?} of {case:?}");
        }
    }
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
    for geometry in [Geometry::Prefill, Geometry::Decode, Geometry::Split { n_spans: 2 }] {
        // Only the number of tokens is taken from the sequences here.
        let case = Case { geometry, sequences: &[(300, 12)], ..all };
        assert_eq!(run(&case, &mixed)[1..11], expected, "{geometry:?}");
    }
}
