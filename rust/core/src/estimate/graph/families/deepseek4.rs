//! `DeepSeek` V4: attention to a window and to compressed positions, all of them or those that an indexer picks (`deepseek4.cpp`;
//! `llama-kv-cache-dsv4.cpp`).

use super::super::attention::Extras;
use super::super::builder::{Activation, Builder, NONE, Norm};
use super::super::experts::Gating;
use super::super::tensor::{Op, Storage, TensorId};
use super::compressor::{self, Compressor, Names, Source};
use super::streams;
use crate::gguf::GgmlType;

/// Positions per compressed one where an indexer picks (`DSV4_CSA_RATIO`).
pub(super) const PICKED_RATIO: u32 = 4;

/// The same where all are attended to (`DSV4_HCA_RATIO`).
pub(super) const HEAVY_RATIO: u32 = 128;

/// A cache's inputs.
#[derive(Clone, Copy)]
struct Cache {
    mask: TensorId,
    /// None where keys are kept as they are.
    rotation: TensorId,
    cells: i64,
    length: i64,
}

#[derive(Clone, Copy)]
struct Inputs {
    positions: TensorId,
    /// Rows of the window's cache that are written.
    ids: TensorId,
    window: Cache,
    picked: Compressor,
    heavy: Compressor,
    indexer: Compressor,
    picked_cache: Cache,
    heavy_cache: Cache,
    indexer_cache: Cache,
}

impl Inputs {
    /// `build_inp_dsv4`.
    fn of(b: &mut Builder<'_>, positions: TensorId) -> Self {
        let length = b.key_length();
        let indexer_length = b.number("attention.indexer.key_length", 1);
        let ids = b.key_ids();
        let window = b.batch.window_cells_per_slot(b.hyper);
        let few = b.batch.compressed_cells(PICKED_RATIO);
        let fewer = b.batch.compressed_cells(HEAVY_RATIO);
        let element = b.mask_element();
        let window = Cache::of(b, window, length, element);
        let picked = Compressor::of(b, PICKED_RATIO);
        let heavy = Compressor::of(b, HEAVY_RATIO);
        let indexer = Compressor::of(b, PICKED_RATIO);
        Self {
            positions,
            ids,
            window,
            picked,
            heavy,
            indexer,
            picked_cache: Cache::of(b, few, length, element),
            heavy_cache: Cache::of(b, fewer, length, element),
            indexer_cache: Cache::of(b, few, indexer_length, GgmlType::F16),
        }
    }
}

impl Cache {
    fn of(b: &mut Builder<'_>, cells: i64, length: i64, element: GgmlType) -> Self {
        let (n_tokens, slots) = (b.n_tokens, b.n_seqs);
        let mask = b.g.input(element, [cells, n_tokens / slots, 1, slots]);
        let indexer = b.number("attention.indexer.key_length", 1) == length;
        let rotates = indexer || (b.batch.cache_type_k.is_quantized() && length % 64 == 0);
        let mut size = 64;
        while length > 0 && length % (size * 2) == 0 {
            size *= 2;
        }
        let rotation = if rotates {
            b.g.input(GgmlType::F32, [size, size, 1, 1])
        } else {
            NONE
        };
        Self {
            mask,
            rotation,
            cells,
            length,
        }
    }

    /// The current layer's keys.
    fn keys(self, b: &mut Builder<'_>) -> TensorId {
        let storage = Storage::State(b.batch.state_backend(b.layer()));
        let ne = [self.length, self.cells, b.n_seqs, 1];
        b.g.stored(b.batch.cache_type_k, ne, storage)
    }

    fn turned(self, b: &mut Builder<'_>, part: TensorId) -> TensorId {
        if self.rotation.is_some() {
            b.rotate(part, self.rotation)
        } else {
            part
        }
    }
}

pub(super) fn deepseek4(b: &mut Builder<'_>) {
    let embeddings = b.embeddings();
    let positions = b.positions();
    let outputs = b.output_ids();
    let inputs = Inputs::of(b, positions);
    b.g.expand(inputs.window.mask);
    let hyper = b.hyper;
    let ratio = |il: usize| hyper.compress_ratios.get(il).copied().unwrap_or(0);
    let mut cur = streams::spread(b, embeddings);
    let hashed = hashed_layers(b);
    for il in b.layers_by(|il| u64::from(ratio(il)) * 2 + u64::from(il < hashed)) {
        b.enter(il);
        let mixed = streams::before(b, cur, streams::ATTENTION);
        let normed = b.rms_alone(mixed.cur, "attn_norm");
        let attended = attention(b, normed, &inputs, ratio(il));
        let middle = streams::after(b, attended, cur, mixed);
        let mixed = streams::before(b, middle, streams::FEED_FORWARD);
        for part in [middle, mixed.post, mixed.comb] {
            b.g.expand(part);
        }
        let normed = b.rms_alone(mixed.cur, "ffn_norm");
        let fed = feed_forward(b, normed);
        cur = streams::after(b, fed, middle, mixed);
    }
    let rows = streams::pick_rows(b, cur, outputs);
    let gate = streams::head_gate(b, rows);
    let cur = streams::reduce(b, rows, gate);
    let cur = b.output_norm(cur, Norm::Rms);
    b.finish(cur, 0);
}

/// Leading layers whose experts the token decides.
fn hashed_layers(b: &Builder<'_>) -> usize {
    usize::try_from(b.number("hash_layer_count", 0)).unwrap_or(0)
}

/// Experts beside a shared one; in the leading layers the token decides which.
fn feed_forward(b: &mut Builder<'_>, normed: TensorId) -> TensorId {
    let gating = Gating::from_number(b.number("expert_gating_func", 4));
    let mut experts = b.experts(gating, b.model.flag("expert_weights_norm"));
    if b.layer() < hashed_layers(b) {
        let table = b.weight("ffn_gate_tid2eid");
        experts.chosen = b.g.get_rows(table, b.tokens);
    }
    let mixed = b.mixture(normed, experts);
    let shared = b.ffn_named(
        normed,
        ["ffn_up_shexp", "ffn_gate_shexp", "ffn_down_shexp"],
        Activation::Gated,
    );
    b.g.add(mixed, shared)
}

/// `build_attention_impl`.
fn attention(b: &mut Builder<'_>, normed: TensorId, i: &Inputs, ratio: u32) -> TensorId {
    let (length, heads, n_tokens) = (b.key_length(), b.heads(), b.n_tokens);
    let low = b.matmul("attn_q_a", normed);
    let low = b.rms_alone(low, "attn_q_a_norm");
    let q = b.matmul("attn_q_b", low);
    let q = b.g.reshape_3d(q, length, heads, n_tokens);
    let q = b.g.rms_norm(q);
    let q = b.rope(q, i.positions);
    let k = b.matmul("attn_kv", normed);
    let k = b.rms_alone(k, "attn_kv_a_norm");
    let k = b.g.reshape_3d(k, length, 1, n_tokens);
    let k = b.rope(k, i.positions);
    let out = match ratio {
        PICKED_RATIO => {
            compress(b, normed, i.picked, i.picked_cache, compressor::ATTENTION);
            compress(b, normed, i.indexer, i.indexer_cache, compressor::INDEXER);
            let best = pick(b, normed, low, i);
            attend(b, [q, k], i, Some(i.picked_cache), best)
        }
        HEAVY_RATIO => {
            compress(b, normed, i.heavy, i.heavy_cache, compressor::ATTENTION);
            attend(b, [q, k], i, Some(i.heavy_cache), NONE)
        }
        _ => attend(b, [q, k], i, None, NONE),
    };
    let out = b.g.reshape_3d(out, length, heads, n_tokens);
    let out = b.rope(out, i.positions);
    output(b, out)
}

/// Two projections, the first per group of heads.
fn output(b: &mut Builder<'_>, out: TensorId) -> TensorId {
    let (length, heads, n_tokens) = (b.key_length(), b.heads(), b.n_tokens);
    let groups = b.number("attention.output_group_count", 1).max(1);
    let rank = b.number("attention.output_lora_rank", 1);
    let width = heads / groups * length;
    let out = b.g.reshape_3d(out, width, groups, n_tokens);
    let out = b.g.permute(out, [0, 2, 1, 3]);
    let weight = b.weight("attn_output_a");
    // files keep the groups side by side
    b.g.reshape_stored(weight, [width, rank, groups, 1]);
    let out = b.g.mul_mat(weight, out);
    let out = b.g.permute(out, [0, 2, 1, 3]);
    let out = b.g.cont_as(out, [rank * groups, n_tokens, 1, 1]);
    b.matmul("attn_output_b", out)
}

/// The compressor's state takes the batch in, and the cache what it gives.
fn compress(b: &mut Builder<'_>, normed: TensorId, c: Compressor, cache: Cache, names: Names) {
    let source = Source::of(b, normed, c, names);
    let compressed = c.compressed(b, source, names, cache.length);
    let compressed = cache.turned(b, compressed);
    let keys = cache.keys(b);
    b.store_rows(keys, compressed, c.rows);
    c.keep(b, source);
}

/// `build_lid_top_k`.
fn pick(b: &mut Builder<'_>, normed: TensorId, low: TensorId, i: &Inputs) -> TensorId {
    let (n_tokens, slots) = (b.n_tokens, b.n_seqs);
    let cache = i.indexer_cache;
    let heads = b.number("attention.indexer.head_count", 1);
    let q = b.matmul("indexer.attn_q_b", low);
    let q = b.g.reshape_3d(q, cache.length, heads, n_tokens);
    let q = b.rope(q, i.positions);
    let q = cache.turned(b, q);
    let weights = b.matmul("indexer.proj", normed);
    let weights = b.g.unary_alone(weights);
    let keys = cache.keys(b);
    let k = b.read_rows(keys, cache.length, 1);
    let [q, weights] = super::sparse::per_stream(b, [q, weights], slots);
    let scores = b.g.result(
        Op::Other,
        GgmlType::F32,
        [cache.cells, n_tokens / slots, 1, slots],
        &[q, k, weights, cache.mask],
    );
    let count = b.number("attention.indexer.top_k", 1).min(cache.cells);
    let best = b.g.top_k(scores, count);
    b.g.cont(best)
}

/// Attention to the window and, if there is one, a compressed cache; to the `best` positions of that where they are picked.
fn attend(
    b: &mut Builder<'_>,
    [q, k]: [TensorId; 2],
    i: &Inputs,
    compressed: Option<Cache>,
    best: TensorId,
) -> TensorId {
    let q = i.window.turned(b, q);
    let k = i.window.turned(b, k);
    b.g.expand(q);
    b.g.expand(k);
    let keys = i.window.keys(b);
    b.store_rows(keys, k, i.ids);
    let mut k = b.read_rows(keys, i.window.length, 1);
    let mut mask = i.window.mask;
    if let Some(cache) = compressed {
        let keys = cache.keys(b);
        let more = b.read_rows(keys, cache.length, 1);
        k = b.g.concat(k, more, 2);
        let open = if best.is_some() {
            opened(b, cache.mask, best)
        } else {
            cache.mask
        };
        mask = b.g.concat(mask, open, 0);
    }
    let sinks = b.weight("attn_sinks");
    let extras = Extras {
        sinks,
        ..Extras::default()
    };
    let out = b.scores([q, k, k], mask, extras);
    i.window.turned(b, out)
}

/// `build_top_k_mask`.
fn opened(b: &mut Builder<'_>, mask: TensorId, best: TensorId) -> TensorId {
    let element = b.mask_element();
    super::sparse::opened(b, mask, best, element)
}
