//! Several backends as one: layers, and single weights, are spread over devices, a step's graph is cut where the device
//! changes ([`Placement`]), and what crosses a cut is copied.
//!
//! Each part of a graph is a plan of its own on its backend. Layers are computed by the same rules on every device, so the
//! answers differ only by the devices' rounding. Weights that a device brings for a part ([`Offload`]) are asked for
//! ([`Backend::prefetch`]) as soon as the part before it that weights are brought for is under way.

mod placement;

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::backend::{Backend, BackendInfo, PlanId, Step};
use crate::error::EngineError;
use crate::graph::{Graph, Node, Output};
use crate::kv_cache::KvLayout;
use crate::plan::Plan;
use crate::sampler::Sampler;
use crate::tensor::{Storage, TensorId};
use crate::weights::Weights;

use placement::Section;
#[cfg(feature = "gpu")]
pub(crate) use placement::layer_of;
pub use placement::{Offload, Placement};

/// Tensors that may cross into one part of a graph.
const MAX_GIVEN: usize = 16;

/// One part of a graph.
struct Part {
    device: usize,
    plan: PlanId,
    /// Tensors that other parts made, as indices into the borders and by the part's ids.
    given: Vec<(usize, TensorId)>,
    /// Tensors that later parts read, in the same form.
    made: Vec<(usize, TensorId)>,
    /// If weights are brought for this part: the next one that weights are brought for.
    next: Option<usize>,
}

/// A plan in parts.
struct Parts {
    parts: Vec<Part>,
    /// Last values of tensors that cross cuts.
    borders: Vec<Vec<f32>>,
    /// Part that writes each output, and the part's id of it.
    writers: BTreeMap<TensorId, (usize, TensorId)>,
}

/// The tensors that one part of a graph makes and another reads: the borders.
struct Crossings {
    tensors: Vec<TensorId>,
    /// Per part: indices of borders that it reads and does not make.
    given: Vec<Vec<usize>>,
    /// Per part: indices of borders that it makes.
    made: Vec<Vec<usize>>,
}

impl Crossings {
    /// The crossings of a graph whose parts have these nodes. An error if more than [`MAX_GIVEN`] tensors cross into one
    /// part.
    fn new(graph: &Graph, parts: &[Vec<Node>]) -> Result<Crossings, EngineError> {
        let mut maker: BTreeMap<TensorId, usize> = BTreeMap::new();
        for (p, nodes) in parts.iter().enumerate() {
            maker.extend(nodes.iter().flat_map(|node| node.outputs.iter().map(move |t| (*t, p))));
        }
        let none = alloc::vec![Vec::new(); parts.len()];
        let mut crossings = Crossings { tensors: Vec::new(), given: none.clone(), made: none };
        for (p, nodes) in parts.iter().enumerate() {
            for t in made_elsewhere(graph, nodes) {
                let border = match crossings.tensors.iter().position(|known| *known == t) {
                    Some(border) => border,
                    None => {
                        crossings.tensors.push(t);
                        let border = crossings.tensors.len() - 1;
                        crossings.made[maker[&t]].push(border);
                        border
                    }
                };
                crossings.given[p].push(border);
            }
            let n = crossings.given[p].len();
            if n > MAX_GIVEN {
                return Err(EngineError::Unsupported {
                    what: format!("{n} tensors that cross from device to device at one place"),
                });
            }
        }
        Ok(crossings)
    }
}

/// The activations that some nodes read and none of them makes, each once.
fn made_elsewhere(graph: &Graph, nodes: &[Node]) -> Vec<TensorId> {
    let own: Vec<TensorId> = nodes.iter().flat_map(|node| node.outputs.iter().copied()).collect();
    let mut found: Vec<TensorId> = Vec::new();
    for node in nodes {
        node.op.for_each_input(|t| {
            let base = graph.base(t);
            let is_activation = graph.tensor(base).storage == Storage::Activation;
            if is_activation && !own.contains(&base) && !found.contains(&base) {
                found.push(base);
            }
        });
    }
    found
}

/// Some of a graph's nodes as a graph of their own, with only the tensors that they use: a graph cut into many parts
/// would otherwise have all its tensors in each of them.
struct Excerpt<'a> {
    whole: &'a Graph,
    graph: Graph,
    ids: BTreeMap<TensorId, TensorId>,
}

impl<'a> Excerpt<'a> {
    fn new(whole: &'a Graph, nodes: &[Node]) -> Excerpt<'a> {
        let graph = Graph { prompt: whole.prompt, ..Graph::default() };
        let mut excerpt = Excerpt { whole, graph, ids: BTreeMap::new() };
        for node in nodes {
            let mut node = node.clone();
            node.op.for_each_input_mut(|t| *t = excerpt.id(*t));
            node.outputs.iter_mut().for_each(|t| *t = excerpt.id(*t));
            excerpt.graph.nodes.push(node);
        }
        excerpt
    }

    /// The excerpt's id of a tensor of the whole graph, which is added if the excerpt does not have it yet.
    fn id(&mut self, tensor: TensorId) -> TensorId {
        if let Some(id) = self.ids.get(&tensor) {
            return *id;
        }
        let mut own = self.whole.tensor(tensor).clone();
        if let Storage::Reshape(of) = own.storage {
            own.storage = Storage::Reshape(self.id(of));
        }
        let id = TensorId(self.graph.tensors.len() as u32);
        self.graph.tensors.push(own);
        self.ids.insert(tensor, id);
        id
    }
}

/// The backends, and the placement that says which of them has what.
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
        assert!(
            placement.devices().all(|d| d < backends.len()),
            "{placement:?} of {} devices",
            backends.len()
        );
        Split { backends, placement, weights, plans: BTreeMap::new(), next_plan: 0 }
    }
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
        for section in self.placement.cut(graph, &self.weights) {
            for piece in &section.pieces {
                if core::ptr::eq(&raw const graph.nodes[piece.node], core::ptr::from_ref(node)) {
                    self.backends[section.device].supports(graph, &piece.node(graph))?;
                }
            }
        }
        Ok(())
    }

    fn runs_prompts_apart(&self) -> bool {
        // Where products of prompts run elsewhere than those of answers, their sums are rounded otherwise.
        self.placement.offload.is_some() || self.backends.iter().any(|backend| backend.runs_prompts_apart())
    }

    fn create_kv(&mut self, layout: &KvLayout) -> Result<(), EngineError> {
        for (d, backend) in self.backends.iter_mut().enumerate() {
            let mut own = layout.clone();
            for (layer, device) in own.layers.iter_mut().zip(&self.placement.layers) {
                if *device != d {
                    // No cache for layers of other devices.
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
        let nodes_of = |s: &Section| s.pieces.iter().map(|piece| piece.node(graph)).collect();
        let nodes: Vec<Vec<Node>> = cut.iter().map(nodes_of).collect();
        let crossings = Crossings::new(graph, &nodes)?;
        let mut parts: Vec<Part> = Vec::with_capacity(cut.len());
        let mut writers = BTreeMap::new();
        for (p, section) in cut.iter().enumerate() {
            let mut own = Excerpt::new(graph, &nodes[p]);
            let mut with_ids = |borders: &[usize]| {
                borders.iter().map(|&b| (b, own.id(crossings.tensors[b]))).collect::<Vec<_>>()
            };
            let (given, made) = (with_ids(&crossings.given[p]), with_ids(&crossings.made[p]));
            own.graph.outputs = made.iter().map(|(_, id)| (Output::Tap, *id)).collect();
            for &(kind, t) in &graph.outputs {
                let base = graph.base(t);
                // A table that several parts make is read from one of them.
                if nodes[p].iter().any(|n| n.outputs.contains(&base)) && !writers.contains_key(&t) {
                    let id = own.id(t);
                    own.graph.outputs.push((kind, id));
                    writers.insert(t, (p, id));
                }
            }
            let brings = |q: &usize| cut[*q].brings.is_some();
            match self.backends[section.device].prepare(Arc::new(Plan::new(own.graph))) {
                Ok(id) => parts.push(Part {
                    device: section.device,
                    plan: id,
                    given,
                    made,
                    next: section.brings.and_then(|_| (p + 1..cut.len()).find(brings)),
                }),
                Err(e) => {
                    parts.iter().for_each(|part| self.backends[part.device].release(part.plan));
                    return Err(e);
                }
            }
        }
        let id = self.next_plan;
        self.next_plan += 1;
        let room = |t: &TensorId| alloc::vec![0.0; graph.tensor(*t).shape.elems()];
        let borders = crossings.tensors.iter().map(room).collect();
        self.plans.insert(id, Parts { parts, borders, writers });
        Ok(PlanId(id))
    }

    fn release(&mut self, plan: PlanId) {
        if let Some(parts) = self.plans.remove(&plan.0) {
            parts.parts.iter().for_each(|part| self.backends[part.device].release(part.plan));
        }
    }

    fn run(&mut self, plan: PlanId, step: &Step<'_>) -> Result<(), EngineError> {
        let Parts { parts, borders, .. } = self.plans.get_mut(&plan.0).expect("a prepared plan");
        for part in &*parts {
            let mut given: [(TensorId, &[f32]); MAX_GIVEN] = [(TensorId(0), &[]); MAX_GIVEN];
            for (slot, &(b, id)) in given.iter_mut().zip(&part.given) {
                *slot = (id, &borders[b]);
            }
            let step = Step { given: &given[..part.given.len()], ..*step };
            let backend = &mut self.backends[part.device];
            backend.run(part.plan, &step)?;
            // Asked for before this part's results are waited for, so that the copies run beside it.
            if let Some(next) = part.next {
                self.backends[parts[next].device].prefetch(parts[next].plan)?;
            }
            let backend = &mut self.backends[part.device];
            for &(b, id) in &part.made {
                backend.read(part.plan, id, &mut borders[b])?;
            }
        }
        Ok(())
    }

    fn read(&mut self, plan: PlanId, tensor: TensorId, out: &mut [f32]) -> Result<(), EngineError> {
        let parts = &self.plans[&plan.0];
        let (part, id) = parts.writers[&tensor];
        let part = &parts.parts[part];
        self.backends[part.device].read(part.plan, id, out)
    }

    fn sample(
        &mut self,
        plan: PlanId,
        logits: TensorId,
        samplers: &mut [&mut Sampler],
        tokens: &mut [u32],
    ) -> Result<bool, EngineError> {
        let parts = &self.plans[&plan.0];
        let (part, id) = parts.writers[&logits];
        let part = &parts.parts[part];
        self.backends[part.device].sample(part.plan, id, samplers, tokens)
    }
}
