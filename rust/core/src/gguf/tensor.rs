//! What a header says about one tensor, and the checks that llama.cpp makes on it.

use super::cursor::{Cursor, Source, Stop};
use super::error::{GgufError, GgufErrorKind};
use super::ggml_type::GgmlType;

/// `GGML_MAX_NAME` less the terminating zero.
const MAX_NAME_BYTES: u64 = 63;
const MAX_DIMENSIONS: u32 = 4;

/// One tensor: its name, shape, type and place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// The name, such as `"blk.0.attn_q.weight"`.
    pub name: Box<str>,
    /// Elements per dimension, the row length first; 1 beyond [`Self::n_dims`].
    pub dims: [u64; 4],
    /// How many dimensions the file gives.
    pub n_dims: u32,
    /// The type of its elements.
    pub ggml_type: GgmlType,
    /// Offset in bytes from the start of its shard's data section.
    pub offset: u64,
    /// Bytes of its data, without padding (`ggml_nbytes`).
    pub bytes: u64,
    /// Index of the file it lies in, among the header's shards.
    pub shard: u32,
}

impl TensorInfo {
    /// The dimensions that the file gives, the row length first.
    pub fn shape(&self) -> &[u64] {
        self.dims.get(..self.n_dims as usize).unwrap_or(&self.dims)
    }

    /// All elements.
    pub fn elements(&self) -> u64 {
        self.dims
            .iter()
            .fold(1, |product: u64, dim| product.saturating_mul(*dim))
    }

    /// Elements in one row.
    pub fn row_elements(&self) -> u64 {
        let [row, ..] = self.dims;
        row
    }

    /// Bytes of one row (`ggml_row_size`).
    pub fn row_bytes(&self) -> u64 {
        self.ggml_type.row_bytes(self.row_elements()).unwrap_or(0)
    }

    /// How many rows (`ggml_nrows`).
    pub fn rows(&self) -> u64 {
        let [_, rows @ ..] = self.dims;
        rows.iter()
            .fold(1, |product: u64, dim| product.saturating_mul(*dim))
    }

    pub(super) fn read<S: Source>(cursor: &mut Cursor<S>) -> Result<Self, Stop<S::Error>> {
        let name_offset = cursor.offset();
        let length = cursor.string_length("a tensor name")?;
        if length > MAX_NAME_BYTES {
            return Err(GgufErrorKind::TensorNameTooLong { length }
                .at(name_offset)
                .into());
        }
        let bytes = cursor.bytes(usize::try_from(length).unwrap_or(0), "a tensor name")?;
        let Ok(name) = std::str::from_utf8(bytes).map(Box::<str>::from) else {
            return Err(GgufErrorKind::TensorNameNotUtf8.at(name_offset).into());
        };

        let dims_offset = cursor.offset();
        let n_dims = cursor.u32("a tensor's dimensions")?;
        if n_dims > MAX_DIMENSIONS {
            let kind = GgufErrorKind::TooManyDimensions {
                tensor: name.into(),
                dimensions: n_dims,
            };
            return Err(kind.at(dims_offset).into());
        }
        let mut dims = [1; 4];
        for dim in dims.iter_mut().take(n_dims as usize) {
            *dim = cursor.u64("a tensor's dimensions")?;
        }
        let type_offset = cursor.offset();
        let number = cursor.u32("a tensor's type")?;
        let ggml_type = known_type(&name, number).map_err(|kind| kind.at(type_offset))?;
        let bytes = data_bytes(&name, dims, ggml_type).map_err(|kind| kind.at(dims_offset))?;
        let offset = cursor.u64("a tensor's offset")?;
        Ok(Self {
            name,
            dims,
            n_dims,
            ggml_type,
            offset,
            bytes,
            shard: 0,
        })
    }
}

fn known_type(name: &str, number: u32) -> Result<GgmlType, GgufErrorKind> {
    GgmlType::from_number(number).ok_or_else(|| match GgmlType::removed_name(number) {
        Some(removed) => GgufErrorKind::RemovedGgmlType {
            tensor: name.into(),
            number,
            name: removed,
        },
        None => GgufErrorKind::UnknownGgmlType {
            tensor: name.into(),
            number,
        },
    })
}

fn data_bytes(name: &str, dims: [u64; 4], ggml_type: GgmlType) -> Result<u64, GgufErrorKind> {
    let overflow = || GgufErrorKind::DimensionOverflow {
        tensor: name.into(),
    };
    let representable = |number: &u64| i64::try_from(*number).is_ok();
    let elements = dims
        .iter()
        .try_fold(1, |product: u64, dim| {
            product.checked_mul(*dim).filter(representable)
        })
        .filter(|_| dims.iter().all(representable))
        .ok_or_else(overflow)?;
    let [row, ..] = dims;
    let block = ggml_type.block_elements();
    if !row.is_multiple_of(block) {
        return Err(GgufErrorKind::RowNotMultipleOfBlock {
            tensor: name.into(),
            row,
            block,
        });
    }
    ggml_type.row_bytes(elements).ok_or_else(overflow)
}

/// Checks that the tensors lie one after the other, aligned, within the file.
///
/// `places` are the offsets at which the header describes them, for the error.
/// As `gguf_init_from_reader` (gguf.cpp): each tensor begins where the padded one before ends.
pub(super) fn check_layout(
    tensors: &[TensorInfo],
    places: &[u64],
    data_offset: u64,
    alignment: u64,
    file_bytes: u64,
) -> Result<(), GgufError> {
    let mut expected = 0_u64;
    for (tensor, place) in tensors.iter().zip(places) {
        let name = || tensor.name.to_string();
        let start = tensor.offset;
        let end = start
            .checked_add(tensor.bytes)
            .and_then(|end| end.checked_add(data_offset));
        let within = end.is_some_and(|end| end <= file_bytes);
        let kind = if !start.is_multiple_of(alignment) {
            GgufErrorKind::MisalignedTensor {
                tensor: name(),
                tensor_offset: start,
                alignment,
            }
        } else if !within && start == expected && end.is_some() {
            let expected_file_bytes = end.unwrap_or(u64::MAX);
            GgufErrorKind::TruncatedData {
                tensor: name(),
                expected_file_bytes,
                file_bytes,
            }
        } else if !within {
            GgufErrorKind::TensorOutsideFile {
                tensor: name(),
                file_bytes,
            }
        } else if start != expected {
            GgufErrorKind::UnexpectedTensorOffset {
                tensor: name(),
                tensor_offset: start,
                expected,
            }
        } else {
            // Within the file, so far from overflowing unless the alignment is absurd.
            expected = start
                .checked_add(tensor.bytes)
                .and_then(|end| end.checked_next_multiple_of(alignment))
                .unwrap_or(u64::MAX);
            continue;
        };
        return Err(kind.at(*place));
    }
    Ok(())
}
