//! Any bytes: an error, or a file every question about which has an answer.
#![no_main]

#[path = "../drain.rs"]
#[allow(dead_code)]
mod drain;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    match gguf::Gguf::parse(bytes) {
        Ok(gguf) => drain::drain(&gguf),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
