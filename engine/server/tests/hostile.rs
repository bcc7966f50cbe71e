//! The fuzz targets on what is known to be tricky, on random changes of it, and on the corpus: what fuzzing once reached
//! stays tested without a fuzzer.

#[path = "../fuzz/harness.rs"]
mod harness;

use std::ops::Range;
use std::path::{Path, PathBuf};

use engine::Tokenizer;
use engine::tokenizer::{EncodeOptions, VocabSource};
use proptest::prelude::*;
use server::chat::{SpecialTexts, encode_parts};

/// Names of the seeds, and how many requests the reader finds in each, and what ends them.
const SEEDS: [(&str, usize, Option<u16>); 7] = [
    ("health", 1, None),
    ("old", 2, None),
    // Longer than the reader's target allows.
    ("completion", 0, Some(413)),
    ("chat", 0, Some(413)),
    ("embeddings", 1, None),
    ("chunked", 1, None),
    ("ahead", 3, None),
];

fn post(path: &str, headers: &str, body: &str) -> String {
    format!("POST {path} HTTP/1.1\r\nHost: a\r\n{headers}Content-Length: {}\r\n\r\n{body}", body.len())
}

/// What the targets start from: cuts, and what the client sends.
fn seed(name: &str) -> Vec<u8> {
    let health = "HTTP/1.1\r\nHost: a\r\n\r\n";
    let (cuts, text): (&[u8], String) = match name {
        "health" => (&[0], format!("GET /health {health}")),
        "old" => {
            (&[1, 30], "GET /v1/models HTTP/1.0\nConnection: keep-alive\n\nGET /metrics HTTP/1.0\n\n".into())
        }
        "completion" => {
            let body =
                r#"{"prompt":"the","max_tokens":3,"logprobs":2,"stop":["qq"],"top_p":0.5,"ignore_eos":true}"#;
            (&[2, 70, 9], post("/v1/completions", "", body))
        }
        "chat" => {
            let body = r#"{"messages":[{"role":"user","content":"hi"}],"stream":true,"n_predict":4,"n":1}"#;
            (&[0], post("/v1/chat/completions", "", body))
        }
        "embeddings" => (&[0], post("/v1/embeddings", "", r#"{"input":["one",[5,6]]}"#)),
        "chunked" => {
            let chunks = "A;e=1\r\n{\"content\"\r\n7\r\n:\"\\u00e\r\n3\r\n9\"}\r\n0\r\nT: 1\r\n\r\n";
            let head = "POST /tokenize HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
            (&[3, 80, 7, 1], format!("{head}{chunks}"))
        }
        "ahead" => {
            let first = post("/detokenize", "", r#"{"tokens":[7]}"#);
            let second = post("/detokenize", "Expect: 100-continue\r\n", "[[[[");
            (&[0], format!("{first}{second}HEAD /health {health}"))
        }
        name => panic!("no seed {name}"),
    };
    [cuts, text.as_bytes()].concat()
}

type Target = fn(&[u8]);

const TARGETS: [(&str, Target); 2] =
    [("http", harness::http), ("serve", |bytes| drop(harness::serve(bytes)))];

fn folder(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target)
}

#[test]
fn corpus() {
    for (name, run) in TARGETS {
        let files: Vec<_> =
            std::fs::read_dir(folder(name)).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert!(files.len() >= SEEDS.len(), "{name}: {} files", files.len());
        files.iter().for_each(|path| run(&std::fs::read(path).unwrap()));
    }
}

/// Writes the seeds: `UPDATE_GOLDEN=1 cargo test -p server --test hostile`.
#[test]
fn seeds_are_current() {
    for ((target, _), (name, ..)) in TARGETS.iter().flat_map(|t| SEEDS.iter().map(move |seed| (t, seed))) {
        let path = folder(target).join(name);
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::create_dir_all(folder(target)).unwrap();
            std::fs::write(&path, seed(name)).unwrap();
        }
        let found = std::fs::read(&path).unwrap_or_default();
        assert!(found == seed(name), "{} is old; UPDATE_GOLDEN=1 writes it", path.display());
    }
}

/// The seeds reach what they are for.
#[test]
fn seeds_are_requests() {
    for (name, n, status) in SEEDS {
        let seed = seed(name);
        let (requests, ended) = harness::read(&harness::pieces(&seed));
        assert_eq!((requests.len(), ended), (n, status), "{name}: {requests:?}");
        let said = String::from_utf8(harness::serve(&seed)).unwrap();
        let expected: &[&str] = match name {
            "health" => &["\r\n\r\n{\"status\":\"ok\"}"],
            "old" => &["keep-alive", "runik:requests_total 2\n"],
            "completion" => &["\"completion_tokens\":3", "\"text_offset\""],
            "chat" => &["data: [DONE]\n\n\r\n0\r\n\r\n"],
            "embeddings" => &["\"index\":1"],
            "chunked" => &["{\"tokens\":["],
            _ => &["{\"content\":\"", "HTTP/1.1 400 ", "Content-Length: 15\r\n\r\n"],
        };
        expected.iter().for_each(|text| assert!(said.contains(text), "{name}: no {text:?}: {said}"));
    }
}

#[test]
fn any_cut_of_the_seeds() {
    for (name, ..) in SEEDS {
        let bytes = harness::pieces(&seed(name)).concat();
        for at in 0..bytes.len().min(255) {
            harness::http(&[&[1, at as u8], &bytes[..]].concat());
        }
    }
}

#[derive(Clone, Debug)]
enum Change {
    Byte(prop::sample::Index, u8),
    Remove(prop::sample::Index, usize),
    Repeat(prop::sample::Index, usize),
    Insert(prop::sample::Index, &'static str),
}

fn change() -> impl Strategy<Value = Change> {
    let at = any::<prop::sample::Index>;
    let words = [
        "\r\n",
        "\n",
        "0",
        "9",
        "-",
        "\"",
        "[",
        "{\"prompt\":1}",
        "null",
        "\\",
        "Content-Length: 5\r\n",
        ": ",
    ];
    prop_oneof![
        (at(), any::<u8>()).prop_map(|(at, byte)| Change::Byte(at, byte)),
        (at(), 1usize..9).prop_map(|(at, n)| Change::Remove(at, n)),
        (at(), 1usize..99).prop_map(|(at, n)| Change::Repeat(at, n)),
        (at(), prop::sample::select(words.to_vec())).prop_map(|(at, word)| Change::Insert(at, word)),
    ]
}

fn changed(mut bytes: Vec<u8>, changes: &[Change]) -> Vec<u8> {
    for change in changes {
        let len = bytes.len();
        match change {
            Change::Byte(at, byte) if len > 0 => bytes[at.index(len)] = *byte,
            Change::Remove(at, n) if len > 0 => {
                let at = at.index(len);
                bytes.drain(at..len.min(at + n));
            }
            Change::Repeat(at, n) if len > 0 => {
                let at = at.index(len);
                let piece = bytes[at..len.min(at + n)].to_vec();
                bytes.splice(at..at, piece);
            }
            Change::Insert(at, word) => {
                let at = at.index(len + 1);
                bytes.splice(at..at, word.bytes());
            }
            _ => {}
        }
    }
    bytes
}

proptest! {
    #[test]
    fn http_changed_at_random(
        name in prop::sample::select(SEEDS.to_vec()),
        changes in prop::collection::vec(change(), 0..8),
    ) {
        harness::http(&changed(seed(name.0), &changes));
    }

    #[test]
    fn clients_changed_at_random(
        name in prop::sample::select(SEEDS.to_vec()),
        changes in prop::collection::vec(change(), 0..8),
    ) {
        harness::serve(&changed(seed(name.0), &changes));
    }
}

/// A vocabulary of letters, and of so many special tokens; whether it wants one at the beginning, and one at the end.
fn vocabulary(n_special: usize, (add_bos, add_eos): (bool, bool)) -> Tokenizer {
    let specials = (0..n_special).map(|i| format!("<unused{i}>"));
    let more = ["<|", "<|a", "|>", "<s>", "</s>"].map(String::from);
    let specials: Vec<String> = specials.chain(more).collect();
    let bytes: Vec<String> = (0..=255).map(|byte| format!("<0x{byte:02X}>")).collect();
    let tokens: Vec<&[u8]> = specials.iter().chain(&bytes).map(|token| token.as_bytes()).collect();
    let types = (0..tokens.len()).map(|i| if i < specials.len() { 3 } else { 6 }).collect();
    let scores = vec![0.0; tokens.len()];
    let source = VocabSource {
        model: "llama",
        tokens: Some(tokens),
        types: Some(types),
        scores: Some(scores),
        add_bos: Some(add_bos),
        add_eos: Some(add_eos),
        ..VocabSource::default()
    };
    Tokenizer::new(source).unwrap()
}

/// What [`encode_parts`] means, place by place: the longest special token that touches no message.
fn encode_plainly(text: &str, foreign: &[Range<usize>], specials: &[&str], t: &Tokenizer) -> Vec<u32> {
    let (mut ids, mut start, mut at) = (Vec::from_iter(t.bos().filter(|_| t.add_bos())), 0, 0);
    let mut flush = |piece: &str, parse_special: bool| {
        let options = EncodeOptions { add_special: false, parse_special };
        ids.extend(t.encode(piece.as_bytes(), options).unwrap());
    };
    while at < text.len() {
        let own = |len: usize| foreign.iter().all(|r| r.end <= at || r.start >= at + len);
        let found =
            specials.iter().filter(|s| text[at..].starts_with(**s) && own(s.len())).max_by_key(|s| s.len());
        match found {
            Some(special) => {
                flush(&text[start..at], false);
                flush(special, true);
                at += special.len();
                start = at;
            }
            None => at += text[at..].chars().next().unwrap().len_utf8(),
        }
    }
    flush(&text[start..], false);
    ids.extend(t.eos().filter(|_| t.add_eos()));
    ids
}

proptest! {
    #[test]
    fn special_tokens_are_the_templates_alone(
        ends in any::<(bool, bool)>(),
        parts in prop::collection::vec((any::<bool>(), "(<|\\||>|<s>|a|é|</s>|<unused1>|<unused12>){0,5}"), 0..8),
    ) {
        let t = vocabulary(20, ends);
        let (mut text, mut foreign) = (String::new(), Vec::new());
        for (is_message, part) in &parts {
            let start = text.len();
            text.push_str(part);
            foreign.extend(is_message.then_some(start..text.len()));
        }
        let specials: Vec<String> = (0..20).map(|i| format!("<unused{i}>")).collect();
        let specials: Vec<&str> =
            specials.iter().map(String::as_str).chain(["<|", "<|a", "|>", "<s>", "</s>"]).collect();
        let ids = encode_parts(&text, &foreign, &SpecialTexts::new(&t), &t).unwrap();
        prop_assert_eq!(ids, encode_plainly(&text, &foreign, &specials, &t), "{:?} {:?}", text, foreign);
    }
}

/// The server has one thread: a conversation may not keep it busy by what is in it. Where each place of the text was tried
/// with each special token, and each find with each message, these took minutes.
#[test]
fn special_tokens_in_messages_take_no_time() {
    let t = vocabulary(6000, (true, false));
    let specials = SpecialTexts::new(&t);
    let started = std::time::Instant::now();
    let long = "<unused7> hello <".repeat(100_000);
    assert!(specials.are_in(&long) && !specials.are_in(&"<unused x".repeat(100_000)));
    encode_parts(&long, std::slice::from_ref(&(0..long.len())), &specials, &t).unwrap();
    let (mut many, mut foreign) = (String::new(), Vec::new());
    for _ in 0..50_000 {
        many.push_str("<s>");
        foreign.push(many.len()..many.len() + 9);
        many.push_str("<unused7></s>");
    }
    encode_parts(&many, &foreign, &specials, &t).unwrap();
    assert!(started.elapsed().as_secs() < 20, "{:?}", started.elapsed());
}

/// What `/detokenize` gives is bounded as what it is sent.
#[test]
fn token_ids_of_much_text_are_refused() {
    let ask = |(id, text): (u32, usize), n: usize| {
        assert!(text > 0);
        let request =
            post("/detokenize", "", &format!("{{\"tokens\":[{}]}}", vec![id.to_string(); n].join(",")));
        String::from_utf8(harness::serve(&[&[0], request.as_bytes()].concat())).unwrap()
    };
    // The harness takes bodies of 1024 bytes.
    let tokenizer = harness::TINY.tokenizer();
    let text_of = |id: u32| (id, tokenizer.piece(id, true).len());
    let longest = (0..tokenizer.n_vocab() as u32).map(text_of).max_by_key(|found| found.1).unwrap();
    let n = 1024 / longest.1;
    assert!(ask(longest, n).starts_with("HTTP/1.1 200 "), "{}", ask(longest, n));
    let said = ask(longest, n + 1);
    assert!(said.starts_with("HTTP/1.1 400 ") && said.contains("their text is longer"), "{said}");
}
