//! Reading a header, against the least that any reader must do: read its bytes and go from string to string.
//!
//! `cargo bench --bench header` measures a made-up vocabulary; with `GGUF_BENCH_FILES` (a list of
//! paths as in `PATH`) it measures those files too.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::print_stdout,
    missing_docs
)]
#![allow(
    clippy::semicolon_if_nothing_returned,
    reason = "what a closure returns is what is measured"
)]

#[path = "../tests/support/gguf_bytes.rs"]
#[allow(dead_code, reason = "the tests use the rest of it")]
mod gguf_bytes;

use std::env;
use std::fs;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime};

use criterion::{Criterion, criterion_group, criterion_main};
use gguf_bytes::sample;
use llama_gpu_core::gguf::{HeaderCache, read_header};

/// Where the lists of strings begin, and how many strings each has.
fn string_lists(path: &Path) -> Vec<(usize, u64)> {
    let header = read_header(path).unwrap();
    let arrays = header
        .metadata
        .iter()
        .filter_map(|(_, value)| value.as_array());
    let lists = arrays.filter(|array| array.element == llama_gpu_core::gguf::ValueType::String);
    lists
        .map(|array| (usize::try_from(array.place.offset).unwrap(), array.len))
        .collect()
}

/// The yardstick: the file into memory, then length by length over its strings, nothing else.
fn read_and_walk(path: &Path, lists: &[(usize, u64)]) -> usize {
    let bytes = fs::read(path).unwrap();
    let mut end = 0;
    for (start, count) in lists {
        let mut position = *start;
        for _ in 0..*count {
            let length = u64::from_le_bytes(bytes[position..position + 8].try_into().unwrap());
            position += 8 + usize::try_from(length).unwrap();
        }
        end = position;
    }
    end
}

fn measure(criterion: &mut Criterion, name: &str, path: &Path) {
    let lists = string_lists(path);
    let mut group = criterion.benchmark_group(name);
    group.bench_function("read_header", |run| {
        run.iter(|| read_header(black_box(path)).unwrap())
    });
    group.bench_function("bare walk and read", |run| {
        run.iter(|| read_and_walk(black_box(path), &lists))
    });
    let cache = HeaderCache::new(4);
    let now = SystemTime::now() + std::time::Duration::from_secs(1);
    group.bench_function("cached", |run| {
        run.iter(|| cache.get(black_box(path), now).unwrap())
    });
    group.finish();
    let ratio = ratio(
        || {
            black_box(read_header(black_box(path)).unwrap());
        },
        || {
            black_box(read_and_walk(black_box(path), &lists));
        },
    );
    println!("{name}: read_header takes {ratio:.2} times the bare walk and read\n");
}

/// How many times as long the first takes as the second, by medians; they take turns.
fn ratio(first: impl Fn(), second: impl Fn()) -> f64 {
    let time = |call: &dyn Fn()| {
        let start = Instant::now();
        call();
        start.elapsed().as_secs_f64()
    };
    let (mut ones, mut twos): (Vec<f64>, Vec<f64>) =
        (0..301).map(|_| (time(&first), time(&second))).unzip();
    ones.sort_by(f64::total_cmp);
    twos.sort_by(f64::total_cmp);
    ones[150] / twos[150]
}

fn headers(criterion: &mut Criterion) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vocabulary.gguf");
    let tokens: Vec<String> = (0..128_000).map(|number| format!("tok{number}")).collect();
    let merges: Vec<String> = (0..280_000)
        .map(|number| format!("t{} k{number}", number % 997))
        .collect();
    let borrowed =
        |strings: &'static [String]| strings.iter().map(String::as_str).collect::<Vec<_>>();
    let file = sample(3, false)
        .strings("list.tokens", &borrowed(tokens.leak()))
        .strings("list.merges", &borrowed(merges.leak()));
    fs::write(&path, file.file()).unwrap();
    measure(criterion, "408,000 strings", &path);
    let given = env::var_os("GGUF_BENCH_FILES").unwrap_or_default();
    for path in env::split_paths(&given).filter(|path| *path != PathBuf::new()) {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        measure(criterion, &name, &path);
    }
}

criterion_group!(benches, headers);
criterion_main!(benches);
