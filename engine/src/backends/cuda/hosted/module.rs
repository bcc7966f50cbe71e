//! Modules as the driver compiled them, and the function of each.

use std::borrow::ToOwned;
use std::ffi::{CStr, CString, c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::vec::Vec;

use gpu_kernels::driver::DriverError;
use gpu_kernels::launch::Launch;
use gpu_kernels::ptx::PtxModule;

use super::error::{check_launch, describe};
use super::ffi::{self, Handle};

/// Dynamic shared memory that every kernel may have without asking.
const PLAIN_SMEM_BYTES: u32 = 48 << 10;
/// Largest cluster that every kernel may have without asking.
const PLAIN_CLUSTER: u32 = 8;
/// Most CTAs per multiprocessor of a launch that is short enough for its start and end to matter.
const SHORT_LAUNCH_CTAS: u32 = 4;
/// Room for the messages of the driver's compiler.
const JIT_LOG_BYTES: usize = 8 << 10;

/// A loaded module and its one function.
pub(super) struct Module {
    raw: Handle,
    entry: &'static str,
    /// Whether its kernel waits for earlier launches itself.
    pub(super) waits: bool,
    function: Function,
}

pub(super) struct Function {
    pub(super) raw: Handle,
    /// Whether it may already have more shared memory than every kernel.
    large_smem: AtomicBool,
    /// Whether it may already have larger clusters.
    large_clusters: AtomicBool,
    /// Whether it asks for as much shared memory as there is, and little first-level cache.
    mostly_shared: AtomicBool,
}

// SAFETY: modules and functions of the driver's belong to a context, not to a thread, and its functions may be called
// from any thread.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    pub(super) fn load(module: &PtxModule) -> Result<Module, DriverError> {
        let refuse = |code: u32, log: &str| {
            let too_new = matches!(code, ffi::ERROR_NO_BINARY_FOR_GPU | ffi::ERROR_UNSUPPORTED_PTX_VERSION);
            let log = log.trim();
            let what =
                if log.is_empty() { describe(code) } else { std::format!("{}: {log}", describe(code)) };
            DriverError::Module { name: module.entry, tier: module.tier, too_new, what }
        };
        let text = module.text();
        let waits = text.contains("griddepcontrol.wait");
        let text = CString::new(text).map_err(|_| refuse(ffi::ERROR_INVALID_VALUE, "a zero byte"))?;
        let mut log = std::vec![0u8; JIT_LOG_BYTES];
        let mut options =
            [ffi::JIT_ERROR_LOG_BUFFER, ffi::JIT_ERROR_LOG_BUFFER_SIZE_BYTES, ffi::JIT_OPTIMIZATION_LEVEL];
        let mut values = [
            log.as_mut_ptr().cast::<c_void>(),
            std::ptr::without_provenance_mut(JIT_LOG_BYTES),
            std::ptr::without_provenance_mut(4),
        ];
        let mut raw = std::ptr::null_mut();
        // SAFETY: a C string, options with a value each (numbers are passed in the pointer itself), and room for the log
        // of the stated length.
        let code = unsafe {
            let (options_at, values_at) = (options.as_mut_ptr(), values.as_mut_ptr());
            ffi::cuModuleLoadDataEx(
                &mut raw,
                text.as_ptr().cast(),
                options.len() as u32,
                options_at,
                values_at,
            )
        };
        if code != ffi::SUCCESS {
            let text = CStr::from_bytes_until_nul(&log).map(CStr::to_string_lossy).unwrap_or_default();
            return Err(refuse(code, &text));
        }
        // From here on the module is unloaded if the function is missing.
        let mut loaded =
            Module { raw, entry: module.entry, waits, function: Function::new(std::ptr::null_mut()) };
        let name = CString::new(module.entry).unwrap_or_default();
        // SAFETY: the module just loaded, a C string, a valid place.
        let code = unsafe { ffi::cuModuleGetFunction(&mut loaded.function.raw, raw, name.as_ptr()) };
        if code == ffi::SUCCESS { Ok(loaded) } else { Err(refuse(code, module.entry)) }
    }

    pub(super) fn function(&self, launch: &Launch) -> Result<&Function, DriverError> {
        if self.entry == launch.entry {
            Ok(&self.function)
        } else {
            Err(DriverError::NoKernel { entry: launch.entry.to_owned() })
        }
    }
}

impl Function {
    fn new(raw: Handle) -> Function {
        let [large_smem, large_clusters, mostly_shared] = [const { AtomicBool::new(false) }; 3];
        Function { raw, large_smem, large_clusters, mostly_shared }
    }

    /// Asks for what a launch needs beyond what every kernel may have.
    pub(super) fn raise(&self, launch: &Launch, smem_per_cta_bytes: u32) -> Result<(), DriverError> {
        if launch.smem_bytes > PLAIN_SMEM_BYTES && !self.large_smem.load(Ordering::Relaxed) {
            let mut static_bytes = 0;
            // SAFETY: a function of a loaded module and a valid place.
            let code =
                unsafe { ffi::cuFuncGetAttribute(&mut static_bytes, ffi::FUNC_SHARED_SIZE_BYTES, self.raw) };
            check_launch(launch.entry, code)?;
            // All the device has: the launch itself says how much it takes, and is refused if that is too much.
            let most = smem_per_cta_bytes as c_int - static_bytes;
            self.set(launch, ffi::FUNC_MAX_DYNAMIC_SHARED_SIZE_BYTES, most)?;
            self.large_smem.store(true, Ordering::Relaxed);
        }
        if launch.cluster > PLAIN_CLUSTER && !self.large_clusters.load(Ordering::Relaxed) {
            self.set(launch, ffi::FUNC_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)?;
            self.large_clusters.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Before a launch that may start while the one before it runs: short ones all ask for the same division of a
    /// multiprocessor's memory into first-level cache and shared memory, since to change it the multiprocessor must be empty.
    /// On an H100 a token of 8B takes 1 to 4 % less, a prompt 1 to 2 % more.
    pub(super) fn share_evenly(&self, launch: &Launch, n_sm: u32) {
        let ctas = launch.grid.iter().fold(1, |ctas: u32, &n| ctas.saturating_mul(n));
        let short = ctas <= SHORT_LAUNCH_CTAS * n_sm;
        if self.mostly_shared.swap(short, Ordering::Relaxed) != short {
            let value = if short { ffi::CARVEOUT_MAX_SHARED } else { ffi::CARVEOUT_DEFAULT };
            // A preference: a driver that does not take it says so, and nothing is lost.
            // SAFETY: a function of a loaded module.
            unsafe { ffi::cuFuncSetAttribute(self.raw, ffi::FUNC_PREFERRED_SHARED_MEMORY_CARVEOUT, value) };
        }
    }

    /// Where each of the kernel's arguments lies in a buffer of all.
    pub(super) fn arguments(&self, launch: &Launch, all: &mut [u8]) -> Result<Vec<*mut c_void>, DriverError> {
        let mut each = Vec::new();
        loop {
            let (mut offset, mut bytes) = (0, 0);
            // SAFETY: a function of a loaded module and valid places.
            let code =
                unsafe { ffi::cuFuncGetParamInfo(self.raw, each.len(), &raw mut offset, &raw mut bytes) };
            if code == ffi::ERROR_INVALID_VALUE {
                // No argument has this number.
                return Ok(each);
            }
            check_launch(launch.entry, code)?;
            let argument = all.get_mut(offset..offset + bytes).ok_or_else(|| DriverError::Launch {
                entry: launch.entry,
                what: std::format!("its argument {} ends at byte {}", each.len(), offset + bytes),
            })?;
            each.push(argument.as_mut_ptr().cast());
        }
    }

    fn set(&self, launch: &Launch, attribute: c_int, value: c_int) -> Result<(), DriverError> {
        // SAFETY: a function of a loaded module.
        check_launch(launch.entry, unsafe { ffi::cuFuncSetAttribute(self.raw, attribute, value) })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: loaded, and nobody has its functions any more. After a fault the context has no module left to unload.
        unsafe { ffi::cuModuleUnload(self.raw) };
    }
}
