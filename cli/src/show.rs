//! An answer as its reader sees it: text as it comes, and what is said of it afterwards.

use std::io::IsTerminal;

use anyhow::Result;
use engine::Tokenizer;

use crate::generate::{Answer, Stop};
use crate::ui;

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
        ui::out(shown)
    }
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
