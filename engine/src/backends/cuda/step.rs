//! A decode step's launches as one: runs of launches that a module of `gpu_kernels::kernels::step` plays become one
//! cooperative launch with a list of them in device memory.

use alloc::vec::Vec;

use gpu_kernels::driver::{DriverError, MemKind, StreamId};
use gpu_kernels::kernels::step;
use gpu_kernels::launch::{DevicePtr, Launch};
use gpu_kernels::modules::FindModule;

use super::Queued;
use super::memory::{Device, Memory};

/// Shortest run that is played: what a launch costs to start is paid once, as is the wait for all CTAs.
const MIN_LAUNCHES: usize = 4;

/// The launches of a plan, and the memory that those name which play others.
pub struct Played {
    /// In order.
    pub launches: Vec<Queued>,
    /// Launches that others play.
    pub n_played: usize,
    /// Lists and counters.
    pub memory: Vec<Memory>,
}

/// Replaces runs of launches by one that plays them, asking L2 for `ahead_bytes` of weights in advance.
pub fn play(
    device: &Device,
    modules: &mut dyn FindModule,
    launches: Vec<Launch>,
    ahead_bytes: u64,
) -> Result<Played, DriverError> {
    let mut played = Played { launches: Vec::new(), n_played: 0, memory: Vec::new() };
    let entry = step::entry(&launches);
    let mut rest = &launches[..];
    while !rest.is_empty() {
        let covered = entry.map_or(0, |e| rest.iter().take_while(|launch| step::covers(e, launch)).count());
        let (run, others) = rest.split_at(covered.max(1));
        rest = others;
        if let Some(entry) = entry
            && run.len() >= MIN_LAUNCHES
            && played.run(device, modules, entry, run, ahead_bytes)?
        {
            continue;
        }
        for launch in run {
            let module = modules.find_module(&**device, launch.entry)?;
            played.launches.push(Queued { module, launch: *launch, together: false });
        }
    }
    Ok(played)
}

impl Played {
    /// Adds the launch that plays a run; `false` if the device cannot.
    fn run(
        &mut self,
        device: &Device,
        modules: &mut dyn FindModule,
        entry: &'static str,
        run: &[Launch],
        ahead_bytes: u64,
    ) -> Result<bool, DriverError> {
        // How many CTAs there are room for depends on their shared memory, the list on how many there are.
        let Some(list) = step::list(entry, run, 1, ahead_bytes) else { return Ok(false) };
        let Ok(probe) = step::launch(&list, DevicePtr::NULL, DevicePtr::NULL) else { return Ok(false) };
        let module = modules.find_module(&**device, entry)?;
        let n_ctas = match device.resident_ctas(module, &probe) {
            Ok(n @ 1..) => n,
            Ok(0) | Err(DriverError::Unsupported { .. }) => return Ok(false),
            Err(error) => return Err(error),
        };
        let Some(list) = step::list(entry, run, n_ctas, ahead_bytes) else { return Ok(false) };
        let at = Memory::new(device, MemKind::Device, list.bytes.len())?;
        device.write(at.at(), &list.bytes, StreamId::DEFAULT)?;
        let counters = Memory::new(device, MemKind::Device, step::COUNTERS_BYTES)?;
        device.fill(counters.at(), 0, step::COUNTERS_BYTES as u64, StreamId::DEFAULT)?;
        let Ok(launch) = step::launch(&list, at.at(), counters.at()) else { return Ok(false) };
        self.launches.push(Queued { module, launch, together: true });
        self.n_played += run.len();
        self.memory.extend([at, counters]);
        Ok(true)
    }
}
