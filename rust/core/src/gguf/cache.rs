//! Headers already read, as long as their files stay as they were.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use super::error::ReadError;
use super::header::{FileIdentity, Header};
use super::read::read_header;

/// File times step by up to 10 ms; a file that changed less than this before it was
/// read could change again and look the same.
const SETTLED: Duration = Duration::from_millis(100);

/// A bounded store of headers, by path; a file whose size, times or inode changed is read anew.
#[derive(Debug)]
pub struct HeaderCache {
    capacity: usize,
    entries: Mutex<Entries>,
}

#[derive(Debug, Default)]
struct Entries {
    by_path: HashMap<PathBuf, Entry>,
    uses: u64,
}

#[derive(Debug)]
struct Entry {
    header: Arc<Header>,
    last_use: u64,
}

impl HeaderCache {
    /// A cache of at most `capacity` headers; the one longest unused leaves.
    pub fn new(capacity: usize) -> Self {
        Self {
            capacity,
            entries: Mutex::default(),
        }
    }

    /// The header of the model at `path`, read only if the cache has none of its present state.
    ///
    /// `now` tells whether the file is settled: one that changed within the last tenth of
    /// a second is read, and not kept.
    ///
    /// # Errors
    ///
    /// As [`read_header`].
    pub fn get(&self, path: &Path, now: SystemTime) -> Result<Arc<Header>, ReadError> {
        if let Some(header) = self.find(path) {
            return Ok(header);
        }
        let header = Arc::new(read_header(path)?);
        if header
            .shards
            .iter()
            .all(|shard| settled(&shard.identity, now))
        {
            self.keep(path, &header);
        }
        Ok(header)
    }

    /// The header of `path`, if the cache has one of its present state.
    pub fn find(&self, path: &Path) -> Option<Arc<Header>> {
        let header = {
            let mut entries = self.lock();
            entries.uses = entries.uses.saturating_add(1);
            let uses = entries.uses;
            let entry = entries.by_path.get_mut(path)?;
            entry.last_use = uses;
            Arc::clone(&entry.header)
        };
        let unchanged = header.shards.iter().all(|shard| {
            fs::metadata(&shard.path).is_ok_and(|about| FileIdentity::of(&about) == shard.identity)
        });
        unchanged.then_some(header)
    }

    fn keep(&self, path: &Path, header: &Arc<Header>) {
        let mut entries = self.lock();
        if entries.by_path.len() >= self.capacity && !entries.by_path.contains_key(path) {
            let oldest = entries
                .by_path
                .iter()
                .min_by_key(|(_, entry)| entry.last_use);
            if let Some(oldest) = oldest.map(|(path, _)| path.clone()) {
                entries.by_path.remove(&oldest);
            }
        }
        let last_use = entries.uses;
        entries.by_path.insert(
            path.to_owned(),
            Entry {
                header: Arc::clone(header),
                last_use,
            },
        );
    }

    fn lock(&self) -> MutexGuard<'_, Entries> {
        // Nothing under the lock can leave the map half changed.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn settled(identity: &FileIdentity, now: SystemTime) -> bool {
    let (_, _, seconds, nanoseconds) = identity.inode;
    let changed = u64::try_from(seconds)
        .ok()
        .zip(u32::try_from(nanoseconds).ok())
        .filter(|_| identity.inode != (0, 0, 0, 0))
        .and_then(|(seconds, nanos)| {
            SystemTime::UNIX_EPOCH.checked_add(Duration::new(seconds, nanos))
        })
        .or(identity.modified);
    changed.is_some_and(|changed| now.duration_since(changed).is_ok_and(|age| age >= SETTLED))
}
