//! `explain`: what became of every step of the house order, the refused ones with the bytes that
//! they are short. It asks the same search as [`place`](super::place), step by step, and is slower.

use std::borrow::Borrow;
use std::cmp::Reverse;

use super::cover::Cover;
use super::decide::{Decision, MemoryModel, Search, Step, decide};
use super::evict::{self, Evictable};
use super::listing::{Alternative, Fitting, Listing, Outcome, why_it_stays};
use super::pack::{Pool, single_rank};
use super::place::{DoesNotFit, Estimated, PlaceError, Placement, place};
use super::policy::{CpuUse, Policy, Running};
use super::refusal::why_unusable;
use super::split::{Chain, Layers};
use crate::estimate::{Companions, EstimateError, EstimateOptions};
use crate::gpu::Gpu;
use crate::model::ModelFacts;

/// As many GPUs, or sets of them, are looked at in one step; more would not be read.
const MOST_LISTED: usize = 64;
/// A shortage is sought to this precision before it is asked for exactly.
const CLOSE_ENOUGH: u64 = 1 << 20;

/// Where a model goes, or why nowhere, with what became of the alternatives.
#[derive(Clone, Debug, PartialEq)]
pub struct Explanation {
    /// What [`place`] answers.
    pub answer: Result<Placement, Box<DoesNotFit>>,
    /// Every step up to the one that led there, in order.
    pub alternatives: Vec<Alternative>,
    /// Who runs and may not leave, each with the reason.
    pub staying: Vec<(String, String)>,
}

/// Decides as [`place`], and lists every step of the house order with what became of it.
/// Of thousands of GPUs those with the most room are listed.
///
/// # Errors
/// Where the model cannot be estimated with these options.
pub fn explain<G: Borrow<Gpu>>(
    facts: &ModelFacts,
    options: &EstimateOptions,
    companions: Companions<'_>,
    gpus: &[G],
    policy: &Policy,
    running: &[&Running],
) -> Result<Explanation, EstimateError> {
    let answer = match place(facts, options, companions, gpus, policy, running) {
        Ok(placement) => Ok(placement),
        Err(PlaceError::DoesNotFit(refusal)) => Err(refusal),
        Err(PlaceError::Estimate(error)) => return Err(error),
    };
    let model = Estimated::new(facts, options, companions)?;
    let layers = Layers::new(model.layer_bytes());
    let wanted = options
        .gpu_layers
        .and_then(|wanted| usize::try_from(wanted).ok())
        .map_or(layers.count(), |wanted| wanted.min(layers.count()));
    let mut report = Report {
        search: Search::new(&model, &layers, gpus, policy, wanted)?,
        wanted,
        listing: Listing {
            gpus,
            policy,
            running,
            taken: decide(&model, options.gpu_layers, gpus, policy, running)?,
            found: Vec::new(),
        },
    };
    report.steps()?;
    Ok(Explanation {
        answer,
        alternatives: report.listing.found,
        staying: running
            .iter()
            .filter_map(|model| Some((model.id.clone(), why_it_stays(model, policy)?)))
            .collect(),
    })
}

struct Report<'a, G> {
    search: Search<'a, Estimated<'a>, G>,
    wanted: usize,
    listing: Listing<'a, G>,
}

impl<G: Borrow<Gpu>> Report<'_, G> {
    fn steps(&mut self) -> Result<(), EstimateError> {
        if self.wanted > 0 {
            self.unusable_gpus();
            let nobody = Evictable::default();
            self.one(Step::One, &nobody);
            if !self.listing.is_taken(Step::One) {
                self.several(Step::Several, &nobody)?;
            }
            if !self.listing.is_taken(Step::One) && !self.listing.is_taken(Step::Several) {
                self.evicting()?;
            }
        }
        if self
            .listing
            .taken
            .as_ref()
            .is_none_or(|taken| matches!(taken.step, Step::Partial | Step::Cpu))
        {
            self.with_the_cpu();
        }
        Ok(())
    }

    fn unusable_gpus(&mut self) {
        if self.listing.gpus.is_empty() {
            self.listing
                .note(Step::One, Outcome::Refused, "there is no GPU".to_owned());
        }
        let is_candidate = |slot: usize| self.search.candidates.iter().any(|one| one.slot == slot);
        let unusable: Vec<String> = (0..self.listing.gpus.len())
            .filter(|slot| !is_candidate(*slot))
            .take(MOST_LISTED)
            .filter_map(|slot| Some(why_unusable(self.listing.gpu(slot)?, self.listing.policy)))
            .collect();
        for reason in unusable {
            self.listing.note(Step::One, Outcome::Refused, reason);
        }
    }

    /// Every GPU on its own.
    fn one(&mut self, step: Step, evictable: &Evictable) {
        let freed = evictable.freed_by_all(self.search.candidates.len());
        let strategy = self.listing.policy.strategy;
        let need = self.search.alone_bytes;
        let mut order: Vec<_> = self
            .search
            .candidates
            .iter()
            .zip(freed)
            .enumerate()
            .map(|(place, (one, freed))| {
                let budget = one.budget_after(freed);
                let rank = (budget >= need).then(|| single_rank(one, strategy));
                (rank.is_none(), rank, Reverse(budget), place)
            })
            .collect();
        order.sort_unstable();
        order.truncate(MOST_LISTED);
        let mut order: Vec<usize> = order.into_iter().map(|(.., place)| place).collect();
        order.sort_unstable();
        let mut fitting = Vec::new();
        for place in order {
            match self.room_on(place, evictable) {
                Some(cover) => fitting.extend(self.fitting_one(step, place, cover, evictable)),
                None => self.short(step, &[place], &[count(self.wanted)], &[need], evictable),
            }
        }
        self.listing.fitting(step, 1, fitting);
    }

    /// Who leaves for the model on one GPU; `None` where that is no help.
    fn room_on(&self, place: usize, evictable: &Evictable) -> Option<Cover> {
        let candidate = self.search.candidates.get(place)?;
        let need = self.search.alone_bytes;
        if evictable.is_empty() {
            return (candidate.budget >= need).then(Cover::default);
        }
        evict::on_one(place, candidate, need, evictable)
    }

    fn fitting_one(
        &self,
        step: Step,
        place: usize,
        cover: Cover,
        evictable: &Evictable,
    ) -> Option<Fitting> {
        let cost = cover.cost;
        let rank = single_rank(
            self.search.candidates.get(place)?,
            self.listing.policy.strategy,
        );
        let counts = [count(self.wanted)];
        let bytes = [self.search.alone_bytes];
        let decision =
            self.search
                .decision(step, (vec![place], cover), evictable, &counts, &bytes)?;
        Some(Fitting {
            decision,
            cost,
            rank,
        })
    }

    /// Sets of GPUs, a size after the other.
    fn several(&mut self, step: Step, evictable: &Evictable) -> Result<(), EstimateError> {
        if self.search.set_sizes().is_empty() {
            let reason = self.why_not_several();
            self.listing.note(step, Outcome::Refused, reason);
            return Ok(());
        }
        for devices in self.search.set_sizes() {
            let pool = self.search.pool(evictable);
            let mut chain = self.search.chain(self.wanted, devices)?;
            let mut fitting = Vec::new();
            for set in pool.sets_that_fit(&chain).iter().take(MOST_LISTED) {
                fitting.extend(self.fitting_set(step, set, &pool, evictable)?);
            }
            if fitting.is_empty() {
                let set = pool.roomiest(devices);
                let budgets = pool.budgets_of(&set);
                self.short_of_least(step, &set, &budgets, &mut chain, evictable)?;
            }
            self.listing.fitting(step, devices, fitting);
            let is_enough = |taken: &Decision| taken.step == step && taken.shares.len() == devices;
            if self.listing.taken.as_ref().is_some_and(is_enough) {
                break;
            }
        }
        Ok(())
    }

    fn fitting_set(
        &self,
        step: Step,
        set: &[usize],
        pool: &Pool<'_>,
        evictable: &Evictable,
    ) -> Result<Option<Fitting>, EstimateError> {
        let choose = |chain: &Chain<'_>| {
            let cover = if evictable.is_empty() {
                chain.fits(&pool.budgets_of(set)).then(Cover::default)
            } else {
                evict::on_set(pool, set, chain, evictable)
            };
            Some((set.to_vec(), cover?))
        };
        let devices = set.len();
        let found = self
            .search
            .settle(step, self.wanted, devices, pool, evictable, choose)?;
        let rank = pool.rank(set, self.listing.policy.strategy);
        Ok(found.map(|decision| {
            let cost = self.listing.cost_of(&decision);
            Fitting {
                decision,
                cost,
                rank,
            }
        }))
    }

    /// Notes the split over a set of GPUs that is short of the least, with its exact bytes.
    fn short_of_least(
        &mut self,
        step: Step,
        set: &[usize],
        budgets: &[u64],
        chain: &mut Chain<'_>,
        evictable: &Evictable,
    ) -> Result<(), EstimateError> {
        let mut closest = None;
        for _ in 0..2 {
            let Some(counts) = chain.filled_with_least_more(budgets, CLOSE_ENOUGH) else {
                break;
            };
            let bytes = self.search.model.device_bytes(&counts)?;
            chain.learn(&counts, &bytes);
            closest = Some((counts, bytes));
        }
        if let Some((counts, bytes)) = closest {
            self.short(step, set, &counts, &bytes, evictable);
        }
        Ok(())
    }

    fn short(
        &mut self,
        step: Step,
        set: &[usize],
        counts: &[u32],
        bytes: &[u64],
        evictable: &Evictable,
    ) {
        let owners = evictable.owners_on(set);
        let on = (set.to_vec(), Cover { cost: 0, owners });
        if let Some(decision) = self.search.decision(step, on, evictable, counts, bytes) {
            self.listing.short(&decision);
        }
    }

    fn why_not_several(&self) -> String {
        if self.listing.policy.max_gpus.is_some_and(|most| most < 2) {
            return "several GPUs: its policy allows one (max_gpus)".to_owned();
        }
        if self.wanted < 2 {
            return "several GPUs: there is only one layer to be placed".to_owned();
        }
        "several GPUs: there are no two that can be joined".to_owned()
    }

    fn evicting(&mut self) -> Result<(), EstimateError> {
        let evictable = self.search.evictable(self.listing.running);
        if evictable.is_empty() {
            let why: Vec<String> = self
                .listing
                .running
                .iter()
                .filter_map(|model| {
                    Some(format!(
                        "{}: {}",
                        model.id,
                        why_it_stays(model, self.listing.policy)?
                    ))
                })
                .collect();
            let why = match why.as_slice() {
                [] => "no model runs there that could leave".to_owned(),
                some => format!("nobody may leave ({})", some.join("; ")),
            };
            self.listing.note(
                Step::OneEvicting,
                Outcome::Refused,
                format!("evicting: {why}"),
            );
            return Ok(());
        }
        self.one(Step::OneEvicting, &evictable);
        if !self.listing.is_taken(Step::OneEvicting) {
            self.several(Step::SeveralEvicting, &evictable)?;
        }
        Ok(())
    }

    fn with_the_cpu(&mut self) {
        if let Some(taken) = self
            .listing
            .taken
            .clone()
            .filter(|taken| taken.step == Step::Partial)
        {
            let on_gpus = taken.gpu_layers();
            self.listing.push(
                &taken,
                Outcome::Taken,
                &format!("the most layers that fit: {on_gpus}"),
            );
            return;
        }
        if self.wanted > 0 {
            let (outcome, why) = if self.listing.policy.allows_partial() {
                (Outcome::Short, "no GPU has room for a single layer of it")
            } else {
                (
                    Outcome::Refused,
                    "its policy lets no layers stay there (partial: false)",
                )
            };
            self.listing.note(
                Step::Partial,
                outcome,
                format!("some layers on the CPU: {why}"),
            );
        }
        let (outcome, why) = match (&self.listing.taken, self.listing.policy.cpu) {
            (Some(_), _) if self.wanted == 0 => (Outcome::Taken, "no layer is to be on a GPU"),
            (Some(_), _) => (Outcome::Taken, "no GPUs have room for it (cpu: allow)"),
            (None, CpuUse::Partial) => {
                (Outcome::Refused, "its policy allows a part (cpu: partial)")
            }
            (None, _) => (Outcome::Refused, "its policy forbids it (cpu: never)"),
        };
        self.listing
            .note(Step::Cpu, outcome, format!("the CPU: {why}"));
    }
}

fn count(layers: usize) -> u32 {
    u32::try_from(layers).unwrap_or(u32::MAX)
}
