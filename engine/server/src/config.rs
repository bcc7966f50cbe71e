//! What the host decides for a server: names, defaults and bounds.

use alloc::string::String;

use engine::sampler::SamplerParams;

/// What bounds clients.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Bytes of a request's head.
    pub head_bytes: usize,
    /// Bytes of a body.
    pub body_bytes: usize,
    /// Bytes that wait for a client that does not read; beyond, a stream is cut off and requests sent ahead wait.
    pub output_bytes: usize,
    /// Bytes of an answer that goes out whole: a completion ends there, vectors and tokens beyond are refused.
    pub answer_bytes: usize,
    /// Connections at a time.
    pub connections: usize,
    /// Requests that wait for a sequence.
    pub queue: usize,
    /// Time for a request to arrive whole.
    pub request_ms: u64,
    /// Time that a connection may lie idle between requests.
    pub idle_ms: u64,
    /// Time without progress while output waits.
    pub write_ms: u64,
    /// Time between comments that keep a silent stream alive.
    pub ping_ms: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            head_bytes: 16 << 10,
            // A prompt of 1M tokens of some 4 bytes, escaped.
            body_bytes: 8 << 20,
            output_bytes: 4 << 20,
            // 2048 texts' vectors of 768 numbers, or some 400,000 tokens with probabilities.
            answer_bytes: 32 << 20,
            connections: 512,
            queue: 256,
            request_ms: 30_000,
            idle_ms: 60_000,
            write_ms: 30_000,
            // Proxies give up after 30 to 60 s of silence.
            ping_ms: 20_000,
        }
    }
}

/// What the host decides.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Name of the model for clients.
    pub model_name: String,
    /// How to sample where the client does not say.
    pub sampling: SamplerParams,
    /// Seed of answers whose client names none: this one always, or another each time.
    pub seed: Option<u64>,
    /// Start of the seeds that are another each time.
    pub entropy: u64,
    /// Tokens of an answer where the client does not say; `None` = until the context is full.
    pub max_tokens: Option<usize>,
    /// Key that clients must show (`Authorization: Bearer`), except for `/health`.
    pub api_key: Option<String>,
    /// Seconds since 1970 when the host's clock said 0.
    pub epoch_s: u64,
    /// Bounds.
    pub limits: Limits,
}
