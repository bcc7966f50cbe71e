//! Why a run stopped.

use std::fmt;

use engine::EngineError;
use gpu_kernels::case::CaseError;
use gpu_kernels::driver::DriverError;
use gpu_kernels::launch::LaunchError;

/// The one error of this crate.
#[derive(Debug)]
pub enum BenchError {
    /// The command line is wrong.
    Usage(String),
    /// A file or process operation failed.
    Io {
        /// What was being done.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// The engine failed.
    Engine(EngineError),
    /// The device failed, or there is none.
    Driver(DriverError),
    /// A launcher refused its arguments.
    Launch(LaunchError),
    /// The peer ran and failed, or said what we do not understand.
    Peer(String),
    /// Checks ran to the end and some failed.
    Failed {
        /// How many.
        failed: usize,
    },
}

impl BenchError {
    /// An I/O error with what was being done.
    pub fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> BenchError {
        let what = what.into();
        move |source| BenchError::Io { what, source }
    }
}

impl fmt::Display for BenchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BenchError::Usage(what) | BenchError::Peer(what) => f.write_str(what),
            BenchError::Io { what, source } => write!(f, "{what}: {source}"),
            BenchError::Engine(error) => error.fmt(f),
            BenchError::Driver(error) => error.fmt(f),
            BenchError::Launch(error) => error.fmt(f),
            BenchError::Failed { failed } => write!(f, "{failed} failed"),
        }
    }
}

impl std::error::Error for BenchError {}

impl From<DriverError> for BenchError {
    fn from(error: DriverError) -> BenchError {
        BenchError::Driver(error)
    }
}

impl From<EngineError> for BenchError {
    fn from(error: EngineError) -> BenchError {
        BenchError::Engine(error)
    }
}

impl From<LaunchError> for BenchError {
    fn from(error: LaunchError) -> BenchError {
        BenchError::Launch(error)
    }
}

/// Whether a case's failure means that nothing works any more on this device's context.
pub(crate) fn is_lost(error: &CaseError) -> bool {
    matches!(error, CaseError::Driver(DriverError::Lost { .. }))
}
