//! Rules that merge actions where one kernel does the work of several. Each is a function from a program to a program
//! with equal results, bit for bit; each has a name and can be left out, which is how they are tested.

mod attention;

use gpu_kernels::kernels::{mmvq, quantise_act};

use super::emit::{ends_groups, product_glu};
use super::program::{
    Action, Acts, ExpertProduct, Factor, Gate, Norm, NormKind, Part, Place, Product, Program, Unscaled, Value,
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
    Rule { name: "attention_hadamard", apply: attention::attention_hadamard },
    Rule { name: "attention_quantise", apply: attention::attention_quantise },
    Rule { name: "hadamard_store", apply: attention::hadamard_store },
    Rule { name: "rope_store", apply: attention::rope_store },
    Rule { name: "store_attention", apply: attention::store_attention },
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

/// The action that reads a value, if it is the only one and the value does not outlive the step.
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

/// `h = f(x·w0ᵀ) · x·w1ᵀ; q = quantise(h)` becomes one action where the product is of block formats and its kernel's
/// CTAs end 32 rows, which are a group.
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

/// An RMS norm of one row whose result is read quantised alone.
struct RowNorm {
    x: Place,
    weight: Place,
    eps: f32,
    cols: usize,
    acts: Acts,
}

/// The norm that an action is, if products of one token can do it or a part of it.
fn row_norm(action: &Action) -> Option<RowNorm> {
    let &Action::Norm(Norm {
        kind: NormKind::Rms,
        x,
        add: None,
        weight: Some(weight),
        eps,
        rows: 1,
        cols: cols @ ..=mmvq::MAX_NORM_K,
        out: None,
        acts: Some(acts),
        ..
    }) = action
    else {
        return None;
    };
    Some(RowNorm { x, weight, eps, cols, acts })
}

/// `h = x·wᵀ; a = quantise(norm(h)); y = a·vᵀ` becomes two actions where there is one token and only plain products
/// read `a`: the first leaves what the norm takes, the second multiplies by the row's factor, and no launch stands
/// between.
fn product_norm(program: &mut Program) {
    let mut at = 0;
    while at < program.actions.len() {
        if let Some(RowNorm { x: Place::Value(h), weight, eps, cols, acts }) = row_norm(&program.actions[at])
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
        if let Some(RowNorm { x, weight, eps, acts, .. }) = row_norm(&program.actions[at]) {
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

#[cfg(test)]
mod tests;
