//! Runs that are leapt over against the same runs played one by one.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use proptest::prelude::*;

use super::super::buffer::{Block, Buffer};
use super::super::lifetimes::{Change, Program, Reserve, RoundChanges};
use super::Player;

/// The place that one run leaves to the next.
const HANDED: u32 = 0;

fn take(slot: u32, bytes: i64) -> Change {
    Change::Take {
        slot,
        buffer: 0,
        bytes,
        once: false,
    }
}

fn give_back(slot: u32, bytes: i64) -> Change {
    Change::GiveBack {
        slot,
        buffer: 0,
        kept: 0,
        bytes,
        once: false,
    }
}

/// What a run does: it gives back what the one before it left and its early places, takes and gives back others, and leaves one.
#[derive(Clone, Debug)]
struct Round {
    early: Vec<i64>,
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
            sizes(12, 1..4),
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

    /// The program, and the slots of the places that were taken early.
    fn program(&self) -> (Program, Vec<(u32, i64)>) {
        let mut slots = 1_u32..;
        let early: Vec<_> = self
            .early
            .iter()
            .map(|bytes| (slots.next().unwrap(), *bytes))
            .collect();
        let mut changes: Vec<Change> = early
            .iter()
            .map(|(slot, bytes)| take(*slot, *bytes))
            .collect();
        let after = changes.len() - 1;
        changes.push(take(HANDED, self.handed));
        let gaps: Vec<_> = self
            .gaps
            .iter()
            .map(|bytes| (slots.next().unwrap(), *bytes))
            .collect();
        changes.extend(gaps.iter().map(|(slot, bytes)| take(*slot, *bytes)));
        changes.extend(
            gaps.iter()
                .step_by(2)
                .map(|(slot, bytes)| give_back(*slot, *bytes)),
        );
        let start = changes.len();
        let mut live: Vec<_> = early
            .iter()
            .copied()
            .chain([(HANDED, self.handed)])
            .collect();
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
        changes.extend_from_within(start..end);
        let reserve = Reserve {
            after,
            buffer: 0,
            members: early.clone(),
            more: self.more,
        };
        let round = RoundChanges {
            start,
            end,
            more: self.more,
            handed: vec![(HANDED, left)],
            reserves: 0..1,
        };
        let program = Program {
            changes,
            rounds: vec![round],
            reserves: vec![reserve],
        };
        (program, early)
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
fn one_by_one(program: &Program, early: &[(u32, i64)]) -> (Vec<Block>, i64) {
    let (mut buffers, mut places) = fresh();
    let mut player = Player {
        buffers: &mut buffers,
        places: &mut places,
    };
    let (round, after) = (&program.rounds[0], program.reserves[0].after);
    player.play(&program.changes[..=after]);
    let mut runs = vec![
        early
            .iter()
            .map(|(slot, _)| player.place(*slot))
            .collect::<Vec<_>>(),
    ];
    for _ in 0..round.more {
        runs.push(
            early
                .iter()
                .map(|(_, bytes)| player.buffers[0].allocate(*bytes))
                .collect(),
        );
    }
    player.play(&program.changes[after + 1..round.start]);
    for run in runs {
        for ((slot, _), place) in early.iter().zip(run) {
            player.put(*slot, place);
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
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn runs_that_are_leapt_over_leave_what_they_leave_one_by_one(round in Round::any()) {
        let (program, early) = round.program();
        let leapt = leaping(&program);
        prop_assert!(leapt.is_some());
        prop_assert_eq!(leapt.unwrap(), one_by_one(&program, &early));
    }
}
