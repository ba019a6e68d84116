//! The metadata of a header: keys in the order of the file, found by name.

use super::array::Array;
use super::error::{GgufError, GgufErrorKind};
use super::value::Value;

/// Keys and values, in the order of the file.
///
/// The typed getters never turn a float into a whole number or a number into a bool,
/// as llama.cpp does not; whole numbers of another width are taken if they fit.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Metadata {
    entries: Vec<(Box<str>, Value)>,
    by_key: Vec<u32>,
}

impl Metadata {
    /// `places` are the offsets of the keys, for the error.
    pub(super) fn new(entries: Vec<(Box<str>, Value)>, places: &[u64]) -> Result<Self, GgufError> {
        let count = u32::try_from(entries.len()).unwrap_or(u32::MAX);
        let key = |index: &u32| entries.get(*index as usize).map(|(key, _)| key);
        let mut by_key: Vec<u32> = (0..count).collect();
        by_key.sort_by_key(key);
        let twice = by_key.windows(2).find_map(|pair| match pair {
            [first, second] if key(first) == key(second) => Some(*second),
            _ => None,
        });
        if let Some(index) = twice {
            let key = key(&index).map(ToString::to_string).unwrap_or_default();
            let offset = places.get(index as usize).copied().unwrap_or_default();
            return Err(GgufErrorKind::DuplicateKey { key }.at(offset));
        }
        Ok(Self { entries, by_key })
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Keys and values, in the order of the file.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.entries
            .iter()
            .map(|(key, value)| (key.as_ref(), value))
    }

    /// The value of that key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        let entry = |index: &u32| self.entries.get(*index as usize);
        let found = self
            .by_key
            .binary_search_by(|index| entry(index).map_or("", |(key, _)| key).cmp(key))
            .ok()?;
        self.by_key
            .get(found)
            .and_then(entry)
            .map(|(_, value)| value)
    }

    fn integer<T: TryFrom<i128>>(&self, key: &str) -> Option<T> {
        self.get(key)?
            .as_integer()
            .and_then(|value| T::try_from(value).ok())
    }

    /// A whole number that is not negative.
    pub fn u64(&self, key: &str) -> Option<u64> {
        self.integer(key)
    }

    /// A whole number that fits 32 bits and is not negative.
    pub fn u32(&self, key: &str) -> Option<u32> {
        self.integer(key)
    }

    /// A whole number.
    pub fn i64(&self, key: &str) -> Option<i64> {
        self.integer(key)
    }

    /// A 32-bit float.
    pub fn f32(&self, key: &str) -> Option<f32> {
        match self.get(key)? {
            Value::F32(value) => Some(*value),
            _ => None,
        }
    }

    /// A bool.
    pub fn bool(&self, key: &str) -> Option<bool> {
        match self.get(key)? {
            Value::Bool(value) => Some(*value),
            _ => None,
        }
    }

    /// A text (not one so long that only its place is kept).
    pub fn str(&self, key: &str) -> Option<&str> {
        match self.get(key)? {
            Value::String(text) => Some(text),
            _ => None,
        }
    }

    /// An array of any type; its `len` is known without reading it.
    pub fn array(&self, key: &str) -> Option<&Array> {
        self.get(key)?.as_array()
    }

    fn numbers<T>(&self, key: &str, convert: impl Fn(&Value) -> Option<T>) -> Option<Vec<T>> {
        let array = self.array(key)?;
        array.kept.as_ref()?;
        let values: Option<Vec<T>> = array.fixed_values().map(|value| convert(&value)).collect();
        values.filter(|values| values.len() as u64 == array.len)
    }

    /// A small array of whole numbers that all fit.
    pub fn array_u32(&self, key: &str) -> Option<Vec<u32>> {
        self.numbers(key, |value| u32::try_from(value.as_integer()?).ok())
    }

    /// A small array of whole numbers that all fit.
    pub fn array_i32(&self, key: &str) -> Option<Vec<i32>> {
        self.numbers(key, |value| i32::try_from(value.as_integer()?).ok())
    }

    /// A small array of 32-bit floats.
    pub fn array_f32(&self, key: &str) -> Option<Vec<f32>> {
        self.numbers(key, |value| match value {
            Value::F32(value) => Some(*value),
            _ => None,
        })
    }

    /// A small array of bools.
    pub fn array_bool(&self, key: &str) -> Option<Vec<bool>> {
        self.numbers(key, |value| match value {
            Value::Bool(value) => Some(*value),
            _ => None,
        })
    }
}
