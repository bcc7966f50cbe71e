//! Reads the output of `cargo test -- --show-output` and counts honestly.
//!
//! A test that cannot do its work prints a line `skipped: reason` and returns. libtest calls that a pass; here it is a
//! skip. A suite that dies without a result line (abort, signal) is a failure.

use std::collections::BTreeMap;

use crate::step::Counts;

/// How a skipping test begins its line.
const SKIPPED: &str = "skipped: ";

/// What all suites of a run did.
#[derive(Debug, Default)]
pub struct Tally {
    counts: Counts,
    /// How many tests gave each reason.
    reasons: BTreeMap<String, usize>,
    suite: Option<Suite>,
}

/// The suite whose output is being read.
#[derive(Debug, Default)]
struct Suite {
    lines: Vec<String>,
    /// The test whose captured output is being read, if it passed and has not skipped yet.
    passed_test: bool,
    in_failures: bool,
    skipped: usize,
}

/// The end of a suite.
#[derive(Debug, PartialEq, Eq)]
pub enum SuiteEnd {
    /// Its result line.
    Passed(String),
    /// Everything it printed.
    Failed(Vec<String>),
}

impl Tally {
    /// Takes one line of stdout; returns something when the line ends a suite.
    pub fn line(&mut self, line: &str) -> Option<SuiteEnd> {
        if line.starts_with("running ") && (line.ends_with(" tests") || line.ends_with(" test")) {
            let died = self.died();
            self.suite = Some(Suite::default());
            return died;
        }
        let suite = self.suite.as_mut()?;
        suite.lines.push(line.to_string());
        if line == "failures:" {
            suite.in_failures = true;
        } else if line.starts_with("---- ") {
            suite.passed_test = !suite.in_failures;
        } else if let (true, Some(reason)) = (suite.passed_test, line.strip_prefix(SKIPPED)) {
            suite.passed_test = false;
            suite.skipped += 1;
            *self.reasons.entry(reason.to_string()).or_default() += 1;
        } else if let Some(result) = line.strip_prefix("test result: ") {
            let counts = result_counts(result, suite.skipped);
            self.counts += counts;
            let lines = std::mem::take(&mut suite.lines);
            self.suite = None;
            return Some(if counts.failed == 0 {
                SuiteEnd::Passed(line.to_string())
            } else {
                SuiteEnd::Failed(lines)
            });
        }
        None
    }

    /// A suite that was begun and never reported: one failure.
    pub fn died(&mut self) -> Option<SuiteEnd> {
        let mut lines = self.suite.take()?.lines;
        lines.push("the suite died before its result line".into());
        self.counts.failed += 1;
        Some(SuiteEnd::Failed(lines))
    }

    /// The counts so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// `N tests: reason` for every reason to skip.
    pub fn skip_reasons(&self) -> impl Iterator<Item = String> + '_ {
        self.reasons.iter().map(|(reason, n)| format!("{n} skipped: {reason}"))
    }
}

/// Counts of `ok. 3 passed; 0 failed; 1 ignored; …`. A line that cannot be read counts as a failure.
fn result_counts(result: &str, skipped: usize) -> Counts {
    let number = |word: &str| {
        let before = result.split(';').find_map(|part| part.trim().strip_suffix(word))?;
        before.rsplit(' ').find(|part| !part.is_empty())?.parse::<usize>().ok()
    };
    match (number(" passed"), number(" failed"), number(" ignored")) {
        (Some(passed), Some(failed), Some(ignored)) if passed >= skipped => {
            Counts { passed: passed - skipped, failed, skipped: skipped + ignored }
        }
        _ => Counts { passed: 0, failed: 1, skipped },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(output: &str) -> (Tally, Vec<SuiteEnd>) {
        let mut tally = Tally::default();
        let mut ends: Vec<SuiteEnd> = output.lines().filter_map(|line| tally.line(line)).collect();
        ends.extend(tally.died());
        (tally, ends)
    }

    const MIXED: &str = "\nrunning 4 tests\ntest a ... ok\ntest b ... ok\ntest c ... FAILED\ntest d ... ignored\n\n\
        successes:\n\n---- b stdout ----\nskipped: no golden data\nskipped: again\n\nsuccesses:\n    a\n    b\n\n\
        failures:\n\n---- c stdout ----\nskipped: not really\n\nfailures:\n    c\n\n\
        test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s\n";

    #[test]
    fn a_skipping_test_is_no_pass_and_is_counted_once() {
        let (tally, ends) = tally(MIXED);
        assert_eq!(tally.counts(), Counts { passed: 1, failed: 1, skipped: 2 });
        assert_eq!(tally.skip_reasons().collect::<Vec<_>>(), ["1 skipped: no golden data"]);
        assert!(matches!(&ends[..], [SuiteEnd::Failed(_)]));
    }

    #[test]
    fn a_suite_without_a_result_is_a_failure() {
        let ok = "running 1 test\ntest a ... ok\n\ntest result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.0s\n";
        let (tally, ends) = tally(&format!("running 2 tests\ntest x ... ok\n{ok}running 1 test\n"));
        assert_eq!(tally.counts(), Counts { passed: 1, failed: 2, skipped: 0 });
        assert!(matches!(&ends[..], [SuiteEnd::Failed(_), SuiteEnd::Passed(_), SuiteEnd::Failed(_)]));
    }

    #[test]
    fn an_unreadable_result_is_a_failure() {
        assert_eq!(result_counts("ok. many passed", 0).failed, 1);
        assert_eq!(result_counts("ok. 1 passed; 0 failed; 0 ignored", 2).failed, 1);
    }
}
