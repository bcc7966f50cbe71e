//! From actions to launches, once every address is known. Pure: the same action at the same addresses gives the same
//! launches, whatever was run before.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

use gpu_kernels::driver::DeviceInfo;
use gpu_kernels::kernels::activation::Function;
use gpu_kernels::kernels::elementwise::{self, BinaryArgs, BinaryOp, UnaryArgs};
use gpu_kernels::kernels::flash::{self, Geometry};
use gpu_kernels::kernels::mmq::{self, Cut};
use gpu_kernels::kernels::output::Output;
use gpu_kernels::kernels::product::{self, MAX_PARTS, Mixture};
use gpu_kernels::kernels::{
    argmax, get_rows, glu, hadamard, kv_store, layer_norm, mmd_hopper, mmf, mmf32, mmvf, mmvq, moe_combine,
    moe_route, moe_sort, quantise_act, rms_norm, rope, round_act,
};
use gpu_kernels::launch::{DevicePtr, Launch, LaunchError};
use gpu_kernels::tile;
use quant::FormatId;

use super::inputs::InputAddresses;
use super::program::{
    Action, Acts, Attention, ExpertProduct, Factor, Gate, Halves, Matrix, Norm, NormKind, Part, Place,
    Product, Program, Sorted, Store, Table, Unscaled, Value,
};
use crate::backend::Step;
use crate::kv_cache::{self, KvLayer, KvLayout};
use crate::layers::rotation;
use crate::op::{self, Binary, RopeMode, Unary};
use crate::plan::Slot;

/// Most tokens whose products with block formats go to the matrix × vector kernel.
pub const MMVQ_MAX_COLS: usize = mmvq::MAX_COLS;
/// Most tokens whose activations products with F16 and BF16 weights round on the way.
pub const MMVF_MAX_PLAIN_COLS: usize = mmvf::MAX_PLAIN_COLS;

/// Positions in a span of the cache: what attention sums before it adds anything else.
pub const KV_SPAN: usize = flash::SPAN;
// The kernels take pages as the engine makes them.
const _: () = assert!(flash::PAGE == kv_cache::PAGE);
// Attention rotates results as the engine's layers rotate values.
const _: () = assert!(flash::ROTATED_WIDTH as usize == rotation::WIDTH_V);
/// Tokens of one sequence from which on attention works on tiles of them.
const PREFILL_TOKENS: usize = flash::ROWS;

/// Most tokens that a sequence has in a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum MostTokens {
    /// One: a step that generates. A token sees nothing of the step but itself.
    #[default]
    One,
    /// Several.
    Some,
    /// So many that attention tiles them.
    Tile,
}

/// The sizes of a step, beside its plan's shape, that launches depend on. Steps of one class replay the same launches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SizeClass {
    /// Most spans of the cache that any sequence has, rounded up to a power of two.
    pub max_spans: usize,
    /// Most tokens of a sequence.
    pub most_tokens: MostTokens,
}

impl MostTokens {
    fn of(n: usize) -> MostTokens {
        match n {
            0 | 1 => MostTokens::One,
            PREFILL_TOKENS.. => MostTokens::Tile,
            _ => MostTokens::Some,
        }
    }
}

impl SizeClass {
    /// The class of a plan that has not run.
    pub const SMALLEST: SizeClass = SizeClass { max_spans: 1, most_tokens: MostTokens::One };

    /// The class of a step.
    pub fn of(step: &Step<'_>) -> SizeClass {
        let longest = step.sequences.iter().map(|s| s.len as usize).max().unwrap_or(0);
        // Tokens of one sequence are counted until there are enough.
        let most = (0..step.sequences.len() as u32)
            .map(|s| step.token_sequences.iter().filter(|t| **t == s).take(PREFILL_TOKENS).count())
            .max();
        SizeClass {
            max_spans: longest.div_ceil(KV_SPAN).next_power_of_two(),
            most_tokens: MostTokens::of(most.unwrap_or(0)),
        }
    }

    /// The class of a step whose tokens are all of one sequence and have these positions.
    pub fn of_positions(positions: &Range<usize>) -> SizeClass {
        SizeClass {
            max_spans: positions.end.div_ceil(KV_SPAN).next_power_of_two(),
            most_tokens: MostTokens::of(positions.len()),
        }
    }

    /// How attention is cut on a device of this compute capability (times ten) and number of multiprocessors.
    fn geometry(self, sm: u32, n_sm: u32, n_tokens: usize, n_head_kv: usize) -> Geometry {
        let most = if self.most_tokens == MostTokens::Tile { PREFILL_TOKENS } else { 1 };
        Geometry::choose(sm, n_sm, n_tokens, most, n_head_kv, self.max_spans * KV_SPAN)
    }
}

/// Adds what an action's kernel needs on this device beside its operands: room for partial results, sorted pairs.
pub fn add_scratch(program: &mut Program, class: SizeClass, device: &DeviceInfo) {
    add_partials(program, class, device);
    sort_pairs(program, device);
}

/// Gives attention that is split over spans room for the spans' results.
fn add_partials(program: &mut Program, class: SizeClass, device: &DeviceInfo) {
    for i in 0..program.actions.len() {
        let Action::Attention(Attention { params: p, n, .. }) = program.actions[i] else { continue };
        let geometry = class.geometry(device.sm, device.n_sm, n, p.n_head_kv);
        let Geometry::Split { n_spans, .. } = geometry else { continue };
        let bytes = flash::scratch_bytes(n, p.n_head, p.head_dim_v, n_spans);
        let room = program.value(bytes);
        if let Action::Attention(attention) = &mut program.actions[i] {
            attention.partials = Some(room);
        }
    }
}

/// Sorts the pairs of a mixture by expert before the first integer product of many tokens that needs them in that order.
fn sort_pairs(program: &mut Program, device: &DeviceInfo) {
    let mut found: Vec<(Place, Sorted)> = Vec::new();
    let mut i = 0;
    while i < program.actions.len() {
        if let Action::ExpertProduct(p) = &program.actions[i]
            && matches!(p.x, Factor::Acts(_))
            && p.n > MMVQ_MAX_COLS
        {
            let w = p.parts[0].w;
            let (ids, n_pairs, n_expert) = (p.ids, p.n * p.n_used, w.n_expert);
            let rows = p.parts.iter().map(|part| part.w.rows).sum();
            let tile_cols =
                Cut::choose_mixture(w.format, rows, n_expert, n_pairs, p.glu.is_some(), device).cols();
            let of = match found.iter().find(|(place, s)| *place == ids && s.tile_cols == tile_cols) {
                Some((_, sorted)) => *sorted,
                None => {
                    let sorted = program.sorted(n_pairs, n_expert, tile_cols);
                    program.actions.insert(i, Action::SortExperts { ids, n_pairs, n_expert, sorted });
                    i += 1;
                    found.push((ids, sorted));
                    sorted
                }
            };
            if let Action::ExpertProduct(p) = &mut program.actions[i] {
                p.sorted = Some(of);
            }
        }
        i += 1;
    }
}

/// The addresses and sizes that turn actions into launches.
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
    /// The device.
    pub device: &'a DeviceInfo,
    /// Whether the step's tokens are a prompt's, and those run apart.
    pub prompt: bool,
}

/// Where the cache is.
#[derive(Clone, Copy)]
pub struct KvAddresses<'a> {
    /// Sizes and formats.
    pub layout: &'a KvLayout,
    /// Per layer: keys, values.
    pub parts: &'a [[DevicePtr; 2]],
}

/// How `mmq` cuts a product of these matrices.
fn cut(parts: &[Part], n: usize, gated: bool, device: &DeviceInfo) -> Cut {
    let rows = parts.iter().map(|part| part.w.rows).sum();
    Cut::choose(parts[0].w.format, rows, n, gated, device)
}

/// Whether the kernel of this gated product can write its results quantised.
pub fn ends_groups(p: &Product, device: &DeviceInfo) -> bool {
    p.n == 1 || (p.n > MMVQ_MAX_COLS && cut(&p.parts, p.n, true, device).quantises())
}

/// What the kernel of one column asks L2 for.
fn ahead(p: &Product) -> mmvq::Ahead {
    let of = |w: Matrix| mmvq::Ahead { at: w.at, n_bytes: tile::matrix_bytes(w.format, w.rows, w.cols) };
    p.ahead.map(of).unwrap_or_default()
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
                mixture: None,
            })),
            Action::Halve { x, n, k, pairs, halves } => {
                let args = round_act::Args {
                    format: FormatId::F16,
                    x: self.place(*x),
                    tiles: self.value(halves.tiles),
                    n_cols: *n,
                    k: *k,
                    mixture: pairs.map(|(sorted, pairs_per_x)| self.sorted_pairs(sorted, pairs_per_x)),
                };
                one(round_act::launch_scaled(&args, self.value(halves.scales)))
            }
            Action::Product(product) => self.product(product),
            Action::ExpertProduct(product) => self.expert_product(product),
            Action::SortExperts { ids, n_pairs, n_expert, sorted } => {
                one(moe_sort::launch(&moe_sort::Args {
                    ids: self.place(*ids),
                    order: self.value(sorted.order),
                    tiles: self.value(sorted.tiles),
                    n_pairs: *n_pairs,
                    n_expert: *n_expert,
                    tile_cols: sorted.tile_cols,
                }))
            }
            Action::RopeTable { positions, frequencies, factors, magnitude, n, n_rot, out } => {
                one(rope::launch_table(&rope::TableArgs {
                    positions: self.place(*positions),
                    frequencies: *frequencies,
                    factors: self.opt(*factors),
                    sections: rope::Sections::NONE,
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
            Action::Hadamard { x, width, n, out } => one(hadamard::launch(&hadamard::Args {
                x: self.place(*x),
                y: self.value(*out),
                n: *n,
                width: *width,
            })),
            Action::Store(store) => self.store(store),
            Action::Attention(attention) => self.attention(attention),
            Action::Binary { kind, a, b, n, period, out } => {
                let op = match kind {
                    Binary::Add => BinaryOp::Add,
                    Binary::Mul => BinaryOp::Mul,
                };
                one(elementwise::launch_binary(&BinaryArgs {
                    op,
                    a: self.place(*a),
                    b: self.place(*b),
                    ids: DevicePtr::NULL,
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
            Action::MoeRoute { logits, params, n, n_expert, ids, weights } => {
                one(moe_route::launch(&moe_route::Args {
                    logits: self.place(*logits),
                    ids: self.value(*ids),
                    weights: self.value(*weights),
                    n: *n,
                    n_expert: *n_expert,
                    n_used: params.n_used,
                    weighting: moe_route::Weighting {
                        softmax_after: params.softmax_after,
                        normalise: params.normalise,
                        scale: params.scale,
                    },
                }))
            }
            Action::MoeCombine { x, weights, n, n_used, cols, out } => {
                one(moe_combine::launch(&moe_combine::Args {
                    x: self.place(*x),
                    weights: self.place(*weights),
                    add: DevicePtr::NULL,
                    y: self.value(*out),
                    n: *n,
                    n_used: *n_used,
                    cols: *cols,
                }))
            }
            Action::RowGate { x, gate, n, cols, out } => one(elementwise::launch_binary(&BinaryArgs {
                op: BinaryOp::MulSigmoid,
                a: self.place(*x),
                b: self.place(*gate),
                ids: DevicePtr::NULL,
                y: self.value(*out),
                n: n * cols,
                inner: *cols,
                period: *n,
            })),
            Action::ScaleExperts { x, factors, ids, n, cols, n_expert, out } => {
                one(elementwise::launch_binary(&BinaryArgs {
                    op: BinaryOp::Mul,
                    a: self.place(*x),
                    b: self.place(*factors),
                    ids: self.place(*ids),
                    y: self.value(*out),
                    n: n * cols,
                    inner: *cols,
                    period: *n_expert,
                }))
            }
            Action::Argmax { x, n, cols, out, scratch } => {
                let launches = argmax::launch(&argmax::Args {
                    x: self.place(*x),
                    scratch: self.value(*scratch),
                    ids: self.value(*out),
                    n_rows: *n,
                    n: *cols,
                })?;
                Ok(launches.to_vec())
            }
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

    fn get_rows(
        &self,
        table: Table,
        ids: Place,
        n: usize,
        cols: usize,
        out: Value,
    ) -> Result<Vec<Launch>, Refusal> {
        let (source, w) = match table {
            Table::Matrix(m) => (get_rows::Source::Tiled(m.format), m.at),
            Table::Floats(p) => (get_rows::Source::Plain, self.place(p)),
        };
        let (ids, y) = (self.place(ids), self.value(out));
        one(get_rows::launch(&get_rows::Args { source, w, ids, y, n_ids: n, k: cols }))
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

    /// The matrices of a product, and where their results go: of gate and up one, or as codes and scales.
    fn matrices(&self, parts: &[Part], gated: bool, acts: Option<Acts>) -> Vec<product::Matrix> {
        let y = |i: usize, part: &Part| match acts {
            Some(acts) => self.value(if i == 0 { acts.q } else { acts.scales }),
            None if gated && i == 1 => DevicePtr::NULL,
            None => self.value(part.out),
        };
        parts
            .iter()
            .enumerate()
            .map(|(i, part)| product::Matrix {
                w: part.w.at,
                bias: self.opt(part.bias),
                residual: self.opt(part.residual),
                y: y(i, part),
                n_rows: part.w.rows,
            })
            .collect()
    }

    fn product(&self, p: &Product) -> Result<Vec<Launch>, Refusal> {
        let glu = self.own_glu(p.glu)?;
        let chunks = p.parts.chunks(MAX_PARTS);
        chunks.map(|parts| self.product_of(p, parts, glu)).collect()
    }

    fn product_of(&self, p: &Product, parts: &[Part], glu: Option<product::Glu>) -> Result<Launch, Refusal> {
        let &Product { x, n, k, acts, .. } = p;
        let matrices = self.matrices(parts, glu.is_some(), acts);
        let format = parts[0].w.format;
        match self.integers(x, format) {
            Some((q, scales, before)) => {
                let product =
                    product::Args { format, parts: &matrices, glu, q, scales, k, n_cols: n, mixture: None };
                if n <= MMVQ_MAX_COLS {
                    let smem_bytes = mmvq::room(self.device);
                    let besides = mmvq::Besides { smem_bytes, before, after: self.after(p), ahead: ahead(p) };
                    return Ok(mmvq::launch_with(&product, besides)?);
                }
                let (cut, acts) = (cut(parts, n, glu.is_some(), self.device), acts.map(|acts| acts.kind));
                Ok(mmq::launch(&mmq::Args { product, cut, sorted: None, acts })?)
            }
            None => self.float_product(&matrices, glu, x, n, k, format),
        }
    }

    /// What the kernel of one column does with a product's results.
    fn after(&self, p: &Product) -> mmvq::After {
        match (p.acts, p.norm) {
            (Some(acts), _) => mmvq::After::Quantise(acts.kind),
            (None, Some((weight, Unscaled { acts, squares }))) => mmvq::After::Norm {
                weight: self.place(weight),
                q: self.value(acts.q),
                scales: self.value(acts.scales),
                squares: self.value(squares),
            },
            (None, None) => mmvq::After::Nothing,
        }
    }

    /// Activations for the integer kernels, codes and scales or floats without, and what is done with them: `None` if the
    /// weights are floats.
    fn integers(&self, x: Factor, format: FormatId) -> Option<(DevicePtr, DevicePtr, mmvq::Before)> {
        match x {
            Factor::Acts(acts) => Some((self.value(acts.q), self.value(acts.scales), mmvq::Before::Nothing)),
            Factor::Unscaled(Unscaled { acts, squares }, eps) => {
                let before = mmvq::Before::Factor { squares: self.value(squares), eps };
                Some((self.value(acts.q), self.value(acts.scales), before))
            }
            Factor::Floats(x) if quantise_act::kind(format).is_some() => {
                Some((self.place(x), DevicePtr::NULL, mmvq::Before::Nothing))
            }
            Factor::Normed(x, weight, eps) => {
                let before = mmvq::Before::Norm { weight: self.place(weight), eps };
                Some((self.place(x), DevicePtr::NULL, before))
            }
            Factor::Floats(_) | Factor::Rounded(_) | Factor::Halves(_) => None,
        }
    }

    /// Sorted pairs as kernels on f16 take them.
    fn sorted_pairs(&self, sorted: Sorted, pairs_per_x: usize) -> round_act::SortedPairs {
        let Sorted { order, tiles, n_tiles, tile_cols } = sorted;
        let (order, tiles) = (self.value(order), self.value(tiles));
        round_act::SortedPairs { order, tiles, n_tiles, tile_cols, pairs_per_x }
    }

    /// A product with block formats that dequantises on the way.
    fn dequantising_product(
        &self,
        parts: &[product::Matrix],
        glu: Option<product::Glu>,
        halves: Halves,
        k: usize,
        n_cols: usize,
        format: FormatId,
        mixture: Option<round_act::SortedPairs>,
    ) -> Result<Launch, LaunchError> {
        let (x, scales) = (self.value(halves.tiles), self.value(halves.scales));
        let device = self.device;
        mmd_hopper::launch(&mmd_hopper::Args { format, parts, glu, x, scales, k, n_cols, mixture, device })
    }

    /// A product on floats: of float weights, or of weights turned into such.
    fn float_product(
        &self,
        matrices: &[product::Matrix],
        glu: Option<product::Glu>,
        x: Factor,
        n: usize,
        k: usize,
        format: FormatId,
    ) -> Result<Launch, Refusal> {
        match x {
            Factor::Halves(halves) => {
                Ok(self.dequantising_product(matrices, glu, halves, k, n, format, None)?)
            }
            Factor::Floats(x) if format == FormatId::F32 => {
                let (parts, x, n_cols, mixture) = (matrices, self.place(x), n, None);
                Ok(mmf32::launch(&mmf32::Args { parts, glu, x, k, n_cols, mixture })?)
            }
            Factor::Rounded(tiles) if n > mmvf::MAX_COLS => Ok(mmf::launch(&mmf::Args {
                format,
                parts: matrices,
                glu,
                x: self.value(tiles),
                k,
                n_cols: n,
                mixture: None,
                device: self.device,
            })?),
            _ => {
                let x = match x {
                    Factor::Rounded(tiles) => mmvf::Activations::Tiles(self.value(tiles)),
                    Factor::Floats(x) => mmvf::Activations::Plain(self.place(x)),
                    Factor::Acts(_) | Factor::Halves(_) | Factor::Normed(..) | Factor::Unscaled(..) => {
                        return Err(Refusal::Words(String::from("quantised activations of float weights")));
                    }
                };
                let (parts, n_cols, mixture) = (matrices, n, None);
                Ok(mmvf::launch(&mmvf::Args { format, parts, glu, x, k, n_cols, mixture })?)
            }
        }
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
        let matrices = self.matrices(&p.parts, glu.is_some(), None);
        let format = p.parts[0].w.format;
        let n_pairs = p.n * p.n_used;
        let pairs_per_x = if p.per_used { 1 } else { p.n_used };
        let mixture = Some(Mixture { ids: self.place(p.ids), n_pairs, pairs_per_x });
        let (parts, n_cols, k) = (&matrices[..], n_pairs / pairs_per_x, p.k);
        if let Some((q, scales, before)) = self.integers(p.x, format) {
            let product = product::Args { format, parts, glu, q, scales, k, n_cols, mixture };
            let Some(Sorted { order, tiles, .. }) = p.sorted else {
                return one(mmvq::launch_with(&product, mmvq::Besides { before, ..Default::default() }));
            };
            let n_expert = p.parts[0].w.n_expert;
            let rows = parts.iter().map(|part| part.n_rows).sum();
            // The same choice as in `sort_pairs`.
            let cut = Cut::choose_mixture(format, rows, n_expert, n_pairs, glu.is_some(), self.device);
            let sorted = mmq::Sorted { order: self.value(order), tiles: self.value(tiles), n_expert };
            return one(mmq::launch(&mmq::Args { product, cut, sorted: Some(sorted), acts: None }));
        }
        match p.x {
            Factor::Floats(x) if format == FormatId::F32 => {
                let x = self.place(x);
                one(mmf32::launch(&mmf32::Args { parts, glu, x, k, n_cols, mixture }))
            }
            Factor::Floats(x) => {
                let x = mmvf::Activations::Plain(self.place(x));
                one(mmvf::launch(&mmvf::Args { format, parts, glu, x, k, n_cols, mixture }))
            }
            Factor::Halves(halves) => {
                let mixture = p.sorted.map(|sorted| self.sorted_pairs(sorted, pairs_per_x));
                one(self.dequantising_product(parts, glu, halves, k, n_cols, format, mixture))
            }
            Factor::Rounded(_) | Factor::Acts(_) | Factor::Normed(..) | Factor::Unscaled(..) => {
                Err(Refusal::Words(String::from("rounded activations of a mixture with float weights")))
            }
        }
    }

    /// A layer's part of the cache.
    fn cache(&self, il: usize) -> Result<flash::Cache, Refusal> {
        let kv = self.kv.ok_or_else(|| Refusal::Words(String::from("there is no cache yet")))?;
        let KvLayer { n_head_kv, head_dim_k, head_dim_v } = kv.layout.layers[il];
        let [k, v] = kv.parts[il];
        let KvLayout { type_k, type_v, .. } = *kv.layout;
        Ok(flash::Cache { k, v, type_k, type_v, n_head_kv, head_dim_k, head_dim_v })
    }

    fn attention(&self, attention: &Attention) -> Result<Vec<Launch>, Refusal> {
        let &Attention { q, store, sinks, params: p, n, out, rotated, acts, partials } = attention;
        let cache = self.cache(p.il)?;
        let of_prompt = if self.prompt { Geometry::of_prompt(self.device, &cache, false) } else { None };
        let mut args = flash::Args {
            cache,
            step: flash::Step {
                positions: self.inputs.positions(),
                token_sequences: self.inputs.token_sequences(),
                sequences: self.inputs.sequences(),
                pages: self.inputs.pages(),
                n_tokens: n,
            },
            q: self.place(q),
            out: self.value(acts.map_or(out, |acts| acts.q)),
            rotated,
            acts: acts.map(|acts| (acts.kind, self.value(acts.scales))),
            scratch: partials.map_or(DevicePtr::NULL, |v| self.value(v)),
            sinks: self.opt(sinks),
            slopes: DevicePtr::NULL,
            n_head: p.n_head,
            causal: p.causal,
            window: p.window as usize,
            scale: p.scale,
            softcap: p.softcap,
            smem_per_cta_bytes: self.device.smem_per_cta_bytes,
            geometry: match (of_prompt, partials) {
                (Some(geometry), _) => geometry,
                (None, None) if self.class.most_tokens < MostTokens::Tile && self.device.sm >= 80 => {
                    Geometry::Decode
                }
                (None, _) => self.class.geometry(self.device.sm, self.device.n_sm, n, p.n_head_kv),
            },
            append: None,
        };
        // The kernel for prompts does not rotate its results.
        let rotates_after = rotated && args.geometry == Geometry::Prompt;
        args.rotated &= !rotates_after;
        let mut launches = Vec::new();
        if let Some(store) = store {
            match store.rope {
                Some((rotation, table, n_rot, mode))
                    if store.widths == [None; 2] && flash::appends(&args, n_rot) =>
                {
                    args.q = self.place(rotation.x);
                    args.append = Some(flash::Append {
                        k: self.place(store.k),
                        v: self.place(store.v),
                        cells: self.inputs.cells(),
                        angles: self.place(table),
                        mode: rope_mode(mode),
                    });
                }
                _ => launches = self.store(&store)?,
            }
        }
        launches.extend(flash::launch(&args)?.iter());
        if rotates_after {
            let (x, n) = (args.out, n * p.n_head * p.head_dim_v);
            let width = flash::ROTATED_WIDTH as usize;
            launches.push(hadamard::launch(&hadamard::Args { x, y: x, n, width })?);
        }
        Ok(launches)
    }

    fn store(&self, store: &Store) -> Result<Vec<Launch>, Refusal> {
        let rope = store.rope.map(|(q, table, n_rot, mode)| kv_store::Rope {
            table: self.place(table),
            q: self.place(q.x),
            q_out: self.value(q.out),
            n_head: q.heads,
            n_rot,
            mode: rope_mode(mode),
        });
        one(kv_store::launch(&kv_store::Args {
            k: self.place(store.k),
            v: self.place(store.v),
            cells: self.inputs.cells(),
            cache: self.cache(store.il)?,
            n_tokens: store.n,
            rope,
            widths: store.widths,
        }))
    }
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

fn one(launch: Result<Launch, LaunchError>) -> Result<Vec<Launch>, Refusal> {
    Ok(vec![launch?])
}
