//! `WavTokenizer`'s decoder: convolutions over time instead of layers of attention (`wavtokenizer-dec.cpp`).

use super::super::builder::{Builder, Norm};
use super::super::tensor::{Op, TensorId};
use crate::gguf::GgmlType;

pub(super) fn wavtokenizer(b: &mut Builder<'_>) {
    let count = |b: &Builder<'_>, key: &str| usize::try_from(b.number(key, 0)).unwrap_or(0);
    let (positions, blocks) = (
        count(b, "posnet.block_count").min(b.trunk()),
        count(b, "convnext.block_count").min(b.trunk()),
    );
    b.n_embd = b.number("features_length", b.n_embd);
    let embedded = b.embeddings();
    let mut cur = turned(b, embedded);
    b.enter(0);
    cur = convolved(b, "conv1d", cur);
    for il in 0..positions {
        b.enter(il);
        let at = format!("posnet.{il}");
        cur = match il {
            2 => attention(b, &at, cur),
            5 => group_normed(b, &format!("{at}.attn_norm"), cur),
            _ => residual_block(b, &at, cur),
        };
    }
    cur = turned(b, cur);
    let (weight, bias) = (
        b.first_weight("token_embd_norm.weight"),
        b.first_weight("token_embd_norm.bias"),
    );
    cur = b.norm_with(cur, weight, bias, Norm::Layer);
    cur = turned(b, cur);
    for il in 0..blocks {
        b.enter(il);
        cur = block(b, &format!("convnext.{il}"), cur);
    }
    cur = turned(b, cur);
    cur = b.output_norm(cur, Norm::Layer);
    let head = b.output_weight("output.weight");
    cur = b.g.mul_mat(head, cur);
    let bias = b.output_weight("output.bias");
    cur = b.g.weigh(cur, bias);
    b.finish_embeddings(cur);
}

/// Time and channels change places.
fn turned(b: &mut Builder<'_>, cur: TensorId) -> TensorId {
    let view = b.g.transpose(cur);
    b.g.cont(view)
}

fn pair(b: &mut Builder<'_>, name: &str) -> [TensorId; 2] {
    ["weight", "bias"].map(|part| b.layer_shared(&format!("{name}.{part}")))
}

/// The patches that a kernel sees (`ggml_im2col`).
fn patches(b: &mut Builder<'_>, kernel: TensorId, cur: TensorId) -> TensorId {
    let ([k0, k1, ..], [length, _, depth, _]) = (b.g.ne(kernel), b.g.ne(cur));
    let element = if b.g.element(kernel) == GgmlType::BF16 {
        GgmlType::F32
    } else {
        GgmlType::F16
    };
    b.g.result(
        Op::Other,
        element,
        [k0 * k1, length, depth, 1],
        &[kernel, cur],
    )
}

/// `ggml_conv_1d_ph` with its bias.
fn convolved(b: &mut Builder<'_>, name: &str, cur: TensorId) -> TensorId {
    let [kernel, bias] = pair(b, name);
    let patches = patches(b, kernel, cur);
    let ([width, length, depth, _], [_, _, channels, _]) = (b.g.ne(patches), b.g.ne(kernel));
    let flat = b.g.reshape_2d(patches, width, length * depth);
    let kernel = b.g.reshape_2d(kernel, width, channels);
    let out = b.g.mul_mat(flat, kernel);
    let out = b.g.reshape_3d(out, length, channels, depth);
    b.g.add(out, bias)
}

/// `LLM_NORM_GROUP`.
fn group_normed(b: &mut Builder<'_>, name: &str, cur: TensorId) -> TensorId {
    let [length, channels, ..] = b.g.ne(cur);
    let cur = b.g.reshape_3d(cur, length, 1, channels);
    let cur = b.g.norm(cur);
    let cur = b.g.reshape_2d(cur, length, channels);
    let [weight, bias] = pair(b, name);
    let cur = b.g.weigh(cur, weight);
    b.g.add(cur, bias)
}

fn residual_block(b: &mut Builder<'_>, at: &str, input: TensorId) -> TensorId {
    let mut cur = input;
    for half in 1..=2 {
        cur = group_normed(b, &format!("{at}.norm{half}"), cur);
        let open = b.g.unary(cur);
        cur = b.g.mul(open, cur);
        cur = convolved(b, &format!("{at}.conv{half}"), cur);
    }
    b.g.add(cur, input)
}

fn attention(b: &mut Builder<'_>, at: &str, input: TensorId) -> TensorId {
    let normed = group_normed(b, &format!("{at}.attn_norm"), input);
    let [q, k, v] =
        ["attn_q", "attn_k", "attn_v"].map(|name| convolved(b, &format!("{at}.{name}"), normed));
    let [q, k] = [q, k].map(|part| turned(b, part));
    let scores = b.g.mul_mat(k, q);
    let weights = b.g.unary(scores);
    let cur = b.g.mul_mat(weights, v);
    let cur = convolved(b, &format!("{at}.attn_output"), cur);
    b.g.add(cur, input)
}

/// A block of `ConvNeXt`: a convolution per channel, then a feed-forward block.
fn block(b: &mut Builder<'_>, at: &str, input: TensorId) -> TensorId {
    let [kernel, bias] = pair(b, &format!("{at}.dw"));
    let [length, channels, ..] = b.g.ne(input);
    let apart = b.g.reshape(input, [length, 1, channels, 1]);
    let patches = patches(b, kernel, apart);
    let cur = b.g.mul_mat(patches, kernel);
    let cur = b.g.reshape_3d(cur, length, channels, 1);
    let cur = b.g.weigh(cur, bias);
    let cur = turned(b, cur);
    let [weight, bias] = pair(b, &format!("{at}.norm"));
    let mut cur = b.norm_with(cur, weight, bias, Norm::Layer);
    for name in ["pw1", "pw2"] {
        let [weight, bias] = pair(b, &format!("{at}.{name}"));
        cur = b.g.mul_mat(weight, cur);
        cur = b.g.weigh(cur, bias);
        if name == "pw1" {
            cur = b.g.unary_alone(cur);
        }
    }
    let gamma = b.layer_shared(&format!("{at}.gamma.weight"));
    let cur = b.g.mul(cur, gamma);
    let cur = turned(b, cur);
    b.g.add_back(cur, input)
}
