//! What a broker did, as text for Prometheus.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counters of one broker. Written by its only thread of work, read by whoever reports.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Doorbells.
    pub submissions: AtomicU64,
    /// Commands.
    pub commands: AtomicU64,
    /// Commands that failed.
    pub failures: AtomicU64,
    /// Kernel launches, not counting those within graphs.
    pub launches: AtomicU64,
    /// Bytes to the device.
    pub written_bytes: AtomicU64,
    /// Bytes from the device.
    pub read_bytes: AtomicU64,
    /// Device memory that the guest has.
    pub allocated_bytes: AtomicU64,
    /// Time in submissions.
    pub busy_ns: AtomicU64,
}

impl Metrics {
    /// Adds to a counter.
    pub fn add(counter: &AtomicU64, n: u64) {
        counter.fetch_add(n, Ordering::Relaxed);
    }
}

impl fmt::Display for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows = [
            ("submissions_total", "counter", "Doorbells.", &self.submissions),
            ("commands_total", "counter", "Commands.", &self.commands),
            ("failures_total", "counter", "Commands that failed.", &self.failures),
            ("launches_total", "counter", "Kernel launches outside graphs.", &self.launches),
            ("written_bytes_total", "counter", "Bytes copied to the device.", &self.written_bytes),
            ("read_bytes_total", "counter", "Bytes copied from the device.", &self.read_bytes),
            ("allocated_bytes", "gauge", "Memory that the guest has.", &self.allocated_bytes),
            ("busy_nanoseconds_total", "counter", "Time spent in submissions.", &self.busy_ns),
        ];
        for (name, kind, help, value) in rows {
            let value = value.load(Ordering::Relaxed);
            writeln!(f, "# HELP runik_gpu_host_{name} {help}\n# TYPE runik_gpu_host_{name} {kind}")?;
            writeln!(f, "runik_gpu_host_{name} {value}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_has_a_value_for_each_name() {
        let metrics = Metrics::default();
        Metrics::add(&metrics.launches, 3);
        let text = metrics.to_string();
        assert!(text.contains("\nrunik_gpu_host_launches_total 3\n"), "{text}");
        assert_eq!(text.lines().filter(|line| !line.starts_with('#')).count(), 8);
    }
}
