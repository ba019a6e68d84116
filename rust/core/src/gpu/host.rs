//! What the operating system knows about GPUs and memory, where NVML does not tell.

use std::fs;
use std::path::{Path, PathBuf};

/// The system's files, below a root that a test can move.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    root: PathBuf,
}

impl Default for Host {
    fn default() -> Self {
        Self::at("/")
    }
}

/// The system's memory in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SystemMemory {
    pub(super) total_bytes: u64,
    /// What can be had without swapping: page cache counts, unlike in `MemFree`.
    pub(super) available_bytes: u64,
}

impl Host {
    /// The system whose `/proc` and `/sys` lie below `root`.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    fn read(&self, path: &str) -> Option<String> {
        let bytes = fs::read(self.root.join(path)).ok()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The version of the NVIDIA kernel module that is running.
    pub(super) fn kernel_module(&self) -> Option<String> {
        self.read("proc/driver/nvidia/version")?
            .split_whitespace()
            .find(|word| {
                word.contains('.') && word.split('.').all(|part| part.parse::<u32>().is_ok())
            })
            .map(str::to_owned)
    }

    /// Whether this is an NVIDIA system on a chip, whose GPU shares the system's memory.
    pub(super) fn is_tegra(&self) -> bool {
        self.read("proc/device-tree/compatible")
            .is_some_and(|names| names.contains("nvidia,tegra"))
    }

    /// `MemTotal` and `MemAvailable`, no more than the control group allows.
    pub(super) fn memory(&self) -> Option<SystemMemory> {
        let text = self.read("proc/meminfo")?;
        let field = |name| meminfo_field(&text, name);
        let mut memory = SystemMemory {
            total_bytes: field("MemTotal")?,
            available_bytes: field("MemAvailable")?,
        };
        let group = |name: &str| -> Option<u64> {
            self.read(&format!("sys/fs/cgroup/{name}"))?
                .trim()
                .parse()
                .ok()
        };
        if let Some(limit) = group("memory.max") {
            let left = limit.saturating_sub(group("memory.current").unwrap_or(0));
            memory.total_bytes = memory.total_bytes.min(limit);
            memory.available_bytes = memory.available_bytes.min(left);
        }
        memory.available_bytes = memory.available_bytes.min(memory.total_bytes);
        Some(memory)
    }

    /// What can be had of a NUMA node's memory without swapping: pages that only cache files count.
    /// `None` for a node of more than `most_bytes`, which is not the GPU's own.
    pub(super) fn node_available_bytes(&self, node: u32, most_bytes: u64) -> Option<u64> {
        let text = self.read(&format!("sys/devices/system/node/node{node}/meminfo"))?;
        let field = |name| meminfo_field(&text, name);
        if field("MemTotal")? > most_bytes {
            return None;
        }
        ["MemFree", "Active(file)", "Inactive(file)"]
            .into_iter()
            .try_fold(0_u64, |sum, name| sum.checked_add(field(name)?))
    }

    /// Whether process ids here are those of the host, which are the ones the driver tells.
    ///
    /// In a container with a pid namespace of its own they are others, and a match is an accident.
    pub fn has_host_pids(&self) -> bool {
        /// The inode of the first pid namespace: `PROC_PID_INIT_INO` in Linux' `proc_ns.h`.
        const FIRST: &str = "pid:[4026531836]";
        if cfg!(not(target_os = "linux")) {
            return true;
        }
        fs::read_link(self.root.join("proc/self/ns/pid"))
            .is_ok_and(|link| link.as_os_str() == FIRST)
    }

    /// Whether the PCI device sleeps: a query would wake it and cost a laptop watts.
    pub(super) fn is_asleep(&self, pci_bus_id: &str) -> bool {
        let Some(address) = sysfs_address(pci_bus_id) else {
            return false;
        };
        self.read(&format!(
            "sys/bus/pci/devices/{address}/power/runtime_status"
        ))
        .is_some_and(|status| status.trim() == "suspended")
    }

    /// Whether there are NVIDIA display devices and all of them sleep.
    pub(super) fn all_gpus_asleep(&self) -> bool {
        let Ok(devices) = fs::read_dir(self.root.join("sys/bus/pci/devices")) else {
            return false;
        };
        let mut found = false;
        for device in devices.flatten() {
            let path = device.path();
            if !is_nvidia_display(&path) {
                continue;
            }
            found = true;
            let status = fs::read_to_string(path.join("power/runtime_status")).unwrap_or_default();
            if status.trim() != "suspended" {
                return false;
            }
        }
        found
    }
}

/// A size in bytes out of `/proc/meminfo`, or of a node's, whose lines begin with `Node 1 `.
fn meminfo_field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        words.find(|word| word.strip_suffix(':') == Some(name))?;
        words.next()?.parse::<u64>().ok()?.checked_mul(1024)
    })
}

fn is_nvidia_display(device: &Path) -> bool {
    let starts = |file: &str, prefix: &str| {
        fs::read_to_string(device.join(file)).is_ok_and(|text| text.trim().starts_with(prefix))
    };
    starts("vendor", "0x10de") && starts("class", "0x03")
}

/// NVML's `00000000:01:00.0` is `0000:01:00.0` below `/sys/bus/pci/devices`.
fn sysfs_address(pci_bus_id: &str) -> Option<String> {
    let (domain, rest) = pci_bus_id.split_once(':')?;
    let domain = u32::from_str_radix(domain, 16).ok()?;
    Some(format!("{domain:04x}:{}", rest.to_ascii_lowercase()))
}
