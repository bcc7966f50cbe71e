//! The compiler for device code and the `core` it needs.
//!
//! Looked for in this order, each needs the standard library's source:
//! 1. Debian's `rustc-web` with `rust-web-src`;
//! 2. rustup's toolchains with the component `rust-src`, the active one first.
//!
//! rustup's prebuilt `core` for the target cannot serve: it is built for `panic=abort`, and calls to its panic
//! functions would stay unresolved in PTX. `immediate-abort`, where every panic is one trap, needs a `core` of its own.
//! Both kinds of compiler need `RUSTC_BOOTSTRAP=1`: the PTX ABI is unstable.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::TARGET;
use crate::error::PtxError;

const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const DEBIAN_LIBRARY: &str = "/usr/lib/rustlib/src/rust/library";
/// Debian's packages of the compiler and of the library's source.
pub const DEBIAN_PACKAGES: [&str; 2] = ["rustc-web", "rust-web-src"];
/// The one command that installs a compiler on Debian and Ubuntu.
pub const INSTALL_COMMAND: &str = "apt-get update && apt-get install -y rustc-web rust-web-src";
/// Minor versions of rustc 1.x that are known to work. 1.95 lacks lang items the flags rely on; from 1.97 on the
/// back end refuses GPUs before sm_70, which three tiers need.
const MINOR: u32 = 96;

/// A rustc that makes PTX, with the folder of its `core`.
#[derive(Debug)]
pub struct Compiler {
    rustc: PathBuf,
    sysroot: PathBuf,
    /// Whose compiler it is and its version.
    pub description: String,
}

impl Compiler {
    /// A compiler, with `core` compiled below `build_dir` if that was not done before.
    pub fn find(build_dir: &Path) -> Result<Compiler, PtxError> {
        let mut reasons = Vec::new();
        let debian =
            Candidate { rustc: DEBIAN_RUSTC.into(), owner: "Debian's", need: "rustc-web and rust-web-src" };
        for candidate in std::iter::once(debian).chain(rustup()) {
            match candidate.accept() {
                Ok((library, version)) => return candidate.with_core(&library, &version, build_dir),
                Err(reason) => reasons.push(reason),
            }
        }
        Err(PtxError::NoCompiler { reasons })
    }

    /// Files that change when a compiler or a library's source is installed: Debian's list of packages, rustup's lists of
    /// toolchains and of each one's components.
    pub fn places() -> Vec<PathBuf> {
        let rustup = std::env::var_os("RUSTUP_HOME").map(PathBuf::from);
        let rustup = rustup.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".rustup")));
        let mut places = vec![PathBuf::from("/var/lib/dpkg/status")];
        if let Some(rustup) = rustup {
            let toolchains = std::fs::read_dir(rustup.join("toolchains")).into_iter().flatten().flatten();
            places.extend(toolchains.map(|toolchain| toolchain.path().join("lib/rustlib/components")));
            places.push(rustup.join("update-hashes"));
        }
        places
    }

    /// rustc for the device, with the flags every device crate shares.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(&self.rustc);
        command.env("RUSTC_BOOTSTRAP", "1").args(["--edition", "2024", "--target", TARGET]);
        command.args(self.flags());
        command
    }

    /// The program itself.
    pub(crate) fn rustc(&self) -> &Path {
        &self.rustc
    }

    /// Flags of every device crate.
    pub(crate) fn flags(&self) -> Vec<String> {
        let mut flags = vec![format!("--sysroot={}", self.sysroot.display())];
        flags.extend(FLAGS.map(String::from));
        flags
    }
}

/// Without jump threading: it copies barriers into the arms of divergent branches. With all MIR: `core` and the crates
/// below the kernels exist as metadata only.
const FLAGS: [&str; 5] = [
    "-Zunstable-options",
    "-Copt-level=3",
    "-Cpanic=immediate-abort",
    "-Zmir-enable-passes=-JumpThreading",
    "-Zalways-encode-mir",
];

struct Candidate {
    rustc: PathBuf,
    owner: &'static str,
    need: &'static str,
}

/// rustc of the active toolchain, then of all others.
fn rustup() -> Vec<Candidate> {
    let rustup = |args: &[&str]| {
        Command::new("rustup").args(args).output().ok().filter(|output| output.status.success())
    };
    let toolchains = rustup(&["toolchain", "list", "--quiet"]).map(|output| {
        String::from_utf8_lossy(&output.stdout).lines().map(str::to_string).collect::<Vec<_>>()
    });
    let active = rustup(&["which", "rustc"]).into_iter();
    let others = toolchains
        .into_iter()
        .flatten()
        .filter_map(|name| rustup(&["which", "rustc", "--toolchain", name.trim()]));
    active
        .chain(others)
        .map(|output| Candidate {
            rustc: String::from_utf8_lossy(&output.stdout).trim().into(),
            owner: "rustup's",
            need: "component rust-src",
        })
        .collect()
}

impl Candidate {
    /// The library's source and the version line, if this compiler can serve.
    fn accept(&self) -> Result<(PathBuf, String), String> {
        let ask = |args: &[&str]| {
            let output =
                Command::new(&self.rustc).args(args).output().ok().filter(|output| output.status.success());
            output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_string())
        };
        let Some(version) = ask(&["--version"]) else {
            return Err(format!("{} {} is not installed", self.owner, self.need));
        };
        let short = version.split_whitespace().take(2).collect::<Vec<_>>().join(" ");
        if minor(&version) != Some(MINOR) {
            return Err(format!("{} {short} is not 1.{MINOR}", self.owner));
        }
        let own = ask(&["--print", "sysroot"])
            .map(|sysroot| Path::new(&sysroot).join("lib/rustlib/src/rust/library"));
        let places = own.into_iter().chain([PathBuf::from(DEBIAN_LIBRARY)]);
        // Debian's source serves Debian's compiler only: `core` belongs to one build of rustc.
        let mut places =
            places.filter(|place| self.rustc == Path::new(DEBIAN_RUSTC) || !place.starts_with("/usr/lib"));
        match places.find(|place| place.join("core/src/lib.rs").is_file()) {
            Some(library) => Ok((library, version)),
            None => Err(format!("{} {short} lacks the library's source ({})", self.owner, self.need)),
        }
    }

    fn with_core(self, library: &Path, version: &str, build_dir: &Path) -> Result<Compiler, PtxError> {
        // One sysroot per compiler: metadata of one version is useless to another.
        let name: String = version.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '.').collect();
        let short = version.split_whitespace().take(2).collect::<Vec<_>>().join(" ");
        let sysroot = build_dir.join(format!("sysroot-{name}"));
        let compiler =
            Compiler { rustc: self.rustc, sysroot, description: format!("{} {short}", self.owner) };
        if !compiler.sysroot.join("complete").is_file() {
            compiler.build_core(library, build_dir)?;
        }
        Ok(compiler)
    }
}

/// 96 of `rustc 1.96.0 (…)`.
fn minor(version: &str) -> Option<u32> {
    version.split_whitespace().nth(1)?.strip_prefix("1.")?.split('.').next()?.parse().ok()
}

impl Compiler {
    /// `core` as metadata (about 40 s of CPU, once), built aside and moved into place: two builds may run at once.
    fn build_core(&self, library: &Path, build_dir: &Path) -> Result<(), PtxError> {
        let aside = build_dir.join(format!("sysroot-{}", std::process::id()));
        let out_dir = aside.join("lib/rustlib").join(TARGET).join("lib");
        std::fs::create_dir_all(&out_dir).map_err(PtxError::path("create", &out_dir))?;
        // Nothing of the real compiler_builtins can be reached from PTX; the crate only has to exist.
        let builtins = aside.join("compiler_builtins.rs");
        let stub = "#![no_std]\n#![feature(compiler_builtins)]\n#![compiler_builtins]\n";
        std::fs::write(&builtins, stub).map_err(PtxError::path("write", &builtins))?;
        for (name, source) in [("core", &library.join("core/src/lib.rs")), ("compiler_builtins", &builtins)] {
            let mut command = Command::new(&self.rustc);
            command.env("RUSTC_BOOTSTRAP", "1").args(["--crate-name", name, "--edition", "2024"]);
            command.args([
                "--crate-type",
                "rlib",
                "--emit=metadata",
                "--cap-lints",
                "allow",
                "--target",
                TARGET,
            ]);
            command.args(FLAGS).arg("-Zforce-unstable-if-unmarked");
            if name != "core" {
                command.arg("--sysroot").arg(&aside);
            }
            run(command.arg("--out-dir").arg(&out_dir).arg(source), "compile core for the device")?;
        }
        let done = aside.join("complete");
        std::fs::write(&done, "").map_err(PtxError::path("write", &done))?;
        match std::fs::rename(&aside, &self.sysroot) {
            // The other build was faster; its result is the same.
            Err(_) if self.sysroot.join("complete").is_file() => {
                std::fs::remove_dir_all(&aside).map_err(PtxError::path("remove", &aside))
            }
            moved => moved.map_err(PtxError::path("move core to", &self.sysroot)),
        }
    }
}

/// Runs a program to the end and returns its stdout.
pub(crate) fn run(command: &mut Command, purpose: &str) -> Result<String, PtxError> {
    let program =
        Path::new(command.get_program()).file_name().unwrap_or_default().to_string_lossy().into_owned();
    let output =
        command.output().map_err(|source| PtxError::Io { what: format!("start {program}"), source })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(PtxError::Command { program, purpose: purpose.into(), stderr })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn minor_reads_rustcs_version_line() {
        assert_eq!(minor("rustc 1.96.0 (ac68faa20 2026-05-25) (built from a source tarball)"), Some(96));
        assert_eq!(minor("rustc 1.99.0-nightly"), Some(99));
        assert_eq!(minor("clang 19"), None);
    }

    #[test]
    fn the_install_command_names_the_packages() {
        assert!(DEBIAN_PACKAGES.iter().all(|package| INSTALL_COMMAND.contains(package)));
    }
}
