//! When each tensor takes its place in a buffer and when it gives it back (`ggml_gallocr_alloc_graph_impl`): that depends on the order
//! of nodes alone, not on where anything lies, so it is found once, however often a round of layers runs.

mod repeated;

use super::buffer::BufferRules;
use super::ops::Graph;
use super::program::{Change, Program, When};
use super::scheduler::Schedule;
use super::tensor::{Op, Storage, TensorId};

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
    /// All runs but the first have given it back.
    ended: bool,
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
            ended: false,
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
            when: When::Always,
            once: Vec::new(),
            in_round: false,
            strayed: false,
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
    /// In which runs of a round the node runs that is looked at.
    when: When,
    /// What nodes read that run in a round's first run only, and how many of them are yet to come.
    once: Vec<(TensorId, u32)>,
    in_round: bool,
    /// Something in the round cannot be told for all its runs.
    strayed: bool,
}

impl Finder<'_> {
    fn steps(&mut self, nodes: &[(TensorId, u8)]) {
        for (node, backend) in nodes.iter().copied() {
            self.step(node, backend);
        }
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
            for source in self.graph.reads(node) {
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
        self.allocate(node, backend);
        for source in self.graph.reads(node) {
            let Some(life) = self.lives.get_mut(source.index()) else {
                continue;
            };
            life.readers = life.readers.saturating_sub(1);
            if life.readers > 0 || life.views > 0 {
                if self.in_round && !self.once.is_empty() {
                    self.read_in_round(source);
                }
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
            viewed.views = viewed.views.saturating_sub(1);
            if viewed.views == 0 && viewed.readers == 0 && viewed.allocated {
                self.give_back(view_of);
            }
        }
    }

    /// What only the first run reads once more ends here in the others.
    fn read_in_round(&mut self, id: TensorId) {
        let Some((_, times)) = self.once.iter_mut().find(|(of, _)| *of == id) else {
            return;
        };
        if self.when == When::First {
            *times = times.saturating_sub(1);
            return;
        }
        let (times, life) = (*times, self.life(id));
        if times > 0 && life.readers == times && life.views == 0 && life.allocated {
            let when = if life.own { When::Again } else { When::Last };
            self.push_given_back(&life, 0, when);
            self.edit(id, |life| {
                life.allocated = life.own;
                life.ended = true;
            });
        }
    }

    fn give_back(&mut self, id: TensorId) {
        let life = self.life(id);
        self.edit(id, |life| life.allocated = false);
        let when = self.when_given_back(&life);
        self.push_given_back(&life, 0, when);
    }

    fn push_given_back(&mut self, life: &Lifetime, kept: i64, when: When) {
        self.program.changes.push(Change::GiveBack {
            slot: life.slot,
            buffer: life.buffer,
            kept,
            bytes: life.bytes - kept,
            when,
        });
    }

    /// In which runs a tensor ends that ends now: what a round shares with others ends with its last run.
    fn when_given_back(&mut self, life: &Lifetime) -> When {
        if life.own {
            self.strayed |= self.when != When::Always && !(self.when == When::First && life.ended);
            self.when
        } else if self.when == When::First {
            When::First
        } else {
            When::Last
        }
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
        let reuses = self.graph.get(id).op.can_reuse_source();
        if !reuses || !self.reuse_source(id, backend) {
            self.take(id, backend, self.when);
        }
    }

    fn size(&self, id: TensorId, buffer: u8) -> i64 {
        self.rules
            .get(usize::from(buffer))
            .map_or(0, |rules| rules.size(self.graph, id))
    }

    /// Lets `id` take over a source that nothing else reads; true when it did. Views are never taken over: ggml counts only what it
    /// placed itself as its own.
    fn reuse_source(&mut self, id: TensorId, backend: u8) -> bool {
        let tensor = self.graph.get(id);
        let mut unread = tensor.sources().filter(|source| {
            let life = self.life(*source);
            life.allocated
                && life.readers == 1
                && life.views == 0
                && tensor.same_layout(self.graph.get(*source))
        });
        let Some(source) = unread.next() else {
            return false;
        };
        // what is shared lives on in every run but the last
        if self.in_round && self.when == When::Always && !self.life(source).own {
            self.strayed |= unread.next().is_some();
            self.take_over_last(id, source, backend);
        } else {
            self.take_over(id, source);
        }
        true
    }

    fn take_over(&mut self, id: TensorId, owner: TensorId) {
        let old = self.life(owner);
        let kept = self.size(id, old.buffer);
        self.edit(id, |life| {
            life.slot = old.slot;
            life.buffer = old.buffer;
            life.bytes = kept;
        });
        self.edit(owner, |life| life.allocated = false);
        // each run's own must end with that run, not with what only one of them does
        self.strayed |= self.in_round && (old.ended || old.own != (self.when == When::Always));
        self.give_back_behind(&old, kept);
    }

    /// The last run alone takes over; the others take a place.
    fn take_over_last(&mut self, id: TensorId, owner: TensorId, backend: u8) {
        let old = self.life(owner);
        self.strayed |= old.buffer != backend;
        let kept = self.take(id, backend, When::Before);
        self.edit(owner, |life| life.allocated = false);
        self.program.changes.push(Change::TakeOver {
            slot: id.0,
            from: old.slot,
        });
        self.give_back_behind(&old, kept);
    }

    /// What was taken over gives back what it is larger by.
    fn give_back_behind(&mut self, old: &Lifetime, kept: i64) {
        if old.bytes > kept {
            let when = self.when_given_back(old);
            self.push_given_back(old, kept, when);
        }
    }

    /// Takes a place; gives its bytes.
    fn take(&mut self, id: TensorId, buffer: u8, when: When) -> i64 {
        let bytes = self.size(id, buffer);
        self.edit(id, |life| {
            life.buffer = buffer;
            life.bytes = bytes;
            life.slot = id.0;
        });
        self.program.changes.push(Change::Take {
            slot: id.0,
            buffer,
            bytes,
            when,
        });
        bytes
    }
}
