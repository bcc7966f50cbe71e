//! Bodies of answers: what the engine says, in OpenAI's words.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

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
    /// All text so far.
    pub text: String,
    /// Characters so far, what `text_offset` counts.
    pub n_chars: usize,
    pub tokens: Vec<TokenLogprob>,
}

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
        let tokens = token.map_or(&[][..], core::slice::from_ref);
        let (object, mut choice) = if self.chat {
            // The last event of a chat has an empty delta unless text came with it.
            let delta = if text.is_empty() && end.is_some() { json!({}) } else { json!({ "content": text }) };
            ("chat.completion.chunk", json!({ "index": 0, "delta": delta }))
        } else {
            ("text_completion", json!({ "index": 0, "text": text }))
        };
        choice["finish_reason"] = finish_reason(end);
        choice["logprobs"] = self.logprobs(tokens, self.n_chars, t);
        self.envelope(object, json!([choice]))
    }

    /// The event with the counts, after the last choice.
    pub fn usage_chunk(&self, end: &End) -> Value {
        let object = if self.chat { "chat.completion.chunk" } else { "text_completion" };
        let mut value = self.envelope(object, json!([]));
        value["usage"] = usage(end);
        value
    }

    /// The whole answer at once.
    pub fn whole(&self, end: &End, t: &Tokenizer) -> Value {
        let (object, mut choice) = if self.chat {
            (
                "chat.completion",
                json!({ "index": 0, "message": { "role": "assistant", "content": self.text } }),
            )
        } else {
            ("text_completion", json!({ "index": 0, "text": self.text }))
        };
        choice["finish_reason"] = finish_reason(Some(end));
        choice["logprobs"] = self.logprobs(&self.tokens, 0, t);
        let mut value = self.envelope(object, json!([choice]));
        value["usage"] = usage(end);
        value
    }

    fn logprobs(&self, tokens: &[TokenLogprob], offset: usize, t: &Tokenizer) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
        let text = |id: u32| String::from_utf8_lossy(&t.piece(id, true)).into_owned();
        if self.chat {
            let item = |id: u32, logprob: f64| json!({ "token": text(id), "logprob": finite(logprob), "bytes": t.piece(id, true) });
            let content = tokens.iter().map(|token| {
                let mut value = item(token.token, token.logprob);
                value["top_logprobs"] = token.top.iter().map(|&(id, p)| item(id, p)).collect();
                value
            });
            return json!({ "content": content.collect::<Vec<_>>() });
        }
        let mut at = offset;
        let offsets = tokens.iter().map(|token| {
            let start = at;
            at += text(token.token).chars().count();
            start
        });
        let offsets: Vec<usize> = offsets.collect();
        let top = |token: &TokenLogprob| -> Value {
            token
                .top
                .iter()
                .map(|&(id, p)| (text(id), Value::from(finite(p))))
                .collect::<serde_json::Map<_, _>>()
                .into()
        };
        json!({
            "tokens": tokens.iter().map(|t| text(t.token)).collect::<Vec<_>>(),
            "token_logprobs": tokens.iter().map(|t| finite(t.logprob)).collect::<Vec<_>>(),
            "top_logprobs": tokens.iter().map(top).collect::<Vec<_>>(),
            "text_offset": offsets,
        })
    }
}

/// JSON has no infinity; OpenAI writes this for what is impossible.
fn finite(logprob: f64) -> f64 {
    if logprob.is_finite() { logprob } else { -9999.0 }
}

/// The answer of `/v1/embeddings`.
pub(crate) fn embeddings(
    vectors: &[Vec<f32>],
    encoding: VectorEncoding,
    model: &str,
    n_tokens: usize,
) -> Value {
    let data = vectors.iter().enumerate().map(|(index, v)| {
        let embedding = match encoding {
            VectorEncoding::Numbers => json!(v),
            VectorEncoding::Base64 => {
                BASE64.encode(v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>()).into()
            }
        };
        json!({ "object": "embedding", "index": index, "embedding": embedding })
    });
    json!({
        "object": "list",
        "data": data.collect::<Vec<_>>(),
        "model": model,
        "usage": { "prompt_tokens": n_tokens, "total_tokens": n_tokens },
    })
}

/// A server-sent event.
pub(crate) fn sse(data: &Value) -> String {
    format!("data: {data}\n\n")
}
