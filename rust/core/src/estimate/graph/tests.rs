//! The planner's parts against what they promise.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::cast_sign_loss)]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use proptest::prelude::*;

use super::buffer::Buffer;
use super::ops::Graph;
use super::repeats::{LEADING_LAYERS, representatives};
use super::reserve::Batch;
use super::tensor::{Op, Storage, TensorId};
use super::{Workspace, families, plan};
use crate::estimate::{Backend, CpuMoe, EstimateOptions, FlashAttention, Layout};
use crate::gguf::{GgmlType, Header, parse};
use crate::model::ModelFacts;

proptest! {
    #[test]
    fn a_buffer_never_gives_the_same_bytes_twice(steps in prop::collection::vec((any::<bool>(), 1_i64..64, any::<prop::sample::Index>()), 1..200)) {
        let mut buffer = Buffer::default();
        buffer.reset();
        let mut live: Vec<(i64, i64)> = Vec::new();
        for (frees, blocks, which) in steps {
            if frees && !live.is_empty() {
                let (offset, bytes) = live.swap_remove(which.index(live.len()));
                buffer.release(offset, bytes);
                continue;
            }
            let bytes = blocks * 32;
            let offset = buffer.allocate(bytes);
            prop_assert!(live.iter().all(|(start, size)| offset + bytes <= *start || start + size <= offset));
            prop_assert!(offset + bytes <= buffer.peak);
            live.push((offset, bytes));
        }
        let peak = buffer.peak;
        for (offset, bytes) in live {
            buffer.release(offset, bytes);
        }
        // all given back, the buffer is one block again
        prop_assert_eq!(buffer.allocate(peak.max(32)), 0);
    }

    #[test]
    fn repeated_rounds_stand_for_every_layer_once(kinds in prop::collection::vec(0_u64..3, 1..80), short in any::<bool>()) {
        let lead = LEADING_LAYERS - usize::from(short);
        let (built, repeats) = representatives(&kinds, lead, short);
        let skipped: usize = repeats.iter().map(|repeat| repeat.more * repeat.period).sum();
        prop_assert_eq!(built.len() + skipped, kinds.len());
        prop_assert!(built.is_sorted());
        prop_assert_eq!(built.last().copied(), Some(kinds.len() - 1));
        let mut played = Vec::new();
        for (place, il) in built.iter().enumerate() {
            if let Some(repeat) = repeats.iter().find(|repeat| repeat.first == place) {
                let round: Vec<u64> = built[place..place + repeat.period].iter().map(|il| kinds[*il]).collect();
                for _ in 0..repeat.more {
                    played.extend_from_slice(&round);
                }
            }
            played.push(kinds[*il]);
        }
        prop_assert_eq!(played, kinds);
    }
}

#[test]
fn a_long_stack_of_like_layers_is_built_four_times() {
    let (built, repeats) = representatives(&[7; 32], LEADING_LAYERS, false);
    assert_eq!(built, [0, 1, 2, 31]);
    assert_eq!(repeats.len(), 1);
    assert_eq!(repeats[0].more, 28);
}

#[test]
fn sources_join_a_graph_before_what_reads_them_and_only_once() {
    let mut graph = Graph::default();
    let input = graph.input(GgmlType::F32, [8, 4, 1, 1]);
    let normed = graph.rms_norm(input);
    let scaled = graph.unary(normed);
    let sum = graph.add(scaled, normed);
    graph.expand(sum);
    graph.expand(normed);
    assert_eq!(graph.leaves, [input]);
    assert_eq!(graph.nodes, [normed, scaled, sum]);
}

#[test]
fn a_view_of_what_a_model_lacks_reads_nothing_of_an_earlier_graph() {
    let mut graph = Graph::default();
    let x = graph.input(GgmlType::F32, [64, 2, 1, 1]);
    for _ in 0..2 {
        let view = graph.reshape_2d(x, 128, 1);
        assert_eq!(graph.viewed(view), x);
    }
    graph.clear();
    for _ in 0..3 {
        let view = graph.reshape_2d(TensorId::NONE, 128, 1);
        assert_eq!(graph.viewed(view), TensorId::NONE);
    }
}

#[test]
fn nothing_is_one_with_rows_that_the_host_picks() {
    let mut graph = Graph::default();
    graph.merges = true;
    let ids = graph.input(GgmlType::I32, [4, 1, 1, 1]);
    for (backend, merges) in [(0, true), (1, false)] {
        let table = graph.stored(GgmlType::F32, [8, 16, 1, 1], Storage::Weights(backend));
        let rows = graph.get_rows(table, ids);
        assert_eq!(graph.unary_alone(rows) == rows, merges);
    }
}

#[test]
fn strides_decide_how_many_bytes_a_view_spans() {
    let mut graph = Graph::default();
    let whole = graph.input(GgmlType::F32, [16, 4, 1, 1]);
    let half = graph.view_2d(whole, 8, 4, 64);
    assert_eq!(graph.get(whole).bytes(), 256);
    assert_eq!(graph.get(half).bytes(), 3 * 64 + 8 * 4);
    assert!(!graph.get(half).is_contiguous());
    assert_eq!(graph.get(half).op, Op::View);
    let joined = graph.cont(half);
    assert_eq!(graph.get(joined).bytes(), 128);
}

/// The carried models, by name.
fn carried_models() -> Vec<(String, ModelFacts)> {
    let folder =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/ground_truth/headers");
    let mut files: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    files
        .iter()
        .map(|file| {
            let mut packed = lzma_rust2::XzReader::new(fs::File::open(file).unwrap(), false);
            let mut bytes = Vec::new();
            std::io::Read::read_to_end(&mut packed, &mut bytes).unwrap();
            let parsed = parse(&bytes, 1 << 50).unwrap();
            let header = Header {
                version: parsed.version,
                byte_order: parsed.byte_order,
                alignment: parsed.alignment,
                metadata: parsed.metadata,
                tensors: parsed.tensors,
                shards: Vec::new(),
                file_bytes: 1 << 50,
                path: file.clone(),
            };
            let name = file.file_name().unwrap().to_string_lossy().into_owned();
            (name, ModelFacts::from_header(&header).unwrap())
        })
        .collect()
}

/// Options under which layers differ, splits begin within layers, or attention runs on another backend.
fn options(facts: &ModelFacts) -> Vec<EstimateOptions> {
    let layers = facts.layer_count();
    let mut all = Vec::new();
    for backend in [Backend::Cuda, Backend::Generic] {
        for flash_attention in [
            FlashAttention::Auto,
            FlashAttention::On,
            FlashAttention::Off,
        ] {
            for (devices, gpu_layers) in [
                (1, None),
                (1, Some(layers / 2)),
                (1, Some(0)),
                (1, Some(layers)),
                (2, None),
                (3, Some(layers * 2 / 3)),
                (0, None),
            ] {
                for (kv_offload, cpu_moe_layers) in [
                    (true, CpuMoe::None),
                    (false, CpuMoe::None),
                    (true, CpuMoe::All),
                    (false, CpuMoe::Layers(layers / 3)),
                ] {
                    all.push(EstimateOptions {
                        context_length: 8192,
                        backend,
                        flash_attention,
                        devices,
                        gpu_layers,
                        kv_offload,
                        cpu_moe_layers,
                        ..EstimateOptions::default()
                    });
                }
            }
        }
    }
    all
}

/// As many layers as a large model has.
const DEEP: usize = 47;

/// Of the options for deep models only each so many is asked with.
const EVERY: usize = 11;

fn mapped<T: Copy>(list: &mut Vec<T>, order: &[usize]) {
    if !list.is_empty() {
        *list = order
            .iter()
            .filter_map(|il| list.get(*il).copied())
            .collect();
    }
}

/// The same with more layers: the pattern in which those behind the leading dense ones follow each other goes on.
fn deepened(facts: &ModelFacts, layers: usize) -> ModelFacts {
    let mut deep = facts.clone();
    let hyper = &mut deep.hyperparameters;
    let have = hyper.layer_count() as usize;
    let behind = have - hyper.trunk_layers() as usize;
    let leading = (hyper.leading_dense_layers as usize).min(have - behind - 1);
    let body = have - behind - leading;
    let like = |a: usize, b: usize| {
        facts.graph.kind(a) == facts.graph.kind(b)
            && hyper.is_sliding(a as u32) == hyper.is_sliding(b as u32)
            && hyper.compress_ratios.get(a) == hyper.compress_ratios.get(b)
            && hyper.owns_indexer.get(a) == hyper.owns_indexer.get(b)
    };
    let goes_on =
        |period: &usize| (leading + period..have - behind).all(|il| like(il, il - period));
    let period = (1..body).find(goes_on).unwrap_or(body);
    let mut order: Vec<usize> = (0..leading + body).collect();
    while order.len() + behind < layers {
        order.push(order[order.len() - period]);
    }
    order.extend(have - behind..have);
    for list in [
        &mut hyper.heads,
        &mut hyper.kv_heads,
        &mut hyper.feed_forward,
        &mut hyper.expert_feed_forward,
        &mut hyper.experts_used,
        &mut hyper.compress_ratios,
    ] {
        mapped(list, &order);
    }
    for list in [
        &mut hyper.sliding,
        &mut hyper.recurrent,
        &mut hyper.owns_indexer,
    ] {
        mapped(list, &order);
    }
    hyper.stored_layers = hyper.stored_layers.max(order.len() as u32);
    deep.graph = facts.graph.clone().with_layers(&order);
    deep
}

/// Where the short cut says something else than all layers one by one.
fn differences(name: &str, facts: &ModelFacts, options: &[EstimateOptions]) -> Vec<String> {
    let mut workspace = Workspace::default();
    let mut wrong = Vec::new();
    for options in options {
        let Ok(resolved) = options.resolve(facts) else {
            continue;
        };
        let layout = Layout::new(facts.layer_count(), options);
        let batch = Batch::new(options, &resolved, &layout);
        let may_do_without = options.flash_attention == FlashAttention::Auto;
        let mut each = batch.clone();
        each.every_layer = true;
        each.one_backend = false;
        let quick = plan(&mut workspace, facts, batch, may_do_without);
        let slow = plan(&mut workspace, facts, each, may_do_without);
        if quick != slow {
            wrong.push(format!(
                "{name}: {quick:?} is not {slow:?} with {options:?}"
            ));
        }
    }
    wrong
}

#[test]
fn repeated_layers_cost_what_they_cost_one_by_one() {
    let mut wrong = Vec::new();
    for (number, (name, facts)) in carried_models().into_iter().enumerate() {
        wrong.extend(differences(&name, &facts, &options(&facts)));
        let deep = deepened(&facts, DEEP);
        let some: Vec<_> = options(&deep)
            .into_iter()
            .skip(number % EVERY)
            .step_by(EVERY)
            .collect();
        wrong.extend(differences(&format!("{name}, {DEEP} layers"), &deep, &some));
    }
    assert!(wrong.is_empty(), "{}: {}", wrong.len(), wrong.join("\n"));
}

/// Merging is right where the source is read by nothing else, is no view or output, and has the shape of the result; what is added back
/// was there before, and is added right after what it is added to was made. Each place in a model's description that claims so is held to
/// it, on graphs in which nothing is merged.
#[test]
fn what_is_merged_is_read_by_nothing_else() {
    let mut workspace = Workspace::default();
    let mut held = 0;
    let mut wrong = BTreeSet::new();
    for (name, facts) in carried_models() {
        for options in options(&facts).into_iter().step_by(3) {
            let Ok(resolved) = options.resolve(&facts) else {
                continue;
            };
            let layout = Layout::new(facts.layer_count(), &options);
            let mut batch = Batch::new(&options, &resolved, &layout);
            batch.one_backend = false;
            families::build(&mut workspace.graph, &facts, &batch);
            let graph = &workspace.graph;
            for (id, at) in graph
                .alone
                .iter()
                .filter(|(id, _)| graph.nodes.contains(id))
            {
                let [source, ..] = graph.get(*id).sources;
                let made = graph.get(source);
                if !graph.is_made(source) {
                    continue; // never merged
                }
                let reads = graph.nodes.iter().flat_map(|node| graph.reads(*node));
                let is_viewed = graph
                    .nodes
                    .iter()
                    .any(|node| graph.get(*node).view_of == source);
                let is_alone = reads.filter(|read| *read == source).count() == 1 && !is_viewed;
                let place = |id: TensorId| graph.nodes.iter().position(|node| *node == id);
                let is_next = || {
                    let (made, steps) = graph.made_alone(*id);
                    let earlier = graph.reads(*id).nth(1).and_then(place);
                    earlier < place(made) && place(made).map(|at| at + steps) == place(*id)
                };
                if !is_alone
                    || made.is_output
                    || !graph.get(*id).same_layout(made)
                    || (graph.added_back.contains(id) && !is_next())
                {
                    wrong.insert(format!("{at}: {name}"));
                }
                held += 1;
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(held > 10_000, "{held}");
}

#[test]
fn the_largest_sizes_that_are_read_end_in_some_answer() {
    let mut answers = 0;
    for (_, facts) in carried_models() {
        for (length, count) in [(0, 0), (1 << 12, 1 << 12), (1 << 24, 1), (1, 1 << 24)] {
            let mut facts = facts.clone();
            let hyper = &mut facts.hyperparameters;
            for size in [
                &mut hyper.key_length,
                &mut hyper.value_length,
                &mut hyper.key_length_sliding,
                &mut hyper.value_length_sliding,
            ] {
                *size = length;
            }
            for heads in [&mut hyper.heads, &mut hyper.kv_heads] {
                heads.fill(count);
            }
            for mut options in options(&facts).into_iter().step_by(37) {
                options.context_length = 1 << 31;
                options.micro_batch = u32::MAX;
                options.batch = u32::MAX;
                // an answer, or none: what it says means nothing
                if let Ok(estimate) = crate::estimate::estimate(&facts, &options) {
                    assert_eq!(estimate.devices.len(), options.devices as usize);
                    answers += 1;
                }
            }
        }
    }
    assert!(answers > 1000, "{answers}");
}
