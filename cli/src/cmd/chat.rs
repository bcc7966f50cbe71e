//! The chat of `run`: a prompt, answers as they come, history, slash commands.
//!
//! Ctrl-C stops an answer and keeps the chat; at the prompt it ends the process with status 130, Ctrl-D with 0. Each
//! turn renders the whole conversation; the cache keeps what did not change since the turn before.

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use engine::sampler::Sampler;
use rustyline::error::ReadlineError;
use rustyline::{Config, DefaultEditor};

use crate::args::{RunArgs, SamplingArgs};
use crate::chat::{Format, Message};
use crate::exit::Interrupted;
use crate::generate::{Limits, Session, Stop};
use crate::load::Loaded;
use crate::quantize::Temporary;
use crate::show::{self, Printer};
use crate::ui;

const HELP: &str = "\
/clear          forget the conversation
/system [TEXT]  set the system message (none without TEXT); forgets the conversation
/set NAME VALUE set temp, top-k, top-p, min-p, repeat-penalty, seed or predict
/show           what is set, and how full the context is
/save FILE      write the conversation as JSON
/load FILE      read one
/bye            leave (so does Ctrl-D)
\"\"\"             starts and ends text of several lines
";

/// Turns kept in the history file.
const HISTORY_LINES: usize = 1000;

struct Chat<'a> {
    args: &'a RunArgs,
    sampling: SamplingArgs,
    predict: i64,
    format: Format,
    messages: Vec<Message>,
    session: Session,
    loaded: LoadedFacts,
}

/// What stays of [`Loaded`] once the session owns the context.
struct LoadedFacts {
    model: std::sync::Arc<engine::Model>,
    load_ms: f64,
}

/// The chat.
pub fn run(args: &RunArgs, loaded: Loaded) -> Result<()> {
    let format = Format::of(&args.template, &loaded.model)?;
    let (n_ctx, facts) =
        (loaded.context.n_ctx(), LoadedFacts { model: loaded.model, load_ms: loaded.load_ms });
    let mut chat = Chat {
        args,
        sampling: args.sampling.clone(),
        predict: args.predict,
        format,
        messages: args.system.iter().map(|text| Message::new("system", text.as_str())).collect(),
        session: Session::new(loaded.context),
        loaded: facts,
    };
    ui::say(format!("context {n_ctx}; /? for help, /bye to leave"));
    let history = history_file();
    let config = Config::builder().max_history_size(HISTORY_LINES)?.bracketed_paste(true).build();
    let mut editor = DefaultEditor::with_config(config)?;
    if let Some(path) = &history {
        // A first run has none.
        let _ = editor.load_history(path);
    }
    let result = chat.turns(&mut editor);
    if let Some(path) = &history {
        let saved = path.parent().map_or(Ok(()), std::fs::create_dir_all);
        if let Err(e) = saved.map_err(anyhow::Error::from).and_then(|()| Ok(editor.save_history(path)?)) {
            ui::detail(format!("history not saved to {}: {e}", path.display()));
        }
    }
    result
}

/// Where past prompts are kept: the XDG state folder; nowhere if `RUNIK_NOHISTORY` is set.
fn history_file() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|v| !v.is_empty());
    if set("RUNIK_NOHISTORY").is_some() {
        return None;
    }
    let state = set("XDG_STATE_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(std::env::home_dir()?.join(".local/state")))?;
    Some(state.join("runik/history"))
}

/// Reads a turn: a line, or several between `"""`. `None` at the end of input.
fn read_turn(editor: &mut DefaultEditor) -> Result<Option<String>> {
    let mut text = String::new();
    let mut open = false;
    loop {
        let line = match editor.readline(if open { "... " } else { ">>> " }) {
            Ok(line) => line,
            Err(ReadlineError::Interrupted) => return Err(Interrupted.into()),
            Err(ReadlineError::Eof) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let (line, marks) = (line.replace("\"\"\"", ""), line.matches("\"\"\"").count());
        text.push_str(&line);
        open ^= marks % 2 == 1;
        if !open {
            return Ok(Some(text));
        }
        text.push('\n');
    }
}

impl Chat<'_> {
    fn turns(&mut self, editor: &mut DefaultEditor) -> Result<()> {
        let interrupt = ui::watch_interrupts()?;
        while let Some(text) = read_turn(editor)? {
            let text = text.trim_end();
            if text.trim().is_empty() {
                continue;
            }
            // It only fails where lines are refused as duplicates.
            let _ = editor.add_history_entry(text);
            if text.trim() == "/bye" {
                return Ok(());
            }
            interrupt.store(false, Ordering::Relaxed);
            // A failed turn is no reason to lose the chat.
            let result = if text.starts_with('/') { self.command(text.trim()) } else { self.turn(text) };
            if let Err(e) = result {
                ui::error(&format!("{e:#}"));
            }
        }
        Ok(())
    }

    fn turn(&mut self, text: &str) -> Result<()> {
        self.messages.push(Message::new("user", text));
        let result = self.answer();
        if result.is_err() {
            self.messages.pop();
        }
        result
    }

    fn answer(&mut self) -> Result<()> {
        let since = Instant::now();
        let model = self.loaded.model.clone();
        let ids = self.format.encode(&self.messages, true, model.tokenizer())?;
        let n_ctx = self.session.n_ctx();
        if ids.len() >= n_ctx {
            bail!(
                "the conversation has {} tokens, the context {n_ctx}: /clear it, or start again with a larger -c",
                ids.len()
            );
        }
        let seed = self.sampling.seed();
        let mut sampler = Sampler::new(self.sampling.params(seed, n_ctx));
        let limits = Limits {
            n_predict: usize::try_from(self.predict).unwrap_or(usize::MAX),
            ignore_eos: self.args.ignore_eos,
            logprobs: false,
            interrupt: ui::watch_interrupts()?,
            since,
        };
        let mut printer = Printer::new(model.tokenizer(), true);
        let answer = self.session.answer(&ids, &mut sampler, &limits, |token| printer.push(token))?;
        let text = printer.finish()?;
        ui::out(if answer.stop == Stop::Interrupted { " [stopped]\n" } else { "\n" })?;
        show::say_stop(&answer, ids.len(), n_ctx);
        show::summary(&answer, self.loaded.load_ms, seed);
        self.messages.push(Message::new("assistant", text));
        Ok(())
    }

    fn forget(&mut self) {
        self.messages.retain(|m| m.role == "system");
        self.session.clear();
    }

    fn command(&mut self, line: &str) -> Result<()> {
        let (verb, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let rest = rest.trim();
        match verb {
            "/?" | "/help" => return ui::out(HELP),
            "/clear" => self.forget(),
            "/system" => {
                self.messages.clear();
                self.session.clear();
                if !rest.is_empty() {
                    self.messages.push(Message::new("system", rest));
                }
            }
            "/set" => return self.set(rest),
            "/show" => return self.show(),
            "/save" => self.save(rest)?,
            "/load" => self.load(rest)?,
            _ => bail!("unknown command {verb}; /? lists them"),
        }
        Ok(())
    }

    fn set(&mut self, rest: &str) -> Result<()> {
        let (name, value) = rest.split_once(char::is_whitespace).context("/set NAME VALUE")?;
        let value = value.trim();
        let float = || value.parse().ok().filter(|v: &f32| v.is_finite()).context("expected a number");
        let int = || value.parse::<i64>().ok().filter(|&v| v >= -1).context("expected a count or -1");
        match name {
            "temp" => self.sampling.temp = float()?,
            "top-k" => self.sampling.top_k = int()?,
            "top-p" => self.sampling.top_p = float()?,
            "min-p" => self.sampling.min_p = float()?,
            "repeat-penalty" => {
                self.sampling.repeat_penalty =
                    Some(float()?).filter(|&v| v > 0.0).context("expected a number above 0")?;
            }
            "seed" => self.sampling.seed = int()?,
            "predict" => self.predict = int()?,
            _ => bail!("unknown setting {name}; /? lists them"),
        }
        Ok(())
    }

    fn show(&self) -> Result<()> {
        let s = &self.sampling;
        let used = self
            .format
            .encode(&self.messages, false, self.loaded.model.tokenizer())
            .map_or(0, |ids| ids.len());
        let system = self.messages.iter().find(|m| m.role == "system").map_or("none", |m| m.content.as_str());
        ui::out(format!(
            "temp {} top-k {} top-p {} min-p {} repeat-penalty {} seed {} predict {}\n\
             template: {}\nsystem: {system}\n{} messages, {used} of {} tokens\n",
            s.temp,
            s.top_k,
            s.top_p,
            s.min_p,
            s.repeat_penalty,
            s.seed,
            self.predict,
            self.format.name,
            self.messages.len(),
            self.session.n_ctx(),
        ))
    }

    fn save(&self, file: &str) -> Result<()> {
        let path = file_name(file)?;
        let temporary = Temporary::beside(&path)?;
        serde_json::to_writer_pretty(&temporary.file, &self.messages)?;
        temporary.rename()
    }

    fn load(&mut self, file: &str) -> Result<()> {
        let path = file_name(file)?;
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        self.messages =
            serde_json::from_str(&text).with_context(|| format!("{}: a conversation", path.display()))?;
        self.session.clear();
        Ok(())
    }
}

fn file_name(text: &str) -> Result<PathBuf> {
    if text.is_empty() { bail!("a file name is missing") } else { Ok(PathBuf::from(text)) }
}
