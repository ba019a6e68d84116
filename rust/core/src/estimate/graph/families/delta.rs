//! Gated delta networks (`delta-net-base.cpp`, `qwen3next.cpp`, `qwen35.cpp`, `qwen35moe.cpp`).

use super::super::attention::Extras;
use super::super::builder::{Activation, Builder, Norm};
use super::super::experts::Gating;
use super::super::states::StateInput;
use super::super::tensor::{TensorId, row_bytes};
use super::hybrid::Inputs;
use crate::gguf::GgmlType;

/// The sizes of a delta layer.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    inner: i64,
    key: i64,
    key_heads: i64,
    value_heads: i64,
    tokens: i64,
    seqs: i64,
}

impl Sizes {
    fn of(b: &Builder<'_>) -> Self {
        Self {
            inner: b.number("ssm.inner_size", 1),
            key: b.number("ssm.state_size", 1),
            key_heads: b.number("ssm.group_count", 1).max(1),
            value_heads: b.number("ssm.time_step_rank", 1).max(1),
            tokens: b.n_tokens / b.n_seqs,
            seqs: b.n_seqs,
        }
    }

    fn value(self) -> i64 {
        self.inner / self.value_heads
    }
}

/// Qwen 3 Next and Qwen 3.5.
pub(super) fn qwen(b: &mut Builder<'_>) {
    let mut cur = b.embeddings();
    let inputs = Inputs::of(b);
    for il in b.layers() {
        b.enter(il);
        let normed = b.rms(cur, "attn_norm");
        b.g.expand(normed);
        let mixed = if b.hyper.is_recurrent(il as u32) {
            linear(b, inputs.states, normed)
        } else {
            gated_attention(b, inputs, normed)
        };
        let middle = b.g.add_back(mixed, cur);
        let normed = b.rms(middle, "post_attention_norm");
        let fed = feed_forward(b, normed);
        cur = b.g.add_back(fed, middle);
    }
    let cur = b.output_norm(cur, Norm::Rms);
    b.g.set_output(cur);
    let cur = b.g.get_rows(cur, inputs.outputs);
    b.finish(cur, 0);
}

/// Attention whose queries come with a gate each.
fn gated_attention(b: &mut Builder<'_>, inputs: Inputs, normed: TensorId) -> TensorId {
    let (length, heads, kv_heads, n_tokens) = (b.key_length(), b.heads(), b.kv_heads(), b.n_tokens);
    let both = b.project_biased("attn_q", normed);
    let k = b.project_biased("attn_k", normed);
    let v = b.project_biased("attn_v", normed);
    let (q, gate) = if b.model.architecture() == "qwen3next" {
        let both = b.g.reshape(both, [length * 2, heads, n_tokens, 1]);
        let [_, b1, b2, b3] = b.g.nb(both);
        let q = b.g.view(both, [length, heads, n_tokens, 1], [b1, b2, b3]);
        (
            q,
            b.g.view(both, [length, heads, n_tokens, 1], [b1, b2, b3]),
        )
    } else {
        let row = length * 2 * 4;
        let q = b.g.view_3d(
            both,
            [length, heads, n_tokens],
            [row, row.saturating_mul(heads)],
        );
        (
            q,
            b.g.view_3d(
                both,
                [length, heads, n_tokens],
                [row, row.saturating_mul(heads)],
            ),
        )
    };
    let q = b.rms_alone(q, "attn_q_norm");
    let k = b.g.reshape_3d(k, length, kv_heads, n_tokens);
    let k = b.rms_alone(k, "attn_k_norm");
    let v = b.g.reshape_3d(v, length, kv_heads, n_tokens);
    let q = b.rope(q, inputs.positions);
    let k = b.rope(k, inputs.positions);
    let cur = b.attend(
        inputs.attention,
        [q, k, v],
        Extras {
            output: "",
            ..Extras::default()
        },
    );
    let gate = b.g.cont_as(gate, [length * heads, n_tokens, 1, 1]);
    let gate = b.g.unary_alone(gate);
    let cur = b.g.mul(cur, gate);
    b.project("attn_output", cur)
}

/// The mixed projections and the gate of the output.
fn mixed(b: &mut Builder<'_>, cur: TensorId, s: Sizes) -> [TensorId; 2] {
    if b.has("attn_qkv") {
        let all = b.project("attn_qkv", cur);
        let width = b.g.ne(all)[0];
        let all = b.g.reshape_3d(all, width, s.tokens, s.seqs);
        return [all, b.project("attn_gate", cur)];
    }
    let share = s.value() * s.value_heads / s.key_heads;
    let all = b.project("ssm_in", cur);
    let all =
        b.g.reshape(all, [2 * s.key + 2 * share, s.key_heads, s.tokens, s.seqs]);
    let [_, b1, b2, b3] = b.g.nb(all);
    let [q, k, v, z] = [s.key, s.key, share, share].map(|width| {
        b.g.view(all, [width, s.key_heads, s.tokens, s.seqs], [b1, b2, b3])
    });
    let z = b.g.cont(z);
    let [q, k, v] = [
        (q, s.key * s.key_heads),
        (k, s.key * s.key_heads),
        (v, s.value() * s.value_heads),
    ]
    .map(|(part, width)| b.g.cont_as(part, [width, s.tokens, s.seqs, 1]));
    let joined = b.g.concat(q, k, 0);
    [b.g.concat(joined, v, 0), z]
}

/// Decay and step of every head.
fn rates(b: &mut Builder<'_>, cur: TensorId, s: Sizes) -> [TensorId; 2] {
    let (beta, alpha) = if b.has("ssm_ba") {
        let share = s.value_heads / s.key_heads;
        let both = b.project("ssm_ba", cur);
        let both =
            b.g.reshape(both, [2 * share, s.key_heads, s.tokens, s.seqs]);
        let [_, b1, b2, b3] = b.g.nb(both);
        let [beta, alpha] = [(); 2].map(|()| {
            b.g.view(both, [share, s.key_heads, s.tokens, s.seqs], [b1, b2, b3])
        });
        let beta = b.g.cont(beta);
        let beta = b.g.unary_alone(beta);
        let alpha = b.g.cont_as(alpha, [s.value_heads, s.tokens, s.seqs, 1]);
        (
            b.g.reshape(beta, [1, s.value_heads, s.tokens, s.seqs]),
            alpha,
        )
    } else {
        let beta = b.project("ssm_beta", cur);
        let beta = b.g.reshape(beta, [1, s.value_heads, s.tokens, s.seqs]);
        let beta = b.g.unary_alone(beta);
        let alpha = b.project("ssm_alpha", cur);
        (beta, b.g.reshape_3d(alpha, s.value_heads, s.tokens, s.seqs))
    };
    let bias = b.bias("ssm_dt");
    let alpha = b.g.weigh(alpha, bias);
    let alpha = b.g.unary_alone(alpha);
    let decay = b.exact("ssm_a");
    let gate = b.g.weigh(alpha, decay);
    [
        b.g.reshape(gate, [1, s.value_heads, s.tokens, s.seqs]),
        beta,
    ]
}

pub(super) fn linear(b: &mut Builder<'_>, input: StateInput, cur: TensorId) -> TensorId {
    let s = Sizes::of(b);
    let [all, z] = mixed(b, cur, s);
    let [gate, beta] = rates(b, cur, s);
    let kernel = b.weight("ssm_conv1d");
    let joined = convolution_input(b, input, all);
    let states = b.recurrent_state();
    let state = b.rows_of_state(input, states);
    let state =
        b.g.reshape(state, [s.value(), s.value(), s.value_heads, s.seqs]);
    let convolved = b.g.ssm_conv(joined, kernel);
    let convolved = b.g.unary_alone(convolved);
    let row = (2 * s.key * s.key_heads + s.value() * s.value_heads) * 4;
    let parts = [
        (s.key, s.key_heads),
        (s.key, s.key_heads),
        (s.value(), s.value_heads),
    ];
    let [q, k, v] = parts.map(|(length, heads)| {
        b.g.view(
            convolved,
            [length, heads, s.tokens, s.seqs],
            [length * 4, row, row.saturating_mul(s.tokens)],
        )
    });
    let [q, k] = [q, k].map(|part| {
        let part = b.g.rms_norm(part);
        let part = b.g.unary_alone(part);
        if s.key_heads == s.value_heads || b.model.architecture() != "qwen3next" {
            return part;
        }
        let times = s.value_heads / s.key_heads;
        let wide =
            b.g.reshape(part, [s.key, 1, s.key_heads, s.tokens * s.seqs]);
        let wide =
            b.g.repeat(wide, [s.key, times, s.key_heads, s.tokens * s.seqs]);
        b.g.reshape(wide, [s.key, s.key_heads * times, s.tokens, s.seqs])
    });
    let out = delta(b, [q, k, v, gate, beta, state], states);
    let normed = b.rms(out, "ssm_norm");
    let z = b.g.reshape(z, [s.value(), s.value_heads, s.tokens, s.seqs]);
    let z = b.g.unary_alone(z);
    let cur = b.g.mul(normed, z);
    let cur =
        b.g.reshape_3d(cur, s.value() * s.value_heads, s.tokens, s.seqs);
    let cur = b.project("ssm_out", cur);
    let n_embd = b.n_embd;
    b.g.reshape_2d(cur, n_embd, s.tokens * s.seqs)
}

/// `build_conv_state`.
fn convolution_input(b: &mut Builder<'_>, input: StateInput, all: TensorId) -> TensorId {
    let kernel = b.weight("ssm_conv1d");
    let kept = b.g.ne(kernel)[0] - 1;
    let states = b.convolution_state();
    behind_state(b, input, states, all, kept)
}

/// `x`, turned, behind the last `kept` columns of what came before, which it replaces.
pub(super) fn behind_state(
    b: &mut Builder<'_>,
    input: StateInput,
    states: TensorId,
    x: TensorId,
    kept: i64,
) -> TensorId {
    let ([channels, ..], seqs) = (b.g.ne(x), b.n_seqs);
    let earlier = b.rows_of_state(input, states);
    let earlier = b.g.reshape_3d(earlier, kept, channels, seqs);
    let turned = b.g.transpose(x);
    let joined = b.g.concat(earlier, turned, 0);
    let [_, b1, b2, _] = b.g.nb(joined);
    let mut last = b.g.view_3d(joined, [kept, channels, seqs], [b1, b2]);
    if b.model.architecture() == "qwen4exp" {
        last = b.g.cont(last);
    }
    b.keep_state(last, states);
    joined
}

/// `build_delta_net_fused`: outputs and new states in one tensor; the states are kept.
pub(super) fn delta(
    b: &mut Builder<'_>,
    [q, k, v, gate, beta, state]: [TensorId; 6],
    states: TensorId,
) -> TensorId {
    let [length, heads, tokens, seqs] = b.g.ne(v);
    let out = b.g.delta_net([q, k, v, gate, beta, state]);
    let bytes = |n: i64| row_bytes(GgmlType::F32, n);
    let view = b.g.view(
        out,
        [length, heads, tokens, seqs],
        [
            bytes(length),
            bytes(length * heads),
            bytes(length * heads * tokens),
        ],
    );
    let fresh = b.g.view(
        out,
        [length, length, heads, seqs],
        [
            bytes(length),
            bytes(length * length),
            bytes(length * length * heads),
        ],
    );
    b.keep_state(fresh, states);
    view
}

/// Experts with a shared one behind a sigmoid, or a dense block.
pub(super) fn feed_forward(b: &mut Builder<'_>, normed: TensorId) -> TensorId {
    if !b.has("ffn_gate_inp") {
        return b.ffn(normed, Activation::Gated);
    }
    let experts = b.experts(Gating::Probabilities, true);
    let mixed = b.mixture(normed, experts);
    if !b.has("ffn_up_shexp") {
        return mixed;
    }
    let shared = b.ffn_named(
        normed,
        ["ffn_up_shexp", "ffn_gate_shexp", "ffn_down_shexp"],
        Activation::Gated,
    );
    let gate = b.project("ffn_gate_inp_shexp", normed);
    let gate = b.g.unary_alone(gate);
    let shared = b.g.mul(shared, gate);
    b.g.add(mixed, shared)
}
