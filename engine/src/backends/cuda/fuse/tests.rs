use super::*;
use crate::backends::cuda::ahead::entries_of;
use crate::backends::cuda::emit::{MostTokens, SizeClass};
use crate::backends::cuda::translate::{Anywhere, translate};
use crate::graph::{Graph, GraphBuilder, Output};
use crate::kv_cache::{KvLayer, KvLayout};
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
    let w = |b: &mut GraphBuilder, rows: usize, cols: usize| b.weight(0, FormatId::Q4_0, &[rows, cols], 0);
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
    let (mut program, _) = translate(&decode_step(n, n_layers), &Anywhere, &DeviceInfo::default()).unwrap();
    RuleSet::ALL.apply(&mut program);
    program.actions.iter().map(Action::name).collect()
}

/// Kernels that a step launches on an H100, of [`step`]'s layers over a cache of so many spans.
fn launched(graph: &Graph, cache: FormatId, class: SizeClass) -> Vec<&'static str> {
    let device = DeviceInfo {
        sm: 90,
        n_sm: 132,
        driver_version: 12_040,
        smem_per_cta_bytes: 227 << 10,
        smem_per_sm_bytes: 228 << 10,
        ..DeviceInfo::default()
    };
    let layer = KvLayer { n_head_kv: 2, head_dim_k: 64, head_dim_v: 64 };
    let kv = KvLayout { n_pages: 1, type_k: cache, type_v: cache, layers: alloc::vec![layer; 2] };
    entries_of(graph, RuleSet::ALL, class, &device, &kv).unwrap()
}

/// [`launched`] by a step of one token, with one or two layers.
fn launched_step(n_layers: usize, cache: FormatId, rotated: bool, max_spans: usize) -> Vec<&'static str> {
    let class = SizeClass { max_spans, most_tokens: MostTokens::One };
    launched(&step(1, n_layers, rotated), cache, class)
}

/// The kernel for prompts does not rotate its results: a launch after it does.
#[test]
fn results_of_a_prompt_over_a_rotated_cache_are_rotated_apart() {
    let class = SizeClass { max_spans: 1, most_tokens: MostTokens::Tile };
    for rotated in [false, true] {
        let graph = Graph { prompt: true, ..step(20, 1, rotated) };
        let entries = launched(&graph, FormatId::Q4_0, class);
        let at =
            entries.iter().position(|entry| *entry == "flash_hopper_64_wide").expect("a prompt's kernel");
        assert_eq!(entries[at + 1] == "hadamard_f32", rotated, "{entries:?}");
    }
}

/// Each launch of a decode step costs a microsecond or more that no other hides.
#[test]
fn a_layer_of_a_decode_step_is_five_launches() {
    let layer = |cache, rotated, max_spans| {
        let launched = |n_layers| launched_step(n_layers, cache, rotated, max_spans);
        launched(2).len() - launched(1).len()
    };
    // Embedding, angles; product of the logits. The first norm is within a product, the others between two.
    assert_eq!(launched_step(1, FormatId::F16, false, 1).len(), 5 + 3);
    assert_eq!(layer(FormatId::F16, false, 1), 5);
    // Where the spans are shared by several CTAs, a merge.
    assert_eq!(layer(FormatId::F16, false, 4), 6);
    // Attention appends to caches of F16 only. Rotation of keys, values and results costs no launch.
    for rotated in [false, true] {
        assert_eq!(layer(FormatId::Q4_0, rotated, 1), 6, "rotated: {rotated}");
        assert_eq!(layer(FormatId::Q4_0, rotated, 4), 7, "rotated: {rotated}");
    }
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

/// A cache of rotated keys and values costs no action, in batches too: the store and attention rotate on the way.
#[test]
fn a_layer_over_a_rotated_cache_has_no_action_more() {
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
