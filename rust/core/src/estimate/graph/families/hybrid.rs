//! Models with state space layers, alone or between attention layers.

use super::super::attention::{AttentionInput, Extras};
use super::super::builder::{Activation, Builder, NONE, Norm};
use super::super::experts::{ExpertActivation, Gating};
use super::super::states::StateInput;
use super::super::tensor::TensorId;
use super::mamba::{mamba1, mamba2, plamo2 as plamo2_states, short_convolution};

/// What all layers of a hybrid read.
#[derive(Clone, Copy)]
pub(super) struct Inputs {
    pub(super) states: StateInput,
    pub(super) attention: AttentionInput,
    pub(super) positions: TensorId,
    pub(super) outputs: TensorId,
}

impl Inputs {
    pub(super) fn of(b: &mut Builder<'_>) -> Self {
        Self {
            states: b.state_input(),
            attention: b.attention_input(),
            positions: b.positions(),
            outputs: b.output_ids(),
        }
    }
}

fn recurs(b: &Builder<'_>) -> bool {
    b.hyper.is_recurrent(b.layer() as u32)
}

/// Attention without rotation.
fn unrotated(b: &mut Builder<'_>, inputs: Inputs, cur: TensorId) -> TensorId {
    let heads = b.qkv(cur);
    b.attend(inputs.attention, heads, Extras::default())
}

fn rotated(b: &mut Builder<'_>, inputs: Inputs, cur: TensorId, factors: TensorId) -> TensorId {
    rotated_with(b, inputs, cur, factors, Extras::default())
}

fn rotated_with(
    b: &mut Builder<'_>,
    inputs: Inputs,
    cur: TensorId,
    factors: TensorId,
    extras: Extras,
) -> TensorId {
    let [mut q, mut k, v] = b.qkv(cur);
    if b.has("attn_q_norm") {
        q = b.rms_alone(q, "attn_q_norm");
        k = b.rms_alone(k, "attn_k_norm");
    }
    let q = b.g.rope(q, inputs.positions, factors);
    let k = b.g.rope(k, inputs.positions, factors);
    b.attend(inputs.attention, [q, k, v], extras)
}

fn end(b: &mut Builder<'_>, cur: TensorId, unaries: u8) {
    let cur = b.output_norm(cur, Norm::Rms);
    b.finish(cur, unaries);
}

/// Mamba 1 and 2.
pub(super) fn mamba(b: &mut Builder<'_>) {
    let second = b.model.architecture() == "mamba2";
    let mut cur = b.embeddings();
    let states = b.state_input();
    let outputs = b.output_ids();
    for il in b.layers() {
        b.enter(il);
        let mut residual = cur;
        let normed = b.rms(cur, "attn_norm");
        let mut mixed = if second {
            mamba2(b, states, normed)
        } else {
            mamba1(b, states, normed)
        };
        if b.is_last() {
            b.pick_outputs([&mut mixed, &mut residual], outputs);
        }
        cur = b.g.add_back(mixed, residual);
    }
    end(b, cur, 0);
}

pub(super) fn jamba(b: &mut Builder<'_>) {
    let mut cur = b.embeddings();
    let inputs = Inputs::of(b);
    for il in b.layers() {
        b.enter(il);
        let mut residual = cur;
        let normed = b.rms(cur, "attn_norm");
        let mut mixed = if recurs(b) {
            mamba1(b, inputs.states, normed)
        } else {
            unrotated(b, inputs, normed)
        };
        if b.is_last() {
            b.pick_outputs([&mut mixed, &mut residual], inputs.outputs);
        }
        let middle = b.g.add(residual, mixed);
        let normed = b.rms(middle, "ffn_norm");
        let fed = if b.has("ffn_gate_inp") {
            let experts = b.experts(Gating::Probabilities, false);
            b.mixture(normed, experts)
        } else {
            b.ffn(normed, Activation::Gated)
        };
        cur = b.g.add(middle, fed);
    }
    end(b, cur, 0);
}

/// Nemotron H: every layer is one of three.
pub(super) fn nemotron(b: &mut Builder<'_>) {
    let mut cur = b.embeddings();
    let inputs = Inputs::of(b);
    let feeds: Vec<bool> = b
        .hyper
        .feed_forward
        .iter()
        .map(|width| *width != 0)
        .collect();
    // a feed-forward layer leaves all of itself for the next one to finish
    for il in b.layers_after(1, |il| u64::from(feeds.get(il) == Some(&true))) {
        b.enter(il);
        let residual = cur;
        let normed = b.rms(cur, "attn_norm");
        let mixed = if recurs(b) {
            mamba2(b, inputs.states, normed)
        } else if feeds.get(il) == Some(&true) {
            nemotron_feed_forward(b, normed)
        } else {
            unrotated(b, inputs, normed)
        };
        cur = b.g.add_back(mixed, residual);
    }
    let cur = b.output_norm(cur, Norm::Rms);
    b.g.set_output(cur);
    let cur = b.g.get_rows(cur, inputs.outputs);
    b.finish(cur, 0);
}

fn nemotron_feed_forward(b: &mut Builder<'_>, normed: TensorId) -> TensorId {
    if !b.has("ffn_gate_inp") {
        return b.ffn(normed, Activation::Squared);
    }
    let latent = if b.has("ffn_latent_down") {
        b.project("ffn_latent_down", normed)
    } else {
        normed
    };
    let mut experts = b.experts(Gating::Probabilities, b.model.flag("expert_weights_norm"));
    experts.logits = b.project("ffn_gate_inp", normed);
    experts.activation = ExpertActivation::Squared;
    let mut mixed = b.mixture(latent, experts);
    if b.has("ffn_latent_up") {
        mixed = b.project("ffn_latent_up", mixed);
    }
    let shared = b.ffn_named(
        normed,
        ["ffn_up_shexp", "", "ffn_down_shexp"],
        Activation::Squared,
    );
    b.g.add(mixed, shared)
}

/// Falcon H1: attention and states side by side in every layer.
pub(super) fn falcon(b: &mut Builder<'_>) {
    let mut cur = b.embeddings();
    let inputs = Inputs::of(b);
    for il in b.layers() {
        b.enter(il);
        let normed = b.rms(cur, "attn_norm");
        let bare = Extras {
            output: "",
            ..Extras::default()
        };
        let attended = rotated_with(b, inputs, normed, NONE, bare);
        // llama.cpp loads the bias of attn_output and does not add it
        let attended = b.project("attn_output", attended);
        let normed = b.rms(cur, "attn_norm");
        let mixed = mamba2(b, inputs.states, normed);
        let both = b.g.add(attended, mixed);
        let mut middle = b.g.add(both, cur);
        if b.is_last() {
            middle = b.g.get_rows(middle, inputs.outputs);
        }
        let weight = b.exact("ffn_norm");
        let normed = b.norm_with(middle, weight, NONE, Norm::Rms);
        let fed = b.ffn(normed, Activation::Gated);
        cur = b.g.add_back(fed, middle);
    }
    end(b, cur, 0);
}

/// Granite 4.
pub(super) fn granite(b: &mut Builder<'_>) {
    let scales = b
        .model
        .float("residual_scale")
        .is_some_and(|scale| scale != 0.0);
    let rotates = b.number("rope.scaling.finetuned", 0) != 0;
    let mut cur = b.embeddings();
    let inputs = Inputs::of(b);
    for il in b.layers() {
        b.enter(il);
        let mut residual = cur;
        let normed = b.rms(cur, "attn_norm");
        let mut mixed = if recurs(b) {
            mamba2(b, inputs.states, normed)
        } else if rotates {
            let factors = b.rope_factors();
            rotated(b, inputs, normed, factors)
        } else {
            unrotated(b, inputs, normed)
        };
        if b.is_last() {
            b.pick_outputs([&mut mixed, &mut residual], inputs.outputs);
        }
        if scales {
            mixed = b.g.unary_alone(mixed);
        }
        let middle = b.g.add_back(mixed, residual);
        let normed = b.rms(middle, "ffn_norm");
        let mut fed = if b.has("ffn_gate_inp") {
            let experts = b.experts(Gating::Probabilities, true);
            let mixed = b.mixture(normed, experts);
            if b.has("ffn_up_shexp") {
                let shared = b.ffn_named(
                    normed,
                    ["ffn_up_shexp", "ffn_gate_shexp", "ffn_down_shexp"],
                    Activation::Gated,
                );
                b.g.add(mixed, shared)
            } else {
                mixed
            }
        } else {
            b.ffn(normed, Activation::Gated)
        };
        if scales {
            fed = b.g.unary_alone(fed);
        }
        cur = b.g.add_back(fed, middle);
    }
    end(
        b,
        cur,
        u8::from(
            b.model
                .float("logit_scale")
                .is_some_and(|scale| scale != 0.0),
        ),
    );
}

/// LFM 2: short convolutions between attention layers.
pub(super) fn lfm2(b: &mut Builder<'_>) {
    let mut cur = b.embeddings();
    let inputs = Inputs::of(b);
    for il in b.layers() {
        b.enter(il);
        let mut residual = cur;
        let normed = b.rms(cur, "attn_norm");
        let mut mixed = if recurs(b) {
            short_convolution(b, inputs.states, normed)
        } else {
            rotated(b, inputs, normed, NONE)
        };
        if b.is_last() {
            b.pick_outputs([&mut mixed, &mut residual], inputs.outputs);
        }
        let middle = b.g.add(residual, mixed);
        let normed = b.rms(middle, "ffn_norm");
        let fed = if b.has("ffn_gate_inp") {
            let experts = b.experts(Gating::Probabilities, true);
            b.mixture(normed, experts)
        } else {
            b.ffn(normed, Activation::Gated)
        };
        cur = b.g.add(middle, fed);
    }
    let (weight, bias) = (b.output_weight("token_embd_norm.weight"), NONE);
    let weight = if weight.is_some() {
        weight
    } else {
        b.output_weight("output_norm.weight")
    };
    let cur = b.norm_with(cur, weight, bias, Norm::Rms);
    b.finish(cur, 0);
}

/// `PLaMo` 2.
pub(super) fn plamo2(b: &mut Builder<'_>) {
    let mut cur = b.embeddings();
    let inputs = Inputs::of(b);
    for il in b.layers() {
        b.enter(il);
        let mut residual = cur;
        let normed = b.rms(cur, "attn_norm");
        let mut mixed = if recurs(b) {
            plamo2_states(b, inputs.states, normed)
        } else {
            rotated(b, inputs, normed, NONE)
        };
        if b.is_last() {
            b.pick_outputs([&mut mixed, &mut residual], inputs.outputs);
        }
        let mixed = b.rms_alone(mixed, "post_attention_norm");
        let middle = b.g.add_back(mixed, residual);
        let normed = b.rms(middle, "ffn_norm");
        let fed = b.ffn(normed, Activation::Halves);
        let fed = b.rms_alone(fed, "post_ffw_norm");
        cur = b.g.add_back(fed, middle);
    }
    end(b, cur, 0);
}
