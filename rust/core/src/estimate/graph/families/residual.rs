//! Attention over the residual streams of earlier layers, between Kimi's delta attention and latent attention (`kimi-k3.cpp`).

use super::super::builder::{Builder, NONE, Norm};
use super::super::experts::{ExpertActivation, Gating};
use super::super::tensor::{Op, TensorId};
use super::hybrid::Inputs;
use super::kda;
use crate::gguf::GgmlType;

/// Kimi K3.
pub(super) fn kimi_k3(b: &mut Builder<'_>) {
    let every = usize::try_from(b.number("attn_res.block_size", 0)).unwrap_or(0);
    let banks = |il: usize| every > 0 && il.is_multiple_of(every);
    let mut stream = b.embeddings();
    let inputs = Inputs::of(b);
    let mut stack = NONE;
    // what is banked grows, so that only layers with as much behind them are alike
    let banked_before = |il: usize| il.checked_div(every).unwrap_or(0) as u64 * 2;
    for il in b.layers_by(|il| banked_before(il) + u64::from(banks(il))) {
        b.enter(il);
        let score = b.weight("attn_res_score");
        let cur = mixed(b, stream, stack, score);
        if banks(il) {
            stack = banked(b, stream, stack);
        }
        let normed = b.rms(cur, "attn_norm");
        b.g.expand(normed);
        let cur = if b.hyper.is_recurrent(il as u32) {
            kda::kimi(b, inputs.states, normed)
        } else {
            latent(b, inputs, normed)
        };
        stream = if banks(il) { cur } else { b.g.add(stream, cur) };
        let score = b.weight("ffn_res_score");
        let cur = mixed(b, stream, stack, score);
        let normed = b.rms(cur, "ffn_norm");
        let fed = feed_forward(b, normed);
        stream = b.g.add(stream, fed);
    }
    let score = b.output_weight("output_res_score.weight");
    let cur = mixed(b, stream, stack, score);
    let cur = b.g.get_rows(cur, inputs.outputs);
    let cur = b.output_norm(cur, Norm::Rms);
    b.finish(cur, 0);
}

/// `res_push`: the stream joins those that later layers look back at.
fn banked(b: &mut Builder<'_>, stream: TensorId, stack: TensorId) -> TensorId {
    let (n_embd, n_tokens) = (b.n_embd, b.n_tokens);
    let one = b.g.reshape_3d(stream, n_embd, 1, n_tokens);
    if stack.is_some() {
        b.g.concat(stack, one, 1)
    } else {
        one
    }
}

/// `res_mix`: a weighted sum of the banked streams and the current one.
fn mixed(b: &mut Builder<'_>, cur: TensorId, stack: TensorId, score: TensorId) -> TensorId {
    if !stack.is_some() {
        return cur;
    }
    let ([n_embd, count, ..], n_tokens) = (b.g.ne(stack), b.n_tokens);
    let rate = |b: &mut Builder<'_>, streams: TensorId| {
        let normed = b.g.rms_norm(streams);
        let weighted = b.g.weigh(normed, score);
        b.g.sum_rows(weighted)
    };
    let earlier = rate(b, stack);
    let earlier = b.g.reshape_2d(earlier, count, n_tokens);
    let current = rate(b, cur);
    let scores = b.g.concat(earlier, current, 0);
    let shares = b.g.unary_alone(scores);
    let row = b.g.nb(shares)[1];
    let [earlier, current] = [count, 1].map(|n| {
        let part = b.g.view_2d(shares, n, n_tokens, row);
        b.g.cont(part)
    });
    let sources = [stack, earlier];
    let sum =
        b.g.result(Op::Other, GgmlType::F32, [n_embd, n_tokens, 1, 1], &sources);
    let current = b.g.mul(cur, current);
    b.g.add(sum, current)
}

/// Latent attention without rotation, with a gate.
fn latent(b: &mut Builder<'_>, inputs: Inputs, normed: TensorId) -> TensorId {
    let mut cur = kda::attention(b, inputs.attention, normed, NONE, "");
    if b.has("attn_gate") {
        let gate = b.matmul("attn_gate", normed);
        let gate = b.g.unary_alone(gate);
        cur = b.g.mul(cur, gate);
    }
    b.matmul("attn_output", cur)
}

/// Dense, or experts in a narrower space beside shared ones.
fn feed_forward(b: &mut Builder<'_>, normed: TensorId) -> TensorId {
    if !b.has("ffn_gate_inp") {
        return situ_block(b, normed, ["ffn_up", "ffn_gate", "ffn_down"]);
    }
    let routed = if b.has("ffn_routed_down") {
        b.matmul("ffn_routed_down", normed)
    } else {
        normed
    };
    let gating = Gating::from_number(b.number("expert_gating_func", 0));
    let mut experts = b.experts(gating, b.model.flag("expert_weights_norm"));
    experts.logits = b.matmul("ffn_gate_inp", normed);
    experts.activation = ExpertActivation::Situ;
    let mut cur = b.mixture(routed, experts);
    if b.has("ffn_routed_norm") {
        cur = b.rms_alone(cur, "ffn_routed_norm");
    }
    if b.has("ffn_routed_up") {
        cur = b.matmul("ffn_routed_up", cur);
    }
    if b.has("ffn_gate_shexp") {
        let names = ["ffn_up_shexp", "ffn_gate_shexp", "ffn_down_shexp"];
        let shared = situ_block(b, normed, names);
        cur = b.g.add(cur, shared);
    }
    cur
}

fn situ_block(b: &mut Builder<'_>, cur: TensorId, [up, gate, down]: [&str; 3]) -> TensorId {
    let gate = b.matmul(gate, cur);
    let up = b.matmul(up, cur);
    let cur = b.situ(gate, up);
    b.matmul(down, cur)
}
