//! Layers that repeat are built four times and planned as often as it takes until the allocator is where it was before.

/// The longest pattern of layers that is looked for.
const LONGEST_PERIOD: usize = 12;

/// Rounds of a repeating pattern that are built before the one to repeat: it reads what the one before it finished of the first.
const LEADING_ROUNDS: usize = 2;

/// All rounds that are built: the leading ones, the one to repeat, one to end with.
const BUILT_ROUNDS: usize = LEADING_ROUNDS + 2;

/// A round of layers that stands for many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Repeat {
    /// The first layer of the round, by its place among the built layers.
    pub(super) first: usize,
    /// The layers of the round.
    pub(super) period: usize,
    /// How often the round runs beside the built times.
    pub(super) more: usize,
}

/// Which layers to build, and which rounds of them to repeat; `kinds` tells alike layers by equal numbers.
pub(super) fn representatives(kinds: &[u64]) -> (Vec<usize>, Vec<Repeat>) {
    let mut built = Vec::with_capacity(kinds.len().min(64));
    let mut repeats = Vec::new();
    let mut start = 0;
    while start < kinds.len() {
        let rest = kinds.get(start..).unwrap_or_default();
        let (period, more) = (1..=LONGEST_PERIOD.min(rest.len()))
            .map(|period| (period, rounds(rest, period).saturating_sub(BUILT_ROUNDS)))
            .max_by_key(|(period, more)| (more * period, std::cmp::Reverse(*period)))
            .unwrap_or((1, 0));
        if more == 0 {
            built.push(start);
            start += 1;
            continue;
        }
        repeats.push(Repeat {
            first: built.len() + LEADING_ROUNDS * period,
            period,
            more,
        });
        let middle = start + (LEADING_ROUNDS + 1) * period;
        built.extend(start..middle);
        start = middle + more * period;
        built.extend(start..start + period);
        start += period;
    }
    (built, repeats)
}

/// How many times the first `period` kinds follow one another.
fn rounds(kinds: &[u64], period: usize) -> usize {
    let alike = kinds
        .iter()
        .zip(kinds.iter().skip(period))
        .take_while(|(a, b)| a == b)
        .count();
    alike / period + 1
}
