//! State space layers (`src/models/mamba-base.cpp`, `plamo2.cpp`) and short convolutions (`lfm2.cpp`).

use super::super::builder::{Builder, NONE};
use super::super::states::StateInput;
use super::super::tensor::TensorId;

/// The sizes of a state space layer.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    kernel: i64,
    inner: i64,
    state: i64,
    /// Heads (Mamba 2), or the rank of the time step (Mamba 1).
    rank: i64,
    groups: i64,
    tokens: i64,
    seqs: i64,
}

impl Sizes {
    fn of(b: &Builder<'_>) -> Self {
        Self {
            kernel: b.number("ssm.conv_kernel", 1),
            inner: b.number("ssm.inner_size", 1),
            state: b.number("ssm.state_size", 1),
            rank: b.number("ssm.time_step_rank", 1).max(1),
            groups: b.number("ssm.group_count", 0),
            tokens: b.n_tokens / b.n_seqs,
            seqs: b.n_seqs,
        }
    }

    /// Channels that the convolution runs over.
    fn channels(self) -> i64 {
        self.inner + 2 * self.groups * self.state
    }
}

/// The convolution states before `x`, which is `[channels, tokens, seqs]`; what the next batch needs is kept.
fn convolve(
    b: &mut Builder<'_>,
    input: StateInput,
    x: TensorId,
    s: Sizes,
    channels: i64,
    kept: i64,
) -> TensorId {
    let states = b.convolution_state();
    let earlier = b.rows_of_state(input, states);
    let earlier = b.g.reshape_3d(earlier, s.kernel - 1, channels, s.seqs);
    let turned = b.g.transpose(x);
    let joined = b.g.concat(earlier, turned, 0);
    let [_, b1, b2, _] = b.g.nb(joined);
    let last = b.g.view_3d(joined, [s.kernel - 1, kept, s.seqs], [b1, b2]);
    b.keep_state(last, states);
    let kernel = b.weight("ssm_conv1d");
    let mut out = b.g.ssm_conv(joined, kernel);
    let bias = b.bias("ssm_conv1d");
    if bias.is_some() {
        out = b.g.weigh(out, bias);
    }
    b.g.unary_alone(out)
}

/// Runs the scan and keeps its states; the result's first part are the outputs.
fn scan(
    b: &mut Builder<'_>,
    input: StateInput,
    [x, dt, a, bb, c]: [TensorId; 5],
    s: Sizes,
    heads: [i64; 2],
) -> TensorId {
    let states = b.recurrent_state();
    let [length, count] = heads;
    let out = b.read_state(input, states, |b, states, ids| {
        let shaped = b.g.reshape(states, [s.state, length, count, s.seqs]);
        b.g.ssm_scan([shaped, x, dt, a, bb, c, ids])
    });
    let elements = s.state * s.inner;
    let last = b.g.view_2d(out, elements, s.seqs, elements * 4);
    b.keep_state(last, states);
    out
}

/// `build_mamba_layer`.
pub(super) fn mamba1(b: &mut Builder<'_>, input: StateInput, cur: TensorId) -> TensorId {
    let s = Sizes::of(b);
    let n_embd = b.g.ne(cur)[0];
    let cur = b.g.reshape_3d(cur, n_embd, s.tokens, s.seqs);
    let both = b.project("ssm_in", cur);
    let [_, b1, b2, _] = b.g.nb(both);
    let x = b.g.view_3d(both, [s.inner, s.tokens, s.seqs], [b1, b2]);
    let z = b.g.view_3d(both, [s.inner, s.tokens, s.seqs], [b1, b2]);
    let x = convolve(b, input, x, s, s.inner, s.inner);
    let [dt, bb, c] = time_steps(b, x, s);
    let dt = b.project_biased("ssm_dt", dt);
    let heads = b.g.reshape(x, [1, s.inner, s.tokens, s.seqs]);
    let a = b.exact("ssm_a");
    let out = scan(b, input, [heads, dt, a, bb, c], s, [1, s.inner]);
    let [_, _, h2, h3] = b.g.nb(heads);
    let y = b.g.view_3d(out, [s.inner, s.tokens, s.seqs], [h2, h3]);
    let d = b.exact("ssm_d");
    let skipped = b.g.mul(x, d);
    let y = b.g.add(y, skipped);
    let z = b.g.cont(z);
    let y = b.g.glu(z, y);
    let out = b.project("ssm_out", y);
    let width = b.g.ne(out)[0];
    b.g.reshape_2d(out, width, s.tokens * s.seqs)
}

/// The time step and the two state matrices of Mamba 1, normed where the model has norms for them.
fn time_steps(b: &mut Builder<'_>, x: TensorId, s: Sizes) -> [TensorId; 3] {
    let all = b.project("ssm_x", x);
    let [b0, b1, b2, _] = b.g.nb(all);
    let dt = b.g.view_3d(all, [s.rank, s.tokens, s.seqs], [b1, b2]);
    let [bb, c] = [(); 2].map(|()| {
        b.g.view(
            all,
            [s.state, 1, s.tokens, s.seqs],
            [s.state.saturating_mul(b0), b1, b2],
        )
    });
    if b.has("ssm_dt_norm") || b.model.flag("ssm.dt_b_c_rms") {
        return [
            b.rms(dt, "ssm_dt_norm"),
            b.rms(bb, "ssm_b_norm"),
            b.rms(c, "ssm_c_norm"),
        ];
    }
    [b.g.cont(dt), bb, c]
}

/// `build_mamba2_layer`.
pub(super) fn mamba2(b: &mut Builder<'_>, input: StateInput, cur: TensorId) -> TensorId {
    let s = Sizes::of(b);
    let length = s.inner / s.rank;
    let all = b.project("ssm_in", cur);
    let width = b.g.ne(all)[0];
    let all = b.g.reshape_3d(all, width, s.tokens, s.seqs);
    let [b0, b1, b2, _] = b.g.nb(all);
    let z = b.g.view(
        all,
        [length, s.rank, s.tokens, s.seqs],
        [length.saturating_mul(b0), b1, b2],
    );
    let xbc = b.g.view_3d(all, [s.channels(), s.tokens, s.seqs], [b1, b2]);
    let dt = b.g.view_3d(all, [s.rank, s.tokens, s.seqs], [b1, b2]);
    let xbc = convolve(b, input, xbc, s, s.channels(), s.channels());
    let [c0, c1, c2, _] = b.g.nb(xbc);
    let x = b.g.view(
        xbc,
        [length, s.rank, s.tokens, s.seqs],
        [length * c0, c1, c2],
    );
    let [bb, c] = [(); 2].map(|()| {
        b.g.view(
            xbc,
            [s.state, s.groups, s.tokens, s.seqs],
            [s.state * c0, c1, c2],
        )
    });
    let dt = b.g.cont(dt);
    let bias = b.bias("ssm_dt");
    let dt = b.g.weigh(dt, bias);
    let a = b.exact("ssm_a");
    let out = scan(b, input, [x, dt, a, bb, c], s, [length, s.rank]);
    let row = b.g.nb(x)[1];
    let y = b.g.view(
        out,
        [length, s.rank, s.tokens, s.seqs],
        [
            row,
            s.rank.saturating_mul(row),
            row.saturating_mul(s.rank).saturating_mul(s.tokens),
        ],
    );
    let d = b.exact("ssm_d");
    let skipped = b.g.mul(x, d);
    let y = b.g.add(y, skipped);
    let z = b.g.cont(z);
    let mut y = b.g.glu(z, y);
    if b.has("ssm_norm") {
        y =
            b.g.reshape(y, [s.inner / s.groups.max(1), s.groups, s.tokens, s.seqs]);
        y = b.rms_alone(y, "ssm_norm");
    }
    let y = b.g.reshape_2d(y, s.inner, s.tokens * s.seqs);
    b.project("ssm_out", y)
}

/// `build_plamo2_mamba_layer`.
pub(super) fn plamo2(b: &mut Builder<'_>, input: StateInput, cur: TensorId) -> TensorId {
    let s = Sizes::of(b);
    let length = s.inner / s.rank;
    let n_embd = b.g.ne(cur)[0];
    let cur = b.g.reshape_3d(cur, n_embd, s.tokens, s.seqs);
    let both = b.project("ssm_in", cur);
    let both = b.g.permute(both, [0, 2, 1, 3]);
    let both = b.g.cont_as(both, [length * 2, s.rank, s.tokens, s.seqs]);
    let [_, b1, b2, b3] = b.g.nb(both);
    let x =
        b.g.view(both, [length, s.rank, s.tokens, s.seqs], [b1, b2, b3]);
    let x = b.g.cont_as(x, [s.inner, s.tokens, s.seqs, 1]);
    let z =
        b.g.view(both, [length, s.rank, s.tokens, s.seqs], [b1, b2, b3]);
    let x = convolve(b, input, x, s, s.channels(), s.inner);
    let all = b.project("ssm_x", x);
    let [_, b1, b2, _] = b.g.nb(all);
    let step = (b.n_embd / 16).max(64);
    let [bb, c, dt] =
        [s.state, s.state, step].map(|width| b.g.view_3d(all, [width, s.tokens, s.seqs], [b1, b2]));
    let (bb, c, dt) = (
        b.rms(bb, "ssm_b_norm"),
        b.rms(c, "ssm_c_norm"),
        b.rms(dt, "ssm_dt_norm"),
    );
    let dt = b.project_biased("ssm_dt", dt);
    let a = b.exact("ssm_a");
    let a = b.g.reshape_2d(a, 1, s.rank);
    let x = b.g.view(
        x,
        [length, s.rank, s.tokens, s.seqs],
        [length * 4, s.inner * 4, s.inner * s.tokens * 4],
    );
    let [bb, c] = [bb, c].map(|part| {
        let [b0, b1, b2, _] = b.g.nb(part);
        b.g.view(
            part,
            [s.state, 1, s.tokens, s.seqs],
            [s.state.saturating_mul(b0), b1, b2],
        )
    });
    let out = scan(b, input, [x, dt, a, bb, c], s, [length, s.rank]);
    let y = b.g.view(
        out,
        [length, s.rank, s.tokens, s.seqs],
        [length * 4, s.inner * 4, s.inner * s.tokens * 4],
    );
    let d = b.exact("ssm_d");
    let d = b.g.reshape_2d(d, 1, s.rank);
    let skipped = b.g.mul(x, d);
    let y = b.g.add(y, skipped);
    let z = b.g.cont(z);
    let y = b.g.glu(z, y);
    let [_, _, y2, y3] = b.g.nb(y);
    let y = b.g.view_3d(y, [s.inner, s.tokens, s.seqs], [y2, y3]);
    let out = b.project("ssm_out", y);
    let width = b.g.ne(out)[0];
    b.g.reshape_2d(out, width, s.tokens * s.seqs)
}

/// `build_shortconv_block`.
pub(super) fn short_convolution(b: &mut Builder<'_>, input: StateInput, cur: TensorId) -> TensorId {
    let (tokens, seqs) = (b.n_tokens / b.n_seqs, b.n_seqs);
    let kept = b.number("shortconv.l_cache", 1) - 1;
    let n_embd = b.g.ne(cur)[0];
    let cur = b.g.reshape_3d(cur, n_embd, tokens, seqs);
    let all = b.project("shortconv.in_proj", cur);
    let ([width, ..], [_, b1, b2, _]) = (b.g.ne(all), b.g.nb(all));
    let [first, gate, x] = [(); 3].map(|()| b.g.view_3d(all, [width / 3, tokens, seqs], [b1, b2]));
    let product = b.g.mul(first, x);
    let turned = b.g.transpose(product);
    let states = b.convolution_state();
    let earlier = b.rows_of_state(input, states);
    let earlier = b.g.reshape_3d(earlier, kept, b.n_embd, seqs);
    let joined = b.g.concat(earlier, turned, 0);
    let ([_, channels, ..], [_, j1, j2, _]) = (b.g.ne(joined), b.g.nb(joined));
    let last = b.g.view_3d(joined, [kept, channels, seqs], [j1, j2]);
    b.keep_state(last, states);
    let kernel = b.weight("shortconv.conv");
    let out = b.g.ssm_conv(joined, kernel);
    let out = b.g.mul(gate, out);
    let out = b.project("shortconv.out_proj", out);
    let width = b.g.ne(out)[0];
    debug_assert_ne!(out, NONE, "a projection always has a result");
    b.g.reshape_2d(out, width, tokens * seqs)
}
