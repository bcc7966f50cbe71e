//! Every verb on a tiny model, against llama.cpp's results for it.

mod common;

use common::{Folder, MODEL, json, ok, run, runik};
use serde_json::Value;

fn golden() -> Value {
    let text = std::fs::read_to_string(MODEL.replace(".gguf", ".json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

fn commas(ids: &[u32]) -> String {
    ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

fn bytes_of_hex(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect()
}

#[test]
fn tokenize_and_detokenize() {
    let folder = Folder::new("tokenize");
    let file = folder.path("text");
    for item in golden()["tokenize"].as_array().unwrap() {
        if item.get("throws").is_some() {
            continue;
        }
        // Raw bytes through a file: arguments cannot hold NUL.
        std::fs::write(&file, bytes_of_hex(item["hex"].as_str().unwrap())).unwrap();
        let mut args = vec!["tokenize", MODEL, "-f", &file, "--json"];
        args.extend((item["add_special"] == false).then_some("--no-bos"));
        args.extend((item["parse_special"] == true).then_some("--special"));
        assert_eq!(ids(&json(&args)["tokens"]), ids(&item["ids"]), "{item}");
        if let Some(hex) = item["detok_hex"].as_str() {
            let text = run(&["detokenize", MODEL, &commas(&ids(&item["ids"]))]).stdout;
            assert_eq!(text, bytes_of_hex(hex), "{item}");
        }
    }
    let by_stdin =
        runik().args(["tokenize", MODEL]).stdin(std::fs::File::open(&file).unwrap()).output().unwrap();
    assert!(by_stdin.status.success());
}

#[test]
fn logits_are_llama_cpps() {
    let (golden, folder) = (golden(), Folder::new("logits"));
    let (out, tokens) = (folder.path("out.f32"), commas(&ids(&golden["ids"])));
    ok(&["logits", MODEL, "--tokens", &tokens, "--out", &out, "-ctk", "f32", "-ctv", "f32", "-t", "1"]);
    let floats = |path: &str| -> Vec<f32> {
        std::fs::read(path)
            .unwrap()
            .chunks_exact(4)
            .map(|c| f32::from_le_bytes(c.try_into().unwrap()))
            .collect()
    };
    let (got, expected) = (floats(&out), floats(&MODEL.replace(".gguf", ".logits.f32")));
    assert_eq!(got.len(), expected.len());
    let worst = got.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 1e-3, "{worst}");
    assert_eq!(folder.names(), ["out.f32"], "no temporary file stays");
}

/// Two GPUs, emulated, share the layers; with fewer layers than there are the CPU has the first; a wrong list is refused.
#[test]
fn several_gpus_share_the_layers() {
    let answer = |device: &str, layers: &str| {
        let args =
            ["run", MODEL, "hi", "--raw", "--temp", "0", "-n", "4", "--json", "-ctk", "f32", "-ctv", "f32"];
        let output = run(&[&args[..], &["--device", device, "-ngl", layers]].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
        (ids(&answer["tokens"]), String::from_utf8(output.stderr).unwrap())
    };
    let (want, _) = answer("cpu", "auto");
    let (got, _) = answer("emu,emu", "all");
    assert_eq!(got, want);
    // A layer is one GPU's; the other has nothing to do.
    let (got, said) = answer("emu,emu", "1");
    assert_eq!(got, want);
    assert_eq!(said.matches("emu (emulator): 1 of 1 layers").count(), 1, "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    for (args, code, says) in [
        (&["--device", "emu,cpu"][..], 2, "only GPUs share a model"),
        (&["--device", "cuda:1,cuda:0,cuda:1"], 2, "cuda:1 twice"),
        (
            &["--device", "emu", "--require-gpu", "-ngl", "0", "--no-op-offload"],
            1,
            "-ngl 0 leaves it no layer",
        ),
    ] {
        let wrong = run(&[&["run", MODEL, "hi"], args].concat());
        let said = String::from_utf8_lossy(&wrong.stderr).into_owned();
        assert_eq!(wrong.status.code(), Some(code), "{args:?}: {said}");
        assert!(said.contains(says), "{args:?}: {said}");
    }
}

/// Single tensors have devices of their own, and prompts' products go to the GPU or not: the same answer; what was decided
/// is said before loading, and `inspect` shows it.
#[test]
fn tensors_have_devices_of_their_own() {
    let base =
        ["run", MODEL, "hi", "--raw", "--temp", "0", "-n", "4", "--json", "-ctk", "f32", "-ctv", "f32"];
    let answer = |args: &[&str]| {
        let output = run(&[&base[..], args].concat());
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
        (ids(&answer["tokens"]), String::from_utf8(output.stderr).unwrap())
    };
    let (want, _) = answer(&["--device", "cpu", "-ot", "ffn=cpu"]);
    let cases: [(&[&str], &str); 5] = [
        (&["-ngl", "all", "-ot", "ffn_(up|down)=CPU"], "weights of the host in turns"),
        (&["-ngl", "all", "-ot", "ffn_(up|down)=CPU", "--no-op-offload"], "cpu: 2 tensor(s) kept there"),
        (&["-ngl", "0"], "emu (emulator): 0 of 1 layers, weights 0 B"),
        (&["-ngl", "0", "-ot", "ffn=emu"], "emu (emulator): 0 of 1 layers"),
        (&["-ngl", "1", "-ot", "attn_q=cpu,attn=emu,output=emu"], "cpu: 1 tensor(s) kept there"),
    ];
    for (args, says) in cases {
        let (got, said) = answer(&[&["--device", "emu"], args].concat());
        assert_eq!(got, want, "{args:?}");
        assert!(said.contains(says), "{args:?}: {said}");
        assert_eq!(said.contains("in turns"), !args.contains(&"--no-op-offload"), "{said}");
        let shown = ok(&[&["inspect", MODEL, "-c", "4096", "--device", "emu"], args].concat());
        assert!(shown.contains("of it on devices") && shown.contains(says), "{args:?}: {shown}");
    }
    // Without products of prompts there is nothing for a GPU without layers, which is said unless nobody asked for one.
    let (got, said) = answer(&["--device", "emu", "-ngl", "0", "--no-op-offload"]);
    assert_eq!(got, want);
    assert_eq!(said, "runik: emu: -ngl 0 leaves it no layer; all are on the CPU\n");
    let (got, said) = answer(&["-ngl", "0", "--no-op-offload"]);
    assert_eq!((got, said.as_str()), (want.clone(), ""));
    let shown = json(&["inspect", MODEL, "--json", "--device", "emu", "-ot", "ffn=cpu"]);
    let gpu = &shown["memory"]["devices"][0];
    assert!(gpu["brought_bytes"].as_u64().unwrap() > 0 && gpu["layers"] == 1, "{gpu}");
    assert!(gpu["pinned_host_bytes"].as_u64().unwrap() > 0, "{gpu}");
}

/// The answer to raw token text is the greedy continuation; the JSON holds what scripts read.
#[test]
fn run_greedy_is_llama_cpps() {
    let golden = golden();
    let prompt = ids(&golden["greedy_prompt_ids"]);
    let text = run(&["detokenize", MODEL, &commas(&prompt)]).stdout;
    let folder = Folder::new("greedy");
    let file = folder.path("prompt");
    std::fs::write(&file, &text).unwrap();
    let args = [
        "run",
        MODEL,
        "--raw",
        "--json",
        "-f",
        &file,
        "-n",
        "32",
        "--temp",
        "0",
        "--ignore-eos",
        "-ctk",
        "f32",
        "-ctv",
        "f32",
    ];
    let answer = json(&args);
    assert_eq!(ids(&answer["prompt_tokens"]), prompt);
    assert_eq!(ids(&answer["tokens"]), ids(&golden["greedy_ids"]));
    let (got, expected) =
        (answer["logprobs"].as_array().unwrap(), golden["greedy_logprobs"].as_array().unwrap());
    assert_eq!(got.len(), expected.len());
    for (got, expected) in got.iter().zip(expected) {
        assert!((got.as_f64().unwrap() - expected.as_f64().unwrap()).abs() < 1e-3, "{got} {expected}");
    }
    assert_eq!(answer["stop_reason"], "limit");
    for key in [
        "load_ms",
        "prompt_n",
        "prompt_ms",
        "prompt_per_second",
        "ttft_ms",
        "predicted_n",
        "predicted_ms",
        "predicted_per_second",
    ] {
        assert!(answer["timings"][key].is_number(), "{key}");
    }
}

#[test]
fn run_is_reproducible_and_takes_flags_from_the_environment() {
    let sample = |threads: &str| {
        json(&["run", MODEL, "--raw", "--json", "-p", "as a", "-n", "24", "-s", "7", "-t", threads])
    };
    let first = sample("1");
    assert_eq!(first["seed"], 7);
    assert_eq!(first["tokens"], sample("1")["tokens"]);
    assert_eq!(first["tokens"], sample("2")["tokens"], "threads change nothing");
    let by_env = runik()
        .args(["run", MODEL, "--raw", "as a"])
        .envs([("RUNIK_ARG_JSON", "1"), ("RUNIK_ARG_PREDICT", "3"), ("RUNIK_ARG_SEED", "7")])
        .output()
        .unwrap();
    let by_env: Value = serde_json::from_slice(&by_env.stdout).unwrap();
    assert_eq!(by_env["tokens"].as_array().unwrap()[..], first["tokens"].as_array().unwrap()[..3]);
}

#[test]
fn run_streams_the_text_of_its_json() {
    let args = ["run", MODEL, "--raw", "-p", "as a", "-n", "24", "--temp", "0"];
    let text = json(&[&args[..], &["--json"]].concat())["text"].as_str().unwrap().to_owned();
    assert_eq!(ok(&args), text + "\n");
}

/// A full context is said with counts.
#[test]
fn context_limits_are_said() {
    let full = run(&["run", MODEL, "--raw", "--json", "-p", "as a", "-c", "16", "--ignore-eos"]);
    assert!(full.status.success());
    let answer: Value = serde_json::from_slice(&full.stdout).unwrap();
    assert_eq!(answer["stop_reason"], "context");
    let said = String::from_utf8(full.stderr).unwrap();
    assert!(said.contains("16 positions") && said.contains("-c"), "{said}");
}

#[test]
fn chat_template_by_name_and_fallback() {
    let by_name = json(&["run", MODEL, "--json", "--chat-template", "llama3", "hi", "-n", "1", "-v"]);
    assert!(by_name["prompt_tokens"].as_array().unwrap().len() > 5);
    let guessed = run(&["run", MODEL, "--json", "hi", "-n", "1"]);
    assert!(String::from_utf8_lossy(&guessed.stderr).contains("chatml is a guess"));
}

#[test]
fn perplexity_of_uniform_random_text() {
    let folder = Folder::new("ppl");
    let file = folder.path("text");
    std::fs::write(&file, "Aides as Hell; but a conscientious minority ".repeat(20)).unwrap();
    let result = json(&["perplexity", MODEL, "-f", &file, "-c", "64", "--json"]);
    let (ppl, nll) = (result["ppl"].as_f64().unwrap(), result["nll"].as_f64().unwrap());
    assert!((ppl - nll.exp()).abs() < 1e-9 * ppl && ppl > 1.0);
    let chunks = result["tokens"].as_u64().unwrap() / 64;
    assert_eq!(result["chunks"], chunks);
    assert_eq!(result["n_scored"], chunks * 31);
    assert_eq!(result["chunk_mean_nll"].as_array().unwrap().len() as u64, chunks);
}

#[test]
fn bench_has_llama_benchs_fields() {
    let args = ["bench", MODEL, "-p", "8", "-n", "4", "-d", "0,8", "-r", "2", "-t", "1", "-o"];
    let with = |output: &'static str| [&args[..], &[output]].concat();
    let rows = json(&with("json"));
    let rows = rows.as_array().unwrap();
    assert_eq!(rows.len(), 4);
    for key in [
        "build_commit",
        "cpu_info",
        "gpu_info",
        "backends",
        "model_filename",
        "model_type",
        "model_size",
        "model_n_params",
        "n_batch",
        "n_ubatch",
        "n_threads",
        "type_k",
        "type_v",
        "n_gpu_layers",
        "n_prompt",
        "n_gen",
        "n_depth",
        "test_time",
        "avg_ns",
        "stddev_ns",
        "avg_ts",
        "stddev_ts",
        "samples_ns",
        "samples_ts",
        "gbps",
        "pct_peak",
        "cpu_cores",
    ] {
        assert!(rows.iter().all(|row| row.get(key).is_some()), "{key}");
    }
    assert_eq!(rows[0]["n_prompt"], 8);
    assert!(rows.iter().all(|row| row["cpu_cores"].as_f64().is_some_and(|cores| cores > 0.0)));
    assert_eq!(rows[0]["samples_ns"].as_array().unwrap().len(), 2);
    assert_eq!(ok(&with("jsonl")).lines().count(), 4);
    assert_eq!(ok(&with("csv")).lines().count(), 5);
    let table = ok(&with("md"));
    assert!(table.contains("pp8 @ d8") && table.contains("t/s"), "{table}");
}

#[test]
fn quantize_writes_a_file_that_runs() {
    let folder = Folder::new("quantize");
    // Rows of 48 fit no block, for which llama-quantize takes F16; ffn_down's rows of 64 fit blocks of 32.
    for (file_type, of_down) in [("Q8_0", "Q8_0"), ("q4_k_m", "Q8_0"), ("Q4_0", "Q4_0"), ("F16", "F16")] {
        let out = folder.path(&format!("{file_type}.gguf"));
        ok(&["quantize", MODEL, &out, file_type, "2"]);
        let inspected = json(&["inspect", &out, "--json"]);
        let format_of = |name: &str| {
            let tensors = inspected["tensors"].as_array().unwrap();
            tensors.iter().find(|t| t["name"] == name).unwrap()["format"].as_str().unwrap().to_owned()
        };
        assert_eq!(format_of("blk.0.ffn_down.weight"), of_down, "{file_type}");
        assert_eq!(format_of("blk.0.attn_q.weight"), "F16", "{file_type}");
        assert_eq!(format_of("blk.0.attn_norm.weight"), "F32", "{file_type}");
        ok(&["run", &out, "--raw", "-p", "as a", "-n", "2"]);
    }
    let refused = run(&["quantize", &folder.path("Q4_0.gguf"), &folder.path("again.gguf"), "Q8_0"]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--allow-requantize"));
    assert_eq!(refused.status.code(), Some(1));
    ok(&["quantize", &folder.path("Q4_0.gguf"), &folder.path("again.gguf"), "Q8_0", "--allow-requantize"]);
    assert_eq!(folder.names(), ["F16.gguf", "Q4_0.gguf", "Q8_0.gguf", "again.gguf", "q4_k_m.gguf"]);
}

/// Two parts in, one part out, and two parts out with `--keep-split`; the weights stay the same.
#[test]
fn split_sets() {
    let folder = Folder::new("split-set");
    let (first, second) = (folder.path("m-00001-of-00002.gguf"), folder.path("m-00002-of-00002.gguf"));
    split(MODEL, &first, &second);
    let logits = |model: &str| {
        let out = folder.path("logits");
        ok(&["logits", model, "--tokens", "1,2,3", "--out", &out]);
        std::fs::read(out).unwrap()
    };
    let expected = logits(MODEL);
    assert_eq!(logits(&first), expected);
    let (whole, kept) = (folder.path("whole.gguf"), folder.path("kept.gguf"));
    ok(&["quantize", &first, &whole, "F32"]);
    assert_eq!(logits(&whole), expected);
    ok(&["quantize", &first, &kept, "F32", "--keep-split"]);
    // The parts' names would be the input's.
    let before = std::fs::read(&first).unwrap();
    let own = first.replace("-00001-of-00002", "");
    let refused = run(&["quantize", &first, &own, "F16", "--keep-split"]);
    let stderr = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && stderr.contains("same file"), "{stderr}");
    assert!(std::fs::read(&first).unwrap() == before);
    assert_eq!(logits(&folder.path("kept-00001-of-00002.gguf")), expected);
}

/// Writes a file as two parts: the metadata with the first tensors, the others.
fn split(model: &str, first: &str, second: &str) {
    let bytes = std::fs::read(model).unwrap();
    let gguf = gguf::Gguf::parse(&bytes).unwrap();
    let (half, n) = (gguf.tensors().len() / 2, gguf.tensors().len());
    for (no, path, tensors) in [(0u16, first, &gguf.tensors()[..half]), (1, second, &gguf.tensors()[half..])]
    {
        let mut writer = if no == 0 { gguf::Writer::like(&gguf).unwrap() } else { gguf::Writer::default() };
        writer.set("split.no", no).unwrap();
        writer.set("split.count", 2u16).unwrap();
        writer.set("split.tensors.count", n as i32).unwrap();
        for t in tensors {
            writer.tensor(t.name, t.format, &t.ne()).unwrap();
        }
        let mut out = writer.header_bytes();
        for t in tensors {
            out.extend_from_slice(gguf.data(t));
            out.resize(out.len() + writer.padding(t.n_bytes()) as usize, 0);
        }
        std::fs::write(path, out).unwrap();
    }
}

#[test]
fn small_verbs() {
    assert!(ok(&["version"]).starts_with("runik 0."));
    assert!(ok(&["--version"]).starts_with("runik 0."));
    for shell in ["bash", "zsh", "fish"] {
        assert!(ok(&["completions", shell]).contains("runik"));
    }
    let doctor = json(&["doctor", "--json"]);
    assert!(doctor["cpu"]["physical_cores"].as_u64().unwrap() > 0);
    assert!(doctor["read_bandwidth_gbps"].as_f64().unwrap() > 0.0);
    let backends: Vec<&str> =
        doctor["backends"].as_array().unwrap().iter().map(|b| b.as_str().unwrap()).collect();
    assert!(backends.contains(&"cpu") && backends.contains(&"emu"), "{backends:?}");
    assert!(ok(&["version"]).contains(&backends.join(", ")));
    // Either devices, or the reason why there are none.
    assert_ne!(doctor["gpu"].is_array(), doctor["gpu_note"].is_string());
}
