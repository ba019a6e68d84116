//! The thread that sets the pace. It makes no NVML call.
//!
//! It gives orders to a [`Sampler`], and when that hangs in a call on one GPU, leaves it there and goes
//! on with another, without that GPU, until the call returns. So a GPU that hangs costs one thread and
//! hides no other; a driver that hangs as a whole costs one more.

use std::collections::BTreeSet;
use std::sync::PoisonError;
use std::sync::mpsc::{RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use super::library::Library;
use super::monitor::{MonitorOptions, Shared, after};
use super::sampler::{Order, Report, Sampler};

/// The longest wait between two attempts to start NVML.
const LONGEST_WAIT: Duration = Duration::from_secs(300);

enum Next {
    Pass {
        ticket: u64,
        asked: bool,
        library: Library,
    },
    Release,
    Close,
}

/// A sampler that hangs: on one GPU, or before it came to any.
struct LeftBehind {
    sampler: Sampler,
    gpu: Option<u32>,
}

pub(super) struct PaceMaker {
    shared: &'static Shared,
    options: MonitorOptions,
    sampler: Option<Sampler>,
    left_behind: Vec<LeftBehind>,
    failures: u32,
    session_began: Instant,
    next_pass: Option<Instant>,
}

impl PaceMaker {
    pub(super) fn new(shared: &'static Shared, options: &MonitorOptions) -> Self {
        Self {
            shared,
            options: options.clone(),
            sampler: None,
            left_behind: Vec::new(),
            failures: 0,
            session_began: Instant::now(),
            next_pass: options.interval.map(|_| Instant::now()),
        }
    }

    pub(super) fn run(mut self) {
        loop {
            match self.next() {
                Next::Pass {
                    ticket,
                    asked,
                    library,
                } => {
                    self.pass(&library, asked);
                    self.schedule();
                    let mut state = self.shared.lock();
                    state.served = ticket;
                    drop(state);
                    self.shared.changed.notify_all();
                }
                Next::Release => self.release(),
                Next::Close => break,
            }
        }
        self.release();
        let mut state = self.shared.lock();
        state.board.close();
        state.closed = true;
        drop(state);
        self.shared.changed.notify_all();
    }

    fn next(&self) -> Next {
        let mut state = self.shared.lock();
        loop {
            if state.closing {
                return Next::Close;
            }
            let asked = state.requested > state.served;
            let now = Instant::now();
            if asked || self.next_pass.is_some_and(|time| time <= now) {
                return Next::Pass {
                    ticket: state.requested,
                    asked,
                    library: state.library.clone(),
                };
            }
            let wait = match self.next_pass {
                Some(time) => time.saturating_duration_since(now),
                None if self.sampler.is_some() => self.options.linger,
                None => Duration::MAX,
            };
            let (guard, waited) = self
                .shared
                .changed
                .wait_timeout(state, wait)
                .unwrap_or_else(PoisonError::into_inner);
            state = guard;
            if waited.timed_out() && self.next_pass.is_none() && state.requested == state.served {
                return Next::Release;
            }
        }
    }

    /// A driver that cannot be started is asked again ever more rarely, but never given up.
    fn schedule(&mut self) {
        let rarer = 1_u32.checked_shl(self.failures).unwrap_or(u32::MAX);
        self.next_pass = self.options.interval.map(|interval| {
            let longest = LONGEST_WAIT.max(interval);
            after(interval.saturating_mul(rarer).min(longest))
        });
    }

    /// Ends the thread that owns NVML, and waits until it has shut it down.
    fn release(&mut self) {
        if let Some(Sampler { orders, reports }) = self.sampler.take() {
            drop(orders);
            while reports.recv_timeout(self.options.deadline).is_ok() {}
        }
    }

    /// One pass over all GPUs that can be asked.
    fn pass(&mut self, library: &Library, asked: bool) {
        self.collect_left_behind();
        if self.options.library != *library {
            self.options.library.clone_from(library);
            self.shared.lock().board.forget();
        }
        let restart = self.session_began.elapsed() >= self.options.renewal
            && self.shared.lock().board.wants_a_new_session();
        // One more attempt for each GPU that turns out to hang; each is left out of the next.
        while !self.left_behind.iter().any(|left| left.gpu.is_none()) {
            if self.shared.lock().closing || self.attempt(library, asked, restart) {
                return;
            }
        }
        let words = format!(
            "the NVIDIA driver does not answer: a call has not returned within {} s; see dmesg for Xid errors",
            self.options.deadline.as_secs_f64()
        );
        self.shared.lock().board.fail(&words, Instant::now());
    }

    /// Gives one order and follows it. `false` if a call hung, and the sampler was left behind.
    fn attempt(&mut self, library: &Library, asked: bool, restart: bool) -> bool {
        let sampler = match self.sampler.take() {
            Some(sampler) => sampler,
            None => match Sampler::spawn(self.options.host.clone()) {
                Ok(sampler) => {
                    self.session_began = Instant::now();
                    sampler
                }
                Err(error) => {
                    let words = format!("no thread to ask the NVIDIA driver with: {error}");
                    self.shared.lock().board.fail(&words, Instant::now());
                    return true;
                }
            },
        };
        let skip: BTreeSet<u32> = self
            .left_behind
            .iter()
            .filter_map(|left| left.gpu)
            .collect();
        if restart {
            self.session_began = Instant::now();
        }
        let order = Order {
            library: library.clone(),
            restart,
            wake: asked,
            skip: skip.clone(),
            known: self.shared.lock().board.identities(),
        };
        if sampler.orders.send(order).is_err() {
            return self.sampler_died();
        }
        self.follow(sampler, &skip)
    }

    fn follow(&mut self, sampler: Sampler, skip: &BTreeSet<u32>) -> bool {
        let mut gpu = None;
        loop {
            let report = sampler.reports.recv_timeout(self.options.deadline);
            let now = Instant::now();
            let mut state = self.shared.lock();
            let board = &mut state.board;
            match report {
                Ok(Report::Started { driver_version }) => board.begin(driver_version, skip),
                Ok(Report::Reading(index)) => gpu = Some(index),
                Ok(Report::Asleep(index)) => board.leave_asleep(index),
                Ok(Report::Read(index, gpus)) => {
                    gpu = None;
                    board.put(index, gpus, now);
                }
                Ok(Report::Finished) => {
                    board.finish(now);
                    self.failures = 0;
                    break;
                }
                Ok(Report::AllAsleep) => {
                    board.all_asleep(now);
                    self.failures = 0;
                    break;
                }
                Ok(Report::NotStarted(words)) => {
                    board.fail(&words, now);
                    self.failures = self.failures.saturating_add(1);
                    break;
                }
                Err(RecvTimeoutError::Timeout) => {
                    if let Some(index) = gpu {
                        board.stall(index, &self.hanging());
                    }
                    self.left_behind.push(LeftBehind { sampler, gpu });
                    return false;
                }
                Err(RecvTimeoutError::Disconnected) => {
                    drop(state);
                    return self.sampler_died();
                }
            }
        }
        self.sampler = Some(sampler);
        true
    }

    fn sampler_died(&mut self) -> bool {
        let words = "the thread that asks the NVIDIA driver has failed; it is started anew";
        self.shared.lock().board.fail(words, Instant::now());
        self.failures = self.failures.saturating_add(1);
        true
    }

    fn hanging(&self) -> String {
        format!(
            "the GPU does not answer: a call has not returned within {} s; see dmesg for Xid errors",
            self.options.deadline.as_secs_f64()
        )
    }

    /// Looks after the samplers that hung: one that has returned from its call is let go, and its GPU
    /// is read again with the others.
    fn collect_left_behind(&mut self) {
        self.left_behind
            .retain(|left| matches!(left.sampler.reports.try_recv(), Err(TryRecvError::Empty)));
    }
}
