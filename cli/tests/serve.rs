//! `serve` over loopback: many clients at once, clients that misbehave, and its end.
#![cfg(unix)] // signals

mod common;
#[path = "common/http.rs"]
mod http;

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use common::{MODEL, json, run, runik};
use http::{Client, Response, request};
use serde_json::{Value, json};

/// Nothing here takes a tenth of this on an idle machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Positions enough for an answer that no test waits for.
const ENDLESS: &str = "65536";

/// A server on a free port; ended with the value.
struct Serving {
    child: Child,
    address: String,
}

impl Serving {
    fn start(args: &[&str]) -> Serving {
        let mut command = runik();
        command.args(["serve", MODEL, "--port", "0", "--device", "cpu", "-t", "1"]).args(args);
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
        let address = lines.find_map(|line| line.split_once(" at http://").map(|(_, at)| at.to_owned()));
        let address = address.unwrap_or_else(|| panic!("it does not serve: {:?}", child.wait()));
        // What it says later must find a reader.
        std::thread::spawn(move || lines.for_each(drop));
        Serving { child, address }
    }

    fn client(&self) -> Client {
        Client::connect(&self.address)
    }

    fn signal(&self, name: &str) {
        let status = Command::new("kill").args([name, &self.child.id().to_string()]).status().unwrap();
        assert!(status.success());
    }

    fn end(&mut self) -> ExitStatus {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < until, "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// A number of `/metrics`.
    fn metric(&self, name: &str) -> f64 {
        let text = self.client().get("/metrics").body;
        let value = text.lines().find_map(|line| line.strip_prefix(&format!("runik:{name} ")));
        value.unwrap_or_else(|| panic!("no {name}:\n{text}")).parse().unwrap()
    }

    /// Waits until a number of `/metrics` is this.
    fn wait_for(&self, name: &str, value: f64) {
        let until = Instant::now() + PATIENCE;
        while self.metric(name) != value {
            assert!(Instant::now() < until, "{name} is {}, not {value}", self.metric(name));
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const PROMPTS: [&str; 5] =
    ["the", "a conscientious minority", "one two three four five six seven", "\"Hell\"; but", "é"];

/// Request `i` of many: greedy ones and sampled ones, streams and whole answers, long and short.
fn body(i: usize) -> Value {
    json!({
        "prompt": PROMPTS[i % PROMPTS.len()],
        "max_tokens": 10 + 7 * (i % 4),
        "temperature": if i.is_multiple_of(2) { 0.0 } else { 1.0 },
        "seed": i,
        "ignore_eos": true,
        "stream": i % 3 == 1,
        "stream_options": { "include_usage": true },
    })
}

#[test]
fn clients_at_once_get_what_each_alone_gets() {
    const REQUESTS: usize = 20;
    let ask = |client: &mut Client, i: usize| client.post("/v1/completions", &body(i)).text();
    let one = Serving::start(&["-np", "1", "-c", "128"]);
    let mut client = one.client();
    let alone: Vec<String> = (0..REQUESTS).map(|i| ask(&mut client, i)).collect();
    // What `run` says to the same.
    for i in [0, 2] {
        let (prompt, n) = (PROMPTS[i], (10 + 7 * i).to_string());
        let args = ["run", MODEL, prompt, "--raw", "--json", "--temp", "0", "-n", &n, "-c", "128"];
        let said = json(&[&args[..], &["--ignore-eos", "--device", "cpu"]].concat());
        assert_eq!(said["text"].as_str().unwrap(), alone[i], "{prompt}");
    }
    // Sequences enough for half of the clients, and batches smaller than their prompts.
    let many = Serving::start(&["-np", "3", "-c", "128", "-b", "4"]);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..6)
            .map(|first| {
                let (many, ask) = (&many, &ask);
                scope.spawn(move || {
                    let mut client = many.client();
                    // Each in an order of its own.
                    let order = (0..REQUESTS).map(|i| (7 * i + 3 * first) % REQUESTS);
                    order.map(|i| (i, ask(&mut client, i))).collect::<Vec<_>>()
                })
            })
            .collect();
        for thread in threads {
            for (i, text) in thread.join().unwrap() {
                assert_eq!(text, alone[i], "request {i}");
            }
        }
    });
    let tokens: usize = (0..REQUESTS).map(|i| 10 + 7 * (i % 4)).sum();
    assert_eq!(many.metric("tokens_predicted_total"), (6 * tokens) as f64);
    assert_eq!(many.metric("e2e_request_latency_seconds_count"), (6 * REQUESTS) as f64);
    // The request for it is one more each time.
    assert_eq!(many.metric("requests_total"), (6 * REQUESTS + 3) as f64);
    assert_eq!(many.metric("request_errors_total"), 0.0);
    assert_eq!(many.metric("requests_processing"), 0.0);
}

#[test]
fn a_chat_streams_what_it_says_whole() {
    let serving = Serving::start(&["-c", "256", "--chat-template", "chatml"]);
    let mut client = serving.client();
    let body = |stream: bool| {
        json!({
            "messages": [{ "role": "system", "content": "be" }, { "role": "user", "content": "hello" }],
            "max_tokens": 12, "temperature": 0, "ignore_eos": true, "stream": stream,
        })
    };
    let whole = client.post("/v1/chat/completions", &body(false));
    assert_eq!(whole.json()["choices"][0]["message"]["role"], "assistant");
    assert_eq!(whole.json()["usage"]["completion_tokens"], 12);
    let stream = client.post("/v1/chat/completions", &body(true));
    assert_eq!(stream.text(), whole.text());
    let events = stream.events();
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "length");
}

#[test]
fn tokens_and_embeddings() {
    let serving = Serving::start(&["-c", "128", "--embeddings", "--alias", "tiny"]);
    let mut client = serving.client();
    let models = client.get("/v1/models").json();
    assert_eq!(models["data"][0]["id"], "tiny");
    let tokens = client.post("/tokenize", &json!({ "content": "word one" })).json()["tokens"].clone();
    assert!(tokens.as_array().unwrap().len() > 1);
    assert_eq!(client.post("/detokenize", &json!({ "tokens": tokens })).json()["content"], "word one");
    // One by one or together, the same vectors of length 1.
    let vectors = |client: &mut Client, input: Value| {
        client.post("/v1/embeddings", &json!({ "input": input })).json()["data"].as_array().unwrap().clone()
    };
    let both = vectors(&mut client, json!(["word one", "another"]));
    let last = vectors(&mut client, json!("another"));
    assert_eq!(both[1]["embedding"], last[0]["embedding"]);
    let norm: f64 =
        both[0]["embedding"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap().powi(2)).sum();
    assert!((norm - 1.0).abs() < 1e-5, "{norm}");
    // What OpenAI's own client asks for: the same numbers' bytes.
    let body = json!({ "input": "another", "encoding_format": "base64" });
    let text =
        client.post("/v1/embeddings", &body).json()["data"][0]["embedding"].as_str().unwrap().to_owned();
    let digits = text.bytes().map(|c| match c {
        b'A'..=b'Z' => c - b'A',
        b'a'..=b'z' => c - b'a' + 26,
        b'0'..=b'9' => c - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        _ => 0,
    });
    let bits: Vec<u8> = digits.flat_map(|digit| (0..6).rev().map(move |bit| digit >> bit & 1)).collect();
    let bytes: Vec<u8> = bits.chunks(8).map(|byte| byte.iter().fold(0, |n, bit| n << 1 | bit)).collect();
    let numbers = last[0]["embedding"].as_array().unwrap();
    for (four, number) in bytes.chunks(4).zip(numbers) {
        assert_eq!(f32::from_le_bytes(four.try_into().unwrap()), number.as_f64().unwrap() as f32);
    }
    assert_eq!(bytes.len() / 4, numbers.len());
    assert_eq!(client.get("/v1/models/tiny").json(), models["data"][0]);
}

/// What is wrong is said, and the server goes on.
#[test]
fn bad_requests_are_refused() {
    let serving = Serving::start(&["-c", "64", "--api-key", "secret"]);
    let with = |path: &str, body: &str| {
        request("POST", path, body).replace("Host: test", "Host: test\r\nAuthorization: Bearer secret")
    };
    let refused = |text: &str| -> Response {
        let mut client = serving.client();
        client.send(text);
        client.response()
    };
    for (status, text) in [
        (401, request("POST", "/v1/completions", r#"{"prompt":"a"}"#)),
        (400, with("/v1/completions", "{\"prompt\":")),
        (400, with("/v1/completions", "[1]")),
        (400, with("/v1/completions", "\u{0}")),
        (400, with("/v1/completions", &"[".repeat(100_000))),
        (400, with("/v1/completions", &format!(r#"{{"prompt":"{}"}}"#, "word ".repeat(100)))),
        (400, with("/v1/chat/completions", r#"{"messages":[{"content":"x"}]}"#)),
        (404, with("/v2", "{}")),
        (405, with("/metrics", "{}")),
        (501, with("/v1/embeddings", r#"{"input":"a"}"#)),
        (400, "BREW\r\n\r\n".to_owned()),
        (431, format!("GET /health HTTP/1.1\r\nHost: test\r\nX: {}\r\n\r\n", "x".repeat(20_000))),
        // The length is enough to refuse it.
        (413, "POST /tokenize HTTP/1.1\r\nHost: test\r\nContent-Length: 100000000\r\n\r\n".to_owned()),
        (501, "POST /tokenize HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: gzip\r\n\r\n".to_owned()),
    ] {
        let response = refused(&text);
        assert_eq!(response.status, status, "{text:.100}: {}", response.body);
        assert!(response.json()["error"]["message"].is_string(), "{}", response.body);
    }
    // A body of unknown length that never ends: refused at its bound, and the answer arrives.
    let mut client = serving.client();
    client.send("POST /tokenize HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n");
    let chunk = format!("{:x}\r\n{}\r\n", 1 << 16, " ".repeat(1 << 16));
    for _ in 0..200 {
        if client.socket().write_all(chunk.as_bytes()).is_err() {
            break;
        }
    }
    assert_eq!(client.response().status, 413);
    let mut client = serving.client();
    client.send(&with("/v1/completions", r#"{"prompt":"a","max_tokens":2,"ignore_eos":true}"#));
    assert_eq!(client.response().json()["usage"]["completion_tokens"], 2);
    // A client that wants to be asked for the body first.
    let text =
        with("/tokenize", r#"{"content":"a"}"#).replace("Host: test", "Host: test\r\nExpect: 100-continue");
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    client.send(&format!("{head}\r\n\r\n"));
    assert_eq!(client.head().0, 100);
    client.send(body);
    assert_eq!(client.response().status, 200);
}

/// Sockets of refused clients that do not close their side are let go, and no more than so many wait for that.
#[cfg(target_os = "linux")] // counts descriptors
#[test]
fn refused_clients_hold_few_sockets() {
    const CLIENTS: usize = 400;
    // Descriptors that the server opens for itself meanwhile, and sockets that are just being let go.
    const OTHERS: usize = 16;
    let serving = Serving::start(&["-c", "64"]);
    let folder = format!("/proc/{}/fd", serving.child.id());
    let open = || std::fs::read_dir(&folder).unwrap().count();
    let before = open();
    let mut sockets: Vec<TcpStream> =
        (0..CLIENTS).map(|_| TcpStream::connect(&serving.address).unwrap()).collect();
    sockets.iter_mut().for_each(|socket| socket.write_all(b"BREW\r\n\r\n").unwrap());
    for socket in &mut sockets {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut said = String::new();
        socket.read_to_string(&mut said).unwrap();
        assert!(said.starts_with("HTTP/1.1 400 "), "{said}");
    }
    // All are answered and none has closed: what is open still lingers.
    let lingering = open().saturating_sub(before);
    assert!(lingering <= 256 + OTHERS, "{lingering} sockets linger");
    let until = Instant::now() + PATIENCE;
    while open() > before + OTHERS {
        assert!(Instant::now() < until, "{} sockets are left", open().saturating_sub(before));
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Who is slow to send or to read loses the connection; the others notice nothing.
#[test]
fn slow_clients_are_cut_off() {
    let serving = Serving::start(&["-c", "64", "--timeout", "1"]);
    let text = request("POST", "/tokenize", r#"{"content":"word"}"#);
    let mut half = serving.client();
    half.send(&text[..text.len() - 3]);
    // Piece by piece, but in time.
    let mut slow = serving.client();
    for piece in text.as_bytes().chunks(12) {
        slow.socket().write_all(piece).unwrap();
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(slow.response().status, 200);
    assert_eq!(half.response().status, 408);
    assert!(half.is_ended());

    // Asks and asks and does not read: what the server holds for it is bounded, then its time is up.
    let mut deaf = TcpStream::connect(&serving.address).unwrap();
    deaf.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let many = request("GET", "/v1/models", "").repeat(1000);
    let started = Instant::now();
    let mut sent = 0;
    let error = loop {
        match deaf.write(many.as_bytes()) {
            Ok(n) => sent += n,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) => break error,
        }
        assert_eq!(serving.client().get("/health").status, 200);
        assert!(started.elapsed() < PATIENCE, "{sent} bytes are taken");
    };
    assert!(matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "{error}");
    drop(slow);
    // Who asks is one.
    serving.wait_for("connections", 1.0);
}

/// A client that goes takes its request with it: running or waiting.
#[test]
fn a_lost_client_stops_its_answer() {
    let serving = Serving::start(&["-np", "1", "-c", ENDLESS]);
    let endless = json!({ "prompt": "word", "ignore_eos": true, "stream": true });
    let mut running = serving.client();
    running.send(&request("POST", "/v1/completions", &endless.to_string()));
    assert_eq!(running.head().0, 200);
    running.chunk().unwrap();
    let mut waiting = serving.client();
    waiting.send(&request("POST", "/v1/completions", &endless.to_string()));
    serving.wait_for("requests_deferred", 1.0);
    drop(waiting);
    serving.wait_for("requests_deferred", 0.0);
    assert_eq!(serving.metric("requests_processing"), 1.0);
    drop(running);
    serving.wait_for("requests_processing", 0.0);
    assert_eq!(serving.metric("requests_cancelled_total"), 2.0);
    let short = json!({ "prompt": "word", "max_tokens": 3, "ignore_eos": true });
    assert_eq!(serving.client().post("/v1/completions", &short).json()["usage"]["completion_tokens"], 3);
}

/// The first signal lets answers under way end and takes no new client; the second ends the process.
#[test]
fn signals_end_it() {
    for name in ["-TERM", "-INT"] {
        let mut serving = Serving::start(&["-np", "2", "-c", "4096"]);
        let mut idle = serving.client();
        assert_eq!(idle.get("/health").status, 200);
        let mut client = serving.client();
        let body = json!({ "prompt": "word", "max_tokens": 1500, "ignore_eos": true, "stream": true });
        client.send(&request("POST", "/v1/completions", &body.to_string()));
        assert_eq!(client.head().0, 200);
        let mut stream = client.chunk().unwrap();
        serving.signal(name);
        assert!(idle.is_ended(), "nothing is under way there");
        assert!(TcpStream::connect(&serving.address).is_err(), "it listens still");
        while let Some(chunk) = client.chunk() {
            stream.extend(chunk);
        }
        let stream = String::from_utf8(stream).unwrap();
        assert!(stream.ends_with("data: [DONE]\n\n"), "{stream:.200}");
        assert!(stream.contains(r#""finish_reason":"length""#), "{stream:.200}");
        assert!(client.is_ended());
        drop(client);
        assert_eq!(serving.end().code(), Some(0));
    }
    let mut serving = Serving::start(&["-c", ENDLESS]);
    let mut client = serving.client();
    let endless = json!({ "prompt": "word", "ignore_eos": true, "stream": true });
    client.send(&request("POST", "/v1/completions", &endless.to_string()));
    client.head();
    serving.signal("-TERM");
    // The first must be seen before the second counts as one.
    while TcpStream::connect(&serving.address).is_ok() {}
    serving.signal("-TERM");
    assert_eq!(serving.end().code(), Some(128 + 15));
    client.socket().read_to_end(&mut Vec::new()).unwrap_or_default();
}

#[test]
fn what_cannot_serve_says_so() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    for (args, status, expected) in [
        (&["serve", MODEL, "--port", &port][..], 1, "listening on 127.0.0.1:"),
        (&["serve", MODEL, "--port", "0", "-np", "0"], 2, "-np 0"),
        (&["serve", MODEL, "--port", "0", "--timeout", "0"], 2, "--timeout"),
        (&["serve", MODEL, "--port", "0", "--device", "cpu", "--require-gpu"], 1, "--require-gpu"),
        (&["serve", "nothing.gguf", "--port", "0"], 1, "nothing.gguf"),
    ] {
        let output = run(args);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(status), "{args:?}: {said}");
        assert!(said.contains(expected), "{args:?}: {said}");
    }
}
