//! The house order: which step is tried after which.

use std::borrow::Borrow;
use std::collections::HashMap;

use super::candidate::{Candidate, candidates};
use super::cover::Cover;
use super::evict::{self, Evictable};
use super::islands::islands;
use super::pack::{Pool, best_single};
use super::policy::{CpuUse, Policy, Running, Strategy};
use super::split::{Chain, Layers, MAX_DEVICES, even_split};
use crate::gpu::Gpu;

/// How often a set is chosen anew because the exact estimate of its split asks for more.
const REPAIRS: usize = 4;

/// What placement needs to know of a model.
pub trait MemoryModel {
    /// Why an estimate cannot be had.
    type Error;

    /// The bytes that each layer adds to the device that holds it, weights and context: the
    /// layers in order, the output layer last.
    fn layer_bytes(&self) -> &[u64];

    /// Everything that each device holds when the last layers are dealt out so: `counts` of
    /// them to each device in turn, the rest staying on the host.
    ///
    /// # Errors
    /// When the model cannot be estimated.
    fn device_bytes(&self, counts: &[u32]) -> Result<Vec<u64>, Self::Error>;
}

/// The step of the house order that led to a placement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// One GPU has room.
    One,
    /// Several GPUs have room together.
    Several,
    /// One GPU has room once others have left.
    OneEvicting,
    /// Several GPUs have room together once others have left.
    SeveralEvicting,
    /// Some layers stay on the host.
    Partial,
    /// All layers stay on the host.
    Cpu,
}

impl Step {
    /// The name in Python and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::One => "one",
            Self::Several => "several",
            Self::OneEvicting => "one-evicting",
            Self::SeveralEvicting => "several-evicting",
            Self::Partial => "partial",
            Self::Cpu => "cpu",
        }
    }
}

/// A device of a decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Share {
    /// The place of the GPU in the list that was given.
    pub gpu: usize,
    /// Layers it holds, the output layer counted.
    pub layers: u32,
    /// Everything it will hold for the model.
    pub bytes: u64,
    /// What it has for the model, once those who leave have left.
    pub budget_bytes: u64,
}

/// Where a model goes and who leaves for it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Decision {
    /// The step of the house order that led here.
    pub step: Step,
    /// The devices, in the order in which the server must be given them.
    pub shares: Vec<Share>,
    /// Who leaves: places in the list of running models, the cheapest to lose first.
    pub evict: Vec<usize>,
    /// What all the layers that were asked for would need on a single GPU.
    pub alone_bytes: u64,
}

impl Decision {
    /// Layers on devices, the output layer counted.
    pub fn gpu_layers(&self) -> u32 {
        self.shares
            .iter()
            .fold(0, |sum, share| sum.saturating_add(share.layers))
    }
}

/// Decides where a model goes: one GPU, else the smallest set of GPUs, else the same with the
/// cheapest eviction, else as much of the CPU as the policy allows. `None`: nowhere.
///
/// `wanted` is the number of layers that should be on devices, the output layer counted;
/// `None` for all.
///
/// # Errors
/// What [`MemoryModel::device_bytes`] returned.
pub fn decide<M: MemoryModel, G: Borrow<Gpu>>(
    model: &M,
    wanted: Option<u32>,
    gpus: &[G],
    policy: &Policy,
    running: &[&Running],
) -> Result<Option<Decision>, M::Error> {
    let layers = Layers::new(model.layer_bytes());
    let wanted = wanted
        .and_then(|wanted| usize::try_from(wanted).ok())
        .map_or(layers.count(), |wanted| wanted.min(layers.count()));
    let mut alone_bytes = 0;
    if wanted > 0 {
        let search = Search::new(model, &layers, gpus, policy, wanted)?;
        alone_bytes = search.alone_bytes;
        if let Some(found) = search.all_wanted(running)? {
            return Ok(Some(found));
        }
        if policy.allows_partial()
            && let Some(found) = search.as_many_as_fit()?
        {
            return Ok(Some(found));
        }
    }
    let on_cpu = wanted == 0 || policy.cpu == CpuUse::Allow;
    Ok(on_cpu.then(|| Decision {
        step: Step::Cpu,
        shares: Vec::new(),
        evict: Vec::new(),
        alone_bytes,
    }))
}

pub(super) struct Search<'a, M, G> {
    pub(super) model: &'a M,
    layers: &'a Layers,
    gpus: &'a [G],
    policy: &'a Policy,
    pub(super) candidates: Vec<Candidate>,
    /// How many of the candidates can be one of several: a process sees one MIG device at most.
    pub(super) joinable: usize,
    wanted: usize,
    /// What all the wanted layers need on one GPU.
    pub(super) alone_bytes: u64,
}

impl<'a, M: MemoryModel, G: Borrow<Gpu>> Search<'a, M, G> {
    pub(super) fn new(
        model: &'a M,
        layers: &'a Layers,
        gpus: &'a [G],
        policy: &'a Policy,
        wanted: usize,
    ) -> Result<Self, M::Error> {
        let mut candidates = candidates(gpus, policy);
        if policy.max_gpus == Some(0) {
            candidates.clear();
        }
        let joinable = candidates
            .iter()
            .take_while(|candidate| !candidate.mig)
            .count();
        let alone_bytes = need_of_one(model, wanted)?;
        Ok(Self {
            model,
            layers,
            gpus,
            policy,
            candidates,
            joinable,
            wanted,
            alone_bytes,
        })
    }

    fn strategy(&self) -> Strategy {
        self.policy.strategy
    }

    fn all_wanted(&self, running: &[&Running]) -> Result<Option<Decision>, M::Error> {
        let nobody = Evictable::default();
        let (wanted, need) = (self.wanted, self.alone_bytes);
        if let Some(place) = best_single(&self.candidates, need, self.strategy()) {
            let on = (vec![place], Cover::default());
            return Ok(self.decision(Step::One, on, &nobody, &[count(wanted)], &[need]));
        }
        let pool = self.pool(&nobody);
        for devices in self.set_sizes() {
            let found = self.settle(Step::Several, wanted, devices, &pool, &nobody, |chain| {
                let set = pool.best_set(chain, self.strategy())?;
                Some((set, Cover::default()))
            })?;
            if found.is_some() {
                return Ok(found);
            }
        }
        let evictable = self.evictable(running);
        if evictable.is_empty() {
            return Ok(None);
        }
        if let Some((place, cover)) =
            evict::single(&self.candidates, need, &evictable, self.strategy())
        {
            let (step, on) = (Step::OneEvicting, (vec![place], cover));
            return Ok(self.decision(step, on, &evictable, &[count(wanted)], &[need]));
        }
        let pool = self.pool(&evictable);
        for devices in self.set_sizes() {
            let found = self.settle(
                Step::SeveralEvicting,
                wanted,
                devices,
                &pool,
                &evictable,
                |chain| evict::several(&pool, chain, &evictable, self.strategy()),
            )?;
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }

    /// The most layers that fit when the others stay on the host, on the fewest GPUs.
    fn as_many_as_fit(&self) -> Result<Option<Decision>, M::Error> {
        let nobody = Evictable::default();
        let pool = self.pool(&nobody);
        let (mut most, mut best) = (0, None);
        for devices in std::iter::once(1).chain(self.set_sizes()) {
            let mut too_many = self.wanted;
            while too_many.saturating_sub(most) > 1 {
                let layers = most.midpoint(too_many);
                let found = if devices == 1 {
                    let need = need_of_one(self.model, layers)?;
                    best_single(&self.candidates, need, self.strategy()).and_then(|place| {
                        let on = (vec![place], Cover::default());
                        self.decision(Step::Partial, on, &nobody, &[count(layers)], &[need])
                    })
                } else {
                    self.settle(Step::Partial, layers, devices, &pool, &nobody, |chain| {
                        let set = pool.best_set(chain, self.strategy())?;
                        Some((set, Cover::default()))
                    })?
                };
                if found.is_some() {
                    (most, best) = (layers, found);
                } else {
                    too_many = layers;
                }
            }
        }
        Ok(best)
    }

    /// Chooses a set of `devices` GPUs, splits the layers over it and asks for the exact bytes;
    /// chooses anew with what that taught, where a device turns out too small.
    pub(super) fn settle(
        &self,
        step: Step,
        wanted: usize,
        devices: usize,
        pool: &Pool<'_>,
        evictable: &Evictable,
        choose: impl Fn(&Chain<'_>) -> Option<(Vec<usize>, Cover)>,
    ) -> Result<Option<Decision>, M::Error> {
        let all = self.layers.count();
        let layer_bytes = self.layers.between(all.saturating_sub(wanted), all);
        if !pool.could_hold(devices, layer_bytes) {
            return Ok(None);
        }
        let mut chain = self.chain(wanted, devices)?;
        for _ in 0..REPAIRS {
            let Some((set, cover)) = choose(&chain) else {
                break;
            };
            let budgets = self.budgets(&set, &cover, evictable);
            let counts = match self.strategy() {
                Strategy::Pack => chain.filled(&budgets, 0),
                Strategy::SingleGpuPreferred | Strategy::Distribute => chain.balanced(&budgets),
            };
            let Some(counts) = counts else { break };
            let bytes = self.model.device_bytes(&counts)?;
            if bytes.len() == budgets.len() && bytes.iter().zip(&budgets).all(|(n, most)| n <= most)
            {
                return Ok(self.decision(step, (set, cover), evictable, &counts, &bytes));
            }
            chain.learn(&counts, &bytes);
        }
        Ok(None)
    }

    /// The chain for the last `wanted` layers; what a device needs besides its layers is taken
    /// from the exact estimate of an even split.
    pub(super) fn chain(&self, wanted: usize, devices: usize) -> Result<Chain<'a>, M::Error> {
        let even = even_split(count(wanted), devices);
        let mut chain = Chain {
            layers: self.layers,
            start: self.layers.count().saturating_sub(wanted),
            fixed: vec![0; devices],
        };
        chain.learn(&even, &self.model.device_bytes(&even)?);
        Ok(chain)
    }

    pub(super) fn set_sizes(&self) -> std::ops::RangeInclusive<usize> {
        let allowed = self
            .policy
            .max_gpus
            .and_then(|most| usize::try_from(most).ok());
        let most = allowed.unwrap_or(MAX_DEVICES).min(MAX_DEVICES);
        2..=most.min(self.joinable).min(self.wanted)
    }

    pub(super) fn evictable(&self, running: &[&Running]) -> Evictable {
        let holders = running.iter().flat_map(|model| &model.bytes_by_gpu);
        let mut places: HashMap<&str, Option<usize>> =
            holders.map(|(uuid, _)| (uuid.as_str(), None)).collect();
        for (place, candidate) in self.candidates.iter().enumerate() {
            let gpu = self.gpus.get(candidate.slot).map(Borrow::<Gpu>::borrow);
            if let Some(known) = gpu.and_then(|gpu| places.get_mut(gpu.uuid.as_str())) {
                *known = Some(place);
            }
        }
        let place_of = |uuid: &str| places.get(uuid).copied().flatten();
        Evictable::new(running, self.policy.priority, place_of)
    }

    /// The GPUs that can be joined, with what they have once all who may have left.
    pub(super) fn pool(&self, evictable: &Evictable) -> Pool<'_> {
        let members = self.candidates.get(..self.joinable).unwrap_or_default();
        let freed = evictable.freed_by_all(members.len());
        let budgets = members
            .iter()
            .zip(freed)
            .map(|(one, freed)| one.budget_after(freed))
            .collect();
        let mut seen = Vec::new();
        let kinds = members
            .iter()
            .map(|one| {
                let gpu = self.gpus.get(one.slot).map(Borrow::borrow);
                let kind = gpu.map(|gpu: &Gpu| (gpu.name.as_deref(), gpu.compute_capability));
                let known = seen
                    .iter()
                    .position(|other| *other == kind)
                    .unwrap_or(seen.len());
                if known == seen.len() {
                    seen.push(kind);
                }
                count(known)
            })
            .collect();
        let gpus = members.iter().map(|one| self.gpus.get(one.slot));
        let islands = islands(gpus.map(|gpu| gpu.map(Borrow::borrow)));
        Pool::new(members, budgets, kinds, islands)
    }

    fn budgets(&self, set: &[usize], cover: &Cover, evictable: &Evictable) -> Vec<u64> {
        set.iter()
            .filter_map(|&place| {
                let candidate = self.candidates.get(place)?;
                Some(candidate.budget_after(evictable.freed(&cover.owners, place)))
            })
            .collect()
    }

    pub(super) fn decision(
        &self,
        step: Step,
        (set, cover): (Vec<usize>, Cover),
        evictable: &Evictable,
        counts: &[u32],
        bytes: &[u64],
    ) -> Option<Decision> {
        let budgets = self.budgets(&set, &cover, evictable);
        let shares = set
            .iter()
            .zip(budgets)
            .zip(counts.iter().zip(bytes))
            .map(|((&place, budget_bytes), (&layers, &bytes))| {
                let gpu = self.candidates.get(place)?.slot;
                Some(Share {
                    gpu,
                    layers,
                    bytes,
                    budget_bytes,
                })
            })
            .collect::<Option<_>>()?;
        Some(Decision {
            step,
            shares,
            evict: cover.owners,
            alone_bytes: self.alone_bytes,
        })
    }
}

fn need_of_one<M: MemoryModel>(model: &M, layers: usize) -> Result<u64, M::Error> {
    let bytes = model.device_bytes(&[count(layers)])?;
    Ok(bytes.first().copied().unwrap_or(u64::MAX))
}

fn count(layers: usize) -> u32 {
    u32::try_from(layers).unwrap_or(u32::MAX)
}
