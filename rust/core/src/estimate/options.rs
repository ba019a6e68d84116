//! What a server is started with, as far as memory depends on it.

use super::error::EstimateError;
use crate::gguf::GgmlType;
use crate::model::ModelFacts;

/// llama.cpp's `LLAMA_MAX_SEQ`.
const MAX_SLOTS: u32 = 256;
/// Contexts are padded to a multiple of this many tokens (`GGML_PAD(n_ctx, 256)`).
const CONTEXT_STEP: u32 = 256;
/// The most devices that llama.cpp takes (`GGML_SCHED_MAX_BACKENDS` less the CPU).
const MAX_DEVICES: u32 = 63;

/// `-fa`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FlashAttention {
    /// Required.
    On,
    /// Forbidden.
    Off,
    /// Where the device supports the model's head size.
    #[default]
    Auto,
}

/// Which layers keep their experts on the CPU (`-ncmoe`, `-cmoe`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CpuMoe {
    /// No layer.
    #[default]
    None,
    /// The first so many layers.
    Layers(u32),
    /// Every layer.
    All,
}

/// Whose buffer rules count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backend {
    /// CUDA's alignment, row padding and attention kernels, and the driver's overhead.
    #[default]
    Cuda,
    /// Only what llama.cpp itself decides.
    Generic,
}

/// The options of an estimate; [`Default`] is one slot at the trained context on one device.
#[derive(Clone, Debug, PartialEq)]
pub struct EstimateOptions {
    /// Tokens over all slots (`-c`); 0 is the trained length.
    pub context_length: u32,
    /// Slots (`-np`).
    pub parallel: u32,
    /// One pool of cells for all slots (`-kvu`).
    pub kv_unified: bool,
    /// Logical batch (`-b`).
    pub batch: u32,
    /// Physical batch (`-ub`).
    pub micro_batch: u32,
    /// Tokens of a micro-batch whose logits are kept; `None` is all of them, as in the dry run. A llama-server that
    /// keeps them for its slots alone has one a slot (`n_outputs_max`).
    pub max_outputs: Option<u32>,
    /// `-fa`.
    pub flash_attention: FlashAttention,
    /// `-ctk`.
    pub cache_type_k: GgmlType,
    /// `-ctv`.
    pub cache_type_v: GgmlType,
    /// Layers on devices, the output layer counted (`-ngl`); `None` is all.
    pub gpu_layers: Option<u32>,
    /// How many devices there are; 0 is the CPU alone.
    pub devices: u32,
    /// Proportions of the devices (`-ts`); `None` is equal shares.
    pub tensor_split: Option<Vec<f32>>,
    /// Experts on the CPU.
    pub cpu_moe_layers: CpuMoe,
    /// The cache lives with its layers; false keeps it on the host (`-nkvo`).
    pub kv_offload: bool,
    /// Sliding layers get cells for the whole context (`--swa-full`).
    pub swa_full: bool,
    /// Whose rules count.
    pub backend: Backend,
    /// CUDA compute capability of the devices, for the driver's overhead.
    pub compute_capability: Option<(u32, u32)>,
}

impl Default for EstimateOptions {
    fn default() -> Self {
        Self {
            context_length: 0,
            parallel: 1,
            kv_unified: false,
            batch: 2048,
            micro_batch: 512,
            max_outputs: None,
            flash_attention: FlashAttention::Auto,
            cache_type_k: GgmlType::F16,
            cache_type_v: GgmlType::F16,
            gpu_layers: None,
            devices: 1,
            tensor_split: None,
            cpu_moe_layers: CpuMoe::None,
            kv_offload: true,
            swa_full: false,
            backend: Backend::Cuda,
            compute_capability: None,
        }
    }
}

/// The options as llama.cpp resolves them for one model.
///
/// Source: the constructor of `llama_context` and `llama_init_from_model` (llama-context.cpp).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// Tokens over all slots, padded.
    pub context_length: u32,
    /// Tokens that one slot can hold.
    pub context_per_slot: u32,
    /// Slots.
    pub slots: u32,
    /// Streams of the cache: 1 where unified.
    pub streams: u32,
    /// Logical batch.
    pub batch: u32,
    /// Physical batch.
    pub micro_batch: u32,
    /// Tokens whose logits are kept, at most.
    pub outputs: u32,
    /// Flash attention is asked for or left to the device.
    pub flash_attention: bool,
    /// Tokens that a recurrent state can be rolled back by (`n_rs_seq`): each has a copy of it.
    pub rollback_tokens: u32,
}

impl EstimateOptions {
    /// Resolves the options for a model.
    ///
    /// # Errors
    /// [`EstimateError::Option`] for what llama.cpp refuses.
    pub fn resolve(&self, facts: &ModelFacts) -> Result<Resolved, EstimateError> {
        self.check_ranges()?;
        self.check_cache_types(facts)?;
        let slots = self.parallel;
        let asked = match self.context_length {
            0 => facts.trained_context_length(),
            length => length,
        };
        if asked == 0 {
            return Err(EstimateError::option(
                "context_length",
                "must be given: the header has no trained length",
            ));
        }
        let causal = facts.hyperparameters.causal;
        let batch = if causal {
            self.batch.min(asked)
        } else {
            self.batch
        };
        let micro_batch = match self.micro_batch {
            0 => batch,
            size => size.min(batch),
        };
        let too_long = || EstimateError::option("context_length", "is too long");
        let padded = asked
            .checked_next_multiple_of(CONTEXT_STEP)
            .ok_or_else(too_long)?;
        let (context_length, context_per_slot) = if self.kv_unified {
            (padded, padded)
        } else {
            let each = padded
                .checked_div(slots)
                .and_then(|share| share.checked_next_multiple_of(CONTEXT_STEP))
                .ok_or_else(too_long)?;
            if each == 0 {
                return Err(EstimateError::option(
                    "parallel",
                    "leaves no context for a slot",
                ));
            }
            (each.checked_mul(slots).ok_or_else(too_long)?, each)
        };
        Ok(Resolved {
            context_length,
            context_per_slot,
            slots,
            streams: if self.kv_unified { 1 } else { slots },
            batch,
            micro_batch,
            outputs: match self.max_outputs.filter(|_| !has_encoder(facts)) {
                Some(most) => most.min(batch),
                None => batch,
            },
            flash_attention: self.wants_flash_attention(facts),
            rollback_tokens: 0,
        })
    }

    /// Grok's attention has no flash kernel (`llama_init_from_model`).
    fn wants_flash_attention(&self, facts: &ModelFacts) -> bool {
        self.flash_attention != FlashAttention::Off && facts.architecture() != "grok"
    }

    fn check_ranges(&self) -> Result<(), EstimateError> {
        if self.parallel == 0 || self.parallel > MAX_SLOTS {
            return Err(EstimateError::option(
                "parallel",
                "must be between 1 and 256",
            ));
        }
        if self.batch == 0 {
            return Err(EstimateError::option("batch", "must be at least 1"));
        }
        if self.micro_batch == 0 {
            return Err(EstimateError::option("micro_batch", "must be at least 1"));
        }
        if self.max_outputs == Some(0) {
            return Err(EstimateError::option("max_outputs", "must be at least 1"));
        }
        if self.devices > MAX_DEVICES {
            return Err(EstimateError::option("devices", "must be at most 63"));
        }
        if let Some(split) = &self.tensor_split {
            if split.len() != self.devices as usize {
                return Err(EstimateError::option(
                    "tensor_split",
                    "must have one proportion for each device",
                ));
            }
            if split.iter().any(|share| !share.is_finite() || *share < 0.0) {
                return Err(EstimateError::option(
                    "tensor_split",
                    "must not be negative or infinite",
                ));
            }
            if !split.is_empty() && split.iter().all(|share| *share == 0.0) {
                return Err(EstimateError::option(
                    "tensor_split",
                    "must not be all zero",
                ));
            }
        }
        Ok(())
    }

    fn check_cache_types(&self, facts: &ModelFacts) -> Result<(), EstimateError> {
        for (name, kind) in [
            ("cache_type_k", self.cache_type_k),
            ("cache_type_v", self.cache_type_v),
        ] {
            if !is_cache_type(kind) {
                return Err(EstimateError::option(name, "is no cache type of llama.cpp"));
            }
        }
        let h = &facts.hyperparameters;
        let flash = self.wants_flash_attention(facts);
        if self.cache_type_v.is_quantized() && !flash {
            return Err(EstimateError::option(
                "cache_type_v",
                "is quantised, which requires flash attention",
            ));
        }
        if (h.latent_attention || facts.architecture() == "deepseek4")
            && self.cache_type_k != self.cache_type_v
        {
            return Err(EstimateError::option(
                "cache_type_v",
                "must equal cache_type_k for this model",
            ));
        }
        for layer in (0..h.trunk_layers()).filter(|_| flash) {
            for (name, kind, length) in [
                ("cache_type_k", self.cache_type_k, h.key_length_of(layer)),
                ("cache_type_v", self.cache_type_v, h.value_length_of(layer)),
            ] {
                if !u64::from(length).is_multiple_of(kind.block_elements()) {
                    return Err(EstimateError::option(
                        name,
                        format!("has blocks that do not divide the head size {length}"),
                    ));
                }
            }
        }
        Ok(())
    }
}

/// `llama_model_has_encoder` (llama-model.cpp): such a model keeps the outputs of all tokens.
fn has_encoder(facts: &ModelFacts) -> bool {
    matches!(
        facts.architecture(),
        "t5" | "t5encoder" | "eagle3" | "dflash"
    )
}

/// `kv_cache_types` (common/arg.cpp).
fn is_cache_type(kind: GgmlType) -> bool {
    use GgmlType::{BF16, F16, F32, IQ4_NL, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};
    matches!(
        kind,
        F32 | F16 | BF16 | Q8_0 | Q4_0 | Q4_1 | IQ4_NL | Q5_0 | Q5_1
    )
}
