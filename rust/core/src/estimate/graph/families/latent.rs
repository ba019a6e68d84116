//! Attention over compressed latents (`DeepSeek`'s MLA).

use super::super::attention::{AttentionInput, Extras};
use super::super::builder::{Activation, Builder, NONE, Norm};
use super::super::experts::Gating;
use super::super::tensor::TensorId;

/// The head sizes of latent attention.
#[derive(Clone, Copy, Debug)]
pub(super) struct Latent {
    pub(super) rotated: i64,
    pub(super) plain: i64,
    pub(super) values: i64,
    pub(super) rank: i64,
}

impl Latent {
    pub(super) fn of(b: &Builder<'_>) -> Self {
        let (key, value) = (b.key_length(), b.value_length());
        let names = if b.slides() {
            [
                "attention.key_length_mla_swa",
                "attention.value_length_mla_swa",
                "attention.kv_lora_rank_swa",
            ]
        } else {
            [
                "attention.key_length_mla",
                "attention.value_length_mla",
                "attention.kv_lora_rank",
            ]
        };
        let [key_name, value_name, rank_name] = names;
        let (key, values) = if b.hyper.latent_attention {
            (b.number(key_name, key), b.number(value_name, value))
        } else {
            (key, value)
        };
        let rotated = b.number("rope.dimension_count", key);
        Self {
            rotated,
            plain: key - rotated,
            values,
            rank: b.number(rank_name, 0),
        }
    }
}

/// `DeepSeek` V2 and V3, Kimi K2, Mistral 4.
pub(super) fn deepseek2(b: &mut Builder<'_>) {
    let mut cur = b.embeddings();
    let scaled = b.model.float("attention.temperature_scale").unwrap_or(0.0) != 0.0;
    let scale = if scaled { b.attention_scale() } else { NONE };
    let positions = b.positions();
    let attention = b.attention_input();
    let outputs = b.output_ids();
    for il in b.layers() {
        b.enter(il);
        let mut residual = cur;
        let normed = b.rms(cur, "attn_norm");
        let mut attended = attend(b, normed, positions, attention, scale);
        if b.is_last() {
            b.pick_outputs([&mut attended, &mut residual], outputs);
        }
        let middle = b.g.add_back(attended, residual);
        let normed = b.rms(middle, "ffn_norm");
        let fed = feed_forward(b, normed);
        cur = b.g.add_back(fed, middle);
    }
    let cur = b.output_norm(cur, Norm::Rms);
    b.finish(cur, 0);
}

fn attend(
    b: &mut Builder<'_>,
    normed: TensorId,
    positions: TensorId,
    attention: AttentionInput,
    scale: TensorId,
) -> TensorId {
    if b.has("attn_k") {
        // the OCR model attends plainly
        let [q, k, v] = b.qkv(normed);
        let q = b.rope(q, positions);
        let k = b.rope(k, positions);
        return b.attend(attention, [q, k, v], Extras::default());
    }
    let sizes = Latent::of(b);
    let q = queries(b, normed, sizes);
    let [latent, rotated] = latents(b, normed, positions, sizes);
    if b.hyper.latent_attention {
        let [q, k, v] = absorbed(b, q, [latent, rotated], positions, sizes);
        let q = if scale.is_some() {
            b.g.mul(q, scale)
        } else {
            q
        };
        let value_expansion = b.weight("attn_v_b");
        return match attention {
            AttentionInput::Cache(cache) => b.attend_latent(
                cache,
                [q, k, v],
                Extras {
                    value_expansion,
                    ..Extras::default()
                },
            ),
            _ => q,
        };
    }
    let [q, k, v] = expanded(b, q, [latent, rotated], positions, sizes);
    let q = if scale.is_some() {
        b.g.mul(q, scale)
    } else {
        q
    };
    b.attend(attention, [q, k, v], Extras::default())
}

/// Queries per head, through a low rank where the model has one.
pub(super) fn queries(b: &mut Builder<'_>, normed: TensorId, sizes: Latent) -> TensorId {
    let flat = if b.has("attn_q") {
        b.project("attn_q", normed)
    } else {
        let low = b.project("attn_q_a", normed);
        let low = b.rms_alone(low, "attn_q_a_norm");
        b.project("attn_q_b", low)
    };
    let (heads, n_tokens) = (b.heads(), b.n_tokens);
    b.g.reshape_3d(flat, sizes.plain + sizes.rotated, heads, n_tokens)
}

/// The latent, normed, and the rotated part of the keys.
pub(super) fn latents(
    b: &mut Builder<'_>,
    normed: TensorId,
    positions: TensorId,
    sizes: Latent,
) -> [TensorId; 2] {
    let both = b.project("attn_kv_a_mqa", normed);
    let row = (sizes.rank + sizes.rotated) * 4;
    let n_tokens = b.n_tokens;
    let latent = b.g.view_2d(both, sizes.rank, n_tokens, row);
    let mut rotated = b.g.view_3d(both, [sizes.rotated, 1, n_tokens], [row, row]);
    if b.has("attn_k_norm") {
        rotated = b.rms_alone(rotated, "attn_k_norm");
    }
    let rotated = b.rope(rotated, positions);
    let latent = b.rms_alone(latent, "attn_kv_a_norm");
    [latent, rotated]
}

/// Queries brought into the latent space: one wide key head for all (`is_mla`).
pub(super) fn absorbed(
    b: &mut Builder<'_>,
    q: TensorId,
    [latent, rotated]: [TensorId; 2],
    positions: TensorId,
    sizes: Latent,
) -> [TensorId; 3] {
    let (heads, n_tokens) = (b.heads(), b.n_tokens);
    let [_, b1, b2, _] = b.g.nb(q);
    let plain = b.g.view_3d(q, [sizes.plain, heads, n_tokens], [b1, b2]);
    let turned = b.g.view_3d(q, [sizes.rotated, heads, n_tokens], [b1, b2]);
    let turned = b.rope(turned, positions);
    let plain = b.g.permute(plain, [0, 2, 1, 3]);
    let weight = b.weight("attn_k_b");
    let wide = b.g.mul_mat(weight, plain);
    let wide = b.g.permute(wide, [0, 2, 1, 3]);
    let q = b.g.concat(wide, turned, 0);
    let v = b.g.reshape_3d(latent, sizes.rank, 1, n_tokens);
    let k = b.g.concat(v, rotated, 0);
    [q, k, v]
}

/// Keys and values written out per head.
fn expanded(
    b: &mut Builder<'_>,
    q: TensorId,
    [latent, rotated]: [TensorId; 2],
    positions: TensorId,
    sizes: Latent,
) -> [TensorId; 3] {
    let (heads, n_tokens) = (b.heads(), b.n_tokens);
    let both = b.project("attn_kv_b", latent);
    let row = (sizes.plain + sizes.values) * 4;
    let plain = b.g.view_3d(
        both,
        [sizes.plain, heads, n_tokens],
        [row, row.saturating_mul(heads)],
    );
    let v = b.g.view_3d(
        both,
        [sizes.values, heads, n_tokens],
        [row, row.saturating_mul(heads)],
    );
    let v = b.g.cont(v);
    let q = b.rope(q, positions);
    let wide = b.g.repeat(rotated, [sizes.rotated, heads, n_tokens, 1]);
    let k = b.g.concat(plain, wide, 0);
    [q, k, v]
}

/// Dense in the leading layers, then experts beside shared ones.
pub(super) fn feed_forward(b: &mut Builder<'_>, normed: TensorId) -> TensorId {
    if !b.has("ffn_gate_inp") {
        return b.ffn(normed, Activation::Gated);
    }
    let experts = b.experts(
        Gating::from_number(b.number("expert_gating_func", 0)),
        b.model.flag("expert_weights_norm"),
    );
    let mixed = b.mixture(normed, experts);
    let shared = b.ffn_named(
        normed,
        ["ffn_up_shexp", "ffn_gate_shexp", "ffn_down_shexp"],
        Activation::Gated,
    );
    b.g.add(mixed, shared)
}

/// `MiniCPM` 3: latents written out, every branch scaled.
pub(super) fn minicpm3(b: &mut Builder<'_>) {
    written_out(b, true);
}

/// PLM: the same with a squared relu and nothing scaled.
pub(super) fn plm(b: &mut Builder<'_>) {
    written_out(b, false);
}

fn written_out(b: &mut Builder<'_>, scales: bool) {
    let mut cur = b.embeddings();
    if scales {
        cur = b.g.unary_alone(cur);
    }
    let positions = b.positions();
    let attention = b.attention_input();
    let outputs = b.output_ids();
    for il in b.layers() {
        b.enter(il);
        let mut residual = cur;
        let normed = b.rms(cur, "attn_norm");
        let sizes = Latent::of(b);
        let q = queries(b, normed, sizes);
        let parts = latents(b, normed, positions, sizes);
        let heads = expanded(b, q, parts, positions, sizes);
        let mut attended = b.attend(attention, heads, Extras::default());
        if b.is_last() {
            b.pick_outputs([&mut attended, &mut residual], outputs);
        }
        if scales {
            attended = b.g.unary_alone(attended);
        }
        let middle = b.g.add_back(attended, residual);
        let normed = b.rms(middle, "ffn_norm");
        let mut fed = b.ffn(
            normed,
            if scales {
                Activation::Gated
            } else {
                Activation::Squared
            },
        );
        if scales {
            fed = b.g.unary_alone(fed);
        }
        cur = b.g.add_back(fed, middle);
    }
    let mut cur = b.output_norm(cur, Norm::Rms);
    if scales {
        b.g.set_output(cur);
        cur = b.g.unary(cur);
    }
    if scales {
        b.finish_with(cur, 0);
    } else {
        b.finish(cur, 0);
    }
}
