//! Which GPUs: the one that suits best, or the smallest set that holds the model.

use std::cmp::Reverse;

use super::candidate::Candidate;
use super::islands::ALONE;
use super::policy::Strategy;
use super::split::{Chain, MAX_DEVICES};

/// Up to this many sets are all looked at; beyond, sets of GPUs that are alike.
const FEW_SETS: u64 = 256;
/// Among how many GPUs alike sets are sought where there are too many to look at all.
const ALIKE: usize = 64;
/// As many GPUs as give few sets, whatever the size of a set.
const SHORT_LIST: usize = 10;

/// How good a choice of GPUs is; the least is taken.
///
/// Hot and degraded GPUs, kinds of GPU mixed, groups that no fast link joins, empty GPUs broken into,
/// and then the bytes left over: least or, to distribute, most. Between equals the earlier indices win.
pub(crate) type Rank = (usize, usize, usize, usize, i128);

/// The best single GPU for `need` bytes, as a place in `candidates`.
pub(crate) fn best_single(
    candidates: &[Candidate],
    need: u64,
    strategy: Strategy,
) -> Option<usize> {
    candidates
        .iter()
        .enumerate()
        .filter(|(_, candidate)| candidate.budget >= need)
        .min_by_key(|(_, candidate)| single_rank(candidate, strategy))
        .map(|(place, _)| place)
}

/// How good a GPU is on its own.
pub(crate) fn single_rank(candidate: &Candidate, strategy: Strategy) -> Rank {
    rank(std::iter::once(candidate), (1, 1), strategy)
}

fn rank<'a>(
    set: impl Iterator<Item = &'a Candidate>,
    (kinds, islands): (usize, usize),
    strategy: Strategy,
) -> Rank {
    let (mut avoided, mut emptied, mut bytes) = (0_usize, 0_usize, 0_i128);
    for candidate in set {
        avoided = avoided.saturating_add(usize::from(candidate.avoid));
        emptied = emptied.saturating_add(usize::from(candidate.empty));
        bytes = bytes.saturating_add(i128::from(candidate.budget));
    }
    match strategy {
        Strategy::SingleGpuPreferred => (avoided, kinds, islands, 0, bytes),
        Strategy::Distribute => (avoided, kinds, islands, 0, bytes.saturating_neg()),
        Strategy::Pack => (avoided, kinds, islands, emptied, bytes),
    }
}

/// The GPUs that sets can be made of, in device order. Sets are places in it, ascending.
#[derive(Debug)]
pub(crate) struct Pool<'a> {
    members: &'a [Candidate],
    /// What each has to give: more than it has now, where models may leave.
    budgets: Vec<u64>,
    /// The kind of each, as a small number.
    kinds: Vec<u32>,
    /// The group of each that fast links join, or [`ALONE`].
    islands: Vec<u32>,
    /// What the largest 0, 1, 2 … of them have together.
    largest: Vec<u128>,
}

impl<'a> Pool<'a> {
    /// `budgets`, `kinds` and `islands` are in the order of `members`.
    pub(crate) fn new(
        members: &'a [Candidate],
        budgets: Vec<u64>,
        kinds: Vec<u32>,
        islands: Vec<u32>,
    ) -> Self {
        let mut sorted = budgets.clone();
        if sorted.len() > MAX_DEVICES {
            sorted.select_nth_unstable_by(MAX_DEVICES, |one, other| other.cmp(one));
            sorted.truncate(MAX_DEVICES);
        }
        sorted.sort_unstable_by(|one, other| other.cmp(one));
        let mut sum = 0_u128;
        let mut largest = vec![sum];
        for budget in sorted {
            sum = sum.saturating_add(u128::from(budget));
            largest.push(sum);
        }
        Self {
            members,
            budgets,
            kinds,
            islands,
            largest,
        }
    }

    /// What the members of a set have, in order.
    pub(crate) fn budgets_of(&self, set: &[usize]) -> Vec<u64> {
        set.iter()
            .filter_map(|&member| self.budgets.get(member).copied())
            .collect()
    }

    /// What the members of a set have once so much has come back on each.
    pub(crate) fn budgets_after(&self, set: &[usize], freed: &[u64]) -> Vec<u64> {
        let members = set.iter().filter_map(|&member| self.members.get(member));
        members
            .zip(freed)
            .map(|(candidate, &bytes)| candidate.budget_after(bytes))
            .collect()
    }

    /// The so many with the most to give.
    pub(crate) fn roomiest(&self, devices: usize) -> Vec<usize> {
        let mut set: Vec<usize> = (0..self.members.len()).collect();
        set.sort_by_key(|&member| (Reverse(self.budgets.get(member)), member));
        set.truncate(devices);
        set.sort_unstable();
        set
    }

    /// How good a set is.
    pub(crate) fn rank(&self, set: &[usize], strategy: Strategy) -> Rank {
        let kinds = distinct(set, &self.kinds, None);
        let islands = distinct(set, &self.islands, Some(ALONE));
        let members = set.iter().filter_map(|&member| self.members.get(member));
        rank(members, (kinds, islands), strategy)
    }

    /// Whether the largest so many have `bytes` together; cheap, and mostly the answer.
    pub(crate) fn could_hold(&self, devices: usize, bytes: u128) -> bool {
        self.largest.get(devices).is_some_and(|&most| most >= bytes)
    }

    /// The best set of as many GPUs as the chain has devices, or `None` if no set holds it.
    pub(crate) fn best_set(&self, chain: &Chain<'_>, strategy: Strategy) -> Option<Vec<usize>> {
        if !self.could_hold(chain.devices(), chain.total()) {
            return None;
        }
        if combinations(self.members.len(), chain.devices()) <= FEW_SETS {
            let all: Vec<usize> = (0..self.members.len()).collect();
            let sets = Combinations::of(&all, chain.devices());
            return self.best_of(sets, chain, strategy);
        }
        let any = chain.any_set(&self.budgets)?;
        let alike = self.alike(chain, strategy);
        let windows = alike.windows(chain.devices()).map(sorted);
        Some(self.best_of(windows, chain, strategy).unwrap_or(any))
    }

    fn best_of(
        &self,
        sets: impl Iterator<Item = Vec<usize>>,
        chain: &Chain<'_>,
        strategy: Strategy,
    ) -> Option<Vec<usize>> {
        let mut best: Option<(Rank, Vec<usize>)> = None;
        for set in sets {
            let rank = self.rank(&set, strategy);
            if best.as_ref().is_none_or(|(least, _)| rank < *least)
                && chain.fits(&self.budgets_of(&set))
            {
                best = Some((rank, set));
            }
        }
        best.map(|(_, set)| set)
    }

    /// GPUs that have their equal part of the chain to give, those of a kind and of like room
    /// next to each other.
    fn alike(&self, chain: &Chain<'_>, strategy: Strategy) -> Vec<usize> {
        let devices = u128::try_from(chain.devices()).unwrap_or(1).max(1);
        let part = chain.total().div_ceil(devices);
        let budget = |member: usize| self.budgets.get(member).copied().unwrap_or_default();
        let room = |member: usize| match strategy {
            Strategy::Distribute => u64::MAX.abs_diff(budget(member)),
            Strategy::SingleGpuPreferred | Strategy::Pack => budget(member),
        };
        let avoid = |member: usize| self.members.get(member).is_some_and(|one| one.avoid);
        let mut members: Vec<usize> = (0..self.members.len())
            .filter(|&member| u128::from(budget(member)) >= part)
            .collect();
        if members.len() > ALIKE {
            members
                .select_nth_unstable_by_key(ALIKE, |&member| (avoid(member), room(member), member));
            members.truncate(ALIKE);
        }
        members.sort_unstable_by_key(|&member| {
            let (kind, island) = (self.kinds.get(member), self.islands.get(member));
            (avoid(member), kind, island, room(member), member)
        });
        members
    }

    /// The sets that hold the chain: all of them where they are few, else some of the best.
    pub(crate) fn sets_that_fit(&self, chain: &Chain<'_>) -> Vec<Vec<usize>> {
        if !self.could_hold(chain.devices(), chain.total()) {
            return Vec::new();
        }
        let few = combinations(self.members.len(), chain.devices()) <= FEW_SETS;
        let list = if few {
            (0..self.members.len()).collect()
        } else {
            self.short_list()
        };
        let mut sets: Vec<_> = Combinations::of(&list, chain.devices())
            .filter(|set| chain.fits(&self.budgets_of(set)))
            .collect();
        if sets.is_empty() && !few {
            sets.extend(chain.any_set(&self.budgets));
        }
        sets
    }

    /// The GPUs with the most room now, which are the cheapest to clear, and those with the most
    /// room once everybody has left.
    fn short_list(&self) -> Vec<usize> {
        let mut list: Vec<usize> = (0..self.members.len()).collect();
        let half = SHORT_LIST / 2;
        let free = |member: &usize| self.members.get(*member).map(|one| one.free);
        let budget = |member: &usize| self.budgets.get(*member);
        if list.len() > half {
            list.select_nth_unstable_by_key(half, |member| (Reverse(free(member)), *member));
            let rest = list.get_mut(half..).unwrap_or_default();
            if rest.len() > half {
                rest.select_nth_unstable_by_key(half, |member| (Reverse(budget(member)), *member));
            }
        }
        list.truncate(SHORT_LIST);
        list.sort_unstable();
        list
    }
}

/// How many different groups the members of a set are of; each that is of the group `alone` counts.
fn distinct(set: &[usize], groups: &[u32], alone: Option<u32>) -> usize {
    set.iter()
        .enumerate()
        .filter(|&(seen, member)| {
            let group = groups.get(*member);
            group == alone.as_ref()
                || !set
                    .iter()
                    .take(seen)
                    .any(|other| groups.get(*other) == group)
        })
        .count()
}

fn sorted(set: &[usize]) -> Vec<usize> {
    let mut set = set.to_vec();
    set.sort_unstable();
    set
}

/// How many sets of `size` there are among `members`; beyond [`FEW_SETS`], some larger number.
fn combinations(members: usize, size: usize) -> u64 {
    let mut count = 1_u64;
    for taken in 0..size.min(members.saturating_sub(size)) {
        let (left, place) = (members.saturating_sub(taken), taken.saturating_add(1));
        let (Ok(left), Ok(place)) = (u64::try_from(left), u64::try_from(place)) else {
            return u64::MAX;
        };
        count = count
            .saturating_mul(left)
            .checked_div(place)
            .unwrap_or(u64::MAX);
        if count > FEW_SETS {
            return count;
        }
    }
    count
}

/// All selections of so many out of a list, in the order of the list.
struct Combinations<'a> {
    list: &'a [usize],
    next: Option<Vec<usize>>,
}

impl<'a> Combinations<'a> {
    fn of(list: &'a [usize], size: usize) -> Self {
        let next = (size <= list.len()).then(|| (0..size).collect());
        Self { list, next }
    }
}

impl Iterator for Combinations<'_> {
    type Item = Vec<usize>;

    fn next(&mut self) -> Option<Vec<usize>> {
        let current = self.next.take()?;
        let mut next = current.clone();
        let size = next.len();
        let movable = (0..size).rev().find(|&place| {
            let end = self.list.len().saturating_sub(size.saturating_sub(place));
            next.get(place).is_some_and(|&at| at < end)
        });
        if let Some(place) = movable {
            let from = next.get(place).copied().unwrap_or_default();
            for (at, step) in next.iter_mut().skip(place).zip(1_usize..) {
                *at = from.saturating_add(step);
            }
            self.next = Some(next);
        }
        Some(
            current
                .iter()
                .filter_map(|&at| self.list.get(at).copied())
                .collect(),
        )
    }
}
