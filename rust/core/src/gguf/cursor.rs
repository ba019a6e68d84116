//! Walking through a header, over a slice or over a file seen through a window.
//!
//! A header is walked once, forwards. The window keeps a header of many megabytes
//! (token lists) within the processor's cache and the memory of a reader constant.

use std::convert::Infallible;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use super::error::{GgufError, GgufErrorKind};
use super::parse::MAX_HEADER_BYTES;

/// The order of the bytes within the numbers of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ByteOrder {
    /// Least significant byte first: nearly every file.
    Little,
    /// Most significant byte first (s390x).
    Big,
}

impl ByteOrder {
    /// `"little"` or `"big"`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Little => "little",
            Self::Big => "big",
        }
    }

    pub(super) const fn u32(self, bytes: [u8; 4]) -> u32 {
        match self {
            Self::Little => u32::from_le_bytes(bytes),
            Self::Big => u32::from_be_bytes(bytes),
        }
    }

    pub(super) const fn u64(self, bytes: [u8; 8]) -> u64 {
        match self {
            Self::Little => u64::from_le_bytes(bytes),
            Self::Big => u64::from_be_bytes(bytes),
        }
    }
}

/// Why a walk ends early: the bytes are wrong, or they cannot be had.
#[derive(Debug)]
pub(super) enum Stop<E> {
    Format(GgufError),
    Source(E),
}

impl<E> From<GgufError> for Stop<E> {
    fn from(error: GgufError) -> Self {
        Self::Format(error)
    }
}

/// Bytes that can be seen a window at a time.
pub(super) trait Source {
    type Error;
    /// The bytes at hand.
    fn window(&self) -> &[u8];
    /// Lets the window begin at `offset` and hold `wanted` bytes, or all that are left.
    fn move_to(&mut self, offset: u64, wanted: usize) -> Result<(), Self::Error>;
}

/// A slice: all bytes are at hand.
pub(super) struct SliceSource<'a> {
    bytes: &'a [u8],
    window: &'a [u8],
}

impl<'a> SliceSource<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self {
            bytes,
            window: bytes,
        }
    }
}

impl Source for SliceSource<'_> {
    type Error = Infallible;

    fn window(&self) -> &[u8] {
        self.window
    }

    fn move_to(&mut self, offset: u64, _wanted: usize) -> Result<(), Infallible> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        self.window = self.bytes.get(start..).unwrap_or_default();
        Ok(())
    }
}

/// A file, read forwards through one buffer.
pub(super) struct FileSource<'a> {
    file: &'a File,
    buffer: Vec<u8>,
    start: u64,
    length: usize,
}

impl<'a> FileSource<'a> {
    /// Fits the second-level cache, so that strings are walked where they were just put.
    const WINDOW_BYTES: u64 = 256 << 10;
    /// Holds the whole header of a model without a large vocabulary.
    const FIRST_BYTES: usize = 32 << 10;

    pub(super) fn new(file: &'a File, file_bytes: u64) -> Self {
        let window = usize::try_from(file_bytes.min(Self::WINDOW_BYTES)).unwrap_or_default();
        Self {
            file,
            buffer: vec![0; window],
            start: 0,
            length: 0,
        }
    }
}

impl Source for FileSource<'_> {
    type Error = io::Error;

    fn window(&self) -> &[u8] {
        self.buffer.get(..self.length).unwrap_or_default()
    }

    fn move_to(&mut self, offset: u64, wanted: usize) -> io::Result<()> {
        let passed = offset
            .checked_sub(self.start)
            .and_then(|n| usize::try_from(n).ok());
        if let Some(passed) = passed.filter(|passed| *passed <= self.length) {
            self.buffer.copy_within(passed..self.length, 0);
            self.length = self.length.saturating_sub(passed);
        } else {
            self.file.seek(SeekFrom::Start(offset))?;
            self.length = 0;
        }
        self.start = offset;
        if wanted > self.buffer.len() {
            self.buffer.resize(wanted, 0);
        }
        let limit = if offset == 0 {
            wanted.max(Self::FIRST_BYTES)
        } else {
            self.buffer.len()
        };
        let limit = limit.min(self.buffer.len());
        while self.length < wanted {
            let space = self.buffer.get_mut(self.length..limit).unwrap_or_default();
            match self.file.read(space) {
                Ok(0) => break,
                Ok(count) => self.length = self.length.saturating_add(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// A place in a header, and the ways to go on from there.
pub(super) struct Cursor<S> {
    source: S,
    start: u64,
    position: usize,
    pub(super) order: ByteOrder,
    pub(super) file_bytes: u64,
}

impl<S: Source> Cursor<S> {
    pub(super) fn new(source: S, file_bytes: u64) -> Self {
        Self {
            source,
            start: 0,
            position: 0,
            order: ByteOrder::Little,
            file_bytes,
        }
    }

    pub(super) fn offset(&self) -> u64 {
        self.start.saturating_add(self.position as u64)
    }

    /// What the file still holds from here.
    pub(super) fn left(&self) -> u64 {
        self.file_bytes.saturating_sub(self.offset())
    }

    /// The next `count` bytes; the cursor moves behind them.
    pub(super) fn bytes(
        &mut self,
        count: usize,
        reading: &'static str,
    ) -> Result<&[u8], Stop<S::Error>> {
        let at_hand = self.source.window().len().saturating_sub(self.position);
        if at_hand < count {
            let offset = self.offset();
            if offset > MAX_HEADER_BYTES {
                return Err(GgufErrorKind::HeaderTooLarge.at(offset).into());
            }
            self.source.move_to(offset, count).map_err(Stop::Source)?;
            self.start = offset;
            self.position = 0;
        }
        let offset = self.offset();
        let begin = self.position;
        let end = begin.saturating_add(count);
        match self.source.window().get(begin..end) {
            Some(bytes) => {
                self.position = end;
                Ok(bytes)
            }
            None => Err(GgufErrorKind::Truncated { reading }.at(offset).into()),
        }
    }

    fn fixed<const N: usize>(&mut self, reading: &'static str) -> Result<[u8; N], Stop<S::Error>> {
        let offset = self.offset();
        let bytes = self.bytes(N, reading)?;
        bytes
            .first_chunk::<N>()
            .copied()
            .ok_or_else(|| GgufErrorKind::Truncated { reading }.at(offset).into())
    }

    pub(super) fn magic(&mut self) -> Result<[u8; 4], Stop<S::Error>> {
        self.fixed("the magic number")
    }

    pub(super) fn u32(&mut self, reading: &'static str) -> Result<u32, Stop<S::Error>> {
        let bytes = self.fixed(reading)?;
        Ok(self.order.u32(bytes))
    }

    pub(super) fn u64(&mut self, reading: &'static str) -> Result<u64, Stop<S::Error>> {
        let bytes = self.fixed(reading)?;
        Ok(self.order.u64(bytes))
    }

    /// The length of the string that follows, which the file is known to be able to hold.
    pub(super) fn string_length(&mut self, reading: &'static str) -> Result<u64, Stop<S::Error>> {
        let offset = self.offset();
        let length = self.u64(reading)?;
        if length > self.left() {
            return Err(GgufErrorKind::StringLongerThanFile { length, reading }
                .at(offset)
                .into());
        }
        Ok(length)
    }

    /// Goes on without looking; `count` must have been held against [`Self::left`].
    pub(super) fn skip(&mut self, count: u64, reading: &'static str) -> Result<(), Stop<S::Error>> {
        let at_hand = self.source.window().len().saturating_sub(self.position);
        if let Some(count) = usize::try_from(count)
            .ok()
            .filter(|count| *count <= at_hand)
        {
            self.position = self.position.saturating_add(count);
        } else {
            // The last byte is looked at, so that a slice which is shorter than the file is noticed.
            let offset = self.offset();
            let last = offset.saturating_add(count).saturating_sub(1);
            self.source.move_to(last, 1).map_err(Stop::Source)?;
            if self.source.window().is_empty() {
                return Err(GgufErrorKind::Truncated { reading }.at(offset).into());
            }
            self.start = last;
            self.position = 1;
        }
        Ok(())
    }

    /// Goes behind `count` strings: the loop in which a header's time is spent.
    pub(super) fn skip_strings(
        &mut self,
        count: u64,
        reading: &'static str,
    ) -> Result<(), Stop<S::Error>> {
        let mut left = count;
        while left > 0 {
            let window = self.source.window();
            let order = self.order;
            let mut position = self.position;
            while left > 0 {
                let rest = window.get(position..).unwrap_or_default();
                let Some((length, rest)) = rest.split_first_chunk::<8>() else {
                    break;
                };
                let length = order.u64(*length);
                if length > rest.len() as u64 {
                    break;
                }
                #[allow(clippy::cast_possible_truncation, reason = "not longer than a slice")]
                let length = length as usize;
                position = position.saturating_add(length).saturating_add(8);
                left = left.saturating_sub(1);
            }
            self.position = position;
            if left > 0 {
                let length = self.string_length(reading)?;
                self.skip(length, reading)?;
                left = left.saturating_sub(1);
            }
        }
        Ok(())
    }
}
