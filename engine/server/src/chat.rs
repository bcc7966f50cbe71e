//! Conversations as tokens: chat formats that need no template engine, and the rule that special tokens are never read
//! from what people say.
//!
//! The formats are those of llama.cpp's `llama_chat_builtin_templates` (`src/llama-chat.cpp`) that the engine's models
//! use, told apart as `llama_chat_detect_template` does by what a file's own template contains. Where that template says
//! more, such as a system message of its own, a format does not; whoever has a template engine gives the server that.

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::ops::Range;

use engine::Tokenizer;
use engine::tokenizer::{EncodeOptions, TokenAttr, TokenizerError};

use crate::server::{Message, Templates};

/// What comes before and behind a message.
type Around = (&'static str, &'static str);

/// How a conversation is written.
#[derive(Debug)]
pub struct ChatFormat {
    /// llama.cpp's name of it.
    pub name: &'static str,
    /// A template with all texts of one of these sets is of this format, unless of that of an earlier row.
    marks: &'static [&'static [&'static str]],
    /// Opens a turn: what comes before the first message, and before each that follows an answer.
    open: (&'static str, &'static str),
    system: Around,
    user: Around,
    assistant: Around,
    /// What the system says is put before the next user's message, with a blank line between.
    system_joins_user: bool,
    /// The roles whose messages lose the white space around them.
    trims: Trims,
    /// Opens an answer.
    answer: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trims {
    Nobody,
    Assistant,
    All,
}

/// What a row leaves out.
const PLAIN: ChatFormat = ChatFormat {
    name: "",
    marks: &[],
    open: ("", ""),
    system: ("", ""),
    user: ("", ""),
    assistant: ("", ""),
    system_joins_user: false,
    trims: Trims::Nobody,
    answer: "",
};

const LLAMA2: ChatFormat =
    ChatFormat { open: ("[INST] ", "[INST] "), user: ("", " [/INST]"), assistant: ("", "</s>"), ..PLAIN };

const LLAMA2_SYS: Around = ("<<SYS>>\n", "\n<</SYS>>\n\n");

/// All formats, those with more marks before those with fewer.
static FORMATS: &[ChatFormat] = &[
    ChatFormat {
        name: "phi4",
        marks: &[&["<|im_start|>", "<|im_sep|>"]],
        system: ("<|im_start|>system<|im_sep|>", "<|im_end|>"),
        user: ("<|im_start|>user<|im_sep|>", "<|im_end|>"),
        assistant: ("<|im_start|>assistant<|im_sep|>", "<|im_end|>"),
        answer: "<|im_start|>assistant<|im_sep|>",
        ..PLAIN
    },
    ChatFormat {
        name: "chatml",
        marks: &[&["<|im_start|>"]],
        system: ("<|im_start|>system\n", "<|im_end|>\n"),
        user: ("<|im_start|>user\n", "<|im_end|>\n"),
        assistant: ("<|im_start|>assistant\n", "<|im_end|>\n"),
        answer: "<|im_start|>assistant\n",
        ..PLAIN
    },
    ChatFormat {
        name: "mistral-v7",
        marks: &[&["[INST]", "[SYSTEM_PROMPT]"]],
        system: ("[SYSTEM_PROMPT] ", "[/SYSTEM_PROMPT]"),
        user: ("[INST] ", "[/INST]"),
        assistant: (" ", "</s>"),
        ..PLAIN
    },
    ChatFormat {
        name: "mistral-v1",
        marks: &[&["' [INST] ' + system_message"], &["[AVAILABLE_TOOLS]", " [INST]"]],
        open: (" [INST] ", " [INST] "),
        system: ("", "\n\n"),
        user: ("", " [/INST]"),
        assistant: (" ", "</s>"),
        ..PLAIN
    },
    ChatFormat {
        name: "mistral-v3-tekken",
        marks: &[&["[AVAILABLE_TOOLS]", "\"[INST]\""]],
        open: ("[INST]", "[INST]"),
        system: ("", "\n\n"),
        user: ("", "[/INST]"),
        assistant: ("", "</s>"),
        ..PLAIN
    },
    ChatFormat {
        name: "mistral-v3",
        marks: &[&["[AVAILABLE_TOOLS]", "[INST]"]],
        open: ("[INST] ", "[INST] "),
        system: ("", "\n\n"),
        user: ("", "[/INST]"),
        assistant: (" ", "</s>"),
        trims: Trims::Assistant,
        ..PLAIN
    },
    ChatFormat {
        name: "llama2-sys-strip",
        marks: &[&["[INST]", "content.strip()"]],
        system: LLAMA2_SYS,
        trims: Trims::All,
        ..LLAMA2
    },
    ChatFormat {
        name: "llama2-sys-bos",
        marks: &[&["[INST]", "bos_token + '[INST]"]],
        open: ("[INST] ", "<s>[INST] "),
        system: LLAMA2_SYS,
        ..LLAMA2
    },
    ChatFormat { name: "llama2-sys", marks: &[&["[INST]", "<<SYS>>"]], system: LLAMA2_SYS, ..LLAMA2 },
    ChatFormat { name: "llama2", marks: &[&["[INST]"]], system: ("", "\n"), ..LLAMA2 },
    ChatFormat {
        name: "phi3",
        marks: &[&["<|assistant|>", "<|end|>"]],
        system: ("<|system|>\n", "<|end|>\n"),
        user: ("<|user|>\n", "<|end|>\n"),
        assistant: ("<|assistant|>\n", "<|end|>\n"),
        answer: "<|assistant|>\n",
        ..PLAIN
    },
    ChatFormat {
        name: "gemma",
        marks: &[&["<start_of_turn>"]],
        user: ("<start_of_turn>user\n", "<end_of_turn>\n"),
        assistant: ("<start_of_turn>model\n", "<end_of_turn>\n"),
        system_joins_user: true,
        trims: Trims::All,
        answer: "<start_of_turn>model\n",
        ..PLAIN
    },
    ChatFormat {
        name: "llama3",
        marks: &[&["<|start_header_id|>", "<|end_header_id|>"]],
        system: ("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        user: ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        assistant: ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
        trims: Trims::All,
        answer: "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ..PLAIN
    },
    ChatFormat {
        name: "gpt-oss",
        marks: &[&["<|start|>", "<|channel|>"]],
        system: ("<|start|>system<|message|>", "<|end|>"),
        user: ("<|start|>user<|message|>", "<|end|>"),
        assistant: ("<|start|>assistant<|message|>", "<|return|>"),
        answer: "<|start|>assistant",
        ..PLAIN
    },
];

/// A conversation as text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// Where in it people speak.
    pub foreign: Vec<Range<usize>>,
}

impl ChatFormat {
    /// Names of all formats.
    pub fn names() -> impl Iterator<Item = &'static str> {
        FORMATS.iter().map(|format| format.name)
    }

    /// A format by its name.
    pub fn named(name: &str) -> Option<&'static ChatFormat> {
        FORMATS.iter().find(|format| format.name == name)
    }

    /// The format of a file's own template.
    pub fn detect(template: &str) -> Option<&'static ChatFormat> {
        let is = |marks: &&[&str]| marks.iter().all(|mark| template.contains(mark));
        FORMATS.iter().find(|format| format.marks.iter().any(is))
    }

    /// The text of a conversation, with what opens an answer. `Err`: a role that the format has no words for.
    pub fn render(&self, messages: &[Message]) -> Result<Rendered, String> {
        let mut out = Rendered::default();
        let mut system = Rendered::default();
        let mut open = false;
        for (i, message) in messages.iter().enumerate() {
            let role = message.role.as_str();
            let (around, trims) = match role {
                "system" | "developer" => (self.system, self.trims == Trims::All),
                "user" => (self.user, self.trims == Trims::All),
                "assistant" => (self.assistant, self.trims != Trims::Nobody),
                _ => {
                    return Err(format!(
                        "a message has the role '{role}'; the chat format {} knows system, user and assistant",
                        self.name
                    ));
                }
            };
            let content = if trims { message.content.trim() } else { &message.content };
            if self.system_joins_user && matches!(role, "system" | "developer") {
                system.say(content);
                continue;
            }
            if !open {
                out.text.push_str(if i == 0 { self.open.0 } else { self.open.1 });
            }
            open = role != "assistant";
            out.text.push_str(around.0);
            if role == "user" && !system.text.is_empty() {
                out.say(&core::mem::take(&mut system).text);
                out.text.push_str("\n\n");
            }
            out.say(content);
            out.text.push_str(around.1);
        }
        out.text.push_str(self.answer);
        Ok(out)
    }
}

impl Rendered {
    fn say(&mut self, content: &str) {
        let start = self.text.len();
        self.text.push_str(content);
        self.foreign.push(start..self.text.len());
    }
}

impl Templates for &ChatFormat {
    fn encode(&self, messages: &[Message], tokenizer: &Tokenizer) -> Result<Vec<u32>, String> {
        let Rendered { text, foreign } = self.render(messages)?;
        let specials = SpecialTexts::new(tokenizer);
        let ids = if messages.iter().any(|m| specials.are_in(&m.content)) {
            encode_parts(&text, &foreign, &specials, tokenizer)
        } else {
            tokenizer.encode(text.as_bytes(), EncodeOptions { add_special: true, parse_special: true })
        };
        ids.map_err(|error| error.to_string())
    }
}

/// Texts of all tokens that are found only where special tokens are asked for.
pub struct SpecialTexts {
    sorted: Vec<String>,
    /// Whether some text begins with this byte.
    begins: [bool; 256],
}

impl SpecialTexts {
    /// Those of a vocabulary.
    pub fn new(tokenizer: &Tokenizer) -> SpecialTexts {
        let special = TokenAttr::CONTROL.with(TokenAttr::UNKNOWN);
        let mut sorted: Vec<&str> = (0..tokenizer.n_vocab() as u32)
            .map(|id| tokenizer.token(id))
            .filter(|(text, attr)| attr.is_any(special) && !text.is_empty())
            .filter_map(|(text, _)| core::str::from_utf8(text).ok())
            .collect();
        sorted.sort_unstable();
        let sorted: Vec<String> = sorted.into_iter().map(ToOwned::to_owned).collect();
        let mut begins = [false; 256];
        sorted.iter().for_each(|text| begins[usize::from(text.as_bytes()[0])] = true);
        SpecialTexts { sorted, begins }
    }

    /// The longest that `text` begins with. What shares a beginning lies side by side, so each byte narrows a range: a
    /// vocabulary may have thousands of these, and a conversation millions of bytes.
    fn longest_at(&self, text: &[u8]) -> Option<&str> {
        if !text.first().is_some_and(|&byte| self.begins[usize::from(byte)]) {
            return None;
        }
        let (mut narrowed, mut longest) = (&self.sorted[..], None);
        for (depth, byte) in text.iter().enumerate() {
            let next = |s: &String| s.as_bytes().get(depth).copied();
            let start = narrowed.partition_point(|s| next(s) < Some(*byte));
            let end = narrowed.partition_point(|s| next(s) <= Some(*byte));
            narrowed = &narrowed[start..end];
            let Some(first) = narrowed.first() else { break };
            if first.len() == depth + 1 {
                longest = Some(first.as_str());
            }
        }
        longest
    }

    /// Whether what somebody says holds one of them.
    pub fn are_in(&self, content: &str) -> bool {
        (0..content.len()).any(|at| self.longest_at(&content.as_bytes()[at..]).is_some())
    }
}

/// Encodes text with special tokens found only outside the `foreign` ranges, which rise and do not overlap, and with those
/// that the vocabulary wants at the ends. Takes time in proportion to the text, whatever is in it.
pub fn encode_parts(
    text: &str,
    foreign: &[Range<usize>],
    specials: &SpecialTexts,
    tokenizer: &Tokenizer,
) -> Result<Vec<u32>, TokenizerError> {
    // What the vocabulary wants at the ends of the whole, not of a piece.
    let mut ids = tokenizer.encode(b"", EncodeOptions { add_special: true, parse_special: false })?;
    let n_first = match ids.len() {
        1 => usize::from(tokenizer.add_bos()),
        n => n / 2,
    };
    let last = ids.split_off(n_first);
    let mut flush = |piece: &str, parse_special: bool| -> Result<(), TokenizerError> {
        let options = EncodeOptions { add_special: false, parse_special };
        ids.extend(tokenizer.encode(piece.as_bytes(), options)?);
        Ok(())
    };
    let (mut start, mut at) = (0, 0);
    // A special token lies between two messages or beside one, never across an end of one.
    let end = text.len()..text.len();
    for message in foreign.iter().chain([&end]) {
        while at < message.start {
            match specials.longest_at(&text.as_bytes()[at..message.start]) {
                Some(special) => {
                    flush(&text[start..at], false)?;
                    flush(special, true)?;
                    at += special.len();
                    start = at;
                }
                None => at += 1,
            }
        }
        at = message.end;
    }
    flush(&text[start..], false)?;
    ids.extend(last);
    Ok(ids)
}
