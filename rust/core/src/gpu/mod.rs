//! What GPUs there are and how they do, asked from NVML.
//!
//! The values ([`Gpu`], [`GpuSnapshot`]) know nothing of NVML and can be built by hand.
//! Unknown is `None`: never 0, never a guess. A GPU is known by its UUID; its index is for display.

mod board;
mod failure;
mod host;
mod library;
mod links;
mod memory;
mod monitor;
mod pace;
mod processes;
mod raw;
mod reading;
mod sampler;
mod snapshot;

use std::sync::OnceLock;

pub use board::Reading;
pub use host::Host;
pub use library::{LIBRARY_VARIABLE, Library};
pub use monitor::{Monitor, MonitorOptions};
pub use snapshot::{Gpu, GpuHealth, GpuProcess, GpuSnapshot};

/// Reads all GPUs now, also those that sleep; waits at most 6 s for a driver that hangs.
///
/// Without a driver, or with a broken one, the snapshot has no GPUs and says why in `error`. A GPU that
/// does not answer is in it, as lost. NVML is closed again when nothing was asked for 10 s.
pub fn snapshot_gpus() -> GpuSnapshot {
    static ON_REQUEST: OnceLock<Monitor> = OnceLock::new();
    let monitor = ON_REQUEST.get_or_init(|| {
        Monitor::start(MonitorOptions {
            interval: None,
            ..MonitorOptions::default()
        })
    });
    monitor.refresh_from(&Library::from_environment()).snapshot
}
