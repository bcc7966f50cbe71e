//! How much memory a model needs on the device, layer by layer: known before anything is loaded.

use alloc::vec::Vec;

use gpu_kernels::driver::DeviceInfo;

use super::emit::{self, SizeClass};
use super::fuse::RuleSet;
use super::translate::{self, Anywhere};
use super::weights::DeviceWeights;
use crate::backends::split::layer_of;
use crate::context::ContextParams;
use crate::error::EngineError;
use crate::kv_cache::{KvLayout, PAGE};
use crate::model::Model;
use crate::op::KvPart;
use crate::plan;

/// What the driver itself takes when the first kernels run (context, modules), and what fragments: measured on no device,
/// chosen well above what drivers of today take.
const RESERVE_BYTES: u64 = 600 << 20;

/// Bytes on the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Needs {
    /// Weights of each layer.
    pub layer_weights: Vec<usize>,
    /// Cache of each layer.
    pub layer_kv: Vec<usize>,
    /// Weights outside the layers.
    pub other_weights: usize,
    /// The arena of the largest step.
    pub activations: usize,
}

/// What part of a model on the device takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Weights.
    pub weights: u64,
    /// Cache.
    pub kv_cache: u64,
    /// The arena, whatever the number of layers.
    pub activations: u64,
}

impl Share {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.weights + self.kv_cache + self.activations
    }
}

impl Needs {
    /// Of a model in a context of these sizes on a device.
    pub fn of(model: &Model, params: &ContextParams, device: &DeviceInfo) -> Result<Needs, EngineError> {
        let graph = model.graph(params.n_ctx, params.largest_step());
        let n_cells = params.n_ctx.div_ceil(PAGE) * PAGE * params.n_seq;
        let kv = KvLayout::new(model.hparams(), n_cells, params.type_k, params.type_v)?;
        let n_layer = kv.layers.len();
        let (mut layer_weights, mut other_weights) = (alloc::vec![0; n_layer], 0);
        for key in translate::weights_of(&graph) {
            let bytes = DeviceWeights::device_bytes(model.weights(), key);
            match layer_of(&model.weights().get(key.weight).name).filter(|il| *il < n_layer) {
                Some(il) => layer_weights[il] += bytes,
                None => other_weights += bytes,
            }
        }
        let layer_kv =
            (0..n_layer).map(|il| kv.part_bytes(il, KvPart::K) + kv.part_bytes(il, KvPart::V)).collect();
        let (mut program, _) = translate::translate(&graph, &Anywhere).map_err(|(i, why)| {
            EngineError::UnsupportedOp { backend: super::NAME, op: graph.nodes[i].op.name(), why }
        })?;
        RuleSet::ALL.apply(&mut program);
        let max_spans = params.n_ctx.div_ceil(emit::KV_SPAN).next_power_of_two();
        emit::add_scratch(&mut program, SizeClass { max_spans, prefill: true }, device);
        let kept: Vec<usize> = program.kept.iter().map(|v| v.index()).collect();
        let places = plan::lay_out(&program.values, &program.accesses(), &kept, super::ALIGN_BYTES);
        Ok(Needs { layer_weights, layer_kv, other_weights, activations: places.arena_bytes })
    }

    /// Layers of the model.
    pub fn n_layer(&self) -> usize {
        self.layer_weights.len()
    }

    /// What the last `n` layers take; with more than there are, all of the model.
    pub fn share(&self, n: usize) -> Share {
        let first = self.n_layer() - n.min(self.n_layer());
        let other = if n > self.n_layer() { self.other_weights } else { 0 };
        let sum = |list: &[usize]| list[first..].iter().map(|b| *b as u64).sum::<u64>();
        Share {
            weights: sum(&self.layer_weights) + other as u64,
            kv_cache: sum(&self.layer_kv),
            activations: if n == 0 { 0 } else { self.activations as u64 },
        }
    }

    /// The most layers, counted as [`Needs::share`] does, that fit into so many free bytes.
    pub fn most_layers(&self, free_bytes: u64) -> usize {
        let room = free_bytes.saturating_sub(RESERVE_BYTES);
        (0..=self.n_layer() + 1).rev().find(|n| self.share(*n).total() <= room).unwrap_or(0)
    }
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
        };
        assert_eq!(needs.share(1), Share { weights: 300, kv_cache: 10, activations: 50 });
        assert_eq!(needs.share(4).total(), 1680);
        let most = |free: u64| needs.most_layers(RESERVE_BYTES + free);
        assert_eq!([most(359), most(360), most(569), most(570), most(1679), most(1680)], [0, 1, 1, 2, 3, 4]);
        assert_eq!(needs.most_layers(0), 0);
    }
}
