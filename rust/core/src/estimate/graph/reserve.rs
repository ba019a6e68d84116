//! The batch that llama.cpp reserves buffers for (`llama-context.cpp`, `sched_reserve` and `graph_reserve`).

use std::cell::Cell;

use super::super::context::{compressed_cells, window_cells};
use super::super::{Backend, CpuMoe, EstimateOptions, Layout, Resolved};
use super::buffer::BufferRules;
use super::scheduler::{Backends, PIPELINE_COPIES};
use crate::gguf::GgmlType;
use crate::model::Hyperparameters;

/// Alignment of host buffers, and of plain devices (`TENSOR_ALIGNMENT`).
const ALIGNMENT: i64 = 32;

/// Alignment of CUDA buffers.
const CUDA_ALIGNMENT: i64 = 128;

/// What one graph is built for.
#[derive(Clone, Debug)]
pub(super) struct Batch<'a> {
    options: &'a EstimateOptions,
    resolved: &'a Resolved,
    layout: &'a Layout,
    pub(super) tokens: i64,
    pub(super) sequences: i64,
    pub(super) outputs: i64,
    /// Cells of a dense cache, per stream.
    pub(super) cells: i64,
    pub(super) context_per_sequence: i64,
    pub(super) streams: i64,
    /// Whether the graph attends with flash attention.
    pub(super) flash_attention: bool,
    /// Whether residual streams take what a block gives in one operation.
    pub(super) fused_spread: bool,
    /// Whether the cache keeps values transposed, as it does where flash attention was switched off from the start.
    pub(super) transposed_values: bool,
    pub(super) cache_type_k: GgmlType,
    pub(super) cache_type_v: GgmlType,
    pub(super) host_expert_layers: usize,
    pub(super) cuda: bool,
    /// Fewer layers are built before those that repeat: not where copies between backends lie in a layer.
    pub(super) short_lead: bool,
    /// Everything but the input runs on one backend: who runs an operation decides nothing.
    pub(super) one_backend: bool,
    /// Repeating layers are planned one and all: slower, for checks.
    pub(super) every_layer: bool,
    /// Flash attention is given up everywhere should one run elsewhere than its layer.
    pub(super) may_give_up: bool,
    /// One does: the graph is not finished.
    given_up: Cell<bool>,
}

impl<'a> Batch<'a> {
    pub(super) fn new(
        options: &'a EstimateOptions,
        resolved: &'a Resolved,
        layout: &'a Layout,
    ) -> Self {
        let slots = i64::from(resolved.slots).max(1);
        let tokens = i64::from(resolved.context_length.min(resolved.micro_batch)).max(1);
        let layers_together =
            layout.devices == 0 || (layout.devices == 1 && offloads_layers(options, layout));
        Self {
            options,
            resolved,
            layout,
            tokens: (tokens + slots - 1) / slots * slots,
            sequences: slots,
            outputs: tokens.min(i64::from(resolved.outputs)),
            cells: i64::from(resolved.context_per_slot),
            context_per_sequence: i64::from(resolved.context_per_slot),
            streams: i64::from(resolved.streams).max(1),
            flash_attention: resolved.flash_attention,
            fused_spread: true,
            transposed_values: !resolved.flash_attention,
            cache_type_k: options.cache_type_k,
            cache_type_v: options.cache_type_v,
            host_expert_layers: match options.cpu_moe_layers {
                CpuMoe::None => 0,
                CpuMoe::Layers(layers) => layers as usize,
                CpuMoe::All => usize::MAX,
            },
            cuda: options.backend == Backend::Cuda,
            short_lead: layers_together,
            one_backend: layers_together && (layout.devices == 0 || layout.output.is_some()),
            every_layer: false,
            may_give_up: false,
            given_up: Cell::new(false),
        }
    }

    /// Ends the graph with the current layer: another one without flash attention takes its place.
    pub(super) fn give_up(&self) {
        self.given_up.set(true);
    }

    pub(super) fn is_given_up(&self) -> bool {
        self.given_up.get()
    }

    /// Has more layers built, and at last all; false when all were.
    pub(super) fn builds_more(&mut self) -> bool {
        if !std::mem::take(&mut self.short_lead) {
            return !std::mem::replace(&mut self.every_layer, true);
        }
        true
    }

    /// Attends without flash attention from now on.
    pub(super) fn do_without(&mut self) {
        self.flash_attention = false;
        self.may_give_up = false;
        self.given_up.set(false);
    }

    /// Cells of a sliding cache, per stream.
    pub(super) fn sliding_cells(&self, hyper: &Hyperparameters) -> i64 {
        let window = hyper.sliding_window.map_or(0, |(_, window)| window);
        let cells = window_cells(window, self.options.kv_unified, self.options, self.resolved);
        i64::try_from(cells).unwrap_or(self.cells)
    }

    /// The same where every slot has a window of its own, one pool or not.
    pub(super) fn window_cells_per_slot(&self, hyper: &Hyperparameters) -> i64 {
        let window = hyper.sliding_window.map_or(0, |(_, window)| window);
        let cells = window_cells(window, false, self.options, self.resolved);
        i64::try_from(cells).unwrap_or(self.cells)
    }

    /// Cells of a cache that keeps one of every `ratio` positions.
    pub(super) fn compressed_cells(&self, ratio: u32) -> i64 {
        let cells = compressed_cells(ratio, self.resolved);
        i64::try_from(cells).unwrap_or(self.cells)
    }

    /// The backend behind the devices.
    pub(super) fn cpu(&self) -> u8 {
        u8::try_from(self.layout.devices).unwrap_or(u8::MAX - 1)
    }

    fn on(&self, device: Option<u32>) -> u8 {
        device
            .and_then(|device| u8::try_from(device).ok())
            .map_or(self.cpu(), |device| device.min(self.cpu()))
    }

    pub(super) fn layer_backend(&self, il: usize) -> u8 {
        self.on(self.layout.layers.get(il).copied().flatten())
    }

    pub(super) fn output_backend(&self) -> u8 {
        self.on(self.layout.output)
    }

    /// Where a layer's cache or state lies.
    pub(super) fn state_backend(&self, il: usize) -> u8 {
        if self.options.kv_offload {
            self.layer_backend(il)
        } else {
            self.cpu()
        }
    }

    /// Whether some flash attention might not run where its layer is.
    pub(super) fn may_stray(&self, hyper: &Hyperparameters) -> bool {
        let mixed = hyper.recurrent.contains(&true) && self.has_host_layers();
        self.layout.devices > 0 && (self.cuda || !self.options.kv_offload || mixed)
    }

    pub(super) fn has_host_layers(&self) -> bool {
        self.layout.layers.iter().any(Option::is_none)
    }

    pub(super) fn backends(&self) -> Backends {
        let pipelined = self.layout.devices > 1
            && self.layout.output.is_some()
            && offloads_layers(self.options, self.layout);
        Backends {
            devices: self.cpu(),
            copies: if pipelined { PIPELINE_COPIES } else { 1 },
            cuda: self.cuda,
            offloads: self.cuda,
        }
    }

    /// The rules of every backend's buffers, devices first.
    pub(super) fn rules(&self) -> Vec<BufferRules> {
        let host = BufferRules {
            alignment: ALIGNMENT,
            cuda: false,
        };
        let device = if self.cuda {
            BufferRules {
                alignment: CUDA_ALIGNMENT,
                cuda: true,
            }
        } else {
            host
        };
        let mut rules = vec![device; usize::from(self.cpu())];
        rules.push(host);
        rules
    }
}

/// Whether devices hold all of every layer, its cache and experts too.
fn offloads_layers(options: &EstimateOptions, layout: &Layout) -> bool {
    options.kv_offload
        && options.cpu_moe_layers == CpuMoe::None
        && layout.layers.iter().all(Option::is_some)
}

/// Whether a layer has a KV cache of its own.
pub(super) fn owns_cache(hyper: &Hyperparameters, il: u32) -> bool {
    hyper.layers_with_cache.is_none_or(|count| il < count) && il < hyper.trunk_layers()
}
