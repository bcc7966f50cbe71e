//! From logits to a token: penalties → top-k → top-p → min-p → temperature → draw, llama.cpp's order and defaults.
//!
//! Each step only narrows or rescales a list of candidates, so a step that is off costs nothing. Temperature 0 or less
//! takes the likeliest token (the lowest id on ties) after the penalties. A sampler allocates for the vocabulary at its
//! first token and never again.

mod rng;

use alloc::vec::Vec;
use core::cmp::Ordering;

pub use rng::Rng;

/// How to sample.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplerParams {
    /// Temperature; 0 or less = greedy.
    pub temp: f32,
    /// Keep this many of the likeliest; 0 = all.
    pub top_k: usize,
    /// Keep the likeliest until their probabilities sum to this; 1 = all.
    pub top_p: f32,
    /// Keep what is at least this fraction as likely as the likeliest; 0 = all.
    pub min_p: f32,
    /// Divides positive logits of recent tokens and multiplies negative ones; 1 = off.
    pub repeat_penalty: f32,
    /// Subtracted from a recent token's logit for each time it occurred; 0 = off.
    pub frequency_penalty: f32,
    /// Subtracted from a recent token's logit once; 0 = off.
    pub presence_penalty: f32,
    /// How many tokens are recent; 0 = none.
    pub repeat_last_n: usize,
    /// Seed of the draw.
    pub seed: u64,
}

impl Default for SamplerParams {
    fn default() -> Self {
        SamplerParams {
            temp: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            repeat_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            repeat_last_n: 64,
            seed: 0,
        }
    }
}

impl SamplerParams {
    /// Whether recent tokens change anything.
    pub fn has_penalties(&self) -> bool {
        self.repeat_last_n > 0
            && (self.repeat_penalty != 1.0 || self.frequency_penalty != 0.0 || self.presence_penalty != 0.0)
    }

    /// Whether the choice is always the largest logit: what a backend can do where the logits are.
    pub fn is_argmax(&self) -> bool {
        self.temp <= 0.0 && !self.has_penalties()
    }
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    id: u32,
    logit: f32,
}

/// Likeliest first, the lower id on ties; NaN last.
fn by_likelihood(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit
        .partial_cmp(&a.logit)
        .unwrap_or_else(|| a.logit.is_nan().cmp(&b.logit.is_nan()))
        .then(a.id.cmp(&b.id))
}

/// A chain of samplers with its memory of recent tokens.
#[derive(Clone, Debug)]
pub struct Sampler {
    params: SamplerParams,
    rng: Rng,
    candidates: Vec<Candidate>,
    /// Probabilities of the candidates that are left, up to a common factor.
    weights: Vec<f32>,
    /// The last `repeat_last_n` tokens, a ring.
    recent: Vec<u32>,
    next_recent: usize,
    /// `recent`, sorted.
    sorted: Vec<u32>,
}

impl Sampler {
    /// A sampler without memory.
    pub fn new(params: SamplerParams) -> Sampler {
        let rng = Rng::new(params.seed);
        Sampler {
            rng,
            candidates: Vec::new(),
            weights: Vec::new(),
            recent: Vec::new(),
            next_recent: 0,
            sorted: Vec::new(),
            params,
        }
    }

    /// The parameters it was made with.
    pub fn params(&self) -> &SamplerParams {
        &self.params
    }

    /// Remembers a token of the prompt or of the answer for the penalties.
    pub fn accept(&mut self, token: u32) {
        if !self.params.has_penalties() {
            return;
        }
        if self.recent.len() < self.params.repeat_last_n {
            self.recent.push(token);
        } else {
            self.recent[self.next_recent] = token;
            self.next_recent = (self.next_recent + 1) % self.recent.len();
        }
    }

    /// The recent tokens that penalties count; none where there are no penalties.
    pub fn recent(&self) -> &[u32] {
        &self.recent
    }

    /// The generator as the next draw finds it.
    pub fn rng(&self) -> &Rng {
        &self.rng
    }

    /// Moves the generator on as [`Sampler::sample`] does, whose work was done elsewhere.
    pub fn skip(&mut self) {
        if self.params.temp > 0.0 {
            self.rng.next_u64();
        }
    }

    /// Picks a token. `logits` holds one value per token of the vocabulary; NaN counts as impossible.
    pub fn sample(&mut self, logits: &[f32]) -> u32 {
        assert!(!logits.is_empty(), "a vocabulary");
        self.candidates.clear();
        self.candidates.extend((0..).zip(logits).map(|(id, &logit)| Candidate { id, logit }));
        if self.params.has_penalties() {
            self.penalise();
        }
        // partial_cmp's order puts NaN last, so the least candidate is the greedy choice.
        if self.params.temp <= 0.0 {
            return self.candidates.iter().min_by(|a, b| by_likelihood(a, b)).map_or(0, |c| c.id);
        }
        self.keep_top_k();
        self.keep_top_p();
        self.keep_min_p();
        self.draw()
    }

    fn penalise(&mut self) {
        self.sorted.clear();
        self.sorted.extend_from_slice(&self.recent);
        self.sorted.sort_unstable();
        for run in self.sorted.chunk_by(|a, b| a == b) {
            let Some(candidate) = self.candidates.get_mut(run[0] as usize) else { continue };
            let p = &self.params;
            candidate.logit = if candidate.logit <= 0.0 {
                candidate.logit * p.repeat_penalty
            } else {
                candidate.logit / p.repeat_penalty
            };
            candidate.logit -= run.len() as f32 * p.frequency_penalty + p.presence_penalty;
        }
    }

    /// Keeps the k likeliest, sorted.
    fn keep_top_k(&mut self) {
        let k = if self.params.top_k == 0 { usize::MAX } else { self.params.top_k };
        if k < self.candidates.len() {
            self.candidates.select_nth_unstable_by(k, by_likelihood);
            self.candidates.truncate(k);
        }
        self.candidates.sort_unstable_by(by_likelihood);
        while self.candidates.len() > 1 && self.candidates.last().is_some_and(|c| c.logit.is_nan()) {
            self.candidates.pop();
        }
    }

    /// `weights[i] = exp((logit[i] - max) / temp)`; their sum.
    fn weigh(&mut self, temp: f32) -> f64 {
        let max = self.candidates[0].logit;
        self.weights.clear();
        self.weights.extend(self.candidates.iter().map(|c| {
            // Equal infinities would give NaN; they are all as likely as the first.
            if c.logit == max { 1.0 } else { libm::expf((c.logit - max) / temp) }
        }));
        self.weights.iter().map(|&w| w as f64).sum()
    }

    fn keep_top_p(&mut self) {
        if self.params.top_p >= 1.0 {
            return;
        }
        let limit = self.weigh(1.0) * self.params.top_p as f64;
        let mut sum = 0.0;
        let reached = self.weights.iter().position(|&w| {
            sum += w as f64;
            sum >= limit
        });
        self.candidates.truncate(reached.map_or(self.candidates.len(), |i| i + 1));
    }

    fn keep_min_p(&mut self) {
        if self.params.min_p <= 0.0 {
            return;
        }
        let least = self.candidates[0].logit + libm::logf(self.params.min_p);
        // Sorted, so what is too unlikely is a tail; the likeliest always stays.
        let keep = self.candidates.partition_point(|c| c.logit >= least);
        self.candidates.truncate(keep.max(1));
    }

    fn draw(&mut self) -> u32 {
        let sum = self.weigh(self.params.temp);
        let mut left = self.rng.next_f64() * sum;
        for (candidate, &weight) in self.candidates.iter().zip(&self.weights) {
            left -= weight as f64;
            if left < 0.0 {
                return candidate.id;
            }
        }
        // Only rounding leads here.
        self.candidates.last().map_or(0, |c| c.id)
    }
}

/// The index of the largest value, the lowest on ties; NaN is never the largest.
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, &logit) in logits.iter().enumerate() {
        if logit > logits[best] || logits[best].is_nan() {
            best = i;
        }
    }
    best as u32
}

/// `ln Σ exp(logit)` in f64.
pub fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
    if !max.is_finite() {
        return max;
    }
    max + libm::log(logits.iter().map(|&l| libm::exp(l as f64 - max)).sum())
}

/// Natural logarithm of a token's probability under softmax of all logits.
pub fn log_prob(logits: &[f32], token: u32) -> f64 {
    logits[token as usize] as f64 - log_sum_exp(logits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn greedy() -> SamplerParams {
        SamplerParams { temp: 0.0, ..SamplerParams::default() }
    }

    /// All tokens, none cut off.
    fn plain() -> SamplerParams {
        SamplerParams { temp: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, ..SamplerParams::default() }
    }

    /// The tokens that many draws give, and how often.
    fn drawn(params: SamplerParams, logits: &[f32], n: usize) -> Vec<usize> {
        let mut counts = alloc::vec![0; logits.len()];
        let mut sampler = Sampler::new(params);
        for _ in 0..n {
            counts[sampler.sample(logits) as usize] += 1;
        }
        counts
    }

    fn support(params: SamplerParams, logits: &[f32]) -> Vec<usize> {
        let counts = drawn(params, logits, 4000);
        (0..logits.len()).filter(|&i| counts[i] > 0).collect()
    }

    const LOGITS: [f32; 6] = [1.0, 3.0, -2.0, 2.5, 3.0, 0.0];

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        assert_eq!(Sampler::new(greedy()).sample(&LOGITS), 1);
        assert_eq!(argmax(&LOGITS), 1);
        assert_eq!(argmax(&[f32::NAN, -1.0, f32::NAN, -0.5]), 3);
        assert_eq!(Sampler::new(greedy()).sample(&[f32::NAN, -1.0, f32::NAN, -0.5]), 3);
    }

    #[test]
    fn top_k_keeps_k() {
        assert_eq!(support(SamplerParams { top_k: 3, ..plain() }, &LOGITS), [1, 3, 4]);
        assert_eq!(support(SamplerParams { top_k: 1, ..plain() }, &LOGITS), [1]);
    }

    #[test]
    fn top_p_keeps_the_smallest_set_that_reaches_p() {
        // Probabilities of 0.5, 0.3, 0.15, 0.05.
        let logits = [0.5f32, 0.3, 0.15, 0.05].map(|p| p.ln());
        assert_eq!(support(SamplerParams { top_p: 0.79, ..plain() }, &logits), [0, 1]);
        assert_eq!(support(SamplerParams { top_p: 0.81, ..plain() }, &logits), [0, 1, 2]);
        assert_eq!(support(SamplerParams { top_p: 0.0, ..plain() }, &logits), [0]);
    }

    #[test]
    fn min_p_is_relative_to_the_likeliest() {
        let logits = [0.5f32, 0.3, 0.15, 0.05].map(|p| p.ln());
        assert_eq!(support(SamplerParams { min_p: 0.59, ..plain() }, &logits), [0, 1]);
        assert_eq!(support(SamplerParams { min_p: 0.29, ..plain() }, &logits), [0, 1, 2]);
        assert_eq!(support(SamplerParams { min_p: 2.0, ..plain() }, &logits), [0]);
    }

    #[test]
    fn draws_follow_softmax_at_the_temperature() {
        let n = 40_000;
        for temp in [0.5f32, 1.0, 2.0] {
            let counts = drawn(SamplerParams { temp, ..plain() }, &LOGITS, n);
            let scaled = LOGITS.map(|l| l / temp);
            for (i, &count) in counts.iter().enumerate() {
                let p = log_prob(&scaled, i as u32).exp();
                let got = count as f64 / n as f64;
                assert!((got - p).abs() < 0.012, "temp {temp} token {i}: {got} for {p}");
            }
        }
    }

    #[test]
    fn penalties_act_on_recent_tokens_only() {
        let params = SamplerParams { repeat_penalty: 2.0, repeat_last_n: 2, ..greedy() };
        let mut sampler = Sampler::new(params);
        sampler.accept(1);
        assert_eq!(sampler.sample(&LOGITS), 4, "3.0 / 2 is below 3.0");
        sampler.accept(4);
        assert_eq!(sampler.sample(&LOGITS), 3);
        sampler.accept(3);
        assert_eq!(sampler.sample(&LOGITS), 1, "1 is forgotten after two more tokens");

        let negative = [-1.0, -1.5];
        let mut sampler = Sampler::new(SamplerParams { repeat_penalty: 2.0, ..greedy() });
        sampler.accept(0);
        assert_eq!(sampler.sample(&negative), 1, "a negative logit is multiplied");

        let mut sampler = Sampler::new(SamplerParams { frequency_penalty: 0.3, ..greedy() });
        sampler.accept(1);
        sampler.accept(1);
        sampler.accept(4);
        assert_eq!(sampler.sample(&LOGITS), 4, "2.4 against 2.7");
        let mut sampler = Sampler::new(SamplerParams { presence_penalty: 0.6, ..greedy() });
        sampler.accept(1);
        sampler.accept(4);
        assert_eq!(sampler.sample(&LOGITS), 3);
    }

    #[test]
    fn same_seed_same_tokens_and_no_growth() {
        let params = SamplerParams { seed: 42, repeat_penalty: 1.1, ..SamplerParams::default() };
        let logits: Vec<f32> = (0..1000).map(|i| ((i * 37) % 101) as f32 / 10.0).collect();
        let run = |sampler: &mut Sampler| {
            (0..50)
                .map(|_| {
                    let token = sampler.sample(&logits);
                    sampler.accept(token);
                    token
                })
                .collect::<Vec<_>>()
        };
        let (mut a, mut b) = (Sampler::new(params.clone()), Sampler::new(params.clone()));
        assert_eq!(run(&mut a), run(&mut b));
        assert_ne!(run(&mut a), run(&mut Sampler::new(SamplerParams { seed: 43, ..params })));
        let before = (a.candidates.capacity(), a.weights.capacity());
        run(&mut a);
        assert_eq!(before, (a.candidates.capacity(), a.weights.capacity()));
    }

    proptest! {
        /// Any floats at all, and any parameters: a token of the vocabulary, no panic.
        #[test]
        fn any_logits_give_a_token(
            bits in proptest::collection::vec(any::<u32>(), 1..50),
            temp in -1.0f32..3.0, top_k in 0usize..60, top_p in -0.5f32..1.5, min_p in -0.5f32..1.5,
            repeat in 0.5f32..2.0, seed in any::<u64>(),
        ) {
            let logits: Vec<f32> = bits.iter().map(|&b| f32::from_bits(b)).collect();
            let params = SamplerParams { temp, top_k, top_p, min_p, repeat_penalty: repeat, seed, ..plain() };
            let mut sampler = Sampler::new(params);
            for _ in 0..4 {
                let token = sampler.sample(&logits);
                prop_assert!((token as usize) < logits.len());
                sampler.accept(token);
            }
        }

        /// What is drawn is within what top-k, top-p and min-p leave by their plain definitions.
        #[test]
        fn draws_stay_within_the_plain_definition(
            logits in proptest::collection::vec(-8.0f32..8.0, 2..40),
            top_k in 1usize..20, top_p in 0.05f32..0.99, min_p in 0.01f32..0.5, seed in any::<u64>(),
        ) {
            let mut order: Vec<usize> = (0..logits.len()).collect();
            order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
            order.truncate(top_k);
            let sum: f64 = order.iter().map(|&i| (logits[i] as f64).exp()).sum();
            let mut reached = 0.0;
            let mut allowed = Vec::new();
            for &i in &order {
                // A hair of room for f32 rounding at the edges.
                if reached < top_p as f64 + 1e-5 && logits[i] >= logits[order[0]] + min_p.ln() - 1e-4 {
                    allowed.push(i);
                }
                reached += (logits[i] as f64).exp() / sum;
            }
            let mut sampler = Sampler::new(SamplerParams { top_k, top_p, min_p, seed, ..plain() });
            for _ in 0..8 {
                let token = sampler.sample(&logits) as usize;
                prop_assert!(allowed.contains(&token), "{token} of {allowed:?}");
            }
        }
    }
}
