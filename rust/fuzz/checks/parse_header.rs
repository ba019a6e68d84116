//! Any bytes end in a header or a refusal, and what a header hands out lies within it.
use llama_gpu_core::gguf::{Items, Value, parse};

pub(crate) fn check(bytes: &[u8]) {
    check_as_part_of(bytes, bytes.len() as u64);
    // The same bytes as the start of a file that is larger.
    check_as_part_of(bytes, 1 << 40);
}

fn check_as_part_of(bytes: &[u8], file_bytes: u64) {
    match parse(bytes, file_bytes) {
        Ok(header) => {
            for (key, value) in header.metadata.iter() {
                assert!(header.metadata.get(key).is_some());
                if let Some(array) = value.as_array() {
                    let end = array.place.offset.checked_add(array.place.bytes);
                    assert!(end.is_some_and(|end| end <= bytes.len() as u64));
                    if let Some(items) = array.items() {
                        assert_eq!(items.len() as u64, array.len);
                        assert_eq!(decoded(&items), items.len());
                    }
                }
            }
            for tensor in &header.tensors {
                let end = header.data_offset + tensor.offset + tensor.bytes;
                assert!(end <= file_bytes);
                assert_eq!(
                    tensor.row_bytes().checked_mul(tensor.rows()),
                    Some(tensor.bytes)
                );
            }
        }
        Err(error) => {
            assert!(error.offset <= bytes.len() as u64);
            assert!(!error.to_string().is_empty());
        }
    }
}

fn decoded(items: &Items) -> usize {
    items
        .iter()
        .filter(|value| !matches!(value, Value::Array(_)))
        .count()
}
