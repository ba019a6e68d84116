//! Every reason for which a header is refused, and where in the file.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// A refusal: what is wrong ([`GgufErrorKind`]) and the byte at which it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufError {
    /// What is wrong.
    pub kind: GgufErrorKind,
    /// Byte offset in the file of the field that is wrong.
    pub offset: u64,
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $variant:ident $({ $($field:ident : $type:ty),* })? = $reason:literal, $message:literal $(, $value:expr)*;)*) => {
        /// What is wrong with a GGUF file.
        #[derive(Debug, Clone, PartialEq, Eq)]
        #[allow(missing_docs, reason = "the fields are named after what they hold")]
        pub enum GgufErrorKind {
            $($(#[$doc])* $variant $({ $($field: $type),* })?,)*
        }

        impl GgufErrorKind {
            /// A short stable name that programs can compare, such as `"duplicate_key"`.
            pub fn reason(&self) -> &'static str {
                match self { $(Self::$variant $({ $($field: _),* })? => $reason,)* }
            }
        }

        impl fmt::Display for GgufErrorKind {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self { $(Self::$variant $({ $($field),* })? => write!(f, $message $(, $value)*),)* }
            }
        }
    };
}

kinds! {
    /// The file does not begin with `GGUF`.
    BadMagic { found: [u8; 4] } = "bad_magic", "not a GGUF file: it begins with {}, not with GGUF", found.escape_ascii();
    /// Version 1, which llama.cpp no longer reads.
    Version1 = "version_1", "GGUF version 1 is no longer supported; convert the model again";
    /// A version that does not exist yet.
    UnknownVersion { version: u32 } = "unknown_version", "GGUF version {version} is not known (2 and 3 are)";
    /// The header ends before it is complete.
    Truncated { reading: &'static str } = "truncated", "truncated: the file ends within {reading}";
    /// The header is complete, but the weights are not.
    TruncatedData { tensor: String, expected_file_bytes: u64, file_bytes: u64 } = "truncated",
        "truncated: tensor '{tensor}' ends at byte {expected_file_bytes}, the file has only {file_bytes} bytes";
    /// A string says that it is longer than what is left of the file.
    StringLongerThanFile { length: u64, reading: &'static str } = "string_longer_than_file",
        "{reading} says it has {length} bytes, more than the file";
    /// An array says that it has more elements than the file can hold.
    ArrayLongerThanFile { count: u64 } = "array_longer_than_file", "an array says it has {count} elements, more than the file can hold";
    /// Arrays within arrays beyond every use.
    ArraysNestedTooDeep = "arrays_nested_too_deep", "arrays are nested too deep";
    /// More tensors than the file can describe or any model has.
    TensorCountAbsurd { count: u64 } = "tensor_count_absurd", "the header says it has {count} tensors, more than the file can describe";
    /// More metadata than the file can hold or any model has.
    MetadataCountAbsurd { count: u64 } = "metadata_count_absurd", "the header says it has {count} metadata entries, more than the file can hold";
    /// The header is larger than any real one.
    HeaderTooLarge = "header_too_large", "the header is larger than any real one";
    /// One value is too large to be handed out.
    ValueTooLarge { bytes: u64 } = "value_too_large", "a metadata value of {bytes} bytes is too large to be read";
    /// A metadata key of no characters.
    EmptyKey = "empty_key", "a metadata key is empty";
    /// A metadata key longer than the format allows.
    KeyTooLong { length: u64 } = "key_too_long", "a metadata key has {length} bytes, the format allows 65535";
    /// A metadata key that is no text.
    KeyNotUtf8 = "key_not_utf8", "a metadata key is not UTF-8";
    /// Two entries with one key.
    DuplicateKey { key: String } = "duplicate_key", "metadata key '{key}' is there twice";
    /// A value of a type that does not exist.
    UnknownValueType { number: u32 } = "unknown_value_type", "metadata value type {number} is not known";
    /// `general.alignment` is no power of two, or no `u32`.
    BadAlignment { found: String } = "bad_alignment", "general.alignment must be a power of two of type u32, found {found}";
    /// A tensor name longer than ggml allows.
    TensorNameTooLong { length: u64 } = "tensor_name_too_long", "a tensor name has {length} bytes, ggml allows 63";
    /// A tensor name that is no text.
    TensorNameNotUtf8 = "tensor_name_not_utf8", "a tensor name is not UTF-8";
    /// Two tensors with one name.
    DuplicateTensor { tensor: String } = "duplicate_tensor", "tensor '{tensor}' is there twice";
    /// More than four dimensions.
    TooManyDimensions { tensor: String, dimensions: u32 } = "too_many_dimensions", "tensor '{tensor}' has {dimensions} dimensions, ggml allows 4";
    /// The product of the dimensions is no 63-bit number.
    DimensionOverflow { tensor: String } = "dimension_overflow", "the dimensions of tensor '{tensor}' overflow";
    /// A row does not consist of whole quantisation blocks.
    RowNotMultipleOfBlock { tensor: String, row: u64, block: u64 } = "row_not_multiple_of_block",
        "tensor '{tensor}' has rows of {row} elements, not a multiple of its block of {block}";
    /// A ggml type that this version does not know.
    UnknownGgmlType { tensor: String, number: u32 } = "unknown_ggml_type", "tensor '{tensor}' has the unknown ggml type {number}";
    /// A ggml type that llama.cpp has removed.
    RemovedGgmlType { tensor: String, number: u32, name: &'static str } = "removed_ggml_type",
        "tensor '{tensor}' has the type {name} ({number}), which llama.cpp has removed; quantise the model again";
    /// A tensor's offset is no multiple of the alignment.
    MisalignedTensor { tensor: String, tensor_offset: u64, alignment: u64 } = "misaligned_tensor",
        "tensor '{tensor}' lies at offset {tensor_offset} of the data, not a multiple of {alignment}";
    /// A tensor does not follow the one before it, as llama.cpp demands.
    UnexpectedTensorOffset { tensor: String, tensor_offset: u64, expected: u64 } = "unexpected_tensor_offset",
        "tensor '{tensor}' lies at offset {tensor_offset} of the data, llama.cpp expects {expected}";
    /// A tensor's offset points behind the end of the file.
    TensorOutsideFile { tensor: String, file_bytes: u64 } = "tensor_outside_file",
        "tensor '{tensor}' lies outside of the file, which has {file_bytes} bytes";
    /// A shard whose file name is not `NAME-00001-of-00003.gguf`.
    ShardNameInvalid { expected: String } = "shard_name_invalid", "one shard of a split model, but its file name does not end in {expected}";
    /// One of the files of a split model is not there.
    MissingShard { missing: PathBuf } = "missing_shard", "the model is split and its shard {} is missing", missing.display();
    /// The shards disagree on how many they are.
    ShardCountMismatch { shard: PathBuf, found: u64, expected: u64 } = "shard_count_mismatch",
        "shard {} says there are {found} shards, its name says {expected}", shard.display();
    /// A shard is not the one that its name says.
    ShardNumberMismatch { shard: PathBuf, found: Option<u64>, expected: u64 } = "shard_number_mismatch",
        "shard {} has split.no {}, expected {expected}", shard.display(), found.map_or("none".to_owned(), |n| n.to_string());
    /// The shards together have another number of tensors than they say.
    ShardTensorCountMismatch { found: u64, expected: u64 } = "shard_tensor_count_mismatch",
        "the shards have {found} tensors, split.tensors.count says {expected}";
    /// The file was replaced or changed after its header was read.
    FileChanged = "file_changed", "the file has changed since its header was read; read it again";
}

impl GgufErrorKind {
    pub(super) fn at(self, offset: u64) -> GgufError {
        GgufError { kind: self, offset }
    }
}

impl fmt::Display for GgufError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (at byte {})", self.kind, self.offset)
    }
}

impl std::error::Error for GgufError {}

/// Why [`read_header`](super::read_header) has no header to give.
#[derive(Debug)]
pub enum ReadError {
    /// The file cannot be opened or read.
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file can be read and is refused.
    Invalid {
        /// The file.
        path: PathBuf,
        /// Why and where.
        error: GgufError,
    },
}

impl ReadError {
    pub(super) fn io(path: &Path, source: io::Error) -> Self {
        Self::Io {
            path: path.to_owned(),
            source,
        }
    }

    pub(super) fn invalid(path: &Path, error: GgufError) -> Self {
        Self::Invalid {
            path: path.to_owned(),
            error,
        }
    }
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io { path, source } => write!(f, "{}: {source}", path.display()),
            Self::Invalid { path, error } => write!(f, "{}: {error}", path.display()),
        }
    }
}

impl std::error::Error for ReadError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io { source, .. } => Some(source),
            Self::Invalid { error, .. } => Some(error),
        }
    }
}
