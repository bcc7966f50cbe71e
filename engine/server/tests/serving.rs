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

fn context(params: ContextParams) -> Context {
    // The context wants its own handle of the model.
    let shared = Arc::new(model());
    let backend = Cpu::new(shared.weights().clone(), Arc::new(Pool::new(1).unwrap()), Isa::detect());
    Context::new(shared, Box::new(backend), params).unwrap()
}

fn server(model: &Model, n_seq: usize, n_batch: usize) -> Server<'_> {
    server_with(model, n_seq, n_batch, None, Limits::default())
}

fn server_with(
    model: &Model,
    n_seq: usize,
    n_batch: usize,
    embedder: Option<Context>,
    limits: Limits,
) -> Server<'_> {
    let params = ContextParams { n_ctx: N_CTX, n_seq, n_ubatch: n_batch, ..ContextParams::default() };
    let scheduler = Scheduler::new(model, context(params), n_seq, n_batch);
    let config = ServerConfig {
        model_name: "tiny".into(),
        sampling: SamplerParams::default(),
        seed: Some(7),
        entropy: 1,
        max_tokens: None,
        api_key: None,
        epoch_s: 0,
        limits: Limits { request_ms: 1000, ..limits },
    };
    Server::new(model, Some(scheduler), embedder, Box::new(Plain), config)
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
        r#","top_k":0,"typical_p":1,"mirostat":0,"dry_multiplier":0.0,"xtc_probability":0,"top_n_sigma":-1.0"#,
        r#","top_k":0,"repetition_penalty":1.0,"samplers":[],"chat_template_kwargs":{},"repeat_last_n":3"#,
        r#","top_k":0,"samplers":null,"chat_template_kwargs":null,"typical_p":null,"top_n_sigma":0"#,
        r#","top_k":0,"tools":null,"stop":null,"n":1,"response_format":{"type":"text"},"stream_options":null"#,
    ] {
        let all = say(r#""one""#, r#","seed":5,"top_k":0"#);
        assert_eq!(say(r#""one""#, &format!(r#","seed":5{more}"#)), all, "{more}");
    }
    // No recent tokens, no penalty; and all of the context is more than two.
    let likeliest = r#","temperature":0,"max_completion_tokens":40"#;
    let penalised =
        |n: i32| say(r#""one""#, &format!(r#"{likeliest},"presence_penalty":100,"repeat_last_n":{n}"#));
    assert_eq!(penalised(0), say(r#""one""#, likeliest));
    assert_eq!(penalised(-1), penalised(100));
    assert_ne!(penalised(-1), penalised(2));
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
        (post("/v1/completions", r#"{"prompt":"a","repeat_last_n":-2}"#), 400),
        (post("/v1/completions", r#"{"prompt":"a","typical_p":0.5}"#), 400),
        (post("/v1/completions", r#"{"prompt":"a","mirostat":2}"#), 400),
        (post("/v1/completions", r#"{"prompt":"a","dry_multiplier":0.8}"#), 400),
        (post("/v1/completions", r#"{"prompt":"a","xtc_probability":"0"}"#), 400),
        (post("/v1/completions", r#"{"prompt":"a","top_n_sigma":1}"#), 400),
        (post("/v1/completions", r#"{"prompt":"a","repetition_penalty":1.1}"#), 400),
        (post("/v1/completions", r#"{"prompt":"a","samplers":["top_k"]}"#), 400),
        (post("/v1/completions", r#"{"prompt":"a","chat_template_kwargs":{"enable_thinking":false}}"#), 400),
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

/// HTTP/1.0 has no chunks: such a stream ends with the connection, whatever the client asked for, and a whole answer
/// does not.
#[test]
fn a_stream_without_chunks_ends_the_connection() {
    let model = model();
    for stream in [true, false] {
        let mut server = server(&model, 1, 16);
        let body = format!(r#"{{"prompt":"a","max_tokens":3,"ignore_eos":true,"stream":{stream}}}"#);
        let head = "POST /v1/completions HTTP/1.0\r\nConnection: keep-alive\r\n";
        let id = ask(&mut server, &format!("{head}Content-Length: {}\r\n\r\n{body}", body.len()));
        let said = answers(&mut server, &[id]).remove(0);
        assert!(said.starts_with("HTTP/1.1 200 "), "{said}");
        server.sent(id, said.len(), 0);
        assert_eq!(server.is_done(id), stream, "{said}");
        let connection = if stream { "close" } else { "keep-alive" };
        assert!(said.contains(&format!("\r\nConnection: {connection}\r\n")), "{said}");
    }
}

fn body_of(response: &str) -> serde_json::Value {
    serde_json::from_str(response.split_once("\r\n\r\n").unwrap().1).unwrap()
}

/// Probabilities say the same in a stream and in a whole answer, one for each token.
#[test]
fn probabilities_are_those_of_the_stream() {
    const N: usize = 12;
    let model = model();
    for (path, what, arrays) in [
        (
            "/v1/completions",
            r#""prompt":"a","logprobs":3"#,
            &["tokens", "token_logprobs", "top_logprobs"][..],
        ),
        (
            "/v1/chat/completions",
            r#""messages":[{"role":"user","content":"a"}],"logprobs":true,"top_logprobs":3"#,
            &["content"],
        ),
    ] {
        let mut server = server(&model, 2, 16);
        let ids = [false, true].map(|stream| {
            let body = format!(r#"{{{what},"max_tokens":{N},"ignore_eos":true,"stream":{stream}}}"#);
            ask(&mut server, &post(path, &body))
        });
        let got = answers(&mut server, &ids);
        let whole = body_of(&got[0])["choices"][0]["logprobs"].clone();
        let lines = got[1].lines().filter_map(|l| l.strip_prefix("data: ")).filter(|l| *l != "[DONE]");
        let events: Vec<serde_json::Value> = lines.map(|l| serde_json::from_str(l).unwrap()).collect();
        for name in arrays {
            let pieces = events.iter().filter_map(|e| e["choices"][0]["logprobs"][name].as_array());
            let joined: Vec<_> = pieces.flatten().cloned().collect();
            assert_eq!(whole[name].as_array(), Some(&joined), "{path} {name}");
            assert_eq!(joined.len(), N, "{path} {name}");
        }
    }
}

/// What a client can make the server hold has a bound, however much it asks for.
#[test]
fn whole_answers_end_at_their_bound() {
    const MAX: usize = 4000;
    let model = model();
    let limits = Limits { answer_bytes: MAX, ..Limits::default() };
    for (path, what) in [
        ("/v1/completions", r#""prompt":"a","logprobs":20"#),
        (
            "/v1/chat/completions",
            r#""messages":[{"role":"user","content":"a"}],"logprobs":true,"top_logprobs":20"#,
        ),
    ] {
        let mut server = server_with(&model, 2, 16, None, limits.clone());
        let body = format!(r#"{{{what},"max_tokens":100,"ignore_eos":true}}"#);
        // Two at a time, and another behind them, to which nothing happens.
        let short = post(path, &format!(r#"{{{what},"max_tokens":1,"ignore_eos":true}}"#));
        let ids = [&post(path, &body), &post(path, &body), &short].map(|text| ask(&mut server, text));
        let got = answers(&mut server, &ids);
        let one = body_of(&got[2]);
        assert_eq!(one["usage"]["completion_tokens"], 1, "{one}");
        for said in &got[..2] {
            let value = body_of(said);
            let choice = &value["choices"][0];
            assert_eq!(choice["finish_reason"], "length", "{said}");
            let n = value["usage"]["completion_tokens"].as_u64().unwrap() as usize;
            let noted = choice["logprobs"]["tokens"].as_array().or(choice["logprobs"]["content"].as_array());
            assert!(n < 100 && noted.unwrap().len() == n, "{n} tokens: {said}");
            // Beside a bound's worth, what is around it and one more token.
            let len = said.split_once("\r\n\r\n").unwrap().1.len();
            assert!(
                (MAX..MAX + got[2].len()).contains(&len),
                "{len} bytes, {} around one token",
                got[2].len()
            );
        }
    }
}

#[test]
fn requests_for_more_than_an_answer_may_have_are_refused() {
    let model = model();
    let n_embd = model.hparams().n_embd;
    // Three vectors, as numbers of 17 bytes at most.
    let limits = Limits { answer_bytes: 3 * (17 * n_embd + 64), ..Limits::default() };
    let ask_for = |limits: &Limits, path: &str, body: &str| {
        let params = ContextParams { n_ctx: N_CTX, embeddings: true, ..ContextParams::default() };
        let mut server = server_with(&model, 1, 16, Some(context(params)), limits.clone());
        let id = ask(&mut server, &post(path, body));
        answers(&mut server, &[id]).remove(0)
    };
    let embed = |n: usize, more: &str| {
        let inputs = vec![r#""one""#; n].join(",");
        ask_for(&limits, "/v1/embeddings", &format!(r#"{{"input":[{inputs}]{more}}}"#))
    };
    let three = embed(3, "");
    assert_eq!(body_of(&three)["data"][2]["embedding"].as_array().map(Vec::len), Some(n_embd), "{three}");
    for refused in [embed(4, ""), embed(9, r#","encoding_format":"base64""#)] {
        assert!(refused.starts_with("HTTP/1.1 400 "), "{refused}");
        assert_eq!(body_of(&refused)["error"]["param"], "input");
        let message = body_of(&refused)["error"]["message"].as_str().unwrap().to_string();
        assert!(message.contains(&format!("an answer at most {}", limits.answer_bytes)), "{message}");
    }
    assert!(embed(4, r#","encoding_format":"base64""#).starts_with("HTTP/1.1 200 "));
    let tight = Limits { answer_bytes: 40, ..Limits::default() };
    assert!(ask_for(&tight, "/tokenize", r#"{"content":"a"}"#).starts_with("HTTP/1.1 200 "));
    let refused = ask_for(&tight, "/tokenize", &format!(r#"{{"content":"{}"}}"#, "q z".repeat(40)));
    assert!(refused.starts_with("HTTP/1.1 400 ") && refused.contains("its tokens may take"), "{refused}");
}
