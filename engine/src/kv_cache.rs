//! The KV cache: pages of [`PAGE`] positions, and which pages each sequence owns.
//!
//! A page belongs to one sequence and holds positions `PAGE·i .. PAGE·(i+1)` of it, so attention walks a sequence's pages
//! in order of position and its result depends on nothing else in the cache. Memory layout per layer and part:
//! `[page][kv head][position in page][head_dim]`, rows of `head_dim` in the cache's format.

use alloc::format;
use alloc::vec::Vec;

use quant::FormatId;

use crate::error::EngineError;
use crate::hparams::Hparams;
use crate::op::KvPart;

/// Positions per page.
pub const PAGE: usize = 64;

/// Formats a cache can be kept in.
pub const KV_FORMATS: &[FormatId] = &[
    FormatId::F32,
    FormatId::F16,
    FormatId::BF16,
    FormatId::Q8_0,
    FormatId::Q4_0,
    FormatId::Q4_1,
    FormatId::Q5_0,
    FormatId::Q5_1,
    FormatId::IQ4_NL,
];

/// Whether the formats of keys and values are among those that somebody, `whose`, can do.
pub fn check_formats(
    [type_k, type_v]: [FormatId; 2],
    formats: &[FormatId],
    whose: &str,
) -> Result<(), EngineError> {
    for (name, format) in [("cache type of keys", type_k), ("cache type of values", type_v)] {
        if !formats.contains(&format) {
            let names: Vec<_> = formats.iter().map(|f| f.name()).collect();
            return Err(EngineError::BadParam {
                name,
                got: format!("{format}"),
                expected: format!("one of {}{whose}", names.join(", ")),
            });
        }
    }
    Ok(())
}

/// One layer's heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayer {
    /// Key/value heads.
    pub n_head_kv: usize,
    /// Elements per key head.
    pub head_dim_k: usize,
    /// Elements per value head.
    pub head_dim_v: usize,
}

/// Sizes and formats of a cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvLayout {
    /// Pages in all.
    pub n_pages: usize,
    /// Format of keys.
    pub type_k: FormatId,
    /// Format of values.
    pub type_v: FormatId,
    /// Layer by layer.
    pub layers: Vec<KvLayer>,
}

impl KvLayout {
    /// Room for `n_cells` positions of a model, rounded up to whole pages.
    pub fn new(
        hp: &Hparams,
        n_cells: usize,
        type_k: FormatId,
        type_v: FormatId,
    ) -> Result<KvLayout, EngineError> {
        check_formats([type_k, type_v], KV_FORMATS, "")?;
        for (name, format, head_dim) in
            [("cache type of keys", type_k, hp.head_dim_k), ("cache type of values", type_v, hp.head_dim_v)]
        {
            if quant::row::row_bytes(format, head_dim).is_err() {
                return Err(EngineError::BadParam {
                    name,
                    got: format!("{format}"),
                    expected: format!(
                        "a format whose block of {} divides the head dimension {head_dim}",
                        quant::info(format).elems
                    ),
                });
            }
        }
        let layers = hp
            .layers
            .iter()
            .map(|l| KvLayer { n_head_kv: l.n_head_kv, head_dim_k: hp.head_dim_k, head_dim_v: hp.head_dim_v })
            .collect();
        Ok(KvLayout { n_pages: n_cells.div_ceil(PAGE), type_k, type_v, layers })
    }

    /// Format of a part.
    pub fn format(&self, part: KvPart) -> FormatId {
        match part {
            KvPart::K => self.type_k,
            KvPart::V => self.type_v,
        }
    }

    /// Elements per head of a part of a layer.
    pub fn head_dim(&self, il: usize, part: KvPart) -> usize {
        match part {
            KvPart::K => self.layers[il].head_dim_k,
            KvPart::V => self.layers[il].head_dim_v,
        }
    }

    /// Bytes of a head's row.
    pub fn row_bytes(&self, il: usize, part: KvPart) -> usize {
        quant::row::row_bytes(self.format(part), self.head_dim(il, part)).expect("checked in new")
    }

    /// Bytes of a part of a layer.
    pub fn part_bytes(&self, il: usize, part: KvPart) -> usize {
        self.n_pages * self.layers[il].n_head_kv * PAGE * self.row_bytes(il, part)
    }

    /// Bytes of the whole cache.
    pub fn total_bytes(&self) -> usize {
        (0..self.layers.len()).map(|il| self.part_bytes(il, KvPart::K) + self.part_bytes(il, KvPart::V)).sum()
    }
}

/// A sequence's pages and length.
#[derive(Clone, Debug, Default)]
struct Sequence {
    pages: Vec<u32>,
    len: usize,
}

/// Which pages are whose. Holds no bytes: those belong to the backend.
#[derive(Clone, Debug)]
pub struct KvCache {
    free: Vec<u32>,
    sequences: Vec<Sequence>,
    n_ctx_seq: usize,
}

impl KvCache {
    /// All pages free, `n_seq` empty sequences of at most `n_ctx_seq` positions.
    pub fn new(n_pages: usize, n_seq: usize, n_ctx_seq: usize) -> KvCache {
        let sequence = || Sequence { pages: Vec::with_capacity(n_ctx_seq.div_ceil(PAGE)), len: 0 };
        KvCache {
            free: (0..n_pages as u32).rev().collect(),
            sequences: (0..n_seq).map(|_| sequence()).collect(),
            n_ctx_seq,
        }
    }

    /// Sequences there are.
    pub fn n_seq(&self) -> usize {
        self.sequences.len()
    }

    /// Positions a sequence may have.
    pub fn n_ctx_seq(&self) -> usize {
        self.n_ctx_seq
    }

    /// Positions of a sequence.
    pub fn len(&self, seq: usize) -> usize {
        self.sequences[seq].len
    }

    /// Pages of a sequence, in order of position.
    pub fn pages(&self, seq: usize) -> &[u32] {
        &self.sequences[seq].pages
    }

    /// Makes room for `n` more positions of a sequence; on an error nothing has changed.
    pub fn extend(&mut self, seq: usize, n: usize) -> Result<(), EngineError> {
        let sequence = &mut self.sequences[seq];
        let needed = sequence.len + n;
        if needed > self.n_ctx_seq {
            return Err(EngineError::ContextFull { needed, n_ctx: self.n_ctx_seq });
        }
        let new_pages = needed.div_ceil(PAGE) - sequence.pages.len().min(needed.div_ceil(PAGE));
        if new_pages > self.free.len() {
            let n_ctx = sequence.pages.len() * PAGE + self.free.len() * PAGE;
            return Err(EngineError::ContextFull { needed, n_ctx });
        }
        for _ in 0..new_pages {
            sequence.pages.extend(self.free.pop());
        }
        sequence.len = needed;
        Ok(())
    }

    /// The cell of a position: `page · PAGE + offset`.
    pub fn cell(&self, seq: usize, pos: usize) -> u32 {
        self.sequences[seq].pages[pos / PAGE] * PAGE as u32 + (pos % PAGE) as u32
    }

    /// Forgets all positions from `len` on and frees the pages that become empty.
    pub fn truncate(&mut self, seq: usize, len: usize) {
        let sequence = &mut self.sequences[seq];
        sequence.len = sequence.len.min(len);
        let keep = sequence.len.div_ceil(PAGE);
        self.free.extend(sequence.pages.drain(keep..).rev());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Whatever is extended and truncated, no page has two owners and none is lost.
        #[test]
        fn pages_have_one_owner(ops in prop::collection::vec((0usize..4, 0usize..200, any::<bool>()), 1..60)) {
            let mut kv = KvCache::new(12, 4, 300);
            for (seq, n, grow) in ops {
                let before = kv.len(seq);
                if grow {
                    match kv.extend(seq, n) {
                        Ok(()) => prop_assert_eq!(kv.len(seq), before + n),
                        Err(_) => prop_assert_eq!(kv.len(seq), before),
                    }
                } else {
                    kv.truncate(seq, n);
                    prop_assert_eq!(kv.len(seq), before.min(n));
                }
                let mut all: Vec<u32> = kv.free.clone();
                for s in 0..4 {
                    prop_assert_eq!(kv.pages(s).len(), kv.len(s).div_ceil(PAGE));
                    all.extend(kv.pages(s));
                }
                all.sort_unstable();
                prop_assert_eq!(all, (0..12).collect::<Vec<u32>>());
            }
        }
    }
}
