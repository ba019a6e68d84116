//! Draft heads that bring their own embeddings and output matrix (`eagle3.cpp`, `dflash.cpp`). They read hidden states of the model that
//! they draft for, and every row gives logits.

use super::super::attention::Extras;
use super::super::builder::{Activation, Builder, NONE, Norm};
use super::super::tensor::TensorId;
use crate::gguf::GgmlType;

/// Whether llama.cpp loads this head without its model, and it has none of the rarer parts: a vocabulary of its own, Markov and selector
/// heads, hyper-connections.
pub(super) fn stands_alone(b: &Builder<'_>) -> bool {
    let has = |name: &str| b.model.shared(name).is_some();
    has("token_embd.weight")
        && (has("output.weight") || b.model.architecture() == "dflash")
        && !has("d2t")
        && !has("markov_w1.weight")
        && b.number("selector_rank", 0) == 0
        && b.hyper.hyper_connections == 0
}

/// EAGLE 3: one layer on tokens and hidden states side by side.
pub(super) fn eagle(b: &mut Builder<'_>) {
    let (n_embd, n_tokens) = (b.n_embd, b.n_tokens);
    let tokens = b.g.input(GgmlType::I32, [n_tokens, 1, 1, 1]);
    let hidden = b.g.input(GgmlType::F32, [n_embd, n_tokens, 1, 1]);
    let table = b.input_weight("token_embd.weight");
    let embedded = b.g.get_rows(table, tokens);
    let positions = b.positions();
    let attention = b.attention_input();
    b.enter(0);
    let embedded = b.rms_alone(embedded, "attn_norm");
    let normed = b.rms(hidden, "attn_norm_2");
    let residual = if b.model.flag("norm_before_residual") {
        normed
    } else {
        hidden
    };
    let both = b.g.concat(embedded, normed, 0);
    let [q, k, v] = b.qkv(both);
    let factors = b.rope_factors();
    let [q, k] = [q, k].map(|part| b.g.rope(part, positions, factors));
    let attended = b.attend(attention, [q, k, v], Extras::default());
    let middle = b.g.add_back(attended, residual);
    let normed = b.rms(middle, "ffn_norm");
    let fed = b.ffn(normed, Activation::Gated);
    let cur = b.g.add_back(fed, middle);
    b.g.set_output(cur);
    let cur = b.output_norm(cur, Norm::Rms);
    b.finish_with(cur, 0);
}

/// `DFlash`: a block of tokens at once.
pub(super) fn dflash(b: &mut Builder<'_>) {
    let positions = b.positions();
    let attention = b.attention_input();
    let n_tokens = b.n_tokens;
    let tokens = b.g.input(GgmlType::I32, [n_tokens, 1, 1, 1]);
    let table = b.input_weight("token_embd.weight");
    let mut cur = b.g.get_rows(table, tokens);
    if b.model.float("embedding_scale").unwrap_or(0.0) != 0.0 {
        cur = b.g.unary_alone(cur);
    }
    let scales = b.model.float("attention.value_scale").unwrap_or(0.0) != 0.0;
    for il in b.layers() {
        b.enter(il);
        let normed = b.rms(cur, "attn_norm");
        let heads = heads(b, normed, positions);
        let extras = Extras {
            sinks: b.weight("attn_sinks"),
            ..Extras::default()
        };
        let mut attended = b.attend(attention, heads, extras);
        if scales {
            attended = b.g.unary_alone(attended);
        }
        if b.has("post_attention_norm") {
            attended = b.rms_alone(attended, "post_attention_norm");
        }
        let middle = b.g.add_back(attended, cur);
        let normed = b.rms(middle, "ffn_norm");
        let mut fed = b.ffn(normed, Activation::Gated);
        if b.has("post_ffw_norm") {
            fed = b.rms_alone(fed, "post_ffw_norm");
        }
        cur = b.g.add_back(fed, middle);
        let scale = b.weight("layer_output_scale");
        if scale.is_some() {
            cur = b.g.weigh(cur, scale);
        }
    }
    let cur = b.output_norm(cur, Norm::Rms);
    b.finish(cur, 0);
}

/// Queries, keys and values, which may be the keys before their norm.
fn heads(b: &mut Builder<'_>, normed: TensorId, positions: TensorId) -> [TensorId; 3] {
    let (length, n_tokens) = (b.key_length(), b.n_tokens);
    let (heads, kv_heads) = (b.heads(), b.kv_heads());
    let q = b.project("attn_q", normed);
    let k = b.project("attn_k", normed);
    let shares = !b.has("attn_v");
    let v = if shares {
        k
    } else {
        b.project("attn_v", normed)
    };
    let q = b.g.reshape_3d(q, length, heads, n_tokens);
    let [k, mut v] = [k, v].map(|part| b.g.reshape_3d(part, length, kv_heads, n_tokens));
    let q = b.rms_alone(q, "attn_q_norm");
    let k = b.rms_alone(k, "attn_k_norm");
    if shares {
        v = b.g.rms_norm(v);
    }
    // several positions a token are turned without factors
    let factors = if b.g.ne(positions)[0] == n_tokens {
        b.first_weight("rope_freqs.weight")
    } else {
        NONE
    };
    let [q, k] = [q, k].map(|part| b.g.rope(part, positions, factors));
    [q, k, v]
}
