//! A graph: tensors and nodes in execution order, built by [`GraphBuilder`].
//!
//! Node order is the order of side effects (the KV cache is written before it is read). The builder checks every shape;
//! since the model's weights were checked against its tensor list before, a mismatch here is a bug of ours and panics.

use alloc::string::String;
use alloc::vec::Vec;

use quant::FormatId;

use crate::op::{AttentionParams, Binary, Glu, MoeRouteParams, Op, RopeMode, RopeParams, Unary};
use crate::tensor::{Input, Shape, Storage, Tensor, TensorId};

/// One operation and what it writes.
#[derive(Clone, Debug)]
pub struct Node {
    /// What to do.
    pub op: Op,
    /// Tensors written; empty for pure side effects.
    pub outputs: Vec<TensorId>,
}

/// What a step gives back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Output {
    /// f32 [n_outputs, n_vocab]
    Logits,
    /// The likeliest token of each output, i32 `[n_outputs]`
    Tokens,
    /// Final hidden states after the last norm, f32 [n_outputs, n_embd]
    Embeddings,
    /// A tensor kept for inspection; its name says which.
    Tap,
}

/// Tensors, nodes in order, and outputs.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    /// All tensors.
    pub tensors: Vec<Tensor>,
    /// Nodes in execution order.
    pub nodes: Vec<Node>,
    /// Tensors that must survive the step.
    pub outputs: Vec<(Output, TensorId)>,
    /// [`crate::models::StepShape::prompt`] of the step.
    pub prompt: bool,
}

impl Graph {
    /// The tensor with this id.
    pub fn tensor(&self, id: TensorId) -> &Tensor {
        &self.tensors[id.0 as usize]
    }

    /// The tensor that owns the memory of `id`: reshapes followed to their base.
    pub fn base(&self, id: TensorId) -> TensorId {
        match self.tensor(id).storage {
            Storage::Reshape(of) => self.base(of),
            _ => id,
        }
    }

    /// The output of a kind, if the graph has it.
    pub fn output(&self, kind: Output) -> Option<TensorId> {
        self.outputs.iter().find(|(k, _)| *k == kind).map(|(_, id)| *id)
    }
}

/// Builds a graph; one method per operation.
pub struct GraphBuilder {
    graph: Graph,
    taps: bool,
}

impl GraphBuilder {
    /// An empty graph. With `taps`, tensors named by [`GraphBuilder::tap`] are kept as outputs.
    pub fn new(taps: bool) -> GraphBuilder {
        GraphBuilder { graph: Graph::default(), taps }
    }

    /// The finished graph.
    pub fn finish(self) -> Graph {
        self.graph
    }

    /// Shape of a tensor.
    pub fn shape(&self, id: TensorId) -> Shape {
        self.graph.tensor(id).shape
    }

    fn push(&mut self, format: FormatId, shape: &[usize], storage: Storage) -> TensorId {
        let id = TensorId(self.graph.tensors.len() as u32);
        self.graph.tensors.push(Tensor { name: String::new(), format, shape: Shape::new(shape), storage });
        id
    }

    fn activation(&mut self, shape: &[usize]) -> TensorId {
        self.push(FormatId::F32, shape, Storage::Activation)
    }

    fn node(&mut self, op: Op, outputs: Vec<TensorId>) {
        self.graph.nodes.push(Node { op, outputs });
    }

    fn unary_node(&mut self, op: Op, shape: Shape) -> TensorId {
        let out = self.activation(shape.dims());
        self.node(op, alloc::vec![out]);
        out
    }

    /// Rows of a weight as a tensor.
    pub fn weight(&mut self, weight: u32, format: FormatId, shape: &[usize], first_row: usize) -> TensorId {
        self.push(format, shape, Storage::Weight { weight, first_row })
    }

    /// A step input of `n` elements.
    pub fn input(&mut self, input: Input, n: usize) -> TensorId {
        self.push(FormatId::I32, &[n], Storage::Input(input))
    }

    /// The same data with another shape.
    pub fn reshape(&mut self, x: TensorId, shape: &[usize]) -> TensorId {
        assert_eq!(
            self.shape(x).elems(),
            Shape::new(shape).elems(),
            "reshape {:?} to {shape:?}",
            self.shape(x)
        );
        let format = self.graph.tensor(x).format;
        self.push(format, shape, Storage::Reshape(x))
    }

    /// Mark as an output.
    pub fn output(&mut self, kind: Output, x: TensorId) {
        self.graph.outputs.push((kind, x));
    }

    /// Name a tensor as llama.cpp does (`l_out-3`); kept as an output when taps are on.
    pub fn tap(&mut self, name: &str, il: Option<usize>, x: TensorId) {
        if self.taps {
            self.graph.tensors[x.0 as usize].name = match il {
                Some(il) => alloc::format!("{name}-{il}"),
                None => String::from(name),
            };
            self.graph.outputs.push((Output::Tap, x));
        }
    }

    /// [`Op::GetRows`]
    pub fn get_rows(&mut self, table: TensorId, ids: TensorId) -> TensorId {
        let (rows, cols) = (self.shape(ids).elems(), self.shape(table).cols());
        self.unary_node(Op::GetRows { table, ids }, Shape::new(&[rows, cols]))
    }

    /// [`Op::RmsNorm`]
    pub fn rms_norm(&mut self, x: TensorId, weight: Option<TensorId>, eps: f32) -> TensorId {
        let shape = self.shape(x);
        if let Some(w) = weight {
            assert_eq!(self.shape(w).elems(), shape.cols(), "rms_norm weight");
        }
        self.unary_node(Op::RmsNorm { x, weight, eps }, shape)
    }

    /// [`Op::LayerNorm`]
    pub fn layer_norm(
        &mut self,
        x: TensorId,
        weight: Option<TensorId>,
        bias: Option<TensorId>,
        eps: f32,
    ) -> TensorId {
        let shape = self.shape(x);
        for w in [weight, bias].into_iter().flatten() {
            assert_eq!(self.shape(w).elems(), shape.cols(), "layer_norm weight or bias");
        }
        self.unary_node(Op::LayerNorm { x, weight, bias, eps }, shape)
    }

    /// [`Op::MatMul`] with several weights: one output each.
    pub fn matmul_many(&mut self, x: TensorId, weights: &[(TensorId, Option<TensorId>)]) -> Vec<TensorId> {
        let (rows, k) = (self.shape(x).rows(), self.shape(x).cols());
        let outputs = weights
            .iter()
            .map(|&(w, bias)| {
                let shape = self.shape(w);
                assert_eq!(shape.cols(), k, "matmul: weight {shape:?} by x [.., {k}]");
                if let Some(b) = bias {
                    assert_eq!(self.shape(b).elems(), shape.rows(), "matmul bias");
                }
                self.activation(&[rows, shape.rows()])
            })
            .collect::<Vec<_>>();
        let (weights, biases) = weights.iter().copied().unzip();
        self.node(Op::MatMul { x, weights, biases }, outputs.clone());
        outputs
    }

    /// [`Op::MatMul`] with one weight.
    pub fn matmul(&mut self, x: TensorId, weight: TensorId, bias: Option<TensorId>) -> TensorId {
        self.matmul_many(x, &[(weight, bias)])[0]
    }

    /// [`Op::MatMulId`]
    pub fn matmul_id(
        &mut self,
        x: TensorId,
        weight: TensorId,
        bias: Option<TensorId>,
        ids: TensorId,
    ) -> TensorId {
        let (x_shape, w_shape, ids_shape) = (self.shape(x), self.shape(weight), self.shape(ids));
        let [n_expert, rows, k] = *w_shape.dims() else { panic!("matmul_id: weight {w_shape:?} is not 3-D") };
        let [n, n_used] = *ids_shape.dims() else { panic!("matmul_id: ids {ids_shape:?} is not 2-D") };
        let [xn, xu, xk] = *x_shape.dims() else { panic!("matmul_id: x {x_shape:?} is not 3-D") };
        assert!(
            xn == n && xk == k && (xu == 1 || xu == n_used),
            "matmul_id: x {x_shape:?}, weight {w_shape:?}, ids {ids_shape:?}"
        );
        if let Some(b) = bias {
            assert_eq!(self.shape(b).dims(), [n_expert, rows], "matmul_id bias");
        }
        self.unary_node(Op::MatMulId { x, weight, bias, ids }, Shape::new(&[n, n_used, rows]))
    }

    /// [`Op::RopeTable`]
    pub fn rope_table(
        &mut self,
        positions: TensorId,
        freq_factors: Option<TensorId>,
        params: RopeParams,
    ) -> TensorId {
        let n = self.shape(positions).elems();
        if let Some(f) = freq_factors {
            assert_eq!(self.shape(f).elems(), params.n_dims / 2, "rope frequency factors");
        }
        self.unary_node(Op::RopeTable { positions, freq_factors, params }, Shape::new(&[n, params.n_dims]))
    }

    /// [`Op::Rope`]
    pub fn rope(&mut self, x: TensorId, table: TensorId, mode: RopeMode) -> TensorId {
        let (shape, table_shape) = (self.shape(x), self.shape(table));
        let [n, _, head_dim] = *shape.dims() else { panic!("rope: x {shape:?} is not [n, heads, head_dim]") };
        assert!(
            table_shape.rows() == n && table_shape.cols() <= head_dim,
            "rope: x {shape:?}, table {table_shape:?}"
        );
        self.unary_node(Op::Rope { x, table, mode }, shape)
    }

    /// [`Op::KvStore`]
    pub fn kv_store(&mut self, k: TensorId, v: TensorId, il: usize) {
        self.node(Op::KvStore { k, v, il }, Vec::new());
    }

    /// [`Op::Attention`]
    pub fn attention(&mut self, q: TensorId, sinks: Option<TensorId>, params: AttentionParams) -> TensorId {
        let n = self.shape(q).dims()[0];
        assert_eq!(self.shape(q).elems(), n * params.n_head * params.head_dim_k, "attention q");
        assert_eq!(params.n_head % params.n_head_kv, 0, "attention heads");
        self.unary_node(
            Op::Attention { q, sinks, params },
            Shape::new(&[n, params.n_head * params.head_dim_v]),
        )
    }

    fn binary(&mut self, kind: Binary, a: TensorId, b: TensorId) -> TensorId {
        let (sa, sb) = (self.shape(a), self.shape(b));
        assert!(
            sa.elems() == sb.elems() || (sb.rows() == 1 && sb.cols() == sa.cols()),
            "{kind:?}: {sa:?} and {sb:?}"
        );
        self.unary_node(Op::Binary { kind, a, b }, sa)
    }

    /// `a + b`
    pub fn add(&mut self, a: TensorId, b: TensorId) -> TensorId {
        self.binary(Binary::Add, a, b)
    }

    /// `a · b`
    pub fn mul(&mut self, a: TensorId, b: TensorId) -> TensorId {
        self.binary(Binary::Mul, a, b)
    }

    /// [`Op::Unary`]
    pub fn unary(&mut self, kind: Unary, x: TensorId) -> TensorId {
        self.unary_node(Op::Unary { kind, x }, self.shape(x))
    }

    /// [`Op::Scale`]
    pub fn scale(&mut self, x: TensorId, scale: f32) -> TensorId {
        self.unary_node(Op::Scale { x, scale }, self.shape(x))
    }

    /// [`Op::Softcap`]
    pub fn softcap(&mut self, x: TensorId, cap: f32) -> TensorId {
        self.unary_node(Op::Softcap { x, cap }, self.shape(x))
    }

    /// [`Op::Hadamard`]
    pub fn hadamard(&mut self, x: TensorId, width: usize) -> TensorId {
        let shape = self.shape(x);
        assert!(
            width.is_power_of_two() && shape.cols().is_multiple_of(width),
            "hadamard of {width}: x {shape:?}"
        );
        self.unary_node(Op::Hadamard { x, width }, shape)
    }

    /// [`Op::Glu`]
    pub fn glu(&mut self, kind: Glu, gate: TensorId, up: TensorId) -> TensorId {
        assert_eq!(self.shape(gate), self.shape(up), "glu");
        self.unary_node(Op::Glu { kind, gate, up }, self.shape(gate))
    }

    /// [`Op::MoeRoute`]: (ids, weights).
    pub fn moe_route(&mut self, logits: TensorId, params: MoeRouteParams) -> (TensorId, TensorId) {
        let n = self.shape(logits).rows();
        assert!(params.n_used <= self.shape(logits).cols(), "moe_route: more experts used than there are");
        let ids = self.push(FormatId::I32, &[n, params.n_used], Storage::Activation);
        let weights = self.activation(&[n, params.n_used]);
        self.node(Op::MoeRoute { logits, params }, alloc::vec![ids, weights]);
        (ids, weights)
    }

    /// [`Op::MoeCombine`]
    pub fn moe_combine(&mut self, x: TensorId, weights: TensorId) -> TensorId {
        let (sx, sw) = (self.shape(x), self.shape(weights));
        assert_eq!(sx.rows(), sw.elems(), "moe_combine: x {sx:?}, weights {sw:?}");
        self.unary_node(Op::MoeCombine { x, weights }, Shape::new(&[sw.rows(), sx.cols()]))
    }

    /// [`Op::ScaleExperts`]
    pub fn scale_experts(&mut self, x: TensorId, factors: TensorId, ids: TensorId) -> TensorId {
        let shape = self.shape(x);
        assert_eq!(shape.rows(), self.shape(ids).elems(), "scale_experts: x {shape:?}");
        self.unary_node(Op::ScaleExperts { x, factors, ids }, shape)
    }

    /// [`Op::Argmax`]
    pub fn argmax(&mut self, x: TensorId) -> TensorId {
        let out = self.push(FormatId::I32, &[self.shape(x).rows()], Storage::Activation);
        self.node(Op::Argmax { x }, alloc::vec![out]);
        out
    }

    /// [`Op::RowGate`]
    pub fn row_gate(&mut self, x: TensorId, gate: TensorId) -> TensorId {
        let shape = self.shape(x);
        assert_eq!(self.shape(gate).elems(), shape.rows(), "row_gate");
        self.unary_node(Op::RowGate { x, gate }, shape)
    }
}
