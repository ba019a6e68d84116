//! Arrays of metadata: small ones at hand, token lists as a place in the file.

use super::cursor::{ByteOrder, Cursor, SliceSource};
use super::parse::skip_array_items;
use super::value::{Value, ValueType};

/// Where bytes lie in the (first) file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Offset of the first byte in the file.
    pub offset: u64,
    /// How many bytes.
    pub bytes: u64,
}

/// An array: what it holds, how much of it, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Array {
    /// The type of its elements.
    pub element: ValueType,
    /// How many elements.
    pub len: u64,
    /// Where the elements lie in the (first) file.
    pub place: Place,
    /// The elements as they lie in the file, if the array is small.
    pub(super) kept: Option<Box<[u8]>>,
    pub(super) order: ByteOrder,
}

impl Array {
    /// The elements of an array that is at hand: up to 4096 numbers or bools.
    /// `None` for others; read those with [`Header::read_array`](super::Header::read_array).
    pub fn items(&self) -> Option<Items> {
        self.kept
            .as_ref()
            .map(|bytes| self.items_of(bytes.clone().into_vec()))
    }

    /// The elements, from the bytes at [`Self::place`].
    pub(super) fn items_of(&self, bytes: Vec<u8>) -> Items {
        let starts = if self.element.fixed_bytes().is_none() {
            self.starts(&bytes)
        } else {
            Vec::new()
        };
        Items {
            element: self.element,
            order: self.order,
            origin: self.place.offset,
            bytes,
            starts,
        }
    }

    /// Where each element begins within `bytes`, which bounds their number whatever `len` says.
    fn starts(&self, bytes: &[u8]) -> Vec<u32> {
        let most = (bytes.len() as u64)
            .checked_div(self.element.least_bytes())
            .unwrap_or_default();
        let count = self.len.min(most);
        let mut starts = Vec::with_capacity(usize::try_from(count).unwrap_or_default());
        let mut cursor = Cursor::new(SliceSource::new(bytes), bytes.len() as u64);
        cursor.order = self.order;
        for _ in 0..count {
            let Ok(start) = u32::try_from(cursor.offset()) else {
                break;
            };
            let skipped = match self.element {
                ValueType::Array => skip_array_items(&mut cursor, 1, 0),
                _ => cursor.skip_strings(1, "a string"),
            };
            if skipped.is_err() {
                break;
            }
            starts.push(start);
        }
        starts
    }

    pub(super) fn fixed_values(&self) -> impl Iterator<Item = Value> + '_ {
        let (element, order) = (self.element, self.order);
        let size = element.fixed_bytes().unwrap_or(1);
        self.kept
            .iter()
            .filter(move |_| element.fixed_bytes().is_some())
            .flat_map(move |bytes| bytes.chunks_exact(usize::try_from(size).unwrap_or(1)))
            .filter_map(move |chunk| Value::from_fixed(element, order, chunk))
    }
}

/// The elements of an [`Array`], decoded one at a time.
#[derive(Debug, Clone)]
pub struct Items {
    element: ValueType,
    order: ByteOrder,
    origin: u64,
    bytes: Vec<u8>,
    starts: Vec<u32>,
}

impl Items {
    /// How many elements there are.
    pub fn len(&self) -> usize {
        match self
            .element
            .fixed_bytes()
            .and_then(|size| usize::try_from(size).ok())
        {
            Some(size) => self.bytes.len().checked_div(size).unwrap_or_default(),
            None => self.starts.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The element of that number.
    pub fn get(&self, index: usize) -> Option<Value> {
        if let Some(size) = self.element.fixed_bytes() {
            let size = usize::try_from(size).ok()?;
            let start = index.checked_mul(size)?;
            let bytes = self.bytes.get(start..start.checked_add(size)?)?;
            return Value::from_fixed(self.element, self.order, bytes);
        }
        let start = usize::try_from(*self.starts.get(index)?).ok()?;
        let end = match self.starts.get(index.checked_add(1)?) {
            Some(next) => usize::try_from(*next).ok()?,
            None => self.bytes.len(),
        };
        let bytes = self.bytes.get(start..end)?;
        match self.element {
            ValueType::Array => self.inner_array(start, bytes),
            _ => Some(Value::from_string(bytes.get(8..)?)),
        }
    }

    fn inner_array(&self, start: usize, bytes: &[u8]) -> Option<Value> {
        let (element, rest) = bytes.split_first_chunk::<4>()?;
        let (len, items) = rest.split_first_chunk::<8>()?;
        let offset = self.origin.checked_add(start as u64)?.checked_add(12)?;
        Some(Value::Array(Box::new(Array {
            element: ValueType::from_number(self.order.u32(*element))?,
            len: self.order.u64(*len),
            place: Place {
                offset,
                bytes: items.len() as u64,
            },
            kept: Some(items.into()),
            order: self.order,
        })))
    }

    /// The elements in order.
    pub fn iter(&self) -> impl Iterator<Item = Value> + '_ {
        (0..self.len()).filter_map(|index| self.get(index))
    }
}
