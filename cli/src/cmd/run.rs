//! `run`: one answer, or a chat.
//!
//! With a prompt (an argument, `-p`, `-f`, or stdin that is no terminal) one answer is streamed to stdout; `--json`
//! prints one object instead. Without one it is a chat (`chat.rs`). `--raw` takes the prompt as it is, with special
//! tokens read in it as llama-completion does; otherwise the model's chat template makes the prompt.

use std::time::Instant;

use anyhow::{Result, bail};
use engine::sampler::Sampler;
use engine::tokenizer::EncodeOptions;
use serde_json::json;

use crate::args::RunArgs;
use crate::chat::{Format, Message};
use crate::exit::{Interrupted, usage};
use crate::generate::{Limits, Session, Stop};
use crate::load::Loaded;
use crate::show::{self, Printer};
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

fn one_answer(args: &RunArgs, loaded: Loaded, prompt: &[u8], started: Instant) -> Result<()> {
    let model = loaded.model.clone();
    let tokenizer = model.tokenizer();
    let ids = if args.raw {
        tokenizer.encode(prompt, EncodeOptions { add_special: true, parse_special: true })?
    } else {
        let system = args.system.iter().map(|text| Message::new("system", text.as_str()));
        let user = Message::new("user", String::from_utf8_lossy(prompt));
        Format::of(&args.template, &model)?.encode(
            &system.chain([user]).collect::<Vec<_>>(),
            true,
            tokenizer,
        )?
    };
    let seed = args.sampling.seed();
    let (load_ms, n_ctx) = (loaded.load_ms, loaded.context.n_ctx());
    let mut sampler = Sampler::new(args.sampling.params(seed, n_ctx));
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
    show::say_stop(&answer, ids.len(), n_ctx);
    show::summary(&answer, load_ms, seed);
    if answer.stop == Stop::Interrupted { Err(Interrupted.into()) } else { Ok(()) }
}
