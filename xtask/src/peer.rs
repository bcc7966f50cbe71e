//! llama.cpp, the engine to beat: its binaries, and the model files both engines are measured on.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::TaskError;
use crate::fetch;
use crate::process;
use crate::workspace::{Workspace, cache_dir};

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
        if process::works(Command::new(peer.program("llama-bench")).arg("--help")) {
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
        eprintln!("building llama.cpp in {} (minutes, once)", folder.display());
        process::run(Command::new("bash").arg(scripts.join("prepare.sh")).arg(&folder))?;
        let sources = folder.join("peer.tar.xz");
        process::run(Command::new("bash").arg(scripts.join("build.sh")).arg(sources).arg(&folder))?;
        Ok(peer)
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
