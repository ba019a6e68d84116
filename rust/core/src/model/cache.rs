//! What each layer keeps between tokens: the tensors of the KV caches and states.
//!
//! Source: `llama_model::create_memory` (llama-model.cpp) and the constructors in
//! llama-kv-cache*.cpp and llama-memory-*.cpp.

use super::architecture::{self, HybridFilter, Memory};
use super::hyperparameters::{Hyperparameters, at};

/// Compression ratios of `DeepSeek` V4 (`DSV4_CSA_RATIO`, `DSV4_HCA_RATIO`).
const SPARSE_RATIO: u32 = 4;
const HEAVY_RATIO: u32 = 128;

/// The type of a cache tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheElement {
    /// The K cache type of the options.
    Key,
    /// The V cache type of the options.
    Value,
    /// Always f32.
    State,
}

/// How many rows a cache tensor has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheRows {
    /// A cell per token of the context.
    Context,
    /// A cell per token of the sliding window and the micro batch.
    Window,
    /// A cell per so many tokens of the context.
    Compressed(u32),
    /// So many rows for each stream.
    Fixed(u32),
    /// A row per slot.
    Slot,
}

/// One tensor of a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheTensor {
    /// Type of the elements.
    pub element: CacheElement,
    /// Rows per stream.
    pub rows: CacheRows,
    /// Elements of a row.
    pub width: u64,
    /// Elements of a row without flash attention: values are padded to the widest layer.
    pub width_without_flash: u64,
    /// Streams stay separate even with a unified cache.
    pub stream_per_slot: bool,
}

impl CacheTensor {
    fn new(element: CacheElement, rows: CacheRows, width: u64) -> Self {
        Self {
            element,
            rows,
            width,
            width_without_flash: width,
            stream_per_slot: false,
        }
    }

    fn per_slot(mut self) -> Self {
        self.stream_per_slot = true;
        self
    }
}

/// The cache tensors of every layer, in layer order.
pub(super) fn plan(h: &Hyperparameters) -> Vec<Vec<CacheTensor>> {
    let widest_value = (0..h.layer_count())
        .map(|layer| h.value_width(layer))
        .max()
        .unwrap_or(0);
    let memory = architecture::memory_of(&h.architecture);
    (0..h.layer_count())
        .map(|layer| layer_tensors(h, memory, layer, widest_value))
        .collect()
}

fn layer_tensors(
    h: &Hyperparameters,
    memory: Memory,
    layer: u32,
    widest_value: u64,
) -> Vec<CacheTensor> {
    let in_trunk = layer < h.trunk_layers();
    let recurrent = h.is_recurrent(layer);
    let mut tensors = Vec::new();
    let mut attention = |on: bool| {
        if on {
            push_attention(&mut tensors, h, layer, widest_value);
        }
    };
    match memory {
        Memory::None | Memory::SharedWithTarget => {}
        Memory::Attention => attention(keeps_attention(h, layer)),
        Memory::Recurrent => push_state(&mut tensors, h, layer, true),
        Memory::Hybrid(filter) => {
            let (attends, remembers) = match filter {
                HybridFilter::Exclusive => (!recurrent, recurrent),
                HybridFilter::ExclusiveTrunk => (in_trunk && !recurrent, in_trunk && recurrent),
                HybridFilter::Both => (true, true),
                HybridFilter::NoFeedForward => {
                    let bare = at(&h.feed_forward, layer).unwrap_or(0) == 0;
                    (bare && !recurrent, bare && recurrent)
                }
            };
            attention(attends);
            push_state(&mut tensors, h, layer, remembers);
        }
        Memory::HybridIndexer => {
            let attends = in_trunk && !recurrent;
            attention(attends);
            push_state(&mut tensors, h, layer, in_trunk && recurrent);
            if attends && owns_indexer(h, layer) && h.indexer_key_length > 0 {
                let copies = if h.indexer_pool > 0 { 3 } else { 1 };
                let width = u64::from(h.indexer_key_length).saturating_mul(copies);
                tensors.push(CacheTensor::new(
                    CacheElement::Key,
                    CacheRows::Context,
                    width,
                ));
            }
        }
        Memory::SparseIndexer => {
            // full-attention checkpoints of hy_v4 have no indexer at all
            let plain = h.architecture == "hy_v4";
            attention(in_trunk || plain);
            let indexed = if plain { h.indexer_top_k > 0 } else { in_trunk };
            if indexed && owns_indexer(h, layer) {
                push_indexer(&mut tensors, h, layer);
            }
        }
        Memory::SparseIndexerSliding => {
            attention(in_trunk);
            if in_trunk && owns_indexer(h, layer) {
                push_indexer(&mut tensors, h, layer);
            }
        }
        Memory::BlockIndexer => {
            attention(true);
            if owns_indexer(h, layer) {
                push_indexer(&mut tensors, h, layer);
            }
        }
        Memory::Compressed => push_compressed(&mut tensors, h, layer),
    }
    tensors
}

/// Layers of a plain model with a cache of their own: not those that share another's, and
/// not the appended prediction layers (unless there is no trunk, or they are the router).
fn keeps_attention(h: &Hyperparameters, layer: u32) -> bool {
    let shares = h.layers_with_cache.is_some_and(|own| layer >= own);
    let appended = h.prediction_layers > 0 && h.trunk_layers() > 0 && layer >= h.trunk_layers();
    !shares && !appended
}

/// `llama_kv_cache`, of the dense or the sliding layers.
fn push_attention(
    tensors: &mut Vec<CacheTensor>,
    h: &Hyperparameters,
    layer: u32,
    widest_value: u64,
) {
    let rows = if h.is_sliding(layer) {
        CacheRows::Window
    } else {
        CacheRows::Context
    };
    tensors.push(CacheTensor::new(
        CacheElement::Key,
        rows,
        h.key_width(layer),
    ));
    if !h.latent_attention {
        let mut value = CacheTensor::new(CacheElement::Value, rows, h.value_width(layer));
        value.width_without_flash = widest_value;
        tensors.push(value);
    }
}

/// `llama_memory_recurrent`: f32, a row per slot.
fn push_state(tensors: &mut Vec<CacheTensor>, h: &Hyperparameters, layer: u32, on: bool) {
    if !on || layer >= h.trunk_layers() {
        return;
    }
    let state = |width| CacheTensor::new(CacheElement::State, CacheRows::Slot, width);
    tensors.push(state(h.convolution_state));
    tensors.push(state(h.recurrent_state));
    if h.ngram_layer == Some(layer) && h.ngram_state > 0 {
        tensors.push(state(h.ngram_state));
    }
}

fn owns_indexer(h: &Hyperparameters, layer: u32) -> bool {
    at(&h.owns_indexer, layer).unwrap_or(false)
}

/// The second cache of `llama_kv_cache_dsa` and `llama_kv_cache_msa`: one key head of the
/// indexer's size, and values as well where the model is not latent.
fn push_indexer(tensors: &mut Vec<CacheTensor>, h: &Hyperparameters, layer: u32) {
    let width = u64::from(h.indexer_key_length);
    tensors.push(CacheTensor::new(
        CacheElement::Key,
        CacheRows::Context,
        width,
    ));
    if !h.latent_attention {
        let mut value = CacheTensor::new(
            CacheElement::Value,
            CacheRows::Context,
            u64::from(h.value_length_of(layer)),
        );
        value.width_without_flash = u64::from(h.value_length.max(h.value_length_sliding));
        tensors.push(value);
    }
}

/// `llama_kv_cache_dsv4`: a raw sliding cache of keys, compressed caches, and compressor states.
fn push_compressed(tensors: &mut Vec<CacheTensor>, h: &Hyperparameters, layer: u32) {
    let keys = |rows, width: u64| CacheTensor::new(CacheElement::Key, rows, width).per_slot();
    let rows = if h.is_sliding(layer) {
        CacheRows::Window
    } else {
        CacheRows::Context
    };
    tensors.push(keys(rows, h.key_width(layer)));
    let ratio = at(&h.compress_ratios, layer).unwrap_or(0);
    let indexer = u64::from(h.indexer_key_length);
    let head = u64::from(h.key_length_of(0));
    let mut states = |rows: u32, width: u64| {
        for _ in ["kv", "score"] {
            let state = CacheTensor::new(CacheElement::State, CacheRows::Fixed(rows), width);
            tensors.push(state.per_slot());
        }
    };
    let in_trunk = layer < h.trunk_layers();
    if ratio == SPARSE_RATIO {
        if in_trunk {
            states(2 * SPARSE_RATIO, head.saturating_mul(2));
            states(2 * SPARSE_RATIO, indexer.saturating_mul(2));
        }
        let rows = CacheRows::Compressed(ratio);
        tensors.push(keys(rows, h.key_width(layer)));
        tensors.push(keys(rows, indexer));
    } else if ratio == HEAVY_RATIO {
        if in_trunk {
            states(HEAVY_RATIO, head);
        }
        tensors.push(keys(CacheRows::Compressed(ratio), h.key_width(layer)));
    }
}
