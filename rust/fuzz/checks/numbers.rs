//! Numbers out of an input.

/// Small numbers and any numbers; zeros once the input has ended.
pub(crate) struct Numbers<'a>(pub(crate) &'a [u8]);

impl Numbers<'_> {
    pub(crate) fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        *first
    }

    pub(crate) fn size(&mut self) -> u64 {
        let (kind, value) = (self.byte(), u64::from(self.byte()));
        match kind {
            0..=199 => value,
            200..=239 => value << (kind - 200),
            _ => u64::MAX - value,
        }
    }

    pub(crate) fn below(&mut self, end: u8) -> u8 {
        self.byte() % end
    }

    pub(crate) fn flag(&mut self) -> bool {
        self.below(2) == 1
    }

    /// The size as far as an option can hold it.
    pub(crate) fn option(&mut self) -> u32 {
        u32::try_from(self.size()).unwrap_or(u32::MAX)
    }
}
