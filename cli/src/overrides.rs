//! Weights that the user puts elsewhere than their layer: `--override-tensor`, `--cpu-moe`, `--n-cpu-moe`. The first of
//! them that matches a tensor's name counts. A pattern that matches nothing, or a device that is not there, is an error.

use std::collections::BTreeMap;

use anyhow::Result;
use engine::Model;
use engine::backends::cuda::Site;
use regex_lite::Regex;

use crate::args::{Device, WeightArgs};
use crate::exit::usage;

/// Names of experts' tensors after the layer's part, as llama.cpp's own shortcuts have them.
const EXPERTS: &str = r"\.ffn_(up|down|gate)_(ch|)exps";

/// What the user says of single weights, on devices that are there.
pub struct Overrides {
    patterns: Vec<(Regex, Site)>,
    cpu_moe: bool,
    n_cpu_moe: usize,
}

impl Overrides {
    /// Reads the flags; `gpus` are the names by which users call the GPUs.
    pub fn new(args: &WeightArgs, gpus: &[&str]) -> Result<Overrides> {
        let site = |device: Device| match device {
            Device::Cpu => Ok(Site::Host),
            named => {
                let name = named.to_string();
                gpus.iter().position(|gpu| *gpu == name).map(Site::Gpu).ok_or_else(|| {
                    let there = ["cpu"].iter().chain(gpus).copied().collect::<Vec<_>>().join(", ");
                    usage(format!("--override-tensor: {name} is none of the devices that compute: {there}"))
                })
            }
        };
        let patterns = args.override_tensor.iter();
        let patterns = patterns.map(|(pattern, device)| Ok((pattern.clone(), site(*device)?)));
        Ok(Overrides {
            patterns: patterns.collect::<Result<_>>()?,
            cpu_moe: args.cpu_moe,
            n_cpu_moe: args.n_cpu_moe.unwrap_or(0),
        })
    }

    /// The sites of a model's weights, by index; a weight that is not listed is where its layer is.
    pub fn sites(&self, model: &Model) -> Result<BTreeMap<u32, Site>> {
        let names = || (0u32..).zip(model.weights().iter().map(|w| &w.name));
        let mut sites = BTreeMap::new();
        let mut put = |pattern: &Regex, site: Site| {
            let found = names().filter(|(_, name)| pattern.is_match(name));
            found.map(|(id, _)| *sites.entry(id).or_insert(site)).count()
        };
        for (pattern, site) in &self.patterns {
            if put(pattern, *site) == 0 {
                return Err(usage(format!("--override-tensor: no tensor's name matches '{pattern}'")));
            }
        }
        if !self.cpu_moe && self.n_cpu_moe == 0 {
            return Ok(sites);
        }
        if model.hparams().moe.is_none() {
            let flag = if self.cpu_moe { "--cpu-moe" } else { "--n-cpu-moe" };
            return Err(usage(format!("{flag}: the model ({}) has no experts", model.arch_name())));
        }
        let n_layer = model.hparams().n_layer();
        put(&experts(if self.cpu_moe { n_layer } else { self.n_cpu_moe.min(n_layer) })?, Site::Host);
        Ok(sites)
    }
}

/// Names of the experts' tensors of the first `n` layers, one at least.
fn experts(n: usize) -> Result<Regex> {
    let layers = (0..n).map(|il| il.to_string()).collect::<Vec<_>>().join("|");
    Ok(Regex::new(&format!(r"^blk\.({layers}){EXPERTS}"))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_of_the_first_layers() {
        let two = experts(2).unwrap();
        for name in ["blk.0.ffn_gate_exps.weight", "blk.1.ffn_down_exps.bias", "blk.1.ffn_up_chexps.weight"] {
            assert!(two.is_match(name), "{name}");
        }
        for name in ["blk.2.ffn_gate_exps.weight", "blk.10.ffn_up_exps.weight", "blk.0.ffn_gate_inp.weight"] {
            assert!(!two.is_match(name), "{name}");
        }
        assert!(experts(11).unwrap().is_match("blk.10.ffn_up_exps.weight"));
    }
}
