//! Any file that parses, written again: parses to the same metadata and tensors, and is a fixed point from then on.
#![no_main]

#[path = "../drain.rs"]
#[allow(dead_code)]
mod drain;

use gguf::Gguf;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(gguf) = Gguf::parse(bytes) else { return };
    if gguf.alignment() > 1 << 16 {
        return; // the padding alone would use up the time
    }
    let again = drain::rewrite(&gguf).expect("a parsed file can be written");
    let second = Gguf::parse(&again).expect("our own file parses");
    assert_eq!(gguf.n_kvs(), second.n_kvs());
    assert!(gguf.kvs().zip(second.kvs()).all(|(a, b)| a.0 == b.0 && a.1.value_type() == b.1.value_type()));
    assert_eq!(gguf.tensors().len(), second.tensors().len());
    for (a, b) in gguf.tensors().iter().zip(second.tensors()) {
        assert!(
            a.name == b.name && a.format == b.format && a.ne() == b.ne() && gguf.data(a) == second.data(b)
        );
    }
    assert!(drain::rewrite(&second).expect("a parsed file can be written") == again);
});
