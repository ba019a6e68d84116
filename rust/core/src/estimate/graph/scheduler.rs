//! Which backend runs which node, and what is copied between backends: ggml's scheduler (`ggml-backend.cpp`,
//! `ggml_backend_sched_split_graph`). Backends are the devices in order, then the CPU.
//!
//! llama.cpp's dry run forgets the backends that its graph builder asked for (`ggml_backend_sched_reserve_size` resets first), so none
//! are asked for here.

use super::ops::{Fused, Graph};
use super::reserve::Batch;
use super::rounds::Round;
use super::tensor::{Op, Storage, Tensor, TensorId};

/// Copies of every input under pipeline parallelism (`GGML_SCHED_MAX_COPIES`).
pub(super) const PIPELINE_COPIES: usize = 4;

/// What the scheduler must know of the machine.
#[derive(Clone, Copy, Debug)]
pub(super) struct Backends {
    pub(super) devices: u8,
    /// 1, or [`PIPELINE_COPIES`].
    pub(super) copies: usize,
    /// Devices lack some flash attention shapes.
    pub(super) cuda: bool,
    /// Devices run operations on host weights, as they do for large batches.
    pub(super) offloads: bool,
}

impl Backends {
    fn cpu(self) -> u8 {
        self.devices
    }

    fn supports(self, backend: u8, graph: &Graph, tensor: &Tensor) -> bool {
        backend == self.cpu()
            || !self.cuda
            || tensor.op != Op::FlashAttention
            || super::cuda::supports_flash_attention(graph, tensor)
    }
}

/// Nodes and leaves in the order in which the allocator sees them, each with its backend.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    pub(super) nodes: Vec<(TensorId, u8)>,
    pub(super) leaves: Vec<(TensorId, u8)>,
    pub(super) backend_of: Vec<u8>,
    pub(super) copy_of: Vec<TensorId>,
    splits: Vec<Split>,
    /// Some node runs elsewhere where devices take over operations on host weights.
    offload_matters: bool,
    /// The backends hold for the next graph to build, too.
    assigned: bool,
    /// For every layer's beginning, how many nodes come before it.
    pub(super) layer_starts: Vec<usize>,
    /// What was copied, and the (first) copy.
    pub(super) copied: Vec<(TensorId, TensorId)>,
    /// Rounds of nodes that run more often; empty when some round cannot be told apart.
    pub(super) rounds: Vec<Round>,
}

#[derive(Debug)]
struct Split {
    backend: u8,
    start: usize,
    end: usize,
    inputs: Vec<TensorId>,
}

const UNASSIGNED: u8 = u8::MAX;

impl Schedule {
    /// Assigns backends, splits, and rewires the graph's sources to the copies.
    ///
    /// False when a round of layers that stands for more cannot be repeated: it has pipelined copies of its own, or copies for layers
    /// behind it.
    pub(super) fn build(&mut self, graph: &mut Graph, backends: Backends) -> bool {
        self.nodes.clear();
        self.leaves.clear();
        self.splits.clear();
        self.rounds.clear();
        self.copied.clear();
        self.layer_starts.clear();
        let assigned = std::mem::take(&mut self.assigned);
        if !assigned {
            self.backend_of.clear();
            self.backend_of.resize(graph.len(), UNASSIGNED);
        }
        if backends.devices == 0 {
            self.nodes.extend(graph.nodes.iter().map(|node| (*node, 0)));
            self.leaves
                .extend(graph.leaves.iter().map(|leaf| (*leaf, 0)));
            self.layer_starts
                .extend(graph.marks.iter().map(|mark| mark.nodes));
            return self.find_rounds(graph, backends);
        }
        if !assigned {
            self.assign(graph, backends);
        }
        self.copy_of.clear();
        self.copy_of.resize(
            graph
                .len()
                .saturating_mul(usize::from(backends.devices) + 1),
            TensorId::NONE,
        );
        self.split(graph, backends);
        self.collect(graph, backends);
        self.find_rounds(graph, backends)
    }

    /// Whether every fused operation of a kind runs where its layer is (`llama_context::resolve_fused_ops`); if so, this graph is built next.
    pub(super) fn runs_at_home(&mut self, graph: &Graph, batch: &Batch<'_>, kind: Fused) -> bool {
        let mut fused = graph.fused.iter().filter(|(of, ..)| *of == kind).peekable();
        if fused.peek().is_none() {
            return true;
        }
        self.backend_of.clear();
        self.backend_of.resize(graph.len(), UNASSIGNED);
        // the graph that llama.cpp asks with has too few tokens to offload anything
        self.assign(
            graph,
            Backends {
                offloads: false,
                ..batch.backends()
            },
        );
        let at_home = fused.all(|(_, id, il)| self.home(graph, *id) == batch.layer_backend(*il));
        self.assigned = at_home && !self.offload_matters;
        at_home
    }

    /// Whether a tensor is a copy, or keeps one's source.
    pub(super) fn is_copy(&self, id: TensorId) -> bool {
        id.index() >= self.backend_of.len()
    }

    fn backend(&self, id: TensorId) -> u8 {
        self.backend_of
            .get(id.index())
            .copied()
            .unwrap_or(UNASSIGNED)
    }

    fn set(&mut self, id: TensorId, backend: u8) {
        if let Some(slot) = self.backend_of.get_mut(id.index()) {
            *slot = backend;
        }
    }

    /// Passes 1 to 4.
    fn assign(&mut self, graph: &Graph, backends: Backends) {
        self.offload_matters = false;
        let mut all_leaves_known = true;
        for id in &graph.leaves {
            let backend = self.preferred(graph, *id, backends);
            all_leaves_known &= backend != UNASSIGNED;
            self.set(*id, backend);
        }
        for id in &graph.nodes {
            let backend = self.preferred(graph, *id, backends);
            self.set(*id, backend);
        }
        let forward = || graph.nodes.iter().copied();
        let complete = self.spread(graph, backends, forward(), true)
            || self.spread(graph, backends, forward().rev(), true)
            || self.spread(graph, backends, forward(), false)
            || self.spread(graph, backends, forward().rev(), false);
        if !complete {
            for id in &graph.nodes {
                if self.backend(*id) == UNASSIGNED {
                    self.set(*id, self.best_supplied(graph, *id, backends));
                }
            }
        }
        if complete && all_leaves_known {
            return;
        }
        for id in &graph.nodes {
            if all_leaves_known && self.backend(*id) != UNASSIGNED {
                continue;
            }
            let tensor = graph.get(*id);
            if tensor.is_view() && self.backend(*id) == UNASSIGNED {
                self.set(*id, self.backend(tensor.view_of));
            }
            for source in tensor.sources() {
                if self.backend(source) == UNASSIGNED {
                    let view_of = graph.get(source).view_of;
                    self.set(
                        source,
                        self.backend(if view_of.is_some() { view_of } else { *id }),
                    );
                }
            }
            if self.backend(*id) == UNASSIGNED {
                let first =
                    (0..=backends.cpu()).find(|backend| backends.supports(*backend, graph, tensor));
                self.set(*id, first.unwrap_or(backends.cpu()));
            }
        }
    }

    /// Pass 1: where a tensor has to be, or wants to be for its weights' sake (`ggml_backend_sched_backend_id_from_cur`).
    fn preferred(&mut self, graph: &Graph, id: TensorId, backends: Backends) -> u8 {
        let tensor = graph.get(id);
        let owner = if tensor.is_view() {
            graph.get(tensor.view_of)
        } else {
            tensor
        };
        if let Some(backend) = owner.storage.backend() {
            return backend;
        }
        if tensor.is_input {
            return backends.cpu();
        }
        // the frequencies of a rope and the sinks of an attention are too small to decide
        if matches!(tensor.op, Op::Rope | Op::FlashAttention) {
            return UNASSIGNED;
        }
        for source in tensor.sources() {
            let storage = graph.get(source).storage;
            if let Storage::Repacked(backend) = storage {
                return backend;
            }
            if let Storage::Weights(backend) = storage {
                if backend != backends.cpu() || !super::cuda::offloads(tensor) {
                    return backend;
                }
                self.offload_matters = true;
                return if backends.offloads { 0 } else { backend };
            }
        }
        UNASSIGNED
    }

    /// Pass 2: the backend of one node carries on to its unassigned neighbours; with `devices_only` the CPU does not. True when every
    /// node has a backend.
    fn spread(
        &mut self,
        graph: &Graph,
        backends: Backends,
        nodes: impl Iterator<Item = TensorId>,
        devices_only: bool,
    ) -> bool {
        let mut current = UNASSIGNED;
        let mut complete = true;
        for id in nodes {
            let backend = self.backend(id);
            if backend != UNASSIGNED {
                current = if devices_only && backend == backends.cpu() {
                    UNASSIGNED
                } else {
                    backend
                };
            } else if current != UNASSIGNED && backends.supports(current, graph, graph.get(id)) {
                self.set(id, current);
            } else {
                complete = false;
            }
        }
        complete
    }

    /// Pass 3 for what is left: the backend that can read most of the sources.
    fn best_supplied(&self, graph: &Graph, id: TensorId, backends: Backends) -> u8 {
        let tensor = graph.get(id);
        let readable = |backend: u8| {
            tensor
                .sources()
                .filter(|source| {
                    let view_of = graph.get(*source).view_of;
                    let known = self.backend(*source) != UNASSIGNED
                        || (view_of.is_some() && self.backend(view_of) != UNASSIGNED);
                    known && self.home(graph, *source) == backend
                })
                .count()
        };
        (0..=backends.cpu())
            .filter(|backend| backends.supports(*backend, graph, tensor))
            .rev()
            .max_by_key(|backend| readable(*backend))
            .unwrap_or(backends.cpu())
    }

    /// The backend whose buffer holds a tensor.
    fn home(&self, graph: &Graph, id: TensorId) -> u8 {
        let tensor = graph.get(id);
        let owner = if tensor.is_view() {
            graph.get(tensor.view_of)
        } else {
            tensor
        };
        owner.storage.backend().unwrap_or_else(|| {
            let backend = self.backend(id);
            if backend == UNASSIGNED && tensor.is_view() {
                self.backend(tensor.view_of)
            } else {
                backend
            }
        })
    }

    pub(super) fn copy_slot(&self, id: TensorId, backend: u8, graph_len: usize) -> usize {
        usize::from(backend)
            .saturating_mul(graph_len)
            .saturating_add(id.index())
            .min(self.copy_of.len())
    }

    /// Pass 5: splits, and the copies each needs.
    fn split(&mut self, graph: &mut Graph, backends: Backends) {
        let known = graph.len();
        let backend = graph.nodes.first().map_or(0, |id| self.backend(*id));
        let mut current = Split {
            backend,
            start: 0,
            end: 0,
            inputs: Vec::new(),
        };
        for position in 0..graph.nodes.len() {
            let Some(id) = graph.nodes.get(position).copied() else {
                break;
            };
            let tensor = graph.get(id);
            let backend = self.backend(id);
            if backend == current.backend && tensor.sources().all(|id| self.backend(id) == backend)
            {
                continue;
            }
            if backend != current.backend
                || (!current.inputs.is_empty()
                    && self.brings_foreign_weight(graph, tensor, backend))
            {
                let next = Split {
                    backend,
                    start: position,
                    end: 0,
                    inputs: Vec::new(),
                };
                let mut done = std::mem::replace(&mut current, next);
                done.end = position;
                self.splits.push(done);
            }
            let sources = tensor.sources;
            for (slot, source) in sources
                .into_iter()
                .enumerate()
                .take(usize::from(tensor.source_count))
            {
                if self.backend(source) == backend || self.home(graph, source) == backend {
                    continue;
                }
                let at = self.copy_slot(source, backend, known);
                let mut copy = self.copy_of.get(at).copied().unwrap_or(TensorId::NONE);
                if !copy.is_some() {
                    copy = copy_of(graph, source, backends.copies);
                    for _ in 1..backends.copies {
                        copy_of(graph, source, backends.copies);
                    }
                    if let Some(entry) = self.copy_of.get_mut(at) {
                        *entry = copy;
                    }
                    current.inputs.push(source);
                    self.copied.push((source, copy));
                }
                if let Some(entry) = graph
                    .get_mut(id)
                    .and_then(|tensor| tensor.sources.get_mut(slot))
                {
                    *entry = copy;
                }
            }
        }
        current.end = graph.nodes.len();
        self.splits.push(current);
    }

    /// A weight from another backend starts a new split, so that the copies of earlier weights can be dropped.
    fn brings_foreign_weight(&self, graph: &Graph, tensor: &Tensor, backend: u8) -> bool {
        let is_weight = |id: TensorId| {
            matches!(
                graph.get(id).storage,
                Storage::Weights(_) | Storage::Repacked(_)
            )
        };
        // weights are where they are assigned to
        let foreign = |id: &TensorId| self.backend(*id) != backend && is_weight(*id);
        tensor.sources().any(|source| foreign(&source))
    }

    /// The order in which the allocator sees it all: each split's copies before its nodes; under pipelining all copies first.
    fn collect(&mut self, graph: &mut Graph, backends: Backends) {
        let known = self.backend_of.len();
        let inputs: Vec<TensorId> = graph
            .leaves
            .iter()
            .copied()
            .filter(|leaf| graph.get(*leaf).is_input)
            .collect();
        if backends.copies > 1 {
            for leaf in inputs {
                let backend = self.backend(leaf);
                if let Some(tensor) = graph.get_mut(leaf) {
                    tensor.is_output = true;
                }
                self.leaves.push((leaf, backend));
                for _ in 1..backends.copies {
                    let copy = copy_of(graph, leaf, backends.copies);
                    self.leaves.push((copy, backend));
                }
            }
        }
        let splits = std::mem::take(&mut self.splits);
        let mut marks = graph
            .marks
            .iter()
            .map(|mark| mark.nodes)
            .collect::<Vec<_>>()
            .into_iter()
            .peekable();
        for split in &splits {
            while marks.next_if(|mark| *mark <= split.start).is_some() {
                self.layer_starts.push(self.nodes.len());
            }
            for input in split.inputs.iter().copied() {
                let at = self.copy_slot(input, split.backend, known);
                let copy = self.copy_of.get(at).copied().unwrap_or(TensorId::NONE);
                let keep = keeper(graph, input);
                self.nodes.push((keep, self.home(graph, input)));
                self.nodes.push((copy, split.backend));
                if backends.copies > 1 {
                    // the copies of one input were made one after the other
                    let last = copy.0.saturating_add(PIPELINE_COPIES as u32);
                    self.leaves
                        .extend((copy.0..last).map(|id| (TensorId(id), split.backend)));
                }
            }
            for (position, id) in
                (split.start..).zip(graph.nodes.get(split.start..split.end).unwrap_or_default())
            {
                while marks.next_if(|mark| *mark <= position).is_some() {
                    self.layer_starts.push(self.nodes.len());
                }
                self.nodes.push((*id, self.backend(*id)));
            }
        }
        self.leaves.extend(graph.leaves.iter().map(|leaf| {
            (
                *leaf,
                self.backend_of.get(leaf.index()).copied().unwrap_or(0),
            )
        }));
        self.splits = splits;
    }
}

fn copy_of(graph: &mut Graph, id: TensorId, copies: usize) -> TensorId {
    let source = graph.get(id);
    let (element, ne, nb) = (source.element, source.ne, source.nb);
    let (id, copy) = graph.fresh(Op::Leaf, element, ne);
    copy.nb = nb;
    copy.own_bytes = copy.bytes();
    // pipelined copies must survive until the next batch has been read
    copy.is_input = copies > 1;
    copy.is_output = copies > 1;
    id
}

/// A node that does nothing but keep `id` alive until its copy has been made.
fn keeper(graph: &mut Graph, id: TensorId) -> TensorId {
    let source = graph.get(id);
    let (element, ne, nb) = (source.element, source.ne, source.nb);
    let view_of = if source.is_view() { source.view_of } else { id };
    let (keeper, tensor) = graph.fresh(Op::Leaf, element, ne);
    tensor.nb = nb;
    tensor.view_of = view_of;
    tensor.read(&[id]);
    keeper
}
