//! Whatever the sizes: no GPU is given more than it has once those who leave have left, nobody
//! leaves who must stay, and the same question has the same answer.

use std::convert::Infallible;

use llama_gpu_core::gpu::Gpu;
use llama_gpu_core::placement::{CpuUse, MemoryModel, Policy, Running, Strategy, decide};

use super::numbers::Numbers;

/// Devices need their layers and something that depends on their place and their layers.
struct Model {
    layers: Vec<u64>,
    besides: Vec<u64>,
}

impl MemoryModel for Model {
    type Error = Infallible;

    fn layer_bytes(&self) -> &[u64] {
        &self.layers
    }

    fn device_bytes(&self, counts: &[u32]) -> Result<Vec<u64>, Infallible> {
        let all: u32 = counts.iter().sum();
        let mut from = self.layers.len() - all as usize;
        let mut bytes = Vec::new();
        for (place, &count) in counts.iter().enumerate() {
            let to = from + count as usize;
            let besides = self.besides[(place + count as usize) % self.besides.len()];
            let layers = self.layers[from..to]
                .iter()
                .fold(0_u64, |sum, one| sum.saturating_add(*one));
            bytes.push(layers.saturating_add(besides));
            from = to;
        }
        Ok(bytes)
    }
}

pub(crate) fn check(input: &[u8]) {
    let mut numbers = Numbers(input);
    let model = Model {
        layers: (0..numbers.below(20)).map(|_| numbers.size()).collect(),
        besides: (0..4).map(|_| numbers.size()).collect(),
    };
    let gpus: Vec<Gpu> = (0..numbers.below(20))
        .map(|index| {
            let (total, free) = (numbers.size(), numbers.size());
            Gpu {
                index: u32::from(index),
                uuid: format!("GPU-{index}"),
                total_bytes: Some(total),
                free_bytes: (free % 17 != 0).then(|| free.min(total)),
                mig: total % 7 == 0,
                ..Gpu::default()
            }
        })
        .collect();
    let running: Vec<Running> = (0..numbers.below(20))
        .map(|place| Running {
            id: place.to_string(),
            bytes_by_gpu: (0..numbers.below(3))
                .map(|_| (format!("GPU-{}", numbers.below(20)), numbers.size()))
                .collect(),
            busy: numbers.below(4) == 0,
            pinned: numbers.below(4) == 0,
            idle_seconds: f64::from(numbers.byte()) - 8.0,
            priority: i32::from(numbers.below(3)) - 1,
            ..Running::default()
        })
        .collect();
    let policy = Policy {
        strategy: Strategy::ALL[usize::from(numbers.below(3))],
        cpu: CpuUse::ALL[usize::from(numbers.below(3))],
        headroom_bytes: numbers.size(),
        max_gpus: (numbers.below(2) == 0).then(|| u32::from(numbers.below(20))),
        ..Policy::default()
    };
    let wanted = (numbers.below(2) == 0).then(|| u32::from(numbers.byte()));
    let tenants: Vec<&Running> = running.iter().collect();
    let ask = || decide(&model, wanted, &gpus, &policy, &tenants);
    let Ok(decision) = ask();
    assert_eq!(Ok(&decision), ask().as_ref());
    let Some(decision) = decision else {
        return;
    };
    for &place in &decision.evict {
        let leaves = &running[place];
        assert!(!leaves.busy && !leaves.pinned && leaves.priority <= policy.priority);
    }
    assert!(decision.shares.len() <= policy.max_gpus.map_or(16, |most| most as usize));
    for share in &decision.shares {
        let gpu = &gpus[share.gpu];
        let leaving = decision
            .evict
            .iter()
            .flat_map(|&place| &running[place].bytes_by_gpu);
        let freed = leaving
            .filter(|(uuid, _)| *uuid == gpu.uuid)
            .fold(0_u64, |sum, (_, bytes)| sum.saturating_add(*bytes));
        let free = gpu
            .free_bytes
            .expect("a GPU whose free memory is unknown is not used");
        let room = free
            .saturating_add(freed)
            .min(gpu.total_bytes.unwrap_or(u64::MAX));
        assert!(share.bytes <= room.saturating_sub(policy.headroom_bytes));
        assert!(share.layers > 0);
        assert!(!gpu.mig || decision.shares.len() == 1);
    }
}
