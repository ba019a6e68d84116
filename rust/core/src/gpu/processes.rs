//! Who holds memory on a device.

use nvml_wrapper::Device;
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::struct_wrappers::device::ProcessInfo;
use std::collections::BTreeMap;

use super::GpuProcess;
use super::failure::{self, Failure};

/// Linux knows no higher process id; Jetson boards have been seen to tell garbage.
#[cfg(target_os = "linux")]
const HIGHEST_PID: u32 = 1 << 22;
#[cfg(not(target_os = "linux"))]
const HIGHEST_PID: u32 = u32::MAX;

/// How often a list is read again that grew while it was read.
const ATTEMPTS: usize = 4;

/// Which version of the process calls the driver gets right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ProcessCalls {
    /// Version 3 (driver 510 and later), and version 2 where that is missing.
    Newest,
    /// Version 2 only: drivers from 535.43 to before 535.86 write elements of another size from
    /// version 3, which scrambles the list and, when it is long, overruns the buffer.
    SecondVersion,
}

impl ProcessCalls {
    pub(super) fn for_driver(version: Option<&str>) -> Self {
        let mut parts = version
            .unwrap_or_default()
            .split('.')
            .map(str::parse::<u32>);
        match (parts.next(), parts.next()) {
            (Some(Ok(535)), Some(Ok(43..86))) => Self::SecondVersion,
            _ => Self::Newest,
        }
    }
}

type Call = fn(&Device<'_>) -> Result<Vec<ProcessInfo>, NvmlError>;

const COMPUTE: [Call; 2] = [
    |device| device.running_compute_processes(),
    |device| device.running_compute_processes_v2(),
];
const GRAPHICS: [Call; 2] = [
    |device| device.running_graphics_processes(),
    |device| device.running_graphics_processes_v2(),
];

/// The compute and the graphics processes, each once, by pid; `None` if the driver tells neither.
pub(super) fn read(device: &Device<'_>, calls: ProcessCalls) -> Option<Vec<GpuProcess>> {
    let lists = [list(device, COMPUTE, calls), list(device, GRAPHICS, calls)];
    if lists.iter().all(Result::is_err) {
        return None;
    }
    let mut by_pid: BTreeMap<u32, Option<u64>> = BTreeMap::new();
    for process in lists.into_iter().flatten().flatten() {
        if process.pid == 0 || process.pid > HIGHEST_PID {
            continue;
        }
        let used = match process.used_gpu_memory {
            UsedGpuMemory::Used(bytes) => Some(bytes),
            UsedGpuMemory::Unavailable => None,
        };
        let known = by_pid.entry(process.pid).or_default();
        *known = (*known).max(used);
    }
    let processes = by_pid
        .into_iter()
        .map(|(pid, used_bytes)| GpuProcess { pid, used_bytes });
    Some(processes.collect())
}

fn list(
    device: &Device<'_>,
    [newest, second]: [Call; 2],
    calls: ProcessCalls,
) -> Result<Vec<ProcessInfo>, Failure> {
    if calls == ProcessCalls::SecondVersion {
        return patiently(device, second);
    }
    match patiently(device, newest) {
        Err(failure) if failure.is(&[failure::FUNCTION_NOT_FOUND]) => patiently(device, second),
        told => told,
    }
}

/// The list may grow between asking its length and reading it.
fn patiently(device: &Device<'_>, call: Call) -> Result<Vec<ProcessInfo>, Failure> {
    let mut told = call(device).map_err(Failure::from);
    for _ in 1..ATTEMPTS {
        match &told {
            Err(failure) if failure.is(&[failure::INSUFFICIENT_SIZE]) => {
                told = call(device).map_err(Failure::from);
            }
            _ => break,
        }
    }
    told
}
