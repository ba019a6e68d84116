//! `place` on estimated models: what it hands out, and what it says.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss
)]

mod support;

use llama_gpu_core::estimate::{Companions, CpuMoe, EstimateOptions, estimate, layer_devices};
use llama_gpu_core::gpu::{Gpu, GpuHealth};
use llama_gpu_core::model::ModelFacts;
use llama_gpu_core::placement::{
    CpuUse, DoesNotFit, GpuName, Mode, PlaceError, Placement, Policy, Running, Strategy, place,
};
use support::{GIB, LARGE, Llama, SMALL, gpu};

/// Idle for a minute.
fn running(id: &str, gpu: u32, gib: u64) -> Running {
    Running {
        idle_seconds: 60.0,
        ..support::running(id, gpu, gib)
    }
}

fn asked(
    facts: &ModelFacts,
    options: &EstimateOptions,
    gpus: &[Gpu],
    policy: &Policy,
    tenants: &[Running],
) -> Result<Placement, PlaceError> {
    let tenants: Vec<&Running> = tenants.iter().collect();
    place(
        facts,
        options,
        Companions::default(),
        gpus,
        policy,
        &tenants,
    )
}

fn placed(facts: &ModelFacts, gpus: &[Gpu], policy: &Policy, tenants: &[Running]) -> Placement {
    asked(facts, &EstimateOptions::default(), gpus, policy, tenants).unwrap()
}

fn refused(facts: &ModelFacts, gpus: &[Gpu], policy: &Policy, tenants: &[Running]) -> DoesNotFit {
    match asked(facts, &EstimateOptions::default(), gpus, policy, tenants) {
        Err(PlaceError::DoesNotFit(refusal)) => *refusal,
        other => panic!("expected a refusal, not {other:?}"),
    }
}

fn indices(placement: &Placement) -> Vec<u32> {
    placement
        .devices
        .iter()
        .map(|device| device.index)
        .collect()
}

#[test]
fn llama_cpp_deals_out_layers_exactly_as_counted() {
    for layers in 1_u32..=40 {
        for first in 1..=layers {
            for second in 0..=layers + 1 - first {
                let third = layers + 1 - first - second;
                let counts: Vec<u32> = [first, second, third]
                    .into_iter()
                    .filter(|count| *count > 0)
                    .collect();
                let split: Vec<f32> = counts.iter().map(|&count| count as f32).collect();
                let all = counts.iter().sum();
                let places = layer_devices(layers, Some(all), counts.len() as u32, Some(&split));
                let dealt: Vec<u32> = (0..counts.len() as u32)
                    .map(|device| {
                        places
                            .iter()
                            .filter(|place| **place == Some(device))
                            .count() as u32
                    })
                    .collect();
                assert_eq!(dealt, counts, "{layers} layers");
            }
        }
    }
}

#[test]
fn a_model_that_fits_one_gpu_goes_to_the_one_with_the_least_over() {
    let gpus = [gpu(0, 24, 24), gpu(1, 8, 8), gpu(2, 80, 80)];
    let placement = placed(&SMALL.facts(), &gpus, &Policy::default(), &[]);
    assert_eq!(
        (placement.mode, indices(&placement)),
        (Mode::Single, vec![1])
    );
    assert_eq!(placement.gpu_layers, SMALL.layers + 1);
    assert_eq!(placement.devices[0].layers, SMALL.layers + 1);
    assert_eq!(
        placement.devices[0].total_bytes,
        placement.estimate.total_device_bytes()
    );
    assert!(
        placement.reason.contains("GPU 1 has room"),
        "{}",
        placement.reason
    );
}

#[test]
fn distribute_takes_the_emptiest_and_pack_the_one_in_use() {
    let gpus = [gpu(0, 24, 24), gpu(1, 80, 80), gpu(2, 24, 12)];
    for (strategy, expected) in [
        (Strategy::SingleGpuPreferred, 2),
        (Strategy::Distribute, 1),
        (Strategy::Pack, 2),
    ] {
        let policy = Policy {
            strategy,
            ..Policy::default()
        };
        assert_eq!(
            indices(&placed(&SMALL.facts(), &gpus, &policy, &[])),
            [expected]
        );
    }
    let gpus = [gpu(0, 8, 8), gpu(1, 24, 12)];
    for (strategy, expected) in [(Strategy::SingleGpuPreferred, 0), (Strategy::Pack, 1)] {
        let policy = Policy {
            strategy,
            ..Policy::default()
        };
        assert_eq!(
            indices(&placed(&SMALL.facts(), &gpus, &policy, &[])),
            [expected]
        );
    }
}

#[test]
fn a_larger_model_goes_to_the_fewest_gpus_and_the_split_is_llama_cpps() {
    let gpus = [
        gpu(0, 24, 24),
        gpu(1, 80, 79),
        gpu(2, 48, 47),
        gpu(3, 80, 78),
    ];
    let facts = LARGE.facts();
    let placement = placed(&facts, &gpus, &Policy::default(), &[]);
    assert_eq!(
        (placement.mode, indices(&placement)),
        (Mode::Multi, vec![1, 3])
    );
    let options = EstimateOptions {
        devices: 2,
        gpu_layers: Some(placement.gpu_layers),
        tensor_split: Some(placement.tensor_split.clone()),
        ..EstimateOptions::default()
    };
    assert_eq!(placement.estimate, estimate(&facts, &options).unwrap());
    for (device, memory) in placement.devices.iter().zip(&placement.estimate.devices) {
        assert_eq!(
            (device.layers, device.total_bytes),
            (memory.layers, memory.total_bytes())
        );
        assert!(device.total_bytes <= gpus[device.index as usize].free_bytes.unwrap());
    }
    let layers: u32 = placement.devices.iter().map(|device| device.layers).sum();
    assert_eq!(layers, LARGE.layers + 1);
    assert!(
        placement.reason.contains("2 GPUs are the fewest"),
        "{}",
        placement.reason
    );
}

#[test]
fn unequal_gpus_get_as_much_as_they_can_hold() {
    let gpus = [gpu(0, 48, 46), gpu(1, 80, 78), gpu(2, 24, 22)];
    let placement = placed(&LARGE.facts(), &gpus, &Policy::default(), &[]);
    assert_eq!(placement.devices.len(), 3);
    let spare: Vec<u64> = placement
        .devices
        .iter()
        .map(|device| gpus[device.index as usize].free_bytes.unwrap() - device.total_bytes)
        .collect();
    let layer = 2 * GIB;
    assert!(
        spare.iter().max().unwrap() - spare.iter().min().unwrap() < 2 * layer,
        "{spare:?}"
    );
}

#[test]
fn gpus_of_one_kind_are_joined_before_others() {
    let kind = |index, name: &str| Gpu {
        name: Some(name.to_owned()),
        ..gpu(index, 80, 78)
    };
    let gpus = [kind(0, "A"), kind(1, "B"), kind(2, "A"), kind(3, "C")];
    let placement = placed(&LARGE.facts(), &gpus, &Policy::default(), &[]);
    assert_eq!(indices(&placement), [0, 2]);
}

#[test]
fn gpus_that_nvlink_joins_are_taken_before_others() {
    let address = |index: u32| format!("00000000:0{index}:00.0");
    let linked = |index, free, peers: &[String]| Gpu {
        pci_bus_id: Some(address(index)),
        nvlink_peers: peers.to_vec(),
        ..gpu(index, 80, free)
    };
    let chosen = |gpus: &[Gpu]| indices(&placed(&LARGE.facts(), gpus, &Policy::default(), &[]));
    // The two with the least left over, if it were not for the links.
    let (tight, roomy) = (70, 78);
    let bare =
        [0, 1, 2, 3].map(|index| linked(index, [tight, roomy, tight, roomy][index as usize], &[]));
    assert_eq!(chosen(&bare), [0, 2]);
    let bridged = [
        linked(0, tight, &[]),
        linked(1, roomy, &[address(3)]),
        linked(2, tight, &[]),
        linked(3, roomy, &[address(1)]),
    ];
    assert_eq!(chosen(&bridged), [1, 3]);
    let switch = ["00000000:A0:00.0".to_owned()];
    let switched = [
        linked(0, tight, &[]),
        linked(1, roomy, &switch),
        linked(2, tight, &["00000000:b0:00.0".to_owned()]),
        linked(3, roomy, &switch),
    ];
    assert_eq!(chosen(&switched), [1, 3]);
}

#[test]
fn hot_and_degraded_gpus_come_last_and_lost_ones_never() {
    let facts = SMALL.facts();
    let hot = Gpu {
        temperature: Some(95),
        ..gpu(0, 8, 8)
    };
    let degraded = Gpu {
        health: GpuHealth::Degraded("slow link".to_owned()),
        ..gpu(1, 8, 8)
    };
    let lost = Gpu {
        health: GpuHealth::Lost("off the bus".to_owned()),
        ..gpu(2, 8, 8)
    };
    let unknown = Gpu {
        free_bytes: None,
        ..gpu(3, 8, 8)
    };
    let good = gpu(4, 24, 24);
    let gpus = [hot, degraded, lost, unknown, good];
    let policy = Policy::default();
    assert_eq!(indices(&placed(&facts, &gpus, &policy, &[])), [4]);
    assert_eq!(indices(&placed(&facts, &gpus[..4], &policy, &[])), [0]);
    let placement = placed(&facts, &gpus[1..4], &policy, &[]);
    assert_eq!(indices(&placement), [1]);
    assert!(
        placement.reason.contains("degraded (slow link)"),
        "{}",
        placement.reason
    );
    let refusal = refused(&facts, &gpus[2..4], &policy, &[]);
    assert!(
        refusal.message.contains("GPU 2 is lost (off the bus)"),
        "{}",
        refusal.message
    );
    assert!(
        refusal.message.contains("memory of GPU 3 is unknown"),
        "{}",
        refusal.message
    );
}

#[test]
fn a_mig_device_holds_a_model_alone_but_never_a_part_of_one() {
    let mig = |place: u32| Gpu {
        mig: true,
        uuid: format!("MIG-{place}"),
        parent_uuid: Some("GPU-0".to_owned()),
        ..gpu(0, 40, 40)
    };
    let gpus: Vec<Gpu> = (0..4).map(mig).collect();
    let policy = Policy {
        allowed: Some(vec![GpuName::Uuid("GPU-0".to_owned())]),
        ..Policy::default()
    };
    assert_eq!(
        placed(&SMALL.facts(), &gpus, &policy, &[]).devices[0].uuid,
        "MIG-0"
    );
    assert!(refused(&LARGE.facts(), &gpus, &policy, &[]).required_bytes > 100 * GIB);
}

#[test]
fn only_allowed_gpus_are_used_and_headroom_is_left() {
    let facts = SMALL.facts();
    let gpus = [gpu(0, 8, 8), gpu(1, 24, 24)];
    for allowed in [GpuName::Index(1), GpuName::Uuid("GPU-1".to_owned())] {
        let policy = Policy {
            allowed: Some(vec![allowed]),
            ..Policy::default()
        };
        assert_eq!(indices(&placed(&facts, &gpus, &policy, &[])), [1]);
    }
    let policy = Policy {
        headroom_bytes: 6 * GIB,
        ..Policy::default()
    };
    assert_eq!(indices(&placed(&facts, &gpus, &policy, &[])), [1]);
}

#[test]
fn headroom_of_its_own_counts_in_place_of_the_common_one() {
    let facts = SMALL.facts();
    let gpus = [gpu(0, 8, 8), gpu(1, 24, 24)];
    for name in [GpuName::Index(0), GpuName::Uuid("GPU-0".to_owned())] {
        let more = Policy {
            headroom_by_gpu: vec![(name.clone(), 6 * GIB)],
            ..Policy::default()
        };
        assert_eq!(indices(&placed(&facts, &gpus, &more, &[])), [1]);
        let less = Policy {
            headroom_bytes: 22 * GIB,
            headroom_by_gpu: vec![(name, GIB)],
            ..Policy::default()
        };
        assert_eq!(indices(&placed(&facts, &gpus, &less, &[])), [0]);
    }
}

#[test]
fn an_idle_model_leaves_where_room_is_needed_and_a_busy_one_never() {
    let facts = SMALL.facts();
    let gpus = [gpu(0, 8, 1), gpu(1, 8, 1)];
    let busy = Running {
        busy: true,
        ..running("busy", 0, 6)
    };
    let idle = running("idle", 1, 6);
    let placement = placed(&facts, &gpus, &Policy::default(), &[busy.clone(), idle]);
    assert_eq!(
        (placement.evict.as_slice(), indices(&placement)),
        (["idle".to_owned()].as_slice(), vec![1])
    );
    assert!(
        placement
            .reason
            .contains("idle (idle for 60 s, 6.0 GiB) has left"),
        "{}",
        placement.reason
    );
    let refusal = refused(&facts, &gpus, &Policy::default(), &[busy]);
    assert!(
        refusal
            .smallest_change
            .unwrap()
            .starts_with("wait until busy is idle")
    );
}

#[test]
fn nobody_leaves_when_that_would_not_help() {
    let gpus = [gpu(0, 8, 1), gpu(1, 8, 1)];
    let tenants = [running("a", 0, 6), running("b", 1, 6)];
    let refusal = refused(&LARGE.facts(), &gpus, &Policy::default(), &tenants);
    assert_eq!(
        refusal.free_bytes_by_gpu,
        [("GPU-0".to_owned(), 7 * GIB), ("GPU-1".to_owned(), 7 * GIB)]
    );
    let policy = Policy {
        cpu: CpuUse::Allow,
        ..Policy::default()
    };
    let placement = placed(&LARGE.facts(), &gpus, &policy, &tenants);
    assert!(placement.evict.is_empty());
}

#[test]
fn a_model_of_higher_priority_stays_for_a_newcomer_of_lower() {
    let gpus = [gpu(0, 8, 1)];
    let tenants = [Running {
        priority: 1,
        ..running("important", 0, 6)
    }];
    refused(&SMALL.facts(), &gpus, &Policy::default(), &tenants);
    let policy = Policy {
        priority: 1,
        ..Policy::default()
    };
    assert_eq!(
        placed(&SMALL.facts(), &gpus, &policy, &tenants).evict,
        ["important"]
    );
}

#[test]
fn the_cpu_takes_what_the_policy_lets_it() {
    let facts = LARGE.facts();
    let gpus = [gpu(0, 24, 22)];
    refused(&facts, &gpus, &Policy::default(), &[]);
    for policy in [
        Policy {
            cpu: CpuUse::Partial,
            ..Policy::default()
        },
        Policy {
            partial: true,
            ..Policy::default()
        },
        Policy {
            cpu: CpuUse::Allow,
            ..Policy::default()
        },
    ] {
        let placement = placed(&facts, &gpus, &policy, &[]);
        assert_eq!(placement.mode, Mode::Partial);
        assert!(placement.gpu_layers > 5 && placement.gpu_layers < LARGE.layers);
        assert!(placement.devices[0].total_bytes <= 22 * GIB);
        assert!(
            placement.reason.contains("layers on the CPU"),
            "{}",
            placement.reason
        );
    }
    let none: [Gpu; 0] = [];
    refused(
        &facts,
        &none,
        &Policy {
            cpu: CpuUse::Partial,
            ..Policy::default()
        },
        &[],
    );
    let placement = placed(
        &facts,
        &none,
        &Policy {
            cpu: CpuUse::Allow,
            ..Policy::default()
        },
        &[],
    );
    assert_eq!((placement.mode, placement.gpu_layers), (Mode::Cpu, 0));
    assert!(placement.devices.is_empty() && placement.tensor_split.is_empty());
    assert!(placement.estimate.host.total_bytes() > 100 * GIB);
}

#[test]
fn layers_asked_to_stay_on_the_cpu_stay_there() {
    let gpus = [gpu(0, 80, 79)];
    let options = EstimateOptions {
        gpu_layers: Some(10),
        ..EstimateOptions::default()
    };
    let placement = asked(&LARGE.facts(), &options, &gpus, &Policy::default(), &[]).unwrap();
    assert_eq!((placement.mode, placement.gpu_layers), (Mode::Partial, 10));
    let options = EstimateOptions {
        gpu_layers: Some(0),
        ..EstimateOptions::default()
    };
    let placement = asked(&LARGE.facts(), &options, &gpus, &Policy::default(), &[]).unwrap();
    assert_eq!(placement.mode, Mode::Cpu);
}

#[test]
fn a_refusal_says_how_much_is_missing_and_each_advice_helps() {
    let facts = Llama {
        context: 131_072,
        ..SMALL
    }
    .facts();
    let gpus = [gpu(0, 8, 4)];
    let refusal = refused(&facts, &gpus, &Policy::default(), &[]);
    assert!(refusal.required_bytes > 4 * GIB);
    assert_eq!(refusal.free_bytes_by_gpu, [("GPU-0".to_owned(), 4 * GIB)]);
    let change = refusal.smallest_change.unwrap();
    assert!(refusal.message.contains(&change));
    let word_after = |start: &str| {
        change
            .split(start)
            .nth(1)
            .unwrap()
            .split([' ', ','])
            .next()
            .unwrap()
    };
    let context_length: u32 = word_after("a context of ").parse().unwrap();
    let options = EstimateOptions {
        context_length,
        ..EstimateOptions::default()
    };
    asked(&facts, &options, &gpus, &Policy::default(), &[]).unwrap();
    let longer = EstimateOptions {
        context_length: context_length + 1024,
        ..options
    };
    asked(&facts, &longer, &gpus, &Policy::default(), &[]).unwrap_err();
    let gib: f64 = word_after("free ").parse().unwrap();
    let freed = Gpu {
        free_bytes: Some(4 * GIB + (gib * GIB as f64) as u64),
        ..gpus[0].clone()
    };
    placed(&facts, &[freed], &Policy::default(), &[]);
}

#[test]
fn experts_are_advised_to_the_cpu_only_where_there_are_any() {
    let experts = Llama {
        experts: 8,
        feed_forward: 4096,
        context: 512,
        ..SMALL
    };
    let gpus = [gpu(0, 5, 5)];
    let refusal = refused(&experts.facts(), &gpus, &Policy::default(), &[]);
    let change = refusal.smallest_change.unwrap();
    let layers = change.split("the experts of the first ").nth(1).unwrap();
    let layers: u32 = layers.split(' ').next().unwrap().parse().unwrap();
    let with = |layers: u32| EstimateOptions {
        cpu_moe_layers: CpuMoe::Layers(layers),
        ..EstimateOptions::default()
    };
    asked(
        &experts.facts(),
        &with(layers),
        &gpus,
        &Policy::default(),
        &[],
    )
    .unwrap();
    asked(
        &experts.facts(),
        &with(layers - 1),
        &gpus,
        &Policy::default(),
        &[],
    )
    .unwrap_err();
    let dense = refused(&LARGE.facts(), &gpus, &Policy::default(), &[]);
    assert!(!dense.message.contains("experts"), "{}", dense.message);
}

#[test]
fn a_policy_that_stands_in_the_way_is_named() {
    let gpus = [gpu(0, 80, 79), gpu(1, 80, 79)];
    let policy = Policy {
        max_gpus: Some(1),
        ..Policy::default()
    };
    let refusal = refused(&LARGE.facts(), &gpus, &policy, &[]);
    assert!(refusal.smallest_change.unwrap().contains("more than 1 GPU"));
    let none = refused(&LARGE.facts(), &[], &Policy::default(), &[]);
    assert!(none.message.contains("there is no GPU"), "{}", none.message);
}
