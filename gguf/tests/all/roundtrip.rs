//! Writer against reader: any metadata and tensors come back as they went in, whatever version and byte order.

use gguf::{Array, Endian, Gguf, GgufError, TensorProblem, Value, Writer};
use proptest::prelude::*;
use quant::FormatId;

use crate::allocation::parse_bounded;
use crate::drain::{drain, rewrite};
use crate::times;

/// A value that owns what it holds.
#[derive(Clone, Debug)]
enum Owned {
    Plain(Value<'static>),
    Str(Vec<u8>),
    Array(Array),
}

impl Owned {
    fn value(&self) -> Value<'_> {
        match self {
            Owned::Plain(value) => *value,
            Owned::Str(bytes) => Value::Str(bytes),
            Owned::Array(array) => array.into(),
        }
    }
}

fn plain() -> impl Strategy<Value = Value<'static>> {
    prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i8>().prop_map(Value::I8),
        any::<u16>().prop_map(Value::U16),
        any::<i16>().prop_map(Value::I16),
        any::<u32>().prop_map(Value::U32),
        any::<i32>().prop_map(Value::I32),
        any::<f32>().prop_map(Value::F32),
        any::<bool>().prop_map(Value::Bool),
        any::<u64>().prop_map(Value::U64),
        any::<i64>().prop_map(Value::I64),
        any::<f64>().prop_map(Value::F64),
    ]
}

fn flat_array() -> impl Strategy<Value = Array> {
    use prop::collection::vec;
    prop_oneof![
        vec(any::<u8>(), 0..9).prop_map(|items| Array::numbers(&items)),
        vec(any::<i16>(), 0..9).prop_map(|items| Array::numbers(&items)),
        vec(any::<u32>(), 0..9).prop_map(|items| Array::numbers(&items)),
        vec(any::<f32>(), 0..9).prop_map(|items| Array::numbers(&items)),
        vec(any::<bool>(), 0..9).prop_map(|items| Array::numbers(&items)),
        vec(any::<i64>(), 0..9).prop_map(|items| Array::numbers(&items)),
        vec(any::<f64>(), 0..9).prop_map(|items| Array::numbers(&items)),
        vec(vec(any::<u8>(), 0..9), 0..9).prop_map(|items| Array::strs(&items)),
    ]
}

fn owned() -> impl Strategy<Value = Owned> {
    let array = flat_array().prop_recursive(3, 24, 4, |inner| {
        prop::collection::vec(inner, 0..4).prop_map(|items| Array::nested(&items).unwrap())
    });
    prop_oneof![
        3 => plain().prop_map(Owned::Plain),
        1 => prop::collection::vec(any::<u8>(), 0..20).prop_map(Owned::Str),
        2 => array.prop_map(Owned::Array),
    ]
}

fn tensor() -> impl Strategy<Value = (FormatId, Vec<u64>)> {
    let format = prop::sample::select(vec![FormatId::F32, FormatId::F16, FormatId::I8, FormatId::Q8_0]);
    (format, prop::collection::vec(1u64..6, 0..=4)).prop_map(|(format, mut ne)| {
        if format == FormatId::Q8_0 {
            match ne.first_mut() {
                Some(first) => *first *= 32,
                None => ne.push(32),
            }
        }
        (format, ne)
    })
}

/// Equal, with NaNs equal by their bits.
fn same(a: &Value<'_>, b: &Value<'_>) -> bool {
    match (a, b) {
        (Value::F32(a), Value::F32(b)) => a.to_bits() == b.to_bits(),
        (Value::F64(a), Value::F64(b)) => a.to_bits() == b.to_bits(),
        (Value::Array(a), Value::Array(b)) => {
            a.elem_type() == b.elem_type()
                && a.len() == b.len()
                && a.iter().zip(b.iter()).all(|(a, b)| same(&a, &b))
        }
        _ => a == b,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(times(512, 4) as u32))]

    #[test]
    fn any_file(
        big in any::<bool>(),
        version in 2u32..=3,
        alignment in prop::option::of(0u32..8),
        kvs in prop::collection::btree_map("[a-z.]{1,12}", owned(), 0..8),
        tensors in prop::collection::btree_map("[a-z.]{1,12}", tensor(), 0..6),
    ) {
        let endian = if big { Endian::Big } else { Endian::Little };
        let mut writer = Writer::new(version, endian).unwrap();
        if let Some(log2) = alignment {
            writer.kv("general.alignment", 1u32 << log2).unwrap();
        }
        for (key, value) in &kvs {
            writer.kv(key, value.value()).unwrap();
        }
        let mut data = Vec::new();
        for (i, (name, (format, ne))) in tensors.iter().enumerate() {
            let n_bytes = writer.tensor(name, *format, ne).unwrap();
            data.resize(data.len() + n_bytes as usize, i as u8 + 1);
            data.resize(data.len() + writer.padding(n_bytes) as usize, 0);
        }
        prop_assert_eq!(data.len() as u64, writer.data_bytes());
        let mut bytes = writer.header_bytes();
        bytes.extend_from_slice(&data);

        let gguf = parse_bounded(&bytes).unwrap();
        drain(&gguf);
        prop_assert_eq!((gguf.version(), gguf.endian(), gguf.alignment()), (version, endian, writer.alignment()));
        prop_assert_eq!(gguf.n_kvs(), kvs.len() + usize::from(alignment.is_some()));
        for (key, value) in &kvs {
            let read = gguf.get(key).unwrap();
            prop_assert!(same(&read, &value.value()), "{}: {:?} became {:?}", key, value, read);
        }
        prop_assert_eq!(gguf.tensors().len(), tensors.len());
        for (i, (info, (name, (format, ne)))) in gguf.tensors().iter().zip(&tensors).enumerate() {
            prop_assert_eq!((info.name, info.format, &*info.ne()), (name.as_str(), *format, &ne[..]));
            prop_assert!(gguf.data(info).iter().all(|&byte| byte == i as u8 + 1));
        }
        prop_assert!(rewrite(&gguf).unwrap() == bytes);

        // The metadata alone, in the other byte order and back.
        let other = if big { Endian::Little } else { Endian::Big };
        let mut turned = Writer::new(version, other).unwrap();
        for (key, value) in gguf.kvs() {
            turned.kv(key, value).unwrap();
        }
        let turned = turned.header_bytes();
        let turned = Gguf::parse(&turned).unwrap();
        for ((key, value), (key2, value2)) in gguf.kvs().zip(turned.kvs()) {
            prop_assert!(key == key2 && same(&value, &value2));
        }
    }
}

#[test]
fn writer_refuses() {
    let mut writer = Writer::default();
    writer.kv("a", 1u32).unwrap();
    assert_eq!(writer.kv("a", 2u32), Err(GgufError::DuplicateKey { key: "a".into(), offset: 0 }));
    assert_eq!(writer.kv("", 2u32), Err(GgufError::Empty { what: "a key", offset: 0 }));
    assert_eq!(writer.kv("general.alignment", 48u32), Err(GgufError::Alignment { got: 48 }));
    assert!(matches!(writer.kv("general.alignment", 64u64), Err(GgufError::WrongType { .. })));
    assert!(matches!(Writer::new(1, Endian::Little), Err(GgufError::UnsupportedVersion { got: 1 })));

    writer.tensor("t", FormatId::F32, &[3]).unwrap();
    assert_eq!(writer.kv("general.alignment", 64u32), Err(GgufError::Alignment { got: 64 }));
    let problem = |result: Result<u64, GgufError>| match result {
        Err(GgufError::Tensor { problem, .. }) => problem,
        other => panic!("{other:?}"),
    };
    assert_eq!(problem(writer.tensor("t", FormatId::F32, &[3])), TensorProblem::Duplicate);
    assert_eq!(problem(writer.tensor("u", FormatId::F32, &[0])), TensorProblem::Dim { index: 0, got: 0 });
    assert_eq!(problem(writer.tensor("u", FormatId::F32, &[1; 5])), TensorProblem::TooManyDims { got: 5 });
    assert!(matches!(
        problem(writer.tensor("u", FormatId::Q8_0, &[33])),
        TensorProblem::RowLength { block_elems: 32, got: 33, .. }
    ));
    assert!(matches!(
        problem(writer.tensor("u", FormatId::F32, &[u64::from(u32::MAX); 4])),
        TensorProblem::Overflow { .. }
    ));

    let deep = (0..3).fold(Array::numbers(&[1u8]), |inner, _| Array::nested(&[inner]).unwrap());
    writer.kv("deep", &deep).unwrap();
    assert!(matches!(Array::nested(&[deep]), Err(GgufError::TooDeep { .. })));
}

#[test]
fn set_and_remove_keep_ggmls_order() {
    let mut writer = Writer::default();
    for key in ["a", "b", "c"] {
        writer.kv(key, 1u8).unwrap();
    }
    writer.set("a", 2u8).unwrap();
    assert!(writer.remove("b") && !writer.remove("b"));
    let bytes = writer.header_bytes();
    assert_eq!(bytes.len() % 32, 0);
    let gguf = Gguf::parse(&bytes).unwrap();
    assert!(gguf.kvs().eq([("c", Value::U8(1)), ("a", Value::U8(2))]));
}
