//! Gemma 3n and 4: an embedding per layer beside the token's own (`gemma3n.cpp`, `gemma4.cpp`).

use super::super::attention::{AttentionInput, Extras};
use super::super::builder::{Activation, Builder, NONE, Norm};
use super::super::experts::{Experts, Gating};
use super::super::tensor::TensorId;

/// The first layers of Gemma 3n keep only the largest activations (`n_layer_sparsity`).
const SPARSE_LAYERS: usize = 10;

/// Streams of embeddings (`n_altup`; no header says otherwise).
const ALTUPS: i64 = 4;

/// The embeddings that every layer gets of its own: `[width, tokens, layers]`.
fn layer_inputs(b: &mut Builder<'_>, embedded: TensorId) -> TensorId {
    let (n_tokens, layers) = (b.n_tokens, b.trunk() as i64);
    let tokens = b.g.input(crate::gguf::GgmlType::I32, [n_tokens, 1, 1, 1]);
    let table = b.input_weight("per_layer_token_embd.weight");
    let width = b.g.ne(table)[0] / layers.max(1);
    let own = b.g.get_rows(table, tokens);
    let own = b.g.reshape_3d(own, width, layers, n_tokens);
    let own = b.g.unary_alone(own);
    b.g.expand(own);
    let weight = b.first_weight("per_layer_model_proj.weight");
    let projected = b.g.mul_mat(weight, embedded);
    let projected = b.g.unary_alone(projected);
    let projected = b.g.reshape_3d(projected, width, layers, n_tokens);
    let weight = b.first_weight("per_layer_proj_norm.weight");
    let projected = b.norm_with(projected, weight, NONE, Norm::Rms);
    let sum = b.g.add(projected, own);
    let sum = b.g.unary_alone(sum);
    let turned = b.g.permute(sum, [0, 2, 1, 3]);
    b.g.cont(turned)
}

/// One of the matrices that lie one behind the other in `a`.
fn slice(b: &mut Builder<'_>, a: TensorId) -> TensorId {
    let ([n0, n1, ..], [_, b1, ..]) = (b.g.ne(a), b.g.nb(a));
    b.g.view_2d(a, n0, n1, b1)
}

/// The layer whose cache this one reads (`llama_kv_cache::layer_reuse_cb` of the model).
fn cache_layer(b: &Builder<'_>) -> Option<usize> {
    let own = b.hyper.layers_with_cache? as usize;
    (b.layer() >= own).then(|| own.saturating_sub(if b.slides() { 2 } else { 1 }))
}

/// Attention with norms on queries, keys and values; of the last layers only the queries are their own.
fn attend(
    b: &mut Builder<'_>,
    input: AttentionInput,
    normed: TensorId,
    positions: TensorId,
    factors: TensorId,
) -> TensorId {
    let (length, heads, kv_heads, n_tokens) = (b.key_length(), b.heads(), b.kv_heads(), b.n_tokens);
    let joint = if b.has("attn_qkv") {
        b.project("attn_qkv", normed)
    } else {
        NONE
    };
    let part = |b: &mut Builder<'_>, name: &str, heads: i64| {
        let flat = if joint.is_some() {
            let stride = b.g.nb(joint)[1];
            let view = b.g.view_2d(joint, length * heads, n_tokens, stride);
            b.g.cont(view)
        } else {
            b.project_biased(name, normed)
        };
        b.g.reshape_3d(flat, length, heads, n_tokens)
    };
    let q = part(b, "attn_q", heads);
    let q = b.rms_alone(q, "attn_q_norm");
    let q = b.g.rope(q, positions, factors);
    let cache_layer = cache_layer(b);
    if cache_layer.is_some() {
        return b.attend(
            input,
            [q, NONE, NONE],
            Extras {
                cache_layer,
                ..Extras::default()
            },
        );
    }
    let k = part(b, "attn_k", kv_heads);
    let v = if joint.is_some() || b.has("attn_v") {
        part(b, "attn_v", kv_heads)
    } else {
        k
    };
    let k = b.rms_alone(k, "attn_k_norm");
    let v = b.g.rms_norm(v);
    let k = b.g.rope(k, positions, factors);
    b.attend(input, [q, k, v], Extras::default())
}

fn capped(b: &Builder<'_>) -> u8 {
    let cap = b.model.float("final_logit_softcapping").unwrap_or(0.0);
    if cap == 0.0 { 0 } else { 3 }
}

pub(super) fn gemma4(b: &mut Builder<'_>) {
    let cur = b.embeddings();
    let mut cur = b.g.unary_alone(cur);
    let positions = b.positions();
    let attention = b.attention_input();
    let outputs = b.output_ids();
    let table = b.input_weight("per_layer_token_embd.weight");
    let inputs = if table.is_some() {
        layer_inputs(b, cur)
    } else {
        NONE
    };
    for il in b.layers() {
        b.enter(il);
        let normed = b.rms(cur, "attn_norm");
        let factors = if b.slides() {
            NONE
        } else {
            b.layer_shared("rope_freqs.weight")
        };
        let attended = attend(b, attention, normed, positions, factors);
        let attended = b.rms_alone(attended, "post_attention_norm");
        let middle = b.g.add_back(attended, cur);
        let fed = if b.has("ffn_gate_inp") {
            experts_beside_dense(b, middle)
        } else {
            let normed = b.rms(middle, "ffn_norm");
            b.ffn(normed, Activation::Gated)
        };
        let fed = b.rms_alone(fed, "post_ffw_norm");
        cur = b.g.add_back(fed, middle);
        if inputs.is_some() {
            let gate = b.matmul("inp_gate", cur);
            let gate = b.g.unary_alone(gate);
            let own = slice(b, inputs);
            let gate = b.g.mul(gate, own);
            let added = b.matmul("proj", gate);
            let added = b.rms_alone(added, "post_norm");
            cur = b.g.add(cur, added);
        }
        let scale = b.weight("layer_output_scale");
        if scale.is_some() {
            cur = b.g.weigh(cur, scale);
        }
    }
    let cur = b.output_norm(cur, Norm::Rms);
    b.g.set_output(cur);
    let cur = b.g.get_rows(cur, outputs);
    let unaries = capped(b);
    b.finish(cur, unaries);
}

/// The router reads the sum itself, experts and the dense block each a norm of it.
fn experts_beside_dense(b: &mut Builder<'_>, middle: TensorId) -> TensorId {
    let normed = b.rms(middle, "ffn_norm");
    let dense = b.ffn(normed, Activation::Gated);
    let dense = b.rms_alone(dense, "post_ffw_norm_1");
    let normed = b.rms(middle, "pre_ffw_norm_2");
    let router = b.g.rms_norm(middle);
    let router = b.g.unary_alone(router);
    let scale = b.scale("ffn_gate_inp");
    let router = b.g.weigh(router, scale);
    let logits = b.matmul("ffn_gate_inp", router);
    let experts = b.experts(Gating::Probabilities, true);
    let mixed = b.mixture(
        normed,
        Experts {
            logits,
            scaled: false,
            ..experts
        },
    );
    let mixed = b.rms_alone(mixed, "post_ffw_norm_2");
    b.g.add(dense, mixed)
}

/// Several streams of embeddings ("altups") go through the layers; the first of them through attention.
pub(super) fn gemma3n(b: &mut Builder<'_>) {
    let cur = b.embeddings();
    let embedded = b.g.unary(cur);
    let positions = b.positions();
    let attention = b.attention_input();
    let inputs = layer_inputs(b, embedded);
    let weight = b.output_weight("altup_proj.weight");
    let (n_embd, n_tokens, others) = (b.n_embd, b.n_tokens, ALTUPS - 1);
    let target = magnitude(b, embedded);
    let repeated = b.g.repeat(embedded, [n_embd, n_tokens, others, 1]);
    let added = b.g.mul_mat(weight, repeated);
    let added = rescaled(b, added, target);
    let mut cur = b.g.concat(embedded, added, 2);
    for il in b.layers_by(|il| u64::from(il < SPARSE_LAYERS)) {
        b.enter(il);
        let predictions = predicted(b, cur);
        let active = slice(b, predictions);
        let middle = attended(b, attention, active, positions);
        let normed = b.rms(middle, "ffn_norm");
        let fed = sparse_feed_forward(b, normed, il < SPARSE_LAYERS);
        let fed = b.rms_alone(fed, "post_ffw_norm");
        let fed = b.g.add_back(fed, middle);
        let corrected = corrected(b, predictions, fed);
        let first = first_prediction(b, corrected, inputs);
        let untouched = slice(b, corrected);
        let rest = rest_of(b, corrected);
        let rest = b.g.add(rest, first);
        cur = b.g.concat(untouched, rest, 2);
    }
    let active = slice(b, cur);
    let target = magnitude(b, active);
    let rest = rest_of(b, cur);
    let weight = b.output_weight("altup_unembd_proj.weight");
    let merged = b.g.mul_mat(weight, rest);
    let merged = rescaled(b, merged, target);
    let mut cur = slice(b, cur);
    for _ in 0..b.g.alike(others) {
        let one = slice(b, merged);
        cur = b.g.add(cur, one);
    }
    let cur = b.g.unary_alone(cur);
    let outputs = b.output_ids();
    let cur = b.g.get_rows(cur, outputs);
    let cur = b.output_norm(cur, Norm::Rms);
    b.finish(cur, 3);
}

fn magnitude(b: &mut Builder<'_>, cur: TensorId) -> TensorId {
    let squares = b.g.unary(cur);
    let sum = b.g.sum_rows(squares);
    b.g.unary_alone(sum)
}

fn rescaled(b: &mut Builder<'_>, cur: TensorId, target: TensorId) -> TensorId {
    let now = magnitude(b, cur);
    let cur = b.g.mul(cur, target);
    b.g.mul(cur, now)
}

/// All streams but the first.
fn rest_of(b: &mut Builder<'_>, cur: TensorId) -> TensorId {
    let ([n0, n1, n2, _], [_, b1, b2, _]) = (b.g.ne(cur), b.g.nb(cur));
    b.g.view_3d(cur, [n0, n1, n2 - 1], [b1, b2])
}

fn router(b: &mut Builder<'_>, cur: TensorId) -> TensorId {
    let normed = b.rms(cur, "altup_router_norm");
    let normed = b.g.unary_alone(normed);
    let out = b.matmul("altup_router", normed);
    b.g.unary_alone(out)
}

/// `altup_predict`: what every stream will be.
fn predicted(b: &mut Builder<'_>, cur: TensorId) -> TensorId {
    let active = slice(b, cur);
    let routed = router(b, active);
    let coefficients = b.matmul("altup_predict_coef", routed);
    let ([_, _, streams, _], n_tokens) = (b.g.ne(cur), b.n_tokens);
    let coefficients = b.g.reshape_3d(coefficients, streams, streams, n_tokens);
    let turned = b.g.permute(cur, [1, 2, 0, 3]);
    let turned = b.g.cont(turned);
    let predictions = b.g.mul_mat(turned, coefficients);
    let predictions = b.g.permute(predictions, [0, 2, 1, 3]);
    let predictions = b.g.cont(predictions);
    b.g.add_back(predictions, cur)
}

/// `altup_correct`: every stream moves as the active one did.
fn corrected(b: &mut Builder<'_>, predictions: TensorId, activated: TensorId) -> TensorId {
    let routed = router(b, activated);
    let active = slice(b, predictions);
    let innovation = b.g.add(activated, active);
    let coefficients = b.matmul("altup_correct_coef", routed);
    let coefficients = b.g.unary_alone(coefficients);
    let coefficients = b.g.transpose(coefficients);
    let [n_embd, n_tokens, streams, _] = b.g.ne(predictions);
    let coefficients = b.g.cont_as(coefficients, [1, n_tokens, streams, 1]);
    let innovation = b.g.repeat(innovation, [n_embd, n_tokens, streams, 1]);
    let moved = b.g.mul(innovation, coefficients);
    b.g.add(moved, predictions)
}

/// Attention beside a low-rank shortcut ("laurel").
fn attended(
    b: &mut Builder<'_>,
    input: AttentionInput,
    active: TensorId,
    positions: TensorId,
) -> TensorId {
    let normed = b.rms(active, "attn_norm");
    let shortcut = b.matmul("laurel_l", normed);
    let shortcut = b.matmul("laurel_r", shortcut);
    let shortcut = b.rms_alone(shortcut, "laurel_post_norm");
    let shortcut = b.g.add_back(shortcut, normed);
    let cur = attend(b, input, normed, positions, NONE);
    let cur = b.rms_alone(cur, "post_attention_norm");
    let cur = b.g.add_back(cur, active);
    let sum = b.g.add(cur, shortcut);
    b.g.unary_alone(sum)
}

fn sparse_feed_forward(b: &mut Builder<'_>, normed: TensorId, sparse: bool) -> TensorId {
    let up = b.matmul("ffn_up", normed);
    let mut gate = b.matmul("ffn_gate", normed);
    if sparse {
        let mean = b.g.sum_rows(gate);
        let centred = b.g.add(gate, mean);
        let squares = b.g.unary_alone(centred);
        let sum = b.g.sum_rows(squares);
        let scaled = b.g.unary_alone(sum);
        let deviation = b.g.unary_alone(scaled);
        let scaled = b.g.unary_alone(deviation);
        let cutoff = b.g.add(mean, scaled);
        let kept = b.g.add(gate, cutoff);
        gate = b.g.unary_alone(kept);
    }
    let gate = b.g.unary_alone(gate);
    let cur = b.g.mul(up, gate);
    b.matmul("ffn_down", cur)
}

/// The layer's own embedding joins the first stream.
fn first_prediction(b: &mut Builder<'_>, corrected: TensorId, inputs: TensorId) -> TensorId {
    let first = slice(b, corrected);
    let scale = b.weight("altup_correct_scale");
    let first = b.g.weigh(first, scale);
    let first = b.matmul("inp_gate", first);
    let first = b.g.unary_alone(first);
    let own = slice(b, inputs);
    let first = b.g.mul(first, own);
    let first = b.matmul("proj", first);
    b.rms_alone(first, "post_norm")
}
