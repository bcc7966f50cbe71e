//! The text a verb works on: from a flag, a file or stdin, as bytes.

use std::ffi::OsStr;
use std::io::{IsTerminal, Read};

use anyhow::{Context as _, Result};

use crate::args::TextArgs;
use crate::exit::usage;

impl TextArgs {
    /// The bytes: of `-p`, else of `-f`, else of stdin unless that is a terminal.
    pub fn read(&self) -> Result<Option<Vec<u8>>> {
        if let Some(text) = &self.prompt {
            return Ok(Some(bytes_of(text)));
        }
        match &self.file {
            Some(path) if path.as_os_str() == "-" => stdin().map(Some),
            Some(path) => std::fs::read(path).with_context(|| path.display().to_string()).map(Some),
            None if std::io::stdin().is_terminal() => Ok(None),
            None => stdin().map(Some),
        }
    }

    /// [`Self::read`]; without any text an error that says how to give it.
    pub fn required(&self) -> Result<Vec<u8>> {
        self.read()?.ok_or_else(|| usage("no text: give it with -p TEXT, -f FILE or on stdin"))
    }
}

fn stdin() -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    std::io::stdin().lock().read_to_end(&mut bytes).context("stdin")?;
    Ok(bytes)
}

/// The bytes of an argument as the user gave them; where the system has no bytes, UTF-8.
pub fn bytes_of(text: &OsStr) -> Vec<u8> {
    #[cfg(unix)]
    {
        std::os::unix::ffi::OsStrExt::as_bytes(text).to_vec()
    }
    #[cfg(not(unix))]
    {
        text.to_string_lossy().into_owned().into_bytes()
    }
}

/// Text that must be UTF-8, as chat messages must.
pub fn utf8(bytes: Vec<u8>, what: &str) -> Result<String> {
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        usage(format!("{what} is not UTF-8 at byte {at}; --raw takes any bytes"))
    })
}
