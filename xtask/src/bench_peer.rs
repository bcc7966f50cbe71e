//! `cargo xtask bench-peer`: runik and llama.cpp on the same files, in turn.
//!
//! A round runs one engine, then the other, so that a machine that slows down slows both; what is reported is the
//! median over rounds of each round's ratio. Speeds are llama-bench's pp512 and tg128 (tokens per second). Time to
//! first token is a whole process on a warm page cache: load, then a prompt of ten tokens. runik's includes tokenizer
//! and sampling (`run`), llama.cpp's does not (`llama-bench` on ten tokens). Peak memory is of the same processes (`bench`
//! measures the machine's bandwidth on half a GiB of its own) and counts mapped file pages that were touched, for both.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::args;
use crate::error::TaskError;
use crate::peer::Peer;
use crate::process::{self, Measured};
use crate::workspace::{Workspace, cache_dir};

/// For `help`.
pub const ARGS: &str = "[--formats A,B] [--threads 1,2] [--rounds 3] [--bin DIR] [--models DIR]";
/// For `help`.
pub const HELP: &str = "runik beside llama.cpp: pp512, tg128, peak memory, time to first token";

/// llama-quantize's names. Q4_K is its M mix.
const FORMATS: &str = "Q4_0,Q4_1,Q8_0,Q4_K_M,IQ3_XXS,F16,F32";
const N_PROMPT: u64 = 512;
const N_GEN: u64 = 128;
/// Ten tokens in SmolLM2's vocabulary: it splits numbers into digits.
const TEN_TOKENS: &str = "1234567890";
/// Single runs of a tenth of a second scatter more than the long ones.
const TTFT_RUNS_PER_ROUND: usize = 3;

/// One engine's results over the rounds.
#[derive(Debug, Default)]
struct Samples {
    prefill_ts: Vec<f64>,
    decode_ts: Vec<f64>,
    ttft_ms: Vec<f64>,
    peak_rss_mib: Vec<f64>,
}

/// The two programs under test.
struct Engines {
    runik: PathBuf,
    llama_bench: PathBuf,
}

/// Runs all formats and thread counts and prints one Markdown table.
pub fn run(workspace: &Workspace, args: &[String]) -> Result<(), TaskError> {
    let names = ["--formats", "--threads", "--rounds", "--bin", "--models"];
    let [formats, threads, rounds, bin, models] = args::options("bench-peer", names, args)?;
    let formats = formats.unwrap_or_else(|| FORMATS.into());
    let threads =
        threads.as_deref().unwrap_or("1,2").split(',').map(positive).collect::<Result<Vec<_>, _>>()?;
    let rounds = positive(rounds.as_deref().unwrap_or("3"))?;
    let peer = Peer::locate(workspace, bin)?;
    let models = match models {
        Some(dir) => PathBuf::from(dir),
        None => cache_dir()?.join("bench"),
    };
    std::fs::create_dir_all(&models).map_err(TaskError::path("create", &models))?;
    process::run(workspace.cargo().args(["build", "--quiet", "--release", "-p", "cli", "--bin", "runik"]))?;
    let engines =
        Engines { runik: workspace.target().join("release/runik"), llama_bench: peer.program("llama-bench") };

    println!("runik against llama.cpp, medians of {rounds} rounds; ratio > 1 means runik is better.\n");
    println!("| format | threads | what | runik | llama.cpp | ratio | lowest | highest |");
    println!("|---|---:|---|---:|---:|---:|---:|---:|");
    let mut failed = 0;
    for format in formats.split(',') {
        for &threads in &threads {
            let model = peer.model(workspace, &models, format);
            match model.and_then(|model| engines.compare(&model, threads, rounds)) {
                Ok([ours, theirs]) => print_rows(format, threads, &ours, &theirs),
                Err(error) => {
                    failed += 1;
                    eprintln!("{format}, {threads} threads: {error}");
                    println!("| {format} | {threads} | failed | | | | | |");
                }
            }
        }
    }
    if failed == 0 { Ok(()) } else { Err(TaskError::Checks { failed }) }
}

fn positive(text: &str) -> Result<usize, TaskError> {
    match text.parse() {
        Ok(n) if n > 0 => Ok(n),
        _ => Err(TaskError::Usage { what: format!("expected a positive number, got {text:?}") }),
    }
}

impl Engines {
    /// runik's samples, then the peer's.
    fn compare(&self, model: &Path, threads: usize, rounds: usize) -> Result<[Samples; 2], TaskError> {
        let threads = threads.to_string();
        let (n_prompt, n_gen) = (N_PROMPT.to_string(), N_GEN.to_string());
        let load = ["-p", &n_prompt, "-n", &n_gen, "-r", "1", "-t", &threads, "-o", "json"];
        let mut ours = Samples::default();
        let mut theirs = Samples::default();
        for _ in 0..rounds {
            ours.add_speed(Command::new(&self.runik).arg("bench").arg(model).args(load))?;
            theirs.add_speed(Command::new(&self.llama_bench).arg("-m").arg(model).args(load))?;
            for _ in 0..TTFT_RUNS_PER_ROUND {
                let first = ["--raw", "-p", TEN_TOKENS, "-n", "1", "--temp", "0", "-t", &threads];
                ours.add_ttft(Command::new(&self.runik).arg("run").arg(model).args(first))?;
                let first = ["-p", "10", "-n", "0", "-r", "1", "--no-warmup", "-t", &threads, "-o", "json"];
                theirs.add_ttft(Command::new(&self.llama_bench).arg("-m").arg(model).args(first))?;
            }
        }
        Ok([ours, theirs])
    }
}

impl Samples {
    fn add_speed(&mut self, command: &mut Command) -> Result<(), TaskError> {
        let Measured { stdout, .. } = process::measure(command)?;
        let speed = |n_prompt, n_gen| {
            tokens_per_second(&stdout, n_prompt, n_gen)
                .map_err(|what| TaskError::Output { line: process::line(command), what })
        };
        self.prefill_ts.push(speed(N_PROMPT, 0)?);
        self.decode_ts.push(speed(0, N_GEN)?);
        Ok(())
    }

    fn add_ttft(&mut self, command: &mut Command) -> Result<(), TaskError> {
        let Measured { wall, peak_rss_bytes, .. } = process::measure(command)?;
        self.ttft_ms.push(wall.as_secs_f64() * 1e3);
        self.peak_rss_mib.extend(peak_rss_bytes.map(|bytes| bytes as f64 / f64::from(1 << 20)));
        Ok(())
    }
}

/// `avg_ts` of one test in llama-bench's JSON.
fn tokens_per_second(json: &str, n_prompt: u64, n_gen: u64) -> Result<f64, String> {
    let rows: Vec<serde_json::Value> = serde_json::from_str(json).map_err(|error| error.to_string())?;
    let row = rows.iter().find(|row| row["n_prompt"] == n_prompt && row["n_gen"] == n_gen);
    let row = row.ok_or_else(|| format!("no row with n_prompt {n_prompt} and n_gen {n_gen}"))?;
    row["avg_ts"].as_f64().filter(|ts| *ts > 0.0).ok_or_else(|| "avg_ts is no positive number".into())
}

/// One row per measure. `better`: the ratio's direction, so that more than 1 is always good for us.
fn print_rows(format: &str, threads: usize, ours: &Samples, theirs: &Samples) {
    let rows = [
        ("pp512 t/s", &ours.prefill_ts, &theirs.prefill_ts, false),
        ("tg128 t/s", &ours.decode_ts, &theirs.decode_ts, false),
        ("first token ms", &ours.ttft_ms, &theirs.ttft_ms, true),
        ("peak MiB", &ours.peak_rss_mib, &theirs.peak_rss_mib, true),
    ];
    for (what, ours, theirs, less_is_better) in rows {
        let pairs = ours.iter().zip(theirs);
        let mut ratios: Vec<f64> = pairs.map(|(a, b)| if less_is_better { b / a } else { a / b }).collect();
        let ratio = median(&mut ratios);
        let (Some(lowest), Some(highest)) = (ratios.first(), ratios.last()) else {
            println!("| {format} | {threads} | {what} | not measured here | | | | |");
            continue;
        };
        let (ours, theirs) = (median(&mut ours.clone()), median(&mut theirs.clone()));
        println!(
            "| {format} | {threads} | {what} | {ours:.1} | {theirs:.1} | {ratio:.2} | {lowest:.2} | {highest:.2} |"
        );
    }
}

/// Sorts the values; NaN for none.
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[n / 2],
        n => f64::midpoint(values[n / 2 - 1], values[n / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speed_is_read_from_the_row_asked_for() {
        let json = r#"[{"n_prompt":512,"n_gen":0,"avg_ts":10.5},{"n_prompt":0,"n_gen":128,"avg_ts":2.5}]"#;
        assert_eq!(tokens_per_second(json, 0, 128), Ok(2.5));
        assert!(tokens_per_second(json, 10, 0).is_err());
        assert!(tokens_per_second("not json", 512, 0).is_err());
        assert!(tokens_per_second(r#"[{"n_prompt":1,"n_gen":0,"avg_ts":0}]"#, 1, 0).is_err());
    }

    #[test]
    fn median_of_odd_even_and_none() {
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&mut [4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&mut []).is_nan());
    }
}
