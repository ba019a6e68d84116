//! `plan`: which of many models can be resident together, and where.

use std::borrow::Borrow;

use super::assign::{Assignment, Effort, Item, assign};
use super::candidate::{Candidate, candidates};
use super::decide::{Decision, MemoryModel, Share, Step, decide};
use super::packing::pack_all;
use super::place::{DoesNotFit, Estimated, Placement, placement};
use super::policy::{GpuName, Policy, Strategy, priority_factor};
use super::words::{list, size, size_at_least};
use crate::estimate::{Companions, EstimateError, EstimateOptions};
use crate::gpu::Gpu;
use crate::model::ModelFacts;

/// A model that should be resident.
#[derive(Clone, Debug)]
pub struct Wanted<'a> {
    /// Its id.
    pub id: &'a str,
    /// What is known of it.
    pub facts: &'a ModelFacts,
    /// What is loaded beside it.
    pub companions: Companions<'a>,
    /// The options it is started with.
    pub options: &'a EstimateOptions,
    /// What having it is worth, compared with others.
    pub value: f64,
    /// A step up is worth four times as much.
    pub priority: i32,
    /// Whether the plan must contain it.
    pub pinned: bool,
    /// The only GPUs it may use; `None` for those of the policy.
    pub allowed: Option<Vec<GpuName>>,
    /// At most so many GPUs; `None` for those of the policy.
    pub max_gpus: Option<u32>,
}

/// Which models are resident together.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Where each model goes, in the order in which they were given; `None` is left out.
    pub placements: Vec<Option<Placement>>,
    /// Why each model that is left out is, by its place in that order.
    pub left_out: Vec<(usize, String)>,
    /// What stays free on each GPU that may be used, by UUID; the headroom is part of it.
    pub free_bytes_by_gpu: Vec<(String, u64)>,
}

/// Why there is no plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PlanError {
    /// A model, by its place in the order given, cannot be estimated.
    Estimate(usize, EstimateError),
    /// The pinned models cannot stand together.
    Pinned(Box<DoesNotFit>),
}

/// Finds the models that are worth the most together and gives each its place; pinned models
/// are always among them. Models that are too large for any one GPU are split over the fewest, and
/// so is who finds no room on one GPU beside the others.
///
/// Not always the best plan there is: the search is bounded to some milliseconds.
///
/// # Errors
/// [`PlanError::Estimate`] where a model cannot be estimated, [`PlanError::Pinned`] where the
/// pinned models do not fit together.
pub fn plan<G: Borrow<Gpu>>(
    wanted: &[Wanted<'_>],
    gpus: &[G],
    policy: &Policy,
) -> Result<Plan, PlanError> {
    let gpus: Vec<&Gpu> = gpus.iter().map(Borrow::borrow).collect();
    let models = wanted
        .iter()
        .enumerate()
        .map(|(place, one)| Resident::new(one, place, &gpus, policy))
        .collect::<Result<Vec<_>, _>>()?;
    let mut board = Board {
        free: gpus.iter().map(|gpu| gpu.free_bytes).collect(),
        gpus,
        policy,
        decisions: vec![None; models.len()],
    };
    let mut large: Vec<&Resident<'_>> = models.iter().filter(|model| !model.fits_one()).collect();
    large.sort_by_key(|model| (!model.pinned, std::cmp::Reverse(model.value), model.place));
    let mut small: Vec<&Resident<'_>> = models.iter().filter(|model| model.fits_one()).collect();
    small.sort_by_key(|model| model.place);
    for model in large {
        board.try_large(model, &small)?;
    }
    for (model, gpu) in board.best_of(&small, Effort::Full) {
        board.put_on_one(model, gpu);
    }
    small.sort_by_key(|model| (!model.pinned, std::cmp::Reverse(model.value), model.place));
    for model in small {
        board.try_split(model)?;
    }
    if models.iter().any(|model| model.pinned && !board.has(model)) {
        return Err(PlanError::Pinned(Box::new(
            board.pinned_refusal(wanted, &models),
        )));
    }
    board.plan(&models)
}

/// A wanted model with what it needs on one GPU.
struct Resident<'a> {
    place: usize,
    id: &'a str,
    model: Estimated<'a>,
    layers: u32,
    bytes: u64,
    value: u64,
    pinned: bool,
    /// The GPUs that it may use, with what each has for it when nothing is there.
    usable: Vec<Candidate>,
    policy: Policy,
}

impl<'a> Resident<'a> {
    fn new(
        one: &Wanted<'a>,
        place: usize,
        gpus: &[&Gpu],
        policy: &Policy,
    ) -> Result<Self, PlanError> {
        let failed = |error| PlanError::Estimate(place, error);
        let model = Estimated::new(one.facts, one.options, one.companions).map_err(failed)?;
        let all = u32::try_from(model.layer_bytes().len()).unwrap_or(u32::MAX);
        let layers = one.options.gpu_layers.map_or(all, |layers| layers.min(all));
        let bytes = model.device_bytes(&[layers]).map_err(failed)?;
        let policy = Policy {
            allowed: one.allowed.clone().or_else(|| policy.allowed.clone()),
            max_gpus: one.max_gpus.or(policy.max_gpus),
            ..policy.clone()
        };
        Ok(Self {
            place,
            id: one.id,
            model,
            layers,
            bytes: bytes.first().copied().unwrap_or(u64::MAX),
            value: worth(one.value, one.priority),
            pinned: one.pinned,
            usable: candidates(gpus, &policy),
            policy,
        })
    }

    fn fits_one(&self) -> bool {
        self.usable.iter().any(|gpu| gpu.budget >= self.bytes)
    }
}

/// A value as a whole number; having a model is never worth nothing.
fn worth(value: f64, priority: i32) -> u64 {
    let value = if value.is_finite() { value } else { 0.0 };
    let worth = value * priority_factor(priority) * 1000.0;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "held between 1 and a number that fits"
    )]
    let worth = worth.clamp(1.0, 1e12) as u64;
    worth
}

/// What is placed so far, and what is free beside it.
struct Board<'a> {
    gpus: Vec<&'a Gpu>,
    free: Vec<Option<u64>>,
    policy: &'a Policy,
    decisions: Vec<Option<Decision>>,
}

impl<'a> Board<'a> {
    fn has(&self, model: &Resident<'_>) -> bool {
        self.decisions.get(model.place).is_some_and(Option::is_some)
    }

    /// What a GPU has for another model.
    fn room(&self, slot: usize) -> u64 {
        let free = self.free.get(slot).copied().flatten().unwrap_or_default();
        let headroom = self
            .gpus
            .get(slot)
            .map_or(0, |gpu| self.policy.headroom_on(gpu));
        free.saturating_sub(headroom)
    }

    /// The assignment of the small models that is worth the most.
    fn best_of<'m>(
        &self,
        small: &[&'m Resident<'a>],
        effort: Effort,
    ) -> Vec<(&'m Resident<'a>, usize)> {
        let optional = small.iter().filter(|model| !model.pinned);
        let sum = optional.fold(0_u64, |sum, model| sum.saturating_add(model.value));
        let bins: Vec<u64> = (0..self.gpus.len()).map(|slot| self.room(slot)).collect();
        let items: Vec<Item> = small
            .iter()
            .map(|model| {
                let mut allowed = vec![false; bins.len()];
                for candidate in &model.usable {
                    if let Some(may) = allowed.get_mut(candidate.slot) {
                        *may = true;
                    }
                }
                let extra = if model.pinned { sum } else { 0 };
                let value = model.value.saturating_add(extra);
                Item {
                    bytes: model.bytes,
                    value,
                    allowed,
                }
            })
            .collect();
        let mut places = assign(&items, &bins, effort);
        let left_out =
            |(model, place): (&&Resident<'_>, &Option<usize>)| model.pinned && place.is_none();
        if effort == Effort::Full && small.iter().zip(&places).any(left_out) {
            places = pinned_first(small, &items, bins).unwrap_or(places);
        }
        let assigned = small.iter().zip(places);
        assigned
            .filter_map(|(model, bin)| Some((*model, bin?)))
            .collect()
    }

    fn worth_of(&self, small: &[&Resident<'a>]) -> (usize, u64) {
        let chosen = self.best_of(small, Effort::Glance);
        let pinned = chosen.iter().filter(|(model, _)| model.pinned).count();
        let value = chosen
            .iter()
            .fold(0_u64, |sum, (model, _)| sum.saturating_add(model.value));
        (pinned, value)
    }

    /// Where a model would go over several GPUs, beside what is placed so far.
    fn split(
        &self,
        model: &Resident<'_>,
        strategy: Strategy,
    ) -> Result<Option<Decision>, PlanError> {
        let gpus: Vec<Gpu> = self
            .gpus
            .iter()
            .zip(&self.free)
            .map(|(gpu, free)| Gpu {
                free_bytes: *free,
                ..(*gpu).clone()
            })
            .collect();
        let policy = Policy {
            strategy,
            ..model.policy.clone()
        };
        let decision = decide(&model.model, Some(model.layers), &gpus, &policy, &[])
            .map_err(|error| PlanError::Estimate(model.place, error))?;
        Ok(decision.filter(|found| !found.shares.is_empty()))
    }

    /// Puts a model over several GPUs if it is pinned or worth more than what it displaces, where
    /// it displaces the least.
    fn try_large(
        &mut self,
        model: &Resident<'_>,
        small: &[&Resident<'a>],
    ) -> Result<(), PlanError> {
        let before = self.free.clone();
        let mut tried: Vec<Decision> = Vec::new();
        let mut best: Option<((usize, u64), usize)> = None;
        for strategy in Strategy::ALL {
            let Some(decision) = self.split(model, strategy)? else {
                return Ok(());
            };
            if tried.contains(&decision) {
                continue;
            }
            self.take(&decision);
            let beside = self.worth_of(small);
            self.free.clone_from(&before);
            if best.is_none_or(|(most, _)| beside > most) {
                best = Some((beside, tried.len()));
            }
            tried.push(decision);
        }
        let Some(((pinned, value), chosen)) = best else {
            return Ok(());
        };
        if model.pinned || (pinned, value.saturating_add(model.value)) > self.worth_of(small) {
            self.put(model, tried.swap_remove(chosen));
        }
        Ok(())
    }

    /// Puts a model that has found no room on one GPU over several, if they have room together.
    fn try_split(&mut self, model: &Resident<'_>) -> Result<(), PlanError> {
        if !self.has(model)
            && let Some(decision) = self.split(model, model.policy.strategy)?
        {
            self.put(model, decision);
        }
        Ok(())
    }

    fn put(&mut self, model: &Resident<'_>, decision: Decision) {
        self.take(&decision);
        if let Some(slot) = self.decisions.get_mut(model.place) {
            *slot = Some(decision);
        }
    }

    fn take(&mut self, decision: &Decision) {
        for share in &decision.shares {
            if let Some(Some(free)) = self.free.get_mut(share.gpu) {
                *free = free.saturating_sub(share.bytes);
            }
        }
    }

    fn put_on_one(&mut self, model: &Resident<'_>, gpu: usize) {
        let share = Share {
            gpu,
            layers: model.layers,
            bytes: model.bytes,
            budget_bytes: self.room(gpu),
        };
        let decision = Decision {
            step: Step::One,
            shares: vec![share],
            evict: Vec::new(),
            alone_bytes: model.bytes,
        };
        self.put(model, decision);
    }

    fn plan(self, models: &[Resident<'_>]) -> Result<Plan, PlanError> {
        let mut placements = Vec::with_capacity(models.len());
        let mut left_out = Vec::new();
        for (model, decision) in models.iter().zip(&self.decisions) {
            let Some(decision) = decision else {
                placements.push(None);
                left_out.push((model.place, self.why_not(model)));
                continue;
            };
            let placed = placement(&model.model, decision, &self.gpus, &model.policy, &[]);
            let mut placed = placed.map_err(|error| PlanError::Estimate(model.place, error))?;
            placed.reason = planned(&placed);
            placements.push(Some(placed));
        }
        let free_bytes_by_gpu = candidates(&self.gpus, self.policy)
            .iter()
            .filter_map(|one| {
                Some((
                    self.gpus.get(one.slot)?.uuid.clone(),
                    (*self.free.get(one.slot)?)?,
                ))
            })
            .collect();
        Ok(Plan {
            placements,
            left_out,
            free_bytes_by_gpu,
        })
    }

    fn why_not(&self, model: &Resident<'_>) -> String {
        if model.usable.is_empty() {
            return "no GPU may be used for it".to_owned();
        }
        let most = model.usable.iter().max_by_key(|one| self.room(one.slot));
        let room = most.map(|one| format!("{} on GPU {}", size(self.room(one.slot)), one.index));
        format!(
            "{} are needed, and the others leave {} at the most",
            size(model.bytes),
            room.unwrap_or_default()
        )
    }

    fn pinned_refusal(&self, wanted: &[Wanted<'_>], models: &[Resident<'_>]) -> DoesNotFit {
        let pinned = || models.iter().filter(|model| model.pinned);
        let outside: Vec<&Resident<'_>> = pinned().filter(|model| !self.has(model)).collect();
        let names: Vec<String> = pinned().map(|model| model.id.to_owned()).collect();
        let required = pinned().fold(0_u64, |sum, model| sum.saturating_add(model.bytes));
        let mut short_by_bytes = 0_u64;
        let short: Vec<String> = outside
            .iter()
            .map(|model| {
                let most = model.usable.iter().max_by_key(|one| self.room(one.slot));
                let room = most.map_or(0, |gpu| self.room(gpu.slot));
                let missing = model.bytes.saturating_sub(room);
                short_by_bytes = short_by_bytes.saturating_add(missing);
                let Some(gpu) = most else {
                    return format!("{} may use no GPU", model.id);
                };
                if !model.fits_one() {
                    let alone = size(model.bytes);
                    return format!(
                        "no GPUs have room together for {} ({alone} on one)",
                        model.id
                    );
                }
                let missing = size_at_least(missing);
                format!("{} is {missing} short on GPU {}", model.id, gpu.index)
            })
            .collect();
        let message = format!(
            "these pinned models cannot stand together: {}; with the others in place {}",
            list(&names, "and"),
            list(&short, "and")
        );
        let free = candidates(&self.gpus, self.policy);
        DoesNotFit {
            required_bytes: required,
            short_by_bytes,
            free_bytes_by_gpu: free
                .iter()
                .filter_map(|one| Some((self.gpus.get(one.slot)?.uuid.clone(), one.budget)))
                .collect(),
            smallest_change: (wanted.len() > 1).then(|| {
                let ids: Vec<String> = outside.iter().map(|model| model.id.to_owned()).collect();
                format!("unpin {}", list(&ids, "and"))
            }),
            message,
        }
    }
}

/// The pinned models wherever they fit together, and then the others; `None` where they do not.
fn pinned_first(small: &[&Resident<'_>], items: &[Item], mut bins: Vec<u64>) -> Option<Assignment> {
    let of = |pinned: bool| {
        let models = small.iter().zip(items).enumerate();
        models
            .filter(move |(_, (model, _))| model.pinned == pinned)
            .map(|(at, (_, item))| (at, item.clone()))
    };
    let mut places = vec![None; small.len()];
    let mut put = |at: usize, bin: Option<usize>| {
        if let Some(place) = places.get_mut(at) {
            *place = bin;
        }
    };
    let (numbers, pinned): (Vec<usize>, Vec<Item>) = of(true).unzip();
    for ((at, item), bin) in numbers.iter().zip(&pinned).zip(pack_all(&pinned, &bins)?) {
        put(*at, Some(bin));
        if let Some(room) = bins.get_mut(bin) {
            *room = room.saturating_sub(item.bytes);
        }
    }
    let (numbers, others): (Vec<usize>, Vec<Item>) = of(false).unzip();
    for (at, bin) in numbers
        .into_iter()
        .zip(assign(&others, &bins, Effort::Full))
    {
        put(at, bin);
    }
    Some(places)
}

/// The reason of a placement that is part of a plan.
fn planned(placed: &Placement) -> String {
    let devices: Vec<String> = placed
        .devices
        .iter()
        .map(|device| format!("{} on GPU {}", size(device.total_bytes), device.index))
        .collect();
    format!("planned with the others: {}", list(&devices, "and"))
}
