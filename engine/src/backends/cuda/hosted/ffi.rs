//! The CUDA driver API as we call it. Types are the header's, but results are plain numbers: a driver newer than any
//! header may return codes that an enum does not have.
#![allow(non_snake_case)] // CUDA's names

use std::ffi::{c_char, c_int, c_uint, c_void};

/// An object of the driver.
pub(super) type Handle = *mut c_void;

pub(super) const SUCCESS: u32 = 0;
pub(super) const ERROR_INVALID_VALUE: u32 = 1;
pub(super) const ERROR_OUT_OF_MEMORY: u32 = 2;
pub(super) const ERROR_NO_BINARY_FOR_GPU: u32 = 209;
pub(super) const ERROR_UNSUPPORTED_PTX_VERSION: u32 = 222;
pub(super) const ERROR_NOT_READY: u32 = 600;
pub(super) const ERROR_LAUNCH_OUT_OF_RESOURCES: u32 = 701;
pub(super) const ERROR_PEER_ACCESS_ALREADY_ENABLED: u32 = 704;
pub(super) const ERROR_COOPERATIVE_LAUNCH_TOO_LARGE: u32 = 720;
pub(super) const ERROR_NOT_SUPPORTED: u32 = 801;
/// First and last of the errors of stream capture.
pub(super) const ERRORS_OF_CAPTURE: std::ops::RangeInclusive<u32> = 900..=908;

/// `CUdevice_attribute`.
pub(super) mod attribute {
    pub(crate) const CLOCK_RATE: i32 = 13;
    pub(crate) const MULTIPROCESSOR_COUNT: i32 = 16;
    pub(crate) const MEMORY_CLOCK_RATE: i32 = 36;
    pub(crate) const GLOBAL_MEMORY_BUS_WIDTH: i32 = 37;
    pub(crate) const L2_CACHE_SIZE: i32 = 38;
    pub(crate) const MAX_THREADS_PER_MULTIPROCESSOR: i32 = 39;
    pub(crate) const COMPUTE_CAPABILITY_MAJOR: i32 = 75;
    pub(crate) const COMPUTE_CAPABILITY_MINOR: i32 = 76;
    pub(crate) const MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: i32 = 81;
    pub(crate) const MAX_REGISTERS_PER_MULTIPROCESSOR: i32 = 82;
    pub(crate) const MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: i32 = 97;
    pub(crate) const MEMORY_POOLS_SUPPORTED: i32 = 115;
}

/// `CUfunction_attribute`.
pub(super) const FUNC_SHARED_SIZE_BYTES: i32 = 1;
pub(super) const FUNC_MAX_DYNAMIC_SHARED_SIZE_BYTES: i32 = 8;
pub(super) const FUNC_PREFERRED_SHARED_MEMORY_CARVEOUT: i32 = 9;
pub(super) const FUNC_NON_PORTABLE_CLUSTER_SIZE_ALLOWED: i32 = 14;
/// Values of it: the driver's choice, and as much as can be shared memory.
pub(super) const CARVEOUT_DEFAULT: i32 = -1;
pub(super) const CARVEOUT_MAX_SHARED: i32 = 100;

/// `CUjit_option`.
pub(super) const JIT_ERROR_LOG_BUFFER: i32 = 5;
pub(super) const JIT_ERROR_LOG_BUFFER_SIZE_BYTES: i32 = 6;
pub(super) const JIT_OPTIMIZATION_LEVEL: i32 = 7;

pub(super) const HOST_ALLOC_PORTABLE: c_uint = 1;
pub(super) const HOST_REGISTER_PORTABLE: c_uint = 1;
pub(super) const HOST_REGISTER_DEVICEMAP: c_uint = 2;
pub(super) const HOST_REGISTER_READ_ONLY: c_uint = 8;
pub(super) const MEM_ATTACH_GLOBAL: c_uint = 1;
pub(super) const MEMPOOL_ATTR_RELEASE_THRESHOLD: i32 = 4;
/// Threads waiting for an event sleep.
pub(super) const EVENT_BLOCKING_SYNC: c_uint = 1;
/// Other threads' calls do not disturb a capture.
pub(super) const CAPTURE_MODE_THREAD_LOCAL: i32 = 1;
pub(super) const CAPTURE_STATUS_NONE: i32 = 0;

/// `extra` of a launch: the arguments as one buffer.
pub(super) const LAUNCH_PARAM_END: Handle = std::ptr::null_mut();
pub(super) const LAUNCH_PARAM_BUFFER_POINTER: Handle = std::ptr::without_provenance_mut(1);
pub(super) const LAUNCH_PARAM_BUFFER_SIZE: Handle = std::ptr::without_provenance_mut(2);

/// `CUlaunchAttributeID`.
pub(super) const LAUNCH_ATTRIBUTE_COOPERATIVE: c_uint = 2;
pub(super) const LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION: c_uint = 4;
pub(super) const LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION: c_uint = 6;

/// `CUlaunchAttribute`: the value is a union of 64 bytes.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct LaunchAttribute {
    pub(super) id: c_uint,
    pub(super) pad: [u8; 4],
    pub(super) value: [c_uint; 16],
}

/// `CUlaunchConfig`.
#[repr(C)]
pub(super) struct LaunchConfig {
    pub(super) grid: [c_uint; 3],
    pub(super) cta: [c_uint; 3],
    pub(super) smem_bytes: c_uint,
    pub(super) stream: Handle,
    pub(super) attributes: *const LaunchAttribute,
    pub(super) n_attributes: c_uint,
}

const _: () = assert!(size_of::<LaunchAttribute>() == 72 && size_of::<LaunchConfig>() == 56);

// Defined in symbols.rs.
unsafe extern "C" {
    pub(super) fn cuInit(flags: c_uint) -> u32;
    pub(super) fn cuDriverGetVersion(version: *mut c_int) -> u32;
    pub(super) fn cuGetErrorName(error: u32, text: *mut *const c_char) -> u32;
    pub(super) fn cuGetErrorString(error: u32, text: *mut *const c_char) -> u32;

    pub(super) fn cuDeviceGetCount(count: *mut c_int) -> u32;
    pub(super) fn cuDeviceGetPCIBusId(text: *mut c_char, bytes: c_int, device: c_int) -> u32;
    pub(super) fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, device: c_int) -> u32;
    pub(super) fn cuDeviceCanAccessPeer(can: *mut c_int, device: c_int, peer: c_int) -> u32;
    pub(super) fn cuDeviceGetDefaultMemPool(pool: *mut Handle, device: c_int) -> u32;
    pub(super) fn cuMemPoolSetAttribute(pool: Handle, attribute: c_int, value: *mut c_void) -> u32;
    pub(super) fn cuCtxSetCurrent(context: Handle) -> u32;
    pub(super) fn cuCtxEnablePeerAccess(peer: Handle, flags: c_uint) -> u32;

    pub(super) fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> u32;
    pub(super) fn cuMemAlloc_v2(at: *mut u64, bytes: usize) -> u32;
    pub(super) fn cuMemFree_v2(at: u64) -> u32;
    pub(super) fn cuMemHostAlloc(at: *mut *mut c_void, bytes: usize, flags: c_uint) -> u32;
    pub(super) fn cuMemFreeHost(at: *mut c_void) -> u32;
    pub(super) fn cuMemAllocManaged(at: *mut u64, bytes: usize, flags: c_uint) -> u32;
    pub(super) fn cuMemHostRegister_v2(at: *mut c_void, bytes: usize, flags: c_uint) -> u32;
    pub(super) fn cuMemHostUnregister(at: *mut c_void) -> u32;
    pub(super) fn cuMemHostGetDevicePointer_v2(device: *mut u64, host: *mut c_void, flags: c_uint) -> u32;
    pub(super) fn cuMemAllocAsync(at: *mut u64, bytes: usize, stream: Handle) -> u32;
    pub(super) fn cuMemFreeAsync(at: u64, stream: Handle) -> u32;
    pub(super) fn cuMemcpyAsync(to: u64, from: u64, bytes: usize, stream: Handle) -> u32;
    pub(super) fn cuMemcpyHtoDAsync_v2(to: u64, from: *const c_void, bytes: usize, stream: Handle) -> u32;
    pub(super) fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: u64, bytes: usize, stream: Handle) -> u32;
    pub(super) fn cuMemsetD8Async(at: u64, byte: u8, bytes: usize, stream: Handle) -> u32;

    pub(super) fn cuModuleLoadDataEx(
        module: *mut Handle,
        image: *const c_void,
        n_options: c_uint,
        options: *mut c_int,
        values: *mut *mut c_void,
    ) -> u32;
    pub(super) fn cuModuleUnload(module: Handle) -> u32;
    pub(super) fn cuModuleGetFunction(function: *mut Handle, module: Handle, name: *const c_char) -> u32;
    pub(super) fn cuFuncGetAttribute(value: *mut c_int, attribute: c_int, function: Handle) -> u32;
    pub(super) fn cuFuncGetParamInfo(
        function: Handle,
        index: usize,
        offset: *mut usize,
        size: *mut usize,
    ) -> u32;
    pub(super) fn cuFuncSetAttribute(function: Handle, attribute: c_int, value: c_int) -> u32;
    pub(super) fn cuLaunchKernel(
        function: Handle,
        grid_x: c_uint,
        grid_y: c_uint,
        grid_z: c_uint,
        cta_x: c_uint,
        cta_y: c_uint,
        cta_z: c_uint,
        smem_bytes: c_uint,
        stream: Handle,
        params: *mut *mut c_void,
        extra: *mut *mut c_void,
    ) -> u32;
    pub(super) fn cuLaunchKernelEx(
        config: *const LaunchConfig,
        function: Handle,
        params: *mut *mut c_void,
        extra: *mut *mut c_void,
    ) -> u32;
    pub(super) fn cuOccupancyMaxActiveBlocksPerMultiprocessor(
        ctas: *mut c_int,
        function: Handle,
        cta: c_int,
        smem_bytes: usize,
    ) -> u32;

    pub(super) fn cuStreamQuery(stream: Handle) -> u32;
    pub(super) fn cuStreamSynchronize(stream: Handle) -> u32;
    pub(super) fn cuStreamWaitEvent(stream: Handle, event: Handle, flags: c_uint) -> u32;
    pub(super) fn cuStreamIsCapturing(stream: Handle, status: *mut c_int) -> u32;
    pub(super) fn cuStreamBeginCapture_v2(stream: Handle, mode: c_int) -> u32;
    pub(super) fn cuStreamEndCapture(stream: Handle, graph: *mut Handle) -> u32;
    pub(super) fn cuGraphInstantiateWithFlags(exec: *mut Handle, graph: Handle, flags: u64) -> u32;
    pub(super) fn cuGraphLaunch(exec: Handle, stream: Handle) -> u32;
    pub(super) fn cuGraphExecDestroy(exec: Handle) -> u32;
    pub(super) fn cuGraphDestroy(graph: Handle) -> u32;

    pub(super) fn cuEventCreate(event: *mut Handle, flags: c_uint) -> u32;
    pub(super) fn cuEventDestroy_v2(event: Handle) -> u32;
    pub(super) fn cuEventRecord(event: Handle, stream: Handle) -> u32;
    pub(super) fn cuEventQuery(event: Handle) -> u32;
    pub(super) fn cuEventSynchronize(event: Handle) -> u32;
    pub(super) fn cuEventElapsedTime(ms: *mut f32, from: Handle, to: Handle) -> u32;
}
