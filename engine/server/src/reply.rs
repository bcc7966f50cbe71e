//! Bodies of answers: what the engine says, in OpenAI's words.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt::Write as _;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD as BASE64;
use engine::Tokenizer;
use serde_json::{Value, json};

use crate::api::VectorEncoding;
use crate::scheduler::{End, Finish, TokenLogprob};

/// A completion under way.
pub(crate) struct Completion {
    pub chat: bool,
    pub id: String,
    pub created_s: u64,
    pub model: String,
    pub include_usage: bool,
    pub logprobs: bool,
    /// Characters so far, what `text_offset` counts.
    pub n_chars: usize,
    /// What a whole answer holds so far.
    pub whole: Whole,
}

/// An answer that goes out whole, as far as it has come: kept as the JSON that it will be, since values of it take many
/// times the memory.
#[derive(Default)]
pub(crate) struct Whole {
    /// The text without its quotes.
    text: String,
    /// What goes into each array of `logprobs`.
    logprobs: [String; 4],
}

impl Whole {
    /// Bytes that it takes of the answer.
    pub fn len(&self) -> usize {
        self.text.len() + self.logprobs.iter().map(String::len).sum::<usize>()
    }
}

/// A text as JSON has it, without its quotes.
fn escaped(text: &str) -> String {
    let mut json = Value::from(text).to_string();
    json.pop();
    json.remove(0);
    json
}

/// The arrays in a chat's `logprobs`, and in a plain completion's.
const CHAT_LOGPROBS: &[&str] = &["content"];
const PLAIN_LOGPROBS: &[&str] = &["text_offset", "token_logprobs", "tokens", "top_logprobs"];

fn finish_reason(end: Option<&End>) -> Value {
    match end.map(|e| e.finish) {
        None => Value::Null,
        Some(Finish::Stop) => "stop".into(),
        Some(Finish::Length) => "length".into(),
    }
}

fn usage(end: &End) -> Value {
    json!({
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.completion_tokens,
        "total_tokens": end.prompt_tokens + end.completion_tokens,
        "prompt_tokens_details": { "cached_tokens": end.cached_tokens },
    })
}

impl Completion {
    fn envelope(&self, object: &str, choices: Value) -> Value {
        json!({
            "id": self.id,
            "object": object,
            "created": self.created_s,
            "model": self.model,
            "choices": choices,
        })
    }

    /// The first event of a chat's stream: it says who speaks.
    pub fn opening(&self) -> Option<Value> {
        let choice =
            json!([{ "index": 0, "delta": { "role": "assistant", "content": "" }, "finish_reason": null }]);
        self.chat.then(|| self.envelope("chat.completion.chunk", choice))
    }

    /// An event of the stream.
    pub fn chunk(&self, text: &str, token: Option<&TokenLogprob>, end: Option<&End>, t: &Tokenizer) -> Value {
        let (object, mut choice) = if self.chat {
            // The last event of a chat has an empty delta unless text came with it.
            let delta = if text.is_empty() && end.is_some() { json!({}) } else { json!({ "content": text }) };
            ("chat.completion.chunk", json!({ "index": 0, "delta": delta }))
        } else {
            ("text_completion", json!({ "index": 0, "text": text }))
        };
        choice["finish_reason"] = finish_reason(end);
        if self.logprobs {
            let values = token.map(|token| self.logprobs_of(token, t)).unwrap_or_default();
            let mut values = values.into_iter();
            for name in self.logprob_arrays() {
                choice["logprobs"][name] = values.next().into_iter().collect();
            }
        } else {
            choice["logprobs"] = Value::Null;
        }
        self.envelope(object, json!([choice]))
    }

    /// The event with the counts, after the last choice.
    pub fn usage_chunk(&self, end: &End) -> Value {
        let object = if self.chat { "chat.completion.chunk" } else { "text_completion" };
        let mut value = self.envelope(object, json!([]));
        value["usage"] = usage(end);
        value
    }

    /// Adds to the whole answer.
    pub fn add(&mut self, text: &str, token: Option<&TokenLogprob>, t: &Tokenizer) {
        self.whole.text.push_str(&escaped(text));
        let Some(token) = token else { return };
        for (array, value) in self.logprobs_of(token, t).iter().enumerate() {
            let array = &mut self.whole.logprobs[array];
            let comma = if array.is_empty() { "" } else { "," };
            let _ = write!(array, "{comma}{value}");
        }
        self.n_chars += text_of(token.token, t).chars().count();
    }

    /// The whole answer at once, as JSON.
    pub fn whole(&self, end: &End) -> String {
        let arrays = self.logprob_arrays().iter().zip(&self.whole.logprobs);
        let logprobs = match self.logprobs {
            true => {
                let arrays: Vec<String> = arrays.map(|(name, a)| format!("\"{name}\":[{a}]")).collect();
                format!("{{{}}}", arrays.join(","))
            }
            false => "null".into(),
        };
        let text = &self.whole.text;
        let (object, said) = match self.chat {
            true => ("chat.completion", format!(r#""message":{{"role":"assistant","content":"{text}"}}"#)),
            false => ("text_completion", format!(r#""text":"{text}""#)),
        };
        format!(
            r#"{{"id":{},"object":"{object}","created":{},"model":{},"choices":[{{"index":0,{said},"finish_reason":{},"logprobs":{logprobs}}}],"usage":{}}}"#,
            Value::from(self.id.as_str()),
            self.created_s,
            Value::from(self.model.as_str()),
            finish_reason(Some(end)),
            usage(end),
        )
    }

    /// The arrays that `logprobs` has.
    fn logprob_arrays(&self) -> &'static [&'static str] {
        if self.chat { CHAT_LOGPROBS } else { PLAIN_LOGPROBS }
    }

    /// What a token adds to each of the arrays.
    fn logprobs_of(&self, token: &TokenLogprob, t: &Tokenizer) -> Vec<Value> {
        if self.chat {
            let item = |id: u32, logprob: f64| json!({ "token": text_of(id, t), "logprob": finite(logprob), "bytes": t.piece(id, true) });
            let mut value = item(token.token, token.logprob);
            value["top_logprobs"] = token.top.iter().map(|&(id, p)| item(id, p)).collect();
            return Vec::from([value]);
        }
        let top = token.top.iter().map(|&(id, p)| (text_of(id, t), Value::from(finite(p))));
        Vec::from([
            self.n_chars.into(),
            finite(token.logprob).into(),
            text_of(token.token, t).into(),
            top.collect::<serde_json::Map<_, _>>().into(),
        ])
    }
}

fn text_of(id: u32, t: &Tokenizer) -> String {
    String::from_utf8_lossy(&t.piece(id, true)).into_owned()
}

/// JSON has no infinity; OpenAI writes this for what is impossible.
fn finite(logprob: f64) -> f64 {
    if logprob.is_finite() { logprob } else { -9999.0 }
}

/// Bytes of a number of a vector at most, with a comma: as in `-1.17549435e-38,` and `-0.0000123456789,`.
const MAX_NUMBER_BYTES: usize = 17;

/// Bytes of a vector's object beside its numbers, at most.
const VECTOR_BYTES: usize = 64;

/// Bytes of vectors' JSON at most.
pub(crate) fn max_embeddings_bytes(n_vectors: usize, n_embd: usize, encoding: VectorEncoding) -> usize {
    let numbers = match encoding {
        VectorEncoding::Numbers => n_embd.saturating_mul(MAX_NUMBER_BYTES),
        VectorEncoding::Base64 => n_embd.saturating_mul(4).div_ceil(3).saturating_mul(4),
    };
    numbers.saturating_add(VECTOR_BYTES).saturating_mul(n_vectors)
}

/// The answer of `/v1/embeddings`, as JSON.
pub(crate) fn embeddings(
    vectors: &[Vec<f32>],
    encoding: VectorEncoding,
    model: &str,
    n_tokens: usize,
) -> String {
    let mut out = String::from(r#"{"object":"list","data":["#);
    for (index, vector) in vectors.iter().enumerate() {
        let comma = if index > 0 { "," } else { "" };
        let _ = write!(out, r#"{comma}{{"object":"embedding","index":{index},"embedding":"#);
        match encoding {
            VectorEncoding::Numbers => write_numbers(&mut out, vector),
            VectorEncoding::Base64 => {
                let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
                out.push('"');
                BASE64.encode_string(bytes, &mut out);
                out.push('"');
            }
        }
        out.push('}');
    }
    let usage = json!({ "prompt_tokens": n_tokens, "total_tokens": n_tokens });
    let _ = write!(out, r#"],"model":{},"usage":{usage}}}"#, Value::from(model));
    out
}

/// An array of the shortest texts that are these numbers; JSON has none for infinity and NaN.
fn write_numbers(out: &mut String, numbers: &[f32]) {
    out.push('[');
    for (i, x) in numbers.iter().enumerate() {
        let comma = if i > 0 { "," } else { "" };
        let _ = if x.is_finite() { write!(out, "{comma}{x:?}") } else { write!(out, "{comma}null") };
    }
    out.push(']');
}

/// An array of whole numbers.
pub(crate) fn ids(ids: &[u32]) -> String {
    let mut out = String::from("[");
    for (i, id) in ids.iter().enumerate() {
        let comma = if i > 0 { "," } else { "" };
        let _ = write!(out, "{comma}{id}");
    }
    out.push(']');
    out
}

/// A server-sent event.
pub(crate) fn sse(data: &Value) -> String {
    format!("data: {data}\n\n")
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;

    /// The bound by which requests are refused, on the longest numbers that vectors of length 1 have.
    #[test]
    fn vectors_are_no_longer_than_their_bound() {
        for x in [-0.000_012_345_679_f32, -f32::MIN_POSITIVE, -1.234_567_9e-30, -0.100_000_024, 1.0, f32::NAN]
        {
            for (n_vectors, n_embd) in [(1, 1), (1, 2), (3, 1000), (2048, 64)] {
                let vectors = vec![vec![x; n_embd]; n_vectors];
                for encoding in [VectorEncoding::Numbers, VectorEncoding::Base64] {
                    let text = embeddings(&vectors, encoding, "", 0);
                    let around = embeddings(&[], encoding, "", 0).len();
                    let most = max_embeddings_bytes(n_vectors, n_embd, encoding);
                    assert!(text.len() - around <= most, "{} of {most}: {text:.200}", text.len() - around);
                    let value: Value = serde_json::from_str(&text).unwrap();
                    let last = &value["data"][n_vectors - 1];
                    assert_eq!(last["index"], n_vectors - 1);
                    if encoding == VectorEncoding::Numbers && x.is_finite() {
                        assert_eq!(last["embedding"][n_embd - 1].as_f64().unwrap() as f32, x);
                    }
                }
            }
        }
    }

    #[test]
    fn text_is_escaped_piece_by_piece() {
        let text = "a\"\\\n\u{1}é\u{1F600}";
        let pieces: String = text.chars().map(|c| escaped(c.encode_utf8(&mut [0; 4]))).collect();
        assert_eq!(serde_json::from_str::<Value>(&format!("\"{pieces}\"")).unwrap(), text);
    }
}
