//! Where a model is computed: the device that the user names or that is there, how many layers go to it, and what is
//! said about it. A GPU that is missing is no silent matter: a line says that the CPU computes, and `--require-gpu` makes
//! it an error.

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

/// A device that was found.
pub enum Compute {
    /// The host's processor.
    Cpu,
    /// A GPU, real or emulated.
    Gpu {
        /// What the user calls it.
        name: String,
        /// Its driver.
        device: cuda::Device,
        /// Layers that go to it.
        layers: GpuLayers,
        /// Whether steps of one token are one launch: [`Cuda::with_step`].
        step_ahead_bytes: Option<u64>,
    },
}

impl Compute {
    /// The device that the arguments come to.
    pub fn choose(device: Device, layers: Option<GpuLayers>, require_gpu: bool) -> Result<Compute> {
        if layers == Some(GpuLayers::Last(0)) && !require_gpu {
            return Ok(Compute::Cpu);
        }
        let (name, opened) = match device {
            Device::Cpu if require_gpu => bail!("--require-gpu: --device cpu computes on the CPU"),
            Device::Cpu => return Ok(Compute::Cpu),
            Device::Emu => ("emu".to_owned(), emulator()),
            Device::Auto => ("cuda:0".to_owned(), open(0)),
            Device::Cuda(index) => (format!("cuda:{index}"), open(index)),
        };
        match opened {
            Ok(device) => {
                let layers = layers.unwrap_or(GpuLayers::Auto);
                Ok(Compute::Gpu { name, device, layers, step_ahead_bytes: None })
            }
            Err(why) if require_gpu => bail!("--require-gpu: {why}"),
            Err(why) => {
                // Who asked for a GPU is told; who did not gets what there is.
                if device != Device::Auto || layers.is_some() {
                    ui::say(format!("{name}: {why}; all layers are on the CPU"));
                }
                Ok(Compute::Cpu)
            }
        }
    }

    /// The same with steps of one token as one launch: [`Cuda::with_step`].
    #[must_use]
    pub fn with_step(mut self, ahead_bytes: Option<u64>) -> Compute {
        if let Compute::Gpu { step_ahead_bytes, .. } = &mut self {
            *step_ahead_bytes = ahead_bytes;
        }
        self
    }

    /// Bytes a second that the device's memory moves, measured; `None` for the CPU.
    pub fn peak_bytes_per_s(&self) -> Result<Option<f64>> {
        match self {
            Compute::Cpu => Ok(None),
            Compute::Gpu { device, .. } => Ok(Some(cuda::copy_bytes_per_s(device)?)),
        }
    }

    /// The device's name, for reports; empty for the CPU.
    pub fn gpu_name(&self) -> String {
        match self {
            Compute::Cpu => String::new(),
            Compute::Gpu { device, .. } => device.info().name,
        }
    }

    /// A backend for a model, its weights in place.
    pub fn backend(&self, model: &Model, params: &ContextParams, threads: usize) -> Result<Box<dyn Backend>> {
        let pool = Pool::new(threads).with_context(|| format!("starting {threads} threads"))?;
        let pool: Arc<dyn Executor> = Arc::new(pool);
        let Compute::Gpu { name, device, layers, step_ahead_bytes } = self else { return cpu(model, pool) };
        let info = device.info();
        let needs = Needs::of(model, params, &info)?;
        let (n_layer, free) = (needs.n_layer(), device.free_bytes().unwrap_or(info.memory_bytes));
        let fits = needs.most_layers(free);
        let n = match *layers {
            GpuLayers::Auto => fits,
            GpuLayers::All => n_layer + 1,
            GpuLayers::Last(n) => n.min(n_layer + 1),
        };
        if n > fits {
            bail!(
                "{} do not fit on {name}: {}, {} free; -ngl {fits} does, a shorter context (-c) or a smaller cache \
                 type (-ctk, -ctv) may",
                if n > n_layer { "all layers".to_owned() } else { format!("{n} layers") },
                parts(&needs.share(n)),
                ui::bytes(free),
            );
        }
        if n == 0 {
            ui::say(format!(
                "{name}: not even one layer fits into {} free; all are on the CPU",
                ui::bytes(free)
            ));
            return cpu(model, pool);
        }
        let on = if n > n_layer { "all layers".to_owned() } else { format!("{n} of {n_layer} layers") };
        let plan =
            format!("{name} ({}): {on}, {}, {} free", info.name, parts(&needs.share(n)), ui::bytes(free));
        if n > n_layer {
            ui::detail(plan)
        } else {
            ui::say(plan)
        }

        let mut gpu =
            Cuda::new(device.clone(), pool.clone(), model.weights().clone()).with_step(*step_ahead_bytes);
        let placement = Placement::last_layers(n_layer, n);
        let shape = StepShape {
            n_tokens: 1,
            n_outputs: 1,
            embeddings: params.embeddings,
            greedy: false,
            taps: false,
        };
        let graph = placement.part(&model.graph(params.n_ctx, shape), model.weights(), 1);
        let bar = ui::bytes_bar(0, "to the GPU");
        gpu.load(&graph, &mut |progress| {
            bar.set_length(progress.total_bytes as u64);
            bar.set_position(progress.done_bytes as u64);
        })?;
        bar.finish_and_clear();
        if n > n_layer {
            return Ok(Box::new(gpu));
        }
        let backends = vec![cpu(model, pool)?, Box::new(gpu) as Box<dyn Backend>];
        Ok(Box::new(Split::new(backends, placement, model.weights().clone())))
    }
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
