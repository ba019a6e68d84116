//! What GPUs there are and how they do, asked from NVML.
//!
//! The values ([`Gpu`], [`GpuSnapshot`]) know nothing of NVML and can be built by hand.
//! Unknown is `None`: never 0, never a guess. A GPU is known by its UUID; its index is for display.

mod failure;
mod host;
mod library;
mod memory;
mod processes;
mod raw;
mod reading;
mod snapshot;

pub use host::Host;
pub use library::{LIBRARY_VARIABLE, Library};
pub use snapshot::{Gpu, GpuHealth, GpuProcess, GpuSnapshot};

/// Reads all GPUs now.
///
/// Without a driver, or with a broken one, the snapshot has no GPUs and says why in `error`.
pub fn snapshot_gpus() -> GpuSnapshot {
    let host = Host::default();
    if host.all_gpus_asleep() {
        return GpuSnapshot {
            error: Some(
                "the NVIDIA GPU is asleep, and asking it anything would wake it".to_owned(),
            ),
            ..GpuSnapshot::default()
        };
    }
    let nvml = match Library::from_environment().start(&host) {
        Ok(nvml) => nvml,
        Err(error) => {
            return GpuSnapshot {
                error: Some(error),
                ..GpuSnapshot::default()
            };
        }
    };
    let driver_version = nvml.sys_driver_version().ok();
    let reader = reading::Reader {
        nvml: &nvml,
        host: &host,
        process_calls: processes::ProcessCalls::for_driver(driver_version.as_deref()),
    };
    let known = reading::Identity::default();
    let count = nvml.device_count().unwrap_or(0);
    GpuSnapshot {
        gpus: (0..count)
            .flat_map(|index| reader.read(index, &known))
            .collect(),
        driver_version,
        error: None,
    }
}
