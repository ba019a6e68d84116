//! Bytes of the KV caches and recurrent states.
//!
//! Source: llama-kv-cache.cpp, llama-kv-cache-iswa.cpp, llama-kv-cache-dsv4.cpp and
//! llama-memory-recurrent.cpp (their constructors).

use super::options::{Backend, EstimateOptions, Resolved};
use crate::gguf::GgmlType;
use crate::model::weights::{HOST_ALIGNMENT, align, cuda_bytes};
use crate::model::{CacheElement, CacheRows, CacheTensor, ModelFacts};

/// Sliding and compressed caches are padded to a multiple of this many cells.
const CELL_STEP: u64 = 256;

/// Bytes that a layer's caches take on a device and on the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ContextBytes {
    pub(super) device: u64,
    pub(super) host: u64,
}

/// Cells of a stream of a sliding layer (`llama_kv_cache_iswa`).
pub(super) fn window_cells(
    window: u32,
    pool: bool,
    options: &EstimateOptions,
    resolved: &Resolved,
) -> u64 {
    let context = u64::from(resolved.context_per_slot);
    if options.swa_full {
        return context;
    }
    let slots = if pool { resolved.slots } else { 1 };
    let needed = u64::from(window)
        .saturating_mul(u64::from(slots))
        .saturating_add(u64::from(resolved.micro_batch));
    align(context.min(needed), CELL_STEP)
}

/// Cells of a stream of a compressed cache (`llama_kv_cache_dsv4`).
pub(super) fn compressed_cells(ratio: u32, resolved: &Resolved) -> u64 {
    let context = u64::from(resolved.context_per_slot);
    align(context.div_ceil(u64::from(ratio.max(1))).max(1), CELL_STEP)
}

/// Each layer's bytes, in layer order.
pub(super) fn layer_contexts(
    facts: &ModelFacts,
    options: &EstimateOptions,
    resolved: &Resolved,
) -> Vec<ContextBytes> {
    let bytes = |tensor: &CacheTensor| tensor_bytes(tensor, facts, options, resolved);
    facts
        .cache
        .iter()
        .map(|tensors| {
            tensors
                .iter()
                .map(bytes)
                .fold(ContextBytes::default(), |sum, one| ContextBytes {
                    device: sum.device.saturating_add(one.device),
                    host: sum.host.saturating_add(one.host),
                })
        })
        .collect()
}

/// What the server copies of one slot to the host as a checkpoint (`create_checkpoint`,
/// tools/server/server-context.cpp): what cannot be rolled back, that is the window of sliding
/// layers and the states of recurrent ones.
pub(super) fn checkpoint_bytes(
    facts: &ModelFacts,
    options: &EstimateOptions,
    resolved: &Resolved,
) -> u64 {
    let (context, window) = (
        u64::from(resolved.context_per_slot),
        facts.hyperparameters.sliding_window.map_or(0, |(_, n)| n),
    );
    let bytes = |tensor: &CacheTensor| {
        let rows = match tensor.rows {
            CacheRows::Window if !options.swa_full => context.min(window.into()),
            CacheRows::Slot => 1,
            CacheRows::Fixed(rows) => u64::from(rows),
            CacheRows::Window | CacheRows::Context | CacheRows::Compressed(_) => 0,
        };
        let (element, width) = element_of(tensor, options, resolved);
        let row = element.row_bytes(width).unwrap_or(u64::MAX);
        row.saturating_mul(rows)
    };
    let all = facts.cache.iter().flatten().map(bytes);
    all.fold(0, u64::saturating_add)
}

fn element_of(
    tensor: &CacheTensor,
    options: &EstimateOptions,
    resolved: &Resolved,
) -> (GgmlType, u64) {
    let element = match tensor.element {
        CacheElement::Key => options.cache_type_k,
        CacheElement::Value => options.cache_type_v,
        CacheElement::State => GgmlType::F32,
    };
    let width = if resolved.flash_attention {
        tensor.width
    } else {
        tensor.width_without_flash
    };
    (element, width)
}

fn tensor_bytes(
    tensor: &CacheTensor,
    facts: &ModelFacts,
    options: &EstimateOptions,
    resolved: &Resolved,
) -> ContextBytes {
    let (element, width) = element_of(tensor, options, resolved);
    let streams = if tensor.stream_per_slot {
        resolved.slots
    } else {
        resolved.streams
    };
    let context = u64::from(resolved.context_per_slot);
    let state_copies = resolved.rollback_tokens.saturating_add(1);
    let window = facts
        .hyperparameters
        .sliding_window
        .map_or(0, |(_, window)| window);
    let (rows, streams) = match tensor.rows {
        CacheRows::Context => (context, streams),
        CacheRows::Window => {
            let pool = options.kv_unified && !tensor.stream_per_slot;
            (window_cells(window, pool, options, resolved), streams)
        }
        CacheRows::Compressed(ratio) => (compressed_cells(ratio, resolved), streams),
        CacheRows::Fixed(rows) => (u64::from(rows), streams.saturating_mul(state_copies)),
        CacheRows::Slot => (u64::from(resolved.slots), state_copies),
    };
    let bytes = element
        .row_bytes(width)
        .unwrap_or(u64::MAX)
        .saturating_mul(rows)
        .saturating_mul(u64::from(streams));
    let host = align(bytes, HOST_ALIGNMENT);
    let device = match options.backend {
        Backend::Generic => host,
        Backend::Cuda => cuda_bytes(element, width, bytes),
    };
    ContextBytes { device, host }
}
