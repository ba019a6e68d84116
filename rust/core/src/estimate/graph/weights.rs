//! The weights that a graph looks up by name, each in the graph once and on the device that it belongs to.

use super::builder::{Builder, NONE};
use super::model::{Weight, find};
use super::names::{joined_hash, name_hash, whole_hash};
use super::tensor::{Storage, TensorId};

/// Where a weight belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Belongs {
    /// The host, as everything before the first layer.
    Input,
    /// The device of the output layer.
    Output,
    /// The device of a layer.
    Layer(usize),
}

/// Architectures that pass `ffn_*_exps_s` to `build_moe_ffn`.
const EXPERT_SCALES: &[&str] = &[
    "cohere2moe",
    "deepseek32",
    "dots3note",
    "gemma4",
    "glm-dsa",
    "hy_v3",
    "llama",
    "llama-embed",
    "mellum",
    "mistral3",
    "nemotron_h",
    "nemotron_h_moe",
    "qwen35moe",
    "qwen3moe",
    "qwen3next",
    "qwen4exp",
];

/// Architectures that pass `ffn_*_s` to `build_ffn`.
const FEED_FORWARD_SCALES: &[&str] = &[
    "bitnet",
    "cohere2",
    "cohere2moe",
    "gemma4",
    "llama",
    "llama-embed",
    "mistral3",
    "qwen3",
    "qwen35",
    "talkie",
];

impl Builder<'_> {
    fn store(&mut self, weight: Weight, belongs: Belongs, on_host: bool) -> TensorId {
        let backend = match belongs {
            _ if on_host => self.batch.cpu(),
            Belongs::Input => self.batch.cpu(),
            Belongs::Output => self.batch.output_backend(),
            Belongs::Layer(il) => self.batch.layer_backend(il),
        };
        let repacked = weight.repacked && backend == self.batch.cpu();
        let storage = if repacked {
            Storage::Repacked(backend)
        } else {
            Storage::Weights(backend)
        };
        self.g.stored(weight.element, weight.ne, storage)
    }

    fn layer_tensor(&mut self, name: &str, suffix: &str) -> TensorId {
        let hash = match suffix {
            "" => name_hash(name),
            _ => joined_hash(name, suffix),
        };
        let found = self.layer.and_then(|layer| layer.place(hash));
        let Some((place, weight)) = found.and_then(|place| {
            let weight = self.layer?.weights.get(place)?.1;
            Some((place, weight))
        }) else {
            return NONE;
        };
        if let Some(id) = self.known.get(place).filter(|id| id.is_some()) {
            return *id;
        }
        let on_host = self.layer() < self.batch.host_expert_layers && is_expert(name);
        let id = self.store(weight, Belongs::Layer(self.home), on_host);
        if let Some(slot) = self.known.get_mut(place) {
            *slot = id;
        }
        id
    }

    /// The current layer's `NAME.weight`, or none.
    pub(super) fn weight(&mut self, name: &str) -> TensorId {
        self.layer_tensor(name, ".weight")
    }

    /// The current layer's `NAME.bias`, or none.
    pub(super) fn bias(&mut self, name: &str) -> TensorId {
        self.layer_tensor(name, ".bias")
    }

    /// The current layer's tensor of exactly this name, or none.
    pub(super) fn exact(&mut self, name: &str) -> TensorId {
        self.layer_tensor(name, "")
    }

    /// The current layer's `NAME.scale`, or none.
    pub(super) fn scale(&mut self, name: &str) -> TensorId {
        if self.home == self.layer() {
            return self.layer_tensor(name, ".scale");
        }
        let hash = joined_hash(name, ".scale");
        let own = self.model.layer(self.layer());
        own.and_then(|layer| find(&layer.weights, hash))
            .map_or(NONE, |weight| {
                self.store(*weight, Belongs::Layer(self.layer()), false)
            })
    }

    /// Whether this architecture's graph multiplies by the scale of this weight, should the file hold one.
    pub(super) fn applies_scale(&self, name: &str) -> bool {
        let listed = |list: &[&str]| list.contains(&self.model.architecture());
        self.model.has_scales()
            && if name.contains("exps") {
                listed(EXPERT_SCALES)
            } else if name.contains("shexp") {
                listed(EXPERT_SCALES)
                    && !listed(&[
                        "llama",
                        "llama-embed",
                        "mellum",
                        "mistral3",
                        "gemma4",
                        "qwen3moe",
                    ])
            } else {
                !name.starts_with("ffn_") || listed(FEED_FORWARD_SCALES)
            }
    }

    pub(super) fn has(&self, name: &str) -> bool {
        let hash = joined_hash(name, ".weight");
        self.layer.is_some_and(|layer| layer.place(hash).is_some())
    }

    fn shared(&mut self, name: &str, belongs: Belongs) -> TensorId {
        let place = match belongs {
            Belongs::Input => u64::MAX,
            Belongs::Output => u64::MAX - 1,
            Belongs::Layer(il) => il as u64,
        };
        let hash = whole_hash(name) ^ place;
        if let Some((_, id)) = self.known_shared.iter().find(|(known, _)| *known == hash) {
            return *id;
        }
        let id = self
            .model
            .shared(name)
            .map_or(NONE, |weight| self.store(weight, belongs, false));
        self.known_shared.push((hash, id));
        id
    }

    /// A tensor of the input, on the host.
    pub(super) fn input_weight(&mut self, name: &str) -> TensorId {
        self.shared(name, Belongs::Input)
    }

    /// A tensor of the output layer.
    pub(super) fn output_weight(&mut self, name: &str) -> TensorId {
        self.shared(name, Belongs::Output)
    }

    /// A tensor outside the layers that is used with the first one (`LLM_TENSOR_LAYER_REPEATING` without a number).
    pub(super) fn first_weight(&mut self, name: &str) -> TensorId {
        self.shared(name, Belongs::Layer(0))
    }

    /// A tensor that is named once and kept beside every layer.
    pub(super) fn layer_shared(&mut self, name: &str) -> TensorId {
        self.shared(name, Belongs::Layer(self.layer()))
    }

    /// The output matrix, or a copy of the embeddings where they are tied.
    pub(super) fn head_weight(&mut self) -> TensorId {
        let output = self.output_weight("output.weight");
        if output.is_some() {
            output
        } else {
            self.output_weight("token_embd.weight")
        }
    }

    /// `llama_model::get_rope_factors`.
    pub(super) fn rope_factors(&mut self) -> TensorId {
        let own = self.layer_shared("rope_freqs.weight");
        if own.is_some() {
            return own;
        }
        let own = self.weight("rope_freqs");
        if own.is_some() {
            return own;
        }
        let trained = self.number(
            "rope.scaling.original_context_length",
            i64::from(self.hyper.trained_context_length),
        );
        let name = if self.batch.context_per_sequence > trained {
            "rope_factors_long.weight"
        } else {
            "rope_factors_short.weight"
        };
        self.layer_shared(name)
    }

    /// Makes the weights of the first layers known, for layers that run with them again and again.
    pub(super) fn know_weights(&mut self, layers: usize) {
        for home in 0..layers.min(self.trunk()) {
            let weights = self
                .model
                .layer(home)
                .map_or(&[][..], |layer| &layer.weights);
            let known = weights
                .iter()
                .map(|(_, weight)| self.store(*weight, Belongs::Layer(home), false))
                .collect();
            self.known_again.push(known);
        }
    }
}

/// The weights that `--cpu-moe` keeps on the host: `ffn_(up|down|gate|gate_up)_(ch|)exps` (`LLM_FFN_EXPS_REGEX`).
fn is_expert(name: &str) -> bool {
    name.strip_prefix("ffn_").is_some_and(|rest| {
        ["up_", "down_", "gate_", "gate_up_"].iter().any(|part| {
            rest.strip_prefix(part)
                .is_some_and(|rest| rest == "exps" || rest == "chexps")
        })
    })
}
