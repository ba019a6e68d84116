//! Which architecture is which kind of transformer (`src/models/*.cpp`).

use super::super::builder::{Activation, Builder, Norm};
use super::super::experts::Gating;
use super::decoder::{
    Decoder, Embedding, Head, HeadNorms, Normed, Order, Outputs, Part, Rotary, Temperature,
};

const PLAIN: Decoder = Decoder::PLAIN;

/// With a mean-centred norm (GPT-2 and its kin).
const LAYER_NORM: Decoder = Decoder {
    norm: Norm::Layer,
    head_norms: HeadNorms::Before(Norm::Layer),
    factors: false,
    ..PLAIN
};

/// Norms after both blocks (Gemma 2 and 3).
const SANDWICH: Decoder = Decoder {
    after_attention: Some("post_attention_norm"),
    after_ffn: Some("post_ffw_norm"),
    ..PLAIN
};

/// The description of the model's architecture, if it is one of these.
#[expect(clippy::too_many_lines, reason = "a table of architectures")]
pub(super) fn describe(b: &Builder<'_>) -> Option<Decoder> {
    let capped = |key: &str| {
        if b.model.float(key).is_some_and(|cap| cap != 0.0) {
            3
        } else {
            0
        }
    };
    let scaled = |key: &str| u8::from(b.model.float(key).is_some_and(|scale| scale != 0.0));
    let residual = b
        .model
        .float("residual_scale")
        .is_some_and(|scale| scale != 0.0);
    let description = match b.model.architecture() {
        "llama" | "qwen2" | "qwen3" | "qwen3moe" | "internlm2" | "xverse" | "qwen" | "exaone"
        | "ernie4_5" | "deci" | "rnd1" | "mellum" | "apertus" | "paddleocr" | "qwen2vl"
        | "dream" | "spark2_5" | "qwen3tts" => PLAIN,
        "pangu-embedded" | "llada" => Decoder {
            factors: false,
            ..PLAIN
        },
        "ernie4_5-moe" => Decoder {
            part: Part::InterleavedExperts,
            ..PLAIN
        },
        "minicpm" => Decoder {
            scales_residuals: true,
            logit_unaries: 1,
            ..PLAIN
        },
        "granite" | "granitemoe" | "granite_swa" => Decoder {
            rotary: if b.model.architecture() == "granite" {
                finetuned(b)
            } else {
                Rotary::Always
            },
            scales_residuals: residual,
            logit_unaries: 1,
            ..PLAIN
        },
        "seed_oss" => Decoder {
            second_norm: Some("post_attention_norm"),
            ..PLAIN
        },
        "smollm3" => Decoder {
            rotary: Rotary::NotEvery(4),
            ..PLAIN
        },
        "arcee" => Decoder {
            activation: Activation::Squared,
            ..PLAIN
        },
        "baichuan" => Decoder {
            rotary: if b.trunk() == 32 {
                Rotary::Always
            } else {
                Rotary::Never
            },
            ..PLAIN
        },
        "refact" => Decoder {
            rotary: Rotary::Never,
            part: Part::Dense,
            ..PLAIN
        },
        "chatglm" => Decoder {
            activation: Activation::Halves,
            ..PLAIN
        },
        "phi3" | "phimoe" => Decoder {
            scales_queries: true,
            activation: Activation::Halves,
            order: Order::ResidualFirst,
            ..PLAIN
        },
        "glm4" | "plamo3" => Decoder {
            activation: Activation::Halves,
            ..SANDWICH
        },
        "glm4moe" => Decoder {
            second_norm: Some("post_attention_norm"),
            normed: Normed::AsNamed,
            ..PLAIN
        },
        "laguna" | "bailingmoe" | "bailingmoe2" | "dots1" | "exaone-moe" | "llada-moe" => {
            let rotary = if b.model.architecture() == "exaone-moe" {
                Rotary::Sliding
            } else {
                Rotary::Always
            };
            Decoder {
                rotary,
                normed: Normed::AsNamed,
                ..PLAIN
            }
        }
        "hy_v3" => Decoder {
            normed: Normed::AsNamed,
            outputs: Outputs::AfterNorm,
            ..PLAIN
        },
        "maple" => Decoder {
            rotary: Rotary::Sliding,
            ..PLAIN
        },
        "arctic" => Decoder {
            part: Part::InputExperts,
            ..PLAIN
        },
        "nanbeige" => Decoder {
            part: Part::Loops,
            ..PLAIN
        },
        "openelm" => Decoder {
            order: Order::InputFirst,
            ..PLAIN
        },
        "cogvlm" => Decoder {
            factors: false,
            outputs: Outputs::All,
            ..PLAIN
        },
        "step35" => Decoder {
            normed: Normed::AsNamed,
            outputs: Outputs::BeforeNorm,
            ..PLAIN
        },
        "gemma-embedding" => Decoder {
            embedding: Embedding::Scaled,
            scales_queries: true,
            head: Head::Embeddings,
            factors: false,
            ..SANDWICH
        },
        "llama-embed" => Decoder {
            head: Head::Embeddings,
            ..PLAIN
        },
        "eurobert" => Decoder {
            head: Head::Embeddings,
            factors: false,
            ..PLAIN
        },
        "neo-bert" => Decoder {
            activation: Activation::Halves,
            head: Head::EncodedEmbeddings,
            factors: false,
            ..PLAIN
        },
        "modern-bert" => Decoder {
            embedding: Embedding::Normed(Norm::Layer),
            activation: Activation::Halves,
            head: Head::Embeddings,
            part: Part::FirstLayerUnnormed,
            ..LAYER_NORM
        },
        "chameleon" => {
            let plain = Decoder {
                head_norms: HeadNorms::Before(Norm::Layer),
                head: Head::WithoutImages,
                factors: false,
                ..PLAIN
            };
            if b.model.flag("swin_norm") {
                Decoder {
                    first_norm: false,
                    after_attention: Some("attn_norm"),
                    second_norm: None,
                    after_ffn: Some("ffn_norm"),
                    part: Part::FedByAttention,
                    ..plain
                }
            } else {
                plain
            }
        }
        "bitnet" => Decoder {
            factors: false,
            head: Head::InputMatrix,
            part: Part::InnerNorms,
            ..PLAIN
        },
        "deepseek" => Decoder {
            normed: Normed::No,
            ..PLAIN
        },
        "hunyuan-dense" | "hunyuan-moe" | "hunyuan_vl" | "maincoder" => Decoder {
            head_norms: HeadNorms::After(Norm::Rms),
            ..PLAIN
        },
        "minimax-m2" => Decoder {
            head_norms: HeadNorms::Whole(Norm::Rms),
            ..PLAIN
        },
        "olmoe" => Decoder {
            head_norms: HeadNorms::Whole(Norm::Rms),
            normed: Normed::No,
            ..PLAIN
        },
        "olmo2" => Decoder {
            head_norms: HeadNorms::Whole(Norm::Rms),
            first_norm: false,
            second_norm: None,
            ..SANDWICH
        },
        "olmo" => Decoder {
            norm: Norm::Layer,
            ..PLAIN
        },
        "exaone4" => Decoder {
            rotary: Rotary::SlidingIfAny,
            first_norm: false,
            second_norm: None,
            ..SANDWICH
        },
        "qwen2moe" => Decoder {
            normed: Normed::No,
            part: Part::GatedSharedExpert,
            ..PLAIN
        },
        "qwen3vl" | "qwen3vlmoe" => Decoder {
            part: Part::DeepStack,
            ..PLAIN
        },
        "mistral3" => Decoder {
            temperature: Temperature::Named,
            ..PLAIN
        },
        "llama4" => Decoder {
            rotary: if b.hyper.sliding_window.is_some() {
                Rotary::NotEvery(4)
            } else {
                Rotary::NotEvery(b.trunk().max(1))
            },
            head_norms: if b.hyper.expert_count == 128 {
                HeadNorms::Before(Norm::Rms)
            } else {
                HeadNorms::AfterAlways
            },
            temperature: Temperature::Unrotated,
            normed: Normed::No,
            part: Part::WeighFirst,
            ..PLAIN
        },
        "gpt-oss" => Decoder {
            second_norm: Some("post_attention_norm"),
            gating: Some(Gating::SoftmaxOfChosen),
            normed: Normed::No,
            outputs: Outputs::BeforeNorm,
            ..PLAIN
        },
        "mimo2" => Decoder {
            part: Part::ScaledValues,
            ..PLAIN
        },
        "gemma" => Decoder {
            embedding: Embedding::Scaled,
            scales_queries: true,
            ..PLAIN
        },
        "gemma2" => Decoder {
            embedding: Embedding::Scaled,
            scales_queries: true,
            score_unaries: 3,
            logit_unaries: 3,
            ..SANDWICH
        },
        "gemma3" => {
            let logit_unaries = capped("final_logit_softcapping");
            Decoder {
                embedding: Embedding::Scaled,
                scales_queries: true,
                logit_unaries,
                ..SANDWICH
            }
        }
        "afmoe" => Decoder {
            embedding: Embedding::Scaled,
            rotary: Rotary::NotEvery(4),
            normed_before_pick: true,
            normed: Normed::AsNamed,
            ..SANDWICH
        },
        "muse-glimmer" => Decoder {
            embedding: Embedding::Normed(Norm::Rms),
            rotary: Rotary::Sliding,
            normed_before_pick: true,
            logit_unaries: 1 + capped("final_logit_softcapping"),
            ..SANDWICH
        },
        "grok" => Decoder {
            after_attention: Some("attn_output_norm"),
            after_ffn: Some(if b.model.weight(0, "layer_output_norm.weight").is_some() {
                "layer_output_norm"
            } else {
                "post_ffw_norm"
            }),
            score_unaries: 3,
            logit_unaries: 1 + capped("final_logit_softcapping"),
            part: Part::DenseBesideExperts,
            ..PLAIN
        },
        "grovemoe" => Decoder {
            part: Part::Adjugates,
            ..PLAIN
        },
        "smallthinker" => Decoder {
            rotary: Rotary::NotFirstOf(4),
            part: Part::EarlyRouter,
            ..PLAIN
        },
        "talkie" => Decoder {
            embedding: Embedding::Normed(Norm::Rms),
            head_norms: HeadNorms::AfterAlways,
            logit_unaries: 1,
            part: Part::EmbeddingSkip,
            ..PLAIN
        },
        "plamo" => Decoder {
            order: Order::FfnAttentionInput,
            ..PLAIN
        },
        "dbrx" => Decoder {
            second_norm: Some("attn_output_norm"),
            ..LAYER_NORM
        },
        "command-r" => Decoder {
            order: Order::FfnInputAttention,
            logit_unaries: scaled("logit_scale"),
            ..LAYER_NORM
        },
        "cohere2" => Decoder {
            order: Order::FfnInputAttention,
            rotary: Rotary::Sliding,
            factors: true,
            logit_unaries: scaled("logit_scale"),
            ..LAYER_NORM
        },
        "cohere2moe" => Decoder {
            norm: if b
                .model
                .float("attention.layer_norm_rms_epsilon")
                .unwrap_or(0.0)
                == 0.0
            {
                Norm::Layer
            } else {
                Norm::Rms
            },
            order: Order::FfnInputAttention,
            rotary: Rotary::SlidingOrLead,
            normed: Normed::AsNamed,
            outputs: Outputs::AfterNorm,
            logit_unaries: scaled("logit_scale"),
            part: Part::ScaledSharedExpert,
            ..PLAIN
        },
        "falcon" => Decoder {
            order: Order::FfnAttentionInput,
            ..LAYER_NORM
        },
        "phi2" => Decoder {
            order: Order::AttentionFfnInput,
            scales_queries: true,
            ..LAYER_NORM
        },
        "gptneox" => {
            let parallel = b.model.flag("use_parallel_residual");
            Decoder {
                order: if parallel {
                    Order::OwnNorms
                } else {
                    Order::Serial
                },
                ..LAYER_NORM
            }
        }
        "gpt2" | "starcoder" => Decoder {
            embedding: Embedding::Positions,
            rotary: Rotary::Never,
            ..LAYER_NORM
        },
        "mpt" => Decoder {
            embedding: Embedding::Positions,
            rotary: Rotary::Never,
            head_norms: HeadNorms::Whole(Norm::Layer),
            ..LAYER_NORM
        },
        "bloom" => Decoder {
            embedding: Embedding::Normed(Norm::Layer),
            rotary: Rotary::Never,
            ..LAYER_NORM
        },
        "jais" => Decoder {
            rotary: Rotary::Never,
            ..LAYER_NORM
        },
        "jais2" | "nemotron" => Decoder {
            activation: Activation::Squared,
            ..LAYER_NORM
        },
        "starcoder2" | "stablelm" | "orion" | "codeshell" | "pockettts" => LAYER_NORM,
        _ => return None,
    };
    Some(description)
}

/// Granite rotates unless the header says that it was not tuned to.
fn finetuned(b: &Builder<'_>) -> Rotary {
    if b.number("rope.scaling.finetuned", 1) == 0 {
        Rotary::Never
    } else {
        Rotary::Always
    }
}
