//! Counters, in Prometheus' text form. Names follow llama-server's and vLLM's, with our prefix.

use alloc::string::String;
use core::fmt::Write;

/// What is counted since the start.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Metrics {
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub predicted_tokens: u64,
    pub steps: u64,
    pub step_ms: u64,
    pub requests: u64,
    pub errors: u64,
    pub cancelled: u64,
    pub first_token_ms: u64,
    pub first_tokens: u64,
    pub latency_ms: u64,
    pub completed: u64,
}

/// Values of the moment.
pub(crate) struct Gauges {
    pub active: usize,
    pub queued: usize,
    pub connections: usize,
    pub kv_usage: f64,
}

impl Metrics {
    pub fn text(&self, now: &Gauges) -> String {
        let mut out = String::new();
        let mut row = |kind: &str, name: &str, help: &str, value: f64| {
            // Writing to a string cannot fail.
            let _ =
                write!(out, "# HELP runik:{name} {help}\n# TYPE runik:{name} {kind}\nrunik:{name} {value}\n");
        };
        row("counter", "prompt_tokens_total", "Prompt tokens computed.", self.prompt_tokens as f64);
        row(
            "counter",
            "cache_hit_tokens_total",
            "Prompt tokens found in the cache.",
            self.cached_tokens as f64,
        );
        row("counter", "tokens_predicted_total", "Tokens generated.", self.predicted_tokens as f64);
        row("counter", "decode_total", "Batches run.", self.steps as f64);
        row("counter", "decode_seconds_total", "Time in batches.", self.step_ms as f64 / 1e3);
        row("counter", "requests_total", "Requests read.", self.requests as f64);
        row("counter", "request_errors_total", "Requests answered with an error.", self.errors as f64);
        row("counter", "requests_cancelled_total", "Answers whose client went away.", self.cancelled as f64);
        row("gauge", "requests_processing", "Answers under way.", now.active as f64);
        row("gauge", "requests_deferred", "Requests that wait.", now.queued as f64);
        row("gauge", "connections", "Open connections.", now.connections as f64);
        row("gauge", "kv_cache_usage_ratio", "Positions of the cache in use.", now.kv_usage);
        let mut summary = |name: &str, help: &str, sum_ms: u64, count: u64| {
            let _ = write!(
                out,
                "# HELP runik:{name} {help}\n# TYPE runik:{name} summary\nrunik:{name}_sum {}\nrunik:{name}_count {count}\n",
                sum_ms as f64 / 1e3
            );
        };
        let (ttft, e2e) = ("time_to_first_token_seconds", "e2e_request_latency_seconds");
        summary(ttft, "From request to first token.", self.first_token_ms, self.first_tokens);
        summary(e2e, "From request to the answer's end.", self.latency_ms, self.completed);
        out
    }
}
