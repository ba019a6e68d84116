//! Operations that need no node of their own.
//!
//! An operation that writes over its source, which nothing else reads, takes no place and gives none back. Where all nodes run on one
//! backend, nothing else depends on it either: it is left out, and what would read it reads its source. What else it reads must live on
//! without it, as weights do, or is read by what made the source. Of most models' nodes that is a fifth to a half.

use super::ops::Graph;
use super::tensor::{Op, Storage, TensorId};

impl Graph {
    /// Whether an operation made `a`, in a place of its own and where the others run; flash attention may run on the host all the same, and
    /// rows of a table there are picked there.
    pub(super) fn is_made(&self, a: TensorId) -> bool {
        let tensor = self.get(a);
        match tensor.op {
            Op::Leaf | Op::View | Op::FlashAttention => false,
            Op::GetRows => {
                let [table, ..] = tensor.sources;
                let lies = self.get(table).storage.backend();
                !tensor.is_view() && lies.is_none_or(|backend| backend == 0)
            }
            _ => !tensor.is_view(),
        }
    }

    #[cfg_attr(test, track_caller)]
    fn merged(&mut self, a: TensorId, sources: &[TensorId]) -> TensorId {
        if self.merges && self.is_made(a) {
            return a;
        }
        let id = self.like(Op::InPlace, a, sources);
        #[cfg(test)]
        self.alone.push((id, std::panic::Location::caller()));
        id
    }

    /// [`unary`](Self::unary), or [`rms_norm`](Self::rms_norm), of what nothing else reads.
    #[cfg_attr(test, track_caller)]
    pub(super) fn unary_alone(&mut self, a: TensorId) -> TensorId {
        self.merged(a, &[a])
    }

    /// [`add`](Self::add) or [`mul`](Self::mul) of a weight to what nothing else reads; a weight of another backend would draw the
    /// operation there.
    #[cfg_attr(test, track_caller)]
    pub(super) fn weigh(&mut self, a: TensorId, weight: TensorId) -> TensorId {
        if self.get(self.root(weight)).storage == Storage::Weights(0) {
            self.merged(a, &[a, weight])
        } else {
            self.add(a, weight)
        }
    }

    /// [`add`](Self::add) of something that `a` was made from, to `a`, which nothing else reads. What made `a` reads it, too: it ends there
    /// as it would one step later. Rows that a layer picks for the output are picked from both, neither made from the other.
    #[cfg_attr(test, track_caller)]
    pub(super) fn add_back(&mut self, a: TensorId, earlier: TensorId) -> TensorId {
        if self.merges
            && self.may_add_back(a, earlier)
            && let Some(tensor) = self.get_mut(a)
            && tensor.reads_also(earlier)
        {
            return a;
        }
        #[cfg(test)]
        let joins = self.may_add_back(self.made_alone(a).0, earlier);
        let id = self.add(a, earlier);
        #[cfg(test)]
        if joins {
            self.alone.push((id, std::panic::Location::caller()));
            self.added_back.push(id);
        }
        id
    }

    fn may_add_back(&self, a: TensorId, earlier: TensorId) -> bool {
        let layer = self.marks.last().map_or(0, |mark| mark.tensors);
        let picks = |id: &TensorId| self.get(*id).op == Op::GetRows && id.index() >= layer;
        let reuses = self.get(a).op.can_reuse_source();
        self.is_made(a) && !reuses && ![a, earlier].iter().any(picks)
    }

    /// What `id` would be one with, and after how many operations.
    #[cfg(test)]
    pub(super) fn made_alone(&self, mut id: TensorId) -> (TensorId, usize) {
        let mut steps = 0;
        while self.alone.iter().any(|(of, _)| *of == id) {
            id = self.get(id).sources[0];
            steps += 1;
        }
        (id, steps)
    }

    /// How many to build of so many alike steps, each of which leaves the free blocks as it found them: the second takes what all
    /// later ones do.
    pub(super) fn alike(&self, steps: i64) -> i64 {
        if self.merges { steps.min(2) } else { steps }
    }
}
