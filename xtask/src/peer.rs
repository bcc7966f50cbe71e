//! llama.cpp, the engine to beat: its binaries, and the model files both engines are measured on.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::TaskError;
use crate::fetch;
use crate::process;
use crate::workspace::{Workspace, cache_dir};

/// For the compiler where a virtual machine shows AMX and ends the process that uses it.
const WITHOUT_TILES: &str = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16";

/// A folder with `llama-bench` and `llama-quantize`.
#[derive(Debug)]
pub struct Peer {
    bin: PathBuf,
}

impl Peer {
    /// The peer in `bin` if given, else the cached build, else a new build from the peer scripts.
    pub fn locate(workspace: &Workspace, bin: Option<String>) -> Result<Peer, TaskError> {
        if let Some(bin) = bin {
            return Ok(Peer { bin: bin.into() });
        }
        let folder = cache_dir()?.join("peer");
        let peer = Peer { bin: folder.join("peer/build/bin") };
        let probe = fetch::smollm2()?;
        if peer.runs(&probe) {
            return Ok(peer);
        }
        let scripts = workspace.peer_scripts().ok_or_else(|| TaskError::Missing {
            what: "no scripts to build llama.cpp with".into(),
            fix: "set RUNIK_PEER to the folder with prepare.sh and build.sh, or give --bin DIR with llama-bench"
                .into(),
        })?;
        for (program, package) in [("cmake", "cmake"), ("c++", "g++")] {
            if !process::works(Command::new(program).arg("--version")) {
                return Err(TaskError::Missing {
                    what: format!("{program}, which llama.cpp's build needs, is not installed"),
                    fix: format!("apt-get install -y {package}"),
                });
            }
        }
        let sources = folder.join("peer.tar.xz");
        if !sources.is_file() {
            process::run(Command::new("bash").arg(scripts.join("prepare.sh")).arg(&folder))?;
        }
        for flags in ["", WITHOUT_TILES] {
            eprintln!("building llama.cpp in {} (minutes, once) {flags}", folder.display());
            // What an earlier build found out about the compiler is asked anew.
            let earlier = folder.join("peer/build");
            if earlier.exists() {
                std::fs::remove_dir_all(&earlier).map_err(TaskError::path("remove", &earlier))?;
            }
            let mut build = Command::new("bash");
            build.arg(scripts.join("build.sh")).arg(&sources).arg(&folder);
            process::run(build.env("CFLAGS", flags).env("CXXFLAGS", flags))?;
            if peer.runs(&probe) {
                return Ok(peer);
            }
        }
        let path = peer.program("llama-bench");
        Err(TaskError::Missing {
            what: format!("{} was built and fails on {}", path.display(), probe.display()),
            fix: "run it by hand to see why, or give --bin DIR with one that works".into(),
        })
    }

    /// Whether it answers: a build for this processor may use what the machine does not let it.
    fn runs(&self, model: &Path) -> bool {
        let mut command = Command::new(self.program("llama-bench"));
        process::works(command.arg("-m").arg(model).args(["-p", "16", "-n", "1", "-r", "1", "-t", "2"]))
    }

    /// Path of one of its programs.
    pub fn program(&self, name: &str) -> PathBuf {
        self.bin.join(name)
    }

    /// SmolLM2-135M in `format`, in `dir`; made from the fetched Q4_1 file by way of F32 if absent.
    pub fn model(&self, workspace: &Workspace, dir: &Path, format: &str) -> Result<PathBuf, TaskError> {
        let path = dir.join(format!("{format}.gguf"));
        if path.is_file() {
            return Ok(path);
        }
        let source = match format {
            "Q4_1" => return fetch::smollm2(),
            "F32" => fetch::smollm2()?,
            _ => self.model(workspace, dir, "F32")?,
        };
        eprintln!("making {}", path.display());
        let part = path.with_extension("part");
        let mut command = Command::new(self.program("llama-quantize"));
        command.arg("--allow-requantize");
        // The smallest codebook formats are meant to be made with an importance matrix.
        let imatrix = workspace.goldens().map(|dir| dir.join("smollm2-135m/imatrix-gpl3.gguf"));
        if let Some(imatrix) = imatrix.filter(|path| format.starts_with("IQ") && path.is_file()) {
            command.arg("--imatrix").arg(imatrix);
        }
        process::capture(command.arg(source).arg(&part).arg(format))?;
        std::fs::rename(&part, &path).map_err(TaskError::path("move the model to", &path))?;
        Ok(path)
    }
}
