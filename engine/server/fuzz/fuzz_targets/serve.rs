//! A client says any bytes: the server answers or refuses, and comes to rest.
#![no_main]

#[path = "../harness.rs"]
#[allow(dead_code)]
mod harness;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    harness::serve(bytes);
});
