//! Parts of single models that are too odd for a general description.

use super::super::builder::{Activation, Builder, Norm};
use super::super::experts::{Experts, Gating};
use super::super::tensor::{Op, TensorId};
use crate::gguf::GgmlType;

const SHARED: [&str; 3] = ["ffn_up_shexp", "ffn_gate_shexp", "ffn_down_shexp"];

/// Qwen 2 `MoE`: the shared expert's gate is `silu(x)/x`, that is a sigmoid.
pub(super) fn gated_shared_expert(b: &mut Builder<'_>, cur: TensorId, mixed: TensorId) -> TensorId {
    let gate = b.project("ffn_gate_inp_shexp", cur);
    let bent = b.g.unary(gate);
    let gate = b.g.mul(bent, gate);
    let shared = b.ffn_named(cur, SHARED, Activation::Gated);
    let shared = b.g.mul(shared, gate);
    b.g.add(mixed, shared)
}

/// `GroveMoE`: a second, smaller set of experts with the same router, on what the first gives.
pub(super) fn adjugates(b: &mut Builder<'_>, cur: TensorId, experts: Experts) -> TensorId {
    let logits = b.project("ffn_gate_inp", cur);
    let large = b.mixture(
        cur,
        Experts {
            logits,
            second_sigmoid: true,
            ..experts
        },
    );
    let per_group = b.number("experts_per_group", 1).max(1);
    let count = experts.count / per_group;
    let small = Experts {
        logits,
        second_sigmoid: true,
        divided_ids: count != experts.count,
        names: ["ffn_up_chexps", "ffn_gate_chexps", "ffn_down_chexps", ""],
        count,
        used: experts.used.min(count),
        ..experts
    };
    let small = b.mixture(large, small);
    let small = b.g.unary_alone(small);
    b.g.add(large, small)
}

/// Arctic: a dense block on the sum, experts on the layer's input.
pub(super) fn input_experts(b: &mut Builder<'_>, attention: TensorId, input: TensorId) -> TensorId {
    let middle = b.g.add(attention, input);
    let normed = b.rms(middle, "ffn_norm");
    let dense = b.ffn(normed, Activation::Gated);
    let dense = b.g.add(dense, middle);
    let normed = b.rms(input, "ffn_norm_exps");
    let experts = b.experts(Gating::Probabilities, true);
    let mixed = b.mixture(normed, experts);
    b.g.add(mixed, dense)
}

/// Nanbeige: between two passes through the layers stands the output norm.
pub(super) fn loop_norm(b: &mut Builder<'_>, cur: TensorId) -> TensorId {
    let layers = loop_layers(b);
    let ends = loop_mark(layers, b.layer()) != 0 && !b.is_last();
    if ends && !b.model.flag("skip_loop_final_norm") {
        b.output_norm(cur, Norm::Rms)
    } else {
        cur
    }
}

/// The layers of one pass.
pub(super) fn loop_layers(b: &Builder<'_>) -> usize {
    let loops = usize::try_from(b.number("num_loops", 1))
        .unwrap_or(1)
        .max(1);
    (b.trunk() / loops).max(1)
}

/// Tells the last layer of a pass from the others.
pub(super) fn loop_mark(layers: usize, il: usize) -> u64 {
    if layers > 0 && (il + 1).is_multiple_of(layers) {
        2
    } else {
        0
    }
}

/// Image tokens of Chameleon's vocabulary.
const IMAGE_TOKENS: i64 = 8192;

/// Chameleon's logits of image tokens are overwritten in a copy.
pub(super) fn finish_without_images(b: &mut Builder<'_>, cur: TensorId) {
    b.g.set_output(cur);
    let head = b.head_weight();
    let logits = b.g.mul_mat(head, cur);
    let lowest = b.g.blank(GgmlType::F32, [IMAGE_TOKENS, 1, 1, 1]);
    let lowest = b.g.unary_alone(lowest);
    let ne = b.g.ne(logits);
    let out = b.g.result(Op::Other, GgmlType::F32, ne, &[logits, lowest]);
    b.g.set_output(out);
    b.g.expand(out);
}

/// `BitNet` multiplies by the embeddings where they lie.
pub(super) fn finish_with_input_matrix(b: &mut Builder<'_>, cur: TensorId) {
    b.g.set_output(cur);
    let table = b.input_weight("token_embd.weight");
    let out = b.g.mul_mat(table, cur);
    b.g.set_output(out);
    b.g.expand(out);
}
