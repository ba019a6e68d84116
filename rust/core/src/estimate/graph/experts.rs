//! Mixture of experts (`llama-graph.cpp`, `build_moe_ffn`).

use crate::gguf::GgmlType;

use super::builder::{Builder, EXPERT_CLAMP, NONE};
use super::tensor::TensorId;

/// How the router's logits become probabilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Gating {
    /// One operation: softmax or sigmoid.
    Probabilities,
    /// Softmax of the chosen logits only.
    SoftmaxOfChosen,
    /// Square root of softplus.
    SqrtSoftplus,
}

impl Gating {
    /// `expert_gating_func` of the header.
    pub(super) fn from_number(number: i64) -> Self {
        match number {
            3 => Self::SoftmaxOfChosen,
            4 => Self::SqrtSoftplus,
            _ => Self::Probabilities,
        }
    }
}

/// What an expert does between its projections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ExpertActivation {
    /// One operation: gated, or plain without a gate.
    Usual,
    /// relu and sqr.
    Squared,
    /// `situ`: tanh of gate and up, each scaled, and a sigmoid of the gate.
    Situ,
}

/// One mixture of experts; the names are those after `blk.N.`, less `.weight`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Experts {
    pub(super) gating: Gating,
    pub(super) activation: ExpertActivation,
    /// The weights of the chosen are divided by their sum.
    pub(super) normed: bool,
    /// The weights are scaled.
    pub(super) scaled: bool,
    /// Ready logits, or a router that is not `ffn_gate_inp`.
    pub(super) logits: TensorId,
    /// The chosen ones, where something else chose.
    pub(super) chosen: TensorId,
    /// Up, gate, down and the joint gate and up.
    pub(super) names: [&'static str; 4],
    pub(super) used: i64,
    pub(super) count: i64,
    /// Llama 4 weighs the input, and chooses by logits.
    pub(super) weigh_first: bool,
    /// `GroveMoE` chooses by a sigmoid of its own.
    pub(super) second_sigmoid: bool,
    /// Experts share adjugates: ids are divided (`GroveMoE`).
    pub(super) divided_ids: bool,
}

impl Builder<'_> {
    /// The usual mixture of this layer.
    pub(super) fn experts(&self, gating: Gating, normed: bool) -> Experts {
        let scale = self.model.float("expert_weights_scale").unwrap_or(0.0);
        Experts {
            gating,
            activation: ExpertActivation::Usual,
            normed,
            scaled: scale != 0.0 && (scale - 1.0).abs() > f64::EPSILON,
            logits: NONE,
            chosen: NONE,
            names: [
                "ffn_up_exps",
                "ffn_gate_exps",
                "ffn_down_exps",
                "ffn_gate_up_exps",
            ],
            used: self.experts_used(),
            count: i64::from(self.hyper.expert_count),
            weigh_first: false,
            second_sigmoid: false,
            divided_ids: false,
        }
    }

    fn project_experts(&mut self, name: &str, cur: TensorId, chosen: TensorId) -> TensorId {
        let weight = self.weight(name);
        let mut out = self.g.mul_mat_id(weight, cur, chosen);
        if self.applies_scale(name) {
            let scale = self.scale(name);
            if scale.is_some() {
                let (count, tokens) = (self.g.ne(scale)[0], self.g.ne(cur)[2]);
                let wide = self.g.reshape_3d(scale, 1, count, 1);
                let wide = self.g.repeat(wide, [1, count, tokens, 1]);
                let picked = self.g.get_rows(wide, chosen);
                out = self.g.mul(out, picked);
            }
        }
        let bias = self.bias(name);
        if bias.is_some() {
            self.g.add_id(out, bias, chosen)
        } else {
            out
        }
    }

    pub(super) fn mixture(&mut self, cur: TensorId, e: Experts) -> TensorId {
        let [n_embd, n_tokens, ..] = self.g.ne(cur);
        let mut logits = e.logits;
        if !logits.is_some() {
            logits = self.project_biased("ffn_gate_inp", cur);
        }
        let reads_logits = e.weigh_first || e.second_sigmoid;
        let mut probs = match e.gating {
            Gating::Probabilities if reads_logits => self.g.unary(logits),
            Gating::Probabilities => self.g.unary_alone(logits),
            Gating::SoftmaxOfChosen => logits,
            Gating::SqrtSoftplus => {
                let soft = self.g.unary_alone(logits);
                self.g.unary_alone(soft)
            }
        };
        let bias = ["exp_probs_b.bias", "exp_probs_b.weight", "exp_probs_b"]
            .map(|name| self.exact(name))
            .into_iter()
            .find(|bias| bias.is_some())
            .unwrap_or(NONE);
        let mut selection = if bias.is_some() {
            self.g.add(probs, bias)
        } else {
            probs
        };
        if e.weigh_first {
            selection = logits;
        }
        if e.second_sigmoid {
            selection = self.g.unary(logits);
        }
        let groups = self.number("expert_group_count", 0);
        if groups > 1 {
            selection = self.best_groups(selection, groups, e.count, n_tokens);
        }
        let mut chosen = if e.chosen.is_some() {
            e.chosen
        } else {
            self.g.argsort_top_k(selection, e.used)
        };
        if e.divided_ids {
            let floats = self.g.cast(chosen, GgmlType::F32);
            let divided = self.g.unary(floats);
            chosen = self.g.cast(divided, GgmlType::I32);
            probs = self
                .g
                .reshape_3d(probs, 1, i64::from(self.hyper.expert_count), n_tokens);
        } else {
            probs = self.g.reshape_3d(probs, 1, e.count, n_tokens);
        }
        let mut weights = self.g.get_rows(probs, chosen);
        if e.gating == Gating::SoftmaxOfChosen {
            weights = self.g.reshape_2d(weights, e.used, n_tokens);
            weights = self.g.unary_alone(weights);
            weights = self.g.reshape_3d(weights, 1, e.used, n_tokens);
        }
        if e.normed {
            weights = self.g.reshape_2d(weights, e.used, n_tokens);
            let sum = self.g.sum_rows(weights);
            let sum = self.g.unary_alone(sum);
            weights = self.g.mul(weights, sum);
            weights = self.g.reshape_3d(weights, 1, e.used, n_tokens);
        }
        if e.scaled {
            weights = self.g.unary_alone(weights);
        }
        self.g.expand(weights);
        let mut cur = self.g.reshape_3d(cur, n_embd, 1, n_tokens);
        if e.weigh_first {
            let wide = self.g.repeat(cur, [n_embd, e.used, n_tokens, 1]);
            cur = self.g.mul(wide, weights);
        }
        let acted = self.expert_activation(cur, chosen, e);
        let mut experts = self.project_experts(e.names[2], acted, chosen);
        if !e.weigh_first {
            experts = self.g.mul(experts, weights);
        }
        self.g.expand(experts);
        self.sum_experts(experts, n_embd, n_tokens)
    }

    /// The experts' results, added one by one.
    fn sum_experts(&mut self, experts: TensorId, n_embd: i64, n_tokens: i64) -> TensorId {
        let stride = self.g.nb(experts)[2];
        let used = self.experts_used();
        let parts: Vec<TensorId> = (0..self.g.alike(used))
            .map(|_| {
                let part = self.g.view_2d(experts, n_embd, n_tokens, stride);
                self.g.expand(part);
                part
            })
            .collect();
        let mut parts = parts.into_iter();
        let mut sum = parts.next().unwrap_or(experts);
        for part in parts {
            sum = self.g.add(sum, part);
            self.g.expand(sum);
        }
        if used == 1 { self.g.cont(sum) } else { sum }
    }

    /// Keeps only the best groups of experts (`DeepSeek` V3).
    fn best_groups(
        &mut self,
        selection: TensorId,
        groups: i64,
        count: i64,
        n_tokens: i64,
    ) -> TensorId {
        let used = self.number("expert_group_used_count", 0);
        let grouped = self
            .g
            .reshape_3d(selection, count / groups, groups, n_tokens);
        let best = self.g.argsort_top_k(grouped, 2);
        let [n0, n1, n2, _] = self.g.ne(grouped);
        let single = self.g.reshape(grouped, [1, n0, n1, n2]);
        let scores = self.g.get_rows(single, best);
        let [_, s1, s2, s3] = self.g.ne(scores);
        let scores = self.g.reshape_3d(scores, s1, s2, s3);
        let scores = self.g.sum_rows(scores);
        let [_, s1, s2, _] = self.g.ne(scores);
        let scores = self.g.reshape_2d(scores, s1, s2);
        let winners = self.g.argsort_top_k(scores, used);
        let kept = self.g.get_rows(grouped, winners);
        let empty = self.g.unary(grouped);
        let masked = self.g.set_rows(empty, kept, winners);
        self.g.reshape_2d(masked, count, n_tokens)
    }

    fn expert_activation(&mut self, cur: TensorId, chosen: TensorId, e: Experts) -> TensorId {
        let [up_name, gate_name, _, joint_name] = e.names;
        let joint = self.has(joint_name);
        let has_gate = joint || self.has(gate_name);
        let (gate, up) = if joint {
            let both = self.project_experts(joint_name, cur, chosen);
            let ([n0, n1, n2, _], [_, b1, b2, _]) = (self.g.ne(both), self.g.nb(both));
            let gate = self.g.view_3d(both, [n0 / 2, n1, n2], [b1, b2]);
            let up = self.g.view_3d(both, [n0 / 2, n1, n2], [b1, b2]);
            (gate, up)
        } else {
            let up = self.project_experts(up_name, cur, chosen);
            let gate = if has_gate {
                self.project_experts(gate_name, cur, chosen)
            } else {
                up
            };
            (gate, up)
        };
        match e.activation {
            ExpertActivation::Usual if joint => self.g.glu(gate, up),
            ExpertActivation::Usual if has_gate => self.gated(gate, up, EXPERT_CLAMP),
            ExpertActivation::Usual => self.g.unary(gate),
            ExpertActivation::Squared => {
                let relu = self.g.unary(gate);
                self.g.unary_alone(relu)
            }
            ExpertActivation::Situ => self.situ(gate, up),
        }
    }

    /// The activation of Kimi K3, in elementary operations.
    pub(super) fn situ(&mut self, gate: TensorId, mut up: TensorId) -> TensorId {
        let mut bent = self.g.unary(gate);
        for _ in 1..3 {
            bent = self.g.unary_alone(bent);
        }
        let open = self.g.unary(gate);
        bent = self.g.mul(bent, open);
        if self
            .model
            .float("activation.situ_linear_beta")
            .unwrap_or(0.0)
            > 0.0
        {
            up = self.g.unary_alone(up);
            for _ in 1..3 {
                up = self.g.unary_alone(up);
            }
        }
        self.g.mul(bent, up)
    }
}
