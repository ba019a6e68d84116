//! Which layers a graph is built of: of those that are alike only some (see [`repeats`](super::repeats)).

use super::builder::{Builder, CLAMP, EXPERT_CLAMP};
use super::repeats::{LEADING_LAYERS, representatives};
use super::reserve::{Batch, owns_cache};

/// Spreads numbers that are hashed.
const MIXER: u64 = 0x9e37_79b9_7f4a_7c15;

/// The layers to build, in order; none are left once the graph was given up.
pub(super) struct Layers<'a> {
    numbers: std::vec::IntoIter<usize>,
    batch: &'a Batch<'a>,
}

impl Iterator for Layers<'_> {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        if self.batch.is_given_up() {
            None
        } else {
            self.numbers.next()
        }
    }
}

impl<'a> Builder<'a> {
    /// The layers to build: of those that repeat only some.
    pub(super) fn layers(&mut self) -> Layers<'a> {
        self.layers_by(|_| 0)
    }

    /// The same where layers differ in more than their tensors; `mark` tells those apart.
    pub(super) fn layers_by(&mut self, mark: impl Fn(usize) -> u64) -> Layers<'a> {
        self.layers_after(0, mark)
    }

    /// The same where a layer finishes what more than one before it began: `more` layers are built before those that repeat.
    pub(super) fn layers_after(&mut self, more: usize, mark: impl Fn(usize) -> u64) -> Layers<'a> {
        let kinds = self.kinds(mark);
        self.representatives(&kinds, more)
    }

    /// Equal numbers for layers that are alike.
    fn kinds(&self, mark: impl Fn(usize) -> u64) -> Vec<u64> {
        let hyper = self.hyper;
        let per_layer = |list: &[u32], il: usize| list.get(il).map_or(0, |n| u64::from(*n));
        (0..self.trunk())
            .map(|il| {
                let number = il as u32;
                let flags = [
                    hyper.is_sliding(number),
                    hyper.is_recurrent(number),
                    owns_cache(hyper, number),
                    il < self.batch.host_expert_layers,
                ];
                let flags = flags
                    .iter()
                    .fold(0, |bits, flag| bits * 2 + u64::from(*flag));
                [
                    self.model.kind(il) as u64,
                    u64::from(self.batch.layer_backend(il)),
                    flags,
                    per_layer(&hyper.heads, il),
                    per_layer(&hyper.kv_heads, il),
                    per_layer(&hyper.experts_used, il),
                    u64::from(self.clamps(EXPERT_CLAMP, il)),
                    u64::from(self.clamps(CLAMP, il)),
                    mark(il),
                ]
                .iter()
                .fold(0, |hash: u64, n| {
                    (hash.rotate_left(5) ^ n).wrapping_mul(MIXER)
                })
            })
            .collect()
    }

    /// The same where a layer reads what layer `owner` of it made: layers are alike if their owners are, too.
    pub(super) fn layers_by_owner(&mut self, owner: impl Fn(usize) -> usize) -> Layers<'a> {
        let kinds = self.kinds(|il| u64::from(owner(il) == il));
        let with_owner = |il: usize| {
            let of = kinds.get(owner(il)).copied().unwrap_or_default();
            (of.rotate_left(32) ^ kinds.get(il).copied().unwrap_or_default()).wrapping_mul(MIXER)
        };
        let kinds: Vec<u64> = (0..kinds.len()).map(with_owner).collect();
        self.representatives(&kinds, 0)
    }

    /// The same where layers read what others made many layers before: `lead` layers are built before those that repeat.
    pub(super) fn layers_far_reading(
        &mut self,
        lead: usize,
        mark: impl Fn(usize) -> u64,
    ) -> Layers<'a> {
        let kinds = self.kinds(mark);
        self.layers_of(&kinds, lead, false)
    }

    fn representatives(&mut self, kinds: &[u64], more: usize) -> Layers<'a> {
        let short = self.batch.short_lead;
        self.layers_of(kinds, LEADING_LAYERS + more - usize::from(short), short)
    }

    fn layers_of(&mut self, kinds: &[u64], lead: usize, short: bool) -> Layers<'a> {
        let built = if self.batch.every_layer {
            (0..kinds.len()).collect()
        } else {
            let (built, repeats) = representatives(kinds, lead, short);
            self.g.repeats = repeats;
            built
        };
        Layers {
            numbers: built.into_iter(),
            batch: self.batch,
        }
    }
}
