//! Latent attention to the positions that an indexer picks (`deepseek32.cpp`, `glm-dsa.cpp`; `build_attn_inp_k_dsa`).

use super::super::attention::{AttentionInput, CacheInput, Extras};
use super::super::builder::{Builder, NONE, Norm};
use super::super::tensor::{Op, TensorId};
use super::latent::{Latent, absorbed, feed_forward, latents};
use crate::gguf::GgmlType;

/// The inputs of the indexer's cache.
#[derive(Clone, Copy)]
pub(super) struct Indexer {
    ids: TensorId,
    mask: TensorId,
    /// None where queries and keys are compared as they are.
    rotation: TensorId,
    length: i64,
    heads: i64,
    picked: i64,
}

impl Indexer {
    pub(super) fn of(b: &mut Builder<'_>, rotates: bool) -> Self {
        let length = b.number("attention.indexer.key_length", 1);
        let ids = b.key_ids();
        let mask = b.mask(b.batch.cells, GgmlType::F16);
        let mut size = 64;
        while length > 0 && length % (size * 2) == 0 {
            size *= 2;
        }
        Self {
            ids,
            mask,
            rotation: if rotates {
                b.g.input(GgmlType::F32, [size, size, 1, 1])
            } else {
                NONE
            },
            length,
            heads: b.number("attention.indexer.head_count", 1),
            picked: b.number("attention.indexer.top_k", 1).min(b.batch.cells),
        }
    }
}

/// The layers whose indexer picks: those that own one, and the first that attends.
pub(super) fn owners(b: &Builder<'_>, attends: impl Fn(usize) -> bool) -> Vec<usize> {
    let owns = |il: usize| b.hyper.owns_indexer.get(il) == Some(&true);
    let mut layers: Vec<usize> = (0..b.trunk()).filter(|il| attends(*il)).collect();
    let first = layers.first().copied();
    layers.retain(|il| owns(*il) || Some(*il) == first);
    layers
}

/// The layer that picks for layer `il`, if one does.
pub(super) fn owner(owners: &[usize], il: usize) -> usize {
    let behind = owners.partition_point(|owner| *owner <= il);
    owners.get(behind.wrapping_sub(1)).copied().unwrap_or(il)
}

/// `DeepSeek` V3.2 and GLM with sparse attention.
pub(super) fn sparse(b: &mut Builder<'_>) {
    let mut cur = b.embeddings();
    let positions = b.positions();
    let AttentionInput::Cache(cache) = b.attention_input() else {
        return;
    };
    let indexer = Indexer::of(b, true);
    let outputs = b.output_ids();
    let owners = owners(b, |_| true);
    let mut picked = NONE;
    for il in b.layers_by_owner(|il| owner(&owners, il)) {
        b.enter(il);
        let mut residual = cur;
        let normed = b.rms(cur, "attn_norm");
        let low = b.matmul("attn_q_a", normed);
        let low = b.rms_alone(low, "attn_q_a_norm");
        if owner(&owners, il) == il {
            picked = pick(b, normed, low, positions, indexer);
        }
        let mut attended = attend(
            b,
            [normed, low],
            positions,
            cache,
            picked,
            Extras::default(),
        );
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

/// dots 3: an indexer in the dense layers only, sliding layers between them, and a gate per head (`dots3note.cpp`).
pub(super) fn dots3(b: &mut Builder<'_>) {
    let mut cur = b.embeddings();
    let positions = b.positions();
    let AttentionInput::Sliding(dense, sliding) = b.attention_input() else {
        return;
    };
    let indexer = Indexer::of(b, true);
    let outputs = b.output_ids();
    for il in b.layers() {
        b.enter(il);
        let mut residual = cur;
        let normed = b.rms(cur, "attn_norm");
        let low = b.matmul("attn_q_a", normed);
        let low = b.rms_alone(low, "attn_q_a_norm");
        let extras = Extras {
            output: "",
            ..Extras::default()
        };
        let attended = if b.slides() {
            let heads = latent_heads(b, [normed, low], positions);
            let value_expansion = b.weight("attn_v_b");
            b.attend_latent(
                sliding,
                heads,
                Extras {
                    value_expansion,
                    ..extras
                },
            )
        } else {
            let picked = pick(b, normed, low, positions, indexer);
            attend(b, [normed, low], positions, dense, picked, extras)
        };
        let gate = b.matmul("attn_gate", normed);
        let gate = b.g.unary_alone(gate);
        let (values, heads, n_tokens) = (Latent::of(b).values, b.heads(), b.n_tokens);
        let attended = b.g.reshape_3d(attended, values, heads, n_tokens);
        let gate = b.g.reshape_3d(gate, 1, heads, n_tokens);
        let attended = b.g.mul(attended, gate);
        let attended = b.g.reshape_2d(attended, values * heads, n_tokens);
        let mut attended = b.project("attn_output", attended);
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

/// Queries, keys and values in the latent space.
fn latent_heads(
    b: &mut Builder<'_>,
    [normed, low]: [TensorId; 2],
    positions: TensorId,
) -> [TensorId; 3] {
    let sizes = Latent::of(b);
    let (heads, n_tokens) = (b.heads(), b.n_tokens);
    let q = b.matmul("attn_q_b", low);
    let q =
        b.g.reshape_3d(q, sizes.plain + sizes.rotated, heads, n_tokens);
    let parts = latents(b, normed, positions, sizes);
    absorbed(b, q, parts, positions, sizes)
}

/// The positions that every token attends to.
pub(super) fn pick(
    b: &mut Builder<'_>,
    normed: TensorId,
    low: TensorId,
    positions: TensorId,
    i: Indexer,
) -> TensorId {
    let (n_tokens, streams) = (b.n_tokens, b.batch.streams);
    let q = b.matmul("indexer.attn_q_b", low);
    let q = b.g.reshape_3d(q, i.length, i.heads, n_tokens);
    let q = b.rope(q, positions);
    let k = b.matmul("indexer.attn_k", normed);
    let k = b.norm(k, "indexer.k_norm", Norm::Layer);
    let k = b.g.reshape_3d(k, i.length, 1, n_tokens);
    let k = b.rope(k, positions);
    let [q, k] = [q, k].map(|part| {
        if i.rotation.is_some() {
            b.g.mul_mat(i.rotation, part)
        } else {
            part
        }
    });
    let (il, element, cells) = (b.layer(), b.batch.cache_type_k, b.batch.cells);
    let keys = b.cache_tensor(il, element, i.length, cells);
    b.store_rows(keys, k, i.ids);
    let weights = b.matmul("indexer.proj", normed);
    let k = b.read_rows(keys, i.length, 1);
    let [q, weights] = per_stream(b, [q, weights], streams);
    let weights = b.g.unary_alone(weights);
    let scores = b.g.result(
        Op::Other,
        GgmlType::F32,
        [cells, n_tokens / streams, 1, streams],
        &[q, k, weights, i.mask],
    );
    let best = b.g.top_k(scores, i.picked);
    b.g.cont(best)
}

/// An indexer's queries and their weights, by stream.
pub(super) fn per_stream(
    b: &mut Builder<'_>,
    [q, weights]: [TensorId; 2],
    streams: i64,
) -> [TensorId; 2] {
    let ([q0, q1, q2, _], [_, b1, b2, b3]) = (b.g.ne(q), b.g.nb(q));
    let q =
        b.g.view(q, [q0, q1, q2 / streams, streams], [b1, b2, b3 / streams]);
    let ([w0, w1, w2, _], [_, b1, b2, b3]) = (b.g.ne(weights), b.g.nb(weights));
    let weights = b.g.view(
        weights,
        [w0, w1 / streams, w2, streams],
        [b1, b2 / streams, b3 / streams],
    );
    [q, weights]
}

/// `build_attn` with a mask that lets only the picked positions through.
pub(super) fn attend(
    b: &mut Builder<'_>,
    [normed, low]: [TensorId; 2],
    positions: TensorId,
    cache: CacheInput,
    picked: TensorId,
    extras: Extras,
) -> TensorId {
    let heads = latent_heads(b, [normed, low], positions);
    let value_expansion = b.weight("attn_v_b");
    b.attend_latent_masked(
        cache,
        heads,
        Extras {
            value_expansion,
            ..extras
        },
        |b| opened(b, cache.mask, picked, GgmlType::F32),
    )
}

/// `mask`, closed but for the `picked` positions; `element` is that of the zeros which open it.
pub(super) fn opened(
    b: &mut Builder<'_>,
    mask: TensorId,
    picked: TensorId,
    element: GgmlType,
) -> TensorId {
    let closed = b.g.unary(mask);
    let ([n0, n1, _, n3], [b0, b1, b2, _]) = (b.g.ne(closed), b.g.nb(closed));
    let closed = b.g.view(closed, [1, n0, n1, n3], [b0, b1, b2]);
    let ([t0, t1, _, t3], [_, p1, p2, p3]) = (b.g.ne(picked), b.g.nb(picked));
    let ids =
        b.g.view(picked, [t0, t1, t3, 1], [p1, p2, t3.saturating_mul(p3)]);
    let zeros = b.g.blank(element, [1, t0, t1, t3]);
    let zeros = b.g.unary_alone(zeros);
    let opened = b.g.set_rows(closed, zeros, ids);
    let ([_, o1, o2, o3], [_, _, s2, s3]) = (b.g.ne(opened), b.g.nb(opened));
    let opened = b.g.view(opened, [o1, o2, 1, o3], [s2, s3, s3]);
    b.g.add(opened, mask)
}
