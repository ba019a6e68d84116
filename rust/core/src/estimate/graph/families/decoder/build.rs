//! The graph of a [`Decoder`]: layer by layer, each part as the description says.

use super::super::super::attention::{AttentionInput, Extras};
use super::super::super::builder::{Builder, NONE, Norm};
use super::super::super::experts::Gating;
use super::super::super::tensor::TensorId;
use super::super::special;
use super::{
    Decoder, Embedding, Head, HeadNorms, Normed, Order, Outputs, Part, Rotary, Temperature,
};

impl Decoder {
    pub(in super::super) fn build(self, b: &mut Builder<'_>) {
        b.score_unaries = self.score_unaries;
        let deep = if self.part == Part::DeepStack {
            b.number("n_deepstack_layers", 0)
        } else {
            0
        };
        let width = b.n_embd * (deep + 1);
        let embedded = b.embeddings_of(width);
        let positions = b.positions();
        let mut cur = match self.embedding {
            Embedding::Plain => embedded,
            Embedding::Scaled => b.g.unary(embedded),
            Embedding::Normed(norm) => {
                let (weight, bias) = (
                    b.first_weight("token_embd_norm.weight"),
                    b.first_weight("token_embd_norm.bias"),
                );
                b.norm_with(embedded, weight, bias, norm)
            }
            Embedding::Positions => {
                let table = b.input_weight("position_embd.weight");
                if table.is_some() {
                    let looked_up = b.g.get_rows(table, positions);
                    b.g.add(embedded, looked_up)
                } else {
                    embedded
                }
            }
        };
        let state = Shared {
            embedded: cur,
            positions,
            attention: b.any_attention_input(),
            outputs: b.output_ids(),
            temperature: self.temperature(b),
        };
        let loop_layers = if self.part == Part::Loops {
            special::loop_layers(b)
        } else {
            0
        };
        let interleaved = if self.part == Part::InterleavedExperts {
            usize::try_from(b.number("interleave_moe_layer_step", 1)).unwrap_or(1)
        } else {
            1
        };
        let rotates: Vec<bool> = (0..b.trunk()).map(|il| self.rotates(b, il)).collect();
        for il in b.layers_by(|il| {
            u64::from(rotates.get(il) == Some(&true))
                + special::loop_mark(loop_layers, il)
                + 4 * u64::from(interleaved > 1 && (il + 1).is_multiple_of(interleaved))
        }) {
            b.enter(il);
            cur = self.layer(b, cur, state);
            if self.part == Part::Loops {
                cur = special::loop_norm(b, cur);
            }
            if (il as i64) < deep {
                let view = b.g.view_2d(embedded, b.n_embd, b.n_tokens, width * 4);
                cur = b.g.add(cur, view);
            }
        }
        if self.outputs == Outputs::BeforeNorm {
            b.g.set_output(cur);
            cur = b.g.get_rows(cur, state.outputs);
        }
        cur = if self.head == Head::EncodedEmbeddings {
            let weight = b.output_weight("enc.output_norm.weight");
            b.norm_with(cur, weight, NONE, self.norm)
        } else {
            b.output_norm(cur, self.norm)
        };
        if self.outputs == Outputs::AfterNorm {
            b.g.set_output(cur);
            cur = b.g.get_rows(cur, state.outputs);
        }
        match self.head {
            Head::Logits => b.finish(cur, self.logit_unaries),
            Head::InputMatrix => special::finish_with_input_matrix(b, cur),
            Head::WithoutImages => special::finish_without_images(b, cur),
            Head::Embeddings | Head::EncodedEmbeddings => b.finish_embeddings(cur),
        }
    }

    fn temperature(self, b: &mut Builder<'_>) -> TensorId {
        let wanted = match self.temperature {
            Temperature::None => false,
            Temperature::Unrotated => true,
            Temperature::Named => {
                b.model.float("attention.temperature_scale").unwrap_or(0.0) != 0.0
            }
        };
        if wanted { b.attention_scale() } else { NONE }
    }

    pub(in super::super) fn rotates(self, b: &Builder<'_>, il: usize) -> bool {
        let slides = b.hyper.is_sliding(il as u32);
        match self.rotary {
            Rotary::Always => true,
            Rotary::Never => false,
            Rotary::Sliding => slides,
            Rotary::SlidingIfAny => slides || b.hyper.sliding_window.is_none(),
            Rotary::SlidingOrLead => slides || (il as u32) < b.hyper.leading_dense_layers,
            Rotary::NotEvery(step) => !(il + 1).is_multiple_of(step),
            Rotary::NotFirstOf(step) => {
                // a model of just so many layers counts as one without the pattern
                b.hyper.sliding_window.is_none() || b.trunk() == step || !il.is_multiple_of(step)
            }
        }
    }

    fn layer(self, b: &mut Builder<'_>, input: TensorId, shared: Shared) -> TensorId {
        let logits = if self.part == Part::EarlyRouter {
            b.project("ffn_gate_inp", input)
        } else {
            NONE
        };
        let bare = self.part == Part::FirstLayerUnnormed && !b.has("attn_norm");
        let normed = if self.first_norm && !bare {
            b.norm(input, "attn_norm", self.norm)
        } else {
            input
        };
        let mut attention = self.attention(b, input, normed, shared);
        let mut branch = Branch {
            input,
            normed,
            logits,
            skip: shared.embedded,
        };
        if self.normed_before_pick {
            attention = self.named_norm(b, attention, self.after_attention);
        }
        if b.is_last() && self.outputs == Outputs::InLastLayer {
            attention = b.g.get_rows(attention, shared.outputs);
            branch = branch.picked(b, shared.outputs);
        }
        if !self.normed_before_pick {
            attention = self.named_norm(b, attention, self.after_attention);
        }
        if self.scales_residuals {
            attention = b.g.unary_alone(attention);
        }
        self.combine(b, attention, branch)
    }

    fn named_norm(self, b: &mut Builder<'_>, cur: TensorId, name: Option<&str>) -> TensorId {
        name.map_or(cur, |name| b.norm(cur, name, self.norm))
    }

    fn attention(
        self,
        b: &mut Builder<'_>,
        input: TensorId,
        normed: TensorId,
        shared: Shared,
    ) -> TensorId {
        let rotates = self.rotates(b, b.layer());
        let bare = b.slides() && b.model.architecture() == "step35";
        let factors = if self.factors && rotates && !bare {
            b.rope_factors()
        } else {
            NONE
        };
        let source = if b.has("attn_norm_2") && self.order == Order::FfnAttentionInput {
            b.norm(input, "attn_norm_2", self.norm)
        } else {
            normed
        };
        let [mut q, mut k, v] = self.heads(b, source);
        if rotates {
            q = b.g.rope(q, shared.positions, factors);
            k = b.g.rope(k, shared.positions, factors);
        }
        match self.head_norms {
            HeadNorms::After(norm) => [q, k] = normed_heads(b, [q, k], norm),
            HeadNorms::AfterAlways if rotates => {
                q = b.rms_alone(q, "attn_q_norm");
                k = b.rms_alone(k, "attn_k_norm");
            }
            _ => {}
        }
        let scaled_by_position =
            shared.temperature.is_some() && (self.temperature == Temperature::Named || !rotates);
        if scaled_by_position {
            q = b.g.mul(q, shared.temperature);
        }
        if self.scales_queries {
            q = b.g.unary_alone(q);
        }
        let sinks = b.weight("attn_sinks");
        if self.part == Part::InnerNorms {
            let extras = Extras {
                output: "",
                ..Extras::default()
            };
            let cur = b.attend(shared.attention, [q, k, v], extras);
            let cur = b.rms_alone(cur, "attn_sub_norm");
            return b.project_biased("attn_output", cur);
        }
        if b.has("attn_gate") {
            let cur = b.attend(
                shared.attention,
                [q, k, v],
                Extras {
                    sinks,
                    output: "",
                    ..Extras::default()
                },
            );
            return gated(b, cur, normed);
        }
        let cur = b.attend(
            shared.attention,
            [q, k, v],
            Extras {
                sinks,
                ..Extras::default()
            },
        );
        let scales = self.part == Part::ScaledValues
            && b.model
                .float("attention.value_scale")
                .is_some_and(|scale| scale != 0.0 && (scale - 1.0).abs() > 1e-9);
        if scales { b.g.unary(cur) } else { cur }
    }

    fn heads(self, b: &mut Builder<'_>, source: TensorId) -> [TensorId; 3] {
        match self.head_norms {
            HeadNorms::Whole(norm) if b.has("attn_q_norm") => {
                let (k, v, heads, kv_heads) =
                    (b.key_length(), b.value_length(), b.heads(), b.kv_heads());
                let [q_flat, k_flat, v_flat] = b.qkv_flat(source);
                let [q_flat, k_flat] = normed_heads(b, [q_flat, k_flat], norm);
                let n_tokens = b.n_tokens;
                [
                    b.g.reshape_3d(q_flat, k, heads, n_tokens),
                    b.g.reshape_3d(k_flat, k, kv_heads, n_tokens),
                    b.g.reshape_3d(v_flat, v, kv_heads, n_tokens),
                ]
            }
            HeadNorms::Before(norm) => {
                let [q, k, v] = b.qkv(source);
                let [q, k] = normed_heads(b, [q, k], norm);
                [q, k, v]
            }
            _ => b.qkv(source),
        }
    }

    /// Residuals and the feed-forward block.
    fn combine(self, b: &mut Builder<'_>, attention: TensorId, branch: Branch) -> TensorId {
        if self.part == Part::InputExperts {
            return special::input_experts(b, attention, branch.input);
        }
        match self.order {
            Order::Serial | Order::ResidualFirst | Order::InputFirst => {
                let middle = if self.order == Order::InputFirst {
                    b.g.add(branch.input, attention)
                } else {
                    b.g.add_back(attention, branch.input)
                };
                let source = match self.second_norm {
                    _ if self.part == Part::FedByAttention => attention,
                    Some(name) if name != "ffn_norm" || b.has(name) || self.first_norm => {
                        self.second(b, middle, name, branch)
                    }
                    _ => middle,
                };
                let mut cur = self.feed_forward(b, source, branch);
                cur = self.named_norm(b, cur, self.after_ffn);
                if self.scales_residuals {
                    cur = b.g.unary_alone(cur);
                }
                cur = if self.order == Order::ResidualFirst {
                    b.g.add(middle, cur)
                } else {
                    b.g.add_back(cur, middle)
                };
                if self.part == Part::EmbeddingSkip {
                    let scale = b.weight("layer_output_scale");
                    let skip = b.g.mul(branch.skip, scale);
                    cur = b.g.add(cur, skip);
                }
                cur
            }
            Order::FfnInputAttention => {
                let ffn = self.feed_forward(b, branch.normed, branch);
                let cur = b.g.add(ffn, branch.input);
                b.g.add(cur, attention)
            }
            Order::FfnAttentionInput => {
                let ffn = self.feed_forward(b, branch.normed, branch);
                let cur = b.g.add(ffn, attention);
                b.g.add(cur, branch.input)
            }
            Order::AttentionFfnInput => {
                let ffn = self.feed_forward(b, branch.normed, branch);
                let cur = b.g.add(attention, ffn);
                b.g.add(cur, branch.input)
            }
            Order::OwnNorms => {
                let source = b.norm(branch.input, "ffn_norm", self.norm);
                let ffn = self.feed_forward(b, source, branch);
                let cur = b.g.add(ffn, branch.input);
                b.g.add(cur, attention)
            }
        }
    }

    /// `StableLM`'s models without a second norm feed the first one's result to both blocks.
    fn second(self, b: &mut Builder<'_>, middle: TensorId, name: &str, branch: Branch) -> TensorId {
        if b.model.architecture() == "stablelm" && !b.has(name) {
            branch.normed
        } else {
            b.norm(middle, name, self.norm)
        }
    }

    fn feed_forward(self, b: &mut Builder<'_>, cur: TensorId, branch: Branch) -> TensorId {
        if self.part == Part::InnerNorms {
            let cur = b.ffn_named(cur, ["ffn_up", "ffn_gate", ""], self.activation);
            let cur = b.rms_alone(cur, "ffn_sub_norm");
            return b.project("ffn_down", cur);
        }
        let step = b.number("interleave_moe_layer_step", 1).max(1);
        let skips = self.part == Part::InterleavedExperts && (b.layer() as i64 + 1) % step != 0;
        if !b.has("ffn_gate_inp") || self.part == Part::Dense || skips {
            return b.ffn(cur, self.activation);
        }
        let normed = match self.normed {
            Normed::Yes => true,
            Normed::No => false,
            Normed::AsNamed => b.model.flag("expert_weights_norm"),
        };
        let gating = self
            .gating
            .unwrap_or_else(|| Gating::from_number(b.number("expert_gating_func", 0)));
        let mut experts = b.experts(gating, normed);
        experts.activation = self.expert_activation;
        experts.logits = branch.logits;
        experts.weigh_first = self.part == Part::WeighFirst;
        if self.part == Part::Adjugates {
            return special::adjugates(b, cur, experts);
        }
        let mixed = b.mixture(cur, experts);
        match self.part {
            Part::GatedSharedExpert => special::gated_shared_expert(b, cur, mixed),
            Part::DenseBesideExperts if b.has("ffn_up") => {
                let dense = b.ffn(cur, self.activation);
                let sum = b.g.add(dense, mixed);
                b.g.unary(sum)
            }
            _ if b.has("ffn_up_shexp") => {
                let shared = b.ffn_named(
                    cur,
                    ["ffn_up_shexp", "ffn_gate_shexp", "ffn_down_shexp"],
                    self.activation,
                );
                let sum = b.g.add(mixed, shared);
                if self.part == Part::ScaledSharedExpert {
                    b.g.unary(sum)
                } else {
                    sum
                }
            }
            _ => mixed,
        }
    }
}

/// What all layers of a graph read.
#[derive(Clone, Copy)]
struct Shared {
    embedded: TensorId,
    positions: TensorId,
    attention: AttentionInput,
    outputs: TensorId,
    temperature: TensorId,
}

/// What goes round attention in one layer.
#[derive(Clone, Copy)]
struct Branch {
    input: TensorId,
    normed: TensorId,
    logits: TensorId,
    skip: TensorId,
}

impl Branch {
    /// Only the rows that give outputs.
    fn picked(self, b: &mut Builder<'_>, outputs: TensorId) -> Self {
        let mut pick = |id: TensorId| {
            if id.is_some() {
                b.g.get_rows(id, outputs)
            } else {
                id
            }
        };
        Self {
            input: pick(self.input),
            normed: pick(self.normed),
            logits: pick(self.logits),
            skip: pick(self.skip),
        }
    }
}

fn normed_heads(b: &mut Builder<'_>, [q, k]: [TensorId; 2], norm: Norm) -> [TensorId; 2] {
    let q = if b.has("attn_q_norm") {
        b.norm(q, "attn_q_norm", norm)
    } else {
        q
    };
    let k = if b.has("attn_k_norm") {
        b.norm(k, "attn_k_norm", norm)
    } else {
        k
    };
    [q, k]
}

/// A sigmoid gate on what attention gives.
fn gated(b: &mut Builder<'_>, cur: TensorId, normed: TensorId) -> TensorId {
    let gate = b.project("attn_gate", normed);
    let gate = b.g.unary_alone(gate);
    let per_head = b.g.ne(gate)[0] == b.heads() && b.value_length() > 1;
    let cur = if per_head {
        let (length, heads) = (b.value_length(), b.heads());
        let per_head = b.g.reshape_3d(cur, length, heads, b.n_tokens);
        let gate = b.g.reshape_3d(gate, 1, heads, b.n_tokens);
        let cur = b.g.mul(per_head, gate);
        b.g.reshape_2d(cur, length * heads, b.n_tokens)
    } else {
        b.g.mul(cur, gate)
    };
    b.project_biased("attn_output", cur)
}
