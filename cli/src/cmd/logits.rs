//! `logits`: what the model says at every position of a sequence, for comparison with other engines.

use std::io::Write;

use anyhow::{Context, Result, bail};
use engine::Batch;

use crate::args::LogitsArgs;
use crate::quantize::Temporary;
use crate::ui;

/// `logits`.
pub fn run(args: &LogitsArgs) -> Result<()> {
    let mut loaded = args.engine.open(&args.model, None)?;
    let (n, n_ctx) = (args.tokens.len(), loaded.context.n_ctx());
    if n > n_ctx {
        bail!("{n} tokens, the context holds {n_ctx}; raise it with -c {n}");
    }
    let mut batch = Batch::default();
    batch.extend(0, &args.tokens, true);
    let rows = loaded.context.decode(&batch)?;
    let bytes = |row| loaded.context.output(row).iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    if args.out.as_os_str() == "-" {
        (0..rows).try_for_each(|row| ui::out(bytes(row)))?;
    } else {
        let temporary = Temporary::beside(&args.out)?;
        let mut file = &temporary.file;
        let written = (0..rows).try_for_each(|row| file.write_all(&bytes(row)));
        written.with_context(|| args.out.display().to_string())?;
        temporary.rename()?;
    }
    ui::detail(format!("{rows} positions of {} logits", loaded.context.output_cols()));
    Ok(())
}
