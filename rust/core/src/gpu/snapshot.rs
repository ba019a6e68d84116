//! The values: one GPU as it was read, and all of them together.

use std::fmt;

/// A process that holds memory on a GPU, or runs there without telling how much it holds.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct GpuProcess {
    /// The process id as the driver knows it: that of the host, not of a container.
    pub pid: u32,
    /// Bytes of GPU memory; `None` where the driver does not tell (WDDM, WSL2, some MIG devices).
    pub used_bytes: Option<u64>,
}

/// Whether a GPU can be given work.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub enum GpuHealth {
    /// It answers, and everything that placement needs is known.
    #[default]
    Ok,
    /// It answers and may be used, but something is wrong with it; the text says what, in words.
    Degraded(String),
    /// It must not be given work: fallen off the bus, in need of a reset, not permitted, or not
    /// answering in time; the text says what, in words.
    Lost(String),
}

impl GpuHealth {
    /// The word of the health contract: `ok`, `degraded` or `lost`.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Degraded(_) => "degraded",
            Self::Lost(_) => "lost",
        }
    }

    /// What is wrong, in words; `None` when nothing is.
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::Ok => None,
            Self::Degraded(reason) | Self::Lost(reason) => Some(reason),
        }
    }
}

impl fmt::Display for GpuHealth {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.reason() {
            None => formatter.write_str(self.word()),
            Some(reason) => write!(formatter, "{}: {reason}", self.word()),
        }
    }
}

/// One GPU, or one MIG device, as it was read. Sizes are bytes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Gpu {
    /// NVML's index (PCI order, not CUDA's). MIG devices carry the index of their physical GPU.
    pub index: u32,
    /// The identity: `GPU-…`, or `MIG-…` for a MIG device. Safe to hand to `CUDA_VISIBLE_DEVICES`.
    pub uuid: String,
    /// The product name.
    pub name: Option<String>,
    /// All memory of the device (`nvmlDeviceGetMemoryInfo_v2`).
    pub total_bytes: Option<u64>,
    /// Memory that can be allocated now: the number to decide by.
    pub free_bytes: Option<u64>,
    /// Memory allocated by processes, without what the driver reserves for itself (where the
    /// driver separates the two; before driver 510 this includes the reserved part).
    pub used_bytes: Option<u64>,
    /// Memory the driver keeps for itself; `None` where the driver does not separate it.
    pub reserved_bytes: Option<u64>,
    /// Share of time in which a kernel ran, 0–100 %.
    pub utilization: Option<u32>,
    /// Temperature of the die in °C.
    pub temperature: Option<u32>,
    /// Power draw in watts.
    pub power_watts: Option<f64>,
    /// CUDA compute capability, as (major, minor).
    pub compute_capability: Option<(u32, u32)>,
    /// Processes on the device, ordered by pid; `None` where the driver does not tell.
    pub processes: Option<Vec<GpuProcess>>,
    /// Whether this is a MIG device, a slice of a physical GPU.
    pub mig: bool,
    /// The UUID of the physical GPU that a MIG device is a slice of.
    pub parent_uuid: Option<String>,
    /// Whether its memory is the system's own: then it must not be counted beside the system's.
    pub unified: bool,
    /// Whether it can be given work.
    pub health: GpuHealth,
    /// The PCI address, as `00000000:01:00.0`.
    pub pci_bus_id: Option<String>,
    /// The PCI addresses that its `NVLink`s lead to: other GPUs, or a switch that joins several.
    pub nvlink_peers: Vec<String>,
}

impl Gpu {
    /// Whether the GPU can be given a model: it answers, and its free memory is known.
    pub fn accepts_models(&self) -> bool {
        !self.is_lost() && self.free_bytes.is_some()
    }

    /// Whether the GPU must not be given work, whatever is known of it.
    pub fn is_lost(&self) -> bool {
        matches!(self.health, GpuHealth::Lost(_))
    }
}

/// All GPUs at one time, or the reason why there are none.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GpuSnapshot {
    /// The GPUs, by index; MIG devices stand in place of the GPU they are slices of.
    pub gpus: Vec<Gpu>,
    /// The version of the NVIDIA driver.
    pub driver_version: Option<String>,
    /// Why the GPUs could not be read, in words with the next step; `None` when they could.
    /// Without a driver this is the normal result: no GPUs, and this reason.
    pub error: Option<String>,
}
