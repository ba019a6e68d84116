//! What NVIDIA's backend counts differently (`ggml-cuda.cu`, `fattn.cu`): padded rows, f16 copies for flash attention, head sizes
//! without a kernel, and operations on host weights that run on the device. Kernels as on GPUs with tensor cores (Turing and newer).

use super::ops::Graph;
use crate::gguf::GgmlType;

use super::tensor::{Op, Tensor, TensorId, row_bytes};

/// Rows of quantised tensors are padded to this many elements (`MATRIX_ROW_PADDING`).
const ROW_PADDING: i64 = 512;

/// Offload pays from this batch size on (`GGML_OP_OFFLOAD_MIN_BATCH`).
const OFFLOAD_BATCH: i64 = 32;

/// A KV length must be a multiple of this for the grouped kernels (`FATTN_KQ_STRIDE`).
const KV_STRIDE: i64 = 256;

pub(super) fn row_padding_bytes(element: GgmlType, ne: [i64; 4]) -> i64 {
    let over = ne[0] % ROW_PADDING;
    if element.is_quantized() && over != 0 {
        row_bytes(element, ROW_PADDING - over)
    } else {
        0
    }
}

/// Whether a device takes over an operation whose weight lies on the host (`ggml_backend_cuda_device_offload_op`).
pub(super) fn offloads(tensor: &Tensor) -> bool {
    let [_, n1, n2, _] = tensor.ne;
    let batch = match tensor.op {
        Op::GetRows => 0,
        Op::MulMat => n1,
        Op::MulMatId | Op::Rope => n2,
        _ => tensor.rows(),
    };
    batch >= OFFLOAD_BATCH
}

fn parts<'a>(graph: &'a Graph, tensor: &Tensor) -> [&'a Tensor; 4] {
    let mut sources = tensor.sources();
    [(); 4].map(|()| graph.get(sources.next().unwrap_or(TensorId::NONE)))
}

/// Whether a flash attention kernel exists for these shapes (`ggml_cuda_get_best_fattn_kernel`).
pub(super) fn supports_flash_attention(graph: &Graph, tensor: &Tensor) -> bool {
    let [q, k, v, mask] = parts(graph, tensor);
    let (key, value) = (k.ne[0], v.ne[0]);
    let group = q.ne[2] / k.ne[2].max(1);
    let strides_fit =
        |t: &Tensor| t.element.is_quantized() || t.nb.iter().skip(1).all(|stride| stride % 16 == 0);
    let has_mask = mask.element == GgmlType::F16 && mask.ne[0] == k.ne[1];
    let grouped = group >= 2
        && has_mask
        && k.ne[1] % KV_STRIDE == 0
        && [q, k, v, mask].into_iter().all(strides_fit);
    let shape = match key {
        40 | 64 | 72 | 80 | 96 | 112 | 128 | 256 => value == key,
        192 => value == 128 && grouped && group % 8 == 0,
        320 => value == 256 && grouped && group % 32 == 0,
        512 => value == key && grouped,
        576 => value == 512 && grouped,
        _ => false,
    };
    shape && (!has_mask || mask.ne[2] == 1)
}

/// The output and, behind it, the f16 copies of K and V that the tensor core kernels want
/// (`ggml_cuda_flash_attn_ext_get_alloc_size`).
pub(super) fn flash_attention_bytes(graph: &Graph, tensor: &Tensor, bytes: i64) -> i64 {
    if !supports_flash_attention(graph, tensor) {
        return bytes;
    }
    let [q, k, v, _] = parts(graph, tensor);
    if q.ne[1] <= 2
        && (k.element.is_quantized() || v.element.is_quantized())
        && q.ne[0] % 64 == 0
        && q.ne[0] <= 256
    {
        return bytes;
    }
    let aligned = |n: i64| n.saturating_add(127) / 128 * 128;
    let copy = |t: &Tensor| t.elements().saturating_mul(2);
    let v_in_k = v.is_view() && v.view_of == k.view_of;
    let mut total = bytes;
    if k.element != GgmlType::F16 {
        total = aligned(total).saturating_add(copy(k));
    }
    if v.element != GgmlType::F16 && !v_in_k {
        total = aligned(total).saturating_add(copy(v));
    }
    debug_assert_eq!(
        tensor.op,
        Op::FlashAttention,
        "only flash attention keeps copies"
    );
    total
}
