//! Tests of the crate from outside, in one binary: `golden` (files others wrote), `roundtrip` (writer against reader),
//! `hostile` (truncation, every field, mutations, the fuzz corpus), `cve` (published attacks on llama.cpp's reader) and
//! `questions` (getters, splits, byte order).

/// How often to do something; Miri, some hundred times slower, does it `few` times.
const fn times(n: usize, few: usize) -> usize {
    if cfg!(miri) { few } else { n }
}

mod allocation;
mod bytes;
mod cve;
#[path = "../../fuzz/drain.rs"]
mod drain;
mod golden;
mod hostile;
mod questions;
mod roundtrip;
