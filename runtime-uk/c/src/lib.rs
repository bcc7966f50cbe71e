//! The driver path for C: contexts, memory of three kinds, copies, kernels by name, launches.
//!
//! A context is a connection to a broker (`runik-gpu-host`) on this machine. Functions that return `int` return 0, or -1
//! after a failure, whose words `cuda_uk_error` gives. A null context, or one that was not initialised, is a failure, not a
//! crash; wild pointers are the caller's. A context is used by one thread at a time.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::ptr::{null, null_mut};
use std::time::{Duration, Instant};

use gpu_kernels::driver::{Driver, DriverError, MemKind, ModuleId, StreamId};
use gpu_kernels::launch::{DevicePtr, Launch, Params};
use gpu_kernels::ptx;
use runtime_uk::{Link, LinkError, RemoteDriver};

/// How long one look at the socket takes if nothing comes.
const LOOK: Duration = Duration::from_millis(1);

/// A connection to a device. Zero it before `cuda_uk_init`.
#[repr(C)]
pub struct Context {
    /// The number given to `cuda_uk_init`.
    pub device_id: c_int,
    /// Null: memory is allocated piece by piece.
    pub gpu_memory_base: *mut c_void,
    /// Bytes of the device's memory.
    pub gpu_memory_size: usize,
    /// The library's own; null before initialisation.
    pub gpu_context: *mut c_void,
}

/// Where memory lives.
#[allow(non_camel_case_types)] // C's names
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub enum MemoryType {
    /// Host memory that the device reaches.
    UK_MEM_HOST,
    /// Device memory.
    UK_MEM_DEVICE,
    /// Memory that moves to whoever touches it.
    UK_MEM_MANAGED,
}

/// A piece of memory.
#[repr(C)]
pub struct Allocation {
    /// Device address.
    pub ptr: *mut c_void,
    /// Bytes.
    pub size: usize,
    /// Where it lives.
    pub kind: MemoryType,
    /// Whose it is.
    pub ctx: *mut Context,
}

/// A kernel of the table. The broker has its code.
#[repr(C)]
pub struct Kernel {
    /// Its name, for `cuda_uk_launch`.
    pub name: *const c_char,
}

/// All kernels.
#[repr(C)]
pub struct KernelTable {
    /// The first.
    pub kernels: *const Kernel,
    /// How many.
    pub n_kernels: usize,
}

struct Inner {
    driver: RemoteDriver,
    error: CString,
    /// Names, which launches need for as long as the driver lives.
    names: Vec<&'static str>,
}

struct SocketLink {
    socket: UnixStream,
    started: Instant,
}

impl Link for SocketLink {
    fn send(&mut self, bytes: &[u8]) -> Result<(), LinkError> {
        self.socket.write_all(bytes).map_err(|_| LinkError::Closed)
    }
    fn receive(&mut self, into: &mut [u8]) -> Result<usize, LinkError> {
        if into.is_empty() {
            return Ok(0);
        }
        match self.socket.read(into) {
            Ok(0) => Err(LinkError::Closed),
            Ok(n) => Ok(n),
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                ) =>
            {
                Ok(0)
            }
            Err(_) => Err(LinkError::Closed),
        }
    }
    fn pause(&mut self) {}
    fn now(&self) -> Duration {
        self.started.elapsed()
    }
}

fn connect(path: &str) -> Result<RemoteDriver, DriverError> {
    let open = || {
        let socket = UnixStream::connect(path)?;
        socket.set_read_timeout(Some(LOOK))?;
        Ok(socket)
    };
    let socket =
        open().map_err(|error: std::io::Error| DriverError::NoDriver { what: format!("{path}: {error}") })?;
    RemoteDriver::open(Box::new(SocketLink { socket, started: Instant::now() }), None, ptx::BUILD)
}

/// The library's part of a context.
///
/// # Safety
/// * `ctx` is null or points to a context that is zeroed or initialised, and nobody else uses it meanwhile.
unsafe fn inner<'a>(ctx: *mut Context) -> Option<&'a mut Inner> {
    // SAFETY: the caller's promise; `gpu_context` is null or what `cuda_uk_init` made.
    unsafe { ctx.as_mut().and_then(|ctx| ctx.gpu_context.cast::<Inner>().as_mut()) }
}

fn done<T>(inner: &mut Inner, result: Result<T, DriverError>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(error) => {
            inner.error = CString::new(error.to_string().replace('\0', " ")).unwrap_or_default();
            None
        }
    }
}

fn status(done: Option<()>) -> c_int {
    if done.is_some() { 0 } else { -1 }
}

/// Connects to the broker of a device: the one that listens at /run/runik-gpu-host/DEVICE_ID.
///
/// # Safety
/// * `ctx` points to a context, whose contents are overwritten.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuda_uk_init(ctx: *mut Context, device_id: c_int) -> c_int {
    let path = CString::new(format!("/run/runik-gpu-host/{device_id}")).unwrap_or_default();
    // SAFETY: the caller's promise.
    unsafe { cuda_uk_init_at(ctx, device_id, path.as_ptr()) }
}

/// Connects to the broker that listens at a unix socket.
///
/// # Safety
/// * `ctx` points to a context, whose contents are overwritten; `socket` to a string that ends with a NUL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuda_uk_init_at(
    ctx: *mut Context,
    device_id: c_int,
    socket: *const c_char,
) -> c_int {
    if ctx.is_null() || socket.is_null() {
        return -1;
    }
    // SAFETY: not null; a string by the caller's promise.
    let path = unsafe { CStr::from_ptr(socket) }.to_string_lossy();
    let mut made =
        Context { device_id, gpu_memory_base: null_mut(), gpu_memory_size: 0, gpu_context: null_mut() };
    let result = match connect(&path) {
        Ok(driver) => {
            made.gpu_memory_size = usize::try_from(driver.info().memory_bytes).unwrap_or(usize::MAX);
            let inner = Inner { driver, error: CString::default(), names: Vec::new() };
            made.gpu_context = Box::into_raw(Box::new(inner)).cast();
            0
        }
        // There is no context yet to keep the words in.
        Err(_) => -1,
    };
    // SAFETY: the caller's promise.
    unsafe { ctx.write(made) };
    result
}

/// Ends the connection; the broker gives back all memory.
///
/// # Safety
/// * `ctx` is null, zeroed or initialised.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuda_uk_shutdown(ctx: *mut Context) {
    // SAFETY: the caller's promise.
    if let Some(ctx) = unsafe { ctx.as_mut() }
        && !ctx.gpu_context.is_null()
    {
        // SAFETY: made by `cuda_uk_init_at`, and forgotten now.
        drop(unsafe { Box::from_raw(ctx.gpu_context.cast::<Inner>()) });
        ctx.gpu_context = null_mut();
    }
}

/// The words of the last failure; empty if there was none. Valid until the next call with this context.
///
/// # Safety
/// * `ctx` is null, zeroed or initialised.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuda_uk_error(ctx: *mut Context) -> *const c_char {
    // SAFETY: the caller's promise.
    unsafe { inner(ctx) }.map_or(c"".as_ptr(), |inner| inner.error.as_ptr())
}

/// Device memory; null if there is none.
///
/// # Safety
/// * `ctx` is null, zeroed or initialised.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuda_uk_malloc(ctx: *mut Context, size: usize) -> *mut c_void {
    // SAFETY: the caller's promise.
    unsafe { cuda_uk_malloc_kind(ctx, size, MemoryType::UK_MEM_DEVICE as c_int) }.ptr
}

/// Memory of a kind, a `uk_memory_type_t`; its `ptr` is null if there is none.
///
/// # Safety
/// * `ctx` is null, zeroed or initialised.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuda_uk_malloc_kind(ctx: *mut Context, size: usize, kind: c_int) -> Allocation {
    // Of C an enumeration may have any number, of Rust none but its own.
    let kinds = [MemoryType::UK_MEM_HOST, MemoryType::UK_MEM_DEVICE, MemoryType::UK_MEM_MANAGED];
    let known = kinds.into_iter().find(|known| *known as c_int == kind);
    let kind = known.unwrap_or(MemoryType::UK_MEM_DEVICE);
    let wire = match kind {
        MemoryType::UK_MEM_HOST => MemKind::Host,
        MemoryType::UK_MEM_DEVICE => MemKind::Device,
        MemoryType::UK_MEM_MANAGED => MemKind::Managed,
    };
    // SAFETY: the caller's promise.
    let at = unsafe { inner(ctx) }.and_then(|inner| {
        let at = match known {
            Some(_) => inner.driver.alloc(wire, size as u64),
            None => Err(DriverError::Unsupported { op: "cuda_uk_malloc_kind of another kind" }),
        };
        done(inner, at)
    });
    // Device addresses are numbers to this process.
    let ptr = at.map_or(null_mut(), |at| std::ptr::without_provenance_mut(at.0 as usize));
    Allocation { ptr, size: if ptr.is_null() { 0 } else { size }, kind, ctx }
}

/// Gives memory back.
///
/// # Safety
/// * `ctx` is null, zeroed or initialised.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuda_uk_free(ctx: *mut Context, ptr: *mut c_void) {
    // SAFETY: the caller's promise.
    if let Some(inner) = unsafe { inner(ctx) }
        && !ptr.is_null()
    {
        let freed = inner.driver.free(DevicePtr(ptr.addr() as u64));
        done(inner, freed);
    }
}

/// Copies to the device.
///
/// # Safety
/// * `ctx` is null, zeroed or initialised; `size` bytes can be read at `src`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuda_uk_memcpy_htod(
    ctx: *mut Context,
    dst: *mut c_void,
    src: *const c_void,
    size: usize,
) -> c_int {
    if src.is_null() {
        return -1;
    }
    // SAFETY: the caller's promise.
    let (inner, from) = unsafe { (inner(ctx), std::slice::from_raw_parts(src.cast::<u8>(), size)) };
    status(inner.and_then(|inner| {
        let wrote = inner.driver.write(DevicePtr(dst.addr() as u64), from, StreamId::DEFAULT);
        // Failures belong to the call that caused them.
        let wrote = wrote.and_then(|()| inner.driver.synchronise(StreamId::DEFAULT));
        done(inner, wrote)
    }))
}

/// Copies from the device, after all work so far.
///
/// # Safety
/// * `ctx` is null, zeroed or initialised; `size` bytes can be written at `dst`, and were before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuda_uk_memcpy_dtoh(
    ctx: *mut Context,
    dst: *mut c_void,
    src: *const c_void,
    size: usize,
) -> c_int {
    if dst.is_null() {
        return -1;
    }
    // SAFETY: the caller's promise.
    let (inner, to) = unsafe { (inner(ctx), std::slice::from_raw_parts_mut(dst.cast::<u8>(), size)) };
    status(inner.and_then(|inner| {
        let read = inner.driver.read(to, DevicePtr(src.addr() as u64), StreamId::DEFAULT);
        done(inner, read)
    }))
}

/// The kernels whose PTX this library was built with; none if it was built without. The broker may know more.
#[unsafe(no_mangle)]
pub extern "C" fn cuda_uk_kernels() -> KernelTable {
    static TABLE: std::sync::OnceLock<(Vec<CString>, Vec<usize>)> = std::sync::OnceLock::new();
    let (_, table) = TABLE.get_or_init(|| {
        let mut names: Vec<&str> = ptx::MODULES.iter().map(|module| module.entry).collect();
        names.sort_unstable();
        names.dedup();
        let names: Vec<CString> =
            names.into_iter().map(|name| CString::new(name).unwrap_or_default()).collect();
        let table = names.iter().map(|name| name.as_ptr().expose_provenance()).collect();
        (names, table)
    });
    // An entry is one pointer, kept as a number so that the table can be shared.
    KernelTable {
        kernels: if table.is_empty() { null() } else { table.as_ptr().cast() },
        n_kernels: table.len(),
    }
}

/// Queues a launch of a kernel: one-dimensional CTAs, arguments laid out as a C struct of them.
///
/// # Safety
/// * `ctx` is null, zeroed or initialised; `name` is a string that ends with a NUL; `params_bytes` bytes can be read at
///   `params`; `grid` points to three numbers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuda_uk_launch(
    ctx: *mut Context,
    name: *const c_char,
    grid: *const u32,
    cta: u32,
    smem_bytes: u32,
    params: *const c_void,
    params_bytes: usize,
) -> c_int {
    if name.is_null() || grid.is_null() || (params.is_null() && params_bytes > 0) {
        return -1;
    }
    // SAFETY: the caller's promise; a null pointer with no bytes was made one that is not.
    let (inner, name, grid, params) = unsafe {
        let params = if params.is_null() {
            std::ptr::NonNull::<u8>::dangling().as_ptr().cast_const()
        } else {
            params.cast()
        };
        let params = std::slice::from_raw_parts(params, params_bytes);
        (inner(ctx), CStr::from_ptr(name).to_string_lossy(), grid.cast::<[u32; 3]>().read(), params)
    };
    let Some(inner) = inner else { return -1 };
    let entry = match inner.names.iter().find(|own| **own == name) {
        Some(own) => own,
        None => {
            let own: &'static str = Box::leak(name.into_owned().into_boxed_str());
            inner.names.push(own);
            own
        }
    };
    let launched = match Params::from_bytes(params) {
        Some(params) => {
            let launch = Launch { entry, grid, cta, cluster: 1, smem_bytes, params };
            inner.driver.launch(ModuleId(0), &launch, StreamId::DEFAULT)
        }
        None => Err(DriverError::Launch {
            entry,
            what: format!("{params_bytes} bytes of arguments are too many"),
        }),
    };
    status(done(inner, launched))
}

/// Waits for all work, and says whether it went well.
///
/// # Safety
/// * `ctx` is null, zeroed or initialised.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuda_uk_synchronize(ctx: *mut Context) -> c_int {
    // SAFETY: the caller's promise.
    status(unsafe { inner(ctx) }.and_then(|inner| {
        let waited = inner.driver.synchronise(StreamId::DEFAULT);
        done(inner, waited)
    }))
}
