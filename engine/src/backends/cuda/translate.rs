//! From graph to program: each node becomes the actions that compute it, one by one. Nothing is merged here.
//!
//! A product with block-format weights takes quantised activations; they are made once per (tensor, rounding), whoever
//! reads them. Those of an RMS norm's results are the norm's own: it chooses codes before it knows the row's factor, so
//! that a product can do the same (`fuse`'s `product_norm`), and quantising its floats would round otherwise now and then.

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;
use alloc::{format, vec};

use gpu_kernels::driver::DeviceInfo;
use gpu_kernels::kernels::{argmax, mmd_hopper, quantise_act, rope, round_act};
use gpu_kernels::launch::DevicePtr;
use gpu_kernels::ptx;
use quant::FormatId;

use super::emit::MMVF_MAX_PLAIN_COLS;
use super::program::{
    Action, Acts, Attention, ExpertProduct, Factor, Gate, Halves, Matrix, Norm, NormKind, Part, Place,
    Product, Program, Rotation, Sorted, Store, Table, Value,
};
use crate::graph::{Graph, Node};
use crate::op::{Op, RopeParams};
use crate::tensor::{Input, Storage, TensorId};

/// Rows of a weight of the model, and how they are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct WeightKey {
    /// Index into [`crate::weights::Weights`].
    pub weight: u32,
    /// First row.
    pub first_row: usize,
    /// Rows in all.
    pub rows: usize,
    /// Form on the device.
    pub form: WeightForm,
}

/// Form of a weight on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum WeightForm {
    /// Bytes as in the file: vectors.
    Plain,
    /// Tiled, as so many matrices of equal shape.
    Tiled {
        /// Experts; 1 for a plain matrix.
        n_expert: usize,
    },
}

/// Where things with a fixed address are.
pub trait Addresses {
    /// A weight.
    fn weight(&self, key: WeightKey) -> DevicePtr;
    /// An input of the step.
    fn input(&self, input: Input) -> DevicePtr;
    /// A place that holds these values for good.
    fn constant(&self, values: &[f32]) -> Result<DevicePtr, String>;
}

/// For questions whose answer does not depend on addresses: everything is somewhere, well aligned.
pub struct Anywhere;

impl Addresses for Anywhere {
    fn weight(&self, _: WeightKey) -> DevicePtr {
        DevicePtr(1 << 20)
    }
    fn input(&self, _: Input) -> DevicePtr {
        DevicePtr(1 << 20)
    }
    fn constant(&self, _: &[f32]) -> Result<DevicePtr, String> {
        Ok(DevicePtr(1 << 20))
    }
}

/// Every weight that a graph needs, in order of first use.
pub fn weights_of(graph: &Graph) -> Vec<WeightKey> {
    let mut keys: Vec<WeightKey> = Vec::new();
    let mut need = |id: TensorId, form: WeightForm| {
        if let Some(key) = weight_key(graph, id, form)
            && !keys.contains(&key)
        {
            keys.push(key);
        }
    };
    for node in &graph.nodes {
        let mut matrices: Vec<(TensorId, WeightForm)> = Vec::new();
        match &node.op {
            Op::GetRows { table, .. } => matrices.push((*table, WeightForm::Tiled { n_expert: 1 })),
            Op::MatMul { weights, .. } => {
                matrices.extend(weights.iter().map(|w| (*w, WeightForm::Tiled { n_expert: 1 })));
            }
            Op::MatMulId { weight, .. } => {
                let n_expert = graph.tensor(*weight).shape.dims()[0];
                matrices.push((*weight, WeightForm::Tiled { n_expert }));
            }
            _ => {}
        }
        node.op.for_each_input(|id| {
            let form = matrices.iter().find(|(m, _)| *m == id).map_or(WeightForm::Plain, |(_, form)| *form);
            need(id, form);
        });
    }
    keys
}

fn weight_key(graph: &Graph, id: TensorId, form: WeightForm) -> Option<WeightKey> {
    let base = graph.tensor(graph.base(id));
    match base.storage {
        Storage::Weight { weight, first_row } => {
            Some(WeightKey { weight, first_row, rows: base.shape.rows(), form })
        }
        _ => None,
    }
}

fn scaling(p: &RopeParams) -> rope::Scaling {
    rope::Scaling {
        n_rot: p.n_dims,
        freq_base: p.freq_base,
        freq_scale: p.freq_scale,
        ext_factor: p.ext_factor,
        beta_fast: p.beta_fast,
        beta_slow: p.beta_slow,
        n_ctx_orig: p.n_ctx_orig,
    }
}

/// A graph under translation.
pub struct Translator<'a> {
    graph: &'a Graph,
    addresses: &'a dyn Addresses,
    /// The program so far.
    pub program: Program,
    /// Value of each activation, by base tensor.
    pub values: BTreeMap<TensorId, Value>,
    /// Whether products with block formats dequantise their weights.
    dequantises: bool,
    quantised: Vec<(Place, Acts)>,
    /// f16 activations, of a mixture in the order of its pairs (by their ids).
    halved: Vec<(Place, Option<Place>, Halves)>,
    sorted: Vec<(Place, Sorted)>,
    rounded: Vec<(Place, Value, FormatId)>,
}

/// Whether a graph's tokens are a prompt's, and the device runs those apart.
pub fn runs_apart(graph: &Graph, device: &DeviceInfo) -> bool {
    graph.prompt && ptx::runs_hopper(device)
}

/// Translates a whole graph for a device; the reason if a node cannot be.
pub fn translate<'a>(
    graph: &'a Graph,
    addresses: &'a dyn Addresses,
    device: &DeviceInfo,
) -> Result<(Program, BTreeMap<TensorId, Value>), (usize, String)> {
    let mut t = Translator::new(graph, addresses, device);
    for (i, node) in graph.nodes.iter().enumerate() {
        t.node(node).map_err(|why| (i, why))?;
    }
    for (_, id) in &graph.outputs {
        if let Place::Value(v) = t.place(*id) {
            t.program.kept.push(v);
        }
    }
    t.program.drop_unread_norms();
    Ok((t.program, t.values))
}

impl<'a> Translator<'a> {
    /// Nothing translated yet.
    pub fn new(graph: &'a Graph, addresses: &'a dyn Addresses, device: &DeviceInfo) -> Translator<'a> {
        Translator {
            graph,
            addresses,
            dequantises: runs_apart(graph, device),
            program: Program { device: device.clone(), ..Program::default() },
            values: BTreeMap::new(),
            quantised: Vec::new(),
            halved: Vec::new(),
            sorted: Vec::new(),
            rounded: Vec::new(),
        }
    }

    /// Where a tensor is. An activation that no node wrote is given from outside.
    fn place(&mut self, id: TensorId) -> Place {
        let base = self.graph.base(id);
        let tensor = self.graph.tensor(base);
        match tensor.storage {
            Storage::Weight { .. } => {
                let key = weight_key(self.graph, id, WeightForm::Plain).expect("a weight");
                Place::At(self.addresses.weight(key))
            }
            Storage::Input(input) => Place::At(self.addresses.input(input)),
            _ => Place::Value(match self.values.get(&base) {
                Some(v) => *v,
                None => {
                    let v = self.program.value(tensor.len_bytes());
                    self.values.insert(base, v);
                    v
                }
            }),
        }
    }

    /// The value of an activation.
    fn value(&mut self, id: TensorId) -> Value {
        match self.place(id) {
            Place::Value(v) => v,
            Place::At(_) => unreachable!("a node writes an activation"),
        }
    }

    /// A weight that is a vector: floats as they are in the file.
    fn vector(&mut self, id: TensorId) -> Result<Place, String> {
        match self.graph.tensor(id).format {
            FormatId::F32 => Ok(self.place(id)),
            other => Err(format!("a vector of {other}; only F32 is possible")),
        }
    }

    fn opt_vector(&mut self, id: Option<TensorId>) -> Result<Option<Place>, String> {
        id.map(|id| self.vector(id)).transpose()
    }

    fn matrix(&mut self, id: TensorId, n_expert: usize) -> Result<Matrix, String> {
        let tensor = self.graph.tensor(id);
        let key = weight_key(self.graph, id, WeightForm::Tiled { n_expert })
            .ok_or_else(|| String::from("its second factor is no weight of the model"))?;
        Ok(Matrix {
            at: self.addresses.weight(key),
            format: tensor.format,
            rows: tensor.shape.rows() / n_expert,
            cols: tensor.shape.cols(),
            n_expert,
        })
    }

    /// The right-hand side for weights of a format, quantised if it must be and is not yet.
    fn factor(&mut self, x: Place, n: usize, k: usize, format: FormatId) -> Factor {
        let Some(kind) = quantise_act::kind(format) else { return self.float_factor(x, n, k, format) };
        if self.dequantises {
            return Factor::Halves(self.halves(x, n, k, None));
        }
        if let Some((_, acts)) = self.quantised.iter().find(|(p, a)| *p == x && a.kind == kind) {
            return Factor::Acts(*acts);
        }
        let acts = self.program.acts(kind, n, k);
        match self.norm_of(x, n, k) {
            Some(norm) if norm.acts.is_none() => norm.acts = Some(acts),
            // With weights of several kinds it comes once for each.
            Some(norm) => {
                let again = Norm { out: None, acts: Some(acts), ..*norm };
                self.push(Action::Norm(again));
            }
            None => self.push(Action::Quantise { x, n, k, acts }),
        }
        self.quantised.push((x, acts));
        Factor::Acts(acts)
    }

    /// The RMS norm whose result these rows are.
    fn norm_of(&mut self, x: Place, n: usize, k: usize) -> Option<&mut Norm> {
        let Place::Value(x) = x else { return None };
        self.program.actions.iter_mut().find_map(|action| match action {
            Action::Norm(norm) => {
                let fits = norm.kind == NormKind::Rms && norm.rows == n && norm.cols == k;
                (fits && norm.out == Some(x)).then_some(norm)
            }
            _ => None,
        })
    }

    /// Activations as f16 with scales, of a mixture (ids, pairs that share a row of `x`, the pairs) in their order.
    fn halves(&mut self, x: Place, n: usize, k: usize, pairs: Option<(Place, usize, Sorted)>) -> Halves {
        let ids = pairs.map(|(ids, ..)| ids);
        if let Some((.., halves)) = self.halved.iter().find(|(p, of, _)| *p == x && *of == ids) {
            return *halves;
        }
        let columns = pairs.map_or(n, |(.., sorted)| sorted.n_tiles * sorted.tile_cols);
        let halves = self.program.halves(columns, k);
        let pairs = pairs.map(|(_, per_x, sorted)| (sorted, per_x));
        self.push(Action::Halve { x, n, k, pairs, halves });
        self.halved.push((x, ids, halves));
        halves
    }

    /// The pairs of a mixture, sorted for products that dequantise.
    fn sorted(&mut self, ids: Place, n_pairs: usize, n_expert: usize) -> Sorted {
        if let Some((_, sorted)) = self.sorted.iter().find(|(of, _)| *of == ids) {
            return *sorted;
        }
        let sorted = self.program.sorted(n_pairs, n_expert, mmd_hopper::MIXTURE_COLS);
        self.push(Action::SortExperts { ids, n_pairs, n_expert, sorted });
        self.sorted.push((ids, sorted));
        sorted
    }

    /// The right-hand side for float weights: rounded in a pass of its own where many tokens share that.
    fn float_factor(&mut self, x: Place, n: usize, k: usize, format: FormatId) -> Factor {
        if format == FormatId::F32 || n <= MMVF_MAX_PLAIN_COLS {
            return Factor::Floats(x);
        }
        if let Some((_, v, _)) = self.rounded.iter().find(|(p, _, f)| *p == x && *f == format) {
            return Factor::Rounded(*v);
        }
        let out = self.program.value(round_act::tiles_bytes(n, k));
        self.push(Action::Round { x, format, n, k, out });
        self.rounded.push((x, out, format));
        Factor::Rounded(out)
    }

    fn push(&mut self, action: Action) {
        self.program.actions.push(action);
    }

    /// Translates a node.
    pub fn node(&mut self, node: &Node) -> Result<(), String> {
        let graph = self.graph;
        let shape = |id: TensorId| graph.tensor(id).shape;
        let out = node.outputs.first().copied();
        let out = || out.expect("checked by the builder");
        match &node.op {
            Op::GetRows { table, ids } => {
                let n = shape(*ids).elems();
                let cols = shape(*table).cols();
                let rows = match graph.tensor(graph.base(*table)).storage {
                    Storage::Weight { .. } => Table::Matrix(self.matrix(*table, 1)?),
                    _ => Table::Floats(self.place(*table)),
                };
                let ids = self.place(*ids);
                let out = self.value(out());
                self.push(Action::GetRows { table: rows, ids, n, cols, out });
            }
            Op::RmsNorm { x, weight, eps } => self.norm(NormKind::Rms, *x, [*weight, None], *eps, out())?,
            Op::LayerNorm { x, weight, bias, eps } => {
                self.norm(NormKind::Layer, *x, [*weight, *bias], *eps, out())?;
            }
            Op::MatMul { x, weights, biases } => self.products(*x, weights, biases, &node.outputs)?,
            Op::MatMulId { x, weight, bias, ids } => self.expert_product(*x, *weight, *bias, *ids, out())?,
            Op::RopeTable { positions, freq_factors, params } => {
                let n = shape(*positions).elems();
                let factors = self.opt_vector(*freq_factors)?;
                let frequencies =
                    self.addresses.constant(rope::frequencies(&scaling(params)).as_flattened())?;
                let (positions, out) = (self.place(*positions), self.value(out()));
                let (magnitude, n_rot) = (params.attn_factor, params.n_dims);
                self.push(Action::RopeTable { positions, frequencies, factors, magnitude, n, n_rot, out });
            }
            Op::Rope { x, table, mode } => {
                let [n, heads, head_dim] = *shape(*x).dims() else { unreachable!("checked by the builder") };
                let rotation = Rotation { x: self.place(*x), out: self.value(out()), heads, head_dim };
                let (n_rot, table) = (shape(*table).cols(), self.place(*table));
                self.push(Action::Rope { rotation, table, n_rot, mode: *mode, n });
            }
            Op::Hadamard { x, width } => {
                let (n, x, out) = (shape(*x).elems(), self.place(*x), self.value(out()));
                self.push(Action::Hadamard { x, width: *width, n, out });
            }
            Op::KvStore { k, v, il } => {
                let n = shape(*k).rows();
                let (k, v) = (self.place(*k), self.place(*v));
                self.push(Action::Store(Store { il: *il, k, v, n, rope: None, widths: [None; 2] }));
            }
            Op::Attention { q, sinks, params } => {
                let n = shape(*q).dims()[0];
                let (q, sinks) = (self.place(*q), self.opt_vector(*sinks)?);
                let out = self.value(out());
                self.push(Action::Attention(Attention {
                    q,
                    store: None,
                    sinks,
                    params: *params,
                    n,
                    out,
                    rotated: false,
                    acts: None,
                    partials: None,
                }));
            }
            Op::Binary { kind, a, b } => {
                let (n, period) = (shape(*a).elems(), shape(*b).elems());
                if matches!(graph.tensor(graph.base(*b)).storage, Storage::Weight { .. }) {
                    self.vector(*b)?;
                }
                let (a, b, out) = (self.place(*a), self.place(*b), self.value(out()));
                self.push(Action::Binary { kind: *kind, a, b, n, period, out });
            }
            Op::Unary { kind, x } => {
                let (n, x, out) = (shape(*x).elems(), self.place(*x), self.value(out()));
                self.push(Action::Unary { kind: *kind, x, n, out });
            }
            Op::Scale { x, scale } => {
                let (n, x, out) = (shape(*x).elems(), self.place(*x), self.value(out()));
                self.push(Action::Scale { x, scale: *scale, n, out });
            }
            Op::Softcap { x, cap } => {
                let (n, x, out) = (shape(*x).elems(), self.place(*x), self.value(out()));
                self.push(Action::Softcap { x, cap: *cap, n, out });
            }
            Op::Glu { kind, gate, up } => {
                let (n, k) = (shape(*gate).rows(), shape(*gate).cols());
                let (gate, up) = (self.place(*gate), self.place(*up));
                let out = Some(self.value(out()));
                self.push(Action::Gate(Gate { kind: *kind, gate, up, n, k, out, acts: None }));
            }
            Op::MoeRoute { logits, params } => {
                let (n, n_expert) = (shape(*logits).rows(), shape(*logits).cols());
                let logits = self.place(*logits);
                let (ids, weights) = (self.value(node.outputs[0]), self.value(node.outputs[1]));
                self.push(Action::MoeRoute { logits, params: *params, n, n_expert, ids, weights });
            }
            Op::MoeCombine { x, weights } => {
                let (n, n_used) = (shape(*weights).rows(), shape(*weights).cols());
                let cols = shape(*x).cols();
                let (x, weights, out) = (self.place(*x), self.place(*weights), self.value(out()));
                self.push(Action::MoeCombine { x, weights, n, n_used, cols, out });
            }
            Op::Argmax { x } => {
                let (n, cols) = (shape(*x).rows(), shape(*x).cols());
                let scratch = self.program.value(argmax::scratch_bytes(n, cols));
                let (x, out) = (self.place(*x), self.value(out()));
                self.push(Action::Argmax { x, n, cols, out, scratch });
            }
            Op::ScaleExperts { x, factors, ids } => {
                let (n, cols, n_expert) = (shape(*x).rows(), shape(*x).cols(), shape(*factors).elems());
                let (x, factors, ids) = (self.place(*x), self.vector(*factors)?, self.place(*ids));
                let out = self.value(out());
                self.push(Action::ScaleExperts { x, factors, ids, n, cols, n_expert, out });
            }
            Op::RowGate { x, gate } => {
                let (n, cols) = (shape(*x).rows(), shape(*x).cols());
                let (x, gate, out) = (self.place(*x), self.place(*gate), self.value(out()));
                self.push(Action::RowGate { x, gate, n, cols, out });
            }
        }
        Ok(())
    }

    fn norm(
        &mut self,
        kind: NormKind,
        x: TensorId,
        [weight, bias]: [Option<TensorId>; 2],
        eps: f32,
        out: TensorId,
    ) -> Result<(), String> {
        let shape = self.graph.tensor(x).shape;
        let norm = Norm {
            kind,
            x: self.place(x),
            add: None,
            weight: self.opt_vector(weight)?,
            bias: self.opt_vector(bias)?,
            eps,
            rows: shape.rows(),
            cols: shape.cols(),
            out: Some(self.value(out)),
            acts: None,
        };
        self.push(Action::Norm(norm));
        Ok(())
    }

    /// The products of `x` with several matrices.
    fn products(
        &mut self,
        x: TensorId,
        weights: &[TensorId],
        biases: &[Option<TensorId>],
        outputs: &[TensorId],
    ) -> Result<(), String> {
        let shape = self.graph.tensor(x).shape;
        let (n, k) = (shape.rows(), shape.cols());
        let x = self.place(x);
        let mut parts = Vec::new();
        for ((w, bias), out) in weights.iter().zip(biases).zip(outputs) {
            let w = self.matrix(*w, 1)?;
            let bias = self.opt_vector(*bias)?;
            parts.push(Part { w, bias, residual: None, out: self.value(*out) });
        }
        // Matrices of one format go together; a mixed file (Q4_K_M has some Q6_K) makes more than one product.
        while let Some(first) = parts.first() {
            let format = first.w.format;
            let (now, later): (Vec<Part>, Vec<Part>) = parts.into_iter().partition(|p| p.w.format == format);
            let x = self.factor(x, n, k, format);
            self.push(Action::Product(Product {
                parts: now,
                x,
                n,
                k,
                glu: None,
                acts: None,
                norm: None,
                ahead: None,
            }));
            parts = later;
        }
        Ok(())
    }

    /// The products of `x` with the experts that `ids` name.
    fn expert_product(
        &mut self,
        x: TensorId,
        weight: TensorId,
        bias: Option<TensorId>,
        ids: TensorId,
        out: TensorId,
    ) -> Result<(), String> {
        let graph = self.graph;
        let shape = |id: TensorId| graph.tensor(id).shape;
        let n_expert = shape(weight).dims()[0];
        let [n, n_used] = *shape(ids).dims() else { unreachable!("checked by the builder") };
        let per_used = shape(x).dims()[1] == n_used && n_used > 1;
        let (rows, k) = (shape(x).rows(), shape(x).cols());
        let w = self.matrix(weight, n_expert)?;
        let bias = self.opt_vector(bias)?;
        let (x, ids) = (self.place(x), self.place(ids));
        let (x, sorted) = match quantise_act::kind(w.format) {
            Some(_) if self.dequantises => {
                let sorted = self.sorted(ids, n * n_used, n_expert);
                let per_x = if per_used { 1 } else { n_used };
                (Factor::Halves(self.halves(x, rows, k, Some((ids, per_x, sorted)))), Some(sorted))
            }
            Some(_) => (self.factor(x, rows, k, w.format), None),
            // A mixture's float products round on the way, whatever the number of tokens.
            None => (Factor::Floats(x), None),
        };
        let parts = vec![Part { w, bias, residual: None, out: self.value(out) }];
        let product = ExpertProduct { parts, x, per_used, ids, n, n_used, k, glu: None, sorted };
        self.push(Action::ExpertProduct(product));
        Ok(())
    }
}
