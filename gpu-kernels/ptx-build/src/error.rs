//! Why there is no PTX, or why it is not good.

use std::fmt;
use std::path::{Path, PathBuf};

/// The one error of this crate. Fields are what their names say.
#[allow(missing_docs)]
#[derive(Debug)]
pub enum PtxError {
    /// No compiler on this machine makes device code; one reason per place looked at.
    NoCompiler { reasons: Vec<String> },
    /// A file operation failed.
    Io { what: String, source: std::io::Error },
    /// A program ran and failed.
    Command { program: String, purpose: String, stderr: String },
    /// A program's output is not what its interface promises.
    Output { program: String, what: String },
    /// The PTX breaks a rule of the kernel crate.
    Lint { tier: String, kernel: String, what: String },
    /// The assembler's output is no ELF file as we know it.
    Elf { path: PathBuf, what: &'static str },
}

impl PtxError {
    /// An I/O error on a path.
    pub(crate) fn path(what: &str, path: &Path) -> impl FnOnce(std::io::Error) -> PtxError {
        let what = format!("{what} {}", path.display());
        move |source| PtxError::Io { what, source }
    }
}

impl fmt::Display for PtxError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PtxError::NoCompiler { reasons } => {
                write!(f, "no compiler for {}: {}", crate::TARGET, reasons.join("; "))
            }
            PtxError::Io { what, source } => write!(f, "{what}: {source}"),
            PtxError::Command { program, purpose, stderr } => {
                write!(f, "{program} failed to {purpose}:\n{stderr}")
            }
            PtxError::Output { program, what } => write!(f, "{program}: unexpected output: {what}"),
            PtxError::Lint { tier, kernel, what } => write!(f, "{tier}, {kernel}: {what}"),
            PtxError::Elf { path, what } => write!(f, "{}: {what}", path.display()),
        }
    }
}

impl std::error::Error for PtxError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            PtxError::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}
