//! Where a model is computed: on the devices that the user names, or on those that are there, and how many layers go to
//! each. If a GPU is missing, a line on stderr says that the CPU computes; with `--require-gpu` it is an error.

use std::collections::BTreeMap;
use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use engine::backend::Backend;
use engine::backends::cpu::{Cpu, Isa};
use engine::backends::cuda::needs::Share;
use engine::backends::cuda::{self, Cuda, Needs, Site, Streaming};
use engine::backends::split::{Offload, Placement, Split};
use engine::graph::Graph;
use engine::models::StepShape;
use engine::pool::Pool;
use engine::{ContextParams, Executor, Model};
use serde_json::{Value, json};

use crate::args::{Device, GpuLayers, PlacementArgs};
use crate::compile::{self, Elsewhere};
use crate::exit::usage;
use crate::machine;
use crate::overrides::Overrides;
use crate::ui;

/// Tokens of a first prompt, of which kernels are loaded before anyone asks: a question in a chat's template.
const FIRST_PROMPT: usize = 64;

/// A GPU, real or emulated.
#[derive(Clone)]
pub struct Gpu {
    /// What the user calls it.
    name: String,
    /// Its driver.
    device: cuda::Device,
}

/// The devices to compute on, and what the user says about their use.
pub struct Compute {
    /// GPUs in the order in which they get layers; none if the host's processor computes.
    gpus: Vec<Gpu>,
    /// Layers that go to them.
    layers: GpuLayers,
    /// Whether other GPUs may be used too if these have too little memory.
    others: bool,
    /// Whether it is an error if no GPU computes.
    required: bool,
    /// Weights that are elsewhere than their layer.
    overrides: Overrides,
    /// Whether GPUs multiply prompts with weights of the host.
    offload: bool,
}

/// What goes where on GPUs, known before anything is loaded.
pub struct Plan {
    /// Those that have something.
    gpus: Vec<Planned>,
    n_layer: usize,
    /// Layers on GPUs; more than the model has means the rest of the model too.
    n: usize,
    /// Where single weights are; GPUs are counted among those of the plan.
    sites: BTreeMap<u32, Site>,
    /// Number and bytes of single weights that are kept on the host.
    on_host: (usize, u64),
    /// Whether products of prompts bring weights from the host.
    offload: bool,
    /// Pinned memory that copies of these may take.
    pinned_bytes: u64,
}

/// What a GPU has.
struct Planned {
    gpu: Gpu,
    layers: Range<usize>,
    share: Share,
    free_bytes: u64,
}

impl Compute {
    /// The devices that the arguments come to.
    pub fn choose(args: &PlacementArgs) -> Result<Compute> {
        // No message about GPUs to a user who names none and leaves them nothing to do.
        let no_layer = args.gpu_layers == Some(GpuLayers::Last(0)) && args.weights.no_op_offload;
        let only_host = args.weights.override_tensor.iter().all(|(_, device)| *device == Device::Cpu);
        let unasked = args.device == [Device::Auto] && !args.require_gpu;
        let gpus = if no_layer && only_host && unasked { Vec::new() } else { gpus(args)? };
        let names: Vec<&str> = gpus.iter().map(|gpu| gpu.name.as_str()).collect();
        Ok(Compute {
            overrides: Overrides::new(&args.weights, &names)?,
            layers: args.gpu_layers.unwrap_or(GpuLayers::Auto),
            others: args.device == [Device::Auto],
            required: args.require_gpu,
            offload: !args.weights.no_op_offload,
            gpus,
        })
    }

    /// Bytes a second that the first device's memory moves, measured; `None` for the CPU.
    pub fn peak_bytes_per_s(&self) -> Result<Option<f64>> {
        Ok(self.gpus.first().map(|gpu| cuda::copy_bytes_per_s(&gpu.device)).transpose()?)
    }

    /// The devices' names, for reports; empty for the CPU.
    pub fn gpu_name(&self) -> String {
        self.gpus.iter().map(|gpu| gpu.device.info().name).collect::<Vec<_>>().join(" + ")
    }

    /// Tokens computed at once: what the user says, else what the devices do well with. On an H100 prompts are a sixth
    /// faster in batches of 2048 than of 512.
    pub fn batch_size(&self, asked: Option<usize>) -> usize {
        asked.unwrap_or(if self.has_gpu() { 2048 } else { 512 }).max(1)
    }

    /// Layers on GPUs, as the user says it; -1 for as many as fit.
    pub fn asked_layers(&self) -> i64 {
        match self.layers {
            _ if !self.has_gpu() => 0,
            GpuLayers::Last(n) => n as i64,
            GpuLayers::Auto | GpuLayers::All => -1,
        }
    }

    /// Whether a GPU computes some of it.
    pub fn has_gpu(&self) -> bool {
        !self.gpus.is_empty()
    }

    /// Whether what the user says of single weights fits a model, ahead of all else.
    pub fn check(&self, model: &Model) -> Result<()> {
        self.overrides.sites(model).map(drop)
    }

    /// What goes where; `None` if all is on the CPU, which is said if GPUs were to compute.
    pub fn plan(&self, model: &Model, params: &ContextParams) -> Result<Option<Plan>> {
        let sites = self.overrides.sites(model)?;
        let Some(first) = self.gpus.first() else { return Ok(None) };
        let needs = Needs::of(model, params, &first.device.info(), &sites, self.offload)?;
        let n_layer = needs.n_layer();
        let mut gpus = self.gpus.clone();
        let mut fits = needs.most_layers(&free_bytes(&gpus));
        // The first GPU alone, or all there are.
        let enough = match self.layers {
            GpuLayers::Last(n) => n.min(n_layer + 1) <= fits,
            GpuLayers::Auto | GpuLayers::All => fits > n_layer,
        };
        if self.others && !enough {
            gpus.extend(other_gpus());
            fits = needs.most_layers(&free_bytes(&gpus));
        }
        let free = free_bytes(&gpus);
        let n = match self.layers {
            GpuLayers::Auto => fits,
            GpuLayers::All => n_layer + 1,
            GpuLayers::Last(n) => n.min(n_layer + 1),
        };
        if n > 0 {
            Cuda::takes_kv(&params.kv_layout(model)?)?;
        }
        let names = gpus.iter().map(|gpu| gpu.name.as_str()).collect::<Vec<_>>().join(", ");
        let free_text = free.iter().map(|&free| ui::bytes(free)).collect::<Vec<_>>().join(" + ");
        let ranges = needs.spread(n, &free);
        // Without a layer a GPU may still have single weights, or multiply prompts with the host's.
        if n == 0 && needs.apart.is_empty() && (!self.offload || ranges.is_none()) {
            let why = self.why_no_layer(&needs, &free_text);
            if self.required {
                bail!("--require-gpu: {names}: {why}");
            }
            ui::say(format!("{names}: {why}; all are on the CPU"));
            return Ok(None);
        }
        let Some(ranges) = ranges else {
            bail!(
                "{} do not fit on {names}: {}, {free_text} free; -ngl {fits} does, a shorter context (-c) or a smaller \
                 cache type (-ctk, -ctv) may",
                if n > n_layer { "all layers".to_owned() } else { format!("{n} layers") },
                parts(&needs.share(n)),
            );
        };
        let pinned_bytes = machine::pinnable(model.weights().total_bytes() as u64);
        // A GPU without anything has nothing to do.
        let mut of_plan = vec![None; gpus.len()];
        let mut chosen = Vec::with_capacity(gpus.len());
        for (i, (gpu, mut share)) in gpus.into_iter().zip(needs.shares(n, &ranges)).enumerate() {
            share.pinned = share.pinned.min(pinned_bytes);
            if share != Share::default() {
                of_plan[i] = Some(chosen.len());
                chosen.push(Planned { gpu, layers: ranges[i].clone(), share, free_bytes: free[i] });
            }
        }
        let on_host = sites.iter().filter(|(_, site)| **site == Site::Host);
        let on_host = on_host.map(|(id, _)| model.weights().get(*id).len_bytes() as u64);
        Ok(Some(Plan {
            on_host: on_host.fold((0, 0), |(n, bytes), of| (n + 1, bytes + of)),
            offload: chosen.iter().any(|planned| planned.share.brought > 0),
            pinned_bytes,
            gpus: chosen,
            n_layer,
            n,
            sites: sites
                .into_iter()
                .filter_map(|(id, site)| match site {
                    Site::Host => Some((id, site)),
                    Site::Gpu(gpu) => Some((id, Site::Gpu(of_plan[gpu]?))),
                })
                .collect(),
        }))
    }

    /// Why GPUs get no layer, for people; `free_text` is their free memory.
    fn why_no_layer(&self, needs: &Needs, free_text: &str) -> String {
        match self.layers {
            GpuLayers::Last(_) if !self.offload => "-ngl 0 leaves it no layer".to_owned(),
            GpuLayers::Last(_) => {
                let bytes = ui::bytes(needs.share(0).total());
                format!("products of prompts need {bytes}, {free_text} free")
            }
            GpuLayers::Auto | GpuLayers::All => format!("not even one layer fits into {free_text} free"),
        }
    }

    /// A backend for a model, its weights in place.
    pub fn backend(&self, model: &Model, params: &ContextParams, threads: usize) -> Result<Box<dyn Backend>> {
        let pool = Pool::new(threads).with_context(|| format!("starting {threads} threads"))?;
        let pool: Arc<dyn Executor> = Arc::new(pool);
        let Some(plan) = self.plan(model, params)? else { return cpu(model, pool) };
        plan.lines().for_each(|line| if plan.has_host() { ui::say(line) } else { ui::detail(line) });
        let placement = plan.placement();
        let mut backends = if plan.has_host() { vec![cpu(model, pool.clone())?] } else { Vec::new() };
        for Planned { gpu, .. } in &plan.gpus {
            let device = backends.len();
            let backend = load(gpu, device, model, params, &placement, pool.clone())?;
            if placement.offload.is_some_and(|offload| offload.to == device) {
                let prompt = model.graph(params.n_ctx, first_shape(params, 1, true));
                let brought = placement.brought(&prompt, model.weights());
                backends.push(Box::new(Streaming::new(backend, &brought, plan.pinned_bytes)?));
            } else {
                backends.push(Box::new(backend));
            }
        }
        match backends.len() {
            1 => Ok(backends.remove(0)),
            _ => Ok(Box::new(Split::new(backends, placement, model.weights().clone()))),
        }
    }
}

/// The backend of a GPU, `device` of the placement, with its weights and the first steps' kernels loaded.
fn load(
    gpu: &Gpu,
    device: usize,
    model: &Model,
    params: &ContextParams,
    placement: &Placement,
    pool: Arc<dyn Executor>,
) -> Result<Cuda> {
    let mut backend = Cuda::new(gpu.device.clone(), pool, model.weights().clone());
    let bar = ui::bytes_bar(0, &format!("to {}", gpu.name));
    let part = |graph: &Graph| placement.part(graph, model.weights(), device);
    let (graph, kv) = (model.graph(params.n_ctx, first_shape(params, 1, false)), params.kv_layout(model)?);
    let (ahead, apart) = (backend.ahead(), backend.runs_prompts_apart() || placement.offload.is_some());
    let kernels = || {
        let steps = first_steps(model, params, apart).into_iter();
        let steps: Vec<_> = steps.map(|(graph, at)| (part(&graph), at)).collect();
        let kernels = ahead.kernels(&steps, &kv);
        // The first one tells whether the driver has them in its cache.
        let (n, started) = (kernels.len(), Instant::now());
        ahead.load(&kernels, 0..n.min(1));
        if n > 1 && compile::was_compiled(started.elapsed()) {
            // The longest one here, where no process must start for it.
            let sizes = kernels.modules().map(|module| module.packed_text_bytes());
            let longest = sizes.enumerate().max_by_key(|&(_, bytes)| bytes).map_or(0, |(i, _)| i);
            let others = kernels.modules().enumerate().filter(|&(i, _)| i != 0 && i != longest);
            let free_bytes = gpu.device.free_bytes().unwrap_or(0);
            let others = Elsewhere::start(&gpu.name, free_bytes, others.map(|(_, module)| module));
            ahead.load(&kernels, longest..longest + 1);
            others.wait();
        }
        ahead.load(&kernels, n.min(1)..n);
        kernels
    };
    // Meanwhile the other cores load the weights.
    let (loaded, kernels) = std::thread::scope(|scope| {
        let kernels = scope.spawn(kernels);
        let loaded = backend.load(&part(&graph), &mut |progress| {
            bar.set_length(progress.total_bytes as u64);
            bar.set_position(progress.done_bytes as u64);
        });
        ahead.stop();
        (loaded, kernels.join().unwrap_or_else(|panic| resume_unwind(panic)))
    });
    loaded?;
    backend.keep(kernels)?;
    bar.finish_and_clear();
    Ok(backend)
}

/// A step of so many tokens of one sequence, of which the last one's logits are wanted, or all hidden states.
fn first_shape(params: &ContextParams, n_tokens: usize, prompt: bool) -> StepShape {
    let n_outputs = if params.embeddings { n_tokens } else { 1 };
    StepShape { prompt, taps: false, ..params.step(n_tokens, n_outputs) }
}

/// The steps that come first in most cases, with the positions of their tokens: a prompt, then an answer's token.
fn first_steps(model: &Model, params: &ContextParams, apart: bool) -> Vec<(Graph, Range<usize>)> {
    let n_prompt = FIRST_PROMPT.min(params.n_ubatch).min(params.n_ctx);
    let step = |positions: Range<usize>, prompt| {
        (model.graph(params.n_ctx, first_shape(params, positions.len(), prompt)), positions)
    };
    let mut steps = vec![step(0..n_prompt, apart)];
    if !params.embeddings {
        steps.push(step(n_prompt..n_prompt + 1, false));
    }
    steps
}

impl Plan {
    /// Whether the CPU has a part.
    fn has_host(&self) -> bool {
        self.n <= self.n_layer || self.on_host.0 > 0
    }

    /// Devices by index: the CPU first if it has a part, then the GPUs.
    fn placement(&self) -> Placement {
        let ranges: Vec<Range<usize>> = self.gpus.iter().map(|planned| planned.layers.clone()).collect();
        let host = self.has_host();
        let device = |site: &Site| match site {
            Site::Host => 0,
            Site::Gpu(gpu) => gpu + usize::from(host),
        };
        Placement {
            tensors: self.sites.iter().map(|(id, site)| (*id, device(site))).collect(),
            // The first GPU's share has the room.
            offload: self.offload.then_some(Offload { from: 0, to: 1 }),
            ..Placement::ranges(self.n_layer, &ranges, host, self.n > self.n_layer)
        }
    }

    /// A line per device.
    pub fn lines(&self) -> impl Iterator<Item = String> + '_ {
        let gpus = self.gpus.iter().map(|Planned { gpu, layers, share, free_bytes }| {
            let on = match (self.gpus.len(), self.n > self.n_layer) {
                (1, true) => "all layers".to_owned(),
                _ => format!("{} of {} layers", layers.len(), self.n_layer),
            };
            let name = gpu.device.info().name;
            format!("{} ({name}): {on}, {}, {} free", gpu.name, parts(share), ui::bytes(*free_bytes))
        });
        let (n, bytes) = self.on_host;
        let host = format!("cpu: {n} tensor(s) kept there, {}", ui::bytes(bytes));
        gpus.chain((n > 0).then_some(host))
    }

    /// The same as JSON, an object per GPU.
    pub fn json(&self) -> Value {
        let gpu = |Planned { gpu, layers, share, free_bytes }: &Planned| {
            json!({
                "name": gpu.name,
                "description": gpu.device.info().name,
                "layers": layers.len(),
                "weights_bytes": share.weights,
                "kv_cache_bytes": share.kv_cache,
                "activations_bytes": share.activations,
                "brought_bytes": share.brought,
                "pinned_host_bytes": share.pinned,
                "free_bytes": free_bytes,
            })
        };
        self.gpus.iter().map(gpu).collect()
    }
}

/// The GPUs that the arguments name; none if the host's processor is to compute, or has to.
fn gpus(args: &PlacementArgs) -> Result<Vec<Gpu>> {
    let (devices, require_gpu) = (&args.device[..], args.require_gpu);
    for (i, device) in devices.iter().enumerate() {
        match device {
            Device::Auto | Device::Cpu if devices.len() > 1 => {
                return Err(usage(
                    "--device: only GPUs share a model by name; the CPU takes what -ngl leaves",
                ));
            }
            Device::Cuda(index) if devices[..i].contains(device) => {
                return Err(usage(format!("--device: cuda:{index} twice")));
            }
            _ => {}
        }
    }
    let mut gpus = Vec::with_capacity(devices.len());
    for device in devices {
        let (name, opened) = match device {
            Device::Cpu if require_gpu => bail!("--require-gpu: --device cpu computes on the CPU"),
            Device::Cpu => return Ok(Vec::new()),
            Device::Auto => (Device::Cuda(0).to_string(), open(0)),
            Device::Emu => (device.to_string(), emulator()),
            Device::Cuda(index) => (device.to_string(), open(*index)),
        };
        match opened {
            Ok(device) => gpus.push(Gpu { name, device }),
            Err(why) if require_gpu => bail!("--require-gpu: {why}"),
            Err(why) => {
                // Only a user who asked for a GPU is told that there is none.
                let wanted = args.gpu_layers.is_some_and(|layers| layers != GpuLayers::Last(0));
                if *device != Device::Auto || wanted {
                    let instead = if devices.len() == 1 {
                        "all layers are on the CPU"
                    } else {
                        "its layers are elsewhere"
                    };
                    ui::say(format!("{name}: {why}; {instead}"));
                }
            }
        }
    }
    Ok(gpus)
}

/// Memory that nobody uses on each.
fn free_bytes(gpus: &[Gpu]) -> Vec<u64> {
    let free = |gpu: &Gpu| gpu.device.free_bytes().unwrap_or_else(|_| gpu.device.info().memory_bytes);
    gpus.iter().map(free).collect()
}

/// The NVIDIA GPUs beside the first; what cannot be opened is left out, and said.
fn other_gpus() -> Vec<Gpu> {
    let name = |index: u32| format!("cuda:{index}");
    let gpu = |index| match open(index) {
        Ok(device) => Some(Gpu { name: name(index), device }),
        Err(why) => {
            ui::say(format!("{}: {why}; its layers are elsewhere", name(index)));
            None
        }
    };
    (1..count()).filter_map(gpu).collect()
}

/// Where the memory goes.
fn parts(share: &Share) -> String {
    let brought = match share.brought {
        0 => String::new(),
        bytes => format!(
            ", weights of the host in turns {} (up to {} of them pinned there)",
            ui::bytes(bytes),
            ui::bytes(share.pinned)
        ),
    };
    format!(
        "weights {}, cache {}, activations {}{brought}",
        ui::bytes(share.weights),
        ui::bytes(share.kv_cache),
        ui::bytes(share.activations)
    )
}

/// The CPU backend. `RUNIK_ISA` names the instruction set, for tests on machines that have several.
fn cpu(model: &Model, pool: Arc<dyn Executor>) -> Result<Box<dyn Backend>> {
    let isa = match std::env::var("RUNIK_ISA").ok().filter(|name| !name.is_empty()) {
        None => Isa::detect(),
        Some(name) => Isa::from_name(&name).ok_or_else(|| {
            let names: Vec<_> = Isa::available().map(Isa::name).collect();
            usage(format!("RUNIK_ISA={name}: this machine has {}", names.join(", ")))
        })?,
    };
    Ok(Box::new(Cpu::new(model.weights().clone(), pool, isa)))
}

/// An NVIDIA GPU, if this build, this machine and its driver have one.
pub fn open(index: u32) -> Result<cuda::Device, String> {
    #[cfg(feature = "cuda")]
    {
        if !cuda::has_kernels() {
            return Err("this build has no GPU kernels (feature ptx)".to_owned());
        }
        match cuda::hosted::Hosted::open(index) {
            Ok(device) => Ok(Arc::new(device)),
            Err(error) => Err(error.to_string()),
        }
    }
    #[cfg(not(feature = "cuda"))]
    {
        let _ = index;
        Err("this build is without the feature cuda".to_owned())
    }
}

/// Names of the backends that this build can compute with, whether or not the machine has the device.
pub fn backends() -> Vec<&'static str> {
    let cuda = cfg!(feature = "cuda") && cuda::has_kernels();
    let built_in = [("cpu", true), ("cuda", cuda), ("emu", cfg!(feature = "emu"))];
    built_in.into_iter().filter(|(_, is_in)| *is_in).map(|(name, _)| name).collect()
}

/// NVIDIA GPUs there are.
fn count() -> u32 {
    #[cfg(feature = "cuda")]
    {
        cuda::hosted::devices().map_or(0, |devices| devices.len() as u32)
    }
    #[cfg(not(feature = "cuda"))]
    0
}

/// The emulated GPU, if this build has it.
fn emulator() -> Result<cuda::Device, String> {
    #[cfg(feature = "emu")]
    {
        use engine::backends::cuda::emulator;
        Ok(emulator())
    }
    #[cfg(not(feature = "emu"))]
    Err("this build is without the feature emu".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_a_number_auto_or_all() {
        assert_eq!(GpuLayers::parse("12"), Ok(GpuLayers::Last(12)));
        assert_eq!(GpuLayers::parse("auto"), Ok(GpuLayers::Auto));
        assert_eq!(GpuLayers::parse("-1"), Ok(GpuLayers::All));
        assert!(GpuLayers::parse("-2").is_err() && GpuLayers::parse("some").is_err());
    }
}
