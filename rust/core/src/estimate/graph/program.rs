//! What happens to the buffers while a graph is planned, in order: [`lifetimes`](super::lifetimes) finds it,
//! [`allocator`](super::allocator) plays it.

/// Which runs of a round do something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum When {
    /// What all layers share is made once.
    First,
    /// All but the first.
    Again,
    Always,
    /// All but the last.
    Before,
    /// What layers behind the rounds read is made by the last run, and what no others read ends with it.
    Last,
}

/// What happens to a buffer. A slot stands for one place; an operation that writes over its source keeps the source's slot.
#[derive(Clone, Copy, Debug)]
pub(super) enum Change {
    Take {
        slot: u32,
        buffer: u8,
        bytes: i64,
        when: When,
    },
    GiveBack {
        slot: u32,
        buffer: u8,
        /// Bytes of the slot that are kept before those that are given back.
        kept: i64,
        bytes: i64,
        when: When,
    },
    /// The last run of a round writes over what no run needs any more.
    TakeOver { slot: u32, from: u32 },
}

impl Change {
    /// In which runs of a round it happens.
    pub(super) fn when(self) -> When {
        match self {
            Self::Take { when, .. } | Self::GiveBack { when, .. } => when,
            Self::TakeOver { .. } => When::Last,
        }
    }
}

/// Places that the layers of a round take before the first layer runs: those of all runs lie side by side, a run gives its own back.
#[derive(Clone, Debug)]
pub(super) struct Reserve {
    /// The change after which the runs that are not built get theirs.
    pub(super) after: usize,
    pub(super) buffer: u8,
    /// Slots and bytes, in order.
    pub(super) members: Vec<(u32, i64)>,
    /// How often the round runs beside the built times.
    pub(super) more: usize,
}

/// Changes that happen once and `more` times again.
#[derive(Clone, Debug)]
pub(super) struct RoundChanges {
    pub(super) start: usize,
    pub(super) end: usize,
    pub(super) more: usize,
    /// Slots that a run reads, and those that it leaves in their stead.
    pub(super) handed: Vec<(u32, u32)>,
    pub(super) reserves: std::ops::Range<usize>,
}

/// All changes, in order.
#[derive(Debug, Default)]
pub(super) struct Program {
    pub(super) changes: Vec<Change>,
    pub(super) rounds: Vec<RoundChanges>,
    pub(super) reserves: Vec<Reserve>,
}
