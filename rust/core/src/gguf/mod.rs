//! GGUF headers: bytes in, a [`Header`] or a refusal with its place out.
//!
//! [`parse`] is pure. [`read_header`] reads a file (and the other shards of a split
//! model) through a window of fixed size, never the weights. Every length and count
//! is held against the file's size before anything is kept, and what is kept is
//! bounded, so that no file costs more than a few tens of mebibytes.

mod array;
mod cache;
mod cursor;
mod error;
mod ggml_type;
mod header;
mod metadata;
mod parse;
mod quantization;
mod read;
mod shards;
mod tensor;
mod value;

pub use array::{Array, Items, Place};
pub use cache::HeaderCache;
pub use cursor::ByteOrder;
pub use error::{GgufError, GgufErrorKind, ReadError};
pub use ggml_type::GgmlType;
pub use header::{FileIdentity, Header, Shard};
pub use metadata::Metadata;
pub use parse::{
    MAX_HEADER_BYTES, MAX_METADATA, MAX_NESTED_ARRAYS, MAX_TENSORS, ParsedHeader, parse,
};
pub use read::read_header;
pub use shards::{ShardName, shard_path};
pub use tensor::TensorInfo;
pub use value::{Value, ValueType};
