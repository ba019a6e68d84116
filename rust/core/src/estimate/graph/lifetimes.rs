//! When each tensor takes its place in a buffer and when it gives it back (`ggml_gallocr_alloc_graph_impl`): that depends on the order
//! of nodes alone, not on where anything lies, so it is found once, however often a round of layers runs.

use super::buffer::BufferRules;
use super::ops::Graph;
use super::rounds::{Round, RoundNodes};
use super::scheduler::Schedule;
use super::tensor::{Op, Storage, TensorId};

/// What happens to a buffer. A slot stands for one place; an operation that writes over its source keeps the source's slot.
#[derive(Clone, Copy, Debug)]
pub(super) enum Change {
    Take {
        slot: u32,
        buffer: u8,
        bytes: i64,
        /// In a round that runs again: only in its first run.
        once: bool,
    },
    GiveBack {
        slot: u32,
        buffer: u8,
        /// Bytes of the slot that are kept before those that are given back.
        kept: i64,
        bytes: i64,
        once: bool,
    },
}

/// Places that the layers of a round take before the first layer runs: those of all runs lie side by side, a run gives its own back.
#[derive(Clone, Debug)]
pub(super) struct Reserve {
    /// The change after which the runs that are not built get theirs.
    pub(super) after: usize,
    pub(super) buffer: u8,
    /// Slots and bytes, in order.
    pub(super) members: Vec<(u32, i64)>,
    /// How often the round runs beside the built times.
    pub(super) more: usize,
}

/// Changes that happen `more` times before those that follow them.
#[derive(Clone, Debug)]
pub(super) struct RoundChanges {
    pub(super) start: usize,
    pub(super) end: usize,
    pub(super) more: usize,
    /// Slots that a run reads, and those that it leaves in their stead.
    pub(super) handed: Vec<(u32, u32)>,
    pub(super) reserves: std::ops::Range<usize>,
}

/// All changes, in order.
#[derive(Debug, Default)]
pub(super) struct Program {
    pub(super) changes: Vec<Change>,
    pub(super) rounds: Vec<RoundChanges>,
    pub(super) reserves: Vec<Reserve>,
}

/// What is known of one tensor.
#[derive(Clone, Copy, Debug)]
struct Lifetime {
    /// What is yet to read it; an output is read once more than the graph does, so that it is never given back.
    readers: u32,
    views: u32,
    view_of: TensorId,
    slot: u32,
    /// Bytes set aside, padded.
    bytes: i64,
    buffer: u8,
    /// Wants a place: it is no weight, no state and no view.
    planned: bool,
    allocated: bool,
    /// Belongs to the round that runs again.
    own: bool,
}

impl Default for Lifetime {
    fn default() -> Self {
        Self {
            readers: 0,
            views: 0,
            view_of: TensorId::NONE,
            slot: 0,
            bytes: 0,
            buffer: 0,
            planned: false,
            allocated: false,
            own: false,
        }
    }
}

/// Finds the changes of graphs, one after the other; keeps its memory between them.
#[derive(Debug, Default)]
pub(super) struct Lifetimes {
    lives: Vec<Lifetime>,
    pub(super) program: Program,
}

impl Lifetimes {
    /// The changes of one graph; none when a round cannot be told apart from the layers around it.
    pub(super) fn find(
        &mut self,
        graph: &Graph,
        schedule: &Schedule,
        rules: &[BufferRules],
    ) -> Option<&Program> {
        self.lives.clear();
        self.lives.resize(graph.len(), Lifetime::default());
        self.program.changes.clear();
        self.program.rounds.clear();
        self.program.reserves.clear();
        let mut finder = Finder {
            graph,
            rules,
            lives: &mut self.lives,
            program: &mut self.program,
            blanks: Vec::new(),
            repeating: false,
        };
        finder.inputs(schedule);
        let mut done = 0;
        for round in &schedule.rounds {
            finder.steps(schedule.nodes.get(done..round.start).unwrap_or_default());
            if !finder.round(schedule, round) {
                return None;
            }
            done = round.end;
        }
        finder.steps(schedule.nodes.get(done..).unwrap_or_default());
        Some(&self.program)
    }
}

struct Finder<'a> {
    graph: &'a Graph,
    rules: &'a [BufferRules],
    lives: &'a mut [Lifetime],
    program: &'a mut Program,
    /// Leaves of layers that want a place.
    blanks: Vec<TensorId>,
    /// A round runs again: what is not its own was read in its first run.
    repeating: bool,
}

impl Finder<'_> {
    fn steps(&mut self, nodes: &[(TensorId, u8)]) {
        for (node, backend) in nodes.iter().copied() {
            self.step(node, backend);
        }
    }

    /// Notes what a round's runs but the last do, then does what the last does. False when something that it reads was placed early for
    /// it and for others, or outlives it.
    fn round(&mut self, schedule: &Schedule, round: &Round) -> bool {
        let RoundNodes {
            first,
            own,
            last,
            twins,
        } = &round.nodes;
        let Some(early) = self.early(schedule, last, twins, round.lowest) else {
            return false;
        };
        let own = own.iter().map(|(id, _)| *id).chain(early.iter().copied());
        let fresh: Vec<(TensorId, Lifetime)> = own
            .map(|id| {
                self.edit(id, |life| life.own = true);
                (id, self.life(id))
            })
            .collect();
        // tensors that the round before made and this one reads, where this one makes their like
        let mut handed: Vec<(TensorId, TensorId, Lifetime)> = twins
            .iter()
            .map(|(before, id)| (*before, *id, self.life(*before)))
            .filter(|(_, _, life)| !life.own)
            .filter(|(_, _, life)| life.allocated || life.readers > 0 || life.views > 0)
            .collect();
        // what runs once reads them once
        for (node, _) in first.iter().filter(|node| !self.life(node.0).own) {
            let tensor = self.graph.get(*node);
            for (before, _, old) in &mut handed {
                let reads = tensor.sources().filter(|source| source == before);
                old.readers = old.readers.saturating_sub(reads.count() as u32);
                old.views = old
                    .views
                    .saturating_sub(u32::from(tensor.view_of == *before));
            }
        }
        for (before, ..) in &handed {
            self.edit(*before, |life| life.own = true);
        }
        let first_reserve = self.program.reserves.len();
        self.reserve(schedule, &early, round.more);
        // only the last run reads what other layers read too: until then it must stay
        self.repeating = true;
        let start = self.program.changes.len();
        self.steps(first);
        self.repeating = false;
        if early.iter().any(|id| self.life(*id).allocated) {
            return false;
        }
        self.program.rounds.push(RoundChanges {
            start,
            end: self.program.changes.len(),
            more: round.more,
            handed: handed
                .iter()
                .map(|(_, id, old)| (old.slot, self.life(*id).slot))
                .collect(),
            reserves: first_reserve..self.program.reserves.len(),
        });
        for (before, id, old) in &handed {
            let now = self.life(*id);
            self.edit(*before, |life| {
                *life = Lifetime {
                    buffer: now.buffer,
                    bytes: now.bytes,
                    ..*old
                };
            });
        }
        for (id, life) in &fresh {
            self.edit(*id, |slot| {
                *slot = Lifetime {
                    own: false,
                    ..*life
                }
            });
        }
        self.steps(last);
        true
    }

    /// What took its place before the round and is read by it alone; none when others read such a tensor too.
    fn early(
        &self,
        schedule: &Schedule,
        nodes: &[(TensorId, u8)],
        twins: &[(TensorId, TensorId)],
        lowest: u32,
    ) -> Option<Vec<TensorId>> {
        let blanks = self.blanks.iter().map(|id| (*id, *id));
        let mut read: Vec<(TensorId, u32)> = blanks
            .chain(schedule.copied.iter().copied())
            .filter(|(source, id)| source.0 >= lowest && self.life(*id).allocated)
            // what the round makes for its next run, the round before made for its first
            .filter(|(_, id)| !twins.iter().any(|(before, _)| before == id))
            .map(|(_, id)| (id, 0))
            .collect();
        if read.is_empty() {
            return Some(Vec::new());
        }
        for (node, _) in nodes {
            for source in self.graph.get(*node).sources() {
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
    fn reserve(&mut self, schedule: &Schedule, early: &[TensorId], more: usize) {
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
        let groups = groups.into_iter().map(|(_, group)| group);
        self.program.reserves.extend(groups);
    }

    fn life(&self, id: TensorId) -> Lifetime {
        self.lives.get(id.index()).copied().unwrap_or_default()
    }

    fn edit(&mut self, id: TensorId, change: impl FnOnce(&mut Lifetime)) {
        if let Some(life) = self.lives.get_mut(id.index()) {
            change(life);
        }
    }

    /// Readers and views are counted, and leaves placed.
    fn inputs(&mut self, schedule: &Schedule) {
        let repeats = !schedule.rounds.is_empty();
        let layers = self
            .graph
            .marks
            .first()
            .map_or(usize::MAX, |mark| mark.tensors);
        for (leaf, backend) in schedule.leaves.iter().copied() {
            self.introduce(leaf);
            self.allocate(leaf, backend);
            let is_layers = leaf.index() >= layers && !schedule.is_copy(leaf);
            if repeats && is_layers && self.life(leaf).planned {
                self.blanks.push(leaf);
            }
        }
        for (node, _) in schedule.nodes.iter().copied() {
            self.introduce(node);
            let tensor = self.graph.get(node);
            // a leaf in the node list only keeps its source alive: it is no view that anyone reads
            if tensor.is_view() && tensor.op != Op::Leaf {
                self.edit(tensor.view_of, |life| life.views += 1);
            }
            for source in tensor.sources() {
                self.edit(source, |life| life.readers += 1);
            }
        }
    }

    fn introduce(&mut self, id: TensorId) {
        let tensor = self.graph.get(id);
        if tensor.storage != Storage::Planned {
            return;
        }
        self.edit(id, |life| {
            life.view_of = tensor.view_of;
            life.slot = id.0;
            life.planned = !tensor.is_view();
            life.readers += u32::from(tensor.is_output);
        });
    }

    fn step(&mut self, node: TensorId, backend: u8) {
        let tensor = self.graph.get(node);
        for source in tensor.sources() {
            self.allocate(source, backend);
        }
        self.allocate(node, backend);
        let runs_again = self.repeating && self.life(node).own;
        for source in tensor.sources() {
            let Some(life) = self.lives.get_mut(source.index()) else {
                continue;
            };
            if runs_again && !life.own {
                continue;
            }
            life.readers = life.readers.saturating_sub(1);
            if life.readers > 0 || life.views > 0 {
                continue;
            }
            let (view_of, allocated) = (life.view_of, life.allocated);
            if !view_of.is_some() {
                if allocated {
                    self.give_back(source);
                }
                continue;
            }
            let Some(viewed) = self.lives.get_mut(view_of.index()) else {
                continue;
            };
            if runs_again && !viewed.own {
                continue;
            }
            viewed.views = viewed.views.saturating_sub(1);
            if viewed.views == 0 && viewed.readers == 0 && viewed.allocated {
                self.give_back(view_of);
            }
        }
    }

    fn give_back(&mut self, id: TensorId) {
        let life = self.life(id);
        self.edit(id, |life| life.allocated = false);
        self.program.changes.push(Change::GiveBack {
            slot: life.slot,
            buffer: life.buffer,
            kept: 0,
            bytes: life.bytes,
            once: !life.own,
        });
    }

    #[inline]
    fn allocate(&mut self, id: TensorId, backend: u8) {
        if let Some(life) = self.lives.get_mut(id.index())
            && life.planned
            && !life.allocated
        {
            life.allocated = true;
            self.place(id, backend);
        }
    }

    fn place(&mut self, id: TensorId, backend: u8) {
        if self.graph.get(id).op.can_reuse_source() && self.reuse_source(id) {
            return;
        }
        let bytes = self.size(id, backend);
        let own = self.life(id).own;
        self.edit(id, |life| {
            life.buffer = backend;
            life.bytes = bytes;
            life.slot = id.0;
        });
        self.program.changes.push(Change::Take {
            slot: id.0,
            buffer: backend,
            bytes,
            once: !own,
        });
    }

    fn size(&self, id: TensorId, buffer: u8) -> i64 {
        self.rules
            .get(usize::from(buffer))
            .map_or(0, |rules| rules.size(self.graph, id))
    }

    /// Lets `id` take over a source that nothing else reads; true when it did. Views are never taken over: ggml counts only what it
    /// placed itself as its own.
    fn reuse_source(&mut self, id: TensorId) -> bool {
        let tensor = self.graph.get(id);
        let runs_again = self.repeating && self.life(id).own;
        for source in tensor.sources() {
            let life = self.life(source);
            if life.allocated
                && (life.own || !runs_again)
                && life.readers == 1
                && life.views == 0
                && tensor.same_layout(self.graph.get(source))
            {
                self.take_over(id, source);
                return true;
            }
        }
        false
    }

    fn take_over(&mut self, id: TensorId, owner: TensorId) {
        let Lifetime {
            slot,
            buffer,
            bytes,
            own,
            ..
        } = self.life(owner);
        let kept = self.size(id, buffer);
        self.edit(id, |life| {
            life.slot = slot;
            life.buffer = buffer;
            life.bytes = kept;
        });
        self.edit(owner, |life| life.allocated = false);
        if bytes > kept {
            self.program.changes.push(Change::GiveBack {
                slot,
                buffer,
                kept,
                bytes: bytes - kept,
                once: !own,
            });
        }
    }
}
