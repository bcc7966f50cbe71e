//! Bodies of requests: JSON to typed values, each field checked once. A message names the field, what it is and what it
//! may be. Fields that would change the answer and are not supported are refused; unknown ones are ignored, as clients
//! send many.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::ops::RangeInclusive;

use engine::sampler::SamplerParams;
use serde_json::{Map, Value};

use crate::error::ApiError;
use crate::http::json_depth;

/// Nesting allowed; real requests have some five levels.
const MAX_DEPTH: usize = 32;

/// Stop texts in one request, and bytes of each: each is searched for at every token.
const MAX_STOPS: usize = 16;
const MAX_STOP_BYTES: usize = 256;

/// OpenAI's bound.
const MAX_TOP_LOGPROBS: u64 = 20;

/// What would change an answer and is not supported, unless it is empty.
const UNSUPPORTED: [&str; 8] = [
    "tools",
    "functions",
    "logit_bias",
    "grammar",
    "json_schema",
    "suffix",
    "samplers",
    "chat_template_kwargs",
];

/// Samplers that there are not, and the numbers that switch them off.
const OFF: [(&str, RangeInclusive<f64>); 6] = [
    ("typical_p", 1.0..=1.0),
    ("mirostat", 0.0..=0.0),
    ("dry_multiplier", 0.0..=0.0),
    ("xtc_probability", 0.0..=0.0),
    ("top_n_sigma", f64::MIN..=0.0),
    ("repetition_penalty", 1.0..=1.0),
];

/// Texts in one request for embeddings.
const MAX_INPUTS: usize = 2048;

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user`, `assistant`, …
    pub role: String,
    /// Its text.
    pub content: String,
}

/// Text, or tokens that the client made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// Text.
    Text(String),
    /// Ids, not yet checked against the vocabulary.
    Tokens(Vec<u32>),
}

/// How to answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    /// Tokens at most; the server's default if `None`.
    pub max_tokens: Option<usize>,
    /// How to sample; the seed is not in it.
    pub sampling: SamplerParams,
    /// The seed, if the client wants one.
    pub seed: Option<u64>,
    /// Texts that end the answer.
    pub stop: Vec<String>,
    /// Go on after end-of-generation tokens.
    pub ignore_eos: bool,
    /// Send the answer as it comes.
    pub stream: bool,
    /// Let the stream end with counts.
    pub include_usage: bool,
    /// Probabilities, with those of so many of the likeliest tokens.
    pub logprobs: Option<usize>,
}

/// Parses a body into an object.
pub fn object(body: &[u8]) -> Result<Map<String, Value>, ApiError> {
    if json_depth(body) > MAX_DEPTH {
        return Err(ApiError::new(400, format!("the body is nested deeper than {MAX_DEPTH} levels")));
    }
    match serde_json::from_slice(body) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(ApiError::new(400, "the body is no JSON object")),
        Err(e) => Err(ApiError::new(400, format!("the body is no JSON: {e}"))),
    }
}

/// A body's fields; `null` is as good as absent.
pub struct Fields<'a>(pub &'a Map<String, Value>);

impl<'a> Fields<'a> {
    fn get(&self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|v| !v.is_null())
    }

    fn required(&self, name: &str) -> Result<&'a Value, ApiError> {
        self.get(name).ok_or_else(|| ApiError::field(name, "missing"))
    }

    fn bool(&self, name: &str, default: bool) -> Result<bool, ApiError> {
        self.get(name).map_or(Ok(default), |v| v.as_bool().ok_or_else(|| wrong(name, v, "true or false")))
    }

    fn count(&self, name: &str, min: u64, max: u64) -> Result<Option<u64>, ApiError> {
        let Some(v) = self.get(name) else { return Ok(None) };
        let n = v.as_u64().filter(|n| (min..=max).contains(n));
        n.map(Some).ok_or_else(|| wrong(name, v, &format!("a whole number in {min}..={max}")))
    }

    fn number(&self, name: &str, default: f32, min: f32, max: f32) -> Result<f32, ApiError> {
        let Some(v) = self.get(name) else { return Ok(default) };
        let x = v.as_f64().map(|x| x as f32).filter(|x| (min..=max).contains(x));
        x.ok_or_else(|| wrong(name, v, &format!("a number in {min}..={max}")))
    }

    /// The model that is asked for.
    pub fn model(&self) -> Result<Option<&'a str>, ApiError> {
        self.get("model").map(|v| v.as_str().ok_or_else(|| wrong("model", v, "a string"))).transpose()
    }
}

fn wrong(name: &str, got: &Value, expected: &str) -> ApiError {
    let got = got.to_string();
    let short: String = got.chars().take(40).collect();
    let dots = if short.len() < got.len() { "…" } else { "" };
    ApiError::field(name, &format!("{short}{dots} given, expected {expected}"))
}

fn token(name: &str, v: &Value) -> Result<u32, ApiError> {
    v.as_u64().and_then(|n| u32::try_from(n).ok()).ok_or_else(|| wrong(name, v, "token ids"))
}

/// A text, or an array of token ids.
fn text_or_tokens(name: &str, v: &Value) -> Result<Prompt, ApiError> {
    match v {
        Value::String(s) => Ok(Prompt::Text(s.clone())),
        Value::Array(a) if !a.is_empty() => {
            Ok(Prompt::Tokens(a.iter().map(|v| token(name, v)).collect::<Result<_, _>>()?))
        }
        _ => Err(wrong(name, v, "a text or an array of token ids")),
    }
}

/// The prompt of `/v1/completions`.
pub fn prompt(fields: &Fields<'_>) -> Result<Prompt, ApiError> {
    match fields.required("prompt")? {
        // Some clients wrap their one prompt in an array.
        Value::Array(a) if a.len() == 1 && !a[0].is_u64() => text_or_tokens("prompt", &a[0]),
        Value::Array(a) if a.iter().any(|v| !v.is_u64()) => Err(ApiError::field(
            "prompt",
            "one text or one array of token ids; send several prompts one by one",
        )),
        v => text_or_tokens("prompt", v),
    }
}

/// The messages of `/v1/chat/completions`.
pub fn messages(fields: &Fields<'_>) -> Result<Vec<Message>, ApiError> {
    let v = fields.required("messages")?;
    let array = v.as_array().filter(|a| !a.is_empty());
    let array = array.ok_or_else(|| wrong("messages", v, "an array of at least one message"))?;
    array.iter().map(message).collect()
}

fn message(v: &Value) -> Result<Message, ApiError> {
    let role = v.get("role").and_then(Value::as_str);
    let role = role.ok_or_else(|| ApiError::field("messages", "a message has no role"))?;
    let content = match v.get("content") {
        Some(Value::String(s)) => s.clone(),
        // An assistant's turn may be empty.
        None | Some(Value::Null) => String::new(),
        Some(Value::Array(parts)) => parts.iter().map(text_part).collect::<Result<Vec<_>, _>>()?.join("\n"),
        Some(other) => return Err(wrong("messages", other, "a content that is a text or text parts")),
    };
    if v.get("tool_calls").and_then(Value::as_array).is_some_and(|calls| !calls.is_empty()) {
        return Err(ApiError::field("messages", "a message has tool_calls, which are not supported"));
    }
    Ok(Message { role: role.to_string(), content })
}

/// The text of a part of a message; several parts are lines of it, as in llama.cpp.
fn text_part(part: &Value) -> Result<&str, ApiError> {
    match (part.get("type").and_then(Value::as_str), part.get("text").and_then(Value::as_str)) {
        (Some("text"), Some(text)) => Ok(text),
        _ => Err(ApiError::field("messages", "only parts of type text are supported")),
    }
}

/// The fields that both kinds of completion share.
pub fn generation(fields: &Fields<'_>, chat: bool, defaults: &SamplerParams) -> Result<Generation, ApiError> {
    if fields.count("n", 1, u64::MAX)?.is_some_and(|n| n != 1) {
        return Err(ApiError::field("n", "only 1 answer at a time is supported"));
    }
    if fields.count("best_of", 1, u64::MAX)?.is_some_and(|n| n != 1) {
        return Err(ApiError::field("best_of", "only 1 is supported"));
    }
    for name in UNSUPPORTED {
        let is_empty = |v: &Value| match v {
            Value::Array(a) => a.is_empty(),
            Value::Object(o) => o.is_empty(),
            Value::String(s) => s.is_empty(),
            _ => false,
        };
        if fields.get(name).is_some_and(|v| !is_empty(v)) {
            return Err(ApiError::field(name, "not supported"));
        }
    }
    for (name, off) in OFF {
        let Some(v) = fields.get(name) else { continue };
        if !v.as_f64().is_some_and(|x| off.contains(&x)) {
            let off = off.end();
            return Err(wrong(name, v, &format!("{off}, which is off: it is not supported")));
        }
    }
    if fields.bool("echo", false)? {
        return Err(ApiError::field("echo", "not supported"));
    }
    if let Some(format) = fields.get("response_format")
        && format.get("type").and_then(Value::as_str) != Some("text")
    {
        return Err(ApiError::field("response_format", "only the type text is supported"));
    }
    let stream = fields.bool("stream", false)?;
    let include_usage = match fields.get("stream_options") {
        None => false,
        Some(Value::Object(options)) => Fields(options).bool("include_usage", false)?,
        Some(v) => return Err(wrong("stream_options", v, "an object")),
    };
    let sampling = SamplerParams {
        temp: fields.number("temperature", defaults.temp, 0.0, 100.0)?,
        // -1 asks for all, as in llama.cpp and vLLM.
        top_k: match fields.get("top_k").and_then(Value::as_i64) {
            Some(-1) => 0,
            _ => fields.count("top_k", 0, 1 << 31)?.map_or(defaults.top_k, |n| n as usize),
        },
        top_p: fields.number("top_p", defaults.top_p, 0.0, 1.0)?,
        min_p: fields.number("min_p", defaults.min_p, 0.0, 1.0)?,
        // Zero would divide logits by it.
        repeat_penalty: fields.number("repeat_penalty", defaults.repeat_penalty, 1e-3, 100.0)?,
        frequency_penalty: fields.number("frequency_penalty", defaults.frequency_penalty, -100.0, 100.0)?,
        presence_penalty: fields.number("presence_penalty", defaults.presence_penalty, -100.0, 100.0)?,
        // -1 asks for all of the context, as in llama.cpp.
        repeat_last_n: match fields.get("repeat_last_n").and_then(Value::as_i64) {
            Some(-1) => usize::MAX,
            _ => fields.count("repeat_last_n", 0, 1 << 31)?.map_or(defaults.repeat_last_n, |n| n as usize),
        },
        seed: defaults.seed,
    };
    Ok(Generation {
        max_tokens: max_tokens(fields)?,
        sampling,
        // -1 asks for any, as in llama.cpp; other negative numbers are seeds like all.
        seed: match fields.get("seed").and_then(Value::as_i64).filter(|seed| *seed < 0) {
            Some(-1) => None,
            Some(seed) => Some(seed as u64),
            None => fields.count("seed", 0, u64::MAX)?,
        },
        stop: stop(fields)?,
        ignore_eos: fields.bool("ignore_eos", false)?,
        stream,
        include_usage,
        logprobs: logprobs(fields, chat)?,
    })
}

fn max_tokens(fields: &Fields<'_>) -> Result<Option<usize>, ApiError> {
    for name in ["max_completion_tokens", "max_tokens", "n_predict"] {
        // -1 asks for no limit, as in llama.cpp.
        if fields.get(name).and_then(Value::as_i64) == Some(-1) {
            return Ok(Some(usize::MAX));
        }
        if let Some(n) = fields.count(name, 1, 1 << 31)? {
            return Ok(Some(n as usize));
        }
    }
    Ok(None)
}

fn stop(fields: &Fields<'_>) -> Result<Vec<String>, ApiError> {
    let Some(v) = fields.get("stop") else { return Ok(Vec::new()) };
    let bad =
        || wrong("stop", v, &format!("a text or at most {MAX_STOPS}, each 1 to {MAX_STOP_BYTES} bytes"));
    let texts: Vec<String> = match v {
        Value::String(s) => Vec::from([s.clone()]),
        Value::Array(a) => {
            a.iter().map(|v| v.as_str().map(String::from)).collect::<Option<_>>().ok_or_else(bad)?
        }
        _ => return Err(bad()),
    };
    let fits = |s: &String| (1..=MAX_STOP_BYTES).contains(&s.len());
    if texts.len() <= MAX_STOPS && texts.iter().all(fits) { Ok(texts) } else { Err(bad()) }
}

/// A number for `/v1/completions`; for a chat a boolean, and a number beside it.
fn logprobs(fields: &Fields<'_>, chat: bool) -> Result<Option<usize>, ApiError> {
    let n = |name| Ok::<_, ApiError>(fields.count(name, 0, MAX_TOP_LOGPROBS)?.map(|n| n as usize));
    if !chat {
        return n("logprobs");
    }
    let top = n("top_logprobs")?;
    match fields.bool("logprobs", false)? {
        true => Ok(Some(top.unwrap_or(0))),
        false if top.is_some_and(|n| n > 0) => Err(ApiError::field("top_logprobs", "needs logprobs: true")),
        false => Ok(None),
    }
}

/// How vectors are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VectorEncoding {
    /// An array of numbers.
    Numbers,
    /// The numbers' f32, little-endian, in base64: what OpenAI's own client asks for unless told otherwise.
    Base64,
}

/// The `encoding_format` of `/v1/embeddings`.
pub fn vector_encoding(fields: &Fields<'_>) -> Result<VectorEncoding, ApiError> {
    match fields.get("encoding_format").map(|v| (v, v.as_str())) {
        None | Some((_, Some("float"))) => Ok(VectorEncoding::Numbers),
        Some((_, Some("base64"))) => Ok(VectorEncoding::Base64),
        Some((v, _)) => Err(wrong("encoding_format", v, "float or base64")),
    }
}

/// The inputs of `/v1/embeddings`.
pub fn inputs(fields: &Fields<'_>) -> Result<Vec<Prompt>, ApiError> {
    if fields.get("dimensions").is_some() {
        return Err(ApiError::field("dimensions", "not supported"));
    }
    let v = fields.required("input")?;
    let inputs = match v {
        Value::Array(a) if a.first().is_some_and(|v| !v.is_u64()) => {
            a.iter().map(|v| text_or_tokens("input", v)).collect::<Result<_, _>>()?
        }
        v => Vec::from([text_or_tokens("input", v)?]),
    };
    if inputs.len() > MAX_INPUTS {
        return Err(ApiError::field(
            "input",
            &format!("{} inputs, at most {MAX_INPUTS} are taken", inputs.len()),
        ));
    }
    Ok(inputs)
}

/// What `/tokenize` is asked.
pub struct Tokenize {
    /// The text.
    pub content: String,
    /// Add the tokens that the vocabulary wants at the ends.
    pub add_special: bool,
    /// Read names of special tokens in the text.
    pub parse_special: bool,
}

/// The fields of `/tokenize`, with llama-server's names and defaults.
pub fn tokenize(fields: &Fields<'_>) -> Result<Tokenize, ApiError> {
    let v = fields.required("content")?;
    Ok(Tokenize {
        content: v.as_str().ok_or_else(|| wrong("content", v, "a text"))?.into(),
        add_special: fields.bool("add_special", false)?,
        parse_special: fields.bool("parse_special", true)?,
    })
}

/// The tokens of `/detokenize`.
pub fn detokenize(fields: &Fields<'_>) -> Result<Vec<u32>, ApiError> {
    let v = fields.required("tokens")?;
    let array = v.as_array().ok_or_else(|| wrong("tokens", v, "an array of token ids"))?;
    array.iter().map(|v| token("tokens", v)).collect()
}
