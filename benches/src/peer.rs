//! ggml's own benchmark, `test-backend-ops perf`, on the same device in the same run.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use crate::BenchError;
use crate::row::Row;

/// Runs it for the operations that rows name, and enters its times.
pub fn compare(program: &Path, rows: &mut [Row]) -> Result<(), BenchError> {
    let names: Vec<String> = rows.iter().filter_map(|row| row.peer.clone()).collect();
    let operations = by_operation(names.iter().map(String::as_str));
    for (operation, cases) in operations {
        let mut command = Command::new(program);
        // All of an operation's cases would take minutes.
        command.args(["perf", "-o", &operation, "-p", &filter(&cases)]);
        let output = command.output().map_err(BenchError::io(format!("start {}", program.display())))?;
        let text = String::from_utf8_lossy(&output.stdout);
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr);
            return Err(BenchError::Peer(format!("perf -o {operation}: {}: {stderr}", output.status)));
        }
        for row in rows.iter_mut() {
            if let Some(name) = row.peer.as_deref().filter(|name| name.starts_with(&format!("{operation}(")))
            {
                row.peer_ns = time_ns(&text, name);
            }
        }
    }
    Ok(())
}

/// What stands in the brackets of peers' names, by the operation before them.
fn by_operation<'a>(names: impl Iterator<Item = &'a str>) -> BTreeMap<String, BTreeSet<&'a str>> {
    let mut operations = BTreeMap::<String, BTreeSet<&str>>::new();
    for (operation, case) in names.filter_map(|name| name.split_once('(')) {
        operations.entry(operation.into()).or_default().insert(case.trim_end_matches(')'));
    }
    operations
}

/// The regular expression of cases that begin with one of these.
fn filter(cases: &BTreeSet<&str>) -> String {
    let literal = |case: &&str| {
        let escaped =
            |c: char| if c.is_alphanumeric() || "_=,".contains(c) { vec![c] } else { vec!['\\', c] };
        format!("^{}", case.chars().flat_map(escaped).collect::<String>())
    };
    cases.iter().map(literal).collect::<Vec<_>>().join("|")
}

/// The time in the line that starts with this name: `MUL_MAT(…): 5112 runs - 201.77 us/run - …`.
fn time_ns(text: &str, name: &str) -> Option<f64> {
    let line = text.lines().find(|line| plain(line).trim_start().starts_with(name))?;
    let us = line.split(" us/run").next()?.split_whitespace().next_back()?.parse::<f64>().ok()?;
    Some(us * 1e3)
}

/// A line without the terminal's colours.
fn plain(line: &str) -> String {
    let mut parts = line.split('\u{1b}');
    let first = parts.next().unwrap_or_default().to_string();
    parts.fold(first, |text, part| text + part.split_once('m').map_or("", |(_, rest)| rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peer_is_asked_for_the_rows_cases_alone() {
        let names = ["MUL_MAT(type_a=q4_0,n=1,", "ADD(ne=[4,1])", "MUL_MAT(type_a=q4_0,n=1,", "MUL_MAT(n=2)"];
        let operations = by_operation(names.into_iter());
        let filters: Vec<(&str, String)> =
            operations.iter().map(|(operation, cases)| (operation.as_str(), filter(cases))).collect();
        assert_eq!(filters, [("ADD", "^ne=\\[4,1\\]".into()), ("MUL_MAT", "^n=2|^type_a=q4_0,n=1,".into())]);
    }

    #[test]
    fn the_peers_lines_are_read() {
        let text = "Backend 1/2: CUDA0\n  \u{1b}[1;32mMUL_MAT\u{1b}[0m(type_a=q4_0,n=8):  10 runs -  33.50 us/run - x\n  MUL_MAT(type_a=q4_0,n=1,k=2):   5112 runs -   14.60 us/run - 117.44 MFLOP/run - 8.04 TFLOPS\n";
        assert_eq!(time_ns(text, "MUL_MAT(type_a=q4_0,n=1,"), Some(14600.0));
        assert_eq!(time_ns(text, "MUL_MAT(type_a=q4_0,n=8)"), Some(33500.0));
        assert_eq!(time_ns(text, "MUL_MAT(type_a=q8_0"), None);
    }
}
