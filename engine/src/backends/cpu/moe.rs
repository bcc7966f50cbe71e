//! Routing of a mixture of experts, and the weighted sum of what the experts made. Small next to the experts' products.

use crate::op::MoeRouteParams;

/// See [`crate::op::Op::MoeRoute`]. The choice is by repeated maximum, ties to the lower id, without allocation.
pub fn route(logits: &[f32], n_expert: usize, p: &MoeRouteParams, ids: &mut [i32], weights: &mut [f32]) {
    for ((row, ids), weights) in logits
        .chunks_exact(n_expert)
        .zip(ids.chunks_exact_mut(p.n_used))
        .zip(weights.chunks_exact_mut(p.n_used))
    {
        for j in 0..p.n_used {
            let (chosen, _) = ids.split_at(j);
            let best = (0..n_expert as i32).filter(|e| !chosen.contains(e)).reduce(|best, e| {
                if row[e as usize].total_cmp(&row[best as usize]).is_gt() { e } else { best }
            });
            ids[j] = best.expect("n_used <= n_expert");
        }
        let max = row[ids[0] as usize] as f64;
        let exp = |logit: f32| libm::exp(logit as f64 - max);
        let total: f64 = if p.softmax_after {
            ids.iter().map(|e| exp(row[*e as usize])).sum()
        } else {
            row.iter().map(|logit| exp(*logit)).sum()
        };
        let share = |e: i32| exp(row[e as usize]) / total;
        // The smallest normal half: llama.cpp's guard against dividing by nothing.
        let norm =
            if p.normalise { ids.iter().map(|e| share(*e)).sum::<f64>().max(6.103515625e-5) } else { 1.0 };
        for (w, e) in weights.iter_mut().zip(&*ids) {
            *w = (share(*e) / norm * p.scale as f64) as f32;
        }
    }
}

/// See [`crate::op::Op::MoeCombine`]: sums in order of the chosen experts.
pub fn combine(x: &[f32], weights: &[f32], n_used: usize, out: &mut [f32]) {
    let cols = out.len() * n_used / weights.len();
    for ((x, w), out) in
        x.chunks_exact(cols * n_used).zip(weights.chunks_exact(n_used)).zip(out.chunks_exact_mut(cols))
    {
        for (j, (x, w)) in x.chunks_exact(cols).zip(w).enumerate() {
            for (out, x) in out.iter_mut().zip(x) {
                *out = if j == 0 { w * x } else { *out + w * x };
            }
        }
    }
}

/// See [`crate::op::Op::ScaleExperts`], in place.
pub fn scale_experts(factors: &[f32], ids: &[i32], cols: usize, x: &mut [f32]) {
    for (row, id) in x.chunks_exact_mut(cols).zip(ids) {
        let factor = factors[*id as usize];
        row.iter_mut().for_each(|x| *x *= factor);
    }
}

/// See [`crate::op::Op::RowGate`], in place.
pub fn row_gate(gate: &[f32], cols: usize, x: &mut [f32]) {
    for (row, gate) in x.chunks_exact_mut(cols).zip(gate) {
        let factor = (1.0 / (1.0 + libm::exp(-(*gate as f64)))) as f32;
        row.iter_mut().for_each(|x| *x *= factor);
    }
}
