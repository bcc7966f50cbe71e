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

/// Lifetime of a block of arena memory, in node indices.
#[derive(Clone, Copy, Debug)]
struct Block {
    len: usize,
    first: usize,
    last: usize,
}

const NONE: usize = usize::MAX;

impl Plan {
    /// Plans a graph.
    pub fn new(graph: Graph) -> Plan {
        let n = graph.tensors.len();
        let base: Vec<usize> = (0..n).map(|i| graph.base(TensorId(i as u32)).0 as usize).collect();
        let last_read = last_reads(&graph, &base);

        // Each activation gets a block, or joins its input's.
        let mut block_of = alloc::vec![NONE; n];
        let mut blocks: Vec<Block> = Vec::new();
        for (i, node) in graph.nodes.iter().enumerate() {
            for &out in &node.outputs {
                let out = out.0 as usize;
                let len = len_bytes(&graph, out);
                let taken = node.op.in_place_input().map(|x| base[x.0 as usize]).filter(|&x| {
                    block_of[x] != NONE
                        && last_read[x] == i
                        && blocks[block_of[x]].len == len
                        && reads(node, &base, x) == 1
                });
                block_of[out] = match taken {
                    Some(x) => block_of[x],
                    None => {
                        blocks.push(Block { len, first: i, last: i });
                        blocks.len() - 1
                    }
                };
                let block = &mut blocks[block_of[out]];
                block.last = block.last.max(if last_read[out] == NONE { i } else { last_read[out] });
            }
        }
        let (offsets, arena_bytes) = assign(&blocks);
        let slots = (0..n)
            .map(|t| {
                let block = block_of[base[t]];
                (block != NONE).then(|| Slot { offset: offsets[block], len: blocks[block].len })
            })
            .collect();
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

fn len_bytes(graph: &Graph, t: usize) -> usize {
    let tensor = &graph.tensors[t];
    quant::info(tensor.format).bytes * tensor.shape.elems()
}

/// How many of a node's inputs lie in tensor `x`'s memory.
fn reads(node: &crate::graph::Node, base: &[usize], x: usize) -> usize {
    let mut n = 0;
    node.op.for_each_input(|t| n += usize::from(base[t.0 as usize] == x));
    n
}

/// Index of the last node that reads each tensor's memory; `NONE` if none does; past the end for outputs.
fn last_reads(graph: &Graph, base: &[usize]) -> Vec<usize> {
    let mut last = alloc::vec![NONE; graph.tensors.len()];
    for (i, node) in graph.nodes.iter().enumerate() {
        node.op.for_each_input(|t| last[base[t.0 as usize]] = i);
    }
    for (_, t) in &graph.outputs {
        last[base[t.0 as usize]] = graph.nodes.len();
    }
    last
}

/// Offsets of all blocks and the arena's size.
fn assign(blocks: &[Block]) -> (Vec<usize>, usize) {
    let mut order: Vec<usize> = (0..blocks.len()).collect();
    order.sort_by_key(|&b| (core::cmp::Reverse(blocks[b].len), blocks[b].first));
    let mut offsets = alloc::vec![0; blocks.len()];
    let mut placed: Vec<usize> = Vec::new(); // sorted by offset
    let mut arena = 0;
    for b in order {
        let len = blocks[b].len.next_multiple_of(ALIGN_BYTES);
        let mut at = 0;
        for &p in &placed {
            let overlap = blocks[p].first <= blocks[b].last && blocks[b].first <= blocks[p].last;
            if !overlap {
                continue;
            }
            if offsets[p] >= at + len {
                break;
            }
            at = at.max(offsets[p] + blocks[p].len.next_multiple_of(ALIGN_BYTES));
        }
        offsets[b] = at;
        arena = arena.max(at + len);
        let place = placed.partition_point(|&p| offsets[p] <= at);
        placed.insert(place, b);
    }
    (offsets, arena)
}

/// Every step input of a graph, for backends that stage them.
pub fn inputs(graph: &Graph) -> impl Iterator<Item = (crate::tensor::Input, TensorId)> + '_ {
    graph.tensors.iter().enumerate().filter_map(|(i, t)| match t.storage {
        Storage::Input(input) => Some((input, TensorId(i as u32))),
        _ => None,
    })
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
