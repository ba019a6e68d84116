//! The name of a model's quantisation.

use super::ggml_type::GgmlType;
use super::metadata::Metadata;
use super::tensor::TensorInfo;

/// The name of a `general.file_type` (`enum llama_ftype`, llama.h).
fn file_type_name(number: u32) -> Option<&'static str> {
    Some(match number {
        0 => "F32",
        1 => "F16",
        2 => "Q4_0",
        3 => "Q4_1",
        7 => "Q8_0",
        8 => "Q5_0",
        9 => "Q5_1",
        10 => "Q2_K",
        11 => "Q3_K_S",
        12 => "Q3_K_M",
        13 => "Q3_K_L",
        14 => "Q4_K_S",
        15 => "Q4_K_M",
        16 => "Q5_K_S",
        17 => "Q5_K_M",
        18 => "Q6_K",
        19 => "IQ2_XXS",
        20 => "IQ2_XS",
        21 => "Q2_K_S",
        22 => "IQ3_XS",
        23 => "IQ3_XXS",
        24 => "IQ1_S",
        25 => "IQ4_NL",
        26 => "IQ3_S",
        27 => "IQ3_M",
        28 => "IQ2_S",
        29 => "IQ2_M",
        30 => "IQ4_XS",
        31 => "IQ1_M",
        32 => "BF16",
        36 => "TQ1_0",
        37 => "TQ2_0",
        38 => "MXFP4_MOE",
        39 => "NVFP4",
        40 => "Q1_0",
        41 => "Q2_0",
        _ => return None,
    })
}

/// The quantisation that the file names, else the type that most bytes of its tensors
/// have; `None` without both.
///
/// llama.cpp guesses by the number of tensors instead, which calls a model with many
/// small norms "all F32".
pub(super) fn quantization(metadata: &Metadata, tensors: &[TensorInfo]) -> Option<&'static str> {
    // Bit 1024 marks a type that a tool guessed (`LLAMA_FTYPE_GUESSED`).
    let named = metadata
        .u32("general.file_type")
        .and_then(|number| file_type_name(number & !1024));
    named.or_else(|| most_bytes(tensors).map(mostly))
}

fn most_bytes(tensors: &[TensorInfo]) -> Option<GgmlType> {
    let bytes = |kind: GgmlType| {
        let of_kind = tensors.iter().filter(|tensor| tensor.ggml_type == kind);
        of_kind.fold(0, |sum: u64, tensor| sum.saturating_add(tensor.bytes))
    };
    let present = GgmlType::ALL
        .iter()
        .copied()
        .map(|kind| (bytes(kind), kind));
    present
        .filter(|(bytes, _)| *bytes > 0)
        .max_by_key(|(bytes, _)| *bytes)
        .map(|(_, kind)| kind)
}

/// The mixture that usually goes with a type.
fn mostly(kind: GgmlType) -> &'static str {
    match kind {
        GgmlType::Q3_K => "Q3_K_M",
        GgmlType::Q4_K => "Q4_K_M",
        GgmlType::Q5_K => "Q5_K_M",
        other => other.name(),
    }
}
