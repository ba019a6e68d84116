//! Whether things fit into bins, all of them: depth first, the largest thing first.

use super::assign::Item;

/// Steps of one search: a millisecond or two, and a bound on what a hopeless question may cost.
const STEPS: u32 = 20_000;

/// The bin of each item, with none left outside; `None` if there is no such packing, or none
/// was found within the steps.
pub(crate) fn pack_all(items: &[Item], bins: &[u64]) -> Option<Vec<usize>> {
    let mut order: Vec<usize> = (0..items.len()).collect();
    order.sort_by_key(|&at| std::cmp::Reverse(items.get(at).map(|item| item.bytes)));
    let mut search = Search {
        items,
        order: &order,
        rooms: bins.to_vec(),
        places: vec![0; items.len()],
        steps: STEPS,
    };
    search.descend(0).then_some(search.places)
}

struct Search<'a> {
    items: &'a [Item],
    order: &'a [usize],
    rooms: Vec<u64>,
    places: Vec<usize>,
    steps: u32,
}

impl Search<'_> {
    fn descend(&mut self, depth: usize) -> bool {
        let Some(&at) = self.order.get(depth) else {
            return true;
        };
        let (Some(item), Some(steps)) = (self.items.get(at), self.steps.checked_sub(1)) else {
            return false;
        };
        self.steps = steps;
        let rooms = self.rooms.iter().zip(&item.allowed).enumerate();
        let mut fitting: Vec<(u64, usize)> = rooms
            .filter(|(_, (room, allowed))| **allowed && **room >= item.bytes)
            .map(|(bin, (room, _))| (*room, bin))
            .collect();
        fitting.sort_unstable();
        for (room, bin) in fitting {
            self.set(at, bin, room.saturating_sub(item.bytes));
            if self.descend(depth.saturating_add(1)) {
                return true;
            }
            self.set(at, bin, room);
        }
        false
    }

    fn set(&mut self, at: usize, bin: usize, room: u64) {
        if let (Some(place), Some(left)) = (self.places.get_mut(at), self.rooms.get_mut(bin)) {
            (*place, *left) = (bin, room);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

    use proptest::prelude::*;

    use super::*;

    fn can(items: &[Item], rooms: &mut Vec<u64>) -> bool {
        let Some((item, rest)) = items.split_first() else {
            return true;
        };
        (0..rooms.len()).any(|bin| {
            if !item.allowed[bin] || rooms[bin] < item.bytes {
                return false;
            }
            rooms[bin] -= item.bytes;
            let rest_can = can(rest, rooms);
            rooms[bin] += item.bytes;
            rest_can
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn finds_a_packing_whenever_there_is_one(
            sizes in prop::collection::vec((1_u64..20, prop::collection::vec(prop::bool::weighted(0.8), 3)), 0..8),
            bins in prop::collection::vec(0_u64..40, 3),
        ) {
            let items: Vec<Item> = sizes
                .into_iter()
                .map(|(bytes, allowed)| Item { bytes, value: 1, allowed })
                .collect();
            let packed = pack_all(&items, &bins);
            prop_assert_eq!(packed.is_some(), can(&items, &mut bins.clone()));
            let mut rooms = bins;
            for (item, bin) in items.iter().zip(packed.into_iter().flatten()) {
                prop_assert!(item.allowed[bin] && rooms[bin] >= item.bytes);
                rooms[bin] -= item.bytes;
            }
        }
    }
}
