//! Rules about attention: what comes before it (rotations, the cache) and after it.

use alloc::vec::Vec;

use gpu_kernels::kernels::flash;

use super::{only_reader, quantise_at_writer, writer};
use crate::backends::cuda::emit::MostTokens;
use crate::backends::cuda::program::{Action, Attention, Place, Program, Store, Value};

/// `y = attention(q); z = hadamard(y)` becomes one action where only the rotation reads `y`, for the width of values that
/// the kernels have.
pub(super) fn attention_hadamard(program: &mut Program) {
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
pub(super) fn attention_quantise(program: &mut Program) {
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

/// `k' = hadamard(k); v' = hadamard(v); store(k', v')` becomes one action, where only the store reads either and no matrix
/// is wider than a head.
pub(super) fn hadamard_store(program: &mut Program) {
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
pub(super) fn rope_store(program: &mut Program) {
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
pub(super) fn store_attention(program: &mut Program) {
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
