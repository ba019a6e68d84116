//! Recurrent states (`llama-graph.cpp`, `build_rs`).

use crate::gguf::GgmlType;

use super::builder::Builder;
use super::tensor::{Storage, TensorId};

/// Which states the batch's sequences start from.
#[derive(Clone, Copy, Debug)]
pub(super) struct StateInput {
    main: TensorId,
    extra: TensorId,
}

impl Builder<'_> {
    /// `build_rs_inp`.
    pub(super) fn state_input(&mut self) -> StateInput {
        let copies = self.g.input(GgmlType::I32, [self.n_seqs, 1, 1, 1]);
        let main = self.g.view_1d(copies, self.n_seqs);
        let extra = self.g.view_1d(copies, 0);
        StateInput { main, extra }
    }

    /// A layer's states, one row per slot.
    pub(super) fn state(&mut self, elements: u64) -> TensorId {
        let backend = self.batch.state_backend(self.layer());
        let width = i64::try_from(elements).unwrap_or(0);
        self.g.stored(
            GgmlType::F32,
            [width, self.n_seqs, 1, 1],
            Storage::State(backend),
        )
    }

    /// The layer's convolution (or token shift) states.
    pub(super) fn convolution_state(&mut self) -> TensorId {
        self.state(self.hyper.convolution_state)
    }

    /// The layer's recurrent states.
    pub(super) fn recurrent_state(&mut self) -> TensorId {
        self.state(self.hyper.recurrent_state)
    }

    /// `build_rs`: the batch's rows of `states`, looked up or whatever `read` does with them.
    pub(super) fn read_state(
        &mut self,
        input: StateInput,
        states: TensorId,
        read: impl FnOnce(&mut Self, TensorId, TensorId) -> TensorId,
    ) -> TensorId {
        let [width, rows, ..] = self.g.ne(states);
        let flat = self.g.reshape_2d(states, width, rows);
        // the dry run clears the first row, as if its slot had just been taken
        let first = self.g.view_1d(flat, width);
        let cleared = self.g.unary_over(first);
        self.g.expand(cleared);
        let out = read(self, flat, input.main);
        self.g.expand(out);
        let extra = self.g.get_rows(flat, input.extra);
        let row = self.g.nb(states)[1];
        let rest = self.g.view_2d(states, width, 0, row);
        let copied = self.g.copy_into(extra, rest);
        self.g.expand(copied);
        out
    }

    /// The batch's rows of `states`.
    pub(super) fn rows_of_state(&mut self, input: StateInput, states: TensorId) -> TensorId {
        self.read_state(input, states, |b, states, ids| b.g.get_rows(states, ids))
    }

    /// Writes `from` over the first rows of `states`.
    pub(super) fn keep_state(&mut self, from: TensorId, states: TensorId) {
        let ([width, ..], row) = (self.g.ne(states), self.g.nb(states)[1]);
        let target = self.g.view_2d(states, width, self.n_seqs, row);
        let kept = self.g.copy_into(from, target);
        self.g.expand(kept);
    }
}
