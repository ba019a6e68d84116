//! What the runs of a round do, all of them told by one.

use super::super::program::{Change, Reserve, RoundChanges, When};
use super::super::rounds::Round;
use super::super::scheduler::Schedule;
use super::super::tensor::TensorId;
use super::{Finder, Lifetime};

/// What the round before made, what this one makes in its stead, and what was known of the former.
type Handed = (TensorId, TensorId, Lifetime);

impl Finder<'_> {
    /// Finds what all runs of a round do, on the tensors of its last one. False when a run reads something that was placed early for it
    /// and for others, or cannot be told from those before it.
    pub(super) fn round(&mut self, schedule: &Schedule, round: &Round) -> bool {
        let nodes = schedule.nodes.get(round.start..round.end);
        let nodes = nodes.unwrap_or_default().iter().zip(&round.when);
        let Some(early) = self.early(schedule, round) else {
            return false;
        };
        let own = nodes.clone().filter(|(_, when)| **when == When::Always);
        let own = own.map(|((id, _), _)| *id);
        for id in own.clone().chain(early.iter().copied()) {
            self.edit(id, |life| life.own = true);
        }
        let handed = self.handed(round, own.clone().filter(|id| !schedule.is_copy(*id)));
        for (before, ..) in &handed {
            self.edit(*before, |life| life.own = true);
        }
        let reserves = self.reserve(schedule, &early, round.more);
        let first = nodes.clone().filter(|(_, when)| **when == When::First);
        self.note_reads_once(first.map(|((id, _), _)| *id));
        let start = self.program.changes.len();
        self.in_round = true;
        self.strayed = false;
        for ((node, backend), when) in nodes.clone() {
            self.when = *when;
            self.step(*node, *backend);
        }
        self.in_round = false;
        self.when = When::Always;
        let differs = |(_, id, old): &Handed| {
            let now = self.life(*id);
            old.allocated && (old.bytes, old.buffer) != (now.bytes, now.buffer)
        };
        if self.strayed
            || early.iter().any(|id| self.life(*id).allocated)
            || handed.iter().any(differs)
        {
            return false;
        }
        let slots = |(_, id, old): &Handed| (old.slot, self.life(*id).slot);
        let changes = RoundChanges {
            start,
            end: self.program.changes.len(),
            more: round.more,
            handed: handed.iter().map(slots).collect(),
            reserves,
        };
        self.program.rounds.push(changes);
        let before = handed.iter().map(|(before, ..)| *before);
        for id in own.chain(early).chain(before) {
            self.edit(id, |life| life.own = false);
        }
        true
    }

    /// Tensors that the round before made and this one reads, where this one makes their like.
    fn handed(&self, round: &Round, own: impl Iterator<Item = TensorId>) -> Vec<Handed> {
        let twins = own.filter_map(|id| Some((round.before(id)?, id)));
        twins
            .chain(round.pairs.iter().copied())
            .map(|(before, id)| (before, id, self.life(before)))
            .filter(|(_, _, life)| !life.own)
            .filter(|(_, _, life)| life.allocated || life.readers > 0 || life.views > 0)
            .collect()
    }

    /// Counts what nodes read that run in the first run only.
    fn note_reads_once(&mut self, nodes: impl Iterator<Item = TensorId>) {
        self.once.clear();
        for source in nodes.flat_map(|node| self.graph.reads(node)) {
            match self.once.iter_mut().find(|(id, _)| *id == source) {
                Some((_, times)) => *times += 1,
                None => self.once.push((source, 1)),
            }
        }
    }

    /// What took its place before the round and is read by it alone; none when others read such a tensor too.
    fn early(&self, schedule: &Schedule, round: &Round) -> Option<Vec<TensorId>> {
        let nodes = schedule.nodes.get(round.start..round.end);
        let nodes = nodes.unwrap_or_default().iter().zip(&round.when);
        let nodes = nodes.filter(|(_, when)| **when != When::First);
        // what the round makes for its next run, the round before made for its first
        let made_before = |id: TensorId| {
            let after = round.after(id);
            let by_number = !schedule.is_copy(id) && !schedule.is_copy(after);
            (by_number && nodes.clone().any(|((id, _), _)| *id == after))
                || round.pairs.iter().any(|(before, _)| *before == id)
        };
        let blanks = self.blanks.iter().map(|id| (*id, *id));
        let mut read: Vec<(TensorId, u32)> = blanks
            .chain(schedule.copied.iter().copied())
            .filter(|(source, id)| source.0 >= round.lowest && self.life(*id).allocated)
            .filter(|(_, id)| !made_before(*id))
            .map(|(_, id)| (id, 0))
            .collect();
        if read.is_empty() {
            return Some(Vec::new());
        }
        for ((node, _), _) in nodes {
            for source in self.graph.reads(*node) {
                if let Some((_, times)) = read.iter_mut().find(|(id, _)| *id == source) {
                    *times += 1;
                }
            }
        }
        read.retain(|(_, times)| *times > 0);
        let alone = |(id, times): &(TensorId, u32)| self.life(*id).readers == *times;
        read.iter()
            .all(alone)
            .then(|| read.iter().map(|(id, _)| *id).collect())
    }

    /// Reserves places for the runs that are not built, beside those of the round: one stretch per buffer and kind of tensor.
    fn reserve(
        &mut self,
        schedule: &Schedule,
        early: &[TensorId],
        more: usize,
    ) -> std::ops::Range<usize> {
        let mut groups: Vec<((u8, bool), Reserve)> = Vec::new();
        for id in early {
            let Lifetime {
                slot,
                bytes,
                buffer,
                ..
            } = self.life(*id);
            let taken =
                |change: &Change| matches!(change, Change::Take { slot: of, .. } if *of == slot);
            let after = self.program.changes.iter().position(taken).unwrap_or(0);
            let kind = (buffer, schedule.is_copy(*id));
            if let Some((_, group)) = groups.iter_mut().find(|(of, _)| *of == kind) {
                group.after = group.after.max(after);
                group.members.push((slot, bytes));
            } else {
                let group = Reserve {
                    after,
                    buffer,
                    members: vec![(slot, bytes)],
                    more,
                };
                groups.push((kind, group));
            }
        }
        let first = self.program.reserves.len();
        let groups = groups.into_iter().map(|(_, group)| group);
        self.program.reserves.extend(groups);
        first..self.program.reserves.len()
    }
}
