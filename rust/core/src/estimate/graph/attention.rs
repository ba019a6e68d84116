//! Attention over a cache or within the batch (`llama-graph.cpp`, `build_attn*`; `llama-kv-cache.cpp`).

use crate::gguf::GgmlType;

use super::builder::{Builder, NONE};
use super::ops::Fused;
use super::reserve::owns_cache;
use super::tensor::{Storage, TensorId, row_bytes};

/// The inputs of one KV cache.
#[derive(Clone, Copy, Debug)]
pub(super) struct CacheInput {
    pub(super) key_ids: TensorId,
    pub(super) value_ids: TensorId,
    pub(super) mask: TensorId,
    pub(super) key_rotation: TensorId,
    pub(super) value_rotation: TensorId,
    pub(super) cells: i64,
}

/// What attention reads: a cache, a cache per kind of layer, or the batch alone.
#[derive(Clone, Copy, Debug)]
pub(super) enum AttentionInput {
    Cache(CacheInput),
    /// Dense layers, sliding layers.
    Sliding(CacheInput, CacheInput),
    /// No cache; the masks of dense and sliding layers.
    Batch(TensorId, TensorId),
}

/// The less common parts of one attention.
#[derive(Clone, Copy, Debug)]
pub(super) struct Extras {
    /// A bias on the scores; rules flash attention out.
    pub(super) score_bias: TensorId,
    pub(super) sinks: TensorId,
    /// MLA's decompression of values.
    pub(super) value_expansion: TensorId,
    /// Name of the output projection; empty for none.
    pub(super) output: &'static str,
    /// The layer whose cache is read, when it is not this one.
    pub(super) cache_layer: Option<usize>,
}

impl Default for Extras {
    fn default() -> Self {
        Self {
            score_bias: NONE,
            sinks: NONE,
            value_expansion: NONE,
            output: "attn_output",
            cache_layer: None,
        }
    }
}

impl Builder<'_> {
    /// The input that the model's layers call for: one cache, or two where some slide.
    pub(super) fn attention_input(&mut self) -> AttentionInput {
        if self.hyper.sliding_window.is_some() {
            let dense = self.cache_input(self.batch.cells, false);
            let sliding = self.cache_input(self.batch.sliding_cells(self.hyper), true);
            return AttentionInput::Sliding(dense, sliding);
        }
        AttentionInput::Cache(self.cache_input(self.batch.cells, false))
    }

    /// The same, or the batch alone for models without a cache.
    pub(super) fn any_attention_input(&mut self) -> AttentionInput {
        match self.model.architecture() {
            "dream" | "llada" | "llada-moe" | "rnd1" | "gemma-embedding" | "llama-embed"
            | "eurobert" | "neo-bert" | "modern-bert" => self.batch_attention_input(),
            _ => self.attention_input(),
        }
    }

    /// `build_attn_inp_no_cache`.
    pub(super) fn batch_attention_input(&mut self) -> AttentionInput {
        let element = self.mask_element();
        let dense = self.g.input(element, [self.n_tokens, self.n_tokens, 1, 1]);
        let sliding = if self.hyper.sliding_window.is_some() {
            self.g.input(element, [self.n_tokens, self.n_tokens, 1, 1])
        } else {
            NONE
        };
        AttentionInput::Batch(dense, sliding)
    }

    pub(super) fn mask_element(&self) -> GgmlType {
        if self.batch.flash_attention {
            GgmlType::F16
        } else {
            GgmlType::F32
        }
    }

    /// `build_attn_inp_kq_mask`.
    pub(super) fn mask(&mut self, cells: i64, element: GgmlType) -> TensorId {
        let streams = self.batch.streams;
        self.g
            .input(element, [cells, self.n_tokens / streams, 1, streams])
    }

    pub(super) fn key_ids(&mut self) -> TensorId {
        self.g.input(GgmlType::I64, [self.n_tokens, 1, 1, 1])
    }

    pub(super) fn cache_input(&mut self, cells: i64, sliding: bool) -> CacheInput {
        let element = self.mask_element();
        let key_ids = self.key_ids();
        let value_rows = if self.batch.transposed_values {
            self.widest_values()
        } else {
            1
        };
        let value_ids = self
            .g
            .input(GgmlType::I64, [self.n_tokens * value_rows, 1, 1, 1]);
        let mask = self.mask(cells, element);
        let key_rotation = self.rotation(sliding, true);
        let value_rotation = self.rotation(sliding, false);
        CacheInput {
            key_ids,
            value_ids,
            mask,
            key_rotation,
            value_rotation,
            cells,
        }
    }

    /// `n_embd_v_gqa_max`.
    fn widest_values(&self) -> i64 {
        let widest = (0..self.hyper.layer_count())
            .map(|il| self.hyper.value_width(il))
            .max();
        widest.and_then(|n| i64::try_from(n).ok()).unwrap_or(0)
    }

    /// The Hadamard matrix that a quantised cache is rotated by, where all its layers have one head size (`build_input_k_rot`).
    fn rotation(&mut self, sliding: bool, keys: bool) -> TensorId {
        // the input of a hybrid with sliding layers has none (`build_inp_mem_hybrid_iswa`)
        let hybrid = self.hyper.sliding_window.is_some() && self.hyper.recurrent.contains(&true);
        let element = if keys {
            self.batch.cache_type_k
        } else {
            self.batch.cache_type_v
        };
        let hyper = self.hyper;
        let length = |il: u32| {
            i64::from(if keys {
                hyper.key_length_of(il)
            } else {
                hyper.value_length_of(il)
            })
        };
        if hybrid
            || !element.is_quantized()
            || length(0) % 64 != 0
            || (!keys && hyper.latent_attention)
        {
            return NONE;
        }
        let mut lengths = (0..hyper.layer_count())
            .filter(|il| owns_cache(hyper, *il) && hyper.is_sliding(*il) == sliding)
            .map(length);
        let Some(first) = lengths.next().filter(|n| *n > 0) else {
            return NONE;
        };
        if lengths.any(|n| n != first) {
            return NONE;
        }
        let mut size = 64;
        while keys && first % (size * 2) == 0 {
            size *= 2;
        }
        self.g.input(GgmlType::F32, [size, size, 1, 1])
    }

    /// `llama_mul_mat_hadamard`.
    pub(super) fn rotate(&mut self, cur: TensorId, rotation: TensorId) -> TensorId {
        let tensor = self.g.get(cur);
        let (ne, elements, contiguous) = (tensor.ne, tensor.elements(), tensor.is_contiguous());
        let n = self.g.ne(rotation)[0];
        let flat = [n, elements / n.max(1), 1, 1];
        let flat = if contiguous {
            self.g.reshape(cur, flat)
        } else {
            self.g.cont_as(cur, flat)
        };
        let turned = self.g.mul_mat(rotation, flat);
        self.g.reshape(turned, ne)
    }

    /// The same where there is something to rotate, and to rotate by.
    pub(super) fn rotate_if(&mut self, cur: TensorId, rotation: TensorId) -> TensorId {
        if cur.is_some() && rotation.is_some() {
            self.rotate(cur, rotation)
        } else {
            cur
        }
    }

    /// A layer's K (or V) tensor of `width` per cell.
    pub(super) fn cache_tensor(
        &mut self,
        il: usize,
        element: GgmlType,
        width: i64,
        cells: i64,
    ) -> TensorId {
        let backend = self.batch.state_backend(il);
        self.g.stored(
            element,
            [width, cells, self.batch.streams, 1],
            Storage::State(backend),
        )
    }

    /// `cpy_k`: the batch's keys (or untransposed values) go into the cache.
    pub(super) fn store_rows(&mut self, cache: TensorId, cur: TensorId, ids: TensorId) -> TensorId {
        let ([n0, n1, n2, _], stride) = (self.g.ne(cur), self.g.nb(cur)[2]);
        let rows = self.g.view_2d(cur, n0 * n1, n2, stride);
        let [width, cells, streams, _] = self.g.ne(cache);
        let target = if streams > 1 {
            self.g.reshape_2d(cache, width, cells * streams)
        } else {
            cache
        };
        let stored = self.g.set_rows(target, rows, ids);
        self.g.expand(stored);
        stored
    }

    /// `cpy_v` into a transposed cache, as without flash attention.
    fn store_transposed(&mut self, cache: TensorId, cur: TensorId, ids: TensorId) {
        let ([n0, n1, n2, _], stride) = (self.g.ne(cur), self.g.nb(cur)[2]);
        let width = n0 * n1;
        let flat = if row_bytes(self.g.element(cur), width) == stride {
            self.g.reshape_2d(cur, width, n2)
        } else {
            self.g.cont_as(cur, [width, n2, 1, 1])
        };
        let full = self.g.ne(cache)[0];
        let flat = if width < full {
            self.g.pad(flat, [full - width, 0, 0, 0])
        } else {
            flat
        };
        let elements = self.g.get(cache).elements();
        let target = self.g.reshape_2d(cache, 1, elements);
        let count = self.g.get(flat).elements();
        let rows = self.g.reshape_2d(flat, 1, count);
        let stored = self.g.set_rows(target, rows, ids);
        self.g.expand(stored);
    }

    /// `get_k`: the whole cache, per head.
    pub(super) fn read_rows(&mut self, cache: TensorId, length: i64, heads: i64) -> TensorId {
        let (element, [width, cells, streams, _]) = (self.g.element(cache), self.g.ne(cache));
        let row = row_bytes(element, width);
        self.g.view(
            cache,
            [length, heads, cells, streams],
            [row_bytes(element, length), row, row.saturating_mul(cells)],
        )
    }

    fn read_transposed(&mut self, cache: TensorId, length: i64, heads: i64) -> TensorId {
        let (element, [width, cells, streams, _]) = (self.g.element(cache), self.g.ne(cache));
        let bytes = |n: i64| row_bytes(element, n);
        self.g.view(
            cache,
            [cells, heads, length, streams],
            [
                bytes(cells.saturating_mul(length)),
                bytes(cells),
                bytes(cells.saturating_mul(width)),
            ],
        )
    }

    /// `build_attn`: stores keys and values, attends, projects. `k` and `v` are none where a layer only reads another's cache.
    pub(super) fn attend(
        &mut self,
        input: AttentionInput,
        [q, k, v]: [TensorId; 3],
        extras: Extras,
    ) -> TensorId {
        let cur = match input {
            AttentionInput::Batch(dense, sliding) => {
                for part in [q, k, v] {
                    self.g.expand(part);
                }
                let mask = if self.slides() { sliding } else { dense };
                self.scores([q, k, v], mask, extras)
            }
            AttentionInput::Cache(cache) => self.attend_cached(cache, [q, k, v], [2, 1], extras),
            AttentionInput::Sliding(dense, sliding) => {
                let cache = if self.slides() { sliding } else { dense };
                self.attend_cached(cache, [q, k, v], [1, 2], extras)
            }
        };
        if extras.output.is_empty() {
            cur
        } else {
            self.project_biased(extras.output, cur)
        }
    }

    /// `order`: whether keys or values join the graph first; the two caches differ in that.
    fn attend_cached(
        &mut self,
        cache: CacheInput,
        [q, k, v]: [TensorId; 3],
        order: [u8; 2],
        extras: Extras,
    ) -> TensorId {
        let q = self.rotate_if(q, cache.key_rotation);
        let k = self.rotate_if(k, cache.key_rotation);
        let v = self.rotate_if(v, cache.value_rotation);
        self.g.expand(q);
        for part in if order == [1, 2] { [k, v] } else { [v, k] } {
            if part.is_some() {
                self.g.expand(part);
            }
        }
        let il = extras.cache_layer.unwrap_or(self.layer());
        let (key, value) = (self.key_length(), self.value_length());
        let kv_heads = self.hyper.kv_heads.get(il).map_or(0, |n| i64::from(*n));
        let value_width = if self.batch.transposed_values {
            self.widest_values()
        } else {
            value * kv_heads
        };
        let keys = self.cache_tensor(il, self.batch.cache_type_k, key * kv_heads, cache.cells);
        let values = self.cache_tensor(il, self.batch.cache_type_v, value_width, cache.cells);
        if k.is_some() {
            self.store_rows(keys, k, cache.key_ids);
        }
        if v.is_some() {
            if self.batch.transposed_values {
                self.store_transposed(values, v, cache.value_ids);
            } else {
                self.store_rows(values, v, cache.value_ids);
            }
        }
        let k = self.read_rows(keys, key, kv_heads);
        let v = if self.batch.transposed_values {
            self.read_transposed(values, value, kv_heads)
        } else {
            self.read_rows(values, value, kv_heads)
        };
        let cur = self.scores([q, k, v], cache.mask, extras);
        self.rotate_if(cur, cache.value_rotation)
    }

    /// `build_attn` with keys only (MLA): values are the first part of the cached keys.
    pub(super) fn attend_latent_masked(
        &mut self,
        cache: CacheInput,
        [q, k, v]: [TensorId; 3],
        extras: Extras,
        mask: impl FnOnce(&mut Self) -> TensorId,
    ) -> TensorId {
        for part in [q, v, k] {
            self.g.expand(part);
        }
        let il = self.layer();
        let (key, kv_heads) = (self.key_length(), self.kv_heads());
        let keys = self.cache_tensor(il, self.batch.cache_type_k, key * kv_heads, cache.cells);
        self.store_rows(keys, k, cache.key_ids);
        let mask = mask(self);
        let k = self.read_rows(keys, key, kv_heads);
        let ([_, n1, n2, n3], [_, b1, b2, b3]) = (self.g.ne(k), self.g.nb(k));
        let width = self.g.ne(v)[0];
        let v = self.g.view(k, [width, n1, n2, n3], [b1, b2, b3]);
        let cur = self.scores([q, k, v], mask, extras);
        if extras.output.is_empty() {
            cur
        } else {
            self.project_biased(extras.output, cur)
        }
    }

    /// The same with the cache's own mask.
    pub(super) fn attend_latent(
        &mut self,
        cache: CacheInput,
        heads: [TensorId; 3],
        extras: Extras,
    ) -> TensorId {
        self.attend_latent_masked(cache, heads, extras, |_| cache.mask)
    }

    /// `build_attn_mha`.
    pub(super) fn scores(
        &mut self,
        [q, k, v]: [TensorId; 3],
        mask: TensorId,
        extras: Extras,
    ) -> TensorId {
        let [_, vb1, vb2, _] = self.g.nb(v);
        let transposed = vb1 > vb2;
        let streams = self.g.ne(k)[3].max(1);
        let ([q0, q1, q2, _], [_, b1, b2, _]) = (self.g.ne(q), self.g.nb(q));
        let q = self.g.view(
            q,
            [q0, q1, q2 / streams, streams],
            [b1, b2, b2.saturating_mul(q2 / streams)],
        );
        let [q, k, mut v] = [q, k, v].map(|part| self.g.permute(part, [0, 2, 1, 3]));
        let mut cur;
        if self.batch.flash_attention && !extras.score_bias.is_some() {
            if transposed {
                v = self.g.transpose(v);
            }
            let half = |b: &mut Self, part: TensorId| {
                if b.g.element(part) == GgmlType::F32 {
                    b.g.cast(part, GgmlType::F16)
                } else {
                    part
                }
            };
            let k = half(self, k);
            let v = half(self, v);
            cur = self.g.flash_attention([q, k, v, mask, extras.sinks]);
            self.g.fused.push((Fused::Attention, cur, self.layer()));
            self.give_up_if_stray(cur);
            if extras.value_expansion.is_some() {
                cur = self.g.permute(cur, [0, 2, 1, 3]);
                cur = self.g.mul_mat(extras.value_expansion, cur);
                cur = self.g.permute(cur, [0, 2, 1, 3]);
                cur = self.g.cont(cur);
            }
            let [n0, n1, n2, n3] = self.g.ne(cur);
            cur = self.g.reshape_2d(cur, n0 * n1, n2 * n3);
        } else {
            let mut scores = self.g.mul_mat(k, q);
            for _ in 0..self.score_unaries {
                scores = self.g.unary_alone(scores);
            }
            if extras.score_bias.is_some() {
                scores = self.g.add(scores, extras.score_bias);
            }
            let weights = self.g.soft_max(scores, mask, extras.sinks);
            if !transposed {
                let turned = self.g.transpose(v);
                v = self.g.cont(turned);
            }
            cur = self.g.mul_mat(v, weights);
            if extras.value_expansion.is_some() {
                cur = self.g.mul_mat(extras.value_expansion, cur);
            }
            cur = self.g.permute(cur, [0, 2, 1, 3]);
            let [n0, n1, n2, n3] = self.g.ne(cur);
            cur = self.g.cont_as(cur, [n0 * n1, n2 * n3, 1, 1]);
        }
        self.g.expand(cur);
        cur
    }

    /// Gives up flash attention where no kernel of the layer's device runs this one.
    fn give_up_if_stray(&self, attention: TensorId) {
        let on_device = self.batch.layer_backend(self.layer()) != self.batch.cpu();
        if self.may_give_up
            && self.batch.cuda
            && on_device
            && !super::cuda::supports_flash_attention(self.g, self.g.get(attention))
        {
            self.batch.give_up();
        }
    }
}
