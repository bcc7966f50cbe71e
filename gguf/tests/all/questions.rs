//! Typed getters, split files, byte order.

use gguf::{Array, Endian, Gguf, GgufError, SplitInfo, SplitProblem, SplitSet, TensorProblem, Writer, split};
use quant::FormatId;

fn metadata() -> Vec<u8> {
    let mut writer = Writer::default();
    writer.kv("i8", -1i8).unwrap();
    writer.kv("u64", 5u64).unwrap();
    writer.kv("big", u64::MAX).unwrap();
    writer.kv("f64", 0.5f64).unwrap();
    writer.kv("flag", true).unwrap();
    writer.kv("text", "abc").unwrap();
    writer.kv("i32s", &Array::numbers(&[1i32, 2, -3])).unwrap();
    writer.kv("strs", &Array::strs(&["x", "y"])).unwrap();
    writer.header_bytes()
}

#[test]
fn getters_convert_what_fits_and_name_what_does_not() {
    let bytes = metadata();
    let gguf = Gguf::parse(&bytes).unwrap();
    assert_eq!((gguf.u32("u64"), gguf.number::<i8>("u64")), (Ok(5), Ok(5)));
    assert_eq!(gguf.number::<i64>("i8"), Ok(-1));
    assert_eq!(gguf.u64("big"), Ok(u64::MAX));
    assert_eq!(gguf.f32("f64"), Ok(0.5));
    assert_eq!((gguf.bool("flag"), gguf.str("text")), (Ok(true), Ok("abc")));
    assert_eq!((gguf.opt_u32("none"), gguf.opt_str("none")), (Ok(None), Ok(None)));

    let shown = |error: GgufError| error.to_string();
    assert_eq!(shown(gguf.u32("none").unwrap_err()), "key \"none\" is missing");
    assert_eq!(shown(gguf.u32("i8").unwrap_err()), "key \"i8\": expected a number that fits u32, got -1");
    assert_eq!(shown(gguf.opt_u32("text").unwrap_err()), "key \"text\": expected u32, found str");
    assert_eq!(shown(gguf.f32("u64").unwrap_err()), "key \"u64\": expected f32, found u64");
    assert_eq!(shown(gguf.bool("u64").unwrap_err()), "key \"u64\": expected bool, found u64");
    assert_eq!(shown(gguf.u32("flag").unwrap_err()), "key \"flag\": expected u32, found bool");
    assert_eq!(shown(gguf.str("i32s").unwrap_err()), "key \"i32s\": expected str, found array of i32");
    assert_eq!(shown(gguf.array("u64").unwrap_err()), "key \"u64\": expected array, found u64");
}

#[test]
fn texts_for_people_need_no_utf8() {
    let mut writer = Writer::default();
    writer.kv("name", "a?b").unwrap();
    let mut bytes = writer.header_bytes();
    let at = bytes.iter().position(|byte| *byte == b'?').unwrap();
    bytes[at] = 0xFF;
    let gguf = Gguf::parse(&bytes).unwrap();
    assert_eq!(gguf.str("name"), Err(GgufError::NotUtf8 { what: "name".into(), offset: at as u64 }));
    assert_eq!(gguf.opt_text("name").unwrap().as_deref(), Some("a\u{FFFD}b"));
    assert_eq!(gguf.opt_text("none"), Ok(None));
    let numbers = metadata();
    assert!(Gguf::parse(&numbers).unwrap().opt_text("u64").is_err());
}

#[test]
fn arrays_convert_what_fits() {
    let bytes = metadata();
    let gguf = Gguf::parse(&bytes).unwrap();
    let numbers = gguf.array("i32s").unwrap();
    assert!(numbers.i32s().unwrap().eq([1, 2, -3]));
    assert!(numbers.numbers::<i64>().unwrap().eq([1, 2, -3]));
    let error = numbers.u32s().map(|_| ()).unwrap_err();
    assert_eq!(error, GgufError::OutOfRange { key: "i32s".into(), expected: "u32", got: -3 });
    let error = numbers.strs().map(|_| ()).unwrap_err();
    assert_eq!(error.to_string(), "key \"i32s\": expected array of str, found array of i32");
    let error = gguf.array("strs").unwrap().f32s().map(|_| ()).unwrap_err();
    assert_eq!(error.to_string(), "key \"strs\": expected array of f32, found array of str");
}

#[test]
fn part_names() {
    assert_eq!(split::part_name("dir/model", 0, 12), "dir/model-00001-of-00012.gguf");
    assert_eq!(split::parse_part_name("dir/model-00012-of-00012.gguf"), Some(("dir/model", 11, 12)));
    for name in [
        "model.gguf",
        "model-00000-of-00002.gguf",
        "model-00003-of-00002.gguf",
        "model-0001-of-00002.gguf",
        "model-+0001-of-00002.gguf",
        "model-00001-of-99999.gguf",
        "-00001-of-00002.gguf",
        "model-00001-of-00002.bin",
    ] {
        assert_eq!(split::parse_part_name(name), None, "{name}");
    }
}

fn part(no: u16, count: u16, n_tensors: i32, names: &[&str], endian: Endian) -> Vec<u8> {
    let mut writer = Writer::new(3, endian).unwrap();
    writer.kv("split.no", no).unwrap();
    writer.kv("split.count", count).unwrap();
    writer.kv("split.tensors.count", n_tensors).unwrap();
    for name in names {
        writer.tensor(name, FormatId::I8, &[32]).unwrap();
    }
    let mut bytes = writer.header_bytes();
    bytes.resize(bytes.len() + writer.data_bytes() as usize, no as u8);
    bytes
}

fn set(parts: &[Vec<u8>]) -> Result<usize, GgufError> {
    SplitSet::new(parts.iter().map(|bytes| Gguf::parse(bytes).unwrap()).collect()).map(|set| set.n_tensors())
}

#[test]
fn split_sets_are_checked() {
    let little = Endian::Little;
    let first = part(0, 2, 3, &["b", "a"], little);
    let second = part(1, 2, 3, &["c"], little);
    assert_eq!(set(&[first.clone(), second.clone()]), Ok(3));
    assert_eq!(
        SplitInfo::of(&Gguf::parse(&second).unwrap()),
        Ok(Some(SplitInfo { no: 1, count: 2, n_tensors: Some(3) }))
    );

    let problem = |parts: &[Vec<u8>]| match set(parts) {
        Err(GgufError::Split { part, problem }) => (part, problem),
        other => panic!("{other:?}"),
    };
    assert_eq!(problem(&[]), (0, SplitProblem::Count { expected: 1, got: 0 }));
    assert_eq!(problem(std::slice::from_ref(&first)), (0, SplitProblem::Count { expected: 2, got: 1 }));
    assert_eq!(problem(&[first.clone(), first.clone()]), (1, SplitProblem::Number { expected: 1, got: 0 }));
    let of_three = part(1, 3, 3, &["c"], little);
    assert_eq!(problem(&[first.clone(), of_three]), (1, SplitProblem::Count { expected: 3, got: 2 }));
    let big = part(1, 2, 3, &["c"], Endian::Big);
    assert_eq!(problem(&[first.clone(), big]), (1, SplitProblem::Endian));
    let empty = part(1, 2, 3, &[], little);
    assert_eq!(problem(&[first.clone(), empty]), (0, SplitProblem::Tensors { expected: 3, got: 2 }));
    let twice = part(1, 2, 3, &["a"], little);
    assert!(matches!(
        set(&[first, twice]),
        Err(GgufError::Tensor { tensor, problem: TensorProblem::Duplicate, .. }) if tensor == "a"
    ));
}

#[test]
fn a_whole_file_is_a_set_of_one() {
    assert_eq!(set(&[metadata()]), Ok(0));
    assert_eq!(set(&[part(0, 1, 1, &["a"], Endian::Little)]), Ok(1));
}

#[test]
fn plain_data_turns_and_blocks_do_not() {
    let mut data = [1, 2, 3, 4, 5, 6, 7, 8];
    gguf::swap_plain(FormatId::BF16, &mut data).unwrap();
    assert_eq!(data, [2, 1, 4, 3, 6, 5, 8, 7]);
    gguf::swap_plain(FormatId::F64, &mut data).unwrap();
    assert_eq!(data, [7, 8, 5, 6, 3, 4, 1, 2]);
    assert_eq!(
        gguf::swap_plain(FormatId::Q4_K, &mut data),
        Err(GgufError::ByteOrder { format: FormatId::Q4_K })
    );
}
