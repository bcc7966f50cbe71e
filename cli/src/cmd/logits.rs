//! `logits`: what the model says at every position of a sequence, for comparison with other engines.

use std::io::{BufWriter, Write};

use anyhow::{Result, bail};
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
    let write = |out: &mut dyn Write| -> Result<()> {
        for row in 0..rows {
            let bytes: Vec<u8> = loaded.context.output(row).iter().flat_map(|v| v.to_le_bytes()).collect();
            out.write_all(&bytes)?;
        }
        Ok(out.flush()?)
    };
    if args.out.as_os_str() == "-" {
        write(&mut std::io::stdout().lock())?;
    } else {
        let temporary = Temporary::beside(&args.out)?;
        write(&mut BufWriter::new(&temporary.file))?;
        temporary.rename()?;
    }
    ui::detail(format!("{rows} positions of {} logits", loaded.context.output_cols()));
    Ok(())
}
