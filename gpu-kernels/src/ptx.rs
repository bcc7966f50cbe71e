//! The embedded kernels: PTX modules, each one entry of a kernel file for one GPU generation.
//!
//! A module is what a driver compiles at a time, and it compiles one after the other, all that is in them: so a module
//! has one entry, with the tables that it names. Empty when the crate was built without the feature `ptx` or without a
//! device compiler.

use alloc::string::String;
use alloc::vec::Vec;

use ptx_pack::Words;

use crate::driver::DeviceInfo;

/// One module.
#[derive(Clone, Copy, Debug)]
pub struct PtxModule {
    /// The kernel file.
    pub file: &'static str,
    /// The entry, by which it is launched.
    pub entry: &'static str,
    /// The tier, as PTX spells it: `sm_80`.
    pub tier: &'static str,
    /// The oldest compute capability it runs on, times ten.
    pub sm: u32,
    /// Runs on that architecture only, not on later ones.
    pub exact: bool,
    /// The packed text of all tiers' modules of this entry (`ptx-pack`), deflated, and its length before.
    deflated: &'static [u8],
    packed_bytes: usize,
    /// Which packed bytes are the module's.
    ranges: &'static [(usize, usize)],
    words: &'static Words<'static>,
}

/// Digest of the sources of kernels and launchers. A launcher and the kernel it launches must be of one build: they agree on
/// more than names and arguments.
pub const BUILD: u64 = include!(concat!(env!("OUT_DIR"), "/digest.rs"));

/// Every module, oldest tier first.
pub static MODULES: &[PtxModule] = include!(concat!(env!("OUT_DIR"), "/ptx_table.rs"));

impl PtxModule {
    /// The PTX text.
    pub fn text(&self) -> String {
        let packed = miniz_oxide::inflate::decompress_to_vec_with_limit(self.deflated, self.packed_bytes);
        // Both ends of the compression are ours, so only a broken build can fail here.
        let packed = packed.expect("embedded PTX inflates");
        self.ranges.iter().map(|&(from, to)| self.words.unpack(&packed[from..to])).collect()
    }

    /// Length of the text before it is unpacked: a measure of the time that it takes to compile.
    pub fn packed_text_bytes(&self) -> usize {
        self.ranges.iter().map(|&(from, to)| to - from).sum()
    }

    /// Whether a GPU of this compute capability (times ten) runs the module.
    pub fn runs_on(&self, sm: u32) -> bool {
        if self.exact { self.sm == sm } else { self.sm <= sm }
    }
}

/// The modules of this entry that a GPU of this compute capability (times ten) runs, best tier first.
pub fn modules_for(sm: u32, entry: &str) -> Vec<&'static PtxModule> {
    MODULES.iter().rev().filter(|module| module.runs_on(sm) && module.entry == entry).collect()
}

/// Whether a GPU of this compute capability (times ten) runs the embedded modules of a tier; if there are none, it does not.
pub fn runs(tier: &str, sm: u32) -> bool {
    MODULES.iter().any(|module| module.tier == tier && module.runs_on(sm))
}

/// The first driver that takes the PTX of the tier sm_90a: that of CUDA 12.4.
const HOPPER_DRIVER: u32 = 12_040;

/// Whether a device runs what only the tier sm_90a has. Without any embedded module kernels come from elsewhere, all of
/// them; a build for chosen tiers may lack this one.
pub fn runs_hopper(device: &DeviceInfo) -> bool {
    let there = MODULES.is_empty() || runs("sm_90a", device.sm);
    there && device.sm == 90 && device.driver_version >= HOPPER_DRIVER
}

/// Bytes of all embedded text, with what it takes to unpack it.
pub fn embedded_bytes() -> usize {
    // The tiers of an entry share a text.
    let mut texts: Vec<(*const u8, usize)> =
        MODULES.iter().map(|module| (module.deflated.as_ptr(), module.deflated.len())).collect();
    texts.sort_unstable();
    texts.dedup();
    let word_bytes = |words: &[&str]| words.iter().map(|word| word.len() + size_of::<&str>()).sum::<usize>();
    let words =
        MODULES.first().map_or(0, |first| word_bytes(first.words.shapes) + word_bytes(first.words.literals));
    texts.iter().map(|&(_, bytes)| bytes).sum::<usize>() + words
}
