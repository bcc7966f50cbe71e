//! Conversations: messages, the template that makes a prompt of them, and the prompt's tokens.

pub mod builtin;
pub mod template;
#[cfg(test)]
pub mod tests;

use std::collections::HashSet;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use engine::tokenizer::EncodeOptions;
use engine::{Model, Tokenizer};
use minijinja::Value;
use serde::{Deserialize, Serialize};
use server::chat::{SpecialTexts, encode_parts};

use crate::args::TemplateArgs;
use crate::ui;
use template::{Blocks, Template, strftime_now};

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `developer`, `user` or `assistant`.
    pub role: String,
    /// Its text.
    pub content: String,
}

impl Message {
    /// A message.
    pub fn new(role: &str, content: impl Into<String>) -> Message {
        Message { role: role.into(), content: content.into() }
    }

    fn value(&self) -> Value {
        Value::from_pairs([("role", self.role.as_str()), ("content", self.content.as_str())])
    }
}

/// Makes prompts of conversations.
pub struct Format {
    template: Template,
    /// Whether a system message's text gets into the prompt.
    takes_system: bool,
    /// Whether developer messages are not simply the system's.
    takes_developer: bool,
    /// What it is, for people.
    pub name: String,
}

impl Format {
    /// The format that flags and file say; a guess is said aloud.
    pub fn of(args: &TemplateArgs, model: &Model) -> Result<Format> {
        let read = |path: &PathBuf| std::fs::read_to_string(path).with_context(|| path.display().to_string());
        let from_file = args.chat_template_file.as_ref().map(read).transpose()?;
        let given = from_file.or_else(|| args.chat_template.clone());
        let own = model.meta().chat_template.as_deref();
        let format = Format::choose(given.as_deref(), own)?;
        if given.is_none() && own.is_none() {
            ui::say("this model has no chat template; chatml is a guess: choose with --chat-template");
        }
        ui::detail(format!("chat template: {}", format.name));
        Ok(format)
    }

    /// The format of a model: `--chat-template` (a built-in name or Jinja source) before the file's own.
    ///
    /// Without either the answer is chatml, and `name` says that it is a guess.
    pub fn choose(given: Option<&str>, of_file: Option<&str>) -> Result<Format> {
        if let Some(given) = given {
            if let Some(source) = builtin::source(given) {
                return Format::compile(&source, Blocks::Verbatim, format!("built-in {given}"));
            }
            if !given.contains("{%") && !given.contains("{{") {
                let names: Vec<_> = builtin::names().collect();
                bail!("unknown chat template '{given}'; built in are: {}", names.join(", "));
            }
            return Format::compile(given, Blocks::Trimmed, "the one given".into());
        }
        match of_file {
            Some(source) => Format::compile(source, Blocks::Trimmed, "the model's own".into()),
            None => {
                let source = builtin::source(FALLBACK).expect("a row of the table");
                Format::compile(&source, Blocks::Verbatim, format!("built-in {FALLBACK} (a guess)"))
            }
        }
    }

    fn compile(source: &str, blocks: Blocks, name: String) -> Result<Format> {
        let template = Template::new(source, blocks).with_context(|| format!("chat template ({name})"))?;
        // llama.cpp's mark of gpt-oss, whose template alone has words for them.
        let takes_developer = source.contains("<|channel|>");
        let mut format = Format { template, takes_system: true, takes_developer, name };
        // The built-in formats are llama.cpp's in this too.
        if blocks == Blocks::Trimmed {
            let probe = "\u{F8F0}";
            let asked = [Message::new("system", probe), Message::new("user", "x")];
            let text = format.render_with(&asked, true, "", "");
            format.takes_system = text.is_ok_and(|text| text.contains(probe));
        }
        Ok(format)
    }

    /// The text of a conversation, with what opens an answer if one is to follow.
    pub fn render(&self, messages: &[Message], answer: bool, tokenizer: &Tokenizer) -> Result<String> {
        let text = |id: Option<u32>| {
            id.map_or(String::new(), |id| String::from_utf8_lossy(tokenizer.token(id).0).into_owned())
        };
        self.render_with(messages, answer, &text(tokenizer.bos()), &text(tokenizer.eos()))
            .with_context(|| format!("chat template ({})", self.name))
    }

    /// Variables and repairs are llama.cpp's: models that may think do, there is a date, a developer speaks as the system
    /// does, and where a template knows no system message, its text opens the next message.
    fn render_with(&self, messages: &[Message], answer: bool, bos: &str, eos: &str) -> Result<String> {
        let mut messages = messages.to_vec();
        if !self.takes_developer {
            messages.iter_mut().filter(|m| m.role == "developer").for_each(|m| m.role = "system".into());
        }
        if !self.takes_system && messages.first().is_some_and(|m| m.role == "system") {
            let system = messages.remove(0);
            if let Some(next) = messages.first_mut() {
                next.content = format!("{}\n{}", system.content, next.content);
            }
        }
        let mut vars = vec![
            ("messages", messages.iter().map(Message::value).collect::<Vec<_>>().into()),
            ("bos_token", bos.into()),
            ("eos_token", eos.into()),
            ("enable_thinking", true.into()),
            ("datetime", Value::from(strftime_now("%b %d %Y")?)),
            ("date_string", Value::from(strftime_now("%d %b %Y")?)),
        ];
        if answer {
            vars.push(("add_generation_prompt", true.into()));
        }
        Ok(self.template.render(Value::from_pairs(vars))?)
    }

    /// The tokens of a conversation's prompt.
    ///
    /// Special tokens are those of the template only. Nearly always no message holds the text of one; then the whole
    /// prompt is encoded at once, as llama.cpp does. Otherwise each message is rendered between marks that no message
    /// contains, which tells the template's text from the messages'; special tokens are looked for in the former alone.
    pub fn encode(&self, messages: &[Message], answer: bool, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        let text = self.render(messages, answer, tokenizer)?;
        let text = without_bos(&text, tokenizer);
        let specials = SpecialTexts::new(tokenizer);
        if !messages.iter().any(|m| specials.are_in(&m.content)) {
            return Ok(tokenizer
                .encode(text.as_bytes(), EncodeOptions { add_special: true, parse_special: true })?);
        }
        let Some(foreign) = self.message_ranges(messages, answer, text, tokenizer)? else {
            bail!(
                "a message holds the text of a special token, and the chat template changes messages so that it cannot \
                 be told from the template's own; use another --chat-template"
            );
        };
        Ok(encode_parts(text, &foreign, &specials, tokenizer)?)
    }

    /// Where in `text` (the rendered conversation) messages lie; `None` if the template changes them beyond trimming.
    fn message_ranges(
        &self,
        messages: &[Message],
        answer: bool,
        text: &str,
        tokenizer: &Tokenizer,
    ) -> Result<Option<Vec<std::ops::Range<usize>>>> {
        let mark = mark_beside(messages.iter().map(|m| m.content.as_str()).chain([text]));
        let (open, close) = (format!("{mark}<"), format!("{mark}>"));
        for change in [|s: &str| s.to_owned(), |s: &str| s.trim().to_owned()] {
            let marked: Vec<Message> = messages
                .iter()
                .map(|m| Message::new(&m.role, format!("{open}{}{close}", change(&m.content))))
                .collect();
            let rendered = self.render(&marked, answer, tokenizer)?;
            let (mut plain, mut ranges, mut rest) = (String::new(), Vec::new(), rendered.as_str());
            while let Some((before, after)) = rest.split_once(&open) {
                let Some((content, after)) = after.split_once(&close) else { return Ok(None) };
                plain.push_str(before);
                ranges.push(plain.len()..plain.len() + content.len());
                plain.push_str(content);
                rest = after;
            }
            plain.push_str(rest);
            let stripped = without_bos(&plain, tokenizer);
            if stripped == text {
                // What was taken for the token may be the start of a message.
                let shift = plain.len() - stripped.len();
                let in_stripped =
                    |r: std::ops::Range<usize>| r.start.saturating_sub(shift)..r.end.saturating_sub(shift);
                return Ok(Some(ranges.into_iter().map(in_stripped).collect()));
            }
        }
        Ok(None)
    }
}

/// Private-use characters around the least number that none of the texts has between them. Each text is read once: who
/// writes many such numbers must not make us look for each.
fn mark_beside<'a>(texts: impl Iterator<Item = &'a str>) -> String {
    let number = |rest: &str| {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).take(10).count();
        rest[..digits].parse::<u32>().ok()
    };
    let used: HashSet<u32> =
        texts.flat_map(|text| text.split('\u{F8F0}').skip(1)).filter_map(number).collect();
    let free = (0..).find(|n| !used.contains(n)).unwrap_or(0);
    format!("\u{F8F0}{free}\u{F8F1}")
}

/// The built-in format for files without one.
const FALLBACK: &str = "chatml";

/// The text without the beginning-of-sequence token that the tokenizer adds by itself.
fn without_bos<'a>(text: &'a str, tokenizer: &Tokenizer) -> &'a str {
    let bos = tokenizer.bos().filter(|_| tokenizer.add_bos()).map(|id| tokenizer.token(id).0);
    bos.and_then(|bos| text.strip_prefix(std::str::from_utf8(bos).ok()?)).unwrap_or(text)
}
