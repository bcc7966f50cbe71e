//! The tokenizer against golden data made with llama.cpp: token ids and detokenised bytes of every item.
//!
//! Small data is in tests/golden/tokenizer. The large lies where `RUNIK_GOLDENS` says, else in `../shared/goldens` beside the workspace; the SmolLM2 model where
//! `RUNIK_TEST_MODEL` says, else in the user's cache. A test without its data prints a line that begins `skipped: `.

use std::path::{Path, PathBuf};
use std::time::Instant;

use engine::tokenizer::{DecodeOptions, EncodeOptions, Tokenizer, TokenizerError, VocabSource};
use gguf::Gguf;
use proptest::prelude::*;
use serde_json::Value as Json;

const RAW: EncodeOptions = EncodeOptions { add_special: false, parse_special: false };

fn goldens() -> Option<PathBuf> {
    let folder = std::env::var_os("RUNIK_GOLDENS")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/goldens"), PathBuf::from);
    existing(folder)
}

fn model() -> Option<PathBuf> {
    let cache = || {
        let home = std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache"));
        let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or(home)?;
        Some(cache.join("runik/SmolLM2-135M-Instruct.Q4_1.gguf"))
    };
    existing(std::env::var_os("RUNIK_TEST_MODEL").map(PathBuf::from).or_else(cache)?)
}

fn existing(path: PathBuf) -> Option<PathBuf> {
    if path.exists() {
        return Some(path);
    }
    println!("skipped: {} is not there", path.display());
    None
}

fn json(path: PathBuf) -> Json {
    serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap()
}

fn hex(value: &Json) -> Vec<u8> {
    let digits = value.as_str().unwrap();
    (0..digits.len()).step_by(2).map(|i| u8::from_str_radix(&digits[i..i + 2], 16).unwrap()).collect()
}

fn ids(value: &Json) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// What an item of a golden file finds wrong.
fn check(tokenizer: &Tokenizer, item: &Json) -> Option<String> {
    let text = hex(&item["hex"]);
    let flag = |name: &str| item[name].as_bool().unwrap_or(false);
    let options = EncodeOptions { add_special: flag("add_special"), parse_special: flag("parse_special") };
    let got = tokenizer.encode(&text, options);
    if !item["throws"].is_null() {
        // llama.cpp throws; we encode the bad bytes as U+FFFD.
        return got.err().map(|error| format!("{text:02x?}: {error}"));
    }
    let want = ids(&item["ids"]);
    if got.as_ref() != Ok(&want) {
        return Some(format!(
            "{:?} {options:?}\n  want {want:?}\n  got  {got:?}",
            String::from_utf8_lossy(&text)
        ));
    }
    for (key, unparse_special) in [("detok_hex", true), ("detok_nospecial_hex", false)] {
        if item[key].is_null() {
            continue;
        }
        let (want, options) = (hex(&item[key]), DecodeOptions { remove_special: false, unparse_special });
        let got = tokenizer.decode(&ids(&item["ids"]), options);
        if got != want {
            let [want, got] = [want, got].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
            return Some(format!(
                "{key} of {:?}\n  want {want:?}\n  got  {got:?}",
                String::from_utf8_lossy(&text)
            ));
        }
    }
    None
}

fn check_all<'a>(name: &str, tokenizer: &Tokenizer, items: impl IntoIterator<Item = &'a Json>) {
    let (mut n, mut wrong) = (0, Vec::new());
    for item in items {
        n += 1;
        wrong.extend(check(tokenizer, item));
    }
    println!("{name}: {} of {n} match", n - wrong.len());
    assert!(n > 0 && wrong.is_empty(), "{name}: {} of {n} differ:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn tiny_models() {
    let Some(folder) = goldens().map(|goldens| goldens.join("tiny")) else { return };
    for name in json(folder.join("index.json")).as_array().unwrap() {
        let name = name.as_str().unwrap();
        let bytes = std::fs::read(folder.join(format!("{name}.gguf"))).unwrap();
        let tokenizer = Tokenizer::from_gguf(&Gguf::parse(&bytes).unwrap()).unwrap();
        let golden = json(folder.join(format!("{name}.json")));
        check_all(name, &tokenizer, golden["tokenize"].as_array().unwrap());
    }
}

/// Vocabularies of a few hundred tokens, and what llama.cpp makes of random text with them: see its README.
fn own_goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizer")
}

#[test]
fn small_vocabularies() {
    let golden = json(own_goldens().join("models.json"));
    for (name, items) in golden.as_object().unwrap() {
        let bytes = std::fs::read(own_goldens().join(format!("{name}.gguf"))).unwrap();
        let tokenizer = Tokenizer::from_gguf(&Gguf::parse(&bytes).unwrap()).unwrap();
        check_all(name, &tokenizer, items.as_array().unwrap());
    }
}

#[test]
fn all_named_pre_tokenizers() {
    check_pre_tokenizers(&own_goldens());
}

#[test]
fn named_pre_tokenizers() {
    if let Some(goldens) = goldens() {
        check_pre_tokenizers(&goldens.join("pretok"));
    }
}

fn check_pre_tokenizers(folder: &Path) {
    let bytes = std::fs::read(folder.join("vocab-cross.gguf")).unwrap();
    let gguf = Gguf::parse(&bytes).unwrap();
    let golden = json(folder.join("pretok.json"));
    let (mut n, mut wrong) = (0, Vec::new());
    for pre in golden["pres"].as_array().unwrap() {
        let pre = pre.as_str().unwrap();
        let source = VocabSource { pre: Some(pre), ..VocabSource::from_gguf(&gguf).unwrap() };
        let tokenizer = Tokenizer::new(source).unwrap();
        for item in golden["items"].as_array().unwrap() {
            let is_ours = |result: &&Json| result["pre"].as_array().unwrap().iter().any(|name| name == pre);
            let mut result = item["results"].as_array().unwrap().iter().find(is_ours).unwrap().clone();
            result["hex"] = item["hex"].clone();
            n += 1;
            wrong.extend(check(&tokenizer, &result).map(|difference| format!("{pre}: {difference}")));
        }
    }
    println!("pre-tokenizers: {} of {n} match", n - wrong.len());
    assert!(
        n > 0 && wrong.is_empty(),
        "{} of {n} differ:\n{}",
        wrong.len(),
        wrong[..wrong.len().min(20)].join("\n")
    );
}

#[test]
fn smollm2() {
    let (Some(goldens), Some(model)) = (goldens(), model()) else { return };
    let bytes = std::fs::read(model).unwrap();
    let gguf = Gguf::parse(&bytes).unwrap();
    let start = Instant::now();
    let tokenizer = Tokenizer::from_gguf(&gguf).unwrap();
    println!("loaded in {:.1} ms", start.elapsed().as_secs_f64() * 1e3);
    let golden = json(goldens.join("smollm2-135m/tokenizer.json"));
    check_all("smollm2", &tokenizer, golden["items"].as_array().unwrap());

    let text = std::fs::read(goldens.join("smollm2-135m/ppl-a.txt")).unwrap();
    let start = Instant::now();
    let tokens = tokenizer.encode(&text, RAW).unwrap();
    println!("encoded at {:.1} MB/s", text.len() as f64 / 1e6 / start.elapsed().as_secs_f64());
    assert_eq!(tokenizer.decode(&tokens, DecodeOptions::default()), text);

    // A stream gives the same text, whatever the tokens cut through.
    let text = "naïve 中文 😀 👩‍👩‍👧 é";
    let tokens = tokenizer.encode(text.as_bytes(), RAW).unwrap();
    let mut stream = tokenizer.stream(false);
    let mut streamed: String = tokens.iter().map(|&id| stream.push(id).to_string()).collect();
    streamed.push_str(stream.finish());
    assert_eq!(streamed, text);
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.n_vocab()), (Some(1), Some(2), 49152));
    assert!(tokenizer.is_eog(2) && tokenizer.is_eog(0) && !tokenizer.is_eog(1));
}

fn byte_level<'a>(tokens: &'a [String], merges: &'a [&'a str], pre: &'a str) -> VocabSource<'a> {
    VocabSource {
        model: "gpt2",
        pre: Some(pre),
        tokens: Some(tokens.iter().map(String::as_bytes).collect()),
        merges: Some(merges.iter().map(|merge| merge.as_bytes()).collect()),
        ..VocabSource::default()
    }
}

fn letters() -> Vec<String> {
    ('!'..='~').map(String::from).chain(["Ġ", "Ċ", "aa", "aaaa", "Ã", "©"].map(String::from)).collect()
}

#[test]
fn a_megabyte_of_one_character_takes_seconds() {
    let tokens = letters();
    for pre in ["default", "llama-bpe", "deepseek-llm", "jais-2", "gpt-4o", "superbpe", "tiny_aya"] {
        let tokenizer = Tokenizer::new(byte_level(&tokens, &["a a", "aa aa"], pre)).unwrap();
        for character in ["a", " ", "7", "\n", "é", "."] {
            let mut text = character.repeat((1 << 20) / character.len());
            let start = Instant::now();
            let n = tokenizer.encode(text.as_bytes(), RAW).unwrap().len();
            text.push('x');
            let longer = tokenizer.encode(text.as_bytes(), RAW).unwrap().len();
            let seconds = start.elapsed().as_secs_f64();
            println!("{pre} {character:?}: {seconds:.2} s");
            assert!(n > 0 && longer > n, "{pre} {character:?}: {n} and {longer} tokens");
            assert!(seconds < 20.0, "{pre} {character:?}: {seconds} s");
        }
    }
}

#[test]
fn mmbert_begins_lines_with_a_space() {
    let tokens = ["▁a", "▁b", "a", "\n\n", "▁", "b", "\n"].map(String::from);
    let tokenizer = Tokenizer::new(byte_level(&tokens, &["▁ a", "▁ b"], "mmbert")).unwrap();
    assert_eq!(tokenizer.encode("a b\n\nba ▁b".as_bytes(), RAW), Ok(vec![0, 1, 3, 1, 2, 4, 1]));
}

#[test]
fn chars_split_over_tokens_wait_in_the_stream() {
    let tokens = ["ðŁ", "ĺ", "Ģ", "x"].map(String::from);
    let tokenizer = Tokenizer::new(byte_level(&tokens, &[], "gpt-2")).unwrap();
    let mut stream = tokenizer.stream(false);
    assert_eq!(stream.push(0), "");
    assert_eq!(stream.push(1), "");
    assert_eq!(stream.push(2), "😀");
    assert_eq!(stream.push(0), "");
    assert_eq!(stream.push(3), "\u{FFFD}x");
    assert_eq!(stream.push(0), "");
    assert_eq!(stream.finish(), "\u{FFFD}");
    assert_eq!(stream.finish(), "");
}

/// Tokens and merges over few characters, so that they meet in the text.
fn any_bytes(max: usize) -> impl Strategy<Value = Vec<u8>> {
    let byte = prop_oneof![
        4 => prop::sample::select(b"ab <|>\n0'".to_vec()),
        2 => prop::sample::select(vec![0xE2, 0x96, 0x81, 0xC4, 0xA0, 0xF0]),
        1 => any::<u8>(),
    ];
    prop::collection::vec(byte, 0..max)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]
    /// No vocabulary and no text makes the tokenizer panic, and a stream gives the text that the pieces give.
    #[test]
    fn any_vocabulary_takes_any_text(
        model in prop::sample::select(vec!["gpt2", "gemma4", "whitespace", "llama", "bert", "t5", "rwkv", "no_vocab"]),
        pre in prop::sample::select(vec!["default", "llama-bpe", "gpt-4o", "mmbert", "whitespace", "superbpe", "afmoe"]),
        tokens in prop::collection::vec((any_bytes(8), 0i32..8, -4i8..4), 0..40),
        merges in prop::collection::vec(any_bytes(8), 0..20),
        charsmap in prop::collection::vec(any::<u8>(), 0..24),
        ids in prop::collection::vec(0u32..50, 0..20),
        text in any_bytes(60),
        (add_special, parse_special, name) in (any::<bool>(), any::<bool>(), prop::sample::select(vec!["x", "phi3"])),
    ) {
        let source = VocabSource {
            model,
            pre: Some(pre),
            tokens: Some(tokens.iter().map(|token| &token.0[..]).collect()),
            scores: Some(tokens.iter().map(|token| token.2.into()).collect()),
            types: Some(tokens.iter().map(|token| token.1).collect()),
            merges: Some(merges.iter().map(|merge| &merge[..]).collect()),
            charsmap,
            general_name: name.into(),
            ..VocabSource::default()
        };
        if let Ok(tokenizer) = Tokenizer::new(source) {
            if let Ok(encoded) = tokenizer.encode(&text, EncodeOptions { add_special, parse_special }) {
                prop_assert!(encoded.iter().all(|&id| (id as usize) < tokenizer.n_vocab()));
                tokenizer.decode(&encoded, DecodeOptions { remove_special: true, unparse_special: parse_special });
            }
            let pieces: Vec<u8> = ids.iter().flat_map(|&id| tokenizer.piece(id, true).into_owned()).collect();
            let mut stream = tokenizer.stream(true);
            let mut streamed: String = ids.iter().map(|&id| stream.push(id).to_string()).collect();
            streamed.push_str(stream.finish());
            prop_assert_eq!(streamed, String::from_utf8_lossy(&pieces));
        }
    }
}

#[test]
fn errors_name_what_is_missing() {
    let tokens = letters();
    let source = || byte_level(&tokens, &[], "gpt-2");
    let error = |source: VocabSource<'_>| Tokenizer::new(source).err().unwrap();
    let unknown = error(VocabSource { pre: Some("gpt-9"), ..source() });
    assert_eq!(unknown, TokenizerError::UnknownPreTokenizer { name: "gpt-9".into() });
    assert!(unknown.to_string().contains("\"gpt-9\""));
    assert_eq!(
        error(VocabSource { model: "plamo2", ..source() }),
        TokenizerError::UnknownModel { name: "plamo2".into() }
    );
    assert_eq!(
        error(VocabSource { merges: None, ..source() }),
        TokenizerError::MissingKey { key: "tokenizer.ggml.merges" }
    );
    assert_eq!(
        error(VocabSource { tokens: None, ..source() }),
        TokenizerError::MissingKey { key: "tokenizer.ggml.tokens" }
    );
    assert_eq!(
        error(VocabSource { types: Some(vec![1]), ..source() }),
        TokenizerError::ShortArray { key: "tokenizer.ggml.token_type", expected: tokens.len(), got: 1 }
    );
    let add_bos = EncodeOptions { add_special: true, ..RAW };
    let without_bos = VocabSource { add_bos: Some(true), ..byte_level(&tokens, &[], "glm4") };
    let without_bos = Tokenizer::new(without_bos).unwrap();
    assert_eq!(without_bos.encode(b"a", add_bos), Err(TokenizerError::NoSpecialToken { which: "bos" }));
    let none = VocabSource { model: "no_vocab", vocab_size: Some(7), ..VocabSource::default() };
    let none = Tokenizer::new(none).unwrap();
    assert_eq!((none.n_vocab(), none.encode(b"a", RAW)), (7, Err(TokenizerError::NoVocabulary)));
    assert!(none.decode(&[1, 2], DecodeOptions::default()).is_empty());
}
