//! A device's memory: version 2 of the call, version 1 where that is missing, the system's where
//! the two are one.

use nvml_wrapper::{Device, Nvml};

use super::Gpu;
use super::failure::{self, Failure};
use super::host::Host;
use super::raw;

/// Product names of boards whose GPU has no memory of its own. "Not supported" alone is no proof:
/// a discrete GPU that may not tell its memory must not be promised the system's.
const UNIFIED_NAMES: [&str; 6] = ["GB10", "Thor", "Orin", "Xavier", "Tegra", "Jetson"];

/// Sizes in bytes, as told.
pub(super) struct Memory {
    total: u64,
    free: u64,
    /// `None` for unified memory, where it is the sum of the processes'.
    used: Option<u64>,
    reserved: Option<u64>,
    unified: bool,
}

/// `nvmlDeviceGetMemoryInfo_v2`, or `nvmlDeviceGetMemoryInfo`. A total of 0 is "not supported".
pub(super) fn read(nvml: &Nvml, device: &Device<'_>, host: &Host) -> Result<Memory, Failure> {
    let mut memory = match device.memory_info().map_err(Failure::from) {
        Ok(memory) => Memory {
            total: memory.total,
            free: memory.free,
            used: Some(memory.used),
            reserved: Some(memory.reserved),
            unified: false,
        },
        // Drivers before 510 lack the symbol or the struct's version; WSL2 answers "unknown".
        Err(failure)
            if failure.is(&[
                failure::FUNCTION_NOT_FOUND,
                failure::ARGUMENT_VERSION_MISMATCH,
                failure::INVALID_ARGUMENT,
                failure::UNKNOWN,
            ]) =>
        {
            let memory = raw::memory_v1(nvml, device)?;
            Memory {
                total: memory.total,
                free: memory.free,
                used: Some(memory.used),
                reserved: None,
                unified: false,
            }
        }
        Err(failure) => return Err(failure),
    };
    if memory.total == 0 {
        return Err(Failure::found(failure::NOT_SUPPORTED, "a total of 0 bytes"));
    }
    // GH200, GB200: the operating system manages the memory and keeps pages that nobody needs any more,
    // so NVML's `free` is too low (`nvmlDeviceGetNumaNodeId` answers only on such boards).
    if let Ok(node) = device.numa_node_id()
        && let Some(available) = host.node_available_bytes(node, memory.total)
    {
        let reserved = memory.reserved.unwrap_or(0);
        let most = memory.total.saturating_sub(reserved);
        memory.free = memory.free.max(available.min(most));
        memory.used = memory
            .used
            .map(|used| used.min(most.saturating_sub(memory.free)));
    }
    Ok(memory)
}

/// The system's memory, for a GPU that is known to share it.
pub(super) fn of_the_system(host: &Host, gpu: &Gpu) -> Option<Memory> {
    // Whole words: a GB100 is no GB10.
    let named = gpu.name.as_ref().is_some_and(|name| {
        name.split(|letter: char| !letter.is_alphanumeric())
            .any(|word| UNIFIED_NAMES.contains(&word))
    });
    if !named && !host.is_tegra() {
        return None;
    }
    let system = host.memory()?;
    Some(Memory {
        total: system.total_bytes,
        free: system.available_bytes,
        used: None,
        reserved: None,
        unified: true,
    })
}

impl Memory {
    /// Puts the sizes into the GPU; one that cannot be (an underflow, a share cut out of the whole)
    /// is unknown.
    pub(super) fn fill(self, gpu: &mut Gpu) {
        let plausible = |size: &u64| *size <= self.total;
        gpu.unified = self.unified;
        gpu.total_bytes = Some(self.total);
        gpu.free_bytes = Some(self.free).filter(plausible);
        gpu.used_bytes = self.used.filter(plausible);
        gpu.reserved_bytes = self.reserved.filter(plausible);
        if let Some(processes) = &mut gpu.processes {
            for process in processes.iter_mut() {
                process.used_bytes = process.used_bytes.filter(plausible);
            }
            if self.unified {
                gpu.used_bytes = processes
                    .iter()
                    .try_fold(0_u64, |sum, process| sum.checked_add(process.used_bytes?));
            }
        }
    }
}
