//! `bench`: prefill and decode speed with llama-bench's tests, columns and JSON field names, so that results drop into
//! existing tables; added are GB/s of weights and cache and the share of the memory bandwidth measured at the start, and in
//! JSON and CSV how many processor cores were busy.
//!
//! A test `ppN` computes N random tokens at once, `tgN` computes N one by one; `@ dN` starts with N in the context; `× N`
//! is N sequences at once, a token of each per step, their tokens counted together.
//! Each test runs once to warm up and then `-r` times. Tokenising is not part of it; a step of `tgN` ends with the likeliest
//! token, as a greedy answer's does, but the next step takes a random one.

use std::cell::Cell;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use engine::sampler::Rng;
use engine::{Batch, Context, ContextParams, Model};
use serde_json::{Value, json};

use crate::args::{BenchArgs, BenchOutput};
use crate::device::Compute;
use crate::exit::usage;
use crate::load::{Files, context};
use crate::quantize::file_type::FileType;
use crate::{machine, ui};

/// One test.
struct Test {
    threads: usize,
    n_prompt: usize,
    n_gen: usize,
    n_depth: usize,
    n_parallel: usize,
}

impl Test {
    fn name(&self) -> String {
        let what =
            if self.n_prompt > 0 { format!("pp{}", self.n_prompt) } else { format!("tg{}", self.n_gen) };
        let what = if self.n_parallel > 1 { format!("{what} × {}", self.n_parallel) } else { what };
        if self.n_depth > 0 { format!("{what} @ d{}", self.n_depth) } else { what }
    }

    fn n_tokens(&self) -> usize {
        (self.n_prompt + self.n_gen) * self.n_parallel
    }

    /// Positions that a sequence takes.
    fn n_positions(&self) -> usize {
        self.n_depth + self.n_prompt + self.n_gen
    }
}

/// A test with its samples.
struct Measured {
    test: Test,
    backend: &'static str,
    samples: Vec<Duration>,
    /// Processor time of all threads over the time of the samples; `None` where the system does not say.
    cores: Option<f64>,
    /// Weights and cache that a run reads at least once.
    bytes: f64,
    at: String,
}

impl Measured {
    fn ns(&self) -> Vec<f64> {
        self.samples.iter().map(|d| d.as_nanos() as f64).collect()
    }

    fn per_second(&self) -> Vec<f64> {
        self.samples.iter().map(|d| self.test.n_tokens() as f64 / d.as_secs_f64()).collect()
    }

    fn gbps(&self) -> f64 {
        self.bytes / mean(&self.ns())
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Standard deviation of a sample; 0 for one value.
fn stddev(values: &[f64]) -> f64 {
    let m = mean(values);
    let squares: f64 = values.iter().map(|v| (v - m) * (v - m)).sum();
    if values.len() > 1 { (squares / (values.len() - 1) as f64).sqrt() } else { 0.0 }
}

/// `bench`.
pub fn run(args: &BenchArgs) -> Result<()> {
    let compute = Compute::choose(&args.placement)?;
    if args.repetitions == 0 {
        return Err(usage("-r 0: at least one repetition is needed"));
    }
    let threads = match &args.threads[..] {
        [] => vec![machine::threads(None)?],
        given => given.iter().map(|&n| machine::threads(Some(n))).collect::<Result<_>>()?,
    };
    let mut tests = Vec::new();
    for &threads in &threads {
        for &n_depth in &args.n_depth {
            for &n_parallel in args.parallel.iter().filter(|&&n| n > 0) {
                let one = |n_prompt, n_gen| Test { threads, n_prompt, n_gen, n_depth, n_parallel };
                tests.extend(args.n_prompt.iter().filter(|&&n| n > 0).map(|&n| one(n, 0)));
                tests.extend(args.n_gen.iter().filter(|&&n| n > 0).map(|&n| one(0, n)));
            }
        }
    }
    if tests.is_empty() {
        return Err(usage("nothing to measure: -p and -n, or --parallel, are 0"));
    }
    let files = Files::open(&args.model)?;
    files.read_ahead();
    files.warm_up(&compute);
    let model = Arc::new(files.model()?);
    compute.check(&model)?;
    let most = threads.iter().copied().max().unwrap_or(1);
    let (peak, how) = match compute.peak_bytes_per_s()? {
        Some(peak) => (peak, "copied on the GPU, read and written".to_owned()),
        None => (machine::read_bandwidth(most), format!("read with {most} thread(s)")),
    };
    ui::say(format!("memory bandwidth: {:.1} GB/s {how}, measured; % of peak is of this", peak / 1e9));

    let report = Report {
        args,
        model: &model,
        gpu: compute.gpu_name(),
        gpu_layers: compute.asked_layers(),
        n_batch: compute.batch_size(args.batch_size),
        peak,
        first_row: Cell::new(true),
    };
    report.begin()?;
    let n = tests.len();
    for (i, test) in tests.into_iter().enumerate() {
        let measured = measure(&model, args, &compute, test)?;
        report.row(&measured, i + 1 == n)?;
    }
    report.end()
}

fn measure(model: &Arc<Model>, args: &BenchArgs, compute: &Compute, test: Test) -> Result<Measured> {
    let params = ContextParams {
        n_ctx: test.n_positions(),
        n_seq: test.n_parallel,
        n_ubatch: compute.batch_size(args.batch_size),
        type_k: args.cache_type_k,
        type_v: args.cache_type_v,
        ..ContextParams::default()
    };
    let n_ubatch = params.n_ubatch;
    let (backend, mut context) = context(model, params, compute, test.threads)?;
    let at = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    let mut rng = Rng::new(1);
    let n_vocab = model.hparams().n_vocab as u64;
    let mut token = move || (rng.next_u64() % n_vocab) as u32;
    once(&mut context, &test, &mut token)?;
    let mut samples = Vec::with_capacity(args.repetitions);
    let mut busy = Some(Duration::ZERO);
    for _ in 0..args.repetitions {
        let sample = once(&mut context, &test, &mut token)?;
        samples.push(sample.time);
        busy = busy.zip(sample.busy).map(|(sum, one)| sum + one);
    }
    let cores = busy.map(|busy| busy.as_secs_f64() / samples.iter().sum::<Duration>().as_secs_f64());
    // Every step reads the weights; a decode step also reads the cache up to its position.
    let weights = step_bytes(model) as f64;
    let plan = context.memory_plan();
    let per_position = plan.kv_cache as f64 / (context.n_ctx() * test.n_parallel) as f64;
    let bytes = if test.n_prompt > 0 {
        weights * (test.n_prompt * test.n_parallel).div_ceil(n_ubatch) as f64
    } else {
        let positions = test.n_gen as f64 * (test.n_depth as f64 + (test.n_gen as f64 + 1.0) / 2.0);
        let passes = (test.n_gen * test.n_parallel.div_ceil(n_ubatch)) as f64;
        weights * passes + per_position * positions * test.n_parallel as f64
    };
    Ok(Measured { test, backend, samples, cores, bytes, at })
}

/// Bytes of weights that a step reads: all, but of a separate embedding table only rows.
fn step_bytes(model: &Model) -> usize {
    let weights = model.weights();
    let table = weights.id("output.weight").and(weights.id("token_embd.weight"));
    weights.total_bytes() - table.map_or(0, |id| weights.get(id).len_bytes())
}

/// What one run took.
struct Sample {
    time: Duration,
    /// Of the processor, all threads.
    busy: Option<Duration>,
}

/// A clock for a [`Sample`].
struct Clock {
    started: Instant,
    busy: Option<Duration>,
}

impl Clock {
    fn start() -> Clock {
        Clock { busy: machine::processor_time(), started: Instant::now() }
    }

    fn stop(self) -> Sample {
        let time = self.started.elapsed();
        let busy = machine::processor_time().zip(self.busy).map(|(now, then)| now.saturating_sub(then));
        Sample { time, busy }
    }
}

/// One run: fills the context to the depth, then times the test.
fn once(context: &mut Context, test: &Test, token: &mut impl FnMut() -> u32) -> Result<Sample> {
    for sequence in 0..test.n_parallel {
        context.truncate(sequence, 0);
    }
    let mut random = |n: usize| (0..n).map(|_| token()).collect::<Vec<_>>();
    let prompts = |n: usize, random: &mut dyn FnMut(usize) -> Vec<u32>| {
        let mut batch = Batch::default();
        for sequence in 0..test.n_parallel {
            let tokens = random(n);
            let (last, before) = tokens.split_last().expect("at least one token");
            batch.extend(sequence, before, false);
            batch.extend(sequence, &[*last], true);
        }
        batch
    };
    if test.n_depth > 0 {
        context.decode(&prompts(test.n_depth, &mut random))?;
    }
    if test.n_prompt > 0 {
        let batch = prompts(test.n_prompt, &mut random);
        let clock = Clock::start();
        context.decode(&batch)?;
        return Ok(clock.stop());
    }
    let tokens = random(test.n_tokens());
    let generates = context.model().hparams().causal;
    let mut batch = Batch::default();
    let clock = Clock::start();
    for tokens in tokens.chunks_exact(test.n_parallel) {
        batch.clear();
        for (sequence, token) in tokens.iter().enumerate() {
            batch.push_generated(sequence, *token);
        }
        // As a greedy answer is generated: where the backend can, it picks the tokens itself, and no logits travel.
        if generates {
            context.decode_greedy(&batch)?;
        } else {
            context.decode(&batch)?;
        }
    }
    Ok(clock.stop())
}

/// Writes rows as they come.
struct Report<'a> {
    args: &'a BenchArgs,
    model: &'a Model,
    /// Name of the GPU; empty on the CPU.
    gpu: String,
    /// Layers on GPUs; as in llama-bench, -1 for as many as fit.
    gpu_layers: i64,
    n_batch: usize,
    /// Bytes per second.
    peak: f64,
    /// Whether the CSV header is still to come.
    first_row: Cell<bool>,
}

/// Columns of the table: title, width, whether to the right.
const COLUMNS: [(&str, usize, bool); 9] = [
    ("model", 30, false),
    ("size", 10, true),
    ("params", 10, true),
    ("backend", 10, false),
    ("threads", 7, true),
    ("test", 15, true),
    ("t/s", 20, true),
    ("GB/s", 8, true),
    ("% of peak", 9, true),
];

fn table_row(cells: &[String]) -> String {
    let mut line = String::from("|");
    for (cell, (_, width, right)) in cells.iter().zip(COLUMNS) {
        let _ = if right { write!(line, " {cell:>width$} |") } else { write!(line, " {cell:<width$} |") };
    }
    line + "\n"
}

impl Report<'_> {
    fn begin(&self) -> Result<()> {
        match self.args.output {
            BenchOutput::Md => {
                let rule: Vec<String> = COLUMNS
                    .iter()
                    .map(
                        |(_, width, right)| {
                            if *right { "-".repeat(width - 1) + ":" } else { "-".repeat(*width) }
                        },
                    )
                    .collect();
                ui::out(table_row(&COLUMNS.map(|c| c.0.to_owned())) + &table_row(&rule))
            }
            BenchOutput::Json => ui::out("[\n"),
            BenchOutput::Jsonl | BenchOutput::Csv => Ok(()),
        }
    }

    fn row(&self, m: &Measured, last: bool) -> Result<()> {
        match self.args.output {
            BenchOutput::Md => {
                let (ts, weights) = (m.per_second(), self.model.weights());
                ui::out(table_row(&[
                    self.model_type(),
                    ui::bytes(weights.total_bytes() as u64),
                    format!("{:.2} M", weights.total_elems() as f64 / 1e6),
                    m.backend.to_uppercase(),
                    m.test.threads.to_string(),
                    m.test.name(),
                    format!("{:.2} ± {:.2}", mean(&ts), stddev(&ts)),
                    format!("{:.2}", m.gbps()),
                    format!("{:.1}", self.percent(m)),
                ]))
            }
            BenchOutput::Json => ui::out(format!("  {}{}\n", self.object(m), if last { "" } else { "," })),
            BenchOutput::Jsonl => ui::out(format!("{}\n", self.object(m))),
            BenchOutput::Csv => self.csv(m),
        }
    }

    fn end(&self) -> Result<()> {
        if self.args.output == BenchOutput::Json { ui::out("]\n") } else { Ok(()) }
    }

    fn percent(&self, m: &Measured) -> f64 {
        m.gbps() * 1e9 / self.peak * 100.0
    }

    fn model_type(&self) -> String {
        let params = self.model.weights().total_elems() as f64;
        let size =
            if params >= 1e9 { format!("{:.1}B", params / 1e9) } else { format!("{:.0}M", params / 1e6) };
        let file_type = self.model.meta().file_type.and_then(FileType::name_of).unwrap_or("unknown");
        format!("{} {size} {file_type}", self.model.arch_name())
    }

    fn object(&self, m: &Measured) -> Value {
        let (ns, ts) = (m.ns(), m.per_second());
        let weights = self.model.weights();
        json!({
            "build_commit": option_env!("RUNIK_COMMIT").unwrap_or("unknown"),
            "build_number": 0,
            "cpu_info": machine::cpu_name(),
            "gpu_info": self.gpu,
            "backends": m.backend.to_uppercase(),
            "model_filename": self.args.model.display().to_string(),
            "model_type": self.model_type(),
            "model_size": weights.total_bytes(),
            "model_n_params": weights.total_elems(),
            "n_batch": self.n_batch,
            "n_ubatch": self.n_batch,
            "n_threads": m.test.threads,
            "type_k": self.args.cache_type_k.name().to_lowercase(),
            "type_v": self.args.cache_type_v.name().to_lowercase(),
            "n_gpu_layers": self.gpu_layers,
            "flash_attn": 1,
            "embeddings": false,
            "n_prompt": m.test.n_prompt,
            "n_gen": m.test.n_gen,
            "n_depth": m.test.n_depth,
            "n_parallel": m.test.n_parallel,
            "test_time": m.at,
            "avg_ns": mean(&ns).round() as u64,
            "stddev_ns": stddev(&ns).round() as u64,
            "avg_ts": mean(&ts),
            "stddev_ts": stddev(&ts),
            "samples_ns": m.samples.iter().map(|d| d.as_nanos() as u64).collect::<Vec<_>>(),
            "samples_ts": ts,
            "gbps": m.gbps(),
            "peak_gbps": self.peak / 1e9,
            "pct_peak": self.percent(m),
            "cpu_cores": m.cores,
        })
    }

    fn csv(&self, m: &Measured) -> Result<()> {
        let object = self.object(m);
        let fields = object.as_object().context("an object")?;
        let flat = || fields.iter().filter(|(_, v)| !v.is_array());
        let text = |v: &Value| v.as_str().map_or_else(|| v.to_string(), str::to_owned).replace('"', "\"\"");
        if self.first_row.replace(false) {
            ui::out(flat().map(|(k, _)| k.as_str()).collect::<Vec<_>>().join(",") + "\n")?;
        }
        ui::out(flat().map(|(_, v)| format!("\"{}\"", text(v))).collect::<Vec<_>>().join(",") + "\n")
    }
}
