//! A file as bytes through the page cache: nothing is read until it is used, nothing is copied.
//!
//! A copy, for example in pinned memory, is made by reading the file and not from the mapping, which would cause page faults.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use memmap2::Mmap;

use crate::error::EngineError;
use crate::weights::ByteSource;

/// A mapped file.
pub struct Mapped {
    map: Mmap,
    /// For reading beside the mapping.
    file: File,
    /// For messages.
    path: PathBuf,
    /// Whether the system has once refused to read into the caller's memory.
    cannot_read: AtomicBool,
}

/// `EFAULT`, the same number on every Unix.
#[cfg(unix)]
const BAD_ADDRESS: i32 = 14;

fn io_error(path: &Path, what: String) -> EngineError {
    EngineError::Io { path: path.display().to_string(), what }
}

impl Mapped {
    /// Maps a whole regular file, read-only.
    #[allow(unsafe_code)]
    pub fn open(path: &Path) -> Result<Mapped, EngineError> {
        let error = |what| io_error(path, what);
        let file = File::open(path).map_err(|e| error(e.to_string()))?;
        let metadata = file.metadata().map_err(|e| error(e.to_string()))?;
        if metadata.is_dir() {
            return Err(error(String::from("is a directory, expected a GGUF file")));
        }
        if !metadata.is_file() {
            return Err(error(String::from("is not a regular file and cannot be mapped")));
        }
        // An empty mapping is an error on some systems; an empty file is no GGUF anyway.
        if metadata.len() == 0 {
            return Err(error(String::from("is empty, expected a GGUF file")));
        }
        // SAFETY: the mapping is read-only and private to this value, and its lifetime bounds every slice taken from
        // it. What Rust cannot rule out is another process changing or truncating the file meanwhile. Weights are plain
        // numbers, so changed bytes give wrong numbers; the header is parsed once into checked values with offsets
        // bounded by the length mapped; truncation is a fault that ends the process (SIGBUS), as in every program
        // that maps model files.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| error(e.to_string()))?;
        Ok(Mapped { map, file, path: path.to_owned(), cannot_read: AtomicBool::new(false) })
    }

    /// Asks the system to start reading the whole file ahead; a hint, so that its failure does not matter.
    pub fn read_ahead(&self) {
        #[cfg(unix)]
        let _ = self.map.advise(memmap2::Advice::WillNeed);
    }
}

impl ByteSource for Mapped {
    fn bytes(&self) -> &[u8] {
        &self.map
    }

    #[cfg(unix)]
    fn read(&self, offset: usize, to: &mut [u8]) -> Result<(), EngineError> {
        use std::os::unix::fs::FileExt;
        if !self.cannot_read.load(Ordering::Relaxed) {
            match self.file.read_exact_at(to, offset as u64) {
                Ok(()) => return Ok(()),
                // Some systems (gVisor) cannot write to memory of a device's driver, though we can.
                Err(e) if e.raw_os_error() == Some(BAD_ADDRESS) => {
                    self.cannot_read.store(true, Ordering::Relaxed);
                }
                Err(e) => {
                    let what = format!("reading {} bytes at {offset}: {e}", to.len());
                    return Err(io_error(&self.path, what));
                }
            }
        }
        to.copy_from_slice(&self.map[offset..][..to.len()]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_what_is_there_and_says_what_is_not() {
        let dir = std::env::temp_dir().join(format!("runik-mmap-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let (full, empty) = (dir.join("full"), dir.join("empty"));
        std::fs::write(&full, b"GGUF bytes").unwrap();
        std::fs::write(&empty, b"").unwrap();
        let mapped = Mapped::open(&full).unwrap();
        mapped.read_ahead();
        assert_eq!(mapped.bytes(), b"GGUF bytes");
        let mut read = [0; 4];
        mapped.read(5, &mut read).unwrap();
        assert_eq!(&read, b"byte");
        let message = |p: &Path| Mapped::open(p).map(|_| ()).unwrap_err().to_string();
        assert!(message(&empty).contains("is empty"));
        assert!(message(&dir).contains("is a directory"));
        assert!(message(&dir.join("none")).contains("none"));
        // A file that another process cuts short: through the mapping a signal, read a message.
        #[cfg(unix)]
        {
            File::options().write(true).open(&full).unwrap().set_len(7).unwrap();
            let cut = mapped.read(5, &mut read).unwrap_err().to_string();
            assert!(cut.contains("full: reading 4 bytes at 5"), "{cut}");
            // Where it cannot be read there is the mapping, of which the page is still there.
            mapped.cannot_read.store(true, Ordering::Relaxed);
            mapped.read(5, &mut read).unwrap();
            assert_eq!(&read[..2], b"by");
        }
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
