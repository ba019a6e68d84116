//! An indexer that picks pools of positions, and its cache (`glm5-next.cpp`; `llama-memory-hybrid-idx.cpp`).

use super::super::builder::{Builder, Norm};
use super::super::tensor::{Op, TensorId};
use crate::gguf::GgmlType;

/// Batches of so few tokens read the picked rows instead of masking the others.
const GATHERED_TOKENS: i64 = 16;

/// Pools are padded to this many, the last one always empty.
const POOL_PADDING: i64 = 64;

/// The inputs of the indexer's cache, which holds a key, a gate and a pooled key per position.
#[derive(Clone, Copy)]
pub(super) struct Pools {
    ids: TensorId,
    /// The cell of each pool's pooled key.
    cells: TensorId,
    /// The members of each pool.
    members: TensorId,
    mask: TensorId,
    /// Positions behind the last full pool.
    tail: TensorId,
    /// Which of the picked slots count.
    pub(super) live: TensorId,
    fresh_members: TensorId,
    fresh_cells: TensorId,
    /// Positions per pool.
    size: i64,
    count: i64,
    fresh: i64,
    picked: i64,
    pub(super) slots: i64,
    has_tail: bool,
}

impl Pools {
    /// `build_inp_kpool`, with every pool of a full cache there and new.
    pub(super) fn of(b: &mut Builder<'_>) -> Self {
        let size = b.number("attention.indexer.kpool", 1).max(1);
        let fresh = b.batch.cells / size * b.batch.sequences;
        let count = (fresh + POOL_PADDING) / POOL_PADDING * POOL_PADDING;
        let has_tail = b.number("attention.indexer.kpool_select_tail", 1) != 0;
        let picked = count.min(b.number("attention.indexer.top_k", 1) / size);
        let slots = size * picked + if has_tail { size - 1 } else { 0 };
        let n_tokens = b.n_tokens;
        let mut input = |element, ne: [i64; 4]| b.g.input(element, ne);
        let ids = input(GgmlType::I64, [n_tokens, 1, 1, 1]);
        let cells = input(GgmlType::I32, [count, 1, 1, 1]);
        let members = input(GgmlType::I32, [size, count, 1, 1]);
        let mask = input(GgmlType::F16, [count, n_tokens, 1, 1]);
        let tail = input(GgmlType::I32, [size - 1, n_tokens, 1, 1]);
        let live = input(GgmlType::F32, [slots, 1, 1, n_tokens]);
        let fresh = fresh.max(1);
        let fresh_members = input(GgmlType::I32, [size, fresh, 1, 1]);
        let fresh_cells = input(GgmlType::I64, [fresh, 1, 1, 1]);
        for part in [cells, members, mask, tail, live] {
            b.g.expand(part);
        }
        Self {
            ids,
            cells,
            members,
            mask,
            tail,
            live,
            fresh_members,
            fresh_cells,
            size,
            count,
            fresh,
            picked,
            slots,
            has_tail,
        }
    }

    /// Whether a batch of `tokens` reads the picked rows.
    pub(super) fn gathers(&self, b: &Builder<'_>, tokens: i64) -> bool {
        tokens <= GATHERED_TOKENS && b.batch.cells > self.slots
    }
}

/// The key, gate and (still empty) pooled key of every token go into the indexer's cache; what is in it now, per pool.
fn pooled(b: &mut Builder<'_>, normed: TensorId, p: Pools) -> TensorId {
    let (length, n_tokens) = (indexer_length(b), b.n_tokens);
    let key = b.matmul("indexer.attn_k", normed);
    let key = b.norm(key, "indexer.k_norm", Norm::Layer);
    let gate = b.matmul("indexer_compressor_gate", normed);
    let both = b.g.concat(key, gate, 0);
    let empty = b.g.blank(GgmlType::F32, [length, n_tokens, 1, 1]);
    let empty = b.g.unary_alone(empty);
    let packed = b.g.concat(both, empty, 0);
    let packed = b.g.reshape_3d(packed, 3 * length, 1, n_tokens);
    let (il, element, cells) = (b.layer(), b.batch.cache_type_k, b.batch.cells);
    let cache = b.cache_tensor(il, element, 3 * length, cells);
    b.store_rows(cache, packed, p.ids);
    let ([_, n1, n2, _], [_, row, ..]) = (b.g.ne(cache), b.g.nb(cache));
    let raw = b.g.view_2d(cache, 2 * length, n1 * n2, row);
    let pooled = b.g.view_2d(cache, length, n1 * n2, row);

    let members = b.g.reshape(p.fresh_members, [p.size * p.fresh, 1, 1, 1]);
    let rows = b.g.get_rows(raw, members);
    let rows = b.g.reshape_3d(rows, 2 * length, p.size, p.fresh);
    let [_, b1, b2, _] = b.g.nb(rows);
    let keys = b.g.view_3d(rows, [length, p.size, p.fresh], [b1, b2]);
    let gates = b.g.view_3d(rows, [length, p.size, p.fresh], [b1, b2]);
    let places = b.weight("indexer_compressor_ape");
    let gates = b.g.add(gates, places);
    let [gates, keys] = [gates, keys].map(|part| b.g.permute(part, [1, 0, 2, 3]));
    let gates = b.g.cont(gates);
    let gates = b.g.reshape_2d(gates, p.size, length * p.fresh);
    let shares = b.g.unary_alone(gates);
    let shares = b.g.reshape_3d(shares, p.size, length, p.fresh);
    let keys = b.g.cont(keys);
    let fresh = b.g.mul(shares, keys);
    let fresh = b.g.sum_rows(fresh);
    let fresh = b.g.reshape_2d(fresh, length, p.fresh);
    let stored = b.g.set_rows(pooled, fresh, p.fresh_cells);
    b.g.expand(stored);
    let all = b.g.get_rows(pooled, p.cells);
    b.g.reshape_3d(all, length, 1, p.count)
}

fn indexer_length(b: &Builder<'_>) -> i64 {
    b.number("attention.indexer.key_length", 1)
}

/// `build_kpool_select`: the picked positions, or the mask that they make.
pub(super) fn pick(
    b: &mut Builder<'_>,
    [normed, low]: [TensorId; 2],
    mask: TensorId,
    p: Pools,
) -> TensorId {
    let n_tokens = b.n_tokens;
    let heads = b.number("attention.indexer.head_count", 1);
    let length = indexer_length(b);
    let q = b.matmul("indexer.attn_q_b", low);
    let q = b.g.reshape_3d(q, length, heads, n_tokens);
    let keys = pooled(b, normed, p);
    let weights = b.matmul("indexer.proj", normed);
    let weights = b.g.unary_alone(weights);
    let scores = b.g.result(
        Op::Other,
        GgmlType::F32,
        [p.count, n_tokens, 1, 1],
        &[q, keys, weights, p.mask],
    );
    let best = b.g.top_k(scores, p.picked);
    let scores = b.g.reshape_3d(scores, 1, p.count, n_tokens);
    let scores = b.g.get_rows(scores, best);
    let scores = b.g.reshape_2d(scores, p.picked, n_tokens);
    let order = b.g.result(
        Op::Other,
        GgmlType::I32,
        [p.picked, n_tokens, 1, 1],
        &[scores],
    );
    let best = b.g.cast(best, GgmlType::F32);
    let best = b.g.reshape_3d(best, 1, p.picked, n_tokens);
    let best = b.g.get_rows(best, order);
    let best = b.g.reshape_2d(best, p.picked, n_tokens);
    let best = b.g.cont(best);
    let best = b.g.cast(best, GgmlType::I32);
    let best = b.g.reshape(best, [p.picked * n_tokens, 1, 1, 1]);
    let picked = b.g.get_rows(p.members, best);
    let mut picked = b.g.reshape_2d(picked, p.size * p.picked, n_tokens);
    if p.has_tail {
        picked = b.g.concat(picked, p.tail, 0);
    }
    if p.gathers(b, n_tokens) {
        picked
    } else {
        opened(b, picked, mask, p)
    }
}

/// A mask that is closed but for the picked positions; slots that do not count open rows of their own behind it.
fn opened(b: &mut Builder<'_>, picked: TensorId, mask: TensorId, p: Pools) -> TensorId {
    let (n_tokens, cells, element) = (b.n_tokens, b.batch.cells, b.g.element(mask));
    let seed = b.g.view_1d(picked, 1);
    let seed = b.g.cast(seed, GgmlType::F32);
    let closed = if element == GgmlType::F32 {
        seed
    } else {
        b.g.cast(seed, element)
    };
    let closed = b.g.unary(closed);
    let closed = b.g.repeat(closed, [1, cells + p.slots, n_tokens, 1]);
    let closed = b.g.reshape_3d(closed, 1, cells + p.slots, n_tokens);
    let zero = b.g.unary(seed);
    let zeros = b.g.repeat(zero, [1, p.slots, n_tokens, 1]);
    let zeros = b.g.reshape_3d(zeros, 1, p.slots, n_tokens);
    let live = b.g.reshape_2d(p.live, p.slots, n_tokens);
    let live = b.g.unary_alone(live);
    let behind =
        b.g.result(Op::Other, GgmlType::F32, [p.slots, 1, 1, 1], &[]);
    let rows = b.g.cast(picked, GgmlType::F32);
    let rows = b.g.add(rows, behind);
    let rows = b.g.mul(rows, live);
    let rows = b.g.add(rows, behind);
    let rows = b.g.cast(rows, GgmlType::I32);
    let rows = b.g.reshape_3d(rows, p.slots, n_tokens, 1);
    let opened = b.g.set_rows(closed, zeros, rows);
    let stride = b.g.nb(opened)[2];
    let opened = b.g.view_2d(opened, cells, n_tokens, stride);
    let mask = b.g.reshape_2d(mask, cells, n_tokens);
    b.g.add(opened, mask)
}
