//! Transformers with one attention and one feed-forward block per layer: what they have in common, and a [`Decoder`] for how they
//! differ. The descriptions themselves are in [`describe`](super::describe), the graph is built in `decoder/build.rs`.

mod build;

use super::super::builder::{Activation, Norm};
use super::super::experts::{ExpertActivation, Gating};

/// What happens to the embeddings before the first layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Embedding {
    Plain,
    Scaled,
    /// A norm, with `token_embd_norm` where the model has one.
    Normed(Norm),
    /// Learned positions are added.
    Positions,
}

/// Which layers turn queries and keys by position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rotary {
    Always,
    Never,
    /// Only layers with a sliding window.
    Sliding,
    /// The same; all layers where nothing slides.
    SlidingIfAny,
    /// Sliding layers and the leading dense ones.
    SlidingOrLead,
    /// All but every n-th.
    NotEvery(usize),
    /// All but the first of n, or all where nothing slides.
    NotFirstOf(usize),
}

/// Norms of queries and keys; which of them exist the model's tensors tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HeadNorms {
    /// Per head, before the rotation.
    Before(Norm),
    /// Per head, after the rotation.
    After(Norm),
    /// After the rotation, without weights for what has none.
    AfterAlways,
    /// Over all heads at once, before they are told apart.
    Whole(Norm),
}

/// Attention and feed-forward one after the other, or side by side; the names tell the order of the sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    Serial,
    /// The same; the residual is the last sum's first part (Phi 3).
    ResidualFirst,
    /// The same; the residual is the first sum's first part (`OpenELM`).
    InputFirst,
    /// `(ffn + input) + attention`, both from one norm.
    FfnInputAttention,
    /// `(ffn + attention) + input`, both from one norm.
    FfnAttentionInput,
    /// `(attention + ffn) + input`, both from one norm.
    AttentionFfnInput,
    /// `(ffn + input) + attention`, each with its own norm.
    OwnNorms,
}

/// How a router's weights are summed to one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Normed {
    Yes,
    No,
    /// As `expert_weights_norm` says.
    AsNamed,
}

/// Where the rows that give outputs are picked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outputs {
    InLastLayer,
    BeforeNorm,
    AfterNorm,
    /// Every row gives outputs.
    All,
}

/// What comes out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Head {
    Logits,
    /// Logits through the embeddings where they lie, not a copy of them (`BitNet`).
    InputMatrix,
    /// Logits, those of images overwritten (Chameleon).
    WithoutImages,
    /// Normed embeddings; encoders have no logits.
    Embeddings,
    /// The same with `enc.output_norm`.
    EncodedEmbeddings,
}

/// A kind of transformer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Decoder {
    pub(super) norm: Norm,
    pub(super) embedding: Embedding,
    pub(super) rotary: Rotary,
    /// The rotation reads frequency factors, where the model has them.
    pub(super) factors: bool,
    /// The norm before attention; none where the layer starts without.
    pub(super) first_norm: bool,
    pub(super) head_norms: HeadNorms,
    /// Queries are scaled before attention.
    pub(super) scales_queries: bool,
    /// Queries of unrotated layers (or of all) are scaled by position.
    pub(super) temperature: Temperature,
    /// The norm of what attention gives, before or after the outputs are picked.
    pub(super) after_attention: Option<&'static str>,
    pub(super) normed_before_pick: bool,
    /// Residual branches are scaled.
    pub(super) scales_residuals: bool,
    pub(super) order: Order,
    /// The norm before the feed-forward block; none where it starts without.
    pub(super) second_norm: Option<&'static str>,
    pub(super) activation: Activation,
    pub(super) expert_activation: ExpertActivation,
    pub(super) normed: Normed,
    /// The router is not told by the header (gpt-oss).
    pub(super) gating: Option<Gating>,
    pub(super) after_ffn: Option<&'static str>,
    pub(super) outputs: Outputs,
    pub(super) head: Head,
    /// Operations between raw scores and softmax.
    pub(super) score_unaries: u8,
    /// Operations on the logits.
    pub(super) logit_unaries: u8,
    /// One of a few models with a part of its own.
    pub(super) part: Part,
}

/// Scaling of queries by position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Temperature {
    None,
    /// Layers without rotation (Llama 4).
    Unrotated,
    /// All layers, where the header names a scale (Mistral 3).
    Named,
}

/// Parts that one or two models have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    None,
    /// Experts in the file are not run (Refact).
    Dense,
    /// Shared experts behind a gate of their own (Qwen 2 `MoE`).
    GatedSharedExpert,
    /// The router reads the layer's input (`SmallThinker`).
    EarlyRouter,
    /// A second set of experts with the same router (`GroveMoE`).
    Adjugates,
    /// A dense block beside the experts, the sum scaled (Grok).
    DenseBesideExperts,
    /// The experts' sum is scaled where shared experts join (Cohere 2 `MoE`).
    ScaledSharedExpert,
    /// Every layer adds the embeddings (Talkie).
    EmbeddingSkip,
    /// Experts are weighed before they run (Llama 4).
    WeighFirst,
    /// Deep-stacked vision features join the first layers (Qwen 3 VL).
    DeepStack,
    /// Values are scaled after attention (`MiMo` 2).
    ScaledValues,
    /// Experts on the layer's input, a dense block on the sum (Arctic).
    InputExperts,
    /// The layers run in loops with a norm between them (Nanbeige).
    Loops,
    /// Only every n-th layer runs its experts (ERNIE 4.5 `MoE`).
    InterleavedExperts,
    /// The first layer may start without a norm (Modern BERT).
    FirstLayerUnnormed,
    /// Norms before the last projection of both blocks (`BitNet`).
    InnerNorms,
    /// The feed-forward block reads what attention gives, not the sum (Chameleon with swin norm).
    FedByAttention,
}

impl Decoder {
    /// Llama's.
    pub(super) const PLAIN: Self = Self {
        norm: Norm::Rms,
        embedding: Embedding::Plain,
        rotary: Rotary::Always,
        factors: true,
        first_norm: true,
        head_norms: HeadNorms::Before(Norm::Rms),
        scales_queries: false,
        temperature: Temperature::None,
        after_attention: None,
        normed_before_pick: false,
        scales_residuals: false,
        order: Order::Serial,
        second_norm: Some("ffn_norm"),
        activation: Activation::Gated,
        expert_activation: ExpertActivation::Usual,
        normed: Normed::Yes,
        gating: None,
        after_ffn: None,
        outputs: Outputs::InLastLayer,
        head: Head::Logits,
        score_unaries: 0,
        logit_unaries: 0,
        part: Part::None,
    };
}
