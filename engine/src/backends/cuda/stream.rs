//! A GPU that multiplies with weights it does not keep: products of prompts with weights in host memory, brought layer by
//! layer as they are needed ([`Offload`](crate::backends::split::Offload)).
//!
//! * There are two areas, which layers take in turns, so the next layer's weights are on their way while this one's
//!   products run ([`Backend::prefetch`]). A weight's place in its area is fixed: launches, and graphs of them, name it.
//! * Of as many layers as the caller allows there are tiled copies in pinned memory, made at the start by way of the
//!   areas. Their weights come by plain copies, which the host only queues. The others come through the staging's buffers
//!   and are tiled on the way, as at load.
//! * Both come part by part, one part ahead, and not layer by layer: copies of one direction follow each other, so a
//!   product's activations would wait for all weights that were queued before.
//! * All this is on streams of its own. Events say when a part's weights are there, and when an area's readers are done.
//! * What is there stays until another layer needs the area: one or two layers are brought once.

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use gpu_kernels::driver::{DriverError, MemKind, StreamId};

use super::Cuda;
use super::memory::{Device, Mark, Memory, Queue};
use super::translate::{self, WeightKey};
use super::weights::{DeviceWeights, Staging};
use crate::backend::{Backend, BackendInfo, PlanId, Step};
use crate::error::EngineError;
use crate::graph::{Graph, Node};
use crate::kv_cache::KvLayout;
use crate::plan::Plan;
use crate::sampler::Sampler;
use crate::tensor::TensorId;

/// The GPU backend with weights that come and go.
pub struct Streaming {
    /// First, so that these two go first: they wait for copies that use the rest.
    staging: Staging,
    copies: Queue,
    cuda: Cuda,
    layers: Vec<Layer>,
    /// Layer, counted among those that are brought, of each weight.
    layer_of: BTreeMap<WeightKey, usize>,
    areas: [Area; 2],
    /// What plans need of it, all of one layer.
    plans: BTreeMap<usize, Vec<WeightKey>>,
}

/// What is brought for a layer.
struct Layer {
    /// In the order in which they are needed.
    weights: Vec<Part>,
    bytes: usize,
    /// As the area has it, in pinned memory.
    copy: Option<Memory>,
}

/// A weight's place in an area, and in the copy.
#[derive(Clone, Copy)]
struct Part {
    key: WeightKey,
    offset: u64,
    bytes: u64,
}

/// Room for the weights of a layer.
struct Area {
    memory: Memory,
    /// Whose weights are in it.
    layer: Option<usize>,
    present: Vec<Present>,
    /// Nobody reads what is in it after this.
    read: Option<Mark>,
}

/// Weights that are in an area once these streams have come so far.
struct Present {
    keys: Vec<WeightKey>,
    filled: Vec<Mark>,
}

impl Area {
    /// Makes it a layer's. What this stream does from now on comes after all that read or filled it for another.
    fn turn_to(&mut self, layer: usize, device: &Device, stream: StreamId) -> Result<(), DriverError> {
        if self.layer == Some(layer) {
            return Ok(());
        }
        self.layer = None;
        for mark in self.read.iter().chain(self.present.iter().flat_map(|present| &present.filled)) {
            device.wait(stream, mark.id)?;
        }
        self.present.clear();
        self.layer = Some(layer);
        Ok(())
    }

    fn has(&self, key: WeightKey) -> bool {
        self.present.iter().any(|present| present.keys.contains(&key))
    }
}

impl Streaming {
    /// Of a backend, with room for the weights of these graphs' nodes: a layer each, in the order in which they run.
    /// Copies take at most `pinned_bytes` of the host's memory, and fewer where the system refuses them.
    pub fn new(mut cuda: Cuda, layers: &[Graph], pinned_bytes: u64) -> Result<Streaming, EngineError> {
        let mut layers: Vec<Layer> =
            layers.iter().map(|graph| Layer::new(cuda.weights.source(), graph)).collect();
        let most = layers.iter().map(|layer| layer.bytes).max().unwrap_or(0);
        let area = || {
            let memory = Memory::new(&cuda.device, MemKind::Device, most)?;
            Ok::<_, EngineError>(Area { memory, layer: None, present: Vec::new(), read: None })
        };
        let areas = [area()?, area()?];
        let mut layer_of = BTreeMap::new();
        for (l, layer) in layers.iter().enumerate() {
            for part in &layer.weights {
                layer_of.insert(part.key, l);
                cuda.weights.lend(part.key, areas[l % 2].memory.at().offset(part.offset));
            }
        }
        for (l, layer) in layers.iter_mut().enumerate() {
            // One that two layers have is the last one's.
            layer.weights.retain(|part| layer_of[&part.key] == l);
        }
        let brought: Vec<WeightKey> = layer_of.keys().copied().collect();
        let (staging, copies) = (cuda.weights.staging(&brought)?, Queue::new(&cuda.device)?);
        let mut streaming =
            Streaming { staging, copies, cuda, layers, layer_of, areas, plans: BTreeMap::new() };
        streaming.copy_layers(pinned_bytes)?;
        Ok(streaming)
    }

    /// Bytes of device memory for weights that come and go.
    pub fn area_bytes(&self) -> usize {
        self.areas.iter().map(|area| area.memory.bytes()).sum()
    }

    /// Bytes of pinned host memory for copies of such weights.
    pub fn pinned_bytes(&self) -> usize {
        self.layers.iter().filter_map(|layer| layer.copy.as_ref()).map(Memory::bytes).sum()
    }

    /// Bytes that are brought for a graph's nodes.
    pub fn brought_bytes(&self, graph: &Graph) -> usize {
        let mut keys = translate::weights_of(graph);
        keys.retain(|key| self.layer_of.contains_key(key));
        keys.iter().map(|key| DeviceWeights::device_bytes(self.cuda.weights.source(), *key)).sum()
    }

    /// Makes pinned copies of layers, in order, as long as there is memory for them.
    fn copy_layers(&mut self, mut pinned_bytes: u64) -> Result<(), EngineError> {
        let device = self.cuda.device.clone();
        for l in 0..self.layers.len() {
            let bytes = self.layers[l].bytes;
            if bytes as u64 > pinned_bytes {
                break;
            }
            let copy = match Memory::new(&device, MemKind::Host, bytes) {
                Ok(copy) => copy,
                // What is too much to pin is not too much to bring.
                Err(DriverError::OutOfMemory { .. }) => break,
                Err(error) => return Err(error.into()),
            };
            pinned_bytes -= bytes as u64;
            let keys: Vec<WeightKey> = self.layers[l].weights.iter().map(|part| part.key).collect();
            self.stage(l, &keys)?;
            let area = &mut self.areas[l % 2];
            for mark in area.present.iter().flat_map(|present| &present.filled) {
                device.wait(self.copies.id, mark.id)?;
            }
            // The device's padding between weights is copied too, whatever it is.
            device.copy(copy.at(), area.memory.at(), bytes as u64, self.copies.id)?;
            self.layers[l].copy = Some(copy);
            area.read = Some(Mark::on(&device, self.copies.id)?);
        }
        Ok(device.synchronise(self.copies.id)?)
    }

    /// Queues the copies of what a plan needs and is not there; the index of its area, if it needs any.
    fn bring(&mut self, plan: PlanId) -> Result<Option<usize>, EngineError> {
        let Some(keys) = self.plans.get(&plan.0) else { return Ok(None) };
        let layer = self.layer_of[&keys[0]];
        let keys = keys.clone();
        if self.layers[layer].copy.is_some() {
            self.fetch(layer, &keys)?;
        } else {
            self.stage(layer, &keys)?;
        }
        Ok(Some(layer % 2))
    }

    /// Brings weights of a layer from pinned memory, those that are not there.
    fn fetch(&mut self, l: usize, keys: &[WeightKey]) -> Result<(), DriverError> {
        let (device, stream) = (&self.cuda.device, self.copies.id);
        let (layer, area) = (&self.layers[l], &mut self.areas[l % 2]);
        let Some(copy) = &layer.copy else { return Ok(()) };
        area.turn_to(l, device, stream)?;
        let is_missing = |part: &&Part| keys.contains(&part.key) && !area.has(part.key);
        let missing: Vec<Part> = layer.weights.iter().filter(is_missing).copied().collect();
        if missing.is_empty() {
            return Ok(());
        }
        let copied = missing.iter().try_for_each(|part| {
            let (to, from) = (area.memory.at().offset(part.offset), copy.at().offset(part.offset));
            device.copy(to, from, part.bytes, stream)
        });
        match copied.and_then(|()| Mark::on(device, stream)) {
            Ok(mark) => {
                let keys = missing.iter().map(|part| part.key).collect();
                area.present.push(Present { keys, filled: alloc::vec![mark] });
                Ok(())
            }
            Err(error) => {
                // Nobody could wait for what is under way, so it ends here.
                let _ = device.synchronise(stream);
                Err(error)
            }
        }
    }

    /// Brings weights of a layer from the file, those that are not there.
    fn stage(&mut self, l: usize, keys: &[WeightKey]) -> Result<(), EngineError> {
        let device = self.cuda.device.clone();
        let area = &mut self.areas[l % 2];
        area.turn_to(l, &device, self.copies.id)?;
        let missing: Vec<WeightKey> = keys.iter().copied().filter(|key| !area.has(*key)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        // One stream has waited for the area, the staging's wait for it.
        self.staging.after(Mark::on(&device, self.copies.id)?);
        let copied = self.cuda.weights.bring(&missing, &self.staging, &mut self.cuda.modules);
        match copied.and_then(|()| Ok(self.staging.marks()?)) {
            Ok(filled) => area.present.push(Present { keys: missing, filled }),
            Err(error) => {
                // As in `fetch`.
                let _ = self.staging.finish();
                return Err(error);
            }
        }
        Ok(())
    }
}

impl Layer {
    /// What a graph's nodes need.
    fn new(source: &crate::weights::Weights, graph: &Graph) -> Layer {
        let mut bytes = 0;
        let mut weights: Vec<Part> = Vec::new();
        for key in translate::weights_of(graph) {
            let of_key = DeviceWeights::device_bytes(source, key);
            weights.push(Part { key, offset: bytes as u64, bytes: of_key as u64 });
            bytes += of_key;
        }
        Layer { weights, bytes, copy: None }
    }
}

impl Backend for Streaming {
    fn info(&self) -> BackendInfo {
        self.cuda.info()
    }

    fn supports(&self, graph: &Graph, node: &Node) -> Result<(), String> {
        self.cuda.supports(graph, node)
    }

    fn runs_prompts_apart(&self) -> bool {
        self.cuda.runs_prompts_apart()
    }

    fn create_kv(&mut self, layout: &KvLayout) -> Result<(), EngineError> {
        self.cuda.create_kv(layout)
    }

    fn prepare(&mut self, plan: Arc<Plan>) -> Result<PlanId, EngineError> {
        let mut keys = translate::weights_of(&plan.graph);
        keys.retain(|key| self.layer_of.contains_key(key));
        let layer = |key: &WeightKey| self.layer_of[key];
        assert!(keys.windows(2).all(|k| layer(&k[0]) == layer(&k[1])), "a plan with weights of two layers");
        let id = self.cuda.prepare(plan)?;
        if !keys.is_empty() {
            self.plans.insert(id.0, keys);
        }
        Ok(id)
    }

    fn release(&mut self, plan: PlanId) {
        self.plans.remove(&plan.0);
        self.cuda.release(plan);
    }

    fn prefetch(&mut self, plan: PlanId) -> Result<(), EngineError> {
        self.bring(plan).map(drop)
    }

    fn run(&mut self, plan: PlanId, step: &Step<'_>) -> Result<(), EngineError> {
        let Some(area) = self.bring(plan)? else { return self.cuda.run(plan, step) };
        let device = self.cuda.device.clone();
        let keys = &self.plans[&plan.0];
        let needed = |present: &&Present| present.keys.iter().any(|key| keys.contains(key));
        for mark in self.areas[area].present.iter().filter(needed).flat_map(|present| &present.filled) {
            device.wait(StreamId::DEFAULT, mark.id)?;
        }
        let result = self.cuda.run(plan, step);
        // Also after a failure: some of it may be under way.
        self.areas[area].read = Some(Mark::on(&device, StreamId::DEFAULT)?);
        result
    }

    fn read(&mut self, plan: PlanId, tensor: TensorId, out: &mut [f32]) -> Result<(), EngineError> {
        self.cuda.read(plan, tensor, out)
    }

    fn sample(
        &mut self,
        plan: PlanId,
        logits: TensorId,
        samplers: &mut [&mut Sampler],
        tokens: &mut [u32],
    ) -> Result<bool, EngineError> {
        self.cuda.sample(plan, logits, samplers, tokens)
    }
}
