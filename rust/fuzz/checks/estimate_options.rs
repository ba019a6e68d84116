//! Whatever a header says and whatever the options: an estimate or a refusal, the same one each time, and its parts add up.

use std::fs;
use std::path::Path;
use std::sync::{Arc, LazyLock};

use llama_gpu_core::estimate::{
    Backend, CpuMoe, EstimateError, EstimateOptions, FlashAttention, estimate, layer_costs,
};
use llama_gpu_core::gguf::{GgmlType, Header, parse};
use llama_gpu_core::model::ModelFacts;

use super::numbers::Numbers;

/// Larger headers are vocabularies, which no estimate reads.
const LARGEST_HEADER: usize = 64 << 10;

/// The carried headers of small models, and what is known of them.
static MODELS: LazyLock<Vec<(Vec<u8>, Arc<ModelFacts>)>> = LazyLock::new(|| {
    let folder =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/ground_truth/headers");
    let mut files: Vec<_> = fs::read_dir(folder)
        .expect("the carried headers")
        .map(|entry| entry.expect("a carried header").path())
        .collect();
    files.sort();
    let headers = files.iter().filter_map(|file| small_header(file));
    headers
        .map(|header| {
            let facts = facts_of(&header).expect("a carried header is a model's");
            (header, Arc::new(facts))
        })
        .collect()
});

fn small_header(file: &Path) -> Option<Vec<u8>> {
    use std::io::Read;
    let packed = fs::File::open(file).expect("a carried header");
    let mut header = Vec::new();
    lzma_rust2::XzReader::new(packed, false)
        .take(LARGEST_HEADER as u64 + 1)
        .read_to_end(&mut header)
        .expect("xz");
    (header.len() <= LARGEST_HEADER).then_some(header)
}

pub(crate) fn check(input: &[u8]) {
    let mut numbers = Numbers(input);
    let Some(facts) = facts(&mut numbers) else {
        return;
    };
    for _ in 0..=numbers.below(16) {
        check_options(
            &facts,
            &options(&mut numbers, facts.trained_context_length()),
        );
    }
}

/// A carried model, as a rule with some bytes of its header changed.
fn facts(numbers: &mut Numbers<'_>) -> Option<Arc<ModelFacts>> {
    let (header, facts) = &MODELS[usize::from(numbers.byte()) % MODELS.len()];
    let changes = numbers.below(4);
    if changes == 0 {
        return Some(Arc::clone(facts));
    }
    let mut bytes = header.clone();
    for _ in 0..changes {
        let place = usize::from(numbers.byte()) << 8 | usize::from(numbers.byte());
        let place = place % bytes.len();
        bytes[place] = numbers.byte();
    }
    facts_of(&bytes).map(Arc::new)
}

fn facts_of(bytes: &[u8]) -> Option<ModelFacts> {
    let parsed = parse(bytes, 1 << 50).ok()?;
    let header = Header {
        version: parsed.version,
        byte_order: parsed.byte_order,
        alignment: parsed.alignment,
        metadata: parsed.metadata,
        tensors: parsed.tensors,
        shards: Vec::new(),
        file_bytes: 1 << 50,
        path: "fuzzed.gguf".into(),
    };
    ModelFacts::from_header(&header).ok()
}

fn options(numbers: &mut Numbers<'_>, trained: u32) -> EstimateOptions {
    const CACHES: [GgmlType; 6] = [
        GgmlType::F16,
        GgmlType::F16,
        GgmlType::Q8_0,
        GgmlType::Q4_0,
        GgmlType::F32,
        GgmlType::IQ4_NL,
    ];
    let devices = [1, 1, 0, 2, 3, 5, 16, 63][usize::from(numbers.below(8))];
    EstimateOptions {
        context_length: [0, 4096, trained, numbers.option()][usize::from(numbers.below(4))],
        parallel: [1, 2, 4, u32::from(numbers.byte())][usize::from(numbers.below(4))],
        kv_unified: numbers.flag(),
        batch: [2048, 512, numbers.option()][usize::from(numbers.below(3))],
        micro_batch: [512, 64, numbers.option()][usize::from(numbers.below(3))],
        max_outputs: numbers.flag().then(|| u32::from(numbers.byte())),
        flash_attention: [
            FlashAttention::Auto,
            FlashAttention::On,
            FlashAttention::Off,
        ][usize::from(numbers.below(3))],
        cache_type_k: CACHES[usize::from(numbers.below(6))],
        cache_type_v: CACHES[usize::from(numbers.below(6))],
        gpu_layers: numbers.flag().then(|| u32::from(numbers.byte())),
        devices,
        tensor_split: numbers.flag().then(|| {
            (0..devices)
                .map(|_| f32::from(numbers.byte()) / 16.0)
                .collect()
        }),
        cpu_moe_layers: match numbers.below(3) {
            0 => CpuMoe::None,
            1 => CpuMoe::All,
            _ => CpuMoe::Layers(u32::from(numbers.byte())),
        },
        kv_offload: numbers.flag(),
        swa_full: numbers.flag(),
        backend: [Backend::Cuda, Backend::Generic][usize::from(numbers.below(2))],
        compute_capability: numbers.flag().then(|| (u32::from(numbers.byte()), 0)),
    }
}

fn check_options(facts: &ModelFacts, options: &EstimateOptions) {
    let first = estimate(facts, options);
    assert_eq!(first, estimate(facts, options));
    // A copy has no plans to remember.
    assert_eq!(first, estimate(&facts.clone(), options));
    match first {
        Ok(estimate) => {
            assert_eq!(estimate.devices.len(), options.devices as usize);
            let layers: u32 = estimate.devices.iter().map(|device| device.layers).sum();
            assert_eq!(layers + estimate.host.layers, facts.layer_count() + 1);
            let parts = estimate.devices.iter().map(|device| device.total_bytes());
            let sum = parts.fold(0_u64, u64::saturating_add);
            assert_eq!(sum, estimate.total_device_bytes());
            assert!(layer_costs(facts, options).is_ok());
        }
        Err(error) => {
            assert!(matches!(error, EstimateError::Option { .. }), "{error}");
            assert!(!error.to_string().is_empty());
        }
    }
}
