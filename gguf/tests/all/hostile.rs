//! Files that are wrong: cut at every byte, every field set to what it should not be, random mutations, and the corpus
//! of the fuzz targets. Nothing may panic, and nothing may allocate more than twice the file's length.

use std::path::Path;

use gguf::{Endian, GgufError, TensorProblem};
use proptest::prelude::*;

use crate::allocation::{parse_bounded, refused};
use crate::bytes::{Bytes, every_type};
use crate::drain::{drain, rewrite};
use crate::times;

const KINDS: [(u32, Endian); 4] =
    [(2, Endian::Little), (3, Endian::Little), (2, Endian::Big), (3, Endian::Big)];

fn try_all(bytes: &[u8]) {
    match parse_bounded(bytes) {
        Ok(gguf) => {
            drain(&gguf);
            let again = rewrite(&gguf).unwrap();
            let twice = rewrite(&parse_bounded(&again).unwrap()).unwrap();
            assert!(again == twice);
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

#[test]
fn whole_file_is_accepted() {
    for (version, endian) in KINDS {
        let (file, _) = every_type(version, endian);
        let gguf = parse_bounded(&file.out).unwrap();
        assert_eq!((gguf.version(), gguf.endian(), gguf.n_kvs()), (version, endian, 16));
        drain(&gguf);
    }
}

#[test]
fn truncated_at_every_byte() {
    for (version, endian) in KINDS {
        let (file, data_end) = every_type(version, endian);
        for n in (0..file.out.len()).step_by(times(1, 29)) {
            let cut = &file.out[..n];
            // The last tensor's padding may be missing: nobody reads it.
            if n < data_end {
                let error = refused(cut);
                assert!(
                    matches!(
                        error,
                        GgufError::Truncated { .. }
                            | GgufError::TooLarge { .. }
                            | GgufError::DataTruncated { .. }
                            | GgufError::Tensor { problem: TensorProblem::OutOfFile { .. }, .. }
                    ),
                    "cut to {n}: {error}"
                );
            } else {
                drain(&parse_bounded(cut).unwrap());
            }
        }
    }
}

#[test]
fn every_field_zero_one_max() {
    for (i, (version, endian)) in KINDS.into_iter().enumerate() {
        let (file, _) = every_type(version, endian);
        assert_eq!(file.fields.len(), 68);
        // Under Miri each field in one kind of file.
        for field in file.fields.iter().skip(times(0, i)).step_by(times(1, KINDS.len())) {
            let max = u64::MAX >> (64 - 8 * field.width);
            for value in [0, 1, max / 2, max / 2 + 1, max - 1, max] {
                let bytes = match endian {
                    Endian::Little => value.to_le_bytes()[..field.width].to_vec(),
                    Endian::Big => value.to_be_bytes()[8 - field.width..].to_vec(),
                };
                let mut broken = file.out.clone();
                broken[field.at..field.at + field.width].copy_from_slice(&bytes);
                try_all(&broken);
                if value > 1 {
                    let error = refused(&broken).to_string();
                    assert!(error.chars().any(|c| c.is_ascii_digit()), "{field:?}: no number in {error:?}");
                }
            }
        }
    }
}

#[test]
fn errors_name_the_place() {
    let (file, _) = every_type(3, Endian::Little);
    let with = |what: &str, nth: usize, value: u64| {
        let field = file.fields.iter().filter(|field| field.what == what).nth(nth).unwrap();
        let mut broken = file.out.clone();
        broken[field.at..field.at + field.width].copy_from_slice(&value.to_le_bytes()[..field.width]);
        (refused(&broken), field.at as u64)
    };
    let (error, at) = with("value type", 2, 13);
    assert_eq!(error, GgufError::UnknownValueType { key: "bool".into(), offset: at, got: 13 });
    assert_eq!(
        error.to_string(),
        format!("key \"bool\": value type at offset {at}: expected 0 to 12, got 13")
    );

    let (error, _) = with("tensor type", 1, 999);
    let GgufError::Tensor { tensor, problem: TensorProblem::UnknownFormat { got: 999 }, .. } = &error else {
        panic!("{error}")
    };
    assert_eq!(tensor, "q8_0");

    let (error, _) = with("tensor offset", 2, 64);
    assert!(
        matches!(&error, GgufError::Tensor { tensor, problem: TensorProblem::Overlap { .. }, .. } if tensor == "f16"),
        "{error}"
    );
    let (error, _) = with("tensor offset", 2, 129);
    assert!(
        matches!(&error, GgufError::Tensor { problem: TensorProblem::Misaligned { got: 129, .. }, .. }),
        "{error}"
    );
    let (error, _) = with("version", 0, 1);
    assert_eq!(error.to_string(), "GGUF version at offset 4: expected 2 or 3, got 1");
    assert_eq!(refused(b"GGML\x01\0\0\0"), GgufError::BadMagic { got: *b"GGML" });
}

/// Files whose lists are as dense as can be, where the heap per byte of file is largest.
#[test]
fn densest_files_stay_in_bound() {
    let n = times(3000, 60) as u64;
    let mut kvs = Bytes::v3(0, n);
    for i in 0..n {
        kvs.key(&format!("{i:x}"), 0).raw(&[0]);
    }
    assert_eq!(parse_bounded(&kvs.out).unwrap().n_kvs(), n as usize);

    // One-byte keys repeat, but that is found only after all have been stored.
    let mut kvs = Bytes::v3(0, n);
    for _ in 0..n {
        kvs.key("k", 0).raw(&[0]);
    }
    assert!(matches!(refused(&kvs.out), GgufError::DuplicateKey { .. }));

    // Entries without the data they need must not be stored at all.
    let mut file = Bytes::v3(n, 1);
    file.key("general.alignment", 4).u32(1);
    for _ in 0..n {
        file.tensor("t", &[], 24, 0);
    }
    assert!(matches!(refused(&file.out), GgufError::DataTruncated { got: 0, .. }));

    for unique in [true, false] {
        let mut file = Bytes::v3(n, 1);
        file.key("general.alignment", 4).u32(1);
        for i in 0..n {
            file.tensor(&if unique { format!("{i:x}") } else { "t".into() }, &[], 24, i);
        }
        file.raw(&vec![0; n as usize]);
        match parse_bounded(&file.out) {
            Ok(gguf) => drain(&gguf),
            Err(error) => assert!(
                !unique && matches!(error, GgufError::Tensor { problem: TensorProblem::Duplicate, .. })
            ),
        }
    }
}

#[test]
fn text_must_be_text() {
    let mut file = Bytes::v3(0, 1);
    file.string("key length", b"ab\xff").field_u32("value type", 0).raw(&[0]);
    assert_eq!(refused(&file.out), GgufError::NotUtf8 { what: "a key".into(), offset: 34 });

    let mut file = Bytes::v3(0, 1);
    file.key("k", 8).string("string length", b"abc\xff");
    let gguf = parse_bounded(&file.out).unwrap();
    assert_eq!(
        gguf.str("k"),
        Err(GgufError::NotUtf8 { what: "k".into(), offset: file.out.len() as u64 - 1 })
    );
}

#[test]
fn names_and_bools_are_checked() {
    let mut file = Bytes::v3(0, 1);
    file.key("", 0).raw(&[0; 8]);
    assert_eq!(refused(&file.out), GgufError::Empty { what: "a key", offset: 24 });

    for (len, good) in [(64, true), (65, false)] {
        let mut file = Bytes::v3(1, 0);
        file.tensor(&"n".repeat(len), &[1], 24, 0).pad(32).raw(&[0]);
        assert_eq!(parse_bounded(&file.out).is_ok(), good);
    }
    let mut file = Bytes::v3(0, 1);
    file.key("flags", 9).array(7, 2).raw(&[1, 2]);
    let offset = file.out.len() as u64 - 1;
    assert_eq!(refused(&file.out), GgufError::InvalidBool { key: "flags".into(), offset, got: 2 });
}

#[test]
fn nesting_has_a_floor() {
    for (depth, good) in [(4, true), (5, false), (3000, false)] {
        let mut file = Bytes::v3(0, 1);
        file.key("deep", 9);
        for _ in 1..depth {
            file.array(9, 1);
        }
        file.array(0, 1).raw(&[7]);
        match parse_bounded(&file.out) {
            Ok(gguf) => {
                assert!(good);
                drain(&gguf);
            }
            Err(error) => assert!(!good && matches!(error, GgufError::TooDeep { .. }), "{error}"),
        }
    }
}

#[test]
fn alignment_is_checked() {
    for (alignment, good) in
        [(0, false), (1, true), (33, false), (64, true), (1 << 24, true), (1 << 25, false)]
    {
        let mut file = Bytes::v3(0, 1);
        file.key("general.alignment", 4).u32(alignment);
        assert_eq!(parse_bounded(&file.out).is_ok(), good, "{alignment}");
    }
    let mut file = Bytes::v3(0, 1);
    file.key("general.alignment", 10).u64(32);
    assert!(matches!(refused(&file.out), GgufError::WrongType { found: "u64", .. }));
}

/// The seeds and finds of `fuzz/`: what fuzzing once reached stays tested without a fuzzer.
#[test]
fn fuzz_corpus() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/parse");
    let mut n_files = 0;
    for entry in std::fs::read_dir(&folder).unwrap() {
        let bytes = std::fs::read(entry.unwrap().path()).unwrap();
        try_all(&bytes);
        n_files += 1;
    }
    assert!(n_files > 0, "no corpus in {}", folder.display());
}

#[derive(Clone, Debug)]
enum Mutation {
    Byte(usize, u8),
    Number(usize, u64),
    Cut(usize),
    Remove(usize, usize),
    Repeat(usize, usize),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let number = prop_oneof![
        0u64..64,
        Just(u64::MAX),
        Just(1 << 63),
        Just((1 << 62) + 1),
        Just(1 << 32),
        any::<u64>()
    ];
    prop_oneof![
        4 => (any::<usize>(), any::<u8>()).prop_map(|(at, byte)| Mutation::Byte(at, byte)),
        4 => (any::<usize>(), number).prop_map(|(at, number)| Mutation::Number(at, number)),
        1 => any::<usize>().prop_map(Mutation::Cut),
        1 => (any::<usize>(), 1usize..40).prop_map(|(at, n)| Mutation::Remove(at, n)),
        1 => (any::<usize>(), 1usize..80).prop_map(|(at, n)| Mutation::Repeat(at, n)),
    ]
}

fn mutate(bytes: &mut Vec<u8>, mutation: &Mutation) {
    if bytes.is_empty() {
        return;
    }
    let len = bytes.len();
    match *mutation {
        Mutation::Byte(at, byte) => bytes[at % len] = byte,
        Mutation::Number(at, number) => {
            let at = at % len;
            let number = number.to_le_bytes();
            let n = number.len().min(len - at);
            bytes[at..at + n].copy_from_slice(&number[..n]);
        }
        Mutation::Cut(at) => bytes.truncate(at % len),
        Mutation::Remove(at, n) => drop(bytes.drain(at % len..(at % len + n).min(len))),
        Mutation::Repeat(at, n) => {
            let piece = bytes[at % len..(at % len + n).min(len)].to_vec();
            bytes.splice(at % len..at % len, piece);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(times(16384, 8) as u32))]

    #[test]
    fn mutated_files(kind in 0usize..4, mutations in prop::collection::vec(mutation(), 1..6)) {
        let (version, endian) = KINDS[kind];
        let mut bytes = every_type(version, endian).0.out;
        mutations.iter().for_each(|mutation| mutate(&mut bytes, mutation));
        try_all(&bytes);
    }

    #[test]
    fn random_bytes(mut bytes in prop::collection::vec(any::<u8>(), 0..300), header in any::<bool>()) {
        if header && bytes.len() >= 24 {
            bytes[..8].copy_from_slice(b"GGUF\x03\0\0\0");
            bytes[9..16].fill(0);
            bytes[17..24].fill(0);
        }
        try_all(&bytes);
    }
}
