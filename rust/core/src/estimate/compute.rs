//! Bytes of the compute buffers.
//!
//! [`graph`](super::graph) plans llama.cpp's own graph. Where it knows no graph, the closed
//! form below stands in: the logits, the widest feed-forward step, the attention scores
//! without flash attention, and the inputs, which pipeline parallelism keeps four times.

use super::context::window_cells;
use super::layout::Layout;
use super::options::{EstimateOptions, Resolved};
use crate::model::ModelFacts;

/// `GGML_SCHED_MAX_COPIES`.
const PIPELINE_COPIES: u64 = 4;
const F32_BYTES: u64 = 4;
const F16_BYTES: u64 = 2;
/// Token, position, output and cache row numbers of one token.
const INDEX_BYTES: u64 = 28;

/// Compute buffers, and whether they are llama.cpp's own to the byte.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ComputeBytes {
    pub(super) devices: Vec<u64>,
    pub(super) host: u64,
    pub(super) exact: bool,
}

pub(super) fn compute_bytes(
    facts: &ModelFacts,
    options: &EstimateOptions,
    resolved: &Resolved,
    layout: &Layout,
) -> ComputeBytes {
    super::graph::compute_bytes(facts, options, resolved, layout)
        .unwrap_or_else(|| closed_form(facts, options, resolved, layout))
}

fn closed_form(
    facts: &ModelFacts,
    options: &EstimateOptions,
    resolved: &Resolved,
    layout: &Layout,
) -> ComputeBytes {
    let sizes = Sizes::new(facts, options, resolved);
    let pipelined = layout.devices > 1
        && layout.layers.iter().all(Option::is_some)
        && layout.output.is_some()
        && options.kv_offload
        && options.cpu_moe_layers == super::CpuMoe::None;
    let copies = if pipelined { PIPELINE_COPIES } else { 1 };
    let body = sizes
        .body
        .saturating_add(sizes.inputs.saturating_mul(copies));
    let devices = (0..layout.devices)
        .map(|device| {
            let has_output = layout.output == Some(device);
            let has_layers = layout.layers.contains(&Some(device));
            let body = if has_layers { body } else { 0 };
            let output = if has_output { sizes.output } else { 0 };
            if has_output && pipelined {
                output
                    .saturating_add(sizes.inputs.saturating_mul(copies))
                    .max(body)
            } else {
                output.max(body)
            }
        })
        .collect();
    let everything_on_host = layout.layers.iter().all(Option::is_none);
    let some_on_host = layout.layers.iter().any(Option::is_none);
    let host_inputs = sizes
        .embedding
        .saturating_add(sizes.inputs.saturating_mul(copies));
    let host = if everything_on_host && layout.output.is_none() {
        sizes.output.max(body)
    } else if some_on_host {
        body
    } else {
        host_inputs
    };
    ComputeBytes {
        devices,
        host,
        exact: false,
    }
}

struct Sizes {
    /// One embedding per token of the micro batch.
    embedding: u64,
    /// What a device is handed with each batch: embeddings, masks and numbers.
    inputs: u64,
    /// The widest step within a layer.
    body: u64,
    /// The logits and what they are made of.
    output: u64,
}

impl Sizes {
    fn new(facts: &ModelFacts, options: &EstimateOptions, resolved: &Resolved) -> Self {
        let h = &facts.hyperparameters;
        let tokens = u64::from(resolved.micro_batch);
        let floats = |width: u64| width.saturating_mul(tokens).saturating_mul(F32_BYTES);
        let embedding = floats(u64::from(h.embedding_length));
        let cells = u64::from(resolved.context_per_slot);
        let mask_bytes = if resolved.flash_attention {
            F16_BYTES
        } else {
            F32_BYTES
        };
        let has_cache = facts.cache.iter().any(|layer| !layer.is_empty());
        let mut masked = if has_cache { cells } else { tokens };
        if let Some((_, window)) = h.sliding_window {
            let pool = options.kv_unified;
            masked = masked.saturating_add(window_cells(window, pool, options, resolved));
        }
        let mask = masked.saturating_mul(tokens).saturating_mul(mask_bytes);
        let inputs = embedding
            .saturating_add(mask)
            .saturating_add(tokens.saturating_mul(INDEX_BYTES));
        let dense = h.feed_forward.iter().copied().max().unwrap_or(0);
        let experts = (h.expert_feed_forward.iter().zip(&h.experts_used))
            .map(|(&width, &used)| u64::from(width).saturating_mul(u64::from(used)))
            .max()
            .unwrap_or(0);
        let widest = u64::from(dense).max(experts);
        let heads = u64::from(h.heads.iter().copied().max().unwrap_or(0));
        let scores = if resolved.flash_attention || !has_cache {
            0
        } else {
            floats(heads.saturating_mul(cells)).saturating_mul(2)
        };
        let body = floats(widest)
            .saturating_mul(3)
            .max(scores)
            .saturating_add(embedding);
        Self {
            embedding,
            inputs,
            body,
            output: u64::from(h.vocabulary_size)
                .saturating_mul(tokens.min(u64::from(resolved.outputs)))
                .saturating_mul(F32_BYTES)
                .saturating_add(embedding),
        }
    }
}
