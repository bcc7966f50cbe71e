//! Prompts in, tokens out: what `run` does once a model is loaded.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Result, bail};
use engine::sampler::{self, Sampler};
use engine::{Batch, Context};

use crate::ui;

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The model ended it.
    Eos,
    /// As many tokens as asked for.
    Limit,
    /// No room left.
    Context,
    /// Ctrl-C.
    Interrupted,
}

impl Stop {
    /// The word in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Stop::Eos => "eos",
            Stop::Limit => "limit",
            Stop::Context => "context",
            Stop::Interrupted => "interrupted",
        }
    }
}

/// What an answer came to.
pub struct Answer {
    /// Tokens, without the one that ended it.
    pub tokens: Vec<u32>,
    /// Natural logarithm of each token's probability under the whole softmax; empty unless asked for.
    pub logprobs: Vec<f64>,
    /// Why it ended.
    pub stop: Stop,
    /// Tokens of the prompt computed now; the rest was in the cache.
    pub prompt_n: usize,
    /// Time for them.
    pub prompt_ms: f64,
    /// From the start (of the process for the first answer) to the first token.
    pub ttft_ms: f64,
    /// Time from the first token to the last.
    pub predicted_ms: f64,
}

impl Answer {
    /// Prompt tokens per second.
    pub fn prompt_per_second(&self) -> f64 {
        rate(self.prompt_n, self.prompt_ms)
    }

    /// Tokens per second after the first, which the prompt's time covers.
    pub fn predicted_per_second(&self) -> f64 {
        rate(self.tokens.len().saturating_sub(1), self.predicted_ms)
    }
}

fn rate(n: usize, ms: f64) -> f64 {
    if n > 0 && ms > 0.0 { n as f64 / ms * 1e3 } else { 0.0 }
}

/// What bounds an answer.
pub struct Limits<'a> {
    /// Tokens at most.
    pub n_predict: usize,
    /// Go on after end-of-generation tokens.
    pub ignore_eos: bool,
    /// Note each token's probability.
    pub logprobs: bool,
    /// Set by Ctrl-C.
    pub interrupt: &'a AtomicBool,
    /// When the wait for the first token began.
    pub since: Instant,
}

/// A context and the tokens it holds.
pub struct Session {
    context: Context,
    tokens: Vec<u32>,
    batch: Batch,
}

impl Session {
    /// An empty one.
    pub fn new(context: Context) -> Session {
        Session { context, tokens: Vec::new(), batch: Batch::default() }
    }

    /// Positions there are.
    pub fn n_ctx(&self) -> usize {
        self.context.n_ctx()
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.context.truncate(0, 0);
        self.tokens.clear();
    }

    /// Answers a prompt. What it shares with the one before is not computed again. `emit` gets each token as it comes.
    pub fn answer(
        &mut self,
        prompt: &[u32],
        sampler: &mut Sampler,
        limits: &Limits<'_>,
        emit: impl FnMut(u32) -> Result<()>,
    ) -> Result<Answer> {
        let n_ctx = self.n_ctx();
        if prompt.is_empty() {
            bail!("the prompt has no tokens");
        }
        if prompt.len() >= n_ctx && limits.n_predict > 0 || prompt.len() > n_ctx {
            let n = prompt.len();
            bail!(
                "the prompt has {n} tokens, the context {n_ctx}: nothing is left for an answer; raise it with -c"
            );
        }
        // The last token is always computed: its logits are wanted.
        let known = self.tokens.iter().zip(prompt).take_while(|(a, b)| a == b).count().min(prompt.len() - 1);
        self.context.truncate(0, known);
        self.tokens.truncate(known);
        prompt.iter().for_each(|&t| sampler.accept(t));
        let started = Instant::now();
        let first = self.next_token(&Batch::prompt(0, &prompt[known..]), sampler, limits)?;
        self.tokens.extend_from_slice(&prompt[known..]);
        let mut answer = Answer {
            tokens: Vec::new(),
            logprobs: Vec::new(),
            stop: Stop::Limit,
            prompt_n: prompt.len() - known,
            prompt_ms: ui::ms(started.elapsed()),
            ttft_ms: 0.0,
            predicted_ms: 0.0,
        };
        self.generate(&mut answer, first, sampler, limits, emit)?;
        Ok(answer)
    }

    /// Goes on from the first token, which is drawn but not run yet, until something ends the answer.
    fn generate(
        &mut self,
        answer: &mut Answer,
        first: u32,
        sampler: &mut Sampler,
        limits: &Limits<'_>,
        mut emit: impl FnMut(u32) -> Result<()>,
    ) -> Result<()> {
        let model = self.context.model().clone();
        let n_ctx = self.n_ctx();
        let mut token = first;
        let mut started = None;
        while answer.tokens.len() < limits.n_predict {
            if limits.interrupt.load(Ordering::Relaxed) {
                answer.stop = Stop::Interrupted;
                break;
            }
            let started = *started.get_or_insert_with(Instant::now);
            if answer.ttft_ms == 0.0 {
                answer.ttft_ms = ui::ms(limits.since.elapsed());
            }
            answer.predicted_ms = ui::ms(started.elapsed());
            if model.tokenizer().is_eog(token) && !limits.ignore_eos {
                answer.stop = Stop::Eos;
                break;
            }
            if limits.logprobs {
                answer.logprobs.push(sampler::log_prob(self.context.output(0), token));
            }
            sampler.accept(token);
            answer.tokens.push(token);
            emit(token)?;
            if answer.tokens.len() == limits.n_predict {
                break;
            }
            if self.tokens.len() >= n_ctx {
                answer.stop = Stop::Context;
                break;
            }
            let mut batch = std::mem::take(&mut self.batch);
            batch.clear();
            batch.push_generated(0, token);
            let next = self.next_token(&batch, sampler, limits)?;
            self.batch = batch;
            self.tokens.push(token);
            token = next;
        }
        Ok(())
    }

    /// Runs a batch with one output and draws its token. If probabilities are asked for it is drawn from the logits, which
    /// stay in the context; otherwise the device may draw it and keep the logits.
    fn next_token(&mut self, batch: &Batch, sampler: &mut Sampler, limits: &Limits<'_>) -> Result<u32> {
        if limits.logprobs {
            self.context.decode(batch)?;
            return Ok(sampler.sample(self.context.output(0)));
        }
        self.context.decode_sampled(batch, &mut [sampler])?;
        Ok(self.context.token(0))
    }
}
