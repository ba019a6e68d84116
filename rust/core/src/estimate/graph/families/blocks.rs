//! Sparse attention to the best blocks of positions (`minimax-m3.cpp`; `build_attn_inp_kv_msa`).

use super::super::attention::{AttentionInput, CacheInput, Extras};
use super::super::builder::{Activation, Builder, NONE, Norm};
use super::super::experts::Gating;
use super::super::tensor::{Op, TensorId};
use crate::gguf::GgmlType;

/// Positions of a cache that holds nothing yet, as when buffers are reserved (`llama_kv_cache_msa_context::get_n_pos`).
const FIRST_POSITIONS: i64 = 256;

/// What the sparse layers share.
#[derive(Clone, Copy)]
struct Sparse {
    cache: CacheInput,
    indexer_ids: TensorId,
    /// The mask as 32-bit floats.
    wide_mask: TensorId,
    position_bias: TensorId,
    position_mask: TensorId,
    cells_of_positions: TensorId,
    /// With one token per stream another copy of `cells_of_positions`.
    blocks_of_cells: TensorId,
    positions: i64,
    block: i64,
    /// Tokens per stream.
    tokens: i64,
    length: i64,
    heads: i64,
    picked: i64,
}

impl Sparse {
    /// None where all layers attend densely: without flash attention, and where sequences share a cache.
    fn of(b: &mut Builder<'_>, cache: CacheInput) -> Option<Self> {
        let streams = b.batch.streams;
        if !b.batch.flash_attention || streams != b.n_seqs {
            return None;
        }
        let block = b.number("attention.indexer.block_size", 1).max(1);
        let positions = (FIRST_POSITIONS + block - 1) & !(block - 1);
        let n_tokens = b.n_tokens;
        let indexer_ids = b.key_ids();
        let blocks = positions / block;
        Some(Self {
            cache,
            indexer_ids,
            position_bias: b.g.input(GgmlType::F32, [blocks, n_tokens, 1, 1]),
            position_mask: b.g.input(GgmlType::F32, [positions, n_tokens, 1, 1]),
            cells_of_positions: b.g.input(GgmlType::I32, [positions, streams, 1, 1]),
            blocks_of_cells: if n_tokens == streams {
                b.g.input(GgmlType::F32, [positions, streams, 1, 1])
            } else {
                b.g.input(GgmlType::I32, [cache.cells, streams, 1, 1])
            },
            wide_mask: b.g.cast(cache.mask, GgmlType::F32),
            positions,
            block,
            tokens: n_tokens / streams,
            length: b.number("attention.indexer.key_length", 1),
            heads: b.number("attention.indexer.head_count", 1),
            picked: b.number("attention.indexer.top_k", 1).min(blocks),
        })
    }
}

/// Whether the graph has room for every stream's blocks: llama.cpp gives it 40 nodes a token or 32 a tensor
/// (`llama_context::graph_max_nodes`) and ends where it needs more.
pub(super) fn has_room(b: &Builder<'_>) -> bool {
    const NODES_OF_A_STREAM: i64 = 44;
    const NODES_OF_A_LAYER: i64 = 32 * 32;
    /// As many as an estimate should ever take memory for.
    const MOST_NODES: i64 = 1 << 16;
    let layers = i64::from(b.hyper.layer_count());
    let room = (40 * b.n_tokens).max(NODES_OF_A_LAYER.saturating_mul(layers));
    NODES_OF_A_STREAM * b.batch.streams.saturating_mul(layers) <= room.min(MOST_NODES)
}

/// `MiniMax` M3.
pub(super) fn minimax_m3(b: &mut Builder<'_>) {
    let mut cur = b.embeddings();
    let positions = b.positions();
    let attention = b.attention_input();
    let AttentionInput::Cache(cache) = attention else {
        return;
    };
    let sparse = Sparse::of(b, cache);
    let outputs = b.output_ids();
    let dense = b.hyper.leading_dense_layers as usize;
    for il in b.layers_by(|il| u64::from(il < dense)) {
        b.enter(il);
        let mut residual = cur;
        let normed = b.rms(cur, "attn_norm");
        let [q, k, v] = b.qkv(normed);
        let [q, k] = [(q, "attn_q_norm"), (k, "attn_k_norm")].map(|(part, norm)| b.rms(part, norm));
        let [q, k] = [q, k].map(|part| b.rope(part, positions));
        let mut attended = match sparse.filter(|_| il >= dense) {
            Some(sparse) => attend(b, normed, positions, [q, k, v], sparse),
            None => b.attend(attention, [q, k, v], Extras::default()),
        };
        if b.is_last() {
            b.pick_outputs([&mut attended, &mut residual], outputs);
        }
        let middle = b.g.add_back(attended, residual);
        let normed = b.rms(middle, "ffn_norm");
        let fed = feed_forward(b, normed);
        cur = b.g.add_back(fed, middle);
    }
    let cur = b.output_norm(cur, Norm::Rms);
    b.finish(cur, 0);
}

/// Dense in the leading layers, then experts beside a shared one.
fn feed_forward(b: &mut Builder<'_>, normed: TensorId) -> TensorId {
    if !b.has("ffn_gate_inp") {
        return b.ffn(normed, Activation::Gated);
    }
    let gating = Gating::from_number(b.number("expert_gating_func", 0));
    let experts = b.experts(gating, b.model.flag("expert_weights_norm"));
    let mixed = b.mixture(normed, experts);
    let names = ["ffn_up_shexp", "ffn_gate_shexp", "ffn_down_shexp"];
    let shared = b.ffn_named(normed, names, Activation::Gated);
    b.g.add(mixed, shared)
}

fn attend(
    b: &mut Builder<'_>,
    normed: TensorId,
    positions: TensorId,
    [q, k, v]: [TensorId; 3],
    s: Sparse,
) -> TensorId {
    let n_tokens = b.n_tokens;
    let queries = b.matmul("indexer.q_proj", normed);
    let keys = b.matmul("indexer.k_proj", normed);
    let queries = b.g.reshape_3d(queries, s.length, s.heads, n_tokens);
    let keys = b.g.reshape_3d(keys, s.length, 1, n_tokens);
    let queries = b.rms_alone(queries, "indexer.q_norm");
    let keys = b.rms_alone(keys, "indexer.k_norm");
    let queries = b.rope(queries, positions);
    let keys = b.rope(keys, positions);
    let (il, cells, streams) = (b.layer(), s.cache.cells, b.batch.streams);
    let (key_type, value_type) = (b.batch.cache_type_k, b.batch.cache_type_v);
    let known = b.cache_tensor(il, key_type, s.length, cells);
    b.store_rows(known, keys, s.indexer_ids);
    let indexed = b.read_rows(known, s.length, 1);

    let [q, k] = [q, k].map(|part| b.rotate_if(part, s.cache.key_rotation));
    let v = b.rotate_if(v, s.cache.value_rotation);
    for part in [q, k, v] {
        b.g.expand(part);
    }
    let (key, value, kv_heads) = (b.key_length(), b.value_length(), b.kv_heads());
    let all_keys = b.cache_tensor(il, key_type, key * kv_heads, cells);
    let all_values = b.cache_tensor(il, value_type, value * kv_heads, cells);
    b.store_rows(all_keys, k, s.cache.key_ids);
    b.store_rows(all_values, v, s.cache.value_ids);
    let k = b.read_rows(all_keys, key, kv_heads);
    let v = b.read_rows(all_values, value, kv_heads);

    let heads = b.heads();
    let mut cur = NONE;
    if s.tokens == 1 {
        let (k, v, mask) = gathered(b, [queries, indexed, k, v], s);
        cur = attend_grouped(b, q, [k, v], mask);
    }
    for _ in 0..if s.tokens == 1 { 0 } else { streams } {
        let mask = mask(b, queries, indexed, s);
        let [_, b1, b2, _] = b.g.nb(q);
        let own = b.g.view_3d(q, [key, heads, s.tokens], [b1, b2]);
        let [k, v] = [(k, key), (v, value)].map(|(part, length)| {
            let [_, b1, b2, b3] = b.g.nb(part);
            let part = b.g.view(part, [length, kv_heads, cells, 1], [b1, b2, b3]);
            b.g.permute(part, [0, 3, 1, 2])
        });
        let out = attend_grouped(b, own, [k, v], mask);
        cur = if cur.is_some() {
            b.g.concat(cur, out, 1)
        } else {
            out
        };
    }
    let cur = b.rotate_if(cur, s.cache.value_rotation);
    b.project("attn_output", cur)
}

/// One stream's mask per group of heads: open for the best blocks only.
fn mask(b: &mut Builder<'_>, queries: TensorId, indexed: TensorId, s: Sparse) -> TensorId {
    let (n, cells) = (s.tokens, s.cache.cells);
    let (columns, blocks) = (s.heads * n, s.positions / s.block);
    let [_, b1, b2, _] = b.g.nb(queries);
    let queries = b.g.view_3d(queries, [s.length, s.heads, n], [b1, b2]);
    let row = b.g.nb(indexed)[2];
    let keys = b.g.view_2d(indexed, s.length, cells, row);
    let cells_of_positions = b.g.view_1d(s.cells_of_positions, s.positions);
    let row = b.g.nb(s.position_mask)[1];
    let position_mask =
        b.g.view_3d(s.position_mask, [s.positions, 1, n], [row, row]);
    let blocks_of_cells = b.g.view_1d(s.blocks_of_cells, cells);
    let [_, b1, _, b3] = b.g.nb(s.wide_mask);
    let wide_mask = b.g.view_3d(s.wide_mask, [cells, n, 1], [b1, b3]);
    let row = b.g.nb(s.position_bias)[1];
    let bias = b.g.view_3d(s.position_bias, [blocks, 1, n], [row, row]);

    let keys = b.g.get_rows(keys, cells_of_positions);
    let queries = b.g.reshape_2d(queries, s.length, columns);
    let scores = b.g.mul_mat(keys, queries);
    let scores = b.g.reshape_3d(scores, s.positions, s.heads, n);
    let scores = b.g.add_over(scores, position_mask);
    let pooled =
        b.g.result(Op::Other, GgmlType::F32, [blocks, s.heads, n, 1], &[scores]);
    let biased = b.g.add(pooled, bias);
    let best = b.g.top_k(biased, s.picked);

    let closed = b.g.unary(bias);
    let closed = b.g.cast(closed, GgmlType::F16);
    let closed = b.g.repeat(closed, [blocks, s.heads, n, 1]);
    let zeros = b.g.cast(best, GgmlType::F32);
    let zeros = b.g.unary(zeros);
    let closed = b.g.reshape_3d(closed, 1, blocks, columns);
    let zeros = b.g.reshape_3d(zeros, 1, s.picked, columns);
    let best = b.g.reshape_2d(best, s.picked, columns);
    let opened = b.g.set_rows(closed, zeros, best);
    let opened = b.g.reshape_3d(opened, blocks, s.heads, n);
    let opened = b.g.permute(opened, [0, 2, 1, 3]);
    let opened = b.g.cont(opened);
    let opened = b.g.reshape_2d(opened, blocks, columns);
    let opened = b.g.transpose(opened);
    let opened = b.g.cont(opened);
    let of_cells = b.g.get_rows(opened, blocks_of_cells);
    let of_cells = b.g.transpose(of_cells);
    let of_cells = b.g.cont(of_cells);
    let of_cells = b.g.reshape_3d(of_cells, cells, n, s.heads);
    let masked = b.g.add_over(of_cells, wide_mask);
    let masked = b.g.reshape(masked, [cells, n, 1, s.heads]);
    b.g.cast(masked, GgmlType::F16)
}

/// One token per stream: keys, values and mask of the best blocks alone, as many as there are streams and groups of heads.
fn gathered(
    b: &mut Builder<'_>,
    [queries, indexed, k, v]: [TensorId; 4],
    s: Sparse,
) -> (TensorId, TensorId, TensorId) {
    let (streams, cells, kv_heads) = (b.batch.streams, s.cache.cells, b.kv_heads());
    let (blocks, picked) = (s.positions / s.block, s.block * s.picked);
    let [_, _, b2, b3] = b.g.nb(indexed);
    let keys = b.g.view_3d(indexed, [s.length, cells, streams], [b2, b3]);
    let keys = b.g.get_rows(keys, s.cells_of_positions);
    let queries = b.g.reshape(queries, [s.length, s.heads, 1, streams]);
    let keys = b.g.reshape(keys, [s.length, s.positions, 1, streams]);
    let scores = b.g.mul_mat(keys, queries);
    let open = b.g.reshape(s.position_mask, [s.positions, 1, 1, streams]);
    let scores = b.g.add_over(scores, open);
    let ne = [blocks, s.heads, 1, streams];
    let pooled = b.g.result(Op::Other, GgmlType::F32, ne, &[scores]);
    let bias = b.g.reshape(s.position_bias, [blocks, 1, 1, streams]);
    let biased = b.g.add(pooled, bias);
    let best = b.g.top_k(biased, s.picked);

    let best = b.g.cast(best, GgmlType::F32);
    let best = b.g.unary_alone(best);
    let best = b.g.reshape(best, [1, s.picked, s.heads, streams]);
    let best = b.g.repeat(best, [s.block, s.picked, s.heads, streams]);
    let counted = |b: &mut Builder<'_>, base: TensorId, shape: [i64; 3]| {
        let length = shape.iter().product();
        let steps = b.g.result(Op::Other, GgmlType::F32, [length, 1, 1, 1], &[]);
        let [n0, n1, n2] = shape;
        let steps = b.g.reshape_3d(steps, n0, n1, n2);
        let sum = b.g.add(base, steps);
        let flat = b.g.reshape_2d(sum, picked * s.heads, streams);
        b.g.cast(flat, GgmlType::I32)
    };
    let of_positions = counted(b, best, [s.block, 1, 1]);
    let table = b.g.reshape_3d(s.blocks_of_cells, 1, s.positions, streams);
    let found = b.g.get_rows(table, of_positions);
    let found = b.g.reshape(found, [s.block, s.picked, s.heads, streams]);
    let found = b.g.unary_alone(found);
    let of_rows = counted(b, found, [1, 1, kv_heads]);
    let [k, v] = [k, v].map(|part| {
        let (element, [length, ..], [_, b1, _, b3]) =
            (b.g.element(part), b.g.ne(part), b.g.nb(part));
        let rows =
            b.g.view_3d(part, [length, kv_heads * cells, streams], [b1, b3]);
        let rows = b.g.get_rows(rows, of_rows);
        let rows = b.g.reshape(rows, [length, picked, 1, s.heads * streams]);
        if element == GgmlType::F32 {
            rows
        } else if element.is_quantized() {
            b.g.cast(rows, GgmlType::F16)
        } else {
            b.g.cast(rows, element)
        }
    });
    let mask = b.g.reshape_3d(s.position_mask, 1, s.positions, streams);
    let mask = b.g.get_rows(mask, of_positions);
    let mask = b.g.reshape(mask, [picked, 1, 1, s.heads * streams]);
    (k, v, b.g.cast(mask, GgmlType::F16))
}

/// `build_attn_msa_fa`: groups of heads are what sequences are elsewhere.
fn attend_grouped(
    b: &mut Builder<'_>,
    q: TensorId,
    [k, v]: [TensorId; 2],
    mask: TensorId,
) -> TensorId {
    let ([length, heads, tokens, _], groups) = (b.g.ne(q), b.g.ne(k)[3].max(1));
    let q = b.g.reshape(q, [length, heads / groups, groups, tokens]);
    let q = b.g.permute(q, [0, 2, 3, 1]);
    let out = b.g.flash_attention([q, k, v, mask, NONE]);
    let mut out = b.g.permute(out, [0, 1, 3, 2]);
    if !b.g.get(out).is_contiguous() {
        out = b.g.cont(out);
    }
    b.g.reshape_2d(out, length * heads, tokens)
}
