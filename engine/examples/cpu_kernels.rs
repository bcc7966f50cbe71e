//! Speed of the CPU kernels: GB/s of weights read and GFLOP/s per format, batch and shape.
//!
//! `cpu_kernels [--isa NAME] [-t THREADS] [--ms N] [-m TOKENS] [FORMAT…|attention]`. Weights are cycled over 64 MiB
//! copies, so that small batches read memory and not a cache.

use std::time::{Duration, Instant};

use engine::backend::StepSequence;
use engine::backends::cpu::simd::{Isa, KvView, QueryRow, Residual, Scratch, WeightView, attention, matmul};
use engine::executor::Executor;
use engine::kv_cache::PAGE;
use engine::op::AttentionParams;
use engine::pool::Pool;
use quant::FormatId;

/// Values in -1..1 of a fixed sequence.
fn noise(n: usize, mut seed: u64) -> Vec<f32> {
    let mut next = || {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// Best time of one call within the budget.
fn best(budget: Duration, mut call: impl FnMut()) -> f64 {
    call();
    let start = Instant::now();
    let mut best = f64::INFINITY;
    while start.elapsed() < budget {
        let one = Instant::now();
        call();
        best = best.min(one.elapsed().as_secs_f64());
    }
    best
}

fn bench_matmul(isa: Isa, exec: &dyn Executor, format: FormatId, tokens: &[usize], budget: Duration) {
    for (rows, cols) in [(1536, 576), (576, 1536), (49152, 576)] {
        if cols % quant::info(format).elems != 0 {
            continue;
        }
        let row = quant::row::row_bytes(format, cols).expect("whole blocks");
        // Bytes of any kind are weights; small scales keep the floats finite.
        let bytes = rows * row;
        let copies = (64usize << 20).div_ceil(bytes);
        let mut data: Vec<u8> = noise(bytes, 7).iter().map(|v| (v * 20.0) as i8 as u8).collect();
        if let FormatId::F32 = format {
            data = noise(rows * cols, 7).iter().flat_map(|v| v.to_le_bytes()).collect();
        }
        let data: Vec<u8> = std::iter::repeat_n(&data, copies).flatten().copied().collect();
        let mut line = format!("{format:8} {rows:6}x{cols:<5}");
        for &m in tokens {
            let x = noise(m * cols, 3);
            let mut out = vec![0.0; m * rows];
            let mut scratch = Scratch::new();
            let mut i = 0;
            let seconds = best(budget, || {
                let bytes = &data[i % copies * bytes..][..bytes];
                i += 1;
                let weight = WeightView { format, bytes, rows, cols };
                matmul(isa, exec, &[weight], &[None], &x, m, Residual::None, &mut [&mut out], &mut scratch)
                    .expect("shapes fit");
            });
            let gflops = 2e-9 * (m * rows * cols) as f64 / seconds;
            line += &match m {
                1 | 2 | 4 => format!("  m{m} {:5.1} GB/s", 1e-9 * bytes as f64 / seconds),
                _ => format!("  m{m} {gflops:4.0} GF/s"),
            };
        }
        println!("{line}");
    }
}

fn bench_attention(isa: Isa, exec: &dyn Executor, budget: Duration) {
    let params = AttentionParams {
        il: 0,
        n_head: 9,
        n_head_kv: 3,
        head_dim_k: 64,
        head_dim_v: 64,
        scale: 0.125,
        softcap: 0.0,
        window: 0,
        causal: true,
    };
    let pages: Vec<u32> = (0..64).collect();
    for format in [FormatId::F16, FormatId::F32, FormatId::Q8_0] {
        let row = quant::row::row_bytes(format, 64).expect("whole blocks");
        let mut cache = vec![0u8; 64 * 3 * PAGE * row];
        for row in cache.chunks_exact_mut(row) {
            quant::row::encode(format, &noise(64, 9), None, row).expect("encodable");
        }
        let view = KvView { format, bytes: &cache, n_head_kv: 3, head_dim: 64 };
        for (past, n) in [(0, 512), (3584, 512), (512, 1), (4000, 1)] {
            let rows: Vec<_> = (0..n).map(|i| QueryRow { pos: (past + i) as u32, seq: 0 }).collect();
            let seqs = [StepSequence { first_page: 0, len: (past + n) as u32 }];
            let q = noise(n * 576, 5);
            let mut out = vec![0.0; n * 576];
            let mut scratch = Scratch::new();
            let seconds = best(budget, || {
                attention(
                    isa,
                    exec,
                    &params,
                    &q,
                    view,
                    view,
                    &rows,
                    &seqs,
                    &pages,
                    None,
                    &mut out,
                    &mut scratch,
                )
                .expect("shapes fit");
            });
            let pairs: usize = (0..n).map(|i| past + i + 1).sum();
            let gflops = 4e-9 * (pairs * 576) as f64 / seconds;
            println!("attention {format} past {past} n {n}: {:.1} µs, {gflops:.0} GFLOP/s", 1e6 * seconds);
        }
    }
}

fn main() {
    let mut isa = Isa::detect();
    let mut threads = 1;
    let mut budget = Duration::from_millis(100);
    let mut formats = Vec::new();
    let mut tokens = vec![1, 2, 4, 8, 32, 512];
    let mut args = std::env::args().skip(1);
    let mut attention = false;
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--isa" => isa = args.next().and_then(|v| Isa::from_name(&v)).expect("an ISA of this machine"),
            "-t" => threads = args.next().and_then(|v| v.parse().ok()).expect("a number of threads"),
            "--ms" => {
                budget = Duration::from_millis(args.next().and_then(|v| v.parse().ok()).expect("a number"))
            }
            "-m" => tokens = vec![args.next().and_then(|v| v.parse().ok()).expect("a number of tokens")],
            "attention" => attention = true,
            name => formats.push(FormatId::from_name(name).expect("a format")),
        }
    }
    let pool = Pool::new(threads).expect("threads");
    println!("{}, {threads} thread(s)", isa.name());
    if formats.is_empty() && !attention {
        formats = vec![FormatId::Q4_0, FormatId::Q8_0, FormatId::Q4_K, FormatId::F16, FormatId::F32];
        attention = true;
    }
    for format in formats {
        bench_matmul(isa, &pool, format, &tokens, budget);
    }
    if attention {
        bench_attention(isa, &pool, budget);
    }
}
