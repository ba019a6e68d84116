//! One test per refusal, named after it: the kind, and the byte at which it is noticed.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

#[path = "support/gguf_bytes.rs"]
#[allow(dead_code, reason = "each test file uses a part of it")]
mod gguf_bytes;

use gguf_bytes::{ARRAY, F32, GgufBytes, STRING, U8, U32, U64};
use llama_gpu_core::gguf::{
    GgufError, GgufErrorKind as Kind, MAX_METADATA, MAX_NESTED_ARRAYS, MAX_TENSORS, parse,
};

/// Where the first entry or tensor begins: magic, version, two counts.
const BODY: u64 = 24;

fn refusal(file: &[u8]) -> GgufError {
    parse(file, file.len() as u64).unwrap_err()
}

fn new() -> GgufBytes {
    GgufBytes::default()
}

macro_rules! refuses {
    ($($name:ident: $file:expr => $kind:expr, at $offset:expr;)*) => { $(
        #[test]
        fn $name() {
            let error = refusal(&$file);
            assert_eq!((error.kind, error.offset), ($kind, $offset));
        }
    )* };
}

fn tensor(name: &str) -> String {
    name.to_owned()
}

refuses! {
    refuses_another_magic: GgufBytes { magic: *b"GGML", ..new() }.file() => Kind::BadMagic { found: *b"GGML" }, at 0;
    refuses_version_1_by_name: GgufBytes { version: 1, ..new() }.file() => Kind::Version1, at 4;
    refuses_version_1_of_the_other_byte_order: GgufBytes { version: 1, big_endian: true, ..new() }.file() => Kind::Version1, at 4;
    refuses_version_0: GgufBytes { version: 0, ..new() }.file() => Kind::UnknownVersion { version: 0 }, at 4;
    refuses_a_later_version: GgufBytes { version: 4, ..new() }.file() => Kind::UnknownVersion { version: 4 }, at 4;

    refuses_more_tensors_than_the_file_can_describe: GgufBytes { tensor_count: Some(1000), ..new() }.file()
        => Kind::TensorCountAbsurd { count: 1000 }, at 8;
    refuses_a_negative_tensor_count: GgufBytes { tensor_count: Some(u64::MAX), ..new() }.file()
        => Kind::TensorCountAbsurd { count: u64::MAX }, at 8;
    refuses_more_metadata_than_the_file_can_hold: GgufBytes { metadata_count: Some(1000), ..new() }.file()
        => Kind::MetadataCountAbsurd { count: 1000 }, at 16;
    refuses_a_negative_metadata_count: GgufBytes { metadata_count: Some(u64::MAX), ..new() }.file()
        => Kind::MetadataCountAbsurd { count: u64::MAX }, at 16;

    refuses_a_string_longer_than_the_file: new().raw("k", STRING, &u64::MAX.to_le_bytes()).file()
        => Kind::StringLongerThanFile { length: u64::MAX, reading: "a metadata string" }, at BODY + 8 + 1 + 4;
    refuses_an_array_longer_than_the_file: new().array("k", U32, 1 << 40, &[]).file()
        => Kind::ArrayLongerThanFile { count: 1 << 40 }, at BODY + 8 + 1 + 4 + 4;
    refuses_an_array_whose_size_overflows: new().array("k", U64, u64::MAX, &[]).file()
        => Kind::ArrayLongerThanFile { count: u64::MAX }, at BODY + 8 + 1 + 4 + 4;
    refuses_a_token_longer_than_the_file: new().array("k", STRING, 1, &u64::MAX.to_le_bytes()).file()
        => Kind::StringLongerThanFile { length: u64::MAX, reading: "an array of strings" }, at BODY + 8 + 1 + 4 + 12;
    refuses_arrays_nested_too_deep: {
        let level = [new().number32(ARRAY), new().number64(1)].concat();
        new().raw("k", ARRAY, &level.repeat(MAX_NESTED_ARRAYS as usize + 2)).file()
    } => Kind::ArraysNestedTooDeep, at BODY + 8 + 1 + 4 + 12 * (u64::from(MAX_NESTED_ARRAYS) + 1);

    refuses_an_empty_key: new().u32("", 1).file() => Kind::EmptyKey, at BODY;
    refuses_a_key_that_is_too_long: new().u32(&"k".repeat(65_536), 1).file() => Kind::KeyTooLong { length: 65_536 }, at BODY;
    refuses_a_key_that_is_not_utf8: new().raw(b"\xFF", U8, &[1]).file() => Kind::KeyNotUtf8, at BODY;
    refuses_a_duplicate_key: new().u32("k", 1).u32("other", 2).u32("k", 3).file()
        => Kind::DuplicateKey { key: "k".to_owned() }, at BODY + 17 + 21;
    refuses_an_unknown_value_type: new().raw("k", 13, &[0; 8]).file()
        => Kind::UnknownValueType { number: 13 }, at BODY + 8 + 1;
    refuses_an_unknown_element_type: new().array("k", 99, 0, &[]).file()
        => Kind::UnknownValueType { number: 99 }, at BODY + 8 + 1 + 4;

    refuses_an_alignment_that_is_no_power_of_two: new().u32("general.alignment", 48).file()
        => Kind::BadAlignment { found: "48".to_owned() }, at 0;
    refuses_an_alignment_of_zero: new().u32("general.alignment", 0).file()
        => Kind::BadAlignment { found: "0".to_owned() }, at 0;
    refuses_an_alignment_of_another_type: new().raw("general.alignment", F32, &[0; 4]).file()
        => Kind::BadAlignment { found: "a value of type f32".to_owned() }, at 0;

    refuses_a_tensor_name_that_is_too_long: new().tensor("n".repeat(64), &[1], 0, 0).data(4).file()
        => Kind::TensorNameTooLong { length: 64 }, at BODY;
    refuses_a_tensor_name_that_is_not_utf8: new().tensor(b"\xC0", &[1], 0, 0).data(4).file()
        => Kind::TensorNameNotUtf8, at BODY;
    refuses_a_duplicate_tensor: new().tensor("t", &[8], 0, 0).tensor("t", &[8], 0, 32).data(64).file()
        => Kind::DuplicateTensor { tensor: tensor("t") }, at BODY + 33;
    refuses_five_dimensions: new().tensor("t", &[1; 5], 0, 0).data(4).file()
        => Kind::TooManyDimensions { tensor: tensor("t"), dimensions: 5 }, at BODY + 9;
    refuses_dimensions_whose_product_overflows: new().tensor("t", &[1 << 40, 1 << 40], 0, 0).data(4).file()
        => Kind::DimensionOverflow { tensor: tensor("t") }, at BODY + 9;
    refuses_a_negative_dimension: new().tensor("t", &[u64::MAX], 24, 0).data(4).file()
        => Kind::DimensionOverflow { tensor: tensor("t") }, at BODY + 9;
    refuses_a_size_in_bytes_that_overflows: new().tensor("t", &[1 << 62], 27, 0).data(4).file()
        => Kind::DimensionOverflow { tensor: tensor("t") }, at BODY + 9;
    refuses_a_row_that_is_no_multiple_of_the_block: new().tensor("t", &[33], 8, 0).data(64).file()
        => Kind::RowNotMultipleOfBlock { tensor: tensor("t"), row: 33, block: 32 }, at BODY + 9;
    refuses_an_unknown_ggml_type_by_number: new().tensor("t", &[32], 777, 0).data(64).file()
        => Kind::UnknownGgmlType { tensor: tensor("t"), number: 777 }, at BODY + 9 + 12;
    refuses_a_removed_ggml_type_by_name: new().tensor("t", &[32], 4, 0).data(64).file()
        => Kind::RemovedGgmlType { tensor: tensor("t"), number: 4, name: "Q4_2" }, at BODY + 9 + 12;

    refuses_a_misaligned_tensor: new().tensor("t", &[8], 0, 4).data(64).file()
        => Kind::MisalignedTensor { tensor: tensor("t"), tensor_offset: 4, alignment: 32 }, at BODY;
    refuses_a_tensor_outside_of_the_file: new().tensor("t", &[8], 0, 1 << 40).data(64).file()
        => Kind::TensorOutsideFile { tensor: tensor("t"), file_bytes: 64 + 64 }, at BODY;
    refuses_a_tensor_whose_end_overflows: new().tensor("t", &[8], 0, u64::MAX - 31).data(64).file()
        => Kind::TensorOutsideFile { tensor: tensor("t"), file_bytes: 64 + 64 }, at BODY;
    refuses_a_gap_between_tensors: new().tensor("t", &[8], 0, 32).data(64).file()
        => Kind::UnexpectedTensorOffset { tensor: tensor("t"), tensor_offset: 32, expected: 0 }, at BODY;
    refuses_weights_that_end_too_early_and_says_how_much_is_there: new().tensor("t", &[8], 0, 0).data(31).file()
        => Kind::TruncatedData { tensor: tensor("t"), expected_file_bytes: 64 + 32, file_bytes: 64 + 31 }, at BODY;
    refuses_weights_that_end_before_a_large_alignment: new().u32("general.alignment", 1 << 31).tensor("t", &[8], 0, 0).data(64).file()
        => Kind::TruncatedData { tensor: tensor("t"), expected_file_bytes: (1 << 31) + 32, file_bytes: 160 }, at BODY + 33;
}

#[test]
fn refuses_more_tensors_than_any_model_has() {
    let count = MAX_TENSORS + 1;
    let file = GgufBytes {
        tensor_count: Some(count),
        ..new()
    }
    .file();
    let error = parse(&file, u64::MAX).unwrap_err();
    assert_eq!(
        (error.kind, error.offset),
        (Kind::TensorCountAbsurd { count }, 8)
    );
}

#[test]
fn refuses_more_metadata_than_any_model_has() {
    let count = MAX_METADATA + 1;
    let file = GgufBytes {
        metadata_count: Some(count),
        ..new()
    }
    .file();
    let error = parse(&file, u64::MAX).unwrap_err();
    assert_eq!(
        (error.kind, error.offset),
        (Kind::MetadataCountAbsurd { count }, 16)
    );
}

#[test]
fn refuses_a_header_that_would_keep_too_much() {
    let long = "x".repeat(100_000);
    let file = (0..100)
        .fold(new(), |file, key| file.string(&format!("k{key}"), &long))
        .file();
    assert_eq!(refusal(&file).kind, Kind::HeaderTooLarge);
}

#[test]
fn refuses_a_header_cut_anywhere() {
    for (version, big_endian) in [(2, false), (3, false), (3, true)] {
        let sample = gguf_bytes::sample(version, big_endian);
        let (header, file) = (sample.header(), sample.file());
        for cut in 0..header.len() {
            // As a prefix of the whole file, and as the file that a broken download leaves.
            let error = parse(&file[..cut], file.len() as u64).unwrap_err();
            assert_eq!(error.kind.reason(), "truncated", "cut at {cut}: {error}");
            let error = refusal(&file[..cut]);
            let short = [
                "truncated",
                "string_longer_than_file",
                "array_longer_than_file",
                "tensor_count_absurd",
                "metadata_count_absurd",
            ];
            assert!(
                short.contains(&error.kind.reason()),
                "cut at {cut}: {error}"
            );
            assert!(error.offset <= cut as u64, "cut at {cut}: {error}");
        }
        for cut in header.len()..file.len() {
            assert_eq!(
                refusal(&file[..cut]).kind.reason(),
                "truncated",
                "cut at {cut}"
            );
        }
    }
}

#[test]
fn every_refusal_reads_as_a_sentence_with_its_place() {
    let error = refusal(&new().tensor("blk.0.x", &[32], 31, 0).data(64).file());
    let text = "tensor 'blk.0.x' has the type Q4_0_4_4 (31), which llama.cpp has removed; \
                quantise the model again (at byte 51)";
    assert_eq!(error.to_string(), text);
}
