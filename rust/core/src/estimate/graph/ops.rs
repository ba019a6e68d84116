//! The operations graphs are made of, each with ggml's result shape, sources and view rule (`ggml.c`), and the order in which
//! `ggml_build_forward_expand` lines them up.

use crate::gguf::GgmlType;

use super::repeats::Repeat;
use super::tensor::{Op, Storage, Tensor, TensorId, contiguous_strides};

/// A graph under construction: an arena of tensors, and the nodes and leaves in llama.cpp's order.
#[derive(Debug, Default)]
pub(super) struct Graph {
    /// Tensors of this graph and, behind them, of earlier ones.
    tensors: Vec<Tensor>,
    count: usize,
    pub(super) nodes: Vec<TensorId>,
    pub(super) leaves: Vec<TensorId>,
    /// Tensors and nodes there were when each layer began.
    pub(super) marks: Vec<Mark>,
    /// Fused operations and their layers.
    pub(super) fused: Vec<(Fused, TensorId, usize)>,
    /// Rounds of layers that stand for more.
    pub(super) repeats: Vec<Repeat>,
    /// Operations that need no place of their own are one with what made their source (see [`merging`](super::merging)).
    pub(super) merges: bool,
    /// Those that are not, and where they are described.
    #[cfg(test)]
    pub(super) alone: Vec<(TensorId, &'static std::panic::Location<'static>)>,
    /// Those of them that add what their source was made from.
    #[cfg(test)]
    pub(super) added_back: Vec<TensorId>,
}

/// What llama.cpp takes apart everywhere when it would run elsewhere than its layer in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fused {
    /// Flash attention.
    Attention,
    /// What a block gives, spread over residual streams (`ggml_dsv4_hc_post`).
    Spread,
}

/// Tensors that the arena grows by.
const GROWTH: usize = 256;

/// Where a layer begins.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Mark {
    pub(super) tensors: usize,
    pub(super) nodes: usize,
}

static NOTHING: Tensor = Tensor::EMPTY;

impl Graph {
    pub(super) fn clear(&mut self) {
        self.count = 0;
        self.nodes.clear();
        self.leaves.clear();
        self.marks.clear();
        self.repeats.clear();
        self.fused.clear();
        #[cfg(test)]
        {
            self.alone.clear();
            self.added_back.clear();
        }
    }

    /// Notes that a layer begins.
    pub(super) fn mark(&mut self) {
        self.marks.push(Mark {
            tensors: self.count,
            nodes: self.nodes.len(),
        });
    }

    /// The tensor, or an empty one for [`TensorId::NONE`].
    pub(super) fn get(&self, id: TensorId) -> &Tensor {
        self.tensors.get(id.index()).unwrap_or(&NOTHING)
    }

    pub(super) fn ne(&self, id: TensorId) -> [i64; 4] {
        self.get(id).ne
    }

    pub(super) fn nb(&self, id: TensorId) -> [i64; 4] {
        self.get(id).nb
    }

    pub(super) fn element(&self, id: TensorId) -> GgmlType {
        self.get(id).element
    }

    pub(super) fn get_mut(&mut self, id: TensorId) -> Option<&mut Tensor> {
        self.tensors.get_mut(id.index())
    }

    /// Tensors there are.
    pub(super) fn len(&self) -> usize {
        self.count
    }

    /// A new contiguous tensor, and its place.
    #[inline]
    #[expect(
        clippy::indexing_slicing,
        reason = "the arena was made large enough the line before"
    )]
    pub(super) fn fresh(
        &mut self,
        op: Op,
        element: GgmlType,
        ne: [i64; 4],
    ) -> (TensorId, &mut Tensor) {
        let index = self.count;
        if index >= self.tensors.len() {
            self.tensors.resize(index + GROWTH, Tensor::EMPTY);
        }
        self.count += 1;
        let id = TensorId(u32::try_from(index).unwrap_or(u32::MAX));
        let tensor = &mut self.tensors[index];
        tensor.begin(op, element, ne);
        (id, tensor)
    }

    /// A weight, cache or state that lies on a backend already.
    pub(super) fn stored(&mut self, element: GgmlType, ne: [i64; 4], storage: Storage) -> TensorId {
        let (id, tensor) = self.fresh(Op::Leaf, element, ne);
        tensor.storage = storage;
        id
    }

    /// Gives a weight the shape that llama.cpp loads it with, where files keep another.
    pub(super) fn reshape_stored(&mut self, id: TensorId, ne: [i64; 4]) {
        let element = self.element(id);
        self.set_layout(id, ne, contiguous_strides(element, ne));
    }

    /// A tensor that the caller fills before every run.
    pub(super) fn input(&mut self, element: GgmlType, ne: [i64; 4]) -> TensorId {
        let (id, tensor) = self.fresh(Op::Leaf, element, ne);
        tensor.is_input = true;
        id
    }

    /// The caller reads this one: its memory is never given to another (`ggml_set_output`).
    pub(super) fn set_output(&mut self, id: TensorId) {
        if let Some(tensor) = self.tensors.get_mut(id.index()) {
            tensor.is_output = true;
        }
    }

    /// A fresh tensor without sources that is no input.
    pub(super) fn blank(&mut self, element: GgmlType, ne: [i64; 4]) -> TensorId {
        self.fresh(Op::Leaf, element, ne).0
    }

    /// A new contiguous result of `op`.
    pub(super) fn result(
        &mut self,
        op: Op,
        element: GgmlType,
        ne: [i64; 4],
        sources: &[TensorId],
    ) -> TensorId {
        let (id, tensor) = self.fresh(op, element, ne);
        tensor.read(sources);
        id
    }

    /// A result with the type and shape of `a`.
    pub(super) fn like(&mut self, op: Op, a: TensorId, sources: &[TensorId]) -> TensorId {
        let (element, ne) = (self.element(a), self.ne(a));
        self.result(op, element, ne, sources)
    }

    /// A result that is a view of all of `a` (`ggml_view_tensor`).
    fn over(&mut self, op: Op, a: TensorId, sources: &[TensorId]) -> TensorId {
        let (element, ne, nb, root) = (self.element(a), self.ne(a), self.nb(a), self.root(a));
        let own_bytes = self.get(a).own_bytes;
        let (id, tensor) = self.fresh(op, element, ne);
        tensor.nb = nb;
        tensor.own_bytes = own_bytes;
        tensor.view_of = root;
        tensor.read(sources);
        id
    }

    pub(super) fn root(&self, a: TensorId) -> TensorId {
        let view_of = self.get(a).view_of;
        if view_of.is_some() { view_of } else { a }
    }

    /// What is read where `a` is: views are no nodes, what reads one reads what it is a view of.
    #[inline]
    pub(super) fn viewed(&self, a: TensorId) -> TensorId {
        let tensor = self.get(a);
        match tensor.op {
            // of nothing, where a model lacks what is viewed
            Op::View => tensor.sources().next().unwrap_or(TensorId::NONE),
            _ => a,
        }
    }

    /// What a node reads, views seen through.
    #[inline]
    pub(super) fn reads(&self, node: TensorId) -> impl Iterator<Item = TensorId> + '_ {
        let sources = self.get(node).sources();
        sources.map(|source| self.viewed(source))
    }

    // views

    /// `ggml_view_4d`; strides `nb` are those of dimensions 1 to 3.
    pub(super) fn view(&mut self, a: TensorId, ne: [i64; 4], nb: [i64; 3]) -> TensorId {
        let (element, root, viewed) = (self.element(a), self.root(a), self.viewed(a));
        let (id, tensor) = self.fresh(Op::View, element, ne);
        let [b1, b2, b3] = nb;
        let [b0, ..] = tensor.nb;
        tensor.nb = [b0, b1, b2, b3];
        tensor.view_of = root;
        tensor.read(&[viewed]);
        id
    }

    /// `ggml_view_1d`.
    pub(super) fn view_1d(&mut self, a: TensorId, n: i64) -> TensorId {
        let (element, root, viewed) = (self.element(a), self.root(a), self.viewed(a));
        let (id, tensor) = self.fresh(Op::View, element, [n, 1, 1, 1]);
        tensor.view_of = root;
        tensor.read(&[viewed]);
        id
    }

    /// `ggml_view_2d`.
    pub(super) fn view_2d(&mut self, a: TensorId, n0: i64, n1: i64, b1: i64) -> TensorId {
        let b2 = b1.saturating_mul(n1);
        self.view(a, [n0, n1, 1, 1], [b1, b2, b2])
    }

    /// `ggml_view_3d`.
    pub(super) fn view_3d(&mut self, a: TensorId, ne: [i64; 3], nb: [i64; 2]) -> TensorId {
        let ([n0, n1, n2], [b1, b2]) = (ne, nb);
        self.view(a, [n0, n1, n2, 1], [b1, b2, b2.saturating_mul(n2)])
    }

    pub(super) fn reshape(&mut self, a: TensorId, ne: [i64; 4]) -> TensorId {
        let (element, root, viewed) = (self.element(a), self.root(a), self.viewed(a));
        let (id, tensor) = self.fresh(Op::View, element, ne);
        tensor.view_of = root;
        tensor.read(&[viewed]);
        id
    }

    pub(super) fn reshape_2d(&mut self, a: TensorId, n0: i64, n1: i64) -> TensorId {
        self.reshape(a, [n0, n1, 1, 1])
    }

    pub(super) fn reshape_3d(&mut self, a: TensorId, n0: i64, n1: i64, n2: i64) -> TensorId {
        self.reshape(a, [n0, n1, n2, 1])
    }

    /// `ggml_permute`: dimension `i` of `a` becomes dimension `axes[i]`.
    pub(super) fn permute(&mut self, a: TensorId, axes: [usize; 4]) -> TensorId {
        let id = self.over(Op::View, a, &[self.viewed(a)]);
        let source = self.get(a);
        let (mut ne, mut nb) = (source.ne, source.nb);
        for ((axis, n), b) in axes.into_iter().zip(source.ne).zip(source.nb) {
            if let (Some(to_ne), Some(to_nb)) = (ne.get_mut(axis), nb.get_mut(axis)) {
                *to_ne = n;
                *to_nb = b;
            }
        }
        self.set_layout(id, ne, nb);
        id
    }

    pub(super) fn transpose(&mut self, a: TensorId) -> TensorId {
        let id = self.over(Op::View, a, &[self.viewed(a)]);
        let ([n0, n1, n2, n3], [b0, b1, b2, b3]) = (self.ne(a), self.nb(a));
        self.set_layout(id, [n1, n0, n2, n3], [b1, b0, b2, b3]);
        id
    }

    fn set_layout(&mut self, id: TensorId, ne: [i64; 4], nb: [i64; 4]) {
        if let Some(tensor) = self.tensors.get_mut(id.index()) {
            tensor.ne = ne;
            tensor.nb = nb;
        }
    }

    // operations that may write over a source

    /// Add, sub, mul, div: the shape of `a`.
    pub(super) fn add(&mut self, a: TensorId, b: TensorId) -> TensorId {
        self.like(Op::InPlace, a, &[a, b])
    }

    /// `ggml_add_inplace`: a view of `a` that is computed.
    pub(super) fn add_over(&mut self, a: TensorId, b: TensorId) -> TensorId {
        self.over(Op::InPlace, a, &[a, b])
    }

    pub(super) fn mul(&mut self, a: TensorId, b: TensorId) -> TensorId {
        self.like(Op::InPlace, a, &[a, b])
    }

    pub(super) fn add_id(&mut self, a: TensorId, b: TensorId, ids: TensorId) -> TensorId {
        self.like(Op::InPlace, a, &[a, b, ids])
    }

    /// Scale, clamp, fill, sqr, sqrt, log and the unary activations.
    pub(super) fn unary(&mut self, a: TensorId) -> TensorId {
        self.like(Op::InPlace, a, &[a])
    }

    /// `ggml_scale_inplace`: a view that is computed.
    pub(super) fn unary_over(&mut self, a: TensorId) -> TensorId {
        self.over(Op::InPlace, a, &[a])
    }

    pub(super) fn rms_norm(&mut self, a: TensorId) -> TensorId {
        self.like(Op::InPlace, a, &[a])
    }

    /// `ggml_soft_max_ext` with `ggml_soft_max_add_sinks`.
    pub(super) fn soft_max(&mut self, a: TensorId, mask: TensorId, sinks: TensorId) -> TensorId {
        self.like(Op::InPlace, a, &[a, mask, sinks])
    }

    pub(super) fn rope(&mut self, a: TensorId, positions: TensorId, factors: TensorId) -> TensorId {
        self.like(Op::Rope, a, &[a, positions, factors])
    }

    // operations with memory of their own

    /// `ggml_norm`, `ggml_l2_norm`.
    pub(super) fn norm(&mut self, a: TensorId) -> TensorId {
        self.like(Op::Other, a, &[a])
    }

    pub(super) fn cont(&mut self, a: TensorId) -> TensorId {
        self.like(Op::Other, a, &[a])
    }

    pub(super) fn cont_as(&mut self, a: TensorId, ne: [i64; 4]) -> TensorId {
        let element = self.element(a);
        self.result(Op::Other, element, ne, &[a])
    }

    pub(super) fn cast(&mut self, a: TensorId, element: GgmlType) -> TensorId {
        let ne = self.ne(a);
        let id = self.result(Op::Other, element, ne, &[a]);
        // ggml_cast names the result as its own second source
        if let Some(tensor) = self.tensors.get_mut(id.index()) {
            tensor.read(&[a, id]);
        }
        id
    }

    /// `ggml_cpy`: a view of the destination.
    pub(super) fn copy_into(&mut self, a: TensorId, destination: TensorId) -> TensorId {
        self.over(Op::Other, destination, &[a, destination])
    }

    /// `ggml_set_rows`: a view of the destination.
    pub(super) fn set_rows(
        &mut self,
        destination: TensorId,
        rows: TensorId,
        ids: TensorId,
    ) -> TensorId {
        self.over(Op::Other, destination, &[rows, ids, destination])
    }

    pub(super) fn get_rows(&mut self, a: TensorId, ids: TensorId) -> TensorId {
        let element = if self.element(a) == GgmlType::I32 {
            GgmlType::I32
        } else {
            GgmlType::F32
        };
        let ([n0, ..], [i0, i1, i2, _]) = (self.ne(a), self.ne(ids));
        self.result(Op::GetRows, element, [n0, i0, i1, i2], &[a, ids])
    }

    pub(super) fn mul_mat(&mut self, a: TensorId, b: TensorId) -> TensorId {
        let ([_, a1, ..], [_, b1, b2, b3]) = (self.ne(a), self.ne(b));
        self.result(Op::MulMat, GgmlType::F32, [a1, b1, b2, b3], &[a, b])
    }

    pub(super) fn mul_mat_id(&mut self, experts: TensorId, b: TensorId, ids: TensorId) -> TensorId {
        let ([_, e1, ..], [_, _, b2, _], [i0, ..]) = (self.ne(experts), self.ne(b), self.ne(ids));
        self.result(
            Op::MulMatId,
            GgmlType::F32,
            [e1, i0, b2, 1],
            &[experts, b, ids],
        )
    }

    /// `ggml_glu_split`: gate and up apart.
    pub(super) fn glu(&mut self, gate: TensorId, up: TensorId) -> TensorId {
        self.like(Op::Other, gate, &[gate, up])
    }

    /// `ggml_glu`: gate and up side by side in one tensor.
    pub(super) fn glu_halves(&mut self, a: TensorId) -> TensorId {
        let (element, [n0, n1, n2, n3]) = (self.element(a), self.ne(a));
        self.result(Op::Other, element, [n0 / 2, n1, n2, n3], &[a])
    }

    /// `ggml_argsort_top_k`: the whole order is kept, the answer is a view of it.
    pub(super) fn argsort_top_k(&mut self, a: TensorId, k: i64) -> TensorId {
        let ne = self.ne(a);
        let order = self.result(Op::Other, GgmlType::I32, ne, &[a]);
        let ([_, n1, n2, n3], [_, b1, b2, b3]) = (ne, self.nb(order));
        self.view(order, [k, n1, n2, n3], [b1, b2, b3])
    }

    pub(super) fn top_k(&mut self, a: TensorId, k: i64) -> TensorId {
        let [_, n1, n2, n3] = self.ne(a);
        self.result(Op::Other, GgmlType::I32, [k, n1, n2, n3], &[a])
    }

    pub(super) fn sum_rows(&mut self, a: TensorId) -> TensorId {
        let (element, [_, n1, n2, n3]) = (self.element(a), self.ne(a));
        self.result(Op::Other, element, [1, n1, n2, n3], &[a])
    }

    pub(super) fn repeat(&mut self, a: TensorId, ne: [i64; 4]) -> TensorId {
        let element = self.element(a);
        self.result(Op::Other, element, ne, &[a])
    }

    /// `ggml_pad`: more elements at the end of each dimension.
    pub(super) fn pad(&mut self, a: TensorId, by: [i64; 4]) -> TensorId {
        let (element, [n0, n1, n2, n3], [p0, p1, p2, p3]) = (self.element(a), self.ne(a), by);
        self.result(
            Op::Other,
            element,
            [n0 + p0, n1 + p1, n2 + p2, n3 + p3],
            &[a],
        )
    }

    pub(super) fn concat(&mut self, a: TensorId, b: TensorId, dimension: usize) -> TensorId {
        let (element, mut ne, more) = (self.element(a), self.ne(a), self.ne(b));
        if let (Some(n), Some(m)) = (ne.get_mut(dimension), more.get(dimension)) {
            *n = n.saturating_add(*m);
        }
        self.result(Op::Other, element, ne, &[a, b])
    }

    /// `ggml_gated_delta_net`: outputs and, behind them, the new states.
    pub(super) fn delta_net(&mut self, sources: [TensorId; 6]) -> TensorId {
        let [_, _, v, ..] = sources;
        let [length, heads, tokens, seqs] = self.ne(v);
        let rows = tokens
            .saturating_mul(seqs)
            .saturating_add(length.saturating_mul(seqs));
        self.result(
            Op::Other,
            GgmlType::F32,
            [length * heads, rows, 1, 1],
            &sources,
        )
    }

    /// `ggml_ssm_conv`.
    pub(super) fn ssm_conv(&mut self, x: TensorId, kernel: TensorId) -> TensorId {
        let ([x0, _, x2, _], [k0, k1, ..]) = (self.ne(x), self.ne(kernel));
        self.result(
            Op::Other,
            GgmlType::F32,
            [k1, x0 - k0 + 1, x2, 1],
            &[x, kernel],
        )
    }

    /// `ggml_ssm_scan`: the outputs and, behind them, the new states.
    pub(super) fn ssm_scan(&mut self, [s, x, dt, a, b, c, ids]: [TensorId; 7]) -> TensorId {
        let [s0, s1, s2, _] = self.ne(s);
        let states = s0
            .saturating_mul(s1)
            .saturating_mul(s2)
            .saturating_mul(self.ne(ids)[0]);
        let elements = self.get(x).elements().saturating_add(states);
        self.result(
            Op::Other,
            GgmlType::F32,
            [elements, 1, 1, 1],
            &[s, x, dt, a, b, c, ids],
        )
    }

    pub(super) fn flash_attention(&mut self, [q, k, v, mask, sinks]: [TensorId; 5]) -> TensorId {
        let ([_, q1, q2, q3], [v0, ..]) = (self.ne(q), self.ne(v));
        self.result(
            Op::FlashAttention,
            GgmlType::F32,
            [v0, q2, q1, q3],
            &[q, k, v, mask, sinks],
        )
    }

    // order

    /// `ggml_build_forward_expand`: `id` and what it needs join the graph, sources first, left to right.
    pub(super) fn expand(&mut self, id: TensorId) {
        let Some(tensor) = self.tensors.get_mut(id.index()) else {
            return;
        };
        if tensor.visited {
            return;
        }
        tensor.visited = true;
        let (sources, op, count) = (tensor.sources, tensor.op, tensor.source_count);
        for source in sources.into_iter().take(usize::from(count)) {
            self.expand(source);
        }
        match op {
            Op::Leaf => self.leaves.push(id),
            Op::View => {}
            _ => self.nodes.push(id),
        }
    }
}
