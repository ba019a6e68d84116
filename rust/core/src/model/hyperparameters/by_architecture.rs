//! What a header's numbers mean to some architectures alone (`load_arch_hparams` of src/models/*.cpp): windows, indexers, states.

use super::super::architecture::{self, RecurrentRule, SlidingPattern, SlidingRule, SlidingWhen};
use super::super::metadata::Keys;
use super::{Hyperparameters, MOST_PARTS, at, filled, product};
use crate::estimate::EstimateError;

impl Hyperparameters {
    pub(super) fn read_sliding(&mut self, keys: &Keys<'_>) -> Result<(), EstimateError> {
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
    pub(super) fn read_architecture(&mut self, keys: &Keys<'_>) -> Result<(), EstimateError> {
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

    pub(super) fn read_recurrent(&mut self, keys: &Keys<'_>) -> Result<(), EstimateError> {
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

/// `GLM_5_2_DEFAULT_INDEXER_TYPES` (src/models/glm-dsa.cpp).
fn glm_5_2_owns_indexer(layer: u32) -> bool {
    layer < 3 || layer.checked_rem(4) == Some(2)
}
