//! What the CUDA driver takes beside llama.cpp's own buffers; no buffer line shows it.
//!
//! None of this is a promise of llama.cpp: it is the part of an estimate that a real load
//! corrects. Sources, each with its term below:
//! - context: `cudaMemGetInfo` in a process that does nothing else took 555 MiB on an RTX PRO 6000
//!   (188 multiprocessors) and 107 MiB on an RTX 4060 Ti (34), ggml-org/llama.cpp pull request
//!   23604: 3 MiB for each multiprocessor. A capability stands for its largest board.
//! - cuBLAS: 32 MiB from Hopper on, else 4 MiB (cuBLAS documentation, `cublasSetWorkspace`).
//! - pool: `ggml_cuda_pool_vmm` (ggml-cuda.cu) grows in steps of 2 MiB; the matrix kernels keep
//!   their quantised inputs there (`ggml_cuda_mul_mat_q`: 36 bytes for 32 values, mmq.cu).
//! - kernels: modules are loaded lazily; the ones that a model uses, and its CUDA graphs.

use super::layout::Layout;
use super::options::{Backend, EstimateOptions, Resolved};
use crate::model::ModelFacts;
use crate::model::weights::align;

const MIB: u64 = 1 << 20;
const CONTEXT_BYTES_PER_MULTIPROCESSOR: u64 = 3 * MIB;
const KERNEL_BYTES: u64 = 32 * MIB;
const POOL_STEP: u64 = 2 * MIB;

/// Overhead of each device.
pub(super) fn overhead_bytes(
    facts: &ModelFacts,
    options: &EstimateOptions,
    resolved: &Resolved,
    layout: &Layout,
) -> Vec<u64> {
    let each = match options.backend {
        Backend::Generic => 0,
        Backend::Cuda => {
            let capability = options.compute_capability;
            context_bytes(capability)
                .saturating_add(cublas_bytes(capability))
                .saturating_add(KERNEL_BYTES)
                .saturating_add(pool_bytes(facts, resolved))
        }
    };
    vec![each; layout.devices as usize]
}

/// The driver's context, by the largest board of a capability; unknown boards count as Ada.
fn context_bytes(capability: Option<(u32, u32)>) -> u64 {
    let multiprocessors = match capability {
        Some((5, _)) => 24,
        Some((6, _)) => 60,
        Some((7, 0..=4) | (8, 6)) => 84,
        Some((7, _)) => 72,
        Some((8, 0)) => 108,
        Some((8, 7)) => 16,
        Some((9, _)) => 132,
        Some((10, _)) => 160,
        Some((11 | 12, _)) => 188,
        _ => 142,
    };
    CONTEXT_BYTES_PER_MULTIPROCESSOR.saturating_mul(multiprocessors)
}

fn cublas_bytes(capability: Option<(u32, u32)>) -> u64 {
    match capability {
        Some((9.., _)) => 32 * MIB,
        _ => 4 * MIB,
    }
}

/// The widest input of a matrix product, quantised.
fn pool_bytes(facts: &ModelFacts, resolved: &Resolved) -> u64 {
    let h = &facts.hyperparameters;
    let experts = h.expert_feed_forward.iter().zip(&h.experts_used);
    let widest = experts
        .map(|(&width, &used)| u64::from(width).saturating_mul(u64::from(used)))
        .chain(h.feed_forward.iter().map(|&width| u64::from(width)))
        .max()
        .unwrap_or(0)
        .max(u64::from(h.embedding_length));
    let quantised = u64::from(resolved.micro_batch)
        .saturating_mul(widest.div_ceil(32))
        .saturating_mul(36);
    align(quantised, POOL_STEP)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_measured_boards_are_met() {
        assert!(context_bytes(Some((12, 0))).abs_diff(555 * MIB) < 12 * MIB);
        assert!(context_bytes(Some((8, 9))) > 107 * MIB);
    }

    #[test]
    fn hopper_has_the_large_workspace() {
        assert_eq!(cublas_bytes(Some((9, 0))), 32 * MIB);
        assert_eq!(cublas_bytes(Some((8, 6))), 4 * MIB);
        assert_eq!(cublas_bytes(None), 4 * MIB);
    }
}
