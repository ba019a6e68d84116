//! Compute buffers to the byte: llama.cpp's graph for one micro-batch, described per family of layers, and its scheduler and allocator
//! played through without data.
//!
//! ```text
//! header -> GraphModel                 (model: what there is)
//! options -> Batch                     (reserve: what is reserved for)
//! families::build -> Graph             (builder, attention, experts, states: what is computed, in llama.cpp's order)
//! Schedule::build -> backends, copies  (scheduler)
//! Lifetimes::find -> Program           (lifetimes, program: who takes a place and gives it back, in order)
//! Allocator::plan -> bytes per buffer  (allocator, buffer)
//! ```
//!
//! llama.cpp's dry run counts the prompt-processing graph only; so does this. Layers that repeat are planned a few times, not all of
//! them: the allocator is in the same state after every one. Views are no nodes, and what takes no place is none where it decides
//! nothing (merging).

#![expect(
    clippy::many_single_char_names,
    reason = "q, k, v, x, a and b are what papers and llama.cpp call them"
)]
#![expect(
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_precision_loss,
    clippy::struct_excessive_bools,
    reason = "hyper-parameters and options are capped when read, so that products of two stay below 2^63; strides saturate"
)]

mod allocator;
mod attention;
mod buffer;
mod builder;
mod cuda;
mod experts;
mod families;
mod layers;
mod lifetimes;
mod merging;
mod model;
mod names;
mod ops;
mod planned;
mod program;
mod repeats;
mod reserve;
mod rounds;
mod scheduler;
mod states;
mod tensor;
#[cfg(test)]
mod tests;
mod weights;

use std::cell::RefCell;

use super::compute::ComputeBytes;
use super::{EstimateOptions, FlashAttention, Layout, Resolved};
use crate::model::ModelFacts;

use allocator::Allocator;
use ops::{Fused, Graph};
use reserve::Batch;
use scheduler::Schedule;

pub(crate) use model::GraphModel;
pub(crate) use planned::Planned;

#[derive(Default)]
struct Workspace {
    graph: Graph,
    schedule: Schedule,
    allocator: Allocator,
}

impl Workspace {
    /// The peak of every buffer; none when layers that stand for more must be built one and all.
    fn play(&mut self, batch: &Batch<'_>) -> Option<Vec<u64>> {
        self.schedule
            .build(&mut self.graph, batch.backends())
            .then(|| {
                self.allocator
                    .plan(&self.graph, &self.schedule, &batch.rules())
            })?
    }
}

thread_local! {
    static WORKSPACE: RefCell<Workspace> = RefCell::default();
}

/// The compute buffers that llama.cpp projects for this model and these options (`llama_context::sched_reserve`); none for a model
/// without a described graph that does not look like a transformer either.
pub(super) fn compute_bytes(
    facts: &ModelFacts,
    options: &EstimateOptions,
    resolved: &Resolved,
    layout: &Layout,
) -> Option<ComputeBytes> {
    facts.planned.or_plan(options, resolved, || {
        let batch = Batch::new(options, resolved, layout);
        let may_do_without =
            options.flash_attention == FlashAttention::Auto && !options.cache_type_v.is_quantized();
        WORKSPACE.with_borrow_mut(|workspace| plan(workspace, facts, batch, may_do_without))
    })
}

fn plan(
    w: &mut Workspace,
    facts: &ModelFacts,
    mut batch: Batch<'_>,
    may_do_without: bool,
) -> Option<ComputeBytes> {
    let asks = may_do_without && batch.may_stray(&facts.hyperparameters);
    batch.may_give_up = asks;
    let exact = families::build(&mut w.graph, facts, &batch)?;
    let strays = asks
        && (batch.is_given_up() || !w.schedule.runs_at_home(&w.graph, &batch, Fused::Attention));
    if strays {
        batch.do_without();
        families::build(&mut w.graph, facts, &batch);
    }
    if batch.has_host_layers() && !w.schedule.runs_at_home(&w.graph, &batch, Fused::Spread) {
        batch.fused_spread = false;
        families::build(&mut w.graph, facts, &batch);
    }
    let mut planned = w.play(&batch);
    while planned.is_none() && batch.builds_more() {
        families::build(&mut w.graph, facts, &batch);
        planned = w.play(&batch);
    }
    let mut devices = planned?;
    let host = devices.pop().unwrap_or(0);
    Some(ComputeBytes {
        devices,
        host,
        exact,
    })
}
