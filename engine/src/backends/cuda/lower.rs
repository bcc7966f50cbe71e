//! From a graph to everything that its launches are made of except addresses: the program, with actions merged, and the
//! place of each value in the arena.

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;

use gpu_kernels::driver::DeviceInfo;

use super::emit::{self, SizeClass};
use super::fuse::RuleSet;
use super::program::{Program, Value};
use super::translate::{self, Addresses};
use crate::graph::Graph;
use crate::plan::{self, Layout};
use crate::tensor::TensorId;

/// Alignment of values in the arena: two sectors of L2, and more than any kernel asks for.
const ALIGN_BYTES: usize = 256;

/// A graph for a device.
pub struct Lowered {
    /// The actions.
    pub program: Program,
    /// Value of each activation of the graph, by base tensor.
    pub values: BTreeMap<TensorId, Value>,
    /// Where values lie in the arena.
    pub places: Layout,
}

impl Lowered {
    /// Lowers a graph for steps of a size class. An error is the index of a node that cannot be translated, and the reason.
    pub fn new(
        graph: &Graph,
        addresses: &dyn Addresses,
        rules: RuleSet,
        class: SizeClass,
        device: &DeviceInfo,
    ) -> Result<Lowered, (usize, String)> {
        let (mut program, values) = translate::translate(graph, addresses, device)?;
        program.most_tokens = class.most_tokens;
        rules.apply(&mut program);
        emit::add_scratch(&mut program, class, device);
        let kept: Vec<usize> = program.kept.iter().map(|v| v.index()).collect();
        let places = plan::lay_out(&program.values, &program.accesses(), &kept, ALIGN_BYTES);
        Ok(Lowered { program, values, places })
    }
}
