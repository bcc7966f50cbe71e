//! Conformance cases, and random graphs: weights with values, a graph over them, and how it is run.
#![allow(dead_code)] // each test binary uses its part

use std::sync::Arc;

use engine::backend::{Backend, Step, StepSequence};
use engine::graph::{Graph, GraphBuilder, Output};
use engine::kv_cache::{KvLayout, PAGE};
use engine::plan::Plan;
use engine::tensor::{Input, TensorId};
use engine::weights::{ByteSource, Weights};
use quant::FormatId;

/// Weights and a graph over them, filled as a case is built.
pub struct Case {
    pub name: String,
    pub n: usize,
    pub g: GraphBuilder,
    pub weights: Vec<CaseWeight>,
    seed: u64,
    pub kv: Option<KvLayout>,
}

/// A weight of a case.
pub struct CaseWeight {
    pub name: String,
    pub format: FormatId,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl Case {
    pub fn new(name: impl Into<String>, n: usize) -> Case {
        let name = name.into();
        let seed = name.bytes().fold(n as u64 + 1, |h, b| h.wrapping_mul(0x100000001b3) ^ b as u64);
        Case { name, n, g: GraphBuilder::new(false), weights: Vec::new(), seed, kv: None }
    }

    /// Roughly normal values with an outlier now and then.
    pub fn values(&mut self, n: usize) -> Vec<f32> {
        let mut next = || {
            self.seed = self.seed.wrapping_add(0x9E3779B97F4A7C15);
            let z = (self.seed ^ (self.seed >> 30)).wrapping_mul(0xBF58476D1CE4E5B9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94D049BB133111EB);
            ((z ^ (z >> 31)) >> 40) as f32 / (1u32 << 24) as f32
        };
        (0..n)
            .map(|_| {
                let x = next() + next() + next() + next() - 2.0;
                if next() > 0.995 { x * 12.0 } else { x * 1.7 }
            })
            .collect()
    }

    pub fn weight(&mut self, format: FormatId, shape: &[usize]) -> TensorId {
        let name = format!("w{}", self.weights.len());
        self.named(name, format, shape)
    }

    /// A weight with a name of its own.
    pub fn named(&mut self, name: String, format: FormatId, shape: &[usize]) -> TensorId {
        let (rows, cols) = (shape[..shape.len() - 1].iter().product::<usize>(), *shape.last().unwrap());
        let values = self.values(rows * cols);
        let row_bytes = quant::row::row_bytes(format, cols).unwrap();
        let mut bytes = vec![0u8; rows * row_bytes];
        let importance = vec![1.0f32; cols];
        for (x, out) in values.chunks_exact(cols).zip(bytes.chunks_exact_mut(row_bytes)) {
            quant::row::encode(format, x, Some(&importance), out).unwrap();
        }
        self.push(CaseWeight { name, format, shape: shape.to_vec(), bytes })
    }

    fn push(&mut self, weight: CaseWeight) -> TensorId {
        let id = self.g.weight(self.weights.len() as u32, weight.format, &weight.shape, 0);
        self.weights.push(weight);
        id
    }

    /// An activation [n, cols] with values of its own.
    pub fn x(&mut self, cols: usize) -> TensorId {
        let values = self.values(self.n * cols);
        self.activation(cols, &values)
    }

    /// An activation [n, cols] that no rounding changes: whole multiples of one power of two, the largest of every group
    /// of 32 is 127 of it, and no group's sum is beyond what f16 counts (31 · 60 + 127).
    pub fn codes(&mut self, cols: usize) -> TensorId {
        let mut values = self.values(self.n * cols);
        for (i, group) in values.chunks_mut(32).enumerate() {
            for x in group.iter_mut() {
                *x = (*x * 20.0).round_ties_even().clamp(-60.0, 60.0) / 64.0;
            }
            group[i * 7 % group.len()] = if i % 2 == 0 { 127.0 } else { -127.0 } / 64.0;
        }
        self.activation(cols, &values)
    }

    /// An activation [n, cols] of these values.
    fn activation(&mut self, cols: usize, values: &[f32]) -> TensorId {
        let shape = vec![self.n, cols];
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let name = format!("w{}", self.weights.len());
        let table = self.push(CaseWeight { name, format: FormatId::F32, shape, bytes });
        let rows = self.g.input(Input::OutputRows, self.n);
        self.g.get_rows(table, rows)
    }

    pub fn finish(self, out: TensorId) -> (Graph, Arc<Weights>, String, usize, Option<KvLayout>) {
        let Case { name, n, mut g, weights, kv, .. } = self;
        g.output(Output::Logits, out);
        let sources: Vec<Arc<dyn ByteSource>> =
            weights.iter().map(|w| Arc::new(w.bytes.clone()) as Arc<dyn ByteSource>).collect();
        let mut all = Weights::new(sources);
        for (i, w) in weights.into_iter().enumerate() {
            all.insert(&w.name, w.format, w.shape, i, 0, w.bytes.len());
        }
        (g.finish(), Arc::new(all), name, n, kv)
    }
}

/// Runs a graph: n tokens of two sequences, turn about, pages in scrambled order.
pub fn run(backend: &mut dyn Backend, graph: Graph, n: usize, kv: &Option<KvLayout>) -> Vec<f32> {
    if let Some(layout) = kv {
        backend.create_kv(layout).unwrap();
    }
    let plan = Arc::new(Plan::new(graph));
    for node in &plan.graph.nodes {
        backend.supports(&plan.graph, node).unwrap();
    }
    let out = plan.output(Output::Logits).unwrap();
    let id = backend.prepare(plan.clone()).unwrap();
    let two = n >= 2;
    let positions: Vec<i32> = (0..n).map(|i| if two { i as i32 / 2 } else { i as i32 }).collect();
    let token_sequences: Vec<u32> = (0..n).map(|i| if two { i as u32 % 2 } else { 0 }).collect();
    let lens = if two { [n.div_ceil(2), n / 2] } else { [n, 0] };
    let pages_of = |len: usize| len.div_ceil(PAGE);
    let first = [0, pages_of(lens[0])];
    let n_pages = first[1] + pages_of(lens[1]);
    let pages: Vec<u32> = (0..n_pages as u32).rev().collect();
    let sequences: Vec<StepSequence> = (0..if two { 2 } else { 1 })
        .map(|s| StepSequence { first_page: first[s] as u32, len: lens[s] as u32 })
        .collect();
    let cells: Vec<u32> = (0..n)
        .map(|i| {
            let (s, pos) = (token_sequences[i] as usize, positions[i] as usize);
            pages[first[s] + pos / PAGE] * PAGE as u32 + (pos % PAGE) as u32
        })
        .collect();
    let ids: Vec<i32> = (0..n as i32).collect();
    let step = Step {
        tokens: &ids,
        positions: &positions,
        output_rows: &ids,
        token_sequences: &token_sequences,
        cells: &cells,
        sequences: &sequences,
        pages: &pages,
        given: &[],
    };
    let mut got = vec![f32::NAN; plan.graph.tensor(out).shape.elems()];
    // Again: a later run must not see an earlier one's leavings; on a GPU the second is captured, the third replayed.
    for _ in 0..3 {
        backend.run(id, &step).unwrap();
        backend.read(id, out, &mut got).unwrap();
    }
    got
}

/// Normalised mean squared error, Σ(a−b)² / Σb²; of zeros the mean squared error itself.
pub fn nmse(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let err: f64 = got.iter().zip(want).map(|(a, b)| (*a as f64 - *b as f64).powi(2)).sum();
    let norm: f64 = want.iter().map(|b| (*b as f64).powi(2)).sum();
    if norm == 0.0 { err } else { err / norm }
}
