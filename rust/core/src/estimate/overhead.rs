//! What the driver takes beside llama.cpp's own buffers.

use super::layout::Layout;
use super::options::{Backend, EstimateOptions};

/// The CUDA context with the modules of llama.cpp's kernels, and the cuBLAS workspace.
///
/// None of it stands in a buffer line; reports and other estimators name 250 to 700 MiB.
const CUDA_CONTEXT_BYTES: u64 = 400 << 20;

/// Overhead of each device that has a layer.
pub(super) fn overhead_bytes(options: &EstimateOptions, layout: &Layout) -> Vec<u64> {
    (0..layout.devices)
        .map(|_| match options.backend {
            Backend::Cuda => CUDA_CONTEXT_BYTES,
            Backend::Generic => 0,
        })
        .collect()
}
