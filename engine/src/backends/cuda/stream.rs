//! A GPU that multiplies with weights it does not keep: products of prompts with weights in host memory, brought layer by
//! layer as they are needed ([`Offload`](crate::backends::split::Offload)).
//!
//! * There are two areas, which layers take in turns, so the next layer's weights are on their way while this one's
//!   products run ([`Backend::prefetch`]). A weight's place in its area is fixed: launches, and graphs of them, name it.
//! * They come through the pinned buffers and are tiled on the way, as at load, on streams of their own. Events say when a
//!   part's weights are there, and when an area's readers are done with it.
//! * What is there stays until another layer needs the area: one or two layers are brought once.

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use gpu_kernels::driver::{MemKind, StreamId};
use gpu_kernels::launch::DevicePtr;

use super::Cuda;
use super::memory::{Mark, Memory};
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
    /// First, so that it goes first: it waits for copies that use the rest.
    staging: Staging,
    cuda: Cuda,
    /// Layer, counted among those that are brought, and place of each weight.
    places: BTreeMap<WeightKey, (usize, DevicePtr)>,
    areas: [Area; 2],
    /// What plans need of it, all of one layer.
    plans: BTreeMap<usize, Vec<WeightKey>>,
}

/// Room for the weights of a layer.
struct Area {
    memory: Memory,
    /// Whose weights are in it.
    layer: Option<usize>,
    present: Vec<WeightKey>,
    /// They are there once these streams have come so far.
    filled: Vec<Mark>,
    /// Nobody reads what is in it after this.
    read: Option<Mark>,
}

impl Streaming {
    /// Of a backend, with room for the weights of these graphs' nodes: a layer each, in the order in which they run.
    pub fn new(mut cuda: Cuda, layers: &[Graph]) -> Result<Streaming, EngineError> {
        let layers: Vec<Vec<WeightKey>> = layers.iter().map(translate::weights_of).collect();
        let bytes = |key: &WeightKey| DeviceWeights::device_bytes(cuda.weights.source(), *key);
        let most = layers.iter().map(|keys| keys.iter().map(bytes).sum()).max().unwrap_or(0);
        let area = || {
            let memory = Memory::new(&cuda.device, MemKind::Device, most)?;
            Ok::<_, EngineError>(Area {
                memory,
                layer: None,
                present: Vec::new(),
                filled: Vec::new(),
                read: None,
            })
        };
        let areas = [area()?, area()?];
        let mut places = BTreeMap::new();
        for (layer, keys) in layers.iter().enumerate() {
            let mut at = areas[layer % 2].memory.at();
            for &key in keys {
                places.insert(key, (layer, at));
                at = at.offset(bytes(&key) as u64);
            }
        }
        for (key, (_, at)) in &places {
            cuda.weights.lend(*key, *at);
        }
        Ok(Streaming { staging: Staging::new(&cuda.device)?, cuda, places, areas, plans: BTreeMap::new() })
    }

    /// Bytes of device memory for weights that come and go.
    pub fn area_bytes(&self) -> usize {
        self.areas.iter().map(|area| area.memory.bytes()).sum()
    }

    /// Queues the copies of what a plan needs and is not there; the index of its area, if it needs any.
    fn bring(&mut self, plan: PlanId) -> Result<Option<usize>, EngineError> {
        let Some(keys) = self.plans.get(&plan.0) else { return Ok(None) };
        let (layer, _) = self.places[&keys[0]];
        let area = &mut self.areas[layer % 2];
        let device = self.cuda.device.clone();
        if area.layer != Some(layer) {
            area.layer = Some(layer);
            area.present.clear();
            // What reads the area, and what fills it still, is done first.
            for mark in area.read.iter().chain(&area.filled) {
                self.staging.streams().try_for_each(|stream| device.wait(stream, mark.id))?;
            }
        }
        let missing: Vec<WeightKey> =
            keys.iter().copied().filter(|key| !area.present.contains(key)).collect();
        if missing.is_empty() {
            return Ok(Some(layer % 2));
        }
        let (weights, modules) = (&self.cuda.weights, &mut self.cuda.modules);
        let copied = missing
            .iter()
            .try_for_each(|key| weights.bring(*key, self.places[key].1, &mut self.staging, modules));
        let marks = self.staging.streams().map(|stream| Mark::on(&device, stream));
        match copied.and_then(|()| Ok(marks.collect::<Result<_, _>>()?)) {
            Ok(filled) => area.filled = filled,
            Err(error) => {
                // Nobody could wait for what is under way, so it ends here.
                let _ = self.staging.finish(&device);
                return Err(error);
            }
        }
        area.present.extend(missing);
        Ok(Some(layer % 2))
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
        keys.retain(|key| self.places.contains_key(key));
        let layer = |key: &WeightKey| self.places[key].0;
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
        for mark in &self.areas[area].filled {
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
