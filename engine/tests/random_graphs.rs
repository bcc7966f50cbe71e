//! Generated graphs on every backend and, cut every which way, on several: layers, single weights and prompts' products
//! on any device change no bit where the devices are alike, and stay within the rounding of the devices where not.

#[path = "common/case.rs"]
mod case;
mod common;

use std::sync::Arc;

use case::{Case, nmse, run};
use engine::backend::Backend;
use engine::backends::cpu::{Cpu, Isa};
use engine::backends::cuda::{Cuda, Device, Streaming};
use engine::backends::reference::Reference;
use engine::backends::split::{Offload, Placement, Split};
use engine::executor::Serial;
use engine::graph::Graph;
use engine::kv_cache::{KvLayer, KvLayout, PAGE};
use engine::op::{AttentionParams, Glu, MoeRouteParams, RopeMode, RopeParams, Unary};
use engine::sampler::Rng;
use engine::tensor::{Input, TensorId};
use engine::weights::Weights;
use quant::FormatId;

/// Layers, and heads of their caches.
const N_LAYER: usize = 3;
const N_HEAD: usize = 2;
const HEAD_DIM: usize = 32;
const COLS: usize = N_HEAD * HEAD_DIM;

/// Formats of matrices: each kind of right-hand side that a product has.
const FORMATS: [FormatId; 4] = [FormatId::F32, FormatId::F16, FormatId::Q8_0, FormatId::Q4_0];

/// A number below `n`.
fn below(rng: &mut Rng, n: usize) -> usize {
    (rng.next_u64() >> 32) as usize % n
}

/// What a graph is run with.
struct Generated {
    graph: Graph,
    weights: Arc<Weights>,
    n: usize,
    kv: Option<KvLayout>,
}

/// A graph of random parts: some outside the layers, some in each.
fn generate(seed: u64, formats: &[FormatId]) -> Generated {
    let mut rng = Rng::new(seed);
    let n = [1, 2, 5, 9][below(&mut rng, 4)];
    let mut c = Case::new(format!("graph {seed}"), n);
    c.kv = Some(KvLayout {
        n_pages: n.div_ceil(PAGE) + 2,
        type_k: FormatId::F16,
        type_v: FormatId::F16,
        layers: vec![KvLayer { n_head_kv: N_HEAD, head_dim_k: HEAD_DIM, head_dim_v: HEAD_DIM }; N_LAYER],
    });
    let positions = c.g.input(Input::Positions, n);
    let params = RopeParams {
        n_dims: HEAD_DIM,
        freq_base: 10000.0,
        freq_scale: 1.0,
        ext_factor: 0.0,
        attn_factor: 1.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        n_ctx_orig: 64,
    };
    let table = c.g.rope_table(positions, None, params);
    let mut pool = vec![c.x(COLS), c.x(COLS)];
    for il in 0..N_LAYER {
        for _ in 0..2 + below(&mut rng, 3) {
            let made = part(&mut c, &mut rng, il, formats, table, &pool);
            pool.extend(made);
        }
    }
    let x = pick(&mut rng, &pool);
    let last = pool[pool.len() - 1];
    let x = c.g.add(x, last);
    let norm = c.named("output_norm".to_owned(), FormatId::F32, &[COLS]);
    let x = c.g.rms_norm(x, Some(norm), 1e-5);
    let head = c.named("output".to_owned(), formats[below(&mut rng, formats.len())], &[40, COLS]);
    let out = c.g.matmul(x, head, None);
    let (graph, weights, _, n, kv) = c.finish(out);
    Generated { graph, weights, n, kv }
}

/// One of the tensors made so far, late ones more often.
fn pick(rng: &mut Rng, pool: &[TensorId]) -> TensorId {
    let back = below(rng, pool.len()).min(below(rng, pool.len()));
    pool[pool.len() - 1 - back]
}

/// A part of a layer on tensors [n, COLS]; it gives such tensors, of values that f16 holds.
fn part(
    c: &mut Case,
    rng: &mut Rng,
    il: usize,
    formats: &[FormatId],
    table: TensorId,
    pool: &[TensorId],
) -> Vec<TensorId> {
    let n = c.n;
    let count = c.weights.len();
    let name = |i: usize| format!("blk.{il}.{}", count + i);
    let mut format = || formats[below(rng, formats.len())];
    let of = [format(), format(), format()];
    let (a, b) = (pick(rng, pool), pick(rng, pool));
    match below(rng, 6) {
        0 => {
            let w = c.named(name(0), FormatId::F32, &[COLS]);
            vec![c.g.rms_norm(a, Some(w), 1e-5)]
        }
        1 => {
            let sum = c.g.add(a, b);
            vec![c.g.softcap(sum, 4.0)]
        }
        // A gated part: two matrices that share their input, which may be on two devices.
        2 => {
            let (gate, up) = (c.named(name(0), of[0], &[96, COLS]), c.named(name(1), of[1], &[96, COLS]));
            let bias = c.named(name(2), FormatId::F32, &[96]);
            let parts = c.g.matmul_many(a, &[(gate, None), (up, Some(bias))]);
            let h = c.g.glu(Glu::Plain(Unary::Silu), parts[0], parts[1]);
            let down = c.named(name(3), of[2], &[COLS, 96]);
            let h = c.g.matmul(h, down, None);
            vec![c.g.softcap(h, 4.0)]
        }
        // Attention: three matrices, the cache.
        3 => {
            let w = [0, 1, 2].map(|i| (c.named(name(i), of[i], &[COLS, COLS]), None));
            let qkv = c.g.matmul_many(a, &w);
            let [q, k] = [qkv[0], qkv[1]].map(|x| {
                let x = c.g.reshape(x, &[n, N_HEAD, HEAD_DIM]);
                let x = c.g.rope(x, table, RopeMode::Neox);
                c.g.reshape(x, &[n, COLS])
            });
            c.g.kv_store(k, qkv[2], il);
            let params = AttentionParams {
                il,
                n_head: N_HEAD,
                n_head_kv: N_HEAD,
                head_dim_k: HEAD_DIM,
                head_dim_v: HEAD_DIM,
                scale: 0.05,
                softcap: 0.0,
                window: 0,
                causal: true,
            };
            let h = c.g.attention(q, None, params);
            vec![c.g.softcap(h, 4.0)]
        }
        // A mixture that uses all experts, so that no rounding chooses others: ids and weights may cross.
        4 => {
            let router = c.named(name(0), FormatId::F32, &[4, COLS]);
            let logits = c.g.matmul(a, router, None);
            let route = MoeRouteParams { n_used: 4, softmax_after: false, normalise: true, scale: 1.0 };
            let (ids, weights) = c.g.moe_route(logits, route);
            let (up, down) =
                (c.named(name(1), of[0], &[4, 32, COLS]), c.named(name(2), of[1], &[4, COLS, 32]));
            let x = c.g.reshape(b, &[n, 1, COLS]);
            let h = c.g.matmul_id(x, up, None, ids);
            let h = c.g.unary(Unary::Tanh, h);
            let h = c.g.matmul_id(h, down, None, ids);
            let h = c.g.moe_combine(h, weights);
            vec![c.g.softcap(h, 4.0)]
        }
        _ => {
            let (w, gate) = (c.named(name(0), FormatId::F32, &[COLS]), c.named(name(1), of[0], &[1, COLS]));
            let h = c.g.mul(a, w);
            let h = c.g.unary(Unary::Tanh, h);
            let gate = c.g.matmul(b, gate, None);
            vec![c.g.row_gate(h, gate), h]
        }
    }
}

/// Layers and a third of the weights anywhere on so many devices, prompts' products taken from one to another.
fn placement(rng: &mut Rng, weights: &Weights, devices: usize, offload: Option<Offload>) -> Placement {
    let mut device = || below(rng, devices);
    Placement {
        input: device(),
        layers: (0..N_LAYER).map(|_| device()).collect(),
        output: device(),
        tensors: (0..weights.iter().count() as u32)
            .filter_map(|w| Some((w, device())).filter(|_| device() == 0))
            .collect(),
        offload,
    }
}

/// Runs a graph in parts.
fn run_split(
    g: &Generated,
    backends: Vec<Box<dyn Backend>>,
    placement: &Placement,
    prompt: bool,
) -> Vec<f32> {
    let mut split = Split::new(backends, placement.clone(), g.weights.clone());
    assert_eq!(split.runs_prompts_apart(), placement.offload.is_some());
    run(&mut split, Graph { prompt, ..g.graph.clone() }, g.n, &g.kv)
}

fn cpu(g: &Generated) -> Box<dyn Backend> {
    Box::new(Cpu::new(g.weights.clone(), Arc::new(Serial), Isa::detect()))
}

fn cuda(g: &Generated, device: &Device) -> Cuda {
    Cuda::new(device.clone(), Arc::new(Serial), g.weights.clone())
}

#[test]
fn devices_of_one_kind_give_the_same_bits_cut_anywhere() {
    for seed in 0..60 {
        let g = generate(seed, &FORMATS);
        let mut rng = Rng::new(1000 + seed);
        let reference = run(&mut Reference::new(g.weights.clone()), g.graph.clone(), g.n, &g.kv);
        let alone = run(&mut *cpu(&g), g.graph.clone(), g.n, &g.kv);
        assert!(reference.iter().chain(&alone).all(|v| v.is_finite()), "seed {seed}");
        for offload in [None, Some(Offload { from: 0, to: 1 }), Some(Offload { from: 1, to: 2 })] {
            let placement = placement(&mut rng, &g.weights, 3, offload);
            for prompt in [false, true] {
                let got = run_split(&g, vec![cpu(&g), cpu(&g), cpu(&g)], &placement, prompt);
                assert!(got == alone, "seed {seed}, {placement:?}, prompt {prompt}: other bits");
                let one = || -> Box<dyn Backend> { Box::new(Reference::new(g.weights.clone())) };
                let got = run_split(&g, vec![one(), one(), one()], &placement, prompt);
                assert!(got == reference, "seed {seed}, {placement:?}, prompt {prompt}: not the reference's");
            }
        }
    }
}

/// What a part of the weights is quantised to, and what activations are, is not at issue here: with floats the bound is
/// that of f16 products and f16 caches.
#[test]
fn cpu_and_gpu_share_any_graph() {
    let device = common::gpu_or_emulator();
    for seed in 0..12 {
        let g = generate(seed, &FORMATS[..2]);
        let mut rng = Rng::new(2000 + seed);
        let want = run(&mut Reference::new(g.weights.clone()), g.graph.clone(), g.n, &g.kv);
        let check = |got: &[f32], what: &str| {
            let err = nmse(got, &want);
            assert!(err <= 1e-5, "seed {seed}, {what}: nmse {err:.1e}");
        };
        check(&run(&mut *cpu(&g), g.graph.clone(), g.n, &g.kv), "cpu");
        check(&run(&mut cuda(&g, &device), g.graph.clone(), g.n, &g.kv), "gpu");
        for offload in [None, Some(Offload { from: 0, to: 1 })] {
            let placement = placement(&mut rng, &g.weights, 2, offload);
            let graph = Graph { prompt: true, ..g.graph.clone() };
            let brought = placement.brought(&graph, &g.weights);
            let gpu = Streaming::new(cuda(&g, &device), &brought, 0).unwrap();
            assert_eq!(gpu.pinned_bytes(), 0);
            assert_eq!(gpu.area_bytes() > 0, !brought.is_empty());
            let prompt = offload.is_some();
            let got = run_split(&g, vec![cpu(&g), Box::new(gpu)], &placement, prompt);
            check(&got, &format!("{placement:?}"));
        }
    }
}

/// Weights that come and go give the bits of weights that stay.
#[test]
fn weights_that_are_brought_give_the_same_bits() {
    let device = common::gpu_or_emulator();
    for seed in 20..32 {
        let g = generate(seed, &FORMATS);
        let mut rng = Rng::new(3000 + seed);
        let graph = Graph { prompt: true, ..g.graph.clone() };
        let alone = run(&mut cuda(&g, &device), g.graph.clone(), g.n, &g.kv);
        let placement = placement(&mut rng, &g.weights, 2, Some(Offload { from: 0, to: 1 }));
        let brought = placement.brought(&graph, &g.weights);
        // No pinned copy, one of each layer, and those of some layers.
        let mut all = 0;
        for share in [0.0, 1.0, 0.6] {
            let pinned = if share == 1.0 { u64::MAX } else { (all as f64 * share) as u64 };
            let gpu = Streaming::new(cuda(&g, &device), &brought, pinned).unwrap();
            assert!(gpu.pinned_bytes() as u64 <= pinned);
            all = all.max(gpu.pinned_bytes());
            let got = run_split(&g, vec![Box::new(cuda(&g, &device)), Box::new(gpu)], &placement, true);
            assert!(got == alone, "seed {seed}, {placement:?}, {pinned} bytes pinned: other bits");
        }
    }
}
