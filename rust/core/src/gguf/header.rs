//! A model's header: what all its files say together.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::array::{Array, Items, Place};
use super::cursor::ByteOrder;
use super::error::{GgufErrorKind, ReadError};
use super::metadata::Metadata;
use super::quantization::quantization;
use super::tensor::TensorInfo;

/// The largest value that is read on request; the largest real list has some 10 MiB.
const MAX_VALUE_BYTES: u64 = 32 << 20;

/// What tells one state of a file from another without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileIdentity {
    /// Its size in bytes.
    pub bytes: u64,
    /// When its content changed.
    pub modified: Option<SystemTime>,
    /// Device, inode, and when the inode changed (seconds, nanoseconds); zeros where
    /// the system has none.
    pub inode: (u64, u64, i64, i64),
}

impl FileIdentity {
    /// The identity of what the system says about a file.
    #[cfg(unix)]
    pub fn of(metadata: &fs::Metadata) -> Self {
        use std::os::unix::fs::MetadataExt;
        let inode = (
            metadata.dev(),
            metadata.ino(),
            metadata.ctime(),
            metadata.ctime_nsec(),
        );
        Self {
            bytes: metadata.len(),
            modified: metadata.modified().ok(),
            inode,
        }
    }

    /// The identity of what the system says about a file.
    #[cfg(not(unix))]
    pub fn of(metadata: &fs::Metadata) -> Self {
        Self {
            bytes: metadata.len(),
            modified: metadata.modified().ok(),
            inode: (0, 0, 0, 0),
        }
    }
}

/// One file of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shard {
    /// Where it is.
    pub path: PathBuf,
    /// Its size in bytes.
    pub file_bytes: u64,
    /// Where its data section begins.
    pub data_offset: u64,
    /// The state of the file that was read.
    pub identity: FileIdentity,
}

/// The header of a model, all shards joined.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    /// The GGUF version, 2 or 3.
    pub version: u32,
    /// The order of the bytes in its numbers.
    pub byte_order: ByteOrder,
    /// Tensors begin at multiples of this many bytes.
    pub alignment: u64,
    /// Keys and values, of the first shard.
    pub metadata: Metadata,
    /// The tensors of all shards, in their order.
    pub tensors: Vec<TensorInfo>,
    /// The files, one for most models.
    pub shards: Vec<Shard>,
    /// Size of all files together.
    pub file_bytes: u64,
    /// The path that was asked for.
    pub path: PathBuf,
}

impl Header {
    /// `general.architecture`, such as `"llama"`.
    pub fn architecture(&self) -> Option<&str> {
        self.metadata.str("general.architecture")
    }

    /// The elements of all tensors.
    pub fn parameter_count(&self) -> u64 {
        self.tensors
            .iter()
            .fold(0, |sum: u64, tensor| sum.saturating_add(tensor.elements()))
    }

    /// The quantisation, such as `"Q4_K_M"`: as the file names it, else by its tensors.
    pub fn quantization(&self) -> Option<&'static str> {
        quantization(&self.metadata, &self.tensors)
    }

    /// `<architecture>.context_length`, in tokens.
    pub fn trained_context_length(&self) -> Option<u64> {
        self.metadata
            .u64(&format!("{}.context_length", self.architecture()?))
    }

    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors
            .iter()
            .find(|tensor| tensor.name.as_ref() == name)
    }

    /// The elements of an array of the metadata, read from the file if they are not at hand.
    ///
    /// # Errors
    ///
    /// As [`Self::read_place`].
    pub fn read_array(&self, array: &Array) -> Result<Items, ReadError> {
        match array.items() {
            Some(items) => Ok(items),
            None => Ok(array.items_of(self.read_place(array.place)?)),
        }
    }

    /// The bytes at a place of the first file.
    ///
    /// # Errors
    ///
    /// [`ReadError::Io`] if the file cannot be read, [`ReadError::Invalid`] if it is not
    /// the one whose header this is, or the value has more than 32 MiB.
    pub fn read_place(&self, place: Place) -> Result<Vec<u8>, ReadError> {
        let Some(shard) = self.shards.first() else {
            return Ok(Vec::new());
        };
        let refuse = |kind: GgufErrorKind| ReadError::invalid(&shard.path, kind.at(place.offset));
        if place.bytes > MAX_VALUE_BYTES {
            return Err(refuse(GgufErrorKind::ValueTooLarge { bytes: place.bytes }));
        }
        let (same, bytes) = read_range(&shard.path, shard.identity, place)
            .map_err(|source| ReadError::io(&shard.path, source))?;
        if !same || bytes.len() as u64 != place.bytes {
            return Err(refuse(GgufErrorKind::FileChanged));
        }
        Ok(bytes)
    }
}

fn read_range(path: &Path, identity: FileIdentity, place: Place) -> io::Result<(bool, Vec<u8>)> {
    let mut file = File::open(path)?;
    if FileIdentity::of(&file.metadata()?) != identity {
        return Ok((false, Vec::new()));
    }
    file.seek(SeekFrom::Start(place.offset))?;
    let mut bytes = Vec::with_capacity(usize::try_from(place.bytes).unwrap_or_default());
    file.take(place.bytes).read_to_end(&mut bytes)?;
    Ok((true, bytes))
}
