//! Where llama.cpp puts each tensor, and how many bytes it takes there.
//!
//! A file's tensors are all loaded, or the load fails (`done_getting_tensors`), so the
//! file's list is the list. What is decided here: the layer a tensor belongs to
//! (`LLM_TENSOR_INFOS`, llama-arch.cpp), which ones are left out or exist twice
//! (`load_arch_tensors`), and what the CPU repacks into buffers of its own.

use super::architecture;
use super::hyperparameters::Hyperparameters;
use crate::estimate::EstimateError;
use crate::gguf::{GgmlType, Header, TensorInfo};

/// Alignment of tensors in CPU and RPC buffers.
pub(crate) const HOST_ALIGNMENT: u64 = 32;
/// Alignment of tensors in CUDA buffers.
pub(crate) const CUDA_ALIGNMENT: u64 = 128;
/// CUDA pads quantised rows to a multiple of this many elements (`MATRIX_ROW_PADDING`).
const CUDA_ROW_PADDING: u64 = 512;

/// The bytes that tensors take in each kind of buffer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    /// On a device without rules of its own.
    pub generic: u64,
    /// On a CUDA device.
    pub cuda: u64,
    /// In host memory, as llama.cpp counts it.
    pub host: u64,
    /// In host memory, repacked for the CPU's matrix units: llama.cpp's own sum leaves these out.
    pub repacked: u64,
}

impl Footprint {
    pub(crate) fn add(&mut self, other: Self) {
        self.generic = self.generic.saturating_add(other.generic);
        self.cuda = self.cuda.saturating_add(other.cuda);
        self.host = self.host.saturating_add(other.host);
        self.repacked = self.repacked.saturating_add(other.repacked);
    }

    fn of(tensor: &TensorInfo, use_: Use) -> Self {
        let padded = align(tensor.bytes, HOST_ALIGNMENT);
        let repacks = is_repacked(tensor, use_);
        Self {
            generic: padded,
            cuda: cuda_bytes(tensor.ggml_type, tensor.row_elements(), tensor.bytes),
            host: if repacks { 0 } else { padded },
            repacked: if repacks { padded } else { 0 },
        }
    }
}

/// The tensors of one layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerWeights {
    /// Everything but the experts.
    pub dense: Footprint,
    /// The tensors that `--cpu-moe` keeps on the CPU.
    pub experts: Footprint,
}

/// A tensor that every layer uses and that each device holds once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedTensor {
    /// Bytes of one copy.
    pub footprint: Footprint,
    /// Only dense (not sliding) layers use it.
    pub dense_layers_only: bool,
}

/// All tensors of a model, grouped by where they go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WeightFacts {
    /// Always on the host: embeddings that are looked up.
    pub input: Footprint,
    /// With the output layer.
    pub output: Footprint,
    /// The copy of the input embedding that serves as output, where the model has no other.
    pub tied_output: Option<Footprint>,
    /// Whether that copy exists on the host as well when the output layer is there.
    pub tied_output_copied_on_host: bool,
    /// Each layer.
    pub layers: Vec<LayerWeights>,
    /// Once per device that has a layer using it.
    pub shared: Vec<SharedTensor>,
    /// The first so many layers use the shared tensors.
    pub shared_layers: u32,
}

impl WeightFacts {
    pub(super) fn from_header(header: &Header, h: &Hyperparameters) -> Result<Self, EstimateError> {
        let mut facts = Self {
            layers: vec![LayerWeights::default(); h.layer_count() as usize],
            shared_layers: match h.architecture.as_str() {
                "step35" => h.layer_count(),
                _ => h.trunk_layers().min(h.stored_layers),
            },
            ..Self::default()
        };
        let skips = architecture::skips_prediction_layers(&h.architecture);
        let (mut embedding, mut has_output) = (None, false);
        for tensor in &header.tensors {
            let (stem, suffix) = split_suffix(&tensor.name);
            let place = place_of(&h.architecture, stem);
            let use_ = use_of(stem, suffix);
            let footprint = Footprint::of(tensor, use_);
            match place {
                Place::Nowhere => {}
                Place::Input => facts.input.add(footprint),
                Place::Output => facts.output.add(footprint),
                Place::Shared => facts.shared.push(SharedTensor {
                    footprint,
                    dense_layers_only: h.architecture.starts_with("gemma4"),
                }),
                Place::Layer(layer) => {
                    let name = stem.rsplit_once('.').map_or(stem, |(_, name)| name);
                    if skips
                        && layer >= h.trunk_layers()
                        && !architecture::loads_in_prediction_layer(&h.architecture, name)
                    {
                        continue;
                    }
                    let weights = facts.layers.get_mut(layer as usize).ok_or_else(|| {
                        EstimateError::Header {
                            key: tensor.name.to_string(),
                            reason: "belongs to a layer that the model does not have".to_owned(),
                        }
                    })?;
                    if is_expert(stem) {
                        weights.experts.add(footprint);
                    } else {
                        weights.dense.add(footprint);
                    }
                }
            }
            match (stem, suffix) {
                ("token_embd", "weight") => embedding = Some(tensor),
                ("output", "weight") => has_output = true,
                _ => {}
            }
        }
        if let Some(tensor) = embedding
            && !has_output
            && !architecture::has_no_language_head(&h.architecture)
        {
            let mut copy = Footprint::of(tensor, Use::Multiply);
            // a repacked copy never is the original; a plain one is, unless it is made first
            facts.tied_output_copied_on_host =
                copy.repacked > 0 || matches!(h.architecture.as_str(), "gemma3n" | "gemma4");
            if !facts.tied_output_copied_on_host {
                copy.host = 0;
            }
            facts.tied_output = Some(copy);
        }
        Ok(facts)
    }
}

/// The tensors of a `LoRA` adapter (`llama_adapter_lora_init`, llama-adapter.cpp): each lies
/// where the tensor that it changes lies, on the host never repacked.
pub(crate) fn adapter_weights(
    header: &Header,
    h: &Hyperparameters,
) -> Result<WeightFacts, EstimateError> {
    let mut facts = WeightFacts {
        layers: vec![LayerWeights::default(); h.layer_count() as usize],
        ..WeightFacts::default()
    };
    for tensor in &header.tensors {
        let changed = ["lora_a", "lora_b"]
            .iter()
            .find_map(|side| tensor.name.strip_suffix(side)?.strip_suffix('.'));
        let Some(changed) = changed else { continue };
        let (stem, _) = split_suffix(changed);
        let footprint = Footprint::of(tensor, Use::Other);
        match place_of(&h.architecture, stem) {
            Place::Input => facts.input.add(footprint),
            Place::Layer(layer) => {
                let Some(weights) = facts.layers.get_mut(layer as usize) else {
                    return Err(EstimateError::Header {
                        key: tensor.name.to_string(),
                        reason: "changes a layer that the model does not have".to_owned(),
                    });
                };
                if is_expert(stem) {
                    weights.experts.add(footprint);
                } else {
                    weights.dense.add(footprint);
                }
            }
            Place::Output | Place::Shared | Place::Nowhere => facts.output.add(footprint),
        }
    }
    Ok(facts)
}

/// `ggml_backend_cuda_buffer_type_get_alloc_size`, aligned.
pub(crate) fn cuda_bytes(ggml_type: GgmlType, row_elements: u64, bytes: u64) -> u64 {
    let beyond = row_elements.checked_rem(CUDA_ROW_PADDING).unwrap_or(0);
    let padding = if ggml_type.is_quantized() && beyond != 0 {
        ggml_type
            .row_bytes(CUDA_ROW_PADDING.saturating_sub(beyond))
            .unwrap_or(0)
    } else {
        0
    };
    align(bytes.saturating_add(padding), CUDA_ALIGNMENT)
}

pub(crate) fn align(bytes: u64, alignment: u64) -> u64 {
    bytes
        .checked_next_multiple_of(alignment)
        .unwrap_or(u64::MAX)
}

enum Place {
    Input,
    Output,
    Layer(u32),
    Shared,
    Nowhere,
}

/// What a tensor is for, as far as its buffer depends on it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    Multiply,
    MultiplyExperts,
    Other,
}

fn split_suffix(name: &str) -> (&str, &str) {
    match name.rsplit_once('.') {
        Some((stem, suffix))
            if matches!(
                suffix,
                "weight" | "bias" | "scale" | "input_scale" | "lora_a" | "lora_b"
            ) =>
        {
            (stem, suffix)
        }
        _ => (name, ""),
    }
}

/// `LLM_TENSOR_INFOS`: the layer of a tensor by its name.
fn place_of(architecture: &str, stem: &str) -> Place {
    match stem {
        "token_embd" | "position_embd" | "token_types" | "per_layer_token_embd" => Place::Input,
        "masked_embd_centroids" | "masked_embd_ordering" => Place::Nowhere,
        "rope_freqs" | "rope_factors_long" | "rope_factors_short" => Place::Shared,
        "token_embd_norm" if matches!(architecture, "lfm2" | "lfm2moe") => Place::Output,
        "token_embd_norm"
        | "per_layer_model_proj"
        | "per_layer_proj_norm"
        | "hrm.z_l_init"
        | "conv1d"
        | "nextn.pre_projection" => Place::Layer(0),
        _ => match layer_number(stem) {
            Some(_) if stem.ends_with(".cross_attn_rel_b") => Place::Nowhere,
            Some(layer) => Place::Layer(layer),
            None => Place::Output,
        },
    }
}

/// The number in `blk.7.…`, `enc.blk.7.…`, `dec.blk.7.…`, `posnet.7.…` or `convnext.7.…`.
fn layer_number(stem: &str) -> Option<u32> {
    let rest = stem
        .strip_prefix("enc.")
        .or_else(|| stem.strip_prefix("dec."))
        .unwrap_or(stem);
    let rest = ["blk.", "posnet.", "convnext."]
        .iter()
        .find_map(|prefix| rest.strip_prefix(prefix))?;
    rest.split('.').next()?.parse().ok()
}

/// The pattern of `--cpu-moe` (`LLM_FFN_EXPS_REGEX`, common.h).
fn is_expert(stem: &str) -> bool {
    let Some(name) = stem.rsplit_once('.').map(|(_, name)| name) else {
        return false;
    };
    let Some(kind) = name.strip_prefix("ffn_") else {
        return false;
    };
    ["up_", "down_", "gate_", "gate_up_"].iter().any(|matrix| {
        kind.strip_prefix(matrix)
            .is_some_and(|rest| rest.starts_with("exps") || rest.starts_with("chexps"))
    })
}

/// The operation of a tensor: only what is multiplied is ever repacked.
fn use_of(stem: &str, suffix: &str) -> Use {
    if matches!(suffix, "bias" | "lora_a" | "lora_b") {
        return Use::Other;
    }
    if is_expert(stem) {
        return Use::MultiplyExperts;
    }
    let name = stem.rsplit_once('.').map_or(stem, |(_, name)| name);
    let looked_up = matches!(
        name,
        "token_embd"
            | "position_embd"
            | "token_types"
            | "per_layer_token_embd"
            | "attn_compressor_ape"
            | "indexer_compressor_ape"
            | "attn_rel_b"
            | "ffn_gate_tid2eid"
            | "embed_tokens"
            | "d2t"
            | "markov_w1"
            | "selector_predecessor"
            | "selector_successor"
    );
    let convolved = name.contains("conv1d")
        || matches!(name, "conv" | "conv1" | "conv2" | "dw")
        || name.ends_with("_conv_base");
    let elementwise = name.contains("norm")
        || name.starts_with("time_mix_lerp")
        || name.starts_with("rope_")
        || matches!(
            name,
            "ssm_a" | "ssm_d" | "attn_sinks" | "time_mix_first" | "time_mix_decay"
        );
    if looked_up || convolved || elementwise {
        Use::Other
    } else {
        Use::Multiply
    }
}

/// Whether the host keeps this tensor repacked, so that no device can take over its operations.
pub(crate) fn repacks(tensor: &TensorInfo) -> bool {
    let (stem, suffix) = split_suffix(&tensor.name);
    is_repacked(tensor, use_of(stem, suffix))
}

/// Whether an x86 CPU with AMX and AVX2 keeps the tensor in a repacked buffer
/// (`supports_op` of ggml-cpu/amx/amx.cpp and ggml-cpu/repack.cpp).
fn is_repacked(tensor: &TensorInfo, use_: Use) -> bool {
    let [columns, rows, ..] = tensor.dims;
    let whole = |n: u64, of: u64| n.is_multiple_of(of);
    let matrix_unit = use_ == Use::Multiply
        && whole(rows, 32)
        && match tensor.ggml_type {
            GgmlType::Q4_0 | GgmlType::Q4_1 | GgmlType::Q8_0 => whole(columns, 32),
            GgmlType::Q4_K | GgmlType::Q5_K | GgmlType::Q6_K | GgmlType::IQ4_XS => {
                whole(columns, 256)
            }
            GgmlType::F16 => whole(columns, 16),
            _ => false,
        };
    let dimensions = significant_dimensions(tensor);
    let interleaved = (use_ == Use::Multiply && dimensions == 2
        || use_ == Use::MultiplyExperts && dimensions == 3)
        && whole(rows, 8)
        && matches!(
            tensor.ggml_type,
            GgmlType::Q4_0 | GgmlType::Q4_K | GgmlType::IQ4_NL | GgmlType::MXFP4
        );
    matrix_unit || interleaved
}

/// `ggml_n_dims`: dimensions after which there are only ones.
fn significant_dimensions(tensor: &TensorInfo) -> usize {
    tensor
        .dims
        .iter()
        .rposition(|&dim| dim > 1)
        .map_or(1, |last| last.saturating_add(1))
}
