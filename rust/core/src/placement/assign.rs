//! Which things go into which bins, so that what is in them is worth the most.
//!
//! A multiple knapsack: too hard to solve exactly within milliseconds at forty things and eight
//! bins, so a few greedy starts are improved by solving small parts exactly, one bin and its
//! leftovers or two bins at a time, until nothing gets better or the steps are spent.

use super::cover::{Leaver, Steps, cheapest_cover, sort_by_price};

/// Something that may be put into a bin.
#[derive(Clone, Debug)]
pub(crate) struct Item {
    pub(crate) bytes: u64,
    pub(crate) value: u64,
    /// Whether it may go into each bin.
    pub(crate) allowed: Vec<bool>,
}

/// The bin of each item.
pub(crate) type Assignment = Vec<Option<usize>>;

/// Steps of all the exact searches of one assignment: a few milliseconds.
const ALL_STEPS: u32 = 16_000;
/// Steps of one of them.
const STEPS: u32 = 400;
/// What a search costs beside its own steps, in steps.
const SEARCH_COSTS: u32 = 20;

/// Puts items into bins of these sizes.
pub(crate) fn assign(items: &[Item], bins: &[u64]) -> Assignment {
    let mut left = Steps(ALL_STEPS);
    let by_density: fn(&Item) -> u128 = |item| per(item.value, item.bytes.into());
    let orders: [fn(&Item) -> u128; 3] = [
        by_density,
        |item| item.value.into(),
        |item| per(item.value, u128::from(item.bytes).isqrt()),
    ];
    let mut best = Fill {
        items,
        bins,
        places: vec![None; items.len()],
    };
    for order in orders {
        let mut fill = Fill {
            places: vec![None; items.len()],
            ..best
        };
        fill.improve(order, &mut left);
        if fill.value() > best.value() {
            best = fill;
        }
    }
    let mut dice = Dice(0x9E37_79B9_7F4A_7C15);
    while left.0 > 0 {
        let mut other = Fill {
            places: best.places.clone(),
            ..best
        };
        if !other.shake(&mut dice) {
            break;
        }
        left.0 = left.0.saturating_sub(SEARCH_COSTS);
        other.improve(by_density, &mut left);
        if other.value() >= best.value() {
            best = other;
        }
    }
    best.places
}

/// Numbers that look random and are the same every time (xorshift64, Marsaglia).
struct Dice(u64);

impl Dice {
    /// A number below `sides`, or `None` if there is none.
    fn below(&mut self, sides: usize) -> Option<usize> {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        let sides = u64::try_from(sides).ok()?;
        usize::try_from(self.0.checked_rem(sides)?).ok()
    }
}

/// What a value comes to per unit of a size.
fn per(value: u64, size: u128) -> u128 {
    (u128::from(value) << 40)
        .checked_div(size.max(1))
        .unwrap_or(0)
}

struct Fill<'a> {
    items: &'a [Item],
    bins: &'a [u64],
    places: Assignment,
}

impl Fill<'_> {
    fn value(&self) -> u64 {
        let placed = self
            .items
            .iter()
            .zip(&self.places)
            .filter(|(_, place)| place.is_some());
        placed.fold(0, |sum, (item, _)| sum.saturating_add(item.value))
    }

    fn room(&self, bin: usize) -> u64 {
        let inside = self
            .items
            .iter()
            .zip(&self.places)
            .filter(|(_, place)| **place == Some(bin));
        let size = self.bins.get(bin).copied().unwrap_or_default();
        inside.fold(size, |room, (item, _)| room.saturating_sub(item.bytes))
    }

    /// Puts what is outside where it leaves the least room, the first by `order` first.
    fn insert(&mut self, order: impl Fn(&Item) -> u128) {
        let mut outside: Vec<(u128, usize)> = self
            .items
            .iter()
            .enumerate()
            .filter(|(at, _)| self.places.get(*at) == Some(&None))
            .map(|(at, item)| (order(item), at))
            .collect();
        outside.sort_by(|one, other| other.0.cmp(&one.0).then(one.1.cmp(&other.1)));
        let mut rooms: Vec<u64> = (0..self.bins.len()).map(|bin| self.room(bin)).collect();
        for (_, at) in outside {
            let Some(item) = self.items.get(at) else {
                continue;
            };
            let fitting = rooms.iter_mut().enumerate().filter(|(bin, room)| {
                **room >= item.bytes && item.allowed.get(*bin) == Some(&true)
            });
            if let Some((bin, room)) = fitting.min_by_key(|(_, room)| **room) {
                *room = room.saturating_sub(item.bytes);
                if let Some(place) = self.places.get_mut(at) {
                    *place = Some(bin);
                }
            }
        }
    }

    /// Puts in what fits and fills bins anew until nothing gets better.
    fn improve(&mut self, order: fn(&Item) -> u128, left: &mut Steps) {
        self.insert(order);
        while left.0 > 0 && (self.improve_bins(left) || self.improve_pairs(left)) {
            self.insert(order);
        }
    }

    /// Forces something that is outside into a bin and whatever is in its way out of it; false if
    /// nothing is outside.
    fn shake(&mut self, dice: &mut Dice) -> bool {
        let outside: Vec<usize> = (0..self.items.len())
            .filter(|at| self.places.get(*at) == Some(&None))
            .collect();
        let chosen = dice.below(outside.len()).and_then(|at| outside.get(at));
        let Some((&at, item)) = chosen.and_then(|at| Some((at, self.items.get(*at)?))) else {
            return false;
        };
        let wide_enough = |bin: &usize| {
            item.allowed.get(*bin) == Some(&true)
                && self.bins.get(*bin).is_some_and(|size| *size >= item.bytes)
        };
        let bins: Vec<usize> = (0..self.bins.len()).filter(wide_enough).collect();
        let Some(&bin) = dice.below(bins.len()).and_then(|bin| bins.get(bin)) else {
            return !bins.is_empty() || outside.len() > 1;
        };
        while self.room(bin) < item.bytes {
            let inside = |at: &usize| self.places.get(*at) == Some(&Some(bin));
            let inside: Vec<usize> = (0..self.items.len()).filter(inside).collect();
            let Some(&out) = dice.below(inside.len()).and_then(|at| inside.get(at)) else {
                return true;
            };
            self.put(out, None);
        }
        self.put(at, Some(bin));
        true
    }

    fn put(&mut self, at: usize, bin: Option<usize>) {
        if let Some(place) = self.places.get_mut(at) {
            *place = bin;
        }
    }

    /// Fills each bin anew from what is in it and what is outside.
    fn improve_bins(&mut self, left: &mut Steps) -> bool {
        let mut better = false;
        for bin in 0..self.bins.len() {
            better |= self.refill(&[bin], left);
        }
        better
    }

    /// Fills two bins anew, one after the other, from what is in them and what is outside.
    fn improve_pairs(&mut self, left: &mut Steps) -> bool {
        for one in 0..self.bins.len() {
            for other in (0..self.bins.len()).filter(|other| *other != one) {
                if self.refill(&[one, other], left) {
                    return true;
                }
            }
        }
        false
    }

    fn refill(&mut self, bins: &[usize], left: &mut Steps) -> bool {
        let before = self.value();
        let old = self.places.clone();
        for place in &mut self.places {
            if place.is_some_and(|bin| bins.contains(&bin)) {
                *place = None;
            }
        }
        for &bin in bins {
            let mut steps = Steps(STEPS.min(left.0));
            let given = steps.0;
            for at in self.most_worth(bin, &mut steps) {
                self.put(at, Some(bin));
            }
            left.0 = left
                .0
                .saturating_sub(given.saturating_sub(steps.0).saturating_add(SEARCH_COSTS));
        }
        if self.value() > before {
            return true;
        }
        self.places = old;
        false
    }

    /// The items outside that are worth the most among those that fill a bin: all but the set
    /// that is worth the least of those whose absence lets the others fit.
    fn most_worth(&self, bin: usize, steps: &mut Steps) -> Vec<usize> {
        let size = self.bins.get(bin).copied().unwrap_or_default();
        let outside: Vec<(usize, &Item)> = self
            .items
            .iter()
            .enumerate()
            .filter(|(at, item)| {
                self.places.get(*at) == Some(&None)
                    && item.allowed.get(bin) == Some(&true)
                    && item.bytes <= size
            })
            .collect();
        let total: u128 = outside.iter().map(|(_, item)| u128::from(item.bytes)).sum();
        let excess = total.saturating_sub(u128::from(size));
        let Ok(missing) = u64::try_from(excess) else {
            return Vec::new();
        };
        let mut leavers: Vec<Leaver> = outside
            .iter()
            .filter(|(_, item)| item.bytes > 0)
            .map(|(at, item)| Leaver {
                owner: *at,
                cost: item.value,
                bytes: vec![item.bytes],
            })
            .collect();
        sort_by_price(&mut leavers);
        let enough = |freed: &[u64]| freed.first().is_some_and(|&bytes| bytes >= missing);
        let out = if missing == 0 {
            Vec::new()
        } else {
            match cheapest_cover(&leavers, 1, excess, u64::MAX, steps, enough) {
                Some(cover) => cover.owners,
                None => return Vec::new(),
            }
        };
        outside
            .iter()
            .map(|(at, _)| *at)
            .filter(|at| !out.contains(at))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::unwrap_used
    )]

    use proptest::prelude::*;

    use super::*;

    /// The most that can be worth, by trying everything.
    fn most(items: &[Item], rooms: &mut Vec<u64>) -> u64 {
        let Some((item, rest)) = items.split_first() else {
            return 0;
        };
        let mut best = most(rest, rooms);
        for bin in 0..rooms.len() {
            if item.allowed[bin] && rooms[bin] >= item.bytes {
                rooms[bin] -= item.bytes;
                best = best.max(item.value + most(rest, rooms));
                rooms[bin] += item.bytes;
            }
        }
        best
    }

    fn items(bins: usize) -> impl Strategy<Value = Vec<Item>> {
        let item = (
            1_u64..30,
            1_u64..50,
            prop::collection::vec(prop::bool::weighted(0.8), bins),
        );
        let item = item.prop_map(|(bytes, value, allowed)| Item {
            bytes,
            value,
            allowed,
        });
        prop::collection::vec(item, 0..8)
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn bins_hold_what_is_in_them_and_little_worth_is_left_outside(
            (items, bins) in (1_usize..4).prop_flat_map(|bins| {
                (items(bins), prop::collection::vec(0_u64..60, bins))
            }),
        ) {
            let places = assign(&items, &bins);
            prop_assert_eq!(places.len(), items.len());
            let mut rooms = bins.clone();
            let mut value = 0;
            for (item, place) in items.iter().zip(&places) {
                if let Some(bin) = place {
                    prop_assert!(item.allowed[*bin] && rooms[*bin] >= item.bytes);
                    rooms[*bin] -= item.bytes;
                    value += item.value;
                }
            }
            let most = most(&items, &mut bins.clone());
            prop_assert!(value * 100 >= most * 80, "{} of {}", value, most);
        }
    }
}
