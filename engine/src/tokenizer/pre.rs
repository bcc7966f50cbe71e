//! The named pre-tokenizers (`tokenizer.ggml.pre`): how text is cut into words before byte-pair merging, and the habits
//! that llama.cpp ties to the name.
//!
//! One row per name. The rules of a row run one after the other, each cutting the pieces of the one before. The
//! patterns are those of the models' tokenizer.json as llama.cpp runs them (src/llama-vocab.cpp, src/unicode.cpp): its
//! deviations are kept, since models are used with its token ids. Spellings here are shortened where the language is the
//! same, e.g. `\p{Lu}` and its relatives are `\p{L}`, because llama.cpp knows no finer category.

use alloc::vec::Vec;

use super::pattern::{Pattern, Stack};
use super::unicode::{self, NUMBER, decode};

/// One step of a pre-tokenizer.
enum Rule {
    /// Cut out the matches of a pattern.
    Split(&'static str),
    /// Cut numbers in groups of three from their end.
    Thousands { digits: Digits, edges: Edges },
}

#[derive(Clone, Copy)]
enum Digits {
    Any,
    Ascii,
}

/// Where else the groups of three cut.
#[derive(Clone, Copy)]
enum Edges {
    /// Behind the number, but not before it: its first group stays with the text in front (llama.cpp's own splitter).
    End,
    /// Before a number of whole groups (the pattern `(?=(\d{3})+(?!\d))`).
    WholeGroups,
}

/// Habits of a named pre-tokenizer, as bits.
pub(super) mod habit {
    /// A word that is a token is not merged together but taken as it is.
    pub const IGNORE_MERGES: u16 = 1;
    /// The beginning-of-sequence token is added unless the file says otherwise.
    pub const ADD_BOS: u16 = 1 << 1;
    /// There is no default beginning-of-sequence token.
    pub const NO_BOS: u16 = 1 << 2;
    /// Detokenization leaves spaces before punctuation alone.
    pub const KEEP_SPACES: u16 = 1 << 3;
    /// Tokens are raw UTF-8 with `<0xXX>` for bytes, not GPT-2's byte characters.
    pub const RAW_UTF8: u16 = 1 << 4;
    /// Spaces are written U+2581.
    pub const ESCAPE_SPACES: u16 = 1 << 5;
    /// A run of newlines that is a token is taken as it is.
    pub const NEWLINE_RUNS: u16 = 1 << 6;
    /// Every line begins with U+2581.
    pub const SPACE_PER_LINE: u16 = 1 << 7;
    /// White space is dropped.
    pub const DROP_SPACES: u16 = 1 << 8;
    /// The beginning-of-sequence token is added whatever the file says.
    pub const FORCE_BOS: u16 = 1 << 9;
}
use habit::*;

macro_rules! contraction {
    () => {
        r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])"
    };
}
macro_rules! word {
    () => {
        r"[^\r\n\p{L}\p{N}]?\p{L}+"
    };
}
macro_rules! marked_word {
    () => {
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
    };
}
macro_rules! other {
    () => {
        r" ?[^\s\p{L}\p{N}]+[\r\n]*"
    };
}
macro_rules! space {
    () => {
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    };
}
/// Capitals then small letters, a letter of another script being both; `$m` adds to the letters.
macro_rules! cased_word {
    ($m:literal, $suffix:expr) => {
        concat!(
            r"[^\r\n\p{L}\p{N}]?[\p{L}",
            $m,
            r"&&[^a-z]]*[\p{L}",
            $m,
            r"&&[^A-Z]]+",
            $suffix,
            "|",
            r"[^\r\n\p{L}\p{N}]?[\p{L}",
            $m,
            r"&&[^a-z]]+[\p{L}",
            $m,
            r"&&[^A-Z]]*",
            $suffix,
        )
    };
}
macro_rules! maybe_contraction {
    () => {
        concat!("(?:", contraction!(), ")?")
    };
}
/// DeepSeek's word rule: ASCII punctuation sticks to the ASCII word behind it.
macro_rules! punctuated_word {
    () => {
        r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"##
    };
}

type Rules = &'static [Rule];
use Rule::Split;

const GPT2_WORDS: Rule = Split(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+");
const LLAMA3_WORDS: Rule =
    Split(concat!(contraction!(), "|", word!(), r"|\p{N}{1,3}|", other!(), "|", space!()));
const QWEN2_WORDS: Rule = Split(concat!(contraction!(), "|", word!(), r"|\p{N}|", other!(), "|", space!()));
const ONE_DIGIT: Rule = Split(r"\p{N}");
const THREE_DIGITS: Rule = Split(r"\p{N}{1,3}");
const CJK: Rule = Split(r"[\u{4E00}-\u{9FA5}\u{3040}-\u{309F}\u{30A0}-\u{30FF}]+");
const CJK_HANGUL: Rule = Split(r"[\u{4E00}-\u{9FA5}\u{800}-\u{4E00}\u{AC00}-\u{D7FF}]+");
const LINES: Rule = Split(r"[^\n]+|\n+");
const NEWLINE: Rule = Split(r"[\r\n]");
const BLOOM_WORDS: Rule = Split(r" ?[^(\s|.,!?\u{2026}\u{3002}\u{FF0C}\u{3001}\u{964}\u{6D4}\u{60C})]+");
const THOUSANDS: Rule = Rule::Thousands { digits: Digits::Any, edges: Edges::End };

const DEFAULT: Rules = &[Split(r"[\p{P}$+<=>^~|]+"), GPT2_WORDS, Split(r"\p{N}+"), Split("[0-9]{3}")];
const GPT2: Rules = &[GPT2_WORDS];
const DIGIT_GPT2: Rules = &[ONE_DIGIT, GPT2_WORDS];
const FALCON: Rules = &[Split(r"[\p{P}$+<=>^~|`]+"), GPT2_WORDS, Split("[0-9]{3}")];
const LLAMA3: Rules = &[LLAMA3_WORDS];
const QWEN2: Rules = &[QWEN2_WORDS];
const QWEN35: Rules = &[Split(concat!(
    contraction!(),
    "|",
    marked_word!(),
    r"|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|",
    space!()
))];
const JAIS2: Rules = &[Split(concat!(
    contraction!(),
    "|",
    word!(),
    r"|\p{N}{1,3}|",
    other!(),
    r"|\s*[\r\n]+",
    r"|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)",
    r"|\s{1,2}(?!\S)|\s"
))];
const DEEPSEEK_LLM: Rules = &[
    NEWLINE,
    // Letters of the cased scripts, as the model's tokenizer.json lists them.
    Split(concat!(
        r"\s?[A-Za-z\u{B5}\u{C0}-\u{D6}\u{D8}-\u{F6}\u{F8}-\u{1BA}\u{1BC}-\u{1BF}\u{1C4}-\u{293}\u{295}-\u{2AF}",
        r"\u{370}-\u{373}\u{376}\u{377}\u{37B}-\u{37D}\u{37F}\u{386}\u{388}-\u{38A}\u{38C}\u{38E}-\u{3A1}",
        r"\u{3A3}-\u{3F5}\u{3F7}-\u{481}\u{48A}-\u{52F}\u{531}-\u{556}\u{10A0}-\u{10C5}\u{13A0}-\u{13F5}",
        r"\u{13F8}-\u{13FD}\u{1C90}-\u{1CBA}\u{1CBD}-\u{1CBF}\u{1D00}-\u{1D2B}\u{1D6B}-\u{1D77}\u{1D79}-\u{1D9A}",
        r"\u{1E00}-\u{1F15}\u{1F18}-\u{1F1D}\u{1F20}-\u{1F45}\u{1F48}-\u{1F4D}\u{1F50}-\u{1F57}\u{1F59}\u{1F5B}",
        r"\u{1F5D}\u{1F5F}-\u{1F7D}\u{1F80}-\u{1FB4}\u{1FB6}-\u{1FBC}\u{1FBE}\u{1FC2}-\u{1FC4}\u{1FC6}-\u{1FCC}",
        r"\u{1FD0}-\u{1FD3}\u{1FD6}-\u{1FDB}\u{1FE0}-\u{1FEC}\u{1FF2}-\u{1FF4}\u{1FF6}-\u{1FFC}\u{2102}\u{2107}",
        r"\u{210A}-\u{2113}\u{2115}\u{2119}-\u{211D}\u{2124}\u{2126}\u{2128}\u{212A}-\u{212D}\u{212F}-\u{2134}",
        r"\u{2139}\u{213C}-\u{213F}\u{2145}-\u{2149}\u{214E}\u{2183}\u{2184}\u{2C00}-\u{2C7B}\u{2C7E}-\u{2CE4}",
        r"\u{2CEB}-\u{2CEE}\u{2CF2}\u{2CF3}\u{A640}-\u{A66D}\u{A680}-\u{A69B}\u{A722}-\u{A76F}\u{A771}-\u{A787}",
        r"\u{A78B}-\u{A78E}\u{AB70}-\u{ABBF}\u{FB00}-\u{FB06}\u{FB13}-\u{FB17}\u{FF21}-\u{FF3A}\u{FF41}-\u{FF5A}",
        r"\u{10400}-\u{1044F}\u{104B0}-\u{104D3}\u{104D8}-\u{104FB}\u{10C80}-\u{10CB2}\u{10CC0}-\u{10CF2}",
        r"\u{118A0}-\u{118DF}\u{1E900}-\u{1E943}]+"
    )),
    Split(r"\s?[!-/:-~\u{FF01}-\u{FF0F}\u{FF1A}-\u{FF5E}\u{2018}-\u{201F}\u{3000}-\u{3002}]+"),
    Split(r"\s+$"),
    CJK_HANGUL,
    Split(r"\p{N}+"),
];
const DEEPSEEK_CODER: Rules = &[NEWLINE, Split(r"\s?\p{L}+"), Split(r"\s?\p{P}+"), CJK_HANGUL, ONE_DIGIT];
const DEEPSEEK3: Rules =
    &[THREE_DIGITS, CJK, Split(concat!(punctuated_word!(), r"| ?[\p{P}\p{S}]+[\r\n]*|", space!()))];
const SPARK: Rules = &[
    THREE_DIGITS,
    CJK,
    Split(concat!(punctuated_word!(), r"| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+")),
    ONE_DIGIT,
];
const YOUTU: Rules = &[
    Split(concat!(
        r"[\u{AC00}-\u{D7A3}\u{3131}-\u{318E}]+|",
        r"[\u{FF01}\u{2026}\u{201C}\u{201D}\u{2018}\u{2019}\u{2014}\u{FF1A}\u{FF1B}\u{FF0C}\u{3001}-\u{303F}",
        r"\u{FE30}-\u{FE4F}]+|[\u{3105}-\u{312F}]+|[\u{4E00}-\u{9FA5}\u{3040}-\u{309F}\u{30A0}-\u{30FF}]+"
    )),
    Split(concat!(marked_word!(), maybe_contraction!(), r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|", space!())),
];
const TINY_AYA: Rules = &[
    THOUSANDS,
    Split(concat!(
        marked_word!(),
        maybe_contraction!(),
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|",
        space!()
    )),
];
const BLOOM: Rules = &[BLOOM_WORDS];
const VIKING: Rules = &[BLOOM_WORDS, ONE_DIGIT];
const TEKKEN: Rules = &[Split(concat!(cased_word!("", ""), r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|", space!()))];
const CHAMELEON: Rules = &[
    Split("<sentinel:[0-9]+>"),
    Split("IMGIMG[A-I]{1,4}Z"),
    Split(r"[\t\n]|    |  "),
    ONE_DIGIT,
    Split(r"[\p{P}!-/:-@\[-`{-~]"),
    GPT2_WORDS,
];
const GPT4O: Rules = &[Split(concat!(
    cased_word!("", maybe_contraction!()),
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|",
    space!()
))];
const GRANITE_EMBED: Rules = &[Split(concat!(
    cased_word!(r"\p{M}", maybe_contraction!()),
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|",
    space!()
))];
const KIMI_K2: Rules = &[Split(concat!(
    r"\p{Han}+|[^\r\n\p{L}\p{N}]?[\p{L}&&[^\p{Han}]]+",
    maybe_contraction!(),
    r"|\p{N}{1,3}|",
    other!(),
    "|",
    space!()
))];
const SUPERBPE: Rules =
    &[Split(r"\p{N}+"), Rule::Thousands { digits: Digits::Ascii, edges: Edges::WholeGroups }];
const BAILING: Rules =
    &[Split(concat!(contraction!(), "|", word!(), r"|\p{N}|", other!(), r"|\s*[\r\n]|\s+(?!\S)|\s+"))];
const SEED_CODER: Rules =
    &[Split(concat!(contraction!(), "|", word!(), r"|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|", space!()))];
const UFAKZEKA: Rules = &[Split(concat!(word!(), r"|\p{N}|", other!(), "|", space!()))];
const AFMOE: Rules = &[
    THOUSANDS,
    // The second range begins at U+8C48, not at the compatibility ideograph U+F900 that was meant.
    Split(concat!(
        r"[\u{4E00}-\u{9FFF}\u{3400}-\u{4DBF}\u{8C48}-\u{FAFF}\u{3040}-\u{309F}\u{30A0}-\u{30FF}\u{FF65}-\u{FF9F}",
        r"\u{2F00}-\u{2FDF}\u{E40}-\u{E7F}\u{E80}-\u{EFF}\u{1780}-\u{17FF}\u{1000}-\u{109F}\u{AA60}-\u{AA7F}",
        r"\u{A9E0}-\u{A9FF}\u{AC00}-\u{D7AF}\u{1100}-\u{11FF}]+"
    )),
    Split(concat!(punctuated_word!(), r"| ?[\p{P}\p{S}]+[\r\n]*|", space!())),
];
const LAGUNA: Rules = &[LINES, QWEN2_WORDS];
const EXAONE_MOE: Rules = &[Split(concat!(
    contraction!(),
    r"|[^\r\n\p{L}\p{N}]?\p{L}(?:[\p{L}\p{M}]+| \p{L})*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?",
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
))];
const MINICPM5: Rules =
    &[THREE_DIGITS, Split(concat!(contraction!(), "|", word!(), r"|\p{N}+|", other!(), "|", space!()))];
const LINE_RUNS: Rules = &[LINES];
const META_WORDS: Rules = &[Split(r"\n+|\u{2581}[^\n\u{2581}]*")];
const NON_SPACE: Rules = &[Split(r"\S+")];

/// Name, rules, habits.
#[rustfmt::skip]
const ROWS: &[(&str, Rules, u16)] = &[
    ("default", DEFAULT, 0),
    ("minicpm5", MINICPM5, IGNORE_MERGES),
    ("llama3", LLAMA3, IGNORE_MERGES | ADD_BOS),
    ("llama-v3", LLAMA3, IGNORE_MERGES | ADD_BOS),
    ("llama-bpe", LLAMA3, IGNORE_MERGES | ADD_BOS),
    ("falcon3", LLAMA3, IGNORE_MERGES | ADD_BOS),
    ("falcon-h1", LLAMA3, IGNORE_MERGES | ADD_BOS),
    ("pixtral", LLAMA3, IGNORE_MERGES | ADD_BOS),
    ("midm-2.0", LLAMA3, IGNORE_MERGES | ADD_BOS),
    ("lfm2", LLAMA3, IGNORE_MERGES | ADD_BOS),
    ("jina-v5-nano", LLAMA3, IGNORE_MERGES | ADD_BOS),
    ("deepseek-llm", DEEPSEEK_LLM, KEEP_SPACES),
    ("deepseek-coder", DEEPSEEK_CODER, KEEP_SPACES),
    ("deepseek-v3", DEEPSEEK3, KEEP_SPACES),
    ("spark2_5", SPARK, KEEP_SPACES),
    ("youtu", YOUTU, KEEP_SPACES | IGNORE_MERGES),
    ("falcon", FALCON, 0),
    ("mpt", GPT2, 0),
    ("starcoder", DIGIT_GPT2, 0),
    ("gpt-2", GPT2, 0),
    ("phi-2", GPT2, 0),
    ("jina-es", GPT2, 0),
    ("jina-de", GPT2, 0),
    ("gigachat", GPT2, 0),
    ("jina-v2-es", GPT2, 0),
    ("jina-v2-de", GPT2, 0),
    ("a.x-4.0", GPT2, 0),
    ("mellum", GPT2, 0),
    ("modern-bert", GPT2, 0),
    ("jais-2", JAIS2, 0),
    ("gemma4", LINE_RUNS, RAW_UTF8 | ESCAPE_SPACES | NEWLINE_RUNS | FORCE_BOS),
    ("granite-embed-multi-311m", LINE_RUNS, RAW_UTF8 | ESCAPE_SPACES | NEWLINE_RUNS | FORCE_BOS),
    ("mmbert", META_WORDS, RAW_UTF8 | ESCAPE_SPACES | NEWLINE_RUNS | SPACE_PER_LINE),
    ("sarvam-moe", LINE_RUNS, RAW_UTF8 | ESCAPE_SPACES | KEEP_SPACES),
    ("jina-v1-en", GPT2, 0),
    ("jina-v2-code", GPT2, 0),
    ("roberta-bpe", GPT2, 0),
    ("whitespace", NON_SPACE, RAW_UTF8 | DROP_SPACES),
    ("refact", DIGIT_GPT2, 0),
    ("command-r", DIGIT_GPT2, KEEP_SPACES),
    ("qwen2", QWEN2, KEEP_SPACES),
    ("deepseek-r1-qwen", QWEN2, KEEP_SPACES),
    ("kormo", QWEN2, KEEP_SPACES),
    ("f2llmv2", QWEN2, KEEP_SPACES),
    ("qwen35", QWEN35, KEEP_SPACES),
    ("stablelm2", QWEN2, 0),
    ("olmo", GPT2, 0),
    ("dbrx", LLAMA3, 0),
    ("smaug-bpe", LLAMA3, 0),
    ("poro-chat", BLOOM, KEEP_SPACES),
    ("chatglm-bpe", LLAMA3, NO_BOS),
    ("glm4", LLAMA3, NO_BOS | IGNORE_MERGES),
    ("glm5", LLAMA3, NO_BOS | IGNORE_MERGES),
    ("viking", VIKING, KEEP_SPACES),
    ("jais", GPT2, 0),
    ("tekken", TEKKEN, KEEP_SPACES | IGNORE_MERGES | ADD_BOS),
    ("smollm", DIGIT_GPT2, KEEP_SPACES),
    ("codeshell", DIGIT_GPT2, 0),
    ("bloom", BLOOM, 0),
    ("gpt3-finnish", BLOOM, 0),
    ("exaone", DIGIT_GPT2, 0),
    ("exaone4", GPT2, 0),
    ("exaone-moe", EXAONE_MOE, 0),
    ("chameleon", CHAMELEON, ADD_BOS | KEEP_SPACES),
    ("minerva-7b", DIGIT_GPT2, 0),
    ("megrez", QWEN2, 0),
    ("gpt-4o", GPT4O, KEEP_SPACES),
    ("llama4", GPT4O, KEEP_SPACES),
    ("kanana2", GPT4O, KEEP_SPACES),
    ("talkie", GPT4O, KEEP_SPACES),
    ("granite-embed-multi-97m", GRANITE_EMBED, KEEP_SPACES | IGNORE_MERGES),
    ("tiny_aya", TINY_AYA, KEEP_SPACES),
    ("cohere2moe", TINY_AYA, KEEP_SPACES),
    ("superbpe", SUPERBPE, KEEP_SPACES),
    ("trillion", GPT2, KEEP_SPACES),
    ("granite-docling", GPT2, KEEP_SPACES),
    ("bailingmoe", BAILING, KEEP_SPACES),
    ("bailingmoe2", BAILING, KEEP_SPACES),
    ("llada-moe", BAILING, KEEP_SPACES),
    ("seed-coder", SEED_CODER, KEEP_SPACES),
    ("hunyuan", QWEN2, KEEP_SPACES),
    ("hunyuan-dense", DEEPSEEK3, KEEP_SPACES),
    ("hy_v4", DEEPSEEK3, KEEP_SPACES),
    ("joyai-llm", DEEPSEEK3, KEEP_SPACES),
    ("kimi-k2", KIMI_K2, KEEP_SPACES),
    ("ufakzeka", UFAKZEKA, KEEP_SPACES),
    ("grok-2", QWEN2, KEEP_SPACES),
    ("afmoe", AFMOE, KEEP_SPACES),
    ("laguna", LAGUNA, KEEP_SPACES),
    ("minimax-m2", GPT4O, KEEP_SPACES),
    ("solar-open", QWEN2, KEEP_SPACES),
    ("mellum2", DIGIT_GPT2, 0),
];

enum Step {
    Split(Pattern),
    Thousands { digits: Digits, edges: Edges },
}

/// A named pre-tokenizer, ready to cut text.
pub(super) struct PreTokenizer {
    steps: Vec<Step>,
    habits: u16,
}

impl PreTokenizer {
    /// The row of that name.
    pub(super) fn named(name: &str) -> Option<PreTokenizer> {
        let &(_, rules, habits) = ROWS.iter().find(|row| row.0 == name)?;
        let steps = rules.iter().map(|rule| match *rule {
            Rule::Split(source) => Step::Split(Pattern::new(source)),
            Rule::Thousands { digits, edges } => Step::Thousands { digits, edges },
        });
        Some(PreTokenizer { steps: steps.collect(), habits })
    }

    /// Has this pre-tokenizer the habit?
    pub(super) fn has(&self, habit: u16) -> bool {
        self.habits & habit != 0
    }

    /// Ends of the pieces of normalised text, in order; the last is the text's.
    pub(super) fn split(&self, text: &[u8]) -> Vec<usize> {
        let (mut ends, mut stack) = (Vec::from([text.len()]), Stack::default());
        for step in &self.steps {
            let (mut next, mut start) = (Vec::with_capacity(2 * ends.len()), 0);
            for end in ends {
                match step {
                    Step::Split(pattern) => pattern.split(text, start, end, &mut stack, &mut next),
                    &Step::Thousands { digits, edges } => {
                        cut_thousands(digits, edges, text, start, end, &mut next)
                    }
                }
                start = end;
            }
            ends = next;
        }
        ends
    }
}

fn cut_thousands(digits: Digits, edges: Edges, text: &[u8], start: usize, end: usize, ends: &mut Vec<usize>) {
    let is_digit = |c| match digits {
        Digits::Any => unicode::flags(c) & NUMBER != 0,
        Digits::Ascii => (0x30..0x3A).contains(&c),
    };
    let mut pos = start;
    while pos < end {
        // A number's digits are counted before they are cut, since the groups begin at its end.
        let (number, mut n_digits) = (pos, 0);
        while pos < end {
            let (c, len) = decode(text, pos);
            if !is_digit(c) {
                break;
            }
            pos += len;
            n_digits += 1;
        }
        let (number_end, mut at) = (pos, number);
        for left in (1..=n_digits).rev() {
            let before_number = at == number && matches!(edges, Edges::End);
            if left % 3 == 0 && at > start && !before_number {
                ends.push(at);
            }
            at += decode(text, at).1;
        }
        if n_digits > 0 && number_end < end && matches!(edges, Edges::End) {
            ends.push(number_end);
        }
        while pos < end {
            let (c, len) = decode(text, pos);
            if is_digit(c) {
                break;
            }
            pos += len;
        }
    }
    if end > start {
        ends.push(end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces<'t>(name: &str, text: &'t str) -> Vec<&'t str> {
        let mut start = 0;
        let ends = PreTokenizer::named(name).unwrap().split(text.as_bytes());
        ends.into_iter().map(|end| &text[core::mem::replace(&mut start, end)..end]).collect()
    }

    #[test]
    fn every_row_compiles_and_keeps_the_text() {
        let text = "It's 12345 Ünï码 ١٢٣٤\r\n\n\t x\u{3000}IMGIMGABZ<sentinel:7> e\u{301} ok?";
        for (name, ..) in ROWS {
            assert_eq!(pieces(name, text).concat(), text, "{name}");
            assert_eq!(ROWS.iter().filter(|row| row.0 == *name).count(), 1, "{name} has two rows");
        }
        assert!(PreTokenizer::named("gpt-5").is_none());
    }

    #[test]
    fn numbers_in_groups_of_three() {
        let cut = |digits, edges, text: &'static str| {
            let (mut ends, mut start) = (Vec::new(), 0);
            cut_thousands(digits, edges, text.as_bytes(), 0, text.len(), &mut ends);
            ends.into_iter().map(|end| &text[core::mem::replace(&mut start, end)..end]).collect::<Vec<_>>()
        };
        assert_eq!(cut(Digits::Any, Edges::End, "a12345b123"), ["a12", "345", "b123"]);
        assert_eq!(cut(Digits::Any, Edges::End, "1234567"), ["1", "234", "567"]);
        assert_eq!(cut(Digits::Ascii, Edges::WholeGroups, "1234"), ["1", "234"]);
        assert_eq!(cut(Digits::Ascii, Edges::WholeGroups, "١234567"), ["١", "234", "567"]);
        assert_eq!(cut(Digits::Ascii, Edges::WholeGroups, "12"), ["12"]);
    }

    #[test]
    fn published_examples() {
        assert_eq!(pieces("gpt-2", "Hello  world's 12"), ["Hello", " ", " world", "'s", " 12"]);
        assert_eq!(pieces("llama-bpe", "I'LL 1234\n\n x"), ["I", "'LL", " ", "123", "4", "\n\n", " x"]);
        assert_eq!(pieces("smollm", "a 12"), ["a", " ", "1", "2"]);
        assert_eq!(pieces("gpt-4o", "HELLOworld it's"), ["HELLOworld", " it's"]);
    }
}
