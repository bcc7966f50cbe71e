//! The definition of every op: plain loops in f64 over whole tensors. Slow on purpose; other backends are tested
//! against it. Weights are decoded exactly; activations are never quantised, only rounded to f16 or bf16 where the
//! weights are (see [`Op::MatMul`]).

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use quant::FormatId;

use crate::backend::{Backend, BackendInfo, PlanId, Step};
use crate::error::EngineError;
use crate::graph::{Graph, Node};
use crate::kv_cache::{KvLayout, PAGE};
use crate::op::{AttentionParams, Binary, Glu, KvPart, MoeRouteParams, Op, RopeMode, RopeParams, Unary};
use crate::plan::Plan;
use crate::tensor::{Input, Storage, TensorId};
use crate::weights::Weights;

/// The reference backend.
pub struct Reference {
    weights: Arc<Weights>,
    plans: BTreeMap<usize, (Arc<Plan>, Vec<Vec<f32>>)>,
    next_plan: usize,
    kv: Option<KvBytes>,
}

struct KvBytes {
    layout: KvLayout,
    /// Per layer: keys, values.
    parts: Vec<[Vec<u8>; 2]>,
}

impl KvBytes {
    /// Byte range of a head's row at a cell.
    fn row(&self, il: usize, part: KvPart, cell: usize, head: usize) -> core::ops::Range<usize> {
        let row = self.layout.row_bytes(il, part);
        let at = ((cell / PAGE * self.layout.layers[il].n_head_kv + head) * PAGE + cell % PAGE) * row;
        at..at + row
    }

    fn store(&mut self, il: usize, part: KvPart, cell: usize, x: &[f32]) {
        let format = self.layout.format(part);
        for (head, x) in x.chunks_exact(self.layout.head_dim(il, part)).enumerate() {
            let range = self.row(il, part, cell, head);
            quant::row::encode_one_group(format, x, &mut self.parts[il][part as usize][range])
                .expect("checked by KvLayout");
        }
    }

    fn load(&self, il: usize, part: KvPart, cell: usize, head: usize) -> Vec<f32> {
        let mut out = alloc::vec![0.0; self.layout.head_dim(il, part)];
        let bytes = &self.parts[il][part as usize][self.row(il, part, cell, head)];
        quant::row::decode(self.layout.format(part), bytes, &mut out).expect("checked by KvLayout");
        out
    }
}

impl Reference {
    /// A backend over a model's weights.
    pub fn new(weights: Arc<Weights>) -> Reference {
        Reference { weights, plans: BTreeMap::new(), next_plan: 0, kv: None }
    }
}

impl Backend for Reference {
    fn info(&self) -> BackendInfo {
        BackendInfo { name: "reference", description: String::from("plain loops in f64") }
    }

    fn supports(&self, _graph: &Graph, _node: &Node) -> Result<(), String> {
        Ok(())
    }

    fn create_kv(&mut self, layout: &KvLayout) -> Result<(), EngineError> {
        let parts = (0..layout.layers.len())
            .map(|il| [KvPart::K, KvPart::V].map(|part| alloc::vec![0u8; layout.part_bytes(il, part)]))
            .collect();
        self.kv = Some(KvBytes { layout: layout.clone(), parts });
        Ok(())
    }

    fn prepare(&mut self, plan: Arc<Plan>) -> Result<PlanId, EngineError> {
        let id = self.next_plan;
        self.next_plan += 1;
        self.plans.insert(id, (plan, Vec::new()));
        Ok(PlanId(id))
    }

    fn release(&mut self, plan: PlanId) {
        self.plans.remove(&plan.0);
    }

    fn run(&mut self, plan: PlanId, step: &Step<'_>) -> Result<(), EngineError> {
        let (plan, values) = self.plans.get_mut(&plan.0).expect("a prepared plan");
        let graph = &plan.graph;
        values.clear();
        values.resize(graph.tensors.len(), Vec::new());
        for (tensor, given) in step.given {
            // Ids arrive as the bits of an i32; here they are kept as floats.
            values[tensor.0 as usize] = match graph.tensor(*tensor).format {
                FormatId::I32 => given.iter().map(|v| v.to_bits() as f32).collect(),
                _ => given.to_vec(),
            };
        }
        let mut run = Run { graph, weights: &self.weights, values, step, kv: self.kv.as_mut() };
        for node in &graph.nodes {
            run.node(node);
        }
        Ok(())
    }

    fn read(&mut self, plan: PlanId, tensor: TensorId, out: &mut [f32]) -> Result<(), EngineError> {
        let (plan, values) = &self.plans[&plan.0];
        let base = plan.graph.base(tensor);
        let values = &values[base.0 as usize];
        match plan.graph.tensor(base).format {
            // Ids are kept as floats here; the caller gets the bits of an i32, as from other backends.
            FormatId::I32 => out.iter_mut().zip(values).for_each(|(o, v)| *o = f32::from_bits(*v as u32)),
            _ => out.copy_from_slice(values),
        }
        Ok(())
    }
}

/// One run over a graph. Values are kept by base tensor; ids are kept as floats, exact below 2²⁴.
struct Run<'a> {
    graph: &'a Graph,
    weights: &'a Weights,
    values: &'a mut Vec<Vec<f32>>,
    step: &'a Step<'a>,
    kv: Option<&'a mut KvBytes>,
}

impl Run<'_> {
    fn value(&self, id: TensorId) -> Vec<f32> {
        let base = self.graph.base(id);
        let tensor = self.graph.tensor(base);
        match tensor.storage {
            Storage::Weight { weight, first_row } => {
                let mut out = alloc::vec![0.0; tensor.shape.elems()];
                let bytes = self.weights.row_range(weight, first_row, tensor.shape.rows());
                let row_bytes = self.weights.get(weight).row_bytes();
                for (bytes, out) in
                    bytes.chunks_exact(row_bytes).zip(out.chunks_exact_mut(tensor.shape.cols()))
                {
                    quant::row::decode(tensor.format, bytes, out)
                        .expect("checked when the weight was loaded");
                }
                out
            }
            Storage::Input(input) => {
                let ids: &[i32] = match input {
                    Input::Tokens => self.step.tokens,
                    Input::Positions => self.step.positions,
                    Input::OutputRows => self.step.output_rows,
                    Input::TokenTypes => return alloc::vec![0.0; tensor.shape.elems()],
                };
                ids.iter().map(|i| *i as f32).collect()
            }
            _ => self.values[base.0 as usize].clone(),
        }
    }

    fn rows(&self, id: TensorId) -> (Vec<f32>, usize) {
        (self.value(id), self.graph.tensor(id).shape.cols())
    }

    fn node(&mut self, node: &Node) {
        let outputs = self.op(&node.op);
        assert_eq!(outputs.len(), node.outputs.len(), "{}", node.op.name());
        for (&id, value) in node.outputs.iter().zip(outputs) {
            assert_eq!(value.len(), self.graph.tensor(id).shape.elems(), "{}", node.op.name());
            self.values[id.0 as usize] = value;
        }
    }

    fn op(&mut self, op: &Op) -> Vec<Vec<f32>> {
        let one = |v: Vec<f32>| alloc::vec![v];
        match op {
            Op::GetRows { table, ids } => one(self.get_rows(*table, *ids)),
            Op::RmsNorm { x, weight, eps } => {
                let (x, cols) = self.rows(*x);
                let w = weight.map(|w| self.value(w));
                one(by_row(&x, cols, |row| {
                    let mean = row.iter().map(|v| square(*v as f64)).sum::<f64>() / cols as f64;
                    let scale = 1.0 / libm::sqrt(mean + *eps as f64);
                    row.iter().enumerate().map(|(i, v)| *v as f64 * scale * at(&w, i, 1.0)).collect()
                }))
            }
            Op::LayerNorm { x, weight, bias, eps } => {
                let (x, cols) = self.rows(*x);
                let (w, b) = (weight.map(|w| self.value(w)), bias.map(|b| self.value(b)));
                one(by_row(&x, cols, |row| {
                    let mean = row.iter().map(|v| *v as f64).sum::<f64>() / cols as f64;
                    let var = row.iter().map(|v| square(*v as f64 - mean)).sum::<f64>() / cols as f64;
                    let scale = 1.0 / libm::sqrt(var + *eps as f64);
                    row.iter()
                        .enumerate()
                        .map(|(i, v)| (*v as f64 - mean) * scale * at(&w, i, 1.0) + at(&b, i, 0.0))
                        .collect()
                }))
            }
            Op::MatMul { x, weights, biases } => {
                let (x, k) = self.rows(*x);
                weights
                    .iter()
                    .zip(biases)
                    .map(|(w, bias)| {
                        let x = rounded_for(&x, self.graph.tensor(*w).format);
                        let (w, bias) = (self.value(*w), bias.map(|b| self.value(b)));
                        by_row(&x, k, |row| matvec(&w, k, row, bias.as_deref()))
                    })
                    .collect()
            }
            Op::MatMulId { x, weight, bias, ids } => {
                let n_used = self.graph.tensor(*ids).shape.cols();
                let per_used = self.graph.tensor(*x).shape.dims()[1] == n_used;
                let (w, k) = self.rows(*weight);
                let rows = self.graph.tensor(*weight).shape.dims()[1];
                let x = rounded_for(&self.value(*x), self.graph.tensor(*weight).format);
                let (bias, ids) = (bias.map(|b| self.value(b)), self.value(*ids));
                let mut out = Vec::new();
                for (i, expert) in ids.iter().enumerate() {
                    let e = *expert as usize;
                    let row = &x[if per_used { i } else { i / n_used } * k..][..k];
                    let bias = bias.as_ref().map(|b| &b[e * rows..][..rows]);
                    out.extend(
                        matvec(&w[e * rows * k..][..rows * k], k, row, bias).iter().map(|v| *v as f32),
                    );
                }
                one(out)
            }
            Op::RopeTable { positions, freq_factors, params } => {
                let factors = freq_factors.map(|f| self.value(f));
                let positions = self.value(*positions);
                one(positions
                    .iter()
                    .flat_map(|p| rope_angles(*p as f64, params, factors.as_deref()))
                    .collect())
            }
            Op::Rope { x, table, mode } => {
                let [_, heads, head_dim] = *self.graph.tensor(*x).shape.dims() else {
                    unreachable!("checked by the builder")
                };
                let (table, n_dims) = self.rows(*table);
                let mut out = self.value(*x);
                for (i, head) in out.chunks_exact_mut(head_dim).enumerate() {
                    rotate(head, &table[i / heads * n_dims..][..n_dims], *mode);
                }
                one(out)
            }
            Op::KvStore { k, v, il } => {
                for (id, part) in [(*k, KvPart::K), (*v, KvPart::V)] {
                    let (x, _) = self.rows(id);
                    let cols = x.len() / self.step.cells.len();
                    let kv = self.kv.as_mut().expect("create_kv before run");
                    for (row, cell) in x.chunks_exact(cols).zip(self.step.cells) {
                        kv.store(*il, part, *cell as usize, row);
                    }
                }
                Vec::new()
            }
            Op::Attention { q, sinks, params } => {
                let (q, sinks) = (self.value(*q), sinks.map(|s| self.value(s)));
                one(self.attention(&q, sinks.as_deref(), params))
            }
            Op::Binary { kind, a, b } => {
                let (a, b) = (self.value(*a), self.value(*b));
                one(a.iter().enumerate().map(|(i, a)| binary(*kind, *a, b[i % b.len()])).collect())
            }
            Op::Unary { kind, x } => {
                one(self.value(*x).iter().map(|x| unary(*kind, *x as f64) as f32).collect())
            }
            Op::Scale { x, scale } => one(self.value(*x).iter().map(|x| x * scale).collect()),
            Op::Hadamard { x, width } => {
                let size = 1.0 / libm::sqrt(*width as f64);
                let sign =
                    |i: usize, j: usize| if (i & j).count_ones().is_multiple_of(2) { size } else { -size };
                let rotated =
                    |x: &[f32], i| x.iter().enumerate().map(|(j, x)| sign(i, j) * *x as f64).sum::<f64>();
                let x = self.value(*x);
                one(x
                    .chunks_exact(*width)
                    .flat_map(|x| (0..*width).map(move |i| rotated(x, i) as f32))
                    .collect())
            }
            Op::Softcap { x, cap } => {
                let cap = *cap as f64;
                one(self.value(*x).iter().map(|x| (cap * libm::tanh(*x as f64 / cap)) as f32).collect())
            }
            Op::Glu { kind, gate, up } => {
                let (gate, up) = (self.value(*gate), self.value(*up));
                one(gate.iter().zip(&up).map(|(g, u)| glu(*kind, *g as f64, *u as f64) as f32).collect())
            }
            Op::MoeRoute { logits, params } => {
                let (logits, n_expert) = self.rows(*logits);
                let (mut ids, mut weights) = (Vec::new(), Vec::new());
                for row in logits.chunks_exact(n_expert) {
                    for (expert, weight) in route(row, params) {
                        ids.push(expert as f32);
                        weights.push(weight as f32);
                    }
                }
                alloc::vec![ids, weights]
            }
            Op::MoeCombine { x, weights } => {
                let (x, cols) = self.rows(*x);
                let (w, n_used) = self.rows(*weights);
                let mut out = Vec::new();
                for (x, w) in x.chunks_exact(cols * n_used).zip(w.chunks_exact(n_used)) {
                    out.extend((0..cols).map(|c| {
                        (0..n_used).map(|j| w[j] as f64 * x[j * cols + c] as f64).sum::<f64>() as f32
                    }));
                }
                one(out)
            }
            Op::Argmax { x } => {
                let (x, cols) = self.rows(*x);
                one(x.chunks_exact(cols).map(|row| crate::sampler::argmax(row) as f32).collect())
            }
            Op::ScaleExperts { x, factors, ids } => {
                let (x, cols) = self.rows(*x);
                let (factors, ids) = (self.value(*factors), self.value(*ids));
                one(x.iter().enumerate().map(|(i, x)| x * factors[ids[i / cols] as usize]).collect())
            }
            Op::RowGate { x, gate } => {
                let (x, cols) = self.rows(*x);
                let gate = self.value(*gate);
                one(x
                    .iter()
                    .enumerate()
                    .map(|(i, x)| (*x as f64 * unary(Unary::Sigmoid, gate[i / cols] as f64)) as f32)
                    .collect())
            }
        }
    }

    fn get_rows(&self, table: TensorId, ids: TensorId) -> Vec<f32> {
        let ids = self.value(ids);
        let tensor = self.graph.tensor(table);
        let cols = tensor.shape.cols();
        if let Storage::Weight { weight, first_row } = tensor.storage {
            let mut out = alloc::vec![0.0; ids.len() * cols];
            for (id, out) in ids.iter().zip(out.chunks_exact_mut(cols)) {
                let bytes = self.weights.row_range(weight, first_row + *id as usize, 1);
                quant::row::decode(tensor.format, bytes, out).expect("checked when the weight was loaded");
            }
            return out;
        }
        let table = self.value(table);
        ids.iter().flat_map(|id| table[*id as usize * cols..][..cols].iter().copied()).collect()
    }

    fn attention(&self, q: &[f32], sinks: Option<&[f32]>, p: &AttentionParams) -> Vec<f32> {
        let kv = self.kv.as_ref().expect("create_kv before run");
        let group = p.n_head / p.n_head_kv;
        let mut out = Vec::new();
        for (t, q) in q.chunks_exact(p.n_head * p.head_dim_k).enumerate() {
            let seq = self.step.sequences[self.step.token_sequences[t] as usize];
            let pos = self.step.positions[t] as u32;
            let end = if p.causal { pos + 1 } else { seq.len };
            let start = if p.window > 0 { (pos + 1).saturating_sub(p.window) } else { 0 };
            for (head, q) in q.chunks_exact(p.head_dim_k).enumerate() {
                let cells: Vec<usize> = (start..end)
                    .map(|i| {
                        self.step.pages[seq.first_page as usize + i as usize / PAGE] as usize * PAGE
                            + i as usize % PAGE
                    })
                    .collect();
                let scores: Vec<f64> = cells
                    .iter()
                    .map(|cell| {
                        let k = kv.load(p.il, KvPart::K, *cell, head / group);
                        let dot: f64 = q.iter().zip(&k).map(|(q, k)| *q as f64 * *k as f64).sum();
                        let s = dot * p.scale as f64;
                        if p.softcap != 0.0 { p.softcap as f64 * libm::tanh(s / p.softcap as f64) } else { s }
                    })
                    .collect();
                let sink = sinks.map(|s| s[head] as f64);
                let max = scores.iter().copied().chain(sink).fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = scores.iter().copied().chain(sink).map(|s| libm::exp(s - max)).sum();
                let mut acc = alloc::vec![0.0f64; p.head_dim_v];
                for (cell, s) in cells.iter().zip(&scores) {
                    let w = libm::exp(s - max) / total;
                    let v = kv.load(p.il, KvPart::V, *cell, head / group);
                    acc.iter_mut().zip(&v).for_each(|(a, v)| *a += w * *v as f64);
                }
                out.extend(acc.iter().map(|a| *a as f32));
            }
        }
        out
    }
}

fn square(v: f64) -> f64 {
    v * v
}

/// `values[i]`, or the default if there are none.
fn at(values: &Option<Vec<f32>>, i: usize, default: f64) -> f64 {
    values.as_ref().map_or(default, |v| v[i] as f64)
}

fn by_row(x: &[f32], cols: usize, f: impl Fn(&[f32]) -> Vec<f64>) -> Vec<f32> {
    x.chunks_exact(cols).flat_map(|row| f(row).into_iter().map(|v| v as f32)).collect()
}

/// Activations as a product with weights of this format takes them: f16 and bf16 matrices multiply their own kind.
fn rounded_for(x: &[f32], format: FormatId) -> Vec<f32> {
    match format {
        FormatId::F16 => x.iter().map(|v| half::f16::from_f32(*v).to_f32()).collect(),
        FormatId::BF16 => x.iter().map(|v| half::bf16::from_f32(*v).to_f32()).collect(),
        _ => x.to_vec(),
    }
}

fn matvec(w: &[f32], k: usize, x: &[f32], bias: Option<&[f32]>) -> Vec<f64> {
    w.chunks_exact(k)
        .enumerate()
        .map(|(i, w)| {
            w.iter().zip(x).map(|(w, x)| *w as f64 * *x as f64).sum::<f64>()
                + bias.map_or(0.0, |b| b[i] as f64)
        })
        .collect()
}

/// The experts of one token by its router's logits, best first, each with its weight.
fn route(logits: &[f32], params: &MoeRouteParams) -> Vec<(usize, f64)> {
    let mut best: Vec<usize> = (0..logits.len()).collect();
    best.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
    best.truncate(params.n_used);
    let max = logits.iter().fold(f64::NEG_INFINITY, |m, v| m.max(*v as f64));
    let exp = |e: usize| libm::exp(logits[e] as f64 - max);
    let total: f64 = if params.softmax_after {
        best.iter().map(|e| exp(*e)).sum()
    } else {
        (0..logits.len()).map(exp).sum()
    };
    let mut weights: Vec<f64> = best.iter().map(|e| exp(*e) / total).collect();
    if params.normalise {
        // The smallest normal half: llama.cpp's guard against dividing by nothing.
        let sum = weights.iter().sum::<f64>().max(6.103515625e-5);
        weights.iter_mut().for_each(|w| *w /= sum);
    }
    best.into_iter().zip(weights.into_iter().map(|w| w * params.scale as f64)).collect()
}

/// (cos, sin) of every pair at a position. YaRN: pairs that turn more than `beta_fast` times over the original context
/// keep their angle, those below `beta_slow` turns are interpolated, with a ramp between.
pub fn rope_angles(position: f64, p: &RopeParams, factors: Option<&[f32]>) -> Vec<f32> {
    let n = p.n_dims as f64;
    let base = p.freq_base as f64;
    let turns_at = |turns: f32| {
        n * libm::log(p.n_ctx_orig as f64 / (turns as f64 * 2.0 * core::f64::consts::PI))
            / (2.0 * libm::log(base))
    };
    let low = libm::floor(turns_at(p.beta_fast)).max(0.0);
    let high = libm::ceil(turns_at(p.beta_slow)).min(n - 1.0);
    (0..p.n_dims / 2)
        .flat_map(|i| {
            let freq = libm::pow(base, -2.0 * i as f64 / n) / factors.map_or(1.0, |f| f[i] as f64);
            let extrapolated = position * freq;
            let interpolated = extrapolated * p.freq_scale as f64;
            let ramp = 1.0 - ((i as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
            let mix = ramp * p.ext_factor as f64;
            let angle = interpolated * (1.0 - mix) + extrapolated * mix;
            let m = p.attn_factor as f64;
            [(libm::cos(angle) * m) as f32, (libm::sin(angle) * m) as f32]
        })
        .collect()
}

fn rotate(head: &mut [f32], table: &[f32], mode: RopeMode) {
    let pairs = table.len() / 2;
    for (i, cs) in table.chunks_exact(2).enumerate() {
        let (a, b) = match mode {
            RopeMode::Norm => (2 * i, 2 * i + 1),
            RopeMode::Neox => (i, i + pairs),
        };
        let (x, y, cos, sin) = (head[a] as f64, head[b] as f64, cs[0] as f64, cs[1] as f64);
        head[a] = (x * cos - y * sin) as f32;
        head[b] = (x * sin + y * cos) as f32;
    }
}

fn binary(kind: Binary, a: f32, b: f32) -> f32 {
    match kind {
        Binary::Add => a + b,
        Binary::Mul => a * b,
    }
}

fn unary(kind: Unary, x: f64) -> f64 {
    match kind {
        Unary::Silu => x / (1.0 + libm::exp(-x)),
        Unary::Gelu => {
            let c = libm::sqrt(2.0 / core::f64::consts::PI);
            0.5 * x * (1.0 + libm::tanh(c * (x + 0.044715 * x * x * x)))
        }
        Unary::GeluErf => 0.5 * x * (1.0 + libm::erf(x / core::f64::consts::SQRT_2)),
        Unary::Relu => x.max(0.0),
        Unary::ReluSqr => x.max(0.0) * x.max(0.0),
        Unary::Tanh => libm::tanh(x),
        Unary::Sigmoid => 1.0 / (1.0 + libm::exp(-x)),
    }
}

fn glu(kind: Glu, gate: f64, up: f64) -> f64 {
    match kind {
        Glu::Plain(f) => unary(f, gate) * up,
        Glu::SwigluOai { alpha, limit } => {
            let gate = gate.min(limit as f64);
            let up = up.clamp(-limit as f64, limit as f64);
            gate * unary(Unary::Sigmoid, alpha as f64 * gate) * (up + 1.0)
        }
    }
}
