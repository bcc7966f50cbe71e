//! Compiling the kernel crate, once per kernel and tier.
//!
//! A kernel's compile sees the whole crate but emits only its own entries (`--cfg entries_of="mmvq"`, which the macro
//! `kernels!` asks for): thousands of entries in one compile would take minutes after each edit. Unchanged modules are
//! not compiled again.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::TARGET;
use crate::cache;
use crate::compiler::{Compiler, run};
use crate::error::PtxError;
use crate::module::Module;
use crate::tier::Tier;

/// LLVM's options. Fuse multiply and add, as nvcc does by default. Unroll large bodies: an array indexed by a loop
/// that stays rolled goes to local memory.
const LLVM_ARGS: &str = "-Cllvm-args=-nvptx-fma-level=2 -unroll-threshold=3000";

/// Where the kernel files are, from the workspace's root.
const KERNELS_DIR: &str = "gpu-kernels/src/kernels";

/// Crates that the kernel crate uses on the device: quant and what it brings.
const EXTERNS: [&str; 3] = ["quant", "half", "bytemuck"];

/// The kernel crate and the crates below it, ready to compile.
#[derive(Debug)]
pub struct Kernels<'a> {
    compiler: &'a Compiler,
    root: PathBuf,
    build_dir: &'a Path,
    /// The crates it uses on the device, and their metadata.
    externs: Vec<(&'static str, PathBuf)>,
    /// Digest of those.
    externs_digest: u64,
    names: Vec<String>,
    /// The file or folder that declares each, as [`cache::owner`] has it.
    owners: BTreeMap<String, String>,
}

/// The module of the canaries and probes of `device/`: compiled and checked, never embedded.
pub const CHECKS: &str = "device_checks";

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
        let externs = EXTERNS.into_iter().map(find).collect::<Result<Vec<_>, _>>()?;
        let mut contents = Vec::new();
        for (_, path) in &externs {
            contents.push(std::fs::read(path).map_err(PtxError::path("read", path))?);
        }
        let root = root.to_path_buf();
        let mut owners = BTreeMap::new();
        add_names(&root.join(KERNELS_DIR), &root.join(KERNELS_DIR), &mut owners)?;
        let names = owners.keys().cloned().chain([CHECKS.into()]).collect();
        let externs_digest = cache::digest(contents);
        Ok(Kernels { compiler, root, build_dir, externs, externs_digest, names, owners })
    }

    /// Names of the kernels, sorted, and [`CHECKS`] at the end.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The modules of these kernels for these tiers, tier by tier, several at a time. A kernel that a tier does not have
    /// gives none.
    pub fn build(&self, names: &[String], tiers: &[Tier]) -> Result<Vec<Module>, PtxError> {
        let jobs = |tiers: &[&Tier]| -> Vec<(Tier, &String)> {
            tiers.iter().flat_map(|tier| names.iter().map(|name| (**tier, name))).collect()
        };
        // What several tiers have is compiled once.
        let mut compiled: Vec<&Tier> = tiers.iter().map(Tier::compiled).collect();
        compiled.sort_by_key(|tier| tier.sm);
        compiled.dedup();
        let compiled = jobs(&compiled);
        let texts = in_parallel(&compiled, |(tier, name)| self.text(name, tier))?;
        let texts: BTreeMap<(&str, &String), String> =
            compiled.iter().map(|(tier, name)| (tier.name, *name)).zip(texts).collect();
        let finish = |(tier, name): &(Tier, &String)| {
            Module::finish(*tier, name, &texts[&(tier.compiled().name, *name)])
        };
        let mut modules = in_parallel(&jobs(&tiers.iter().collect::<Vec<_>>()), finish)?;
        modules.retain(|module| !module.kernels.is_empty());
        Ok(modules)
    }

    /// What the compiler makes of a kernel for a tier that is compiled; from the build folder if nothing has changed.
    fn text(&self, name: &str, tier: &Tier) -> Result<String, PtxError> {
        let folder = self.build_dir.join(tier.name);
        std::fs::create_dir_all(&folder).map_err(PtxError::path("create", &folder))?;
        let (raw, inputs) = (folder.join(format!("{name}.s")), folder.join(format!("{name}.inputs")));
        let flags = self.flags(name, tier);
        let made_by = [format!("{} {:x}", self.compiler.description, self.externs_digest)];
        let digest = cache::digest(flags.iter().chain(&made_by));
        let fresh =
            std::fs::read_to_string(&inputs).is_ok_and(|text| cache::holds(&self.root, digest, &text));
        let kept = if fresh { std::fs::read_to_string(&raw).ok() } else { None };
        match kept {
            Some(text) => Ok(text),
            None => self.compile(name, tier, &flags, digest, &raw, &inputs),
        }
    }

    /// Flags that decide what comes out.
    fn flags(&self, name: &str, tier: &Tier) -> Vec<String> {
        // Lints are the host build's affair; here each tier leaves other parts of the device layer unused.
        let common = [
            "--cap-lints=allow",
            "--crate-name=gpu_kernels",
            "--crate-type=rlib",
            "-Ccodegen-units=1",
            LLVM_ARGS,
        ];
        let mut flags: Vec<String> = common.map(String::from).into();
        flags.push(format!("-Ctarget-cpu={}", tier.name));
        flags.push(format!("-Ctarget-feature=+{}", tier.ptx));
        flags.extend(tier.cfgs().map(|cfg| format!("--cfg={cfg}")));
        flags.push(format!("--cfg=entries_of=\"{name}\""));
        flags
    }

    fn compile(
        &self,
        name: &str,
        tier: &Tier,
        flags: &[String],
        digest: u64,
        raw: &Path,
        inputs: &Path,
    ) -> Result<String, PtxError> {
        // A folder each, since rustc's intermediate files have the same names for all; with the process in its name,
        // since a build script and xtask may compile at the same time.
        let folder = self.build_dir.join(tier.name).join(format!("{name}.{}", std::process::id()));
        std::fs::create_dir_all(&folder).map_err(PtxError::path("create", &folder))?;
        let (asm, dep_info) = (folder.join("kernels.s"), folder.join("kernels.d"));
        let deps = |kind: &str| format!("dependency={}", self.build_dir.join("deps").join(kind).display());
        let mut command = self.compiler.command();
        command.args(flags);
        for (name, path) in &self.externs {
            command.arg("--extern").arg(format!("{name}={}", path.display()));
        }
        // Derive macros of quant's dependencies are host crates.
        command.arg("-L").arg(deps(&format!("{TARGET}/release/deps"))).arg("-L").arg(deps("release/deps"));
        command.arg(format!("--emit=asm={},dep-info={}", asm.display(), dep_info.display()));
        command.arg(self.root.join("gpu-kernels/src/lib.rs")).current_dir(&folder);
        run(&mut command, &format!("compile {name} for {}", tier.name))?;
        let read = |path: &Path| std::fs::read_to_string(path).map_err(PtxError::path("read", path));
        let text = read(&asm)?;
        let owner = self.owners.get(name).map_or(name, String::as_str);
        let files = cache::inputs(&read(&dep_info)?, &self.root.join(KERNELS_DIR), owner)?;
        let record = cache::record(&self.root, digest, &files)?;
        // The old record goes first and the new one comes last: a record never stands beside another's text.
        match std::fs::remove_file(inputs) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(PtxError::path("remove", inputs)(error));
            }
            _ => {}
        }
        std::fs::rename(&asm, raw).map_err(PtxError::path("move PTX to", raw))?;
        std::fs::write(inputs, record).map_err(PtxError::path("write", inputs))?;
        std::fs::remove_dir_all(&folder).map_err(PtxError::path("remove", &folder))?;
        Ok(text)
    }
}

/// Runs all jobs, as many at a time as there are cores; results in their order, or the first error.
pub fn in_parallel<J: Sync, T: Send>(
    jobs: &[J],
    work: impl Fn(&J) -> Result<T, PtxError> + Sync,
) -> Result<Vec<T>, PtxError> {
    let next = AtomicUsize::new(0);
    let results: Vec<Mutex<Option<Result<T, PtxError>>>> = jobs.iter().map(|_| Mutex::new(None)).collect();
    let workers = std::thread::available_parallelism().map_or(1, |n| n.get()).min(jobs.len());
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let (Some(job), Some(slot)) = (jobs.get(i), results.get(i)) else { break };
                    *slot.lock().unwrap_or_else(|poison| poison.into_inner()) = Some(work(job));
                }
            });
        }
    });
    let finished =
        results.into_iter().map(|slot| slot.into_inner().unwrap_or_else(|poison| poison.into_inner()));
    finished.map(|result| result.expect("every job has a worker")).collect()
}

/// How a kernel's source states its name, which its entries' `in` repeats.
const NAME: &str = "const NAME: &'static str = \"";

/// Adds the kernels that the sources at a path declare, and what file or folder each belongs to.
fn add_names(dir: &Path, path: &Path, owners: &mut BTreeMap<String, String>) -> Result<(), PtxError> {
    if path.is_dir() {
        for entry in std::fs::read_dir(path).map_err(PtxError::path("list", path))? {
            add_names(dir, &entry.map_err(PtxError::path("list", path))?.path(), owners)?;
        }
        return Ok(());
    }
    let source = std::fs::read_to_string(path).map_err(PtxError::path("read", path))?;
    let names = source.split(NAME).skip(1).filter_map(|rest| Some(rest.split_once('"')?.0.to_string()));
    owners.extend(names.filter_map(|name| Some((name, cache::owner(dir, path)?))));
    Ok(())
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
