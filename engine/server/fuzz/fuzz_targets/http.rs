//! Any bytes, cut anywhere: the same requests as in one piece.
#![no_main]

#[path = "../harness.rs"]
#[allow(dead_code)]
mod harness;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| harness::http(bytes));
