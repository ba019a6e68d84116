//! Which things go into which bins, so that what is in them is worth the most.
//!
//! A multiple knapsack: too hard to solve exactly within milliseconds at forty things and eight
//! bins. So a greedy filling is annealed (Kirkpatrick, Gelatt and Vecchi 1983): thing after thing
//! is forced in and what is in its way put elsewhere, or one or two bins are emptied and filled
//! anew, almost exactly; a change for the worse is kept now and then, ever more rarely. The number
//! of changes is limited and the dice are the same every time: one question has one answer.

use std::cmp::Reverse;

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

/// How hard to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effort {
    /// Some hundred microseconds: to compare two questions.
    Glance,
    /// A few milliseconds: the answer.
    Full,
}

impl Effort {
    const MOST_ROUNDS: usize = 5_000;
    /// Rounds times items times bins: what bounds the time of large questions.
    const MOST_WORK: usize = 1_600_000;

    fn rounds(self, items: usize, bins: usize) -> usize {
        let size = items.saturating_mul(bins).max(1);
        let rounds = Self::MOST_WORK
            .checked_div(size)
            .unwrap_or(0)
            .min(Self::MOST_ROUNDS);
        match self {
            Self::Glance => rounds / 32,
            Self::Full => rounds,
        }
    }
}

/// Steps of one exact filling of a bin.
const KNAPSACK_STEPS: u32 = 300;
/// Beyond so many things a bin is not filled exactly.
const KNAPSACK_ITEMS: usize = 64;
/// Every so-manyth change fills bins anew, on average.
const REFILL_EVERY: usize = 4;
/// What a change may cost at the beginning, as a part of what a middling item is worth.
const FIRST_TEMPERATURE: f64 = 0.2;

/// Puts items into bins of these sizes.
pub(crate) fn assign(items: &[Item], bins: &[u64], effort: Effort) -> Assignment {
    let by_density = ranked(items, |item| per(item.value, item.bytes.into()));
    let by_value = ranked(items, |item| item.value.into());
    let between = ranked(items, |item| {
        per(item.value, u128::from(item.bytes).isqrt())
    });
    let empty = Fill {
        items,
        places: vec![None; items.len()],
        rooms: bins.to_vec(),
        value: 0,
    };
    let mut best = empty.clone();
    for order in [&by_density, &by_value, &between] {
        let mut fill = empty.clone();
        fill.insert(order);
        if fill.value > best.value {
            best = fill;
        }
    }
    let mut dice = Dice(0x9E37_79B9_7F4A_7C15);
    let mut now = best.clone();
    let mut next = best.clone();
    let rounds = effort.rounds(items.len(), bins.len());
    let warmth = FIRST_TEMPERATURE * middling(items);
    for round in 0..rounds {
        if best.is_complete() {
            break;
        }
        next.copy(&now);
        let change = if dice.one_in(REFILL_EVERY) {
            next.refill(bins, &mut dice)
        } else {
            next.force(bins, &mut dice)
        };
        let Some(displaced) = change else { continue };
        if dice.one_in(2) {
            next.insert(&displaced);
        }
        next.insert(if dice.one_in(8) {
            &by_value
        } else {
            &by_density
        });
        if dice.accepts(now.value, next.value, warmth * left_of(round, rounds)) {
            std::mem::swap(&mut now, &mut next);
            if now.value > best.value {
                best.copy(&now);
            }
        }
    }
    best.places
}

/// The items' places in the list, the highest mark first.
fn ranked(items: &[Item], mark: impl Fn(&Item) -> u128) -> Vec<usize> {
    let mut marks: Vec<(Reverse<u128>, usize)> = items
        .iter()
        .enumerate()
        .map(|(at, item)| (Reverse(mark(item)), at))
        .collect();
    marks.sort_unstable();
    marks.into_iter().map(|(_, at)| at).collect()
}

/// What a value comes to per unit of a size.
fn per(value: u64, size: u128) -> u128 {
    (u128::from(value) << 40)
        .checked_div(size.max(1))
        .unwrap_or(0)
}

/// The value of the item in the middle: a few of great value do not warm the others.
fn middling(items: &[Item]) -> f64 {
    let mut values: Vec<u64> = items.iter().map(|item| item.value).collect();
    let middle = values.len() / 2;
    if middle >= values.len() {
        return 0.0;
    }
    float(*values.select_nth_unstable(middle).1)
}

/// The square of the part of the rounds that is still to come.
fn left_of(round: usize, rounds: usize) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "thousands at the most")]
    let gone = round as f64 / rounds as f64;
    (1.0 - gone) * (1.0 - gone)
}

#[expect(clippy::cast_precision_loss, reason = "a value to compare, not a size")]
fn float(value: u64) -> f64 {
    value as f64
}

/// Numbers that look random and are the same every time (xorshift64, Marsaglia 2003).
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `sides`, or `None` if there is none.
    fn below(&mut self, sides: usize) -> Option<usize> {
        let sides = u64::try_from(sides).ok()?;
        usize::try_from((self.roll() >> 16).checked_rem(sides)?).ok()
    }

    fn one_in(&mut self, sides: usize) -> bool {
        self.below(sides) == Some(0)
    }

    fn one_of<T: Copy>(&mut self, things: &[T]) -> Option<T> {
        self.below(things.len())
            .and_then(|at| things.get(at))
            .copied()
    }

    /// A number from 0 up to 1, without either.
    fn fraction(&mut self) -> f64 {
        float((self.roll() >> 11).max(1)) / float(1 << 53)
    }

    /// Whether a change is kept: always one for the better, one for the worse with a chance of
    /// `e^(-loss / temperature)`.
    fn accepts(&mut self, before: u64, after: u64, temperature: f64) -> bool {
        let chance = self.fraction();
        after >= before || float(before.saturating_sub(after)) < -temperature * chance.ln()
    }
}

#[derive(Clone)]
struct Fill<'a> {
    items: &'a [Item],
    places: Assignment,
    /// What each bin has left.
    rooms: Vec<u64>,
    value: u64,
}

impl Fill<'_> {
    fn copy(&mut self, other: &Self) {
        self.places.clone_from(&other.places);
        self.rooms.clone_from(&other.rooms);
        self.value = other.value;
    }

    fn is_complete(&self) -> bool {
        self.places.iter().all(Option::is_some)
    }

    fn put(&mut self, at: usize, bin: usize) {
        let (Some(item), Some(place), Some(room)) = (
            self.items.get(at),
            self.places.get_mut(at),
            self.rooms.get_mut(bin),
        ) else {
            return;
        };
        *place = Some(bin);
        *room = room.saturating_sub(item.bytes);
        self.value = self.value.saturating_add(item.value);
    }

    fn take_out(&mut self, at: usize) {
        let (Some(item), Some(place)) = (self.items.get(at), self.places.get_mut(at)) else {
            return;
        };
        if let Some(room) = place.take().and_then(|bin| self.rooms.get_mut(bin)) {
            *room = room.saturating_add(item.bytes);
            self.value = self.value.saturating_sub(item.value);
        }
    }

    fn inside(&self, bin: usize) -> Vec<usize> {
        let places = self.places.iter().enumerate();
        places
            .filter(|(_, place)| **place == Some(bin))
            .map(|(at, _)| at)
            .collect()
    }

    /// Puts in what is outside where it leaves the least room, in this order.
    fn insert(&mut self, order: &[usize]) {
        for &at in order {
            let (Some(item), Some(None)) = (self.items.get(at), self.places.get(at)) else {
                continue;
            };
            let rooms = self.rooms.iter().zip(&item.allowed).enumerate();
            let fitting = rooms.filter(|(_, (room, allowed))| **allowed && **room >= item.bytes);
            if let Some((bin, _)) = fitting.min_by_key(|(_, (room, _))| **room) {
                self.put(at, bin);
            }
        }
    }

    /// Forces an item into a bin, one from outside or, more rarely, from another bin, and says
    /// what had to go for it. `None`: it cannot be there.
    fn force(&mut self, bins: &[u64], dice: &mut Dice) -> Option<Vec<usize>> {
        let from_inside = dice.one_in(4);
        let places = self.places.iter().enumerate();
        let choice: Vec<usize> = places
            .filter(|(_, place)| place.is_some() == from_inside)
            .map(|(at, _)| at)
            .collect();
        let at = dice.one_of(&choice)?;
        let bin = dice.below(bins.len())?;
        let item = self.items.get(at)?;
        let possible = item.allowed.get(bin) == Some(&true) && *bins.get(bin)? >= item.bytes;
        if !possible || self.places.get(at) == Some(&Some(bin)) {
            return None;
        }
        self.take_out(at);
        let displaced = self.make_room(bin, item.bytes, dice);
        self.put(at, bin);
        Some(displaced)
    }

    /// Takes items out of a bin until there is room: the one of least value that is enough, or
    /// any.
    fn make_room(&mut self, bin: usize, bytes: u64, dice: &mut Dice) -> Vec<usize> {
        let room = |fill: &Self| fill.rooms.get(bin).copied().unwrap_or_default();
        let mut displaced = Vec::new();
        let mut inside = self.inside(bin);
        if room(self) < bytes && dice.one_in(2) {
            let missing = bytes.saturating_sub(room(self));
            let items = inside
                .iter()
                .filter_map(|&at| Some((at, self.items.get(at)?)));
            let enough = items.filter(|(_, item)| item.bytes >= missing);
            if let Some((at, _)) = enough.min_by_key(|(_, item)| item.value) {
                self.take_out(at);
                displaced.push(at);
            }
        }
        while room(self) < bytes {
            let Some(chosen) = dice.below(inside.len()) else {
                break;
            };
            let at = inside.swap_remove(chosen);
            self.take_out(at);
            displaced.push(at);
        }
        displaced
    }

    /// Empties one bin or two and fills each with what is then worth the most in it; what the
    /// first is filled with is blurred, or the second could never get it.
    fn refill(&mut self, bins: &[u64], dice: &mut Dice) -> Option<Vec<usize>> {
        let mut chosen = vec![dice.below(bins.len())?];
        if dice.one_in(2) {
            chosen.extend(dice.below(bins.len()).filter(|bin| !chosen.contains(bin)));
        }
        for &bin in &chosen {
            for at in self.inside(bin) {
                self.take_out(at);
            }
        }
        let blur = dice.one_of(&[0.0, 0.1, 0.3])?;
        while let Some(bin) = chosen.pop() {
            let blur = if chosen.is_empty() { 0.0 } else { blur };
            for at in self.most_worth(bin, blur, dice) {
                self.put(at, bin);
            }
        }
        Some(Vec::new())
    }

    /// The items outside that are worth the most among those that fit into a bin together.
    fn most_worth(&self, bin: usize, blur: f64, dice: &mut Dice) -> Vec<usize> {
        let room = self.rooms.get(bin).copied().unwrap_or_default();
        let mut things: Vec<Thing> = Vec::new();
        for (at, (item, place)) in self.items.iter().zip(&self.places).enumerate() {
            if place.is_none() && item.bytes <= room && item.allowed.get(bin) == Some(&true) {
                let worth = float(item.value) * (1.0 + blur * (dice.fraction() - 0.5));
                things.push(Thing {
                    at,
                    worth,
                    bytes: item.bytes,
                });
            }
        }
        things.sort_by(|one, other| {
            let cross = |a: &Thing, b: &Thing| a.worth * float(b.bytes);
            cross(other, one)
                .total_cmp(&cross(one, other))
                .then(one.at.cmp(&other.at))
        });
        things.truncate(KNAPSACK_ITEMS);
        let mut knapsack = Knapsack {
            things: &things,
            best: 0.0,
            chosen: 0,
            steps: KNAPSACK_STEPS,
        };
        knapsack.descend(0, room, 0.0, 0);
        let chosen = knapsack.chosen;
        let picked = things
            .iter()
            .enumerate()
            .filter(|(bit, _)| chosen & (1 << bit) != 0);
        picked.map(|(_, thing)| thing.at).collect()
    }
}

struct Thing {
    at: usize,
    worth: f64,
    bytes: u64,
}

/// One bin, filled by branch and bound (Horowitz and Sahni 1974) until the steps are spent.
struct Knapsack<'a> {
    /// The most worth per byte first.
    things: &'a [Thing],
    best: f64,
    chosen: u64,
    steps: u32,
}

impl Knapsack<'_> {
    fn descend(&mut self, at: usize, room: u64, worth: f64, chosen: u64) {
        if worth > self.best {
            (self.best, self.chosen) = (worth, chosen);
        }
        let (Some(thing), Some(steps)) = (self.things.get(at), self.steps.checked_sub(1)) else {
            return;
        };
        self.steps = steps;
        if worth + self.most(at, room) <= self.best {
            return;
        }
        let next = at.saturating_add(1);
        if let Some(left) = room.checked_sub(thing.bytes) {
            self.descend(next, left, worth + thing.worth, chosen | 1 << at);
        }
        self.descend(next, room, worth, chosen);
    }

    /// What the rest could be worth if the last of it could go in in part.
    fn most(&self, at: usize, mut room: u64) -> f64 {
        let mut most = 0.0;
        for thing in self.things.get(at..).unwrap_or_default() {
            let Some(left) = room.checked_sub(thing.bytes) else {
                return most + thing.worth * float(room) / float(thing.bytes);
            };
            room = left;
            most += thing.worth;
        }
        most
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
            let places = assign(&items, &bins, Effort::Full);
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
            prop_assert!(value * 100 >= most * 95, "{} of {}", value, most);
        }
    }
}
