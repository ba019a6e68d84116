//! Where every tensor of a graph lies and for how long: ggml's graph allocator (`ggml-alloc.c`), less the data.
//!
//! Per buffer a list of free blocks sorted by offset; the smallest block that fits is taken, the open end last; a block is given back when
//! the last reader is done; an operation that can, writes over its source. The peak of each buffer is the compute buffer's size.

use super::ops::Graph;
use super::scheduler::{Round, RoundNodes, Schedule};
use super::tensor::{Op, Storage, TensorId};

/// How a backend's buffers count bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BufferRules {
    /// Every allocation is padded to this many bytes, a power of two.
    pub(super) alignment: i64,
    /// CUDA pads a quantised tensor's last row to 512 elements and keeps f16 copies of K and V behind flash attention.
    pub(super) cuda: bool,
}

impl BufferRules {
    fn pad(self, bytes: i64) -> i64 {
        bytes.saturating_add(self.alignment - 1) & -self.alignment
    }

    /// Bytes that a buffer of this kind sets aside for `id`, before padding (`get_alloc_size`).
    fn bytes(self, graph: &Graph, id: TensorId) -> i64 {
        let tensor = graph.get(id);
        let bytes = tensor.own_bytes;
        if !self.cuda {
            return bytes;
        }
        if tensor.op == Op::FlashAttention {
            return super::cuda::flash_attention_bytes(graph, tensor, bytes);
        }
        if tensor.element.is_quantized() {
            return bytes.saturating_add(super::cuda::row_padding_bytes(tensor.element, tensor.ne));
        }
        bytes
    }
}

/// One buffer: its free blocks and the highest byte ever used (`ggml_dyn_tallocr` with one chunk).
#[derive(Debug, Default)]
pub(super) struct Buffer {
    free: Vec<(i64, i64)>,
    pub(super) peak: i64,
}

/// More than any graph asks for: the open end of a buffer.
const ENDLESS: i64 = i64::MAX / 2;

impl Buffer {
    pub(super) fn reset(&mut self) {
        self.free.clear();
        self.free.push((0, ENDLESS));
        self.peak = 0;
    }

    pub(super) fn allocate(&mut self, bytes: i64) -> i64 {
        let open_end = self.free.len().saturating_sub(1);
        // of equal blocks the last one wins, as `size <= best_fit_size` in ggml
        let best = self
            .free
            .iter()
            .enumerate()
            .take(open_end)
            .filter(|(_, (_, size))| *size >= bytes)
            .min_by(|(i, (_, a)), (j, (_, b))| a.cmp(b).then(j.cmp(i)))
            .map_or(open_end, |(index, _)| index);
        let Some(block) = self.free.get_mut(best) else {
            return 0;
        };
        let offset = block.0;
        block.0 = offset.saturating_add(bytes);
        block.1 = block.1.saturating_sub(bytes);
        if block.1 == 0 {
            self.free.remove(best);
        }
        self.peak = self.peak.max(offset.saturating_add(bytes));
        offset
    }

    pub(super) fn release(&mut self, offset: i64, bytes: i64) {
        let end = offset.saturating_add(bytes);
        for index in 0..self.free.len() {
            let Some((start, size)) = self.free.get(index).copied() else {
                return;
            };
            let next = self.free.get(index + 1).copied();
            if start.saturating_add(size) == offset {
                let mut merged = size.saturating_add(bytes);
                if let Some((next_start, next_size)) = next
                    && next_start == end
                {
                    merged = merged.saturating_add(next_size);
                    self.free.remove(index + 1);
                }
                if let Some(block) = self.free.get_mut(index) {
                    block.1 = merged;
                }
                return;
            }
            if end == start {
                let merged = size.saturating_add(bytes);
                if let Some((before_start, before_size)) =
                    index.checked_sub(1).and_then(|i| self.free.get(i)).copied()
                    && before_start.saturating_add(before_size) == offset
                {
                    self.free.remove(index);
                    if let Some(block) = self.free.get_mut(index - 1) {
                        block.1 = before_size.saturating_add(merged);
                    }
                } else if let Some(block) = self.free.get_mut(index) {
                    *block = (offset, merged);
                }
                return;
            }
        }
        let position = self.free.partition_point(|(start, _)| *start < offset);
        self.free.insert(position, (offset, bytes));
    }
}

/// What the allocator knows of one tensor.
#[derive(Clone, Copy, Debug)]
struct Lifetime {
    /// What is yet to read it; an output is read once more than the graph does, so that it is never given back.
    readers: u32,
    views: u32,
    view_of: TensorId,
    /// Wants a place: it is no weight, no state and no view.
    planned: bool,
    allocated: bool,
    /// Belongs to the round that runs again.
    own: bool,
    buffer: u8,
    offset: i64,
    /// Bytes set aside, padded.
    bytes: i64,
}

impl Default for Lifetime {
    fn default() -> Self {
        Self {
            readers: 0,
            views: 0,
            view_of: TensorId::NONE,
            planned: false,
            allocated: false,
            own: false,
            buffer: 0,
            offset: 0,
            bytes: 0,
        }
    }
}

/// Plans graphs one after the other; keeps its memory between them.
#[derive(Debug, Default)]
pub(super) struct Allocator {
    lifetimes: Vec<Lifetime>,
    buffers: Vec<Buffer>,
}

impl Allocator {
    /// The peak of every buffer, in backend order (`ggml_gallocr_reserve_n_size`).
    pub(super) fn plan(
        &mut self,
        graph: &Graph,
        schedule: &Schedule,
        rules: &[BufferRules],
    ) -> Vec<u64> {
        self.lifetimes.clear();
        self.lifetimes
            .resize(graph.tensors.len(), Lifetime::default());
        self.buffers.resize_with(rules.len(), Buffer::default);
        self.buffers.iter_mut().for_each(Buffer::reset);
        let mut run = Run {
            graph,
            rules,
            lifetimes: &mut self.lifetimes,
            buffers: &mut self.buffers,
            repeating: false,
        };
        run.inputs(schedule);
        let mut done = 0;
        for round in &schedule.rounds {
            run.steps(schedule.nodes.get(done..round.start).unwrap_or_default());
            run.repeat(schedule, *round);
            done = round.end;
        }
        run.steps(schedule.nodes.get(done..).unwrap_or_default());
        self.buffers
            .iter()
            .map(|buffer| u64::try_from(buffer.peak).unwrap_or(0))
            .collect()
    }
}

struct Run<'a> {
    graph: &'a Graph,
    rules: &'a [BufferRules],
    lifetimes: &'a mut [Lifetime],
    buffers: &'a mut [Buffer],
    /// A round runs again: what is not its own was read in its first run.
    repeating: bool,
}

/// What one round leaves to the next: free blocks, and where the tensors lie that both know.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Handover {
    free: Vec<(i64, i64)>,
    places: Vec<(u8, i64)>,
}

impl Run<'_> {
    fn steps(&mut self, nodes: &[(TensorId, u8)]) {
        for (node, backend) in nodes.iter().copied() {
            self.step(node, backend);
        }
    }

    /// Runs a round's nodes as often as it stands for, or until what it hands over recurs, and once more.
    fn repeat(&mut self, schedule: &Schedule, round: Round) {
        let RoundNodes {
            first,
            own,
            last,
            twins,
        } = schedule.round_nodes(self.graph, round);
        for (id, _) in &own {
            self.edit(*id, |life| life.own = true);
        }
        let fresh: Vec<(TensorId, Lifetime)> =
            own.iter().map(|(id, _)| (*id, self.life(*id))).collect();
        // tensors that the round before made and this one reads, where this one makes their like
        let handed: Vec<(TensorId, TensorId, Lifetime)> = twins
            .into_iter()
            .map(|(before, id)| (before, id, self.life(before)))
            .filter(|(_, _, life)| !life.own)
            .filter(|(_, _, life)| life.allocated || life.readers > 0 || life.views > 0)
            .collect();
        for (before, ..) in &handed {
            self.edit(*before, |life| life.own = true);
        }
        // only the last run reads what other layers read too: until then it must stay
        self.repeating = true;
        let mut seen = Vec::with_capacity(4);
        if first.len() == own.len() {
            seen.push(self.handover(handed.iter().map(|(before, ..)| *before)));
        }
        let mut left = round.more;
        let mut steps = &first;
        while left > 0 {
            self.steps(steps);
            steps = &own;
            left -= 1;
            let now = self.handover(handed.iter().map(|(_, id, _)| *id));
            if let Some(position) = seen.iter().rposition(|earlier| *earlier == now) {
                left %= seen.len() - position;
                seen.clear();
            }
            seen.push(now);
            for (before, id, old) in &handed {
                let place = self.life(*id);
                self.edit(*before, |life| {
                    *life = Lifetime {
                        buffer: place.buffer,
                        offset: place.offset,
                        bytes: place.bytes,
                        own: true,
                        ..*old
                    };
                });
            }
            for (id, life) in &fresh {
                self.edit(*id, |slot| *slot = *life);
            }
        }
        self.repeating = false;
        for (id, _) in &own {
            self.edit(*id, |life| life.own = false);
        }
        self.steps(&last);
    }

    fn handover(&self, handed: impl Iterator<Item = TensorId>) -> Handover {
        Handover {
            free: self
                .buffers
                .iter()
                .flat_map(|buffer| buffer.free.iter().copied())
                .collect(),
            places: handed
                .map(|id| (self.life(id).buffer, self.life(id).offset))
                .collect(),
        }
    }

    fn life(&self, id: TensorId) -> Lifetime {
        self.lifetimes.get(id.index()).copied().unwrap_or_default()
    }

    fn edit(&mut self, id: TensorId, change: impl FnOnce(&mut Lifetime)) {
        if let Some(lifetime) = self.lifetimes.get_mut(id.index()) {
            change(lifetime);
        }
    }

    fn size(&self, id: TensorId, buffer: u8) -> i64 {
        self.rules
            .get(usize::from(buffer))
            .map_or(0, |rules| rules.pad(rules.bytes(self.graph, id)))
    }

    /// Readers and views are counted, and leaves placed.
    fn inputs(&mut self, schedule: &Schedule) {
        for (leaf, backend) in schedule.leaves.iter().copied() {
            self.introduce(leaf);
            self.allocate(leaf, backend);
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
        self.edit(id, |life| {
            life.view_of = tensor.view_of;
            life.planned = tensor.storage == Storage::Planned && !tensor.is_view();
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
            let Some(life) = self.lifetimes.get_mut(source.index()) else {
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
                    self.free(source);
                }
                continue;
            }
            let Some(viewed) = self.lifetimes.get_mut(view_of.index()) else {
                continue;
            };
            if runs_again && !viewed.own {
                continue;
            }
            viewed.views = viewed.views.saturating_sub(1);
            if viewed.views == 0 && viewed.readers == 0 && viewed.allocated {
                self.free(view_of);
            }
        }
    }

    fn free(&mut self, id: TensorId) {
        let life = self.life(id);
        if let Some(buffer) = self.buffers.get_mut(usize::from(life.buffer)) {
            buffer.release(life.offset, life.bytes);
        }
        self.edit(id, |life| life.allocated = false);
    }

    #[inline]
    fn allocate(&mut self, id: TensorId, backend: u8) {
        if let Some(life) = self.lifetimes.get_mut(id.index())
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
        let offset = self
            .buffers
            .get_mut(usize::from(backend))
            .map_or(0, |buffer| buffer.allocate(bytes));
        self.edit(id, |life| {
            life.buffer = backend;
            life.offset = offset;
            life.bytes = bytes;
        });
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
        let old = self.life(owner);
        let (kept, had) = (self.size(id, old.buffer), old.bytes);
        self.edit(id, |life| {
            life.buffer = old.buffer;
            life.offset = old.offset;
            life.bytes = kept;
        });
        self.edit(owner, |life| life.allocated = false);
        if had > kept
            && let Some(buffer) = self.buffers.get_mut(usize::from(old.buffer))
        {
            buffer.release(old.offset.saturating_add(kept), had - kept);
        }
    }
}
