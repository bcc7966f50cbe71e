//! Fetching files into the cache: resumed where a partial file is there, checked against the hash that the hub states.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use sha2::{Digest, Sha256};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Proxy};

use super::{Cache, RemoteFile, Repository, is_plain};
use crate::ui;

/// Where models are, unless `HF_ENDPOINT` says otherwise.
const ENDPOINT: &str = "https://huggingface.co";
/// Times a broken transfer is taken up again without a byte gained.
const RETRIES: u32 = 4;
/// Bytes of a repository's description at most.
const MAX_DESCRIPTION_BYTES: u64 = 64 << 20;

/// A connection to the hub.
pub struct Hub {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
}

impl Hub {
    /// As the environment says: `HF_ENDPOINT`, `HF_TOKEN` or `HF_TOKEN_PATH`, proxies, `SSL_CERT_FILE`.
    pub fn from_env() -> Result<Hub> {
        let config = Agent::config_builder()
            .proxy(Proxy::try_from_env())
            .tls_config(tls()?)
            .timeout_connect(Some(Duration::from_secs(30)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            // A transfer that stalls ends here, and so does a long one that does not: either is taken up where it ended.
            .timeout_recv_body(Some(Duration::from_secs(600)))
            .http_status_as_error(false)
            .user_agent(concat!("runik/", env!("CARGO_PKG_VERSION")))
            .build();
        let var = |name| std::env::var(name).ok().filter(|v| !v.is_empty());
        let token_file = || {
            let path = super::env_path("HF_TOKEN_PATH").or_else(|| Some(super::hf_home()?.join("token")))?;
            fs::read_to_string(path).ok()
        };
        Ok(Hub {
            agent: config.into(),
            endpoint: var("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.into()).trim_end_matches('/').to_owned(),
            token: var("HF_TOKEN").or_else(token_file).map(|t| t.trim().to_owned()).filter(|t| !t.is_empty()),
        })
    }

    fn get(&self, url: &str, from: u64) -> Result<ureq::http::Response<ureq::Body>> {
        let mut request = self.agent.get(url);
        // The agent drops it on redirects to other hosts.
        if let Some(token) = &self.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        if from > 0 {
            request = request.header("Range", format!("bytes={from}-"));
        }
        request.call().with_context(|| url.to_owned())
    }

    /// What a repository holds now.
    pub fn repository(&self, repo: &str) -> Result<Repository> {
        let url = format!("{}/api/models/{repo}/revision/main?blobs=true", self.endpoint);
        let mut response = self.get(&url, 0)?;
        match response.status().as_u16() {
            200 => {}
            401 | 403 => {
                bail!("{repo}: no access, or no such repository; set HF_TOKEN if it is private or gated")
            }
            404 => bail!("{repo}: no such repository on {}", self.endpoint),
            status => bail!("{url}: the server answers {status}"),
        }
        let text = response.body_mut().with_config().limit(MAX_DESCRIPTION_BYTES).read_to_string()?;
        let found: Repository =
            serde_json::from_str(&text).with_context(|| format!("{url}: not what a hub answers"))?;
        let hex = !found.sha.is_empty() && found.sha.bytes().all(|b| b.is_ascii_hexdigit());
        ensure!(hex, "{url}: a malformed commit");
        Ok(found)
    }

    /// Fetches a file into the cache unless it is there; its path in the snapshot.
    pub fn fetch(&self, cache: &Cache, repo: &str, commit: &str, file: &RemoteFile) -> Result<PathBuf> {
        ensure!(
            is_plain(&file.rfilename),
            "the hub states a file name that leaves its folder: {:?}",
            file.rfilename
        );
        let folder = cache.repository(repo)?;
        let link = folder.join("snapshots").join(commit).join(&file.rfilename);
        let blob = folder.join("blobs").join(file.blob()?);
        if !blob.is_file() {
            let url = format!("{}/{repo}/resolve/{commit}/{}", self.endpoint, escape(&file.rfilename));
            fs::create_dir_all(folder.join("blobs"))?;
            self.download(&url, &blob, file)?;
        }
        if !link.is_file() {
            make_link(&blob, &link)?;
        }
        let refs = folder.join("refs");
        fs::create_dir_all(&refs)?;
        fs::write(refs.join("main"), commit)?;
        Ok(link)
    }

    fn download(&self, url: &str, blob: &Path, remote: &RemoteFile) -> Result<()> {
        let partial = blob.with_extension("incomplete");
        let mut file = OpenOptions::new().create(true).read(true).append(true).open(&partial)?;
        let total = remote.lfs.as_ref().map(|l| l.size).or(remote.size);
        let bar = ui::bytes_bar(total.unwrap_or(0), &remote.rfilename);
        let mut hash = Sha256::new();
        let mut have = rehash(&mut file, &mut hash)?;
        if total.is_some_and(|t| have > t) {
            (have, hash) = (0, Sha256::new());
            file.set_len(0)?;
        }
        if have > 0 {
            ui::say(format!("{}: resuming at {}", remote.rfilename, ui::bytes(have)));
        }
        let mut failures = 0;
        while total.is_none_or(|t| have < t) {
            bar.set_position(have);
            let before = have;
            match self.transfer(url, &mut file, &mut hash, &mut have, &bar) {
                Ok(()) if total.is_none() => break,
                Ok(()) if total == Some(have) => break,
                result => {
                    failures = if have > before { 0 } else { failures + 1 };
                    let short =
                        || anyhow::anyhow!("the transfer ended at {have} of {} bytes", total.unwrap_or(0));
                    let error = result.err().unwrap_or_else(short);
                    if failures > RETRIES || error.is::<Refused>() {
                        bar.finish_and_clear();
                        return Err(error.context(format!("{} (run again to resume)", remote.rfilename)));
                    }
                    ui::say(format!("{}: {error:#}; trying again", remote.rfilename));
                    std::thread::sleep(Duration::from_millis(250 << failures));
                }
            }
        }
        bar.finish_and_clear();
        let got = hash.finalize().iter().map(|b| format!("{b:02x}")).collect::<String>();
        if let Some(lfs) = remote.lfs.as_ref().filter(|l| !l.sha256.eq_ignore_ascii_case(&got)) {
            fs::remove_file(&partial)?;
            bail!(
                "{}: sha256 is {got}, the hub states {}; the file is removed",
                remote.rfilename,
                lfs.sha256
            );
        }
        file.sync_all()?;
        Ok(fs::rename(&partial, blob)?)
    }

    /// One request from where the partial file ends.
    fn transfer(
        &self,
        url: &str,
        file: &mut File,
        hash: &mut Sha256,
        have: &mut u64,
        bar: &indicatif::ProgressBar,
    ) -> Result<()> {
        let response = self.get(url, *have)?;
        match (response.status().as_u16(), *have) {
            (200, 0) | (206, 1..) => {}
            // The server knows no ranges: from the start.
            (200, _) => {
                file.set_len(0)?;
                (*have, *hash) = (0, Sha256::new());
            }
            (status @ (500..=599 | 429 | 408), _) => bail!("the server answers {status}"),
            (status, _) => return Err(Refused(status).into()),
        }
        let mut body = response.into_body().into_reader();
        let mut buffer = vec![0; 256 << 10];
        loop {
            let n = body.read(&mut buffer)?;
            if n == 0 {
                return Ok(());
            }
            file.write_all(&buffer[..n])?;
            hash.update(&buffer[..n]);
            *have += n as u64;
            bar.set_position(*have);
        }
    }
}

/// Which certificates to trust: those of `SSL_CERT_FILE`, else the ones built in.
fn tls() -> Result<TlsConfig> {
    let Some(path) = super::env_path("SSL_CERT_FILE") else { return Ok(TlsConfig::default()) };
    let pem = fs::read(&path).with_context(|| format!("SSL_CERT_FILE {}", path.display()))?;
    let mut certificates = Vec::new();
    for item in parse_pem(&pem) {
        if let PemItem::Certificate(certificate) =
            item.with_context(|| format!("SSL_CERT_FILE {}", path.display()))?
        {
            certificates.push(certificate);
        }
    }
    ensure!(!certificates.is_empty(), "SSL_CERT_FILE {}: no certificate in it", path.display());
    Ok(TlsConfig::builder().root_certs(RootCerts::from(certificates)).build())
}

/// An answer that trying again will not change.
#[derive(Debug)]
struct Refused(u16);

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the server answers {}", self.0)
    }
}

impl std::error::Error for Refused {}

/// Hashes what is there; its length.
fn rehash(file: &mut File, hash: &mut Sha256) -> Result<u64> {
    file.seek(SeekFrom::Start(0))?;
    let mut buffer = vec![0; 1 << 20];
    let mut total = 0;
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            return Ok(total);
        }
        hash.update(&buffer[..n]);
        total += n as u64;
    }
}

/// Percent-encodes what a path of a URL cannot hold.
fn escape(path: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~/".contains(&b);
    path.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

/// A relative link where the system has them, as Hugging Face's tools make it; a copy elsewhere.
fn make_link(blob: &Path, link: &Path) -> Result<()> {
    let parent = link.parent().context("a snapshot has a folder")?;
    fs::create_dir_all(parent)?;
    // A link to a blob that is gone is in the way.
    let _ = fs::remove_file(link);
    #[cfg(unix)]
    {
        // From snapshots/COMMIT/… up to the repository's folder.
        let repository = blob.parent().and_then(Path::parent).context("a blob has a repository")?;
        let depth = parent.strip_prefix(repository)?.components().count();
        let target: PathBuf = std::iter::repeat_n("..", depth).collect::<PathBuf>().join("blobs");
        std::os::unix::fs::symlink(target.join(blob.file_name().unwrap_or_default()), link)?;
    }
    #[cfg(not(unix))]
    fs::copy(blob, link)?;
    Ok(())
}
