//! Every op on every backend against the reference, over shapes at and around the kernels' edges.

#[path = "common/case.rs"]
mod case;
mod common;

use std::sync::Arc;

use case::{Case, nmse, run};
use engine::backend::Backend;
use engine::backends::cpu::{Cpu, Isa};
use engine::backends::cuda::{Cuda, RuleSet};
use engine::backends::reference::Reference;
use engine::executor::Serial;
use engine::graph::Graph;
use engine::kv_cache::{KvLayer, KvLayout, PAGE};
use engine::op::{AttentionParams, Glu, MoeRouteParams, Op, RopeMode, RopeParams, Unary};
use engine::pool::Pool;
use engine::tensor::{Input, TensorId};
use engine::weights::Weights;
use quant::FormatId;

/// Error that the GPU's f32 sums in tensor cores and its approximate functions may add.
const GPU_FLOATS: f64 = 1e-9;

/// Builds the case and compares every backend with the reference.
fn check(bound: f64, build: impl Fn() -> (Case, TensorId)) {
    check_with(bound, bound.max(GPU_FLOATS), build);
}

/// The same with a bound of its own for the GPU.
fn check_with(bound: f64, gpu_bound: f64, build: impl Fn() -> (Case, TensorId)) {
    let (case, out) = build();
    let (graph, weights, name, n, kv) = case.finish(out);
    let want = run(&mut Reference::new(weights.clone()), graph.clone(), n, &kv);
    assert!(want.iter().all(|v| v.is_finite()), "{name}: the reference is not finite");
    let mut first: Option<Vec<f32>> = None;
    for isa in Isa::available() {
        for threads in [1, 3] {
            let mut cpu = Cpu::new(weights.clone(), Arc::new(Pool::new(threads).unwrap()), isa);
            let got = run(&mut cpu, graph.clone(), n, &kv);
            let err = nmse(&got, &want);
            assert!(
                err <= bound,
                "{name} n={n} on {} with {threads} threads: nmse {err:.2e} > {bound:.0e}",
                isa.name()
            );
            let first = first.get_or_insert_with(|| got.clone());
            assert!(*first == got, "{name} n={n}: {} with {threads} threads gives other bits", isa.name());
        }
    }
    check_gpu(&name, gpu_bound, graph.clone(), &weights, n, &kv, &want);
    check_prompts(&name, gpu_bound, graph, &weights, n, &kv, &want);
}

/// What the weights' f16 costs where products dequantise: far less than quantised activations.
const DEQUANTISED: f64 = 1e-6;

/// The kernels for prompts of devices that run those apart.
fn check_prompts(
    name: &str,
    bound: f64,
    graph: Graph,
    weights: &Arc<Weights>,
    n: usize,
    kv: &Option<KvLayout>,
    want: &[f32],
) {
    // What else depends on the number of tokens the kernels' own cases cover; a tile is emulated whole, whatever is in it.
    let apart = |op: &Op| matches!(op, Op::MatMul { .. } | Op::MatMulId { .. } | Op::Attention { .. });
    if !matches!(n, 5 | 9) || !graph.nodes.iter().any(|node| apart(&node.op)) {
        return;
    }
    for device in common::gpus_or_emulators() {
        let mut cuda = Cuda::new(device, Arc::new(Serial), weights.clone());
        if !cuda.runs_prompts_apart() {
            continue;
        }
        if let Some(layout) = kv {
            cuda.create_kv(layout).unwrap();
        }
        let graph = Graph { prompt: true, ..graph.clone() };
        let dequantises = weights.iter().any(|w| !is_float(w.format));
        if let Some(why) = graph.nodes.iter().find_map(|node| cuda.supports(&graph, node).err()) {
            println!("skipped: {name} n={n}, prompts on cuda: {why}");
            continue;
        }
        let err = nmse(&run(&mut cuda, graph, n, kv), want);
        let bound = if dequantises { DEQUANTISED } else { bound };
        assert!(err <= bound, "{name} n={n}, prompts on cuda: nmse {err:.2e} > {bound:.0e}");
    }
}

/// The GPU backend on the emulator: merged and unmerged, which must agree bit for bit.
fn check_gpu(
    name: &str,
    bound: f64,
    graph: Graph,
    weights: &Arc<Weights>,
    n: usize,
    kv: &Option<KvLayout>,
    want: &[f32],
) {
    let mut first: Option<Vec<f32>> = None;
    // No rule merges anything with attention alone, and it is slow.
    let alone = graph.nodes.iter().any(|node| matches!(node.op, Op::Attention { .. }));
    for rules in &[RuleSet::ALL, RuleSet::NONE][usize::from(alone)..] {
        let mut cuda =
            Cuda::new(common::gpu_or_emulator(), Arc::new(Serial), weights.clone()).with_rules(*rules);
        if let Some(layout) = kv {
            cuda.create_kv(layout).unwrap();
        }
        if let Some(why) = graph.nodes.iter().find_map(|node| cuda.supports(&graph, node).err()) {
            println!("skipped: {name} n={n} on cuda: {why}");
            return;
        }
        let got = run(&mut cuda, graph.clone(), n, kv);
        let err = nmse(&got, want);
        assert!(err <= bound, "{name} n={n} on cuda, {rules:?}: nmse {err:.2e} > {bound:.0e}");
        let first = first.get_or_insert_with(|| got.clone());
        assert!(*first == got, "{name} n={n} on cuda: merged and unmerged programs give other bits");
    }
}

const BATCHES: &[usize] = &[1, 2, 5, 17, 70];

#[test]
fn norms() {
    for &n in BATCHES {
        for cols in [1, 7, 64, 576, 577] {
            check(1e-12, || {
                let mut c = Case::new(format!("rms_norm {cols}"), n);
                let (x, w) = (c.x(cols), c.weight(FormatId::F32, &[cols]));
                let y = c.g.rms_norm(x, Some(w), 1e-5);
                (c, y)
            });
            check(1e-11, || {
                let mut c = Case::new(format!("layer_norm {cols}"), n);
                let (x, w, b) =
                    (c.x(cols), c.weight(FormatId::F32, &[cols]), c.weight(FormatId::F32, &[cols]));
                let y = c.g.layer_norm(x, Some(w), Some(b), 1e-5);
                (c, y)
            });
        }
    }
}

#[test]
fn elementwise() {
    for &n in BATCHES {
        for cols in [1, 31, 96, 1537] {
            for kind in [
                Unary::Silu,
                Unary::Gelu,
                Unary::GeluErf,
                Unary::Relu,
                Unary::ReluSqr,
                Unary::Tanh,
                Unary::Sigmoid,
            ] {
                check(1e-11, || {
                    let mut c = Case::new(format!("{kind:?} {cols}"), n);
                    let x = c.x(cols);
                    let y = c.g.unary(kind, x);
                    (c, y)
                });
            }
            for kind in [
                Glu::Plain(Unary::Silu),
                Glu::Plain(Unary::Gelu),
                Glu::SwigluOai { alpha: 1.702, limit: 7.0 },
            ] {
                check(1e-11, || {
                    let mut c = Case::new(format!("{kind:?} {cols}"), n);
                    let (a, b) = (c.x(cols), c.x(cols));
                    let y = c.g.glu(kind, a, b);
                    (c, y)
                });
            }
            check(1e-12, || {
                let mut c = Case::new(format!("add, mul, scale, softcap {cols}"), n);
                let (a, b, row) = (c.x(cols), c.x(cols), c.weight(FormatId::F32, &[cols]));
                let y = c.g.add(a, b);
                let z = c.g.mul(y, row);
                let z = c.g.add(z, b);
                let z = c.g.scale(z, 0.3);
                let z = c.g.softcap(z, 3.0);
                let z = c.g.add(z, y);
                (c, z)
            });
        }
    }
}

#[test]
fn rope() {
    let params = RopeParams {
        n_dims: 48,
        freq_base: 10000.0,
        freq_scale: 0.25,
        ext_factor: 1.0,
        attn_factor: 1.1,
        beta_fast: 32.0,
        beta_slow: 1.0,
        n_ctx_orig: 64,
    };
    for &n in BATCHES {
        for mode in [RopeMode::Norm, RopeMode::Neox] {
            for factors in [false, true] {
                check(1e-11, || {
                    let mut c = Case::new(format!("rope {mode:?} {factors}"), n);
                    let positions = c.g.input(Input::Positions, n);
                    let factors = factors.then(|| {
                        let f = c.weight(FormatId::F32, &[24]);
                        for v in c.weights.last_mut().unwrap().bytes.chunks_exact_mut(4) {
                            let x = f32::from_le_bytes(v.try_into().unwrap()).abs() + 1.0;
                            v.copy_from_slice(&x.to_le_bytes());
                        }
                        f
                    });
                    let table = c.g.rope_table(positions, factors, params);
                    let x = c.x(3 * 64);
                    let x = c.g.reshape(x, &[n, 3, 64]);
                    let y = c.g.rope(x, table, mode);
                    (c, y)
                });
            }
        }
    }
}

#[test]
fn hadamard() {
    for &n in BATCHES {
        for width in [4, 64, 128, 256, 512] {
            check(1e-12, || {
                let mut c = Case::new(format!("hadamard {width}"), n);
                let x = c.x(1024);
                let y = c.g.hadamard(x, width);
                (c, y)
            });
        }
    }
}

/// Activations of a case of one product, and how near to the reference the product must be.
type Activations = (fn(&mut Case, usize) -> TensorId, f64);

/// Activations that every rounding leaves as they are: only the order of float sums differs.
const EXACT: Activations = (Case::codes, 1e-11);

/// What the order of one product's float sums costs on the GPU.
const PRODUCT: f64 = 1e-10;

/// Any, which block formats quantise: the bound is what that costs.
fn quantised(format: FormatId) -> Activations {
    (Case::x, if is_float(format) { EXACT.1 } else { 1e-3 })
}

fn is_float(format: FormatId) -> bool {
    matches!(format, FormatId::F32 | FormatId::F16 | FormatId::BF16)
}

#[test]
fn matmul_every_format() {
    let formats = quant::table::FORMATS.iter().map(|f| f.id).filter(|id| {
        !matches!(id, FormatId::I8 | FormatId::I16 | FormatId::I32 | FormatId::I64 | FormatId::F64)
            && !matches!(id, FormatId::Q8_1 | FormatId::Q8_K)
    });
    for format in formats {
        for (&n, (x, bound)) in BATCHES.iter().flat_map(|n| [(n, quantised(format)), (n, EXACT)]) {
            check_with(bound, bound.max(PRODUCT), || {
                let mut c = Case::new(format!("matmul {format} within {bound:.0e}"), n);
                let x = x(&mut c, 512);
                let [w0, w1, w2] = [(); 3].map(|()| c.weight(format, &[33, 512]));
                let b0 = c.weight(FormatId::F32, &[33]);
                let y = c.g.matmul_many(x, &[(w0, Some(b0)), (w1, None), (w2, None)]);
                // The result has something of all three.
                let sum = c.g.add(y[0], y[1]);
                let y = c.g.add(sum, y[2]);
                (c, y)
            });
        }
    }
}

#[test]
fn matmul_odd_shapes() {
    for format in [FormatId::F32, FormatId::F16, FormatId::Q4_0, FormatId::Q8_0] {
        let (cols, (x, bound)): (&[usize], _) = if is_float(format) {
            (&[1, 15, 33, 40, 576], quantised(format))
        } else {
            (&[32, 96, 576], EXACT)
        };
        for &cols in cols {
            for rows in [1, 15, 17, 48, 100] {
                for n in [1, 3, 9] {
                    check_with(bound, bound.max(PRODUCT), || {
                        let mut c = Case::new(format!("matmul {format} {rows}x{cols}"), n);
                        let (x, w) = (x(&mut c, cols), c.weight(format, &[rows, cols]));
                        let y = c.g.matmul(x, w, None);
                        (c, y)
                    });
                }
            }
        }
    }
}

/// Two products in a row: a last-bit difference after the first may round to another f16 before the second.
fn experts_bound(format: FormatId) -> f64 {
    match format {
        FormatId::F32 => 1e-11,
        FormatId::F16 => 1e-8,
        _ => 4e-3,
    }
}

#[test]
fn experts() {
    let gatings = [(false, true), (true, false), (false, false)];
    for format in [FormatId::F32, FormatId::F16, FormatId::Q4_K, FormatId::MXFP4] {
        // The emulator takes minutes for the rest.
        let (batches, gatings) = match format {
            FormatId::F32 => (&BATCHES[..3], &gatings[..]),
            _ => (&BATCHES[..4], &gatings[..1]),
        };
        for &n in batches {
            for &(softmax_after, normalise) in gatings {
                check(experts_bound(format), || {
                    let mut c = Case::new(format!("experts {format} {softmax_after} {normalise}"), n);
                    let x = c.x(256);
                    let router = c.weight(FormatId::F32, &[6, 256]);
                    let logits = c.g.matmul(x, router, None);
                    let (ids, weights) = c.g.moe_route(
                        logits,
                        MoeRouteParams { n_used: 3, softmax_after, normalise, scale: 1.0 },
                    );
                    let up = c.weight(format, &[6, 256, 256]);
                    let bias = c.weight(FormatId::F32, &[6, 256]);
                    let x3 = c.g.reshape(x, &[n, 1, 256]);
                    let h = c.g.matmul_id(x3, up, Some(bias), ids);
                    let h = c.g.scale(h, 0.1);
                    let down = c.weight(format, &[6, 40, 256]);
                    let y = c.g.matmul_id(h, down, None, ids);
                    let y = c.g.moe_combine(y, weights);
                    let gate = c.weight(FormatId::F32, &[1, 256]);
                    let gate = c.g.matmul(x, gate, None);
                    let y = c.g.row_gate(y, gate);
                    (c, y)
                });
            }
        }
    }
}

/// One product of floats each: the same bits everywhere.
#[test]
fn factors_of_experts() {
    for &n in BATCHES {
        for (n_used, cols) in [(1, 4), (3, 36), (2, 260)] {
            check_with(0.0, 0.0, || {
                let mut c = Case::new(format!("scale_experts {n_used}x{cols}"), n);
                let (logits, x) = (c.x(8), c.x(n_used * cols));
                let params = MoeRouteParams { n_used, softmax_after: true, normalise: false, scale: 1.0 };
                let (ids, _) = c.g.moe_route(logits, params);
                let x = c.g.reshape(x, &[n, n_used, cols]);
                let factors = c.weight(FormatId::F32, &[8, 1]);
                let y = c.g.scale_experts(x, factors, ids);
                (c, y)
            });
        }
    }
}

#[test]
fn attention() {
    let base = AttentionParams {
        il: 0,
        n_head: 4,
        n_head_kv: 2,
        head_dim_k: 64,
        head_dim_v: 64,
        scale: 0.125,
        softcap: 0.0,
        window: 0,
        causal: true,
    };
    let variants = [
        ("causal", base),
        ("window", AttentionParams { window: 20, ..base }),
        ("softcap", AttentionParams { softcap: 5.0, ..base }),
        ("all", AttentionParams { causal: false, ..base }),
        ("gqa 1", AttentionParams { n_head: 2, ..base }),
        ("mqa", AttentionParams { n_head: 6, n_head_kv: 1, ..base }),
        ("head 96/128", AttentionParams { head_dim_k: 96, head_dim_v: 128, ..base }),
        ("head 24", AttentionParams { head_dim_k: 24, head_dim_v: 24, ..base }),
        ("head 256", AttentionParams { head_dim_k: 256, head_dim_v: 256, ..base }),
    ];
    for (name, p) in variants {
        for kv in [FormatId::F32, FormatId::F16, FormatId::BF16, FormatId::Q8_0, FormatId::Q4_0] {
            if quant::row::row_bytes(kv, p.head_dim_k).is_err() {
                continue;
            }
            for (n, with_sinks) in [(1, false), (2, true), (9, true), (150, false)] {
                // f16 queries and weights on tensor cores, unless the cache has more than f16 holds.
                let gpu_bound = if matches!(kv, FormatId::F32 | FormatId::BF16) { 1e-8 } else { 4e-6 };
                check_with(1e-10, gpu_bound, || {
                    let mut c = Case::new(format!("attention {name} {kv} sinks {with_sinks}"), n);
                    let layer = KvLayer {
                        n_head_kv: p.n_head_kv,
                        head_dim_k: p.head_dim_k,
                        head_dim_v: p.head_dim_v,
                    };
                    c.kv = Some(KvLayout {
                        n_pages: n.div_ceil(PAGE) + 2,
                        type_k: kv,
                        type_v: kv,
                        layers: vec![layer],
                    });
                    let q = c.x(p.n_head * p.head_dim_k);
                    let k = c.x(p.n_head_kv * p.head_dim_k);
                    let v = c.x(p.n_head_kv * p.head_dim_v);
                    let sinks = with_sinks.then(|| c.weight(FormatId::F32, &[p.n_head]));
                    c.g.kv_store(k, v, 0);
                    let y = c.g.attention(q, sinks, p);
                    (c, y)
                });
            }
        }
    }
}
