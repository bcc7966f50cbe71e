//! Files that others wrote: PyPI gguf (`../golden/make.py`), llama.cpp (the goldens). Read right, and written again
//! byte for byte.

use std::path::{Path, PathBuf};

use gguf::{Endian, Gguf, SplitSet, Value, ValueType, split};
use quant::FormatId;

use crate::allocation::parse_bounded;
use crate::drain::{drain, rewrite};

fn golden(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn check(path: &Path) {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let gguf = parse_bounded(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    drain(&gguf);
    assert!(rewrite(&gguf).unwrap() == bytes, "{} differs when written again", path.display());
}

fn check_python(gguf: &Gguf<'_>) {
    assert_eq!(gguf.version(), 3);
    assert_eq!(gguf.str("general.architecture"), Ok("llama"));
    let expected: [(&str, Value<'_>); 12] = [
        ("u8", Value::U8(200)),
        ("i8", Value::I8(-100)),
        ("u16", Value::U16(60_000)),
        ("i16", Value::I16(-30_000)),
        ("u32", Value::U32(4_000_000_000)),
        ("i32", Value::I32(-2_000_000_000)),
        ("f32", Value::F32(1.5)),
        ("bool", Value::Bool(true)),
        ("str", Value::Str("grüße".as_bytes())),
        ("u64", Value::U64((1 << 63) + 1)),
        ("i64", Value::I64(-(1 << 62))),
        ("f64", Value::F64(0.1)),
    ];
    for (key, value) in expected {
        assert_eq!(gguf.get(key), Some(value), "{key}");
    }
    let strs = gguf.array("strs").unwrap();
    assert_eq!(strs.elem_type(), ValueType::Str);
    assert!(strs.strs().unwrap().eq(["a", "", "ß", "longer"].map(str::as_bytes)));
    assert!(gguf.array("i32s").unwrap().i32s().unwrap().eq([-1, 0, 7]));
    assert!(gguf.array("f32s").unwrap().f32s().unwrap().eq([0.5, -2.0]));
    assert!(gguf.array("bools").unwrap().bools().unwrap().eq([true, false, true]));
}

fn check_python_tensors<'a>(tensor: impl Fn(&str) -> (gguf::TensorInfo<'a>, &'a [u8]), endian: Endian) {
    let (f32s, data) = tensor("f32");
    assert_eq!((f32s.format, &*f32s.shape(), &*f32s.ne()), (FormatId::F32, &[2, 3][..], &[3, 2][..]));
    let mut data = data.to_vec();
    if endian == Endian::Big {
        gguf::swap_plain(f32s.format, &mut data).unwrap();
    }
    let values: Vec<f32> = data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    assert_eq!(values, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    assert_eq!(tensor("f16").0.n_bytes(), 10);
    assert_eq!(&*tensor("i32").0.shape(), [2, 3, 4]);
    let (scalar, data) = tensor("scalar");
    assert_eq!((scalar.shape().len(), scalar.n_elems(), data.len()), (0, 1, 4));
    let (q8_0, data) = tensor("q8_0");
    assert_eq!((q8_0.format, &*q8_0.shape(), data.len()), (FormatId::Q8_0, &[3, 64][..], 3 * 2 * 34));
}

#[test]
fn python_files() {
    for (name, endian, alignment) in
        [("le.gguf", Endian::Little, 32), ("be.gguf", Endian::Big, 32), ("align64.gguf", Endian::Little, 64)]
    {
        let bytes = golden(name);
        let gguf = parse_bounded(&bytes).unwrap();
        drain(&gguf);
        assert_eq!((gguf.endian(), gguf.alignment()), (endian, alignment), "{name}");
        check_python(&gguf);
        let tensor = |tensor: &str| (*gguf.tensor(tensor).unwrap(), gguf.data(gguf.tensor(tensor).unwrap()));
        check_python_tensors(tensor, endian);
        assert!(rewrite(&gguf).unwrap() == bytes, "{name} differs when written again");
    }
}

#[test]
fn python_split() {
    let files: Vec<Vec<u8>> = (0..3).map(|no| golden(&split::part_name("part", no, 3))).collect();
    let parts: Vec<Gguf<'_>> = files.iter().map(|bytes| parse_bounded(bytes).unwrap()).collect();
    for (gguf, bytes) in parts.iter().zip(&files) {
        assert!(rewrite(gguf).unwrap() == *bytes);
    }
    let set = SplitSet::new(parts).unwrap();
    check_python(set.metadata());
    assert_eq!(set.n_tensors(), 5);
    let by_part: Vec<(usize, &str)> = set.tensors().map(|(part, tensor)| (part, tensor.name)).collect();
    assert_eq!(by_part, [(0, "f32"), (0, "f16"), (1, "i32"), (1, "scalar"), (2, "q8_0")]);
    let tensor = |name: &str| {
        let (part, tensor) = set.tensor(name).unwrap();
        (*tensor, set.data(part, tensor))
    };
    check_python_tensors(tensor, Endian::Little);
}

#[test]
fn llama_cpp_vocabulary() {
    let bytes = golden("vocab-cross.gguf");
    let gguf = parse_bounded(&bytes).unwrap();
    drain(&gguf);
    assert_eq!(gguf.str("tokenizer.ggml.model"), Ok("gpt2"));
    assert_eq!(gguf.array("tokenizer.ggml.merges").unwrap().len(), 900);
    let n_vocab = gguf.array("tokenizer.ggml.tokens").unwrap().len();
    assert_eq!(gguf.array("tokenizer.ggml.token_type").unwrap().u32s().unwrap().len(), n_vocab);
    assert!(rewrite(&gguf).unwrap() == bytes);
}

/// Longest file that is read under Miri.
const MIRI_BYTES: u64 = 50 << 10;

#[test]
fn all_goldens() {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let root =
        std::env::var_os("RUNIK_GOLDENS").map_or_else(|| workspace.join("../shared/goldens"), PathBuf::from);
    if !root.is_dir() {
        eprintln!("skipped: no goldens at {}; set RUNIK_GOLDENS", root.display());
        return;
    }
    let mut n_files = 0;
    for folder in ["tiny", "pretok", "smollm2-135m"] {
        for entry in std::fs::read_dir(root.join(folder)).unwrap() {
            let path = entry.unwrap().path();
            // Miri reads a kilobyte in a second or so.
            let too_long = cfg!(miri) && path.metadata().unwrap().len() > MIRI_BYTES;
            if path.extension().is_some_and(|extension| extension == "gguf") && !too_long {
                check(&path);
                n_files += 1;
            }
        }
    }
    eprintln!("{n_files} files read and written again");
    assert!(n_files > 0, "no .gguf in {}", root.display());
}

/// A whole model, if there is one: SmolLM2-135M here.
#[test]
fn whole_model() {
    let Some(path) = std::env::var_os("RUNIK_TEST_MODEL") else {
        eprintln!("skipped: set RUNIK_TEST_MODEL to a model's path");
        return;
    };
    check(Path::new(&path));
    let bytes = std::fs::read(&path).unwrap();
    let start = std::time::Instant::now();
    let gguf = Gguf::parse(&bytes).unwrap();
    eprintln!("parsed {} tensors in {:?}", gguf.tensors().len(), start.elapsed());
}
