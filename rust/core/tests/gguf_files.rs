//! Reading real files: through the window, over shards, from the cache.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

#[path = "support/gguf_bytes.rs"]
#[allow(dead_code, reason = "each test file uses a part of it")]
mod gguf_bytes;

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use gguf_bytes::{GgufBytes, sample};
use llama_gpu_core::gguf::{
    GgufErrorKind as Kind, HeaderCache, ReadError, Value, parse, read_header,
};
use tempfile::{TempDir, tempdir};

fn write(folder: &TempDir, name: &str, file: &GgufBytes) -> PathBuf {
    let path = folder.path().join(name);
    fs::write(&path, file.file()).unwrap();
    path
}

fn refusal(path: &Path) -> Kind {
    match read_header(path).unwrap_err() {
        ReadError::Invalid { error, .. } => error.kind,
        ReadError::Io { source, .. } => panic!("expected a refusal, got {source}"),
    }
}

fn io_kind(path: &Path) -> ErrorKind {
    match read_header(path).unwrap_err() {
        ReadError::Io { source, .. } => source.kind(),
        ReadError::Invalid { error, .. } => panic!("expected an I/O error, got {error}"),
    }
}

/// Long and short strings of all lengths around the window's size, so that they straddle its ends.
fn large_header() -> GgufBytes {
    let words: Vec<String> = (0..90_000).map(|number| "w".repeat(number % 23)).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    sample(3, false)
        .string("template", "t".repeat(100_000))
        .strings("words", &words)
        .string("very.long", "v".repeat(700_000))
        .string("last", "end")
}

#[test]
fn a_file_seen_through_a_window_says_what_its_bytes_say() {
    let folder = tempdir().unwrap();
    for file in [sample(3, false), sample(2, true), large_header()] {
        let path = write(&folder, "model.gguf", &file);
        let bytes = file.file();
        let whole = parse(&bytes, bytes.len() as u64).unwrap();
        let header = read_header(&path).unwrap();
        assert_eq!(header.metadata, whole.metadata);
        assert_eq!(header.tensors, whole.tensors);
        assert_eq!(header.shards[0].data_offset, whole.data_offset);
        assert_eq!(header.file_bytes, bytes.len() as u64);
    }
}

#[test]
fn lists_and_long_strings_are_read_when_asked_for() {
    let folder = tempdir().unwrap();
    let header = read_header(&write(&folder, "model.gguf", &large_header())).unwrap();
    let words = header
        .read_array(header.metadata.array("words").unwrap())
        .unwrap();
    assert_eq!(words.len(), 90_000);
    assert_eq!(words.get(22), Some(Value::String("w".repeat(22).into())));
    assert_eq!(
        words.get(89_999),
        Some(Value::String("w".repeat(89_999 % 23).into()))
    );
    assert_eq!(words.get(90_000), None);
    let Some(Value::LongString(place)) = header.metadata.get("very.long") else {
        panic!("a long string")
    };
    assert_eq!(header.read_place(*place).unwrap(), b"v".repeat(700_000));
    assert_eq!(header.metadata.str("last"), Some("end"));
}

#[test]
fn arrays_within_arrays_are_read_in_both_byte_orders() {
    let folder = tempdir().unwrap();
    for big_endian in [false, true] {
        let header = read_header(&write(&folder, "model.gguf", &sample(3, big_endian))).unwrap();
        let outer = header
            .read_array(header.metadata.array("a.nested").unwrap())
            .unwrap();
        let inner = |index: usize| {
            let value = outer.get(index).unwrap();
            value
                .as_array()
                .unwrap()
                .items()
                .unwrap()
                .iter()
                .collect::<Vec<Value>>()
        };
        assert_eq!(outer.len(), 2);
        assert_eq!(inner(0), [Value::Bool(true), Value::Bool(false)]);
        assert_eq!(inner(1), [Value::String("deep".into())]);
    }
}

#[test]
fn a_list_of_a_file_that_has_changed_is_refused() {
    let folder = tempdir().unwrap();
    let path = write(&folder, "model.gguf", &sample(3, false));
    let header = read_header(&path).unwrap();
    fs::write(&path, sample(3, true).data(4096).file()).unwrap();
    let error = header
        .read_array(header.metadata.array("tokenizer.ggml.tokens").unwrap())
        .unwrap_err();
    assert!(matches!(error, ReadError::Invalid { error, .. } if error.kind == Kind::FileChanged));
}

#[test]
fn a_value_too_large_to_hand_out_is_refused() {
    let folder = tempdir().unwrap();
    let file = GgufBytes::default().string("huge", "h".repeat(33 << 20));
    let header = read_header(&write(&folder, "model.gguf", &file)).unwrap();
    let Some(Value::LongString(place)) = header.metadata.get("huge") else {
        panic!("a long string")
    };
    let error = header.read_place(*place).unwrap_err();
    assert!(
        matches!(error, ReadError::Invalid { error, .. } if error.kind.reason() == "value_too_large")
    );
}

#[test]
fn what_is_no_file_is_an_io_error() {
    let folder = tempdir().unwrap();
    assert_eq!(
        io_kind(&folder.path().join("none.gguf")),
        ErrorKind::NotFound
    );
    assert_eq!(io_kind(folder.path()), ErrorKind::IsADirectory);
    #[cfg(unix)]
    assert_eq!(io_kind(Path::new("/dev/zero")), ErrorKind::InvalidInput);
}

#[test]
fn an_empty_file_is_truncated() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("empty.gguf");
    File::create(&path).unwrap();
    assert_eq!(refusal(&path).reason(), "truncated");
}

#[test]
fn a_sparse_file_that_promises_a_huge_header_is_refused_and_not_walked() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("hole.gguf");
    let header = GgufBytes::default()
        .array("k", gguf_bytes::STRING, 1 << 34, &[])
        .header();
    fs::write(&path, header).unwrap();
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(1 << 38)
        .unwrap();
    assert_eq!(refusal(&path), Kind::HeaderTooLarge);
}

// --- split models ----------------------------------------------------------------

fn shard(number: u16, count: u16, tensors: u32) -> GgufBytes {
    let file = GgufBytes::default();
    let file = if number == 0 {
        file.string("general.architecture", "llama")
    } else {
        file
    };
    let name = format!("blk.{number}.weight");
    file.raw("split.no", 2, &number.to_le_bytes())
        .raw("split.count", 2, &count.to_le_bytes())
        .raw("split.tensors.count", 5, &tensors.to_le_bytes())
        .tensor(name, &[8], 0, 0)
        .data(32)
}

fn write_split(folder: &TempDir) -> Vec<PathBuf> {
    let write = |number: u16| {
        write(
            folder,
            &format!("model-{:05}-of-00003.gguf", number + 1),
            &shard(number, 3, 3),
        )
    };
    (0..3).map(write).collect()
}

#[test]
fn any_shard_leads_to_all() {
    let folder = tempdir().unwrap();
    let paths = write_split(&folder);
    for path in &paths {
        let header = read_header(path).unwrap();
        assert_eq!(header.path, *path);
        assert_eq!(header.architecture(), Some("llama"));
        let tensors: Vec<_> = header
            .tensors
            .iter()
            .map(|tensor| (tensor.name.as_ref(), tensor.shard))
            .collect();
        assert_eq!(
            tensors,
            [
                ("blk.0.weight", 0),
                ("blk.1.weight", 1),
                ("blk.2.weight", 2)
            ]
        );
        let sizes = paths.iter().map(|path| fs::metadata(path).unwrap().len());
        assert_eq!(header.file_bytes, sizes.sum::<u64>());
        let shards: Vec<_> = header
            .shards
            .iter()
            .map(|shard| shard.path.clone())
            .collect();
        assert_eq!(shards, paths);
    }
}

#[test]
fn a_missing_shard_is_named() {
    let folder = tempdir().unwrap();
    let paths = write_split(&folder);
    fs::remove_file(&paths[1]).unwrap();
    assert_eq!(
        refusal(&paths[0]),
        Kind::MissingShard {
            missing: paths[1].clone()
        }
    );
}

#[test]
fn a_broken_shard_is_named() {
    let folder = tempdir().unwrap();
    let paths = write_split(&folder);
    fs::write(&paths[2], b"GGML").unwrap();
    let Err(ReadError::Invalid { path, error }) = read_header(&paths[0]) else {
        panic!("a refusal")
    };
    assert_eq!((path, error.kind.reason()), (paths[2].clone(), "bad_magic"));
}

#[test]
fn a_shard_of_another_name_is_refused() {
    let folder = tempdir().unwrap();
    let path = write(&folder, "renamed.gguf", &shard(1, 3, 3));
    assert_eq!(
        refusal(&path),
        Kind::ShardNameInvalid {
            expected: "-00002-of-00003.gguf".to_owned()
        }
    );
}

#[test]
fn shards_that_disagree_on_their_count_are_refused() {
    let folder = tempdir().unwrap();
    let paths = write_split(&folder);
    fs::write(&paths[1], shard(1, 4, 3).file()).unwrap();
    let expected = Kind::ShardCountMismatch {
        shard: paths[1].clone(),
        found: 4,
        expected: 3,
    };
    assert_eq!(refusal(&paths[0]), expected);
}

#[test]
fn a_shard_in_the_place_of_another_is_refused() {
    let folder = tempdir().unwrap();
    let paths = write_split(&folder);
    fs::copy(&paths[2], &paths[1]).unwrap();
    let expected = Kind::ShardNumberMismatch {
        shard: paths[1].clone(),
        found: Some(2),
        expected: 1,
    };
    assert_eq!(refusal(&paths[0]), expected);
}

#[test]
fn shards_without_some_of_their_tensors_are_refused() {
    let folder = tempdir().unwrap();
    let paths = write_split(&folder);
    fs::write(&paths[0], shard(0, 3, 4).file()).unwrap();
    assert_eq!(
        refusal(&paths[0]),
        Kind::ShardTensorCountMismatch {
            found: 3,
            expected: 4
        }
    );
}

#[test]
fn a_tensor_that_is_in_two_shards_is_refused() {
    let folder = tempdir().unwrap();
    let paths = write_split(&folder);
    let twice = GgufBytes::default()
        .raw("split.no", 2, &[1, 0])
        .raw("split.count", 2, &[3, 0])
        .tensor("blk.0.weight", &[8], 0, 0)
        .data(32);
    fs::write(&paths[1], twice.file()).unwrap();
    assert_eq!(
        refusal(&paths[0]),
        Kind::DuplicateTensor {
            tensor: "blk.0.weight".to_owned()
        }
    );
}

#[test]
fn a_name_like_a_shard_s_makes_no_split_model() {
    let folder = tempdir().unwrap();
    let path = write(&folder, "model-00001-of-00002.gguf", &sample(3, false));
    assert_eq!(read_header(&path).unwrap().shards.len(), 1);
}

// --- the cache -------------------------------------------------------------------

fn later() -> SystemTime {
    SystemTime::now() + Duration::from_secs(1)
}

#[test]
fn a_second_look_reads_nothing() {
    let folder = tempdir().unwrap();
    let path = write_split(&folder)[0].clone();
    let cache = HeaderCache::new(4);
    let first = cache.get(&path, later()).unwrap();
    assert!(Arc::ptr_eq(&first, &cache.get(&path, later()).unwrap()));
}

#[test]
fn a_changed_file_is_read_anew() {
    let folder = tempdir().unwrap();
    let path = write(&folder, "model.gguf", &GgufBytes::default().u32("k", 1));
    let cache = HeaderCache::new(4);
    assert_eq!(
        cache.get(&path, later()).unwrap().metadata.u32("k"),
        Some(1)
    );
    // Of the same length, as another inode.
    fs::remove_file(&path).unwrap();
    write(&folder, "model.gguf", &GgufBytes::default().u32("k", 2));
    assert_eq!(
        cache.get(&path, later()).unwrap().metadata.u32("k"),
        Some(2)
    );
    fs::remove_file(&path).unwrap();
    assert!(matches!(
        cache.get(&path, later()),
        Err(ReadError::Io { .. })
    ));
}

#[test]
fn a_changed_shard_is_read_anew() {
    let folder = tempdir().unwrap();
    let paths = write_split(&folder);
    let cache = HeaderCache::new(4);
    cache.get(&paths[0], later()).unwrap();
    fs::remove_file(&paths[2]).unwrap();
    let error = cache.get(&paths[0], later()).unwrap_err();
    assert!(
        matches!(error, ReadError::Invalid { error, .. } if error.kind.reason() == "missing_shard")
    );
}

#[test]
fn a_file_that_changed_just_now_is_not_kept() {
    let folder = tempdir().unwrap();
    let path = write(&folder, "model.gguf", &sample(3, false));
    let changed = fs::metadata(&path).unwrap().modified().unwrap();
    let cache = HeaderCache::new(4);
    cache
        .get(&path, changed + Duration::from_millis(50))
        .unwrap();
    assert!(cache.find(&path).is_none());
    cache
        .get(&path, changed + Duration::from_millis(500))
        .unwrap();
    assert!(cache.find(&path).is_some());
}

#[test]
fn the_cache_is_bounded_and_the_longest_unused_leaves() {
    let folder = tempdir().unwrap();
    let paths: Vec<_> = (0..3)
        .map(|number| write(&folder, &format!("{number}.gguf"), &sample(3, false)))
        .collect();
    let cache = HeaderCache::new(2);
    for index in [0, 1, 0, 2] {
        cache.get(&paths[index], later()).unwrap();
    }
    assert!(cache.find(&paths[0]).is_some());
    assert!(cache.find(&paths[1]).is_none(), "the one longest unused");
    assert!(cache.find(&paths[2]).is_some());
}
