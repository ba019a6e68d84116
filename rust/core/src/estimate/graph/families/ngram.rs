//! Embeddings of n-grams, looked up by hash and added to one layer's residual streams (`qwen4exp.cpp`, `build_ple`).

use super::super::builder::{Builder, NONE};
use super::super::states::StateInput;
use super::super::tensor::TensorId;
use super::{delta, streams};
use crate::gguf::GgmlType;

/// `build_inp_ple`; none for a model without a table.
pub(super) fn embeddings(b: &mut Builder<'_>) -> TensorId {
    let table = b.input_weight("per_layer_token_embd.weight");
    if !table.is_some() {
        return NONE;
    }
    let heads = (b.number("ple.ngram_size", 1) - 1) * b.number("ple.heads_per_ngram", 1);
    let n_tokens = b.n_tokens;
    let rows = b.g.input(GgmlType::I32, [heads * n_tokens, 1, 1, 1]);
    let found = b.g.get_rows(table, rows);
    let length = b.g.ne(found)[0];
    let found = b.g.reshape_2d(found, length * heads, n_tokens);
    b.g.expand(found);
    found
}

/// `build_ple`: gated by how well they match each stream, through a convolution with a state of its own.
pub(super) fn added(
    b: &mut Builder<'_>,
    input: StateInput,
    grams: TensorId,
    hidden: TensorId,
) -> TensorId {
    let (n_embd, n_tokens, count) = (b.n_embd, b.n_tokens, streams::count(b));
    let key = b.matmul("ple_key", grams);
    let value = b.matmul("ple_value", grams);
    let key = normed(b, key, "ple_norm_key");
    let query = normed(b, hidden, "ple_norm_query");
    let product = b.g.mul(key, query);
    let product = b.g.sum_rows(product);
    let product = b.g.unary_alone(product);
    let mut size = product;
    for _ in 0..3 {
        size = b.g.unary(size);
    }
    let sign = b.g.unary(product);
    let gate = b.g.mul(sign, size);
    let gate = b.g.unary_alone(gate);
    let value = b.g.reshape_3d(value, n_embd, 1, n_tokens);
    let value = b.g.repeat(value, [n_embd, count, n_tokens, 1]);
    let gated = b.g.mul(value, gate);
    let flat = b.g.reshape_2d(gated, n_embd * count, n_tokens);
    let flat = normed(b, flat, "ple_norm_conv");
    let flat = b.g.reshape_2d(flat, n_embd * count, n_tokens);
    let out = convolved(b, input, flat);
    let out = b.g.cont(out);
    let out = b.g.reshape_3d(out, n_embd, count, n_tokens);
    let sum = b.g.add(gated, out);
    b.g.add(hidden, sum)
}

/// A norm per stream.
fn normed(b: &mut Builder<'_>, x: TensorId, name: &str) -> TensorId {
    let (n_embd, n_tokens, count) = (b.n_embd, b.n_tokens, streams::count(b));
    let x = b.g.reshape_3d(x, n_embd, count, n_tokens);
    let normed = b.g.rms_norm(x);
    let weight = b.weight(name);
    b.g.weigh(normed, weight)
}

/// A dilated convolution, one shifted copy a tap.
fn convolved(b: &mut Builder<'_>, input: StateInput, x: TensorId) -> TensorId {
    let (width, tokens, seqs) = (b.g.ne(x)[0], b.n_tokens / b.n_seqs, b.n_seqs);
    let taps = b.number("ple.conv_kernel", 1);
    let kept = (taps - 1) * b.number("ple.ngram_size", 1);
    let states = b.state(b.hyper.ngram_state);
    let x = b.g.reshape_3d(x, width, tokens, seqs);
    let padded = delta::behind_state(b, input, states, x, kept);
    let [_, b1, b2, _] = b.g.nb(padded);
    let kernel = b.weight("ple_conv1d");
    let row = b.g.nb(kernel)[1];
    let mut sum = NONE;
    for _ in 0..b.g.alike(taps) {
        let shifted = b.g.view_3d(padded, [tokens, width, seqs], [b1, b2]);
        let shifted = b.g.transpose(shifted);
        let shifted = b.g.cont(shifted);
        let tap = b.g.view_2d(kernel, 1, width, row);
        let tap = b.g.cont(tap);
        let mut tap = b.g.reshape(tap, [width, 1, 1, 1]);
        if b.g.element(tap) != GgmlType::F32 {
            tap = b.g.cast(tap, GgmlType::F32);
        }
        let term = b.g.mul(shifted, tap);
        sum = if sum.is_some() {
            b.g.add(sum, term)
        } else {
            term
        };
    }
    b.g.unary_alone(sum)
}
