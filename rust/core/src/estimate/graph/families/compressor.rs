//! Compressors of `DeepSeek` V4: of every so many positions one key is made, across batches (`deepseek4.cpp`;
//! `llama-kv-cache-dsv4.cpp`, `dsv4_build_reserve_comp_plan`).

use super::super::builder::Builder;
use super::super::tensor::{Storage, TensorId};
use super::deepseek4::PICKED_RATIO;
use crate::gguf::GgmlType;

/// The weights of a compressor.
#[derive(Clone, Copy)]
pub(super) struct Names {
    values: &'static str,
    gate: &'static str,
    places: &'static str,
    norm: &'static str,
}

/// Of attention's.
pub(super) const ATTENTION: Names = Names {
    values: "attn_compressor_kv",
    gate: "attn_compressor_gate",
    places: "attn_compressor_ape",
    norm: "attn_compressor_norm",
};

/// Of the indexer's.
pub(super) const INDEXER: Names = Names {
    values: "indexer_compressor_kv",
    gate: "indexer_compressor_gate",
    places: "indexer_compressor_ape",
    norm: "indexer_compressor_norm",
};

/// The inputs of one kind of compressor.
#[derive(Clone, Copy)]
pub(super) struct Compressor {
    ratio: i64,
    /// Blocks share half of what they read with the one before.
    overlaps: bool,
    /// Keys that a batch gives at most.
    blocks: i64,
    /// Rows of the state, all slots together.
    state_rows: i64,
    places: TensorId,
    kept_from: TensorId,
    kept_to: TensorId,
    read: TensorId,
    /// Rows of the cache that are written.
    pub(super) rows: TensorId,
    positions: TensorId,
}

/// What is compressed: the batch's values and scores, alone and behind the state's.
#[derive(Clone, Copy)]
pub(super) struct Source {
    batch: [TensorId; 2],
    states: [TensorId; 2],
    all: [TensorId; 2],
}

impl Compressor {
    pub(super) fn of(b: &mut Builder<'_>, ratio: u32) -> Self {
        let overlaps = ratio == PICKED_RATIO;
        let ratio = i64::from(ratio);
        let (n_tokens, slots) = (b.n_tokens, b.n_seqs);
        let halves = if overlaps { 2 } else { 1 };
        let blocks = n_tokens / ratio + slots;
        let state_rows = halves * ratio * slots;
        let kept = n_tokens.min(state_rows);
        let mut input = |element, n| b.g.input(element, [n, 1, 1, 1]);
        Self {
            ratio,
            overlaps,
            blocks,
            state_rows,
            places: input(GgmlType::I32, n_tokens),
            kept_from: input(GgmlType::I32, kept),
            kept_to: input(GgmlType::I32, kept),
            read: input(GgmlType::I32, halves * ratio * blocks),
            rows: input(GgmlType::I64, blocks),
            positions: input(GgmlType::I32, blocks),
        }
    }

    /// `build_overlap_compressed_kv_from_state`, `build_hca_compressed_kv_from_state`.
    pub(super) fn compressed(
        self,
        b: &mut Builder<'_>,
        source: Source,
        names: Names,
        length: i64,
    ) -> TensorId {
        let parts = source.all.map(|part| {
            if self.overlaps {
                let part = with_empty_row(b, part);
                let rows = b.g.get_rows(part, self.read);
                let former = self.half(b, rows, length);
                let latter = self.half(b, rows, length);
                b.g.concat(former, latter, 1)
            } else {
                let rows = b.g.get_rows(part, self.read);
                b.g.reshape_3d(rows, length, self.ratio, self.blocks)
            }
        });
        let [values, scores] = parts.map(|part| {
            let turned = b.g.permute(part, [1, 0, 2, 3]);
            b.g.cont(turned)
        });
        let shares = b.g.unary_alone(scores);
        let sum = b.g.mul(values, shares);
        let sum = b.g.sum_rows(sum);
        let sum = b.g.permute(sum, [1, 0, 2, 3]);
        let sum = b.g.cont(sum);
        let normed = b.rms_alone(sum, names.norm);
        b.rope(normed, self.positions)
    }

    fn half(self, b: &mut Builder<'_>, rows: TensorId, length: i64) -> TensorId {
        let stride = b.g.nb(rows)[1];
        let half = b.g.view_2d(rows, length, self.ratio * self.blocks, stride);
        let half = b.g.cont(half);
        b.g.reshape_3d(half, length, self.ratio, self.blocks)
    }

    /// The end of the batch becomes the state.
    pub(super) fn keep(self, b: &mut Builder<'_>, source: Source) {
        let rows = source.batch.map(|part| b.g.get_rows(part, self.kept_from));
        let [values, scores] = source.states.map(|state| self.rows_of(b, state));
        let [new_values, new_scores] = rows;
        for (all, rows) in [(values, new_values), (scores, new_scores)] {
            let stored = b.g.set_rows(all, rows, self.kept_to);
            b.g.expand(stored);
        }
    }

    fn rows_of(self, b: &mut Builder<'_>, state: TensorId) -> TensorId {
        let (width, stride) = (b.g.ne(state)[0], b.g.nb(state)[1]);
        b.g.view_2d(state, width, self.state_rows, stride)
    }
}

impl Source {
    pub(super) fn of(b: &mut Builder<'_>, normed: TensorId, c: Compressor, names: Names) -> Self {
        let [values, scores] = [names.values, names.gate].map(|name| b.matmul(name, normed));
        let places = b.weight(names.places);
        let places = b.g.get_rows(places, c.places);
        let scores = b.g.add(scores, places);
        let batch = [values, scores];
        let storage = Storage::State(b.batch.state_backend(b.layer()));
        let states = batch.map(|part| {
            let ne = [b.g.ne(part)[0], c.state_rows, 1, 1];
            b.g.stored(GgmlType::F32, ne, storage)
        });
        let [old_values, old_scores] = states.map(|state| {
            let all = c.rows_of(b, state);
            c.rows_of(b, all)
        });
        Self {
            batch,
            states,
            all: [
                b.g.concat(old_values, values, 1),
                b.g.concat(old_scores, scores, 1),
            ],
        }
    }
}

/// `dsv4_append_zero_row`.
fn with_empty_row(b: &mut Builder<'_>, rows: TensorId) -> TensorId {
    let width = b.g.ne(rows)[0];
    let row = b.g.view_1d(rows, width);
    let row = b.g.unary_alone(row);
    let row = b.g.reshape_2d(row, width, 1);
    b.g.concat(rows, row, 1)
}
