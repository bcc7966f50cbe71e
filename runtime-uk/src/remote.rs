//! A driver whose device is behind a broker.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::string::{String, ToString};

use gpu_kernels::driver::{DeviceInfo, Driver, DriverError, EventId, GraphId, MemKind, ModuleId, StreamId};
use gpu_kernels::launch::{DevicePtr, Launch};
use gpu_kernels::ptx::PtxModule;
use spinning_top::Spinlock;
use uk_wire::command::{self, Command, Kind, Short};

use crate::link::{Link, Window};
use crate::session::{STAGING_BYTES, Session};

/// Copies up to this size go through staging memory and are not waited for; longer ones are moved in place.
const SMALL_BYTES: usize = 64 << 10;

/// The broker's kernels, all of them.
const BUILTIN: ModuleId = ModuleId(0);

/// A GPU of the host, by way of its broker.
pub struct RemoteDriver {
    info: DeviceInfo,
    state: Spinlock<State>,
}

struct State {
    session: Session,
    /// The broker's numbers of kernels.
    kernels: BTreeMap<&'static str, u32>,
}

impl RemoteDriver {
    /// Greets the broker at the other end of the link. With a window, data is moved in place. `build` is that of the caller's
    /// launchers ([`gpu_kernels::ptx::BUILD`]): a broker of another is refused, since a kernel that its launcher does not fit
    /// writes where it should not.
    pub fn open(
        link: Box<dyn Link>,
        window: Option<Box<dyn Window>>,
        build: u64,
    ) -> Result<RemoteDriver, DriverError> {
        let (session, welcome) = Session::open(link, window)?;
        if welcome.kernels != build {
            let what = alloc::format!(
                "the broker's kernels are of build {:016x}, expected {build:016x}: image and broker must be built from the same source",
                welcome.kernels
            );
            return Err(DriverError::NoDriver { what });
        }
        let info = DeviceInfo {
            name: welcome.name.as_str().to_string(),
            pci: String::new(),
            sm: welcome.sm,
            n_sm: welcome.n_sm,
            memory_bytes: welcome.memory_bytes,
            l2_bytes: welcome.l2_bytes,
            smem_per_cta_bytes: welcome.smem_per_cta_bytes,
            smem_per_sm_bytes: welcome.smem_per_sm_bytes,
            registers_per_sm: welcome.registers_per_sm,
            threads_per_sm: welcome.threads_per_sm,
            driver_version: welcome.driver_version,
            ..DeviceInfo::default()
        };
        Ok(RemoteDriver { info, state: Spinlock::new(State { session, kernels: BTreeMap::new() }) })
    }

    fn push(&self, op: &'static str, command: Command) -> Result<(), DriverError> {
        self.state.lock().session.push(op, command)
    }

    fn call(&self, op: &'static str, command: Command) -> Result<u64, DriverError> {
        self.state.lock().session.call(op, command)
    }

    /// Sends bytes by a command that takes them: small ones with the next doorbell, long ones now.
    fn send(
        &self,
        op: &'static str,
        to: DevicePtr,
        from: &[u8],
        command: impl Fn(u64, command::Data) -> Command,
    ) -> Result<(), DriverError> {
        let session = &mut self.state.lock().session;
        if from.len() > SMALL_BYTES
            && let Some(data) = session.place(from.as_ptr(), from.len())
        {
            // In place: the slice is ours until the broker is done with it.
            return session.call(op, command(to.0, data)).map(drop);
        }
        for (i, piece) in from.chunks(STAGING_BYTES).enumerate() {
            let data = session.stage(piece)?;
            session.push(op, command(to.0 + (i * STAGING_BYTES) as u64, data))?;
        }
        Ok(())
    }

    /// Fetches bytes by a command that brings them.
    fn fetch(
        &self,
        op: &'static str,
        to: &mut [u8],
        from: DevicePtr,
        command: impl Fn(u64, command::Data) -> Command,
    ) -> Result<(), DriverError> {
        let session = &mut self.state.lock().session;
        if to.len() > SMALL_BYTES
            && let Some(data) = session.place(to.as_mut_ptr(), to.len())
        {
            // In place, by the host's hand: exclusively ours until the broker is done with it, and read only after the
            // counter says so.
            return session.call(op, command(from.0, data)).map(drop);
        }
        for (i, piece) in to.chunks_mut(STAGING_BYTES).enumerate() {
            session.fetch(op, piece, |data| command(from.0 + (i * STAGING_BYTES) as u64, data))?;
        }
        Ok(())
    }

    fn command_launch(
        state: &mut State,
        launch: &Launch,
        stream: StreamId,
        how: command::How,
    ) -> Result<command::Launch, DriverError> {
        let kernel = match state.kernels.get(launch.entry) {
            Some(&kernel) => kernel,
            None => {
                let refused = || DriverError::NoKernel { entry: launch.entry.to_string() };
                let name = Short::new(launch.entry.as_bytes()).ok_or_else(refused)?;
                let kernel = state.session.call("kernel", Command::Kernel { name })? as u32;
                state.kernels.insert(launch.entry, kernel);
                kernel
            }
        };
        let params = Short::new(launch.params.bytes()).ok_or_else(|| DriverError::Launch {
            entry: launch.entry,
            what: "its arguments are too long to send".to_string(),
        })?;
        Ok(command::Launch {
            kernel,
            stream: stream.0,
            grid: launch.grid,
            cta: launch.cta,
            cluster: launch.cluster,
            smem_bytes: launch.smem_bytes,
            how,
            params,
        })
    }
}

// Any argument list that a kernel here takes can be sent.
const _: () = assert!(gpu_kernels::launch::MAX_PARAM_BYTES <= command::MAX_PARAM_BYTES);

impl Driver for RemoteDriver {
    fn info(&self) -> DeviceInfo {
        self.info.clone()
    }

    fn free_bytes(&self) -> Result<u64, DriverError> {
        self.call("free_bytes", Command::FreeBytes)
    }

    fn alloc(&self, kind: MemKind, bytes: u64) -> Result<DevicePtr, DriverError> {
        let wire = match kind {
            MemKind::Host => Kind::Host,
            MemKind::Device => Kind::Device,
            MemKind::Managed => Kind::Managed,
        };
        match self.call("alloc", Command::Alloc { kind: wire, bytes }) {
            Ok(at) => Ok(DevicePtr(at)),
            Err(DriverError::OutOfMemory { .. }) => Err(DriverError::OutOfMemory { kind, bytes }),
            Err(error) => Err(error),
        }
    }

    fn free(&self, at: DevicePtr) -> Result<(), DriverError> {
        self.push("free", Command::Free { at: at.0 })
    }

    fn alloc_async(&self, bytes: u64, stream: StreamId) -> Result<DevicePtr, DriverError> {
        self.call("alloc_async", Command::AllocAsync { bytes, stream: stream.0 }).map(DevicePtr)
    }

    fn free_async(&self, at: DevicePtr, stream: StreamId) -> Result<(), DriverError> {
        self.push("free_async", Command::FreeAsync { at: at.0, stream: stream.0 })
    }

    fn write_host(&self, to: DevicePtr, from: &[u8]) -> Result<(), DriverError> {
        self.send("write_host", to, from, |to, from| Command::WriteHost { to, from })
    }

    fn read_host(&self, to: &mut [u8], from: DevicePtr) -> Result<(), DriverError> {
        self.fetch("read_host", to, from, |from, to| Command::ReadHost { from, to })
    }

    fn write(&self, to: DevicePtr, from: &[u8], stream: StreamId) -> Result<(), DriverError> {
        self.send("write", to, from, |to, from| Command::Write { to, from, stream: stream.0 })
    }

    fn read(&self, to: &mut [u8], from: DevicePtr, stream: StreamId) -> Result<(), DriverError> {
        self.fetch("read", to, from, |from, to| Command::Read { from, to, stream: stream.0 })
    }

    fn copy(&self, to: DevicePtr, from: DevicePtr, bytes: u64, stream: StreamId) -> Result<(), DriverError> {
        self.push("copy", Command::Copy { to: to.0, from: from.0, bytes, stream: stream.0 })
    }

    fn fill(&self, at: DevicePtr, byte: u8, bytes: u64, stream: StreamId) -> Result<(), DriverError> {
        self.push("fill", Command::Fill { at: at.0, bytes, byte, stream: stream.0 })
    }

    fn builtin(&self) -> Option<ModuleId> {
        Some(BUILTIN)
    }

    /// The broker has every kernel already.
    fn load(&self, _module: &PtxModule) -> Result<ModuleId, DriverError> {
        Ok(BUILTIN)
    }

    fn unload(&self, module: ModuleId) -> Result<(), DriverError> {
        known(module)
    }

    fn launch(&self, module: ModuleId, launch: &Launch, stream: StreamId) -> Result<(), DriverError> {
        known(module)?;
        let state = &mut *self.state.lock();
        let launch = RemoteDriver::command_launch(state, launch, stream, command::How::Alone)?;
        state.session.push("launch", Command::Launch(launch))
    }

    fn launch_early(&self, module: ModuleId, launch: &Launch, stream: StreamId) -> Result<(), DriverError> {
        known(module)?;
        let state = &mut *self.state.lock();
        let launch = RemoteDriver::command_launch(state, launch, stream, command::How::Early)?;
        state.session.push("launch_early", Command::Launch(launch))
    }

    fn launch_cooperative(
        &self,
        module: ModuleId,
        launch: &Launch,
        stream: StreamId,
    ) -> Result<(), DriverError> {
        known(module)?;
        let state = &mut *self.state.lock();
        let launch = RemoteDriver::command_launch(state, launch, stream, command::How::Cooperative)?;
        state.session.push("launch_cooperative", Command::Launch(launch))
    }

    fn resident_ctas(&self, module: ModuleId, launch: &Launch) -> Result<u32, DriverError> {
        known(module)?;
        let state = &mut *self.state.lock();
        let launch =
            RemoteDriver::command_launch(state, launch, StreamId::DEFAULT, command::How::Cooperative)?;
        state.session.call("resident_ctas", Command::ResidentCtas(launch)).map(|n| n as u32)
    }

    fn create_stream(&self) -> Result<StreamId, DriverError> {
        self.call("create_stream", Command::CreateStream).map(|id| StreamId(id as u32))
    }

    fn release_stream(&self, stream: StreamId) -> Result<(), DriverError> {
        self.push("release_stream", Command::ReleaseStream { stream: stream.0 })
    }

    fn synchronise(&self, stream: StreamId) -> Result<(), DriverError> {
        self.call("synchronise", Command::Synchronise { stream: stream.0 }).map(drop)
    }

    fn record(&self, stream: StreamId) -> Result<EventId, DriverError> {
        self.call("record", Command::Record { stream: stream.0 }).map(|id| EventId(id as u32))
    }

    fn record_again(&self, event: EventId, stream: StreamId) -> Result<(), DriverError> {
        self.push("record_again", Command::RecordAgain { event: event.0, stream: stream.0 })
    }

    fn wait(&self, stream: StreamId, event: EventId) -> Result<(), DriverError> {
        self.push("wait", Command::Wait { event: event.0, stream: stream.0 })
    }

    fn synchronise_event(&self, event: EventId) -> Result<(), DriverError> {
        self.call("synchronise_event", Command::SynchroniseEvent { event: event.0 }).map(drop)
    }

    fn is_done(&self, event: EventId) -> Result<bool, DriverError> {
        self.call("is_done", Command::IsDone { event: event.0 }).map(|done| done != 0)
    }

    fn elapsed_ns(&self, from: EventId, to: EventId) -> Result<u64, DriverError> {
        self.call("elapsed_ns", Command::Elapsed { from: from.0, to: to.0 })
    }

    fn release(&self, event: EventId) -> Result<(), DriverError> {
        self.push("release", Command::ReleaseEvent { event: event.0 })
    }

    fn begin_capture(&self, stream: StreamId) -> Result<(), DriverError> {
        self.call("begin_capture", Command::BeginCapture { stream: stream.0 }).map(drop)
    }

    fn end_capture(&self, stream: StreamId) -> Result<GraphId, DriverError> {
        self.call("end_capture", Command::EndCapture { stream: stream.0 }).map(|id| GraphId(id as u32))
    }

    fn launch_graph(&self, graph: GraphId, stream: StreamId) -> Result<(), DriverError> {
        self.push("launch_graph", Command::LaunchGraph { graph: graph.0, stream: stream.0 })
    }

    fn release_graph(&self, graph: GraphId) -> Result<(), DriverError> {
        self.push("release_graph", Command::ReleaseGraph { graph: graph.0 })
    }
}

fn known(module: ModuleId) -> Result<(), DriverError> {
    if module == BUILTIN { Ok(()) } else { Err(DriverError::Handle { what: "module", id: module.0 }) }
}
