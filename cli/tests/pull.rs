//! `pull` against a hub on 127.0.0.1 that knows ranges.

mod common;

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Output;
use std::sync::{Arc, Mutex};

use common::{Folder, runik};
use sha2::{Digest, Sha256};

const REPO: &str = "user/Tiny-GGUF";
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Path and Range header of each request so far.
type Log = Mutex<Vec<(String, Option<String>)>>;

/// Answers GET requests until the process ends.
struct Hub {
    endpoint: String,
    seen: Arc<Log>,
}

impl Hub {
    /// Serves these pages; of each page's first full answer only `cut` bytes arrive.
    fn start(pages: HashMap<String, Vec<u8>>, cut: Option<usize>) -> Hub {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let seen = Arc::new(Log::default());
        let log = seen.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                answer(stream.unwrap(), &pages, &log, cut);
            }
        });
        Hub { endpoint, seen }
    }

    fn pull(&self, folder: &Folder, args: &[&str]) -> Output {
        let mut command = runik();
        command.arg("pull").args(args).env("HF_ENDPOINT", &self.endpoint).env("HF_HOME", folder.path("hf"));
        command.output().unwrap()
    }

    fn ranges(&self) -> Vec<String> {
        self.seen.lock().unwrap().iter().filter_map(|(_, range)| range.clone()).collect()
    }
}

fn answer(mut stream: TcpStream, pages: &HashMap<String, Vec<u8>>, log: &Log, cut: Option<usize>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut range = None;
    loop {
        let mut header = String::new();
        if reader.read_line(&mut header).unwrap() == 0 || header == "\r\n" {
            break;
        }
        if let Some((name, value)) = header.split_once(':').filter(|h| h.0.eq_ignore_ascii_case("range")) {
            assert_eq!(name.to_lowercase(), "range");
            range = Some(value.trim().to_owned());
        }
    }
    log.lock().unwrap().push((path.clone(), range.clone()));
    let Some(page) = pages.get(&path) else {
        let _ = stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        return;
    };
    let from: usize =
        range.as_deref().and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()).unwrap_or(0);
    let status = if range.is_some() { "206 Partial Content" } else { "200 OK" };
    let body = &page[from..];
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
    let sent =
        cut.filter(|_| range.is_none() && path.contains("resolve")).unwrap_or(body.len()).min(body.len());
    let _ = stream.write_all(head.as_bytes());
    let _ = stream.write_all(&body[..sent]);
    let _ = stream.flush();
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let _ = stream.read(&mut [0; 16]);
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

fn model() -> Vec<u8> {
    (0..300_000u32).flat_map(|i| i.wrapping_mul(2654435761).to_le_bytes()).collect()
}

/// A repository with a model of this stated hash.
fn repository(name: &str, hash: &str) -> HashMap<String, Vec<u8>> {
    let content = model();
    let description = serde_json::json!({
        "sha": COMMIT,
        "siblings": [
            { "rfilename": "README.md", "size": 3, "blobId": "00112233445566778899" },
            { "rfilename": name, "size": content.len(), "blobId": "ff", "lfs": { "sha256": hash, "size": content.len() } },
        ],
    });
    HashMap::from([
        (format!("/api/models/{REPO}/revision/main?blobs=true"), description.to_string().into_bytes()),
        (format!("/{REPO}/resolve/{COMMIT}/{name}"), content),
    ])
}

#[test]
fn fetches_into_the_shared_layout_once() {
    let folder = Folder::new("pull");
    let hub = Hub::start(repository("tiny-Q4_K_M.gguf", &sha256(&model())), None);
    let first = hub.pull(&folder, &[REPO]);
    assert!(first.status.success(), "{}", String::from_utf8_lossy(&first.stderr));
    let path = String::from_utf8(first.stdout).unwrap().trim().to_owned();
    let expected = format!("hf/hub/models--user--Tiny-GGUF/snapshots/{COMMIT}/tiny-Q4_K_M.gguf");
    assert_eq!(path, folder.path(&expected));
    assert_eq!(std::fs::read(&path).unwrap(), model());
    let blob = folder.path(&format!("hf/hub/models--user--Tiny-GGUF/blobs/{}", sha256(&model())));
    assert_eq!(std::fs::read(blob).unwrap(), model());
    let main = folder.path("hf/hub/models--user--Tiny-GGUF/refs/main");
    assert_eq!(std::fs::read_to_string(main).unwrap(), COMMIT);

    let requests = hub.seen.lock().unwrap().len();
    let again = hub.pull(&folder, &[REPO]);
    assert_eq!(String::from_utf8(again.stdout).unwrap().trim(), path);
    assert_eq!(hub.seen.lock().unwrap().len(), requests + 1, "only the description is asked for again");

    let offline = hub.pull(&folder, &[REPO, "--offline"]);
    assert_eq!(String::from_utf8(offline.stdout).unwrap().trim(), path);
    assert_eq!(hub.seen.lock().unwrap().len(), requests + 1, "offline asks nothing");
}

#[test]
fn a_cut_transfer_goes_on_where_it_ended() {
    let folder = Folder::new("pull-cut");
    let hub = Hub::start(repository("tiny-Q4_K_M.gguf", &sha256(&model())), Some(100_000));
    let output = hub.pull(&folder, &[REPO]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(std::fs::read(String::from_utf8(output.stdout).unwrap().trim()).unwrap(), model());
    assert_eq!(hub.ranges(), ["bytes=100000-"]);
}

#[test]
fn a_partial_file_of_an_earlier_run_is_resumed() {
    let folder = Folder::new("pull-resume");
    let hash = sha256(&model());
    let blobs = folder.path("hf/hub/models--user--Tiny-GGUF/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::write(format!("{blobs}/{hash}.incomplete"), &model()[..777_777]).unwrap();
    let hub = Hub::start(repository("tiny-Q4_K_M.gguf", &hash), None);
    let output = hub.pull(&folder, &[REPO]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(hub.ranges(), ["bytes=777777-"]);
    assert_eq!(std::fs::read(format!("{blobs}/{hash}")).unwrap(), model());
    assert!(!std::fs::exists(format!("{blobs}/{hash}.incomplete")).unwrap());
}

#[test]
fn refusals() {
    let folder = Folder::new("pull-bad");
    let says = |hub: &Hub, args: &[&str], text: &str| {
        let output = hub.pull(&folder, args);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(text) && output.stdout.is_empty(), "{said}");
    };
    let wrong_hash = Hub::start(repository("tiny-Q4_K_M.gguf", &"ab".repeat(32)), None);
    says(&wrong_hash, &[REPO], "sha256 is");
    let blobs = folder.path("hf/hub/models--user--Tiny-GGUF/blobs");
    assert_eq!(
        std::fs::read_dir(blobs).unwrap().count(),
        0,
        "nothing stays of a file that is not what it should be"
    );

    let escape = Hub::start(repository("../../../evil-Q4_K_M.gguf", &sha256(&model())), None);
    says(&escape, &[REPO], "leaves its folder");
    let bad_hash = Hub::start(repository("tiny-Q4_K_M.gguf", "../../evil"), None);
    says(&bad_hash, &[REPO], "malformed hash");
    says(&bad_hash, &[&format!("{REPO}:Q2_K")], "no file of Q2_K; there are: tiny-Q4_K_M.gguf");
    says(&bad_hash, &["user/none"], "no such repository");
    says(&bad_hash, &["user/none", "--offline"], "not in the cache");
}
