//! Compiling the kernel crate, once per tier.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::TARGET;
use crate::compiler::{Compiler, run};
use crate::error::PtxError;
use crate::module::Module;
use crate::tier::Tier;

/// LLVM's options. Fuse multiply and add, as nvcc does by default. Unroll large bodies: an array indexed by a loop
/// that stays rolled goes to local memory.
const LLVM_ARGS: &str = "-Cllvm-args=-nvptx-fma-level=2 -unroll-threshold=3000";

/// Crates that the kernel crate uses on the device: quant and what it brings.
const EXTERNS: [&str; 3] = ["quant", "half", "bytemuck"];

/// The kernel crate and the crates below it, ready to compile.
#[derive(Debug)]
pub struct Kernels<'a> {
    compiler: &'a Compiler,
    /// `gpu-kernels/src/lib.rs`.
    source: PathBuf,
    build_dir: &'a Path,
    /// The crates it uses on the device, and their metadata.
    externs: Vec<(&'static str, PathBuf)>,
}

impl<'a> Kernels<'a> {
    /// Compiles what the kernel crate depends on: `quant`, as metadata.
    ///
    /// `cargo` is the program to run, `root` the workspace. Its target folder is one of our own, so that a cargo that
    /// runs this from a build script does not wait for itself.
    pub fn prepare(
        compiler: &'a Compiler,
        cargo: &Path,
        root: &Path,
        build_dir: &'a Path,
    ) -> Result<Kernels<'a>, PtxError> {
        let mut command = Command::new(cargo);
        command.current_dir(root).args(["check", "--quiet", "--release", "-p", "quant"]);
        command.args([
            "--no-default-features",
            "--target",
            TARGET,
            "--message-format=json-render-diagnostics",
            "--target-dir",
        ]);
        command.arg(build_dir.join("deps"));
        // What an outer cargo or clippy set is for the host.
        for name in [
            "RUSTFLAGS",
            "RUSTC_WRAPPER",
            "RUSTC_WORKSPACE_WRAPPER",
            "CARGO_BUILD_TARGET",
            "CARGO_BUILD_RUSTFLAGS",
        ] {
            command.env_remove(name);
        }
        command.env("RUSTC", compiler.rustc()).env("RUSTC_BOOTSTRAP", "1");
        // Cargo's own encoding of a flag list: paths may hold spaces.
        command.env("CARGO_ENCODED_RUSTFLAGS", compiler.flags().join("\u{1f}"));
        let messages = run(&mut command, "compile quant for the device")?;
        let find = |name: &'static str| {
            let what = format!("no metadata of {name} named");
            let missing = PtxError::Output { program: "cargo check".into(), what };
            artifact(&messages, &format!("lib{name}-")).map(|path| (name, path)).ok_or(missing)
        };
        let externs = EXTERNS.into_iter().map(find).collect::<Result<_, _>>()?;
        Ok(Kernels { compiler, source: root.join("gpu-kernels/src/lib.rs"), build_dir, externs })
    }

    /// PTX of every tier given, in that order, several at a time.
    pub fn build(&self, tiers: &[Tier]) -> Result<Vec<Module>, PtxError> {
        let next = AtomicUsize::new(0);
        let results: Vec<Mutex<Option<Result<Module, PtxError>>>> =
            tiers.iter().map(|_| Mutex::new(None)).collect();
        let workers = std::thread::available_parallelism().map_or(1, |n| n.get()).min(tiers.len());
        std::thread::scope(|scope| {
            for _ in 0..workers {
                scope.spawn(|| {
                    loop {
                        let i = next.fetch_add(1, Ordering::Relaxed);
                        let (Some(tier), Some(slot)) = (tiers.get(i), results.get(i)) else { break };
                        *slot.lock().unwrap_or_else(|poison| poison.into_inner()) =
                            Some(self.build_tier(tier));
                    }
                });
            }
        });
        let finished =
            results.into_iter().map(|slot| slot.into_inner().unwrap_or_else(|poison| poison.into_inner()));
        finished.map(|result| result.expect("every tier has a worker")).collect()
    }

    fn build_tier(&self, tier: &Tier) -> Result<Module, PtxError> {
        // A folder each, since rustc's intermediate files have the same names for all; with the process in its name,
        // since a build script and xtask may compile at the same time.
        let folder = self.build_dir.join(format!("{}.{}", tier.name, std::process::id()));
        std::fs::create_dir_all(&folder).map_err(PtxError::path("create", &folder))?;
        let raw = folder.join("kernels.s");
        let deps = |kind: &str| format!("dependency={}", self.build_dir.join("deps").join(kind).display());
        let mut command = self.compiler.command();
        // Lints are the host build's affair; here each tier leaves other parts of the device layer unused.
        command.args(["--cap-lints", "allow"]);
        command.args(["--crate-name", "gpu_kernels", "--crate-type", "rlib", "-Ccodegen-units=1", LLVM_ARGS]);
        command.arg(format!("-Ctarget-cpu={}", tier.name)).arg(format!("-Ctarget-feature=+{}", tier.ptx));
        for cfg in tier.cfgs() {
            command.arg("--cfg").arg(cfg);
        }
        for (name, path) in &self.externs {
            command.arg("--extern").arg(format!("{name}={}", path.display()));
        }
        // Derive macros of quant's dependencies are host crates.
        command.args([
            "-L".into(),
            deps(&format!("{TARGET}/release/deps")),
            "-L".into(),
            deps("release/deps"),
        ]);
        command.arg("--emit=asm").arg("-o").arg(&raw).arg(&self.source).current_dir(&folder);
        run(&mut command, &format!("compile the kernels for {}", tier.name))?;
        let text = std::fs::read_to_string(&raw).map_err(PtxError::path("read", &raw))?;
        std::fs::remove_dir_all(&folder).map_err(PtxError::path("remove", &folder))?;
        Module::finish(*tier, &text)
    }
}

/// The metadata file that cargo's messages name with this prefix.
fn artifact(messages: &str, prefix: &str) -> Option<PathBuf> {
    let strings = messages.split('"').filter(|text| text.ends_with(".rmeta"));
    strings.map(PathBuf::from).find(|path| {
        path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(prefix))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn artifact_finds_the_metadata_of_one_crate() {
        let messages = r#"{"filenames":["/t/deps/libhalf-1.rmeta"]}
{"filenames":["/t/deps/libquant-0a.rmeta"],"fresh":true}"#;
        assert_eq!(artifact(messages, "libquant-"), Some("/t/deps/libquant-0a.rmeta".into()));
        assert_eq!(artifact(messages, "libgguf-"), None);
    }
}
