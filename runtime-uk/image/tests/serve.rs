//! The image serves HTTP over its own network stack: a port of the host is forwarded to the guest's card, and answers
//! are the hosted engine's.

mod common;
#[path = "../../../cli/tests/common/http.rs"]
mod http;

use std::path::Path;

use common::{FAILED, Guest, Running, hosted, setup};
use http::{Client, request};
use serde_json::{Value, json};

const PROMPT: &str = "The quick brown fox";
const N_PREDICT: usize = 12;

/// A guest that serves, and where.
struct Serving {
    running: Running,
    address: String,
}

impl Serving {
    /// Boots and waits until it listens; with words of the command line.
    fn start(machine: &'static str, words: &str, image: &Path, model: &Path) -> Serving {
        let (guest, address) = Guest::new(machine, words).module(model).network();
        let mut running = guest.boot(image);
        running.wait_until_it_serves();
        Serving { running, address }
    }

    fn client(&self) -> Client {
        Client::connect(&self.address)
    }

    fn metric(&self, name: &str) -> f64 {
        let text = self.client().get("/metrics").body;
        let value = text.lines().find_map(|line| line.strip_prefix(&format!("runik:{name} ")));
        value.unwrap_or_else(|| panic!("no {name}:\n{text}")).parse().unwrap()
    }
}

fn greedy(prompt: impl Into<Value>, stream: bool) -> Value {
    json!({ "prompt": prompt.into(), "max_tokens": N_PREDICT, "temperature": 0, "stream": stream })
}

/// The hosted engine's text for the same.
fn hosted_text(model: &Path, prompt: &str) -> String {
    use engine::tokenizer::DecodeOptions;
    let bytes: std::sync::Arc<dyn engine::weights::ByteSource> =
        std::sync::Arc::new(std::fs::read(model).unwrap());
    let loaded = engine::Model::load(vec![bytes]).unwrap();
    let tokens = hosted(model, prompt, N_PREDICT, 128);
    let options = DecodeOptions { remove_special: false, unparse_special: false };
    String::from_utf8_lossy(&loaded.tokenizer().decode(&tokens, options)).into_owned()
}

/// On each bus, with an address of its own or by DHCP: several clients at once, whole answers and streams.
#[test]
fn answers_are_the_hosted_engines() {
    let Some(setup) = setup() else { return };
    let model = setup.tiny.join("llama-b.gguf");
    let prompts =
        [PROMPT, "one two three", "é", "A longer prompt, which takes more than one batch of eight tokens."];
    let expected = prompts.map(|prompt| hosted_text(&model, prompt));
    for (machine, words) in
        [("q35", "ctx=128 parallel=2 batch=8"), ("microvm", "ctx=128 parallel=4 ip=10.0.2.15/24,10.0.2.2")]
    {
        let serving = Serving::start(machine, words, &setup.image, &model);
        let mut client = serving.client();
        assert_eq!(client.get("/health").json(), json!({ "status": "ok" }));
        std::thread::scope(|scope| {
            for first in 0..4 {
                let (address, expected) = (&serving.address, &expected);
                scope.spawn(move || {
                    let mut client = Client::connect(address);
                    for i in (0..4).map(|i| (first + i) % 4) {
                        let answer = client
                            .post("/v1/completions", &greedy(prompts[i], (first + i).is_multiple_of(2)));
                        assert_eq!(
                            answer.text(),
                            expected[i],
                            "{machine}: {:?}\n{}",
                            prompts[i],
                            answer.body
                        );
                    }
                });
            }
        });
        assert_eq!(serving.metric("e2e_request_latency_seconds_count"), 16.0);
        assert_eq!(serving.metric("request_errors_total"), 0.0);
        // Tokens instead of text, on the connection that was first.
        let ids =
            client.post("/tokenize", &json!({ "content": PROMPT, "add_special": true })).json()["tokens"]
                .clone();
        assert_eq!(client.post("/v1/completions", &greedy(ids, false)).text(), expected[0], "{machine}");
    }
}

/// Chats in the format that the command line names, embeddings, the key, the model's name.
#[test]
fn the_whole_api_is_there() {
    let Some(setup) = setup() else { return };
    let model = setup.tiny.join("llama-b.gguf");
    let words = "ctx=128 parallel=1 chat=chatml embeddings alias=tiny key=secret";
    let serving = Serving::start("q35", words, &setup.image, &model);
    let text = serving.running.text();
    assert!(text.contains("chat format chatml (as told)"), "{text}");
    let mut client = serving.client();
    assert_eq!(client.get("/v1/models").status, 401);
    let mut ask = |path: &str, body: &Value| {
        let text = request("POST", path, &body.to_string());
        client.send(&text.replace("Host: test", "Host: test\r\nAuthorization: Bearer secret"));
        client.response()
    };
    let chat = |stream: bool| {
        json!({
            "model": "tiny", "messages": [{ "role": "user", "content": PROMPT }], "max_tokens": 8, "temperature": 0,
            "ignore_eos": true, "stream": stream,
        })
    };
    let whole = ask("/v1/chat/completions", &chat(false));
    assert_eq!(whole.json()["usage"]["completion_tokens"], 8, "{}", whole.body);
    // The machine's clock is set, as QEMU's is.
    assert!(whole.json()["created"].as_u64().unwrap() > 1_700_000_000, "{}", whole.body);
    assert_eq!(ask("/v1/chat/completions", &chat(true)).text(), whole.text());
    // What the hosted engine says to the same text.
    let prompt = format!("<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n");
    let same = json!({ "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": true });
    assert_eq!(ask("/v1/completions", &same).text(), whole.text());
    let vectors = ask("/v1/embeddings", &json!({ "input": ["a", "b"] })).json();
    assert_eq!(vectors["data"].as_array().unwrap().len(), 2);
    let wrong = ask("/v1/chat/completions", &json!({ "messages": [{ "role": "judge", "content": "" }] }));
    assert!(wrong.status == 400 && wrong.body.contains("judge"), "{}", wrong.body);
}

/// What clients do wrong costs others nothing.
#[test]
fn bad_clients_are_survived() {
    let Some(setup) = setup() else { return };
    let model = setup.tiny.join("llama-b.gguf");
    let serving = Serving::start("microvm", "ctx=4096 parallel=1", &setup.image, &model);
    for (status, text) in [
        (400, request("POST", "/v1/completions", "{")),
        (400, "nonsense\r\n\r\n".to_owned()),
        (404, request("GET", "/", "")),
        (413, "POST /tokenize HTTP/1.1\r\nHost: test\r\nContent-Length: 1000000\r\n\r\n".to_owned()),
        (431, format!("GET /health HTTP/1.1\r\nHost: test\r\nX: {}\r\n\r\n", "x".repeat(20_000))),
    ] {
        let mut client = serving.client();
        client.send(&text);
        let response = client.response();
        assert_eq!(response.status, status, "{text:.80}: {}", response.body);
        assert!(response.json()["error"]["message"].is_string(), "{}", response.body);
    }
    // A stream whose client goes frees the only sequence.
    let endless = json!({ "prompt": PROMPT, "ignore_eos": true, "stream": true });
    let mut lost = serving.client();
    lost.send(&request("POST", "/v1/completions", &endless.to_string()));
    assert_eq!(lost.head().0, 200);
    lost.chunk().unwrap();
    drop(lost);
    let mut client = serving.client();
    let answer = client.post("/v1/completions", &greedy(PROMPT, true));
    assert_eq!(answer.text(), hosted_text(&model, PROMPT));
    assert_eq!(serving.metric("requests_cancelled_total"), 1.0);
    // More connections than there are sockets: the last ones wait for their turn.
    let idle: Vec<Client> = (0..60).map(|_| serving.client()).collect();
    let mut more: Vec<Client> = (0..3).map(|_| serving.client()).collect();
    more.iter_mut().for_each(|client| assert_eq!(client.get("/health").status, 200));
    drop(idle);
    assert_eq!(serving.client().get("/health").status, 200);
}

#[test]
fn a_format_that_does_not_exist_is_said() {
    let Some(setup) = setup() else { return };
    let guest = Guest::new("microvm", "chat=esperanto").module(&setup.tiny.join("llama-b.gguf"));
    let mut running = guest.boot(&setup.image);
    assert_eq!(running.end(), FAILED, "{}", running.text());
    assert!(
        running.text().contains("error: command line: chat=\"esperanto\", expected one of "),
        "{}",
        running.text()
    );
}
