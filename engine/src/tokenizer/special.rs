//! Special tokens: which ids have a role, which end a generation, and where they stand in text.
//!
//! Roles come from the file's keys; some only from a token's name, since many files lack the key. The lists of names
//! are llama.cpp's (src/llama-vocab.cpp). Where several tokens of a list exist, ours takes the first of the list
//! (llama.cpp: the first in its hash map).

use alloc::collections::BTreeSet;
use alloc::vec::Vec;
use core::ops::Range;

use memchr::memmem::Finder;

use super::unicode::is_c_space;
use super::vocab::{TokenAttr, TokenId, Vocab};

/// Tokens with a role.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Beginning of sequence.
    pub bos: Option<TokenId>,
    /// End of sequence.
    pub eos: Option<TokenId>,
    /// End of turn.
    pub eot: Option<TokenId>,
    /// End of message.
    pub eom: Option<TokenId>,
    /// What the vocabulary cannot express.
    pub unk: Option<TokenId>,
    /// Separator.
    pub sep: Option<TokenId>,
    /// Padding.
    pub pad: Option<TokenId>,
    /// Mask.
    pub mask: Option<TokenId>,
    /// Fill in the middle: what comes before the gap.
    pub fim_pre: Option<TokenId>,
    /// Fill in the middle: what comes behind the gap.
    pub fim_suf: Option<TokenId>,
    /// Fill in the middle: the gap.
    pub fim_mid: Option<TokenId>,
    /// Fill in the middle: padding.
    pub fim_pad: Option<TokenId>,
    /// Fill in the middle: name of the repository.
    pub fim_rep: Option<TokenId>,
    /// Fill in the middle: end of a file.
    pub fim_sep: Option<TokenId>,
}

const EOT: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<｜end▁of▁sentence｜>",
    "<end_of_utterance>",
];
const EOM: &[&str] = &["<|eom_id|>"];
const FIM_PRE: &[&str] = &[
    "<|fim_prefix|>",
    "<fim-prefix>",
    "<fim_prefix>",
    "<｜fim▁begin｜>",
    "<PRE>",
    "▁<PRE>",
    "<|code_prefix|>",
    "<|prefix|>",
];
const FIM_SUF: &[&str] = &[
    "<|fim_suffix|>",
    "<fim-suffix>",
    "<fim_suffix>",
    "<｜fim▁hole｜>",
    "<SUF>",
    "▁<SUF>",
    "<|code_suffix|>",
    "<|suffix|>",
];
const FIM_MID: &[&str] = &[
    "<|fim_middle|>",
    "<fim-middle>",
    "<fim_middle>",
    "<｜fim▁end｜>",
    "<MID>",
    "▁<MID>",
    "<|code_middle|>",
    "<|middle|>",
];
const FIM_PAD: &[&str] = &["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"];
const FIM_REP: &[&str] = &["<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"];
const FIM_SEP: &[&str] = &["<|file_sep|>"];
/// Tokens that end a generation by their name alone.
const EOG: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
];
/// Control tokens of gpt-oss that are part of what the model says.
const SHOWN: &[&str] = &["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"];

/// Fills in the roles that only names tell, corrects attributes, and returns the sorted ids that end a generation.
pub(super) fn complete(special: &mut SpecialTokens, vocab: &mut Vocab) -> Vec<TokenId> {
    let set_control = |vocab: &mut Vocab, id| vocab.set_attr(id, vocab.attr(id).with(TokenAttr::CONTROL));
    for (role, names) in [
        (&mut special.eot, EOT),
        (&mut special.eom, EOM),
        (&mut special.fim_pre, FIM_PRE),
        (&mut special.fim_suf, FIM_SUF),
        (&mut special.fim_mid, FIM_MID),
        (&mut special.fim_pad, FIM_PAD),
        (&mut special.fim_rep, FIM_REP),
        (&mut special.fim_sep, FIM_SEP),
    ] {
        if role.is_none()
            && let Some(id) = names.iter().find_map(|name| vocab.id(name.as_bytes()))
        {
            *role = Some(id);
            set_control(vocab, id);
        }
    }
    for id in vocab.ids() {
        let is_unused = || vocab.bytes(id).windows(6).any(|part| part == b"unused");
        if vocab.attr(id).is_any(TokenAttr::CONTROL) && is_unused() {
            vocab.set_attr(id, vocab.attr(id).with(TokenAttr::UNUSED));
        }
    }
    let mut eog: Vec<TokenId> =
        [special.fim_pad, special.fim_rep, special.fim_sep].into_iter().flatten().collect();
    for name in EOG {
        if let Some(id) = vocab.id(name.as_bytes()) {
            set_control(vocab, id);
            eog.push(id);
        }
    }
    for name in SHOWN {
        if let Some(id) = vocab.id(name.as_bytes()) {
            vocab.set_attr(id, TokenAttr::USER_DEFINED);
        }
    }
    eog.extend([special.eos, special.eot, special.eom].into_iter().flatten());

    let ending = |name: &str| vocab.id(name.as_bytes()).filter(|id| eog.contains(id));
    let has = |name: &str| ending(name).is_some();
    // In harmony and solar-open "<|end|>" closes a message, and the model goes on.
    let goes_on = (has("<|call|>") || has("<|calls|>")) && (has("<|return|>") || has("<|flush|>"));
    // Beside these, "</s>" is plain text (gemma4, plamo).
    let plain_s = has("<|tool_response>") || has("<|plamo:eos|>");
    let message_end = ending("<|end|>").filter(|_| goes_on);
    let plain_s = ending("</s>").filter(|_| plain_s);
    for (id, attr) in [(message_end, TokenAttr::USER_DEFINED), (plain_s, TokenAttr::NORMAL)] {
        if let Some(id) = id {
            eog.retain(|&ending| ending != id);
            vocab.set_attr(id, attr);
        }
    }
    eog.sort_unstable();
    eog.dedup();
    eog
}

/// Part of a text to encode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Fragment {
    Text(Range<usize>),
    Token(TokenId),
}

/// Finds special tokens in text.
#[derive(Default)]
pub(super) struct SpecialFinder {
    /// By falling length: llama.cpp looks for longer tokens first, whatever is to their left. Those of one length it
    /// takes in the order of an unstable sort; we take them by id, which differs only where they overlap.
    groups: Vec<Group>,
}

/// The special tokens of one length.
struct Group {
    len: usize,
    first_bytes: Vec<u8>,
    /// Some of them are text, found even where special tokens are not asked for.
    has_user_defined: bool,
}

const NOT_TEXT: TokenAttr = TokenAttr::CONTROL.with(TokenAttr::UNKNOWN);
const SPECIAL: TokenAttr = NOT_TEXT.with(TokenAttr::USER_DEFINED);

/// Is the token one of those that are looked for in text?
pub(super) fn is_special(attr: TokenAttr) -> bool {
    attr.is_any(SPECIAL)
}

/// Is the token no text: control or unknown?
pub(super) fn is_not_text(attr: TokenAttr) -> bool {
    attr.is_any(NOT_TEXT)
}

impl SpecialFinder {
    pub(super) fn new(vocab: &Vocab) -> SpecialFinder {
        let mut groups: Vec<Group> = Vec::new();
        for id in vocab.ids().filter(|&id| is_special(vocab.attr(id))) {
            let bytes = vocab.bytes(id);
            let at = groups.binary_search_by(|group| bytes.len().cmp(&group.len)).unwrap_or_else(|at| {
                groups
                    .insert(at, Group { len: bytes.len(), first_bytes: Vec::new(), has_user_defined: false });
                at
            });
            let group = &mut groups[at];
            if !group.first_bytes.contains(&bytes[0]) {
                group.first_bytes.push(bytes[0]);
            }
            group.has_user_defined |= !is_not_text(vocab.attr(id));
        }
        SpecialFinder { groups }
    }

    /// Cuts the text at special tokens: all of them if `parse_special`, else those that are text.
    pub(super) fn fragments(&self, vocab: &Vocab, text: &[u8], parse_special: bool) -> Vec<Fragment> {
        let mut fragments = Vec::new();
        if !text.is_empty() {
            fragments.push(Fragment::Text(0..text.len()));
        }
        for group in self.groups.iter().filter(|group| parse_special || group.has_user_defined) {
            let is_wanted = |attr| is_special(attr) && (parse_special || !is_not_text(attr));
            let mut present = BTreeSet::new();
            for fragment in &fragments {
                if let Fragment::Text(range) = fragment {
                    let ids = group.occurrences(vocab, &text[range.clone()]);
                    present.extend(ids.filter(|&id| is_wanted(vocab.attr(id))));
                }
            }
            // One token after the other, as each may take white space that another one of them begins with.
            for id in present {
                let finder = Finder::new(vocab.bytes(id));
                let mut cut = Vec::with_capacity(fragments.len());
                for fragment in fragments {
                    match fragment {
                        Fragment::Text(range) => {
                            cut_at_token(text, range, id, vocab.attr(id), &finder, &mut cut)
                        }
                        token => cut.push(token),
                    }
                }
                fragments = cut;
            }
        }
        fragments
    }
}

impl Group {
    /// The tokens of this length at each place of the text.
    fn occurrences(&self, vocab: &Vocab, text: &[u8]) -> impl Iterator<Item = TokenId> {
        let starts = text.get(..(text.len() + 1).saturating_sub(self.len)).unwrap_or_default();
        let mut at = 0;
        core::iter::from_fn(move || {
            at += find_any(&self.first_bytes, &starts[at..])? + 1;
            Some(at - 1)
        })
        .filter_map(|at| vocab.id(&text[at..at + self.len]))
    }
}

fn cut_at_token(
    text: &[u8],
    range: Range<usize>,
    id: TokenId,
    attr: TokenAttr,
    finder: &Finder<'_>,
    out: &mut Vec<Fragment>,
) {
    let Range { mut start, end } = range;
    while let Some(found) = finder.find(&text[start..end]) {
        let (found, after) = (start + found, start + found + finder.needle().len());
        let mut left_end = found;
        if attr.is_any(TokenAttr::LSTRIP) {
            while left_end > start && is_c_space(text[left_end - 1]) {
                left_end -= 1;
            }
        }
        if left_end > start {
            out.push(Fragment::Text(start..left_end));
        }
        out.push(Fragment::Token(id));
        start = after;
        if attr.is_any(TokenAttr::RSTRIP) {
            while start < end && is_c_space(text[start]) {
                start += 1;
            }
        }
    }
    if end > start {
        out.push(Fragment::Text(start..end));
    }
}

fn find_any(needles: &[u8], haystack: &[u8]) -> Option<usize> {
    match *needles {
        [a] => memchr::memchr(a, haystack),
        [a, b] => memchr::memchr2(a, b, haystack),
        [a, b, c] => memchr::memchr3(a, b, c, haystack),
        _ => haystack.iter().position(|byte| needles.contains(byte)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vocab(tokens: &[(&str, TokenAttr)]) -> Vocab {
        let bytes: Vec<&[u8]> = tokens.iter().map(|token| token.0.as_bytes()).collect();
        Vocab::new(bytes.into_iter(), |i| tokens[i].1, Vec::new()).unwrap()
    }

    #[test]
    fn longer_tokens_are_found_first() {
        use Fragment::{Text, Token};
        let vocab = vocab(&[
            ("<a>", TokenAttr::CONTROL),
            (">bcd", TokenAttr::CONTROL),
            ("  ", TokenAttr::USER_DEFINED),
            ("<r>", TokenAttr::CONTROL.with(TokenAttr::RSTRIP).with(TokenAttr::LSTRIP)),
        ]);
        let finder = SpecialFinder::new(&vocab);
        assert_eq!(finder.fragments(&vocab, b"<a>bcd", true), [Text(0..2), Token(1)]);
        assert_eq!(finder.fragments(&vocab, b"x<a>", false), [Text(0..4)]);
        assert_eq!(finder.fragments(&vocab, b"x   y", false), [Text(0..1), Token(2), Text(3..5)]);
        assert_eq!(finder.fragments(&vocab, b" \n<r> \n<r>x", true), [Token(3), Token(3), Text(10..11)]);
        assert_eq!(finder.fragments(&vocab, b"", true), []);
    }

    #[test]
    fn end_of_generation_by_name() {
        let plain =
            [("<|im_end|>", TokenAttr::NORMAL), ("<reponame>", TokenAttr::CONTROL), ("x", TokenAttr::NORMAL)];
        let (mut special, mut smollm) = (SpecialTokens::default(), vocab(&plain));
        assert_eq!(complete(&mut special, &mut smollm), [0, 1]);
        assert_eq!((special.eot, special.fim_rep), (Some(0), Some(1)));
        assert!(smollm.attr(0).is_any(TokenAttr::CONTROL));

        let names =
            ["<|end|>", "<|return|>", "<|call|>", "<|channel|>"].map(|name| (name, TokenAttr::CONTROL));
        let (mut special, mut harmony) = (SpecialTokens::default(), vocab(&names));
        assert_eq!(complete(&mut special, &mut harmony), [1, 2]);
        assert_eq!([0, 3].map(|id| harmony.attr(id)), [TokenAttr::USER_DEFINED; 2]);
    }
}
