//! An estimate from facts, and the facts from a header.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::indexing_slicing
)]

#[path = "../tests/support/mod.rs"]
mod support;

use std::hint::black_box;
use std::sync::atomic::{AtomicU32, Ordering};

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use llama_gpu_core::estimate::{EstimateOptions, estimate, layer_costs};
use llama_gpu_core::model::ModelFacts;
use support::{LARGE, SMALL};

/// The same with a logical batch that was not asked for lately: it decides nothing, but is planned for anew.
fn unplanned(options: &EstimateOptions) -> EstimateOptions {
    static ASKED: AtomicU32 = AtomicU32::new(0);
    EstimateOptions {
        batch: 2048 + ASKED.fetch_add(1, Ordering::Relaxed) % 4096,
        ..options.clone()
    }
}

fn estimates(criterion: &mut Criterion) {
    for (name, shape) in [("16 layers", SMALL), ("80 layers", LARGE)] {
        let header = shape.header();
        let facts = shape.facts();
        let one = EstimateOptions::default();
        let four = EstimateOptions {
            devices: 4,
            ..EstimateOptions::default()
        };
        criterion.bench_function(&format!("facts, {name}"), |bench| {
            bench.iter(|| ModelFacts::from_header(black_box(&header)));
        });
        criterion.bench_function(&format!("estimate, {name}, 1 device"), |bench| {
            bench.iter_batched_ref(
                || unplanned(&one),
                |options| estimate(black_box(&facts), options),
                BatchSize::SmallInput,
            );
        });
        criterion.bench_function(&format!("estimate, {name}, 4 devices"), |bench| {
            bench.iter_batched_ref(
                || unplanned(&four),
                |options| estimate(black_box(&facts), options),
                BatchSize::SmallInput,
            );
        });
        criterion.bench_function(&format!("estimate, {name}, asked again"), |bench| {
            bench.iter(|| estimate(black_box(&facts), black_box(&one)));
        });
        criterion.bench_function(&format!("layer costs, {name}"), |bench| {
            bench.iter(|| layer_costs(black_box(&facts), black_box(&one)));
        });
    }
}

criterion_group!(benches, estimates);
criterion_main!(benches);
