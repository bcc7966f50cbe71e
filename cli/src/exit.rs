//! From a result to an exit status and at most one line on stderr.

use std::process::ExitCode;

/// Arguments that fit the grammar but not the situation: exit status 2.
#[derive(Debug)]
pub struct Usage(pub String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// The user pressed Ctrl-C: exit status 130, nothing to say.
#[derive(Debug)]
pub struct Interrupted;

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// Whoever read stdout has gone, and knows: exit status 1, nothing to say.
#[derive(Debug)]
pub struct NoReader;

impl std::fmt::Display for NoReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("nobody reads stdout")
    }
}

impl std::error::Error for NoReader {}

/// An error of the first kind.
pub fn usage(message: impl Into<String>) -> anyhow::Error {
    Usage(message.into()).into()
}

/// Says what went wrong and gives the exit status.
pub fn code(result: anyhow::Result<()>) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    let status = if error.downcast_ref::<Interrupted>().is_some() {
        return ExitCode::from(130);
    } else if error.downcast_ref::<NoReader>().is_some() {
        return ExitCode::FAILURE;
    } else if error.chain().any(|e| e.downcast_ref::<Usage>().is_some()) {
        2
    } else {
        1
    };
    crate::ui::error(&format!("{error:#}"));
    ExitCode::from(status)
}
