//! Hierarchical reasoning: two stacks of layers that run in cycles over the same tokens (`hrm-text.cpp`).

use super::super::attention::{AttentionInput, Extras};
use super::super::builder::{Activation, Builder};
use super::super::repeats::LONGEST_PERIOD;
use super::super::tensor::TensorId;

/// Where a layer stands: llama.cpp numbers every run of a layer, for each has a cache of its own.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// The layer whose weights run.
    block: usize,
    /// It begins, it ends a run of its stack.
    first: bool,
    last: bool,
    /// The stack is the slow one.
    high: bool,
}

/// The layers of one stack and the runs of the fast stack before each run of the slow one.
#[derive(Clone, Copy, Debug)]
struct Cycles {
    layers: usize,
    low: usize,
}

impl Cycles {
    fn of(b: &Builder<'_>) -> Self {
        let positive = |key: &str| usize::try_from(b.number(key, 1)).unwrap_or(1).max(1);
        Self {
            layers: positive("hrm.layers_per_stack").min(b.trunk().max(1)),
            low: positive("hrm.l_cycles"),
        }
    }

    /// Layers of a cycle.
    fn length(self) -> usize {
        self.layers.saturating_mul(self.low.saturating_add(1))
    }

    fn place(self, il: usize) -> Place {
        let (run, within) = (il / self.layers, il % self.layers);
        let high = (run + 1).is_multiple_of(self.low.saturating_add(1));
        Place {
            block: within + if high { self.layers } else { 0 },
            first: within == 0,
            last: within + 1 == self.layers,
            high,
        }
    }
}

pub(super) fn hrm(b: &mut Builder<'_>) {
    let cycles = Cycles::of(b);
    let mut high = b.embeddings();
    let positions = b.positions();
    let attention = b.attention_input();
    let outputs = b.output_ids();
    let mut low = b.first_weight("hrm.z_l_init");
    let mut cur = high;
    let (model, batch) = (b.model, b.batch);
    let kind = |il: usize| {
        let place = cycles.place(il);
        let flags = [place.first, place.last, place.high];
        let kind =
            (model.kind(place.block) as u64) << 8 | u64::from(batch.layer_backend(place.block));
        flags
            .iter()
            .fold(kind, |bits, flag| bits * 2 + u64::from(*flag))
    };
    b.know_weights(cycles.layers * 2);
    let layers = if cycles.length() <= LONGEST_PERIOD {
        // a run reads what the slow stack gave before the runs of the fast one
        b.layers_far_reading(cycles.layers * cycles.low + 1, kind)
    } else {
        b.layers_by(|il| kind(il) << 16 | (il / cycles.layers) as u64)
    };
    for il in layers {
        let place = cycles.place(il);
        b.enter_with_weights_of(il, place.block);
        if place.first {
            cur = b.g.add(high, low);
        }
        cur = layer(b, cur, positions, attention);
        if place.last {
            cur = b.g.rms_norm(cur);
            *(if place.high { &mut high } else { &mut low }) = cur;
        }
    }
    let cur = b.g.get_rows(high, outputs);
    b.finish(cur, 0);
}

/// Norms have no weights; attention has a gate.
fn layer(
    b: &mut Builder<'_>,
    input: TensorId,
    positions: TensorId,
    attention: AttentionInput,
) -> TensorId {
    let normed = b.g.rms_norm(input);
    let gate = b.matmul("attn_gate", normed);
    let [q, k, v] = b.qkv(normed);
    let q = b.rope(q, positions);
    let k = b.rope(k, positions);
    let cur = b.attend(
        attention,
        [q, k, v],
        Extras {
            output: "",
            ..Extras::default()
        },
    );
    let gate = b.g.unary_alone(gate);
    let cur = b.g.mul(cur, gate);
    let cur = b.project("attn_output", cur);
    let middle = b.g.add_back(cur, input);
    let normed = b.g.rms_norm(middle);
    let fed = b.ffn(normed, Activation::Gated);
    b.g.add_back(fed, middle)
}
