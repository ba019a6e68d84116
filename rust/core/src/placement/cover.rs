//! The cheapest set of things whose leaving is enough: a small exact search.
//!
//! Branch and bound, depth first, the cheapest per byte first. The bound is what the missing
//! bytes would cost if the last thing could leave in part. The number of steps is limited, so
//! that no input can hold a caller up; at the limit the best set found so far is taken, and
//! even that contains nothing that could stay.

/// Something that can leave: what that costs, and what it gives back where it counts.
#[derive(Clone, Debug)]
pub(crate) struct Leaver {
    /// Whose it is: a place in the caller's list.
    pub(crate) owner: usize,
    pub(crate) cost: u64,
    /// Bytes for each device that matters, in the order of the devices.
    pub(crate) bytes: Vec<u64>,
}

impl Leaver {
    fn total(&self) -> u128 {
        self.bytes.iter().map(|&bytes| u128::from(bytes)).sum()
    }
}

/// A set of leavers, by their owners, and its price.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cover {
    pub(crate) cost: u64,
    /// The cheapest to lose comes first.
    pub(crate) owners: Vec<usize>,
}

/// How many steps are left to all the searches of one decision.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Steps(pub(crate) u32);

/// Finds the cheapest set that costs less than `below`, or `None` if there is none.
///
/// `leavers` are sorted by price, and each gives something back.
/// `missing` is a number of bytes, over all devices together, that every set which is enough
/// gives back; it only steers. `enough` decides, given the bytes that come back on each
/// device, and must never turn false when more comes back.
pub(crate) fn cheapest_cover(
    leavers: &[Leaver],
    devices: usize,
    missing: u128,
    below: u64,
    steps: &mut Steps,
    enough: impl Fn(&[u64]) -> bool,
) -> Option<Cover> {
    let mut after = vec![vec![0; devices]];
    for leaver in leavers.iter().rev() {
        let sum = after
            .last()
            .map(|rest| added(rest, &leaver.bytes))
            .unwrap_or_default();
        after.push(sum);
    }
    after.reverse();
    if !enough(after.first()?) {
        return None;
    }
    let everything = vec![true; leavers.len()];
    let mut search = Search {
        leavers,
        after: &after,
        enough,
        steps,
        best: None,
        below,
    };
    let first = search.without_the_needless(everything);
    search.keep(first);
    search.descend(
        0,
        &mut vec![false; leavers.len()],
        &vec![0; devices],
        0,
        missing,
    );
    let chosen = search.best.take()?;
    let chosen = search.without_the_needless(chosen);
    let mut chosen: Vec<&Leaver> = picked(leavers, &chosen).collect();
    chosen.sort_by_key(|leaver| (leaver.cost, leaver.owner));
    Some(Cover {
        cost: chosen
            .iter()
            .fold(0, |sum: u64, leaver| sum.saturating_add(leaver.cost)),
        owners: chosen.iter().map(|leaver| leaver.owner).collect(),
    })
}

/// Sorts by what a byte costs, the cheapest first.
pub(crate) fn sort_by_price(leavers: &mut [Leaver]) {
    leavers.sort_by(|one, other| {
        let cross = |a: &Leaver, b: &Leaver| u128::from(a.cost).saturating_mul(b.total());
        cross(one, other)
            .cmp(&cross(other, one))
            .then(one.owner.cmp(&other.owner))
    });
}

/// What giving back `missing` bytes costs at the least, by leavers sorted by price.
pub(crate) fn least_cost(leavers: &[Leaver], mut missing: u128) -> u64 {
    let mut cost = 0_u64;
    for leaver in leavers {
        if missing == 0 {
            break;
        }
        let bytes = leaver.total();
        if bytes > missing {
            let part = u128::from(leaver.cost)
                .saturating_mul(missing)
                .div_ceil(bytes);
            return cost.saturating_add(u64::try_from(part).unwrap_or(u64::MAX));
        }
        missing = missing.saturating_sub(bytes);
        cost = cost.saturating_add(leaver.cost);
    }
    cost
}

fn added(one: &[u64], other: &[u64]) -> Vec<u64> {
    one.iter()
        .zip(other)
        .map(|(a, b)| a.saturating_add(*b))
        .collect()
}

fn picked<'a>(leavers: &'a [Leaver], chosen: &'a [bool]) -> impl Iterator<Item = &'a Leaver> {
    leavers
        .iter()
        .zip(chosen)
        .filter(|(_, leaves)| **leaves)
        .map(|(leaver, _)| leaver)
}

struct Search<'a, F> {
    /// Cheapest per byte first.
    leavers: &'a [Leaver],
    /// What comes back, per device, when every leaver from a place on goes.
    after: &'a [Vec<u64>],
    enough: F,
    steps: &'a mut Steps,
    best: Option<Vec<bool>>,
    /// A set must cost less than this to be worth keeping.
    below: u64,
}

impl<F: Fn(&[u64]) -> bool> Search<'_, F> {
    fn descend(
        &mut self,
        at: usize,
        chosen: &mut Vec<bool>,
        freed: &[u64],
        cost: u64,
        missing: u128,
    ) {
        if (self.enough)(freed) {
            self.keep(chosen.clone());
            return;
        }
        let Some(steps) = self.steps.0.checked_sub(1) else {
            return;
        };
        self.steps.0 = steps;
        let (Some(leaver), Some(rest)) = (self.leavers.get(at), self.after.get(at)) else {
            return;
        };
        let rest_costs = least_cost(self.leavers.get(at..).unwrap_or_default(), missing);
        if cost.saturating_add(rest_costs) >= self.below || !(self.enough)(&added(freed, rest)) {
            return;
        }
        let next = at.saturating_add(1);
        set(chosen, at, true);
        self.descend(
            next,
            chosen,
            &added(freed, &leaver.bytes),
            cost.saturating_add(leaver.cost),
            missing.saturating_sub(leaver.total()),
        );
        set(chosen, at, false);
        self.descend(next, chosen, freed, cost, missing);
    }

    fn keep(&mut self, chosen: Vec<bool>) {
        let cost = picked(self.leavers, &chosen)
            .fold(0_u64, |sum, leaver| sum.saturating_add(leaver.cost));
        if cost < self.below {
            self.below = cost;
            self.best = Some(chosen);
        }
    }

    /// Takes out of a set that is enough whatever can stay, the costliest first.
    fn without_the_needless(&self, mut chosen: Vec<bool>) -> Vec<bool> {
        let mut order: Vec<usize> = (0..self.leavers.len()).collect();
        order.sort_by_key(|&at| std::cmp::Reverse(self.leavers.get(at).map(|leaver| leaver.cost)));
        for at in order {
            if chosen.get(at) != Some(&true) {
                continue;
            }
            set(&mut chosen, at, false);
            let devices = self.after.first().map_or(0, Vec::len);
            let freed = picked(self.leavers, &chosen)
                .fold(vec![0; devices], |sum, leaver| added(&sum, &leaver.bytes));
            if !(self.enough)(&freed) {
                set(&mut chosen, at, true);
            }
        }
        chosen
    }
}

fn set(chosen: &mut [bool], at: usize, leaves: bool) {
    if let Some(place) = chosen.get_mut(at) {
        *place = leaves;
    }
}
