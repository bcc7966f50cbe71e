//! The answer to the command line's prompt, on the serial line: the image's proof that it computes what the hosted
//! program does.

use alloc::vec::Vec;

use engine::tokenizer::EncodeOptions;
use engine::{Batch, Context};
use uk_kernel::{clock, say, serial};

/// Answers greedily with at most `n_predict` tokens; text as it comes, then the tokens' numbers on a line of their own.
pub fn answer(
    context: &mut Context,
    prompt: &[u8],
    n_predict: usize,
) -> Result<(), alloc::boxed::Box<dyn core::error::Error>> {
    let model = context.model().clone();
    let tokenizer = model.tokenizer();
    let ids = tokenizer.encode(prompt, EncodeOptions { add_special: true, parse_special: true })?;
    let started = clock::now();
    context.truncate(0, 0);
    context.decode_greedy(&Batch::prompt(0, &ids))?;
    let prefilled = clock::now();
    let mut stream = tokenizer.stream(false);
    let mut tokens: Vec<u32> = Vec::new();
    let mut batch = Batch::default();
    while tokens.len() < n_predict {
        let token = context.token(0);
        if tokenizer.is_eog(token) {
            break;
        }
        tokens.push(token);
        serial::print(format_args!("{}", stream.push(token)));
        if context.seq_len(0) == context.n_ctx() || tokens.len() == n_predict {
            break;
        }
        batch.clear();
        batch.push_generated(0, token);
        context.decode_greedy(&batch)?;
    }
    serial::print(format_args!("{}\n", stream.finish()));
    say!("tokens {tokens:?}");
    say!(
        "{} prompt tokens in {} ms, {} tokens in {} ms",
        ids.len(),
        (prefilled - started).as_millis(),
        tokens.len(),
        (clock::now() - prefilled).as_millis()
    );
    Ok(())
}
