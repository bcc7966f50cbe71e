//! Published attacks on GGUF readers (llama.cpp's, Ollama's), one test each: a clear error, no panic, no allocation
//! beyond twice the file (`refused` checks that). What the files do is after the advisories; the bytes are ours.

use gguf::{GgufError, TensorProblem};

use crate::allocation::{parse_bounded, refused};
use crate::bytes::Bytes;

const F32: u32 = 0;
const I8: u32 = 24;

/// One F32 tensor of this shape in front of `data_bytes` zeros.
fn one_tensor(ne: &[u64], data_bytes: usize) -> Vec<u8> {
    let mut file = Bytes::v3(1, 0);
    file.tensor("blk.0.attn_q.weight", ne, F32, 0).pad(32).raw(&vec![0; data_bytes]);
    file.out
}

fn tensor_problem(bytes: &[u8]) -> TensorProblem {
    match refused(bytes) {
        GgufError::Tensor { tensor, offset: 24, problem } => {
            assert_eq!(tensor, "blk.0.attn_q.weight");
            problem
        }
        other => panic!("{other}"),
    }
}

/// Byte counts that wrap: an exabyte of tensor that seems to fit 4 MB.
#[test]
fn cve_2026_33298_byte_count_overflow() {
    const MIB4: usize = 4 << 20;
    let side = 1 << 31;
    assert!(matches!(tensor_problem(&one_tensor(&[side, side, 4], MIB4)), TensorProblem::Overflow { .. }));
    // 2^62 elements count; their 2^64 bytes do not.
    assert!(matches!(tensor_problem(&one_tensor(&[side, side], MIB4)), TensorProblem::Overflow { .. }));
    // 2^60 bytes: no overflow, and no file.
    let exabyte = tensor_problem(&one_tensor(&[1 << 29, 1 << 29], MIB4));
    assert!(matches!(exabyte, TensorProblem::OutOfFile { n_bytes: 0x1000_0000_0000_0000, .. }), "{exabyte}");
    assert!(parse_bounded(&one_tensor(&[1 << 20], MIB4)).is_ok());
}

/// Sizes that wrap once padding or a context's overhead is added.
#[test]
fn cve_2026_27940_allocation_size_overflow() {
    // 2^64 - 4 bytes: any padding wraps. 2^64 - 4 = 4 * (2^31 - 1) * (2^31 + 1).
    let ne = [(1 << 31) - 1, (1 << 31) + 1];
    assert!(matches!(
        tensor_problem(&one_tensor(&ne, 64)),
        TensorProblem::OutOfFile { n_bytes: 0xffff_ffff_ffff_fffc, .. }
    ));
    let mut file = Bytes::v3(1, 0);
    file.tensor("t", &[8], F32, u64::MAX - 31).pad(32).raw(&[0; 64]);
    let error = refused(&file.out);
    assert!(
        matches!(error, GgufError::Tensor { problem: TensorProblem::OutOfFile { n_bytes: 32, .. }, .. }),
        "{error}"
    );
}

/// Sizes of several tensors whose sum wraps.
#[test]
fn cve_2025_53630_size_accumulation_overflow() {
    // Four times 2^62 bytes is 0.
    let mut file = Bytes::v3(4, 0);
    for i in 0..4u64 {
        file.tensor(&format!("t{i}"), &[1 << 30, 1 << 30], F32, i << 62);
    }
    file.pad(32).raw(&[0; 64]);
    assert!(matches!(refused(&file.out), GgufError::Tensor { problem: TensorProblem::OutOfFile { .. }, .. }));

    // Each fits the file, all together do not.
    let mut file = Bytes::v3(3, 0);
    for i in 0..3u64 {
        file.tensor(&format!("t{i}"), &[64], I8, 0);
    }
    file.pad(32).raw(&[0; 128]);
    assert!(matches!(refused(&file.out), GgufError::DataTruncated { expected: 192, got: 128, .. }));
}

/// A dimension of 0: a division by zero in llama.cpp (also its issues 18586 and 24263).
#[test]
fn ghsa_3p75_pq92_q28f_zero_dimension() {
    for (index, ne) in [[0, 1, 1, 1], [4, 0, 1, 1], [4, 4, 0, 1], [4, 4, 4, 0]].iter().enumerate() {
        let expected = TensorProblem::Dim { index: index as u32, got: 0 };
        assert_eq!(tensor_problem(&one_tensor(ne, 256)), expected);
    }
}

/// A vocabulary entry whose length, cut to 32 bits, is negative or small.
#[test]
fn cve_2025_49847_token_length_cast() {
    for len in [1u64 << 31, (1 << 32) + 4, u64::MAX - 3] {
        let mut file = Bytes::v3(0, 1);
        file.key("tokenizer.ggml.tokens", 9).array(8, 2).u64(len).raw(b"text").u64(0);
        let error = refused(&file.out);
        assert!(
            matches!(error, GgufError::Truncated { expected, got: 12, .. } if expected == len),
            "{error}"
        );
    }
}

/// Nothing where a key, a string or an array should be: null pointers in llama.cpp.
#[test]
fn cve_2024_41130_null_dereference() {
    let mut file = Bytes::v3(0, 1);
    file.raw(&[0; 14]);
    assert_eq!(refused(&file.out), GgufError::Empty { what: "a key", offset: 24 });

    // Empty strings and arrays are values like others.
    let mut file = Bytes::v3(0, 2);
    file.key("s", 8).string("string length", b"").key("a", 9).array(8, 0);
    let gguf = parse_bounded(&file.out).unwrap();
    assert_eq!(gguf.str("s"), Ok(""));
    assert!(gguf.array("a").unwrap().is_empty());
}

/// Metadata that fails half-way: llama.cpp freed what it had not yet set.
#[test]
fn cve_2024_32878_uninitialised_free() {
    let mut file = Bytes::v3(0, 3);
    file.key("a", 8).string("string length", b"good");
    file.key("b", 9).array(8, 3).string("string length", b"good").u64(1 << 40).raw(&[0; 40]);
    let error = refused(&file.out);
    assert!(matches!(error, GgufError::Truncated { what: "a string in an array", .. }), "{error}");
}

/// More dimensions than a tensor can have, written past its array of four (TALOS-2024-1914).
#[test]
fn cve_2024_21802_too_many_dimensions() {
    assert_eq!(tensor_problem(&one_tensor(&[1; 5], 64)), TensorProblem::TooManyDims { got: 5 });
    let mut file = Bytes::v3(1, 0);
    file.string("tensor name length", b"blk.0.attn_q.weight").u32(u32::MAX).raw(&[1; 64]);
    assert_eq!(tensor_problem(&file.out), TensorProblem::TooManyDims { got: u32::MAX.into() });
}

/// A count of array elements that wraps when multiplied by the size of one (TALOS-2024-1912).
#[test]
fn cve_2024_21825_array_length_overflow() {
    for (elem_type, len) in
        [(8, 1u64 << 60), (8, (1 << 61) + 1), (4, 1 << 62), (10, (1 << 61) + 1), (9, u64::MAX)]
    {
        let mut file = Bytes::v3(0, 1);
        file.key("a", 9).array(elem_type, len).raw(&[0; 64]);
        let error = refused(&file.out);
        assert!(matches!(error, GgufError::TooLarge { got, .. } if got == len), "{error}");
    }
}

/// A number of tensors that wraps when multiplied by the size of one (TALOS-2024-1915).
#[test]
fn cve_2024_21836_tensor_count_overflow() {
    for n in [1u64 << 56, (1 << 60) + 1, u64::MAX] {
        let mut file = Bytes::v3(n, 0);
        file.tensor("t", &[8], F32, 0).pad(32).raw(&[0; 32]);
        let error = refused(&file.out);
        assert!(
            matches!(error, GgufError::TooLarge { what: "number of tensors", got, .. } if got == n),
            "{error}"
        );
    }
}

/// A string length of 2^64 - 1, to which llama.cpp added one (TALOS-2024-1913).
#[test]
fn cve_2024_23496_string_length_overflow() {
    let mut key = Bytes::v3(0, 1);
    key.u64(u64::MAX).raw(&[0; 64]);
    assert!(matches!(refused(&key.out), GgufError::TooLarge { what: "a key", got: u64::MAX, .. }));
    let mut value = Bytes::v3(0, 1);
    value.key("s", 8).u64(u64::MAX).raw(&[0; 64]);
    assert!(matches!(refused(&value.out), GgufError::Truncated { expected: u64::MAX, got: 64, .. }));
    let mut name = Bytes::v3(1, 0);
    name.u64(u64::MAX).raw(&[0; 64]);
    assert!(matches!(refused(&name.out), GgufError::TooLarge { what: "a tensor name", got: u64::MAX, .. }));
}

/// A number of pairs that wraps when multiplied by the size of one (TALOS-2024-1916).
#[test]
fn cve_2024_23605_pair_count_overflow() {
    for n in [1u64 << 58, (1 << 59) + 1, u64::MAX] {
        let mut file = Bytes::v3(0, n);
        file.key("a", 0).raw(&[0; 64]);
        let error = refused(&file.out);
        assert!(
            matches!(error, GgufError::TooLarge { what: "number of key-value pairs", got, .. } if got == n),
            "{error}"
        );
    }
}

/// Declared dimensions larger than the data: Ollama leaked what lay behind ("Bleeding Llama").
#[test]
fn cve_2026_7482_dimensions_beyond_data() {
    assert!(matches!(
        tensor_problem(&one_tensor(&[1024, 1024], 64)),
        TensorProblem::OutOfFile { n_bytes: 0x40_0000, .. }
    ));
    // One element too many.
    assert!(parse_bounded(&one_tensor(&[16], 64)).is_ok());
    assert!(matches!(
        refused(&one_tensor(&[17], 64)),
        GgufError::DataTruncated { expected: 68, got: 64, .. }
    ));
}

/// An array of another type than its reader expects (llama.cpp issue 26690): a vocabulary of numbers.
#[test]
fn array_type_confusion() {
    let mut file = Bytes::v3(0, 2);
    file.key("tokenizer.ggml.tokens", 9).array(0, 4).raw(&[1, 2, 3, 4]);
    file.key("tokenizer.ggml.scores", 9).array(0, 4).raw(&[1, 2, 3, 4]);
    let gguf = parse_bounded(&file.out).unwrap();
    let error = gguf.array("tokenizer.ggml.tokens").unwrap().strs().map(|_| ()).unwrap_err();
    assert_eq!(error.to_string(), "key \"tokenizer.ggml.tokens\": expected array of str, found array of u8");
    let error = gguf.array("tokenizer.ggml.scores").unwrap().f32s().map(|_| ()).unwrap_err();
    assert_eq!(error.to_string(), "key \"tokenizer.ggml.scores\": expected array of f32, found array of u8");
}

/// Elements that wrap in a signed count (llama.cpp issue 27203), or a dimension that is negative in one.
#[test]
fn element_count_overflow() {
    let big = (1 << 32) - 1;
    assert!(matches!(tensor_problem(&one_tensor(&[big, big, 2], 64)), TensorProblem::Overflow { .. }));
    assert_eq!(tensor_problem(&one_tensor(&[u64::MAX], 64)), TensorProblem::Dim { index: 0, got: u64::MAX });
}
