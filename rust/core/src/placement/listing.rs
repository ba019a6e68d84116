//! The list that `explain` gives: what became of each alternative, in words and in fields.

use std::borrow::Borrow;

use super::candidate::Candidate;
use super::decide::{Decision, Share, Step};
use super::pack::Rank;
use super::place::PlacedDevice;
use super::policy::{Policy, Running, Strategy};
use super::words::{list, size, size_at_least};
use crate::gpu::{Gpu, GpuHealth};

/// What became of an alternative.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The model goes there.
    Taken,
    /// It would fit there, too; another place suits better.
    Fits,
    /// Too few bytes.
    Short,
    /// The policy, or the state of the GPU, forbids it.
    Refused,
}

impl Outcome {
    /// The name in Python and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Taken => "taken",
            Self::Fits => "fits",
            Self::Short => "short",
            Self::Refused => "refused",
        }
    }
}

/// One way to place a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Alternative {
    /// The step of the house order that it belongs to.
    pub step: Step,
    /// What became of it.
    pub outcome: Outcome,
    /// The GPUs with what they would hold; where it is short, of the split that is short of the least.
    pub devices: Vec<PlacedDevice>,
    /// What each of these GPUs has for the model, once those who would leave have left.
    pub free_bytes: Vec<u64>,
    /// Who would leave, the cheapest to lose first; where it is short, everybody who may.
    pub evict: Vec<String>,
    /// What their leaving would cost, as [`Running::eviction_cost`].
    pub eviction_cost: u64,
    /// Why, in words.
    pub reason: String,
}

impl Alternative {
    /// How many bytes its GPUs are short of, together.
    pub fn short_bytes(&self) -> u64 {
        let needs = self.devices.iter().map(|device| device.total_bytes);
        needs.zip(&self.free_bytes).fold(0, |sum, (need, free)| {
            sum.saturating_add(need.saturating_sub(*free))
        })
    }
}

/// A place where the model fits, with what decides between such places.
pub(super) struct Fitting {
    pub(super) decision: Decision,
    pub(super) cost: u64,
    pub(super) rank: Rank,
}

/// The alternatives found so far, and what their words are made of.
pub(super) struct Listing<'a, G> {
    pub(super) gpus: &'a [G],
    pub(super) policy: &'a Policy,
    pub(super) running: &'a [&'a Running],
    pub(super) taken: Option<Decision>,
    pub(super) found: Vec<Alternative>,
}

impl<G: Borrow<Gpu>> Listing<'_, G> {
    pub(super) fn is_taken(&self, step: Step) -> bool {
        self.taken.as_ref().is_some_and(|taken| taken.step == step)
    }

    pub(super) fn gpu(&self, slot: usize) -> Option<&Gpu> {
        self.gpus.get(slot).map(Borrow::borrow)
    }

    /// What evicting those whom a decision evicts costs.
    pub(super) fn cost_of(&self, decision: &Decision) -> u64 {
        let leavers = decision
            .evict
            .iter()
            .filter_map(|place| self.running.get(*place));
        leavers.fold(0, |sum, model| sum.saturating_add(model.eviction_cost()))
    }

    pub(super) fn note(&mut self, step: Step, outcome: Outcome, reason: String) {
        self.found.push(Alternative {
            step,
            outcome,
            devices: Vec::new(),
            free_bytes: Vec::new(),
            evict: Vec::new(),
            eviction_cost: 0,
            reason,
        });
    }

    /// Places of so many GPUs where it fits, the one that is taken first.
    pub(super) fn fitting(&mut self, step: Step, devices: usize, mut fitting: Vec<Fitting>) {
        fitting.sort_by_key(|one| (one.cost, one.rank));
        let same_gpus = |one: &Decision, other: &Decision| {
            let gpus = |decision: &Decision| -> Vec<usize> {
                decision.shares.iter().map(|share| share.gpu).collect()
            };
            gpus(one) == gpus(other)
        };
        let is_here = |taken: &Decision| taken.step == step && taken.shares.len() == devices;
        let Some(taken) = self.taken.clone().filter(is_here) else {
            return;
        };
        let best = fitting.iter().find(|one| same_gpus(&one.decision, &taken));
        let best = best.map(|one| (one.cost, one.rank));
        let suits = match step {
            Step::OneEvicting | Step::SeveralEvicting => {
                let cost = seconds(self.cost_of(&taken));
                format!("has room at the least cost ({cost} of reloading)")
            }
            _ => "has room and suits best".to_owned(),
        };
        self.push(&taken, Outcome::Taken, &suits);
        for one in fitting {
            if same_gpus(&one.decision, &taken) {
                continue;
            }
            let why = self.why_not_taken(&one, best);
            self.push(
                &one.decision,
                Outcome::Fits,
                &format!("has room, but {why}"),
            );
        }
    }

    fn why_not_taken(&self, one: &Fitting, best: Option<(u64, Rank)>) -> String {
        let Some((cost, rank)) = best else {
            return "another suits better".to_owned();
        };
        if one.cost > cost {
            return format!("more would be lost ({} of reloading)", seconds(one.cost));
        }
        if one.rank.0 > rank.0 {
            let avoided = one
                .decision
                .shares
                .iter()
                .filter_map(|share| self.gpu(share.gpu));
            let avoided: Vec<String> = avoided.filter_map(why_avoided).collect();
            return format!("{}: avoided", list(&avoided, "and"));
        }
        if one.rank.1 > rank.1 {
            return "mixes kinds of GPU".to_owned();
        }
        if one.rank.2 > rank.2 {
            return "its GPUs are not joined by NVLink".to_owned();
        }
        if one.rank.3 > rank.3 {
            return "would break into a GPU that is still empty".to_owned();
        }
        if one.rank.4 == rank.4 {
            return "the one taken does as well and comes first".to_owned();
        }
        match self.policy.strategy {
            Strategy::SingleGpuPreferred | Strategy::Pack => "would leave more over".to_owned(),
            Strategy::Distribute => "is fuller".to_owned(),
        }
    }

    pub(super) fn push(&mut self, decision: &Decision, outcome: Outcome, why: &str) {
        let devices: Vec<PlacedDevice> = decision
            .shares
            .iter()
            .filter_map(|share| self.device(share))
            .collect();
        let leavers: Vec<&Running> = decision
            .evict
            .iter()
            .filter_map(|place| self.running.get(*place).copied())
            .collect();
        let evict: Vec<String> = leavers.iter().map(|model| model.id.clone()).collect();
        let without = if evict.is_empty() {
            String::new()
        } else {
            format!(" without {}", list(&evict, "and"))
        };
        self.found.push(Alternative {
            step: decision.step,
            outcome,
            reason: format!("{}{without}: {why}", self.named(&decision.shares)),
            devices,
            free_bytes: decision
                .shares
                .iter()
                .map(|share| share.budget_bytes)
                .collect(),
            evict,
            eviction_cost: self.cost_of(decision),
        });
    }

    pub(super) fn short(&mut self, decision: &Decision) {
        let lacks = |share: &Share| share.bytes.saturating_sub(share.budget_bytes);
        let short: Vec<String> = decision
            .shares
            .iter()
            .filter(|share| lacks(share) > 0)
            .filter_map(|share| {
                let on = if decision.shares.len() > 1 {
                    format!(" on GPU {}", self.gpu(share.gpu)?.index)
                } else {
                    format!(" of {}", size(share.bytes))
                };
                Some(format!("{} short{on}", size_at_least(lacks(share))))
            })
            .collect();
        let why = if short.is_empty() {
            "no split of its layers fits".to_owned()
        } else {
            list(&short, "and")
        };
        self.push(decision, Outcome::Short, &why);
    }

    fn device(&self, share: &Share) -> Option<PlacedDevice> {
        let gpu = self.gpu(share.gpu)?;
        Some(PlacedDevice {
            uuid: gpu.uuid.clone(),
            index: gpu.index,
            layers: share.layers,
            total_bytes: share.bytes,
        })
    }

    fn named(&self, shares: &[Share]) -> String {
        let gpus: Vec<&Gpu> = shares
            .iter()
            .filter_map(|share| self.gpu(share.gpu))
            .collect();
        match gpus.as_slice() {
            [gpu] if gpu.mig => format!("{} (MIG) alone", gpu.uuid),
            [gpu] => format!("GPU {} alone", gpu.index),
            many => {
                let indices: Vec<String> = many.iter().map(|gpu| gpu.index.to_string()).collect();
                format!("GPUs {}", indices.join(" + "))
            }
        }
    }
}

/// What evicting costs, as a person reads it: it is an expectation in microseconds.
fn seconds(cost: u64) -> String {
    let tenths = cost.div_ceil(100_000);
    format!("{}.{} s", tenths / 10, tenths % 10)
}

pub(super) fn why_it_stays(model: &Running, policy: &Policy) -> Option<String> {
    if model.pinned {
        Some("it is pinned".to_owned())
    } else if model.busy {
        Some("it is busy".to_owned())
    } else {
        (!model.may_leave_for(policy.priority)).then(|| {
            format!(
                "its priority ({}) is higher than {}",
                model.priority, policy.priority
            )
        })
    }
}

fn why_avoided(gpu: &Gpu) -> Option<String> {
    match (&gpu.health, gpu.temperature) {
        (GpuHealth::Degraded(what), _) => Some(format!("GPU {} is degraded ({what})", gpu.index)),
        (_, Some(celsius)) if Candidate::is_hot(celsius) => {
            Some(format!("GPU {} is hot ({celsius} °C)", gpu.index))
        }
        _ => None,
    }
}
