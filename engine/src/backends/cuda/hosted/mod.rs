//! NVIDIA's driver on this machine, through `cust` and the functions of libcuda that it lacks.
//!
//! libcuda is found at run time ([`symbols`]): without it, or without a GPU, [`Hosted::open`] says
//! [`DriverError::NoDriver`]. One `Hosted` is one device's primary context, which is made current on whatever thread
//! calls. What it gave out and was not given back goes with it.
//!
//! Compiled modules are kept by libcuda itself, in the user's compute cache: a module that was compiled before loads
//! in about a millisecond.
//!
//! A thread that waits for a stream sleeps for most of the time that it foresees and then spins ([`queue`]); one that waits
//! for an event sleeps.
#![allow(unsafe_code)]

mod device;
mod error;
mod ffi;
mod memory;
mod module;
mod pages;
mod queue;
mod registered;
mod symbols;

use std::borrow::ToOwned;
use std::ffi::{c_int, c_void};
use std::ptr::NonNull;
use std::string::ToString;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::vec::Vec;

use cust::context::{Context, ContextFlags};
use cust::device::Device;
use cust::error::CudaError;
pub use gpu_kernels::driver::DeviceInfo;
use gpu_kernels::driver::{Driver, DriverError, EventId, GraphId, HostAccess, MemKind, ModuleId, StreamId};
use gpu_kernels::launch::{DevicePtr, Launch, MAX_PARAM_BYTES};
use gpu_kernels::ptx::PtxModule;
use gpu_kernels::slots::Slots;

pub use device::devices;
use error::{check, check_launch, describe};
use ffi::Handle;
use memory::Origin;
use module::Module;
use queue::Queue;
pub use registered::Registered;

/// One GPU.
pub struct Hosted {
    /// Goes before the context it belongs to.
    handles: RwLock<Handles>,
    device: Device,
    context: Context,
    info: DeviceInfo,
    /// Marks our memory among that of other `Hosted`s.
    owner: u64,
    has_pools: bool,
}

struct Handles {
    // Shared with the calls under way: what another thread releases meanwhile goes when they are done.
    streams: Slots<Arc<Queue>>,
    events: Slots<Arc<Event>>,
    modules: Slots<Arc<Module>>,
    graphs: Slots<Arc<Graph>>,
    /// Contexts of devices that this one reaches; theirs must live as long.
    peers: Vec<Context>,
}

/// How a launch is ordered with the others of its stream.
#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    /// After the one before.
    Alone,
    /// Maybe beside the one before.
    Early,
    /// All CTAs at once.
    Cooperative,
}

/// The first CUDA version whose graphs keep that a launch may start early: 12.3.
const EARLY_IN_GRAPHS: u32 = 12_030;

struct Event(Handle);

/// An instantiated graph.
struct Graph(Handle);

// SAFETY: an object of the driver's belongs to a context, not to a thread, and the driver's functions may be called from
// any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}
// SAFETY: as above.
unsafe impl Send for Graph {}
// SAFETY: as above.
unsafe impl Sync for Graph {}

/// Starts libcuda; every other function of this module that calls it comes after.
fn start() -> Result<(), DriverError> {
    symbols::load().map_err(|what| DriverError::NoDriver { what: what.to_owned() })?;
    // SAFETY: no condition.
    let code = unsafe { ffi::cuInit(0) };
    if code == ffi::SUCCESS { Ok(()) } else { Err(DriverError::NoDriver { what: describe(code) }) }
}

/// An error of `cust`, whose numbers are CUDA's.
fn cust_error(op: &'static str) -> impl Fn(CudaError) -> DriverError {
    move |code| match check(op, code as u32) {
        Err(error) => error,
        Ok(()) => DriverError::Driver { op, code: 0, what: code.to_string() },
    }
}

impl Hosted {
    /// The device of this number.
    pub fn open(index: u32) -> Result<Hosted, DriverError> {
        start()?;
        let count = device::count()?;
        if index >= count {
            let what = std::format!("no device {index}: there are {count}, counted from 0");
            return Err(DriverError::NoDriver { what });
        }
        let device = device::find(index)?;
        let info = device::info(device)?;
        let context = Context::new(device).map_err(cust_error("open the device"))?;
        context.set_flags(ContextFlags::SCHED_SPIN).map_err(cust_error("let waiting threads spin"))?;
        let mut streams = Slots::default();
        let stream = streams.insert(Queue::new()?);
        assert_eq!(StreamId(stream), StreamId::DEFAULT);
        let has_pools = device::keep_pool(device)?;
        static OWNERS: AtomicU64 = AtomicU64::new(0);
        let owner = OWNERS.fetch_add(1, Ordering::Relaxed);
        let handles = Handles {
            streams,
            events: Slots::default(),
            modules: Slots::default(),
            graphs: Slots::default(),
            peers: Vec::new(),
        };
        Ok(Hosted { device, context, info, owner, has_pools, handles: RwLock::new(handles) })
    }

    /// Makes the context this thread's.
    fn enter(&self) -> Result<(), DriverError> {
        // SAFETY: the context is ours, and alive.
        check("enter the context", unsafe { ffi::cuCtxSetCurrent(self.context.as_raw().cast()) })
    }

    fn handles(&self) -> RwLockReadGuard<'_, Handles> {
        self.handles.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn handles_mut(&self) -> RwLockWriteGuard<'_, Handles> {
        self.handles.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// A stream by number, on this thread's context.
    fn stream(&self, stream: StreamId) -> Result<Arc<Queue>, DriverError> {
        self.enter()?;
        let found = self.handles().streams.get(stream.0).cloned();
        found.ok_or(DriverError::Handle { what: "stream", id: stream.0 })
    }

    fn event(&self, event: EventId) -> Result<Arc<Event>, DriverError> {
        self.enter()?;
        let found = self.handles().events.get(event.0).cloned();
        found.ok_or(DriverError::Handle { what: "event", id: event.0 })
    }

    fn module(&self, module: ModuleId) -> Result<Arc<Module>, DriverError> {
        let found = self.handles().modules.get(module.0).cloned();
        found.ok_or(DriverError::Handle { what: "module", id: module.0 })
    }

    /// The stream, unless it is being captured: a call that the driver refuses then would spoil the capture.
    fn not_captured(&self, op: &'static str, stream: StreamId) -> Result<Arc<Queue>, DriverError> {
        let stream = self.stream(stream)?;
        stream.refuse_captured(op)?;
        Ok(stream)
    }

    /// Waits for the work of all our streams; those released before have none left. Not `cuCtxSynchronize`: the context is the
    /// device's one primary context, so that would wait for other `Hosted`s too, and driver 580 faults in it now and then
    /// while other threads open and close theirs.
    fn finish_all(&self, op: &'static str) -> Result<(), DriverError> {
        let streams: Vec<Arc<Queue>> = self.handles().streams.iter().cloned().collect();
        streams.iter().try_for_each(|stream| {
            stream.refuse_captured(op)?;
            stream.finish(op)
        })
    }

    /// Memory that the host reaches: its address, and what to hold meanwhile.
    fn host_memory(
        &self,
        op: &'static str,
        at: DevicePtr,
        bytes: usize,
    ) -> Result<(*mut u8, memory::Use), DriverError> {
        let (piece, offset, held) = memory::enter(op, at, bytes as u64)?;
        let host = match piece.origin {
            // Unified addressing: both see it at the same place.
            Origin::Allocated(MemKind::Host | MemKind::Managed) | Origin::Pages { .. } => at.0 as usize,
            Origin::Registered { host } => host + offset as usize,
            Origin::Allocated(MemKind::Device) | Origin::Pool => {
                return Err(DriverError::Address { op, at, bytes: bytes as u64 });
            }
        };
        Ok((std::ptr::with_exposed_provenance_mut(host), held))
    }

    fn submit(
        &self,
        module: ModuleId,
        launch: &Launch,
        stream: StreamId,
        how: How,
    ) -> Result<(), DriverError> {
        let module = self.module(module)?;
        let stream = self.stream(stream)?;
        let function = module.function(launch)?;
        function.raise(launch, self.info.smem_per_cta_bytes)?;
        let mut params = [0u8; MAX_PARAM_BYTES];
        let mut params_bytes = launch.params.bytes().len();
        params[..params_bytes].copy_from_slice(launch.params.bytes());
        let mut extra = [
            ffi::LAUNCH_PARAM_BUFFER_POINTER,
            params.as_mut_ptr().cast::<c_void>(),
            ffi::LAUNCH_PARAM_BUFFER_SIZE,
            (&raw mut params_bytes).cast(),
            ffi::LAUNCH_PARAM_END,
        ];
        let [x, y, z] = launch.grid;
        let none = std::ptr::null_mut();
        // A kernel that does not wait itself must not start early.
        let early = how == How::Early && module.waits && self.info.driver_version >= EARLY_IN_GRAPHS;
        let cooperative = how == How::Cooperative;
        let code = if cooperative || early || launch.cluster > 1 {
            let mut attributes = [ffi::LaunchAttribute::default(); 2];
            let mut n_attributes = 0;
            let mut add = |id, first: [u32; 3]| {
                attributes[n_attributes].id = id;
                attributes[n_attributes].value[..3].copy_from_slice(&first);
                n_attributes += 1;
            };
            if cooperative {
                add(ffi::LAUNCH_ATTRIBUTE_COOPERATIVE, [1, 0, 0]);
            }
            if early {
                function.share_evenly(launch, self.info.n_sm);
                add(ffi::LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, [1, 0, 0]);
            }
            if launch.cluster > 1 {
                add(ffi::LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, [launch.cluster, 1, 1]);
            }
            let config = ffi::LaunchConfig {
                grid: launch.grid,
                cta: [launch.cta, 1, 1],
                smem_bytes: launch.smem_bytes,
                stream: stream.raw(),
                attributes: attributes.as_ptr(),
                n_attributes: n_attributes as u32,
            };
            // If a cooperative launch is captured, the driver wants its arguments one by one.
            let mut each = match cooperative {
                true => function.arguments(launch, &mut params[..params_bytes])?,
                false => Vec::new(),
            };
            let (each, extra) = if cooperative {
                (each.as_mut_ptr(), std::ptr::null_mut())
            } else {
                (std::ptr::null_mut(), extra.as_mut_ptr())
            };
            // SAFETY: a function of a loaded module (`module` keeps it), a stream of the same context, and arguments
            // that live over the call; the driver copies them. What the kernel does with them its launcher has checked.
            unsafe { ffi::cuLaunchKernelEx(&config, function.raw, each, extra) }
        } else {
            let (cta, smem) = (launch.cta, launch.smem_bytes);
            let extra = extra.as_mut_ptr();
            // SAFETY: as above.
            unsafe {
                ffi::cuLaunchKernel(function.raw, x, y, z, cta, 1, 1, smem, stream.raw(), none, extra.cast())
            }
        };
        check_launch(launch.entry, code)
    }

    /// Frees by origin; the memory is already out of the table. The host's goes once the work that may use it is done, as
    /// the driver does by itself for device memory.
    fn give_back(&self, at: DevicePtr, origin: Origin) -> Result<(), DriverError> {
        match origin {
            Origin::Allocated(MemKind::Host) | Origin::Registered { .. } | Origin::Pages { .. } => {
                self.finish_all("free")?;
            }
            Origin::Allocated(MemKind::Device | MemKind::Managed) | Origin::Pool => {}
        }
        // SAFETY: addresses that the driver gave out for that kind of memory and that were not given back: they were in
        // the table until now.
        let code = unsafe {
            match origin {
                Origin::Allocated(MemKind::Device | MemKind::Managed) | Origin::Pool => {
                    ffi::cuMemFree_v2(at.0)
                }
                Origin::Allocated(MemKind::Host) => {
                    ffi::cuMemFreeHost(std::ptr::with_exposed_provenance_mut(at.0 as usize))
                }
                Origin::Registered { host } => {
                    ffi::cuMemHostUnregister(std::ptr::with_exposed_provenance_mut(host))
                }
                Origin::Pages { bytes } => {
                    let host = std::ptr::with_exposed_provenance_mut(at.0 as usize);
                    let code = ffi::cuMemHostUnregister(host);
                    // Pages that the driver did not let go stay.
                    if code == ffi::SUCCESS {
                        pages::unmap(host, bytes);
                    }
                    code
                }
            }
        };
        check("free", code)
    }
}

/// Pinned memory of our own huge pages, which takes half of the time that the driver's own takes, or less. `None` where little is
/// asked for, or the kernel or the driver refuses, or the device would see it at another place.
fn pinned_pages(bytes: u64) -> Option<(DevicePtr, Origin)> {
    let asked = usize::try_from(bytes).ok().filter(|bytes| *bytes >= pages::HUGE)?;
    let (host, bytes) = pages::map(asked)?;
    let mut device = 0;
    // SAFETY: memory mapped just now, which stays so until it is unregistered, here or in `give_back`.
    unsafe {
        let flags = ffi::HOST_REGISTER_PORTABLE | ffi::HOST_REGISTER_DEVICEMAP;
        if ffi::cuMemHostRegister_v2(host, bytes, flags) == ffi::SUCCESS {
            let code = ffi::cuMemHostGetDevicePointer_v2(&mut device, host, 0);
            if code == ffi::SUCCESS && device == host.expose_provenance() as u64 {
                return Some((DevicePtr(device), Origin::Pages { bytes }));
            }
            if ffi::cuMemHostUnregister(host) != ffi::SUCCESS {
                return None;
            }
        }
        pages::unmap(host, bytes);
    }
    None
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: ours; the driver keeps it until its work is done.
        unsafe { ffi::cuEventDestroy_v2(self.0) };
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: ours; the driver keeps it until its launches are done.
        unsafe { ffi::cuGraphExecDestroy(self.0) };
    }
}

impl Drop for Hosted {
    fn drop(&mut self) {
        // After a fault the context is gone with all it had, and each of these calls says so; there is nobody to tell.
        if self.enter().is_err() {
            return;
        }
        let _ = self.finish_all("drop");
        let handles = self.handles.get_mut().unwrap_or_else(PoisonError::into_inner);
        (handles.graphs, handles.events, handles.modules) = Default::default();
        for at in memory::owned(self.owner) {
            if let Ok(origin) = memory::remove("drop", at, self.owner, |_| true) {
                let _ = self.give_back(at, origin);
            }
        }
    }
}

impl std::fmt::Debug for Hosted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hosted").field("info", &self.info).finish_non_exhaustive()
    }
}

impl Driver for Hosted {
    fn info(&self) -> DeviceInfo {
        self.info.clone()
    }

    fn free_bytes(&self) -> Result<u64, DriverError> {
        self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: valid places.
        check("free_bytes", unsafe { ffi::cuMemGetInfo_v2(&mut free, &mut total) })?;
        Ok(free as u64)
    }

    fn alloc(&self, kind: MemKind, bytes: u64) -> Result<DevicePtr, DriverError> {
        self.enter()?;
        if kind == MemKind::Host
            && let Some((at, origin)) = pinned_pages(bytes)
        {
            memory::insert(at.0, bytes, origin, self.owner);
            return Ok(at);
        }
        let mut at = 0;
        // The driver refuses to allocate nothing.
        let size = usize::try_from(bytes.max(1)).map_err(|_| DriverError::OutOfMemory { kind, bytes })?;
        // SAFETY: valid places.
        let code = unsafe {
            match kind {
                MemKind::Device => ffi::cuMemAlloc_v2(&mut at, size),
                MemKind::Managed => ffi::cuMemAllocManaged(&mut at, size, ffi::MEM_ATTACH_GLOBAL),
                MemKind::Host => {
                    let mut host = std::ptr::null_mut();
                    let code = ffi::cuMemHostAlloc(&mut host, size, ffi::HOST_ALLOC_PORTABLE);
                    // Unified addressing: the device sees it at the same place.
                    at = host.expose_provenance() as u64;
                    code
                }
            }
        };
        if code == ffi::ERROR_OUT_OF_MEMORY {
            return Err(DriverError::OutOfMemory { kind, bytes });
        }
        check("alloc", code)?;
        memory::insert(at, bytes, Origin::Allocated(kind), self.owner);
        Ok(DevicePtr(at))
    }

    fn free(&self, at: DevicePtr) -> Result<(), DriverError> {
        self.enter()?;
        let is_allocated = |origin| !matches!(origin, Origin::Registered { .. });
        let origin = memory::remove("free", at, self.owner, is_allocated)?;
        self.give_back(at, origin)
    }

    fn alloc_async(&self, bytes: u64, stream: StreamId) -> Result<DevicePtr, DriverError> {
        if !self.has_pools {
            return self.alloc(MemKind::Device, bytes);
        }
        let stream = self.stream(stream)?;
        let refused = DriverError::OutOfMemory { kind: MemKind::Device, bytes };
        let size = usize::try_from(bytes.max(1)).map_err(|_| refused.clone())?;
        let mut at = 0;
        // SAFETY: a valid place and a stream of ours.
        match unsafe { ffi::cuMemAllocAsync(&mut at, size, stream.raw()) } {
            ffi::ERROR_OUT_OF_MEMORY => return Err(refused),
            code => check("alloc_async", code)?,
        }
        memory::insert(at, bytes, Origin::Pool, self.owner);
        Ok(DevicePtr(at))
    }

    fn free_async(&self, at: DevicePtr, stream: StreamId) -> Result<(), DriverError> {
        if !self.has_pools {
            self.synchronise(stream)?;
            return self.free(at);
        }
        let stream = self.stream(stream)?;
        memory::remove("free_async", at, self.owner, |origin| origin == Origin::Pool)?;
        // SAFETY: memory of a pool, which was in the table until now, and a stream of ours.
        check("free_async", unsafe { ffi::cuMemFreeAsync(at.0, stream.raw()) })
    }

    unsafe fn register_host(
        &self,
        at: NonNull<u8>,
        bytes: usize,
        access: HostAccess,
    ) -> Result<DevicePtr, DriverError> {
        self.enter()?;
        let flags = ffi::HOST_REGISTER_PORTABLE
            | ffi::HOST_REGISTER_DEVICEMAP
            | match access {
                HostAccess::Read => ffi::HOST_REGISTER_READ_ONLY,
                HostAccess::ReadWrite => 0,
            };
        let host = at.as_ptr().cast::<c_void>();
        let mut device = 0;
        // SAFETY: mapped memory, which stays so until it is unregistered: the caller's promise.
        unsafe {
            check("register_host", ffi::cuMemHostRegister_v2(host, bytes, flags))?;
            let code = ffi::cuMemHostGetDevicePointer_v2(&mut device, host, 0);
            if code != ffi::SUCCESS {
                ffi::cuMemHostUnregister(host);
            }
            check("register_host", code)?;
        }
        let origin = Origin::Registered { host: host.expose_provenance() };
        memory::insert(device, bytes as u64, origin, self.owner);
        Ok(DevicePtr(device))
    }

    fn unregister_host(&self, at: DevicePtr) -> Result<(), DriverError> {
        self.enter()?;
        let is_registered = |origin| matches!(origin, Origin::Registered { .. });
        let origin = memory::remove("unregister_host", at, self.owner, is_registered)?;
        self.give_back(at, origin)
    }

    fn write_host(&self, to: DevicePtr, from: &[u8]) -> Result<(), DriverError> {
        let (host, _alone) = self.host_memory("write_host", to, from.len())?;
        // SAFETY: within a piece that the host reaches, which is not freed while the range is in use, and no other thread
        // of the host uses it. `from` is a Rust slice: of the driver's memory it could only be one of `fill_host`'s, which
        // is another range in use.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), host, from.len()) };
        Ok(())
    }

    fn fill_host(
        &self,
        to: DevicePtr,
        bytes: usize,
        fill: &mut dyn FnMut(&mut [u8]),
    ) -> Result<(), DriverError> {
        let (piece, _) = memory::find("fill_host", to, bytes as u64)?;
        if !matches!(piece.origin, Origin::Allocated(MemKind::Host | MemKind::Managed) | Origin::Pages { .. })
        {
            // Registered memory is the caller's own, who may have slices of it.
            return Err(DriverError::Address { op: "fill_host", at: to, bytes: bytes as u64 });
        }
        let (host, _alone) = self.host_memory("fill_host", to, bytes)?;
        // SAFETY: as in `write_host`; what the driver allocated for the host has contents, if only old ones.
        fill(unsafe { std::slice::from_raw_parts_mut(host, bytes) });
        Ok(())
    }

    fn read_host(&self, to: &mut [u8], from: DevicePtr) -> Result<(), DriverError> {
        let (host, _alone) = self.host_memory("read_host", from, to.len())?;
        // SAFETY: as in `write_host`.
        unsafe { std::ptr::copy_nonoverlapping(host, to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    fn write(&self, to: DevicePtr, from: &[u8], stream: StreamId) -> Result<(), DriverError> {
        let stream = self.not_captured("write", stream)?;
        memory::find("write", to, from.len() as u64)?;
        if from.is_empty() {
            return Ok(());
        }
        // SAFETY: both ranges are valid. The driver has copied a pageable range away when it returns; a pinned one it
        // reads later, so we wait.
        let code = unsafe { ffi::cuMemcpyHtoDAsync_v2(to.0, from.as_ptr().cast(), from.len(), stream.raw()) };
        check("write", code)?;
        if memory::is_pinned(from.as_ptr(), from.len()) { stream.finish("write") } else { Ok(()) }
    }

    fn read(&self, to: &mut [u8], from: DevicePtr, stream: StreamId) -> Result<(), DriverError> {
        let stream = self.not_captured("read", stream)?;
        memory::find("read", from, to.len() as u64)?;
        if to.is_empty() {
            return Ok(());
        }
        // SAFETY: both ranges are valid, and we wait until the bytes are there.
        let code =
            unsafe { ffi::cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from.0, to.len(), stream.raw()) };
        check("read", code)?;
        stream.finish("read")
    }

    fn copy(&self, to: DevicePtr, from: DevicePtr, bytes: u64, stream: StreamId) -> Result<(), DriverError> {
        let stream = self.stream(stream)?;
        let [low, high] = if from.0 <= to.0 { [from, to] } else { [to, from] };
        // Another's memory may not go while it is copied, and its owner does not wait for our streams: we do.
        let hold = |at| -> Result<Option<memory::Use>, DriverError> {
            if memory::find("copy", at, bytes)?.0.owner == self.owner {
                return Ok(None);
            }
            stream.refuse_captured("copy")?;
            memory::enter("copy", at, bytes).map(|(_, _, held)| Some(held))
        };
        // In the order of addresses, so that no two threads wait for each other. Ranges that overlap, which the contract
        // forbids, lie in one piece: to hold both would be to wait for oneself.
        let overlap = high.0 < low.0.saturating_add(bytes);
        let held = hold(low)?;
        let second = if overlap { memory::find("copy", high, bytes).map(|_| None)? } else { hold(high)? };
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: ranges within memory of the driver's or registered with it.
        check("copy", unsafe { ffi::cuMemcpyAsync(to.0, from.0, bytes as usize, stream.raw()) })?;
        if held.is_some() || second.is_some() { stream.finish("copy") } else { Ok(()) }
    }

    fn fill(&self, at: DevicePtr, byte: u8, bytes: u64, stream: StreamId) -> Result<(), DriverError> {
        let stream = self.stream(stream)?;
        memory::find("fill", at, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: a range within memory of the driver's or registered with it.
        check("fill", unsafe { ffi::cuMemsetD8Async(at.0, byte, bytes as usize, stream.raw()) })
    }

    fn enable_peer(&self, index: u32) -> Result<(), DriverError> {
        let peer = device::find(index)?;
        let mut can = 0;
        // SAFETY: a valid place.
        let code = unsafe { ffi::cuDeviceCanAccessPeer(&mut can, self.device.as_raw(), peer.as_raw()) };
        check("enable_peer", code)?;
        if can == 0 {
            return Err(DriverError::Unsupported { op: "enable_peer" });
        }
        let context = Context::new(peer).map_err(cust_error("enable_peer"))?;
        // Opening made it current.
        self.enter()?;
        // SAFETY: a context that we keep as long as ours.
        match unsafe { ffi::cuCtxEnablePeerAccess(context.as_raw().cast(), 0) } {
            ffi::ERROR_PEER_ACCESS_ALREADY_ENABLED => {}
            code => check("enable_peer", code)?,
        }
        self.handles_mut().peers.push(context);
        Ok(())
    }

    fn load(&self, module: &PtxModule) -> Result<ModuleId, DriverError> {
        self.enter()?;
        let module = Arc::new(Module::load(module)?);
        Ok(ModuleId(self.handles_mut().modules.insert(module)))
    }

    fn unload(&self, module: ModuleId) -> Result<(), DriverError> {
        self.enter()?;
        let removed = self.handles_mut().modules.remove(module.0);
        removed.map(drop).ok_or(DriverError::Handle { what: "module", id: module.0 })
    }

    fn launch(&self, module: ModuleId, launch: &Launch, stream: StreamId) -> Result<(), DriverError> {
        self.submit(module, launch, stream, How::Alone)
    }

    fn launch_early(&self, module: ModuleId, launch: &Launch, stream: StreamId) -> Result<(), DriverError> {
        self.submit(module, launch, stream, How::Early)
    }

    fn launch_cooperative(
        &self,
        module: ModuleId,
        launch: &Launch,
        stream: StreamId,
    ) -> Result<(), DriverError> {
        self.submit(module, launch, stream, How::Cooperative)
    }

    fn resident_ctas(&self, module: ModuleId, launch: &Launch) -> Result<u32, DriverError> {
        self.enter()?;
        let module = self.module(module)?;
        let function = module.function(launch)?;
        function.raise(launch, self.info.smem_per_cta_bytes)?;
        let (mut ctas, cta, smem) = (0, launch.cta as c_int, launch.smem_bytes as usize);
        // SAFETY: a function of a loaded module and a valid place.
        let code =
            unsafe { ffi::cuOccupancyMaxActiveBlocksPerMultiprocessor(&mut ctas, function.raw, cta, smem) };
        check("resident_ctas", code)?;
        Ok(ctas.max(0) as u32 * self.info.n_sm)
    }

    fn create_stream(&self) -> Result<StreamId, DriverError> {
        self.enter()?;
        Ok(StreamId(self.handles_mut().streams.insert(Queue::new()?)))
    }

    fn release_stream(&self, stream: StreamId) -> Result<(), DriverError> {
        self.not_captured("release_stream", stream)?;
        if stream == StreamId::DEFAULT {
            return Err(DriverError::Handle { what: "stream of our own", id: stream.0 });
        }
        let removed = self.handles_mut().streams.remove(stream.0);
        removed.map(drop).ok_or(DriverError::Handle { what: "stream", id: stream.0 })
    }

    fn synchronise(&self, stream: StreamId) -> Result<(), DriverError> {
        self.not_captured("synchronise", stream)?.finish("synchronise")
    }

    fn record(&self, stream: StreamId) -> Result<EventId, DriverError> {
        let stream = self.stream(stream)?;
        let mut event = std::ptr::null_mut();
        // SAFETY: a valid place.
        check("record", unsafe { ffi::cuEventCreate(&mut event, ffi::EVENT_BLOCKING_SYNC) })?;
        // From here on it is destroyed if it cannot be recorded.
        let event = Event(event);
        // SAFETY: an event and a stream of ours.
        check("record", unsafe { ffi::cuEventRecord(event.0, stream.raw()) })?;
        Ok(EventId(self.handles_mut().events.insert(Arc::new(event))))
    }

    fn record_again(&self, event: EventId, stream: StreamId) -> Result<(), DriverError> {
        let (event, stream) = (self.event(event)?, self.stream(stream)?);
        // SAFETY: an event and a stream of ours.
        check("record_again", unsafe { ffi::cuEventRecord(event.0, stream.raw()) })
    }

    fn wait(&self, stream: StreamId, event: EventId) -> Result<(), DriverError> {
        let (event, stream) = (self.event(event)?, self.stream(stream)?);
        // SAFETY: an event and a stream of ours.
        check("wait", unsafe { ffi::cuStreamWaitEvent(stream.raw(), event.0, 0) })
    }

    fn synchronise_event(&self, event: EventId) -> Result<(), DriverError> {
        let event = self.event(event)?;
        // SAFETY: an event of ours.
        check("synchronise_event", unsafe { ffi::cuEventSynchronize(event.0) })
    }

    fn is_done(&self, event: EventId) -> Result<bool, DriverError> {
        let event = self.event(event)?;
        // SAFETY: an event of ours.
        match unsafe { ffi::cuEventQuery(event.0) } {
            ffi::ERROR_NOT_READY => Ok(false),
            code => check("is_done", code).map(|()| true),
        }
    }

    fn elapsed_ns(&self, from: EventId, to: EventId) -> Result<u64, DriverError> {
        let (from, to) = (self.event(from)?, self.event(to)?);
        let mut ms = 0.0f32;
        // SAFETY: events of ours and a valid place.
        check("elapsed_ns", unsafe { ffi::cuEventElapsedTime(&mut ms, from.0, to.0) })?;
        Ok((f64::from(ms) * 1e6).round() as u64)
    }

    fn release(&self, event: EventId) -> Result<(), DriverError> {
        self.enter()?;
        let removed = self.handles_mut().events.remove(event.0);
        removed.map(drop).ok_or(DriverError::Handle { what: "event", id: event.0 })
    }

    fn begin_capture(&self, stream: StreamId) -> Result<(), DriverError> {
        let stream = self.not_captured("begin_capture", stream)?;
        let mode = ffi::CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: a stream of ours.
        check("begin_capture", unsafe { ffi::cuStreamBeginCapture_v2(stream.raw(), mode) })
    }

    fn end_capture(&self, stream: StreamId) -> Result<GraphId, DriverError> {
        let stream = self.stream(stream)?;
        let (mut graph, mut exec) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: a stream of ours and valid places. The graph is only needed until it is instantiated.
        unsafe {
            check("end_capture", ffi::cuStreamEndCapture(stream.raw(), &mut graph))?;
            if graph.is_null() {
                return Err(DriverError::Capture { op: "end_capture" });
            }
            let code = ffi::cuGraphInstantiateWithFlags(&mut exec, graph, 0);
            let destroyed = ffi::cuGraphDestroy(graph);
            check("instantiate a graph", code)?;
            let exec = Graph(exec);
            check("end_capture", destroyed)?;
            Ok(GraphId(self.handles_mut().graphs.insert(Arc::new(exec))))
        }
    }

    fn launch_graph(&self, graph: GraphId, stream: StreamId) -> Result<(), DriverError> {
        let stream = self.stream(stream)?;
        let exec = self.handles().graphs.get(graph.0).cloned();
        let exec = exec.ok_or(DriverError::Handle { what: "graph", id: graph.0 })?;
        // SAFETY: a graph and a stream of ours.
        check("launch_graph", unsafe { ffi::cuGraphLaunch(exec.0, stream.raw()) })
    }

    fn release_graph(&self, graph: GraphId) -> Result<(), DriverError> {
        self.enter()?;
        let removed = self.handles_mut().graphs.remove(graph.0);
        removed.map(drop).ok_or(DriverError::Handle { what: "graph", id: graph.0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On a machine without a GPU: a typed error with a reason, from every way in. With one: a device.
    #[test]
    fn a_missing_driver_is_said_not_a_crash() {
        match Hosted::open(0) {
            Err(DriverError::NoDriver { what }) => {
                assert!(!what.is_empty());
                assert!(matches!(devices(), Err(DriverError::NoDriver { .. })));
            }
            Ok(device) => assert_eq!(devices().unwrap()[0], device.info()),
            Err(error) => panic!("{error}"),
        }
        assert!(matches!(Hosted::open(10_000), Err(DriverError::NoDriver { .. })));
    }
}
