//! Rounds of layers, run until they repeat.
//!
//! From where a run finds the free blocks as an earlier run found them the runs repeat. What a round's runs placed before the first layer
//! becomes free run by run, so that a block grows; as long as it is too small for anything, or large enough, or not the best fit, for
//! what a run takes, runs still repeat, and are leapt over.

use super::super::buffer::{Block, Buffer};
use super::super::program::{Change, Reserve, RoundChanges, When};
use super::{Player, Stretch};

/// What one run of a round leaves to the next.
#[derive(Debug)]
struct Handover {
    /// Runs before it.
    run: usize,
    free: Vec<(u8, Block)>,
    places: Vec<i64>,
    /// Runs after this one that surely take what it took; none where nobody watched.
    calm: Option<usize>,
}

impl Player<'_> {
    /// Runs a round as often as it stands for, or until its runs repeat, and once more.
    pub(super) fn repeat(
        &mut self,
        changes: &[Change],
        round: &RoundChanges,
        reserves: &[Reserve],
        stretches: &[Stretch],
    ) {
        let mut seen: Vec<Handover> = Vec::with_capacity(4);
        // the first run leaves what others do not if it does more, or less
        let alike = |change: &Change| !matches!(change.when(), When::First | When::Again);
        if changes.iter().all(alike) {
            let places = round.handed.iter().map(|(before, _)| self.place(*before));
            seen.push(self.handover(0, places.collect(), None));
        }
        let mut run = 0;
        let mut watching = false;
        // watching takes time: the more of it was in vain, the later it begins again
        let (mut repeated, mut patience) = (0, 1);
        while run < round.more {
            let changes = of_run(changes, run == 0, false);
            let calm = if stretches.is_empty() {
                self.play(changes);
                Some(usize::MAX)
            } else if watching {
                Some(self.play_watched(changes, stretches, run))
            } else {
                self.play(changes);
                None
            };
            run += 1;
            let places: Vec<i64> = round
                .handed
                .iter()
                .map(|(_, slot)| self.place(*slot))
                .collect();
            for ((before, _), place) in round.handed.iter().zip(&places) {
                self.put(*before, *place);
            }
            let mut now = self.handover(run, places, calm);
            let same = |earlier: &Handover| repeats(earlier, &now, stretches);
            let position = seen.iter().rposition(same);
            repeated = position.map_or(0, |_| repeated + 1);
            if let Some(position) = position
                && let Some((earlier, since)) = seen.get(position..).and_then(<[_]>::split_first)
                && let Some(calm) = since.iter().map(|one| one.calm).fold(calm, Option::min)
            {
                let cycle = since.len() + 1;
                let cycles = ((round.more - run) / cycle).min(calm / cycle);
                self.leap(earlier, &mut now, cycles);
                run = now.run;
                repeated = 0;
                patience += 1;
                if cycles > 0 {
                    seen.clear();
                    patience = 1;
                }
            }
            watching = repeated >= patience;
            seen.push(now);
            self.shift(reserves, stretches, run);
        }
        self.play(of_run(changes, false, true));
    }

    fn handover(&self, run: usize, places: Vec<i64>, calm: Option<usize>) -> Handover {
        let mut free = Vec::with_capacity(16);
        for (number, buffer) in (0_u8..).zip(self.buffers.iter()) {
            free.extend(buffer.free.iter().map(|block| (number, *block)));
        }
        Handover {
            run,
            free,
            places,
            calm,
        }
    }

    /// Puts what a round placed early where the run after `run` others finds it.
    fn shift(&mut self, reserves: &[Reserve], stretches: &[Stretch], run: usize) {
        for (reserve, stretch) in reserves.iter().zip(stretches) {
            let mut place = stretch.begin(run);
            for (slot, bytes) in &reserve.members {
                self.put(*slot, place);
                place = place.saturating_add(*bytes);
            }
        }
    }

    /// Blocks grow by as much as they did between two runs that repeat, `cycles` times.
    fn leap(&mut self, earlier: &Handover, now: &mut Handover, cycles: usize) {
        let runs = now.run - earlier.run;
        now.run += runs * cycles;
        for ((_, was), (_, is)) in earlier.free.iter().zip(&mut now.free) {
            is.bytes = is
                .bytes
                .saturating_add((is.bytes - was.bytes).saturating_mul(cycles as i64));
        }
        let mut blocks = now.free.iter();
        for buffer in &mut *self.buffers {
            for (block, (_, grown)) in buffer.free.iter_mut().zip(&mut blocks) {
                *block = *grown;
            }
        }
    }

    /// Plays a run; gives the number of runs after it that surely take the same blocks while those of the stretches grow.
    fn play_watched<'c>(
        &mut self,
        changes: impl Iterator<Item = &'c Change>,
        stretches: &[Stretch],
        run: usize,
    ) -> usize {
        let mut calm = i64::MAX;
        let begins = begins(stretches, run);
        self.play_before(changes, |buffer, number, bytes, choice| {
            let growth = |block: &Block| growth(number, *block, &begins);
            calm = calm_runs(buffer, bytes, choice, growth, calm);
        });
        usize::try_from(calm).unwrap_or(usize::MAX)
    }
}

/// The changes of one run of a round.
fn of_run(changes: &[Change], first: bool, last: bool) -> impl Iterator<Item = &Change> {
    changes.iter().filter(move |change| match change.when() {
        When::First => first,
        When::Again => !first,
        When::Always => true,
        When::Before => !last,
        When::Last => last,
    })
}

/// Where the places of the run after `run` others begin.
fn begins(stretches: &[Stretch], run: usize) -> Vec<(i64, &Stretch)> {
    stretches.iter().map(|of| (of.begin(run), of)).collect()
}

/// Bytes by which a block may grow from one run to the next: what the runs before gave back ends where the places of this one begin, and
/// all that ends before that stays as it is.
fn growth(buffer: u8, block: Block, begins: &[(i64, &Stretch)]) -> i64 {
    begins
        .iter()
        .filter(|(begin, of)| of.buffer == buffer && *begin <= block.end() && block.start < of.end)
        .map(|(_, of)| of.step)
        .fold(0, i64::saturating_add)
}

/// How many runs, at most `calm`, still choose the block `choice` for so many bytes.
fn calm_runs(
    buffer: &Buffer,
    bytes: i64,
    choice: usize,
    growth: impl Fn(&Block) -> i64,
    mut calm: i64,
) -> i64 {
    let chosen = buffer.gaps().get(choice).copied();
    let chosen_growth = chosen.as_ref().map_or(0, &growth);
    let chosen_bytes = chosen.map_or(i64::MAX, |block| block.bytes);
    if chosen_growth > 0 && chosen_bytes == bytes {
        return 0; // it would not vanish
    }
    for (index, block) in buffer.gaps().iter().enumerate() {
        if block.bytes >= bytes {
            if chosen_growth > 0 && index != choice {
                calm = calm.min((block.bytes - chosen_bytes - 1).max(0) / chosen_growth);
            }
            continue;
        }
        let step = growth(block);
        if step > 0 {
            let runs = (bytes - block.bytes + step - 1) / step;
            let grown = block.bytes.saturating_add(runs.saturating_mul(step));
            if chosen_growth > 0 || grown <= chosen_bytes {
                calm = calm.min(runs - 1);
            }
        }
    }
    calm
}

/// Whether two runs left the same, but for blocks of the stretches that grew run by run.
fn repeats(earlier: &Handover, now: &Handover, stretches: &[Stretch]) -> bool {
    let runs = i64::try_from(now.run - earlier.run).unwrap_or(i64::MAX);
    let same = |((of, was), (buffer, is)): (&(u8, Block), &(u8, Block))| {
        let step = || growth(*buffer, *was, &begins(stretches, earlier.run)).saturating_mul(runs);
        of == buffer
            && was.start == is.start
            && (was.bytes == is.bytes || is.bytes - was.bytes == step())
    };
    earlier.places == now.places
        && earlier.free.len() == now.free.len()
        && earlier.free.iter().zip(&now.free).all(same)
}
