//! Bytes of the weights, per device and on the host.
//!
//! Source: `llama_model_base::load_tensors` and `llama_model::memory_breakdown`
//! (llama-model.cpp), `llama_model_loader::create_tensor` (llama-model-loader.cpp).

use super::layout::Layout;
use super::options::{Backend, CpuMoe, EstimateOptions};
use crate::model::{Footprint, LayerWeights, ModelFacts, WeightFacts};

/// Sums of the weights.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct WeightBytes {
    pub(super) devices: Vec<u64>,
    pub(super) host: u64,
    /// Host memory that llama.cpp's own sum leaves out.
    pub(super) repacked: u64,
}

impl WeightBytes {
    fn add(&mut self, place: Option<u32>, footprint: Footprint, backend: Backend) {
        let device = place.and_then(|device| self.devices.get_mut(device as usize));
        if let Some(sum) = device {
            *sum = sum.saturating_add(device_bytes(footprint, backend));
        } else {
            self.host = self.host.saturating_add(footprint.host);
            self.repacked = self.repacked.saturating_add(footprint.repacked);
        }
    }
}

pub(super) fn device_bytes(footprint: Footprint, backend: Backend) -> u64 {
    match backend {
        Backend::Generic => footprint.generic,
        Backend::Cuda => footprint.cuda,
    }
}

/// Whether this layer keeps its experts on the CPU.
pub(super) fn experts_on_host(options: &EstimateOptions, layer: usize) -> bool {
    match options.cpu_moe_layers {
        CpuMoe::None => false,
        CpuMoe::Layers(count) => layer < count as usize,
        CpuMoe::All => true,
    }
}

pub(super) fn weight_bytes(
    facts: &ModelFacts,
    weights: &WeightFacts,
    options: &EstimateOptions,
    layout: &Layout,
) -> WeightBytes {
    let backend = options.backend;
    let mut sums = WeightBytes {
        devices: vec![0; layout.devices as usize],
        ..WeightBytes::default()
    };
    sums.add(None, weights.input, backend);
    sums.add(layout.output, weights.output, backend);
    if let Some(copy) = weights.tied_output {
        sums.add(layout.output, copy, backend);
    }
    for (layer, LayerWeights { dense, experts }) in weights.layers.iter().enumerate() {
        let place = layout.layers.get(layer).copied().flatten();
        let expert_place = if experts_on_host(options, layer) {
            None
        } else {
            place
        };
        sums.add(place, *dense, backend);
        sums.add(expert_place, *experts, backend);
    }
    for shared in &weights.shared {
        let mut holders: Vec<Option<u32>> = Vec::new();
        for (layer, place) in layout.layers.iter().enumerate() {
            let layer = u32::try_from(layer).unwrap_or(u32::MAX);
            let uses = layer < weights.shared_layers
                && !(shared.dense_layers_only && facts.hyperparameters.is_sliding(layer));
            if uses && !holders.contains(place) {
                holders.push(*place);
            }
        }
        for place in holders {
            sums.add(place, shared.footprint, backend);
        }
    }
    sums
}
