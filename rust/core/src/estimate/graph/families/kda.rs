//! Kimi's delta attention between layers of latent attention (`kimi-linear.cpp`, `kimi-k3.cpp`,
//! `glm5-next.cpp`, `bailingmoe3.cpp`).

use super::super::attention::{AttentionInput, Extras};
use super::super::builder::{Activation, Builder, NONE, Norm};
use super::super::experts::Gating;
use super::super::states::StateInput;
use super::super::tensor::TensorId;
use super::delta::delta;
use super::hybrid::Inputs;
use super::latent::{Latent, absorbed, latents, queries};

/// Kimi Linear: no rotation anywhere.
pub(super) fn kimi_linear(b: &mut Builder<'_>) {
    let mut cur = b.embeddings();
    let inputs = Inputs::of(b);
    for il in b.layers() {
        b.enter(il);
        let mut residual = cur;
        let normed = b.rms(cur, "attn_norm");
        b.g.expand(normed);
        let mut mixed = if b.hyper.is_recurrent(il as u32) {
            kimi(b, inputs.states, normed)
        } else {
            attention(b, inputs.attention, normed, NONE, "attn_output")
        };
        if b.is_last() {
            b.pick_outputs([&mut mixed, &mut residual], inputs.outputs);
        }
        let middle = b.g.add_back(mixed, residual);
        let normed = b.rms(middle, "ffn_norm");
        let fed = feed_forward(b, normed, true);
        cur = b.g.add_back(fed, middle);
    }
    let cur = b.output_norm(cur, Norm::Rms);
    b.finish(cur, 0);
}

/// Bailing 3: rotated, with a gate on attention.
pub(super) fn bailing(b: &mut Builder<'_>) {
    let mut cur = b.embeddings();
    let inputs = Inputs::of(b);
    let normed_weights = b.model.flag("expert_weights_norm");
    for il in b.layers() {
        b.enter(il);
        let normed = b.rms(cur, "attn_norm");
        let mixed = if b.hyper.is_recurrent(il as u32) {
            bailing_states(b, inputs.states, normed)
        } else {
            gated(b, inputs, normed)
        };
        let middle = b.g.add_back(mixed, cur);
        let normed = b.rms(middle, "ffn_norm");
        let fed = feed_forward(b, normed, normed_weights);
        cur = b.g.add_back(fed, middle);
    }
    let cur = b.output_norm(cur, Norm::Rms);
    b.g.set_output(cur);
    let cur = b.g.get_rows(cur, inputs.outputs);
    b.finish(cur, 0);
}

/// Latent attention; `output` names the projection.
pub(super) fn attention(
    b: &mut Builder<'_>,
    input: AttentionInput,
    normed: TensorId,
    positions: TensorId,
    output: &'static str,
) -> TensorId {
    let sizes = Latent::of(b);
    let q = queries(b, normed, sizes);
    let parts = latents(b, normed, positions, sizes);
    let heads = absorbed(b, q, parts, positions, sizes);
    let value_expansion = b.weight("attn_v_b");
    match input {
        AttentionInput::Cache(cache) => b.attend_latent(
            cache,
            heads,
            Extras {
                value_expansion,
                output,
                ..Extras::default()
            },
        ),
        _ => q,
    }
}

fn gated(b: &mut Builder<'_>, inputs: Inputs, normed: TensorId) -> TensorId {
    let cur = attention(b, inputs.attention, normed, inputs.positions, "");
    let (heads, n_tokens) = (b.heads(), b.n_tokens);
    let values = Latent::of(b).values;
    let weight = b.weight("attn_gate");
    let gate = b.g.mul_mat(weight, normed);
    let gate = b.g.reshape_3d(gate, 1, heads, n_tokens);
    let gate = b.g.unary_alone(gate);
    let cur = b.g.reshape_3d(cur, values, heads, n_tokens);
    let cur = b.g.mul(cur, gate);
    let cur = b.g.cont_as(cur, [values * heads, n_tokens, 1, 1]);
    let weight = b.weight("attn_output");
    b.g.mul_mat(weight, cur)
}

/// The sizes of a delta layer.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    length: i64,
    heads: i64,
    kernel: i64,
    tokens: i64,
    seqs: i64,
}

impl Sizes {
    fn of(b: &Builder<'_>) -> Self {
        Self {
            length: b.number("kda.head_dim", 1),
            heads: b.hyper.heads.first().map_or(1, |heads| i64::from(*heads)),
            kernel: b.number("ssm.conv_kernel", 1),
            tokens: b.n_tokens / b.n_seqs,
            seqs: b.n_seqs,
        }
    }

    fn inner(self) -> i64 {
        self.length * self.heads
    }
}

/// Queries, keys and values, each through a convolution of its own.
fn convolved(b: &mut Builder<'_>, input: StateInput, normed: TensorId, s: Sizes) -> [TensorId; 3] {
    let states = b.convolution_state();
    let earlier = b.rows_of_state(input, states);
    let row = (s.kernel - 1) * 4;
    let all = 3 * (s.kernel - 1) * s.inner() * 4;
    [
        ("attn_q", "ssm_conv1d_q"),
        ("attn_k", "ssm_conv1d_k"),
        ("attn_v", "ssm_conv1d_v"),
    ]
    .map(|(name, kernel)| {
        let own =
            b.g.view_3d(earlier, [s.kernel - 1, s.inner(), s.seqs], [row, all]);
        let weight = b.weight(name);
        let x = b.g.mul_mat(weight, normed);
        let x = b.g.reshape_3d(x, s.inner(), s.tokens, s.seqs);
        let turned = b.g.transpose(x);
        let joined = b.g.concat(own, turned, 0);
        let [_, b1, b2, _] = b.g.nb(joined);
        let last =
            b.g.view_3d(joined, [s.kernel - 1, s.inner(), s.seqs], [b1, b2]);
        let target =
            b.g.view_3d(states, [s.kernel - 1, s.inner(), s.seqs], [row, all]);
        let kept = b.g.copy_into(last, target);
        b.g.expand(kept);
        let kernel = b.weight(kernel);
        let kernel = b.g.reshape_2d(kernel, s.kernel, s.inner());
        let out = b.g.ssm_conv(joined, kernel);
        let out = b.g.reshape_2d(out, s.inner(), s.tokens * s.seqs);
        let out = b.g.unary_alone(out);
        b.g.reshape(out, [s.length, s.heads, s.tokens, s.seqs])
    })
}

/// The update and what comes out of it; `gate` is per element.
fn updated(
    b: &mut Builder<'_>,
    input: StateInput,
    [q, k, v, gate, beta]: [TensorId; 5],
    s: Sizes,
) -> TensorId {
    let states = b.recurrent_state();
    let state = b.rows_of_state(input, states);
    let state = b.g.reshape(state, [s.length, s.length, s.heads, s.seqs]);
    let [q, k] = [q, k].map(|part| {
        let part = b.g.rms_norm(part);
        b.g.unary_alone(part)
    });
    let out = delta(b, [q, k, v, gate, beta, state], states);
    b.g.cont(out)
}

fn step(b: &mut Builder<'_>, normed: TensorId, s: Sizes) -> TensorId {
    let weight = b.weight("ssm_beta");
    let beta = b.g.mul_mat(weight, normed);
    let beta = b.g.reshape(beta, [1, s.heads, s.tokens, s.seqs]);
    b.g.unary(beta)
}

/// The norm and gate of the output, and its projection.
fn finished(b: &mut Builder<'_>, out: TensorId, gate: TensorId, s: Sizes) -> TensorId {
    let n_tokens = s.tokens * s.seqs;
    let gate = b.g.reshape_3d(gate, s.length, s.heads, n_tokens);
    let out = b.g.reshape_3d(out, s.length, s.heads, n_tokens);
    let normed = b.rms(out, "ssm_norm");
    let gate = b.g.unary_alone(gate);
    let out = b.g.mul(normed, gate);
    let out = b.g.cont_as(out, [s.inner(), n_tokens, 1, 1]);
    let weight = b.weight("attn_output");
    b.g.mul_mat(weight, out)
}

/// Kimi's delta layer (`build_kda_layer`); a decay with a lower bound goes through a sigmoid, the gate of the output through one
/// projection or two.
pub(super) fn kimi(b: &mut Builder<'_>, input: StateInput, normed: TensorId) -> TensorId {
    let s = Sizes::of(b);
    let n_tokens = s.tokens * s.seqs;
    let [q, k, v] = convolved(b, input, normed, s);
    let low = b.matmul("ssm_f_a", normed);
    let gate = b.matmul("ssm_f_b", low);
    let bias = b.bias("ssm_dt");
    let mut gate = b.g.weigh(gate, bias);
    // minus infinity, which stands for no bound, is read as the lowest number
    let bound = b.number("kda.gate_lower_bound", i64::MIN);
    let bounded = bound > i64::from(i32::MIN) && b.model.architecture() != "kimi-linear";
    if !bounded {
        gate = b.g.unary_alone(gate);
    }
    let gate = b.g.reshape_3d(gate, s.length, s.heads, n_tokens);
    let decay = b.exact("ssm_a");
    let decay = b.g.reshape_3d(decay, 1, s.heads, 1);
    let mut gate = b.g.weigh(gate, decay);
    for _ in 0..if bounded { 3 } else { 0 } {
        gate = b.g.unary_alone(gate);
    }
    let gate = b.g.reshape(gate, [s.length, s.heads, s.tokens, s.seqs]);
    let beta = step(b, normed, s);
    let out = updated(b, input, [q, k, v, gate, beta], s);
    let gate = if b.has("ssm_g") {
        let width = b.g.ne(normed)[0];
        let apart = b.g.reshape_3d(normed, width, s.tokens, s.seqs);
        let flat = b.g.reshape_2d(apart, width, n_tokens);
        b.matmul("ssm_g", flat)
    } else {
        let low = b.matmul("ssm_g_a", normed);
        b.matmul("ssm_g_b", low)
    };
    finished(b, out, gate, s)
}

fn bailing_states(b: &mut Builder<'_>, input: StateInput, normed: TensorId) -> TensorId {
    let s = Sizes::of(b);
    let [q, k, v] = convolved(b, input, normed, s);
    let gate = b.matmul("ssm_f_a", normed);
    let bias = b.bias("ssm_dt");
    let gate = b.g.weigh(gate, bias);
    let gate = b.g.reshape_3d(gate, s.length, s.heads, s.tokens * s.seqs);
    let decay = b.exact("ssm_a");
    let decay = b.g.reshape_3d(decay, 1, s.heads, 1);
    let gate = b.g.weigh(gate, decay);
    let gate = b.g.unary_alone(gate);
    let gate = b.g.unary_alone(gate);
    let gate = b.g.reshape(gate, [s.length, s.heads, s.tokens, s.seqs]);
    let beta = step(b, normed, s);
    let out = updated(b, input, [q, k, v, gate, beta], s);
    let gate = b.matmul("ssm_g_a", normed);
    finished(b, out, gate, s)
}

/// Dense, or experts beside shared ones.
fn feed_forward(b: &mut Builder<'_>, cur: TensorId, normed: bool) -> TensorId {
    if !b.has("ffn_gate_inp") {
        return b.ffn(cur, Activation::Gated);
    }
    let experts = b.experts(
        Gating::from_number(b.number("expert_gating_func", 0)),
        normed,
    );
    let mixed = b.mixture(cur, experts);
    let shared = b.ffn_named(
        cur,
        ["ffn_up_shexp", "ffn_gate_shexp", "ffn_down_shexp"],
        Activation::Gated,
    );
    b.g.add(mixed, shared)
}
