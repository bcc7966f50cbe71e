//! Chat templates: Jinja as model files carry it, rendered by minijinja with what such templates expect of Python and
//! of llama.cpp's engine.
//!
//! Differences from plain minijinja, each one a shim below:
//! * `trim_blocks` and `lstrip_blocks` are on, as in every chat template engine;
//! * what `{{ }}` prints follows llama.cpp: `True`, nothing for `None` and for mappings, the items of a list one after
//!   the other, six decimals of a float. Python prints lists in brackets; no template can rely on both;
//! * `tojson` keeps key order, escapes no HTML, separates with `", "` and `": "`, and takes Python's arguments;
//! * what is missing or `None` adds nothing to a text (`'x' + y`), as in llama.cpp, where Jinja refuses;
//! * lists made in a template can be appended to, `{% generation %}` blocks count as plain blocks, `none|default(x)` is
//!   `x`, trimming is of ASCII white space, `strftime_now` and `raise_exception` exist.
//!
//! What llama.cpp's engine refuses (`//`, `**`, `raw`, `|sum` …) renders here as Jinja says.

use std::borrow::Cow;
use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use minijinja::machinery::{Token, tokenize};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Enumerator, Kwargs, Object, ObjectRepr, Rest, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, UndefinedBehavior};
use regex_lite::Regex;

/// Instructions and data ([`FUEL_BYTES`] each) a rendering may take: a template is part of a file from outside. Enough to
/// go some forty times through the longest conversation that a server takes (8 MiB).
const FUEL: u64 = 5_000_000;
/// Bytes that cost one unit of fuel.
const FUEL_BYTES: usize = 64;

/// Levels of lists and mappings in what a template keeps; conversations with tools have about ten. Whoever walks through a
/// value, minijinja included, calls itself at each level.
const MAX_DEPTH: usize = 64;

/// Longest source; the longest of published models have some 30 KB. An expression may nest as deep as it is long.
const MAX_SOURCE_BYTES: usize = 256 << 10;

/// A compiled template.
pub struct Template {
    env: Environment<'static>,
}

/// Whether a block tag takes the newline after it and the indentation before it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Blocks {
    /// As model files expect.
    Trimmed,
    /// Text as it stands.
    Verbatim,
}

impl Template {
    /// Compiles a template's source.
    pub fn new(source: &str, blocks: Blocks) -> Result<Template, Error> {
        if source.len() > MAX_SOURCE_BYTES {
            let what =
                format!("the template has {} bytes, at most {MAX_SOURCE_BYTES} are taken", source.len());
            return Err(Error::new(ErrorKind::SyntaxError, what));
        }
        let mut env = Environment::new();
        let trimmed = blocks == Blocks::Trimmed;
        let syntax = SyntaxConfig::builder().trim_blocks(trimmed).lstrip_blocks(trimmed).build()?;
        env.set_syntax(syntax.clone());
        env.set_undefined_behavior(UndefinedBehavior::Chainable);
        env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        env.set_fuel(Some(FUEL));
        env.set_formatter(|out, state, value| {
            let mut text = String::new();
            print(state, value, 0, &mut text)?;
            Ok(out.write_str(&text)?)
        });
        env.set_unknown_method_callback(method);
        env.add_filter(ADDED, added);
        env.add_filter(KEPT, kept);
        env.add_filter(STORED, stored);
        env.add_filter("d", default);
        env.add_filter("default", default);
        env.add_filter("dictsort", dictsort);
        env.add_filter("indent", indent);
        env.add_filter("string", string);
        env.add_filter("tojson", tojson);
        env.add_filter("trim", trim);
        env.add_test("sequence", is_sequence);
        env.add_function("mutable_list", mutable_list);
        env.add_function("raise_exception", raise_exception);
        env.add_function("strftime_now", strftime_now);
        // Python's spelling of the constants.
        env.add_global("True", true);
        env.add_global("False", false);
        env.add_global("None", ());
        let source = lenient_sums(&rewrite(source), syntax.clone());
        env.add_template_owned("chat", check_sets(&source, syntax))?;
        Ok(Template { env })
    }

    /// Renders with these variables.
    pub fn render(&self, vars: Value) -> Result<String, Error> {
        self.env.get_template("chat")?.render(vars)
    }
}

/// Makes what minijinja's language lacks into what it has: mutable lists and `generation` blocks.
fn rewrite(source: &str) -> String {
    let generation = Regex::new(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})").expect("a constant");
    let mut text: Cow<'_, str> = generation.replace_all(source, |c: &regex_lite::Captures<'_>| {
        let keyword = if c.get(2).is_some() { "endif" } else { "if true" };
        format!("{}{keyword}{}", &c[1], &c[3])
    });
    let mutates = [".append(", ".pop(", ".extend(", ".insert("].iter().any(|m| text.contains(m));
    if mutates {
        let set =
            Regex::new(r"(?s)(\{%[-+]?\s*set\s+[\w.]+\s*=\s*)(\[.*?\])(\s*[-+]?%\})").expect("a constant");
        let in_call = Regex::new(r"([(,]\s*\w+\s*=\s*)\[\s*\](\s*[,)])").expect("a constant");
        let with_set = set.replace_all(&text, "${1}mutable_list(${2})${3}").into_owned();
        text = Cow::Owned(in_call.replace_all(&with_set, "${1}mutable_list([])${2}").into_owned());
    }
    text.into_owned()
}

/// The filter that [`lenient_sums`] puts behind what is added.
const ADDED: &str = "__added";

/// An operand of `+`.
fn added(value: Value) -> Value {
    if value.is_undefined() || value.is_none() { Value::from("") } else { value }
}

/// Lets names on both sides of a `+` be missing, unless a filter or a test says what then.
fn lenient_sums(source: &str, syntax: SyntaxConfig) -> String {
    const KEYWORDS: &[&str] = &["and", "else", "if", "in", "is", "not", "or"];
    let tokens: Vec<_> = tokenize(source, false, syntax).map_while(Result::ok).collect();
    let is_name =
        |i: usize| matches!(tokens.get(i), Some((Token::Ident(name), _)) if !KEYWORDS.contains(name));
    let is_close = |token: &Token<'_>| matches!(token, Token::BracketClose | Token::ParenClose);
    // Where what opens at a token closes.
    let (mut closes, mut open) = (vec![0; tokens.len()], Vec::new());
    for (i, (token, _)) in tokens.iter().enumerate() {
        if matches!(token, Token::BracketOpen | Token::ParenOpen) {
            open.push(i);
        } else if is_close(token)
            && let Some(from) = open.pop()
        {
            closes[from] = i;
        }
    }
    let mut ends = Vec::new();
    for plus in (1..tokens.len()).filter(|i| matches!(tokens[*i].0, Token::Plus)) {
        if is_name(plus - 1) || is_close(&tokens[plus - 1].0) {
            ends.push(tokens[plus - 1].1.end_offset as usize);
        }
        if !is_name(plus + 1) {
            continue;
        }
        // The name with its attributes, items and arguments.
        let mut last = plus + 1;
        loop {
            last = match tokens.get(last + 1) {
                Some((Token::Dot, _)) if is_name(last + 2) => last + 2,
                Some((Token::BracketOpen | Token::ParenOpen, _)) if closes[last + 1] > 0 => closes[last + 1],
                _ => break,
            };
        }
        if !matches!(tokens.get(last + 1), Some((Token::Pipe | Token::Ident("is"), _))) {
            ends.push(tokens[last].1.end_offset as usize);
        }
    }
    ends.sort_unstable();
    ends.dedup();
    let (mut out, mut copied) = (String::with_capacity(source.len()), 0);
    for end in ends {
        out.push_str(&source[copied..end]);
        out.push('|');
        out.push_str(ADDED);
        copied = end;
    }
    out.push_str(&source[copied..]);
    out
}

/// Filters that [`check_sets`] puts behind what is assigned to a variable, and to a namespace.
const KEPT: &str = "__kept";
const STORED: &str = "__stored";

/// Lets every `set` check its value with [`place`]: without it values grow deeper from turn to turn of a loop, and a
/// namespace may come to hold itself. The tokens are minijinja's own, so nothing that it takes for a `set` is missed; the
/// tokenizer is no stable part of it.
fn check_sets(source: &str, syntax: SyntaxConfig) -> String {
    let mut out = String::with_capacity(source.len() + source.len() / 8);
    let mut copied = 0;
    let mut insert = |at: u32, text: &str| {
        let at = at as usize;
        out.push_str(&source[copied..at]);
        out.push_str(text);
        copied = at;
    };
    let mut tokens = tokenize(source, false, syntax).map_while(Result::ok);
    while let Some((token, _)) = tokens.next() {
        if !matches!(token, Token::BlockStart) || !matches!(tokens.next(), Some((Token::Ident("set"), _))) {
            continue;
        }
        let (mut is_attribute, mut end) = (false, None);
        for (token, span) in tokens.by_ref() {
            match token {
                Token::Dot if end.is_none() => is_attribute = true,
                Token::Assign if end.is_none() => {
                    insert(span.end_offset, "(");
                    end = Some(")|");
                }
                // A block of text, and what a filter makes of it.
                Token::Pipe if end.is_none() => end = Some("|"),
                Token::BlockEnd => {
                    let check = if is_attribute { STORED } else { KEPT };
                    if let Some(end) = end {
                        insert(span.start_offset, &format!("{end}{check} "));
                    }
                    break;
                }
                _ => {}
            }
        }
    }
    out.push_str(&source[copied..]);
    out
}

/// A value that a variable keeps.
fn kept(state: &State<'_, '_>, value: Value) -> Result<Value, Error> {
    place(state, &value, 0, false)?;
    Ok(value)
}

/// A value that a namespace keeps.
fn stored(state: &State<'_, '_>, value: Value) -> Result<Value, Error> {
    place(state, &value, 1, true)?;
    Ok(value)
}

fn too_deep() -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("a value nests deeper than {MAX_DEPTH} levels"))
}

/// Checks that a value that comes to lie `level` levels deep stays within [`MAX_DEPTH`], and tells the lists in it that
/// change how deep they lie now. `stores`: in something that changes, where a namespace might come to hold itself.
fn place(state: &State<'_, '_>, value: &Value, level: usize, stores: bool) -> Result<(), Error> {
    if !matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable | ValueKind::Map) {
        return Ok(());
    }
    state.consume_fuel(1)?;
    if level > MAX_DEPTH {
        return Err(too_deep());
    }
    if let Some(list) = value.downcast_object_ref::<MutableList>() {
        if list.level.fetch_max(level, Ordering::Relaxed) >= level {
            return Ok(());
        }
        let items = list.items().clone();
        return items.iter().try_for_each(|item| place(state, item, level + 1, stores));
    }
    // minijinja keeps its type to itself. What is in it was checked when it came there.
    if value.as_object().is_some_and(|object| object.type_name().ends_with("::Namespace")) {
        let what = "a namespace cannot be kept in a namespace or a list";
        return if stores { Err(Error::new(ErrorKind::InvalidOperation, what)) } else { Ok(()) };
    }
    let is_map = value.kind() == ValueKind::Map;
    for item in value.try_iter()? {
        place(state, &item, level + 1, stores)?;
        if is_map {
            place(state, &value.get_item(&item)?, level + 1, stores)?;
        }
    }
    Ok(())
}

/// Pays for a step that made so many bytes.
fn charge(state: &State<'_, '_>, bytes: usize) -> Result<(), Error> {
    state.consume_fuel(1 + (bytes / FUEL_BYTES) as u64)
}

/// Prints a value as llama.cpp's engine does.
fn print(state: &State<'_, '_>, value: &Value, level: usize, out: &mut String) -> Result<(), Error> {
    let before = out.len();
    match value.kind() {
        ValueKind::Undefined | ValueKind::None | ValueKind::Map => {}
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Seq | ValueKind::Iterable => {
            if level > MAX_DEPTH {
                return Err(too_deep());
            }
            state.consume_fuel(1)?;
            // What `dictsort` gives stands for a mapping, and mappings print nothing.
            if value.downcast_object_ref::<SortedItems>().is_none() {
                for item in value.try_iter()? {
                    print(state, &item, level + 1, out)?;
                }
            }
            return Ok(());
        }
        ValueKind::Number if !value.is_integer() => match f64::try_from(value.clone()) {
            Ok(number) => out.push_str(&float(number)),
            Err(_) => out.push_str(&value.to_string()),
        },
        _ => out.push_str(&value.to_string()),
    }
    charge(state, out.len() - before)
}

/// Six decimals, zeros at the end dropped but one kept.
fn float(value: f64) -> String {
    let mut text = format!("{value:.6}");
    if text.contains('.') {
        text.truncate(text.trim_end_matches('0').len());
        if text.ends_with('.') {
            text.push('0');
        }
    }
    text
}

const ASCII_SPACE: &[char] = &[' ', '\t', '\n', '\r', '\x0b', '\x0c'];

fn strip<'a>(text: &'a str, chars: Option<&str>, left: bool, right: bool) -> &'a str {
    // A set: a template may give as many as it likes.
    let given: HashSet<char> =
        chars.map_or_else(|| ASCII_SPACE.iter().copied().collect(), |c| c.chars().collect());
    let is_given = |c: char| given.contains(&c);
    let text = if left { text.trim_start_matches(is_given) } else { text };
    if right { text.trim_end_matches(is_given) } else { text }
}

/// Methods of Python's types: our own where llama.cpp differs, the rest minijinja-contrib's.
fn method(state: &mut State<'_, '_>, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if let (Some(text), "strip" | "lstrip" | "rstrip") = (value.as_str(), name) {
        let chars = args.first().and_then(Value::as_str);
        return Ok(strip(text, chars, name != "rstrip", name != "lstrip").into());
    }
    if let Some(text) = value.as_str() {
        let arg = args.first().and_then(Value::as_str);
        match (name, arg) {
            ("removeprefix", Some(prefix)) => return Ok(text.strip_prefix(prefix).unwrap_or(text).into()),
            ("removesuffix", Some(suffix)) => return Ok(text.strip_suffix(suffix).unwrap_or(text).into()),
            ("rsplit", None) => return Ok(text.split_whitespace().map(Value::from).collect()),
            ("rsplit", Some(separator)) if !separator.is_empty() => {
                let at_most =
                    args.get(1).and_then(Value::as_usize).map_or(usize::MAX, |n| n.saturating_add(1));
                let mut parts: Vec<Value> = text.rsplitn(at_most, separator).map(Value::from).collect();
                parts.reverse();
                return Ok(parts.into());
            }
            _ => {}
        }
    }
    if value.kind() == ValueKind::Map && name == "get" {
        // `None` where a default is missing, never undefined.
        let (key, default) = (args.first(), args.get(1).cloned().unwrap_or(Value::from(())));
        let found = key.map(|k| value.get_item(k)).transpose()?.filter(|v| !v.is_undefined());
        return Ok(found.unwrap_or(default));
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}

/// Python's strings and mappings are sequences to a template, as they are in llama.cpp's engine.
fn is_sequence(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::String | ValueKind::Iterable)
}

fn default(value: Value, other: Option<Value>, boolean: Option<bool>) -> Value {
    let missing = value.is_undefined() || value.is_none() || (boolean == Some(true) && !value.is_true());
    if missing { other.unwrap_or_else(|| Value::from("")) } else { value }
}

fn trim(value: Value, chars: Option<&str>) -> String {
    let text = match value.as_str() {
        Some(text) => Cow::Borrowed(text),
        None => Cow::Owned(value.to_string()),
    };
    strip(&text, chars, true, true).to_owned()
}

fn string(state: &State<'_, '_>, value: Value) -> Result<Value, Error> {
    Ok(match value.kind() {
        ValueKind::String => value,
        ValueKind::Bool => Value::from(if value.is_true() { "True" } else { "False" }),
        ValueKind::None => Value::from("None"),
        ValueKind::Undefined => Value::from(""),
        ValueKind::Number => {
            let mut text = String::new();
            print(state, &value, 0, &mut text)?;
            Value::from(text)
        }
        _ => {
            let mut text = String::new();
            python_repr(state, &value, 0, &mut text)?;
            Value::from(text)
        }
    })
}

/// Python's `repr`, which is what a list or a mapping becomes as a string.
fn python_repr(state: &State<'_, '_>, value: &Value, level: usize, out: &mut String) -> Result<(), Error> {
    if level > MAX_DEPTH {
        return Err(too_deep());
    }
    let before = out.len();
    match value.kind() {
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default();
            let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
            out.push(quote);
            for c in text.chars() {
                match c {
                    '\n' => out.push_str("\\n"),
                    '\t' => out.push_str("\\t"),
                    '\r' => out.push_str("\\r"),
                    '\\' => out.push_str("\\\\"),
                    c if c == quote => out.extend(['\\', c]),
                    c => out.push(c),
                }
            }
            out.push(quote);
        }
        ValueKind::Seq | ValueKind::Iterable => {
            state.consume_fuel(1)?;
            out.push('[');
            for (i, item) in value.try_iter()?.enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                python_repr(state, &item, level + 1, out)?;
            }
            out.push(']');
            return Ok(());
        }
        ValueKind::Map => {
            state.consume_fuel(1)?;
            out.push('{');
            for (i, key) in value.try_iter()?.enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                python_repr(state, &key, level + 1, out)?;
                out.push_str(": ");
                python_repr(state, &value.get_item(&key).unwrap_or_default(), level + 1, out)?;
            }
            out.push('}');
            return Ok(());
        }
        ValueKind::None | ValueKind::Undefined => out.push_str("None"),
        _ => return print(state, value, level, out),
    }
    charge(state, out.len() - before)
}

/// Pairs sorted by key or value. A list to loops and filters, but it prints nothing: see [`print()`].
#[derive(Debug)]
struct SortedItems(Vec<Value>);

impl Object for SortedItems {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Seq
    }
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.0.get(key.as_usize()?).cloned()
    }
    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Seq(self.0.len())
    }
}

fn dictsort(value: &Value, kwargs: Kwargs) -> Result<Value, Error> {
    let sorted = minijinja::filters::dictsort(value, kwargs)?;
    Ok(Value::from_object(SortedItems(sorted.try_iter()?.collect())))
}

/// Python's `textwrap`-like indent: the first line only with `first`, blank lines only with `blank`.
fn indent(state: &State<'_, '_>, value: &str, args: Rest<Value>, kwargs: Kwargs) -> Result<String, Error> {
    let named = |name, at: usize| -> Result<Option<Value>, Error> {
        let given = args.get(at).filter(|v| !v.is_none() && !v.is_undefined());
        Ok(given.cloned().or(kwargs.get::<Option<Value>>(name)?))
    };
    let width = named("width", 0)?;
    let first = named("first", 1)?.is_some_and(|v| v.is_true());
    let blank = named("blank", 2)?.is_some_and(|v| v.is_true());
    kwargs.assert_all_used()?;
    let prefix = match width {
        None => "    ".to_owned(),
        Some(w) => match (w.as_str(), w.as_usize()) {
            (Some(text), _) => text.to_owned(),
            (_, Some(n)) if n <= 1 << 10 => " ".repeat(n),
            _ => return Err(Error::new(ErrorKind::InvalidOperation, "indent: the width is no small number")),
        },
    };
    let mut out = String::new();
    for (i, line) in value.split('\n').enumerate() {
        if i > 0 {
            out.push('\n');
        }
        if if i == 0 { first } else { !line.is_empty() || blank } {
            charge(state, prefix.len())?;
            out.push_str(&prefix);
        }
        out.push_str(line);
    }
    Ok(out)
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, format!("the chat template refuses: {message}")))
}

/// The present date and time in C's notation.
pub fn strftime_now(format: &str) -> Result<String, Error> {
    jiff::fmt::strtime::format(format, &jiff::Zoned::now())
        .map_err(|e| Error::new(ErrorKind::InvalidOperation, format!("strftime_now({format:?}): {e}")))
}

/// A list that `append` and the like change in place, as Python's does.
#[derive(Debug)]
struct MutableList {
    items: Mutex<Vec<Value>>,
    /// How deep it lies at most in what holds it: what comes into it lies deeper. See [`place`].
    level: AtomicUsize,
}

impl MutableList {
    fn items(&self) -> std::sync::MutexGuard<'_, Vec<Value>> {
        self.items.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Checks what is to come into the list.
    fn admit(&self, state: &State<'_, '_>, item: &Value) -> Result<(), Error> {
        let level = self.level.load(Ordering::Relaxed);
        place(state, item, level + 1, true)?;
        // It was found within the item.
        if self.level.load(Ordering::Relaxed) != level {
            return Err(Error::new(ErrorKind::InvalidOperation, "a list cannot hold itself"));
        }
        Ok(())
    }
}

impl Object for MutableList {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Seq
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.items().get(key.as_usize()?).cloned()
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Seq(self.items().len())
    }

    fn call_method(
        self: &Arc<Self>,
        state: &mut State<'_, '_>,
        name: &str,
        args: &[Value],
    ) -> Result<Value, Error> {
        let wrong = || Error::new(ErrorKind::InvalidOperation, format!("{name}: wrong arguments"));
        // The list's lock is taken last: what comes in may be the list itself.
        match (name, args) {
            ("append", [item]) => {
                self.admit(state, item)?;
                self.items().push(item.clone());
            }
            ("extend", [more]) => {
                let more: Vec<Value> = more.try_iter()?.collect();
                state.consume_fuel(more.len() as u64)?;
                more.iter().try_for_each(|item| self.admit(state, item))?;
                self.items().extend(more);
            }
            ("insert", [at, item]) => {
                self.admit(state, item)?;
                let mut items = self.items();
                let at = at.as_usize().ok_or_else(wrong)?.min(items.len());
                items.insert(at, item.clone());
            }
            ("pop", [] | [_]) => {
                let mut items = self.items();
                let at = args.first().map_or(Some(-1), Value::as_i64).ok_or_else(wrong)?;
                let at = usize::try_from(if at < 0 { at + items.len() as i64 } else { at })
                    .map_err(|_| wrong())?;
                return if at < items.len() { Ok(items.remove(at)) } else { Err(wrong()) };
            }
            _ => {
                let value = Value::from_dyn_object(self.clone());
                return minijinja_contrib::pycompat::unknown_method_callback(state, &value, name, args);
            }
        }
        Ok(Value::from(()))
    }
}

fn mutable_list(state: &State<'_, '_>, items: Value) -> Result<Value, Error> {
    let list = MutableList { items: Mutex::default(), level: AtomicUsize::new(0) };
    let items: Vec<Value> = items.try_iter()?.collect();
    items.iter().try_for_each(|item| list.admit(state, item))?;
    list.items().extend(items);
    Ok(Value::from_object(list))
}

fn tojson(state: &State<'_, '_>, value: &Value, args: Rest<Value>, kwargs: Kwargs) -> Result<String, Error> {
    let named = |name, at: usize| -> Result<Option<Value>, Error> {
        Ok(kwargs.get::<Option<Value>>(name)?.or(args.get(at).cloned()))
    };
    let indent = named("indent", 1)?.and_then(|v| v.as_usize()).map(|n| n.min(64));
    let separators: Vec<String> = match named("separators", 2)? {
        Some(pair) if !pair.is_none() => pair.try_iter()?.map(|v| v.to_string()).collect(),
        _ => Vec::new(),
    };
    let json = Json {
        indent,
        item: separators.first().cloned().unwrap_or_else(|| if indent.is_some() { "," } else { ", " }.into()),
        key: separators.get(1).cloned().unwrap_or_else(|| ": ".into()),
        ascii: named("ensure_ascii", 0)?.is_some_and(|v| v.is_true()),
        sort: named("sort_keys", 3)?.is_some_and(|v| v.is_true()),
    };
    kwargs.assert_all_used()?;
    let mut out = String::new();
    json.write(state, value, 0, &mut out)?;
    Ok(out)
}

/// How `tojson` writes.
struct Json {
    indent: Option<usize>,
    item: String,
    key: String,
    ascii: bool,
    sort: bool,
}

impl Json {
    fn newline(&self, level: usize, out: &mut String) {
        if let Some(width) = self.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', width * level));
        }
    }

    /// What stands before part `i` of a list or mapping.
    fn before_part(
        &self,
        state: &State<'_, '_>,
        i: usize,
        level: usize,
        out: &mut String,
    ) -> Result<(), Error> {
        let before = out.len();
        out.push_str(if i > 0 { &self.item } else { "" });
        self.newline(level, out);
        charge(state, out.len() - before)
    }

    fn write(
        &self,
        state: &State<'_, '_>,
        value: &Value,
        level: usize,
        out: &mut String,
    ) -> Result<(), Error> {
        if level > MAX_DEPTH {
            return Err(too_deep());
        }
        let before = out.len();
        match value.kind() {
            ValueKind::Undefined | ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&value.to_string()),
            ValueKind::Seq | ValueKind::Iterable => {
                state.consume_fuel(1)?;
                let items: Vec<Value> = value.try_iter()?.collect();
                out.push('[');
                for (i, item) in items.iter().enumerate() {
                    self.before_part(state, i, level + 1, out)?;
                    self.write(state, item, level + 1, out)?;
                }
                if !items.is_empty() {
                    self.newline(level, out);
                }
                out.push(']');
                return Ok(());
            }
            ValueKind::Map => {
                state.consume_fuel(1)?;
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort {
                    keys.sort();
                }
                out.push('{');
                for (i, key) in keys.iter().enumerate() {
                    self.before_part(state, i, level + 1, out)?;
                    let before = out.len();
                    self.text(&key.to_string(), out);
                    out.push_str(&self.key);
                    charge(state, out.len() - before)?;
                    self.write(state, &value.get_item(key)?, level + 1, out)?;
                }
                if !keys.is_empty() {
                    self.newline(level, out);
                }
                out.push('}');
                return Ok(());
            }
            _ => self.text(&value.to_string(), out),
        }
        charge(state, out.len() - before)
    }

    fn text(&self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\x08' => out.push_str("\\b"),
                '\x0c' => out.push_str("\\f"),
                c if c < ' ' => out.push_str(&format!("\\u{:04x}", c as u32)),
                c if self.ascii && !c.is_ascii() => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}
