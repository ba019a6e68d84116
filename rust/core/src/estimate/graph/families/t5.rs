//! T5's decoder, with attention to an encoder's output, and its encoder alone (`t5.cpp`).

use super::super::attention::{AttentionInput, Extras};
use super::super::builder::{Activation, Builder, NONE, Norm};
use super::super::tensor::TensorId;
use crate::gguf::GgmlType;

/// `build_pos_bias`: a bias on the scores, looked up by distance in the layer's table, or the first layer's.
fn score_bias(
    b: &mut Builder<'_>,
    buckets: TensorId,
    name: &str,
    first: &mut TensorId,
) -> TensorId {
    let own = b.weight(name);
    if b.layer() == 0 {
        *first = own;
    }
    let table = if own.is_some() { own } else { *first };
    let [n0, n1, ..] = b.g.ne(buckets);
    let flat = b.g.reshape(buckets, [n0 * n1, 1, 1, 1]);
    let bias = b.g.get_rows(table, flat);
    let heads = b.g.ne(bias)[0];
    let bias = b.g.reshape_3d(bias, heads, n0, n1);
    let bias = b.g.permute(bias, [2, 0, 1, 3]);
    b.g.cont(bias)
}

fn heads_of(b: &mut Builder<'_>, names: [&str; 3], sources: [TensorId; 3]) -> [TensorId; 3] {
    let (length, heads, kv_heads) = (b.key_length(), b.heads(), b.kv_heads());
    let [q, k, v] = names;
    let [from_q, from_k, from_v] = sources;
    [
        (q, from_q, heads),
        (k, from_k, kv_heads),
        (v, from_v, kv_heads),
    ]
    .map(|(name, from, heads)| {
        let flat = b.matmul(name, from);
        let tokens = b.g.ne(flat)[1];
        b.g.reshape_3d(flat, length, heads, tokens)
    })
}

fn feed_forward(b: &mut Builder<'_>, middle: TensorId, prefix: [&str; 4]) -> TensorId {
    let [norm, up, gate, down] = prefix;
    let normed = b.rms(middle, norm);
    let fed = b.ffn_named(normed, [up, gate, down], Activation::Gated);
    b.g.add_back(fed, middle)
}

/// The decoder; its batch also reads as many encoded tokens as the model was trained with.
pub(super) fn t5(b: &mut Builder<'_>) {
    let mut cur = b.embeddings();
    let (n_embd, n_tokens) = (b.n_embd, b.n_tokens);
    let encoded_tokens = i64::from(b.hyper.trained_context_length);
    let encoded = b.g.input(GgmlType::F32, [n_embd, encoded_tokens, 1, 1]);
    let cells = b.batch.cells;
    let buckets = b.g.input(GgmlType::I32, [cells, n_tokens, 1, 1]);
    let attention = b.attention_input();
    let element = b.mask_element();
    let mask = b.g.input(element, [encoded_tokens, n_tokens, 1, 1]);
    let cross = AttentionInput::Batch(mask, mask);
    let outputs = b.output_ids();
    let mut first = NONE;
    for il in b.layers_by(|il| u64::from(il == 0)) {
        b.enter(il);
        let normed = b.rms(cur, "attn_norm");
        let heads = b.qkv(normed);
        let score_bias = score_bias(b, buckets, "attn_rel_b", &mut first);
        let attended = b.attend(
            attention,
            heads,
            Extras {
                score_bias,
                output: "attn_o",
                ..Extras::default()
            },
        );
        let mut middle = b.g.add_back(attended, cur);
        let normed = b.rms(middle, "cross_attn_norm");
        let names = ["cross_attn_q", "cross_attn_k", "cross_attn_v"];
        let heads = heads_of(b, names, [normed, encoded, encoded]);
        let crossed = b.attend(
            cross,
            heads,
            Extras {
                output: "",
                ..Extras::default()
            },
        );
        let mut crossed = b.matmul("cross_attn_o", crossed);
        if b.is_last() {
            b.pick_outputs([&mut crossed, &mut middle], outputs);
        }
        let middle = b.g.add_back(crossed, middle);
        cur = feed_forward(b, middle, ["ffn_norm", "ffn_up", "ffn_gate", "ffn_down"]);
    }
    let (weight, bias) = (
        b.output_weight("dec.output_norm.weight"),
        b.output_weight("dec.output_norm.bias"),
    );
    let cur = b.norm_with(cur, weight, bias, Norm::Rms);
    b.finish(cur, 0);
}

/// The encoder alone.
pub(super) fn encoder(b: &mut Builder<'_>) {
    let mut cur = b.embeddings();
    let n_tokens = b.n_tokens;
    let buckets = b.g.input(GgmlType::I32, [n_tokens, n_tokens, 1, 1]);
    let attention = b.batch_attention_input();
    let outputs = b.output_ids();
    let mut first = NONE;
    for il in b.layers_by(|il| u64::from(il == 0)) {
        b.enter(il);
        let mut input = cur;
        let normed = b.rms(cur, "enc.attn_norm");
        let names = ["enc.attn_q", "enc.attn_k", "enc.attn_v"];
        let heads = heads_of(b, names, [normed; 3]);
        let score_bias = score_bias(b, buckets, "enc.attn_rel_b", &mut first);
        let attended = b.attend(
            attention,
            heads,
            Extras {
                score_bias,
                output: "",
                ..Extras::default()
            },
        );
        let mut attended = b.matmul("enc.attn_o", attended);
        if b.is_last() {
            b.pick_outputs([&mut attended, &mut input], outputs);
        }
        let middle = b.g.add_back(attended, input);
        let names = ["enc.ffn_norm", "enc.ffn_up", "enc.ffn_gate", "enc.ffn_down"];
        cur = feed_forward(b, middle, names);
    }
    let (weight, bias) = (
        b.output_weight("enc.output_norm.weight"),
        b.output_weight("enc.output_norm.bias"),
    );
    let cur = b.norm_with(cur, weight, bias, Norm::Rms);
    b.finish_embeddings(cur);
}
