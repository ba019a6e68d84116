//! Watching all GPUs: what callers hold and ask. They never wait for the driver without a deadline.

use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use std::{process, thread};

use super::board::{Board, Reading};
use super::host::Host;
use super::library::Library;
use super::pace::PaceMaker;

/// Longer times than this are taken for it, and shorter intervals than the other for that.
const LONGEST_TIME: Duration = Duration::from_secs(86_400);
const SHORTEST_INTERVAL: Duration = Duration::from_millis(1);

pub(super) fn after(wait: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(wait).unwrap_or(now)
}

/// How to watch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MonitorOptions {
    /// The time from one pass over the GPUs to the next; `None` reads on request only.
    pub interval: Option<Duration>,
    /// How long starting NVML, or reading one GPU, may take before it counts as hanging.
    pub deadline: Duration,
    /// While a GPU is lost or there are MIG devices, how often NVML is started anew to look again.
    pub renewal: Duration,
    /// Without an interval: how long NVML stays open after a request. An open NVML blocks the
    /// unloading of the driver, GPU resets and the sleep of a laptop's GPU.
    pub linger: Duration,
    /// The library to load.
    pub library: Library,
    /// The system to ask what NVML does not tell.
    pub host: Host,
}

impl Default for MonitorOptions {
    fn default() -> Self {
        Self {
            interval: Some(Duration::from_secs(5)),
            deadline: Duration::from_secs(3),
            renewal: Duration::from_secs(60),
            linger: Duration::from_secs(10),
            library: Library::default(),
            host: Host::default(),
        }
    }
}

/// Watches the GPUs until it is closed or dropped. Works on in a forked child, where it starts anew.
#[derive(Debug)]
pub struct Monitor {
    options: MonitorOptions,
    generation: Generation,
}

/// The monitor in one process. Threads and NVML do not survive a fork, and a lock may have been held
/// by a thread that the child does not have: a child therefore never touches its parent's generation.
#[derive(Debug)]
struct Generation {
    process: u32,
    /// Leaked, because a thread that hangs in the driver may outlive the monitor.
    shared: &'static Shared,
    child: OnceLock<Box<Generation>>,
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) state: Mutex<State>,
    pub(super) changed: Condvar,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) board: Board,
    pub(super) library: Library,
    /// Requests so far, and those that a pass begun after them has served.
    pub(super) requested: u64,
    pub(super) served: u64,
    pub(super) closing: bool,
    pub(super) closed: bool,
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for `met`, at most until the deadline.
    fn wait_until<'state>(
        &self,
        mut state: MutexGuard<'state, State>,
        deadline: Instant,
        met: impl Fn(&State) -> bool,
    ) -> MutexGuard<'state, State> {
        while !met(&state) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            (state, _) = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state
    }
}

impl Generation {
    fn start(options: &MonitorOptions) -> Self {
        let shared: &'static Shared = Box::leak(Box::new(Shared {
            state: Mutex::new(State {
                board: Board::new(options.interval.is_some()),
                library: options.library.clone(),
                requested: 0,
                served: 0,
                closing: false,
                closed: false,
            }),
            changed: Condvar::new(),
        }));
        let pace_maker = PaceMaker::new(shared, options);
        let started = thread::Builder::new()
            .name("llama-gpu-monitor".to_owned())
            .spawn(move || pace_maker.run());
        if let Err(error) = started {
            let mut state = shared.lock();
            state.closed = true;
            state.board.fail(
                &format!("no thread for the GPU monitor: {error}"),
                Instant::now(),
            );
        }
        Self {
            process: process::id(),
            shared,
            child: OnceLock::new(),
        }
    }
}

impl Monitor {
    /// Starts watching. Returns at once; the first reading comes when the driver has answered.
    pub fn start(mut options: MonitorOptions) -> Self {
        options.deadline = options.deadline.min(LONGEST_TIME);
        options.interval = options
            .interval
            .map(|interval| interval.clamp(SHORTEST_INTERVAL, LONGEST_TIME));
        let generation = Generation::start(&options);
        Self {
            options,
            generation,
        }
    }

    /// The state of this process: that of the parent is left alone after a fork.
    fn shared(&self) -> &'static Shared {
        let here = process::id();
        let mut generation = &self.generation;
        while generation.process != here {
            generation = generation
                .child
                .get_or_init(|| Box::new(Generation::start(&self.options)));
        }
        generation.shared
    }

    /// What was read last. Never waits for the driver.
    pub fn reading(&self) -> Reading {
        self.shared().lock().board.reading(Instant::now())
    }

    /// Reads the GPUs now, also those that sleep, and waits for it: at most twice the deadline, for one
    /// GPU that hangs and the others after it. What has not answered then is as old as it is.
    pub fn refresh(&self) -> Reading {
        self.refresh_from(&self.options.library)
    }

    /// `refresh`, through another library from now on.
    pub(super) fn refresh_from(&self, library: &Library) -> Reading {
        let shared = self.shared();
        let deadline = after(self.options.deadline.saturating_mul(2));
        let mut state = shared.lock();
        if !state.closed {
            state.library.clone_from(library);
            state.requested = state.requested.saturating_add(1);
            let ticket = state.requested;
            shared.changed.notify_all();
            state = shared.wait_until(state, deadline, |state| {
                state.closed || state.served >= ticket
            });
        }
        state.board.reading(Instant::now())
    }

    /// Stops watching and shuts NVML down, so that the driver can be unloaded or a GPU be reset.
    /// Waits at most for the deadline; `false` if a call still hangs then (NVML stays open under it).
    pub fn close(&self) -> bool {
        let shared = self.shared();
        let mut state = shared.lock();
        state.closing = true;
        shared.changed.notify_all();
        let deadline = after(self.options.deadline.saturating_mul(2));
        shared
            .wait_until(state, deadline, |state| state.closed)
            .closed
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let here = process::id();
        let mut generation = Some(&self.generation);
        while let Some(known) = generation {
            if known.process == here {
                known.shared.lock().closing = true;
                known.shared.changed.notify_all();
            }
            generation = known.child.get().map(AsRef::as_ref);
        }
    }
}
