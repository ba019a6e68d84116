//! What a projector and a draft model add to an estimate.

use super::{
    Basis, DeviceMemory, EstimateError, EstimateOptions, Layout, MemoryEstimate, estimate,
    estimate_resolved, weights,
};
use crate::gguf::GgmlType;
use crate::gguf::Header;
use crate::model::weights::{HOST_ALIGNMENT, adapter_weights, align, cuda_bytes};
use crate::model::{Footprint, ModelFacts, WeightFacts};

/// What an estimate needs to know of a projector (`--mmproj`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProjectorFacts {
    weights: Footprint,
    compute: u64,
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
        Ok(Self {
            weights,
            compute: vision_compute(header),
        })
    }
}

/// A closed form for the image encoder's compute buffer, which is reserved for one image of
/// the size that it warms up with (`clip_model_loader::warmup`, tools/mtmd/clip.cpp): the
/// picture, and for each patch the feed-forward step before and after its activation. Held
/// against `mtmd_get_memory_usage` for two encoders with flash attention it was 5 % and 48 %
/// too high.
fn vision_compute(header: &Header) -> u64 {
    const F32_BYTES: u64 = 4;
    let number = |key: &str| header.metadata.u64(key).unwrap_or(0);
    let patch = number("clip.vision.patch_size").max(1);
    let kind = header.metadata.str("clip.projector_type").unwrap_or("");
    let merge =
        number("clip.vision.spatial_merge_size").max(if kind.starts_with("qwen") { 2 } else { 1 });
    // models of any picture size warm up with so many tokens a side
    let tokens_a_side = match kind {
        "qwen2vl_merger" | "qwen2.5vl_merger" | "qwen3vl_merger" | "glm4v" | "dots_ocr" => 46,
        "pixtral" | "lightonocr" | "kimivl" | "gemma4v" => 16,
        _ => 0,
    };
    let side = match tokens_a_side {
        0 => number("clip.vision.image_size"),
        tokens => patch.saturating_mul(merge).saturating_mul(tokens),
    };
    let patches = side
        .checked_div(patch)
        .map_or(0, |count| count.saturating_mul(count));
    let feed_forward = number("clip.vision.feed_forward_length");
    let embedding = number("clip.vision.embedding_length");
    let per_patch = feed_forward
        .saturating_mul(2)
        .saturating_add(embedding.saturating_mul(2));
    let picture = side.saturating_mul(side).saturating_mul(3);
    patches
        .saturating_mul(per_patch)
        .saturating_add(picture)
        .saturating_mul(F32_BYTES)
}

/// What an estimate needs to know of a `LoRA` adapter (`--lora`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AdapterFacts(WeightFacts);

impl AdapterFacts {
    /// Sorts the adapter's tensors by where the model's are that they change.
    ///
    /// # Errors
    /// [`EstimateError::Unsupported`] where the header is no adapter's or one for another
    /// architecture, [`EstimateError::Header`] where it changes a layer that is not there.
    pub fn from_header(header: &Header, model: &ModelFacts) -> Result<Self, EstimateError> {
        let unsupported = |reason: &str| EstimateError::Unsupported {
            architecture: header.architecture().map(str::to_owned),
            reason: reason.to_owned(),
        };
        if header.metadata.str("general.type") != Some("adapter") {
            return Err(unsupported("it is no LoRA adapter"));
        }
        if header.architecture() != Some(model.architecture()) {
            return Err(unsupported("it is an adapter for another architecture"));
        }
        adapter_weights(header, &model.hyperparameters).map(Self)
    }
}

/// What is loaded beside the model.
#[derive(Clone, Copy, Debug, Default)]
pub struct Companions<'a> {
    /// `--mmproj`.
    pub projector: Option<&'a ProjectorFacts>,
    /// `--no-mmproj-offload`: the projector stays on the host.
    pub projector_on_host: bool,
    /// `-md`.
    pub draft: Option<&'a ModelFacts>,
    /// `--lora`, any number.
    pub adapters: &'a [AdapterFacts],
}

/// Estimates a model together with its projector and draft model.
///
/// The projector goes to the first device (`clip_ctx`, tools/mtmd/clip.cpp), unless it is to stay on
/// the host. The draft gets the
/// model's context, slots and split, an f16 cache, and all its layers on devices
/// (`common_base_params_to_speculative`, common/speculative.cpp). It keeps the logits of one token a slot: without
/// `max_outputs` its compute buffer is an upper bound, and the basis is [`Basis::GenericRules`], as it is where the draft's is, where
/// the draft reads the model's hidden states, which changes both graphs, and with adapters, whose products are not counted.
///
/// # Errors
/// As [`estimate`].
pub fn estimate_with(
    facts: &ModelFacts,
    options: &EstimateOptions,
    companions: Companions<'_>,
) -> Result<MemoryEstimate, EstimateError> {
    let mut resolved = options.resolve(facts)?;
    if companions.draft.is_some_and(drafts_from_hidden_states) && rolls_back(facts) {
        resolved.rollback_tokens = DRAFTED_TOKENS;
    }
    let mut sum = estimate_resolved(facts, options, resolved);
    for AdapterFacts(adapter) in companions.adapters {
        let layout = Layout::new(facts.layer_count(), options);
        let bytes = weights::weight_bytes(facts, adapter, options, &layout);
        for (device, more) in sum.devices.iter_mut().zip(bytes.devices) {
            device.weights_bytes = device.weights_bytes.saturating_add(more);
        }
        sum.host.weights_bytes = sum.host.weights_bytes.saturating_add(bytes.host);
        sum.basis = Basis::GenericRules;
    }
    if let Some(projector) = companions.projector {
        let bytes = weights::device_bytes(projector.weights, options.backend);
        let device = sum.devices.first_mut();
        if let Some(device) = device.filter(|_| !companions.projector_on_host) {
            device.weights_bytes = device.weights_bytes.saturating_add(bytes);
            device.compute_bytes = device.compute_bytes.saturating_add(projector.compute);
        } else {
            let host = &mut sum.host;
            host.weights_bytes = host.weights_bytes.saturating_add(projector.weights.host);
            host.compute_bytes = host.compute_bytes.saturating_add(projector.compute);
        }
        sum.basis = Basis::GenericRules;
    }
    if let Some(draft) = companions.draft {
        let draft_options = EstimateOptions {
            context_length: sum.context_length,
            gpu_layers: None,
            cache_type_k: GgmlType::F16,
            cache_type_v: GgmlType::F16,
            cpu_moe_layers: super::CpuMoe::None,
            max_outputs: options.max_outputs.and(Some(options.parallel)),
            ..options.clone()
        };
        let added = estimate(draft, &draft_options)?;
        for (device, more) in sum.devices.iter_mut().zip(&added.devices) {
            add_model(device, more);
        }
        let repacked = added.host.overhead_bytes;
        add_model(&mut sum.host, &added.host);
        sum.host.overhead_bytes = sum.host.overhead_bytes.saturating_add(repacked);
        let bounds = options.max_outputs.is_none() || drafts_from_hidden_states(draft);
        if bounds || added.basis != Basis::Exact {
            sum.basis = Basis::GenericRules;
        }
    }
    Ok(sum)
}

/// `--spec-draft-n-max`: the default of `common_params_speculative_draft` (common/common.h).
const DRAFTED_TOKENS: u32 = 3;

/// Drafts that read the target's hidden states make it keep its recurrent states
/// (`need_n_rs_seq`, common/common.h).
fn drafts_from_hidden_states(draft: &ModelFacts) -> bool {
    matches!(draft.architecture(), "eagle3" | "dflash")
}

/// `llm_arch_supports_rs_rollback` (llama-arch.cpp).
fn rolls_back(facts: &ModelFacts) -> bool {
    matches!(
        facts.architecture(),
        "kimi-k3"
            | "qwen35"
            | "qwen35moe"
            | "qwen4exp"
            | "deepseek4"
            | "glm5-next"
            | "nemotron_h"
            | "nemotron_h_moe"
            | "lfm2"
            | "lfm2moe"
            | "bailingmoe3"
    )
}

/// A second model in the same process: buffers add up, the driver's overhead does not.
fn add_model(device: &mut DeviceMemory, more: &DeviceMemory) {
    device.weights_bytes = device.weights_bytes.saturating_add(more.weights_bytes);
    device.context_bytes = device.context_bytes.saturating_add(more.context_bytes);
    device.compute_bytes = device.compute_bytes.saturating_add(more.compute_bytes);
}
