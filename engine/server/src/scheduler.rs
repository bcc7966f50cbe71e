//! Continuous batching: each step runs one batch that mixes the next token of every answer under way with pieces of the
//! prompts that wait, over one context.
//!
//! An answer does not depend on its batch mates: the engine gives a sequence the same bits whatever else is in the
//! batch, and each job has a sampler of its own. For the same reason a job may start from what its sequence still holds
//! of an earlier prompt. Answers come before prompts in a batch, so a long prompt slows the others by at most one batch.

use alloc::collections::VecDeque;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use engine::sampler::{self, Sampler, SamplerParams};
use engine::tokenizer::StreamDecoder;
use engine::{Batch, Context, EngineError, Model};

/// Names a job.
pub type JobId = u64;

/// What is to be answered, and how.
#[derive(Clone, Debug)]
pub struct Job {
    /// Tokens of the prompt: at least one, fewer than the context's positions.
    pub prompt: Vec<u32>,
    /// How to sample.
    pub sampling: SamplerParams,
    /// Tokens of the answer at most; at least one.
    pub max_tokens: usize,
    /// Texts that end the answer and are no part of it.
    pub stop: Vec<String>,
    /// Go on after end-of-generation tokens.
    pub ignore_eos: bool,
    /// Note probabilities, with those of so many of the likeliest tokens.
    pub logprobs: Option<usize>,
}

/// A token and its probability.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub token: u32,
    /// Natural logarithm of its probability under the whole softmax.
    pub logprob: f64,
    /// The likeliest tokens, the likeliest first.
    pub top: Vec<(u32, f64)>,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model ended it, or a stop text came.
    Stop,
    /// As many tokens as asked for, or the context is full, or the answer is as long as the server lets it be.
    Length,
}

/// What an answer came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// Why it ended.
    pub finish: Finish,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Those of them that the cache held already.
    pub cached_tokens: usize,
    /// Tokens of the answer, without the one that ended it.
    pub completion_tokens: usize,
}

/// News of a job.
#[derive(Clone, Debug)]
pub struct Event {
    /// Which.
    pub job: JobId,
    /// New text; no part of a stop text, perhaps empty.
    pub text: String,
    /// The new token, if probabilities were asked for.
    pub logprob: Option<TokenLogprob>,
    /// Set by the last event.
    pub end: Option<Result<End, EngineError>>,
}

/// What a step did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepCount {
    /// Tokens of prompts.
    pub prefill: usize,
    /// Tokens of answers.
    pub decode: usize,
    /// New tokens of answers.
    pub predicted: usize,
}

struct Active<'m> {
    id: JobId,
    job: Job,
    seq: usize,
    /// Tokens of the prompt found in the cache.
    cached: usize,
    sampler: Sampler,
    decoder: StreamDecoder<'m>,
    /// Text that may be the beginning of a stop text.
    held: String,
    /// Sampled, not yet run.
    next: Option<u32>,
    n_answer: usize,
}

/// The jobs of one context.
pub struct Scheduler<'m> {
    model: &'m Model,
    context: Context,
    n_batch: usize,
    next_id: JobId,
    queue: VecDeque<(JobId, Job)>,
    active: Vec<Active<'m>>,
    /// What each sequence of the cache holds.
    tokens: Vec<Vec<u32>>,
    batch: Batch,
    /// For each output of the batch, the index in `active`.
    rows: Vec<usize>,
}

impl<'m> Scheduler<'m> {
    /// A scheduler over a context of `n_seq` sequences, with about `n_batch` tokens in a batch.
    pub fn new(model: &'m Model, context: Context, n_seq: usize, n_batch: usize) -> Scheduler<'m> {
        Scheduler {
            model,
            context,
            n_batch: n_batch.max(1),
            next_id: 0,
            queue: VecDeque::new(),
            active: Vec::new(),
            tokens: alloc::vec![Vec::new(); n_seq],
            batch: Batch::default(),
            rows: Vec::new(),
        }
    }

    /// Positions of a sequence.
    pub fn n_ctx(&self) -> usize {
        self.context.n_ctx()
    }

    /// Jobs that compute.
    pub fn n_active(&self) -> usize {
        self.active.len()
    }

    /// Jobs that wait for a sequence.
    pub fn n_queued(&self) -> usize {
        self.queue.len()
    }

    /// Positions in use over positions there are.
    pub fn kv_usage(&self) -> f64 {
        let used: usize = self.tokens.iter().map(Vec::len).sum();
        used as f64 / (self.context.n_ctx() * self.tokens.len()) as f64
    }

    /// Takes a job; events will name it.
    pub fn submit(&mut self, job: Job) -> JobId {
        assert!(!job.prompt.is_empty() && job.prompt.len() < self.n_ctx(), "a prompt that leaves room");
        assert!(job.max_tokens > 0, "something to generate");
        let id = self.next_id;
        self.next_id += 1;
        self.queue.push_back((id, job));
        id
    }

    /// Forgets a job; no event of it comes any more, and its sequence is free at once.
    pub fn cancel(&mut self, id: JobId) {
        self.queue.retain(|(queued, _)| *queued != id);
        self.active.retain(|a| a.id != id);
    }

    /// Ends a job that computes, as if it had as many tokens as asked for; what it comes to. `None`: it does not compute.
    pub fn cut_short(&mut self, id: JobId) -> Option<Event> {
        let at = self.active.iter().position(|a| a.id == id)?;
        let mut active = self.active.remove(at);
        let text = active.rest();
        Some(active.event(text, None, Some(Finish::Length)))
    }

    /// Whether a step has something to do.
    pub fn has_work(&self) -> bool {
        !self.active.is_empty() || !self.queue.is_empty()
    }

    /// Runs one batch and adds what came of it to `events`.
    pub fn step(&mut self, events: &mut Vec<Event>) -> StepCount {
        while self.active.len() < self.tokens.len() {
            let Some((id, job)) = self.queue.pop_front() else { break };
            self.admit(id, job);
        }
        let mut count = self.fill_batch();
        if self.batch.tokens.is_empty() {
            return count;
        }
        // Probabilities are those of all logits; where nobody asks, the device may draw and keep the logits.
        let from_logits = self.rows.iter().any(|&i| self.active[i].job.logprobs.is_some());
        let result = match from_logits {
            true => self.context.decode(&self.batch),
            false => {
                let mut samplers: Vec<(usize, &mut Sampler)> = Vec::with_capacity(self.rows.len());
                for (i, active) in self.active.iter_mut().enumerate() {
                    let row = self.rows.iter().position(|&row| row == i);
                    samplers.extend(row.map(|row| (row, &mut active.sampler)));
                }
                samplers.sort_unstable_by_key(|(row, _)| *row);
                let mut samplers: Vec<&mut Sampler> =
                    samplers.into_iter().map(|(_, sampler)| sampler).collect();
                self.context.decode_sampled(&self.batch, &mut samplers)
            }
        };
        if let Err(error) = result {
            // The sequences are as before, but would fail again: the jobs end, the server goes on.
            events.extend(self.active.drain(..).map(|a| Event {
                job: a.id,
                text: String::new(),
                logprob: None,
                end: Some(Err(error.clone())),
            }));
            return StepCount::default();
        }
        for t in &self.batch.tokens {
            self.tokens[t.seq].push(t.token);
        }
        let n_ctx = self.context.n_ctx();
        for (row, &i) in self.rows.iter().enumerate() {
            let active = &mut self.active[i];
            let full = self.tokens[active.seq].len() >= n_ctx;
            let picked = match from_logits {
                true => Picked::Logits(self.context.output(row)),
                false => Picked::Token(self.context.token(row)),
            };
            let before = active.n_answer;
            events.push(active.take(picked, self.model, full));
            count.predicted += active.n_answer - before;
        }
        let ended = |id| events.iter().any(|e| e.job == id && e.end.is_some());
        self.active.retain(|a| !ended(a.id));
        count
    }

    /// Gives a job the free sequence that holds most of its prompt.
    fn admit(&mut self, id: JobId, job: Job) {
        // The last token is always computed: its logits are wanted.
        let most = job.prompt.len() - 1;
        let shared = |held: &[u32]| held.iter().zip(&job.prompt[..most]).take_while(|(a, b)| a == b).count();
        let is_free = |seq: usize| self.active.iter().all(|a| a.seq != seq);
        // Among equals the sequence that loses the fewest tokens.
        let best = (0..self.tokens.len())
            .filter(|&seq| is_free(seq))
            .max_by_key(|&seq| (shared(&self.tokens[seq]), core::cmp::Reverse(self.tokens[seq].len())))
            .expect("fewer jobs than sequences");
        let cached = shared(&self.tokens[best]);
        self.context.truncate(best, cached);
        self.tokens[best].truncate(cached);
        let mut sampler = Sampler::new(job.sampling.clone());
        job.prompt.iter().for_each(|&t| sampler.accept(t));
        self.active.push(Active {
            id,
            job,
            seq: best,
            cached,
            sampler,
            decoder: self.model.tokenizer().stream(false),
            held: String::new(),
            next: None,
            n_answer: 0,
        });
    }

    fn fill_batch(&mut self) -> StepCount {
        self.batch.clear();
        self.rows.clear();
        for (i, a) in self.active.iter().enumerate() {
            if let Some(token) = a.next {
                self.batch.push_generated(a.seq, token);
                self.rows.push(i);
            }
        }
        let decode = self.batch.tokens.len();
        // Prompts go on even if the answers fill a batch.
        let mut room = self.n_batch.saturating_sub(decode).max(1);
        for (i, a) in self.active.iter().enumerate().filter(|(_, a)| a.next.is_none()) {
            let rest = &a.job.prompt[self.tokens[a.seq].len()..];
            let n = rest.len().min(room);
            if n == 0 {
                break;
            }
            room -= n;
            self.batch.extend(a.seq, &rest[..n], false);
            if n == rest.len() {
                self.batch.tokens.last_mut().expect("n > 0").output = true;
                self.rows.push(i);
            }
        }
        StepCount { prefill: self.batch.tokens.len() - decode, decode, predicted: 0 }
    }
}

/// What a step gives a job.
enum Picked<'a> {
    /// The token drawn.
    Token(u32),
    /// All logits.
    Logits(&'a [f32]),
}

impl Active<'_> {
    /// Takes a token and says what that comes to. `full`: the sequence has no room for it.
    fn take(&mut self, picked: Picked<'_>, model: &Model, full: bool) -> Event {
        let token = match picked {
            Picked::Token(token) => token,
            Picked::Logits(logits) => self.sampler.sample(logits),
        };
        if model.tokenizer().is_eog(token) && !self.job.ignore_eos {
            let text = self.rest();
            return self.event(text, None, Some(Finish::Stop));
        }
        let logprob = match picked {
            Picked::Token(_) => None,
            Picked::Logits(logits) => self.job.logprobs.map(|n| token_logprob(logits, token, n)),
        };
        self.sampler.accept(token);
        self.n_answer += 1;
        self.next = Some(token);
        let new = self.decoder.push(token).to_string();
        if let Some(text) = self.stopped_by(&new) {
            return self.event(text, logprob, Some(Finish::Stop));
        }
        if self.n_answer == self.job.max_tokens || full {
            let text = self.rest();
            return self.event(text, logprob, Some(Finish::Length));
        }
        let keep = held_back(&self.held, &self.job.stop);
        let text = self.held.drain(..self.held.len() - keep).collect();
        self.event(text, logprob, None)
    }

    /// Adds new text; if a stop text is in it now, what comes before that.
    fn stopped_by(&mut self, new: &str) -> Option<String> {
        self.held.push_str(new);
        let at = self.job.stop.iter().filter_map(|s| self.held.find(s.as_str())).min()?;
        self.held.truncate(at);
        Some(core::mem::take(&mut self.held))
    }

    /// All text that is left at the end.
    fn rest(&mut self) -> String {
        let last = self.decoder.finish().to_string();
        self.stopped_by(&last).unwrap_or_else(|| core::mem::take(&mut self.held))
    }

    fn event(&self, text: String, logprob: Option<TokenLogprob>, finish: Option<Finish>) -> Event {
        let end = finish.map(|finish| {
            Ok(End {
                finish,
                prompt_tokens: self.job.prompt.len(),
                cached_tokens: self.cached,
                completion_tokens: self.n_answer,
            })
        });
        Event { job: self.id, text, logprob, end }
    }
}

/// Bytes at the end of `text` that may begin a stop text.
fn held_back(text: &str, stop: &[String]) -> usize {
    let begins = |s: &String| {
        (1..s.len().min(text.len() + 1)).rev().find(|&n| text.as_bytes().ends_with(&s.as_bytes()[..n]))
    };
    // A match ends with whole characters of `text`, and begins one, as a stop text does.
    stop.iter().filter_map(begins).max().unwrap_or(0)
}

fn token_logprob(logits: &[f32], token: u32, n_top: usize) -> TokenLogprob {
    let sum = sampler::log_sum_exp(logits);
    let mut top: Vec<(u32, f64)> = Vec::new();
    if n_top > 0 {
        let mut order: Vec<u32> =
            (0..logits.len() as u32).filter(|&i| !logits[i as usize].is_nan()).collect();
        let by_logit = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        if n_top < order.len() {
            order.select_nth_unstable_by(n_top, by_logit);
            order.truncate(n_top);
        }
        order.sort_unstable_by(by_logit);
        top.extend(order.iter().map(|&i| (i, logits[i as usize] as f64 - sum)));
    }
    TokenLogprob { token, logprob: sampler::log_prob(logits, token), top }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_that_may_begin_a_stop_text_is_held_back() {
        let stops = ["</s>".to_string(), "é!".to_string(), "\n\n".to_string()];
        assert_eq!(held_back("abc", &stops), 0);
        assert_eq!(held_back("abc<", &stops), 1);
        assert_eq!(held_back("abc</s", &stops), 3);
        assert_eq!(held_back("<a", &stops), 0);
        assert_eq!(held_back("caf\u{e9}", &stops), 2);
        assert_eq!(held_back("\n", &stops), 1);
        assert_eq!(held_back("", &stops), 0);
    }
}
