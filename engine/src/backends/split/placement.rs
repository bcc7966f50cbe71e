//! Which device (by index) has which layers and single weights, and from that the device of each node of a graph.
//!
//! A node runs where its first weight is; small vectors that it also reads (biases, sinks) are taken along. A product of
//! several matrices on different devices becomes one piece per device. The cache of a layer is where the layer is, and
//! attention runs there. A node without weights runs where most of what it reads was made, or on its layer's device if no
//! device made more than that one. Nodes that need only the step's inputs (rotary angles) are run again on every device
//! that reads their results, which is cheaper than a copy.
//!
//! With [`Offload`], products of prompts with weights of layers that lie on one device run on another, which brings the
//! weights as it needs them. Where a node runs depends on the graph and on whether its tokens are a prompt's, never on their
//! number: all that a node reads grows with it in the same proportion.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::ops::Range;

use crate::graph::{Graph, Node};
use crate::op::{AttentionParams, Op};
use crate::tensor::{Storage, TensorId};
use crate::weights::Weights;

/// Which device, by index, has what.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// Embeddings and what else comes before the first layer.
    pub input: usize,
    /// Layer by layer.
    pub layers: Vec<usize>,
    /// The last norm and the output matrix.
    pub output: usize,
    /// Weights that are elsewhere than the rest of their layer, by index into the model's weights.
    pub tensors: BTreeMap<u32, usize>,
    /// If set: where products of prompts' tokens are computed instead.
    pub offload: Option<Offload>,
}

/// Products of prompts' tokens with the weights of layers that lie on one device, computed by another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offload {
    /// Where the weights are: the host.
    pub from: usize,
    /// The device that they are copied to, and that multiplies with them.
    pub to: usize,
}

/// A node on a device, or those matrices of a product that are there.
pub struct Piece {
    /// Index of the node.
    pub node: usize,
    /// `None`: every device that reads what it makes runs it.
    device: Option<usize>,
    /// Which matrices; empty for all.
    matrices: Vec<usize>,
    /// Layer whose weights are brought for it.
    brings: Option<usize>,
}

impl Piece {
    /// The piece as a node of its own.
    pub fn node(&self, graph: &Graph) -> Node {
        let node = &graph.nodes[self.node];
        match &node.op {
            Op::MatMul { x, weights, biases } if !self.matrices.is_empty() => Node {
                op: Op::MatMul {
                    x: *x,
                    weights: self.matrices.iter().map(|&m| weights[m]).collect(),
                    biases: self.matrices.iter().map(|&m| biases[m]).collect(),
                },
                outputs: self.matrices.iter().map(|&m| node.outputs[m]).collect(),
            },
            _ => node.clone(),
        }
    }
}

/// Pieces that run on one device, one after the other.
pub struct Section {
    /// The device.
    pub device: usize,
    /// Layer whose weights are brought for some of the pieces; a section never needs those of two layers.
    pub brings: Option<usize>,
    /// In order.
    pub pieces: Vec<Piece>,
}

/// Where a weight that a node reads is used.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Place {
    device: usize,
    brings: Option<usize>,
    /// Where the rest of its layer is.
    home: usize,
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
            ..Placement::default()
        }
    }

    /// Consecutive layers on each of several devices. If there is a `host`, it is device 0, the others count from 1, and
    /// layers that none of them has are its. So is what is no layer's, unless the devices have `all`: then it goes with
    /// the first and the last of them.
    pub fn ranges(n_layer: usize, devices: &[Range<usize>], host: bool, all: bool) -> Placement {
        let mut layers = alloc::vec![0; n_layer];
        let first = usize::from(host);
        for (device, of_device) in devices.iter().enumerate() {
            layers[of_device.clone()].fill(device + first);
        }
        let (input, output) = if all { (first, first + devices.len().saturating_sub(1)) } else { (0, 0) };
        Placement { input, layers, output, ..Placement::default() }
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
        Placement { input, layers, output, ..Placement::default() }
    }

    /// All devices that have something.
    pub(super) fn devices(&self) -> impl Iterator<Item = usize> + '_ {
        let offload = self.offload.iter().flat_map(|o| [o.from, o.to]);
        let layers = self.layers.iter().chain(self.tensors.values()).copied();
        layers.chain([self.input, self.output]).chain(offload)
    }

    /// Where a weight that an operation reads is used; `None` if the tensor is no weight.
    fn place(&self, graph: &Graph, weights: &Weights, tensor: TensorId, op: &Op) -> Option<Place> {
        let Storage::Weight { weight, .. } = graph.tensor(graph.base(tensor)).storage else { return None };
        let name = &weights.get(weight).name;
        let layer = layer_of(name).filter(|il| *il < self.layers.len());
        let home = match layer {
            Some(il) => self.layers[il],
            // Tied embeddings are input and output at once: it depends on what is done with them.
            None if name.starts_with("output") || matches!(op, Op::MatMul { .. }) => self.output,
            None => self.input,
        };
        let device = self.tensors.get(&weight).copied().unwrap_or(home);
        let is_product = matches!(op, Op::MatMul { .. } | Op::MatMulId { .. });
        Some(match self.offload {
            // Not the output matrix: it would be copied for the one row of logits that is wanted of a prompt.
            Some(Offload { from, to }) if graph.prompt && is_product && layer.is_some() && device == from => {
                Place { device: to, brings: layer, home }
            }
            _ => Place { device, brings: None, home },
        })
    }

    /// The pieces of all nodes, in order.
    fn assign(&self, graph: &Graph, weights: &Weights) -> Vec<Piece> {
        let mut pieces = Vec::with_capacity(graph.nodes.len());
        // Device that made each activation.
        let mut made: Vec<Option<usize>> = alloc::vec![None; graph.tensors.len()];
        let mut home = self.input;
        for (i, node) in graph.nodes.iter().enumerate() {
            let whole = |device, brings| Piece { node: i, device, matrices: Vec::new(), brings };
            let place = |tensor| self.place(graph, weights, tensor, &node.op);
            let piece = match &node.op {
                Op::RopeTable { .. } => {
                    pieces.push(whole(None, None));
                    continue;
                }
                Op::KvStore { il, .. } | Op::Attention { params: AttentionParams { il, .. }, .. } => {
                    home = self.layers[*il];
                    whole(Some(home), None)
                }
                Op::MatMul { weights: matrices, .. } if matrices.len() > 1 => {
                    let places: Vec<Option<Place>> = matrices.iter().map(|m| place(*m)).collect();
                    for (m, place) in places.iter().enumerate() {
                        let Some(Place { device, brings, home: of_layer }) = *place else { continue };
                        home = of_layer;
                        made[node.outputs[m].0 as usize] = Some(device);
                        if places[..m].contains(place) {
                            continue;
                        }
                        let same = (m..places.len()).filter(|&other| places[other] == *place).collect();
                        pieces.push(Piece { node: i, device: Some(device), matrices: same, brings });
                    }
                    continue;
                }
                op => {
                    let mut first = None;
                    op.for_each_input(|tensor| first = first.or_else(|| place(tensor)));
                    match first {
                        Some(place) => {
                            home = place.home;
                            whole(Some(place.device), place.brings)
                        }
                        None => whole(Some(most_made(graph, op, &made, home)), None),
                    }
                }
            };
            node.outputs.iter().for_each(|t| made[t.0 as usize] = piece.device);
            pieces.push(piece);
        }
        pieces
    }

    /// A graph in sections.
    pub(super) fn cut(&self, graph: &Graph, weights: &Weights) -> Vec<Section> {
        let mut sections: Vec<Section> = Vec::new();
        let mut tables = Vec::new();
        for piece in self.assign(graph, weights) {
            let Some(device) = piece.device else {
                tables.push(piece.node);
                continue;
            };
            let fits = |s: &&mut Section| {
                s.device == device
                    && (s.brings.is_none() || piece.brings.is_none() || s.brings == piece.brings)
            };
            match sections.last_mut().filter(fits) {
                Some(section) => {
                    section.brings = section.brings.or(piece.brings);
                    section.pieces.push(piece);
                }
                None => sections.push(Section { device, brings: piece.brings, pieces: alloc::vec![piece] }),
            }
        }
        // Every section that reads a table makes it itself, first.
        for node in tables {
            for section in &mut sections {
                let reads = |p: &Piece| reads(graph, &graph.nodes[p.node], &graph.nodes[node].outputs);
                if section.pieces.iter().any(reads) {
                    let device = Some(section.device);
                    section.pieces.insert(0, Piece { node, device, matrices: Vec::new(), brings: None });
                }
            }
        }
        sections
    }

    /// The nodes that run on a device, as a graph with those outputs that they make: what a backend there is asked to load.
    pub fn part(&self, graph: &Graph, weights: &Weights, device: usize) -> Graph {
        let sections = self.cut(graph, weights);
        let mine = sections.iter().filter(|s| s.device == device).flat_map(|s| &s.pieces);
        let mut part = nodes_of(graph, mine);
        let made = |t: TensorId| part.nodes.iter().any(|node| node.outputs.contains(&graph.base(t)));
        let outputs = graph.outputs.iter().copied().filter(|(_, t)| made(*t)).collect();
        part.outputs = outputs;
        part
    }

    /// The products that are computed with weights brought from elsewhere, a graph per layer.
    pub fn brought(&self, graph: &Graph, weights: &Weights) -> Vec<Graph> {
        let pieces = self.assign(graph, weights);
        let mut layers: Vec<usize> = pieces.iter().filter_map(|p| p.brings).collect();
        layers.dedup();
        let of = |il: usize| nodes_of(graph, pieces.iter().filter(|p| p.brings == Some(il)));
        layers.into_iter().map(of).collect()
    }
}

/// Pieces as a graph.
fn nodes_of<'a>(graph: &Graph, pieces: impl Iterator<Item = &'a Piece>) -> Graph {
    Graph {
        tensors: graph.tensors.clone(),
        nodes: pieces.map(|p| p.node(graph)).collect(),
        outputs: Vec::new(),
        prompt: graph.prompt,
    }
}

/// The device that made most of what an operation reads; `home` where none made more.
fn most_made(graph: &Graph, op: &Op, made: &[Option<usize>], home: usize) -> usize {
    let mut sums = alloc::vec![(home, 0)];
    op.for_each_input(|t| {
        let base = graph.base(t);
        let Some(device) = made[base.0 as usize] else { return };
        let elems = graph.tensor(base).shape.elems();
        match sums.iter_mut().find(|(d, _)| *d == device) {
            Some((_, sum)) => *sum += elems,
            None => sums.push((device, elems)),
        }
    });
    let mut best = sums[0];
    for &sum in &sums[1..] {
        if sum.1 > best.1 {
            best = sum;
        }
    }
    best.0
}

/// The layer that a weight's name says.
pub(crate) fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("blk.")?.split('.').next()?.parse().ok()
}

/// Whether a node reads one of these tensors.
fn reads(graph: &Graph, node: &Node, tensors: &[TensorId]) -> bool {
    let mut found = false;
    node.op.for_each_input(|t| found |= tensors.contains(&graph.base(t)));
    found
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
    fn ranges_leave_the_rest_to_the_host() {
        let on = |host, all| {
            let p = Placement::ranges(3, &[1..2, 2..3], host, all);
            (p.input, p.layers, p.output)
        };
        assert_eq!(on(true, false), (0, alloc::vec![0, 1, 2], 0));
        assert_eq!(on(true, true), (1, alloc::vec![0, 1, 2], 2));
        assert_eq!(on(false, true), (0, alloc::vec![0, 0, 1], 1));
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
