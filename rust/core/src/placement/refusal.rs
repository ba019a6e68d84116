//! By how much a model does not fit, in words and in fields.

use std::borrow::Borrow;
use std::fmt::Write as _;

use super::advice::{Question, changes};
use super::candidate::{Candidate, candidates};
use super::decide::MemoryModel;
use super::evict::Evictable;
use super::place::{DoesNotFit, Estimated};
use super::policy::{Policy, Running};
use super::split::{MAX_DEVICES, even_split};
use super::words::{list, size, size_at_least};
use crate::estimate::{Companions, EstimateError, EstimateOptions};
use crate::gpu::{Gpu, GpuHealth};
use crate::model::ModelFacts;

/// GPUs are named one by one up to this many.
pub(crate) const NAMED_GPUS: usize = 8;

/// Says by how much a model does not fit, and what would help.
pub(crate) fn refusal<G: Borrow<Gpu>>(
    facts: &ModelFacts,
    options: &EstimateOptions,
    companions: Companions<'_>,
    gpus: &[G],
    policy: &Policy,
    running: &[&Running],
) -> Result<DoesNotFit, EstimateError> {
    let question = Question {
        facts,
        options: options.clone(),
        gpus: gpus.iter().map(Borrow::borrow).collect(),
        policy: policy.clone(),
        running,
        companions,
    };
    let room = Room::new(&question);
    let attempt = Attempt::closest(&question, &room)?;
    let changes = changes(&question, &room.members);
    let smallest_change = (!changes.is_empty()).then(|| list(&changes, "or"));
    let mut message = format!(
        "{}; {}",
        attempt.described(&question),
        room.described(&question)
    );
    if let Some(change) = &smallest_change {
        let _ = write!(message, ". What would help: {change}");
    }
    Ok(DoesNotFit {
        required_bytes: attempt.required,
        short_by_bytes: attempt.short_by,
        free_bytes_by_gpu: room
            .members
            .iter()
            .filter_map(|(candidate, budget)| {
                Some((question.gpus.get(candidate.slot)?.uuid.clone(), *budget))
            })
            .collect(),
        smallest_change,
        message,
    })
}

/// The GPUs that may be used, with what each has once every idle model has left.
struct Room {
    members: Vec<(Candidate, u64)>,
    with_leavers: bool,
}

impl Room {
    fn new(question: &Question<'_>) -> Self {
        let found = candidates(&question.gpus, &question.policy);
        let evictable = Evictable::new(question.running, question.policy.priority, |uuid| {
            let is_it = |one: &Candidate| {
                question
                    .gpus
                    .get(one.slot)
                    .is_some_and(|gpu| gpu.uuid == uuid)
            };
            found.iter().position(is_it)
        });
        let freed = evictable.freed_by_all(found.len());
        let with_leavers = !evictable.is_empty();
        let budget = |(one, freed): (Candidate, u64)| {
            let budget = one.budget_after(freed);
            (one, budget)
        };
        Self {
            members: found.into_iter().zip(freed).map(budget).collect(),
            with_leavers,
        }
    }

    fn described(&self, question: &Question<'_>) -> String {
        if self.members.is_empty() {
            return no_gpu(question);
        }
        let leavers = if self.with_leavers {
            " once all idle models have left"
        } else {
            ""
        };
        let mut rooms: Vec<String> = self
            .members
            .iter()
            .take(NAMED_GPUS)
            .map(|(_, budget)| size(*budget))
            .collect();
        let gpus = self.members.len();
        rooms.dedup();
        if let [room] = rooms.as_slice()
            && (2..=NAMED_GPUS).contains(&gpus)
        {
            return format!("there is room for {room} on each of {gpus} GPUs{leavers}");
        }
        let named =
            |(one, budget): &(Candidate, u64)| format!("{} on GPU {}", size(*budget), one.index);
        let mut rooms: Vec<String> = self.members.iter().take(NAMED_GPUS).map(named).collect();
        if let Some(others @ 1..) = gpus.checked_sub(NAMED_GPUS) {
            rooms.push(format!("what {others} more have"));
        }
        format!("there is room for {}{leavers}", list(&rooms, "and"))
    }
}

/// Why none of the GPUs may be used.
fn no_gpu(question: &Question<'_>) -> String {
    if question.gpus.is_empty() {
        return "there is no GPU".to_owned();
    }
    if question.policy.max_gpus == Some(0) {
        return "its policy allows no GPU (max_gpus is 0)".to_owned();
    }
    let why: Vec<String> = question
        .gpus
        .iter()
        .take(NAMED_GPUS)
        .map(|gpu| why_unusable(gpu, &question.policy))
        .collect();
    format!("no GPU may be used: {}", list(&why, "and"))
}

/// Why a GPU that is no candidate may not be used.
pub(crate) fn why_unusable(gpu: &Gpu, policy: &Policy) -> String {
    match &gpu.health {
        GpuHealth::Lost(what) => format!("GPU {} is lost ({what})", gpu.index),
        _ if gpu.free_bytes.is_none() => {
            format!("the free memory of GPU {} is unknown", gpu.index)
        }
        _ if policy.max_gpus == Some(0) => {
            format!(
                "GPU {}: its policy allows no GPU (max_gpus is 0)",
                gpu.index
            )
        }
        _ => format!("GPU {} is not among those allowed", gpu.index),
    }
}

/// The attempt that came closest.
struct Attempt {
    devices: usize,
    required: u64,
    short_by: u64,
    alone: u64,
}

impl Attempt {
    fn closest(question: &Question<'_>, room: &Room) -> Result<Self, EstimateError> {
        let model = Estimated::new(question.facts, &question.options, question.companions)?;
        let all = u32::try_from(model.layer_bytes().len()).unwrap_or(u32::MAX);
        let wanted = question
            .options
            .gpu_layers
            .map_or(all, |layers| layers.min(all));
        let mut budgets: Vec<u64> = room.members.iter().map(|(_, budget)| *budget).collect();
        budgets.sort_unstable_by(|one, other| other.cmp(one));
        let sum = |bytes: &[u64]| {
            bytes
                .iter()
                .fold(0_u64, |sum, one| sum.saturating_add(*one))
        };
        let joinable = room.members.iter().filter(|(one, _)| !one.mig).count();
        let allowed = question
            .policy
            .max_gpus
            .and_then(|most| usize::try_from(most).ok());
        let most = allowed
            .unwrap_or(MAX_DEVICES)
            .min(MAX_DEVICES)
            .min(joinable)
            .max(1);
        let mut best: Option<Self> = None;
        let mut alone = 0;
        for devices in
            (1..=most).take_while(|devices| u32::try_from(*devices).is_ok_and(|n| n <= wanted))
        {
            let required = sum(&model.device_bytes(&even_split(wanted, devices))?);
            let have = sum(budgets.get(..devices).unwrap_or(&budgets));
            let short_by = required.saturating_sub(have);
            if devices == 1 {
                alone = required;
            }
            if best.as_ref().is_none_or(|best| short_by < best.short_by) {
                best = Some(Self {
                    devices,
                    required,
                    short_by,
                    alone,
                });
            }
        }
        Ok(best.unwrap_or(Self {
            devices: 1,
            required: 0,
            short_by: 0,
            alone,
        }))
    }

    fn described(&self, question: &Question<'_>) -> String {
        let context = match question.options.context_length {
            0 => question.facts.trained_context_length(),
            length => length,
        };
        let required = size(self.required);
        let mut words = if self.devices == 1 {
            format!("{required} are needed on one GPU (context of {context})")
        } else {
            let alone = size(self.alone);
            format!(
                "{alone} are needed on one GPU, or {required} over {} (context of {context})",
                self.devices
            )
        };
        if self.short_by > 0 {
            let _ = write!(
                words,
                ", {} more than there is",
                size_at_least(self.short_by)
            );
        } else {
            words.push_str(", and no split of its layers fits");
        }
        words
    }
}
