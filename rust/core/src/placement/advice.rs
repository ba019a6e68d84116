//! What smallest change would make a model fit that fits nowhere.
//!
//! Every piece of advice has been tried: it is given only if the model is then placed.

use std::borrow::Borrow;

use super::candidate::Candidate;
use super::decide::decide;
use super::place::Estimated;
use super::policy::{CpuUse, Policy, Running};
use super::refusal::NAMED_GPUS;
use super::words::{size, size_at_least};
use crate::estimate::{Companions, CpuMoe, EstimateOptions, FlashAttention};
use crate::gguf::GgmlType;
use crate::gpu::Gpu;
use crate::model::{Footprint, ModelFacts};

/// As many changes are named; more would not be read.
const NAMED: usize = 3;
/// No shorter context is advised.
const SHORTEST_CONTEXT: u32 = 512;
/// Sizes that are sought are sought to this precision.
const CLOSE_ENOUGH: u64 = 1 << 20;

/// The question that had no answer, to be asked again with a change.
pub(crate) struct Question<'a> {
    pub(crate) facts: &'a ModelFacts,
    pub(crate) options: EstimateOptions,
    pub(crate) gpus: Vec<&'a Gpu>,
    pub(crate) policy: Policy,
    pub(crate) running: &'a [&'a Running],
    pub(crate) companions: Companions<'a>,
}

impl Question<'_> {
    fn fits_with(&self, options: &EstimateOptions) -> bool {
        self.fits(options, &self.gpus, &self.policy, self.running)
    }

    fn fits_under(&self, policy: &Policy) -> bool {
        self.fits(&self.options, &self.gpus, policy, self.running)
    }

    fn fits<G: Borrow<Gpu>>(
        &self,
        options: &EstimateOptions,
        gpus: &[G],
        policy: &Policy,
        running: &[&Running],
    ) -> bool {
        Estimated::new(self.facts, options, self.companions)
            .and_then(|model| decide(&model, options.gpu_layers, gpus, policy, running))
            .is_ok_and(|decision| decision.is_some())
    }
}

/// Changes that help, the least intrusive first.
///
/// `room` is each GPU that may be used, with what it has once every idle model has left.
pub(crate) fn changes(question: &Question<'_>, room: &[(Candidate, u64)]) -> Vec<String> {
    let tries: [&dyn Fn() -> Option<String>; 9] = [
        &|| somebody_idle(question),
        &|| freed_memory(question, room),
        &|| shorter_context(question),
        &|| quantised_cache(question),
        &|| fewer_slots(question),
        &|| smaller_batch(question),
        &|| experts_on_cpu(question),
        &|| wider_policy(question),
        &|| layers_on_cpu(question),
    ];
    tries
        .iter()
        .filter_map(|attempted| attempted())
        .take(NAMED)
        .collect()
}

/// Waiting for one busy model, the one that holds the least.
fn somebody_idle(question: &Question<'_>) -> Option<String> {
    let held = |model: &Running| {
        model
            .bytes_by_gpu
            .iter()
            .fold(0_u64, |sum, (_, bytes)| sum.saturating_add(*bytes))
    };
    let helps = |place: usize| {
        let mut running = question.running.to_vec();
        let idle = running.get(place).map(|model| Running {
            busy: false,
            ..(*model).clone()
        });
        if let (Some(model), Some(idle)) = (running.get_mut(place), idle.as_ref()) {
            *model = idle;
        }
        question.fits(
            &question.options,
            &question.gpus,
            &question.policy,
            &running,
        )
    };
    let mut busy: Vec<(usize, &Running)> = question
        .running
        .iter()
        .copied()
        .enumerate()
        .filter(|(_, model)| {
            model.busy && !model.pinned && model.priority <= question.policy.priority
        })
        .collect();
    busy.sort_by_key(|(place, model)| (held(model), *place));
    let (_, model) = busy.into_iter().find(|(place, _)| helps(*place))?;
    Some(format!(
        "wait until {} is idle ({})",
        model.id,
        size(held(model))
    ))
}

/// Memory freed on one GPU, the least there is.
fn freed_memory(question: &Question<'_>, room: &[(Candidate, u64)]) -> Option<String> {
    let helps = |slot: usize, more: u64| {
        let gpus: Vec<Gpu> = question
            .gpus
            .iter()
            .enumerate()
            .map(|(place, gpu)| Gpu {
                free_bytes: gpu
                    .free_bytes
                    .map(|free| free.saturating_add(if place == slot { more } else { 0 })),
                ..(*gpu).clone()
            })
            .collect();
        question.fits(&question.options, &gpus, &question.policy, question.running)
    };
    let mut best: Option<(u64, u32)> = None;
    for (one, budget) in room.iter().take(NAMED_GPUS) {
        let most = one.budget_after(u64::MAX).saturating_sub(*budget);
        let (mut fails, mut helps_with) = (0, best.map_or(most, |(least, _)| least.min(most)));
        if helps_with == 0 || !helps(one.slot, helps_with) {
            continue;
        }
        while helps_with.abs_diff(fails) > CLOSE_ENOUGH {
            let middle = fails.midpoint(helps_with);
            if helps(one.slot, middle) {
                helps_with = middle;
            } else {
                fails = middle;
            }
        }
        if best.is_none_or(|(least, _)| helps_with < least) {
            best = Some((helps_with, one.index));
        }
    }
    best.map(|(bytes, index)| format!("free {} more on GPU {index}", size_at_least(bytes)))
}

fn shorter_context(question: &Question<'_>) -> Option<String> {
    let options = &question.options;
    let now = options.resolve(question.facts).ok()?.context_length;
    let step = if now >= 8192 { 1024 } else { 256 };
    let with = |steps: u32| EstimateOptions {
        context_length: steps.saturating_mul(step),
        ..options.clone()
    };
    let least = SHORTEST_CONTEXT.div_ceil(step);
    let most = now.div_ceil(step).saturating_sub(1);
    let steps = largest_that(least, most, |steps| question.fits_with(&with(steps)))?;
    Some(format!("a context of {}", steps.saturating_mul(step)))
}

fn quantised_cache(question: &Question<'_>) -> Option<String> {
    let options = &question.options;
    let is_wide = |kind| matches!(kind, GgmlType::F32 | GgmlType::F16 | GgmlType::BF16);
    if options.flash_attention == FlashAttention::Off
        || !is_wide(options.cache_type_k)
        || !is_wide(options.cache_type_v)
    {
        return None;
    }
    let kind = GgmlType::Q8_0;
    let changed = EstimateOptions {
        cache_type_k: kind,
        cache_type_v: kind,
        ..options.clone()
    };
    question
        .fits_with(&changed)
        .then(|| "a cache of q8_0".to_owned())
}

fn fewer_slots(question: &Question<'_>) -> Option<String> {
    let options = &question.options;
    let with = |parallel: u32| EstimateOptions {
        parallel,
        ..options.clone()
    };
    let slots = largest_that(1, options.parallel.saturating_sub(1), |slots| {
        question.fits_with(&with(slots))
    })?;
    Some(format!("{slots} instead of {} slots", options.parallel))
}

fn smaller_batch(question: &Question<'_>) -> Option<String> {
    let options = &question.options;
    let with = |micro_batch: u32| EstimateOptions {
        micro_batch,
        ..options.clone()
    };
    [256, 128, 64]
        .into_iter()
        .find(|&size| size < options.micro_batch && question.fits_with(&with(size)))
        .map(|size| format!("a micro batch of {size}"))
}

fn experts_on_cpu(question: &Question<'_>) -> Option<String> {
    let options = &question.options;
    let already = match options.cpu_moe_layers {
        CpuMoe::None => 0,
        CpuMoe::Layers(layers) => layers,
        CpuMoe::All => return None,
    };
    if question
        .facts
        .weights
        .layers
        .iter()
        .all(|layer| layer.experts == Footprint::default())
    {
        return None;
    }
    let layers = question.facts.layer_count();
    let spared = |fewer: u32| EstimateOptions {
        cpu_moe_layers: CpuMoe::Layers(layers.saturating_sub(fewer)),
        ..options.clone()
    };
    let most = layers.saturating_sub(already).saturating_sub(1);
    let kept = largest_that(0, most, |fewer| question.fits_with(&spared(fewer)))?;
    Some(format!(
        "the experts of the first {} layers on the CPU",
        layers.saturating_sub(kept)
    ))
}

fn wider_policy(question: &Question<'_>) -> Option<String> {
    let policy = &question.policy;
    let without = |change: &dyn Fn(&mut Policy)| {
        let mut policy = policy.clone();
        change(&mut policy);
        question.fits_under(&policy)
    };
    if let Some(most) = policy.max_gpus
        && without(&|policy| policy.max_gpus = None)
    {
        return Some(format!("more than {most} GPUs"));
    }
    let spared = |policy: &mut Policy| {
        policy.headroom_bytes = 0;
        policy.headroom_by_gpu.clear();
    };
    if !policy.headroom_by_gpu.is_empty() && without(&spared) {
        return Some("less headroom".to_owned());
    }
    if policy.headroom_bytes > 0 && without(&spared) {
        return Some(format!(
            "less headroom than {}",
            size(policy.headroom_bytes)
        ));
    }
    (policy.allowed.is_some() && without(&|policy| policy.allowed = None))
        .then(|| "the GPUs that are not allowed now".to_owned())
}

fn layers_on_cpu(question: &Question<'_>) -> Option<String> {
    let with = |cpu: CpuUse| Policy {
        cpu,
        ..question.policy.clone()
    };
    if question.fits_under(&with(CpuUse::Partial)) {
        return Some("some layers on the CPU (cpu: partial)".to_owned());
    }
    question
        .fits_under(&with(CpuUse::Allow))
        .then(|| "the CPU (cpu: allow)".to_owned())
}

/// The largest number between `least` and `most` that does, where the smaller do if a larger does.
fn largest_that(least: u32, most: u32, does: impl Fn(u32) -> bool) -> Option<u32> {
    if least > most || !does(least) {
        return None;
    }
    let (mut does_up_to, mut end) = (least, most.saturating_add(1));
    while end.saturating_sub(does_up_to) > 1 {
        let middle = does_up_to.midpoint(end);
        if does(middle) {
            does_up_to = middle;
        } else {
            end = middle;
        }
    }
    Some(does_up_to)
}
