//! Drawing tokens on the device from logits that lie there: the launches of `gpu_kernels::kernels::sample`, whose draws are
//! those of [`Sampler`].
//!
//! Generators live in the samplers: a step copies their states to the device with the other parameters, in one block,
//! and moves them on here when the tokens have come.

use alloc::vec::Vec;

use gpu_kernels::driver::{MemKind, StreamId};
use gpu_kernels::kernels::sample::{self, RowParams};
use gpu_kernels::launch::{DevicePtr, LaunchError};
use gpu_kernels::modules::{FindModule, Modules};

use super::memory::{Device, Growing};
use crate::error::EngineError;
use crate::sampler::{Sampler, SamplerParams};

/// Candidates that a draw looks at.
fn kept(p: &SamplerParams) -> usize {
    match p.top_k {
        _ if p.temp <= 0.0 => 1,
        0 => usize::MAX,
        k => k,
    }
}

/// Memory for it, kept between steps.
pub struct Sampling {
    /// Parameters, states, penalties, recent tokens; then scratch.
    memory: Growing,
    /// The tokens drawn, which the kernel writes where the host reads them: no copy follows, and whoever waits may sleep.
    tokens: Growing,
    block: Vec<u8>,
}

impl Sampling {
    /// Nothing yet.
    pub fn new() -> Sampling {
        Sampling {
            memory: Growing::new(MemKind::Device),
            tokens: Growing::new(MemKind::Host),
            block: Vec::new(),
        }
    }

    /// Draws a token from each row of `logits` (f32, one row per sampler, `n_vocab` long); penalties change them.
    pub fn draw(
        &mut self,
        device: &Device,
        modules: &mut Modules,
        logits: DevicePtr,
        n_vocab: usize,
        samplers: &mut [&mut Sampler],
        tokens: &mut [u32],
    ) -> Result<(), EngineError> {
        let n_rows = samplers.len();
        let n_recent = samplers.iter().map(|s| s.recent().len()).max().unwrap_or(0);
        let most = samplers.iter().map(|s| kept(s.params())).max().unwrap_or(1);
        // The kernel's word for all.
        let top_k = if most < n_vocab { most } else { 0 };
        self.fill(samplers, n_recent);
        let scratch_at = self.block.len().next_multiple_of(256);
        self.memory.reserve(device, scratch_at + sample::scratch_bytes(n_rows, n_vocab, top_k))?;
        self.tokens.reserve(device, 4 * n_rows)?;
        let at = |bytes: usize| self.memory.at().offset(bytes as u64);
        device.write(at(0), &self.block, StreamId::DEFAULT)?;

        let [params, states, penalties, recent] = [0, 16, 48, 64].map(|bytes| at(bytes * n_rows));
        let mut launches = Vec::new();
        let refused =
            |error: LaunchError| EngineError::Unsupported { what: alloc::format!("sampling: {error}") };
        if n_recent > 0 {
            let args = sample::PenaltyArgs { logits, recent, params: penalties, n_rows, n_vocab, n_recent };
            launches.push(sample::launch_penalise(&args).map_err(refused)?);
        }
        let (drawn, scratch) = (self.tokens.at(), at(scratch_at));
        let args = sample::Args { logits, params, states, tokens: drawn, scratch, n_rows, n_vocab, top_k };
        launches.extend(sample::launch(&args).map_err(refused)?);
        for launch in &launches {
            let module = modules.find_module(&**device, launch.entry)?;
            device.launch(module, launch, StreamId::DEFAULT)?;
        }
        device.synchronise(StreamId::DEFAULT)?;
        device.read_host(bytemuck::cast_slice_mut(tokens), drawn)?;
        samplers.iter_mut().for_each(|sampler| sampler.skip());
        Ok(())
    }

    /// What the kernels read: per row 16 bytes of parameters, then 32 of state, 16 of penalties, and the recent tokens.
    fn fill(&mut self, samplers: &[&mut Sampler], n_recent: usize) {
        let block = &mut self.block;
        block.clear();
        for sampler in samplers {
            let p = sampler.params();
            let log_min_p = if p.min_p > 0.0 { libm::logf(p.min_p) } else { f32::NEG_INFINITY };
            let top_k = u32::try_from(p.top_k).unwrap_or(0);
            let row = RowParams { temp: p.temp, top_k, top_p: p.top_p, log_min_p };
            block.extend_from_slice(bytemuck::bytes_of(&row));
        }
        for sampler in samplers {
            block.extend_from_slice(bytemuck::bytes_of(&sampler.rng().state()));
        }
        for sampler in samplers {
            let p = sampler.params();
            let row = [p.repeat_penalty, p.frequency_penalty, p.presence_penalty, 0.0];
            block.extend_from_slice(bytemuck::bytes_of(&row));
        }
        for sampler in samplers {
            let recent = sampler.recent();
            block.extend_from_slice(bytemuck::cast_slice(recent));
            let none = -1i32;
            (recent.len()..n_recent).for_each(|_| block.extend_from_slice(&none.to_ne_bytes()));
        }
    }
}
