//! What must hold of every estimate, whatever the model and the options.
#![allow(
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    missing_docs
)]

mod support;

use llama_gpu_core::estimate::{
    Backend, Basis, CpuMoe, EstimateError, EstimateOptions, FlashAttention, MemoryEstimate,
    estimate, layer_costs, layer_devices,
};
use llama_gpu_core::gguf::GgmlType;
use llama_gpu_core::model::ModelFacts;
use proptest::prelude::*;
use support::{Llama, SMALL};

fn shapes() -> impl Strategy<Value = Llama> {
    (
        1_u32..40,
        1_u32..5,
        0_u32..4,
        prop_oneof![Just(0_u32), Just(8)],
    )
        .prop_map(|(layers, scale, share, experts)| Llama {
            layers,
            width: 512 * scale,
            feed_forward: 1408 * scale,
            heads: 8 * scale,
            kv_heads: (8 * scale) >> share,
            experts,
            ..SMALL
        })
}

fn cache_type() -> impl Strategy<Value = GgmlType> {
    prop_oneof![
        Just(GgmlType::F16),
        Just(GgmlType::Q8_0),
        Just(GgmlType::Q4_0)
    ]
}

fn options() -> impl Strategy<Value = EstimateOptions> {
    let sizes = (0_u32..200_000, 1_u32..9, 1_u32..4096, 1_u32..2048);
    let places = (
        proptest::option::of(0_u32..50),
        proptest::option::of(proptest::collection::vec(0.0_f32..4.0, 1..5)),
        prop_oneof![
            Just(CpuMoe::None),
            (1_u32..50).prop_map(CpuMoe::Layers),
            Just(CpuMoe::All)
        ],
    );
    let flags = any::<(bool, bool, bool, bool)>();
    let attention = prop_oneof![
        Just(FlashAttention::On),
        Just(FlashAttention::Off),
        Just(FlashAttention::Auto)
    ];
    let outputs = proptest::option::of(1_u32..600);
    (sizes, places, flags, attention, (cache_type(), outputs)).prop_map(
        |(
            sizes,
            (gpu_layers, tensor_split, cpu_moe_layers),
            flags,
            flash_attention,
            (cache, outputs),
        )| {
            EstimateOptions {
                context_length: sizes.0,
                parallel: sizes.1,
                batch: sizes.2,
                micro_batch: sizes.3,
                max_outputs: outputs,
                gpu_layers,
                devices: tensor_split.as_ref().map_or(1, Vec::len) as u32,
                tensor_split,
                cpu_moe_layers,
                kv_unified: flags.0,
                kv_offload: flags.1,
                swa_full: flags.2,
                backend: if flags.3 {
                    Backend::Cuda
                } else {
                    Backend::Generic
                },
                flash_attention,
                cache_type_k: cache,
                cache_type_v: cache,
                compute_capability: None,
            }
        },
    )
}

/// Bytes that do not depend on where a layer is.
fn weights_everywhere(estimate: &MemoryEstimate) -> u64 {
    let devices: u64 = estimate
        .devices
        .iter()
        .map(|device| device.weights_bytes)
        .sum();
    devices + estimate.host.weights_bytes
}

fn contexts(estimate: &MemoryEstimate) -> Vec<u64> {
    let devices = estimate.devices.iter().map(|device| device.context_bytes);
    devices.chain([estimate.host.context_bytes]).collect()
}

fn never_lower(before: &[u64], after: &[u64]) -> bool {
    before
        .iter()
        .zip(after)
        .all(|(before, after)| before <= after)
}

fn try_estimate(facts: &ModelFacts, options: &EstimateOptions) -> Option<MemoryEstimate> {
    match estimate(facts, options) {
        Ok(estimate) => Some(estimate),
        Err(EstimateError::Option { .. }) => None,
        Err(error) => panic!("{error} is no refusal of an option"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_sum_over_devices_equals_the_whole(shape in shapes(), options in options()) {
        let facts = shape.facts();
        if let Some(estimate) = try_estimate(&facts, &options) {
            let sum: u64 = estimate.devices.iter().map(|device| {
                device.weights_bytes + device.context_bytes + device.compute_bytes + device.overhead_bytes
            }).sum();
            prop_assert_eq!(estimate.total_device_bytes(), sum);
            let layers: u32 = estimate.devices.iter().map(|device| device.layers).sum();
            prop_assert_eq!(layers + estimate.host.layers, facts.layer_count() + 1);
        }
    }

    #[test]
    fn every_weight_is_somewhere(shape in shapes(), options in options()) {
        let facts = shape.facts();
        let generic = EstimateOptions { backend: Backend::Generic, ..options };
        let all = EstimateOptions { gpu_layers: None, devices: 1, tensor_split: None,
            cpu_moe_layers: CpuMoe::None, ..generic.clone() };
        if let (Some(split), Some(whole)) = (try_estimate(&facts, &generic), try_estimate(&facts, &all)) {
            let cuda = EstimateOptions { backend: Backend::Cuda, ..generic };
            let repacked = estimate(&facts, &cuda).unwrap().host.overhead_bytes;
            prop_assert_eq!(weights_everywhere(&split) + repacked, weights_everywhere(&whole));
        }
    }

    #[test]
    fn a_longer_context_never_lowers_a_cache(shape in shapes(), options in options(), more in 1_u32..100_000) {
        let facts = shape.facts();
        let longer = EstimateOptions {
            context_length: options.context_length.max(1) + more, ..options.clone() };
        let options = EstimateOptions { context_length: options.context_length.max(1), ..options };
        if let (Some(before), Some(after)) = (try_estimate(&facts, &options), try_estimate(&facts, &longer)) {
            prop_assert!(never_lower(&contexts(&before), &contexts(&after)));
        }
    }

    #[test]
    fn more_slots_never_lower_the_caches(
        shape in shapes(), options in options(), more in 1_u32..8,
    ) {
        let facts = shape.facts();
        // shares are rounded up, so that only whole multiples compare
        let few = EstimateOptions { context_length: 4096 * options.parallel, ..options };
        let parallel = few.parallel + more;
        let many = EstimateOptions { context_length: 4096 * parallel, parallel, ..few.clone() };
        if let (Some(before), Some(after)) = (try_estimate(&facts, &few), try_estimate(&facts, &many)) {
            prop_assert!(never_lower(&contexts(&before), &contexts(&after)));
        }
    }

    #[test]
    fn a_device_without_layers_takes_no_weights_and_no_cache(shape in shapes(), options in options()) {
        let facts = shape.facts();
        if let Some(estimate) = try_estimate(&facts, &options) {
            for device in estimate.devices.iter().filter(|device| device.layers == 0) {
                prop_assert_eq!((device.weights_bytes, device.context_bytes), (0, 0));
            }
        }
    }

    #[test]
    fn more_layers_on_one_device_never_lower_its_weights_and_cache(
        shape in shapes(), options in options(), fewer in 0_u32..40,
    ) {
        let facts = shape.facts();
        let one = EstimateOptions { devices: 1, tensor_split: None, gpu_layers: Some(fewer), ..options };
        let more = EstimateOptions { gpu_layers: Some(fewer + 1), ..one.clone() };
        if let (Some(before), Some(after)) = (try_estimate(&facts, &one), try_estimate(&facts, &more)) {
            prop_assert!(before.devices[0].weights_bytes <= after.devices[0].weights_bytes);
            prop_assert!(before.devices[0].context_bytes <= after.devices[0].context_bytes);
        }
    }

    #[test]
    fn the_cost_of_layers_adds_up_to_the_estimate(shape in shapes(), options in options()) {
        let facts = shape.facts();
        let all = EstimateOptions { devices: 1, tensor_split: None, gpu_layers: None, ..options };
        if let Some(estimate) = try_estimate(&facts, &all) {
            let costs = layer_costs(&facts, &all).unwrap();
            let device = estimate.devices[0];
            let sum: u64 = costs.layers.iter().sum::<u64>() + costs.output;
            prop_assert_eq!(sum, device.weights_bytes + device.context_bytes);
        }
    }

    #[test]
    fn layers_go_to_devices_in_order(
        count in 1_u32..200,
        gpu_layers in proptest::option::of(0_u32..300),
        split in proptest::collection::vec(0.01_f32..5.0, 1..8),
    ) {
        let places = layer_devices(count, gpu_layers, split.len() as u32, Some(&split));
        prop_assert_eq!(places.len(), count as usize + 1);
        prop_assert!(places.is_sorted());
        let offloaded = places.iter().filter(|place| place.is_some()).count() as u32;
        prop_assert_eq!(offloaded, gpu_layers.unwrap_or(u32::MAX).min(count + 1));
    }
}

#[test]
fn llama_is_estimated_by_its_own_rules() {
    let estimate = estimate(&SMALL.facts(), &EstimateOptions::default()).unwrap();
    assert_eq!(estimate.basis, Basis::Exact);
}

#[test]
fn a_cache_costs_two_bytes_for_each_key_and_value() {
    let options = EstimateOptions {
        context_length: 4096,
        ..EstimateOptions::default()
    };
    let estimate = estimate(&SMALL.facts(), &options).unwrap();
    let width = u64::from(SMALL.width / SMALL.heads * SMALL.kv_heads);
    let expected = u64::from(SMALL.layers) * 4096 * width * 2 * 2;
    assert_eq!(estimate.devices[0].context_bytes, expected);
}
