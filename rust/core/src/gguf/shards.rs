//! Split models: the names of their files, and whether the files belong together.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use super::error::{GgufError, GgufErrorKind};
use super::metadata::Metadata;
use super::tensor::TensorInfo;

/// The end of a shard's file name, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardName {
    /// What comes before `-00001-of-00003.gguf`.
    pub prefix: String,
    /// Which one, from 1.
    pub number: u32,
    /// Of how many.
    pub count: u32,
}

impl ShardName {
    /// Takes a file name apart (`llama_split_prefix`); `None` for one that names no shard.
    pub fn from_path(path: &Path) -> Option<Self> {
        let stem = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
        let (rest, count) = stem.rsplit_once("-of-")?;
        let (prefix, number) = rest.rsplit_once('-')?;
        let parse = |digits: &str| {
            let plain = digits.len() >= 5 && digits.bytes().all(|byte| byte.is_ascii_digit());
            digits.parse::<u32>().ok().filter(|_| plain)
        };
        let (number, count) = (parse(number)?, parse(count)?);
        (1..=count).contains(&number).then(|| Self {
            prefix: prefix.to_owned(),
            number,
            count,
        })
    }
}

/// The path of a shard: `<prefix>-00002-of-00003.gguf` beside `path` (`llama_split_path`).
pub fn shard_path(path: &Path, name: &ShardName, number: u32) -> PathBuf {
    path.with_file_name(format!(
        "{}-{number:05}-of-{:05}.gguf",
        name.prefix, name.count
    ))
}

/// How many files the model has, from the metadata of one of them; 1 if it is not split.
pub(super) fn split_count(metadata: &Metadata) -> u64 {
    metadata.u64("split.count").unwrap_or(0).max(1)
}

/// Checks that a file is the shard that its name says.
pub(super) fn check_shard(
    path: &Path,
    name: &ShardName,
    metadata: &Metadata,
) -> Result<(), GgufError> {
    let found = metadata.u64("split.count").unwrap_or(0);
    if found != u64::from(name.count) {
        let (shard, expected) = (path.to_owned(), name.count.into());
        return Err(GgufErrorKind::ShardCountMismatch {
            shard,
            found,
            expected,
        }
        .at(0));
    }
    let expected = u64::from(name.number).saturating_sub(1);
    let found = metadata.u64("split.no");
    if found != Some(expected) {
        let shard = path.to_owned();
        return Err(GgufErrorKind::ShardNumberMismatch {
            shard,
            found,
            expected,
        }
        .at(0));
    }
    Ok(())
}

/// Checks that the joined tensors are as many as the first shard says, each of its own name.
pub(super) fn check_joined(metadata: &Metadata, tensors: &[TensorInfo]) -> Result<(), GgufError> {
    let mut names = HashSet::with_capacity(tensors.len());
    if let Some(twice) = tensors
        .iter()
        .find(|tensor| !names.insert(tensor.name.as_ref()))
    {
        return Err(GgufErrorKind::DuplicateTensor {
            tensor: twice.name.to_string(),
        }
        .at(0));
    }
    let found = tensors.len() as u64;
    match metadata.u64("split.tensors.count") {
        Some(expected) if expected != found => {
            Err(GgufErrorKind::ShardTensorCountMismatch { found, expected }.at(0))
        }
        _ => Ok(()),
    }
}
