//! From actions to launches, once every address is known. Pure: the same action at the same addresses gives the same
//! launches, whatever was run before.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

use gpu_kernels::kernels::{elementwise, quantise_act, rms_norm, rope};
use gpu_kernels::launch::{DevicePtr, Launch, LaunchError};

use super::inputs::InputAddresses;
use super::program::{Action, Place, Value};
use crate::kv_cache::KvLayout;
use crate::op::KvPart;
use crate::plan::Slot;

/// Most tokens whose products with block formats go to the matrix × vector kernel.
pub const MMVQ_MAX_COLS: usize = 8;

/// Where everything is that actions name.
pub struct Emit<'a> {
    /// Start of the arena.
    pub arena: DevicePtr,
    /// Per value.
    pub slots: &'a [Option<Slot>],
    /// The step's inputs.
    pub inputs: InputAddresses,
    /// The cache, where there is one.
    pub kv: Option<KvAddresses<'a>>,
    /// Most spans of the cache that any sequence of the step has, rounded up to a power of two.
    pub max_spans: usize,
    /// Streaming multiprocessors.
    pub n_sm: u32,
}

/// Where the cache is.
#[derive(Clone, Copy)]
pub struct KvAddresses<'a> {
    /// Sizes and formats.
    pub layout: &'a KvLayout,
    /// Per layer: keys, values.
    pub parts: &'a [[DevicePtr; 2]],
}

impl KvAddresses<'_> {
    fn at(&self, il: usize, part: KvPart) -> DevicePtr {
        self.parts[il][part as usize]
    }
}

fn words(error: LaunchError) -> String {
    error.to_string()
}

/// Bytes of the sort of (token, slot) pairs by expert.
pub fn sort_bytes(n: usize, n_used: usize, n_expert: usize) -> Result<usize, LaunchError> {
    Ok(4 * (n * n_used + n_expert + 1))
}

impl Emit<'_> {
    fn value(&self, v: Value) -> DevicePtr {
        let slot = self.slots[v.index()].expect("the planner placed every value that an action names");
        self.arena.offset(slot.offset as u64)
    }

    fn place(&self, p: Place) -> DevicePtr {
        match p {
            Place::Value(v) => self.value(v),
            Place::At(at) => at,
        }
    }

    fn opt(&self, p: Option<Place>) -> DevicePtr {
        p.map_or(DevicePtr::NULL, |p| self.place(p))
    }

    /// The launches of an action; the reason if there is no kernel for it.
    pub fn launches(&self, action: &Action) -> Result<Vec<Launch>, String> {
        match action {
            Action::Quantise { x, n, k, acts } => quantise_act::launch(&quantise_act::Args {
                kind: acts.kind,
                x: self.place(*x),
                q: self.value(acts.q),
                scales: self.value(acts.scales),
                n_cols: *n,
                k: *k,
            })
            .map(|l| vec![l])
            .map_err(words),
            _ => Err(format!("no kernel")),
        }
    }
}
