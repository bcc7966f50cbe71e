//! The whole server on a tiny model, without sockets: answers of many clients at once equal those of one alone.

use std::sync::Arc;

use engine::backends::cpu::{Cpu, Isa};
use engine::pool::Pool;
use engine::sampler::SamplerParams;
use engine::weights::ByteSource;
use engine::{Context, ContextParams, Model, Tokenizer};
use server::scheduler::Scheduler;
use server::{ConnectionId, Limits, Message, Server, ServerConfig, Templates};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../cli/tests/golden/llama-linear-a.gguf");
const N_CTX: usize = 128;

struct Plain;

impl Templates for Plain {
    fn encode(&self, messages: &[Message], tokenizer: &Tokenizer) -> Result<Vec<u32>, String> {
        let text: String = messages.iter().map(|m| format!("{}: {}\n", m.role, m.content)).collect();
        tokenizer.encode(text.as_bytes(), Default::default()).map_err(|e| e.to_string())
    }
}

fn model() -> Model {
    let bytes: Arc<dyn ByteSource> = Arc::new(std::fs::read(MODEL).unwrap());
    Model::load(vec![bytes]).unwrap()
}

fn server(model: &Model, n_seq: usize, n_batch: usize) -> Server<'_> {
    // The context wants its own handle of the model.
    let shared = Arc::new(self::model());
    let backend = Cpu::new(shared.weights().clone(), Arc::new(Pool::new(1).unwrap()), Isa::detect());
    let params = ContextParams { n_ctx: N_CTX, n_seq, n_ubatch: n_batch, ..ContextParams::default() };
    let context = Context::new(shared, Box::new(backend), params).unwrap();
    let config = ServerConfig {
        model_name: "tiny".into(),
        sampling: SamplerParams::default(),
        seed: Some(7),
        entropy: 1,
        max_tokens: None,
        api_key: None,
        epoch_s: 0,
        limits: Limits { request_ms: 1000, ..Limits::default() },
    };
    Server::new(model, Some(Scheduler::new(model, context, n_seq, n_batch)), None, Box::new(Plain), config)
}

fn post(path: &str, body: &str) -> String {
    format!("POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

fn ask(server: &mut Server<'_>, request: &str) -> ConnectionId {
    let id = server.open(0).unwrap();
    server.receive(id, request.as_bytes(), 0);
    id
}

/// Steps until all is said; the responses.
fn answers(server: &mut Server<'_>, ids: &[ConnectionId]) -> Vec<String> {
    for _ in 0..10_000 {
        if !server.has_work() {
            break;
        }
        server.step(&|| 0);
    }
    assert!(!server.has_work(), "it ends");
    ids.iter().map(|&id| String::from_utf8(server.output(id).to_vec()).unwrap()).collect()
}

fn choices(response: &str) -> String {
    let body = response.split_once("\r\n\r\n").unwrap().1;
    let value: serde_json::Value = serde_json::from_str(body).unwrap();
    value["choices"].to_string()
}

fn requests() -> Vec<String> {
    (0..7)
        .map(|i| {
            let prompt = "the quick brown fox ".repeat(i % 3 + 1) + &i.to_string();
            let body = format!(
                r#"{{"prompt":"{prompt}","max_tokens":{},"temperature":{},"seed":{i},"logprobs":{},"ignore_eos":true}}"#,
                5 + 3 * i,
                i % 2,
                // Without them the backend picks a greedy answer's tokens, unless its batch mates need logits.
                if i % 3 == 0 { "1" } else { "null" },
            );
            post("/v1/completions", &body)
        })
        .collect()
}

#[test]
fn batch_mates_do_not_matter() {
    let model = model();
    let alone: Vec<String> = requests()
        .iter()
        .map(|r| {
            let mut server = server(&model, 1, 64);
            let id = ask(&mut server, r);
            choices(&answers(&mut server, &[id])[0])
        })
        .collect();
    for (n_seq, n_batch) in [(1, 64), (3, 5), (7, 64), (8, 1)] {
        let mut server = server(&model, n_seq, n_batch);
        let ids: Vec<_> = requests().iter().map(|r| ask(&mut server, r)).collect();
        let together: Vec<String> = answers(&mut server, &ids).iter().map(|r| choices(r)).collect();
        assert_eq!(together, alone, "{n_seq} sequences, batches of {n_batch}");
    }
}

#[test]
fn a_stream_says_what_the_whole_answer_says() {
    let model = model();
    let mut server = server(&model, 2, 16);
    let body = |stream| {
        format!(
            r#"{{"messages":[{{"role":"user","content":"hi"}}],"max_tokens":9,"ignore_eos":true,"stream":{stream},"stream_options":{{"include_usage":true}}}}"#
        )
    };
    let ids = [false, true].map(|s| ask(&mut server, &post("/v1/chat/completions", &body(s))));
    let got = answers(&mut server, &ids);
    let whole: serde_json::Value = serde_json::from_str(&choices(&got[0])).unwrap();
    let (mut text, mut usage) = (String::new(), None);
    for line in got[1].lines().filter_map(|l| l.strip_prefix("data: ")).filter(|l| *l != "[DONE]") {
        let value: serde_json::Value = serde_json::from_str(line).unwrap();
        text.push_str(value["choices"][0]["delta"]["content"].as_str().unwrap_or(""));
        usage = value["usage"]["completion_tokens"].as_u64().or(usage);
    }
    assert_eq!(text, whole[0]["message"]["content"].as_str().unwrap());
    assert_eq!(usage, Some(9));
    assert!(got[1].ends_with("data: [DONE]\n\n\r\n0\r\n\r\n"), "{}", got[1]);
}

/// Different words for the same: what clients send instead of a text, and fields that say what is so anyhow.
#[test]
fn clients_words_are_understood() {
    let model = model();
    let say = |content: &str, more: &str| {
        let body = format!(
            r#"{{"messages":[{{"role":"user","content":{content}}}],"max_completion_tokens":6,"ignore_eos":true{more}}}"#
        );
        let mut server = server(&model, 1, 64);
        let id = ask(&mut server, &post("/v1/chat/completions", &body));
        choices(&answers(&mut server, &[id])[0])
    };
    let plain = say(r#""one\ntwo""#, r#","seed":5"#);
    let parts = r#"[{"type":"text","text":"one"},{"type":"text","text":"two"}]"#;
    assert_eq!(say(parts, r#","seed":5"#), plain);
    for more in [
        r#","top_k":-1"#,
        r#","top_k":0,"tools":[],"tool_choice":"none","stop":[],"logit_bias":{},"user":"u","store":false"#,
        r#","top_k":0,"tools":null,"stop":null,"n":1,"response_format":{"type":"text"},"stream_options":null"#,
    ] {
        let all = say(r#""one""#, r#","seed":5,"top_k":0"#);
        assert_eq!(say(r#""one""#, &format!(r#","seed":5{more}"#)), all, "{more}");
    }
    let seeds = [5, -7, -8].map(|seed| say(r#""one""#, &format!(r#","seed":{seed},"temperature":3"#)));
    assert!(seeds[0] != seeds[1] && seeds[1] != seeds[2], "{seeds:?}");
}

#[test]
fn errors_say_what_is_wrong() {
    let model = model();
    let long = format!(r#"{{"prompt":"{}"}}"#, "x ".repeat(400));
    let deep = "[".repeat(100_000);
    let cases = [
        (post("/v1/completions", "{"), 400),
        (post("/v1/completions", &deep), 400),
        (post("/v1/completions", r#"{"prompt":"a","n":2}"#), 400),
        (post("/v1/completions", r#"{"prompt":"a","max_tokens":-5}"#), 400),
        (post("/v1/completions", r#"{"prompt":[999999]}"#), 400),
        (post("/v1/completions", r#"{"prompt":"a","model":"other"}"#), 404),
        ("GET /v1/models/other HTTP/1.1\r\nHost: a\r\n\r\n".into(), 404),
        (post("/v1/models/tiny", "{}"), 405),
        (
            post(
                "/v1/chat/completions",
                r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":null,"tool_calls":[{"id":"1"}]}]}"#,
            ),
            400,
        ),
        (post("/v1/completions", &long), 400),
        (post("/v1/embeddings", r#"{"input":"a"}"#), 501),
        (post("/nowhere", "{}"), 404),
        ("GET /v1/completions HTTP/1.1\r\nHost: a\r\n\r\n".into(), 405),
    ];
    for (request, status) in cases {
        let mut server = server(&model, 1, 16);
        let id = ask(&mut server, &request);
        let got = answers(&mut server, &[id]).remove(0);
        assert!(got.starts_with(&format!("HTTP/1.1 {status} ")), "{request:.120}: {got}");
        let body: serde_json::Value = serde_json::from_str(got.split_once("\r\n\r\n").unwrap().1).unwrap();
        assert!(body["error"]["message"].is_string(), "{got}");
    }
}

#[test]
fn a_client_that_goes_frees_its_sequence() {
    let model = model();
    let mut server = server(&model, 1, 16);
    let body = r#"{"prompt":"a","ignore_eos":true,"stream":true}"#;
    let gone = ask(&mut server, &post("/v1/completions", body));
    server.step(&|| 0);
    server.close(gone);
    assert!(!server.has_work());
    let slow = ask(&mut server, "POST /v1/completions HTTP/1.1\r\n");
    server.tick(2000);
    assert!(server.output(slow).starts_with(b"HTTP/1.1 408 "));
}
