//! The pattern language of the pre-tokenizers, and its matcher.
//!
//! A small part of regular-expression syntax, enough to write every published splitter as it is published:
//! literals, `\r \n \t \\`, `\u{…}`, `\s \S \d`, `\p{L} \p{N} \p{M} \p{P} \p{S} \p{Han}`, sets `[^a-z\p{L}&&[…]]`
//! (`&&` intersects), `? * + {m,n}` (greedy), groups `(?:…)`, `|`, `(?!c)` for one class c, and `$`.
//! Alternatives are tried in order, the first that matches wins (ECMAScript), and a match sees only its own piece.
//!
//! Classes follow llama.cpp's src/unicode.cpp, which squeezes text to one byte per category before it matches: a
//! non-ASCII white space is `\s` and nothing else, so no range or category contains it; `\d` is ASCII.
//!
//! Matching backtracks with an explicit stack, so the call depth does not grow with the text. A failed match that began
//! with an unbounded run is not tried again inside the run.

use alloc::vec;
use alloc::vec::Vec;

use super::unicode::{self, Flags, LETTER, MARK, NUMBER, PUNCTUATION, SYMBOL, WHITESPACE, decode};

/// Blocks that llama.cpp takes for `\p{Han}` (src/unicode.cpp).
const HAN: [(u32, u32); 9] = [
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0x2CEB0, 0x2EBEF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
];

/// One bracket: categories or ranges, perhaps negated.
#[derive(Clone, Default, PartialEq)]
struct Set {
    negated: bool,
    mask: Flags,
    ranges: Vec<(u32, u32)>,
}

impl Set {
    fn contains(&self, c: u32) -> bool {
        let flags = unicode::flags(c);
        let only_space = c >= 0x80 && flags & WHITESPACE != 0;
        let mask = if only_space { self.mask & WHITESPACE } else { self.mask };
        let in_range = || !only_space && self.ranges.iter().any(|&(first, last)| (first..=last).contains(&c));
        (flags & mask != 0 || in_range()) != self.negated
    }
}

/// A set of code points: the intersection of its brackets, with the answers for ASCII precomputed.
#[derive(Clone, PartialEq)]
struct Class {
    ascii: u128,
    sets: Vec<Set>,
}

impl Class {
    fn new(sets: Vec<Set>) -> Class {
        let ascii =
            (0..128).filter(|&c| sets.iter().all(|set| set.contains(c))).fold(0, |bits, c| bits | 1 << c);
        Class { ascii, sets }
    }

    /// Holds it only ASCII, for certain?
    fn is_ascii(&self) -> bool {
        self.sets
            .iter()
            .any(|set| !set.negated && set.mask == 0 && set.ranges.iter().all(|range| range.1 < 0x80))
    }

    fn contains(&self, c: u32) -> bool {
        if c < 0x80 { self.ascii >> c & 1 != 0 } else { self.sets.iter().all(|set| set.contains(c)) }
    }
}

/// Jumps are relative to the instruction's own index, so that code can be moved.
#[derive(Clone, Copy)]
enum Inst {
    /// One code point of the class.
    One(u16),
    /// `min..=max` code points of the class, as many as possible first.
    Run {
        class: u16,
        min: u32,
        max: u32,
    },
    /// The code points of `class`, up to the last one that is also of `last`: what `\s*[\r\n]+` matches, in one pass.
    Through {
        class: u16,
        last: u16,
    },
    /// Goes on with the next instruction; on failure with the one this far ahead.
    Try {
        otherwise: i32,
    },
    Jump(i32),
    /// The next code point is not of the class, or there is none.
    NotNext(u16),
    /// The piece ends here.
    AtEnd,
    Match,
}

/// A choice to come back to.
enum Frame {
    Retry {
        pc: usize,
        pos: usize,
    },
    /// Give back one code point of a run that ended at `pos` and may not become shorter than `min_pos`.
    Shorten {
        pc: usize,
        pos: usize,
        min_pos: usize,
    },
}

/// Scratch memory of the matcher, reused between matches.
#[derive(Default)]
pub(super) struct Stack {
    frames: Vec<Frame>,
    /// How far the run of the last `Through` went, and where its match ended. A match that begins further on in the same run
    /// ends there too, so a run is searched once however often it is tried.
    through: Option<(usize, Option<usize>)>,
}

/// A compiled pattern.
pub(super) struct Pattern {
    code: Vec<Inst>,
    classes: Vec<Class>,
}

impl Pattern {
    /// Compiles a pattern of ours. Panics on a wrong one: patterns are constants, and a test compiles them all.
    pub(super) fn new(source: &str) -> Pattern {
        let mut parser = Parser { rest: source, classes: Vec::new() };
        let code = parser.alternatives(true);
        assert!(parser.rest.is_empty(), "pattern {source:?}: cannot read {:?}", parser.rest);
        let n_through = code.iter().filter(|inst| matches!(inst, Inst::Through { .. })).count();
        assert!(n_through <= 1, "pattern {source:?}: the matcher remembers one `Through`");
        Pattern { code, classes: parser.classes }
    }

    /// Cuts `text[start..end]` into matches and what lies between them; appends the end of each piece to `ends`.
    pub(super) fn split(
        &self,
        text: &[u8],
        start: usize,
        end: usize,
        stack: &mut Stack,
        ends: &mut Vec<usize>,
    ) {
        let leading_run = match self.code[0] {
            Inst::Run { class, min: 1.., max: u32::MAX } => Some(&self.classes[usize::from(class)]),
            _ => None,
        };
        let (mut pos, mut matched) = (start, start);
        stack.through = None;
        while pos < end {
            match self.match_at(&text[..end], pos, stack) {
                Some(match_end) if match_end > pos => {
                    if pos > matched {
                        ends.push(pos);
                    }
                    ends.push(match_end);
                    (pos, matched) = (match_end, match_end);
                }
                _ => {
                    let (c, len) = decode(text, pos);
                    pos += len;
                    if let Some(class) = leading_run.filter(|class| class.contains(c)) {
                        pos = run(class, &text[..end], pos, u32::MAX).0;
                    }
                }
            }
        }
        if end > matched {
            ends.push(end);
        }
    }

    /// End of the match that begins at `pos`; the text ends with the piece.
    fn match_at(&self, text: &[u8], mut pos: usize, stack: &mut Stack) -> Option<usize> {
        let Stack { frames, through } = stack;
        frames.clear();
        let mut pc = 0;
        loop {
            let advanced = match self.code[pc] {
                Inst::Match => return Some(pos),
                Inst::One(class) => self.next_in(class, text, pos).map(|len| pos += len).is_some(),
                Inst::Run { class, min, max } => {
                    let class = &self.classes[usize::from(class)];
                    let (min_pos, count) = run(class, text, pos, min);
                    let enough = count == min;
                    if enough {
                        pos = run(class, text, min_pos, max - min).0;
                        if pos > min_pos && !matches!(self.code[pc + 1], Inst::Match) {
                            frames.push(Frame::Shorten { pc: pc + 1, pos, min_pos });
                        }
                    }
                    enough
                }
                Inst::Through { class, last } => {
                    let (_, end) = match *through {
                        Some((run_end, end)) if pos < run_end => (run_end, end),
                        _ => *through.insert(self.through(class, last, text, pos)),
                    };
                    let end = end.filter(|&end| end > pos);
                    pos = end.unwrap_or(pos);
                    end.is_some()
                }
                Inst::Try { otherwise } => {
                    frames.push(Frame::Retry { pc: pc.wrapping_add_signed(otherwise as isize), pos });
                    true
                }
                Inst::Jump(offset) => {
                    pc = pc.wrapping_add_signed(offset as isize);
                    continue;
                }
                Inst::NotNext(class) => self.next_in(class, text, pos).is_none(),
                Inst::AtEnd => pos == text.len(),
            };
            if advanced {
                pc += 1;
                continue;
            }
            (pc, pos) = match frames.pop()? {
                Frame::Retry { pc, pos } => (pc, pos),
                Frame::Shorten { pc, mut pos, min_pos } => {
                    pos -= 1;
                    while text[pos] & 0xC0 == 0x80 {
                        pos -= 1;
                    }
                    if pos > min_pos {
                        frames.push(Frame::Shorten { pc, pos, min_pos });
                    }
                    (pc, pos)
                }
            };
        }
    }

    /// End of the run of `class`, and the end of the last code point of `last` in it.
    fn through(&self, class: u16, last: u16, text: &[u8], mut pos: usize) -> (usize, Option<usize>) {
        let [class, last] = [class, last].map(|class| &self.classes[usize::from(class)]);
        let mut end = None;
        while pos < text.len() {
            let (c, len) = decode(text, pos);
            if !class.contains(c) {
                break;
            }
            pos += len;
            end = if last.contains(c) { Some(pos) } else { end };
        }
        (pos, end)
    }

    /// Length of the next code point if there is one and it is of the class.
    fn next_in(&self, class: u16, text: &[u8], pos: usize) -> Option<usize> {
        (pos < text.len())
            .then(|| decode(text, pos))
            .filter(|&(c, _)| self.classes[usize::from(class)].contains(c))
            .map(|(_, len)| len)
    }
}

/// Goes over at most `max` code points of `class`; where it stops, and how many there were.
fn run(class: &Class, text: &[u8], mut pos: usize, max: u32) -> (usize, u32) {
    let mut count = 0;
    while count < max && pos < text.len() {
        let (c, len) = decode(text, pos);
        if !class.contains(c) {
            break;
        }
        pos += len;
        count += 1;
    }
    (pos, count)
}

struct Parser<'a> {
    rest: &'a str,
    classes: Vec<Class>,
}

impl Parser<'_> {
    fn eat(&mut self, token: &str) -> bool {
        self.rest.strip_prefix(token).map(|rest| self.rest = rest).is_some()
    }

    fn char(&mut self) -> char {
        let mut chars = self.rest.chars();
        let c = chars.next().expect("pattern ends too early");
        self.rest = chars.as_str();
        c
    }

    fn number(&mut self) -> u32 {
        let digits = self.rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(self.rest.len());
        let (number, rest) = self.rest.split_at(digits);
        self.rest = rest;
        number.parse().expect("a number in a pattern")
    }

    /// Writes an alternative `C*D` or `C*D+`, D being some ASCII part of C, as `Through`.
    fn shorten(&self, alternative: &mut Vec<Inst>) {
        if let [
            Inst::Run { class, min: 0, max: u32::MAX },
            Inst::One(last) | Inst::Run { class: last, min: 1, max: u32::MAX },
        ] = alternative[..]
        {
            let [outer, inner] = [class, last].map(|class| &self.classes[usize::from(class)]);
            if inner.is_ascii() && inner.ascii & !outer.ascii == 0 {
                *alternative = vec![Inst::Through { class, last }];
            }
        }
    }

    /// `a|b|c`. At the top each alternative ends in `Match`; in a group each but the last jumps behind the last.
    fn alternatives(&mut self, top: bool) -> Vec<Inst> {
        let mut alternatives = vec![self.sequence()];
        while self.eat("|") {
            alternatives.push(self.sequence());
        }
        let mut code = Vec::new();
        for (i, mut alternative) in alternatives.into_iter().rev().enumerate() {
            match (top, i) {
                (true, _) => {
                    self.shorten(&mut alternative);
                    alternative.push(Inst::Match);
                }
                (false, 0) => {}
                (false, _) => alternative.push(Inst::Jump(1 + code.len() as i32)),
            }
            if i > 0 {
                alternative.insert(0, Inst::Try { otherwise: 1 + alternative.len() as i32 });
            }
            alternative.append(&mut code);
            code = alternative;
        }
        code
    }

    fn sequence(&mut self) -> Vec<Inst> {
        let mut code = Vec::new();
        while !(self.rest.is_empty() || self.rest.starts_with(['|', ')'])) {
            if self.eat("$") {
                code.push(Inst::AtEnd);
            } else if self.eat("(?!") {
                let class = self.class();
                code.push(Inst::NotNext(class));
                assert!(self.eat(")"), "(?!…) takes one class");
            } else if self.eat("(?:") {
                let body = self.alternatives(false);
                assert!(self.eat(")"), "group without end");
                self.repeat_group(body, &mut code);
            } else {
                let class = self.class();
                code.push(match self.quantifier() {
                    (1, 1) => Inst::One(class),
                    (min, max) => Inst::Run { class, min, max },
                });
            }
        }
        code
    }

    fn quantifier(&mut self) -> (u32, u32) {
        if self.eat("?") {
            (0, 1)
        } else if self.eat("*") {
            (0, u32::MAX)
        } else if self.eat("+") {
            (1, u32::MAX)
        } else if self.eat("{") {
            let min = self.number();
            let max = if self.eat(",") { self.number() } else { min };
            assert!(self.eat("}"), "quantifier without end");
            (min, max)
        } else {
            (1, 1)
        }
    }

    fn repeat_group(&mut self, mut body: Vec<Inst>, code: &mut Vec<Inst>) {
        let len = body.len() as i32;
        match self.quantifier() {
            (1, 1) => code.append(&mut body),
            (0, 1) => {
                code.push(Inst::Try { otherwise: 1 + len });
                code.append(&mut body);
            }
            (0, u32::MAX) => {
                code.push(Inst::Try { otherwise: 2 + len });
                code.append(&mut body);
                code.push(Inst::Jump(-1 - len));
            }
            other => panic!("a group cannot be repeated {other:?} times"),
        }
    }

    /// A class as an index; equal classes share one.
    fn class(&mut self) -> u16 {
        let mut sets = Vec::new();
        if self.eat("[") {
            self.set(&mut sets);
        } else {
            let mut set = Set::default();
            self.set_item(&mut set);
            sets.push(set);
        }
        let class = Class::new(sets);
        let index = self.classes.iter().position(|known| *known == class).unwrap_or_else(|| {
            self.classes.push(class);
            self.classes.len() - 1
        });
        index as u16
    }

    /// A bracket, its `[` already read.
    fn set(&mut self, sets: &mut Vec<Set>) {
        let mut set = Set { negated: self.eat("^"), ..Set::default() };
        while !self.eat("]") {
            if self.eat("&&[") {
                self.set(sets);
            } else {
                self.set_item(&mut set);
            }
        }
        sets.push(set);
    }

    /// A literal, a range or a `\` class.
    fn set_item(&mut self, set: &mut Set) {
        for (name, mask) in [
            (r"\s", WHITESPACE),
            (r"\p{L}", LETTER),
            (r"\p{N}", NUMBER),
            (r"\p{M}", MARK),
            (r"\p{P}", PUNCTUATION),
            (r"\p{S}", SYMBOL),
        ] {
            if self.eat(name) {
                set.mask |= mask;
                return;
            }
        }
        if self.eat(r"\S") {
            (set.negated, set.mask) = (true, WHITESPACE);
        } else if self.eat(r"\d") {
            set.ranges.push(('0' as u32, '9' as u32));
        } else if self.eat(r"\p{Han}") {
            set.ranges.extend(HAN);
        } else {
            let first = self.literal();
            let last = if self.rest.starts_with('-') && !self.rest.starts_with("-]") {
                self.char();
                self.literal()
            } else {
                first
            };
            set.ranges.push((first, last));
        }
    }

    fn literal(&mut self) -> u32 {
        let c = match self.char() {
            '\\' => match self.char() {
                'r' => '\r',
                'n' => '\n',
                't' => '\t',
                'u' => {
                    let (hex, rest) = self.rest.split_once('}').expect("\\u{ without end");
                    self.rest = rest;
                    return u32::from_str_radix(hex.trim_start_matches('{'), 16).expect("hex digits");
                }
                c if c.is_ascii_punctuation() => c,
                c => panic!("unknown escape \\{c} in a pattern"),
            },
            c => c,
        };
        c.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::String;
    use proptest::prelude::*;

    fn split<'t>(pattern: &str, text: &'t str) -> Vec<&'t str> {
        let mut ends = Vec::new();
        Pattern::new(pattern).split(text.as_bytes(), 0, text.len(), &mut Stack::default(), &mut ends);
        let mut start = 0;
        ends.into_iter().map(|end| &text[core::mem::replace(&mut start, end)..end]).collect()
    }

    #[test]
    fn pieces_are_matches_and_gaps() {
        assert_eq!(split(r"\d{1,3}", "ab12345c"), ["ab", "123", "45", "c"]);
        assert_eq!(split(r"\s+(?!\S)|\s+", "a   b "), ["a", "  ", " ", "b", " "]);
        assert_eq!(split(r"\s+$", "a  b  "), ["a  b", "  "]);
        assert_eq!(split(r"'(?:s|ll)|[a-z]+", "it'll's"), ["it", "'ll", "'s"]);
        assert_eq!(split(r"[\p{L}&&[^a-z]]*[\p{L}&&[^A-Z]]+", "ABCdéFÉ"), ["ABCdé", "FÉ"]);
        assert_eq!(split(r"\p{L}(?:[\p{L}\p{M}]+| \p{L})*", "ab cd  e"), ["ab cd", "  ", "e"]);
        assert_eq!(split(r"x(?:y)?z", "xyzxzxy"), ["xyz", "xz", "xy"]);
    }

    #[test]
    fn non_ascii_space_is_only_space() {
        assert_eq!(split("[\u{3000}-\u{3002}]+", "\u{3000}\u{3001}"), ["\u{3000}", "\u{3001}"]);
        assert_eq!(split(r"\s+", "a\u{A0}\u{85}b"), ["a", "\u{A0}\u{85}", "b"]);
        assert_eq!(split(r"\d+", "٣3"), ["٣", "3"]);
    }

    #[test]
    fn long_runs_take_linear_time() {
        let mut text = " ".repeat(1 << 20);
        text.push('x');
        assert_eq!(split(r"\s+$", &text).len(), 1);
        assert_eq!(split(r"\s*[\r\n]+|\s+(?!\S)|\s+", &text).len(), 3);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]
        /// fancy-regex is the oracle on patterns and text where both agree on the classes (ASCII).
        #[test]
        fn agrees_with_a_regex_engine(text in "[a-cA-C '.\n0-9]{0,24}", which in 0usize..5) {
            let pattern = [
                r"'(?:[sS]|ll|[vV][eE])|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]{1,3}| ?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
                r"[^\r\nA-Z]?[A-B]*[a-cA]+(?:'[bc])?|\d",
                r"\s+$",
                r"a(?:[b-c]+| [a-c])*",
                r"(?:ab|a)(?:c|bc)?'",
            ][which];
            let oracle = fancy_regex::Regex::new(&pattern.replace(r"\s+$", r"\s+\z")).unwrap();
            let mut want: Vec<String> = Vec::new();
            let mut last = 0;
            for found in oracle.find_iter(&text).map(Result::unwrap) {
                want.extend((found.start() > last).then(|| text[last..found.start()].into()));
                want.push(found.as_str().into());
                last = found.end();
            }
            want.extend((last < text.len()).then(|| text[last..].into()));
            prop_assert_eq!(split(pattern, &text), want);
        }
    }
}
