//! Models of Hugging Face: which files of a repository are meant, and the cache that its other tools share.
//!
//! Names from the hub are allegations: repository, commit, file and blob names are checked before they become paths.

pub mod fetch;

use std::path::{Component, Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;

use crate::exit::usage;

/// Quantisation to fetch where the user names none.
const DEFAULT_QUANT: &str = "Q4_K_M";

/// Short names for repositories.
const ALIASES: &[(&str, &str)] = &[("smollm2", "bartowski/SmolLM2-135M-Instruct-GGUF")];

/// A repository and the quantisation wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// `user/name`.
    pub repo: String,
    /// As the user gave it.
    pub quant: Option<String>,
}

impl Spec {
    /// `user/name`, `user/name:QUANT` or an alias.
    pub fn parse(text: &str) -> Result<Spec> {
        let (name, quant) = match text.split_once(':') {
            Some((name, quant)) => (name, Some(quant.to_owned())),
            None => (text, None),
        };
        let repo = ALIASES.iter().find(|(alias, _)| alias.eq_ignore_ascii_case(name)).map_or(name, |a| a.1);
        let word = |w: &str| {
            !w.is_empty()
                && !w.starts_with('.')
                && w.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'))
        };
        let good = repo.split_once('/').is_some_and(|(user, name)| word(user) && word(name));
        if !good || quant.as_deref().is_some_and(|q| !word(q)) {
            let aliases: Vec<_> = ALIASES.iter().map(|a| a.0).collect();
            return Err(usage(format!(
                "'{text}': expected USER/NAME, USER/NAME:QUANT or {}",
                aliases.join(", ")
            )));
        }
        Ok(Spec { repo: repo.to_owned(), quant })
    }
}

/// What the hub says of a repository.
#[derive(Debug, Deserialize)]
pub struct Repository {
    /// Commit.
    pub sha: String,
    /// Files.
    pub siblings: Vec<RemoteFile>,
}

/// A file of a repository.
#[derive(Clone, Debug, Deserialize)]
pub struct RemoteFile {
    /// Path in the repository.
    pub rfilename: String,
    /// Bytes.
    pub size: Option<u64>,
    /// Git's name of the content.
    #[serde(rename = "blobId")]
    pub blob_id: Option<String>,
    /// What git-lfs knows, for large files.
    pub lfs: Option<Lfs>,
}

/// What git-lfs knows of a file.
#[derive(Clone, Debug, Deserialize)]
pub struct Lfs {
    /// SHA-256 of the content, in hex.
    pub sha256: String,
    /// Bytes.
    pub size: u64,
}

impl RemoteFile {
    /// Name of its blob in the cache: the sha256 of large files, git's name of others.
    fn blob(&self) -> Result<&str> {
        let name = self.lfs.as_ref().map(|l| l.sha256.as_str()).or(self.blob_id.as_deref());
        let name = name.with_context(|| format!("{}: the hub states no hash", self.rfilename))?;
        let hex = name.len() >= 16 && name.len() <= 128 && name.bytes().all(|b| b.is_ascii_hexdigit());
        ensure!(hex, "{}: the hub states a malformed hash", self.rfilename);
        Ok(name)
    }
}

/// Whether a name from the hub is a plain relative path.
fn is_plain(name: &str) -> bool {
    let path = Path::new(name);
    !name.is_empty() && !name.contains('\\') && path.components().all(|c| matches!(c, Component::Normal(_)))
}

/// The GGUF files meant, parts of a split set in order, and whether they are of the quantisation asked for.
pub fn choose<'a>(
    names: &[&'a str],
    quant: Option<&str>,
    file: Option<&str>,
) -> Result<(Vec<&'a str>, bool)> {
    let mut models: Vec<&str> = names
        .iter()
        .copied()
        .filter(|n| n.to_ascii_lowercase().ends_with(".gguf") && !n.to_ascii_lowercase().contains("mmproj"))
        .collect();
    models.sort_unstable();
    if models.is_empty() {
        bail!("the repository holds no GGUF file");
    }
    let whole_set = |first: &'a str| -> Vec<&'a str> {
        let base =
            |n: &str| gguf::split::parse_part_name(n).map(|(prefix, _, count)| (prefix.to_owned(), count));
        match base(first) {
            Some(set) => models.iter().copied().filter(|n| base(n).as_ref() == Some(&set)).collect(),
            None => vec![first],
        }
    };
    if let Some(file) = file {
        let found = models.iter().copied().find(|n| *n == file);
        let found = found.with_context(|| format!("no file {file}; there are: {}", models.join(", ")))?;
        return Ok((whole_set(found), true));
    }
    let wanted = quant.unwrap_or(DEFAULT_QUANT);
    // A whole word: Q4_K must not find Q4_K_M.
    let has = |name: &str| {
        let (name, wanted) = (name.to_ascii_uppercase(), wanted.to_ascii_uppercase());
        let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        name.match_indices(&wanted)
            .any(|(at, _)| !name[..at].ends_with(is_word) && !name[at + wanted.len()..].starts_with(is_word))
    };
    match models.iter().copied().find(|n| has(n)) {
        Some(first) => Ok((whole_set(first), true)),
        None if quant.is_some() => bail!("no file of {wanted}; there are: {}", models.join(", ")),
        None => Ok((whole_set(models[0]), false)),
    }
}

/// The cache folder of Hugging Face's tools: `HF_HUB_CACHE`, `HF_HOME/hub`, or in the user's cache folder.
pub struct Cache {
    root: Option<PathBuf>,
}

fn env_path(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from)
}

/// The folder of settings and cache of Hugging Face's tools.
fn hf_home() -> Option<PathBuf> {
    let cache = || env_path("XDG_CACHE_HOME").or_else(|| Some(std::env::home_dir()?.join(".cache")));
    env_path("HF_HOME").or_else(|| Some(cache()?.join("huggingface")))
}

impl Cache {
    /// As the environment says.
    pub fn from_env() -> Cache {
        Cache { root: env_path("HF_HUB_CACHE").or_else(|| Some(hf_home()?.join("hub"))) }
    }

    /// Where it is.
    pub fn root(&self) -> Option<&Path> {
        self.root.as_deref()
    }

    /// Folder of a repository.
    fn repository(&self, repo: &str) -> Result<PathBuf> {
        let root = self.root.as_ref().context("no cache folder: set HF_HOME or HOME")?;
        Ok(root.join(format!("models--{}", repo.replace('/', "--"))))
    }

    /// Files of a repository in the snapshot fetched last.
    pub fn snapshot(&self, repo: &str) -> Result<Option<(PathBuf, Vec<String>)>> {
        let folder = self.repository(repo)?;
        let Ok(commit) = std::fs::read_to_string(folder.join("refs/main")) else { return Ok(None) };
        let snapshot = folder.join("snapshots").join(commit.trim());
        let mut names = Vec::new();
        list(&snapshot, &snapshot, &mut names);
        Ok(Some((snapshot, names)))
    }
}

/// Relative paths of all files below a folder.
fn list(root: &Path, folder: &Path, names: &mut Vec<String>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        // Follows links: a link whose blob is gone is no file.
        if path.is_dir() {
            list(root, &path, names);
        } else if path.is_file() {
            names.extend(path.strip_prefix(root).ok().and_then(|p| p.to_str()).map(str::to_owned));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specs() {
        let spec =
            |repo: &str, quant: Option<&str>| Spec { repo: repo.into(), quant: quant.map(str::to_owned) };
        assert_eq!(Spec::parse("a/b").unwrap(), spec("a/b", None));
        assert_eq!(Spec::parse("a/b-GGUF:Q8_0").unwrap(), spec("a/b-GGUF", Some("Q8_0")));
        assert_eq!(Spec::parse("smollm2:Q8_0").unwrap(), spec(ALIASES[0].1, Some("Q8_0")));
        for bad in ["", "a", "a/", "/b", "a/b/c", "../x", "a/..", "a/b:", "a/b:x/y", "a b/c", "unknown"] {
            assert!(Spec::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn choice_of_files() {
        let names = ["README.md", "m-Q4_K.gguf", "m-Q4_K_M.gguf", "m-q8_0.gguf", "mmproj-m-F16.gguf"];
        assert_eq!(choose(&names, None, None).unwrap(), (vec!["m-Q4_K_M.gguf"], true));
        assert_eq!(choose(&names, Some("Q8_0"), None).unwrap(), (vec!["m-q8_0.gguf"], true));
        assert_eq!(choose(&names, Some("Q4_K"), None).unwrap(), (vec!["m-Q4_K.gguf"], true));
        assert_eq!(choose(&names, None, Some("m-q8_0.gguf")).unwrap().0, ["m-q8_0.gguf"]);
        assert!(choose(&names, Some("Q2_K"), None).unwrap_err().to_string().contains("m-Q4_K_M.gguf"));
        assert!(choose(&names, None, Some("none.gguf")).is_err());
        assert!(choose(&["README.md"], None, None).is_err());
        assert_eq!(choose(&["z.gguf", "a.gguf"], None, None).unwrap(), (vec!["a.gguf"], false));
        let split = ["x/m-Q4_K_M-00002-of-00002.gguf", "x/m-Q4_K_M-00001-of-00002.gguf", "x/m-F16.gguf"];
        assert_eq!(choose(&split, None, None).unwrap().0, [split[1], split[0]]);
    }

    #[test]
    fn names_from_the_hub_stay_inside() {
        assert!(is_plain("sub/m.gguf"));
        for bad in ["", "../m.gguf", "/etc/passwd", "a/../../b", "a\\..\\b", "./m.gguf"] {
            assert!(!is_plain(bad), "{bad}");
        }
    }
}
