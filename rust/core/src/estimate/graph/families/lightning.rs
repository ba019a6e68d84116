//! Lightning attention between layers of softmax attention (`minimax-01.cpp`).

use super::super::attention::Extras;
use super::super::builder::{Builder, Norm};
use super::super::experts::Gating;
use super::super::tensor::TensorId;
use super::hybrid::Inputs;
use crate::gguf::GgmlType;

/// How fast earlier tokens fade, per head; every layer scales it anew.
#[derive(Clone, Copy)]
struct Decays {
    slopes: TensorId,
    queries: TensorId,
    keys: TensorId,
    /// Between every two tokens of the batch.
    pairs: TensorId,
}

/// The sizes of a layer.
#[derive(Clone, Copy)]
struct Sizes {
    length: i64,
    heads: i64,
    tokens: i64,
    seqs: i64,
}

impl Sizes {
    fn of(b: &Builder<'_>) -> Self {
        Self {
            length: b.value_length(),
            heads: b.hyper.heads.first().map_or(1, |heads| i64::from(*heads)),
            tokens: b.n_tokens / b.n_seqs,
            seqs: b.n_seqs,
        }
    }
}

impl Decays {
    fn of(b: &mut Builder<'_>) -> Self {
        let s = Sizes::of(b);
        let mut input = |ne: [i64; 4]| b.g.input(GgmlType::F32, ne);
        Self {
            slopes: input([s.heads, 1, 1, 1]),
            queries: input([1, s.heads, s.tokens, s.seqs]),
            keys: input([1, s.heads, s.tokens, s.seqs]),
            pairs: input([s.tokens, s.tokens, s.heads, s.seqs]),
        }
    }
}

/// `MiniMax` 01: the residual is the normed input, scaled.
pub(super) fn minimax(b: &mut Builder<'_>) {
    let mut cur = b.embeddings();
    let inputs = Inputs::of(b);
    let decays = Decays::of(b);
    for il in b.layers() {
        b.enter(il);
        let normed = b.rms(cur, "attn_norm");
        let mut residual = normed;
        let mut mixed = if b.hyper.is_recurrent(il as u32) {
            lightning(b, inputs, decays, normed)
        } else {
            let [q, k, v] = b.qkv(normed);
            let q = b.rope(q, inputs.positions);
            let k = b.rope(k, inputs.positions);
            b.attend(inputs.attention, [q, k, v], Extras::default())
        };
        if b.is_last() {
            b.pick_outputs([&mut mixed, &mut residual], inputs.outputs);
        }
        let residual = b.g.unary(residual);
        let middle = b.g.add(mixed, residual);
        let normed = b.rms(middle, "ffn_norm");
        let experts = b.experts(Gating::Probabilities, true);
        let fed = b.mixture(normed, experts);
        let residual = b.g.unary(normed);
        cur = b.g.add(fed, residual);
    }
    let cur = b.output_norm(cur, Norm::Rms);
    b.finish(cur, 0);
}

/// The scaled decay as a factor.
fn factor(b: &mut Builder<'_>, decay: TensorId) -> TensorId {
    let scaled = b.g.unary(decay);
    b.g.unary_alone(scaled)
}

fn lightning(b: &mut Builder<'_>, inputs: Inputs, decays: Decays, normed: TensorId) -> TensorId {
    let s = Sizes::of(b);
    // no convolution: the row has no elements, and is read all the same
    let empty = b.convolution_state();
    b.rows_of_state(inputs.states, empty);
    let slopes = b.g.unary(decays.slopes);
    let n_embd = b.n_embd;
    let cur = b.g.reshape(normed, [n_embd, s.tokens, 1, s.seqs]);
    let all = b.matmul("attn_qkv", cur);
    let all = b.g.unary_alone(all);
    let all = b.g.reshape(all, [s.length * 3, s.heads, s.tokens, s.seqs]);
    let [_, b1, b2, b3] = b.g.nb(all);
    let [q, k, v] = [(); 3].map(|()| {
        b.g.view(all, [s.length, s.heads, s.tokens, s.seqs], [b1, b2, b3])
    });
    let states = b.recurrent_state();
    let state = b.rows_of_state(inputs.states, states);
    let state = b.g.reshape(state, [s.length, s.length, s.heads, s.seqs]);

    let query_decay = factor(b, decays.queries);
    let key_decay = factor(b, decays.keys);
    let pair_decay = factor(b, decays.pairs);
    let faded = b.g.mul(q, query_decay);
    let faded = b.g.permute(faded, [0, 2, 1, 3]);
    let earlier = b.g.mul_mat(state, faded);
    let q = b.g.permute(q, [0, 2, 1, 3]);
    let by_token = b.g.permute(k, [0, 2, 1, 3]);
    let scores = b.g.mul_mat(by_token, q);
    let scores = b.g.mul(scores, pair_decay);
    let v = b.g.permute(v, [1, 2, 0, 3]);
    let v = b.g.cont(v);
    let within = b.g.mul_mat(v, scores);
    let out = b.g.add(earlier, within);
    b.g.expand(out);

    let fade = factor(b, slopes);
    let fade = b.g.reshape_3d(fade, 1, 1, s.heads);
    let old = b.g.mul(state, fade);
    let k = b.g.mul(k, key_decay);
    let k = b.g.permute(k, [1, 2, 0, 3]);
    let k = b.g.cont(k);
    let fresh = b.g.mul_mat(k, v);
    let fresh = b.g.add(old, fresh);
    let width = b.g.ne(states)[0];
    let target = b.g.view_1d(states, width * s.seqs);
    let kept = b.g.copy_into(fresh, target);
    b.g.expand(kept);

    let out = b.g.permute(out, [0, 2, 1, 3]);
    let out = b.g.cont(out);
    let out = b.g.reshape(out, [s.length * s.heads, s.tokens, 1, s.seqs]);
    let out = b.rms_alone(out, "attn_norm_2");
    let gate = b.matmul("attn_gate", cur);
    let gate = b.g.unary_alone(gate);
    let cur = b.g.mul(gate, out);
    let cur = b.matmul("attn_output", cur);
    b.g.reshape_2d(cur, n_embd, s.tokens * s.seqs)
}
