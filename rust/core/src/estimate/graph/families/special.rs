//! Parts of single models that are too odd for a general description.

use super::super::builder::{Activation, Builder};
use super::super::experts::Experts;
use super::super::tensor::TensorId;

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

/// `GroveMoE`: a second, smaller set of experts with the same router.
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
    let small = b.mixture(cur, small);
    let small = b.g.unary(small);
    b.g.add(large, small)
}
