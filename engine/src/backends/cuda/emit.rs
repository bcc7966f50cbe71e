//! From actions to launches, once every address is known. Pure: the same action at the same addresses gives the same
//! launches, whatever was run before.

use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;
use alloc::format;

use gpu_kernels::driver::DeviceInfo;
use gpu_kernels::kernels::activation::Function;
use gpu_kernels::kernels::elementwise::{self, BinaryArgs, BinaryOp, UnaryArgs};
use gpu_kernels::kernels::output::Output;
use gpu_kernels::kernels::product::{self, MAX_PARTS, Mixture};
use gpu_kernels::kernels::product_float;
use gpu_kernels::kernels::{glu, layer_norm, mmvf, mmvq, quantise_act, rms_norm, rope, round_act};
use gpu_kernels::launch::{DevicePtr, Launch, LaunchError};

use super::inputs::InputAddresses;
use super::program::{
    Action, Acts, ExpertProduct, Factor, Gate, Norm, NormKind, Part, Place, Product, Program, Store, Table,
    Value,
};
use crate::backend::Step;
use crate::kv_cache::KvLayout;
use crate::op::{self, Binary, KvPart, RopeMode, Unary};
use crate::plan::Slot;

/// Most tokens whose products with block formats go to the matrix × vector kernel.
pub const MMVQ_MAX_COLS: usize = mmvq::MAX_COLS;
/// Most tokens whose activations products with F16 and BF16 weights round on the way.
pub const MMVF_MAX_PLAIN_COLS: usize = 8;

/// Positions in a span of the cache: what attention sums before it adds anything else.
const KV_SPAN: usize = 256;
/// Tokens of one sequence from which on attention works on tiles of them.
const PREFILL_TOKENS: usize = 16;

/// What of a step's sizes, beside the plan's shape, launches depend on. Steps of one class replay the same launches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SizeClass {
    /// Most spans of the cache that any sequence has, rounded up to a power of two.
    pub max_spans: usize,
    /// Whether some sequence has so many tokens in the step that attention tiles them.
    pub prefill: bool,
}

impl SizeClass {
    /// Of a step.
    pub fn of(step: &Step<'_>) -> SizeClass {
        let longest = step.sequences.iter().map(|s| s.len as usize).max().unwrap_or(0);
        // Tokens of one sequence are counted until there are enough.
        let most = (0..step.sequences.len() as u32)
            .map(|s| step.token_sequences.iter().filter(|t| **t == s).take(PREFILL_TOKENS).count())
            .max();
        SizeClass {
            max_spans: longest.div_ceil(KV_SPAN).next_power_of_two(),
            prefill: most == Some(PREFILL_TOKENS),
        }
    }
}

/// Gives actions the scratch memory that their kernels need on this device.
pub fn add_scratch(program: &mut Program, class: SizeClass, device: &DeviceInfo) {
    let _ = (program, class, device);
}

/// Where everything is that actions name.
pub struct Emit<'a> {
    /// Start of the arena.
    pub arena: DevicePtr,
    /// Per value.
    pub slots: &'a [Option<Slot>],
    /// The step's inputs.
    pub inputs: InputAddresses,
    /// The cache, where there is one.
    pub kv: Option<KvAddresses<'a>>,
    /// The step's sizes.
    pub class: SizeClass,
    /// Compute capability times ten.
    pub sm: u32,
    /// Streaming multiprocessors.
    pub n_sm: u32,
}

/// Where the cache is.
#[derive(Clone, Copy)]
pub struct KvAddresses<'a> {
    /// Sizes and formats.
    pub layout: &'a KvLayout,
    /// Per layer: keys, values.
    pub parts: &'a [[DevicePtr; 2]],
}

impl KvAddresses<'_> {
    fn at(&self, il: usize, part: KvPart) -> DevicePtr {
        self.parts[il][part as usize]
    }
}

/// Bytes of the sort of (token, slot) pairs by expert.
pub fn sort_bytes(n: usize, n_used: usize, n_expert: usize) -> Result<usize, LaunchError> {
    Ok(4 * (n * n_used + n_expert + 1))
}

/// The product's own gate for a function, if it has it.
pub fn product_glu(kind: op::Glu) -> Option<product::Glu> {
    match kind {
        op::Glu::Plain(Unary::Silu) => Some(product::Glu::Silu),
        op::Glu::Plain(Unary::Gelu) => Some(product::Glu::Gelu),
        op::Glu::Plain(_) => None,
        op::Glu::SwigluOai { alpha, limit } => Some(product::Glu::SwigluOai { alpha, limit }),
    }
}

fn function(kind: Unary) -> Function {
    match kind {
        Unary::Silu => Function::Silu,
        Unary::Gelu => Function::Gelu,
        Unary::GeluErf => Function::GeluErf,
        Unary::Relu => Function::Relu,
        Unary::ReluSqr => Function::ReluSqr,
        Unary::Tanh => Function::Tanh,
        Unary::Sigmoid => Function::Sigmoid,
    }
}

fn rope_mode(mode: RopeMode) -> rope::Mode {
    match mode {
        RopeMode::Norm => rope::Mode::Norm,
        RopeMode::Neox => rope::Mode::Neox,
    }
}

impl Emit<'_> {
    fn value(&self, v: Value) -> DevicePtr {
        let slot = self.slots[v.index()].expect("the planner placed every value that an action names");
        self.arena.offset(slot.offset as u64)
    }

    fn place(&self, p: Place) -> DevicePtr {
        match p {
            Place::Value(v) => self.value(v),
            Place::At(at) => at,
        }
    }

    fn opt(&self, p: Option<Place>) -> DevicePtr {
        p.map_or(DevicePtr::NULL, |p| self.place(p))
    }

    /// The launches of an action; the reason if no kernel can do it.
    pub fn launches(&self, action: &Action) -> Result<Vec<Launch>, String> {
        self.try_launches(action).map_err(|why| match why {
            Refusal::Launch(error) => error.to_string(),
            Refusal::Words(words) => words,
        })
    }

    fn try_launches(&self, action: &Action) -> Result<Vec<Launch>, Refusal> {
        match action {
            Action::GetRows { table, ids, n, cols, out } => self.get_rows(*table, *ids, *n, *cols, *out),
            Action::Norm(norm) => self.norm(norm),
            Action::Quantise { x, n, k, acts } => one(quantise_act::launch(&quantise_act::Args {
                kind: acts.kind,
                x: self.place(*x),
                q: self.value(acts.q),
                scales: self.value(acts.scales),
                n_cols: *n,
                k: *k,
            })),
            Action::Round { x, format, n, k, out } => one(round_act::launch(&round_act::Args {
                format: *format,
                x: self.place(*x),
                tiles: self.value(*out),
                n_cols: *n,
                k: *k,
            })),
            Action::Product(product) => self.product(product),
            Action::ExpertProduct(product) => self.expert_product(product),
            Action::SortExperts { .. } => Err(words("sort_experts")),
            Action::RopeTable { positions, frequencies, magnitude, n, n_rot, out } => {
                one(rope::launch_table(&rope::TableArgs {
                    positions: self.place(*positions),
                    frequencies: *frequencies,
                    out: self.value(*out),
                    n_tokens: *n,
                    n_rot: *n_rot,
                    magnitude: *magnitude,
                }))
            }
            Action::Rope { rotation, table, n_rot, mode, n } => one(rope::launch(&rope::Args {
                x: self.place(rotation.x),
                table: self.place(*table),
                y: self.value(rotation.out),
                n_tokens: *n,
                n_heads: rotation.heads,
                head_dim: rotation.head_dim,
                n_rot: *n_rot,
                mode: rope_mode(*mode),
            })),
            Action::Store(store) => self.store(store),
            Action::Attention { .. } => Err(words("attention")),
            Action::Binary { kind, a, b, n, period, out } => {
                let op = match kind {
                    Binary::Add => BinaryOp::Add,
                    Binary::Mul => BinaryOp::Mul,
                };
                one(elementwise::launch_binary(&BinaryArgs {
                    op,
                    a: self.place(*a),
                    b: self.place(*b),
                    y: self.value(*out),
                    n: *n,
                    inner: 1,
                    period: *period,
                }))
            }
            Action::Unary { kind, x, n, out } => self.unary(function(*kind), *x, *n, *out, 0.0),
            Action::Scale { x, scale, n, out } => self.unary(Function::Scale, *x, *n, *out, *scale),
            Action::Softcap { x, cap, n, out } => self.unary(Function::Softcap, *x, *n, *out, *cap),
            Action::Gate(gate) => self.gate(gate),
            Action::MoeRoute { .. } => Err(words("moe_route")),
            Action::MoeCombine { .. } => Err(words("moe_combine")),
            Action::RowGate { x, gate, n, cols, out } => one(elementwise::launch_binary(&BinaryArgs {
                op: BinaryOp::MulSigmoid,
                a: self.place(*x),
                b: self.place(*gate),
                y: self.value(*out),
                n: n * cols,
                inner: *cols,
                period: *n,
            })),
            Action::Argmax { .. } => Err(words("argmax")),
        }
    }

    fn unary(
        &self,
        function: Function,
        x: Place,
        n: usize,
        out: Value,
        a: f32,
    ) -> Result<Vec<Launch>, Refusal> {
        one(elementwise::launch_unary(&UnaryArgs {
            function,
            x: self.place(x),
            y: self.value(out),
            n,
            a,
            b: 0.0,
        }))
    }

    fn get_rows(&self, _: Table, _: Place, _: usize, _: usize, _: Value) -> Result<Vec<Launch>, Refusal> {
        Err(words("get_rows"))
    }

    /// A kernel of rows once per output type asked for: (type, where, scales).
    fn outputs(&self, out: Option<Value>, acts: Option<Acts>) -> Vec<(Output, DevicePtr, DevicePtr)> {
        let floats = out.map(|v| (Output::F32, self.value(v), DevicePtr::NULL));
        let acts = acts.map(|a| (Output::Act(a.kind), self.value(a.q), self.value(a.scales)));
        floats.into_iter().chain(acts).collect()
    }

    fn norm(&self, norm: &Norm) -> Result<Vec<Launch>, Refusal> {
        let (residual, h) = match norm.add {
            Some((added, sum)) => (self.place(added), self.value(sum)),
            None => (DevicePtr::NULL, DevicePtr::NULL),
        };
        let mut launches = Vec::new();
        // The quantised form first: it alone does not overwrite what the other reads.
        for (i, (output, y, scales)) in self.outputs(norm.out, norm.acts).into_iter().rev().enumerate() {
            let launch = match norm.kind {
                NormKind::Rms => rms_norm::launch(&rms_norm::Args {
                    // The second launch finds the sum made.
                    x: if i > 0 && norm.add.is_some() { h } else { self.place(norm.x) },
                    residual: if i > 0 { DevicePtr::NULL } else { residual },
                    h: if i > 0 { DevicePtr::NULL } else { h },
                    weight: self.opt(norm.weight),
                    add: DevicePtr::NULL,
                    output,
                    y,
                    scales,
                    n_rows: norm.rows,
                    n: norm.cols,
                    eps: norm.eps,
                }),
                NormKind::Layer => layer_norm::launch(&layer_norm::Args {
                    x: self.place(norm.x),
                    weight: self.opt(norm.weight),
                    bias: self.opt(norm.bias),
                    output,
                    y,
                    scales,
                    n_rows: norm.rows,
                    n: norm.cols,
                    eps: norm.eps,
                }),
            };
            launches.push(launch?);
        }
        Ok(launches)
    }

    fn gate(&self, gate: &Gate) -> Result<Vec<Launch>, Refusal> {
        let kind = match gate.kind {
            op::Glu::Plain(f) => glu::Kind::Plain(function(f)),
            op::Glu::SwigluOai { alpha, limit } => glu::Kind::SwigluOai { alpha, limit },
        };
        let launch = |(output, y, scales)| {
            glu::launch(&glu::Args {
                kind,
                gate: self.place(gate.gate),
                gate_stride: gate.k,
                up: self.place(gate.up),
                up_stride: gate.k,
                output,
                y,
                scales,
                n_rows: gate.n,
                n: gate.k,
            })
        };
        let launches: Result<_, _> =
            self.outputs(gate.out, gate.acts).into_iter().rev().map(launch).collect();
        Ok(launches?)
    }

    fn matrices(&self, parts: &[Part], gated: bool) -> Vec<product::Matrix> {
        parts
            .iter()
            .enumerate()
            .map(|(i, part)| product::Matrix {
                w: part.w.at,
                bias: self.opt(part.bias),
                residual: self.opt(part.residual),
                y: if gated && i == 1 { DevicePtr::NULL } else { self.value(part.out) },
                n_rows: part.w.rows,
            })
            .collect()
    }

    fn product(&self, p: &Product) -> Result<Vec<Launch>, Refusal> {
        let glu = self.own_glu(p.glu)?;
        let mut launches = Vec::new();
        for parts in p.parts.chunks(MAX_PARTS) {
            let matrices = self.matrices(parts, glu.is_some());
            let format = parts[0].w.format;
            let launch = match p.x {
                Factor::Acts(acts) => {
                    let args = product::Args {
                        format,
                        parts: &matrices,
                        glu,
                        q: self.value(acts.q),
                        scales: self.value(acts.scales),
                        k: p.k,
                        n_cols: p.n,
                        mixture: None,
                    };
                    mmvq::launch(&args)?
                }
                Factor::Floats(_) | Factor::Rounded(_) => {
                    let x = match p.x {
                        Factor::Rounded(tiles) => mmvf::Activations::Tiles(self.value(tiles)),
                        Factor::Floats(x) => mmvf::Activations::Plain(self.place(x)),
                        Factor::Acts(_) => unreachable!("matched above"),
                    };
                    let (matrices, glu) = float_terms(&matrices, glu);
                    mmvf::launch(&mmvf::Args {
                        format,
                        matrices: &matrices,
                        glu,
                        x,
                        experts: None,
                        k: p.k,
                        n_cols: p.n,
                    })?
                }
            };
            launches.push(launch);
        }
        Ok(launches)
    }

    fn own_glu(&self, glu: Option<op::Glu>) -> Result<Option<product::Glu>, Refusal> {
        match glu {
            None => Ok(None),
            Some(kind) => product_glu(kind)
                .map(Some)
                .ok_or_else(|| Refusal::Words(format!("{kind:?} within a product"))),
        }
    }

    fn expert_product(&self, p: &ExpertProduct) -> Result<Vec<Launch>, Refusal> {
        let glu = self.own_glu(p.glu)?;
        let matrices = self.matrices(&p.parts, glu.is_some());
        let format = p.parts[0].w.format;
        let n_pairs = p.n * p.n_used;
        let pairs_per_x = if p.per_used { 1 } else { p.n_used };
        match p.x {
            Factor::Acts(acts) => {
                let mixture = Mixture { ids: self.place(p.ids), n_pairs, pairs_per_x };
                one(mmvq::launch(&product::Args {
                    format,
                    parts: &matrices,
                    glu,
                    q: self.value(acts.q),
                    scales: self.value(acts.scales),
                    k: p.k,
                    n_cols: n_pairs / pairs_per_x,
                    mixture: Some(mixture),
                }))
            }
            Factor::Floats(x) => {
                let (matrices, glu) = float_terms(&matrices, glu);
                one(mmvf::launch(&mmvf::Args {
                    format,
                    matrices: &matrices,
                    glu,
                    x: mmvf::Activations::Plain(self.place(x)),
                    experts: Some(product_float::Experts { ids: self.place(p.ids), pairs_per_x }),
                    k: p.k,
                    n_cols: n_pairs,
                }))
            }
            Factor::Rounded(_) => Err(words("a mixture of rounded activations")),
        }
    }

    fn kv(&self) -> Result<KvAddresses<'_>, Refusal> {
        self.kv.ok_or_else(|| Refusal::Words(String::from("there is no cache yet")))
    }

    fn store(&self, _: &Store) -> Result<Vec<Launch>, Refusal> {
        let _ = self.kv()?.at(0, KvPart::K);
        Err(words("kv_store"))
    }
}

fn float_terms(
    parts: &[product::Matrix],
    glu: Option<product::Glu>,
) -> (Vec<product_float::Matrix>, Option<product_float::Glu>) {
    let matrix = |m: &product::Matrix| product_float::Matrix {
        w: m.w,
        bias: m.bias,
        residual: m.residual,
        y: m.y,
        n_rows: m.n_rows,
    };
    let glu = glu.map(|glu| match glu {
        product::Glu::Silu => product_float::Glu::Silu,
        product::Glu::Gelu => product_float::Glu::Gelu,
        product::Glu::SwigluOai { alpha, limit } => product_float::Glu::SwigluOai { alpha, limit },
    });
    (parts.iter().map(matrix).collect(), glu)
}

/// Why there are no launches.
enum Refusal {
    Launch(LaunchError),
    Words(String),
}

impl From<LaunchError> for Refusal {
    fn from(error: LaunchError) -> Refusal {
        Refusal::Launch(error)
    }
}

fn words(what: &str) -> Refusal {
    Refusal::Words(format!("{what}: no kernel"))
}

fn one(launch: Result<Launch, LaunchError>) -> Result<Vec<Launch>, Refusal> {
    Ok(vec![launch?])
}
