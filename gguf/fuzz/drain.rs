//! Shared by the fuzz targets and the crate's tests: ask a parsed file everything, and write it again.

use gguf::{Gguf, GgufError, SplitInfo, SplitSet, Value, Writer, swap_plain};

/// Reads every value, every element, every tensor's bytes; panics where an invariant of a parsed file does not hold.
pub fn drain(gguf: &Gguf<'_>) {
    let mut n_kvs = 0;
    for (key, value) in gguf.kvs() {
        n_kvs += 1;
        assert_eq!(gguf.get(key).map(|found| found.value_type()), Some(value.value_type()));
        let (_, _, _, _) = (gguf.opt_u32(key), gguf.opt_u64(key), gguf.opt_f32(key), gguf.opt_bool(key));
        let _ = gguf.opt_str(key).map_err(|error| error.to_string());
        drain_value(&value);
    }
    assert_eq!(n_kvs, gguf.n_kvs());
    let mut end = gguf.data_offset();
    let mut by_offset = gguf.tensors().to_vec();
    by_offset.sort_by_key(|tensor| tensor.offset);
    for tensor in &by_offset {
        assert!(
            tensor.offset >= end && (tensor.offset - gguf.data_offset()) % u64::from(gguf.alignment()) == 0
        );
        end = tensor.end();
        assert_eq!(gguf.tensor(tensor.name), Some(tensor));
        assert_eq!(tensor.shape().iter().product::<u64>(), tensor.n_elems());
        let data = gguf.data(tensor);
        assert!(!data.is_empty() && data.len() as u64 == tensor.n_bytes());
        let _ = swap_plain(tensor.format, &mut data.to_vec());
    }
    let _ = SplitInfo::of(gguf);
    if let Ok(set) = SplitSet::new(vec![gguf.clone()]) {
        assert_eq!(set.tensors().count(), set.n_tensors());
    }
}

fn drain_value(value: &Value<'_>) {
    let Value::Array(view) = value else { return };
    let mut n = 0;
    for elem in view.iter() {
        n += 1;
        assert_eq!(elem.value_type(), view.elem_type());
        drain_value(&elem);
    }
    assert_eq!(n, view.len());
    assert!(view.strs().map_or(true, |strs| strs.count() == n));
    assert!(view.u32s().map_or(true, |numbers| numbers.count() == n));
    assert!(view.i32s().map_or(true, |numbers| numbers.count() == n));
    assert!(view.f32s().map_or(true, |numbers| numbers.count() == n));
    assert!(view.bools().map_or(true, |numbers| numbers.count() == n));
}

/// The file as our writer would write it.
pub fn rewrite(gguf: &Gguf<'_>) -> Result<Vec<u8>, GgufError> {
    let mut writer = Writer::like(gguf)?;
    for tensor in gguf.tensors() {
        writer.tensor(tensor.name, tensor.format, &tensor.ne())?;
    }
    let mut bytes = writer.header_bytes();
    for tensor in gguf.tensors() {
        let data = gguf.data(tensor);
        bytes.extend_from_slice(data);
        bytes.resize(bytes.len() + writer.padding(data.len() as u64) as usize, 0);
    }
    Ok(bytes)
}
