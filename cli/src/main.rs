//! `runik`: run GGUF models from the terminal.
//!
//! Data goes to stdout and everything else to stderr; an error is one line. Exit status: 0 done, 1 failure, 2 usage,
//! 130 interrupted.
#![forbid(unsafe_code)]

mod args;
mod chat;
mod cmd;
mod compile;
mod device;
mod exit;
mod generate;
mod gpu;
mod hub;
mod load;
mod machine;
mod overrides;
mod quantize;
mod show;
mod text;
mod ui;

use std::process::ExitCode;
use std::time::Instant;

use args::Verb;

fn main() -> ExitCode {
    let started = Instant::now();
    let cli = match args::parse() {
        Ok(cli) => cli,
        Err(status) => return status,
    };
    ui::set_verbose(cli.verbose);
    let result = match cli.verb {
        Verb::Run(args) => cmd::run::run(&args, started),
        Verb::Serve(args) => cmd::serve::run(&args),
        Verb::Tokenize(args) => cmd::tokenize::tokenize(&args),
        Verb::Detokenize(args) => cmd::tokenize::detokenize(&args),
        Verb::Logits(args) => cmd::logits::run(&args),
        Verb::Perplexity(args) => cmd::perplexity::run(&args),
        Verb::Bench(args) => cmd::bench::run(&args),
        Verb::Inspect(args) => cmd::inspect::run(&args),
        Verb::Quantize(args) => cmd::quantize::run(&args),
        Verb::Pull(args) => cmd::pull::run(&args),
        Verb::Doctor(args) => cmd::doctor::run(&args),
        Verb::CompileKernels(args) => compile::run(&args),
        Verb::Completions { shell } => cmd::version::completions(shell),
        Verb::Version => cmd::version::version(),
    };
    exit::code(result)
}
