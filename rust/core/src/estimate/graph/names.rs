//! Names as numbers: while a graph is built, tensors and hyper-parameters are looked up hundreds of times per layer.

/// The hash of a name that is looked up as a whole.
#[inline]
pub(super) fn whole_hash(name: &str) -> u64 {
    mixed(bytes_hash(name))
}

/// The hash of a layer's tensor: of what stands before and behind the last point.
pub(super) fn name_hash(name: &str) -> u64 {
    match name.rfind('.') {
        Some(point) => {
            let (stem, suffix) = name.split_at(point);
            joined_hash(stem, suffix)
        }
        None => joined_hash(name, ""),
    }
}

/// The hash of `stem` and `suffix` as one name; the suffix begins with the name's last point.
#[inline]
pub(super) fn joined_hash(stem: &str, suffix: &str) -> u64 {
    mixed(bytes_hash(stem) ^ bytes_hash(suffix).rotate_left(32))
}

/// Eight bytes at a time; the last eight may overlap those before.
#[inline]
fn bytes_hash(text: &str) -> u64 {
    let bytes = text.as_bytes();
    let length = bytes.len() as u64;
    let Some(end) = bytes.last_chunk::<8>() else {
        return bytes
            .iter()
            .fold(mixed(length), |word, byte| word << 8 ^ u64::from(*byte));
    };
    let (words, _) = bytes.as_chunks::<8>();
    words
        .iter()
        .chain([end])
        .fold(length, |hash, word| mixed(hash ^ u64::from_le_bytes(*word)))
}

#[inline]
fn mixed(number: u64) -> u64 {
    let product = u128::from(number ^ 0xa076_1d64_78bd_642f) * 0x9e37_79b9_7f4a_7c15;
    (product >> 64) as u64 ^ product as u64
}

/// Where the names of a list stand in it: a hash table, half empty.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Places {
    slots: Vec<Option<(u64, u32)>>,
}

impl Places {
    /// The places of `hashes`; of equal ones the first.
    pub(super) fn of(hashes: impl ExactSizeIterator<Item = u64>) -> Self {
        let mut places = Self {
            slots: vec![None; (hashes.len() * 2).next_power_of_two()],
        };
        for (place, hash) in (0_u32..).zip(hashes) {
            if places.find(hash).is_none()
                && let Some(slot) = places.slot(hash)
                && let Some(free) = places.slots.get_mut(slot)
            {
                *free = Some((hash, place));
            }
        }
        places
    }

    /// The slot of a hash, or the free one where it would be.
    #[inline]
    fn slot(&self, hash: u64) -> Option<usize> {
        let mask = self.slots.len().checked_sub(1)?;
        let start = hash as usize;
        (0..=mask)
            .map(|step| (start + step) & mask)
            .find(|slot| match self.slots.get(*slot) {
                Some(Some((known, _))) => *known == hash,
                _ => true,
            })
    }

    /// The place of a name by its hash.
    #[inline]
    pub(super) fn find(&self, hash: u64) -> Option<usize> {
        let (_, place) = (*self.slots.get(self.slot(hash)?)?)?;
        Some(place as usize)
    }
}
