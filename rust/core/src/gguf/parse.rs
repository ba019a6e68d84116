//! From bytes to a parsed header: the order of the format, each count held against the file.

use std::collections::HashSet;

use super::array::{Array, Place};
use super::cursor::{ByteOrder, Cursor, SliceSource, Source, Stop};
use super::error::{GgufError, GgufErrorKind};
use super::metadata::Metadata;
use super::tensor::{TensorInfo, check_layout};
use super::value::{Value, ValueType};

/// The most bytes of a header that are walked; real ones have up to some 20 MiB.
pub const MAX_HEADER_BYTES: u64 = 256 << 20;
/// The most metadata entries; real headers have some 50.
pub const MAX_METADATA: u64 = 1 << 14;
/// The most tensors; the largest real models have some 2,000.
pub const MAX_TENSORS: u64 = 1 << 16;
/// The deepest that arrays may lie within arrays.
pub const MAX_NESTED_ARRAYS: u32 = 8;

/// Strings up to this length are kept with the header: chat templates are.
const MAX_KEPT_STRING_BYTES: u64 = 128 << 10;
/// Arrays of up to so many numbers are kept: one per layer, never one per token.
const MAX_KEPT_NUMBERS: u64 = 4096;
/// What keys, strings and small arrays of one header may take together.
const MAX_KEPT_BYTES: u64 = 8 << 20;
const MAX_KEY_BYTES: u64 = 65_535;
const DEFAULT_ALIGNMENT: u64 = 32;

/// What one file says of itself.
#[derive(Debug, Clone, PartialEq)]
pub struct ParsedHeader {
    /// 2 or 3.
    pub version: u32,
    /// The order of the bytes in its numbers.
    pub byte_order: ByteOrder,
    /// Tensors begin at multiples of this many bytes.
    pub alignment: u64,
    /// Keys and values.
    pub metadata: Metadata,
    /// The tensors, in the order of the file.
    pub tensors: Vec<TensorInfo>,
    /// Where the data section begins.
    pub data_offset: u64,
}

/// Parses the header at the start of `bytes`, a prefix of a file of `file_bytes` bytes.
///
/// # Errors
///
/// A [`GgufError`] with the reason and its place; [`GgufErrorKind::Truncated`] also where
/// `bytes` ends before the header does.
pub fn parse(bytes: &[u8], file_bytes: u64) -> Result<ParsedHeader, GgufError> {
    parse_source(SliceSource::new(bytes), file_bytes).map_err(|stop| match stop {
        Stop::Format(error) => error,
        Stop::Source(never) => match never {},
    })
}

pub(super) fn parse_source<S: Source>(
    source: S,
    file_bytes: u64,
) -> Result<ParsedHeader, Stop<S::Error>> {
    let mut cursor = Cursor::new(source, file_bytes);
    let version = read_version(&mut cursor)?;
    let tensor_count = read_tensor_count(&mut cursor)?;
    let metadata = read_metadata(&mut cursor)?;
    let alignment = read_alignment(&metadata)?;
    let (tensors, places) = read_tensors(&mut cursor, tensor_count)?;
    let end = cursor.offset();
    let data_offset = match tensors.first() {
        None => end,
        Some(_) => end.checked_next_multiple_of(alignment).unwrap_or(u64::MAX),
    };
    check_layout(&tensors, &places, data_offset, alignment, file_bytes)?;
    Ok(ParsedHeader {
        version,
        byte_order: cursor.order,
        alignment,
        metadata,
        tensors,
        data_offset,
    })
}

fn read_version<S: Source>(cursor: &mut Cursor<S>) -> Result<u32, Stop<S::Error>> {
    let found = cursor.magic()?;
    if &found != b"GGUF" {
        return Err(GgufErrorKind::BadMagic { found }.at(0).into());
    }
    let offset = cursor.offset();
    let mut version = cursor.u32("the version")?;
    // A small number whose low half is empty was written in the other byte order (gguf.cpp).
    if version != 0 && version.trailing_zeros() >= 16 {
        version = version.swap_bytes();
        cursor.order = ByteOrder::Big;
    }
    match version {
        2 | 3 => Ok(version),
        1 => Err(GgufErrorKind::Version1.at(offset).into()),
        _ => Err(GgufErrorKind::UnknownVersion { version }.at(offset).into()),
    }
}

fn read_tensor_count<S: Source>(cursor: &mut Cursor<S>) -> Result<usize, Stop<S::Error>> {
    let offset = cursor.offset();
    let count = cursor.u64("the tensor count")?;
    // The least that describes a tensor: name length, dimensions, type, offset.
    let needed = count.checked_mul(8 + 4 + 4 + 8);
    match usize::try_from(count) {
        Ok(tensors)
            if count <= MAX_TENSORS && needed.is_some_and(|needed| needed <= cursor.left()) =>
        {
            Ok(tensors)
        }
        _ => Err(GgufErrorKind::TensorCountAbsurd { count }.at(offset).into()),
    }
}

fn read_metadata<S: Source>(cursor: &mut Cursor<S>) -> Result<Metadata, Stop<S::Error>> {
    let offset = cursor.offset();
    let count = cursor.u64("the metadata count")?;
    // The least that an entry takes: key length, one character, type, one byte.
    let needed = count.checked_mul(8 + 1 + 4 + 1);
    if count > MAX_METADATA || needed.is_none_or(|needed| needed > cursor.left()) {
        return Err(GgufErrorKind::MetadataCountAbsurd { count }
            .at(offset)
            .into());
    }
    let mut entries = Vec::new();
    let mut places = Vec::new();
    let mut budget = MAX_KEPT_BYTES;
    for _ in 0..count {
        places.push(cursor.offset());
        let key = read_key(cursor, &mut budget)?;
        let kind = read_value_type(cursor)?;
        let value = read_value(cursor, kind, &mut budget)?;
        entries.push((key, value));
    }
    Ok(Metadata::new(entries, &places)?)
}

/// Takes `count` bytes from what may still be kept.
fn spend(budget: &mut u64, count: u64, offset: u64) -> Result<usize, GgufError> {
    *budget = budget
        .checked_sub(count)
        .ok_or_else(|| GgufErrorKind::HeaderTooLarge.at(offset))?;
    usize::try_from(count).map_err(|_| GgufErrorKind::HeaderTooLarge.at(offset))
}

fn read_key<S: Source>(
    cursor: &mut Cursor<S>,
    budget: &mut u64,
) -> Result<Box<str>, Stop<S::Error>> {
    let offset = cursor.offset();
    let length = cursor.string_length("a metadata key")?;
    match length {
        0 => return Err(GgufErrorKind::EmptyKey.at(offset).into()),
        1..=MAX_KEY_BYTES => {}
        _ => return Err(GgufErrorKind::KeyTooLong { length }.at(offset).into()),
    }
    let count = spend(budget, length, offset)?;
    let bytes = cursor.bytes(count, "a metadata key")?;
    match std::str::from_utf8(bytes) {
        Ok(key) => Ok(key.into()),
        Err(_) => Err(GgufErrorKind::KeyNotUtf8.at(offset).into()),
    }
}

fn read_value_type<S: Source>(cursor: &mut Cursor<S>) -> Result<ValueType, Stop<S::Error>> {
    let offset = cursor.offset();
    let number = cursor.u32("a value's type")?;
    ValueType::from_number(number)
        .ok_or_else(|| GgufErrorKind::UnknownValueType { number }.at(offset).into())
}

fn read_value<S: Source>(
    cursor: &mut Cursor<S>,
    kind: ValueType,
    budget: &mut u64,
) -> Result<Value, Stop<S::Error>> {
    let order = cursor.order;
    let start = cursor.offset();
    match kind {
        ValueType::String => {
            let length = cursor.string_length("a metadata string")?;
            if length > MAX_KEPT_STRING_BYTES {
                let place = Place {
                    offset: cursor.offset(),
                    bytes: length,
                };
                cursor.skip(length, "a metadata string")?;
                return Ok(Value::LongString(place));
            }
            let count = spend(budget, length, start)?;
            Ok(Value::from_string(
                cursor.bytes(count, "a metadata string")?,
            ))
        }
        ValueType::Array => Ok(Value::Array(Box::new(read_array(cursor, budget)?))),
        _ => {
            let size = usize::try_from(kind.least_bytes()).unwrap_or_default();
            let bytes = cursor.bytes(size, "a metadata value")?;
            Value::from_fixed(kind, order, bytes).ok_or_else(|| {
                GgufErrorKind::Truncated {
                    reading: "a metadata value",
                }
                .at(start)
                .into()
            })
        }
    }
}

fn read_array<S: Source>(
    cursor: &mut Cursor<S>,
    budget: &mut u64,
) -> Result<Array, Stop<S::Error>> {
    let (element, len) = read_array_head(cursor)?;
    let order = cursor.order;
    let offset = cursor.offset();
    let mut kept = None;
    match element.fixed_bytes() {
        Some(size) if len <= MAX_KEPT_NUMBERS => {
            let count = spend(budget, size.saturating_mul(len), offset)?;
            kept = Some(cursor.bytes(count, "an array")?.into());
        }
        _ => skip_items(cursor, element, len, 0)?,
    }
    let place = Place {
        offset,
        bytes: cursor.offset().saturating_sub(offset),
    };
    Ok(Array {
        element,
        len,
        place,
        kept,
        order,
    })
}

/// The element type and the count, which the file is known to be able to hold.
fn read_array_head<S: Source>(cursor: &mut Cursor<S>) -> Result<(ValueType, u64), Stop<S::Error>> {
    let element = read_value_type(cursor)?;
    let offset = cursor.offset();
    let count = cursor.u64("an array's length")?;
    let needed = count.checked_mul(element.least_bytes());
    if needed.is_none_or(|needed| needed > cursor.left()) {
        return Err(GgufErrorKind::ArrayLongerThanFile { count }
            .at(offset)
            .into());
    }
    Ok((element, count))
}

fn skip_items<S: Source>(
    cursor: &mut Cursor<S>,
    element: ValueType,
    count: u64,
    depth: u32,
) -> Result<(), Stop<S::Error>> {
    match element {
        ValueType::String => cursor.skip_strings(count, "an array of strings"),
        ValueType::Array => skip_array_items(cursor, count, depth),
        _ => cursor.skip(count.saturating_mul(element.least_bytes()), "an array"),
    }
}

/// Goes behind `count` arrays that lie within an array.
pub(super) fn skip_array_items<S: Source>(
    cursor: &mut Cursor<S>,
    count: u64,
    depth: u32,
) -> Result<(), Stop<S::Error>> {
    if depth >= MAX_NESTED_ARRAYS {
        return Err(GgufErrorKind::ArraysNestedTooDeep
            .at(cursor.offset())
            .into());
    }
    for _ in 0..count {
        let (element, len) = read_array_head(cursor)?;
        skip_items(cursor, element, len, depth.saturating_add(1))?;
    }
    Ok(())
}

fn read_alignment(metadata: &Metadata) -> Result<u64, GgufError> {
    match metadata.get("general.alignment") {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(Value::U32(alignment)) if alignment.is_power_of_two() => Ok((*alignment).into()),
        Some(Value::U32(alignment)) => Err(GgufErrorKind::BadAlignment {
            found: alignment.to_string(),
        }
        .at(0)),
        Some(other) => {
            let found = format!("a value of type {}", other.value_type().name());
            Err(GgufErrorKind::BadAlignment { found }.at(0))
        }
    }
}

type Tensors = (Vec<TensorInfo>, Vec<u64>);

fn read_tensors<S: Source>(
    cursor: &mut Cursor<S>,
    count: usize,
) -> Result<Tensors, Stop<S::Error>> {
    let mut tensors = Vec::with_capacity(count);
    let mut places = Vec::with_capacity(count);
    for _ in 0..count {
        places.push(cursor.offset());
        tensors.push(TensorInfo::read(cursor)?);
    }
    let mut names = HashSet::with_capacity(count);
    for (tensor, place) in tensors.iter().zip(&places) {
        if !names.insert(tensor.name.as_ref()) {
            let kind = GgufErrorKind::DuplicateTensor {
                tensor: tensor.name.to_string(),
            };
            return Err(kind.at(*place).into());
        }
    }
    Ok((tensors, places))
}
