//! Layers that repeat are built two to four times, or more where they differ, and planned as often as it takes until the allocator is
//! where it was before.

/// The longest pattern of layers that is looked for.
pub(super) const LONGEST_PERIOD: usize = 12;

/// Layers before the round to repeat: the round finishes what the last of them began, and reads what the layer before that gave.
pub(super) const LEADING_LAYERS: usize = 2;

/// A round of layers that stands for many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Repeat {
    /// The first layer like those of the round, by its place among the built layers.
    pub(super) alike: usize,
    /// The first layer of the round.
    pub(super) first: usize,
    /// The layers of the round.
    pub(super) period: usize,
    /// How often the round runs beside the built times.
    pub(super) more: usize,
    /// One of the leading layers is left out: what it would have given is told by who reads it. Other layers may follow at once.
    pub(super) short: bool,
}

/// Which layers to build, and which rounds of them to repeat; `kinds` tells alike layers by equal numbers, and a round reads nothing that
/// layers before the `lead` ones before it made for themselves.
pub(super) fn representatives(
    kinds: &[u64],
    lead: usize,
    short: bool,
) -> (Vec<usize>, Vec<Repeat>) {
    let mut built = Vec::with_capacity(kinds.len().min(64));
    let mut repeats = Vec::new();
    let mut start = 0;
    while start < kinds.len() {
        let rest = kinds.get(start..).unwrap_or_default();
        let (period, more) = (1..=LONGEST_PERIOD.min(rest.len()))
            .map(|period| (period, repeatable_rounds(rest, lead, period, short)))
            .max_by_key(|(period, more)| (more * period, std::cmp::Reverse(*period)))
            .unwrap_or((1, 0));
        if more == 0 {
            built.push(start);
            start += 1;
            continue;
        }
        repeats.push(Repeat {
            alike: built.len(),
            first: built.len() + lead,
            period,
            more,
            short,
        });
        built.extend(start..start + lead + period);
        start += lead + period + more * period;
    }
    (built, repeats)
}

/// How many rounds of `period` kinds need not be built; a layer after them is, for the last may feed the output, and where copies between
/// backends lie in layers what a round leaves to another kind of layer is not what it leaves to its like.
fn repeatable_rounds(kinds: &[u64], lead: usize, period: usize, short: bool) -> usize {
    let alike = kinds
        .iter()
        .zip(kinds.iter().skip(period))
        .take_while(|(a, b)| a == b)
        .count();
    let after = usize::from(!short || alike + period == kinds.len());
    (alike + period).saturating_sub(lead + period + after) / period
}
