//! Bad input of every kind: exit status 1 or 2, one clear line on stderr, nothing on stdout, no half-written file.

mod common;

use std::ffi::OsStr;

use common::{Folder, MODEL, run, runik};

/// Checks a failure: its status and what its one line says.
#[track_caller]
fn fails(args: &[&str], status: i32, says: &str) {
    let output = run(args);
    let line = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(status), "{args:?}: {line}");
    assert_eq!(line.lines().count(), 1, "{args:?}: {line}");
    assert!(line.starts_with("runik: error: ") && line.contains(says), "{args:?}: {line}");
    assert!(output.stdout.is_empty(), "{args:?}");
}

/// The model's bytes with a change.
fn changed(folder: &Folder, name: &str, change: impl FnOnce(&mut Vec<u8>)) -> String {
    let mut bytes = std::fs::read(MODEL).unwrap();
    change(&mut bytes);
    let path = folder.path(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

fn replace(bytes: &mut [u8], from: &[u8], to: &[u8]) {
    assert_eq!(from.len(), to.len());
    let at = bytes.windows(from.len()).position(|w| w == from).unwrap();
    bytes[at..at + to.len()].copy_from_slice(to);
}

#[test]
fn files_that_are_no_models() {
    let folder = Folder::new("no-models");
    let empty = folder.path("empty.gguf");
    std::fs::write(&empty, b"").unwrap();
    let text = folder.path("text.gguf");
    std::fs::write(&text, b"not a model at all").unwrap();
    let arch =
        changed(&folder, "arch.gguf", |b| replace(b, b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0lamma"));
    let version = changed(&folder, "version.gguf", |b| b[4] = 9);
    let kv_type = changed(&folder, "type.gguf", |b| {
        // block_count: u32 becomes f32.
        let at = b.windows(17).position(|w| w == b"llama.block_count").unwrap();
        b[at + 17] = 6;
    });
    let missing = folder.path("missing.gguf");
    let dir = folder.path("");
    let cases: [(&str, &str); 7] = [
        (&missing, "missing.gguf"),
        (&dir, "is a directory"),
        (&empty, "is empty"),
        (&text, "not a GGUF file"),
        (&version, "version"),
        (&kv_type, "block_count"),
        (&arch, "lamma"),
    ];
    for (path, says) in cases {
        fails(&["run", path, "hi"], 1, says);
        fails(&["logits", path, "--tokens", "1", "--out", &folder.path("out")], 1, says);
        fails(&["bench", path, "-p", "1", "-n", "0", "-r", "1"], 1, says);
    }
    for (path, says) in &cases[..5] {
        fails(&["inspect", path], 1, says);
        fails(&["tokenize", path, "-p", "x"], 1, says);
        fails(&["quantize", path, &folder.path("out.gguf"), "Q8_0"], 1, says);
    }
    assert!(
        !folder.names().iter().any(|n| n.starts_with("out") || n.starts_with('.')),
        "{:?}",
        folder.names()
    );
}

#[test]
fn truncated_files() {
    let folder = Folder::new("truncated");
    let whole = std::fs::read(MODEL).unwrap().len();
    for keep in [1, 4, 8, 23, 24, 100, 5000, whole / 2, whole - 1] {
        let path = changed(&folder, "cut.gguf", |b| b.truncate(keep));
        for args in [vec!["run", &path, "hi"], vec!["inspect", &path]] {
            let output = run(&args);
            let line = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.code(), Some(1), "{keep}: {line}");
            assert_eq!(line.lines().count(), 1, "{keep}: {line}");
            assert!(line.contains("cut.gguf") && output.stdout.is_empty(), "{keep}: {line}");
        }
    }
}

#[test]
fn flags_that_make_no_sense() {
    for (args, says) in [
        (&["run", MODEL, "x", "--temp", "warm"][..], "--temp"),
        (&["run", MODEL, "x", "-c", "many"], "--ctx-size"),
        (&["run", MODEL, "x", "-t", "0"], "--threads 0"),
        (&["run", MODEL, "x", "-n", "-7"], "--predict"),
        (&["run", MODEL, "x", "--device", "tpu"], "--device"),
        (&["run", MODEL, "x", "-ctk", "q2_k"], "--cache-type-k"),
        (&["run", MODEL, "x", "-ctv", "iq4_xs"], "--cache-type-v"),
        (&["run", MODEL, "x", "-ngl", "some"], "--gpu-layers"),
        (&["run", MODEL, "x", "-ot", "ffn"], "REGEX=DEVICE"),
        (&["run", MODEL, "x", "-ot", "ffn=tpu"], "'tpu' is no device"),
        (&["run", MODEL, "x", "-ot", "(=cpu"], "bad pattern"),
        (&["run", MODEL, "x", "--device", "cpu", "-ot", "expz=cpu"], "no tensor's name matches 'expz'"),
        (&["inspect", MODEL, "--device", "cpu", "-ot", "expz=cpu"], "no tensor's name matches 'expz'"),
        (&["run", MODEL, "x", "--device", "emu", "-ot", "ffn=cuda:7"], "cuda:7 is none of the devices"),
        (&["run", MODEL, "x", "--device", "cpu", "--cpu-moe"], "--cpu-moe: the model (llama) has no experts"),
        (
            &["bench", MODEL, "--device", "emu", "-ncmoe", "2"],
            "--n-cpu-moe: the model (llama) has no experts",
        ),
        (&["run", MODEL, "x", "--n-cpu-moe", "all"], "--n-cpu-moe"),
        (&["run", MODEL, "x", "-p", "y"], "-p"),
        (&["run", MODEL, "x", "--repeat-penalty", "0"], "--repeat-penalty"),
        (&["run", MODEL, ""], "empty"),
        (&["run"], "MODEL"),
        (&["runn"], "runn"),
        (&["quantize", MODEL, "out.gguf", "Q9"], "unknown file type"),
        (&["quantize", MODEL, MODEL, "Q8_0"], "same file"),
        (&["quantize", MODEL, "out.gguf", "Q8_0", "--tensor-type", "x"], "REGEX=TYPE"),
        (&["detokenize", MODEL, "99999"], "299 tokens"),
        (&["detokenize", MODEL, "a,b"], "invalid"),
        (&["bench", MODEL, "-p", "0", "-n", "0"], "nothing to measure"),
        (&["bench", MODEL, "-r", "0"], "-r 0"),
        (&["pull", "not a repo"], "USER/NAME"),
    ] {
        fails(args, 2, says);
    }
    fails(&["run", MODEL, "x", "--device", "cpu", "--require-gpu"], 1, "computes on the CPU");
    fails(&["run", MODEL, "x", "--device", "cuda:99", "--require-gpu"], 1, "--require-gpu");
    fails(&["run", MODEL, "x", "--chat-template", "nope"], 1, "chatml");
    fails(&["logits", MODEL, "--tokens", "1,99999", "--out", "-"], 1, "99999");
}

#[test]
fn more_tokens_than_the_context() {
    let long = "a ".repeat(300);
    fails(&["run", MODEL, "--raw", "-p", &long, "-c", "64"], 1, "the context 64");
    fails(
        &["logits", MODEL, "--tokens", "1,2,3,4,5", "-c", "4", "--out", "-"],
        1,
        "5 tokens, the context holds 4",
    );
    fails(&["perplexity", MODEL, "-p", "short", "-c", "64"], 1, "at least 128");
}

#[cfg(unix)]
#[test]
fn text_that_is_not_utf8() {
    use std::os::unix::ffi::OsStrExt;
    let bytes = OsStr::from_bytes(b"a\xff\xfeb");
    let chat = runik().args(["run", MODEL, "--chat-template", "chatml"]).arg(bytes).output().unwrap();
    assert_eq!(chat.status.code(), Some(2));
    let line = String::from_utf8(chat.stderr).unwrap();
    assert!(line.contains("not UTF-8 at byte 1") && line.lines().count() == 1, "{line}");
    for verb in [&["tokenize", MODEL, "-p"][..], &["run", MODEL, "--raw", "-n", "1", "-p"]] {
        assert!(
            runik().args(verb).arg(bytes).output().unwrap().status.success(),
            "raw bytes are fine: {verb:?}"
        );
    }
}

#[test]
fn failed_quantising_leaves_nothing() {
    let folder = Folder::new("half");
    let (q8, out) = (folder.path("q8.gguf"), folder.path("out.gguf"));
    assert!(run(&["quantize", MODEL, &q8, "Q8_0"]).status.success());
    fails(&["quantize", MODEL, &folder.path("no/such/out.gguf"), "Q8_0"], 1, "no/such");
    fails(&["quantize", MODEL, &out, "Q8_0", "--imatrix", &folder.path("none")], 1, "none");
    fails(&["quantize", MODEL, &out, "Q8_0", "--imatrix", MODEL], 1, "importance matrix");
    assert_eq!(folder.names(), ["q8.gguf"]);
}

/// A result goes to a file beside its place and is renamed: that would put a file where a device or a pipe is.
#[cfg(unix)]
#[test]
fn results_replace_only_files() {
    use std::os::unix::fs::FileTypeExt;
    let folder = Folder::new("devices");
    let (socket, link, file) = (folder.path("socket"), folder.path("link"), folder.path("file"));
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    fails(&["quantize", MODEL, &socket, "Q8_0"], 1, "no regular file");
    fails(&["logits", MODEL, "--tokens", "1", "--out", &socket], 1, "no regular file");
    assert!(std::fs::symlink_metadata(&socket).unwrap().file_type().is_socket());
    // A link stays.
    std::fs::write(&file, "old").unwrap();
    std::os::unix::fs::symlink("file", &link).unwrap();
    assert!(run(&["logits", MODEL, "--tokens", "1", "--out", &link]).status.success());
    assert!(std::fs::symlink_metadata(&link).unwrap().file_type().is_symlink());
    assert!(std::fs::read(&file).unwrap().len() > 100);
    assert_eq!(folder.names(), ["file", "link", "socket"]);
}

#[test]
fn missing_parts_of_a_split_set_are_named() {
    let folder = Folder::new("split");
    let first = folder.path("m-00001-of-00002.gguf");
    std::fs::copy(MODEL, &first).unwrap();
    fails(&["run", &first, "hi"], 1, "m-00002-of-00002.gguf");
}

/// Every verb that writes to stdout.
#[cfg(target_os = "linux")]
const WRITERS: [&[&str]; 16] = [
    &["--help"],
    &["bench", "--help"],
    &["--version"],
    &["version"],
    &["completions", "bash"],
    &["doctor", "--json"],
    &["inspect", MODEL],
    &["inspect", MODEL, "--json"],
    &["tokenize", MODEL, "-p", "as a", "--json"],
    &["detokenize", MODEL, "40,41"],
    &["run", MODEL, "--raw", "-p", "as a", "-n", "2"],
    &["run", MODEL, "--raw", "-p", "as a", "-n", "2", "--json"],
    &["logits", MODEL, "--tokens", "1,2", "--out", "-"],
    &["bench", MODEL, "-p", "1", "-n", "0", "-r", "1"],
    &["bench", MODEL, "-p", "1", "-n", "0", "-r", "1", "-o", "csv"],
    &["bench", MODEL, "-p", "1", "-n", "0", "-r", "1", "-o", "json"],
];

#[cfg(target_os = "linux")]
#[test]
fn a_full_stdout_is_said() {
    for args in WRITERS {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let output = runik().args(args).stdout(full).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {said}");
        let last = said.lines().last();
        assert_eq!(last, Some("runik: error: stdout: No space left on device (os error 28)"), "{args:?}");
        assert_eq!(said.matches("error:").count(), 1, "{args:?}: {said}");
    }
}

/// As behind `head`: whoever stopped reading need not be told.
#[cfg(target_os = "linux")]
#[test]
fn a_closed_stdout_ends_quietly() {
    for args in WRITERS {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = runik().args(args).stdout(writer).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {said}");
        assert!(!said.contains("error"), "{args:?}: {said}");
    }
}

/// No GPU is said, not hidden.
#[test]
fn a_gpu_that_is_not_there_is_said() {
    let output = run(&["run", MODEL, "--raw", "-p", "as a", "-n", "1", "--device", "cuda:99", "-ngl", "99"]);
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("all layers are on the CPU"));
}
