//! Where things are: the repository, its target folder, the user's cache, the golden data.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::TaskError;

/// The checkout this task works on.
#[derive(Debug)]
pub struct Workspace {
    root: PathBuf,
}

impl Workspace {
    /// The checkout that `cargo xtask` was started in.
    pub fn locate() -> Result<Workspace, TaskError> {
        // Read at run time, not at compile time: a copied or moved checkout must not act on the old one.
        let manifest = std::env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
        match manifest.as_deref().and_then(Path::parent) {
            Some(root) => Ok(Workspace { root: root.to_path_buf() }),
            None => Err(TaskError::Missing {
                what: "not started by cargo".into(),
                fix: "run `cargo xtask TASK` inside the repository".into(),
            }),
        }
    }

    /// Repository root.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Cargo's target folder.
    pub fn target(&self) -> PathBuf {
        match std::env::var_os("CARGO_TARGET_DIR") {
            Some(dir) => self.root.join(dir),
            None => self.root.join("target"),
        }
    }

    /// The cargo that started us, in the repository root.
    pub fn cargo(&self) -> Command {
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.current_dir(&self.root);
        command
    }

    /// Golden data made with llama.cpp: `RUNIK_GOLDENS`, else `../shared/goldens`; `None` where absent.
    pub fn goldens(&self) -> Option<PathBuf> {
        self.shared("RUNIK_GOLDENS", "goldens")
    }

    /// The scripts that fetch and build llama.cpp: `RUNIK_PEER`, else `../shared/peer`; `None` where absent.
    pub fn peer_scripts(&self) -> Option<PathBuf> {
        self.shared("RUNIK_PEER", "peer")
    }

    fn shared(&self, variable: &str, folder: &str) -> Option<PathBuf> {
        let dir = match std::env::var_os(variable) {
            Some(dir) => PathBuf::from(dir),
            None => self.root.parent()?.join("shared").join(folder),
        };
        dir.is_dir().then(|| dir.canonicalize().unwrap_or(dir))
    }
}

/// `$XDG_CACHE_HOME/runik`, else `~/.cache/runik`; created if absent.
pub fn cache_dir() -> Result<PathBuf, TaskError> {
    // The XDG specification asks to ignore a relative path.
    let xdg = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|dir| dir.is_absolute());
    let base = match (xdg, std::env::home_dir()) {
        (Some(xdg), _) => xdg,
        (None, Some(home)) => home.join(".cache"),
        (None, None) => {
            return Err(TaskError::Missing {
                what: "no home folder to keep the cache in".into(),
                fix: "set XDG_CACHE_HOME to an absolute path".into(),
            });
        }
    };
    let dir = base.join("runik");
    std::fs::create_dir_all(&dir).map_err(TaskError::path("create", &dir))?;
    Ok(dir)
}
