//! The embedded kernels: one PTX module per GPU generation.
//!
//! Empty when the crate was built without the feature `ptx` or without a device compiler.

use alloc::string::String;
use alloc::vec::Vec;

/// PTX of one tier.
#[derive(Clone, Copy, Debug)]
pub struct PtxModule {
    /// Name as PTX spells it: `sm_80`.
    pub tier: &'static str,
    /// The oldest compute capability it runs on, times ten.
    pub sm: u32,
    /// Runs on that architecture only, not on later ones.
    pub exact: bool,
    /// Bytes of the text once inflated.
    pub ptx_bytes: usize,
    /// Names of the entries, sorted.
    pub kernels: &'static [&'static str],
    deflated: &'static [u8],
}

/// Every module, oldest tier first.
pub const MODULES: &[PtxModule] = include!(concat!(env!("OUT_DIR"), "/ptx_table.rs"));

impl PtxModule {
    /// The PTX text.
    pub fn text(&self) -> String {
        let bytes = miniz_oxide::inflate::decompress_to_vec_with_limit(self.deflated, self.ptx_bytes);
        // Both ends of the compression are ours, so only a broken build can fail here.
        String::from_utf8(bytes.expect("embedded PTX inflates")).expect("PTX is ASCII")
    }

    /// Bytes embedded.
    pub fn embedded_bytes(&self) -> usize {
        self.deflated.len()
    }

    /// Whether a GPU of this compute capability (times ten) runs the module.
    pub fn runs_on(&self, sm: u32) -> bool {
        if self.exact { self.sm == sm } else { self.sm <= sm }
    }
}

/// The modules that a GPU of this compute capability (times ten) runs, best first.
pub fn modules_for(sm: u32) -> Vec<&'static PtxModule> {
    MODULES.iter().rev().filter(|module| module.runs_on(sm)).collect()
}
