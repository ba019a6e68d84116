//! RWKV 6 and 7, alone or with the feed-forward block of Qwen (`rwkv6-base.cpp`, `rwkv7-base.cpp` and those built on them).

use super::super::builder::{Activation, Builder, NONE, Norm};
use super::super::states::StateInput;
use super::super::tensor::{Op, TensorId};
use crate::gguf::GgmlType;

/// What RWKV 6 mixes: decay, keys, values, receptance and gate.
const MIXED: i64 = 5;

/// What tells the four kinds apart.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Kind {
    seventh: bool,
    /// A gated feed-forward block in place of channel mixing.
    qwen: bool,
}

pub(super) fn rwkv(b: &mut Builder<'_>) {
    let kind = Kind {
        seventh: matches!(b.model.architecture(), "rwkv7" | "arwkv7"),
        qwen: matches!(b.model.architecture(), "rwkv6qwen2" | "arwkv7"),
    };
    let norm = if kind.qwen { Norm::Rms } else { Norm::Layer };
    let mut cur = b.embeddings();
    if !kind.qwen {
        let (weight, bias) = (
            b.first_weight("token_embd_norm.weight"),
            b.first_weight("token_embd_norm.bias"),
        );
        cur = b.norm_with(cur, weight, bias, Norm::Layer);
    }
    let states = b.state_input();
    let outputs = b.output_ids();
    let rescale = if kind.seventh || kind.qwen {
        0
    } else {
        usize::try_from(b.number("rescale_every_n_layers", 0)).unwrap_or(0)
    };
    let rescales = |il: usize| rescale > 0 && (il + 1).is_multiple_of(rescale);
    let mut first_value = NONE;
    for il in b.layers_by(|il| u64::from(rescales(il)) + 2 * u64::from(il == 0)) {
        b.enter(il);
        let (n_embd, seqs) = (b.n_embd, b.n_seqs);
        let tokens = b.n_tokens / seqs;
        let input = b.g.reshape_3d(cur, n_embd, tokens, seqs);
        let kept = b.convolution_state();
        let shift = b.rows_of_state(states, kept);
        let count = if kind.qwen { 1 } else { 2 };
        let shift = b.g.reshape_3d(shift, n_embd, count, seqs);
        let normed = b.norm(input, "attn_norm", norm);
        let before = if kind.qwen { shift } else { shifts(b, shift) };
        let previous = previous_tokens(b, before, normed);
        let mixed = if kind.seventh {
            time_mix_7(b, states, normed, previous, &mut first_value)
        } else {
            time_mix_6(b, states, normed, previous)
        };
        cur = if kind.qwen {
            qwen_block(b, [mixed, input, normed, kept], outputs)
        } else {
            channel_block(b, [mixed, input, normed, shift, kept], outputs, kind)
        };
        if rescales(il) {
            cur = b.g.unary_alone(cur);
        }
    }
    let cur = b.output_norm(cur, norm);
    b.finish(cur, 0);
}

/// One of the two kept tokens of each sequence.
fn shifts(b: &mut Builder<'_>, shift: TensorId) -> TensorId {
    let ([n0, _, n2, _], [_, b1, b2, _]) = (b.g.ne(shift), b.g.nb(shift));
    b.g.view_3d(shift, [n0, 1, n2], [b1, b2])
}

/// Every token's predecessor.
fn previous_tokens(b: &mut Builder<'_>, kept: TensorId, normed: TensorId) -> TensorId {
    let ([n0, n1, n2, _], [_, b1, b2, _]) = (b.g.ne(normed), b.g.nb(normed));
    let all_but_last = b.g.view_3d(normed, [n0, n1 - 1, n2], [b1, b2]);
    b.g.concat(kept, all_but_last, 1)
}

/// `build_rwkv_token_shift_store`.
fn keep_tokens(b: &mut Builder<'_>, last: TensorId, kept: TensorId) {
    let elements = b.g.get(kept).elements();
    let from = b.g.view_1d(last, elements);
    let to = b.g.view_1d(kept, elements);
    let stored = b.g.copy_into(from, to);
    b.g.expand(stored);
}

fn last_tokens(b: &mut Builder<'_>, normed: TensorId) -> TensorId {
    let ([n0, _, n2, _], [_, b1, b2, _]) = (b.g.ne(normed), b.g.nb(normed));
    b.g.view_3d(normed, [n0, 1, n2], [b1, b2])
}

fn flat(b: &mut Builder<'_>, cur: TensorId) -> TensorId {
    let (n_embd, n_tokens) = (b.n_embd, b.n_tokens);
    b.g.reshape_2d(cur, n_embd, n_tokens)
}

/// Channel mixing, and what the next batch needs.
fn channel_block(
    b: &mut Builder<'_>,
    [mixed, input, normed, shift, kept]: [TensorId; 5],
    outputs: TensorId,
    kind: Kind,
) -> TensorId {
    let middle = b.g.add(mixed, input);
    let second = b.norm(middle, "attn_norm_2", Norm::Layer);
    let before = shifts(b, shift);
    let previous = previous_tokens(b, before, second);
    let lasts = [normed, second].map(|normed| last_tokens(b, normed));
    let last = b.g.concat(lasts[0], lasts[1], 1);
    keep_tokens(b, last, kept);
    let mut parts = [middle, second, previous].map(|part| flat(b, part));
    if b.is_last() {
        parts = parts.map(|part| b.g.get_rows(part, outputs));
    }
    let [middle, second, previous] = parts;
    let change = b.g.add(previous, second);
    let key = lerped(b, change, "channel_mix_lerp_k", second);
    let gate = if kind.seventh {
        NONE
    } else {
        let receptance = lerped(b, change, "channel_mix_lerp_r", second);
        let receptance = b.project("channel_mix_receptance", receptance);
        b.g.unary_alone(receptance)
    };
    let key = b.project("channel_mix_key", key);
    let key = b.g.unary_alone(key);
    let key = b.g.unary_alone(key);
    let mut out = b.project("channel_mix_value", key);
    if gate.is_some() {
        out = b.g.mul(gate, out);
    }
    b.g.add_back(out, middle)
}

fn qwen_block(
    b: &mut Builder<'_>,
    [mixed, input, normed, kept]: [TensorId; 4],
    outputs: TensorId,
) -> TensorId {
    let last = last_tokens(b, normed);
    keep_tokens(b, last, kept);
    let middle = b.g.add(mixed, input);
    let mut middle = flat(b, middle);
    if b.is_last() {
        middle = b.g.get_rows(middle, outputs);
    }
    let normed = b.rms(middle, "ffn_norm");
    let fed = b.ffn(normed, Activation::Gated);
    b.g.add_back(fed, middle)
}

fn lerped(b: &mut Builder<'_>, change: TensorId, name: &str, cur: TensorId) -> TensorId {
    let weight = b.weight(name);
    let part = b.g.mul(change, weight);
    b.g.add(part, cur)
}

/// `build_rwkv6_time_mix`.
fn time_mix_6(
    b: &mut Builder<'_>,
    states: StateInput,
    normed: TensorId,
    previous: TensorId,
) -> TensorId {
    let (n_embd, n_tokens) = (b.n_embd, b.n_tokens);
    let first = b.weight("time_mix_first");
    let change = b.g.add_back(previous, normed);
    let change = flat(b, change);
    let cur = flat(b, normed);
    let mixed = lerped(b, change, "time_mix_lerp_x", cur);
    let low = b.matmul("time_mix_w1", mixed);
    let low = b.g.unary_alone(low);
    let rank = b.g.ne(low)[0] / MIXED;
    let low = b.g.reshape(low, [rank, 1, MIXED, n_tokens]);
    let low = b.g.permute(low, [0, 1, 3, 2]);
    let low = b.g.cont(low);
    let weight = b.weight("time_mix_w2");
    let [w0, w1, ..] = b.g.ne(weight);
    let weight = b.g.reshape(weight, [w0, w1, 1, MIXED]);
    let mut all = b.g.mul_mat(weight, low);
    let fused = b.weight("time_mix_lerp_fused");
    if fused.is_some() {
        let change = b.g.reshape_3d(change, n_embd, 1, n_tokens);
        let cur = b.g.reshape_3d(cur, n_embd, 1, n_tokens);
        all = b.g.weigh(all, fused);
        all = b.g.mul(all, change);
        all = b.g.add(all, cur);
    }
    let stride = b.g.nb(all)[1];
    let lerps = [
        "time_mix_lerp_w",
        "time_mix_lerp_k",
        "time_mix_lerp_v",
        "time_mix_lerp_r",
        "time_mix_lerp_g",
    ];
    let [w, k, v, r, g] = lerps.map(|name| {
        let view = b.g.view_2d(all, n_embd, n_tokens, stride);
        if fused.is_some() {
            return view;
        }
        let weight = b.weight(name);
        let sum = b.g.add(view, weight);
        let moved = b.g.mul(sum, change);
        b.g.add(moved, cur)
    });
    let r = b.project_biased("time_mix_receptance", r);
    let k = b.project_biased("time_mix_key", k);
    let v = b.project_biased("time_mix_value", v);
    let gate = b.project("time_mix_gate", g);
    let gate = b.g.unary_alone(gate);
    let head = b.number("wkv.head_size", 1).max(1);
    let (heads, kv_heads) = (n_embd / head, b.kv_heads());
    let wide = |b: &mut Builder<'_>, part: TensorId| {
        if kv_heads == 0 || kv_heads == heads {
            return part;
        }
        let part = b.g.reshape(part, [head, 1, kv_heads, n_tokens]);
        b.g.repeat(part, [head, heads / kv_heads, kv_heads, n_tokens])
    };
    let (k, v) = (wide(b, k), wide(b, v));
    let [k, v, r] = [k, v, r].map(|part| b.g.reshape_3d(part, head, heads, n_tokens));
    let low = b.matmul("time_mix_decay_w1", w);
    let low = b.g.unary_alone(low);
    let w = b.matmul("time_mix_decay_w2", low);
    let decay = b.weight("time_mix_decay");
    let mut w = b.g.weigh(w, decay);
    for _ in ["exp", "neg", "exp"] {
        w = b.g.unary_alone(w);
    }
    let w = b.g.reshape_3d(w, head, heads, n_tokens);
    let kept = b.recurrent_state();
    let sources = if first.is_some() {
        let state = b.rows_of_state(states, kept);
        vec![k, v, r, first, w, state]
    } else {
        let decayed = b.g.mul(k, w);
        let k = b.g.add(k, decayed);
        let state = b.rows_of_state(states, kept);
        vec![k, v, r, w, state]
    };
    let mut cur = attended(b, &sources, kept, head);
    if first.is_some() {
        cur = group_norm(b, cur, head);
    } else {
        cur = flat(b, cur);
    }
    cur = b.g.mul(cur, gate);
    output(b, cur)
}

/// The linear attention itself: outputs and, behind them, the new states, which are kept.
fn attended(b: &mut Builder<'_>, sources: &[TensorId], kept: TensorId, head: i64) -> TensorId {
    let (n_embd, n_tokens, seqs) = (b.n_embd, b.n_tokens, b.n_seqs);
    let rows = n_tokens + head * seqs;
    let out =
        b.g.result(Op::Other, GgmlType::F32, [n_embd, rows, 1, 1], sources);
    let cur = b.g.view_1d(out, n_embd * n_tokens);
    let fresh = b.g.view_1d(out, n_embd * head * seqs);
    let elements = b.g.ne(kept)[0] * seqs;
    let target = b.g.view_1d(kept, elements);
    let stored = b.g.copy_into(fresh, target);
    b.g.expand(stored);
    cur
}

fn group_norm(b: &mut Builder<'_>, cur: TensorId, head: i64) -> TensorId {
    let (n_embd, n_tokens) = (b.n_embd, b.n_tokens);
    let cur = b.g.reshape_3d(cur, head, n_embd / head, n_tokens);
    let cur = b.g.norm(cur);
    let cur = flat(b, cur);
    let (weight, bias) = (b.weight("time_mix_ln"), b.bias("time_mix_ln"));
    let cur = b.g.weigh(cur, weight);
    b.g.weigh(cur, bias)
}

fn output(b: &mut Builder<'_>, cur: TensorId) -> TensorId {
    let (n_embd, seqs) = (b.n_embd, b.n_seqs);
    let tokens = b.n_tokens / seqs;
    let cur = b.project("time_mix_output", cur);
    b.g.reshape_3d(cur, n_embd, tokens, seqs)
}

/// A low-rank correction of the mixed input: `w2 * f(w1 * x)`.
fn low_rank(b: &mut Builder<'_>, names: [&str; 2], cur: TensorId, bends: bool) -> TensorId {
    let mut low = b.matmul(names[0], cur);
    if bends {
        low = b.g.unary_alone(low);
    }
    b.matmul(names[1], low)
}

/// `build_rwkv7_time_mix`.
fn time_mix_7(
    b: &mut Builder<'_>,
    states: StateInput,
    normed: TensorId,
    previous: TensorId,
    first_value: &mut TensorId,
) -> TensorId {
    let (n_embd, n_tokens, seqs) = (b.n_embd, b.n_tokens, b.n_seqs);
    let gated = b.has("time_mix_g1") && b.has("time_mix_g2");
    let change = b.g.add_back(previous, normed);
    let parts = if gated { 6 } else { 5 };
    let change = b.g.repeat(change, [n_embd, n_tokens / seqs, seqs, parts]);
    let all = lerped(b, change, "time_mix_lerp_fused", normed);
    let stride = b.g.nb(all)[1];
    let [xr, xw, xk, xv, xa, xg] = [(); 6].map(|()| b.g.view_2d(all, n_embd, n_tokens, stride));
    let r = b.project("time_mix_receptance", xr);
    let w = low_rank(b, ["time_mix_w1", "time_mix_w2"], xw, true);
    let bias = b.weight("time_mix_w0");
    let mut w = b.g.weigh(w, bias);
    for _ in ["sigmoid", "scale", "exp"] {
        w = b.g.unary_alone(w);
    }
    let k = b.project("time_mix_key", xk);
    let mut v = b.project("time_mix_value", xv);
    if first_value.is_some() {
        let difference = b.g.add(*first_value, v);
        let share = low_rank(b, ["time_mix_v1", "time_mix_v2"], xv, false);
        let bias = b.weight("time_mix_v0");
        let share = b.g.weigh(share, bias);
        let share = b.g.unary_alone(share);
        let part = b.g.mul(difference, share);
        v = b.g.add(v, part);
    } else {
        *first_value = v;
    }
    let gate = if gated {
        low_rank(b, ["time_mix_g1", "time_mix_g2"], xg, true)
    } else {
        NONE
    };
    let a = low_rank(b, ["time_mix_a1", "time_mix_a2"], xa, false);
    let bias = b.weight("time_mix_a0");
    let a = b.g.weigh(a, bias);
    let a = b.g.unary_alone(a);
    let head = b.number("wkv.head_size", 1).max(1);
    let heads = n_embd / head;
    let weight = b.weight("time_mix_k_k");
    let kk = b.g.mul(k, weight);
    let kk = b.g.reshape_3d(kk, head, heads, n_tokens);
    let kk = b.g.norm(kk);
    let weight = b.weight("time_mix_k_a");
    let ka = b.g.mul(k, weight);
    let scaled = b.g.mul(a, ka);
    let moved = b.g.add(scaled, ka);
    let k = b.g.add(k, moved);
    let [r, w, k, v, a] = [r, w, k, v, a].map(|part| b.g.reshape_3d(part, head, heads, n_tokens));
    let kept = b.recurrent_state();
    let state = b.rows_of_state(states, kept);
    let negative = b.g.unary(kk);
    let scaled = b.g.mul(kk, a);
    let mut cur = attended(b, &[r, w, k, v, negative, scaled, state], kept, head);
    cur = if b.has("time_mix_ln") {
        group_norm(b, cur, head)
    } else {
        flat(b, cur)
    };
    let weight = b.weight("time_mix_r_k");
    let weight = b.g.reshape_2d(weight, head, heads);
    let rk = b.g.mul(k, r);
    let rk = b.g.weigh(rk, weight);
    let rk = b.g.sum_rows(rk);
    let bonus = b.g.mul(v, rk);
    let bonus = flat(b, bonus);
    cur = b.g.add(cur, bonus);
    if gate.is_some() {
        cur = b.g.mul(cur, gate);
    }
    output(b, cur)
}
