//! Help texts and the shape of `inspect`, as snapshots: scripts and people depend on them.

mod common;

use common::{MODEL, ok};

#[test]
fn help_of_every_verb() {
    insta::assert_snapshot!("runik", ok(&["--help"]));
    for verb in [
        "run",
        "serve",
        "tokenize",
        "detokenize",
        "logits",
        "perplexity",
        "bench",
        "inspect",
        "quantize",
        "pull",
        "doctor",
        "completions",
        "version",
    ] {
        insta::assert_snapshot!(verb, ok(&[verb, "--help"]));
    }
}

#[test]
fn inspect_of_a_tiny_model() {
    insta::assert_snapshot!("inspect-text", ok(&["inspect", MODEL, "--tensors", "-c", "256"]));
    let mut object = common::json(&["inspect", MODEL, "--json", "-c", "256"]);
    object["files"] = serde_json::json!(["llama-linear-a.gguf"]);
    insta::assert_snapshot!("inspect-json", serde_json::to_string_pretty(&object).unwrap());
}
