//! Names as numbers: while a graph is built, tensors and hyper-parameters are looked up hundreds of times per layer.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

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

/// Where the names of a list stand in it, by their hashes.
pub(super) type Places = HashMap<u64, usize, BuildHasherDefault<Hashed>>;

/// The places of `hashes` in their order.
pub(super) fn places(hashes: impl Iterator<Item = u64>) -> Places {
    hashes.zip(0..).collect()
}

/// What is looked up is a hash already.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Hashed(u64);

impl Hasher for Hashed {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }
}
