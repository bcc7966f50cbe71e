//! A GPU that multiplies with weights it does not keep: products of prompts with weights in host memory, which are copied
//! to the device layer by layer when they are needed ([`Offload`](crate::backends::split::Offload)).
//!
//! * There are two areas of device memory, and layers use them in turn, so the next layer's weights are on their way while
//!   this one's products run ([`Backend::prefetch`]). A weight has a fixed place in its area, because launches, and graphs
//!   of launches, contain its address.
//! * For as many layers as the caller allows there are tiled copies in pinned memory, made when the backend is made, by
//!   way of the areas. The weights of these layers come by plain copies, which cost the host nothing but queueing them.
//!   Those of the other layers come through the staging buffers and are tiled on the way, as at load.
//! * Weights are copied one part of the graph ahead, not one layer ahead: copies of one direction run one after the other,
//!   so a product's activations would wait for all weights queued before them.
//! * All copies are on streams of their own. Events say when a part's weights have arrived, and when the work that reads an
//!   area is done.
//! * Weights stay in an area until another layer needs it, so with one or two layers they are copied once.

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
    /// Each weight's index into `layers`.
    layer_of: BTreeMap<WeightKey, usize>,
    areas: [Area; 2],
    /// Weights that each plan needs, all of one layer.
    plans: BTreeMap<usize, Vec<WeightKey>>,
}

/// The weights of a layer that are copied when they are needed.
struct Layer {
    /// In the order in which they are needed.
    weights: Vec<Part>,
    bytes: usize,
    /// The area's contents for this layer, in pinned memory.
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
    /// The layer whose weights are in it.
    layer: Option<usize>,
    present: Vec<Present>,
    /// After this event nothing reads the area any more.
    read: Option<Mark>,
}

/// Weights that are in an area once these events have happened.
struct Present {
    keys: Vec<WeightKey>,
    filled: Vec<Mark>,
}

impl Area {
    /// Gives the area to a layer. Work queued on `stream` from now on waits for all that filled or read the area for another
    /// layer.
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
    /// Adds to a backend the areas for the weights that the nodes of these graphs need; each graph is a layer, in the order
    /// in which layers run. Pinned copies take at most `pinned_bytes` of host memory, less if the system grants less.
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
            // A weight that two layers use belongs to the later one.
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
                // The rest is brought from the file.
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

    /// Queues copies of the weights that a plan needs and its area does not have. Returns the area's index, or `None` if the
    /// plan needs no such weights.
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

    /// Queues copies of a layer's missing weights from pinned memory.
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
                // Nothing could wait for the copies under way later on, so they are waited for here.
                let _ = device.synchronise(stream);
                Err(error)
            }
        }
    }

    /// Queues copies of a layer's missing weights from the file.
    fn stage(&mut self, l: usize, keys: &[WeightKey]) -> Result<(), EngineError> {
        let device = self.cuda.device.clone();
        let area = &mut self.areas[l % 2];
        area.turn_to(l, &device, self.copies.id)?;
        let missing: Vec<WeightKey> = keys.iter().copied().filter(|key| !area.has(*key)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        // The copy stream has waited for the area; the staging's streams wait for the copy stream.
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
