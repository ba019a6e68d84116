//! Why a model goes where it goes, in words.

use std::borrow::Borrow;
use std::fmt::Write as _;

use super::decide::{Decision, Share, Step};
use super::policy::{Policy, Running, Strategy};
use super::words::{list, size};
use crate::gpu::{Gpu, GpuHealth};

/// The reason of a decision: what it takes, why no earlier step of the house order would do,
/// and who leaves.
pub(crate) fn reason<G: Borrow<Gpu>>(
    decision: &Decision,
    all_layers: u32,
    gpus: &[G],
    policy: &Policy,
    running: &[&Running],
) -> String {
    let gpu = |share: &Share| gpus.get(share.gpu).map(Borrow::<Gpu>::borrow);
    let shares: Vec<String> = decision
        .shares
        .iter()
        .filter_map(|share| gpu(share).map(|gpu| described(share, gpu, decision.shares.len() > 1)))
        .collect();
    let shares = list(&shares, "and");
    let alone = size(decision.alone_bytes);
    let gpu_layers = decision.gpu_layers();
    let mut words = match decision.step {
        Step::One => format!("{shares}; {}", preference(policy.strategy)),
        Step::Several => format!(
            "no single GPU has {alone} free; {} GPUs are the fewest that have room together: {shares}",
            decision.shares.len()
        ),
        Step::OneEvicting => format!(
            "no GPU has {alone} free; {}: {shares}",
            leaving(decision, running)
        ),
        Step::SeveralEvicting => format!(
            "no single GPU could have {alone} free, nor several together; {}, the fewest GPUs that then have room \
             together are {}: {shares}",
            leaving(decision, running),
            decision.shares.len()
        ),
        Step::Partial => format!(
            "all of it needs {alone} on one GPU, and no GPUs have room for it; its policy lets layers stay on the \
             CPU: {shares}, {} of {all_layers} layers on the CPU",
            all_layers.saturating_sub(gpu_layers)
        ),
        Step::Cpu if decision.alone_bytes == 0 => {
            "none of its layers are to be on a GPU".to_owned()
        }
        Step::Cpu => {
            format!("no GPUs have room for it ({alone} on one GPU); its policy allows the CPU")
        }
    };
    if decision.step != Step::Partial && decision.step != Step::Cpu && gpu_layers < all_layers {
        let rest = all_layers.saturating_sub(gpu_layers);
        let _ = write!(
            words,
            "; {rest} of {all_layers} layers stay on the CPU, as asked"
        );
    }
    for gpu in decision.shares.iter().filter_map(gpu) {
        if let GpuHealth::Degraded(what) = &gpu.health {
            let _ = write!(
                words,
                "; GPU {} is degraded ({what}) and no healthier choice had room",
                gpu.index
            );
        }
    }
    words
}

fn described(share: &Share, gpu: &Gpu, with_layers: bool) -> String {
    let room = format!("{} of {}", size(share.bytes), size(share.budget_bytes));
    let name = if gpu.mig {
        format!("{} (MIG)", gpu.uuid)
    } else {
        format!("GPU {}", gpu.index)
    };
    if with_layers {
        format!("{} layers on {name} ({room})", share.layers)
    } else {
        format!("{name} has room ({room})")
    }
}

fn preference(strategy: Strategy) -> &'static str {
    match strategy {
        Strategy::SingleGpuPreferred => "of the GPUs with room it keeps the least over",
        Strategy::Distribute => "of the GPUs with room it is the emptiest",
        Strategy::Pack => "of the GPUs with room it is the fullest",
    }
}

fn leaving(decision: &Decision, running: &[&Running]) -> String {
    let leavers: Vec<String> = decision
        .evict
        .iter()
        .filter_map(|&place| running.get(place))
        .map(|model| {
            let bytes = model
                .bytes_by_gpu
                .iter()
                .fold(0_u64, |sum, (_, bytes)| sum.saturating_add(*bytes));
            format!(
                "{} (idle for {:.0} s, {})",
                model.id,
                model.idle_seconds.max(0.0),
                size(bytes)
            )
        })
        .collect();
    format!(
        "once {} left, the least costly to lose",
        match leavers.as_slice() {
            [one] => format!("{one} has"),
            many => format!("{} have", list(many, "and")),
        }
    )
}
