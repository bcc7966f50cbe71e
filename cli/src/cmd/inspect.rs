//! `inspect`: what a file holds, and where memory would go at a context size. Reads the header only.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use anyhow::Result;
use engine::backend::{Backend, BackendInfo, PlanId, Step};
use engine::context::MemoryPlan;
use engine::graph::{Graph, Node};
use engine::kv_cache::KvLayout;
use engine::tensor::TensorId;
use engine::{Context, ContextParams, EngineError};
use gguf::{SplitSet, Value};
use quant::FormatId;
use serde_json::{Map, json};

use crate::args::{Device, InspectArgs, PlacementArgs};
use crate::device::{Compute, Plan};
use crate::exit::Usage;
use crate::load::{Files, context_size};
use crate::quantize::file_type::FileType;
use crate::ui;

/// Elements of an array that are shown.
const SHOWN_ELEMS: usize = 6;
/// Characters of a string that are shown.
const SHOWN_CHARS: usize = 100;

/// `inspect`.
pub fn run(args: &InspectArgs) -> Result<()> {
    let files = Files::open(&args.model)?;
    let set = files.parse()?;
    let memory = memory(&files, args);
    // A model that cannot run is shown all the same; flags that make no sense are not.
    let memory = match memory {
        Err(error) if error.is::<Usage>() => return Err(error),
        memory => memory,
    };
    if args.json {
        ui::json(&as_json(&files, &set, &memory, args)?)
    } else {
        ui::out(as_text(&files, &set, &memory, args)?)
    }
}

/// Memory at a context size, and what of it devices have.
struct Memory {
    n_ctx: usize,
    plan: MemoryPlan,
    /// Only if devices were asked for.
    devices: Option<Plan>,
}

/// Memory, or why the model cannot run.
fn memory(files: &Files, args: &InspectArgs) -> Result<Memory> {
    let model = Arc::new(files.model()?);
    let params = ContextParams {
        n_ctx: context_size(args.ctx_size, &model)?,
        type_k: args.cache_type_k,
        type_v: args.cache_type_v,
        ..ContextParams::default()
    };
    let weights = &args.weights;
    let asked = !args.device.is_empty()
        || args.gpu_layers.is_some()
        || !weights.override_tensor.is_empty()
        || weights.cpu_moe
        || weights.n_cpu_moe.is_some();
    let devices = match asked {
        true => {
            let compute = Compute::choose(&PlacementArgs {
                device: if args.device.is_empty() { vec![Device::Auto] } else { args.device.clone() },
                gpu_layers: args.gpu_layers,
                weights: weights.clone(),
                require_gpu: false,
            })?;
            compute.plan(&model, &params)?
        }
        false => None,
    };
    let n_ctx = params.n_ctx;
    let plan = Context::new(model, Box::new(PlanOnly), params)?.memory_plan();
    Ok(Memory { n_ctx, plan, devices })
}

/// A backend that allocates nothing and runs nothing: planning needs no more.
struct PlanOnly;

impl Backend for PlanOnly {
    fn info(&self) -> BackendInfo {
        BackendInfo { name: "plan", description: String::from("plans only") }
    }
    fn supports(&self, _: &Graph, _: &Node) -> Result<(), String> {
        Ok(())
    }
    fn create_kv(&mut self, _: &KvLayout) -> Result<(), EngineError> {
        Ok(())
    }
    fn prepare(&mut self, _: Arc<engine::plan::Plan>) -> Result<PlanId, EngineError> {
        Ok(PlanId(0))
    }
    fn release(&mut self, _: PlanId) {}
    fn run(&mut self, _: PlanId, _: &Step<'_>) -> Result<(), EngineError> {
        Ok(())
    }
    fn read(&mut self, _: PlanId, _: TensorId, _: &mut [f32]) -> Result<(), EngineError> {
        Ok(())
    }
}

/// Tensors, weights and bytes of each format.
fn by_format(set: &SplitSet<'_>) -> BTreeMap<FormatId, (usize, u64, u64)> {
    let mut formats: BTreeMap<FormatId, (usize, u64, u64)> = BTreeMap::new();
    for (_, tensor) in set.tensors() {
        let row = formats.entry(tensor.format).or_default();
        *row = (row.0 + 1, row.1 + tensor.n_elems(), row.2 + tensor.n_bytes());
    }
    formats
}

/// A value as people read it: long ones shortened, foreign control characters escaped.
fn show(value: &Value<'_>) -> String {
    match value {
        Value::Str(bytes) => {
            let text = String::from_utf8_lossy(bytes);
            let short: String = text.chars().take(SHOWN_CHARS).collect();
            let more = if short.len() < text.len() {
                format!("… ({} characters)", text.chars().count())
            } else {
                String::new()
            };
            format!("{}{more}", short.escape_debug())
        }
        Value::Array(view) => {
            let shown: Vec<String> = view.iter().take(SHOWN_ELEMS).map(|v| show(&v)).collect();
            let more = if view.len() > SHOWN_ELEMS { ", …" } else { "" };
            format!("[{}{more}] ({} of {})", shown.join(", "), view.len(), view.elem_type())
        }
        Value::F32(v) => v.to_string(),
        Value::F64(v) => v.to_string(),
        Value::Bool(v) => v.to_string(),
        other => other.as_integer().map_or_else(String::new, |v| v.to_string()),
    }
}

fn value_json(value: &Value<'_>) -> serde_json::Value {
    match value {
        Value::Str(bytes) => json!(String::from_utf8_lossy(bytes)),
        Value::Array(view) => {
            let first: Vec<_> = view.iter().take(SHOWN_ELEMS).map(|v| value_json(&v)).collect();
            json!({ "type": view.elem_type().name(), "len": view.len(), "first": first })
        }
        Value::F32(v) => json!(v),
        Value::F64(v) => json!(v),
        Value::Bool(v) => json!(v),
        Value::U64(v) => json!(v),
        Value::I64(v) => json!(v),
        other => json!(other.as_integer().and_then(|v| i64::try_from(v).ok())),
    }
}

fn file_type(set: &SplitSet<'_>) -> Option<&'static str> {
    FileType::name_of(set.metadata().opt_u32("general.file_type").ok()??)
}

fn as_text(files: &Files, set: &SplitSet<'_>, memory: &Result<Memory>, args: &InspectArgs) -> Result<String> {
    let meta = set.metadata();
    let elems: u64 = set.tensors().map(|(_, t)| t.n_elems()).sum();
    let bytes: u64 = set.tensors().map(|(_, t)| t.n_bytes()).sum();
    let mut out = String::new();
    for path in &files.paths {
        writeln!(out, "file       {}", path.file_name().unwrap_or(path.as_os_str()).to_string_lossy())?;
    }
    writeln!(
        out,
        "format     GGUF version {}, {:?} endian, alignment {}",
        meta.version(),
        meta.endian(),
        meta.alignment()
    )?;
    writeln!(out, "size       {} in {} part(s)", ui::bytes(files.total_bytes() as u64), files.paths.len())?;
    let bpw = if elems > 0 { bytes as f64 * 8.0 / elems as f64 } else { 0.0 };
    writeln!(out, "weights    {elems} in {} tensors, {bpw:.2} bits per weight", set.n_tensors())?;
    if let Some(name) = file_type(set) {
        writeln!(out, "file type  {name}")?;
    }
    writeln!(out, "\nmetadata ({} keys)", meta.n_kvs())?;
    for (key, value) in meta.kvs().filter(|(key, _)| *key != "tokenizer.chat_template") {
        writeln!(out, "  {key} = {}", show(&value))?;
    }
    writeln!(out, "\ntensors by format")?;
    for (format, (n, elems, bytes)) in by_format(set) {
        writeln!(out, "  {:<8} {n:>5} tensors {elems:>14} weights {:>12}", format.name(), ui::bytes(bytes))?;
    }
    if args.tensors {
        writeln!(out, "\ntensors")?;
        for (_, tensor) in set.tensors() {
            let (format, shape) = (tensor.format.name(), format!("{:?}", &tensor.shape()[..]));
            writeln!(out, "  {:<36} {format:<8} {shape}", tensor.name.escape_debug().to_string())?;
        }
    }
    writeln!(out, "\nchat template")?;
    match meta.opt_text("tokenizer.chat_template") {
        Ok(Some(template)) => template.lines().try_for_each(|l| writeln!(out, "  {}", l.escape_debug()))?,
        Ok(None) => writeln!(out, "  none")?,
        Err(e) => writeln!(out, "  unreadable: {e}")?,
    }
    match memory {
        Ok(Memory { n_ctx, plan, devices }) => {
            let (k, v) = (args.cache_type_k.name(), args.cache_type_v.name());
            let total = plan.weights + plan.kv_cache + plan.activations + plan.outputs;
            writeln!(out, "\nmemory at context {n_ctx} (cache {k}/{v})")?;
            for (what, bytes) in [
                ("weights (mapped)", plan.weights),
                ("kv cache", plan.kv_cache),
                ("activations", plan.activations),
                ("outputs", plan.outputs),
                ("total", total),
            ] {
                writeln!(out, "  {what:<17} {:>12}", ui::bytes(bytes as u64))?;
            }
            if let Some(devices) = devices {
                writeln!(out, "\nof it on devices")?;
                devices.lines().try_for_each(|line| writeln!(out, "  {line}"))?;
            }
        }
        Err(e) => writeln!(out, "\nthis model cannot run here: {e:#}")?,
    }
    Ok(out)
}

fn as_json(
    files: &Files,
    set: &SplitSet<'_>,
    memory: &Result<Memory>,
    args: &InspectArgs,
) -> Result<serde_json::Value> {
    let meta = set.metadata();
    let kvs: Map<String, serde_json::Value> =
        meta.kvs().map(|(k, v)| (k.to_owned(), value_json(&v))).collect();
    let formats: Map<String, serde_json::Value> = by_format(set)
        .into_iter()
        .map(|(f, (n, elems, bytes))| {
            (f.name().to_owned(), json!({ "tensors": n, "elems": elems, "bytes": bytes }))
        })
        .collect();
    let tensors: Vec<_> = set
        .tensors()
        .map(|(part, t)| {
            json!({
                "name": t.name, "format": t.format.name(), "shape": &t.shape()[..], "bytes": t.n_bytes(),
                "offset": t.offset, "part": part,
            })
        })
        .collect();
    let memory = match memory {
        Ok(Memory { n_ctx, plan: p, devices }) => json!({
            "n_ctx": n_ctx,
            "type_k": args.cache_type_k.name(),
            "type_v": args.cache_type_v.name(),
            "weights_bytes": p.weights,
            "kv_cache_bytes": p.kv_cache,
            "activations_bytes": p.activations,
            "outputs_bytes": p.outputs,
            "total_bytes": p.weights + p.kv_cache + p.activations + p.outputs,
            "devices": devices.as_ref().map(Plan::json),
        }),
        Err(e) => json!({ "error": format!("{e:#}") }),
    };
    Ok(json!({
        "files": files.paths.iter().map(|p| p.display().to_string()).collect::<Vec<_>>(),
        "file_bytes": files.total_bytes(),
        "version": meta.version(),
        "endian": format!("{:?}", meta.endian()).to_lowercase(),
        "alignment": meta.alignment(),
        "file_type": file_type(set),
        "metadata": kvs,
        "formats": formats,
        "tensors": tensors,
        "chat_template": meta.opt_text("tokenizer.chat_template").ok().flatten(),
        "memory": memory,
    }))
}
