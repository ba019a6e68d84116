//! Which GPUs are joined by fast links.

use std::collections::HashMap;

use crate::gpu::Gpu;

/// The island of a GPU that nothing is linked to.
pub(crate) const ALONE: u32 = 0;

/// A number for each GPU: equal where `NVLink` joins two, directly, by a switch, or through a third;
/// [`ALONE`] for those that are joined with no other one.
pub(crate) fn islands<'a>(gpus: impl Iterator<Item = Option<&'a Gpu>>) -> Vec<u32> {
    let mut sea = Sea::default();
    let shores: Vec<Option<usize>> = gpus
        .map(|gpu| {
            let gpu = gpu.filter(|gpu| !gpu.nvlink_peers.is_empty())?;
            let own = gpu.pci_bus_id.as_ref()?.to_ascii_uppercase();
            let shore = sea.place(&own);
            for peer in &gpu.nvlink_peers {
                let other = sea.place(&peer.to_ascii_uppercase());
                sea.join(shore, other);
            }
            Some(shore)
        })
        .collect();
    let roots: Vec<Option<usize>> = shores
        .into_iter()
        .map(|shore| shore.map(|place| sea.root(place)))
        .collect();
    let mut residents: HashMap<usize, u32> = HashMap::new();
    for root in roots.iter().flatten() {
        let count = residents.entry(*root).or_default();
        *count = count.saturating_add(1);
    }
    let number = |root: usize| u32::try_from(root).unwrap_or(u32::MAX).saturating_add(1);
    roots
        .into_iter()
        .map(|root| {
            let root = root.filter(|root| residents.get(root).is_some_and(|&count| count > 1));
            root.map_or(ALONE, number)
        })
        .collect()
}

/// PCI addresses, and which of them are joined: a union-find.
#[derive(Default)]
struct Sea {
    places: HashMap<String, usize>,
    parents: Vec<usize>,
}

impl Sea {
    fn place(&mut self, address: &str) -> usize {
        if let Some(&known) = self.places.get(address) {
            return known;
        }
        let place = self.parents.len();
        self.places.insert(address.to_owned(), place);
        self.parents.push(place);
        place
    }

    fn root(&self, place: usize) -> usize {
        let mut place = place;
        while let Some(&parent) = self.parents.get(place)
            && parent != place
        {
            place = parent;
        }
        place
    }

    fn join(&mut self, one: usize, other: usize) {
        let (one, other) = (self.root(one), self.root(other));
        if let Some(parent) = self.parents.get_mut(one.max(other)) {
            *parent = one.min(other);
        }
    }
}
