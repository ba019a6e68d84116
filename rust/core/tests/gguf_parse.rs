//! What a good header says, of both versions and byte orders, and of every type.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

#[path = "support/gguf_bytes.rs"]
#[allow(dead_code, reason = "each test file uses a part of it")]
mod gguf_bytes;

use gguf_bytes::{GgufBytes, U32, sample};
use llama_gpu_core::gguf::{ByteOrder, GgmlType, ParsedHeader, Value, parse};

fn parsed(file: &[u8]) -> ParsedHeader {
    parse(file, file.len() as u64).unwrap()
}

#[test]
fn reads_versions_2_and_3_in_both_byte_orders() {
    for (version, big_endian) in [(2, false), (3, false), (2, true), (3, true)] {
        let header = parsed(&sample(version, big_endian).file());
        let order = if big_endian {
            ByteOrder::Big
        } else {
            ByteOrder::Little
        };
        assert_eq!((header.version, header.byte_order), (version, order));
        let metadata = &header.metadata;
        assert_eq!(metadata.str("general.architecture"), Some("llama"));
        assert_eq!(metadata.u32("llama.context_length"), Some(4096));
        assert_eq!(metadata.get("a.u8"), Some(&Value::U8(200)));
        assert_eq!(metadata.get("a.i8"), Some(&Value::I8(-2)));
        assert_eq!(metadata.get("a.u16"), Some(&Value::U16(7)));
        assert_eq!(metadata.get("a.i16"), Some(&Value::I16(7)));
        assert_eq!(metadata.get("a.f32"), Some(&Value::F32(1.5)));
        assert_eq!(metadata.bool("a.true"), Some(true));
        assert_eq!(metadata.u64("a.u64"), Some(1 << 40));
        assert_eq!(metadata.i64("a.i64"), Some(-3));
        assert_eq!(metadata.get("a.f64"), Some(&Value::F64(0.25)));
        assert_eq!(
            metadata.array_u32("llama.attention.head_count"),
            Some(vec![8, 4, 8])
        );
        let [embedding, norm] = &header.tensors[..] else {
            panic!("two tensors")
        };
        assert_eq!(
            (embedding.shape(), embedding.ggml_type, embedding.bytes),
            (&[64, 4][..], GgmlType::Q8_0, 272)
        );
        assert_eq!(
            (
                embedding.rows(),
                embedding.row_bytes(),
                embedding.elements()
            ),
            (4, 68, 256)
        );
        assert_eq!(
            (norm.name.as_ref(), norm.offset, norm.bytes),
            ("output_norm.weight", 288, 256)
        );
        assert_eq!(header.data_offset % 32, 0);
    }
}

#[test]
fn any_byte_but_zero_is_true_as_in_llama_cpp() {
    assert_eq!(
        parsed(&sample(3, false).file()).metadata.bool("a.odd_bool"),
        Some(true)
    );
}

#[test]
fn a_string_that_is_not_utf8_is_kept_as_it_is() {
    let header = parsed(&sample(3, false).file());
    assert_eq!(
        header.metadata.get("a.latin1"),
        Some(&Value::Bytes((*b"caf\xE9").into()))
    );
    assert_eq!(header.metadata.str("a.latin1"), None);
}

#[test]
fn getters_do_not_change_the_kind_of_a_value() {
    let metadata = parsed(&sample(3, false).file()).metadata;
    assert_eq!(metadata.u32("a.u64"), None, "too large");
    assert_eq!(metadata.u64("a.i64"), None, "negative");
    assert_eq!(metadata.u64("a.f32"), None, "a float");
    assert_eq!(metadata.u64("a.true"), None, "a bool");
    assert_eq!(metadata.bool("a.u8"), None, "a number");
    assert_eq!(metadata.f32("a.f64"), None, "a double");
    assert_eq!(metadata.str("llama.context_length"), None, "a number");
    assert_eq!(
        metadata.array_bool("llama.attention.head_count"),
        None,
        "numbers"
    );
    assert_eq!(metadata.get("not.there"), None);
}

#[test]
fn keys_keep_the_order_of_the_file() {
    let metadata = parsed(&sample(3, false).file()).metadata;
    let keys: Vec<&str> = metadata.iter().map(|(key, _)| key).take(3).collect();
    assert_eq!(
        keys,
        ["general.architecture", "llama.context_length", "a.u8"]
    );
    assert!(
        metadata
            .iter()
            .all(|(key, value)| metadata.get(key) == Some(value))
    );
}

#[test]
fn lists_of_strings_are_a_length_and_a_place() {
    let file = sample(3, false).file();
    let header = parsed(&file);
    let tokens = header.metadata.array("tokenizer.ggml.tokens").unwrap();
    assert_eq!((tokens.len, tokens.items().is_none()), (4, true));
    let place = usize::try_from(tokens.place.offset).unwrap();
    assert_eq!(&file[place + 8..place + 11], b"<s>");
}

#[test]
fn only_small_arrays_of_numbers_are_kept() {
    let numbers = |count: u64| {
        let items = vec![1; usize::try_from(count).unwrap() * 4];
        let header = parsed(&GgufBytes::default().array("k", U32, count, &items).file());
        header
            .metadata
            .array("k")
            .unwrap()
            .items()
            .map(|items| items.len() as u64)
    };
    assert_eq!(numbers(4096), Some(4096));
    assert_eq!(numbers(4097), None);
}

#[test]
fn a_tensor_without_elements_or_dimensions_is_read_as_llama_cpp_reads_it() {
    let file = GgufBytes::default()
        .tensor("none", &[32, 0], 8, 0)
        .tensor("scalar", &[], 0, 0)
        .data(4);
    let header = parsed(&file.file());
    assert_eq!(
        (header.tensors[0].elements(), header.tensors[0].bytes),
        (0, 0)
    );
    assert_eq!(
        (header.tensors[1].elements(), header.tensors[1].bytes),
        (1, 4)
    );
}

#[test]
fn an_alignment_of_its_own_moves_the_data() {
    let mut file = GgufBytes::default()
        .u32("general.alignment", 4096)
        .tensor("t", &[8], 0, 0)
        .data(32);
    file.alignment = 4096;
    assert_eq!(parsed(&file.file()).data_offset, 4096);
}

/// Block lengths and sizes as `type_traits` (ggml.c) and the `static_assert`s of ggml-common.h give them.
#[test]
fn every_ggml_type_has_its_number_and_size() {
    let bits_per_10_000 = |kind: GgmlType| kind.block_bytes() * 80_000 / kind.block_elements();
    assert_eq!(GgmlType::ALL.len(), 35);
    for kind in GgmlType::ALL {
        assert_eq!(GgmlType::from_number(kind.number()), Some(*kind));
        assert_eq!(GgmlType::from_name(kind.name()), Some(*kind));
        assert_eq!(GgmlType::removed_name(kind.number()), None);
        assert_eq!(
            kind.row_bytes(kind.block_elements() * 3),
            Some(kind.block_bytes() * 3)
        );
    }
    let removed = (0..43).filter(|number| GgmlType::from_number(*number).is_none());
    assert_eq!(
        removed.collect::<Vec<u32>>(),
        [4, 5, 31, 32, 33, 36, 37, 38]
    );
    assert_eq!(GgmlType::from_number(43), None);
    for (kind, bits) in [
        (GgmlType::Q4_K, 45_000),
        (GgmlType::Q6_K, 65_625),
        (GgmlType::IQ1_S, 15_625),
        (GgmlType::MXFP4, 42_500),
        (GgmlType::TQ1_0, 16_875),
        (GgmlType::Q8_0, 85_000),
    ] {
        assert_eq!(bits_per_10_000(kind), bits, "{kind:?}");
    }
}
