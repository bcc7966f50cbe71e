//! PTX as few bytes: what is embedded of the kernels, before it is deflated.
//!
//! LLVM unrolls loops, so most lines of a kernel differ in nothing but the numbers of registers, and these grow line by
//! line: as text nothing repeats. Here a line is the number of its shape in a book, then its registers and labels, each
//! by its distance from the last new one of its kind, then its literals by number. Equal pieces of code are then equal
//! bytes wherever they stand. Measured over seven tiers, 173 MB of text: 31 MB deflated as text, a tenth of that so.
//!
//! A text packed is a **piece**: whole lines of ASCII, no control characters but tabs. Any such text comes back as it
//! was; small it becomes if registers and labels are numbered in the order in which they first appear, from 0.
//!
//! Bytes of a piece: per line the shape's number + 2 and its operands; or 1, a length and the line itself if it is too
//! long to have a shape (tables); 0 at the end. Numbers are in base 128, low digits first. Callers: the build script of
//! `gpu-kernels` (packs), `gpu-kernels` (unpacks what its build packed, so that here only a broken build can fail).
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;

/// What names of registers and labels begin with; in a shape the index + 1 stands for such a name.
const KINDS: [&str; 5] = ["$L", "%p", "%rs", "%r", "%rd"];
/// Stands for a literal in a shape: beyond the kinds, and neither tab nor newline.
const LITERAL: u8 = 11;
/// Longer lines are tables. The longest instruction, a `wgmma` with 128 sums, has some 1000 bytes.
const LONG: usize = 2000;
/// A name farther back than this is written by its own number.
const NEAR: u32 = 180;
const FAR: u8 = 181;

/// End of a piece.
const END: usize = 0;
/// A long line follows.
const RAW: usize = 1;
/// The first shape's number.
const SHAPES: usize = 2;

/// What unpacking needs to know: each shape of a line and each literal, most frequent first.
#[derive(Clone, Copy, Debug)]
pub struct Words<'a> {
    /// Lines with marks in place of names and literals.
    pub shapes: &'a [&'a str],
    /// Numbers, as the text has them.
    pub literals: &'a [&'a str],
}

/// A part of a line that is no part of its shape.
enum Operand<'a> {
    Name { kind: usize, number: u32 },
    Literal(&'a str),
}

/// How many names of each kind a piece has had.
type Counts = [u32; KINDS.len()];

impl Words<'_> {
    /// The text of packed pieces that follow each other.
    pub fn unpack(&self, packed: &[u8]) -> String {
        let mut from = Bytes { bytes: packed };
        let mut text = Vec::with_capacity(12 * packed.len());
        let mut counts = Counts::default();
        while !from.bytes.is_empty() {
            match from.number() {
                END => counts = Counts::default(),
                RAW => {
                    let len = from.number();
                    text.extend_from_slice(from.take(len));
                    text.push(b'\n');
                }
                shape => self.line(self.shapes[shape - SHAPES], &mut from, &mut counts, &mut text),
            }
        }
        String::from_utf8(text).expect("packed PTX is ASCII")
    }

    fn line(&self, shape: &str, from: &mut Bytes<'_>, counts: &mut Counts, text: &mut Vec<u8>) {
        for part in shape.as_bytes().split_inclusive(|&byte| is_mark(byte)) {
            let (last, plain) = part.split_last().expect("split into parts that are not empty");
            text.extend_from_slice(plain);
            match *last {
                LITERAL => text.extend_from_slice(self.literals[from.number()].as_bytes()),
                mark if is_mark(mark) => {
                    let kind = usize::from(mark) - 1;
                    let next = &mut counts[kind];
                    let number = match from.take(1)[0] {
                        0 => {
                            *next += 1;
                            *next - 1
                        }
                        FAR => from.number() as u32,
                        back => *next - u32::from(back),
                    };
                    text.extend_from_slice(KINDS[kind].as_bytes());
                    push_decimal(number, text);
                }
                byte => text.push(byte),
            }
        }
        text.push(b'\n');
    }
}

/// Packed bytes not yet read.
struct Bytes<'a> {
    bytes: &'a [u8],
}

impl<'a> Bytes<'a> {
    fn take(&mut self, n: usize) -> &'a [u8] {
        let (taken, rest) = self.bytes.split_at(n);
        self.bytes = rest;
        taken
    }

    fn number(&mut self) -> usize {
        let (mut number, mut shift) = (0, 0);
        loop {
            let byte = self.take(1)[0];
            number |= usize::from(byte & 127) << shift;
            shift += 7;
            if byte < 128 {
                return number;
            }
        }
    }
}

fn push_number(mut number: usize, out: &mut Vec<u8>) {
    while number >= 128 {
        out.push(number as u8 | 128);
        number >>= 7;
    }
    out.push(number as u8);
}

fn push_decimal(mut number: u32, out: &mut Vec<u8>) {
    let start = out.len();
    loop {
        out.push(b'0' + (number % 10) as u8);
        number /= 10;
        if number == 0 {
            break;
        }
    }
    out[start..].reverse();
}

fn is_mark(byte: u8) -> bool {
    usize::from(byte).wrapping_sub(1) < KINDS.len() || byte == LITERAL
}

/// Shapes and literals of some texts, to pack those with.
#[derive(Debug)]
pub struct Book {
    shapes: Index,
    literals: Index,
}

/// Words with their numbers.
#[derive(Debug)]
struct Index(BTreeMap<String, usize>);

impl Index {
    /// The most frequent first: their numbers are short.
    fn new(counts: BTreeMap<String, usize>) -> Index {
        let mut words: Vec<(String, usize)> = counts.into_iter().collect();
        // Sorted by word until here, and the sort is stable: one set of texts gives one book.
        words.sort_by_key(|&(_, count)| core::cmp::Reverse(count));
        Index(words.into_iter().enumerate().map(|(i, (word, _))| (word, i)).collect())
    }

    fn words(&self) -> Vec<&str> {
        let mut words: Vec<(usize, &str)> = self.0.iter().map(|(word, &i)| (i, word.as_str())).collect();
        words.sort_unstable();
        words.into_iter().map(|(_, word)| word).collect()
    }
}

impl Book {
    /// The book of all texts that will be packed with it.
    pub fn new(texts: &[&str]) -> Book {
        let (mut shapes, mut literals) = (BTreeMap::new(), BTreeMap::new());
        let count = |words: &mut BTreeMap<String, usize>, word: &str| match words.get_mut(word) {
            Some(count) => *count += 1,
            None => {
                words.insert(word.into(), 1);
            }
        };
        let (mut shape, mut operands) = (String::new(), Vec::new());
        for line in texts.iter().flat_map(|text| text.lines()).filter(|line| line.len() <= LONG) {
            take_apart(line, &mut shape, &mut operands);
            count(&mut shapes, &shape);
            for operand in &operands {
                if let Operand::Literal(text) = operand {
                    count(&mut literals, text);
                }
            }
        }
        Book { shapes: Index::new(shapes), literals: Index::new(literals) }
    }

    /// The shapes, by number.
    pub fn shapes(&self) -> Vec<&str> {
        self.shapes.words()
    }

    /// The literals, by number.
    pub fn literals(&self) -> Vec<&str> {
        self.literals.words()
    }

    /// Appends one of the book's texts as a piece.
    pub fn pack(&self, text: &str, out: &mut Vec<u8>) {
        assert!(text.ends_with('\n'), "pieces are whole lines");
        let allowed = |byte: u8| matches!(byte, b'\t' | b'\n' | b' '..=b'~');
        assert!(text.bytes().all(allowed), "pieces are ASCII");
        let mut counts = Counts::default();
        let (mut shape, mut operands) = (String::new(), Vec::new());
        for line in text.lines() {
            if line.len() > LONG {
                push_number(RAW, out);
                push_number(line.len(), out);
                out.extend_from_slice(line.as_bytes());
                continue;
            }
            take_apart(line, &mut shape, &mut operands);
            push_number(SHAPES + self.shapes.0[&shape], out);
            for operand in &operands {
                match *operand {
                    Operand::Literal(text) => push_number(self.literals.0[text], out),
                    Operand::Name { kind, number } => push_name(number, &mut counts[kind], out),
                }
            }
        }
        push_number(END, out);
    }
}

fn push_name(number: u32, next: &mut u32, out: &mut Vec<u8>) {
    if number == *next {
        *next += 1;
        out.push(0);
        return;
    }
    match next.checked_sub(number) {
        Some(back @ 1..=NEAR) => out.push(back as u8),
        _ => {
            out.push(FAR);
            push_number(number as usize, out);
        }
    }
}

/// Takes a line apart into its shape and the operands in order.
fn take_apart<'a>(line: &'a str, shape: &mut String, operands: &mut Vec<Operand<'a>>) {
    shape.clear();
    operands.clear();
    let bytes = line.as_bytes();
    let run = |from: usize, is: fn(&u8) -> bool| from + bytes[from..].iter().take_while(|&b| is(b)).count();
    let mut at = 0;
    while at < bytes.len() {
        let before = at.checked_sub(1).map_or(b' ', |i| bytes[i]);
        let (end, operand) = match bytes[at] {
            b'%' | b'$' => {
                let letters = run(at + 1, u8::is_ascii_alphabetic);
                let end = run(letters, is_word);
                (end, name(&line[at..letters], &line[letters..end]))
            }
            b'0'..=b'9' if !is_word(&before) && !matches!(before, b'.' | b':' | b'%' | b'$') => {
                let end = run(at, is_word);
                (end, Some(Operand::Literal(&line[at..end])))
            }
            _ => (at + 1, None),
        };
        match &operand {
            Some(Operand::Name { kind, .. }) => shape.push(char::from(*kind as u8 + 1)),
            Some(Operand::Literal(_)) => shape.push(char::from(LITERAL)),
            None => shape.push_str(&line[at..end]),
        }
        operands.extend(operand);
        at = end;
    }
}

fn is_word(byte: &u8) -> bool {
    byte.is_ascii_alphanumeric() || *byte == b'_'
}

/// The name of a register or label, if its number is written as [`push_decimal`] writes it.
fn name<'a>(kind: &str, digits: &str) -> Option<Operand<'a>> {
    let kind = KINDS.iter().position(|&known| known == kind)?;
    let plain =
        digits.bytes().all(|byte| byte.is_ascii_digit()) && (digits == "0" || !digits.starts_with('0'));
    Some(Operand::Name { kind, number: digits.parse().ok().filter(|_| plain)? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::format;
    use alloc::string::ToString;

    fn back(book: &Book, packed: &[u8]) -> String {
        let (shapes, literals) = (book.shapes(), book.literals());
        Words { shapes: &shapes, literals: &literals }.unpack(packed)
    }

    fn packed(text: &str) -> (Book, Vec<u8>) {
        let (book, mut out) = (Book::new(&[text]), Vec::new());
        book.pack(text, &mut out);
        (book, out)
    }

    #[test]
    fn any_text_comes_back() {
        let table = format!(".global .align 4 .b8 t[4096] = {{{}}};", "1, ".repeat(LONG));
        for text in [
            "\n",
            ".version 8.4\n.target sm_90a\n\t.reg .b32 \t%r<1043>;\n",
            // Numbers out of order, far back, ahead, and past what a register can have.
            "\tadd.s32 \t%r7, %r0, -12;\n\tadd.s32 \t%r0, %r1, %r400;\n\tmov.b64 \t%rd99999999999, %rd01;\n",
            "$L0:\n\t@!%p0 bra \t$L0;\n$L__BB0_1:\n$L\n$\n%\n%r\n%r1x\n%rs3_4\n%tid.x\n",
            "\tfma.rn.f32 \t%r1, 0f3F800000, 0x1F, 0d3FF0000000000000, [%rd1+-16], [param_0+16];\n",
            "\tld.global.nc.L2::128B.v4.b32 {%r3,%r2,%r1,%r0},[anon_$_11e1_$_0+8];\n1 2 3\n-1-2\n",
            &table.clone().replace("= {", "= {\n"),
            &(table + "\n"),
        ] {
            let text = if text.ends_with('\n') { text.to_string() } else { format!("{text}\n") };
            let (book, packed) = packed(&text);
            assert_eq!(back(&book, &packed), text);
        }
    }

    #[test]
    fn unrolled_code_is_equal_bytes() {
        let line = |i: usize| format!("\tadd.s32 \t%r{}, %r{i}, 7;\n", i + 1);
        let text: String = (0..1000).map(line).collect();
        let text = format!("\tmov.b32 \t%r0, 7;\n{text}");
        let (book, packed) = packed(&text);
        assert_eq!(book.shapes(), ["\tadd.s32 \t\u{4}, \u{4}, \u{b};", "\tmov.b32 \t\u{4}, \u{b};"]);
        // A new register, the literal; then each time a new register, the last but one that is new by then, the literal.
        let expected: Vec<u8> = [3, 0, 0].into_iter().chain([2, 0, 2, 0].repeat(1000)).chain([0]).collect();
        assert_eq!(packed, expected);
        assert_eq!(back(&book, &packed), text);
    }

    #[test]
    fn pieces_follow_each_other_and_start_anew() {
        let texts = ["\tmov \t%r0, 1;\n\tmov \t%r1, %r0;\n", "\tmov \t%r0, 2;\n"];
        let book = Book::new(&texts);
        let mut packed = Vec::new();
        texts.iter().for_each(|text| book.pack(text, &mut packed));
        assert_eq!(back(&book, &packed), texts.concat());
    }

    #[test]
    fn numbers_of_any_length_are_read_back() {
        for number in [0, 1, 127, 128, 16_383, 16_384, u32::MAX as usize] {
            let mut out = Vec::new();
            push_number(number, &mut out);
            let mut from = Bytes { bytes: &out };
            assert_eq!((from.number(), from.bytes.len()), (number, 0));
        }
    }
}
