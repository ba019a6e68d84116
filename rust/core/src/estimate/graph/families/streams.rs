//! Residual streams that run side by side, mixed before and after every block (hyper-connections: `deepseek4.cpp`, `glm5-next.cpp`,
//! `hy-v4.cpp`).

use super::super::builder::{Builder, NONE};
use super::super::ops::Fused;
use super::super::tensor::{Op, TensorId};
use crate::gguf::GgmlType;

/// The projection, scale and base of what attention reads.
pub(super) const ATTENTION: [&str; 3] = ["hc_attn_fn", "hc_attn_scale", "hc_attn_base"];

/// The same of the feed-forward block.
pub(super) const FEED_FORWARD: [&str; 3] = ["hc_ffn_fn", "hc_ffn_scale", "hc_ffn_base"];

/// Every token's embedding, once per stream.
pub(super) fn spread(b: &mut Builder<'_>, embeddings: TensorId) -> TensorId {
    let (n_embd, n_tokens, streams) = (b.n_embd, b.n_tokens, count(b));
    let single = b.g.reshape_3d(embeddings, n_embd, 1, n_tokens);
    b.g.repeat(single, [n_embd, streams, n_tokens, 1])
}

/// `hyper_connection.count`.
pub(super) fn count(b: &Builder<'_>) -> i64 {
    b.number("hyper_connection.count", 1)
}

/// The rows of all streams that give logits.
pub(super) fn pick_rows(b: &mut Builder<'_>, x: TensorId, outputs: TensorId) -> TensorId {
    let (n_embd, n_tokens, streams) = (b.n_embd, b.n_tokens, count(b));
    let flat = b.g.reshape_2d(x, n_embd * streams, n_tokens);
    let flat = b.g.get_rows(flat, outputs);
    let rows = b.g.ne(flat)[1];
    b.g.reshape_3d(flat, n_embd, streams, rows)
}

/// The norm of all streams of a token together, projected to the coefficients.
pub(super) fn coefficients(b: &mut Builder<'_>, x: TensorId, weight: TensorId) -> TensorId {
    let [n_embd, streams, n_tokens, _] = b.g.ne(x);
    let flat = b.g.reshape_2d(x, n_embd * streams, n_tokens);
    let normed = b.g.rms_norm(flat);
    b.g.mul_mat(weight, normed)
}

/// `count` of the coefficients, scaled and shifted, through `unaries` operations.
pub(super) fn gate(
    b: &mut Builder<'_>,
    mixes: TensorId,
    [scale, base]: [TensorId; 2],
    count: i64,
    unaries: u8,
) -> TensorId {
    let ([_, n_tokens, ..], [_, stride, ..]) = (b.g.ne(mixes), b.g.nb(mixes));
    let scale = b.g.view_1d(scale, 1);
    let base = b.g.view_1d(base, count);
    let part = b.g.view_2d(mixes, count, n_tokens, stride);
    let mut gate = affine(b, part, [scale, base]);
    for _ in 0..unaries {
        gate = b.g.unary_alone(gate);
    }
    gate
}

fn affine(b: &mut Builder<'_>, x: TensorId, [scale, base]: [TensorId; 2]) -> TensorId {
    let scaled = b.g.mul(x, scale);
    b.g.weigh(scaled, base)
}

/// The gate of the streams' mean at the end: sigmoid and a bias.
pub(super) fn head_gate(b: &mut Builder<'_>, x: TensorId) -> TensorId {
    let [weight, scale, base] =
        ["fn", "scale", "base"].map(|part| b.output_weight(&format!("output_hc_{part}.weight")));
    let mixes = coefficients(b, x, weight);
    let gate = affine(b, mixes, [scale, base]);
    let gate = b.g.unary_alone(gate);
    b.g.unary_alone(gate)
}

/// One stream of `x`, and its gate.
pub(super) fn stream(b: &mut Builder<'_>, x: TensorId, gates: TensorId) -> [TensorId; 2] {
    let ([n_embd, _, n_tokens, _], [_, _, stride, _]) = (b.g.ne(x), b.g.nb(x));
    let gate_stride = b.g.nb(gates)[1];
    let one = b.g.view_2d(x, n_embd, n_tokens, stride);
    let gate = b.g.view_2d(gates, 1, n_tokens, gate_stride);
    [one, gate]
}

/// The sum of the streams, each times its gate.
pub(super) fn reduce(b: &mut Builder<'_>, x: TensorId, gates: TensorId) -> TensorId {
    let mut sum = NONE;
    for _ in 0..b.g.alike(b.g.ne(x)[1]) {
        let [one, gate] = stream(b, x, gates);
        let part = b.g.mul(one, gate);
        sum = if sum.is_some() {
            b.g.add(sum, part)
        } else {
            part
        };
    }
    sum
}

/// `build_hc_mean`.
pub(super) fn mean(b: &mut Builder<'_>, x: TensorId) -> TensorId {
    let ([n_embd, streams, n_tokens, _], [_, _, stride, _]) = (b.g.ne(x), b.g.nb(x));
    let mut sum = b.g.view_2d(x, n_embd, n_tokens, stride);
    for _ in 1..b.g.alike(streams) {
        let one = b.g.view_2d(x, n_embd, n_tokens, stride);
        sum = b.g.add(sum, one);
    }
    b.g.unary_alone(sum)
}

/// What a block reads, and how what it gives is spread over the streams.
#[derive(Clone, Copy)]
pub(super) struct Mixed {
    pub(super) cur: TensorId,
    pub(super) post: TensorId,
    pub(super) comb: TensorId,
}

/// `build_hc_pre` with its two fused operations, for the block of the weights `names`.
pub(super) fn before(b: &mut Builder<'_>, x: TensorId, names: [&str; 3]) -> Mixed {
    let [weight, scale, base] = names.map(|name| b.weight(name));
    let [n_embd, streams, n_tokens, _] = b.g.ne(x);
    let mixes = coefficients(b, x, weight);
    let pre = gate(b, mixes, [scale, base], streams, 2);
    let post = gate(b, mixes, [scale, base], streams, 2);
    let ne = [streams, streams, n_tokens, 1];
    let comb =
        b.g.result(Op::Other, GgmlType::F32, ne, &[mixes, scale, base]);
    let ne = [n_embd, n_tokens, 1, 1];
    let cur = b.g.result(Op::Other, GgmlType::F32, ne, &[x, pre]);
    Mixed { cur, post, comb }
}

/// `build_hc_post`.
pub(super) fn after(
    b: &mut Builder<'_>,
    x: TensorId,
    residual: TensorId,
    mixed: Mixed,
) -> TensorId {
    let Mixed { post, comb, .. } = mixed;
    if b.batch.fused_spread {
        let ne = b.g.ne(residual);
        let sources = [x, residual, post, comb];
        return b.g.result(Op::Other, GgmlType::F32, ne, &sources);
    }
    let [n_embd, streams, n_tokens, _] = b.g.ne(residual);
    let ([_, post_stride, ..], [_, _, comb_stride, _]) = (b.g.nb(post), b.g.nb(comb));
    let mut out = NONE;
    for _ in 0..streams {
        let gate = b.g.view_2d(post, 1, n_tokens, post_stride);
        let mut cur = b.g.mul(x, gate);
        for _ in 0..streams {
            let [one, _] = stream(b, residual, post);
            let share = b.g.view_2d(comb, 1, n_tokens, comb_stride);
            let part = b.g.mul(one, share);
            cur = b.g.add(cur, part);
        }
        let cur = b.g.reshape_3d(cur, n_embd, 1, n_tokens);
        out = joined(b, out, cur);
    }
    out
}

/// Notes the end of a layer that nothing keeps on the layer's device: one name does (`l_last`; `llama_context::graph_get_cb`).
pub(super) fn may_stray(b: &mut Builder<'_>, end: TensorId) {
    if b.batch.fused_spread {
        b.g.fused.push((Fused::Spread, end, b.layer()));
    }
}

/// `next` behind the streams that there are already.
pub(super) fn joined(b: &mut Builder<'_>, streams: TensorId, next: TensorId) -> TensorId {
    if streams.is_some() {
        b.g.concat(streams, next, 1)
    } else {
        next
    }
}
