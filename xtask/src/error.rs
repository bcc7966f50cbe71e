//! Why a task stopped, and what the user can do about it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use ptx_build::PtxError;

/// The one error of all tasks.
#[derive(Debug)]
pub enum TaskError {
    /// The command line is wrong.
    Usage { what: String },
    /// A file or process operation failed.
    Io { what: String, source: io::Error },
    /// A program ran and failed. Its own messages are already on stderr.
    Command { line: String, status: String },
    /// Something the task needs and cannot install is absent.
    Missing { what: String, fix: String },
    /// A fetched file is not the file we know.
    Checksum { path: PathBuf, expected: &'static str, got: String },
    /// A program's output is not what its interface promises.
    Output { line: String, what: String },
    /// The GPU kernels did not become good PTX.
    Ptx(PtxError),
    /// Checks ran to the end and some failed.
    Checks { failed: usize },
}

impl TaskError {
    /// An I/O error with what was being done.
    pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> TaskError {
        let what = what.into();
        move |source| TaskError::Io { what, source }
    }

    /// An I/O error on a path.
    pub fn path(what: &str, path: &Path) -> impl FnOnce(io::Error) -> TaskError {
        TaskError::io(format!("{what} {}", path.display()))
    }
}

impl fmt::Display for TaskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TaskError::Usage { what } => write!(f, "{what}"),
            TaskError::Io { what, source } => write!(f, "{what}: {source}"),
            TaskError::Command { line, status } => write!(f, "`{line}` failed: {status}"),
            TaskError::Missing { what, fix } => write!(f, "{what}; to fix: {fix}"),
            TaskError::Checksum { path, expected, got } => {
                write!(f, "{}: sha256 is {got}, expected {expected}", path.display())
            }
            TaskError::Output { line, what } => write!(f, "`{line}`: unexpected output: {what}"),
            TaskError::Ptx(error) => error.fmt(f),
            TaskError::Checks { failed } => write!(f, "{failed} failed"),
        }
    }
}

impl std::error::Error for TaskError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            TaskError::Io { source, .. } => Some(source),
            TaskError::Ptx(error) => error.source(),
            _ => None,
        }
    }
}

impl From<PtxError> for TaskError {
    fn from(error: PtxError) -> TaskError {
        TaskError::Ptx(error)
    }
}
