//! A program: what the device does in one step of a plan, after translation from the graph and before memory is assigned.
//!
//! It is a list of [`Action`]s on [`Value`]s. A value is a piece of the arena, written by one action; everything else
//! (weights, the cache, the step's inputs) has a fixed address. Where one kernel can do the work of several actions, the
//! rules in [`super::fuse`] merge them. [`super::emit`] turns an action into launches once addresses are known.

use alloc::vec::Vec;

use gpu_kernels::driver::DeviceInfo;
use gpu_kernels::kernels::quantise_act::{ActScale, Kind};
use gpu_kernels::kernels::{moe_sort, round_act};
use gpu_kernels::launch::DevicePtr;
use quant::FormatId;

use super::emit::MostTokens;
use crate::op::{AttentionParams, Binary, Glu, MoeRouteParams, RopeMode, Unary};
use crate::plan::Access;

/// A piece of the arena: index into [`Program::values`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Value(pub u32);

impl Value {
    /// Index into [`Program::values`].
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Something in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the arena.
    Value(Value),
    /// At an address that does not change: a weight, an input.
    At(DevicePtr),
}

/// A tiled matrix of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Matrix {
    /// Its first tile.
    pub at: DevicePtr,
    /// Element format.
    pub format: FormatId,
    /// Rows, of one expert if there are several.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Experts, one tiled matrix after the other; 1 for a plain matrix.
    pub n_expert: usize,
}

/// Quantised activations: codes and scales as `quantise_act` writes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Acts {
    /// Codes.
    pub q: Value,
    /// Scales.
    pub scales: Value,
    /// Rounding.
    pub kind: Kind,
}

/// Quantised activations whose scales wait for the factor of a norm of their one row: what a product of one token leaves of
/// its results for it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Unscaled {
    /// Codes of result · weight, scales not rounded yet.
    pub acts: Acts,
    /// f32, each group's sum of squares of results.
    pub squares: Value,
}

impl Unscaled {
    fn for_each_value(self, f: &mut dyn FnMut(Value)) {
        f(self.acts.q);
        f(self.acts.scales);
        f(self.squares);
    }
}

/// Activations for products that dequantise their weights: what `round_act::launch_scaled` writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Halves {
    /// f16, in tiles.
    pub tiles: Value,
    /// f32, one per column.
    pub scales: Value,
}

/// The right-hand side of a product.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Factor {
    /// f32; products with float weights, and with block formats where the kernel quantises one token's on the way.
    Floats(Place),
    /// f32 [1, k], RMS-normed on the way: weight `[k]`, epsilon. Products with block formats.
    Normed(Place, Place, f32),
    /// Rounded to the weights' format, in the tiles of `round_act`; products with F16 or BF16 weights and many tokens.
    Rounded(Value),
    /// Quantised; products with block formats.
    Acts(Acts),
    /// Quantised but for a norm's factor, epsilon; products with block formats and one token.
    Unscaled(Unscaled, f32),
    /// f16 with scales; products with block formats and a prompt's tokens, where those run apart. Of experts in the
    /// order of [`ExpertProduct::sorted`].
    Halves(Halves),
}

/// One matrix of a product and what becomes of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Part {
    /// The matrix.
    pub w: Matrix,
    /// f32 `[rows]`, added.
    pub bias: Option<Place>,
    /// f32 [n, rows], added after the bias; `out` may be the same memory.
    pub residual: Option<Place>,
    /// f32 [n, rows]. With a gate, only the first part's is written.
    pub out: Value,
}

/// `x · wᵀ` for matrices that share `x`.
#[derive(Clone, Debug, PartialEq)]
pub struct Product {
    /// The matrices; with a gate, exactly gate and up.
    pub parts: Vec<Part>,
    /// [n, k]
    pub x: Factor,
    /// Rows of `x`.
    pub n: usize,
    /// Columns of `x`.
    pub k: usize,
    /// `f(parts[0]) · parts[1]` is what is written, to `parts[0].out`.
    pub glu: Option<Glu>,
    /// With a gate, of one token or a batch of more than eight: where the result goes quantised, instead of `parts[0].out`.
    pub acts: Option<Acts>,
    /// With one part, one token and no gate: what a norm of the result with this weight takes, beside `parts[0].out`.
    pub norm: Option<(Place, Unscaled)>,
    /// With one token: weights that a later product reads, for L2.
    pub ahead: Option<Matrix>,
}

/// `w[ids[t, j]] · x[t, j or 0]`.
#[derive(Clone, Debug, PartialEq)]
pub struct ExpertProduct {
    /// The experts; with a gate, exactly gate and up. No residual.
    pub parts: Vec<Part>,
    /// [n, n_used or 1, k]
    pub x: Factor,
    /// Whether `x` has a row per expert used.
    pub per_used: bool,
    /// i32 [n, n_used]
    pub ids: Place,
    /// Tokens.
    pub n: usize,
    /// Experts per token.
    pub n_used: usize,
    /// Columns of `x`.
    pub k: usize,
    /// As in [`Product`].
    pub glu: Option<Glu>,
    /// The step's (token, slot) pairs by expert, where the kernel wants them so.
    pub sorted: Option<Sorted>,
}

/// Pairs sorted by expert, and the tiles of columns that they fill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sorted {
    /// u32 per pair.
    pub order: Value,
    /// Four u32 per tile.
    pub tiles: Value,
    /// Tiles there is room for.
    pub n_tiles: usize,
    /// Columns of a tile.
    pub tile_cols: usize,
}

impl Sorted {
    fn for_each_value(self, f: &mut dyn FnMut(Value)) {
        f(self.order);
        f(self.tiles);
    }
}

/// What a norm divides by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// Root of the mean square.
    Rms,
    /// Standard deviation, after the mean is taken out.
    Layer,
}

/// A norm over rows, with what may precede and follow it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// Which.
    pub kind: NormKind,
    /// f32 [rows, cols]
    pub x: Place,
    /// Added to `x` before; (what, where the sum goes).
    pub add: Option<(Place, Value)>,
    /// f32 `[cols]`
    pub weight: Option<Place>,
    /// f32 `[cols]`
    pub bias: Option<Place>,
    /// Added to the mean square or variance.
    pub eps: f32,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// f32 [rows, cols], if anybody reads the floats.
    pub out: Option<Value>,
    /// The same, quantised.
    pub acts: Option<Acts>,
}

/// `f(gate) · up`, as floats, quantised, or both.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gate {
    /// Function.
    pub kind: Glu,
    /// f32 [n, k]
    pub gate: Place,
    /// f32 [n, k]
    pub up: Place,
    /// Rows.
    pub n: usize,
    /// Columns.
    pub k: usize,
    /// f32 [n, k], if anybody reads the floats.
    pub out: Option<Value>,
    /// The same, quantised.
    pub acts: Option<Acts>,
}

/// A rotation of heads: f32 [n, heads, head_dim].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rotation {
    /// What is rotated.
    pub x: Place,
    /// Result; may be the same memory.
    pub out: Value,
    /// Heads.
    pub heads: usize,
    /// Elements per head.
    pub head_dim: usize,
}

/// Keys and values of a layer into the cache, with the rotations that may come just before.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Store {
    /// Layer.
    pub il: usize,
    /// f32 [n, n_head_kv · head_dim_k], not rotated yet if `rope` is given.
    pub k: Place,
    /// f32 [n, n_head_kv · head_dim_v]
    pub v: Place,
    /// Tokens.
    pub n: usize,
    /// (queries, table, elements rotated per head, pairing): rotated in the same launch; the keys alike.
    pub rope: Option<(Rotation, Place, usize, RopeMode)>,
    /// Widths of the Hadamard matrices that keys, and queries after `rope`, and values go through.
    pub widths: [Option<usize>; 2],
}

/// Attention of the step's tokens over a layer's cache.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// f32 [n, n_head · head_dim_k]
    pub q: Place,
    /// Keys, values and queries that `q` and the cache come from, if that is not an action of its own. One token a
    /// sequence.
    pub store: Option<Store>,
    /// f32 `[n_head]`
    pub sinks: Option<Place>,
    /// Layer, sizes, mask.
    pub params: AttentionParams,
    /// Tokens.
    pub n: usize,
    /// f32 [n, n_head · head_dim_v]
    pub out: Value,
    /// Whether results go through Hadamard's matrix of [`gpu_kernels::kernels::flash::ROTATED_WIDTH`].
    pub rotated: bool,
    /// Where the results go quantised, instead of `out`.
    pub acts: Option<Acts>,
    /// The kernel's scratch.
    pub partials: Option<Value>,
}

/// A table that rows are taken from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Table {
    /// A tiled weight.
    Matrix(Matrix),
    /// f32 [_, cols]
    Floats(Place),
}

/// What one kernel does, or a few launches together.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // fields are named as in `Op`
pub enum Action {
    GetRows {
        table: Table,
        ids: Place,
        n: usize,
        cols: usize,
        out: Value,
    },
    Norm(Norm),
    Quantise {
        x: Place,
        n: usize,
        k: usize,
        acts: Acts,
    },
    /// To 16 bits, in tiles.
    Round {
        x: Place,
        format: FormatId,
        n: usize,
        k: usize,
        out: Value,
    },
    /// To f16 and scales; the pairs of a mixture in their sorted order, `pairs_per_x` of which share a row of `x`.
    Halve {
        x: Place,
        n: usize,
        k: usize,
        pairs: Option<(Sorted, usize)>,
        halves: Halves,
    },
    Product(Product),
    ExpertProduct(ExpertProduct),
    /// Orders the step's (token, slot) pairs by expert, into tiles of so many columns.
    SortExperts {
        ids: Place,
        n_pairs: usize,
        n_expert: usize,
        sorted: Sorted,
    },
    /// `frequencies`: radians per position of each pair, [n_rot / 2] sums of two floats.
    RopeTable {
        positions: Place,
        frequencies: DevicePtr,
        factors: Option<Place>,
        magnitude: f32,
        n: usize,
        n_rot: usize,
        out: Value,
    },
    Rope {
        rotation: Rotation,
        table: Place,
        n_rot: usize,
        mode: RopeMode,
        n: usize,
    },
    Hadamard {
        x: Place,
        width: usize,
        n: usize,
        out: Value,
    },
    Store(Store),
    Attention(Attention),
    Binary {
        kind: Binary,
        a: Place,
        b: Place,
        n: usize,
        period: usize,
        out: Value,
    },
    Unary {
        kind: Unary,
        x: Place,
        n: usize,
        out: Value,
    },
    Scale {
        x: Place,
        scale: f32,
        n: usize,
        out: Value,
    },
    Softcap {
        x: Place,
        cap: f32,
        n: usize,
        out: Value,
    },
    Gate(Gate),
    MoeRoute {
        logits: Place,
        params: MoeRouteParams,
        n: usize,
        n_expert: usize,
        ids: Value,
        weights: Value,
    },
    MoeCombine {
        x: Place,
        weights: Place,
        n: usize,
        n_used: usize,
        cols: usize,
        out: Value,
    },
    RowGate {
        x: Place,
        gate: Place,
        n: usize,
        cols: usize,
        out: Value,
    },
    /// `n` (token, slot) pairs.
    ScaleExperts {
        x: Place,
        factors: Place,
        ids: Place,
        n: usize,
        cols: usize,
        n_expert: usize,
        out: Value,
    },
    /// Index of each row's largest element, the first of equal ones.
    Argmax {
        x: Place,
        n: usize,
        cols: usize,
        out: Value,
        scratch: Value,
    },
}

/// Actions in order and the values they work on.
#[derive(Clone, Debug, Default)]
pub struct Program {
    /// The device it is for.
    pub device: DeviceInfo,
    /// Most tokens of a sequence in the step.
    pub most_tokens: MostTokens,
    /// Bytes of each value.
    pub values: Vec<usize>,
    /// What to do.
    pub actions: Vec<Action>,
    /// Values that outlive the step.
    pub kept: Vec<Value>,
}

impl Program {
    /// A new value of this size.
    pub fn value(&mut self, bytes: usize) -> Value {
        self.values.push(bytes);
        Value(self.values.len() as u32 - 1)
    }

    /// New room for quantised activations [n, k].
    pub fn acts(&mut self, kind: Kind, n: usize, k: usize) -> Acts {
        let q = self.value(n * k);
        Acts { q, scales: self.value(n * k / 32 * size_of::<ActScale>()), kind }
    }

    /// Room for pairs sorted by expert.
    pub fn sorted(&mut self, n_pairs: usize, n_expert: usize, tile_cols: usize) -> Sorted {
        let n_tiles = moe_sort::max_tiles(n_pairs, n_expert, tile_cols);
        Sorted { order: self.value(4 * n_pairs), tiles: self.value(16 * n_tiles), n_tiles, tile_cols }
    }

    /// Room for f16 activations and their scales.
    pub fn halves(&mut self, n_cols: usize, k: usize) -> Halves {
        let tiles = self.value(round_act::tiles_bytes(n_cols, k));
        Halves { tiles, scales: self.value(4 * round_act::n_scales(n_cols)) }
    }

    /// How often a value is read, counting what outlives the step as a read.
    pub fn n_reads(&self, value: Value) -> usize {
        let mut n = self.kept.iter().filter(|v| **v == value).count();
        for action in &self.actions {
            action.for_each_read(&mut |v| n += usize::from(v == value));
        }
        n
    }

    /// Lets norms whose results are read quantised alone write no floats.
    pub fn drop_unread_norms(&mut self) {
        for i in 0..self.actions.len() {
            let Action::Norm(norm @ Norm { out: Some(out), acts: Some(_), .. }) = self.actions[i] else {
                continue;
            };
            if self.n_reads(out) == 0 {
                self.actions[i] = Action::Norm(Norm { out: None, ..norm });
            }
        }
    }

    /// What the planner needs to know, action by action.
    pub fn accesses(&self) -> Vec<Access> {
        self.actions.iter().map(Action::access).collect()
    }
}

impl Factor {
    fn for_each_value(self, f: &mut dyn FnMut(Value)) {
        let mut place = |p: Place| {
            if let Place::Value(v) = p {
                f(v);
            }
        };
        match self {
            Factor::Floats(x) => place(x),
            Factor::Normed(x, weight, _) => {
                place(x);
                place(weight);
            }
            Factor::Rounded(v) => f(v),
            Factor::Acts(acts) => {
                f(acts.q);
                f(acts.scales);
            }
            Factor::Unscaled(unscaled, _) => unscaled.for_each_value(f),
            Factor::Halves(halves) => {
                f(halves.tiles);
                f(halves.scales);
            }
        }
    }
}

impl Store {
    fn for_each_read(&self, f: &mut dyn FnMut(Place)) {
        f(self.k);
        f(self.v);
        if let Some((q, table, ..)) = self.rope {
            f(q.x);
            f(table);
        }
    }

    /// Queries may be rotated where they are, unless other threads read what a thread writes.
    fn in_place(&self) -> Option<(Place, Value)> {
        self.rope.filter(|_| self.widths[0].is_none()).map(|(q, ..)| (q.x, q.out))
    }
}

impl Action {
    /// Calls `f` for every value read.
    pub fn for_each_read(&self, f: &mut dyn FnMut(Value)) {
        fn place(p: Place, f: &mut dyn FnMut(Value)) {
            if let Place::Value(v) = p {
                f(v);
            }
        }
        fn opt(p: Option<Place>, f: &mut dyn FnMut(Value)) {
            if let Some(p) = p {
                place(p, f);
            }
        }
        match self {
            Action::GetRows { table, ids, .. } => {
                if let Table::Floats(p) = table {
                    place(*p, f);
                }
                place(*ids, f);
            }
            Action::Norm(n) => {
                place(n.x, f);
                opt(n.add.map(|(p, _)| p), f);
                opt(n.weight, f);
                opt(n.bias, f);
            }
            Action::Product(Product { parts, x, norm, .. }) => {
                x.for_each_value(f);
                opt(norm.map(|(weight, _)| weight), f);
                for part in parts {
                    opt(part.bias, f);
                    opt(part.residual, f);
                }
            }
            Action::ExpertProduct(p) => {
                p.x.for_each_value(f);
                place(p.ids, f);
                p.parts.iter().for_each(|part| opt(part.bias, f));
                p.sorted.iter().for_each(|sorted| sorted.for_each_value(f));
            }
            Action::Halve { x, pairs, .. } => {
                place(*x, f);
                pairs.iter().for_each(|(sorted, _)| sorted.for_each_value(f));
            }
            Action::RopeTable { positions, factors, .. } => {
                place(*positions, f);
                opt(*factors, f);
            }
            Action::Rope { rotation, table, .. } => {
                place(rotation.x, f);
                place(*table, f);
            }
            Action::Store(s) => s.for_each_read(&mut |p| place(p, f)),
            Action::Attention(a) => {
                match &a.store {
                    Some(store) => store.for_each_read(&mut |p| place(p, f)),
                    None => place(a.q, f),
                }
                opt(a.sinks, f);
            }
            Action::Binary { a, b, .. } => {
                place(*a, f);
                place(*b, f);
            }
            Action::Quantise { x, .. }
            | Action::Round { x, .. }
            | Action::Hadamard { x, .. }
            | Action::Unary { x, .. }
            | Action::Scale { x, .. }
            | Action::Softcap { x, .. }
            | Action::Argmax { x, .. } => place(*x, f),
            Action::Gate(g) => {
                place(g.gate, f);
                place(g.up, f);
            }
            Action::SortExperts { ids, .. } => place(*ids, f),
            Action::MoeRoute { logits, .. } => place(*logits, f),
            Action::MoeCombine { x, weights, .. } => {
                place(*x, f);
                place(*weights, f);
            }
            Action::RowGate { x, gate, .. } => {
                place(*x, f);
                place(*gate, f);
            }
            Action::ScaleExperts { x, factors, ids, .. } => {
                place(*x, f);
                place(*factors, f);
                place(*ids, f);
            }
        }
    }

    /// Calls `f` for every value written.
    pub fn for_each_write(&self, f: &mut dyn FnMut(Value)) {
        let acts = |a: &Option<Acts>, f: &mut dyn FnMut(Value)| {
            if let Some(a) = a {
                f(a.q);
                f(a.scales);
            }
        };
        match self {
            Action::Norm(n) => {
                n.add.iter().for_each(|(_, sum)| f(*sum));
                n.out.into_iter().for_each(&mut *f);
                acts(&n.acts, f);
            }
            Action::Quantise { acts: a, .. } => acts(&Some(*a), f),
            Action::Halve { halves, .. } => {
                f(halves.tiles);
                f(halves.scales);
            }
            Action::Product(Product { acts: Some(a), .. }) => acts(&Some(*a), f),
            Action::Product(Product { parts, norm: Some((_, unscaled)), .. }) => {
                parts.iter().for_each(|p| f(p.out));
                unscaled.for_each_value(f);
            }
            Action::Product(Product { parts, glu, .. })
            | Action::ExpertProduct(ExpertProduct { parts, glu, .. }) => {
                let written = if glu.is_some() { 1 } else { parts.len() };
                parts[..written].iter().for_each(|p| f(p.out));
            }
            Action::Rope { rotation, .. } => f(rotation.out),
            Action::Store(s) => s.rope.iter().for_each(|(q, ..)| f(q.out)),
            Action::Attention(a) => {
                a.store.and_then(|s| s.rope).iter().for_each(|(q, ..)| f(q.out));
                match &a.acts {
                    Some(_) => acts(&a.acts, f),
                    None => f(a.out),
                }
                a.partials.iter().for_each(|p| f(*p));
            }
            Action::Gate(g) => {
                g.out.into_iter().for_each(&mut *f);
                acts(&g.acts, f);
            }
            Action::MoeRoute { ids, weights, .. } => {
                f(*ids);
                f(*weights);
            }
            Action::SortExperts { sorted, .. } => sorted.for_each_value(f),
            Action::Argmax { out, scratch, .. } => {
                f(*out);
                f(*scratch);
            }
            Action::GetRows { out, .. }
            | Action::Round { out, .. }
            | Action::RopeTable { out, .. }
            | Action::Hadamard { out, .. }
            | Action::Binary { out, .. }
            | Action::Unary { out, .. }
            | Action::Scale { out, .. }
            | Action::Softcap { out, .. }
            | Action::MoeCombine { out, .. }
            | Action::RowGate { out, .. }
            | Action::ScaleExperts { out, .. } => f(*out),
        }
    }

    /// Pairs (read, written) that may be the same memory: each element is read by the thread that later writes it.
    fn in_place(&self) -> Vec<(Value, Value)> {
        let pair = |x: Place, out: Value| match x {
            Place::Value(x) => alloc::vec![(x, out)],
            Place::At(_) => Vec::new(),
        };
        match self {
            Action::Norm(n) => {
                let mut pairs = Vec::new();
                if let Some((added, sum)) = n.add {
                    pairs.extend(pair(added, sum));
                    pairs.extend(pair(n.x, sum));
                }
                if let Some(out) = n.out {
                    pairs.extend(pair(n.x, out));
                }
                pairs
            }
            Action::Product(Product { parts, glu: None, .. }) => {
                parts.iter().flat_map(|p| p.residual.map(|r| pair(r, p.out)).unwrap_or_default()).collect()
            }
            Action::Rope { rotation, .. } => pair(rotation.x, rotation.out),
            Action::Store(s) | Action::Attention(Attention { store: Some(s), .. }) => {
                s.in_place().map(|(x, out)| pair(x, out)).unwrap_or_default()
            }
            Action::Binary { a, out, .. } => pair(*a, *out),
            Action::Hadamard { x, out, .. }
            | Action::Unary { x, out, .. }
            | Action::Scale { x, out, .. }
            | Action::Softcap { x, out, .. }
            | Action::RowGate { x, out, .. }
            | Action::ScaleExperts { x, out, .. } => pair(*x, *out),
            Action::Gate(Gate { gate, out: Some(out), .. }) => pair(*gate, *out),
            _ => Vec::new(),
        }
    }

    /// Name of the kind, for messages.
    pub fn name(&self) -> &'static str {
        match self {
            Action::GetRows { .. } => "get_rows",
            Action::Norm(_) => "norm",
            Action::Quantise { .. } => "quantise",
            Action::Round { .. } => "round",
            Action::Halve { .. } => "halve",
            Action::Product(_) => "product",
            Action::ExpertProduct(_) => "expert_product",
            Action::SortExperts { .. } => "sort_experts",
            Action::RopeTable { .. } => "rope_table",
            Action::Rope { .. } => "rope",
            Action::Hadamard { .. } => "hadamard",
            Action::Store(_) => "kv_store",
            Action::Attention(_) => "attention",
            Action::Binary { .. } => "binary",
            Action::Unary { .. } => "unary",
            Action::Scale { .. } => "scale",
            Action::Softcap { .. } => "softcap",
            Action::Gate(_) => "gate",
            Action::MoeRoute { .. } => "moe_route",
            Action::MoeCombine { .. } => "moe_combine",
            Action::RowGate { .. } => "row_gate",
            Action::ScaleExperts { .. } => "scale_experts",
            Action::Argmax { .. } => "argmax",
        }
    }

    /// Reads, writes and in-place pairs, as the planner takes them.
    pub fn access(&self) -> Access {
        let mut access = Access::default();
        self.for_each_read(&mut |v| access.reads.push(v.index()));
        self.for_each_write(&mut |v| access.writes.push(v.index()));
        access.in_place = self.in_place().into_iter().map(|(r, w)| (r.index(), w.index())).collect();
        access
    }
}
