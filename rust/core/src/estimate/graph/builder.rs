//! The pieces that all model graphs share: weights, inputs, norms, projections (`llama-graph.cpp`).

use crate::gguf::GgmlType;
use crate::model::Hyperparameters;

use super::model::{GraphModel, Layer};
use super::ops::Graph;
use super::reserve::Batch;
use super::tensor::TensorId;

/// Layer norm, with or without the mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Norm {
    Layer,
    Rms,
}

/// How a feed-forward block combines gate and up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Activation {
    /// Gate and up go through one operation (silu, gelu and relu with a parallel gate).
    Gated,
    /// relu and sqr, two operations.
    Squared,
    /// Gate and up are the halves of one tensor (swiglu, geglu).
    Halves,
}

/// A model's graph while it is built.
pub(super) struct Builder<'a> {
    pub(super) g: &'a mut Graph,
    pub(super) model: &'a GraphModel,
    pub(super) hyper: &'a Hyperparameters,
    pub(super) batch: &'a Batch<'a>,
    pub(super) n_embd: i64,
    pub(super) n_tokens: i64,
    pub(super) n_seqs: i64,
    /// The layer that is built.
    il: usize,
    /// The layer that [`weight`](Self::weight) looks into: another one where weights run more than once.
    pub(super) home: usize,
    /// Weights of the current layer and of no layer that are in the graph already.
    pub(super) known: Vec<TensorId>,
    pub(super) layer: Option<&'a Layer>,
    pub(super) known_shared: Vec<(u64, TensorId)>,
    /// The same of layers whose weights run more than once, by layer.
    pub(super) known_again: Vec<Vec<TensorId>>,
    /// The batch's token numbers.
    pub(super) tokens: TensorId,
    /// Whether flash attention that runs elsewhere than its layer is given up everywhere.
    pub(super) may_give_up: bool,
    /// Operations between the raw scores and the softmax without flash attention (soft capping).
    pub(super) score_unaries: u8,
}

pub(super) const NONE: TensorId = TensorId::NONE;

/// Bounds of what experts multiply, by layer.
pub(super) const EXPERT_CLAMP: &str = "swiglu_clamp_exp";

/// The same of shared experts and dense layers.
pub(super) const CLAMP: &str = "swiglu_clamp_shexp";

impl<'a> Builder<'a> {
    pub(super) fn new(
        g: &'a mut Graph,
        model: &'a GraphModel,
        hyper: &'a Hyperparameters,
        batch: &'a Batch<'a>,
    ) -> Self {
        Self {
            g,
            model,
            hyper,
            batch,
            n_embd: i64::from(hyper.embedding_length),
            n_tokens: batch.tokens,
            n_seqs: batch.sequences,
            il: 0,
            home: 0,
            known: Vec::new(),
            layer: None,
            known_shared: Vec::new(),
            known_again: Vec::new(),
            tokens: NONE,
            may_give_up: batch.may_give_up,
            score_unaries: 0,
        }
    }

    // layers

    /// Makes `il` the layer whose weights are looked up.
    pub(super) fn enter(&mut self, il: usize) {
        self.il = il;
        self.home = il;
        self.layer = self.model.layer(il);
        self.known.clear();
        self.known
            .resize(self.layer.map_or(0, |layer| layer.weights.len()), NONE);
        self.g.mark();
    }

    /// Makes `il` the current layer, which runs with the weights of layer `home`; its scales are its own.
    pub(super) fn enter_with_weights_of(&mut self, il: usize, home: usize) {
        let most = self.home.max(home);
        if self.known_again.len() <= most {
            self.known_again.resize(most + 1, Vec::new());
        }
        if !self.known.is_empty()
            && let Some(slot) = self.known_again.get_mut(self.home)
        {
            *slot = std::mem::take(&mut self.known);
        }
        let known = self.known_again.get_mut(home).map(std::mem::take);
        self.enter(il);
        self.home = home;
        self.layer = self.model.layer(home);
        self.known = known.unwrap_or_default();
        self.known
            .resize(self.layer.map_or(0, |layer| layer.weights.len()), NONE);
    }

    pub(super) fn layer(&self) -> usize {
        self.il
    }

    pub(super) fn trunk(&self) -> usize {
        self.hyper.trunk_layers() as usize
    }

    pub(super) fn is_last(&self) -> bool {
        self.il + 1 == self.trunk()
    }

    pub(super) fn heads(&self) -> i64 {
        self.hyper.heads.get(self.il).map_or(0, |n| i64::from(*n))
    }

    pub(super) fn kv_heads(&self) -> i64 {
        self.hyper
            .kv_heads
            .get(self.il)
            .map_or(0, |n| i64::from(*n))
    }

    pub(super) fn key_length(&self) -> i64 {
        i64::from(self.hyper.key_length_of(self.il as u32))
    }

    pub(super) fn value_length(&self) -> i64 {
        i64::from(self.hyper.value_length_of(self.il as u32))
    }

    pub(super) fn slides(&self) -> bool {
        self.hyper.is_sliding(self.il as u32)
    }

    pub(super) fn experts_used(&self) -> i64 {
        self.hyper
            .experts_used
            .get(self.il)
            .map_or(0, |n| i64::from(*n))
    }

    pub(super) fn number(&self, key: &str, default: i64) -> i64 {
        self.model.number(key, default)
    }

    // inputs

    /// `build_inp_embd`, before any scaling.
    pub(super) fn embeddings(&mut self) -> TensorId {
        let n_embd = self.n_embd;
        self.embeddings_of(n_embd)
    }

    /// `build_inp_embd` where the input carries more than one embedding per token (deep stacks).
    pub(super) fn embeddings_of(&mut self, width: i64) -> TensorId {
        let tokens = self.g.input(GgmlType::I32, [self.n_tokens, 1, 1, 1]);
        self.tokens = tokens;
        let vectors = self.g.input(GgmlType::F32, [width, self.n_tokens, 1, 1]);
        let table = self.input_weight("token_embd.weight");
        let mut cur = self.g.get_rows(table, tokens);
        if width != self.n_embd {
            cur = self.g.pad(cur, [width - self.n_embd, 0, 0, 0]);
        }
        self.g.expand(cur);
        self.g.expand(vectors);
        if width != self.n_embd {
            let stride = self.g.nb(cur)[1];
            cur = self.g.view_2d(cur, self.n_embd, self.n_tokens, stride);
        }
        if self.scales_embeddings() {
            cur = self.g.unary_alone(cur);
        }
        self.g.expand(cur);
        cur
    }

    /// `f_embedding_scale != 0`: only these architectures read the key.
    fn scales_embeddings(&self) -> bool {
        let default = match self.model.architecture() {
            "minicpm" => 12.0,
            "grok" => 78.4,
            "granite" | "granitemoe" | "granitehybrid" | "granite_swa" | "hrm_text" => 0.0,
            _ => return false,
        };
        self.model.float("embedding_scale").unwrap_or(default) != 0.0
    }

    /// `build_inp_pos`; multi-dimensional positions (M-RoPE) take four numbers per token (`llama_model_rope_type`).
    pub(super) fn positions(&mut self) -> TensorId {
        let sections = self
            .model
            .array("rope.dimension_sections")
            .unwrap_or_default();
        let in_use = matches!(sections, [first, second, ..] if *first > 0.0 && *second > 0.0);
        let wide = match self.model.architecture() {
            "qwen2vl" | "paddleocr" | "qwen3vl" | "qwen3vlmoe" | "qwen35" | "qwen35moe"
            | "qwen4exp" | "qwen3tts" => true,
            "glm4" | "glm4moe" | "hunyuan_vl" | "bailingmoe3" => in_use,
            "dflash" => sections.iter().any(|section| *section != 0.0),
            _ => false,
        };
        self.g.input(
            GgmlType::I32,
            [self.n_tokens * if wide { 4 } else { 1 }, 1, 1, 1],
        )
    }

    /// `build_inp_attn_scale`.
    pub(super) fn attention_scale(&mut self) -> TensorId {
        self.g.input(GgmlType::F32, [1, 1, self.n_tokens, 1])
    }

    pub(super) fn output_ids(&mut self) -> TensorId {
        self.g.input(GgmlType::I32, [self.batch.outputs, 1, 1, 1])
    }

    // norms and projections

    #[cfg_attr(test, track_caller)]
    pub(super) fn norm(&mut self, cur: TensorId, name: &str, kind: Norm) -> TensorId {
        let normed = self.bare_norm(cur, kind);
        self.norm_weights(normed, name)
    }

    #[cfg_attr(test, track_caller)]
    pub(super) fn rms(&mut self, cur: TensorId, name: &str) -> TensorId {
        self.norm(cur, name, Norm::Rms)
    }

    /// The same where nothing else reads `cur`.
    #[cfg_attr(test, track_caller)]
    pub(super) fn rms_alone(&mut self, cur: TensorId, name: &str) -> TensorId {
        let normed = self.g.unary_alone(cur);
        self.norm_weights(normed, name)
    }

    fn bare_norm(&mut self, cur: TensorId, kind: Norm) -> TensorId {
        match kind {
            Norm::Layer => self.g.norm(cur),
            Norm::Rms => self.g.rms_norm(cur),
        }
    }

    /// A norm's weight and bias, where it has them.
    #[cfg_attr(test, track_caller)]
    fn norm_weights(&mut self, normed: TensorId, name: &str) -> TensorId {
        if self.g.merges {
            return normed;
        }
        let (weight, bias) = (self.weight(name), self.bias(name));
        self.weighed(normed, [weight, bias])
    }

    #[cfg_attr(test, track_caller)]
    fn weighed(&mut self, mut cur: TensorId, weights: [TensorId; 2]) -> TensorId {
        for weight in weights.into_iter().filter(|weight| weight.is_some()) {
            cur = self.g.weigh(cur, weight);
        }
        cur
    }

    #[cfg_attr(test, track_caller)]
    pub(super) fn norm_with(
        &mut self,
        cur: TensorId,
        weight: TensorId,
        bias: TensorId,
        kind: Norm,
    ) -> TensorId {
        let normed = self.bare_norm(cur, kind);
        self.weighed(normed, [weight, bias])
    }

    pub(super) fn output_norm(&mut self, cur: TensorId, kind: Norm) -> TensorId {
        let (weight, bias) = (
            self.output_weight("output_norm.weight"),
            self.output_weight("output_norm.bias"),
        );
        self.norm_with(cur, weight, bias, kind)
    }

    /// `build_lora_mm`: a projection and, where the model has one, its scale.
    #[cfg_attr(test, track_caller)]
    pub(super) fn project(&mut self, name: &str, cur: TensorId) -> TensorId {
        let weight = self.weight(name);
        let mut out = self.g.mul_mat(weight, cur);
        if !self.g.merges && self.applies_scale(name) {
            let scale = self.scale(name);
            if scale.is_some() {
                out = self.g.weigh(out, scale);
            }
        }
        out
    }

    /// A product with a weight and nothing else (`ggml_mul_mat`, or `build_lora_mm` without a scale).
    pub(super) fn matmul(&mut self, name: &str, cur: TensorId) -> TensorId {
        let weight = self.weight(name);
        self.g.mul_mat(weight, cur)
    }

    /// A projection with its bias, if there is one.
    #[cfg_attr(test, track_caller)]
    pub(super) fn project_biased(&mut self, name: &str, cur: TensorId) -> TensorId {
        let out = self.project(name, cur);
        if self.g.merges {
            return out;
        }
        let bias = self.bias(name);
        self.weighed(out, [bias, NONE])
    }

    /// A rotation; none without positions.
    pub(super) fn rope(&mut self, cur: TensorId, positions: TensorId) -> TensorId {
        if positions.is_some() {
            self.g.rope(cur, positions, NONE)
        } else {
            cur
        }
    }

    /// `build_qkv`: query, keys and values per head, from one projection or three.
    pub(super) fn qkv(&mut self, cur: TensorId) -> [TensorId; 3] {
        let (k, v) = (self.key_length(), self.value_length());
        let (heads, kv_heads) = (self.heads(), self.kv_heads());
        self.qkv_sized(cur, [k, heads], [k, kv_heads], [v, kv_heads])
    }

    /// `build_qkv` with sizes: `[head length, heads]` of each.
    pub(super) fn qkv_sized(
        &mut self,
        cur: TensorId,
        q: [i64; 2],
        k: [i64; 2],
        v: [i64; 2],
    ) -> [TensorId; 3] {
        let clamps = self.model.float("attention.clamp_kqv").unwrap_or(0.0) > 0.0;
        let n_tokens = self.n_tokens;
        if self.has("attn_qkv") {
            let mut qkv = self.project_biased("attn_qkv", cur);
            if clamps {
                qkv = self.g.unary_alone(qkv);
            }
            let stride = self.g.nb(qkv)[1];
            return [q, k, v].map(|[length, heads]| {
                self.g
                    .view_3d(qkv, [length, heads, n_tokens], [length * 4, stride])
            });
        }
        let mut parts = [("attn_q", q), ("attn_k", k), ("attn_v", v)].map(|(name, shape)| {
            let mut part = self.project_biased(name, cur);
            if clamps {
                part = self.g.unary_alone(part);
            }
            (part, shape)
        });
        for (part, [length, heads]) in &mut parts {
            *part = self.g.reshape_3d(*part, *length, *heads, n_tokens);
        }
        parts.map(|(part, _)| part)
    }

    /// `build_qkv` without telling heads apart.
    pub(super) fn qkv_flat(&mut self, cur: TensorId) -> [TensorId; 3] {
        let sizes = [
            self.key_length() * self.heads(),
            self.key_length() * self.kv_heads(),
            self.value_length() * self.kv_heads(),
        ];
        if self.has("attn_qkv") {
            let qkv = self.project_biased("attn_qkv", cur);
            let stride = self.g.nb(qkv)[1];
            let n_tokens = self.n_tokens;
            return sizes.map(|size| {
                let part = self.g.view_2d(qkv, size, n_tokens, stride);
                self.g.cont(part)
            });
        }
        ["attn_q", "attn_k", "attn_v"].map(|name| self.project_biased(name, cur))
    }

    /// `build_ffn` on the layer's `ffn_up`, `ffn_gate` and `ffn_down`.
    pub(super) fn ffn(&mut self, cur: TensorId, activation: Activation) -> TensorId {
        self.ffn_named(cur, ["ffn_up", "ffn_gate", "ffn_down"], activation)
    }

    /// `build_ffn` on weights by name; a gate that the layer lacks is left out.
    pub(super) fn ffn_named(
        &mut self,
        cur: TensorId,
        [up, gate, down]: [&str; 3],
        activation: Activation,
    ) -> TensorId {
        let has_gate = self.has(gate);
        let raised = if self.has(up) {
            self.project_biased(up, cur)
        } else {
            cur
        };
        let gated = if has_gate {
            self.project_biased(gate, cur)
        } else {
            raised
        };
        let mut cur = match activation {
            Activation::Gated if has_gate => self.gated(gated, raised, CLAMP),
            Activation::Gated => self.g.unary_alone(gated),
            Activation::Squared => {
                let cur = self.g.unary_alone(gated);
                self.g.unary_alone(cur)
            }
            Activation::Halves => self.g.glu_halves(gated),
        };
        if has_gate && activation == Activation::Squared {
            cur = self.g.mul(cur, raised);
        }
        if self.has(down) {
            self.project_biased(down, cur)
        } else {
            cur
        }
    }

    /// Gate and up in one operation; in four where the layer bounds them and its architecture knows no operation that does
    /// (`build_ffn`, `build_moe_ffn`).
    pub(super) fn gated(&mut self, gate: TensorId, up: TensorId, clamp: &str) -> TensorId {
        if !self.clamps(clamp, self.il) {
            return self.g.glu(gate, up);
        }
        let up = self.g.unary_alone(up);
        let gate = self.g.unary_alone(gate);
        let gate = self.g.unary_alone(gate);
        self.g.mul(gate, up)
    }

    pub(super) fn clamps(&self, key: &str, il: usize) -> bool {
        matches!(self.model.architecture(), "bailingmoe3" | "step35")
            && self.model.at_layer(key, il).unwrap_or(0.0) > 1e-6
    }

    /// Only the rows that give logits go on; in the last layer.
    pub(super) fn pick_outputs(&mut self, tensors: [&mut TensorId; 2], ids: TensorId) {
        for tensor in tensors {
            *tensor = self.g.get_rows(*tensor, ids);
        }
    }

    /// The output matrix and what is done to the logits; `cur` and they are outputs (`llm_graph_result::set_outputs`).
    pub(super) fn finish(&mut self, cur: TensorId, unaries: u8) {
        self.g.set_output(cur);
        self.finish_with(cur, unaries);
    }

    /// The same where the embeddings that are an output came before `cur`.
    pub(super) fn finish_with(&mut self, cur: TensorId, unaries: u8) {
        let mut out = self.logits(cur);
        for _ in 0..unaries {
            out = self.g.unary_alone(out);
        }
        self.g.set_output(out);
        self.g.expand(out);
    }

    /// The end of a model that gives embeddings only.
    pub(super) fn finish_embeddings(&mut self, cur: TensorId) {
        self.g.set_output(cur);
        self.g.expand(cur);
    }

    fn logits(&mut self, cur: TensorId) -> TensorId {
        let head = self.head_weight();
        let cur = self.g.mul_mat(head, cur);
        let bias = self.output_weight("output.bias");
        if bias.is_some() {
            self.g.add(cur, bias)
        } else {
            cur
        }
    }
}
