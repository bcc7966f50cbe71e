//! The CPU kernels against plain f64 loops and quant's definition; every instruction set, thread count and batch cut
//! must give the same bits. Outputs start as NaN.

use engine::backend::StepSequence;
use engine::backends::cpu::simd::*;
use engine::executor::{Executor, Serial};
use engine::kv_cache::PAGE;
use engine::op::{AttentionParams, Glu, RopeMode, RopeParams, Unary};
use engine::pool::{Pool, RayonExecutor};
use proptest::prelude::*;
use quant::{ActGroup, BlockFormat, FloatFormat, FormatId, Visitor, with_format};

/// Values in about -1..1 with a few outliers, of a fixed sequence.
fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let v = (state >> 40) as f32 / (1 << 23) as f32 - 1.0;
            if (state >> 20).is_multiple_of(61) { v * 20.0 } else { v }
        })
        .collect()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|v| v.to_bits()).collect()
}

#[track_caller]
fn same_bits(got: &[f32], expected: &[f32], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}: length");
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        assert!(g.to_bits() == e.to_bits(), "{what}: element {i} is {g:e}, expected {e:e}");
    }
}

#[track_caller]
fn close(got: &[f32], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}: length");
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        let error = (*g as f64 - e).abs();
        assert!(error <= tolerance * e.abs().max(1.0), "{what}: element {i} is {g}, expected {e}");
    }
}

/// Random bytes as blocks, with every float field a modest number: decoded values are finite.
fn block_bytes(format: FormatId, rows: usize, cols: usize, seed: u64) -> Vec<u8> {
    let info = quant::info(format);
    let mut bytes = vec![0u8; rows * cols / info.elems * info.bytes];
    // Draw blocks until one decodes to finite, not huge values: f16 fields may hold anything.
    let mut state = seed | 1;
    let mut values = vec![0.0; info.elems];
    for block in bytes.chunks_exact_mut(info.bytes) {
        loop {
            for b in block.iter_mut() {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                *b = (state >> 35) as u8;
            }
            quant::row::decode(format, block, &mut values).unwrap();
            if values.iter().all(|v| v.abs() < 1e4) {
                break;
            }
        }
    }
    bytes
}

/// The definition: quant's `dot_group` in order of k for blocks; 16 partial sums and the tree for floats.
fn reference(format: FormatId, bytes: &[u8], rows: usize, cols: usize, x: &[f32], m: usize) -> Vec<f32> {
    struct Rows<'a>(&'a [u8], usize, usize, &'a [f32], usize);
    impl Visitor for Rows<'_> {
        type Output = Vec<f32>;
        fn block<F: BlockFormat>(self) -> Vec<f32> {
            let Rows(bytes, rows, cols, x, m) = self;
            let blocks: Vec<F> =
                bytes.chunks_exact(size_of::<F>()).map(bytemuck::pod_read_unaligned).collect();
            let mut out = Vec::with_capacity(m * rows);
            for x in x.chunks_exact(cols).take(m) {
                let mut act = vec![ActGroup::ZERO; cols / 32];
                ActGroup::quantise(F::ACT, x, &mut act);
                for row in blocks.chunks_exact(cols / F::ELEMS).take(rows) {
                    let dot = |acc, g: usize| row[g / F::GROUPS].dot_group(g % F::GROUPS, &act[g], acc);
                    out.push((0..cols / 32).fold(0.0, dot));
                }
            }
            out
        }
        fn float<F: FloatFormat>(self) -> Vec<f32> {
            let Rows(bytes, rows, cols, x, m) = self;
            let w: Vec<f32> = bytes
                .chunks_exact(size_of::<F>())
                .map(|b| bytemuck::pod_read_unaligned::<F>(b).to_f32())
                .collect();
            // Weights of halves take activations of halves.
            let x: Vec<f32> = x.iter().map(|x| F::from_f32(*x).to_f32()).collect();
            let mut out = Vec::with_capacity(m * rows);
            for x in x.chunks_exact(cols).take(m) {
                for row in w.chunks_exact(cols).take(rows) {
                    let mut sums = [0.0f32; 16];
                    for (k, (w, x)) in row.iter().zip(x).enumerate() {
                        sums[k % 16] = w.mul_add(*x, sums[k % 16]);
                    }
                    // A padded zero turns -0 into +0, as in the kernels.
                    for k in cols..cols.next_multiple_of(16) {
                        sums[k % 16] = 0.0f32.mul_add(0.0, sums[k % 16]);
                    }
                    for half in [8, 4, 2, 1] {
                        for i in 0..half {
                            sums[i] += sums[i + half];
                        }
                    }
                    out.push(sums[0]);
                }
            }
            out
        }
    }
    with_format(format, Rows(bytes, rows, cols, x, m)).unwrap()
}

/// Every format with weights that this build of quant knows.
fn formats() -> Vec<FormatId> {
    struct Any;
    impl Visitor for Any {
        type Output = ();
        fn block<F: BlockFormat>(self) {}
        fn float<F: FloatFormat>(self) {}
    }
    quant::table::FORMATS.iter().map(|f| f.id).filter(|&id| with_format(id, Any).is_some()).collect()
}

fn weights(format: FormatId, rows: usize, cols: usize, seed: u64) -> Vec<u8> {
    match format {
        FormatId::F32 => noise(rows * cols, seed).iter().flat_map(|v| v.to_le_bytes()).collect(),
        FormatId::F16 | FormatId::BF16 => {
            let mut bytes = vec![0; rows * cols * 2];
            quant::row::encode(format, &noise(rows * cols, seed), None, &mut bytes).unwrap();
            bytes
        }
        _ => block_bytes(format, rows, cols, seed),
    }
}

fn product(
    isa: Isa,
    exec: &dyn Executor,
    format: FormatId,
    bytes: &[u8],
    rows: usize,
    cols: usize,
    x: &[f32],
    m: usize,
) -> Vec<f32> {
    let mut out = vec![f32::NAN; m * rows];
    let weight = WeightView { format, bytes, rows, cols };
    matmul(isa, exec, &[weight], &[None], x, m, Residual::None, &mut [&mut out], &mut Scratch::new())
        .unwrap();
    out
}

#[test]
fn matmul_is_quants_definition_on_every_isa() {
    let pool = Pool::new(3).unwrap();
    for format in formats() {
        let unit = quant::info(format).elems;
        // Floats: k with a tail. Blocks: more than one chunk of k once, and panels with missing rows.
        let shapes: &[(usize, usize)] = if unit == 1 {
            &[(1, 1), (7, 40), (21, 100), (16, 64)]
        } else if unit == 256 {
            &[(19, 256), (33, 1792)]
        } else {
            &[(3, unit), (17, 6 * unit), (50, 1600_usize.next_multiple_of(unit))]
        };
        for &(rows, cols) in shapes {
            // An odd address: weights may lie anywhere.
            let mut bytes = vec![0u8; 1];
            bytes.extend(weights(format, rows, cols, 11));
            let bytes = &bytes[1..];
            for m in [1, 2, 3, 7, 9, 16] {
                let x = noise(m * cols, 5);
                let expected = reference(format, bytes, rows, cols, &x, m);
                for isa in Isa::available() {
                    let what = format!("{format} {rows}x{cols} m {m} {}", isa.name());
                    same_bits(&product(isa, &Serial, format, bytes, rows, cols, &x, m), &expected, &what);
                    same_bits(&product(isa, &pool, format, bytes, rows, cols, &x, m), &expected, &what);
                }
            }
        }
    }
}

#[test]
fn matmul_values_are_near_f64() {
    // Against exact weights and activations: the error is that of 8-bit activations, which outliers here make coarse.
    for format in formats() {
        let (rows, cols, m) = (18, 512, 3);
        let bytes = weights(format, rows, cols, 3);
        let x = noise(m * cols, 4);
        let got = product(Isa::detect(), &Serial, format, &bytes, rows, cols, &x, m);
        let mut w = vec![0.0; rows * cols];
        quant::row::decode(format, &bytes, &mut w).unwrap();
        let (mut error, mut power) = (0.0, 0.0);
        for t in 0..m {
            for r in 0..rows {
                let exact: f64 = (0..cols).map(|k| w[r * cols + k] as f64 * x[t * cols + k] as f64).sum();
                error += (exact - got[t * rows + r] as f64).powi(2);
                power += exact.powi(2);
            }
        }
        // What rounding the activations costs; sums of one-bit weights cancel most.
        let bound = match format {
            FormatId::F32 => 1e-12,
            FormatId::F16 => 1e-6,
            FormatId::BF16 => 1e-4,
            FormatId::IQ1_S | FormatId::IQ1_M => 5e-3,
            // Quantised per 256.
            _ => 2e-3,
        };
        assert!(error <= bound * power, "{format}: normalised error {}", error / power);
    }
}

#[test]
fn matmul_bias_residual_and_many_weights() {
    let (m, k) = (9, 256);
    let x = noise(m * k, 1);
    let parts = [(FormatId::Q4_0, 20), (FormatId::Q8_0, 3), (FormatId::F16, 33), (FormatId::Q4_K, 16)];
    let data: Vec<Vec<u8>> = parts.iter().map(|&(f, rows)| weights(f, rows, k, rows as u64)).collect();
    let bias = noise(33, 8);
    let views: Vec<WeightView> = parts
        .iter()
        .zip(&data)
        .map(|(&(format, rows), bytes)| WeightView { format, bytes, rows, cols: k })
        .collect();
    for isa in Isa::available() {
        for threads in [1, 2, 3] {
            let pool = Pool::new(threads).unwrap();
            let mut outs: Vec<Vec<f32>> = parts.iter().map(|&(_, rows)| vec![f32::NAN; m * rows]).collect();
            let mut targets: Vec<&mut [f32]> = outs.iter_mut().map(|o| &mut o[..]).collect();
            let biases = [None, None, Some(&bias[..]), None];
            let mut scratch = Scratch::new();
            matmul(isa, &pool, &views, &biases, &x, m, Residual::None, &mut targets, &mut scratch).unwrap();
            for (i, &(format, rows)) in parts.iter().enumerate() {
                let mut expected = reference(format, &data[i], rows, k, &x, m);
                if i == 2 {
                    expected.iter_mut().enumerate().for_each(|(at, v)| *v += bias[at % rows]);
                }
                same_bits(&outs[i], &expected, &format!("{format} of many, {}", isa.name()));
            }

            let residual = noise(m * 33, 6);
            let mut in_place = residual.clone();
            let mut other = vec![f32::NAN; m * 33];
            let (w, b) = (&views[2..3], &biases[2..3]);
            matmul(isa, &pool, w, b, &x, m, Residual::InPlace, &mut [&mut in_place], &mut scratch).unwrap();
            let r = Residual::Other(&residual);
            matmul(isa, &pool, w, b, &x, m, r, &mut [&mut other], &mut scratch).unwrap();
            let expected: Vec<f32> = outs[2].iter().zip(&residual).map(|(a, b)| a + b).collect();
            same_bits(&in_place, &expected, "residual in place");
            same_bits(&other, &expected, "residual beside");
        }
    }
}

#[test]
fn matmul_does_not_depend_on_the_batch() {
    for format in [FormatId::Q4_0, FormatId::Q8_0, FormatId::Q4_K, FormatId::F32, FormatId::F16] {
        let (rows, k, m) = (35, 512, 150);
        let bytes = weights(format, rows, k, 2);
        let x = noise(m * k, 9);
        for isa in Isa::available() {
            let whole = product(isa, &Pool::new(2).unwrap(), format, &bytes, rows, k, &x, m);
            for cut in [1, 5, 64] {
                for first in (0..m).step_by(cut) {
                    let n = cut.min(m - first);
                    let part = product(isa, &Serial, format, &bytes, rows, k, &x[first * k..][..n * k], n);
                    same_bits(&part, &whole[first * rows..][..n * rows], &format!("{format} cut {cut}"));
                }
            }
        }
    }
}

#[test]
fn odd_activations() {
    // Zeros, infinities, NaN, subnormals and ties: the quantiser must be quant's.
    let mut x = noise(32 * 9, 1);
    x[..32].fill(0.0);
    x[33] = f32::INFINITY;
    x[64] = f32::NAN;
    x[96..128].fill(1e-40);
    x[97] = -1.4e-45;
    for (i, v) in x[128..160].iter_mut().enumerate() {
        *v = i as f32 - 15.5;
    }
    x[128] = 127.0;
    x[160..192].fill(-3e38);
    x[192..224].fill(2e-44);
    x[193] = 0.0;
    let bytes = weights(FormatId::Q8_0, 5, 32, 1);
    let expected = reference(FormatId::Q8_0, &bytes, 5, 32, &x, 9);
    for isa in Isa::available() {
        let got = product(isa, &Serial, FormatId::Q8_0, &bytes, 5, 32, &x, 9);
        for (g, e) in got.iter().zip(&expected) {
            assert!(g.to_bits() == e.to_bits() || g.is_nan() && e.is_nan(), "{}: {g} for {e}", isa.name());
        }
    }
}

#[test]
fn matmul_id_is_matmul_of_each_expert() {
    let (n_expert, rows, k, n, n_used) = (5, 20, 256, 13, 2);
    for format in [FormatId::Q4_0, FormatId::Q4_K, FormatId::F16] {
        let bytes = weights(format, n_expert * rows, k, 7);
        let stride = bytes.len() / n_expert;
        let bias = noise(n_expert * rows, 2);
        // Expert 3 stays without work.
        let ids: Vec<i32> = (0..n * n_used).map(|i| [0, 4, 1, 2, 4][i * 7 % 5]).collect();
        for per_used in [false, true] {
            let x = noise(n * k * if per_used { n_used } else { 1 }, 3);
            let mut expected = vec![];
            for (pair, &id) in ids.iter().enumerate() {
                let row = if per_used { pair } else { pair / n_used };
                let expert = &bytes[id as usize * stride..][..stride];
                let sums = reference(format, expert, rows, k, &x[row * k..][..k], 1);
                expected.extend(sums.iter().zip(&bias[id as usize * rows..]).map(|(s, b)| s + b));
            }
            let weight = ExpertView { format, bytes: &bytes, n_expert, rows, cols: k };
            for isa in Isa::available() {
                for threads in [1, 3] {
                    let pool = Pool::new(threads).unwrap();
                    let mut out = vec![f32::NAN; n * n_used * rows];
                    let mut scratch = Scratch::new();
                    matmul_id(
                        isa,
                        &pool,
                        weight,
                        Some(&bias),
                        &x,
                        per_used,
                        &ids,
                        n,
                        n_used,
                        &mut out,
                        &mut scratch,
                    )
                    .unwrap();
                    same_bits(&out, &expected, &format!("{format} experts, {}", isa.name()));
                }
            }
        }
        let weight = ExpertView { format, bytes: &bytes, n_expert, rows, cols: k };
        let x = noise(k, 1);
        let refused = matmul_id(
            Isa::detect(),
            &Serial,
            weight,
            None,
            &x,
            false,
            &[5],
            1,
            1,
            &mut vec![0.0; rows],
            &mut Scratch::new(),
        );
        assert!(matches!(refused, Err(KernelError::Index { got: 5, bound: 5, .. })));
    }
}

#[test]
fn norms() {
    for cols in [1, 15, 16, 17, 576] {
        let rows = 70;
        let (x, w, b) = (noise(rows * cols, 1), noise(cols, 2), noise(cols, 3));
        let mut expected = (vec![], vec![]);
        for row in x.chunks(cols) {
            let mean = |f: &dyn Fn(f64) -> f64| row.iter().map(|&v| f(v as f64)).sum::<f64>() / cols as f64;
            let rms = (mean(&|v| v * v) + 1e-5).sqrt();
            let mu = mean(&|v| v);
            let sd = (mean(&|v| (v - mu).powi(2)) + 1e-5).sqrt();
            for (i, &v) in row.iter().enumerate() {
                expected.0.push(v as f64 / rms * w[i] as f64);
                expected.1.push((v as f64 - mu) / sd * w[i] as f64 + b[i] as f64);
            }
        }
        let mut first: Option<(Vec<f32>, Vec<f32>)> = None;
        for isa in Isa::available() {
            let pool = Pool::new(2).unwrap();
            let mut rms = vec![f32::NAN; x.len()];
            rms_norm(isa, &pool, Some(&x), cols, Some(&w), 1e-5, &mut rms).unwrap();
            let mut layer = x.clone();
            layer_norm(isa, &pool, None, cols, Some(&w), Some(&b), 1e-5, &mut layer).unwrap();
            close(&rms, &expected.0, 1e-5, "rms_norm");
            close(&layer, &expected.1, 2e-4, "layer_norm");
            let first = first.get_or_insert_with(|| (rms.clone(), layer.clone()));
            same_bits(&rms, &first.0, "rms_norm");
            same_bits(&layer, &first.1, "layer_norm");
        }
    }
}

fn erf(x: f64) -> f64 {
    libm::erf(x)
}

fn unary_f64(kind: Unary, x: f64) -> f64 {
    match kind {
        Unary::Silu => x / (1.0 + (-x).exp()),
        Unary::Gelu => {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
        }
        Unary::GeluErf => 0.5 * x * (1.0 + erf(x / 2f64.sqrt())),
        Unary::Relu => x.max(0.0),
        Unary::ReluSqr => x.max(0.0).powi(2),
        Unary::Tanh => x.tanh(),
        Unary::Sigmoid => 1.0 / (1.0 + (-x).exp()),
    }
}

#[test]
fn elementwise() {
    let n = 40_007;
    let (a, b) = (noise(n, 1), noise(n, 2));
    let pool = Pool::new(2).unwrap();
    let f64s = |f: &dyn Fn(f64, f64) -> f64| -> Vec<f64> {
        a.iter().zip(&b).map(|(&a, &b)| f(a as f64, b as f64)).collect()
    };
    let mut seen: Vec<Vec<Vec<u32>>> = vec![];
    for isa in Isa::available() {
        let mut all = vec![];
        let mut check = |out: Vec<f32>, expected: Vec<f64>, what: &str| {
            close(&out, &expected, 1e-6, what);
            all.push(bits(&out));
        };
        let mut out = vec![f32::NAN; n];
        add(isa, &pool, Some(&a), &b, &mut out).unwrap();
        check(out, f64s(&|a, b| a + b), "add");
        let mut out = a.clone();
        mul(isa, &pool, None, &b, &mut out).unwrap();
        check(out, f64s(&|a, b| a * b), "mul");
        let mut out = a.clone();
        scale(isa, &pool, None, 0.3, &mut out).unwrap();
        check(out, f64s(&|a, _| a * 0.3f32 as f64), "scale");
        let mut out = vec![f32::NAN; n];
        softcap(isa, &pool, Some(&a), 2.5, &mut out).unwrap();
        check(out, f64s(&|a, _| 2.5 * (a / 2.5).tanh()), "softcap");
        for kind in [
            Unary::Silu,
            Unary::Gelu,
            Unary::GeluErf,
            Unary::Relu,
            Unary::ReluSqr,
            Unary::Tanh,
            Unary::Sigmoid,
        ] {
            let mut out = vec![f32::NAN; n];
            unary(isa, &pool, kind, Some(&a), &mut out).unwrap();
            check(out, f64s(&|a, _| unary_f64(kind, a)), &format!("{kind:?}"));
            let mut out = a.clone();
            glu(isa, &pool, Glu::Plain(kind), None, &b, &mut out).unwrap();
            check(out, f64s(&|a, b| unary_f64(kind, a) * b), &format!("glu {kind:?}"));
        }
        let mut out = vec![f32::NAN; n];
        glu(isa, &pool, Glu::SwigluOai { alpha: 1.702, limit: 7.0 }, Some(&a), &b, &mut out).unwrap();
        let oai = |g: f64, u: f64| {
            let (g, u) = (g.min(7.0), u.clamp(-7.0, 7.0));
            g / (1.0 + (-1.702f32 as f64 * g).exp()) * (u + 1.0)
        };
        check(out, f64s(&oai), "swiglu_oai");
        seen.push(all);
    }
    assert!(seen.iter().all(|all| *all == seen[0]), "instruction sets differ");

    let mut out = a[..40_000].to_vec();
    add(Isa::detect(), &pool, None, &b[..100], &mut out).unwrap();
    for (i, v) in out.iter().enumerate() {
        assert_eq!(*v, a[i] + b[i % 100]);
    }
    assert!(add(Isa::detect(), &pool, None, &b[..7], &mut [0.0; 10]).is_err());
}

#[test]
fn rope_rotates() {
    let (n, heads, head_dim) = (5, 3, 80);
    for (mode, n_dims) in
        [(RopeMode::Norm, 80), (RopeMode::Neox, 80), (RopeMode::Neox, 20), (RopeMode::Norm, 6)]
    {
        let params = RopeParams {
            n_dims,
            freq_base: 10000.0,
            freq_scale: 0.5,
            ext_factor: 0.0,
            attn_factor: 1.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            n_ctx_orig: 2048,
        };
        let positions = [0, 1, 7, 500, 100_000];
        let mut table = vec![f32::NAN; n * n_dims];
        rope_table(&positions, None, &params, &mut table).unwrap();
        let x = noise(n * heads * head_dim, 4);
        let mut expected: Vec<f64> = x.iter().map(|&v| v as f64).collect();
        for (t, &position) in positions.iter().enumerate() {
            for h in 0..heads {
                for i in 0..n_dims / 2 {
                    let angle = position as f64 * 0.5 * 10000f64.powf(-2.0 * i as f64 / n_dims as f64);
                    let (a, b) = match mode {
                        RopeMode::Norm => (2 * i, 2 * i + 1),
                        RopeMode::Neox => (i, i + n_dims / 2),
                    };
                    let at = (t * heads + h) * head_dim;
                    let (x0, x1) = (x[at + a] as f64, x[at + b] as f64);
                    expected[at + a] = x0 * angle.cos() - x1 * angle.sin();
                    expected[at + b] = x0 * angle.sin() + x1 * angle.cos();
                }
            }
        }
        let mut first = None;
        for isa in Isa::available() {
            let mut out = x.clone();
            rope(isa, &Serial, &mut out, &table, n, heads, head_dim, n_dims, mode).unwrap();
            close(&out, &expected, 1e-5, "rope");
            same_bits(&out, first.get_or_insert_with(|| out.clone()), "rope");
        }
    }
}

#[test]
fn yarn_keeps_fast_and_stretches_slow_frequencies() {
    let params = RopeParams {
        n_dims: 64,
        freq_base: 10000.0,
        freq_scale: 0.25,
        ext_factor: 1.0,
        attn_factor: 1.1,
        beta_fast: 32.0,
        beta_slow: 1.0,
        n_ctx_orig: 4096,
    };
    let factors = vec![2.0; 32];
    let mut table = [f32::NAN; 64];
    rope_table(&[3], Some(&factors), &params, &mut table).unwrap();
    let magnitude = 1.1f32 as f64;
    let at = |i: usize, angle: f64| {
        let error = (table[2 * i] as f64 - angle.cos() * magnitude).abs();
        assert!(error < 1e-6, "pair {i}: {} for {}", table[2 * i], angle.cos() * magnitude);
    };
    at(0, 3.0 / 2.0);
    at(31, 3.0 / 2.0 * 0.25 * 10000f64.powf(-62.0 / 64.0));
    // The ramp's ends by the paper's formula: dimensions that turn 32 times and once.
    let end =
        |turns: f64| 64.0 * (4096.0 / (turns * 2.0 * std::f64::consts::PI)).ln() / (2.0 * 10000f64.ln());
    let (low, high) = (end(32.0).floor(), end(1.0).ceil());
    let mix = 1.0 - (16.0 - low) / (high - low);
    let plain = 3.0 / 2.0 * 10000f64.powf(-32.0 / 64.0);
    at(16, plain * 0.25 * (1.0 - mix) + plain * mix);
}

#[test]
fn get_rows_decodes_and_refuses() {
    let table = weights(FormatId::Q4_K, 4, 512, 3);
    let mut all = vec![0.0; 4 * 512];
    quant::row::decode(FormatId::Q4_K, &table, &mut all).unwrap();
    let mut out = vec![f32::NAN; 2 * 512];
    get_rows(FormatId::Q4_K, &table, 512, &[3, 0], &mut out).unwrap();
    same_bits(&out[..512], &all[3 * 512..], "row 3");
    same_bits(&out[512..], &all[..512], "row 0");
    for id in [-1, 4] {
        let refused = get_rows(FormatId::Q4_K, &table, 512, &[id], &mut out[..512]);
        assert!(matches!(refused, Err(KernelError::Index { bound: 4, .. })));
    }
}

/// A cache of one layer with `n` positions of each sequence in scattered pages; the rest is NaN where the format has it.
struct Cache {
    format: FormatId,
    n_head_kv: usize,
    head_dim: usize,
    bytes: Vec<u8>,
    /// Decoded: [seq][position][head][dim]
    values: Vec<Vec<f32>>,
}

fn fill(
    format: FormatId,
    n_head_kv: usize,
    head_dim: usize,
    tables: &[(Vec<u32>, usize)],
    seed: u64,
) -> Cache {
    let row = quant::row::row_bytes(format, head_dim).unwrap();
    let n_pages = tables.iter().flat_map(|t| &t.0).max().unwrap() + 1;
    let mut bytes = vec![0xffu8; n_pages as usize * n_head_kv * PAGE * row];
    let mut values = vec![];
    for (s, (pages, len)) in tables.iter().enumerate() {
        let x = noise(len * n_head_kv * head_dim, seed + s as u64);
        let slots: Vec<u32> = (0..*len).map(|p| pages[p / PAGE] * PAGE as u32 + (p % PAGE) as u32).collect();
        let kv = KvViewMut { format, bytes: &mut bytes, n_head_kv, head_dim };
        kv_store(Isa::detect(), &Pool::new(2).unwrap(), kv, &x, &slots).unwrap();
        let mut decoded = vec![0.0; x.len()];
        for (x, out) in x.chunks(head_dim).zip(decoded.chunks_mut(head_dim)) {
            let mut encoded = vec![0; row];
            quant::row::encode(format, x, None, &mut encoded).unwrap();
            quant::row::decode(format, &encoded, out).unwrap();
        }
        values.push(decoded);
    }
    Cache { format, n_head_kv, head_dim, bytes, values }
}

impl Cache {
    fn view(&self) -> KvView<'_> {
        KvView { format: self.format, bytes: &self.bytes, n_head_kv: self.n_head_kv, head_dim: self.head_dim }
    }
}

fn attention_f64(
    p: &AttentionParams,
    q: &[f32],
    k: &Cache,
    v: &Cache,
    rows: &[QueryRow],
    lens: &[usize],
    sinks: Option<&[f32]>,
) -> Vec<f64> {
    let mut out = vec![0.0; rows.len() * p.n_head * p.head_dim_v];
    for (r, row) in rows.iter().enumerate() {
        let (keys, values) = (&k.values[row.seq as usize], &v.values[row.seq as usize]);
        for h in 0..p.n_head {
            let kv = h / (p.n_head / p.n_head_kv);
            let q = &q[(r * p.n_head + h) * p.head_dim_k..][..p.head_dim_k];
            let visible: Vec<usize> = (0..lens[row.seq as usize])
                .filter(|&t| !p.causal || t <= row.pos as usize)
                .filter(|&t| p.window == 0 || t + p.window as usize > row.pos as usize)
                .collect();
            let score = |t: usize| {
                let key = &keys[(t * p.n_head_kv + kv) * p.head_dim_k..][..p.head_dim_k];
                let s = q.iter().zip(key).map(|(a, b)| *a as f64 * *b as f64).sum::<f64>() * p.scale as f64;
                if p.softcap != 0.0 { p.softcap as f64 * (s / p.softcap as f64).tanh() } else { s }
            };
            let sink = sinks.map_or(f64::NEG_INFINITY, |s| s[h] as f64);
            let max = visible.iter().map(|&t| score(t)).fold(sink, f64::max);
            let total = visible.iter().map(|&t| (score(t) - max).exp()).sum::<f64>() + (sink - max).exp();
            for &t in &visible {
                let weight = (score(t) - max).exp() / total;
                let value = &values[(t * p.n_head_kv + kv) * p.head_dim_v..][..p.head_dim_v];
                for (d, v) in value.iter().enumerate() {
                    out[(r * p.n_head + h) * p.head_dim_v + d] += weight * *v as f64;
                }
            }
        }
    }
    out
}

#[test]
fn attention_is_softmax_and_does_not_depend_on_the_batch() {
    let base = AttentionParams {
        il: 0,
        n_head: 6,
        n_head_kv: 2,
        head_dim_k: 64,
        head_dim_v: 64,
        scale: 0.125,
        softcap: 0.0,
        window: 0,
        causal: true,
    };
    let cases = [
        (FormatId::F16, base, false),
        (FormatId::F32, AttentionParams { head_dim_k: 80, head_dim_v: 96, window: 70, ..base }, true),
        (FormatId::F32, AttentionParams { head_dim_k: 36, head_dim_v: 20, n_head: 2, ..base }, false),
        (FormatId::BF16, AttentionParams { head_dim_k: 128, head_dim_v: 128, softcap: 5.0, ..base }, false),
        (FormatId::Q8_0, AttentionParams { causal: false, ..base }, false),
        (FormatId::Q4_0, AttentionParams { n_head: 8, window: 20, ..base }, true),
        (FormatId::F16, AttentionParams { n_head: 14, head_dim_v: 256, ..base }, false),
    ];
    let tables = [(vec![5, 0, 7], 150), (vec![2], 31), (vec![1, 6], 65)];
    let lens = [150, 31, 65];
    let pages: Vec<u32> = tables.iter().flat_map(|(pages, _)| pages.clone()).collect();
    let first_pages = [0, 3, 4];
    let seqs: Vec<StepSequence> =
        (0..3).map(|i| StepSequence { first_page: first_pages[i], len: tables[i].1 as u32 }).collect();
    for (i, (format, p, with_sinks)) in cases.into_iter().enumerate() {
        let k = fill(format, p.n_head_kv, p.head_dim_k, &tables, 10);
        let v = fill(format, p.n_head_kv, p.head_dim_v, &tables, 20);
        let rows: Vec<QueryRow> = (100..150)
            .map(|pos| QueryRow { pos, seq: 0 })
            .chain([QueryRow { pos: 30, seq: 1 }])
            .chain((0..65).map(|pos| QueryRow { pos, seq: 2 }))
            .collect();
        let q = noise(rows.len() * p.n_head * p.head_dim_k, 3);
        let sinks = noise(p.n_head, 4);
        let sinks = with_sinks.then_some(&sinks[..]);
        let expected = attention_f64(&p, &q, &k, &v, &rows, &lens, sinks);
        let mut first: Option<Vec<f32>> = None;
        for isa in Isa::available() {
            for threads in [1, 3] {
                let pool = Pool::new(threads).unwrap();
                let mut out = vec![f32::NAN; expected.len()];
                let mut scratch = Scratch::new();
                attention(
                    isa,
                    &pool,
                    &p,
                    &q,
                    k.view(),
                    v.view(),
                    &rows,
                    &seqs,
                    &pages,
                    sinks,
                    &mut out,
                    &mut scratch,
                )
                .unwrap();
                close(&out, &expected, 2e-5, &format!("case {i}, {}", isa.name()));
                same_bits(
                    &out,
                    first.get_or_insert_with(|| out.clone()),
                    &format!("case {i}, {}", isa.name()),
                );
            }
            // One query at a time, with the sequence only as long as that query sees.
            let (wq, wo) = (p.n_head * p.head_dim_k, p.n_head * p.head_dim_v);
            for (r, row) in rows.iter().enumerate().step_by(7) {
                let mut seqs = seqs.clone();
                if p.causal {
                    seqs[row.seq as usize].len = row.pos + 1;
                }
                let mut one = vec![f32::NAN; wo];
                let mut scratch = Scratch::new();
                let q = &q[r * wq..][..wq];
                attention(
                    isa,
                    &Serial,
                    &p,
                    q,
                    k.view(),
                    v.view(),
                    &[*row],
                    &seqs,
                    &pages,
                    sinks,
                    &mut one,
                    &mut scratch,
                )
                .unwrap();
                let whole = first.as_ref().unwrap();
                same_bits(&one, &whole[r * wo..][..wo], &format!("case {i} alone, {}", isa.name()));
            }
        }
    }
}

#[test]
fn kv_store_rounds_as_quant_on_every_isa() {
    let x = noise(3 * 40, 2);
    for isa in Isa::available() {
        let mut bytes = vec![0u8; PAGE * 40 * 2];
        let kv = KvViewMut { format: FormatId::F16, bytes: &mut bytes, n_head_kv: 1, head_dim: 40 };
        kv_store(isa, &Serial, kv, &x, &[63, 0, 5]).unwrap();
        for (x, slot) in x.chunks(40).zip([63, 0, 5]) {
            let mut expected = vec![0; 80];
            quant::row::encode(FormatId::F16, x, None, &mut expected).unwrap();
            assert_eq!(bytes[slot * 80..][..80], expected);
        }
        let kv = KvViewMut { format: FormatId::F16, bytes: &mut bytes, n_head_kv: 1, head_dim: 40 };
        assert!(kv_store(isa, &Serial, kv, &x[..40], &[64]).is_err());
    }
}

#[test]
fn executors_run_every_task_once() {
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
    let mut executors: Vec<Box<dyn Executor>> = vec![Box::new(Serial), Box::new(RayonExecutor)];
    for n in 1..=4 {
        executors.push(Box::new(Pool::new(n).unwrap()));
    }
    for exec in &executors {
        for round in 0..200 {
            let n = [0, 1, 2, 3, 50][round % 5];
            let counts: Vec<AtomicUsize> = (0..n).map(|_| AtomicUsize::new(0)).collect();
            exec.run(n, &|i| {
                counts[i].fetch_add(1, Relaxed);
            });
            assert!(counts.iter().all(|c| c.load(Relaxed) == 1));
            if round % 50 == 49 {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        }
    }
}

#[test]
fn a_pool_hands_panics_on_and_lives_on() {
    let pool = Pool::new(3).unwrap();
    for _ in 0..20 {
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pool.run(100, &|i| assert!(i != 41, "task 41"));
        }));
        let payload = caught.expect_err("the panic must arrive");
        assert!(payload.downcast_ref::<String>().is_some_and(|s| s == "task 41") || payload.is::<&str>());
        // Nested regions run on their caller.
        let sum = std::sync::atomic::AtomicUsize::new(0);
        pool.run(8, &|_| {
            pool.run(8, &|_| {
                sum.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            })
        });
        assert_eq!(sum.into_inner(), 64);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn any_shape_any_isa(
        format in prop::sample::select(vec![FormatId::Q4_0, FormatId::Q8_0, FormatId::F32, FormatId::F16, FormatId::BF16]),
        rows in 1usize..70,
        groups in 1usize..8,
        m in 1usize..21,
        threads in 1usize..4,
        seed in any::<u64>(),
    ) {
        let k = 32 * groups;
        let bytes = weights(format, rows, k, seed);
        let x = noise(m * k, seed);
        let expected = reference(format, &bytes, rows, k, &x, m);
        let pool = Pool::new(threads).unwrap();
        for isa in Isa::available() {
            same_bits(&product(isa, &pool, format, &bytes, rows, k, &x, m), &expected, isa.name());
        }
    }
}
