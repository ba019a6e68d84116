//! Which model goes to which GPUs, and who leaves for it.
//!
//! ```text
//! policy ─┐
//! GPUs ───┼─ candidate ─ pack (one GPU, smallest set) ─ split (layers) ─┐
//! running ┘              evict ─ cover (cheapest to leave) ─────────────┴─ decide
//! ```
//!
//! Owns the decision. Must not read a clock, a file or a driver, and must not remember: the
//! same values in give the same placement out.

mod advice;
mod alternatives;
mod assign;
mod candidate;
mod cover;
mod decide;
mod evict;
mod explain;
mod islands;
mod ledger;
mod listing;
mod pack;
mod packing;
mod place;
mod plan;
mod policy;
mod refusal;
mod split;
mod words;

pub use alternatives::{Explanation, explain};
pub use decide::{Decision, MemoryModel, Share, Step, decide};
pub use ledger::{BytesByPool, Claim, HOST, Lease, LeaseState, Ledger, Refused};
pub use listing::{Alternative, Outcome};
pub use place::{
    DoesNotFit, Mode, PlaceError, PlacedDevice, Placement, Remembered, place, place_again,
};
pub use plan::{Plan, PlanError, Wanted, plan};
pub use policy::{CpuUse, GpuName, Policy, Running, Strategy, UnknownChoice};
