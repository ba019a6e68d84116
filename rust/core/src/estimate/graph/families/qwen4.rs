//! Qwen 4: residual streams around delta layers and attention to the best blocks of positions (`qwen4exp.cpp`,
//! `llama-memory-hybrid-idx.cpp`).

use super::super::attention::{AttentionInput, CacheInput, Extras};
use super::super::builder::{Builder, NONE};
use super::super::tensor::{Op, TensorId};
use super::delta;
use super::hybrid::Inputs;
use super::{ngram, sparse, streams};
use crate::gguf::GgmlType;

/// With fewer tokens than this in a batch, a layer's end stays on the layer's device by its name (`llama_context::graph_get_cb`).
const PINNED_BELOW: i64 = 32;

/// The inputs of all layers that pool positions alike.
#[derive(Clone, Copy)]
struct Indexer {
    /// Positions of a block.
    ratio: i64,
    ids: TensorId,
    blocks_of_cells: TensorId,
    cells_of_blocks: TensorId,
    positions_of_blocks: TensorId,
    bias: TensorId,
    blocks: i64,
    length: i64,
    heads: i64,
    picked: i64,
}

impl Indexer {
    fn of(b: &mut Builder<'_>, ratio: i64) -> Self {
        let (cells, streams) = (b.batch.cells, b.batch.streams);
        let blocks = (cells + ratio - 1) / ratio;
        let tokens = b.n_tokens / streams;
        let top = b.number("attention.indexer.top_k", 1);
        Self {
            ratio,
            ids: b.key_ids(),
            blocks_of_cells: b.g.input(GgmlType::I32, [cells, streams, 1, 1]),
            cells_of_blocks: b.g.input(GgmlType::I32, [ratio * blocks, streams, 1, 1]),
            positions_of_blocks: b.g.input(GgmlType::I32, [4 * blocks * streams, 1, 1, 1]),
            bias: b.g.input(GgmlType::F32, [blocks, tokens, streams, 1]),
            blocks,
            length: b.number("attention.indexer.key_length", 1),
            heads: b.number("attention.indexer.head_count", 1),
            picked: cells.min(top + ratio - 1),
        }
    }
}

pub(super) fn qwen4(b: &mut Builder<'_>) {
    let embeddings = b.embeddings();
    let inputs = Inputs::of(b);
    let AttentionInput::Cache(cache) = inputs.attention else {
        return;
    };
    let model = b.model;
    let ratio = |il: usize| match model.array("attention.compress_ratios") {
        Some(ratios) => ratios.get(il).map_or(0, |ratio| *ratio as i64),
        None => model.number("attention.compress_ratios", 0),
    };
    let grams = ngram::embeddings(b);
    let mut indexers: Vec<Indexer> = Vec::new();
    for il in 0..b.trunk() {
        let known = indexers.iter().any(|known| known.ratio == ratio(il));
        if ratio(il) > 0 && !known && !b.hyper.is_recurrent(il as u32) {
            let fresh = Indexer::of(b, ratio(il));
            indexers.push(fresh);
        }
    }
    let mut cur = streams::spread(b, embeddings);
    for il in b.layers_by(|il| ratio(il).unsigned_abs()) {
        b.enter(il);
        if b.has("ple_key") {
            cur = ngram::added(b, inputs.states, grams, cur);
        }
        let [mixed, mut inject] = mix(b, cur, ATTENTION);
        b.g.expand(mixed);
        let mut given = if b.hyper.is_recurrent(il as u32) {
            delta::linear(b, inputs.states, mixed)
        } else {
            let indexer = indexers
                .iter()
                .find(|known| known.ratio == ratio(il))
                .copied();
            attend(b, mixed, inputs, cache, indexer)
        };
        if b.is_last() {
            b.pick_outputs([&mut given, &mut inject], inputs.outputs);
            cur = streams::pick_rows(b, cur, inputs.outputs);
        }
        let middle = combined(b, cur, given, inject);
        let [mixed, inject] = mix(b, middle, FEED_FORWARD);
        let fed = delta::feed_forward(b, mixed);
        cur = combined(b, middle, fed, inject);
        if b.n_seqs >= PINNED_BELOW {
            streams::may_stray(b, cur);
        }
    }
    let cur = head(b, cur);
    b.finish(cur, 0);
}

/// The streams, normed one by one, and their gates.
fn gated(b: &mut Builder<'_>, x: TensorId, [norm, down, up]: [TensorId; 3]) -> [TensorId; 2] {
    let [n_embd, streams, rows, _] = b.g.ne(x);
    let normed = b.g.rms_norm(x);
    let normed = b.g.weigh(normed, norm);
    let normed = b.g.reshape_2d(normed, n_embd * streams, rows);
    let low = b.g.mul_mat(down, normed);
    let low = b.g.unary_alone(low);
    let low = b.g.unary_alone(low);
    [normed, b.g.mul_mat(up, low)]
}

/// The weights of what attention reads: norm, gate down and up, shares.
const ATTENTION: [&str; 4] = [
    "hc_attn_norm",
    "hc_attn_down",
    "hc_attn_up",
    "hc_attn_inject",
];

/// The same of the feed-forward block.
const FEED_FORWARD: [&str; 4] = ["hc_ffn_norm", "hc_ffn_down", "hc_ffn_up", "hc_ffn_inject"];

/// `build_hc_mix` in one operation: what a block reads, and the weights by which the streams take what it gives.
fn mix(b: &mut Builder<'_>, x: TensorId, names: [&str; 4]) -> [TensorId; 2] {
    let [n_embd, streams, rows, _] = b.g.ne(x);
    let [norm, down, up, inject] = names.map(|name| b.weight(name));
    let [normed, gate] = gated(b, x, [norm, down, up]);
    let sources = [normed, gate].map(|part| b.g.reshape_3d(part, n_embd, streams, rows));
    let mixed =
        b.g.result(Op::Other, GgmlType::F32, [n_embd, rows, 1, 1], &sources);
    [mixed, b.g.mul_mat(inject, normed)]
}

/// The same for the output, in elementary operations.
fn head(b: &mut Builder<'_>, x: TensorId) -> TensorId {
    let [n_embd, streams, rows, _] = b.g.ne(x);
    let weights =
        ["norm", "down", "up"].map(|part| b.output_weight(&format!("output_hc_{part}.weight")));
    let [normed, gate] = gated(b, x, weights);
    let gate = b.g.unary_alone(gate);
    let all = b.g.mul(normed, gate);
    let all = b.g.reshape_3d(all, n_embd, streams, rows);
    let stride = b.g.nb(all)[2];
    let first = b.g.view_2d(all, n_embd, rows, stride);
    let mut sum = b.g.cont(first);
    for _ in 1..b.g.alike(streams) {
        let one = b.g.view_2d(all, n_embd, rows, stride);
        sum = b.g.add(sum, one);
    }
    b.g.unary_alone(sum)
}

/// `build_hc_combine`.
fn combined(b: &mut Builder<'_>, x: TensorId, given: TensorId, inject: TensorId) -> TensorId {
    let mut weights = inject;
    for _ in 0..3 {
        weights = b.g.unary_alone(weights);
    }
    let ne = b.g.ne(x);
    if b.batch.fused_spread {
        return b
            .g
            .result(Op::Other, GgmlType::F32, ne, &[given, x, weights]);
    }
    let [n_embd, streams, rows, _] = ne;
    let weights = b.g.reshape_3d(weights, 1, streams, rows);
    let given = b.g.reshape_3d(given, n_embd, 1, rows);
    let given = b.g.repeat(given, ne);
    let given = b.g.mul(given, weights);
    b.g.add(x, given)
}

/// Attention whose queries come with a gate each; without an indexer to all positions.
fn attend(
    b: &mut Builder<'_>,
    cur: TensorId,
    inputs: Inputs,
    mut cache: CacheInput,
    indexer: Option<Indexer>,
) -> TensorId {
    if let Some(indexer) = indexer {
        let picked = pick(b, cur, inputs, cache, indexer);
        cache.mask = sparse::opened(b, cache.mask, picked, GgmlType::F32);
    }
    let (length, heads, kv_heads, n_tokens) = (b.key_length(), b.heads(), b.kv_heads(), b.n_tokens);
    let [both, k, v] = ["attn_q", "attn_k", "attn_v"].map(|name| b.project(name, cur));
    let row = length * 2 * 4;
    let [q, gate] = [(); 2].map(|()| {
        b.g.view_3d(
            both,
            [length, heads, n_tokens],
            [row, row.saturating_mul(heads)],
        )
    });
    let q = b.rms_alone(q, "attn_q_norm");
    let k = b.g.reshape_3d(k, length, kv_heads, n_tokens);
    let k = b.rms_alone(k, "attn_k_norm");
    let gate = b.g.cont_as(gate, [length * heads, n_tokens, 1, 1]);
    let v = b.g.reshape_3d(v, length, kv_heads, n_tokens);
    let [q, k] = [q, k].map(|part| b.rope(part, inputs.positions));
    let extras = Extras {
        output: "",
        ..Extras::default()
    };
    let cur = b.attend(AttentionInput::Cache(cache), [q, k, v], extras);
    let gate = b.g.unary_alone(gate);
    let cur = b.g.mul(cur, gate);
    b.project("attn_output", cur)
}

/// `build_qsa_top_k`: the positions of the best blocks.
fn pick(
    b: &mut Builder<'_>,
    cur: TensorId,
    inputs: Inputs,
    cache: CacheInput,
    i: Indexer,
) -> TensorId {
    let (il, n_tokens, streams, cells) = (b.layer(), b.n_tokens, b.batch.streams, cache.cells);
    let tokens = n_tokens / streams;
    let keys = b.matmul("indexer.k_proj", cur);
    let keys = b.g.reshape_3d(keys, i.length, 1, n_tokens);
    let known = b.cache_tensor(il, b.batch.cache_type_k, i.length, cells);
    b.store_rows(known, keys, i.ids);
    let known = b.read_rows(known, i.length, 1);
    let [_, _, b2, b3] = b.g.nb(known);
    let known = b.g.view_3d(known, [i.length, cells, streams], [b2, b3]);
    let members = b.g.get_rows(known, i.cells_of_blocks);
    let members = b.g.reshape(members, [i.length, i.ratio, i.blocks, streams]);
    let [_, _, b2, b3] = b.g.nb(members);
    let mut pooled = NONE;
    for _ in 0..b.g.alike(i.ratio) {
        let slice =
            b.g.view_3d(members, [i.length, i.blocks, streams], [b2, b3]);
        let slice = b.g.cont(slice);
        pooled = if pooled.is_some() {
            b.g.add(pooled, slice)
        } else {
            slice
        };
    }
    let pooled = b.g.unary_alone(pooled);
    let pooled = b.g.reshape_3d(pooled, i.length, i.blocks * streams, 1);
    let pooled = b.rms_alone(pooled, "indexer.k_norm");
    let pooled = b.g.reshape_3d(pooled, i.length, 1, i.blocks * streams);
    let pooled = b.rope(pooled, i.positions_of_blocks);
    let pooled = b.g.reshape_3d(pooled, i.length, i.blocks, streams);

    let queries = b.matmul("indexer.q_proj", cur);
    let queries = b.g.reshape_3d(queries, i.length, i.heads, n_tokens);
    let queries = b.rms_alone(queries, "indexer.q_norm");
    let queries = b.rope(queries, inputs.positions);
    let queries = b.g.reshape_3d(queries, i.length, i.heads * tokens, streams);
    let scores = b.g.mul_mat(pooled, queries);
    let scores = b.g.reshape(scores, [i.blocks, i.heads, tokens, streams]);
    let scores = b.g.unary_alone(scores);
    let [_, _, b2, b3] = b.g.nb(scores);
    let mut sum = NONE;
    for _ in 0..b.g.alike(i.heads) {
        let slice = b.g.view_3d(scores, [i.blocks, tokens, streams], [b2, b3]);
        sum = if sum.is_some() {
            b.g.add(sum, slice)
        } else {
            b.g.cont(slice)
        };
    }
    let scores = b.g.add(sum, i.bias);
    let turned = b.g.permute(scores, [1, 0, 2, 3]);
    let turned = b.g.cont(turned);
    let of_cells = b.g.get_rows(turned, i.blocks_of_cells);
    let of_cells = b.g.permute(of_cells, [1, 0, 2, 3]);
    let of_cells = b.g.cont(of_cells);
    let mask = if b.g.element(cache.mask) == GgmlType::F32 {
        cache.mask
    } else {
        b.g.cast(cache.mask, GgmlType::F32)
    };
    let mask = b.g.reshape_3d(mask, cells, tokens, streams);
    let of_cells = b.g.add(of_cells, mask);
    let best = b.g.top_k(of_cells, i.picked);
    let best = b.g.cont(best);
    b.g.reshape(best, [i.picked, tokens, 1, streams])
}
