//! Reading one physical GPU: itself, or the MIG devices it is sliced into.
//!
//! Every value is asked for on its own, so that one refusal costs one value. Handles are taken
//! anew for each reading; nothing here outlives the call.

use nvml_wrapper::enum_wrappers::device::TemperatureSensor;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device, Nvml};

use super::board::forget_measurements;
use super::failure::{self, Failure};
use super::host::Host;
use super::links;
use super::memory::{self, Memory};
use super::processes::{self, ProcessCalls};
use super::raw;
use super::{Gpu, GpuHealth};

const UNIDENTIFIED: &str = "unidentified-";
/// No board draws this much: a reading above is garbage returned with success.
const IMPLAUSIBLE_MILLIWATTS: u32 = 5_000_000;
/// No die is this hot.
const IMPLAUSIBLE_CELSIUS: u32 = 200;

/// What all readings of one NVML session share.
pub(super) struct Reader<'nvml> {
    pub(super) nvml: &'nvml Nvml,
    pub(super) host: &'nvml Host,
    pub(super) process_calls: ProcessCalls,
}

/// What is known of a GPU from before, for when it does not tell.
#[derive(Clone, Debug, Default)]
pub(super) struct Identity {
    pub(super) uuid: Option<String>,
    pub(super) pci_bus_id: Option<String>,
}

impl Reader<'_> {
    /// The GPU at `index`: one entry, or one for each of its MIG devices. Never none.
    pub(super) fn read(&self, index: u32, known: &Identity) -> Vec<Gpu> {
        let device = match self.handle(index, known) {
            Ok(device) => device,
            Err(failure) => return vec![lost(index, known, &failure)],
        };
        let mut asking = Asking::default();
        let gpu = self.identify(&device, index, known, &mut asking);
        if let Some(failure) = asking.lost {
            return vec![Gpu {
                health: GpuHealth::Lost(failure.losing()),
                ..gpu
            }];
        }
        if is_unidentified(&gpu.uuid) {
            let mut gpu = self.measure(&device, gpu);
            gpu.health = GpuHealth::Lost(
                "the driver does not tell its UUID, so no server can be started on it".to_owned(),
            );
            return vec![gpu];
        }
        let sliced = device.mig_mode().is_ok_and(|mode| mode.current == 1);
        if sliced {
            self.read_slices(&device, &gpu)
        } else {
            vec![self.measure(&device, gpu)]
        }
    }

    /// A handle by index; by UUID where that fails for a GPU that was seen before.
    fn handle(&self, index: u32, known: &Identity) -> Result<Device<'_>, Failure> {
        let by_index = checked_handle(self.nvml.device_by_index(index));
        match (&by_index, &known.uuid) {
            (Err(_), Some(uuid)) => {
                checked_handle(self.nvml.device_by_uuid(uuid.as_str())).or(by_index)
            }
            _ => by_index,
        }
    }

    fn identify(
        &self,
        device: &Device<'_>,
        index: u32,
        known: &Identity,
        asking: &mut Asking,
    ) -> Gpu {
        let uuid = asking.ask(device.uuid()).or_else(|| known.uuid.clone());
        let pci = asking.ask(device.pci_info()).map(|pci| pci.bus_id);
        Gpu {
            index,
            uuid: uuid.unwrap_or_else(|| unidentified(index)),
            pci_bus_id: pci.or_else(|| known.pci_bus_id.clone()),
            name: asking.ask(device.name()),
            compute_capability: asking
                .ask(device.cuda_compute_capability())
                .and_then(|version| {
                    Some((
                        u32::try_from(version.major).ok()?,
                        u32::try_from(version.minor).ok()?,
                    ))
                }),
            temperature: self.temperature(device, asking),
            nvlink_peers: links::read(device),
            ..Gpu::default()
        }
    }

    /// Fills in what changes from moment to moment.
    fn measure(&self, device: &Device<'_>, mut gpu: Gpu) -> Gpu {
        let mut asking = Asking::default();
        let memory = memory::read(self.nvml, device, self.host);
        if let Err(failure) = &memory {
            asking.note(failure);
        }
        gpu.utilization = asking
            .ask(device.utilization_rates())
            .map(|rates| rates.gpu)
            .filter(|percent| *percent <= 100);
        gpu.power_watts = asking
            .ask(device.power_usage())
            .filter(|milliwatts| *milliwatts < IMPLAUSIBLE_MILLIWATTS)
            .map(|milliwatts| f64::from(milliwatts) / 1000.0);
        gpu.processes = if asking.lost.is_none() {
            processes::read(device, self.process_calls)
        } else {
            None
        };
        let throttled = asking.ask(device.current_throttle_reasons());
        if let Some(failure) = asking.lost {
            forget_measurements(&mut gpu);
            gpu.health = GpuHealth::Lost(failure.losing());
            return gpu;
        }
        self.add_memory(&mut gpu, memory);
        if gpu.health == GpuHealth::Ok
            && let Some(reason) = throttled.and_then(throttling)
        {
            gpu.health = GpuHealth::Degraded(reason);
        }
        gpu
    }

    fn add_memory(&self, gpu: &mut Gpu, memory: Result<Memory, Failure>) {
        let told = match memory {
            Ok(memory) => Some(memory),
            Err(failure) if failure.is(&[failure::NOT_SUPPORTED]) => {
                memory::of_the_system(self.host, gpu)
            }
            Err(failure) => {
                gpu.health = GpuHealth::Degraded(format!(
                    "its memory cannot be read ({}), so nothing can be placed on it",
                    failure.cause()
                ));
                return;
            }
        };
        match told {
            Some(memory) => memory.fill(gpu),
            None => {
                gpu.health = GpuHealth::Degraded(
                    "the driver does not tell its memory (NVML error 3, NOT_SUPPORTED), \
                     so nothing can be placed on it"
                        .to_owned(),
                );
            }
        }
    }

    fn temperature(&self, device: &Device<'_>, asking: &mut Asking) -> Option<u32> {
        let told = match device
            .temperature(TemperatureSensor::Gpu)
            .map_err(Failure::from)
        {
            Err(failure) if failure.is(&[failure::FUNCTION_NOT_FOUND, failure::NOT_SUPPORTED]) => {
                raw::temperature_v(self.nvml, device)
            }
            told => told,
        };
        asking
            .answer(told)
            .filter(|celsius| *celsius < IMPLAUSIBLE_CELSIUS)
    }

    /// The MIG devices of a physical GPU. `mig_device_count` is the most there can be, with holes.
    fn read_slices(&self, device: &Device<'_>, physical: &Gpu) -> Vec<Gpu> {
        let most = device.mig_device_count().unwrap_or(0);
        let mut slices = Vec::new();
        for position in 0..most {
            let Ok(slice) = checked_handle(device.mig_device_by_index(position)) else {
                continue;
            };
            let mut asking = Asking::default();
            let Some(uuid) = asking.ask(slice.uuid()) else {
                continue;
            };
            let gpu = Gpu {
                index: physical.index,
                uuid,
                name: asking.ask(slice.name()).or_else(|| physical.name.clone()),
                mig: true,
                parent_uuid: Some(physical.uuid.clone()),
                pci_bus_id: physical.pci_bus_id.clone(),
                compute_capability: physical.compute_capability,
                temperature: physical.temperature,
                ..Gpu::default()
            };
            slices.push(self.measure(&slice, gpu));
        }
        if slices.is_empty() {
            slices.push(Gpu {
                health: GpuHealth::Degraded(
                    "MIG mode is on but there are no MIG devices: make some (nvidia-smi mig -cgi … -C) \
                     or switch MIG off"
                        .to_owned(),
                ),
                ..physical.clone()
            });
        }
        slices
    }
}

/// Collects whether any answer said that the GPU itself is gone.
#[derive(Default)]
struct Asking {
    lost: Option<Failure>,
}

impl Asking {
    fn ask<T>(&mut self, answer: Result<T, NvmlError>) -> Option<T> {
        self.answer(answer.map_err(Failure::from))
    }

    fn answer<T>(&mut self, answer: Result<T, Failure>) -> Option<T> {
        answer.inspect_err(|failure| self.note(failure)).ok()
    }

    fn note(&mut self, failure: &Failure) {
        if failure.is(&[failure::GPU_IS_LOST, failure::RESET_REQUIRED]) && self.lost.is_none() {
            self.lost = Some(failure.clone());
        }
    }
}

fn checked_handle(handle: Result<Device<'_>, NvmlError>) -> Result<Device<'_>, Failure> {
    let device = handle.map_err(Failure::from)?;
    if raw::is_null(&device) {
        return Err(Failure::found(failure::GPU_IS_LOST, "a NULL handle"));
    }
    Ok(device)
}

fn throttling(reasons: nvml_wrapper::bitmasks::device::ThrottleReasons) -> Option<String> {
    use nvml_wrapper::bitmasks::device::ThrottleReasons as Why;
    let words = if reasons.intersects(Why::HW_THERMAL_SLOWDOWN | Why::SW_THERMAL_SLOWDOWN) {
        "it is too hot and has slowed itself down"
    } else if reasons.intersects(Why::HW_POWER_BRAKE_SLOWDOWN) {
        "its power supply made it slow down"
    } else {
        return None;
    };
    Some(words.to_owned())
}

/// The UUID of a GPU that never told one. It matches no real UUID.
pub(super) fn unidentified(index: u32) -> String {
    format!("{UNIDENTIFIED}{index}")
}

pub(super) fn is_unidentified(uuid: &str) -> bool {
    uuid.starts_with(UNIDENTIFIED)
}

/// A GPU that cannot be used, under the name it was known by.
fn lost(index: u32, known: &Identity, failure: &Failure) -> Gpu {
    Gpu {
        index,
        uuid: known.uuid.clone().unwrap_or_else(|| unidentified(index)),
        pci_bus_id: known.pci_bus_id.clone(),
        health: GpuHealth::Lost(failure.losing()),
        ..Gpu::default()
    }
}
