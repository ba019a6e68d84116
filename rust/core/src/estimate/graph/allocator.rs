//! Where everything lies: plays the changes of a graph through (`ggml-alloc.c`), less the data. The peak of each buffer is the compute
//! buffer's size.
//!
//! A round of layers runs until it finds the free blocks as an earlier run found them: from there on the runs repeat. What its runs
//! placed before the first layer becomes free run by run, so that a block grows; as long as it is too small for anything, or large
//! enough, or not the best fit, for what a run takes, runs still repeat, and are leapt over.

#[cfg(test)]
mod tests;

use super::buffer::{Block, Buffer, BufferRules};
use super::lifetimes::Lifetimes;
use super::ops::Graph;
use super::program::{Change, Program, Reserve, RoundChanges, When};
use super::scheduler::Schedule;

/// Plans graphs one after the other; keeps its memory between them.
#[derive(Debug, Default)]
pub(super) struct Allocator {
    lifetimes: Lifetimes,
    buffers: Vec<Buffer>,
    places: Vec<i64>,
}

impl Allocator {
    /// The peak of every buffer, in backend order (`ggml_gallocr_reserve_n_size`); none when a round of layers does not repeat and all
    /// layers must be built.
    pub(super) fn plan(
        &mut self,
        graph: &Graph,
        schedule: &Schedule,
        rules: &[BufferRules],
    ) -> Option<Vec<u64>> {
        let program = self.lifetimes.find(graph, schedule, rules)?;
        self.buffers.resize_with(rules.len(), Buffer::default);
        self.buffers.iter_mut().for_each(Buffer::reset);
        // tensors that a graph lacks are places that nothing asks for
        self.places.resize(self.places.len().max(graph.len()), 0);
        let mut player = Player {
            buffers: &mut self.buffers,
            places: &mut self.places,
        };
        player.play_all(program)?;
        let peak = |buffer: &Buffer| u64::try_from(buffer.peak).unwrap_or(0);
        Some(self.buffers.iter().map(peak).collect())
    }
}

/// A stretch of places that were taken before the layers of a round.
#[derive(Clone, Copy, Debug)]
struct Stretch {
    buffer: u8,
    start: i64,
    /// Behind the last run's.
    end: i64,
    /// Bytes of one run.
    step: i64,
}

impl Stretch {
    /// Where the places of the run after `run` others begin.
    fn begin(&self, run: usize) -> i64 {
        let run = i64::try_from(run).unwrap_or(i64::MAX);
        self.start.saturating_add(self.step.saturating_mul(run))
    }
}

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

struct Player<'a> {
    buffers: &'a mut [Buffer],
    /// Where each slot lies.
    places: &'a mut [i64],
}

impl Player<'_> {
    fn play_all(&mut self, program: &Program) -> Option<()> {
        let mut stretches: Vec<Option<Stretch>> = vec![None; program.reserves.len()];
        let mut rounds = program.rounds.iter().peekable();
        let mut done = 0;
        loop {
            let round = rounds.peek().map_or(usize::MAX, |round| round.start);
            let reserve = program.reserves.iter().zip(&stretches);
            let reserve = reserve
                .enumerate()
                .filter(|(_, (_, known))| known.is_none());
            let reserve = reserve.min_by_key(|(_, (reserve, _))| reserve.after);
            if let Some((number, (reserve, _))) = reserve
                && reserve.after < round
            {
                self.play(program.changes.get(done..=reserve.after)?);
                done = reserve.after + 1;
                let stretch = self.stretch(reserve)?;
                *stretches.get_mut(number)? = Some(stretch);
            } else if let Some(round) = rounds.next() {
                self.play(program.changes.get(done..round.start)?);
                let reserves = program.reserves.get(round.reserves.clone())?;
                let own = stretches.get(round.reserves.clone())?;
                let own: Vec<Stretch> = own.iter().copied().collect::<Option<_>>()?;
                self.repeat(
                    program.changes.get(round.start..round.end)?,
                    round,
                    reserves,
                    &own,
                );
                done = round.end;
            } else {
                self.play(program.changes.get(done..)?);
                return Some(());
            }
        }
    }

    fn play<'c>(&mut self, changes: impl IntoIterator<Item = &'c Change>) {
        self.play_before(changes, |_, _, _, _| {});
    }

    /// Plays changes; `watch` sees the buffer, its number, the bytes and the chosen block before each is taken.
    fn play_before<'c>(
        &mut self,
        changes: impl IntoIterator<Item = &'c Change>,
        mut watch: impl FnMut(&Buffer, u8, i64, usize),
    ) {
        for change in changes {
            match *change {
                Change::Take {
                    slot,
                    buffer: number,
                    bytes,
                    ..
                } => {
                    let Some(buffer) = self.buffers.get_mut(usize::from(number)) else {
                        continue;
                    };
                    let choice = buffer.choice(bytes);
                    watch(buffer, number, bytes, choice);
                    let offset = buffer.take(choice, bytes);
                    self.put(slot, offset);
                }
                Change::GiveBack {
                    slot,
                    buffer,
                    kept,
                    bytes,
                    ..
                } => self.give_back(slot, buffer, kept, bytes),
                Change::TakeOver { slot, from } => self.put(slot, self.place(from)),
            }
        }
    }

    fn give_back(&mut self, slot: u32, buffer: u8, kept: i64, bytes: i64) {
        let offset = self.place(slot) + kept;
        if let Some(buffer) = self.buffers.get_mut(usize::from(buffer)) {
            buffer.release(offset, bytes);
        }
    }

    fn place(&self, slot: u32) -> i64 {
        self.places.get(slot as usize).copied().unwrap_or(0)
    }

    fn put(&mut self, slot: u32, offset: i64) {
        if let Some(place) = self.places.get_mut(slot as usize) {
            *place = offset;
        }
    }

    /// Takes the places of the runs that are not built; none when they would not lie behind those of the run that is.
    fn stretch(&mut self, reserve: &Reserve) -> Option<Stretch> {
        let (first, smallest) = (
            reserve.members.first()?.0,
            reserve.members.iter().map(|(_, bytes)| *bytes).min()?,
        );
        let start = self.place(first);
        let mut end = start;
        for (slot, bytes) in &reserve.members {
            if self.place(*slot) != end {
                return None;
            }
            end = end.saturating_add(*bytes);
        }
        let step = end - start;
        let more = i64::try_from(reserve.more).ok()?;
        let buffer = self.buffers.get_mut(usize::from(reserve.buffer))?;
        let fits_none = buffer.gaps().iter().all(|gap| gap.bytes < smallest);
        let follows = fits_none && buffer.allocate(step.saturating_mul(more)) == end;
        follows.then_some(Stretch {
            buffer: reserve.buffer,
            start,
            end: end.saturating_add(step.saturating_mul(more)),
            step,
        })
    }

    /// Runs a round as often as it stands for, or until its runs repeat, and once more.
    fn repeat(
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
