//! What a projector and a draft model add to an estimate.

use super::{DeviceMemory, EstimateError, EstimateOptions, MemoryEstimate, estimate};
use crate::gguf::Header;
use crate::model::weights::{HOST_ALIGNMENT, align, cuda_bytes};
use crate::model::{Footprint, ModelFacts};

/// What an estimate needs to know of a projector (`--mmproj`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProjectorFacts {
    weights: Footprint,
}

impl ProjectorFacts {
    /// Sums the tensors of a projector.
    ///
    /// # Errors
    /// [`EstimateError::Unsupported`] where the header is no projector's.
    pub fn from_header(header: &Header) -> Result<Self, EstimateError> {
        let architecture = header.architecture();
        if architecture != Some("clip") {
            return Err(EstimateError::Unsupported {
                architecture: architecture.map(str::to_owned),
                reason: "it is no projector".to_owned(),
            });
        }
        let mut weights = Footprint::default();
        for tensor in &header.tensors {
            let padded = align(tensor.bytes, HOST_ALIGNMENT);
            weights.add(Footprint {
                generic: padded,
                cuda: cuda_bytes(tensor.ggml_type, tensor.row_elements(), tensor.bytes),
                host: padded,
                repacked: 0,
            });
        }
        Ok(Self { weights })
    }
}

/// What is loaded beside the model.
#[derive(Clone, Copy, Debug, Default)]
pub struct Companions<'a> {
    /// `--mmproj`.
    pub projector: Option<&'a ProjectorFacts>,
    /// `-md`.
    pub draft: Option<&'a ModelFacts>,
}

/// Estimates a model together with its projector and draft model.
///
/// The projector goes to the first device (`clip_ctx`, tools/mtmd/clip.cpp); the draft
/// gets the model's context, slots and split, and all its layers on devices.
///
/// # Errors
/// As [`estimate`].
pub fn estimate_with(
    facts: &ModelFacts,
    options: &EstimateOptions,
    companions: Companions<'_>,
) -> Result<MemoryEstimate, EstimateError> {
    let mut sum = estimate(facts, options)?;
    if let Some(projector) = companions.projector {
        let bytes = super::weights::device_bytes(projector.weights, options.backend);
        if let Some(device) = sum.devices.first_mut() {
            device.weights_bytes = device.weights_bytes.saturating_add(bytes);
        } else {
            let host = projector.weights.host;
            sum.host.weights_bytes = sum.host.weights_bytes.saturating_add(host);
        }
    }
    if let Some(draft) = companions.draft {
        let draft_options = EstimateOptions {
            context_length: sum.context_length,
            gpu_layers: None,
            cpu_moe_layers: super::CpuMoe::None,
            ..options.clone()
        };
        let added = estimate(draft, &draft_options)?;
        for (device, more) in sum.devices.iter_mut().zip(&added.devices) {
            add_model(device, more);
        }
        let repacked = added.host.overhead_bytes;
        add_model(&mut sum.host, &added.host);
        sum.host.overhead_bytes = sum.host.overhead_bytes.saturating_add(repacked);
    }
    Ok(sum)
}

/// A second model in the same process: buffers add up, the driver's overhead does not.
fn add_model(device: &mut DeviceMemory, more: &DeviceMemory) {
    device.weights_bytes = device.weights_bytes.saturating_add(more.weights_bytes);
    device.context_bytes = device.context_bytes.saturating_add(more.context_bytes);
    device.compute_bytes = device.compute_bytes.saturating_add(more.compute_bytes);
}
