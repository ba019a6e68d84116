//! A decision by the number of GPUs and of running models; splits are remembered, as they are
//! when a proxy asks about the same model again.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::semicolon_if_nothing_returned,
    missing_docs
)]

#[path = "../tests/support/mod.rs"]
mod support;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use llama_gpu_core::estimate::{Companions, EstimateOptions};
use llama_gpu_core::gpu::Gpu;
use llama_gpu_core::placement::{Placement, Policy, Remembered, Running, place_again};
use support::LARGE;

const GIB: u64 = 1 << 30;

/// GPUs with `free` GiB and up to seven more.
fn gpus(count: u64, free: u64) -> Vec<Gpu> {
    let gpu = |index: u64| Gpu {
        index: index as u32,
        uuid: format!("GPU-{index:08}-0000-0000-0000-000000000000"),
        name: Some("NVIDIA H200".to_owned()),
        total_bytes: Some(200 * GIB),
        free_bytes: Some((free + index % 8) * GIB),
        ..Gpu::default()
    };
    (0..count).map(gpu).collect()
}

/// Idle models on the GPUs in turn.
fn tenants(count: u64, gpus: &[Gpu]) -> Vec<Running> {
    let tenant = |place: u64| Running {
        id: format!("model-{place}"),
        bytes_by_gpu: vec![(
            gpus[place as usize % gpus.len()].uuid.clone(),
            (4 + place * 7 % 29) * GIB,
        )],
        idle_seconds: (place * 37 % 400) as f64,
        ..Running::default()
    };
    (0..count).map(tenant).collect()
}

fn measure(criterion: &mut Criterion) {
    let facts = LARGE.facts();
    let options = EstimateOptions::default();
    let any = Policy::default();
    // Else it would be split over GPUs that have room.
    let one_gpu = Policy {
        max_gpus: Some(1),
        ..Policy::default()
    };
    let mut group = criterion.benchmark_group("place 80 layers");
    let mut case = |name: &str, size: u64, gpus: &[Gpu], running: &[Running], devices: usize| {
        let policy = if running.is_empty() { &any } else { &one_gpu };
        let running: Vec<&Running> = running.iter().collect();
        let mut remembered = Remembered::default();
        let mut ask = || -> Placement {
            let none = Companions::default();
            place_again(
                &facts,
                &options,
                none,
                &mut remembered,
                gpus,
                policy,
                &running,
            )
            .unwrap()
        };
        assert_eq!(ask().devices.len(), devices);
        assert_eq!(ask().evict.is_empty(), running.is_empty());
        group.bench_function(BenchmarkId::new(name, size), |bencher| {
            bencher.iter(&mut ask)
        });
    };
    for count in [1, 8, 64, 1024, 10_000] {
        case("on one of so many GPUs", count, &gpus(count, 160), &[], 1);
    }
    for count in [2, 8, 64, 1024, 10_000] {
        case("over two of so many GPUs", count, &gpus(count, 84), &[], 2);
    }
    for count in [16, 32, 64, 128] {
        let box_of_eight = gpus(8, 100);
        let running = tenants(count, &box_of_eight);
        case(
            "evicting among so many models",
            count,
            &gpus(8, 90),
            &running,
            1,
        );
    }
    group.finish();
}

criterion_group!(benches, measure);
criterion_main!(benches);
