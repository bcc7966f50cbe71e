//! The CPU backend: plans run node by node on SIMD kernels, cut over the executor's threads.
//!
//! Weights are read where the model's files are mapped. The arena, the cache and the kernels' scratch grow to the
//! largest plan and then stay, so a step that was run once allocates nothing.

mod arena;
mod moe;
#[allow(unsafe_code)]
pub mod simd;

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use arena::{Arena, Bytes};
use quant::FormatId;
pub use simd::Isa;
use simd::{ExpertView, KvView, KvViewMut, QueryRow, Residual, Scratch, WeightView};

use crate::backend::{Backend, BackendInfo, PlanId, Step};
use crate::error::EngineError;
use crate::executor::Executor;
use crate::graph::{Graph, Node};
use crate::kv_cache::KvLayout;
use crate::op::{Binary, KvPart, Op};
use crate::plan::{Plan, Slot};
use crate::tensor::{Input, Storage, TensorId};
use crate::weights::Weights;

/// Weights that one [`Op::MatMul`] may have: q, k, v; gate and up.
const MAX_SIBLINGS: usize = 4;

/// The CPU backend.
pub struct Cpu {
    weights: Arc<Weights>,
    executor: Arc<dyn Executor>,
    isa: Isa,
    plans: BTreeMap<usize, Arc<Plan>>,
    next_plan: usize,
    memory: Memory,
}

/// What a step works in.
#[derive(Default)]
struct Memory {
    arena: Arena,
    kv: Option<Kv>,
    scratch: Scratch,
    /// Whose query each token is.
    rows: Vec<QueryRow>,
    /// All of one segment: zeros.
    token_types: Vec<i32>,
}

struct Kv {
    layout: KvLayout,
    /// Per layer: keys, values.
    parts: Vec<[Bytes; 2]>,
}

impl Kv {
    fn view(&self, il: usize, part: KvPart) -> KvView<'_> {
        KvView {
            format: self.layout.format(part),
            bytes: self.parts[il][part as usize].as_slice(),
            n_head_kv: self.layout.layers[il].n_head_kv,
            head_dim: self.layout.head_dim(il, part),
        }
    }

    fn view_mut(&mut self, il: usize, part: KvPart) -> KvViewMut<'_> {
        KvViewMut {
            format: self.layout.format(part),
            n_head_kv: self.layout.layers[il].n_head_kv,
            head_dim: self.layout.head_dim(il, part),
            bytes: self.parts[il][part as usize].as_mut_slice(),
        }
    }
}

impl Cpu {
    /// A backend over a model's weights that runs on these threads with these instructions.
    pub fn new(weights: Arc<Weights>, executor: Arc<dyn Executor>, isa: Isa) -> Cpu {
        Cpu { weights, executor, isa, plans: BTreeMap::new(), next_plan: 0, memory: Memory::default() }
    }
}

impl Backend for Cpu {
    fn info(&self) -> BackendInfo {
        let description = format!("{}, {} thread(s)", self.isa.name(), self.executor.n_threads());
        BackendInfo { name: "cpu", description }
    }

    fn supports(&self, _graph: &Graph, node: &Node) -> Result<(), String> {
        match &node.op {
            Op::MatMul { weights, .. } if weights.len() > MAX_SIBLINGS => {
                Err(format!("{} weights share an input, at most {MAX_SIBLINGS} are possible", weights.len()))
            }
            _ => Ok(()),
        }
    }

    fn create_kv(&mut self, layout: &KvLayout) -> Result<(), EngineError> {
        self.memory.kv = None;
        let part = |il, part| Bytes::zeroed(layout.part_bytes(il, part), "KV cache");
        let parts = (0..layout.layers.len())
            .map(|il| Ok([part(il, KvPart::K)?, part(il, KvPart::V)?]))
            .collect::<Result<_, EngineError>>()?;
        self.memory.kv = Some(Kv { layout: layout.clone(), parts });
        Ok(())
    }

    fn prepare(&mut self, plan: Arc<Plan>) -> Result<PlanId, EngineError> {
        self.memory.arena.reserve(plan.arena_bytes)?;
        let id = self.next_plan;
        self.next_plan += 1;
        self.plans.insert(id, plan);
        Ok(PlanId(id))
    }

    fn release(&mut self, plan: PlanId) {
        self.plans.remove(&plan.0);
    }

    fn run(&mut self, plan: PlanId, step: &Step<'_>) -> Result<(), EngineError> {
        let plan = &self.plans[&plan.0];
        for (tensor, given) in step.given {
            let slot = plan.slot(*tensor).expect("what is given is an activation");
            let ([], [to]) = self.memory.arena.views([], [slot]);
            to.copy_from_slice(given);
        }
        self.memory.token_types.clear();
        self.memory.token_types.resize(step.tokens.len(), 0);
        let rows = step.positions.iter().zip(step.token_sequences);
        self.memory.rows.clear();
        self.memory.rows.extend(rows.map(|(pos, seq)| QueryRow { pos: *pos as u32, seq: *seq }));
        let mut run = Run {
            plan,
            graph: &plan.graph,
            step,
            weights: &self.weights,
            exec: &*self.executor,
            isa: self.isa,
            memory: &mut self.memory,
        };
        for node in &plan.graph.nodes {
            run.node(node).map_err(|e| EngineError::BadBatch { what: format!("{}: {e}", node.op.name()) })?;
        }
        Ok(())
    }

    fn read(&mut self, plan: PlanId, tensor: TensorId, out: &mut [f32]) -> Result<(), EngineError> {
        let slot = self.plans[&plan.0].slot(tensor).expect("an output is an activation");
        out.copy_from_slice(self.memory.arena.view(slot));
        Ok(())
    }
}

const EMPTY: Slot = Slot { offset: 0, len: 0 };

/// One run over a plan.
struct Run<'a> {
    plan: &'a Plan,
    graph: &'a Graph,
    step: &'a Step<'a>,
    weights: &'a Weights,
    exec: &'a dyn Executor,
    isa: Isa,
    memory: &'a mut Memory,
}

impl<'a> Run<'a> {
    fn slot(&self, id: TensorId) -> Slot {
        self.plan.slot(id).expect("an activation")
    }

    /// The bytes of a weight's rows; `None` if the tensor is not a weight.
    fn weight(&self, id: TensorId) -> Option<&'a [u8]> {
        let tensor = self.graph.tensor(id);
        match tensor.storage {
            Storage::Weight { weight, first_row } => {
                Some(self.weights.row_range(weight, first_row, tensor.shape.rows()))
            }
            _ => None,
        }
    }

    fn weight_view(&self, id: TensorId) -> WeightView<'a> {
        let tensor = self.graph.tensor(id);
        WeightView {
            format: tensor.format,
            bytes: self.weight(id).expect("a product's second factor is a weight"),
            rows: tensor.shape.rows(),
            cols: tensor.shape.cols(),
        }
    }

    /// A weight of floats, in place if the file has it aligned.
    fn vector(&self, id: TensorId) -> Vector<'a> {
        Vector::new(self.weight(id).expect("a vector of the model"))
    }

    fn opt_vector(&self, id: Option<TensorId>) -> Option<Vector<'a>> {
        id.map(|id| self.vector(id))
    }

    /// Views for an op that maps `x` to `out` of the same size: `x` is `None` where they are the same memory.
    fn map<const N: usize>(&mut self, x: TensorId, out: TensorId, others: [Slot; N]) -> MapViews<'_, N> {
        let (x, out) = (self.slot(x), self.slot(out));
        let in_place = x == out;
        let mut inputs = [EMPTY; 8];
        inputs[0] = if in_place { EMPTY } else { x };
        inputs[1..=N].copy_from_slice(&others);
        let (views, [out]) = self.memory.arena.views(inputs, [out]);
        MapViews { x: (!in_place).then_some(views[0]), others: core::array::from_fn(|i| views[1 + i]), out }
    }

    fn node(&mut self, node: &Node) -> Result<(), simd::KernelError> {
        let (isa, exec) = (self.isa, self.exec);
        let out = node.outputs.first().copied();
        let out = || out.expect("checked by the builder");
        match &node.op {
            Op::GetRows { table, ids } => self.get_rows(*table, *ids, out()),
            Op::RmsNorm { x, weight, eps } => {
                let (w, cols) = (self.opt_vector(*weight), self.plan.shape(*x).cols());
                let v = self.map(*x, out(), []);
                simd::rms_norm(isa, exec, v.x, cols, w.as_deref(), *eps, v.out)
            }
            Op::LayerNorm { x, weight, bias, eps } => {
                let (w, b) = (self.opt_vector(*weight), self.opt_vector(*bias));
                let cols = self.plan.shape(*x).cols();
                let v = self.map(*x, out(), []);
                simd::layer_norm(isa, exec, v.x, cols, w.as_deref(), b.as_deref(), *eps, v.out)
            }
            Op::MatMul { x, weights, biases } => self.matmul(*x, weights, biases, &node.outputs),
            Op::MatMulId { x, weight, bias, ids } => self.matmul_id(*x, *weight, *bias, *ids, out()),
            Op::RopeTable { freq_factors, params, .. } => {
                let (factors, out) = (self.opt_vector(*freq_factors), self.slot(out()));
                let ([], [out]) = self.memory.arena.views([], [out]);
                simd::rope_table(self.step.positions, factors.as_deref(), params, out)
            }
            Op::Rope { x, table, mode } => {
                let [n, heads, head_dim] = *self.plan.shape(*x).dims() else {
                    unreachable!("checked by the builder")
                };
                let (n_dims, table) = (self.plan.shape(*table).cols(), self.slot(*table));
                let v = self.map(*x, out(), [table]);
                if let Some(x) = v.x {
                    v.out.copy_from_slice(x);
                }
                simd::rope(isa, exec, v.out, v.others[0], n, heads, head_dim, n_dims, *mode)
            }
            Op::Hadamard { x, width } => {
                let v = self.map(*x, out(), []);
                simd::hadamard(isa, exec, v.x, *width, v.out)
            }
            Op::KvStore { k, v, il } => {
                for (x, part) in [(*k, KvPart::K), (*v, KvPart::V)] {
                    let slot = self.slot(x);
                    let Memory { arena, kv, .. } = &mut *self.memory;
                    let view = kv.as_mut().expect("create_kv before run").view_mut(*il, part);
                    simd::kv_store(isa, exec, view, arena.view(slot), self.step.cells)?;
                }
                Ok(())
            }
            Op::Attention { q, sinks, params } => {
                let (sinks, q, out) = (self.opt_vector(*sinks), self.slot(*q), self.slot(out()));
                let Memory { arena, scratch, kv, rows, .. } = &mut *self.memory;
                let kv = kv.as_ref().expect("create_kv before run");
                let ([q], [out]) = arena.views([q], [out]);
                let (k, v) = (kv.view(params.il, KvPart::K), kv.view(params.il, KvPart::V));
                simd::attention(
                    isa,
                    exec,
                    params,
                    q,
                    k,
                    v,
                    rows,
                    self.step.sequences,
                    self.step.pages,
                    sinks.as_deref(),
                    out,
                    scratch,
                )
            }
            Op::Binary { kind, a, b } => self.binary(*kind, *a, *b, out()),
            Op::Unary { kind, x } => {
                let v = self.map(*x, out(), []);
                simd::unary(isa, exec, *kind, v.x, v.out)
            }
            Op::Scale { x, scale } => {
                let v = self.map(*x, out(), []);
                simd::scale(isa, exec, v.x, *scale, v.out)
            }
            Op::Softcap { x, cap } => {
                let v = self.map(*x, out(), []);
                simd::softcap(isa, exec, v.x, *cap, v.out)
            }
            Op::Glu { kind, gate, up } => {
                let up = self.slot(*up);
                let v = self.map(*gate, out(), [up]);
                simd::glu(isa, exec, *kind, v.x, v.others[0], v.out)
            }
            Op::MoeRoute { logits, params } => {
                let n_expert = self.plan.shape(*logits).cols();
                let (logits, ids, w) =
                    (self.slot(*logits), self.slot(node.outputs[0]), self.slot(node.outputs[1]));
                let ([logits], [ids, weights]) = self.memory.arena.views([logits], [ids, w]);
                moe::route(logits, n_expert, params, bytemuck::cast_slice_mut(ids), weights);
                Ok(())
            }
            Op::MoeCombine { x, weights } => {
                let n_used = self.plan.shape(*weights).cols();
                let (x, w, out) = (self.slot(*x), self.slot(*weights), self.slot(out()));
                let ([x, w], [out]) = self.memory.arena.views([x, w], [out]);
                moe::combine(x, w, n_used, out);
                Ok(())
            }
            Op::Argmax { x } => {
                let (cols, x, out) = (self.plan.shape(*x).cols(), self.slot(*x), self.slot(out()));
                let ([x], [ids]) = self.memory.arena.views([x], [out]);
                for (id, row) in ids.iter_mut().zip(x.chunks_exact(cols)) {
                    *id = f32::from_bits(crate::sampler::argmax(row));
                }
                Ok(())
            }
            Op::ScaleExperts { x, factors, ids } => {
                let (factors, cols) = (self.opt_vector(Some(*factors)), self.plan.shape(*x).cols());
                let (ids, out) = (self.slot(*ids), out());
                let v = self.map(*x, out, [ids]);
                if let Some(x) = v.x {
                    v.out.copy_from_slice(x);
                }
                let factors = factors.expect("it was asked for");
                moe::scale_experts(&factors, bytemuck::cast_slice(v.others[0]), cols, v.out);
                Ok(())
            }
            Op::RowGate { x, gate } => {
                let (gate, cols) = (self.slot(*gate), self.plan.shape(*x).cols());
                let v = self.map(*x, out(), [gate]);
                if let Some(x) = v.x {
                    v.out.copy_from_slice(x);
                }
                moe::row_gate(v.others[0], cols, v.out);
                Ok(())
            }
        }
    }

    fn get_rows(&mut self, table: TensorId, ids: TensorId, out: TensorId) -> Result<(), simd::KernelError> {
        let (cols, out) = (self.plan.shape(table).cols(), self.slot(out));
        let weight = self.weight(table);
        let Memory { arena, token_types, .. } = &mut *self.memory;
        let ids: &[i32] = match self.graph.tensor(self.graph.base(ids)).storage {
            Storage::Input(Input::Tokens) => self.step.tokens,
            Storage::Input(Input::Positions) => self.step.positions,
            Storage::Input(Input::OutputRows) => self.step.output_rows,
            Storage::Input(Input::TokenTypes) => token_types,
            other => unreachable!("ids of rows come with the step, these are {other:?}"),
        };
        match weight {
            Some(bytes) => {
                let ([], [out]) = arena.views([], [out]);
                simd::get_rows(self.graph.tensor(table).format, bytes, cols, ids, out)
            }
            None => {
                let table = self.plan.slot(table).expect("an activation");
                let ([table], [out]) = arena.views([table], [out]);
                simd::get_rows(FormatId::F32, bytemuck::cast_slice(table), cols, ids, out)
            }
        }
    }

    fn matmul_id(
        &mut self,
        x: TensorId,
        weight: TensorId,
        bias: Option<TensorId>,
        ids: TensorId,
        out: TensorId,
    ) -> Result<(), simd::KernelError> {
        let [n_expert, rows, cols] = *self.plan.shape(weight).dims() else {
            unreachable!("checked by the builder")
        };
        let [n, n_used] = *self.plan.shape(ids).dims() else { unreachable!("checked by the builder") };
        let per_used = self.plan.shape(x).dims()[1] == n_used && n_used > 1;
        let WeightView { format, bytes, .. } = self.weight_view(weight);
        let experts = ExpertView { format, bytes, n_expert, rows, cols };
        let bias = self.opt_vector(bias);
        let (slots, out) = ([self.slot(x), self.slot(ids)], self.slot(out));
        let Memory { arena, scratch, .. } = &mut *self.memory;
        let ([x, ids], [out]) = arena.views(slots, [out]);
        let (isa, exec, ids) = (self.isa, self.exec, bytemuck::cast_slice(ids));
        simd::matmul_id(isa, exec, experts, bias.as_deref(), x, per_used, ids, n, n_used, out, scratch)
    }

    fn matmul(
        &mut self,
        x: TensorId,
        weights: &[TensorId],
        biases: &[Option<TensorId>],
        outputs: &[TensorId],
    ) -> Result<(), simd::KernelError> {
        let n = weights.len();
        let empty = WeightView { format: FormatId::F32, bytes: &[], rows: 0, cols: 0 };
        let views: [WeightView; MAX_SIBLINGS] =
            core::array::from_fn(|i| weights.get(i).map_or(empty, |w| self.weight_view(*w)));
        let vectors: [Option<Vector>; MAX_SIBLINGS] =
            core::array::from_fn(|i| biases.get(i).and_then(|b| self.opt_vector(*b)));
        let biases: [Option<&[f32]>; MAX_SIBLINGS] = core::array::from_fn(|i| vectors[i].as_deref());
        let slots: [Slot; MAX_SIBLINGS] =
            core::array::from_fn(|i| outputs.get(i).map_or(EMPTY, |o| self.slot(*o)));
        let (m, x) = (self.plan.shape(x).rows(), self.slot(x));
        let Memory { arena, scratch, .. } = &mut *self.memory;
        let ([x], mut out) = arena.views([x], slots);
        simd::matmul(
            self.isa,
            self.exec,
            &views[..n],
            &biases[..n],
            x,
            m,
            Residual::None,
            &mut out[..n],
            scratch,
        )
    }

    fn binary(
        &mut self,
        kind: Binary,
        a: TensorId,
        b: TensorId,
        out: TensorId,
    ) -> Result<(), simd::KernelError> {
        let f = match kind {
            Binary::Add => simd::add,
            Binary::Mul => simd::mul,
        };
        let (isa, exec) = (self.isa, self.exec);
        if self.weight(b).is_some() {
            let b = self.vector(b);
            let v = self.map(a, out, []);
            return f(isa, exec, v.x, &b, v.out);
        }
        let b = self.slot(b);
        let v = self.map(a, out, [b]);
        f(isa, exec, v.x, v.others[0], v.out)
    }
}

struct MapViews<'a, const N: usize> {
    x: Option<&'a [f32]>,
    others: [&'a [f32]; N],
    out: &'a mut [f32],
}

/// Floats of a file: borrowed where they are aligned, copied where not (a file with an alignment below four).
enum Vector<'a> {
    Borrowed(&'a [f32]),
    Copied(Vec<f32>),
}

impl<'a> Vector<'a> {
    fn new(bytes: &'a [u8]) -> Vector<'a> {
        match bytemuck::try_cast_slice(bytes) {
            Ok(v) => Vector::Borrowed(v),
            Err(_) => Vector::Copied(bytes.chunks_exact(4).map(bytemuck::pod_read_unaligned).collect()),
        }
    }
}

impl core::ops::Deref for Vector<'_> {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        match self {
            Vector::Borrowed(v) => v,
            Vector::Copied(v) => v,
        }
    }
}
