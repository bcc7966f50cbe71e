//! Errors of the API, in OpenAI's shape: `{"error": {"message", "type", "code", "param"}}`.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use serde_json::{Value, json};

/// What a client gets instead of an answer.
#[derive(Clone, Debug, PartialEq)]
pub struct ApiError {
    /// HTTP status.
    pub status: u16,
    /// What was wrong, where, what was expected.
    pub message: String,
    /// The field of the request that is at fault.
    pub param: Option<String>,
    /// Further fields of the error object: counts.
    pub counts: Vec<(&'static str, usize)>,
    /// Value of an `Allow` header.
    pub allow: Option<&'static str>,
}

impl ApiError {
    /// An error without details.
    pub fn new(status: u16, message: impl Into<String>) -> ApiError {
        ApiError { status, message: message.into(), param: None, counts: Vec::new(), allow: None }
    }

    /// 400 for a field of the request.
    pub fn field(name: &str, problem: &str) -> ApiError {
        ApiError { param: Some(name.into()), ..ApiError::new(400, format!("'{name}': {problem}")) }
    }

    /// 400 for a prompt that leaves no room for an answer.
    pub fn too_long(n_prompt: usize, n_ctx: usize) -> ApiError {
        let message = format!(
            "the prompt has {n_prompt} tokens, the context {n_ctx}: nothing is left for an answer; shorten it, or start \
             the server with a larger -c"
        );
        let counts = Vec::from([("n_prompt_tokens", n_prompt), ("n_ctx", n_ctx)]);
        ApiError { counts, ..ApiError::new(400, message) }
    }

    /// The word for the kind of error, after llama-server's.
    fn kind(&self) -> &'static str {
        match self.status {
            400 if !self.counts.is_empty() => "exceed_context_size_error",
            404 => "not_found_error",
            429 => "rate_limit_error",
            500 => "server_error",
            501 => "not_supported_error",
            503 => "unavailable_error",
            _ => "invalid_request_error",
        }
    }

    /// The body.
    pub fn json(&self) -> Value {
        let mut error = json!({
            "message": self.message,
            "type": self.kind(),
            "code": self.status,
            "param": self.param,
        });
        for &(name, n) in &self.counts {
            error[name] = n.into();
        }
        json!({ "error": error })
    }
}
