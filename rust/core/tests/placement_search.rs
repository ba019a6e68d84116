//! The search against brute force: every set of GPUs, every split, every set of leavers.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation
)]

use std::convert::Infallible;

use llama_gpu_core::gpu::Gpu;
use llama_gpu_core::placement::{
    CpuUse, Decision, MemoryModel, Policy, Running, Step, Strategy as Choice, decide,
};
use proptest::prelude::*;

/// A model whose devices need their layers and what their place in the chain costs.
#[derive(Clone, Debug)]
struct Toy {
    layers: Vec<u64>,
    overhead: u64,
    logits: u64,
    pipeline: u64,
}

impl MemoryModel for Toy {
    type Error = Infallible;

    fn layer_bytes(&self) -> &[u64] {
        &self.layers
    }

    fn device_bytes(&self, counts: &[u32]) -> Result<Vec<u64>, Infallible> {
        let on_devices: u32 = counts.iter().sum();
        let mut from = self.layers.len() - on_devices as usize;
        let mut bytes = Vec::new();
        for (place, &count) in counts.iter().enumerate() {
            let to = from + count as usize;
            let last = place + 1 == counts.len();
            let extra = self.overhead
                + if last { self.logits } else { 0 }
                + if counts.len() > 1 { self.pipeline } else { 0 };
            bytes.push(self.layers[from..to].iter().sum::<u64>() + extra);
            from = to;
        }
        Ok(bytes)
    }
}

fn gpu(index: u32, total: u64, free: u64) -> Gpu {
    Gpu {
        index,
        uuid: format!("GPU-{index}"),
        total_bytes: Some(total),
        free_bytes: Some(free),
        ..Gpu::default()
    }
}

fn toys() -> impl Strategy<Value = Toy> {
    (
        prop::collection::vec(1_u64..12, 1..8),
        0_u64..4,
        0_u64..6,
        0_u64..3,
    )
        .prop_map(|(layers, overhead, logits, pipeline)| Toy {
            layers,
            overhead,
            logits,
            pipeline,
        })
}

fn boxes(most: usize) -> impl Strategy<Value = Vec<Gpu>> {
    boxes_with(most, 40)
}

/// GPUs with less than so much free each.
fn boxes_with(most: usize, free: u64) -> impl Strategy<Value = Vec<Gpu>> {
    prop::collection::vec((0_u64..free, 0_u64..40), 0..=most).prop_map(|sizes| {
        let gpu_of =
            |(index, (free, used)): (usize, &(u64, u64))| gpu(index as u32, free + used, *free);
        sizes.iter().enumerate().map(gpu_of).collect()
    })
}

/// Running models whose bytes lie within what is used on the GPUs of the box.
fn tenants(gpus: usize, most: usize) -> impl Strategy<Value = Vec<Running>> {
    tenants_holding(gpus, 0..=most, 12)
}

/// So many running models that hold less than so much on each of their GPUs.
fn tenants_holding(
    gpus: usize,
    number: std::ops::RangeInclusive<usize>,
    bytes: u64,
) -> impl Strategy<Value = Vec<Running>> {
    let held = prop::collection::vec((0..gpus.max(1), 1_u64..bytes), 1..3);
    let one = (held, 0_u8..10, 1_u32..20, -1_i32..2).prop_map(|(held, state, reload, priority)| {
        Running {
            bytes_by_gpu: held
                .iter()
                .map(|(gpu, bytes)| (format!("GPU-{gpu}"), *bytes))
                .collect(),
            busy: state == 0,
            pinned: state == 1,
            priority,
            reload_seconds: Some(f64::from(reload)),
            ..Running::default()
        }
    });
    prop::collection::vec(one, number)
}

/// So many cases unless `PROPTEST_CASES` says otherwise; failures are kept in no file.
fn cases(usual: u32) -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok());
    ProptestConfig {
        cases: cases.unwrap_or(usual),
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

fn strategies() -> impl Strategy<Value = Choice> {
    prop::sample::select(Choice::ALL.to_vec())
}

/// What each GPU has for a newcomer when the models of this set have left.
fn budgets(gpus: &[Gpu], running: &[Running], leaving: u32, headroom: u64) -> Vec<u64> {
    gpus.iter()
        .map(|gpu| {
            let freed: u64 = running
                .iter()
                .enumerate()
                .filter(|(place, _)| leaving & (1 << place) != 0)
                .flat_map(|(_, model)| &model.bytes_by_gpu)
                .filter(|(uuid, _)| *uuid == gpu.uuid)
                .map(|(_, bytes)| bytes)
                .sum();
            let room = (gpu.free_bytes.unwrap() + freed).min(gpu.total_bytes.unwrap());
            room.saturating_sub(headroom)
        })
        .collect()
}

/// The smallest number of GPUs that hold the last `wanted` layers, by trying everything.
fn fewest_gpus(toy: &Toy, budgets: &[u64], wanted: u32, most: usize) -> Option<usize> {
    (1..=most.min(budgets.len())).find(|&size| {
        (0_u32..1 << budgets.len())
            .filter(|set| set.count_ones() as usize == size)
            .any(|set| {
                let chosen: Vec<u64> = (0..budgets.len())
                    .filter(|gpu| set & (1 << gpu) != 0)
                    .map(|gpu| budgets[gpu])
                    .collect();
                any_split_fits(toy, &chosen, wanted, &mut Vec::new())
            })
    })
}

fn any_split_fits(toy: &Toy, budgets: &[u64], left: u32, counts: &mut Vec<u32>) -> bool {
    if counts.len() == budgets.len() {
        let bytes = toy.device_bytes(counts).unwrap();
        return left == 0
            && bytes
                .iter()
                .zip(budgets)
                .all(|(bytes, budget)| bytes <= budget);
    }
    (1..=left).any(|count| {
        counts.push(count);
        let fits = any_split_fits(toy, budgets, left - count, counts);
        counts.pop();
        fits
    })
}

/// Sets of models that may leave, each with what it costs.
fn leaving_sets(running: &[Running], priority: i32) -> Vec<(u32, u64)> {
    (0_u32..1 << running.len())
        .filter(|set| {
            running.iter().enumerate().all(|(place, model)| {
                set & (1 << place) == 0
                    || !(model.busy || model.pinned || model.priority > priority)
            })
        })
        .map(|set| {
            let leavers = running
                .iter()
                .enumerate()
                .filter(|(place, _)| set & (1 << place) != 0);
            (set, leavers.map(|(_, model)| model.eviction_cost()).sum())
        })
        .collect()
}

fn all(running: &[Running]) -> Vec<&Running> {
    running.iter().collect()
}

fn cost_of(decision: &Decision, running: &[Running]) -> u64 {
    decision
        .evict
        .iter()
        .map(|&place| running[place].eviction_cost())
        .sum()
}

fn assert_within_budgets(decision: &Decision, gpus: &[Gpu], running: &[Running], headroom: u64) {
    let leaving = decision
        .evict
        .iter()
        .fold(0, |set, place| set | (1 << place));
    let budgets = budgets(gpus, running, leaving, headroom);
    for share in &decision.shares {
        assert!(
            share.bytes <= budgets[share.gpu],
            "{share:?} is over {budgets:?}"
        );
        assert_eq!(share.budget_bytes, budgets[share.gpu]);
        assert!(share.layers > 0, "{decision:?} uses a GPU for nothing");
    }
    let order: Vec<_> = decision
        .shares
        .iter()
        .map(|share| gpus[share.gpu].index)
        .collect();
    assert!(
        order.is_sorted(),
        "{order:?} is not the order of the devices"
    );
}

proptest! {
    #![proptest_config(cases(2_000))]

    #[test]
    fn finds_the_fewest_gpus_whenever_any_set_fits(
        toy in toys(), gpus in boxes(6), headroom in 0_u64..4, strategy in strategies(),
        max_gpus in prop::option::of(0_u32..7),
    ) {
        let policy = Policy { strategy, headroom_bytes: headroom, max_gpus, ..Policy::default() };
        let most = max_gpus.map_or(usize::MAX, |most| most as usize);
        let budgets = budgets(&gpus, &[], 0, headroom);
        let expected = fewest_gpus(&toy, &budgets, toy.layers.len() as u32, most);
        let decision = decide(&toy, None, &gpus, &policy, &[]).unwrap();
        prop_assert_eq!(decision.as_ref().map(|found| found.shares.len()), expected);
        if let Some(decision) = decision {
            assert_within_budgets(&decision, &gpus, &[], headroom);
            prop_assert_eq!(decision.gpu_layers() as usize, toy.layers.len());
        }
    }

    #[test]
    fn takes_the_gpu_that_suits_the_strategy_best(toy in toys(), gpus in boxes(6)) {
        let need = toy.device_bytes(&[toy.layers.len() as u32]).unwrap()[0];
        let fitting = || gpus.iter().map(|gpu| gpu.free_bytes.unwrap()).filter(|free| *free >= need);
        for (strategy, expected) in [
            (Choice::SingleGpuPreferred, fitting().min()),
            (Choice::Distribute, fitting().max()),
        ] {
            let policy = Policy { strategy, max_gpus: Some(1), ..Policy::default() };
            let decision = decide(&toy, None, &gpus, &policy, &[]).unwrap();
            let taken = decision.map(|found| gpus[found.shares[0].gpu].free_bytes.unwrap());
            prop_assert_eq!(taken, expected);
        }
    }

    #[test]
    fn keeps_the_most_layers_on_gpus_when_some_may_stay_on_the_host(toy in toys(), gpus in boxes(4)) {
        let policy = Policy { cpu: CpuUse::Partial, ..Policy::default() };
        let budgets = budgets(&gpus, &[], 0, 0);
        let expected = (1..=toy.layers.len() as u32)
            .rev()
            .find_map(|layers| fewest_gpus(&toy, &budgets, layers, 4).map(|size| (layers, size)));
        let decision = decide(&toy, None, &gpus, &policy, &[]).unwrap();
        let found = decision.map(|found| (found.gpu_layers(), found.shares.len()));
        prop_assert_eq!(found, expected);
    }
}

/// Whether devices with these budgets hold all layers: which numbers of layers each prefix of
/// them can hold, as bits.
fn some_split_fits(toy: &Toy, budgets: &[u64]) -> bool {
    let layers = toy.layers.len();
    let pipeline = if budgets.len() > 1 { toy.pipeline } else { 0 };
    let mut reached = 1_u32;
    for (place, budget) in budgets.iter().enumerate() {
        let logits = if place + 1 == budgets.len() {
            toy.logits
        } else {
            0
        };
        let mut next = 0;
        for from in (0..layers).filter(|from| reached & (1 << from) != 0) {
            let mut bytes = toy.overhead + logits + pipeline;
            for (to, layer) in (from + 1..).zip(&toy.layers[from..]) {
                bytes += layer;
                if bytes <= *budget {
                    next |= 1 << to;
                }
            }
        }
        reached = next;
    }
    reached & (1 << layers) != 0
}

/// What the house order comes to: without evicting if that can be, else the fewest GPUs, and on
/// those the cheapest set of leavers.
fn fewest_and_cheapest(toy: &Toy, gpus: &[Gpu], running: &[Running]) -> Option<(usize, u64)> {
    let mut leaving = leaving_sets(running, 0);
    leaving.sort_by_key(|(_, cost)| *cost);
    let everybody = leaving
        .iter()
        .map(|(set, _)| *set)
        .fold(0, |all, set| all | set);
    let fits = |size: usize, leaving: u32| {
        let budgets = budgets(gpus, running, leaving, 0);
        (0_u32..1 << gpus.len())
            .filter(|set| set.count_ones() as usize == size)
            .any(|set| {
                let chosen: Vec<u64> = (0..gpus.len())
                    .filter(|gpu| set & (1 << gpu) != 0)
                    .map(|gpu| budgets[gpu])
                    .collect();
                some_split_fits(toy, &chosen)
            })
    };
    let without = (1..=gpus.len())
        .find(|size| fits(*size, 0))
        .map(|size| (size, 0));
    without.or_else(|| {
        let size = (1..=gpus.len()).find(|size| fits(*size, everybody))?;
        let (_, cost) = leaving.iter().find(|(set, _)| fits(size, *set))?;
        Some((size, *cost))
    })
}

proptest! {
    #![proptest_config(cases(3_000))]

    #[test]
    fn evicts_the_cheapest_set_and_only_when_it_helps(
        toy in toys(),
        (gpus, running) in boxes(4).prop_flat_map(|gpus| {
            let count = gpus.len();
            (Just(gpus), tenants(count, 7))
        }),
        headroom in 0_u64..4,
        priority in -1_i32..2,
        strategy in strategies(),
    ) {
        let policy = Policy { strategy, headroom_bytes: headroom, priority, ..Policy::default() };
        let layers = toy.layers.len() as u32;
        let outcomes: Vec<(usize, u64)> = leaving_sets(&running, priority)
            .into_iter()
            .filter_map(|(leaving, cost)| {
                let budgets = budgets(&gpus, &running, leaving, headroom);
                Some((fewest_gpus(&toy, &budgets, layers, gpus.len())?, cost))
            })
            .collect();
        let without = outcomes.iter().filter(|(_, cost)| *cost == 0).min();
        let expected = without.or(outcomes.iter().min()).copied();
        let decision = decide(&toy, None, &gpus, &policy, &all(&running)).unwrap();
        let found = decision.as_ref().map(|found| (found.shares.len(), cost_of(found, &running)));
        prop_assert_eq!(found, expected, "{:?}", decision);
        if let Some(decision) = decision {
            assert_within_budgets(&decision, &gpus, &running, headroom);
            for &place in &decision.evict {
                prop_assert!(!running[place].busy && !running[place].pinned);
                prop_assert!(running[place].priority <= priority);
            }
            let evicting = matches!(decision.step, Step::OneEvicting | Step::SeveralEvicting);
            prop_assert_eq!(evicting, !decision.evict.is_empty());
        }
    }

    #[test]
    fn evicts_the_cheapest_of_many_from_as_few_gpus_as_can_be(
        toy in toys(),
        (gpus, running) in boxes_with(6, 8).prop_flat_map(|gpus| {
            let count = gpus.len();
            (Just(gpus), tenants_holding(count, 8..=12, 25))
        }),
        strategy in strategies(),
    ) {
        let policy = Policy { strategy, ..Policy::default() };
        let decision = decide(&toy, None, &gpus, &policy, &all(&running)).unwrap();
        let found = decision.as_ref().map(|found| (found.shares.len(), cost_of(found, &running)));
        prop_assert_eq!(found, fewest_and_cheapest(&toy, &gpus, &running), "{:?}", decision);
        if let Some(decision) = decision {
            assert_within_budgets(&decision, &gpus, &running, 0);
        }
    }

    #[test]
    fn answers_the_same_to_the_same_question(
        toy in toys(), gpus in boxes(6), running in tenants(6, 12), strategy in strategies(),
    ) {
        let policy = Policy { strategy, cpu: CpuUse::Allow, ..Policy::default() };
        let first = decide(&toy, None, &gpus, &policy, &all(&running)).unwrap();
        prop_assert_eq!(&first, &decide(&toy, None, &gpus, &policy, &all(&running)).unwrap());
        prop_assert!(first.is_some(), "the CPU is allowed");
    }

    #[test]
    fn stays_within_budgets_whatever_the_sizes(
        layers in prop::collection::vec(any::<u64>(), 0..6),
        extra in any::<u64>(),
        sizes in prop::collection::vec((any::<u64>(), any::<u64>()), 0..20),
        headroom in any::<u64>(),
    ) {
        let layers: Vec<u64> = layers.into_iter().map(|bytes| bytes >> 8).collect();
        let toy = Toy { layers, overhead: extra >> 8, logits: extra >> 9, pipeline: 0 };
        let gpus: Vec<_> = sizes
            .iter()
            .enumerate()
            .map(|(index, (total, free))| gpu(index as u32, *total, *free))
            .collect();
        let policy = Policy { headroom_bytes: headroom >> 4, cpu: CpuUse::Partial, ..Policy::default() };
        if let Some(decision) = decide(&toy, None, &gpus, &policy, &[]).unwrap() {
            for share in &decision.shares {
                let room = gpus[share.gpu].free_bytes.unwrap().saturating_sub(headroom >> 4);
                prop_assert!(share.bytes <= room);
            }
        }
    }
}
