//! How much memory a model needs on the device, layer by layer: known before anything is loaded.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;
use core::ops::Range;

use gpu_kernels::driver::DeviceInfo;
use gpu_kernels::ptx;

use super::emit::{self, MostTokens, SizeClass};
use super::fuse::RuleSet;
use super::lower::Lowered;
use super::translate::{self, Anywhere};
use super::weights::DeviceWeights;
use crate::backends::split::{Placement, layer_of};
use crate::context::ContextParams;
use crate::error::EngineError;
use crate::graph::Graph;
use crate::model::Model;
use crate::models::StepShape;
use crate::op::{KvPart, Op};
use crate::tensor::Storage;

/// Device memory left for the driver itself (context, modules) and for fragmentation. An estimate on the safe side, not a
/// measurement.
const RESERVE_BYTES: u64 = 600 << 20;

/// The place of a weight that is not where its layer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Site {
    /// The host.
    Host,
    /// This GPU, counted in the order in which they get layers.
    Gpu(usize),
}

/// Bytes on the device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Weights of each layer that are where it is.
    pub layer_weights: Vec<usize>,
    /// Cache of each layer.
    pub layer_kv: Vec<usize>,
    /// Weights outside the layers.
    pub other_weights: usize,
    /// Weights that each GPU has regardless of its layers; the list may end before GPUs that have none.
    pub apart: Vec<usize>,
    /// Per layer: weights that products of prompts copy to a GPU, if the layer is on the host and if it is not. Empty without
    /// op offload.
    pub brought: Vec<[usize; 2]>,
    /// The arena of the step that takes the most.
    pub activations: usize,
}

/// What part of a model on the device takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Share {
    /// Weights.
    pub weights: u64,
    /// Cache.
    pub kv_cache: u64,
    /// The arena, whatever the number of layers.
    pub activations: u64,
    /// Room for weights that products of prompts bring from the host.
    pub brought: u64,
    /// Pinned host memory for copies of all these weights (no device memory). With less, fewer layers have copies.
    pub pinned: u64,
}

impl Share {
    /// Bytes on the device.
    pub fn total(&self) -> u64 {
        self.weights + self.kv_cache + self.activations + self.brought
    }
}

impl Needs {
    /// What a model needs in a context of these sizes on a device. `sites` names, by index, the weights that are not where
    /// their layer is; with `offload`, products of prompts copy weights from the host.
    pub fn of(
        model: &Model,
        params: &ContextParams,
        device: &DeviceInfo,
        sites: &BTreeMap<u32, Site>,
        offload: bool,
    ) -> Result<Needs, EngineError> {
        let prompt = ptx::runs_hopper(device);
        let graph = model.graph(params.n_ctx, StepShape { prompt, ..params.largest_step() });
        let kv = params.kv_layout(model)?;
        let n_layer = kv.layers.len();
        let mut needs = Needs {
            layer_weights: alloc::vec![0; n_layer],
            brought: alloc::vec![[0; 2]; if offload { n_layer } else { 0 }],
            ..Needs::default()
        };
        let of_products = weights_of_products(&graph);
        for key in translate::weights_of(&graph) {
            let bytes = DeviceWeights::device_bytes(model.weights(), key);
            let layer = layer_of(&model.weights().get(key.weight).name).filter(|il| *il < n_layer);
            let site = sites.get(&key.weight);
            match (site, layer) {
                (Some(Site::Host), _) => {}
                (Some(Site::Gpu(gpu)), _) => {
                    needs.apart.resize(needs.apart.len().max(gpu + 1), 0);
                    needs.apart[*gpu] += bytes;
                }
                (None, Some(il)) => needs.layer_weights[il] += bytes,
                (None, None) => needs.other_weights += bytes,
            }
            if let Some([on_host, elsewhere]) = layer.and_then(|il| needs.brought.get_mut(il))
                && of_products.contains(&key.weight)
            {
                *on_host += if matches!(site, Some(Site::Gpu(_))) { 0 } else { bytes };
                *elsewhere += if site == Some(&Site::Host) { bytes } else { 0 };
            }
        }
        needs.layer_kv =
            (0..n_layer).map(|il| kv.part_bytes(il, KvPart::K) + kv.part_bytes(il, KvPart::V)).collect();
        // Steps of few tokens share spans among CTAs, each of which has a result for every span.
        let n_head_kv = kv.layers.iter().map(|layer| layer.n_head_kv.max(1)).min().unwrap_or(1);
        let n_split = (device.n_sm as usize / n_head_kv).clamp(1, params.n_ubatch);
        let split = model.graph(params.n_ctx, params.step(n_split, n_split));
        let max_spans = params.n_ctx.div_ceil(emit::KV_SPAN).next_power_of_two();
        for (graph, most_tokens) in [(&graph, MostTokens::Tile), (&split, MostTokens::Some)] {
            let class = SizeClass { max_spans, most_tokens };
            let lowered = Lowered::new(graph, &Anywhere, RuleSet::ALL, class, device);
            let lowered = lowered.map_err(|(i, why)| super::unsupported(graph, i, why))?;
            needs.activations = needs.activations.max(lowered.places.arena_bytes);
        }
        Ok(needs)
    }

    /// Layers of the model.
    pub fn n_layer(&self) -> usize {
        self.layer_weights.len()
    }

    /// What the last `n` layers take on one device; with more than there are, all of the model.
    pub fn share(&self, n: usize) -> Share {
        let first = self.n_layer() - n.min(self.n_layer());
        self.share_of(n, 0..1, first..self.n_layer())
    }

    /// What each of several devices has with these of the last `n` layers, counted as [`Needs::share`] does.
    pub fn shares(&self, n: usize, ranges: &[Range<usize>]) -> Vec<Share> {
        let all = ranges.iter().enumerate();
        all.map(|(device, layers)| self.share_of(n, device..ranges.len(), layers.clone())).collect()
    }

    /// What a device takes with some of the last `n` layers: `device.start` of `device.end`.
    fn share_of(&self, n: usize, device: Range<usize>, layers: Range<usize>) -> Share {
        let first = self.n_layer() - n.min(self.n_layer());
        let apart = |device: usize| self.apart.get(device).copied().unwrap_or(0) as u64;
        // Embeddings are the first device's, the output the last one's; a model may have one matrix for both.
        let others = n > self.n_layer() && (device.start == 0 || device.start + 1 == device.end);
        // With nothing on any device the first one brings all layers.
        let brings_all = n == 0 && device.start == 0 && self.apart.iter().all(|bytes| *bytes == 0);
        if layers.is_empty()
            && !others
            && apart(device.start) == 0
            && (!brings_all || self.brought.is_empty())
        {
            return Share::default();
        }
        let sum = |list: &[usize]| list[layers.clone()].iter().map(|b| *b as u64).sum::<u64>();
        // The first device that has anything brings weights, and has room for two layers.
        let brings = layers.start == first && (0..device.start).all(|before| apart(before) == 0);
        let of_layer = self.brought.iter().enumerate().map(|(il, of)| of[usize::from(il >= first)] as u64);
        let of_layer = of_layer.filter(|_| brings);
        Share {
            weights: sum(&self.layer_weights)
                + apart(device.start)
                + if others { self.other_weights as u64 } else { 0 },
            kv_cache: sum(&self.layer_kv),
            activations: self.activations as u64,
            brought: 2 * of_layer.clone().max().unwrap_or(0),
            pinned: of_layer.sum(),
        }
    }

    /// The last `n` layers, counted as [`Needs::share`] does, over devices with so many free bytes: the layers of each, in
    /// proportion to what is free, or else each as many as fit. `None` if they do not fit.
    pub fn spread(&self, n: usize, free_bytes: &[u64]) -> Option<Vec<Range<usize>>> {
        let end = self.n_layer();
        let first = end - n.min(end);
        let fits = |device: usize, layers: Range<usize>| {
            let share = self.share_of(n, device..free_bytes.len(), layers);
            share.total() <= free_bytes[device].saturating_sub(RESERVE_BYTES)
        };
        let ranges = |count: &mut dyn FnMut(usize, usize) -> usize| {
            let mut from = first;
            let ranges: Vec<Range<usize>> = (0..free_bytes.len())
                .map(|device| {
                    let layers = from..from + count(device, from);
                    from = layers.end;
                    layers
                })
                .collect();
            let all_fit = ranges.iter().enumerate().all(|(device, layers)| fits(device, layers.clone()));
            (from == end && all_fit).then_some(ranges)
        };
        let shares: Vec<usize> = free_bytes.iter().map(|&free| (free >> 20) as usize).collect();
        let proportional = Placement::spread(end - first, &shares).layers;
        ranges(&mut |device, _| proportional.iter().filter(|of| **of == device).count()).or_else(|| {
            ranges(&mut |device, from| {
                (0..=end - from).rev().find(|n| fits(device, from..from + n)).unwrap_or(0)
            })
        })
    }

    /// The most layers, counted as [`Needs::share`] does, that fit on devices with so many free bytes.
    pub fn most_layers(&self, free_bytes: &[u64]) -> usize {
        (0..=self.n_layer() + 1).rev().find(|n| self.spread(*n, free_bytes).is_some()).unwrap_or(0)
    }
}

/// Weights that are factors of products, or added to them, by index.
fn weights_of_products(graph: &Graph) -> BTreeSet<u32> {
    let mut found = BTreeSet::new();
    for node in &graph.nodes {
        if matches!(node.op, Op::MatMul { .. } | Op::MatMulId { .. }) {
            node.op.for_each_input(|t| {
                if let Storage::Weight { weight, .. } = graph.tensor(graph.base(t)).storage {
                    found.insert(weight);
                }
            });
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_layers_as_fit() {
        let needs = Needs {
            layer_weights: alloc::vec![100, 200, 300],
            layer_kv: alloc::vec![10; 3],
            other_weights: 1000,
            activations: 50,
            ..Needs::default()
        };
        assert_eq!(needs.share(1), Share { weights: 300, kv_cache: 10, activations: 50, ..Share::default() });
        assert_eq!(needs.share(4).total(), 1680);
        let most = |free: u64| needs.most_layers(&[RESERVE_BYTES + free]);
        assert_eq!([most(359), most(360), most(569), most(570), most(1679), most(1680)], [0, 1, 1, 2, 3, 4]);
        assert_eq!(needs.most_layers(&[0]), 0);
    }

    #[test]
    fn layers_go_to_several_devices_in_proportion_or_as_they_fit() {
        let needs = Needs {
            layer_weights: alloc::vec![100, 100, 100, 700],
            layer_kv: alloc::vec![10; 4],
            other_weights: 1000,
            activations: 50,
            ..Needs::default()
        };
        let free = |bytes: [u64; 2]| bytes.map(|bytes| RESERVE_BYTES + bytes);
        // Much the same is free: half each, as far as it fits.
        assert_eq!(needs.spread(2, &free([160, 760])), Some(alloc::vec![2..3, 3..4]));
        assert_eq!(needs.spread(4, &free([2000, 2000])), Some(alloc::vec![0..2, 2..4]));
        assert_eq!(needs.spread(4, &free([380, 760])), Some(alloc::vec![0..3, 3..4]));
        assert_eq!(needs.spread(4, &free([270, 760])), None);
        assert_eq!(needs.most_layers(&free([270, 760])), 3);
        // Embeddings and output count on both ends.
        assert_eq!(needs.spread(5, &free([1270, 1869])), None);
        assert_eq!(needs.spread(5, &free([1270, 1870])), Some(alloc::vec![0..2, 2..4]));
    }

    #[test]
    fn weights_apart_and_those_of_the_host_count() {
        let needs = Needs {
            layer_weights: alloc::vec![100, 100, 100],
            layer_kv: alloc::vec![10; 3],
            other_weights: 1000,
            activations: 50,
            apart: alloc::vec![0, 7],
            brought: alloc::vec![[80, 0], [90, 0], [85, 5]],
        };
        // Two layers on the host: the larger one's products, twice. None: what the last keeps there. Copies are of all.
        let share = Share { weights: 100, kv_cache: 10, activations: 50, brought: 180, pinned: 175 };
        assert_eq!((needs.share(1), share.total()), (share, 340));
        assert_eq!(needs.share(4).brought, 10);
        assert_eq!(
            needs.share(0),
            Share::default(),
            "a device without anything brings nothing if another has some"
        );
        let nothing = Needs { apart: Vec::new(), ..needs.clone() };
        let share = Share { activations: 50, brought: 180, pinned: 255, ..Share::default() };
        assert_eq!(nothing.share(0), share, "unless no other has");
        assert_eq!(nothing.shares(0, &[3..3, 3..3]), [share, Share::default()]);
        assert_eq!(nothing.most_layers(&[RESERVE_BYTES + 229]), 0);
        assert_eq!(nothing.spread(0, &[RESERVE_BYTES + 229]), None);
        let [first, second] = needs.shares(1, &[2..3, 3..3])[..] else { panic!("two devices") };
        assert_eq!((first.brought, second.brought), (180, 0));
        assert_eq!(second, Share { weights: 7, activations: 50, ..Share::default() });
        let [first, second] = needs.shares(1, &[2..2, 2..3])[..] else { panic!("two devices") };
        assert_eq!((first, second.brought, second.weights), (Share::default(), 180, 107));
        // 340 bytes for one layer, 390 for three: two, which leave one on the host, would take more.
        let most = |free: u64| needs.most_layers(&[RESERVE_BYTES + free]);
        assert_eq!([most(339), most(340), most(389), most(390)], [0, 1, 1, 3]);
    }
}
