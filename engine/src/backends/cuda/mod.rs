//! The GPU backend, over any [`Driver`](gpu_kernels::driver::Driver): a plan becomes a program of kernel launches.
//!
//! * `translate`: graph to program, node by node; `fuse`: rules that merge actions; [`crate::plan::lay_out`]: a place in
//!   the arena for each value; `emit`: launches with their addresses.
//! * All this happens when a plan is first run at a size class of the cache, and again only if memory has moved. What
//!   differs from step to step is data in one block of device memory ([`inputs`]), so the launches stay the same and
//!   are captured and replayed as one graph.
//! * Results depend on shapes and positions alone, as the kernels promise: not on batch mates, nor on the size class.

mod ahead;
mod emit;
mod fuse;
#[cfg(feature = "cuda")]
pub mod hosted;
mod inputs;
mod lower;
mod memory;
pub mod needs;
mod program;
mod sampling;
mod stream;
mod translate;
mod weights;

use alloc::collections::BTreeMap;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::cell::RefCell;
use core::sync::atomic::{AtomicBool, Ordering};

use gpu_kernels::driver::{DeviceInfo, DriverError, GraphId, MemKind, ModuleId, StreamId};
use gpu_kernels::kernels::flash;
use gpu_kernels::launch::{DevicePtr, Launch};
use gpu_kernels::modules::{FindModule, Missing, Modules};
use gpu_kernels::ptx;

pub use ahead::{Ahead, load_kernels};
use emit::{Emit, KvAddresses, SizeClass};
pub use fuse::{RULES, RuleSet};
pub use gpu_kernels::ptx::PtxModule;
use inputs::{InputAddresses, InputLayout};
use lower::Lowered;
pub use memory::Device;
use memory::{Growing, Mark, Memory};
pub use needs::{Needs, Site};
use sampling::Sampling;
pub use stream::Streaming;
use translate::{Addresses, Anywhere, WeightKey};
use weights::DeviceWeights;
pub use weights::Progress;

use crate::backend::{Backend, BackendInfo, PlanId, Step};
use crate::error::EngineError;
use crate::executor::Executor;
use crate::graph::{Graph, Node};
use crate::kv_cache::{self, KvLayout};
use crate::op::KvPart;
use crate::plan::{Plan, Slot};
use crate::sampler::Sampler;
use crate::tensor::{Input, TensorId};
use crate::weights::Weights;

/// The backend's name.
const NAME: &str = "cuda";

/// The GPU backend.
pub struct Cuda {
    device: Device,
    info: DeviceInfo,
    modules: Modules,
    rules: RuleSet,
    weights: DeviceWeights,
    constants: Constants,
    arena: Growing,
    inputs: Growing,
    /// Pinned, for what is read back.
    outputs: Growing,
    given: Given,
    sampling: Sampling,
    kv: Option<Kv>,
    kv_generation: u64,
    plans: BTreeMap<usize, Prepared>,
    next_plan: usize,
    /// The step's inputs, before they are copied.
    block: Vec<u8>,
}

/// The cache.
struct Kv {
    layout: KvLayout,
    parts: Vec<[DevicePtr; 2]>,
    _memory: Memory,
}

impl Kv {
    fn addresses(&self) -> KvAddresses<'_> {
        KvAddresses { layout: &self.layout, parts: &self.parts }
    }
}

/// A plan and what was made of it, per size class.
struct Prepared {
    plan: Arc<Plan>,
    ready: BTreeMap<SizeClass, Ready>,
    /// Class of the last run.
    last: SizeClass,
}

/// A plan's launches for one size class.
struct Ready {
    layout: InputLayout,
    launches: Vec<(ModuleId, Launch)>,
    /// Where each activation of the graph is, by base tensor.
    slots: BTreeMap<TensorId, Slot>,
    /// State of the memory that the launches name.
    generation: [u64; 3],
    /// The launches as one, once they have run.
    graph: Captured,
}

/// How far the capture of a plan's launches has come.
enum Captured {
    /// They have not run yet. A plan that runs once only, as most prefills do, is not worth a capture.
    NotYet,
    /// They have run once, and are captured when they run next.
    Next,
    /// They were captured and are launched as one graph.
    Graph { device: Device, id: GraphId },
    /// The driver cannot capture.
    Never,
}

impl Drop for Captured {
    fn drop(&mut self) {
        if let Captured::Graph { device, id } = self {
            // A device that is lost has lost its graphs too.
            let _ = device.release_graph(*id);
        }
    }
}

impl Ready {
    /// Queues the launches.
    fn submit(&mut self, device: &Device, stream: StreamId) -> Result<(), DriverError> {
        let launch = |ready: &Ready| {
            ready
                .launches
                .iter()
                .try_for_each(|(module, launch)| device.launch_early(*module, launch, stream))
        };
        match self.graph {
            Captured::Graph { id, .. } => device.launch_graph(id, stream),
            Captured::Never => launch(self),
            Captured::NotYet => {
                launch(self)?;
                self.graph = Captured::Next;
                Ok(())
            }
            Captured::Next => match device.begin_capture(stream) {
                Ok(()) => {
                    let launched = launch(self);
                    // The capture ends in any case; what is incomplete is dropped.
                    let captured =
                        device.end_capture(stream).map(|id| Captured::Graph { device: device.clone(), id });
                    match launched.and(captured) {
                        Ok(graph) => {
                            self.graph = graph;
                            self.submit(device, stream)
                        }
                        // What another thread asks of the driver can spoil a capture: the next run tries again.
                        Err(DriverError::Capture { .. }) => launch(self),
                        Err(error) => Err(error),
                    }
                }
                Err(DriverError::Unsupported { .. }) => {
                    self.graph = Captured::Never;
                    launch(self)
                }
                Err(error) => Err(error),
            },
        }
    }
}

/// Pinned memory that tensors of other devices go through on their way to this one.
struct Given {
    host: Growing,
    /// After this event the memory is free again.
    copied: Option<Mark>,
}

/// Bytes of such tensors that one thread copies at a time. Several threads are needed: one copies a few bytes a nanosecond,
/// the bus some fifty.
const GIVEN_PART_BYTES: usize = 512 << 10;

impl Given {
    /// Queues copies of tensors, each to its place on the device.
    fn send(
        &mut self,
        device: &Device,
        executor: &dyn Executor,
        given: &[(DevicePtr, &[u8])],
    ) -> Result<(), DriverError> {
        if given.is_empty() {
            return Ok(());
        }
        if let Some(copied) = self.copied.take() {
            device.synchronise_event(copied.id)?;
        }
        self.host.reserve(device, given.iter().map(|(_, bytes)| bytes.len()).sum())?;
        let mut at = self.host.at();
        for &(to, bytes) in given {
            let parts: Vec<&[u8]> = bytes.chunks(GIVEN_PART_BYTES).collect();
            let failed = AtomicBool::new(false);
            executor.run(parts.len(), &|i| {
                if device.write_host(at.offset((i * GIVEN_PART_BYTES) as u64), parts[i]).is_err() {
                    failed.store(true, Ordering::Relaxed);
                }
            });
            if failed.into_inner() {
                // Once more in one piece: it gives the error, or succeeds after all.
                device.write_host(at, bytes)?;
            }
            device.copy(to, at, bytes.len() as u64, StreamId::DEFAULT)?;
            at = at.offset(bytes.len() as u64);
        }
        self.copied = Some(Mark::new(device)?);
        Ok(())
    }
}

/// Values that the translation computes and kernels read; equal ones are stored once.
struct Constants {
    device: Device,
    list: Vec<(Vec<f32>, Memory)>,
}

impl Constants {
    fn place(&mut self, values: &[f32]) -> Result<DevicePtr, DriverError> {
        if let Some((_, memory)) = self.list.iter().find(|(v, _)| v == values) {
            return Ok(memory.at());
        }
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let memory = Memory::new(&self.device, MemKind::Device, bytes.len())?;
        self.device.write(memory.at(), bytes, StreamId::DEFAULT)?;
        let at = memory.at();
        self.list.push((values.to_vec(), memory));
        Ok(at)
    }
}

/// Addresses of one plan's inputs and of all weights.
struct Placed<'a> {
    weights: &'a DeviceWeights,
    inputs: InputAddresses,
    constants: RefCell<&'a mut Constants>,
    /// Why a constant could not be placed: the device's fault, not the operation's.
    failure: RefCell<Option<DriverError>>,
}

impl Addresses for Placed<'_> {
    fn weight(&self, key: WeightKey) -> DevicePtr {
        self.weights.at(key)
    }
    fn input(&self, input: Input) -> DevicePtr {
        self.inputs.input(input)
    }
    fn constant(&self, values: &[f32]) -> Result<DevicePtr, String> {
        self.constants.borrow_mut().place(values).map_err(|error| {
            let what = error.to_string();
            *self.failure.borrow_mut() = Some(error);
            what
        })
    }
}

impl Cuda {
    /// A backend on a device, over a model's weights. They are copied when a graph first needs them: [`Cuda::load`].
    ///
    /// `executor` helps to read the file while weights are copied.
    pub fn new(device: Device, executor: Arc<dyn Executor>, weights: Arc<Weights>) -> Cuda {
        Cuda {
            info: device.info(),
            modules: Modules::new(),
            rules: RuleSet::ALL,
            constants: Constants { device: device.clone(), list: Vec::new() },
            weights: DeviceWeights::new(device.clone(), executor, weights),
            device,
            arena: Growing::new(MemKind::Device),
            inputs: Growing::new(MemKind::Device),
            outputs: Growing::new(MemKind::Host),
            given: Given { host: Growing::new(MemKind::Host), copied: None },
            sampling: Sampling::new(),
            kv: None,
            kv_generation: 0,
            plans: BTreeMap::new(),
            next_plan: 0,
            block: Vec::new(),
        }
    }

    /// The same with other fusion rules, for tests that compare them.
    #[must_use]
    pub fn with_rules(self, rules: RuleSet) -> Cuda {
        Cuda { rules, ..self }
    }

    /// Copies the weights of a graph to the device ahead of its first run.
    pub fn load(
        &mut self,
        graph: &Graph,
        progress: &mut (dyn FnMut(Progress) + Send),
    ) -> Result<(), EngineError> {
        self.weights.place(&translate::weights_of(graph), &mut self.modules, progress)
    }

    /// What loads kernels, on a thread of the caller's, while [`Cuda::load`] copies weights.
    pub fn ahead(&self) -> Ahead {
        Ahead::new(self.device.clone(), self.rules)
    }

    /// Takes over the kernels that were loaded ahead.
    pub fn keep(&mut self, kernels: Missing) -> Result<(), EngineError> {
        Ok(self.modules.keep(kernels, &*self.device)?)
    }

    /// Whether the kernels know the formats of a cache.
    pub fn takes_kv(layout: &KvLayout) -> Result<(), EngineError> {
        let formats = [layout.type_k, layout.type_v];
        kv_cache::check_formats(formats, &flash::KV_FORMATS, " on a GPU; --device cpu has more")
    }

    /// Bytes of device memory that the weights take.
    pub fn weight_bytes(&self) -> usize {
        self.weights.bytes()
    }

    fn generation(&self) -> [u64; 3] {
        [self.arena.generation, self.inputs.generation, self.kv_generation]
    }

    /// Address of an output of a plan's last run.
    fn of_last_run(&self, plan: PlanId, tensor: TensorId) -> DevicePtr {
        let prepared = &self.plans[&plan.0];
        let slot = prepared.ready[&prepared.last].slots[&prepared.plan.graph.base(tensor)];
        self.arena.at().offset(slot.offset as u64)
    }

    /// Makes a plan's launches.
    fn ready(&mut self, plan: &Plan, layout: InputLayout, class: SizeClass) -> Result<Ready, EngineError> {
        let inputs = InputAddresses { block: self.inputs.at(), layout };
        let constants = RefCell::new(&mut self.constants);
        let placed = Placed { weights: &self.weights, inputs, constants, failure: RefCell::default() };
        let lowered = Lowered::new(&plan.graph, &placed, self.rules, class, &self.info);
        let Lowered { program, values, places } =
            lowered.map_err(|(i, why)| match placed.failure.take() {
                Some(error) => error.into(),
                None => unsupported(&plan.graph, i, why),
            })?;
        self.arena.reserve(&self.device, places.arena_bytes)?;
        let emit = Emit {
            arena: self.arena.at(),
            slots: &places.slots,
            inputs,
            kv: self.kv.as_ref().map(Kv::addresses),
            class,
            device: &self.info,
            prompt: translate::runs_apart(&plan.graph, &self.info),
        };
        let mut launches = Vec::new();
        for action in &program.actions {
            let made = emit.launches(action).map_err(|why| EngineError::UnsupportedOp {
                backend: NAME,
                op: action.name(),
                why,
            })?;
            launches.extend(made);
        }
        let missing = self.modules.missing(&*self.device, launches.iter().map(|launch| launch.entry));
        self.weights.executor().run(missing.len(), &|i| missing.load(&*self.device, i));
        self.modules.keep(missing, &*self.device)?;
        let with_module =
            |launch: Launch| Ok((self.modules.find_module(&*self.device, launch.entry)?, launch));
        let launches = launches.into_iter().map(with_module).collect::<Result<Vec<_>, DriverError>>()?;
        let slots = values.into_iter().filter_map(|(t, v)| Some((t, places.slots[v.index()]?))).collect();
        let graph = Captured::NotYet;
        Ok(Ready { layout, launches, slots, generation: self.generation(), graph })
    }
}

/// Whether this build has kernels for real devices.
pub fn has_kernels() -> bool {
    !gpu_kernels::ptx::MODULES.is_empty()
}

/// The emulated device.
#[cfg(feature = "emu")]
pub fn emulator() -> Device {
    use gpu_kernels::emu::{Emulator, Options};
    Arc::new(Emulator::new(Options::default()))
}

/// Bytes a second that a device moves in its own memory, read and written counted: the best of a few copies, long enough
/// that the caches do not matter.
pub fn copy_bytes_per_s(device: &Device) -> Result<f64, DriverError> {
    // A fraction of the smallest device's memory, a multiple of the largest L2.
    let bytes = (device.free_bytes().unwrap_or(0) / 8).clamp(1 << 20, 1 << 29);
    let (from, to) = (
        Memory::new(device, MemKind::Device, bytes as usize)?,
        Memory::new(device, MemKind::Device, bytes as usize)?,
    );
    device.fill(from.at(), 1, bytes, StreamId::DEFAULT)?;
    let mut best = u64::MAX;
    for _ in 0..5 {
        let start = Mark::new(device)?;
        device.copy(to.at(), from.at(), bytes, StreamId::DEFAULT)?;
        let end = Mark::new(device)?;
        device.synchronise(StreamId::DEFAULT)?;
        best = best.min(device.elapsed_ns(start.id, end.id)?.max(1));
    }
    Ok(2.0 * bytes as f64 / (best as f64 / 1e9))
}

fn unsupported(graph: &Graph, node: usize, why: String) -> EngineError {
    EngineError::UnsupportedOp { backend: NAME, op: graph.nodes[node].op.name(), why }
}

impl Backend for Cuda {
    fn info(&self) -> BackendInfo {
        BackendInfo { name: NAME, description: self.info.name.clone() }
    }

    fn supports(&self, graph: &Graph, node: &Node) -> Result<(), String> {
        // The launchers decide, for the node's own actions; addresses do not matter to them.
        let mut t = translate::Translator::new(graph, &Anywhere, &self.info);
        t.node(node)?;
        let slots: Vec<Option<Slot>> =
            t.program.values.iter().map(|&len| Some(Slot { offset: 0, len })).collect();
        let emit = Emit {
            arena: DevicePtr(1 << 20),
            slots: &slots,
            inputs: InputAddresses { block: DevicePtr(1 << 20), layout: InputLayout::default() },
            kv: self.kv.as_ref().map(Kv::addresses),
            class: SizeClass::SMALLEST,
            device: &self.info,
            prompt: translate::runs_apart(graph, &self.info),
        };
        t.program.actions.iter().try_for_each(|action| emit.launches(action).map(drop))
    }

    fn create_kv(&mut self, layout: &KvLayout) -> Result<(), EngineError> {
        if layout.total_bytes() > 0 {
            Cuda::takes_kv(layout)?;
        }
        self.kv = None;
        self.kv_generation += 1;
        let memory = Memory::new(&self.device, MemKind::Device, layout.total_bytes())?;
        let mut at = memory.at();
        let mut parts = Vec::with_capacity(layout.layers.len());
        for il in 0..layout.layers.len() {
            parts.push([KvPart::K, KvPart::V].map(|part| {
                let here = at;
                at = at.offset(layout.part_bytes(il, part) as u64);
                here
            }));
        }
        // Attention reads whole pages and masks what was never written, which must be numbers and not NaN.
        self.device.fill(memory.at(), 0, memory.bytes() as u64, StreamId::DEFAULT)?;
        self.kv = Some(Kv { layout: layout.clone(), parts, _memory: memory });
        Ok(())
    }

    fn prepare(&mut self, plan: Arc<Plan>) -> Result<PlanId, EngineError> {
        for (i, node) in plan.graph.nodes.iter().enumerate() {
            self.supports(&plan.graph, node).map_err(|why| unsupported(&plan.graph, i, why))?;
        }
        self.load(&plan.graph, &mut |_| {})?;
        let id = self.next_plan;
        self.next_plan += 1;
        self.plans.insert(id, Prepared { plan, ready: BTreeMap::new(), last: SizeClass::SMALLEST });
        Ok(PlanId(id))
    }

    fn release(&mut self, plan: PlanId) {
        self.plans.remove(&plan.0);
    }

    fn run(&mut self, plan: PlanId, step: &Step<'_>) -> Result<(), EngineError> {
        let class = SizeClass::of(step);
        let layout = InputLayout::new(step.tokens.len(), step.output_rows.len());
        // Room for all pages of the cache, so that the block does not grow with the sequences.
        let n_pages = self.kv.as_ref().map_or(0, |kv| kv.layout.n_pages).max(step.pages.len());
        self.inputs.reserve(&self.device, layout.bytes(n_pages))?;
        let prepared = &self.plans[&plan.0];
        let stale = prepared.ready.get(&class).is_none_or(|r| r.generation != self.generation());
        if stale {
            let plan_of = prepared.plan.clone();
            let ready = self.ready(&plan_of, layout, class)?;
            self.plans.get_mut(&plan.0).expect("a prepared plan").ready.insert(class, ready);
        }
        let prepared = self.plans.get_mut(&plan.0).expect("a prepared plan");
        prepared.last = class;
        let ready = prepared.ready.get_mut(&class).expect("made above if it was not there");
        ready.layout.fill(step, &mut self.block);
        self.device.write(self.inputs.at(), &self.block, StreamId::DEFAULT)?;
        let at = |tensor: TensorId| self.arena.at().offset(ready.slots[&tensor].offset as u64);
        let given = step.given.iter().map(|&(tensor, values)| (at(tensor), bytemuck::cast_slice(values)));
        let given: Vec<(DevicePtr, &[u8])> = given.collect();
        self.given.send(&self.device, self.weights.executor(), &given)?;
        ready.submit(&self.device, StreamId::DEFAULT)?;
        Ok(())
    }

    fn runs_prompts_apart(&self) -> bool {
        ptx::runs_hopper(&self.info)
    }

    fn read(&mut self, plan: PlanId, tensor: TensorId, out: &mut [f32]) -> Result<(), EngineError> {
        let at = self.of_last_run(plan, tensor);
        let out: &mut [u8] = bytemuck::cast_slice_mut(out);
        // Through pinned memory: the driver takes longer to copy to pages that may move.
        self.outputs.reserve(&self.device, out.len())?;
        self.device.copy(self.outputs.at(), at, out.len() as u64, StreamId::DEFAULT)?;
        self.device.synchronise(StreamId::DEFAULT)?;
        self.device.read_host(out, self.outputs.at())?;
        Ok(())
    }

    fn sample(
        &mut self,
        plan: PlanId,
        logits: TensorId,
        samplers: &mut [&mut Sampler],
        tokens: &mut [u32],
    ) -> Result<bool, EngineError> {
        let at = self.of_last_run(plan, logits);
        let n_vocab = self.plans[&plan.0].plan.graph.tensor(logits).shape.cols();
        self.sampling.draw(&self.device, &mut self.modules, at, n_vocab, samplers, tokens)?;
        Ok(true)
    }
}

impl From<DriverError> for EngineError {
    fn from(error: DriverError) -> EngineError {
        EngineError::Device(error)
    }
}
