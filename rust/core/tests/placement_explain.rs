//! `explain` on estimated models: every step of the house order, and what became of it.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation
)]

mod support;

use llama_gpu_core::estimate::{Companions, EstimateOptions};
use llama_gpu_core::gpu::{Gpu, GpuHealth};
use llama_gpu_core::model::ModelFacts;
use llama_gpu_core::placement::{
    Alternative, CpuUse, Explanation, GpuName, Outcome, PlaceError, Policy, Running, Step,
    Strategy as Choice, explain, place,
};
use proptest::prelude::*;
use support::{GIB, LARGE, SMALL, gpu, running};

fn explained(
    facts: &ModelFacts,
    gpus: &[Gpu],
    policy: &Policy,
    tenants: &[Running],
) -> Explanation {
    let tenants: Vec<&Running> = tenants.iter().collect();
    let options = EstimateOptions::default();
    explain(
        facts,
        &options,
        Companions::default(),
        gpus,
        policy,
        &tenants,
    )
    .unwrap()
}

fn reasons(explanation: &Explanation, step: Step, outcome: Outcome) -> Vec<&str> {
    let alike = |one: &&Alternative| (one.step, one.outcome) == (step, outcome);
    explanation
        .alternatives
        .iter()
        .filter(alike)
        .map(|one| one.reason.as_str())
        .collect()
}

#[test]
fn the_gpus_that_would_do_as_well_say_why_another_was_taken() {
    let hot = Gpu {
        temperature: Some(91),
        ..gpu(2, 80, 6)
    };
    let sick = Gpu {
        health: GpuHealth::Degraded("slow".to_owned()),
        ..gpu(3, 80, 7)
    };
    let gpus = [gpu(0, 80, 8), gpu(1, 80, 10), hot, sick];
    let found = explained(&SMALL.facts(), &gpus, &Policy::default(), &[]);
    assert_eq!(found.answer.unwrap().devices[0].index, 0);
    let said: Vec<&str> = found
        .alternatives
        .iter()
        .map(|one| one.reason.as_str())
        .collect();
    assert_eq!(
        said,
        [
            "GPU 0 alone: has room and suits best",
            "GPU 1 alone: has room, but would leave more over",
            "GPU 2 alone: has room, but GPU 2 is hot (91 °C): avoided",
            "GPU 3 alone: has room, but GPU 3 is degraded (slow): avoided",
        ]
    );
}

#[test]
fn gpus_that_may_not_be_used_are_listed_with_the_reason() {
    let lost = Gpu {
        health: GpuHealth::Lost("off the bus".to_owned()),
        ..gpu(1, 80, 80)
    };
    let unknown = Gpu {
        free_bytes: None,
        ..gpu(2, 80, 80)
    };
    let policy = Policy {
        allowed: Some(vec![GpuName::Index(1), GpuName::Index(2)]),
        ..Policy::default()
    };
    let found = explained(
        &SMALL.facts(),
        &[gpu(0, 80, 80), lost, unknown],
        &policy,
        &[],
    );
    assert_eq!(
        reasons(&found, Step::One, Outcome::Refused),
        [
            "GPU 0 is not among those allowed",
            "GPU 1 is lost (off the bus)",
            "the free memory of GPU 2 is unknown",
        ]
    );
    assert!(found.answer.is_err());
}

#[test]
fn what_is_short_says_by_how_much_and_where() {
    let found = explained(
        &LARGE.facts(),
        &[gpu(0, 80, 80), gpu(1, 48, 48)],
        &Policy::default(),
        &[],
    );
    let refusal = found.answer.as_ref().unwrap_err();
    let alone = &found.alternatives[0];
    assert_eq!((alone.step, alone.outcome), (Step::One, Outcome::Short));
    assert_eq!(alone.short_bytes(), alone.devices[0].total_bytes - 80 * GIB);
    let both = found
        .alternatives
        .iter()
        .find(|one| one.step == Step::Several)
        .unwrap();
    assert_eq!(both.devices.iter().map(|one| one.layers).sum::<u32>(), 81);
    assert!(both.reason.starts_with("GPUs 0 + 1: "), "{}", both.reason);
    assert!(both.reason.contains("short on GPU 1"), "{}", both.reason);
    assert!(refusal.smallest_change.is_some());
    assert_eq!(
        reasons(&found, Step::Cpu, Outcome::Refused),
        ["the CPU: its policy forbids it (cpu: never)"]
    );
    assert_eq!(reasons(&found, Step::Partial, Outcome::Refused).len(), 1);
}

#[test]
fn who_would_leave_is_named_with_the_cost_and_who_may_not_with_the_reason() {
    let facts = SMALL.facts();
    let tenants = [
        running("cheap", 0, 7),
        Running {
            reload_seconds: Some(600.0),
            ..running("dear", 1, 7)
        },
        Running {
            busy: true,
            ..running("busy", 2, 7)
        },
        Running {
            pinned: true,
            ..running("pinned", 2, 1)
        },
        Running {
            priority: 1,
            ..running("first", 2, 0)
        },
    ];
    let gpus: Vec<Gpu> = (0..3).map(|index| gpu(index, 8, 0)).collect();
    let policy = Policy {
        max_gpus: Some(1),
        ..Policy::default()
    };
    let found = explained(&facts, &gpus, &policy, &tenants);
    assert_eq!(found.answer.as_ref().unwrap().evict, ["cheap"]);
    assert_eq!(
        reasons(&found, Step::OneEvicting, Outcome::Taken),
        ["GPU 0 alone without cheap: has room at the least cost (3.8 s of reloading)"]
    );
    assert_eq!(
        reasons(&found, Step::OneEvicting, Outcome::Fits),
        ["GPU 1 alone without dear: has room, but more would be lost (600.0 s of reloading)"]
    );
    let taken = found
        .alternatives
        .iter()
        .find(|one| one.outcome == Outcome::Taken)
        .unwrap();
    assert_eq!(taken.eviction_cost, tenants[0].eviction_cost());
    assert_eq!(
        reasons(&found, Step::Several, Outcome::Refused),
        ["several GPUs: its policy allows one (max_gpus)"]
    );
    let staying: Vec<(&str, &str)> = found
        .staying
        .iter()
        .map(|(id, why)| (id.as_str(), why.as_str()))
        .collect();
    assert_eq!(
        staying,
        [
            ("busy", "it is busy"),
            ("pinned", "it is pinned"),
            ("first", "its priority (1) is higher than 0"),
        ]
    );
}

#[test]
fn evicting_that_does_not_help_says_what_would_still_be_missing() {
    let tenants = [
        running("idle", 0, 1),
        Running {
            busy: true,
            ..running("busy", 0, 6)
        },
    ];
    let found = explained(
        &SMALL.facts(),
        &[gpu(0, 8, 1)],
        &Policy::default(),
        &tenants,
    );
    let short = reasons(&found, Step::OneEvicting, Outcome::Short);
    assert_eq!(short.len(), 1);
    assert!(
        short[0].starts_with("GPU 0 alone without idle: "),
        "{}",
        short[0]
    );
    let nobody = explained(
        &SMALL.facts(),
        &[gpu(0, 8, 1)],
        &Policy::default(),
        &tenants[1..],
    );
    assert_eq!(
        reasons(&nobody, Step::OneEvicting, Outcome::Refused),
        ["evicting: nobody may leave (busy: it is busy)"]
    );
}

#[test]
fn without_a_gpu_the_cpu_is_taken_where_it_may_be() {
    let policy = Policy {
        cpu: CpuUse::Allow,
        ..Policy::default()
    };
    let found = explained(&SMALL.facts(), &[], &policy, &[]);
    assert_eq!(
        reasons(&found, Step::One, Outcome::Refused),
        ["there is no GPU"]
    );
    assert_eq!(
        reasons(&found, Step::Cpu, Outcome::Taken),
        ["the CPU: no GPUs have room for it (cpu: allow)"]
    );
}

fn boxes() -> impl Strategy<Value = Vec<Gpu>> {
    prop::collection::vec((0_u64..100, 0_u64..60, prop::bool::weighted(0.1)), 0..5).prop_map(
        |sizes| {
            let gpu_of = |(index, (free, used, hot)): (usize, (u64, u64, bool))| Gpu {
                temperature: hot.then_some(95),
                ..gpu(index as u32, free + used, free)
            };
            sizes.into_iter().enumerate().map(gpu_of).collect()
        },
    )
}

fn tenants() -> impl Strategy<Value = Vec<Running>> {
    prop::collection::vec((0_u32..4, 1_u64..40, 0_u8..6), 0..5).prop_map(|held| {
        let tenant_of = |(place, (gpu, gib, state)): (usize, (u32, u64, u8))| Running {
            busy: state == 0,
            pinned: state == 1,
            ..running(&format!("model-{place}"), gpu, gib)
        };
        held.into_iter().enumerate().map(tenant_of).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Explaining answers as placing does, and what it lists is true.
    #[test]
    fn the_list_agrees_with_the_answer(
        large in any::<bool>(),
        gpus in boxes(),
        tenants in tenants(),
        strategy in prop::sample::select(Choice::ALL.to_vec()),
        cpu in prop::sample::select(CpuUse::ALL.to_vec()),
    ) {
        let facts = if large { LARGE.facts() } else { SMALL.facts() };
        let policy = Policy { strategy, cpu, headroom_bytes: GIB, ..Policy::default() };
        let found = explained(&facts, &gpus, &policy, &tenants);
        let running: Vec<&Running> = tenants.iter().collect();
        let options = EstimateOptions::default();
        let placed = place(&facts, &options, Companions::default(), &gpus, &policy, &running);
        let taken: Vec<&Alternative> =
            found.alternatives.iter().filter(|one| one.outcome == Outcome::Taken).collect();
        match placed {
            Ok(placement) => {
                prop_assert_eq!(taken.len(), 1);
                prop_assert_eq!(&taken[0].devices, &placement.devices);
                prop_assert_eq!(&taken[0].evict, &placement.evict);
                prop_assert_eq!(found.answer.as_ref(), Ok(&placement));
            }
            Err(PlaceError::DoesNotFit(refusal)) => {
                prop_assert!(taken.is_empty());
                prop_assert!(found.alternatives.iter().all(|one| one.outcome != Outcome::Fits));
                prop_assert_eq!(found.answer.as_ref(), Err(&refusal));
            }
            Err(error) => panic!("{error}"),
        }
        for one in &found.alternatives {
            prop_assert!(!one.reason.is_empty());
            match one.outcome {
                Outcome::Taken | Outcome::Fits => prop_assert_eq!(one.short_bytes(), 0),
                Outcome::Short => prop_assert!(
                    one.devices.is_empty() || one.short_bytes() > 0 || one.reason.contains("no split")
                ),
                Outcome::Refused => prop_assert!(one.devices.is_empty()),
            }
        }
        // Who is neither able to leave nor said to stay would be missing.
        for tenant in &tenants {
            let stays = found.staying.iter().any(|(id, _)| *id == tenant.id);
            prop_assert_eq!(stays, !tenant.may_leave_for(policy.priority));
        }
    }
}
