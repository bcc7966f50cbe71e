//! The command line: every verb and flag, once.
//!
//! Each flag has a twin in the environment, `RUNIK_ARG_` and its long name in capitals ([`command`] adds them all); the
//! command line goes first. Flags of llama.cpp with one dash and several letters (`-ngl`) are spelled out before clap
//! sees them ([`expand`]), since clap knows only one-letter short flags.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::builder::BoolishValueParser;
use clap::{ArgAction, Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use engine::kv_cache::KV_FORMATS;
use engine::sampler::SamplerParams;
use quant::FormatId;
use regex_lite::Regex;

use crate::quantize::file_type::FileType;
use crate::{exit, ui};

/// Run GGUF models.
#[derive(Debug, Parser)]
#[command(name = "runik", version, about = "Run GGUF models", max_term_width = 100)]
pub struct Cli {
    /// Say more on stderr
    #[arg(short, long, global = true)]
    pub verbose: bool,
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Chat with a model, or answer one prompt
    Run(Box<RunArgs>),
    /// Serve a model over HTTP (OpenAI's API, llama-server's flags)
    Serve(Box<ServeArgs>),
    /// Text to token ids
    Tokenize(TokenizeArgs),
    /// Token ids to text
    Detokenize(DetokenizeArgs),
    /// Logits of every position, as f32 little-endian
    Logits(LogitsArgs),
    /// Perplexity of a text (llama-perplexity's definition)
    Perplexity(PerplexityArgs),
    /// Measure prefill and decode speed (llama-bench's columns)
    Bench(BenchArgs),
    /// What a file holds and how much memory it takes
    Inspect(InspectArgs),
    /// Make a file of other formats (llama-quantize's types and mixes)
    Quantize(QuantizeArgs),
    /// Fetch a model from Hugging Face into its cache
    Pull(PullArgs),
    /// What this machine offers, and what is amiss
    Doctor(DoctorArgs),
    /// Load kernels, so that the driver compiles them into its cache
    #[command(hide = true)]
    CompileKernels(CompileKernelsArgs),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Version and what is built in
    Version,
}

/// Arguments of `compile-kernels`.
#[derive(Args, Debug)]
pub struct CompileKernelsArgs {
    /// For which GPU, cuda:I
    #[arg(long, value_parser = Device::parse)]
    pub device: Device,
    /// Names of kernels
    pub entries: Vec<String>,
}

/// What all verbs that compute share.
#[derive(Args, Clone, Debug)]
pub struct EngineArgs {
    /// Positions of context; 0 = the model's own [default: the model's, at most 4096]
    #[arg(short = 'c', long, value_name = "N", value_parser = count)]
    pub ctx_size: Option<usize>,
    /// Tokens computed at once [default: 2048 with a GPU, else 512]
    #[arg(short = 'b', long, alias = "ubatch-size", value_name = "N", value_parser = count)]
    pub batch_size: Option<usize>,
    /// Threads [default: physical cores available]
    #[arg(short = 't', long, value_name = "N", value_parser = count)]
    pub threads: Option<usize>,
    #[command(flatten)]
    pub placement: PlacementArgs,
    /// Format of cached keys (-ctk)
    #[arg(long, value_name = "TYPE", default_value = "f16", value_parser = cache_type)]
    pub cache_type_k: FormatId,
    /// Format of cached values (-ctv)
    #[arg(long, value_name = "TYPE", default_value = "f16", value_parser = cache_type)]
    pub cache_type_v: FormatId,
}

/// What is computed where.
#[derive(Args, Clone, Debug)]
pub struct PlacementArgs {
    /// Where to compute: cpu, cuda, cuda:I, emu, or auto: a GPU if there is one. Several GPUs, cuda:0,cuda:1, share the
    /// layers
    #[arg(long, value_name = "DEVICE,…", default_value = "auto", value_delimiter = ',', value_parser = Device::parse)]
    pub device: Vec<Device>,
    /// Layers on the GPU: a number, auto or all (-ngl) [default: auto]
    #[arg(long, value_name = "N", allow_hyphen_values = true, value_parser = GpuLayers::parse)]
    pub gpu_layers: Option<GpuLayers>,
    #[command(flatten)]
    pub weights: WeightArgs,
    /// Fail unless a GPU computes
    #[arg(long)]
    pub require_gpu: bool,
}

/// Weights that are elsewhere than their layer, and who multiplies with those of the host.
#[derive(Args, Clone, Debug)]
pub struct WeightArgs {
    /// Device of tensors by their names, ffn_.*_exps=cpu, wherever their layer is (-ot); may be repeated, the first regex
    /// that matches counts
    #[arg(long, value_name = "RE=DEV,…", value_delimiter = ',', value_parser = tensor_device)]
    pub override_tensor: Vec<(Regex, Device)>,
    /// All experts' weights on the CPU (-cmoe)
    #[arg(long)]
    pub cpu_moe: bool,
    /// Experts' weights of the first N layers on the CPU (-ncmoe)
    #[arg(long, value_name = "N", value_parser = count)]
    pub n_cpu_moe: Option<usize>,
    /// Multiply prompts on the CPU too where weights are there, instead of bringing them to the GPU
    #[arg(long)]
    pub no_op_offload: bool,
}

/// Where text comes from.
#[derive(Args, Debug)]
pub struct TextArgs {
    /// The text
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    pub prompt: Option<OsString>,
    /// File with the text; - is stdin
    #[arg(short, long, value_name = "FILE", conflicts_with = "prompt")]
    pub file: Option<PathBuf>,
}

/// `run`.
#[derive(Args, Debug)]
pub struct RunArgs {
    /// Model file
    pub model: PathBuf,
    /// The prompt; without one (and with a terminal on stdin) a chat
    #[arg(value_name = "PROMPT", conflicts_with_all = ["prompt", "file"])]
    pub positional: Option<OsString>,
    #[command(flatten)]
    pub text: TextArgs,
    /// Tokens of the answer at most; -1 = until its end
    #[arg(short = 'n', long, value_name = "N", default_value = "-1", allow_negative_numbers = true, value_parser = limit)]
    pub predict: i64,
    #[command(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// System message (-sys)
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub system: Option<String>,
    /// No chat template: the prompt as it is, special tokens in it are read
    #[arg(long, conflicts_with_all = ["chat_template", "chat_template_file"])]
    pub raw: bool,
    #[command(flatten)]
    pub template: TemplateArgs,
    /// Generate past end-of-generation tokens
    #[arg(long)]
    pub ignore_eos: bool,
    /// One JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

/// How tokens are picked; llama.cpp's defaults.
#[derive(Args, Clone, Debug)]
pub struct SamplingArgs {
    /// Temperature; 0 = always the likeliest token
    #[arg(long, value_name = "T", default_value = "0.8", allow_negative_numbers = true, value_parser = finite)]
    pub temp: f32,
    /// Of the K likeliest; 0 = all
    #[arg(long, value_name = "K", default_value = "40", allow_negative_numbers = true, value_parser = limit)]
    pub top_k: i64,
    /// Of the likeliest that sum to P; 1 = all
    #[arg(long, value_name = "P", default_value = "0.95", value_parser = finite)]
    pub top_p: f32,
    /// Of those at least P times as likely as the likeliest; 0 = all
    #[arg(long, value_name = "P", default_value = "0.05", value_parser = finite)]
    pub min_p: f32,
    /// Penalty on recent tokens; 1 = none
    #[arg(long, value_name = "X", default_value = "1.0", value_parser = positive)]
    pub repeat_penalty: f32,
    /// How many tokens are recent; -1 = the whole context
    #[arg(long, value_name = "N", default_value = "64", allow_negative_numbers = true, value_parser = limit)]
    pub repeat_last_n: i64,
    /// Penalty for each time a recent token occurred
    #[arg(long, value_name = "X", default_value = "0", allow_negative_numbers = true, value_parser = finite)]
    pub frequency_penalty: f32,
    /// Penalty for recent tokens that occurred at all
    #[arg(long, value_name = "X", default_value = "0", allow_negative_numbers = true, value_parser = finite)]
    pub presence_penalty: f32,
    /// Seed; -1 = another each time
    #[arg(short, long, value_name = "N", default_value = "-1", allow_negative_numbers = true)]
    pub seed: i64,
}

impl SamplingArgs {
    /// The seed in use: any but -1 is taken as it is, -1 is another each time.
    pub fn seed(&self) -> u64 {
        match self.seed {
            -1 => entropy(),
            given => given as u64,
        }
    }

    /// What the sampler takes of the flags.
    pub fn params(&self, seed: u64, n_ctx: usize) -> SamplerParams {
        SamplerParams {
            temp: self.temp,
            top_k: usize::try_from(self.top_k).unwrap_or(0),
            top_p: self.top_p,
            min_p: self.min_p,
            repeat_penalty: self.repeat_penalty,
            frequency_penalty: self.frequency_penalty,
            presence_penalty: self.presence_penalty,
            repeat_last_n: usize::try_from(self.repeat_last_n).unwrap_or(n_ctx),
            seed,
        }
    }
}

/// 32 random bits.
pub fn entropy() -> u64 {
    // The standard library's hasher keys are random for each process.
    std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), 0u8) >> 32
}

/// What makes a prompt of a conversation, if not the model's own template.
#[derive(Args, Clone, Debug)]
pub struct TemplateArgs {
    /// Built-in template name or Jinja source
    #[arg(long, value_name = "NAME", allow_hyphen_values = true)]
    pub chat_template: Option<String>,
    /// File with a Jinja template
    #[arg(long, value_name = "FILE", conflicts_with = "chat_template")]
    pub chat_template_file: Option<PathBuf>,
}

/// `serve`.
#[derive(Args, Debug)]
pub struct ServeArgs {
    /// Model file
    pub model: PathBuf,
    /// Address to listen on
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    pub host: String,
    /// Port to listen on; 0 = a free one
    #[arg(long, value_name = "N", default_value = "8080")]
    pub port: u16,
    /// Requests answered at the same time (-np); each has the whole context of -c
    #[arg(long, value_name = "N", default_value = "4", value_parser = count)]
    pub parallel: usize,
    /// Tokens of an answer where the request does not say; -1 = until its end
    #[arg(short = 'n', long, value_name = "N", default_value = "-1", allow_negative_numbers = true, value_parser = limit)]
    pub predict: i64,
    /// Name of the model for clients [default: the file's name]
    #[arg(short, long, value_name = "NAME")]
    pub alias: Option<String>,
    /// Key that clients must send as a bearer token
    #[arg(long, value_name = "KEY")]
    pub api_key: Option<String>,
    /// Seconds that a client may take to send a request, or to read what waits for it
    #[arg(long, value_name = "N", default_value = "30", value_parser = clap::value_parser!(u64).range(1..))]
    pub timeout: u64,
    /// Compute embeddings too
    #[arg(long, alias = "embedding")]
    pub embeddings: bool,
    #[command(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    pub template: TemplateArgs,
}

/// `tokenize`.
#[derive(Args, Debug)]
pub struct TokenizeArgs {
    /// Model file
    pub model: PathBuf,
    #[command(flatten)]
    pub text: TextArgs,
    /// Read names of special tokens in the text as these tokens
    #[arg(long)]
    pub special: bool,
    /// Do not add the tokens that the vocabulary wants at the ends
    #[arg(long)]
    pub no_bos: bool,
    /// {"tokens":[…]} on stdout
    #[arg(long)]
    pub json: bool,
}

/// `detokenize`.
#[derive(Args, Debug)]
pub struct DetokenizeArgs {
    /// Model file
    pub model: PathBuf,
    /// Token ids
    #[arg(value_name = "ID,ID,…", value_delimiter = ',')]
    pub tokens: Vec<u32>,
    /// Leave special tokens out of the text
    #[arg(long)]
    pub no_special: bool,
}

/// `logits`.
#[derive(Args, Debug)]
pub struct LogitsArgs {
    /// Model file
    pub model: PathBuf,
    /// Token ids
    #[arg(long, value_name = "ID,ID,…", value_delimiter = ',', required = true)]
    pub tokens: Vec<u32>,
    /// Result: f32 little-endian, positions × vocabulary; - is stdout
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    #[command(flatten)]
    pub engine: EngineArgs,
}

/// `perplexity`.
#[derive(Args, Debug)]
pub struct PerplexityArgs {
    /// Model file
    pub model: PathBuf,
    #[command(flatten)]
    pub text: TextArgs,
    /// Chunks at most; -1 = all
    #[arg(long, value_name = "N", default_value = "-1", allow_negative_numbers = true, value_parser = limit)]
    pub chunks: i64,
    #[command(flatten)]
    pub engine: EngineArgs,
    /// One JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

/// `bench`.
#[derive(Args, Debug)]
pub struct BenchArgs {
    /// Model file
    pub model: PathBuf,
    /// Prompt lengths to measure
    #[arg(short = 'p', long, value_name = "N,N,…", default_value = "512", value_delimiter = ',', value_parser = count)]
    pub n_prompt: Vec<usize>,
    /// Answer lengths to measure
    #[arg(short = 'n', long, value_name = "N,N,…", default_value = "128", value_delimiter = ',', value_parser = count)]
    pub n_gen: Vec<usize>,
    /// Positions already in the context
    #[arg(short = 'd', long, value_name = "N,N,…", default_value = "0", value_delimiter = ',', value_parser = count)]
    pub n_depth: Vec<usize>,
    /// Sequences that answer at the same time, each from its own context
    #[arg(long, visible_alias = "np", value_name = "N,N,…", default_value = "1", value_delimiter = ',', value_parser = count)]
    pub parallel: Vec<usize>,
    /// Times each test runs, after one to warm up
    #[arg(short = 'r', long, value_name = "N", default_value = "5", value_parser = count)]
    pub repetitions: usize,
    /// Numbers of threads
    #[arg(short = 't', long, value_name = "N,N,…", value_delimiter = ',', value_parser = count)]
    pub threads: Vec<usize>,
    /// Tokens computed at once [default: 2048 with a GPU, else 512]
    #[arg(short = 'b', long, alias = "ubatch-size", value_name = "N", value_parser = count)]
    pub batch_size: Option<usize>,
    #[command(flatten)]
    pub placement: PlacementArgs,
    /// Format of cached keys (-ctk)
    #[arg(long, value_name = "TYPE", default_value = "f16", value_parser = cache_type)]
    pub cache_type_k: FormatId,
    /// Format of cached values (-ctv)
    #[arg(long, value_name = "TYPE", default_value = "f16", value_parser = cache_type)]
    pub cache_type_v: FormatId,
    /// Form of the result
    #[arg(short, long, value_enum, default_value = "md")]
    pub output: BenchOutput,
}

/// Forms of `bench`'s result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BenchOutput {
    /// A Markdown table
    Md,
    /// A JSON array
    Json,
    /// One JSON object a line
    Jsonl,
    /// Comma-separated values
    Csv,
}

/// `inspect`.
#[derive(Args, Debug)]
pub struct InspectArgs {
    /// Model file
    pub model: PathBuf,
    /// Context size for the memory plan; 0 = the model's own [default: the model's, at most 4096]
    #[arg(short = 'c', long, value_name = "N", value_parser = count)]
    pub ctx_size: Option<usize>,
    /// Show what would be on each device too: cpu, cuda, cuda:I, emu or auto, or several GPUs
    #[arg(long, value_name = "DEVICE,…", value_delimiter = ',', value_parser = Device::parse)]
    pub device: Vec<Device>,
    /// Layers on the GPU: a number, auto or all (-ngl) [default: auto]
    #[arg(long, value_name = "N", allow_hyphen_values = true, value_parser = GpuLayers::parse)]
    pub gpu_layers: Option<GpuLayers>,
    #[command(flatten)]
    pub weights: WeightArgs,
    /// Format of cached keys (-ctk)
    #[arg(long, value_name = "TYPE", default_value = "f16", value_parser = cache_type)]
    pub cache_type_k: FormatId,
    /// Format of cached values (-ctv)
    #[arg(long, value_name = "TYPE", default_value = "f16", value_parser = cache_type)]
    pub cache_type_v: FormatId,
    /// List every tensor
    #[arg(long)]
    pub tensors: bool,
    /// One JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

/// `quantize`.
#[derive(Args, Debug)]
pub struct QuantizeArgs {
    /// Model file
    pub input: PathBuf,
    /// File to make
    pub output: PathBuf,
    /// Type: Q4_K_M, Q8_0, IQ3_XXS, F16, …
    #[arg(value_name = "TYPE", value_parser = FileType::parse)]
    pub file_type: FileType,
    /// Threads [default: physical cores available]
    #[arg(value_name = "THREADS", value_parser = count)]
    pub threads: Option<usize>,
    /// Importance matrix, as llama-imatrix makes it
    #[arg(long, value_name = "FILE")]
    pub imatrix: Option<PathBuf>,
    /// One format for all tensors, no mix
    #[arg(long)]
    pub pure: bool,
    /// Quantise tensors that are quantised already
    #[arg(long)]
    pub allow_requantize: bool,
    /// Keep output.weight as it is
    #[arg(long)]
    pub leave_output_tensor: bool,
    /// Format of output.weight
    #[arg(long, value_name = "T", value_parser = format)]
    pub output_tensor_type: Option<FormatId>,
    /// Format of the token embedding
    #[arg(long, value_name = "T", value_parser = format)]
    pub token_embedding_type: Option<FormatId>,
    /// Format of tensors whose name matches; may be repeated, the first match counts
    #[arg(long, value_name = "REGEX=T", value_parser = tensor_type)]
    pub tensor_type: Vec<(Regex, FormatId)>,
    /// Write as many parts as the input has
    #[arg(long)]
    pub keep_split: bool,
}

/// `pull`.
#[derive(Args, Debug)]
pub struct PullArgs {
    /// `smollm2`, or a Hugging Face repository: `USER/NAME[:QUANT]`
    pub model: String,
    /// Name of the file, where the repository holds several
    #[arg(long, value_name = "FILE")]
    pub hf_file: Option<String>,
    /// Never touch the network: say where the file is, or fail
    #[arg(long)]
    pub offline: bool,
}

/// `doctor`.
#[derive(Args, Debug)]
pub struct DoctorArgs {
    /// One JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

/// Where to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// The first NVIDIA GPU, else the host processor.
    Auto,
    /// Host processor.
    Cpu,
    /// NVIDIA GPU of this index.
    Cuda(u32),
    /// The GPU back end on the emulator.
    Emu,
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Device::Auto => f.write_str("auto"),
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(index) => write!(f, "cuda:{index}"),
            Device::Emu => f.write_str("emu"),
        }
    }
}

impl Device {
    fn parse(text: &str) -> Result<Device, String> {
        match text.split_once(':') {
            None if text == "auto" => Ok(Device::Auto),
            None if text == "cpu" => Ok(Device::Cpu),
            None if text == "emu" => Ok(Device::Emu),
            None if text == "cuda" => Ok(Device::Cuda(0)),
            Some(("cuda", i)) => i.parse().map(Device::Cuda).map_err(|_| format!("'{i}' is no device index")),
            _ => Err("expected auto, cpu, cuda, cuda:I or emu".into()),
        }
    }
}

/// Layers on the GPU, as the user says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GpuLayers {
    /// As many as fit.
    Auto,
    /// All of them, or an error.
    All,
    /// The last so many; more than the model has is all, with embeddings and output.
    Last(usize),
}

impl GpuLayers {
    /// A number, auto or all.
    pub fn parse(text: &str) -> Result<GpuLayers, String> {
        match text {
            "auto" => Ok(GpuLayers::Auto),
            "all" => Ok(GpuLayers::All),
            // llama.cpp's -1.
            "-1" => Ok(GpuLayers::All),
            _ => text.parse().map(GpuLayers::Last).map_err(|_| "expected a number, auto or all".to_owned()),
        }
    }
}

/// A count: digits, and k, K, M or G for powers of 1024.
fn count(text: &str) -> Result<usize, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((i, 'k' | 'K')) => (&text[..i], 10),
        Some((i, 'm' | 'M')) => (&text[..i], 20),
        Some((i, 'g' | 'G')) => (&text[..i], 30),
        _ => (text, 0),
    };
    let n: usize = digits.parse().map_err(|_| "expected a count such as 512, 4k or 32K".to_owned())?;
    n.checked_mul(1 << shift).ok_or_else(|| "too large".to_owned())
}

/// A count or -1.
fn limit(text: &str) -> Result<i64, String> {
    if text == "-1" {
        return Ok(-1);
    }
    i64::try_from(count(text)?).map_err(|_| "too large".to_owned())
}

fn finite(text: &str) -> Result<f32, String> {
    text.parse().ok().filter(|v: &f32| v.is_finite()).ok_or_else(|| "expected a number".to_owned())
}

fn positive(text: &str) -> Result<f32, String> {
    finite(text).and_then(|v| if v > 0.0 { Ok(v) } else { Err("expected a number above 0".into()) })
}

fn format(text: &str) -> Result<FormatId, String> {
    FormatId::from_name(text).ok_or_else(|| {
        let names: Vec<_> = quant::table::FORMATS.iter().map(|row| row.name).collect();
        format!("unknown format '{text}'; known: {}", names.join(", "))
    })
}

/// A format that the engine's cache can have.
fn cache_type(text: &str) -> Result<FormatId, String> {
    FormatId::from_name(text).filter(|f| KV_FORMATS.contains(f)).ok_or_else(|| {
        let names: Vec<_> = KV_FORMATS.iter().map(|f| f.name().to_lowercase()).collect();
        format!("no cache format; known: {}", names.join(", "))
    })
}

fn tensor_type(text: &str) -> Result<(Regex, FormatId), String> {
    let (pattern, name) = text.rsplit_once('=').ok_or("expected REGEX=TYPE")?;
    // Names in files are lower case, and so are the patterns of llama-quantize.
    let pattern = Regex::new(&pattern.to_lowercase()).map_err(|e| format!("bad pattern: {e}"))?;
    Ok((pattern, format(name)?))
}

/// A pattern of names and a device; llama.cpp's names of devices (CPU, CUDA0) will do.
fn tensor_device(text: &str) -> Result<(Regex, Device), String> {
    let (pattern, name) = text.rsplit_once('=').ok_or("expected REGEX=DEVICE")?;
    let pattern = Regex::new(pattern).map_err(|e| format!("bad pattern: {e}"))?;
    let name = name.to_lowercase();
    let device = match name.strip_prefix("cuda") {
        Some(index) if index.starts_with(|c: char| c.is_ascii_digit()) => {
            Device::parse(&format!("cuda:{index}"))
        }
        _ => Device::parse(&name),
    };
    match device {
        Ok(Device::Auto) | Err(_) => Err(format!("'{name}' is no device: expected cpu, cuda, cuda:I or emu")),
        Ok(device) => Ok((pattern, device)),
    }
}

/// Flags of llama.cpp that clap cannot spell.
const LONG_SHORTS: &[(&str, &str)] = &[
    ("-ngl", "--gpu-layers"),
    ("-ot", "--override-tensor"),
    ("-cmoe", "--cpu-moe"),
    ("-ncmoe", "--n-cpu-moe"),
    ("-ctk", "--cache-type-k"),
    ("-ctv", "--cache-type-v"),
    ("-ub", "--batch-size"),
    ("-dev", "--device"),
    ("-sys", "--system"),
    ("-np", "--parallel"),
];

/// Spells out [`LONG_SHORTS`], up to `--`.
fn expand(args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut ended = false;
    args.map(|arg| {
        ended |= arg == "--";
        let long = LONG_SHORTS.iter().find(|(short, _)| arg == *short).filter(|_| !ended);
        long.map_or(arg, |(_, long)| (*long).into())
    })
    .collect()
}

/// The command with the environment twin of every flag.
pub fn command() -> clap::Command {
    let with_env = |arg: clap::Arg| {
        let Some(long) = arg.get_long().filter(|l| !matches!(*l, "help" | "version")) else { return arg };
        let name = format!("RUNIK_ARG_{}", long.replace('-', "_").to_uppercase());
        let arg = arg.env(name).hide_env(true);
        match arg.get_action() {
            ArgAction::SetTrue => arg.value_parser(BoolishValueParser::new()),
            _ => arg,
        }
    };
    Cli::command()
        .after_help("Every flag has a twin in the environment: --ctx-size is RUNIK_ARG_CTX_SIZE.")
        .mut_args(with_env)
        .mut_subcommands(move |verb| verb.mut_args(with_env))
}

/// The command line of this process, or the status to exit with. Help goes to stdout; what does not fit the grammar is
/// one line on stderr and status 2.
pub fn parse() -> Result<Cli, ExitCode> {
    let matches = command().try_get_matches_from(expand(std::env::args_os()));
    matches.and_then(|m| Cli::from_arg_matches(&m)).map_err(|e| {
        if !e.use_stderr() {
            // clap would say nothing of a stdout that takes no help.
            return exit::code(ui::out(e.to_string()));
        }
        // clap's first paragraph says what is wrong; the others repeat the usage.
        let text = e.to_string();
        let lines = text.lines().take_while(|l| !l.is_empty()).map(str::trim).collect::<Vec<_>>();
        ui::error(&format!("{}; see --help", lines.join(" ").trim_start_matches("error: ")));
        ExitCode::from(2)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn counts_take_suffixes() {
        assert_eq!(count("512"), Ok(512));
        assert_eq!(count("4k"), Ok(4096));
        assert_eq!(count("32K"), Ok(32768));
        assert_eq!(count("1M"), Ok(1 << 20));
        for bad in ["", "k", "-1", "1.5k", "x", "99999999999999999999", "99999999999999999G"] {
            assert!(count(bad).is_err(), "{bad}");
        }
        assert_eq!(limit("-1"), Ok(-1));
        assert!(limit("-2").is_err());
    }

    #[test]
    fn long_short_flags_expand_before_the_end_of_flags() {
        let args = ["runik", "run", "-ngl", "all", "--", "-ngl"].map(OsString::from);
        assert_eq!(
            expand(args.into_iter()),
            ["runik", "run", "--gpu-layers", "all", "--", "-ngl"].map(OsString::from)
        );
    }

    #[test]
    fn tensors_have_devices_by_pattern() {
        let device = |text: &str| tensor_device(text).map(|(pattern, device)| (pattern.to_string(), device));
        assert_eq!(device("exps=cpu"), Ok(("exps".to_owned(), Device::Cpu)));
        assert_eq!(device("a=b=CUDA12"), Ok(("a=b".to_owned(), Device::Cuda(12))));
        assert_eq!(device("x=cuda:1"), Ok(("x".to_owned(), Device::Cuda(1))));
        assert_eq!(device("x=cuda"), Ok(("x".to_owned(), Device::Cuda(0))));
        for bad in ["exps", "exps=", "exps=auto", "exps=tpu", "exps=cuda1x", "(=cpu"] {
            assert!(device(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn devices() {
        assert_eq!(Device::parse("cuda:3"), Ok(Device::Cuda(3)));
        assert_eq!(Device::parse("cpu"), Ok(Device::Cpu));
        for bad in ["gpu", "cuda:", "cuda:x", "cpu:0", ""] {
            assert!(Device::parse(bad).is_err(), "{bad}");
        }
    }
}
