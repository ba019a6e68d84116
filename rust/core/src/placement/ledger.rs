//! Who has been promised how much: reserve, commit, release.
//!
//! A snapshot is old as soon as it is taken: two loads that are decided at the same instant
//! see the same free memory. The ledger is where the second one is told that it is gone.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes by the name of a pool: a GPU's UUID, or [`HOST`].
pub type BytesByPool = BTreeMap<String, u64>;

/// The name of the host's memory among the pools.
pub const HOST: &str = "host";

/// What a lease stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LeaseState {
    /// Promised: the estimate, while a server loads.
    Reserved,
    /// Taken: what the server was measured to hold.
    Committed,
    /// Given back.
    Released,
}

impl LeaseState {
    /// Its name in Python and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Reserved => "reserved",
            Self::Committed => "committed",
            Self::Released => "released",
        }
    }
}

/// Why nothing was promised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refused {
    /// A pool has less left than was asked of it.
    TooLittle {
        /// The pool.
        pool: String,
        /// What was asked of it.
        asked_bytes: u64,
        /// What it has left.
        available_bytes: u64,
    },
    /// The ledger knows no pool of this name.
    UnknownPool(String),
    /// The lease has been given back.
    AlreadyReleased,
}

impl fmt::Display for Refused {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLittle {
                pool,
                asked_bytes,
                available_bytes,
            } => write!(
                formatter,
                "{pool} has {available_bytes} bytes left, {asked_bytes} were asked of it"
            ),
            Self::UnknownPool(pool) => write!(formatter, "the ledger knows no {pool}"),
            Self::AlreadyReleased => formatter.write_str("the lease has been released"),
        }
    }
}

impl std::error::Error for Refused {}

/// A line of the ledger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Whose it is.
    pub owner: String,
    /// What it holds.
    pub bytes: BytesByPool,
    /// Whether it is a promise or a measured fact.
    pub state: LeaseState,
}

#[derive(Debug, Default)]
struct Pool {
    budget: u64,
    claimed: u64,
}

impl Pool {
    fn available(&self) -> u64 {
        self.budget.saturating_sub(self.claimed)
    }
}

#[derive(Debug, Default)]
struct Book {
    pools: BTreeMap<String, Pool>,
    claims: BTreeMap<u64, Claim>,
    next: u64,
}

impl Book {
    fn check(&self, bytes: &BytesByPool) -> Result<(), Refused> {
        for (name, &asked_bytes) in bytes {
            let Some(pool) = self.pools.get(name) else {
                return Err(Refused::UnknownPool(name.clone()));
            };
            let available_bytes = pool.available();
            if asked_bytes > available_bytes {
                return Err(Refused::TooLittle {
                    pool: name.clone(),
                    asked_bytes,
                    available_bytes,
                });
            }
        }
        Ok(())
    }

    fn take(&mut self, bytes: &BytesByPool) {
        for (name, &bytes) in bytes {
            let pool = self.pools.entry(name.clone()).or_default();
            pool.claimed = pool.claimed.saturating_add(bytes);
        }
    }

    fn give_back(&mut self, bytes: &BytesByPool) {
        for (name, &bytes) in bytes {
            if let Some(pool) = self.pools.get_mut(name) {
                pool.claimed = pool.claimed.saturating_sub(bytes);
            }
        }
    }

    fn remove(&mut self, number: u64) -> Option<Claim> {
        let claim = self.claims.remove(&number)?;
        self.give_back(&claim.bytes);
        Some(claim)
    }
}

/// Budgets and the claims on them. Clones are the same ledger; every method takes the lock for
/// a few map operations and never waits while it has it.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    book: Arc<Mutex<Book>>,
}

impl Ledger {
    /// A ledger with these budgets and no claims.
    pub fn new(budgets: impl IntoIterator<Item = (String, u64)>) -> Self {
        let ledger = Self::default();
        for (pool, bytes) in budgets {
            ledger.set_budget(&pool, bytes);
        }
        ledger
    }

    /// A panic elsewhere leaves sums that are right: no method stops between two of them.
    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets what a pool has to give, claims included; below what is claimed, nothing is left.
    pub fn set_budget(&self, pool: &str, bytes: u64) {
        self.book().pools.entry(pool.to_owned()).or_default().budget = bytes;
    }

    /// Promises all of `bytes` to `owner`, or none.
    ///
    /// # Errors
    /// [`Refused::TooLittle`] for the first pool that has too little left,
    /// [`Refused::UnknownPool`] for one without a budget.
    pub fn reserve(&self, owner: &str, bytes: BytesByPool) -> Result<Lease, Refused> {
        let mut book = self.book();
        book.check(&bytes)?;
        book.take(&bytes);
        let number = book.next;
        book.next = number.wrapping_add(1);
        let claim = Claim {
            owner: owner.to_owned(),
            bytes,
            state: LeaseState::Reserved,
        };
        book.claims.insert(number, claim);
        Ok(Lease {
            ledger: self.clone(),
            number,
            owner: owner.to_owned(),
        })
    }

    /// What each pool has left.
    pub fn available(&self) -> BytesByPool {
        let book = self.book();
        book.pools
            .iter()
            .map(|(name, pool)| (name.clone(), pool.available()))
            .collect()
    }

    /// Every claim, the oldest first.
    pub fn claims(&self) -> Vec<Claim> {
        self.book().claims.values().cloned().collect()
    }

    /// Releases every claim of an owner and says how many they were.
    pub fn release_owner(&self, owner: &str) -> usize {
        let mut book = self.book();
        let of_owner = |(number, claim): (&u64, &Claim)| (claim.owner == owner).then_some(*number);
        let numbers: Vec<u64> = book.claims.iter().filter_map(of_owner).collect();
        for number in &numbers {
            book.remove(*number);
        }
        numbers.len()
    }
}

/// A claim in the hands of its owner. It ends with [`Lease::release`], with
/// [`Ledger::release_owner`], or when the value is dropped, whichever is first.
#[derive(Debug)]
pub struct Lease {
    ledger: Ledger,
    number: u64,
    owner: String,
}

impl Lease {
    /// Whose it is.
    pub fn owner(&self) -> &str {
        &self.owner
    }

    /// What it holds now; nothing once released.
    pub fn bytes(&self) -> BytesByPool {
        let book = self.ledger.book();
        book.claims
            .get(&self.number)
            .map(|claim| claim.bytes.clone())
            .unwrap_or_default()
    }

    /// What it stands for now.
    pub fn state(&self) -> LeaseState {
        let book = self.ledger.book();
        book.claims
            .get(&self.number)
            .map_or(LeaseState::Released, |claim| claim.state)
    }

    /// Replaces the promise by what was measured. A measured fact is never refused: where it
    /// is more than the budget, nothing is left for others until it ends.
    ///
    /// # Errors
    /// [`Refused::AlreadyReleased`], [`Refused::UnknownPool`].
    pub fn commit(&self, measured: BytesByPool) -> Result<(), Refused> {
        let mut book = self.ledger.book();
        if let Some(unknown) = measured.keys().find(|name| !book.pools.contains_key(*name)) {
            return Err(Refused::UnknownPool(unknown.clone()));
        }
        let promised = book.remove(self.number).ok_or(Refused::AlreadyReleased)?;
        book.take(&measured);
        let owner = promised.owner;
        let state = LeaseState::Committed;
        book.claims.insert(
            self.number,
            Claim {
                owner,
                bytes: measured,
                state,
            },
        );
        Ok(())
    }

    /// Gives everything back; doing so again changes nothing. Says whether it held anything.
    pub fn release(&self) -> bool {
        self.ledger.book().remove(self.number).is_some()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.release();
    }
}
