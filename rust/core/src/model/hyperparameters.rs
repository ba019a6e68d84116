//! The numbers of a header, read as llama.cpp reads them.
//!
//! Source: `llama_model_base::load_hparams` (llama-model.cpp) and the
//! `load_arch_hparams` of src/models/*.cpp.

use super::architecture::{
    self, RecurrentRule, SlidingKind, SlidingPattern, SlidingRule, SlidingWhen,
};
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
        h.check_widths(&keys)?;
        keys.at_most("hyper_connection.count", MOST_STREAMS)?;
        keys.at_most("attention.indexer.head_count", MOST_PARTS)?;
        Ok(h)
    }

    /// Refuses what no model has, and no product of a few sizes has room for.
    fn check_widths(&self, keys: &Keys<'_>) -> Result<(), EstimateError> {
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

    fn read_sliding(&mut self, keys: &Keys<'_>) -> Result<(), EstimateError> {
        let Some(rule) = architecture::sliding_rule(&self.architecture) else {
            return Ok(());
        };
        if self.architecture == "dflash" && self.hyper_connections > 0 {
            self.sliding.fill(true);
            let window = keys.u32("attention.sliding_window")?.unwrap_or(0);
            self.sliding_window = Some((rule.kind, window));
            return Ok(());
        }
        let named = keys.u32("attention.sliding_window")?;
        let slides = match rule.when {
            SlidingWhen::Always => true,
            SlidingWhen::WindowNamed => named.is_some_and(|window| window > 0),
            SlidingWhen::UnlessZero => named != Some(0),
            SlidingWhen::LayerCount(count) => self.trunk_layers() == count,
        };
        if !slides {
            return Ok(());
        }
        let window = architecture::fixed_window(&self.architecture)
            .or(named)
            .unwrap_or(rule.default_window);
        self.sliding_window = Some((rule.kind, window));
        self.sliding = self.sliding_layers(keys, rule)?;
        Ok(())
    }

    /// `load_swa_pattern` and `llama_hparams::set_swa_pattern`.
    fn sliding_layers(
        &self,
        keys: &Keys<'_>,
        rule: SlidingRule,
    ) -> Result<Vec<bool>, EstimateError> {
        const PATTERN: &str = "attention.sliding_window_pattern";
        let layers = self.layer_count();
        let trunk = self.trunk_layers();
        if !matches!(
            rule.pattern,
            SlidingPattern::All | SlidingPattern::Attention
        ) && let Some(mut listed) = keys.flags(PATTERN)?
        {
            listed.resize(layers as usize, false);
            return Ok(listed);
        }
        let period = keys.u32(PATTERN)?;
        let slides = |layer: u32| match rule.pattern {
            SlidingPattern::DenseLast(default) => {
                let n = period.unwrap_or(default);
                layer
                    .checked_rem(n)
                    .is_none_or(|place| place < n.saturating_sub(1))
            }
            SlidingPattern::DenseFirst(default) => layer
                .checked_rem(period.unwrap_or(default))
                .is_none_or(|place| place != 0),
            SlidingPattern::Listed => false,
            SlidingPattern::All => true,
            SlidingPattern::Attention => at(&self.kv_heads, layer).unwrap_or(0) != 0,
        };
        let appended = self.architecture == "deepseek4";
        Ok((0..layers)
            .map(|layer| {
                if layer < trunk {
                    slides(layer)
                } else {
                    appended
                }
            })
            .collect())
    }

    /// Rules that belong to one or two architectures.
    fn read_architecture(&mut self, keys: &Keys<'_>) -> Result<(), EstimateError> {
        let trunk = self.trunk_layers();
        match self.architecture.as_str() {
            "gemma3n" => self.layers_with_cache = Some(20),
            "gemma4" => {
                let shared = keys.u32("attention.shared_kv_layers")?.unwrap_or(0);
                self.layers_with_cache = Some(self.layer_count().saturating_sub(shared));
            }
            "glm5-next" | "kimi-k3" => {
                let rank = keys.required_u32("attention.kv_lora_rank")?;
                self.value_length = rank;
                self.indexer_pool = keys.u32("attention.indexer.kpool")?.unwrap_or(0);
                self.owns_indexer = self.indexer_types(keys, true)?;
            }
            "glm-dsa" => {
                // models before 5.2 (shorter contexts) own an indexer in every layer
                let all = self.trained_context_length < 1_048_576;
                self.owns_indexer = if keys.has("attention.indexer.types") || all {
                    self.indexer_types(keys, true)?
                } else {
                    (0..self.layer_count()).map(glm_5_2_owns_indexer).collect()
                };
            }
            "deepseek32" => self.owns_indexer = filled(true, self.layer_count()),
            "hy_v4" | "dots3note" => self.owns_indexer = self.indexer_types(keys, false)?,
            "minimax-m3" => {
                self.owns_indexer = (0..self.layer_count())
                    .map(|layer| layer >= self.leading_dense_layers)
                    .collect();
            }
            "qwen4exp" => {
                self.owns_indexer = filled(true, self.layer_count());
                self.ngram_layer = keys
                    .numbers("ple.layers")?
                    .and_then(|layers| layers.first().copied());
                keys.at_most("ple.conv_kernel", MOST_PARTS)?;
                keys.at_most("attention.compress_ratios", MOST_PARTS)?;
                let kernel = keys.u32("ple.conv_kernel")?.unwrap_or(0);
                let size = keys.u32("ple.ngram_size")?.unwrap_or(0);
                self.ngram_state = product(&[
                    kernel.saturating_sub(1),
                    size,
                    self.hyper_connections,
                    self.embedding_length,
                ]);
            }
            "deepseek4" => {
                let mut ratios = keys
                    .numbers("attention.compress_ratios")?
                    .unwrap_or_default();
                ratios.resize(self.layer_count() as usize, 0);
                self.compress_ratios = ratios;
                let first_appended = format!("blk.{trunk}.nextn.eh_proj.weight");
                if !keys.has_tensor(&first_appended) {
                    self.prediction_layers = 0;
                    self.sliding.fill(true);
                }
            }
            "graniteswitch" => {
                // the router is one more single-head attention layer behind the others
                for (list, value) in [
                    (&mut self.heads, 1),
                    (&mut self.kv_heads, 1),
                    (&mut self.feed_forward, 0),
                    (&mut self.expert_feed_forward, 0),
                    (&mut self.experts_used, 0),
                    (&mut self.compress_ratios, 0),
                ] {
                    list.push(value);
                }
                self.sliding.push(false);
                self.recurrent.push(false);
                self.owns_indexer.push(false);
            }
            _ => {}
        }
        Ok(())
    }

    fn indexer_types(&self, keys: &Keys<'_>, default: bool) -> Result<Vec<bool>, EstimateError> {
        let mut owns = keys
            .flags_or_one("attention.indexer.types", self.trunk_layers())?
            .unwrap_or_else(|| filled(default, self.layer_count()));
        owns.resize(self.layer_count() as usize, false);
        Ok(owns)
    }

    fn read_recurrent(&mut self, keys: &Keys<'_>) -> Result<(), EstimateError> {
        let rule = architecture::recurrent_rule(&self.architecture);
        if rule == RecurrentRule::None {
            return Ok(());
        }
        let trunk = self.trunk_layers();
        let listed = match rule {
            RecurrentRule::Interval(_) => {
                keys.flags_or_one("attention.recurrent_layers", self.layer_count())?
            }
            _ => None,
        };
        let interval = keys.u32("full_attention_interval")?;
        let no_kv = |layer| at(&self.kv_heads, layer).unwrap_or(0) == 0;
        let recurrent = |layer: u32| match rule {
            RecurrentRule::None => false,
            RecurrentRule::All => true,
            RecurrentRule::NoKvHeads => {
                (layer < trunk || self.architecture == "glm5-next") && no_kv(layer)
            }
            RecurrentRule::NoKvHeadsNoFeedForward => {
                layer < trunk && no_kv(layer) && at(&self.feed_forward, layer).unwrap_or(0) == 0
            }
            RecurrentRule::Interval(default) => {
                let place = layer
                    .saturating_add(1)
                    .checked_rem(interval.unwrap_or(default));
                layer < trunk && place.is_none_or(|place| place != 0)
            }
        };
        self.recurrent = match listed {
            Some(mut listed) => {
                listed.resize(self.layer_count() as usize, false);
                listed
            }
            None => (0..self.layer_count()).map(recurrent).collect(),
        };
        self.read_states(keys)
    }

    /// `llama_hparams::n_embd_r` and `n_embd_s`, from the keys that the architecture reads.
    fn read_states(&mut self, keys: &Keys<'_>) -> Result<(), EstimateError> {
        let get = |key: &str| Ok::<u32, EstimateError>(keys.u32(key)?.unwrap_or(0));
        let heads = self.heads.first().copied().unwrap_or(0);
        let embedding = self.embedding_length;
        let kernel = get("ssm.conv_kernel")?;
        (self.convolution_state, self.recurrent_state) = match self.architecture.as_str() {
            "rwkv6" | "rwkv6qwen2" | "rwkv7" | "arwkv7" => {
                let shifts = keys.u32("token_shift_count")?.unwrap_or(2);
                let head = get("wkv.head_size")?;
                (product(&[shifts, embedding]), product(&[embedding, head]))
            }
            "lfm2" | "lfm2moe" => {
                let taps = get("shortconv.l_cache")?.saturating_sub(1);
                (product(&[embedding, taps]), 0)
            }
            "kimi-linear" | "kimi-k3" | "bailingmoe3" | "glm5-next" => {
                let head = get("kda.head_dim")?;
                let taps = kernel.checked_sub(1).unwrap_or(3);
                (
                    product(&[3, taps, heads, head]),
                    product(&[head, head, heads]),
                )
            }
            "minimax-01" => (0, product(&[self.key_length, self.key_length, heads])),
            architecture => {
                let (inner, state) = (get("ssm.inner_size")?, get("ssm.state_size")?);
                // Mamba-1 has no groups
                let groups = match architecture {
                    "mamba" | "jamba" => 0,
                    _ => get("ssm.group_count")?,
                };
                let channels = product(&[2, groups, state]).saturating_add(u64::from(inner));
                let taps = u64::from(kernel.saturating_sub(1));
                (taps.saturating_mul(channels), product(&[state, inner]))
            }
        };
        Ok(())
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

/// `GLM_5_2_DEFAULT_INDEXER_TYPES` (src/models/glm-dsa.cpp).
fn glm_5_2_owns_indexer(layer: u32) -> bool {
    layer < 3 || layer.checked_rem(4) == Some(2)
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
