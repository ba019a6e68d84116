//! Rounds of layers among the scheduled nodes: what each run of one does, and what it hands to the next.

use super::ops::Graph;
use super::program::When;
use super::scheduler::{Backends, Schedule};
use super::tensor::{Storage, TensorId};

/// Nodes that run again and again, each time on the tensors of other layers.
#[derive(Debug)]
pub(super) struct Round {
    pub(super) start: usize,
    pub(super) end: usize,
    /// By how much the numbers of a run's tensors are lower than those of the next one's.
    shift: u32,
    /// The first tensor of the layers that are alike.
    pub(super) lowest: u32,
    pub(super) more: usize,
    /// For each node, in which runs it runs.
    pub(super) when: Vec<When>,
    /// Pairs that numbers do not tell: the round makes the second as the round before made the first.
    pub(super) pairs: Vec<(TensorId, TensorId)>,
}

impl Round {
    /// What the round before made as this one makes `id`.
    pub(super) fn before(&self, id: TensorId) -> Option<TensorId> {
        let before = id.0.checked_sub(self.shift).map(TensorId);
        before.filter(|before| before.0 >= self.lowest)
    }

    fn set(&mut self, place: usize, when: When) {
        if let Some(slot) = self.when.get_mut(place) {
            *slot = when;
        }
    }

    /// What this round makes as the one before made `id`, as numbers tell.
    pub(super) fn after(&self, id: TensorId) -> TensorId {
        TensorId(id.0.saturating_add(self.shift))
    }
}

impl Schedule {
    /// Finds where the rounds are; false when one cannot be repeated.
    pub(super) fn find_rounds(&mut self, graph: &Graph, backends: Backends) -> bool {
        for repeat in &graph.repeats {
            let last = repeat.first + repeat.period;
            let (Some(from), Some(to), Some(lowest)) = (
                graph.marks.get(repeat.first),
                graph.marks.get(last),
                graph.marks.get(repeat.alike),
            ) else {
                return false;
            };
            let (Some(&start), Some(&end)) = (
                self.layer_starts.get(repeat.first),
                self.layer_starts.get(last),
            ) else {
                return false;
            };
            // layers that bring nothing into the graph before the last one is done have no bounds
            if start == end {
                return false;
            }
            // layers before those that are alike may differ in what they leave to be finished
            let first = graph.marks.first().map_or(0, |mark| mark.tensors);
            let finished = if repeat.short {
                repeat.alike
            } else {
                repeat.alike + 1
            };
            let finished = graph.marks.get(finished).map_or(0, |mark| mark.tensors);
            let late = |(id, _): &(TensorId, u8)| (first..finished).contains(&id.index());
            let own = from.tensors..to.tensors;
            let nodes = self.nodes.get(start..end).unwrap_or_default();
            if nodes.iter().any(late) {
                return false;
            }
            // pipelined copies lie side by side from the start and are never given back: each round needs its own
            let is_here = |copy: &TensorId| nodes.iter().any(|(id, _)| id == copy);
            let cannot_repeat = |(source, copy): &(TensorId, TensorId)| {
                let later = source.index() >= to.tensors;
                (backends.copies > 1 && own.contains(&source.index()))
                    || ((backends.copies > 1 || later) && is_here(copy))
            };
            if self.copied.iter().any(cannot_repeat) {
                return false;
            }
            let mut round = Round {
                start,
                end,
                shift: u32::try_from(own.len()).unwrap_or(0),
                lowest: u32::try_from(lowest.tensors).unwrap_or(0),
                more: repeat.more,
                when: vec![When::Always; end.saturating_sub(start)],
                pairs: Vec::new(),
            };
            self.sort_nodes(graph, &mut round);
            if repeat.short && !self.pair_outputs(graph, &mut round, first..to.tensors) {
                return false;
            }
            self.rounds.push(round);
        }
        true
    }

    /// Adds what the layer before the leading one gave, and what each run of the round gives in its stead, to the pairs: the last
    /// leading layer reads the one where the last layer of the round reads the other. False where that cannot be told.
    fn pair_outputs(
        &self,
        graph: &Graph,
        round: &mut Round,
        layers: std::ops::Range<usize>,
    ) -> bool {
        let end = u32::try_from(layers.end).unwrap_or(u32::MAX);
        let nodes = self.nodes.get(round.start..round.end).unwrap_or_default();
        let made_before = |id: TensorId| id.index() >= layers.start && id.0 < round.lowest;
        let root = |id: TensorId| graph.get(id).view_of;
        let mut pairs: Vec<(TensorId, TensorId)> = Vec::new();
        let mut unpaired = Vec::new();
        for (id, _) in nodes {
            if self.is_copy(*id) {
                return false;
            }
            if id.0 < round.lowest {
                continue;
            }
            // the same node of an earlier run, or of a later one: the next layer finishes what this round began
            let later = Some(round.after(*id)).filter(|later| later.0 < end);
            let (before, now) = match (round.before(*id), later) {
                (Some(earlier), _) => (earlier, *id),
                (None, Some(later)) => (*id, later),
                (None, None) => {
                    unpaired.extend(graph.reads(*id).filter(|id| made_before(*id)));
                    continue;
                }
            };
            for (before, now) in graph.reads(before).zip(graph.reads(now)) {
                for (before, now) in [(before, now), (root(before), root(now))] {
                    if self.source_of(before).0 < round.lowest && !pairs.contains(&(before, now)) {
                        pairs.push((before, now));
                    }
                }
            }
        }
        // what all layers read is made once; what one layer reads of those before it must be known to move on, or to stay
        let (stay, moved): (Vec<_>, Vec<_>) =
            pairs.into_iter().partition(|(before, now)| before == now);
        let is_known = |id: &TensorId| {
            graph.get(*id).storage != Storage::Planned
                || stay.contains(&(*id, *id))
                || moved.iter().any(|(before, _)| before == id)
        };
        let moves_on = |(before, now): &(TensorId, TensorId)| {
            // what is never given back does not live as its like does
            let alike = !graph.get(*before).is_output;
            alike
                && now.0 >= round.lowest
                && !self.is_copy(*now)
                && !stay.contains(&(*before, *before))
        };
        let known = unpaired.iter().all(is_known) && moved.iter().all(moves_on);
        round.pairs.extend(moved);
        known
    }

    /// What a copy was made of, or the tensor itself.
    fn source_of(&self, id: TensorId) -> TensorId {
        if !self.is_copy(id) {
            return id;
        }
        let mut copied = self.copied.iter();
        copied
            .find(|(_, copy)| *copy == id)
            .map_or(id, |(source, _)| *source)
    }

    /// Finds out which of a round's nodes run when.
    fn sort_nodes(&self, graph: &Graph, round: &mut Round) {
        let known = self.backend_of.len();
        let nodes = self.nodes.get(round.start..round.end).unwrap_or_default();
        let read_here = |id: TensorId| {
            nodes
                .iter()
                .filter(|(node, _)| node.index() < known)
                .any(|(node, _)| graph.get(*node).sources().any(|source| source == id))
        };
        let mut rest = nodes.iter().zip(0..);
        while let Some(((id, _), place)) = rest.next() {
            if id.index() < known {
                if id.0 < round.lowest {
                    round.set(place, When::First);
                }
                continue;
            }
            // a keeper, and the copy that it keeps the source for
            let [source, ..] = graph.get(*id).sources;
            let Some(((copy, to), copy_place)) = rest.next() else {
                continue;
            };
            if source.0 < round.lowest {
                let when = if read_here(*copy) {
                    When::First
                } else {
                    When::Last
                };
                round.set(place, when);
                round.set(copy_place, when);
            } else if let Some(before) = round.before(source) {
                let slot = self.copy_slot(before, *to, known);
                let twin = self.copy_of.get(slot).copied();
                let twin = twin.filter(|twin| twin.is_some());
                round.pairs.extend(twin.map(|twin| (twin, *copy)));
            }
        }
    }
}
