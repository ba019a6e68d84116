//! Who leaves: the cheapest set of idle models on the GPUs that matter.

use super::candidate::Candidate;
use super::cover::{Cover, Leaver, Steps, cheapest_cover, least_cost, sort_by_price};
use super::pack::{Pool, Rank, single_rank};
use super::policy::{Running, Strategy};
use super::split::Chain;

/// Steps that one decision may spend on a search: some hundred microseconds, and a bound on
/// the depth of its recursion.
const STEPS: u32 = 2_000;

/// Models that may leave, and what they hold where.
#[derive(Debug, Default)]
pub(crate) struct Evictable {
    models: Vec<Holder>,
}

/// A model that may leave, with the bytes it holds on candidates, by their places.
#[derive(Debug)]
struct Holder {
    owner: usize,
    cost: u64,
    held: Vec<(usize, u64)>,
}

impl Holder {
    fn bytes_on(&self, place: usize) -> u64 {
        let here = self.held.iter().filter(|(at, _)| *at == place);
        here.fold(0, |sum, (_, bytes)| sum.saturating_add(*bytes))
    }
}

impl Evictable {
    /// Those who may leave for a newcomer of this priority; `place_of` finds a candidate by
    /// its UUID.
    pub(crate) fn new(
        running: &[&Running],
        priority: i32,
        place_of: impl Fn(&str) -> Option<usize>,
    ) -> Self {
        let mut models = Vec::new();
        for (owner, model) in running.iter().enumerate() {
            if !model.may_leave_for(priority) {
                continue;
            }
            let held: Vec<(usize, u64)> = model
                .bytes_by_gpu
                .iter()
                .filter(|(_, bytes)| *bytes > 0)
                .filter_map(|(uuid, bytes)| Some((place_of(uuid)?, *bytes)))
                .collect();
            if !held.is_empty() {
                models.push(Holder {
                    owner,
                    cost: model.eviction_cost(),
                    held,
                });
            }
        }
        Self { models }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.models.is_empty()
    }

    /// What comes back on each of so many candidates when all of them leave.
    pub(crate) fn freed_by_all(&self, candidates: usize) -> Vec<u64> {
        let mut freed = vec![0_u64; candidates];
        for (place, bytes) in self.models.iter().flat_map(|model| &model.held) {
            if let Some(sum) = freed.get_mut(*place) {
                *sum = sum.saturating_add(*bytes);
            }
        }
        freed
    }

    /// What comes back on a candidate when these leave.
    pub(crate) fn freed(&self, owners: &[usize], place: usize) -> u64 {
        let leaving = self
            .models
            .iter()
            .filter(|model| owners.contains(&model.owner));
        leaving.fold(0, |sum, model| sum.saturating_add(model.bytes_on(place)))
    }

    /// Who holds something on these candidates.
    pub(crate) fn owners_on(&self, places: &[usize]) -> Vec<usize> {
        self.on(places).iter().map(|leaver| leaver.owner).collect()
    }

    /// Those who hold something on these candidates, the cheapest per byte first.
    fn on(&self, places: &[usize]) -> Vec<Leaver> {
        let mut leavers: Vec<_> = self
            .models
            .iter()
            .filter(|model| model.held.iter().any(|(place, _)| places.contains(place)))
            .map(|model| Leaver {
                owner: model.owner,
                cost: model.cost,
                bytes: places.iter().map(|&place| model.bytes_on(place)).collect(),
            })
            .collect();
        sort_by_price(&mut leavers);
        leavers
    }
}

/// The cheapest offer so far.
struct Cheapest<Place> {
    best: Option<(u64, Rank, Place, Cover)>,
}

impl<Place> Cheapest<Place> {
    /// An offer that costs as much as this is of no use. One that costs the same as the best
    /// still is: its GPUs may suit better.
    fn below(&self) -> u64 {
        self.best
            .as_ref()
            .map_or(u64::MAX, |(cost, ..)| cost.saturating_add(1))
    }

    fn consider(&mut self, rank: Rank, place: Place, cover: Cover) {
        let better =
            |(cost, least, ..): &(u64, Rank, Place, Cover)| (cover.cost, rank) < (*cost, *least);
        if self.best.as_ref().is_none_or(better) {
            self.best = Some((cover.cost, rank, place, cover));
        }
    }

    fn taken(self) -> Option<(Place, Cover)> {
        self.best.map(|(_, _, place, cover)| (place, cover))
    }
}

/// The GPU on which room for `need` bytes is cheapest, and who leaves for it.
pub(crate) fn single(
    candidates: &[Candidate],
    need: u64,
    evictable: &Evictable,
    strategy: Strategy,
) -> Option<(usize, Cover)> {
    let mut steps = Steps(STEPS);
    let mut cheapest = Cheapest { best: None };
    let freed_by_all = evictable.freed_by_all(candidates.len());
    for (place, (candidate, all)) in candidates.iter().zip(freed_by_all).enumerate() {
        let Some(shortage) = candidate.shortage(need).filter(|&short| short <= all) else {
            continue;
        };
        let leavers = evictable.on(&[place]);
        if let Some(cover) = cover_of_one(&leavers, shortage, cheapest.below(), &mut steps) {
            cheapest.consider(single_rank(candidate, strategy), place, cover);
        }
    }
    cheapest.taken()
}

fn cover_of_one(leavers: &[Leaver], shortage: u64, below: u64, steps: &mut Steps) -> Option<Cover> {
    let enough = |freed: &[u64]| freed.first().is_some_and(|&bytes| bytes >= shortage);
    cheapest_cover(leavers, 1, u128::from(shortage), below, steps, enough)
}

/// Who leaves for `need` bytes on this GPU, the cheapest set; `None` where that is no help.
pub(crate) fn on_one(
    place: usize,
    candidate: &Candidate,
    need: u64,
    evictable: &Evictable,
) -> Option<Cover> {
    let shortage = candidate.shortage(need)?;
    cover_of_one(
        &evictable.on(&[place]),
        shortage,
        u64::MAX,
        &mut Steps(STEPS),
    )
}

/// Who leaves for the chain on these GPUs, the cheapest set; `None` where that is no help.
pub(crate) fn on_set(
    pool: &Pool<'_>,
    set: &[usize],
    chain: &Chain<'_>,
    evictable: &Evictable,
) -> Option<Cover> {
    let offer = Offer::new(pool, set.to_vec(), chain, evictable);
    offer.cover(pool, chain, u64::MAX, &mut Steps(STEPS))
}

/// The set of GPUs on which room for the chain is cheapest, and who leaves for it.
///
/// The budgets of `pool` are those that there would be if everybody left who may.
pub(crate) fn several(
    pool: &Pool<'_>,
    chain: &Chain<'_>,
    evictable: &Evictable,
    strategy: Strategy,
) -> Option<(Vec<usize>, Cover)> {
    let mut offers: Vec<_> = pool
        .sets_that_fit(chain)
        .into_iter()
        .map(|set| Offer::new(pool, set, chain, evictable))
        .collect();
    offers.sort_by_key(|offer| offer.least);
    let mut steps = Steps(STEPS);
    let mut cheapest = Cheapest { best: None };
    for offer in offers {
        if offer.least >= cheapest.below() {
            break;
        }
        if let Some(cover) = offer.cover(pool, chain, cheapest.below(), &mut steps) {
            cheapest.consider(pool.rank(&offer.set, strategy), offer.set, cover);
        }
    }
    cheapest.taken()
}

/// What is known of a set of GPUs before it is searched.
struct Offer {
    /// Room on these GPUs cannot be had for less.
    least: u64,
    missing: u128,
    leavers: Vec<Leaver>,
    set: Vec<usize>,
}

impl Offer {
    fn cover(
        &self,
        pool: &Pool<'_>,
        chain: &Chain<'_>,
        below: u64,
        steps: &mut Steps,
    ) -> Option<Cover> {
        let enough = |freed: &[u64]| chain.fits(&pool.budgets_after(&self.set, freed));
        cheapest_cover(
            &self.leavers,
            self.set.len(),
            self.missing,
            below,
            steps,
            enough,
        )
    }

    fn new(pool: &Pool<'_>, set: Vec<usize>, chain: &Chain<'_>, evictable: &Evictable) -> Self {
        let now = pool.budgets_after(&set, &vec![0; set.len()]);
        let now: u128 = now.into_iter().map(u128::from).sum();
        let missing = chain.total().saturating_sub(now);
        let leavers = evictable.on(&set);
        Self {
            least: least_cost(&leavers, missing),
            missing,
            leavers,
            set,
        }
    }
}
