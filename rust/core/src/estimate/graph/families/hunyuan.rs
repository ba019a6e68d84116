//! Hunyuan 4: streams side by side around gated latent attention, sparse or not (`hy-v4.cpp`).

use super::super::attention::{AttentionInput, CacheInput, Extras};
use super::super::builder::{Builder, NONE, Norm};
use super::super::tensor::TensorId;
use super::latent::{Latent, absorbed, feed_forward, latents};
use super::sparse::{Indexer, attend, owner, owners, pick};
use super::streams;
use crate::gguf::GgmlType;

/// Hunyuan 4: latent attention with a gate, to positions that an indexer picks where the model has one.
pub(super) fn hunyuan(b: &mut Builder<'_>) {
    let embeddings = b.embeddings();
    let positions = b.positions();
    let AttentionInput::Cache(cache) = b.attention_input() else {
        return;
    };
    let indexer = (b.number("attention.indexer.top_k", 0) > 0).then(|| Indexer::of(b, false));
    let outputs = b.output_ids();
    let owners = owners(b, |_| indexer.is_some());
    let mut cur = streams::spread(b, embeddings);
    let mut picked = NONE;
    for il in b.layers_by_owner(|il| owner(&owners, il)) {
        b.enter(il);
        let residual = cur;
        let [mixed, post] = before(b, cur, streams::ATTENTION);
        let normed = b.rms(mixed, "attn_norm");
        let low = b.matmul("attn_q_a", normed);
        let low = b.rms_alone(low, "attn_q_a_norm");
        if let Some(indexer) = indexer
            && owner(&owners, il) == il
        {
            picked = pick(b, normed, low, positions, indexer);
        }
        let attended = gated(b, [normed, low], positions, cache, picked);
        let middle = after(b, attended, residual, post);
        let [mixed, post] = before(b, middle, streams::FEED_FORWARD);
        let normed = b.rms(mixed, "ffn_norm");
        let fed = feed_forward(b, normed);
        cur = after(b, fed, middle, post);
    }
    let rows = streams::pick_rows(b, cur, outputs);
    let gate = streams::head_gate(b, rows);
    let cur = reduced(b, rows, gate);
    let cur = b.output_norm(cur, Norm::Rms);
    b.finish(cur, 0);
}

/// `build_hc_pre`: what the block reads, and the gates of what it gives.
fn before(b: &mut Builder<'_>, x: TensorId, names: [&str; 3]) -> [TensorId; 2] {
    let [weight, scale, base] = names.map(|name| b.weight(name));
    let count = streams::count(b);
    let mixes = streams::coefficients(b, x, weight);
    let pre = streams::gate(b, mixes, [scale, base], count, 2);
    let post = streams::gate(b, mixes, [scale, base], count, 3);
    [reduced(b, x, pre), post]
}

fn reduced(b: &mut Builder<'_>, x: TensorId, gates: TensorId) -> TensorId {
    let x = b.g.cast(x, GgmlType::F32);
    let sum = streams::reduce(b, x, gates);
    b.g.cast(sum, GgmlType::F32)
}

/// `build_hc_post`: every stream with its share of what the block gave.
fn after(b: &mut Builder<'_>, x: TensorId, residual: TensorId, post: TensorId) -> TensorId {
    let [n_embd, n_tokens, ..] = b.g.ne(x);
    let [x, post, residual] = [x, post, residual].map(|part| b.g.cast(part, GgmlType::F32));
    let mut out = NONE;
    for _ in 0..streams::count(b) {
        let [one, gate] = streams::stream(b, residual, post);
        let part = b.g.mul(x, gate);
        let part = b.g.add(one, part);
        let part = b.g.reshape_3d(part, n_embd, 1, n_tokens);
        out = streams::joined(b, out, part);
    }
    b.g.cast(out, GgmlType::F32)
}

fn gated(
    b: &mut Builder<'_>,
    [normed, low]: [TensorId; 2],
    positions: TensorId,
    cache: CacheInput,
    picked: TensorId,
) -> TensorId {
    let extras = Extras {
        sinks: b.weight("attn_sinks"),
        output: "",
        ..Extras::default()
    };
    let attended = if picked.is_some() {
        attend(b, [normed, low], positions, cache, picked, extras)
    } else {
        let sizes = Latent::of(b);
        let (heads, n_tokens) = (b.heads(), b.n_tokens);
        let q = b.matmul("attn_q_b", low);
        let q =
            b.g.reshape_3d(q, sizes.plain + sizes.rotated, heads, n_tokens);
        let parts = latents(b, normed, positions, sizes);
        let heads = absorbed(b, q, parts, positions, sizes);
        let value_expansion = b.weight("attn_v_b");
        b.attend_latent(
            cache,
            heads,
            Extras {
                value_expansion,
                ..extras
            },
        )
    };
    let gate = b.matmul("attn_gate", normed);
    let gate = b.g.unary_alone(gate);
    let attended = b.g.mul(attended, gate);
    b.matmul("attn_output", attended)
}
