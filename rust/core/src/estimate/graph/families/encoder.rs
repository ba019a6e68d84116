//! BERT and its kin: norms after both blocks, no cache, embeddings as output (`bert.cpp`).

use super::super::attention::Extras;
use super::super::builder::{Activation, Builder, NONE, Norm};
use super::super::experts::Gating;
use super::super::tensor::TensorId;

pub(super) fn bert(b: &mut Builder<'_>) {
    let architecture = b.model.architecture();
    let rotates = matches!(
        architecture,
        "nomic-bert" | "nomic-bert-moe" | "jina-bert-v3"
    );
    let positions = if architecture == "jina-bert-v2" {
        NONE
    } else {
        b.positions()
    };
    let mut cur = b.embeddings();
    let types = b.input_weight("token_types.weight");
    if types.is_some() {
        let n_embd = b.n_embd;
        let first = b.g.view_1d(types, n_embd);
        cur = b.g.add(cur, first);
    }
    if architecture == "bert" {
        let table = b.input_weight("position_embd.weight");
        let looked_up = b.g.get_rows(table, positions);
        cur = b.g.add(looked_up, cur);
    }
    let (weight, bias) = (
        b.first_weight("token_embd_norm.weight"),
        b.first_weight("token_embd_norm.bias"),
    );
    cur = b.norm_with(cur, weight, bias, Norm::Layer);
    let attention = b.batch_attention_input();
    let outputs = b.output_ids();
    let step = usize::try_from(b.number("moe_every_n_layers", 0)).unwrap_or(0);
    let has_experts = |il: usize| step > 0 && il % step == 1;
    for il in b.layers_by(|il| u64::from(has_experts(il))) {
        b.enter(il);
        let mut input = cur;
        let [mut q, mut k, v] = b.qkv(cur);
        q = whole_norm(b, q, "attn_q_norm");
        k = whole_norm(b, k, "attn_k_norm");
        if rotates {
            q = b.rope(q, positions);
            k = b.rope(k, positions);
        }
        let mut attended = b.attend(attention, [q, k, v], Extras::default());
        if b.is_last() {
            b.pick_outputs([&mut attended, &mut input], outputs);
        }
        let sum = b.g.add_back(attended, input);
        let mut middle = b.norm(sum, "attn_output_norm", Norm::Layer);
        if b.has("attn_norm_2") {
            let sum = b.g.add(middle, input);
            middle = b.norm(sum, "attn_norm_2", Norm::Layer);
        }
        let fed = if has_experts(il) {
            let experts = b.experts(Gating::Probabilities, false);
            b.mixture(middle, experts)
        } else {
            let activation = if b.has("ffn_gate") || !up_contains_gate(b) {
                Activation::Gated
            } else {
                Activation::Halves
            };
            b.ffn(middle, activation)
        };
        let sum = b.g.add_back(fed, middle);
        cur = b.norm(sum, "layer_output_norm", Norm::Layer);
    }
    b.finish_embeddings(cur);
}

/// A norm over all heads at once, where the layer has one.
fn whole_norm(b: &mut Builder<'_>, cur: TensorId, name: &str) -> TensorId {
    if !b.has(name) {
        return cur;
    }
    let [length, heads, n_tokens, _] = b.g.ne(cur);
    let flat = b.g.reshape_2d(cur, length * heads, n_tokens);
    let flat = b.norm(flat, name, Norm::Layer);
    b.g.reshape_3d(flat, length, heads, n_tokens)
}

/// Jina 2 keeps gate and up in one matrix.
fn up_contains_gate(b: &Builder<'_>) -> bool {
    let width = b.hyper.feed_forward.get(b.layer()).copied().unwrap_or(0);
    b.model.architecture() == "jina-bert-v2"
        && b.model
            .weight(b.layer(), "ffn_up.weight")
            .is_some_and(|up| up.ne[1] != i64::from(width))
}
