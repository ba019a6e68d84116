//! The GPUs that may be used at all, reduced to the numbers that the search compares.

use std::borrow::Borrow;

use super::policy::{GpuName, Policy};
use crate::gpu::{Gpu, GpuHealth};

/// A GPU hotter than this is taken only when no cooler one will do: the slowdown of current
/// data-centre and desktop cards begins between 85 °C and 93 °C.
const HOT_CELSIUS: u32 = 85;

/// A GPU that may be used.
#[derive(Clone, Debug)]
pub(crate) struct Candidate {
    /// Its place in the list that `place` was given.
    pub(crate) slot: usize,
    pub(crate) index: u32,
    pub(crate) free: u64,
    /// What it could ever hold for models.
    capacity: u64,
    headroom: u64,
    /// What it has for a newcomer when nobody leaves.
    pub(crate) budget: u64,
    pub(crate) mig: bool,
    /// Hot or degraded: used when no other will do.
    pub(crate) avoid: bool,
    /// Whether nothing holds memory on it yet.
    pub(crate) empty: bool,
}

impl Candidate {
    fn new(slot: usize, gpu: &Gpu, policy: &Policy) -> Option<Self> {
        let free = gpu.free_bytes.filter(|_| gpu.accepts_models())?;
        let headroom = policy.headroom_on(gpu);
        let capacity = gpu
            .total_bytes
            .map_or(u64::MAX, |total| {
                total.saturating_sub(gpu.reserved_bytes.unwrap_or(0))
            })
            .max(free);
        let hot = gpu.temperature.is_some_and(Self::is_hot);
        Some(Self {
            slot,
            index: gpu.index,
            free,
            capacity,
            headroom,
            budget: free.saturating_sub(headroom),
            mig: gpu.mig,
            avoid: hot || matches!(gpu.health, GpuHealth::Degraded(_)),
            // A driver without separate figures counts its own share as used: a tenth is not a model.
            empty: capacity.saturating_sub(free) <= capacity / 10,
        })
    }

    pub(crate) fn is_hot(celsius: u32) -> bool {
        celsius > HOT_CELSIUS
    }

    /// What it has for a newcomer once models that hold `freed` bytes here have left.
    pub(crate) fn budget_after(&self, freed: u64) -> u64 {
        self.free
            .saturating_add(freed)
            .min(self.capacity)
            .saturating_sub(self.headroom)
    }

    /// The bytes that must leave for a newcomer that needs `bytes`, or `None` if no leaving
    /// could make room for it.
    pub(crate) fn shortage(&self, bytes: u64) -> Option<u64> {
        let wanted = bytes.checked_add(self.headroom)?;
        (wanted <= self.capacity).then(|| wanted.saturating_sub(self.free))
    }
}

/// The GPUs that the policy allows and that can take a model, in the order of their indices,
/// MIG devices after the others.
///
/// This is the order of the device list that a server is handed, so it is the order in which
/// llama.cpp gives out layers.
pub(crate) fn candidates<G: Borrow<Gpu>>(gpus: &[G], policy: &Policy) -> Vec<Candidate> {
    let mut found: Vec<_> = gpus
        .iter()
        .map(Borrow::borrow)
        .enumerate()
        .filter(|(_, gpu)| is_allowed(gpu, policy.allowed.as_deref()))
        .filter_map(|(slot, gpu)| Candidate::new(slot, gpu, policy))
        .collect();
    found.sort_by_key(|candidate| (candidate.mig, candidate.index, candidate.slot));
    found
}

fn is_allowed(gpu: &Gpu, allowed: Option<&[GpuName]>) -> bool {
    allowed.is_none_or(|names| names.iter().any(|name| name.names(gpu)))
}
