//! Kernels that are loaded before a plan asks for them, while weights are on their way. The first time a kernel is used on
//! a machine the driver compiles it, which takes up to a second, and it compiles one at a time whatever the threads.
//!
//! Which kernels the first steps launch is a guess. One that is loaded in vain costs a little memory; one that was not
//! foreseen is loaded when a plan asks for it.

use alloc::string::String;
use alloc::vec::Vec;
use core::ops::Range;
use core::sync::atomic::{AtomicBool, Ordering};

use gpu_kernels::driver::DeviceInfo;
use gpu_kernels::launch::DevicePtr;
use gpu_kernels::modules::{Missing, Modules};

use super::emit::{Emit, KvAddresses, SizeClass};
use super::fuse::RuleSet;
use super::inputs::{InputAddresses, InputLayout};
use super::lower::Lowered;
use super::memory::Device;
use super::translate::{self, Anywhere};
use crate::graph::Graph;
use crate::kv_cache::KvLayout;

/// Loads kernels beside a [`Cuda`](super::Cuda) that is busy.
pub struct Ahead {
    device: Device,
    rules: RuleSet,
    stopped: AtomicBool,
}

/// Loads kernels by name and no more, for what the driver keeps of them on disk.
pub fn load_kernels<'a>(device: &Device, entries: impl Iterator<Item = &'a str>) {
    let kernels = Modules::new().missing(&**device, entries);
    (0..kernels.len()).for_each(|i| kernels.load(&**device, i));
}

impl Ahead {
    pub(super) fn new(device: Device, rules: RuleSet) -> Ahead {
        Ahead { device, rules, stopped: AtomicBool::new(false) }
    }

    /// The kernels of steps; those that most of the steps launch come first. A step is a graph and the positions of its
    /// tokens, all of one sequence.
    pub fn kernels(&self, steps: &[(Graph, Range<usize>)], kv: &KvLayout) -> Missing {
        Modules::new().missing(&*self.device, self.entries(steps, kv).into_iter())
    }

    /// Loads these of the kernels until all are there or [`Ahead::stop`] is called.
    pub fn load(&self, kernels: &Missing, which: Range<usize>) {
        for i in which {
            if self.stopped.load(Ordering::Relaxed) {
                break;
            }
            kernels.load(&*self.device, i);
        }
    }

    /// Makes [`Ahead::load`] return after the kernel that it is loading.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    /// The kernels of steps, each once.
    fn entries(&self, steps: &[(Graph, Range<usize>)], kv: &KvLayout) -> Vec<&'static str> {
        let mut found: Vec<(&'static str, usize)> = Vec::new();
        for (i, (graph, positions)) in steps.iter().enumerate() {
            // A step that cannot be lowered is reported when it is prepared, not here.
            let class = SizeClass::of_positions(positions);
            let entries = entries_of(graph, self.rules, class, &self.device.info(), kv);
            for entry in entries.unwrap_or_default() {
                match found.iter_mut().find(|(name, _)| *name == entry) {
                    Some((_, of_steps)) => *of_steps |= 1 << i,
                    None => found.push((entry, 1 << i)),
                }
            }
        }
        found.sort_by_key(|(_, of_steps)| core::cmp::Reverse(of_steps.count_ones()));
        found.into_iter().map(|(entry, _)| entry).collect()
    }
}

/// The kernels of a step's launches, in their order. An error says which node or action has none.
pub(super) fn entries_of(
    graph: &Graph,
    rules: RuleSet,
    class: SizeClass,
    device: &DeviceInfo,
    kv: &KvLayout,
) -> Result<Vec<&'static str>, String> {
    let lowered = Lowered::new(graph, &Anywhere, rules, class, device).map_err(|(_, why)| why)?;
    // Which kernel it is depends on no address, only on their alignment.
    let somewhere = DevicePtr(1 << 20);
    let parts = alloc::vec![[somewhere; 2]; kv.layers.len()];
    let emit = Emit {
        arena: somewhere,
        slots: &lowered.places.slots,
        inputs: InputAddresses { block: somewhere, layout: InputLayout::default() },
        kv: Some(KvAddresses { layout: kv, parts: &parts }),
        class,
        device,
        prompt: translate::runs_apart(graph, device),
    };
    let mut entries = Vec::new();
    for action in &lowered.program.actions {
        entries.extend(emit.launches(action)?.iter().map(|launch| launch.entry));
    }
    Ok(entries)
}

#[cfg(all(test, feature = "emu"))]
mod tests {
    use alloc::collections::BTreeSet;
    use alloc::sync::Arc;
    use alloc::vec;

    use gpu_kernels::emu::{Emulator, Options};
    use quant::FormatId;

    use super::*;
    use crate::backend::{Backend, Step, StepSequence};
    use crate::backends::cuda::Cuda;
    use crate::executor::Serial;
    use crate::io::Mapped;
    use crate::models::StepShape;
    use crate::plan::Plan;
    use crate::{ContextParams, Model};

    /// What is loaded ahead of two steps is what they launch, and what both launch comes first.
    #[test]
    fn the_kernels_of_the_first_steps_are_foreseen() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../cli/tests/golden/llama-linear-a.gguf");
        let model = Model::load(vec![Arc::new(Mapped::open(path.as_ref()).unwrap())]).unwrap();
        let kv = KvLayout::new(model.hparams(), 64, FormatId::F16, FormatId::F16).unwrap();
        for sm in [80, 90] {
            let device: Device = Arc::new(Emulator::new(Options { sm, ..Options::default() }));
            let mut cuda = Cuda::new(device, Arc::new(Serial), model.weights().clone());
            cuda.create_kv(&kv).unwrap();
            let apart = cuda.runs_prompts_apart();
            let steps: Vec<(Graph, Range<usize>)> = [(0..20, apart), (20..21, false)]
                .map(|(positions, prompt)| {
                    let shape = StepShape { prompt, ..ContextParams::default().step(positions.len(), 1) };
                    (model.graph(64, shape), positions)
                })
                .into();
            let launched: Vec<BTreeSet<&str>> = steps
                .iter()
                .map(|(graph, positions)| {
                    let id = cuda.prepare(Arc::new(Plan::new(graph.clone()))).unwrap();
                    let n = positions.len();
                    let step = Step {
                        tokens: &vec![1; n],
                        positions: &positions.clone().map(|p| p as i32).collect::<Vec<_>>(),
                        output_rows: &[n as i32 - 1],
                        token_sequences: &vec![0; n],
                        cells: &positions.clone().map(|p| p as u32).collect::<Vec<_>>(),
                        sequences: &[StepSequence { first_page: 0, len: positions.end as u32 }],
                        pages: &[0],
                        given: &[],
                    };
                    cuda.run(id, &step).unwrap();
                    let ready = cuda.plans[&id.0].ready.values();
                    ready.flat_map(|ready| &ready.launches).map(|(_, launch)| launch.entry).collect()
                })
                .collect();
            let ahead = cuda.ahead();
            let foreseen = ahead.entries(&steps, &kv);
            let all: BTreeSet<&str> = launched.iter().flatten().copied().collect();
            assert_eq!(foreseen.iter().copied().collect::<BTreeSet<_>>(), all);
            assert_eq!(foreseen.len(), all.len());
            let of_both: BTreeSet<&str> = launched[0].intersection(&launched[1]).copied().collect();
            assert!(!of_both.is_empty() && of_both.len() < all.len());
            let first: BTreeSet<&str> = foreseen[..of_both.len()].iter().copied().collect();
            assert_eq!(first, of_both, "sm {sm}");
            // The emulator has them all.
            assert!(ahead.kernels(&steps, &kv).is_empty());
        }
    }
}
