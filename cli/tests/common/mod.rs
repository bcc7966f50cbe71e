//! The built binary, its answers, and files to run it on.

#![allow(dead_code)] // each test file uses its part

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// A tiny llama with random weights; llama.cpp's logits and greedy tokens lie beside it.
pub const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/llama-linear-a.gguf");

/// The binary with an environment of its own.
pub fn runik() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_runik"));
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if name.starts_with("RUNIK_")
            || name.starts_with("HF_")
            || name == "SSL_CERT_FILE"
            || name.to_lowercase().ends_with("_proxy")
        {
            command.env_remove(name);
        }
    }
    command.stdin(Stdio::null());
    command
}

/// Runs with these arguments.
pub fn run(args: &[&str]) -> Output {
    runik().args(args).output().unwrap()
}

/// Standard output of a run that must succeed.
pub fn ok(args: &[&str]) -> String {
    let output = run(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Standard output of a run that must succeed, as JSON.
pub fn json(args: &[&str]) -> serde_json::Value {
    serde_json::from_str(&ok(args)).unwrap()
}

/// A folder that is removed when dropped.
pub struct Folder(PathBuf);

impl Folder {
    /// An empty one; `name` must differ between tests.
    pub fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("runik-test-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }

    /// Names of what is in it, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(&self.0)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all::<&Path>(self.0.as_ref());
    }
}
