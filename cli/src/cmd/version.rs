//! `version` and `completions`.

use anyhow::Result;
use clap_complete::Shell;

use crate::args;
use crate::device::backends;
use crate::ui;

/// `version`: the number, the target, and the backends of this build.
pub fn version() -> Result<()> {
    let (os, arch) = (std::env::consts::OS, std::env::consts::ARCH);
    let backends = backends().join(", ");
    ui::out(format!("runik {} ({arch}-{os}; backends: {backends})\n", env!("CARGO_PKG_VERSION")))
}

/// `completions`: a script on stdout.
pub fn completions(shell: Shell) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut args::command(), "runik", &mut script);
    ui::out(script)
}
