//! Where everything lies: plays the changes of a graph through (`ggml-alloc.c`), less the data. The peak of each buffer is the compute
//! buffer's size.
//!
//! How often a round of layers must run for that is found in [`repeated`].

mod repeated;
#[cfg(test)]
mod tests;

use super::buffer::{Buffer, BufferRules};
use super::lifetimes::Lifetimes;
use super::ops::Graph;
use super::program::{Change, Program, Reserve};
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
}
