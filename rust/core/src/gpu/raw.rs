//! The NVML calls that nvml-wrapper does not wrap, and nothing else: the only unsafe code here.
#![expect(
    unsafe_code,
    reason = "nvml-wrapper has no wrapper for these calls of NVML's C interface"
)]

use nvml_wrapper::{Device, Nvml};
use nvml_wrapper_sys::bindings::{nvmlMemory_t, nvmlTemperature_t};

use super::failure::Failure;

/// Memory as `nvmlDeviceGetMemoryInfo` (version 1) tells it: `used` includes what is reserved.
pub(super) struct MemoryV1 {
    pub(super) total: u64,
    pub(super) free: u64,
    pub(super) used: u64,
}

/// `nvmlDeviceGetMemoryInfo`, for drivers without version 2 of it (before 510) and for WSL2.
pub(super) fn memory_v1(nvml: &Nvml, device: &Device<'_>) -> Result<MemoryV1, Failure> {
    let call = nvml
        .lib()
        .nvmlDeviceGetMemoryInfo
        .as_ref()
        .map_err(missing)?;
    let mut memory = nvmlMemory_t {
        total: 0,
        free: 0,
        used: 0,
    };
    // SAFETY: the handle belongs to the library the symbol came from, which `nvml` keeps loaded,
    // and `memory` is the struct that version 1 of the call fills.
    let code = unsafe { call(device.handle(), &raw mut memory) };
    checked(code)?;
    Ok(MemoryV1 {
        total: memory.total,
        free: memory.free,
        used: memory.used,
    })
}

/// `nvmlDeviceGetTemperatureV`, for drivers that dropped `nvmlDeviceGetTemperature`. °C.
pub(super) fn temperature_v(nvml: &Nvml, device: &Device<'_>) -> Result<u32, Failure> {
    let call = nvml
        .lib()
        .nvmlDeviceGetTemperatureV
        .as_ref()
        .map_err(missing)?;
    let size = u32::try_from(size_of::<nvmlTemperature_t>()).unwrap_or(0);
    let mut temperature = nvmlTemperature_t {
        version: size | (1 << 24), // NVML_STRUCT_VERSION(Temperature, 1)
        sensorType: 0,             // NVML_TEMPERATURE_GPU
        temperature: 0,
    };
    // SAFETY: as above; the struct carries its own size and version.
    let code = unsafe { call(device.handle(), &raw mut temperature) };
    checked(code)?;
    u32::try_from(temperature.temperature)
        .map_err(|_| Failure::found(super::failure::UNKNOWN, "a negative temperature"))
}

/// Whether NVML handed out a NULL handle: every further call with it would crash the process.
pub(super) fn is_null(device: &Device<'_>) -> bool {
    // SAFETY: the handle is compared, not used.
    unsafe { device.handle() }.is_null()
}

fn checked(code: u32) -> Result<(), Failure> {
    nvml_wrapper::error::nvml_try(code).map_err(Failure::from)
}

fn missing(error: &impl std::fmt::Display) -> Failure {
    Failure::found(super::failure::FUNCTION_NOT_FOUND, &error.to_string())
}
