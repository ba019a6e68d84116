//! Runs that are leapt over against the same runs played one by one.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use proptest::prelude::*;

use super::super::buffer::{Block, Buffer};
use super::super::program::{Change, Program, Reserve, RoundChanges, When};
use super::Player;

/// The place that one run leaves to the next.
const HANDED: u32 = 0;

fn take(slot: u32, bytes: i64) -> Change {
    Change::Take {
        slot,
        buffer: 0,
        bytes,
        when: When::Always,
    }
}

fn give_back(slot: u32, bytes: i64) -> Change {
    Change::GiveBack {
        slot,
        buffer: 0,
        kept: 0,
        bytes,
        when: When::Always,
    }
}

/// What a run does: it gives back what the one before it left and its early places, takes and gives back others, and leaves one.
#[derive(Clone, Debug)]
struct Round {
    /// Sizes of early places, in two stretches.
    early: [Vec<i64>; 2],
    handed: i64,
    gaps: Vec<i64>,
    steps: Vec<(bool, i64, prop::sample::Index)>,
    more: usize,
}

impl Round {
    fn any() -> impl Strategy<Value = Self> {
        let sizes = |most: i64, count| prop::collection::vec(1..most, count);
        let step = (any::<bool>(), 1_i64..40, any::<prop::sample::Index>());
        (
            [sizes(12, 1..4), sizes(12, 0..3)],
            1_i64..40,
            sizes(30, 0..6),
            prop::collection::vec(step, 1..24),
            1_usize..60,
        )
            .prop_map(|(early, handed, gaps, steps, more)| Self {
                early,
                handed,
                gaps,
                steps,
                more,
            })
    }

    fn program(&self) -> Program {
        let mut slots = 1_u32..;
        let mut named = |sizes: &[i64]| -> Vec<(u32, i64)> {
            sizes
                .iter()
                .map(|bytes| (slots.next().unwrap(), *bytes))
                .collect()
        };
        let gaps = named(&self.gaps);
        let takes = |places: &[(u32, i64)]| {
            places
                .iter()
                .map(|(slot, bytes)| take(*slot, *bytes))
                .collect::<Vec<_>>()
        };
        let mut changes = takes(&gaps);
        changes.extend(
            gaps.iter()
                .step_by(2)
                .map(|(slot, bytes)| give_back(*slot, *bytes)),
        );
        let mut reserves = Vec::new();
        for sizes in self.early.iter().filter(|sizes| !sizes.is_empty()) {
            let members = named(sizes);
            changes.extend(takes(&members));
            reserves.push(Reserve {
                after: changes.len() - 1,
                buffer: 0,
                members,
                more: self.more,
            });
            if reserves.len() == 1 {
                changes.push(take(HANDED, self.handed));
            }
        }
        let early = reserves.iter().flat_map(|reserve| reserve.members.clone());
        let start = changes.len();
        let mut live: Vec<_> = early.chain([(HANDED, self.handed)]).collect();
        for (gives_back, bytes, which) in &self.steps {
            if *gives_back && !live.is_empty() {
                let (slot, bytes) = live.swap_remove(which.index(live.len()));
                changes.push(give_back(slot, bytes));
            } else {
                live.push((slots.next().unwrap(), *bytes));
                changes.push(take(live.last().unwrap().0, *bytes));
            }
        }
        let left = slots.next().unwrap();
        changes.push(take(left, self.handed));
        changes.extend(live.into_iter().map(|(slot, bytes)| give_back(slot, bytes)));
        let end = changes.len();
        let round = RoundChanges {
            start,
            end,
            more: self.more,
            handed: vec![(HANDED, left)],
            reserves: 0..reserves.len(),
        };
        Program {
            changes,
            rounds: vec![round],
            reserves,
        }
    }
}

/// What is free at last, and the peak; none when the program cannot be leapt through.
fn leaping(program: &Program) -> Option<(Vec<Block>, i64)> {
    let (mut buffers, mut places) = fresh();
    let mut player = Player {
        buffers: &mut buffers,
        places: &mut places,
    };
    player.play_all(program)?;
    Some((buffers[0].free.clone(), buffers[0].peak))
}

/// The same, with every early place taken for itself and every run played.
fn one_by_one(program: &Program) -> (Vec<Block>, i64) {
    let (mut buffers, mut places) = fresh();
    let mut player = Player {
        buffers: &mut buffers,
        places: &mut places,
    };
    let round = &program.rounds[0];
    let mut done = 0;
    let mut early = Vec::new();
    for reserve in &program.reserves {
        player.play(&program.changes[done..=reserve.after]);
        done = reserve.after + 1;
        for run in 1..=round.more {
            for (slot, bytes) in &reserve.members {
                early.push((run, *slot, player.buffers[0].allocate(*bytes)));
            }
        }
    }
    player.play(&program.changes[done..round.start]);
    for run in 0..=round.more {
        for (_, slot, place) in early.iter().filter(|(of, ..)| *of == run) {
            player.put(*slot, *place);
        }
        player.play(&program.changes[round.start..round.end]);
        let (before, left) = round.handed[0];
        let place = player.place(left);
        player.put(before, place);
    }
    (buffers[0].free.clone(), buffers[0].peak)
}

fn fresh() -> (Vec<Buffer>, Vec<i64>) {
    let mut buffers = vec![Buffer::default()];
    buffers[0].reset();
    (buffers, vec![0; 64])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10_000))]

    #[test]
    fn runs_that_are_leapt_over_leave_what_they_leave_one_by_one(round in Round::any()) {
        let program = round.program();
        if let Some(leapt) = leaping(&program) {
            prop_assert_eq!(leapt, one_by_one(&program));
        }
    }
}
