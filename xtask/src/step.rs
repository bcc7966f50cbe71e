//! Steps of a test run: what each did, how long it took, and the sums at the end.

use std::time::{Duration, Instant};

use crate::error::TaskError;

/// How many checks passed, failed and were skipped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub passed: usize,
    pub failed: usize,
    pub skipped: usize,
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, other: Counts) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

/// What a step reports: its counts and one line a reader wants to know.
#[derive(Debug)]
pub struct Outcome {
    pub counts: Counts,
    pub note: String,
}

impl Outcome {
    /// One check that holds.
    pub fn passed(note: impl Into<String>) -> Outcome {
        Outcome { counts: Counts { passed: 1, ..Counts::default() }, note: note.into() }
    }

    /// One check that could not be made, with the reason.
    pub fn skipped(reason: impl Into<String>) -> Outcome {
        let note = format!("skipped: {}", reason.into());
        Outcome { counts: Counts { skipped: 1, ..Counts::default() }, note }
    }
}

/// All steps of a run, in order.
#[derive(Debug, Default)]
pub struct Steps {
    rows: Vec<(&'static str, Outcome, Duration)>,
}

impl Steps {
    /// Runs one step; an error is one failed check, and the steps after it still run.
    pub fn step(&mut self, name: &'static str, run: impl FnOnce() -> Result<Outcome, TaskError>) {
        eprintln!("== {name}");
        let start = Instant::now();
        let outcome = run().unwrap_or_else(|error| Outcome {
            counts: Counts { failed: 1, ..Counts::default() },
            note: format!("FAILED: {error}"),
        });
        eprintln!("   {}", outcome.note);
        self.rows.push((name, outcome, start.elapsed()));
    }

    /// Prints the table and, as the last line, the sums.
    pub fn finish(self) -> Result<(), TaskError> {
        let mut total = Counts::default();
        println!("\n{:<12} {:>7} {:>7} {:>7} {:>8}", "step", "passed", "failed", "skipped", "seconds");
        for (name, Outcome { counts, note }, time) in &self.rows {
            let Counts { passed, failed, skipped } = counts;
            let seconds = time.as_secs_f64();
            println!("{name:<12} {passed:>7} {failed:>7} {skipped:>7} {seconds:>8.1}  {note}");
            total += *counts;
        }
        println!("\n{} passed, {} failed, {} skipped", total.passed, total.failed, total.skipped);
        if total.failed == 0 { Ok(()) } else { Err(TaskError::Checks { failed: total.failed }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_step_fails_the_run_and_the_next_still_runs() {
        let mut steps = Steps::default();
        let mut ran = false;
        steps.step("bad", || Err(TaskError::Checks { failed: 3 }));
        steps.step("good", || {
            ran = true;
            Ok(Outcome::passed(""))
        });
        assert!(ran);
        assert!(matches!(steps.finish(), Err(TaskError::Checks { failed: 1 })));
    }

    #[test]
    fn a_skip_does_not_fail_the_run() {
        let mut steps = Steps::default();
        steps.step("skip", || Ok(Outcome::skipped("no device")));
        assert!(steps.finish().is_ok());
    }
}
