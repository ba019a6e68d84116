//! The ledger: nothing is promised twice, and nothing is lost.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use llama_gpu_core::placement::{BytesByPool, Lease, LeaseState, Ledger, Refused};
use proptest::prelude::*;

fn bytes(of: &[(&str, u64)]) -> BytesByPool {
    of.iter()
        .map(|(pool, bytes)| ((*pool).to_owned(), *bytes))
        .collect()
}

fn ledger(budgets: &[(&str, u64)]) -> Ledger {
    Ledger::new(bytes(budgets))
}

#[test]
fn a_promise_is_all_or_nothing() {
    let ledger = ledger(&[("a", 10), ("b", 5)]);
    let refused = ledger
        .reserve("model", bytes(&[("a", 10), ("b", 6)]))
        .unwrap_err();
    assert_eq!(
        refused,
        Refused::TooLittle {
            pool: "b".to_owned(),
            asked_bytes: 6,
            available_bytes: 5
        }
    );
    assert_eq!(ledger.available(), bytes(&[("a", 10), ("b", 5)]));
    assert!(ledger.claims().is_empty());
}

#[test]
fn what_is_promised_to_one_is_gone_for_the_next_until_it_is_released() {
    let ledger = ledger(&[("a", 10)]);
    let first = ledger.reserve("first", bytes(&[("a", 7)])).unwrap();
    ledger.reserve("second", bytes(&[("a", 4)])).unwrap_err();
    assert!(first.release());
    assert!(!first.release());
    assert_eq!(first.state(), LeaseState::Released);
    let second = ledger.reserve("second", bytes(&[("a", 10)])).unwrap();
    assert_eq!(second.bytes(), bytes(&[("a", 10)]));
}

#[test]
fn the_measured_amount_replaces_the_promise_even_beyond_the_budget() {
    let ledger = ledger(&[("a", 10), ("b", 10)]);
    let lease = ledger.reserve("model", bytes(&[("a", 7)])).unwrap();
    lease.commit(bytes(&[("a", 5), ("b", 1)])).unwrap();
    assert_eq!(ledger.available(), bytes(&[("a", 5), ("b", 9)]));
    lease.commit(bytes(&[("a", 12)])).unwrap();
    assert_eq!(ledger.available(), bytes(&[("a", 0), ("b", 10)]));
    assert_eq!(lease.state(), LeaseState::Committed);
    lease.release();
    assert_eq!(ledger.available(), bytes(&[("a", 10), ("b", 10)]));
    assert_eq!(
        lease.commit(bytes(&[("a", 1)])),
        Err(Refused::AlreadyReleased)
    );
}

#[test]
fn a_lost_lease_gives_back_what_it_held() {
    let ledger = ledger(&[("a", 10)]);
    drop(ledger.reserve("model", bytes(&[("a", 10)])).unwrap());
    assert_eq!(ledger.available(), bytes(&[("a", 10)]));
}

#[test]
fn the_end_of_an_owner_ends_all_its_claims_and_no_others() {
    let ledger = ledger(&[("a", 10)]);
    let leases: Vec<Lease> = ["x", "y", "x"]
        .iter()
        .map(|owner| ledger.reserve(owner, bytes(&[("a", 2)])).unwrap())
        .collect();
    assert_eq!(ledger.release_owner("x"), 2);
    assert_eq!(ledger.available(), bytes(&[("a", 8)]));
    let states: Vec<LeaseState> = leases.iter().map(Lease::state).collect();
    assert_eq!(
        states,
        [
            LeaseState::Released,
            LeaseState::Reserved,
            LeaseState::Released
        ]
    );
    assert_eq!(ledger.claims()[0].owner, "y");
}

#[test]
fn a_budget_that_shrinks_leaves_the_claims_and_promises_nothing_more() {
    let ledger = ledger(&[("a", 10)]);
    let lease = ledger.reserve("model", bytes(&[("a", 6)])).unwrap();
    ledger.set_budget("a", 4);
    assert_eq!(ledger.available(), bytes(&[("a", 0)]));
    ledger.reserve("other", bytes(&[("a", 1)])).unwrap_err();
    lease.release();
    assert_eq!(ledger.available(), bytes(&[("a", 4)]));
}

#[test]
fn a_pool_that_nobody_named_is_refused_by_name() {
    let ledger = ledger(&[("a", 10)]);
    let unknown = Refused::UnknownPool("b".to_owned());
    assert_eq!(
        ledger.reserve("model", bytes(&[("b", 0)])).unwrap_err(),
        unknown
    );
    let lease = ledger.reserve("model", bytes(&[("a", 1)])).unwrap();
    assert_eq!(lease.commit(bytes(&[("b", 1)])), Err(unknown));
    assert_eq!(lease.state(), LeaseState::Reserved);
}

/// How long threads fight for the ledger: a moment, or `LLAMA_GPU_TEST_SECONDS`.
fn fight() -> Duration {
    let asked = std::env::var("LLAMA_GPU_TEST_SECONDS").ok();
    let seconds = asked.and_then(|seconds| seconds.parse().ok());
    seconds.map_or(Duration::from_millis(500), Duration::from_secs)
}

#[test]
fn sixty_four_threads_never_hold_more_than_there_is() {
    const THREADS: u64 = 64;
    const BUDGET: u64 = 20;
    let ledger = ledger(&[("a", BUDGET), ("b", BUDGET)]);
    let held = [AtomicU64::new(0), AtomicU64::new(0)];
    let (most, operations) = (AtomicU64::new(0), AtomicU64::new(0));
    let start = Barrier::new(usize::try_from(THREADS).unwrap());
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (ledger, held, most, start, operations) =
                (&ledger, &held, &most, &start, &operations);
            scope.spawn(move || {
                start.wait();
                let end = Instant::now() + fight();
                let mut round = thread;
                while Instant::now() < end {
                    round += 1;
                    operations.fetch_add(1, Ordering::Relaxed);
                    let wanted = [1 + round % 7, round % 3];
                    let asked = bytes(&[("a", wanted[0]), ("b", wanted[1])]);
                    let Ok(lease) = ledger.reserve(&format!("thread-{thread}"), asked) else {
                        continue;
                    };
                    for (sum, bytes) in held.iter().zip(wanted) {
                        let now = sum.fetch_add(bytes, Ordering::SeqCst) + bytes;
                        most.fetch_max(now, Ordering::SeqCst);
                    }
                    let measured = bytes(&[("a", wanted[0]), ("b", 0)]);
                    if round % 5 == 0 {
                        held[1].fetch_sub(wanted[1], Ordering::SeqCst);
                        lease.commit(measured).unwrap();
                        held[0].fetch_sub(wanted[0], Ordering::SeqCst);
                    } else {
                        for (sum, bytes) in held.iter().zip(wanted) {
                            sum.fetch_sub(bytes, Ordering::SeqCst);
                        }
                    }
                    if round % 11 == 0 {
                        assert_eq!(ledger.release_owner(lease.owner()), 1);
                    }
                    drop(lease);
                    operations.fetch_add(2, Ordering::Relaxed);
                }
            });
        }
    });
    eprintln!(
        "{operations:?} operations of {THREADS} threads in {:?}",
        fight()
    );
    assert!((1..=BUDGET).contains(&most.into_inner()));
    assert_eq!(ledger.available(), bytes(&[("a", BUDGET), ("b", BUDGET)]));
    assert!(ledger.claims().is_empty());
}

#[derive(Clone, Debug)]
enum Step {
    Reserve(BytesByPool),
    Commit(usize, BytesByPool),
    Release(usize),
    Drop(usize),
    ReleaseOwner(u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let amounts = || {
        prop::collection::btree_map(
            prop::sample::select(vec!["a".to_owned(), "b".to_owned()]),
            0_u64..8,
            0..=2,
        )
    };
    let step = prop_oneof![
        4 => amounts().prop_map(Step::Reserve),
        2 => (0_usize..8, amounts()).prop_map(|(lease, bytes)| Step::Commit(lease, bytes)),
        2 => (0_usize..8).prop_map(Step::Release),
        2 => (0_usize..8).prop_map(Step::Drop),
        1 => (0_u8..2).prop_map(Step::ReleaseOwner),
    ];
    prop::collection::vec(step, 0..60)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// The ledger against the plain sum of what its leases say they hold.
    #[test]
    fn the_sums_are_those_of_the_claims_after_any_history(steps in steps()) {
        let budgets = [("a", 10_u64), ("b", 7)];
        let ledger = ledger(&budgets);
        let mut leases: Vec<Lease> = Vec::new();
        for (number, step) in steps.into_iter().enumerate() {
            let before = ledger.available();
            match step {
                Step::Reserve(wanted) => {
                    let owner = if number % 2 == 0 { "0" } else { "1" };
                    let fits = wanted.iter().all(|(pool, bytes)| *bytes <= before[pool]);
                    let lease = ledger.reserve(owner, wanted);
                    prop_assert_eq!(lease.is_ok(), fits);
                    leases.extend(lease);
                }
                Step::Commit(at, measured) => {
                    if let Some(lease) = leases.get(at) {
                        let live = lease.state() != LeaseState::Released;
                        prop_assert_eq!(lease.commit(measured).is_ok(), live);
                    }
                }
                Step::Release(at) => {
                    leases.get(at).map(Lease::release);
                }
                Step::Drop(at) => {
                    if at < leases.len() {
                        drop(leases.remove(at));
                    }
                }
                Step::ReleaseOwner(owner) => {
                    ledger.release_owner(&owner.to_string());
                }
            }
            for (pool, budget) in budgets {
                let held: u64 = leases.iter().filter_map(|lease| lease.bytes().get(pool).copied()).sum();
                prop_assert_eq!(ledger.available()[pool], budget.saturating_sub(held));
            }
        }
        drop(leases);
        prop_assert_eq!(ledger.available(), bytes(&budgets));
    }
}
