//! `perplexity`: how surprised a model is by a text, by llama-perplexity's definition.
//!
//! The text is tokenized with the vocabulary's special tokens added and cut into chunks of `n_ctx` tokens; what is left
//! over is not used. Each chunk runs by itself, its first token replaced by BOS if the vocabulary adds one. Scored are
//! the predictions at positions `n_ctx / 2` to `n_ctx - 2`; perplexity is exp of the mean negative log-likelihood.

use anyhow::{Result, bail};
use engine::Batch;
use engine::context::BatchToken;
use engine::sampler;
use engine::tokenizer::EncodeOptions;
use serde_json::json;

use crate::args::PerplexityArgs;
use crate::ui;

/// Context size of llama-perplexity.
const DEFAULT_CTX: usize = 512;

/// `perplexity`.
pub fn run(args: &PerplexityArgs) -> Result<()> {
    let text = args.text.required()?;
    let mut loaded = args.engine.open(&args.model, Some(DEFAULT_CTX))?;
    let tokenizer = loaded.model.tokenizer();
    let tokens = tokenizer.encode(&text, EncodeOptions { add_special: true, parse_special: false })?;
    let n_ctx = loaded.context.n_ctx();
    if n_ctx < 4 {
        bail!("a context of {n_ctx} leaves nothing to score; at least 4 positions are needed");
    }
    // With one chunk the start of the text would weigh on everything that is scored.
    if tokens.len() < 2 * n_ctx {
        let n = tokens.len();
        bail!(
            "the text has {n} tokens, at least {} are needed for a context of {n_ctx}; lower it with -c",
            2 * n_ctx
        );
    }
    let all = tokens.len() / n_ctx;
    let n_chunks = usize::try_from(args.chunks).map_or(all, |n| all.min(n));
    if n_chunks == 0 {
        bail!("--chunks 0: nothing to score");
    }
    let bos = tokenizer.bos().filter(|_| tokenizer.add_bos());
    let first = n_ctx / 2;
    let (mut sum, mut sum_squares, mut chunk_means) = (0.0, 0.0, Vec::new());
    let bar = ui::fancy() && !args.json;
    for (i, chunk) in tokens.chunks_exact(n_ctx).take(n_chunks).enumerate() {
        let mut batch = Batch::default();
        batch.tokens.extend(chunk.iter().enumerate().map(|(pos, &token)| BatchToken {
            token: bos.filter(|_| pos == 0).unwrap_or(token),
            seq: 0,
            output: (first..n_ctx - 1).contains(&pos),
            generated: false,
        }));
        loaded.context.truncate(0, 0);
        loaded.context.decode(&batch)?;
        let mut of_chunk = 0.0;
        for (row, pos) in (first..n_ctx - 1).enumerate() {
            let nll = -sampler::log_prob(loaded.context.output(row), chunk[pos + 1]);
            of_chunk += nll;
            sum_squares += nll * nll;
        }
        sum += of_chunk;
        chunk_means.push(of_chunk / (n_ctx - 1 - first) as f64);
        let so_far = (sum / ((i + 1) * (n_ctx - 1 - first)) as f64).exp();
        if bar || ui::verbose() {
            ui::say(format!("chunk {} of {n_chunks}: perplexity so far {so_far:.4}", i + 1));
        }
    }
    let n_scored = n_chunks * (n_ctx - 1 - first);
    let nll = sum / n_scored as f64;
    let ppl = nll.exp();
    let variance = (sum_squares / n_scored as f64 - nll * nll).max(0.0);
    let error = ppl * (variance / (n_scored - 1).max(1) as f64).sqrt();
    if args.json {
        return ui::json(&json!({
            "ppl": ppl,
            "ppl_error": error,
            "nll": nll,
            "tokens": tokens.len(),
            "chunks": n_chunks,
            "n_ctx": n_ctx,
            "n_scored": n_scored,
            "chunk_mean_nll": chunk_means,
        }));
    }
    ui::out(format!(
        "perplexity {ppl:.4} +/- {error:.5} ({n_chunks} chunks of {n_ctx} tokens, {n_scored} scored)\n"
    ))
}
