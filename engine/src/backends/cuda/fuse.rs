//! Rules that merge actions where one kernel does the work of several. Each is a function from a program to a program
//! with equal results, bit for bit; each has a name and can be left out, which is how they are tested.

use alloc::vec::Vec;

use gpu_kernels::kernels::{flash, mmvq, quantise_act};

use super::emit::{MostTokens, ends_groups, product_glu};
use super::program::{
    Action, Acts, Attention, ExpertProduct, Factor, Gate, Norm, NormKind, Part, Place, Product, Program,
    Store, Unscaled, Value,
};
use crate::op::Binary;

/// A rule.
pub struct Rule {
    /// Its name.
    pub name: &'static str,
    /// Applies it wherever it fits.
    pub apply: fn(&mut Program),
}

/// All rules, in the order in which they are applied.
pub const RULES: &[Rule] = &[
    Rule { name: "product_residual", apply: product_residual },
    Rule { name: "product_gate", apply: product_gate },
    Rule { name: "add_norm", apply: add_norm },
    Rule { name: "norm_quantise", apply: norm_quantise },
    Rule { name: "gate_quantise", apply: gate_quantise },
    Rule { name: "product_quantise", apply: product_quantise },
    Rule { name: "attention_hadamard", apply: attention_hadamard },
    Rule { name: "attention_quantise", apply: attention_quantise },
    Rule { name: "hadamard_store", apply: hadamard_store },
    Rule { name: "rope_store", apply: rope_store },
    Rule { name: "store_attention", apply: store_attention },
    Rule { name: "product_norm", apply: product_norm },
    Rule { name: "quantise_product", apply: quantise_product },
    Rule { name: "norm_product", apply: norm_product },
    Rule { name: "product_ahead", apply: product_ahead },
];

/// Which rules are applied, in the order of [`RULES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RuleSet(u32);

impl RuleSet {
    /// Every rule.
    pub const ALL: RuleSet = RuleSet((1 << RULES.len()) - 1);
    /// No rule.
    pub const NONE: RuleSet = RuleSet(0);

    /// The rule of this name alone.
    pub fn only(name: &str) -> Option<RuleSet> {
        RULES.iter().position(|r| r.name == name).map(|i| RuleSet(1 << i))
    }

    /// Applies the rules to a program.
    pub fn apply(self, program: &mut Program) {
        for (i, rule) in RULES.iter().enumerate() {
            if self.0 & (1 << i) != 0 {
                (rule.apply)(program);
            }
        }
    }
}

/// Index of the action that writes a value.
fn writer(program: &Program, value: Value) -> Option<usize> {
    program.actions.iter().position(|action| {
        let mut writes = false;
        action.for_each_write(&mut |v| writes |= v == value);
        writes
    })
}

/// The only action after `from` that reads a value, if it alone does and does not outlive the step.
fn only_reader(program: &Program, value: Value) -> Option<usize> {
    if program.n_reads(value) != 1 {
        return None;
    }
    program.actions.iter().position(|action| {
        let mut reads = false;
        action.for_each_read(&mut |v| reads |= v == value);
        reads
    })
}

/// Whether a place is ready before action `i`: a fixed address, or written earlier (or from outside).
fn ready_before(program: &Program, place: Place, i: usize) -> bool {
    match place {
        Place::At(_) => true,
        Place::Value(v) => writer(program, v).is_none_or(|w| w < i),
    }
}

/// `y = x·wᵀ; z = y + r` becomes `z = x·wᵀ + r`, where only the sum reads `y`.
fn product_residual(program: &mut Program) {
    let mut i = 0;
    while i < program.actions.len() {
        let Action::Product(product) = &program.actions[i] else {
            i += 1;
            continue;
        };
        let fits = product.parts.iter().enumerate().find_map(|(p, part)| {
            if part.residual.is_some() || product.glu.is_some() {
                return None;
            }
            let at = only_reader(program, part.out)?;
            let Action::Binary { kind: Binary::Add, a, b, n, period, out } = program.actions[at] else {
                return None;
            };
            let y = Place::Value(part.out);
            let other = if a == y { b } else { a };
            (n == period && other != y && ready_before(program, other, i)).then_some((p, at, other, out))
        });
        let Some((p, at, other, out)) = fits else {
            i += 1;
            continue;
        };
        // The sum moves up to the product: what reads it comes later than the sum did.
        if let Action::Product(product) = &mut program.actions[i] {
            product.parts[p].residual = Some(other);
            product.parts[p].out = out;
        }
        program.actions.remove(at);
    }
}

/// `g, u = x·w0ᵀ, x·w1ᵀ; h = f(g) · u` becomes one product, for plain matrices and for experts.
fn product_gate(program: &mut Program) {
    let mut at = 0;
    while at < program.actions.len() {
        let Action::Gate(Gate {
            kind, gate: Place::Value(gate), up: Place::Value(up), out: Some(out), ..
        }) = program.actions[at]
        else {
            at += 1;
            continue;
        };
        let alone = gate != up
            && product_glu(kind).is_some()
            && program.n_reads(gate) == 1
            && program.n_reads(up) == 1;
        let (g, u) = (writer(program, gate), writer(program, up));
        let merged = match (alone, g, u) {
            (true, Some(g), Some(u)) => merge_gate(program, g, u, gate, up),
            _ => None,
        };
        let (Some(mut action), Some(g), Some(u)) = (merged, g, u) else {
            at += 1;
            continue;
        };
        match &mut action {
            Action::Product(p) => {
                p.glu = Some(kind);
                p.parts[0].out = out;
            }
            Action::ExpertProduct(p) => {
                p.glu = Some(kind);
                p.parts[0].out = out;
            }
            _ => unreachable!("merge_gate gives products"),
        }
        // Where the later of the two was, everything that either reads is ready.
        program.actions[g.max(u)] = action;
        program.actions.remove(at);
        if g != u {
            program.actions.remove(g.min(u));
        }
        at = 0;
    }
}

/// The products that write `gate` and `up` as one with two parts, if they match.
fn merge_gate(program: &Program, g: usize, u: usize, gate: Value, up: Value) -> Option<Action> {
    let same_shape = |a: &Part, b: &Part| {
        a.w.format == b.w.format && a.w.rows == b.w.rows && a.residual.is_none() && b.residual.is_none()
    };
    match (&program.actions[g], &program.actions[u]) {
        (Action::Product(p), Action::Product(_)) if g == u => {
            let [a, b] = &p.parts[..] else { return None };
            let fits = a.out == gate && b.out == up && p.glu.is_none() && same_shape(a, b);
            fits.then(|| Action::Product(p.clone()))
        }
        (Action::ExpertProduct(p), Action::ExpertProduct(r)) if g != u => {
            let ([a], [b]) = (&p.parts[..], &r.parts[..]) else { return None };
            let fits = p.x == r.x && p.ids == r.ids && p.per_used == r.per_used && p.sorted == r.sorted;
            (fits && same_shape(a, b)).then(|| {
                let mut p = p.clone();
                p.parts.push(*b);
                Action::ExpertProduct(p)
            })
        }
        _ => None,
    }
}

/// `h = a + b; y = norm(h)` becomes one action that writes both.
fn add_norm(program: &mut Program) {
    for at in (1..program.actions.len()).rev() {
        let Action::Norm(norm) = program.actions[at] else { continue };
        let Place::Value(h) = norm.x else { continue };
        let Action::Binary { kind: Binary::Add, a, b, n, period, out } = program.actions[at - 1] else {
            continue;
        };
        // The layer norm's kernel adds nothing before.
        let adds = matches!(norm.kind, NormKind::Rms) && norm.add.is_none();
        if adds && out == h && n == period && n == norm.rows * norm.cols && a != b {
            program.actions[at] = Action::Norm(Norm { x: a, add: Some((b, h)), ..norm });
            program.actions.remove(at - 1);
        }
    }
}

/// Moves the quantisation of a value into the action that writes it. `take` says whether that action can; it then
/// writes the floats only if somebody else reads them.
fn quantise_at_writer(program: &mut Program, take: impl Fn(&mut Action, Value, Acts, bool) -> bool) {
    let mut at = 0;
    while at < program.actions.len() {
        if let Action::Quantise { x: Place::Value(x), acts, .. } = program.actions[at]
            && let Some(from) = writer(program, x)
        {
            let floats_too = program.n_reads(x) > 1;
            let mut action = program.actions[from].clone();
            if take(&mut action, x, acts, floats_too) {
                program.actions[from] = action;
                program.actions.remove(at);
                continue;
            }
        }
        at += 1;
    }
}

/// `y = norm(x); q = quantise(y)` becomes one action. An RMS norm quantises by itself (`translate`).
fn norm_quantise(program: &mut Program) {
    quantise_at_writer(program, |action, y, acts, floats_too| match action {
        // Rows of heads are reshaped before they are quantised; a norm quantises its own rows.
        Action::Norm(norm)
            if norm.kind == NormKind::Layer
                && norm.out == Some(y)
                && norm.acts.is_none()
                && norm.cols % 32 == 0 =>
        {
            norm.acts = Some(acts);
            norm.out = floats_too.then_some(y);
            true
        }
        _ => false,
    });
}

/// `h = f(g) · u; q = quantise(h)` becomes one action.
fn gate_quantise(program: &mut Program) {
    quantise_at_writer(program, |action, h, acts, floats_too| match action {
        Action::Gate(gate) if gate.out == Some(h) && gate.acts.is_none() => {
            gate.acts = Some(acts);
            gate.out = floats_too.then_some(h);
            true
        }
        _ => false,
    });
}

/// `h = f(x·w0ᵀ) · x·w1ᵀ; q = quantise(h)` becomes one action where the product is of block formats and its kernel's CTAs
/// end 32 rows, which are a group.
fn product_quantise(program: &mut Program) {
    let device = program.device.clone();
    quantise_at_writer(program, |action, h, acts, floats_too| match action {
        Action::Product(p)
            if p.glu.is_some()
                && p.parts[0].out == h
                && p.parts[0].residual.is_none()
                && p.parts[0].w.rows % 32 == 0
                && matches!(p.x, Factor::Acts(_))
                && ends_groups(p, &device)
                && p.acts.is_none()
                && !floats_too =>
        {
            p.acts = Some(acts);
            true
        }
        _ => false,
    });
}

/// `y = attention(q); z = hadamard(y)` becomes one action where only the rotation reads `y`, for the width of values that
/// the kernels have.
fn attention_hadamard(program: &mut Program) {
    let mut at = 0;
    while at < program.actions.len() {
        if let Action::Hadamard { x: Place::Value(y), width, out: z, .. } = program.actions[at]
            && width == flash::ROTATED_WIDTH as usize
            && only_reader(program, y) == Some(at)
            && let Some(from) = writer(program, y)
            && let Action::Attention(attention) = &mut program.actions[from]
            && attention.out == y
            && attention.params.head_dim_v % width == 0
            && !attention.rotated
            && attention.acts.is_none()
        {
            (attention.rotated, attention.out) = (true, z);
            program.actions.remove(at);
        } else {
            at += 1;
        }
    }
}

/// `y = attention(q); a = quantise(y)` becomes one action where groups lie within heads.
fn attention_quantise(program: &mut Program) {
    quantise_at_writer(program, |action, y, acts, floats_too| match action {
        Action::Attention(attention)
            if attention.out == y
                && attention.acts.is_none()
                && attention.params.head_dim_v % 32 == 0
                && !floats_too =>
        {
            attention.acts = Some(acts);
            true
        }
        _ => false,
    });
}

/// Whether only products of one token read these activations, and `fits` refuses none of them.
fn read_by_products(program: &Program, acts: Acts, fits: impl Fn(&Action) -> bool) -> bool {
    let takes = |action: &Action| match action {
        Action::Product(Product { n: 1, x, .. }) | Action::ExpertProduct(ExpertProduct { n: 1, x, .. }) => {
            *x == Factor::Acts(acts) && fits(action)
        }
        _ => false,
    };
    let reads = |action: &Action| {
        let mut reads = false;
        action.for_each_read(&mut |v| reads |= v == acts.q || v == acts.scales);
        reads
    };
    program.actions.iter().filter(|action| reads(action)).all(takes)
}

/// Lets all products that read quantised activations take something else instead.
fn replace_acts(program: &mut Program, acts: Acts, with: Factor) {
    for action in &mut program.actions {
        match action {
            Action::Product(Product { x, .. }) | Action::ExpertProduct(ExpertProduct { x, .. })
                if *x == Factor::Acts(acts) =>
            {
                *x = with;
            }
            _ => {}
        }
    }
}

/// `h = x·wᵀ; a = quantise(norm(h)); y = a·vᵀ` becomes two actions where there is one token and only plain products read `a`:
/// the first leaves what the norm takes, the second multiplies by the row's factor, and no launch stands between.
fn product_norm(program: &mut Program) {
    let mut at = 0;
    while at < program.actions.len() {
        if let Action::Norm(Norm {
            kind: NormKind::Rms,
            x: Place::Value(h),
            add: None,
            weight: Some(weight),
            eps,
            rows: 1,
            cols,
            out: None,
            acts: Some(acts),
            ..
        }) = program.actions[at]
            && cols <= mmvq::MAX_NORM_K
            && let Some(from) = writer(program, h)
            && leaves_norm(&program.actions[from], h)
            && read_by_products(program, acts, |action| matches!(action, Action::Product(_)))
        {
            let squares = program.value(cols / 32 * size_of::<f32>());
            let unscaled = Unscaled { acts, squares };
            replace_acts(program, acts, Factor::Unscaled(unscaled, eps));
            if let Action::Product(product) = &mut program.actions[from] {
                product.norm = Some((weight, unscaled));
            }
            program.actions.remove(at);
        } else {
            at += 1;
        }
    }
}

/// Whether an action is a product of one token that can leave what a norm of its result `h` takes.
fn leaves_norm(action: &Action, h: Value) -> bool {
    let Action::Product(Product { parts, n: 1, glu: None, acts: None, norm: None, .. }) = action else {
        return false;
    };
    let [Part { w, out, .. }] = &parts[..] else { return false };
    *out == h && quantise_act::kind(w.format).is_some() && w.rows.is_multiple_of(32)
}

/// `a = quantise(x); y = a·wᵀ` becomes one action where there is one token: each of the kernel's CTAs quantises what it
/// needs, which takes less time than a launch. After the rules that quantise where `x` is written, which is once.
fn quantise_product(program: &mut Program) {
    let mut at = 0;
    while at < program.actions.len() {
        if let Action::Quantise { x, acts, k, .. } = program.actions[at]
            && k <= mmvq::MAX_FLOATS_K
            && read_by_products(program, acts, |_| true)
        {
            replace_acts(program, acts, Factor::Floats(x));
            program.actions.remove(at);
        } else {
            at += 1;
        }
    }
}

/// Most rows of a product that norms its activations: every 32 of them do it anew. On an H100 that is two CTAs per SM, which
/// are there at once; 14,336 rows of gate and up took 7.6 µs longer, at its base clock, than after a norm of its own.
const MAX_NORM_ROWS: usize = 8 << 10;

/// `a = quantise(norm(x)); y = a·wᵀ` becomes one action where there is one token, as in [`quantise_product`].
fn norm_product(program: &mut Program) {
    let mut at = 0;
    while at < program.actions.len() {
        if let Action::Norm(Norm {
            kind: NormKind::Rms,
            x,
            add: None,
            weight: Some(weight),
            eps,
            rows: 1,
            cols,
            out: None,
            acts: Some(acts),
            ..
        }) = program.actions[at]
            && cols <= mmvq::MAX_NORM_K
        {
            let few_rows = |action: &Action| {
                let (Action::Product(Product { parts, glu, .. })
                | Action::ExpertProduct(ExpertProduct { parts, glu, .. })) = action
                else {
                    return false;
                };
                let written = if glu.is_some() { 1 } else { parts.len() };
                parts[..written].iter().map(|part| part.w.rows).sum::<usize>() <= MAX_NORM_ROWS
            };
            if read_by_products(program, acts, few_rows) {
                replace_acts(program, acts, Factor::Normed(x, weight, eps));
                program.actions.remove(at);
                continue;
            }
        }
        at += 1;
    }
}

/// Each product of one token asks L2 for weights of the next one: memory is idle while a launch ends and another begins.
fn product_ahead(program: &mut Program) {
    let mut next = None;
    for action in program.actions.iter_mut().rev() {
        if let Action::Product(product @ Product { n: 1, .. }) = action {
            product.ahead = next;
            next = product.parts.first().map(|part| part.w);
        }
    }
}

/// `k' = hadamard(k); v' = hadamard(v); store(k', v')` becomes one action, where only the store reads either and no matrix
/// is wider than a head.
fn hadamard_store(program: &mut Program) {
    let mut at = 0;
    while at < program.actions.len() {
        let Action::Store(store) = program.actions[at] else {
            at += 1;
            continue;
        };
        let taken = [store.k, store.v].iter().enumerate().find_map(|(part, &place)| {
            let Place::Value(rotated) = place else { return None };
            let from = writer(program, rotated).filter(|_| program.n_reads(rotated) == 1)?;
            let Action::Hadamard { x, width, .. } = program.actions[from] else { return None };
            let free = store.widths[part].is_none() && (part == 1 || store.rope.is_none());
            // Those who read the cache say how wide heads are.
            let head_dim = program.actions.iter().find_map(|action| match action {
                Action::Attention(Attention { params, .. }) if params.il == store.il => {
                    Some([params.head_dim_k, params.head_dim_v][part])
                }
                _ => None,
            })?;
            (free && head_dim % 32 == 0 && head_dim % width == 0).then_some((part, from, x, width))
        });
        let Some((part, from, x, width)) = taken else {
            at += 1;
            continue;
        };
        if let Action::Store(store) = &mut program.actions[at] {
            *(if part == 0 { &mut store.k } else { &mut store.v }) = x;
            store.widths[part] = Some(width);
        }
        program.actions.remove(from);
        at -= 1;
    }
}

/// `q' = rope(q); k' = rope(k); store(k', v)` becomes one action, where only the store reads `k'`. If the store takes the
/// keys through a Hadamard matrix, the queries must go through the same one, which becomes the store's as well.
fn rope_store(program: &mut Program) {
    let rope_of = |program: &Program, v: Value| -> Option<usize> {
        let i = writer(program, v)?;
        matches!(program.actions[i], Action::Rope { .. }).then_some(i)
    };
    for at in (0..program.actions.len()).rev() {
        let Some(&Action::Store(store)) = program.actions.get(at) else { continue };
        let Place::Value(k) = store.k else { continue };
        let Some(k_at) = rope_of(program, k).filter(|_| program.n_reads(k) == 1) else { continue };
        let Action::Rope { rotation: k_rotation, table, n_rot, mode, .. } = program.actions[k_at] else {
            continue;
        };
        // What the kernel of both takes.
        if n_rot % 8 != 0 || k_rotation.head_dim % 8 != 0 {
            continue;
        }
        // The queries' rotation is the nearest one before the store that uses the same table and is not the keys'.
        let q_at = (0..at).rev().find(|&i| {
            i != k_at
                && matches!(program.actions[i], Action::Rope { rotation, table: t, mode: m, n_rot: r, .. }
                    if t == table && m == mode && r == n_rot && rotation.head_dim == k_rotation.head_dim)
        });
        let Some(q_at) = q_at else { continue };
        let Action::Rope { rotation: mut q, .. } = program.actions[q_at] else { continue };
        let mut gone: Vec<usize> = alloc::vec![k_at, q_at];
        if let Some(width) = store.widths[0] {
            let Some(through) = only_reader(program, q.out).filter(|through| *through < at) else { continue };
            match program.actions[through] {
                Action::Hadamard { width: of_q, out, .. } if of_q == width => q.out = out,
                _ => continue,
            }
            gone.push(through);
        }
        // The queries' rotation moves down to the store: nobody may read them in between.
        let read_between = program.actions[q_at + 1..at].iter().any(|action| {
            let mut reads = false;
            action.for_each_read(&mut |v| reads |= v == q.out);
            reads
        });
        if read_between {
            continue;
        }
        program.actions[at] =
            Action::Store(Store { k: k_rotation.x, rope: Some((q, table, n_rot, mode)), ..store });
        gone.sort_unstable();
        for i in gone.into_iter().rev() {
            program.actions.remove(i);
        }
    }
}

/// `q' = rope(q); store(rope(k), v); y = attention(q')` becomes one action where a sequence has one token and only
/// attention reads `q'`: the kernel appends what it would wait for, or a launch before it does where it cannot.
fn store_attention(program: &mut Program) {
    if program.most_tokens != MostTokens::One {
        return;
    }
    for at in (0..program.actions.len()).rev() {
        let Some(&Action::Attention(attention @ Attention { q: Place::Value(q), store: None, .. })) =
            program.actions.get(at)
        else {
            continue;
        };
        let Some(store_at) = writer(program, q).filter(|_| program.n_reads(q) == 1) else { continue };
        let Action::Store(store) = program.actions[store_at] else { continue };
        if store.il != attention.params.il {
            continue;
        }
        // The store moves down to the attention: nobody may look at the layer's cache in between.
        let between = &program.actions[store_at + 1..at];
        let looks = |a: &Action| matches!(a, Action::Attention(a) if a.params.il == store.il);
        if !between.iter().any(looks) {
            program.actions[at] = Action::Attention(Attention { store: Some(store), ..attention });
            program.actions.remove(store_at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backends::cuda::translate::{Anywhere, translate};
    use crate::graph::{Graph, GraphBuilder, Output};
    use crate::op::{AttentionParams, Glu, RopeMode, RopeParams, Unary};
    use crate::plan;
    use crate::tensor::Input;
    use gpu_kernels::driver::DeviceInfo;
    use proptest::prelude::*;
    use quant::FormatId;

    const COLS: usize = 64;

    fn rope(n_dims: usize) -> RopeParams {
        RopeParams {
            n_dims,
            freq_base: 1e4,
            freq_scale: 1.0,
            ext_factor: 0.0,
            attn_factor: 1.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            n_ctx_orig: 64,
        }
    }

    /// A random graph of what decoders are made of, over a pool of streams [n, 64].
    fn random_graph(n: usize, steps: &[(u8, usize, usize)]) -> Graph {
        let mut b = GraphBuilder::new(true);
        let ids = b.input(Input::Tokens, n);
        let positions = b.input(Input::Positions, n);
        let table = b.weight(0, FormatId::Q8_0, &[50, COLS], 0);
        let w = |b: &mut GraphBuilder, rows: usize| b.weight(1, FormatId::Q4_0, &[rows, COLS], 0);
        let angles = b.rope_table(positions, None, rope(32));
        let mut pool = alloc::vec![b.get_rows(table, ids)];
        for &(op, i, j) in steps {
            let (x, y) = (pool[i % pool.len()], pool[j % pool.len()]);
            let out = match op % 8 {
                0 => b.add(x, y),
                1 => {
                    let vector = b.weight(2, FormatId::F32, &[COLS], 0);
                    b.rms_norm(x, Some(vector), 1e-5)
                }
                2 => {
                    let w = w(&mut b, COLS);
                    b.matmul(x, w, None)
                }
                3 => {
                    let (gate, up) = (w(&mut b, COLS), w(&mut b, COLS));
                    let parts = b.matmul_many(x, &[(gate, None), (up, None)]);
                    b.glu(Glu::Plain(Unary::Silu), parts[0], parts[1])
                }
                4 => b.glu(Glu::Plain(Unary::Gelu), x, y),
                5 => {
                    // Keys, values and results through Hadamard's matrix, or some of them.
                    let hadamard = |b: &mut GraphBuilder, part: usize, x| match (i >> part) & 1 {
                        0 => x,
                        _ => b.hadamard(x, COLS),
                    };
                    let rotated = |b: &mut GraphBuilder, x| {
                        let x = b.reshape(x, &[n, 1, COLS]);
                        let x = b.rope(x, angles, RopeMode::Neox);
                        let x = b.reshape(x, &[n, COLS]);
                        hadamard(b, 0, x)
                    };
                    let (q, k) = (rotated(&mut b, x), rotated(&mut b, y));
                    let v = hadamard(&mut b, 1, y);
                    b.kv_store(k, v, 0);
                    let params = AttentionParams {
                        il: 0,
                        n_head: 1,
                        n_head_kv: 1,
                        head_dim_k: COLS,
                        head_dim_v: COLS,
                        scale: 0.2,
                        softcap: 0.0,
                        window: 0,
                        causal: true,
                    };
                    let y = b.attention(q, None, params);
                    hadamard(&mut b, 2, y)
                }
                6 => {
                    b.tap("kept", Some(i), x);
                    b.unary(Unary::Relu, x)
                }
                _ => b.scale(x, 2.0),
            };
            pool.push(out);
        }
        let last = *pool.last().unwrap();
        b.output(Output::Logits, last);
        b.finish()
    }

    /// A step through a llama of quantised weights, of this many tokens: this many layers and the logits.
    fn decode_step(n: usize, n_layers: usize) -> Graph {
        step(n, n_layers, false)
    }

    /// [`decode_step`], over a cache of `rotated` keys and values.
    fn step(n: usize, n_layers: usize, rotated: bool) -> Graph {
        const EMBD: usize = 512;
        let mut b = GraphBuilder::new(true);
        let (ids, positions) = (b.input(Input::Tokens, n), b.input(Input::Positions, n));
        let w =
            |b: &mut GraphBuilder, rows: usize, cols: usize| b.weight(0, FormatId::Q4_0, &[rows, cols], 0);
        let angles = b.rope_table(positions, None, rope(64));
        let norm = |b: &mut GraphBuilder, x| {
            let vector = b.weight(1, FormatId::F32, &[EMBD], 0);
            b.rms_norm(x, Some(vector), 1e-5)
        };
        let table = w(&mut b, 1000, EMBD);
        let mut x = b.get_rows(table, ids);
        for il in 0..n_layers {
            let y = norm(&mut b, x);
            let qkv = [EMBD, 128, 128].map(|rows| (w(&mut b, rows, EMBD), None));
            let [q, k, v] = b.matmul_many(y, &qkv)[..] else { unreachable!("three products") };
            let [q, k] = [(q, 8), (k, 2)].map(|(x, heads)| {
                let x = b.reshape(x, &[n, heads, 64]);
                let x = b.rope(x, angles, RopeMode::Norm);
                b.reshape(x, &[n, 64 * heads])
            });
            let hadamard = |b: &mut GraphBuilder, x| if rotated { b.hadamard(x, 64) } else { x };
            let [q, k, v] = [q, k, v].map(|x| hadamard(&mut b, x));
            b.kv_store(k, v, il);
            let params = AttentionParams {
                il,
                n_head: 8,
                n_head_kv: 2,
                head_dim_k: 64,
                head_dim_v: 64,
                scale: 0.125,
                softcap: 0.0,
                window: 0,
                causal: true,
            };
            let y = b.attention(q, None, params);
            let y = hadamard(&mut b, y);
            let out = w(&mut b, EMBD, EMBD);
            let y = b.matmul(y, out, None);
            x = b.add(x, y);
            let y = norm(&mut b, x);
            let gate_up = [0, 1].map(|_| (w(&mut b, 1024, EMBD), None));
            let [gate, up] = b.matmul_many(y, &gate_up)[..] else { unreachable!("two products") };
            let y = b.glu(Glu::Plain(Unary::Silu), gate, up);
            let down = w(&mut b, EMBD, 1024);
            let y = b.matmul(y, down, None);
            x = b.add(x, y);
        }
        let y = norm(&mut b, x);
        let head = w(&mut b, 1 << 15, EMBD);
        let logits = b.matmul(y, head, None);
        b.output(Output::Logits, logits);
        b.finish()
    }

    /// Names of the actions of [`decode_step`] under all rules.
    fn merged_step(n: usize, n_layers: usize) -> Vec<&'static str> {
        let (mut program, _) =
            translate(&decode_step(n, n_layers), &Anywhere, &DeviceInfo::default()).unwrap();
        RuleSet::ALL.apply(&mut program);
        program.actions.iter().map(Action::name).collect()
    }

    /// Each launch of a decode step costs a microsecond or more that no other hides.
    #[test]
    fn a_layer_of_a_decode_step_is_five_launches() {
        let (one, two) = (merged_step(1, 1), merged_step(1, 2));
        assert_eq!(two.len() - one.len(), 5, "{two:?}");
        // Embedding, angles; product of the logits. The first norm is within a product, the others between two.
        assert_eq!(one.len(), 5 + 3, "{one:?}");
    }

    /// One token's products ask for what is read next; those of a batch have time for their own.
    #[test]
    fn products_of_one_token_name_the_next_weights() {
        for n in [1, 4] {
            let (mut program, _) = translate(&decode_step(n, 2), &Anywhere, &DeviceInfo::default()).unwrap();
            RuleSet::ALL.apply(&mut program);
            let products = program.actions.iter().filter_map(|action| match action {
                Action::Product(product) => Some(product),
                _ => None,
            });
            let products: Vec<&Product> = products.collect();
            assert_eq!(products.len(), 2 * 4 + 1);
            for pair in products.windows(2) {
                assert_eq!(pair[0].ahead, (n == 1).then_some(pair[1].parts[0].w), "{n} tokens");
            }
            assert_eq!(products[8].ahead, None);
        }
    }

    /// A cache of rotated keys and values costs no launch: the store and attention rotate on the way.
    #[test]
    fn a_layer_over_a_rotated_cache_has_no_launch_more() {
        for n in [1, 4, 16] {
            for most_tokens in [MostTokens::One, MostTokens::Some] {
                let names = |rotated| {
                    let (mut program, _) =
                        translate(&step(n, 2, rotated), &Anywhere, &DeviceInfo::default()).unwrap();
                    program.most_tokens = most_tokens;
                    RuleSet::ALL.apply(&mut program);
                    program.actions.iter().map(Action::name).collect::<Vec<_>>()
                };
                assert_eq!(names(true), names(false), "{n} tokens");
            }
        }
    }

    /// In a batch attention quantises its results, and the product of gate and up its own.
    #[test]
    fn attention_and_gate_and_up_of_a_batch_end_quantised() {
        let layer = |n| {
            let (one, two) = (merged_step(n, 1), merged_step(n, 2));
            two[one.len() - 2..two.len() - 2].to_vec()
        };
        let of_a_batch = ["norm", "product", "attention", "product", "norm", "product", "product"];
        assert_eq!(layer(16), of_a_batch);
        // The kernel of few columns does not end groups.
        assert_eq!(layer(4).len(), of_a_batch.len() + 1);
    }

    /// The product after attention reads what attention quantised: one token's too, where CTAs could quantise it anew.
    #[test]
    fn attention_of_a_decode_step_ends_quantised() {
        for n in [1, 4] {
            let (mut program, _) = translate(&decode_step(n, 1), &Anywhere, &DeviceInfo::default()).unwrap();
            RuleSet::ALL.apply(&mut program);
            let at = program.actions.iter().position(|a| matches!(a, Action::Attention(_))).unwrap();
            let [Action::Attention(attention), Action::Product(out), ..] = &program.actions[at..] else {
                panic!("{n} tokens: {:?} after attention", program.actions[at + 1].name());
            };
            assert_eq!(attention.acts.map(Factor::Acts), Some(out.x), "{n} tokens");
        }
    }

    /// Results whose groups span heads, and results that others read, remain floats.
    #[test]
    fn attention_ends_in_floats_where_it_must() {
        for (head_dim, tapped) in [(16, false), (64, true)] {
            let mut b = GraphBuilder::new(true);
            let q = {
                let (ids, table) = (b.input(Input::Tokens, 1), b.weight(0, FormatId::Q8_0, &[50, 256], 0));
                b.get_rows(table, ids)
            };
            let params = AttentionParams {
                il: 0,
                n_head: 256 / head_dim,
                n_head_kv: 256 / head_dim,
                head_dim_k: head_dim,
                head_dim_v: head_dim,
                scale: 0.125,
                softcap: 0.0,
                window: 0,
                causal: true,
            };
            let y = b.attention(q, None, params);
            if tapped {
                b.tap("attention", Some(0), y);
            }
            let w = b.weight(1, FormatId::Q4_K, &[256, 256], 0);
            let y = b.matmul(y, w, None);
            b.output(Output::Logits, y);
            let (mut program, _) = translate(&b.finish(), &Anywhere, &DeviceInfo::default()).unwrap();
            RuleSet::only("attention_quantise").unwrap().apply(&mut program);
            let names: Vec<_> = program.actions.iter().map(Action::name).collect();
            assert_eq!(names, ["get_rows", "attention", "quantise", "product"], "heads of {head_dim}");
        }
    }

    proptest! {
        /// Runs merged programs symbolically, under every set of rules: every byte of the arena remembers which value
        /// wrote it last; each read finds its value, nothing is read before it is written, no two writes of an action
        /// overlap, and what is kept is there at the end.
        #[test]
        fn merged_programs_find_what_they_read(
            steps in prop::collection::vec((any::<u8>(), 0usize..50, 0usize..50), 1..30),
            rules in 0u32..1 << RULES.len(),
            n in prop_oneof![Just(1), Just(3)],
            most_tokens in prop_oneof![Just(MostTokens::One), Just(MostTokens::Some)],
        ) {
            let graph = random_graph(n, &steps);
            let (mut program, _) = translate(&graph, &Anywhere, &DeviceInfo::default()).unwrap();
            program.most_tokens = most_tokens;
            RuleSet(rules).apply(&mut program);
            let accesses = program.accesses();
            let kept: Vec<usize> = program.kept.iter().map(|v| v.index()).collect();
            let places = plan::lay_out(&program.values, &accesses, &kept, 256);
            let mut owner = alloc::vec![usize::MAX; places.arena_bytes];
            let range = |v: usize| {
                let slot = places.slots[v].expect("placed");
                slot.offset..slot.offset + slot.len
            };
            for (access, action) in accesses.iter().zip(&program.actions) {
                for &v in &access.reads {
                    prop_assert!(owner[range(v)].iter().all(|o| *o == v), "{v} read by {action:?}");
                }
                for &v in &access.writes {
                    owner[range(v)].fill(v);
                }
                for &v in &access.writes {
                    prop_assert!(owner[range(v)].iter().all(|o| *o == v), "{v} written by {action:?}");
                }
                // What is read and not written over in place is still there.
                for &v in &access.reads {
                    let over = access.in_place.iter().any(|(r, w)| *r == v && range(*w) == range(v));
                    prop_assert!(over || owner[range(v)].iter().all(|o| *o == v), "{v} lost in {action:?}");
                }
            }
            for v in kept {
                prop_assert!(owner[range(v)].iter().all(|o| *o == v), "kept {v}");
            }
        }
    }

    /// A decoder's layer comes down to the launches that its design has.
    #[test]
    fn a_layer_is_merged() {
        let mut b = GraphBuilder::new(false);
        let ids = b.input(Input::Tokens, 2);
        let table = b.weight(0, FormatId::Q8_0, &[50, COLS], 0);
        let vector = b.weight(1, FormatId::F32, &[COLS], 0);
        let w = b.weight(2, FormatId::Q4_0, &[COLS, COLS], 0);
        let x = b.get_rows(table, ids);
        let h = b.rms_norm(x, Some(vector), 1e-5);
        let parts = b.matmul_many(h, &[(w, None), (w, None)]);
        let h = b.glu(Glu::Plain(Unary::Silu), parts[0], parts[1]);
        let h = b.matmul(h, w, None);
        let x = b.add(h, x);
        let x = b.rms_norm(x, Some(vector), 1e-5);
        b.output(Output::Embeddings, x);
        let graph = b.finish();
        let names = |rules: RuleSet| {
            let (mut program, _) = translate(&graph, &Anywhere, &DeviceInfo::default()).unwrap();
            rules.apply(&mut program);
            program.actions.iter().map(Action::name).collect::<Vec<_>>()
        };
        let merged = ["get_rows", "norm", "product", "quantise", "product", "norm"];
        assert_eq!(names(RuleSet::ALL), merged);
        assert_eq!(names(RuleSet::NONE).len(), 8);
    }
}
