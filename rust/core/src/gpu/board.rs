//! What is known of all GPUs, each with the time it was read: written by the monitor, read by callers.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::reading::{Identity, is_unidentified, unidentified};
use super::{Gpu, GpuHealth, GpuSnapshot};

/// A snapshot, and how old each part of it is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reading {
    /// The GPUs as last read. One that stopped answering keeps its last values and is `lost`.
    pub snapshot: GpuSnapshot,
    /// The time since each GPU was read, by UUID; a GPU that was never read is not in it.
    pub ages: BTreeMap<String, Duration>,
    /// The time since the last pass over all GPUs ended, well or not; `None` before the first.
    pub age: Option<Duration>,
}

/// One physical GPU: itself, or its MIG devices.
#[derive(Debug)]
struct Entry {
    index: u32,
    physical_uuid: String,
    gpus: Vec<Gpu>,
    read_at: Option<Instant>,
    /// Why it counts as lost although its last reading was good.
    trouble: Option<String>,
    in_this_pass: bool,
}

#[derive(Debug)]
pub(super) struct Board {
    entries: Vec<Entry>,
    driver_version: Option<String>,
    error: Option<String>,
    finished_at: Option<Instant>,
    /// Whether a GPU that is no longer listed stays, as lost.
    remembers: bool,
}

impl Board {
    pub(super) fn new(remembers: bool) -> Self {
        Self {
            entries: Vec::new(),
            driver_version: None,
            error: Some("the GPUs have not been read yet".to_owned()),
            finished_at: None,
            remembers,
        }
    }

    pub(super) fn reading(&self, now: Instant) -> Reading {
        let mut reading = Reading {
            snapshot: GpuSnapshot {
                gpus: Vec::new(),
                driver_version: self.driver_version.clone(),
                error: self.error.clone(),
            },
            ages: BTreeMap::new(),
            age: self
                .finished_at
                .map(|time| now.saturating_duration_since(time)),
        };
        for entry in &self.entries {
            for gpu in &entry.gpus {
                let mut gpu = gpu.clone();
                if let Some(trouble) = &entry.trouble {
                    gpu.health = GpuHealth::Lost(trouble.clone());
                }
                if let Some(time) = entry.read_at {
                    reading
                        .ages
                        .insert(gpu.uuid.clone(), now.saturating_duration_since(time));
                }
                reading.snapshot.gpus.push(gpu);
            }
        }
        reading
    }

    /// What a reading needs to know of the GPUs from before.
    pub(super) fn identities(&self) -> BTreeMap<u32, Identity> {
        let identity = |entry: &Entry| Identity {
            uuid: Some(entry.physical_uuid.clone()).filter(|uuid| !is_unidentified(uuid)),
            pci_bus_id: entry.gpus.first().and_then(|gpu| gpu.pci_bus_id.clone()),
        };
        let current = self.entries.iter().filter(|entry| entry.in_this_pass);
        current
            .map(|entry| (entry.index, identity(entry)))
            .collect()
    }

    /// Whether a new NVML session could bring something back, or see MIG devices that changed.
    pub(super) fn wants_a_new_session(&self) -> bool {
        self.entries.iter().any(|entry| {
            entry.trouble.is_some() || entry.gpus.iter().any(|gpu| gpu.mig || gpu.is_lost())
        })
    }

    /// Another library will be asked: what this one told says nothing of the other's GPUs.
    pub(super) fn forget(&mut self) {
        *self = Self::new(self.remembers);
    }

    /// NVML answers: a pass over the GPUs begins.
    pub(super) fn begin(&mut self, driver_version: Option<String>, skipped: &BTreeSet<u32>) {
        self.driver_version = driver_version;
        for entry in &mut self.entries {
            entry.in_this_pass = skipped.contains(&entry.index);
        }
    }

    /// A GPU was read; what it does not tell now, because it is lost, stays as it was told before.
    pub(super) fn put(&mut self, index: u32, gpus: Vec<Gpu>, now: Instant) {
        let Some(first) = gpus.first() else { return };
        let uuid = first.parent_uuid.as_ref().unwrap_or(&first.uuid).clone();
        let unknown = is_unidentified(&uuid);
        // A GPU that was found at last is no longer "unidentified" at its place, and one that no
        // longer tells its name is still the one it was.
        let known = self.entries.iter().position(|entry| {
            entry.physical_uuid == uuid
                || (entry.index == index && (unknown || is_unidentified(&entry.physical_uuid)))
        });
        let previous = known.map(|place| self.entries.remove(place));
        let (uuid, gpus) = match (previous, &first.health) {
            (Some(mut entry), GpuHealth::Lost(reason))
                if !is_unidentified(&entry.physical_uuid) =>
            {
                for gpu in &mut entry.gpus {
                    forget_measurements(gpu);
                    gpu.health = GpuHealth::Lost(reason.clone());
                    gpu.index = index;
                }
                (entry.physical_uuid, entry.gpus)
            }
            _ => (uuid, gpus),
        };
        self.insert(Entry {
            index,
            physical_uuid: uuid,
            gpus,
            read_at: Some(now),
            trouble: None,
            in_this_pass: true,
        });
    }

    fn insert(&mut self, entry: Entry) {
        let place = self
            .entries
            .partition_point(|other| other.index <= entry.index);
        self.entries.insert(place, entry);
    }

    /// The GPU that was last seen at an index: one that vanished may have had it before.
    fn at(&mut self, index: u32) -> Option<&mut Entry> {
        self.entries
            .iter_mut()
            .filter(|entry| entry.index == index)
            .max_by_key(|entry| entry.read_at)
    }

    /// A sleeping GPU is left alone and keeps its last values.
    pub(super) fn leave_asleep(&mut self, index: u32) {
        if let Some(entry) = self.at(index) {
            entry.in_this_pass = true;
        }
    }

    /// A call on this GPU does not return.
    pub(super) fn stall(&mut self, index: u32, reason: &str) {
        if let Some(entry) = self.at(index) {
            entry.trouble = Some(reason.to_owned());
            entry.in_this_pass = true;
            return;
        }
        self.insert(Entry {
            index,
            physical_uuid: unidentified(index),
            gpus: vec![Gpu {
                index,
                uuid: unidentified(index),
                ..Gpu::default()
            }],
            read_at: None,
            trouble: Some(reason.to_owned()),
            in_this_pass: true,
        });
    }

    /// All GPUs that NVML lists were read, or are known not to answer.
    pub(super) fn finish(&mut self, now: Instant) {
        self.error = None;
        self.finished_at = Some(now);
        let remembers = self.remembers;
        self.entries.retain(|entry| {
            entry.in_this_pass || (remembers && !is_unidentified(&entry.physical_uuid))
        });
        for entry in self.entries.iter_mut().filter(|entry| !entry.in_this_pass) {
            entry.gpus.iter_mut().for_each(forget_measurements);
            entry.trouble = Some(
                "the driver no longer lists this GPU: it was removed, or taken from this container"
                    .to_owned(),
            );
        }
    }

    /// NVML itself cannot be used, or does not answer.
    pub(super) fn fail(&mut self, reason: &str, now: Instant) {
        self.error = Some(reason.to_owned());
        self.driver_version = None;
        self.finished_at = Some(now);
        if !self.remembers {
            self.entries.clear();
        }
        for entry in &mut self.entries {
            entry.gpus.iter_mut().for_each(forget_measurements);
            entry.trouble = Some(reason.to_owned());
        }
    }

    /// Nothing could be asked without waking a GPU: what was known stays.
    pub(super) fn all_asleep(&mut self, now: Instant) {
        self.finished_at = Some(now);
        self.error = self.entries.is_empty().then(|| {
            "the NVIDIA GPU is asleep to save power and was not woken: ask for a reading to wake it".to_owned()
        });
    }

    /// The monitor was closed; what is said from now on is old.
    pub(super) fn close(&mut self) {
        self.error = Some("the GPU monitor is closed".to_owned());
    }
}

/// What changes from moment to moment is unknown once a GPU no longer tells it.
pub(super) fn forget_measurements(gpu: &mut Gpu) {
    gpu.free_bytes = None;
    gpu.used_bytes = None;
    gpu.utilization = None;
    gpu.temperature = None;
    gpu.power_watts = None;
    gpu.processes = None;
}
