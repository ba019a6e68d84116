//! GLM 5 Next: delta layers between layers of latent attention to pools of positions that an indexer picks (`glm5-next.cpp`).

use super::super::attention::{AttentionInput, CacheInput, Extras};
use super::super::builder::{Builder, NONE, Norm};
use super::super::ops::Fused;
use super::super::tensor::TensorId;
use super::kda::kimi;
use super::latent::feed_forward;
use super::pools::{Pools, pick};
use super::sparse::{owner, owners};
use super::streams;

pub(super) fn next(b: &mut Builder<'_>) {
    let embeddings = b.embeddings();
    let states = b.state_input();
    let AttentionInput::Cache(cache) = b.attention_input() else {
        return;
    };
    let pools = Pools::of(b);
    b.may_give_up &= !pools.gathers(b, b.n_seqs);
    let outputs = b.output_ids();
    let owners = owners(b, |il| !b.hyper.is_recurrent(il as u32));
    let mut cur = streams::spread(b, embeddings);
    let mut picked = NONE;
    let hyper = b.hyper;
    // delta layers read nothing that is picked: which layer picks is no matter to them
    let picks_for = |il: usize| {
        if hyper.is_recurrent(il as u32) {
            il
        } else {
            owner(&owners, il)
        }
    };
    for il in b.layers_by_owner(picks_for) {
        b.enter(il);
        let mixed = streams::before(b, cur, streams::ATTENTION);
        let normed = b.rms_alone(mixed.cur, "attn_norm");
        b.g.expand(normed);
        let given = if b.hyper.is_recurrent(il as u32) {
            kimi(b, states, normed)
        } else {
            let low = b.matmul("attn_q_a", normed);
            let low = b.rms_alone(low, "attn_q_a_norm");
            if owner(&owners, il) == il {
                picked = pick(b, [normed, low], cache.mask, pools);
            }
            attend(b, [normed, low], cache, pools, picked)
        };
        let middle = streams::after(b, given, cur, mixed);
        let mixed = streams::before(b, middle, streams::FEED_FORWARD);
        let normed = b.rms_alone(mixed.cur, "ffn_norm");
        let fed = feed_forward(b, normed);
        cur = streams::after(b, fed, middle, mixed);
        streams::may_stray(b, cur);
    }
    if pools.gathers(b, b.n_seqs) {
        // the graph that llama.cpp asks with whether flash attention runs everywhere has none
        b.g.fused.retain(|(kind, ..)| *kind != Fused::Attention);
    }
    let rows = streams::pick_rows(b, cur, outputs);
    let cur = streams::mean(b, rows);
    let cur = b.output_norm(cur, Norm::Rms);
    b.finish(cur, 0);
}

/// `build_dsa_layer`, after the choice.
fn attend(
    b: &mut Builder<'_>,
    [normed, low]: [TensorId; 2],
    cache: CacheInput,
    p: Pools,
    picked: TensorId,
) -> TensorId {
    let (heads, n_tokens) = (b.heads(), b.n_tokens);
    let rank = b.number("attention.kv_lora_rank", 0);
    let q = b.matmul("attn_q_b", low);
    let q =
        b.g.reshape_3d(q, b.g.ne(q)[0] / heads.max(1), heads, n_tokens);
    let latent = b.matmul("attn_kv_a_mqa", normed);
    let latent = b.rms_alone(latent, "attn_kv_a_norm");
    let latent = b.g.reshape_3d(latent, rank, 1, n_tokens);
    let q = b.g.permute(q, [0, 2, 1, 3]);
    let weight = b.weight("attn_k_b");
    let q = b.g.mul_mat(weight, q);
    let q = b.g.permute(q, [0, 2, 1, 3]);
    let value_expansion = b.weight("attn_v_b");
    let out = if p.gathers(b, n_tokens) {
        gathered(b, [q, latent], cache, p, picked)
    } else {
        let ne = b.g.ne(cache.mask);
        b.attend_latent_masked(
            cache,
            [q, latent, latent],
            Extras {
                value_expansion,
                output: "",
                ..Extras::default()
            },
            |b| b.g.reshape(picked, ne),
        )
    };
    b.matmul("attn_output", out)
}

/// Attention to the picked rows of the cache, which are copied out of it.
fn gathered(
    b: &mut Builder<'_>,
    [q, latent]: [TensorId; 2],
    cache: CacheInput,
    p: Pools,
    picked: TensorId,
) -> TensorId {
    let n_tokens = b.n_tokens;
    let rank = b.g.ne(latent)[0];
    b.g.expand(q);
    b.g.expand(latent);
    let keys = b.cache_tensor(b.layer(), b.batch.cache_type_k, rank, cache.cells);
    b.store_rows(keys, latent, cache.key_ids);
    b.g.expand(cache.mask);
    let ([_, n1, n2, _], [_, row, ..]) = (b.g.ne(keys), b.g.nb(keys));
    let rows = b.g.view_2d(keys, rank, n1 * n2, row);
    let ids = b.g.reshape(picked, [p.slots * n_tokens, 1, 1, 1]);
    let rows = b.g.get_rows(rows, ids);
    let k = b.g.reshape(rows, [rank, p.slots, 1, n_tokens]);
    let q = b.g.permute(q, [0, 2, 3, 1]);
    let scores = b.g.mul_mat(k, q);
    let shares = b.g.soft_max(scores, p.live, NONE);
    let v = b.g.transpose(k);
    let v = b.g.cont(v);
    let out = b.g.mul_mat(v, shares);
    let weight = b.weight("attn_v_b");
    let out = b.g.mul_mat(weight, out);
    let out = b.g.permute(out, [0, 2, 1, 3]);
    let out = b.g.cont(out);
    let [n0, n1, ..] = b.g.ne(out);
    b.g.reshape_2d(out, n0 * n1, n_tokens)
}
