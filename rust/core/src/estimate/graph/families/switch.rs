//! Granite Switch: a low-rank adapter per token, chosen by a router that is one more head of attention (`granite-switch.cpp`).

use super::super::attention::{AttentionInput, Extras};
use super::super::builder::{Builder, NONE, Norm};
use super::super::tensor::TensorId;
use crate::gguf::GgmlType;

/// What all layers read.
#[derive(Clone, Copy)]
struct Inputs {
    positions: TensorId,
    attention: AttentionInput,
    outputs: TensorId,
}

pub(super) fn granite_switch(b: &mut Builder<'_>) {
    let scales = b.model.float("residual_scale").unwrap_or(0.0) != 0.0;
    let n_tokens = b.n_tokens;
    let tokens = b.g.input(GgmlType::I32, [n_tokens, 1, 1, 1]);
    let [query, key, value] = [(); 3].map(|()| b.g.input(GgmlType::F32, [n_tokens, 1, 1, 1]));
    let table = b.input_weight("token_embd.weight");
    let mut cur = b.g.get_rows(table, tokens);
    if b.model.float("embedding_scale").unwrap_or(0.0) != 0.0 {
        cur = b.g.unary_alone(cur);
    }
    let positions = if b.number("rope.scaling.finetuned", 1) == 0 {
        NONE
    } else {
        b.positions()
    };
    let attention = b.attention_input();
    let mut adapters = router(b, attention, [query, key, value]);
    let inputs = Inputs {
        positions,
        attention,
        outputs: b.output_ids(),
    };
    // the router is counted as the last layer
    let last = b.trunk().saturating_sub(2);
    for il in b.layers().filter(|il| *il <= last) {
        b.enter(il);
        let mut residual = cur;
        let normed = b.rms(cur, "attn_norm");
        cur = attend(b, normed, adapters, inputs);
        if il == last {
            b.pick_outputs([&mut cur, &mut residual], inputs.outputs);
            let count = b.g.ne(inputs.outputs)[0];
            let rows = b.g.reshape_2d(adapters, 1, n_tokens);
            let rows = b.g.get_rows(rows, inputs.outputs);
            adapters = b.g.reshape(rows, [count, 1, 1, 1]);
        }
        if scales {
            cur = b.g.unary_alone(cur);
        }
        let middle = b.g.add(cur, residual);
        let normed = b.rms(middle, "ffn_norm");
        let gate = switched(b, "ffn_gate", normed, adapters);
        let up = switched(b, "ffn_up", normed, adapters);
        let gate = b.g.unary_alone(gate);
        let both = b.g.mul(gate, up);
        cur = switched(b, "ffn_down", both, adapters);
        if scales {
            cur = b.g.unary_alone(cur);
        }
        cur = b.g.add(cur, middle);
    }
    let cur = b.output_norm(cur, Norm::Rms);
    b.finish(cur, 1);
}

/// The adapter of every token: attention whose heads carry one signal each in their first element.
fn router(b: &mut Builder<'_>, attention: AttentionInput, signals: [TensorId; 3]) -> TensorId {
    let (n_tokens, length) = (b.n_tokens, b.key_length());
    let layer = b.trunk().saturating_sub(1);
    let lanes = signals.map(|signal| {
        let lane = b.g.reshape_3d(signal, 1, 1, n_tokens);
        b.g.pad(lane, [length - 1, 0, 0, 0])
    });
    let extras = Extras {
        output: "",
        cache_layer: Some(layer),
        ..Extras::default()
    };
    let out = b.attend(attention, lanes, extras);
    if let Some((.., of)) = b.g.fused.last_mut() {
        *of = layer;
    }
    let row = b.g.nb(out)[1];
    let slots = b.g.view_2d(out, 1, n_tokens, row);
    let slots = b.g.cont(slots);
    let slots = b.g.reshape(slots, [n_tokens, 1, 1, 1]);
    let slots = b.g.unary_alone(slots);
    let slots = b.g.unary_alone(slots);
    b.g.cast(slots, GgmlType::I32)
}

fn attend(b: &mut Builder<'_>, normed: TensorId, adapters: TensorId, inputs: Inputs) -> TensorId {
    let (length, n_tokens) = (b.key_length(), b.n_tokens);
    let parts = [
        ("attn_q", b.heads()),
        ("attn_k", b.kv_heads()),
        ("attn_v", b.kv_heads()),
    ];
    let all = b.matmul("attn_qkv", normed);
    let row = b.g.nb(all)[1];
    let [q, k, v] = parts.map(|(name, heads)| {
        let part = b.g.view_2d(all, length * heads, n_tokens, row);
        let part = b.g.cont(part);
        let change = delta(b, name, normed, adapters);
        let sum = b.g.add(part, change);
        b.g.reshape_3d(sum, length, heads, n_tokens)
    });
    let factors = if inputs.positions.is_some() {
        b.rope_factors()
    } else {
        NONE
    };
    let [q, k] = [q, k].map(|part| {
        if inputs.positions.is_some() {
            b.g.rope(part, inputs.positions, factors)
        } else {
            part
        }
    });
    let bare = Extras {
        output: "",
        ..Extras::default()
    };
    let attended = b.attend(inputs.attention, [q, k, v], bare);
    switched(b, "attn_output", attended, adapters)
}

/// `build_switched_lora_mm`.
fn switched(b: &mut Builder<'_>, name: &str, cur: TensorId, adapters: TensorId) -> TensorId {
    let base = b.matmul(name, cur);
    let change = delta(b, name, cur, adapters);
    b.g.add(base, change)
}

/// `build_switched_lora_delta`.
fn delta(b: &mut Builder<'_>, name: &str, cur: TensorId, adapters: TensorId) -> TensorId {
    let [width, n_tokens, ..] = b.g.ne(cur);
    let cur = b.g.reshape_3d(cur, width, 1, n_tokens);
    let adapters = b.g.reshape_2d(adapters, 1, n_tokens);
    let down = b.exact(&format!("{name}.lora_a"));
    let low = b.g.mul_mat_id(down, cur, adapters);
    let up = b.exact(&format!("{name}.lora_b"));
    let out = b.g.mul_mat_id(up, low, adapters);
    let width = b.g.ne(out)[0];
    b.g.reshape_2d(out, width, n_tokens)
}
