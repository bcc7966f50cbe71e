//! The memory plan: where in one arena each activation of a graph lives.
//!
//! A tensor is live from the node that writes it to the last node that reads it (or for good, if it is an output). Ops
//! that may work in place take over their input's memory. Offsets are assigned largest first, each at the lowest place
//! that no overlapping lifetime uses; the arena is as large as the highest end.

use alloc::vec::Vec;

use crate::graph::{Graph, Output};
use crate::tensor::{Shape, Storage, TensorId};

/// Alignment of every tensor in the arena: one cache line, one AVX-512 vector.
pub const ALIGN_BYTES: usize = 64;

/// A range of the arena, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// First byte; a multiple of [`ALIGN_BYTES`].
    pub offset: usize,
    /// Length without padding.
    pub len: usize,
}

/// A graph with memory assigned.
#[derive(Debug)]
pub struct Plan {
    /// What to run.
    pub graph: Graph,
    /// Bytes of arena needed.
    pub arena_bytes: usize,
    slots: Vec<Option<Slot>>,
}

/// A piece of arena memory and the steps from which to which it is in use.
#[derive(Clone, Copy, Debug)]
struct Block {
    len: usize,
    first: usize,
    last: usize,
}

const NONE: usize = usize::MAX;

/// Which values one step of a program reads and writes, as indices into the program's list of values. (The steps of a
/// [`Plan`] are the nodes of its graph, and its values are activations; the GPU backend has a finer program.)
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// Values read.
    pub reads: Vec<usize>,
    /// Values written, each by this step only. One that no step reads is this step's scratch.
    pub writes: Vec<usize>,
    /// Pairs (read, written): the written value may take the memory of the one read, if no later step reads that.
    pub in_place: Vec<(usize, usize)>,
}

/// Where values live.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    /// Per value; `None` if no step touches it.
    pub slots: Vec<Option<Slot>>,
    /// Bytes of arena needed.
    pub arena_bytes: usize,
}

/// Lays values out: `len_bytes[v]` bytes for value `v`. `steps` run in order. A value in `kept` must outlive the last step;
/// one that is read but never written is there before the first.
pub fn lay_out(len_bytes: &[usize], steps: &[Access], kept: &[usize], align: usize) -> Layout {
    let n = len_bytes.len();
    let mut last_read = alloc::vec![NONE; n];
    let mut written = alloc::vec![false; n];
    for (i, step) in steps.iter().enumerate() {
        step.reads.iter().for_each(|&v| last_read[v] = i);
        step.writes.iter().for_each(|&v| written[v] = true);
    }
    kept.iter().for_each(|&v| last_read[v] = steps.len());

    let mut block_of = alloc::vec![NONE; n];
    let mut blocks: Vec<Block> = Vec::new();
    for v in 0..n {
        if !written[v] && last_read[v] != NONE {
            block_of[v] = blocks.len();
            blocks.push(Block { len: len_bytes[v], first: 0, last: last_read[v] });
        }
    }
    // Each value written gets a block, or joins that of a value it may be written over.
    for (i, step) in steps.iter().enumerate() {
        for &out in &step.writes {
            let mut candidates = step.in_place.iter().filter(|(_, w)| *w == out).map(|(r, _)| *r);
            let taken = candidates.find(|&x| {
                block_of[x] != NONE
                    && last_read[x] == i
                    && len_bytes[x] == len_bytes[out]
                    && step.reads.iter().filter(|&&r| r == x).count() == 1
                    && !step.writes.iter().any(|&w| block_of[w] == block_of[x])
            });
            block_of[out] = match taken {
                Some(x) => block_of[x],
                None => {
                    blocks.push(Block { len: len_bytes[out], first: i, last: i });
                    blocks.len() - 1
                }
            };
            let block = &mut blocks[block_of[out]];
            block.last = block.last.max(if last_read[out] == NONE { i } else { last_read[out] });
        }
    }
    let (offsets, arena_bytes) = assign(&blocks, align);
    let slots = (0..n)
        .map(|v| (block_of[v] != NONE).then(|| Slot { offset: offsets[block_of[v]], len: len_bytes[v] }))
        .collect();
    Layout { slots, arena_bytes }
}

impl Plan {
    /// Plans a graph.
    pub fn new(graph: Graph) -> Plan {
        let n = graph.tensors.len();
        let base: Vec<usize> = (0..n).map(|i| graph.base(TensorId(i as u32)).0 as usize).collect();
        let activation = |t: &usize| graph.tensors[*t].storage == Storage::Activation;
        let len_bytes: Vec<usize> = graph.tensors.iter().map(crate::tensor::Tensor::len_bytes).collect();
        let steps: Vec<Access> = graph
            .nodes
            .iter()
            .map(|node| {
                let mut reads = Vec::new();
                node.op.for_each_input(|t| reads.push(base[t.0 as usize]));
                reads.retain(activation);
                let writes: Vec<usize> = node.outputs.iter().map(|t| t.0 as usize).collect();
                let over = node.op.in_place_input().map(|x| base[x.0 as usize]).filter(activation);
                let in_place = over.into_iter().map(|x| (x, writes[0])).collect();
                Access { reads, writes, in_place }
            })
            .collect();
        let kept: Vec<usize> =
            graph.outputs.iter().map(|(_, t)| base[t.0 as usize]).filter(activation).collect();
        let Layout { slots, arena_bytes } = lay_out(&len_bytes, &steps, &kept, ALIGN_BYTES);
        let slots = base.iter().map(|&b| slots[b]).collect();
        Plan { graph, arena_bytes, slots }
    }

    /// Where an activation (or a reshape of one) lives; `None` for weights and inputs.
    pub fn slot(&self, id: TensorId) -> Option<Slot> {
        self.slots[id.0 as usize]
    }

    /// Shape of a tensor.
    pub fn shape(&self, id: TensorId) -> Shape {
        self.graph.tensor(id).shape
    }

    /// The output of a kind, if the graph has it.
    pub fn output(&self, kind: Output) -> Option<TensorId> {
        self.graph.output(kind)
    }
}

/// Offsets of all blocks and the arena's size.
fn assign(blocks: &[Block], align: usize) -> (Vec<usize>, usize) {
    let mut order: Vec<usize> = (0..blocks.len()).collect();
    order.sort_by_key(|&b| (core::cmp::Reverse(blocks[b].len), blocks[b].first));
    let mut offsets = alloc::vec![0; blocks.len()];
    let mut placed: Vec<usize> = Vec::new(); // sorted by offset
    let mut arena = 0;
    for b in order {
        let len = blocks[b].len.next_multiple_of(align);
        let mut at = 0;
        for &p in &placed {
            let overlap = blocks[p].first <= blocks[b].last && blocks[b].first <= blocks[p].last;
            if !overlap {
                continue;
            }
            if offsets[p] >= at + len {
                break;
            }
            at = at.max(offsets[p] + blocks[p].len.next_multiple_of(align));
        }
        offsets[b] = at;
        arena = arena.max(at + len);
        let place = placed.partition_point(|&p| offsets[p] <= at);
        placed.insert(place, b);
    }
    (offsets, arena)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::GraphBuilder;
    use crate::op::Unary;
    use crate::tensor::Input;
    use proptest::prelude::*;

    /// A random graph of elementwise ops over a pool of tensors.
    fn random_graph(steps: &[(u8, usize, usize)]) -> Graph {
        let mut b = GraphBuilder::new(true);
        let ids = b.input(Input::Tokens, 3);
        let table = b.weight(0, quant::FormatId::F32, &[7, 5], 0);
        let mut pool = alloc::vec![b.get_rows(table, ids)];
        for &(op, i, j) in steps {
            let (x, y) = (pool[i % pool.len()], pool[j % pool.len()]);
            let out = match op % 5 {
                0 => b.add(x, y),
                1 => b.unary(Unary::Silu, x),
                2 => {
                    let x = b.reshape(x, &[5, 3]);
                    let x = b.scale(x, 2.0);
                    b.reshape(x, &[3, 5])
                }
                3 => {
                    b.tap("kept", Some(i), x);
                    b.mul(x, y)
                }
                _ => b.get_rows(x, ids),
            };
            pool.push(out);
        }
        let last = *pool.last().unwrap();
        b.output(Output::Logits, last);
        b.finish()
    }

    proptest! {
        /// Runs the plan symbolically: every byte remembers which tensor wrote it last, and every read must find the
        /// tensor it means. Breaks if two live tensors overlap or an in-place op destroys what is still needed.
        #[test]
        fn reads_find_what_was_written(steps in prop::collection::vec((any::<u8>(), 0usize..50, 0usize..50), 1..40)) {
            let plan = Plan::new(random_graph(&steps));
            let graph = &plan.graph;
            let mut owner = alloc::vec![NONE; plan.arena_bytes];
            let check = |owner: &[usize], t: TensorId| -> Result<(), TestCaseError> {
                if let Some(slot) = plan.slot(t) {
                    let base = graph.base(t).0 as usize;
                    for (i, o) in owner[slot.offset..slot.offset + slot.len].iter().enumerate() {
                        prop_assert_eq!(*o, base, "byte {} of tensor {:?}", i, t);
                    }
                }
                Ok(())
            };
            for node in &graph.nodes {
                let mut inputs = Vec::new();
                node.op.for_each_input(|t| inputs.push(t));
                for t in inputs {
                    check(&owner, t)?;
                }
                for &t in &node.outputs {
                    let slot = plan.slot(t).unwrap();
                    prop_assert_eq!(slot.offset % ALIGN_BYTES, 0);
                    owner[slot.offset..slot.offset + slot.len].fill(t.0 as usize);
                }
            }
            for (_, t) in &graph.outputs {
                check(&owner, *t)?;
            }
        }
    }
}
