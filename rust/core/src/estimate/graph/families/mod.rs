//! Model graphs, one short description per family (`src/models/*.cpp`).

mod blocks;
mod codec;
mod compressor;
mod decoder;
mod deepseek4;
mod delta;
mod describe;
mod draft;
mod encoder;
mod gemma;
mod glm;
mod hierarchical;
mod hunyuan;
mod hybrid;
mod kda;
mod latent;
mod lightning;
mod mamba;
mod ngram;
mod pools;
mod qwen4;
mod residual;
mod rwkv;
mod sparse;
mod special;
mod streams;
mod switch;
mod t5;

use super::builder::Builder;
use super::ops::Graph;
use super::reserve::Batch;
use crate::model::ModelFacts;

/// Builds the graph of one micro-batch. True when it is the architecture's own, false when a plain transformer stands in; none when the
/// model does not look like one.
pub(super) fn build(graph: &mut Graph, facts: &ModelFacts, batch: &Batch<'_>) -> Option<bool> {
    graph.clear();
    graph.merges = batch.one_backend;
    let mut builder = Builder::new(graph, &facts.graph, &facts.hyperparameters, batch);
    if let Some(decoder) = describe::describe(&builder) {
        decoder.build(&mut builder);
        return Some(true);
    }
    if builder.model.architecture() == "minimax-m3" && !blocks::has_room(&builder) {
        return None;
    }
    let needs_model = matches!(builder.model.architecture(), "eagle3" | "dflash")
        && !draft::stands_alone(&builder);
    if !needs_model && let Some(build) = own_graph(builder.model.architecture()) {
        build(&mut builder);
        return Some(true);
    }
    let attends = ["attn_q.weight", "attn_qkv.weight"]
        .iter()
        .any(|name| facts.graph.weight(0, name).is_some());
    attends.then(|| {
        decoder::Decoder::PLAIN.build(&mut builder);
        false
    })
}

/// Architectures with a graph of their own.
fn own_graph(architecture: &str) -> Option<fn(&mut Builder<'_>)> {
    Some(match architecture {
        "deepseek2" | "deepseek2-ocr" | "mistral4" => latent::deepseek2,
        "mamba" | "mamba2" => hybrid::mamba,
        "jamba" => hybrid::jamba,
        "nemotron_h" | "nemotron_h_moe" => hybrid::nemotron,
        "falcon-h1" => hybrid::falcon,
        "granitehybrid" => hybrid::granite,
        "lfm2" | "lfm2moe" => hybrid::lfm2,
        "plamo2" => hybrid::plamo2,
        "qwen4exp" => qwen4::qwen4,
        "qwen3next" | "qwen35" | "qwen35moe" => delta::qwen,
        "glm5-next" => glm::next,
        "kimi-linear" => kda::kimi_linear,
        "kimi-k3" => residual::kimi_k3,
        "bailingmoe3" => kda::bailing,
        "deepseek4" => deepseek4::deepseek4,
        "deepseek32" | "glm-dsa" => sparse::sparse,
        "hrm_text" => hierarchical::hrm,
        "minimax-01" => lightning::minimax,
        "minimax-m3" => blocks::minimax_m3,
        "hy_v4" => hunyuan::hunyuan,
        "dots3note" => sparse::dots3,
        "minicpm3" => latent::minicpm3,
        "plm" => latent::plm,
        "gemma3n" => gemma::gemma3n,
        "gemma4" => gemma::gemma4,
        "bert" | "nomic-bert" | "nomic-bert-moe" | "jina-bert-v2" | "jina-bert-v3" => encoder::bert,
        "rwkv6" | "rwkv7" | "rwkv6qwen2" | "arwkv7" => rwkv::rwkv,
        "t5" => t5::t5,
        "t5encoder" => t5::encoder,
        "graniteswitch" => switch::granite_switch,
        "eagle3" => draft::eagle,
        "dflash" => draft::dflash,
        "wavtokenizer-dec" => codec::wavtokenizer,
        _ => return None,
    })
}
