//! Where a model is computed: the device that the user names or that is there, how many layers go to it, and what is
//! said about it. A GPU that is missing is no silent matter: a line says that the CPU computes, and `--require-gpu` makes
//! it an error.

use std::ops::Range;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use engine::backend::Backend;
use engine::backends::cpu::{Cpu, Isa};
use engine::backends::cuda::needs::Share;
use engine::backends::cuda::{self, Cuda, Needs};
use engine::backends::split::{Placement, Split};
use engine::models::StepShape;
use engine::pool::Pool;
use engine::{ContextParams, Executor, Model};

use crate::args::{Device, GpuLayers};
use crate::exit::usage;
use crate::ui;

/// A GPU, real or emulated.
pub struct Gpu {
    /// What the user calls it.
    name: String,
    /// Its driver.
    device: cuda::Device,
}

/// What was found to compute on.
pub enum Compute {
    /// The host's processor.
    Cpu,
    /// GPUs.
    Gpus {
        /// In the order in which they get layers; one at least.
        gpus: Vec<Gpu>,
        /// Layers that go to them.
        layers: GpuLayers,
        /// Whether others may join where these have too little memory.
        others: bool,
        /// Whether the CPU alone will not do.
        required: bool,
    },
}

impl Compute {
    /// The devices that the arguments come to.
    pub fn choose(devices: &[Device], layers: Option<GpuLayers>, require_gpu: bool) -> Result<Compute> {
        if layers == Some(GpuLayers::Last(0)) && !require_gpu {
            return Ok(Compute::Cpu);
        }
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
                Device::Cpu => return Ok(Compute::Cpu),
                Device::Auto => ("cuda:0".to_owned(), open(0)),
                Device::Emu => ("emu".to_owned(), emulator()),
                Device::Cuda(index) => (format!("cuda:{index}"), open(*index)),
            };
            match opened {
                Ok(device) => gpus.push(Gpu { name, device }),
                Err(why) if require_gpu => bail!("--require-gpu: {why}"),
                Err(why) => {
                    // Who asked for a GPU is told; who did not gets what there is.
                    if *device != Device::Auto || layers.is_some() {
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
        if gpus.is_empty() {
            return Ok(Compute::Cpu);
        }
        let others = devices == [Device::Auto];
        let layers = layers.unwrap_or(GpuLayers::Auto);
        Ok(Compute::Gpus { gpus, layers, others, required: require_gpu })
    }

    /// Bytes a second that the first device's memory moves, measured; `None` for the CPU.
    pub fn peak_bytes_per_s(&self) -> Result<Option<f64>> {
        match self {
            Compute::Cpu => Ok(None),
            Compute::Gpus { gpus, .. } => Ok(Some(cuda::copy_bytes_per_s(&gpus[0].device)?)),
        }
    }

    /// The devices' names, for reports; empty for the CPU.
    pub fn gpu_name(&self) -> String {
        match self {
            Compute::Cpu => String::new(),
            Compute::Gpus { gpus, .. } => {
                gpus.iter().map(|gpu| gpu.device.info().name).collect::<Vec<_>>().join(" + ")
            }
        }
    }

    /// A backend for a model, its weights in place.
    pub fn backend(&self, model: &Model, params: &ContextParams, threads: usize) -> Result<Box<dyn Backend>> {
        let pool = Pool::new(threads).with_context(|| format!("starting {threads} threads"))?;
        let pool: Arc<dyn Executor> = Arc::new(pool);
        let Compute::Gpus { gpus, layers, others, required } = self else { return cpu(model, pool) };
        let needs = Needs::of(model, params, &gpus[0].device.info())?;
        let n_layer = needs.n_layer();
        let mut gpus: Vec<&Gpu> = gpus.iter().collect();
        let mut fits = needs.most_layers(&free_bytes(&gpus));
        // The first GPU alone, or all there are.
        let enough = match *layers {
            GpuLayers::Last(n) => n.min(n_layer + 1) <= fits,
            GpuLayers::Auto | GpuLayers::All => fits > n_layer,
        };
        let more = if *others && !enough { other_gpus() } else { Vec::new() };
        gpus.extend(&more);
        let free = free_bytes(&gpus);
        if !more.is_empty() {
            fits = needs.most_layers(&free);
        }
        let n = match *layers {
            GpuLayers::Auto => fits,
            GpuLayers::All => n_layer + 1,
            GpuLayers::Last(n) => n.min(n_layer + 1),
        };
        let names = gpus.iter().map(|gpu| gpu.name.as_str()).collect::<Vec<_>>().join(", ");
        let free_text = free.iter().map(|&free| ui::bytes(free)).collect::<Vec<_>>().join(" + ");
        if n == 0 {
            let why = match layers {
                GpuLayers::Last(_) => "-ngl 0 leaves it no layer".to_owned(),
                _ => format!("not even one layer fits into {free_text} free"),
            };
            if *required {
                bail!("--require-gpu: {names}: {why}");
            }
            ui::say(format!("{names}: {why}; all are on the CPU"));
            return cpu(model, pool);
        }
        let Some(ranges) = needs.spread(n, &free) else {
            bail!(
                "{} do not fit on {names}: {}, {free_text} free; -ngl {fits} does, a shorter context (-c) or a smaller \
                 cache type (-ctk, -ctv) may",
                if n > n_layer { "all layers".to_owned() } else { format!("{n} layers") },
                parts(&needs.share(n)),
            );
        };
        // A GPU without a layer has nothing to do.
        let chosen = gpus.iter().zip(&ranges).zip(&free).filter(|((_, range), _)| !range.is_empty());
        let chosen: Vec<((&Gpu, Range<usize>), u64)> =
            chosen.map(|((gpu, range), free)| ((*gpu, range.clone()), *free)).collect();
        for ((gpu, range), free) in &chosen {
            let on = match (chosen.len(), n > n_layer) {
                (1, true) => "all layers".to_owned(),
                _ => format!("{} of {n_layer} layers", range.len()),
            };
            // Of one device the plan is that of all its layers, which is what `share` knows.
            let share =
                if chosen.len() == 1 { format!("{}, ", parts(&needs.share(n))) } else { String::new() };
            let name = gpu.device.info().name;
            let plan = format!("{} ({name}): {on}, {share}{} free", gpu.name, ui::bytes(*free));
            if n > n_layer { ui::detail(plan) } else { ui::say(plan) }
        }

        let host = n <= n_layer;
        let (gpus, ranges): (Vec<&Gpu>, Vec<Range<usize>>) = chosen.into_iter().map(|(of, _)| of).unzip();
        let placement = Placement::ranges(n_layer, &ranges, host);
        let mut backends = if host { vec![cpu(model, pool.clone())?] } else { Vec::new() };
        let shape = StepShape {
            n_tokens: 1,
            n_outputs: 1,
            embeddings: params.embeddings,
            greedy: false,
            taps: false,
            prompt: false,
        };
        let graph = model.graph(params.n_ctx, shape);
        for gpu in &gpus {
            let mut backend = Cuda::new(gpu.device.clone(), pool.clone(), model.weights().clone());
            let bar = ui::bytes_bar(0, &format!("to {}", gpu.name));
            let part = placement.part(&graph, model.weights(), backends.len());
            backend.load(&part, &mut |progress| {
                bar.set_length(progress.total_bytes as u64);
                bar.set_position(progress.done_bytes as u64);
            })?;
            bar.finish_and_clear();
            backends.push(Box::new(backend));
        }
        match backends.len() {
            1 => Ok(backends.remove(0)),
            _ => Ok(Box::new(Split::new(backends, placement, model.weights().clone()))),
        }
    }
}

/// Memory that nobody uses on each.
fn free_bytes(gpus: &[&Gpu]) -> Vec<u64> {
    let free = |gpu: &&Gpu| gpu.device.free_bytes().unwrap_or_else(|_| gpu.device.info().memory_bytes);
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
    format!(
        "weights {}, cache {}, activations {}",
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
fn open(index: u32) -> Result<cuda::Device, String> {
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
