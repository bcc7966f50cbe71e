//! `run`: one answer, or a chat.
//!
//! With a prompt (an argument, `-p`, `-f`, or stdin that is no terminal) one answer is streamed to stdout; `--json`
//! prints one object instead. Without one it is a chat (`chat.rs`). `--raw` takes the prompt as it is, with special
//! tokens read in it as llama-completion does; otherwise the model's chat template makes the prompt.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use engine::sampler::{Sampler, SamplerParams};
use engine::tokenizer::EncodeOptions;
use engine::{Model, Tokenizer};
use serde_json::json;

use crate::args::{RunArgs, SamplingArgs};
use crate::chat::{Format, Message};
use crate::exit::{Interrupted, usage};
use crate::generate::{Answer, Limits, Session, Stop};
use crate::load::Loaded;
use crate::text::{bytes_of, utf8};
use crate::ui;

/// `run`; `started` is when the process began.
pub fn run(args: &RunArgs, started: Instant) -> Result<()> {
    let prompt = match &args.positional {
        Some(text) => Some(bytes_of(text)),
        None => args.text.read()?,
    };
    if prompt.is_none() && (args.json || args.raw) {
        return Err(usage(
            "no prompt: --json and --raw answer one prompt; give it as PROMPT, -p, -f or on stdin",
        ));
    }
    if prompt.as_ref().is_some_and(Vec::is_empty) {
        return Err(usage("the prompt is empty"));
    }
    let prompt = match prompt {
        // Chat messages are text; say so before the model is loaded.
        Some(bytes) if !args.raw => Some(utf8(bytes, "the prompt")?.into_bytes()),
        other => other,
    };
    let loaded = args.engine.open(&args.model, None)?;
    if !loaded.model.hparams().causal {
        bail!(
            "{}: {} is a model for embeddings, it generates no text",
            args.model.display(),
            loaded.model.arch_name()
        );
    }
    match prompt {
        Some(prompt) => one_answer(args, loaded, &prompt, started),
        None => super::chat::run(args, loaded),
    }
}

/// The chat format that flags and file say; a guess is said aloud.
pub fn format(args: &RunArgs, model: &Model) -> Result<Format> {
    choose_format(args.chat_template.as_deref(), args.chat_template_file.as_deref(), model)
}

/// The chat format: a file's, a name's or a text's, else the model's own.
pub fn choose_format(given: Option<&str>, file: Option<&Path>, model: &Model) -> Result<Format> {
    let from_file =
        file.map(|path| std::fs::read_to_string(path).with_context(|| path.display().to_string()));
    let given = from_file.transpose()?.or_else(|| given.map(String::from));
    let own = model.meta().chat_template.as_deref();
    let format = Format::choose(given.as_deref(), own)?;
    if given.is_none() && own.is_none() {
        ui::say("this model has no chat template; chatml is a guess: choose with --chat-template");
    }
    ui::detail(format!("chat template: {}", format.name));
    Ok(format)
}

fn one_answer(args: &RunArgs, loaded: Loaded, prompt: &[u8], started: Instant) -> Result<()> {
    let model = loaded.model.clone();
    let tokenizer = model.tokenizer();
    let ids = if args.raw {
        tokenizer.encode(prompt, EncodeOptions { add_special: true, parse_special: true })?
    } else {
        let system = args.system.iter().map(|text| Message::new("system", text.as_str()));
        let user = Message::new("user", String::from_utf8_lossy(prompt));
        format(args, &model)?.encode(&system.chain([user]).collect::<Vec<_>>(), true, tokenizer)?
    };
    let seed = seed(&args.sampling);
    let (load_ms, n_ctx) = (loaded.load_ms, loaded.context.n_ctx());
    let mut sampler = Sampler::new(params(&args.sampling, seed, n_ctx));
    let mut session = Session::new(loaded.context);
    let limits = Limits {
        n_predict: usize::try_from(args.predict).unwrap_or(usize::MAX),
        ignore_eos: args.ignore_eos,
        logprobs: args.json,
        interrupt: ui::watch_interrupts()?,
        since: started,
    };
    let mut printer = Printer::new(tokenizer, !args.json);
    let answer = session.answer(&ids, &mut sampler, &limits, |token| printer.push(token))?;
    let text = printer.finish()?;
    if args.json {
        ui::json(&json!({
            "prompt_tokens": ids,
            "tokens": answer.tokens,
            "text": text,
            "logprobs": answer.logprobs,
            "stop_reason": answer.stop.name(),
            "seed": seed,
            "timings": {
                "load_ms": load_ms,
                "prompt_n": answer.prompt_n,
                "prompt_ms": answer.prompt_ms,
                "prompt_per_second": answer.prompt_per_second(),
                "ttft_ms": answer.ttft_ms,
                "predicted_n": answer.tokens.len(),
                "predicted_ms": answer.predicted_ms,
                "predicted_per_second": answer.predicted_per_second(),
            },
        }))?;
    } else {
        ui::out("\n")?;
    }
    say_stop(&answer, ids.len(), n_ctx);
    summary(&answer, load_ms, seed);
    if answer.stop == Stop::Interrupted { Err(Interrupted.into()) } else { Ok(()) }
}

/// Says when an answer ended for want of room.
pub fn say_stop(answer: &Answer, n_prompt: usize, n_ctx: usize) {
    if answer.stop == Stop::Context {
        let n = answer.tokens.len();
        ui::say(format!(
            "the context is full: {n_prompt} tokens of prompt and {n} of answer fill its {n_ctx} positions; raise it with -c"
        ));
    }
}

/// Timings, for `--verbose`.
pub fn summary(answer: &Answer, load_ms: f64, seed: u64) {
    ui::detail(format!(
        "load {load_ms:.0} ms; prompt {} tokens in {:.0} ms ({:.1} t/s); first token after {:.0} ms; \
         answer {} tokens in {:.0} ms ({:.1} t/s); seed {seed}",
        answer.prompt_n,
        answer.prompt_ms,
        answer.prompt_per_second(),
        answer.ttft_ms,
        answer.tokens.len(),
        answer.predicted_ms,
        answer.predicted_per_second(),
    ));
}

/// The seed in use: any but -1 is taken as it is, -1 is another each time.
pub fn seed(args: &SamplingArgs) -> u64 {
    match args.seed {
        // The standard library's hasher keys are random for each process.
        -1 => std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), 0u8) >> 32,
        given => given as u64,
    }
}

/// What the sampler takes of the flags.
pub fn params(args: &SamplingArgs, seed: u64, n_ctx: usize) -> SamplerParams {
    SamplerParams {
        temp: args.temp,
        top_k: usize::try_from(args.top_k).unwrap_or(0),
        top_p: args.top_p,
        min_p: args.min_p,
        repeat_penalty: args.repeat_penalty,
        frequency_penalty: args.frequency_penalty,
        presence_penalty: args.presence_penalty,
        repeat_last_n: usize::try_from(args.repeat_last_n).unwrap_or(n_ctx),
        seed,
    }
}

/// Collects an answer's text and prints whole characters as they come.
pub struct Printer<'t> {
    stream: engine::tokenizer::StreamDecoder<'t>,
    text: String,
    print: bool,
    /// Foreign text must not steer the terminal.
    escape: bool,
}

impl<'t> Printer<'t> {
    /// Prints if `print`; collects anyway.
    pub fn new(tokenizer: &'t Tokenizer, print: bool) -> Printer<'t> {
        let escape = std::io::stdout().is_terminal();
        Printer { stream: tokenizer.stream(false), text: String::new(), print, escape }
    }

    /// Takes a token.
    pub fn push(&mut self, token: u32) -> Result<()> {
        let new = self.stream.push(token).to_owned();
        self.emit(&new)
    }

    /// What is left; the whole text.
    pub fn finish(mut self) -> Result<String> {
        let rest = self.stream.finish().to_owned();
        self.emit(&rest)?;
        Ok(self.text)
    }

    fn emit(&mut self, new: &str) -> Result<()> {
        self.text.push_str(new);
        if !self.print || new.is_empty() {
            return Ok(());
        }
        let harmless = |c: char| !c.is_control() || c == '\n' || c == '\t';
        let shown: String = new.chars().filter(|&c| !self.escape || harmless(c)).collect();
        let mut stdout = std::io::stdout().lock();
        stdout.write_all(shown.as_bytes())?;
        Ok(stdout.flush()?)
    }
}
