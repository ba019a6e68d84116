//! What llama.cpp knows of each architecture, as tables.
//!
//! Source: `LLM_ARCH_NAMES` (llama-arch.cpp), `load_arch_hparams` of
//! src/models/*.cpp and `llama_model::create_memory` (llama-model.cpp).

/// How a sliding window masks (`llama_swa_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlidingKind {
    /// The last `window` tokens.
    Standard,
    /// Chunks of `window` tokens.
    Chunked,
    /// Half a window to each side.
    Symmetric,
}

/// Which layers slide, and when the architecture slides at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SlidingRule {
    pub(crate) kind: SlidingKind,
    pub(crate) when: SlidingWhen,
    /// The window where the header names none.
    pub(crate) default_window: u32,
    pub(crate) pattern: SlidingPattern,
}

/// When sliding is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SlidingWhen {
    Always,
    /// The header names a window that is not 0.
    WindowNamed,
    /// The header does not name a window of 0.
    UnlessZero,
    /// Only models of this many layers.
    LayerCount(u32),
}

/// Which layers slide where the header has no list of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SlidingPattern {
    /// Every n-th layer is dense, the last of each group.
    DenseLast(u32),
    /// Every n-th layer is dense, the first of each group.
    DenseFirst(u32),
    /// Only the list in the header counts.
    Listed,
    /// All layers.
    All,
    /// The layers that are not recurrent.
    Attention,
}

/// Which layers carry a recurrent state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RecurrentRule {
    None,
    All,
    /// Layers without KV heads.
    NoKvHeads,
    /// Layers without KV heads and without a feed-forward block.
    NoKvHeadsNoFeedForward,
    /// All but every n-th, unless the header lists them or names another interval.
    Interval(u32),
}

/// How a model remembers (`llama_model::create_memory`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Memory {
    /// Encoders and diffusion models keep nothing.
    None,
    /// One KV cache, or one for the sliding and one for the dense layers.
    Attention,
    /// A state per slot.
    Recurrent,
    /// Some layers of the one, some of the other.
    Hybrid(HybridFilter),
    /// `DeepSeek` sparse attention: a second cache with the indexer's keys.
    SparseIndexer,
    /// The same beside a sliding cache.
    SparseIndexerSliding,
    /// `MiniMax` sparse attention: the indexer of the layers after the dense ones.
    BlockIndexer,
    /// Hybrid with an indexer cache.
    HybridIndexer,
    /// `DeepSeek` V4: compressed caches and compressor states.
    Compressed,
    /// A draft head that reads the target's cache.
    SharedWithTarget,
}

/// Which layers of a hybrid attend and which are recurrent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HybridFilter {
    /// A layer is one or the other.
    Exclusive,
    /// The same, without the appended prediction layers.
    ExclusiveTrunk,
    /// Every layer is both.
    Both,
    /// Only layers without a feed-forward block remember.
    NoFeedForward,
}

const KNOWN: &[&str] = &[
    "afmoe",
    "apertus",
    "arcee",
    "arctic",
    "arwkv7",
    "baichuan",
    "bailingmoe",
    "bailingmoe2",
    "bailingmoe3",
    "bert",
    "bitnet",
    "bloom",
    "chameleon",
    "chatglm",
    "codeshell",
    "cogvlm",
    "cohere2",
    "cohere2moe",
    "command-r",
    "dbrx",
    "deci",
    "deepseek",
    "deepseek2",
    "deepseek2-ocr",
    "deepseek32",
    "deepseek4",
    "dflash",
    "dots1",
    "dots3note",
    "dream",
    "eagle3",
    "ernie4_5",
    "ernie4_5-moe",
    "eurobert",
    "exaone",
    "exaone-moe",
    "exaone4",
    "falcon",
    "falcon-h1",
    "gemma",
    "gemma-embedding",
    "gemma2",
    "gemma3",
    "gemma3n",
    "gemma4",
    "gemma4-assistant",
    "glm-dsa",
    "glm4",
    "glm4moe",
    "glm5-next",
    "gpt-oss",
    "gpt2",
    "gptj",
    "gptneox",
    "granite",
    "granite_swa",
    "granitehybrid",
    "granitemoe",
    "graniteswitch",
    "grok",
    "grovemoe",
    "hrm_text",
    "hunyuan-dense",
    "hunyuan-moe",
    "hunyuan_vl",
    "hy_v3",
    "hy_v4",
    "internlm2",
    "jais",
    "jais2",
    "jamba",
    "jina-bert-v2",
    "jina-bert-v3",
    "kimi-k3",
    "kimi-linear",
    "laguna",
    "lfm2",
    "lfm2moe",
    "llada",
    "llada-moe",
    "llama",
    "llama-embed",
    "llama4",
    "maincoder",
    "mamba",
    "mamba2",
    "maple",
    "mellum",
    "mimo2",
    "minicpm",
    "minicpm3",
    "minimax-01",
    "minimax-m2",
    "minimax-m3",
    "mistral3",
    "mistral4",
    "modern-bert",
    "mpt",
    "muse-glimmer",
    "nanbeige",
    "nemotron",
    "nemotron_h",
    "nemotron_h_moe",
    "neo-bert",
    "nomic-bert",
    "nomic-bert-moe",
    "olmo",
    "olmo2",
    "olmoe",
    "openelm",
    "orion",
    "paddleocr",
    "pangu-embedded",
    "phi2",
    "phi3",
    "phimoe",
    "plamo",
    "plamo2",
    "plamo3",
    "plm",
    "pockettts",
    "qwen",
    "qwen2",
    "qwen2moe",
    "qwen2vl",
    "qwen3",
    "qwen35",
    "qwen35moe",
    "qwen3moe",
    "qwen3next",
    "qwen3tts",
    "qwen3vl",
    "qwen3vlmoe",
    "qwen4exp",
    "refact",
    "rnd1",
    "rwkv6",
    "rwkv6qwen2",
    "rwkv7",
    "seed_oss",
    "smallthinker",
    "smollm3",
    "spark2_5",
    "stablelm",
    "starcoder",
    "starcoder2",
    "step35",
    "t5",
    "t5encoder",
    "talkie",
    "wavtokenizer-dec",
    "xverse",
];

/// Whether llama.cpp 0c1e57098 loads this architecture; others get the rules of a plain transformer.
pub fn is_known_architecture(name: &str) -> bool {
    KNOWN.binary_search(&name).is_ok()
}

/// `create_memory`: which memory an architecture gets.
pub(crate) fn memory_of(architecture: &str) -> Memory {
    match architecture {
        "bert" | "jina-bert-v2" | "jina-bert-v3" | "nomic-bert" | "nomic-bert-moe" | "neo-bert"
        | "eurobert" | "wavtokenizer-dec" | "modern-bert" | "gemma-embedding" | "dream"
        | "llada" | "llada-moe" | "rnd1" => Memory::None,
        "mamba" | "mamba2" | "rwkv6" | "rwkv6qwen2" | "rwkv7" | "arwkv7" => Memory::Recurrent,
        "jamba" | "plamo2" | "granitehybrid" | "lfm2" | "lfm2moe" | "kimi-linear" | "kimi-k3"
        | "bailingmoe3" => Memory::Hybrid(HybridFilter::Exclusive),
        "qwen3next" | "qwen35" | "qwen35moe" | "minimax-01" => {
            Memory::Hybrid(HybridFilter::ExclusiveTrunk)
        }
        "falcon-h1" => Memory::Hybrid(HybridFilter::Both),
        "nemotron_h" | "nemotron_h_moe" => Memory::Hybrid(HybridFilter::NoFeedForward),
        "glm5-next" | "qwen4exp" => Memory::HybridIndexer,
        "glm-dsa" | "deepseek32" | "hy_v4" => Memory::SparseIndexer,
        "dots3note" => Memory::SparseIndexerSliding,
        "minimax-m3" => Memory::BlockIndexer,
        "deepseek4" => Memory::Compressed,
        "gemma4-assistant" => Memory::SharedWithTarget,
        _ => Memory::Attention,
    }
}

/// `load_arch_hparams`: which layers are recurrent.
pub(crate) fn recurrent_rule(architecture: &str) -> RecurrentRule {
    match architecture {
        "mamba" | "mamba2" | "rwkv6" | "rwkv6qwen2" | "rwkv7" | "arwkv7" | "falcon-h1" => {
            RecurrentRule::All
        }
        "jamba" | "plamo2" | "granitehybrid" | "lfm2" | "lfm2moe" | "kimi-linear" | "kimi-k3"
        | "bailingmoe3" | "glm5-next" => RecurrentRule::NoKvHeads,
        "nemotron_h" | "nemotron_h_moe" => RecurrentRule::NoKvHeadsNoFeedForward,
        "qwen3next" | "qwen35" | "qwen35moe" | "qwen4exp" => RecurrentRule::Interval(4),
        "minimax-01" => RecurrentRule::Interval(8),
        _ => RecurrentRule::None,
    }
}

/// `load_arch_hparams`: which layers attend through a window.
pub(crate) fn sliding_rule(architecture: &str) -> Option<SlidingRule> {
    use SlidingKind::{Chunked, Standard, Symmetric};
    use SlidingPattern::{All, Attention, DenseFirst, DenseLast, Listed};
    use SlidingWhen::{Always, LayerCount, UnlessZero, WindowNamed};
    let (kind, when, default_window, pattern) = match architecture {
        "afmoe" | "mellum" | "olmo2" => (Standard, WindowNamed, 0, DenseLast(4)),
        "gemma3" => (Standard, WindowNamed, 0, DenseLast(6)),
        "plamo3" => (Standard, WindowNamed, 0, DenseLast(8)),
        "laguna" | "smallthinker" => (Standard, WindowNamed, 0, DenseFirst(4)),
        "lfm2" => (Standard, WindowNamed, 0, Attention),
        "dflash" => (Standard, WindowNamed, 0, Listed),
        "modern-bert" => (Symmetric, WindowNamed, 0, DenseFirst(3)),
        "exaone4" => (Standard, LayerCount(64), 4096, DenseLast(4)),
        "llama4" => (Chunked, UnlessZero, 8192, DenseLast(4)),
        "cohere2" | "muse-glimmer" => (Standard, Always, 0, DenseLast(4)),
        "cohere2moe" => (Standard, Always, 0, DenseFirst(4)),
        "exaone-moe" => (Standard, Always, 128, DenseLast(4)),
        "gemma2" => (Standard, Always, 4096, DenseLast(2)),
        "gemma3n" => (Standard, Always, 0, DenseLast(5)),
        "gpt-oss" => (Standard, Always, 0, DenseLast(2)),
        "gemma-embedding" => (Symmetric, Always, 0, DenseLast(6)),
        "deepseek4" => (Standard, Always, 0, All),
        "gemma4" | "gemma4-assistant" | "granite_swa" | "maple" | "mimo2" | "spark2_5"
        | "step35" | "dots3note" => (Standard, Always, 0, Listed),
        _ => return None,
    };
    Some(SlidingRule {
        kind,
        when,
        default_window,
        pattern,
    })
}

/// Windows that the code fixes, whatever the header says.
pub(crate) fn fixed_window(architecture: &str) -> Option<u32> {
    match architecture {
        "llama4" => Some(8192),
        "smallthinker" => Some(4096),
        _ => None,
    }
}

/// Whether the appended prediction (MTP) layers of this architecture are left out of a plain load
/// (`TENSOR_SKIP` unless `load_mtp`).
pub(crate) fn skips_prediction_layers(architecture: &str) -> bool {
    matches!(
        architecture,
        "bailingmoe2"
            | "bailingmoe3"
            | "cohere2moe"
            | "deepseek2"
            | "mistral4"
            | "deepseek32"
            | "deepseek4"
            | "dots3note"
            | "exaone-moe"
            | "exaone4"
            | "glm-dsa"
            | "glm4"
            | "glm4moe"
            | "glm5-next"
            | "hy_v3"
            | "mimo2"
            | "nemotron_h"
            | "nemotron_h_moe"
            | "qwen35"
            | "qwen35moe"
            | "qwen3next"
            | "step35"
    )
}

/// What of an appended prediction layer is loaded all the same, because its flags say
/// only "not required" (src/models/{cohere2moe,hy-v3,step35,deepseek32,glm-dsa}.cpp).
pub(crate) fn loads_in_prediction_layer(architecture: &str, name: &str) -> bool {
    let head = matches!(
        name,
        "embed_tokens" | "shared_head_head" | "shared_head_norm"
    );
    let router_bias = name == "exp_probs_b";
    let feed_forward = name.starts_with("ffn_") && name != "ffn_norm";
    let attention = matches!(name, "attn_q_norm" | "attn_k_norm" | "attn_gate");
    match architecture {
        "cohere2moe" => head,
        "hy_v3" => head || router_bias || feed_forward,
        "step35" => head || router_bias || feed_forward || attention,
        "deepseek32" | "glm-dsa" => router_bias,
        _ => false,
    }
}

/// Architectures that attend in both directions whatever the header says (`load_arch_hparams`).
pub(crate) fn is_never_causal(architecture: &str) -> bool {
    matches!(
        architecture,
        "dream" | "gemma-embedding" | "llada" | "llada-moe" | "rnd1"
    )
}

/// Encoders whose `output` never falls back to the embedding table.
pub(crate) fn has_no_language_head(architecture: &str) -> bool {
    matches!(
        architecture,
        "bert"
            | "jina-bert-v2"
            | "jina-bert-v3"
            | "nomic-bert"
            | "nomic-bert-moe"
            | "neo-bert"
            | "eurobert"
            | "modern-bert"
            | "bitnet"
            | "wavtokenizer-dec"
            | "dflash"
            | "eagle3"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_names_are_sorted_for_the_search() {
        assert!(KNOWN.is_sorted());
        assert!(is_known_architecture("llama"));
        assert!(!is_known_architecture("clip"));
    }
}
