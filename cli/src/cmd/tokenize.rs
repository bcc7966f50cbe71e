//! `tokenize` and `detokenize`: text to ids and back, from the vocabulary alone.
//!
//! As in llama-tokenize, the tokens that the vocabulary wants at the ends are added (`--no-bos` leaves them out), and
//! names of special tokens are plain text unless `--special` is given.

use anyhow::Result;
use engine::tokenizer::{DecodeOptions, EncodeOptions};
use serde_json::json;

use crate::args::{DetokenizeArgs, TokenizeArgs};
use crate::exit::usage;
use crate::load::Files;
use crate::ui;

/// `tokenize`.
pub fn tokenize(args: &TokenizeArgs) -> Result<()> {
    let files = Files::open(&args.model)?;
    let text = args.text.required()?;
    let tokenizer = files.tokenizer()?;
    let options = EncodeOptions { add_special: !args.no_bos, parse_special: args.special };
    let tokens = tokenizer.encode(&text, options)?;
    if args.json {
        return ui::json(&json!({ "tokens": tokens }));
    }
    let line = |&id: &u32| {
        format!("{id:>6} -> '{}'\n", String::from_utf8_lossy(&tokenizer.piece(id, true)).escape_debug())
    };
    ui::out(tokens.iter().map(line).collect::<String>())
}

/// `detokenize`.
pub fn detokenize(args: &DetokenizeArgs) -> Result<()> {
    let tokenizer = Files::open(&args.model)?.tokenizer()?;
    let n_vocab = tokenizer.n_vocab();
    if let Some(id) = args.tokens.iter().find(|&&id| id as usize >= n_vocab) {
        return Err(usage(format!("token {id}: the vocabulary has {n_vocab} tokens, from 0")));
    }
    let options = DecodeOptions { remove_special: false, unparse_special: !args.no_special };
    ui::out(tokenizer.decode(&args.tokens, options))
}
