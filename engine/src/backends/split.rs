//! Several backends as one: layers are spread over devices, a step's graph is cut where the device changes, and what
//! crosses a cut is copied.
//!
//! A node runs where its layer's weights and cache are; one without either runs where the node before it does. Nodes that
//! need only the step's inputs (rotary angles) are run again on every device that reads them, which is cheaper than a
//! copy. Each part of a graph is a plan of its own on its backend. Layers are computed by the same rules on every device,
//! so the answers differ only by the devices' rounding.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;

use crate::backend::{Backend, BackendInfo, PlanId, Step};
use crate::error::EngineError;
use crate::graph::{Graph, Node, Output};
use crate::kv_cache::KvLayout;
use crate::op::Op;
use crate::plan::Plan;
use crate::sampler::Sampler;
use crate::tensor::{Storage, TensorId};
use crate::weights::Weights;

/// Tensors that may cross into one part of a graph.
const MAX_GIVEN: usize = 8;

/// Which device, by index, has what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Embeddings and what else comes before the first layer.
    pub input: usize,
    /// Layer by layer.
    pub layers: Vec<usize>,
    /// The last norm and the output matrix.
    pub output: usize,
}

impl Placement {
    /// The last `n` layers on device 1, the others on device 0; with more than there are, everything is on device 1, the
    /// embeddings and the output too.
    pub fn last_layers(n_layer: usize, n: usize) -> Placement {
        let first = n_layer - n.min(n_layer);
        Placement {
            input: usize::from(n > n_layer),
            layers: (0..n_layer).map(|il| usize::from(il >= first)).collect(),
            output: usize::from(n > n_layer),
        }
    }

    /// Consecutive layers on each of several devices; what comes before the first layer goes with it. Layers before the
    /// first device's are device 0's, with all else, if `host`; devices then count from 1.
    pub fn ranges(n_layer: usize, devices: &[Range<usize>], host: bool) -> Placement {
        let mut layers = alloc::vec![0; n_layer];
        for (device, of_device) in devices.iter().enumerate() {
            layers[of_device.clone()].fill(device + usize::from(host));
        }
        Placement { input: 0, layers, output: if host { 0 } else { devices.len().saturating_sub(1) } }
    }

    /// Layers spread over devices in proportion to their shares, in order; the output goes with the last layer.
    pub fn spread(n_layer: usize, shares: &[usize]) -> Placement {
        let total: usize = shares.iter().sum::<usize>().max(1);
        let mut layers = Vec::with_capacity(n_layer);
        for il in 0..n_layer {
            let mut sum = 0;
            let device = shares.iter().position(|share| {
                sum += share;
                // The layer's middle lies in the device's part.
                (2 * il + 1) * total < 2 * sum * n_layer
            });
            layers.push(device.unwrap_or(shares.len().saturating_sub(1)));
        }
        let (input, output) = (layers.first().copied().unwrap_or(0), layers.last().copied().unwrap_or(0));
        Placement { input, layers, output }
    }

    /// Where a weight of this name is.
    fn of_weight(&self, name: &str, op: &Op) -> usize {
        if let Some(il) = layer_of(name) {
            return self.layers.get(il).copied().unwrap_or(self.output);
        }
        // Tied embeddings are input and output at once: it depends on what is done with them.
        if name.starts_with("output") || matches!(op, Op::MatMul { .. }) { self.output } else { self.input }
    }

    /// Device of each node; `None` for nodes that every reader runs itself.
    fn assign(&self, graph: &Graph, weights: &Weights) -> Vec<Option<usize>> {
        let mut devices: Vec<Option<usize>> = Vec::with_capacity(graph.nodes.len());
        let mut last = self.input;
        for node in &graph.nodes {
            if matches!(node.op, Op::RopeTable { .. }) {
                devices.push(None);
                continue;
            }
            let device = match &node.op {
                Op::KvStore { il, .. } => Some(self.layers[*il]),
                Op::Attention { params, .. } => Some(self.layers[params.il]),
                op => {
                    let mut found = None;
                    op.for_each_input(|t| {
                        if let Storage::Weight { weight, .. } = graph.tensor(graph.base(t)).storage {
                            found.get_or_insert(self.of_weight(&weights.get(weight).name, op));
                        }
                    });
                    found
                }
            };
            last = device.unwrap_or(last);
            devices.push(Some(last));
        }
        devices
    }

    /// The nodes of each part, in order: (device, node indices).
    fn cut(&self, graph: &Graph, weights: &Weights) -> Vec<(usize, Vec<usize>)> {
        let devices = self.assign(graph, weights);
        let mut parts: Vec<(usize, Vec<usize>)> = Vec::new();
        for (i, device) in devices.iter().enumerate() {
            let Some(device) = *device else { continue };
            if parts.last().is_none_or(|(d, _)| *d != device) {
                parts.push((device, Vec::new()));
            }
            if let Some((_, nodes)) = parts.last_mut() {
                nodes.push(i);
            }
        }
        // Every part that reads a table makes it itself, first.
        for (i, device) in devices.iter().enumerate() {
            if device.is_some() {
                continue;
            }
            for (_, nodes) in &mut parts {
                let reads = nodes.iter().any(|&n| reads(graph, &graph.nodes[n], &graph.nodes[i].outputs));
                if reads {
                    nodes.insert(0, i);
                }
            }
        }
        parts
    }

    /// The nodes that run on a device, as a graph: what a backend there is asked to load.
    pub fn part(&self, graph: &Graph, weights: &Weights, device: usize) -> Graph {
        let cut = self.cut(graph, weights);
        let mine = cut.iter().filter(|(d, _)| *d == device).flat_map(|(_, nodes)| nodes);
        let nodes = mine.map(|&n| graph.nodes[n].clone()).collect();
        Graph { tensors: graph.tensors.clone(), nodes, outputs: Vec::new(), prompt: graph.prompt }
    }
}

/// The layer that a weight's name says.
pub(crate) fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("blk.")?.split('.').next()?.parse().ok()
}

/// One part of a graph.
struct Part {
    device: usize,
    plan: PlanId,
    /// Tensors that other parts made, as indices into the borders.
    given: Vec<usize>,
    /// Tensors that later parts read, as indices into the borders.
    made: Vec<usize>,
}

/// A plan in parts.
struct Parts {
    graph: Arc<Plan>,
    parts: Vec<Part>,
    /// Tensors that cross cuts and their last values.
    borders: Vec<(TensorId, Vec<f32>)>,
    /// Part that writes each output.
    writers: BTreeMap<TensorId, usize>,
}

/// The backends and who has what.
pub struct Split {
    backends: Vec<Box<dyn Backend>>,
    placement: Placement,
    weights: Arc<Weights>,
    plans: BTreeMap<usize, Parts>,
    next_plan: usize,
}

impl Split {
    /// Backends that were all made for the model's weights; `placement` names them by index.
    pub fn new(backends: Vec<Box<dyn Backend>>, placement: Placement, weights: Arc<Weights>) -> Split {
        let all = placement.layers.iter().chain([&placement.input, &placement.output]);
        assert!(all.into_iter().all(|d| *d < backends.len()), "{placement:?} of {} devices", backends.len());
        Split { backends, placement, weights, plans: BTreeMap::new(), next_plan: 0 }
    }
}

/// Whether a node reads one of these tensors.
fn reads(graph: &Graph, node: &Node, tensors: &[TensorId]) -> bool {
    let mut found = false;
    node.op.for_each_input(|t| found |= tensors.contains(&graph.base(t)));
    found
}

impl Backend for Split {
    fn info(&self) -> BackendInfo {
        let parts: Vec<String> = self
            .backends
            .iter()
            .enumerate()
            .map(|(d, b)| {
                let layers = self.placement.layers.iter().filter(|l| **l == d).count();
                format!("{layers} layer(s) on {}", b.info().name)
            })
            .collect();
        BackendInfo { name: "split", description: parts.join(", ") }
    }

    fn supports(&self, graph: &Graph, node: &Node) -> Result<(), String> {
        let parts = self.placement.cut(graph, &self.weights);
        let mine = |i: &usize| core::ptr::eq(&raw const graph.nodes[*i], core::ptr::from_ref(node));
        for (device, nodes) in &parts {
            if nodes.iter().any(mine) {
                self.backends[*device].supports(graph, node)?;
            }
        }
        Ok(())
    }

    fn runs_prompts_apart(&self) -> bool {
        self.backends.iter().any(|backend| backend.runs_prompts_apart())
    }

    fn create_kv(&mut self, layout: &KvLayout) -> Result<(), EngineError> {
        for (d, backend) in self.backends.iter_mut().enumerate() {
            let mut own = layout.clone();
            for (layer, device) in own.layers.iter_mut().zip(&self.placement.layers) {
                if *device != d {
                    // Of other devices' layers this one keeps nothing.
                    layer.n_head_kv = 0;
                }
            }
            backend.create_kv(&own)?;
        }
        Ok(())
    }

    fn prepare(&mut self, plan: Arc<Plan>) -> Result<PlanId, EngineError> {
        let graph = &plan.graph;
        let cut = self.placement.cut(graph, &self.weights);
        let mut wrote: BTreeMap<TensorId, usize> = BTreeMap::new();
        for (p, (_, nodes)) in cut.iter().enumerate() {
            for &n in nodes {
                wrote.extend(graph.nodes[n].outputs.iter().map(|t| (*t, p)));
            }
        }
        let mut borders: Vec<(TensorId, Vec<f32>)> = Vec::new();
        let mut given: Vec<Vec<usize>> = alloc::vec![Vec::new(); cut.len()];
        let mut made = given.clone();
        for (p, (_, nodes)) in cut.iter().enumerate() {
            let own: Vec<TensorId> = nodes.iter().flat_map(|&n| graph.nodes[n].outputs.clone()).collect();
            let mut foreign: Vec<TensorId> = Vec::new();
            for &n in nodes {
                graph.nodes[n].op.for_each_input(|t| {
                    let base = graph.base(t);
                    let is_activation = graph.tensor(base).storage == Storage::Activation;
                    if is_activation && !own.contains(&base) && !foreign.contains(&base) {
                        foreign.push(base);
                    }
                });
            }
            for t in foreign {
                let b = match borders.iter().position(|(id, _)| *id == t) {
                    Some(b) => b,
                    None => {
                        borders.push((t, alloc::vec![0.0; graph.tensor(t).shape.elems()]));
                        made[wrote[&t]].push(borders.len() - 1);
                        borders.len() - 1
                    }
                };
                given[p].push(b);
            }
            if given[p].len() > MAX_GIVEN {
                return Err(EngineError::Unsupported {
                    what: format!("{} tensors that cross from device to device at one place", given[p].len()),
                });
            }
        }
        let mut parts: Vec<Part> = Vec::with_capacity(cut.len());
        let mut writers = BTreeMap::new();
        for (p, (device, nodes)) in cut.iter().enumerate() {
            let mut own = Graph {
                tensors: graph.tensors.clone(),
                nodes: nodes.iter().map(|&n| graph.nodes[n].clone()).collect(),
                outputs: made[p].iter().map(|&b| (Output::Tap, borders[b].0)).collect(),
                prompt: graph.prompt,
            };
            for &(kind, t) in &graph.outputs {
                let base = graph.base(t);
                // A table that several parts make is read from one of them.
                if own.nodes.iter().any(|n| n.outputs.contains(&base)) && !writers.contains_key(&base) {
                    own.outputs.push((kind, t));
                    writers.insert(base, p);
                }
            }
            match self.backends[*device].prepare(Arc::new(Plan::new(own))) {
                Ok(id) => parts.push(Part {
                    device: *device,
                    plan: id,
                    given: core::mem::take(&mut given[p]),
                    made: core::mem::take(&mut made[p]),
                }),
                Err(e) => {
                    parts.iter().for_each(|part| self.backends[part.device].release(part.plan));
                    return Err(e);
                }
            }
        }
        let id = self.next_plan;
        self.next_plan += 1;
        self.plans.insert(id, Parts { graph: plan, parts, borders, writers });
        Ok(PlanId(id))
    }

    fn release(&mut self, plan: PlanId) {
        if let Some(parts) = self.plans.remove(&plan.0) {
            parts.parts.iter().for_each(|part| self.backends[part.device].release(part.plan));
        }
    }

    fn run(&mut self, plan: PlanId, step: &Step<'_>) -> Result<(), EngineError> {
        let Parts { parts, borders, .. } = self.plans.get_mut(&plan.0).expect("a prepared plan");
        for part in parts {
            let mut given: [(TensorId, &[f32]); MAX_GIVEN] = [(TensorId(0), &[]); MAX_GIVEN];
            for (slot, &b) in given.iter_mut().zip(&part.given) {
                *slot = (borders[b].0, &borders[b].1);
            }
            let step = Step { given: &given[..part.given.len()], ..*step };
            let backend = &mut self.backends[part.device];
            backend.run(part.plan, &step)?;
            for &b in &part.made {
                let (tensor, values) = &mut borders[b];
                backend.read(part.plan, *tensor, values)?;
            }
        }
        Ok(())
    }

    fn read(&mut self, plan: PlanId, tensor: TensorId, out: &mut [f32]) -> Result<(), EngineError> {
        let parts = &self.plans[&plan.0];
        let part = &parts.parts[parts.writers[&parts.graph.graph.base(tensor)]];
        self.backends[part.device].read(part.plan, tensor, out)
    }

    fn sample(
        &mut self,
        plan: PlanId,
        logits: TensorId,
        samplers: &mut [&mut Sampler],
        tokens: &mut [u32],
    ) -> Result<bool, EngineError> {
        let parts = &self.plans[&plan.0];
        let part = &parts.parts[parts.writers[&parts.graph.graph.base(logits)]];
        self.backends[part.device].sample(part.plan, logits, samplers, tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_layers_go_to_the_device() {
        let on = |n| {
            let p = Placement::last_layers(4, n);
            (p.input, p.layers.iter().sum::<usize>(), p.output)
        };
        assert_eq!(on(0), (0, 0, 0));
        assert_eq!(on(1), (0, 1, 0));
        assert_eq!(on(4), (0, 4, 0));
        assert_eq!(on(5), (1, 4, 1));
        assert_eq!(on(99), (1, 4, 1));
        assert_eq!(Placement::last_layers(3, 1).layers, [0, 0, 1]);
    }

    #[test]
    fn layers_spread_in_proportion() {
        assert_eq!(Placement::spread(8, &[1, 1]).layers, [0, 0, 0, 0, 1, 1, 1, 1]);
        assert_eq!(Placement::spread(8, &[3, 1]).layers, [0, 0, 0, 0, 0, 0, 1, 1]);
        assert_eq!(Placement::spread(3, &[0, 5]).layers, [1, 1, 1]);
        let p = Placement::spread(5, &[1, 1, 1]);
        assert_eq!((p.input, p.output), (0, 2));
    }
}
