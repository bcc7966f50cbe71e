//! The devices of this machine and what they are.

use std::ffi::{CStr, c_int};
use std::string::String;
use std::vec::Vec;

use cust::device::Device;
use gpu_kernels::driver::{DeviceInfo, DriverError};

use super::error::check;
use super::ffi::{self, attribute};
use super::{cust_error, start};

/// Every device of this machine, by number. None without a driver is [`DriverError::NoDriver`].
pub fn devices() -> Result<Vec<DeviceInfo>, DriverError> {
    start()?;
    (0..count()?).map(|index| info(find(index)?)).collect()
}

pub(super) fn count() -> Result<u32, DriverError> {
    let mut count = 0;
    // SAFETY: the place for the result is valid.
    check("count devices", unsafe { ffi::cuDeviceGetCount(&mut count) })?;
    Ok(count as u32)
}

pub(super) fn find(index: u32) -> Result<Device, DriverError> {
    Device::get_device(index).map_err(cust_error("find a device"))
}

fn device_attribute(device: Device, attribute: c_int) -> u32 {
    let mut value = 0;
    // SAFETY: the place for the result is valid.
    let code = unsafe { ffi::cuDeviceGetAttribute(&mut value, attribute, device.as_raw()) };
    // An attribute that the driver does not know is a number that it does not know.
    if code == ffi::SUCCESS { value.max(0) as u32 } else { 0 }
}

pub(super) fn info(device: Device) -> Result<DeviceInfo, DriverError> {
    let (mut pci, mut version) = ([0u8; 32], 0);
    // SAFETY: room for the text with its length, and for the number.
    unsafe {
        let code = ffi::cuDeviceGetPCIBusId(pci.as_mut_ptr().cast(), pci.len() as c_int, device.as_raw());
        check("ask for the PCI address", code)?;
        check("ask for the driver's version", ffi::cuDriverGetVersion(&mut version))?;
    }
    let pci = CStr::from_bytes_until_nul(&pci).map_or_else(|_| String::new(), |s| s.to_string_lossy().into());
    let number = |attribute| device_attribute(device, attribute);
    let sm = 10 * number(attribute::COMPUTE_CAPABILITY_MAJOR) + number(attribute::COMPUTE_CAPABILITY_MINOR);
    Ok(DeviceInfo {
        name: device.name().map_err(cust_error("ask for the name"))?,
        pci,
        sm,
        n_sm: number(attribute::MULTIPROCESSOR_COUNT),
        memory_bytes: device.total_memory().map_err(cust_error("ask for the memory"))? as u64,
        l2_bytes: number(attribute::L2_CACHE_SIZE),
        smem_per_cta_bytes: number(attribute::MAX_SHARED_MEMORY_PER_BLOCK_OPTIN),
        smem_per_sm_bytes: number(attribute::MAX_SHARED_MEMORY_PER_MULTIPROCESSOR),
        registers_per_sm: number(attribute::MAX_REGISTERS_PER_MULTIPROCESSOR),
        threads_per_sm: number(attribute::MAX_THREADS_PER_MULTIPROCESSOR),
        clock_khz: number(attribute::CLOCK_RATE),
        memory_clock_khz: number(attribute::MEMORY_CLOCK_RATE),
        memory_bus_bits: number(attribute::GLOBAL_MEMORY_BUS_WIDTH),
        driver_version: version.max(0) as u32,
    })
}

/// Lets the device's pool keep what is freed for the next allocation; whether it has pools.
pub(super) fn keep_pool(device: Device) -> Result<bool, DriverError> {
    if device_attribute(device, attribute::MEMORY_POOLS_SUPPORTED) == 0 {
        return Ok(false);
    }
    let (mut pool, mut all) = (std::ptr::null_mut(), u64::MAX);
    // SAFETY: valid places; the attribute is a 64-bit number.
    unsafe {
        check("find the memory pool", ffi::cuDeviceGetDefaultMemPool(&mut pool, device.as_raw()))?;
        let threshold = ffi::MEMPOOL_ATTR_RELEASE_THRESHOLD;
        check("keep the memory pool", ffi::cuMemPoolSetAttribute(pool, threshold, (&raw mut all).cast()))?;
    }
    Ok(true)
}
