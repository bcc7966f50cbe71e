//! What a compiled module was made of, so that an unchanged one is not compiled again.
//!
//! A module depends on the compiler and its flags, on the crates below, and on the files that rustc read. Of the other
//! kernels' files and folders only those count that are named, by whatever chain, from a file that counts: their entries
//! are not part of the module. So a kernel file must not implement a trait of the device layer for a type of the device layer:
//! another kernel could use that without naming the file.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use crate::error::PtxError;

/// A number that changes with any of the parts. Good for one build of this crate: std's hash may change with rustc.
pub(crate) fn digest<T: Hash>(parts: impl IntoIterator<Item = T>) -> u64 {
    let mut hasher = DefaultHasher::new();
    for part in parts {
        part.hash(&mut hasher);
    }
    hasher.finish()
}

/// The record of one module: a digest of flags, then one of each file. Paths are relative to `root`.
pub(crate) fn record(root: &Path, flags: u64, files: &[PathBuf]) -> Result<String, PtxError> {
    let mut text = format!("{flags:016x}\n");
    for path in files {
        let bytes = std::fs::read(path).map_err(PtxError::path("read", path))?;
        let path = path.strip_prefix(root).unwrap_or(path);
        text.push_str(&format!("{:016x} {}\n", digest([bytes]), path.display()));
    }
    Ok(text)
}

/// Whether everything a record names is as it was.
pub(crate) fn holds(root: &Path, flags: u64, record: &str) -> bool {
    let mut lines = record.lines();
    let number = |text: &str| u64::from_str_radix(text, 16).ok();
    if lines.next().and_then(number) != Some(flags) {
        return false;
    }
    lines.all(|line| {
        let Some((hash, path)) = line.split_once(' ') else { return false };
        std::fs::read(root.join(path)).is_ok_and(|bytes| Some(digest([bytes])) == number(hash))
    })
}

/// The file or folder of the kernels' directory that a path belongs to, as sources name it; `None` for the directory's
/// own `mod.rs` and for paths elsewhere.
pub(crate) fn owner(kernels_dir: &Path, path: &Path) -> Option<String> {
    let first = path.strip_prefix(kernels_dir).ok()?.components().next()?;
    let stem = Path::new(&first).file_stem()?.to_string_lossy().into_owned();
    (stem != "mod").then_some(stem)
}

/// The files of a module whose entries are declared in the file or folder `kernel`, given all that rustc read (its
/// dep-info).
pub(crate) fn inputs(dep_info: &str, kernels_dir: &Path, kernel: &str) -> Result<Vec<PathBuf>, PtxError> {
    let line = dep_info.lines().find(|line| !line.starts_with('#')).unwrap_or_default();
    // A blank within a path is escaped.
    let escaped = line.split_once(": ").map_or("", |(_, files)| files).replace("\\ ", "\0");
    let all = escaped.split_whitespace().map(|path| PathBuf::from(path.replace('\0', " ")));
    let owner = |path: &Path| owner(kernels_dir, path);
    let (kernels, mut files): (Vec<PathBuf>, Vec<PathBuf>) = all.partition(|path| owner(path).is_some());

    let read = |path: &PathBuf| std::fs::read_to_string(path).map_err(PtxError::path("read", path));
    let mut named: BTreeSet<String> = BTreeSet::from([kernel.to_string()]);
    for path in &files {
        named.extend(words(&read(path)?));
    }
    let mut rest = kernels;
    loop {
        let is_named = |path: &PathBuf| owner(path).is_some_and(|owner| named.contains(&owner));
        let (now, later): (Vec<_>, Vec<_>) = rest.into_iter().partition(is_named);
        if now.is_empty() {
            break;
        }
        for path in &now {
            named.extend(words(&read(path)?));
        }
        files.extend(now);
        rest = later;
    }
    files.sort();
    Ok(files)
}

/// The identifiers of a source, those apart that only declare a module or stand in a comment on a line of its own.
fn words(source: &str) -> impl Iterator<Item = String> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let counts = move |line: &&str| {
        let line = line.trim();
        let is_mod = line.ends_with(';') && line.split(' ').rev().nth(1) == Some("mod");
        !is_mod && !line.starts_with("//")
    };
    let lines = source.lines().filter(counts);
    lines
        .flat_map(move |line| line.split(move |c| !is_word(c)).map(String::from))
        .filter(|word| !word.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder of sources that goes away with its owner.
    struct Sources(PathBuf);

    impl Sources {
        fn new(name: &str, files: &[(&str, &str)]) -> Sources {
            let root = std::env::temp_dir().join(format!("ptx-build-{name}-{}", std::process::id()));
            std::fs::create_dir_all(root.join("kernels/folder")).unwrap();
            for (path, text) in files {
                std::fs::write(root.join(path), text).unwrap();
            }
            Sources(root)
        }
    }

    impl Drop for Sources {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn inputs_follow_names_through_other_kernels() {
        let files = [
            ("lib.rs", "mod kernels;"),
            ("kernels/mod.rs", "pub mod a;\npub mod b;\nmod c;\npub(crate) mod d;\npub mod folder;"),
            ("kernels/a.rs", "use super::b::Thing;"),
            ("kernels/b.rs", "// not d\nuse crate::kernels::{c, e};"),
            ("kernels/c.rs", ""),
            ("kernels/d.rs", "use super::a;"),
            ("kernels/folder/mod.rs", "mod part;"),
            ("kernels/folder/part.rs", "use crate::kernels::c;"),
        ];
        let sources = Sources::new("inputs", &files);
        let paths: Vec<String> =
            files.iter().map(|(path, _)| sources.0.join(path).display().to_string()).collect();
        let dep_info = format!("out.s: {}\n\n{}:\n# env-dep:X\n", paths.join(" "), paths[0]);
        let inputs = |kernel| -> Vec<String> {
            let paths = inputs(&dep_info, &sources.0.join("kernels"), kernel).unwrap();
            paths.iter().map(|path| path.strip_prefix(&sources.0).unwrap().display().to_string()).collect()
        };
        assert_eq!(inputs("a"), ["kernels/a.rs", "kernels/b.rs", "kernels/c.rs", "kernels/mod.rs", "lib.rs"]);
        assert_eq!(inputs("c"), ["kernels/c.rs", "kernels/mod.rs", "lib.rs"]);
        let folder =
            ["kernels/c.rs", "kernels/folder/mod.rs", "kernels/folder/part.rs", "kernels/mod.rs", "lib.rs"];
        assert_eq!(inputs("folder"), folder);
    }

    #[test]
    fn a_record_holds_until_something_changes() {
        let sources = Sources::new("record", &[("lib.rs", "a"), ("kernels/k.rs", "b")]);
        let root = &sources.0;
        let text = record(root, 7, &[root.join("kernels/k.rs"), root.join("lib.rs")]).unwrap();
        assert!(holds(root, 7, &text));
        assert!(!holds(root, 8, &text));
        std::fs::write(root.join("lib.rs"), "c").unwrap();
        assert!(!holds(root, 7, &text));
        std::fs::remove_file(root.join("lib.rs")).unwrap();
        assert!(!holds(root, 7, &text));
        assert!(!holds(root, 7, ""));
    }
}
