//! A measured row, as text and as JSON.

use serde_json::{Value, json};

use crate::peaks::Peaks;
use crate::timing::Timing;

/// Below this rate a row is not bound by arithmetic, and its share of the tensor cores' peak says nothing.
const ARITHMETIC_PER_S: f64 = 20e12;

/// One case of one kernel.
#[derive(Clone, Debug)]
pub struct Row {
    /// Kernel.
    pub kernel: String,
    /// Case in words.
    pub label: String,
    /// Time of its launches.
    pub timing: Timing,
    /// Bytes it must move.
    pub bytes: u64,
    /// Operations it does.
    pub flops: u64,
    /// What the peer calls it.
    pub peer: Option<String>,
    /// The peer's time.
    pub peer_ns: Option<f64>,
}

impl Row {
    fn bytes_per_s(&self) -> f64 {
        self.bytes as f64 / self.timing.ns * 1e9
    }

    fn flops_per_s(&self) -> f64 {
        self.flops as f64 / self.timing.ns * 1e9
    }

    /// How many times as fast as the peer.
    pub fn ratio(&self) -> Option<f64> {
        self.peer_ns.map(|ns| ns / self.timing.ns)
    }

    /// One line under [`header`].
    pub fn text(&self, peaks: &Peaks) -> String {
        let flops = self.flops_per_s();
        let share = |peak: f64| {
            if flops < ARITHMETIC_PER_S { "-".into() } else { format!("{:.0}", 100.0 * flops / peak) }
        };
        let peer = self.peer_ns.map_or("-".into(), |ns| format!("{:.2}", ns / 1e3));
        let ratio = self.ratio().map_or("-".into(), |ratio| format!("{ratio:.2}"));
        format!(
            "{:<14} {:<72} {:>9.2} {:>8} {:>8.0} {:>5.0} {:>8.1} {:>4} {:>4} {:>4} {:>9} {:>6}",
            self.kernel,
            short(&self.label),
            self.timing.ns / 1e3,
            mib(self.bytes),
            self.bytes_per_s() / 1e9,
            100.0 * self.bytes_per_s() / peaks.copy_bytes_per_s,
            flops / 1e12,
            share(peaks.s8_per_s),
            share(peaks.f16_per_s),
            if self.timing.cold { "cold" } else { "warm" },
            peer,
            ratio,
        )
    }

    /// Everything.
    pub fn json(&self) -> Value {
        json!({
            "kernel": self.kernel,
            "case": self.label,
            "us": round(self.timing.ns / 1e3),
            "min_us": round(self.timing.min_ns / 1e3),
            "cold": self.timing.cold,
            "bytes": self.bytes,
            "flops": self.flops,
            "gbps": round(self.bytes_per_s() / 1e9),
            "tflops": round(self.flops_per_s() / 1e12),
            "peer": self.peer,
            "peer_us": self.peer_ns.map(|ns| round(ns / 1e3)),
            "ratio": self.ratio().map(round),
        })
    }
}

/// Names of the columns.
pub fn header() -> String {
    format!(
        "{:<14} {:<72} {:>9} {:>8} {:>8} {:>5} {:>8} {:>4} {:>4} {:>4} {:>9} {:>6}",
        "kernel", "case", "us", "MiB", "GB/s", "%copy", "TFLOP/s", "%s8", "%f16", "L2", "peer us", "ratio"
    )
}

/// `Case { n: 1, k: 2 }` as `n: 1, k: 2`.
fn short(label: &str) -> &str {
    label.strip_prefix("Case { ").and_then(|rest| rest.strip_suffix(" }")).unwrap_or(label)
}

fn mib(bytes: u64) -> String {
    format!("{:.2}", bytes as f64 / (1 << 20) as f64)
}

/// To a thousandth: what is beyond is noise.
pub(crate) fn round(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_and_shares_follow_from_time() {
        let timing = Timing { ns: 2000.0, min_ns: 1900.0, cold: true };
        let row = Row {
            kernel: "k".into(),
            label: "Case { n: 1 }".into(),
            timing,
            bytes: 4_000_000,
            flops: 400_000_000,
            peer: None,
            peer_ns: Some(3000.0),
        };
        let peaks = Peaks { copy_bytes_per_s: 4e12, s8_per_s: 1e15, f16_per_s: 5e14 };
        let words: Vec<String> = row.text(&peaks).split_whitespace().map(String::from).collect();
        assert_eq!(
            words,
            ["k", "n:", "1", "2.00", "3.81", "2000", "50", "200.0", "20", "40", "cold", "3.00", "1.50"]
        );
        assert_eq!(row.json()["gbps"], 2000.0);
    }
}
