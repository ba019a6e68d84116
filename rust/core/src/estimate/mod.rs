//! How much memory a model takes, per device and on the host.
//!
//! One file a term: [`weights`], [`context`], [`compute`], [`overhead`]. All are sums
//! over facts that were derived from the header once, so that an estimate takes
//! microseconds. The rules are llama.cpp's own (commit 0c1e57098).

mod companions;
mod compute;
mod context;
mod error;
pub(crate) mod graph;
mod layout;
mod options;
mod overhead;
mod weights;

pub use companions::{AdapterFacts, Companions, ProjectorFacts, estimate_with};
pub use error::EstimateError;
pub use layout::{Layout, layer_devices};
pub use options::{Backend, CpuMoe, EstimateOptions, FlashAttention, Resolved};

use crate::model::ModelFacts;

/// Where the numbers of an estimate come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Basis {
    /// llama.cpp's own rules for this architecture.
    Exact,
    /// The rules of a plain transformer, or the closed form for the compute buffer.
    GenericRules,
    /// llama.cpp's dry run.
    Projected,
    /// A real load.
    Measured,
}

impl Basis {
    /// The name in Python and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::GenericRules => "generic rules",
            Self::Projected => "projected",
            Self::Measured => "measured",
        }
    }
}

/// Memory of one device, or of the host, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct DeviceMemory {
    /// Weights.
    pub weights_bytes: u64,
    /// KV caches and recurrent states.
    pub context_bytes: u64,
    /// Compute buffers.
    pub compute_bytes: u64,
    /// On a device, what the driver takes beside them; on the host, weights repacked for the CPU,
    /// which llama.cpp's own sum leaves out.
    pub overhead_bytes: u64,
    /// Layers here, the output layer counted.
    pub layers: u32,
}

impl DeviceMemory {
    /// All terms together, in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.weights_bytes
            .saturating_add(self.context_bytes)
            .saturating_add(self.compute_bytes)
            .saturating_add(self.overhead_bytes)
    }
}

/// What a model takes with certain options.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct MemoryEstimate {
    /// Each device, in device order.
    pub devices: Vec<DeviceMemory>,
    /// The host.
    pub host: DeviceMemory,
    /// Where the numbers come from.
    pub basis: Basis,
    /// Tokens over all slots, as llama.cpp resolves the options.
    pub context_length: u32,
    /// What one context checkpoint of one slot takes in host memory; 0 where llama.cpp makes none.
    pub checkpoint_bytes: u64,
}

impl MemoryEstimate {
    /// All devices together, in bytes.
    pub fn total_device_bytes(&self) -> u64 {
        self.devices.iter().fold(0, |sum: u64, device| {
            sum.saturating_add(device.total_bytes())
        })
    }
}

/// What each layer costs on a device, in bytes of weights and context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerCosts {
    /// Each layer, in layer order.
    pub layers: Vec<u64>,
    /// The output layer.
    pub output: u64,
}

/// Estimates the memory of a model.
///
/// # Errors
/// [`EstimateError::Option`] for an option that is out of range or that llama.cpp refuses.
pub fn estimate(
    facts: &ModelFacts,
    options: &EstimateOptions,
) -> Result<MemoryEstimate, EstimateError> {
    let resolved = options.resolve(facts)?;
    Ok(estimate_resolved(facts, options, resolved))
}

fn estimate_resolved(
    facts: &ModelFacts,
    options: &EstimateOptions,
    resolved: Resolved,
) -> MemoryEstimate {
    let layout = Layout::new(facts.layer_count(), options);
    let weights = weights::weight_bytes(facts, &facts.weights, options, &layout);
    let contexts = context::layer_contexts(facts, options, &resolved);
    let compute = compute::compute_bytes(facts, options, &resolved, &layout);
    let overhead = overhead::overhead_bytes(facts, options, &resolved, &layout);

    let mut devices = vec![DeviceMemory::default(); options.devices as usize];
    let mut host = DeviceMemory {
        weights_bytes: weights.host,
        compute_bytes: compute.host,
        overhead_bytes: match options.backend {
            Backend::Cuda => weights.repacked,
            Backend::Generic => 0,
        },
        layers: layout.count_on(None),
        ..DeviceMemory::default()
    };
    for (place, bytes) in layout.layers.iter().zip(&contexts) {
        let device = place
            .filter(|_| options.kv_offload)
            .and_then(|device| devices.get_mut(device as usize));
        match device {
            Some(device) => {
                device.context_bytes = device.context_bytes.saturating_add(bytes.device);
            }
            None => host.context_bytes = host.context_bytes.saturating_add(bytes.host),
        }
    }
    let terms = weights.devices.iter().zip(&compute.devices).zip(&overhead);
    for (number, (device, ((&weights, &compute), &overhead))) in
        (0_u32..).zip(devices.iter_mut().zip(terms))
    {
        device.weights_bytes = weights;
        device.compute_bytes = compute;
        device.overhead_bytes = overhead;
        device.layers = layout.count_on(Some(number));
    }
    MemoryEstimate {
        devices,
        host,
        basis: if compute.exact && facts.hyperparameters.known {
            Basis::Exact
        } else {
            Basis::GenericRules
        },
        context_length: resolved.context_length,
        checkpoint_bytes: context::checkpoint_bytes(facts, options, &resolved),
    }
}

/// What each layer costs when it is on a device.
///
/// # Errors
/// As [`estimate`].
pub fn layer_costs(
    facts: &ModelFacts,
    options: &EstimateOptions,
) -> Result<LayerCosts, EstimateError> {
    let resolved = options.resolve(facts)?;
    let contexts = context::layer_contexts(facts, options, &resolved);
    let layers = facts.weights.layers.iter().zip(&contexts).enumerate();
    let layers = layers
        .map(|(layer, (weights, context))| {
            let mut bytes = weights::device_bytes(weights.dense, options.backend);
            if !weights::experts_on_host(options, layer) {
                let experts = weights::device_bytes(weights.experts, options.backend);
                bytes = bytes.saturating_add(experts);
            }
            if options.kv_offload {
                bytes = bytes.saturating_add(context.device);
            }
            bytes
        })
        .collect();
    let tied = facts.weights.tied_output.unwrap_or_default();
    let output = weights::device_bytes(facts.weights.output, options.backend)
        .saturating_add(weights::device_bytes(tied, options.backend));
    Ok(LayerCosts { layers, output })
}
