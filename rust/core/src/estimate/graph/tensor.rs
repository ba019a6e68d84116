//! The graph's tensors: what ggml keeps of one, less its data.

use crate::gguf::GgmlType;

/// Bytes of one element, or of one block (`ggml_type_size`).
pub(super) fn unit_bytes(element: GgmlType) -> i64 {
    i64::try_from(element.block_bytes()).unwrap_or(1)
}

/// Elements of one block (`ggml_blck_size`).
pub(super) fn block_elements(element: GgmlType) -> i64 {
    i64::try_from(element.block_elements()).unwrap_or(1).max(1)
}

/// Bytes of a row of `elements` (`ggml_row_size`).
pub(super) fn row_bytes(element: GgmlType, elements: i64) -> i64 {
    per_block(elements.saturating_mul(unit_bytes(element)), element)
}

/// Divides by the elements of a block, which are few types' more than one.
fn per_block(number: i64, element: GgmlType) -> i64 {
    match block_elements(element) {
        1 => number,
        elements => number / elements,
    }
}

/// A tensor of a [`Graph`](super::Graph), by its place in the arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TensorId(pub(super) u32);

impl TensorId {
    /// No tensor.
    pub(super) const NONE: Self = Self(u32::MAX);

    pub(super) fn is_some(self) -> bool {
        self != Self::NONE
    }

    pub(super) fn index(self) -> usize {
        self.0 as usize
    }
}

/// What a node computes, in as few kinds as the allocator and the scheduler tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    /// No operation: a weight, a cache, an input.
    Leaf,
    /// View, reshape, permute, transpose: no memory, never scheduled.
    View,
    /// An operation that may write over one of its sources (`ggml_op_can_inplace`).
    InPlace,
    /// Rotary embedding: may write over its source, and never follows a weight's device.
    Rope,
    MulMat,
    MulMatId,
    GetRows,
    FlashAttention,
    /// Everything that needs memory of its own.
    Other,
}

impl Op {
    pub(super) fn can_reuse_source(self) -> bool {
        matches!(self, Self::InPlace | Self::Rope)
    }
}

/// Where a tensor's bytes lie before the graph is planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Storage {
    /// The planner finds a place.
    Planned,
    /// A weight on backend `.0`.
    Weights(u8),
    /// A weight on backend `.0` that no other can read: repacked for the CPU.
    Repacked(u8),
    /// A cache or state on backend `.0`.
    State(u8),
}

impl Storage {
    pub(super) fn backend(self) -> Option<u8> {
        match self {
            Self::Planned => None,
            Self::Weights(backend) | Self::Repacked(backend) | Self::State(backend) => {
                Some(backend)
            }
        }
    }
}

/// The most sources an operation has of those that are built (`GGML_MAX_SRC` is 10).
pub(super) const MAX_SOURCES: usize = 8;

/// What the scheduler and the allocator ask for again and again lies in one cache line.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub(super) struct Tensor {
    pub(super) op: Op,
    pub(super) element: GgmlType,
    pub(super) storage: Storage,
    pub(super) is_input: bool,
    pub(super) is_output: bool,
    pub(super) visited: bool,
    pub(super) source_count: u8,
    pub(super) view_of: TensorId,
    pub(super) sources: [TensorId; MAX_SOURCES],
    /// What [`bytes`](Self::bytes) says while it has a place of its own: strides change in views only.
    pub(super) own_bytes: i64,
    /// Elements per dimension.
    pub(super) ne: [i64; 4],
    /// Bytes between neighbours, per dimension.
    pub(super) nb: [i64; 4],
}

impl Tensor {
    /// Nothing.
    pub(super) const EMPTY: Self = Self {
        op: Op::Leaf,
        element: GgmlType::F32,
        storage: Storage::Planned,
        is_input: false,
        is_output: false,
        visited: true,
        source_count: 0,
        view_of: TensorId::NONE,
        sources: [TensorId::NONE; MAX_SOURCES],
        own_bytes: 0,
        ne: [0; 4],
        nb: [0; 4],
    };

    /// Becomes a contiguous tensor without sources, as `ggml_new_tensor_4d` makes them; in its place, for copies are what building a
    /// graph takes most of its time for.
    #[inline]
    pub(super) fn begin(&mut self, op: Op, element: GgmlType, ne: [i64; 4]) {
        let [n0, n1, n2, n3] = ne;
        let unit = unit_bytes(element);
        let row = unit.saturating_mul(per_block(n0, element));
        let plane = row.saturating_mul(n1);
        let cube = plane.saturating_mul(n2);
        self.op = op;
        self.element = element;
        self.storage = Storage::Planned;
        self.is_input = false;
        self.is_output = false;
        self.visited = false;
        self.source_count = 0;
        self.view_of = TensorId::NONE;
        self.ne = [n0, n1, n2, n3];
        self.nb = [unit, row, plane, cube];
        self.own_bytes = if block_elements(element) == 1 {
            cube.saturating_mul(n3).max(0)
        } else {
            self.bytes()
        };
    }

    /// Absent sources (no mask, no bias) are left out: nothing depends on a source's number, only on the order.
    #[inline]
    pub(super) fn read(&mut self, sources: &[TensorId]) {
        self.source_count = 0;
        for source in sources.iter().filter(|source| source.is_some()) {
            if let Some(slot) = self.sources.get_mut(usize::from(self.source_count)) {
                *slot = *source;
                self.source_count += 1;
            }
        }
    }

    /// One more source behind the others; false where there is no room, or where it has joined the graph.
    pub(super) fn reads_also(&mut self, source: TensorId) -> bool {
        let slot = self.sources.get_mut(usize::from(self.source_count));
        let Some(slot) = slot.filter(|_| !self.visited) else {
            return false;
        };
        *slot = source;
        self.source_count += 1;
        true
    }

    pub(super) fn sources(&self) -> impl Iterator<Item = TensorId> + '_ {
        self.sources
            .iter()
            .copied()
            .take(usize::from(self.source_count))
    }

    pub(super) fn is_view(&self) -> bool {
        self.view_of.is_some()
    }

    pub(super) fn elements(&self) -> i64 {
        self.ne
            .iter()
            .fold(1, |product: i64, n| product.saturating_mul(*n))
    }

    /// Rows, as `ggml_nrows`.
    pub(super) fn rows(&self) -> i64 {
        let [_, a, b, c] = self.ne;
        a.saturating_mul(b).saturating_mul(c)
    }

    pub(super) fn is_contiguous(&self) -> bool {
        // a dimension of one element may have any stride (ggml_is_contiguous_n)
        let expected = contiguous_strides(self.element, self.ne);
        self.ne
            .iter()
            .zip(self.nb)
            .zip(expected)
            .all(|((n, stride), want)| *n == 1 || stride == want)
    }

    pub(super) fn same_layout(&self, other: &Self) -> bool {
        self.element == other.element && self.ne == other.ne && self.nb == other.nb
    }

    /// Bytes from the first to the last element, as `ggml_nbytes`.
    pub(super) fn bytes(&self) -> i64 {
        if self.ne.iter().any(|n| *n <= 0) {
            return 0;
        }
        let [n0, n1, n2, n3] = self.ne;
        let [b0, b1, b2, b3] = self.nb;
        let first = if self.element.is_quantized() {
            per_block(n0.saturating_mul(b0), self.element)
        } else {
            unit_bytes(self.element).saturating_add((n0 - 1).saturating_mul(b0))
        };
        [(n1, b1), (n2, b2), (n3, b3)]
            .into_iter()
            .fold(first, |sum, (n, b)| {
                sum.saturating_add((n - 1).saturating_mul(b))
            })
    }
}

#[inline]
pub(super) fn contiguous_strides(element: GgmlType, ne: [i64; 4]) -> [i64; 4] {
    let [n0, n1, n2, _] = ne;
    let b0 = unit_bytes(element);
    let b1 = b0.saturating_mul(per_block(n0, element));
    let b2 = b1.saturating_mul(n1);
    [b0, b1, b2, b2.saturating_mul(n2)]
}
