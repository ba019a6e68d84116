//! The numbers of a header, read as llama.cpp reads them.
//!
//! Source: `llama_model_base::load_hparams` (llama-model.cpp) and the
//! `load_arch_hparams` of src/models/*.cpp.

mod by_architecture;

use super::architecture::{self, SlidingKind};
use super::metadata::Keys;
use crate::estimate::EstimateError;
use crate::gguf::Header;

/// llama.cpp's `LLAMA_MAX_LAYERS`.
const MAX_LAYERS: u32 = 512;
/// The most elements of a token that any part of a layer has: a hundred times what the widest models have.
const WIDEST: u64 = 1 << 24;
/// llama.cpp's `LLAMA_MAX_EXPERTS`.
const MAX_EXPERTS: u32 = 1024;
/// The most parts of a layer that its graph takes one by one; models have up to 128.
const MOST_PARTS: u32 = 1024;
/// The most residual streams, each pair of which a graph may take on its own; models have 4.
const MOST_STREAMS: u32 = 16;

/// The dimensions of a model, named as in the header.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Hyperparameters {
    /// `general.architecture`.
    pub architecture: String,
    /// Whether the rules of this architecture are known.
    pub known: bool,
    /// `context_length`: tokens the model was trained with.
    pub trained_context_length: u32,
    /// `embedding_length`.
    pub embedding_length: u32,
    /// Entries of the vocabulary.
    pub vocabulary_size: u32,
    /// `nextn_predict_layers`: appended prediction layers, counted in the layers below.
    pub prediction_layers: u32,
    /// Layers that the file holds; fewer than the model has where it runs them several times.
    pub stored_layers: u32,
    /// `expert_count`; 0 for a dense model.
    pub expert_count: u32,
    /// `leading_dense_block_count`.
    pub leading_dense_layers: u32,
    /// Query heads of each layer.
    pub heads: Vec<u32>,
    /// KV heads of each layer; 0 where a layer has none.
    pub kv_heads: Vec<u32>,
    /// Feed-forward width of each layer.
    pub feed_forward: Vec<u32>,
    /// Feed-forward width of one expert, of each layer.
    pub expert_feed_forward: Vec<u32>,
    /// Experts that a token uses, of each layer.
    pub experts_used: Vec<u32>,
    /// Whether each layer attends through the sliding window.
    pub sliding: Vec<bool>,
    /// Whether each layer carries a recurrent state.
    pub recurrent: Vec<bool>,
    /// Whether each layer owns a sparse-attention indexer.
    pub owns_indexer: Vec<bool>,
    /// `DeepSeek` V4: how many tokens share a cell of the compressed cache, of each layer; 0 for none.
    pub compress_ratios: Vec<u32>,
    /// The layer that carries the n-gram embedding module, if any.
    pub ngram_layer: Option<u32>,
    /// The sliding window and its kind, where any layer slides.
    pub sliding_window: Option<(SlidingKind, u32)>,
    /// Head size of keys, dense layers.
    pub key_length: u32,
    /// Head size of values, dense layers.
    pub value_length: u32,
    /// Head size of keys, sliding layers.
    pub key_length_sliding: u32,
    /// Head size of values, sliding layers.
    pub value_length_sliding: u32,
    /// Whether the cache holds one compressed latent per token instead of keys and values.
    pub latent_attention: bool,
    /// The first so many layers own a KV cache, the others share theirs; `None`: all own one.
    pub layers_with_cache: Option<u32>,
    /// Elements of a layer's convolution or token-shift state (`n_embd_r`).
    pub convolution_state: u64,
    /// Elements of a layer's recurrent state (`n_embd_s`).
    pub recurrent_state: u64,
    /// Elements of the n-gram module's convolution history.
    pub ngram_state: u64,
    /// Head size of the sparse-attention indexer; 0 without one.
    pub indexer_key_length: u32,
    /// `indexer.top_k`; 0 turns the indexer off.
    pub indexer_top_k: u32,
    /// Tokens that the indexer pools; 0 without pooling.
    pub indexer_pool: u32,
    /// Hyper-connection streams; 0 without.
    pub hyper_connections: u32,
    /// `attention.causal`.
    pub causal: bool,
}

impl Hyperparameters {
    pub(super) fn from_header(header: &Header) -> Result<Self, EstimateError> {
        let keys = Keys::new(header)?;
        let mut h = Self::common(&keys)?;
        h.read_sliding(&keys)?;
        h.read_architecture(&keys)?;
        h.read_recurrent(&keys)?;
        h.check_sizes(&keys)?;
        Ok(h)
    }

    /// Refuses what no model has, and no product of a few sizes has room for.
    fn check_sizes(&self, keys: &Keys<'_>) -> Result<(), EstimateError> {
        keys.at_most("hyper_connection.count", MOST_STREAMS)?;
        keys.at_most("attention.indexer.head_count", MOST_PARTS)?;
        if u64::from(self.embedding_length) > WIDEST {
            return Err(keys.invalid("embedding_length", "must be at most 16777216"));
        }
        for (heads, key) in [
            (&self.heads, "attention.head_count"),
            (&self.kv_heads, "attention.head_count_kv"),
        ] {
            let most = u64::from(heads.iter().copied().max().unwrap_or(0)).max(1);
            let lengths = [
                self.key_length,
                self.value_length,
                self.key_length_sliding,
                self.value_length_sliding,
            ];
            if lengths
                .iter()
                .any(|length| most.saturating_mul(u64::from(*length)) > WIDEST)
            {
                return Err(
                    keys.invalid(key, "times the length of a head must be at most 16777216")
                );
            }
        }
        Ok(())
    }

    /// Layers that can be placed (`n_layer_all`).
    pub fn layer_count(&self) -> u32 {
        u32::try_from(self.heads.len()).unwrap_or(MAX_LAYERS)
    }

    /// Layers without the appended prediction layers (`n_layer`).
    pub fn trunk_layers(&self) -> u32 {
        self.layer_count().saturating_sub(self.prediction_layers)
    }

    /// Whether this layer slides.
    pub fn is_sliding(&self, layer: u32) -> bool {
        at(&self.sliding, layer).unwrap_or(false)
    }

    /// Whether this layer is recurrent.
    pub fn is_recurrent(&self, layer: u32) -> bool {
        at(&self.recurrent, layer).unwrap_or(false)
    }

    /// Head size of the keys of a layer (`n_embd_head_k`).
    pub fn key_length_of(&self, layer: u32) -> u32 {
        if self.is_sliding(layer) {
            self.key_length_sliding
        } else {
            self.key_length
        }
    }

    /// Head size of the values of a layer (`n_embd_head_v`).
    pub fn value_length_of(&self, layer: u32) -> u32 {
        if self.is_sliding(layer) {
            self.value_length_sliding
        } else {
            self.value_length
        }
    }

    /// Elements of a token's keys in a layer (`n_embd_k_gqa`).
    pub fn key_width(&self, layer: u32) -> u64 {
        u64::from(self.key_length_of(layer))
            .saturating_mul(u64::from(at(&self.kv_heads, layer).unwrap_or(0)))
    }

    /// Elements of a token's values in a layer (`n_embd_v_gqa`).
    pub fn value_width(&self, layer: u32) -> u64 {
        u64::from(self.value_length_of(layer))
            .saturating_mul(u64::from(at(&self.kv_heads, layer).unwrap_or(0)))
    }

    fn common(keys: &Keys<'_>) -> Result<Self, EstimateError> {
        let architecture = keys.architecture().to_owned();
        let mut layers = keys.required_u32("block_count")?;
        if layers == 0 || layers > MAX_LAYERS {
            return Err(keys.invalid("block_count", "must be between 1 and 512"));
        }
        let loops = if architecture == "nanbeige" {
            keys.u32("num_loops")?.unwrap_or(1).max(1)
        } else {
            1
        };
        let prediction_layers = keys.u32("nextn_predict_layers")?.unwrap_or(0);
        if prediction_layers > layers {
            return Err(keys.invalid("nextn_predict_layers", "is more than block_count"));
        }
        let heads = keys
            .per_layer("attention.head_count", layers)?
            .unwrap_or_else(|| filled(0, layers));
        let kv_heads = keys
            .per_layer("attention.head_count_kv", layers)?
            .unwrap_or_else(|| heads.clone());
        let mut h = Self {
            known: architecture::is_known_architecture(&architecture),
            trained_context_length: keys.required_u32("context_length")?,
            embedding_length: keys.required_u32("embedding_length")?,
            vocabulary_size: keys.vocabulary_size()?,
            prediction_layers,
            stored_layers: layers,
            expert_count: keys.u32("expert_count")?.unwrap_or(0),
            leading_dense_layers: keys.u32("leading_dense_block_count")?.unwrap_or(0),
            feed_forward: keys
                .per_layer("feed_forward_length", layers)?
                .unwrap_or_else(|| filled(0, layers)),
            expert_feed_forward: keys
                .per_layer("expert_feed_forward_length", layers)?
                .unwrap_or_else(|| filled(0, layers)),
            experts_used: keys
                .per_layer("expert_used_count", layers)?
                .unwrap_or_else(|| filled(0, layers)),
            sliding: filled(false, layers),
            recurrent: filled(false, layers),
            owns_indexer: filled(false, layers),
            compress_ratios: filled(0, layers),
            causal: keys.bool("attention.causal")?.unwrap_or(true)
                && !architecture::is_never_causal(&architecture),
            indexer_key_length: keys.u32("attention.indexer.key_length")?.unwrap_or(0),
            indexer_top_k: keys.u32("attention.indexer.top_k")?.unwrap_or(0),
            hyper_connections: keys.u32("hyper_connection.count")?.unwrap_or(0),
            architecture,
            heads,
            kv_heads,
            ..Self::default()
        };
        if h.expert_count > MAX_EXPERTS || h.experts_used.iter().any(|&used| used > MAX_EXPERTS) {
            return Err(keys.invalid("expert_count", "must be at most 1024, used ones included"));
        }
        let first_heads = h.heads.first().copied().unwrap_or(0);
        if let Some(even) = h.embedding_length.checked_div(first_heads) {
            h.key_length = keys.u32("attention.key_length")?.unwrap_or(even);
            h.value_length = keys.u32("attention.value_length")?.unwrap_or(even);
        }
        h.key_length_sliding = keys
            .u32("attention.key_length_swa")?
            .unwrap_or(h.key_length);
        h.value_length_sliding = keys
            .u32("attention.value_length_swa")?
            .unwrap_or(h.value_length);
        h.latent_attention = keys.u32("attention.key_length_mla")?.unwrap_or(0) != 0
            && keys.u32("attention.value_length_mla")?.unwrap_or(0) != 0
            && reads_latent_lengths(&h.architecture);
        if loops > 1 {
            layers = layers
                .checked_mul(loops)
                .filter(|&n| n <= MAX_LAYERS)
                .ok_or_else(|| keys.invalid("num_loops", "makes more than 512 layers"))?;
            h.repeat_layers(layers);
        }
        Ok(h)
    }

    /// A looped model runs its layers several times, each pass with a cache of its own.
    fn repeat_layers(&mut self, layers: u32) {
        let layers = layers as usize;
        for list in [
            &mut self.heads,
            &mut self.kv_heads,
            &mut self.feed_forward,
            &mut self.expert_feed_forward,
            &mut self.experts_used,
            &mut self.compress_ratios,
        ] {
            *list = list.iter().copied().cycle().take(layers).collect();
        }
        for list in [
            &mut self.sliding,
            &mut self.recurrent,
            &mut self.owns_indexer,
        ] {
            list.resize(layers, false);
        }
    }
}

/// Only these read `key_length_mla`; to others the key means nothing.
fn reads_latent_lengths(architecture: &str) -> bool {
    matches!(
        architecture,
        "bailingmoe3"
            | "deepseek2"
            | "mistral4"
            | "deepseek32"
            | "dots3note"
            | "glm-dsa"
            | "glm5-next"
            | "hy_v4"
            | "kimi-k3"
            | "kimi-linear"
    )
}

pub(super) fn at<T: Copy>(list: &[T], layer: u32) -> Option<T> {
    list.get(layer as usize).copied()
}

fn filled<T: Clone>(value: T, layers: u32) -> Vec<T> {
    vec![value; layers as usize]
}

fn product(factors: &[u32]) -> u64 {
    factors
        .iter()
        .fold(1, |all: u64, &factor| all.saturating_mul(u64::from(factor)))
}
