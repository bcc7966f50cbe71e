//! libcuda's functions, found when first needed.
//!
//! Each is defined here under its own name, as a jump through a table that [`load`] fills from `libcuda.so.1`. So `cust`
//! and [`super::ffi`] link without CUDA, and a program without a driver starts and is told so. A function that the
//! driver on the machine is too old to have returns `CUDA_ERROR_NOT_SUPPORTED`.
//!
//! The list holds what `cust` refers to and what `ffi` declares. A missing row is an error of the linker.
#![allow(non_snake_case, non_upper_case_globals, non_camel_case_types)] // CUDA's names

use std::ffi::{CStr, CString, c_char, c_void};
use std::format;
use std::string::String;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

const LIBRARY: &CStr = c"libcuda.so.1";
/// `CUDA_ERROR_NOT_SUPPORTED`.
const NOT_SUPPORTED: u32 = 801;

extern "C" fn missing() -> u32 {
    NOT_SUPPORTED
}

macro_rules! symbols {
    ($($name:ident)*) => {
        /// Places in the table.
        #[derive(Clone, Copy)]
        enum Place { $($name),* }

        const NAMES: &[&str] = &[$(stringify!($name)),*];

        static TABLE: [AtomicPtr<c_void>; NAMES.len()] =
            [const { AtomicPtr::new(missing as *mut c_void) }; NAMES.len()];

        $(
            /// The function of this name in libcuda.
            #[unsafe(naked)]
            #[unsafe(no_mangle)]
            unsafe extern "C" fn $name() {
                // The arguments stay where they are and the driver's function returns to our caller.
                #[cfg(target_arch = "x86_64")]
                std::arch::naked_asm!(
                    "jmp qword ptr [rip + {table} + 8 * {place}]",
                    table = sym TABLE,
                    place = const Place::$name as usize,
                );
                #[cfg(target_arch = "aarch64")]
                std::arch::naked_asm!(
                    "adrp x16, {table} + 8 * {place}",
                    "add x16, x16, :lo12:{table} + 8 * {place}",
                    "ldr x16, [x16]",
                    "br x16",
                    table = sym TABLE,
                    place = const Place::$name as usize,
                );
            }
        )*
    };
}

symbols! {
    cuArray3DCreate_v2
    cuArray3DGetDescriptor_v2
    cuArrayDestroy
    cuCtxCreate_v2
    cuCtxDestroy_v2
    cuCtxEnablePeerAccess
    cuCtxGetApiVersion
    cuCtxGetCacheConfig
    cuCtxGetCurrent
    cuCtxGetDevice
    cuCtxGetFlags
    cuCtxGetLimit
    cuCtxGetSharedMemConfig
    cuCtxGetStreamPriorityRange
    cuCtxPopCurrent_v2
    cuCtxPushCurrent_v2
    cuCtxSetCacheConfig
    cuCtxSetCurrent
    cuCtxSetLimit
    cuCtxSetSharedMemConfig
    cuCtxSynchronize
    cuDestroyExternalMemory
    cuDeviceCanAccessPeer
    cuDeviceGet
    cuDeviceGetAttribute
    cuDeviceGetCount
    cuDeviceGetDefaultMemPool
    cuDeviceGetName
    cuDeviceGetPCIBusId
    cuDevicePrimaryCtxRelease_v2
    cuDevicePrimaryCtxReset_v2
    cuDevicePrimaryCtxRetain
    cuDevicePrimaryCtxSetFlags_v2
    cuDeviceTotalMem_v2
    cuDriverGetVersion
    cuEventCreate
    cuEventDestroy_v2
    cuEventElapsedTime
    cuEventQuery
    cuEventRecord
    cuEventSynchronize
    cuExternalMemoryGetMappedBuffer
    cuFuncGetAttribute
    cuFuncGetParamInfo
    cuFuncSetAttribute
    cuFuncSetCacheConfig
    cuFuncSetSharedMemConfig
    cuGetErrorName
    cuGetErrorString
    cuGraphAddKernelNode
    cuGraphCreate
    cuGraphDebugDotPrint
    cuGraphDestroy
    cuGraphExecDestroy
    cuGraphGetEdges
    cuGraphGetNodes
    cuGraphInstantiateWithFlags
    cuGraphKernelNodeGetParams
    cuGraphLaunch
    cuGraphNodeGetType
    cuImportExternalMemory
    cuInit
    cuLaunchHostFunc
    cuLaunchKernel
    cuLaunchKernelEx
    cuLinkAddData_v2
    cuLinkComplete
    cuLinkCreate_v2
    cuLinkDestroy
    cuMemAdvise
    cuMemAllocAsync
    cuMemAllocHost_v2
    cuMemAllocManaged
    cuMemAlloc_v2
    cuMemFreeAsync
    cuMemFreeHost
    cuMemFree_v2
    cuMemGetInfo_v2
    cuMemHostAlloc
    cuMemHostGetDevicePointer_v2
    cuMemHostRegister_v2
    cuMemHostUnregister
    cuMemPoolSetAttribute
    cuMemPrefetchAsync
    cuMemcpy2D_v2
    cuMemcpyAsync
    cuMemcpyAtoH_v2
    cuMemcpyDtoDAsync_v2
    cuMemcpyDtoD_v2
    cuMemcpyDtoHAsync_v2
    cuMemcpyDtoH_v2
    cuMemcpyHtoA_v2
    cuMemcpyHtoDAsync_v2
    cuMemcpyHtoD_v2
    cuMemsetD16Async
    cuMemsetD16_v2
    cuMemsetD32Async
    cuMemsetD32_v2
    cuMemsetD8Async
    cuMemsetD8_v2
    cuModuleGetFunction
    cuModuleGetGlobal_v2
    cuModuleLoad
    cuModuleLoadData
    cuModuleLoadDataEx
    cuModuleUnload
    cuOccupancyAvailableDynamicSMemPerBlock
    cuOccupancyMaxActiveBlocksPerMultiprocessor
    cuOccupancyMaxPotentialBlockSize
    cuStreamBeginCapture_v2
    cuStreamCreateWithPriority
    cuStreamDestroy_v2
    cuStreamEndCapture
    cuStreamGetFlags
    cuStreamGetPriority
    cuStreamIsCapturing
    cuStreamQuery
    cuStreamSynchronize
    cuStreamWaitEvent
    cuSurfObjectCreate
    cuSurfObjectDestroy
    cuSurfObjectGetResourceDesc
    cuTexObjectCreate
    cuTexObjectDestroy
    cuTexObjectGetResourceDesc
    cuTexObjectGetResourceViewDesc
}

/// Fills the table, once per process; says why it cannot.
pub(super) fn load() -> Result<(), &'static str> {
    static LOADED: OnceLock<Result<(), String>> = OnceLock::new();
    LOADED.get_or_init(fill).as_ref().map(|_| ()).map_err(String::as_str)
}

fn fill() -> Result<(), String> {
    // SAFETY: the name is a C string; libcuda's initialisers are what every CUDA program runs.
    let library = unsafe { libc::dlopen(LIBRARY.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if library.is_null() {
        // SAFETY: dlerror returns null or a C string that lasts until the next dl call of this thread.
        let text = unsafe {
            let text: *const c_char = libc::dlerror();
            if text.is_null() { None } else { Some(CStr::from_ptr(text).to_string_lossy().into_owned()) }
        };
        return Err(text.unwrap_or_else(|| format!("{} cannot be opened", LIBRARY.to_string_lossy())));
    }
    for (name, slot) in NAMES.iter().zip(&TABLE) {
        let name = CString::new(*name).map_err(|error| format!("{name}: {error}"))?;
        // SAFETY: an open library and a C string. The library stays open as long as the process.
        let function = unsafe { libc::dlsym(library, name.as_ptr()) };
        if !function.is_null() {
            slot.store(function, Ordering::Release);
        }
    }
    Ok(())
}
