//! Reading the header of a model from its files.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use super::cursor::{FileSource, Stop};
use super::error::{GgufError, GgufErrorKind, ReadError};
use super::header::{FileIdentity, Header, Shard};
use super::parse::{MAX_TENSORS, ParsedHeader, parse_source};
use super::shards::{ShardName, check_joined, check_shard, shard_path, split_count};

/// Reads the header of the model at `path`; of a split model any shard will do.
///
/// Only headers are read, through a window of 256 KiB; the weights never are, beyond
/// what of them lies in the last window.
///
/// # Errors
///
/// [`ReadError::Io`] if a file cannot be opened or read or is no regular file,
/// [`ReadError::Invalid`] if one is refused, or the shards do not belong together.
pub fn read_header(path: &Path) -> Result<Header, ReadError> {
    let (asked, shard) = read_file(path)?;
    let count = split_count(&asked.metadata);
    if count == 1 {
        let file_bytes = shard.file_bytes;
        return Ok(join(path, asked, vec![shard], file_bytes));
    }
    let refuse = |error: GgufError| ReadError::invalid(path, error);
    let name = ShardName::from_path(path).ok_or_else(|| {
        let number = asked
            .metadata
            .u64("split.no")
            .unwrap_or(0)
            .saturating_add(1);
        let expected = format!("-{number:05}-of-{count:05}.gguf");
        refuse(GgufErrorKind::ShardNameInvalid { expected }.at(0))
    })?;
    check_shard(path, &name, &asked.metadata).map_err(refuse)?;
    read_shards(path, &name)
}

fn read_shards(path: &Path, asked: &ShardName) -> Result<Header, ReadError> {
    let refuse = |error: GgufError| ReadError::invalid(path, error);
    let mut first: Option<ParsedHeader> = None;
    let mut shards = Vec::new();
    let mut file_bytes = 0_u64;
    for number in 1..=asked.count {
        let name = ShardName {
            number,
            ..asked.clone()
        };
        let shard_path = shard_path(path, &name, number);
        let (mut parsed, shard) = match read_file(&shard_path) {
            Err(ReadError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Err(refuse(
                    GgufErrorKind::MissingShard {
                        missing: shard_path,
                    }
                    .at(0),
                ));
            }
            other => other?,
        };
        check_shard(&shard_path, &name, &parsed.metadata).map_err(refuse)?;
        file_bytes = file_bytes.saturating_add(shard.file_bytes);
        shards.push(shard);
        match &mut first {
            None => first = Some(parsed),
            Some(first) => {
                for tensor in &mut parsed.tensors {
                    tensor.shard = number.saturating_sub(1);
                }
                first.tensors.append(&mut parsed.tensors);
                let count = first.tensors.len() as u64;
                if count > MAX_TENSORS {
                    return Err(refuse(GgufErrorKind::TensorCountAbsurd { count }.at(0)));
                }
            }
        }
    }
    let missing = || {
        refuse(
            GgufErrorKind::MissingShard {
                missing: path.to_owned(),
            }
            .at(0),
        )
    };
    let first = first.ok_or_else(missing)?;
    check_joined(&first.metadata, &first.tensors).map_err(refuse)?;
    Ok(join(path, first, shards, file_bytes))
}

fn join(path: &Path, parsed: ParsedHeader, shards: Vec<Shard>, file_bytes: u64) -> Header {
    let ParsedHeader {
        version,
        byte_order,
        alignment,
        metadata,
        tensors,
        ..
    } = parsed;
    Header {
        version,
        byte_order,
        alignment,
        metadata,
        tensors,
        shards,
        file_bytes,
        path: path.to_owned(),
    }
}

fn read_file(path: &Path) -> Result<(ParsedHeader, Shard), ReadError> {
    let failed = |source: io::Error| ReadError::io(path, source);
    // Looked at before it is opened: opening a pipe would wait for its other end.
    regular(&fs::metadata(path).map_err(failed)?).map_err(failed)?;
    let file = File::open(path).map_err(failed)?;
    let about = file.metadata().map_err(failed)?;
    let file_bytes = about.len();
    let parsed =
        parse_source(FileSource::new(&file, file_bytes), file_bytes).map_err(
            |stop| match stop {
                Stop::Format(error) => ReadError::invalid(path, error),
                Stop::Source(source) => failed(source),
            },
        )?;
    let identity = FileIdentity::of(&about);
    let shard = Shard {
        path: path.to_owned(),
        file_bytes,
        data_offset: parsed.data_offset,
        identity,
    };
    Ok((parsed, shard))
}

fn regular(about: &fs::Metadata) -> io::Result<()> {
    if about.is_dir() {
        Err(io::ErrorKind::IsADirectory.into())
    } else if about.is_file() {
        Ok(())
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a regular file",
        ))
    }
}
